"""Attention without the library's questions at every call, and LoRA's stacked projections."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, SlicedAttnProcessor
from models import fresh_tiny
from torch import Tensor

from sd_train.families.attention import LeanAttention
from sd_train.families.latent import LatentDiffusion
from sd_train.trainables.lora import Lora, LoraSettings
from sd_train.trainables.lora_layout import Layout, Size
from sd_train.types import Conditioning


def answer(family: LatentDiffusion) -> Tensor:
    """The U-Net's output on fixed noise."""
    generator = torch.Generator().manual_seed(1)
    config: Any = family.unet.config
    states = torch.randn(2, 77, config.cross_attention_dim, generator=generator)
    pooled, extra = None, dict[str, Tensor]()
    if config.addition_embed_type is not None:
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        pooled, extra = torch.randn(2, width, generator=generator), {"time_ids": torch.full((2, 6), 64.0)}
    noisy = torch.randn(2, 4, 8, 16, generator=generator)
    return family.predict(noisy, torch.tensor([10, 700]), Conditioning(states, pooled, extra))


@contextmanager
def the_librarys(family: LatentDiffusion) -> Iterator[None]:
    lean = [module for module in family.unet.modules() if isinstance(module, LeanAttention)]
    assert lean
    for module in lean:
        module.__class__ = Attention
    try:
        yield
    finally:
        for module in lean:
            module.__class__ = LeanAttention


def installed(family: LatentDiffusion, **settings: Any) -> Lora:
    """A LoRA on the U-Net whose up matrices are no zeros."""
    lora = Lora(LoraSettings(4, 2.0, settings.pop("dropout", 0.0), {"unet": 1e-4}, 0, **settings))
    lora.install(family)
    generator = torch.Generator().manual_seed(2)
    lora.load({
        name: tensor if name.endswith("alpha") else 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in lora.tensors().items()
    })  # fmt: skip
    return lora


def gradients(family: LatentDiffusion, lora: Lora) -> dict[str, Tensor]:
    params = {name: each for group in lora.groups() for name, each in group.params.items()}
    answer(family).float().square().sum().backward()
    found = {name: each.grad for name, each in params.items() if each.grad is not None}
    assert len(found) == len(params)
    for each in params.values():
        each.grad = None
    return found


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_it_answers_as_the_library_to_the_bit(kind: Any, dtype: torch.dtype | None) -> None:
    family = fresh_tiny(kind)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
        ours = answer(family)
        with the_librarys(family):
            assert torch.equal(answer(family), ours)


def test_another_processor_is_used() -> None:
    family = fresh_tiny()
    with torch.no_grad():
        usual = answer(family)
        family.unet.set_attn_processor(SlicedAttnProcessor(1))
        called: list[int] = []
        whole = SlicedAttnProcessor.__call__

        def counting(self: Any, *arguments: Any, **named: Any) -> Any:
            called.append(1)
            return whole(self, *arguments, **named)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SlicedAttnProcessor, "__call__", counting)
            torch.testing.assert_close(answer(family), usual, atol=1e-5, rtol=1e-5)
    assert len(called) == sum(isinstance(module, LeanAttention) for module in family.unet.modules())


@pytest.mark.parametrize("settings", [
    {}, {"dropout": 0.3}, {"rank_dropout": 0.5}, {"dropout": 0.2, "rank_dropout": 0.3, "module_dropout": 0.4},
])  # fmt: skip
def test_stacked_projections_are_those_of_the_modules_one_by_one(settings: dict[str, float]) -> None:
    family = fresh_tiny()
    lora = installed(family, **settings)
    lean = [module for module in family.unet.modules() if isinstance(module, LeanAttention)]
    assert all(module.project is not None for module in lean)
    if not settings.get("module_dropout"):
        stacked = gradients(family, lora)
        with torch.no_grad():
            before = answer(family)
        for module in lean:
            module.project = None
        with torch.no_grad():
            torch.testing.assert_close(answer(family), before, atol=1e-5, rtol=1e-5)
        for name, gradient in gradients(family, lora).items():
            torch.testing.assert_close(stacked[name], gradient, atol=1e-4, rtol=1e-4)
        return
    # Modules are left out of the whole pass, so they go one by one: the same to the bit.
    with torch.no_grad():
        before = answer(family)
        for module in lean:
            module.project = None
        assert torch.equal(answer(family), before)


def test_switched_off_nothing_is_stacked() -> None:
    family = fresh_tiny()
    with torch.no_grad():
        base = answer(family)
        lora = installed(family)
        assert not torch.equal(answer(family), base)
        with lora.disabled():
            assert torch.equal(answer(family), base)


def test_an_attention_without_all_three_modules_is_not_stacked() -> None:
    family = fresh_tiny()
    paths = {target.path for target in family.lora_targets("unet", False)}
    paths.remove("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k")
    lora = installed(family, layout=Layout(own={("unet", path): Size(4, 2.0) for path in paths}))
    lean = [module for module in family.unet.modules() if isinstance(module, LeanAttention)]
    assert sum(module.project is None for module in lean) == 1
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(family, lora)
    assert all(gradient.dtype == torch.float32 and gradient.abs().sum() > 0 for gradient in found.values())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_ranks_and_alphas_may_differ_within_an_attention(dtype: torch.dtype | None) -> None:
    family = fresh_tiny()
    paths = [target.path for target in family.lora_targets("unet", False)]
    own = {("unet", path): Size(2 + place % 3, 1.0 + place % 2) for place, path in enumerate(paths)}
    lora = installed(family, layout=Layout(own=own))
    lean = [module for module in family.unet.modules() if isinstance(module, LeanAttention)]
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not None):
        stacked = answer(family).float()
        with lora.disabled():
            base = answer(family).float()
        for module in lean:
            module.project = None
        alone = answer(family).float()
    assert not torch.allclose(stacked, base, atol=0.01)
    tolerance = 1e-5 if dtype is None else 0.05
    torch.testing.assert_close(stacked, alone, atol=tolerance * float(alone.abs().max()), rtol=0)
