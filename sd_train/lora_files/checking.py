"""What a LoRA file holds, what is wrong with it, and who reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from sd_train.families.sources import TensorSource
from sd_train.lora_files.adapter import UP, Adapter
from sd_train.lora_files.merging import MergedSource, Weighted, unfitting
from sd_train.lora_files.names import TEXT_ROLES, kohya_name
from sd_train.lora_files.readers import Cell, Content, Reader, rows_of, who_reads
from sd_train.lora_files.reading import DTYPE_NAMES, LoraFile

SHOWN_METADATA = (
    "ss_output_name", "modelspec.title", "ss_base_model_version", "modelspec.architecture", "ss_sd_model_name",
    "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args", "ss_steps", "ss_epoch",
    "ss_num_train_images", "ss_resolution", "ss_learning_rate", "ss_unet_lr", "ss_text_encoder_lr", "ss_optimizer",
    "ss_clip_skip", "modelspec.trigger_phrase", "modelspec.author", "modelspec.license", "ss_training_comment",
    "sshs_model_hash",
)  # fmt: skip
"""Entries that say most about a training."""


@dataclass(frozen=True)
class ModuleReport:
    """One module of the file."""

    role: str
    path: str
    kind: str
    """The algorithm, with " + DoRA" where weights are decomposed."""
    rank: int | None
    alpha: float | None
    """None where the file has none."""
    scale: float
    """alpha / rank, by which the factors' product is multiplied."""
    dtype: str
    finite: bool
    zero: bool
    """Whether it changes nothing."""


@dataclass(frozen=True)
class FileReport:
    """The whole file."""

    file: str
    family: str | None
    formats: list[str]
    modules: list[ModuleReport]
    unmapped: list[str]
    twice: list[str]
    incomplete: list[str]
    metadata: dict[str, str]
    """The entries of `SHOWN_METADATA` that are there."""
    entries: int
    """How many entries of metadata there are in all."""
    readers: dict[Reader, Cell]
    problems: list[str]
    """What makes the file useless or wrong."""
    notes: list[str]
    """What to know."""

    def counted(self, what: str) -> dict[str, int]:
        """How many modules have each value of field `what`, the commonest first."""
        values = Counter(str(getattr(module, what)) for module in self.modules)
        return dict(values.most_common())


def check(lora: LoraFile, networks: Mapping[str, TensorSource] | None = None) -> FileReport:
    """Read every factor of `lora` once; `networks` of a model, by role, to see whether it fits."""
    modules, kohya = [], lora.formats == {"kohya"}
    # A dict keeps the order in which they were met.
    rows: dict[str, None] = {}
    for place in lora.places():
        adapter = lora.adapter(place)
        modules.append(_module(lora, adapter))
        rows |= dict.fromkeys(rows_of(adapter, next(iter(lora.keys[place].values())), kohya))
    content = Content(
        rows=tuple(rows),
        kohya="kohya" in lora.formats,
        one_alpha=_attentions_have_one_alpha(modules),
        text_model=_has_text_model(lora),
    )
    incomplete = [f"{place.role}.{place.path}" for place in lora.incomplete()]
    problems = [*_problems(modules, incomplete, lora), *_fit(lora, networks)]
    return FileReport(
        lora.origin,
        lora.family,
        sorted(lora.formats),
        modules,
        lora.unmapped,
        lora.twice,
        incomplete,
        {name: lora.metadata[name] for name in SHOWN_METADATA if name in lora.metadata},
        len(lora.metadata),
        who_reads(content),
        problems,
        _notes(modules, lora),
    )


def _module(lora: LoraFile, adapter: Adapter) -> ModuleReport:
    keys = lora.keys[adapter.place]
    dtypes = {DTYPE_NAMES.get(lora.source.dtype(key), "?") for factor, key in keys.items() if factor != "alpha"}
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in adapter.factors.values())
    zero = adapter.kind in ("lora", "full", "norm", "ia3") and _is_zero(adapter)
    kind = f"{adapter.kind} + DoRA" if adapter.is_dora else adapter.kind
    place = adapter.place
    return ModuleReport(
        place.role, place.path, kind, adapter.rank, adapter.alpha, adapter.scale, "+".join(sorted(dtypes)), finite, zero
    )


