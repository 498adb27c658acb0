"""What would spoil the weights: found, told with its files, undone or left out; and what does not fit into memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sd_train.build
from sd_train.data.batches import Updates
from sd_train.train_network import main
from sd_train.types import QUARANTINE
from tests.runs import differences, largest_difference, train, words, write_dataset

MORE = "--max_train_steps 12 --use_ema --ema_decay 0.5 --timestep_sampling importance --network_dropout 0.1 "
MORE += "--network_train_unet_only --cache_latents --cache_text_encoder_outputs --save_state_on_train_end"
BAD = 5
"""The number, from zero, of the update with a sample whose noise is not a number."""

Poison = Callable[[int], None]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset") / "photos.toml", "batch_size = 2")


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Poison:
    """Makes the noise of the second sample of some updates not a number."""
    real = Updates._prepare

    def add(*steps: int) -> None:
        def prepare(self: Updates, task: Any) -> Any:
            batch = real(self, task)
            if task.step in steps:
                batch.noise[1, 0, 0, 0] = torch.nan
            return batch

        monkeypatch.setattr(Updates, "_prepare", prepare)

    return add


@pytest.fixture(scope="module")
def without(small_model: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has never seen the images of the bad update."""
    folder = tmp_path_factory.mktemp("without")
    real = sd_train.build.prepare

    def prepare(config: Any) -> Any:
        prepared = real(config)
        prepared.progress.extra[QUARANTINE] = [{"step": BAD, "reason": "", "files": []}]
        return prepared

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sd_train.build, "prepare", prepare)
        train(small_model, photos, folder, MORE)
    return folder


def assert_same_training(first: Path, second: Path) -> None:
    """Weights, average and everything in the states agree to the bit."""
    for name in ("lora.safetensors", "lora-ema.safetensors"):
        assert differences(first / name, second / name) == [], name
    for name in ("trainable", "optimizer", "ema"):
        assert differences(*(folder / "lora-state" / f"{name}.safetensors" for folder in (first, second))) == [], name


@pytest.mark.parametrize(
    "more", ["--nan_policy rollback --snapshot_every_n_steps 4 --max_data_loader_n_workers 2", "--nan_policy skip"]
)
def test_a_run_without_its_bad_update_never_saw_it(
    small_model: Path, photos: Path, without: Path, tmp_path: Path, poison: Poison,
    capsys: pytest.CaptureFixture[str], more: str,
) -> None:  # fmt: skip
    poison(BAD)
    train(small_model, photos, tmp_path, f"{MORE} {more}")
    assert_same_training(tmp_path, without)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "its loss is nan" in line)
    assert f"update {BAD + 1} (its loss is nan; " in line
    assert line.count(".jpg") == 1
