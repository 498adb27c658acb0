"""The keys of a dataset file, each declared once: type, range, default, description, level.

The tables are those of sd-scripts (`ConfigSanitizer`): `[general]` > `[[datasets]]` > `[[datasets.subsets]]`, where
keys about subsets may stand at all three levels and keys about datasets at the upper two.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic.config import JsonDict

from sd_train.config.values import LARGEST_SIDE, SMALLEST_SIDE
from sd_train.data.settings import BucketPolicy, DatasetConfig, Interpolation, SubsetConfig


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
    numbers = value if isinstance(value, list | tuple) else []
    if len(numbers) != 2 or any(isinstance(number, bool) or not isinstance(number, int | float) for number in numbers):
        raise ValueError("must be a list of two numbers")
    if not all(map(math.isfinite, numbers)) or not 0 < numbers[0] <= numbers[1]:
        raise ValueError("must be two numbers above 0, the smaller one first")
    return float(numbers[0]), float(numbers[1])


def _repeats(value: float) -> float:
    return int(value) if value == int(value) else value


def _path(value: str) -> str:
    if "\0" in value:
        raise ValueError("holds a null character, which no file name has")
    return value


def _attributes(value: dict[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError("may hold text, finite numbers, true and false, lists and tables only") from None
    return value


_SIDE = {"type": "integer", "minimum": SMALLEST_SIDE, "maximum": LARGEST_SIDE}
_RESOLUTION_SCHEMA: dict[str, Any] = {
    "anyOf": [_SIDE, {"type": "array", "items": _SIDE, "minItems": 2, "maxItems": 2}]
}
_Resolution = Annotated[tuple[int, int] | None, BeforeValidator(_pair), WithJsonSchema(_RESOLUTION_SCHEMA)]
_Rate = Annotated[float, Field(ge=0, le=1, examples=[0.1])]
_Count = Annotated[int, Field(ge=0)]
_FACE_SCHEMA: dict[str, Any] = {
    "type": "array", "items": {"type": "number", "exclusiveMinimum": 0}, "minItems": 2, "maxItems": 2
}  # fmt: skip
_FaceRange = Annotated[tuple[float, float] | None, BeforeValidator(_face_range), WithJsonSchema(_FACE_SCHEMA)]
_Repeats = Annotated[float, Field(ge=0.001, le=1_000_000, examples=[10]), AfterValidator(_repeats)]
_Path = Annotated[str, Field(min_length=1), AfterValidator(_path)]
_PLACES: JsonDict = {"anyOf": [{"required": ["image_dir"]}, {"required": ["metadata_file"]}]}


class _Keys(BaseModel):
    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class SubsetKeys(_Keys):
    """Keys about subsets, allowed at all three levels; the innermost value counts."""

    num_repeats: _Repeats = SubsetConfig.num_repeats
    """How many times each image is seen in an epoch; 0.5 is every second epoch, 1.5 alternately once and twice."""
    loss_weight: float = Field(default=SubsetConfig.loss_weight, ge=0, le=1_000_000, examples=[0.5])
    """Weight of the loss of these images."""
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
    color_aug: bool = SubsetConfig.color_aug
    """Change hue or brightness of a third of the samples a little."""
    face_crop_aug_range: _FaceRange = Field(default=SubsetConfig.face_crop_aug_range, examples=[[1.0, 3.0]])
    """Crop around the face whose place the file name gives (dog_CX_CY_W_H.png): the short side is so many times the
    face, from the smallest to the largest; without buckets only."""
    resize_interpolation: Interpolation | None = Field(
        default=SubsetConfig.resize_interpolation, examples=["lanczos"]
    )
    """How images are resized; not given: area, or Lanczos where they grow."""
    unmasked_weight: _Rate = SubsetConfig.unmasked_weight
    """Weight of a pixel's loss where the mask is black or the image transparent."""
    caption_column: str | None = Field(default=SubsetConfig.caption_column, min_length=1, examples=["text"])
    """Where the rows of .jsonl and .parquet files hold the caption; not given: caption, else text."""
    custom_attributes: Annotated[dict[str, Any], AfterValidator(_attributes)] = Field(default_factory=dict)
    """Free attributes of a subset; the plan shows them, nothing else reads them."""
    cache_info: bool = False
    """Without effect: sizes and captions are looked up anew at each start."""


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
    bucket_policy: BucketPolicy = DatasetConfig.bucket_policy
    """Buckets that do not fill a batch: keep short batches; merge small buckets into the one that crops least; fill up
    with repeats; carry what is left to the next epoch."""
    skip_image_resolution: float = Field(default=DatasetConfig.skip_image_resolution, ge=0, examples=[256])
    """Images whose sqrt(width x height) is not above this are left out."""
    validation_split: float = Field(default=DatasetConfig.validation_split, ge=0, lt=1, examples=[0.1])
    """Share of the images that is kept for validation; equal pictures stay together."""
    validation_seed: int | None = Field(default=DatasetConfig.validation_seed, ge=0, lt=2**32, examples=[42])
    """Seed that chooses them; not given: the training's."""
    network_multiplier: float = 1.0
    """Without effect, in sd-scripts too."""


