"""Captions to hidden states: one function for training, caches and previews."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from sd_train.data.words import Words
from sd_train.families.new_tokens import NewTokens
from sd_train.families.tokenizer import END_ID
from sd_train.families.weighting import Piece, split_weights

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

CHUNK = 75
"""Tokens between the start and end tokens of one pass through CLIP."""

_LEAST_MEAN = 1e-4
"""Of states, beside their mean size; published models' lie above 1e-2."""

Weighting = Literal["none", "plain", "mean"]
"""What brackets in a text do. "none": they are text. "plain": each hidden state is multiplied by its token's weight, as
sd-scripts trains with `--weighted_captions`. "mean": the same, then the mean over all states is put back to what it was
before, as A1111's web UI and sd-scripts make pictures."""


@dataclass(frozen=True)
class TextOptions:
    """How captions are encoded."""

    clip_skip: int | None = None
    """Which hidden state from the end is used, as A1111 counts; None is what the family was trained with."""
    max_token_length: int | None = None
    """75 (also None), 150 or 225 tokens of each caption."""
    weighted_captions: bool = False
    """Whether brackets weigh the tokens in them."""

    @property
    def chunks(self) -> int:
        """Passes through the text encoder for each caption."""
        return (self.max_token_length or CHUNK) // CHUNK


class Tokens(NamedTuple):
    """Texts as the text encoder takes them."""

    ids: Tensor
    """[B, chunks, 77], int64."""
    weights: Tensor
    """[B, chunks, 77], float32; 1 for start, end and padding."""
    weighted: bool
    """Whether any weight is another one than 1; known here, so that nobody asks a tensor."""


