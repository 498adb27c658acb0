"""What a single-file checkpoint is, told by the names and shapes of its tensors alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sd_train.families.keys import (
    UNET_PREFIX,
    VAE_PREFIX,
    UNetShape,
    check_numbers,
    published_text_name,
    unet_shape_of_names,
)
from sd_train.families.keys_original import (
    CLIP_PREFIX,
    OPEN_CLIP_PREFIX,
    TensorPair,
    clip_pairs,
    ema_name,
    open_clip_pairs,
    to_published,
    unet_pairs,
    vae_pairs,
)
from sd_train.families.published import FamilyName, Prediction, published_config
from sd_train.families.sources import Derived, RenamedSource, TensorSource, under

V_PREDICTION_MARKER = "v_pred"
ZERO_SNR_MARKER = "ztsnr"
"""Names of empty tensors by which checkpoints tell that they predict v, and know pure noise (ComfyUI's convention)."""

HEAD_WIDTH = 64
"""Of every published model but Stable Diffusion 1.x's U-Net, which has eight heads whatever the width."""


class NotRecognisedError(ValueError):
    """Why a table of tensors is no model that we know, in words that follow "is"."""


@dataclass(frozen=True)
class PartLayout:
    """One network inside a checkpoint."""

    config: dict[str, Any]
    """For diffusers or transformers."""
    table: dict[str, Derived]
    """Published name -> how it is computed from the checkpoint's tensors."""


@dataclass(frozen=True)
class Layout:
    """What a checkpoint holds."""

    family: FamilyName
    parts: dict[str, PartLayout]
    """By "unet", "vae", "text_encoder", "text_encoder_2"."""
    prediction: Prediction | None
    """What a marker says; None: there is none."""
    zero_terminal_snr: bool
    extras: tuple[str, ...]
    """Tensors that belong to the encoders' full form, and that no network of ours has."""
    leftovers: tuple[str, ...]
    """Running means, schedules, losses and the like."""


def recognise(source: TensorSource) -> Layout:
    """Family, configurations and names of a checkpoint under original names.

    Raises:
        NotRecognisedError: if it is something else, or incomplete.
    """
    names = set(source.names())
    if (reason := _foreign(names)) is not None:
        raise NotRecognisedError(reason)
    try:
        return _layout(source, names)
    except (KeyError, IndexError, ValueError) as problem:
        if isinstance(problem, NotRecognisedError):
            raise
        reason = f"its tensor {problem} is missing" if isinstance(problem, KeyError) else str(problem)
        raise NotRecognisedError(f"an incomplete checkpoint ({reason}); download it again") from None


def _foreign(names: set[str]) -> str | None:
    """What is in the table if it is no whole checkpoint."""

    def has(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in names)

    if has("lora_unet_", "lora_te", "lycoris_") or any(".lora_" in name or ".lora." in name for name in names):
        return (
            "a LoRA, not a base model; give the model that it was made for (a LoRA goes to --network_weights of "
            "train_network, or to --lora of sample)"
        )
    if has("conditioner.embedders.") or has("cond_stage_model."):
        missing = [prefix for prefix in (UNET_PREFIX, VAE_PREFIX) if not has(prefix)]
    else:
        texts = "cond_stage_model.* or conditioner.embedders.*"
        missing = [prefix for prefix in (UNET_PREFIX, VAE_PREFIX) if not has(prefix)] + [texts]
    if len(missing) == 3:
        if has("down_blocks.", "unet.down_blocks."):
            return "a U-Net alone; give the folder that holds model_index.json, or a whole checkpoint"
        if has("encoder.down.", "encoder.down_blocks."):
            return "a VAE alone; give it with --vae beside a whole model"
        if "emb_params" in names or {"clip_l", "clip_g"} <= names or "string_to_param" in names:
            return (
                "a textual inversion embedding, not a base model; give the model that it was made for (an embedding "
                "goes to --weights of train_textual_inversion, or to --embedding of sample)"
            )
        if has("model.diffusion_model.joint_blocks.", "double_blocks.", "joint_blocks."):
            return "a transformer model (SD3, Flux or the like), and only Stable Diffusion 1.x, 2.x and SDXL are known"
        return "no Stable Diffusion checkpoint: none of its names is known"
    if has(f"{UNET_PREFIX}joint_blocks.", f"{UNET_PREFIX}double_blocks."):
        return "a transformer model (SD3, Flux or the like), and only Stable Diffusion 1.x, 2.x and SDXL are known"
    if has("control_model."):
        return "a ControlNet checkpoint; give the base model without it"
    if missing:
        return f"an incomplete checkpoint: nothing is named {' or '.join(p.removesuffix('*') + '*' for p in missing)}"
    if any(name.startswith(("edm_mean", "edm_vpred")) for name in names):
        return "a model for EDM schedules (Playground 2.5, CosXL), and those are not supported"
    return None


def _layout(source: TensorSource, names: set[str]) -> Layout:
    unet = under(source, UNET_PREFIX)
    shape = unet_shape_of_names(set(unet.names()))
    linear = len(unet.shape(_first(unet, ".proj_in.weight"))) == 2
    family, clip, open_clip = _encoders(names, linear)
    if shape.added != family.startswith("sdxl"):
        kind = "without size conditioning" if family.startswith("sdxl") else "told classes or images (unCLIP, upscaler)"
        raise NotRecognisedError(f"a U-Net {kind}, and those are not supported")
    parts: dict[str, PartLayout] = {}
    extras: list[str] = []
    if clip is not None:
        parts["text_encoder"] = _clip_part(under(source, clip), clip, family)
    if open_clip is not None:
        role = "text_encoder" if family == "sd2" else "text_encoder_2"
        parts[role], extras = _open_clip_part(under(source, open_clip), open_clip, family)
    projected = parts["text_encoder_2"].config["projection_dim"] if "text_encoder_2" in parts else 0
    unet_part = _part(unet, UNET_PREFIX, unet_pairs(shape), unet_config(unet, family, shape, projected))
    vae = under(source, VAE_PREFIX)
    parts = {"unet": unet_part, "vae": vae_part(vae, VAE_PREFIX, family), **parts}
    used = {name for part in parts.values() for derived in part.table.values() for name in derived.sources}
    markers = {V_PREDICTION_MARKER, ZERO_SNR_MARKER}
    rest = [name for name in source.names() if name not in used and name not in markers and name not in extras]
    _check_rest(rest)
    prediction: Prediction | None = "v_prediction" if V_PREDICTION_MARKER in names else None
    return Layout(family, parts, prediction, ZERO_SNR_MARKER in names, tuple(extras), tuple(rest))


def _encoders(names: set[str], linear: bool) -> tuple[FamilyName, str | None, str | None]:
    """Family, prefix of OpenAI's CLIP, prefix of OpenCLIP."""

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in names)

    if has("conditioner.embedders."):
        if has(OPEN_CLIP_PREFIX["sdxl"]):
            return "sdxl", CLIP_PREFIX["sdxl"], OPEN_CLIP_PREFIX["sdxl"]
        if has(OPEN_CLIP_PREFIX["sdxl_refiner"]):
            return "sdxl_refiner", None, OPEN_CLIP_PREFIX["sdxl_refiner"]
        raise NotRecognisedError("an incomplete SDXL checkpoint: its second text encoder is missing")
    if has(OPEN_CLIP_PREFIX["sd2"]):
        return "sd2", None, OPEN_CLIP_PREFIX["sd2"]
    # Some converters wrote the encoder of 2.x under transformers' names.
    return ("sd2" if linear else "sd1"), CLIP_PREFIX["sd1"], None


