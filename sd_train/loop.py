"""The training loop: the one file to read."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sd_train.checkpoint import Checkpoint
from sd_train.control import Control, Order
from sd_train.data.batches import Updates
from sd_train.device import Updater, out_of_memory
from sd_train.guard import Guard
from sd_train.objectives.base import Objective
from sd_train.optim.ema import Ema
from sd_train.optim.schedules import Schedule
from sd_train.preview import Preview
from sd_train.report import Report
from sd_train.report_norms import Norms
from sd_train.safety import Safety
from sd_train.splitting import Splitting, TooLarge
from sd_train.trainables.base import ParamGroup, Trainable
from sd_train.types import RATES_FROM, Progress, Update
from sd_train.validate import Validation
from sd_train.watch import Seen, Suspect


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
    safety: Safety
    splitting: Splitting
    norms: Norms | None = None
    validate: Validation | None = None
    control: Control | None = None
    orders: list[Order] = field(default_factory=list)
    """Commands that are still to be followed."""
    whole: bool = True
    """Whether the weights and all that goes with them are those of one update; not while a step is taken."""
    until: int | None = None
    """The update after which this run stops as if it had been asked to, before the training's end."""

    def curve_place(self) -> int:
        """Which update of the rates' curve comes next: the training's own, less what `--initial_step` passed over."""
        return min(self.progress.step - int(self.progress.extra.get(RATES_FROM, 0)), self.end - 1)


def train(run: Training) -> bool:
    """Train from `run.progress` to `run.end`; False if a stop was requested before the end.

    Raises:
        RunError: if an update would spoil the weights and the policy is to stop; a state from before it is saved.
    """
    progress = run.progress
    if run.validate is not None:
        run.validate(progress)
    if run.preview is not None:
        run.preview(progress)
    run.safety.begin(progress)
    while True:
        found = None
        try:
            return _train_on(run)
        except Suspect as suspect:
            found = suspect.with_traceback(None)
        except TooLarge:
            pass
        # Out of the handlers, whose exceptions still hold what the update has left in memory.
        run.updater.drop()
        run.objective.forget()
        if found is None:
            run.splitting.free()
        else:
            run.safety.recover(found, progress)


def _train_on(run: Training) -> bool:
    """As `train`, from where `run.progress` stands until something has to be done anew.

    Raises:
        Suspect: at an update that must not have been.
        TooLarge: at one that did not fit into memory; its step is not taken.
    """
    progress, updater, safety = run.progress, run.updater, run.safety
    for update in run.updates.starting_at(progress, run.end):
        if update.step == safety.last:
            raise safety.stop(progress, run.checkpoint.interrupted)
        if update.samples:
            factor = run.schedule.factor(run.curve_place())
            active = [group.active(progress.step) for group in run.groups]
            rates = [group.lr * factor * on for group, on in zip(run.groups, active, strict=True)]
            updater.set_rates(rates, active)
            loss, seen = gradients(run, update)
            norms = run.norms if run.norms is not None and run.norms.due(progress.step + 1) else None
            norm = updater.reduce(None if norms is None else norms.take_gradients)
            loss = updater.device.sum(loss)
            if safety.accepts(update, loss, updater.suspicious(norm), seen):
                run.whole = False
                updater.apply(norm)
                run.trainable.after_step()
                run.objective.after_step()
                progress.advance(update)
                if run.ema is not None:
                    run.ema.update()
                run.whole = True
                named = {group.name: rate for group, rate in zip(run.groups, rates, strict=True)}
                run.report.update(
                    step=progress.step,
                    epoch=progress.epoch,
                    samples=update.samples,
                    loss=loss,
                    rates=updater.taken_rates(named),
                    grad_norm=norm,
                    extra=updater.figures()
                    | run.trainable.figures()
                    | run.objective.figures()
                    | ({} if norms is None else norms.figures()),
                )
            else:
                updater.drop()
                run.objective.forget()
                updater.skipped += 1
                progress.advance(replace(update, samples=0))
                run.report.passed(progress.step, progress.epoch)
        else:
            progress.advance(update)
            run.report.passed(progress.step, progress.epoch)
        # What was asked for while updates are computed anew would be done in the past.
        again = safety.replays(progress)
        if run.control is not None and not again:
            run.orders += run.control.orders(progress.step)
        due = anything_due(run)
        if due or run.orders:
            safety.settle(progress)
        if run.validate is not None:
            run.validate(progress)
        if run.preview is not None:
            run.preview(progress)
        run.checkpoint(progress)
        if run.validate is not None and run.validate.gives_up:
            break
        safety.after(progress, due)
        if again:
            continue
        stop = run.control is not None and follow(run, run.control)
        stop = stop or progress.step == run.until
        if progress.step < run.end and (stop or run.guard.should_stop(progress.step)):
            safety.settle(progress)
            run.checkpoint.interrupted(progress)
            return False
    run.checkpoint.finish(progress)
    return True


def gradients(run: Training, update: Update) -> tuple[Tensor, Seen]:
    """Add the gradients of an update's micro-batches on this rank; their part of its loss, and its samples' losses.

    Raises:
        TooLarge: if a micro-batch does not fit into memory, but its parts may.
    """
    loss, seen = torch.zeros((), device=run.updater.device.device), list[tuple[list[str], Tensor]]()
    for batch in update.batches:
        for part in run.splitting.parts(batch, update.step):
            fits = True
            try:
                run.trainable.before_batch(update, part)
                losses = run.objective.loss(part)
                run.updater.backward(losses.sum() / update.samples)
                loss += losses.detach().sum() / update.samples
                seen.append((part.paths, losses.detach()))
            except (RuntimeError, MemoryError) as problem:
                fits = False
                if not out_of_memory(problem) or not run.splitting.learn(part, update.step):
                    raise
            if not fits:
                # Out of the handler, whose exception still holds what did not fit.
                raise TooLarge
    return loss, seen


def anything_due(run: Training) -> bool:
    """Whether something is saved, shown or scored after the update that was just made; the same on all ranks."""
    progress = run.progress
    return (
        bool(run.checkpoint.due(progress))
        or progress.step == run.end
        or (run.validate is not None and run.validate.due(progress))
        or (run.preview is not None and run.preview.due(progress) is not None)
    )


def follow(run: Training, control: Control) -> bool:
    """Do what the control file has said; whether the run is to stop."""
    progress, orders = run.progress, run.orders
    run.orders = []
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
