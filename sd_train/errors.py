"""The errors that a user sees without a traceback, and the problems that they are made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar


class UserError(Exception):
    """Something that the user can mend, a problem a line; the process ends with `exit_code`, without a traceback."""

    exit_code: ClassVar[int] = 2

    def __init__(self, *problems: str) -> None:
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return self.problems[0]
        return f"{len(self.problems)} problems:\n" + "\n".join(f"  - {problem}" for problem in self.problems)


class ConfigError(UserError):
    """A flag, a configuration file or a dataset file says something that cannot be done."""


class DataError(UserError):
    """Images or captions are missing or cannot be read."""

    exit_code: ClassVar[int] = 3


class ImageError(DataError):
    """The file of one image cannot be read."""


class ModelError(UserError):
    """A model or weight file is missing, unknown or does not fit."""

    exit_code: ClassVar[int] = 3


class RunError(UserError):
    """The run itself failed: non-finite loss, memory, disk."""

    exit_code: ClassVar[int] = 4


class DiskError(RunError):
    """A file could not be written."""

    def __init__(self, *problems: str, full: bool = False) -> None:
        """`full`: whether room is all that lacks."""
        super().__init__(*problems)
        self.full = full


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where it stands, the value, the rule it breaks and the way out."""

    where: str
    value: str | None
    rule: str
    way_out: str

    def __str__(self) -> str:
        value = "" if self.value is None else f" = {self.value}"
        return f"{self.where}{value}: {self.rule}; {self.way_out}"


@dataclass
class Problems:
    """Collects problems so that all of them are reported at once."""

    found: list[Problem] = field(default_factory=list)

    def add(self, where: str, value: object, rule: str, way_out: str) -> None:
        """Note a problem; `value` None means that there is no value to show."""
        self.found.append(Problem(where, None if value is None else repr(value), rule, way_out))

    def extend(self, problems: Iterable[Problem]) -> None:
        self.found.extend(problems)

    def raise_if_any(self, error: type[UserError]) -> None:
        """Raise `error` with every problem on a line of its own, if there is any."""
        if self.found:
            raise error(*map(str, self.found))
