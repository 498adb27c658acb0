"""The objective on tiny models: each option against its formula, and every sample by itself."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_dream_and_update_latents
from torch import Tensor

from sd_train.device import Device
from sd_train.diffusion.draws import DrawSettings, draw
from sd_train.diffusion.losses import LossSettings, distance, huber_thresholds, sample_mean
from sd_train.diffusion.noise import NoiseSettings
from sd_train.diffusion.timesteps import BINS, TimestepSettings
from sd_train.diffusion.weights import WeightSettings, loss_weights
from sd_train.families.latent import LatentDiffusion
from sd_train.objectives.denoise import Denoise, DenoiseSettings
from sd_train.objectives.prior import Prior
from sd_train.trainables.lora import Lora, LoraSettings
from sd_train.types import Batch, Conditioning, Geometry
from tests.models import TinyKind, fresh_tiny

CPU = torch.device("cpu")
SHAPE = (4, 8, 16)
CAPTIONS = ("a photo of a cup", "cup", "", "a cup on a table")


@cache
def learner(kind: TinyKind, prediction: str) -> tuple[LatentDiffusion, Lora]:
    """A model with a LoRA that already changes something; nothing here trains it."""
    family = fresh_tiny(kind, prediction=prediction)
    lora = Lora(LoraSettings(rank=2, alpha=2.0, dropout=0.0, rates={"unet": 1.0}, seed=0))
    lora.install(family)
    generator = torch.Generator().manual_seed(2)
    for group in lora.groups():
        for parameter in group.params.values():
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
    return family, lora


def objective(
    settings: DenoiseSettings | None = None, kind: TinyKind = "sd1", prediction: str = "epsilon", precision: Any = "no"
) -> Denoise:
    return Denoise(*learner(kind, prediction), Device(CPU, precision), settings)


def make_batch(places: range = range(4), settings: DenoiseSettings | None = None, **changes: Any) -> Batch:
    """The samples at `places` of one update, drawn as a run draws them."""
    chosen = settings or DenoiseSettings()
    draws = draw(DrawSettings(3, noise=chosen.noise, timesteps=chosen.timesteps), 5, places, SHAPE)
    pixels = torch.rand(4, 3, 64, 128, generator=torch.Generator().manual_seed(1)) * 2 - 1
    rows = slice(places.start, places.stop)
    values = {
        "keys": ["x"] * len(places), "paths": ["x"] * len(places), "captions": list(CAPTIONS[rows]),
        "pixels": pixels[rows], "images": None, "noise": draws.noise, "latent_noise": draws.latent_noise,
        "timesteps": draws.timesteps, "weight": torch.tensor([1.0, 0.5, 2.0, 1.0])[rows], "mask": None, "texts": None,
        "geometry": [Geometry((64, 128), (0, 0), (64, 128), False, (64, 128))] * len(places), "micro": 0,
        "more_noise": draws.more,
    }  # fmt: skip
    return Batch(**(values | changes))


def latents_of(family: LatentDiffusion, batch: Batch) -> tuple[Tensor, Conditioning]:
    assert batch.pixels is not None
    images = family.encode_images(batch.pixels)
    told = family.condition(family.encode_texts(batch.captions), images, batch.geometry)
    return family.draw_latents(images, batch.latent_noise), told


def by_hand(model: Denoise, batch: Batch, noise: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The prediction where `added` (else `noise`) was added, and the target of `noise`, by the papers' formulas."""
    family, t = model.family, batch.timesteps
    assert isinstance(family, LatentDiffusion)
    latents, told = latents_of(family, batch)
    abar = family.schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
    noisy = abar.sqrt() * latents + (1 - abar).sqrt() * (noise if added is None else added)
    targets = {"epsilon": noise, "v_prediction": abar.sqrt() * noise - (1 - abar).sqrt() * latents, "sample": latents}
    return family.predict(noisy, t, told), targets[family.prediction]


def mse(pair: tuple[Tensor, Tensor]) -> Tensor:
    return (pair[0] - pair[1]).square().mean(dim=(1, 2, 3))


