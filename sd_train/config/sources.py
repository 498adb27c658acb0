"""Where values come from: the command line and the configuration file, as one kind of mapping."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sd_train.config.catalogue import Kind, is_unset, options
from sd_train.config.compat import SYNONYMS, known_options
from sd_train.config.textfile import TomlFile, read_toml
from sd_train.errors import Problems

_SECRET_MARKS = ("token", "api_key", "apikey", "password", "secret")
"""In names of what nobody is to read."""

_TOKEN = re.compile(r"\b(hf_|api_org_)\w+")
"""A token of the hub, wherever it stands."""


@dataclass(frozen=True)
class Given:
    """A value as it was written, and where: `--flag` or `file.toml:12`."""

    value: Any
    origin: str

    def where(self, name: str) -> str:
        """The place for a message."""
        return self.origin if self.origin.startswith("--") else f"{self.origin}: {name}"


@dataclass
class CommandLine:
    """The words of a command line, sorted by option but not yet checked."""

    values: dict[str, Given] = field(default_factory=dict)
    help: bool = False
    version: bool = False


def kind_of(name: str) -> Kind | None:
    """The kind of a known option, ours or sd-scripts', or None."""
    if option := options().get(name):
        return option.kind
    known = known_options().get(name)
    return known.kind if known else None


def concealed(name: str, value: object) -> object:
    """`value` as a message may show it: keys and tokens are not shown, under misspelt names neither."""
    if isinstance(value, str):
        value = _TOKEN.sub(r"\1***", value)
    option = options().get(name)
    if option is None and kind_of(name) is None:
        said = name.replace("-", "_").lower()
        secrets = [each for each, known in options().items() if known.secret]
        alike = any(mark in said for mark in _SECRET_MARKS) or difflib.get_close_matches(said, secrets, n=1)
        return "***" if alike else value
    return "***" if option is not None and option.secret else value


def concealed_word(word: str) -> str:
    """A word that stands where an option is expected, as a message may show it: it may be `name=secret`."""
    name, equals, value = word.partition("=")
    name = str(concealed("", name))
    return f"{name}={concealed(name.lstrip('-'), value)}" if equals else name


def nearest(name: str) -> str:
    """The sentence that leads from an unknown name to known ones."""
    names = [*options(), *(known for known in known_options() if known not in options())]
    if len(name) > 3 and (longer := [known for known in names if known.startswith(name)]):
        return f"names are not shortened: write {' or '.join(longer[:4])}"
    # Only for the message: keys of dataset files are looked at where they are read.
    from sd_train.data.keys import DatasetTable, SubsetTable

    keys = {*DatasetTable.model_fields, *SubsetTable.model_fields} - set(names)
    if close := difflib.get_close_matches(name.replace("-", "_"), [*names, *keys], n=1, cutoff=0.6):
        place = " It is a key of the dataset file (dataset_config)." if close[0] in keys else ""
        return f"did you mean {close[0]}?{place}"
    return "remove it, or see --help for the options"


def read_command_line(words: Sequence[str], problems: Problems) -> CommandLine:
    """Sort `words` by option; a flag given twice counts with its last value, as in sd-scripts.

    `--flag value`, `--flag=value`, `--list a b c`; switches take no value, and `--no_NAME` switches off what a file
    switches on.
    """
    result = CommandLine()
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            result.help = True
            continue
        if word == "--version":
            result.version = True
            continue
        values: list[str] = []
        while rest and not rest[0].startswith("--") and rest[0] != "-h":
            values.append(rest.pop(0))
        if not word.startswith("--"):
            where, rule = concealed_word(word), "stands before the first option"
            problems.add(where, None, rule, "every value follows its --option")
            continue
        flag, equals, attached = word.partition("=")
        _take(result, flag, [attached, *values] if equals else values, problems)
    return result


def _take(result: CommandLine, flag: str, values: list[str], problems: Problems) -> None:
    name = flag[2:]
    kind = kind_of(name)
    switched_on = kind is not None
    if kind is None and name.startswith("no_") and kind_of(name[3:]) == "flag":
        name, kind = name[3:], "flag"
    shown = " ".join(values) if values else None
    safe = None if shown is None else concealed(name, shown)
    if kind is None:
        problems.add(flag, safe, "is no option", nearest(name))
    elif kind == "flag":
        if values:
            way_out = f"write {flag} alone" if switched_on else f"write {flag} alone to switch it off"
            problems.add(flag, safe, "is a switch and takes no value", way_out)
        result.values[name] = Given(switched_on, flag)
    elif kind == "list":
        result.values[name] = Given(values, flag)
    elif len(values) == 1:
        result.values[name] = Given(values[0], flag)
    elif values:
        rule = f"takes one value and got {len(values)}"
        problems.add(flag, safe, rule, "put quotes around a value with blanks")
        if kind == "text":
            # So that it is not also said to be missing.
            result.values[name] = Given(shown, flag)
    else:
        way_out = f"write {flag} VALUE ({flag}=VALUE if it starts with --)"
        problems.add(flag, None, "needs a value", way_out)


def with_suffix(path: str) -> Path:
    """sd-scripts' rule: `.toml` is appended where it is missing."""
    return Path(path if path.endswith(".toml") else path + ".toml")


def read_config_file(path: Path, problems: Problems) -> dict[str, Given]:
    """The options of a TOML file; its sections are only labels.

    Raises:
        ConfigError: if the file is missing, unreadable or not TOML.
    """
    file = read_toml(path)
    found: dict[str, tuple[tuple[str, ...], Given]] = {}
    for key, value in file.data.items():
        if isinstance(value, dict):
            for inner, inner_value in value.items():
                _note(file, (key, inner), inner_value, found, problems)
        else:
            _note(file, (key,), value, found, problems)
    return {name: given for name, (_, given) in found.items()}


def _note(
    file: TomlFile,
    keys: tuple[str, ...],
    value: object,
    found: dict[str, tuple[tuple[str, ...], Given]],
    problems: Problems,
) -> None:
    name = keys[-1]
    place = file.where(*keys)
    if name == "datasets":
        way_out = "put datasets into a file of their own and name it: dataset_config = 'dataset.toml'"
        problems.add(place, None, "describes a dataset", way_out)
    elif name == "config_file":
        if value != "":
            problems.add(place, value, "a configuration file cannot name another", "put all options into one file")
    elif kind_of(name) is None and value == "":
        # Files that a graphical interface writes hold the options of other model families, empty.
        return
    elif kind_of(name) is None:
        shown = None if isinstance(value, dict | list) else concealed(name, value)
        in_list = len(keys) > 1 and kind_of(keys[0]) == "list"
        listed = f'write a list of texts: {keys[0]} = ["{name}={concealed(name, value)}"]'
        way_out = listed if in_list else nearest(name)
        problems.add(place, shown, "is no option", way_out)
    elif isinstance(value, dict):
        problems.add(place, None, "is a table", f'write a list of texts: {name} = ["name=value"]')
    elif name in found:
        other = file.line(*found[name][0])
        shown = concealed(name, value)
        problems.add(place, shown, f"stands in line {other} too", "remove one of the two; sections are only labels")
    else:
        line = file.line(*keys)
        found[name] = (keys, Given(value, f"{file.path}:{line}" if line else str(file.path)))


def canonical(values: Mapping[str, Given]) -> dict[str, Given]:
    """`values` with other spellings replaced; an empty one says nothing, a filled one replaces, as in sd-scripts."""
    result = dict(values)
    for other, name in SYNONYMS.items():
        if (given := result.pop(other, None)) is not None and not is_unset(options()[name], given.value):
            result[name] = given
    return result
