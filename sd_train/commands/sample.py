"""`sd-train sample MODEL`: pictures from a model, with LoRAs, embeddings and prompts."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NoReturn, TypeVar, cast

from sd_train.config.sources import Given, canonical, read_config_file, with_suffix
from sd_train.errors import ConfigError, Problems
from sd_train.names import FileNames
from sd_train.prompts import CANONICAL_SAMPLERS, SAMPLER_NAMES, Prompt, load_prompts, parse_line, read_defaults

Value = TypeVar("Value", str, int, bool)

Precision = Literal["no", "fp16", "bf16"]
PRECISIONS = ("no", "fp16", "bf16")

MOST_PICTURES = 10_000
"""Of one prompt."""

_EPILOG = """Files are named NUMBER-SEED.png, the grid grid-NUMBER.png; nothing is ever overwritten. A1111's web UI
reads the settings of a picture that is dropped on its PNG Info tab. Paths are printed on standard output, progress on
standard error. The exit code is 0 if at least one picture was drawn.

For instance:
  sd-train sample model.safetensors --prompt "a cat --n blurry --d 1" --lora cat.safetensors:0.8 --count 4 --grid
  sd-train sample --config_file output/cat-config.toml --steps 20"""


@dataclass(frozen=True)
class ChosenLora:
    """A LoRA file and what its change of the weights is multiplied by."""

    path: Path
    multiplier: float = 1.0


@dataclass(frozen=True)
class SampleOptions:
    """What is drawn, with what."""

    model: str
    prompts: tuple[Prompt, ...]
    """Width or height 0: as the model was trained."""
    loras: tuple[ChosenLora, ...]
    embeddings: tuple[Path, ...]
    output_dir: Path
    sampler: str
    count: int
    grid: bool
    mixed_precision: Precision
    clip_skip: int | None
    v2: bool
    v_parameterization: bool | None
    sdxl: bool
    vae: str | None
    words: Mapping[Path, str] = field(default_factory=dict)
    """What prompts call an embedding beside its own names."""


@dataclass(frozen=True)
class _Run:
    """What a training's options say."""

    options: Mapping[str, Given]

    @classmethod
    def read(cls, path: Path, problems: Problems) -> _Run:
        """The options in the `--config_file` of a training."""
        return cls(canonical(read_config_file(with_suffix(str(path)), problems)))

    def value(self, name: str, kind: type[Value], problems: Problems) -> Value | None:
        """The value of option `name`; None if it is not there."""
        given = self.options.get(name)
        if given is None:
            return None
        # A bool is an int to Python, and no number to users.
        if isinstance(given.value, kind) and isinstance(given.value, bool) == (kind is bool):
            return given.value
        words = {str: "text", int: "a whole number", bool: "true or false"}
        problems.add(given.where(name), given.value, f"must be {words[kind]}", "correct it as for training")
        return None

    def text(self, name: str, problems: Problems) -> str | None:
        """The text of option `name`; None if it is empty or not there."""
        return self.value(name, str, problems) or None

    @property
    def kind(self) -> Literal["lora", "embedding", "model"]:
        """What it trains."""
        if "token_string" in self.options:
            return "embedding"
        return "lora" if "network_module" in self.options else "model"

    def words(self, paths: Sequence[Path], problems: Problems) -> dict[Path, str]:
        """The word that is taught, for those of `paths` that are named as what the training saves: pickles lack it."""
        word = self.text("token_string", problems)
        name = self.text("output_name", problems) or word
        return {path: word for path in paths if word is not None and name is not None and path.stem.startswith(name)}

    def merged(self, problems: Problems) -> tuple[ChosenLora, ...]:
        """What the training merged into its model before it began."""
        paths, strengths = self.items("base_weights"), self.items("base_weights_multiplier")
        found = []
        for number, path in enumerate(paths):
            strength = strengths[number] if number < len(strengths) else 1.0
            if not isinstance(path, str) or not Path(path).is_file() or not isinstance(strength, int | float):
                problems.add(self.options["base_weights"].where("base_weights"), str(path), "there is no such file",
                             "go into the folder that the training was started from")
            else:
                found.append(ChosenLora(Path(path), float(strength)))
        return tuple(found)

    def items(self, name: str) -> list[object]:
        """The list that option `name` holds; empty if it is not there."""
        given = self.options.get(name)
        return list(given.value) if given is not None and isinstance(given.value, list) else []

    def trained(self, problems: Problems) -> Path | None:
        """The file, or folder of a whole model, that the training saved last; its average if pictures were made so."""
        folder = self.text("output_dir", problems)
        if folder is None:
            return None
        form = self.text("save_model_as", problems)
        extensions = [f".{form or 'safetensors'}"]
        if self.kind == "model" and (form is None or form.startswith("diffusers")):
            extensions = [".safetensors", ""]
        # An embedding is called by its word.
        name = self.text("output_name", problems) or self.text("token_string", problems)
        every = [FileNames(Path(folder), name, extension) for extension in extensions]
        shown = self.value("use_ema", bool, problems) and self.value("sample_ema", bool, problems)
        paths = [names.average(names.last) for names in every] if shown else []
        paths += [names.model(names.last) for names in every]
        if (found := next((path for path in paths if path.exists()), None)) is None:
            option = "MODEL" if self.kind == "model" else f"--{self.kind}"
            way_out = f"name one with {option}, or go into the folder that the training was started from"
            problems.add("--config_file", None, f"its training has left no {paths[0]}", way_out)
        return found


