"""Findings: what was noticed, how bad it is, which images it is about and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Severity = Literal["error", "warning", "note"]
"""error: the run would stop, or learn what is not meant; warning: probably not meant; note: good to know."""

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Kind:
    """One kind of finding. `explanation` and `fix` may hold {names} that a finding fills in."""

    name: str
    severity: Severity
    title: str
    explanation: str
    fix: str


@dataclass(frozen=True)
class Sight:
    """One file that a finding is about."""

    path: Path
    note: str = ""
    group: int = 0
    """Files of one group belong together, for example copies of one picture."""


@dataclass(frozen=True)
class Finding:
    """Something noticed, with all its files."""

    kind: Kind
    place: str
    """Where the subset or dataset is declared; "" for what concerns all."""
    dataset: int | None
    subset: int | None
    sights: tuple[Sight, ...]
    explanation: str
    fix: str


@dataclass(frozen=True)
class Place:
    """What a finding is about: a subset, a dataset (`subset` None), or everything (both None)."""

    origin: str = ""
    dataset: int | None = None
    subset: int | None = None


def found(kind: Kind, place: Place, sights: Iterable[Sight], **values: object) -> list[Finding]:
    """The finding of `kind` with its texts filled in from `values`; none if there is no sight."""
    seen = tuple(sights)
    if not seen:
        return []
    explanation, fix = kind.explanation.format(**values), kind.fix.format(**values)
    return [Finding(kind, place.origin, place.dataset, place.subset, seen, explanation, fix)]


def message(kind: Kind, place: Place, problem: str) -> Finding:
    """A finding that is about no single file and says what a run would say."""
    explanation = kind.explanation.format(problem=problem)
    return Finding(kind, place.origin, place.dataset, place.subset, (), explanation, kind.fix)
