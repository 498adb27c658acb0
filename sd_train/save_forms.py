"""The forms in which a trainable is saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from sd_train.families.sources import CastSource, DictSource
from sd_train.families.streaming import write_tensors
from sd_train.lora_files.writing import to_diffusers
from sd_train.trainables.base import Trainable

Export = Callable[[Trainable, Path, Mapping[str, str], Mapping[str, Tensor] | None], None]
"""Writes a trainable's weights, or other tensors of the same names, with metadata."""


def save_own(
    trainable: Trainable, path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor] | None
) -> None:
    """In the trainable's own format."""
    trainable.save(path, metadata, tensors)


def diffusers_lora(family: str, dtype: torch.dtype) -> Export:
    """As diffusers' (PEFT's) LoRA of a model of `family`, in `dtype`."""

    def save(
        trainable: Trainable, path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor] | None
    ) -> None:
        content = to_diffusers(trainable.tensors() if tensors is None else tensors, family, metadata)
        written = CastSource(DictSource(content.tensors), dtype)
        write_tensors(path, written, {**metadata, **content.metadata})

    return save
