"""`python finetune/make_captions.py`: see `sd-train make_captions --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sd_train.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["make_captions", *sys.argv[1:]]))
