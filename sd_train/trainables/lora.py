"""LoRA (Hu et al. 2021) in kohya's format: W x + (alpha / rank) up(down(x))."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from sd_train.errors import ModelError
from sd_train.families.base import Family
from sd_train.families.keys import LoraTarget
from sd_train.files import write_network
from sd_train.randomness import derive
from sd_train.trainables.base import ParamGroup
from sd_train.types import Batch, Update

GROUP_NAMES = {"text_encoder": "textencoder", "text_encoder_2": "textencoder2", "unet": "unet"}
"""Network role -> the name that its learning rate is logged under (sd-scripts' for the first two kinds)."""


@dataclass(frozen=True)
class LoraSettings:
    """What is built, and at which rates."""

    rank: int
    alpha: float
    dropout: float
    rates: Mapping[str, float]
    """Learning rate by network role; a role that is missing or has rate 0 gets no modules."""
    seed: int
    precision: torch.dtype | None = None
    """Of the saved file; None: float32."""


@dataclass
class _Switches:
    """What all modules of one LoRA share at run time."""

    enabled: bool = True
    dropout: float = 0.0
    key: tuple[int, int] = (0, 0)
    """(update, micro-batch): dropout masks are drawn from these."""


class LoraModule(nn.Module):
    """Adds a low-rank change to one linear layer or convolution by taking the place of its `forward`."""

    def __init__(self, name: str, original: nn.Module, rank: int, alpha: float, seed: int) -> None:
        super().__init__()
        self.name, self.rank, self.alpha, self.seed = name, rank, alpha, seed
        self.scale = alpha / rank
        generator = torch.Generator().manual_seed(derive(seed, "lora", name) % 2**63)
        if isinstance(original, nn.Conv2d):
            down = torch.empty(rank, original.in_channels, *original.kernel_size)
            up = torch.zeros(original.out_channels, rank, 1, 1)
        else:
            assert isinstance(original, nn.Linear)
            down = torch.empty(rank, original.in_features)
            up = torch.zeros(original.out_features, rank)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        device = original.weight.device
        self.down = nn.Parameter(down.to(device))
        self.up = nn.Parameter(up.to(device))
        self._forward = original.forward
        self._stride = original.stride if isinstance(original, nn.Conv2d) else None
        self._padding = original.padding if isinstance(original, nn.Conv2d) else None

    def install(self, original: nn.Module, switches: _Switches) -> None:
        """Take over `original.forward`."""
        self._switches = switches
        # Not by assignment: a module registers what is assigned to it, and its state dict would change.
        original.__dict__["forward"] = self.forward

    def forward(self, x: Tensor) -> Tensor:
        """The original output plus the scaled low-rank change."""
        base: Tensor = self._forward(x)
        if not self._switches.enabled:
            return base
        # Under autocast the operators cast the float32 factors themselves; a half-precision base without it needs this.
        low = x if torch.is_autocast_enabled(x.device.type) else x.to(self.down.dtype)
        if self._stride is None:
            hidden = functional.linear(low, self.down)
        else:
            assert self._padding is not None
            hidden = functional.conv2d(low, self.down, stride=self._stride, padding=self._padding)
        if self._switches.dropout:
            hidden = hidden * self._mask(hidden)
        change = functional.linear(hidden, self.up) if self._stride is None else functional.conv2d(hidden, self.up)
        return torch.add(base, change.to(base.dtype), alpha=self.scale)

    def _mask(self, hidden: Tensor) -> Tensor:
        # Drawn anew from the counters at every call: a forward that is recomputed (checkpointing) sees the same mask.
        seed = derive(self.seed, "dropout", self.name, *self._switches.key) % 2**63
        generator = torch.Generator(hidden.device).manual_seed(seed)
        keep = 1.0 - self._switches.dropout
        drawn = torch.rand(hidden.shape, generator=generator, device=hidden.device)
        return (drawn < keep).to(hidden.dtype) / keep


class Lora:
    """LoRA modules on the attentions of the U-Net and on the text encoder, as sd-scripts' `networks.lora`."""

    def __init__(self, settings: LoraSettings) -> None:
        self.settings = settings
        self.modules: dict[str, dict[str, LoraModule]] = {}
        self._switches = _Switches(dropout=settings.dropout)

    def install(self, family: Family) -> None:
        """Put the modules into the networks that have a rate."""
        # Text encoders first, as in sd-scripts' files and logs.
        for role in sorted(family.networks, key=lambda role: role == "unet"):
            if self.trains(role):
                self.modules[role] = self._install_role(family, role, family.lora_targets(role))

    def _install_role(self, family: Family, role: str, targets: Sequence[LoraTarget]) -> dict[str, LoraModule]:
        settings = self.settings
        modules: dict[str, LoraModule] = {}
        for target in targets:
            original = family.module(role, target.path)
            module = LoraModule(target.key, original, settings.rank, settings.alpha, settings.seed)
            module.install(original, self._switches)
            modules[target.key] = module
        return modules

    def trains(self, role: str) -> bool:
        """Whether gradients must flow through network `role`."""
        return bool(self.settings.rates.get(role))

    def groups(self) -> list[ParamGroup]:
        """One group for each network, as sd-scripts logs them."""
        return [
            ParamGroup(
                GROUP_NAMES.get(role, role),
                {
                    f"{name}.lora_{half}.weight": parameter
                    for name, module in modules.items()
                    for half, parameter in (("down", module.down), ("up", module.up))
                },
                self.settings.rates[role],
            )
            for role, modules in self.modules.items()
        ]

    def before_batch(self, update: Update, batch: Batch) -> None:
        """Dropout masks are drawn from (update, micro-batch over all ranks)."""
        self._switches.key = (update.step, batch.micro)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model's own predictions."""
        before, self._switches.enabled = self._switches.enabled, False
        try:
            yield
        finally:
            self._switches.enabled = before

    @contextmanager
    def for_inference(self) -> Iterator[None]:
        """Predictions without dropout."""
        before, self._switches.dropout = self._switches.dropout, 0.0
        try:
            yield
        finally:
            self._switches.dropout = before

    def _all(self) -> dict[str, LoraModule]:
        return {name: module for modules in self.modules.values() for name, module in modules.items()}

    def tensors(self) -> dict[str, Tensor]:
        """`KEY.lora_down.weight`, `KEY.lora_up.weight` and `KEY.alpha` of every module."""
        tensors: dict[str, Tensor] = {}
        for name, module in self._all().items():
            tensors[f"{name}.alpha"] = torch.tensor(module.alpha)
            tensors[f"{name}.lora_down.weight"] = module.down.detach()
            tensors[f"{name}.lora_up.weight"] = module.up.detach()
        return tensors

    def load(self, tensors: Mapping[str, Tensor], strict: bool = True) -> None:
        """Copy weights of the same names into the modules; alphas must agree.

        Raises:
            ModelError: if names (when `strict`), shapes or alphas differ.
        """
        ours = self.tensors()
        problems = _differences(ours, tensors, strict)
        if problems:
            shown = "".join(f"\n  - {problem}" for problem in problems[:5])
            raise ModelError(f"{len(problems)} differences between the LoRA weights and this configuration:{shown}")
        with torch.no_grad():
            for name, tensor in tensors.items():
                if name in ours and not name.endswith(".alpha"):
                    ours[name].copy_(tensor)

    def after_step(self) -> None:
        """Nothing is constrained."""

    def save(self, path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor] | None = None) -> None:
        """Write kohya's file, in the precision of the settings, with its hashes."""
        precision = self.settings.precision or torch.float32
        chosen = self.tensors() if tensors is None else tensors
        write_network(path, {name: tensor.to(precision) for name, tensor in chosen.items()}, metadata)


