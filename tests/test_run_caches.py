"""Runs with cached latents and captions: the same training, nothing encoded twice, nothing stale."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sd_train.objectives.denoise import Denoise
from sd_train.train_network import main
from tests.runs import (
    PHOTOS,
    differences,
    largest_difference,
    metadata,
    train,
    words,
    write_dataset,
)

UNET = "--max_train_steps 5 --network_train_unet_only"


def test_redrawn_cached_latents_equal_encoded_ones_to_the_bit(small_model: Path, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d.toml", subset="flip_aug = true\nnum_repeats = 2", size=96)
    plain = train(small_model, dataset, tmp_path / "plain", "--max_train_steps 5")
    redrawn = "--max_train_steps 5 --cache_latents_sample --cache_latents"
    cached = train(small_model, dataset, tmp_path / "cached", redrawn)
    assert differences(plain, cached) == []
    assert metadata(plain, "ss_cache_latents") == metadata(cached, "ss_cache_latents")
    on_disk = train(small_model, dataset, tmp_path / "disk", f"{redrawn}_to_disk --cache_dir {tmp_path / 'cache'}")
    assert differences(plain, on_disk) == []
    # The same latents, but for rounding, when several are encoded at once.
    many = train(small_model, dataset, tmp_path / "many", f"{redrawn} --vae_batch_size 4")
    assert largest_difference(plain, many) < 2e-3


def test_a_cached_latent_is_one_draw_unless_asked_otherwise(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: dict[str, list[torch.Tensor]] = {}
    real = Denoise.loss

    def loss(self: Denoise, batch: object) -> torch.Tensor:
        for key, noise in zip(batch.keys, batch.latent_noise, strict=True):  # type: ignore[attr-defined]
            drawn.setdefault(key, []).append(noise)
        return real(self, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(Denoise, "loss", loss)
    dataset = write_dataset(tmp_path / "d.toml")
    train(small_model, dataset, tmp_path / "fixed", "--max_train_epochs 2 --cache_latents")
    assert all(torch.equal(first, second) for first, second in drawn.values())
    assert len({noise.sum().item() for noise, _ in drawn.values()}) == len(drawn)
    drawn.clear()
    train(small_model, dataset, tmp_path / "redrawn", "--max_train_epochs 2 --cache_latents --cache_latents_sample")
    assert not any(torch.equal(first, second) for first, second in drawn.values())


def test_latents_on_disk_are_encoded_once_and_survive_a_move(
    small_model: Path, tmp_path: Path, counted: dict[str, int]
) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(PHOTOS, photos)
    dataset = write_dataset(tmp_path / "d.toml", size=96)
    dataset.write_text(dataset.read_text().replace(str(PHOTOS), str(photos)))
    more = f"--max_train_steps 2 --cache_latents_to_disk --cache_dir {tmp_path / 'cache'}"
    first = train(small_model, dataset, tmp_path / "first", more)
    images = len(list(PHOTOS.glob("*.jpg")))
    assert counted["images"] == images
    moved = tmp_path / "elsewhere"
    photos.rename(moved)
    dataset.write_text(dataset.read_text().replace(str(photos), str(moved)))
    again = train(small_model, dataset, tmp_path / "again", more)
    assert counted["images"] == images
    assert differences(first, again) == []
    # A changed picture, another crop and another autoencoder are other entries.
    changed = sorted(moved.glob("*.jpg"))[0]
    with Image.open(changed) as picture:
        turned = picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    turned.save(changed)
    train(small_model, dataset, tmp_path / "changed", more)
    assert counted["images"] == images + 1
    weights = load_file(small_model)
    name = next(name for name in weights if name.startswith("first_stage_model.encoder.conv_in.weight"))
    weights[name] = weights[name] * 1.01
    other = tmp_path / "other.safetensors"
    save_file(weights, other)
    train(other, dataset, tmp_path / "other", more)
    assert counted["images"] == 2 * images + 1


@pytest.mark.parametrize("where", ["", "_to_disk"])
def test_cached_captions_train_the_same(
    small_model: Path, tmp_path: Path, counted: dict[str, int], where: str
) -> None:
    dropout = "caption_dropout_rate = 0.5\nnum_repeats = 2"
    dataset = write_dataset(tmp_path / "d.toml", subset=dropout)
    plain = train(small_model, dataset, tmp_path / "plain", UNET)
    counted["texts"] = 0
    more = f"{UNET} --cache_text_encoder_outputs{where} --cache_dir {tmp_path / 'cache'}"
    cached = train(small_model, dataset, tmp_path / "cached", more)
    assert counted["texts"] == len(list(PHOTOS.glob("*.txt"))) + 1, "each caption once, and the empty one"
    assert largest_difference(plain, cached) < 1e-5
    again = train(small_model, dataset, tmp_path / "again", more)
    assert differences(cached, again) == []
    assert counted["texts"] == (2 - bool(where)) * (len(list(PHOTOS.glob("*.txt"))) + 1)


def test_varying_captions_are_refused_or_enumerated(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], counted: dict[str, int]
) -> None:
    varying = "shuffle_caption = true\ncaption_tag_dropout_rate = 0.3\nnum_repeats = 2\ntoken_warmup_step = 4"
    dataset = write_dataset(tmp_path / "d.toml", subset=varying)
    more = f"{UNET} --cache_text_encoder_outputs"
    assert main(words(small_model, dataset, tmp_path / "refused", more)) == 2
    assert "--cache_caption_variants" in capsys.readouterr().err
    train(small_model, dataset, tmp_path / "several", f"{more} --cache_caption_variants 3")
    assert counted["texts"] > len(list(PHOTOS.glob("*.txt")))


def test_a_trained_text_encoder_is_not_cached(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_dataset(tmp_path / "d.toml")
    assert main(words(small_model, dataset, tmp_path / "out", "--max_train_steps 1 --cache_text_encoder_outputs")) == 2
    assert "--network_train_unet_only" in capsys.readouterr().err
    more = "--max_train_steps 1 --cache_text_encoder_outputs --text_encoder_lr 0"
    train(small_model, dataset, tmp_path / "frozen", more)


def test_masks_weight_the_loss(small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    for photo in PHOTOS.glob("*.jpg"):
        with Image.open(photo) as picture:
            Image.new("L", picture.size, 0).save(masks / f"{photo.stem}.png")
    dataset = write_dataset(tmp_path / "d.toml", subset=f"conditioning_data_dir = {str(masks)!r}", size=96)
    assert main(words(small_model, dataset, tmp_path / "refused", "--max_train_steps 1")) == 2
    assert "masked_loss" in capsys.readouterr().err
    for more in ("--masked_loss", "--masked_loss --cache_latents"):
        black = train(small_model, dataset, tmp_path / f"black{len(more)}", f"--max_train_steps 2 {more}")
        # Nothing is left to learn from, so nothing moves away from zero.
        assert all(not weight.any() for name, weight in load_file(black).items() if "lora_up" in name)
    half = train(small_model, dataset, tmp_path / "half", "--max_train_steps 2 --masked_loss --unmasked_weight 0.5")
    plain = train(
        small_model, write_dataset(tmp_path / "p.toml", subset="loss_weight = 0.5", size=96), tmp_path / "plain",
        "--max_train_steps 2",
    )  # fmt: skip
    assert largest_difference(half, plain) < 1e-5
