"""`sd-train convert SRC DST`: a model as another kind of file, in another precision, with another VAE, pruned."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_train.errors import ConfigError

if TYPE_CHECKING:
    from sd_train.families.parts import ModelParts
    from sd_train.families.saving import SaveForm

FORMS = ("safetensors", "ckpt", "diffusers", "diffusers_safetensors")
PRECISIONS = {"float": "float32", "fp16": "float16", "bf16": "bfloat16"}

_ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2-512",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sdxl_refiner": "stable-diffusion-xl-v1-refiner",
}
_STALE = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash", "format")
"""Metadata that a new file does not take over."""


def main(argv: Sequence[str]) -> int:
    """Convert the model that `argv` names.

    Raises:
        ConfigError: if the arguments contradict one another or something is in the way.
        ModelError: if the model cannot be read.
        RunError: if the disk refuses.
    """
    given = _parser().parse_args(argv)
    form = _form(given.dst, given.save_model_as)
    sources = [("SRC", given.src)] + ([("--vae", given.vae)] if given.vae else [])
    check_target(sources, given.dst, form, given.overwrite)
    # torch takes seconds to import, and --help does not need it.
    import torch

    from sd_train.families.parts import ModelRequest, read_model
    from sd_train.families.saving import save_model

    request = ModelRequest(
        given.src, given.v2, given.v_parameterization, given.sdxl, given.vae, ema=given.ema, option="SRC"
    )
    parts = read_model(replace(request, guess=not form.startswith("diffusers")))
    dtype = None if given.save_precision is None else getattr(torch, PRECISIONS[given.save_precision])
    print(f"read  {given.src}: {_described(parts)}")
    keep = not given.prune and not form.startswith("diffusers")
    metadata = _metadata(parts, given.dst.stem, form) | (given.metadata or {})
    save_model(given.dst, parts, form, dtype, metadata, leftovers=keep, option="DST")
    print(
        f"wrote {given.dst}: {form}, {_size(given.dst)}" + (f", {given.save_precision}" if given.save_precision else "")
    )
    for line in _left(parts, keep, form):
        print(f"      {line}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("sd-train convert", description=__doc__, allow_abbrev=False)
    parser.add_argument("src", metavar="SRC", help="a .safetensors or .ckpt file, a diffusers folder or a hub id")
    parser.add_argument("dst", metavar="DST", type=Path, help="a .safetensors or .ckpt file, or a folder to make")
    parser.add_argument(
        "--save_model_as", choices=FORMS, help="default: what the name of DST says; pickles (ckpt) only where asked for"
    )
    parser.add_argument("--save_precision", choices=tuple(PRECISIONS), help="default: each tensor keeps its own")
    parser.add_argument("--vae", help="put this autoencoder into the model: a file, a folder or a whole model")
    means = parser.add_mutually_exclusive_group()
    means.add_argument("--ema", action="store_true", help="the running means (EMA) become the U-Net's weights")
    means.add_argument("--no_ema", dest="ema", action="store_false", help="the plain weights are kept (default)")
    parser.add_argument(
        "--prune", action="store_true", help="leave out running means and what training left; folders never have them"
    )
    parser.add_argument("--v2", action="store_true", help="the model is Stable Diffusion 2.x (only checked)")
    parser.add_argument("--sdxl", action="store_true", help="the model is SDXL (only checked)")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument(
        "--v_parameterization", action="store_true", default=None, help="the model predicts v, whatever it says itself"
    )
    kinds.add_argument(
        "--no_v_parameterization", dest="v_parameterization", action="store_false", help="the model predicts the noise"
    )
    parser.add_argument(
        "--metadata", type=metadata_entries, metavar="JSON", help="entries to write into the file: an object of texts"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    return parser


def metadata_entries(text: str) -> dict[str, str]:
    """A JSON object of texts."""
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, dict):
        raise argparse.ArgumentTypeError('must be a JSON object, e.g. {"author": "me"}')
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in entries.items()}


_FORMS: dict[str, SaveForm] = {".safetensors": "safetensors", ".ckpt": "ckpt", ".pt": "ckpt"}
_LIKE_FILES = (".safetensor", ".sft", ".bin", ".pth", ".ckp", ".onnx", ".gguf", ".zip")


def named_form(target: Path, option: str, way_out: str) -> SaveForm | None:
    """The form of file that the name of `target`, given as `option`, says; None where it is a folder's.

    Raises:
        ConfigError: if it ends like a file that is not written.
    """
    ending = target.suffix.lower()
    if ending in _LIKE_FILES and not target.is_dir():
        raise ConfigError(
            f"{option} = {target}: ends like a file, but no such file is written; end it in .safetensors or .ckpt, or "
            f"{way_out}"
        )
    return _FORMS.get(ending)


def _form(target: Path, asked: str | None) -> Any:
    """The form to write, from the name of `target` unless asked for."""
    if asked is None:
        return named_form(target, "DST", "give --save_model_as diffusers for a folder of that name") or "diffusers"
    named = _FORMS.get(target.suffix.lower())
    if asked.startswith("diffusers") != (named is None) or (named is not None and named != asked):
        wanted = "a folder" if asked.startswith("diffusers") else f"a file that ends in .{asked}"
        raise ConfigError(f"--save_model_as = {asked}: writes {wanted}, and DST is {target}; change one of the two")
    return asked


def check_target(
    sources: Sequence[tuple[str, str]], target: Path, form: str, overwrite: bool, option: str = "DST"
) -> None:
    """Whether a model may be written to `target` as `form`.

    Args:
        sources: files and folders that are read meanwhile, behind the options that name them.
        target: what `option` names.
        form: one of `FORMS`.
        overwrite: whether something there may be replaced.
        option: for messages.

    Raises:
        ConfigError: if something is there that is not to be replaced.
    """
    if not os.path.lexists(target):
        return
    for name, source in sources:
        if not os.path.exists(source) or not Path(source).resolve().is_relative_to(target.resolve()):
            continue
        if target.resolve() == Path(source).resolve():
            raise ConfigError(f"{target}: is {name} itself; choose another {option}")
        raise ConfigError(f"{source}: lies in {option}, which is replaced as a whole; choose another {option}")
    if not overwrite:
        raise ConfigError(f"{target}: exists already; choose another {option}, or replace it with --overwrite")
    if target.is_dir() != form.startswith("diffusers"):
        raise ConfigError(f"{target}: is {'a folder' if target.is_dir() else 'a file'}; choose another {option}")
    if target.is_dir() and any(target.iterdir()) and not (target / "model_index.json").is_file():
        raise ConfigError(f"{target}: is a folder with other things than a model; choose another {option} or remove it")


def _described(parts: ModelParts) -> str:
    from sd_train.families.published import TITLES

    words = {"epsilon": "predicts noise", "v_prediction": "predicts v", "sample": "predicts the picture"}
    predicts = words[parts.prediction] if parts.told else "whether it predicts noise or v is not told"
    kind = [TITLES[parts.family], predicts, parts.form]
    if (channels := parts.parts["unet"].config["in_channels"]) != 4:
        kind.append(f"{channels} input channels")
    if parts.zero_terminal_snr:
        kind.append("zero terminal SNR")
    return ", ".join(kind)


def _metadata(parts: ModelParts, title: str, form: str) -> dict[str, str]:
    """The source's entries, and the least that modelspec asks for (https://github.com/Stability-AI/ModelSpec)."""
    from sd_train.families.published import PREDICTION_WORDS

    metadata = {key: value for key, value in parts.metadata.items() if key not in _STALE}
    v_prediction = parts.prediction == "v_prediction"
    architecture = (
        "stable-diffusion-v2-768-v" if parts.family == "sd2" and v_prediction else _ARCHITECTURES[parts.family]
    )
    if parts.told:
        metadata["modelspec.prediction_type"] = PREDICTION_WORDS[parts.prediction]
        metadata.setdefault("modelspec.architecture", architecture)
    # Whose names the tensors have.
    stability = "https://github.com/Stability-AI/generative-models"
    metadata["modelspec.implementation"] = "diffusers" if form.startswith("diffusers") else stability
    defaults: Mapping[str, str] = {"modelspec.sai_model_spec": "1.0.0", "modelspec.title": title}
    return {**defaults, **metadata}


def _left(parts: ModelParts, kept: bool, form: str) -> list[str]:
    """What became of tensors that are no weights of the networks."""
    means = [name for name in parts.leftovers.names() if name.startswith("model_ema.")]
    others = [name for name in parts.leftovers.names() if not name.startswith("model_ema.")]
    lines = []
    word = "kept" if kept else "left out"
    hint = "; leave them out with --prune" if kept else ""
    if means:
        lines.append(f"{word}: {len(means)} running means (model_ema.*){hint}")
    if others:
        lines.append(f"{word}: {len(others)} tensors that no network uses, e.g. {', '.join(sorted(others)[:3])}{hint}")
    if form.startswith("diffusers") and (extras := parts.extras.names()):
        lines.append(f"left out: {len(extras)} tensors that folders have no place for, e.g. {', '.join(extras[:2])}")
    return lines


def _size(path: Path) -> str:
    count = (
        sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) if path.is_dir() else path.stat().st_size
    )
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
