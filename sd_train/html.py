"""Self-contained HTML pages: one file, pictures inside, no script, nothing from elsewhere, light and dark.

Pages are built from `element`, which escapes every text that is not `Html` already, so what stands in captions and file
names can never become markup. A content security policy forbids the page to load anything but its own pictures.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sd_train.config.textfile import printable

Pixels = NDArray[np.uint8]

_VOID = frozenset({"img", "meta", "link", "br", "hr"})
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; --back: #f6f7f9; --card: #ffffff; --text: #1c2128; --faint: #59636e; --line: #d5dae1;
  --error: #c62828; --warning: #9a6200; --note: #1c64b4; --fine: #1a7f37; --bar: #6aa3e0; }
@media (prefers-color-scheme: dark) { :root { --back: #11151a; --card: #1a2027; --text: #e4e8ed; --faint: #9aa5b1;
  --line: #333c47; --error: #ff8a80; --warning: #e8b04b; --note: #7fb8f5; --fine: #63d188; --bar: #3b74b3; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0 auto; padding: 1rem clamp(.75rem, 3vw, 2rem) 4rem; max-width: 84rem; background: var(--back);
  color: var(--text); font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; border-bottom: 1px solid var(--line); padding-bottom: .25rem; }
h3 { font-size: 1.05rem; margin: 0 0 .25rem; }
h4 { font-size: 1rem; margin: 1.25rem 0 0; }
p { margin: .35rem 0; max-width: 75ch; }
a { color: var(--note); }
code, pre { font: .875em/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { white-space: pre-wrap; margin: .35rem 0; }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1rem; list-style: none; margin: .5rem 0; padding: 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .9rem 1rem;
  margin: .75rem 0; }
.faint { color: var(--faint); font-size: .875rem; }
.tiles { display: grid; gap: .6rem; grid-template-columns: repeat(auto-fit, minmax(5.9rem, 1fr)); margin: 1rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .6rem .7rem;
  color: inherit; text-decoration: none; }
a.tile:hover { border-color: var(--note); }
.tile b { display: block; font-size: 1.5rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.badge { display: inline-block; border: 1px solid currentColor; border-radius: 1rem; padding: 0 .6rem; font-size: .8rem;
  font-weight: 600; margin-right: .5rem; }
.error { color: var(--error); } .warning { color: var(--warning); } .note { color: var(--note); }
.fine { color: var(--fine); }
.pictures { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(min(9.5rem, 44%), 1fr));
  margin: .75rem 0 0; align-items: end; }
.group { grid-column: 1 / -1; border-left: .25rem solid var(--line); padding-left: .75rem; margin-top: .5rem; }
figure { margin: 0; font-size: .8rem; line-height: 1.35; align-self: start; }
figure img { display: block; max-width: 100%; height: auto; border-radius: .3rem; border: 1px solid var(--line);
  margin-bottom: .25rem; }
figure .nothing { display: grid; place-items: center; width: 100%; aspect-ratio: 4 / 3; border: 1px dashed var(--line);
  border-radius: .3rem; color: var(--faint); margin-bottom: .25rem; }
figcaption span { display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; min-width: 50%; }
th, td { text-align: left; vertical-align: top; padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--line); }
th { color: var(--faint); font-weight: 600; }
td { font-variant-numeric: tabular-nums; }
.bars { display: grid; grid-template-columns: max-content minmax(3rem, 1fr) max-content; gap: .15rem .6rem;
  font-size: .875rem; align-items: center; font-variant-numeric: tabular-nums; }
.bars span:nth-child(3n+1) { max-width: 40vw; }
.bars i { display: block; height: .8rem; border-radius: .2rem; background: var(--bar); min-width: 1px; }
.columns { display: grid; gap: 0 2.5rem; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
summary { cursor: pointer; color: var(--note); margin-top: .5rem; }
ul.plain { margin: .35rem 0; padding-left: 1.1rem; }
ul.plain.card { padding-left: 2.1rem; }
"""


class Html(str):
    """Text that is HTML already; any other text is escaped where it is put into a page."""

    __slots__ = ()


def escape(text: str) -> Html:
    """`text` as HTML that shows exactly it; what a page cannot hold (control characters) becomes U+FFFD."""
    if isinstance(text, Html):
        return text
    return Html(html.escape(_CONTROL.sub("\ufffd", printable(text)), quote=True))


def element(name: str, /, *children: str, **attributes: str | int | None) -> Html:
    """`<name attributes>children</name>`; children that are no `Html` are escaped, attributes always are.

    A trailing underscore of an attribute's name is dropped (`class_`), others become hyphens; None leaves it out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(children)}</{name}>")


def join(parts: Iterable[str]) -> Html:
    """The parts one behind the other, escaped where they are no `Html`."""
    return Html("".join(map(escape, parts)))


def page(title: str, body: Iterable[str]) -> str:
    """A whole document, to be written as UTF-8."""
    head = [
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("link", rel="icon", href="data:,"),
        element("style", Html(_STYLE)),
    ]
    document = element("html", element("head", *head), element("body", *body), lang="en")
    return f"<!DOCTYPE html>\n{document}\n"


def picture(pixels: Pixels, description: str, longest: int = 208, quality: int = 80) -> Html:
    """`pixels` [height, width, 3] (RGB) as an image inside the page, scaled down to `longest` pixels a side."""
    small = shrink(pixels, longest)
    buffer = io.BytesIO()
    Image.fromarray(small).save(buffer, "JPEG", quality=quality, subsampling=0 if quality >= 90 else 2)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    height, width = small.shape[:2]
    return element("img", src=f"data:image/jpeg;base64,{data}", alt=description, width=width, height=height)


def shrink(pixels: Pixels, longest: int) -> Pixels:
    """`pixels` [height, width, 3] with its longer side at most `longest`."""
    height, width = pixels.shape[:2]
    scale = longest / max(height, width)
    if scale >= 1:
        return pixels
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def figure(image: Html | None, lines: Sequence[str], missing: str = "no picture") -> Html:
    """A picture (None: a box that says `missing`) with `lines` of text below it."""
    shown = element("div", missing, class_="nothing") if image is None else image
    return element("figure", shown, element("figcaption", *(element("span", line) for line in lines if line)))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    """A table that scrolls sideways where the screen is narrow."""
    top = element("thead", element("tr", *(element("th", name) for name in head)))
    body = element("tbody", *(element("tr", *(element("td", cell) for cell in row)) for row in rows))
    return element("div", element("table", top, body), class_="scroll")


def bars(rows: Sequence[tuple[str, float, str]]) -> Html:
    """Horizontal bars: (label, value of at least 0, text behind the bar)."""
    longest = max((value for _, value, _ in rows), default=0) or 1
    cells = [
        part
        for label, value, text in rows
        for part in (
            element("span", label),
            element("span", element("i", style=f"width:{100 * value / longest:.1f}%")),
            element("span", text),
        )
    ]
    return element("div", *cells, class_="bars")


def details(summary: str, *children: str) -> Html:
    """Content that is folded away until it is asked for."""
    return element("details", element("summary", summary), *children)
