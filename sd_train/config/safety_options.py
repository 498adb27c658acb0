"""Options for what happens when an update goes wrong, and for measuring before the first one."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sd_train.config.group import Group


class SafetyOptions(Group):
    """Updates that would spoil the weights, and a measured look ahead."""

    nan_policy: Literal["stop", "skip", "rollback"] = Field(
        "stop", description="When a loss or gradients are not finite: stop, saving a state from before that update; "
        "skip it; or rollback: go back to a snapshot in memory and train on without that update's images.",
    )  # fmt: skip
    loss_spike_factor: float | None = Field(
        None, gt=1, le=1e9, description="Treat an update in the same way whose loss is above this many times the "
        "median of the 100 before it; not given: losses may jump.",
    )  # fmt: skip
    max_rollbacks: int = Field(
        3, ge=1, le=1_000_000, description="With rollback: so many over all runs of the training, then it stops."
    )
    snapshot_every_n_steps: int = Field(
        100, ge=1, le=10**9, description="Updates between snapshots: the most that are computed anew."
    )
    preflight: bool = Field(
        False, description="Before the first update, measure memory and time of an update of the largest size, a "
        "sample picture and a save, and print what the whole run will take; the training does not change.",
    )  # fmt: skip
