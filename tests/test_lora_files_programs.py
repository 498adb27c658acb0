"""What A1111 and ComfyUI make of LyCORIS files: their factors' names and formulas, written down from their sources."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from sd_train.lora_files.adapter import Adapter, change, kind_of
from sd_train.lora_files.names import Place
from sd_train.lora_files.readers import TABLE, Reader, rows_of
from sd_train.trainables.lycoris_files import to_file
from sd_train.trainables.lycoris_module import LycorisModule
from sd_train.trainables.lycoris_targets import Target
from tests.lycoris_cases import CASES, args

Factors = Mapping[str, Tensor]
KEY = "lora_unet_mid_block_resnets_0_conv1"


def scaled(factors: Factors, rank: int | None) -> float:
    return float(factors["alpha"]) / rank if rank and "alpha" in factors else 1.0


def tucker(inner: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return torch.einsum("ijkl,jr,ip->prkl", inner, second, first)


def low_rank(factors: Factors, weight: Tensor) -> tuple[Tensor, int | None] | None:
    """What both programs read alike: LoRA, LoHa, LoKr and full differences, with the rank that alpha is divided by."""
    if "lora_up.weight" in factors:
        up, down = factors["lora_up.weight"].flatten(1), factors["lora_down.weight"].flatten(1)
        if "lora_mid.weight" in factors:
            mid = factors["lora_mid.weight"]
            return torch.einsum("nmkl,in,mj->ijkl", mid, up, down), len(down)
        return (up @ down).reshape(weight.shape), len(down)
    if "hada_w1_a" in factors:
        halves = []
        for number in (1, 2):
            first, second = factors[f"hada_w{number}_a"], factors[f"hada_w{number}_b"]
            inner = factors.get(f"hada_t{number}")
            halves.append(first @ second if inner is None else tucker(inner, first, second))
        return (halves[0] * halves[1]).reshape(weight.shape), len(factors["hada_w1_b"])
    if "lokr_w1" in factors or "lokr_w1_a" in factors:
        rank = next((len(factors[name]) for name in ("lokr_w2_b", "lokr_w1_b") if name in factors), None)
        first = factors["lokr_w1"] if "lokr_w1" in factors else factors["lokr_w1_a"] @ factors["lokr_w1_b"]
        if "lokr_w2" in factors:
            second = factors["lokr_w2"]
        elif "lokr_t2" in factors:
            second = tucker(factors["lokr_t2"], factors["lokr_w2_a"], factors["lokr_w2_b"])
        else:
            second = factors["lokr_w2_a"] @ factors["lokr_w2_b"]
        first = first[..., None, None] if second.ndim == 4 else first
        return torch.kron(first, second.contiguous()).reshape(weight.shape), rank
    return (factors["diff"], None) if "diff" in factors else None


def turned(factors: Factors, weight: Tensor, most: float, rescale: bool) -> Tensor:
    """OFT and BOFT, with the norm of the blocks at most `most`; 0: any."""
    blocks = factors["oft_blocks"]
    skew = blocks - blocks.transpose(-1, -2)
    if most > 0:
        skew = skew * min(1.0, most / float(skew.norm()))
    identity = torch.eye(blocks.shape[-1])
    rotations = (identity + skew) @ (identity - skew).inverse()
    found = weight
    if blocks.ndim == 3:
        found = torch.einsum("knm,kn...->km...", rotations, found.unflatten(0, blocks.shape[:2])).flatten(0, 1)
    else:
        for stage, rotation in enumerate(rotations):
            apart = 2**stage * (blocks.shape[-1] // 2)
            found = found.unflatten(0, (-1, 2, apart)).transpose(1, 2).flatten(0, 2)
            found = torch.einsum("bij,bj...->bi...", rotation, found.unflatten(0, (-1, blocks.shape[-1]))).flatten(0, 1)
            found = found.unflatten(0, (-1, apart, 2)).transpose(1, 2).flatten(0, 2)
    return found * factors["rescale"] if rescale and "rescale" in factors else found


def norms(weight: Tensor, axis: int) -> Tensor:
    others = [place for place in range(weight.ndim) if place != axis]
    found: Tensor = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
    return found


def a1111(factors: Factors, weight: Tensor) -> Tensor | None:
    """extensions-builtin/Lora: network_*.py, version 1.10; None: not found."""
    common = low_rank(factors, weight)
    if common is not None:
        found = common[0] * scaled(factors, common[1])
    elif "weight" in factors:
        vector = factors["weight"] if factors["on_input"].item() else factors["weight"].reshape(-1, 1)
        found = weight * vector
    elif "oft_blocks" in factors:
        found = turned(factors, weight, float(factors["alpha"]) * len(weight), True) - weight
    elif "a1.weight" in factors:
        first, second, third, fourth = (factors[f"{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
        found = fourth @ third + weight @ second @ first
    else:
        return None
    if "dora_scale" in factors:
        found = (weight + found) * (factors["dora_scale"] / norms(weight + found, 1)) - weight
    return found


def comfyui(factors: Factors, weight: Tensor) -> Tensor | None:
    """comfy/weight_adapter/*.py; None: not found."""
    common = low_rank(factors, weight)
    if common is not None:
        found = common[0] * scaled(factors, common[1])
    elif "oft_blocks" in factors:
        found = turned(factors, weight, float(factors["alpha"]), factors["oft_blocks"].ndim == 4) - weight
    elif "a1.weight" in factors:
        first, second, third, fourth = (factors[f"{name}.weight"].flatten(1) for name in ("a1", "a2", "b1", "b2"))
        own = torch.einsum("oi...,ij->oj...", torch.einsum("oi...,ij->oj...", weight, first), second)
        found = (own + (third @ fourth).reshape(weight.shape)) * scaled(factors, len(second))
    else:
        return None
    if "dora_scale" in factors:
        by_output = len(factors["dora_scale"]) == len(weight)
        divisor = norms(weight, 0) if by_output else norms(weight + found, 1)
        found = (weight + found) * (factors["dora_scale"] / divisor) - weight
    return found


PROGRAMS: dict[Reader, Callable[[Factors, Tensor], Tensor | None]] = {"A1111/Forge": a1111, "ComfyUI": comfyui}


def made(case: str, layer: nn.Module) -> dict[str, Tensor]:
    """The factors that a file of ours has for `layer`, whatever was learned."""
    module = LycorisModule(Target("x", layer, False), args(case), 0)
    generator = torch.Generator().manual_seed(1)
    tensors = {f"x.{name}": constant for name, constant in module.constants.items()}
    for name, parameter in module.parameters.items():
        tensors[f"x.{name}"] = parameter.detach() + torch.randn(parameter.shape, generator=generator) * 0.1
    return {name.removeprefix("x."): tensor for name, tensor in to_file(tensors, {"x": module.library.shape}).items()}


def adapter_of(factors: Factors) -> Adapter:
    kind = kind_of(frozenset(factors))
    assert kind is not None
    alpha = float(factors["alpha"]) if "alpha" in factors else None
    own = {name: tensor for name, tensor in factors.items() if name != "alpha"}
    return Adapter(Place("unet", "mid_block.resnets.0.conv1"), kind, own, alpha)


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])
@pytest.mark.parametrize("case", [*CASES, "dora", "diag-oft", "boft"])
def test_a_program_reads_what_the_table_says(case: str, conv: bool, program: Reader) -> None:
    torch.manual_seed(0)
    layer: nn.Module = nn.Conv2d(8, 16, 3) if conv else nn.Linear(8, 16)
    factors, weight = made(case, layer), dict(layer.named_parameters())["weight"].detach()
    adapter = adapter_of(factors)
    cells = [TABLE[row][program] for row in rows_of(adapter, KEY, kohya=True)]
    assert cells
    assert all(cell.proof == "keys" for cell in cells if cell.reads)
    try:
        found = PROGRAMS[program](factors, weight)
    except RuntimeError as problem:
        # Factors of other shapes than the program expects.
        if not re.search("shapes cannot be multiplied|must match the size", str(problem)):
            raise
        found = None
    expected = change(adapter, weight)
    agrees = found is not None and found.shape == expected.shape and torch.allclose(found, expected, atol=1e-5)
    assert agrees == all(cell.reads for cell in cells)


def test_every_cell_that_is_called_compared_is_compared() -> None:
    covered = set[str]()
    for case in [*CASES, "dora", "diag-oft", "boft"]:
        for layer in (nn.Linear(8, 16), nn.Conv2d(8, 16, 3)):
            covered |= set(rows_of(adapter_of(made(case, layer)), KEY, kohya=True))
    compared = {row for row, cells in TABLE.items() if any(cells[program].proof == "keys" for program in PROGRAMS)}
    assert compared <= covered
