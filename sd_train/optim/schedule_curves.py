"""The curves of the learning-rate schedules: factors of the rate as pure functions of the update, from zero.

They equal those of diffusers.optimization and transformers.optimization, which sd-scripts uses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Numbers:
    """What curves are computed from; each reads what it needs."""

    warmup: int
    """Updates until the factor 1."""
    total: int
    """Updates of the whole training."""
    decay: int = 0
    """Updates at the end in which `warmup_stable_decay` decays."""
    cycles: float = 0.5
    """Periods of the cosine; with restarts: half periods, each from 1 to 0."""
    power: float = 1.0
    timescale: int = 10_000
    """Updates."""
    least: float = 0.0
    """The factor at the end; where `warmup_stable_decay` begins, too."""
    warmup_type: str = "linear"
    decay_type: str = "cosine"
    pieces: tuple[tuple[int, float], ...] = ()
    """(update before which it holds, factor), in order of the updates."""
    last: float = 1.0
    """The factor after all `pieces`; the one of a constant schedule."""

    def rising(self, step: int) -> float:
        """The straight line from 0 to 1 over the warm-up."""
        return step / max(1, self.warmup)

    def done(self, step: int) -> float:
        """Share of the updates after the warm-up that are over: 0 to 1 at the end, which is absolute."""
        return (step - self.warmup) / max(1, self.total - self.warmup)


def constant(step: int, numbers: Numbers) -> float:
    """The same at every update."""
    return numbers.last


def constant_with_warmup(step: int, numbers: Numbers) -> float:
    """Rises to 1 and stays."""
    return numbers.rising(step) if step < numbers.warmup else 1.0


def linear(step: int, numbers: Numbers) -> float:
    """Falls to 0 in a straight line."""
    if step < numbers.warmup:
        return numbers.rising(step)
    return max(0.0, (numbers.total - step) / max(1, numbers.total - numbers.warmup))


def cosine(step: int, numbers: Numbers) -> float:
    """`cycles` periods of a cosine between 1 and `least` (Loshchilov & Hutter 2017 has half a period and 0)."""
    if step < numbers.warmup:
        return numbers.rising(step)
    return _wave(numbers.done(step), numbers)


def cosine_with_restarts(step: int, numbers: Numbers) -> float:
    """`cycles` times from 1 to 0 along half a cosine (Loshchilov & Hutter 2017: SGDR with equal periods)."""
    if step < numbers.warmup:
        return numbers.rising(step)
    if (done := numbers.done(step)) >= 1.0:
        return 0.0
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * (numbers.cycles * done % 1.0))))


def polynomial(step: int, numbers: Numbers) -> float:
    """`least` + (1 - `least`) (1 - done)^`power`."""
    if step < numbers.warmup:
        return numbers.rising(step)
    if step > numbers.total:
        return numbers.least
    return float((1.0 - numbers.least) * (1.0 - numbers.done(step)) ** numbers.power + numbers.least)


def inverse_sqrt(step: int, numbers: Numbers) -> float:
    """sqrt(timescale / (timescale + updates since the warm-up)) (Vaswani et al. 2017; Zhai et al. 2022)."""
    if step < numbers.warmup:
        return numbers.rising(step)
    return 1.0 / math.sqrt((step + numbers.timescale - numbers.warmup) / numbers.timescale)


def warmup_stable_decay(step: int, numbers: Numbers) -> float:
    """Rises from `least` to 1, stays, and falls to `least` over the last `decay` updates (Hu et al. 2024)."""
    if step < numbers.warmup:
        done = numbers.rising(step)
        shapes = {
            "linear": done,
            "cosine": 0.5 * (1.0 - math.cos(math.pi * done)),
            "1-sqrt": 1.0 - math.sqrt(1.0 - done),
        }
        return max(0.0, shapes[numbers.warmup_type] * (1.0 - numbers.least) + numbers.least)
    if step < numbers.total - numbers.decay:
        return 1.0
    if step >= numbers.total:
        return numbers.least
    done = (step - numbers.total + numbers.decay) / max(1, numbers.decay)
    if numbers.decay_type == "cosine":
        return _wave(done, numbers)
    shape = 1.0 - done if numbers.decay_type == "linear" else 1.0 - math.sqrt(done)
    return max(0.0, shape * (1.0 - numbers.least) + numbers.least)


def piecewise_constant(step: int, numbers: Numbers) -> float:
    """The factor of the first piece that is not over, else `last`."""
    return next((factor for until, factor in numbers.pieces if step < until), numbers.last)


def rex(step: int, numbers: Numbers) -> float:
    """(1 - z) / (1/2 + (1 - z) / 2), z: share that is done (Chen et al. 2021, "REX: Revisiting Budgeted Training").

    Above the straight line all the way: half of the rate is left after two thirds.
    """
    if step < numbers.warmup:
        return numbers.rising(step)
    left = max(0.0, 1.0 - numbers.done(step))
    return left / (0.5 + 0.5 * left)


def _wave(done: float, numbers: Numbers) -> float:
    wave = 0.5 * (1.0 + math.cos(math.pi * numbers.cycles * 2.0 * done))
    return max(0.0, wave * (1.0 - numbers.least) + numbers.least)
