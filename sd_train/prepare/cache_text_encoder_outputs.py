"""`sd-train cache_text_encoder_outputs`: fill the cache of a training's encoded captions, without training."""

from __future__ import annotations

from collections.abc import Sequence

from sd_train.prepare.caches import fill

_ABOUT = """Encode the captions of a dataset into the cache that a training with --cache_text_encoder_outputs_to_disk
takes them from, for every family; several processes (torchrun, accelerate launch) share the work. All options of a
training are taken; give those that its captions depend on: --pretrained_model_name_or_path, --dataset_config,
--clip_skip, --max_token_length, --weighted_captions, --mixed_precision, --cache_dir and the like. What is in the cache
already is kept."""


def main(argv: Sequence[str]) -> int:
    """Encode what is missing.

    Raises:
        UserError: as a training.
    """
    return fill("cache_text_encoder_outputs", _ABOUT, argv)
