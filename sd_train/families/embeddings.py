"""Textual inversion embeddings of every program: read, put into text encoders, found in prompts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sd_train.errors import ModelError
from sd_train.families.pickles import read_pickled_tensors
from sd_train.families.sources import SafetensorsSource, read_all
from sd_train.families.text import TextEncoder

SUFFIXES = (".safetensors", ".pt", ".bin", ".pti")

_ROLES = {
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "text_encoders_0": "text_encoder",
    "text_encoders_1": "text_encoder_2",
}
"""Names of SDXL's two tables: of sd-scripts, A1111, ComfyUI and diffusers' advanced scripts; of Replicate's trainer."""
_XTI = re.compile(r"(?:IN|OUT)\d\d|MID")
"""Names of the tables of extended textual inversion (Voynov et al. 2023), one for each cross-attention layer."""
_UNNAMED = ("emb_params", "*", "clip_l", "clip_g")
"""Names of single tables that are no words of a prompt."""
_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "SDXL's second text encoder"}


@dataclass(frozen=True)
class Embedding:
    """What one file, or a pair of files, teaches the text encoders."""

    path: Path
    names: tuple[str, ...]
    """What stands for it in prompts: the file's name, and the token inside files of diffusers."""
    vectors: Mapping[str, Tensor]
    """By network role, [tokens, width], float32; under "" where the file does not say which encoder it is for."""

    @property
    def count(self) -> int:
        """How many tokens it is."""
        return len(next(iter(self.vectors.values())))


def read_embedding(path: Path) -> Embedding:
    """The embedding in `path`, as sd-scripts, A1111, ComfyUI or diffusers write it.

    Raises:
        ModelError: if the file is missing, broken or holds something else.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ModelError(f"{path}: is no embedding file; expected one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise ModelError(f"{path}: there is no such file; check the path")
    pickled = path.suffix.lower() in (".pt", ".bin")
    found = read_pickled_tensors(path) if pickled else read_all(SafetensorsSource.open([path]))
    if found and all(_XTI.fullmatch(name) for name in found):
        raise ModelError(
            f"{path}: holds extended textual inversion (XTI), other vectors for each layer of the U-Net, which no "
            "pipeline draws with; use an embedding of train_textual_inversion"
        )
    tables = {name: tensor.unsqueeze(0) if tensor.dim() == 1 else tensor for name, tensor in found.items()}
    if any(tensor.dim() != 2 or not tensor.is_floating_point() or not len(tensor) for tensor in tables.values()):
        tables = {}
    if len(tables) == 1:
        ((name, table),) = tables.items()
        names = (path.stem,) if name in _UNNAMED or name in _ROLES else tuple(dict.fromkeys((path.stem, name)))
        return Embedding(path, names, {_ROLES.get(name, ""): table.float()})
    roles = {_ROLES.get(name, ""): table.float() for name, table in tables.items()}
    if not roles or "" in roles or len(roles) != len(tables) or len({len(table) for table in roles.values()}) != 1:
        some = ", ".join(sorted(found)[:4]) or "no tensor"
        raise ModelError(
            f"{path}: is no textual inversion embedding: expected one table of vectors, or clip_l and clip_g with the "
            f"same number of them, found {some}"
        )
    return Embedding(path, (path.stem,), roles)


def read_embeddings(paths: Sequence[Path]) -> list[Embedding]:
    """The embeddings in `paths`.

    Raises:
        ModelError: with every file that cannot be read or has another's name.
    """
    found: dict[str, Embedding] = {}
    problems: list[str] = []
    for path in paths:
        try:
            embedding = read_embedding(path)
        except ModelError as problem:
            problems += problem.problems
            continue
        if (other := found.setdefault(path.stem.lower(), embedding)) is not embedding:
            problems.append(f"{path}: {other.path} has the same name, and prompts call both by it; rename one")
    if problems:
        raise ModelError(*problems)
    return list(found.values())


def _paired(embeddings: Sequence[Embedding]) -> list[Embedding]:
    """`NAME` and `NAME_2`, which diffusers writes for SDXL's two encoders, as one."""
    unnamed = {each.path.stem: each for each in embeddings if each.vectors.keys() == {""}}
    joined: list[Embedding] = []
    for embedding in embeddings:
        stem = embedding.path.stem
        second = unnamed.get(f"{stem}_2")
        if stem in unnamed and second is not None and second.count == embedding.count:
            both = {"text_encoder": embedding.vectors[""], "text_encoder_2": second.vectors[""]}
            joined.append(replace(embedding, vectors=both))
        elif not (stem in unnamed and stem.endswith("_2") and stem.removesuffix("_2") in unnamed):
            joined.append(embedding)
    return joined


