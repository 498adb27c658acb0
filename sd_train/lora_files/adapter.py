"""What one module of a LoRA or LyCORIS file holds, and the change of the weight that it makes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from sd_train.errors import ModelError
from sd_train.lora_files.names import Place
from sd_train.trainables.rotating import rotated

Kind = Literal["lora", "loha", "lokr", "full", "norm", "ia3", "glora", "oft", "oft_diag"]

UP, DOWN, MID = "lora_up.weight", "lora_down.weight", "lora_mid.weight"
MAGNITUDE = "dora_scale"
BIASES = ("diff_b", "b_norm")

_NEEDED: dict[Kind, tuple[tuple[str, ...], ...]] = {
    # Alternatives; the first that is there in full counts.
    "lora": ((UP, DOWN),),
    "loha": (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),),
    "lokr": (
        ("lokr_w1", "lokr_w2"),
        ("lokr_w1_a", "lokr_w1_b", "lokr_w2"),
        ("lokr_w1", "lokr_w2_a", "lokr_w2_b"),
        ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"),
    ),
    "full": (("diff",), ("diff_b",)),
    "norm": (("w_norm",), ("b_norm",)),
    "ia3": (("weight", "on_input"),),
    "glora": (("a1.weight", "a2.weight", "b1.weight", "b2.weight"),),
    "oft": (("oft_blocks",),),
    "oft_diag": (("oft_diag",),),
}

FACTORS = frozenset(
    {name for alternatives in _NEEDED.values() for names in alternatives for name in names}
    | {MID, "hada_t1", "hada_t2", "lokr_t2", MAGNITUDE, "alpha", "rescale"}
)
"""Every last part of a key that is known, as kohya and LyCORIS write it."""

UNCOMPUTED: tuple[Kind, ...] = ("oft_diag",)
"""Recognised only: OFT as LyCORIS wrote it before 2.0."""


_OF_THE_BASE: tuple[Kind, ...] = ("ia3", "glora", "oft")
"""Algorithms whose change depends on the model's own weight."""

_MOST = 2**26
"""Numbers that a product of factors may have: no weight of Stable Diffusion or SDXL has as many."""


def kind_of(names: frozenset[str]) -> Kind | None:
    """The algorithm whose factors `names` are; None if some are missing."""
    for kind, alternatives in _NEEDED.items():
        if any(names.issuperset(needed) for needed in alternatives):
            return kind
    return None


@dataclass(frozen=True)
class Adapter:
    """One module's factors."""

    place: Place
    kind: Kind
    factors: Mapping[str, Tensor]
    """By kohya's and LyCORIS's names, without `alpha`."""
    alpha: float | None
    """None where the file has none."""

    @property
    def rank(self) -> int | None:
        """What alpha is divided by; None where nothing is decomposed."""
        for name in (DOWN, "hada_w1_b", "lokr_w1_b", "lokr_w2_b", "a2.weight"):
            if name in self.factors:
                return int(self.factors[name].shape[0])
        return None

    @property
    def scale(self) -> float:
        """alpha / rank; an alpha that is 0 or missing means the rank (sd-scripts' rule)."""
        return self.alpha / self.rank if self.alpha and self.rank else 1.0

    @property
    def is_dora(self) -> bool:
        """Whether weights are decomposed into magnitude and direction (Liu et al. 2024, arXiv:2402.09353)."""
        return MAGNITUDE in self.factors

    @property
    def needs_base(self) -> bool:
        """Whether the change depends on the model's own weight."""
        return self.is_dora or self.kind in _OF_THE_BASE

    @property
    def is_plain(self) -> bool:
        """Two factors and a scale, nothing else."""
        return self.kind == "lora" and not self.is_dora

    @property
    def is_conv(self) -> bool:
        """Whether it is for a convolution with a kernel larger than 1x1, as far as the factors tell."""
        names = (DOWN, MID, "diff", "hada_t1", "lokr_t2", "lokr_w2")
        return any(name in self.factors and self.factors[name].shape[2:].numel() > 1 for name in names)


def delta(adapter: Adapter) -> Tensor:
    """The change of the weight in float32, before any base weight is looked at; multiplier 1.

    [out, in] or [out, in, height, width]; some LyCORIS factors of convolutions only give [out, in * height * width].

    Raises:
        ModelError: if the algorithm is not computed here, or the factors do not fit one another, or make more than any
            weight has.
    """
    with fitting(adapter):
        _delta(_without_numbers(adapter))
        return _delta(adapter)


