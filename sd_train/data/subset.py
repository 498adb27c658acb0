"""One subset's files: its images in order, each with its caption, and what to say where captions fail."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from sd_train.data.captions import TEXT_EXTENSIONS, caption_name, read_caption
from sd_train.data.config import SubsetConfig
from sd_train.data.folders import list_folder, no_images
from sd_train.errors import DataError, Problems

_SHOWN = 5


@dataclass(frozen=True)
class SubsetFiles:
    """The images of a subset and their captions, one for each."""

    subset: SubsetConfig
    images: list[str]
    """File names, sorted."""
    captions: list[str]


def first_names(names: Sequence[str], separator: str = ", ") -> str:
    """The first five of `names` and the number of the others."""
    more = f"{separator}and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    lead = separator if separator.startswith("\n") else ""
    return lead + separator.join(names[:_SHOWN]) + more


def read_subset(
    subset: SubsetConfig, allow_missing_captions: bool, problems: Problems, warnings: list[str]
) -> SubsetFiles:
    """List the images of `subset` and read their captions; what fails is noted, with "" in its place.

    An image without caption file gets `class_tokens`; if there are none, or a caption file of another extension
    stands beside it, that is a problem, or with `allow_missing_captions` a warning.
    """
    try:
        folder = list_folder(subset.image_dir)
        if not folder.images:
            problems.extend([no_images(subset.origin, subset.image_dir)])
    except OSError as problem:
        problems.add(subset.origin, str(subset.image_dir), f"the folder cannot be read ({problem.strerror})",
                     "check image_dir and its permissions")
        return SubsetFiles(subset, [], [])
    names = {os.path.normcase(name) for name in folder.others}
    captions, missing, failed = list[str](), list[str](), list[str]()
    for image in folder.images:
        name = caption_name(image, subset.caption_extension, names)
        if name is None:
            missing.append(image)
            captions.append(subset.class_tokens or "")
            continue
        try:
            captions.append(read_caption(subset.image_dir / name, subset.enable_wildcard))
        except DataError as problem:
            failed.append(str(problem))
            captions.append("")
    if failed:
        problems.add(subset.origin, None, f"{len(failed)} caption files cannot be used: "
                     + first_names(failed, "\n      "), "mend them")
    if missing:
        _note_missing(SubsetFiles(subset, folder.images, captions), missing, names,
                      None if allow_missing_captions else problems, warnings)
    return SubsetFiles(subset, folder.images, captions)


def _note_missing(
    files: SubsetFiles, missing: Sequence[str], names: set[str], problems: Problems | None, warnings: list[str]
) -> None:
    """Images without caption file: an error without a substitute, unless `problems` is None; else a warning."""
    subset = files.subset
    other = Counter(
        extension
        for image in missing
        for extension in TEXT_EXTENSIONS
        if extension != subset.caption_extension and caption_name(image, extension, names) is not None
    )
    extension, count = other.most_common(1)[0] if other else ("", 0)
    number = f"{len(missing)} of {len(files.images)} images"
    if problems is not None and count:
        problems.add(
            subset.origin, None,
            f"{number} in {subset.image_dir} have no {subset.caption_extension} file, but {count} of them have a "
            f"{extension} file: {first_names(missing)}",
            f'write caption_extension = "{extension}" (or give --allow_missing_captions to train without these files)',
        )
    elif problems is not None and subset.class_tokens is None:
        problems.add(
            subset.origin, None,
            f"{number} in {subset.image_dir} have no caption (no {subset.caption_extension} file beside them, no "
            f"class_tokens): {first_names(missing)}",
            'write captions, or class_tokens = "..." as their caption, or the caption_extension that the files have, '
            "or give --allow_missing_captions to train them with an empty caption",
        )
    elif len(missing) < len(files.images) or subset.class_tokens is None or count:
        instead = "an empty caption" if not subset.class_tokens else f"class_tokens ({subset.class_tokens!r})"
        warnings.append(f"{subset.origin}: {number} have no {subset.caption_extension} file and are trained with "
                        f"{instead}: {first_names(missing)}")
