"""`sd-train show_metadata`: what a .safetensors file tells of itself."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sd_train.errors import ModelError
from sd_train.families.sources import SafetensorsSource
from sd_train.prepare.arguments import Parser

_ABOUT = """Print the metadata of a .safetensors file (a model, a LoRA, an embedding) as JSON, sorted by name. Entries
that hold JSON themselves, as ss_tag_frequency does, are shown as such."""


def main(argv: Sequence[str]) -> int:
    """Print the metadata of the file that `argv` names.

    Raises:
        UserError: if it is no such file.
    """
    parser = Parser("show_metadata", _ABOUT)
    parser.add_argument("--model", type=Path, required=True, metavar="FILE", help="the .safetensors file")
    path: Path = parser.parse_args(list(argv)).model
    if not path.is_file():
        rule = "is a folder; give a .safetensors file in it" if path.is_dir() else "there is no such file"
        raise ModelError(f"--model = {path}: {rule}")
    if path.suffix.lower() != ".safetensors":
        raise ModelError(f"--model = {path}: only .safetensors files hold metadata; sd-train convert makes one")
    entries = SafetensorsSource.open([path]).metadata
    if not entries:
        print(f"note: {path} has no metadata", file=sys.stderr)
    print(json.dumps({name: _opened(entries[name]) for name in sorted(entries)}, ensure_ascii=False, indent=2))
    return 0


def _opened(value: str) -> Any:
    """`value`, or what it holds if that is an object or a list in JSON."""
    if value[:1] not in ("{", "["):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
