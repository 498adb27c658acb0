"""What an edit does to a caption: each step of it as a function of one line."""

from __future__ import annotations

import re
from argparse import Action, ArgumentParser, Namespace
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from sd_train.errors import ConfigError, Problems
from sd_train.prepare.arguments import Parser, check_words
from sd_train.prepare.caption_sources import Style
from sd_train.prepare.patterns import check_replacement, compile_pattern


@dataclass(frozen=True)
class Context:
    """What the steps need to know beside the line."""

    style: Style
    ignore_case: bool
    keep_tokens: int
    counts: Mapping[str, int]
    """How often each tag occurs in the dataset, before the edit."""


Step = Callable[[str, Context], str]


class _InOrder(Action):
    """Collects the steps as they stand on the command line."""

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: object, option_string: str | None = None
    ) -> None:
        words = values if isinstance(values, list) else [values]
        namespace.steps = [*(getattr(namespace, "steps", None) or []), (self.dest, words)]


def add_steps(parser: Parser) -> None:
    """The options that say what is done, in the order in which they are given."""
    steps = parser.add_argument_group("what is done, in the order given")
    pair = ("OLD", "NEW")
    steps.add_argument("--replace", action=_InOrder, nargs=2, metavar=pair, help="text anywhere in the caption")
    steps.add_argument(
        "--regex", action=_InOrder, nargs=2, metavar=("PATTERN", "NEW"), help=r"regular expression; NEW may have \1"
    )
    steps.add_argument(
        "--replace_tag", action=_InOrder, nargs=2, metavar=pair, help="whole tags; * in OLD stands for any text"
    )
    steps.add_argument("--remove", action=_InOrder, metavar="TAGS", help="whole tags; * stands for any text")
    steps.add_argument("--remove_regex", action=_InOrder, metavar="PATTERN", help="tags that fit as a whole")
    steps.add_argument("--prepend", action=_InOrder, metavar="TAGS", help="put first, wherever they stand")
    steps.add_argument("--append", action=_InOrder, metavar="TAGS", help="put last, wherever they stand")
    steps.add_argument("--dedupe", action=_InOrder, nargs=0, help="of equal tags the first stays; empty ones go")
    steps.add_argument(
        "--sort", action=_InOrder, nargs="?", const="name", choices=("name", "frequency"), metavar="BY",
        help="by name (default) or frequency in the dataset, the most frequent first",
    )  # fmt: skip
    parser.add_argument(
        "--keep_tokens", type=int, metavar="N", help="--sort leaves the first N tags (default: the dataset file's)"
    )
    parser.add_argument("--ignore_case", action="store_true", help="a is A, in all steps")


def make_steps(given: Namespace, problems: Problems) -> list[Step]:
    """The steps of the command line, wrong ones noted."""
    if not getattr(given, "steps", None):
        problems.add("sd-train caption edit", None, "nothing to do is given", "give --replace, --remove, --sort, ...")
        return []
    if given.keep_tokens is not None and given.keep_tokens < 0:
        problems.add("--keep_tokens", given.keep_tokens, "is below 0", "give 0 or more")
    check_words("--caption_separator", given.caption_separator, problems)
    flags = re.IGNORECASE if given.ignore_case else 0
    return [step for name, words in given.steps if (step := _step(name, words, flags, problems)) is not None]


def _step(name: str, words: Sequence[str], flags: int, problems: Problems) -> Step | None:
    option = f"--{name}"
    if any("\n" in str(word) or "\r" in str(word) for word in words):
        problems.add(option, words, "holds a line break", "a caption is one line; give a text without")
        return None
    known = len(problems.found)
    for word in words:
        check_words(option, word, problems)
    if len(problems.found) > known:
        return None
    if name in ("dedupe", "sort"):
        by_name = not words or words[0] != "frequency"
        return _dedupe if name == "dedupe" else lambda line, context: _sort(line, context, by_name)
    if not words[0]:
        problems.add(option, words[0], "is empty", "give the text that is meant")
        return None
    if name in ("prepend", "append"):
        return lambda line, context: _put(line, context, words[0], name == "prepend")
    if name in ("replace", "regex"):
        text = words[0] if name == "regex" else re.escape(words[0])
        pattern = compile_pattern(option, text, problems, flags)
        if pattern is None:
            return None
        if name == "regex":
            check_replacement(option, pattern, words[1], problems)
            return lambda line, context: pattern.sub(words[1], line)
        return lambda line, context: pattern.sub(lambda found: words[1], line)
    if name == "remove_regex":
        fitting = compile_pattern(option, words[0], problems, flags)
        return None if fitting is None else lambda line, context: _swap(line, context, [fitting], "")
    new = words[1] if name == "replace_tag" else ""
    return lambda line, context: _swap(line, context, _globs(words[0], context, flags), new)


