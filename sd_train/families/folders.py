"""Models in diffusers' folders: a folder for each network, with its configuration and its tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_train.config.textfile import read_text
from sd_train.errors import ModelError
from sd_train.families.keys import check_numbers, published_text_name, unet_shape_of
from sd_train.families.keys_original import TensorPair, clip_pairs, current_vae_name, unet_pairs, vae_pairs
from sd_train.families.pickles import read_pickled_tensors
from sd_train.families.published import FamilyName
from sd_train.families.sources import Change, Derived, DictSource, Part, RenamedSource, SafetensorsSource, TensorSource

_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_VARIANTS = ("", ".fp16", ".bf16", ".fp32")
"""What stands before `.safetensors` in the files' names; the first that is there is read."""

_ROLES = ("text_encoder", "text_encoder_2")
_MOST_LAYERS = 100
"""Of a network, or of a block; no network that is known has half of it."""
_MOST_LEVELS = 16
"""Of a network; those that are known have up to four."""


@dataclass(frozen=True)
class ModelFolder:
    """What a folder holds."""

    family: FamilyName
    parts: dict[str, Part]
    scheduler: dict[str, Any] | None
    tokenizers: dict[str, Path]
    """By "tokenizer", "tokenizer_2"."""
    metadata: dict[str, str]


def read_folder(folder: Path, ema: bool = False) -> ModelFolder:
    """The model in `folder`, which holds `model_index.json` or at least its networks' folders.

    Args:
        folder: where it is.
        ema: read the U-Net's running means, `unet_ema`, which diffusers' training scripts leave beside it.

    Raises:
        ModelError: if a network or some of its tensors are missing, or it is of another kind.
    """
    missing = [part for part in ("unet", "vae") if not (folder / part / "config.json").is_file()]
    texts = [role for role in _ROLES if (folder / role / "config.json").is_file()]
    if missing or not texts:
        found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise ModelError(
            f"{folder}: is no diffusers model folder, it has no {(*missing, 'text_encoder')[0]}/config.json (found: "
            f"{found}); give the folder that holds model_index.json, or one file"
        )
    place = folder / ("unet_ema" if ema else "unet")
    if ema and not place.is_dir():
        raise ModelError(f"{folder}: holds no running means (unet_ema), and --ema asks for them; leave --ema out")
    config = read_json(place / "config.json")
    family = _family(texts, config)
    _check_unet(place, config)
    source, metadata = _weights(place)
    parts = {
        "unet": _checked(place, config, RenamedSource(source, {n: Derived((n,)) for n in source.names()})),
        "vae": read_vae_folder(folder / "vae"),
        **{role: _read_text_encoder(folder / role) for role in texts},
    }
    scheduler = folder / "scheduler" / "scheduler_config.json"
    tokenizers = {name: folder / name for name in ("tokenizer", "tokenizer_2") if (folder / name).is_dir()}
    return ModelFolder(family, parts, read_json(scheduler) if scheduler.is_file() else None, tokenizers, metadata)


def read_vae_folder(folder: Path) -> Part:
    """The autoencoder in `folder`, which holds its `config.json`.

    Raises:
        ModelError: if tensors are missing.
    """
    config = read_json(folder / "config.json")
    source, _ = _weights(folder)
    table: dict[str, Derived] = {}
    for name in source.names():
        ours = current_vae_name(name)
        matrix: Change = "matrix" if ".attentions." in ours and len(source.shape(name)) == 4 else "same"
        table[ours] = Derived((name,), matrix)
    return _checked(folder, config, RenamedSource(source, table))


def _read_text_encoder(folder: Path) -> Part:
    config = read_json(folder / "config.json")
    source, _ = _weights(folder)
    projection = folder.name == "text_encoder_2"
    table = {}
    for name in source.names():
        ours = published_text_name(name)
        if "position_ids" not in name and ours != "logit_scale" and (projection or ours != "text_projection.weight"):
            table[ours] = Derived((name,))
    return _checked(folder, config, RenamedSource(source, table))


def _family(texts: list[str], unet: dict[str, Any]) -> FamilyName:
    if "text_encoder_2" in texts:
        return "sdxl" if "text_encoder" in texts else "sdxl_refiner"
    return "sd2" if unet.get("use_linear_projection") else "sd1"


def _check_unet(folder: Path, config: dict[str, Any]) -> None:
    if config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None:
        raise ModelError(f"{folder}: is a U-Net told classes or images (unCLIP, upscaler), and those are not supported")
    if config.get("encoder_hid_dim_type") is not None or config.get("addition_embed_type") not in (None, "text_time"):
        raise ModelError(f"{folder}: is a U-Net of another family; only Stable Diffusion 1.x, 2.x and SDXL are known")


