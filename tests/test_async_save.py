"""Saves that are written beside the training: the same bytes, refusals and ends as where the training waits."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sd_train.beside import Beside
from sd_train.checkpoint import Intervals
from sd_train.data.batches import Updates
from sd_train.errors import DiskError
from sd_train.files import write_folder, write_text
from sd_train.guard import Guard
from sd_train.safety import Safety
from sd_train.save_copy import CopyMemory, copied_bytes, memory_for
from sd_train.snapshot import all_finite
from sd_train.state import MANIFEST, StateParts, read_manifest, save_state, write_state
from sd_train.state_files import read_table
from sd_train.train_network import main
from sd_train.trainables.base import ParamGroup
from sd_train.types import Progress
from tests.runs import tree, words, write_dataset
from tools.bench_stall import checkpoint_of, make_parts, stall_figures

RUN = "--max_train_steps 6 --train_batch_size 2 --network_train_unet_only --save_state --cache_latents "
AVERAGED = f"{RUN} --save_every_n_steps 3 --save_every_n_epochs 1 --use_ema --optimizer_type AdamWScheduleFree "
PATIENCE = 120.0
"""Seconds that one thread waits for another before the test has failed."""


class Watched:
    """What a run writes and how far it is; a test may hold its writes up, and refuse them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.step = 0
        self.advanced = threading.Condition()
        self.beside: list[int] = []
        """The updates that were done when a file was written by another thread than the training's."""
        self.synced: Callable[[], None] = lambda: None
        """Called where such a file is about to be whole."""
        self.after: Callable[[int], None] = lambda step: None
        """Told of each update that has ended."""
        advance, fsync = Progress.advance, os.fsync

        def advanced(progress: Progress, update: object) -> None:
            advance(progress, update)  # type: ignore[arg-type]
            with self.advanced:
                self.step = progress.step
                self.advanced.notify_all()
            self.after(progress.step)

        def synced(descriptor: int) -> None:
            if threading.current_thread() is not threading.main_thread():
                self.beside.append(self.step)
                self.synced()
            fsync(descriptor)

        monkeypatch.setattr(Progress, "advance", advanced)
        monkeypatch.setattr(os, "fsync", synced)
        monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")

    def wait_for(self, step: int) -> None:
        with self.advanced:
            assert self.advanced.wait_for(lambda: self.step >= step, PATIENCE)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


def saves() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "saves"]


def contents(folder: Path) -> dict[str, object]:
    """Every file of a run, without what its clock, its options and its session say."""
    found: dict[str, object] = {}
    for name, data in tree(folder).items():
        if name.endswith("progress.json"):
            told = json.loads(data)
            found[name] = told | {"progress": {**told["progress"], "started_at": 0, "session_id": 0}}
        elif not name.endswith((MANIFEST, "config.toml")):
            found[name] = data
    for state in folder.glob("*-state"):
        read_manifest(state)
    return found


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("photos") / "dataset.toml")


