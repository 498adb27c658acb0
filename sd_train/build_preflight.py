"""What a preflight has measured, in words, and what the whole run will take by it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import timedelta

import torch

from sd_train.files import nearest_folder
from sd_train.loop import Training
from sd_train.plan import Prepared
from sd_train.plan_report import Outputs, outputs, size_text
from sd_train.preflight import Cost, Measured, measure


def preflight(prepared: Prepared, run: Training, say: Callable[[str], None], warn: Callable[[str], None]) -> None:
    """Measure, and tell what the run will take.

    Raises:
        UserError: if what is measured cannot be done.
    """
    planned = outputs(prepared)
    measured = measure(run, state=any(save.state is not None for save in planned.saves))
    if not prepared.device.is_main:
        return
    say("\n".join(describe(prepared, planned, measured)))
    folder = nearest_folder(prepared.names.folder)
    free, needed = shutil.disk_usage(folder).free, disk_bytes(planned, measured)
    if free < needed:
        warn(
            f"--output_dir = {prepared.names.folder}: {size_text(free)} are free and about {size_text(needed)} are "
            "needed; free space, save less often, or keep fewer files with --save_last_n_steps or --save_last_n_epochs"
        )


def describe(prepared: Prepared, planned: Outputs, measured: Measured) -> list[str]:
    """A line for each thing that was measured, and one for the whole run."""
    accumulation = prepared.config.training.gradient_accumulation_steps
    update = accumulation * measured.batch.seconds + measured.step.seconds
    peak = max((cost.peak or 0 for cost in (measured.batch, measured.step)), default=0)
    batches = "1 batch" if accumulation == 1 else f"{accumulation} batches"
    split = f", computed in {measured.parts} parts" if measured.parts > 1 else ""
    lines = [
        f"preflight: an update of {batches} of {measured.samples} x {measured.width}x{measured.height}{split}: "
        f"{update:.3g} s{_peak(prepared, peak)}"
    ]
    if measured.picture is not None:
        lines.append(f"  a sample picture: {measured.picture.seconds:.3g} s{_peak(prepared, measured.picture.peak)}")
    state = f", its state {size_text(measured.state_bytes)}" if measured.state_bytes else ""
    lines.append(f"  a save: {measured.save.seconds:.3g} s; the model {size_text(measured.model_bytes)}{state}")
    updates = prepared.plan.total_steps - prepared.progress.step
    pictures, saves = planned.pictures, len(planned.saves)
    seconds = updates * update + pictures * _seconds(measured.picture) + saves * measured.save.seconds
    needed = disk_bytes(planned, measured)
    free = shutil.disk_usage(nearest_folder(prepared.names.folder)).free
    also = ", validation aside" if prepared.plan.validation else ""
    lines.append(
        f"  the whole run, if all updates were as large{also}: about {timedelta(seconds=round(seconds))} for {updates} "
        f"updates, sample pictures: {pictures}, saves: {saves}; about {size_text(needed)} on the disk, of which "
        f"{size_text(free)} are free"
    )
    return lines


def disk_bytes(planned: Outputs, measured: Measured) -> int:
    """The most that models and states of the run take together."""
    return planned.most_models * measured.model_bytes + planned.most_states * measured.state_bytes


def _seconds(cost: Cost | None) -> float:
    return 0.0 if cost is None else cost.seconds


def _peak(prepared: Prepared, peak: int | None) -> str:
    if not peak:
        return ""
    device = prepared.device.device
    if device.type != "cuda":
        return f", memory of the process up to {size_text(peak)}"
    return f", GPU memory up to {size_text(peak)} of {size_text(torch.cuda.get_device_properties(device).total_memory)}"
