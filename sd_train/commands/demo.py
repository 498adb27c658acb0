"""`sd-train demo`: the whole way from photographs to a LoRA, on a tiny model, in a minute or two."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    """Make the tiny model, train a LoRA on the photographs of the package, and say where everything is."""
    parser = argparse.ArgumentParser("sd-train demo", description=__doc__, allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=Path("demo_output"), help="default: demo_output")
    parser.add_argument("--max_train_steps", type=int, default=60, help="optimizer updates (default 60)")
    given = parser.parse_args(argv)
    import torch

    from sd_train.build import quiet_libraries
    from sd_train.demo.tiny_model import save_tiny_model
    from sd_train.train_network import main as train_network

    quiet_libraries()
    # A model this small gains nothing from more threads.
    torch.set_num_threads(1)
    started = time.monotonic()
    output: Path = given.output_dir
    model = output / "tiny_model.safetensors"
    if not model.exists():
        print(f"making a tiny Stable Diffusion 1.x model with random weights: {model}")
        save_tiny_model(model, seed=0)
    with as_file(files("sd_train.demo")) as demo:
        arguments = [
            *("--pretrained_model_name_or_path", str(model)),
            *("--dataset_config", str(demo / "dataset.toml")),
            *("--output_dir", str(output), "--output_name", "demo", "--overwrite"),
            *("--logging_dir", str(output / "logs")),
            *("--network_dim", "8", "--network_alpha", "8", "--learning_rate", "2e-3"),
            *("--max_train_steps", str(given.max_train_steps), "--seed", "42", "--cache_latents"),
            *("--sample_prompts", str(demo / "prompts.txt"), "--sample_at_first"),
            *("--sample_every_n_steps", str(max(1, given.max_train_steps // 2)), "--save_state"),
        ]
        print("running: sd-train train_network " + " ".join(arguments))
        code = train_network(arguments)
    if code == 0:
        logs = max((output / "logs").iterdir(), key=lambda folder: folder.stat().st_mtime)
        print(f"\ndone in {time.monotonic() - started:.0f} seconds")
        print(f"LoRA:        {output / 'demo.safetensors'}")
        print(f"samples:     {output / 'sample'}")
        print(f"TensorBoard: {logs}  (tensorboard --logdir {output / 'logs'})")
    return code
