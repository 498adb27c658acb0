"""`sd-train lora merge|resize|extract|convert`: the actions that write a file."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from sd_train.commands.convert import check_target
from sd_train.commands.lora import PRECISIONS
from sd_train.errors import ConfigError, ModelError
from sd_train.families.parts import ModelParts, ModelRequest, read_model
from sd_train.families.saving import SaveForm, save_model
from sd_train.families.sources import Part
from sd_train.lora_files.adapter import BIASES, Adapter
from sd_train.lora_files.decompose import Decomposition, Method, RankRule
from sd_train.lora_files.decompose import resize as resize_adapter
from sd_train.lora_files.extracting import Extraction
from sd_train.lora_files.extracting import extract as extract_adapters
from sd_train.lora_files.merging import Weighted, as_plain, merge_into, merge_loras, only_biases
from sd_train.lora_files.reading import LoraFile, open_lora
from sd_train.lora_files.writing import (
    described,
    diffusers_tensors,
    kohya_tensors,
    refuse_existing,
    refuse_leftovers,
    with_one_alpha,
    write_lora,
)

_ANY_RANK = 1 << 16
"""More than any weight has."""

FAMILY_VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}
"""`ss_base_model_version` of sd-scripts."""


def merge(given: argparse.Namespace) -> None:
    """LoRAs into a model, or into one LoRA."""
    loras = _weighted(given)
    if given.sd_model is not None:
        _merge_into_model(given, loras)
        return
    if given.method == "svd" and given.new_rank is None:
        raise ConfigError("--method svd: needs a rank; give --new_rank")
    if given.method == "concat" and (given.new_rank, given.new_conv_rank) != (None, None):
        raise ConfigError("--new_rank: has no effect with --method concat, whose ranks add up; choose --method svd")
    refuse_existing(given.save_to, given.overwrite)
    families = {weighted.lora.family for weighted in loras} - {None}
    if len(families) > 1:
        raise ModelError(f"--models: LoRAs of different families ({', '.join(sorted(map(str, families)))})")
    rule = _rule(given) if given.method == "svd" else None
    adapters = list(merge_loras(loras, rule, _device(given)))
    names = ", ".join(f"{weighted.lora.origin} x {weighted.multiplier:g}" for weighted in loras)
    kept = _shared([weighted.lora.metadata for weighted in loras])
    _write(given, loras[0].lora, adapters, kept, {"ss_training_comment": f"merged from {names}"})


def _merge_into_model(given: argparse.Namespace, loras: Sequence[Weighted]) -> None:
    form: SaveForm = given.save_model_as or _form(given.save_to)
    sources = [("--sd_model", given.sd_model), *(("--models", str(path)) for path in given.models)]
    check_target(sources, given.save_to, form, given.overwrite, "--save_to")
    parts = read_parts("--sd_model", given.sd_model)
    for weighted in loras:
        if weighted.lora.family is not None and weighted.lora.family != parts.family and not _alike(weighted, parts):
            raise ModelError(
                f"{weighted.lora.origin}: is for {weighted.lora.family}, {given.sd_model} is {parts.family}; "
                "use a model of the LoRA's family"
            )
    networks = {role: part.tensors for role, part in parts.parts.items() if role != "vae"}
    merged = merge_into(networks, loras)
    changed = {role: Part(parts.parts[role].config, source) for role, source in merged.items()}
    names = ", ".join(f"{Path(weighted.lora.origin).stem} x {weighted.multiplier:g}" for weighted in loras)
    metadata = {"modelspec.merged_from": f"{Path(parts.origin).stem}, {names}"}
    dtype = None if given.save_precision is None else _dtype(given)
    save_model(
        given.save_to, replace(parts, parts={**parts.parts, **changed}), form, dtype, metadata, option="--save_to"
    )
    print(f"{given.save_to}: {given.sd_model} with {names}")


def _alike(weighted: Weighted, parts: ModelParts) -> bool:
    """SD 1.x and 2.x share their names, and a family told by widths alone says little of unusual models."""
    return not {weighted.lora.family, parts.family} & {"sdxl", "sdxl_refiner"}


def _form(path: Path) -> SaveForm:
    forms: dict[str, SaveForm] = {".safetensors": "safetensors", ".ckpt": "ckpt"}
    return forms.get(path.suffix.lower(), "diffusers_safetensors")


def read_parts(option: str, source: str) -> ModelParts:
    """The model that `option` names.

    Raises:
        ModelError: if there is none, or it is broken; it names `option`.
    """
    return read_model(ModelRequest(source, guess=True, option=option))


def resize(given: argparse.Namespace) -> None:
    """A LoRA with another rank."""
    rule = _rule(given)
    lora = _open(given, given.file)
    refuse_existing(given.save_to, given.overwrite)
    plain = [adapter for adapter in lora.adapters() if adapter.is_plain]
    if len(plain) < len(lora.places()):
        raise ModelError(
            f"{lora.origin}: {len(lora.places()) - len(plain)} modules are no plain LoRA; make them one with "
            "sd-train lora convert --to lora, which chooses the rank too"
        )
    device = _device(given)
    found = [resize_adapter(adapter, rule, device) for adapter in plain]
    old = max(adapter.rank or 0 for adapter in plain)
    _write(given, lora, [one.adapter for one in found], lora.metadata, _resized(lora, rule, old))
    _tell(found)


def _resized(lora: LoraFile, rule: RankRule, old: int) -> dict[str, str]:
    """sd-scripts' words."""
    conv = "" if rule.rank == rule.conv_rank else f" (conv: {rule.conv_rank})"
    fixed = f"dimension is resized from {old} to {rule.rank}{conv}"
    how = fixed if rule.method is None else f"Dynamic resize with {rule.method}: {rule.target:g} from {old}"
    return {"ss_training_comment": f"{how}; {lora.metadata.get('ss_training_comment', '')}"}


