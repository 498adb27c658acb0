"""Names of modules in LoRA files: every spelling in use <-> our role and published path."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from sd_train.families.keys import ModuleName, UNetShape, text_modules, unet_modules

SDXL_FAMILIES = ("sdxl", "sdxl_refiner")
TEXT_ROLES = ("text_encoder", "text_encoder_2")

_MOST_DEPTH = 10
_MOST_LAYERS = 32


def _uniform(*depths: int, added: bool) -> UNetShape:
    """Two residual blocks a level; `depths`: transformer blocks at each level, from the largest picture on."""
    down, up = tuple((depth,) * 2 for depth in depths), tuple((depth,) * 3 for depth in reversed(depths))
    return UNetShape(down, up, _MOST_DEPTH, added)


_SHAPES = {
    # Every level has attention, then none has: between them, every name that any model has.
    "all": (_uniform(*(_MOST_DEPTH,) * 4, added=True), _uniform(0, 0, 0, 0, added=True)),
    "sdxl": (_uniform(0, _MOST_DEPTH, _MOST_DEPTH, added=True),),
}

_PREFIXES = (
    ("lora_unet_", "unet"),
    ("oft_unet_", "unet"),
    ("lycoris_", "unet"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te_", "text_encoder"),
    ("unet.", "unet"),
    ("text_encoder_2.", "text_encoder_2"),
    ("text_encoder.", "text_encoder"),
    ("text_encoders.clip_l.transformer.", "text_encoder"),
    ("text_encoders.clip_h.transformer.", "text_encoder"),
    ("text_encoders.clip_g.transformer.", "text_encoder_2"),
    ("model.diffusion_model.", "unet"),
    ("diffusion_model.", "unet"),
    ("base_model.model.", "unet"),
    ("", "unet"),
)
"""Beginnings of keys: kohya, SimpleTuner, diffusers, ComfyUI, PEFT; nothing: diffusers before 0.17."""

_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


class Place(NamedTuple):
    """One module of a model."""

    role: str
    """"unet", "text_encoder" or "text_encoder_2"."""
    path: str
    """As diffusers publishes it, text encoders with `text_model.`."""


@cache
def _unet_modules(family: str) -> tuple[ModuleName, ...]:
    return tuple(module for shape in _SHAPES[family] for module in unet_modules(shape))


@cache
def _unet_paths() -> dict[str, str]:
    """Either naming, with underscores -> the published path."""
    paths: dict[str, str] = {}
    for module in _unet_modules("all"):
        paths[module.diffusers.replace(".", "_")] = module.diffusers
        paths[module.original.replace(".", "_")] = module.diffusers
    return paths


@cache
def _text_paths() -> dict[str, str]:
    """With and without `text_model`, with underscores -> the published path."""
    paths: dict[str, str] = {}
    for path in (*text_modules(_MOST_LAYERS), "text_projection"):
        plain = path.removeprefix("text_model.").replace(".", "_")
        spellings = [plain]
        spellings += [plain.replace(new, old) for old, new in _OLD_TEXT.items() if plain.endswith(f"self_attn_{new}")]
        for spelling in spellings:
            paths[spelling] = paths[f"text_model_{spelling}"] = path
    return paths


@cache
def _original_names() -> dict[str, str]:
    """Published path -> the name in SDXL's original checkpoint."""
    return {module.diffusers: module.original for module in _unet_modules("sdxl")}


def find_place(name: str, family: str | None = None) -> Place | None:
    """The module that a key, without its last part, speaks of; None if it is none of a Stable Diffusion model.

    `family` "sdxl_refiner" makes `lora_te_` its only text encoder, the second of SDXL.
    """
    prefix, role = next(pair for pair in _PREFIXES if name.startswith(pair[0]))
    rest = name.removeprefix(prefix).replace(".", "_")
    if role in TEXT_ROLES:
        if prefix == "lora_te_" and family == "sdxl_refiner":
            role = "text_encoder_2"
        path = _text_paths().get(rest)
        return None if path is None else Place(role, path)
    rest = rest.replace("_processor_", "_")
    if rest.endswith(("attn1_to_out", "attn2_to_out")):
        rest += "_0"
    path = _unet_paths().get(rest)
    if path is None and prefix == "base_model.model.":
        # PEFT's own files do not say which network they are for.
        path, role = _text_paths().get(rest), "text_encoder"
    return None if path is None else Place(role, path)


def kohya_name(place: Place, family: str) -> str:
    """The module in kohya's keys, e.g. `lora_unet_down_blocks_0_attentions_0_proj_in`.

    SDXL's U-Net has the original names (`input_blocks_4_1_proj_in`): A1111 misses its upsampler under the others. The
    refiner's has not: under the original ones, diffusers takes its first upsampler for an attention.
    """
    if place.role == "unet":
        path = _original_names().get(place.path, place.path) if family == "sdxl" else place.path
        return "lora_unet_" + path.replace(".", "_")
    prefix = "lora_te_" if family not in SDXL_FAMILIES else "lora_te1_" if place.role == "text_encoder" else "lora_te2_"
    return prefix + place.path.replace(".", "_")


def diffusers_name(place: Place) -> str:
    """The module in diffusers' and PEFT's keys, e.g. `unet.down_blocks.0.attentions.0.proj_in`."""
    return f"{place.role}.{place.path}"


def kernel(place: Place, family: str | None) -> int | None:
    """Side of the kernel of a convolution, None for anything else; it is the same in every model of `family`."""
    if place.role != "unet":
        return None
    last = place.path.rpartition(".")[2]
    if last in ("conv1", "conv2", "conv", "conv_in", "conv_out"):
        return 3
    if last == "conv_shortcut" or (last in ("proj_in", "proj_out") and family in ("sd1", None)):
        return 1
    return None


def unet_kinds() -> dict[str, ModuleName]:
    """Published path -> the table's entry, for every U-Net module of any family."""
    return {module.diffusers: module for module in _unet_modules("all")}
