"""Every family against diffusers' own pipelines: text, noise prediction, sizes, pictures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sd_train.demo.tiny_model import TinyKind
from sd_train.device import Device
from sd_train.drawing import draw_pixels
from sd_train.families.latent import LatentDiffusion, guidance_embedding
from sd_train.families.text import TextOptions
from sd_train.objectives.denoise import Denoise
from sd_train.prompts import Prompt
from sd_train.samplers import make_sampler
from sd_train.trainables.lora import Lora, LoraSettings
from sd_train.types import Batch, Conditioning, Geometry
from tests.models import ALL_KINDS, changed_tiny, fresh_tiny, reference_pipeline, tiny_parts

LONG = ", ".join(f"a photo of {thing} number {n}" for n in range(6) for thing in ("a cat", "a rocket", "two cups"))
CAPTIONS = {"short": "a cat, close up", "empty": "", "long": LONG, "odd": "Ein HÄUSCHEN  <b>&amp;</b> (x:1.2) 猫 🚀!"}
# Two samples of one bucket, 64 pixels high and 96 wide, with crops of their own; the second is flipped.
GEOMETRY = [
    Geometry((683, 1024), (0, 3), (64, 96), False, (64, 99)),
    Geometry((500, 500), (16, 0), (64, 96), True, (96, 96)),
]
TIMESTEPS = torch.tensor([17, 801])

Pair = tuple[TinyKind, LatentDiffusion, Any]


@pytest.fixture(scope="module", params=ALL_KINDS)
def pair(request: pytest.FixtureRequest) -> Pair:
    return request.param, fresh_tiny(request.param), reference_pipeline(request.param)


def is_xl(kind: TinyKind) -> bool:
    return kind in ("sdxl", "refiner")


def noise(seed: int) -> Tensor:
    return torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(seed))


def their_text(kind: TinyKind, pipeline: Any, caption: str, clip_skip: int | None) -> tuple[Tensor, Tensor | None]:
    """States and pooled states as diffusers encodes a prompt."""
    if not is_xl(kind):
        # diffusers counts the layers that are left out, A1111 and sd-scripts the layer from the end that is used.
        skip = None if clip_skip in (None, 1) else clip_skip - 1
        return pipeline.encode_prompt(caption, "cpu", 1, False, clip_skip=skip)[0], None
    skip = None if clip_skip in (None, 1, 2) else clip_skip - 2
    states, _, pooled, _ = pipeline.encode_prompt(
        caption, device="cpu", do_classifier_free_guidance=False, clip_skip=skip
    )
    return states, pooled


def their_time_ids(kind: TinyKind, pipeline: Any) -> Tensor:
    rows = []
    for known in GEOMETRY:
        if kind == "refiner":
            # The aesthetic scores that its pipeline takes where none are given.
            sizes = (known.original, known.crop, known.target, 6.0, 2.5, known.original, (0, 0), known.target)
            rows.append(pipeline._get_add_time_ids(*sizes, torch.float32, 32)[0])
        else:
            rows.append(
                pipeline._get_add_time_ids(known.original, known.crop, known.target, torch.float32, 32)
            )
    return torch.cat(rows)


@pytest.mark.parametrize("clip_skip", [None, 1, 2, 3])
def test_text_and_prediction_equal_diffusers(clip_skip: int | None, pair: Pair) -> None:
    kind, family, pipeline = pair
    if clip_skip == 3 and kind == "sd1":
        # Its encoder has two layers.
        return
    family.configure(TextOptions(clip_skip))
    for caption in CAPTIONS.values():
        with torch.no_grad():
            texts = family.encode_texts([caption, caption])
            ours = family.predict(noise(5), TIMESTEPS, family.condition(texts, {}, GEOMETRY))
            states, pooled = their_text(kind, pipeline, caption, clip_skip)
            states = states.expand(2, -1, -1)
            torch.testing.assert_close(texts["states"], states, atol=1e-5, rtol=0)
            added = None
            if pooled is not None:
                pooled = pooled.expand(2, -1)
                torch.testing.assert_close(texts["pooled"], pooled, atol=1e-5, rtol=0)
                added = {"text_embeds": pooled, "time_ids": their_time_ids(kind, pipeline)}
            theirs = pipeline.unet(noise(5), TIMESTEPS, states, added_cond_kwargs=added).sample
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    family.configure(TextOptions())


def test_what_is_told_changes_the_prediction(pair: Pair) -> None:
    kind, family, _ = pair
    with torch.no_grad():
        cat, rocket = (family.encode_texts([text]) for text in ("a cat", "a rocket"))
        family.configure(TextOptions(2 if not is_xl(kind) else 3))
        deeper = family.encode_texts(["a cat"])
        family.configure(TextOptions())
        geometries = [GEOMETRY[:1]] * 3 + [[each] for each in changed_geometries()]
        told = [cat, rocket, deeper] + [cat] * (len(geometries) - 3)
        predictions = [
            family.predict(noise(5)[:1], TIMESTEPS[1:], family.condition(texts, {}, geometry))
            for texts, geometry in zip(told, geometries, strict=True)
        ]
    for prediction in predictions[1:3]:
        assert (predictions[0] - prediction).abs().mean() > 1e-3
    for geometry, prediction in zip(changed_geometries(), predictions[3:], strict=True):
        # The refiner is not told the bucket's size.
        same = not is_xl(kind) or (kind == "refiner" and geometry.target != GEOMETRY[0].target)
        assert torch.equal(predictions[0], prediction) is same


def changed_geometries() -> list[Geometry]:
    known = GEOMETRY[0]
    return [
        known._replace(original=(683, 900)), known._replace(crop=(5, 3)), known._replace(crop=(0, 9)),
        known._replace(target=(64, 128)),
    ]  # fmt: skip


def test_time_ids_are_heights_before_widths() -> None:
    for kind, last in (("sdxl", [[64, 96], [64, 96]]), ("refiner", [[6], [6]])):
        family = fresh_tiny(kind)
        condition = family.condition({"states": torch.zeros(2, 77, 32), "pooled": torch.zeros(2, 32)}, {}, GEOMETRY)
        expected = [[683, 1024, 0, 3, *last[0]], [500, 500, 16, 0, *last[1]]]
        assert condition.extra["time_ids"].tolist() == expected
        assert condition.extra["time_ids"].dtype == torch.float32


def test_half_precision_keeps_the_sizes() -> None:
    # 1001 is no number of bfloat16: 1000 would be told in its place.
    family = fresh_tiny("sdxl").to(torch.device("cpu"), torch.bfloat16)
    known = GEOMETRY[0]
    with torch.no_grad():
        texts = family.encode_texts(["a cat"])
        told = family.condition(texts, {}, [known._replace(original=(1001, 1000))])
    assert told.extra["time_ids"][0, :2].tolist() == [1001, 1000]
    assert family.vae.dtype == torch.float32
    assert family.encode_images(torch.zeros(1, 3, 64, 64))["mean"].dtype == torch.float32


def test_autoencoder_equals_diffusers(pair: Pair) -> None:
    _, family, pipeline = pair
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        theirs = pipeline.vae.encode(pixels).latent_dist
        drawn = theirs.sample(torch.Generator().manual_seed(9)) * pipeline.vae.config.scaling_factor
        decoded = pipeline.vae.decode(drawn / pipeline.vae.config.scaling_factor).sample
    ours = family.encode_images(pixels)
    assert ours["mean"].shape == (2, *family.latent.shape(96, 64)) == (2, 4, 8, 12)
    torch.testing.assert_close(ours["mean"], theirs.mean, atol=1e-5, rtol=0)
    torch.testing.assert_close((0.5 * ours["logvar"]).exp(), theirs.std, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(family.draw_latents(ours, noise(9)), drawn, atol=1e-5, rtol=0)
    torch.testing.assert_close(family.decode_latents(drawn), decoded, atol=1e-5, rtol=0)


# Pictures

PROMPT = Prompt("a photo of a cat", "blurry, low", width=96, height=64, seed=11, steps=2, scale=6.0)


def their_picture(
    kind: TinyKind, pipeline: Any, prompt: Prompt, sampler: str, zero_snr: bool = False, **more: Any
) -> Tensor:
    prediction: Any = "v_prediction" if kind == "sd2-v" else "epsilon"
    pipeline.scheduler = make_sampler(sampler, prediction, prompt.steps, zero_snr)
    words = {} if "prompt_embeds" in more else {"prompt": prompt.text, "negative_prompt": prompt.negative}
    found: Tensor = pipeline(
        **words, **more, width=prompt.width, height=prompt.height, num_inference_steps=prompt.steps,
        guidance_scale=prompt.scale, generator=torch.Generator("cpu").manual_seed(11), output_type="pt",
    ).images  # fmt: skip
    return found[0]


def our_picture(family: LatentDiffusion, prompt: Prompt, sampler: str) -> Tensor:
    return (draw_pixels(family, prompt, sampler, 11) / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpmsolver++"])
def test_pictures_equal_diffusers(sampler: str, pair: Pair) -> None:
    kind, family, pipeline = pair
    if kind != "refiner":
        prompt = replace(PROMPT, negative="") if sampler == "ddim" else PROMPT
        theirs = their_picture(kind, pipeline, prompt, sampler)
        torch.testing.assert_close(our_picture(family, prompt, sampler), theirs, atol=1e-5, rtol=0)


def test_pictures_with_clip_skip_equal_diffusers(pair: Pair) -> None:
    kind, family, pipeline = pair
    if kind == "refiner":
        return
    clip_skip = 3 if is_xl(kind) else 2
    family.configure(TextOptions(clip_skip))
    embeddings: dict[str, Tensor] = {}
    # diffusers' pipelines leave layers out for the prompt alone; A1111, ComfyUI, sd-scripts and ours for both.
    for text, name in ((PROMPT.text, ""), (PROMPT.negative, "negative_")):
        states, pooled = their_text(kind, pipeline, text, clip_skip)
        embeddings[f"{name}prompt_embeds"] = states
        if pooled is not None:
            embeddings[f"{name}pooled_prompt_embeds"] = pooled
    theirs = their_picture(kind, pipeline, PROMPT, "ddim", **embeddings)
    ours = our_picture(family, PROMPT, "ddim")
    family.configure(TextOptions())
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_a_long_prompts_picture_equals_diffusers(pair: Pair) -> None:
    kind, family, pipeline = pair
    if kind == "refiner":
        return
    prompt = replace(PROMPT, text=LONG)
    embeddings: list[dict[str, Tensor]] = []
    with torch.no_grad():
        for text, name in ((LONG, ""), (prompt.negative, "negative_")):
            family.configure(TextOptions(None, 150))
            rows = family.encode_texts([text])
            named = {"states": f"{name}prompt_embeds", "pooled": f"{name}pooled_prompt_embeds"}
            embeddings.append({named[key]: row for key, row in rows.items()})
    family.configure(TextOptions())
    assert embeddings[0]["prompt_embeds"].shape[1] == 152
    theirs = their_picture(kind, pipeline, prompt, "ddim", **embeddings[0], **embeddings[1])
    torch.testing.assert_close(our_picture(family, prompt, "ddim"), theirs, atol=1e-5, rtol=0)


def test_the_refiners_picture_is_denoised_with_its_scores() -> None:
    family, pipeline = fresh_tiny("refiner"), reference_pipeline("refiner")
    scheduler: Any = make_sampler("ddim", "epsilon", PROMPT.steps)
    scheduler.set_timesteps(PROMPT.steps)
    x = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(11))
    with torch.no_grad():
        told = [their_text("refiner", pipeline, text, None) for text in (PROMPT.text, PROMPT.negative)]
        for t in scheduler.timesteps:
            wanted, unwanted = (
                pipeline.unet(
                    x, t, states,
                    added_cond_kwargs={"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 96, 0, 0, score]])},
                ).sample
                for (states, pooled), score in zip(told, (6.0, 2.5), strict=True)
            )  # fmt: skip
            x = scheduler.step(unwanted + PROMPT.scale * (wanted - unwanted), t, x).prev_sample
        picture = pipeline.vae.decode(x / pipeline.vae.config.scaling_factor).sample[0]
    torch.testing.assert_close(draw_pixels(family, PROMPT, "ddim", 11), picture, atol=1e-5, rtol=0)


def test_pictures_after_zero_terminal_snr_equal_diffusers() -> None:
    family, pipeline = fresh_tiny("sd2-v", zero_terminal_snr=True), reference_pipeline("sd2-v")
    for sampler in ("ddim", "euler"):
        theirs = their_picture("sd2-v", pipeline, PROMPT, sampler, zero_snr=True)
        torch.testing.assert_close(our_picture(family, PROMPT, sampler), theirs, atol=1e-5, rtol=0)
        plain = their_picture("sd2-v", pipeline, PROMPT, sampler)
        assert (plain - theirs).abs().mean() > 1e-3


# What is learned


def loss_of(family: LatentDiffusion, timesteps: Tensor) -> tuple[Tensor, Batch]:
    lora = Lora(LoraSettings(rank=1, alpha=1.0, dropout=0.0, rates={}, seed=0))
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(2)) * 2 - 1
    batch = Batch(
        keys=["a", "b"], paths=["a", "b"], captions=["a cat", "a dog"], pixels=pixels, images=None, noise=noise(3),
        latent_noise=noise(4), timesteps=timesteps, weight=torch.tensor([1.0, 0.5]), mask=None, texts=None,
        geometry=GEOMETRY, micro=0,
    )  # fmt: skip
    with torch.no_grad():
        return Denoise(family, lora, Device(torch.device("cpu"), "no")).loss(batch), batch


def test_the_target_is_what_diffusers_scheduler_says(pair: Pair) -> None:
    from diffusers import DDPMScheduler

    kind, family, pipeline = pair
    loss, batch = loss_of(family, TIMESTEPS)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    with torch.no_grad():
        encoded = pipeline.vae.encode(batch.pixels).latent_dist
        latents = (encoded.mean + encoded.std * batch.latent_noise) * pipeline.vae.config.scaling_factor
        noisy = scheduler.add_noise(latents, batch.noise, TIMESTEPS)
        target = scheduler.get_velocity(latents, batch.noise, TIMESTEPS) if kind == "sd2-v" else batch.noise
        told = [their_text(kind, pipeline, caption, None) for caption in batch.captions]
        added = None
        if is_xl(kind):
            pooled = torch.cat([each for _, each in told if each is not None])
            added = {"text_embeds": pooled, "time_ids": their_time_ids(kind, pipeline)}
        output = pipeline.unet(
            noisy, TIMESTEPS, torch.cat([states for states, _ in told]), added_cond_kwargs=added
        ).sample
    expected = (output - target).square().mean(dim=(1, 2, 3)) * batch.weight
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


def test_zero_terminal_snr_is_trained_on_pure_noise() -> None:
    from diffusers import DDPMScheduler

    family = fresh_tiny("sd2-v", zero_terminal_snr=True)
    theirs = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True
    )
    torch.testing.assert_close(family.schedule.alphas_cumprod, theirs.alphas_cumprod, atol=1e-6, rtol=1e-4)
    assert family.schedule.alphas_cumprod[-1] == 0
    loss, _ = loss_of(family, torch.tensor([999, 999]))
    assert torch.isfinite(loss).all()
    x0, eps = noise(1), noise(2)
    end = torch.tensor([999, 999])
    assert torch.equal(family.schedule.add_noise(x0, eps, end), eps)
    assert torch.equal(family.schedule.velocity(x0, eps, end), -x0)


# Other U-Nets of the same shapes


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_lcm_networks_are_told_that_there_is_no_guidance(kind: TinyKind) -> None:
    family = changed_tiny(kind, time_cond_proj_dim=32)
    from diffusers import StableDiffusionPipeline

    embed = StableDiffusionPipeline.get_guidance_scale_embedding
    for w in (0.0, 3.5):
        theirs = embed(None, torch.tensor([w]), 32)
        torch.testing.assert_close(guidance_embedding(torch.tensor([w]), 32), theirs, atol=1e-5, rtol=0)
    with torch.no_grad():
        told = family.condition(family.encode_texts(["a", "b"]), {}, GEOMETRY)
        ours = family.predict(noise(5), TIMESTEPS, told)
        added: Any = None if kind == "sd1" else {"text_embeds": told.pooled, **told.extra}
        embedded = [embed(None, torch.tensor([w] * 2), 32) for w in (0.0, 3.5)]
        theirs = [
            family.unet(noise(5), TIMESTEPS, told.states, added_cond_kwargs=added, timestep_cond=each).sample
            for each in embedded
        ]
        guided = Conditioning(told.states, told.pooled, {**told.extra, "guidance": torch.tensor([3.5, 3.5])})
        torch.testing.assert_close(ours, theirs[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(family.predict(noise(5), TIMESTEPS, guided), theirs[1], atol=1e-5, rtol=0)
    assert (theirs[0] - theirs[1]).abs().mean() > 1e-4
    assert torch.isfinite(draw_pixels(family, replace(PROMPT, steps=1), "ddim", 1)).all()


def test_networks_shaped_as_ssd_1b_predict_and_get_loras() -> None:
    parts = tiny_parts("sdxl")
    family = changed_tiny(
        "sdxl", transformer_layers_per_block=[1, 1, 2], reverse_transformer_layers_per_block=[[1, 1, 2], [2, 1, 1], 1],
        mid_block_type="UNetMidBlock2D",
    )  # fmt: skip
    assert parts.family == family.name
    with torch.no_grad():
        told = family.condition(family.encode_texts(["a", "b"]), {}, GEOMETRY)
        assert family.predict(noise(5), TIMESTEPS, told).shape == (2, 4, 8, 12)
    for convolutions in (False, True):
        targets = family.lora_targets("unet", convolutions)
        assert all(family.module("unet", target.path).weight is not None for target in targets)
        assert not any("middle_block_1" in target.key for target in targets)
    attention = {name for name, module in family.unet.named_modules() if name.endswith(("to_q", "to_out.0", "proj_in"))}
    assert attention <= {target.path for target in family.lora_targets("unet")}


def test_the_pipeline_is_made_once(pair: Pair) -> None:
    family = pair[1]
    first, second = (make_sampler(name, family.prediction, 4, False) for name in ("ddim", "euler"))
    made = family.pipeline(first)
    assert made.scheduler is first
    assert family.pipeline(second) is made
    assert made.scheduler is second
    assert made.unet is family.unet
