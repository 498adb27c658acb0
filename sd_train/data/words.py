"""New words in captions and prompts: where they stand, and sentences that are made of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from unicodedata import normalize

_OBJECT = (
    "a photo of a", "a rendering of a", "a cropped photo of the", "the photo of a", "a photo of a clean",
    "a photo of a dirty", "a dark photo of the", "a photo of my", "a photo of the cool", "a close-up photo of a",
    "a bright photo of the", "a cropped photo of a", "a photo of the", "a good photo of the", "a photo of one",
    "a close-up photo of the", "a rendition of the", "a photo of the clean", "a rendition of a", "a photo of a nice",
    "a good photo of a", "a photo of the nice", "a photo of the small", "a photo of the weird", "a photo of the large",
    "a photo of a cool", "a photo of a small",
)  # fmt: skip
"""How sentences about an object begin (Gal et al. 2022, "An Image is Worth One Word", after CLIP's for ImageNet)."""
_STYLE = (
    "a painting", "a rendering", "a cropped painting", "the painting", "a clean painting", "a dirty painting",
    "a dark painting", "a picture", "a cool painting", "a close-up painting", "a bright painting",
    "a cropped painting", "a good painting", "a close-up painting", "a rendition", "a nice painting",
    "a small painting", "a weird painting", "a large painting",
)  # fmt: skip
"""The same of a style; two of them stand twice there too, so they are drawn twice as often."""

_LETTER = (
    r"[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    r"\uf900-\ufaff\U00020000-\U0003ffff]"
)
"""A letter, digit or underscore, but for the scripts that put no blanks between words: Thai, Lao, Burmese, Khmer,
Japanese and Chinese."""

_FIRST_MARK = 0xF0000
"""The first character that no text has (Unicode: private use)."""


def object_sentences(word: str) -> tuple[str, ...]:
    """The 27 sentences of `--use_object_template`."""
    return tuple(f"{beginning} {word}" for beginning in _OBJECT)


def style_sentences(word: str) -> tuple[str, ...]:
    """The 19 sentences of `--use_style_template`."""
    return tuple(f"{beginning} in the style of {word}" for beginning in _STYLE)


class Words:
    """Words that are made of new tokens.

    They are found in any case where no letter, digit or underscore touches them; characters that are composed count as
    what they come to, as the tokenizer has it. A blank in a word is any white space.
    """

    def __init__(self, tokens: Mapping[str, Sequence[int]]) -> None:
        """`tokens` of each word, counted from the first new one."""
        # Of names that begin alike the longest is meant.
        self._names = sorted(tokens, key=len, reverse=True)
        self._tokens = {chr(_FIRST_MARK + place): tuple(tokens[name]) for place, name in enumerate(self._names)}
        self._pattern = _pattern(self._names) if tokens else None
        self._marks = re.compile(f"([{''.join(self._tokens)}])") if tokens else None

    def used(self, text: str) -> list[str]:
        """The words that stand in `text`, as they were given."""
        if self._pattern is None:
            return []
        return [self._names[(found.lastindex or 1) - 1] for found in self._pattern.finditer(normalize("NFC", text))]

    def mark(self, text: str) -> str:
        """`text` with one character in place of each word, which no rule for brackets or tokens takes apart."""
        if self._pattern is None or self._marks is None:
            return text
        text = self._marks.sub("", normalize("NFC", text))
        return self._pattern.sub(lambda found: chr(_FIRST_MARK + (found.lastindex or 1) - 1), text)

    def split(self, marked: str) -> list[str | tuple[int, ...]]:
        """What `mark` gave, in order: text between the words, and the tokens of each word."""
        if self._marks is None:
            return [marked]
        return [self._tokens.get(part, part) for part in self._marks.split(marked) if part]


def _pattern(names: Sequence[str]) -> re.Pattern[str]:
    """A group for each of `names`, of which the first that fits is found."""
    either = "|".join("(" + r"\s+".join(map(re.escape, normalize("NFC", name).split())) + ")" for name in names)
    return re.compile(rf"(?<!{_LETTER})(?:{either})(?!{_LETTER})", re.IGNORECASE)
