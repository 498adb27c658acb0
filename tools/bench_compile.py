"""What `tools/bench.py compile` measures: graphs over 20 buckets, breaks, cold and warm seconds, an update, losses.

Each row is a process of its own with one thread, and seconds are CPU time; the warm row finds the cold row's programs.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SIZES = tuple((height, width) for height in range(8, 40, 8) for width in range(8, 48, 8))
"""Twenty buckets, in latents."""
ROUNDS = 3


def measure(scope: str, backend: str) -> dict[str, Any]:
    """Steps of a LoRA of rank 4 on a tiny model over all buckets; `scope` "plain": without compiling."""
    import torch
    from torch._dynamo.utils import counters

    from sd_train.compiling import CompileSettings, compile_unet
    from sd_train.demo.tiny_model import make_tiny_parts
    from sd_train.families.latent import LatentDiffusion
    from sd_train.families.registry import make_family
    from sd_train.trainables.lora import Lora, LoraSettings
    from sd_train.types import Conditioning

    torch.set_num_threads(1)
    torch.manual_seed(0)
    family = make_family(make_tiny_parts("sd1", 0))
    assert isinstance(family, LatentDiffusion)
    lora = Lora(LoraSettings(rank=4, alpha=4.0, dropout=0.0, rates={"unet": 1.0}, seed=0))
    lora.install(family)
    parameters = [parameter for group in lora.groups() for parameter in group.params.values()]
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.1)
    kinds = 0
    if scope != "plain":
        settings = CompileSettings("whole" if scope == "whole" else "regional", backend, 2, SIZES)
        kinds = compile_unet(family.unet, settings).kinds
    width = family.unet.config["cross_attention_dim"]
    losses, rounds = list[float](), list[float]()
    for _ in range(1 + ROUNDS):
        started, losses = time.process_time(), []
        for place, size in enumerate(SIZES):
            drawn = torch.Generator().manual_seed(place)
            states = torch.randn(2, 77, width, generator=drawn)
            noisy = torch.randn(2, 4, *size, generator=drawn)
            loss = family.predict(noisy, torch.tensor([10, 800]), Conditioning(states)).square().mean()
            torch.autograd.grad(loss, parameters)
            losses.append(float(loss.detach()))
        rounds.append(time.process_time() - started)
    usual = statistics.median(rounds[1:])
    return {
        "graphs": counters["stats"]["unique_graphs"], "kinds": kinds, "breaks": sum(counters["graph_break"].values()),
        "compile_seconds": rounds[0] - usual, "step_ms": 1000 * usual / len(SIZES), "losses": losses,
    }  # fmt: skip


def compile_figures(scope: str, backend: str) -> dict[str, Any]:
    """Plain, cold and warm rows ("raw"), and what the goals are set in."""
    with tempfile.TemporaryDirectory() as folder:
        given = {"plain": "plain", "cold": scope, "warm": scope}
        raw = {name: _alone(each, backend, folder) for name, each in given.items()}
    plain, cold, warm = raw["plain"], raw["cold"], raw["warm"]
    pairs = [*zip(plain["losses"], cold["losses"], strict=True), *zip(plain["losses"], warm["losses"], strict=True)]
    return {
        "scope": scope, "backend": backend, "buckets": len(SIZES),
        "graphs": cold["graphs"], "kinds": cold["kinds"], "breaks": cold["breaks"],
        "cold_seconds": round(cold["compile_seconds"], 1), "warm_seconds": round(warm["compile_seconds"], 1),
        "step_over_plain": round(warm["step_ms"] / plain["step_ms"], 3),
        "loss_difference": max(abs(ours - theirs) / abs(theirs) for theirs, ours in pairs),
        "same_bits_warm": cold["losses"] == warm["losses"],
        "raw": raw,
    }  # fmt: skip


def _alone(scope: str, backend: str, folder: str) -> dict[str, Any]:
    """`measure` in a process of its own, with its programs in `folder`."""
    done = subprocess.run(
        [sys.executable, __file__, scope, backend], env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{scope}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:3])))
