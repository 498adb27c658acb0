"""Which family a model belongs to; nobody else asks."""

from __future__ import annotations

from pathlib import Path

from sd_train.families.base import Family, LatentSpec
from sd_train.families.sd import check_source, load_sd1

PUBLISHED_LATENT = LatentSpec(channels=4, factor=8, scale=0.18215)
"""Of every published Stable Diffusion model; a loaded one tells its own."""


def check_model(source: Path) -> None:
    """Find out before anything is loaded whether there is a model at `source`.

    Raises:
        ModelError: if not.
    """
    check_source(source)


def load_family(source: Path) -> Family:
    """Load the model at `source`, a folder or a file, without any network.

    Raises:
        ModelError: if there is none, or it is of an unknown kind, incomplete or broken.
    """
    return load_sd1(source)
