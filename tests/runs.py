"""What the tests of whole runs share: datasets of the demonstration's photographs, runs, and what these leave."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import sd_train.demo
from sd_train.data.config import DatasetRequest, load_datasets
from sd_train.data.images import prepare, sample_view, view_geometry
from sd_train.data.index import ImageIndex, IndexOptions, build_indexes
from sd_train.device import Device
from sd_train.families.base import Family
from sd_train.objectives.denoise import Denoise
from sd_train.train_network import main
from sd_train.trainables.base import Trainable
from sd_train.trainables.lora import Lora, LoraSettings
from sd_train.types import Batch
from tests.models import load

PHOTOS = Path(sd_train.demo.__file__).parent / "photos"
SOURCES = Path(sd_train.demo.__file__).parent.parent.parent
CLOCKS = ("ss_training_started_at", "ss_training_finished_at", "modelspec.date")
TIMESTEPS = (50, 250, 450, 650, 850)


def write_dataset(path: Path, dataset: str = "", subset: str = "", size: int = 64) -> Path:
    """A dataset file over the photographs, with more keys as TOML.

    At 64 pixels all of them are squares, at 96 they lie in three buckets of 64x64, 128x64 and 64x128.
    """
    path.write_text(
        f"""[general]
caption_extension = ".txt"
[[datasets]]
resolution = {size}
enable_bucket = true
min_bucket_reso = 64
max_bucket_reso = 128
{dataset}
[[datasets.subsets]]
image_dir = {str(PHOTOS)!r}
{subset}
"""
    )
    return path


def words(model: Path, dataset: Path, output: Path, more: str) -> list[str]:
    """The command line of a run, without the program; `more` is split at blanks, its options count before these."""
    return [
        *("--pretrained_model_name_or_path", str(model), "--dataset_config", str(dataset), "--output_dir", str(output)),
        *"--output_name lora --seed 3 --network_dim 4 --network_alpha 4 --learning_rate 1e-3".split(),
        *("--max_data_loader_n_workers", "0"),
        *more.split(),
    ]


def train(model: Path, dataset: Path, output: Path, more: str = "") -> Path:
    """Run the entry point in this process; the file that it leaves."""
    assert main(words(model, dataset, output, more)) == 0
    return output / "lora.safetensors"


def command(*arguments: str) -> list[str]:
    """A command that runs a module of ours with this interpreter."""
    return [sys.executable, "-m", *arguments]


def environment(**more: str) -> dict[str, str]:
    """The environment of a process of its own; it finds the package without being installed."""
    return {**os.environ, "PYTHONPATH": str(SOURCES), **more}


def run_process(arguments: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, with variables added to the environment."""
    return subprocess.run(arguments, env=environment(**more), capture_output=True, text=True, timeout=300, check=False)


def metadata(path: Path, *aside: str) -> dict[str, str]:
    """The metadata of a file without its clock fields and those in `aside`."""
    with safe_open(path, "pt") as file:
        found: dict[str, str] = file.metadata()
    return {key: value for key, value in found.items() if key not in (*CLOCKS, *aside)}


def differences(first: Path, second: Path) -> list[str]:
    """The tensors of two files that are not equal to the bit, by name; those of only one file too."""
    ours, theirs = load_file(first), load_file(second)
    return sorted(
        name
        for name in ours.keys() | theirs.keys()
        if name not in ours or name not in theirs or not identical(ours[name], theirs[name])
    )


def identical(first: Tensor, second: Tensor) -> bool:
    """Whether dtype, shape and every bit agree."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))


def largest_difference(first: Path, second: Path) -> float:
    """The largest difference between numbers of two files with the same names."""
    ours, theirs = load_file(first), load_file(second)
    assert ours.keys() == theirs.keys()
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_index(path: Path, batch_size: int = 1) -> ImageIndex:
    """The index of a dataset file with one dataset."""
    request = DatasetRequest(
        command="train_network", dataset_config=path, train_data_dir=None, reg_data_dir=None, in_json=None,
        fallbacks={"batch_size": batch_size}, masked_loss=False, caches_latents=False,
    )  # fmt: skip
    (index,) = build_indexes(load_datasets(request), IndexOptions()).training
    return index


def fixed_noise_loss(model: Path, dataset: Path, lora: Path | None) -> float:
    """Mean denoising loss over all photographs and five timesteps, always with the same noise."""
    family = load(model)
    weights = {} if lora is None else load_file(lora)
    rates = {"unet": 1.0, "text_encoder": 1.0} if weights else {}
    rates = {role: rate for role, rate in rates.items() if any(_role(name) == role for name in weights)}
    rank = next((len(tensor) for name, tensor in weights.items() if name.endswith("lora_down.weight")), 1)
    alpha = next((float(tensor) for name, tensor in weights.items() if name.endswith(".alpha")), 1.0)
    trainable = Lora(LoraSettings(rank=rank, alpha=alpha, dropout=0.0, rates=rates, seed=0))
    trainable.install(family)
    trainable.load(weights)
    return loss_of(family, trainable, dataset)


def loss_of(family: Family, trainable: Trainable, dataset: Path) -> float:
    """The same of a model in which `trainable` is installed."""
    objective = Denoise(family, trainable, Device(torch.device("cpu"), "no"))
    index = read_index(dataset)
    losses = []
    for place in range(len(index)):
        record = index.record(place)
        view = sample_view(record, 0, 0, 0)
        pixels = prepare(record, view).pixels
        count = len(TIMESTEPS)
        shape = (count, 4, pixels.shape[1] // 8, pixels.shape[2] // 8)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(place))
        batch = Batch(
            keys=[record.key] * count,
            paths=[str(record.path)] * count,
            captions=[record.caption] * count,
            pixels=torch.from_numpy(pixels).expand(count, -1, -1, -1),
            images=None,
            noise=noise,
            latent_noise=torch.zeros(shape),
            timesteps=torch.tensor(TIMESTEPS),
            weight=torch.ones(count),
            mask=None,
            texts=None,
            geometry=[view_geometry(record, view)] * count,
            micro=0,
        )
        with torch.no_grad():
            losses.append(objective.loss(batch))
    return float(torch.cat(losses).mean())


def _role(name: str) -> str:
    return "unet" if name.startswith("lora_unet_") else "text_encoder"


def scalars(log_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Every curve of the only TensorBoard log below `log_dir`: (step, value) in order."""
    (events,) = {path.parent for path in log_dir.rglob("events.out.tfevents.*")}
    found = EventAccumulator(str(events), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    return {tag: [(point.step, point.value) for point in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def pictures(log_dir: Path) -> dict[str, list[int]]:
    """The steps of every picture of the only TensorBoard log below `log_dir`, by tag."""
    (events,) = {path.parent for path in log_dir.rglob("events.out.tfevents.*")}
    found = EventAccumulator(str(events), size_guidance={"images": 0})
    found.Reload()
    return {tag: [point.step for point in found.Images(tag)] for tag in found.Tags()["images"]}
