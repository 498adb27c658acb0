"""What is wrong with captions: files, text, tags, length."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from sd_train.data.captions import process_caption
from sd_train.data.settings import SubsetConfig
from sd_train.doctor import kinds
from sd_train.doctor.finding import Finding, Sight, found
from sd_train.doctor.survey import Item, SubsetSurvey
from sd_train.families.text import ChunkTokenizer

CHUNK_LIMITS = (75, 150, 225)

_GARBLED = re.compile("\ufffd|[\u00c2\u00c3][\u0080-\u00bf]|\u00e2[\u20ac\u201a\u0080]|\u00f0\u0178")
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u2064\ufeff\ufff9-\ufffb]")
_BRACES = re.compile(r"\{[^{}]*\|[^{}]*\}")
_FEWEST_FOR_TRIGGER = 10
_TRIGGER_SHARE = 0.85
_FREQUENT = 5
_LONG_ENOUGH = 6


def check_captions(subset: SubsetSurvey, allow_missing: bool) -> Iterator[Finding]:
    """Everything about the captions of `subset` but their length in tokens."""
    yield from _files(subset, allow_missing)
    yield from _texts(subset)
    yield from _keywords(subset)
    yield from _tags(subset)


def _those(items: Sequence[Item], note: Callable[[Item], str | None]) -> list[Sight]:
    noted = ((item, note(item)) for item in items)
    return [Sight(item.path, text) for item, text in noted if text is not None]


def _files(subset: SubsetSurvey, allow_missing: bool) -> Iterator[Finding]:
    config, place = subset.config, subset.place
    if config.metadata_file is not None:
        bare = [item for item in subset.items if item.caption is None]
        yield from found(kinds.CAPTION_MISSING_ALLOWED, place, _those(bare, lambda _: ""), instead="an empty caption")
        return
    bare = [item for item in subset.items if item.file is None]
    elsewhere = [item for item in bare if item.other_captions]
    bare = [item for item in bare if not item.other_captions]
    other = Counter("." + name.rpartition(".")[2] for item in elsewhere for name in item.other_captions)
    yield from found(kinds.CAPTION_ELSEWHERE, place, _those(elsewhere, lambda item: item.other_captions[0]),
                     extension=config.caption_extension, other=other.most_common(1)[0][0] if other else "")
    if config.class_tokens is None and not allow_missing:
        yield from found(kinds.CAPTION_MISSING, place, _those(bare, lambda _: ""), extension=config.caption_extension)
    elif len(bare) < len(subset.items):
        instead = f"class_tokens ({config.class_tokens!r})" if config.class_tokens else "an empty caption"
        yield from found(kinds.CAPTION_MISSING_ALLOWED, place, _those(bare, lambda _: ""), instead=instead)
    read = [item for item in subset.items if item.file is not None]
    twice = _those(read, lambda item: ", ".join(item.other_captions) or None)
    yield from found(kinds.CAPTION_TWICE, place, twice, extension=config.caption_extension)
    shared: dict[str, list[Item]] = defaultdict(list)
    for item in read:
        shared[str(item.file and item.file.path)].append(item)
    groups = [items for items in shared.values() if len(items) > 1 and len({_stem(item.key) for item in items}) == 1]
    yield from found(kinds.CAPTION_SHARED, place, (
        Sight(item.path, "", number) for number, items in enumerate(groups, start=1) for item in items))
    for state, kind in (("zero_bytes", kinds.CAPTION_EMPTY_FILE), ("not_utf8", kinds.CAPTION_ENCODING),
                        ("unreadable", kinds.CAPTION_ENCODING)):
        broken = [(item.path, item.file.path.name) for item in read if item.file and item.file.state == state]
        yield from found(kind, place, (Sight(path, name) for path, name in broken))


def _stem(key: str) -> str:
    return key.rpartition(".")[0]


def _texts(subset: SubsetSurvey) -> Iterator[Finding]:
    """What the caption files say."""
    config, place = subset.config, subset.place
    read = [item for item in subset.items if item.caption is not None and (item.file is None or _is_read(item))]

    def whole(item: Item) -> str:
        return item.caption or "" if item.file is None else item.file.text

    def lines(item: Item) -> list[str]:
        return [line.strip() for line in whole(item).split("\n") if line.strip()]

    own = [item for item in read if item.file is not None or config.metadata_file is not None]
    yield from found(kinds.CAPTION_BLANK, place, _those(own, lambda item: None if lines(item) else ""))
    if not config.enable_wildcard:
        yield from found(kinds.CAPTION_FIRST_LINE, place, _those(own, lambda item: (
            lines(item)[0] if not item.caption and lines(item) else None)))
        yield from found(kinds.CAPTION_LINES, place, _those(own, lambda item: (
            f"not read: {_short(lines(item)[1])}" if item.caption and len(lines(item)) > 1 else None)))
        yield from found(kinds.WILDCARD_OFF, place, _those(read, lambda item: _match(_BRACES, item.caption)))
    yield from found(kinds.CAPTION_MOJIBAKE, place, _those(own, lambda item: _match(_GARBLED, whole(item), around=12)))
    yield from found(kinds.CAPTION_INVISIBLE, place, _those(own, lambda item: (
        f"U+{ord(match[0]):04X}" if (match := _INVISIBLE.search(whole(item))) else None)))


def _is_read(item: Item) -> bool:
    return item.file is not None and item.file.state == "read"


def _short(text: str, most: int = 80) -> str:
    return text if len(text) <= most else text[:most] + "..."


def _match(pattern: re.Pattern[str], text: str | None, around: int = 0) -> str | None:
    match = pattern.search(text or "")
    return None if match is None else match.string[max(0, match.start() - around) : match.end() + around].strip()


def _keywords(subset: SubsetSurvey) -> Iterator[Finding]:
    """Words that captions should hold: the separator of kept tokens, the trigger word, the class."""
    config, place = subset.config, subset.place
    spoken = [item for item in subset.items if item.caption and (item.file is not None or config.metadata_file)]
    divider = config.keep_tokens_separator
    if divider:
        without = [item for item in spoken if divider not in (item.caption or "")]
        if len(without) < len(spoken):
            yield from found(kinds.SEPARATOR_ABSENT, place, _those(without, lambda item: _short(item.caption or "")),
                             separator=divider, keep=config.keep_tokens)
    else:
        yield from found(kinds.SEPARATOR_UNSET, place, _those(spoken, lambda item: (
            _short(item.caption or "") if "|||" in (item.caption or "") else None)))
    first = Counter(tags[0] for item in spoken if (tags := tags_of(item, config)))
    if first and len(spoken) >= _FEWEST_FOR_TRIGGER and not config.is_reg:
        trigger, _ = first.most_common(1)[0]
        without = [item for item in spoken if trigger not in (item.caption or "").casefold()]
        if len(spoken) - len(without) >= _TRIGGER_SHARE * len(spoken) and first[trigger] >= len(spoken) / 2:
            yield from found(kinds.TRIGGER_ABSENT, place, _those(without, lambda item: _short(item.caption or "")),
                             trigger=trigger)
    if config.class_tokens:
        words = config.class_tokens.casefold().split()
        around = f"{config.caption_prefix or ''} {config.caption_suffix or ''}".casefold()
        ignored = [item for item in spoken if item.file is not None
                   and any(word not in (item.caption or "").casefold() + around for word in words)]
        yield from found(kinds.CLASS_IGNORED, place, _those(ignored, lambda item: _short(item.caption or "")),
                         tokens=config.class_tokens)


def tags_of(item: Item, config: SubsetConfig) -> list[str]:
    """The tags of an image's caption (first line), lower case, in order."""
    line = (item.caption or "").split("\n")[0]
    for divider in (config.keep_tokens_separator, config.secondary_separator):
        if divider:
            line = line.replace(divider, config.caption_separator)
    return [tag.casefold() for tag in map(str.strip, line.split(config.caption_separator)) if tag]


