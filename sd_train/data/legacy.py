"""Datasets without a dataset file: folders named REPEATS_CLASS, or one metadata file.

The rule for names is sd-scripts' (`generate_dreambooth_subsets_config_by_subdirs`): what stands before the first "_" is
read by `int()`, so blanks around it, a sign and other scripts' digits count; the rest is `class_tokens`, which may be
empty. Unlike there, folders are sorted, and every one that is left out is told.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_train.data.folders import Folder, list_folder
from sd_train.errors import Problems

_SHOWN = 5


@dataclass(frozen=True)
class FolderSource:
    """Tables of one dataset that stand in no file; satisfies `validation.Source`."""

    path: Path
    data: dict[str, Any]
    places: tuple[str, ...]
    """Of each subset, for messages."""
    flags: tuple[str, ...]
    """The options that it comes from, the first for the dataset as a whole."""
    warnings: tuple[str, ...] = ()

    def where(self, *keys: str | int) -> str:
        """The option, with the folder where one is meant; `keys` are those of a dataset file."""
        if len(keys) > 3 and isinstance(keys[3], int):
            return "--in_json" if keys[-1] == "metadata_file" else self.places[keys[3]]
        return self.flags[0]


@dataclass(frozen=True)
class NamedFolder:
    """What a folder's name says."""

    name: str
    num_repeats: int
    class_tokens: str


def read_name(name: str) -> NamedFolder | None:
    """`"10_sks dog"` -> 10 repeats of "sks dog"; None if no whole number stands before the first "_"."""
    first, _, rest = name.partition("_")
    try:
        return NamedFolder(name, int(first), rest)
    except ValueError:
        return None


def folder_source(train: Path | None, reg: Path | None, problems: Problems) -> FolderSource:
    """The dataset of the sub-folders of `train_data_dir` and `reg_data_dir`; sd-scripts' order: those of `reg` last."""
    subsets: list[dict[str, Any]] = []
    places: list[str] = []
    warnings: list[str] = []
    for flag, parent, is_reg in (("--train_data_dir", train, False), ("--reg_data_dir", reg, True)):
        if parent is None:
            continue
        for folder in _named_folders(flag, parent, problems, warnings):
            subsets.append(
                {
                    "image_dir": str(parent / folder.name),
                    "num_repeats": folder.num_repeats,
                    "class_tokens": folder.class_tokens,
                    "is_reg": is_reg,
                }
            )
            places.append(f"{flag}: sub-folder {folder.name!r}")
    flags = tuple(flag for flag, path in (("--train_data_dir", train), ("--reg_data_dir", reg)) if path is not None)
    path = next(path for path in (train, reg) if path is not None)
    return FolderSource(path, {"datasets": [{"subsets": subsets}]}, tuple(places), flags, tuple(warnings))


def metadata_source(train: Path | None, reg: Path | None, in_json: Path) -> FolderSource:
    """The fine-tuning dataset of `in_json`, whose relative paths start at `train_data_dir`."""
    subset = {"metadata_file": str(in_json)} | ({} if train is None else {"image_dir": str(train)})
    warnings = () if reg is None else (
        f"--reg_data_dir = '{reg}': has no effect: with --in_json there are no regularisation images",)
    return FolderSource(in_json, {"datasets": [{"subsets": [subset]}]}, ("--in_json",), ("--in_json",), warnings)


def _named_folders(flag: str, parent: Path, problems: Problems, warnings: list[str]) -> list[NamedFolder]:
    """The sub-folders of `parent` that are used, sorted by name; what is left out is a warning."""
    try:
        if not parent.exists():
            nearest = next((outer for outer in parent.absolute().parents if outer.exists()), Path.cwd())
            problems.add(flag, str(parent), "there is no such folder", f"correct the path; it exists up to {nearest}")
            return []
        if not parent.is_dir():
            problems.add(flag, str(parent), "is a file, not a folder",
                         "give the folder that holds the folders named REPEATS_CLASS, or a metadata file as --in_json")
            return []
        listed = list_folder(parent)
    except OSError as problem:
        problems.add(flag, str(parent), f"cannot be read ({problem.strerror})", "check the path and its permissions")
        return []
    except ValueError:
        problems.add(flag, str(parent), "holds a null character, which no file name has", "correct the path")
        return []
    read = [(name, read_name(name)) for name in listed.folders]
    used = [folder for _, folder in read if folder is not None and folder.num_repeats >= 1]
    if not used:
        _note_none(flag, parent, listed, problems)
        return []
    for name, folder in read:
        if folder is None:
            warnings.append(f"{flag}: sub-folder {name!r}: is left out: no whole number stands before its first '_'; "
                            f"rename it to '1_{name}' to use it")
        elif folder.num_repeats < 1:
            warnings.append(f"{flag}: sub-folder {name!r}: is left out: it says {folder.num_repeats} repeats")
        elif not folder.class_tokens:
            warnings.append(f"{flag}: sub-folder {name!r}: names no class, so its images without caption file are "
                            f"trained with an empty caption; rename it to '{folder.num_repeats}_CLASS' to give one")
    if listed.images:
        warnings.append(f"{flag} = '{parent}': {_shown(listed.images, 'image')} directly in it: left out, only those "
                        "in folders named REPEATS_CLASS are used")
    return used


def _note_none(flag: str, parent: Path, listed: Folder, problems: Problems) -> None:
    """The problem of a folder without usable sub-folders: what it holds instead, and the way out of that."""
    own = read_name(parent.resolve().name)
    zero = [name for name in listed.folders if read_name(name) is not None]
    found = [_shown(listed.images, "image")] if listed.images else []
    if listed.folders:
        found.append(_shown(listed.folders, "sub-folder") + " without a number from 1 on")
    if not found:
        found = [_shown(listed.others, "other file")] if listed.others else ["nothing"]
    if listed.images and own is not None and own.num_repeats >= 1 and "_" in parent.resolve().name:
        way_out = f"give the folder above it: {flag}='{parent.resolve().parent}'"
    elif listed.images:
        way_out = (f"move the images into a sub-folder such as '{parent / '10_sks dog'}' (10 repeats, class tokens "
                   "'sks dog'), or name the folder as image_dir in a --dataset_config file")
    elif zero:
        way_out = f"give them a number from 1 on, for example '10_{zero[0].partition('_')[2] or 'dog'}'"
    elif listed.folders:
        way_out = f"put the number of repeats before the name, for example '10_{listed.folders[0]}'"
    else:
        way_out = f"put the images into a sub-folder such as '{parent / '10_sks dog'}', or correct the path"
    problems.add(flag, str(parent), "holds no folder of images named REPEATS_CLASS such as '10_sks dog' "
                 f"(found: {' and '.join(found)})", way_out)


def _shown(names: list[str], noun: str) -> str:
    examples = ", ".join(repr(name) for name in names[:_SHOWN])
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} {noun}{'' if len(names) == 1 else 's'} ({examples}{more})"
