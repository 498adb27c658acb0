"""The state of a run: sealed folders from which a training continues bit for bit."""

from __future__ import annotations

import hashlib
import inspect
import json
import time
import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sd_train.config.changes import way_out
from sd_train.errors import ConfigError, DataError, ModelError, UserError
from sd_train.files import sha256, write_folder
from sd_train.optim.ema import Ema
from sd_train.optim.values import decode, encode, moved
from sd_train.state_files import of_a_state, put_table, read_json, read_table
from sd_train.trainables.base import ParamGroup, Trainable
from sd_train.types import QUARANTINE, RATES_FROM, Progress

FORMAT = 1
MANIFEST = "manifest.json"
_FILES = {"trainable.safetensors", "optimizer.safetensors", "optimizer.json", "progress.json", "config.toml"}
"""What every state holds beside its manifest."""

_AS_LARGE = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "z", "state1", "state2"}
"""What optimizers remember of a parameter, number by number."""
_BLOCK = 256
"""Numbers that have a scale in common in bitsandbytes' 8-bit states."""

Extra = tuple[Callable[[], dict[str, Any]], Callable[[dict[str, Any]], None]]
"""How to read a JSON state and how to put it back."""


@dataclass(frozen=True)
class StateParts:
    """Everything that a state holds beside `Progress`."""

    trainable: Trainable
    groups: list[ParamGroup]
    optimizer: torch.optim.Optimizer
    extras: Mapping[str, Extra]
    """By name: scaler, report."""
    config_text: str
    base_model: str
    """Digest of the base model as it was before the training."""
    ema: Ema | None = None


@dataclass(frozen=True)
class ResumedFrom:
    """A sealed state that was put back."""

    path: Path
    progress: Progress
    config_text: str
    average: bool
    """Whether it held a moving average."""


def cloned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of `tensors`, one for the names that share a tensor: the memory of a file's tensors lies differently, and
    with it some libraries' sums round differently."""
    copies = {id(tensor): tensor.clone() for tensor in tensors.values()}
    return {name: copies[id(tensor)] for name, tensor in tensors.items()}


def optimizer_state(parts: StateParts) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state as tensors, the live ones, and JSON, by parameter name instead of number."""
    names = [name for group in parts.groups for name in group.params]
    saved = parts.optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    kind, package = _optimizer_name(parts.optimizer)
    plain: dict[str, Any] = {"optimizer": kind, "package": package, "state": {}, "groups": []}
    for number, values in saved["state"].items():
        name = names[number]
        plain["state"][name] = {key: encode(value, f"state/{name}/{key}", tensors) for key, value in values.items()}
    for place, group in enumerate(saved["param_groups"]):
        kept = {key: encode(value, f"group/{place}/{key}", tensors) for key, value in group.items() if key != "params"}
        plain["groups"].append(kept)
    return tensors, plain


def load_optimizer_state(parts: StateParts, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
    """Put back what `optimizer_state` gave.

    What the optimizer has learned comes from the state, what was given to it (weight decay, betas) from this run's
    configuration.
    """
    optimizer, tensors = parts.optimizer, cloned(tensors)
    given = inspect.signature(type(optimizer)).parameters
    named = {name: parameter for group in parts.groups for name, parameter in group.params.items()}
    numbers = {name: number for number, name in enumerate(named)}
    saved = {
        name: {key: decode(value, tensors) for key, value in values.items()} for name, values in plain["state"].items()
    }
    # States of earlier versions list only what is no tensor.
    for path, tensor in tensors.items():
        kind, owner, key = path.split("/", 2)
        if kind == "state" and "/" not in key and key not in saved[owner]:
            saved[owner][key] = tensor
    for name, values in saved.items():
        _check_shapes(name, named[name], values)
    groups = []
    for place, group in enumerate(optimizer.state_dict()["param_groups"]):
        restored = {
            key: decode(value, tensors) for key, value in plain["groups"][place].items() if key not in given
        }
        # A control run, in which nothing learns, has no group of its own.
        own = [parameter for group in parts.groups[place : place + 1] for parameter in group.params.values()]
        device = own[0].device if own else torch.device("cpu")
        groups.append({**group, **moved(restored, device), "params": group["params"]})
    state = {numbers[name]: values for name, values in saved.items()}
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for name, values in saved.items():
        _as_it_was(optimizer, named[name], values)


def _check_shapes(name: str, parameter: torch.nn.Parameter, values: Mapping[str, Any]) -> None:
    """Raise ValueError for what is not of the parameter's size: compiled steps write there without looking."""
    count = parameter.numel()
    for key, value in values.items():
        if not isinstance(value, Tensor):
            continue
        fits = True
        if key in _AS_LARGE:
            fits = value.numel() == count
        elif key in ("absmax1", "absmax2"):
            fits = value.numel() * _BLOCK >= count
        elif key in ("qmap1", "qmap2"):
            fits = value.numel() == 256
        elif key == "step":
            fits = value.numel() == 1
        if not fits:
            raise ValueError(f"{key} of {name} has the shape {tuple(value.shape)}")


