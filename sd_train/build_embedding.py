"""`train_textual_inversion`: the options of a new word -> what learns."""

from __future__ import annotations

from sd_train.device import DTYPES
from sd_train.families.embeddings import read_embedding
from sd_train.plan import Prepared
from sd_train.trainables.base import Trainable
from sd_train.trainables.embedding import EmbeddingSettings, TextualInversion


def make(prepared: Prepared) -> Trainable:
    """The word that the options describe, not yet in a model.

    Raises:
        ModelError: if the file that it starts from cannot be read.
    """
    chosen, precision = prepared.config.embedding, prepared.config.saving.save_precision
    assert chosen.token_string is not None
    # A resumed training starts from its state.
    fresh = chosen.weights is not None and prepared.resume is None
    return TextualInversion(
        EmbeddingSettings(
            word=chosen.token_string,
            count=chosen.num_vectors_per_token,
            rates=prepared.plan.rates,
            seed=prepared.progress.seed,
            extended=chosen.xti,
            precision=None if precision is None else DTYPES[precision],
            init_word=chosen.init_word,
            start=read_embedding(chosen.weights) if fresh and chosen.weights is not None else None,
        )
    )
