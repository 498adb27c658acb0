"""Names inside files, as data: original (LDM) checkpoints, diffusers' modules and kohya's LoRA keys.

Names come from these tables, never from the live module tree: libraries rename their modules (transformers 5.6
dropped `text_model.` inside CLIP), published files keep the old names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_PREFIX = "cond_stage_model.transformer."

Kind = Literal["attention", "resnet", "sampler", "other"]


class ModuleName(NamedTuple):
    """One module that holds parameters, under its two names."""

    original: str
    """As in the original checkpoint, without the part's prefix."""
    diffusers: str
    kind: Kind
    matrix: bool
    """A linear layer or a convolution, not a norm."""


@dataclass(frozen=True)
class UNetShape:
    """What the names of a Stable Diffusion U-Net depend on."""

    down_attention: tuple[int, ...] = (1, 1, 1, 0)
    """Transformer blocks in each attention of each level; 0: no attention."""
    layers: int = 2
    mid_attention: int = 1


_RESNET = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
)
_TRANSFORMER = (
    "norm1", "norm2", "norm3", "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0",
    "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", "ff.net.0.proj", "ff.net.2",
)  # fmt: skip


def _resnet(original: str, diffusers: str) -> list[ModuleName]:
    return [
        ModuleName(f"{original}.{theirs}", f"{diffusers}.{ours}", "resnet", "norm" not in ours)
        for theirs, ours in _RESNET
    ]


def _attention(original: str, diffusers: str, depth: int) -> list[ModuleName]:
    inner = ["norm", "proj_in", "proj_out"]
    inner += [f"transformer_blocks.{block}.{name}" for block in range(depth) for name in _TRANSFORMER]
    return [
        ModuleName(f"{original}.{name}", f"{diffusers}.{name}", "attention", "norm" not in name.rpartition(".")[2])
        for name in inner
    ]


def unet_modules(shape: UNetShape) -> list[ModuleName]:
    """Every module of the U-Net that can hold parameters; `conv_shortcut` only exists where the width changes."""
    levels = len(shape.down_attention)
    names = [
        ModuleName("time_embed.0", "time_embedding.linear_1", "other", True),
        ModuleName("time_embed.2", "time_embedding.linear_2", "other", True),
        ModuleName("input_blocks.0.0", "conv_in", "other", True),
    ]
    block = 1
    for level, depth in enumerate(shape.down_attention):
        for layer in range(shape.layers):
            names += _resnet(f"input_blocks.{block}.0", f"down_blocks.{level}.resnets.{layer}")
            if depth:
                names += _attention(f"input_blocks.{block}.1", f"down_blocks.{level}.attentions.{layer}", depth)
            block += 1
        if level < levels - 1:
            sampler = f"down_blocks.{level}.downsamplers.0.conv"
            names.append(ModuleName(f"input_blocks.{block}.0.op", sampler, "sampler", True))
            block += 1
    names += _resnet("middle_block.0", "mid_block.resnets.0")
    names += _attention("middle_block.1", "mid_block.attentions.0", shape.mid_attention)
    names += _resnet("middle_block.2", "mid_block.resnets.1")
    block = 0
    for level, depth in enumerate(reversed(shape.down_attention)):
        for layer in range(shape.layers + 1):
            names += _resnet(f"output_blocks.{block}.0", f"up_blocks.{level}.resnets.{layer}")
            if depth:
                names += _attention(f"output_blocks.{block}.1", f"up_blocks.{level}.attentions.{layer}", depth)
            if level < levels - 1 and layer == shape.layers:
                original = f"output_blocks.{block}.{2 if depth else 1}.conv"
                names.append(ModuleName(original, f"up_blocks.{level}.upsamplers.0.conv", "sampler", True))
            block += 1
    names.append(ModuleName("out.0", "conv_norm_out", "other", False))
    names.append(ModuleName("out.2", "conv_out", "other", True))
    return names


_VAE_RESNET = (("norm1", "norm1"), ("conv1", "conv1"), ("norm2", "norm2"), ("conv2", "conv2"))
_VAE_ATTENTION = (("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0"))


