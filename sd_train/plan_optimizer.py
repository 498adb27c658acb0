"""What the optimizer keeps of each trained number, as far as the model's headers tell."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from sd_train.config.options import RunConfig
from sd_train.families.keys import text_lora_targets, unet_lora_targets, unet_shape_of
from sd_train.families.parts import Part, read_model
from sd_train.optim.optimizers import eight_bit_numbers, find_optimizer, smallest_eight_bit
from sd_train.plan import Prepared
from sd_train.plan_data import model_request


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
    """Numbers in each tensor of the LoRA that will be trained; None where the model is not known."""
    if prepared.kind is None:
        return None
    rank = prepared.config.network.network_dim or 4
    parts = read_model(model_request(prepared.config)).parts
    return [size for role, part in parts.items() if role in prepared.plan.rates for size in _sizes(role, part, rank)]


def _sizes(role: str, part: Part, rank: int) -> list[int]:
    if role == "unet":
        targets = unet_lora_targets(unet_shape_of(part.config))
    else:
        targets = text_lora_targets(part.config["num_hidden_layers"])
    shapes = [part.tensors.shape(f"{target.path}.weight") for target in targets]
    # down: [rank, in, kernel], up: [out, rank].
    return [rank * count for shape in shapes for count in (prod(shape[1:]), shape[0])]


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
