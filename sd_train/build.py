"""Configuration -> objects -> `loop.train`; the only file that knows everything."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sd_train.build_caches import fill_caches
from sd_train.build_compile import compile_network, prepare_compiler
from sd_train.build_network import merge_base
from sd_train.build_objective import denoise_settings
from sd_train.build_outputs import make_norms, make_report, make_uploader, open_hub
from sd_train.build_preflight import preflight
from sd_train.build_safety import make_safety, make_watch
from sd_train.build_trainable import export_of, make_trainable
from sd_train.build_validation import make_validation
from sd_train.checkpoint import Checkpoint
from sd_train.config.changes import changed_options
from sd_train.config.dump import dump_toml, repeatable
from sd_train.config.options import RunConfig
from sd_train.contact_sheet import show_dataset
from sd_train.control import Control, forget_orders
from sd_train.device import Updater, out_of_memory
from sd_train.errors import DataError, ImageError, RunError, UserError
from sd_train.families.base import Family
from sd_train.families.registry import load_family
from sd_train.files import probe_folder, write_text
from sd_train.guard import Guard
from sd_train.loop import Training, train
from sd_train.metadata import RunFacts, build_metadata, describe_base
from sd_train.objectives.denoise import Denoise
from sd_train.optim.ema import Ema
from sd_train.optim.inference import InferenceWeights
from sd_train.optim.optimizers import find_optimizer, make_optimizer
from sd_train.optim.schedules import ScheduleOptions, make_schedule
from sd_train.plan import Prepared, prepare
from sd_train.plan_data import draw_function, draw_settings, model_request, text_options, written_folders
from sd_train.plan_network import told_numbers
from sd_train.plan_optimizer import eight_bit_state
from sd_train.plan_outputs import save_rules
from sd_train.plan_report import describe, disk_warnings, sizes
from sd_train.plan_warnings import plan_warnings
from sd_train.preview import Preview
from sd_train.report import Report, say_line, warn_line
from sd_train.splitting import Splitting
from sd_train.state import Extra, StateParts, load_state
from sd_train.trainables.average import AverageWeights
from sd_train.trainables.base import ParamGroup, Trainable
from sd_train.uploads import Uploader
from sd_train.watch import LAG


def quiet_libraries() -> None:
    """Keep the libraries' own chatter off the console; what matters we say ourselves."""
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.disable_progress_bar()


def run(config: RunConfig, until: int | None = None) -> int:
    """Train as `config` says; the process's exit code.

    `until`: the update after which it stops, as if it had been asked to.

    Raises:
        UserError: with the way out.
    """
    prepared = prepare(config)
    say, warn = (say_line, warn_line) if prepared.device.is_main else (_silent, _silent)
    for warning in (*plan_warnings(prepared), *disk_warnings(prepared)):
        warn(warning)
    drawn = "" if config.training.seed is not None or prepared.resume else " (drawn; give --seed to choose it)"
    say(f"seed: {prepared.progress.seed}{drawn}")
    say(describe(prepared.plan, prepared.config))
    if config.dataset.debug_dataset:
        if prepared.device.is_main:
            show_dataset(prepared, say)
        return 0
    quiet_libraries()
    if config.training.torch_compile:
        prepare_compiler(prepared)
    _probe_folders(prepared)
    try:
        return _train(prepared, say, warn, until)
    except ImageError as problem:
        raise ImageError(
            f"{problem}. All such files are found by `sd-train doctor` or --verify_images; --skip_broken_images leaves "
            "them out"
        ) from None
    except (RuntimeError, MemoryError) as problem:
        if not out_of_memory(problem):
            raise
        reason = str(problem).splitlines()[0]
        raise RunError(
            f"out of memory on {prepared.device.device}: {reason}; use --gradient_checkpointing, --cache_latents, "
            "a smaller --train_batch_size with --gradient_accumulation_steps, or --mixed_precision bf16"
        ) from None


