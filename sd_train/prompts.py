"""Prompts for sample pictures: `.txt`, `.toml` and `.json` files as sd-scripts reads them, checked before training.

What is done better than in `library.train_util.line_to_prompt_dict` and `load_prompts`: the prompt itself is never read
as options, a value that cannot be read and an unknown option are errors, and a subset's key goes before the shared one.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from sd_train.config.textfile import read_json, read_text, read_toml
from sd_train.errors import ConfigError, Problem, Problems

logger = logging.getLogger(__name__)

SAMPLER_ALIASES = {
    "k_lms": "lms",
    "k_euler": "euler",
    "k_euler_a": "euler_a",
    "k_dpm_2": "dpm_2",
    "k_dpm_2_a": "dpm_2_a",
}
"""sd-scripts' second names of `--sample_sampler`."""

CANONICAL_SAMPLERS = (
    "ddim",
    "pndm",
    "lms",
    "euler",
    "euler_a",
    "heun",
    "dpm_2",
    "dpm_2_a",
    "dpmsolver",
    "dpmsolver++",
    "dpmsingle",
)
SAMPLER_NAMES = (*CANONICAL_SAMPLERS, *SAMPLER_ALIASES)
"""Every name that `--sample_sampler` and `--ss` take."""

MINIMUM_SIZE = 64
SIZE_STEP = 8
MAXIMUM_SIZE = 16384
MAXIMUM_STEPS = 1000
MAXIMUM_SEED = 2**64 - 1

_FLAGS = {
    "n": "negative_prompt",
    "w": "width",
    "h": "height",
    "d": "seed",
    "s": "sample_steps",
    "l": "scale",
    "ss": "sample_sampler",
    "g": "guidance_scale",
    "cn": "controlnet_image",
    "ctr": "cfg_trunc_ratio",
    "rcfg": "renorm_cfg",
    "fs": "flow_shift",
}
_WITHOUT_EFFECT = frozenset({"guidance_scale", "cfg_trunc_ratio", "renorm_cfg", "flow_shift"})
"""Options of other model families, which sd-scripts accepts and ignores for Stable Diffusion."""
_KNOWN_FLAGS = "--n (negative prompt), --w, --h (size), --d (seed), --s (steps), --l (guidance scale), --ss (sampler)"
_KEYS = ("prompt", *_FLAGS.values())

_INTEGER = re.compile(r"[+-]?\d{1,30}")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)")


@dataclass(frozen=True)
class Prompt:
    """One sample picture."""

    text: str
    negative: str = ""
    width: int = 512
    """Pixels, a multiple of 8 from 64 to 16384; so is `height`."""
    height: int = 512
    seed: int | None = None
    """None: drawn from the run's seed, the step and the prompt's number."""
    steps: int = 30
    """1 to 1000."""
    scale: float = 7.5
    """Classifier-free guidance; 1 or less: none."""
    sampler: str | None = None
    """One of `SAMPLER_NAMES`; None: the run's."""
    line: int | None = None
    """Where the prompt stands in its file, from 1; None in JSON."""


SD_SCRIPTS_DEFAULTS = Prompt("")
"""What a picture is where its prompt does not say."""


def load_prompts(path: Path, defaults: Prompt = SD_SCRIPTS_DEFAULTS) -> tuple[Prompt, ...]:
    """The prompts of `path`, in order; `defaults` hold where a prompt says nothing.

    `.txt`: one for each line, options behind it (`a cat --n blurry --w 512 --s 20`); blank lines and lines with `#` in
    the first column are left out. `.toml`: `[prompt]` with shared keys and `[[prompt.subset]]`. `.json`: a list of
    objects or lines.

    Raises:
        ConfigError: with every problem of the file.
    """
    problems = Problems()
    kind = path.suffix.lower()
    if kind == ".txt":
        prompts = _from_text(path, problems, defaults)
    elif kind == ".toml":
        prompts = _from_toml(path, problems, defaults)
    elif kind == ".json":
        prompts = _from_json(path, problems, defaults)
    else:
        way_out = "save the prompts as .txt (one for each line), .toml or .json"
        raise ConfigError(f"{path}: a prompt file ends in .txt, .toml or .json, not {kind or 'nothing'}; {way_out}")
    if not prompts and not problems.found:
        problems.add(str(path), None, "holds no prompt", "write one for each line, or leave --sample_prompts out")
    problems.raise_if_any(ConfigError)
    return tuple(prompt for prompt in prompts if prompt is not None)