def _tags(subset: SubsetSurvey) -> Iterator[Finding]:
    config, place = subset.config, subset.place
    of_items = [(item, tags_of(item, config)) for item in subset.items if item.caption]
    yield from found(kinds.TAG_TWICE, place, (
        Sight(item.path, ", ".join(twice)) for item, tags in of_items
        if (twice := [tag for tag, count in Counter(tags).items() if count > 1])))
    counts = Counter(tag for _, tags in of_items for tag in tags)
    spellings: dict[str, list[str]] = defaultdict(list)
    for tag, _ in counts.most_common():
        spellings[re.sub(r"[\s_-]+", "", tag)].append(tag)
    rare = {tag: tags[0] for tags in spellings.values() for tag in tags[1:]}
    yield from found(kinds.TAG_SPELLING, place, _with_tags(of_items, rare), spellings=_shown(rare, counts))
    typos = {tag: likely for tag in counts if tag not in rare and (likely := _meant(tag, counts)) is not None}
    yield from found(kinds.TAG_TYPO, place, _with_tags(of_items, typos), spellings=_shown(typos, counts))


def _with_tags(of_items: Sequence[tuple[Item, list[str]]], wanted: Mapping[str, str]) -> list[Sight]:
    return [Sight(item.path, ", ".join(held)) for item, tags in of_items
            if (held := [tag for tag in tags if tag in wanted])]


