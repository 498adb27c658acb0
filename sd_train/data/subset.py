"""One subset's files: its images in order, each with its caption, size and mask, and what to say where they fail."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from sd_train.data.captions import caption_of
from sd_train.data.columns import TextColumn
from sd_train.data.folders import list_folder, no_images
from sd_train.data.headers import read_size
from sd_train.data.index_file import KeptIndexes
from sd_train.data.metadata_files import Latents, Resolved, metadata_root, read_metadata, resolve
from sd_train.data.npz import original_size
from sd_train.data.parquet import is_parquet, read_parquet
from sd_train.data.scan import CAPTION_NONE, CAPTION_READ, FolderScan, scan_files, scan_folder
from sd_train.data.settings import DatasetConfig, SubsetConfig
from sd_train.errors import DataError, Problems

_SHOWN = 5


@dataclass(frozen=True)
class IndexOptions:
    """What a run says of all datasets. The defaults are the command line's."""

    allow_missing_captions: bool = False
    prior_loss_weight: float = 1.0
    seed: int = 0
    verify_images: bool = False
    """Decode every image, not only its header."""
    skip_broken_images: bool = False
    """Leave broken images out by name; implies `verify_images`, so that none breaks in mid-run."""
    cache_dir: Path | None = None
    """Where digests of contents and indexes of large folders are kept; None: nowhere."""
    trust_index: bool = False
    """Use a kept index without looking whether its files have changed."""
    caches_latents: bool = False
    """Whether images are encoded once, so that sd-scripts' latents may stand for those that are not on disk."""
    latents_suffix: str = "_sd"
    """End of the names of sd-scripts' latents files, before `.npz`."""


@dataclass(frozen=True)
class SubsetFiles:
    """The N images of a subset, in order."""

    subset: SubsetConfig
    root: Path
    """Where `keys` start."""
    keys: TextColumn
    captions: TextColumn
    sizes: NDArray[np.int32]
    """[N, 2]: (width, height) upright; (0, 0) for a broken image."""
    stats: NDArray[np.int64]
    """[N, 2]: file size, time of the last change in nanoseconds."""
    masks: TextColumn | None = None
    latents_only: bool = False
    """Whether some of the files are sd-scripts' latents, in place of images that are not on disk."""
    broken: Mapping[int, str] = field(default_factory=lambda: MappingProxyType({}))
    """What is wrong with images that cannot be read, by row."""

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def name(self) -> str:
        """What its captions are counted under: the folder's or, as in sd-scripts, the metadata file's name."""
        return (self.subset.metadata_file or self.subset.image_dir).resolve().name

    def path(self, row: int) -> Path:
        return self.root / self.keys[row]

    def where(self, chosen: NDArray[np.bool_]) -> SubsetFiles:
        """The images that are `chosen` [N]; unless all are, none counts as broken any more."""
        if chosen.all():
            return self
        rows = np.flatnonzero(chosen)
        return replace(
            self,
            keys=self.keys.take(rows),
            captions=self.captions.take(rows),
            sizes=self.sizes[rows],
            stats=self.stats[rows],
            masks=None if self.masks is None else self.masks.take(rows),
            broken=MappingProxyType({}),
        )


def first_names(names: Sequence[str], separator: str = ", ", count: int | None = None) -> str:
    """The first five of `names` and the number of the others (`count`: of all, where `names` holds only some)."""
    others = (count or len(names)) - _SHOWN
    more = f"{separator}and {others} more" if others > 0 else ""
    lead = separator if separator.startswith("\n") else ""
    return lead + separator.join(names[:_SHOWN]) + more


Verify = Callable[[SubsetFiles], Mapping[int, str]]
"""What is wrong with images that were not known to be broken, by row."""


