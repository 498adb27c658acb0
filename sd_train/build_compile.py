"""The U-Net of a run -> compiled graphs."""

from __future__ import annotations

from sd_train.compiling import CompiledUnet, CompileSettings, compile_unet, keep_programs
from sd_train.data.store import default_cache_dir
from sd_train.families.base import Family
from sd_train.plan import Prepared


def compile_network(prepared: Prepared, family: Family) -> CompiledUnet:
    """Compile what computes the training steps; the sizes are those of the dataset's buckets."""
    chosen, dataset = prepared.config.training, prepared.config.dataset
    assert family.latent is not None
    factor = family.latent.factor
    sizes = {(height // factor, width // factor) for index in prepared.plan.indexes for width, height in index.buckets}
    samples = max((data.batch_size for data in prepared.plan.datasets), default=1)
    keep_programs((dataset.cache_dir or default_cache_dir()) / "compiled")
    return compile_unet(
        family.networks["unet"],
        CompileSettings(chosen.torch_compile_scope, chosen.dynamo_backend, samples, tuple(sorted(sizes))),
    )
