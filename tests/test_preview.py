"""Samplers that denoise, sample pictures that are due, whole and explained, and that leave the training alone."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from sd_train.errors import ConfigError
from sd_train.families.specs import LatentSpec
from sd_train.preview import Preview
from sd_train.prompts import CANONICAL_SAMPLERS, SAMPLER_ALIASES, SAMPLER_NAMES, Prompt
from sd_train.report import Report
from sd_train.samplers import LABELS, canonical_sampler, make_sampler
from sd_train.types import Progress

# The training noise schedule, computed here once more: sqrt(beta) goes evenly from sqrt(0.00085) to sqrt(0.012).
ALPHAS = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


def denoise(name: str, prediction: Literal["epsilon", "v_prediction"], steps: int, deviation: float) -> Tensor:
    """Sample where the data are normal around `POINT`: the best denoiser is then known in closed form."""
    generator = torch.Generator().manual_seed(1)
    sampler: Any = make_sampler(name, prediction, steps)
    sampler.set_timesteps(steps)
    x = torch.randn(1, 4, 16, 16, generator=generator) * sampler.init_noise_sigma
    extra = {"generator": generator} if "generator" in inspect.signature(sampler.step).parameters else {}
    for t in sampler.timesteps:
        noisy = sampler.scale_model_input(x, t)
        alpha = float(np.interp(float(t), np.arange(1000), ALPHAS))
        noise = (noisy - alpha**0.5 * POINT) * (1 - alpha) ** 0.5 / (alpha * deviation**2 + 1 - alpha)
        clean = (noisy - (1 - alpha) ** 0.5 * noise) / alpha**0.5
        output = noise if prediction == "epsilon" else alpha**0.5 * noise - (1 - alpha) ** 0.5 * clean
        x = sampler.step(output, t, x, **extra).prev_sample
    return x


POINT = torch.tensor([1.5, -0.5, 0.3, -2.5]).reshape(1, 4, 1, 1)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", CANONICAL_SAMPLERS)
def test_a_single_data_point_is_found(name: str, prediction: Literal["epsilon", "v_prediction"]) -> None:
    for steps in (1, 30):
        # DDIM, PNDM and DPM-Solver end at the schedule's smallest noise, which has a deviation of 0.029.
        tolerance = 0.15 if name in ("ddim", "pndm", "dpmsolver") else 1e-4
        assert (denoise(name, prediction, steps, 0.0) - POINT).abs().max() < tolerance


@pytest.mark.parametrize("name", CANONICAL_SAMPLERS)
def test_a_normal_distribution_keeps_its_width(name: str) -> None:
    found = denoise(name, "epsilon", 30, 1.0) - POINT
    assert 0.85 < found.std() < 1.12
    assert found.mean().abs() < 0.1


@pytest.mark.parametrize("name", ["ddim", "pndm", "dpmsolver", "dpmsolver++"])
@pytest.mark.parametrize("steps", [1, 9, 201, 334, 600, 999, 1000])
def test_unusual_numbers_of_steps(name: str, steps: int) -> None:
    sampler: Any = make_sampler(name, "epsilon", steps)
    sampler.set_timesteps(steps)
    times = [int(t) for t in sampler.timesteps]
    assert 0 <= min(times) <= max(times) <= 999
    assert max(times) >= (800 if steps == 201 else 900)
    assert torch.isfinite(denoise(name, "epsilon", min(steps, 30), 0.5)).all()


def test_every_name_has_a_sampler_and_a_label() -> None:
    assert set(LABELS) == set(CANONICAL_SAMPLERS)
    for name in CANONICAL_SAMPLERS:
        config: Any = make_sampler(name, "v_prediction").config
        assert (config.beta_start, config.beta_end, config.beta_schedule) == (0.00085, 0.012, "scaled_linear")
        assert config.prediction_type == "v_prediction"
        assert config.get("clip_sample", False) is False
    assert set(SAMPLER_NAMES) == {*CANONICAL_SAMPLERS, *SAMPLER_ALIASES}
    for alias, name in SAMPLER_ALIASES.items():
        assert canonical_sampler(alias.upper()) == name
    with pytest.raises(ConfigError, match="euler_a"):
        make_sampler("euler_b", "epsilon")


def test_lms_coefficients_are_the_integrals() -> None:
    sampler: Any = make_sampler("lms", "epsilon")
    sampler.set_timesteps(10)
    sigmas = sampler.sigmas.double().numpy()
    for t, order in ((0, 1), (1, 2), (5, 4), (9, 4)):
        nodes = sigmas[[t - k for k in range(order)]]
        for k in range(order):
            basis = np.poly1d([1.0])
            for other in (node for number, node in enumerate(nodes) if number != k):
                basis *= np.poly1d([1.0, -other]) / (nodes[k] - other)
            integral = np.polyint(basis)
            expected = integral(sigmas[t + 1]) - integral(sigmas[t])
            assert sampler.get_lms_coefficient(order, t, k) == pytest.approx(expected, rel=1e-6)


class TinyFamily:
    """A Stable Diffusion of a few thousand weights, built with diffusers' own classes."""

    prediction = "epsilon"
    zero_terminal_snr = False
    latent = LatentSpec(channels=4, factor=2, scale=0.18215)

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.unet = UNet2DConditionModel(
            sample_size=32,
            in_channels=4,
            out_channels=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=8,
            attention_head_dim=4,
            norm_num_groups=4,
            dropout=0.5,
        )
        self.vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
        ).eval()
        self.text_encoder = nn.Embedding(256, 8)
        self.networks: dict[str, nn.Module] = {"unet": self.unet, "text_encoder": self.text_encoder}
        self.scheduler = DDPMScheduler()

    def prompt_arguments(self, prompt: str, negative: str, width: int, height: int) -> dict[str, Tensor]:
        ids = torch.tensor([list(text.encode().ljust(77)[:77]) for text in (prompt, negative)])
        states = self.text_encoder(ids)
        return {"prompt_embeds": states[:1], "negative_prompt_embeds": states[1:]}

    def decode_latents(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents.to(self.vae.dtype) / self.latent.scale).sample.float()

    def pipeline(self, scheduler: Any) -> StableDiffusionPipeline:
        return StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=None,
            tokenizer=None,
            unet=self.unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


