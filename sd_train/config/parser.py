"""Command line and configuration file -> one validated `RunConfig`, with every problem reported at once."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from sd_train import __version__
from sd_train.config.catalogue import Option, is_unset, number_in, options
from sd_train.config.compat import HANDLED_BY_PARSER, SHORTHANDS, SUBSTITUTES, known_options
from sd_train.config.compile_rules import check_compile
from sd_train.config.dump import dump_toml, non_default_names
from sd_train.config.group import Group
from sd_train.config.help import help_text
from sd_train.config.objective_rules import check_objective
from sd_train.config.options import GROUPS, RunConfig
from sd_train.config.output_rules import check_outputs
from sd_train.config.rules import Chosen, check_rules, missing_model
from sd_train.config.safety_rules import check_safety
from sd_train.config.sources import (
    CommandLine,
    Given,
    canonical,
    concealed,
    read_command_line,
    read_config_file,
    with_suffix,
)
from sd_train.errors import ConfigError, Problems

_REQUIRED = {
    "output_dir": "give a folder: --output_dir FOLDER",
    "pretrained_model_name_or_path": "give a model: --pretrained_model_name_or_path FILE_OR_FOLDER",
}


Check = Callable[[Any], "tuple[str, str] | None"]
"""A valid value -> the rule that it breaks and the way out, or None."""


@dataclass(frozen=True)
class LoadedConfig:
    """The configuration and what the user should know of it before the run."""

    config: RunConfig
    warnings: tuple[str, ...]


def load_run_config(command: str, argv: Sequence[str], checks: Mapping[str, Check] | None = None) -> LoadedConfig:
    """Resolve the options of `command`: command line > `--config_file` > defaults.

    `checks` look at single options whose meaning is known elsewhere (names in registries); they only add to other
    problems, because without these the run is prepared, and finds them with what is wrong there.

    Raises:
        ConfigError: with all problems found, each with its place.
        SystemExit: 0 after `--help`, `--version` or `--output_config` did their work.
    """
    problems = Problems()
    line = read_command_line(argv, problems)
    if line.help or line.version:
        print(help_text(command) if line.help else f"sd_train {__version__}")
        raise SystemExit(0)
    given = _merge(line, problems)
    warnings: list[str] = []
    given = _without_unsupported(given, problems, warnings)
    given = _without_foreign(command, given, problems, warnings)
    _expand_shorthands(given, problems, warnings)
    groups, valid = _validate(given, problems)
    chosen = Chosen(command, valid, given)
    check_rules(chosen, problems, warnings)
    check_outputs(chosen, problems, warnings)
    check_objective(chosen, problems, warnings)
    check_safety(chosen, warnings)
    check_compile(chosen, problems, warnings)
    if problems.found:
        for name, check in (checks or {}).items():
            if chosen.valid(name) and (wrong := check(valid[name])) is not None:
                problems.add(chosen.where(name), valid[name], *wrong)
        raise ConfigError(*map(str, problems.found), *_problems_of_files(command, valid))
    origins = {name: given[name].origin if name in given else "default" for name in options()}
    config = RunConfig(command=command, origins=origins, **groups)
    if _asks_output(line):
        _write_options(config, str(line.values["config_file"].value))
    return LoadedConfig(config, tuple(warnings))


def _problems_of_files(command: str, valid: Mapping[str, object]) -> tuple[str, ...]:
    """What is wrong with the model's path and in the dataset file, as far as can be told beside wrong options."""
    return (*_model_problems(valid), *_dataset_problems(command, valid))


def _model_problems(valid: Mapping[str, object]) -> tuple[str, ...]:
    model = valid.get("pretrained_model_name_or_path")
    missing = missing_model(model) if isinstance(model, str) else None
    return () if missing is None else (missing,)


