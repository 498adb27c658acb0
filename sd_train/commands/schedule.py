"""`sd-train schedule plot ...`: the learning rates of a training as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sd_train.commands.plan import TRAINING_COMMANDS
from sd_train.errors import ConfigError, Problems, UserError

if TYPE_CHECKING:
    from sd_train.config.options import RunConfig

USAGE = """usage: sd-train schedule plot [COMMAND] --output FILE.png [OPTIONS OF THE COMMAND]

Draw the learning rate of every network over the updates of `sd-train COMMAND OPTIONS`. Model and dataset are needed
only where --max_train_epochs gives the length; without them --max_train_steps does.

  COMMAND   train_network (when none is named), sdxl_train_network
  --output  the picture to write, a PNG

For instance: sd-train schedule plot --config_file run.toml --output rates.png
              sd-train schedule plot --output rates.png --lr_scheduler cosine --lr_warmup_steps 10%"""

_MOST_POINTS = 20_000
"""Of one curve: more than the picture has columns, so that nothing is lost between them."""


def main(argv: Sequence[str]) -> int:
    """Write the picture that `argv` asks for and return 0.

    Raises:
        UserError: what the training itself would say of these options.
    """
    words = list(argv)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    if words[0] != "plot":
        raise ConfigError(f"schedule: {words[0]!r} is nothing it does; write sd-train schedule plot --output FILE.png")
    command = words.pop(1) if len(words) > 1 and not words[1].startswith("-") else "train_network"
    if command not in TRAINING_COMMANDS:
        raise ConfigError(f"schedule: {command!r} is no training command; use one of {', '.join(TRAINING_COMMANDS)}")
    if words[1:] in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    output, words = take_output(words[1:])
    _plot(command, words, output)
    return 0


def take_output(words: Sequence[str]) -> tuple[Path, list[str]]:
    """The path behind `--output`, and the other words.

    Raises:
        ConfigError: if there is none, or it is no PNG.
    """
    rest = list(words)
    place = next((number for number, word in enumerate(rest) if word.split("=")[0] == "--output"), None)
    if place is None:
        raise ConfigError("--output: is required; give the picture to write: --output rates.png")
    word = rest.pop(place)
    value = word.partition("=")[2] if "=" in word else rest.pop(place) if place < len(rest) else ""
    if not value.lower().endswith(".png") or "\0" in value:
        raise ConfigError(f"--output = {value!r}: must be a file that ends in .png; write --output rates.png")
    if Path(value).is_dir():
        raise ConfigError(f"--output = {value!r}: is a folder; name a file in it")
    return Path(value), rest


def _plot(command: str, words: Sequence[str], output: Path) -> None:
    missing = _stand_ins(command, words)
    config = _read_options(command, words, missing)
    # Only here: the drawing and the models take long to import, and wrong options must not wait for them.
    from sd_train.commands.schedule_plot import Plot, draw_plot
    from sd_train.files import write_whole
    from sd_train.optim.optimizers import chooses_rate, find_optimizer
    from sd_train.optim.schedules import ScheduleOptions, make_schedule
    from sd_train.report import say_line, warn_line

    config, total, rates, notes = _counted(config, missing)
    for note in notes:
        warn_line(note)
    if chooses_rate(find_optimizer(config.optimizer.optimizer_type), config.optimizer.optimizer_args):
        warn_line(f"{config.optimizer.optimizer_type} finds its rates itself while it trains; they are not known here")
    if not rates:
        raise ConfigError("--learning_rate = 0: there is no learning rate above 0 to draw; give one")
    schedule = make_schedule(ScheduleOptions.of(config.optimizer, rates), total)
    steps = sorted({*range(0, total, max(1, total // _MOST_POINTS)), total - 1})
    factors = [schedule.factor(step) for step in steps]
    plot = Plot(
        title=f"{schedule.name}, {total} updates",
        subtitle=_options_in_words(config),
        updates=tuple(step + 1 for step in steps),
        curves={name: tuple(rate * factor for factor in factors) for name, rate in _merged(rates).items()},
        warmup=schedule.warmup_steps,
        decay=schedule.decay_steps,
        total=total,
    )
    write_whole(output, partial(draw_plot(plot).save, format="PNG"), "--output")
    for name, curve in plot.curves.items():
        say_line(f"{name}: highest {max(curve):.6g}, at the last update {curve[-1]:.6g}")
    say_line(f"{plot.title}: {output}")


def _stand_ins(command: str, words: Sequence[str]) -> list[str]:
    """Options that a training cannot do without and a picture of its rates can, where they are not given."""
    from sd_train.config.sources import read_command_line, read_config_file, with_suffix

    # What is wrong with them is said when they are read for good.
    problems = Problems()
    values = dict(read_command_line(words, problems).values)
    file = values.get("config_file")
    if file is not None and str(file.value).lower().endswith(".toml"):
        values |= read_config_file(with_suffix(file.value), problems)
    given = {name for name, value in values.items() if value.value != ""}
    added: list[str] = []
    if "output_dir" not in given:
        added += ["--output_dir", "."]
    if "pretrained_model_name_or_path" not in given:
        added += ["--pretrained_model_name_or_path", "no/model"]
    if given.isdisjoint(("dataset_config", "train_data_dir", "in_json")):
        added += ["--train_data_dir", "."]
    if TRAINING_COMMANDS[command][0] == "train_textual_inversion" and "token_string" not in given:
        added += ["--token_string", "no-word"]
    return added


def _read_options(command: str, words: Sequence[str], missing: Sequence[str]) -> RunConfig:
    from sd_train.entry import load_config

    trained, *added = TRAINING_COMMANDS[command]
    try:
        return load_config(trained, [*added, *words, *missing])
    except ConfigError as error:
        # Of stand-ins nobody wants to hear.
        own = tuple(f"{flag}:" for flag in missing) + tuple(f"{flag} =" for flag in missing)
        problems = [problem for problem in error.problems if not problem.startswith(own)]
        raise ConfigError(*(problems or error.problems)) from None


def _counted(config: RunConfig, missing: Sequence[str]) -> tuple[RunConfig, int, Mapping[str, float], Sequence[str]]:
    """The options as they act, the updates of the training, the rates above 0 by network role, and words about them."""
    from sd_train.families.registry import check_model
    from sd_train.optim.settle import settle
    from sd_train.plan import acting_rates, prepare, rates_of
    from sd_train.plan_data import model_request

    if config.training.max_train_epochs is not None:
        needed = ("--pretrained_model_name_or_path", "--train_data_dir", "--token_string")
        if absent := [flag for flag in needed if flag in missing]:
            shown = ", ".join(absent).replace("--train_data_dir", "--dataset_config")
            raise ConfigError(
                f"--max_train_epochs = {config.training.max_train_epochs}: how many updates that is depends on the "
                f"dataset and the model; give them too ({shown}), or --max_train_steps in its place"
            )
        prepared = prepare(config, trains=False)
        return prepared.config, prepared.plan.total_steps, prepared.plan.rates, prepared.notes
    roles = {"unet", "text_encoder", *(["text_encoder_2"] if config.model.sdxl else [])}
    with suppress(UserError):
        roles = set(check_model(model_request(config)).configs)
    settled = settle(config, {role: rate for role, rate in rates_of(config).items() if role in roles})
    return settled.config, config.training.max_train_steps, acting_rates(settled.config, roles), settled.notes


def _merged(rates: Mapping[str, float]) -> dict[str, float]:
    """Networks of the same rate share a curve."""
    names: dict[float, list[str]] = {}
    for role, rate in rates.items():
        names.setdefault(rate, []).append(role)
    return {", ".join(roles): rate for rate, roles in names.items()}


def _options_in_words(config: RunConfig) -> str:
    """What was given of the schedule, as in a file."""
    from sd_train.config.catalogue import options

    shown = []
    for name in type(config.optimizer).model_fields:
        value = getattr(config.optimizer, name)
        if name.startswith("lr_") and name not in ("lr_scheduler", "lr_scheduler_type"):
            if name == "lr_scheduler_args":
                shown += [f"{key}={argument}" for key, argument in value.items()]
            elif value != options()[name].default:
                shown.append(f"{name} = {value:g}")
    return ", ".join(shown)
