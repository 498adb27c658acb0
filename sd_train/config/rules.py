"""The rules between options, in one place. A rule is skipped while one of its options is itself wrong."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_train.config.hub import HUB_ID
from sd_train.config.schedule_rules import SCHEDULE_OPTIONS, check_schedule_options
from sd_train.config.sources import Given
from sd_train.errors import Problems

_LONGEST_PART = 255
"""Bytes of one name in a path: the limit of the file systems in use."""
_LONGEST_NAME = 150
_LONGEST_NAME_BYTES = 200
"""Leaves room for what is put before and behind: `.NAME-step00000100-state.1234567.tmp`."""
_NOT_ON_WINDOWS = '<>:"|?*'


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
    _paths(chosen, problems, warnings)
    _dataset(chosen, problems, warnings)
    _caches(chosen, problems, warnings)
    _networks(chosen, problems, warnings)
    _length(chosen, warnings)
    _schedule(chosen, problems, warnings)
    _samples(chosen, problems, warnings)
    _idle(chosen, warnings)


def _paths(chosen: Chosen, problems: Problems, warnings: list[str]) -> None:
    values = chosen.values
    for name in ("dataset_config", "sample_prompts", "network_weights"):
        path = values.get(name)
        if path is not None and not os.path.isfile(path):
            problems.add(chosen.where(name), str(path), "there is no such file", "check the path")
    folders: dict[str, str] = {"train_data_dir": "folder", "reg_data_dir": "folder", "in_json": "file"}
    for name, kind in folders.items() if values.get("dataset_config") is None else ():
        path = values.get(name)
        there = os.path.isdir if kind == "folder" else os.path.exists
        if path is not None and not there(path):
            problems.add(chosen.where(name), str(path), f"there is no such {kind}", "check the path")
    resume = values.get("resume")
    on_hub = values.get("resume_from_huggingface", False)
    if resume not in (None, "latest") and not on_hub and not os.path.exists(resume):
        way_out = "check the path, or write latest for the newest state in output_dir"
        problems.add(chosen.where("resume"), resume, "there is no such folder", way_out)
    for name in ("output_dir", "logging_dir", "cache_dir"):
        path = values.get(name)
        if path is not None and os.path.exists(path) and not os.path.isdir(path):
            problems.add(chosen.where(name), str(path), "is a file", "name a folder")
    for name in ("pretrained_model_name_or_path", "output_dir", "logging_dir", "cache_dir"):
        long = [part for part in Path(values.get(name) or "").parts if len(os.fsencode(part)) > _LONGEST_PART]
        if long:
            rule = f"a name in this path is longer than {_LONGEST_PART} bytes ({long[0][:40]}...)"
            problems.add(chosen.where(name), str(values[name]), rule, "choose a shorter one")
    _output_name(chosen, problems, warnings)


def _output_name(chosen: Chosen, problems: Problems, warnings: list[str]) -> None:
    name = chosen.values.get("output_name")
    if name is None:
        return
    where = chosen.where("output_name")
    if any(character in name for character in "/\\"):
        way_out = "give the folder as output_dir and only the name here"
        problems.add(where, name, "holds a path", way_out)
    if any(unicodedata.category(character) == "Cc" for character in name):
        problems.add(where, name, "holds a control character such as a line break or tab", "remove it")
    if len(name) > _LONGEST_NAME or len(name.encode()) > _LONGEST_NAME_BYTES:
        rule = f"is longer than {_LONGEST_NAME} characters ({_LONGEST_NAME_BYTES} bytes in UTF-8)"
        problems.add(where, name, rule, "choose a shorter name; steps and endings are put behind it")
    forbidden = [character for character in _NOT_ON_WINDOWS if character in name]
    if forbidden and os.name == "nt":
        problems.add(where, name, f"Windows takes no {' '.join(forbidden)} in file names", "choose another name")
    elif forbidden:
        rule = f"Windows takes no {' '.join(forbidden)} in file names"
        warnings.append(f"{where} = {name!r}: {rule}, so the files cannot be copied there under this name")


def _dataset(chosen: Chosen, problems: Problems, warnings: list[str]) -> None:
    sources = ("dataset_config", "train_data_dir", "reg_data_dir", "in_json")
    if not chosen.valid(*sources):
        return
    values = chosen.values
    if values["dataset_config"] is not None:
        for name in sources[1:]:
            if values[name] is not None:
                warnings.append(f"{chosen.where(name)} has no effect: dataset_config is given, as in sd-scripts")
    elif values["train_data_dir"] is None and values["in_json"] is None:
        way_out = "give a dataset file (--dataset_config FILE.toml), or a folder of folders such as 10_sks dog "
        way_out += "(--train_data_dir FOLDER)"
        problems.add("--dataset_config or --train_data_dir", None, "is required", way_out)


def _caches(chosen: Chosen, problems: Problems, warnings: list[str]) -> None:
    """What depends on the caches of latents and of encoded captions."""
    values = chosen.values
    latents, texts = ("cache_latents", "cache_latents_to_disk"), (
        "cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk",
    )  # fmt: skip
    unet_only, rate = "network_train_unet_only", "text_encoder_lr"
    if not chosen.valid(*latents, *texts, "cache_caption_variants", "cache_latents_sample", unet_only, rate):
        return
    if not any(values[name] for name in latents) and values["cache_latents_sample"]:
        warnings.append(f"{chosen.where('cache_latents_sample')} has no effect: cache_latents is not given")
    wanted = next((name for name in texts if values[name]), None)
    if wanted is None:
        if values["cache_caption_variants"] is not None:
            where = chosen.where("cache_caption_variants")
            warnings.append(f"{where} has no effect: cache_text_encoder_outputs is not given")
    elif not values[unet_only] and values[rate] != 0:
        problems.add(chosen.where(wanted), None, "the text encoder is trained, so what it gives cannot be kept",
                     "give --network_train_unet_only, or remove it")


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
    given_apart = all(values[name] is not None for name in ("unet_lr", "text_encoder_lr"))
    if "learning_rate" in chosen.given and given_apart and not values[unet_only] and not values[text_only]:
        warnings.append(f"{chosen.where('learning_rate')} has no effect: unet_lr and text_encoder_lr are given")
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


def _schedule(chosen: Chosen, problems: Problems, warnings: list[str]) -> None:
    if chosen.valid(*SCHEDULE_OPTIONS):
        check_schedule_options(chosen.values, chosen.where, problems, warnings)


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


def _idle(chosen: Chosen, warnings: list[str]) -> None:
    """Options that were given beside another one that leaves them without effect."""
    values = chosen.values
    steps, epochs = "sample_every_n_steps", "sample_every_n_epochs"
    if chosen.valid(steps, epochs) and values[steps] and values[epochs]:
        warnings.append(f"{chosen.where(steps)} has no effect: {epochs} is given, as in sd-scripts")
    # kohya_ss writes 1, which is what one at a time is anyway.
    caches = ("cache_latents", "cache_latents_to_disk")
    several = chosen.valid("vae_batch_size", *caches) and values["vae_batch_size"] > 1
    if several and not any(values[name] for name in caches):
        warnings.append(f"{chosen.where('vae_batch_size')} has no effect: cache_latents is not given")
    if values.get("network_weights") is not None and values.get("resume") is not None:
        warnings.append(f"{chosen.where('network_weights')} has no effect: resume continues with the state's weights")

def missing_model(source: str) -> str | None:
    """What to say if there is nothing at `--pretrained_model_name_or_path`, and it cannot be a hub id."""
    # Not Path.exists: that raises for names that are too long.
    if os.path.exists(source) or HUB_ID.fullmatch(source):
        return None
    return (
        f"--pretrained_model_name_or_path = {source}: there is no such file or folder (current folder: {Path.cwd()}); "
        "give a .safetensors or .ckpt file, a diffusers folder or a hub id (owner/name)"
    )
