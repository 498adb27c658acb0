"""The keys of a dataset file against their declarations and against each other.

A wrong key is noted and the rest goes on; a key that changes nothing for any of its subsets gives a warning.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from sd_train.config.textfile import TomlFile, read_json, read_toml
from sd_train.data.keys import (
    NO_EFFECT,
    RENAMED,
    RUN_OPTIONS,
    DatasetFile,
    DatasetTable,
    GeneralTable,
    SubsetTable,
)
from sd_train.data.settings import DatasetConfig, SubsetConfig
from sd_train.errors import ConfigError, Problems

Key = tuple[str | int, ...]


class Source(Protocol):
    """Tables of a dataset, from a file or from folders, that know where each key stands."""

    @property
    def path(self) -> Path:
        """The file; relative folders are looked for beside it too."""

    @property
    def data(self) -> dict[str, Any]:
        """As a dataset file parses."""

    def where(self, *keys: str | int) -> str:
        """The place of a key, for messages."""


_RULES = {
    "int_type": "must be a whole number, without quotes or decimal point",
    "float_type": "must be a number, without quotes",
    "bool_type": "must be true or false, without quotes",
    "string_type": "must be text in quotes",
    "list_type": "must be an array of tables",
    "dict_type": "must be a table",
    "model_type": "must be a table",
    "missing": "is required",
    "finite_number": "must be a finite number",
    "string_too_short": "must not be empty",
    "string_unicode": "holds half a character (a lone surrogate)",
}
_HEADERS = {"datasets": "[[datasets]]", "subsets": "[[datasets.subsets]]", "general": "[general]"}


_LONGEST_VALUE = 120


@dataclass(frozen=True)
class Tables:
    """Where values are looked up: the tables of the file, the innermost first, then the command line."""

    source: Source
    levels: tuple[tuple[Key, BaseModel], ...]
    fallbacks: Mapping[str, object]
    """Values of the command line by the keys' names, without those that are not set."""

    def place(self, name: str) -> Key | None:
        """The innermost table that sets `name`; None if none does."""
        return next((place for place, table in self.levels if _set(table, name)), None)

    def value(self, name: str) -> Any:
        """The innermost value that is set, else the command line's, else the default."""
        for _, table in self.levels:
            if _set(table, name):
                return getattr(table, name)
        return self.fallbacks[name] if name in self.fallbacks else self.default(name)

    def default(self, name: str) -> Any:
        return type(self.levels[0][1]).model_fields[name].get_default(call_default_factory=True)

    def where(self, name: str) -> str:
        """Where that value stands, for messages."""
        place = self.place(name)
        return f"--{RENAMED.get(name, name)}" if place is None else self.source.where(*place, name)

    def values(self) -> dict[str, Any]:
        """The value of every key that the innermost table may hold."""
        return {name: self.value(name) for name in type(self.levels[0][1]).model_fields if name != "subsets"}


def _set(table: BaseModel, name: str) -> bool:
    return name in table.model_fields_set and getattr(table, name) is not None


class Effects:
    """Which of the keys that are set change something for at least one of the tables that they hold for."""

    def __init__(self) -> None:
        self._keys: dict[str, _Effect] = {}

    def note(self, tables: Tables, reasons: Mapping[str, str | None], dataset: int) -> None:
        """Note for keys whose value is not the default why they do nothing here, or None where they do something."""
        for name, reason in reasons.items():
            if (value := tables.value(name)) != tables.default(name):
                where = tables.where(name)
                known = self._keys.setdefault(where, _Effect(name, value, tables.place(name), dataset, reason))
                if reason is None:
                    known.reason = None

    def warnings(self, dataset: int) -> Iterator[str]:
        """Of the keys that were first noted for `dataset`; keys of one table with the same reason share a warning."""
        groups: dict[tuple[object, str], list[tuple[str, _Effect]]] = {}
        for where, effect in self._keys.items():
            if effect.dataset == dataset and effect.reason is not None:
                groups.setdefault((effect.place, effect.reason), []).append((where, effect))
        for (_, reason), members in groups.items():
            where, first = members[0]
            others = "".join(f", {effect.name}" for _, effect in members[1:])
            yield f"{where} = {first.value!r}{others}: {'have' if others else 'has'} no effect: {reason}"


@dataclass
class _Effect:
    name: str
    value: object
    place: Key | None
    dataset: int
    reason: str | None


