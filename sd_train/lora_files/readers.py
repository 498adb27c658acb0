"""Which program reads which kind of LoRA file, as data; the tests cover what stands here, the README shows it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Reader = Literal["diffusers", "A1111/Forge", "ComfyUI", "sd-scripts"]
READERS: tuple[Reader, ...] = ("diffusers", "A1111/Forge", "ComfyUI", "sd-scripts")

Proof = Literal["run", "keys", "source"]
"""How it is known. "run": a test compares the change of the weights, or sees the refusal; "keys": a test compares the
keys with literal ones of that program; "source": read in the program's source, not tested."""


@dataclass(frozen=True)
class Cell:
    """What one program makes of one kind of file."""

    reads: bool
    proof: Proof
    but: str = ""
    """A condition, or what it does instead."""


YES_RUN, YES_KEYS, YES_SOURCE = Cell(True, "run"), Cell(True, "keys"), Cell(True, "source")
NO_RUN, NO_SOURCE = Cell(False, "run"), Cell(False, "source")
WITH_LYCORIS = Cell(False, "source", "only with lycoris-lora installed, as its --network_module")

TABLE: dict[str, dict[Reader, Cell]] = {
    "LoRA, LoCon (kohya keys)": {
        "diffusers": Cell(True, "run", "if all modules have one alpha (lora convert sees to it)"),
        "A1111/Forge": YES_KEYS,
        "ComfyUI": YES_KEYS,
        "sd-scripts": YES_KEYS,
    },
    "LoRA, LoCon (diffusers keys)": {
        "diffusers": YES_RUN,
        "A1111/Forge": NO_SOURCE,
        "ComfyUI": Cell(False, "source", "skips the U-Net's attention"),
        "sd-scripts": NO_SOURCE,
    },
    "LoCon with lora_mid (Tucker)": {
        "diffusers": NO_RUN,
        "A1111/Forge": YES_SOURCE,
        "ComfyUI": YES_SOURCE,
        "sd-scripts": WITH_LYCORIS,
    },
    "DoRA (kohya keys)": {
        "diffusers": Cell(False, "run", "drops the magnitudes with a warning"),
        "A1111/Forge": YES_SOURCE,
        "ComfyUI": YES_SOURCE,
        "sd-scripts": WITH_LYCORIS,
    },
    "LoHa": {"diffusers": NO_RUN, "A1111/Forge": YES_SOURCE, "ComfyUI": YES_SOURCE, "sd-scripts": WITH_LYCORIS},
    "LoKr": {"diffusers": NO_RUN, "A1111/Forge": YES_SOURCE, "ComfyUI": YES_SOURCE, "sd-scripts": WITH_LYCORIS},
    "full difference": {
        "diffusers": NO_RUN,
        "A1111/Forge": YES_SOURCE,
        "ComfyUI": YES_SOURCE,
        "sd-scripts": WITH_LYCORIS,
    },
    "(IA)^3": {"diffusers": NO_RUN, "A1111/Forge": YES_SOURCE, "ComfyUI": NO_SOURCE, "sd-scripts": WITH_LYCORIS},
    "GLoRA": {"diffusers": NO_RUN, "A1111/Forge": YES_SOURCE, "ComfyUI": YES_SOURCE, "sd-scripts": WITH_LYCORIS},
    "OFT (sd-scripts)": {
        "diffusers": NO_RUN,
        "A1111/Forge": YES_SOURCE,
        "ComfyUI": NO_SOURCE,
        "sd-scripts": YES_SOURCE,
    },
}

ROWS = {
    "loha": "LoHa",
    "lokr": "LoKr",
    "full": "full difference",
    "norm": "full difference",
    "ia3": "(IA)^3",
    "glora": "GLoRA",
    "oft": "OFT (sd-scripts)",
    "oft_diag": "OFT (sd-scripts)",
}
"""Row of each algorithm beside LoRA."""


@dataclass(frozen=True)
class Content:
    """What of a file decides who reads it."""

    kinds: frozenset[str]
    formats: frozenset[str]
    dora: bool
    mid: bool
    one_alpha: bool
    """Whether all modules have the same alpha."""
    text_model: bool
    """Whether text encoders' keys have `text_model`."""


def rows_of(content: Content) -> list[str]:
    """The rows that a file has to do with."""
    rows = [ROWS[kind] for kind in sorted(content.kinds) if kind in ROWS]
    if "lora" in content.kinds:
        kohya = content.formats == {"kohya"}
        rows.append("LoRA, LoCon (kohya keys)" if kohya else "LoRA, LoCon (diffusers keys)")
        if content.dora and kohya:
            rows.append("DoRA (kohya keys)")
        if content.mid:
            rows.append("LoCon with lora_mid (Tucker)")
    return list(dict.fromkeys(rows))


def who_reads(content: Content) -> dict[Reader, Cell]:
    """What each program makes of a file: the strictest of its rows."""
    verdicts: dict[Reader, Cell] = {}
    for reader in READERS:
        cells = [(row, TABLE[row][reader]) for row in rows_of(content)]
        refused = [(row, cell) for row, cell in cells if not cell.reads]
        if refused:
            row, cell = refused[0]
            verdicts[reader] = Cell(False, cell.proof, cell.but or f"does not read {row}")
        elif reader == "diffusers" and "kohya" in content.formats and not content.one_alpha:
            verdicts[reader] = Cell(False, "run", "loses the alphas of attention layers, which differ here")
        elif reader != "diffusers" and not content.text_model:
            verdicts[reader] = Cell(False, "source", "skips the text encoder, whose keys lack text_model")
        else:
            verdicts[reader] = Cell(True, cells[0][1].proof if cells else "source")
    return verdicts


def render_table(rows: Iterable[str] = tuple(TABLE)) -> str:
    """The README's table, algorithm x reader, in Markdown."""
    lines = [f"| file | {' | '.join(READERS)} |", "|---" * (len(READERS) + 1) + "|"]
    for row in rows:
        lines.append(f"| {row} | {' | '.join(_cell(TABLE[row][reader]) for reader in READERS)} |")
    return "\n".join(lines)


def _cell(cell: Cell) -> str:
    mark = {"run": "yes", "keys": "yes (keys)", "source": "yes (untested)"}[cell.proof] if cell.reads else "no"
    return f"{mark}: {cell.but}" if cell.but else mark
