"""`network_args` of LyCORIS networks: which algorithm takes which, in one table, and what they come to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from sd_train.config.network_args import OWN_ARGUMENTS
from sd_train.config.values import rejected
from sd_train.errors import Problems

Algorithm = Literal["lora", "loha", "lokr", "ia3", "dylora", "glora", "full", "diag-oft", "boft"]

ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)
ALIASES: Mapping[str, Algorithm] = {"locon": "lora", "dora": "lora", "oft": "diag-oft"}
"""Other names of `algo`; dora is lora with dora_wd."""

Preset = Literal[
    "full", "full-lin", "attn-mlp", "attn-only", "unet-only", "unet-transformer-only", "unet-convblock-only", "ia3"
]
PRESETS: tuple[Preset, ...] = get_args(Preset)

OWN_MODULE = "networks.lora"
LYCORIS_MODULE = "lycoris.kohya"
NAMED_MODULES: Mapping[str, Algorithm] = {
    "networks.dylora": "dylora",
    "networks.loha": "loha",
    "networks.lokr": "lokr",
}
"""sd-scripts' own networks that LyCORIS's algorithms stand for."""

_REFUSED = {
    "networks.lora_fa": "write networks.lora: its file has the same form, and both matrices learn",
    "networks.oft": f"write {LYCORIS_MODULE} with network_args algo=diag-oft, whose file has another form",
}
"""sd-scripts' networks that are not trained here, and what to use."""


def refuse_network(value: object) -> object:
    """`--network_module` as it is, unless sd-scripts has such a network and it is not trained here."""
    if isinstance(value, str) and value in _REFUSED:
        raise rejected("is not trained here", _REFUSED[value])
    return value


_FACTORED = frozenset({"lora", "loha", "lokr"})
_RANKED = _FACTORED | {"glora", "dylora"}
_ROTATED = frozenset({"diag-oft", "boft"})
_ALL = frozenset(ALGORITHMS)


@dataclass(frozen=True)
class Argument:
    """One of `network_args`."""

    kind: type[bool] | type[int] | type[float]
    algorithms: frozenset[str]
    """That it acts on."""
    least: float = 0
    below: float = 1e6
    """The first number that is too large."""
    idle: frozenset[str] = frozenset()
    """Algorithms that it may be given with and does nothing to."""


_SHARE: dict[str, Any] = {"kind": float, "below": 1}

ARGUMENTS: Mapping[str, Argument] = {
    "conv_dim": Argument(int, _RANKED | _ROTATED, least=1, below=16_385, idle=frozenset({"full", "ia3"})),
    "conv_alpha": Argument(float, _RANKED, idle=frozenset({"full", "ia3"}) | _ROTATED),
    "dropout": Argument(**_SHARE, algorithms=_FACTORED | {"glora"}),
    "rank_dropout": Argument(**_SHARE, algorithms=_FACTORED | {"full"}),
    "module_dropout": Argument(**_SHARE, algorithms=_ALL),
    "rank_dropout_scale": Argument(bool, _FACTORED | {"full"}),
    "use_tucker": Argument(bool, _FACTORED),
    "use_scalar": Argument(bool, _FACTORED | {"glora"}),
    "rs_lora": Argument(bool, _FACTORED),
    "dora_wd": Argument(bool, _FACTORED),
    "wd_on_output": Argument(bool, _FACTORED),
    "block_size": Argument(int, frozenset({"dylora"}), least=1, below=16_385),
    "train_on_input": Argument(bool, frozenset({"ia3"})),
    "factor": Argument(int, frozenset({"lokr"}), least=-1),
    "decompose_both": Argument(bool, frozenset({"lokr"})),
    "full_matrix": Argument(bool, frozenset({"lokr"})),
    "unbalanced_factorization": Argument(bool, frozenset({"lokr"})),
    "constraint": Argument(float, _ROTATED),
    "rescaled": Argument(bool, _ROTATED),
    "train_norm": Argument(bool, _ALL),
    "bypass_mode": Argument(bool, frozenset(), idle=_ALL),
}
"""Every argument beside `algo` and `preset`."""