def extract(given: argparse.Namespace) -> None:
    """The difference of two models as a LoRA."""
    refuse_existing(given.save_to, given.overwrite)
    rule = _dynamic_rule(given, given.dim, given.dim if given.conv_dim is None else given.conv_dim)
    if not 0 < given.clamp_quantile <= 1:
        raise ConfigError(f"--clamp_quantile = {given.clamp_quantile:g}: is a share above 0 and up to 1")
    original, tuned = read_parts("--model_org", given.model_org), read_parts("--model_tuned", given.model_tuned)
    if original.family != tuned.family:
        raise ModelError(
            f"--model_org is {original.family}, --model_tuned is {tuned.family}; both models must be of one family"
        )
    clamp = None if given.clamp_quantile == 1 else given.clamp_quantile
    how = Extraction(rule, given.conv_dim is not None, clamp, given.min_diff)
    sides = [{role: part.tensors for role, part in model.parts.items()} for model in (original, tuned)]
    found = list(extract_adapters(sides[0], sides[1], how, _device(given)))
    # As sd-scripts, the file holds the modules that did not change too; but not if none did.
    if not any(all(bool(factor.any()) for factor in one.adapter.factors.values()) for one in found):
        raise ModelError(f"{given.model_tuned}: does not differ from {given.model_org}; there is nothing to extract")
    adapters = with_one_alpha(one.adapter for one in found)
    metadata = {
        "ss_v2": str(original.family == "sd2"),
        "ss_network_module": "networks.lora",
        "modelspec.title": given.save_to.stem,
    }
    if original.family in FAMILY_VERSIONS:
        metadata["ss_base_model_version"] = FAMILY_VERSIONS[original.family]
    content = kohya_tensors(adapters, original.family)
    dtype = torch.float32 if given.save_precision is None else _dtype(given)
    write_lora(given.save_to, content, described(metadata, adapters, {}), dtype, overwrite=given.overwrite)
    print(f"{given.save_to}: {len(adapters)} modules")
    _tell(found)


def convert(given: argparse.Namespace) -> None:
    """Another format, or a plain LoRA of another algorithm."""
    if given.to != "lora" and (given.new_rank is not None or given.dynamic_method):
        raise ConfigError(f"--to {given.to}: keeps the ranks; leave out --new_rank and --dynamic_method")
    lora = _open(given, given.file)
    refuse_existing(given.save_to, given.overwrite)
    if given.to != "lora":
        _write(given, lora, list(lora.adapters()), lora.metadata, {}, diffusers=given.to == "diffusers")
        return
    rule = _rule(given) if given.new_rank is not None or given.dynamic_method else None
    device, found, left = _device(given), [], 0
    for adapter in lora.adapters():
        if only_biases(adapter):
            left += 1
            continue
        left += any(name in adapter.factors for name in BIASES)
        found.append(as_plain(adapter, lora.family, rule, device))
    _write(given, lora, [one.adapter for one in found], lora.metadata, {"ss_network_module": "networks.lora"})
    if left:
        print(f"left out: {left} changes of biases and norms, which no LoRA can hold")
    _tell(found)


