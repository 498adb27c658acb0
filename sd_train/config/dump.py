"""A resolved configuration as TOML text that `--config_file` reads again."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from pydantic import SecretStr

from sd_train.config.catalogue import options
from sd_train.config.options import GROUPS, RunConfig

_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}


def dump_toml(config: RunConfig, names: Collection[str] | None = None) -> str:
    """The options of `config` (or those among `names`) as TOML, a comment line before each group.

    Options that are not set are left out, and keys and tokens always. Reading the text gives an equal configuration.
    """
    lines = [f"# options of {config.command}"]
    for group, model in GROUPS.items():
        values = getattr(config, group)
        entries = [
            f"{name} = {_literal(name, value)}"
            for name in model.model_fields
            if options()[name].belongs_to(config.command)
            and (value := getattr(values, name)) is not None
            and not isinstance(value, SecretStr)
            and (names is None or name in names)
        ]
        if entries:
            lines += ["", f"# {group}", *entries]
    return "\n".join(lines) + "\n"


def repeatable(config: RunConfig, seed: int) -> RunConfig:
    """`config` as it repeats the whole training: with the seed that was drawn, not resuming, replacing nothing."""
    return replace(
        config,
        training=config.training.model_copy(update={"seed": seed}),
        saving=config.saving.model_copy(update={"resume": None, "resume_anyway": (), "overwrite": False}),
        hub=config.hub.model_copy(update={"resume_from_huggingface": False}),
    )


_NOT_COMPARED = ("saving", "sampling", "logging", "hub", "metadata")
"""Groups that say nothing of how the training goes."""
_PLACES = ("pretrained_model_name_or_path", "vae")
"""Options that are paths although they may be more."""


def hyperparameters(config: RunConfig) -> dict[str, bool | int | float | str]:
    """The options that trainings are compared by, without paths; those that are not set are missing."""
    found: dict[str, bool | int | float | str] = {}
    for name, option in options().items():
        value = getattr(getattr(config, option.group), name)
        if value is None or option.group in _NOT_COMPARED or name in _PLACES or _holds_path(value):
            continue
        if not option.belongs_to(config.command):
            continue
        if isinstance(value, bool | int | float | str):
            found[name] = value
        else:
            found[name] = ",".join(map(str, value)) if isinstance(value, tuple) else str(dict(value))
    return found


def _holds_path(value: object) -> bool:
    return isinstance(value, Path) or (isinstance(value, tuple) and any(isinstance(item, Path) for item in value))


def non_default_names(config: RunConfig) -> list[str]:
    """The options whose value is not their default."""
    return [
        name for name, option in options().items() if getattr(getattr(config, option.group), name) != option.default
    ]


def _escaped(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    return f"\\u{ord(character):04x}" if ord(character) < 32 or ord(character) == 127 else character


def _text(value: str) -> str:
    return '"' + "".join(map(_escaped, value)) + '"'


def _literal(name: str, value: object) -> str:
    """`value` of the option `name` in TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | Path):
        return _text(str(value))
    if isinstance(value, tuple):
        if options()[name].kind == "list":
            return "[" + ", ".join(_literal(name, item) for item in value) + "]"
        return _text(",".join(map(str, value)))
    if isinstance(value, Mapping):
        return "[" + ", ".join(_text(f"{key}={argument!r}") for key, argument in value.items()) + "]"
    raise TypeError(f"no TOML for {type(value).__name__}")
