"""Files that cannot be written: the reason is told and what was there stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sd_train.errors import RunError
from sd_train.files import write_folder, write_text


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
