"""LoRA: the change it makes, what diffusers makes of its file, switches, dropout, strictness."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from sd_train.demo.tiny_model import make_tiny_parts
from sd_train.errors import ModelError
from sd_train.families.latent import LatentDiffusion
from sd_train.families.published import published_config
from sd_train.families.sd import StableDiffusion
from sd_train.trainables.lora import Lora, LoraSettings
from sd_train.trainables.lora_module import LoraModule
from sd_train.types import Batch, Update
from tests.models import DATA, all_tensors, assert_equal_tensors, fresh_tiny, golden

BOTH = {"unet": 1e-4, "text_encoder": 5e-5}
SETTINGS = LoraSettings(rank=4, alpha=2.0, dropout=0.0, rates=BOTH, seed=3)


@pytest.fixture
def family() -> LatentDiffusion:
    return fresh_tiny()


def installed(family: LatentDiffusion, **changes: Any) -> Lora:
    lora = Lora(dataclasses.replace(SETTINGS, **changes))
    lora.install(family)
    return lora


def randomise(lora: Lora, scale: float, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in lora.tensors().items():
            if "lora_up" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)


def predict(family: LatentDiffusion, caption: str = "a cat") -> Tensor:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    conditioning = family.condition(family.encode_texts([caption]), {}, [])
    return family.predict(latents, torch.tensor([300]), conditioning)


def counters(lora: Lora, step: int, micro: int) -> None:
    """Tell the LoRA where the training stands."""
    empty = torch.zeros(0)
    batch = Batch([], [], [], None, None, empty, empty, empty, empty, None, None, [], micro)
    lora.before_batch(Update(step, 0, 0, False, 1, iter(())), batch)


# The change


@pytest.fixture(scope="module")
def wide_family() -> LatentDiffusion:
    """A model whose first level and text encoder are as wide as Stable Diffusion 1.5's."""
    unet = published_config("unet") | {"block_out_channels": [320, 32, 32, 32]}
    vae = published_config("vae") | {"block_out_channels": [32, 32, 32, 32]}
    text = published_config("text_encoder") | {"num_hidden_layers": 1}
    return StableDiffusion(make_tiny_parts("sd1", 0, {"unet": unet, "vae": vae, "text_encoder": text}))


@pytest.mark.parametrize("key", golden("lora_golden.json")["modules"])
def test_the_change_equals_sd_scripts_merge(key: str, wide_family: LatentDiffusion) -> None:
    expected = golden("lora_golden.json")["modules"][key]
    tensors = {name: value for name, value in load_file(DATA / "lora_golden.safetensors").items() if key in name}
    lora = installed(wide_family, rank=expected["rank"], alpha=expected["alpha"])
    lora.load(tensors, strict=False)
    role = "unet" if "unet" in key else "text_encoder"
    path = next(target.path for target in wide_family.lora_targets(role) if target.key == key)
    layer = wide_family.module(role, path)
    # Unit vectors in, columns of the changed matrix out.
    unit = torch.eye(expected["shape"][1])
    unit = unit.view(*unit.shape, 1, 1) if isinstance(layer, nn.Conv2d) else unit
    with torch.no_grad(), lora.disabled():
        base = layer(unit)
    with torch.no_grad():
        change = (layer(unit) - base).transpose(0, 1).reshape(expected["shape"])
    assert change.norm().item() == pytest.approx(expected["norm"], rel=1e-4)
    assert change.double().sum().item() == pytest.approx(expected["sum"], abs=2e-3)
    for _, place, value in expected["samples"]:
        assert change[tuple(place)].item() == pytest.approx(value, abs=2e-6)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (1, 1, 0)])
def test_convolutions_keep_stride_and_padding(kernel: int, stride: int, padding: int, family: LatentDiffusion) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 5, kernel, stride, padding)
    x, weight = torch.randn(2, 6, 9, 7), layer.weight.detach().clone()
    lora = installed(family)
    module = LoraModule("conv", layer, rank=3, alpha=1.5, seed=0)
    with torch.no_grad():
        module.up.normal_()
    module.install(layer, lora._switches)
    delta = torch.einsum("orxy,rihw->oihw", module.up, module.down) * (1.5 / 3)
    expected = functional.conv2d(x, weight + delta, layer.bias, stride, padding)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_untrained_it_changes_nothing_to_the_bit(family: LatentDiffusion) -> None:
    weights = {name: tensor.clone() for name, tensor in all_tensors(family).items()}
    with torch.no_grad():
        before = predict(family)
        lora = installed(family)
        assert torch.equal(predict(family), before)
        randomise(lora, 0.1)
        assert not torch.equal(predict(family), before)
        with lora.disabled():
            assert torch.equal(predict(family), before)
    # Neither names nor values of the base model change.
    assert_equal_tensors(all_tensors(family), weights)


