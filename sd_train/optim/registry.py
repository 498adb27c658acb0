"""The optimizers as data: frozen specs whose classes are imported on use. Names can be read without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

RESERVED: Mapping[str, str] = MappingProxyType(
    {
        "params": "the trainer gives the parameters itself; remove it",
        "lr": "is not set here; give learning_rate, unet_lr or text_encoder_lr",
        "args": "is an object that no text can name; remove it",
        "capturable": "is for CUDA graphs, which this trainer does not make; remove it",
        "differentiable": "is for gradients through the optimizer, which nothing here needs; remove it",
        "maximize": "would raise the loss instead of lowering it; remove it",
        "fsdp_in_use": "is for sharded parameters, and here every device holds all of them; remove it",
        "fused_back_pass": "would leave every step out, for programs that step inside the backward pass; remove it",
        "optim_bits": "is part of the optimizer's name here; choose optimizer_type AdamW8bit or PagedAdamW",
        "use_triton": "replaces the update by a kernel that is not tested here; remove it",
    }
)
"""Arguments that `--optimizer_args` may not set, and why."""


@dataclass(frozen=True)
class OptimizerSpec:
    """One optimizer that `--optimizer_type` can name."""

    name: str
    target: str
    """`module:Class`, imported on use."""
    description: str
    accepts: tuple[str, ...] | None
    """What `--optimizer_args` may set, in the order of the class's signature; None: what the signature says."""
    package: str | None = None
    """The package to install, where it is not one that is always there."""
    aliases: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that differ from the class's own defaults."""
    adapts_rate: bool = False
    """Estimates its own step size d; the learning rate is a factor of it, usually 1.0."""
    one_rate: bool = False
    """Takes one learning rate for all parameters."""
    schedule_free: bool = False
    """Averages its weights instead of lowering the rate: what it steps from and what it gives are different weights."""
    needs_rate: bool = False
    """Divides by what the first step gives, which a rate of 0 leaves at 0: a warm-up cannot begin at 0."""
    eight_bit: bool = False
    """Keeps the state of large tensors in 8 bits."""
    syncs: bool = False
    """Its own step waits for the device."""
    fusible: bool = True
    """Steps each parameter by itself, so that a parameter can be stepped inside the backward pass."""


_ADAM = ("betas", "eps", "weight_decay", "amsgrad")
_BNB: Mapping[str, Any] = {"package": "bitsandbytes", "syncs": True}
_PAGED_ADAM = (*_ADAM, "min_8bit_size")
_PLAIN_ADAM = ("betas", "eps", "weight_decay")
"""bitsandbytes' classes of 32 bits take the others, too, and leave them without effect."""
_D_ADAPTATION: Mapping[str, Any] = {
    "package": "dadaptation", "adapts_rate": True, "one_rate": True, "syncs": True, "fusible": False,
}  # fmt: skip
_NESTEROV = {"momentum": 0.9, "nesterov": True}

_TORCH = (
    OptimizerSpec("AdamW", "torch.optim:AdamW", "Adam with decoupled weight decay (Loshchilov & Hutter 2019)",
                  (*_ADAM, "foreach", "fused"), defaults={"fused": True}),
    OptimizerSpec("SGDNesterov", "torch.optim:SGD", "gradient descent with Nesterov's momentum of 0.9",
                  ("momentum", "dampening", "weight_decay", "nesterov", "foreach", "fused"), defaults=_NESTEROV),
    OptimizerSpec("Muon", "sd_train.optim.muon:MuonWithAdamW",
                  "orthogonal momentum of layers' weights (Jordan 2024), AdamW for the rest; AdamW's rate; torch 2.9",
                  ("weight_decay", "momentum", "nesterov", "ns_steps", "adjust_lr_fn", "betas"),
                  aliases=("torch.optim.Muon",)),
    OptimizerSpec("Adadelta", "torch.optim:Adadelta", "steps as large as earlier ones (Zeiler 2012); rate 1.0",
                  ("rho", "eps", "weight_decay", "foreach")),
    OptimizerSpec("Adagrad", "torch.optim:Adagrad", "divides by all squared gradients (Duchi et al. 2011)",
                  ("lr_decay", "weight_decay", "initial_accumulator_value", "eps", "foreach", "fused")),
    OptimizerSpec("Adam", "torch.optim:Adam", "Adam with weight decay in the gradient (Kingma & Ba 2015)",
                  (*_ADAM, "foreach", "fused", "decoupled_weight_decay")),
    OptimizerSpec("Adamax", "torch.optim:Adamax", "Adam with the largest gradient in place of the mean square",
                  ("betas", "eps", "weight_decay", "foreach")),
    OptimizerSpec("ASGD", "torch.optim:ASGD", "averaged gradient descent (Polyak & Juditsky 1992)",
                  ("lambd", "alpha", "t0", "weight_decay", "foreach"), syncs=True),
    OptimizerSpec("NAdam", "torch.optim:NAdam", "Adam with Nesterov's momentum (Dozat 2016)",
                  ("betas", "eps", "weight_decay", "momentum_decay", "decoupled_weight_decay", "foreach")),
    OptimizerSpec("RAdam", "torch.optim:RAdam", "Adam with its own warm-up (Liu et al. 2020)",
                  ("betas", "eps", "weight_decay", "decoupled_weight_decay", "foreach")),
    OptimizerSpec("RMSprop", "torch.optim:RMSprop", "divides by the root of the mean square (Tieleman & Hinton 2012)",
                  ("alpha", "eps", "weight_decay", "momentum", "centered", "foreach")),
    OptimizerSpec("Rprop", "torch.optim:Rprop", "sign of the gradient alone; for whole batches",
                  ("etas", "step_sizes", "foreach")),
    OptimizerSpec("SGD", "torch.optim:SGD", "gradient descent, without momentum unless given",
                  ("momentum", "dampening", "weight_decay", "nesterov", "foreach", "fused")),
)  # fmt: skip

