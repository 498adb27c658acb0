"""Rules between the options of `safety_options`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sd_train.config.rules import Chosen


def check_safety(chosen: Chosen, warnings: list[str]) -> None:
    """Add what has no effect to `warnings`."""
    if not chosen.valid("nan_policy", "max_rollbacks", "snapshot_every_n_steps"):
        return
    values, policy = chosen.values, chosen.values["nan_policy"]
    # A run's own configuration file holds the defaults too.
    if "max_rollbacks" in chosen.given and values["max_rollbacks"] != 3 and policy != "rollback":
        warnings.append(f"{chosen.where('max_rollbacks')} has no effect: nan_policy is not rollback")
    if "snapshot_every_n_steps" in chosen.given and values["snapshot_every_n_steps"] != 100 and policy == "skip":
        warnings.append(f"{chosen.where('snapshot_every_n_steps')} has no effect: nan_policy is skip")
