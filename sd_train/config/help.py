"""The text of `--help`, from the models."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping

from sd_train.config.catalogue import Option, options
from sd_train.config.compat import known_options
from sd_train.config.options import GROUPS

_SHOWN = {"flag": "", "int": "N", "float": "NUMBER", "text": "TEXT", "list": "VALUE ..."}
_INDENT = 6


def help_text(command: str) -> str:
    """All options in their groups, in order, with defaults; lines as wide as the terminal, at most 120 characters."""
    width = max(60, min(120, shutil.get_terminal_size().columns))
    lines = [
        f"usage: python -m sd_train.{command} [--config_file FILE.toml] [--OPTION VALUE ...]",
        "",
        *_paragraph("Options come from the command line, then from --config_file, then from the defaults.", width, 0),
        "",
        "  --config_file FILE.toml",
        *_paragraph("Options as TOML; sections are only labels.", width),
        "  --output_config",
        *_paragraph("Write the options that are not defaults to the path given as --config_file, and end.", width),
        "  --no_NAME",
        *_paragraph("Switch off the switch --NAME that the file switches on.", width),
        "  --help, --version",
    ]
    for group, model in GROUPS.items():
        own = [option for option in options().values() if option.group == group and option.belongs_to(command)]
        lines += ["", f"{group}: {model.__doc__}"] if own else []
        for option in own:
            lines += [f"  --{option.name} {_shown(option)}".rstrip(), *_paragraph(_described(option), width)]
    counts = _counts()
    closing = (
        f"sd-scripts has {counts['not_yet']} more options that are not yet supported and {counts['refused']} that are"
        " refused; each of them, when given, says what to do instead."
    )
    return "\n".join([*lines, "", *_paragraph(closing, width, 0)])


def _counts() -> Mapping[str, int]:
    statuses = [known.status for known in known_options().values()]
    return {status: statuses.count(status) for status in ("not_yet", "refused")}


def _shown(option: Option) -> str:
    if option.choices:
        return "{" + ",".join(map(str, option.choices)) + "}"
    return option.hint.shown or _SHOWN[option.kind]


def _described(option: Option) -> str:
    if option.required:
        return f"{option.help} [required]"
    if option.kind == "flag" or option.default in (None, "", {}):
        return option.help
    return f"{option.help} [default: {option.default}]"


def _paragraph(text: str, width: int, indent: int = _INDENT) -> list[str]:
    space = " " * indent
    return textwrap.wrap(text, width, initial_indent=space, subsequent_indent=space, break_on_hyphens=False)