_EIGHT_BIT = (
    OptimizerSpec("AdamW8bit", "bitsandbytes.optim:AdamW8bit", "AdamW with its state in 8 bits",
                  (*_ADAM, "min_8bit_size", "is_paged"), eight_bit=True, **_BNB),
    OptimizerSpec("PagedAdamW", "bitsandbytes.optim:PagedAdamW",
                  "AdamW whose state goes to the computer's memory where the GPU's is full", _PLAIN_ADAM, **_BNB),
    OptimizerSpec("PagedAdamW8bit", "bitsandbytes.optim:PagedAdamW8bit", "AdamW8bit, paged as PagedAdamW", _PAGED_ADAM,
                  eight_bit=True, **_BNB),
    OptimizerSpec("PagedAdamW32bit", "bitsandbytes.optim:PagedAdamW32bit", "another name of PagedAdamW", _PLAIN_ADAM,
                  **_BNB),
    OptimizerSpec("Lion8bit", "bitsandbytes.optim:Lion8bit", "Lion with its state in 8 bits",
                  ("betas", "weight_decay", "min_8bit_size", "is_paged"), eight_bit=True, **_BNB),
    OptimizerSpec("PagedLion8bit", "bitsandbytes.optim:PagedLion8bit", "Lion8bit, paged as PagedAdamW",
                  ("betas", "weight_decay", "min_8bit_size"), eight_bit=True, **_BNB),
    OptimizerSpec("SGDNesterov8bit", "bitsandbytes.optim:SGD8bit",
                  "momentum of 0.9 in 8 bits; bitsandbytes takes nesterov=True and leaves it without effect",
                  ("momentum", "dampening", "weight_decay", "nesterov", "min_8bit_size"),
                  defaults=_NESTEROV, eight_bit=True, **_BNB),
)  # fmt: skip

