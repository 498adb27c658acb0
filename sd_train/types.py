"""What is handed from part to part: batches, conditioning, geometry, progress."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


QUARANTINE = "quarantine"
"""In `Progress.extra`: the updates that are left out, as a list of `{"step": number from zero, ...}`."""


class Geometry(NamedTuple):
    """What was done to one image, in pixels, (height, width) and (top, left) as SDXL's conditioning has them."""

    original: tuple[int, int]
    """Height and width of the file, after its EXIF orientation."""
    crop: tuple[int, int]
    """Top and left of the crop box in the resized image; for a flipped image left is counted from the right."""
    target: tuple[int, int]
    """Height and width of the bucket."""
    flipped: bool
    resized: tuple[int, int]
    """Height and width after the resize and before the crop."""


@dataclass
class Batch:
    """One micro-batch of one rank. B is the number of its samples, padding included."""

    keys: list[str]
    """Path of each image within its subset."""
    paths: list[str]
    """Path of each image's file."""
    captions: list[str]
    pixels: Tensor | None
    """[B, 3, height, width] in [-1, 1]; None where the rows come from a cache."""
    images: dict[str, Tensor] | None
    """What `Family.encode_images` gives, from a cache; None where the pixels are to be encoded."""
    noise: Tensor
    """[B, *latent shape], the target of epsilon prediction."""
    latent_noise: Tensor
    """[B, *latent shape], the draw from the autoencoder's posterior."""
    timesteps: Tensor
    """[B], int64."""
    weight: Tensor
    """[B], float32: the weight of each sample's loss; zero for padding, divided where a short batch was filled."""
    mask: Tensor | None
    """[B, rows, columns] of the latents, float32: the weight of each place's loss; None: 1 everywhere."""
    texts: dict[str, Tensor] | None
    """What `Family.encode_texts` gives, from a cache; None where the captions are to be encoded."""
    geometry: list[Geometry]
    micro: int
    """Number of the micro-batch within its update, over all ranks."""
    more_noise: dict[str, Tensor] = field(default_factory=dict)
    """What else was drawn, see `diffusion.draws.Draws.more`."""
    rows: tuple[int, int] | None = None
    """Of a part of a micro-batch that did not fit into memory: its first sample, and how many the whole has."""


@dataclass
class Update:
    """What one optimizer step is computed from; it never crosses an epoch's end."""

    step: int
    """Number of updates before this one, over all runs of the training."""
    epoch: int
    """From zero."""
    index: int
    """Number of the update within its epoch, from zero."""
    last_in_epoch: bool
    samples: int
    """Real samples over all ranks and micro-batches; what fills a short batch is not counted. 0: it is left out."""
    batches: Iterator[Batch]
    """The micro-batches of this rank, in order, prepared ahead."""


@dataclass
class Conditioning:
    """What the denoiser is told beside the noisy latents and the timestep."""

    states: Tensor
    """[B, tokens, width]; [B, blocks * tokens, width] where each cross-attention block has its own, in order."""
    pooled: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)
    channels: Tensor | None = None
    """Concatenated to the latents, [B, channels, height, width]."""


RATES_FROM = "rates_from"
"""Key in `Progress.extra`: the update at which the curve of the learning rates begins, where it is not the first."""


@dataclass
class Progress:
    """The resume contract: where the training stands, over all its runs."""

    seed: int
    session_id: int
    started_at: float
    """Seconds since 1970 when the first run began."""
    step: int = 0
    """Optimizer updates done."""
    epoch: int = 0
    """The epoch that the next update belongs to, from zero."""
    index: int = 0
    """The next update's number within that epoch."""
    samples: int = 0
    """Real samples trained on."""
    extra: dict[str, Any] = field(default_factory=dict)
    """What else must go on after a resume, by owner (JSON values)."""

    def advance(self, update: Update) -> None:
        """Count `update` as done."""
        self.step = update.step + 1
        self.samples += update.samples
        if update.last_in_epoch:
            self.epoch, self.index = update.epoch + 1, 0
        else:
            self.epoch, self.index = update.epoch, update.index + 1
