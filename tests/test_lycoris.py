"""LyCORIS networks: the library's names and shapes, equal changes, merging."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sd_train.demo.tiny_model import TinyKind
from sd_train.families.parts import Part
from sd_train.lora_files.merging import Weighted, merge_into
from sd_train.lora_files.reading import open_lora
from sd_train.trainables.lycoris_module import LycorisModule, Switches
from sd_train.trainables.lycoris_targets import Target
from tests.lycoris_cases import CASES, args, installed, made, prediction, randomise, small_parts, tiny
from tests.models import all_tensors, assert_equal_tensors, golden

GOLDEN: dict[str, Any] = golden("lycoris_keys.json.gz")
"""What `create_network` of lycoris-lora 4.1.3 makes of diffusers' own modules: names, shapes and alphas.

Its text encoder's names have got their `text_model`, which transformers dropped.
"""

NOT_OURS = ("lora_unet_conv_in", "lora_unet_conv_out", "lora_unet_time_embedding_linear_1",
            "lora_unet_time_embedding_linear_2")  # fmt: skip
"""The library also changes the U-Net's two ends and its time embedding."""

MERGED = [case for case in CASES if case not in ("loha", "ia3", "ia3 train_on_input=True", "lora rs_lora=True")]


# Names


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_names_shapes_and_alphas_are_the_librarys(case: str, tmp_path: Path) -> None:
    table = GOLDEN["cases"][case]
    expected = {
        f"{key}.{factor}": found
        for key, kind in zip(GOLDEN["keys"], table["modules"], strict=True)
        for factor, found in (table["kinds"][kind].items() if kind >= 0 else ())
        if key not in NOT_OURS
    }
    network = installed(tiny(whole=True), args(case))
    written = network.file_tensors(network.tensors())
    assert written.keys() == expected.keys()
    for name, tensor in written.items():
        if case.startswith("dylora") and name.endswith("lora_up.weight"):
            # The library leaves out the kernel of a convolution's second factor, which a LoCon has.
            tensor = tensor.flatten(1)
        found = pytest.approx(float(tensor)) if name.endswith(".alpha") else list(tensor.shape)
        assert found == expected[name], name


def test_presets_choose_among_our_targets() -> None:
    def paths(words: str) -> set[str]:
        return {name.partition(".")[0] for name in installed(tiny(whole=True), args(words)).tensors()}

    chosen = paths("ia3 preset=ia3")
    assert {key.rpartition("_to_")[2] for key in chosen if "_to_" in key} == {"k", "v"}
    assert len(chosen) == 16 * (2 * 2 + 1) + 2 * 3
    attention = paths("lora preset=attn-only")
    assert len(attention) == 16 * 8 + 2 * 4
    assert all("attn" in key for key in attention)


def test_sdxl_has_the_original_names_of_matrices_and_norms(tmp_path: Path) -> None:
    family = tiny(kind="sdxl")
    network = installed(family, args("lora train_norm=True preset=unet-only"))
    keys = {name.partition(".")[0] for name in network.tensors()}
    assert {"lora_unet_input_blocks_1_0_in_layers_0", "lora_unet_input_blocks_1_0_in_layers_2"} <= keys
    assert not any("down_blocks" in key or key.startswith("lora_te") for key in keys)
    network.save(tmp_path / "x.safetensors", {})
    lora = open_lora(tmp_path / "x.safetensors", "sdxl")
    assert not lora.unmapped
    assert len(lora.places()) == len(keys)


# What is computed


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])
def test_a_module_computes_what_the_librarys_does(case: str, conv: bool) -> None:
    """Its forward pass in float32, where its rounding does no harm; alpha / block of DyLoRA aside."""
    chosen, generator = args(case), torch.Generator().manual_seed(1)
    layer: nn.Module = nn.Conv2d(8, 16, 3, stride=2, padding=1) if conv else nn.Linear(8, 16)
    x = torch.randn((2, 8, 6, 6) if conv else (2, 3, 8), generator=generator)
    module = LycorisModule(Target("x", layer, False), chosen, 0)
    with torch.no_grad():
        for parameter in module.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        theirs = copy.deepcopy(module.library)
        if chosen.algorithm == "full":
            theirs._org_weight, theirs.org_bias = [layer.weight], [layer.bias]
        if chosen.algorithm == "dylora":
            theirs.get_random_rank_weight = lambda: (*theirs.get_weight(2)[:2], theirs.scale)
        theirs.org_module, theirs.org_forward = [layer], layer.forward
        expected = theirs.forward(x)
        module.install(Switches(training=False))
        assert not torch.allclose(expected, module._forward(x), atol=1e-3)
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", MERGED)
def test_merging_the_file_gives_the_live_prediction(case: str, tmp_path: Path) -> None:
    merge_equals_forward("sd1", case, tmp_path)


