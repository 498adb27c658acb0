"""`sd-train make_captions`: a sentence about each image, by BLIP and its like, in text files beside the images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from sd_train.config.textfile import printable
from sd_train.errors import ConfigError, Problems
from sd_train.prepare.arguments import Parser, check_images_folder, check_words, extension_of
from sd_train.prepare.describing import (
    Troubles,
    check_numbers,
    default_workers,
    find_work,
    opened_ahead,
    tell_work,
    write_sidecar,
)  # fmt: skip
from sd_train.prepare.listing import find_images, metadata_key, tidy_folders
from sd_train.randomness import derive

if TYPE_CHECKING:
    from sd_train.prepare.captioner import Seen

_PRECISIONS = ("no", "fp16", "bf16")
_MOST_TOKENS = 1000
_LEAST_TOKENS = 5
_MOST_BEAMS = 64


def main(argv: Sequence[str]) -> int:
    """Caption what has no caption; 0, or 3 if images were left out.

    Raises:
        UserError: if the options are wrong, the model cannot be used or the disk refuses.
    """
    given = _parser().parse_args(list(argv))
    _check(given)
    extension = extension_of(given.caption_extension)
    images = find_images(given.train_data_dir, given.recursive)
    work = find_work(images, extension, given.overwrite)
    tell_work(work, extension)
    tidy_folders((image.parent for image in images), extension)
    troubles = Troubles()
    if work.missing:
        _caption(given, work.missing, troubles)
    troubles.summary(len(work.missing), len(images), "captioned")
    return troubles.exit_code


def _caption(given: argparse.Namespace, missing: list[tuple[Path, Path]], troubles: Troubles) -> None:
    """Write the captions of `missing`, (image, text file) pairs."""
    # torch takes seconds to import: bad options and --help must not wait for it.
    from sd_train.data.images import decode
    from sd_train.prepare.caption_models import without_writing
    from sd_train.prepare.captioner import Captioner, Wording, choose_device, find_captioner

    folder, device = find_captioner(given.caption_weights), choose_device(given.device)
    model = Captioner(folder, device, given.mixed_precision, given.prompt)
    wording = Wording(
        num_beams=given.num_beams if given.beam_search else None,
        top_p=given.top_p,
        max_length=given.max_length,
        min_length=given.min_length,
    )

    def see(image: Path) -> Seen:
        return model.see(decode(image).pixels)

    images = [image for image, _ in missing]
    workers = given.max_data_loader_n_workers or default_workers()
    with tqdm(total=len(images), desc="captioning", unit="image", file=sys.stderr, dynamic_ncols=True) as bar:
        for batch in opened_ahead(images, see, given.batch_size, workers, troubles):
            places = [place for place, _ in batch]
            seeds = [_seed(given, images[place]) for place in places]
            for place, caption in zip(places, model([seen for _, seen in batch], wording, seeds), strict=True):
                image, target = missing[place]
                text = without_writing(caption) if given.remove_words else caption
                if given.debug:
                    print(f"{printable(str(image))}: {text}")
                write_sidecar(image, target, text, troubles)
            bar.update(len(batch))


def _seed(given: argparse.Namespace, image: Path) -> int:
    """Of what is drawn for `image`: the same wherever the folder is."""
    return derive(given.seed, "caption", metadata_key(image, given.train_data_dir, full_path=False)) >> 1


def _check(given: argparse.Namespace) -> None:
    """
    Raises:
        ConfigError: with every problem of the options.
    """
    problems = Problems()
    check_images_folder(given.train_data_dir, problems)
    check_numbers(given, problems)
    if not 1 <= given.num_beams <= _MOST_BEAMS:
        problems.add("--num_beams", given.num_beams, f"must be 1 to {_MOST_BEAMS}", "write e.g. --num_beams 4")
    if not 0 < given.top_p <= 1:
        problems.add("--top_p", given.top_p, "must be above 0, and at most 1", "write e.g. --top_p 0.9")
    if not 1 <= given.max_length <= _MOST_TOKENS:
        problems.add("--max_length", given.max_length, f"must be 1 to {_MOST_TOKENS}", "write e.g. --max_length 75")
    if given.min_length is None:
        given.min_length = min(_LEAST_TOKENS, given.max_length)
    elif not 0 <= given.min_length <= given.max_length:
        rule = f"must be 0 to --max_length, which is {given.max_length}"
        problems.add("--min_length", given.min_length, rule, "write e.g. --min_length 5")
    check_words("--prompt", given.prompt, problems)
    problems.raise_if_any(ConfigError)
    if given.num_beams > 1 and not given.beam_search:
        print("note: --num_beams has no effect without --beam_search, as in sd-scripts: captions are drawn",
              file=sys.stderr)  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    from sd_train.prepare.caption_models import DEFAULT_CAPTIONER, PUBLISHED

    listed = "\n".join(f"  {name}" for name in PUBLISHED)
    parser = Parser("make_captions", "Write a sentence about each image beside it.")
    parser.epilog = f"""Images whose caption is there already are left out, so that an interrupted command is simply
