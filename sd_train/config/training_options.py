"""Options for how the training goes: network, optimizer, training."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from sd_train.config.group import Group
from sd_train.config.lycoris_args import refuse_network
from sd_train.config.values import Arguments, BlockRates, Factors, Hint, LaxPath, Paths, SingleRate, WarmupSteps


class NetworkOptions(Group):
    """The LoRA: which modules it has and how they learn."""

    commands: ClassVar[tuple[str, ...]] = ("train_network",)

    network_module: Annotated[
        Literal["networks.lora", "lycoris.kohya", "networks.dylora", "networks.loha", "networks.lokr"],
        BeforeValidator(refuse_network),
    ] = Field("networks.lora", description="Kind of network; all but networks.lora need the package lycoris-lora.")
    network_dim: int | None = Field(None, ge=1, le=16_384, description="Rank of the LoRA matrices; not given: 4.")
    network_alpha: float = Field(
        1.0, ge=0, le=1e6, description="The LoRA is scaled by network_alpha / network_dim; 0 means the rank (scale 1)."
    )
    network_dropout: float | None = Field(
        None, ge=0, lt=1, description="Probability that a value between the two LoRA matrices is dropped."
    )
    network_args: Arguments = Field(
        default_factory=dict, description="Arguments of the network: conv_dim=8 conv_alpha=4 (README: Networks)."
    )
    network_weights: LaxPath | None = Field(None, description="LoRA file to start from.")
    dim_from_weights: bool = Field(
        False, description="Take ranks and alphas of every module from network_weights, not from network_dim."
    )
    scale_weight_norms: float | None = Field(
        None, gt=0, le=1e6, description="After each update, scale modules down whose change has a norm above this."
    )
    base_weights: Paths = Field((), description="LoRA files that are merged into the base model before the training.")
    base_weights_multiplier: Factors = Field(
        (), description="Strength of each of base_weights; where one is missing: 1."
    )
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


class FullOptions(Group):
    """The base model's own weights: which of them learn, and how fast."""

    commands: ClassVar[tuple[str, ...]] = ("fine_tune", "train_db")

    train_text_encoder: Annotated[bool, Hint(commands=("fine_tune",))] = Field(
        False, description="Train the text encoder too."
    )
    learning_rate_te: float | None = Field(
        None, ge=0, le=1e6, description="Learning rate of the text encoders; not given: learning_rate; 0: they stay."
    )
    learning_rate_te1: float | None = Field(
        None, ge=0, le=1e6, description="Of SDXL's first text encoder; not given: learning_rate_te."
    )
    learning_rate_te2: float | None = Field(
        None, ge=0, le=1e6, description="Of SDXL's second text encoder; not given: learning_rate_te."
    )
    stop_text_encoder_training: Annotated[int | None, Hint(zero_is_unset=True, commands=("train_db",))] = Field(
        None, ge=-1, le=10**9, description="Train the text encoder for so many updates only; -1: not at all."
    )
    block_lr: BlockRates = Field(
        None,
        description="SDXL: 23 learning rates with commas between them, of the U-Net's embeddings, its 9 input blocks, "
        "3 middle blocks, 9 output blocks and its end; 0 leaves a block as it is.",
    )


class EmbeddingOptions(Group):
    """The new word of a textual inversion."""

    commands: ClassVar[tuple[str, ...]] = ("train_textual_inversion",)

    token_string: str | None = Field(
        None, description="The word that is taught, as it stands in the captions [required]."
    )
    init_word: str | None = Field(
        None, description="Word or words whose tokens the vectors start from, in order, from the first again where "
        "they are too few; not given: random vectors of the usual size.",
    )
    num_vectors_per_token: int = Field(1, ge=1, le=75, description="Vectors that the word is made of.")
    use_object_template: bool = Field(
        False, description="In place of captions: sentences such as a photo of a WORD."
    )
    use_style_template: bool = Field(
        False, description="In place of captions: sentences such as a painting in the style of WORD."
    )
    weights: LaxPath | None = Field(None, description="Embedding file to start from.")
    xti: bool = Field(
        False, description="Vectors of their own for each cross-attention block of the U-Net (Voynov et al. 2023)."
    )


class EmaOptions(Group):
    """A moving average of what is trained."""

    use_ema: bool = Field(False, description="Keep the average and save it beside the plain weights as NAME-ema.")
    ema_decay: float = Field(0.9999, ge=0, lt=1, description="Share of the average that an update leaves; grows to it.")
    ema_device: Literal["gpu", "cpu"] = Field("gpu", description="Where the average is kept.")
    sample_ema: bool = Field(False, description="Make sample pictures with the average.")


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
    prior_preservation: Annotated[
        Literal["frozen"] | None, Hint(commands=("train_network", "fine_tune", "train_db"))
    ] = Field(
        None,
        description="frozen: keep what the base model makes of class_prompt, without regularisation images; weighted "
        "by prior_loss_weight.",
    )
    class_prompt: Annotated[str | None, Hint(commands=("train_network", "fine_tune", "train_db"))] = Field(
        None, description="The class without the word that is taught, for prior_preservation: a photo of a dog."
    )
    sdpa: bool = Field(False, description="Use PyTorch's attention; accepted for old files, it is the default.")
    xformers: bool = Field(
        False, description="Use xformers' attention on NVIDIA GPUs if it is installed, else PyTorch's."
    )
    torch_compile: bool = Field(
        False, description="Compile the U-Net's computation for training steps (README: With every command)."
    )
    torch_compile_scope: Literal["regional", "whole"] = Field(
        "regional", description="What is compiled: each kind of repeated block by itself, or the whole U-Net."
    )
    dynamo_backend: Annotated[
        Literal["inductor", "aot_eager", "eager"],
        Hint(later=("aot_ts_nvfuser", "nvprims_nvfuser", "cudagraphs", "ofi", "fx2trt", "onnxrt", "tensort", "ipex",
                    "tvm")),
    ] = Field("inductor", description="What makes programs of the graphs; the others than inductor are for tests.")
