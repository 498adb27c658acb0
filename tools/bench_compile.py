"""What `tools/bench.py compile` measures: graphs over 20 buckets, breaks, cold and warm seconds, an update, losses.

Each row is a process of its own with one thread, and seconds are CPU time; the warm row finds the cold row's programs.
The row "largest" begins with the largest bucket where the others begin with the smallest, and finds no programs.
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


def measure(scope: str, backend: str, first: str) -> dict[str, Any]:
    """Steps of a LoRA of rank 4 on a tiny model over all buckets; `scope` "plain": without compiling.

    `first`: "smallest" or "largest" bucket.
    """
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
        kinds = compile_unet(family.unet, settings, print).kinds
    width = family.unet.config["cross_attention_dim"]
    losses, norms, rounds = [0.0] * len(SIZES), [0.0] * len(SIZES), list[float]()
    order = [*enumerate(SIZES)][:: -1 if first == "largest" else 1]
    for _ in range(1 + ROUNDS):
        started = time.process_time()
        for place, size in order:
            drawn = torch.Generator().manual_seed(place)
            states = torch.randn(2, 77, width, generator=drawn)
            noisy = torch.randn(2, 4, *size, generator=drawn)
            loss = family.predict(noisy, torch.tensor([10, 800]), Conditioning(states)).square().mean()
            gradients = torch.autograd.grad(loss, parameters)
            losses[place] = float(loss.detach())
            norms[place] = float(torch.stack([each.norm() for each in gradients]).norm())
        rounds.append(time.process_time() - started)
    usual = statistics.median(rounds[1:])
    return {
        "graphs": counters["stats"]["unique_graphs"], "kinds": kinds, "breaks": sum(counters["graph_break"].values()),
        "compile_seconds": rounds[0] - usual, "step_ms": 1000 * usual / len(SIZES), "losses": losses,
        "norms": norms,
    }  # fmt: skip


def compile_figures(scope: str, backend: str) -> dict[str, Any]:
    """Plain, cold, warm and other rows ("raw"), and what the goals are set in."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as other:
        raw = {
            "plain": _alone("plain", backend, "smallest", folder),
            "cold": _alone(scope, backend, "smallest", folder),
            "warm": _alone(scope, backend, "smallest", folder),
            "largest": _alone(scope, backend, "largest", other),
        }
    plain, cold, warm = raw["plain"], raw["cold"], raw["warm"]
    pairs = [*zip(plain["losses"], cold["losses"], strict=True), *zip(plain["losses"], warm["losses"], strict=True)]
    return {
        "scope": scope, "backend": backend, "buckets": len(SIZES),
        "graphs": cold["graphs"], "kinds": cold["kinds"], "breaks": cold["breaks"],
        "cold_seconds": round(cold["compile_seconds"], 1), "warm_seconds": round(warm["compile_seconds"], 1),
        "step_over_plain": round(warm["step_ms"] / plain["step_ms"], 3),
        "loss_difference": max(abs(ours - theirs) / abs(theirs) for theirs, ours in pairs),
        "same_bits_warm": _same_bits(cold, warm),
        "same_bits_whichever_bucket_is_first": _same_bits(cold, raw["largest"]),
        "raw": raw,
    }  # fmt: skip


def _same_bits(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return all(ours[name] == theirs[name] for name in ("losses", "norms"))


def _alone(scope: str, backend: str, first: str, folder: str) -> dict[str, Any]:
    """`measure` in a process of its own, with its programs in `folder`."""
    done = subprocess.run(
        [sys.executable, __file__, scope, backend, first], env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{scope}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:4])))
