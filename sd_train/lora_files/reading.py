"""Reading LoRA files: which keys there are, what they belong to, which model family they are for."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from torch import Tensor

from sd_train.errors import ModelError
from sd_train.families.pickles import read_pickled_tensors
from sd_train.families.sources import DTYPES, DictSource, SafetensorsSource, TensorSource
from sd_train.lora_files.adapter import DOWN, FACTORS, MAGNITUDE, UP, Adapter, Kind, kind_of
from sd_train.lora_files.alphas import PEFT_METADATA, ToldAlphas
from sd_train.lora_files.names import Place, find_place

Format = Literal["kohya", "peft", "diffusers"]

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_SUFFIXES: tuple[tuple[str, str, Format], ...] = (
    *((f".{name}", name, "kohya") for name in sorted(FACTORS - {"weight"}, key=len, reverse=True)),
    *((f".lora_A{middle}.weight", DOWN, "peft") for middle in ("", ".default")),
    *((f".lora_B{middle}.weight", UP, "peft") for middle in ("", ".default")),
    *((f".lora_magnitude_vector{end}", MAGNITUDE, "peft") for end in ("", ".weight", ".default.weight")),
    *((f"{joint}.down.weight", DOWN, "diffusers") for joint in (".lora_linear_layer", ".lora", "_lora")),
    *((f"{joint}.up.weight", UP, "diffusers") for joint in (".lora_linear_layer", ".lora", "_lora")),
    # The vector of (IA)^3, last because it ends like the others.
    (".weight", "weight", "kohya"),
)

_WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl", 1280: "sdxl_refiner"}
"""What cross-attention reads, by family."""

_VERSIONS = (
    ("sdxl_base", "sdxl"),
    ("stable-diffusion-xl-v1-base", "sdxl"),
    ("stable-diffusion-xl-v1-refiner", "sdxl_refiner"),
    ("sdxl_refiner", "sdxl_refiner"),
    ("sdxl", "sdxl"),
    ("sd_v1", "sd1"),
    ("stable-diffusion-v1", "sd1"),
    ("sd_v2", "sd2"),
    ("stable-diffusion-v2", "sd2"),
)
"""Beginnings of `ss_base_model_version` and `modelspec.architecture`."""


_OF_SDXL = re.compile(r"transformer_blocks[._][1-9]|^lora_te1_|^lora_unet_(input|middle|output)_block")
"""In keys of no other family."""


@dataclass
class LoraFile:
    """A LoRA file: its modules, whose factors are read when they are asked for."""

    origin: str
    """Its path, for messages."""
    source: TensorSource
    metadata: dict[str, str]
    family: str | None
    """"sd1", "sd2", "sdxl" or "sdxl_refiner"; None if nothing in the file tells."""
    formats: frozenset[Format]
    keys: dict[Place, dict[str, str]] = field(default_factory=dict)
    """For each module, the key of each factor."""
    unmapped: list[str] = field(default_factory=list)
    """Keys that belong to no module of a Stable Diffusion model."""
    twice: list[str] = field(default_factory=list)
    """Keys whose module and factor another key has already."""

    def kind(self, place: Place) -> Kind | None:
        """The algorithm at `place`; None if some of its factors are missing."""
        return kind_of(frozenset(self.keys[place]))

    def places(self) -> list[Place]:
        """Every module whose factors are there in full."""
        return [place for place in self.keys if self.kind(place)]

    def incomplete(self) -> list[Place]:
        """Modules of which factors are missing."""
        return [place for place in self.keys if not self.kind(place)]

    def adapter(self, place: Place) -> Adapter:
        """The factors at `place`, one of `places()`."""
        kind = self.kind(place)
        if kind is None:
            raise ModelError(f"{self.origin}: {place.role}.{place.path} lacks factors: {sorted(self.keys[place])}")
        factors = {factor: self.source.read(key) for factor, key in self.keys[place].items() if factor != "alpha"}
        alpha_key = self.keys[place].get("alpha")
        alpha = None if alpha_key is None else self._number(alpha_key)
        if kind == "lora" and factors[DOWN].ndim < 2:
            shape = tuple(factors[DOWN].shape)
            raise ModelError(f"{self.origin}: {self.keys[place][DOWN]} is no matrix ({shape}); download the file again")
        if kind == "lora" and alpha is None:
            alpha, folded = self._told.alpha(place, factors[DOWN].shape[0])
            if folded:
                factors[UP] = (factors[UP].float() * (factors[DOWN].shape[0] / folded)).to(factors[UP].dtype)
        if MAGNITUDE in factors and self.keys[place][MAGNITUDE].find("lora_magnitude_vector") > 0:
            # PEFT has one magnitude for each output, as [out] or [1, out, 1, 1].
            factors[MAGNITUDE] = factors[MAGNITUDE].reshape(-1, *[1] * (factors[DOWN].ndim - 1))
        return Adapter(place, kind, factors, alpha)

    def _number(self, key: str) -> float:
        if not all(self.source.shape(key)):
            raise ModelError(f"{self.origin}: {key} holds no number; download the file again")
        number = float(self.source.read(key).flatten()[0])
        if not math.isfinite(number):
            raise ModelError(f"{self.origin}: {key} is {number}, and no alpha is; download the file again")
        return number

    @cached_property
    def _told(self) -> ToldAlphas:
        return ToldAlphas.of(self.metadata, self.origin)

    def adapters(self) -> Iterator[Adapter]:
        """Every module's factors, one at a time."""
        return map(self.adapter, self.places())


