"""What LyCORIS's algorithms change of a weight: its formulas in float32, on the library's parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sd_train.trainables.rotating import rotated

_EAGER = "torch"
"""The library's backend that gives the same every time; the others are chosen by timing them."""


def base_of(original: nn.Module) -> Tensor:
    """The layer's own weight in float32."""
    weight: Any = original.weight
    base: Tensor = weight.detach().float()
    return base


def decomposed(library: Any, weight: Tensor) -> Tensor:
    """DoRA (Liu et al. 2024): the direction of `weight` at the trained magnitude."""
    from lycoris.functional.general import weight_decompose

    found: Tensor = weight_decompose(weight, library.dora_scale, 1, library.wd_on_out, backend=_EAGER)
    return found


def _lora(library: Any, original: nn.Module) -> Tensor:
    from lycoris.functional.locon import diff_weight

    mid = library.lora_mid.weight if library.tucker else None
    product: Tensor = diff_weight(library.lora_down.weight, library.lora_up.weight, mid, backend=_EAGER)
    change: Tensor = product.view(library.shape) * (library.scalar * library.scale)
    return change


def _loha(library: Any, original: nn.Module) -> Tensor:
    from lycoris.functional.loha import diff_weight

    inner = (library.hada_t1, library.hada_t2) if library.tucker else (None, None)
    halves = (library.hada_w1_b, library.hada_w1_a, library.hada_w2_b, library.hada_w2_a)
    # Filled on the device: torch.tensor would copy it there, and wait.
    scale = torch.full((), library.scale, device=library.device)
    product: Tensor = diff_weight(*halves, *inner, gamma=scale, backend=_EAGER)
    change: Tensor = product.reshape(library.shape) * library.scalar
    return change


def _lokr(library: Any, original: nn.Module) -> Tensor:
    from lycoris.functional.lokr import kron_weight

    names = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    parts = (getattr(library, name, None) for name in names)
    product: Tensor = kron_weight(*parts, scale=library.scale, backend=_EAGER)
    change: Tensor = product.reshape(library.shape) * library.scalar
    return change


def _ia3(library: Any, original: nn.Module) -> Tensor:
    vector = library.weight.flatten()
    base = base_of(original)
    axis = 1 if library.train_input else 0
    change: Tensor = base * vector.view([-1 if place == axis else 1 for place in range(base.ndim)])
    return change


def _dylora(library: Any, original: nn.Module) -> Tensor:
    up, down = torch.cat(list(library.up_list), dim=1), torch.cat(list(library.down_list))
    change: Tensor = (up @ down).view(library.shape) * library.scale
    return change


def _glora(library: Any, original: nn.Module) -> Tensor:
    """GLoRA (Chavan et al. 2023): W A + B, both of low rank."""
    base = base_of(original)
    first, second = library.a1.weight.flatten(1), library.a2.weight.flatten(1)
    own = (library.b1.weight.flatten(1) @ library.b2.weight.flatten(1)).view(base.shape)
    through = torch.einsum("oi...,ir,rj->oj...", base, first, second)
    change: Tensor = (own + through) * (library.scalar * library.scale)
    return change


def _rotation(library: Any, original: nn.Module) -> Tensor:
    """Orthogonal finetuning: of blocks (Qiu et al. 2023) or in butterflies (Liu et al. 2023)."""
    base, factors = base_of(original), {"oft_blocks": library.oft_blocks}
    if library.rescaled:
        factors["rescale"] = library.rescale
    # Not the library's, which asks the device whether the constraint is met and whether blocks have an inverse.
    return rotated(base, factors, library.constraint / base.shape[0]) - base


def _full(library: Any, original: nn.Module) -> Tensor:
    weight: Tensor = library.weight
    return weight


CHANGES: Mapping[str, Callable[[Any, nn.Module], Tensor]] = {
    "lora": _lora,
    "loha": _loha,
    "lokr": _lokr,
    "ia3": _ia3,
    "dylora": _dylora,
    "glora": _glora,
    "full": _full,
    "diag-oft": _rotation,
    "boft": _rotation,
}
"""The change of the weight before magnitudes are decomposed, with nothing dropped."""
