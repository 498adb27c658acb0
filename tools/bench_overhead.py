"""What `tools/bench.py overhead` measures: a training's CPU time beside its arithmetic, and beside diffusers' step.

Every case is a process of its own, one thread; the cases take turns, and each figure is the median of the rounds.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

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
shuffle_caption = {shuffle}
num_repeats = 80
{more}
"""
PHOTOS = ROOT / "sd_train" / "demo" / "photos"
UNET = "--stop_text_encoder_training -1"
CACHED = "--cache_latents --cache_text_encoder_outputs"
CASES = {
    "lora": ("train_network", f"--network_dim 4 --learning_rate 1e-4 --network_train_unet_only {CACHED}"),
    "lora_and_text": ("train_network", "--network_dim 4 --learning_rate 1e-4 --cache_latents"),
    "full": ("train_db", f"{UNET} --learning_rate 1e-4 {CACHED}"),
    "full_ema": ("train_db", f"{UNET} --learning_rate 1e-4 --use_ema {CACHED}"),
    "full_uncached": ("train_db", f"{UNET} --learning_rate 1e-4"),
    "lora_uncached": ("train_network", "--network_dim 4 --learning_rate 1e-4 --network_train_unet_only"),
    "ti": (
        "train_textual_inversion",
        "--token_string thing-1 --init_word animal --use_object_template --learning_rate 1e-4 --cache_latents",
    ),
}
"""Name -> command and options."""
BARE = {"bare_lora": (True, False), "bare_full": (False, False), "bare_full_ema": (False, True)}
"""Name -> whether a LoRA is trained, and whether an average is kept."""
PLAIN = ("lora", "full")
"""What is computed anew by the plain path."""
COMPARED = 4
"""Updates whose losses are computed anew by the plain path."""
WIDTHS = {"tiny": [32, 64, 64, 64], "small": [64, 128, 256, 256]}


@dataclass
class Clock:
    """CPU time of the whole process and, within it, of the core: encoders, U-Net, backward, clip, optimizer."""

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


def make_model(folder: Path, name: str) -> Path:
    """A model of Stable Diffusion 1.5's topology with random weights, none of them zero, as a diffusers folder."""
    import torch

    from sd_train.demo.tiny_model import make_tiny_parts, tiny_configs
    from sd_train.families.saving import save_model

    configs = tiny_configs("sd1")
    configs["unet"]["block_out_channels"] = WIDTHS[name]
    path = folder / name
    torch.manual_seed(0)
    save_model(path, make_tiny_parts("sd1", 0, configs), "diffusers_safetensors", None, {})
    return path


def run_case(name: str, model: Path, batch: int, steps: int, warmup: int, compare: bool) -> dict[str, float]:
    """Train as case `name` says; CPU milliseconds of an update, or of COMPARED updates what sets them off from plain
    ones."""
    if name in BARE:
        from bench_bare import bare_marks

        lora, ema = BARE[name]
        marks = bare_marks(model, PHOTOS, lora=lora, ema=ema, batch=batch, steps=steps + warmup)
        return {"trainer_ms": 1000 * (marks[-1] - marks[warmup - 1]) / steps, "peak_rss_mb": _peak()}
    clock = Clock()
    if compare:
        from bench_plain import Recorder, largest_differences

        recorder, steps, warmup = Recorder(COMPARED), COMPARED, 0
    else:
        _watch(clock)
    command, options = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        uncached = "uncached" in name
        more = "flip_aug = true" if uncached else ""
        shuffle = "false" if "cache_text" in options or uncached else "true"
        dataset = DATASET.format(batch=batch, folder=PHOTOS, shuffle=shuffle, more=more)
        (place / "dataset.toml").write_text(dataset, encoding="utf-8")
        words = f"""--pretrained_model_name_or_path {model} --dataset_config {place / "dataset.toml"}
            --output_dir {place / "out"} --logging_dir {place / "logs"} --cache_dir {place / "cache"} --seed 0
            --max_train_steps {steps + warmup} --save_model_as safetensors {options}"""
        module = importlib.import_module(f"sd_train.{command}")
        if code := module.main(words.split()):
            raise SystemExit(code)
    if compare:
        return largest_differences(model, recorder)
    wholes = [after[0] - before[0] for before, after in zip(clock.marks, clock.marks[1:], strict=False)][warmup:]
    cores = [after[1] - before[1] for before, after in zip(clock.marks, clock.marks[1:], strict=False)][warmup:]
    return {
        "trainer_ms": 1000 * statistics.fmean(wholes),
        "core_ms": 1000 * statistics.fmean(cores),
        "other_ms": 1000 * (statistics.fmean(wholes) - statistics.fmean(cores)),
        "trainer_over_core": sum(wholes) / sum(cores),
        "peak_rss_mb": _peak(),
    }


