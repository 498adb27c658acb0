"""Where a dataset's captions are: text files beside the images of a folder or dataset file, or a metadata file."""

from __future__ import annotations

import json
import os
import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from sd_train.config.textfile import printable
from sd_train.data.captions import TEXT_EXTENSIONS
from sd_train.data.settings import SubsetConfig
from sd_train.errors import ConfigError, DataError, Problems
from sd_train.prepare.arguments import Parser, extension_of
from sd_train.prepare.listing import find_images
from sd_train.prepare.metadata import json_text, read_metadata
from sd_train.prepare.sidecars import Sidecars

FIELDS = ("tags", "caption")
_ENDS = re.compile(r"(\r\n|\r|\n)")
_COMMA = ","
_MARK = "\ufeff"
_LEAST_STEP = 32
"""Of `bucket_reso_steps`: that of SDXL."""

Edit = Callable[[str], str]
"""One line of a caption -> what it becomes."""


@dataclass(frozen=True)
class Style:
    """How a caption is made of tags."""

    separator: str = ","
    divider: str = ""
    """`keep_tokens_separator`: what divides the caption into parts of tags; "": nothing does."""
    keep_tokens: int = 0
    """First tags that keep their place."""


@dataclass(frozen=True)
class CaptionFile:
    """A file that holds one caption, or a metadata file with many."""

    path: Path
    style: Style
    entry: str | None = None
    """Which text of a metadata file's entries; None: the file is one caption."""


