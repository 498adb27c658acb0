"""What all groups of options share."""

from __future__ import annotations

from types import NoneType
from typing import Any, ClassVar, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from sd_train.config.values import rejected


def parts_of(annotation: Any) -> tuple[Any, ...]:
    """The types that `annotation` allows, None aside: `int | None` -> (int,)."""
    if get_origin(annotation) is Literal:
        return (annotation,)
    parts = tuple(part for part in get_args(annotation) if part is not NoneType)
    return parts if NoneType in get_args(annotation) else (annotation,)


def number_type(annotation: Any) -> type[int] | type[float] | None:
    """`int` or `float` where `annotation` is a number or a choice of numbers, else None."""
    part = parts_of(annotation)[0]
    if get_origin(part) is Literal:
        return int if all(type(choice) is int for choice in get_args(part)) else None
    return int if part is int else float if part is float else None


class Group(BaseModel):
    """A group of options: frozen, unknown names forbidden, strict except that a number may be written as text."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    commands: ClassVar[tuple[str, ...]] = ()
    """The commands that have these options; none: all. A field's own hint narrows it."""

    @field_validator("*", mode="before")
    @classmethod
    def text_of_files(cls, value: object) -> object:
        """Options become paths, files and metadata, none of which hold null characters or what is not UTF-8."""
        for text in value if isinstance(value, list | tuple) else [value]:
            if not isinstance(text, str):
                continue
            if "\0" in text:
                raise rejected("holds a null character", "remove it")
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise rejected("holds bytes that are not UTF-8", "rename the file or folder, or correct the text")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def number_from_text(cls, value: object, info: ValidationInfo) -> object:
        """Flags are text and kohya_ss writes some numbers as text; text that is no number stays and is refused."""
        if not isinstance(value, str) or info.field_name is None:
            return value
        kind = number_type(cls.model_fields[info.field_name].annotation)
        if kind is None:
            return value
        try:
            return kind(value)
        except ValueError:
            return value
