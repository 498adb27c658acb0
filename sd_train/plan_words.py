"""What `train_textual_inversion` can know of its word before the model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sd_train.config.options import RunConfig
from sd_train.data.index import ImageIndex
from sd_train.data.settings import SubsetConfig
from sd_train.data.subset import first_names
from sd_train.data.words import object_sentences, style_sentences, word_pattern
from sd_train.errors import ConfigError, DataError, ModelError, Problem
from sd_train.families.block_states import state_blocks
from sd_train.families.embeddings import read_embedding
from sd_train.families.parts import ModelKind
from sd_train.families.tokenizer import load_clip_tokenizer
from sd_train.prompts import Prompt

_SHOWN = 6
"""Names of images that a message is given; it shows fewer."""


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
    if len(_tokens(chosen.token_string)) == 1:
        rule = "is one token of CLIP's vocabulary, and every caption with it would have another meaning"
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
    found: list[int] = load_clip_tokenizer()(text, add_special_tokens=False, verbose=False)["input_ids"]
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
    pattern, problems = word_pattern([word]), []
    for index, number, subset in _learned(indexes):
        if subset.templates or pattern.search(_around(subset)):
            continue
        rows = (index.subset_of == number).nonzero()[0].tolist()
        lacking = [row for row in rows if not all(map(pattern.search, _lines(index.captions[row], subset)))]
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


def _around(subset: SubsetConfig) -> str:
    """What stands before and behind every caption of `subset`."""
    return f"{subset.caption_prefix or ''} {subset.caption_suffix or ''}"


def _lines(caption: str, subset: SubsetConfig) -> list[str]:
    lines = caption.split("\n")
    return lines if subset.enable_wildcard else lines[:1]


def word_warnings(config: RunConfig, indexes: Sequence[ImageIndex], prompts: Sequence[Prompt]) -> list[str]:
    """What is allowed and probably not meant."""
    chosen, word = config.embedding, config.embedding.token_string
    if word is None:
        return []
    warnings = []
    if chosen.init_word is not None and chosen.weights is None:
        found, wanted = len(_tokens(chosen.init_word)), chosen.num_vectors_per_token
        if found != wanted:
            rest = "they take turns" if found < wanted else f"only the first {wanted} of them start one"
            rule = f"is {found} token{'s' * (found > 1)}, and --num_vectors_per_token is {wanted}: {rest}"
            warnings.append(f"--init_word = {chosen.init_word!r}: {rule}")
    for index, number, subset in _learned(indexes):
        if not subset.templates:
            warnings += _lost_at_times(word, index, number)
    if any(subset.is_reg for index in indexes for subset in index.dataset.subsets):
        warnings.append("regularisation images teach nothing here: a new word has no part in their captions")
    pattern = word_pattern([word])
    if prompts and not any(pattern.search(prompt.text) or pattern.search(prompt.negative) for prompt in prompts):
        warnings.append(f"--sample_prompts: none of the prompts holds the word {word!r}: the pictures will not change")
    return warnings


def _lost_at_times(word: str, index: ImageIndex, number: int) -> list[str]:
    """Options that leave the word out of some samples of subset `number`."""
    subset, pattern = index.dataset.subsets[number], word_pattern([word])
    if subset.token_warmup_step > 0 and not (subset.keep_tokens or subset.keep_tokens_separator):
        return [
            f"{subset.origin}: token_warmup_step leaves tags out at first, the word {word!r} among them where it is "
            "not in front; put it there and write keep_tokens = 1"
        ]
    if subset.enable_wildcard and not pattern.search(_without_choices(_around(subset))):
        rows = (index.subset_of == number).nonzero()[0].tolist()
        texts = [_without_choices(text) for row in rows for text in _lines(index.captions[row], subset)]
        if not all(map(pattern.search, texts)):
            return [
                f"{subset.origin}: enable_wildcard leaves the word {word!r} out at times, where it is one of the "
                "choices in braces; write it outside of them"
            ]
    return []


def _without_choices(text: str) -> str:
    """`text` less what stands in braces."""
    parts = text.replace("{{", "").replace("}}", "").split("{")
    return parts[0] + " ".join(part.partition("}")[2] for part in parts[1:])
