"""The rules between options, in one place. A rule is skipped while one of its options is itself wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_train.config.sources import Given
from sd_train.errors import Problems


@dataclass(frozen=True)
class Chosen:
    """The values that are valid, defaults included, and what was written."""

    values: Mapping[str, Any]
    given: Mapping[str, Given]
    """Only what was really given, by name."""

    def valid(self, *names: str) -> bool:
        """Whether all of `names` have a valid value."""
        return all(name in self.values for name in names)

    def where(self, name: str) -> str:
        """The place of an option's value for a message."""
        return self.given[name].where(name) if name in self.given else f"--{name}"


def check_rules(chosen: Chosen, problems: Problems, warnings: list[str]) -> None:
    """Add what is wrong between the options to `problems` and what has no effect to `warnings`."""
    _paths(chosen, problems)
    _networks(chosen, problems, warnings)
    _length(chosen, warnings)
    _schedule(chosen, problems)
    _samples(chosen, problems, warnings)
    _logs(chosen, problems, warnings)


def _paths(chosen: Chosen, problems: Problems) -> None:
    values = chosen.values
    for name in ("dataset_config", "sample_prompts", "network_weights"):
        path = values.get(name)
        if path is not None and not path.is_file():
            problems.add(chosen.where(name), str(path), "there is no such file", "check the path")
    resume = values.get("resume")
    if resume not in (None, "latest") and not Path(resume).exists():
        way_out = "check the path, or write latest for the newest state in output_dir"
        problems.add(chosen.where("resume"), resume, "there is no such folder", way_out)
    for name in ("output_dir", "logging_dir"):
        path = values.get(name)
        if path is not None and path.exists() and not path.is_dir():
            problems.add(chosen.where(name), str(path), "is a file", "name a folder")
    output_name = values.get("output_name")
    if output_name is not None and any(character in output_name for character in "/\\"):
        way_out = "give the folder as output_dir and only the name here"
        problems.add(chosen.where("output_name"), output_name, "holds a path", way_out)


def _networks(chosen: Chosen, problems: Problems, warnings: list[str]) -> None:
    unet_only, text_only = "network_train_unet_only", "network_train_text_encoder_only"
    if not chosen.valid(unet_only, text_only, "unet_lr", "text_encoder_lr", "learning_rate"):
        return
    values = chosen.values
    if values[unet_only] and values[text_only]:
        where = f"{chosen.where(unet_only)} and {chosen.where(text_only)}"
        problems.add(where, None, "exclude each other", "remove both to train U-Net and text encoder")
        return
    for flag, rate in ((unet_only, "text_encoder_lr"), (text_only, "unet_lr")):
        if values[flag] and values[rate]:
            warnings.append(f"{chosen.where(rate)} has no effect: {flag} is given")
    rates = {
        "unet_lr": 0 if values[text_only] else values["unet_lr"],
        "text_encoder_lr": 0 if values[unet_only] else values["text_encoder_lr"],
    }
    if all(rate == 0 for rate in rates.values()):
        names = [name for name in (unet_only, text_only) if values[name]]
        names += [name for name in rates if values[name] == 0]
        where = " and ".join(chosen.where(name) for name in names)
        problems.add(where, None, "nothing would be trained", "give a learning rate above 0 to what is trained")
    elif values["learning_rate"] == 0 and not any(rates.values()):
        warnings.append(f"{chosen.where('learning_rate')} is 0: nothing is learned")


def _length(chosen: Chosen, warnings: list[str]) -> None:
    if "max_train_steps" in chosen.given and chosen.values.get("max_train_epochs") is not None:
        warnings.append(f"{chosen.where('max_train_steps')} has no effect: max_train_epochs is given")


def _schedule(chosen: Chosen, problems: Problems) -> None:
    if not chosen.valid("lr_scheduler", "lr_warmup_steps"):
        return
    scheduler, warmup = chosen.values["lr_scheduler"], chosen.values["lr_warmup_steps"]
    if scheduler.lower() == "constant" and warmup:
        rule = "lr_scheduler constant has no warm-up"
        way_out = "write lr_scheduler = constant_with_warmup, or remove lr_warmup_steps"
        problems.add(chosen.where("lr_warmup_steps"), warmup, rule, way_out)


def _samples(chosen: Chosen, problems: Problems, warnings: list[str]) -> None:
    intervals = ("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first")
    if not chosen.valid("sample_prompts", *intervals):
        return
    wanted = [name for name in intervals if chosen.values[name]]
    if chosen.values["sample_prompts"] is None:
        for name in wanted:
            way_out = "give a file of prompts as sample_prompts"
            problems.add(chosen.where(name), None, "there are no prompts to make pictures of", way_out)
    elif not wanted:
        ways = "sample_every_n_steps, sample_every_n_epochs or sample_at_first"
        warnings.append(f"{chosen.where('sample_prompts')} has no effect: no sample is asked for by {ways}")


def _logs(chosen: Chosen, problems: Problems, warnings: list[str]) -> None:
    if not chosen.valid("logging_dir", "log_with", "log_prefix") or chosen.values["logging_dir"] is not None:
        return
    if chosen.values["log_with"] is not None:
        where = chosen.where("log_with")
        problems.add(where, chosen.values["log_with"], "needs a folder for the curves", "give one as logging_dir")
    if chosen.values["log_prefix"] is not None:
        warnings.append(f"{chosen.where('log_prefix')} has no effect: logging_dir is not given")