class _Parser(argparse.ArgumentParser):
    """Ends in our kind of error."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; sd-train sample --help lists the options")


def main(argv: Sequence[str]) -> int:
    """Draw the pictures that `argv` asks for; 0 if there is at least one.

    Raises:
        UserError: if the options are wrong, the model cannot be loaded, or no picture could be drawn.
    """
    logging.addLevelName(logging.WARNING, "warning")
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    options = read_options(argv)
    from sd_train.commands.sample_pictures import draw_all

    draw_all(options)
    return 0


def read_options(argv: Sequence[str]) -> SampleOptions:
    """The options in `argv`, before those of a run's `--config_file`.

    Raises:
        ConfigError: with every problem.
        SystemExit: after `--help`.
    """
    given = _parser().parse_args(_signed(argv))
    problems = Problems()
    run = _Run.read(given.config_file, problems) if given.config_file is not None else _Run({})
    given_apart = {"lora": given.lora, "embedding": given.embedding, "model": given.model}[run.kind]
    trained = None if given_apart else run.trained(problems)
    model = given.model or run.text("pretrained_model_name_or_path", problems)
    if trained is not None and run.kind == "model":
        model = str(trained)
    if model is None:
        problems.add("MODEL", None, "there is none", "write it first: sd-train sample model.safetensors --prompt ...")
    of_file: list[str] = []
    prompts = _prompts(given, run, problems, of_file)
    loras = tuple(lora for text in given.lora if (lora := _lora(text, problems)))
    embeddings = tuple(given.embedding)
    if trained is not None and run.kind == "embedding":
        embeddings = (trained,)
    elif trained is not None and run.kind == "lora":
        loras = (*run.merged(problems), ChosenLora(trained))
    for path in given.embedding:
        if not path.is_file():
            problems.add("--embedding", str(path), "there is no such file", "check the path")
    sampler = given.sampler or run.text("sample_sampler", problems) or "ddim"
    if sampler.lower() not in SAMPLER_NAMES:
        problems.add("--sampler", sampler, "is no known sampler", f"use one of {', '.join(CANONICAL_SAMPLERS)}")
    if not 1 <= given.count <= MOST_PICTURES:
        problems.add("--count", given.count, f"must be 1 to {MOST_PICTURES:,}", "write e.g. --count 4")
    clip_skip = run.value("clip_skip", int, problems) if given.clip_skip is None else given.clip_skip
    if clip_skip is not None and clip_skip < 1:
        problems.add("--clip_skip", clip_skip, "must be 1 or more", "leave it out, or write e.g. --clip_skip 2")
    precision = given.mixed_precision or run.text("mixed_precision", problems) or "no"
    if precision not in PRECISIONS:
        problems.add("--mixed_precision", precision, f"must be {' or '.join(PRECISIONS)}", "correct it")
    output_dir = given.output_dir or Path(run.text("output_dir", problems) or ".") / "samples"
    check_folder(output_dir, problems)
    v_prediction = given.v_parameterization
    if v_prediction is None:
        v_prediction = run.value("v_parameterization", bool, problems)
    flags = {name: run.value(name, bool, problems) for name in ("v2", "sdxl")}
    vae, words = given.vae or run.text("vae", problems), run.words(embeddings, problems)
    if problems.found or of_file or model is None:
        raise ConfigError(*dict.fromkeys([*map(str, problems.found), *of_file]))
    return SampleOptions(
        model=model,
        prompts=prompts,
        loras=loras,
        embeddings=embeddings,
        output_dir=output_dir,
        sampler=sampler.lower(),
        count=given.count,
        grid=given.grid,
        mixed_precision=cast(Precision, precision),
        clip_skip=clip_skip,
        v2=given.v2 or bool(flags["v2"]),
        v_parameterization=v_prediction,
        sdxl=given.sdxl or bool(flags["sdxl"]),
        vae=vae,
        words=words,
    )


def check_folder(path: Path, problems: Problems) -> None:
    """Whether files can be written to `path`, which need not exist yet."""
    whole = path.absolute()
    there = next((place for place in (whole, *whole.parents) if place.exists()), whole)
    if not there.is_dir():
        problems.add("--output_dir", str(path), f"{there} is a file", "name a folder")
    elif not os.access(there, os.W_OK):
        problems.add("--output_dir", str(path), f"{there} cannot be written to", "name another folder")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "sd-train sample",
        usage="sd-train sample MODEL [--prompt TEXT ...] [--prompts FILE] [--lora FILE[:MULTIPLIER] ...] [OPTIONS]",
        description="Draw pictures from a model, with any LoRA, LyCORIS and embedding files.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    about = "a .safetensors or .ckpt file, a diffusers folder, or a hub id (owner/name)"
    add("model", metavar="MODEL", nargs="?", help=about)
    add("--config_file", metavar="FILE.toml", type=Path, help="NAME-config.toml of a finished training: its model, "
        "prompts and what it trained, and samples in its output_dir, unless given here")  # fmt: skip
    shown = parser.add_argument_group("what is shown")
    add = shown.add_argument
    add("--prompt", metavar="TEXT", nargs="+", action="extend", default=[], help="prompts; options may follow in the "
        "text: --n negative, --w, --h size, --d seed, --s steps, --l scale, --ss sampler")  # fmt: skip
    add("--prompts", "--sample_prompts", metavar="FILE", type=Path, help="file with prompts (.txt, .toml or .json), as "
        "for training")  # fmt: skip
    add("--count", metavar="N", type=int, default=1, help="pictures of each prompt, with seeds that count up from the "
        "first one (default 1)")  # fmt: skip
    add("--grid", action="store_true", help="also all pictures in one; with --count a row for each prompt")
    add("--output_dir", metavar="FOLDER", type=Path, help="default: samples")
    defaults = parser.add_argument_group("for prompts that do not say")
    add = defaults.add_argument
    add("--negative", metavar="TEXT", help="negative prompt (default: none)")
    add("--width", metavar="PIXELS", type=int, help="default: as the model was trained (512, 768 or 1024)")
    add("--height", metavar="PIXELS", type=int, help="the same")
    add("--seed", metavar="N", type=int, help="0 to 2^64 - 1; default, and -1: a random one for each prompt")
    add("--steps", metavar="N", type=int, help=f"1 to 1000 (default {Prompt.steps})")
    add("--scale", metavar="NUMBER", type=float, help=f"guidance; 1 is none (default {Prompt.scale})")
    add("--sampler", "--sample_sampler", metavar="NAME", help=f"{', '.join(CANONICAL_SAMPLERS)} (default ddim)")
    files = parser.add_argument_group("what it is drawn with")
    add = files.add_argument
    add("--lora", metavar="FILE[:MULTIPLIER]", nargs="+", action="extend", default=[], help="LoRA or LyCORIS files of "
        "kohya, diffusers, PEFT or LyCORIS (multiplier: default 1)")  # fmt: skip
    add("--embedding", metavar="FILE", nargs="+", action="extend", default=[], type=Path, help="textual inversion "
        "files (also XTI) of sd-scripts, A1111 or diffusers; prompts call each by its file's name or word")  # fmt: skip
    add("--vae", metavar="PATH", help="autoencoder in place of the model's own: a file, a folder or a whole model")
    add("--clip_skip", metavar="N", type=int, help="the text encoder's n-th layer from the end, as A1111 counts")
    add("--mixed_precision", choices=PRECISIONS, help="precision of the arithmetic (default no)")
    add("--v2", action="store_true", help="the model is a Stable Diffusion 2.x one; it is recognised without")
    add("--sdxl", action="store_true", help="the model is an SDXL one; it is recognised without")
    add("--v_parameterization", action="store_const", const=True, help="the model predicts v")
    add("--no_v_parameterization", action="store_const", const=False, dest="v_parameterization", help="it does not")
    return parser


def _signed(argv: Sequence[str]) -> list[str]:
    """`--seed -1` in one word: argparse would take the number for an option where it looks like none of its own."""
    words: list[str] = []
    for word in argv:
        if words and words[-1] in ("--seed", "--scale") and word[:1] == "-" and word[1:2].isdigit():
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def _prompts(
    given: argparse.Namespace, run: _Run, problems: Problems, found: list[str]
) -> tuple[Prompt, ...]:
    """The prompts on the command line and in the file; what is wrong goes to `problems`, of the file to `found`."""
    flags = {"negative": "negative_prompt", "width": "width", "height": "height", "seed": "seed"}
    flags |= {"steps": "sample_steps", "scale": "scale"}
    values = {key: getattr(given, flag) for flag, key in flags.items() if getattr(given, flag) is not None}
    names = {key: f"--{flag}" for flag, key in flags.items()}
    defaults = read_defaults(values, lambda key: names[key], problems)
    # Not known before the model is: 0.
    width, height = (getattr(defaults, side) if side in values else 0 for side in ("width", "height"))
    defaults = replace(defaults, width=width, height=height)
    prompts = [parse_line(text, "--prompt", problems, None, defaults) for text in given.prompt]
    trained = None if given.prompt else run.text("sample_prompts", problems)
    path = given.prompts or (Path(trained) if trained is not None else None)
    if path is not None:
        try:
            prompts += load_prompts(path, defaults)
        except ConfigError as error:
            found += error.problems
    elif not given.prompt:
        problems.add("--prompt", None, "there is no prompt", 'write --prompt "a cat", or --prompts FILE')
    return tuple(prompt for prompt in prompts if prompt is not None)


def _lora(text: str, problems: Problems) -> ChosenLora | None:
    """`FILE` or `FILE:MULTIPLIER`."""
    path, colon, number = text.rpartition(":")
    found = ChosenLora(Path(text))
    if colon and path and not found.path.is_file():
        # It is no number behind a drive letter; then there is no such file either.
        with suppress(ValueError):
            found = ChosenLora(Path(path), float(number))
    if not found.path.is_file():
        problems.add("--lora", str(found.path), "there is no such file", "check the path")
        return None
    if not -100 <= found.multiplier <= 100:
        problems.add("--lora", text, "the multiplier is not between -100 and 100", "1 is the LoRA as it was trained")
        return None
    return found
