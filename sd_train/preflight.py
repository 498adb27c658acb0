"""A measured look ahead: an update of the largest size, a sample picture and a save, of which nothing stays behind."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from sd_train.device import free_memory
from sd_train.files import temporary_name
from sd_train.loop import Training, gradients
from sd_train.report import warn_line
from sd_train.snapshot import take_snapshot
from sd_train.splitting import TooLarge

STEM = "preflight"


@dataclass(frozen=True)
class Cost:
    """What one piece of work takes."""

    seconds: float
    peak: int | None
    """Bytes: of the GPU, or of the whole process on a CPU; None where neither tells."""


@dataclass(frozen=True)
class Measured:
    """What the parts of a run take."""

    width: int
    height: int
    """Of the largest pictures in a micro-batch, in pixels."""
    samples: int
    """Of that micro-batch."""
    parts: int
    """Into which it had to be split to fit into memory."""
    batch: Cost
    """Loss and gradients of that micro-batch."""
    step: Cost
    """The optimizer's step."""
    picture: Cost | None
    """None: no prompts are given, or it failed."""
    save: Cost
    model_bytes: int
    """With the moving average, if there is one."""
    state_bytes: int
    """0: no states were asked for."""


def measure(run: Training, *, state: bool) -> Measured:
    """Do everything once, on all ranks; then weights, optimizer, statistics and counters are put back to the bit.

    `state`: whether saves have states.

    Raises:
        UserError: if the largest pictures cannot be prepared, or the save cannot be written.
    """
    parts, progress, device = run.safety.parts, run.progress, run.updater.device.device
    before, skipped = take_snapshot(parts, progress), run.updater.skipped
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            batch, step = _measure_update(run)
            picture = _measure_picture(run)
            save, model_bytes, state_bytes = _measure_save(run, state)
    finally:
        run.updater.drop()
        run.objective.forget()
        run.updater.renew()
        run.updater.skipped = skipped
        before.restore(parts, progress)
        free_memory()
    largest = next(run.updates.largest(progress, run.end).batches)
    height, width = largest.geometry[0].target
    count = len(largest.keys)
    split = len(list(run.splitting.parts(largest, run.progress.step)))
    return Measured(width, height, count, split, batch, step, picture, save, model_bytes, state_bytes)


def _measure_update(run: Training) -> tuple[Cost, Cost]:
    """Twice, because the first time sets things up; loss and gradients of a micro-batch, and the step."""
    progress, updater = run.progress, run.updater
    active = [group.active(progress.step) for group in run.groups]
    factor = run.schedule.factor(run.curve_place())
    updater.set_rates([group.lr * factor * on for group, on in zip(run.groups, active, strict=True)], active)
    _measure_batch(run)
    updater.step()
    run.objective.forget()
    return _measure_batch(run), _cost(run, updater.step)


def _measure_batch(run: Training) -> Cost:
    """The largest micro-batch, in as many parts as it takes."""
    while True:
        update = run.updates.largest(run.progress, run.end)
        # What is prepared is no part of the arithmetic: threads do it while the one before is computed.
        update.batches = iter([*update.batches])
        try:
            return _cost(run, partial(gradients, run, update))
        except TooLarge:
            pass
        run.updater.drop()
        run.objective.forget()
        run.splitting.free()


def _measure_picture(run: Training) -> Cost | None:
    preview = run.preview
    if preview is None or not preview.is_main or not preview.prompts:
        return None
    prompt = max(preview.prompts, key=lambda prompt: prompt.width * prompt.height * prompt.steps)
    try:
        with preview.weights.for_inference():
            return _cost(run, lambda: preview.draw(prompt, 0))
    except Exception as problem:
        # As while training: a picture is worth less, and its exceptions have no common class.
        warn_line(f"preflight: no sample picture ({type(problem).__name__}: {problem})")
        return None


def _measure_save(run: Training, state: bool) -> tuple[Cost, int, int]:
    """Of a model file, with a state if that is asked for, in a temporary folder; and their bytes."""
    checkpoint = run.checkpoint
    if not checkpoint.is_main:
        return Cost(0.0, None), 0, 0
    # The name of what is unfinished: if the process is killed here, the next run takes it away (`files.tidy`).
    folder = temporary_name(checkpoint.names.model(STEM))
    folder.mkdir(parents=True, exist_ok=True)
    names = replace(checkpoint.names, folder=folder)
    try:
        cost = _cost(run, lambda: replace(checkpoint, names=names).write(STEM, run.progress, state=state))
        whole, of_state = _bytes(folder), _bytes(names.state(STEM))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return cost, whole - of_state, of_state


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _cost(run: Training, work: Callable[[], object]) -> Cost:
    device = run.updater.device.device
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    work()
    if cuda:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - started
    return Cost(seconds, torch.cuda.max_memory_allocated(device) if cuda else _peak_of_process())


def _peak_of_process() -> int | None:
    """The most memory that this process has had so far, in bytes."""
    try:
        import resource
    except ImportError:
        # Windows has no such module.
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
