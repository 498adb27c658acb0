"""Captions and tags tidied by rules: the built-in ones, or those of a TOML file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_train.config.textfile import TomlFile, read_toml
from sd_train.errors import ConfigError, Problems
from sd_train.prepare.cleaning_rules import BASES, NOTHING
from sd_train.prepare.patterns import compile_pattern, limited

_MOST_ROUNDS = 50
_BLANKS = re.compile(r"  +")


@dataclass(frozen=True)
class Rules:
    """How captions and tags are cleaned; see `cleaning_rules` for what each part means."""

    captions: tuple[tuple[re.Pattern[str], str], ...]
    """(words, what `re.sub` puts in their place)."""
    underscores: bool
    keep: frozenset[str]
    replace: Mapping[str, str]
    remove: tuple[re.Pattern[str], ...]
    several: tuple[re.Pattern[str], ...]
    ambiguous: tuple[re.Pattern[str], ...]
    general: tuple[re.Pattern[str], ...]
    duplicates: bool


def clean_text(name: str, text: str, rules: Rules) -> str:
    """The "caption" or "tags" in `text`, cleaned line by line; cleaning the result again changes nothing.

    Raises:
        ConfigError: if the rules never come to an end, or a pattern takes too long.
    """
    clean = _clean_tags if name == "tags" else _clean_caption
    with limited(text):
        return "\n".join(_until_settled(clean, line, rules) for line in text.split("\n"))


def _until_settled(clean: Callable[[str, Rules], str], line: str, rules: Rules) -> str:
    longest = len(line) * 8 + 10_000
    for _ in range(_MOST_ROUNDS):
        before, line = line, clean(line, rules)
        if line == before:
            return line
        if len(line) > longest:
            break
    raise ConfigError(
        f"the rules turn {before[:80]!r} into {line[:80]!r} and never come to an end; remove the rule that undoes or "
        "repeats another"
    )


def _clean_caption(line: str, rules: Rules) -> str:
    for pattern, new in rules.captions:
        line = pattern.sub(new, line)
    return _BLANKS.sub(" ", line).strip()


def _clean_tags(line: str, rules: Rules) -> str:
    tags = [tag.strip() for tag in line.split(",")]
    if rules.underscores:
        tags = [tag if tag in rules.keep else tag.replace("_", " ").strip() for tag in tags]
    tags = [rules.replace.get(tag, tag) for tag in tags]
    tags = [tag for tag in tags if tag and not _fits(tag, rules.remove)]
    if any(_fits(tag, rules.several) for tag in tags):
        for pattern in rules.ambiguous:
            kind = [tag for tag in tags if pattern.fullmatch(tag)]
            if len(kind) > 1:
                tags = [tag for tag in tags if tag not in kind]
    if rules.general:
        ends = {tag[place + 1 :] for tag in tags for place, sign in enumerate(tag) if sign == " "}
        tags = [tag for tag in tags if tag not in ends or not _fits(tag, rules.general)]
    if rules.duplicates:
        tags = list(dict.fromkeys(tags))
    return ", ".join(tags)


def _fits(tag: str, patterns: tuple[re.Pattern[str], ...]) -> bool:
    return any(pattern.fullmatch(tag) for pattern in patterns)


def load_rules(path: Path | None) -> Rules:
    """The rules in the TOML file at `path`, or the built-in ones.

    Raises:
        ConfigError: with everything that is wrong in the file.
    """
    problems = Problems()
    file = TomlFile(Path("built-in rules"), {}, {}) if path is None else read_toml(path)
    base = file.data.get("base", "anime")
    if not isinstance(base, str) or base not in BASES:
        known = " or ".join(f'"{name}"' for name in BASES)
        problems.add(file.where("base"), base, "is no set of rules to start from", f"use {known}")
        base = "none"
    for name in file.data:
        if name not in ("base", *NOTHING):
            problems.add(file.where(name), None, "is no part of the rules", "use base, [captions] and [tags]")
    values = {table: dict(_merged(file, table, BASES[base][table], problems)) for table in NOTHING}
    problems.raise_if_any(ConfigError)
    rules = _compiled(file, values, problems)
    problems.raise_if_any(ConfigError)
    return rules


def _merged(
    file: TomlFile, table: str, base: Mapping[str, Any], problems: Problems
) -> Iterator[tuple[str, bool | list[Any]]]:
    """(name, value) of each rule in `table`: the file's, with those of `base` behind."""
    given = file.data.get(table, {})
    if not isinstance(given, dict):
        problems.add(file.where(table), given, "is no table", f"write [{table}]")
        given = {}
    for name in given:
        if name not in base:
            problems.add(file.where(table, name), None, "is no rule", f"use one of {', '.join(base)}")
    for name, default in base.items():
        value = given.get(name, default)
        if isinstance(default, bool):
            if not isinstance(value, bool):
                problems.add(file.where(table, name), value, "is neither true nor false", "write one of them")
            yield name, bool(value)
            continue
        own = given.get(name, [])
        pairs = name == "replace"
        if not isinstance(own, list) or not all(_is_pair(item) if pairs else isinstance(item, str) for item in own):
            shape = 'a list of pairs, [["old", "new"]]' if pairs else 'a list of texts, ["..."]'
            problems.add(file.where(table, name), own, f"is not {shape}", "write it so")
            own = []
        yield name, [*own, *default]


def _is_pair(item: object) -> bool:
    return isinstance(item, list) and len(item) == 2 and all(isinstance(part, str) for part in item) and bool(item[0])


def _compiled(file: TomlFile, values: Mapping[str, Mapping[str, Any]], problems: Problems) -> Rules:
    captions = list[tuple[re.Pattern[str], str]]()
    for old, new in values["captions"]["replace"]:
        pattern = re.compile(rf"(?<!\w){re.escape(old.strip())}(?!\w)", re.IGNORECASE)
        if pattern.search(new):
            place = file.where("captions", "replace")
            problems.add(place, [old, new], "would find its own result again", "leave the old words out of the new")
        # A backslash stands for itself.
        captions.append((pattern, new.strip().replace("\\", r"\\")))
    tags = values["tags"]

    def patterns(name: str) -> tuple[re.Pattern[str], ...]:
        found = [compile_pattern(file.where("tags", name), text, problems) for text in tags[name]]
        return tuple(pattern for pattern in found if pattern is not None)

    return Rules(
        captions=tuple(captions), underscores=tags["underscores"], keep=frozenset(tags["keep"]),
        # The first rule for a tag counts: those of a file stand before the built-in ones.
        replace=dict(reversed([(old.strip(), new.strip()) for old, new in tags["replace"]])),
        remove=patterns("remove"), several=patterns("several"), ambiguous=patterns("ambiguous"),
        general=patterns("general"), duplicates=tags["duplicates"],
    )  # fmt: skip


def as_toml(name: str) -> str:
    """The built-in rules `name` as a file that `load_rules` reads."""
    lines = ['base = "none"']
    for table, values in BASES[name].items():
        lines += ["", f"[{table}]"]
        for key, value in values.items():
            if isinstance(value, list) and value:
                items = ",\n    ".join(json.dumps(item, ensure_ascii=False) for item in value)
                lines.append(f"{key} = [\n    {items},\n]")
            else:
                lines.append(f"{key} = {json.dumps(value)}")
    return "\n".join(lines)
