"""The training loop: the one file to read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sd_train.checkpoint import Checkpoint
from sd_train.control import Control, Order
from sd_train.data.batches import Updates
from sd_train.device import Updater
from sd_train.guard import Guard
from sd_train.objectives.base import Objective
from sd_train.optim.ema import Ema
from sd_train.optim.schedules import Schedule
from sd_train.preview import Preview
from sd_train.report import Report
from sd_train.report_norms import Norms
from sd_train.trainables.base import ParamGroup, Trainable
from sd_train.types import RATES_FROM, Progress
from sd_train.validate import Validation


@dataclass
class Training:
    """Everything that the loop works with."""

    progress: Progress
    end: int
    """The update at which the training ends, over all its runs."""
    updates: Updates
    objective: Objective
    trainable: Trainable
    groups: list[ParamGroup]
    schedule: Schedule
    updater: Updater
    ema: Ema | None
    report: Report
    preview: Preview | None
    checkpoint: Checkpoint
    guard: Guard
    norms: Norms | None = None
    validate: Validation | None = None
    control: Control | None = None
    until: int | None = None
    """The update after which this run stops as if it had been asked to, before the training's end."""

    def curve_place(self) -> int:
        """Which update of the rates' curve comes next: the training's own, less what `--initial_step` passed over."""
        return min(self.progress.step - int(self.progress.extra.get(RATES_FROM, 0)), self.end - 1)


def train(run: Training) -> bool:
    """Train from `run.progress` to `run.end`; False if a stop was requested before the end."""
    progress, updater = run.progress, run.updater
    if run.validate is not None:
        run.validate(progress)
    if run.preview is not None:
        run.preview(progress)
    for update in run.updates.starting_at(progress, run.end):
        factor = run.schedule.factor(run.curve_place())
        active = [group.active(progress.step) for group in run.groups]
        rates = [group.lr * factor * on for group, on in zip(run.groups, active, strict=True)]
        updater.set_rates(rates, active)
        loss = torch.zeros((), device=updater.device.device)
        for batch in update.batches:
            run.trainable.before_batch(update, batch)
            losses = run.objective.loss(batch)
            updater.backward(losses.sum() / update.samples)
            loss += losses.detach().sum() / update.samples
        norms = run.norms if run.norms is not None and run.norms.due(progress.step + 1) else None
        norm = updater.step(None if norms is None else norms.take_gradients)
        run.trainable.after_step()
        run.objective.after_step()
        progress.advance(update)
        if run.ema is not None:
            run.ema.update()
        run.report.update(
            step=progress.step,
            epoch=progress.epoch,
            samples=update.samples,
            loss=updater.device.sum(loss),
            rates=updater.taken_rates({group.name: rate for group, rate in zip(run.groups, rates, strict=True)}),
            grad_norm=norm,
            extra=updater.figures()
            | run.trainable.figures()
            | run.objective.figures()
            | ({} if norms is None else norms.figures()),
        )
        run.report.check()
        if run.validate is not None:
            run.validate(progress)
        if run.preview is not None:
            run.preview(progress)
        run.checkpoint(progress)
        if run.validate is not None and run.validate.gives_up:
            break
        stop = run.control is not None and follow(run, run.control, run.control.orders(progress.step))
        stop = stop or progress.step == run.until
        if progress.step < run.end and (stop or run.guard.should_stop(progress.step)):
            run.checkpoint.interrupted(progress)
            return False
    run.checkpoint.finish(progress)
    return True


def follow(run: Training, control: Control, orders: Sequence[Order]) -> bool:
    """Do what the control file says after an update; whether the run is to stop."""
    progress = run.progress
    if "pause" in orders:
        with run.report.untimed():
            orders = [*orders, *control.wait(progress.step, lambda: run.guard.stop_requested)]
    if "save" in orders:
        run.checkpoint.now(progress)
    if "sample" in orders and run.preview is not None:
        run.preview.now(progress)
    elif "sample" in orders:
        run.report.message("no sample pictures: --sample_prompts is not given")
    return "stop" in orders