@dataclass
class ChunkTokenizer:
    """Cuts texts into chunks of 75 tokens, each between its own start and end token (sd-scripts' rule)."""

    tokenizer: CLIPTokenizer
    words: Words = field(default_factory=lambda: Words({}))
    """Words of tokens that follow on the vocabulary's last one."""
    _known: dict[tuple[str, int, bool], Tokens] = field(default_factory=dict)

    def teach(self, words: Words) -> None:
        """Read `words` as their new tokens from now on."""
        self.words = words
        self._known.clear()

    @property
    def first_new(self) -> int:
        """The id of the first token that `words` are made of."""
        return len(self.tokenizer)

    @property
    def added_words(self) -> list[tuple[str, int]]:
        """Words beyond CLIP's vocabulary with their ids, by id."""
        added: dict[str, int] = self.tokenizer.get_added_vocab()
        return sorted(((word, place) for word, place in added.items() if place > END_ID), key=lambda pair: pair[1])

    def length(self, text: str, weighted: bool = False) -> int:
        """Number of tokens, without start and end; `weighted`: brackets are weights and no text."""
        return sum(len(self._ids(piece.text)) for piece in self._pieces(text, weighted))

    def chunks_for(self, texts: Sequence[str], limit: int, weighted: bool = False) -> int:
        """Chunks that hold the longest of `texts`, at most `limit`."""
        return max(1, min(limit, max(-(-self.length(text, weighted) // CHUNK) for text in texts)))

    def __call__(self, texts: Sequence[str], chunks: int, weighted: bool = False) -> Tokens:
        """[B] texts -> [B, `chunks`, 77] tokens; what does not fit is cut off."""
        found = [self._tokens(text, chunks, weighted) for text in texts]
        ids, weights = torch.stack([row.ids for row in found]), torch.stack([row.weights for row in found])
        return Tokens(ids, weights, any(row.weighted for row in found))

    def _tokens(self, text: str, chunks: int, weighted: bool) -> Tokens:
        # Captions come back every epoch; shuffled ones are many, so the table is emptied before it grows large.
        key = (text, chunks, weighted)
        if (found := self._known.get(key)) is None:
            if len(self._known) >= 65536:
                self._known.clear()
            found = self._known[key] = self._cut(text, chunks, weighted)
        return found

    def _cut(self, text: str, chunks: int, weighted: bool) -> Tokens:
        """Chunks are padded behind their end token, so the second of two may be start, end and padding alone."""
        ids: list[int] = []
        weights: list[float] = []
        for piece in self._pieces(text, weighted):
            found = self._ids(piece.text)
            ids += found
            weights += [piece.weight] * len(found)
        known: Any = self.tokenizer
        start, end, pad = known.bos_token_id, known.eos_token_id, known.pad_token_id
        rows, scales = [], []
        for first in range(0, chunks * CHUNK, CHUNK):
            inner = ids[first : first + CHUNK]
            empty = CHUNK - len(inner)
            rows.append([start, *inner, end, *[pad] * empty])
            scales.append([1.0, *weights[first : first + CHUNK], 1.0, *[1.0] * empty])
        return Tokens(torch.tensor(rows), torch.tensor(scales), any(scale != 1 for row in scales for scale in row))

    def _pieces(self, text: str, weighted: bool) -> list[Piece]:
        """Stretches of equal weight, with marks in place of `words`: these may hold brackets."""
        marked = self.words.mark(text)
        return split_weights(marked) if weighted else [Piece(marked, 1.0)]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self.words.split(text):
            if isinstance(part, str):
                ids += self.tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
            else:
                ids += [self.first_new + token for token in part]
        return ids


def clip_transformer(encoder: nn.Module) -> nn.Module:
    """The module that holds `encoder.layers` and `final_layer_norm`; transformers 5.6 dropped a level."""
    inner = getattr(encoder, "text_model", encoder)
    assert isinstance(inner, nn.Module)
    return inner


class EncodedText(NamedTuple):
    """What one text encoder makes of texts."""

    states: Tensor
    """[B, 75 * chunks + 2, width]; of words with variants [B, variants * (75 * chunks + 2), width]."""
    pooled: Tensor | None
    """[B, projection width], of the first chunk; None of encoders without a projection."""


@dataclass
class TextEncoder:
    """One CLIP text encoder with its tokenizer, and which of its hidden states are used."""

    network: CLIPTextModel | CLIPTextModelWithProjection
    tokenizer: ChunkTokenizer
    final_norm: bool
    """Whether the final layer norm is applied to the states: in Stable Diffusion 1.x and 2.x, not in SDXL."""
    layer: int = 1
    """The hidden state from the end; 1 is the last one."""
    new: NewTokens | None = None
    """Tokens beside the network's own."""

    def add_tokens(self, words: Words, vectors: Tensor) -> NewTokens:
        """Read `words` as new tokens that begin as `vectors`, [variants, tokens, width]."""
        network: Any = self.network
        self.new = NewTokens(network.get_input_embeddings(), self.tokenizer.first_new, vectors)
        self.tokenizer.teach(words)
        return self.new

    @property
    def layers(self) -> int:
        """How many there are."""
        count: int = self.network.config.num_hidden_layers
        return count

    def idle(self) -> tuple[str, ...]:
        """How the published names begin of weights that nothing that comes out depends on.

        These are the layers above the one that is used and, where the states are not normed, the final layer norm. The
        pooled state of an encoder with a projection depends on all of them.
        """
        if hasattr(self.network, "text_projection"):
            return ()
        above = [f"text_model.encoder.layers.{place}." for place in range(self.layers - self.layer + 1, self.layers)]
        return (*above, *(() if self.final_norm else ("text_model.final_layer_norm.",)))

    def __call__(self, texts: Sequence[str], chunks: int, weighting: Weighting) -> EncodedText:
        """[B] texts -> states and pooled states; with gradients where they are switched on.

        Chunks are joined without the start and end tokens between them. The pooled state is the last layer's at the
        first chunk's first end token, after norm and projection, whatever `layer` is (Podell et al. 2023; sd-scripts:
        the first chunk of long captions).

        Where new tokens have variants, each text is read once with each of them: their states follow each other along
        the tokens, the first variant's in front, and the pooled state is the mean. Chunks that come to the same, as
        those without new tokens do, are read once.
        """
        tokens = self.tokenizer(texts, chunks, weighting != "none")
        variants, places = 1 if self.new is None else self.new.variants, None
        if self.new is not None and variants > 1:
            ids, weights = self.new.varied(tokens.ids), tokens.weights.repeat_interleave(variants, dim=0)
            tokens = Tokens(ids, weights, tokens.weighted)
        network: Any = self.network
        batch, _, length = tokens.ids.shape
        ids = tokens.ids.view(batch * chunks, length)
        if variants > 1:
            # On the CPU, where the ids are: nothing waits for the device.
            ids, places = torch.unique(ids, dim=0, return_inverse=True)
            places = places.to(network.device, non_blocking=True)
        ids = ids.to(network.device, non_blocking=True)
        plain = self.layer == 1 and self.final_norm
        output = network(ids, output_hidden_states=not plain)
        if plain:
            states = output.last_hidden_state
        else:
            states = output.hidden_states[-self.layer]
            if self.final_norm:
                states = clip_transformer(network).get_submodule("final_layer_norm")(states)
        states = states if places is None else _spread(states, places)
        states = _joined(states.view(batch, chunks, length, -1))
        if tokens.weighted:
            weights = _joined(tokens.weights.unsqueeze(-1)).to(states.device, non_blocking=True)
            states = _weighted(states, weights, weighting)
        pooled = None
        if hasattr(network, "text_projection"):
            ends = (ids == self.tokenizer.tokenizer.eos_token_id).int().argmax(dim=1)
            at_end = output.last_hidden_state[torch.arange(len(ids), device=ids.device), ends]
            at_end = at_end if places is None else _spread(at_end, places)
            pooled = network.text_projection(at_end[::chunks])
        if variants > 1:
            states = states.unflatten(0, (-1, variants)).flatten(1, 2)
            pooled = None if pooled is None else pooled.unflatten(0, (-1, variants)).mean(dim=1)
        return EncodedText(states, pooled)


def _spread(rows: Tensor, places: Tensor) -> Tensor:
    """[unique, ...] rows -> [N, ...], the one that each of [N] `places` names."""
    # The gradient of plain indexing is added up in any order where several threads do so; that of an embedding is not.
    spread: Tensor = functional.embedding(places, rows.flatten(1)).unflatten(1, rows.shape[1:])
    return spread


def _joined(rows: Tensor) -> Tensor:
    """[B, chunks, 77, n] -> [B, 75 * chunks + 2, n]: the first start, what is between, the last end."""
    if rows.shape[1] == 1:
        return rows[:, 0]
    return torch.cat([rows[:, 0, :1], rows[:, :, 1:-1].flatten(1, 2), rows[:, -1, -1:]], dim=1)


def _weighted(states: Tensor, weights: Tensor, weighting: Weighting) -> Tensor:
    """[B, tokens, width] times [B, tokens, 1]."""
    weighed = states * weights.to(states.dtype)
    if weighting == "mean":
        before, after = (part.float().mean(dim=(1, 2), keepdim=True) for part in (states, weighed))
        # After a layer norm without a bias of its own the mean is nothing but rounding, which says no ratio.
        size = weighed.float().abs().mean(dim=(1, 2), keepdim=True)
        ratio = torch.where(after.abs() > _LEAST_MEAN * size, before / after, 1.0)
        weighed = weighed * ratio.to(states.dtype)
    return weighed
