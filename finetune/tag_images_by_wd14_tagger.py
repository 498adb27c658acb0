"""`python finetune/tag_images_by_wd14_tagger.py`: see `sd-train tag_images_by_wd14_tagger --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sd_train.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["tag_images_by_wd14_tagger", *sys.argv[1:]]))
