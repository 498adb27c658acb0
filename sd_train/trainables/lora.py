"""LoRA (Hu et al. 2021) in kohya's format: W x + (alpha / rank) up(down(x))."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from sd_train.errors import ModelError
from sd_train.families.base import Family
from sd_train.trainables.base import ParamGroup
from sd_train.trainables.files import write_weights
from sd_train.trainables.lora_attention import stack_projections
from sd_train.trainables.lora_layout import Layout, Size, block_number
from sd_train.trainables.lora_module import LoraModule, Switches
from sd_train.trainables.lora_norms import Factors, scale_down
from sd_train.trainables.lora_weights import describe_network, kind_of, of_kinds, put_weights
from sd_train.types import Batch, Update

GROUP_NAMES = {"text_encoder": "textencoder", "text_encoder_2": "textencoder2", "unet": "unet"}
"""Network role -> the name that its learning rate is logged under (sd-scripts' for the first two kinds)."""


@dataclass(frozen=True)
class LoraSettings:
    """What is built, and at which rates."""

    rank: int
    alpha: float
    """Of all linear layers and 1x1 convolutions where `layout` says nothing else; alpha 0: the rank."""
    dropout: float
    rates: Mapping[str, float]
    """Learning rate by network role; a role that is missing or has rate 0 gets no modules."""
    seed: int
    precision: torch.dtype | None = None
    """Of the saved file; None: float32."""
    start: Mapping[str, Tensor] | None = None
    """Weights to begin with, under the names of `Lora.tensors`."""
    layout: Layout = field(default_factory=Layout)
    plus: Mapping[str, float] = field(default_factory=dict)
    """LoRA+: by network role, how many times faster the up matrices learn."""
    rank_dropout: float = 0.0
    """Probability that a sample goes without one of a module's ranks."""
    module_dropout: float = 0.0
    """Probability that a module is left out of one forward pass."""
    most_norm: float | None = None
    """Modules whose change has a larger norm are scaled down to it after each update."""


class Lora:
    """LoRA modules on the attentions of the U-Net and on the text encoder, as sd-scripts' `networks.lora`."""

    masters: Collection[str] = ()

    def __init__(self, settings: LoraSettings) -> None:
        self.settings = settings
        self.modules: dict[str, dict[str, LoraModule]] = {}
        self._switches = Switches(True, settings.dropout, settings.rank_dropout, settings.module_dropout)
        self._paths: dict[str, str] = {}
        self._figures: dict[str, float | Tensor] = {}

    def install(self, family: Family) -> None:
        """Put the modules into the networks that have a rate."""
        # Text encoders first, as in sd-scripts' files and logs.
        for role in sorted(family.networks, key=lambda role: role == "unet"):
            if self.trains(role):
                self.modules[role] = self._install_role(family, role)
        if self.settings.start is not None:
            try:
                # Modules of a network that this run does not train are left out, as in sd-scripts.
                self.load(of_kinds(self.settings.start, {kind_of(name) for name in self._all()}))
            except ModelError as problem:
                described = describe_network(self.settings.start)
                raise ModelError(f"--network_weights: {problem}\n  {described}") from None

    def _install_role(self, family: Family, role: str) -> dict[str, LoraModule]:
        settings = self.settings
        modules: dict[str, LoraModule] = {}
        for target in family.lora_targets(role, settings.layout.convolutions):
            original = family.module(role, target.path)
            wide = isinstance(original, nn.Conv2d) and original.kernel_size != (1, 1)
            size = settings.layout.size(role, target.path, wide, Size(settings.rank, settings.alpha))
            if size is not None:
                module = LoraModule(target.key, original, size.rank, size.alpha, settings.seed)
                module.install(original, self._switches)
                modules[target.key] = module
                self._paths[target.key] = target.path
        stack_projections(family, role, {self._paths[key]: module for key, module in modules.items()})
        return modules

    def describe(self) -> str:
        """What learns: modules of each network, and numbers."""
        counts = ", ".join(f"{role} {len(modules)}" for role, modules in self.modules.items())
        numbers = sum(parameter.numel() for group in self.groups() for parameter in group.params.values())
        return f"LoRA modules: {counts}; {numbers:,} parameters"

    def trains(self, role: str) -> bool:
        """Whether gradients must flow through network `role`."""
        return bool(self.settings.rates.get(role))

    def groups(self) -> list[ParamGroup]:
        """One group for each network, or block where these have rates of their own, as sd-scripts logs them.

        With LoRA+ the up matrices are a group of their own beside it.
        """
        layout, groups = self.settings.layout, dict[str, ParamGroup]()
        for role, modules in self.modules.items():
            ratio = self.settings.plus.get(role, 1.0)
            for name, module in modules.items():
                path = self._paths[name]
                blocks = role == "unet" and layout.weights
                title = f"unet_block{block_number(path, layout.sdxl)}" if blocks else GROUP_NAMES.get(role, role)
                rate = self.settings.rates[role] * layout.weight(role, path)
                halves = ("down", module.down, title, rate), (
                    "up", module.up, f"{title} plus" if ratio != 1 else title, rate * ratio,
                )  # fmt: skip
                for half, parameter, group, own in halves:
                    params = groups.setdefault(group, ParamGroup(group, {}, own)).params
                    params[f"{name}.lora_{half}.weight"] = parameter
        return list(groups.values())

    def before_batch(self, update: Update, batch: Batch) -> None:
        """Dropout masks are drawn from (update, micro-batch over all ranks)."""
        self._switches.key = (update.step, batch.micro)
        self._switches.rows = None if batch.rows is None else (batch.rows[0], len(batch.keys), batch.rows[1])

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
        now = self._switches
        before = now.dropout, now.rank_dropout, now.module_dropout
        now.dropout = now.rank_dropout = now.module_dropout = 0.0
        try:
            yield
        finally:
            now.dropout, now.rank_dropout, now.module_dropout = before

    def _all(self) -> dict[str, LoraModule]:
        return {name: module for modules in self.modules.values() for name, module in modules.items()}

    def tensors(self) -> dict[str, Tensor]:
        """`KEY.lora_down.weight`, `KEY.lora_up.weight` and `KEY.alpha` of every module."""
        tensors: dict[str, Tensor] = {}
        for name, module in self._all().items():
            tensors[f"{name}.alpha"] = torch.tensor(float(module.alpha))
            tensors[f"{name}.lora_down.weight"] = module.down.detach()
            tensors[f"{name}.lora_up.weight"] = module.up.detach()
        return tensors

    def load(self, tensors: Mapping[str, Tensor], strict: bool = True) -> None:
        """Copy weights of the same names into the modules; alphas must agree.

        Raises:
            ModelError: if names (when `strict`), shapes or alphas differ.
        """
        put_weights(self.tensors(), tensors, strict)

    def after_step(self) -> None:
        """Scale modules down whose change has become too large, if that was asked for."""
        if self.settings.most_norm is not None and self.modules:
            factors = [Factors(module.up, module.down, module.scale) for module in self._all().values()]
            self._figures = scale_down(factors, self.settings.most_norm)

    def figures(self) -> dict[str, float | Tensor]:
        """What `scale_weight_norms` found, under sd-scripts' names."""
        return self._figures

    def save(self, path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor] | None = None) -> None:
        """Write kohya's file, in the precision of the settings, with its hashes."""
        write_weights(path, self.tensors() if tensors is None else tensors, metadata, self.settings.precision)
