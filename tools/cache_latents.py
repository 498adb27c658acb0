"""`python tools/cache_latents.py`: see `sd-train cache_latents --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sd_train.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["cache_latents", *sys.argv[1:]]))
