"""LoRA modules of differing kinds, ranks and rates: what is built, learned, dropped, limited and merged."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sd_train.build_network import merge_base
from sd_train.config.parser import load_run_config
from sd_train.demo.tiny_model import TinyKind, make_tiny_parts, tiny_configs
from sd_train.families.latent import LatentDiffusion
from sd_train.families.published import published_config
from sd_train.families.registry import make_family
from sd_train.lora_files.checking import check
from sd_train.lora_files.reading import lora_from_tensors, open_lora
from sd_train.plan import prepare
from sd_train.plan_network import lora_layout, network_sizes
from sd_train.save_forms import diffusers_lora, save_own
from sd_train.trainables.lora import Lora, LoraSettings
from sd_train.trainables.lora_layout import BlockSize, Layout, Size, block_number
from sd_train.trainables.lora_module import LoraModule
from sd_train.trainables.lora_norms import Factors, change_norms, scale_down
from sd_train.types import Batch, Geometry, Update
from tests.lora_cases import in_diffusers
from tests.models import fresh_tiny, golden, load, reference_pipeline, tiny_parts, write_folder
from tests.runs import words, write_dataset

RATES = {"unet": 1e-3, "text_encoder": 1e-4, "text_encoder_2": 1e-4}


def mixed(sdxl: bool, alphas: bool = True) -> Layout:
    """Another rank, and alpha, in every block; one block without convolutions, one without anything."""
    blocks = [
        BlockSize(Size(1 + place % 4, 1 + place % 3 if alphas else 2.0), Size(place % 3, 1.0))
        for place in range(23 if sdxl else 25)
    ]
    blocks[5] = BlockSize(Size(0, 1), Size(0, 1))
    return Layout(Size(2, 1.0), blocks, sdxl=sdxl)


def installed(family: LatentDiffusion, **changes: Any) -> Lora:
    settings: dict[str, Any] = {"rank": 4, "alpha": 2.0, "dropout": 0.0, "rates": RATES, "seed": 3, **changes}
    lora = Lora(LoraSettings(**settings))
    lora.install(family)
    return lora


def randomise(lora: Lora, scale: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in lora.tensors().items():
            if "lora_up" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)


def predict(family: LatentDiffusion, batch: int = 1) -> Tensor:
    latents = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    geometry = Geometry((64, 64), (0, 0), (64, 64), False, (64, 64))
    conditioning = family.condition(family.encode_texts(["a cat"] * batch), {}, [geometry] * batch)
    return family.predict(latents, torch.full((batch,), 300), conditioning)


def counters(lora: Lora, step: int, micro: int) -> None:
    empty = torch.zeros(0)
    batch = Batch([], [], [], None, None, empty, empty, empty, empty, None, None, [], micro)
    lora.before_batch(Update(step, 0, 0, False, 1, iter(())), batch)


# What is built


def full_size(kind: TinyKind) -> LatentDiffusion:
    """A published U-Net without memory for its weights, beside small text encoders."""
    configs = tiny_configs(kind) | {"unet": published_config("unet", "sdxl" if kind == "sdxl" else "sd1")}
    with torch.device("meta"):
        made = make_family(make_tiny_parts(kind, 0, configs))
    assert isinstance(made, LatentDiffusion)
    return made


@pytest.mark.parametrize(("kind", "table", "modules"), [("sd1", "sd15 conv", 278), ("sdxl", "sdxl conv", 788)])
def test_modules_of_full_size_models_are_sd_scripts(kind: TinyKind, table: str, modules: int) -> None:
    family = full_size(kind)
    targets, layout = family.lora_targets("unet", convolutions=True), mixed(sdxl=kind == "sdxl")
    expected = {key: shapes for key, shapes in golden("lora_keys.json.gz")[table].items() if "lora_unet_" in key}
    assert len(expected) == modules
    assert {target.key for target in targets} == set(expected)
    for target in targets:
        layer = family.module("unet", target.path)
        wide = isinstance(layer, nn.Conv2d) and layer.kernel_size != (1, 1)
        # Only 3x3 convolutions have conv_dim: 1x1 and the linear layers of residual blocks have network_dim.
        assert wide == (expected[target.key][0][2:] == [3, 3])
        assert Layout(wide=Size(9, 3)).size("unet", target.path, wide, Size(4, 2)) == ((9, 3) if wide else (4, 2))
        number = block_number(target.path, layout.sdxl)
        size = layout.size("unet", target.path, wide, Size(4, 2))
        rank = 0 if number == 5 else number % 3 if wide else 1 + number % 4
        assert (0 if size is None else size.rank) == rank, target


def test_only_the_file_s_modules_and_an_alpha_of_0() -> None:
    family = fresh_tiny()
    path = "down_blocks.0.resnets.0.conv1"
    own = {("unet", path): Size(3, 0.0), ("text_encoder", "text_model.encoder.layers.1.mlp.fc1"): Size(2, 5.0)}
    tensors = installed(family, layout=Layout(own=own)).tensors()
    assert {name: float(tensor) for name, tensor in tensors.items() if name.endswith(".alpha")} == {
        "lora_unet_down_blocks_0_resnets_0_conv1.alpha": 3.0,
        "lora_te_text_model_encoder_layers_1_mlp_fc1.alpha": 5.0,
    }
    assert tensors["lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight"].shape == (3, 32, 3, 3)


# Groups and rates


def test_blocks_and_up_matrices_have_rates_of_their_own() -> None:
    weights = tuple(0.0 if block in (1, 2) else 0.5 if block == 12 else 1.0 for block in range(25))
    lora = installed(fresh_tiny(), layout=Layout(weights=weights), plus={"unet": 16.0})
    groups = {group.name: group for group in lora.groups()}
    # sd-scripts numbers attentions only where a LoRA has no convolutions.
    blocks = [4, 5, 7, 8, 12, *range(16, 25)]
    names = [f"unet_block{block}{plus}" for block in blocks for plus in ("", " plus")]
    assert sorted(groups) == sorted(["textencoder", *names])
    assert groups["unet_block12"].lr == pytest.approx(5e-4)
    assert groups["unet_block12 plus"].lr == pytest.approx(16 * 5e-4)
    assert groups["unet_block4 plus"].lr == pytest.approx(16e-3)
    assert groups["textencoder"].lr == 1e-4
    for name, group in groups.items():
        halves = {parameter.split(".")[1] for parameter in group.params}
        assert halves == ({"lora_down", "lora_up"} if name == "textencoder" else
                          {"lora_up"} if name.endswith("plus") else {"lora_down"})  # fmt: skip
    everything = [name for group in groups.values() for name in group.params]
    assert sorted(everything) == sorted(name for name in lora.tensors() if not name.endswith(".alpha"))
    plain = installed(fresh_tiny(), plus={"text_encoder": 4.0}).groups()
    assert [(group.name, group.lr) for group in plain] == [
        ("textencoder", 1e-4), ("textencoder plus", 4e-4), ("unet", 1e-3),
    ]  # fmt: skip


# Dropout


def test_a_rank_is_dropped_for_a_whole_sample() -> None:
    for layer, x in ((nn.Linear(5, 200), torch.ones(3, 7, 5)), (nn.Linear(5, 200), torch.ones(3, 5)),
                     (nn.Conv2d(5, 200, 3, padding=1), torch.ones(3, 5, 4, 6))):  # fmt: skip
        module = LoraModule("x", layer, 200, 200.0, 0)
        module.install(layer, Lora(LoraSettings(1, 1.0, 0.0, {}, 0, rank_dropout=0.25))._switches)
        with torch.no_grad():
            [parameter.zero_() for parameter in layer.parameters()]
            module.down.fill_(1.0), module.up.copy_(torch.eye(200).view_as(module.up))
            values = layer(x)
        ranks = values.movedim(1 if isinstance(layer, nn.Conv2d) else -1, 1).flatten(2) if values.ndim > 2 else values
        dropped = ranks == 0
        if values.ndim > 2:
            assert torch.equal(dropped.all(2), dropped.any(2)), "a rank is dropped everywhere or nowhere in a sample"
            dropped = dropped.all(2)
        assert 0.15 < dropped.float().mean() < 0.35
        assert not torch.equal(dropped[0], dropped[1])
        kept = values[values != 0]
        assert kept.max().item() == pytest.approx((45 if values.ndim == 4 else 5) / 0.75)


def test_modules_are_left_out_by_the_counters() -> None:
    family = fresh_tiny()
    lora = installed(family, module_dropout=0.3, rank_dropout=0.2)
    randomise(lora)
    modules = [module for own in lora.modules.values() for module in own.values()]
    left = []
    for key in ((0, 0), (0, 1), (1, 0), (0, 0)):
        counters(lora, *key)
        left.append([module._left_out() for module in modules])
    assert left[0] == left[3] != left[1] != left[2]
    assert 0.2 < sum(map(sum, left)) / (4 * len(modules)) < 0.4
    state = torch.get_rng_state()
    with torch.no_grad():
        first, again = predict(family), predict(family)
        counters(lora, 7, 0)
        other = predict(family)
        with lora.for_inference():
            inference = predict(family)
        assert not torch.equal(predict(family), inference)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    plain = fresh_tiny()
    randomise(installed(plain))
    with torch.no_grad():
        assert torch.equal(predict(plain), inference)


# Norms


def test_norms_are_limited_as_in_sd_scripts() -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    modules = [
        Factors(drawn(6, 2), drawn(2, 5), 0.5), Factors(drawn(6, 2) * 1e-3, drawn(2, 5), 0.5),
        Factors(drawn(6, 3, 1, 1), drawn(3, 5, 3, 3), 2.0), Factors(torch.zeros(6, 2), drawn(2, 5), 0.25),
    ]  # fmt: skip
    before = [(module.up.clone(), module.down.clone()) for module in modules]

    def change(up: Tensor, down: Tensor, scale: float) -> Tensor:
        return torch.einsum("or,r...->o...", up.flatten(1), down) * scale

    norms = [float(change(up, down, module.scale).norm()) for (up, down), module in zip(before, modules, strict=True)]
    assert [float(change_norms([module])[0]) for module in modules] == pytest.approx(norms, rel=1e-5, abs=1e-7)
    figures = scale_down(modules, most := 1.5)
    assert [norm > most for norm in norms] == [True, False, True, False]
    for (up, down), module, norm in zip(before, modules, norms, strict=True):
        root = math.sqrt(min(1.0, most / norm)) if norm else 1.0
        torch.testing.assert_close(module.up, up * root)
        torch.testing.assert_close(module.down, down * root)
        if norm <= most:
            assert torch.equal(module.up, up)
            assert torch.equal(module.down, down)
    after = [min(norm, most) for norm in norms]
    expected = {"keys_scaled": 2, "average_key_norm": sum(after) / 4, "max_key_norm": most}
    assert {name: float(value) for name, value in figures.items()} == pytest.approx(
        {f"max_norm/{name}": value for name, value in expected.items()}, rel=1e-5
    )


def test_it_is_applied_after_each_update() -> None:
    lora = installed(fresh_tiny(), layout=mixed(sdxl=False), most_norm=0.2)
    assert lora.figures() == {}
    randomise(lora, 1.0)
    before = {name: tensor.clone() for name, tensor in lora.tensors().items()}
    lora.after_step()
    assert 0 < float(lora.figures()["max_norm/keys_scaled"]) <= len(before) / 3
    assert float(lora.figures()["max_norm/max_key_norm"]) == pytest.approx(0.2)
    key = "lora_unet_down_blocks_1_resnets_0_conv1"
    assert not torch.equal(lora.tensors()[f"{key}.lora_up.weight"], before[f"{key}.lora_up.weight"])
    free = installed(fresh_tiny())
    randomise(free, 1.0)
    free.after_step()
    assert free.figures() == {}


# Files


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_the_merged_file_predicts_what_the_modules_predict(kind: TinyKind, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, kind)
    family = load(folder)
    with torch.no_grad():
        base = predict(family)
        lora = installed(family, layout=mixed(sdxl=kind == "sdxl"))
        randomise(lora)
        expected = predict(family)
    lora.save(tmp_path / "lora.safetensors", {})
    # In two halves, and in the other form.
    lora.save(tmp_path / "lora.pt", {})
    arguments = words(folder, write_dataset(tmp_path / "d.toml"), tmp_path / "out",
                      "--max_train_steps 1 --base_weights_multiplier 0.25 0.75 --base_weights")  # fmt: skip
    arguments += [str(tmp_path / "lora.safetensors"), str(tmp_path / "lora.pt")]
    merged = load(folder)
    merge_base(prepare(load_run_config("train_network", arguments).config), merged)
    assert merged.digest() != load(folder).digest()
    with torch.no_grad():
        torch.testing.assert_close(predict(merged), expected, atol=1e-5, rtol=1e-4)
    assert (expected - base).abs().mean() > 0.01


def test_both_forms_are_read_alike(tmp_path: Path) -> None:
    lora = installed(fresh_tiny(), layout=mixed(sdxl=False), precision=torch.float16)
    randomise(lora)
    for suffix in ("safetensors", "ckpt", "pt"):
        lora.save(tmp_path / f"lora.{suffix}", {"ss_network_dim": "4"})
    saved = load_file(tmp_path / "lora.safetensors")
    for suffix in ("ckpt", "pt"):
        pickled = torch.load(tmp_path / f"lora.{suffix}", weights_only=True)
        assert sorted(pickled) == sorted(saved)
        assert all(torch.equal(pickled[name], tensor) and pickled[name].dtype == torch.float16
                   for name, tensor in saved.items())  # fmt: skip
        assert len(open_lora(tmp_path / f"lora.{suffix}").places()) == len(saved) // 3


@pytest.mark.parametrize(("kind", "form"), [("sd1", "kohya"), ("sdxl", "kohya"), ("sd1", "diffusers")])
def test_diffusers_makes_the_same_change_of_a_file_with_convolutions(
    kind: TinyKind, form: str, tmp_path: Path
) -> None:
    # It loses the alphas of attentions in kohya's files where they differ, which the plan warns of.
    lora = installed(fresh_tiny(kind), layout=mixed(kind == "sdxl", alphas=form == "diffusers"))
    randomise(lora)
    path = tmp_path / "lora.safetensors"
    (save_own if form == "kohya" else diffusers_lora(kind, torch.float32))(lora, path, {}, None)
    pipeline = reference_pipeline(kind)
    # A level of names that the reference has for clip_skip, and that is not in the module tree.
    pipeline.text_encoder.__dict__.pop("text_model", None)
    found = in_diffusers(pipeline, path)
    # Convolutions have another alpha than attentions here, which diffusers keeps.
    assert check(open_lora(path, kind)).readers["diffusers"].reads
    ours = {adapter.place: adapter for adapter in lora_from_tensors(lora.tensors(), family=kind).adapters()}
    assert len(found) == len(ours) > 200
    for place, change in found.items():
        up, down = (ours[place].factors[f"lora_{half}.weight"] for half in ("up", "down"))
        expected = torch.einsum("or,r...->o...", up.flatten(1), down) * ours[place].scale
        torch.testing.assert_close(change, expected.view_as(change), atol=2e-5, rtol=1e-4)


# The plan


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("conv", ["", " conv_dim=3 conv_alpha=1"])
def test_the_plan_knows_the_size(kind: TinyKind, conv: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path, kind)
    dims = ",".join(str(place % 3) for place in range(23 if kind == "sdxl" else 25))
    more = f"--max_train_steps 1 --network_args mid_lr_weight={'1,0,1' if kind == 'sdxl' else 0} block_dims={dims}"
    arguments = words(folder, write_dataset(tmp_path / "d.toml"), tmp_path / "out", more + conv)
    prepared = prepare(load_run_config("train_network", arguments).config)
    assert prepared.kind is not None
    lora = installed(fresh_tiny(kind), layout=lora_layout(prepared.config, prepared.kind))
    numbers = {role: 0 for role in lora.modules}
    for role, modules in lora.modules.items():
        for module in modules.values():
            numbers[role] += module.down.numel() + module.up.numel() + 1
    assert network_sizes(prepared.config, prepared.kind, tiny_parts(kind)) == numbers
