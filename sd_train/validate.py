"""The loss on images that are not trained on, always with the same noise: curves, the best weights, an end in time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sd_train.data.batches import BatchSettings, Updates
from sd_train.data.index import ImageIndex
from sd_train.data.order import Order
from sd_train.device import Device
from sd_train.diffusion.draws import Draws, normal_rows
from sd_train.diffusion.schedule import TIMESTEPS
from sd_train.randomness import derive
from sd_train.report import Report
from sd_train.types import Batch, Progress

BINS = 10
"""Curves by timestep: t000-099, t100-199 and so on."""
_OWNER = "validation"
"""Its place in `Progress.extra`."""


class Scoring(Protocol):
    """What tells how far a prediction is from its target."""

    def score(self, batch: Batch) -> Tensor:
        """[B]: of each sample, at the batch's own noise and timesteps."""
        ...


class Weights(Protocol):
    """Whoever owns the weights that are scored."""

    def for_inference(self) -> AbstractContextManager[object]:
        """Inside, the modules compute what a saved file would."""
        ...


@dataclass(frozen=True)
class ScoreSettings:
    """How a set of images is scored."""

    seed: int
    timesteps: int
    """Of each image."""
    low: int
    high: int
    """The timesteps lie from `low` to below `high`."""
    most_batches: int | None = None
    """Over all ranks."""
    rank: int = 0
    world: int = 1


