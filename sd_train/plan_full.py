"""What must not be between a model and the options of `fine_tune` and `train_db`, known before it is loaded."""

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
    """True; what the run starts from must not be among the files that it writes, or with --overwrite deletes.

    Raises:
        ConfigError: if it is.
    """
    written = [path.resolve() for path in names.existing()]
    sources = {"pretrained_model_name_or_path": config.model.pretrained_model_name_or_path, "vae": config.model.vae}
    for option, source in sources.items():
        if source is None:
            continue
        given = Path(source).resolve()
        clash = next((path for path in written if path == given or path in given.parents or _part(path, given)), None)
        if clash is not None:
            raise ConfigError(
                f"--{option} = {source}: {clash} is also what this run writes; choose another --output_name or "
                "--output_dir"
            )
    return True


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
