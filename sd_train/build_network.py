"""`train_network`: the options of a network -> what learns."""

from __future__ import annotations

import torch
from torch import Tensor

from sd_train.device import DTYPES
from sd_train.errors import ModelError
from sd_train.families.base import Family
from sd_train.families.sources import DictSource
from sd_train.lora_files.adapter import without_mid
from sd_train.lora_files.merging import MergedSource, Weighted, merge_into
from sd_train.lora_files.reading import open_lora
from sd_train.lora_files.writing import kohya_tensors
from sd_train.plan import Prepared
from sd_train.plan_network import lora_layout, network_args, network_numbers, start_adapters
from sd_train.trainables.base import Trainable
from sd_train.trainables.lora import Lora, LoraSettings
from sd_train.trainables.lora_layout import Layout


def make(prepared: Prepared) -> Trainable:
    """The LoRA that the options describe, not yet in a model.

    Raises:
        UserError: if they do not fit together, or a file that it starts from is another's.
    """
    config, kind = prepared.config, prepared.kind
    rank, alpha = network_numbers(config)
    args = network_args(config)
    precision = config.saving.save_precision
    return Lora(
        LoraSettings(
            rank=rank,
            alpha=alpha,
            dropout=config.network.network_dropout or 0.0,
            rates=prepared.plan.rates,
            seed=prepared.progress.seed,
            precision=None if precision is None else DTYPES[precision],
            start=_start(prepared),
            layout=Layout() if kind is None else lora_layout(config, kind),
            plus=args.plus,
            rank_dropout=args.rank_dropout or 0.0,
            module_dropout=args.module_dropout or 0.0,
            most_norm=config.network.scale_weight_norms or None,
        )
    )


def _start(prepared: Prepared) -> dict[str, Tensor] | None:
    """What `--network_weights` holds under kohya's keys; a resumed training starts from its state."""
    path = prepared.config.network.network_weights
    if path is None or prepared.resume is not None or prepared.kind is None:
        return None
    family = prepared.kind.family
    return kohya_tensors(map(without_mid, start_adapters(path, family)), family).tensors


def merge_base(prepared: Prepared, family: Family) -> None:
    """Merge `--base_weights` into the loaded model, each weight in float32 and then back in the dtype that it has.

    Raises:
        ModelError: if one is no LoRA, or for another model.
    """
    network = prepared.config.network
    if prepared.config.command != "train_network" or not network.base_weights:
        return
    factors = [*network.base_weights_multiplier, *[1.0] * len(network.base_weights)]
    try:
        loras = [Weighted(open_lora(path, family.name), factor)
                 for path, factor in zip(network.base_weights, factors, strict=False)]  # fmt: skip
        live = {role: DictSource(family.tensors(role)) for role in family.networks}
        for merged in merge_into(live, loras).values():
            assert isinstance(merged, MergedSource)
            with torch.no_grad():
                for name in merged.changed():
                    merged.base.read(name).copy_(merged.read(name))
    except ModelError as problem:
        raise ModelError(*(f"--base_weights: {one}" for one in problem.problems)) from None
