"""Where a run begins: at the start, where a state stands, or elsewhere; what it must have in common with the state."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from sd_train.config.changes import ACCEPTED, way_out
from sd_train.config.options import RunConfig
from sd_train.data.batches import Updates
from sd_train.data.columns import TextColumn
from sd_train.data.index import ImageIndex
from sd_train.data.settings import DatasetConfig, SubsetConfig
from sd_train.device import Device
from sd_train.errors import ConfigError
from sd_train.families.parts import ModelKind
from sd_train.metadata import now
from sd_train.randomness import derive
from sd_train.state import read_progress
from sd_train.state_files import of_a_state
from sd_train.types import QUARANTINE, RATES_FROM, Progress

_OWNER = "facts"
"""Place in `Progress.extra` of what the training is of."""
_LAST_EPOCH = "last_epoch"
"""Fact of trainings whose last epoch has other batches than it would have in the middle."""
_INITIAL = "initial"
"""Place of the `--initial_step` or `--initial_epoch` that the training has begun with."""
_WORDS: Mapping[str, str] = {
    "files": "other images or masks, or changed ones", "captions": "other captions", "repeats": "other repeats",
    "weights": "other weights of the loss", "crops": "other sizes or buckets",
}  # fmt: skip
"""What the digests of a dataset are of."""
_NO_FACTS = ("subsets", "warnings", "origin", "image_dir", "metadata_file", "conditioning_data_dir")
"""Where a dataset lies may change."""


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    progress: Progress
    notes: tuple[str, ...] = ()
    """What differs from the state and was accepted, or is not what the state says."""
    goes_on: bool = True
    """Whether the next update is the one that the state would go on with."""


def first_progress(config: RunConfig, resume: Path | None, device: Device) -> Progress:
    """Where the state at `resume` stands, or the beginning; with the seed of `config`, if it gives one.

    Raises:
        DataError: if the state is broken.
    """
    wanted = config.training.seed
    if resume is not None:
        return read_progress(resume)
    seed = device.shared(random.SystemRandom().randrange(2**32)) if wanted is None else wanted
    session = derive(seed, "session", config.saving.output_name or "") % 2**32
    return Progress(seed=seed, session_id=session, started_at=now())


def steps_ahead(progress: Progress, updates: Updates) -> int:
    """By how many updates the training is further than its place in the epochs of `updates` says: other than 0 where
    earlier epochs were of other data or of other batches."""
    return progress.step - updates.updates_before(progress.epoch) - progress.index


def facts_of(config: RunConfig, kind: ModelKind | None, updates: Updates) -> dict[str, Any]:
    """What the training is of, as JSON values."""
    settings = updates.settings
    facts: dict[str, Any] = {
        "command": config.command,
        "seed": settings.seed,
        "processes": settings.world,
        "gradient_accumulation_steps": settings.accumulation,
        "dataset": _dataset_facts(updates.indexes),
    }
    if any(index.dataset.bucket_policy == "carry" for index in updates.indexes):
        facts[_LAST_EPOCH] = updates.order.last_epoch
    if kind is not None:
        facts["prediction"] = kind.prediction
        facts["zero_terminal_snr"] = kind.zero_terminal_snr or config.noise.zero_terminal_snr
    return facts


def starting_point(
    config: RunConfig, resume: Path | None, stored: Progress, facts: Mapping[str, Any], updates: Updates
) -> Start:
    """Where the run begins; `stored` is what `first_progress` gave, `facts` what it is of now.

    Raises:
        ConfigError: with every difference from the state that was not accepted.
    """
    notes: list[str] = []
    progress, goes_on = stored, True
    if resume is not None:
        with of_a_state(resume / "progress.json"):
            progress, notes = _go_on(config, resume, stored, facts, updates)
        goes_on = (progress.epoch, progress.index) == (stored.epoch, stored.index)
    placed = _placed(config, progress, updates)
    if placed is not None:
        if resume is not None:
            notes.append(
                f"the state's place (update {progress.step}) is ignored: {_initial(config)} is given, as in sd-scripts"
            )
        progress, goes_on = placed, False
    seed = int(facts["seed"])
    extra = {**progress.extra, _OWNER: dict(facts)}
    return Start(replace(progress, seed=seed, extra=extra), tuple(notes), goes_on)


def _go_on(
    config: RunConfig, resume: Path, stored: Progress, facts: Mapping[str, Any], updates: Updates
) -> tuple[Progress, list[str]]:
    """Where the state's training goes on, and what was accepted or only has to be known."""
    before: Mapping[str, Any] = stored.extra.get(_OWNER, {})
    found = {name: change for name in facts if name in before and (change := _change(name, before[name], facts[name]))}
    other_end = found.pop(_LAST_EPOCH, None)
    per_update = int(before.get("processes", 1)) * int(before.get("gradient_accumulation_steps", 1))
    notes = [] if before else ["the state does not say what it is of: dataset, seed and processes were not compared"]
    if before and per_update == updates.per_update:
        split = [found.pop(name) for name in ("processes", "gradient_accumulation_steps") if name in found]
        if split:
            notes.append(
                f"changed since the state was saved: {', '.join(split)}: an update takes the same batches, sums of "
                "them may round differently"
            )
    accepted = config.saving.resume_anyway
    refused = [
        f"--resume = {resume}: the state is of another training: {change}; {way_out(name)}"
        for name, change in found.items()
        if name not in accepted
    ]
    if refused:
        raise ConfigError(*refused)
    idle = [name for name in accepted if name in facts and name not in found]
    notes += [f"--resume_anyway {name} has no effect: it is as it was" for name in idle]
    notes += [f"accepted by --resume_anyway: {change}: {ACCEPTED[name]}" for name, change in found.items()]
    anew = "dataset" in found or "seed" in found
    if other_end and stored.index and stored.epoch in (before[_LAST_EPOCH], facts[_LAST_EPOCH]):
        notes.append(
            "the running epoch begins anew: it is the training's last one only before or after this change "
            f"({other_end}, from 0), and with bucket_policy = carry a last epoch has other batches"
        )
        anew = True
    if not anew and (not before or per_update == updates.per_update):
        return stored, notes
    # What was to be left out has other images now.
    extra = {name: value for name, value in stored.extra.items() if name != QUARANTINE}
    return replace(stored, index=0 if anew else stored.index * per_update // updates.per_update, extra=extra), notes


def _change(name: str, before: Any, after: Any) -> str:
    """What differs, in words; empty if nothing does."""
    if name != "dataset":
        return "" if before == after else f"{name}: {before} -> {after}"
    differences = _dataset_changes(before, after)
    return f"dataset: {'; '.join(differences)}" if differences else ""


def _initial(config: RunConfig) -> str | None:
    """The option that says where to begin, as it was given."""
    saving = config.saving
    if saving.initial_step is not None:
        return f"--initial_step = {saving.initial_step}"
    return None if saving.initial_epoch is None else f"--initial_epoch = {saving.initial_epoch}"


def _placed(config: RunConfig, progress: Progress, updates: Updates) -> Progress | None:
    """Where `--initial_step` or `--initial_epoch` puts the training; None: where it is."""
    saving, given = config.saving, _initial(config)
    # A training that has begun there goes on from its states.
    if given is None or progress.extra.get(_INITIAL) == given:
        return None
    if saving.initial_step is not None:
        step = saving.initial_step
    else:
        assert saving.initial_epoch is not None
        step = updates.updates_before(saving.initial_epoch - 1)
    epoch, index = updates.epoch_of(step)
    if not saving.skip_until_initial_step:
        step, index = step - index, 0
    # As in sd-scripts the rates' curve does not know of it: it begins, or goes on, as it would without.
    done = progress.step - int(progress.extra.get(RATES_FROM, 0))
    extra = {**progress.extra, RATES_FROM: step - done, _INITIAL: given}
    return replace(progress, step=step, epoch=epoch, index=index, extra=extra)


def _dataset_facts(indexes: Sequence[ImageIndex]) -> dict[str, Any]:
    """What decides which samples an update holds, beside the seed."""
    parts = [
        {
            "settings": _settings(index.dataset),
            "subsets": [_settings(subset) for subset in index.dataset.subsets],
            "images": len(index),
            "files": _digest(index.keys, index.sizes, index.stats[:, 0], index.masks),
            "captions": _digest(index.captions),
            "repeats": _digest(index.repeats, index.subset_of),
            "weights": _digest(index.weights),
            "crops": _digest(index.resized, np.array(index.buckets)[index.bucket_of]),
        }
        for index in indexes
    ]
    found: dict[str, Any] = json.loads(json.dumps({"datasets": parts}, default=str))
    return found


def _settings(settings: DatasetConfig | SubsetConfig) -> dict[str, object]:
    return {field.name: getattr(settings, field.name) for field in fields(settings) if field.name not in _NO_FACTS}


def _digest(*columns: TextColumn | np.ndarray[Any, Any] | None) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for column in columns:
        if isinstance(column, TextColumn):
            for part in column.encoded():
                digest.update(b"\0".join(part))
        elif column is not None:
            digest.update(np.ascontiguousarray(column).data)
    return digest.hexdigest()


def _dataset_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What differs between two of `_dataset_facts`, in words."""
    old, new = before["datasets"], after["datasets"]
    if len(old) != len(new):
        return [f"{len(old)} -> {len(new)} [[datasets]]"]
    changes: list[str] = []
    for number, (ours, theirs) in enumerate(zip(old, new, strict=True), start=1):
        where = f"[[datasets]] {number}: " if len(old) > 1 else ""
        changes += [f"{where}{text}" for text in _settings_changes(ours["settings"], theirs["settings"])]
        if len(ours["subsets"]) != len(theirs["subsets"]):
            changes.append(f"{where}{len(ours['subsets'])} -> {len(theirs['subsets'])} subsets")
        for place, (one, other) in enumerate(zip(ours["subsets"], theirs["subsets"], strict=False), start=1):
            subset = f"subset {place}: " if len(ours["subsets"]) > 1 else ""
            changes += [f"{where}{subset}{text}" for text in _settings_changes(one, other)]
        if ours["images"] != theirs["images"]:
            changes.append(f"{where}{ours['images']} -> {theirs['images']} images")
            continue
        words = [text for name, text in _WORDS.items() if ours[name] != theirs[name]]
        # Repeats and sizes follow from settings that are named already.
        changes += [f"{where}{text}" for text in words if text not in _FOLLOWS or not changes]
    return changes


_FOLLOWS = (_WORDS["repeats"], _WORDS["weights"], _WORDS["crops"])


def _settings_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} {_shown(before.get(name))} -> {_shown(value)}"
        for name, value in after.items()
        if before.get(name) != value
    ]


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
