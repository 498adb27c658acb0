"""The metadata of a saved LoRA against a file that sd-scripts wrote for the same command and images."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from sd_train.config.options import RunConfig
from sd_train.config.parser import load_run_config
from sd_train.demo.tiny_model import save_tiny_model
from sd_train.errors import ConfigError
from sd_train.families.streaming import write_network
from sd_train.metadata import RunFacts, build_metadata, describe_base, now
from sd_train.plan import prepare
from sd_train.types import Progress
from tests.models import golden

GOLDEN = golden("lora_metadata.json")
METADATA: dict[str, str] = GOLDEN["metadata"]
SQUARE, UPRIGHT, BROAD, SMALL = (512, 512), (480, 640), (640, 360), (256, 256)
PHOTOS: dict[str, tuple[str, tuple[tuple[int, int], ...]]] = {
    "astronaut": ("a portrait photo of an astronaut, orange space suit, flag", (SQUARE, UPRIGHT, SQUARE)),
    "cat": ("a photo of a cat, close up, ginger fur", (UPRIGHT, SQUARE, UPRIGHT)),
    "coffee": ("a cup of coffee on a wooden table, spoon", (BROAD, SMALL, BROAD)),
    "hubble": ("galaxies in deep space, hubble telescope", (UPRIGHT, SQUARE, UPRIGHT)),
    "motorcycle_left": ("a motorcycle in a garage, tools", (SQUARE, UPRIGHT, SQUARE)),
    "motorcycle_right": ("a motorcycle in a garage, indoor", (BROAD, SMALL, BROAD)),
    "retina": ("a medical photo of a retina", (SMALL, BROAD, SMALL)),
    "rocket": ("a rocket on a launch pad, night sky", (SMALL, BROAD, SMALL)),
}
CLOCK = {"ss_training_started_at", "ss_training_finished_at", "modelspec.date", "ss_session_id"}
# Options of the command that do not exist here yet, and where sd-scripts is wrong (the resolution that was trained at).
OTHERWISE = {
    "ss_min_snr_gamma": "None",
    "ss_noise_offset": "None",
    "modelspec.resolution": "256x256",
}
PROGRESS = Progress(seed=42, session_id=1278756876, started_at=1795245856.9871144, step=3, index=3, samples=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden run's inputs: 24 images of the same names, sizes and captions, and its dataset file."""
    folder = tmp_path_factory.mktemp("metadata")
    images = folder / "img"
    images.mkdir()
    for name, (caption, sizes) in PHOTOS.items():
        for view, size in enumerate(sizes):
            Image.new("L", size).save(images / f"{name}_{view}.png")
            (images / f"{name}_{view}.txt").write_text(f"{caption}, view {view}")
    (folder / "ds256.toml").write_text(GOLDEN["dataset_toml"].replace("<IMG>", images.as_posix()))
    save_tiny_model(folder / "sd15_random", 0)
    return folder


def configure(folder: Path, *more: str) -> RunConfig:
    """The golden command, with what it asks for that does not exist here taken out."""
    words = shlex.split(GOLDEN["command"])[2:]
    for option in ("--min_snr_gamma", "--noise_offset"):
        del words[words.index(option) : words.index(option) + 2]
    paths = {"ds256.toml", "sd15_random", "out", "tokcache"}
    words = [str(folder / word) if word in paths else word for word in words]
    return load_run_config("train_network", [*words, *more]).config


def facts_of(config: RunConfig) -> RunFacts:
    plan = prepare(config).plan
    return RunFacts(
        datasets=plan.datasets,
        indexes=plan.indexes,
        num_validation_images=sum(len(index) for index in plan.validation),
        world=1,
        batches_per_epoch=plan.batches_per_epoch,
        epochs=plan.epochs,
        total_steps=plan.total_steps,
        network_dim=4,
        network_alpha=2.0,
        optimizer="torch.optim.adamw.AdamW",
        base_version="sd_v1",
        architecture="stable-diffusion-v1",
        prediction="epsilon",
    )


@pytest.fixture(scope="module")
def config(folder: Path) -> RunConfig:
    return configure(folder)


@pytest.fixture(scope="module")
def facts(config: RunConfig) -> RunFacts:
    return facts_of(config)


@pytest.fixture(scope="module")
def written(config: RunConfig, facts: RunFacts, folder: Path) -> dict[str, str]:
    """What stands in the file."""
    base = describe_base(folder / "sd15_random")
    write_network(folder / "x.safetensors", {"x": torch.ones(2)}, build_metadata(config, facts, base, PROGRESS))
    with safe_open(folder / "x.safetensors", "pt") as file:
        found: dict[str, str] = file.metadata()
        return found


def test_every_key_of_sd_scripts_is_there(written: dict[str, str]) -> None:
    # A folder has no hash; sd-scripts writes the name of its own error, "IsADirectory".
    assert set(METADATA) - set(written) == {"ss_sd_model_hash", "ss_new_sd_model_hash"}
    assert set(written) <= set(METADATA)


JSON_KEYS = ("ss_datasets", "ss_tag_frequency", "ss_dataset_dirs")


