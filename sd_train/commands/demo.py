"""`sd-train demo`: teach a small model a new thing with a LoRA, and show it before and after, in a minute or two."""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path

MODEL = "base_model.safetensors"
CLASS = "a shape on a white background"
UPDATES = 150


def main(argv: Sequence[str]) -> int:
    """Train a LoRA on the pictures of the package, draw what it changed, and say where everything is."""
    parser = argparse.ArgumentParser("sd-train demo", description=__doc__, allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=Path("demo_output"), help="default: demo_output")
    parser.add_argument("--max_train_steps", type=int, default=UPDATES, help=f"optimizer updates (default {UPDATES})")
    parser.add_argument(
        "--pretrained_model_name_or_path",
        metavar="MODEL",
        help="default: the model of drawn shapes that comes with the package; another may need other prompts",
    )
    given = parser.parse_args(argv)
    import torch

    from sd_train.build import quiet_libraries
    from sd_train.train_network import main as train_network

    quiet_libraries()
    # A model this small gains nothing from more threads.
    torch.set_num_threads(1)
    started = time.monotonic()
    output: Path = given.output_dir
    with as_file(files("sd_train.demo")) as demo:
        arguments = [
            *("--pretrained_model_name_or_path", given.pretrained_model_name_or_path or str(demo / MODEL)),
            *("--dataset_config", str(demo / "dataset.toml")),
            *("--output_dir", str(output), "--output_name", "demo", "--overwrite"),
            *("--logging_dir", str(output / "logs")),
            *("--network_dim", "8", "--network_alpha", "8", "--learning_rate", "2e-3"),
            *("--min_snr_gamma", "5", "--prior_preservation", "frozen", "--class_prompt", CLASS),
            *("--max_train_steps", str(given.max_train_steps), "--seed", "42", "--cache_latents"),
            *("--sample_prompts", str(demo / "prompts.txt"), "--sample_at_first"),
            *("--sample_every_n_steps", str(given.max_train_steps), "--save_state"),
        ]
        print("running: sd-train train_network " + shlex.join(arguments))
        code = train_network(arguments)
        if code == 0:
            picture = _show(demo, output, given.max_train_steps)
    if code == 0:
        logs = max((output / "logs").iterdir(), key=lambda folder: folder.stat().st_mtime)
        print(f"\ndone in {time.monotonic() - started:.0f} seconds")
        print(f"LoRA:        {output / 'demo.safetensors'}")
        print(f"samples:     {output / 'sample'}")
        print(f"TensorBoard: {logs}  (tensorboard --logdir {output / 'logs'})")
        if picture is not None:
            print(f"picture:     {picture}  (training images, before, after)")
    return code


def _show(demo: Path, output: Path, updates: int) -> Path | None:
    """One picture of the training images, and of the prompts before and after; None if the training was stopped."""
    from sd_train.demo.rows import Row, draw_rows, read_picture
    from sd_train.prompts import load_prompts

    trained = sorted((demo / "zorbik").glob("*.png"))
    captions = [path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in trained]
    prompts = [prompt.text for prompt in load_prompts(demo / "prompts.txt")]
    before, after = (sorted((output / "sample").glob(f"demo_{mark}_*.png")) for mark in ("e000000", f"{updates:06d}"))
    if not after:
        return None
    rows = [
        Row("training images", [read_picture(path) for path in trained], captions),
        Row("before", [read_picture(path) for path in before], prompts),
        Row(f"after {updates} updates", [read_picture(path) for path in after], prompts),
    ]
    path = output / "before_and_after.png"
    draw_rows(rows).save(path)
    return path