def check_buckets(
    tables: Tables, dataset: DatasetConfig, multiple: int, wrong_names: Set[str | int], problems: Problems
) -> None:
    """sd-scripts' rules between the sizes, after rounding (`adjust_min_max_bucket_reso_by_steps`).

    Args:
        multiple: of which `bucket_reso_steps` must be one.
        wrong_names: keys that were left out, and of which nothing more is said.
    """
    (width, height), step = dataset.resolution, dataset.bucket_reso_steps
    least, most = tables.value("min_bucket_reso"), tables.value("max_bucket_reso")
    if step % multiple and "bucket_reso_steps" not in wrong_names:
        problems.add(tables.where("bucket_reso_steps"), step, f"must be a multiple of {multiple}",
                     f"write bucket_reso_steps = {multiple}")
    elif dataset.min_bucket_reso < step and not dataset.bucket_no_upscale:
        problems.add(tables.where("min_bucket_reso"), least, f"must be at least bucket_reso_steps ({step})",
                     f"write min_bucket_reso = {step}")
    where, shown = tables.where("resolution"), [width, height]
    if dataset.min_bucket_reso > min(width, height):
        lower = max(min(width, height) // step, 1) * step
        problems.add(where, shown, f"a side is shorter than min_bucket_reso ({least})",
                     f"write min_bucket_reso = {lower} or a larger resolution")
    if dataset.max_bucket_reso < max(width, height):
        problems.add(where, shown, f"a side is longer than max_bucket_reso ({most})",
                     f"write for example max_bucket_reso = {-(-2 * max(width, height) // step) * step}")


def dataset_effects(dataset: DatasetConfig) -> dict[str, str | None]:
    """Why keys about `dataset` do nothing, None where they do something."""
    off = None if dataset.enable_bucket else "enable_bucket is off, every image is cut to resolution"
    free = "bucket_no_upscale is on, buckets have the images' own sizes" if dataset.bucket_no_upscale else None
    return {
        "min_bucket_reso": off or free,
        "max_bucket_reso": off or free,
        "bucket_reso_steps": off,
        "bucket_no_upscale": off,
        "bucket_policy": off if dataset.bucket_policy == "merge" else None,
        "validation_seed": None if dataset.validation_split else "validation_split is 0",
        "network_multiplier": NO_EFFECT["network_multiplier"],
    }


def subset_effects(subset: SubsetConfig, enable_bucket: bool) -> dict[str, str | None]:
    """Why keys about `subset` do nothing, None where they do something."""
    divides = subset.shuffle_caption or subset.caption_tag_dropout_rate > 0 or subset.token_warmup_step > 0
    tuned = "fine-tuning takes its captions from metadata_file" if subset.metadata_file else None
    rows = subset.metadata_file is not None and subset.metadata_file.suffix.lower() != ".json"
    return {
        "keep_tokens": None if divides else "tags stay as they are without shuffle_caption, caption_tag_dropout_rate "
                                            "or token_warmup_step",
        "token_warmup_min": None if subset.token_warmup_step else "token_warmup_step is 0",
        "face_crop_aug_range": "faces are cropped only without enable_bucket, as in sd-scripts" if enable_bucket
                               else None,
        "unmasked_weight": None if subset.masked else "there is neither alpha_mask nor conditioning_data_dir",
        "caption_column": None if rows else "only .jsonl and .parquet metadata has columns",
        "alpha_mask": "the masks of conditioning_data_dir count instead" if subset.conditioning_data_dir else None,
        "caption_extension": tuned,
        "class_tokens": tuned,
        "cache_info": NO_EFFECT["cache_info"],
        "custom_attributes": NO_EFFECT["custom_attributes"],
    }  # fmt: skip


def read_source(path: Path) -> TomlFile:
    """Parse the dataset file `path`.

    Raises:
        ConfigError: for another ending than .toml or .json, wrong syntax, or JSON that is no object.
    """
    extension = path.suffix.lower()
    if extension == ".toml":
        return read_toml(path)
    if extension != ".json":
        raise ConfigError(f"{path}: a dataset file ends in .toml or .json, not {extension!r}; rename or convert it")
    data = read_json(path, "correct it there")
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: the file must hold one object {{...}} with 'datasets'; wrap it")
    return TomlFile(path, data, {})


def validate(source: Source, problems: Problems) -> tuple[DatasetFile, frozenset[Key]]:
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
                key = _key(error, data)
                if key in wrong:
                    continue
                wrong.add(key)
                _note(source, key, error, problems)
                _leave_out(data, key)
            if len(wrong) == known:
                raise ConfigError(f"{source.path}: {found}; correct these keys") from None


def _key(error: ErrorDetails, data: dict[str, Any]) -> Key:
    """The key in the file that an error's location lies in; what follows are pydantic's own steps."""
    location = error["loc"]
    if error["type"] == "string_unicode" and isinstance(_at(data, location), dict):
        # The name of a key itself is no text; pydantic gives the table as its place.
        return (*location, error["input"])
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
        parent[int(key[-1])] = dict[str, Any]()
    else:
        del parent[key[-1]]


def _note(source: Source, key: Key, error: ErrorDetails, problems: Problems) -> None:
    where = source.where(*key)
    kind = error["type"]
    if kind == "extra_forbidden" or (kind == "string_unicode" and key[-1] == error["input"]):
        problems.add(where, _shown(error["input"]), *_unknown(key))
        return
    rule = _rule(error)
    value = None if kind == "missing" else _shown(error["input"])
    name = next(part for part in reversed(key) if isinstance(part, str))
    if name in _HEADERS:
        brackets = f"write {_HEADERS[name]} above its keys"
        problems.add(where, None, rule, brackets + (", in double brackets" if name != "general" else ""))
    else:
        problems.add(where, value, rule, f"write for example {name} = {_example(key)}")


def _shown(value: object) -> object:
    """`value` as a message shows it; None for a table or what is too long to read."""
    if isinstance(value, str) and len(value) > _LONGEST_VALUE:
        return value[:_LONGEST_VALUE] + "..."
    return None if isinstance(value, dict) or len(repr(value)) > 2 * _LONGEST_VALUE else value


def _rule(error: ErrorDetails) -> str:
    context = error.get("ctx", {})
    match error["type"]:
        case "greater_than_equal":
            return f"must be at least {context['ge']}"
        case "less_than_equal":
            return f"must be at most {context['le']}"
        case "greater_than":
            return f"must be above {context['gt']}"
        case "less_than":
            return f"must be below {context['lt']}"
        case "literal_error":
            return f"must be one of {context['expected']}"
        case "value_error":
            return str(context["error"])
        case kind:
            return _RULES.get(kind, error["msg"])


def _level(key: Key) -> tuple[str, type[BaseModel]]:
    """The table that `key` stands in: where that is, and its declaration."""
    if "subsets" in key[:-1]:
        return f"in {_HEADERS['subsets']}", SubsetTable
    if key[0] == "datasets" and len(key) > 1:
        return f"in {_HEADERS['datasets']}", DatasetTable
    if key[0] == "general" and len(key) > 1:
        return f"in {_HEADERS['general']}", GeneralTable
    return "at the top of the file", DatasetFile


def _unknown(key: Key) -> tuple[str, str]:
    """(rule, way out) for a key that is not allowed where it stands."""
    name = str(key[-1])
    here, table = _level(key)
    if name in RUN_OPTIONS:
        return "is an option of the run, not of the dataset", f"give --{name} on the command line or in --config_file"
    if name in _HEADERS:
        return f"is not allowed {here}", f"write {_HEADERS[name]} as a table of its own"
    if name in SubsetTable.model_fields and name not in DatasetTable.model_fields:
        return f"is not allowed {here}", "move it to [[datasets.subsets]]"
    if name in DatasetTable.model_fields:
        return f"is not allowed {here}", "move it to [[datasets]] or [general]"
    written = name.lower().replace("-", "_")
    everywhere = {*table.model_fields, *SubsetTable.model_fields, *DatasetTable.model_fields, *_HEADERS}
    for names in (table.model_fields, sorted(everywhere)):
        if near := difflib.get_close_matches(written, names, n=1):
            return "is an unknown key", f"did you mean {near[0]!r}?"
    return "is an unknown key", "remove it; `sd-train schema dataset` lists the keys"


def _example(key: Key) -> str:
    field = _level(key)[1].model_fields[str(key[-1])]
    value = field.examples[0] if field.examples else field.get_default(call_default_factory=True)
    return json.dumps(value)
