"""The updates of a training after which something is due."""

from __future__ import annotations

from sd_train.plan import Prepared


def multiples(every: int | None, start: int, end: int) -> range:
    """The multiples of `every` above `start`, up to `end`."""
    return range(0) if every is None else range((start // every + 1) * every, end + 1, every)


def epoch_ends(prepared: Prepared, every: int | None) -> dict[int, int]:
    """Update to come -> epochs that are complete after it, where `every` divides their number."""
    updates, plan = prepared.updates, prepared.plan
    ends: dict[int, int] = {}
    for epoch in multiples(every, 0, plan.epochs):
        end = updates.updates_before(epoch) + prepared.ahead
        if prepared.progress.step < end <= plan.total_steps and updates.updates_in(epoch - 1):
            ends[end] = epoch
    return ends
