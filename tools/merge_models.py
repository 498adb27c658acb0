"""`python tools/merge_models.py`: see `sd-train merge_models --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sd_train.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["merge_models", *sys.argv[1:]]))