class SubsetReader:
    """Reads the subsets of `datasets`; a folder that stands in several of them is scanned once."""

    def __init__(
        self, datasets: Sequence[DatasetConfig], options: IndexOptions, verify: Verify | None = None
    ) -> None:
        """`verify` decodes the images that it is given, for what a header does not tell; None: nothing is decoded."""
        self.options = options
        self._verify = verify
        self._uses = Counter(_place(subset) for dataset in datasets for subset in dataset.subsets)
        self._keep = None if options.cache_dir is None else KeptIndexes(options.cache_dir, options.trust_index)
        self._scans: dict[tuple[str, ...], FolderScan] = {}

    def read(self, subset: SubsetConfig, problems: Problems, warnings: list[str]) -> SubsetFiles:
        """The images of `subset` with captions and sizes; what fails is noted, with "" or (0, 0) in its place.

        An image without caption gets `class_tokens`; if there are none, or a caption file of another extension
        stands beside it, that is a problem, or with `allow_missing_captions` a warning.
        """
        try:
            if subset.metadata_file is None:
                files = self._folder(subset, problems, warnings)
            elif is_parquet(subset.metadata_file):
                files = self._parquet(subset, problems, warnings)
            else:
                files = self._metadata(subset, problems, warnings)
        except DataError as problem:
            # A file that cannot be read at all: the message names it and the way out.
            for text in problem.problems:
                rule, _, way_out = text.rpartition("; ")
                problems.add(subset.origin, None, rule or text, way_out)
            files = _nothing(subset)
        except OSError as problem:
            path = problem.filename if isinstance(problem.filename, str) else str(subset.image_dir)
            problems.add(subset.origin, path, f"the folder cannot be read ({problem.strerror})",
                         "check image_dir and its permissions")
            files = _nothing(subset)
        return files if subset.conditioning_data_dir is None else _with_masks(files, problems, warnings)

    def _folder(self, subset: SubsetConfig, problems: Problems, warnings: list[str]) -> SubsetFiles:
        place = _place(subset)
        scan = self._scans.pop(place, None) or scan_folder(subset.image_dir, subset.caption_extension, self._keep)
        self._uses[place] -= 1
        if self._uses[place] > 0:
            self._scans[place] = scan
        if not len(scan.images):
            problems.extend([no_images(subset.origin, subset.image_dir)])
            return _nothing(subset)
        files = self._verified(SubsetFiles(
            subset, subset.image_dir, scan.images, _captions(subset, scan), scan.sizes, scan.stats,
            broken=scan.image_problems,
        ))  # fmt: skip
        failed = self._wanted(np.array(sorted(scan.caption_problems), np.int64), files).tolist()
        if failed:
            problems.add(subset.origin, None, f"{len(failed)} caption files cannot be used: "
                         + first_names([scan.caption_problems[row] for row in failed], "\n      "), "mend them")
        missing = self._wanted(np.flatnonzero(scan.states == CAPTION_NONE), files)
        if len(missing) and not subset.templates:
            others = {name: len(self._wanted(np.array(rows), files)) for name, rows in scan.other_captions.items()}
            self._note_missing(files, missing, others, problems, warnings)
        return files

    def _metadata(self, subset: SubsetConfig, problems: Problems, warnings: list[str]) -> SubsetFiles:
        assert subset.metadata_file is not None
        entries = read_metadata(subset, problems)
        root = metadata_root(subset)
        found = resolve(
            entries.keys, subset, root, problems, Latents(self.options.latents_suffix, self.options.caches_latents)
        )
        there, alone = np.ones(len(found.keys), bool), np.zeros(len(found.keys), bool)
        there[list(found.missing)] = False
        alone[found.latents] = True
        missing, kept = found.missing, np.arange(len(there))
        if missing and not self.options.skip_broken_images:
            self._note_absent(subset, found, root, problems)
            missing, kept = {}, np.flatnonzero(there)
        keys, rows, there, alone = found.keys.take(kept), found.rows[kept], there[kept], (alone & there)[kept]
        scan = scan_files(_paths(root, keys, there & ~alone), self._keep)
        sizes, stats = np.zeros((len(keys), 2), np.int32), np.zeros((len(keys), 2), np.int64)
        sizes[there & ~alone], stats[there & ~alone] = scan.sizes, scan.stats
        broken = {int(row): scan.problems[place] for place, row in enumerate(np.flatnonzero(there & ~alone))
                  if place in scan.problems} | dict(missing)
        for row in np.flatnonzero(alone).tolist():
            try:
                sizes[row], stats[row] = original_size(root / keys[row]), _stat(root / keys[row])
            except DataError as problem:
                broken[row] = str(problem)
        files = self._verified(SubsetFiles(
            subset, root, keys, entries.captions.take(rows), sizes, stats, latents_only=bool(alone.any()), broken=broken
        ))  # fmt: skip
        _compare_sizes(files, entries.sizes[rows], warnings)
        self._note_undescribed(files, ~entries.described[rows], problems, warnings)
        return files

    def _note_absent(self, subset: SubsetConfig, found: Resolved, root: Path, problems: Problems) -> None:
        names = [found.keys[row] for row in sorted(found.missing)]
        rule = f"{len(names)} of its {len(found.keys)} images are not on disk (looked for in {root}): "
        way_out = "correct image_dir or the keys, or give --skip_broken_images to train without them"
        if count := len(found.latents):
            way_out = (f"{count} of them have sd-scripts' latents (.npz) there: give --cache_latents or "
                       f"--cache_latents_to_disk to train from these; or {way_out}")
        problems.add(subset.origin, str(subset.metadata_file), rule + first_names(names), way_out)

    def _verified(self, files: SubsetFiles) -> SubsetFiles:
        """`files` with what `verify` finds to be broken too."""
        if self._verify is None:
            return files
        return replace(files, broken={**files.broken, **self._verify(files)})

    def _parquet(self, subset: SubsetConfig, problems: Problems, warnings: list[str]) -> SubsetFiles:
        table = read_parquet(subset, read_size, self._keep, warnings)
        if not len(table.keys):
            problems.add(subset.origin, str(subset.metadata_file), "holds no image", "add rows or leave the subset out")
        files = self._verified(SubsetFiles(
            subset, metadata_root(subset), table.keys, table.captions, table.sizes, table.stats, broken=table.broken
        ))  # fmt: skip
        self._note_undescribed(files, ~table.described, problems, warnings)
        return files

    def _wanted(self, rows: NDArray[np.int64], files: SubsetFiles) -> NDArray[np.int64]:
        """`rows` without those of broken images, where these are left out."""
        if not self.options.skip_broken_images or not files.broken:
            return rows
        return rows[np.isin(rows, list(files.broken), invert=True)]

    def _count(self, files: SubsetFiles) -> int:
        """How many images there are without those that are left out because they are broken."""
        return len(files) - (len(files.broken) if self.options.skip_broken_images else 0)

    def _note_missing(
        self, files: SubsetFiles, missing: NDArray[np.int64], others: Mapping[str, int], problems: Problems,
        warnings: list[str],
    ) -> None:
        """Images without caption file: an error without a substitute, unless that is allowed; else a warning.

        `others`: how many of them have a caption file of another extension.
        """
        subset, allowed = files.subset, self.options.allow_missing_captions
        extension, count = max(others.items(), key=lambda item: item[1], default=("", 0))
        names = first_names([files.keys[int(row)] for row in missing[: _SHOWN + 1]], count=len(missing))
        total = self._count(files)
        number = f"{len(missing)} of {total} images"
        if not allowed and count:
            problems.add(
                subset.origin, None,
                f"{number} in {subset.image_dir} have no {subset.caption_extension} file, but {count} of them have a "
                f"{extension} file: {names}",
                f'write caption_extension = "{extension}" (or give --allow_missing_captions to train without these '
                "files)",
            )
        elif not allowed and subset.class_tokens is None:
            problems.add(
                subset.origin, None,
                f"{number} in {subset.image_dir} have no caption (no {subset.caption_extension} file beside them, no "
                f"class_tokens): {names}",
                'write captions, or class_tokens = "..." as their caption, or the caption_extension that the files '
                "have, or give --allow_missing_captions to train them with an empty caption",
            )
        elif len(missing) < total or subset.class_tokens is None or count:
            instead = "an empty caption" if not subset.class_tokens else f"class_tokens ({subset.class_tokens!r})"
            warnings.append(f"{subset.origin}: {number} have no {subset.caption_extension} file and are trained with "
                            f"{instead}: {names}")

    def _note_undescribed(
        self, files: SubsetFiles, undescribed: NDArray[np.bool_], problems: Problems, warnings: list[str]
    ) -> None:
        """Entries of a metadata file without caption: an error, or a warning where that is allowed."""
        rows = self._wanted(np.flatnonzero(undescribed), files)
        if not len(rows) or files.subset.templates:
            return
        subset = files.subset
        wanted = subset.caption_column or "caption, tags or text"
        names = first_names([files.keys[int(row)] for row in rows[: _SHOWN + 1]], count=len(rows))
        rule = (f"{len(rows)} of {self._count(files)} images in {subset.metadata_file} have no caption (no {wanted}): "
                f"{names}")
        if self.options.allow_missing_captions:
            warnings.append(f"{subset.origin}: {rule}; they are trained with an empty caption")
        else:
            problems.add(subset.origin, None, rule, 'write one for each ("" for none), or name where it is with '
                         "caption_column, or give --allow_missing_captions to train them with an empty caption")