def _as_it_was(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, saved: Mapping[str, Any]) -> None:
    """Undo what loading changes: torch gives tensors the parameter's number type and spoils words, and bitsandbytes
    does not take paged memory anew."""
    loaded = optimizer.state[parameter]
    # What bitsandbytes wraps for saving is not there by that name.
    for key in saved.keys() & loaded.keys():
        value = saved[key]
        if not isinstance(value, Tensor):
            loaded[key] = moved(value, parameter.device)
        elif loaded[key].dtype != value.dtype:
            loaded[key] = value.to(loaded[key].device)
    if getattr(optimizer, "is_paged", False) and parameter.device.type != "cpu":
        for key in {"state1", "state2"} & loaded.keys():
            buffer = optimizer.get_state_buffer(parameter, dtype=loaded[key].dtype)  # type: ignore[attr-defined]
            loaded[key] = buffer.copy_(loaded[key])


@dataclass(frozen=True)
class StateContent:
    """What a state's files are made of."""

    step: int
    base_model: str
    tables: Mapping[str, Mapping[str, Tensor]]
    """By the name of their file, without its ending."""
    texts: Mapping[str, str]
    """By the name of their file."""


def state_content(progress: Progress, parts: StateParts) -> StateContent:
    """The state as it stands: texts of this moment, and the live tensors."""
    tensors, plain = optimizer_state(parts)
    extras = {name: read() for name, (read, _) in parts.extras.items()}
    tables: dict[str, Mapping[str, Tensor]] = {"trainable": parts.trainable.tensors(), "optimizer": tensors}
    if parts.ema is not None:
        tables["ema"] = parts.ema.tensors
    texts = {
        "optimizer.json": json.dumps(plain),
        "progress.json": json.dumps({"progress": asdict(progress), "extras": extras}),
        "config.toml": parts.config_text,
    }
    return StateContent(progress.step, parts.base_model, tables, texts)


def save_state(path: Path, progress: Progress, parts: StateParts) -> None:
    """Write a state folder; the manifest with sizes and hashes seals it."""
    write_state(path, state_content(progress, parts))


