"""Vectors of new tokens beside the frozen table of a text encoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class NewTokens:
    """Takes the place of the table's `forward`: the ids from `first` on are rows of a table of their own.

    Nothing is registered in the text encoder, so its weights and their names stay those of the base model.
    """

    def __init__(self, table: nn.Module, first: int, vectors: Tensor) -> None:
        """
        Args:
            table: the text encoder's token embedding.
            first: the id that the first new token has.
            vectors: [variants, tokens, width], where each new token begins.
        """
        weight = table.weight
        assert isinstance(weight, Tensor)
        self.first = first
        self.variants, self.count, _ = vectors.shape
        self.rows = nn.Parameter(vectors.detach().to(weight.device, torch.float32).flatten(0, 1).clone())
        """[variants * tokens, width], float32; the first variant's in front."""
        self._forward = table.forward
        # Not by assignment: a module registers what is assigned to it.
        table.__dict__["forward"] = self.forward

    def forward(self, ids: Tensor) -> Tensor:
        """[...] ids -> [..., width] in the dtype of the frozen table."""
        # Both tables are read at every place, so that shapes never depend on the texts, and the rows always have a
        # gradient.
        new = ids >= self.first
        known: Tensor = self._forward(ids.masked_fill(new, 0))
        added = functional.embedding((ids - self.first).clamp(min=0), self.rows.to(known.dtype))
        return torch.where(new.unsqueeze(-1), added, known)

    def varied(self, ids: Tensor) -> Tensor:
        """[B, ...] ids of the first variant -> [B * variants, ...], all variants of each text in a row."""
        shape = (1, -1, *[1] * (ids.dim() - 1))
        shifts = torch.arange(0, self.variants * self.count, self.count, device=ids.device).view(shape)
        ids = ids.unsqueeze(1)
        return (ids + shifts * (ids >= self.first)).flatten(0, 1)
