"""Which images are kept for validation: chosen by content, so that equal pictures are never on both sides."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sd_train.data.columns import TextColumn
from sd_train.data.content import ContentHashes
from sd_train.data.masks import check_aspect
from sd_train.data.scan import scan_files
from sd_train.data.settings import DatasetConfig, SubsetConfig
from sd_train.errors import DataError, Problems
from sd_train.randomness import derive

if TYPE_CHECKING:
    from sd_train.data.subset import SubsetFiles

_CHUNK = 4096
_DIGEST = 16
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_WILDCARD = re.compile(r"\{([^}]+)\}")

Listed = tuple[DatasetConfig, Sequence["SubsetFiles"]]


def verify(files: SubsetFiles, hashes: ContentHashes) -> dict[int, str]:
    """Decode every image of `files` that is not known to be broken; what is wrong with those that fail, by row."""
    rows = np.setdiff1d(np.arange(len(files)), list(files.broken))
    return _digests(files, rows, hashes)[1]


def verify_masks(files: SubsetFiles, hashes: ContentHashes) -> dict[int, str]:
    """Decode the mask of every image of `files` that is not known to be broken; what is wrong with which, by row."""
    folder, masks = files.subset.conditioning_data_dir, files.masks
    if folder is None or masks is None:
        return {}
    rows = [row for row, mask in enumerate(masks) if mask and row not in files.broken]
    paths = [folder / masks[row] for row in rows]
    scan = scan_files(TextColumn.of(map(str, paths)), None)
    failed = {rows[place]: problem for place, problem in scan.problems.items()}
    for row, path, size, found in zip(rows, paths, scan.sizes.tolist(), hashes.digests(paths, scan.stats), strict=True):
        try:
            if isinstance(found, DataError):
                raise found
            # Only its shape matters; so it takes no memory.
            shape = np.broadcast_to(np.uint8(0), (size[1], size[0]))
            check_aspect(shape, path, (int(files.sizes[row, 0]), int(files.sizes[row, 1])), files.path(row))
        except DataError as problem:
            failed.setdefault(row, str(problem))
    return {row: f"{files.path(row)}: its mask cannot be used: {problem}" for row, problem in failed.items()}


def unchanged(files: SubsetFiles) -> SubsetFiles:
    """`files` as validation sees them: each image once, centred, neither flipped nor coloured, with its whole caption.

    Of wildcards and of several lines the first counts.
    """
    captions = files.captions
    if files.subset.enable_wildcard:
        captions = TextColumn.of(first_caption(caption, files.subset) for caption in captions)
    return replace(files, subset=unchanged_subset(files.subset), captions=captions)


def first_caption(caption: str, subset: SubsetConfig) -> str:
    """What validation sees of an image's caption: of wildcards and of several lines the first."""
    return _first_choice(caption.partition("\n")[0]) if subset.enable_wildcard else caption


def unchanged_subset(subset: SubsetConfig) -> SubsetConfig:
    """`subset` with nothing that differs from one look to the next; its captions are those of `first_caption`."""
    return replace(
        subset,
        num_repeats=1,
        flip_aug=False,
        color_aug=False,
        random_crop=False,
        face_crop_aug_range=None,
        shuffle_caption=False,
        enable_wildcard=False,
        caption_prefix=_settled(subset.caption_prefix, subset),
        caption_suffix=_settled(subset.caption_suffix, subset),
        caption_dropout_rate=0.0,
        caption_dropout_every_n_epochs=0,
        caption_tag_dropout_rate=0.0,
        token_warmup_step=0,
    )


def _settled(text: str | None, subset: SubsetConfig) -> str | None:
    return _first_choice(text) if text and subset.enable_wildcard else text


def _first_choice(text: str) -> str:
    """The first of every `{a|b|c}`; `{{` and `}}` become plain braces, as in training."""
    text = text.replace("{{", _OPEN).replace("}}", _CLOSE)
    text = _WILDCARD.sub(lambda match: match[1].partition("|")[0], text)
    return text.replace(_OPEN, "{").replace(_CLOSE, "}")


class _Choice:
    """Which contents are taken so far, and how many distinct ones each dataset still learns."""

    def __init__(self, counts: Sequence[Counter[int]], fixed: set[int]) -> None:
        self.taken: set[int] = set()
        self._counts = counts
        self._fixed = fixed
        self._left = [len(count) for count in counts]

    def free(self, number: int) -> bool:
        """Whether a content may be taken: it stands only where images are kept, and none of these runs empty."""
        return number not in self._fixed and all(
            left > 1 for left, count in zip(self._left, self._counts, strict=True) if number in count
        )

    def take(self, number: int) -> None:
        self.taken.add(number)
        self._left = [left - (number in count) for left, count in zip(self._left, self._counts, strict=True)]

    def fill(self, place: int, wanted: int, ranks: dict[int, int]) -> bool:
        """Take contents of dataset number `place` until `wanted` images are kept; false if none can be."""
        count = self._counts[place]
        wanted -= sum(images for number, images in count.items() if number in self.taken)
        ranked = sorted(count.keys() - self.taken, key=ranks.__getitem__)
        for number in ranked:
            if count[number] <= wanted and self.free(number):
                self.take(number)
                wanted -= count[number]
        if not self.taken & count.keys():
            # Only groups of equal pictures that are larger than the share: the smallest.
            for number in sorted(filter(self.free, ranked), key=count.__getitem__)[: int(wanted > 0)]:
                self.take(number)
        return bool(self.taken & count.keys())