def _is_zero(adapter: Adapter) -> bool:
    if adapter.is_dora:
        return False
    deciding = [adapter.factors[UP]] if adapter.kind == "lora" else adapter.factors.values()
    return not any(bool(tensor.any()) for tensor in deciding)


def _attentions_have_one_alpha(modules: Sequence[ModuleReport]) -> bool:
    """Whether it is the commonest of each network, which diffusers takes for theirs."""
    plain = [module for module in modules if module.kind.startswith("lora")]
    for role in {module.role for module in plain}:
        own = [module for module in plain if module.role == role]
        common = Counter(module.alpha or module.rank for module in own).most_common(1)[0][0]
        if any("attn" in module.path and (module.alpha or module.rank) != common for module in own):
            return False
    return True


def _has_text_model(lora: LoraFile) -> bool:
    return all(
        "text_model" in key or "text_projection" in key
        for place, keys in lora.keys.items()
        if place.role in TEXT_ROLES
        for key in keys.values()
    )


def _problems(modules: Sequence[ModuleReport], incomplete: list[str], lora: LoraFile) -> list[str]:
    problems = []
    broken = [f"{module.role}.{module.path}" for module in modules if not module.finite]
    if broken:
        problems.append(f"{_some(broken)} hold values that are no numbers (NaN or infinity): pictures will be black")
    if incomplete:
        problems.append(f"{_some(incomplete)} lack factors: programs refuse the file or skip them")
    if lora.twice:
        twice = _some(lora.twice)
        problems.append(f"{twice} stand there twice under different names: programs differ in which one counts")
    if modules and all(module.zero for module in modules):
        problems.append("every module is zero: it changes nothing")
    return problems


def _notes(modules: Sequence[ModuleReport], lora: LoraFile) -> list[str]:
    notes = []
    if lora.unmapped:
        notes.append(f"{_some(lora.unmapped)} belong to no module of a Stable Diffusion model")
    zero = [f"{module.role}.{module.path}" for module in modules if module.zero]
    if zero and len(zero) < len(modules):
        notes.append(f"{_some(zero)} are zero: they change nothing")
    without = [module for module in modules if module.alpha is None and module.rank is not None]
    if without:
        notes.append(f"{len(without)} modules have no alpha, which means their rank (scale 1)")
    named = [kohya_name(place, lora.family or "sd1") for place in lora.places()]
    given = {key.split(".")[0] for keys in lora.keys.values() for key in keys.values()}
    other = [name for name in named if name not in given]
    if lora.formats == {"kohya"} and lora.family is not None and other:
        notes.append(
            f"{len(other)} modules have other names than kohya's programs use (such as {other[0]}); "
            "sd-train lora convert --to kohya writes those"
        )
    return notes


def _fit(lora: LoraFile, networks: Mapping[str, TensorSource] | None) -> list[str]:
    if networks is None:
        return []
    weighted = [Weighted(lora, 1.0)]
    merged = {role: MergedSource(source, weighted, role) for role, source in networks.items()}
    problems = [problem.removeprefix(f"{lora.origin}: ") for problem in unfitting(lora, merged)]
    wrong = []
    for place in lora.places():
        adapter = lora.adapter(place)
        name = merged[place.role].names_by_path.get(f"{place.path}.weight") if place.role in merged else None
        if name is not None and adapter.kind == "lora":
            shape = merged[place.role].shape(name)
            sides = (adapter.factors[UP].shape[0], adapter.factors["lora_down.weight"].shape[1])
            if sides != shape[:2]:
                wrong.append(f"{place.role}.{place.path} (LoRA {sides[0]}x{sides[1]}, model {shape[0]}x{shape[1]})")
    if wrong:
        problems.append(f"{_some(wrong)} are of another shape than the model's; use a model of the LoRA's family")
    return problems


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{len(names)} of them ({shown}, ...)" if len(names) > 3 else shown
