"""Files that cannot be written: the reason is told and what was there stays."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sd_train.errors import RunError
from sd_train.files import remove, write_folder, write_text
from sd_train.names import FileNames


def test_names_that_are_too_long(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 300)
    with pytest.raises(RunError, match="cannot be written"):
        write_text(long, "text")
    with pytest.raises(RunError, match="cannot be written"):
        write_folder(long, lambda folder: None)
    assert list(tmp_path.iterdir()) == []


def test_an_old_folder_is_never_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where the disk fails between the two renames and while moving back."""
    path = tmp_path / "state"
    path.mkdir()
    (path / "file").write_text("old")
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if target == path:
            raise OSError("the disk fails")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(RunError, match="the disk fails"):
        write_folder(path, lambda folder: None)
    (kept,) = tmp_path.iterdir()
    assert (kept / "file").read_text() == "old"


def test_a_second_stop_between_the_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state"
    write_folder(path, lambda folder: (folder / "file").write_text("old") and None)
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if target == path and source.suffix == ".tmp":
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        write_folder(path, lambda folder: None)
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]
    assert (path / "file").read_text() == "old"


# What killed runs leave


@pytest.fixture(scope="module")
def gone() -> int:
    """The number of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


@pytest.fixture
def running() -> Iterator[int]:
    """The number of one that runs."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process.pid
        process.communicate()


def test_what_killed_runs_left_is_put_right(gone: int, running: int, tmp_path: Path) -> None:
    names, own = FileNames(tmp_path, "cat"), os.getpid()

    def folder(name: str, content: str) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(content)

    files = [f".cat.safetensors.{gone}.tmp", f".cat-step00000010-ema.safetensors.{own}.tmp"]
    files += [f".cat-config.toml.{gone}.tmp", f".cat.safetensors.{10**20}.tmp"]
    stays = [
        f".cat.safetensors.{running}.tmp", f".dog.safetensors.{gone}.tmp", ".cat.safetensors.tmp", f"cat.{gone}.tmp",
        f".cat.txt.{gone}.tmp", f".cat-notes.{gone}.old",
    ]  # fmt: skip
    for name in (*files, *stays):
        (tmp_path / name).write_text("half")
    pictures = tmp_path / "sample"
    pictures.mkdir()
    for name in (f".cat_000010_00_20250101000000.png.{gone}.tmp", "cat_000010_00_20250101000000.png", f".x.{gone}.tmp"):
        (pictures / name).write_text("")
    # Killed between two renames; while an old folder was deleted after them; while the new one was written.
    folder(f".cat-step00000010-state.{gone}.old", "old")
    folder(f".cat-step00000010-state.{gone}.tmp", "perhaps whole")
    folder(f".cat-step00000020-state.{gone}.old", "old")
    folder("cat-step00000020-state", "new")
    folder(f".cat-step00000030-state.{gone}.tmp", "half")
    found = names.tidy()
    assert found.put_back == (tmp_path / "cat-step00000010-state",)
    assert len(found.removed) == len(files) + 4
    assert (tmp_path / "cat-step00000010-state" / "file").read_text() == "old"
    assert (tmp_path / "cat-step00000020-state" / "file").read_text() == "new"
    left = {entry.name for entry in tmp_path.iterdir()}
    assert left == {*stays, "sample", "cat-step00000010-state", "cat-step00000020-state"}
    assert {entry.name for entry in pictures.iterdir()} == {"cat_000010_00_20250101000000.png", f".x.{gone}.tmp"}
    assert names.tidy().removed == ()
    assert FileNames(tmp_path / "nowhere", "cat").tidy().removed == ()


def test_nobody_sees_a_folder_that_is_half_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cat-step00000010-state"
    path.mkdir()
    for number in range(3):
        (path / f"{number}").write_text("")
    real, seen = os.unlink, []

    def unlink(name: str, **more: object) -> None:
        seen.append(path.exists())
        real(name, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "unlink", unlink)
    remove(path)
    assert seen == [False] * 3
    assert list(tmp_path.iterdir()) == []