PREDICTIONS: list[tuple[TinyKind, str]] = [("sd1", "epsilon"), ("sd2-v", "v_prediction"), ("sd1", "sample")]


@pytest.mark.parametrize(("kind", "prediction"), PREDICTIONS)
@torch.no_grad()
def test_weights_are_tables_over_the_timesteps(kind: TinyKind, prediction: str) -> None:
    batch = make_batch()
    model = objective(kind=kind, prediction=prediction)
    plain = model.loss(batch)
    torch.testing.assert_close(plain, mse(by_hand(model, batch, batch.noise)) * batch.weight, rtol=1e-4, atol=1e-6)
    for weights in (
        WeightSettings(min_snr_gamma=5.0), WeightSettings(soft_min_snr_gamma=4.0), WeightSettings(p2_gamma=1.0),
        WeightSettings(debiased=True), WeightSettings(v_like=0.5), WeightSettings(scale_v_like_noise=True),
    ):  # fmt: skip
        weighted = objective(DenoiseSettings(weights=weights), kind, prediction)
        table = loss_weights(weights, weighted.family.schedule, weighted.family.prediction)
        factors = table[batch.timesteps]
        assert float((factors - 1).abs().max()) > 1e-3
        torch.testing.assert_close(weighted.loss(batch), plain * factors, rtol=1e-5, atol=1e-7)


@torch.no_grad()
def test_weights_are_those_of_the_schedule_that_is_trained() -> None:
    """sd-scripts computes them before it rescales the schedule."""
    family = fresh_tiny("sd2-v")
    lora = Lora(LoraSettings(rank=2, alpha=2.0, dropout=0.0, rates={"unet": 1.0}, seed=0))
    family.end_in_noise()
    lora.install(family)
    settings = DenoiseSettings(weights=WeightSettings(min_snr_gamma=5.0))
    batch = make_batch(timesteps=torch.tensor([0, 400, 998, 999]))
    plain, weighted = (Denoise(family, lora, Device(CPU, "no"), chosen) for chosen in (None, settings))
    losses = weighted.loss(batch)
    assert losses[-1] == 0
    assert losses.isfinite().all()
    # At the last timestep nothing of the picture is left: v is the picture, with its sign changed.
    latents, told = latents_of(family, batch)
    pure = family.predict(batch.noise, batch.timesteps, told)[-1]
    torch.testing.assert_close(plain.loss(batch)[-1], (pure + latents[-1]).square().mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["l2", "l1", "huber", "smooth_l1"])
@torch.no_grad()
def test_losses_are_distances_of_prediction_and_target(kind: Any) -> None:
    loss, batch = LossSettings(kind, "exponential", 0.2, 1.5), make_batch()
    model = objective(DenoiseSettings(loss=loss))
    c = huber_thresholds(loss, model.family.schedule)[batch.timesteps]
    places = distance(*by_hand(model, batch, batch.noise), kind, c)
    torch.testing.assert_close(model.loss(batch), places.mean(dim=(1, 2, 3)) * batch.weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("kind", "prediction"), PREDICTIONS)
@torch.no_grad()
def test_noise_is_in_input_and_target_and_perturbation_in_the_input_alone(kind: TinyKind, prediction: str) -> None:
    noise = NoiseSettings(offset=0.3, adaptive=0.5, perturbation=0.4, pyramid_levels=3)
    settings = DenoiseSettings(noise=noise)
    model, batch = objective(settings, kind, prediction), make_batch(settings=settings)
    assert isinstance(model.family, LatentDiffusion)
    latents, _ = latents_of(model.family, batch)
    drawn = batch.more_noise
    mixed = batch.noise + drawn["offset"] * (0.3 + 0.5 * latents.mean(dim=(2, 3), keepdim=True).abs())
    mixed = mixed + drawn["pyramid"]
    mixed = mixed / mixed.std(dim=(1, 2, 3), keepdim=True)
    expected = mse(by_hand(model, batch, mixed, mixed + drawn["perturbation"])) * batch.weight
    torch.testing.assert_close(model.loss(batch), expected, rtol=1e-4, atol=1e-6)
    assert float(drawn["perturbation"].std()) == pytest.approx(0.4, rel=0.1)