def _probe_folders(prepared: Prepared) -> None:
    """Raise before the model is loaded if a folder or the hub cannot be written to, in all processes."""
    refused: UserError | None = None
    if prepared.device.is_main:
        try:
            for folder, option in written_folders(prepared.config).items():
                probe_folder(folder, option)
            forget_orders(_control_file(prepared), warn_line)
            open_hub(prepared.config, warn_line)
        except UserError as problem:
            refused = problem
    # All must also have looked at the output folder before the first one writes there.
    if prepared.device.any(refused is not None):
        raise refused or RunError("the first process cannot write its files; mend what it says")


def _silent(text: str) -> None:
    """What other ranks say."""


def _load_family(prepared: Prepared, trainable: Trainable) -> tuple[Family, str]:
    """The base model on its device, and the digest of its weights."""
    config, device = prepared.config, prepared.device
    # As it is stored, which takes the least memory; the digest is the same in every precision that holds it.
    family = load_family(model_request(config), None)
    family.configure(text_options(config))
    if config.noise.zero_terminal_snr:
        family.end_in_noise()
    merge_base(prepared, family)
    digest = family.digest()
    family.to(device.device, device.weight_dtype, trainable.masters)
    if config.training.xformers:
        _use_xformers(prepared, family)
    return family, digest


def _use_xformers(prepared: Prepared, family: Family) -> None:
    """xformers' attention in the U-Net; without it, or on other devices, PyTorch's stays."""
    unet: Any = family.networks["unet"]
    compiled = prepared.config.training.torch_compile
    if prepared.device.device.type == "cuda" and importlib.util.find_spec("xformers") is not None and not compiled:
        unet.enable_xformers_memory_efficient_attention()
    elif prepared.device.is_main:
        reason = "it works on NVIDIA GPUs only" if prepared.device.device.type != "cuda" else "it is not installed"
        reason = "--torch_compile compiles PyTorch's" if compiled else f"{reason} (pip install xformers)"
        warn_line(f"--xformers has no effect: {reason}; PyTorch's attention is used")


def _install(prepared: Prepared, family: Family, trainable: Trainable) -> None:
    """Put what learns into the model, from where it starts."""
    trainable.install(family)
    if prepared.config.training.gradient_checkpointing:
        family.checkpoint_gradients("unet")
        for role in family.networks:
            if role != "unet" and trainable.trains(role):
                family.checkpoint_gradients(role)
    if prepared.config.training.torch_compile:
        compile_network(prepared, family)


