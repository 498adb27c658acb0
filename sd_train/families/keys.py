"""Names inside files, as data: original (LDM) checkpoints, diffusers' modules and kohya's LoRA keys.

Names come from these tables, never from the live module tree: libraries rename their modules (transformers 5.6
dropped `text_model.` inside CLIP), published files keep the old names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

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
    """What the names of a Stable Diffusion U-Net depend on; the default is Stable Diffusion 1.x and 2.x."""

    down: tuple[tuple[int, ...], ...] = ((1, 1), (1, 1), (1, 1), (0, 0))
    """Transformer blocks behind each residual block of each level, from the largest picture on; 0: no attention."""
    up: tuple[tuple[int, ...], ...] = ((0, 0, 0), (1, 1, 1), (1, 1, 1), (1, 1, 1))
    """The same on the way up, from the smallest picture on."""
    mid: int = 1
    """Transformer blocks in the middle; -1: one residual block alone, -2: nothing."""
    added: bool = False
    """Told sizes and a pooled text, as SDXL is."""
    guided: bool = False
    """Told the guidance scale, as LCM's U-Nets are."""

    @property
    def layers(self) -> int:
        """Residual blocks of each level on the way down."""
        return len(self.down[0])


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
    names = [
        ModuleName("time_embed.0", "time_embedding.linear_1", "other", True),
        ModuleName("time_embed.2", "time_embedding.linear_2", "other", True),
    ]
    if shape.guided:
        # The original has no such U-Net; the name follows its neighbours.
        names.append(ModuleName("time_embed.cond_proj", "time_embedding.cond_proj", "other", True))
    if shape.added:
        names.append(ModuleName("label_emb.0.0", "add_embedding.linear_1", "other", True))
        names.append(ModuleName("label_emb.0.2", "add_embedding.linear_2", "other", True))
    names.append(ModuleName("input_blocks.0.0", "conv_in", "other", True))
    block = 1
    for level, depths in enumerate(shape.down):
        for layer, depth in enumerate(depths):
            names += _resnet(f"input_blocks.{block}.0", f"down_blocks.{level}.resnets.{layer}")
            if depth:
                names += _attention(f"input_blocks.{block}.1", f"down_blocks.{level}.attentions.{layer}", depth)
            block += 1
        if level < len(shape.down) - 1:
            sampler = f"down_blocks.{level}.downsamplers.0.conv"
            names.append(ModuleName(f"input_blocks.{block}.0.op", sampler, "sampler", True))
            block += 1
    if shape.mid >= -1:
        names += _resnet("middle_block.0", "mid_block.resnets.0")
    if shape.mid >= 0:
        names += _attention("middle_block.1", "mid_block.attentions.0", shape.mid)
        names += _resnet("middle_block.2", "mid_block.resnets.1")
    block = 0
    for level, depths in enumerate(shape.up):
        for layer, depth in enumerate(depths):
            names += _resnet(f"output_blocks.{block}.0", f"up_blocks.{level}.resnets.{layer}")
            if depth:
                names += _attention(f"output_blocks.{block}.1", f"up_blocks.{level}.attentions.{layer}", depth)
            if level < len(shape.up) - 1 and layer == len(depths) - 1:
                original = f"output_blocks.{block}.{2 if depth else 1}.conv"
                names.append(ModuleName(original, f"up_blocks.{level}.upsamplers.0.conv", "sampler", True))
            block += 1
    names.append(ModuleName("out.0", "conv_norm_out", "other", False))
    names.append(ModuleName("out.2", "conv_out", "other", True))
    return names


_BLOCK_FIRST = {"time_embed": 0, "label_emb": 0, "input_blocks": 1, "middle_block": 10, "output_blocks": 13, "out": 22}


def unet_blocks(shape: UNetShape) -> dict[str, int]:
    """The block of SDXL's U-Net, 0 to 22, that each module belongs to, by its published name (sd-scripts' numbers).

    0: what is told beside the text; 1 to 9: input; 10 to 12: middle; 13 to 21: output; 22: the end.
    """
    found = {}
    for module in unet_modules(shape):
        first, number, *_ = module.original.split(".")
        within = int(number) if first.endswith(("_block", "_blocks")) else 0
        found[module.diffusers] = _BLOCK_FIRST[first] + within
    return found


