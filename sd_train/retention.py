"""Which saves are old: `--save_last_n_epochs`, `--save_last_n_steps`, and their `_state` forms for states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sd_train.files import remove
from sd_train.names import FileNames, Moment


@dataclass(frozen=True)
class Retention:
    """How far back saves are kept; None: all of them.

    sd-scripts deletes the one file that this rule newly makes old; here it is whatever the rule makes old, so that
    nothing stays behind after a change of interval or a resume.
    """

    epochs: int | None = None
    """`--save_last_n_epochs` times `--save_every_n_epochs`: models of so many epochs are kept."""
    epochs_state: int | None = None
    steps: int | None = None
    """`--save_last_n_steps`: models of the last so many updates are kept, also the one right before them."""
    steps_state: int | None = None

    def is_old(self, moment: Moment, now: Moment, state: bool) -> bool:
        """Whether the save of `now` makes that of `moment` old; saves of updates and of epochs are apart."""
        if moment[0] != now[0]:
            return False
        if now[0] == "epoch":
            kept, age = self.epochs_state if state else self.epochs, now[1] - moment[1] + 1
        else:
            kept, age = self.steps_state if state else self.steps, now[1] - moment[1]
        return kept is not None and age > kept

    def outdated(self, names: FileNames, now: Moment, state: bool = True) -> list[Path]:
        """The models and, if it has a `state` too, the states that the save of `now` makes old, models first."""
        found = []
        for path in names.existing():
            moment, is_state = names.moment(path), path.name.endswith("-state")
            if moment is not None and self.is_old(moment, now, is_state) and (state or not is_state):
                found.append(path)
        return sorted(found, key=lambda path: (path.name.endswith("-state"), path.name))

    def delete(self, names: FileNames, now: Moment, warn: Callable[[str], None], state: bool = True) -> list[Path]:
        """Delete what is old, and return what is gone; call it when the newest save is whole.

        Without a new `state` the old ones stay: they are all that a training can go on from. `warn` is told what
        cannot be deleted: a full disk later is a better reason to stop than this.
        """
        gone = []
        for path in self.outdated(names, now, state):
            try:
                remove(path)
            except OSError as problem:
                warn(f"{path}: is old and cannot be deleted ({problem.strerror}); check its permissions")
            else:
                gone.append(path)
        return gone
