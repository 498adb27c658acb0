"""The options of safety -> what keeps the weights finite."""

from __future__ import annotations

from collections.abc import Callable

from sd_train.device import Updater
from sd_train.plan import Prepared
from sd_train.plan_report import size_text
from sd_train.safety import Safety
from sd_train.state import StateParts
from sd_train.watch import Watch

_BYTES_OF_A_NUMBER = 12
"""A weight and, for most optimizers, two more numbers, in float32."""
_SMALL = 2**30
"""Bytes of a snapshot that nobody has to ask for."""


def make_watch(prepared: Prepared, numbers: int, say: Callable[[str], None]) -> Watch:
    """What finds bad updates, where `numbers` learn: late, or before the optimizer's step.

    Late, so that nobody waits for the device, takes snapshots. Whoever asks for rollbacks gets them; otherwise they
    must be small, and reading at once must cost something: nothing waits on a CPU, and fp16 waits in any case.
    """
    config, device = prepared.config, prepared.device
    policy, small = config.safety.nan_policy, snapshot_bytes(prepared, numbers) <= _SMALL
    waits = device.device.type != "cuda" or device.precision == "fp16"
    late = policy == "rollback" or (policy == "stop" and small and not waits)
    if policy == "rollback":
        size, every = size_text(snapshot_bytes(prepared, numbers)), config.safety.snapshot_every_n_steps
        say(f"rollback: about {size} of memory hold a snapshot, which is renewed at least every {every} updates")
    return Watch(device, spike_factor=config.safety.loss_spike_factor, at_once=not late)


def make_safety(
    prepared: Prepared, watch: Watch, parts: StateParts, updater: Updater, say: Callable[[str], None]
) -> Safety:
    """What is done about bad updates."""
    chosen = prepared.config.safety
    return Safety(chosen.nan_policy, watch, parts, updater, say, chosen.max_rollbacks, chosen.snapshot_every_n_steps)


def snapshot_bytes(prepared: Prepared, numbers: int) -> int:
    """About what a snapshot takes in memory."""
    return numbers * (_BYTES_OF_A_NUMBER + (4 if prepared.config.ema.use_ema else 0))
