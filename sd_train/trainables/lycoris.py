"""LyCORIS networks (Yeh et al. 2024, arXiv:2309.14859) on our targets and under kohya's keys."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sd_train.config.lycoris_args import LycorisArgs
from sd_train.errors import ConfigError, ModelError
from sd_train.families.base import Family
from sd_train.trainables.base import ParamGroup
from sd_train.trainables.files import write_weights
from sd_train.trainables.lora import GROUP_NAMES
from sd_train.trainables.lora_weights import kind_of, put_weights
from sd_train.trainables.lycoris_files import from_file, to_file
from sd_train.trainables.lycoris_module import LycorisModule, Switches
from sd_train.trainables.lycoris_targets import norms_of, targets_of
from sd_train.types import Batch, Update

_CONSTANTS = (".alpha", ".on_input")
"""Ends of names that say how a module is made; they do not learn."""
_ENDS = ("lora_unet_conv_in.", "lora_unet_conv_out.", "lora_unet_time_embedding_")
"""Beginnings of names in LyCORIS's own files that have no target here."""


@dataclass(frozen=True)
class LycorisSettings:
    """What is built, and at which rates."""

    args: LycorisArgs
    rates: Mapping[str, float]
    """Learning rate by network role; a role that is missing gets no modules."""
    seed: int
    precision: torch.dtype | None = None
    """Of the saved file; None: float32."""
    most_norm: float | None = None
    """Norm of a module's change that updates do not exceed; None: any."""
    start: Mapping[str, Tensor] | None = None
    """Weights to begin with, under the names of a LyCORIS file."""


class Lycoris:
    """Modules of one LyCORIS algorithm; the base model stays as it is."""

    masters: Collection[str] = ()

    def __init__(self, settings: LycorisSettings) -> None:
        self.settings = settings
        self.modules: dict[str, dict[str, LycorisModule]] = {}
        self._switches = Switches()

    def install(self, family: Family) -> None:
        """Put the modules into the networks that have a rate."""
        args = self.settings.args
        # Text encoders first, as in sd-scripts' files and logs.
        for role in sorted(family.networks, key=lambda role: role == "unet"):
            if not self.trains(role):
                continue
            chosen = [(target, None) for target in targets_of(family, role, args.preset)]
            norms = [(target, "norm") for target in norms_of(family, role, args.preset)] if args.train_norm else []
            self.modules[role] = {
                target.key: LycorisModule(target, args, self.settings.seed, kind) for target, kind in (*chosen, *norms)
            }
        if self.settings.rates and not any(self.modules.values()):
            raise ConfigError(
                f"--network_args: preset={args.preset} changes nothing in what is trained "
                f"({', '.join(self.settings.rates)}); choose another preset"
            )
        for module in self._all().values():
            module.install(self._switches)
        if self.settings.start is not None:
            self._begin(self.settings.start)

    def _begin(self, start: Mapping[str, Tensor]) -> None:
        # "lora_unet", "lora_te", "lora_te1" or "lora_te2": those of a network that is not trained are left out.
        kinds = {kind_of(key) for key in self._all()}
        chosen = {name: tensor for name, tensor in start.items() if kind_of(name) in kinds}
        try:
            self.load(from_file(chosen, self.tensors()))
        except ModelError as problem:
            way_out = "give algo, ranks and alphas as they were when it was trained (sd-train lora check shows them)"
            ends = sorted({name.partition(".")[0] for name in chosen if name.startswith(_ENDS)})
            if ends:
                way_out += (
                    f"\n  {', '.join(ends)}: LyCORIS's full preset changes the U-Net's ends and its time embedding, "
                    "too, which is not trained here; merge the file into the model (sd-train lora merge) and begin "
                    "from that"
                )
            raise ModelError(f"--network_weights: {problem}\n  {way_out}") from None

    def describe(self) -> str:
        """What learns: modules of each network, and numbers."""
        counts = ", ".join(f"{role} {len(modules)}" for role, modules in self.modules.items())
        numbers = sum(parameter.numel() for group in self.groups() for parameter in group.params.values())
        return f"LyCORIS {self.settings.args.algorithm} modules: {counts}; {numbers:,} parameters"

    def trains(self, role: str) -> bool:
        """Whether gradients must flow through network `role`."""
        unet_alone = self.settings.args.preset.startswith("unet-")
        return bool(self.settings.rates.get(role)) and (role == "unet" or not unet_alone)

    def groups(self) -> list[ParamGroup]:
        """One group for each network, as sd-scripts logs them."""
        return [
            ParamGroup(
                GROUP_NAMES.get(role, role),
                {
                    f"{key}.{name}": parameter
                    for key, module in modules.items()
                    for name, parameter in module.parameters.items()
                },
                self.settings.rates[role],
            )
            for role, modules in self.modules.items()
            if modules
        ]

    def before_batch(self, update: Update, batch: Batch) -> None:
        """All that is random is drawn from (update, micro-batch over all ranks)."""
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
        """Predictions without dropout, of DyLoRA at full rank."""
        before, self._switches.training = self._switches.training, False
        try:
            yield
        finally:
            self._switches.training = before

    def _all(self) -> dict[str, LycorisModule]:
        return {key: module for modules in self.modules.values() for key, module in modules.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Every module's factors and constants under the names of LyCORIS's files.

        Two differ from files: `KEY.scalar` of use_scalar, which a file has multiplied in, and DyLoRA's
        `KEY.up_list.0`, which a file has side by side.
        """
        tensors: dict[str, Tensor] = {}
        for key, module in self._all().items():
            tensors |= {f"{key}.{name}": constant.clone() for name, constant in module.constants.items()}
            tensors |= {f"{key}.{name}": parameter.detach() for name, parameter in module.parameters.items()}
        return tensors

    def file_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`tensors`, as `tensors()` gives them, under the names and in the shapes of LyCORIS's file."""
        return to_file(tensors, {key: module.library.shape for key, module in self._all().items()})

    def load(self, tensors: Mapping[str, Tensor], strict: bool = True) -> None:
        """Copy weights of the same names into the modules; alphas must agree.

        Raises:
            ModelError: if names (when `strict`), shapes or constants differ.
        """
        put_weights(self.tensors(), tensors, strict, _CONSTANTS)

    def after_step(self) -> None:
        """Keep every module's change within the norm that was asked for."""
        if self.settings.most_norm is not None:
            for module in self._all().values():
                module.limit(self.settings.most_norm)

    def figures(self) -> dict[str, float | Tensor]:
        """Nothing."""
        return {}

    def save(self, path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor] | None = None) -> None:
        """Write LyCORIS's file, in the precision of the settings, with its hashes."""
        chosen = self.file_tensors(self.tensors() if tensors is None else tensors)
        write_weights(path, chosen, metadata, self.settings.precision)