def _dataset_problems(command: str, valid: Mapping[str, object]) -> tuple[str, ...]:
    # Not needed for --help, nor when all options are right.
    from sd_train.data.config import load_datasets
    from sd_train.data.request import dataset_request

    sources = [valid.get(name) for name in ("dataset_config", "train_data_dir", "in_json")]
    if not any(sources) or any(path is not None and not os.path.exists(str(path)) for path in sources):
        return ()
    try:
        # Whether the model is an SDXL one is not known; where it were, fine_tune takes every style.
        load_datasets(replace(dataset_request(command, valid), sdxl=True))
    except ConfigError as error:
        return error.problems
    return ()


def _asks_output(line: CommandLine) -> bool:
    return "output_config" in line.values and bool(line.values["output_config"].value)


def _merge(line: CommandLine, problems: Problems) -> dict[str, Given]:
    """What is really given, by name; `""` and the like on the command line take back what the file says."""
    from_file: Mapping[str, Given] = {}
    path = line.values.get("config_file")
    if _asks_output(line):
        if path is None:
            problems.add("--output_config", None, "needs a path to write to", "give it as --config_file NEW.toml")
        elif os.path.exists(with_suffix(path.value)):
            problems.add("--config_file", path.value, "exists already and is not overwritten", "name a new file")
    elif path is not None and path.value.lower().endswith(".json"):
        way_out = "write the options as TOML (name = value, a line each), or give them on the command line"
        problems.add("--config_file", path.value, "is a JSON file, and options are read from TOML", way_out)
    elif path is not None and path.value != "":
        from_file = read_config_file(with_suffix(path.value), problems)
        if (wish := from_file.get("output_config")) is not None and wish.value not in (False, ""):
            problems.add(wish.where("output_config"), wish.value, "works only as a flag", "remove it from the file")
    merged = {**canonical(from_file), **canonical(line.values)}
    if (chosen := merged.get("xformers")) is not None and chosen.value in ("xformers", "sdpa", "none"):
        # What kohya_ss calls its choice of attention.
        merged["xformers"] = Given(chosen.value == "xformers", chosen.origin)
    return {name: given for name, given in merged.items() if not _is_unset(name, given.value, merged)}


def _is_unset(name: str, value: object, merged: Mapping[str, Given]) -> bool:
    option = options().get(name)
    if option is None:
        return known_options()[name].is_unset(value)
    if name == "max_train_steps" and number_in(value, "int") == 0 and not isinstance(value, bool):
        epochs = merged.get("max_train_epochs")
        return epochs is not None and not is_unset(options()["max_train_epochs"], epochs.value)
    known = known_options().get(name)
    return is_unset(option, value) or (known is not None and value in known.same_as_unset)


def _without_unsupported(given: Mapping[str, Given], problems: Problems, warnings: list[str]) -> dict[str, Given]:
    """What of `given` this version acts on; the rest becomes warnings and problems."""
    supported: dict[str, Given] = {}
    values = {name: entry.value for name, entry in given.items()}
    for name, entry in given.items():
        known = known_options().get(name)
        if name in HANDLED_BY_PARSER:
            continue
        if known is None or known.status == "supported":
            supported[name] = entry
        elif known.kind == "flag" and entry.value is not True:
            problems.add(entry.where(name), entry.value, "must be true or false", "write true or false without quotes")
        elif known.status == "no_effect":
            warnings.append(f"{entry.where(name)} has no effect: {known.note}")
        elif (reason := known.idle_because(values)) is not None:
            warnings.append(f"{entry.where(name)} has no effect: {reason}")
        else:
            rule = "is not yet supported" if known.status == "not_yet" else "is refused"
            problems.add(entry.where(name), entry.value, rule, known.note)
    return supported