def _check_rest(rest: Sequence[str]) -> None:
    """Names inside a network that the network does not have mean another kind of model."""
    for prefix, title in ((UNET_PREFIX, "U-Net"), (f"{VAE_PREFIX}encoder.", "VAE"), (f"{VAE_PREFIX}decoder.", "VAE")):
        if strange := sorted(name for name in rest if name.startswith(prefix)):
            shown = ", ".join(name.removeprefix(prefix) for name in strange[:3])
            raise NotRecognisedError(
                f"no model of a known kind: {len(strange)} tensors of the {title} are unknown, e.g. {shown}"
            )


def _part(source: TensorSource, prefix: str, pairs: list[TensorPair], config: dict[str, Any]) -> PartLayout:
    """The pairs that are there, with the prefix.

    Raises:
        NotRecognisedError: if one is missing that every such network has.
    """
    names = set(source.names())
    if missing := sorted(pair.original for pair in pairs if not pair.optional and pair.original not in names):
        shown = ", ".join(prefix + name for name in missing[:3])
        raise NotRecognisedError(
            f"an incomplete checkpoint: {len(missing)} tensors are missing, e.g. {shown}; download it again"
        )
    table = to_published(pair for pair in pairs if pair.original in names)
    prefixed = {
        name: Derived(tuple(prefix + each for each in derived.sources), derived.change)
        for name, derived in table.items()
    }
    return PartLayout(config, prefixed)