def _without_numbers(adapter: Adapter) -> Adapter:
    """The shapes alone: what is computed of them takes neither time nor memory, and tells the shape that comes out."""
    return replace(adapter, factors={name: tensor.to("meta") for name, tensor in adapter.factors.items()})


class _TooLarge(ValueError):
    """A product of factors is larger than any weight."""


def _within(product: Tensor) -> Tensor:
    """`product`, which may be of shapes alone; small factors may promise any size."""
    if product.numel() > _MOST:
        raise _TooLarge(f"the factors make a tensor of shape {tuple(product.shape)}, larger than any weight")
    return product


@contextmanager
def fitting(adapter: Adapter) -> Iterator[None]:
    """Says in words that a file's factors have shapes that cannot be multiplied.

    Raises:
        ModelError: in place of what torch raises.
    """
    try:
        yield
    except _TooLarge as problem:
        raise ModelError(
            f"{adapter.place.role}.{adapter.place.path}: {problem} of a known model; download the file again"
        ) from None
    except (RuntimeError, IndexError, ValueError) as problem:
        if isinstance(problem, torch.OutOfMemoryError) or "memory" in str(problem):
            raise
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(adapter.factors.items()))
        raise ModelError(
            f"{adapter.place.role}.{adapter.place.path}: the factors do not fit one another ({shapes}); download the "
            "file again"
        ) from None


def _delta(adapter: Adapter) -> Tensor:
    factors = {name: tensor.float() for name, tensor in adapter.factors.items()}
    if adapter.kind == "lora":
        change = _product(factors[UP], _joined_down(factors))
    elif adapter.kind == "loha":
        change = _hadamard(factors)
    elif adapter.kind == "lokr":
        change = _kronecker(factors)
    elif adapter.kind in ("full", "norm"):
        name = "diff" if adapter.kind == "full" else "w_norm"
        if name not in factors:
            raise ModelError(f"{adapter.place.role}.{adapter.place.path}: only its bias is changed")
        return factors[name]
    else:
        raise ModelError(
            f"{adapter.place.role}.{adapter.place.path}: {adapter.kind} does not give a change of its own; "
            "use the file in the program that it was made for"
        )
    return change * adapter.scale


def change(adapter: Adapter, base: Tensor, multiplier: float = 1.0) -> Tensor:
    """What is added to the weight `base`, in float32 and of its shape.

    sd-scripts' rule for LoRA, multiplier * (up @ down) * alpha / rank; decomposed weights are
    multiplier * (magnitude * (W + delta) / |W + delta| - W).

    Raises:
        ModelError: if the shapes do not fit, or the algorithm is not computed here.
    """
    with fitting(adapter):
        return _change(adapter, base.float(), multiplier)


def _change(adapter: Adapter, weight: Tensor, multiplier: float) -> Tensor:
    if adapter.kind == "ia3":
        vector = adapter.factors["weight"].float().flatten()
        on_input = bool(adapter.factors["on_input"].flatten()[0])
        return multiplier * weight * vector.view(_along(weight, 1 if on_input else 0, adapter, vector.numel()))
    if adapter.kind == "oft":
        try:
            return multiplier * (rotated(weight, adapter.factors, adapter.alpha or 0.0) - weight)
        except ValueError as problem:
            raise ModelError(
                f"{adapter.place.role}.{adapter.place.path}: {problem}; use a model of the LoRA's family"
            ) from None
    shapes = _without_numbers(adapter)
    own = _through(shapes, weight.to("meta")) if adapter.kind == "glora" else _delta(shapes)
    if own.numel() != weight.numel() or own.shape[0] != weight.shape[0]:
        raise ModelError(
            f"{adapter.place.role}.{adapter.place.path}: the LoRA is for a weight of shape {tuple(own.shape)}, the "
            f"model's is {tuple(weight.shape)}; use a model of the family that the LoRA was trained on"
        )
    own = (_through(adapter, weight) if adapter.kind == "glora" else _delta(adapter)).view(weight.shape)
    if not adapter.is_dora:
        return multiplier * own
    return multiplier * (_decomposed(weight + own, adapter) - weight)


