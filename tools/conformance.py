"""`python tools/conformance.py FOLDER`: how far the dataset layer agrees with sd-scripts.

FOLDER holds golden files, written by running sd-scripts: `buckets.json`, `crop.json`, `pixels.json` with `images/`,
`captions.json`, `config_matrix.json`, `legacy_folders.json`, `reg.json`, `latents_npz/`. Every case in them is asked of
our code as a run would. Prints every case that differs, with the reason if it is meant, and then the shares; ends
with 1 if one differs without a reason.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import conformance_config as config
import conformance_pictures as pictures
import conformance_texts as texts
from conformance_cases import Case, Part, read_golden

MOST_SHOWN = 100
CHECKS: dict[str, Callable[[Path, Path], list[Part]]] = {
    "buckets": lambda folder, place: pictures.bucket_parts(read_golden(folder, "buckets"), place),
    "crop": lambda folder, place: pictures.crop_parts(read_golden(folder, "crop"), place),
    "pixels": lambda folder, place: pictures.pixel_parts(read_golden(folder, "pixels"), folder / "images", place),
    "captions": lambda folder, place: texts.caption_parts(read_golden(folder, "captions"), place),
    "config_matrix": lambda folder, place: config.config_parts(read_golden(folder, "config_matrix"), place),
    "legacy_folders": lambda folder, place: texts.legacy_parts(read_golden(folder, "legacy_folders"), place),
    "reg": lambda folder, place: texts.reg_parts(read_golden(folder, "reg"), place),
    "latents_npz": lambda folder, place: pictures.latents_parts(
        read_golden(folder / "latents_npz", "README"), folder / "latents_npz", place
    ),
}
"""(folder of golden files, empty folder to work in) -> cases, by the name of the golden file."""


def check(folder: Path, names: Sequence[str] = tuple(CHECKS)) -> dict[str, list[Part]]:
    """The cases of the golden files `names` in `folder`."""
    found = {}
    for name in names:
        with tempfile.TemporaryDirectory() as place:
            found[name] = CHECKS[name](folder, Path(place))
    return found


def differences(part: Part, every: bool) -> list[str]:
    """The cases of `part` that differ: under each reason the names, without one both answers.

    Where hundreds have one reason only their number in each group is told, unless `every` is wanted.
    """
    meant: dict[str, dict[str, list[str]]] = {}
    lines = []
    for case in part.differing:
        reason = part.reason(case)
        if reason is None:
            lines.append(f"  NOT MEANT: {case}")
        else:
            group, _, member = case.name.rpartition(": ")
            meant.setdefault(reason, {}).setdefault(group, []).append(member)
    for reason, groups in meant.items():
        count = sum(map(len, groups.values()))
        lines.append(f"  {count} meant: {reason}")
        for group, members in groups.items():
            shown = ", ".join(members) if every or count <= MOST_SHOWN else f"{len(members)} (--all names them)"
            lines.append(f"    {group}{': ' if group else ''}{shown}")
    return lines


def as_json(case: Case, part: Part) -> dict[str, object]:
    """A case that differs, for machines."""
    reason = part.reason(case)
    return {"case": case.name, "sd_scripts": case.theirs, "ours": case.ours, "message": case.said, "reason": reason}


def report_json(found: dict[str, list[Part]]) -> list[dict[str, object]]:
    """All parts, for machines."""
    return [
        {
            "file": name, "part": part.name, "cases": len(part.cases),
            "agreeing": len(part.cases) - len(part.differing), "unexplained": len(part.unexplained),
            "differences": [as_json(case, part) for case in part.differing],
        }
        for name, parts in found.items()
        for part in parts
    ]  # fmt: skip


def report(found: dict[str, list[Part]], every: bool) -> None:
    """Print differences and shares."""
    for name, parts in found.items():
        for part in parts:
            if lines := differences(part, every):
                print("\n".join([f"{name}, {part.name}:", *lines, ""]))
    print(f"{'file':16}{'part':28}{'cases':>7}{'agree':>7}{'share':>9}{'meant':>7}{'other':>7}")
    for name, parts in found.items():
        for part in parts:
            cases, differing, unexplained = len(part.cases), len(part.differing), len(part.unexplained)
            share = f"{(cases - differing) / max(cases, 1):.2%}"
            print(f"{name:16}{part.name:28}{cases:7}{cases - differing:7}{share:>9}{differing - unexplained:7}"
                  f"{unexplained:7}")  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; 1 if a case differs without a reason."""
    parser = argparse.ArgumentParser(description="How far does the dataset layer agree with sd-scripts?")
    parser.add_argument("folder", type=Path, help="of the golden files")
    parser.add_argument("--only", default=",".join(CHECKS), help="golden files, separated by commas")
    parser.add_argument("--json", action="store_true", help="for machines, with both answers")
    parser.add_argument("--all", action="store_true", help=f"name cases where over {MOST_SHOWN} have one reason")
    given = parser.parse_args(argv)
    names = given.only.split(",")
    if unknown := [name for name in names if name not in CHECKS]:
        parser.error(f"--only = {','.join(unknown)}: is none of {', '.join(CHECKS)}")
    if not given.folder.is_dir():
        parser.error(f"{given.folder}: there is no such folder")
    found = check(given.folder, names)
    if given.json:
        print(json.dumps(report_json(found), ensure_ascii=False, indent=1))
    else:
        report(found, given.all)
    return int(any(part.unexplained for parts in found.values() for part in parts))


if __name__ == "__main__":
    raise SystemExit(main())
