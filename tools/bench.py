"""Measurements that anyone can repeat.

`python tools/bench.py overhead`: what the trainer costs beside its arithmetic.
`python tools/bench.py data`: how fast folders are indexed, ordered and cached, beside plain loops.
`python tools/bench.py save`: how long a training stands still for a save, and what that takes beside a plain write.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# One thread, before torch is imported: CPU time of several would count waiting for each other.
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

DATASET = """
[[datasets]]
resolution = 64
batch_size = {batch}
enable_bucket = true
min_bucket_reso = 64
max_bucket_reso = 128
[[datasets.subsets]]
image_dir = '{folder}'
caption_extension = ".txt"
shuffle_caption = true
num_repeats = 40
"""


@dataclass
class Clock:
    """CPU time of the whole process and, within it, of the core: text encoder, U-Net, backward, clip, optimizer."""

    core: float = 0.0
    marks: list[tuple[float, float]] = field(default_factory=list)
    """After each update: CPU seconds of the process so far, of the core so far."""

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with its time counted as core."""

        def call(*arguments: Any, **named: Any) -> Any:
            # The core runs in the training's own thread; threads that prepare batches must not count for it.
            started = time.thread_time()
            try:
                return function(*arguments, **named)
            finally:
                self.core += time.thread_time() - started

        return call

    def marking(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, called once an update, noting the times."""

        def call(*arguments: Any, **named: Any) -> Any:
            result = function(*arguments, **named)
            self.marks.append((time.process_time(), self.core))
            return result

        return call


def overhead(steps: int, batch: int, warmup: int, workers: int) -> dict[str, float]:
    """Train a LoRA of rank 4 on the tiny model with cached latents; CPU milliseconds of an update, and the ratio."""
    from sd_train.demo.tiny_model import save_tiny_model
    from sd_train.device import Updater
    from sd_train.families.latent import LatentDiffusion
    from sd_train.report import Report
    from sd_train.train_network import main as train_network

    clock = Clock()
    parts: list[tuple[Any, str]] = [
        (LatentDiffusion, "encode_texts"),
        (LatentDiffusion, "predict"),
        (Updater, "backward"),
        (Updater, "reduce"),
        (Updater, "apply"),
    ]
    watched = [(owner, name, clock.timed) for owner, name in parts] + [(Report, "update", clock.marking)]
    for owner, name, watch in watched:
        setattr(owner, name, watch(getattr(owner, name)))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        save_tiny_model(place / "model.safetensors", 0)
        photos = Path(__file__).resolve().parents[1] / "sd_train" / "demo" / "photos"
        (place / "dataset.toml").write_text(DATASET.format(batch=batch, folder=photos), encoding="utf-8")
        options = f"""--pretrained_model_name_or_path {place / "model.safetensors"} --dataset_config
            {place / "dataset.toml"} --output_dir {place / "out"} --logging_dir {place / "logs"} --cache_latents
            --network_dim 4 --learning_rate 1e-4 --seed 0 --max_train_steps {steps + warmup}
            --max_data_loader_n_workers {workers}"""
        if code := train_network(options.split()):
            raise SystemExit(code)
    whole = [after[0] - before[0] for before, after in zip(clock.marks, clock.marks[1:], strict=False)][warmup:]
    core = [after[1] - before[1] for before, after in zip(clock.marks, clock.marks[1:], strict=False)][warmup:]
    return {
        "updates": len(whole),
        "trainer_ms": round(1000 * statistics.fmean(whole), 2),
        "core_ms": round(1000 * statistics.fmean(core), 2),
        "other_ms": round(1000 * (statistics.fmean(whole) - statistics.fmean(core)), 2),
        "trainer_over_core": round(sum(whole) / sum(core), 4),
        "median_ratio": round(statistics.median(w / c for w, c in zip(whole, core, strict=True)), 4),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def main() -> int:
    """Run the measurement that the command line names and print it as JSON."""
    parser = argparse.ArgumentParser(description="Measurements that anyone can repeat.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("overhead", help="CPU time of the trainer over that of its arithmetic, one thread")
    command.add_argument("--steps", type=int, default=200, help="updates that are measured")
    command.add_argument("--warmup", type=int, default=10, help="updates before them")
    command.add_argument("--batch", type=int, default=4)
    command.add_argument("--workers", type=int, default=1, help="threads that prepare batches")
    command = commands.add_parser("data", help="images indexed, ordered and cached a second, beside plain loops")
    command.add_argument("--images", type=int, default=100_000, help="files of the folder that is indexed")
    command.add_argument("--rounds", type=int, default=3, help="each figure is the best of so many")
    command.add_argument("--no_cache", action="store_true", help="leave the figures of the latents cache out")
    command = commands.add_parser("save", help="the stall of a save and its time beside a plain write, in this folder")
    command.add_argument("--megabytes", type=int, default=1024, help="of a state: weights and what AdamW keeps")
    command.add_argument("--rounds", type=int, default=5, help="the figures are medians of so many")
    given = parser.parse_args()
    if given.command == "save":
        from bench_stall import stall_figures

        print(json.dumps(stall_figures(given.megabytes, given.rounds), indent=1))
        return 0
    if given.command == "data":
        from bench_data import data_figures

        print(json.dumps(data_figures(given.images, given.rounds, not given.no_cache), indent=1))
        return 0
    print(json.dumps(overhead(given.steps, given.batch, given.warmup, given.workers)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
