"""What the run will do, as data, known before step 1 and before the model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from sd_train.config.options import RunConfig
from sd_train.config.rates import learning_rates
from sd_train.data.batches import Updates
from sd_train.data.index import ImageIndex
from sd_train.data.settings import DatasetConfig
from sd_train.device import Device, open_device
from sd_train.errors import ConfigError, DataError, ModelError, Problem, UserError
from sd_train.families.parts import ModelKind
from sd_train.families.registry import check_model
from sd_train.metadata import now
from sd_train.names import FileNames
from sd_train.optim.optimizers import check_arguments, check_optimizer, shared_rates
from sd_train.optim.schedules import ScheduleOptions, check_schedule, check_schedule_values, make_schedule
from sd_train.optim.settle import settle
from sd_train.plan_data import check_caption_cache, check_prior, file_names, make_updates, model_request, read_datasets
from sd_train.plan_full import check_blocks, refuse_own_source
from sd_train.plan_network import check_network
from sd_train.plan_objective import check_objective, check_validation
from sd_train.plan_outputs import resumed_state, wandb_run
from sd_train.plan_resume import Start, facts_of, first_progress, starting_point, steps_ahead
from sd_train.plan_words import check_captions_hold_word, check_word
from sd_train.prompts import SD_SCRIPTS_DEFAULTS, Prompt, load_prompts
from sd_train.report import warn_line
from sd_train.types import Progress

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """Counts of a training."""

    datasets: tuple[DatasetConfig, ...]
    indexes: tuple[ImageIndex, ...]
    validation: tuple[ImageIndex, ...]
    """Images kept for validation, of the datasets that keep some."""
    batches_per_epoch: int
    """Of the first epoch; they vary with fractional `num_repeats` and with `bucket_policy = "carry"`."""
    updates_per_epoch: int
    """Of the first epoch."""
    varies: bool
    """Whether epochs have different numbers of updates."""
    total_steps: int
    epochs: int
    """Epochs begun by the time the training ends."""
    warmup_steps: int
    rates: dict[str, float]
    """Learning rate by network role; roles that learn nothing are missing."""
    samples_per_epoch: int
    """Planned samples of the first epoch with repeats, regularisation images included."""
    filled: int
    """Copies among the first epoch's rows, which fill short batches."""
    carried: int
    """Planned samples of the first epoch that wait for batches of later ones."""


def rates_of(config: RunConfig) -> dict[str, float]:
    """The rate of each network role; one that is left out or has rate 0 is missing."""
    values = {name: getattr(group, name) for group in (config.network, config.full, config.optimizer)
              for name in type(group).model_fields}
    return learning_rates(config.command, values)


def acting_rates(config: RunConfig, roles: Collection[str] | None = None) -> dict[str, float]:
    """The same as the optimizer takes them; only those of `roles`, the networks that the model has, if it is known."""
    rates = {role: rate for role, rate in rates_of(config).items() if roles is None or role in roles}
    return shared_rates(config.optimizer.optimizer_type, rates)


def make_plan(
    config: RunConfig,
    kind: ModelKind | None,
    datasets: tuple[DatasetConfig, ...],
    validation: tuple[ImageIndex, ...],
    updates: Updates,
    progress: Progress,
) -> Plan:
    """Count what the run will do from `progress` on.

    Raises:
        UserError: if it would do nothing, or its warm-up does not fit.
    """
    training = config.training
    total = training.max_train_steps
    if training.max_train_epochs is not None:
        total = updates.updates_before(training.max_train_epochs)
    ahead = steps_ahead(progress, updates)
    if training.max_train_epochs is not None:
        total += ahead
    if total == 0:
        raise DataError(
            f"{datasets[0].origin}: no batch is complete by the end of the training; raise num_repeats or "
            "max_train_epochs, or use another bucket_policy than carry"
        )
    rates = acting_rates(config, None if kind is None else kind.configs)
    schedule = make_schedule(ScheduleOptions.of(config.optimizer, rates), total)
    return Plan(
        datasets=datasets,
        indexes=tuple(updates.indexes),
        validation=validation,
        batches_per_epoch=updates.batches_in(0),
        updates_per_epoch=updates.updates_in(0),
        varies=not updates.order.constant,
        total_steps=total,
        epochs=updates.epoch_of(max(0, total - 1 - ahead))[0] + 1,
        warmup_steps=schedule.warmup_steps,
        rates=rates,
        samples_per_epoch=sum(int(updates.order.counts(number, 0).sum()) for number in range(len(updates.indexes))),
        filled=updates.order.filled_in(0),
        carried=updates.order.carried_after(0),
    )


