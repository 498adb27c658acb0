"""A training survives what happens to it: the short form of `tools/chaos.py`, and what saves take of memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sd_train.trainables.files import write_weights
from tests.runs import SOURCES, environment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")


def test_a_training_survives_kills_signals_full_disks_and_damage() -> None:
    options = "--kills 8 --others 1 --lora_alone --seed 5"
    arguments = [sys.executable, str(SOURCES / "tools" / "chaos.py"), *options.split()]
    # Many processes, one after the other, on a machine that may have much else to do.
    run = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=1200, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = [line.rpartition(": ") for line in run.stdout.splitlines()]
    counts = {name: int(count) for name, _, count in lines if count.isdecimal()}
    for what, number in (("kills", 8), ("stops", 1), ("refusals", 1)):
        assert counts[what] == counts[f"{what}: equal to the bit in the end"] == number
    assert counts["kills after update 1"] >= 4
    assert counts["kills inside a save"] >= 2
    assert counts["kills: resumed"] >= 2
    assert counts["damaged states passed over, equal to the bit in the end"] == 1
    assert counts["bytes lost"] == 0
    assert run.stdout.endswith("\n0 problems\n")


@pytest.mark.parametrize("name", ["network.safetensors", "table.safetensors", "network.pt"])
def test_tensors_are_cast_and_written_one_by_one(name: str, tmp_path: Path) -> None:
    from tools.bench_save import growth

    def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        write_weights(path, tensors, {}, torch.float16, hashes=name != "table.safetensors")

    tensors = {f"{number}": torch.full((1 << 21,), float(number)) for number in range(24)}
    # What the libraries load and keep when they are first used is no part of it.
    write(tmp_path / f"first-{name}", dict(list(tensors.items())[:3]))
    figures = growth(lambda path: write(path, tensors), tmp_path / name, tensors.values())
    assert figures["file"] >= 100
    assert figures["growth"] <= figures["largest_tensor"] + 0.1 * figures["file"] + 16
