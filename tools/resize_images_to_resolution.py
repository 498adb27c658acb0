"""`python tools/resize_images_to_resolution.py`: see `sd-train resize_images_to_resolution --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sd_train.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["resize_images_to_resolution", *sys.argv[1:]]))
