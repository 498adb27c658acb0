"""Models are told apart by names and shapes: full sizes on the meta device, against published counts and key lists."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sd_train.families.build import published_tensors
from sd_train.families.keys import published_text_name, unet_shape_of
from sd_train.families.parts import ModelParts, with_prediction
from sd_train.families.published import FamilyName, Prediction, published_config, scheduler_config
from sd_train.families.recognise import Layout, NotRecognisedError, recognise
from sd_train.families.saving import original_tensors
from sd_train.families.sources import Derived, DictSource, Part, RenamedSource, TensorSource
from tests.models import golden

Configs = dict[str, Any]
Shapes = dict[str, list[int]]

NETWORKS = {
    "sd1": ("unet", "vae", "text_encoder"),
    "sd2": ("unet", "vae", "text_encoder"),
    "sdxl": ("unet", "vae", "text_encoder", "text_encoder_2"),
    "sdxl_refiner": ("unet", "vae", "text_encoder_2"),
}

SSD_1B: Configs = {
    "transformer_layers_per_block": [0, 2, 4],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 0],
    "mid_block_type": "UNetMidBlock2D",
}
VEGA: Configs = {
    "transformer_layers_per_block": [0, 1, 2],
    "reverse_transformer_layers_per_block": [[2, 2, 2], [1, 1, 1], 0],
    "mid_block_type": "UNetMidBlock2D",
}
KOALA: Configs = {
    "layers_per_block": 1, "transformer_layers_per_block": [1, 2, 5], "mid_block_type": None,
}  # fmt: skip
SMALL: Configs = {"layers_per_block": 1}
TINY: Configs = {
    "layers_per_block": 1, "mid_block_type": None, "block_out_channels": [320, 640, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3, "up_block_types": ["CrossAttnUpBlock2D"] * 3,
}  # fmt: skip

# Published counts, and those of the configurations above: U-Net, then the text encoders.
COUNTS: dict[str, tuple[FamilyName, Configs, int, tuple[int, ...]]] = {
    "SD1.5": ("sd1", {}, 859_520_964, (123_060_480,)),
    "SD1.5 LCM": ("sd1", {"time_cond_proj_dim": 256}, 859_520_964 + 81_920, (123_060_480,)),
    "SD1.5 inpainting": ("sd1", {"in_channels": 9}, 859_520_964 + 5 * 9 * 320, (123_060_480,)),
    "BK-SDM small": ("sd1", SMALL, 579_384_964, (123_060_480,)),
    "BK-SDM tiny": ("sd1", TINY, 323_384_964, (123_060_480,)),
    "SD2.1": ("sd2", {}, 865_910_724, (340_387_840,)),
    "SDXL": ("sdxl", {}, 2_567_463_684, (123_060_480, 694_659_840)),
    "SDXL LCM": ("sdxl", {"time_cond_proj_dim": 256}, 2_567_463_684 + 81_920, (123_060_480, 694_659_840)),
    "SDXL inpainting": ("sdxl", {"in_channels": 9}, 2_567_463_684 + 5 * 9 * 320, (123_060_480, 694_659_840)),
    "SSD-1B": ("sdxl", SSD_1B, 1_331_334_404, (123_060_480, 694_659_840)),
    "refiner": ("sdxl_refiner", {}, 2_259_526_660, (694_659_840,)),
}
VAE_COUNT = 83_653_863


@cache
def _network(role: str, family: FamilyName) -> nn.Module:
    return build(role, published_config(role, family))


def build(role: str, config: Configs) -> nn.Module:
    """A network of full size without memory."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        if role == "unet":
            unet: nn.Module = UNet2DConditionModel.from_config(config)
            return unet
        if role == "vae":
            vae: nn.Module = AutoencoderKL.from_config(config)
            return vae
        kind: Any = CLIPTextModelWithProjection if role == "text_encoder_2" else CLIPTextModel
        text: nn.Module = kind(CLIPTextConfig(**config))
        return text


def full_parts(family: FamilyName, unet: Configs, prediction: Prediction = "epsilon") -> ModelParts:
    """A model of full size whose tensors have no memory."""
    parts = {}
    for role in NETWORKS[family]:
        config = published_config(role, family, prediction)
        network = build(role, config := config | unet) if role == "unet" else _network(role, family)
        parts[role] = Part(config, DictSource(published_tensors(role, network)))
    scheduler = scheduler_config(family, prediction, False)
    return ModelParts(family, parts, prediction, False, scheduler, "diffusers", "full size")


def count(source: TensorSource) -> int:
    return sum(torch.Size(source.shape(name)).numel() for name in source.names())


def shapes(source: TensorSource) -> Shapes:
    return {name: list(source.shape(name)) for name in source.names()}


