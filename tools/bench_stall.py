"""What a save costs: how long the training stands still for it, and how long it takes beside a plain write.

For `tools/bench.py save`. A save is a file of weights and the state of AdamW over them. Rounds take turns: the same
bytes written to one file and synced, a save that the training waits for, one that is written beside it.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from sd_train.checkpoint import Checkpoint, Intervals
from sd_train.files import remove
from sd_train.names import FileNames
from sd_train.report import Report
from sd_train.save_copy import AsyncSave
from sd_train.snapshot import all_finite
from sd_train.state import MANIFEST, StateParts
from sd_train.trainables.base import ParamGroup
from sd_train.trainables.files import write_weights
from sd_train.types import Progress

MEGABYTE = 2**20
TENSORS = 192
"""About what the networks of a LoRA and the weights of a U-Net have, in order of magnitude."""


@dataclass
class Numbers:
    """A trainable of random numbers that belongs to no model."""

    params: dict[str, nn.Parameter] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """All of them."""
        return {name: parameter.detach() for name, parameter in self.params.items()}

    def for_inference(self) -> AbstractContextManager[None]:
        """Nothing is drawn."""
        return nullcontext()

    def save(self, path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor] | None = None) -> None:
        """As networks are saved."""
        write_weights(path, self.tensors() if tensors is None else tensors, metadata, None)


@dataclass(frozen=True)
class Spent:
    """Seconds."""

    stall: float
    """That the training stood still."""
    stall_cpu: float
    """Of its own thread, meanwhile."""
    total: float
    """Until everything was on the disk."""
    total_cpu: float
    """Of the whole process."""


def make_parts(megabytes: int) -> StateParts:
    """Weights and AdamW's averages of them, of so many megabytes together."""
    count = megabytes * MEGABYTE // (3 * 4 * TENSORS)
    numbers = Numbers({f"{number:03d}.weight": nn.Parameter(torch.randn(count)) for number in range(TENSORS)})
    optimizer = torch.optim.AdamW(numbers.params.values(), lr=1e-4, fused=True)
    for parameter in numbers.params.values():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    optimizer.zero_grad()
    group = ParamGroup("numbers", numbers.params, 1e-4)
    return StateParts(numbers, [group], optimizer, {}, "seed = 1\n", "0" * 64)  # type: ignore[arg-type]


def checkpoint_of(parts: StateParts, folder: Path, how: AsyncSave) -> Checkpoint:
    """What saves `parts` after every update."""
    report = Report(logging_dir=None, total_steps=10**6, console=False, is_main=False)
    return Checkpoint(
        FileNames(folder, how), Intervals(1, None, True, True), parts, lambda progress: {}, report, 10**6,
        is_main=True, async_save=how,
    )  # fmt: skip


def plain_write(parts: StateParts, path: Path) -> float:
    """Seconds of a plain write of what a save holds, to one file, and of its sync."""
    values = [tensor for state in parts.optimizer.state.values() for tensor in state.values() if tensor.numel() > 1]
    weights = [*parts.trainable.tensors().values()]
    blocks = [tensor.detach().view(-1).view(torch.uint8).numpy().data for tensor in (*weights, *weights, *values)]
    started = time.perf_counter()
    with path.open("wb") as file:
        for block in blocks:
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    spent = time.perf_counter() - started
    path.unlink()
    return spent


def timed(checkpoint: Checkpoint, progress: Progress) -> Spent:
    """One save after an update: the look at the weights that goes before it, the stall, and the rest."""
    clock, thread, process = time.perf_counter(), time.thread_time(), time.process_time()
    all_finite(checkpoint.parts.trainable.tensors().values())
    checkpoint(progress)
    stall, stall_cpu = time.perf_counter() - clock, time.thread_time() - thread
    with checkpoint:
        pass
    return Spent(stall, stall_cpu, time.perf_counter() - clock, time.process_time() - process)


def digests(folder: Path, name: str) -> dict[str, str]:
    """SHA-256 of what a save has left, but for what tells the time."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {
        str(path.relative_to(folder)).replace(name, "NAME"): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def rounds(megabytes: int, count: int, place: Path) -> Iterator[tuple[float, Spent, Spent, bool]]:
    """A plain write, a save that is waited for, one that is not, and whether they are equal to the bit; in turns."""
    parts = make_parts(megabytes)
    ways: tuple[AsyncSave, AsyncSave] = ("never", "always")
    checkpoints = {how: checkpoint_of(parts, place / how, how) for how in ways}
    for number in range(count):
        progress = Progress(0, 0, 0.0, step=number + 1)
        plain, spent, left = plain_write(parts, place / "plain"), list[Spent](), list[dict[str, str]]()
        for how, checkpoint in checkpoints.items():
            os.sync()
            spent.append(timed(checkpoint, progress))
            left.append(digests(place / how, how))
            remove(place / how)
        os.sync()
        yield plain, spent[0], spent[1], left[0] == left[1] and len(left[0]) == 6


def _median(values: list[float]) -> float:
    return round(statistics.median(values), 3)


def stall_figures(megabytes: int, count: int) -> dict[str, float | bool | list[float]]:
    """The figures of `count` rounds after a first one, in which the memory of the copies is new; medians."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        first, *found = rounds(megabytes, count + 1, Path(folder))
    return {
        "state_mb": megabytes,
        "plain_write_s": _median([plain for plain, *_ in found]),
        "waits_s": _median([waits.total for _, waits, *_ in found]),
        "waits_cpu_s": _median([waits.total_cpu for _, waits, *_ in found]),
        "waits_over_plain": _median([waits.total / plain for plain, waits, *_ in found]),
        "beside_s": _median([beside.total for *_, beside, _ in found]),
        "beside_cpu_s": _median([beside.total_cpu for *_, beside, _ in found]),
        "beside_over_plain": _median([beside.total / plain for plain, _, beside, _ in found]),
        "stall_s": _median([beside.stall for *_, beside, _ in found]),
        "stall_cpu_s": _median([beside.stall_cpu for *_, beside, _ in found]),
        "stall_over_write": _median([beside.stall / beside.total for *_, beside, _ in found]),
        "stall_over_write_cpu": _median([beside.stall_cpu / beside.total_cpu for *_, beside, _ in found]),
        "first_stall_over_write": round(first[2].stall / first[2].total, 3),
        "equal_to_the_bit": all(equal for *_, equal in (first, *found)),
        "plain_writes": [round(plain, 2) for plain, *_ in found],
        "waits": [round(waits.total, 2) for _, waits, *_ in found],
        "beside": [round(beside.total, 2) for *_, beside, _ in found],
    }