def parse_line(
    line: str, where: str, problems: Problems, number: int | None = None, defaults: Prompt = SD_SCRIPTS_DEFAULTS
) -> Prompt | None:
    """One line of a prompt file; None if something is wrong with it, which is then in `problems` at `where`.

    The line is split at " --"; of a repeated option the last counts, as in sd-scripts.
    """
    text, *pieces = line.strip().split(" --")
    values: dict[str, Any] = {"prompt": text}
    found: list[Problem] = []
    if text.startswith("--"):
        logger.warning("%s: begins with an option, so that all of %r is the prompt; put the text first", where, text)
    for piece in pieces:
        # A space behind the dashes, "a cat -- on a mat", gives the empty name.
        name, value = ("", piece) if piece[:1].isspace() else _halves(piece)
        key = _FLAGS.get(name.lower())
        if key is None:
            rule = "is no known option, and text after ' --' is read as one"
            way_out = f"use {_KNOWN_FLAGS}, or write the prompt without ' --'"
            found.append(Problem(where, None, f"`--{piece.rstrip()}` {rule}", way_out))
            continue
        place = f"{where}: --{name}"
        try:
            values[key] = _from_written(key, value)
        except ValueError as problem:
            found.append(Problem(place, repr(value) if value else None, str(problem), _example(key, name)))
        else:
            found.extend(_check(key, values[key], place))
    problems.extend(found)
    return None if found else _prompt(values, number, defaults)


def read_defaults(values: Mapping[str, Any], where: Callable[[str], str], problems: Problems) -> Prompt:
    """What holds where a prompt says nothing: `values`, keyed as in TOML, before sd-scripts' defaults.

    `where` names the place of a key for the problems.
    """
    found = _check_table(values, where)
    problems.extend(found)
    return SD_SCRIPTS_DEFAULTS if found else _prompt({"prompt": "", **values}, None, SD_SCRIPTS_DEFAULTS)


def _halves(piece: str) -> tuple[str, str]:
    name, *rest = piece.split(maxsplit=1)
    return name, rest[0].strip() if rest else ""


def _example(key: str, name: str) -> str:
    values = {"seed": "42", "sample_steps": "30", "scale": "7.5", "sample_sampler": "euler_a"}
    return f"write e.g. --{name} {values.get(key, '512')}; the prompt's text goes before the first option"


def _from_written(key: str, value: str) -> str | int | float:
    """The typed value of option `key`.

    Raises:
        ValueError: with the rule, if `value` is none.
    """
    if key in ("width", "height", "seed", "sample_steps"):
        if not _INTEGER.fullmatch(value):
            raise ValueError("must be a whole number")
        return int(value)
    if key == "scale":
        if not _NUMBER.fullmatch(value):
            raise ValueError("must be a number such as 7 or 7.5")
        return float(value)
    if key == "sample_sampler" and not value:
        raise ValueError("needs the name of a sampler")
    return value


def _check(key: str, value: Any, where: str) -> list[Problem]:
    """What is wrong with a typed value, whichever file it comes from."""
    if key in _WITHOUT_EFFECT:
        logger.warning("%s: has no effect on Stable Diffusion models, as in sd-scripts", where)
        return []
    found = Problems()
    if key == "controlnet_image":
        found.add(where, value, "control images are not supported for this model", "leave the option out")
    elif key in ("prompt", "negative_prompt", "sample_sampler"):
        if not isinstance(value, str):
            found.add(where, value, "must be text", "put it in quotes")
        elif key == "sample_sampler" and value.lower() not in SAMPLER_NAMES:
            found.add(where, value, "is no known sampler", f"use one of {', '.join(SAMPLER_NAMES)}")
    elif key == "scale":
        if isinstance(value, bool) or not isinstance(value, int | float):
            found.add(where, value, "must be a number", "write e.g. 7.5")
        elif not math.isfinite(value) or value < 0:
            found.add(where, value, "must be 0 or more", "7.5 is usual; 1 turns guidance off")
    elif isinstance(value, bool) or not isinstance(value, int):
        found.add(where, value, "must be a whole number", "write it without quotes and decimals")
    elif key == "seed":
        if not -1 <= value <= MAXIMUM_SEED:
            found.add(where, value, "a seed is 0 to 2^64 - 1", "choose another; -1 or no seed draws one")
    elif key in ("width", "height") and value > MAXIMUM_SIZE:
        found.add(where, value, f"must be at most {MAXIMUM_SIZE} pixels", "write e.g. 512 or 1024")
    elif value < 0:
        found.add(where, value, "must not be negative", "write e.g. 30 steps, 512 pixels")
    return found.found


