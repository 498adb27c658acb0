"""Whole runs of `fine_tune`, `train_db` and `sdxl_train`: what learns, what stays, and what others read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sd_train.__main__ import main
from sd_train.demo.tiny_model import TinyKind
from sd_train.families.parts import ModelParts, ModelRequest, read_model
from sd_train.families.sources import read_all
from tests.models import load, write_file, write_folder
from tests.runs import PHOTOS, fixed_noise_loss, identical, write_dataset

LAST = ("text_model.encoder.layers.2.", "text_model.final_layer_norm.")
"""What nothing depends on in the first text encoder of the tiny SDXL model."""


@dataclass(frozen=True)
class Case:
    """A command on a model."""

    command: str
    kind: TinyKind
    form: str
    more: str
    roles: tuple[str, ...]
    """That learn."""
    fall: float
    """The loss on fixed noise falls below this share; measured 0.72, and 0.982 with the text encoder alone."""


CASES = {
    "train_db sd1": Case("train_db", "sd1", "file", "--learning_rate_te 5e-4", ("unet", "text_encoder"), 0.8),
    "train_db sd2": Case("train_db", "sd2-v", "folder", "--stop_text_encoder_training -1", ("unet",), 0.8),
    "train_db sdxl": Case("train_db", "sdxl", "file", "--learning_rate_te1 0", ("unet", "text_encoder_2"), 0.8),
    "fine_tune sd1": Case("fine_tune", "sd1", "folder", "", ("unet",), 0.8),
    "fine_tune sd2": Case(
        "fine_tune", "sd2-v", "file", "--train_text_encoder --learning_rate 0 --learning_rate_te 1e-2",
        ("text_encoder",), 0.99,
    ),
    "sdxl_train": Case(
        "sdxl_train", "sdxl", "folder", "--train_text_encoder --learning_rate_te2 1e-4 --mixed_precision bf16",
        ("unet", "text_encoder", "text_encoder_2"), 0.8,
    ),
}  # fmt: skip


def write_tuning_dataset(path: Path, keys: str = "batch_size = 2") -> Path:
    """The photographs with their captions in a metadata file, as `fine_tune` takes them."""
    photos = sorted(PHOTOS.glob("*.jpg"))
    captions = {photo.stem: {"caption": photo.with_suffix(".txt").read_text().strip()} for photo in photos}
    path.with_suffix(".json").write_text(json.dumps(captions))
    path.write_text(
        f"[[datasets]]\nresolution = 64\nenable_bucket = true\nmin_bucket_reso = 64\n{keys}\n[[datasets.subsets]]\n"
        f"image_dir = {str(PHOTOS)!r}\nmetadata_file = {str(path.with_suffix('.json'))!r}\n"
    )
    return path


def words(command: str, model: Path, dataset: Path, output: Path, more: str) -> list[str]:
    return [
        *(command, "--pretrained_model_name_or_path", str(model), "--dataset_config", str(dataset)),
        *("--output_dir", str(output), "--max_data_loader_n_workers", "0"),
        *f"--output_name m --seed 3 --learning_rate 1e-3 {more}".split(),
    ]


def train(command: str, model: Path, dataset: Path, output: Path, more: str) -> Path:
    """Run a command in this process; the file or folder that it leaves."""
    assert main(words(command, model, dataset, output, more)) == 0
    (found,) = (path for path in output.glob("m*") if path.suffix != ".toml" and path.stem == "m")
    return found


def parts_of(path: Path) -> ModelParts:
    return read_model(ModelRequest(str(path), allow_network=False))


def stored(path: Path) -> dict[str, Tensor]:
    """Every tensor as it is stored, as "role.name"."""
    return {
        f"{role}.{name}": tensor
        for role, part in parts_of(path).parts.items()
        for name, tensor in read_all(part.tensors).items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and datasets of this file."""
    made = tmp_path_factory.mktemp("full")
    for kind in ("sd1", "sd2-v", "sdxl"):
        write_file(made, kind)
        write_folder(made, kind)
    write_dataset(made / "db.toml", "batch_size = 2")
    write_tuning_dataset(made / "tuning.toml")
    (made / "prompts.txt").write_text("a cat --w 64 --h 64 --s 1 --d 5\n")
    return made


def source_of(folder: Path, case: Case) -> Path:
    return folder / (f"tiny_{case.kind}.safetensors" if case.form == "file" else f"tiny_{case.kind}_folder")


@dataclass(frozen=True)
class Trained:
    """A finished run."""

    case: Case
    source: Path
    saved: Path


