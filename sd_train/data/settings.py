"""What a dataset configuration comes to: frozen values, every inheritance resolved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

BucketPolicy = Literal["keep", "merge", "fill", "carry"]
Interpolation = Literal["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box"]
Style = Literal["dreambooth", "fine_tuning"]


@dataclass(frozen=True)
class SubsetConfig:
    """One folder or metadata file of images and how its images and captions are used. The defaults are sd-scripts'."""

    image_dir: Path
    """Where the images' keys start; `Path()` for metadata with absolute paths."""
    metadata_file: Path | None = None
    """.json or .jsonl file, or .parquet file or folder of such; None: the images of `image_dir` with caption files."""
    caption_column: str | None = None
    """Where .jsonl and .parquet rows hold the caption; None: `caption`, else `text`."""
    conditioning_data_dir: Path | None = None
    """Folder of masks with the images' names; None: no masks."""
    num_repeats: float = 1
    is_reg: bool = False
    loss_weight: float = 1.0
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
    color_aug: bool = False
    random_crop: bool = False
    face_crop_aug_range: tuple[float, float] | None = None
    """Least and most faces that the short side is long (2.0: the face fills half); see `augment.place_on_face`."""
    alpha_mask: bool = False
    """Transparency is the weight of each pixel's loss."""
    unmasked_weight: float = 0.0
    """Weight of a pixel's loss where its mask is black."""
    resize_interpolation: Interpolation | None = None
    """None: area where no side grows, else Lanczos."""
    templates: tuple[str, ...] = ()
    """Sentences of which each sample has one in place of its caption."""
    custom_attributes: Mapping[str, Any] = field(default_factory=dict)
    origin: str = ""
    """Where it is declared, for messages: file, line, table."""

    @property
    def masked(self) -> bool:
        """Whether its images carry masks."""
        return self.alpha_mask or self.conditioning_data_dir is not None


@dataclass(frozen=True)
class DatasetConfig:
    """Subsets that share a resolution and a batch size. The defaults are sd-scripts'."""

    batch_size: int
    resolution: tuple[int, int]
    """(width, height) in pixels."""
    style: Style = "dreambooth"
    enable_bucket: bool = False
    min_bucket_reso: int = 256
    """A multiple of `bucket_reso_steps`, as `max_bucket_reso`, where buckets are on."""
    max_bucket_reso: int = 1024
    bucket_reso_steps: int = 64
    bucket_no_upscale: bool = False
    bucket_policy: BucketPolicy = "keep"
    skip_image_resolution: float = 0.0
    """Images whose sqrt(width x height) is not above this are left out."""
    validation_split: float = 0.0
    """Share of the images that is kept for validation."""
    validation_seed: int | None = None
    """None: the training's seed."""
    subsets: tuple[SubsetConfig, ...] = ()
    warnings: tuple[str, ...] = ()
    """What is accepted without effect."""
    origin: str = ""
    """Where it is declared, for messages: file, line, table."""
