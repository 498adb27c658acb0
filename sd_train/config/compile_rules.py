"""The rules of `torch_compile` beside other options."""

from __future__ import annotations

from sd_train.config.rules import Chosen
from sd_train.errors import Problems

_DRAWN = ("dropout", "rank_dropout", "module_dropout")
"""Keys of `network_args`."""


def check_compile(chosen: Chosen, problems: Problems, warnings: list[str]) -> None:
    """Add what cannot be compiled to `problems` and what has no effect to `warnings`."""
    if not chosen.valid("torch_compile"):
        return
    if not chosen.values["torch_compile"]:
        # A run's own configuration file holds the defaults too.
        for name, usual in (("torch_compile_scope", "regional"), ("dynamo_backend", "inductor")):
            if name in chosen.given and chosen.values.get(name, usual) != usual:
                warnings.append(f"{chosen.where(name)} has no effect: it acts only with torch_compile")
        return
    if chosen.command == "train_network":
        _check_network(chosen, problems)


def _check_network(chosen: Chosen, problems: Problems) -> None:
    """What a network draws anew in each step is drawn from numbers that no graph holds."""
    where, values = chosen.where("torch_compile"), chosen.values
    arguments = values.get("network_args") or {}
    drawn = [f"network_dropout = {values['network_dropout']}"] if values.get("network_dropout") else []
    drawn += [f"network_args {key}={arguments[key]}" for key in _DRAWN if _is_on(arguments.get(key))]
    if values.get("network_module") == "networks.dylora" or arguments.get("algo") == "dylora":
        drawn.append("DyLoRA's ranks")
    if drawn:
        problems.add(
            where, True, f"does not go with {' and '.join(drawn)}: what is drawn anew in each step cannot be compiled",
            "remove one of the two",
        )  # fmt: skip


def _is_on(value: object) -> bool:
    """Whether a rate is given; what is no number is refused elsewhere."""
    try:
        return float(str(value)) != 0
    except ValueError:
        return False