@dataclass(frozen=True)
class Prepared:
    """What is known before the model is loaded."""

    config: RunConfig
    kind: ModelKind | None
    """Of the base model; `--debug_dataset` also goes without."""
    device: Device
    start: Start
    resume: Path | None
    names: FileNames
    updates: Updates
    plan: Plan
    prompts: tuple[Prompt, ...]
    notes: tuple[str, ...] = ()
    """What the optimizer makes of options, where that may not be expected."""

    @property
    def progress(self) -> Progress:
        """Where the run begins; the loop counts on in it."""
        return self.start.progress

    @property
    def ahead(self) -> int:
        """What the updates of these data's epochs are counted on from, see `steps_ahead`."""
        return steps_ahead(self.progress, self.updates)


def prepare(config: RunConfig, *, trains: bool = True) -> Prepared:
    """Read the dataset, count, and find every problem that needs no model.

    `trains`: whether a training follows; without, an output folder that holds another run is no problem.

    Raises:
        UserError: with all problems and the ways out.
    """
    checks, notes = Checks(), tuple[str, ...]()
    if checks(lambda: _check_name(config, "optimizer_type", check_optimizer(config.optimizer.optimizer_type))):
        settled = checks(lambda: settle(config, rates_of(config)))
        config, notes = (settled.config, settled.notes) if settled is not None else (config, ())
        checks(lambda: check_arguments(config.optimizer.optimizer_type, config.optimizer.optimizer_args))
    if checks(lambda: _check_name(config, "lr_scheduler", check_schedule(config.optimizer.lr_scheduler))):
        known = check_optimizer(config.optimizer.optimizer_type) is None
        rates = acting_rates(config) if known else rates_of(config)
        checks(lambda: check_schedule_values(ScheduleOptions.of(config.optimizer, rates)))
    checks(now)
    checks(lambda: check_word(config))
    debug = config.dataset.debug_dataset
    kind = _kind_if_known(config) if debug else checks(lambda: check_model(model_request(config)))
    checks(lambda: check_network(config, kind))
    if kind is not None:
        checks(lambda: check_objective(config, kind))
    names = file_names(config, kind)
    prompts = checks(lambda: _prompts(config, kind))
    device = checks(lambda: open_device(config.training.mixed_precision))
    warn = warn_line if device is not None and device.is_main else _silent
    if trains and not debug and device is not None:
        _tidy(names, device, warn)
    resume = checks(lambda: resumed_state(config, names, warn))
    checks(lambda: wandb_run(config, _silent))
    refused = bool(config.saving.resume) and resume is None
    own_state = resume is not None and resume.resolve() in {path.resolve() for path in names.states()}
    checks(lambda: check_blocks(config, kind))
    starts = trains and not config.dataset.debug_dataset and bool(checks(lambda: refuse_own_source(config, names)))
    if starts and not refused and not own_state and not config.saving.overwrite:
        checks(lambda: refuse_existing(names))
    progress = checks(lambda: first_progress(config, resume, device)) if device is not None else None
    # A state's own holds where none is given; another one has to be accepted.
    seed = config.training.seed if config.training.seed is not None else 0 if progress is None else progress.seed
    read = checks(lambda: read_datasets(config, kind, seed))
    if read is not None:
        checks(lambda: check_caption_cache(config, read[0]))
        checks(lambda: check_captions_hold_word(config, read[1].training))
        checks(lambda: check_prior(config, read[0]))
        checks(lambda: check_validation(config, read[1].validation))
    checks.raise_any()
    assert read is not None
    assert device is not None
    assert progress is not None
    datasets, indexes = read
    updates = make_updates(config, indexes, seed, device)
    start = starting_point(config, resume, progress, facts_of(config, kind, updates), updates)
    plan = make_plan(config, kind, datasets, indexes.validation, updates, start.progress)
    _refuse_finished(start.progress, plan, config)
    return Prepared(config, kind, device, start, resume, names, updates, plan, prompts or (), notes)


