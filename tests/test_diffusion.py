"""The forward process, the draws and the loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from sd_train.diffusion.draws import Draws, DrawSettings, draw
from sd_train.diffusion.losses import distance, sample_mean
from sd_train.diffusion.schedule import NoiseSchedule
from sd_train.families.published import published_config
from sd_train.randomness import derive

SHAPE = (4, 8, 6)


def test_add_noise_equals_diffusers() -> None:
    config = published_config("scheduler")
    betas = {key: config[key] for key in ("beta_start", "beta_end", "beta_schedule")}
    theirs = DDPMScheduler(num_train_timesteps=1000, **betas)
    ours = NoiseSchedule.scaled_linear()
    assert ours.steps == 1000
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, atol=1e-6, rtol=0)
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(1000, 4, 3, 2, generator=generator), torch.randn(1000, 4, 3, 2, generator=generator)
    timesteps = torch.arange(1000)
    expected = theirs.add_noise(x0, noise, timesteps)
    torch.testing.assert_close(ours.add_noise(x0, noise, timesteps), expected, atol=1e-6, rtol=0)
    vectors = ours.add_noise(x0[:2, :, 0, 0], noise[:2, :, 0, 0], timesteps[:2])
    torch.testing.assert_close(vectors, expected[:2, :, 0, 0], atol=1e-6, rtol=0)


def test_noise_keeps_the_variance() -> None:
    schedule = NoiseSchedule.scaled_linear()
    ones, zeros = torch.ones(1000, 1), torch.zeros(1000, 1)
    signal = schedule.add_noise(ones, zeros, torch.arange(1000))
    noise = schedule.add_noise(zeros, ones, torch.arange(1000))
    torch.testing.assert_close(signal**2 + noise**2, ones)
    assert (signal.diff(dim=0) < 0).all()
    assert schedule.to(torch.device("cpu")).add_noise(ones, ones, torch.arange(1000)).shape == (1000, 1)


def rows(drawn: Draws) -> list[tuple[bytes, bytes, int]]:
    return [
        (noise.numpy().tobytes(), latent.numpy().tobytes(), int(timestep))
        for noise, latent, timestep in zip(drawn.noise, drawn.latent_noise, drawn.timesteps, strict=True)
    ]


@pytest.mark.parametrize("split", [[[0, 1], [2, 3]], [[0], [1], [2], [3]], [[3], [2, 0], [1]]])
def test_a_row_depends_on_its_place_alone(split: list[list[int]]) -> None:
    whole = rows(draw(DrawSettings(7), 12, range(4), SHAPE))
    for places in split:
        assert rows(draw(DrawSettings(7), 12, places, SHAPE)) == [whole[place] for place in places]


def test_everything_named_changes_the_draw() -> None:
    base = draw(DrawSettings(7), 12, [0], SHAPE)
    assert (base.noise.shape, base.noise.dtype) == ((1, *SHAPE), torch.float32)
    assert (base.timesteps.shape, base.timesteps.dtype) == ((1,), torch.int64)
    changed = ((8, 12, 0), (7, 13, 0), (7, 12, 1))
    others = [draw(DrawSettings(seed), step, [place], SHAPE) for seed, step, place in changed]
    noises = [base.noise, base.latent_noise]
    noises += [noise for other in others for noise in (other.noise, other.latent_noise)]
    flat = torch.stack([noise.flatten() for noise in noises])
    correlation = flat @ flat.T / flat.shape[1] - torch.eye(len(flat))
    # 192 independent draws: the standard deviation of a correlation is 0.07.
    assert correlation.fill_diagonal_(0).abs().max() < 0.3


def test_noise_is_standard_normal() -> None:
    drawn = draw(DrawSettings(3), 0, range(64), (4, 16, 16))
    for noise in (drawn.noise, drawn.latent_noise):
        values = noise.double().flatten()
        assert abs(values.mean().item()) < 0.015
        assert values.std().item() == pytest.approx(1.0, abs=0.01)
        assert ((values.abs() < 1).double().mean().item()) == pytest.approx(0.6827, abs=0.01)
        assert values.abs().max() > 3.5


def test_timesteps_are_uniform() -> None:
    drawn = np.array([derive(5, "timestep", step, place) % 1000 for step in range(2500) for place in range(8)])
    counts = np.bincount(drawn, minlength=1000)
    assert len(counts) == 1000
    # Chi-squared with 999 degrees of freedom: mean 999, standard deviation 45.
    expected = len(drawn) / 1000
    assert ((counts - expected) ** 2 / expected).sum() < 999 + 4 * 45
    few = draw(DrawSettings(5, 10), 0, range(300), (1,)).timesteps
    assert few.unique().tolist() == list(range(10))
    as_used = draw(DrawSettings(5), 2, range(8), (1,)).timesteps
    assert as_used.tolist() == drawn[16:24].tolist()


def test_no_global_generator_is_touched() -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    before = draw(DrawSettings(7), 12, [0, 1], SHAPE)
    states = torch.get_rng_state(), np.random.get_state()[1].tobytes()
    torch.manual_seed(2)
    np.random.seed(2)
    assert rows(draw(DrawSettings(7), 12, [0, 1], SHAPE)) == rows(before)
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tobytes() == states[1]


def test_the_loss_has_one_value_for_each_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(3, *SHAPE, generator=generator), torch.randn(3, *SHAPE, generator=generator)
    losses = sample_mean(distance(first, second))
    assert losses.shape == (3,)
    for row in range(3):
        expected = torch.nn.functional.mse_loss(first[row], second[row])
        torch.testing.assert_close(losses[row], expected)
    assert sample_mean(distance(first.half(), second.half())).dtype == torch.float32


def test_velocity_equals_diffusers() -> None:
    theirs = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(1000, 4, 3, 2, generator=generator), torch.randn(1000, 4, 3, 2, generator=generator)
    timesteps = torch.arange(1000)
    ours = NoiseSchedule.scaled_linear().velocity(x0, noise, timesteps)
    torch.testing.assert_close(ours, theirs.get_velocity(x0, noise, timesteps), atol=1e-6, rtol=0)


def test_zero_terminal_snr_keeps_the_beginning_and_ends_in_pure_noise() -> None:
    plain = NoiseSchedule.scaled_linear()
    rescaled = plain.zero_terminal_snr()
    assert rescaled.steps == 1000
    assert rescaled.alphas_cumprod[-1] == 0
    assert rescaled.alphas_cumprod[0].item() == pytest.approx(plain.alphas_cumprod[0].item(), rel=1e-6)
    assert bool((rescaled.alphas_cumprod.diff() < 0).all())
    assert bool((rescaled.alphas_cumprod[1:] < plain.alphas_cumprod[1:]).all())
