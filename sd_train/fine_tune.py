"""Train a model's own weights on captioned images: `python -m sd_train.fine_tune`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sd_train.entry import train_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` (default: the process's own); the exit code."""
    return train_command("fine_tune", sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
