"""What TensorBoard reads back, what a resume carries on, and that a broken log stays harmless."""

from __future__ import annotations

import io
import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sd_train import report as report_module
from sd_train.report import EventFile, LossWindow, Report

EPOCH = 4
LOSSES = [0.5, 0.25, 0.75, 0.1, 0.3, 0.2, 0.9, 0.4, 0.6, 0.7, 0.15]


def curves(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return events


def points(events: EventAccumulator, tag: str) -> dict[int, float]:
    return {point.step: point.value for point in events.Scalars(tag)}


def feed(report: Report, first: int, last: int) -> None:
    """Updates `first` to `last` - 1 as a training gives them, after `Progress.advance`."""
    for step in range(first, last):
        done = step + 1
        loss = torch.tensor(LOSSES[step], dtype=torch.float64, requires_grad=True)
        report.update(done, done // EPOCH, 2, loss, {"unet": 1e-4 * done, "textencoder": 5e-5}, torch.tensor(1.5))


def window_average(step: int) -> float:
    """The mean over the last epoch's worth of losses, position by position, written out."""
    latest: dict[int, float] = {}
    for number in range(step + 1):
        latest[number % EPOCH] = LOSSES[number]
    return sum(latest.values()) / len(latest)


def test_every_update_is_a_point(tmp_path: Path) -> None:
    with Report(logging_dir=tmp_path, log_prefix="frog_", total_steps=len(LOSSES), console=False) as report:
        feed(report, 0, len(LOSSES))
        report.image("sample_0", np.full((8, 16, 3), 77, dtype=np.uint8), 5)
    assert report.log_dir is not None
    assert report.log_dir.parent == tmp_path
    assert report.log_dir.name.startswith("frog_20")
    assert len(report.log_dir.name) == len("frog_YYYYMMDDHHMMSS")
    events = curves(report.log_dir / "network_train")
    steps = range(1, len(LOSSES) + 1)
    assert points(events, "loss/current") == pytest.approx({s: LOSSES[s - 1] for s in steps})
    assert points(events, "loss/average") == pytest.approx({s: window_average(s - 1) for s in steps})
    assert points(events, "loss/epoch_average") == pytest.approx(
        {epoch: math.fsum(LOSSES[(epoch - 1) * EPOCH : epoch * EPOCH]) / EPOCH for epoch in (1, 2)}
    )
    assert points(events, "lr/unet") == pytest.approx({s: 1e-4 * s for s in steps})
    assert points(events, "lr/textencoder") == pytest.approx(dict.fromkeys(steps, 5e-5))
    assert points(events, "grad_norm") == dict.fromkeys(steps, 1.5)
    assert all(speed > 0 for speed in points(events, "samples_per_second").values())
    (image,) = events.Images("sample_0")
    picture = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
    assert picture.shape == (8, 16, 3)
    assert (picture == 77).all()


@pytest.mark.parametrize("stop", [1, 4, 6, 10])
def test_curves_go_on_after_a_resume(tmp_path: Path, stop: int) -> None:
    whole = Report(logging_dir=tmp_path / "whole", total_steps=len(LOSSES), console=False)
    feed(whole, 0, len(LOSSES))
    first = Report(logging_dir=None, total_steps=len(LOSSES), console=False)
    feed(first, 0, stop)
    state = json.loads(json.dumps(first.state()))
    second = Report(logging_dir=tmp_path / "parts", total_steps=len(LOSSES), start_step=stop, console=False)
    second.load(state)
    feed(second, stop, len(LOSSES))
    assert second.state() == whole.state()
    for report in (whole, first, second):
        report.close()
    assert whole.log_dir is not None
    assert second.log_dir is not None
    expected, found = (curves(folder / "network_train") for folder in (whole.log_dir, second.log_dir))
    tags = ("loss/average", "loss/epoch_average") if stop < 8 else ("loss/average",)
    for tag, count in zip(tags, (len(LOSSES) - stop, 2 - stop // EPOCH), strict=False):
        assert points(expected, tag).items() >= points(found, tag).items()
        assert len(points(found, tag)) == count


def test_without_state_no_epoch_is_invented(tmp_path: Path) -> None:
    with Report(logging_dir=tmp_path, total_steps=9, start_step=6, console=False) as report:
        feed(report, 6, 9)
    assert report.log_dir is not None
    assert list(points(curves(report.log_dir / "network_train"), "loss/epoch_average")) == [2]


def test_not_a_number_leaves_the_window() -> None:
    window = LossWindow()
    for loss in (1.0, math.nan):
        window.add(loss)
    assert math.isnan(window.end_epoch())
    window.add(3.0)
    assert window.add(5.0) == 4.0


def test_a_changed_cpu_tensor_does_not_change_the_past(tmp_path: Path) -> None:
    report = Report(logging_dir=None, total_steps=100, console=False)
    loss = torch.tensor(1.0)
    report.update(1, 0, 1, loss, {})
    loss.fill_(9.0)
    assert report.state()["losses"] == [1.0]


def test_a_broken_log_warns_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    with caplog.at_level(logging.WARNING), Report(logging_dir=file, total_steps=3, console=False) as report:
        feed(report, 0, 3)
        report.image("sample_0", np.zeros((8, 8, 3), dtype=np.uint8), 1)
    assert len(caplog.records) == 1
    assert "the training goes on" in caplog.text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_warns_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    events = EventFile(tmp_path)
    events._file.close()
    with Path("/dev/full").open("wb", buffering=0) as full, caplog.at_level(logging.WARNING):
        events._file, events._records._writer = full, full
        for step in range(3):
            events.scalars(step, 0.0, {"loss/current": 1.0})
        events.close({})
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text


def test_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Report(logging_dir=None, total_steps=10) as report:
        feed(report, 0, 5)
        report.flush()
        report.message("saved")
        feed(report, 5, 10)
    first, message, last = capsys.readouterr().err.splitlines()
    assert first.startswith(f"step 5/10, 1 epochs done: avr_loss={window_average(4):.4f}, images/s=")
    assert message == "saved"
    assert last.startswith("step 10/10, 2 epochs done")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_goes_on_where_the_training_does(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Report(logging_dir=None, total_steps=10, start_step=4) as report:
        feed(report, 4, 10)
    text = terminal.getvalue()
    assert "4/10" in text
    assert "10/10" in text
    assert f"avr_loss={math.fsum(LOSSES[4:10][-4:]) / 4:.4f}" in text


def test_a_closed_terminal_is_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    report = Report(logging_dir=None, total_steps=10)
    terminal.close()
    feed(report, 0, 10)
    report.message("saved")
    report.close()
    assert report.state()["index"] == 2


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Report(logging_dir=tmp_path, total_steps=2, is_main=False) as report:
        feed(report, 0, 2)
        report.message("saved")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_device_values_are_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that are no CPU tensors stay as they are until the log interval; then one stack holds them all."""
    stacks: list[int] = []
    stack = torch.stack

    def counted(tensors: list[torch.Tensor], *arguments: Any) -> torch.Tensor:
        stacks.append(len(tensors))
        return stack(tensors, *arguments)

    monkeypatch.setattr(report_module, "_kept", lambda value: value)
    monkeypatch.setattr(report_module, "SECONDS_READ_TOGETHER", math.inf)
    monkeypatch.setattr(torch, "stack", counted)
    report = Report(logging_dir=None, total_steps=100, console=False)
    feed(report, 0, 10)
    assert stacks == [20]
    assert report.state()["losses"][:2] == pytest.approx(LOSSES[8:10])
