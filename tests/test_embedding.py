"""Words of new tokens: where they stand in texts, which rows they read, what each block sees, how files hold them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd_train.build import _for_optimizer
from sd_train.data.captions import caption_variants, needs_variants, sample_caption
from sd_train.data.record import ImageRecord
from sd_train.data.settings import SubsetConfig
from sd_train.data.words import Words, object_sentences, style_sentences
from sd_train.demo.tiny_model import TinyKind
from sd_train.families.block_states import state_blocks
from sd_train.families.embeddings import Embedding, install_embeddings, read_embedding, read_embeddings
from sd_train.families.latent import LatentDiffusion
from sd_train.families.published import published_config
from sd_train.families.text import ChunkTokenizer, TextOptions
from sd_train.families.tokenizer import load_clip_tokenizer
from sd_train.optim.optimizers import OPTIMIZERS, make_optimizer
from sd_train.trainables.base import ParamGroup
from sd_train.trainables.embedding import EmbeddingSettings, TextualInversion
from sd_train.types import Conditioning
from tests.models import DATA, fresh_tiny

GOLDEN = DATA / "embeddings"
SIXTEEN = "IN01 IN02 IN04 IN05 IN07 IN08 MID OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11".split()


def taught(family: LatentDiffusion, **more: Any) -> TextualInversion:
    """The word `mytok` in `family`."""
    rates = dict.fromkeys(family.text_encoders, 0.1)
    settings: dict[str, Any] = {"word": "mytok", "count": 2, "rates": rates, "seed": 3, **more}
    trainable = TextualInversion(EmbeddingSettings(**settings))
    trainable.install(family)
    return trainable


def test_sentences_take_the_place_of_captions() -> None:
    assert (len(object_sentences("x")), len(style_sentences("x")), len(set(style_sentences("x")))) == (27, 19, 17)
    assert "a close-up photo of the my {tok}" in object_sentences("my {tok}")
    subset = SubsetConfig(Path("a"), templates=object_sentences("mytok"), shuffle_caption=True, caption_prefix="b")
    record = ImageRecord(Path("a/1.png"), "1.png", subset, (64, 64), (64, 64), (64, 64), "cat, mat", 1.0, False)
    drawn = [sample_caption(record, 5, epoch, repeat, 0, 9) for epoch in range(9) for repeat in range(40)]
    assert set(drawn) == set(subset.templates)
    assert drawn == [sample_caption(record, 5, epoch, repeat, 7, 9) for epoch in range(9) for repeat in range(40)]
    assert drawn != [sample_caption(record, 6, epoch, repeat, 0, 9) for epoch in range(9) for repeat in range(40)]
    assert sorted(caption_variants(record, 5, 4, 9)) == sorted(subset.templates)
    assert needs_variants(subset) is not None


def test_words_are_found_before_weights_and_counted() -> None:
    family = fresh_tiny()
    encoder = family.text_encoders["text_encoder"]
    plain = encoder.tokenizer(["a catalog (of: cats)"], 1, True)
    taught(family, word="cat (new)", count=3)
    tokenizer, first = encoder.tokenizer, encoder.tokenizer.first_new
    assert first == 49408
    ids, weights, weighted = tokenizer(["a (CAT (new):1.5) b"], 1, True)
    assert weighted
    assert ids[0, 0, 2:5].tolist() == [first, first + 1, first + 2]
    assert weights[0, 0, 1:6].tolist() == [1, 1.5, 1.5, 1.5, 1]
    again = tokenizer(["a catalog (of: cats)"], 1, True)
    assert again.ids.equal(plain.ids)
    assert again.weights.equal(plain.weights)
    assert (tokenizer.length("cat (new)"), tokenizer.length("cat (newer)")) == (3, tokenizer.length("CAT ( newer)"))
    assert tokenizer.chunks_for([" cat (new)" * 26], 3) == 2
    # The characters that stand for words inside are never taken from a text.
    assert tokenizer(["a \U000f0000b"], 1).ids.equal(tokenizer(["a b"], 1).ids)


@pytest.mark.parametrize(
    ("word", "found", "not_found"),
    [
        ("<cat-toy>", ["a (<CAT-toy>:1.2)"], ["cat-toy", "<cat-toy>s"]),
        ("my_tok", ["my_tok's"], ["my_tok_2", "my tok"]),
        # One letter or a letter and its accent: macOS names folders so.
        ("na\N{LATIN SMALL LETTER I WITH DIAERESIS}ve", ["a nai\N{COMBINING DIAERESIS}ve cat", "NAÏVE"], ["naive"]),
        ("nai\N{COMBINING DIAERESIS}ve", ["a na\N{LATIN SMALL LETTER I WITH DIAERESIS}ve cat"], ["naive"]),
        # Chinese and Japanese have no blanks.
        ("小黄", ["一张小黄的照片", "小黄"], ["小 黄", "大黄"]),
        ("shs", ["一张shs的照片"], ["shs1", "ashs", "shsé"]),
    ],
)
def test_where_a_word_ends(word: str, found: list[str], not_found: list[str]) -> None:
    known = Words({word: [0]})
    tokenizer = ChunkTokenizer(load_clip_tokenizer(), known)
    for text in found:
        assert known.used(text) == [word], text
        assert tokenizer.first_new in tokenizer([text], 1).ids, text
    for text in not_found:
        assert known.used(text) == [], text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_beside_the_table(dtype: torch.dtype) -> None:
    family = fresh_tiny("sdxl").to(torch.device("cpu"), dtype)
    table: Any = family.text_encoders["text_encoder"].network.get_input_embeddings()
    before, names = table.weight.detach().clone(), list(family.networks["text_encoder"].state_dict())
    trainable = taught(family)
    rows = trainable.tensors()
    assert {name: (tuple(t.shape), t.dtype) for name, t in rows.items()} == {
        "clip_l": ((2, 64), torch.float32), "clip_g": ((2, 32), torch.float32)
    }  # fmt: skip
    found = table(torch.tensor([[5, 49408, 49409, 7]]))
    assert found.dtype == dtype
    assert torch.equal(found[0, 1:3], rows["clip_l"].to(dtype))
    assert torch.equal(found[0, ::3], before[[5, 7]])
    assert list(family.networks["text_encoder"].state_dict()) == names
    # A batch without the word gives a gradient of zero, not none: all ranks add up the same.
    states = family.encode_texts(["a cat"])
    (states["states"].square().mean() + states["pooled"].square().mean()).backward()
    parameters = [p for group in trainable.groups() for p in group.params.values()]
    assert all(p.grad is not None and not p.grad.any() for p in parameters)
    family.encode_texts(["mytok"])["states"].square().mean().backward()
    assert all(p.grad is not None and p.grad.any(dim=1).all() for p in parameters)


def test_names_of_blocks() -> None:
    assert list(state_blocks(published_config("unet", "sd1"))) == SIXTEEN
    assert list(state_blocks(published_config("unet", "sd2"))) == SIXTEEN
    eleven = "IN04 IN05 IN07 IN08 MID OUT00 OUT01 OUT02 OUT03 OUT04 OUT05"
    assert list(state_blocks(published_config("unet", "sdxl"))) == eleven.split()
    assert state_blocks(published_config("unet", "sdxl"))["OUT03"] == "up_blocks.1.attentions.0"


class Substitute:
    """diffusers' attention, which is told its own block's text whatever it is given."""

    def __init__(self, states: Tensor) -> None:
        from diffusers.models.attention_processor import AttnProcessor

        self.states, self.inner = states, AttnProcessor()

    def __call__(self, attention: Any, hidden: Tensor, encoder_hidden_states: Tensor | None = None, **more: Any) -> Any:
        return self.inner(attention, hidden, encoder_hidden_states=self.states, **more)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_each_block_sees_its_own_states(kind: TinyKind) -> None:
    family, plain = fresh_tiny(kind), fresh_tiny(kind)
    count = 16 if kind == "sd1" else 11
    trainable = taught(family, extended=True)
    generator = torch.Generator().manual_seed(1)
    trainable.load({name: torch.randn(rows.shape, generator=generator) for name, rows in trainable.tensors().items()})
    texts = ["a photo of mytok", "mytok"]
    with torch.no_grad():
        rows = family.encode_texts(texts)
        assert rows["states"].shape[:2] == (2, count * 77)
        each = rows["states"].unflatten(1, (count, 77))
        # What the text encoders make of each block's vectors as a word of their own.
        pooled = []
        alone = fresh_tiny(kind)
        word = taught(alone)
        for place in range(count):
            word.load({name: table.unflatten(0, (count, 2))[place] for name, table in trainable.tensors().items()})
            own = alone.encode_texts(texts)
            assert float((own["states"] - each[:, place]).abs().max()) < 1e-5
            pooled.append(own.get("pooled", torch.zeros(2, 1)))
        assert float((rows.get("pooled", torch.zeros(2, 1)) - torch.stack(pooled).mean(dim=0)).abs().max()) < 1e-5
        unet: Any = plain.networks["unet"]
        paths = list(state_blocks(unet.config).values())
        processors = dict(unet.attn_processors)
        for name in processors:
            if ".attn2." in name:
                place = next(place for place, path in enumerate(paths) if name.startswith(f"{path}."))
                processors[name] = Substitute(each[:, place])
        unet.set_attn_processor(processors)
        noisy, times = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([10, 900])
        extra = {"time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)}
        told = Conditioning(rows["states"], rows.get("pooled"), extra)
        expected = plain.predict(noisy, times, Conditioning(each[:, 0] * 0, rows.get("pooled"), extra))
        assert float((family.predict(noisy, times, told) - expected).abs().max()) < 1e-5
        one = fresh_tiny(kind).predict(noisy, times, Conditioning(each[:, 0], rows.get("pooled"), extra))
        assert float((one - expected).abs().max()) > 1e-4


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_equal_vectors_for_all_blocks_are_one_word(kind: TinyKind) -> None:
    one, all_blocks = fresh_tiny(kind), fresh_tiny(kind)
    for family in (one, all_blocks):
        family.configure(TextOptions(max_token_length=150, weighted_captions=True))
    first = taught(one, init_word="cat mat")
    second = taught(all_blocks, init_word="cat mat", extended=True)
    blocks = len(second.blocks)
    for name, table in first.tensors().items():
        assert torch.equal(table.repeat(blocks, 1), second.tensors()[name])
    text = "a (mytok:1.3) on a mat" + ", mat" * 80
    told = [family.prompt_arguments(text, "b", 64, 64) for family in (one, all_blocks)]
    noisy, times = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([500])
    predicted = []
    for family, arguments in zip((one, all_blocks), told, strict=True):
        extra = {"time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
        told_of = Conditioning(arguments["prompt_embeds"], arguments.get("pooled_prompt_embeds"), extra)
        with torch.no_grad():
            predicted.append(family.predict(noisy, times, told_of))
    assert told[1]["prompt_embeds"].shape[1] == blocks * told[0]["prompt_embeds"].shape[1]
    assert float((predicted[0] - predicted[1]).abs().max()) < 1e-5


def test_a_word_for_all_blocks_beside_an_extended_one(tmp_path: Path) -> None:
    family = fresh_tiny()
    generator = torch.Generator().manual_seed(2)
    save_file({name: torch.randn(2, 64, generator=generator) for name in SIXTEEN}, tmp_path / "wide.safetensors")
    save_file({"emb_params": torch.randn(3, 64, generator=generator)}, tmp_path / "plain.safetensors")
    files = read_embeddings([tmp_path / "plain.safetensors", tmp_path / "wide.safetensors"])
    install_embeddings(files, family)
    new = family.text_encoders["text_encoder"].new
    assert new is not None
    rows = new.rows.detach().unflatten(0, (16, 5))
    assert torch.equal(rows[:, :3], files[0].vectors[""].expand(16, -1, -1))
    assert torch.equal(rows[:, 3:].flatten(0, 1), files[1].vectors[""])
    with torch.no_grad():
        assert family.encode_texts(["wide and plain"])["states"].shape == (1, 16 * 77, 64)


def test_texts_that_come_to_the_same_are_read_once() -> None:
    family = fresh_tiny("sdxl")
    family.configure(TextOptions(max_token_length=150))
    rows = taught(family, extended=True).groups()
    texts = ["a photo of mytok", "a mat", "a photo of mytok", "mytok" + ", mat" * 60]
    sizes: list[int] = []
    network: Any = family.text_encoders["text_encoder"].network
    network.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    together = family.encode_texts(texts)
    # Two texts with the word, whatever the block a mat, the end of the long text, and empty second chunks.
    assert sizes == [2 * 11 + 3]
    weight = torch.linspace(-1, 1, together["states"].numel()).view_as(together["states"])
    ((together["states"] * weight).sum() + together["pooled"].square().sum()).backward()
    parameters = [parameter for group in rows for parameter in group.params.values()]
    found = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    for place, text in enumerate(texts):
        alone = family.encode_texts([text])
        for name, each in alone.items():
            assert float((each[0] - together[name][place]).detach().abs().max()) < 1e-5
        ((alone["states"][0] * weight[place]).sum() + alone["pooled"].square().sum()).backward()
    for parameter, gradient in zip(parameters, found, strict=True):
        assert parameter.grad is not None
        assert gradient is not None
        assert float((parameter.grad - gradient).abs().max()) < 1e-4 * float(gradient.abs().max())


def test_where_vectors_start() -> None:
    family = fresh_tiny()
    encoder = family.text_encoders["text_encoder"]
    network: Any = encoder.network
    table = network.get_input_embeddings().weight.detach()
    cat, mat = encoder.tokenizer(["cat mat"], 1).ids[0, 0, 1:3].tolist()
    rows = taught(family, init_word="cat mat", count=3).tensors()["emb_params"]
    assert torch.equal(rows, table[[cat, mat, cat]])
    rows = taught(fresh_tiny(), init_word="cat mat", count=1, extended=True).tensors()["emb_params"]
    assert torch.equal(rows, table[[cat] * 16])
    first, again, other = (taught(fresh_tiny(), count=50, seed=seed).tensors()["emb_params"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert float(first.std()) == pytest.approx(float(table.std()), rel=0.05)
    start = Embedding(Path("a.pt"), ("a",), {"": torch.ones(2, 64)})
    assert torch.equal(taught(fresh_tiny(), start=start, extended=True).tensors()["emb_params"], torch.ones(32, 64))


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.iterdir()))
def test_files_are_those_of_sd_scripts(name: str, tmp_path: Path) -> None:
    """Read from sd-scripts' own file and written again: the same names, shapes, dtypes and numbers."""
    read = read_embedding(GOLDEN / name)
    keys = {"": "emb_params", "text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    precision = torch.float16 if "fp16" in name else None
    trainable = TextualInversion(EmbeddingSettings("mytok", read.count, {}, 0, precision=precision))
    trainable.blocks = read.blocks
    trainable.save(tmp_path / name, {"a": "b"}, {keys[role]: table for role, table in read.vectors.items()})
    load: Callable[[Path], dict[str, Tensor]] = load_file
    if name.endswith(".pt"):
        load = lambda path: torch.load(path, weights_only=True)  # noqa: E731
    theirs, ours = load(GOLDEN / name), load(tmp_path / name)
    assert type(ours) is dict
    assert sorted(ours) == sorted(theirs)
    assert all(table.dtype == ours[key].dtype and torch.equal(table, ours[key]) for key, table in theirs.items())
    if "xti" in name:
        assert list(read.blocks) == sorted(theirs) == SIXTEEN
        # From the README of the file: the first and the seventh block.
        assert float(theirs["IN01"][0, 0]) == 0.00795745849609375
        assert float(read.vectors[""][12, 0]) == 0.0626220703125


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_no_weight_decays(name: str) -> None:
    spec = OPTIMIZERS[name]
    if name == "dadaptsgd":
        pytest.skip("divides by the norm of the first gradients, which are zero here")
    given: dict[str, Any] = {"weight_decay": 0.5} if name in ("adamw", "lion", "prodigy") else {}
    rows = torch.nn.Parameter(torch.ones(2, 8))
    group = ParamGroup("textencoder", {"emb_params": rows}, 0.1, weight_decay=0.0)
    other = torch.nn.Parameter(torch.ones(2, 8))
    decays = ParamGroup("other", {"other": other}, 0.1)
    optimizer: Any = make_optimizer(spec.name, [_for_optimizer(group), _for_optimizer(decays)], given)
    getattr(optimizer, "train", lambda: None)()
    for _ in range(2):
        rows.grad, other.grad = torch.zeros_like(rows), torch.zeros_like(other)
        optimizer.step()
    assert torch.equal(rows.detach(), torch.ones(2, 8))
    if given and name != "prodigy":
        assert float(other.detach().max()) < 1