@torch.no_grad()
def test_dream_is_that_of_diffusers() -> None:
    for exponent in (0.0, 1.0, 10.0):
        model, batch = objective(DenoiseSettings(dream=exponent)), make_batch()
        family = model.family
        assert isinstance(family, LatentDiffusion)
        latents, told = latents_of(family, batch)
        noisy = family.schedule.add_noise(latents, batch.noise, batch.timesteps)
        scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        inputs, target = compute_dream_and_update_latents(
            family.unet, scheduler, batch.timesteps, batch.noise, noisy, batch.noise, told.states, exponent
        )
        expected = mse((family.predict(inputs, batch.timesteps, told), target)) * batch.weight
        torch.testing.assert_close(model.loss(batch), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("kind", "prediction"), PREDICTIONS[1:])
@torch.no_grad()
def test_dream_of_other_predictions_moves_the_noise_by_its_error(kind: TinyKind, prediction: str) -> None:
    model, batch = objective(DenoiseSettings(dream=0.5), kind, prediction), make_batch()
    first, _ = by_hand(model, batch, batch.noise)
    family = model.family
    assert isinstance(family, LatentDiffusion)
    latents, _ = latents_of(family, batch)
    abar = family.schedule.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    noisy = family.schedule.add_noise(latents, batch.noise, batch.timesteps)
    picture = first if prediction == "sample" else abar.sqrt() * noisy - (1 - abar).sqrt() * first
    estimate = (noisy - abar.sqrt() * picture) / (1 - abar).sqrt()
    moved = batch.noise + (1 - abar).sqrt() ** 0.5 * (batch.noise - estimate)
    expected = mse(by_hand(model, batch, moved)) * batch.weight
    torch.testing.assert_close(model.loss(batch), expected, rtol=1e-4, atol=1e-5)


def test_dream_leaves_all_gradients_in_mixed_precision() -> None:
    model = objective(DenoiseSettings(dream=1.0), precision="bf16")
    parameters = [parameter for group in learner("sd1", "epsilon")[1].groups() for parameter in group.params.values()]
    losses = [model.loss(make_batch()), objective(precision="bf16").loss(make_batch())]
    gradients = [torch.autograd.grad(loss.sum(), parameters) for loss in losses]
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients[0])
    assert any(not torch.equal(one, other) for one, other in zip(*gradients, strict=True))


EVERYTHING: dict[str, DenoiseSettings] = {
    "plain": DenoiseSettings(),
    "offset": DenoiseSettings(noise=NoiseSettings(offset=0.1)),
    "random offset": DenoiseSettings(noise=NoiseSettings(offset=0.1, offset_random=True)),
    "adaptive": DenoiseSettings(noise=NoiseSettings(offset=0.1, adaptive=0.5)),
    "pyramid": DenoiseSettings(noise=NoiseSettings(pyramid_levels=6)),
    "perturbation": DenoiseSettings(noise=NoiseSettings(perturbation=0.1)),
    "random perturbation": DenoiseSettings(noise=NoiseSettings(perturbation=0.1, perturbation_random=True)),
    "bounds": DenoiseSettings(timesteps=TimestepSettings(100, 700)),
    "logit-normal": DenoiseSettings(timesteps=TimestepSettings(sampling="logit_normal", mean=-1.0, std=0.5)),
    "importance": DenoiseSettings(timesteps=TimestepSettings(sampling="importance")),
    "huber": DenoiseSettings(loss=LossSettings("huber"), weights=WeightSettings(soft_min_snr_gamma=4.0)),
    "min-snr": DenoiseSettings(weights=WeightSettings(min_snr_gamma=5.0), prior=Prior("a cup", 0.5)),
    "dream": DenoiseSettings(dream=1.0, weights=WeightSettings(debiased=True)),
}


