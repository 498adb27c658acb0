"""The U-Net of a run -> compiled graphs."""

from __future__ import annotations

from sd_train.compiling import CompiledUnet, CompileSettings, check_compiler, compile_unet, keep_programs
from sd_train.data.store import default_cache_dir
from sd_train.families.base import Family
from sd_train.plan import Prepared


def prepare_compiler(prepared: Prepared) -> None:
    """Look for what the programs are built with, and keep them beside the other caches.

    Raises:
        ConfigError: if they cannot be built here.
    """
    # First: whoever asks torch for its folder settles the place.
    keep_programs((prepared.config.dataset.cache_dir or default_cache_dir()) / "compiled")
    check_compiler(prepared.config.training.dynamo_backend, prepared.device.device)


def compile_network(prepared: Prepared, family: Family) -> CompiledUnet:
    """Compile what computes the training steps; the sizes are those of the dataset's buckets."""
    chosen = prepared.config.training
    assert family.latent is not None
    factor = family.latent.factor
    sizes = {(height // factor, width // factor) for index in prepared.plan.indexes for width, height in index.buckets}
    samples = max((data.batch_size for data in prepared.plan.datasets), default=1)
    return compile_unet(
        family.networks["unet"],
        CompileSettings(chosen.torch_compile_scope, chosen.dynamo_backend, samples, tuple(sorted(sizes))),
    )
