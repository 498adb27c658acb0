"""Parts of a model -> networks: built without memory, then given the parts' tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sd_train.errors import ModelError
from sd_train.families.keys import live_text_name, published_text_name
from sd_train.families.text import clip_transformer

if TYPE_CHECKING:
    from sd_train.families.parts import ModelParts

TITLES = {"unet": "U-Net", "vae": "VAE", "text_encoder": "text encoder", "text_encoder_2": "second text encoder"}
"""Roles in words."""


def model_named(origin: str) -> str:
    """The option that names the model, for messages."""
    return f"--pretrained_model_name_or_path = {origin}"


def check_inputs(unet: Mapping[str, Any], vae: Mapping[str, Any], origin: str) -> None:
    """Whether the U-Net with configuration `unet` takes the latents of `vae` and nothing else.

    Raises:
        ModelError: if not: inpainting models, of which the training would need masks.
    """
    taken, made = unet["in_channels"], vae["latent_channels"]
    if taken == 2 * made + 1:
        raise ModelError(
            f"{model_named(origin)}: is an inpainting model (its U-Net takes {taken} channels: latents, a mask and the "
            "masked picture's latents), and training those is not supported; give the model that it was made from. "
            "sd-train convert takes it"
        )
    if taken != made:
        raise ModelError(
            f"{model_named(origin)}: its U-Net takes {taken} channels and its VAE makes {made}; they do not fit"
        )


def build_network(parts: ModelParts, role: str, dtype: torch.dtype | None) -> Any:
    """Network `role` of `parts`, frozen, in evaluation mode, without dropout.

    Args:
        parts: where configuration and tensors come from; tensors are read one after another.
        role: "unet", "vae", "text_encoder" or "text_encoder_2".
        dtype: of its weights; None: as they are stored.

    Raises:
        ModelError: if tensors and configuration do not fit.
    """
    part, title = parts.parts[role], TITLES[role]
    try:
        with torch.device("meta"):
            network = _empty(role, part.config)
    except Exception as problem:
        # The libraries check little of what a file says, and fail over it in ways of all kinds.
        reason = " ".join(str(problem).split())[:300]
        raise ModelError(
            f"{model_named(parts.origin)}: no {title} can be built from its configuration: {reason}"
        ) from None
    tensors = {}
    for name in part.tensors.names():
        tensor = part.tensors.read(name)
        live = _live_name(role, name, network)
        tensors[live] = tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)
    try:
        network.load_state_dict(tensors, assign=True)
    except RuntimeError as problem:
        reason = " ".join(str(problem).split())[:300]
        raise ModelError(f"{model_named(parts.origin)}: the {title} does not fit its configuration: {reason}") from None
    _fill_constants(network)
    network.requires_grad_(False).eval()
    _without_dropout(network)
    if role == "unet":
        from sd_train.families.attention import lean_attention

        lean_attention(network)
    return network


def _empty(role: str, config: Mapping[str, Any]) -> nn.Module:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    classes: dict[str, Any] = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
    if role in classes:
        network: nn.Module = classes[role].from_config(dict(config))
        return network
    # Which precision the tensors were stored in is of no meaning here.
    settings = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    kind: Any = CLIPTextModelWithProjection if role == "text_encoder_2" else CLIPTextModel
    network = kind(CLIPTextConfig(**settings))
    return network


def _live_name(role: str, name: str, network: nn.Module) -> str:
    """The name of a published tensor in the live network."""
    if not role.startswith("text_encoder"):
        return name
    return live_text_name(name, clip_transformer(network) is not network)


def _fill_constants(network: nn.Module) -> None:
    """CLIP's position numbers are a buffer that no file holds."""
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                if name != "position_ids":
                    raise ModelError(f"this version of the libraries has a constant that is unknown: {name}")
                module.register_buffer(name, torch.arange(buffer.shape[-1]).expand(buffer.shape), persistent=False)


def _without_dropout(network: nn.Module) -> None:
    """Configurations may ask for dropout, which the libraries draw from a global generator."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout"):
            if isinstance(vars(module).get(name), float):
                vars(module)[name] = 0.0


def published_tensors(role: str, network: nn.Module) -> dict[str, Tensor]:
    """Every weight of network `role` under its published name."""
    named: Iterable[tuple[str, Tensor]] = network.state_dict().items()
    if role.startswith("text_encoder"):
        return {published_text_name(name): tensor for name, tensor in named if not name.endswith("position_ids")}
    return dict(named)


def published_parameters(role: str, network: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter of network `role`, the live ones, under its published name."""
    renamed = published_text_name if role.startswith("text_encoder") else str
    return {renamed(name): parameter for name, parameter in network.named_parameters()}