@pytest.fixture(scope="module", params=CASES)
def trained(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Each command on a model of each family, with a sample picture and a state."""
    case = CASES[request.param]
    dataset = folder / ("tuning.toml" if case.command == "fine_tune" else "db.toml")
    more = f"--max_train_steps 4 --sample_prompts {folder / 'prompts.txt'} --sample_every_n_steps 4 "
    more += f"--save_state_on_train_end {case.more}"
    output = tmp_path_factory.mktemp("run")
    saved = train(case.command, source_of(folder, case), dataset, output, more)
    assert len(list((output / "sample").glob("m_000004_00_*_5.png"))) == 1
    return Trained(case, source_of(folder, case), saved)


@cache
def loss_before(source: Path, dataset: Path) -> float:
    """Of a base model, whichever of its forms the training started from."""
    return fixed_noise_loss(source, dataset, None)


def test_the_loss_on_fixed_noise_falls(trained: Trained, folder: Path) -> None:
    dataset, case = folder / "db.toml", trained.case
    before = loss_before(folder / f"tiny_{case.kind}_folder", dataset)
    assert fixed_noise_loss(trained.saved, dataset, None) < case.fall * before


def test_what_learns_changes_and_the_rest_is_the_source_to_the_bit(trained: Trained) -> None:
    before, after = stored(trained.source), stored(trained.saved)
    state = load_file(trained.saved.parent / "m-state" / "trainable.safetensors")
    idle = tuple(f"text_encoder.{prefix}" for prefix in LAST) if trained.case.kind == "sdxl" else ()
    expected = {name for name in before if name.split(".")[0] in trained.case.roles and not name.startswith(idle)}
    assert before.keys() == after.keys()
    assert expected == state.keys()
    for name, tensor in after.items():
        if name in expected:
            assert tensor.dtype == torch.float32, name
            assert not torch.equal(tensor, before[name].float()), name
            assert identical(tensor, state[name]), name
        else:
            assert identical(tensor, before[name]), name


def test_the_form_is_the_sources_and_the_file_tells_of_the_training(trained: Trained) -> None:
    case, before, after = trained.case, parts_of(trained.source), parts_of(trained.saved)
    assert (after.form, after.prediction, after.scheduler) == (before.form, before.prediction, before.scheduler)
    architectures = {"sd1": "stable-diffusion-v1", "sd2-v": "stable-diffusion-v2-768-v"}
    told = after.metadata
    assert told["modelspec.architecture"] == architectures.get(case.kind, "stable-diffusion-xl-v1-base")
    assert told["modelspec.prediction_type"] == ("v" if case.kind == "sd2-v" else "epsilon")
    assert told["ss_train_text_encoder"] == str(any(role != "unet" for role in case.roles))
    assert (told["ss_steps"], told["ss_output_name"]) == ("4", "m")
    of_networks = ("ss_network", "ss_unet_lr", "ss_text_encoder_lr", "ss_lowram", "ss_fp8", "ss_scale_weight_norms")
    assert not [key for key in told if key.startswith(of_networks)]
    names_of = "diffusers" if case.form == "folder" else "https://github.com/Stability-AI/generative-models"
    assert told["modelspec.implementation"] == names_of


def test_diffusers_reads_it_and_predicts_the_same(trained: Trained, folder: Path) -> None:
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    kind = trained.case.kind
    theirs: Any = StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline
    local: dict[str, Any] = {"local_files_only": True}
    if trained.case.form == "folder":
        pipeline = theirs.from_pretrained(trained.saved, **local)
    else:
        config = folder / f"tiny_{kind}_folder"
        pipeline = theirs.from_single_file(str(trained.saved), config=str(config), **local)
    for role in ("unet", "text_encoder"):
        getattr(pipeline, role).float()
    ours = load(trained.saved)
    ids = {"padding": "max_length", "max_length": 77, "truncation": True, "return_tensors": "pt"}
    with torch.no_grad():
        rows = ours.encode_texts(["a red cat"])
        last = pipeline.text_encoder(pipeline.tokenizer(["a red cat"], **ids).input_ids, output_hidden_states=True)
        states = last.hidden_states[-2] if kind == "sdxl" else last.last_hidden_state
        torch.testing.assert_close(rows["states"][..., : states.shape[-1]], states)
        noisy, when = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([400])
        added = {"text_embeds": rows.get("pooled"), "time_ids": torch.full((1, 6), 64.0)} if kind == "sdxl" else None
        mine, their = (
            unet(noisy, when, rows["states"], added_cond_kwargs=added).sample for unet in (ours.unet, pipeline.unet)
        )
    torch.testing.assert_close(mine, their)
    assert pipeline.scheduler.config["prediction_type"] == ("v_prediction" if kind == "sd2-v" else "epsilon")
