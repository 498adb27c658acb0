"""Writing LoRA files: kohya's keys and diffusers' keys, so that each reader gets the same change of the weights."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sd_train.errors import ModelError, RunError
from sd_train.families.streaming import write_network
from sd_train.lora_files.adapter import DOWN, MAGNITUDE, UP, Adapter, without_mid
from sd_train.lora_files.alphas import ALPHAS, PEFT_METADATA, json_table
from sd_train.lora_files.names import Place, diffusers_name, kohya_name
from sd_train.lora_files.reading import LoraFile, lora_from_tensors

OutputFormat = Literal["kohya", "diffusers"]

_FORMAT_ENTRIES = (ALPHAS, PEFT_METADATA, "format")
"""Metadata that describe the keys, not the training."""


@dataclass(frozen=True)
class LoraTensors:
    """What goes into a file."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    """What the format itself needs."""


def to_kohya(tensors: Mapping[str, Tensor], family: str, metadata: Mapping[str, str] | None = None) -> LoraTensors:
    """Tensors of any format under kohya's keys, with an alpha for every module.

    Raises:
        ModelError: if there are keys that cannot be carried over.
    """
    return kohya_tensors(_all_adapters(lora_from_tensors(tensors, metadata, family)), family)


def to_diffusers(tensors: Mapping[str, Tensor], family: str, metadata: Mapping[str, str] | None = None) -> LoraTensors:
    """Tensors of any format under diffusers' (PEFT's) keys, and the metadata that belong to them.

    alpha / rank is multiplied into `lora_B`, because diffusers before 0.34 and others do not look at the metadata that
    tell of it; the alphas themselves are kept in `sd_train_alphas`.

    Raises:
        ModelError: if a module is no plain LoRA, or there are keys that cannot be carried over.
    """
    return diffusers_tensors(_all_adapters(lora_from_tensors(tensors, metadata, family)))


def _all_adapters(lora: LoraFile) -> list[Adapter]:
    refuse_leftovers(lora)
    return list(lora.adapters())


def refuse_leftovers(lora: LoraFile) -> None:
    """Nothing may be lost on the way.

    Raises:
        ModelError: if keys belong to no module, stand twice, or a module lacks factors.
    """
    lost = [(lora.unmapped, "belong to no module of a Stable Diffusion model"), (lora.twice, "stand there twice")]
    lost.append(([f"{place.role}.{place.path}" for place in lora.incomplete()], "lack factors"))
    problems = [f"{lora.origin}: {len(keys)} keys {what}: {', '.join(keys[:3])}" for keys, what in lost if keys]
    if problems:
        raise ModelError(*(f"{problem}; see sd-train lora check {lora.origin}" for problem in problems))


def kohya_tensors(adapters: Iterable[Adapter], family: str) -> LoraTensors:
    """`adapters` under the keys that kohya's programs use for `family`; LyCORIS factors keep their names."""
    tensors: dict[str, Tensor] = {}
    for adapter in adapters:
        key = kohya_name(adapter.place, family)
        alpha = adapter.alpha or adapter.rank
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
        tensors |= {f"{key}.{name}": tensor for name, tensor in adapter.factors.items()}
    return LoraTensors(tensors, {})


def with_one_alpha(adapters: Iterable[Adapter]) -> list[Adapter]:
    """The same changes, with the commonest alpha for every plain LoRA module and the rest in the up factor.

    diffusers (0.42) loses the alphas of attention layers in kohya's files where they differ.
    """
    every = list(adapters)
    alphas = Counter(adapter.alpha or adapter.rank for adapter in every if adapter.kind == "lora")
    if len(alphas) < 2:
        return every
    common = float(alphas.most_common(1)[0][0] or 1)
    return [_with_alpha(adapter, common) if adapter.kind == "lora" else adapter for adapter in every]


def _with_alpha(adapter: Adapter, alpha: float) -> Adapter:
    """The same change with another alpha."""
    ratio = float(adapter.alpha or adapter.rank or alpha) / alpha
    up = adapter.factors[UP]
    scaled = up if ratio == 1 else (up.float() * ratio).to(up.dtype)
    return replace(adapter, alpha=alpha, factors={**adapter.factors, UP: scaled})


def diffusers_tensors(adapters: Iterable[Adapter]) -> LoraTensors:
    """`adapters` under diffusers' keys (see `to_diffusers`)."""
    tensors: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    ranks: dict[Place, int] = {}
    with_dora = False
    for given in adapters:
        adapter = without_mid(given)
        name, rank = diffusers_name(adapter.place), adapter.rank
        if adapter.kind != "lora" or rank is None:
            raise ModelError(
                f"{name}: diffusers' format has no {adapter.kind}; make it a plain LoRA first with "
                "sd-train lora convert --to lora"
            )
        tensors[f"{name}.lora_A.weight"] = adapter.factors[DOWN]
        tensors[f"{name}.lora_B.weight"] = _with_alpha(adapter, rank).factors[UP]
        if adapter.is_dora:
            with_dora = True
            tensors[f"{name}.lora_magnitude_vector"] = _peft_magnitude(adapter)
        ranks[adapter.place] = rank
        if adapter.alpha and adapter.alpha != rank:
            alphas[name] = adapter.alpha
    metadata = {"format": "pt", PEFT_METADATA: json.dumps(_peft_table(ranks, with_dora), sort_keys=True)}
    if alphas:
        metadata[ALPHAS] = json.dumps(alphas, sort_keys=True)
    return LoraTensors(tensors, metadata)


