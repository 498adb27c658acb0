"""The rules between options, in one place. A rule is skipped while one of its options is itself wrong."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_train.config.hub import HUB_ID
from sd_train.config.lycoris_args import NETWORK_OPTIONS, OWN_MODULE, check_lycoris
from sd_train.config.network_args import OF_RANKS, OF_UNET, idle_arguments, read_network_args
from sd_train.config.rates import RATE_OPTIONS, learning_rates, trains_text
from sd_train.config.schedule_rules import SCHEDULE_OPTIONS, check_schedule_options
from sd_train.config.sources import Given
from sd_train.errors import Problems

_LONGEST_PART = 255
"""Bytes of one name in a path: the limit of the file systems in use."""
_LONGEST_NAME = 150
_LONGEST_NAME_BYTES = 200
"""Leaves room for what is put before and behind: `.NAME-step00000100-ema.safetensors.1234567-abcdef.tmp`."""
_DEVICE = re.compile(r"(?i:con|prn|aux|nul|conin\$|conout\$|(?:com|lpt)[0-9\xb9\xb2\xb3])")
_NOT_ON_WINDOWS = '<>:"|?*'


@dataclass(frozen=True)
class Chosen:
    """The values that are valid, defaults included, and what was written."""

    command: str
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
    if chosen.command == "train_network":
        _networks(chosen, problems, warnings)
        _network_args(chosen, problems, warnings)
        _network_files(chosen, problems, warnings)
        _lycoris(chosen, problems, warnings)
    elif chosen.command == "train_textual_inversion":
        _embedding(chosen, problems, warnings)
    else:
        _weights(chosen, problems, warnings)
    _average(chosen, warnings)
    _prior(chosen, problems, warnings)
    _length(chosen, warnings)
    _schedule(chosen, problems, warnings)
    _samples(chosen, problems, warnings)
    _idle(chosen, warnings)


def _paths(chosen: Chosen, problems: Problems, warnings: list[str]) -> None:
    values = chosen.values
    for name in ("dataset_config", "sample_prompts", "network_weights", "base_weights", "weights"):
        paths = values.get(name)
        for path in paths if isinstance(paths, tuple) else () if paths is None else (paths,):
            if not os.path.isfile(path):
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
    option = "output_name" if chosen.values.get("output_name") is not None else "token_string"
    name = chosen.values.get(option)
    if name is None:
        return
    # An embedding is called by its word.
    where = chosen.where(option)
    if any(character in name for character in "/\\"):
        way_out = "give the folder as output_dir and only the name here"
        if option == "token_string":
            way_out = "files are called by the word: give them another name as output_name, or choose another word"
        problems.add(where, name, "holds a path", way_out)
    if not name.strip("."):
        problems.add(where, name, "is a place, not a name", "give the folder as output_dir and a name here")
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
    if _DEVICE.fullmatch(name.partition(".")[0].rstrip()):
        rule = "is the name of a device on Windows"
        if os.name == "nt":
            problems.add(where, name, rule, "choose another name")
        else:
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
    if not chosen.valid(*latents, *texts, "cache_caption_variants", "cache_latents_sample", *RATE_OPTIONS):
        return
    if not any(values[name] for name in latents) and values["cache_latents_sample"]:
        warnings.append(f"{chosen.where('cache_latents_sample')} has no effect: cache_latents is not given")
    wanted = next((name for name in texts if values[name]), None)
    if wanted is None:
        if values["cache_caption_variants"] is not None:
            where = chosen.where("cache_caption_variants")
            warnings.append(f"{where} has no effect: cache_text_encoder_outputs is not given")
    elif trains_text(chosen.command, values):
        ways = {
            "train_network": "give --network_train_unet_only, or remove it",
            "fine_tune": "remove train_text_encoder, or remove it",
            "train_db": "give --stop_text_encoder_training -1, or remove it",
        }
        problems.add(chosen.where(wanted), None, "the text encoder is trained, so what it gives cannot be kept",
                     ways.get(chosen.command, "remove it"))


def _networks(chosen: Chosen, problems: Problems, warnings: list[str]) -> None:
    _form(chosen, ("safetensors", "ckpt", "pt"), "networks", problems)
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


def _lycoris(chosen: Chosen, problems: Problems, warnings: list[str]) -> None:
    if not chosen.valid(*NETWORK_OPTIONS) or chosen.values["network_module"] == OWN_MODULE:
        return
    check_lycoris(chosen.values, chosen.where, problems, warnings)
    preset = str(chosen.values["network_args"].get("preset", ""))
    if preset.startswith("unet-") and chosen.valid(*RATE_OPTIONS) and trains_text(chosen.command, chosen.values):
        warnings.append(f"{chosen.where('network_args')}: preset={preset} leaves the text encoder as it is, whatever "
                        "its rate; give network_train_unet_only, with which what it gives can be cached")  # fmt: skip


def _network_args(chosen: Chosen, problems: Problems, warnings: list[str]) -> None:
    """What `networks.lora` takes; other kinds of networks have rules of their own."""
    used = ("network_module", "network_args", "dim_from_weights", "network_train_text_encoder_only",
            "network_train_unet_only")  # fmt: skip
    if not chosen.valid(*used) or chosen.values["network_module"] != "networks.lora":
        return
    values, given, where = chosen.values, chosen.values["network_args"], chosen.where("network_args")
    args = read_network_args(given, where, problems)
    warnings += [f"{where}: {text}" for text in idle_arguments(args)]
    for switch, names in (
        ("network_train_text_encoder_only", OF_UNET), ("dim_from_weights", OF_RANKS),
        ("network_train_unet_only", ("loraplus_text_encoder_lr_ratio",)),
    ):  # fmt: skip
        idle = [name for name in names if name in given]
        if values[switch] and idle:
            warnings.append(f"{where}: {', '.join(idle)} has no effect: {switch} is given")


def _network_files(chosen: Chosen, problems: Problems, warnings: list[str]) -> None:
    """LoRA files that a training starts from or builds upon."""
    values = chosen.values
    if chosen.valid("dim_from_weights", "network_weights") and values["dim_from_weights"]:
        if values["network_weights"] is None:
            problems.add(chosen.where("dim_from_weights"), None, "there is no file to take ranks from",
                         "give a LoRA as network_weights, also with resume")
        for name in ("network_dim", "network_alpha"):
            if name in chosen.given:
                warnings.append(f"{chosen.where(name)} has no effect: dim_from_weights is given")
    if chosen.valid("base_weights", "base_weights_multiplier"):
        files, factors = values["base_weights"], values["base_weights_multiplier"]
        if factors and not files:
            warnings.append(f"{chosen.where('base_weights_multiplier')} has no effect: base_weights is not given")
        elif len(factors) > len(files):
            rule = f"has {len(factors)} numbers for {len(files)} base_weights"
            problems.add(chosen.where("base_weights_multiplier"), list(factors), rule,
                         "give one for each file of base_weights")


def _weights(chosen: Chosen, problems: Problems, warnings: list[str]) -> None:
    """What `fine_tune` and `train_db` train."""
    _form(chosen, ("safetensors", "ckpt", "diffusers", "diffusers_safetensors"), "whole models", problems)
    if not chosen.valid(*RATE_OPTIONS):
        return
    values = chosen.values
    rates = learning_rates(chosen.command, values)
    if not rates:
        name = "learning_rate" if values["block_lr"] is None else "block_lr"
        way_out = "give a learning rate above 0 to what is trained"
        if chosen.command == "fine_tune":
            way_out += ", or --train_text_encoder"
        problems.add(chosen.where(name), values[name], "nothing would be trained", way_out)
    _idle_text_rates(chosen, warnings)
    if values["block_lr"] is not None and "learning_rate" in chosen.given:
        others = {**values, "learning_rate": values["learning_rate"] + 1}
        if learning_rates(chosen.command, others) == rates:
            warnings.append(f"{chosen.where('learning_rate')} has no effect: block_lr is given")


def _idle_text_rates(chosen: Chosen, warnings: list[str]) -> None:
    """Learning rates of text encoders that do not learn, or that have others."""
    values, own = chosen.values, ("learning_rate_te1", "learning_rate_te2")
    reason = None
    if chosen.command == "fine_tune" and not values["train_text_encoder"]:
        reason = "train_text_encoder is not given"
    elif values["stop_text_encoder_training"] == -1:
        reason = "stop_text_encoder_training is -1"
    for name in ("learning_rate_te", *own):
        if values[name] is not None and reason is not None:
            warnings.append(f"{chosen.where(name)} has no effect: {reason}")
    if reason is None and values["learning_rate_te"] is not None and all(values[name] is not None for name in own):
        warnings.append(f"{chosen.where('learning_rate_te')} has no effect: {own[0]} and {own[1]} are given")


def _embedding(chosen: Chosen, problems: Problems, warnings: list[str]) -> None:
    """What `train_textual_inversion` teaches."""
    _form(chosen, ("safetensors", "ckpt", "pt"), "embeddings", problems)
    if chosen.values.get("learning_rate") == 0:
        problems.add(chosen.where("learning_rate"), 0, "nothing would be trained", "give a learning rate above 0")
    if chosen.valid("token_string"):
        word = chosen.values["token_string"]
        if word is None:
            problems.add("--token_string", None, "is required", "give the word that the captions call it by")
        elif word.split() != word.split(" ") or not word:
            rule = "has blanks at an end, or more than single blanks inside" if word.strip() else "is blank"
            problems.add(chosen.where("token_string"), word, rule, "give the word that the captions call it by")
    templates = ("use_object_template", "use_style_template")
    if chosen.valid(*templates) and all(chosen.values[name] for name in templates):
        warnings.append(f"{chosen.where(templates[1])} has no effect: use_object_template is given, as in sd-scripts")
    if chosen.valid("weights", "init_word") and chosen.values["weights"] and chosen.values["init_word"]:
        warnings.append(f"{chosen.where('init_word')} has no effect: the vectors start from weights")


def _form(chosen: Chosen, forms: Sequence[str], what: str, problems: Problems) -> None:
    """`save_model_as` knows the forms of all commands."""
    form = chosen.values.get("save_model_as")
    if form is not None and form not in forms:
        problems.add(chosen.where("save_model_as"), form, f"{chosen.command} saves {what}, which are never that",
                     f"write {' or '.join(forms)}, or leave it out")


def _average(chosen: Chosen, warnings: list[str]) -> None:
    if not chosen.valid("use_ema", "ema_decay"):
        return
    if chosen.values["use_ema"]:
        if chosen.values["ema_decay"] == 0:
            warnings.append(
                f"{chosen.where('use_ema')} has no effect: with ema_decay 0 the average is the weights themselves"
            )
        return
    # A run's own configuration file holds the defaults too.
    for name, usual in (("ema_decay", 0.9999), ("ema_device", "gpu"), ("sample_ema", False)):
        if name in chosen.given and chosen.values.get(name) != usual:
            warnings.append(f"{chosen.where(name)} has no effect: use_ema is not given")


def _prior(chosen: Chosen, problems: Problems, warnings: list[str]) -> None:
    if not chosen.valid("prior_preservation", "class_prompt", "prior_loss_weight"):
        return
    values = chosen.values
    if values["prior_preservation"] is not None and values["class_prompt"] is None:
        problems.add(chosen.where("prior_preservation"), values["prior_preservation"], "needs the class that is kept",
                     "give it as class_prompt: a photo of a dog")
    elif values["prior_preservation"] is None and values["class_prompt"] is not None:
        warnings.append(f"{chosen.where('class_prompt')} has no effect: prior_preservation is not given")
    elif values["prior_preservation"] is not None and values["prior_loss_weight"] == 0:
        warnings.append(f"{chosen.where('prior_preservation')} has no effect: prior_loss_weight is 0")


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
    for name in ("network_weights", "weights"):
        ranks = name == "network_weights" and values.get("dim_from_weights")
        if values.get(name) is not None and values.get("resume") is not None and not ranks:
            warnings.append(f"{chosen.where(name)} has no effect: resume continues with the state's weights")

def missing_model(source: str) -> str | None:
    """What to say if there is nothing at `--pretrained_model_name_or_path`, and it cannot be a hub id."""
    # Not Path.exists: that raises for names that are too long.
    if os.path.exists(source) or HUB_ID.fullmatch(source):
        return None
    return (
        f"--pretrained_model_name_or_path = {source}: there is no such file or folder (current folder: {Path.cwd()}); "
        "give a .safetensors or .ckpt file, a diffusers folder or a hub id (owner/name)"
    )
