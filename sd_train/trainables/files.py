"""Files of small trainables: safetensors, or pickles where these are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sd_train.families.pickles import write_pickled
from sd_train.families.sources import CastSource, DictSource
from sd_train.families.streaming import write_network, write_tensors
from sd_train.files import write_whole

PICKLED = (".ckpt", ".pt")


def write_weights(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], dtype: torch.dtype | None, *,
    hashes: bool = True,
) -> None:
    """Write `tensors`; a path that ends in .ckpt or .pt becomes a pickled table, which holds no metadata.

    Args:
        path: the file.
        tensors: by the names that they have in it.
        metadata: of a safetensors file.
        dtype: of every number with a fraction; None: float32.
        hashes: whether it also gets the hashes that web UIs look networks up by.

    Raises:
        RunError: if the disk refuses.
    """
    # Each tensor is cast when it is written.
    source = CastSource(DictSource(tensors), dtype or torch.float32)
    if path.suffix in PICKLED:
        write_whole(path, lambda temporary: write_pickled(temporary, source, bare=True))
    elif hashes:
        write_network(path, source, metadata)
    else:
        write_tensors(path, source, metadata)