def _watch(clock: Clock) -> None:
    """Put the clock into what is measured."""
    from sd_train.device import Updater
    from sd_train.families.latent import LatentDiffusion
    from sd_train.report import Report

    for owner, part in ((LatentDiffusion, "encode_images"), (LatentDiffusion, "encode_texts"),
                        (LatentDiffusion, "predict"), (Updater, "backward"), (Updater, "reduce"),
                        (Updater, "apply")):  # fmt: skip
        setattr(owner, part, clock.timed(getattr(owner, part)))
    setattr(Report, "update", clock.marking(Report.update))  # noqa: B010


def _peak() -> float:
    """Megabytes that were resident at most; the usual count of a process begins with that of the one it comes from."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii").splitlines() if status.is_file() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), 0.0)


def overhead_figures(models: Sequence[str], cases: Sequence[str], rounds: int, steps: int) -> dict[str, Any]:
    """All figures of all rounds ("raw"), their medians, and the ratios that the goals are set in."""
    raw: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: make_model(Path(folder), name) for name in models}
        for number in range(rounds):
            for name, path in paths.items():
                for case in cases:
                    print(f"round {number + 1}: {name} {case}", file=sys.stderr, flush=True)
                    count = steps if name == "tiny" else max(10, steps // 3)
                    raw.setdefault(f"{name} {case}", []).append(_alone(case, path, count))
        differences = {
            f"{name} {case}": _alone(case, path, 0)
            for name, path in paths.items() for case in cases if case in PLAIN
        }
    medians = {
        row: {figure: round(statistics.median(each[figure] for each in found), 6) for figure in found[0]}
        for row, found in raw.items()
    }
    ratios = _ratios(medians)
    return {"rounds": rounds, "medians": medians, "ratios": ratios, "differences_from_plain": differences, "raw": raw}


def _alone(case: str, model: Path, steps: int) -> dict[str, float]:
    """`run_case` in a process of its own; without `steps` its comparison with plain updates."""
    done = subprocess.run(
        [sys.executable, __file__, case, str(model), str(steps)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{case}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _ratios(medians: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """What the goals are set in, of the rows that are there."""
    found: dict[str, float] = {}
    for row, figures in medians.items():
        if "trainer_over_core" in figures:
            found[f"{row} / its core"] = figures["trainer_over_core"]
        model, case = row.split()
        twin = f"{model} bare_{case.split('_')[0]}" + ("_ema" if case.endswith("_ema") else "")
        if case in CASES and twin in medians:
            found[f"{row} / {twin.split()[1]}"] = figures["trainer_ms"] / medians[twin]["trainer_ms"]
        if case == "full_ema" and f"{model} full" in medians:
            found[f"{model} EMA, ms an update"] = figures["trainer_ms"] - medians[f"{model} full"]["trainer_ms"]
    return {name: round(ratio, 4) for name, ratio in found.items()}


if __name__ == "__main__":
    print(json.dumps(run_case(sys.argv[1], Path(sys.argv[2]), 4, int(sys.argv[3]), 5, sys.argv[3] == "0")))
