"""`python finetune/merge_captions_to_metadata.py`: see `sd-train merge_captions_to_metadata --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sd_train.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["merge_captions_to_metadata", *sys.argv[1:]]))
