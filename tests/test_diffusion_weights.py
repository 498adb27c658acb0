"""Loss weights, distances, noise and timesteps: closed forms, and sd-scripts' own figures."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from sd_train.diffusion.losses import HuberSchedule, LossSettings, distance, huber_thresholds, sample_mean
from sd_train.diffusion.noise import NoiseSettings, combine, draw_noise, perturb
from sd_train.diffusion.schedule import NoiseSchedule
from sd_train.diffusion.timesteps import BINS, Importance, TimestepSettings, draw_shares, draw_timesteps
from sd_train.diffusion.weights import (
    Prediction,
    WeightSettings,
    loss_weights,
    min_snr,
    p2,
    signal_to_noise,
    soft_min_snr,
)
from tests.models import golden

PLAIN = NoiseSchedule.scaled_linear()
ZERO = PLAIN.zero_terminal_snr()
PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "v_prediction", "sample")


def settings_of(name: str) -> tuple[WeightSettings, Prediction]:
    prediction: Prediction = "v_prediction" if name.endswith("_v") or name.startswith("scale_v") else "epsilon"
    if name.startswith("min_snr_gamma"):
        return WeightSettings(min_snr_gamma=float(name.split("_")[3])), prediction
    if name.startswith("debiased"):
        return WeightSettings(debiased=True), prediction
    if name.startswith("scale_v"):
        return WeightSettings(scale_v_like_noise=True), prediction
    return WeightSettings(v_like=float(name.rsplit("_", 1)[1])), prediction


@pytest.mark.parametrize("kind", ["plain", "zero_terminal_snr"])
def test_weights_are_those_of_sd_scripts(kind: str) -> None:
    """But for the last timestep of zero terminal SNR, where theirs are not finite."""
    found = golden("loss_weights.json")
    schedule = PLAIN if kind == "plain" else ZERO
    times = torch.tensor(found["timesteps"])
    for name, numbers in found["weights"][kind].items():
        theirs = torch.tensor(numbers)
        if name == "alphas_cumprod":
            ours = schedule.alphas_cumprod
        elif name == "all_snr":
            ours = signal_to_noise(schedule)
        else:
            ours = loss_weights(settings_of(name)[0], schedule, settings_of(name)[1])
        finite = theirs.isfinite()
        assert finite.all() or (kind != "plain" and not finite[-1] and finite[:-1].all()), name
        assert ours.isfinite().all()
        torch.testing.assert_close(ours[times][finite], theirs[finite], rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    "settings",
    [
        WeightSettings(min_snr_gamma=5), WeightSettings(soft_min_snr_gamma=4), WeightSettings(p2_gamma=1),
        WeightSettings(debiased=True), WeightSettings(min_snr_gamma=5, debiased=True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("schedule", [PLAIN, ZERO])
def test_weights_are_finite(settings: WeightSettings, prediction: Prediction, schedule: NoiseSchedule) -> None:
    table = loss_weights(settings, schedule, prediction)
    assert table.shape == (1000,)
    assert table.isfinite().all()
    assert (table >= 0).all()
    assert settings.any


@pytest.mark.parametrize(
    "rule", [lambda snr, kind: min_snr(snr, 5, kind), lambda snr, kind: soft_min_snr(snr, 4, kind),
             lambda snr, kind: p2(snr, 1.0, 1.0, kind)]
)  # fmt: skip
def test_one_weight_in_three_parametrisations(rule: Callable[[Tensor, Prediction], Tensor]) -> None:
    """With the losses' own factors SNR and SNR + 1 all three weigh the picture alike."""
    snr = signal_to_noise(PLAIN)
    picture = rule(snr, "sample")
    torch.testing.assert_close(rule(snr, "epsilon") * snr, picture, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(rule(snr, "v_prediction") * (snr + 1), picture, rtol=1e-5, atol=1e-7)


def test_min_snr_at_zero_terminal_snr() -> None:
    snr = signal_to_noise(ZERO)
    assert snr[-1] == 0
    assert min_snr(snr, 5, "epsilon")[-1] == 1
    assert min_snr(snr, 5, "v_prediction")[-1] == 0
    # Soft min-SNR is half of it at SNR = gamma, and near it far away.
    at = torch.tensor([4.0])
    torch.testing.assert_close(soft_min_snr(at, 4.0, "sample"), min_snr(at, 4.0, "sample") / 2)


@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
def test_huber_thresholds(schedule: HuberSchedule) -> None:
    c, scale = 0.2, 3.0
    table = huber_thresholds(LossSettings("huber", schedule, c, scale), PLAIN)
    for t in (0, 1, 500, 999):
        sigma = math.sqrt((1 - float(PLAIN.alphas_cumprod[t])) / float(PLAIN.alphas_cumprod[t]))
        expected = {
            "constant": c * scale, "exponential": math.exp(math.log(c) * t / 1000) * scale,
            "snr": (1 - c) / (1 + sigma) ** 2 + c,
        }[schedule]  # fmt: skip
        assert float(table[t]) == pytest.approx(expected, rel=1e-5)
    assert huber_thresholds(LossSettings("huber", schedule, c), ZERO).isfinite().all()


def test_distances_against_their_formulas() -> None:
    first, second = (torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(n)) for n in (0, 1))
    c = torch.tensor([0.1, 2.0])
    d = (first - second).double()
    bent = (d.square() + c.view(2, 1, 1, 1) ** 2).sqrt() - c.view(2, 1, 1, 1)
    expected = {"l2": d**2, "l1": d.abs(), "huber": 2 * c.view(2, 1, 1, 1) * bent, "smooth_l1": 2 * bent}
    for kind, places in expected.items():
        found = distance(first, second, kind, c)  # type: ignore[arg-type]
        torch.testing.assert_close(found.double(), places, rtol=1e-5, atol=1e-6)
    # A large threshold is the square, a small one the absolute value.
    wide, narrow = torch.full((2,), 1e3), torch.full((2,), 1e-4)
    torch.testing.assert_close(distance(first, second, "huber", wide), distance(first, second), rtol=1e-4, atol=1e-6)
    flat = distance(first, second, "smooth_l1", narrow)
    torch.testing.assert_close(flat, 2 * distance(first, second, "l1"), rtol=1e-3, atol=1e-3)


