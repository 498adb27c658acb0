"""What a dataset configuration comes to: frozen values, every inheritance resolved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SubsetConfig:
    """One folder of images and how its images and captions are used. The defaults are sd-scripts'."""

    image_dir: Path
    num_repeats: int = 1
    is_reg: bool = False
    class_tokens: str | None = None
    caption_extension: str = ".caption"
    caption_separator: str = ","
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    secondary_separator: str | None = None
    enable_wildcard: bool = False
    shuffle_caption: bool = False
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0
    token_warmup_min: int = 1
    token_warmup_step: float = 0
    """Updates, or below 1 the fraction of the training's updates."""
    flip_aug: bool = False
    random_crop: bool = False
    origin: str = ""
    """Where it is declared, for messages: file, line, table."""


@dataclass(frozen=True)
class DatasetConfig:
    """Subsets that share a resolution and a batch size. The defaults are sd-scripts'."""

    batch_size: int
    resolution: tuple[int, int]
    """(width, height) in pixels."""
    enable_bucket: bool = False
    min_bucket_reso: int = 256
    """A multiple of `bucket_reso_steps`, as `max_bucket_reso`, where buckets are on."""
    max_bucket_reso: int = 1024
    bucket_reso_steps: int = 64
    bucket_no_upscale: bool = False
    subsets: tuple[SubsetConfig, ...] = ()
    warnings: tuple[str, ...] = ()
    """What is accepted without effect."""
    origin: str = ""
    """Where it is declared, for messages: file, line, table."""
