"""`--prior_preservation frozen`: the class stays what the base model makes of it, without regularisation images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from sd_train.__main__ import main as sd_train
from sd_train.device import Device
from sd_train.families.parts import ModelRequest, read_model
from sd_train.objectives.denoise import Denoise, DenoiseSettings
from sd_train.objectives.prior import Prior
from sd_train.train_network import main
from sd_train.trainables.full import Full, FullSettings
from sd_train.trainables.lora import Lora, LoraSettings
from sd_train.types import Batch, Geometry
from tests.models import TinyKind, fresh_tiny, load
from tests.runs import differences, scalars, train, words, write_dataset

CLASS = "a photo of a cup"
PRIOR = ["--prior_preservation", "frozen", "--class_prompt", CLASS]


def make_batch(**changes: object) -> Batch:
    count = 2
    generator = torch.Generator().manual_seed(1)
    values = {
        "keys": ["x"] * count,
        "paths": ["x"] * count,
        "captions": ["a photo of sks cup", "sks cup on a table"],
        "pixels": torch.rand(count, 3, 64, 128, generator=generator) * 2 - 1,
        "images": None,
        "noise": torch.randn(count, 4, 8, 16, generator=generator),
        "latent_noise": torch.randn(count, 4, 8, 16, generator=generator),
        "timesteps": torch.tensor([100, 700]),
        "weight": torch.tensor([1.0, 0.5]),
        "mask": None,
        "texts": None,
        "geometry": [Geometry((96, 160), (3, number), (64, 128), False, (80, 128)) for number in range(count)],
        "micro": 0,
    }
    return Batch(**(values | changes))  # type: ignore[arg-type]


def make(kind: TinyKind, roles: Sequence[str], precision: str = "no") -> tuple[Denoise, Denoise, Lora]:
    """The objective with and without prior, and what learns."""
    family = fresh_tiny(kind)
    device = Device(torch.device("cpu"), "bf16" if precision == "bf16" else "no")
    family.to(device.device, device.weight_dtype)
    lora = Lora(LoraSettings(rank=4, alpha=4.0, dropout=0.0, rates=dict.fromkeys(roles, 1.0), seed=0))
    lora.install(family)
    return Denoise(family, lora, device, DenoiseSettings(prior=Prior(CLASS, 0.5))), Denoise(family, lora, device), lora


def disturb(lora: Lora) -> None:
    generator = torch.Generator().manual_seed(2)
    for group in lora.groups():
        for name, parameter in group.params.items():
            if "lora_up" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


ROLES = {"sd1": ("unet", "text_encoder"), "sd2-v": ("unet",), "sdxl": ("unet", "text_encoder", "text_encoder_2")}


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("kind", ["sd1", "sd2-v", "sdxl"])
def test_nothing_is_lost_before_anything_is_learned(kind: TinyKind, precision: str) -> None:
    kept, plain, _ = make(kind, ROLES[kind], precision)
    batch = make_batch()
    assert torch.equal(kept.loss(batch), plain.loss(batch))
    kept.after_step()
    assert float(kept.figures()["loss/prior"]) == 0.0
    assert plain.figures() == {}


@pytest.mark.parametrize("kind", ["sd1", "sd2-v", "sdxl"])
def test_the_loss_is_the_distance_from_the_base_model(kind: TinyKind) -> None:
    kept, plain, lora = make(kind, ROLES[kind])
    disturb(lora)
    batch = make_batch()
    total = kept.loss(batch)
    family, base = kept.family, fresh_tiny(kind)
    assert batch.pixels is not None
    images = base.encode_images(batch.pixels)
    latents = base.draw_latents(images, batch.latent_noise)
    noisy = base.schedule.add_noise(latents, batch.noise, batch.timesteps)

    def predict(model: object) -> Tensor:
        texts = model.encode_texts([CLASS, CLASS])  # type: ignore[attr-defined]
        told = model.condition(texts, images, batch.geometry)  # type: ignore[attr-defined]
        return model.predict(noisy, batch.timesteps, told)  # type: ignore[attr-defined, no-any-return]

    with torch.no_grad():
        distance = (predict(family) - predict(base)).square().mean(dim=(1, 2, 3))
    assert float(distance.min()) > 1e-5
    expected = plain.loss(batch) + 0.5 * distance * batch.weight
    assert torch.allclose(total, expected, rtol=1e-4, atol=1e-7)

    # Again, from what is remembered; and the curve holds the mean over micro-batches by weight.
    assert torch.equal(kept.loss(batch), total)
    kept.loss(make_batch(weight=torch.tensor([0.0, 1.0])))
    kept.after_step()
    told = 0.5 * (2 * (distance * batch.weight).sum() + distance[1]) / (2 * 1.5 + 1)
    assert float(kept.figures()["loss/prior"]) == pytest.approx(float(told), rel=1e-3)


def test_its_gradient_leads_back() -> None:
    kept, plain, lora = make("sd1", ROLES["sd1"])
    disturb(lora)
    batch = make_batch()
    params = [parameter for group in lora.groups() for parameter in group.params.values()]
    full = torch.autograd.grad(kept.loss(batch).sum(), params)
    partial = torch.autograd.grad(plain.loss(batch).sum(), params)
    ours = [one - other for one, other in zip(full, partial, strict=True)]
    assert all(float(gradient.abs().max()) > 0 for gradient in ours)
    for parameter, gradient in zip(params, ours, strict=True):
        parameter.data.sub_(gradient, alpha=1e-3)
    kept.after_step()
    before = float(kept.figures()["loss/prior"])
    kept.loss(batch)
    kept.after_step()
    assert float(kept.figures()["loss/prior"]) < before


def test_with_cached_rows_it_is_the_same() -> None:
    kept, _, lora = make("sdxl", ("unet",))
    disturb(lora)
    batch = make_batch()
    assert batch.pixels is not None
    rows = {"images": kept.family.encode_images(batch.pixels), "pixels": None}
    rows["texts"] = kept.family.encode_texts(batch.captions)
    assert torch.allclose(kept.loss(make_batch(**rows)), kept.loss(batch), rtol=1e-5)


def test_a_mask_is_for_the_subject_alone() -> None:
    kept, plain, lora = make("sd1", ("unet",))
    disturb(lora)
    nothing = torch.zeros(2, 8, 16)
    assert float(plain.loss(make_batch(mask=nothing)).sum()) == 0.0
    extra = kept.loss(make_batch()) - plain.loss(make_batch())
    assert torch.allclose(kept.loss(make_batch(mask=nothing)), extra, rtol=1e-3)


def drift(model: Path, folder: Path) -> float:
    """How far a trained LoRA's prediction for the class is from the base model's."""
    family = load(model)
    lora = Lora(LoraSettings(rank=4, alpha=4.0, dropout=0.0, rates={"unet": 1.0, "text_encoder": 1.0}, seed=0))
    lora.install(family)
    lora.load(load_file(folder / "lora.safetensors"))
    kept = Denoise(family, lora, Device(torch.device("cpu"), "no"), DenoiseSettings(prior=Prior(CLASS, 1.0)))
    with torch.no_grad():
        kept.loss(make_batch())
    kept.after_step()
    return float(kept.figures()["loss/prior"])


def test_a_run_with_it_forgets_less(small_model: Path, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d.toml")
    more = "--max_train_steps 8 --learning_rate 2e-3 --cache_latents --train_batch_size 2"
    train(small_model, dataset, tmp_path / "plain", more)
    arguments = words(small_model, dataset, tmp_path / "kept", f"{more} --logging_dir {tmp_path / 'logs'}")
    assert main([*arguments, *PRIOR, "--prior_loss_weight", "50"]) == 0
    plain, kept = drift(small_model, tmp_path / "plain"), drift(small_model, tmp_path / "kept")
    assert plain > 1e-4
    assert kept < 0.6 * plain
    curve = dict(scalars(tmp_path / "logs")["loss/prior"])
    assert curve[1] == 0.0
    assert curve[8] > 0.0


def test_it_is_resumed_to_the_bit_with_cached_captions(small_model: Path, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d.toml", size=64)
    more = "--max_train_steps 4 --save_every_n_steps 2 --cache_latents --cache_text_encoder_outputs "
    more += "--network_train_unet_only --network_dropout 0.1 --gradient_accumulation_steps 2"
    whole = [*words(small_model, dataset, tmp_path / "whole", f"{more} --save_state"), *PRIOR]
    assert main(whole) == 0
    state = tmp_path / "whole" / "lora-step00000002-state"
    assert main([*words(small_model, dataset, tmp_path / "rest", f"{more} --resume {state}"), *PRIOR]) == 0
    assert differences(tmp_path / "whole" / "lora.safetensors", tmp_path / "rest" / "lora.safetensors") == []


def test_regularisation_images_beside_it_are_refused(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cups").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "cups" / "cup.png")
    subset = f"[[datasets.subsets]]\nimage_dir = {str(tmp_path / 'cups')!r}\nis_reg = true\nclass_tokens = 'cup'"
    dataset = write_dataset(tmp_path / "d.toml", subset=subset)
    arguments = [*words(small_model, dataset, tmp_path / "out", "--max_train_steps 1"), *PRIOR]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert f"--prior_preservation = frozen: {dataset}" in said
    assert "remove that subset, or remove prior_preservation and class_prompt" in said
    assert not (tmp_path / "out").exists()
    assert sd_train(["plan", "train_network", *arguments]) == 2


@pytest.mark.parametrize(
    ("more", "code", "told"),
    [
        (["--prior_preservation", "frozen"], 2, "needs the class that is kept; give it as class_prompt"),
        (["--prior_preservation", "cold"], 2, "--prior_preservation"),
        (["--class_prompt", CLASS], 0, "class_prompt has no effect: prior_preservation is not given"),
        ([*PRIOR, "--prior_loss_weight", "0"], 0, "prior_preservation has no effect: prior_loss_weight is 0"),
        (["--prior_loss_weight", "0.5"], 0, "--prior_loss_weight has no effect: no subset has is_reg = true"),
        ([*PRIOR, "--prior_loss_weight", "0.5"], 0, None),
    ],
)
def test_the_rules_between_its_options(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], code: int, told: str | None
) -> None:
    dataset = write_dataset(tmp_path / "d.toml")
    assert sd_train(["plan", "train_network", *words(small_model, dataset, tmp_path / "out", ""), *more]) == code
    said = capsys.readouterr().err
    if told is None:
        assert "prior" not in said
    else:
        assert told in said


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_whole_weights_are_held_against_their_copy(small_model: Path, precision: Literal["no", "bf16"]) -> None:
    family, device = load(small_model), Device(torch.device("cpu"), precision)
    rates = {"unet": 1.0, "text_encoder": 1.0}
    full = Full(FullSettings(rates, lambda: read_model(ModelRequest(str(small_model))), reference=True))
    family.to(device.device, device.weight_dtype, full.masters)
    full.install(family)
    kept = Denoise(family, full, device, DenoiseSettings(prior=Prior(CLASS, 1.0)))
    plain, batch = Denoise(family, full, device), make_batch()
    params = [parameter for group in full.groups() for parameter in group.params.values()]
    gradients = torch.autograd.grad(kept.loss(batch).sum(), params)
    others = torch.autograd.grad(plain.loss(batch).sum(), params)
    assert all(torch.equal(*pair) for pair in zip(gradients, others, strict=True))
    kept.after_step()
    assert float(kept.figures()["loss/prior"]) == 0.0
    with torch.no_grad():
        torch._foreach_add_(params, gradients, alpha=-1e-2)
    base = load(small_model)
    base.to(device.device, device.weight_dtype)
    after = kept.loss(batch)
    assert batch.pixels is not None
    images = base.encode_images(batch.pixels)
    noisy = base.schedule.add_noise(base.draw_latents(images, batch.latent_noise), batch.noise, batch.timesteps)
    with torch.no_grad(), device.autocast():
        before, now = (
            each.predict(noisy, batch.timesteps, each.condition(each.encode_texts([CLASS] * 2), images, batch.geometry))
            for each in (base, family)
        )
    expected = plain.loss(batch) + (now.float() - before.float()).square().mean(dim=(1, 2, 3)) * batch.weight
    assert torch.allclose(after, expected, rtol=1e-4 if precision == "no" else 0.05)
    assert float((after - plain.loss(batch)).min()) > 0.0