def test_the_mean_is_over_all_places_also_with_a_mask() -> None:
    losses = torch.rand(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 6, 6)
    mask[0, :3] = 0.5
    expected = torch.tensor([float(losses[0, :, :3].sum()) * 0.5 / 144, 0.0])
    torch.testing.assert_close(sample_mean(losses, mask), expected)
    assert sample_mean(losses.half()).shape == (2,)


SHAPE = (4, 16, 24)
FULL = NoiseSettings(offset=0.1, offset_random=True, adaptive=0.5, pyramid_levels=6, perturbation=0.2)


def test_more_noise_depends_on_its_place_alone() -> None:
    together = draw_noise(FULL, 3, 5, [0, 1, 2, 3], SHAPE)
    parts = [draw_noise(FULL, 3, 5, places, SHAPE) for places in ([0, 1], [2, 3])]
    assert {name: tuple(rows.shape) for name, rows in together.items()} == {
        "offset": (4, 4, 1, 1), "offset_strength": (4, 1, 1, 1), "pyramid": (4, *SHAPE), "perturbation": (4, *SHAPE)
    }  # fmt: skip
    for name, rows in together.items():
        assert torch.equal(rows, torch.cat([part[name] for part in parts]))
        assert not torch.equal(rows, draw_noise(FULL, 3, 6, [0, 1, 2, 3], SHAPE)[name])
    # One option changes no draw of another.
    alone = draw_noise(NoiseSettings(offset=0.7, offset_random=True), 3, 5, [0, 1, 2, 3], SHAPE)
    assert alone.keys() == {"offset", "offset_strength"}
    assert all(torch.equal(rows, together[name]) for name, rows in alone.items())
    assert draw_noise(NoiseSettings(), 3, 5, [0], SHAPE) == {}


