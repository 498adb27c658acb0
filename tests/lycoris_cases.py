"""LyCORIS networks of all kinds, and a model with every kind of module and few of each."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sd_train.config.lycoris_args import NETWORK_OPTIONS, LycorisArgs, check_lycoris, read_lycoris
from sd_train.config.values import parse_arguments
from sd_train.demo.tiny_model import TinyKind
from sd_train.errors import Problems
from sd_train.families.latent import LatentDiffusion
from sd_train.families.parts import ModelParts
from sd_train.families.registry import make_family
from sd_train.families.saving import save_model
from sd_train.trainables.lycoris import Lycoris, LycorisSettings
from sd_train.trainables.lycoris_module import LycorisModule
from sd_train.types import Batch, Geometry, Update
from tests.models import fresh_tiny, small_parts

CASES = [
    "lora use_tucker=True", "lora use_scalar=True train_norm=True", "dora wd_on_output=False", "lora rs_lora=True",
    "loha use_tucker=True dora_wd=True use_scalar=True", "loha", "lokr factor=4 decompose_both=True",
    "lokr use_tucker=True factor=2", "lokr full_matrix=True use_scalar=True", "ia3", "ia3 preset=ia3",
    "ia3 train_on_input=True", "dylora block_size=2", "glora use_scalar=True", "full", "diag-oft rescaled=True",
    "oft constraint=0.001", "boft rescaled=True constraint=0.001",
]  # fmt: skip
"""The algorithm, and what changes how it is computed."""


def made(parts: ModelParts) -> LatentDiffusion:
    family = make_family(parts)
    assert isinstance(family, LatentDiffusion)
    return family


def write_small(folder: Path) -> Path:
    """The model as a diffusers folder."""
    path = folder / "small"
    save_model(path, small_parts(), "diffusers", None, {})
    return path


@cache
def _loaded(whole: bool, kind: TinyKind) -> LatentDiffusion:
    return fresh_tiny(kind) if whole else made(small_parts(kind))


def tiny(whole: bool = False, kind: TinyKind = "sd1") -> LatentDiffusion:
    """The same model every time, without what was installed in it before; `whole`: with every block."""
    family = _loaded(whole, kind)
    for network in family.networks.values():
        for module in network.modules():
            module.__dict__.pop("forward", None)
    return family


def options(words: str, **more: Any) -> dict[str, Any]:
    """The options of a network whose `network_args` are `words`, the first of them the algorithm."""
    values = {
        "network_module": "lycoris.kohya", "network_dim": 4, "network_alpha": 2.0, "network_dropout": None,
        "network_args": parse_arguments([f"algo={words.split()[0]}", *words.split()[1:]]),
        "dim_from_weights": False, "output_lora_format": "kohya",
    }  # fmt: skip
    assert values.keys() == set(NETWORK_OPTIONS)
    return values | more


def args(words: str, **more: Any) -> LycorisArgs:
    problems, warnings = Problems(), list[str]()
    check_lycoris(options(words, **more), lambda name: f"--{name}", problems, warnings)
    assert problems.found == []
    return read_lycoris(options(words, **more))


def installed(family: LatentDiffusion, chosen: LycorisArgs, seed: int = 1, **more: Any) -> Lycoris:
    network = Lycoris(LycorisSettings(chosen, dict.fromkeys(family.networks, 1e-3), seed, **more))
    network.install(family)
    return network


def randomise(network: Lycoris, size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for group in network.groups():
            for parameter in group.params.values():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def prediction(family: LatentDiffusion) -> Tensor:
    place = Geometry((64, 64), (0, 0), (64, 64), False, (64, 64))
    conditioning = family.condition(family.encode_texts(["a cat on a mat"]), {}, [place])
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    return family.predict(noisy, torch.tensor([300]), conditioning)


def counters(network: Lycoris, step: int, micro: int) -> None:
    update = Update(step, 0, step, False, 1, iter(()))
    network.before_batch(update, Batch([], [], [], None, None, *[torch.zeros(0)] * 4, None, None, [], micro))


def randomise_module(module: LycorisModule) -> None:
    with torch.no_grad():
        for parameter in module.parameters.values():
            parameter.add_(0.1)
