"""Options for how the training goes: network, optimizer, training."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sd_train.config.group import Group
from sd_train.config.values import Arguments, Hint, LaxPath, NetworkArguments, SingleRate, WarmupSteps


class NetworkOptions(Group):
    """The LoRA: which modules it has and how they learn."""

    network_module: Annotated[
        Literal["networks.lora"],
        Hint(later=("networks.dylora", "networks.lora_fa", "networks.oft", "lycoris.kohya")),
    ] = Field("networks.lora", description="Kind of network.")
    network_dim: int | None = Field(None, ge=1, le=16_384, description="Rank of the LoRA matrices; not given: 4.")
    network_alpha: float = Field(
        1.0, ge=0, le=1e6, description="The LoRA is scaled by network_alpha / network_dim; 0 means the rank (scale 1)."
    )
    network_dropout: float | None = Field(
        None, ge=0, lt=1, description="Probability that a value between the two LoRA matrices is dropped."
    )
    network_args: NetworkArguments = Field(
        default_factory=dict, description="Arguments of the network; none is supported yet."
    )
    network_weights: LaxPath | None = Field(None, description="LoRA file to start from.")
    network_train_unet_only: bool = Field(False, description="Train the U-Net's LoRA modules only.")
    network_train_text_encoder_only: bool = Field(False, description="Train the text encoder's LoRA modules only.")
    unet_lr: float | None = Field(
        None, ge=0, le=1e6, description="Learning rate of the U-Net; not given: learning_rate; 0 leaves the U-Net out."
    )
    text_encoder_lr: SingleRate = Field(
        None, ge=0, le=1e6, description="Learning rate of the text encoder; not given: learning_rate; 0 leaves it out."
    )
    output_lora_format: Literal["kohya", "diffusers"] = Field(
        "kohya", description="Names in the saved file: kohya's, which every program reads, or diffusers' (PEFT)."
    )
    training_comment: str | None = Field(None, description="Text kept in the metadata of the saved file.")
    no_metadata: bool = Field(False, description="Save without ss_* metadata.")


class OptimizerOptions(Group):
    """The optimizer and the course of the learning rate."""

    optimizer_type: str = Field("AdamW", description="Name of the optimizer: sd-train optimizers lists them.")
    learning_rate: float = Field(
        2e-6, ge=0, le=1e6, description="Learning rate, unless unet_lr or text_encoder_lr is given."
    )
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are clipped to this norm; 0 switches that off.")
    optimizer_args: Arguments = Field(
        default_factory=dict, description="Arguments of the optimizer: weight_decay=0.01 betas=.9,.999"
    )
    lr_scheduler: str = Field(
        "constant",
        description="Course of the learning rate: constant, constant_with_warmup, linear, cosine, "
        "cosine_with_restarts, cosine_with_min_lr, polynomial, inverse_sqrt, warmup_stable_decay, piecewise_constant, "
        "adafactor, rex, or a scheduler class as module.Class.",
    )
    lr_scheduler_type: str = Field(
        "", description="Scheduler class: a name in torch.optim.lr_scheduler, or module.Class; replaces lr_scheduler."
    )
    lr_scheduler_args: Arguments = Field(
        default_factory=dict, description="Arguments of the schedule or its class: T_max=1000 eta_min=1e-6"
    )
    lr_warmup_steps: WarmupSteps = Field(
        0, description='Steps until the learning rate is reached; below 1 or "10%" a share of the training.'
    )
    lr_decay_steps: WarmupSteps = Field(
        0, description="Steps at the end in which warmup_stable_decay decays, as steps or a share of the training."
    )
    lr_scheduler_num_cycles: Annotated[int, Hint(zero_is_unset=True)] = Field(
        1, ge=1, le=1_000_000,
        description="Cycles of cosine_with_restarts; half periods of cosine_with_min_lr and warmup_stable_decay.",
    )  # fmt: skip
    lr_scheduler_power: Annotated[float, Hint(zero_is_unset=True)] = Field(
        1.0, gt=0, le=1000, description="Power of polynomial."
    )
    lr_scheduler_timescale: int | None = Field(
        None, ge=1, le=10**9, description="Steps over which inverse_sqrt falls; not given: the warm-up, or 10000."
    )
    lr_scheduler_min_lr_ratio: float | None = Field(
        None, gt=0, le=1,
        description="Share of the learning rate that cosine_with_min_lr and warmup_stable_decay end at.",
    )  # fmt: skip


class TrainingOptions(Group):
    """Length, batch and precision of the training."""

    train_batch_size: int = Field(1, ge=1, le=65_536, description="Images in a batch on each device.")
    max_train_steps: int = Field(1600, ge=1, le=10**9, description="Optimizer updates after which the training ends.")
    max_train_epochs: int | None = Field(
        None, ge=1, le=10**9, description="Epochs after which the training ends; replaces max_train_steps."
    )
    seed: int | None = Field(
        None, ge=0, lt=2**32, description="Seed of all randomness; not given: drawn, printed and saved."
    )
    gradient_checkpointing: bool = Field(False, description="Compute parts of the forward pass twice, to save memory.")
    gradient_accumulation_steps: int = Field(
        1, ge=1, le=1_000_000, description="Batches whose gradients make one update."
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = Field("no", description="Precision of the forward pass.")
    max_data_loader_n_workers: int = Field(
        8,
        ge=0,
        le=1024,
        description="Threads that prepare batches, at most one for each processor; 0: in the main thread.",
    )
    prior_loss_weight: float = Field(1.0, ge=0, le=1e6, description="Weight of the loss of regularisation images.")
    sdpa: bool = Field(False, description="Use PyTorch's attention; accepted for old files, it is the default.")
    xformers: bool = Field(
        False, description="Use xformers' attention on NVIDIA GPUs if it is installed, else PyTorch's."
    )
