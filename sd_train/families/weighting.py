"""Weights inside captions and prompts, in the syntax of A1111's web UI."""

from __future__ import annotations

import re
from dataclasses import dataclass

EMPHASIS = 1.1
"""What one pair of round brackets multiplies by, and one pair of square brackets divides by."""

_PART = re.compile(
    r"\\(?P<escaped>[()\[\]\\]?)"
    r"|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)"
    r"|(?P<bracket>[()\[\]])"
    r"|(?P<plain>[^\\()\[\]:]+|:)"
)


@dataclass(frozen=True)
class Piece:
    """A stretch of text whose tokens share a weight."""

    text: str
    weight: float


def split_weights(text: str) -> list[Piece]:
    """Text with weights -> its pieces in order, brackets removed; neighbours of equal weight are one piece.

    `(x)` weighs x 1.1 times, `[x]` 1 / 1.1 times, `(x:1.3)` 1.3 times; brackets nest and multiply. A bracket that is
    left open ends with the text, one that closes nothing is text, and so is a number that is none. A backslash makes
    the bracket or backslash after it text; any other backslash is left out. (A1111's web UI: "Attention/emphasis".)
    """
    pieces: list[Piece] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def weigh(start: int, factor: float) -> None:
        pieces[start:] = [Piece(piece.text, piece.weight * factor) for piece in pieces[start:]]

    for found in _PART.finditer(text):
        bracket = found["bracket"]
        if found["weight"] is not None and opened["("]:
            weigh(opened["("].pop(), float(found["weight"]))
        elif bracket in opened:
            opened[bracket].append(len(pieces))
        elif bracket == ")" and opened["("]:
            weigh(opened["("].pop(), EMPHASIS)
        elif bracket == "]" and opened["["]:
            weigh(opened["["].pop(), 1 / EMPHASIS)
        else:
            pieces.append(Piece(found[0] if found["escaped"] is None else found["escaped"], 1.0))
    for start in opened["("]:
        weigh(start, EMPHASIS)
    for start in opened["["]:
        weigh(start, 1 / EMPHASIS)
    return _merged(pieces)


def _merged(pieces: list[Piece]) -> list[Piece]:
    merged: list[Piece] = []
    for piece in pieces:
        if merged and merged[-1].weight == piece.weight:
            merged[-1] = Piece(merged[-1].text + piece.text, piece.weight)
        else:
            merged.append(piece)
    return [piece for piece in merged if piece.text]