def _train(
    prepared: Prepared, say: Callable[[str], None], warn: Callable[[str], None], until: int | None
) -> int:
    config, device, progress, plan = prepared.config, prepared.device, prepared.progress, prepared.plan
    schedule = make_schedule(ScheduleOptions.of(config.optimizer, plan.rates), plan.total_steps)
    trainable = make_trainable(prepared)
    family, digest = _load_family(prepared, trainable)
    _install(prepared, family, trainable)
    groups = _groups(prepared, trainable)
    # torch refuses an optimizer without parameters, which a control run with rate 0 has.
    empty = [{"params": [torch.nn.Parameter(torch.zeros(0))], "lr": 0.0}]
    optimizer = make_optimizer(
        config.optimizer.optimizer_type,
        [_for_optimizer(group) for group in groups] or empty,
        config.optimizer.optimizer_args,
    )
    params = [list(group.params.values()) for group in groups]
    updater = Updater(device, optimizer, params, config.optimizer.max_grad_norm)
    predicts = {"epsilon": "the noise", "v_prediction": "v", "sample": "the picture"}[family.prediction]
    say(
        f"model: {config.model.pretrained_model_name_or_path} ({family.base_version}, predicts {predicts}); "
        f"{trainable.describe()}"
    )
    sizes = [parameter.numel() for group in params for parameter in group]
    if (state := eight_bit_state(config, sizes)) is not None:
        say(state)
    assert family.latent is not None
    prepared.updates.draw = draw_function(draw_settings(config, progress.seed), family.latent)
    text = dump_toml(repeatable(config, progress.seed))
    report = make_report(prepared, text)
    uploader = make_uploader(prepared, report.message)
    extras: dict[str, Extra] = {"report": (report.state, report.load), "updater": (updater.state, updater.load)}
    if updater.scaler is not None:
        extras["scaler"] = (updater.scaler.state, updater.scaler.load)
    ema = _make_ema(prepared, trainable)
    if ema is not None:
        extras["ema"] = (ema.state, ema.load_state)
    objective = Denoise(family, trainable, device, denoise_settings(config))
    if objective.importance is not None:
        extras["importance"] = (objective.importance.state, objective.importance.load)
    watch = make_watch(prepared, sum(sizes), say)
    report.held_back = 0 if watch.at_once else LAG
    if watch.spike_factor is not None:
        extras["watch"] = (watch.state, watch.load)
    parts = StateParts(trainable, groups, optimizer, extras, text, digest, ema)
    if prepared.resume is not None:
        _resume(prepared, prepared.resume, parts, say, warn)
    elif progress.step:
        say(f"begins after step {progress.step} of {plan.total_steps}, in epoch {progress.epoch + 1}")
    fill_caches(prepared, family)
    checkpoint = _make_checkpoint(prepared, family, parts, report, uploader)
    validation = make_validation(prepared, family, objective, parts, report, checkpoint)
    preview = _make_preview(prepared, family, parts, report) if prepared.prompts else None
    if device.is_main:
        if config.saving.overwrite and prepared.resume is None:
            prepared.names.remove_existing()
        write_text(prepared.names.config, parts.config_text)
    control = _make_control(prepared, report)
    agree = device.any if device.world > 1 else None
    with uploader or nullcontext(), report, Guard(agree) as guard, checkpoint:
        checkpoint.stopping = lambda: guard.stop_requested
        training = Training(
            progress, plan.total_steps, prepared.updates, objective, trainable, groups, schedule, updater, parts.ema,
            report, preview, checkpoint, guard, make_safety(prepared, watch, parts, updater, report.message),
            Splitting(report.message if device.is_main else warn_line), make_norms(config, groups, report), validation,
            control, until=until,
        )  # fmt: skip
        if config.safety.preflight:
            with report.untimed():
                preflight(prepared, training, say, warn)
        _train_on(training)
    device.close()
    return 0


def _resume(
    prepared: Prepared, path: Path, parts: StateParts, say: Callable[[str], None], warn: Callable[[str], None]
) -> None:
    """Put the state at `path` back, and say what is different now."""
    progress, accepted = prepared.progress, prepared.config.saving.resume_anyway
    if not prepared.start.goes_on:
        # The running mean of the losses is of another place in the epoch.
        parts = replace(parts, extras={name: extra for name, extra in parts.extras.items() if name != "report"})
    resumed = load_state(path, parts, accepted)
    say(f"resumed {resumed.path} at step {progress.step} of {prepared.plan.total_steps}")
    for change in changed_options(resumed.config_text, parts.config_text):
        warn(f"changed since the state was saved: {change}")
    if parts.ema is not None and not resumed.average:
        warn("the state holds no moving average: it begins with the weights as they stand")


def _train_on(training: Training) -> None:
    """Train; what ends it between two updates leaves a state behind."""
    try:
        train(training)
    except (DataError, RuntimeError, MemoryError) as problem:
        if isinstance(problem, DataError) or out_of_memory(problem):
            training.updater.drop()
            training.safety.keep(training.progress, training.whole, training.checkpoint.interrupted)
        raise


def _groups(prepared: Prepared, trainable: Trainable) -> list[ParamGroup]:
    """What learns; where the optimizer takes one rate for all, with the plan's."""
    groups, rates = trainable.groups(), prepared.plan.rates
    if not rates or not find_optimizer(prepared.config.optimizer.optimizer_type).one_rate:
        return groups
    return [replace(group, lr=next(iter(rates.values()))) for group in groups]


