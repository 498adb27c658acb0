"""Peak memory of saves: how far the resident set grows while a model, a network, an average or a state is written.

    python tools/bench_save.py             # Stable Diffusion 1.5 at full size, random weights: 13 GB of memory
    python tools/bench_save.py --tiny      # the tiny model

Prints JSON, megabytes: what is resident before, the peak above that, the file and its largest tensor; exit code 1 if a
save takes more than the largest tensor and a tenth of its file. The kernel's own peak is read, which Linux alone has.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from sd_train.demo.tiny_model import tiny_configs
from sd_train.families.build import published_tensors
from sd_train.families.parts import ModelParts, ModelRequest, read_model
from sd_train.families.published import published_config, scheduler_config
from sd_train.families.registry import load_family
from sd_train.families.saving import SaveForm, save_model
from sd_train.families.sources import DictSource, Part
from sd_train.files import remove, size_of
from sd_train.optim.ema import Ema
from sd_train.state import StateParts, save_state
from sd_train.trainables.base import Trainable
from sd_train.trainables.full import Full, FullSettings
from sd_train.trainables.lora import Lora, LoraSettings
from sd_train.types import Progress

MEGABYTE = 1e6
RANK = 128
SPARE = 32.0
"""Megabytes that Python and its libraries may take by the way: a tiny file is smaller than its header."""


def memory(name: str) -> float:
    """Megabytes of this process: VmRSS, what is resident; VmHWM, the most since `forget_peak`."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024 / MEGABYTE
    raise SystemExit("this system does not tell the peak of memory")


def forget_peak() -> None:
    """The peak begins with what is resident now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def growth(save: Callable[[Path], None], path: Path, tensors: Iterable[torch.Tensor]) -> dict[str, float]:
    """The figures of one save, of which `tensors` are the largest part; the file is deleted again."""
    gc.collect()
    forget_peak()
    before = memory("VmRSS")
    save(path)
    figures = {
        "before": round(before),
        "growth": round(memory("VmHWM") - before, 1),
        "file": round(size_of(path) / MEGABYTE, 1),
        "largest_tensor": round(max(tensor.nbytes for tensor in tensors) / MEGABYTE, 1),
    }
    remove(path)
    return figures


def random_model(tiny: bool) -> ModelParts:
    """A Stable Diffusion 1.5 of random weights in half precision."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    parts = {}
    for role, small in tiny_configs("sd1").items():
        config = small if tiny else published_config(role, "sd1")
        with torch.device("meta"):
            network: torch.nn.Module = (
                UNet2DConditionModel.from_config(config) if role == "unet"
                else AutoencoderKL.from_config(config) if role == "vae"
                else CLIPTextModel(CLIPTextConfig(**config))
            )  # fmt: skip
        shapes = {name: tensor.shape for name, tensor in published_tensors(role, network).items()}
        parts[role] = Part(config, DictSource({n: torch.randn(math.prod(s)).half().view(s) for n, s in shapes.items()}))
    scheduler = scheduler_config("sd1", "epsilon", False)
    return ModelParts("sd1", parts, "epsilon", False, scheduler, "safetensors", "random weights")


def state_parts(trainable: Trainable, ema: Ema | None) -> StateParts:
    """What a state of `trainable` holds after an update of SGD with momentum: as much again as the weights."""
    groups = trainable.groups()
    optimizer = torch.optim.SGD([{"params": list(g.params.values())} for g in groups], lr=0.0, momentum=0.9)
    for group in groups:
        for parameter in group.params.values():
            optimizer.state[parameter]["momentum_buffer"] = torch.ones_like(parameter)
    return StateParts(trainable, groups, optimizer, {}, "", "0" * 64, ema)


def saves(place: Path, tiny: bool) -> dict[str, dict[str, float]]:
    """The figures of every kind of save, by name."""
    model = place / "model.safetensors"
    save_model(model, random_model(tiny), "safetensors")
    request = ModelRequest(str(model), allow_network=False)
    forms: tuple[SaveForm, ...] = ("safetensors", "ckpt", "diffusers")
    figures = {}
    for form in forms:
        for precision in (None, torch.float16):
            name = f"whole model, {form}, {'fp16' if precision else 'float'}"
            figures[name] = _whole(request, place / "model", form, precision)
    figures |= _average_and_state(request, place)
    family = load_family(request, torch.float16)
    for precision in (None, torch.float16):
        lora = Lora(LoraSettings(8 if tiny else RANK, 1.0, 0.0, {"unet": 1e-4}, seed=0, precision=precision))
        lora.install(family)
        figures |= _network(lora, place)
    return figures


def _whole(request: ModelRequest, path: Path, form: SaveForm, precision: torch.dtype | None) -> dict[str, float]:
    family = load_family(request, torch.float32)
    full = Full(FullSettings({"unet": 1e-5}, lambda: read_model(request), form, precision))
    full.install(family)
    return growth(lambda path: full.save(path, {}), path.with_suffix(f".{form}.saved"), full.tensors().values())


def _average_and_state(request: ModelRequest, place: Path) -> dict[str, dict[str, float]]:
    family = load_family(request, torch.float32)
    full = Full(FullSettings({"unet": 1e-5}, lambda: read_model(request)))
    full.install(family)
    ema = Ema(full.tensors, 0.999, None)
    tensors, parts, progress = ema.tensors, state_parts(full, ema), Progress(0, 0, 0.0, step=1)
    return {
        "its average": growth(lambda path: full.save(path, {}, tensors), place / "average", tensors.values()),
        "its state": growth(lambda path: save_state(path, progress, parts), place / "state", tensors.values()),
    }


def _network(lora: Lora, place: Path) -> dict[str, dict[str, float]]:
    tensors, parts, progress = lora.tensors().values(), state_parts(lora, None), Progress(0, 0, 0.0, step=1)
    name = f"LoRA of rank {lora.settings.rank}, {'fp16' if lora.settings.precision else 'float'}"
    return {
        name: growth(lambda path: lora.save(path, {}), place / "lora.safetensors", tensors),
        f"state of {name}": growth(lambda path: save_state(path, progress, parts), place / "state", tensors),
    }


def main() -> int:
    """Measure; 1 if a save takes more memory than it may."""
    parser = argparse.ArgumentParser(description="Peak memory of saves.")
    parser.add_argument("--tiny", action="store_true", help="the tiny model in place of one of full size")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        figures = saves(Path(folder), given.tiny)
    print(json.dumps(figures, indent=1))
    return int(any(one["growth"] > one["largest_tensor"] + 0.1 * one["file"] + SPARE for one in figures.values()))


if __name__ == "__main__":
    raise SystemExit(main())
