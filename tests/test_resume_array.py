"""Twenty updates in one go are 7 + 6 + 7 with resumes between them, to the bit: few rows that hold every pair of
values of `tools.resume_cases.AXES`."""

from __future__ import annotations

import itertools
import socket
import subprocess
from pathlib import Path

import pytest

from tests.runs import environment
from tools.resume_cases import (
    AXES,
    Row,
    check_row,
    covering,
    launch_words,
    name_of,
    pairs_of,
    processes_of,
    product,
    train_row,
    write_datasets,
    write_model,
)

ROWS = covering()
ALONE = [row for row in ROWS if processes_of(row) == 1]
TOGETHER = [row for row in ROWS if processes_of(row) == 2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and datasets for all commands."""
    folder = tmp_path_factory.mktemp("array")
    write_model(folder)
    write_datasets(folder)
    return folder


def test_the_rows_hold_every_pair_of_values(capsys: pytest.CaptureFixture[str]) -> None:
    pairs = {pair for row in ROWS for pair in pairs_of(row)}
    sizes = [len(values) for values in AXES.values()]
    assert len(pairs) == sum(one * other for one, other in itertools.combinations(sizes, 2))
    with capsys.disabled():
        print(f"\nresume: {len(ROWS)} of {sum(1 for _ in product())} rows ({len(TOGETHER)} of them with two processes) "
              f"hold all {len(pairs)} pairs of values")  # fmt: skip


@pytest.mark.parametrize("row", ALONE, ids=name_of)
def test_parts_are_the_whole(row: Row, folder: Path) -> None:
    train_row(row, folder / "model.safetensors", folder)
    assert check_row(row, folder) == []


@pytest.fixture(scope="module")
def launched(folder: Path) -> Path:
    """The folder in which two processes have trained all their rows, in one start."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    words = launch_words(TOGETHER, folder / "model.safetensors", folder, port)
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [f"trained {name_of(row)}" in done.stdout for row in TOGETHER] == [True] * len(TOGETHER)
    return folder


@pytest.mark.parametrize("row", TOGETHER, ids=name_of)
def test_parts_are_the_whole_with_two_processes(row: Row, launched: Path) -> None:
    assert check_row(row, launched) == []
