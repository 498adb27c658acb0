"""Textual inversion embeddings of every program: read, and put into models as new words.

Files hold one table of vectors for each text encoder: `emb_params` of Stable Diffusion 1.x and 2.x, `clip_l` and
`clip_g` of SDXL. Extended textual inversion has one for each cross-attention block: IN01 to OUT11 of 1.x and 2.x, as
sd-scripts writes them, and for SDXL, which no other program has, `IN04.clip_l` and `IN04.clip_g` to `OUT05.clip_g`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sd_train.data.words import Words
from sd_train.errors import ModelError
from sd_train.families.base import Family
from sd_train.families.block_states import divide_states, state_blocks
from sd_train.families.pickles import read_pickled_tensors
from sd_train.families.sources import SafetensorsSource, read_all
from sd_train.families.text import TextEncoder

SUFFIXES = (".safetensors", ".pt", ".bin", ".ckpt", ".pti")

_ROLES = {
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "text_encoders_0": "text_encoder",
    "text_encoders_1": "text_encoder_2",
}
"""Names of SDXL's two tables: of sd-scripts, A1111, ComfyUI and diffusers' advanced scripts; of Replicate's trainer."""
_XTI = re.compile(r"((?:IN|OUT)\d\d|MID)(?:\.(clip_[lg]))?")
"""Names of the tables of extended textual inversion (Voynov et al. 2023), one for each cross-attention block."""
_UNNAMED = ("emb_params", "*", "clip_l", "clip_g")
"""Names of single tables that are no words of a prompt."""
_WIDTHS = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "SDXL's second text encoder"}


@dataclass(frozen=True)
class Embedding:
    """What one file, or a pair of files, teaches the text encoders."""

    path: Path
    names: tuple[str, ...]
    """What stands for it in prompts: the file's name, and the token that files of diffusers and ours name."""
    vectors: Mapping[str, Tensor]
    """By network role, [tokens, width], float32; under "" where the file does not say which encoder it is for.

    With blocks [blocks * tokens, width], the first block's in front.
    """
    blocks: tuple[str, ...] = ()
    """Names of the cross-attention blocks that have vectors of their own; none: all see the same ones."""

    @property
    def count(self) -> int:
        """How many tokens it is."""
        return len(next(iter(self.vectors.values()))) // (len(self.blocks) or 1)