def describe_network(tensors: Mapping[str, Tensor]) -> str:
    """What a LoRA file holds, in the words of the options that fit it."""
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".lora_down.weight")}
    alphas = {round(float(tensor), 4) for name, tensor in tensors.items() if name.endswith(".alpha")}
    if len(ranks) > 1 or len(alphas) > 1:
        return f"the file's modules differ in rank {sorted(ranks)} or alpha {sorted(alphas)}, not yet supported"
    text = f"the file fits --network_dim {max(ranks)}" + (f" --network_alpha {max(alphas):g}" if alphas else "")
    for prefix, option in (("lora_te", "unet"), ("lora_unet", "text_encoder")):
        if not any(name.startswith(prefix) for name in tensors):
            text += f" --network_train_{option}_only"
    return text


def without_roles(tensors: Mapping[str, Tensor], lora: Lora) -> dict[str, Tensor]:
    """`tensors` without those of networks that `lora` does not train."""
    # "lora_unet", "lora_te", "lora_te1" or "lora_te2".
    kinds = {"_".join(key.split("_")[:2]) for modules in lora.modules.values() for key in modules}
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith("lora_") or "_".join(name.split("_")[:2]) in kinds
    }


def _differences(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], strict: bool) -> list[str]:
    problems = []
    if strict:
        problems += [f"{name} is missing" for name in ours if name not in theirs]
        problems += [f"{name} is not part of this network" for name in theirs if name not in ours]
    for name, tensor in theirs.items():
        if name not in ours:
            continue
        if ours[name].shape != tensor.shape:
            expected, found = tuple(ours[name].shape), tuple(tensor.shape)
            problems.append(f"{name} has shape {found}, --network_dim makes it {expected}")
        elif name.endswith(".alpha") and not math.isclose(float(ours[name]), float(tensor), rel_tol=1e-3):
            problems.append(f"{name} is {float(tensor):g}, --network_alpha is {float(ours[name]):g}")
    return problems
