"""What `train_textual_inversion` can know of its word before the model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sd_train.config.options import RunConfig
from sd_train.data.captions import caption_variants
from sd_train.data.index import ImageIndex
from sd_train.data.settings import SubsetConfig
from sd_train.data.subset import first_names
from sd_train.data.words import Words, object_sentences, style_sentences
from sd_train.errors import ConfigError, DataError, ModelError, Problem
from sd_train.families.block_states import state_blocks
from sd_train.families.embeddings import read_embedding
from sd_train.families.parts import ModelKind
from sd_train.families.text import CHUNK, ChunkTokenizer
from sd_train.families.tokenizer import clip_tokenizer, clip_vocabulary
from sd_train.prompts import Prompt

_SHOWN = 6
"""Names of images that a message is given; it shows fewer."""
_OF_CAPTIONS = (
    "caption_prefix", "caption_suffix", "caption_separator", "enable_wildcard", "shuffle_caption", "keep_tokens",
    "keep_tokens_separator", "secondary_separator", "token_warmup_step",
)  # fmt: skip
"""Keys of a subset that say what becomes of its captions."""
_TRIED = 8
"""Versions of each caption that are drawn to see whether they keep the word."""


def templates_of(config: RunConfig) -> tuple[str, ...]:
    """The sentences that take the captions' place; those about an object where both are asked for, as in sd-scripts."""
    chosen = config.embedding
    if chosen.token_string is None or not (chosen.use_object_template or chosen.use_style_template):
        return ()
    return (object_sentences if chosen.use_object_template else style_sentences)(chosen.token_string)


def check_word(config: RunConfig) -> None:
    """Whether the word is new to CLIP and its vectors have something to start from.

    Raises:
        ConfigError: with what is wrong with the words.
        ModelError: if the file to start from does not fit the options.
    """
    chosen = config.embedding
    if chosen.token_string is None:
        return
    problems = []
    # Words that are in it only as the end of one, such as sks, other programs take for new ones.
    if chosen.token_string.lower() in clip_vocabulary().ids:
        rule = "stands in CLIP's vocabulary, where sd-scripts and diffusers refuse it"
        way_out = f"choose a word that it does not know, such as {chosen.token_string}-1"
        problems.append(str(Problem("--token_string", repr(chosen.token_string), rule, way_out)))
    if chosen.init_word is not None and not _tokens(chosen.init_word):
        way_out = "give a word that is near to what is taught, or leave it out"
        problems.append(str(Problem("--init_word", repr(chosen.init_word), "holds no token", way_out)))
    if problems:
        raise ConfigError(*problems)
    if chosen.weights is not None and config.saving.resume is None:
        _check_weights(config)


def _tokens(text: str) -> list[int]:
    found: list[int] = clip_tokenizer()(text, add_special_tokens=False, verbose=False)["input_ids"]
    return found


def _check_weights(config: RunConfig) -> None:
    chosen = config.embedding
    assert chosen.weights is not None
    try:
        start = read_embedding(chosen.weights)
    except ModelError as problem:
        raise ModelError(*(f"--weights = {text}" for text in problem.problems)) from None
    if start.blocks and not chosen.xti:
        raise ModelError(
            f"--weights = {chosen.weights}: holds extended textual inversion (XTI), other vectors for each block of "
            "the U-Net; give --xti"
        )
    if start.count != chosen.num_vectors_per_token:
        raise ModelError(
            f"--weights = {chosen.weights}: has {start.count} vectors, and --num_vectors_per_token is "
            f"{chosen.num_vectors_per_token}; give --num_vectors_per_token {start.count}"
        )


def word_numbers(config: RunConfig, kind: ModelKind) -> int:
    """How many numbers the word is made of in a model of `kind`."""
    widths = sum(int(part["hidden_size"]) for role, part in kind.configs.items() if role.startswith("text_encoder"))
    blocks = len(state_blocks(kind.configs["unet"])) if config.embedding.xti else 1
    return config.embedding.num_vectors_per_token * widths * blocks


def check_captions_hold_word(config: RunConfig, indexes: Sequence[ImageIndex]) -> None:
    """Nothing is learned from a caption without the word.

    Raises:
        DataError: with every subset that has such captions, and the first of them.
    """
    word = config.embedding.token_string
    if word is None:
        return
    words, problems = Words({word: ()}), []
    for index, number, subset in _learned(indexes):
        if subset.templates or words.used(f"{subset.caption_prefix or ''} {subset.caption_suffix or ''}"):
            continue
        rows = (index.subset_of == number).nonzero()[0].tolist()
        lacking = [row for row in rows if not all(map(words.used, _lines(index.captions[row], subset)))]
        if lacking:
            names = first_names([index.keys[row] for row in lacking[:_SHOWN]], count=len(lacking))
            lack = f"{len(lacking)} of {len(rows)} captions lack the word {word!r}"
            rule = f"{lack}, which learns nothing from them: {names}"
            way_out = (
                f"write the word into the captions or class_tokens, or give caption_prefix = {word!r}, or "
                "--use_object_template or --use_style_template in place of captions"
            )
            problems.append(str(Problem(subset.origin, None, rule, way_out)))
    if problems:
        raise DataError(*problems)