def write_state(path: Path, content: StateContent) -> None:
    """Write `content` as a sealed state folder: the hashes are of the bytes that its files were given to hold."""

    def fill(folder: Path) -> None:
        digests = {f"{name}.safetensors": put_table(folder / f"{name}.safetensors", table)
                   for name, table in content.tables.items()}  # fmt: skip
        for name, text in content.texts.items():
            data = text.encode()
            (folder / name).write_bytes(data)
            digests[name] = hashlib.sha256(data).hexdigest()
        files = {name: {"size": (folder / name).stat().st_size, "sha256": digests[name]} for name in sorted(digests)}
        manifest = {
            "format": FORMAT,
            "step": content.step,
            "save": 1 + max((order_of(other)[0] for other in path.parent.glob("*-state")), default=0),
            "saved_at": time.time(),
            "base_model": content.base_model,
            "files": files,
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")

    write_folder(path, fill)


def order_of(path: Path) -> tuple[int, float, int]:
    """What orders the states of a folder: how many came before the one at `path`, then the clock, then the update.

    The clock may have been put back; states of earlier versions have nothing else. Zeros: the manifest cannot be read.
    """
    try:
        facts = _read_facts(path)
        return int(facts.get("save", 0)), float(facts["saved_at"]), int(facts["step"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return 0, 0.0, 0


def state_bytes(parts: StateParts) -> int:
    """How many bytes the tensors of a state have."""
    tables = [parts.trainable.tensors(), optimizer_state(parts)[0], {} if parts.ema is None else parts.ema.tensors]
    return sum(tensor.nbytes for table in tables for tensor in table.values())


def _read_facts(path: Path) -> Any:
    """What the manifest of the state at `path` says, unchecked."""
    file = path / MANIFEST
    if not file.is_file():
        # A pipe would be waited for.
        raise FileNotFoundError(file)
    return json.loads(file.read_text(encoding="utf-8"))


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the state at `path`, after every file was checked against it.

    Raises:
        DataError: if the state is unsealed, of another format, cannot be read, or a file differs.
    """
    try:
        manifest: dict[str, Any] = _read_facts(path)
        version = int(manifest["format"])
        _ = int(manifest["step"]), float(manifest["saved_at"]), str(manifest["base_model"])
        files = {path / name: (facts["size"], facts["sha256"]) for name, facts in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise DataError(f"{path}: is no sealed state (no readable {MANIFEST}); choose another state") from None
    if version != FORMAT:
        raise DataError(f"{path}: state format {version}, this version reads {FORMAT}; choose another state")
    if not manifest["files"].keys() >= _FILES or any(file.parent != path for file in files):
        raise DataError(f"{path / MANIFEST}: seals other files than those of a state; choose another state")
    for file, (size, digest) in files.items():
        try:
            same = file.is_file() and file.stat().st_size == size and sha256(file) == digest
        except OSError as problem:
            raise DataError(f"{file}: cannot be read ({problem.strerror}); choose another state") from None
        if not same:
            raise DataError(f"{file}: differs from what was saved; choose another state")
    return manifest


def read_progress(path: Path) -> Progress:
    """Where the state at `path` stands; the rest of it is not read."""
    read_manifest(path)
    return _progress(path)


def _progress(path: Path) -> Progress:
    with of_a_state(path / "progress.json"):
        progress = Progress(**read_json(path / "progress.json")["progress"])
        counts = (progress.seed, progress.session_id, progress.step, progress.epoch, progress.index, progress.samples)
        if not all(type(count) is int and count >= 0 for count in counts) or not isinstance(progress.extra, dict):
            raise ValueError("a counter is no number from 0 on")
        _ = progress.started_at + 0.0, int(progress.extra.get(RATES_FROM, 0))
        for left_out in progress.extra.get(QUARANTINE, []):
            if type(left_out["step"]) is not int or not isinstance(left_out["files"], list):
                raise ValueError("an update in quarantine is none")
            _ = str(left_out["reason"])
        return progress


def _optimizer_name(optimizer: torch.optim.Optimizer) -> tuple[str, str]:
    """Its class, and the package that this comes from."""
    kind = type(optimizer)
    return kind.__name__, kind.__module__.partition(".")[0]


def _check_fit(
    path: Path, base_model: str, plain: Mapping[str, Any], parts: StateParts, accepted: Collection[str]
) -> None:
    """Raise what the state at `path` and this run differ in, as far as it was not accepted."""
    problems: list[UserError] = []
    if base_model != parts.base_model and "base_model" not in accepted:
        problems.append(DataError(
            f"--resume = {path}: was trained on another base model (tensor digest {base_model[:12]}, this one has "
            f"{parts.base_model[:12]}); {way_out('base_model')}"
        ))
    ours, theirs = _optimizer_name(parts.optimizer), (plain["optimizer"], plain["package"])
    if ours != theirs and "optimizer_type" not in accepted:
        other = theirs[0] if theirs[0] != ours[0] else ".".join(reversed(theirs))
        problems.append(ConfigError(
            f"--optimizer_type = {ours[0]}: the state at {path} is one of {other}; {way_out('optimizer_type')}"
        ))
    if problems:
        raise type(problems[0])(*map(str, problems))


def load_state(path: Path, parts: StateParts, accepted: Collection[str] = ()) -> ResumedFrom:
    """Put back the state at `path`.

    `accepted`: "base_model" and "optimizer_type" may be others; another optimizer begins anew.

    Raises:
        ConfigError: if it belongs to another optimizer, or another base model.
        DataError: if it is broken or holds other parameters.
        ModelError: if the trainable weights do not fit this configuration.
    """
    manifest = read_manifest(path)
    plain, stored = read_json(path / "optimizer.json"), read_json(path / "progress.json")
    with of_a_state(path / "optimizer.json"):
        _ = str(plain["optimizer"]), str(plain["package"]), dict(plain["state"]), list(plain["groups"])
    _check_fit(path, str(manifest["base_model"]), plain, parts, accepted)
    same_optimizer = _optimizer_name(parts.optimizer) == (plain["optimizer"], plain["package"])
    if set(plain["state"]) - {name for group in parts.groups for name in group.params}:
        raise DataError(
            f"--resume = {path}: holds parameters that this configuration does not train; give the options of the "
            f"network and the learning rates as they stand in {path / 'config.toml'}"
        )
    try:
        parts.trainable.load(read_table(path / "trainable.safetensors"))
    except ModelError as problem:
        raise ModelError(
            f"--resume = {path}: {problem}\n  give the options of the network as they stand in {path / 'config.toml'}"
        ) from None
    if same_optimizer:
        with of_a_state(path / "optimizer.json"):
            load_optimizer_state(parts, read_table(path / "optimizer.safetensors"), plain)
    # What the seal does not name is none of the state's.
    averaged = "ema.safetensors" in manifest["files"]
    if parts.ema is not None:
        # A state without one is of a run without it: the average begins with the weights as they stand.
        parts.ema.load(read_table(path / "ema.safetensors") if averaged else parts.trainable.tensors())
    for name, (_, restore) in parts.extras.items():
        # A change of precision is allowed: the state of a run without scaled gradients has no scale.
        with of_a_state(path / "progress.json"):
            if name in stored["extras"]:
                restore(stored["extras"][name])
    with of_a_state(path / "config.toml"):
        config_text = (path / "config.toml").read_text(encoding="utf-8")
        tomllib.loads(config_text)
    return ResumedFrom(path, _progress(path), config_text, averaged)
