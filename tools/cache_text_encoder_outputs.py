"""`python tools/cache_text_encoder_outputs.py`: see `sd-train cache_text_encoder_outputs --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sd_train.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["cache_text_encoder_outputs", *sys.argv[1:]]))