def _place(subset: SubsetConfig) -> tuple[str, ...]:
    """What the scan of a folder depends on."""
    return os.path.abspath(subset.image_dir), subset.caption_extension


def _nothing(subset: SubsetConfig) -> SubsetFiles:
    empty = TextColumn.of(())
    return SubsetFiles(subset, subset.image_dir, empty, empty, np.zeros((0, 2), np.int32), np.zeros((0, 2), np.int64))


def _captions(subset: SubsetConfig, scan: FolderScan) -> TextColumn:
    """The caption of each image, as its file has it; `class_tokens` without file."""
    if (scan.states == CAPTION_READ).all() or not subset.class_tokens:
        # Where nothing was read there is no text; else most captions are parts of their texts, which need no copy.
        views = scan.texts.parts_of(lambda text: caption_of(text, subset.enable_wildcard))
        if views is not None:
            return views
    return TextColumn.of(_each_caption(subset, scan))


def _each_caption(subset: SubsetConfig, scan: FolderScan) -> Iterator[str]:
    instead = subset.class_tokens or ""
    for text, state in zip(scan.texts, scan.states.tolist(), strict=True):
        if state == CAPTION_READ:
            yield caption_of(text, subset.enable_wildcard)
        else:
            yield instead if state == CAPTION_NONE else ""


