"""Stable Diffusion 1.x: load, encode, condition, predict, save."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from sd_train.config.rules import missing_model
from sd_train.config.textfile import read_text
from sd_train.diffusion.schedule import NoiseSchedule
from sd_train.errors import ModelError
from sd_train.families.base import LatentSpec, digest_of
from sd_train.families.checkpoints import (
    VOCABULARY,
    SdParts,
    join_checkpoint,
    published_config,
    read_tensors,
    split_checkpoint,
    unet_shape_of,
)
from sd_train.families.keys import (
    LoraTarget,
    live_text_name,
    published_text_name,
    text_lora_targets,
    unet_lora_targets,
)
from sd_train.families.text import CHUNK, ChunkTokenizer, clip_transformer, encode_chunks
from sd_train.families.tokenizer import load_clip_tokenizer
from sd_train.files import write_tensors
from sd_train.types import Conditioning, Geometry

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline, SchedulerMixin, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer


class StableDiffusion1:
    """A loaded Stable Diffusion 1.x model; every network is frozen and in evaluation mode."""

    name = "sd1"
    base_version = "sd_v1"
    architecture = "stable-diffusion-v1"
    latents_suffix = "_sd"
    prediction: Literal["epsilon", "v_prediction", "sample"] = "epsilon"

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer | None = None,
    ) -> None:
        """`tokenizer` None is CLIP's published one."""
        self.unet, self.vae, self.text_encoder = unet, vae, text_encoder
        for network in (unet, vae, text_encoder):
            network.requires_grad_(False).eval()
            _without_dropout(network)
        self.networks: dict[str, nn.Module] = {"unet": unet, "text_encoder": text_encoder}
        self.tokenizer = ChunkTokenizer(tokenizer or load_clip_tokenizer("<|endoftext|>"))
        self.clip_skip: int | None = None
        self.chunks = 1
        self.schedule = NoiseSchedule.scaled_linear()
        factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
        self.latent = LatentSpec(vae.config["latent_channels"], factor, vae.config["scaling_factor"])

    def configure(self, clip_skip: int | None, max_token_length: int | None) -> None:
        """How captions are encoded: `--clip_skip` and `--max_token_length` (75, 150 or 225 tokens).

        Raises:
            ModelError: if the text encoder has fewer layers than are to be skipped.
        """
        layers = self.text_encoder.config.num_hidden_layers
        if clip_skip is not None and clip_skip > layers:
            raise ModelError(f"--clip_skip = {clip_skip}: the text encoder has {layers} layers; use at most {layers}")
        self.clip_skip = clip_skip
        self.chunks = (max_token_length or CHUNK) // CHUNK

    def to(self, device: torch.device, dtype: torch.dtype) -> StableDiffusion1:
        """Move every network to `device`, U-Net and text encoder in `dtype`; the VAE stays float32."""
        self.unet.to(device=device, dtype=dtype)
        self.text_encoder.to(device=device, dtype=dtype)
        self.vae.to(device=device)
        self.schedule = self.schedule.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        device: torch.device = self.unet.device
        return device

    def lora_targets(self, role: str) -> list[LoraTarget]:
        """What gets a LoRA in network `role`, under its published name."""
        if role == "unet":
            return unet_lora_targets(unet_shape_of(self.unet.config))
        return text_lora_targets(self.text_encoder.config.num_hidden_layers)

    def module(self, role: str, path: str) -> nn.Module:
        """The live module with the published path `path` in network `role`."""
        if role != "unet":
            path = live_text_name(path, clip_transformer(self.text_encoder) is not self.text_encoder)
        return self.networks[role].get_submodule(path)

    def checkpoint_gradients(self, role: str) -> None:
        """Compute network `role`'s activations again in the backward pass instead of keeping them."""
        network = self.networks[role]
        # Both libraries only do so in training mode, in which nothing is dropped here.
        network.train()
        if role == "unet":
            self.unet.enable_gradient_checkpointing()
        elif hasattr(network, "activation_checkpointing_enable"):
            self.text_encoder.activation_checkpointing_enable({"use_reentrant": False})
        else:
            # Its former name in transformers.
            self.text_encoder.gradient_checkpointing_enable({"use_reentrant": False})

    def encode_images(self, pixels: Tensor) -> dict[str, Tensor]:
        """[B, 3, height, width] in [-1, 1] -> "mean" and "logvar", [B, 4, height / 8, width / 8], float32."""
        # Kept in float32: half precision blurs what every sample is learned from, and can overflow.
        with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
            posterior = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        return {"mean": posterior.mean.float(), "logvar": posterior.logvar.float()}

    def draw_latents(self, images: Mapping[str, Tensor], noise: Tensor) -> Tensor:
        """A draw from the autoencoder's posterior, scaled (Rombach et al. 2022, appendix G)."""
        return (images["mean"] + (0.5 * images["logvar"]).exp() * noise) * self.latent.scale

    def encode_texts(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Captions -> "states", [B, tokens, width]; with gradients where they are switched on."""
        ids = self.tokenizer(captions, self.chunks).to(self.text_encoder.device)
        return {"states": encode_chunks(self.text_encoder, ids, self.clip_skip)}

    def condition(
        self, texts: Mapping[str, Tensor], images: Mapping[str, Tensor], geometry: Sequence[Geometry]
    ) -> Conditioning:
        """Stable Diffusion 1.x is told the caption and nothing else."""
        return Conditioning(texts["states"])

    def predict(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """[B, 4, h, w], [B] -> the predicted noise, [B, 4, h, w]."""
        states = conditioning.states
        output = self.unet(noisy.to(self.unet.dtype), timesteps, encoder_hidden_states=states, return_dict=False)[0]
        assert isinstance(output, Tensor)
        return output

    def prompt_arguments(self, prompt: str, negative: str) -> dict[str, Tensor]:
        """Both prompts as [1, tokens, width] states of equal length; up to 225 tokens, whatever the training uses."""
        chunks = max(self.chunks, self.tokenizer.chunks_for([prompt, negative], limit=3))
        ids = self.tokenizer([prompt, negative], chunks).to(self.text_encoder.device)
        states = encode_chunks(self.text_encoder, ids, self.clip_skip)
        return {"prompt_embeds": states[:1], "negative_prompt_embeds": states[1:]}

    def decode_latents(self, latents: Tensor) -> Tensor:
        """[B, 4, h, w] scaled latents -> [B, 3, 8 h, 8 w], decoded in float32."""
        with torch.no_grad(), torch.autocast(latents.device.type, enabled=False):
            pixels: Tensor = self.vae.decode(latents.to(self.vae.dtype) / self.latent.scale).sample
        return pixels.float()

    def pipeline(self, scheduler: SchedulerMixin) -> DiffusionPipeline:
        """diffusers' pipeline around our modules; it is given prompt embeddings, so it needs no text encoder."""
        from diffusers import StableDiffusionPipeline

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

    def tensors(self, role: str) -> dict[str, Tensor]:
        """All weights of "unet", "vae" or "text_encoder" under their published names."""
        if role == "text_encoder":
            named = self.text_encoder.state_dict().items()
            return {published_text_name(name): tensor for name, tensor in named if "position_ids" not in name}
        return dict((self.unet if role == "unet" else self.vae).state_dict())

    def digest(self) -> str:
        """SHA-256 over every weight's name, dtype, shape and bytes: which base model this is, whatever its file."""
        return digest_of(self._joined({}))

    def encoder_digest(self, what: Literal["images", "texts"]) -> str:
        """What determines the rows of `encode_images` or `encode_texts` beside their input."""
        if what == "images":
            return digest_of(self.tensors("vae"))
        return f"{digest_of(self.tensors('text_encoder'))} clip_skip {self.clip_skip} chunks {self.chunks}"

    def _joined(self, overrides: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All weights under the original checkpoint's names."""
        parts = {role: self.tensors(role) for role in ("unet", "vae", "text_encoder")}
        for name, tensor in overrides.items():
            role, _, inner = name.partition(".")
            parts[role][inner] = tensor
        levels = len(self.vae.config["block_out_channels"])
        shape = unet_shape_of(self.unet.config)
        return join_checkpoint(parts["unet"], parts["vae"], parts["text_encoder"], shape, levels)

    def save(self, path: Path, overrides: Mapping[str, Tensor]) -> None:
        """Write one `.safetensors` file under the original checkpoint's names.

        Args:
            path: the file to write; it appears complete or not at all.
            overrides: weights that replace those of the networks, as "unet.NAME" or "text_encoder.NAME".
        """
        write_tensors(path, self._joined(overrides), {"format": "pt"})


def _without_dropout(network: nn.Module) -> None:
    """Configurations may ask for dropout, which the libraries draw from a global generator."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(vars(module).get("dropout"), float):
            vars(module)["dropout"] = 0.0


def check_source(source: Path) -> None:
    """Whether there is anything at `source`.

    Raises:
        ModelError: if not.
    """
    if (missing := missing_model(source)) is not None:
        raise ModelError(missing)


def load_sd1(source: Path) -> StableDiffusion1:
    """Load a Stable Diffusion 1.x model from a diffusers folder or one file, without any network.

    Raises:
        ModelError: if there is nothing at `source`, or it is of another kind, incomplete or broken.
    """
    check_source(source)
    if source.is_dir():
        return _load_folder(source)
    return assemble(split_checkpoint(read_tensors(source), source), source)


def assemble(parts: SdParts, source: Path) -> StableDiffusion1:
    """Build the networks of `parts`.

    Raises:
        ModelError: if tensors and configurations do not fit.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    _check_vocabulary(parts.text_config["vocab_size"], source)
    try:
        # Without memory: the file's tensors become the weights. CLIP has a buffer that no file holds, so it is built.
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(parts.unet_config)
            vae = AutoencoderKL.from_config(parts.vae_config)
        with torch.random.fork_rng(devices=[]):
            text_encoder = CLIPTextModel(CLIPTextConfig(**parts.text_config))
    except (ValueError, TypeError) as problem:
        raise ModelError(
            f"--pretrained_model_name_or_path = {source}: its widths are not those of a Stable Diffusion 1.x model: "
            f"{problem}"
        ) from None
    nested = clip_transformer(text_encoder) is not text_encoder
    text = {live_text_name(name, nested): tensor for name, tensor in parts.text_encoder.items()}
    loads: tuple[tuple[str, Any, Mapping[str, Tensor]], ...] = (
        ("U-Net", unet, parts.unet),
        ("VAE", vae, parts.vae),
        ("text encoder", text_encoder, text),
    )
    for title, network, tensors in loads:
        try:
            network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
        except RuntimeError as problem:
            reason = " ".join(str(problem).split())[:300]
            raise ModelError(
                f"--pretrained_model_name_or_path = {source}: the {title} does not fit: {reason}"
            ) from None
    return StableDiffusion1(unet, vae, text_encoder)


def _check_vocabulary(size: int, source: Path) -> None:
    if size != VOCABULARY:
        raise ModelError(
            f"--pretrained_model_name_or_path = {source}: the text encoder knows {size} tokens, CLIP's vocabulary has "
            f"{VOCABULARY}; models with added tokens are not supported, give the model without them"
        )


def _load_folder(source: Path) -> StableDiffusion1:
    import diffusers.utils.logging
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    missing = [part for part in ("unet", "vae", "text_encoder") if not (source / part / "config.json").is_file()]
    if missing:
        found = ", ".join(sorted(entry.name for entry in source.iterdir())[:8]) or "nothing"
        raise ModelError(
            f"--pretrained_model_name_or_path = {source}: is no diffusers model folder, it has no "
            f"{missing[0]}/config.json (found: {found}); give the folder that holds model_index.json, or one file"
        )
    if (source / "text_encoder_2").is_dir():
        raise ModelError(f"--pretrained_model_name_or_path = {source}: is an SDXL model, and SDXL is not yet supported")
    diffusers.utils.logging.disable_progress_bar()
    unet = _load_part(UNet2DConditionModel, source, "unet")
    vae = _load_part(AutoencoderKL, source, "vae")
    text_encoder = _load_part(CLIPTextModel, source, "text_encoder")
    _check_family(unet.config, vae.config, source)
    tokenizer = None if text_encoder.config.vocab_size == VOCABULARY else _folder_tokenizer(source, text_encoder)
    # Folders are often stored in half precision; what is trained on top is decided by --mixed_precision.
    return StableDiffusion1(unet.float(), vae.float(), text_encoder.float(), tokenizer)


def _folder_tokenizer(source: Path, text_encoder: CLIPTextModel) -> CLIPTokenizer:
    """The tokenizer that belongs to a text encoder with a vocabulary of its own, for instance with added tokens."""
    from transformers import CLIPTokenizer

    size = text_encoder.config.vocab_size
    try:
        tokenizer = CLIPTokenizer.from_pretrained(source / "tokenizer", local_files_only=True)
    except (OSError, ValueError, TypeError) as problem:
        reason = " ".join(str(problem).split())[:200]
        raise ModelError(
            f"--pretrained_model_name_or_path = {source}: the text encoder knows {size} tokens instead of CLIP's "
            f"{VOCABULARY}, and the tokenizer folder that belongs to it cannot be read: {reason}"
        ) from None
    if len(tokenizer) > size:
        raise ModelError(
            f"--pretrained_model_name_or_path = {source}: the tokenizer has {len(tokenizer)} tokens, the text encoder "
            f"{size}; they do not belong together"
        )
    return tokenizer


def _load_part(kind: Any, source: Path, name: str) -> Any:
    from safetensors import SafetensorError

    try:
        network, info = kind.from_pretrained(source / name, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as problem:
        reason = " ".join(str(problem).split())[:300]
        raise ModelError(f"--pretrained_model_name_or_path = {source}: {name} cannot be loaded: {reason}") from None
    # The libraries fill what is missing with random weights and only warn.
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"--pretrained_model_name_or_path = {source}: {len(missing)} tensors of {name} are missing, e.g. "
            f"{', '.join(missing[:3])}; the folder is incomplete, download it again"
        )
    return network


def _prediction(scheduler: Path) -> str | None:
    """What the folder's scheduler configuration says that the U-Net predicts."""
    if not scheduler.is_file():
        return None
    try:
        config = json.loads(read_text(scheduler, ModelError))
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ModelError(f"{scheduler}: is no JSON table; download it again")
    prediction: str | None = config.get("prediction_type")
    return prediction


def _check_family(unet: Mapping[str, Any], vae: Mapping[str, Any], source: Path) -> None:
    prediction = _prediction(source / "scheduler" / "scheduler_config.json")
    if prediction not in (None, "epsilon"):
        kind = f"trained for {prediction} (its scheduler says so), and only epsilon is supported yet"
    elif unet.get("use_linear_projection"):
        kind = "a Stable Diffusion 2.x model, and 2.x is not yet supported"
    elif unet["in_channels"] != published_config("unet")["in_channels"]:
        kind = f"a U-Net with {unet['in_channels']} input channels (inpainting?), and only 4 are supported yet"
    elif vae["latent_channels"] != unet["in_channels"]:
        kind = f"no model: its VAE makes {vae['latent_channels']} channels, its U-Net takes {unet['in_channels']}"
    elif unet.get("time_cond_proj_dim") is not None:
        kind = "an LCM U-Net, and those are not yet supported"
    else:
        return
    raise ModelError(f"--pretrained_model_name_or_path = {source}: is {kind}")