@dataclass(frozen=True)
class Words:
    """How prompts are rewritten so that tokenizers see the new tokens."""

    tokens: Mapping[str, str]
    """Name in lower case -> its tokens; the text encoders read lower case."""
    pattern: re.Pattern[str] | None = None

    def used(self, text: str) -> list[str]:
        """The names that stand in `text`, in lower case."""
        return [] if self.pattern is None else [name.lower() for name in self.pattern.findall(text)]

    def replace(self, text: str) -> str:
        """`text` with tokens in place of names."""
        if self.pattern is None:
            return text
        return self.pattern.sub(lambda found: f" {self.tokens[found[0].lower()]} ", text)


def install_embeddings(embeddings: Sequence[Embedding], encoders: Mapping[str, TextEncoder]) -> Words:
    """Add the vectors of `embeddings` to the token tables of `encoders` (by role); how prompts name them.

    Raises:
        ModelError: if one is for another model.
    """
    tokens: dict[str, str] = {}
    for place, embedding in enumerate(_paired(embeddings) if len(encoders) > 1 else embeddings):
        vectors = _fitting(embedding, encoders)
        added = [f"<embedding-{place}-{row}>" for row in range(embedding.count)]
        for role, table in vectors.items():
            _add_tokens(encoders[role], added, table)
        # Of files that share a name inside, the first keeps it.
        for name in embedding.names:
            tokens.setdefault(name.lower(), "".join(added))
    if not tokens:
        return Words({})
    # A name counts where no letter or digit touches it; of names that begin alike the longest is meant.
    either = "|".join(re.escape(name) for name in sorted(tokens, key=len, reverse=True))
    return Words(tokens, re.compile(rf"(?<!\w)(?:{either})(?!\w)", re.IGNORECASE))


def _fitting(embedding: Embedding, encoders: Mapping[str, TextEncoder]) -> dict[str, Tensor]:
    """The vectors of `embedding` for each of `encoders`."""
    vectors = dict(embedding.vectors)
    if len(encoders) == 1:
        (role,) = encoders
        # "clip_l" is also what some programs call the only encoder of other families; SDXL's refiner has the second.
        alone = next(iter(vectors.values())) if len(vectors) == 1 else None
        chosen: dict[str, Tensor | None]
        chosen = {role: vectors.get(role) if role == "text_encoder_2" and len(vectors) > 1 else alone}
    else:
        chosen = {role: vectors.get(role) for role in encoders}
    fitting: dict[str, Tensor] = {}
    for role, table in chosen.items():
        if table is None:
            many = len(encoders) > 1
            found = "vectors for one text encoder" if len(vectors) == 1 else "vectors for SDXL's two text encoders"
            way_out = (
                "use one with clip_l and clip_g (diffusers' two files: give both, named NAME and NAME_2)"
                if many
                else "use one for this model"
            )
            raise ModelError(f"{embedding.path}: has {found}, and the model has {len(encoders)}; {way_out}")
        network: Any = encoders[role].network
        width: int = network.get_input_embeddings().weight.shape[1]
        if table.shape[1] != width:
            maker = _WIDTHS.get(table.shape[1])
            made_for = f" ({maker})" if maker else ""
            raise ModelError(
                f"{embedding.path}: has vectors of {table.shape[1]} numbers{made_for}, and the model's text encoder "
                f"takes {width}; use an embedding that was trained for this model"
            )
        fitting[role] = table
    return fitting


def _add_tokens(encoder: TextEncoder, tokens: Sequence[str], table: Tensor) -> None:
    from transformers import AddedToken

    tokenizer: Any = encoder.tokenizer.tokenizer
    network: Any = encoder.network
    # Not normalised: what users write in upper case is no token.
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    places = tokenizer.convert_tokens_to_ids(list(tokens))
    embeddings = network.get_input_embeddings()
    known = embeddings.weight.detach()
    # A table may be longer than its vocabulary.
    rows = known.new_zeros(max(len(known), max(places) + 1), known.shape[1])
    rows[: len(known)] = known
    rows[places] = table.to(known.device, known.dtype)
    embeddings.weight = torch.nn.Parameter(rows, requires_grad=False)
    embeddings.num_embeddings = len(rows)
