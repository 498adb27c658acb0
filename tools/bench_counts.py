"""What one update costs in operations, allocations and waits: counts, the same on every machine.

    python tools/bench.py counts            # beside those that are kept
    python tools/bench.py counts --write    # keeps them, in tests/data/step_counts.json

The second update of a real training on a small model is watched by PyTorch's profiler, from when the loop asks for its
batch until it asks for the next one.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

from sd_train import build, loop
from sd_train.demo.tiny_model import make_tiny_parts, tiny_configs
from sd_train.families.saving import save_model
from sd_train.types import Progress, Update

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "tests" / "data" / "step_counts.json"
CACHED = "--cache_latents --cache_text_encoder_outputs"
CASES = {
    "lora": ("train_network", f"--network_dim 4 --network_train_unet_only {CACHED}"),
    "lora_text": ("train_network", "--network_dim 4 --cache_latents"),
    "lora_bf16_accumulated": (
        "train_network", f"--network_dim 4 --network_train_unet_only {CACHED} --mixed_precision bf16 "
        "--gradient_accumulation_steps 2",
    ),
    "lora_dropout_checkpointed": (
        "train_network", f"--network_dim 4 --network_train_unet_only {CACHED} --network_dropout 0.1 "
        "--gradient_checkpointing",
    ),
    "loha": (
        "train_network", f"--network_module lycoris.kohya --network_args algo=loha --network_train_unet_only {CACHED}",
    ),
    "full_ema": ("train_db", f"--stop_text_encoder_training -1 --use_ema --min_snr_gamma 5 {CACHED}"),
    "textual_inversion": (
        "train_textual_inversion", "--token_string thing-1 --init_word animal --use_object_template --cache_latents",
    ),
}  # fmt: skip
"""Name -> command and options."""
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "cudaStreamSynchronize")
"""What asks a tensor for its value. On the CPU the fused optimizers ask each parameter for its number of steps."""
MOST_GROWTH = 0.05
DATASET = """
[general]
caption_extension = ".txt"
[[datasets]]
resolution = 64
batch_size = 1
[[datasets.subsets]]
image_dir = '{folder}'
"""


class _Enough(Exception):
    """The update that was to be watched is over."""


def count_step(case: str, model: Path) -> dict[str, int]:
    """Operations, allocations and waits of an update of `case`, trained on the model at `model`."""
    command, options = CASES[case]
    found: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(build, "train", lambda run: _watch(run, found)):
        place = Path(folder)
        photos = ROOT / "sd_train" / "demo" / "photos"
        (place / "dataset.toml").write_text(DATASET.format(folder=photos), encoding="utf-8")
        words = f"""--pretrained_model_name_or_path {model} --dataset_config {place / "dataset.toml"} --output_dir
            {place / "out"} --cache_dir {place / "cache"} --seed 1 --learning_rate 1e-4 --max_train_steps 6
            --max_data_loader_n_workers 0 {options}"""
        try:
            code = importlib.import_module(f"sd_train.{command}").main(words.split())
            raise SystemExit(f"{case}: ended with exit code {code} before its update was counted")
        except _Enough:
            return found


def _watch(run: loop.Training, found: dict[str, int]) -> None:
    whole = run.updates.starting_at

    def watched(progress: Progress, end: int) -> Iterator[Update]:
        updates = whole(progress, end)
        yield next(updates)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            yield next(updates)
        found.update(_counts(profiler))
        raise _Enough

    run.updates.starting_at = watched  # type: ignore[method-assign]
    loop.train(run)


def _counts(profiler: Any) -> dict[str, int]:
    events = profiler.events()
    memory = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    taken = [size for size in memory if size > 0]
    return {
        # Those that others are made of are not counted: what is left is what the host starts.
        "operations": sum(event.name.startswith("aten::") and not _inside(event) for event in events),
        "allocations": len(taken),
        "allocated_bytes": sum(taken),
        "waits": sum(event.name in WAITS for event in events),
    }


def _inside(event: Any) -> bool:
    parent = event.cpu_parent
    return parent is not None and parent.name.startswith("aten::")


def make_small_model(folder: Path) -> Path:
    """A model with two of the four levels, for what grows with none of them."""
    configs = tiny_configs("sd1")
    configs["unet"] |= {
        "block_out_channels": [32, 64],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
    }
    path = folder / "small.safetensors"
    save_model(path, make_tiny_parts("sd1", 0, configs), "safetensors", None, {})
    return path


def count_all() -> dict[str, dict[str, int]]:
    """The counts of every case."""
    with tempfile.TemporaryDirectory() as folder:
        model = make_small_model(Path(folder))
        return {case: count_step(case, model) for case in CASES}


def grown(kept: Mapping[str, int], found: Mapping[str, int]) -> list[str]:
    """What has grown by more than `MOST_GROWTH`, in words."""
    return [
        f"{what}: {found[what]}, and {before} before"
        for what, before in kept.items() if found[what] > before * (1 + MOST_GROWTH)
    ]


def counts_command(write: bool) -> int:
    """Print the counts beside those that are kept, or keep them; 1 if something has grown."""
    kept = json.loads(KEPT.read_text(encoding="utf-8"))["cases"] if KEPT.is_file() else {}
    with contextlib.redirect_stdout(sys.stderr):
        found = count_all()
    print(json.dumps({"torch": torch.__version__, "kept": kept, "cases": found}, indent=1))
    if write:
        KEPT.write_text(json.dumps({"torch": torch.__version__, "cases": found}, indent=1) + "\n", encoding="utf-8")
        return 0
    return int(any(grown(kept.get(case, {}), counts) for case, counts in found.items()))
