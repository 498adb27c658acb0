"""Merging: LoRAs into a model's weights, which are computed when they are read, and LoRAs into one LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sd_train.errors import ModelError
from sd_train.families.keys import published_text_name
from sd_train.families.sources import TensorSource
from sd_train.lora_files.adapter import BIASES, DOWN, UNCOMPUTED, UP, Adapter, change, delta, without_mid
from sd_train.lora_files.decompose import Decomposition, RankRule, decompose
from sd_train.lora_files.names import TEXT_ROLES, Place, kernel
from sd_train.lora_files.reading import LoraFile

_OTHER_SHAPES = "the LoRAs are for weights of different shapes; merge those of one family"


@dataclass(frozen=True)
class Weighted:
    """A LoRA and how much of it is wanted."""

    lora: LoraFile
    multiplier: float


@dataclass
class MergedSource:
    """A network's tensors with LoRAs merged in; each is computed in float32 when it is read, then cast to its dtype."""

    base: TensorSource
    loras: Sequence[Weighted]
    role: str
    names_by_path: dict[str, str] = field(default_factory=dict)
    """Published path and ending, e.g. `conv_in.weight` -> the base's name."""

    def __post_init__(self) -> None:
        self.names_by_path = published_names(self.base, self.role)
        self._changed: dict[str, list[tuple[Weighted, Place]]] = {}
        for weighted in self.loras:
            for place in weighted.lora.places():
                if place.role == self.role:
                    for ending in ("weight", "bias"):
                        name = self.names_by_path.get(f"{place.path}.{ending}")
                        if name is not None:
                            self._changed.setdefault(name, []).append((weighted, place))

    def names(self) -> list[str]:
        return self.base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self.base.dtype(name)

    def changed(self) -> list[str]:
        """The names of the tensors that differ from the base's own."""
        return list(self._changed)

    def read(self, name: str) -> Tensor:
        """The tensor `name` with every LoRA's change; those without a change are the base's own.

        Decomposed weights (DoRA) and (IA)^3 of several LoRAs each start from the base's weight.
        """
        tensor = self.base.read(name)
        if name not in self._changed:
            return tensor
        merged = tensor.float()
        for weighted, place in self._changed[name]:
            adapter = weighted.lora.adapter(place)
            if name.endswith(".bias"):
                own = [adapter.factors[bias].float() for bias in BIASES if bias in adapter.factors]
                merged = sum((weighted.multiplier * bias.view(merged.shape) for bias in own), merged)
            elif adapter.kind not in ("full", "norm") or not set(adapter.factors) <= set(BIASES):
                merged = merged + change(adapter, tensor, weighted.multiplier)
        return merged.to(tensor.dtype)


def published_names(source: TensorSource, role: str) -> dict[str, str]:
    """Published name -> the source's own, which in text encoders may lack `text_model.`."""
    if role in TEXT_ROLES:
        return {published_text_name(name): name for name in source.names()}
    return {name: name for name in source.names()}


def merge_into(networks: Mapping[str, TensorSource], loras: Sequence[Weighted]) -> dict[str, TensorSource]:
    """`networks`, by role and with diffusers' names, with `loras` merged in as they are read.

    Raises:
        ModelError: if a LoRA has modules that the model has not, or of another shape, or that cannot be computed.
    """
    problems: list[str] = []
    merged = {role: MergedSource(source, loras, role) for role, source in networks.items()}
    for weighted in loras:
        problems += unfitting(weighted.lora, merged)
    if problems:
        raise ModelError(*problems)
    return dict(merged)


def unfitting(lora: LoraFile, networks: Mapping[str, MergedSource]) -> list[str]:
    """What of `lora` does not fit the model, a sentence each; at most a few of a kind."""
    missing, computed = [], []
    for place in lora.places():
        network = networks.get(place.role)
        if network is None or not {f"{place.path}.weight", f"{place.path}.bias"} & set(network.names_by_path):
            missing.append(f"{place.role}.{place.path}")
        elif lora.kind(place) in UNCOMPUTED:
            computed.append(f"{place.role}.{place.path}")
    problems = []
    if missing:
        problems.append(
            f"{lora.origin}: {len(missing)} of {len(lora.places())} modules are not in the model "
            f"({', '.join(missing[:3])}); use a model of the family that the LoRA was trained on"
        )
    if computed:
        problems.append(
            f"{lora.origin}: {len(computed)} modules are of an algorithm that is not computed here "
            f"({', '.join(computed[:3])}); merge it with the program that made it"
        )
    return problems


