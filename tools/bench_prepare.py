"""How long the preparation of a large folder takes.

`python tools/bench_prepare.py [--images 20000]`: seconds of each command that reads or writes captions.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sd_train.__main__ import main as sd_train

TAGS = "1girl, solo, long_hair, blue_eyes, shirt, white shirt, outdoors, sky, tree, rating:safe"


def fill(folder: Path, images: int) -> None:
    """Put `images` images with captions and tags into `folder`, a thousand to each sub-folder.

    The images themselves are empty files: none of the commands opens them.
    """
    for number in range(images):
        place = folder / f"{number // 1000:03}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"picture {number % 1000}.png").touch()
        (place / f"picture {number % 1000}.caption").write_text(f"a young woman with {number} flowers\n")
        (place / f"picture {number % 1000}.txt").write_text(f"{TAGS}, tag {number % 97}\n")


def main() -> None:
    """Time the commands in a temporary folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    images = parser.parse_args().images
    with tempfile.TemporaryDirectory() as place:
        folder, meta = Path(place, "images"), Path(place, "meta.json")
        fill(folder, images)
        commands: dict[str, list[object]] = {
            "merge_captions_to_metadata": [folder, meta, "--recursive"],
            "merge_dd_tags_to_metadata": [folder, meta, "--recursive"],
            "merge_all_to_metadata": [folder, Path(place, "all.json"), "--recursive"],
            "clean_captions_and_tags": [meta, Path(place, "clean.json")],
            "caption stats": [folder, "--recursive", "--caption_extension", ".txt"],
            "caption edit (preview)": [folder, "--recursive", "--caption_extension", ".txt", "--sort", "--show", "0"],
            "caption edit --apply": [
                folder, "--recursive", "--caption_extension", ".txt", "--sort", "--show", "0", "--apply",
            ],
            "caption edit --undo": [folder, "--undo"],
        }  # fmt: skip
        for name, words in commands.items():
            started = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                code = sd_train([*name.split(" (")[0].split(" --")[0].split(), *map(str, words)])
            print(f"{name:28} {images:,} images: {time.perf_counter() - started:6.2f} s, exit code {code}")


if __name__ == "__main__":
    main()
