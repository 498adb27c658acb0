"""The keys of a dataset file, each declared once: type, range, default, description, level.

The tables are those of sd-scripts (`ConfigSanitizer`): `[general]` > `[[datasets]]` > `[[datasets.subsets]]`, where
keys about subsets may stand at all three levels and keys about datasets at the upper two.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from sd_train.config.values import LARGEST_SIDE, SMALLEST_SIDE
from sd_train.data.settings import DatasetConfig, SubsetConfig


def _pair(value: object) -> object:
    numbers = [value, value] if isinstance(value, int) else value
    if not isinstance(numbers, list | tuple) or len(numbers) != 2:
        raise ValueError("must be one whole number or [width, height]")
    if any(isinstance(number, bool) or not isinstance(number, int) for number in numbers):
        raise ValueError("must be whole numbers without quotes or decimal point")
    if min(numbers) < SMALLEST_SIDE or max(numbers) > LARGEST_SIDE:
        raise ValueError(f"each side must be {SMALLEST_SIDE} to {LARGEST_SIDE} pixels")
    return tuple(numbers)


def _face_range(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _path(value: str) -> str:
    if "\0" in value:
        raise ValueError("holds a null character, which no file name has")
    return value


_SIDE = {"type": "integer", "minimum": SMALLEST_SIDE, "maximum": LARGEST_SIDE}
_RESOLUTION_SCHEMA: dict[str, Any] = {
    "anyOf": [_SIDE, {"type": "array", "items": _SIDE, "minItems": 2, "maxItems": 2}]
}
_Resolution = Annotated[tuple[int, int] | None, BeforeValidator(_pair), WithJsonSchema(_RESOLUTION_SCHEMA)]
_Rate = Annotated[float, Field(ge=0, le=1, examples=[0.1])]
_Count = Annotated[int, Field(ge=0)]


class _Keys(BaseModel):
    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class SubsetKeys(_Keys):
    """Keys about subsets, allowed at all three levels; the innermost value counts."""

    num_repeats: int = Field(default=SubsetConfig.num_repeats, ge=1, le=1_000_000, examples=[10])
    """How many times each image is seen in an epoch."""
    shuffle_caption: bool = SubsetConfig.shuffle_caption
    """Put the caption's tags into another order for every sample."""
    caption_separator: str = Field(default=SubsetConfig.caption_separator, min_length=1)
    """What stands between the tags of a caption."""
    keep_tokens: _Count = SubsetConfig.keep_tokens
    """How many tags at the start are neither shuffled nor dropped."""
    keep_tokens_separator: str = Field(default=SubsetConfig.keep_tokens_separator, examples=["|||"])
    """Tags before its first and after its second occurrence stay fixed; it is removed from the prompt."""
    secondary_separator: str | None = Field(default=SubsetConfig.secondary_separator, examples=[";;;"])
    """Glues tags together through shuffle and dropout; becomes `caption_separator` in the end."""
    enable_wildcard: bool = SubsetConfig.enable_wildcard
    """Choose one line of the caption file, and one of {a|b|c}, for every sample; {{ and }} are plain braces."""
    caption_prefix: str | None = Field(default=SubsetConfig.caption_prefix, examples=["masterpiece,"])
    """Put before every caption, with a blank between."""
    caption_suffix: str | None = Field(default=SubsetConfig.caption_suffix, examples=["high quality"])
    """Put after every caption, with a blank between."""
    caption_extension: str = Field(default=SubsetConfig.caption_extension, min_length=1, examples=[".txt"])
    """Extension of the caption files that stand beside the images."""
    class_tokens: str | None = Field(default=SubsetConfig.class_tokens, examples=["sks dog"])
    """The caption of images that have no caption file: identifier and class."""
    caption_dropout_rate: _Rate = SubsetConfig.caption_dropout_rate
    """Share of samples that are trained without caption."""
    caption_dropout_every_n_epochs: _Count = SubsetConfig.caption_dropout_every_n_epochs
    """Every so many epochs all captions are dropped; 0 is never."""
    caption_tag_dropout_rate: _Rate = SubsetConfig.caption_tag_dropout_rate
    """Share of tags that are left out; kept tokens stay."""
    token_warmup_min: _Count = SubsetConfig.token_warmup_min
    """How many tags the captions have at the start of the token warm-up."""
    token_warmup_step: Annotated[float, Field(ge=0)] = SubsetConfig.token_warmup_step
    """Updates until captions have all their tags; below 1 a fraction of the training; 0 is no warm-up."""
    flip_aug: bool = SubsetConfig.flip_aug
    """Mirror half of the samples left to right."""
    random_crop: bool = SubsetConfig.random_crop
    """Cut the image to its bucket at a random place instead of the centre."""
    color_aug: bool = False
    """Not yet supported: random changes of hue and brightness."""
    face_crop_aug_range: Annotated[tuple[float, float], BeforeValidator(_face_range)] | None = None
    """Not yet supported: crops around the face that the file name gives."""
    cache_info: bool = False
    """Not supported: sizes and captions are read anew at each start."""
    custom_attributes: dict[str, Any] = Field(default_factory=dict)
    """Not yet supported: free attributes of a subset."""
    resize_interpolation: str | None = None
    """Not yet supported: another interpolation than area for shrinking, Lanczos for enlarging."""