def choose_validation(
    listed: Sequence[Listed], hashes: ContentHashes, seed: int, problems: Problems, warnings: Sequence[list[str]]
) -> list[list[NDArray[np.bool_]]]:
    """For each dataset and each of its subsets, which images are kept for validation.

    Of the n images that a dataset learns, round(n x `validation_split`) are kept, at least one and at most n - 1:
    distinct contents are ranked by a hash of seed and content, and taken with all of their images while these fit. A
    content that also stands where nothing is kept (a regularisation subset, a dataset without split) is not taken; one
    that is taken for one dataset is kept in all of them, whatever their resolution.

    Args:
        warnings: a list for each dataset.
    """
    if not any(dataset.validation_split > 0 for dataset, _ in listed):
        return [[np.zeros(len(files), bool) for files in subsets] for _, subsets in listed]
    numbers, contents = _number_contents(listed, hashes, problems)
    fixed = {
        number
        for (dataset, subsets), groups in zip(listed, numbers, strict=True)
        for files, own in zip(subsets, groups, strict=True)
        if not _splits(dataset, files)
        for number in np.unique(own).tolist()
    }
    choice = _Choice([_learned(subsets, groups) for (_, subsets), groups in zip(listed, numbers, strict=True)], fixed)
    for place, (dataset, subsets) in enumerate(listed):
        total = sum(len(files) for files in subsets if _splits(dataset, files))
        if not total:
            continue
        wanted = min(max(round(total * dataset.validation_split), 1), total - 1)
        own_seed = seed if dataset.validation_seed is None else dataset.validation_seed
        ranks = {number: derive(own_seed, "validation", content.hex()) for number, content in enumerate(contents)}
        if not choice.fill(place, wanted, ranks):
            warnings[place].append(
                f"{dataset.origin}: validation_split = {dataset.validation_split:g} keeps no image: none of {total} "
                "can be spared (equal pictures stay together, also with those that are not split)"
            )
    kept = np.array(sorted(choice.taken), np.int64)
    return [
        [np.isin(own, kept) & _splits(dataset, files) for files, own in zip(subsets, groups, strict=True)]
        for (dataset, subsets), groups in zip(listed, numbers, strict=True)
    ]


def _splits(dataset: DatasetConfig, files: SubsetFiles) -> bool:
    return dataset.validation_split > 0 and not files.subset.is_reg


def _learned(subsets: Sequence[SubsetFiles], groups: Sequence[NDArray[np.int64]]) -> Counter[int]:
    """How many images of each content are learned."""
    counts: Counter[int] = Counter()
    for files, own in zip(subsets, groups, strict=True):
        if not files.subset.is_reg:
            found, times = np.unique(own[own >= 0], return_counts=True)
            counts.update(dict(zip(found.tolist(), times.tolist(), strict=True)))
    return counts


def _number_contents(
    listed: Sequence[Listed], hashes: ContentHashes, problems: Problems
) -> tuple[list[list[NDArray[np.int64]]], list[bytes]]:
    """For each dataset and subset the number of each image's content, and the contents; -1 where it does not matter.

    Where nothing is kept, only images of a size that also stands where something is are decoded.
    """
    sizes = [_codes(files) for dataset, subsets in listed for files in subsets if _splits(dataset, files)]
    candidates = np.unique(np.concatenate(sizes)) if sizes else np.zeros(0, np.int64)
    digests, places = list[NDArray[np.uint8]](), list[NDArray[np.int64]]()
    for _, subsets in listed:
        for files in subsets:
            rows = np.flatnonzero(np.isin(_codes(files), candidates))
            found, failed = _digests(files, rows, hashes)
            if failed:
                messages = [failed[row] for row in sorted(failed)]
                more = f"\n      and {len(messages) - 5} more" if len(messages) > 5 else ""
                problems.add(files.subset.origin, None, f"{len(messages)} images cannot be read: \n      "
                             + "\n      ".join(messages[:5]) + more,
                             "mend or remove them, or give --skip_broken_images to train without them")
            good = ~np.isin(rows, list(failed))
            digests.append(found[good])
            places.append(rows[good])
    keys = np.ascontiguousarray(np.concatenate(digests)).view(f"V{_DIGEST}").reshape(-1)
    contents, numbers = np.unique(keys, return_inverse=True)
    ends = np.cumsum([len(rows) for rows in places])
    parts, result = iter(zip(places, np.split(numbers.reshape(-1), ends[:-1]), strict=True)), list[list[Any]]()
    for _, subsets in listed:
        result.append([])
        for files in subsets:
            rows, own = next(parts)
            column = np.full(len(files), -1, np.int64)
            column[rows] = own
            result[-1].append(column)
    return result, [bytes(content) for content in contents]


def _codes(files: SubsetFiles) -> NDArray[np.int64]:
    sizes = files.sizes.astype(np.int64)
    return np.asarray(sizes[:, 0] << 32 | sizes[:, 1])


def _digests(
    files: SubsetFiles, rows: NDArray[np.int64], hashes: ContentHashes
) -> tuple[NDArray[np.uint8], dict[int, str]]:
    """Digests of the contents of `rows`, [len(rows), 16], and what is wrong with those that cannot be decoded."""
    digests, failed = np.zeros((len(rows), _DIGEST), np.uint8), dict[int, str]()
    for start in range(0, len(rows), _CHUNK):
        chunk = rows[start : start + _CHUNK]
        paths = [files.path(row) for row in chunk.tolist()]
        for place, found in enumerate(hashes.digests(paths, files.stats[chunk]), start):
            if isinstance(found, DataError):
                failed[int(rows[place])] = str(found)
            else:
                digests[place] = np.frombuffer(found, np.uint8)
    return digests, failed
