"""`sd-train cache_latents`: fill the cache of a training's latents, without training."""

from __future__ import annotations

from collections.abc import Sequence

from sd_train.prepare.caches import fill

_ABOUT = """Encode the images of a dataset into the cache that a training with --cache_latents_to_disk takes them from,
in place of that training's first minutes; several processes (torchrun, accelerate launch) share the work. All options
of a training are taken; give those that its images depend on: --pretrained_model_name_or_path, --vae,
--dataset_config, --resolution, --cache_dir and the like. What is in the cache already is kept. For files beside the
images, as sd-scripts writes them, use prepare_buckets_latents."""


def main(argv: Sequence[str]) -> int:
    """Encode what is missing.

    Raises:
        UserError: as a training.
    """
    return fill("cache_latents", _ABOUT, argv)