def read_embedding(path: Path) -> Embedding:
    """The embedding in `path`, as sd-scripts, A1111, ComfyUI or diffusers write it.

    Raises:
        ModelError: if the file is missing, broken or holds something else.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ModelError(f"{path}: is no embedding file; expected one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise ModelError(f"{path}: there is no such file; check the path")
    called: tuple[str, ...] = (path.stem,)
    if path.suffix.lower() in (".pt", ".bin", ".ckpt"):
        found = read_pickled_tensors(path)
    else:
        source = SafetensorsSource.open([path])
        found = read_all(source)
        if word := source.metadata.get("ss_token_string"):
            called = tuple(dict.fromkeys((path.stem, word)))
    tables = {name: tensor.unsqueeze(0) if tensor.dim() == 1 else tensor for name, tensor in found.items()}
    if any(tensor.dim() != 2 or not tensor.is_floating_point() or not len(tensor) for tensor in tables.values()):
        tables = {}
    if tables and all(_XTI.fullmatch(name) for name in tables):
        return _read_blocks(path, called, tables)
    if len(tables) == 1:
        ((name, table),) = tables.items()
        named = () if name in _UNNAMED or name in _ROLES else (name,)
        return Embedding(path, tuple(dict.fromkeys((*called, *named))), {_ROLES.get(name, ""): table.float()})
    roles = {_ROLES.get(name, ""): table.float() for name, table in tables.items()}
    if not roles or "" in roles or len(roles) != len(tables) or len({len(table) for table in roles.values()}) != 1:
        some = ", ".join(sorted(found)[:4]) or "no tensor"
        raise ModelError(
            f"{path}: is no textual inversion embedding: expected one table of vectors, or clip_l and clip_g with the "
            f"same number of them, found {some}"
        )
    return Embedding(path, called, roles)


def _read_blocks(path: Path, called: tuple[str, ...], tables: Mapping[str, Tensor]) -> Embedding:
    """An extended embedding, its tables named BLOCK, or BLOCK.clip_l and BLOCK.clip_g."""
    by_role: dict[str, dict[str, Tensor]] = {}
    for name, table in tables.items():
        found = _XTI.fullmatch(name)
        assert found is not None
        by_role.setdefault(_ROLES.get(found[2], ""), {})[found[1]] = table.float()
    # IN, MID, OUT: the order of the alphabet is that of the U-Net.
    blocks = tuple(sorted(next(iter(by_role.values()))))
    alike = all(tuple(sorted(each)) == blocks for each in by_role.values()) and ("" not in by_role or len(by_role) == 1)
    shapes = {role: {table.shape for table in each.values()} for role, each in by_role.items()}
    counts = {len(table) for table in tables.values()}
    if not alike or len(counts) != 1 or any(len(found) != 1 for found in shapes.values()):
        raise ModelError(
            f"{path}: is no whole extended textual inversion (XTI): its tables differ in blocks or in the number of "
            "vectors; save it anew"
        )
    joined = {role: torch.cat([each[block] for block in blocks]) for role, each in by_role.items()}
    return Embedding(path, called, joined, blocks)


def saved_tables(vectors: Mapping[str, Tensor], blocks: Sequence[str]) -> dict[str, Tensor]:
    """The tables of a file: `vectors` by name, cut into `blocks` where there are any.

    Args:
        vectors: "emb_params", or "clip_l" and "clip_g"; [tokens, width], with blocks [blocks * tokens, width].
        blocks: names of the blocks that have vectors of their own.
    """
    if not blocks:
        return dict(vectors)
    tables: dict[str, Tensor] = {}
    for name, table in vectors.items():
        suffix = "" if name == "emb_params" else f".{name}"
        parts = table.unflatten(0, (len(blocks), -1))
        tables |= {f"{block}{suffix}": part for block, part in zip(blocks, parts, strict=True)}
    return tables


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


def install_embeddings(embeddings: Sequence[Embedding], family: Family) -> Words:
    """Let prompts call `embeddings`; the words that do so, in lower case.

    Raises:
        ModelError: if one is for another model.
    """
    encoders = family.text_encoders
    tokens: dict[str, range] = {}
    tables: dict[str, list[Tensor]] = {role: [] for role in encoders}
    whole = _paired(embeddings) if len(encoders) > 1 else embeddings
    variants = len(blocks_of(family)) if any(embedding.blocks for embedding in whole) else 1
    first = 0
    for embedding in whole:
        for role, table in fitting_vectors(embedding, family).items():
            tables[role].append(table.expand(variants, -1, -1))
        # Of files that share a name inside, the first keeps it.
        for name in embedding.names:
            tokens.setdefault(name.lower(), range(first, first + embedding.count))
        first += embedding.count
    words = Words(tokens)
    if tokens:
        add_tokens(family, words, {role: torch.cat(parts, dim=1) for role, parts in tables.items()})
    return words


def add_tokens(family: Family, words: Words, vectors: Mapping[str, Tensor]) -> dict[str, nn.Parameter]:
    """Let the text encoders read `words` as new tokens; their rows by role, [variants * tokens, width], float32.

    Args:
        family: the model, on its device.
        words: in every prompt and caption from now on.
        vectors: where the tokens begin, by role, [variants, tokens, width]; several variants are one for each
            cross-attention block of the U-Net, in the order of `blocks_of`.
    """
    rows = {role: family.text_encoders[role].add_tokens(words, table).rows for role, table in vectors.items()}
    if any(len(table) > 1 for table in vectors.values()):
        unet: Any = family.networks["unet"]
        divide_states(unet, list(state_blocks(unet.config).values()))
    return rows


def blocks_of(family: Family) -> tuple[str, ...]:
    """Names of the cross-attention blocks of the U-Net, in order."""
    unet: Any = family.networks["unet"]
    return tuple(state_blocks(unet.config))


def fitting_vectors(embedding: Embedding, family: Family) -> dict[str, Tensor]:
    """The vectors of `embedding` for each text encoder of `family`, [variants, tokens, width].

    Raises:
        ModelError: if it is for another model.
    """
    tables = _fitting(embedding, family.text_encoders)
    if embedding.blocks and embedding.blocks != (known := blocks_of(family)):
        raise ModelError(
            f"{embedding.path}: is extended textual inversion (XTI) for {len(embedding.blocks)} blocks "
            f"({', '.join(embedding.blocks)}), and the model has {len(known)} ({', '.join(known)}); use one that was "
            "trained for this model"
        )
    return {role: table.unflatten(0, (len(embedding.blocks) or 1, -1)) for role, table in tables.items()}


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
                "use one with clip_l and clip_g (of diffusers' two files sample takes both, named NAME and NAME_2)"
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
