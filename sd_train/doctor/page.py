"""The doctor's page: findings with pictures, buckets as cropped, statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np

from sd_train.config.textfile import printable
from sd_train.data.folders import IMAGE_EXTENSIONS
from sd_train.data.index import ImageIndex
from sd_train.doctor import kinds
from sd_train.doctor.check_captions import CHUNK_LIMITS
from sd_train.doctor.diagnose import Diagnosis, Statistics
from sd_train.doctor.finding import SEVERITIES, Finding, Sight
from sd_train.doctor.pictures import Thumbnails, name_in
from sd_train.doctor.survey import SubsetSurvey
from sd_train.html import Html, bars, details, element, join, page, table

MOST_PICTURES = 12
"""Of one finding; the others are listed by name."""
MOST_IN_BUCKET = 8
MOST_NAMES = 500
MOST_TAGS = 60
_WITHOUT_PICTURE = (kinds.MASK_BROKEN, kinds.METADATA_IMAGE_MISSING, kinds.LEFT_OUT)
_SHAPE_STEPS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5)


@dataclass(frozen=True)
class About:
    """What a page says of the command that makes it."""

    title: str
    told: str = "Looked at by sd-train doctor. Nothing was changed."
    """Stands below the heading."""
    list_option: str = "--json"
    """Of the command: lists what a page has no room for."""
    root: Path | None = None
    """Files are called by their paths in this folder; None: by their names."""


def make_page(about: About, diagnosis: Diagnosis) -> str:
    """The whole page as HTML."""
    thumbnails = Thumbnails(diagnosis.indexes, about.root)
    sections = [
        ("findings", "Findings", _findings(about, diagnosis, thumbnails)),
        ("buckets", "Buckets as cropped", _buckets(diagnosis, thumbnails)),
        ("statistics", "Statistics", _statistics(diagnosis)),
        ("warnings", "What a run would warn of", _warnings(diagnosis)),
    ]
    shown = [(name, heading, content) for name, heading, content in sections if content]
    links = (element("li", element("a", heading, href=f"#{name}")) for name, heading, _ in shown)
    body = [
        element("h1", about.title),
        element("p", about.told, class_="faint"),
        _tiles(diagnosis),
        element("nav", element("ul", *links)),
    ]
    body += [element("section", element("h2", heading), content, id=name) for name, heading, content in shown]
    return page(about.title, body)


def _tiles(diagnosis: Diagnosis) -> Html:
    figures: list[tuple[str, int, str]] = [(severity, diagnosis.count(severity), severity) for severity in SEVERITIES]
    figures.append(("image", sum(each.images for each in diagnosis.statistics), "fine"))
    tiles = []
    for noun, count, style in figures:
        content = element("b", f"{count:,}", class_=style if count else None), _plural(noun, count)
        link = f"#{noun}" if count and noun in SEVERITIES else None
        tiles.append(element("a" if link else "div", *content, class_="tile", href=link))
    return element("div", *tiles, class_="tiles")


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else noun + "s"


def _findings(about: About, diagnosis: Diagnosis, thumbnails: Thumbnails) -> Html:
    if not diagnosis.findings:
        return element("div", element("h3", "Nothing found", class_="fine"),
                       element("p", "Every file can be read and nothing looks unusual."), class_="card")
    broken = frozenset(path for path, look in diagnosis.looks.items() if look.trouble)
    parts = []
    for severity, findings in groupby(diagnosis.findings, key=lambda finding: finding.kind.severity):
        cards = [_finding(about, finding, thumbnails, broken) for finding in findings]
        parts.append(element("div", *cards, id=severity))
    return join(parts)


def _finding(about: About, finding: Finding, thumbnails: Thumbnails, broken: Set[Path]) -> Html:
    kind, count = finding.kind, len(finding.sights)
    badge = element("span", kind.severity, class_=f"badge {kind.severity}")
    number = f" ({count:,} {_plural('file', count)})" if count else ""
    parts = [
        element("h3", badge, kind.title + number),
        element("p", finding.place, class_="faint") if finding.place else "",
        element("p", finding.explanation),
        element("p", element("b", "To do: "), finding.fix),
        _sights(about, finding, thumbnails, broken),
    ]
    return element("article", *parts, class_="card")


def _sights(about: About, finding: Finding, thumbnails: Thumbnails, broken: Set[Path]) -> Html:
    """Pictures of the first files, names of those that have none; files of one group side by side."""
    pictured, named = list[Sight](), list[Sight]()
    for sight in finding.sights:
        is_image = sight.path.suffix.lower() in IMAGE_EXTENSIONS or sight.path.parent.suffix.lower() == ".parquet"
        shown = is_image and sight.path not in broken and finding.kind not in _WITHOUT_PICTURE
        (pictured if shown else named).append(sight)
    cropped = finding.kind in (kinds.CROPPED, kinds.CROPPED_SQUARE, kinds.SHORT_BATCH)
    blocks = []
    for group, members in groupby(pictured[:MOST_PICTURES], key=lambda sight: sight.group):
        figures = [(thumbnails.framed if cropped else thumbnails.plain)(sight.path, [sight.note]) for sight in members]
        blocks.append(element("div", *figures, class_="pictures group" if group else "pictures"))
    rest = pictured[MOST_PICTURES:]
    listed = _names(about, named) if named else Html()
    if rest:
        listed = join([listed, details(f"{len(rest):,} more", _names(about, rest))])
    return join([*blocks, listed])


def _names(about: About, sights: Sequence[Sight]) -> Html:
    rows = [element("li", element("code", name_in(sight.path, about.root)), f" {sight.note}" if sight.note else "")
            for sight in sights[:MOST_NAMES]]
    if len(sights) > MOST_NAMES:
        rows.append(element("li", f"and {len(sights) - MOST_NAMES:,} more; {about.list_option} lists all"))
    return element("ul", *rows, class_="plain")


def _buckets(diagnosis: Diagnosis, thumbnails: Thumbnails) -> Html:
    if diagnosis.indexes is None:
        return Html()
    parts = []
    captions = {item.path: item.caption or "" for subset in diagnosis.survey.subsets for item in subset.items}
    for title, indexes in (("", diagnosis.indexes.training), (" (validation)", diagnosis.indexes.validation)):
        for index in indexes:
            parts.append(_dataset(index, title, thumbnails, captions))
    return join(parts)


def _dataset(index: ImageIndex, title: str, thumbnails: Thumbnails, captions: Mapping[Path, str]) -> Html:
    dataset = index.dataset
    width, height = dataset.resolution
    facts = f"{width}x{height}, batches of {dataset.batch_size}, buckets {'on' if dataset.enable_bucket else 'off'}"
    counts = index.bucket_counts()
    parts = [element("h3", f"{printable(dataset.origin)}{title}"), element("p", facts, class_="faint")]
    order = sorted(range(len(counts)), key=lambda bucket: -counts[bucket])
    areas = np.array([width * height for width, height in index.buckets], np.int64)
    lost = 1 - areas[index.bucket_of] / np.maximum(index.resized.astype(np.int64).prod(axis=1), 1)
    rows = []
    for bucket in order:
        members = np.flatnonzero(index.bucket_of == bucket)
        width, height = index.buckets[bucket]
        rows.append([f"{width}x{height}", f"{len(members):,}", f"{counts[bucket]:,}",
                     f"{-(-counts[bucket] // dataset.batch_size):,}", f"{lost[members].mean():.1%}"])
    parts.append(table(["Bucket", "Images", "Samples an epoch", "Batches", "Cut off, on average"], rows))
    for bucket in order:
        members = np.flatnonzero(index.bucket_of == bucket)
        width, height = index.buckets[bucket]
        figures = [_member(index, int(row), thumbnails, captions) for row in members[:MOST_IN_BUCKET]]
        more = len(members) - len(figures)
        heading = f"{width}x{height}" + (f": the first {len(figures)} of {len(members):,}" if more else "")
        parts.append(element("div", element("h4", heading), element("div", *figures, class_="pictures")))
    return element("div", *parts, class_="card")


def _member(index: ImageIndex, row: int, thumbnails: Thumbnails, captions: Mapping[Path, str]) -> Html:
    record = index.record(row)
    moving = record.subset.random_crop or record.subset.face_crop_aug_range is not None
    repeats = f"x {index.repeats[row]:g}" if index.repeats[row] != 1 else ""
    size = f"{record.size[0]}x{record.size[1]} {repeats}".strip()
    caption = captions.get(record.path, record.caption)
    caption = caption if len(caption) <= 100 else caption[:100] + "..."
    role = "regularisation" if record.is_reg else ""
    return thumbnails.framed(record.path, [size, role, "crop moves" if moving else "", caption])


def _statistics(diagnosis: Diagnosis) -> Html:
    pairs = zip(diagnosis.survey.subsets, diagnosis.statistics, strict=True)
    return join(_subset(diagnosis, subset, figures) for subset, figures in pairs if figures.images)


def _subset(diagnosis: Diagnosis, subset: SubsetSurvey, figures: Statistics) -> Html:
    folder = subset.config.metadata_file or subset.config.image_dir
    role = "regularisation, " if subset.config.is_reg else ""
    facts = f"{subset.config.origin}: {role}{figures.images:,} images, {figures.captions:,} with caption"
    sizes = [size for item in subset.items if (size := diagnosis.looks[item.path].size) is not None]
    columns = [_block("Square root of width x height", _sizes(sizes)),
               _block("Width : height", _shapes(sizes))]
    if figures.tokens or not figures.captions:
        columns.append(_block("Tokens of a caption", _tokens(figures.tokens)))
    if figures.coverage:
        columns.append(_block("Share of a mask that is white", _shares(list(figures.coverage.values()))))
    parts = [element("h3", printable(str(folder))), element("p", printable(facts), class_="faint"),
             element("div", *columns, class_="columns")]
    if figures.tags:
        parts.append(_tags(figures))
    return element("div", *parts, class_="card")


def _block(heading: str, content: Html) -> Html:
    return element("div", element("h4", heading), content)


def _histogram(values: Sequence[float], edges: Sequence[float], labels: Sequence[str]) -> Html:
    """Counts between `edges`; empty bars at both ends are left out."""
    counts = np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)
    used = np.flatnonzero(counts)
    if not len(used):
        return element("p", "none", class_="faint")
    rows = [(labels[row], float(counts[row]), f"{counts[row]:,}") for row in range(used[0], used[-1] + 1)]
    return bars(rows)


def _sizes(sizes: Sequence[tuple[int, int]]) -> Html:
    edges = [128, 256, 384, 512, 640, 768, 1024, 1536, 2048, 4096]
    return _histogram([(width * height) ** 0.5 for width, height in sizes], edges, _between([str(e) for e in edges]))


def _shapes(sizes: Sequence[tuple[int, int]]) -> Html:
    return _histogram([width / height for width, height in sizes], _SHAPE_STEPS,
                      _between([f"{step:g}" for step in _SHAPE_STEPS]))


def _tokens(tokens: Sequence[int]) -> Html:
    edges = [1, 16, 31, 46, 61, *(limit + 1 for limit in CHUNK_LIMITS)]
    labels = ["0", "1 to 15", "16 to 30", "31 to 45", "46 to 60", "61 to 75", "76 to 150", "151 to 225", "above 225"]
    return _histogram(tokens, edges, labels)


def _shares(shares: Sequence[float]) -> Html:
    edges = [0.001, 0.1, 0.25, 0.5, 0.75, 0.9, 0.999]
    labels = ["none", "below 10%", "10 to 25%", "25 to 50%", "50 to 75%", "75 to 90%", "above 90%", "all"]
    return _histogram(shares, edges, labels)


def _between(edges: Sequence[str]) -> list[str]:
    inner = [f"{low} to {high}" for low, high in pairwise(edges)]
    return [f"below {edges[0]}", *inner, f"from {edges[-1]}"]


def _tags(figures: Statistics) -> Html:
    everywhere = [tag for tag, count in figures.tags if count == figures.captions and count > 1]
    rows = [(tag, float(count), f"{count:,}") for tag, count in figures.tags[:MOST_TAGS]]
    once = sum(count == 1 for _, count in figures.tags)
    facts = f"{len(figures.tags):,} different tags, {once:,} of them in one caption only"
    parts = [element("h4", "Tags"), element("p", facts, class_="faint")]
    if everywhere:
        parts.append(element("p", "In every caption: ", element("b", ", ".join(everywhere))))
    heading = f"The {len(rows)} most frequent" if len(figures.tags) > MOST_TAGS else "All tags"
    return element("div", *parts, details(heading, bars(rows)))


def _warnings(diagnosis: Diagnosis) -> Html:
    if not diagnosis.warnings:
        return Html()
    return element("ul", *(element("li", text) for text in diagnosis.warnings), class_="plain card")
