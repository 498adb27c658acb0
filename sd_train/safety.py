"""What is done about an update that would spoil the weights: stop before it, skip it, or go back and leave it out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from sd_train.device import Updater
from sd_train.errors import RunError
from sd_train.snapshot import Snapshot, all_finite, take_snapshot
from sd_train.state import StateParts
from sd_train.types import QUARANTINE, Progress, Update
from sd_train.watch import Seen, Suspect, Watch

Policy = Literal["stop", "skip", "rollback"]
MOST_SKIPPED = 20
"""Updates in a row: more are no accident."""
MOST_NAMED = 8
"""Files in a message."""


@dataclass
class Safety:
    """Keeps the weights finite, by one of the policies.

    Where verdicts are read late, snapshots are kept: an update that turns out bad is undone with all that came after
    it, and those before it are computed anew, to the bit what they were. With "rollback" the training then goes on
    without it; with "stop" it ends in front of it.
    """

    policy: Policy
    watch: Watch
    parts: StateParts
    updater: Updater
    say: Callable[[str], None]
    most_rollbacks: int
    every_n_steps: int
    """Updates between two snapshots, at most."""
    last: int | None = field(default=None, init=False)
    """The update (from zero) in front of which the run ends."""
    _end: Suspect | None = field(default=None, init=False)
    """Why it does."""
    _snapshot: Snapshot | None = field(default=None, init=False)
    _anew_until: int = field(default=0, init=False)
    """The update (from zero) up to which everything has been computed before."""
    _skipped: int = field(default=0, init=False)
    """In a row."""
    _seen: Seen = field(default=(), init=False)
    """Of the last update."""

    def begin(self, progress: Progress) -> None:
        """Call before the first update of this run."""
        if not self.watch.at_once:
            self._snapshot = take_snapshot(self.parts, progress)

    def accepts(self, update: Update, loss: Tensor, norm: Tensor, seen: Seen) -> bool:
        """Whether the optimizer is to take its step of `update`.

        Raises:
            Suspect: if the run cannot go on from here; see `recover`.
        """
        self._seen = seen
        try:
            self.watch.look(update.step, loss, norm, seen)
        except Suspect as found:
            if self.policy != "skip" or self._skipped + 1 >= MOST_SKIPPED:
                raise
            self._skipped += 1
            self.say(f"skipped {_described(found)}")
            return False
        self._skipped = 0
        return True

    def replays(self, progress: Progress) -> bool:
        """Whether the update that was just made is one from before a rollback, computed anew."""
        return progress.step < self._anew_until

    def settle(self, progress: Progress) -> None:
        """Make sure that every update so far is a good one; waits for the device.

        Raises:
            Suspect: if one is not.
        """
        self.watch.settle()
        # An optimizer can make of finite gradients what is not.
        if not self.finite():
            files = self.watch.device.gather([path for paths, _ in self._seen for path in paths])
            raise Suspect(progress.step - 1, "the weights after it are not finite", files)

    def after(self, progress: Progress, due: bool) -> None:
        """Call after each update; `due`: something was saved, shown or scored, which is not to be done again.

        Raises:
            Suspect: as `settle`.
        """
        if self._snapshot is None or not (due or progress.step - self._snapshot.progress.step >= self.every_n_steps):
            return
        if not due:
            self.settle(progress)
        self._snapshot = take_snapshot(self.parts, progress, self._snapshot)

    def recover(self, found: Suspect, progress: Progress) -> None:
        """Undo the update that was found, and all after it; then the run goes on, at the latest until `last`."""
        self.watch.forget()
        if self._snapshot is None:
            # It was found before its step, so there is nothing to undo.
            self.last, self._end = progress.step, found
            return
        self._restore(self._snapshot, progress)
        self._anew_until = found.step
        quarantined = quarantine(progress)
        if self.policy == "rollback" and self.last is None and len(quarantined) < self.most_rollbacks:
            quarantined.append({"step": found.step, "reason": found.reason, "files": found.files})
            self.say(
                f"went back to update {progress.step}, to train on without {_described(found)}; rollback "
                f"{len(quarantined)} of at most {self.most_rollbacks}"
            )
            return
        self.last, self._end = found.step, found

    def stop(self, progress: Progress, save: Callable[[Progress], None]) -> RunError:
        """Save a state in front of what was found; the error that ends the run."""
        found = self._end
        assert found is not None
        if not self.finite() and self._snapshot is not None:
            self._restore(self._snapshot, progress)
        saved = progress.step > 0 and self.finite()
        if saved:
            save(progress)
            # A launcher ends all processes soon after the first one that fails: not before the save is whole.
            self.watch.device.barrier()
        return RunError(*self._report(found, progress, saved))

    def keep(self, progress: Progress, whole: bool, save: Callable[[Progress], None]) -> None:
        """Save what there is when something else ends the run; `whole`: it was not in the middle of a step."""
        if not (whole and self.watch.all_good() and self.finite()):
            self.watch.forget()
            if self._snapshot is None:
                return
            self._restore(self._snapshot, progress)
        if progress.step:
            save(progress)

    def _report(self, found: Suspect, progress: Progress, saved: bool) -> list[str]:
        """The problem and the ways out, and what was left out before."""
        lines = [f"stopped before {_described(found)}"]
        if self._skipped:
            lines[0] += f"; the {self._skipped} updates before it were skipped"
        if saved:
            kept = f"the state after update {progress.step} is saved"
            ways = "mend or remove the images and --resume it with a lower learning rate"
            if self.policy == "stop":
                ways += ", or with --nan_policy rollback, which trains on without them"
        else:
            kept = "nothing is saved: " + ("no update was done" if progress.step == 0 else "its weights are not finite")
            ways = "lower the learning rate, and look at the images with sd-train doctor"
        lines[0] += f"; {kept}; {ways}"
        left_out = quarantine(progress)
        if self.policy == "rollback" and left_out:
            lines[0] += f" (--max_rollbacks {self.most_rollbacks} are done)"
            lines += [f"left out before: {_told(one['step'], one['reason'], one['files'])}" for one in left_out]
        return lines

    def _restore(self, snapshot: Snapshot, progress: Progress) -> None:
        left_out = quarantine(progress)
        self.updater.renew()
        snapshot.restore(self.parts, progress)
        # It is not of the past: the snapshot may be older than what was found since.
        progress.extra[QUARANTINE] = left_out

    def finite(self) -> bool:
        """Whether the weights and their average are, as they stand."""
        average = {} if self.parts.ema is None else self.parts.ema.tensors
        return all_finite([*self.parts.trainable.tensors().values(), *average.values()])


def quarantine(progress: Progress) -> list[dict[str, Any]]:
    """The updates that are left out, with their reasons and files: the list in `progress` itself."""
    found: list[dict[str, Any]] = progress.extra.setdefault(QUARANTINE, [])
    return found


def _described(found: Suspect) -> str:
    return _told(found.step, found.reason, found.files)


def _told(step: int, reason: str, files: list[str]) -> str:
    """`update 13 (its loss is nan; a.jpg, b.jpg)`, the number from one."""
    named = ", ".join(files[:MOST_NAMED]) + (f" and {len(files) - MOST_NAMED} more" if len(files) > MOST_NAMED else "")
    return f"update {step + 1} ({reason}; {named})" if named else f"update {step + 1} ({reason})"
