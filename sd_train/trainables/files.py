"""Files of small trainables: safetensors, or pickles where these are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sd_train.families.pickles import write_pickled
from sd_train.families.sources import DictSource
from sd_train.files import write_network, write_tensors, write_whole

PICKLED = (".ckpt", ".pt")


def write_weights(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, hashes: bool = True
) -> None:
    """Write `tensors`; a path that ends in .ckpt or .pt becomes a pickled table, which holds no metadata.

    Args:
        path: the file.
        tensors: by the names that they have in it.
        metadata: of a safetensors file.
        hashes: whether it also gets the hashes that web UIs look networks up by.

    Raises:
        RunError: if the disk refuses.
    """
    if path.suffix in PICKLED:
        source = DictSource({name: tensor.detach() for name, tensor in tensors.items()})
        write_whole(path, lambda temporary: write_pickled(temporary, source, bare=True))
    elif hashes:
        write_network(path, tensors, metadata)
    else:
        write_tensors(path, tensors, metadata)