def test_the_training_goes_on_and_the_bytes_are_the_same(
    watched: Watched, small_model: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sd_train.checkpoint.MOST_COPIED", 1000)
    assert main(words(small_model, dataset, tmp_path / "waits", AVERAGED)) == 0
    # What is larger than may be copied unasked was waited for.
    assert watched.beside == []
    # Both saves of update 3 are whole only when update 5 is done: neither is waited for.
    watched.step, watched.synced = 0, lambda: watched.wait_for(5)
    assert main(words(small_model, dataset, tmp_path / "beside", f"{AVERAGED} --async_save always")) == 0
    assert 5 in watched.beside
    ours = contents(tmp_path / "beside")
    assert {name for name in ours if "/" not in name} == {
        f"lora{stem}{end}.safetensors" for stem in ("", "-step00000003", "-step00000006", "-000001")
        for end in ("", "-ema")
    }  # fmt: skip
    assert ours == contents(tmp_path / "waits")
    assert saves() == []


def test_what_the_disk_refuses_meanwhile_is_told_and_made_up_for(
    watched: Watched, small_model: Path, dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("sd_train.room.RETRY_SECONDS", 0.0)
    out, seen = tmp_path / "out", dict[int, list[str]]()

    def synced() -> None:
        # Of update 3, where the file is whole by then, and the state not yet.
        if len(watched.beside) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def after(step: int) -> None:
        for thread in saves():
            thread.join(PATIENCE)
        seen[step] = sorted(path.name for path in out.iterdir() if path.suffix != ".toml")

    watched.synced, watched.after = synced, after
    more = f"{RUN} --save_every_n_steps 3 --save_last_n_steps 1"
    assert main(words(small_model, dataset, out, more)) == 0
    # Nothing unfinished stays; what is made up for has the name of its own update; old files go when that is whole.
    assert seen[3] == []
    assert seen[4] == seen[5] == ["lora-step00000003.safetensors"]
    assert seen[6] == ["lora-step00000005-state", "lora-step00000005.safetensors"]
    told = [record.message for record in caplog.records if "not saved after update" in record.message]
    assert len(told) == 1
    assert "after update 3; the training goes on" in told[0]
    steps = ("-step00000005", "-step00000006", "")
    there = {f"lora{step}{end}" for step in steps for end in ("-state", ".safetensors")}
    assert {name.partition("/")[0] for name in contents(out)} == there


def test_a_stop_waits_for_the_write(watched: Watched, small_model: Path, dataset: Path, tmp_path: Path) -> None:
    sent = threading.Event()

    def synced() -> None:
        if len(watched.beside) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            sent.set()
            watched.wait_for(3)

    def after(step: int) -> None:
        # The thread may be slow to begin.
        assert step < 3 or sent.wait(PATIENCE)

    watched.synced, watched.after = synced, after
    assert main(words(small_model, dataset, tmp_path, f"{RUN} --save_every_n_steps 2")) == 0
    found = contents(tmp_path)
    for step in (2, 3):
        assert f"lora-step0000000{step}.safetensors" in found
        assert read_manifest(tmp_path / f"lora-step0000000{step}-state")["step"] == step


def test_a_second_ctrl_c_leaves_nothing_unfinished(
    watched: Watched, small_model: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted, handled = threading.Event(), Guard._noted

    def note(guard: Guard, number: int, frame: object) -> None:
        try:
            handled(guard, number, None)
        finally:
            noted.set()

    def synced() -> None:
        for _ in range(2):
            noted.clear()
            os.kill(os.getpid(), signal.SIGINT)
            assert noted.wait(PATIENCE)
        while True:
            time.sleep(0.001)

    monkeypatch.setattr(Guard, "_noted", note)
    watched.synced = synced
    assert main(words(small_model, dataset, tmp_path, f"{RUN} --save_every_n_steps 2")) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["lora-config.toml"]
    assert saves() == []


def test_a_save_that_is_being_written_outlives_a_rollback(
    watched: Watched, small_model: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recovered, prepare, recover = threading.Event(), Updates._prepare, Safety.recover

    def poisoned(updates: Updates, task: Any) -> Any:
        batch = prepare(updates, task)
        if task.step == 2:
            batch.noise[0, 0, 0, 0] = torch.nan
        return batch

    def went_back(safety: Safety, *found: Any) -> None:
        recover(safety, *found)
        recovered.set()

    def synced() -> None:
        assert recovered.wait(PATIENCE)

    monkeypatch.setattr(Updates, "_prepare", poisoned)
    monkeypatch.setattr(Safety, "recover", went_back)
    more = f"{RUN} --max_train_steps 4 --save_every_n_steps 2 --nan_policy rollback"
    assert main(words(small_model, dataset, tmp_path / "waits", f"{more} --async_save never")) == 0
    assert recovered.is_set()
    # The save of update 2 is whole only when the third one has been found and undone.
    recovered.clear()
    watched.synced = synced
    assert main(words(small_model, dataset, tmp_path / "beside", f"{more} --async_save always")) == 0
    ours = contents(tmp_path / "beside")
    assert "lora-step00000002-state/optimizer.safetensors" in ours
    assert ours == contents(tmp_path / "waits")


# Where memory lacks


def no_memory() -> None:
    torch.empty(2**60)


def test_without_memory_for_a_copy_the_training_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(CopyMemory, "take", lambda *_: no_memory())
    with checkpoint_of(make_parts(1), tmp_path, "always") as checkpoint:
        for step in (1, 2):
            checkpoint(Progress(0, 0, 0.0, step=step))
            assert read_manifest(tmp_path / f"always-step{step:08d}-state")["step"] == step
            assert saves() == []
    assert [record.message[:38] for record in caplog.records] == ["no memory for saves beside the trainin"]


def test_what_finds_no_memory_meanwhile_is_made_up_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with checkpoint_of(make_parts(1), tmp_path, "always") as checkpoint:
        export, writers = checkpoint.export, list[str]()

        def put(*given: Any) -> None:
            writers.append(threading.current_thread().name)
            if len(writers) == 1:
                no_memory()
            export(*given)

        checkpoint.export = put
        checkpoint.intervals = Intervals(4, None, True, True)
        there = dict[int, list[str]]()
        for step in range(1, 8):
            checkpoint(Progress(0, 0, 0.0, step=step))
            for thread in saves():
                thread.join(PATIENCE)
            there[step] = sorted(path.name for path in tmp_path.glob("*-state"))
    # That of update 4 failed, update 5 heard of it, and update 6 is saved in its place, once.
    assert there[4] == there[5] == []
    assert there[6] == there[7] == ["always-step00000006-state"]
    assert read_manifest(tmp_path / there[6][0])["step"] == 6
    assert writers == ["saves", "MainThread"]
    told = [record.message for record in caplog.records]
    assert len(told) == 2
    assert "--async_save never" in told[0]
    assert "always-step00000004.safetensors: not written, no memory for it" in told[1]
    assert "not saved after update 4; the training goes on" in told[1]


def test_a_save_that_hears_of_the_lack_is_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with checkpoint_of(make_parts(1), tmp_path, "always") as checkpoint:
        export, writers = checkpoint.export, list[str]()

        def put(*given: Any) -> None:
            writers.append(threading.current_thread().name)
            if len(writers) == 1:
                no_memory()
            export(*given)

        checkpoint.export = put
        checkpoint(Progress(0, 0, 0.0, step=1))
        # Another save is asked for before the training was told how the first one ended.
        checkpoint.best(Progress(0, 0, 0.0, step=2))
        assert writers == ["saves", "MainThread"]
    assert checkpoint.names.model(checkpoint.names.best).is_file()
    assert [record.message for record in caplog.records if "not saved after update 1;" in record.message]


def test_pinned_memory_counts_in_powers_of_two() -> None:
    sizes = (0, 1, 2, 3, 4096, 4097, 2**30 + 1)
    assert [memory_for(size, pinned=True) for size in sizes] == [0, 1, 2, 4, 4096, 8192, 2**31]
    assert [memory_for(size, pinned=False) for size in sizes] == [*sizes]


# The parts


def test_work_is_done_in_order_and_told_by_whoever_asks() -> None:
    beside, order = Beside(), list[str]()
    problem = DiskError("full", full=True)

    def refused() -> None:
        order.append("second")
        raise problem

    beside.add(lambda: order.append("first"), lambda found: order.append(f"told {found}"))
    beside.add(refused, lambda found: order.append(f"told {found}"))
    assert beside.busy
    beside.settle()
    assert [word for word in order if not word.startswith("told")] == ["first", "second"]
    assert order[-2:] == ["told None", f"told {problem}"] or order.index("told None") < order.index(f"told {problem}")
    assert not beside.busy


def test_what_breaks_the_training_is_what_is_shown(tmp_path: Path) -> None:
    told = list[Exception | None]()

    def training() -> None:
        with Beside() as beside:
            beside.add(lambda: write_text(tmp_path / "a.txt", "whole"), told.append)
            beside.add(lambda: write_text(tmp_path / "a.txt" / "b.txt", "no folder"), told.append)
            raise ValueError("the training's")

    with pytest.raises(ValueError, match="the training's"):
        training()
    assert told[0] is None
    assert isinstance(told[1], DiskError)
    assert (tmp_path / "a.txt").read_text() == "whole"


def test_a_problem_that_is_told_leaves_no_later_work_half_done() -> None:
    told, done = threading.Event(), list[str]()

    def first_ended(_: Exception | None) -> None:
        told.set()
        raise ValueError("the first")

    def later() -> None:
        assert told.wait(PATIENCE)
        time.sleep(0.05)
        done.append("whole")

    def last_ended(_: Exception | None) -> None:
        done.append("told")
        raise ValueError("the last")

    def training() -> None:
        with Beside() as beside:
            beside.add(lambda: None, first_ended)
            beside.add(later, last_ended)

    with pytest.raises(ValueError, match="the first"):
        training()
    assert done == ["whole", "told"]
    assert saves() == []


def test_what_cannot_be_started_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    told = list[Exception | None]()
    with Beside() as beside:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refused)
            with pytest.raises(RuntimeError, match="new thread"):
                beside.add(lambda: None, told.append)
        assert not beside.busy
        beside.add(lambda: None, told.append)
    assert told == [None]


def test_ctrl_c_ends_the_work_and_what_waits_for_it(tmp_path: Path) -> None:
    begun, told = threading.Event(), list[Exception | None]()

    def endless(folder: Path) -> None:
        (folder / "half").write_text("half")
        begun.set()
        while True:
            time.sleep(0.001)

    def training() -> None:
        with Beside() as beside:
            beside.add(lambda: write_folder(tmp_path / "state", endless), told.append)
            beside.add(lambda: write_text(tmp_path / "a.txt", ""), told.append)
            assert begun.wait(PATIENCE)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training()
    assert list(tmp_path.iterdir()) == []
    assert told == []


class Tied:
    """A trainable of two names for one tensor, and another tensor."""

    def __init__(self) -> None:
        first, second = nn.Parameter(torch.arange(6.0).view(2, 3)), nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
        self.named = {"a": first, "b": first, "c": second}

    def tensors(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.named.items()}

    def for_inference(self) -> torch.no_grad:
        return torch.no_grad()


def parts_of(tied: Tied) -> StateParts:
    params = {"a": tied.named["a"], "c": tied.named["c"]}
    optimizer = torch.optim.SGD(list(params.values()), lr=1.0, momentum=0.5)
    for parameter in params.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return StateParts(tied, [ParamGroup("all", params, 1.0)], optimizer, {}, "seed = 1\n", "b" * 64)  # type: ignore[arg-type]


def test_a_copy_is_of_its_moment_in_memory_that_is_used_again(tmp_path: Path) -> None:
    tied = Tied()
    parts, memory = parts_of(tied), CopyMemory()
    places = list[int]()
    for step in (1, 2):
        progress = Progress(seed=0, session_id=0, started_at=0.0, step=step)
        save_state(tmp_path / f"live{step}-state", progress, parts)
        copy = memory.with_state(memory.take(parts, progress), parts, progress)
        parts.optimizer.step()
        assert copy.state is not None
        copy.ready()
        write_state(tmp_path / f"copy{step}-state", copy.state)
        places.append(copy.weights["c"].data_ptr())
        for name in ("trainable.safetensors", "optimizer.safetensors", "optimizer.json", "progress.json"):
            live, copied = tmp_path / f"live{step}-state" / name, tmp_path / f"copy{step}-state" / name
            assert copied.read_bytes() == live.read_bytes()
    table = read_table(tmp_path / "copy2-state" / "trainable.safetensors")
    assert table["a"] is table["b"]
    assert places[0] == places[1]
    # 6 and 6 float32, 4 bfloat16; the momenta are not tied.
    assert copied_bytes(parts, state=False) == 2 * 24 + 8
    assert copied_bytes(parts, state=True) == 2 * 24 + 8 + 24 + 8


def test_sums_that_overflow_are_no_sign() -> None:
    large = torch.full((8,), torch.finfo(torch.float32).max)
    assert not bool(large.sum().isfinite())
    assert all_finite([large, torch.ones(0), torch.arange(3), large.to(torch.float64)])
    for bad in (torch.nan, torch.inf, -torch.inf):
        assert not all_finite([torch.ones(3), torch.tensor([1.0, bad])])
    assert not all_finite([torch.tensor([torch.inf, -torch.inf])])
    assert all_finite([])


def test_what_was_hashed_while_it_was_written_is_what_the_files_hold(tmp_path: Path) -> None:
    tied = Tied()
    parts = parts_of(tied)
    # More than may wait to be hashed, in tensors of all sizes.
    tied.named["large"] = nn.Parameter(torch.randn(3 << 20))
    tied.named |= {f"small{number}": nn.Parameter(torch.randn(1 << 10)) for number in range(40)}
    save_state(tmp_path / "a-state", Progress(0, 0, 0.0), parts)
    files = read_manifest(tmp_path / "a-state")["files"]
    assert all(re.fullmatch("[0-9a-f]{64}", facts["sha256"]) for facts in files.values())


def test_the_benchmark_compares_what_it_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    figures = stall_figures(1, 1)
    assert figures["equal_to_the_bit"] is True
    assert list(tmp_path.iterdir()) == []
