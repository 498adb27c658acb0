"""`python finetune/prepare_buckets_latents.py`: see `sd-train prepare_buckets_latents --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sd_train.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["prepare_buckets_latents", *sys.argv[1:]]))
