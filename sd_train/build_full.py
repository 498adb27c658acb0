"""`fine_tune` and `train_db`: the options of whole models -> what learns."""

from __future__ import annotations

from sd_train.device import DTYPES
from sd_train.families.parts import read_model
from sd_train.plan import Prepared
from sd_train.plan_data import model_request, saved_form
from sd_train.trainables.base import Trainable
from sd_train.trainables.full import Full, FullSettings


def make(prepared: Prepared) -> Trainable:
    """The whole weights that the options choose, not yet in a model."""
    config = prepared.config
    precision, form = config.saving.save_precision, saved_form(config, prepared.kind)
    # `_weights` of config/rules.py has refused it.
    assert form != "pt"
    return Full(
        FullSettings(
            rates=prepared.plan.rates,
            read=lambda: read_model(model_request(config)),
            form=form,
            precision=None if precision is None else DTYPES[precision],
            block_rates=config.full.block_lr,
            text_until=config.full.stop_text_encoder_training,
            reference=config.training.prior_preservation == "frozen" and config.training.prior_loss_weight > 0,
        )
    )
