"""Options for what is trained on: the model and the dataset."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sd_train.config.group import Group
from sd_train.config.values import FaceRange, Hint, LaxPath, Resolution


class ModelOptions(Group):
    """The base model."""

    pretrained_model_name_or_path: str = Field(
        description="Stable Diffusion 1.x, 2.x or SDXL model: one .safetensors or .ckpt file, a diffusers folder, or a "
        "hub id (owner/name).",
    )
    v2: bool = Field(False, description="The model is a Stable Diffusion 2.x one; it is recognised without.")
    v_parameterization: bool | None = Field(
        None,
        description="The model predicts v and not the noise; not given: as its file or scheduler says.",
    )
    sdxl: bool = Field(False, description="The model is an SDXL one; it is recognised without.")
    vae: str | None = Field(
        None, description="Autoencoder in place of the model's own: a file, a diffusers folder or a whole checkpoint."
    )
    clip_skip: int | None = Field(
        None,
        ge=1,
        description="Use the text encoder's n-th hidden state from the end; not given: the last, SDXL the last but "
        "one.",
    )
    max_token_length: Literal[75, 150, 225] | None = Field(
        None,
        description="Longest caption in tokens, in chunks of 75; not given: 75.",
    )
    weighted_captions: bool = Field(
        False, description="Captions weight their words: (more), [less], (word:1.3), as in A1111."
    )


class DatasetOptions(Group):
    """The dataset; the options from `resolution` on hold where the dataset file says nothing."""

    dataset_config: LaxPath | None = Field(
        None, description="Dataset file (.toml or .json); it takes the place of the three folders and files below."
    )
    train_data_dir: LaxPath | None = Field(
        None, description="Folder of image folders named REPEATS_CLASS; with in_json: the folder of the images."
    )
    reg_data_dir: LaxPath | None = Field(
        None, description="Folder of regularisation image folders named REPEATS_CLASS."
    )
    in_json: LaxPath | None = Field(None, description="Metadata file (.json, .jsonl, .parquet) with the captions.")
    allow_missing_captions: bool = Field(False, description="Accept folders where some images have no caption.")
    verify_images: bool = Field(False, description="Decode every image before the first update.")
    skip_broken_images: bool = Field(
        False, description="Leave out images that cannot be read, by name, instead of stopping."
    )
    trust_index: bool = Field(
        False, description="Reopen a large dataset's stored index without looking whether its files have changed."
    )
    debug_dataset: bool = Field(
        False, description="Show the batches as the model will see them, with captions, and end without training."
    )
    cache_dir: LaxPath | None = Field(
        None, description="Folder of caches on disk; not given: sd_train in the user's cache folder."
    )
    cache_latents: bool = Field(False, description="Encode every image once and keep the latents in memory.")
    cache_latents_to_disk: bool = Field(
        False, description="Encode every image once and keep the latents in cache_dir, for later runs too."
    )
    cache_latents_sample: bool = Field(
        False, description="Draw cached latents anew for each sample; not given: once for each image, as sd-scripts."
    )
    vae_batch_size: Annotated[int, Hint(zero_is_unset=True)] = Field(
        1, ge=1, le=65_536, description="Images encoded at once while latents are cached."
    )
    cache_text_encoder_outputs: bool = Field(
        False, description="Encode every caption once and keep the result in memory."
    )
    cache_text_encoder_outputs_to_disk: bool = Field(
        False, description="Encode every caption once and keep the result in cache_dir."
    )
    cache_caption_variants: int | None = Field(
        None,
        ge=1,
        le=10_000,
        description="With cached captions: so many random versions of each, where captions are shuffled and the like.",
    )
    masked_loss: bool = Field(False, description="Weight each pixel's loss by the masks of conditioning_data_dir.")
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
    caption_column: str | None = Field(
        None, description="Where rows of .jsonl and .parquet files hold the caption; not given: caption, else text."
    )
    alpha_mask: bool = Field(False, description="Weight each pixel's loss by the image's transparency.")
    unmasked_weight: float = Field(
        0.0, ge=0, le=1, description="Weight of the loss where a mask is black or an image transparent."
    )
    color_aug: bool = Field(False, description="Change hue or brightness of a third of the samples a little.")
    face_crop_aug_range: FaceRange = Field(
        None,
        description="Crop around faces whose place the file name gives; the short side is so many times the face: 2,4.",
    )
    resize_interpolation: Literal[
        "lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box"
    ] | None = Field(None, description="How images are resized; not given: area, or lanczos where they grow.")
    flip_aug: bool = Field(False, description="Mirror half of the images at random.")
    random_crop: bool = Field(False, description="Crop at a random place and not at the centre.")
    enable_bucket: bool = Field(False, description="Train each image near its own aspect ratio.")
    min_bucket_reso: int = Field(256, ge=1, le=32_768, description="Shortest side of a bucket in pixels.")
    max_bucket_reso: int = Field(1024, ge=1, le=32_768, description="Longest side of a bucket in pixels.")
    bucket_reso_steps: int = Field(64, ge=1, le=32_768, description="Bucket sides are multiples of this many pixels.")
    bucket_no_upscale: bool = Field(False, description="Never enlarge an image to fill its bucket.")
    bucket_policy: Literal["keep", "merge", "fill", "carry"] = Field(
        "keep",
        description="Buckets that do not fill a batch: keep short batches; merge small buckets into the one that "
        "crops least, and move what is left over; fill up with repeats; carry what is left to the next epoch.",
    )
    skip_image_resolution: float = Field(
        0.0, ge=0, description="Leave out images whose sqrt(width x height) is not above this."
    )
    validation_split: float = Field(0.0, ge=0, lt=1, description="Share of the images kept for validation.")
    validation_seed: Annotated[int | None, Hint(zero_is_unset=True)] = Field(
        None, ge=0, lt=2**32, description="Seed that chooses them; not given: the training's."
    )
    dataset_repeats: int = Field(1, ge=1, le=1_000_000, description="How often each image is used in an epoch.")
