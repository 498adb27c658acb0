"""`python finetune/clean_captions_and_tags.py`: see `sd-train clean_captions_and_tags --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sd_train.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["clean_captions_and_tags", *sys.argv[1:]]))
