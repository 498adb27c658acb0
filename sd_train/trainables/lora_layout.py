"""Which modules a LoRA has, and the rank and alpha of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Size(NamedTuple):
    """Of one module."""

    rank: int
    """0: no module."""
    alpha: float
    """0: the rank."""


class BlockSize(NamedTuple):
    """Of the modules of one of the U-Net's blocks."""

    narrow: Size
    """Linear layers and 1x1 convolutions."""
    wide: Size | None
    """Convolutions with a larger kernel; None: none."""


@dataclass(frozen=True)
class Layout:
    """What is beside one rank for all linear layers and 1x1 convolutions of the attentions, as in sd-scripts."""

    wide: Size | None = None
    """Of the U-Net's 3x3 convolutions; with it the rest of the residual blocks and samplers has modules too."""
    blocks: Sequence[BlockSize] = ()
    """By block of the U-Net (see `block_number`), in place of all other sizes there; empty: no difference."""
    weights: Sequence[float] = ()
    """By block of the U-Net: what its learning rate is multiplied with; empty: everywhere 1."""
    own: Mapping[tuple[str, str], Size] | None = None
    """By (network role, published path), in place of everything; modules that are missing are not made."""
    sdxl: bool = False
    """How the blocks are counted."""

    @property
    def convolutions(self) -> bool:
        """Whether residual blocks and samplers can have modules."""
        return self.own is not None or self.wide is not None or any(block.wide is not None for block in self.blocks)

    def size(self, role: str, path: str, wide: bool, narrow: Size) -> Size | None:
        """Of the module at the published `path`; None: it has none.

        Args:
            role: of the network.
            path: of the layer.
            wide: whether it is a convolution with a kernel above 1x1.
            narrow: what all others have where nothing else is said.
        """
        chosen: Size | None = self.wide if wide else narrow
        if self.own is not None:
            chosen = self.own.get((role, path))
        elif role == "unet" and self.blocks:
            block = self.blocks[block_number(path, self.sdxl)]
            chosen = block.wide if wide else block.narrow
        if chosen is None or chosen.rank == 0 or not self.weight(role, path):
            return None
        return Size(chosen.rank, chosen.alpha or float(chosen.rank))

    def weight(self, role: str, path: str) -> float:
        """What the learning rate is multiplied with at the published `path`."""
        return self.weights[block_number(path, self.sdxl)] if role == "unet" and self.weights else 1.0


def block_number(path: str, sdxl: bool) -> int:
    """The U-Net's block that holds the published `path`, as sd-scripts counts them.

    Stable Diffusion 1.x and 2.x: 1 to 11 down, 12 mid, 13 to 24 up (0 would be the first convolution, which never has
    a LoRA). SDXL: 2 to 9 down, 10 to 12 mid, 13 to 21 up.
    """
    side, *rest = path.split(".")
    if side == "mid_block":
        # resnets.0, attentions.0, resnets.1.
        return 10 + (2 * int(rest[1]) if rest[0] == "resnets" else 1) if sdxl else 12
    level, kind, layer = int(rest[0]), rest[1], int(rest[2])
    place = 3 * level + (2 if "samplers" in kind else layer)
    return 13 + place if side == "up_blocks" else 1 + place + sdxl