def _learned(indexes: Sequence[ImageIndex]) -> Iterable[tuple[ImageIndex, int, SubsetConfig]]:
    """The subsets that are no regularisation images, with their indexes and numbers."""
    for index in indexes:
        for number, subset in enumerate(index.dataset.subsets):
            if not subset.is_reg:
                yield index, number, subset


def _lines(caption: str, subset: SubsetConfig) -> list[str]:
    lines = caption.split("\n")
    return lines if subset.enable_wildcard else lines[:1]


def word_warnings(
    config: RunConfig, indexes: Sequence[ImageIndex], prompts: Sequence[Prompt], updates: int
) -> list[str]:
    """What is allowed and probably not meant, in a training of so many `updates`."""
    chosen, word = config.embedding, config.embedding.token_string
    if word is None:
        return []
    warnings = []
    if len(_tokens(word)) == 1:
        warnings.append(f"--token_string = {word!r}: CLIP knows this word; texts lose what it means there")
    if chosen.init_word is not None and chosen.weights is None:
        found, wanted = len(_tokens(chosen.init_word)), chosen.num_vectors_per_token
        if found != wanted:
            rest = "they take turns" if found < wanted else f"only the first {wanted} of them start one"
            rule = f"is {found} token{'s' * (found > 1)}, and --num_vectors_per_token is {wanted}: {rest}"
            warnings.append(f"--init_word = {chosen.init_word!r}: {rule}")
    tokenizer = ChunkTokenizer(clip_tokenizer(), Words({word: range(chosen.num_vectors_per_token)}))
    for index, number, subset in _learned(indexes):
        idle = [name for name in _OF_CAPTIONS if getattr(subset, name) != getattr(SubsetConfig, name)]
        if subset.templates and idle:
            have = "have" if len(idle) > 1 else "has"
            warnings.append(f"{subset.origin}: {', '.join(idle)} {have} no effect: sentences take the captions' place")
        warnings += _lost_at_times(config, tokenizer, index, number, updates)
    if any(subset.is_reg for index in indexes for subset in index.dataset.subsets):
        warnings.append("regularisation images teach nothing here: a new word has no part in their captions")
    words = tokenizer.words
    if prompts and not any(words.used(prompt.text) or words.used(prompt.negative) for prompt in prompts):
        warnings.append(f"--sample_prompts: none of the prompts holds the word {word!r}: the pictures will not change")
    return warnings


def _lost_at_times(
    config: RunConfig, tokenizer: ChunkTokenizer, index: ImageIndex, number: int, updates: int
) -> list[str]:
    """Options that leave the word, or some of its vectors, out of samples of subset `number`."""
    subset, word = index.dataset.subsets[number], config.embedding.token_string
    rows = (index.subset_of == number).nonzero()[0].tolist()
    left_out, cut_off = [], []
    # The sentences are the same for all images.
    for row in rows[:1] if subset.templates else rows:
        texts = caption_variants(index.record(row), config.training.seed or 0, _TRIED, updates)
        if not all(map(tokenizer.words.used, texts)):
            left_out.append(index.keys[row])
        elif any(_cut_off(config, tokenizer, text) for text in texts):
            cut_off.append(index.keys[row])
    warnings = []
    if left_out:
        options = {
            "token_warmup_step": subset.token_warmup_step > 0,
            "enable_wildcard": subset.enable_wildcard,
            "shuffle_caption": subset.shuffle_caption,
        }
        given = " and ".join(name for name, is_given in options.items() if is_given) or "the separators"
        warnings.append(
            f"{subset.origin}: {given} may leave the word {word!r} out of {len(left_out)} of {len(rows)} captions: "
            f"{first_names(left_out)}; put it in front, outside of braces, and write keep_tokens = 1"
        )
    if cut_off:
        where = "sentences" if subset.templates else f"{len(cut_off)} of {len(rows)} captions"
        names = "" if subset.templates else f": {first_names(cut_off)}"
        limit = config.model.max_token_length or CHUNK
        longer = f", give --max_token_length {limit + CHUNK}" if limit < 3 * CHUNK else ""
        warnings.append(
            f"{subset.origin}: {where} are longer than {limit} tokens, and what is cut off has vectors of the word "
            f"{word!r}{names}; put it in front{longer}, or give it fewer vectors"
        )
    return warnings


def _cut_off(config: RunConfig, tokenizer: ChunkTokenizer, text: str) -> bool:
    """Whether a part of the word lies behind the last token of `text` that is read."""
    vectors, limit = config.embedding.num_vectors_per_token, config.model.max_token_length or CHUNK
    # A byte is a token at most.
    if len(text.encode()) + vectors * len(tokenizer.words.used(text)) <= limit:
        return False
    ids = tokenizer([text], limit // CHUNK, config.model.weighted_captions).ids
    return int((ids >= tokenizer.first_new).sum()) < vectors
