"""`sd-train COMMAND ...`, `python -m sd_train COMMAND ...`."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from sd_train import __version__
from sd_train.entry import guarded
from sd_train.errors import ConfigError

COMMANDS = {
    "train_network": ("sd_train.train_network", "train a LoRA"),
    "sdxl_train_network": ("sd_train.sdxl_train_network", "the same for an SDXL model, as sd-scripts calls it"),
    "fine_tune": ("sd_train.fine_tune", "train a model's own weights on captioned images"),
    "sdxl_train": ("sd_train.sdxl_train", "the same for an SDXL model, as sd-scripts calls it"),
    "train_db": ("sd_train.train_db", "train a model's own weights on a subject (DreamBooth)"),
    "train_textual_inversion": ("sd_train.train_textual_inversion", "teach a model a new word (textual inversion)"),
    "sdxl_train_textual_inversion": (
        "sd_train.sdxl_train_textual_inversion", "the same for an SDXL model, as sd-scripts calls it",
    ),
    "train_textual_inversion_XTI": (
        "sd_train.train_textual_inversion_XTI", "the same with vectors of its own for each block (--xti)",
    ),
    "sample": ("sd_train.commands.sample", "draw pictures from a model, with LoRAs and embeddings"),
    "make_reg_images": ("sd_train.commands.make_reg_images", "draw regularisation images of a class"),
    "convert": ("sd_train.commands.convert", "convert a model between single files and diffusers folders"),
    "lora": ("sd_train.commands.lora", "check, merge, resize, extract and convert LoRA files"),
    "plan": ("sd_train.commands.plan", "say what a training will do, without loading the model"),
    "merge_captions_to_metadata": (
        "sd_train.prepare.merge_captions_to_metadata", "collect images' captions in a metadata file",
    ),
    "merge_dd_tags_to_metadata": ("sd_train.prepare.merge_dd_tags_to_metadata", "collect images' tags there"),
    "merge_all_to_metadata": ("sd_train.prepare.merge_all_to_metadata", "collect both there in one pass"),
    "clean_captions_and_tags": ("sd_train.prepare.clean_captions_and_tags", "tidy captions and tags by rules"),
    "caption": ("sd_train.commands.caption", "edit captions with a preview and undo; count their tags"),
    "doctor": ("sd_train.commands.doctor", "look for everything that is wrong or unusual in a dataset"),
    "verify_resume": ("sd_train.commands.verify_resume", "prove that a stopped training goes on to the bit, here"),
    "schedule": ("sd_train.commands.schedule", "draw the learning rates of a training"),
    "explain": ("sd_train.commands.explain", "say when an image is shown, with which crop, caption and timestep"),
    "cache": ("sd_train.commands.cache", "inspect, verify or clean the caches on disk"),
    "optimizers": ("sd_train.commands.optimizers", "list what --optimizer_type can name, and its arguments"),
    "schema": ("sd_train.commands.schema", "print the JSON Schema of run or dataset files"),
    "env": ("sd_train.commands.env", "say what a bug report needs to know about this machine"),
    "make_captions": ("sd_train.prepare.make_captions", "describe images in a sentence, by BLIP and its like"),
    "tag_images_by_wd14_tagger": ("sd_train.prepare.tag_images_by_wd14_tagger", "tag images by WD14 and its like"),
    "make_tiny_model": ("sd_train.commands.make_tiny_model", "write a tiny model with random weights"),
    "prepare_buckets_latents": (
        "sd_train.prepare.prepare_buckets_latents", "put images into buckets and their latents beside them",
    ),
    "filter_images": ("sd_train.prepare.filter_images", "find images that do harm, and leave them out or move them"),
    "resize_images_to_resolution": (
        "sd_train.prepare.resize_images_to_resolution", "write scaled-down copies of images",
    ),
    "cache_latents": ("sd_train.prepare.cache_latents", "fill the cache of a training's latents"),
    "cache_text_encoder_outputs": (
        "sd_train.prepare.cache_text_encoder_outputs", "fill the cache of a training's encoded captions",
    ),
    "convert_diffusers20_original_sd": (
        "sd_train.prepare.convert_diffusers20_original_sd", "convert, with sd-scripts' arguments",
    ),
    "merge_models": ("sd_train.prepare.merge_models", "mix whole models by weighted sum"),
    "show_metadata": ("sd_train.prepare.show_metadata", "print what a model file tells of itself"),
    "demo": ("sd_train.commands.demo", "teach a small model a new thing, and show it before and after"),
}


def usage() -> str:
    """The commands, a line each."""
    lines = [f"  {name:28} {about}" for name, (_, about) in COMMANDS.items()]
    return "usage: sd-train COMMAND [OPTIONS]   (sd-train COMMAND --help tells more)\n\n" + "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` names; the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"sd_train {__version__}")
        return 0
    return guarded(lambda: _run(words[0], words[1:]))


def _run(command: str, rest: Sequence[str]) -> int:
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"{command!r} is no command; {hint}use one of {', '.join(COMMANDS)}")
    found: int = importlib.import_module(COMMANDS[command][0]).main(rest)
    return found


if __name__ == "__main__":
    sys.exit(main())