def _peft_magnitude(adapter: Adapter) -> Tensor:
    magnitude = adapter.factors[MAGNITUDE]
    if magnitude.numel() != adapter.factors[UP].shape[0] or magnitude.shape[0] == 1 != magnitude.numel():
        raise ModelError(
            f"{diffusers_name(adapter.place)}: its magnitudes belong to the inputs, diffusers' format has one for each "
            "output; keep kohya's format"
        )
    flat = magnitude.flatten()
    return flat if adapter.factors[DOWN].ndim == 2 else flat.view(1, -1, 1, 1)


def _peft_table(ranks: Mapping[Place, int], with_dora: bool) -> dict[str, Any]:
    """What diffusers 0.34 and later make a `LoraConfig` of: alpha is the rank everywhere.

    The names are without `text_model.`, which live text encoders have or have not: PEFT matches the ends of names.
    """
    table: dict[str, Any] = {}
    for role in dict.fromkeys(place.role for place in ranks):
        own = {place.path.removeprefix("text_model."): rank for place, rank in ranks.items() if place.role == role}
        common = Counter(own.values()).most_common(1)[0][0]
        other = {path.replace(".", r"\."): rank for path, rank in own.items() if rank != common}
        entries = {"r": common, "lora_alpha": common, "rank_pattern": other, "alpha_pattern": other}
        entries |= {"target_modules": list(own), "use_dora": with_dora}
        table |= {f"{role}.{name}": value for name, value in entries.items()}
    return table


def described(metadata: Mapping[str, str], adapters: Iterable[Adapter], added: Mapping[str, str]) -> dict[str, str]:
    """`metadata` with the ranks and alphas as they are now, and `added`; a mixture is "Dynamic" (sd-scripts' word)."""
    entries = {name: value for name, value in metadata.items() if name not in _FORMAT_ENTRIES}
    entries = {name: value for name, value in entries.items() if not name.startswith("sshs_")}
    found: dict[bool, tuple[set[int], set[float]]] = {False: (set(), set()), True: (set(), set())}
    for adapter in adapters:
        if adapter.rank is not None:
            ranks, alphas = found[adapter.is_conv]
            ranks.add(adapter.rank)
            alphas.add(float(adapter.alpha or adapter.rank))
    ranks, alphas = found[False] if found[False][0] else found[True]
    if ranks:
        entries["ss_network_dim"] = _only(ranks)
        entries["ss_network_alpha"] = _only(alphas)
    if found[True][0]:
        arguments = json_table(entries, "ss_network_args")
        arguments |= {"conv_dim": _only(found[True][0]), "conv_alpha": _only(found[True][1])}
        entries["ss_network_args"] = json.dumps(arguments)
    return entries | dict(added)


def _only(values: set[int] | set[float]) -> str:
    return f"{next(iter(values)):g}" if len(values) == 1 else "Dynamic"


def write_lora(
    path: Path, content: LoraTensors, metadata: Mapping[str, str], dtype: torch.dtype, *, overwrite: bool
) -> None:
    """Write `content` to `path` in `dtype`, with its hashes.

    Raises:
        RunError: if `path` exists and is not to be overwritten, or the disk refuses.
        ModelError: if `dtype` cannot hold the values.
    """
    refuse_existing(path, overwrite)
    cast: dict[str, Tensor] = {}
    for name, tensor in content.tensors.items():
        # An alpha is one number; in bfloat16 most would change.
        chosen = dtype if tensor.is_floating_point() and not name.endswith(".alpha") else tensor.dtype
        cast[name] = tensor.to(chosen)
        if tensor.is_floating_point() and not torch.isfinite(cast[name]).all() and torch.isfinite(tensor).all():
            raise ModelError(f"{path}: {name} is too large for {dtype}; choose --save_precision bf16 or float")
    write_network(path, cast, {**metadata, **content.metadata})


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Nothing is overwritten unless asked for.

    Raises:
        RunError: if `path` is there already, or its name has another ending than `.safetensors`.
    """
    if path.suffix.lower() != ".safetensors":
        raise RunError(f"--save_to = {path}: LoRA files are written as .safetensors; choose such a name")
    if path.exists() and not overwrite:
        raise RunError(f"--save_to = {path}: exists already; choose another name or give --overwrite")
