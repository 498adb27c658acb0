"""What each command trains, and how it is written."""

from __future__ import annotations

from sd_train.config.options import RunConfig
from sd_train.device import DTYPES
from sd_train.families.base import Family
from sd_train.objectives.prior import Prior
from sd_train.plan import Prepared
from sd_train.save_forms import Export, diffusers_lora, save_own
from sd_train.trainables.base import Trainable


def make_trainable(prepared: Prepared) -> Trainable:
    """What the command trains, not yet in a model.

    Raises:
        UserError: if its options do not fit together, or a file that it starts from is another's.
    """
    # Each is imported where it is chosen: some need packages that others do not.
    match prepared.config.command, prepared.config.network.network_module:
        case "train_network", "networks.lora":
            from sd_train.build_network import make
        case "train_network", _:
            from sd_train.build_lycoris import make
        case "train_textual_inversion", _:
            from sd_train.build_embedding import make
        case _:
            from sd_train.build_full import make
    return make(prepared)


def export_of(prepared: Prepared, family: Family) -> Export:
    """How the trained weights are written."""
    config = prepared.config
    if config.command == "train_network" and config.network.output_lora_format == "diffusers":
        return diffusers_lora(family.name, DTYPES[config.saving.save_precision or "float"])
    return save_own


def prior_of(config: RunConfig) -> Prior | None:
    """What the model is to keep of its class."""
    training = config.training
    if training.prior_preservation is None or training.class_prompt is None or not training.prior_loss_weight:
        return None
    return Prior(training.class_prompt, training.prior_loss_weight)
