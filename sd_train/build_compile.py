"""The U-Net of a run -> compiled graphs."""

from __future__ import annotations

from sd_train.compiling import (
    CompiledUnet,
    CompileSettings,
    check_compiler,
    compile_unet,
    keep_programs,
    program_kinds,
)
from sd_train.data.store import default_cache_dir
from sd_train.families.base import Family
from sd_train.plan import Prepared
from sd_train.report import warn_line


def prepare_compiler(prepared: Prepared) -> None:
    """Look for what the programs are built with, and keep them beside the other caches, by what they are made with.

    Raises:
        ConfigError: if they cannot be built here.
    """
    # First: whoever asks torch for its folder settles the place.
    cache_dir = prepared.config.dataset.cache_dir or default_cache_dir()
    width, height = max(_buckets(prepared), key=lambda size: (size[0] * size[1], size[1]))
    name = f"{_samples(prepared)}x{height}x{width}{program_kinds(prepared.device.device)}"
    keep_programs(cache_dir / "compiled" / name)
    check_compiler(prepared.config.training.dynamo_backend, prepared.device.device)


def compile_network(prepared: Prepared, family: Family) -> CompiledUnet:
    """Compile what computes the training steps; the sizes are those of the dataset's buckets."""
    chosen = prepared.config.training
    assert family.latent is not None
    factor = family.latent.factor
    sizes = {(height // factor, width // factor) for width, height in _buckets(prepared)}
    return compile_unet(
        family.networks["unet"],
        CompileSettings(chosen.torch_compile_scope, chosen.dynamo_backend, _samples(prepared), tuple(sorted(sizes))),
        warn_line,
    )


def _samples(prepared: Prepared) -> int:
    """Of the largest whole micro-batch."""
    return max((data.batch_size for data in prepared.plan.datasets), default=1)


def _buckets(prepared: Prepared) -> set[tuple[int, int]]:
    """Width and height in pixels of every bucket of the training."""
    return {bucket for index in prepared.plan.indexes for bucket in index.buckets}
