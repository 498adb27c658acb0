"""Copies of pictures: exact ones by content, near ones by perceptual hash and a closer look."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sd_train.doctor import kinds
from sd_train.doctor.finding import Finding, Kind, Place, Sight, found
from sd_train.doctor.looks import SMALL, Look
from sd_train.doctor.survey import Item, SubsetSurvey, Survey

MOST_BITS = 12
"""Bits of 64 that near copies may differ in; unrelated pictures differ in 32 +- 4."""
LEAST_CORRELATION = 0.94
"""Of the small pictures of near copies, after their mean and contrast are made equal."""
_LEAST_CONTRAST = 4.0
"""Pictures flatter than this have no features to compare."""
_BLOCK = 256
"""Pictures that are compared with all others at a time."""


@dataclass(frozen=True)
class Pair:
    """Two pictures that look alike."""

    first: Path
    second: Path
    mirrored: bool


@dataclass(frozen=True)
class _Member:
    subset: SubsetSurvey
    item: Item


def check_copies(survey: Survey, looks: Mapping[Path, Look], validation: frozenset[Path]) -> Iterator[Finding]:
    """Exact and near copies over all subsets; `validation` holds the pictures that are kept for validation."""
    members: dict[Path, list[_Member]] = defaultdict(list)
    for subset in survey.subsets:
        for item in subset.items:
            if not looks[item.path].trouble:
                members[item.path].append(_Member(subset, item))
    real = _one_path_a_file(members)
    by_content: dict[bytes, list[Path]] = defaultdict(list)
    for path in real:
        by_content[looks[path].digest].append(path)
    exact = [paths for paths in by_content.values() if len(paths) > 1]
    yield from _report(exact, {}, members, validation, exact=True)
    yield from _captions(exact, members)
    pairs = near_copies({paths[0]: looks[paths[0]] for paths in by_content.values()})
    notes = {pair.second: "mirrored" if pair.mirrored else "" for pair in pairs}
    yield from _report(_groups(pairs), notes, members, validation, exact=False)


def _one_path_a_file(paths: Mapping[Path, object]) -> list[Path]:
    """The same file in two datasets, or linked from two folders with one name, is no copy."""
    return list({path.resolve(): path for path in reversed(list(paths))}.values())[::-1]


def near_copies(looks: Mapping[Path, Look]) -> list[Pair]:
    """The pairs among `looks` (of different content) that show the same picture.

    Candidates differ in at most `MOST_BITS` bits of their hashes; they are copies if their small colour pictures
    correlate by `LEAST_CORRELATION`, mirrored or not.
    """
    paths = [path for path, look in looks.items() if look.contrast >= _LEAST_CONTRAST]
    if len(paths) < 2:
        return []
    hashes = np.stack([_hashes(looks[path]) for path in paths]).astype(np.float32) * 2 - 1
    plain, mirrored = hashes[:, 0], hashes[:, 1]
    pairs = []
    for start in range(0, len(paths), _BLOCK):
        for other, turned in ((plain, False), (mirrored, True)):
            # Two rows of signs differ in (64 - their product) / 2 places.
            distance = (64 - plain[start : start + _BLOCK] @ other[start:].T) / 2
            rows, columns = np.nonzero(distance <= MOST_BITS)
            for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
                first, second = paths[start + row], paths[start + column]
                if column > row and _alike(looks[first], looks[second], turned):
                    pairs.append(Pair(first, second, turned))
    return pairs


def _hashes(look: Look) -> NDArray[np.bool_]:
    return np.zeros((2, 64), np.bool_) if look.hashes is None else look.hashes


def _alike(first: Look, second: Look, mirrored: bool) -> bool:
    if first.small is None or second.small is None:
        return False
    one, other = first.small.astype(np.float32), second.small.astype(np.float32)
    if mirrored:
        other = other[:, ::-1]
    return _correlation(one.reshape(SMALL * SMALL, 3), other.reshape(SMALL * SMALL, 3)) >= LEAST_CORRELATION


def _correlation(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Of all three colours together, each with its own mean taken off."""
    one, other = one - one.mean(axis=0), other - other.mean(axis=0)
    scale = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float((one * other).sum()) / scale if scale else 0.0


def _groups(pairs: Sequence[Pair]) -> list[list[Path]]:
    """Pictures that are connected by pairs, in order."""
    leader: dict[Path, Path] = {}

    def lead(path: Path) -> Path:
        while leader.setdefault(path, path) != path:
            path = leader[path]
        return path

    for pair in pairs:
        leader[lead(pair.second)] = lead(pair.first)
    groups: dict[Path, list[Path]] = defaultdict(list)
    for path in leader:
        groups[lead(path)].append(path)
    return list(groups.values())


def _report(
    groups: Sequence[Sequence[Path]],
    notes: Mapping[Path, str],
    members: Mapping[Path, Sequence[_Member]],
    validation: frozenset[Path],
    exact: bool,
) -> Iterator[Finding]:
    """One finding for each kind and set of subsets, with the groups that belong to it."""
    sights: dict[tuple[str, Place], list[Sight]] = defaultdict(list)
    for number, group in enumerate(groups, start=1):
        kind = _kind(group, members, validation, exact)
        subsets = {member.subset.place: member.subset for path in group for member in members[path]}
        several = len({path.parent for path in group}) > 1
        for path in group:
            subset = members[path][0].subset
            role = "regularisation" if subset.config.is_reg else "validation" if path in validation else ""
            words = [notes.get(path, ""), role, f"in {path.parent.name}" if several else ""]
            note = ", ".join(word for word in words if word)
            sights[kind.name, _common(list(subsets))].append(Sight(path, note, number))
    for (name, place), seen in sights.items():
        yield from found(kinds.KINDS[name], place, seen)


def _kind(
    group: Sequence[Path], members: Mapping[Path, Sequence[_Member]], validation: frozenset[Path], exact: bool
) -> Kind:
    roles = {member.subset.config.is_reg for path in group for member in members[path]}
    if len(roles) == 2:
        return kinds.COPY_REG if exact else kinds.NEAR_REG
    if not exact and 0 < sum(path in validation for path in group) < len(group):
        return kinds.NEAR_VALIDATION
    return kinds.COPY if exact else kinds.NEAR


def _common(places: Sequence[Place]) -> Place:
    """The subset, or else the dataset, that all `places` share."""
    if len(places) == 1:
        return places[0]
    datasets = {place.dataset for place in places}
    return Place("", datasets.pop()) if len(datasets) == 1 else Place()


def _captions(exact: Sequence[Sequence[Path]], members: Mapping[Path, Sequence[_Member]]) -> Iterator[Finding]:
    sights = []
    places: set[Place] = set()
    for number, group in enumerate(exact, start=1):
        shown = [member for path in group for member in members[path]
                 if member.item.caption is not None and not member.subset.config.is_reg]
        if len({member.item.caption for member in shown}) > 1:
            sights += [Sight(member.item.path, member.item.caption or "(empty)", number) for member in shown]
            places.update(member.subset.place for member in shown)
    yield from found(kinds.CAPTIONS_DIFFER, _common(list(places)), sights)