@pytest.mark.parametrize("name", COUNTS)
def test_full_sizes_are_told_by_shapes(name: str) -> None:
    family, changed, unet_count, text_counts = COUNTS[name]
    parts = full_parts(family, changed)
    file = original_tensors(parts)
    layout = recognise(file)
    assert layout.family == family
    assert list(layout.parts) == list(parts.parts)
    assert (layout.extras, layout.leftovers, layout.prediction) == ((), (), None)
    expected = {"unet": unet_count, "vae": VAE_COUNT}
    expected |= dict(zip([role for role in NETWORKS[family] if role.startswith("text")], text_counts, strict=True))
    for role, part in layout.parts.items():
        # What is recognised is what the library builds from the configuration that was told by the shapes.
        found = shapes(RenamedSource(file, part.table))
        assert found == shapes(parts.parts[role].tensors)
        network = build(role, part.config) if role == "unet" else _network(role, family)
        assert found == shapes(DictSource(published_tensors(role, network)))
        assert count(RenamedSource(file, part.table)) == expected[role]
        if role != "unet":
            assert part.config == parts.parts[role].config
    assert unet_shape_of(layout.parts["unet"].config) == unet_shape_of(parts.parts["unet"].config)
    told = layout.parts["unet"].config
    differing = {field for field, value in parts.parts["unet"].config.items() if told[field] != value}
    # Levels without attention may have any depth.
    assert differing <= ({"transformer_layers_per_block"} if name == "SSD-1B" else set())


@pytest.mark.parametrize(("family", "changed"), [("sdxl", VEGA), ("sdxl", KOALA)], ids=["Vega", "KOALA"])
def test_other_small_models_are_told_by_shapes(family: FamilyName, changed: Configs) -> None:
    parts = full_parts(family, changed)
    layout = recognise(original_tensors(parts))
    found = shapes(DictSource(published_tensors("unet", build("unet", layout.parts["unet"].config))))
    assert found == shapes(parts.parts["unet"].tensors)


def test_pruned_files_lack_what_their_readers_expect() -> None:
    names = {name for name in original_tensors(full_parts("sdxl", SSD_1B)).names() if ".middle_block." in name}
    # ComfyUI reads a middle without attention as one residual block.
    assert {name.split(".")[3] for name in names} == {"0"}


@pytest.mark.parametrize("name", ["sd15", "sdxl_base", "sdxl_refiner"])
def test_published_key_lists(name: str) -> None:
    table = golden(f"checkpoint_keys_{name}.json.gz")
    file = DictSource({key: torch.empty(shape, device="meta") for key, shape in table["keys"].items()})
    layout = recognise(file)
    family = {"sd15": "sd1", "sdxl_base": "sdxl", "sdxl_refiner": "sdxl_refiner"}[name]
    assert layout.family == family
    assert layout.leftovers == ()
    assert [key.rpartition(".")[2] for key in layout.extras] == ([] if name == "sd15" else ["logit_scale"])
    for role, part in layout.parts.items():
        assert part.config == published_config(role, layout.family)
        sources: dict[str, list[str]] = {}
        for ours, derived in part.table.items():
            sources.setdefault(derived.sources[0], []).append(ours)
        expected = {key: ours if isinstance(ours, list) else [ours] for key, ours in table[role].items()}
        assert sources == expected
        view = RenamedSource(file, part.table)
        for key, change in table["shape_changes"].items():
            if key in sources and change["original"]:
                lists = change["diffusers"] if isinstance(change["diffusers"][0], list) else [change["diffusers"]]
                assert [list(view.shape(ours)) for ours in sources[key]] == lists
    # And back: the same names with the same shapes, but for what no network of ours has.
    parts = {role: Part(part.config, RenamedSource(file, part.table)) for role, part in layout.parts.items()}
    model = ModelParts(layout.family, parts, "epsilon", False, {}, "safetensors", name)
    expected_shapes = {key: shape for key, shape in table["keys"].items() if key not in layout.extras}
    assert shapes(original_tensors(model)) == expected_shapes
    assert len(expected_shapes) + len(layout.extras) == {"sd15": 1130, "sdxl_base": 2514, "sdxl_refiner": 1858}[name]


def sd2_file(layers: int, projection: bool) -> dict[str, Tensor]:
    """Stable Diffusion 2.x with `layers` layers in its OpenCLIP."""
    file = original_tensors(full_parts("sd2", {}))
    tensors = {name: torch.empty(file.shape(name), device="meta") for name in file.names()}
    prefix = "cond_stage_model.model."
    for name in list(tensors):
        if name.startswith(f"{prefix}transformer.resblocks.22.") and layers == 24:
            tensors[name.replace(".22.", ".23.")] = tensors[name]
    if projection:
        tensors |= {f"{prefix}text_projection": torch.empty(1024, 1024, device="meta")}
        tensors |= {f"{prefix}logit_scale": torch.empty((), device="meta")}
    return tensors


@pytest.mark.parametrize(("layers", "projection"), [(24, True), (24, False), (23, False), (23, True)])
def test_the_last_layer_of_2x_is_kept_but_not_used(layers: int, projection: bool) -> None:
    tensors = sd2_file(layers, projection)
    layout = recognise(DictSource(tensors))
    assert layout.parts["text_encoder"].config == published_config("text_encoder", "sd2")
    assert len(layout.extras) == (12 if layers == 24 else 0) + (2 if projection else 0)
    assert layout.leftovers == ()
    view = RenamedSource(DictSource(tensors), layout.parts["text_encoder"].table)
    assert count(view) == 340_387_840
    assert view.shape("text_model.encoder.layers.22.self_attn.q_proj.weight") == (1024, 1024)


