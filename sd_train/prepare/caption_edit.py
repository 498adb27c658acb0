"""`sd-train caption edit TARGET --replace OLD NEW ...`: captions changed, with a preview, and taken back."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from sd_train.errors import ConfigError, DataError, Problems
from sd_train.prepare.arguments import Parser
from sd_train.prepare.caption_journal import FileEdit, Journal
from sd_train.prepare.caption_sources import (
    CaptionFile,
    Change,
    Found,
    Style,
    add_target,
    base_of,
    edited,
    find_captions,
    lines_of,
    read_content,
    without_caption,
)
from sd_train.prepare.caption_steps import Context, Step, add_steps, make_steps, run_steps, with_counts
from sd_train.prepare.patterns import limited
from sd_train.prepare.sidecars import Passed, numbered, shown, with_progress

ABOUT = """Change the captions of a dataset: text files beside the images, or metadata.

Without --apply nothing is written: the difference is shown. What --apply changes is noted in .caption_edits beside the
captions (in the folder of a dataset or metadata file), and --undo takes the last edit back, the one before it with the
next call. Lines of a caption with several are edited each on its own."""


def main(argv: Sequence[str]) -> int:
    """Preview, make, finish or take back an edit; 3 if files were passed over.

    Raises:
        UserError: if the options, the dataset or the journal are wrong, or the disk refuses.
    """
    given = _parser().parse_args(argv)
    journal = Journal(base_of(given.target), "." if given.target.is_dir() else given.target.name)
    if given.undo or given.finish:
        if getattr(given, "steps", None) or given.apply or (given.undo and given.finish):
            raise ConfigError("--undo and --finish go alone; give the edit itself in another call")
        if not given.target.exists():
            raise ConfigError(f"{given.target}: is neither folder nor file; give the one that was edited")
        return _carry_out(journal, given.undo, given.target)
    problems = Problems()
    steps = make_steps(given, problems)
    problems.raise_if_any(ConfigError)
    last = journal.last() if given.apply else None
    if last is not None and last.state == "pending":
        raise ConfigError(f"{last.path}: an edit was cut off; end it with --finish or take it back with --undo first")
    found, passed = find_captions(given), Passed()
    contents = _read(found, passed)
    captions, contexts = _contexts(contents, given)
    edits, changes = _edits(contents, steps, contexts)
    _show(changes, given.show)
    passed.missing = found.missing
    for file, _ in contents:
        if keys := without_caption(file):
            print(f"{file.path}: {numbered(len(keys), 'image')} without {file.entry}, left alone (--field chooses): "
                  + shown(keys), file=sys.stderr)  # fmt: skip
    for line in passed.lines("without a caption file, left alone"):
        print(line, file=sys.stderr)
    if empty := [change.name for change in changes if not change.after.strip()]:
        print(f"{numbered(len(empty), 'caption')} left empty: {shown(empty)}", file=sys.stderr)
    if edits and given.apply:
        _, foreign = journal.carry_out(journal.begin(edits, argv), undo=False)
        passed.broken += [f"{problem}, left alone" for problem in foreign]
        print(f"{numbered(len(changes), 'caption')} changed; --undo takes it back")
    elif edits:
        print(f"{numbered(len(changes), 'caption')} of {captions:,} would change; --apply does it")
    else:
        print("nothing would change")
    return 3 if passed.broken else 0


def _parser() -> Parser:
    parser = Parser("caption edit", ABOUT)
    add_target(parser)
    add_steps(parser)
    parser.add_argument("--show", type=int, default=20, metavar="N", help="differences to print (default 20; -1: all)")
    parser.add_argument("--apply", action="store_true", help="do it")
    parser.add_argument("--undo", action="store_true", help="take the last edit back")
    parser.add_argument("--finish", action="store_true", help="finish an edit that was cut off")
    return parser


def _read(found: Found, passed: Passed) -> list[tuple[CaptionFile, str]]:
    contents = []
    for file in with_progress(found.files, "reading"):
        try:
            contents.append((file, read_content(file)))
        except DataError as problem:
            passed.broken.append(str(problem))
    return contents


def _contexts(contents: list[tuple[CaptionFile, str]], given: Namespace) -> tuple[int, dict[Style, Context]]:
    """The number of captions, and for each style what the steps need to know; tags are counted within it."""
    lines, captions = dict[Style, list[str]](), 0
    for file, content in contents:
        texts = list(lines_of(file, content))
        captions += len(texts)
        lines.setdefault(file.style, []).extend(line for _, each in texts for line in each)
    contexts = dict[Style, Context]()
    for style, found in lines.items():
        keep = style.keep_tokens if given.keep_tokens is None else given.keep_tokens
        contexts[style] = with_counts(Context(style, given.ignore_case, keep, {}), found)
    return captions, contexts


def _edits(
    contents: list[tuple[CaptionFile, str]], steps: Sequence[Step], contexts: dict[Style, Context]
) -> tuple[list[FileEdit], list[Change]]:
    edits, changes = list[FileEdit](), list[Change]()
    for file, content in contents:
        context = contexts[file.style]

        def edit(line: str, context: Context = context) -> str:
            with limited(line):
                return run_steps(line, steps, context)

        after, changed = edited(file, content, edit)
        changes += changed
        if changed:
            edits.append(FileEdit(file.path, content, after))
    return edits, changes


def _show(changes: Sequence[Change], most: int) -> None:
    for change in changes if most < 0 else changes[:most]:
        before = "".join(f"\n  - {line}" for line in change.before.splitlines() or [""])
        after = "".join(f"\n  + {line}" for line in change.after.splitlines() or [""])
        print(change.name + before + after)
    if 0 <= most < len(changes):
        print(f"... and {len(changes) - most:,} more (--show -1)")


def _carry_out(journal: Journal, undo: bool, target: Path) -> int:
    entry = journal.last()
    if entry is None or (not undo and entry.state != "pending"):
        nothing = "there is no edit to take back" if undo else "no edit was cut off"
        print(f"{target}: {nothing}")
        return 0
    changed, foreign = journal.carry_out(entry, undo)
    print(f"{numbered(changed, 'file')} {'as before the edit again' if undo else 'edited'}")
    for problem in foreign:
        print(f"skipped: {problem}", file=sys.stderr)
    if foreign and (noted := journal.find(entry.number)) is not None:
        stands = "" if noted.state == "undone" else ", and it stands: move that file away to give the edit up"
        print(f"the texts before and after the edit are in {noted.path}{stands}", file=sys.stderr)
    return 3 if foreign else 0
