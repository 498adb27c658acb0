"""Curves in wandb (Weights & Biases), if it is installed."""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sd_train.config.textfile import read_toml
from sd_train.errors import ConfigError
from sd_train.report_trackers import Hyperparameter, Picture, Tracker

_OURS = {
    "project": "give it as log_tracker_name",
    "name": "give it as wandb_run_name",
    "dir": "give it as logging_dir",
    "config": "it is filled with log_config",
    "settings": "give settings as variables of the environment (WANDB_...)",
}
"""Arguments of wandb.init that options stand for."""


@dataclass(frozen=True)
class WandbRun:
    """How a run is called there and what it is told."""

    project: str
    name: str | None = None
    key: str | None = field(default=None, repr=False)
    log_config: bool = False
    """Whether the hyper-parameters leave this machine."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """More ones of `wandb.init`."""


class Wandb(Tracker):
    """A run of wandb; its local files lie in `folder`, or where wandb chooses."""

    def __init__(self, folder: Path | None, run: WandbRun) -> None:
        self._folder, self._given = folder, run
        self._run: Any = None
        super().__init__("wandb", f"project {run.project}", "pip install wandb")

    def _open(self) -> None:
        import wandb

        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        # The command line, which wandb would send as metadata, may hold keys; the console is ours.
        settings = wandb.Settings(console="off", x_disable_meta=True, disable_git=True, api_key=self._given.key)
        self._run = wandb.init(
            project=self._given.project,
            name=self._given.name,
            dir=None if self._folder is None else str(self._folder),
            settings=settings,
            **self._given.arguments,
        )
        # Its own steps may only grow, which those of an epoch and of a late picture do not.
        self._run.define_metric("*", step_metric="step")
        self._run.define_metric("loss/epoch_average", step_metric="epoch")

    def _scalars(self, step: int, wall_time: float, values: Mapping[str, float], epoch: int | None) -> None:
        self._run.log({"step": step, **({} if epoch is None else {"epoch": epoch}), **values})

    def _image(self, tag: str, picture: Picture, step: int) -> None:
        import wandb

        self._run.log({"step": step, tag: wandb.Image(picture)})

    def _text(self, tag: str, text: str) -> None:
        """Stays on this machine."""

    def _hyperparameters(self, values: Mapping[str, Hyperparameter]) -> None:
        if self._given.log_config:
            self._run.config.update(dict(values))

    def _flush(self) -> None:
        """wandb sends by itself."""

    def _close(self, finals: Mapping[str, float], failed: bool) -> None:
        # Its summary holds the last value of every curve in any case.
        self._run.finish(exit_code=1 if failed else 0)


def is_installed() -> bool:
    """Whether wandb can be imported, without importing it."""
    return importlib.util.find_spec("wandb") is not None


def read_arguments(path: Path | None) -> dict[str, Any]:
    """The arguments of `wandb.init` in the table `wandb` of a TOML file; without a file, none.

    Raises:
        ConfigError: if the file holds anything else.
    """
    if path is None:
        return {}
    file = read_toml(path)
    where = f"--log_tracker_config = {path}"
    if others := sorted(file.data.keys() - {"wandb"}):
        raise ConfigError(f"{where}: {others[0]} is no tracker with arguments; put those of wandb.init below [wandb]")
    found = file.data.get("wandb", {})
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: wandb is no table; put the arguments of wandb.init below a line [wandb]")
    if taken := next((name for name in _OURS if name in found), None):
        raise ConfigError(f"{where}: wandb.{taken} is an option of its own; {_OURS[taken]}")
    return found


def check_arguments(run: WandbRun) -> None:
    """Raise if wandb is missing or does not know an argument of `run`.

    Raises:
        ConfigError: with the way out.
    """
    if not is_installed():
        raise ConfigError("--log_with = 'wandb': wandb is not installed; pip install wandb, or choose tensorboard")
    import wandb

    known = inspect.signature(wandb.init).parameters
    if unknown := [name for name in run.arguments if name not in known]:
        raise ConfigError(
            f"--log_tracker_config: wandb.{unknown[0]} is no argument of wandb.init; it knows "
            f"{', '.join(name for name in known if name not in _OURS)}"
        )


def missing_key(run: WandbRun) -> ConfigError | None:
    """What to say if the curves are to be sent and no key is known; asks neither the user nor the network."""
    import wandb

    mode = run.arguments.get("mode") or os.environ.get("WANDB_MODE") or "online"
    if mode not in ("online", "shared") or run.key:
        return None
    if "prompt" not in inspect.signature(wandb.login).parameters:
        # An older release, which cannot be asked without a question to the user; its init tells.
        return None
    way_out = "run wandb login, set WANDB_API_KEY, or keep the run on this machine with WANDB_MODE=offline"
    try:
        found = wandb.login(prompt=False)
    except Exception as problem:
        # Its errors have no common class, and each of them is about the key.
        return ConfigError(f"--log_with: wandb refuses the key that it finds ({problem}); {way_out}")
    return None if found else ConfigError(f"--log_with: wandb has no key; {way_out}")