def _prompt(values: Mapping[str, Any], line: int | None, defaults: Prompt) -> Prompt:
    """Checked values, keyed as in TOML and JSON, with sd-scripts' rounding and bounds."""
    seed = values.get("seed", defaults.seed)
    sampler = values.get("sample_sampler", defaults.sampler)
    return replace(
        defaults,
        text=values["prompt"].strip(),
        negative=values.get("negative_prompt", defaults.negative).strip(),
        width=_size(values["width"]) if "width" in values else defaults.width,
        height=_size(values["height"]) if "height" in values else defaults.height,
        seed=None if seed == -1 else seed,
        steps=min(max(values.get("sample_steps", defaults.steps), 1), MAXIMUM_STEPS),
        scale=float(values.get("scale", defaults.scale)),
        sampler=None if sampler is None else sampler.lower(),
        line=line,
    )


def _size(pixels: int) -> int:
    return max(MINIMUM_SIZE, pixels - pixels % SIZE_STEP)


def _from_text(path: Path, problems: Problems, defaults: Prompt) -> list[Prompt | None]:
    return [
        parse_line(line, f"{path}:{number}", problems, number, defaults)
        for number, line in enumerate(read_text(path).split("\n"), start=1)
        if line.strip() and not line.startswith("#")
    ]


def _check_table(values: Mapping[str, Any], where: Callable[[str], str]) -> list[Problem]:
    """What is wrong with the keys and values of a TOML table or a JSON object."""
    found: list[Problem] = []
    for key, value in values.items():
        if key in _KEYS:
            found.extend(_check(key, value, where(key)))
        else:
            found.append(Problem(where(key), repr(value), "unknown key", f"known are {', '.join(_KEYS)}"))
    return found


def _no_prompt(where: str) -> Problem:
    return Problem(where, None, "has no `prompt`", "add the text of the picture under that key")


def _from_toml(path: Path, problems: Problems, defaults: Prompt) -> list[Prompt | None]:
    file = read_toml(path)
    for key in file.data.keys() - {"prompt"}:
        problems.add(file.where(key), None, "unknown", "put shared keys under [prompt], prompts in [[prompt.subset]]")
    shared = file.data.get("prompt")
    subsets = shared.get("subset") if isinstance(shared, dict) else None
    if not isinstance(shared, dict) or not isinstance(subsets, list) or not all(isinstance(s, dict) for s in subsets):
        way_out = "write [prompt] with the shared keys, then [[prompt.subset]] for each picture"
        problems.add(file.where("prompt") if shared else str(path), None, "has no [[prompt.subset]]", way_out)
        return []
    common = {key: value for key, value in shared.items() if key != "subset"}
    wrong = _check_table(common, partial(file.where, "prompt"))
    problems.extend(wrong)
    prompts: list[Prompt | None] = []
    for number, subset in enumerate(subsets):
        table = ("prompt", "subset", number)
        found = _check_table(subset, partial(file.where, *table))
        if "prompt" not in common and "prompt" not in subset:
            found.append(_no_prompt(file.where(*table)))
        problems.extend(found)
        values = {**common, **subset}
        prompts.append(None if wrong or found else _prompt(values, file.line(*table), defaults))
    return prompts


def _from_json(path: Path, problems: Problems, defaults: Prompt) -> list[Prompt | None]:
    items = read_json(path, "write a list of objects or lines")
    if not isinstance(items, list):
        problems.add(str(path), None, "must hold a list", 'write [{"prompt": "a cat"}, "a dog --w 512"]')
        return []
    prompts: list[Prompt | None] = []
    for number, item in enumerate(items):
        place = f"{path}: [{number}]"
        if isinstance(item, str):
            prompts.append(parse_line(item, place, problems, None, defaults))
        elif isinstance(item, dict):
            found = _check_table(item, f"{place}.{{}}".format)
            if "prompt" not in item:
                found.append(_no_prompt(place))
            problems.extend(found)
            prompts.append(None if found else _prompt(item, None, defaults))
        else:
            problems.add(place, item, "must be an object or a line", 'write {"prompt": "a cat"} or "a cat --w 512"')
    return prompts