def _tidy(names: FileNames, device: Device, warn: Callable[[str], None]) -> None:
    """Put right what a killed run left in the output folder; no process looks for states before."""
    if device.is_main:
        found = names.tidy()
        if found.put_back:
            warn(f"a run that was killed was about to replace {_listed(found.put_back)}: the old one is back")
        if found.removed:
            warn(f"removed what a run that was killed left unfinished: {_listed(found.removed)}")
    device.barrier()


def _listed(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))


def _kind_if_known(config: RunConfig) -> ModelKind | None:
    """The model's kind, which batches can be shown without."""
    try:
        return check_model(model_request(config))
    except ModelError:
        return None


def _prompts(config: RunConfig, kind: ModelKind | None) -> tuple[Prompt, ...]:
    """The sample prompts; pictures without a size are as large as those that the model was made for."""
    if config.sampling.sample_prompts is None:
        return ()
    cells = None if kind is None else kind.configs["unet"].get("sample_size")
    side = SD_SCRIPTS_DEFAULTS.width if kind is None or not isinstance(cells, int) else cells * kind.latent.factor
    return load_prompts(config.sampling.sample_prompts, replace(SD_SCRIPTS_DEFAULTS, width=side, height=side))


class Checks:
    """Runs one check after another and keeps what they raise, so that all problems come out together."""

    def __init__(self) -> None:
        self.errors: list[UserError] = []

    def __call__(self, check: Callable[[], T]) -> T | None:
        """What `check` returns; None if it raised."""
        try:
            return check()
        except UserError as problem:
            self.errors.append(problem)
            return None

    def raise_any(self) -> None:
        """Raise one error with everything that was found, of the first one's kind."""
        if self.errors:
            raise type(self.errors[0])(*(problem for error in self.errors for problem in error.problems))


def _silent(text: str) -> None:
    """What other ranks say."""


def _check_name(config: RunConfig, option: str, wrong: tuple[str, str] | None) -> bool:
    """True; raises what is wrong with an option of the optimizer group, at its place."""
    if wrong is None:
        return True
    origin = config.origins[option]
    where = f"--{option}" if origin == "default" else origin if origin.startswith("--") else f"{origin}: {option}"
    raise ConfigError(str(Problem(where, repr(getattr(config.optimizer, option)), *wrong)))


def refuse_existing(names: FileNames) -> None:
    """Raise if the output folder holds another run's files of these names."""
    existing = names.existing()
    if existing:
        shown = ", ".join(path.name for path in existing[:3])
        onward = "continue it with --resume latest, " if names.states() else ""
        raise ConfigError(
            f"--output_dir = {names.folder}: holds another run's files of these names ({shown}"
            f"{', ...' if len(existing) > 3 else ''}); {onward}replace it with --overwrite, or choose another "
            "--output_name"
        )


def _refuse_finished(progress: Progress, plan: Plan, config: RunConfig) -> None:
    if progress.step >= plan.total_steps:
        place = f"--resume = {config.saving.resume}" if config.saving.resume else "--initial_step"
        raise ConfigError(
            f"{place}: stands at step {progress.step} and the training ends at {plan.total_steps}; "
            "raise --max_train_steps or --max_train_epochs to go on"
        )