def _globs(text: str, context: Context, flags: int) -> list[re.Pattern[str]]:
    """A pattern for each tag in `text`, in which * stands for anything."""
    tags = filter(None, (tag.strip() for tag in text.split(context.style.separator)))
    return [re.compile(".*".join(map(re.escape, tag.split("*"))), flags) for tag in tags]


def split(line: str, style: Style) -> list[list[str]]:
    """The tags of each part of `line`, stripped, empty ones too; a blank part has none."""
    parts = line.split(style.divider) if style.divider else [line]
    return [[tag.strip() for tag in part.split(style.separator)] if part.strip() else [] for part in parts]


def _join(parts: Sequence[Sequence[str]], style: Style) -> str:
    between = style.separator if style.separator[-1].isspace() else style.separator + " "
    return f" {style.divider} ".join(between.join(part) for part in parts).strip()


def _changed(line: str, context: Context, parts: list[list[str]]) -> str:
    """The line of `parts`; `line` as it is where the tags are the same."""
    return line if parts == split(line, context.style) else _join(parts, context.style)


def _swap(line: str, context: Context, patterns: list[re.Pattern[str]], new: str) -> str:
    news = [tag for tag in (tag.strip() for tag in new.split(context.style.separator)) if tag]
    parts = [
        [each for tag in part for each in (news if any(one.fullmatch(tag) for one in patterns) else [tag])]
        for part in split(line, context.style)
    ]
    return _changed(line, context, parts)


def _put(line: str, context: Context, text: str, first: bool) -> str:
    if context.style.divider and context.style.divider in text:
        raise ConfigError(f"{text!r} holds the dataset's keep_tokens_separator; give tags alone, or use --replace")
    tags = [tag for tag in (tag.strip() for tag in text.split(context.style.separator)) if tag]
    known = {_key(tag, context) for tag in tags}
    parts = [[tag for tag in part if _key(tag, context) not in known] for part in split(line, context.style)]
    if first:
        parts[0] = [*tags, *parts[0]]
    else:
        parts[-1] = [*parts[-1], *tags]
    return _changed(line, context, parts)


def _dedupe(line: str, context: Context) -> str:
    seen, parts = set[str](), list[list[str]]()
    for part in split(line, context.style):
        parts.append([])
        for tag in part:
            if tag and _key(tag, context) not in seen:
                seen.add(_key(tag, context))
                parts[-1].append(tag)
    return _changed(line, context, parts)


def _sort(line: str, context: Context, by_name: bool) -> str:
    parts, left = list[list[str]](), context.keep_tokens
    for part in split(line, context.style):
        kept, free = part[:left], part[left:]
        left = max(0, left - len(part))
        parts.append(kept + sorted(free, key=lambda tag: (0 if by_name else -context.counts[tag], tag.casefold(), tag)))
    return _changed(line, context, parts)


def _key(tag: str, context: Context) -> str:
    return tag.casefold() if context.ignore_case else tag


def run_steps(line: str, steps: Sequence[Step], context: Context) -> str:
    """`line` after all steps."""
    for step in steps:
        line = step(line, context)
    return line


def with_counts(context: Context, lines: Sequence[str]) -> Context:
    """`context` that knows how often each tag is in `lines`."""
    counts = Counter(tag for line in lines for part in split(line, context.style) for tag in part)
    return replace(context, counts=counts)
