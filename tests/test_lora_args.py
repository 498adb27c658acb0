"""The arguments of networks.lora: what is read, what is refused, how blocks are counted."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from sd_train.config.network_args import (
    NetworkArgs,
    block_counts,
    idle_arguments,
    read_network_args,
    wrong_counts,
)  # fmt: skip
from sd_train.config.parser import load_run_config
from sd_train.errors import ConfigError, Problems
from sd_train.families.keys import UNetShape, unet_modules
from sd_train.trainables.lora_layout import block_number


def read(**arguments: object) -> tuple[NetworkArgs, list[str]]:
    problems = Problems()
    args = read_network_args(arguments, "--network_args", problems)
    return args, [str(problem) for problem in problems.found]


def test_values_are_read_as_words_numbers_and_lists() -> None:
    args, problems = read(
        conv_dim="8", conv_alpha=4, block_dims="2,0,4", block_alphas=(1, 2.5), conv_block_dims=[1, 2],
        down_lr_weight="1,,0.5", mid_lr_weight=0.5, up_lr_weight="reverse_linear+.25", rank_dropout=0.1,
    )  # fmt: skip
    assert problems == []
    assert (args.conv_dim, args.conv_alpha, args.block_dims, args.block_alphas) == (8, 4.0, (2, 0, 4), (1.0, 2.5))
    assert (args.conv_block_dims, args.down_lr_weight, args.mid_lr_weight) == ((1, 2), (1.0, 0.0, 0.5), (0.5,))
    assert (args.up_lr_weight, args.rank_dropout, args.module_dropout) == ("reverse_linear+.25", 0.1, None)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("conv_dim", "x", "conv_dim = 'x': must be a whole number from 1 to 16384; write for example conv_dim=8"),
        ("conv_dim", 0, "must be a whole number from 1"),
        ("conv_dim", 2.5, "must be a whole number"),
        ("conv_dim", True, "must be a whole number"),
        ("conv_dim", float("inf"), "must be a whole number"),
        ("conv_alpha", -1, "must be a number from 0 on"),
        ("conv_alpha", "nan", "must be a number from 0 on"),
        ("block_dims", "4,x", "block_dims = '4,x': must be whole numbers from 0 on"),
        ("block_dims", "4,,4", "must be whole numbers from 0 on"),
        ("block_alphas", (1, -1), "must be numbers from 0 on"),
        ("down_lr_weight", "cosinus", "or one of cosine, sine, linear, reverse_linear, zeros"),
        ("up_lr_weight", "sine+x", "or one of cosine"),
        ("mid_lr_weight", "sine", "must be numbers from 0 on"),
        ("mid_lr_weight", -0.5, "must be numbers from 0 on"),
        ("rank_dropout", 1, "must be a number from 0 to below 1"),
        ("module_dropout", "much", "must be a number from 0 to below 1"),
        ("loraplus_lr_ratio", 0, "must be a number above 0"),
        ("conv_dims", 4, "conv_dims: unknown to networks.lora; did you mean conv_dim? it takes conv_dim, conv_alpha"),
        ("colour", 4, "colour: unknown to networks.lora; it takes conv_dim"),
        ("dropout", 0.1, "sd-scripts ignores it here; write network_dropout"),
    ],
)
def test_wrong_arguments_name_the_rule_and_the_way_out(name: str, value: object, rule: str) -> None:
    args, (problem,) = read(**{name: value})
    assert rule in problem
    assert args == NetworkArgs()


def test_lists_that_are_not_as_long_as_the_model_has_blocks() -> None:
    args, _ = read(block_dims="4,4", down_lr_weight=",".join(["1"] * 12), mid_lr_weight=0.5, up_lr_weight="sine")
    first, second, third = (str(one) for one in wrong_counts(args, block_counts(sdxl=True), "--network_args"))
    assert "block_dims = 4,4: has 2 values, SDXL needs 23 (1 before, 9 down, 3 mid, 9 up, 1 behind)" in first
    assert "has 12 values, SDXL needs 9; write down_lr_weight=1,1,1,1,1,1,1,1,1, which is what sd-scripts" in second
    assert "write mid_lr_weight=0.5,1,1," in third
    (only,) = wrong_counts(args, block_counts(sdxl=False), "--network_args")
    assert "Stable Diffusion 1.x and 2.x needs 25 (12 down, 1 mid, 12 up)" in str(only)


def test_curves_are_sd_scripts() -> None:
    counts = block_counts(sdxl=False)
    for name, curve in {
        "sine": [math.sin(math.pi * (i / 11) / 2) for i in range(12)],
        "cosine": [math.sin(math.pi * (i / 11) / 2) for i in reversed(range(12))],
        "linear": [i / 11 for i in range(12)],
        "reverse_linear": [i / 11 for i in reversed(range(12))],
        "zeros": [0.0] * 12,
    }.items():
        for added in (0.0, 0.25):
            weights = read(down_lr_weight=name if not added else f"{name}+{added}")[0].block_weights(counts)
            assert weights[:12] == pytest.approx([value + added for value in curve])
            assert weights[12:] == (1.0,) * 13
    sdxl = read(up_lr_weight="zeros", mid_lr_weight="1,0.1,1", block_lr_zero_threshold=0.1)[0]
    assert sdxl.block_weights(block_counts(sdxl=True)) == (*[1.0] * 11, 0.0, 1.0, *[0.0] * 9, 1.0)
    assert read(conv_dim=4)[0].block_weights(counts) == ()


def test_faster_up_matrices_by_network() -> None:
    both = read(loraplus_lr_ratio=16, loraplus_text_encoder_lr_ratio=4)[0].plus
    assert both == {"unet": 16.0, "text_encoder": 4.0, "text_encoder_2": 4.0}
    assert read(loraplus_unet_lr_ratio=2)[0].plus == {"unet": 2.0}
    assert read()[0].plus == {}


def test_arguments_without_effect_are_told() -> None:
    def told(**arguments: object) -> list[str]:
        return [text.partition(" ")[0] for text in idle_arguments(read(**arguments)[0])]

    assert told(conv_alpha=1, block_lr_zero_threshold=0.1) == ["conv_alpha", "block_lr_zero_threshold"]
    assert told(conv_block_alphas="1,1") == ["conv_block_alphas"]
    assert told(conv_dim=2, conv_block_dims="1,1") == ["conv_dim"]
    assert told(conv_dim=2, conv_alpha=1, down_lr_weight="sine", block_lr_zero_threshold=0.1) == []


@pytest.mark.parametrize(
    ("shape", "sdxl"),
    [(UNetShape(), False),
     (UNetShape(((0, 0), (2, 2), (10, 10)), ((10,) * 3, (2,) * 3, (0,) * 3), 10, added=True), True)],
)  # fmt: skip
def test_blocks_are_numbered_as_the_original_checkpoints_number_them(shape: UNetShape, sdxl: bool) -> None:
    found = set()
    for module in unet_modules(shape):
        kind, number = module.original.split(".")[:2]
        if module.kind == "other":
            continue
        expected = {
            "input_blocks": int(number) + sdxl,
            "middle_block": 10 + int(number) if sdxl else 12,
            "output_blocks": 13 + int(number),
        }[kind]
        assert block_number(module.diffusers, sdxl) == expected, module
        found.add(expected)
    # All but those before and behind, in which nothing has a LoRA.
    assert found == set(range(2, 22)) if sdxl else found == set(range(1, 25))


def config_of(tmp_path: Path, *more: str) -> tuple[str, ...]:
    """The warnings of a run with `more` on its command line."""
    (tmp_path / "d.toml").write_text("")
    (tmp_path / "lora.safetensors").write_bytes(b"")
    base = ("--pretrained_model_name_or_path", str(tmp_path / "d.toml"), "--dataset_config", str(tmp_path / "d.toml"))
    written = ("--output_dir", str(tmp_path), "--output_name", "x", "--learning_rate", "1e-4", "--max_train_steps", "1")
    return load_run_config("train_network", [*base, *written, *more]).warnings


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("--dim_from_weights", "--dim_from_weights: there is no file to take ranks from; give a LoRA as"),
        ("--base_weights lora.safetensors --base_weights_multiplier 1 2", "has 2 numbers for 1 base_weights"),
        ("--base_weights none.safetensors", "there is no such file"),
        ("--network_args conv_dim=x rank=4", "--network_args: rank: unknown to networks.lora"),
        ("--scale_weight_norms -1", "--scale_weight_norms"),
    ],
)
def test_options_that_do_not_fit_together(more: str, expected: str, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        config_of(tmp_path, *more.split())
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("--dim_from_weights --network_weights lora.safetensors --network_dim 4", "--network_dim has no effect"),
        ("--dim_from_weights --network_weights lora.safetensors --network_args conv_dim=4",
         "conv_dim has no effect: dim_from_weights"),
        ("--network_train_text_encoder_only --network_args conv_dim=4", "conv_dim has no effect: network_train_text"),
        ("--base_weights_multiplier 2", "base_weights_multiplier has no effect: base_weights is not given"),
        ("--network_args conv_alpha=4", "conv_alpha has no effect: conv_dim is not given"),
        ("--dim_from_weights --network_weights lora.safetensors --resume latest", None),
    ],
)  # fmt: skip
def test_options_without_effect_are_told(more: str, expected: str | None, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    warnings = config_of(tmp_path, *more.split())
    assert any(expected in warning for warning in warnings) if expected else not warnings