def test_the_same_seed_gives_the_same_factors() -> None:
    first, again = (installed(fresh_tiny()).tensors() for _ in range(2))
    assert_equal_tensors(first, again)
    other = installed(fresh_tiny(), seed=4).tensors()
    key = next(name for name in first if "lora_down" in name)
    assert not torch.equal(first[key], other[key])
    alone = installed(fresh_tiny(), rates={"unet": 1.0}).tensors()
    assert all(torch.equal(tensor, first[name]) for name, tensor in alone.items())
    torch.manual_seed(1)
    state = torch.get_rng_state()
    installed(fresh_tiny())
    assert torch.equal(torch.get_rng_state(), state)


# diffusers


PROMPT, NEGATIVE = "a photo of a cat", "blurry"


def pictures(pipeline: Any, **prompts: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(published_config("scheduler"))
    generator = torch.Generator().manual_seed(8)
    sizes = {"height": 64, "width": 64, "num_inference_steps": 3, "guidance_scale": 4.0}
    return np.asarray(pipeline(**prompts, **sizes, generator=generator, output_type="np").images[0])


def our_picture(family: LatentDiffusion) -> np.ndarray:
    pipeline = family.pipeline(DDIMScheduler.from_config(published_config("scheduler")))
    with torch.no_grad():
        return pictures(pipeline, **family.prompt_arguments(PROMPT, NEGATIVE, 64, 64))


@pytest.mark.parametrize("roles", [("unet", "text_encoder"), ("unet",), ("text_encoder",)], ids="+".join)
def test_diffusers_makes_our_picture_from_our_file(
    roles: tuple[str, ...], family: LatentDiffusion, tiny_folder: Path, tmp_path: Path
) -> None:
    base = our_picture(family)
    lora = installed(family, alpha=1.0, rates={role: 1e-4 for role in roles})
    randomise(lora, 1.0)
    ours = our_picture(family)
    lora.save(tmp_path / "lora.safetensors", {"ss_network_dim": "4"})
    theirs = StableDiffusionPipeline.from_pretrained(tiny_folder, local_files_only=True, safety_checker=None)
    assert np.abs(pictures(theirs, prompt=PROMPT, negative_prompt=NEGATIVE) - base).mean() < 1e-5
    theirs.load_lora_weights(tmp_path / "lora.safetensors")
    assert np.abs(pictures(theirs, prompt=PROMPT, negative_prompt=NEGATIVE) - ours).mean() < 1e-5
    # Of pictures in [0, 1] with a standard deviation of 0.15.
    assert np.abs(ours - base).mean() > (0.02 if "unet" in roles else 0.004)


def test_a_loaded_file_predicts_the_same(family: LatentDiffusion, tmp_path: Path) -> None:
    lora = installed(family)
    randomise(lora, 0.2)
    lora.save(tmp_path / "lora.safetensors", {})
    other_family = fresh_tiny()
    other = installed(other_family, seed=99)
    other.load(load_file(tmp_path / "lora.safetensors"))
    assert_equal_tensors(other.tensors(), lora.tensors())
    with torch.no_grad():
        assert torch.equal(predict(other_family), predict(family))


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16, None])
def test_the_file_is_in_the_precision_asked_for(
    precision: torch.dtype | None, family: LatentDiffusion, tmp_path: Path
) -> None:
    lora = installed(family, precision=precision)
    lora.save(tmp_path / "lora.safetensors", {})
    saved = load_file(tmp_path / "lora.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {precision or torch.float32}
    assert saved.keys() == lora.tensors().keys()
    other = {name: tensor + 1 for name, tensor in lora.tensors().items()}
    lora.save(tmp_path / "other.safetensors", {}, other)
    key = next(iter(other))
    assert torch.equal(load_file(tmp_path / "other.safetensors")[key], other[key].to(precision or torch.float32))
    assert all(parameter.dtype == torch.float32 for group in lora.groups() for parameter in group.params.values())


# Groups and rates


def test_groups_and_rates(family: LatentDiffusion) -> None:
    lora = installed(family)
    assert [(group.name, group.lr) for group in lora.groups()] == [("textencoder", 5e-5), ("unet", 1e-4)]
    named = {name: parameter for group in lora.groups() for name, parameter in group.params.items()}
    tensors = lora.tensors()
    assert set(named) == {name for name in tensors if not name.endswith(".alpha")}
    for name, parameter in named.items():
        assert parameter.data_ptr() == tensors[name].data_ptr()
    assert len(named) == 2 * (2 * 6 + 192)


@pytest.mark.parametrize("rates", [{"unet": 1e-4, "text_encoder": 0.0}, {"unet": 1e-4}])
def test_a_rate_of_zero_makes_no_modules(rates: dict[str, float], family: LatentDiffusion) -> None:
    lora = installed(family, rates=rates)
    assert [group.name for group in lora.groups()] == ["unet"]
    assert lora.trains("unet")
    assert not lora.trains("text_encoder")
    assert all(name.startswith("lora_unet_") for name in lora.tensors())
    nothing = Lora(dataclasses.replace(SETTINGS, rates={"unet": 0.0}))
    nothing.install(family)
    assert nothing.groups() == []
    assert nothing.tensors() == {}


# Dropout


def gradients(lora: Lora, family: LatentDiffusion) -> dict[str, Tensor]:
    predict(family).square().mean().backward()
    found: dict[str, Tensor] = {}
    for group in lora.groups():
        for name, parameter in group.params.items():
            assert parameter.grad is not None, name
            found[name], parameter.grad = parameter.grad, None
    return found


def test_dropout_depends_on_the_counters_alone(family: LatentDiffusion) -> None:
    lora = installed(family, dropout=0.5)
    randomise(lora, 0.2)
    seen: dict[tuple[int, int], Tensor] = {}
    state = torch.get_rng_state()
    with torch.no_grad():
        for key in ((0, 0), (0, 1), (1, 0), (0, 0), (1, 0)):
            counters(lora, *key)
            prediction = predict(family)
            assert torch.equal(seen.setdefault(key, prediction), prediction)
        assert len({tensor.sum().item() for tensor in seen.values()}) == 3
        with lora.for_inference():
            plain = predict(family)
        lora._switches.dropout = 0.0
        assert torch.equal(plain, predict(family))
    assert torch.equal(torch.get_rng_state(), state)


def test_inference_mode_ends_also_after_an_error(family: LatentDiffusion) -> None:
    lora = installed(family, dropout=0.5)
    randomise(lora, 0.2)
    with torch.no_grad():
        dropped = predict(family)
        for switch in (lora.for_inference, lora.disabled):
            seen: list[Tensor] = []
            with suppress(ValueError), switch():
                seen.append(predict(family))
                raise ValueError("stop")
            assert not torch.equal(seen[0], dropped)
            assert torch.equal(predict(family), dropped)


def test_dropout_keeps_the_mean_and_zeroes_its_part() -> None:
    switches = Lora(dataclasses.replace(SETTINGS, dropout=0.25))._switches
    layer = nn.Linear(5, 4000)
    module = LoraModule("x", layer, rank=4000, alpha=4000.0, seed=0)
    module.install(layer, switches)
    with torch.no_grad():
        layer.weight.zero_(), layer.bias.zero_(), module.down.fill_(0.2), module.up.copy_(torch.eye(4000))
        values = layer(torch.ones(1, 5))
    assert values.eq(0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert values[values != 0].unique().tolist() == pytest.approx([1 / 0.75])


def test_gradient_checkpointing_gives_equal_gradients() -> None:
    found: list[dict[str, Tensor]] = []
    for checkpointed in (False, True):
        family = fresh_tiny()
        lora = installed(family, dropout=0.3)
        randomise(lora, 0.1)
        counters(lora, 5, 1)
        if checkpointed:
            family.checkpoint_gradients("unet")
            family.checkpoint_gradients("text_encoder")
        found.append(gradients(lora, family))
    assert_equal_tensors(*found)
    # Self-attention over the one pixel of the middle block has nothing to weigh: no gradients for its q and k.
    silent = {name.partition(".")[0] for name, tensor in found[0].items() if not tensor.any()}
    middle = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_"
    assert silent == {f"{middle}q", f"{middle}k"}


# Loading is strict


def missing(tensors: dict[str, Tensor]) -> None:
    del tensors["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"]


def extra(tensors: dict[str, Tensor]) -> None:
    tensors["lora_unet_conv_in.lora_down.weight"] = torch.zeros(4, 4, 3, 3)


def other_rank(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if "lora_down" in name:
            tensors[name] = torch.zeros(8, *tensor.shape[1:])


def other_alpha(tensors: dict[str, Tensor]) -> None:
    tensors["lora_unet_mid_block_attentions_0_proj_in.alpha"] = torch.tensor(4.0)


@pytest.mark.parametrize(
    ("change", "count", "reason"),
    [
        (missing, 1, r"lora_unet_mid_block_attentions_0_proj_in\.lora_up\.weight is missing"),
        (extra, 1, r"lora_unet_conv_in\.lora_down\.weight is not part of this network"),
        (other_rank, 204, r"has shape \(8, \d+.*\), --network_dim makes it \(4, \d+"),
        (other_alpha, 1, r"alpha is 4, --network_alpha is 2"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    change: Callable[[dict[str, Tensor]], None], count: int, reason: str, family: LatentDiffusion
) -> None:
    lora = installed(family)
    before = {name: tensor.clone() for name, tensor in lora.tensors().items()}
    tensors = {name: tensor + 1 if "lora_" in name[-18:] else tensor for name, tensor in before.items()}
    change(tensors)
    with pytest.raises(ModelError, match=rf"(?s)^{count} differences.*{reason}"):
        lora.load(tensors)
    assert_equal_tensors(lora.tensors(), before)


def test_a_part_loads_where_that_is_asked_for(family: LatentDiffusion) -> None:
    lora = installed(family)
    before = {name: tensor.clone() for name, tensor in lora.tensors().items()}
    key = "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"
    lora.load({key: torch.ones_like(before[key]), "other.alpha": torch.tensor(1.0)}, strict=False)
    after = lora.tensors()
    assert torch.equal(after.pop(key), torch.ones_like(before.pop(key)))
    assert_equal_tensors(after, before)


@pytest.fixture(autouse=True)
def _global_generator_untouched() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield
