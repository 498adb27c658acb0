"""What `tools/bench.py lora` measures: one U-Net with a LoRA on the same layers, ours, PEFT's, and as a bare formula.

Forward and backward of a batch, CPU time of one thread; the four take turns, and each figure is the median of the
rounds. Ours goes through its own attention, the others through the library's. `loss_difference`: the largest of a loss
from the bare formula's with the same factors, relative to it.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as functional
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn

from sd_train.families.parts import ModelRequest
from sd_train.families.registry import load_family
from sd_train.trainables.lora import Lora, LoraSettings

Named = dict[str, Tensor]


def lora_figures(model: Path, rank: int, rounds: int, times: int) -> dict[str, float]:
    """Milliseconds of a forward and backward pass by name, for the model at `model`, a diffusers folder."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    family: Any = load_family(ModelRequest(str(model)), None)
    targets = {target.key: target.path for target in family.lora_targets("unet")}
    lora = Lora(LoraSettings(rank, rank / 2, 0.0, {"unet": 1e-4}, 0))
    lora.install(family)
    factors = {
        name: tensor if name.endswith(".alpha") else 0.05 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in lora.tensors().items()
    }
    lora.load(factors)
    inputs = {
        "sample": torch.randn(4, 4, 8, 8, generator=generator), "timestep": torch.tensor([10, 200, 500, 900]),
        "encoder_hidden_states": torch.randn(4, 77, family.unet.config.cross_attention_dim, generator=generator),
    }  # fmt: skip
    noise = torch.randn(4, 4, 8, 8, generator=generator)
    bare, peft, none = (UNet2DConditionModel.from_pretrained(model, subfolder="unet") for _ in range(3))
    _add_bare(bare, targets, factors)
    _add_peft(peft, targets, factors, rank)
    # Its gradients go the same way, to the input.
    none.requires_grad_(False)
    none.conv_in.bias.requires_grad_(True)
    passes = {
        name: _pass(unet, [each for each in unet.parameters() if each.requires_grad], inputs, noise)
        for name, unet in (("peft", peft), ("bare", bare), ("without", none))
    }
    factors_of_ours = [each for group in lora.groups() for each in group.params.values()]
    passes["ours"] = _pass(family.unet, factors_of_ours, inputs, noise)
    losses = {name: each() for name, each in passes.items()}
    spent: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(rounds):
        for name, each in passes.items():
            started = time.process_time()
            for _ in range(times):
                each()
            spent[name].append((time.process_time() - started) / times)
    figures = {f"{name}_ms": round(1000 * statistics.median(found), 2) for name, found in spent.items()}
    figures["ours_over_bare"] = round(figures["ours_ms"] / figures["bare_ms"], 3)
    figures["ours_over_peft"] = round(figures["ours_ms"] / figures["peft_ms"], 3)
    figures["loss_difference"] = max(abs(losses[name] / losses["bare"] - 1) for name in ("ours", "peft"))
    return figures


def _pass(unet: Any, learned: Sequence[Tensor], inputs: Named, noise: Tensor) -> Callable[[], float]:
    def once() -> float:
        loss = functional.mse_loss(unet(**inputs, return_dict=False)[0], noise)
        loss.backward()
        for parameter in learned:
            parameter.grad = None
        return float(loss.detach())

    return once


def _add_bare(unet: nn.Module, targets: dict[str, str], factors: Named) -> None:
    """W x + (alpha / rank) up(down(x)), and nothing else."""
    unet.requires_grad_(False)
    for key, path in targets.items():
        layer: Any = unet.get_submodule(path)
        down, up = (nn.Parameter(factors[f"{key}.lora_{half}.weight"].clone()) for half in ("down", "up"))
        scale = float(factors[f"{key}.alpha"]) / len(down)
        layer.bare_down, layer.bare_up = down, up
        product: Any = functional.conv2d if isinstance(layer, nn.Conv2d) else functional.linear

        def forward(
            x: Tensor, whole: Any = layer.forward, product: Any = product, down: Tensor = down, up: Tensor = up,
            scale: float = scale,
        ) -> Tensor:  # fmt: skip
            changed: Tensor = whole(x) + scale * product(product(x, down), up)
            return changed

        layer.forward = forward


def _add_peft(unet: Any, targets: dict[str, str], factors: Named, rank: int) -> None:
    unet.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=rank / 2, target_modules=list(targets.values()))  # type: ignore[arg-type]
    unet.add_adapter(config)
    with torch.no_grad():
        for key, path in targets.items():
            layer = unet.get_submodule(path)
            layer.lora_A["default"].weight.copy_(factors[f"{key}.lora_down.weight"])
            layer.lora_B["default"].weight.copy_(factors[f"{key}.lora_up.weight"])
