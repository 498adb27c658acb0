"""`python tools/convert_diffusers20_original_sd.py`: see `sd-train convert_diffusers20_original_sd --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sd_train.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["convert_diffusers20_original_sd", *sys.argv[1:]]))