def merge_loras(loras: Sequence[Weighted], rule: RankRule | None, device: torch.device) -> Iterator[Adapter]:
    """One LoRA that does what `loras` do together, module by module.

    `rule` None puts the factors beside one another: nothing is lost, ranks add up. Otherwise the sum of the changes is
    decomposed anew.

    Raises:
        ModelError: if a module is not plain and there is no `rule`, or its change depends on the model.
    """
    for place in dict.fromkeys(place for weighted in loras for place in weighted.lora.places()):
        adapters = [
            (weighted.lora.adapter(place), weighted.multiplier)
            for weighted in loras
            if place in weighted.lora.keys and weighted.lora.kind(place)
        ]
        for adapter, _ in adapters:
            refuse_base(adapter)
        family = next((weighted.lora.family for weighted in loras if weighted.lora.family), None)
        yield _beside(adapters) if rule is None else _summed(adapters, family, rule, device)


def as_plain(adapter: Adapter, family: str | None, rule: RankRule | None, device: torch.device) -> Decomposition:
    """A module of any algorithm as a plain LoRA; `rule` is needed where there are no two factors.

    Raises:
        ModelError: if that cannot be done without the model, or without a rule.
    """
    refuse_base(adapter)
    if adapter.is_plain:
        return Decomposition(without_mid(adapter), 1.0)
    if rule is None:
        raise ModelError(
            f"{_named(adapter)}: {adapter.kind} has no rank of its own as a plain LoRA; choose --new_rank, or "
            "--dynamic_method with --dynamic_param"
        )
    return decompose(adapter.place, _shaped(adapter, family).to(device), rule)


def only_biases(adapter: Adapter) -> bool:
    """Whether only what no LoRA can hold is changed: biases and norms."""
    return adapter.kind == "norm" or set(adapter.factors) <= set(BIASES)


_NAMES = {"ia3": "(IA)^3", "glora": "GLoRA", "oft": "OFT"}


def refuse_base(adapter: Adapter) -> None:
    """Without the model, only changes that do not depend on it can be computed.

    Raises:
        ModelError: if `adapter` is decomposed (DoRA), (IA)^3, of biases or norms, or not computed here.
    """
    if adapter.needs_base:
        what = "DoRA" if adapter.is_dora else _NAMES.get(adapter.kind, adapter.kind)
        raise ModelError(
            f"{_named(adapter)}: what {what} changes depends on the model; merge it into the model "
            "(sd-train lora merge --sd_model) and, for a plain LoRA, extract the difference (sd-train lora extract)"
        )
    if adapter.kind in UNCOMPUTED or only_biases(adapter):
        raise ModelError(f"{_named(adapter)}: {adapter.kind} cannot become a plain LoRA; keep the file as it is")


def _named(adapter: Adapter) -> str:
    return f"{adapter.place.role}.{adapter.place.path}"


def _beside(adapters: list[tuple[Adapter, float]]) -> Adapter:
    ups, downs = [], []
    for adapter, multiplier in adapters:
        if adapter.kind != "lora":
            raise ModelError(
                f"{_named(adapter)}: {adapter.kind} has no factors to put beside others; "
                "choose --method svd with --new_rank"
            )
        plain = without_mid(adapter)
        ups.append(plain.factors[UP].float() * (multiplier * plain.scale))
        downs.append(plain.factors[DOWN].float())
    if len({(up.shape[0], *down.shape[1:]) for up, down in zip(ups, downs, strict=True)}) > 1:
        raise ModelError(f"{_named(adapters[0][0])}: {_OTHER_SHAPES}")
    up, down = torch.cat(ups, 1), torch.cat(downs)
    return Adapter(adapters[0][0].place, "lora", {UP: up, DOWN: down}, float(down.shape[0]))


def _summed(adapters: list[tuple[Adapter, float]], family: str | None, rule: RankRule, device: torch.device) -> Adapter:
    changes = [_shaped(adapter, family).to(device) * multiplier for adapter, multiplier in adapters]
    if len({own.shape for own in changes}) > 1:
        raise ModelError(f"{_named(adapters[0][0])}: {_OTHER_SHAPES}")
    return decompose(adapters[0][0].place, torch.stack(changes).sum(0), rule).adapter


def _shaped(adapter: Adapter, family: str | None) -> Tensor:
    """The change in the shape of the weight: LyCORIS's factors of convolutions may give a matrix."""
    own, side = delta(adapter), kernel(adapter.place, family)
    return own.view(own.shape[0], -1, side, side) if side is not None and own.ndim == 2 else own
