"""Whole runs on tiny models of Stable Diffusion 2.x and SDXL, from folders and from single files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sd_train.__main__ import main
from sd_train.demo.tiny_model import TinyKind
from sd_train.families.saving import save_model
from sd_train.lora_files.adapter import delta
from sd_train.lora_files.reading import open_lora
from tests.models import tiny_parts, write_file, write_folder
from tests.runs import PHOTOS, differences, largest_difference, metadata, train, words, write_dataset

CACHED = "--max_train_steps 3 --cache_latents --cache_text_encoder_outputs --network_train_unet_only"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the models of this file."""
    return tmp_path_factory.mktemp("models")


def model_in(folder: Path, kind: TinyKind, form: str) -> Path:
    path = folder / (f"tiny_{kind}.safetensors" if form == "file" else f"tiny_{kind}_folder")
    if not path.exists():
        (write_file if form == "file" else write_folder)(folder, kind)
    return path


@pytest.mark.parametrize("form", ["file", "folder"])
@pytest.mark.parametrize(
    ("kind", "version", "architecture", "prediction"),
    [
        ("sd2-v", "sd_v2_v", "stable-diffusion-v2-768-v/lora", "v"),
        ("sdxl", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora", "epsilon"),
    ],
)
def test_a_run_with_caches_and_previews(
    kind: TinyKind, version: str, architecture: str, prediction: str, form: str, models: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a (cat:1.2) --n bad --w 64 --h 96 --s 2 --d 5\n")
    dataset = write_dataset(tmp_path / "d.toml", "batch_size = 2", size=96)
    more = f"{CACHED} --sample_prompts {prompts} --sample_every_n_steps 3"
    file = train(model_in(models, kind, form), dataset, tmp_path / "out", more)
    found = metadata(file)
    assert (found["ss_base_model_version"], found["ss_v2"]) == (version, str(kind == "sd2-v"))
    assert (found["modelspec.architecture"], found["modelspec.prediction_type"]) == (architecture, prediction)
    assert len(list((tmp_path / "out" / "sample").glob("lora_000003_00_*_5.png"))) == 1
    tensors = load_file(file)
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    learned = [name for name, tensor in tensors.items() if name.endswith("lora_up.weight") and tensor.abs().max() > 0]
    assert len(learned) == 192
    inner = "lora_unet_input_blocks_" if kind == "sdxl" else "lora_unet_down_blocks_"
    assert any(name.startswith(inner) for name in learned)


@pytest.mark.parametrize("kind", ["sd2-v", "sdxl", "refiner"])
def test_cached_captions_and_latents_change_nothing(kind: TinyKind, models: Path, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d.toml", subset="flip_aug = true", size=96)
    model = model_in(models, kind, "file")
    plain = "--max_train_steps 3 --network_train_unet_only --max_token_length 150 --weighted_captions"
    first = train(model, dataset, tmp_path / "plain", plain)
    cached = f"{plain} --cache_latents_sample --cache_latents --cache_text_encoder_outputs"
    in_memory = train(model, dataset, tmp_path / "memory", cached)
    # Rounding differs with the number of captions that are encoded at once.
    assert largest_difference(first, in_memory) < 2e-3
    to_disk = f"{cached}_to_disk --cache_latents_to_disk --cache_dir {tmp_path / 'cache'}"
    assert differences(in_memory, train(model, dataset, tmp_path / "disk", to_disk)) == []


def test_both_text_encoders_of_sdxl_learn_and_go_on(models: Path, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d.toml", "batch_size = 2", size=96)
    model = model_in(models, "sdxl", "file")
    whole = train(model, dataset, tmp_path / "whole", "--max_train_steps 4 --gradient_checkpointing")
    tensors = load_file(whole)
    for prefix, modules in (("lora_te1_", 18), ("lora_te2_", 18), ("lora_unet_", 192)):
        names = [name for name in tensors if name.startswith(prefix) and name.endswith("lora_up.weight")]
        assert len(names) == modules
        learned = {name for name in names if tensors[name].abs().max() > 0}
        # Nothing of SDXL is told by the last layer of its first encoder.
        last = {name for name in names if name.startswith("lora_te1_text_model_encoder_layers_2_")}
        assert learned == set(names) - last
    train(model, dataset, tmp_path / "parts", "--max_train_steps 2 --save_state --gradient_checkpointing")
    more = "--max_train_steps 4 --gradient_checkpointing --resume latest"
    assert differences(whole, train(model, dataset, tmp_path / "parts", more)) == []


@pytest.mark.parametrize(
    ("kind", "option", "reason"),
    [("sdxl", "--v2", "is SDXL, and --v2"), ("sd2", "--sdxl", "is Stable Diffusion 2.x, and --sdxl")],
)
def test_contradictions_end_before_anything_is_loaded(
    kind: TinyKind, option: str, reason: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_dataset(tmp_path / "d.toml")
    arguments = words(model_in(models, kind, "file"), dataset, tmp_path / "out", f"--max_train_steps 1 {option}")
    assert main(["train_network", *arguments]) == 3
    assert reason in capsys.readouterr().err


def test_a_lora_in_diffusers_format_loads_there_as_kohyas_does(tiny_model: Path, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d.toml")
    two = "--max_train_steps 2 --network_alpha 2"
    kohya = train(tiny_model, dataset, tmp_path / "kohya", two)
    theirs = train(tiny_model, dataset, tmp_path / "diffusers", f"{two} --output_lora_format diffusers")
    names = set(load_file(theirs))
    assert all(name.startswith(("unet.", "text_encoder.")) and ".lora_" in name for name in names)
    assert len(names) == 2 * sum(name.endswith(".alpha") for name in load_file(kohya))
    with safe_open(theirs, "pt") as file:
        assert file.metadata()["ss_network_module"] == "networks.lora"
    ours, read = (open_lora(path, "sd1") for path in (kohya, theirs))
    pairs = {adapter.place: adapter for adapter in read.adapters()}
    assert len(pairs) == len(names) // 2
    for adapter in ours.adapters():
        torch.testing.assert_close(delta(adapter), delta(pairs[adapter.place]))
    # Either is a beginning for another training.
    more = "--max_train_steps 1 --network_alpha 2 --network_weights"
    kohya, theirs = (
        train(tiny_model, dataset, tmp_path / f"{path.parent.name}_2", f"{more} {path}") for path in (kohya, theirs)
    )
    assert differences(kohya, theirs) == []


def test_sdxl_has_its_own_name_and_bucket_steps(
    tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_in(models, "sdxl", "file")
    dataset = write_dataset(tmp_path / "d.toml", "bucket_reso_steps = 32", size=96)
    arguments = words(model, dataset, tmp_path / "out", "--max_train_steps 1")
    assert main(["plan", "train_network", *arguments]) == 0
    assert "bucket 96x" in capsys.readouterr().out
    assert main(["plan", "sdxl_train_network", *arguments, "--clip_skip", "1"]) == 0
    printed = capsys.readouterr()
    assert "bucket 96x" in printed.out
    assert "--clip_skip = 1 has no effect" in printed.err
    photo = sorted(PHOTOS.glob("*.jpg"))[0].name
    assert main(["explain", photo, "sdxl_train_network", *arguments]) == 0
    assert main(["sdxl_train_network", *arguments, "--v2"]) == 3
    assert main(["sdxl_train_network", *arguments, "--network_train_unet_only"]) == 0
    with safe_open(tmp_path / "out" / "lora.safetensors", "pt") as file:
        assert file.metadata()["ss_base_model_version"] == "sdxl_base_v1-0"


def test_a_switch_that_is_off_in_a_file_decides_only_where_nothing_tells(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # kohya_ss writes every switch into its files.
    (tmp_path / "gui.toml").write_text("v_parameterization = false\n")
    dataset = write_dataset(tmp_path / "d.toml")
    more = f"--max_train_steps 1 --network_train_unet_only --config_file {tmp_path / 'gui.toml'}"
    marked = train(model_in(models, "sd2-v", "file"), dataset, tmp_path / "marked", more)
    assert metadata(marked)["ss_base_model_version"] == "sd_v2_v"
    said = f"{more} --no_v_parameterization"
    forced = train(model_in(models, "sd2-v", "file"), dataset, tmp_path / "forced", said)
    assert metadata(forced)["ss_base_model_version"] == "sd_v2"


def test_metadata_tells_of_a_schedule_that_ends_in_pure_noise(tmp_path: Path) -> None:
    model = tmp_path / "zero.safetensors"
    save_model(model, tiny_parts("sdxl", prediction="v_prediction", zero_terminal_snr=True), "safetensors")
    dataset = write_dataset(tmp_path / "d.toml")
    found = metadata(train(model, dataset, tmp_path / "out", "--max_train_steps 1 --network_train_unet_only"))
    assert (found["ss_zero_terminal_snr"], found["modelspec.prediction_type"]) == ("True", "v")


def test_xformers_without_a_gpu_is_told_of(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gui.toml").write_text('xformers = "xformers"\n')
    dataset = write_dataset(tmp_path / "d.toml")
    plain = train(small_model, dataset, tmp_path / "plain", "--max_train_steps 1")
    capsys.readouterr()
    other = train(small_model, dataset, tmp_path / "x", f"--max_train_steps 1 --config_file {tmp_path / 'gui.toml'}")
    assert "--xformers has no effect: it works on NVIDIA GPUs only" in capsys.readouterr().err
    assert differences(plain, other) == []