@dataclass
class Found:
    """The captions of a dataset."""

    files: list[CaptionFile] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Images without caption."""


def add_target(parser: Parser) -> None:
    """The options that say which captions are meant."""
    parser.add_argument(
        "target", type=Path, metavar="TARGET", help="folder of images, dataset file (.toml, .json) or metadata (.json)"
    )
    parser.add_argument("--recursive", action="store_true", help="of a folder: also its sub-folders")
    parser.add_argument(
        "--caption_extension", type=extension_of, metavar="EXT",
        help=f"of a folder's text files (default: the one of {' '.join(TEXT_EXTENSIONS)} that is there)",
    )  # fmt: skip
    parser.add_argument(
        "--field", choices=FIELDS, help="of metadata, which text of each image (default: tags)"
    )
    parser.add_argument(
        "--caption_separator", metavar="TEXT", help="between tags (default: , or the dataset file's)"
    )


def find_captions(given: Namespace) -> Found:
    """The captions that the options mean.

    Raises:
        UserError: if there are none, or it is not clear which are meant.
    """
    target: Path = given.target
    if given.caption_separator is not None and not given.caption_separator.strip():
        raise ConfigError("--caption_separator is blank, which is within tags too; give a sign such as ,")
    if target.is_dir():
        _refuse_idle(given, "a folder", field=given.field)
        return _of_folder(target, given)
    if not target.is_file():
        raise ConfigError(f"{target}: is neither folder nor file; check the path (current folder: {Path.cwd()})")
    if target.suffix.lower() not in (".toml", ".json"):
        raise ConfigError(f"{target}: is no dataset and no metadata; give a folder, a .toml or a .json file")
    if target.suffix.lower() == ".json" and not _is_dataset(target):
        _refuse_idle(given, "metadata", recursive=given.recursive, caption_extension=given.caption_extension)
        style = Style(given.caption_separator or _COMMA)
        return Found([CaptionFile(target.resolve(), style, given.field or FIELDS[0])])
    _refuse_idle(given, "a dataset file", recursive=given.recursive, caption_extension=given.caption_extension)
    return _of_dataset(target, given)


def _refuse_idle(given: Namespace, kind: str, **idle: object) -> None:
    """
    Raises:
        ConfigError: if one of the `idle` options, which mean nothing with this `kind` of target, is given.
    """
    problems = Problems()
    for name, value in idle.items():
        if value:
            problems.add(f"--{name}", None, f"means nothing for {kind}, such as {given.target}", "leave it out")
    problems.raise_if_any(ConfigError)


def _is_dataset(path: Path) -> bool:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        # What reads it as metadata says what is wrong.
        return False
    return isinstance(content, dict) and isinstance(content.get("datasets"), list)


def _of_folder(folder: Path, given: Namespace) -> Found:
    images, sidecars = find_images(folder, given.recursive), Sidecars()
    extension: str | None = given.caption_extension
    if extension is None:
        there = [each for each in TEXT_EXTENSIONS if any(sidecars.find(image, each) for image in images)]
        if len(there) != 1:
            kinds = f"text files of several kinds ({', '.join(there)})" if there else "no text files beside its images"
            raise ConfigError(f"{folder}: holds {kinds}; name them with --caption_extension")
        extension = there[0]
    found = _beside(images, extension, Style(given.caption_separator or _COMMA), sidecars)
    if not found.files:
        raise DataError(f"{folder}: no image has a {extension} file; give another --caption_extension")
    return found


def _beside(images: list[Path], extension: str, style: Style, sidecars: Sidecars) -> Found:
    files, missing = dict[Path, CaptionFile](), list[str]()
    for image in images:
        path = sidecars.find(image, extension)
        if path is None:
            missing.append(str(image))
        else:
            # Of a link the file that it leads to is edited, once.
            files[path.resolve()] = CaptionFile(path.resolve(), style)
    return Found(list(files.values()), missing)


def _of_dataset(path: Path, given: Namespace) -> Found:
    from sd_train.config.parser import load_run_config
    from sd_train.data.config import load_datasets
    from sd_train.data.request import dataset_request
    from sd_train.plan_data import run_options

    # None of these is looked at.
    stand_ins = ["--pretrained_model_name_or_path", ".", "--output_dir", ".", "--resolution", "512"]
    config = load_run_config("train_network", [*stand_ins, "--dataset_config", str(path)]).config
    request = replace(dataset_request("caption", run_options(config)), masked_loss=True, step_multiple=_LEAST_STEP)
    subsets = [subset for dataset in load_datasets(request) for subset in dataset.subsets]
    problems, sidecars = Problems(), Sidecars()
    files, missing = dict[Path, CaptionFile](), dict[str, None]()
    for subset in subsets:
        found = _of_subset(subset, given, sidecars, problems)
        missing |= dict.fromkeys(found.missing)
        for file in found.files:
            if files.setdefault(file.path, file).style != file.style:
                problems.add(subset.origin, str(file.path), "is used elsewhere with other separators or keep_tokens",
                             "use the same")
    problems.raise_if_any(ConfigError)
    return Found(list(files.values()), list(missing))


def _of_subset(subset: SubsetConfig, given: Namespace, sidecars: Sidecars, problems: Problems) -> Found:
    style = Style(given.caption_separator or subset.caption_separator, subset.keep_tokens_separator, subset.keep_tokens)
    if subset.metadata_file is None:
        return _beside(find_images(subset.image_dir, False), subset.caption_extension, style, sidecars)
    if subset.metadata_file.suffix.lower() != ".json":
        rule = "captions are edited in text files and .json metadata alone"
        problems.add(subset.origin, str(subset.metadata_file), rule, "leave the subset out of the dataset file")
        return Found()
    return Found([CaptionFile(subset.metadata_file.resolve(), style, given.field or FIELDS[0])])


def read_content(file: CaptionFile) -> str:
    """All of `file`, with its byte order mark and line endings.

    Raises:
        DataError: if it cannot be read or is not UTF-8.
    """
    try:
        return file.path.read_bytes().decode()
    except OSError as problem:
        raise DataError(f"{file.path}: cannot be read ({problem.strerror}); check its permissions") from None
    except UnicodeDecodeError as problem:
        raise DataError(f"{file.path}: byte {problem.start} is not UTF-8; save the file as UTF-8") from None


def lines_of(file: CaptionFile, content: str) -> Iterator[tuple[str, list[str]]]:
    """(name of the image or text file, the lines of its caption that are not blank)."""
    if file.entry is None:
        yield str(file.path), [line for line in content.removeprefix(_MARK).splitlines() if line.strip()]
        return
    for key, entry in read_metadata(file.path).items():
        if isinstance(text := entry.get(file.entry), str):
            yield key, [line for line in text.splitlines() if line.strip()]


def without_caption(file: CaptionFile) -> list[str]:
    """The images of a metadata file that have no text there; none of another file."""
    if file.entry is None:
        return []
    return [key for key, entry in read_metadata(file.path).items() if not isinstance(entry.get(file.entry), str)]


@dataclass(frozen=True)
class Change:
    """A caption before and after an edit."""

    name: str
    before: str
    after: str


def edited(file: CaptionFile, content: str, edit: Edit) -> tuple[str, list[Change]]:
    """`content` with every caption in it edited, and the captions that have changed."""
    if file.entry is None:
        mark = _MARK if content.startswith(_MARK) else ""
        before = content.removeprefix(_MARK)
        after = _edit_lines(before, edit)
        changes = [Change(printable(str(file.path)), before.strip(), after.strip())] if after != before else []
        return mark + after, changes
    metadata, changes = read_metadata(file.path), []
    for key, entry in metadata.items():
        if not isinstance(text := entry.get(file.entry), str):
            continue
        entry[file.entry] = _edit_lines(text, edit)
        if entry[file.entry] != text:
            changes.append(Change(f"{file.path.name}: {printable(key)}", text, entry[file.entry]))
    return (json_text(metadata) if changes else content), changes


def _edit_lines(text: str, edit: Edit) -> str:
    """Each line that is not blank edited, the ends of lines as they are; of a blank text the first line."""
    parts = _ENDS.split(text)
    for place in range(0, len(parts), 2):
        if parts[place].strip() or (place == 0 and not text.strip()):
            parts[place] = edit(parts[place])
            if _ENDS.search(parts[place]):
                raise ConfigError(f"a line break would be put into {text[:80]!r}; give a replacement without")
    return "".join(parts)


def base_of(target: Path) -> Path:
    """The folder that edits of `target` are noted in."""
    return target if target.is_dir() else Path(os.path.abspath(target)).parent