@pytest.mark.parametrize("name", EVERYTHING)
@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch(name: str) -> None:
    """Batch 4, two accumulated batches of 2 and two processes with 2 each: the same losses, the same statistics."""
    settings = EVERYTHING[name]
    mask = torch.rand(4, 8, 16, generator=torch.Generator().manual_seed(4))
    together, apart = objective(settings), objective(settings)
    for model in (together, apart):
        if model.importance is not None:
            model.importance.moments.copy_(torch.arange(1.0, BINS + 1))
    whole = together.loss(make_batch(settings=settings, mask=mask))
    parts = [
        apart.loss(make_batch(places, settings, mask=mask[places.start : places.stop]))
        for places in (range(2), range(2, 4))
    ]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-6)
    if name != "plain":
        assert not torch.allclose(whole, objective().loss(make_batch(mask=mask)), rtol=1e-3)
    for model in (together, apart):
        model.after_step()
    assert together.figures().keys() == apart.figures().keys()
    for curve, value in together.figures().items():
        assert float(apart.figures()[curve]) == pytest.approx(float(value), rel=1e-4)
    if together.importance is not None and apart.importance is not None:
        torch.testing.assert_close(together.importance.moments, apart.importance.moments, rtol=1e-4, atol=1e-7)
        assert float((together.importance.moments - torch.arange(1.0, BINS + 1)).abs().max()) > 0.01


@torch.no_grad()
def test_weights_stay_with_their_sample_beside_prior_masks_and_shares() -> None:
    settings = DenoiseSettings(
        timesteps=TimestepSettings(sampling="importance"), weights=WeightSettings(min_snr_gamma=5.0),
        prior=Prior("a cup", 0.5),
    )  # fmt: skip
    model, mask = objective(settings), torch.rand(4, 8, 16, generator=torch.Generator().manual_seed(4))
    assert model.importance is not None
    model.importance.moments.copy_(torch.arange(1.0, BINS + 1))
    batch = make_batch(mask=mask, more_noise={"share": torch.tensor([0.02, 0.3, 0.6, 0.95])})
    timesteps, share = model.importance.place(batch.more_noise["share"])
    placed = replace(batch, timesteps=timesteps)
    subject = sample_mean(distance(*by_hand(model, placed, batch.noise)), mask)
    alone = objective(DenoiseSettings(prior=Prior("a cup", 0.5))).loss(replace(placed, mask=torch.zeros(4, 8, 16)))
    table = loss_weights(settings.weights, model.family.schedule, "epsilon")[timesteps]
    expected = (subject * batch.weight + alone) * table * share
    assert float(alone.min()) > 1e-6
    torch.testing.assert_close(model.loss(batch), expected, rtol=1e-4, atol=1e-6)
    # What is noted is what a timestep contributes, without the sample's own weight; padding is not.
    model.importance.end_update(model.importance.sums())
    part = timesteps * BINS // 1000
    assert len(set(part.tolist())) == 4
    noted = (subject + alone / batch.weight) * table
    moved = (torch.arange(1.0, BINS + 1)[part]).lerp(noted.square(), 1 - model.importance.decay)
    torch.testing.assert_close(model.importance.moments[part], moved, rtol=1e-4, atol=1e-6)
    before = model.importance.moments.clone()
    assert model.loss(replace(batch, weight=torch.zeros(4))).abs().max() == 0
    model.after_step()
    assert torch.equal(model.importance.moments, before)


def test_importance_passes_over_losses_that_are_not_finite() -> None:
    sampler = objective(DenoiseSettings(timesteps=TimestepSettings(sampling="importance"))).importance
    assert sampler is not None
    losses = torch.tensor([float("nan"), float("inf"), 2.0])
    sampler.note(torch.tensor([10, 500, 990]), losses, torch.ones(3))
    sampler.end_update(sampler.sums())
    assert sampler.moments.isfinite().all()
    assert (sampler.moments > 0).tolist() == [False] * (BINS - 1) + [True]
