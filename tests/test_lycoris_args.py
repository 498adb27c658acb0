"""`network_args` of LyCORIS networks: what each algorithm takes, kohya_ss's spellings, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from sd_train.config.lycoris_args import (
    ALGORITHMS,
    ARGUMENTS,
    NETWORK_OPTIONS,
    OTHER_NAMES,
    accepted_by,
    check_lycoris,
    read_lycoris,
)
from sd_train.config.values import parse_arguments
from sd_train.errors import ConfigError, Problems
from sd_train.train_network import main


def values(words: str, **more: Any) -> dict[str, Any]:
    """The options of a network with `network_args` of `words`."""
    found = {
        "network_module": "lycoris.kohya", "network_dim": 8, "network_alpha": 4.0, "network_dropout": None,
        "network_args": parse_arguments(words.split()), "dim_from_weights": False, "output_lora_format": "kohya",
    }  # fmt: skip
    assert found.keys() == set(NETWORK_OPTIONS)
    return found | more


def checked(words: str, **more: Any) -> tuple[list[str], list[str]]:
    """Problems and warnings."""
    problems, warnings = Problems(), list[str]()
    check_lycoris(values(words, **more), lambda name: f"--{name}", problems, warnings)
    return [str(problem) for problem in problems.found], warnings


@pytest.mark.parametrize("algorithm", ["full", "ia3", "loha"])
def test_ranks_of_algorithms_without_one_are_told_of(algorithm: str) -> None:
    told = [f"--{name} has no effect: algo={algorithm} has no rank" for name in ("network_dim", "network_alpha")]
    assert [text for text in checked(f"algo={algorithm}")[1] if "no rank" in text] == (
        [] if algorithm == "loha" else told
    )


def test_what_is_not_given_is_as_in_the_library() -> None:
    plain = read_lycoris(values(""))
    assert (plain.algorithm, plain.rank, plain.alpha, plain.preset) == ("lora", 8, 4.0, "full")
    assert (plain.conv_rank, plain.conv_alpha) == (8, 4.0)
    assert plain.options == {}
    assert plain.plain
    assert read_lycoris(values("", network_dim=None)).rank == 4
    dylora = read_lycoris(values("algo=dylora"))
    assert dylora.options == {"block_size": 4}
    assert read_lycoris(values("algo=dylora unit=2")).options == {"block_size": 2}


@pytest.mark.parametrize(
    ("words", "algorithm", "options"),
    [
        ("algo=locon use_cp=True", "lora", {"use_tucker": True}),
        ("algo=dora", "lora", {"weight_decompose": True}),
        ("algo=LoHa weight_decompose=true wd_on_output=False", "loha", {"weight_decompose": True, "wd_on_out": False}),
        ("algo=oft constrain=0.01 rescaled=1", "diag-oft", {"constraint": 0.01, "rescaled": True}),
        ("algo=lokr factor=-1 decompose_both=False full_matrix=True", "lokr", {"factor": -1, "full_matrix": True}),
    ],
)
def test_spellings_of_kohya_ss(words: str, algorithm: str, options: dict[str, Any]) -> None:
    assert checked(words) == ([], [])
    chosen = read_lycoris(values(words))
    assert chosen.algorithm == algorithm
    assert {name: value for name, value in chosen.options.items() if value is not False or name in options} == options


def test_text_of_a_file_is_a_truth_value_too() -> None:
    # sd-scripts takes bool("False") for true.
    arguments = {"algo": "lora", "dora_wd": "False", "use_tucker": "True", "rank_dropout": "0.25"}
    chosen = read_lycoris(values("") | {"network_args": arguments})
    assert (chosen.decomposed, chosen.options["use_tucker"], chosen.rank_dropout) == (False, True, 0.25)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_each_algorithm_takes_its_own_arguments_alone(algorithm: str) -> None:
    for name, argument in ARGUMENTS.items():
        value = {bool: "True", int: "4", float: "0.5"}[argument.kind]
        more = " dora_wd=True" if name == "wd_on_output" and algorithm in argument.algorithms else ""
        more += " rank_dropout=0.1" if name == "rank_dropout_scale" and algorithm in argument.algorithms else ""
        words = f"algo={algorithm} {name}={value}{more}"
        problems, warnings = checked(words, network_dim=None, network_alpha=1.0)
        assert bool(problems) == (algorithm not in argument.algorithms | argument.idle), (name, problems)
        assert bool(warnings) == (algorithm in argument.idle), (name, warnings)
        for problem in problems:
            assert f"{name}={value}" in problem or "True" in problem
            assert f"algo={algorithm} does not take it; remove it; it belongs to" in problem
        # What kohya_ss writes where nothing is chosen says nothing.
        assert checked(f"algo={algorithm} {name}={'False' if argument.kind is bool else '0'}")[0] == []
    assert {"algo", "preset", "module_dropout", "train_norm"} <= set(accepted_by(algorithm))


@pytest.mark.parametrize(
    ("words", "more", "reason"),
    [
        ("algo=lorax", {}, "algo=lorax'?: is no algorithm of LyCORIS that can be trained; use lora, loha"),
        ("algo=loha rank=4", {}, "rank=4'?: is no argument of a LyCORIS network; loha takes algo, preset, conv_dim"),
        ("rank_dropout=1.5", {}, "must be a number from 0 to below 1"),
        ("conv_dim=2.5", {}, "must be a whole number from 1"),
        ("use_tucker=maybe", {}, "must be True or False"),
        ("preset=attn", {}, "is no preset .* use full, full-lin, attn-mlp"),
        ("algo=dylora block_size=3", {}, "block_size=3'?: must divide the rank, which is 8"),
        ("use_cp=True use_tucker=True", {}, "use_cp and use_tucker mean the same"),
        ("algo=full", {"network_dropout": 0.1}, "--network_dropout = 0.1: full has no dropout of values"),
        ("", {"dim_from_weights": True}, "--dim_from_weights: is of networks.lora alone"),
        ("algo=loha", {"output_lora_format": "diffusers"}, "diffusers reads no algo=loha"),
        ("dora_wd=True", {"output_lora_format": "diffusers"}, "diffusers reads no DoRA in kohya's form"),
        ("algo=loha", {"network_module": "networks.lokr"}, "networks.lokr is an algorithm of its own"),
        ("preset=full", {"network_module": "networks.lokr"}, "networks.lokr has no presets"),
        ("conv_dim=4", {"network_module": "networks.dylora"}, "networks.dylora has one rank, network_dim 8"),
        ("unit=3", {"network_module": "networks.dylora"}, "unit=3'?: must divide the rank"),
        ("loraplus_lr_ratio=4", {}, "loraplus_lr_ratio=4'?: is an argument of networks.lora; lora takes"),
    ],
)
def test_what_cannot_be_is_refused(words: str, more: dict[str, Any], reason: str) -> None:
    problems, _ = checked(words, **more)
    assert len(problems) == 1
    with pytest.raises(ConfigError, match=reason):
        raise ConfigError(*problems)


def test_what_does_nothing_is_told() -> None:
    assert checked("bypass_mode=True")[1] == [
        "--network_args: bypass_mode=True has no effect: how a change is computed is chosen here, and gives the same"
    ]
    assert "dora_wd is not given" in checked("wd_on_output=True")[1][0]
    assert "rank_dropout is not given" in checked("rank_dropout_scale=True")[1][0]
    assert "algo=ia3 has no such thing" in checked("algo=ia3 conv_dim=1 conv_alpha=1")[1][0]


def test_sd_scripts_own_networks_are_algorithms_without_convolutions_unless_they_have_a_rank() -> None:
    for module, algorithm in (("networks.dylora", "dylora"), ("networks.loha", "loha"), ("networks.lokr", "lokr")):
        plain = read_lycoris(values("", network_module=module))
        assert (plain.algorithm, plain.preset) == (algorithm, "attn-mlp")
        assert read_lycoris(values("conv_dim=8", network_module=module)).preset == "full"
    assert read_lycoris(values("", network_module="networks.dylora")).options == {"block_size": 1}


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        ("networks.lora_fa", "is not trained here; write networks.lora"),
        ("networks.oft", "is not trained here; write lycoris.kohya with network_args algo=diag-oft"),
        ("lycoris.loha", "must be one of|did you mean"),
    ],
)
def test_other_networks_name_their_substitute(
    module: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--pretrained_model_name_or_path", str(tmp_path), "--output_dir", str(tmp_path / "out")]
    assert main([*arguments, "--network_module", module]) == 2
    assert re.search(reason, capsys.readouterr().err)


def test_the_command_line_and_the_rules_are_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--output_dir out --network_module lycoris.kohya --network_args algo=ia3 factor=4 rank=2".split()
    assert main(["--pretrained_model_name_or_path", str(tmp_path), *arguments]) == 2
    told = capsys.readouterr().err
    assert "--network_args = 'factor=4': algo=ia3 does not take it; remove it; it belongs to lokr" in told
    assert "rank=2" in told


def test_every_other_name_stands_for_an_argument() -> None:
    assert set(OTHER_NAMES.values()) <= set(ARGUMENTS)
    assert not set(OTHER_NAMES) & set(ARGUMENTS)