class DatasetKeys(SubsetKeys):
    """Keys about datasets and their subsets, allowed in `[general]` and `[[datasets]]`."""

    resolution: _Resolution = Field(default=None, examples=[512, [512, 768]])
    """Size in pixels that is trained at: one number, or [width, height]; with buckets their area."""
    batch_size: int = Field(default=1, ge=1, le=65_536)
    """Samples in a batch, for each device."""
    enable_bucket: bool = DatasetConfig.enable_bucket
    """Train images of different shapes in batches of their own instead of cutting all to `resolution`."""
    min_bucket_reso: int = Field(default=DatasetConfig.min_bucket_reso, ge=1, le=32_768)
    """Shortest side of a bucket, rounded down to `bucket_reso_steps`; not used with `bucket_no_upscale`."""
    max_bucket_reso: int = Field(default=DatasetConfig.max_bucket_reso, ge=1, le=32_768)
    """Longest side of a bucket, rounded up to `bucket_reso_steps`; not used with `bucket_no_upscale`."""
    bucket_reso_steps: int = Field(default=DatasetConfig.bucket_reso_steps, ge=1, le=32_768)
    """The sides of buckets are multiples of this; itself a multiple of 64."""
    bucket_no_upscale: bool = DatasetConfig.bucket_no_upscale
    """Never enlarge an image: smaller ones get buckets of their own size."""
    network_multiplier: float = 1.0
    """Not supported: without effect in sd-scripts too."""
    validation_split: _Rate = 0.0
    """Not yet supported: share of images kept for validation."""
    validation_seed: int | None = None
    """Not yet supported: seed of the validation split."""


class GeneralTable(DatasetKeys):
    """Values for all datasets and subsets that do not set their own."""


class SubsetTable(SubsetKeys):
    """One folder of images."""

    image_dir: Annotated[str, AfterValidator(_path)] = Field(min_length=1, examples=["photos/my_dog"])
    """Folder that holds the images (its sub-folders are not read)."""
    is_reg: bool = SubsetConfig.is_reg
    """The images are regularisation images: they are balanced against the others, their loss has the weight of
    --prior_loss_weight."""
    alpha_mask: bool = False
    """Not yet supported: transparency as the weight of each pixel's loss."""
    metadata_file: str | None = None
    """Not yet supported: JSON file with the captions of a fine-tuning dataset."""
    conditioning_data_dir: str | None = None
    """Not yet supported: folder with masks or ControlNet images."""


class DatasetTable(DatasetKeys):
    """Subsets that share a resolution and a batch size."""

    subsets: list[SubsetTable] = Field(default_factory=list)
    """The folders of the dataset, one [[datasets.subsets]] each."""


class DatasetFile(_Keys):
    """A dataset configuration of sd_train, compatible with that of kohya's sd-scripts."""

    general: GeneralTable = GeneralTable()
    """Values for all datasets and subsets that do not set their own."""
    datasets: list[DatasetTable] = Field(default_factory=list)
    """The datasets, one [[datasets]] each."""


NOT_SUPPORTED: Mapping[str, str] = MappingProxyType(
    {
        "color_aug": "leave it out or set it to false",
        "face_crop_aug_range": "leave it out; crop the faces beforehand, or use random_crop",
        "custom_attributes": "remove the table",
        "resize_interpolation": "leave it out: images are shrunk by area and enlarged by Lanczos",
        "validation_split": "leave it out, and keep images for validation in a folder of their own",
        "validation_seed": "leave it out",
        "alpha_mask": "leave it out; transparent parts are shown on white",
        "metadata_file": "write the captions into files beside the images (caption_extension) and give image_dir",
        "conditioning_data_dir": "leave it out",
    }
)
"""Keys that sd-scripts knows and this version does not: what to do instead."""

NO_EFFECT: Mapping[str, str] = MappingProxyType(
    {
        "cache_info": "sizes and captions are read anew at each start, so nothing can be stale",
        "network_multiplier": "it has none in sd-scripts either",
    }
)
"""Keys that are accepted with a warning, and why they do nothing."""

RUN_OPTIONS = frozenset(
    {
        "cache_latents", "cache_latents_to_disk", "cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk",
        "vae_batch_size", "skip_cache_check", "debug_dataset", "max_token_length", "prior_loss_weight", "seed",
        "dataset_class", "train_data_dir", "reg_data_dir", "in_json", "max_train_steps", "max_train_epochs",
        "learning_rate", "gradient_accumulation_steps", "mixed_precision", "max_data_loader_n_workers",
    }
)
"""Options of the run that people look for in the dataset file."""

RENAMED: Mapping[str, str] = MappingProxyType({"batch_size": "train_batch_size", "num_repeats": "dataset_repeats"})
"""Keys whose command line flag has another name."""


def dataset_json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a dataset file, for completion and checks in editors."""
    schema = DatasetFile.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
