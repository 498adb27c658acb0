"""One image of a dataset, as the index hands it out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sd_train.data.settings import SubsetConfig


@dataclass(frozen=True)
class ImageRecord:
    """One image of the index. Sizes are (width, height) in pixels."""

    path: Path
    """The file; an image inside a parquet file is FILE.parquet/ROW."""
    key: str
    """Path within the subset; with seed, epoch and repeat it names the image's random draws."""
    subset: SubsetConfig
    size: tuple[int, int]
    """As the image is meant to be seen (EXIF orientation applied)."""
    bucket: tuple[int, int]
    resized: tuple[int, int]
    """Before the crop to the bucket."""
    caption: str
    """As read; `captions.process_caption` makes the prompt of it. Several lines with `enable_wildcard`."""
    weight: float
    """Of the loss: the subset's, times the prior loss weight for a regularisation image."""
    is_reg: bool
    mask: Path | None = None
    """The picture in `conditioning_data_dir`, with that option."""
    bucketed: bool = False
    """Whether its dataset has buckets; faces are cropped only without."""
