"""`sd-train cache inspect|verify|gc`: what the cache folder holds, whether it is whole, and what can go."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sd_train.data.shards import SUFFIX, BadShard, ShardHead, copy_rows, damaged_rows, read_head
from sd_train.data.store import default_cache_dir
from sd_train.errors import ConfigError, DataError, RunError

KINDS = ("latents", "texts")
"""Folders of shards under the cache folder."""

LEFTOVER_SECONDS = 24 * 3600.0
"""Unfinished files that are older belong to no living process."""


@dataclass(frozen=True)
class Damage:
    """A file that cannot be used, or not in whole."""

    file: str
    reason: str
    rows: int | None = None
    """Damaged rows; None: the whole file."""


@dataclass
class Holdings:
    """What one kind of cache holds."""

    shards: int = 0
    rows: int = 0
    bytes: int = 0
    last_used_days: float | None = None
    """Since the last use of the shard that was used last."""
    unused_days: float | None = None
    """Since the last use of the shard that was left alone longest."""
    leftovers: int = 0
    """Unfinished files, of runs that were cut off or that are writing now."""
    damaged: list[Damage] = field(default_factory=list)


@dataclass(frozen=True)
class Removal:
    """What `gc` would do to one file."""

    path: Path
    reason: str
    size: int
    """Bytes that become free."""
    keep: NDArray[np.bool_] | None = None
    """[N]: the rows that stay, in a new file; None: the file goes."""


def inspect(folder: Path) -> Holdings:
    """What the shards in `folder` say of themselves; their rows are not read."""
    found, now = Holdings(), time.time()
    for path, head in _shards(folder):
        stat = path.stat()
        found.bytes += stat.st_size
        if not isinstance(head, ShardHead):
            found.damaged.append(Damage(path.name, head))
            continue
        days = max(0.0, now - stat.st_mtime) / 86400
        found.shards += 1
        found.rows += len(head)
        found.last_used_days = days if found.last_used_days is None else min(days, found.last_used_days)
        found.unused_days = days if found.unused_days is None else max(days, found.unused_days)
    found.leftovers = len(list(_leftovers(folder)))
    return found


def verify(folder: Path, repair: bool) -> list[Damage]:
    """Read every row in `folder`; the damaged ones, which `repair` removes.

    Raises:
        RunError: if the disk refuses the repair.
    """
    found = []
    for path, head in _shards(folder):
        bad = np.empty(0, np.int64)
        reason = None if isinstance(head, ShardHead) else head
        try:
            if isinstance(head, ShardHead):
                bad = damaged_rows(path, head)
        except (BadShard, OSError) as problem:
            reason = str(problem)
        if reason is None and not len(bad):
            continue
        if isinstance(head, ShardHead) and reason is None:
            found.append(Damage(str(path), f"{len(bad)} of {len(head)} rows do not have their checksum", len(bad)))
            keep = np.ones(len(head), np.bool_)
            keep[bad] = False
        else:
            found.append(Damage(str(path), reason or ""))
            keep = None
        if repair:
            _remove(Removal(path, "damaged", 0, keep))
    return found


def superfluous(folder: Path, older_than: float | None, everything: bool) -> list[Removal]:
    """What `gc` removes from `folder`: leftovers, damaged files, rows that stand twice, and what was asked for.

    `older_than`: days since the last use of a shard.
    """
    found, now, seen = [], time.time(), np.empty(0, "S16")
    for path in _leftovers(folder):
        stat = path.stat()
        if now - stat.st_mtime > LEFTOVER_SECONDS:
            found.append(Removal(path, "unfinished", stat.st_size))
    # The shards that were used last stay when rows stand twice.
    shards = sorted(_shards(folder), key=lambda pair: (-pair[0].stat().st_mtime, pair[0].name))
    for path, head in shards:
        stat = path.stat()
        if not isinstance(head, ShardHead):
            found.append(Removal(path, f"damaged: {head}", stat.st_size))
        elif everything:
            found.append(Removal(path, "everything goes", stat.st_size))
        elif older_than is not None and now - stat.st_mtime > 86400 * older_than:
            found.append(Removal(path, f"not used for {(now - stat.st_mtime) / 86400:.0f} days", stat.st_size))
        else:
            keep = np.zeros(len(head), np.bool_)
            keep[np.unique(head.keys, return_index=True)[1]] = True
            keep &= ~np.isin(head.keys, seen)
            seen = np.concatenate((seen, head.keys[keep]))
            if not keep.any():
                found.append(Removal(path, "all rows stand elsewhere too", stat.st_size))
            elif not keep.all():
                twice = int((~keep).sum())
                found.append(Removal(path, f"{twice} rows stand elsewhere too", twice * head.row_bytes, keep))
    return found


def main(argv: Sequence[str]) -> int:
    """Do what `argv` asks for.

    Raises:
        ConfigError: if the folder that was given is none.
        DataError: if `verify` finds damage and does not repair it.
        RunError: if the disk refuses.
    """
    given = _parser().parse_args(argv)
    cache_dir: Path = given.cache_dir or default_cache_dir()
    if given.cache_dir is not None and not cache_dir.is_dir():
        raise ConfigError(f"--cache_dir = {cache_dir}: is no folder; give the --cache_dir of your training")
    if given.action == "inspect":
        _inspect(cache_dir, given.json)
    elif given.action == "verify":
        _verify(cache_dir, given.repair)
    else:
        _gc(cache_dir, given)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("sd-train cache", description=__doc__, allow_abbrev=False)
    actions = parser.add_subparsers(dest="action", required=True)
    inspecting = actions.add_parser("inspect", help="tell what is there", allow_abbrev=False)
    inspecting.add_argument("--json", action="store_true", help="for machines")
    verifying = actions.add_parser("verify", help="read everything and list what is damaged", allow_abbrev=False)
    verifying.add_argument("--repair", action="store_true", help="remove what is damaged; runs encode it anew")
    cleaning = actions.add_parser(
        "gc", help="remove what nobody needs: damaged and unfinished files, rows that stand twice", allow_abbrev=False
    )
    cleaning.add_argument("--older_than", type=float, metavar="DAYS", help="also files not used for so many days")
    cleaning.add_argument("--all", action="store_true", help="everything")
    cleaning.add_argument("--yes", action="store_true", help="do it; without, only tell")
    for action in (inspecting, verifying, cleaning):
        action.add_argument("--cache_dir", type=Path, help="default: $SD_TRAIN_CACHE, else the user's cache folder")
    return parser


def _inspect(cache_dir: Path, as_json: bool) -> None:
    found = {kind: inspect(cache_dir / kind) for kind in KINDS}
    if as_json:
        kinds = {kind: asdict(holdings) for kind, holdings in found.items()}
        print(json.dumps({"cache_dir": str(cache_dir), "kinds": kinds}, indent=2))
        return
    print(cache_dir)
    for kind, holdings in found.items():
        used = "" if holdings.last_used_days is None else (
            f", used last {holdings.last_used_days:.1f} days ago, its oldest file {holdings.unused_days:.1f}"
        )
        print(f"  {kind:8} {holdings.rows:,} rows in {holdings.shards:,} files, {_size(holdings.bytes)}{used}")
        for damage in holdings.damaged:
            print(f"           damaged: {damage.file}: {damage.reason}")
        if holdings.leftovers:
            print(f"           {holdings.leftovers} unfinished files")


def _verify(cache_dir: Path, repair: bool) -> None:
    damaged, rows = [], 0
    for kind in KINDS:
        rows += inspect(cache_dir / kind).rows
        damaged += verify(cache_dir / kind, repair)
    lines = [f"{damage.file}: {damage.reason}" for damage in damaged]
    if damaged and not repair:
        way_out = f"remove it with sd-train cache verify --repair --cache_dir {cache_dir}; runs encode it anew"
        raise DataError(*(f"{line}; {way_out}" for line in lines))
    for line in lines:
        print(f"removed: {line}")
    print(f"{cache_dir}: {rows:,} rows read, {len(damaged)} files damaged")


def _gc(cache_dir: Path, given: argparse.Namespace) -> None:
    freed = 0
    for kind in KINDS:
        for removal in superfluous(cache_dir / kind, given.older_than, given.all):
            if given.yes:
                _remove(removal)
            done = "removed" if given.yes else "would remove"
            print(f"{done} {_size(removal.size)}: {removal.path} ({removal.reason})")
            freed += removal.size
    more = "" if given.yes or not freed else "; do it with --yes, while nothing is training"
    print(f"{cache_dir}: {_size(freed)} {'freed' if given.yes else 'to free'}{more}")


def _remove(removal: Removal) -> None:
    try:
        if removal.keep is not None:
            copy_rows(removal.path, read_head(removal.path), removal.keep)
        removal.path.unlink(missing_ok=True)
    except BadShard as problem:
        raise RunError(f"{removal.path}: has changed meanwhile ({problem}); run sd-train cache verify again") from None
    except OSError as problem:
        raise RunError(f"{removal.path}: cannot be removed ({problem}); end what uses it and try again") from None


def _shards(folder: Path) -> Iterator[tuple[Path, ShardHead | str]]:
    """Each file of `folder` with its head, or with what is wrong with it."""
    for path in sorted(folder.glob(f"*{SUFFIX}")) if folder.is_dir() else ():
        if path.name.startswith("."):
            continue
        try:
            yield path, read_head(path)
        except FileNotFoundError:
            continue
        except (BadShard, OSError) as problem:
            yield path, str(problem)


def _leftovers(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.glob(f".*{SUFFIX}.*.tmp")) if folder.is_dir() else ()


def _size(count: int) -> str:
    for unit, power in (("GB", 1e9), ("MB", 1e6)):
        if count >= power:
            return f"{count / power:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"
