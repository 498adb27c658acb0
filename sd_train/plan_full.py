"""What must not be between a model and the options, whole models' above all, known before it is loaded."""

from __future__ import annotations

from pathlib import Path

from sd_train.config.options import RunConfig
from sd_train.config.rates import TEXT_ROLES
from sd_train.errors import ConfigError
from sd_train.families.parts import ModelKind
from sd_train.families.published import TITLES
from sd_train.names import FileNames


def check_blocks(config: RunConfig, kind: ModelKind | None) -> None:
    """Rates of blocks are counted in SDXL's U-Net.

    Raises:
        ConfigError: if the model is of another family.
    """
    if config.full.block_lr is not None and kind is not None and kind.family != "sdxl":
        raise ConfigError(
            f"--block_lr: has the 23 blocks of SDXL's U-Net, and {config.model.pretrained_model_name_or_path} is "
            f"{TITLES[kind.family]}; leave it out and give --learning_rate"
        )


def refuse_own_source(config: RunConfig, names: FileNames) -> bool:
    """True; nothing that the run reads, and nothing that others wrote, may be among the files that it replaces.

    Raises:
        ConfigError: with what is.
    """
    # What --overwrite deletes is more than what is replaced.
    written = [path.resolve() for path in (names.existing() if config.saving.overwrite else names.replaced())]
    problems = []
    for option, given in _paths(config):
        place = given.resolve()
        clash = next((path for path in written if path == place or path in place.parents or _part(path, place)), None)
        if (clash := clash or names.holding(given)) is not None:
            problems.append(
                f"--{option} = {given}: {clash} is also what this run writes; choose another --output_name or "
                "--output_dir"
            )
    if config.sampling.sample_prompts is not None and (clash := names.holding(names.folder / "sample")) is not None:
        problems.append(f"--output_name = {names.name}: {clash} is where sample pictures go; choose another name")
    if not problems:
        problems = [
            f"--output_dir = {names.folder}: {path.name} is neither a saved model nor a state, and this run would "
            "replace it; choose another --output_name"
            for path in names.foreign()
        ]
    if problems:
        raise ConfigError(*problems)
    return True


def _paths(config: RunConfig) -> list[tuple[str, Path]]:
    """What the run reads, and where else it writes, by option."""
    model, network, data = config.model, config.network, config.dataset
    options: dict[str, str | Path | None] = {
        "pretrained_model_name_or_path": model.pretrained_model_name_or_path, "vae": model.vae,
        "dataset_config": data.dataset_config, "train_data_dir": data.train_data_dir,
        "reg_data_dir": data.reg_data_dir, "in_json": data.in_json, "cache_dir": data.cache_dir,
        "logging_dir": config.logging.logging_dir,
    }  # fmt: skip
    found = [(option, Path(path)) for option, path in options.items() if path is not None]
    found += [("base_weights", path) for path in network.base_weights]
    if config.saving.resume is None:
        # A run that goes on takes its weights from the state.
        starts = {"network_weights": network.network_weights, "weights": config.embedding.weights}
        found += [(option, path) for option, path in starts.items() if path is not None]
    return found


def _part(path: Path, model: Path) -> bool:
    """Whether `path` lies in one of the folders that make a model of the folder `model`."""
    parts = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    return model in path.parents and path.relative_to(model).parts[0] in parts


def idle_rates(config: RunConfig, kind: ModelKind | None, total_steps: int) -> list[str]:
    """Warnings for options of whole models that this model or this length leaves without effect."""
    full, warnings = config.full, []
    for role, name in zip(TEXT_ROLES, ("learning_rate_te1", "learning_rate_te2"), strict=True):
        if getattr(full, name) is not None and kind is not None and role not in kind.configs:
            which = "first" if role == "text_encoder" else "second"
            warnings.append(f"--{name} has no effect: {TITLES[kind.family]} has no {which} text encoder")
    stop = full.stop_text_encoder_training
    if stop is not None and stop >= total_steps:
        warnings.append(f"--stop_text_encoder_training = {stop} has no effect: the training has {total_steps} updates")
    return warnings