def _shown(pairs: Mapping[str, str], counts: Mapping[str, int]) -> str:
    listed = [f"{tag!r} ({counts[tag]}) and {other!r} ({counts[other]})" for tag, other in pairs.items()]
    return "; ".join(listed[:10]) + (f"; and {len(listed) - 10} more" if len(listed) > 10 else "")


def _meant(tag: str, counts: Mapping[str, int]) -> str | None:
    """The frequent tag that the rare `tag` is one letter away from, if it looks like a slip and not like a word."""
    if counts[tag] * _FREQUENT > max(counts.values()) or len(tag) < _LONG_ENOUGH or _DIGITS.search(tag):
        return None
    for other, count in counts.items():
        if count >= _FREQUENT * counts[tag] and len(other) >= _LONG_ENOUGH and _one_letter_apart(tag, other):
            return None if {tag + "s", other + "s"} & {tag, other} or _DIGITS.search(other) else other
    return None


_DIGITS = re.compile(r"\d")


def _one_letter_apart(one: str, other: str) -> bool:
    """Whether a letter was changed, added, left out, or two neighbours swapped (Damerau-Levenshtein distance 1)."""
    if one == other or abs(len(one) - len(other)) > 1:
        return False
    start = next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one),
                                                                                                  len(other)))
    if len(one) == len(other):
        swapped = one[start + 1 : start + 2] + one[start : start + 1] + one[start + 2 :]
        return one[start + 1 :] == other[start + 1 :] or swapped == other[start:]
    longer, shorter = (one, other) if len(one) > len(other) else (other, one)
    return longer[start + 1 :] == shorter[start:]


@dataclass(frozen=True)
class Prompt:
    """The caption of one image as it is trained."""

    item: Item
    text: str
    tokens: int


def prompts_of(subset: SubsetSurvey, tokenizer: ChunkTokenizer) -> list[Prompt]:
    """The prompt of each image that has a caption, with nothing shuffled or dropped; of several lines the longest."""
    still = replace(
        subset.config, shuffle_caption=False, caption_dropout_rate=0.0, caption_dropout_every_n_epochs=0,
        caption_tag_dropout_rate=0.0, token_warmup_step=0,
    )
    prompts = []
    for item in subset.items:
        if item.caption is not None:
            texts = [process_caption(line, still, random.Random(0), 0, 0, 1) for line in item.caption.split("\n")]
            counts = [len(ids) for ids in _ids(texts, tokenizer)]
            longest = counts.index(max(counts))
            prompts.append(Prompt(item, texts[longest], counts[longest]))
    return prompts


def _ids(texts: Sequence[str], tokenizer: ChunkTokenizer) -> list[list[int]]:
    # Without `verbose` the library speaks of errors that long captions would cause; they are cut later.
    ids: list[list[int]] = tokenizer.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def check_lengths(
    subset: SubsetSurvey, prompts: Sequence[Prompt], tokenizer: ChunkTokenizer, limit: int
) -> list[Finding]:
    """Captions of more than `limit` tokens, those that are read."""
    longer = next((each for each in CHUNK_LIMITS if each > limit), None)
    kind = kinds.CAPTION_CUT_LAST if longer is None else kinds.CAPTION_CUT
    sights = []
    for prompt in prompts:
        if prompt.tokens > limit:
            rest = str(tokenizer.tokenizer.decode(_ids([prompt.text], tokenizer)[0][limit:]))
            sights.append(Sight(prompt.item.path, f"{prompt.tokens} tokens; cut off: {_short(rest)}"))
    return found(kind, subset.place, sights, limit=limit, longer=longer)
