"""The files that a run leaves: sd-scripts' names, precision, metadata."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sd_train.train_network import main
from tests.runs import differences, metadata, scalars, train, words, write_dataset


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset file over the photographs: three updates an epoch in batches of two."""
    return write_dataset(tmp_path_factory.mktemp("dataset") / "photos.toml", dataset="batch_size = 2")


def names(folder: Path) -> list[str]:
    """What lies in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir())


def test_saves_at_steps_and_epochs(small_model: Path, photos: Path, tmp_path: Path) -> None:
    more = "--max_train_epochs 3 --save_every_n_steps 2 --save_every_n_epochs 1"
    last = train(small_model, photos, tmp_path / "out", more)
    # Nine updates; the last epoch is only saved as the final file.
    assert names(tmp_path / "out") == [
        "lora-000001.safetensors", "lora-000002.safetensors", "lora-config.toml", "lora-step00000002.safetensors",
        "lora-step00000004.safetensors", "lora-step00000006.safetensors", "lora-step00000008.safetensors",
        "lora.safetensors",
    ]  # fmt: skip
    assert differences(last.parent / "lora-000002.safetensors", last.parent / "lora-step00000006.safetensors") == []
    for name, steps, epochs in (("lora-000001", 3, 1), ("lora-step00000004", 4, 2), ("lora", 9, 3)):
        found = metadata(last.parent / f"{name}.safetensors")
        assert (found["ss_steps"], found["ss_epoch"]) == (str(steps), str(epochs))
        assert found["ss_max_train_steps"] == "9"
        assert found["ss_num_epochs"] == "3"


def test_an_epoch_that_the_end_cuts_short(small_model: Path, photos: Path, tmp_path: Path) -> None:
    train(small_model, photos, tmp_path / "out", "--max_train_steps 4 --save_every_n_epochs 1 --save_state")
    assert names(tmp_path / "out") == [
        "lora-000001-state", "lora-000001.safetensors", "lora-config.toml", "lora-state", "lora.safetensors"
    ]  # fmt: skip


def test_without_a_name(small_model: Path, photos: Path, tmp_path: Path) -> None:
    arguments = words(small_model, photos, tmp_path / "out", "--max_train_steps 4 --save_every_n_steps 2")
    arguments += ["--save_every_n_epochs", "1", "--save_state_on_train_end", "--output_name", ""]
    assert main(arguments) == 0
    assert names(tmp_path / "out") == [
        "at-step00000002.safetensors", "at-step00000004.safetensors", "epoch-000001.safetensors", "last-config.toml",
        "last-state", "last.safetensors",
    ]  # fmt: skip
    assert metadata(tmp_path / "out" / "last.safetensors")["ss_output_name"] == "None"


def test_the_precision_of_the_file(small_model: Path, photos: Path, tmp_path: Path) -> None:
    full = load_file(train(small_model, photos, tmp_path / "full", "--max_train_steps 2"))
    assert {tensor.dtype for tensor in full.values()} == {torch.float32}
    for precision, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        more = f"--max_train_steps 2 --save_precision {precision}"
        half = load_file(train(small_model, photos, tmp_path / precision, more))
        assert {tensor.dtype for tensor in half.values()} == {dtype}
        assert full.keys() == half.keys()
        for name, tensor in full.items():
            assert torch.equal(tensor.to(dtype), half[name])


def test_mixed_precision_has_almost_the_same_gradients(tiny_model: Path, tmp_path: Path) -> None:
    # Smaller pictures have one latent in the middle of the U-Net, whose group norms make steps of every gradient.
    photos = write_dataset(tmp_path / "d.toml", size=128)
    # At this rate the weights stay what they are, so that the curves show the same gradients in each precision.
    more = "--max_train_steps 3 --learning_rate 1e-12 --optimizer_args weight_decay=0"
    curves = {}
    for precision in ("no", "fp16", "bf16"):
        logs = tmp_path / f"logs-{precision}"
        words_of_case = f"{more} --mixed_precision {precision} --logging_dir {logs}"
        lora = train(tiny_model, photos, tmp_path / precision, words_of_case)
        assert {tensor.dtype for tensor in load_file(lora).values()} == {torch.float32}
        curves[precision] = {tag: [value for _, value in points] for tag, points in scalars(logs).items()}
    for precision, tolerance in (("fp16", 0.005), ("bf16", 0.02)):
        for tag in ("loss/current", "grad_norm"):
            assert curves[precision][tag] == pytest.approx(curves["no"][tag], rel=tolerance)
            assert curves[precision][tag] != curves["no"][tag]
    assert curves["fp16"]["grad_scale"] == [65536.0] * 3


def test_the_clock_can_be_fixed(
    small_model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    first, second = (train(small_model, photos, tmp_path / name, "--max_train_steps 1") for name in "ab")
    assert first.read_bytes() == second.read_bytes()