class Live:
    """Shows the live weights; counts the entries and exits."""

    def __init__(self) -> None:
        self.entered = self.left = 0

    @contextmanager
    def for_inference(self) -> Iterator[None]:
        self.entered += 1
        try:
            yield
        finally:
            self.left += 1


@pytest.fixture(scope="module")
def family() -> TinyFamily:
    return TinyFamily()


PROMPTS = (
    Prompt("a cat", "blurry, low", width=64, height=48, seed=7, steps=3, scale=4),
    Prompt("ein Löwe 獅子", width=32, height=32, steps=2, sampler="k_euler_a"),
)


def make(family: TinyFamily, folder: Path, prompts: Sequence[Prompt] = PROMPTS, **changes: Any) -> Preview:
    arguments: dict[str, Any] = {
        "family": family,
        "prompts": tuple(prompts),
        "sampler": "ddim",
        "output_dir": folder,
        "output_name": "frog",
        "every_n_steps": 2,
        "every_n_epochs": None,
        "at_first": False,
        "weights": Live(),
        "report": Report(logging_dir=None, total_steps=100, console=False),
        "seed": 42,
    }
    return Preview(**{**arguments, **changes})


def at(step: int, epoch: int = 0, index: int | None = None) -> Progress:
    place = step if index is None else index
    return Progress(seed=42, session_id=1, started_at=0.0, step=step, epoch=epoch, index=place)


