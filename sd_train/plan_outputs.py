"""What saves, logs and uploads need, looked at before the model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydantic import SecretStr

from sd_train.checkpoint import Intervals
from sd_train.config.options import RunConfig
from sd_train.config.output_options import SavingOptions
from sd_train.names import FileNames
from sd_train.report_wandb import WandbRun, check_arguments, is_installed, missing_key, read_arguments
from sd_train.retention import Retention
from sd_train.state_choice import find_state
from sd_train.uploads import HubTarget, download_state

TRACKERS = {
    "train_network": "network_train",
    "fine_tune": "finetuning",
    "train_db": "dreambooth",
    "train_textual_inversion": "textual_inversion",
}
"""sd-scripts' folder of the curves inside `--logging_dir`, and its project in wandb, by command."""


def epoch_interval(saving: SavingOptions, epochs: int) -> int | None:
    """After how many epochs a run of `epochs` saves; None: not by epochs."""
    ratio = saving.save_n_epoch_ratio
    return saving.save_every_n_epochs if ratio is None else max(1, epochs // ratio)


def save_rules(saving: SavingOptions, epochs: int) -> tuple[Intervals, Retention]:
    """When a run of `epochs` saves, and which saves it keeps."""
    every = epoch_interval(saving, epochs)
    models, states = saving.save_last_n_epochs, saving.save_last_n_epochs_state or saving.save_last_n_epochs
    intervals = Intervals(
        saving.save_every_n_steps, every, saving.save_state, saving.save_state_on_train_end, saving.save_every_n_minutes
    )
    retention = Retention(
        None if every is None or models is None else every * models,
        None if every is None or states is None else every * states,
        saving.save_last_n_steps,
        saving.save_last_n_steps_state or saving.save_last_n_steps,
    )
    return intervals, retention


def wandb_run(config: RunConfig, warn: Callable[[str], None]) -> WandbRun | None:
    """The run of wandb that `--log_with` asks for; `warn` is told if `all` has to go without.

    Raises:
        ConfigError: if it cannot begin.
    """
    logging = config.logging
    if logging.log_with not in ("wandb", "all"):
        return None
    arguments = read_arguments(logging.log_tracker_config)
    if logging.log_with == "all" and not is_installed():
        return None
    run = WandbRun(
        project=logging.log_tracker_name or TRACKERS[config.command],
        name=logging.wandb_run_name,
        key=_plain(logging.wandb_api_key),
        log_config=logging.log_config,
        arguments=arguments,
    )
    check_arguments(run)
    if (missing := missing_key(run)) is None:
        return run
    if logging.log_with == "wandb":
        raise missing
    warn(f"{missing}; the curves go to the others alone")
    return None


def hub_target(config: RunConfig) -> HubTarget | None:
    """Where `--huggingface_repo_id` has what is saved uploaded."""
    hub = config.hub
    if hub.huggingface_repo_id is None:
        return None
    return HubTarget(
        repo_id=hub.huggingface_repo_id,
        repo_type=hub.huggingface_repo_type or "model",
        folder=(hub.huggingface_path_in_repo or "").strip("/"),
        private=hub.huggingface_repo_visibility != "public",
        token=_plain(hub.huggingface_token),
        states=hub.save_state_to_huggingface,
    )


def resumed_state(config: RunConfig, names: FileNames, warn: Callable[[str], None]) -> Path | None:
    """The state folder that `--resume` means, downloaded if it is on the hub; None if it is not given.

    Raises:
        UserError: if there is none.
    """
    if not config.saving.resume:
        return None
    if config.hub.resume_from_huggingface:
        return download_state(config.saving.resume, _plain(config.hub.huggingface_token))
    return find_state(config.saving.resume, names, warn)


def _plain(secret: SecretStr | None) -> str | None:
    return None if secret is None else secret.get_secret_value() or None
