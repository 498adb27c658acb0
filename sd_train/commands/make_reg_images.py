"""`sd-train make_reg_images`: regularisation images, drawn from the base model with the prompt of the class."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from sd_train.commands.sample import PRECISIONS, SampleOptions, check_folder
from sd_train.errors import ConfigError, Problems
from sd_train.prompts import CANONICAL_SAMPLERS, MAXIMUM_SEED, SAMPLER_NAMES, Prompt, read_defaults

MOST_IMAGES = 100_000
MOST_AT_ONCE = 256

_EPILOG = """Picture number n is n.png and has the seed --seed + n, whatever the batch and the number of processes
(torchrun --nproc_per_node 2 -m sd_train make_reg_images ...). Pictures that are in the folder already are kept, and
what is missing is drawn: an interrupted command is simply given again, or with a higher --num_images. A folder whose
pictures were drawn with another prompt, model or setting is refused. Paths are printed on standard output, progress on
standard error.

For instance:
  sd-train make_reg_images --pretrained_model_name_or_path model.safetensors --class_prompt "a photo of a dog" \\
    --output_dir reg/dog --num_images 200 --batch_size 4"""


@dataclass(frozen=True)
class RegImageOptions:
    """What is drawn, with what."""

    drawn: SampleOptions
    """Its only prompt is that of the class, with the seed of picture 0; width or height 0: as the model was trained."""
    num_images: int
    batch_size: int
    captions: str | None
    """Ending of the caption files, with its dot; None: none are written."""


class _Parser(argparse.ArgumentParser):
    """Ends in our kind of error."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; sd-train make_reg_images --help lists the options")


def main(argv: Sequence[str]) -> int:
    """Draw what is missing; 0 if all pictures are there.

    Raises:
        UserError: if the options are wrong, the folder holds other pictures, or the model cannot draw.
    """
    logging.addLevelName(logging.WARNING, "warning")
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    options = read_options(argv)
    from sd_train.commands.reg_images import draw_missing

    draw_missing(options)
    return 0


def read_options(argv: Sequence[str]) -> RegImageOptions:
    """The options in `argv`.

    Raises:
        ConfigError: with every problem.
        SystemExit: after `--help`.
    """
    given = _parser().parse_args(list(argv))
    problems = Problems()
    prompt = _prompt(given, problems)
    if given.sampler.lower() not in SAMPLER_NAMES:
        problems.add("--sampler", given.sampler, "is no known sampler", f"use one of {', '.join(CANONICAL_SAMPLERS)}")
    for name, most in (("num_images", MOST_IMAGES), ("batch_size", MOST_AT_ONCE)):
        if not 1 <= getattr(given, name) <= most:
            problems.add(f"--{name}", getattr(given, name), f"must be 1 to {most:,}", f"write e.g. --{name} 4")
    if given.clip_skip is not None and given.clip_skip < 1:
        problems.add("--clip_skip", given.clip_skip, "must be 1 or more", "leave it out, or write e.g. --clip_skip 2")
    check_folder(given.output_dir, problems)
    problems.raise_if_any(ConfigError)
    drawn = SampleOptions(
        model=given.pretrained_model_name_or_path,
        prompts=(prompt,),
        loras=(),
        embeddings=(),
        output_dir=given.output_dir,
        sampler=given.sampler.lower(),
        count=given.num_images,
        grid=False,
        mixed_precision=given.mixed_precision,
        clip_skip=given.clip_skip,
        v2=given.v2,
        v_parameterization=given.v_parameterization,
        sdxl=given.sdxl,
        vae=given.vae,
    )
    captions = None if given.captions is None else "." + given.captions.removeprefix(".")
    return RegImageOptions(drawn, given.num_images, given.batch_size, captions)


def _prompt(given: argparse.Namespace, problems: Problems) -> Prompt:
    """The prompt of the class; its words are read as text alone, since they also become the caption."""
    flags = {"negative_prompt": "negative_prompt", "width": "width", "height": "height", "seed": "seed"}
    flags |= {"steps": "sample_steps", "scale": "scale"}
    values = {key: getattr(given, flag) for flag, key in flags.items() if getattr(given, flag) is not None}
    names = {key: f"--{flag}" for flag, key in flags.items()}
    prompt = read_defaults(values, lambda key: names[key], problems)
    if not 0 <= given.seed <= MAXIMUM_SEED - MOST_IMAGES:
        way_out = "write e.g. --seed 0; pictures count up from it"
        problems.add("--seed", given.seed, "must be 0 or more, and leave room for the seeds that follow", way_out)
    text = " ".join(given.class_prompt.split())
    if not text:
        problems.add("--class_prompt", given.class_prompt, "is empty", 'write what the class is: "a photo of a dog"')
    # Not known before the model is: 0.
    width, height = (getattr(prompt, side) if side in values else 0 for side in ("width", "height"))
    return replace(prompt, text=text, seed=given.seed, width=width, height=height)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "sd-train make_reg_images",
        usage="sd-train make_reg_images --pretrained_model_name_or_path MODEL --class_prompt TEXT --output_dir FOLDER "
        "[OPTIONS]",
        description="Draw regularisation images: what the base model makes of a class before it is taught a subject of "
        "it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--pretrained_model_name_or_path", metavar="MODEL", required=True, help="the model that will be trained: a "
        ".safetensors or .ckpt file, a diffusers folder, or a hub id (owner/name)")  # fmt: skip
    add("--class_prompt", metavar="TEXT", required=True, help='the class without the word that is taught: "a photo of '
        'a dog"')  # fmt: skip
    add("--output_dir", metavar="FOLDER", type=Path, required=True, help="where the pictures go; a folder of its own "
        "for each class")  # fmt: skip
    add("--num_images", metavar="N", type=int, default=200, help="pictures in the folder at the end (default 200)")
    add("--batch_size", metavar="N", type=int, default=1, help="pictures that are drawn at once (default 1)")
    add("--captions", choices=("txt", "caption", ".txt", ".caption"), help="also write the prompt beside each picture, "
        "with this ending")  # fmt: skip
    drawn = parser.add_argument_group("how they are drawn")
    add = drawn.add_argument
    add("--negative_prompt", metavar="TEXT", help="default: none")
    add("--width", metavar="PIXELS", type=int, help="default: as the model was trained (512, 768 or 1024)")
    add("--height", metavar="PIXELS", type=int, help="the same")
    add("--seed", metavar="N", type=int, default=0, help="of picture 0; the others count up from it (default 0)")
    add("--steps", metavar="N", type=int, help=f"1 to 1000 (default {Prompt.steps})")
    add("--scale", metavar="NUMBER", type=float, help=f"guidance; 1 is none (default {Prompt.scale})")
    add("--sampler", metavar="NAME", default="ddim", help=f"{', '.join(CANONICAL_SAMPLERS)} (default ddim)")
    model = parser.add_argument_group("the model")
    add = model.add_argument
    add("--vae", metavar="PATH", help="autoencoder in place of the model's own: a file, a folder or a whole model")
    add("--clip_skip", metavar="N", type=int, help="the text encoder's n-th layer from the end, as A1111 counts")
    add("--mixed_precision", choices=PRECISIONS, default="no", help="precision of the arithmetic (default no)")
    add("--v2", action="store_true", help="the model is a Stable Diffusion 2.x one; it is recognised without")
    add("--sdxl", action="store_true", help="the model is an SDXL one; it is recognised without")
    add("--v_parameterization", action="store_const", const=True, help="the model predicts v")
    add("--no_v_parameterization", action="store_const", const=False, dest="v_parameterization", help="it does not")
    return parser
