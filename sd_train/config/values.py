"""Values that are more than a number, a word or a path: how each is written and what it becomes."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Strict, WithJsonSchema
from pydantic_core import PydanticCustomError

SMALLEST_SIDE = 64
"""Pixels: eight latents, which the U-Net of Stable Diffusion 1.x halves three times."""
LARGEST_SIDE = 16_384

BLOCK_RATES = 23
"""Of SDXL's U-Net, as sd-scripts counts its blocks."""


Fact = Literal[
    "base_model", "command", "dataset", "gradient_accumulation_steps", "optimizer_type", "prediction", "processes",
    "seed", "zero_terminal_snr",
]  # fmt: skip
"""What a state is of. A training that differs in one of them is refused unless `--resume_anyway` names it."""
FACTS: tuple[str, ...] = get_args(Fact)


@dataclass(frozen=True)
class Hint:
    """What a field's type does not say about its option."""

    kind: Literal["list", "value"] = "value"
    """`list`: the flag takes any number of words."""
    shown: str = ""
    """How the value is written, for `--help`."""
    later: tuple[str, ...] = ()
    """Choices that sd-scripts has and this version does not."""
    zero_is_unset: bool = False
    """0 means the default although the default is a number."""
    commands: tuple[str, ...] = ()
    """The commands that have the option; none: all."""


def rejected(rule: str, way_out: str) -> PydanticCustomError:
    """The error of a value, with the two sentences that the user is shown."""
    return PydanticCustomError("option_value", "{rule}; {way_out}", {"rule": rule, "way_out": way_out})


def parse_resolution(value: object) -> tuple[int, int] | None:
    """`512`, `"512"`, `"512,768"` or `[512, 768]` -> (width, height) in pixels."""
    rule, way_out = "must be one or two whole numbers of pixels", 'write "512" for a square or "512,768" (width,height)'
    parts: Sequence[object]
    if value is None:
        return None
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    sides: list[int] = []
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, int | str):
            raise rejected(rule, way_out)
        try:
            sides.append(int(part))
        except ValueError:
            raise rejected(rule, way_out) from None
    if len(sides) not in (1, 2):
        raise rejected(rule, way_out)
    if min(sides) < SMALLEST_SIDE or max(sides) > LARGEST_SIDE:
        raise rejected(f"each side must be {SMALLEST_SIDE} to {LARGEST_SIDE} pixels", way_out)
    return sides[0], sides[-1]


def parse_face_range(value: object) -> tuple[float, float] | None:
    """`"2,4"` or `[2.0, 4.0]` -> least and most times that the short side is as long as the face."""
    way_out = "write two numbers above 0, the smaller one first, for example 2,4"
    if value is None:
        return None
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or len(parts) != 2:
        raise rejected("must be two numbers", way_out)
    try:
        numbers = [float(part) for part in parts if not isinstance(part, bool)]
    except (TypeError, ValueError):
        raise rejected("must be two numbers", way_out) from None
    if len(numbers) != 2 or not 0 < numbers[0] <= numbers[1] < float("inf"):
        raise rejected("must be two numbers above 0 in ascending order", way_out)
    return numbers[0], numbers[1]


def parse_warmup(value: object) -> int | float:
    """Warm-up as steps (int) or as a share of the training (float below 1), by sd-scripts' rule for `int_or_float`.

    "10%" -> 0.1; below 1 -> the share; a whole number from 1 on -> steps. 1.0 and 1.5 are neither and are refused, as
    is a share of 100 % or more, whose training would end before the learning rate is reached.
    """
    way_out = 'write steps as a whole number (100), or a share as 0.1 or "10%"'
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise rejected("must be a number of steps or a share of the training", way_out)
    text = value.strip() if isinstance(value, str) else repr(value)
    try:
        number = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise rejected("must be a number of steps or a share of the training", way_out) from None
    if number == 0:
        return 0
    if 0 < number < 1:
        return number
    if not text.endswith("%") and text.removeprefix("+").isdecimal():
        return int(text)
    finite = 1 <= number < float("inf")
    rule = "is neither whole steps nor a share below 1" if finite else "is negative or not finite"
    raise rejected(rule, way_out)


def parse_arguments(value: object) -> dict[str, Any]:
    """`["weight_decay=0.01", "betas=.9,.999"]` -> `{"weight_decay": 0.01, "betas": (0.9, 0.999)}`.

    Values are Python literals; a word that is none stays a string.
    """
    if isinstance(value, Mapping):
        return dict(value)
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        raise rejected("must be a list of name=value", 'write ["weight_decay=0.01", "betas=.9,.999"]')
    arguments: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        name = name.strip()
        if not equals or not name.isidentifier():
            way_out = f"write each as {name or 'name'}=VALUE, without blanks around '='"
            raise rejected(f"{word!r} is not name=value", way_out)
        if name in arguments:
            raise rejected(f"{name} is given twice", "remove one of the two")
        try:
            arguments[name] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            arguments[name] = text.strip()
    return arguments


def parse_block_rates(value: object) -> tuple[float, ...] | None:
    """`"1e-5,0,..."` or a list -> `BLOCK_RATES` learning rates."""
    way_out = f"write {BLOCK_RATES} numbers from 0 on with commas between them"
    if value is None:
        return None
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or any(isinstance(part, bool) for part in parts):
        raise rejected("must be a list of numbers", way_out)
    try:
        rates = tuple(float(part) for part in parts)
    except (TypeError, ValueError):
        raise rejected("must be a list of numbers", way_out) from None
    if len(rates) != BLOCK_RATES:
        raise rejected(f"must be {BLOCK_RATES} numbers and has {len(rates)}", way_out)
    if not all(0 <= rate < float("inf") for rate in rates):
        raise rejected("must be numbers from 0 on", way_out)
    return rates


