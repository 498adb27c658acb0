"""`sd-train verify_resume COMMAND ...`: does a training that is stopped go on to the bit, on this machine?"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_train.commands.plan import TRAINING_COMMANDS
from sd_train.errors import ConfigError, RunError

if TYPE_CHECKING:
    from torch import Tensor

    from sd_train.config.options import RunConfig

USAGE = """usage: sd-train verify_resume [COMMAND] [--updates N] [OPTIONS OF THE COMMAND]

Train N updates of `sd-train COMMAND OPTIONS` in one go, and again with two stops from which it goes on, and compare
what both leave: weights, the optimizer's state, the moving average and all counters, to the bit. Names the first tensor
that differs. Everything is written to a folder inside --output_dir that is deleted at the end; pictures, curves,
uploads, and the options of saving and resuming are left out.

  COMMAND    train_network (when none is named), or another training command
  --updates  how many, at least 2 (default: 6)

The exit code is 0 if the two are equal and 4 if they are not.

For instance: sd-train verify_resume train_network --config_file run.toml"""

_DEFAULT = 6
"""Updates."""
_TABLES = {"trainable": "weights", "optimizer": "the optimizer's state", "ema": "the moving average"}
"""Files of a state that hold tensors, in the order in which they are compared."""
_CLOCKS = ("started_at",)
"""Of the progress: what differs between two trainings by nature."""


def main(argv: Sequence[str]) -> int:
    """Verify the training that `argv` names and return 0.

    Raises:
        RunError: if a stopped training goes on differently.
        UserError: what the training itself would say of these options.
    """
    words = list(argv)
    if not words or any(word in ("-h", "--help") for word in words):
        print(USAGE)
        return 0 if words else 2
    command = words.pop(0) if not words[0].startswith("-") else "train_network"
    if command not in TRAINING_COMMANDS:
        raise ConfigError(
            f"verify_resume: {command!r} is no training command; use one of {', '.join(TRAINING_COMMANDS)}"
        )
    updates, words = take_updates(words)
    from sd_train.entry import load_config

    trained, *added = TRAINING_COMMANDS[command]
    config = load_config(trained, [*added, *words])
    with _working_folder(config.saving.output_dir) as folder:
        _verify(Trial(without_outputs(config), folder), updates)
    return 0


def take_updates(words: Sequence[str]) -> tuple[int, list[str]]:
    """The number behind `--updates`, and the other words.

    Raises:
        ConfigError: if it is none, or below 2.
    """
    rest = list(words)
    place = next((number for number, word in enumerate(rest) if word.split("=")[0] == "--updates"), None)
    if place is None:
        return _DEFAULT, rest
    word = rest.pop(place)
    value = word.partition("=")[2] if "=" in word else rest.pop(place) if place < len(rest) else ""
    if not value.isdecimal() or int(value) < 2:
        raise ConfigError(f"--updates = {value!r}: must be a whole number from 2 on; leave it out for {_DEFAULT}")
    return int(value), rest


def without_outputs(config: RunConfig) -> RunConfig:
    """`config` with a seed, and without what only looks at the training or copies what it saves."""
    kept = {name: getattr(config.saving, name) for name in ("output_dir", "output_name", "save_model_as",
                                                            "save_precision")}  # fmt: skip
    return replace(
        config,
        dataset=config.dataset.model_copy(update={"debug_dataset": False}),
        training=config.training.model_copy(update={"seed": config.training.seed or 0}),
        validation=config.validation.model_copy(update={"save_best": False, "validation_patience": None}),
        ema=config.ema.model_copy(update={"sample_ema": False}),
        saving=type(config.saving).model_validate({**kept, "save_state_on_train_end": True}),
        sampling=type(config.sampling).model_validate({}),
        logging=type(config.logging).model_validate({}),
        hub=type(config.hub).model_validate({}),
    )


@contextmanager
def _working_folder(output_dir: Path) -> Iterator[Path]:
    """A new folder inside `output_dir`, the same one in all processes; deleted at the end."""
    world, local = os.environ.get("WORLD_SIZE", "1"), os.environ.get("LOCAL_WORLD_SIZE", "1")
    if world != local:
        raise ConfigError(f"verify_resume: {world} processes on several machines; start them on one")
    # Processes that a launcher started have it in common.
    folder = output_dir / f"verify_resume-{os.getppid() if world != '1' else os.getpid()}"
    there = output_dir.is_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise ConfigError(
            f"--output_dir = {output_dir}: {folder} cannot be made ({problem.strerror}); choose another folder"
        ) from None
    try:
        yield folder
    finally:
        if os.environ.get("RANK", "0") == "0":
            shutil.rmtree(folder, ignore_errors=True)
            if not there:
                with suppress(OSError):
                    output_dir.rmdir()


@dataclass
class Trial:
    """Trains the same thing again and again in folders of its own."""

    config: RunConfig
    folder: Path
    runs: int = 0

    def train(self, name: str, until: int, resume: Path | None = None, *, quiet: bool = True) -> Path:
        """Train to update `until` or to the end, in folder `name`; the state that is left.

        Raises:
            UserError: what the training says.
            KeyboardInterrupt: if it was stopped by the user.
        """
        from sd_train.build import run

        self.meet()
        self._scramble()
        output = self.folder / name
        saving = self.config.saving.model_copy(
            update={"output_dir": output, "resume": None if resume is None else str(resume)}
        )
        said = io.StringIO()
        try:
            # Saves and stops are of folders that will be gone.
            with redirect_stdout(said) if quiet else nullcontext(), redirect_stderr(said):
                run(replace(self.config, saving=saving), until)
        except BaseException:
            print(said.getvalue(), end="", file=sys.stderr)
            raise
        self.meet()
        (state,) = output.glob("*-state")
        if "-step" in state.name and step_of(state) != until:
            raise KeyboardInterrupt
        return state

    def meet(self) -> None:
        """Wait for the other processes, if there are any, so that what one has written can be read by all.

        Each training leaves its group of processes at its end; this makes the next one.
        """
        self.runs += 1
        if os.environ.get("WORLD_SIZE", "1") != "1":
            from sd_train.device import join_ranks

            join_ranks(f"file://{self.folder.resolve()}/meeting-{self.runs}")

    def _scramble(self) -> None:
        """Nothing may depend on the global generators, so each run finds them in another state."""
        import numpy as np
        import torch

        random.seed(self.runs)
        np.random.seed(self.runs)
        torch.manual_seed(self.runs)


def step_of(state: Path) -> int:
    """The update after which `state` was saved."""
    step: int = json.loads((state / "manifest.json").read_text(encoding="utf-8"))["step"]
    return step


def stops(end: int) -> list[int]:
    """Where `end` updates are stopped: after each third of them."""
    return sorted({max(1, round(end / 3)), round(2 * end / 3), end})


def _verify(trial: Trial, updates: int) -> None:
    from sd_train.report import say_line

    speaks = os.environ.get("RANK", "0") == "0"
    whole = trial.train("whole", updates, quiet=False)
    end = step_of(whole)
    if end < 2:
        raise ConfigError("verify_resume: the training has a single update; give it two, so that it can be stopped")
    places, state = stops(end), None
    for number, place in enumerate(places):
        before, state = state, trial.train(f"part{number}", place, state)
        if speaks and before is not None:
            shutil.rmtree(before.parent)
    assert state is not None
    found = first_difference(whole, state)
    lengths = [place - before for before, place in zip([0, *places], places, strict=False)]
    told = f"{end} updates in one go and in parts of {' + '.join(map(str, lengths))}"
    if found is None:
        if speaks:
            say_line(f"exact: {told} leave the same, to the bit: {describe(whole)}")
        return
    again = trial.train("again", updates)
    repeats = first_difference(whole, again)
    if repeats is not None:
        raise RunError(
            f"verify_resume: two trainings of {end} updates in one go differ already, first in {repeats}: this machine "
            "or an option does not compute the same twice, so nothing can be said of the resume; leave out --xformers, "
            "or try --mixed_precision no"
        )
    raise RunError(f"verify_resume: {told} differ, first in {found}; this is a defect of the trainer, please report it")


def first_difference(one: Path, other: Path) -> str | None:
    """What two states differ in, in words; None: nothing but clocks and paths."""
    from safetensors import safe_open

    for table, words in _TABLES.items():
        files = [state / f"{table}.safetensors" for state in (one, other)]
        if not all(file.is_file() for file in files):
            if any(file.is_file() for file in files):
                return f"{words}: only one of the two has it"
            continue
        with safe_open(files[0], "pt") as first, safe_open(files[1], "pt") as second:
            for name in sorted({*first.keys(), *second.keys()}):
                if name not in first.keys() or name not in second.keys():  # noqa: SIM118
                    return f"{words}: only one of the two has {name}"
                if (text := tensor_difference(first.get_tensor(name), second.get_tensor(name))) is not None:
                    return f"{words}: {name} {text}"
    for file, words in (("optimizer.json", "the optimizer's state"), ("progress.json", "the counters")):
        ours, theirs = (json.loads((state / file).read_text(encoding="utf-8")) for state in (one, other))
        if (place := value_difference(ours, theirs)) is not None:
            return f"{words}: {place}"
    return None


def tensor_difference(one: Tensor, other: Tensor) -> str | None:
    """How two tensors differ, in words; None: not in a bit."""
    import torch

    if one.dtype != other.dtype or one.shape != other.shape:
        return f"is {one.dtype} {tuple(one.shape)} and {other.dtype} {tuple(other.shape)}"
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    if torch.equal(*bits):
        return None
    count = int((bits[0] != bits[1]).view(one.numel(), -1).any(dim=1).sum())
    apart = float((one.double() - other.double()).abs().max())
    return f"differs in {count} of {one.numel()} numbers, by up to {apart:.3g}"


def value_difference(one: Any, other: Any, place: str = "") -> str | None:
    """The first place, as a path, at which two JSON values differ; None: nowhere."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys()):
            if key in _CLOCKS:
                continue
            path = f"{place}/{key}" if place else key
            if key not in one or key not in other:
                return f"{path} is in one of the two only"
            if (found := value_difference(one[key], other[key], path)) is not None:
                return found
        return None
    # Figures that are not a number are equal to each other.
    return None if json.dumps(one) == json.dumps(other) else f"{place} is {one} and {other}"


def describe(state: Path) -> str:
    """What was compared."""
    from safetensors import safe_open

    parts = []
    for table, words in _TABLES.items():
        file = state / f"{table}.safetensors"
        if file.is_file():
            with safe_open(file, "pt") as tensors:
                parts.append(f"{words} ({len(tensors.keys())} tensors)")
    return f"{', '.join(parts)} and all counters"
