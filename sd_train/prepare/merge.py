"""Captions and tags from beside the images into metadata: what the merging commands do."""

from __future__ import annotations

import os
import sys
from argparse import SUPPRESS, Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sd_train.config.textfile import printable
from sd_train.errors import ConfigError, DataError, Problems
from sd_train.prepare.arguments import Parser, check_images_folder, extension_of
from sd_train.prepare.listing import find_images, from_here, metadata_key
from sd_train.prepare.metadata import Metadata, check_target, start_from, write_metadata
from sd_train.prepare.sidecars import Passed, Sidecars, numbered, shown, with_progress

Clean = Callable[[str, str], str]
"""(key in metadata, text) -> text."""


@dataclass(frozen=True)
class Source:
    """Where the text for one key of an image's metadata comes from."""

    name: str
    """"caption" or "tags"."""
    extension: str


def merge_parser(command: str, about: str, extensions: Mapping[str, str]) -> Parser:
    """The options of a merging command; `extensions` are its options for file extensions, with their defaults."""
    parser = Parser(command, about)
    parser.add_argument("train_data_dir", type=Path, metavar="FOLDER", help="folder of images")
    parser.add_argument(
        "out_json", type=Path, metavar="OUT.json",
        help="metadata file to write; one that is there is added to, and kept as OUT.json.bak",
    )  # fmt: skip
    parser.add_argument("--in_json", type=Path, metavar="FILE", help="metadata to add to, .json or "
                        ".jsonl (default: OUT.json, if there)")  # fmt: skip
    for name, default in extensions.items():
        parser.add_argument(
            f"--{name}", type=extension_of, default=default, metavar="EXT", help=f"of the text files ({default})"
        )
    if "caption_extension" in extensions:
        # sd-scripts still takes its old misspelling.
        parser.add_argument("--caption_extention", type=extension_of, dest="caption_extension", help=SUPPRESS)
    parser.add_argument(
        "--full_path", action="store_true",
        help="name images by absolute paths (default: by their paths within FOLDER, with extension; training then "
        "needs image_dir = FOLDER)",
    )  # fmt: skip
    parser.add_argument(
        "--recursive", action="store_true", help="also in sub-folders; sd-scripts wants --full_path with it, we do not"
    )
    parser.add_argument("--debug", action="store_true", help="print each image with its text")
    return parser


def merge(given: Namespace, sources: list[Source], clean: Clean | None = None) -> int:
    """Put the texts of `sources` into the metadata; 3 if a file could not be read.

    Raises:
        ConfigError: if the folder is none, or images are named otherwise in the metadata.
        DataError: if there are no images, or the metadata cannot be read.
        DiskError: if it cannot be written.
    """
    folder: Path = given.train_data_dir
    problems = Problems()
    check_images_folder(folder, problems)
    check_target(given.out_json, problems)
    problems.raise_if_any(ConfigError)
    images = find_images(folder, given.recursive)
    metadata = start_from(given.in_json, given.out_json)
    print(f"{folder}: {numbered(len(images), 'image')}; the metadata has {numbered(len(metadata), 'image')} so far")
    named, passed = _keys(images, folder, given.full_path)
    _rename(metadata, named, folder, given)
    sidecars, added = Sidecars(), 0
    for key, image in with_progress(named, "reading"):
        before = len(passed.broken)
        texts = _texts(image, sources, sidecars, passed)
        if not texts:
            if len(passed.broken) == before:
                passed.missing.append(key)
            continue
        entry = metadata.setdefault(key, {})
        for name, text in texts.items():
            entry[name] = clean(name, text) if clean else text
            if given.debug:
                print(f"{printable(key)}: {name}: {entry[name]}")
        added += 1
    extensions = " or ".join(source.extension for source in sources)
    for line in passed.lines(f"without a {extensions} file, whose metadata stays as it was"):
        print(line, file=sys.stderr)
    if not added and not metadata:
        raise DataError(
            f"{folder}: no image has a {extensions} file, so there is nothing to write; name their extension with "
            + " or ".join(f"--{name}" for name in sorted(vars(given)) if name.endswith("extension"))
        )
    changed = write_metadata(given.out_json, metadata)
    print(f"{given.out_json}: {numbered(added, 'image')} merged" + ("" if changed else "; nothing has changed"))
    return 3 if passed.broken else 0


def _keys(images: list[Path], folder: Path, full_path: bool) -> tuple[list[tuple[str, Path]], Passed]:
    """Each image with its name in metadata; those whose names no metadata can hold are passed over."""
    named, passed = list[tuple[str, Path]](), Passed()
    for image in images:
        key = metadata_key(image, folder, full_path)
        try:
            key.encode()
        except UnicodeEncodeError:
            passed.broken.append(f"{image}: its name is not UTF-8, which metadata needs; rename it")
        else:
            named.append((key, image))
    return named, passed


def _rename(metadata: Metadata, named: list[tuple[str, Path]], folder: Path, given: Namespace) -> None:
    """Give entries that sd-scripts wrote without extension their images' full names, and all the same kind of path.

    Raises:
        ConfigError: if all images stand there as absolute paths and are to be relative, or the other way round.
    """
    if not metadata:
        return
    stems: dict[str, list[str]] = {}
    for key, _ in named:
        stems.setdefault(os.path.splitext(key)[0], []).append(key)
    # Of photo.png and photo.png.jpg the first is no name without extension.
    renamed = sorted(stems.keys() & metadata.keys() - {key for key, _ in named})
    for stem in renamed:
        entry = metadata.pop(stem)
        # Images of one name have one text file: what was beside it is that of all.
        metadata.update({key: {**entry, **metadata.get(key, {})} for key in stems[stem]})
    if renamed:
        print(f"{numbered(len(renamed), 'name')} without extension, which cannot be trained from, completed: "
              + shown(renamed))  # fmt: skip
    pairs = ((key, metadata_key(image, folder, not given.full_path)) for key, image in named)
    other = {old: key for key, old in pairs if old in metadata}
    # sd-scripts' --full_path is the path as its command was given it, from the current folder.
    as_given = {old: key for key, image in named if (old := str(image)) in metadata and from_here(old, folder)}
    if other and not any(key in metadata for key, _ in named):
        way_out = "leave out --full_path" if given.full_path else "give --full_path"
        without = "" if given.in_json is None else "leave out --in_json"
        raise ConfigError(
            f"{given.in_json or given.out_json}: names {numbered(len(other), 'image')} otherwise ({shown([*other])}), "
            f"and would hold them twice; {way_out}, or {without or 'give another OUT.json'}"
        )
    for old, key in (other := as_given | other).items():
        # Where an image has both names, what stands under the one that is asked for counts.
        metadata[key] = {**metadata.pop(old), **metadata.get(key, {})}
    if other:
        kind = "absolute paths" if given.full_path else f"paths within {folder}"
        print(f"{numbered(len(other), 'name')} made {kind}: {shown([*other])}")


def _texts(image: Path, sources: list[Source], sidecars: Sidecars, passed: Passed) -> dict[str, str]:
    """What is beside `image`, by key in metadata; stripped, several lines stay several."""
    found = dict[str, str]()
    for source in sources:
        path = sidecars.find(image, source.extension)
        text = None if path is None else passed.read(path)
        if text is not None:
            found[source.name] = text.strip()
    return found