def parse_paths(value: object) -> tuple[Path, ...]:
    """A path or a list of them."""
    words = [value] if isinstance(value, str | Path) else value
    if not isinstance(words, list | tuple) or not all(isinstance(word, str | Path) for word in words):
        raise rejected("must be a list of paths", 'write ["first.safetensors", "second.safetensors"]')
    return tuple(Path(word) for word in words if word != "")


def parse_factors(value: object) -> tuple[float, ...]:
    """A number or a list of them."""
    words: Sequence[Any] = value if isinstance(value, list | tuple) else [value]
    way_out = "write for example [0.5, 1.0]"
    try:
        numbers = tuple(float(word) for word in words if not isinstance(word, bool))
    except (TypeError, ValueError):
        raise rejected("must be a list of numbers", way_out) from None
    if len(numbers) != len(words) or not all(abs(number) < float("inf") for number in numbers):
        raise rejected("must be a list of finite numbers", way_out)
    return numbers


def parse_accepted(value: object) -> tuple[str, ...]:
    """The names of facts whose change is accepted, each once."""
    words = value.replace(",", " ").split() if isinstance(value, str) else value
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        raise rejected("must be a list of names", f"write some of {', '.join(FACTS)}")
    for word in words:
        if word not in FACTS and word != "":
            near = difflib.get_close_matches(word, FACTS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise rejected(f"{word!r} is nothing that can be accepted", f"{hint}write some of {', '.join(FACTS)}")
    return tuple(dict.fromkeys(word for word in words if word != ""))


def parse_single_rate(value: object) -> object:
    """sd-scripts takes a list of text encoder rates, of which its LoRA uses the first alone."""
    if isinstance(value, list | tuple):
        if len(value) != 1:
            raise rejected("takes one rate, which holds for all text encoders", "give a single number")
        value = value[0]
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            raise rejected("must be a number", "write for example 5e-5") from None
    return value


def parse_folder_name(value: object) -> object:
    """One name, no path."""
    if isinstance(value, str) and (any(character in value for character in "/\\") or value in (".", "..")):
        raise rejected("is a path", "give one name without / and \\")
    return value


_ARGUMENTS_SCHEMA = WithJsonSchema({"type": "array", "items": {"type": "string", "pattern": "="}})
_SIDE = {"type": "integer", "minimum": SMALLEST_SIDE, "maximum": LARGEST_SIDE}

LaxPath = Annotated[Path, Strict(False)]
Resolution = Annotated[
    tuple[int, int] | None,
    BeforeValidator(parse_resolution),
    WithJsonSchema(
        {
            "anyOf": [
                _SIDE,
                {"type": "string", "pattern": r"^\s*\d+\s*(,\s*\d+\s*)?$"},
                {"type": "array", "items": _SIDE, "minItems": 1, "maxItems": 2},
            ]
        }
    ),
    Hint(shown="N or W,H"),
]
FaceRange = Annotated[
    tuple[float, float] | None,
    BeforeValidator(parse_face_range),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": r"^[^,]+,[^,]+$"},
                {"type": "array", "items": {"type": "number", "exclusiveMinimum": 0}, "minItems": 2, "maxItems": 2},
            ]
        }
    ),
    Hint(shown="LEAST,MOST"),
]
WarmupSteps = Annotated[
    int | float,
    BeforeValidator(parse_warmup),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 0},
                {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
                {"type": "string", "pattern": r"^\s*[\d.]+\s*%?$"},
            ]
        }
    ),
    Hint(shown="STEPS or SHARE or N%"),
]
Arguments = Annotated[
    Mapping[str, Any], BeforeValidator(parse_arguments), _ARGUMENTS_SCHEMA, Hint("list", "NAME=VALUE ...")
]
BlockRates = Annotated[
    tuple[float, ...] | None,
    BeforeValidator(parse_block_rates),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": r"^[^,]+(,[^,]+)+$"},
                {"type": "array", "items": {"type": "number", "minimum": 0},
                 "minItems": BLOCK_RATES, "maxItems": BLOCK_RATES},
            ]
        }
    ),
    Hint(shown="RATE,RATE,..."),
]  # fmt: skip
Paths = Annotated[
    tuple[Path, ...],
    BeforeValidator(parse_paths),
    WithJsonSchema({"type": "array", "items": {"type": "string"}}),
    Hint("list", "FILE ..."),
]
Factors = Annotated[
    tuple[float, ...],
    BeforeValidator(parse_factors),
    WithJsonSchema({"type": "array", "items": {"type": "number"}}),
    Hint("list", "NUMBER ..."),
]
Accepted = Annotated[
    tuple[str, ...],
    BeforeValidator(parse_accepted),
    WithJsonSchema({"type": "array", "items": {"enum": list(FACTS)}}),
    Hint("list", "NAME ..."),
]
FolderName = Annotated[str | None, BeforeValidator(parse_folder_name)]
SingleRate = Annotated[float | None, BeforeValidator(parse_single_rate), Hint("list", "NUMBER")]
