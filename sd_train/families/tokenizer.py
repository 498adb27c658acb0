"""The CLIP tokenizer of every Stable Diffusion text encoder, built from the byte pair merges that the package ships."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

START = "<|startoftext|>"
END = "<|endoftext|>"
START_ID = 49406
END_ID = 49407
VOCABULARY_SIZE = 49408
CONTEXT_LENGTH = 77

_MERGES = Path(__file__).parent / "assets" / "clip_bpe_merges.txt.gz"


@dataclass(frozen=True)
class ClipVocabulary:
    """What a byte level BPE tokenizer is made of."""

    ids: dict[str, int]
    """Symbol -> id, 49,408 of them."""
    merges: list[tuple[str, str]]
    """Pairs of symbols, the one that is merged first in front."""


def byte_symbols() -> list[str]:
    """The 256 characters that stand for the byte values, in the order of their ids.

    Printable bytes stand for themselves and come first; the others follow as the characters from U+0100 on
    (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", byte level BPE).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + place) for place in range(256 - len(printable))]


@lru_cache(maxsize=1)
def clip_vocabulary() -> ClipVocabulary:
    """The vocabulary of openai/clip-vit-large-patch14, which all Stable Diffusion models share; read once a process.

    Ids 0-255 are the bytes within a word, 256-511 the bytes that end a word, then one symbol for each merge, then the
    start and the end of the text.
    """
    lines = gzip.decompress(_MERGES.read_bytes()).decode("utf-8").strip("\n").split("\n")
    merges = [(first, second) for first, second in (line.split(" ") for line in lines)]
    within = byte_symbols()
    symbols = [*within, *(symbol + "</w>" for symbol in within), *(first + second for first, second in merges)]
    symbols += [START, END]
    return ClipVocabulary({symbol: place for place, symbol in enumerate(symbols)}, merges)


@lru_cache(maxsize=2)
def clip_tokenizer(pad_token: str = END) -> CLIPTokenizer:
    """As `load_clip_tokenizer`, made once a process, for all who add no tokens to it."""
    return load_clip_tokenizer(pad_token)


def load_clip_tokenizer(pad_token: str = END) -> CLIPTokenizer:
    """A new tokenizer equal to the published ones, without network and files other than the package's.

    Each call builds a tokenizer (about 0.03 s) from the vocabulary that is read once, so that tokens which one caller
    adds are unknown to the others.

    Args:
        pad_token: what fills a text up to 77 tokens: the end token (49407) for OpenAI's CLIP (Stable Diffusion 1.x and
            the first encoder of SDXL), "!" (0) for OpenCLIP (2.x and the second encoder). Naming "!" here leaves "!"
            in a text the word that it is (256), as in OpenCLIP and sd-scripts; `CLIPTokenizer(pad_token="!")` would
            make it a special token and read it as padding.
    """
    from transformers import CLIPTokenizer

    vocabulary = clip_vocabulary()
    tokenizer = CLIPTokenizer(vocab=vocabulary.ids, merges=vocabulary.merges, model_max_length=CONTEXT_LENGTH)
    if pad_token != END:
        tokenizer.pad_token = pad_token
    return tokenizer
