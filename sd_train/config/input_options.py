"""Options for what is trained on: the model and the dataset."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sd_train.config.group import Group
from sd_train.config.values import Hint, LaxPath, Resolution


class ModelOptions(Group):
    """The base model."""

    pretrained_model_name_or_path: str = Field(
        description="Stable Diffusion 1.x model: one .safetensors or .ckpt file, or a diffusers folder.",
    )
    clip_skip: int | None = Field(
        None,
        ge=1,
        description="Use the text encoder's n-th hidden state from the end; not given: 1, the last.",
    )
    max_token_length: Literal[75, 150, 225] | None = Field(
        None,
        description="Longest caption in tokens, in chunks of 75; not given: 75.",
    )


class DatasetOptions(Group):
    """The dataset; all but the first five hold where the dataset file says nothing."""

    dataset_config: LaxPath = Field(description="Dataset file (.toml or .json) that names the image folders.")
    allow_missing_captions: bool = Field(False, description="Accept folders where some images have no caption.")
    debug_dataset: bool = Field(False, description="List what the first batches hold and end, without training.")
    cache_latents: bool = Field(False, description="Encode every image once and keep the latents in memory.")
    vae_batch_size: Annotated[int, Hint(zero_is_unset=True)] = Field(
        1, ge=1, le=65_536, description="Images encoded at once while latents are cached."
    )
    resolution: Resolution = Field(None, description="Training resolution in pixels; N is a square of N x N.")
    caption_extension: str = Field(".caption", description="Extension of the caption files.")
    caption_separator: str = Field(",", description="Text between the tags of a caption.")
    shuffle_caption: bool = Field(False, description="Put the tags in a new order each time an image is used.")
    keep_tokens: int = Field(0, ge=0, description="Number of tags at the start that are never shuffled or dropped.")
    keep_tokens_separator: str = Field(
        "", description="Text in a caption that ends the part that is never shuffled or dropped."
    )
    secondary_separator: str | None = Field(
        None, description="Text that joins tags into one while shuffling; becomes caption_separator afterwards."
    )
    enable_wildcard: bool = Field(
        False, description="Choose from {a|b|c} and between the lines of a caption file at random."
    )
    caption_prefix: str | None = Field(None, description="Text put before every caption.")
    caption_suffix: str | None = Field(None, description="Text put after every caption.")
    token_warmup_min: int = Field(1, ge=0, description="Tags used at the first step of the token warm-up.")
    token_warmup_step: float = Field(
        0.0, ge=0, description="Steps until all tags are used; below 1 a share of the training; 0 is off."
    )
    caption_dropout_rate: float = Field(
        0.0, ge=0, le=1, description="Probability that an image is trained with an empty caption."
    )
    caption_dropout_every_n_epochs: int = Field(
        0, ge=0, description="Train with empty captions in every n-th epoch; 0 is off."
    )
    caption_tag_dropout_rate: float = Field(0.0, ge=0, le=1, description="Probability that a tag is left out.")
    flip_aug: bool = Field(False, description="Mirror half of the images at random.")
    random_crop: bool = Field(False, description="Crop at a random place and not at the centre.")
    enable_bucket: bool = Field(False, description="Train each image near its own aspect ratio.")
    min_bucket_reso: int = Field(256, ge=1, le=32_768, description="Shortest side of a bucket in pixels.")
    max_bucket_reso: int = Field(1024, ge=1, le=32_768, description="Longest side of a bucket in pixels.")
    bucket_reso_steps: int = Field(64, ge=1, le=32_768, description="Bucket sides are multiples of this many pixels.")
    bucket_no_upscale: bool = Field(False, description="Never enlarge an image to fill its bucket.")
    dataset_repeats: int = Field(1, ge=1, le=1_000_000, description="How often each image is used in an epoch.")
