"""The rules between options of logs and uploads."""

from __future__ import annotations

import os
from pathlib import Path

from sd_train.config.catalogue import options
from sd_train.config.hub import HUB_ID, is_path_in_repo, parse_hub_folder
from sd_train.config.rules import Chosen
from sd_train.errors import Problems

_OF_WANDB = ("wandb_run_name", "wandb_api_key", "log_tracker_config", "log_config")
_OF_UPLOADS = (
    "huggingface_repo_type", "huggingface_path_in_repo", "huggingface_repo_visibility", "save_state_to_huggingface",
    "async_upload",
)  # fmt: skip


def check_outputs(chosen: Chosen, problems: Problems, warnings: list[str]) -> None:
    """Add what is wrong between these options to `problems` and what has no effect to `warnings`."""
    _logs(chosen, problems, warnings)
    _uploads(chosen, problems, warnings)
    _resume(chosen, problems, warnings)
    _retention(chosen, warnings)


def _logs(chosen: Chosen, problems: Problems, warnings: list[str]) -> None:
    values = chosen.values
    config = values.get("log_tracker_config")
    if config is not None and not os.path.isfile(config):
        problems.add(chosen.where("log_tracker_config"), str(config), "there is no such file", "check the path")
    prefix = Path(values.get("log_prefix") or "")
    if prefix.is_absolute() or ".." in prefix.parts:
        where, way_out = chosen.where("log_prefix"), "give the folder as logging_dir and only the name's start here"
        problems.add(where, str(prefix), "leads out of logging_dir", way_out)
    if not chosen.valid("logging_dir", "log_with"):
        return
    logging_dir, log_with = values["logging_dir"], values["log_with"]
    if logging_dir is None and log_with not in (None, "wandb"):
        problems.add(chosen.where("log_with"), log_with, "needs a folder for the curves", "give one as logging_dir")
    if logging_dir is None and values.get("log_prefix") is not None:
        warnings.append(f"{chosen.where('log_prefix')} has no effect: logging_dir is not given")
    if log_with not in ("wandb", "all"):
        for name in _OF_WANDB:
            if values.get(name):
                warnings.append(f"{chosen.where(name)} has no effect: log_with is neither wandb nor all")
    if logging_dir is None and log_with is None:
        for name in ("log_tracker_name", "log_norms_every_n_steps"):
            # A run's own configuration file holds the defaults too.
            if name in chosen.given and chosen.valid(name) and chosen.values[name] != options()[name].default:
                warnings.append(f"{chosen.where(name)} has no effect: logging_dir is not given")


def _uploads(chosen: Chosen, problems: Problems, warnings: list[str]) -> None:
    if not chosen.valid("huggingface_repo_id", *_OF_UPLOADS):
        return
    values = chosen.values
    repo_id, path = values["huggingface_repo_id"], values["huggingface_path_in_repo"]
    if repo_id is None:
        for name in _OF_UPLOADS:
            if values[name]:
                warnings.append(f"{chosen.where(name)} has no effect: huggingface_repo_id is not given")
        if values.get("huggingface_token") and not values.get("resume_from_huggingface"):
            warnings.append(f"{chosen.where('huggingface_token')} has no effect: huggingface_repo_id is not given")
        return
    if not HUB_ID.fullmatch(repo_id):
        problems.add(chosen.where("huggingface_repo_id"), repo_id, "is no repository", "write owner/name")
    if path is not None and not is_path_in_repo(path.strip("/")):
        rule = "is no path in a repository"
        problems.add(chosen.where("huggingface_path_in_repo"), path, rule, "write for example models/frog")
    states = ("save_state", "save_state_on_train_end")
    if values["save_state_to_huggingface"] and chosen.valid(*states) and not any(values[name] for name in states):
        where = chosen.where("save_state_to_huggingface")
        warnings.append(f"{where} has no effect but where a run is stopped: neither save_state nor "
                        "save_state_on_train_end is given")


def _retention(chosen: Chosen, warnings: list[str]) -> None:
    values = chosen.values
    needed = {
        "save_last_n_epochs": ("save_every_n_epochs", "save_n_epoch_ratio"),
        "save_last_n_steps": ("save_every_n_steps", "save_every_n_minutes"),
    }
    for base, intervals in needed.items():
        for name in (base, f"{base}_state"):
            if not chosen.valid(name, "save_state", *intervals) or values[name] is None:
                continue
            where = chosen.where(name)
            if all(values[interval] is None for interval in intervals):
                warnings.append(f"{where} has no effect: neither {intervals[0]} nor {intervals[1]} is given")
            elif name.endswith("_state") and not values["save_state"]:
                warnings.append(f"{where} has no effect: save_state is not given")
    if chosen.valid("save_every_n_epochs", "save_n_epoch_ratio") and None not in (
        values["save_every_n_epochs"], values["save_n_epoch_ratio"],
    ):  # fmt: skip
        where = chosen.where("save_every_n_epochs")
        warnings.append(f"{where} has no effect: save_n_epoch_ratio takes its place")


def _resume(chosen: Chosen, problems: Problems, warnings: list[str]) -> None:
    values = chosen.values
    if values.get("resume_anyway") and values.get("resume", "") is None:
        warnings.append(f"{chosen.where('resume_anyway')} has no effect: resume is not given")
    if values.get("initial_epoch") is not None and values.get("initial_step") is not None:
        where = chosen.where("initial_epoch")
        warnings.append(f"{where} has no effect: initial_step is given, as in sd-scripts")
    places = [values.get(name) for name in ("initial_step", "initial_epoch")]
    if values.get("skip_until_initial_step") and places == [None, None]:
        reason = "neither initial_step nor initial_epoch is given; resume always goes on with the very next update"
        warnings.append(f"{chosen.where('skip_until_initial_step')} has no effect: {reason}")
    if not chosen.valid("resume", "resume_from_huggingface") or not chosen.values["resume_from_huggingface"]:
        return
    where, resume = chosen.where("resume_from_huggingface"), chosen.values["resume"]
    way_out = "give it as resume = OWNER/NAME/PATH, with :REVISION and :TYPE behind it if need be"
    if resume is None:
        warnings.append(f"{where} has no effect: resume is not given")
    elif parse_hub_folder(resume) is None:
        problems.add(chosen.where("resume"), resume, "names no folder on the hub", way_out)
