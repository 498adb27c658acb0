"""The alphas that a LoRA file's metadata tell, where no tensor does: ours, and those of PEFT and diffusers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sd_train.errors import ModelError
from sd_train.lora_files.names import Place, diffusers_name

PEFT_METADATA = "lora_adapter_metadata"
ALPHAS = "sd_train_alphas"
"""Metadata of our diffusers files: the alphas that are multiplied into the weights, as JSON by module."""

_MOST_PATTERNS, _MOST_INVOLVED = 1000, 100
"""Of a network: all, and those that are more than names; no network has so many modules of their own alpha."""

_LITERAL = re.compile(r"(?:[\w-]|\\?\.)+")
_REPEATED, _REPEATED_GROUP = re.compile(r"[*+?{]"), re.compile(r"\)[*+?{]")


def json_table(metadata: Mapping[str, str], name: str) -> dict[str, Any]:
    """The table that metadata entry `name` holds as JSON; empty if it holds none."""
    try:
        table = json.loads(metadata.get(name, "{}"))
    except (ValueError, RecursionError):
        return {}
    return table if isinstance(table, dict) else {}


@dataclass
class ToldAlphas:
    """What a file's metadata tell, read once for all of its modules."""

    origin: str
    """The file, for messages."""
    _kept: dict[str, Any]
    _config: dict[str, Any]
    _patterns: dict[str, _Patterns] = field(default_factory=dict)
    """By role; made when they are asked for."""

    @classmethod
    def of(cls, metadata: Mapping[str, str], origin: str) -> ToldAlphas:
        return cls(origin, json_table(metadata, ALPHAS), json_table(metadata, PEFT_METADATA))

    def alpha(self, place: Place, rank: int) -> tuple[float | None, float | None]:
        """The alpha of the module at `place` and, where it is multiplied into the weights, the same again.

        Raises:
            ModelError: if it is no finite number, or its pattern cannot be searched for safely.
        """
        try:
            return self._alpha(place, rank)
        except (ValueError, TypeError, AttributeError, OverflowError):
            raise ModelError(
                f"{self.origin}: its metadata give {place.role}.{place.path} an alpha that is no number; download the "
                "file again"
            ) from None

    def _alpha(self, place: Place, rank: int) -> tuple[float | None, float | None]:
        if kept := self._kept.get(diffusers_name(place)):
            return _finite(kept), _finite(kept)
        config = self._config
        own = {
            name.removeprefix(f"{place.role}."): value
            for name, value in config.items()
            if name.startswith(f"{place.role}.")
        } or ({} if any(name.startswith(("unet.", "text_encoder")) for name in config) else config)
        if "lora_alpha" not in own:
            return None, None
        if place.role not in self._patterns:
            self._patterns[place.role] = _Patterns.of(own.get("alpha_pattern") or {}, self.origin)
        alpha = _finite(self._patterns[place.role].find(place.path) or own["lora_alpha"])
        # Rank-stabilised LoRA (Kalajdzievski 2023, arXiv:2312.03732) divides by the root.
        return (alpha * math.sqrt(rank) if own.get("use_rslora") else alpha), None


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} is no alpha")
    return number


@dataclass(frozen=True)
class _Patterns:
    """PEFT's rule: the first pattern that matches the end of a module's path from a dot on."""

    names: dict[str, tuple[int, Any]]
    """Those that are names: their number in the file, and the alpha."""
    involved: list[tuple[int, re.Pattern[str], Any]]
    """The others."""

    @classmethod
    def of(cls, patterns: Mapping[str, Any], origin: str) -> _Patterns:
        """
        Raises:
            ModelError: if there are too many, or one could be searched for ever: a repeated group, or more than two
                repetitions.
        """
        names: dict[str, tuple[int, Any]] = {}
        involved: list[tuple[int, re.Pattern[str], Any]] = []
        if len(patterns) > _MOST_PATTERNS:
            raise _too_many(f"{len(patterns)} alpha_patterns", _MOST_PATTERNS, origin)
        for number, (pattern, value) in enumerate(patterns.items()):
            if _LITERAL.fullmatch(pattern):
                names.setdefault(pattern.replace("\\.", "."), (number, value))
                continue
            if len(_REPEATED.findall(pattern)) > 2 or _REPEATED_GROUP.search(pattern):
                raise _too_involved(pattern, origin)
            try:
                involved.append((number, re.compile(rf"(?:.*\.)?(?:{pattern})$"), value))
            except re.error:
                continue
            except RecursionError:
                raise _too_involved(pattern, origin) from None
            if len(involved) > _MOST_INVOLVED:
                raise _too_many("alpha_patterns that are no names", _MOST_INVOLVED, origin)
        return cls(names, involved)

    def find(self, path: str) -> float | None:
        """The alpha of the module at `path`; None if no pattern matches."""
        steps = path.split(".")
        ends = (".".join(steps[place:]) for place in range(len(steps)))
        found = [self.names[end] for end in ends if end in self.names]
        for number, pattern, value in self.involved:
            if pattern.match(path):
                found.append((number, value))
                break
        return float(min(found, key=lambda one: one[0])[1]) if found else None


def _too_many(what: str, most: int, origin: str) -> ModelError:
    return ModelError(
        f"{origin}: its metadata hold {what}, and at most {most} are read; write out the modules' names in their place"
    )


def _too_involved(pattern: str, origin: str) -> ModelError:
    return ModelError(
        f"{origin}: alpha_pattern {pattern[:80]!r} is too involved to be searched for safely; write out the modules' "
        "names in its place"
    )
