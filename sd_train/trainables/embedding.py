"""Textual inversion (Gal et al. 2022), and extended (P+, Voynov et al. 2023): a new word, and nothing else."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sd_train.data.words import Words
from sd_train.errors import ModelError
from sd_train.families.base import Family
from sd_train.families.embeddings import Embedding, add_tokens, blocks_of, fitting_vectors, saved_tables
from sd_train.families.text import TextEncoder
from sd_train.randomness import derive
from sd_train.trainables.base import ParamGroup
from sd_train.trainables.files import write_weights
from sd_train.trainables.lora import GROUP_NAMES
from sd_train.types import Batch, Update

_TABLES = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
"""Network role -> the name of its vectors in files of SDXL and of its refiner."""


@dataclass(frozen=True)
class EmbeddingSettings:
    """Which word is taught, and where its vectors begin."""

    word: str
    count: int
    """Vectors of the word, for each block if it is `extended`."""
    rates: Mapping[str, float]
    """Learning rate by network role."""
    seed: int
    extended: bool = False
    """Vectors of their own for each cross-attention block of the U-Net."""
    precision: torch.dtype | None = None
    """Of the saved file; None: float32."""
    init_word: str | None = None
    """The words whose tokens the vectors start from."""
    start: Embedding | None = None
    """What they start from in place of `init_word`."""


class TextualInversion:
    """The vectors of one word, as rows beside the text encoders' frozen tables.

    The file holds `emb_params`, [vectors, width], for Stable Diffusion 1.x and 2.x, and `clip_l` and `clip_g` for SDXL
    (its refiner: `clip_g`), as sd-scripts has them; see `families.embeddings` for the extended ones.
    """

    masters: Collection[str] = ()

    def __init__(self, settings: EmbeddingSettings) -> None:
        self.settings = settings
        self.blocks: tuple[str, ...] = ()
        """Names of the blocks that have vectors of their own."""
        self._roles: dict[str, str] = {}
        self._rows: dict[str, nn.Parameter] = {}

    def install(self, family: Family) -> None:
        """Let the text encoders read the word.

        Raises:
            ModelError: if the model has the word already, or the vectors to start from are another model's.
        """
        settings, encoders = self.settings, family.text_encoders
        for encoder in encoders.values():
            if settings.word.lower() in (word.lower() for word, _ in encoder.tokenizer.added_words):
                raise ModelError(
                    f"--token_string = {settings.word!r}: the model's own vocabulary has this word already; choose "
                    "another one"
                )
        if settings.extended:
            self.blocks = blocks_of(family)
        start = None if settings.start is None else _start(settings.start, family)
        variants = len(self.blocks) or 1
        begun = {
            role: (start[role] if start is not None else self._begin(role, encoder)).expand(variants, -1, -1)
            for role, encoder in encoders.items()
        }
        rows = add_tokens(family, Words({settings.word: range(settings.count)}), begun)
        single = list(rows) == ["text_encoder"]
        self._roles = {("emb_params" if single else _TABLES[role]): role for role in rows}
        self._rows = {name: rows[role] for name, role in self._roles.items()}

    def _begin(self, role: str, encoder: TextEncoder) -> Tensor:
        """[1, vectors, width]: the init word's tokens in order, from the first again, or random ones of usual size."""
        settings, network = self.settings, encoder.network
        table: Any = network.get_input_embeddings().weight.detach()
        if settings.init_word is not None:
            ids = encoder.tokenizer([settings.init_word], 1).ids[0, 0]
            length = min(encoder.tokenizer.length(settings.init_word), len(ids) - 2)
            chosen = [int(ids[1 + place % length]) for place in range(settings.count)]
            found: Tensor = table[chosen].float()
            return found.unsqueeze(0)
        generator = torch.Generator().manual_seed(derive(settings.seed, "embedding", role) % 2**63)
        drawn = torch.randn(1, settings.count, table.shape[1], generator=generator).to(table.device)
        return torch.mul(drawn, table.float().std())

    def describe(self) -> str:
        """What learns: the word and how many vectors it has."""
        settings = self.settings
        each = f" for each of {len(self.blocks)} blocks" if self.blocks else ""
        encoders = f" in {len(self._rows)} text encoders" if len(self._rows) > 1 else ""
        vectors = f"{settings.count} vector{'s' if settings.count > 1 else ''}"
        numbers = sum(rows.numel() for rows in self._rows.values())
        return f"the word {settings.word!r}: {vectors}{each}{encoders}; {numbers:,} parameters"

    def trains(self, role: str) -> bool:
        """Whether gradients must flow through network `role`."""
        return bool(self.settings.rates.get(role))

    def groups(self) -> list[ParamGroup]:
        """One group for each text encoder; their weights do not decay, for a word is nothing that should be small."""
        return [
            ParamGroup(GROUP_NAMES[role], {name: self._rows[name]}, self.settings.rates[role], weight_decay=0.0)
            for name, role in self._roles.items()
            if self.trains(role)
        ]

    def before_batch(self, update: Update, batch: Batch) -> None:
        """Nothing is drawn."""

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Texts without the word are read as the base model reads them, so there is nothing to switch off."""
        yield

    @contextmanager
    def for_inference(self) -> Iterator[None]:
        """There is no dropout."""
        yield

    def tensors(self) -> dict[str, Tensor]:
        """The vectors of each text encoder, [vectors, width]; extended [blocks * vectors, width]."""
        return {name: rows.detach() for name, rows in self._rows.items()}

    def load(self, tensors: Mapping[str, Tensor], strict: bool = True) -> None:
        """Copy vectors of the same names.

        Raises:
            ModelError: if names (when `strict`) or shapes differ.
        """
        ours = self.tensors()
        if strict and ours.keys() != tensors.keys():
            raise ModelError(f"holds {', '.join(sorted(tensors))}, and this run trains {', '.join(sorted(ours))}")
        for name, tensor in tensors.items():
            if name in ours and ours[name].shape != tensor.shape:
                vectors = "--num_vectors_per_token and --xti make it"
                raise ModelError(f"{name} has shape {tuple(tensor.shape)}, {vectors} {tuple(ours[name].shape)}")
        for name, tensor in tensors.items():
            if name in ours:
                ours[name].copy_(tensor)

    def after_step(self) -> None:
        """Nothing is constrained."""

    def figures(self) -> dict[str, float | Tensor]:
        """Nothing beside the loss."""
        return {}

    def save(self, path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor] | None = None) -> None:
        """Write sd-scripts' file, in the precision of the settings."""
        tables = saved_tables(self.tensors() if tensors is None else tensors, self.blocks)
        write_weights(path, tables, metadata, self.settings.precision, hashes=False)


def _start(embedding: Embedding, family: Family) -> dict[str, Tensor]:
    try:
        return fitting_vectors(embedding, family)
    except ModelError as problem:
        raise ModelError(*(f"--weights = {text}" for text in problem.problems)) from None
