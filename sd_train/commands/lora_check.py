"""`sd-train lora check`: a LoRA file described."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from sd_train.commands.lora_make import read_parts
from sd_train.lora_files.checking import FileReport, ModuleReport, check
from sd_train.lora_files.reading import open_lora

_TITLES = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
    "sdxl_refiner": "Stable Diffusion XL refiner",
    None: "unknown: Stable Diffusion 1.x or 2.x",
}
_LONGEST = 100
"""Of a metadata value on the console."""


def run(given: argparse.Namespace) -> int:
    """Describe `given.file`; 3 if something is wrong with it."""
    networks, family = None, given.family
    if given.model is not None:
        parts = read_parts("--model", given.model)
        networks = {role: part.tensors for role, part in parts.parts.items() if role != "vae"}
        family = family or parts.family
    lora = open_lora(given.file, family)
    report = check(lora, networks)
    if given.json:
        table = asdict(report) | {name: report.counted(name) for name in ("kind", "rank", "alpha", "scale", "dtype")}
        print(json.dumps(table, indent=2))
    else:
        print("\n".join(_lines(report, given.modules)))
    return 3 if report.problems else 0


def _lines(report: FileReport, every: bool) -> list[str]:
    lines = [
        report.file,
        f"  family   {_TITLES[report.family]}",
        f"  keys     {', '.join(report.formats)}",
        f"  modules  {len(report.modules)}: {_counts(report.counted('role'))}",
    ]
    names = (("kind", "kind"), ("rank", "rank"), ("alpha", "alpha"), ("scale", "scale"), ("dtype", "dtype"))
    lines += [f"  {title:8} {_counts(report.counted(name))}" for title, name in names]
    lines += ["", *_table(report.modules, every)]
    lines += ["", "readers"]
    for reader, cell in report.readers.items():
        proof = "" if cell.proof != "source" else " (untested)"
        lines.append(f"  {reader:12} {'yes' if cell.reads else 'no'}{': ' + cell.but if cell.but else proof}")
    if report.metadata:
        lines += ["", f"metadata ({report.entries} entries, among them)"]
        lines += [f"  {name:26} {_short(value)}" for name, value in report.metadata.items()]
    for title, texts in (("wrong", report.problems), ("to know", report.notes)):
        if texts:
            lines += ["", title, *(f"  - {text}" for text in texts)]
    return lines


def _counts(counted: dict[str, int]) -> str:
    parts = [f"{value} ({count})" if len(counted) > 1 else value for value, count in list(counted.items())[:6]]
    return ", ".join(parts) + (f" and {len(counted) - 6} more" if len(counted) > 6 else "")


def _table(modules: list[ModuleReport], every: bool) -> list[str]:
    """A line for each module, or for each group of modules that agree in everything but the path."""
    groups: dict[tuple[str, ...], list[ModuleReport]] = {}
    for module in modules:
        rank = "-" if module.rank is None else str(module.rank)
        alpha = "-" if module.alpha is None else f"{module.alpha:g}"
        row = (module.role, module.path if every else _part(module), module.kind, rank, alpha, module.dtype)
        groups.setdefault(row, []).append(module)
    width = 64 if every else 26
    head = f"  {'network':16}{'part':{width}}{'kind':12}{'rank':>5}{'alpha':>9}{'scale':>9}  {'dtype':6}"
    lines = [head + ("" if every else "modules")]
    for (role, part, kind, rank, alpha, dtype), group in groups.items():
        line = f"  {role:16}{part:{width}}{kind:12}{rank:>5}{alpha:>9}{group[0].scale:>9.4g}  {dtype:6}"
        lines.append(line if every else f"{line}{len(group)}")
    return lines


def _part(module: ModuleReport) -> str:
    if module.role != "unet":
        return "layers"
    pieces = module.path.split(".")
    inner = {"attentions": "attention", "resnets": "residual", "downsamplers": "sampler", "upsamplers": "sampler"}
    return f"{pieces[0]} {next((inner[piece] for piece in pieces if piece in inner), '')}".strip()


def _short(value: str) -> str:
    return value if len(value) <= _LONGEST else value[: _LONGEST - 3] + "..."
