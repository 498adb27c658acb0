"""Which tensors of an original (LDM, SGM) checkpoint are which published ones of diffusers and transformers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from sd_train.families.keys import ModuleName, UNetShape, text_modules, unet_modules, vae_modules
from sd_train.families.sources import Change, Derived

CLIP_PREFIX = {"sd1": "cond_stage_model.transformer.", "sdxl": "conditioner.embedders.0.transformer."}
OPEN_CLIP_PREFIX = {
    "sd2": "cond_stage_model.model.",
    "sdxl": "conditioner.embedders.1.model.",
    "sdxl_refiner": "conditioner.embedders.0.model.",
}

Relation = Literal["same", "convolution", "transposed", "stacked"]
"""How the original differs: a 1x1 convolution for a matrix, transposed, or three tensors stacked into one."""


@dataclass(frozen=True)
class TensorPair:
    """One tensor of an original checkpoint and what it is in the published folders."""

    original: str
    published: tuple[str, ...]
    relation: Relation = "same"
    optional: bool = False
    """Whether models of the same shape may lack it."""


def to_published(pairs: Iterable[TensorPair]) -> dict[str, Derived]:
    """Published name -> how it is computed from original tensors."""
    table: dict[str, Derived] = {}
    for pair in pairs:
        thirds: tuple[Change, ...] = ("first", "second", "third")
        match pair.relation:
            case "stacked":
                table |= {
                    name: Derived((pair.original,), third) for name, third in zip(pair.published, thirds, strict=True)
                }
            case "convolution":
                table[pair.published[0]] = Derived((pair.original,), "matrix")
            case _:
                table[pair.published[0]] = Derived((pair.original,), pair.relation)
    return table


def to_original(pairs: Iterable[TensorPair]) -> dict[str, Derived]:
    """Original name -> how it is computed from published tensors."""
    changes: dict[Relation, Change] = {
        "same": "same", "convolution": "convolution", "transposed": "transposed", "stacked": "joined",
    }  # fmt: skip
    return {pair.original: Derived(pair.published, changes[pair.relation]) for pair in pairs}


def _both(modules: Iterable[ModuleName]) -> list[TensorPair]:
    """Weight and bias of each module."""
    pairs = []
    for module in modules:
        for end in (".weight", ".bias"):
            bare = end == ".bias" and module.diffusers.endswith((".to_q", ".to_k", ".to_v", ".cond_proj"))
            optional = bare or module.diffusers.endswith(".conv_shortcut")
            pairs.append(TensorPair(module.original + end, (module.diffusers + end,), optional=optional))
    return pairs


def unet_pairs(shape: UNetShape) -> list[TensorPair]:
    """Every tensor of a U-Net, without the prefix."""
    return _both(unet_modules(shape))


def vae_pairs(levels: int = 4, layers: int = 2) -> list[TensorPair]:
    """Every tensor of a KL autoencoder, without the prefix; its attention's matrices are 1x1 convolutions."""
    pairs: list[TensorPair] = []
    for module in vae_modules(levels, layers):
        attention = module.kind == "attention" and module.matrix
        for end in (".weight", ".bias"):
            pairs.append(
                TensorPair(
                    module.original + end,
                    (module.diffusers + end,),
                    "convolution" if attention and end == ".weight" else "same",
                    module.diffusers.endswith(".conv_shortcut"),
                )
            )
    return pairs


def clip_pairs(layers: int) -> list[TensorPair]:
    """Every tensor of OpenAI's CLIP text encoder; original checkpoints hold transformers' names."""
    names = [
        module + end
        for module in text_modules(layers)
        for end in ((".weight",) if module.endswith("_embedding") else (".weight", ".bias"))
    ]
    return [TensorPair(name, (name,)) for name in names]


_OPEN_CLIP_LAYER = (
    ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"),
    ("attn.out_proj", "self_attn.out_proj"),
)  # fmt: skip


def open_clip_pairs(layers: int, projection: bool) -> list[TensorPair]:
    """Every tensor of an OpenCLIP text encoder, without the prefix.

    OpenCLIP multiplies by `text_projection` from the right, a linear layer by its weight transposed; the three input
    projections of an attention are stacked in the order query, key, value (torch.nn.MultiheadAttention).
    """
    pairs = [
        TensorPair("token_embedding.weight", ("text_model.embeddings.token_embedding.weight",)),
        TensorPair("positional_embedding", ("text_model.embeddings.position_embedding.weight",)),
    ]
    for layer in range(layers):
        theirs, ours = f"transformer.resblocks.{layer}", f"text_model.encoder.layers.{layer}"
        for original, published in _OPEN_CLIP_LAYER:
            for end in (".weight", ".bias"):
                pairs.append(TensorPair(f"{theirs}.{original}{end}", (f"{ours}.{published}{end}",)))
        for end in ("weight", "bias"):
            stacked = tuple(f"{ours}.self_attn.{letter}_proj.{end}" for letter in "qkv")
            pairs.append(TensorPair(f"{theirs}.attn.in_proj_{end}", stacked, "stacked"))
    for end in (".weight", ".bias"):
        pairs.append(TensorPair("ln_final" + end, ("text_model.final_layer_norm" + end,)))
    if projection:
        pairs.append(TensorPair("text_projection", ("text_projection.weight",), "transposed"))
    return pairs


def ema_name(name: str) -> str:
    """Where an original checkpoint keeps the running mean of its tensor `name` (LDM's LitEma drops the dots)."""
    return "model_ema." + name.removeprefix("model.").replace(".", "")


_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def current_vae_name(name: str) -> str:
    """The present name of a tensor of diffusers' autoencoder; before 0.15 the attention had others."""
    path = name.split(".")
    if ".attentions." in name and path[-2] in _OLD_VAE_ATTENTION:
        path[-2] = _OLD_VAE_ATTENTION[path[-2]]
    return ".".join(path)
