"""What `tools/bench.py startup` measures: CPU time and memory of processes from their start, one thread.

`--help`, `--version`, a mistyped option, and a training until its first update is done, on the tiny model with warm
caches. `imports_...`: a bare `import torch`, and with it the model classes of diffusers and transformers that the
training needs, as floors.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ROOT / "sd_train" / "demo" / "photos"
DATASET = """
[[datasets]]
resolution = 64
batch_size = 4
[[datasets.subsets]]
image_dir = '{folder}'
caption_extension = ".txt"
"""
IMPORTS = """
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer
"""
FIRST_UPDATE = """
import os, sys, time
from sd_train.report import Report
whole = Report.update
def update(*arguments, **named):
    whole(*arguments, **named)
    sys.stdout.flush()
    os._exit(0)
Report.update = update
from sd_train.train_network import main
sys.exit(main(sys.argv[1:]) or 1)
"""


def startup_figures(rounds: int) -> dict[str, float]:
    """CPU seconds and peak megabytes by name, each the median of `rounds`."""
    with tempfile.TemporaryDirectory() as folder:
        words = _training(Path(folder))
        # The first one fills the caches.
        _measured([sys.executable, "-c", FIRST_UPDATE, *words])
        commands = {
            "help": [sys.executable, "-m", "sd_train", "--help"],
            "train_network_help": [sys.executable, "-m", "sd_train.train_network", "--help"],
            "version": [sys.executable, "-m", "sd_train", "--version"],
            "mistyped": [sys.executable, "-m", "sd_train.train_network", "--learning_rat", "1"],
            "imports_torch": [sys.executable, "-c", "import torch"],
            "imports_models": [sys.executable, "-c", IMPORTS],
            "first_update": [sys.executable, "-c", FIRST_UPDATE, *words],
        }
        figures: dict[str, float] = {}
        for name, command in commands.items():
            found = [_measured(command) for _ in range(rounds)]
            figures[f"{name}_cpu_s"] = round(statistics.median(cpu for cpu, _ in found), 3)
            figures[f"{name}_peak_mb"] = round(statistics.median(peak for _, peak in found), 1)
    return figures


def _training(folder: Path) -> list[str]:
    """The arguments of a LoRA's training on the tiny model, in `folder`."""
    make = "import sys; from pathlib import Path; from sd_train.demo.tiny_model import save_tiny_model; "
    model, dataset = folder / "tiny.safetensors", folder / "dataset.toml"
    subprocess.run([sys.executable, "-c", f"{make}save_tiny_model(Path(sys.argv[1]), 0)", str(model)], check=True,
                   cwd=ROOT)  # fmt: skip
    dataset.write_text(DATASET.format(folder=PHOTOS), encoding="utf-8")
    words = f"""--pretrained_model_name_or_path {model} --dataset_config {dataset} --output_dir {folder / "out"}
        --cache_dir {folder / "cache"} --cache_latents_to_disk --cache_text_encoder_outputs_to_disk
        --cache_text_encoder_outputs --network_train_unet_only --network_dim 4 --learning_rate 1e-4 --seed 1
        --max_train_steps 2 --overwrite"""
    return words.split()


def _measured(command: Sequence[str]) -> tuple[float, float]:
    """CPU seconds and peak megabytes of one process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 2):
        raise SystemExit(f"{command}: exit code {process.returncode}\n{said.decode(errors='replace')[-2000:]}")
    return used.ru_utime + used.ru_stime, used.ru_maxrss * _UNIT / 1e6


_UNIT = 1 if sys.platform == "darwin" else 1024