class ScoredSet:
    """Images with noise and timesteps of their own, the same whenever they are scored, whatever they are batched with.

    The timesteps are stratified: of N samples each has one of N equal parts of the timesteps for itself, and the
    samples of one image lie in different n-ths of them. `indexes` hold images that look the same each time.
    """

    def __init__(
        self, indexes: Sequence[ImageIndex], settings: ScoreSettings, shape: Callable[[int, int], tuple[int, ...]]
    ) -> None:
        """`shape` is that of the latents of a picture of (width, height)."""
        self.settings, self._shape = settings, shape
        seed = derive(settings.seed, _OWNER)
        repeated = [replace(index, repeats=np.full(len(index), float(settings.timesteps))) for index in indexes]
        total = Order(repeated, seed).batches_in(0)
        self.batches_scored = total if settings.most_batches is None else min(total, settings.most_batches)
        # One update holds everything, so that a place in it is a sample's number.
        batching = BatchSettings(
            seed, accumulation=-(-total // settings.world), workers=0, rank=settings.rank, world=settings.world
        )
        self.updates = Updates(repeated, batching, self._draw)
        slots = self.updates.slots(0)
        self._names = [
            (slot.dataset, int(repeated[slot.dataset].subset_of[row]), repeated[slot.dataset].keys[row], repeat)
            for slot in slots
            for row, repeat in zip(slot.records.tolist(), slot.repeats.tolist(), strict=True)
        ]
        self.samples = sum(len(slot.records) for slot in slots[: self.batches_scored])
        self.timesteps = self._stratified()
        scored = zip(self._names[: self.samples], self.timesteps.tolist(), strict=False)
        parts = sorted(f"{name} {timestep}" for name, timestep in scored)
        self.digest = derive(settings.seed, "validation set", *parts)
        """Tells sets apart whose scores cannot be compared."""

    def _stratified(self) -> NDArray[np.int64]:
        """[all samples]; those that are not scored have none of their own."""
        chosen = self._names[: self.samples]
        turns = [repeat for *_, repeat in chosen]
        keys = [derive(self.settings.seed, "validation timestep", *name) for name in chosen]
        numbers = np.empty(len(chosen), np.int64)
        numbers[np.lexsort((np.array(keys, np.uint64), turns))] = np.arange(len(chosen))
        low, high = self.settings.low, self.settings.high
        timesteps = np.full(len(self._names), low, np.int64)
        timesteps[: len(chosen)] += np.floor((numbers + 0.5) / max(1, len(chosen)) * (high - low)).astype(np.int64)
        return timesteps

    def _draw(self, step: int, places: Sequence[int], width: int, height: int) -> Draws:
        seed, shape = self.settings.seed, self._shape(width, height)
        names = [self._names[place] for place in places]
        return Draws(
            noise=normal_rows([derive(seed, "validation noise", *name) for name in names], shape),
            # One draw of the latents for each image: it has one point in its posterior, and several noises.
            latent_noise=normal_rows([derive(seed, "validation latent", *name[:-1]) for name in names], shape),
            timesteps=torch.from_numpy(self.timesteps[list(places)]),
        )

    def batches(self) -> Iterator[Batch]:
        """What this rank scores."""
        start = Progress(seed=self.updates.settings.seed, session_id=0, started_at=0.0)
        # What comes later only fills the ranks' last turn, or is beyond `most_batches`.
        count = len(range(self.settings.rank, self.batches_scored, self.settings.world))
        for update in self.updates.starting_at(start, 1):
            yield from islice(update.batches, count)

    @torch.no_grad()
    def score(self, objective: Scoring, device: Device) -> Tensor:
        """[2, BINS], float64: sums of the samples' scores, and their numbers, by timestep, over all ranks."""
        losses, places = [torch.zeros(0, device=device.device)], [torch.zeros(0, dtype=torch.int64)]
        for batch in self.batches():
            losses.append(objective.score(batch).float())
            places.append(batch.timesteps * BINS // TIMESTEPS)
        values, bins = torch.cat(losses).cpu().double(), torch.cat(places)
        sums = torch.zeros(2, BINS, dtype=torch.float64)
        sums[0].index_add_(0, bins, values)
        sums[1].index_add_(0, bins, torch.ones_like(values))
        return device.sum(device.move(sums)).cpu() if device.world > 1 else sums


def mean(sums: Tensor) -> float:
    """The mean score."""
    return float(sums[0].sum() / sums[1].sum())


def curves(sums: Tensor) -> dict[str, float]:
    """The mean score of each part of the timesteps that has samples."""
    width = TIMESTEPS // BINS
    return {
        f"loss/validation/t{place * width:03d}-{(place + 1) * width - 1:03d}": total / count
        for place, (total, count) in enumerate(sums.T.tolist())
        if count
    }


@dataclass(kw_only=True)
class Validation:
    """Called before the first update and after each: scores what it holds when that is due.

    Due: before the first update of all, after every `every_n_steps` updates, at the end of every `every_n_epochs`-th
    epoch, and at the training's end. The lowest loss is looked for among those after the first update. Everything that
    a resume needs is in `Progress.extra`.
    """

    objective: Scoring
    device: Device
    kept: ScoredSet
    """Images that are not trained on."""
    trained: ScoredSet
    """Images that are, scored in the same way."""
    weights: Weights
    average: Weights | None
    """The moving average, if there is one."""
    report: Report
    every_n_steps: int | None
    every_n_epochs: int | None
    end: int
    """The training's last update."""
    patience: int | None = None
    save_best: Callable[[Progress], None] | None = None
    gives_up: bool = False
    """Whether the training is to end: `patience` validations in a row were not a new lowest."""

    def __call__(self, progress: Progress) -> None:
        """Validate if that is due at `progress`; note, show and save what comes out."""
        state = self._state(progress)
        if state["at"] == progress.step or not self.due(progress):
            return
        with self.report.untimed():
            loss, trained, values = self._values()
        self.report.scalars(progress.step, values)
        if _OWNER in progress.extra and progress.extra[_OWNER]["set"] != state["set"]:
            self.report.message(
                "validation scores other images or timesteps than the saved state's: the lowest loss is looked for anew"
            )
        state["at"] = progress.step
        lowest = progress.step > 0 and math.isfinite(loss) and (state["best"] is None or loss < state["best"])
        if lowest:
            state |= {"best": loss, "best_step": progress.step, "misses": 0}
        elif progress.step > 0:
            state["misses"] += 1
        # After it is noted, so that a state that is saved at the same update knows of it.
        progress.extra[_OWNER] = state
        when = f"after update {progress.step}" if progress.step else "before the first update"
        found = state["misses"] > 0 and state["best"] is not None
        told = f"; the lowest is {state['best']:.5f} after update {state['best_step']}" if found else ""
        self.report.message(f"validation {when}: loss {loss:.5f}, on training images {trained:.5f}{told}")
        if lowest and self.save_best is not None:
            self.save_best(progress)
        if self.patience is not None and state["misses"] >= self.patience and progress.step < self.end:
            self.gives_up = True
            self.report.message(
                f"the training ends after update {progress.step} of {self.end}: {state['misses']} validations in a row "
                f"were no new lowest (--validation_patience {self.patience}); to go on, --resume a state with a larger "
                "one"
            )

    def due(self, progress: Progress) -> bool:
        """Whether the moment is one to validate at."""
        if progress.step in (0, self.end):
            return True
        if self.every_n_steps is not None and progress.step % self.every_n_steps == 0:
            return True
        return self.every_n_epochs is not None and progress.index == 0 and progress.epoch % self.every_n_epochs == 0

    def _values(self) -> tuple[float, float, dict[str, float]]:
        """The loss on what is kept and on what is trained, and every curve's point."""
        with self.weights.for_inference():
            kept = self.kept.score(self.objective, self.device)
            trained = mean(self.trained.score(self.objective, self.device))
        values = {"loss/validation": mean(kept), "loss/validation_train": trained, **curves(kept)}
        if self.average is not None:
            with self.average.for_inference():
                values["loss/validation_ema"] = mean(self.kept.score(self.objective, self.device))
        return mean(kept), trained, values

    def _state(self, progress: Progress) -> dict[str, Any]:
        """What earlier validations have left; nothing of another set of images, or of another noise."""
        found = progress.extra.get(_OWNER)
        if found is not None and found["set"] == self.kept.digest:
            return dict(found)
        return {"set": self.kept.digest, "at": None, "best": None, "best_step": None, "misses": 0}
