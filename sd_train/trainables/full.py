"""A model's own weights: fine-tuning, and DreamBooth (Ruiz et al. 2022) on a dataset with regularisation images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sd_train.errors import ModelError
from sd_train.families.base import Family
from sd_train.families.build import TITLES, published_parameters
from sd_train.families.keys import unet_blocks, unet_shape_of
from sd_train.families.parts import ModelParts
from sd_train.families.saving import SaveForm, save_model
from sd_train.families.sources import DictSource, Part, TensorSource
from sd_train.trainables.base import ParamGroup
from sd_train.types import Batch, Update

_LOG = logging.getLogger(__name__)

GROUP_NAMES = {"unet": "unet", "text_encoder": "text_encoder1", "text_encoder_2": "text_encoder2"}
"""Network role -> the name that its learning rate is logged under (sd-scripts')."""


@dataclass(frozen=True)
class FullSettings:
    """What learns, at which rates, and how it is saved."""

    rates: Mapping[str, float]
    """Learning rate by network role; a role that is missing stays as it is."""
    read: Callable[[], ModelParts]
    """Reads the model again, for the weights that were not trained."""
    form: SaveForm = "safetensors"
    precision: torch.dtype | None = None
    """Of the saved file; None: float32, and what was not trained as it is stored."""
    block_rates: tuple[float, ...] | None = None
    """Of the 23 blocks of SDXL's U-Net, in place of its rate; 0 leaves a block as it is."""
    text_until: int | None = None
    """The update from which on the text encoders stay as they are."""
    reference: bool = False
    """Whether a copy of the base model is kept to predict with."""


@dataclass(frozen=True)
class _Mixed:
    """The tensors of one network as they are stored, with the trained ones in their places."""

    stored: TensorSource
    trained: Mapping[str, Tensor]
    live: TensorSource

    def names(self) -> list[str]:
        return self.stored.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.stored.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.trained[name].dtype if name in self.trained else self.stored.dtype(name)

    def read(self, name: str) -> Tensor:
        """The tensor `name`, on the CPU.

        Raises:
            ModelError: if one that was not trained is not what the training was made with.
        """
        if name in self.trained:
            return self.trained[name].cpu()
        tensor, used = self.stored.read(name), self.live.read(name).cpu()
        if not torch.equal(tensor.to(used.dtype), used):
            raise ModelError(f"{name} is not what it was when the training began")
        return tensor


class Full:
    """The weights of U-Net and text encoders themselves."""

    def __init__(self, settings: FullSettings) -> None:
        self.settings = settings
        self.masters: Collection[str] = tuple(role for role in GROUP_NAMES if settings.rates.get(role))
        self._groups: list[ParamGroup] = []
        self._reference: dict[str, Tensor] = {}

    def install(self, family: Family) -> None:
        """Choose the parameters that learn.

        Parameters that nothing depends on, such as text encoder layers above the one that is used, stay as they are.

        Raises:
            ModelError: if there are none.
        """
        self._family = family
        for role in self.masters:
            idle = family.text_encoders[role].idle() if role in family.text_encoders else ()
            network = published_parameters(role, family.networks[role])
            self._groups += self._of_role(role, {n: p for n, p in network.items() if not n.startswith(idle)})
        if not self._groups:
            raise ModelError("--block_lr: the blocks with a rate above 0 are not in this model; give others one too")
        for parameter in self._parameters().values():
            assert parameter.dtype == torch.float32
            parameter.requires_grad_(True)
        if self.settings.reference:
            self._reference = {name: tensor.clone() for name, tensor in self.tensors().items()}

    def _of_role(self, role: str, parameters: Mapping[str, nn.Parameter]) -> list[ParamGroup]:
        """The groups of network `role`: one, or one for each block that learns."""
        settings, name = self.settings, GROUP_NAMES[role]
        named = {f"{role}.{name}": parameter for name, parameter in parameters.items()}
        if role != "unet":
            return [ParamGroup(name, named, settings.rates[role], settings.text_until)]
        if settings.block_rates is None:
            return [ParamGroup(name, named, settings.rates[role])]
        config = self._family.networks["unet"].config
        assert isinstance(config, Mapping)
        block_of = unet_blocks(unet_shape_of(config))
        found: list[dict[str, nn.Parameter]] = [{} for _ in settings.block_rates]
        for path, parameter in named.items():
            found[block_of[path.removeprefix("unet.").rpartition(".")[0]]][path] = parameter
        pairs = enumerate(zip(found, settings.block_rates, strict=True))
        return [ParamGroup(f"block{place}", block, rate) for place, (block, rate) in pairs if block and rate > 0]

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: parameter for group in self._groups for name, parameter in group.params.items()}

    def describe(self) -> str:
        """What learns: tensors of each network, and numbers."""
        parameters = self._parameters()
        counts = ", ".join(
            f"{TITLES[role]} {sum(name.startswith(f'{role}.') for name in parameters)}" for role in self.masters
        )
        numbers = sum(parameter.numel() for parameter in parameters.values())
        return f"whole weights: {counts} tensors; {numbers:,} parameters"

    def groups(self) -> list[ParamGroup]:
        """One group for each network, or block of the U-Net."""
        return self._groups

    def trains(self, role: str) -> bool:
        """Whether gradients must flow through network `role`."""
        return role in self.masters

    def figures(self) -> dict[str, float | Tensor]:
        """Nothing beside the rates."""
        return {}

    def before_batch(self, update: Update, batch: Batch) -> None:
        """Nothing is drawn."""

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model's own predictions, of which the settings must ask to keep a copy."""
        assert self.settings.reference
        parameters = self._parameters()
        learned = {name: parameter.data for name, parameter in parameters.items()}
        self._point(parameters, self._reference)
        try:
            yield
        finally:
            self._point(parameters, learned)

    def _point(self, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in parameters.items():
            parameter.data = tensors[name]
        # Autocast keeps what it has made of a parameter, and would not notice that its numbers are others.
        torch.clear_autocast_cache()

    def for_inference(self) -> AbstractContextManager[None]:
        """Nothing is dropped in training either."""
        return nullcontext()

    def tensors(self) -> dict[str, Tensor]:
        """The weights that learn, as "role.published name"."""
        return {name: parameter.detach() for name, parameter in self._parameters().items()}

    def load(self, tensors: Mapping[str, Tensor], strict: bool = True) -> None:
        """Copy weights of the same names into the networks.

        Raises:
            ModelError: if names (when `strict`) or shapes differ.
        """
        ours = self.tensors()
        problems = [f"{name} is missing" for name in ours if strict and name not in tensors]
        problems += [f"{name} is not trained by this configuration" for name in tensors if strict and name not in ours]
        problems += [
            f"{name} has shape {tuple(tensor.shape)}, this model's has {tuple(ours[name].shape)}"
            for name, tensor in tensors.items()
            if name in ours and tensor.shape != ours[name].shape
        ]
        if problems:
            shown = "".join(f"\n  - {problem}" for problem in problems[:5])
            raise ModelError(f"{len(problems)} differences between the weights and this configuration:{shown}")
        for name, tensor in tensors.items():
            if name in ours:
                ours[name].copy_(tensor)

    def after_step(self) -> None:
        """Nothing is constrained."""

    def save(self, path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor] | None = None) -> None:
        """Write the whole model; what was not trained is read from the base model's files again.

        Where these cannot be read any more, what is in memory is written instead, and a warning says so.

        Raises:
            RunError: if the disk refuses.
        """
        settings, trained = self.settings, self.tensors() if tensors is None else tensors
        live = self._family.parts()
        try:
            parts = _with_trained(settings.read(), trained, live)
            save_model(path, parts, settings.form, settings.precision, metadata)
        except ModelError as problem:
            _LOG.warning(
                "%s: what was not trained is written as it is in memory, in the precision of the training: the base "
                "model's files cannot be read again (%s)", path, problem,
            )  # fmt: skip
            parts = _with_trained(replace(live, extras=DictSource(), leftovers=DictSource()), trained, live)
            save_model(path, parts, settings.form, settings.precision, metadata)


def _with_trained(stored: ModelParts, trained: Mapping[str, Tensor], live: ModelParts) -> ModelParts:
    """`stored` with `trained` ("role.name") in the place of its own tensors.

    Raises:
        ModelError: if the networks are not those of `live`.
    """
    parts = {}
    for role, part in live.parts.items():
        own = {name.removeprefix(f"{role}."): t for name, t in trained.items() if name.startswith(f"{role}.")}
        found = stored.parts.get(role)
        if found is None or _shapes(found.tensors) != _shapes(part.tensors):
            raise ModelError(f"the {TITLES[role]} is not what it was when the training began")
        parts[role] = Part(found.config, _Mixed(found.tensors, own, part.tensors))
    # The run may have trained another noise schedule than the base model's.
    return replace(stored, parts=parts, zero_terminal_snr=live.zero_terminal_snr)


def _shapes(source: TensorSource) -> dict[str, tuple[int, ...]]:
    return {name: source.shape(name) for name in source.names()}
