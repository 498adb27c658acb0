"""LoRAs for tiny models with known changes, in every format; and what diffusers makes of a file."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sd_train.demo.tiny_model import TinyKind
from sd_train.families.keys import published_text_name
from sd_train.families.sources import TensorSource
from sd_train.lora_files.adapter import DOWN, UP, Adapter
from sd_train.lora_files.extracting import targets
from sd_train.lora_files.merging import published_names
from sd_train.lora_files.names import Place
from tests.models import tiny_parts

RANKS = ("one", "full", "mixed")
ALPHAS = ("rank", "three", "mixed")


@cache
def networks(kind: TinyKind) -> dict[str, TensorSource]:
    """What a LoRA can change in the tiny model; nobody changes it."""
    return {role: part.tensors for role, part in tiny_parts(kind).parts.items() if role != "vae"}


def all_targets(kind: TinyKind) -> list[Place]:
    """Every module that gets a LoRA, with convolutions."""
    return [
        place
        for role, source in networks(kind).items()
        for place in targets(role, published_names(source, role), convolutions=True)
    ]


def some_targets(kind: TinyKind) -> list[Place]:
    """Linear layers, 1x1 and 3x3 convolutions of every part of the model."""
    places = all_targets(kind)
    text = [place for place in places if place.role != "unet"]
    return places[2::23] + [place for place in places if "samplers" in place.path] + text[:4] + text[-3:]


def make(kind: TinyKind, places: Iterable[Place], ranks: str = "mixed", alphas: str = "mixed") -> list[Adapter]:
    """Random factors for `places`, float32."""
    generator = torch.Generator().manual_seed(11)
    sources = networks(kind)
    made = []
    for number, place in enumerate(dict.fromkeys(places)):
        shape = sources[place.role].shape(f"{place.path}.weight")
        full = min(shape[0], torch.Size(shape[1:]).numel())
        rank = {"one": 1, "full": full, "mixed": (1, 2, 5, full)[number % 4]}[ranks]
        alpha = {"rank": float(rank), "three": 3.0, "mixed": (0.5, 3.0, 8.0)[number % 3]}[alphas]
        ends = [1] * (len(shape) - 2)
        factors = {
            UP: torch.randn(shape[0], rank, *ends, generator=generator) * 0.1,
            DOWN: torch.randn(rank, *shape[1:], generator=generator) * 0.1,
        }
        made.append(Adapter(place, "lora", factors, alpha))
    return made


def expected(adapter: Adapter) -> Tensor:
    """up @ down * alpha / rank, written out once more."""
    up, down = adapter.factors[UP], adapter.factors[DOWN]
    total = torch.einsum("or,ri->oi", up.flatten(1).double(), down.flatten(1).double())
    assert adapter.alpha is not None
    return (total * adapter.alpha / down.shape[0]).float().view(up.shape[0], *down.shape[1:])


def in_diffusers(pipeline: Any, path: Path) -> dict[Place, Tensor]:
    """The change of each weight that diffusers makes of the file at `path`."""
    roles = [role for role in ("unet", "text_encoder", "text_encoder_2") if getattr(pipeline, role, None) is not None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pipeline.load_lora_weights(path)
            return {
                Place(role, name if role == "unet" else published_text_name(name)): delta
                for role in roles
                for name, delta in _deltas(getattr(pipeline, role))
            }
        finally:
            pipeline.unload_lora_weights()


def _deltas(network: Any) -> list[tuple[str, Tensor]]:
    layers = [(name, module) for name, module in network.named_modules() if hasattr(module, "get_delta_weight")]
    return [(name, layer.get_delta_weight(layer.active_adapters[0]).detach()) for name, layer in layers]


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """A safetensors file without any of our writing."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def assert_same(found: dict[Place, Tensor], adapters: Sequence[Adapter]) -> None:
    """Every change is there, no other is, and all are equal."""
    assert sorted(found) == sorted(adapter.place for adapter in adapters)
    for adapter in adapters:
        torch.testing.assert_close(
            found[adapter.place], expected(adapter), atol=2e-5, rtol=1e-4, msg=str(adapter.place)
        )