def open_lora(path: Path, family: str | None = None) -> LoraFile:
    """Read the keys of the file at `path`; its tensors are read later, module by module.

    `family` says what the LoRA is for where that is known.

    Raises:
        ModelError: if the file is missing, damaged or holds no LoRA.
    """
    if path.is_dir() or not path.exists():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ModelError(f"{path}: {what}; give a LoRA file (.safetensors, .ckpt or .pt)")
    if path.suffix.lower() == ".safetensors":
        source = SafetensorsSource.open([path])
        return describe_source(source, source.metadata | _peft_config(path), str(path), family)
    return describe_source(DictSource(read_pickled_tensors(path)), {}, str(path), family)


def _peft_config(path: Path) -> dict[str, str]:
    """What PEFT writes beside its own files."""
    config = path.with_name("adapter_config.json")
    if path.name != "adapter_model.safetensors" or not config.is_file():
        return {}
    try:
        return {PEFT_METADATA: config.read_text(encoding="utf-8-sig")}
    except (OSError, UnicodeDecodeError) as problem:
        raise ModelError(f"{config}: cannot be read ({problem}); it tells the alpha of {path.name}") from None


def lora_from_tensors(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    family: str | None = None,
    origin: str = "the LoRA",
) -> LoraFile:
    """The same for tensors in memory."""
    return describe_source(DictSource(tensors), dict(metadata or {}), origin, family)


def describe_source(source: TensorSource, metadata: dict[str, str], origin: str, family: str | None) -> LoraFile:
    """Sort the keys of `source` by module.

    Raises:
        ModelError: if there is no LoRA in it.
    """
    split = {key: found for key in source.names() if (found := _split(key))}
    family = family or _told_family(metadata)
    formats = frozenset(form for _, factor, form in split.values() if factor != "alpha")
    lora = LoraFile(origin, source, metadata, family, formats)
    for key in source.names():
        place = find_place(split[key][0], family) if key in split else None
        if place is None:
            lora.unmapped.append(key)
        elif split[key][1] in lora.keys.setdefault(place, {}):
            lora.twice.append(key)
        else:
            lora.keys[place][split[key][1]] = key
    if not lora.places():
        shown = ", ".join(source.names()[:3]) or "nothing"
        raise ModelError(f"{origin}: holds no LoRA of a Stable Diffusion model (it has {shown}, ...); give a LoRA file")
    lora.family = family or _shown_family(lora)
    if lora.family == "sdxl_refiner" and family is None:
        return describe_source(source, metadata, origin, "sdxl_refiner")
    return lora


def _split(key: str) -> tuple[str, str, Format] | None:
    """The module's part of `key`, the factor by kohya's name, and whose spelling it is."""
    for suffix, factor, form in _SUFFIXES:
        if key.endswith(suffix):
            return key.removesuffix(suffix), factor, form
    return None


def _told_family(metadata: Mapping[str, str]) -> str | None:
    for name in ("ss_base_model_version", "modelspec.architecture"):
        for start, family in _VERSIONS:
            if metadata.get(name, "").startswith(start):
                return family
    return None


def _shown_family(lora: LoraFile) -> str | None:
    """What names and shapes tell."""
    for place, keys in lora.keys.items():
        if place.role == "unet" and ".attn2.to_k" in place.path and DOWN in keys:
            family = _WIDTHS.get(_inputs(lora, keys))
            if family is not None:
                return family
    if any(place.role == "text_encoder_2" for place in lora.keys):
        return "sdxl"
    if any(_OF_SDXL.search(key) for keys in lora.keys.values() for key in keys.values()):
        return "sdxl"
    for place, keys in lora.keys.items():
        if place.role == "text_encoder" and "self_attn" in place.path and DOWN in keys:
            return {768: "sd1", 1024: "sd2"}.get(_inputs(lora, keys))
    return None


def _inputs(lora: LoraFile, keys: Mapping[str, str]) -> int:
    """How many numbers a module takes; 0 where its factor is no matrix."""
    return next(iter(lora.source.shape(keys[DOWN])[1:]), 0)