given again; --overwrite captions them anew. A broken image is named and left out, and the exit code is then 3.

Without --beam_search captions are drawn (nucleus sampling): from --seed and the image's path in the folder, so that
--batch_size and the other images do not change them.

--caption_weights is a folder or a hub id of any model that transformers loads as one from images to text, for instance
{listed}

For instance:
  sd-train make_captions photos --beam_search --num_beams 4 --batch_size 8 --caption_extension .txt"""
    add = parser.add_argument
    add("train_data_dir", type=Path, metavar="FOLDER", help="the folder of images")
    add("--recursive", action="store_true", help="its sub-folders too")
    add("--caption_extension", "--caption_extention", metavar="EXTENSION", default=".caption",
        help="of the text files (default .caption)")  # fmt: skip
    add("--overwrite", action="store_true", help="caption images anew that have a caption")
    add("--batch_size", metavar="N", type=int, default=1, help="images at once (default 1)")
    add("--max_data_loader_n_workers", metavar="N", type=int, help="threads that open images (default: up to 4)")
    add("--debug", action="store_true", help="print each caption")
    model = parser.add_argument_group("the model")
    add = model.add_argument
    add("--caption_weights", "--model_id", metavar="MODEL", default=DEFAULT_CAPTIONER, help="folder or hub id (default "
        f"{DEFAULT_CAPTIONER})")  # fmt: skip
    add("--device", metavar="NAME", default="auto", help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)")
    add("--mixed_precision", choices=_PRECISIONS, default="no", help="precision of the model (default no: 32 bits)")
    words = parser.add_argument_group("the words")
    add = words.add_argument
    add("--beam_search", action="store_true", help="the likeliest caption of --num_beams beams: nothing is drawn")
    add("--num_beams", metavar="N", type=int, default=1, help="beams of --beam_search (default 1)")
    add("--top_p", metavar="P", type=float, default=0.9, help="of nucleus sampling: words are drawn from those that "
        "make up this share (default 0.9)")  # fmt: skip
    add("--max_length", metavar="N", type=int, default=75, help="most tokens of a caption (default 75)")
    add("--min_length", metavar="N", type=int, help="fewest tokens of a caption (default 5, or --max_length if that "
        "is less)")  # fmt: skip
    add("--seed", metavar="N", type=int, default=42, help="of what is drawn (default 42)")
    add("--prompt", metavar="TEXT", help="what the caption goes on from, or the request to a model that chats; it does "
        "not become part of it (default: 'a picture of' with BLIP; '' is none)")  # fmt: skip
    add("--remove_words", action="store_true", help="leave out what the model says is written in the image: 'with the "
        "word stop on it'")  # fmt: skip
    return parser
