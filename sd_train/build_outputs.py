"""Configuration -> report, uploads and norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from sd_train.config.dump import hyperparameters
from sd_train.config.options import RunConfig
from sd_train.plan import Prepared
from sd_train.plan_outputs import TRACKERS, hub_target, wandb_run
from sd_train.report import Report, warn_line
from sd_train.report_norms import Norms
from sd_train.report_trackers import EventFile, JsonLines, Tracker
from sd_train.report_wandb import Wandb
from sd_train.trainables.base import ParamGroup
from sd_train.uploads import Uploader, open_repository


def make_report(prepared: Prepared, config_text: str) -> Report:
    """The report of a run, with its trackers open; they are shown `config_text`, the resolved configuration."""
    config = prepared.config
    report = Report(
        logging_dir=config.logging.logging_dir,
        log_prefix=config.logging.log_prefix,
        total_steps=prepared.plan.total_steps,
        start_step=prepared.progress.step,
        is_main=prepared.device.is_main,
        tracker_name=config.logging.log_tracker_name or TRACKERS[config.command],
        open_trackers=lambda log_dir, name: open_trackers(config, log_dir, name),
    )
    report.describe(config_text, hyperparameters(config))
    return report


def open_trackers(config: RunConfig, log_dir: Path | None, name: str) -> list[Tracker]:
    """Those that `--log_with` chooses; the curves in `log_dir` lie in its folder `name`."""
    chosen = config.logging.log_with or "tensorboard"
    trackers: list[Tracker] = []
    if log_dir is not None and chosen in ("tensorboard", "all"):
        trackers.append(EventFile(log_dir / name))
    if log_dir is not None and chosen in ("jsonl", "all"):
        trackers.append(JsonLines(log_dir / "metrics.jsonl"))
    if (run := wandb_run(config, warn_line)) is not None:
        trackers.append(Wandb(log_dir, run))
    return trackers


def make_norms(config: RunConfig, groups: Sequence[ParamGroup], report: Report) -> Norms | None:
    """None where nobody would see them."""
    every = config.logging.log_norms_every_n_steps
    return Norms(groups, every) if every and report.tracks else None


def open_hub(config: RunConfig, warn: Callable[[str], None]) -> None:
    """Find out before the first update whether uploads can work; makes the repository.

    Raises:
        ConfigError: if they cannot.
    """
    if (target := hub_target(config)) is not None:
        open_repository(target, warn)


def make_uploader(prepared: Prepared, say: Callable[[str], None]) -> Uploader | None:
    """What uploads saved files; None without `--huggingface_repo_id` and in other processes than the first.

    `say` is told where they go, and then of each.
    """
    target = hub_target(prepared.config)
    if target is None or not prepared.device.is_main:
        return None
    folder = f", folder {target.folder}" if target.folder else ""
    say(f"saved files are uploaded to the {target.repo_type} repository {target.repo_id}{folder}")
    return Uploader(target, say, in_background=prepared.config.hub.async_upload)
