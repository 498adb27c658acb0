"""`sd-train lora check|merge|resize|extract|convert`: LoRA files examined, joined, shrunk, made and converted."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

PRECISIONS = {"float": "float32", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def main(argv: Sequence[str]) -> int:
    """Do what `argv` asks for; 3 if `check` finds something wrong.

    Raises:
        ConfigError: if the options contradict one another.
        ModelError: if a file is missing, damaged or does not fit.
        RunError: if the output exists already or cannot be written.
    """
    given = _parser().parse_args(argv)
    from sd_train.commands import lora_check, lora_make
    from sd_train.errors import ModelError

    if given.action == "check":
        return lora_check.run(given)
    actions = {
        "merge": lora_make.merge,
        "resize": lora_make.resize,
        "extract": lora_make.extract,
        "convert": lora_make.convert,
    }
    try:
        actions[given.action](given)
    except RuntimeError as problem:
        # torch.linalg.LinAlgError, which torch does not export.
        if "linalg" not in str(problem):
            raise
        raise ModelError(
            f"lora {given.action}: a weight cannot be decomposed ({problem}); are the files' values finite? "
            "sd-train lora check tells of a LoRA"
        ) from None
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("sd-train lora", description=__doc__, allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", required=True)

    checking = actions.add_parser("check", help="tell what a file holds and who reads it", allow_abbrev=False)
    checking.add_argument("file", type=Path, help="LoRA or LyCORIS file")
    checking.add_argument("--model", metavar="MODEL", help="also see whether it fits this model (file, folder, hub id)")
    checking.add_argument("--modules", action="store_true", help="list every module")
    checking.add_argument("--json", action="store_true", help="for machines, with every module")

    merging = actions.add_parser("merge", help="merge LoRAs into a model, or several into one LoRA", allow_abbrev=False)
    merging.add_argument("--models", type=Path, nargs="+", required=True, metavar="LORA", help="LoRA files")
    merging.add_argument("--ratios", type=float, nargs="+", metavar="N", help="multiplier of each (default: 1)")
    merging.add_argument("--sd_model", metavar="MODEL", help="merge into this model; without, into one LoRA")
    merging.add_argument(
        "--save_model_as",
        choices=("ckpt", "safetensors", "diffusers", "diffusers_safetensors"),
        help="of a model (default: by --save_to: .safetensors, .ckpt, else a folder)",
    )
    merging.add_argument(
        "--method", choices=("concat", "svd"), default="concat",
        help="of one LoRA: concat loses nothing, ranks add up (default); svd has --new_rank",
    )  # fmt: skip
    _add_ranks(merging, required=False)

    resizing = actions.add_parser("resize", help="give a LoRA another rank", allow_abbrev=False)
    resizing.add_argument("file", type=Path, help="LoRA file")
    _add_ranks(resizing, required=True)
    _add_method(resizing)

    extracting = actions.add_parser("extract", help="make a LoRA of the difference of two models", allow_abbrev=False)
    extracting.add_argument("--model_org", required=True, metavar="MODEL", help="the original")
    extracting.add_argument("--model_tuned", required=True, metavar="MODEL", help="the trained one")
    extracting.add_argument("--dim", type=int, default=4, help="rank (default 4)")
    extracting.add_argument("--conv_dim", type=int, help="rank of 3x3 convolutions (default: none of them)")
    extracting.add_argument(
        "--clamp_quantile", type=float, default=0.99,
        help="cut off elements of the factors beyond this share (default 0.99; 1: none)",
    )  # fmt: skip
    extracting.add_argument(
        "--min_diff", type=float, default=0.01, help="leave out text encoders that differ less (default 0.01)"
    )
    _add_method(extracting)

    converting = actions.add_parser("convert", help="write another format or algorithm", allow_abbrev=False)
    converting.add_argument("file", type=Path, help="LoRA or LyCORIS file")
    converting.add_argument(
        "--to", choices=("lora", "kohya", "diffusers"), required=True,
        help="lora: a plain LoRA of any algorithm, by --new_rank; kohya, diffusers: the keys of these programs",
    )  # fmt: skip
    _add_ranks(converting, required=False)
    _add_method(converting)

    for action in (merging, resizing, extracting, converting):
        action.add_argument("--save_to", type=Path, required=True, metavar="FILE", help="where the result goes")
        action.add_argument("--save_precision", choices=tuple(PRECISIONS), help="default: as the input")
        action.add_argument("--overwrite", action="store_true", help="an existing file is replaced")
        action.add_argument("--device", default="cpu", help="that computes, e.g. cuda (default cpu)")
    for action in (checking, merging, resizing, converting):
        action.add_argument(
            "--family", choices=("sd1", "sd2", "sdxl", "sdxl_refiner"), help="of the LoRA, where the file does not tell"
        )
    return parser


def _add_ranks(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument("--new_rank", type=int, required=required, metavar="N", help="rank; with a method, the most")
    parser.add_argument("--new_conv_rank", type=int, metavar="N", help="of 3x3 convolutions (default: --new_rank)")


def _add_method(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dynamic_method", choices=("sv_ratio", "sv_fro", "sv_cumulative"),
        help="choose each module's rank: by the ratio of singular values, or the share of their squares or sum",
    )  # fmt: skip
    parser.add_argument("--dynamic_param", type=float, metavar="N", help="its target, e.g. 20 or 0.95")