def vae_modules(levels: int = 4, layers: int = 2) -> list[ModuleName]:
    """Every module of the KL autoencoder that can hold parameters.

    The attention's matrices are linear layers in diffusers and 1x1 convolutions in original checkpoints.
    """
    names: list[ModuleName] = []

    def resnet(original: str, diffusers: str) -> None:
        for theirs, ours in (*_VAE_RESNET, ("nin_shortcut", "conv_shortcut")):
            names.append(ModuleName(f"{original}.{theirs}", f"{diffusers}.{ours}", "resnet", "norm" not in ours))

    for half in ("encoder", "decoder"):
        names.append(ModuleName(f"{half}.conv_in", f"{half}.conv_in", "other", True))
        for level in range(levels):
            if half == "encoder":
                for layer in range(layers):
                    resnet(f"encoder.down.{level}.block.{layer}", f"encoder.down_blocks.{level}.resnets.{layer}")
                theirs, ours = f"encoder.down.{level}.downsample", f"encoder.down_blocks.{level}.downsamplers.0"
            else:
                # The original counts the decoder's levels from the largest picture, diffusers from the smallest.
                place = levels - 1 - level
                for layer in range(layers + 1):
                    resnet(f"decoder.up.{level}.block.{layer}", f"decoder.up_blocks.{place}.resnets.{layer}")
                theirs, ours = f"decoder.up.{level}.upsample", f"decoder.up_blocks.{place}.upsamplers.0"
            if level < levels - 1 if half == "encoder" else level > 0:
                names.append(ModuleName(f"{theirs}.conv", f"{ours}.conv", "sampler", True))
        resnet(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0")
        resnet(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1")
        for theirs, ours in _VAE_ATTENTION:
            diffusers = f"{half}.mid_block.attentions.0.{ours}"
            names.append(ModuleName(f"{half}.mid.attn_1.{theirs}", diffusers, "attention", "norm" not in ours))
        names.append(ModuleName(f"{half}.norm_out", f"{half}.conv_norm_out", "other", False))
        names.append(ModuleName(f"{half}.conv_out", f"{half}.conv_out", "other", True))
    names.append(ModuleName("quant_conv", "quant_conv", "other", True))
    names.append(ModuleName("post_quant_conv", "post_quant_conv", "other", True))
    return names


_TEXT_LAYER = (
    "self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj",
    "layer_norm1", "mlp.fc1", "mlp.fc2", "layer_norm2",
)  # fmt: skip


def text_modules(layers: int) -> list[str]:
    """Published names of CLIP's text modules that hold parameters."""
    names = ["text_model.embeddings.token_embedding", "text_model.embeddings.position_embedding"]
    names += [f"text_model.encoder.layers.{layer}.{name}" for layer in range(layers) for name in _TEXT_LAYER]
    return [*names, "text_model.final_layer_norm"]


def live_text_name(published: str, nested: bool) -> str:
    """The name in the live module tree; `nested`: whether this transformers keeps `text_model.`."""
    return published if nested else published.removeprefix("text_model.")


def published_text_name(name: str) -> str:
    """Either spelling -> the published one, with `text_model.`."""
    if name.startswith(("text_model.", "text_projection", "logit_scale")):
        return name
    return f"text_model.{name}"


class LoraTarget(NamedTuple):
    """A module that gets a LoRA: its key in kohya's files and its published path."""

    key: str
    path: str


def unet_lora_targets(shape: UNetShape) -> list[LoraTarget]:
    """The linear layers and 1x1 convolutions inside the U-Net's attentions (sd-scripts: Transformer2DModel)."""
    return [
        LoraTarget("lora_unet_" + name.diffusers.replace(".", "_"), name.diffusers)
        for name in unet_modules(shape)
        if name.kind == "attention" and name.matrix
    ]


def text_lora_targets(layers: int, prefix: str = "lora_te") -> list[LoraTarget]:
    """The linear layers of CLIP's attentions and MLPs (sd-scripts: CLIPAttention, CLIPMLP)."""
    return [
        LoraTarget(f"{prefix}_" + name.replace(".", "_"), name)
        for name in text_modules(layers)
        if ".self_attn." in name or ".mlp." in name
    ]
