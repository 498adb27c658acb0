"""The control file: commands while a run goes on."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from sd_train.control import Control, forget_orders
from tests.runs import differences, train, write_dataset


def test_each_command_once_and_the_file_is_gone(tmp_path: Path) -> None:
    told: list[str] = []
    control = Control(tmp_path / "control", told.append)
    assert control.orders(1) == []
    assert told == []
    control.path.write_text("sample\nSave, save\nstpo \x1b[2J\n")
    assert control.orders(2) == ["save", "sample"]
    assert not control.path.exists()
    assert told == [
        f"{control.path}: 'stpo' is no command; use one of save, sample, stop, pause, resume",
        f"{control.path}: '\\x1b[2j' is no command; use one of save, sample, stop, pause, resume",
        "control file after update 2: save, sample",
    ]
    assert control.orders(3) == []
    control.path.mkdir()
    told.clear()
    assert control.orders(4) == control.orders(5) == []
    assert told == [f"{control.path}: cannot be read and deleted (Is a directory); nothing of it is done"]
    forget_orders(control.path, told.append)
    assert control.path.is_dir()


def test_what_lay_there_before_the_run_is_not_meant_for_it(tmp_path: Path) -> None:
    told: list[str] = []
    control = Control(tmp_path / "control", told.append)
    control.path.write_text("stop")
    forget_orders(control.path, told.append)
    assert control.orders(1) == []
    assert told == [f"{control.path}: was there before the run began, and is deleted"]


def test_a_pause_ends_with_a_command_or_a_signal(tmp_path: Path) -> None:
    told: list[str] = []
    control = Control(tmp_path / "control", told.append)
    left = iter(["", "save", "pause", "sample, resume"])

    def sleep(seconds: float) -> None:
        control.path.write_text(next(left))

    control.sleep = sleep
    assert control.wait(7, lambda: False) == ["sample", "resume"]
    assert told[0] == f"paused after update 7; write resume or stop into {control.path}"
    control.sleep = time.sleep
    assert control.wait(8, lambda: True) == []


def test_other_ranks_are_told_by_the_first_now_and_then(tmp_path: Path) -> None:
    shared: list[int] = []

    def share(value: int) -> int:
        shared.append(value)
        return value

    main = Control(tmp_path / "control", lambda text: None, share=share)
    main.path.write_text("stop, save")
    assert main.orders(7) == []
    assert main.orders(8) == ["save", "stop"]
    other = Control(tmp_path / "control", lambda text: None, is_main=False, share=lambda value: shared[0])
    assert other.orders(8) == ["save", "stop"]


def test_a_run_does_what_it_is_told_and_loses_nothing(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset, output, whole = write_dataset(tmp_path / "photos.toml"), tmp_path / "out", tmp_path / "whole"
    control = output / "control"

    def order() -> None:
        for words in ("pause", "save, sample, resume", "stop"):
            while not (output / "lora-config.toml").exists() or control.exists():
                time.sleep(0.02)
            # Written elsewhere first: the run must never read half of it.
            (output / "new").write_text(words)
            (output / "new").rename(control)

    thread = threading.Thread(target=order, daemon=True)
    thread.start()
    more = "--train_batch_size 1 --lr_scheduler constant --max_train_steps"
    train(tiny_model, dataset, output, f"{more} 2000")
    thread.join(timeout=60)
    told = capsys.readouterr().err
    for words in ("pause", "save, sample, resume", "stop"):
        assert f": {words}" in told
    assert "no sample pictures: --sample_prompts is not given" in told
    states = sorted(output.glob("*-state"))
    step = int(states[-1].name.removeprefix("lora-step").removesuffix("-state"))
    assert 0 < step < 2000
    assert "go on with --resume" in told
    assert len(states) in (1, 2)
    straight = train(tiny_model, dataset, whole, f"{more} {step}")
    assert differences(output / f"lora-step{step:08d}.safetensors", straight) == []