def _for_optimizer(group: ParamGroup) -> dict[str, Any]:
    """`group` as torch's optimizers take it."""
    decay = {} if group.weight_decay is None else {"weight_decay": group.weight_decay}
    return {"params": list(group.params.values()), "lr": group.lr, **decay}


def _make_checkpoint(
    prepared: Prepared, family: Family, parts: StateParts, report: Report, uploader: Uploader | None
) -> Checkpoint:
    config, is_main = prepared.config, prepared.device.is_main
    model = config.model
    vae = None if model.vae is None else Path(model.vae)
    base = describe_base(Path(model.pretrained_model_name_or_path), vae) if is_main else {}
    facts = _facts(prepared, family, parts.optimizer)
    intervals, retention = save_rules(config.saving, prepared.plan.epochs)
    return Checkpoint(
        prepared.names,
        intervals,
        parts,
        lambda progress: build_metadata(config, facts, base, progress),
        report,
        prepared.plan.epochs,
        is_main,
        export_of(prepared, family),
        None if uploader is None else uploader.saved,
        retention,
        share=prepared.device.shared if prepared.device.world > 1 else None,
        on_disk_full=config.saving.on_disk_full,
        async_save=config.saving.async_save,
        model_bytes=sizes(prepared)[1] or 0,
    )


def _control_file(prepared: Prepared) -> Path:
    return Path(prepared.config.saving.output_dir) / "control"


def _make_control(prepared: Prepared, report: Report) -> Control:
    device = prepared.device
    share = device.shared if device.world > 1 else None
    return Control(_control_file(prepared), report.message, device.is_main, share)


def _make_ema(prepared: Prepared, trainable: Trainable) -> Ema | None:
    chosen = prepared.config.ema
    if not chosen.use_ema:
        return None
    return Ema(trainable.tensors, chosen.ema_decay, torch.device("cpu") if chosen.ema_device == "cpu" else None)


def _make_preview(prepared: Prepared, family: Family, parts: StateParts, report: Report) -> Preview:
    config, device = prepared.config, prepared.device
    return Preview(
        family=family,
        prompts=prepared.prompts,
        sampler=config.sampling.sample_sampler,
        output_dir=config.saving.output_dir,
        output_name=prepared.names.name,
        every_n_steps=config.sampling.sample_every_n_steps,
        every_n_epochs=config.sampling.sample_every_n_epochs,
        at_first=config.sampling.sample_at_first,
        weights=AverageWeights(parts.trainable, parts.ema)
        if parts.ema is not None and config.ema.sample_ema
        else InferenceWeights(parts.trainable, parts.optimizer),
        report=report,
        seed=prepared.progress.seed,
        is_main=device.is_main,
        start_step=prepared.progress.step,
        autocast=device.autocast,
    )


def _facts(prepared: Prepared, family: Family, optimizer: torch.optim.Optimizer) -> RunFacts:
    config, plan = prepared.config, prepared.plan
    kind = type(optimizer)
    given = ",".join(f"{key}={value}" for key, value in config.optimizer.optimizer_args.items())
    rank, alpha = told_numbers(config, prepared.kind)
    return RunFacts(
        datasets=plan.datasets,
        indexes=plan.indexes,
        num_validation_images=sum(len(index) for index in plan.validation),
        world=prepared.device.world,
        batches_per_epoch=plan.batches_per_epoch,
        epochs=plan.epochs,
        total_steps=plan.total_steps,
        network_dim=rank,
        network_alpha=alpha,
        optimizer=f"{kind.__module__}.{kind.__name__}" + (f"({given})" if given else ""),
        base_version=family.base_version,
        architecture=family.architecture,
        prediction=family.prediction,
        zero_terminal_snr=family.zero_terminal_snr,
        folder=not prepared.names.extension,
    )
