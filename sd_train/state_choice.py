"""Which state `--resume` means: the one at a path, or the whole one of a run that was saved last."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from sd_train.errors import ConfigError, DataError
from sd_train.names import FileNames
from sd_train.state import order_of, read_manifest


def find_state(choice: str, names: FileNames, warn: Callable[[str], None]) -> Path:
    """The folder that `--resume` means: a path, or with "latest" the whole state of this run that was saved last.

    `warn` is told of broken ones that are passed over.

    Raises:
        ConfigError: if there is none.
        DataError: if the one at a path is broken; the whole one before it, if there is one, is named.
    """
    if choice != "latest":
        return _at_path(Path(choice))
    # Not the one that is furthest on: that may be what an earlier run left, before one went back and took another way.
    states = [(order_of(path), path) for path in names.states()]
    # Those that do not tell their place come first: they may be the last ones, and are told of in any case.
    for _, path in sorted(states, key=lambda state: (not any(state[0]), state[0]), reverse=True):
        try:
            read_manifest(path)
        except DataError as problem:
            warn(f"--resume = 'latest': passed over: {problem}")
        else:
            return path
    raise ConfigError(
        f"--resume = 'latest': {names.folder} holds no sealed state named {names.last}-...-state; "
        "states are written with --save_state; leave --resume away to start anew"
    )


def _at_path(path: Path) -> Path:
    """`path`, if it is a whole state."""
    where = f"--resume = {str(path)!r}"
    if path.is_file():
        raise ConfigError(
            f"{where}: is a file; give the -state folder, or start from the file's weights with --network_weights"
        )
    if not path.is_dir():
        raise ConfigError(f"{where}: there is no such state folder; give its path, or latest")
    try:
        read_manifest(path)
    except DataError as problem:
        before = _whole_before(path)
        way_out = "" if before is None else f": the whole one before it is --resume {before}"
        raise DataError(f"{where}: {problem}{way_out}") from None
    return path


def _whole_before(path: Path) -> Path | None:
    """The whole state beside the broken one at `path` that was saved before it, of the same run as far as names tell.

    Where its own place in the order cannot be read, the one that was saved last.
    """
    place, run = order_of(path), _of_run(path)
    others = [other for other in path.absolute().parent.glob("*-state") if _of_run(other) == run]
    ordered = sorted(((order_of(other), other) for other in others), reverse=True)
    for order, other in ordered:
        if order < place or (not any(place) and any(order)):
            try:
                read_manifest(other)
            except DataError:
                continue
            return path.parent / other.name
    return None


def _of_run(path: Path) -> str:
    """The run's name in that of a state folder; empty for a run without one."""
    name = re.sub(r"(?:-step\d{8}|-\d{6})?-state$", "", path.absolute().name)
    return "" if name in ("at", "epoch", "last") else name