def _without_foreign(
    command: str, given: Mapping[str, Given], problems: Problems, warnings: list[str]
) -> dict[str, Given]:
    """`given` without the options that only other commands have: wrong as flags, in files a word (sd-scripts: none)."""
    own: dict[str, Given] = {}
    for name, entry in given.items():
        option = options().get(name)
        if option is None or option.belongs_to(command):
            own[name] = entry
        elif entry.origin.startswith("--"):
            instead = SUBSTITUTES.get(command, {}).get(name)
            way_out = f"it belongs to {' and '.join(option.commands)}; {f'use {instead}' if instead else 'remove it'}"
            problems.add(entry.where(name), entry.value, f"{command} has no such option", way_out)
        elif entry.value and entry.value != option.default:
            warnings.append(f"{entry.where(name)} has no effect: it belongs to {' and '.join(option.commands)}")
    return own


def _expand_shorthands(given: dict[str, Given], problems: Problems, warnings: list[str]) -> None:
    """Replace `--use_8bit_adam` and the like, in place."""
    for flag, (name, value) in SHORTHANDS.items():
        entry = given.pop(flag, None)
        if entry is None or entry.value is False:
            continue
        if entry.value is not True:
            problems.add(entry.where(flag), entry.value, "must be true or false", "write true or false without quotes")
        elif name in given:
            rule = f"stands for {name} = {value}, and {given[name].where(name)} = {given[name].value} is given too"
            problems.add(entry.where(flag), None, rule, "remove one of the two")
        else:
            given[name] = Given(value, entry.origin)
            warnings.append(f"{entry.where(flag)} is an old spelling of {name} = {value}, which is taken")


def _validate(given: Mapping[str, Given], problems: Problems) -> tuple[dict[str, Any], dict[str, Any]]:
    """The groups, and the value of every option that is valid; a group with a problem holds a stand-in for it."""
    groups: dict[str, Group] = {}
    valid: dict[str, Any] = {}
    for group, model in GROUPS.items():
        raw = {name: given[name].value for name in model.model_fields if name in given}
        wrong: set[str] = set()
        try:
            groups[group] = model.model_validate(_filled(model, raw))
        except ValidationError as error:
            for details in error.errors(include_url=False):
                name = str(details["loc"][0])
                if name not in wrong:
                    _explain(options()[name], given[name], details, problems)
                wrong.add(name)
            kept = {name: value for name, value in raw.items() if name not in wrong}
            groups[group] = model.model_validate(_filled(model, kept))
        for name in model.model_fields:
            if options()[name].required and name not in raw:
                problems.add(f"--{name}", None, "is required", _REQUIRED[name])
            elif name not in wrong:
                valid[name] = getattr(groups[group], name)
    return dict(groups), valid


def _filled(model: type[Group], raw: Mapping[str, Any]) -> dict[str, Any]:
    stand_ins = {name: "." for name, field in model.model_fields.items() if field.is_required()}
    return {**stand_ins, **raw}


def _explain(option: Option, given: Given, details: ErrorDetails, problems: Problems) -> None:
    """Put pydantic's finding about one value into words."""
    where, value = given.where(option.name), concealed(option.name, given.value)
    default = f"leave it out (default: {option.default})" if option.default not in (None, "", {}) else "leave it out"
    if details["type"] == "option_value":
        problems.add(where, value, details["ctx"]["rule"], details["ctx"]["way_out"])
    elif value in option.hint.later:
        problems.add(where, value, "is not yet supported", f"write {' or '.join(map(str, option.choices))}")
    elif close := difflib.get_close_matches(str(value), [str(choice) for choice in option.choices], n=1):
        problems.add(where, value, option.rule, f"did you mean {close[0]}?")
    else:
        way_out = default if not option.required else _REQUIRED[option.name]
        problems.add(where, value, option.rule, f"write such a value, or {way_out}")


def _write_options(config: RunConfig, path: str) -> None:
    target = with_suffix(path)
    text = dump_toml(config, non_default_names(config))
    try:
        with target.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"{target}: cannot be written ({error.strerror}); check the folder") from None
    except ValueError:
        raise ConfigError(f"{str(target)!r}: no file name holds a null character; correct the path") from None
    print(f"wrote the options that are not defaults to {target}")
    raise SystemExit(0)
