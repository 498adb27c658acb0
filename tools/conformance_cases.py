"""What the parts of `tools/conformance.py` share: cases, intended differences, golden files."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_train.data.config import DatasetRequest, load_datasets
from sd_train.data.settings import DatasetConfig
from sd_train.errors import UserError

REFUSED = "refused"
"""The answer of whoever does not accept something, whatever the words."""


@dataclass(frozen=True)
class Case:
    """One question and both answers, as JSON values."""

    name: str
    """`GROUP: MEMBER`, or without group."""
    theirs: Any
    ours: Any
    said: str = ""
    """The message of our refusal."""

    @property
    def agrees(self) -> bool:
        return bool(self.theirs == self.ours)

    def __str__(self) -> str:
        theirs, ours = self.theirs, self.ours
        if isinstance(theirs, dict) and isinstance(ours, dict):
            names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
            theirs, ours = ({name: value.get(name) for name in names} for value in (theirs, ours))
        message = f"; {self.said}" if self.said else ""
        return f"{self.name}\n    sd-scripts: {theirs}\n    here:       {ours}{message}"


@dataclass(frozen=True)
class Intended:
    """A difference that is meant."""

    reason: str
    covers: Callable[[Case], bool]
    """Whether it explains a case that differs; it looks at our answer too, so that no other one passes."""


@dataclass(frozen=True)
class Part:
    """The cases of one kind in a golden file."""

    name: str
    cases: Sequence[Case]
    intended: Sequence[Intended] = ()

    def reason(self, case: Case) -> str | None:
        """Why `case` differs; None if that is not known."""
        return next((known.reason for known in self.intended if known.covers(case)), None)

    @property
    def differing(self) -> list[Case]:
        return [case for case in self.cases if not case.agrees]

    @property
    def unexplained(self) -> list[Case]:
        return [case for case in self.differing if self.reason(case) is None]


def refusals(reason: str, words: dict[str, str]) -> Intended:
    """Cases, by name, that are refused here with a message that holds the words."""
    return Intended(reason, lambda case: case.ours == REFUSED and words.get(case.name, "\0") in case.said)


def read_golden(folder: Path, name: str) -> dict[str, Any]:
    """The golden file `name`.json of `folder`, or its compressed copy."""
    plain = folder / f"{name}.json"
    data = plain.read_bytes() if plain.is_file() else gzip.decompress((folder / f"{name}.json.gz").read_bytes())
    golden: dict[str, Any] = json.loads(data)
    return golden


def toml_lines(values: dict[str, Any]) -> Iterator[str]:
    """`values` as TOML, without those that are None; numbers, texts, lists and booleans are spelt as in JSON."""
    return (f"{name} = {json.dumps(value)}\n" for name, value in values.items() if value is not None)


def dataset_text(dataset: dict[str, Any], *subsets: dict[str, Any]) -> str:
    """A dataset file with one dataset."""
    tables = [f"[[datasets.subsets]]\n{''.join(toml_lines(subset))}" for subset in subsets]
    return f"[[datasets]]\n{''.join(toml_lines(dataset))}{''.join(tables)}"


def read_dataset(place: Path, dataset: dict[str, Any], *subsets: dict[str, Any]) -> DatasetConfig:
    """The dataset of these settings, as a run reads it; its file is written into `place`."""
    path = place / "dataset.toml"
    path.write_text(dataset_text(dataset, *subsets), encoding="utf-8")
    (config,) = load_datasets(DatasetRequest("train_network", path, fallbacks={"batch_size": 1}, step_multiple=8))
    return config


def answer(ask: Callable[[], Any]) -> tuple[Any, str]:
    """(what `ask` gives, ""), or (`REFUSED`, the message)."""
    try:
        return ask(), ""
    except UserError as problem:
        return REFUSED, str(problem)