def test_2x_for_768_pixels_has_its_own_configuration() -> None:
    layout = recognise(DictSource(sd2_file(24, True)))
    configs = {role: part.config for role, part in layout.parts.items()}
    for prediction in ("epsilon", "v_prediction"):
        told = with_prediction(configs, "sd2", prediction)
        assert told == {role: published_config(role, "sd2", prediction) for role in NETWORKS["sd2"]}


def tensors_of(name: str) -> dict[str, Tensor]:
    keys = golden(f"checkpoint_keys_{name}.json.gz")["keys"]
    return {key: torch.empty(shape, device="meta") for key, shape in keys.items()}


def test_leftovers_are_told_apart() -> None:
    tensors = tensors_of("sd15")
    junk = ("betas", "model_ema.decay", "model_ema.diffusion_modeltime_embed0weight", "first_stage_model.loss.logvar",
            "cond_stage_model.transformer.text_model.embeddings.position_ids", "logvar",
            "cond_stage_model.transformer.text_projection.weight")  # fmt: skip
    layout = recognise(DictSource({**tensors, **{name: torch.empty(1) for name in junk}}))
    assert sorted(layout.leftovers) == sorted(junk)
    assert layout.extras == ()


def test_markers_are_read() -> None:
    layout = recognise(DictSource({**tensors_of("sdxl_base"), "v_pred": torch.empty(0), "ztsnr": torch.empty(0)}))
    assert (layout.prediction, layout.zero_terminal_snr, layout.leftovers) == ("v_prediction", True, ())


def test_names_without_text_model_are_read() -> None:
    tensors = {name.replace(".transformer.text_model.", ".transformer."): t for name, t in tensors_of("sd15").items()}
    layout = recognise(DictSource(tensors))
    table = layout.parts["text_encoder"].table
    assert all(published_text_name(name) == name for name in table)
    first = "text_model.embeddings.token_embedding.weight"
    assert table[first] == Derived(("cond_stage_model.transformer.embeddings.token_embedding.weight",))


def without(prefix: str, name: str = "sd15") -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors_of(name).items() if not key.startswith(prefix)}


SD15, SDXL = tensors_of("sd15"), tensors_of("sdxl_base")


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({}, "no Stable Diffusion checkpoint"),
        ({"lora_unet_x.lora_up.weight": 1}, "a LoRA, not a base model; give the model"),
        ({"unet.down_blocks.0.attn.to_q.lora.up.weight": 1}, "a LoRA"),
        ({"down_blocks.0.resnets.0.conv1.weight": 1}, "a U-Net alone"),
        ({"encoder.down.0.block.0.conv1.weight": 1}, "a VAE alone; give it with --vae"),
        ({"emb_params": 1}, "a textual inversion embedding"),
        ({"clip_l": 1, "clip_g": 1}, "a textual inversion embedding"),
        ({"double_blocks.0.img_attn.qkv.weight": 1}, "SD3, Flux"),
        (without("first_stage_model."), r"nothing is named first_stage_model\.\*"),
        (without("cond_stage_model."), r"nothing is named cond_stage_model\.\* or conditioner\.embedders\.\*"),
        (without("model.diffusion_model.out."), "2 tensors are missing|out.2.weight' is missing"),
        (without("first_stage_model.decoder."), "has no decoder"),
        (without("first_stage_model.encoder."), "has no encoder"),
        (without("conditioner.embedders.1.", "sdxl_base"), "its second text encoder is missing"),
        (without("model.diffusion_model.label_emb.", "sdxl_base"), "without size conditioning"),
        (without("cond_stage_model.transformer.text_model.encoder.layers.5."), "16 tensors are missing"),
        (SD15 | {"model.diffusion_model.label_emb.0.0.weight": 1}, "told classes or images"),
        (SD15 | {"model.diffusion_model.extra.weight": 1}, r"1 tensors of the U-Net are unknown, e\.g\. extra"),
        (SD15 | {"first_stage_model.encoder.extra.weight": 1}, "1 tensors of the VAE are unknown"),
        (SD15 | {"control_model.input_blocks.0.0.weight": 1}, "a ControlNet"),
        (SDXL | {"edm_mean": 1}, "EDM"),
    ],
)  # fmt: skip
def test_other_files_are_refused(tensors: dict[str, Any], reason: str) -> None:
    table = {name: torch.empty(1) if isinstance(tensor, int) else tensor for name, tensor in tensors.items()}
    with pytest.raises(NotRecognisedError, match=reason):
        recognise(DictSource(table))


def test_recognition_needs_no_full_list() -> None:
    layout: Layout = recognise(DictSource(tensors_of("sdxl_refiner")))
    assert layout.parts["unet"].config["projection_class_embeddings_input_dim"] == 2560
    assert "text_encoder" not in layout.parts
