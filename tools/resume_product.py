"""`python tools/resume_product.py`: every combination of `tools.resume_cases.AXES`, in one go and in parts.

Trains a tiny model 20 updates in one go and 7 + 6 + 7 with resumes, and compares files, states and curves to the bit.
Prints a line for each row that differs, and ends with the counts. Rows can be chosen (`--only optimizer=Prodigy`) and
dealt out over several machines (`--share 1/4`).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from resume_cases import (
    AXES,
    Row,
    check_row,
    covering,
    launch_words,
    name_of,
    processes_of,
    product,
    train_row,
    write_datasets,
    write_model,
)

TOGETHER = 50
"""Rows that two processes train in one start."""


def chosen_rows(only: list[str], share: str, pairwise: bool) -> list[Row]:
    """The rows that the options ask for; ends the process where they name no axis or value."""
    wanted: dict[str, set[str]] = {}
    for word in only:
        axis, _, value = word.partition("=")
        if axis not in AXES or value not in AXES[axis]:
            known = "; ".join(f"{name}={'|'.join(values)}" for name, values in AXES.items())
            sys.exit(f"--only {word}: there is no such value; {known}")
        wanted.setdefault(axis, set()).add(value)
    part, _, parts = share.partition("/")
    if not part.isdecimal() or not parts.isdecimal() or not 1 <= int(part) <= int(parts):
        sys.exit(f"--share {share}: write for example 1/4")
    rows = [row for row in (covering() if pairwise else product())
            if all(value in wanted.get(axis, {value}) for axis, value in zip(AXES, row, strict=True))]  # fmt: skip
    return rows[int(part) - 1 :: int(parts)]


def train_alone(row: Row, model: Path, folder: Path) -> list[str]:
    """What differs in a row of one process."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            train_row(row, model, folder)
    except Exception as problem:
        return [f"{type(problem).__name__}: {problem}"]
    return check_row(row, folder)


def train_together(rows: list[Row], model: Path, folder: Path) -> dict[Row, list[str]]:
    """What differs in each row of two processes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    words = launch_words(rows, model, folder, port)
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    found = {}
    for row in rows:
        trained = f"trained {name_of(row)}\n" in done.stdout
        found[row] = check_row(row, folder) if trained else [f"not trained: {done.stderr[-500:]}"]
    for path in folder.glob("meeting-*"):
        path.unlink()
    return found


def main() -> int:
    """Train and compare; 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--only", action="append", default=[], metavar="AXIS=VALUE", help="may be given several times")
    parser.add_argument("--share", default="1/1", metavar="N/M", help="the N-th of M equal shares of the rows")
    parser.add_argument("--pairwise", action="store_true", help="the few rows that hold every pair of values")
    given = parser.parse_args()
    rows = chosen_rows(given.only, given.share, given.pairwise)
    differing, started = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_model(folder)
        write_datasets(folder)
        alone = [row for row in rows if processes_of(row) == 1]
        together = [row for row in rows if processes_of(row) == 2]
        print(f"{len(rows)} rows, {len(together)} of them with two processes", flush=True)
        found = ((row, train_alone(row, model, folder)) for row in alone)
        batches = (together[place : place + TOGETHER] for place in range(0, len(together), TOGETHER))
        pairs = (pair for batch in batches for pair in train_together(batch, model, folder).items())
        for number, (row, differences) in enumerate((pair for part in (found, pairs) for pair in part), start=1):
            differing += bool(differences)
            if differences:
                print(f"{name_of(row)}: {'; '.join(differences)[:600]}", flush=True)
            if number % 100 == 0:
                passed = time.monotonic() - started
                print(f"{number} of {len(rows)} rows, {differing} differ, {passed:.0f} s", flush=True)
    print(f"{len(rows)} rows in one go and in parts of 7 + 6 + 7 updates: {differing} differ")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