def unet_shape_of(config: Mapping[str, Any]) -> UNetShape:
    """The names' shape from a diffusers U-Net configuration."""
    kinds, other_kinds = config["down_block_types"], config["up_block_types"]
    levels = len(kinds)
    layers = _each(config.get("layers_per_block", 2), levels)
    depths = _each(config.get("transformer_layers_per_block", 1), levels)
    reverse = config.get("reverse_transformer_layers_per_block")
    back = depths[::-1] if reverse is None else _each(reverse, levels)
    down = tuple(
        tuple(_each(depth if "CrossAttn" in kind else 0, count))
        for kind, depth, count in zip(kinds, depths, layers, strict=True)
    )
    up = tuple(
        tuple(_each(depth if "CrossAttn" in kind else 0, count + 1))
        for kind, depth, count in zip(other_kinds, back, layers[::-1], strict=True)
    )
    middle = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    last = depths[-1]
    mid = -2 if middle is None else -1 if middle == "UNetMidBlock2D" else last if isinstance(last, int) else last[-1]
    added = config.get("addition_embed_type") == "text_time"
    return UNetShape(down, up, mid, added, config.get("time_cond_proj_dim") is not None)


def _each(value: Any, count: int) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] * count


def unet_shape_of_names(unet: Collection[str]) -> UNetShape:
    """The names' shape from the tensors' original names.

    Raises:
        ValueError: if there are no blocks.
    """
    inputs, outputs = _depths(unet, "input_blocks"), _depths(unet, "output_blocks")
    down: list[list[int]] = [[]]
    for block, depth in sorted(inputs.items()):
        if f"input_blocks.{block}.0.op.weight" in unet:
            down.append([])
        elif block:
            down[-1].append(depth)
    up: list[list[int]] = [[]]
    for block, depth in sorted(outputs.items()):
        up[-1].append(depth)
        if any(f"output_blocks.{block}.{place}.conv.weight" in unet for place in (1, 2)):
            up.append([])
    if not all((*down, *up)):
        raise ValueError("its blocks are not those of a Stable Diffusion U-Net")
    mid = _depths(unet, "middle_block").get(1, 0) or (-1 if "middle_block.0.in_layers.0.weight" in unet else -2)
    added, guided = "label_emb.0.0.weight" in unet, "time_embed.cond_proj.weight" in unet
    return UNetShape(tuple(map(tuple, down)), tuple(map(tuple, up)), mid, added, guided)


def _depths(unet: Iterable[str], blocks: str) -> dict[int, int]:
    """Number of transformer blocks in each of `blocks`."""
    found: dict[int, int] = {}
    tensors: Counter[int] = Counter()
    inner = 2 if blocks == "middle_block" else 3
    for name in unet:
        path = name.split(".")
        if path[0] == blocks:
            block = int(path[1])
            deep = int(path[inner + 1]) + 1 if path[inner : inner + 1] == ["transformer_blocks"] else 0
            found[block] = max(found.get(block, 0), deep)
            tensors[block] += 1
    for block, deep in found.items():
        check_numbers(deep, tensors[block], f"transformer blocks in {blocks}.{block}")
    return found


def check_numbers(count: int, tensors: int, what: str) -> None:
    """Whether so many can be made of `tensors`, before a table with the names of all is made.

    Raises:
        ValueError: if not: a single number in a name may promise any count.
    """
    if count > tensors:
        raise ValueError(f"{count} {what} cannot be made of {tensors} tensors")


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


def unet_lora_targets(
    shape: UNetShape, original_names: bool = False, convolutions: bool = False
) -> list[LoraTarget]:
    """The linear layers and 1x1 convolutions inside the U-Net's attentions (sd-scripts: Transformer2DModel).

    Args:
        shape: what the names depend on.
        original_names: keys after the original checkpoint's names, as for SDXL (`lora_unet_input_blocks_4_1_...`), not
            after diffusers' (`lora_unet_down_blocks_0_...`).
        convolutions: also everything inside residual blocks and the down- and upsamplers, as with sd-scripts'
            `conv_dim` (ResnetBlock2D, Downsample2D, Upsample2D). Residual blocks whose width does not change have no
            `conv_shortcut`; it is listed nevertheless.
    """
    kinds = {"attention", "resnet", "sampler"} if convolutions else {"attention"}
    chosen = [name for name in unet_modules(shape) if name.kind in kinds and name.matrix]
    keys = [name.original if original_names else name.diffusers for name in chosen]
    return [
        LoraTarget("lora_unet_" + key.replace(".", "_"), name.diffusers)
        for key, name in zip(keys, chosen, strict=True)
    ]


def text_lora_targets(layers: int, prefix: str = "lora_te") -> list[LoraTarget]:
    """The linear layers of CLIP's attentions and MLPs (sd-scripts: CLIPAttention, CLIPMLP)."""
    return [
        LoraTarget(f"{prefix}_" + name.replace(".", "_"), name)
        for name in text_modules(layers)
        if ".self_attn." in name or ".mlp." in name
    ]
