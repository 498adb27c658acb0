"""Which program reads which kind of LoRA file, as data; the tests cover what stands here, the README shows it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from sd_train.lora_files.adapter import MID, Adapter

Reader = Literal["diffusers", "A1111/Forge", "ComfyUI", "sd-scripts"]
READERS: tuple[Reader, ...] = ("diffusers", "A1111/Forge", "ComfyUI", "sd-scripts")

Proof = Literal["run", "keys", "source"]
"""How it is known. "run": a test compares the change of the weights, or sees the refusal; "keys": a test compares the
keys with literal ones of that program, and the change with its formula where there is more to it than LoRA; "source":
read in the program's source, not tested."""


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

NO_FORGE = Cell(True, "keys", "A1111; Forge skips it")
NO_CONSTRAINT = Cell(False, "keys", "takes the constraint for an absolute one")

TABLE: dict[str, dict[Reader, Cell]] = {
    "LoRA, LoCon, DyLoRA (kohya keys)": {
        "diffusers": Cell(True, "run", "if attentions have one alpha (lora convert sees to it)"),
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
        "A1111/Forge": YES_KEYS,
        "ComfyUI": YES_KEYS,
        "sd-scripts": WITH_LYCORIS,
    },
    "DoRA with magnitudes of inputs (wd_on_output=False)": {
        "diffusers": Cell(False, "run", "drops the magnitudes with a warning"),
        "A1111/Forge": YES_KEYS,
        "ComfyUI": YES_KEYS,
        "sd-scripts": WITH_LYCORIS,
    },
    "DoRA with magnitudes of outputs (LyCORIS's default)": {
        "diffusers": Cell(False, "run", "drops the magnitudes with a warning"),
        "A1111/Forge": Cell(False, "keys", "divides by the norms of the inputs"),
        "ComfyUI": Cell(False, "keys", "divides by the norms before the change"),
        "sd-scripts": WITH_LYCORIS,
    },
    "LoHa": {"diffusers": NO_RUN, "A1111/Forge": YES_KEYS, "ComfyUI": YES_KEYS, "sd-scripts": WITH_LYCORIS},
    "LoKr": {"diffusers": NO_RUN, "A1111/Forge": YES_KEYS, "ComfyUI": YES_KEYS, "sd-scripts": WITH_LYCORIS},
    "full difference": {"diffusers": NO_RUN, "A1111/Forge": YES_KEYS, "ComfyUI": YES_KEYS, "sd-scripts": WITH_LYCORIS},
    "(IA)^3 of linear layers (preset=ia3)": {
        "diffusers": NO_RUN,
        "A1111/Forge": NO_FORGE,
        "ComfyUI": NO_SOURCE,
        "sd-scripts": WITH_LYCORIS,
    },
    "(IA)^3 of convolutions' outputs": {
        "diffusers": NO_RUN,
        "A1111/Forge": Cell(False, "keys", "multiplies along the kernel"),
        "ComfyUI": NO_SOURCE,
        "sd-scripts": WITH_LYCORIS,
    },
    "GLoRA": {
        "diffusers": NO_RUN,
        "A1111/Forge": Cell(False, "keys", "A1111 expects the factors of older LyCORIS"),
        "ComfyUI": YES_KEYS,
        "sd-scripts": WITH_LYCORIS,
    },
    "diag-OFT": {"diffusers": NO_RUN, "A1111/Forge": NO_FORGE, "ComfyUI": YES_KEYS, "sd-scripts": WITH_LYCORIS},
    "diag-OFT with rescaled": {
        "diffusers": NO_RUN,
        "A1111/Forge": NO_FORGE,
        "ComfyUI": Cell(False, "keys", "leaves rescale out"),
        "sd-scripts": WITH_LYCORIS,
    },
    "BOFT": {"diffusers": NO_RUN, "A1111/Forge": NO_FORGE, "ComfyUI": YES_KEYS, "sd-scripts": WITH_LYCORIS},
    "diag-OFT, BOFT with constraint": {
        "diffusers": NO_RUN,
        "A1111/Forge": NO_FORGE,
        "ComfyUI": NO_CONSTRAINT,
        "sd-scripts": WITH_LYCORIS,
    },
    "OFT (sd-scripts)": {
        "diffusers": NO_RUN,
        "A1111/Forge": Cell(False, "source", "A1111 finds those of SDXL alone, Forge none"),
        "ComfyUI": NO_SOURCE,
        "sd-scripts": YES_SOURCE,
    },
}

