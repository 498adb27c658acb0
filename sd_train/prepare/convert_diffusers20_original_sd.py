"""`sd-train convert_diffusers20_original_sd`: `sd-train convert` with sd-scripts' arguments."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from sd_train.commands import convert
from sd_train.errors import ConfigError
from sd_train.prepare.arguments import Parser

_ABOUT = """Convert a model between one file and a diffusers folder: sd-scripts' arguments for `sd-train convert`, which
can do more. A name that ends in .safetensors or .ckpt is a file, any other a folder. The kind of model is recognised;
SDXL is converted too."""

_NEEDLESS = {
    "unet_use_linear_projection": "what the model has is recognised",
    "variant": "weights of any variant are found",
    "reference_model": "scheduler and tokenizers are those of the model itself",
    "use_safetensors": "folders are always written so",
}
"""What is accepted without effect, and why."""
_COUNTERS = {"epoch": "ss_epoch", "global_step": "ss_steps"}
"""How they are called in metadata; a .ckpt file has entries of their own too."""


def main(argv: Sequence[str]) -> int:
    """Convert the model that `argv` names.

    Raises:
        UserError: as `sd-train convert`.
    """
    given = _parser().parse_args(list(argv))
    for name, reason in _NEEDLESS.items():
        if getattr(given, name):
            print(f"note: --{name} has no effect: {reason}", file=sys.stderr)
    for name in _COUNTERS:
        if getattr(given, name) < 0:
            raise ConfigError(f"--{name} = {getattr(given, name)}: must be 0 or more; leave it out")
    words = [given.model_to_load, given.model_to_save]
    precision = given.save_precision_as if given.save_precision_as != "no" else given.precision
    if given.precision is not None and precision != given.precision:
        raise ConfigError(
            f"--{given.precision} and --save_precision_as {given.save_precision_as}: contradict one another; leave one "
            "of the two out"
        )
    words += ["--save_precision", precision] if precision is not None else []
    words += ["--v2"] if given.v2 else []
    if given.v_parameterization is not None:
        words += ["--v_parameterization" if given.v_parameterization else "--no_v_parameterization"]
    entries = {_COUNTERS[name]: str(value) for name in _COUNTERS if (value := getattr(given, name))}
    entries |= given.metadata or {}
    words += ["--metadata", json.dumps(entries)] if entries else []
    words += ["--overwrite"] if given.overwrite else []
    if Path(given.model_to_save).suffix.lower() == ".ckpt":
        words += ["--save_model_as", "ckpt"]
    return convert.main(words)


def _parser() -> argparse.ArgumentParser:
    parser = Parser("convert_diffusers20_original_sd", _ABOUT)
    add = parser.add_argument
    add("model_to_load", help="a file, a diffusers folder or a hub id")
    add("model_to_save", help="a .safetensors or .ckpt file, or a folder to make")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--v1", action="store_true", help="the model is a Stable Diffusion 1.x one; it is recognised")
    kinds.add_argument("--v2", action="store_true", help="the model is a Stable Diffusion 2.x one (only checked)")
    predicts = parser.add_mutually_exclusive_group()
    predicts.add_argument("--v_parameterization", action="store_true", default=None, help="the model predicts v (2.x "
        "for 768 pixels), where the file does not tell")  # fmt: skip
    predicts.add_argument("--no_v_parameterization", dest="v_parameterization", action="store_false", help="it "
        "predicts the noise (2.x for 512 pixels)")  # fmt: skip
    precisions = parser.add_mutually_exclusive_group()
    for name in ("fp16", "bf16", "float"):
        precisions.add_argument(f"--{name}", action="store_const", const=name, dest="precision", help=f"write {name}")
    add("--save_precision_as", choices=("no", "fp16", "bf16", "float"), default="no", help="another "
        "way to say so (default no: each tensor keeps its own)")  # fmt: skip
    add("--epoch", type=int, default=0, metavar="N", help="epochs of training to note in the file (default: none)")
    add("--global_step", type=int, default=0, metavar="N", help="steps of training to note in the file (default: none)")
    add("--metadata", type=convert.metadata_entries, metavar="JSON", help="entries to write into the file")
    add("--overwrite", action="store_true", help="replace what is there, as sd-scripts always does")
    for name in ("unet_use_linear_projection", "use_safetensors"):
        add(f"--{name}", action="store_true", help=f"accepted without effect: {_NEEDLESS[name]}")
    for name in ("variant", "reference_model"):
        add(f"--{name}", metavar="NAME", help=f"accepted without effect: {_NEEDLESS[name]}")
    return parser