def _first(source: TensorSource, end: str) -> str:
    found = next((name for name in source.names() if name.endswith(end)), None)
    if found is None:
        raise NotRecognisedError(f"a U-Net without attention: no tensor is named *{end}")
    return found


def unet_config(source: TensorSource, family: FamilyName, shape: UNetShape, projected: int) -> dict[str, Any]:
    """diffusers' configuration of a U-Net under original names.

    Args:
        source: its tensors, without prefix.
        family: where everything comes from that shapes do not tell.
        shape: blocks and their depths.
        projected: width of the pooled text that it is told; 0: none.

    Raises:
        KeyError: if a tensor is missing.
        NotRecognisedError: if diffusers has no such U-Net.
    """
    config = published_config("unet", family)
    levels = len(shape.down)
    if source.shape("input_blocks.0.0.weight")[2:] != (3, 3):
        raise NotRecognisedError("an incomplete checkpoint: its first layer is no 3x3 convolution")
    widths = [
        source.shape(f"input_blocks.{1 + level * (shape.layers + 1)}.0.out_layers.3.weight")[0]
        for level in range(levels)
    ]
    config |= {
        "in_channels": source.shape("input_blocks.0.0.weight")[1],
        "out_channels": source.shape("out.2.weight")[0],
        "block_out_channels": widths,
        "layers_per_block": shape.layers,
        "down_block_types": ["CrossAttnDownBlock2D" if any(depths) else "DownBlock2D" for depths in shape.down],
        "up_block_types": ["CrossAttnUpBlock2D" if any(depths) else "UpBlock2D" for depths in shape.up],
        "cross_attention_dim": source.shape(_first(source, ".attn2.to_k.weight"))[1],
        "use_linear_projection": len(source.shape(_first(source, ".proj_in.weight"))) == 2,
    }
    if family == "sd1":
        del config["use_linear_projection"]
    else:
        config["attention_head_dim"] = [max(1, width // HEAD_WIDTH) for width in widths]
    config |= _depth_fields(shape)
    if (
        "transformer_layers_per_block" in config
        and config["transformer_layers_per_block"] == 1
        and family[:2] != "sdxl"
    ):
        del config["transformer_layers_per_block"]
    if shape.added:
        told = source.shape("label_emb.0.0.weight")[1]
        config["projection_class_embeddings_input_dim"] = told
        config["addition_time_embed_dim"] = (told - projected) // (5 if family == "sdxl_refiner" else 6)
    if shape.guided:
        config["time_cond_proj_dim"] = source.shape("time_embed.cond_proj.weight")[1]
    return config


def _depth_fields(shape: UNetShape) -> dict[str, Any]:
    """`transformer_layers_per_block` and what goes with it, as short as it can be."""
    fields: dict[str, Any] = {}
    if shape.mid < 0:
        fields["mid_block_type"] = "UNetMidBlock2D" if shape.mid == -1 else None
    plain: list[Any] = []
    for depths in shape.down:
        if len(set(depths)) > 1 and 0 in depths:
            raise NotRecognisedError(
                "a U-Net with attention in some blocks of a level only, and diffusers has none such"
            )
        plain.append(depths[0] if len(set(depths)) == 1 else list(depths))
    # The last number is also that of the middle block; where a level has no attention its number is free.
    if not plain[-1]:
        plain[-1] = shape.mid if shape.mid > 0 else 0
    elif shape.mid > 0 and plain[-1] != shape.mid:
        raise NotRecognisedError("a U-Net whose middle is as deep as no level, and diffusers has none such")
    mirrored = tuple((depths[0],) * (len(depths) + 1) for depths in reversed(shape.down))
    # A list is no number, and then no single number says it.
    different = [depth for place, depth in enumerate(plain) if depth != 0 and depth not in plain[:place]]
    if len(different) == 1 and isinstance(different[0], int) and shape.up == mirrored:
        fields["transformer_layers_per_block"] = different[0]
        return fields
    fields["transformer_layers_per_block"] = [1 if depth == 0 else depth for depth in plain]
    if shape.up != mirrored:
        fields["reverse_transformer_layers_per_block"] = [
            depths[0] if len(set(depths)) == 1 else list(depths) for depths in shape.up
        ]
    return fields


def vae_part(source: TensorSource, prefix: str, family: FamilyName) -> PartLayout:
    """A KL autoencoder under original names; `prefix` is put before them.

    Raises:
        NotRecognisedError: if tensors are missing.
    """
    names = source.names()
    for half in ("encoder", "decoder"):
        if not any(name.startswith(f"{half}.") for name in names):
            raise NotRecognisedError(f"half a VAE: it has no {half}; give a whole one")
    levels = 1 + max((int(name.split(".")[2]) for name in names if name.startswith("encoder.down.")), default=0)
    layers = 1 + max((int(n.split(".")[4]) for n in names if n.startswith("encoder.down.0.block.")), default=0)
    check_numbers(levels, len(names), "levels")
    check_numbers(levels * layers, len(names), "residual blocks")
    config = published_config("vae", family)
    config |= {
        "block_out_channels": [
            source.shape(f"encoder.down.{level}.block.0.conv2.weight")[0] for level in range(levels)
        ],
        "layers_per_block": layers,
        "latent_channels": source.shape("post_quant_conv.weight")[0],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    return _part(source, prefix, vae_pairs(levels, layers), config)


def _clip_part(source: TensorSource, prefix: str, family: FamilyName) -> PartLayout:
    # Some tools wrote the names without `text_model.`.
    spelled = {published_text_name(name): name for name in source.names()}
    renamed = RenamedSource(source, {ours: Derived((theirs,)) for ours, theirs in spelled.items()})
    config = clip_config(renamed, family, "text_encoder")
    part = _part(renamed, "", clip_pairs(config["num_hidden_layers"]), config)
    return PartLayout(config, {name: Derived((prefix + spelled[name],)) for name in part.table})


def clip_config(source: TensorSource, family: FamilyName, role: str) -> dict[str, Any]:
    """transformers' configuration of a text encoder under published names."""
    config = published_config(role, family)
    names = source.names()
    vocabulary, width = source.shape("text_model.embeddings.token_embedding.weight")
    layers = [int(name.split(".")[3]) for name in names if name.startswith("text_model.encoder.layers.")]
    config["hidden_size"], config["vocab_size"] = width, vocabulary
    config["num_attention_heads"] = max(1, width // HEAD_WIDTH)
    config["intermediate_size"] = source.shape("text_model.encoder.layers.0.mlp.fc1.weight")[0]
    check_numbers(1 + max(layers), len(layers), "layers of a text encoder")
    config["num_hidden_layers"] = 1 + max(layers)
    config["max_position_embeddings"] = source.shape("text_model.embeddings.position_embedding.weight")[0]
    if "text_projection.weight" in names:
        config["projection_dim"] = source.shape("text_projection.weight")[0]
    elif family != "sd2":
        config["projection_dim"] = width
    return config


def _open_clip_part(source: TensorSource, prefix: str, family: FamilyName) -> tuple[PartLayout, list[str]]:
    """The encoder and the names of what belongs to it without being used."""
    names = set(source.names())
    blocks = [int(name.split(".")[2]) for name in names if name.startswith("transformer.resblocks.")]
    layers = 1 + max(blocks)
    check_numbers(layers, len(blocks), "layers of a text encoder")
    extras = ["logit_scale"]
    if family == "sd2":
        # 2.x uses the last layer but one, so transformers' folders lack the last. A file with the projection behind
        # the last layer is the whole encoder; one without comes from such a folder.
        width = source.shape("token_embedding.weight")[1]
        last = layers - 1
        if layers > 1 and (layers == 24 if width == 1024 else "text_projection" in names):
            layers -= 1
        extras += ["text_projection"]
        extras += [name for name in names if layers <= last and name.startswith(f"transformer.resblocks.{last}.")]
    pairs = open_clip_pairs(layers, projection=family != "sd2")
    named = _part(source, prefix, pairs, {})
    published = RenamedSource(source, to_published(pairs))
    role = "text_encoder" if family == "sd2" else "text_encoder_2"
    part = PartLayout(clip_config(published, family, role), named.table)
    return part, sorted(prefix + name for name in extras if name in names)


def ema_table(source: TensorSource, table: dict[str, Derived]) -> dict[str, Derived] | None:
    """The U-Net's `table` with the running means in place of the weights; None if the checkpoint has none."""
    names = set(source.names())
    means = {
        ours: Derived(tuple(ema_name(name) for name in derived.sources), derived.change)
        for ours, derived in table.items()
    }
    return means if all(name in names for derived in means.values() for name in derived.sources) else None
