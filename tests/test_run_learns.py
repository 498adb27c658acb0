"""Whole runs on the photographs: the loss falls, and what must not change a training does not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.runs import (
    differences,
    fixed_noise_loss,
    largest_difference,
    metadata,
    pictures,
    scalars,
    train,
    tree,
    write_dataset,
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs, large enough for gradients that are steady."""
    return write_dataset(tmp_path_factory.mktemp("dataset") / "photos.toml", size=128)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs, as small as they can be."""
    return write_dataset(tmp_path_factory.mktemp("dataset") / "small.toml")


@pytest.fixture(scope="module")
def before(tiny_model: Path, photos: Path) -> float:
    """The base model's loss on fixed noise."""
    return fixed_noise_loss(tiny_model, photos, None)


def test_the_loss_on_fixed_noise_falls(tiny_model: Path, photos: Path, before: float, tmp_path: Path) -> None:
    lora = train(tiny_model, photos, tmp_path / "out", "--learning_rate 1e-2 --max_train_steps 12")
    assert {name.split("_")[1] for name in load_file(lora)} == {"unet", "te"}
    assert fixed_noise_loss(tiny_model, photos, lora) < 0.85 * before  # measured 0.77


def test_the_text_encoder_alone_lowers_it_too(tiny_model: Path, photos: Path, before: float, tmp_path: Path) -> None:
    more = "--network_train_text_encoder_only --network_dim 16 --network_alpha 16 --learning_rate 1e-2"
    lora = train(tiny_model, photos, tmp_path / "out", more + " --max_train_steps 14")
    assert {name.split("_")[1] for name in load_file(lora)} == {"te"}
    assert fixed_noise_loss(tiny_model, photos, lora) < 0.99 * before  # measured 0.982


def test_a_control_with_rate_zero_stays_as_it_is(
    tiny_model: Path, photos: Path, before: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lora = train(tiny_model, photos, tmp_path / "out", "--learning_rate 0 --max_train_steps 2")
    assert load_file(lora) == {}
    assert fixed_noise_loss(tiny_model, photos, lora) == before
    assert "nothing is learned" in capsys.readouterr().err


@pytest.mark.parametrize("half", ["unet", "text_encoder"])
def test_a_rate_of_zero_creates_no_modules(small_model: Path, small: Path, tmp_path: Path, half: str) -> None:
    lora = train(small_model, small, tmp_path / "out", f"--{half}_lr 0 --max_train_steps 1")
    rest = {"unet": "lora_te_", "text_encoder": "lora_unet_"}[half]
    assert {name[: len(rest)] for name in load_file(lora)} == {rest}


def test_the_first_update_starts_from_the_base_model_and_from_network_weights(
    tiny_model: Path, small: Path, tmp_path: Path
) -> None:
    lora = train(tiny_model, small, tmp_path / "first", "--learning_rate 1e-2 --max_train_steps 3")
    # A rate this small leaves the weights where they started, but for rounding.
    still = "--learning_rate 1e-12 --max_train_steps 1 --optimizer_args weight_decay=0"
    again = train(tiny_model, small, tmp_path / "again", f"{still} --network_weights {lora}")
    assert largest_difference(lora, again) < 1e-10
    fresh = train(tiny_model, small, tmp_path / "fresh", still)
    before = fixed_noise_loss(tiny_model, small, None)
    assert fixed_noise_loss(tiny_model, small, fresh) == pytest.approx(before, abs=1e-6)
    assert largest_difference(lora, fresh) > 1e-3


def test_checkpointing_changes_nothing(tiny_model: Path, small: Path, tmp_path: Path) -> None:
    plain = train(tiny_model, small, tmp_path / "plain", "--max_train_steps 3 --network_dropout 0.1")
    more = "--max_train_steps 3 --network_dropout 0.1 --gradient_checkpointing"
    assert largest_difference(plain, train(tiny_model, small, tmp_path / "saving", more)) < 1e-5


def test_previews_change_nothing(small_model: Path, small: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# a comment\na cup --w 64 --h 64 --s 2 --d 7 --n blurry\na cat --w 64 --h 128 --s 2\n")
    more = "--max_train_steps 4 --network_dropout 0.1"
    plain = train(small_model, small, tmp_path / "plain", more)
    seen = train(
        small_model, small, tmp_path / "seen",
        f"{more} --sample_prompts {prompts} --sample_every_n_steps 2 --sample_at_first --sample_sampler euler_a "
        f"--logging_dir {tmp_path / 'logs'} --log_prefix try-",
    )  # fmt: skip
    assert differences(plain, seen) == []
    assert metadata(plain) == metadata(seen)

    names = sorted(path.name for path in (tmp_path / "seen" / "sample").iterdir())
    assert [re.sub(r"\d{14}", "TIME", name) for name in names] == [
        f"lora_{moment}_{rest}"
        for moment in ("000002", "000004", "e000000")
        for rest in ("00_TIME_7.png", "01_TIME.png")
    ]  # fmt: skip
    assert set(tree(tmp_path / "plain")) == {"lora.safetensors", "lora-config.toml"}

    assert [re.sub(r"\d{14}", "TIME", folder.name) for folder in (tmp_path / "logs").iterdir()] == ["try-TIME"]
    curves = scalars(tmp_path / "logs")
    for name in ("loss/current", "loss/average", "lr/unet", "lr/textencoder", "grad_norm"):
        assert [step for step, _ in curves[name]] == [1, 2, 3, 4]
    losses = [value for _, value in curves["loss/current"]]
    assert curves["loss/average"][-1][1] == pytest.approx(sum(losses) / 4, rel=1e-5)
    assert [value for _, value in curves["lr/unet"]] == pytest.approx([1e-3] * 4)
    assert min(value for _, value in curves["grad_norm"]) > 0
    assert pictures(tmp_path / "logs") == {"sample_0": [0, 2, 4], "sample_1": [0, 2, 4]}


def test_previews_every_epoch_carry_the_epoch(small_model: Path, small: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1 --d 1\n")
    more = f"--max_train_epochs 2 --train_batch_size 3 --sample_prompts {prompts} --sample_every_n_epochs 1"
    train(small_model, small, tmp_path / "out", more)
    names = sorted(path.name for path in (tmp_path / "out" / "sample").iterdir())
    expected = ["lora_e000001_00_TIME_1.png", "lora_e000002_00_TIME_1.png"]
    assert [re.sub(r"\d{14}", "TIME", name) for name in names] == expected


