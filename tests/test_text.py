"""Captions as tokens and hidden states: chunks, padding, weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sd_train.demo.tiny_model import TinyKind
from sd_train.errors import ModelError
from sd_train.families.latent import LatentDiffusion
from sd_train.families.text import ChunkTokenizer, TextOptions
from sd_train.families.tokenizer import END_ID, START_ID, load_clip_tokenizer
from sd_train.families.weighting import Piece, split_weights
from tests.models import fresh_tiny, reference_pipeline

LONG = ", ".join(f"a photo of {thing} number {n}" for n in range(6) for thing in ("a cat", "a rocket", "two cups"))
HUGE = " ".join(f"word{n}" for n in range(150))
END, BANG = "<|endoftext|>", "!"

# Weights (expected by the rules that A1111's wiki gives under "Attention/emphasis")


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("plain text", [("plain text", 1.0)]),
        ("", []),
        ("a (cat) here", [("a ", 1.0), ("cat", 1.1), (" here", 1.0)]),
        ("((cat))", [("cat", 1.21)]),
        ("[cat]", [("cat", 1 / 1.1)]),
        ("([cat])", [("cat", 1.0)]),
        ("(cat:1.5), (dog: 0.5 )", [("cat", 1.5), (", ", 1.0), ("dog", 0.5)]),
        ("(a (b:2) c:3)", [("a ", 3.0), ("b", 6.0), (" c", 3.0)]),
        (r"a \(cat\) \[dog\] \\ \x", [(r"a (cat) [dog] \ x", 1.0)]),
        ("(open", [("open", 1.1)]),
        ("[open", [("open", 1 / 1.1)]),
        ("closed) here]", [("closed) here]", 1.0)]),
        ("a:1.2) b", [("a:1.2) b", 1.0)]),
        ("(12:30)", [("12", 30.0)]),
        ("(a:b:1.2)", [("a:b", 1.2)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("(a:-1)", [("a", -1.0)]),
        ("(a:.5)", [("a", 0.5)]),
        ("[a:0.5]", [("a:0.5", 1 / 1.1)]),
        ("(a)(b)", [("ab", 1.1)]),
        ("(two\nlines:1.2)", [("two\nlines", 1.2)]),
    ],
)
def test_brackets_weigh(text: str, pieces: list[tuple[str, float]]) -> None:
    found = split_weights(text)
    assert [piece.text for piece in found] == [piece for piece, _ in pieces]
    assert [piece.weight for piece in found] == pytest.approx([weight for _, weight in pieces])


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab ()[]:\\1.2-", max_size=30))
def test_every_text_has_pieces_and_escaped_ones_keep_their_words(text: str) -> None:
    pieces = split_weights(text)
    assert all(piece.text for piece in pieces)
    assert "".join(piece.text for piece in pieces).count("a") == text.count("a")
    escaped = "".join(f"\\{sign}" if sign in "()[]\\" else sign for sign in text)
    assert split_weights(escaped) == ([Piece(text, 1.0)] if text else [])


# Tokens


TOKENIZERS: dict[str, Any] = {pad: load_clip_tokenizer(pad) for pad in (END, BANG)}


def expected_ids(caption: str, chunks: int, pad: str) -> list[list[int]]:
    """sd-scripts' rule, computed from one long row: cut, close full chunks, open empty ones."""
    tokenizer = TOKENIZERS[pad]
    size = chunks * 75
    row = tokenizer(caption, padding="max_length", truncation=True, max_length=size + 2)["input_ids"]
    found = []
    for start in range(1, size, 75):
        chunk = [row[0], *row[start : start + 75], row[-1]]
        if pad != END:
            if chunk[-2] not in (END_ID, tokenizer.pad_token_id):
                chunk[-1] = END_ID
            if chunk[1] == tokenizer.pad_token_id:
                chunk[1] = END_ID
        found.append(chunk)
    return found


