"""The options as data, read off the models: for the command line, messages, help and schema."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from sd_train.config.group import number_type, parts_of
from sd_train.config.options import GROUPS
from sd_train.config.values import Hint

Kind = Literal["flag", "int", "float", "text", "list"]

_SIGNS = {Ge: (">=", "ge"), Gt: (">", "gt"), Le: ("<=", "le"), Lt: ("<", "lt")}
_WORDS = {
    "flag": "true or false", "int": "a whole number", "float": "a number", "text": "text in quotes", "list": "a list",
}  # fmt: skip


@dataclass(frozen=True)
class Option:
    """One option of this version."""

    name: str
    group: str
    help: str
    kind: Kind
    required: bool
    default: Any
    choices: tuple[Any, ...]
    bounds: str
    """`>= 0 and < 1`, or empty."""
    hint: Hint
    zero_is_unset: bool
    """0 means that the option is not given, as kohya_ss writes it."""
    secret: bool
    """A key or token: it is never shown and written nowhere."""
    commands: tuple[str, ...] = ()
    """The commands that have it; none: all."""

    def belongs_to(self, command: str) -> bool:
        """Whether `command` has the option."""
        return not self.commands or command in self.commands

    @property
    def rule(self) -> str:
        """What a value must be, to follow the value in a message."""
        if self.choices:
            return "must be one of: " + ", ".join(map(str, self.choices))
        return f"must be {_WORDS[self.kind]} {self.bounds}".rstrip()


def _option(group: str, name: str, field: FieldInfo) -> Option:
    part = parts_of(field.annotation)[0]
    hint = next((item for item in field.metadata if isinstance(item, Hint)), Hint())
    number = number_type(field.annotation)
    kind: Kind = "flag" if part is bool else "text"
    if hint.kind == "list":
        kind = "list"
    elif number is not None:
        kind = "int" if number is int else "float"
    bounds = [
        (sign, getattr(item, attribute))
        for item in field.metadata
        for bound, (sign, attribute) in _SIGNS.items()
        if isinstance(item, bound)
    ]
    choices = get_args(part) if get_origin(part) is Literal else ()
    positive = any((sign == ">=" and limit > 0) or sign == ">" for sign, limit in bounds)
    no_default = not field.is_required() and field.default is None
    return Option(
        name=name,
        group=group,
        help=field.description or "",
        kind=kind,
        required=field.is_required(),
        default=None if field.is_required() else field.get_default(call_default_factory=True, validated_data={}),
        choices=choices,
        bounds=" and ".join(f"{sign} {limit}" for sign, limit in bounds),
        hint=hint,
        zero_is_unset=hint.zero_is_unset
        or (no_default and number is not None and (positive or bool(choices and 0 not in choices))),
        secret=part is SecretStr,
        commands=hint.commands or GROUPS[group].commands,
    )


@cache
def options() -> dict[str, Option]:
    """Every option of this version by name, in the order of the groups."""
    return {
        name: _option(group, name, field)
        for group, model in GROUPS.items()
        for name, field in model.model_fields.items()
    }


def number_in(value: object, kind: Kind) -> object:
    """The number that `value` spells, for an option of a numeric kind; else `value`."""
    if kind in ("int", "float") and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def is_unset(option: Option, value: object) -> bool:
    """Whether `value` is one of the ways to write that the option is not given."""
    if value == "" or (option.kind == "list" and isinstance(value, list) and all(item == "" for item in value)):
        return True
    number = number_in(value, option.kind)
    return option.zero_is_unset and not isinstance(number, bool) and number == 0