def _write(
    given: argparse.Namespace,
    lora: LoraFile,
    adapters: Sequence[Adapter],
    metadata: Mapping[str, str],
    added: Mapping[str, str],
    *,
    diffusers: bool = False,
) -> None:
    chosen = list(adapters) if diffusers else with_one_alpha(adapters)
    content = diffusers_tensors(chosen) if diffusers else kohya_tensors(chosen, lora.family or "sd1")
    dtype = _common_dtype(lora) if given.save_precision is None else _dtype(given)
    write_lora(given.save_to, content, described(metadata, chosen, added), dtype, overwrite=given.overwrite)
    print(f"{given.save_to}: {len(chosen)} modules")


def _tell(found: Sequence[Decomposition]) -> None:
    shares = sorted(one.kept for one in found)
    ranks = sorted(one.adapter.rank or 0 for one in found)
    if shares:
        kept = f"{shares[len(shares) // 2]:.1%} of the change's norm is kept (median), {shares[0]:.1%} at least"
        print(f"ranks {ranks[0]} to {ranks[-1]}; {kept}")


def _weighted(given: argparse.Namespace) -> list[Weighted]:
    ratios = given.ratios or [1.0] * len(given.models)
    if len(ratios) != len(given.models):
        raise ConfigError(
            f"--ratios: {len(ratios)} numbers for {len(given.models)} LoRAs; give one for each of --models"
        )
    return [Weighted(_open(given, path), ratio) for path, ratio in zip(given.models, ratios, strict=True)]


def _open(given: argparse.Namespace, path: Path) -> LoraFile:
    lora = open_lora(path, given.family)
    refuse_leftovers(lora)
    broken = [
        f"{adapter.place.role}.{adapter.place.path}"
        for adapter in lora.adapters()
        if not all(bool(factor.isfinite().all()) for factor in adapter.factors.values() if factor.is_floating_point())
    ]
    if broken:
        raise ModelError(
            f"{path}: {len(broken)} modules hold values that are not finite, e.g. {', '.join(broken[:3])}; "
            "go back to an earlier save"
        )
    return lora


def _rule(given: argparse.Namespace) -> RankRule:
    most = _ANY_RANK if given.new_rank is None else given.new_rank
    return _dynamic_rule(given, most, most if given.new_conv_rank is None else given.new_conv_rank)


def _dynamic_rule(given: argparse.Namespace, rank: int, conv_rank: int) -> RankRule:
    method: Method | None = getattr(given, "dynamic_method", None)
    wanted: float | None = getattr(given, "dynamic_param", None)
    if rank < 1 or conv_rank < 1:
        raise ConfigError(f"a rank of {min(rank, conv_rank)} is none; give 1 or more")
    if (method is None) != (wanted is None):
        raise ConfigError("--dynamic_method and --dynamic_param belong together; give both, e.g. sv_fro and 0.95")
    target = wanted or 0.0
    if method == "sv_ratio" and target <= 1:
        raise ConfigError(f"--dynamic_param = {target:g}: a ratio of singular values is above 1, e.g. 20")
    if method in ("sv_fro", "sv_cumulative") and not 0 < target <= 1:
        raise ConfigError(f"--dynamic_param = {target:g}: is a share above 0 and up to 1, e.g. 0.95")
    return RankRule(rank, conv_rank, method, target)


def _device(given: argparse.Namespace) -> torch.device:
    try:
        device = torch.device(given.device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as problem:
        reason = str(problem).splitlines()[0]
        raise ConfigError(f"--device = {given.device}: cannot be used ({reason}); try cpu") from None
    return device


def _dtype(given: argparse.Namespace) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, PRECISIONS[given.save_precision])
    return dtype


def _common_dtype(lora: LoraFile) -> torch.dtype:
    dtypes = {
        lora.source.dtype(key) for keys in lora.keys.values() for factor, key in keys.items() if factor != "alpha"
    }
    floating = {dtype for dtype in dtypes if dtype.is_floating_point}
    return floating.pop() if len(floating) == 1 else torch.float32


def _shared(tables: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What all of `tables` say alike."""
    return {name: value for name, value in tables[0].items() if all(other.get(name) == value for other in tables[1:])}
