"""What the optimizer keeps of each trained number, as far as the model's headers tell."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from sd_train.config.options import RunConfig
from sd_train.families.parts import read_model
from sd_train.optim.optimizers import eight_bit_numbers, find_optimizer, smallest_eight_bit
from sd_train.plan import Prepared
from sd_train.plan_data import model_request
from sd_train.plan_network import network_tensors
from sd_train.plan_words import word_numbers


def eight_bit_state(config: RunConfig, sizes: Iterable[int]) -> str | None:
    """How many of all trained numbers get state of 8 bits, in words; None if the optimizer has none.

    `sizes`: numbers in each trained tensor.
    """
    counts = eight_bit_numbers(config.optimizer.optimizer_type, config.optimizer.optimizer_args, sizes)
    if counts is None:
        return None
    small, total = counts
    least = smallest_eight_bit(config.optimizer.optimizer_args)
    name = find_optimizer(config.optimizer.optimizer_type).name
    return (
        f"{name}: 8-bit state for {small:,} of {total:,} trained numbers; tensors of fewer than {least:,} keep "
        "32 bits"
    )


def planned_sizes(prepared: Prepared) -> list[int] | None:
    """Numbers in each tensor that will be trained; None where the model is not known, or LyCORIS makes them."""
    config, kind, rates = prepared.config, prepared.kind, prepared.plan.rates
    if kind is None or (config.command == "train_network" and config.network.network_module != "networks.lora"):
        return None
    if config.command == "train_textual_inversion":
        return [word_numbers(config, kind)]
    parts = read_model(model_request(config))
    if config.command == "train_network":
        tensors = network_tensors(config, kind, parts)
        return [size for role, sizes in tensors.items() if role in rates for size in sizes]
    whole = [part.tensors for role, part in parts.parts.items() if role in rates]
    return [prod(tensors.shape(name)) for tensors in whole for name in tensors.names()]


def idle_eight_bit(prepared: Prepared) -> list[str]:
    """The warning that an optimizer with state of 8 bits has none for these tensors."""
    config = prepared.config
    sizes = planned_sizes(prepared) if find_optimizer(config.optimizer.optimizer_type).eight_bit else None
    counts = None if sizes is None else eight_bit_numbers(
        config.optimizer.optimizer_type, config.optimizer.optimizer_args, sizes
    )
    if not counts or counts[0] or not counts[1]:
        return []
    return [
        f"{find_optimizer(config.optimizer.optimizer_type).name} saves nothing here: no tensor of this network has the "
        f"{smallest_eight_bit(config.optimizer.optimizer_args):,} numbers from which on state is kept in 8 bits; "
        "raise --network_dim, or use AdamW or Lion"
    ]


def describe_state(prepared: Prepared) -> str | None:
    """`eight_bit_state` of what will be trained, before it is loaded."""
    sizes = planned_sizes(prepared) if find_optimizer(prepared.config.optimizer.optimizer_type).eight_bit else None
    return None if sizes is None else eight_bit_state(prepared.config, sizes)
