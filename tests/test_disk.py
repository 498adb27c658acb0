"""A disk that is full: the training goes on, saves are made up for, and nothing that is seen is half-written."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sd_train.state import read_manifest
from sd_train.train_network import main
from sd_train.types import Progress
from tests.runs import differences, words, write_dataset

Usage = namedtuple("Usage", "total used free")
RUN = "--max_train_steps 4 --train_batch_size 2 --save_every_n_steps 2 --save_state --network_train_unet_only "
RUN += "--async_save never"


class Disk:
    """What the system tells of the disk, and what it does; a test changes both."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free = 10**12
        self.after: Callable[[int], None] = lambda step: None
        """Told of each update that has ended."""
        self.waiting: Callable[[], None] = lambda: None
        """Called where the end waits for room."""
        self.refused = 0
        """How many more files cannot be written to their end."""
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, self.free))
        advance, fsync = Progress.advance, os.fsync

        def advanced(progress: Progress, update: object) -> None:
            advance(progress, update)  # type: ignore[arg-type]
            self.after(progress.step)

        def synced(descriptor: int) -> None:
            if self.refused:
                self.refused -= 1
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(descriptor)

        monkeypatch.setattr(Progress, "advance", advanced)
        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setattr("sd_train.room.Room.wait", lambda room: self.waiting())


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.fixture(scope="module")
def unbroken(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dataset, and the folder of a run with room."""
    folder = tmp_path_factory.mktemp("unbroken")
    dataset = write_dataset(folder / "dataset.toml")
    assert main(words(small_model, dataset, folder / "out", RUN)) == 0
    return dataset, folder / "out"


def saved(folder: Path) -> list[str]:
    """What lies there beside the options; every file and every state is whole."""
    for path in folder.iterdir():
        assert not path.name.startswith(".")
        if path.name.endswith("-state"):
            read_manifest(path)
        elif path.suffix == ".safetensors":
            load_file(path)
    return sorted(path.name.removesuffix(".safetensors") for path in folder.iterdir() if path.suffix != ".toml")


def test_a_save_that_finds_no_room_is_made_up_for(
    disk: Disk, small_model: Path, unbroken: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset, reference = unbroken
    out, seen = tmp_path / "out", list[list[str]]()

    def after(step: int) -> None:
        disk.free = 10**5 if step == 2 else 10**12
        # The disk fills up while the state is written, after the file and its folder.
        disk.refused = 3 if step == 3 else 0
        seen.append(saved(out))

    disk.after = after
    more = RUN.replace("steps 2", "steps 1")
    assert main(words(small_model, dataset, out, f"{more} --save_last_n_steps 1")) == 0
    first = ["lora-step00000001", "lora-step00000001-state"]
    # Nothing old goes while nothing new is there.
    assert seen[1:] == [first, first, first]
    assert saved(out) == ["lora", "lora-state", *(f"lora-step0000000{end}" for end in ("4", "4-state"))]
    assert differences(out / "lora.safetensors", reference / "lora.safetensors") == []
    told = [record.message for record in caplog.records if "not saved after update" in record.message]
    assert len(told) == 1
    assert "after update 2; the training goes on" in told[0]
    assert "lora-step00000002.safetensors: cannot be written" in told[0]
    assert "100 kB are free" in told[0]


def test_what_is_owed_is_saved_when_there_is_room(
    disk: Disk, small_model: Path, unbroken: tuple[Path, Path], tmp_path: Path
) -> None:
    dataset, reference = unbroken
    out = tmp_path / "out"
    disk.after = lambda step: setattr(disk, "free", 0 if step == 2 else 10**12)
    assert main(words(small_model, dataset, out, RUN)) == 0
    steps = ("3", "3-state", "4", "4-state")
    assert saved(out) == ["lora", "lora-state", *(f"lora-step0000000{end}" for end in steps)]
    assert differences(out / "lora.safetensors", reference / "lora.safetensors") == []


@pytest.mark.parametrize("how", ["stop", "wait", "wait, and give up"])
def test_at_the_end(
    how: str, disk: Disk, small_model: Path, unbroken: tuple[Path, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dataset, reference = unbroken
    out, waited = tmp_path / "out", list[list[str]]()

    def waiting() -> None:
        waited.append(saved(out))
        if how == "wait" and len(waited) == 3:
            disk.free = 10**12
        elif how == "wait, and give up":
            os.kill(os.getpid(), signal.SIGINT)

    disk.waiting = waiting
    disk.after = lambda step: setattr(disk, "free", 0 if step > 2 else 10**12)
    code = main(words(small_model, dataset, out, f"{RUN} --on_disk_full {how.split(',')[0]}"))
    state = out / "lora-step00000002-state"
    before = ["lora-step00000002", state.name]
    assert waited == [before] * {"stop": 0, "wait": 3, "wait, and give up": 1}[how]
    if how == "wait":
        assert code == 0
        assert saved(out) == ["lora", "lora-state", *before]
    else:
        assert code == 4
        told = capsys.readouterr().err
        assert f"the weights of update 4 are lost; then go on with --resume {state}" in told
        assert saved(out) == before
        disk.after, disk.free = lambda step: None, 10**12
        assert main(words(small_model, dataset, out, f"{RUN} --resume latest")) == 0
    assert differences(out / "lora.safetensors", reference / "lora.safetensors") == []