def marks(preview: Preview, steps: int, epoch_length: int) -> list[str]:
    progresses = [at(step, step // epoch_length, step % epoch_length) for step in range(steps + 1)]
    return [mark for progress in progresses if (mark := preview.due(progress))]


def test_when_pictures_are_due(family: TinyFamily, tmp_path: Path) -> None:
    def due(steps: int | None, epochs: int | None, at_first: bool = False, start: int = 0) -> list[str]:
        changes = {"every_n_steps": steps, "every_n_epochs": epochs, "at_first": at_first, "start_step": start}
        return marks(make(family, tmp_path, **changes), 12, 3)

    assert due(4, None) == ["000004", "000008", "000012"]
    assert due(3, None, at_first=True) == ["e000000", "000003", "000006", "000009", "000012"]
    assert due(4, 2) == ["e000002", "e000004"]
    assert due(None, 1, start=6) == ["e000003", "e000004"]
    assert due(4, None, start=4) == ["000008", "000012"]
    assert due(None, None) == due(0, -1) == []
    assert due(None, None, at_first=True) == ["e000000"]


def test_files_explain_themselves(family: TinyFamily, tmp_path: Path) -> None:
    with Report(logging_dir=tmp_path / "log", total_steps=4, console=False) as report:
        preview = make(family, tmp_path, report=report)
        preview(at(2))
    first, second = sorted((tmp_path / "sample").iterdir())
    stamp = r"\d{14}"
    assert re.fullmatch(rf"frog_000002_00_{stamp}_7\.png", first.name)
    assert re.fullmatch(rf"frog_000002_01_{stamp}\.png", second.name)
    with Image.open(first) as picture:
        assert picture.size == (64, 48)
        assert picture.text["parameters"] == (
            "a cat\nNegative prompt: blurry, low\nSteps: 3, Sampler: DDIM, CFG scale: 4, Seed: 7, Size: 64x48, "
            'Training step: 2, Training epoch: 0, Output name: "frog"'
        )
        pixels = np.asarray(picture)
    with Image.open(second) as picture:
        assert picture.text["parameters"].startswith("ein Löwe 獅子\nSteps: 2, Sampler: Euler a")
    assert report.log_dir is not None
    events = EventAccumulator(str(report.log_dir / "network_train"))
    events.Reload()
    assert set(events.Tags()["images"]) == {"sample_0", "sample_1"}
    assert events.Images("sample_0")[0].step == 2
    assert pixels.std() > 0


def test_the_picture_is_the_pipelines(family: TinyFamily, tmp_path: Path) -> None:
    """The same numbers as diffusers' whole pipeline makes from the same noise."""
    prompt = PROMPTS[0]
    drawn = make(family, tmp_path).draw(prompt, 7)
    family.unet.eval()
    pipeline = family.pipeline(make_sampler("ddim", "epsilon", prompt.steps))
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        **family.prompt_arguments(prompt.text, prompt.negative, prompt.width, prompt.height),
        latents=torch.randn(1, 4, 24, 32, generator=torch.Generator().manual_seed(7)),
        width=64,
        height=48,
        num_inference_steps=3,
        guidance_scale=4.0,
        output_type="np",
    ).images[0]
    family.unet.train()
    assert np.abs(drawn / 255.0 - expected).max() < 1 / 255


@pytest.mark.parametrize("sampler", CANONICAL_SAMPLERS)
def test_every_sampler_draws_again_what_it_drew(
    family: TinyFamily, tmp_path: Path, sampler: str, recwarn: pytest.WarningsRecorder
) -> None:
    preview = make(family, tmp_path, sampler=sampler)
    prompt = dataclasses.replace(PROMPTS[0], width=32, height=32, sampler=None)
    first = preview.draw(prompt, 5)
    assert (first == preview.draw(prompt, 5)).all()
    assert (first != preview.draw(prompt, 6)).any()
    assert [str(warning.message) for warning in recwarn if warning.category is FutureWarning] == []
    assert (first != preview.draw(dataclasses.replace(prompt, text="another thing"), 5)).any()


def test_without_a_seed_the_run_decides(family: TinyFamily, tmp_path: Path) -> None:
    def drawn(folder: str, seed: int, step: int) -> bytes:
        make(family, tmp_path / folder, PROMPTS[1:], seed=seed)(at(step))
        (file,) = (tmp_path / folder / "sample").iterdir()
        return Image.open(file).tobytes()

    assert drawn("a", 1, 2) == drawn("b", 1, 2)
    assert drawn("c", 1, 4) != drawn("a2", 2, 4)
    assert drawn("d", 1, 4) != drawn("e", 1, 2)


def training(family: TinyFamily, preview: Preview | None) -> tuple[list[Tensor], Tensor]:
    """Four updates with dropout, whose masks come from torch's global generator."""
    torch.manual_seed(3)
    family.unet.train()
    start = {name: tensor.clone() for name, tensor in family.unet.state_dict().items()}
    optimizer = torch.optim.SGD(family.unet.parameters(), lr=0.01)
    states = family.prompt_arguments("a cat", "", 64, 64)["prompt_embeds"]
    for step in range(4):
        noise = torch.randn(1, 4, 8, 8)
        loss = (family.unet(noise, torch.tensor([500]), states.detach()).sample - noise).square().mean()
        loss.backward()
        if preview is not None:
            preview(at(step + 1))
        optimizer.step()
        optimizer.zero_grad()
    trained = [parameter.detach().clone() for parameter in family.unet.parameters()]
    family.unet.load_state_dict(start)
    return trained, torch.get_rng_state()


def test_pictures_change_nothing(family: TinyFamily, tmp_path: Path) -> None:
    family.unet.mid_block.eval()
    before = [module.training for module in family.unet.modules()]
    weights = Live()
    config = dict(family.scheduler.config)
    without, state_without = training(family, None)
    preview = make(family, tmp_path, weights=weights, every_n_steps=1)
    family.unet.mid_block.eval()
    within = [module.training for module in family.unet.modules()]
    preview(at(1))
    assert [module.training for module in family.unet.modules()] == within == before
    assert not family.vae.training
    assert family.text_encoder.training
    drawn, state_drawn = training(family, preview)
    assert all(torch.equal(a, b) for a, b in zip(without, drawn, strict=True))
    assert torch.equal(state_without, state_drawn)
    assert (weights.entered, weights.left) == (5, 5)
    assert dict(family.scheduler.config) == config
    assert all(parameter.requires_grad for parameter in family.unet.parameters())
    assert len(list((tmp_path / "sample").iterdir())) >= 8


def test_what_fails_is_told_and_the_rest_is_drawn(
    family: TinyFamily, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = dataclasses.replace(PROMPTS[0], width=63)
    weights = Live()
    with caplog.at_level(logging.WARNING):
        make(family, tmp_path, (bad, PROMPTS[1], bad), weights=weights)(at(2))
    (record,) = caplog.records
    assert "prompt 0, prompt 2 (ValueError: `height` and `width` have to be divisible by 8" in record.getMessage()
    assert [file.name[:14] for file in (tmp_path / "sample").iterdir()] == ["frog_000002_01"]
    assert weights.left == 1

    caplog.clear()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "sample").write_text("a file where the folder should be")
    make(family, tmp_path / "taken")(at(2))
    assert len(caplog.records) == 1


def test_values_that_are_not_finite_are_told(family: TinyFamily, tmp_path: Path, caplog: Any) -> None:
    broken = TinyFamily()
    with torch.no_grad():
        broken.vae.post_quant_conv.bias.fill_(float("nan"))
    make(broken, tmp_path)(at(2))
    assert "not finite" in caplog.text
    assert not (tmp_path / "sample").exists()


def test_ctrl_c_passes_through(family: TinyFamily, tmp_path: Path) -> None:
    class Interrupted(TinyFamily):
        def pipeline(self, scheduler: Any) -> StableDiffusionPipeline:
            raise KeyboardInterrupt

    weights = Live()
    with pytest.raises(KeyboardInterrupt):
        make(Interrupted(), tmp_path, weights=weights)(at(2))
    assert weights.left == 1


def test_one_rank_draws_and_names_are_checked(family: TinyFamily, tmp_path: Path) -> None:
    make(family, tmp_path, is_main=False)(at(2))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="ddim"):
        make(family, tmp_path, sampler="plms")


@pytest.mark.parametrize("network", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decoder", [torch.float32, torch.bfloat16])
def test_mixed_precision(tmp_path: Path, network: torch.dtype, decoder: torch.dtype) -> None:
    """U-Net, text encoder and autoencoder may be kept in different precisions, as in training."""
    family = TinyFamily()
    reference = make(family, tmp_path).draw(PROMPTS[0], 7)
    family.unet.to(network)
    family.vae.to(decoder)
    preview = make(family, tmp_path, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    difference = np.abs(preview.draw(PROMPTS[0], 7).astype(int) - reference)
    assert 0 < difference.mean() < 8
    assert not torch.is_autocast_enabled("cpu")