def _paths(root: Path, keys: TextColumn, chosen: NDArray[np.bool_]) -> TextColumn:
    folder = str(root)
    return TextColumn.of(
        os.path.join(folder, key) for key, wanted in zip(keys, chosen.tolist(), strict=True) if wanted
    )


def _compare_sizes(files: SubsetFiles, given: NDArray[np.int32], warnings: list[str]) -> None:
    """`image_size` of a metadata file against the images' headers, in either orientation."""
    known = (given.min(axis=1, initial=1) > 0) & (files.sizes[:, 0] > 0)
    wrong = np.flatnonzero(known & (np.sort(given, axis=1) != np.sort(files.sizes, axis=1)).any(axis=1))
    if len(wrong):
        row = int(wrong[0])
        warnings.append(
            f"{files.subset.origin}: image_size of {len(wrong)} of {len(files)} images in {files.subset.metadata_file} "
            f"is not the file's, which is used; the first is {files.keys[row]} ({given[row, 0]}x{given[row, 1]}, the "
            f"file has {files.sizes[row, 0]}x{files.sizes[row, 1]})"
        )


def _stat(path: Path) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError as problem:
        raise DataError(f"{path}: cannot be read ({problem.strerror}); check the file") from None
    return found.st_size, found.st_mtime_ns


def _with_masks(files: SubsetFiles, problems: Problems, warnings: list[str]) -> SubsetFiles:
    """`files` with the mask of each image: the picture of the same name in `conditioning_data_dir`, in any format."""
    subset, folder = files.subset, files.subset.conditioning_data_dir
    assert folder is not None
    try:
        names = list_folder(folder).images
    except OSError as problem:
        problems.add(subset.origin, str(folder), f"the folder of masks cannot be read ({problem.strerror})",
                     "check conditioning_data_dir and its permissions")
        return files
    stems: dict[str, list[str]] = {}
    for name in names:
        stems.setdefault(os.path.splitext(name)[0], []).append(name)
    found, missing, used, ambiguous = list[str](), list[str](), set[str](), list[str]()
    for row, key in enumerate(files.keys):
        image = os.path.basename(key)
        candidates = stems.get(os.path.splitext(image)[0], [])
        mask = image if image in candidates else candidates[0] if candidates else ""
        found.append(mask)
        used.update(candidates)
        if row in files.broken:
            continue
        if not candidates:
            missing.append(key)
        elif len(candidates) > 1 and mask != image:
            ambiguous.append(f"{key} ({' or '.join(candidates)})")
    if missing:
        problems.add(subset.origin, str(folder), f"{len(missing)} of {len(files)} images have no mask there (a file "
                     f"of the same name in any image format): {first_names(missing)}",
                     "add the masks, or put images without into a subset of their own")
    if ambiguous:
        problems.add(subset.origin, str(folder), f"{len(ambiguous)} images have several masks there: "
                     + first_names(ambiguous), "leave one for each")
    if extra := [name for name in names if name not in used]:
        warnings.append(f"{subset.origin}: {len(extra)} of {len(names)} masks in {folder} belong to no image: "
                        + first_names(extra))
    return replace(files, masks=TextColumn.of(found))
