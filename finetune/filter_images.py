"""`python finetune/filter_images.py`: see `sd-train filter_images --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sd_train.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["filter_images", *sys.argv[1:]]))