@pytest.mark.parametrize("pad", [END, BANG])
@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_chunks_are_sd_scripts(chunks: int, pad: str) -> None:
    tokenizer = ChunkTokenizer(TOKENIZERS[pad])
    for length in (0, 1, 74, 75, 76, 149, 150, 151, 224, 225, 400):
        caption = " ".join(["cat"] * length)
        tokens = tokenizer([caption], chunks)
        assert tokens.ids.shape == tokens.weights.shape == (1, chunks, 77)
        assert tokens.ids[0].tolist() == expected_ids(caption, chunks, pad)
        assert bool((tokens.weights == 1).all())
        assert tokenizer.length(caption) == length
        assert tokenizer.chunks_for([caption, "x"], limit=3) == max(1, min(3, -(-length // 75)))


def test_weights_stand_beside_their_tokens() -> None:
    tokenizer = ChunkTokenizer(load_clip_tokenizer())
    caption = "a (cat:2) and [dog] \\(really\\)"
    tokens = tokenizer([caption], 1, weighted=True)
    plain = tokenizer(["a cat and dog (really)"], 1)
    assert torch.equal(tokens.ids, plain.ids)
    assert tokens.weights[0, 0, :6].tolist() == pytest.approx([1, 1, 2, 1, 1 / 1.1, 1])
    # Without weighting, brackets are text.
    assert tokenizer.length(caption) > tokenizer.length(caption, weighted=True) == 7
    long = tokenizer([" ".join(["(cat:2)"] * 80)], 2, weighted=True)
    assert long.weights[0, 0].tolist() == [1, *[2] * 75, 1]
    assert long.weights[0, 1].tolist() == [1, *[2] * 5, *[1] * 71]
    assert long.ids[0, :, 0].tolist() == [START_ID, START_ID]


# States

KINDS: tuple[TinyKind, ...] = ("sd1", "sd2", "sdxl", "refiner")


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest) -> tuple[TinyKind, LatentDiffusion, Any]:
    return request.param, fresh_tiny(request.param), reference_pipeline(request.param)


@pytest.fixture
def restored(pair: tuple[TinyKind, LatentDiffusion, Any]) -> Iterator[tuple[TinyKind, LatentDiffusion, Any]]:
    yield pair
    pair[1].configure(TextOptions())


def reference_states(kind: TinyKind, pipeline: Any, caption: str, chunks: int, layer: int) -> tuple[Tensor, Tensor]:
    """States and pooled states (empty of Stable Diffusion) from transformers' own modules, a chunk at a time."""
    states, pooled = [], torch.empty(0)
    encoders = [(pipeline.text_encoder, pipeline.tokenizer, "")] if pipeline.text_encoder is not None else []
    if kind in ("sdxl", "refiner"):
        encoders.append((pipeline.text_encoder_2, pipeline.tokenizer_2, "second"))
    for encoder, tokenizer, second in encoders:
        pad = BANG if tokenizer.pad_token_id == 0 else END
        parts: list[Tensor] = []
        for place, chunk in enumerate(expected_ids(caption, chunks, pad)):
            output = encoder(torch.tensor([chunk]), output_hidden_states=True)
            hidden = output.hidden_states[-layer]
            if kind in ("sd1", "sd2"):
                hidden = encoder.text_model.final_layer_norm(hidden)
            parts.append(hidden[:, 0 if place == 0 else 1 : 77 if place == chunks - 1 else 76])
            if second and place == 0:
                pooled = output.text_embeds
        states.append(torch.cat(parts, dim=1))
    return torch.cat(states, dim=-1), pooled


@pytest.mark.parametrize(("clip_skip", "tokens"), [(None, None), (1, 75), (2, 150), (None, 225)])
@pytest.mark.parametrize("caption", ["", "a cat!", LONG, HUGE], ids=["empty", "short", "long", "huge"])
def test_states_are_those_of_separate_chunks(
    caption: str, clip_skip: int | None, tokens: int | None, restored: tuple[TinyKind, LatentDiffusion, Any]
) -> None:
    kind, family, pipeline = restored
    family.configure(TextOptions(clip_skip, tokens))
    xl = kind in ("sdxl", "refiner")
    layer = max(clip_skip or 2, 2) if xl else clip_skip or 1
    chunks = (tokens or 75) // 75
    with torch.no_grad():
        rows = family.encode_texts([caption, "other"])
        states, pooled = reference_states(kind, pipeline, caption, chunks, layer)
    assert rows["states"].shape[1] == chunks * 75 + 2
    torch.testing.assert_close(rows["states"][:1], states, atol=1e-5, rtol=0)
    assert set(rows) == ({"states", "pooled"} if xl else {"states"})
    if xl:
        torch.testing.assert_close(rows["pooled"][:1], pooled, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tokens", [75, 150])
def test_weights_multiply_states(tokens: int, restored: tuple[TinyKind, LatentDiffusion, Any]) -> None:
    _, family, _ = restored
    family.configure(TextOptions(None, tokens))
    with torch.no_grad():
        plain = family.encode_texts(["a cat here"])
        family.configure(TextOptions(None, tokens, weighted_captions=True))
        weighted = family.encode_texts(["a (cat:1.5) here"])
        unweighted = family.encode_texts(["a cat here"])
    scale = torch.ones(1, tokens + 2, 1)
    scale[:, 2] = 1.5
    torch.testing.assert_close(weighted["states"], plain["states"] * scale, atol=1e-6, rtol=0)
    assert torch.equal(unweighted["states"], plain["states"])
    if "pooled" in plain:
        assert torch.equal(weighted["pooled"], plain["pooled"])


def test_prompts_weigh_too_and_keep_their_mean(restored: tuple[TinyKind, LatentDiffusion, Any]) -> None:
    _, family, _ = restored
    with torch.no_grad():
        plain = family.prompt_arguments("a cat here", "", 64, 64)["prompt_embeds"]
        weighted = family.prompt_arguments("a (cat:1.5) here", "", 64, 64)["prompt_embeds"]
        escaped = family.prompt_arguments(r"a \(cat\)", "", 64, 64)["prompt_embeds"]
        literal = family.encode_texts(["a (cat)"])["states"]
    first = family.text_encoders[next(iter(family.text_encoders))].network.config.hidden_size
    part, before = weighted[..., :first], plain[..., :first]
    ratio = part[:, 5:] / before[:, 5:]
    torch.testing.assert_close(ratio, ratio[:, :1, :1].expand_as(ratio), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(part[:, 2] / ratio[:, 0], before[:, 2] * 1.5, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(part.mean(), before.mean(), atol=1e-5, rtol=1e-4)
    assert torch.equal(escaped, literal)


def test_prompts_take_the_chunks_of_the_longer_prompt(restored: tuple[TinyKind, LatentDiffusion, Any]) -> None:
    _, family, _ = restored
    with torch.no_grad():
        arguments = family.prompt_arguments(HUGE, "ugly", 64, 64)
        short = family.prompt_arguments("a cat", "", 64, 64)
        assert torch.equal(short["prompt_embeds"], family.encode_texts(["a cat"])["states"])
        assert torch.equal(short["negative_prompt_embeds"], family.encode_texts([""])["states"])
        family.configure(TextOptions(None, 150))
        trained = family.prompt_arguments("a cat", "", 64, 64)
    assert arguments["prompt_embeds"].shape[1] == arguments["negative_prompt_embeds"].shape[1] == 227
    assert short["prompt_embeds"].shape[1] == 77
    assert trained["prompt_embeds"].shape[1] == 152


def test_more_layers_than_there_are_cannot_be_skipped(restored: tuple[TinyKind, LatentDiffusion, Any]) -> None:
    kind, family, _ = restored
    layers = 2 if kind == "sd1" else 3
    with pytest.raises(ModelError, match=rf"--clip_skip = 4: the .*text encoder has {layers} layers"):
        family.configure(TextOptions(4))
    family.configure(TextOptions(layers))


def test_every_option_changes_the_digest(restored: tuple[TinyKind, LatentDiffusion, Any]) -> None:
    _, family, _ = restored
    layers = min(encoder.layers for encoder in family.text_encoders.values())
    options = (
        TextOptions(), TextOptions(max_token_length=150), TextOptions(weighted_captions=True),
        TextOptions(clip_skip=layers),
    )  # fmt: skip
    digests = []
    for each in (*options, TextOptions()):
        family.configure(each)
        digests.append(family.encoder_digest("texts"))
    assert len(set(digests)) == 4
    assert digests[0] == digests[4]


def test_states_whose_mean_is_rounding_keep_their_weights() -> None:
    """A layer norm that nothing has trained leaves no mean, and a ratio of two roundings would be anything."""
    from sd_train.families.text import _weighted

    states = torch.nn.functional.layer_norm(torch.randn(1, 77, 64), (64,))
    weights = torch.ones(1, 77, 1)
    weights[:, 3] = 1.5
    assert torch.equal(_weighted(states, weights, "mean"), states * weights)
    shifted = states + 0.1
    kept = _weighted(shifted, weights, "mean")
    torch.testing.assert_close(kept.mean(), shifted.mean())