OTHER_NAMES: Mapping[str, str] = {
    "unit": "block_size",
    "use_cp": "use_tucker",
    "use_conv_cp": "use_tucker",
    "constrain": "constraint",
    "weight_decompose": "dora_wd",
    "wd_on_out": "wd_on_output",
}

_NOTHING = (None, "", "None", 0, False)
"""What kohya_ss writes where nothing is chosen; 0 covers 0.0."""


@dataclass(frozen=True)
class LycorisArgs:
    """What a LyCORIS network is made of; the defaults are those of `lycoris.kohya`."""

    algorithm: Algorithm
    rank: int
    alpha: float
    """0 means the rank."""
    preset: Preset = "full"
    conv_rank: int = 4
    conv_alpha: float = 1.0
    """Of convolutions with a kernel larger than 1x1."""
    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    rank_dropout_scale: bool = False
    train_norm: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    """What else the algorithm's module takes, under the library's names."""

    @property
    def decomposed(self) -> bool:
        """Whether weights are split into magnitude and direction (DoRA)."""
        return bool(self.options.get("weight_decompose"))

    @property
    def plain(self) -> bool:
        """Whether the file is a LoRA or LoCon that every program reads."""
        special = ("weight_decompose", "use_tucker", "use_scalar")
        return self.algorithm == "lora" and not self.train_norm and not any(self.options.get(name) for name in special)


_CHOICES = frozenset({"algo", "preset"})
_LIBRARY_NAMES = {"dora_wd": "weight_decompose", "wd_on_output": "wd_on_out"}
_OWN = frozenset(
    {"conv_dim", "conv_alpha", "dropout", "rank_dropout", "module_dropout", "rank_dropout_scale", "train_norm",
     "bypass_mode"}
)  # fmt: skip
"""Those that the library's modules are not told."""


def read_lycoris(values: Mapping[str, Any]) -> LycorisArgs:
    """What the checked options of a network describe."""
    given = _named(values["network_args"])
    algorithm = _algorithm(values["network_module"], given)
    assert algorithm is not None
    chosen: dict[str, Any] = {
        name: parsed
        for name, value in given.items()
        if name in ARGUMENTS and algorithm in ARGUMENTS[name].algorithms and not _is_unset(name, value)
        and (parsed := _parse(ARGUMENTS[name], value)) is not None
    }  # fmt: skip
    rank, alpha = values["network_dim"] or 4, float(values["network_alpha"])
    if given.get("algo") == "dora":
        chosen["dora_wd"] = True
    options = {_LIBRARY_NAMES.get(name, name): value for name, value in chosen.items() if name not in _OWN}
    if algorithm == "dylora":
        options.setdefault("block_size", 1 if values["network_module"] in NAMED_MODULES else 4)
    return LycorisArgs(
        algorithm=algorithm,
        rank=rank,
        alpha=alpha,
        preset=_preset(values["network_module"], given),
        conv_rank=chosen.get("conv_dim", rank),
        conv_alpha=chosen.get("conv_alpha", alpha),
        dropout=chosen.get("dropout", values["network_dropout"] or 0.0),
        rank_dropout=chosen.get("rank_dropout", 0.0),
        module_dropout=chosen.get("module_dropout", 0.0),
        rank_dropout_scale=chosen.get("rank_dropout_scale", False),
        train_norm=chosen.get("train_norm", False),
        options=options,
    )