def test_offset_noise_has_its_variance() -> None:
    settings = NoiseSettings(offset=0.3)
    noise = torch.zeros(400, *SHAPE)
    shifted = combine(settings, noise, draw_noise(settings, 0, 0, range(400), SHAPE), noise)
    # One number for each channel.
    assert float((shifted - shifted[:, :, :1, :1]).abs().max()) == 0
    assert float(shifted[:, :, 0, 0].std()) == pytest.approx(0.3, rel=0.05)
    random = NoiseSettings(offset=0.3, offset_random=True)
    weaker = combine(random, noise, draw_noise(random, 0, 0, range(400), SHAPE), noise)
    # A uniform strength has a mean square of a third.
    assert float(weaker[:, :, 0, 0].square().mean().sqrt()) == pytest.approx(0.3 / math.sqrt(3), rel=0.1)


def test_adaptive_offset_follows_the_latents() -> None:
    settings = NoiseSettings(offset=0.1, adaptive=0.5)
    latents = torch.full((2, *SHAPE), -0.4)
    latents[:, 1] = 0.0
    drawn = draw_noise(settings, 0, 0, [0, 1], SHAPE)
    shifted = combine(settings, torch.zeros(2, *SHAPE), drawn, latents)
    sizes = (shifted[:, :, 0, 0] / drawn["offset"][:, :, 0, 0]).mean(0)
    torch.testing.assert_close(sizes, torch.tensor([0.3, 0.1, 0.3, 0.3]))
    # As in sd-scripts a random strength is the offset's own: what the latents add stays.
    random = NoiseSettings(offset=0.1, offset_random=True, adaptive=0.5)
    drawn = draw_noise(random, 0, 0, [0, 1], SHAPE)
    shifted = combine(random, torch.zeros(2, *SHAPE), drawn, latents)
    sizes = shifted[:, :, 0, 0] / drawn["offset"][:, :, 0, 0]
    strengths = drawn["offset_strength"].reshape(2, 1)
    assert 0 < float(strengths.min()) < float(strengths.max()) < 1
    torch.testing.assert_close(sizes, 0.1 * strengths + torch.tensor([0.2, 0.0, 0.2, 0.2]))
    falling = NoiseSettings(offset=0.1, adaptive=-1.0)
    assert float(combine(falling, torch.zeros(2, *SHAPE), drawn, latents)[:, 0].abs().max()) == 0


def test_pyramid_noise_has_unit_variance_and_low_frequencies() -> None:
    settings = NoiseSettings(pyramid_levels=8, pyramid_discount=0.8)
    plain = torch.from_numpy(np.random.default_rng(0).standard_normal((64, 4, 32, 32), dtype=np.float32))
    drawn = draw_noise(settings, 0, 0, range(64), (4, 32, 32))
    noise = combine(settings, plain, drawn, torch.zeros_like(plain))
    torch.testing.assert_close(noise.std(dim=(1, 2, 3)), torch.ones(64))
    coarse = [float(torch.nn.functional.avg_pool2d(rows, 8).var()) for rows in (plain, noise)]
    assert coarse[1] > 5 * coarse[0]


def test_perturbation_moves_the_input_alone() -> None:
    settings = NoiseSettings(perturbation=0.5)
    noise = torch.zeros(64, *SHAPE)
    drawn = draw_noise(settings, 0, 0, range(64), SHAPE)
    assert torch.equal(combine(settings, noise, drawn, noise), noise)
    assert float(perturb(noise, drawn).std()) == pytest.approx(0.5, rel=0.02)
    assert torch.equal(perturb(noise, {}), noise)