@pytest.mark.parametrize("key", sorted(set(METADATA) - {"ss_sd_model_hash", "ss_new_sd_model_hash"}))
def test_values_equal_sd_scripts(key: str, written: dict[str, str]) -> None:
    if key in JSON_KEYS:
        # As text too: web UIs show the order.
        assert json.loads(written[key]) == json.loads(METADATA[key])
        assert written[key] == METADATA[key]
    elif key in CLOCK:
        pattern = re.sub(r"[0-9]+", "[0-9]+", re.escape(METADATA[key]))
        assert re.fullmatch(pattern, written[key])
    elif key.startswith("sshs_"):
        assert re.fullmatch(f"[0-9a-f]{{{len(METADATA[key])}}}", written[key])
    elif key == "modelspec.implementation_version":
        assert written[key].startswith("sd_train/")
    else:
        assert written[key] == OTHERWISE.get(key, METADATA[key])


def test_the_clock_can_be_fixed(config: RunConfig, facts: RunFacts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    monkeypatch.setenv("TZ", "America/New_York")
    first = build_metadata(config, facts, {}, PROGRESS)
    assert first == build_metadata(config, facts, {}, PROGRESS)
    assert first["ss_training_finished_at"] == "1700000000.0"
    assert first["modelspec.date"] == "2023-11-14T22:13:20"
    progress = prepare(config).progress
    assert progress.started_at == 1700000000.0
    assert progress == prepare(config).progress


@pytest.mark.parametrize("value", ["abc", "1e30", "-1", "1.5", "nan", "253370764800", "9" * 5000])
def test_a_clock_that_cannot_be(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", value)
    with pytest.raises(ConfigError, match=r"SOURCE_DATE_EPOCH = '.*must be whole seconds.*unset the variable"):
        now()
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "253370764799")
    assert now() == 253370764799


@pytest.mark.parametrize(
    ("epoch", "index", "expected"), [(0, 3, "1"), (1, 0, "1"), (1, 1, "2"), (5, 0, "5")]
)
def test_epochs_begun(epoch: int, index: int, expected: str, config: RunConfig, facts: RunFacts) -> None:
    progress = dataclasses.replace(PROGRESS, epoch=epoch, index=index, step=77)
    found = build_metadata(config, facts, {}, progress)
    assert (found["ss_epoch"], found["ss_steps"]) == (expected, "77")


def test_a_files_name_and_hashes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    content = bytes(range(256)) * 8192
    path.write_bytes(content)
    assert describe_base(path) == {
        "ss_sd_model_name": "model.safetensors",
        "ss_sd_model_hash": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8],
        "ss_new_sd_model_hash": hashlib.sha256(content).hexdigest(),
    }
    assert describe_base(tmp_path, path) == {
        "ss_sd_model_name": tmp_path.name,
        "ss_vae_name": "model.safetensors",
        "ss_vae_hash": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8],
        "ss_new_vae_hash": hashlib.sha256(content).hexdigest(),
    }


def test_other_settings_are_written(folder: Path) -> None:
    arguments = "--clip_skip 2 --max_token_length 150 --network_dropout 0.1 --lr_scheduler cosine --lr_warmup_steps 1"
    texts = ("--metadata_usage_hint", "naïve 猫", "--metadata_trigger_phrase", "sks")
    config = configure(folder, *arguments.split(), *texts)
    found = build_metadata(config, dataclasses.replace(facts_of(config), optimizer="a.B(c=1)"), {}, PROGRESS)
    expected = {
        "ss_clip_skip": "2",
        "modelspec.encoder_layer": "2",
        "ss_max_token_length": "150",
        "ss_network_dropout": "0.1",
        "ss_lr_scheduler": "cosine",
        "ss_lr_warmup_steps": "1",
        "ss_optimizer": "a.B(c=1)",
        "modelspec.usage_hint": "naïve 猫",
        "modelspec.trigger_phrase": "sks",
    }
    assert {key: found[key] for key in expected} == expected


def test_no_metadata_keeps_what_is_needed_to_load_it(folder: Path, facts: RunFacts) -> None:
    found = build_metadata(configure(folder, "--no_metadata"), facts, {"ss_sd_model_name": "secret"}, PROGRESS)
    kept = {key for key in found if not key.startswith("modelspec.")}
    assert kept == {
        "ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha"
    }  # fmt: skip
    assert "secret" not in str(found)


def test_folders_of_one_name_are_told_apart(folder: Path, tmp_path: Path) -> None:
    second = tmp_path / "img"
    second.mkdir()
    Image.new("L", (256, 256)).save(second / "x.png")
    (second / "x.txt").write_text("a dog, indoor")
    text = (folder / "ds256.toml").read_text()
    text += f'\n  [[datasets.subsets]]\n  image_dir = "{second.as_posix()}"\n  num_repeats = 5\n'
    (tmp_path / "ds.toml").write_text(text)
    config = configure(folder, "--dataset_config", str(tmp_path / "ds.toml"))
    found = build_metadata(config, facts_of(config), {}, PROGRESS)
    assert json.loads(found["ss_dataset_dirs"]) == {
        "img": {"n_repeats": 2, "img_count": 24},
        "img (2)": {"n_repeats": 5, "img_count": 1},
    }
    assert found["ss_num_train_images"] == "53"
    subsets = json.loads(found["ss_datasets"])[0]["subsets"]
    assert [subset["img_count"] for subset in subsets] == [24, 1]