class GeneralTable(DatasetKeys):
    """Values for all datasets and subsets that do not set their own."""


class SubsetTable(SubsetKeys):
    """One folder or metadata file of images."""

    model_config = ConfigDict(json_schema_extra=_PLACES)

    image_dir: _Path | None = Field(default=None, examples=["photos/my_dog"])
    """Folder that holds the images itself; its sub-folders are not read. With metadata_file: where its paths start."""
    metadata_file: _Path | None = Field(default=None, examples=["photos/meta.json"])
    """Fine-tuning: .json, .jsonl or .parquet file with images and captions, or a folder that holds .parquet files."""
    is_reg: bool = SubsetConfig.is_reg
    """The images are regularisation images: they are balanced against the others, their loss has the weight of
    --prior_loss_weight."""
    alpha_mask: bool = SubsetConfig.alpha_mask
    """The image's transparency is the weight of each pixel's loss."""
    conditioning_data_dir: _Path | None = Field(default=None, examples=["photos/masks"])
    """With --masked_loss: folder of masks named as their images; white counts, black has unmasked_weight."""


class DatasetTable(DatasetKeys):
    """Subsets that share a resolution and a batch size."""

    subsets: list[SubsetTable] = Field(default_factory=list)
    """The folders or metadata files of the dataset, one [[datasets.subsets]] each."""


class DatasetFile(_Keys):
    """A dataset configuration of sd_train, compatible with that of kohya's sd-scripts."""

    general: GeneralTable = GeneralTable()
    """Values for all datasets and subsets that do not set their own."""
    datasets: list[DatasetTable] = Field(default_factory=list)
    """The datasets, one [[datasets]] each."""


NO_EFFECT: Mapping[str, str] = MappingProxyType(
    {
        "cache_info": "sizes and captions are looked up anew at each start, so nothing can be stale",
        "network_multiplier": "it has none in sd-scripts either",
        "custom_attributes": "the plan shows them, nothing else reads them",
    }
)
"""Keys that are accepted with a warning, and why they do nothing."""

RUN_OPTIONS = frozenset(
    {
        "cache_latents", "cache_latents_to_disk", "cache_latents_sample", "cache_text_encoder_outputs",
        "cache_text_encoder_outputs_to_disk", "cache_caption_variants", "cache_dir", "vae_batch_size",
        "skip_cache_check", "debug_dataset", "max_token_length", "prior_loss_weight", "seed", "masked_loss",
        "verify_images", "skip_broken_images", "allow_missing_captions", "trust_index", "dataset_class",
        "train_data_dir", "reg_data_dir", "in_json", "max_train_steps", "max_train_epochs", "learning_rate",
        "gradient_accumulation_steps", "mixed_precision", "max_data_loader_n_workers",
    }
)
"""Options of the run that people look for in the dataset file."""

RENAMED: Mapping[str, str] = MappingProxyType({"batch_size": "train_batch_size", "num_repeats": "dataset_repeats"})
"""Keys whose command line flag has another name."""


def dataset_json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a dataset file, for completion and checks in editors."""
    schema = DatasetFile.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