def test_timesteps_stay_between_their_bounds() -> None:
    places = range(4000)
    uniform = draw_timesteps(TimestepSettings(200, 300), 1, 2, places, 1000)
    assert (int(uniform.min()), int(uniform.max())) == (200, 299)
    middle = draw_timesteps(TimestepSettings(sampling="logit_normal"), 1, 2, places, 1000).float()
    assert float(middle.mean()) == pytest.approx(500, abs=15)
    share = float(((middle > 250) & (middle < 750)).float().mean())
    assert share == pytest.approx(0.728, abs=0.03)  # |N| < log 3
    low = draw_timesteps(TimestepSettings(sampling="logit_normal", mean=-2.0), 1, 2, places, 1000).float()
    assert float(low.median()) == pytest.approx(1000 / (1 + math.e**2), abs=15)
    halves = [draw_timesteps(TimestepSettings(), 1, 2, part, 1000) for part in (range(2), range(2, 4))]
    assert torch.equal(torch.cat(halves), draw_timesteps(TimestepSettings(), 1, 2, range(4), 1000))


def test_importance_draws_large_losses_more_often_and_keeps_the_mean() -> None:
    settings = TimestepSettings(100, 900)
    sampler = Importance(settings, 1000, torch.device("cpu"))
    shares = draw_shares(0, 0, range(20000))

    def loss(t: Tensor) -> Tensor:
        return 1.0 + 9.0 * (t >= 700).float()

    uniform, weights = sampler.place(shares)
    torch.testing.assert_close(uniform, 100 + (shares * 800).long(), atol=1, rtol=0)
    torch.testing.assert_close(weights, torch.ones_like(weights))
    sampler.note(uniform, loss(uniform), torch.ones(20000))
    sampler.end_update(sampler.sums())
    moved, weights = sampler.place(shares)
    assert (int(moved.min()), int(moved.max())) == (100, 899)
    high = float((moved >= 700).float().mean())
    # A quarter of the range has ten times the loss: 10/4 of 10/4 + 3/4, less the uniform share.
    assert high == pytest.approx(0.9 * (2.5 / 3.25) + 0.1 * 0.25, abs=0.01)
    assert float((loss(moved) * weights).mean()) == pytest.approx(float(loss(uniform).mean()), rel=0.02)
    again = Importance(settings, 1000, torch.device("cpu"))
    again.load(sampler.state())
    assert torch.equal(again.place(shares)[0], moved)
    assert len(sampler.state()["moments"]) == BINS


def test_importance_learns_also_of_few_timesteps_and_forgets_others() -> None:
    few = Importance(TimestepSettings(100, 104), 1000, torch.device("cpu"))
    times = torch.arange(100, 104)
    few.note(times, torch.tensor([1.0, 1.0, 1.0, 5.0]), torch.ones(4))
    few.end_update(few.sums())
    moved, weights = few.place(draw_shares(0, 0, range(8000)))
    found = torch.stack([(moved == time).float().mean() for time in times])
    torch.testing.assert_close(found, 0.9 * torch.tensor([1.0, 1.0, 1.0, 5.0]) / 8 + 0.1 / 4, atol=0.02, rtol=0)
    assert float(weights.mean()) == pytest.approx(1, abs=0.02)
    for bounds in (TimestepSettings(), TimestepSettings(104, 108)):
        other = Importance(bounds, 1000, torch.device("cpu"))
        other.load(few.state())
        assert float(other.moments.sum()) == 0


def test_padding_does_not_count_for_importance() -> None:
    samplers = [Importance(TimestepSettings(), 1000, torch.device("cpu")) for _ in range(2)]
    times, losses = torch.tensor([10, 500, 990]), torch.tensor([1.0, 2.0, 3.0])
    samplers[0].note(times, losses, torch.tensor([1.0, 1.0, 0.0]))
    samplers[1].note(times[:2], losses[:2], torch.ones(2))
    for sampler in samplers:
        sampler.end_update(sampler.sums())
    assert torch.equal(samplers[0].moments, samplers[1].moments)
    assert int((samplers[0].moments > 0).sum()) == 2
