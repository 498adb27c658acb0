"""What Stable Diffusion 1.x, 2.x and SDXL share: a U-Net on an autoencoder's latents, told by CLIP text encoders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn

from sd_train.diffusion.schedule import NoiseSchedule
from sd_train.errors import ModelError
from sd_train.families.autoencoder import posterior_rows
from sd_train.families.base import digest_of
from sd_train.families.build import TITLES, build_network, check_inputs, model_named, published_tensors
from sd_train.families.keys import LoraTarget, live_text_name, text_lora_targets, unet_lora_targets, unet_shape_of
from sd_train.families.parts import ModelParts, Part
from sd_train.families.sources import DictSource
from sd_train.families.specs import LatentSpec
from sd_train.families.text import ChunkTokenizer, TextEncoder, TextOptions, Weighting, clip_transformer
from sd_train.families.tokenizer import VOCABULARY_SIZE
from sd_train.types import Conditioning

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin, UNet2DConditionModel

LONGEST_PROMPT = 3
"""Chunks that a preview's prompt may have, whatever the training uses (sd-scripts: 225 tokens)."""


class LatentDiffusion(ABC):
    """A loaded model; every network is frozen and in evaluation mode.

    `networks` holds the U-Net and the text encoders: "unet", "text_encoder", "text_encoder_2".
    """

    base_version: str
    architecture: str
    latents_suffix: str
    original_lora_names = False
    """Whether kohya's LoRA keys of the U-Net follow the original checkpoint's names."""
    text_prefixes: Mapping[str, str]
    """What kohya's LoRA keys of each text encoder begin with."""

    def __init__(self, parts: ModelParts, dtype: torch.dtype | None = torch.float32) -> None:
        """Build the networks of `parts`.

        Args:
            parts: what was read.
            dtype: of the U-Net and the text encoders; None: as they are stored, until `to` is called. The VAE is
                always float32.

        Raises:
            ModelError: if something does not fit, or the U-Net takes more than latents.
        """
        check_inputs(parts.parts["unet"].config, parts.parts["vae"].config, parts.origin)
        self.name: str = parts.family
        # Not what the tensors came from: a pickle's would stay in memory beside the networks.
        configs = {role: Part(part.config, DictSource()) for role, part in parts.parts.items()}
        self.origin = replace(parts, parts=configs)
        self.prediction: Literal["epsilon", "v_prediction", "sample"] = parts.prediction
        self.zero_terminal_snr = parts.zero_terminal_snr
        self.unet: UNet2DConditionModel = build_network(parts, "unet", dtype)
        self.vae: AutoencoderKL = build_network(parts, "vae", torch.float32)
        self.networks: dict[str, nn.Module] = {"unet": self.unet}
        self.text_encoders: dict[str, TextEncoder] = {}
        for role in self.text_prefixes:
            if role in parts.parts:
                self.networks[role] = network = build_network(parts, role, dtype)
                self.text_encoders[role] = self._text_encoder(role, network)
        schedule = NoiseSchedule.scaled_linear()
        self.schedule = schedule.zero_terminal_snr() if parts.zero_terminal_snr else schedule
        config: Any = self.vae.config
        factor = 2 ** (len(config["block_out_channels"]) - 1)
        self.latent = LatentSpec(config["latent_channels"], factor, config["scaling_factor"])
        self.options = TextOptions()
        self._pipeline: Any = None

    @abstractmethod
    def _text_encoder(self, role: str, network: Any) -> TextEncoder:
        """The text encoder `role` with its tokenizer and rules."""

    def configure(self, options: TextOptions) -> None:
        """How captions are encoded from now on.

        Raises:
            ModelError: if a text encoder has fewer layers than are to be skipped.
        """
        for role, encoder in self.text_encoders.items():
            if options.clip_skip is not None and options.clip_skip > encoder.layers:
                raise ModelError(
                    f"--clip_skip = {options.clip_skip}: the {TITLES[role]} has {encoder.layers} layers; use at most "
                    f"{encoder.layers}"
                )
            encoder.layer = self._layer(options.clip_skip)
        self.options = options

    def end_in_noise(self) -> None:
        """Train, draw and save with zero terminal SNR from now on (Lin et al. 2023)."""
        if not self.zero_terminal_snr:
            self.schedule, self.zero_terminal_snr = self.schedule.zero_terminal_snr(), True
            self.origin = replace(self.origin, zero_terminal_snr=True)

    def _layer(self, clip_skip: int | None) -> int:
        """Which hidden state from the end is used."""
        return clip_skip or 1

    def to(self, device: torch.device, dtype: torch.dtype, masters: Collection[str] = ()) -> Self:
        """Move every network to `device`, U-Net and text encoders in `dtype`; VAE and `masters` stay float32."""
        for role, network in self.networks.items():
            network.to(device=device, dtype=torch.float32 if role in masters else dtype)
        self.vae.to(device=device)
        self.schedule = self.schedule.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        device: torch.device = self.unet.device
        return device

    def lora_targets(self, role: str, convolutions: bool = False) -> list[LoraTarget]:
        """What gets a LoRA in network `role`, under its published name; `convolutions`: as with `conv_dim`."""
        network = self.networks[role]
        if role != "unet":
            config: Any = network.config
            return text_lora_targets(config.num_hidden_layers, self.text_prefixes[role])
        shape = unet_shape_of(self.unet.config)
        targets = unet_lora_targets(shape, self.original_lora_names, convolutions)
        known = {name for name, _ in network.named_modules()} if convolutions else set()
        return [target for target in targets if not target.path.endswith("conv_shortcut") or target.path in known]

    def module(self, role: str, path: str) -> nn.Module:
        """The live module with the published path `path` in network `role`."""
        network = self.networks[role]
        if role != "unet":
            path = live_text_name(path, clip_transformer(network) is not network)
        return network.get_submodule(path)

    def checkpoint_gradients(self, role: str) -> None:
        """Compute network `role`'s activations again in the backward pass instead of keeping them."""
        network: Any = self.networks[role]
        # Both libraries only do so in training mode, in which nothing is dropped here.
        network.train()
        if role == "unet":
            network.enable_gradient_checkpointing()
        elif hasattr(network, "activation_checkpointing_enable"):
            network.activation_checkpointing_enable({"use_reentrant": False})
        else:
            # Its former name in transformers.
            network.gradient_checkpointing_enable({"use_reentrant": False})

    def encode_images(self, pixels: Tensor) -> dict[str, Tensor]:
        """[B, 3, height, width] in [-1, 1] -> "mean" and "logvar", [B, 4, height / 8, width / 8], float32."""
        return posterior_rows(self.vae, pixels)

    def draw_latents(self, images: Mapping[str, Tensor], noise: Tensor) -> Tensor:
        """A draw from the autoencoder's posterior, scaled (Rombach et al. 2022, appendix G)."""
        return (images["mean"] + (0.5 * images["logvar"]).exp() * noise) * self.latent.scale

    def decode_latents(self, latents: Tensor) -> Tensor:
        """[B, 4, h, w] scaled latents -> [B, 3, 8 h, 8 w], decoded in float32."""
        with torch.no_grad(), torch.autocast(latents.device.type, enabled=False):
            pixels: Tensor = self.vae.decode(latents.to(self.vae.dtype) / self.latent.scale).sample
        return pixels.float()

    def encode_texts(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Captions -> "states", [B, tokens, width], and with SDXL "pooled"; with gradients where they are on."""
        weighting: Weighting = "plain" if self.options.weighted_captions else "none"
        return self._rows(captions, self.options.chunks, weighting)

    def _rows(self, texts: Sequence[str], chunks: int, weighting: Weighting) -> dict[str, Tensor]:
        """States of all text encoders side by side; the pooled ones of the only encoder that has them."""
        encoded = [encoder(texts, chunks, weighting) for encoder in self.text_encoders.values()]
        rows = {"states": torch.cat([text.states for text in encoded], dim=-1)}
        for text in encoded:
            if text.pooled is not None:
                rows["pooled"] = text.pooled
        return rows

    def prompt_arguments(self, prompt: str, negative: str, width: int, height: int) -> dict[str, Any]:
        """Both prompts encoded, to equal length; up to 225 tokens, whatever the training uses.

        Brackets weigh what is in them, whether captions are weighted or not: as in A1111's web UI, and as sd-scripts
        does in its sample pictures. Without a negative prompt the empty text is encoded, as sd-scripts and ComfyUI do
        (diffusers' SDXL pipeline puts zeros there).
        """
        texts = [prompt, negative]
        # Every tokenizer counts the same tokens, but for those that embeddings have added to it.
        tokenizers = [encoder.tokenizer for encoder in self.text_encoders.values()]
        needed = max(tokenizer.chunks_for(texts, LONGEST_PROMPT, weighted=True) for tokenizer in tokenizers)
        rows = self._rows(texts, max(self.options.chunks, needed), "mean")
        arguments = {"prompt_embeds": rows["states"][:1], "negative_prompt_embeds": rows["states"][1:]}
        if "pooled" in rows:
            arguments |= {
                "pooled_prompt_embeds": rows["pooled"][:1],
                "negative_pooled_prompt_embeds": rows["pooled"][1:],
            }
        return arguments

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """[B, 4, h, w], [B] -> the U-Net's output, [B, 4, h, w]; what it means is `prediction`."""
        output = self.unet(
            noisy.to(self._dtype()),
            timesteps,
            encoder_hidden_states=conditioning.states,
            timestep_cond=self._guidance(len(noisy), conditioning),
            added_cond_kwargs=self._added(conditioning),
            return_dict=False,
        )[0]
        assert isinstance(output, Tensor)
        return output

    def _added(self, conditioning: Conditioning) -> dict[str, Tensor] | None:
        return None

    def _guidance(self, batch: int, conditioning: Conditioning) -> Tensor | None:
        """What LCM's U-Nets are told of the guidance scale; None for all others.

        They take w = scale - 1 (Luo et al. 2023, "Latent Consistency Models"). Where nothing says otherwise it is 0:
        a denoising loss learns the prediction without guidance.
        """
        config: Any = self.unet.config
        if config.get("time_cond_proj_dim") is None:
            return None
        w = conditioning.extra.get("guidance")
        if w is None:
            w = torch.zeros(batch, device=self.device)
        return guidance_embedding(w, config["time_cond_proj_dim"]).to(self._dtype())

    def _dtype(self) -> torch.dtype:
        """The U-Net's; its library goes through all modules to tell it."""
        dtype: torch.dtype = self.unet.conv_in.weight.dtype
        return dtype

    def parts(self) -> ModelParts:
        """The live networks as they are saved: published names, the configurations that they were read with."""
        roles = {**self.networks, "vae": self.vae}
        live = {
            role: Part(part.config, DictSource(published_tensors(role, roles[role])))
            for role, part in self.origin.parts.items()
        }
        return replace(self.origin, parts=live)

    def tensors(self, role: str) -> dict[str, Tensor]:
        """All weights of network `role` or "vae" under their published names."""
        return published_tensors(role, self.vae if role == "vae" else self.networks[role])

    def digest(self) -> str:
        """SHA-256 over every weight's name, shape and value: which base model this is, whatever its file."""
        roles = (*self.networks, "vae")
        return digest_of({f"{role}.{name}": each for role in roles for name, each in self.tensors(role).items()})

    def encoder_digest(self, what: Literal["images", "texts"]) -> str:
        """What determines the rows of `encode_images` or `encode_texts` beside their input."""
        if what == "images":
            return digest_of(self.tensors("vae"))
        weights = " ".join(digest_of(self.tensors(role)) for role in self.text_encoders)
        layer = next(iter(self.text_encoders.values())).layer
        settings = f"layer {layer} chunks {self.options.chunks} weighted {self.options.weighted_captions}"
        # Models may have words of their own.
        own = [encoder.tokenizer.added_words for encoder in self.text_encoders.values()]
        return f"{weights} {settings}" + (f" words {own}" if any(own) else "")

    def pipeline(self, scheduler: SchedulerMixin) -> DiffusionPipeline:
        """diffusers' pipeline around our modules, always the same one, with another scheduler."""
        if self._pipeline is None:
            self._pipeline = self._make_pipeline(scheduler)
            self._pipeline.set_progress_bar_config(disable=True)
        self._pipeline.register_modules(scheduler=scheduler)
        return self._pipeline

    @abstractmethod
    def _make_pipeline(self, scheduler: SchedulerMixin) -> DiffusionPipeline:
        """diffusers' pipeline around our modules; it is given prompt embeddings, so it needs no text encoder."""


def guidance_embedding(w: Tensor, width: int) -> Tensor:
    """[B] guidance scales less one -> [B, `width`], float32: sines and cosines of 1000 w (Kingma et al. 2021)."""
    half = width // 2
    rates = torch.exp(torch.arange(half, device=w.device) * (-torch.log(torch.tensor(10000.0)).item() / (half - 1)))
    angles = 1000.0 * w.float()[:, None] * rates
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return nn.functional.pad(embedding, (0, width % 2))


def make_tokenizer(parts: ModelParts, role: str, vocabulary: int, pad_token: str) -> ChunkTokenizer:
    """The tokenizer of text encoder `role`: CLIP's, or for a vocabulary with added tokens the model's own.

    Raises:
        ModelError: if the model has a vocabulary of its own and no tokenizer that fits it.
    """
    from transformers import CLIPTokenizer

    from sd_train.families.tokenizer import clip_tokenizer

    if vocabulary == VOCABULARY_SIZE:
        return ChunkTokenizer(clip_tokenizer(pad_token))
    named = f"{model_named(parts.origin)}: the {TITLES[role]}"
    known = f"{named} knows {vocabulary} tokens instead of CLIP's {VOCABULARY_SIZE}"
    folder = parts.tokenizers.get(role.replace("text_encoder", "tokenizer"))
    if folder is None:
        raise ModelError(f"{known}, and a single file holds no names for them; give the folder, or a model without")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError) as problem:
        reason = " ".join(str(problem).split())[:200]
        raise ModelError(f"{known}, and {folder}, which belongs to it, cannot be read: {reason}") from None
    if len(tokenizer) > vocabulary:
        raise ModelError(f"{known}, its tokenizer has {len(tokenizer)}; they do not belong together")
    return ChunkTokenizer(tokenizer)
