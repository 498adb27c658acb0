"""The whole examination of a dataset: files, pictures, captions, copies, masks, what a run would show."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from sd_train.data.index import Indexes, IndexOptions, build_indexes
from sd_train.data.settings import DatasetConfig
from sd_train.doctor import kinds
from sd_train.doctor.check_captions import check_captions, check_lengths, prompts_of, tags_of
from sd_train.doctor.check_files import check_files, check_masks, check_shown
from sd_train.doctor.check_images import check_images
from sd_train.doctor.copies import check_copies
from sd_train.doctor.finding import SEVERITIES, Finding, Place, message
from sd_train.doctor.looks import Look, look_at
from sd_train.doctor.survey import Survey, take_survey
from sd_train.errors import ConfigError, DataError
from sd_train.families.text import ChunkTokenizer
from sd_train.families.tokenizer import clip_tokenizer

_NO_EXTENSION = ".no_caption_file_ends_like_this"


@dataclass(frozen=True)
class Statistics:
    """Figures of one subset that are good to know and no findings."""

    images: int
    captions: int
    """Images that have one."""
    tokens: tuple[int, ...]
    """Length of each of these captions, as it is trained."""
    tags: tuple[tuple[str, int], ...]
    """(tag, captions that hold it), the most frequent first."""
    coverage: dict[str, float]
    """By the image's key, the mean of its mask in [0, 1]: mask file, or alpha channel with `alpha_mask`."""


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor found."""

    survey: Survey
    looks: dict[Path, Look]
    findings: tuple[Finding, ...]
    """Worst first."""
    statistics: tuple[Statistics, ...]
    """One for each of `survey.subsets`."""
    indexes: Indexes | None
    """As a run would build it without the broken images; None if it cannot be built."""
    warnings: tuple[str, ...]
    """What a run would warn of, as far as it would come."""
    token_limit: int

    def count(self, severity: str) -> int:
        """Findings of `severity`."""
        return sum(finding.kind.severity == severity for finding in self.findings)


def diagnose(
    datasets: Sequence[DatasetConfig], options: IndexOptions, token_limit: int, progress: Callable[[int, int], object]
) -> Diagnosis:
    """Examine `datasets`: every file is opened and decoded once.

    Args:
        options: as a run would have them.
        token_limit: tokens of a caption that a run reads, 75, 150 or 225.
        progress: called with (files seen, of how many).
    """
    survey = take_survey(datasets)
    looks = _look_at_all(survey.paths(), progress)
    tokenizer = _tokenizer()
    indexes, problems = _indexes(datasets, options)
    findings, statistics = list[Finding](), list[Statistics]()
    for subset in survey.subsets:
        dataset = datasets[subset.place.dataset or 0]
        if subset.problem is not None:
            findings.append(message(kinds.STOPS, subset.place, subset.problem))
        findings += check_images(subset, dataset, looks, options.skip_broken_images)
        findings += check_captions(subset, options.allow_missing_captions)
        findings += check_files(subset, survey, options.skip_broken_images)
        about_masks, coverage = check_masks(subset, looks)
        findings += about_masks
        tags = Counter(tag for item in subset.items for tag in set(tags_of(item, subset.config)))
        if subset.config.alpha_mask:
            alphas = {item.key: looks[item.path].alpha for item in subset.items if not looks[item.path].trouble}
            coverage = {key: 1.0 if alpha is None else alpha[0] for key, alpha in alphas.items()}
        prompts = prompts_of(subset, tokenizer)
        findings += check_lengths(subset, prompts, tokenizer, token_limit)
        tokens, common = tuple(prompt.tokens for prompt in prompts), tuple(tags.most_common())
        statistics.append(Statistics(len(subset.items), len(prompts), tokens, common, coverage))
    findings += check_copies(survey, looks, _validation_paths(indexes))
    findings += check_shown(survey, looks, indexes)
    findings += _other_problems(problems, findings)
    warnings = [text for dataset in datasets for text in dataset.warnings]
    if indexes is not None and not problems:
        warnings += [text for index in indexes.training for text in index.warnings]
    ordered = sorted(findings, key=_order)
    return Diagnosis(
        survey, looks, tuple(ordered), tuple(statistics), indexes, tuple(dict.fromkeys(warnings)), token_limit
    )


@cache
def _tokenizer() -> ChunkTokenizer:
    return ChunkTokenizer(clip_tokenizer())


def unreadable(error: ConfigError, token_limit: int) -> Diagnosis:
    """The diagnosis of a dataset that cannot even be listed, for its configuration is wrong."""
    findings = tuple(message(kinds.CONFIG, Place(), problem) for problem in error.problems)
    return Diagnosis(Survey((), ()), {}, findings, (), None, (), token_limit)


def _look_at_all(paths: Sequence[Path], progress: Callable[[int, int], object]) -> dict[Path, Look]:
    seen = iter(range(1, len(paths) + 1))
    return look_at(paths, lambda: progress(next(seen), len(paths)))


def _indexes(datasets: Sequence[DatasetConfig], options: IndexOptions) -> tuple[Indexes | None, tuple[str, ...]]:
    """The indexes as far as they can be built, and why a run with just `options` would stop.

    What stops a run is taken away step by step: broken images and missing captions, then what is wrong with one
    dataset stops only that one, then its captions and masks are not read at all.
    """
    try:
        return build_indexes(datasets, options), ()
    except DataError as error:
        problems = error.problems
    lenient = replace(options, allow_missing_captions=True, skip_broken_images=True)
    whole = _built(datasets, lenient)
    if whole is not None:
        return whole, problems
    built = [
        _built([dataset], lenient) or _built([_without_texts(dataset)], lenient) for dataset in datasets
    ]
    parts = [part for part in built if part is not None]
    if not parts:
        return None, problems
    training = tuple(index for part in parts for index in part.training)
    return Indexes(training, tuple(index for part in parts for index in part.validation)), problems


def _built(datasets: Sequence[DatasetConfig], options: IndexOptions) -> Indexes | None:
    try:
        return build_indexes(datasets, options)
    except DataError:
        return None


def _without_texts(dataset: DatasetConfig) -> DatasetConfig:
    subsets = tuple(
        replace(subset, caption_extension=_NO_EXTENSION, conditioning_data_dir=None) for subset in dataset.subsets
    )
    return replace(dataset, subsets=subsets)


def _validation_paths(indexes: Indexes | None) -> frozenset[Path]:
    if indexes is None:
        return frozenset()
    return frozenset(index.path(row) for index in indexes.validation for row in range(len(index)))


def _other_problems(problems: Sequence[str], findings: Sequence[Finding]) -> list[Finding]:
    """What stops a run and is not among `findings`, going by the subset or the file that the message begins with."""
    known = {finding.place for finding in findings if finding.kind.severity == "error"}
    known |= {os.fspath(sight.path) for finding in findings if finding.kind.severity == "error"
              for sight in finding.sights}
    return [
        message(kinds.STOPS, Place(), problem) for problem in problems
        if not any(place and problem.startswith(place) for place in known)
    ]


def _order(finding: Finding) -> tuple[int, int, int, int]:
    names = list(kinds.KINDS)
    return (
        SEVERITIES.index(finding.kind.severity), names.index(finding.kind.name),
        -1 if finding.dataset is None else finding.dataset, -1 if finding.subset is None else finding.subset,
    )