_PLAIN = {"loha": "LoHa", "lokr": "LoKr", "full": "full difference", "norm": "full difference", "glora": "GLoRA",
          "oft_diag": "OFT (sd-scripts)"}  # fmt: skip
"""Row of each algorithm that has one."""
_DORA = ("DoRA with magnitudes of inputs (wd_on_output=False)", "DoRA with magnitudes of outputs (LyCORIS's default)")


def rows_of(adapter: Adapter, key: str, kohya: bool) -> list[str]:
    """The rows that a module has to do with.

    Args:
        adapter: the module.
        key: one that it has in the file.
        kohya: whether the file has kohya's keys.
    """
    rows = [_PLAIN[adapter.kind]] if adapter.kind in _PLAIN else []
    factors = adapter.factors
    if adapter.kind == "lora":
        rows.append(f"LoRA, LoCon{', DyLoRA (kohya' if kohya else ' (diffusers'} keys)")
        if MID in factors:
            rows.append("LoCon with lora_mid (Tucker)")
    elif adapter.kind == "ia3":
        along = factors["weight"].ndim > 1 and not bool(factors["on_input"].flatten()[0])
        rows.append("(IA)^3 of convolutions' outputs" if along else "(IA)^3 of linear layers (preset=ia3)")
    elif adapter.kind == "oft" and key.startswith("oft_"):
        rows.append("OFT (sd-scripts)")
    elif adapter.kind == "oft":
        if adapter.alpha:
            rows.append("diag-OFT, BOFT with constraint")
        if factors["oft_blocks"].ndim == 4:
            rows.append("BOFT")
        else:
            rows.append("diag-OFT with rescaled" if "rescale" in factors else "diag-OFT")
    if adapter.is_dora:
        by_output = factors["dora_scale"].shape[0] != 1
        rows.append(_DORA[by_output])
    return rows


@dataclass(frozen=True)
class Content:
    """What of a file decides who reads it."""

    rows: tuple[str, ...]
    """Of its modules, see `rows_of`."""
    kohya: bool
    """Whether keys are kohya's."""
    one_alpha: bool
    """Whether all attention layers of a network have the alpha that is commonest in it."""
    text_model: bool
    """Whether text encoders' keys have `text_model`."""


def who_reads(content: Content) -> dict[Reader, Cell]:
    """What each program makes of a file: the strictest of its rows."""
    verdicts: dict[Reader, Cell] = {}
    for reader in READERS:
        cells = [(row, TABLE[row][reader]) for row in content.rows]
        refused = [(row, cell) for row, cell in cells if not cell.reads]
        if refused:
            row, cell = refused[0]
            verdicts[reader] = Cell(False, cell.proof, cell.but or f"does not read {row}")
        elif reader == "diffusers" and content.kohya and not content.one_alpha:
            but = "loses the alphas of attention layers, which differ here; lora convert --to kohya gives all one"
            verdicts[reader] = Cell(False, "run", but)
        elif reader != "diffusers" and not content.text_model:
            verdicts[reader] = Cell(False, "source", "skips the text encoder, whose keys lack text_model")
        else:
            tested = bool(cells) and all(cell.proof != "source" for _, cell in cells)
            # diffusers' condition has been looked at above.
            conditions = dict.fromkeys(cell.but for _, cell in cells if cell.but and reader != "diffusers")
            verdicts[reader] = Cell(True, "keys" if tested else "source", "; ".join(conditions))
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
