"""From a tagger's probabilities to the text of one image: thresholds, spelling, replacement and order of tags."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from sd_train.errors import Problems

Category = Literal["rating", "quality", "general", "character", "copyright", "artist", "meta", "model"]
CHOSEN: tuple[Category, ...] = ("general", "character", "copyright", "artist", "meta", "model")
"""Categories whose tags each pass a threshold, in the order of the text; of the others the likeliest one counts."""

_FACES = frozenset({"(o)_(o)", "<o>_<o>", "<|>_<|>", "||_||"})
"""Emoticons of more than three characters, whose underscore is no blank."""
_SERIES = re.compile(r"(.+?)_?\(([^()]*)\)")


@dataclass(frozen=True)
class Label:
    """What one of the tagger's outputs stands for."""

    name: str
    category: Category


@dataclass(frozen=True)
class TagOptions:
    """How tags are chosen and written."""

    thresholds: dict[Category, float]
    """Of each of `CHOSEN`; a tag at its threshold is taken."""
    separator: str = ", "
    remove_underscore: bool = False
    undesired: frozenset[str] = frozenset()
    first: tuple[str, ...] = ()
    replacement: dict[str, str] = field(default_factory=dict)
    expand_characters: bool = False
    characters_first: bool = False
    rating: Literal["first", "last"] | None = None
    quality: Literal["first", "last"] | None = None


@dataclass(frozen=True)
class Chosen:
    """The tags of one image."""

    tags: list[str]
    """In the order of the text, each once."""
    by_category: dict[Category, list[tuple[str, float]]]
    """(tag, probability) of those that were found."""


def split_list(text: str | None, separator: str) -> tuple[str, ...]:
    """The tags in `text`, a list as it is given to an option."""
    parts = (text or "").split(separator.strip() or separator)
    return tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))


def read_replacement(text: str | None, problems: Problems) -> dict[str, str]:
    r"""`"a,b;c,d"` as {a: b, c: d}; `\,` and `\;` stand for themselves."""
    found = dict[str, str]()
    for pair in re.split(r"(?<!\\);", text or ""):
        if not pair.strip():
            continue
        parts = [re.sub(r"\\([,;])", r"\1", part).strip() for part in re.split(r"(?<!\\),", pair)]
        if len(parts) != 2 or not parts[0]:
            problems.add("--tag_replacement", pair, "is no replacement",
                         r'write "old,new;old,new", and \, or \; where a tag holds them')  # fmt: skip
            continue
        found[parts[0]] = parts[1]
    return found


class Speller:
    """Turns the model's tags into those of the text, as `options` say: once for all images."""

    def __init__(self, labels: Sequence[Label], options: TagOptions) -> None:
        self._options = options
        self._labels = labels
        self._undesired = {_plain(tag) for tag in options.undesired}
        self._replacement = {_plain(old): new for old, new in options.replacement.items()}
        self._first = {_plain(tag): place for place, tag in enumerate(options.first)}
        self._words = [self._spell(label) for label in labels]
        self._places = {
            category: np.array([n for n, label in enumerate(labels) if label.category == category], dtype=np.int64)
            for category in (*CHOSEN, "rating", "quality")
        }

    def choose(self, probabilities: NDArray[np.float32]) -> Chosen:
        """The tags of an image with `probabilities`, one for each label."""
        found: dict[Category, list[tuple[str, float]]] = {}
        for category in CHOSEN:
            places = self._places[category]
            above = places[probabilities[places] >= np.float32(self._options.thresholds[category])]
            found[category] = self._named(above, probabilities)
        for category, wanted in (("rating", self._options.rating), ("quality", self._options.quality)):
            places = self._places[category]
            if wanted is not None and places.size:
                likeliest = places[[int(np.argmax(probabilities[places]))]]
                found[category] = self._named(likeliest, probabilities)
        return Chosen(self._ordered(found), found)

    def append(self, existing: str, tags: Sequence[str]) -> str:
        """`existing`, the text of a file, with those of `tags` behind each of its lines that this lacks."""
        return "\n".join(self._with(line, tags) for line in existing.strip("\n").split("\n"))

    def _with(self, line: str, tags: Sequence[str]) -> str:
        before = list(split_list(line, self._options.separator))
        known = {_plain(tag) for tag in before}
        return self._options.separator.join([*before, *(tag for tag in tags if _plain(tag) not in known)])

    def _named(self, places: NDArray[np.int64], probabilities: NDArray[np.float32]) -> list[tuple[str, float]]:
        return [(word, float(probabilities[n])) for n in places.tolist() for word in self._words[n]]

    def _ordered(self, found: dict[Category, list[tuple[str, float]]]) -> list[str]:
        order = list(CHOSEN)
        if self._options.characters_first:
            order.remove("character")
            order.insert(0, "character")
        single: list[tuple[Category, Literal["first", "last"] | None]] = [
            ("quality", self._options.quality), ("rating", self._options.rating),
        ]  # fmt: skip
        for category, place in single:
            if place is not None:
                order.insert(0 if place == "first" else len(order), category)
        tags = list(dict.fromkeys(word for category in order for word, _ in found.get(category, ())))
        last = len(self._first)
        return sorted(tags, key=lambda tag: self._first.get(_plain(tag), last))

    def _spell(self, label: Label) -> list[str]:
        names = [label.name]
        series = _SERIES.fullmatch(label.name) if label.category == "character" else None
        if self._options.expand_characters and series is not None:
            names = [series[1], series[2]]
        words = list[str]()
        for name in names:
            word = without_underscore(name) if self._options.remove_underscore else name
            word = self._replacement.get(_plain(word), word)
            if word and _plain(word) not in self._undesired:
                words.append(word)
        return words


def without_underscore(tag: str) -> str:
    """`tag` with blanks for its underscores, unless it is an emoticon such as `^_^`."""
    return tag if len(tag) <= 3 or tag in _FACES else tag.replace("_", " ")


def _plain(tag: str) -> str:
    """What is compared: users write tags with blanks or underscores, whatever the model does."""
    return tag.strip().replace("_", " ")
