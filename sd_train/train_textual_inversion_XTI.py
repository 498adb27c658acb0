"""sd-scripts' name for extended textual inversion: `python -m sd_train.train_textual_inversion_XTI`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sd_train.entry import train_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's own); the exit code."""
    return train_command("train_textual_inversion", ["--xti", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
