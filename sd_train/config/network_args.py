"""The arguments of `networks.lora`: `--network_args conv_dim=8 block_dims=4,4,...`."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sd_train.errors import Problem, Problems

_PRESETS: dict[str, Callable[[float], float]] = {
    "cosine": lambda place: math.sin(math.pi / 2 * (1 - place)),
    "sine": lambda place: math.sin(math.pi / 2 * place),
    "linear": lambda place: place,
    "reverse_linear": lambda place: 1 - place,
    "zeros": lambda place: 0.0,
}
"""Name -> the weight at `place` of the way through the blocks, from 0 to 1 (sd-scripts' curves)."""
_PRESET = re.compile(rf"({'|'.join(_PRESETS)})(?:\+(\d*\.?\d+))?")
_MOST_RANK = 16_384
_MOST = 1e6


@dataclass(frozen=True)
class BlockCounts:
    """How a U-Net's blocks are counted, as in sd-scripts."""

    title: str
    side: int
    """On the way down, and again on the way up."""
    mid: int
    around: int
    """Before the way down, and again behind the way up: blocks that never have a LoRA."""

    @property
    def total(self) -> int:
        """Values of `block_dims` and the like."""
        return 2 * self.around + 2 * self.side + self.mid


def block_counts(sdxl: bool) -> BlockCounts:
    """SDXL's counts, or those of Stable Diffusion 1.x and 2.x, which the refiner's U-Net shares."""
    return BlockCounts("SDXL", 9, 3, 1) if sdxl else BlockCounts("Stable Diffusion 1.x and 2.x", 12, 1, 0)


@dataclass(frozen=True)
class NetworkArgs:
    """What was given; None: not given."""

    conv_dim: int | None = None
    conv_alpha: float | None = None
    block_dims: tuple[int, ...] | None = None
    block_alphas: tuple[float, ...] | None = None
    conv_block_dims: tuple[int, ...] | None = None
    conv_block_alphas: tuple[float, ...] | None = None
    down_lr_weight: tuple[float, ...] | str | None = None
    mid_lr_weight: tuple[float, ...] | None = None
    up_lr_weight: tuple[float, ...] | str | None = None
    block_lr_zero_threshold: float | None = None
    rank_dropout: float | None = None
    module_dropout: float | None = None
    loraplus_lr_ratio: float | None = None
    loraplus_unet_lr_ratio: float | None = None
    loraplus_text_encoder_lr_ratio: float | None = None

    @property
    def weighted(self) -> bool:
        """Whether the U-Net's blocks have learning rates of their own."""
        return any(weights is not None for weights in (self.down_lr_weight, self.mid_lr_weight, self.up_lr_weight))

    @property
    def plus(self) -> Mapping[str, float]:
        """By network role: how much faster the up matrices learn (LoRA+, Hayou et al. 2024, arXiv:2402.12354)."""
        text = self.loraplus_text_encoder_lr_ratio or self.loraplus_lr_ratio
        ratios = {"unet": self.loraplus_unet_lr_ratio or self.loraplus_lr_ratio,
                  "text_encoder": text, "text_encoder_2": text}
        return {role: ratio for role, ratio in ratios.items() if ratio is not None}

    def block_weights(self, counts: BlockCounts) -> tuple[float, ...]:
        """What the U-Net's learning rate is multiplied with in each block; empty: everywhere the same.

        Weights up to the threshold are 0: such blocks get no modules.
        """
        if not self.weighted:
            return ()
        threshold = self.block_lr_zero_threshold or 0.0
        weights: list[float] = []
        for given, count in (
            (self.down_lr_weight, counts.side), (self.mid_lr_weight, counts.mid), (self.up_lr_weight, counts.side),
        ):  # fmt: skip
            own = [1.0] * count if given is None else _curve(given, count) if isinstance(given, str) else given
            weights += own if given is None else [weight if weight > threshold else 0.0 for weight in own]
        around = (1.0,) * counts.around
        return (*around, *weights, *around)


def _curve(name: str, count: int) -> list[float]:
    """`cosine+0.25` and the like at `count` blocks."""
    match = _PRESET.fullmatch(name)
    assert match is not None
    curve, added = _PRESETS[match[1]], float(match[2] or 0)
    return [curve(place / (count - 1)) + added for place in range(count)]


def _parts(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else str(value).split(",")


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise ValueError
    return float(value)


def _whole(value: Any) -> int:
    number = _number(value)
    if number != int(number):
        raise ValueError
    return int(number)


def _between(read: Callable[[Any], Any], low: float, high: float, above: bool = False) -> Callable[[Any], Any]:
    """Reads one number from `low` to `high`; `above`: `low` itself is refused."""

    def checked(value: Any) -> Any:
        number = read(value)
        if not low <= number <= high or (above and number == low):
            raise ValueError
        return number

    return checked


def _each(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: tuple(read(part) for part in _parts(value))


def _share(value: Any) -> float:
    share = _number(value)
    if not 0 <= share < 1:
        raise ValueError
    return share


def _weight(value: Any) -> float:
    # sd-scripts: what is left out between commas is 0.
    return float(_between(_number, 0, _MOST)(0 if value == "" else value))


def _weights(value: Any) -> Any:
    if isinstance(value, str) and _PRESET.fullmatch(value):
        return value
    return _each(_weight)(value)


_DIM = _between(_whole, 1, _MOST_RANK)
_DIMS = _each(_between(_whole, 0, _MOST_RANK))
_ALPHA = _between(_number, 0, _MOST)
_RATIO = _between(_number, 0, _MOST, above=True)
_CURVES = f"must be numbers from 0 on with commas between them, or one of {', '.join(_PRESETS)}"

_READERS: dict[str, tuple[Callable[[Any], Any], str, str]] = {
    "conv_dim": (_DIM, f"must be a whole number from 1 to {_MOST_RANK}", "8"),
    "conv_alpha": (_ALPHA, "must be a number from 0 on", "4"),
    "block_dims": (_DIMS, "must be whole numbers from 0 on with commas between them", "4,4,8,8,..."),
    "block_alphas": (_each(_ALPHA), "must be numbers from 0 on with commas between them", "4,4,4,4,..."),
    "conv_block_dims": (_DIMS, "must be whole numbers from 0 on with commas between them", "4,4,8,8,..."),
    "conv_block_alphas": (_each(_ALPHA), "must be numbers from 0 on with commas between them", "4,4,4,4,..."),
    "down_lr_weight": (_weights, _CURVES, "cosine+0.25"),
    "mid_lr_weight": (_each(_weight), "must be numbers from 0 on with commas between them", "0.5"),
    "up_lr_weight": (_weights, _CURVES, "sine+0.25"),
    "block_lr_zero_threshold": (_ALPHA, "must be a number from 0 on", "0.1"),
    "rank_dropout": (_share, "must be a number from 0 to below 1", "0.1"),
    "module_dropout": (_share, "must be a number from 0 to below 1", "0.1"),
    "loraplus_lr_ratio": (_RATIO, "must be a number above 0", "16"),
    "loraplus_unet_lr_ratio": (_RATIO, "must be a number above 0", "16"),
    "loraplus_text_encoder_lr_ratio": (_RATIO, "must be a number above 0", "4"),
}
"""Name -> how it is read, the rule in words, an example."""

OWN_ARGUMENTS = frozenset(_READERS)

OF_UNET = (
    "conv_dim", "conv_alpha", "block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas",
    "down_lr_weight", "mid_lr_weight", "up_lr_weight", "block_lr_zero_threshold", "loraplus_unet_lr_ratio",
)  # fmt: skip
OF_RANKS = OF_UNET[:6]


def read_network_args(arguments: Mapping[str, Any], where: str, problems: Problems) -> NetworkArgs:
    """`arguments` by their types; what is wrong with them is added to `problems` and left out."""
    read: dict[str, Any] = {}
    for name, value in arguments.items():
        if name == "dropout":
            problems.add(f"{where}: dropout", value, "networks.lora takes it as an option of its own, and sd-scripts "
                         "ignores it here", "write network_dropout (--network_dropout 0.1)")
        elif name not in _READERS:
            near = difflib.get_close_matches(name, _READERS, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            problems.add(f"{where}: {name}", None, "unknown to networks.lora", f"{hint}it takes {', '.join(_READERS)}")
        else:
            reader, rule, example = _READERS[name]
            try:
                read[name] = reader(value)
            except (TypeError, ValueError, OverflowError):
                problems.add(f"{where}: {name}", value, rule, f"write for example {name}={example}")
    return NetworkArgs(**read)


def idle_arguments(args: NetworkArgs) -> Iterator[str]:
    """Arguments that are without effect beside the others, with the reason."""
    if args.conv_alpha is not None and args.conv_dim is None and args.conv_block_dims is None:
        yield "conv_alpha has no effect: conv_dim is not given"
    if args.conv_block_alphas is not None and args.conv_dim is None and args.conv_block_dims is None:
        yield "conv_block_alphas has no effect: conv_block_dims is not given"
    if args.conv_dim is not None and args.conv_block_dims is not None:
        yield "conv_dim has no effect: conv_block_dims is given"
    if args.block_lr_zero_threshold is not None and not args.weighted:
        yield "block_lr_zero_threshold has no effect: neither down_lr_weight, mid_lr_weight nor up_lr_weight is given"
    if args.loraplus_lr_ratio and args.loraplus_unet_lr_ratio and args.loraplus_text_encoder_lr_ratio:
        yield "loraplus_lr_ratio has no effect: both of the others are given"


def wrong_counts(args: NetworkArgs, counts: BlockCounts, where: str) -> Iterator[Problem]:
    """Lists that are not as long as the model has blocks."""
    for name in ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas"):
        given: Sequence[float] | None = getattr(args, name)
        if given is not None and len(given) != counts.total:
            parts = f"{counts.side} down, {counts.mid} mid, {counts.side} up"
            parts = f"1 before, {parts}, 1 behind" if counts.around else parts
            yield Problem(f"{where}: {name}", _shown(given), f"has {len(given)} values, {counts.title} needs "
                          f"{counts.total} ({parts})", "give one for each block")
    for name, count in (
        ("down_lr_weight", counts.side), ("mid_lr_weight", counts.mid), ("up_lr_weight", counts.side),
    ):  # fmt: skip
        weights: Sequence[float] | str | None = getattr(args, name)
        if weights is not None and not isinstance(weights, str) and len(weights) != count:
            fitting = [*weights, *[1.0] * count][:count]
            yield Problem(f"{where}: {name}", _shown(weights), f"has {len(weights)} values, {counts.title} needs "
                          f"{count}", f"write {name}={_shown(fitting)}, which is what sd-scripts makes of it")


def _shown(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)