def _named(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {OTHER_NAMES.get(name, name): value for name, value in arguments.items()}


def _algorithm(module: str, given: Mapping[str, Any]) -> Algorithm | None:
    """None: there is no such one."""
    if module in NAMED_MODULES:
        return NAMED_MODULES[module]
    name = str(given.get("algo") or "lora").lower()
    return ALIASES.get(name) or next((known for known in ALGORITHMS if known == name), None)


def _preset(module: str, given: Mapping[str, Any]) -> Preset:
    if module in NAMED_MODULES:
        # As in sd-scripts, where convolutions are only trained if they have a rank.
        return "attn-mlp" if _is_unset("conv_dim", given.get("conv_dim")) else "full"
    return next((known for known in PRESETS if known == given.get("preset")), "full")


def _is_unset(name: str, value: object) -> bool:
    # A false wd_on_output means something: its default is true.
    return value in _NOTHING and not (name == "wd_on_output" and value not in (None, "", "None"))


def _parse(argument: Argument, value: object) -> bool | int | float | None:
    """`value` as the argument's type; None if it is none. kohya_ss writes truth values as text."""
    if argument.kind is bool:
        return {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower())
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    if not argument.least <= number < argument.below or (argument.kind is int and number != int(number)):
        return None
    return argument.kind(number)


def check_lycoris(
    values: Mapping[str, Any], where: Callable[[str], str], problems: Problems, warnings: list[str]
) -> None:
    """Add what is wrong with the options of a LyCORIS network, and what has no effect.

    Args:
        values: of `NETWORK_OPTIONS`, each valid by itself.
        where: names the place of an option.
        problems: what cannot be done.
        warnings: what does nothing.
    """
    module, place, before = values["network_module"], where("network_args"), len(problems.found)
    given = _named(values["network_args"])
    algorithm = _algorithm(module, given)
    if len(given) < len(values["network_args"]):
        twice = sorted(f"{old} and {new}" for old, new in OTHER_NAMES.items()
                       if old in values["network_args"] and new in values["network_args"])  # fmt: skip
        problems.add(place, None, f"{' and '.join(twice) or 'two names'} mean the same", "remove one of the two")
    if algorithm is None:
        names = ", ".join((*ALGORITHMS, *ALIASES))
        problems.add(place, f"algo={given['algo']}", "is no algorithm of LyCORIS that can be trained", f"use {names}")
        return
    if module in NAMED_MODULES and "algo" in given:
        problems.add(place, f"algo={given['algo']}", f"network_module = {module} is an algorithm of its own",
                     f"remove it, or write network_module = {LYCORIS_MODULE}")  # fmt: skip
    if "preset" in given and (module in NAMED_MODULES or given["preset"] not in PRESETS):
        rule, way_out = "is no preset (files of presets are not read)", f"use {', '.join(PRESETS)}"
        if module in NAMED_MODULES:
            rule, way_out = f"{module} has no presets", f"remove it, or write network_module = {LYCORIS_MODULE}"
        problems.add(place, f"preset={given['preset']}", rule, way_out)
    for name, value in given.items():
        if name not in _CHOICES:
            _check_argument(algorithm, name, value, place, problems, warnings)
    for name, usual in (("network_dim", None), ("network_alpha", 1.0)) if algorithm in UNRANKED else ():
        if values[name] != usual:
            warnings.append(f"{where(name)} has no effect: algo={algorithm} has no rank")
    if len(problems.found) == before:
        _check_together(values, read_lycoris(values), where, problems, warnings)


def _check_argument(
    algorithm: str, name: str, value: object, place: str, problems: Problems, warnings: list[str]
) -> None:
    argument = ARGUMENTS.get(name)
    if argument is None:
        rule = f"is an argument of {OWN_MODULE}" if name in OWN_ARGUMENTS else "is no argument of a LyCORIS network"
        problems.add(place, f"{name}={value}", rule,
                     f"{algorithm} takes {', '.join(accepted_by(algorithm))}")  # fmt: skip
    elif _is_unset(name, value):
        return
    elif algorithm in argument.idle:
        reason = "how a change is computed is chosen here, and gives the same" if name == "bypass_mode" else (
            f"algo={algorithm} has no such thing; preset={PRESETS[2]} leaves convolutions out"
        )  # fmt: skip
        if _parse(argument, value) is not False:
            warnings.append(f"{place}: {name}={value} has no effect: {reason}")
    elif algorithm not in argument.algorithms:
        if argument.kind is bool and _parse(argument, value) is False:
            return
        problems.add(place, f"{name}={value}", f"algo={algorithm} does not take it",
                     f"remove it; it belongs to {', '.join(sorted(argument.algorithms))}")  # fmt: skip
    elif _parse(argument, value) is None:
        if argument.kind is bool:
            rule = "must be True or False"
        else:
            kind = "a whole number" if argument.kind is int else "a number"
            rule = f"must be {kind} from {argument.least:g} to below {argument.below:g}"
        problems.add(place, f"{name}={value}", rule, f"correct {name}")


def accepted_by(algorithm: str) -> list[str]:
    """The arguments that act on an algorithm, by name."""
    return ["algo", "preset", *(name for name, argument in ARGUMENTS.items() if algorithm in argument.algorithms)]


UNRANKED = ("full", "ia3")
"""Algorithms without rank and alpha."""

NETWORK_OPTIONS = (
    "network_module", "network_dim", "network_alpha", "network_dropout", "network_args", "dim_from_weights",
    "output_lora_format",
)  # fmt: skip
"""Every option that `check_lycoris` looks at."""


def _check_together(
    values: Mapping[str, Any], chosen: LycorisArgs, where: Callable[[str], str], problems: Problems,
    warnings: list[str],
) -> None:  # fmt: skip
    place, module, algorithm = where("network_args"), values["network_module"], chosen.algorithm
    if values["network_dropout"] and algorithm not in ARGUMENTS["dropout"].algorithms:
        problems.add(where("network_dropout"), values["network_dropout"], f"{algorithm} has no dropout of values",
                     "give module_dropout in network_args, or remove it")  # fmt: skip
    if values["dim_from_weights"]:
        problems.add(where("dim_from_weights"), None, f"is of {OWN_MODULE} alone",
                     "give the network's options as they were when the weights were trained")  # fmt: skip
    if values["output_lora_format"] == "diffusers" and not chosen.plain:
        problems.add(where("output_lora_format"), "diffusers", f"diffusers reads no {_described(chosen)}",
                     "write kohya, or leave it out")  # fmt: skip
    if algorithm == "dylora":
        size = chosen.options["block_size"]
        name = "unit" if module in NAMED_MODULES else "block_size"
        ranks = {chosen.rank} | ({chosen.conv_rank} if chosen.preset in WITH_KERNELS else set())
        for rank in sorted(ranks):
            if rank % size:
                problems.add(place, f"{name}={size}", f"must divide the rank, which is {rank}",
                             f"choose a divisor of {rank}")  # fmt: skip
        if module in NAMED_MODULES and chosen.conv_rank != chosen.rank:
            problems.add(place, f"conv_dim={chosen.conv_rank}", f"{module} has one rank, network_dim {chosen.rank}",
                         f"write conv_dim={chosen.rank}, or remove it")  # fmt: skip
    if chosen.options.get("wd_on_out") is not None and not chosen.decomposed:
        warnings.append(f"{place}: wd_on_output has no effect: dora_wd is not given")
    if chosen.rank_dropout_scale and not chosen.rank_dropout:
        warnings.append(f"{place}: rank_dropout_scale has no effect: rank_dropout is not given")


WITH_KERNELS: tuple[Preset, ...] = ("full", "unet-only", "unet-convblock-only")
"""Presets that train convolutions with a kernel larger than 1x1."""
WITH_RESNETS: tuple[Preset, ...] = (*WITH_KERNELS, "full-lin")
"""Presets that train what is in the U-Net's residual blocks."""


def _described(chosen: LycorisArgs) -> str:
    if chosen.algorithm != "lora":
        return f"algo={chosen.algorithm}"
    names = {"weight_decompose": "DoRA in kohya's form", "use_tucker": "use_tucker", "use_scalar": "use_scalar"}
    return next((text for name, text in names.items() if chosen.options.get(name)), "train_norm")
