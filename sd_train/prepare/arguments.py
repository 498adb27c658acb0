"""The command lines of the preparation's commands: sd-scripts' arguments, our kind of errors."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from sd_train.data.folders import IMAGE_EXTENSIONS
from sd_train.errors import ConfigError, Problems

_OTHER_FILES = {".npz", ".json", ".jsonl", ".safetensors", ".toml"}


class Parser(argparse.ArgumentParser):
    """Ends in our kind of error; names are not shortened, as misspelt ones would pass."""

    def __init__(self, command: str, about: str) -> None:
        super().__init__(
            f"sd-train {command}", description=about, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        self._command = command

    def error(self, message: str) -> NoReturn:
        # argparse takes what begins so for an option.
        dash = "; a value that begins with - is written --option=VALUE" if "expected one argument" in message else ""
        raise ConfigError(f"{message}{dash}; sd-train {self._command} --help lists the options")


def check_images_folder(folder: Path, problems: Problems) -> None:
    """Note a folder of images that is not there."""
    if not folder.is_dir():
        rule = "is a file" if folder.exists() else "does not exist"
        problems.add(str(folder), None, rule, "give the folder that holds the images")


def check_words(option: str, words: str | None, problems: Problems) -> None:
    """Note an option's text that no text file can hold: bytes of the command line that are not UTF-8."""
    try:
        (words or "").encode()
    except UnicodeEncodeError:
        problems.add(option, words, "is not UTF-8", "write it in a terminal that is set to UTF-8")


def extension_of(text: str) -> str:
    """An extension of text files with its dot, whether it was written with one or not.

    Raises:
        ConfigError: if it is none, or images and what lies beside them have it.
    """
    extension = "." + text.removeprefix(".")
    taken = extension.lower() in IMAGE_EXTENSIONS | _OTHER_FILES
    if taken or extension == "." or set(extension) & {"/", "\\", "\0"}:
        rule = "is that of other files" if taken else "is no extension"
        raise ConfigError(f"--caption_extension = {text!r}: {rule}; write one of text files, such as .txt or .caption")
    return extension
