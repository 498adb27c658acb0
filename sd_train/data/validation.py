"""The keys of a dataset file against their declarations: every wrong one is noted, the rest goes on."""

from __future__ import annotations

import copy
import difflib
import json
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from sd_train.config.textfile import TomlFile
from sd_train.data.keys import NOT_SUPPORTED, RUN_OPTIONS, DatasetFile, DatasetTable, GeneralTable, SubsetTable
from sd_train.errors import ConfigError, Problems

Key = tuple[str | int, ...]

_RULES = {
    "int_type": "must be a whole number, without quotes or decimal point",
    "float_type": "must be a number, without quotes",
    "bool_type": "must be true or false, without quotes",
    "string_type": "must be text in quotes",
    "list_type": "must be an array of tables",
    "dict_type": "must be a table",
    "model_type": "must be a table",
    "tuple_type": "must be a list of numbers",
    "missing": "is required",
    "finite_number": "must be a finite number",
    "string_too_short": "must not be empty",
    "string_unicode": "holds half a character (a lone surrogate)",
}
_HEADERS = {"datasets": "[[datasets]]", "subsets": "[[datasets.subsets]]", "general": "[general]"}


def validate(source: TomlFile, problems: Problems) -> tuple[DatasetFile, frozenset[Key]]:
    """Check types, ranges and names; note the problems and leave wrong keys out, so that the rest can be checked.

    Returns the file without the wrong keys, and where those stood.
    """
    data = copy.deepcopy(source.data)
    wrong: set[Key] = set()
    while True:
        try:
            return DatasetFile.model_validate(data), frozenset(wrong)
        except ValidationError as found:
            known = len(wrong)
            for error in found.errors():
                key = _key(error["loc"], data)
                if key in wrong:
                    continue
                wrong.add(key)
                if not _needs_no_folder(key, data):
                    _note(source, key, error, problems)
                _leave_out(data, key)
            if len(wrong) == known:
                raise ConfigError(f"{source.path}: {found}; correct these keys") from None


def _needs_no_folder(key: Key, data: dict[str, Any]) -> bool:
    """A fine-tuning subset without `image_dir` is refused for its style, not for the missing key."""
    return key[-1] == "image_dir" and bool(_at(data, key[:-1]).get("metadata_file"))


def _key(location: Key, data: dict[str, Any]) -> Key:
    """The key in the file that an error's location lies in; what follows are pydantic's own steps."""
    for length in range(1, len(location) + 1):
        part = _at(data, location[: length - 1])
        inside = isinstance(part, dict) if isinstance(location[length - 1], str) else isinstance(part, list)
        if not inside:
            return location[: length - 1]
        if location[length - 1] not in _HEADERS and isinstance(location[length - 1], str):
            return location[:length]
    return location


def _at(data: dict[str, Any], key: Key) -> Any:
    part: Any = data
    for step in key:
        part = part[step]
    return part


def _leave_out(data: dict[str, Any], key: Key) -> None:
    parent = _at(data, key[:-1])
    if isinstance(parent, list):
        parent[int(key[-1])] = dict[str, Any]() if len(key) == 2 else {"image_dir": " "}
    elif key[-1] == "image_dir" and "subsets" in key:
        parent["image_dir"] = " "
    else:
        del parent[key[-1]]


def _note(source: TomlFile, key: Key, error: ErrorDetails, problems: Problems) -> None:
    where = source.where(*key)
    kind = error["type"]
    if kind == "extra_forbidden":
        problems.add(where, error["input"], *_unknown(key))
        return
    context = error.get("ctx", {})
    if kind in ("greater_than_equal", "less_than_equal"):
        bound = f"at least {context['ge']}" if kind == "greater_than_equal" else f"at most {context['le']}"
        rule = f"must be {bound}"
    elif kind == "value_error":
        rule = str(context["error"])
    else:
        rule = _RULES.get(kind, error["msg"])
    value = None if kind == "missing" or isinstance(error["input"], dict) else error["input"]
    name = next(part for part in reversed(key) if isinstance(part, str))
    if name in _HEADERS:
        brackets = f"write {_HEADERS[name]} above its keys"
        problems.add(where, None, rule, brackets + (", in double brackets" if name != "general" else ""))
    else:
        problems.add(where, value, rule, NOT_SUPPORTED.get(name, f"write for example {name} = {_example(key)}"))


def _level(key: Key) -> tuple[str, type[BaseModel]]:
    """The table that `key` stands in: its header and its declaration."""
    if "subsets" in key[:-1]:
        return _HEADERS["subsets"], SubsetTable
    if key[0] == "datasets" and len(key) > 1:
        return _HEADERS["datasets"], DatasetTable
    if key[0] == "general" and len(key) > 1:
        return _HEADERS["general"], GeneralTable
    return "the top of the file", DatasetFile


def _unknown(key: Key) -> tuple[str, str]:
    """(rule, way out) for a key that is not allowed where it stands."""
    name = str(key[-1])
    here, table = _level(key)
    if name in RUN_OPTIONS:
        return "is an option of the run, not of the dataset", f"give --{name} on the command line or in --config_file"
    if name in SubsetTable.model_fields and name not in DatasetTable.model_fields:
        return f"is not allowed in {here}", "move it to [[datasets.subsets]]"
    if name in DatasetTable.model_fields and name != "subsets":
        return f"is not allowed in {here}", "move it to [[datasets]] or [general]"
    written = name.lower().replace("-", "_")
    everywhere = {*table.model_fields, *SubsetTable.model_fields, *DatasetTable.model_fields, *DatasetFile.model_fields}
    for names in (table.model_fields, sorted(everywhere)):
        if near := difflib.get_close_matches(written, names, n=1):
            return "is an unknown key", f"did you mean {near[0]!r}?"
    return "is an unknown key", "remove it; `sd-train schema dataset` lists the keys"


def _example(key: Key) -> str:
    field = _level(key)[1].model_fields[str(key[-1])]
    value = field.examples[0] if field.examples else field.get_default(call_default_factory=True)
    return json.dumps(value)