def _checked(folder: Path, config: dict[str, Any], source: RenamedSource) -> Part:
    """The part, if it has every tensor that its configuration asks for and no other."""
    try:
        check_config(folder.name, config)
        pairs = list(_pairs(folder.name, config, len(source.names())))
    except (KeyError, TypeError, ValueError, IndexError) as problem:
        raise ModelError(f"{folder / 'config.json'}: is not understood ({problem!r}); download it again") from None
    known = {name for pair in pairs for name in pair.published}
    needed = {name for pair in pairs if not pair.optional for name in pair.published}
    names = set(source.names())
    for title, strange in (("missing", sorted(needed - names)), ("unknown", sorted(names - known))):
        if strange:
            raise ModelError(
                f"{folder}: {len(strange)} tensors are {title}, e.g. {', '.join(strange[:3])}; its weights do not "
                "belong to its config.json, download the folder again"
            )
    return Part(config, source)


def check_config(network: str, config: dict[str, Any]) -> None:
    """Look at what is used before the networks are built; channels that are not told are diffusers' usual ones.

    Raises:
        ValueError: for what is no number where it must be one, and for so many layers that their names alone would fill
            the memory.
    """
    if network not in _ROLES:
        name = "in_channels" if network.startswith("unet") else "latent_channels"
        if type(count := config.setdefault(name, 4)) is not int or count < 1:
            raise ValueError(f"{name} = {str(count)[:40]!r}")
    scale = config.get("scaling_factor", 1.0)
    if not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"scaling_factor = {str(scale)[:40]!r}")
    names = ("num_hidden_layers", "layers_per_block", "transformer_layers_per_block")
    todo = [config.get(name) for name in (*names, "reverse_transformer_layers_per_block")]
    while todo:
        value = todo.pop()
        if isinstance(value, list | tuple):
            _check_levels(value)
            todo += value
        elif isinstance(value, int) and value > _MOST_LAYERS:
            raise ValueError(f"{value} layers")
    for name in ("block_out_channels", "down_block_types", "up_block_types"):
        _check_levels(config.get(name, ()))


def _check_levels(value: Sized) -> None:
    if len(value) > _MOST_LEVELS:
        raise ValueError(f"{len(value)} levels")


def _pairs(name: str, config: dict[str, Any], tensors: int) -> Iterable[TensorPair]:
    """The names of network `name`, which `tensors` tensors are there for."""
    if name in ("unet", "unet_ema"):
        shape = unet_shape_of(config)
        # Each number within its limits, their product may still be millions.
        check_numbers(sum(map(sum, (*shape.down, *shape.up))), tensors, "transformer blocks")
        return unet_pairs(shape)
    if name not in _ROLES:
        return vae_pairs(len(config["block_out_channels"]), config.get("layers_per_block", 1))
    pairs = clip_pairs(config["num_hidden_layers"])
    if name == "text_encoder_2":
        pairs.append(TensorPair("text_projection.weight", ("text_projection.weight",)))
    return pairs


def _weights(folder: Path) -> tuple[TensorSource, dict[str, str]]:
    """The tensors in `folder`, safetensors before pickles and full precision before half, and their metadata."""
    for end, read in ((".safetensors", _open_safetensors), (".bin", _open_pickles)):
        for variant in _VARIANTS:
            for stem in _STEMS:
                index = folder / f"{stem}{end}.index{variant}.json"
                if variant and not index.is_file():
                    index = folder / f"{stem}{variant}{end}.index.json"
                if index.is_file():
                    return read(_shards(index))
                if (path := folder / f"{stem}{variant}{end}").is_file():
                    return read([path])
    found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    raise ModelError(
        f"{folder}: holds no weights (found: {found}); expected {_STEMS[0]}.safetensors or {_STEMS[1]}.safetensors, "
        "in one piece or several"
    )


def _shards(index: Path) -> list[Path]:
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict):
        raise ModelError(f"{index}: lists no files (weight_map); download it again")
    paths = [index.parent / str(name) for name in dict.fromkeys(table.values())]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise ModelError(f"{index}: names files that are not there: {', '.join(missing[:3])}; download them")
    return paths


def _open_safetensors(paths: list[Path]) -> tuple[TensorSource, dict[str, str]]:
    source = SafetensorsSource.open(paths)
    return source, source.metadata


def _open_pickles(paths: list[Path]) -> tuple[TensorSource, dict[str, str]]:
    tensors = {name: tensor for path in paths for name, tensor in read_pickled_tensors(path).items()}
    return DictSource(tensors), {}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON table in `path`.

    Raises:
        ModelError: if it is none.
    """
    try:
        content = json.loads(read_text(path, ModelError))
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: is no JSON table; download it again")
    return content
