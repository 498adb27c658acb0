"""`sd-train optimizers`: what `--optimizer_type` can name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sd_train.errors import ConfigError

if TYPE_CHECKING:
    from sd_train.optim.registry import OptimizerSpec

USAGE = """usage: sd-train optimizers [NAME]

List the optimizers that --optimizer_type can name, with the package that each needs and whether it is installed; with a
name, say what --optimizer_args may set for it."""

_TRAITS = {
    "adapts_rate": "estimates its rate; learning_rate 1.0",
    "one_rate": "one rate for all parameters",
    "schedule_free": "needs no lr_scheduler",
    "eight_bit": "8-bit state",
    "syncs": "waits for the GPU in each step",
    "fusible": "steps parameters one by one",
}


def main(argv: Sequence[str]) -> int:
    """Print the list, or what `argv` names, and return 0.

    Raises:
        ConfigError: if there is no such optimizer, or its package is missing where only the class tells.
    """
    from sd_train.optim.optimizers import accepted_arguments, find_optimizer
    from sd_train.optim.registry import SPECS

    words = list(argv)
    if words in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    if len(words) > 1:
        raise ConfigError(f"optimizers: {' '.join(words)}: takes one name at most; write sd-train optimizers AdamW")
    if words:
        spec = find_optimizer(words[0])
        names = ", ".join((spec.name, *spec.aliases))
        lines = [names, f"  {spec.description}", f"  {_needs(spec)}"]
        if traits := [about for name, about in _TRAITS.items() if getattr(spec, name)]:
            lines.append(f"  {'; '.join(traits)}")
        defaults = "; set here: " + ", ".join(f"{key}={value}" for key, value in spec.defaults.items())
        lines.append(
            f"  --optimizer_args: {' '.join(accepted_arguments(spec))}" + (defaults if spec.defaults else "")
        )
        print("\n".join(lines))
        return 0
    for spec in SPECS:
        also = [alias for alias in spec.aliases if "." not in alias]
        aliases = f" (also {', '.join(also)})" if also else ""
        print(f"{spec.name:24}{_needs(spec):44}{spec.description}{aliases}")
    print("\nIn any case of letters; any other class works as package.module.Class.")
    return 0


def _needs(spec: OptimizerSpec) -> str:
    from sd_train.optim.optimizers import is_installed

    if spec.package is None:
        return "always there"
    return f"{spec.package}: installed" if is_installed(spec) else f"pip install {spec.package}"