_ADAPTIVE = (
    OptimizerSpec("DAdaptAdamPreprint", "dadaptation.experimental:DAdaptAdamPreprint",
                  "Adam that estimates its rate (Defazio & Mishchenko 2023), as first published; rate 1.0",
                  ("betas", "eps", "weight_decay", "log_every", "decouple", "d0", "growth_rate"),
                  aliases=("DAdaptation",), **_D_ADAPTATION),
    OptimizerSpec("DAdaptAdaGrad", "dadaptation:DAdaptAdaGrad", "Adagrad that estimates its rate; rate 1.0",
                  ("momentum", "log_every", "weight_decay", "eps", "d0", "growth_rate"), **_D_ADAPTATION),
    OptimizerSpec("DAdaptAdam", "dadaptation:DAdaptAdam", "Adam that estimates its rate; rate 1.0",
                  ("betas", "eps", "weight_decay", "log_every", "decouple", "use_bias_correction", "d0",
                   "growth_rate"), **_D_ADAPTATION),
    OptimizerSpec("DAdaptAdan", "dadaptation:DAdaptAdan", "Adan that estimates its rate; rate 1.0",
                  ("betas", "eps", "weight_decay", "no_prox", "log_every", "d0", "growth_rate"), **_D_ADAPTATION),
    OptimizerSpec("DAdaptAdanIP", "dadaptation.experimental:DAdaptAdanIP",
                  "Adan that estimates its rate by inner products; rate 1.0",
                  ("betas", "eps", "weight_decay", "no_prox", "log_every", "d0", "growth_rate"), **_D_ADAPTATION),
    OptimizerSpec("DAdaptLion", "dadaptation:DAdaptLion", "Lion that estimates its rate; rate 1.0",
                  ("betas", "weight_decay", "log_every", "d0"), **_D_ADAPTATION),
    OptimizerSpec("DAdaptSGD", "dadaptation:DAdaptSGD", "gradient descent that estimates its rate; rate 1.0",
                  ("momentum", "weight_decay", "log_every", "d0", "growth_rate"), needs_rate=True, **_D_ADAPTATION),
    OptimizerSpec("Prodigy", "prodigyopt:Prodigy", "Adam that estimates its rate (Mishchenko & Defazio 2023); rate 1.0",
                  ("betas", "beta3", "eps", "weight_decay", "decouple", "use_bias_correction", "safeguard_warmup",
                   "d0", "d_coef", "growth_rate", "slice_p"),
                  package="prodigyopt", adapts_rate=True, one_rate=True, syncs=True, fusible=False),
    OptimizerSpec("ProdigyPlusScheduleFree", "prodigyplus:ProdigyPlusScheduleFree",
                  "Prodigy and schedule-free in one, each group with its own estimate; rate 1.0",
                  ("betas", "beta3", "weight_decay", "weight_decay_by_lr", "d0", "d_coef", "d_limiter",
                   "prodigy_steps", "schedulefree_c", "eps", "split_groups", "split_groups_mean", "factored",
                   "factored_fp32", "use_bias_correction", "use_stableadamw", "use_schedulefree", "use_speed",
                   "stochastic_rounding", "use_cautious", "use_grams", "use_adopt", "use_orthograd", "use_focus"),
                  package="prodigy-plus-schedule-free",
                  aliases=("prodigy-plus-schedule-free", "prodigyplus.prodigy_plus_schedulefree."
                           "ProdigyPlusScheduleFree"),
                  adapts_rate=True, schedule_free=True, syncs=True, fusible=False),
)  # fmt: skip

_SCHEDULE_FREE = (
    OptimizerSpec("AdamWScheduleFree", "schedulefree:AdamWScheduleFree",
                  "AdamW that averages its weights instead of lowering the rate (Defazio et al. 2024)",
                  ("betas", "eps", "weight_decay", "warmup_steps", "r", "weight_lr_power", "foreach"),
                  package="schedulefree", schedule_free=True),
    OptimizerSpec("SGDScheduleFree", "schedulefree:SGDScheduleFree", "gradient descent that averages its weights",
                  ("momentum", "weight_decay", "warmup_steps", "r", "weight_lr_power", "foreach"),
                  package="schedulefree", schedule_free=True),
    OptimizerSpec("RAdamScheduleFree", "schedulefree:RAdamScheduleFree",
                  "RAdam that averages its weights; warms up by itself",
                  ("betas", "eps", "weight_decay", "r", "weight_lr_power", "foreach", "silent_sgd_phase"),
                  package="schedulefree", schedule_free=True),
)  # fmt: skip

_OTHERS = (
    OptimizerSpec("Lion", "lion_pytorch:Lion", "sign momentum (Chen et al. 2023); use a third of AdamW's rate",
                  ("betas", "weight_decay", "decoupled_weight_decay"), package="lion-pytorch"),
    OptimizerSpec("AdaFactor", "transformers.optimization:Adafactor",
                  "second moments by row and column (Shazeer & Stern 2018); chooses its rate where none is given",
                  ("eps", "clip_threshold", "decay_rate", "beta1", "weight_decay", "scale_parameter", "relative_step",
                   "warmup_init"), aliases=("transformers.Adafactor",), syncs=True),
    OptimizerSpec("CAME", "pytorch_optimizer:CAME",
                  "AdaFactor with momentum that is trusted where it is steady (Luo et al. 2023)",
                  ("betas", "weight_decay", "weight_decouple", "fixed_decay", "clip_threshold", "ams_bound", "eps1",
                   "eps2", "foreach"), package="pytorch-optimizer"),
)  # fmt: skip

SPECS: tuple[OptimizerSpec, ...] = (
    _TORCH[0], *_EIGHT_BIT, _OTHERS[0], _TORCH[1], *_ADAPTIVE, *_OTHERS[1:], *_SCHEDULE_FREE, *_TORCH[2:],
)  # fmt: skip

REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "lbfgs": "computes the loss several times for each step, with the same noise, which no training loop does",
        "sparseadam": "takes sparse gradients alone, and those here are dense",
    }
)
"""torch's optimizers that cannot train here, in lower case, and why."""