def _through(adapter: Adapter, weight: Tensor) -> Tensor:
    """GLoRA (Chavan et al. 2023, arXiv:2306.07967): W A + B, both of low rank."""
    first, second, up, down = (adapter.factors[f"{name}.weight"].float() for name in ("a1", "a2", "b1", "b2"))
    _along(weight, 1, adapter, first.shape[0])
    through = torch.einsum("oi...,ir,rj->oj...", weight, first.flatten(1), second.flatten(1))
    own = _product(up, down)
    return (own + through) * adapter.scale if own.shape == through.shape else own


def _decomposed(merged: Tensor, adapter: Adapter) -> Tensor:
    magnitude = adapter.factors[MAGNITUDE].float()
    # LyCORIS has one magnitude for each input ([1, in]) or for each output ([out, 1]).
    axis = 0 if magnitude.shape[0] != 1 or merged.shape[0] == magnitude.numel() == 1 else 1
    view = _along(merged, axis, adapter, magnitude.numel())
    others = [dimension for dimension in range(merged.ndim) if dimension != axis]
    norm = torch.linalg.vector_norm(merged, dim=others).view(view).clamp_min(torch.finfo(torch.float32).tiny)
    decomposed: Tensor = magnitude.view(view) * merged / norm
    return decomposed


def _along(weight: Tensor, axis: int, adapter: Adapter, count: int) -> list[int]:
    if weight.shape[axis] != count:
        raise ModelError(
            f"{adapter.place.role}.{adapter.place.path}: the file has {count} scales, the model's weight has "
            f"{weight.shape[axis]} {'inputs' if axis else 'outputs'}; use a model of the LoRA's family"
        )
    view = [1] * weight.ndim
    view[axis] = count
    return view


def _joined_down(factors: Mapping[str, Tensor]) -> Tensor:
    """[rank, in, ...]: the inner factor of Tucker's form multiplied into the one before it."""
    if MID not in factors:
        return factors[DOWN]
    return _within(torch.einsum("ijkl,jr->irkl", factors[MID], factors[DOWN].flatten(1)))


def _product(up: Tensor, down: Tensor) -> Tensor:
    flat = _within(up.flatten(1) @ down.flatten(1))
    return flat.view(up.shape[0], *down.shape[1:])


def _hadamard(factors: Mapping[str, Tensor]) -> Tensor:
    """LoHa (Hyeon-Woo et al. 2022, arXiv:2108.06098): two low-rank matrices multiplied element by element."""
    halves = []
    for number in (1, 2):
        first, second = factors[f"hada_w{number}_a"], factors[f"hada_w{number}_b"]
        inner = factors.get(f"hada_t{number}")
        halves.append(_within(first @ second) if inner is None else _tucker(inner, first, second))
    return halves[0] * halves[1]


def _kronecker(factors: Mapping[str, Tensor]) -> Tensor:
    """LoKr (Edalati et al. 2022, arXiv:2212.10650): a Kronecker product, its halves whole or low-rank."""
    first = factors["lokr_w1"] if "lokr_w1" in factors else _within(factors["lokr_w1_a"] @ factors["lokr_w1_b"])
    if "lokr_w2" in factors:
        second = factors["lokr_w2"]
    elif "lokr_t2" in factors:
        second = _tucker(factors["lokr_t2"], factors["lokr_w2_a"], factors["lokr_w2_b"])
    else:
        second = _within(factors["lokr_w2_a"] @ factors["lokr_w2_b"].flatten(1))
    if second.ndim == 4:
        first = first.view(*first.shape, 1, 1)
    return _within(torch.kron(first, second.contiguous()))


def _tucker(inner: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """LyCORIS's core [rank, rank, height, width] with factors [rank, out] and [rank, in]."""
    half = _within(torch.einsum("ijkl,jr->irkl", inner, second))
    return _within(torch.einsum("irkl,ip->prkl", half, first))


def without_mid(adapter: Adapter) -> Adapter:
    """The same change with two factors where Tucker's form has three; nothing is lost."""
    if MID not in adapter.factors:
        return adapter
    factors = {name: tensor for name, tensor in adapter.factors.items() if name != MID}
    with fitting(adapter):
        _joined_down(_without_numbers(adapter).factors)
        factors[DOWN] = _joined_down({name: tensor.float() for name, tensor in adapter.factors.items()})
    return replace(adapter, factors=factors)