@pytest.mark.parametrize("case", ["full train_norm=True"])
def test_merging_it_into_sdxl_too(case: str, tmp_path: Path) -> None:
    merge_equals_forward("sdxl", case, tmp_path)


def merge_equals_forward(kind: TinyKind, case: str, folder: Path) -> None:
    family = tiny(kind=kind)
    before = all_tensors(family)
    with torch.no_grad():
        base = prediction(family)
        network = installed(family, args(case))
        with network.for_inference():
            torch.testing.assert_close(prediction(family), base, atol=1e-5, rtol=0)
            randomise(network)
            live = prediction(family)
        assert (live - base).abs().max() > 0.01
        with network.disabled():
            assert torch.equal(prediction(family), base)
    assert_equal_tensors(all_tensors(family), before)
    network.save(folder / "x.safetensors", {})
    lora, parts = open_lora(folder / "x.safetensors", kind), small_parts(kind)
    assert (lora.unmapped, lora.incomplete()) == ([], [])
    networks = {role: part.tensors for role, part in parts.parts.items() if role != "vae"}
    merged = merge_into(networks, [Weighted(lora, 1.0)])
    changed = {role: Part(part.config, merged.get(role, part.tensors)) for role, part in parts.parts.items()}
    other = made(replace(parts, parts=changed))
    with torch.no_grad():
        torch.testing.assert_close(prediction(other), live, atol=2e-5, rtol=0)


@pytest.mark.parametrize("case", [*CASES, "lora train_norm=True"])
@pytest.mark.parametrize("how", ["float16", "bfloat16", "autocast"])
def test_half_precision_gives_the_same_and_gradients_in_float32(case: str, how: str) -> None:
    """Of linear layers and convolutions; a half base without autocast, and a float32 base with it."""
    for layer, size in (
        (nn.Linear(8, 16), (2, 3, 8)), (nn.Conv2d(8, 16, 3), (2, 8, 6, 6)), (nn.GroupNorm(2, 8), (2, 8, 4, 4)),
    ):  # fmt: skip
        if isinstance(layer, nn.GroupNorm) and "train_norm" not in case:
            continue
        kind = "norm" if isinstance(layer, nn.GroupNorm) else None
        module = LycorisModule(Target("x", layer, False), args(case), 0, kind)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in module.parameters.values():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        module.install(Switches())
        x = torch.randn(size, generator=generator)
        expected = layer(x).detach()
        dtype = torch.bfloat16 if how == "autocast" else getattr(torch, how)
        if how == "autocast":
            with torch.autocast("cpu", dtype):
                found = layer(x)
        else:
            layer.to(dtype)
            found = layer(x.to(dtype))
        assert found.dtype == dtype or kind == "norm"
        torch.testing.assert_close(found.float(), expected, atol=0.05 * float(expected.abs().max()), rtol=0)
        found.float().square().sum().backward()
        for parameter in module.parameters.values():
            assert parameter.dtype == torch.float32
            if case.split()[0] != "dylora":
                assert parameter.grad is not None
                assert torch.isfinite(parameter.grad).all()
                assert parameter.grad.any()


def test_half_precision_keeps_changes_that_rounding_would_lose() -> None:
    layer = nn.Linear(16, 16, bias=False).to(torch.bfloat16)
    module = LycorisModule(Target("x", layer, False), args("full"), 0)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        module.parameters["diff"].fill_(1e-4)
        module.install(Switches())
        x = torch.ones(1, 16, dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            changed = module.forward(x) - module._forward(x)
        # A bfloat16 weight of 1 + 1e-4 is 1: what the layer gives is all that is rounded.
        assert module._applied(x.float()).mean().item() == pytest.approx(16e-4, rel=1e-2)
        assert changed.dtype == layer(x).dtype == torch.bfloat16


@pytest.fixture(autouse=True)
def _global_generators_untouched() -> Iterator[None]:
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(state)
