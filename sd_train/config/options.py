"""Every run option, declared once in the groups put together here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sd_train.config.group import Group
from sd_train.config.input_options import DatasetOptions, ModelOptions
from sd_train.config.objective_options import LossOptions, NoiseOptions, ValidationOptions
from sd_train.config.output_options import (
    HubOptions,
    LoggingOptions,
    MetadataOptions,
    SamplingOptions,
    SavingOptions,
)
from sd_train.config.safety_options import SafetyOptions
from sd_train.config.training_options import (
    EmaOptions,
    EmbeddingOptions,
    FullOptions,
    NetworkOptions,
    OptimizerOptions,
    TrainingOptions,
)

GROUPS: Mapping[str, type[Group]] = {
    "model": ModelOptions,
    "dataset": DatasetOptions,
    "network": NetworkOptions,
    "full": FullOptions,
    "embedding": EmbeddingOptions,
    "optimizer": OptimizerOptions,
    "training": TrainingOptions,
    "noise": NoiseOptions,
    "loss": LossOptions,
    "validation": ValidationOptions,
    "ema": EmaOptions,
    "safety": SafetyOptions,
    "saving": SavingOptions,
    "sampling": SamplingOptions,
    "logging": LoggingOptions,
    "hub": HubOptions,
    "metadata": MetadataOptions,
}


@dataclass(frozen=True)
class RunConfig:
    """One run's options, resolved. Two are equal if their values are, wherever these came from."""

    command: str
    """Name of the entry point: train_network, fine_tune, train_db or train_textual_inversion."""
    model: ModelOptions
    dataset: DatasetOptions
    network: NetworkOptions
    full: FullOptions
    embedding: EmbeddingOptions
    optimizer: OptimizerOptions
    training: TrainingOptions
    noise: NoiseOptions
    loss: LossOptions
    validation: ValidationOptions
    ema: EmaOptions
    safety: SafetyOptions
    saving: SavingOptions
    sampling: SamplingOptions
    logging: LoggingOptions
    hub: HubOptions
    metadata: MetadataOptions
    origins: Mapping[str, str] = field(compare=False)
    """Option -> where its value came from: `--flag`, `file.toml:12` or `default`."""
