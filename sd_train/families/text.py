"""Captions to hidden states: one function for training, caches and previews."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

CHUNK = 75
"""Tokens between the start and end tokens of one pass through CLIP."""


@dataclass
class ChunkTokenizer:
    """Cuts captions into chunks of 75 tokens, each between its own start and end token (sd-scripts' rule)."""

    tokenizer: CLIPTokenizer
    _known: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def length(self, caption: str) -> int:
        """Number of tokens, without start and end."""
        return len(self.tokenizer(caption, add_special_tokens=False)["input_ids"])

    def chunks_for(self, captions: Sequence[str], limit: int) -> int:
        """Chunks that hold the longest of `captions`, at most `limit`."""
        return max(1, min(limit, max(-(-self.length(caption) // CHUNK) for caption in captions)))

    def __call__(self, captions: Sequence[str], chunks: int) -> Tensor:
        """[B] captions -> [B, `chunks`, 77] token ids; what does not fit is cut off."""
        return torch.stack([self._tokens(caption, chunks) for caption in captions])

    def _tokens(self, caption: str, chunks: int) -> Tensor:
        # Captions come back every epoch; shuffled ones are many, so the table is emptied before it grows large.
        key = (caption, chunks)
        if (found := self._known.get(key)) is None:
            if len(self._known) >= 65536:
                self._known.clear()
            found = self._known[key] = self._cut(caption, chunks)
        return found

    def _cut(self, caption: str, chunks: int) -> Tensor:
        length = chunks * CHUNK
        ids = self.tokenizer(caption, padding="max_length", truncation=True, max_length=length + 2)["input_ids"]
        rows = torch.tensor(ids[1:-1]).view(chunks, CHUNK)
        start, end = torch.tensor(ids[0]).expand(chunks, 1), torch.tensor(ids[-1]).expand(chunks, 1)
        return torch.cat([start, rows, end], dim=1)


def clip_transformer(encoder: nn.Module) -> nn.Module:
    """The module that holds `encoder.layers` and `final_layer_norm`; transformers 5.6 dropped a level."""
    inner = getattr(encoder, "text_model", encoder)
    assert isinstance(inner, nn.Module)
    return inner


def encode_chunks(encoder: CLIPTextModel, ids: Tensor, clip_skip: int | None) -> Tensor:
    """[B, chunks, 77] token ids -> [B, 75 * chunks + 2, width] hidden states.

    `clip_skip` n takes the n-th hidden state from the end; the final layer norm is applied to it as well, as
    A1111 and sd-scripts do. Chunks are joined without the start and end tokens between them.
    """
    batch, chunks, length = ids.shape
    deep = clip_skip is not None and clip_skip > 1
    output = encoder(ids.view(batch * chunks, length), output_hidden_states=deep)
    if deep:
        assert clip_skip is not None
        norm = clip_transformer(encoder).get_submodule("final_layer_norm")
        states = norm(output.hidden_states[-clip_skip])
    else:
        states = output.last_hidden_state
    if chunks > 1:
        states = states.view(batch, chunks, length, -1)
        inner = states[:, :, 1:-1].reshape(batch, chunks * CHUNK, -1)
        states = torch.cat([states[:, 0, :1], inner, states[:, -1, -1:]], dim=1)
    assert isinstance(states, Tensor)
    return states
