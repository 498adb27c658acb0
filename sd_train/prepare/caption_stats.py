"""`sd-train caption stats TARGET`: how often each tag occurs, and what is unusual about the captions."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sd_train.config.textfile import printable
from sd_train.errors import DataError
from sd_train.files import write_text
from sd_train.prepare.arguments import Parser
from sd_train.prepare.caption_sources import Found, add_target, find_captions, lines_of, read_content, without_caption
from sd_train.prepare.caption_steps import split
from sd_train.prepare.sidecars import Passed, numbered

ABOUT = """Count the tags of a dataset: how many captions each is in, as a table, JSON or CSV."""


@dataclass(frozen=True)
class Totals:
    """Numbers over the whole dataset."""

    captions: int
    empty: int
    without: int
    """Images without a caption file."""
    tags: int
    different: int
    least: int
    mean: float
    most: int
    """Tags in a caption."""
    repeated: int
    """Captions with a line in which a tag stands twice."""


def main(argv: Sequence[str]) -> int:
    """Print the statistics; 3 if a caption could not be read.

    Raises:
        UserError: if the options or the dataset are wrong.
    """
    parser = Parser("caption stats", ABOUT)
    add_target(parser)
    parser.add_argument("--format", choices=("table", "json", "csv"), default="table", help="default: table")
    parser.add_argument("--top", type=int, metavar="N", help="the N most frequent (default: 50 in a table, else all)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write there in place of printing")
    given = parser.parse_args(argv)
    passed = Passed()
    totals, counts = _count(find_captions(given), passed)
    top = given.top if given.top is not None else 50 if given.format == "table" else len(counts)
    rows = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[: max(0, top)]
    write = {"table": _table, "json": _json, "csv": _csv}[given.format]
    text = write(totals, rows)
    for line in passed.lines(""):
        print(line, file=sys.stderr)
    if given.output is None:
        print(text, end="")
    else:
        write_text(given.output, text, "--output")
        print(f"{given.output}: {numbered(len(rows), 'tag')}")
    return 3 if passed.broken else 0


def _count(found: Found, passed: Passed) -> tuple[Totals, Counter[str]]:
    """Each tag once for a caption that holds it, however often."""
    counts, lengths, repeated, without = Counter[str](), list[int](), 0, len(found.missing)
    for file in found.files:
        try:
            content = read_content(file)
        except DataError as problem:
            passed.broken.append(str(problem))
            continue
        without += len(without_caption(file))
        for _, lines in lines_of(file, content):
            found_tags = [[tag for part in split(line, file.style) for tag in part if tag] for line in lines]
            lengths.append(sum(map(len, found_tags)))
            # Lines stand for one another: a tag may well be in each.
            repeated += any(len(set(tags)) < len(tags) for tags in found_tags)
            counts.update({tag for tags in found_tags for tag in tags})
    total = sum(lengths)
    mean = round(total / len(lengths), 2) if lengths else 0.0
    return Totals(
        captions=len(lengths), empty=lengths.count(0), without=without, tags=total, different=len(counts),
        least=min(lengths, default=0), mean=mean, most=max(lengths, default=0), repeated=repeated,
    ), counts  # fmt: skip


def _table(totals: Totals, rows: Sequence[tuple[str, int]]) -> str:
    lines = [
        f"{numbered(totals.captions, 'caption')}, {totals.empty:,} empty, {numbered(totals.without, 'image')} without; "
        f"{totals.different:,} different tags, {totals.least} to {totals.most} in a caption, {totals.mean} on average; "
        f"in {numbered(totals.repeated, 'caption')} a tag stands twice"
    ]
    width = max((len(f"{count:,}") for _, count in rows), default=0)
    lines += [f"{count:{width},}  {_share(count, totals):6.1%}  {printable(tag)}" for tag, count in rows]
    if len(rows) < totals.different:
        lines.append(f"... and {totals.different - len(rows):,} more (--top)")
    return "\n".join(lines) + "\n"


def _json(totals: Totals, rows: Sequence[tuple[str, int]]) -> str:
    tags = [{"tag": tag, "captions": count, "share": round(_share(count, totals), 6)} for tag, count in rows]
    return json.dumps({**asdict(totals), "list": tags}, ensure_ascii=False, indent=2) + "\n"


def _csv(totals: Totals, rows: Sequence[tuple[str, int]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("tag", "captions", "share"))
    writer.writerows((tag, count, f"{_share(count, totals):.6f}") for tag, count in rows)
    return text.getvalue()


def _share(count: int, totals: Totals) -> float:
    return count / max(1, totals.captions)
