"""Optimizers in whole runs: what is decided and said before the first update, what is saved, and how it goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sd_train.__main__ import main as sd_train
from sd_train.config.options import RunConfig
from sd_train.config.parser import load_run_config
from sd_train.errors import ConfigError
from sd_train.optim.settle import Settled, settle
from sd_train.train_network import main
from tests.runs import differences, scalars, train, words, write_dataset

BOTH = {"unet": 1.0, "text_encoder": 0.5, "text_encoder_2": 0.5}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset") / "photos.toml", subset="flip_aug = true")


def config_of(photos: Path, more: str) -> RunConfig:
    given = f"--pretrained_model_name_or_path a/b --dataset_config {photos} --output_dir out --output_name lora {more}"
    return load_run_config("train_network", given.split()).config


def settled(photos: Path, more: str) -> Settled:
    return settle(config_of(photos, more), BOTH)


@pytest.mark.parametrize(
    ("more", "relative", "note"),
    [
        ("", True, None),
        ("--learning_rate 1e-4", False, "--learning_rate = 0.0001: AdaFactor goes by it; sd-scripts would put"),
        ("--unet_lr 1e-4", False, "--unet_lr = 0.0001: AdaFactor goes by it"),
        ("--learning_rate 1e-4 --optimizer_args relative_step=True", True, "--learning_rate = 0.0001 has no effect"),
        ("--learning_rate 1e-4 --optimizer_args relative_step=False scale_parameter=False", False, None),
        ("--optimizer_args warmup_init=True", True, None),
        ("--learning_rate 1e-4 --optimizer_args warmup_init=True", True, "--learning_rate = 0.0001 has no effect"),
        ("--lr_scheduler adafactor", True, None),
        ("--lr_scheduler adafactor --optimizer_type transformers.Adafactor", True, None),
        ("--lr_scheduler adafactor:1e-4 --learning_rate 1e-4", True, "--learning_rate = 0.0001 has no effect"),
    ],
)
def test_adafactor_never_replaces_a_rate_silently(photos: Path, more: str, relative: bool, note: str | None) -> None:
    found = settled(photos, f"--optimizer_type adafactor {more}")
    assert found.config.optimizer.optimizer_args["relative_step"] is relative
    assert len(found.notes) == (note is not None)
    assert note is None or note in found.notes[0]
    # What is written into the run's file says the same, whatever is a default there.
    again = settle(found.config, BOTH)
    assert again.config == found.config


def test_no_schedule_where_none_is_used(photos: Path) -> None:
    schedule = "--lr_scheduler cosine --lr_warmup_steps 5"
    for name in ("AdamWScheduleFree", "prodigy-plus-schedule-free", "AdaFactor"):
        found = settled(photos, f"--optimizer_type {name} {schedule}")
        assert found.config.optimizer.lr_scheduler == "constant"
        assert found.config.optimizer.lr_warmup_steps == 0
        assert "--lr_scheduler = cosine, --lr_warmup_steps = 5 has no effect: " in found.notes[0]
        assert not settled(photos, f"--optimizer_type {name}").notes
    for more in ("AdamW", "AdaFactor --unet_lr 1", "ProdigyPlusScheduleFree --optimizer_args use_schedulefree=False"):
        assert settled(photos, f"{schedule} --optimizer_type {more}").config.optimizer.lr_scheduler == "cosine"


def test_several_rates_with_those_that_take_one(photos: Path) -> None:
    for name in ("Prodigy", "DAdaptation", "DAdaptLion"):
        (note,) = settled(photos, f"--optimizer_type {name}").notes
        assert note.endswith(
            "takes one learning rate for all parameters: of those given (unet 1, text_encoder 0.5) only the first one "
            "is effective, 1 for all"
        )
    assert not settled(photos, "--optimizer_type AdamW").notes
    assert not settled(photos, "--optimizer_type ProdigyPlusScheduleFree").notes
    assert not settle(config_of(photos, "--optimizer_type Prodigy"), {"unet": 0.5}).notes


def test_blocks_and_lora_plus_get_the_one_rate_too(photos: Path, small_model: Path, tmp_path: Path,
                                                   capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    config = config_of(photos, "--optimizer_type Prodigy")
    blocks = replace(config, full=config.full.model_copy(update={"block_lr": (0.0, 0.5, *[1.0] * 21)}))
    found = settle(blocks, {"unet": 1.0, "text_encoder": 2.0})
    assert found.config.full.block_lr == (0.0, *[0.5] * 22)
    assert "those given (unet 0.5, text_encoder 2, a block 1) only the first one is effective, 0.5" in found.notes[0]
    assert settle(found.config, {"unet": 0.5}) == Settled(found.config, ())
    own = replace(blocks, optimizer=config.optimizer.model_copy(update={"optimizer_type": "AdamW"}))
    assert settle(own, {"unet": 1.0}).config.full.block_lr == blocks.full.block_lr
    more = "--max_train_steps 2 --unet_lr 1 --text_encoder_lr 0.5"
    more += " --network_args loraplus_lr_ratio=4 down_lr_weight=sine"
    # As absolute rates are refused where rates differ, and here they do not.
    more += " --lr_scheduler_type CosineAnnealingLR --lr_scheduler_args T_max=4 eta_min=0.5"
    train(small_model, photos, tmp_path, f"{more} --optimizer_type Prodigy --logging_dir {tmp_path / 'logs'}")
    said = capsys.readouterr()
    assert "--network_args: down_lr_weight, loraplus_lr_ratio: Prodigy takes one learning rate" in said.err
    assert "learning rates: unet 1, text_encoder 1" in said.out
    curves = scalars(tmp_path / "logs")
    logged = [name for name in curves if name.startswith("lr/") and "*" not in name]
    assert len(logged) > 4
    assert {curves[name][0][1] for name in logged} == {1.0}
    # One with an estimate for each group takes them all.
    more = "--max_train_steps 1 --learning_rate 1 --network_args loraplus_lr_ratio=4 --optimizer_type prodigyplus"
    train(small_model, photos, tmp_path / "plus", f"{more}schedulefree --logging_dir {tmp_path / 'plus_logs'}")
    assert scalars(tmp_path / "plus_logs")["lr/unet plus"][0][1] == 4.0


def test_a_warm_up_from_zero_is_refused_where_it_would_divide_by_zero(photos: Path) -> None:
    warm = "--lr_scheduler constant_with_warmup --lr_warmup_steps 3"
    with pytest.raises(ConfigError, match=r"--lr_warmup_steps = 3: DAdaptSGD divides by .*leave the warm-up away"):
        settled(photos, f"--optimizer_type DAdaptSGD {warm}")
    assert not settled(photos, "--optimizer_type DAdaptSGD --lr_scheduler cosine").notes[1:]


def test_old_flags_name_what_replaces_them(photos: Path) -> None:
    given = f"--pretrained_model_name_or_path a/b --dataset_config {photos} --output_dir out --output_name lora".split()
    for flag, name in {"--use_8bit_adam": "AdamW8bit", "--use_lion_optimizer": "Lion"}.items():
        loaded = load_run_config("train_network", [*given, flag])
        assert loaded.config.optimizer.optimizer_type == name
        assert loaded.warnings == (f"{flag} is an old spelling of optimizer_type = {name}, which is taken",)


def test_the_plan_tells_of_state_in_8_bits(
    small_model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = "--max_train_steps 2 --optimizer_type AdamW8bit"
    assert sd_train(["plan", "train_network", *words(small_model, photos, tmp_path, more)]) == 0
    said = capsys.readouterr()
    assert "AdamW8bit: 8-bit state for 0 of " in said.out
    assert "trained numbers; tensors of fewer than 4,096 keep 32 bits" in said.out
    assert "AdamW8bit saves nothing here: no tensor of this network has the 4,096 numbers" in said.err
    more += " --network_dim 64"
    assert sd_train(["plan", "train_network", *words(small_model, photos, tmp_path, more)]) == 0
    planned = capsys.readouterr()
    assert "saves nothing" not in planned.err
    (line,) = [line for line in planned.out.splitlines() if "8-bit state" in line]
    state = train(small_model, photos, tmp_path, f"{more} --save_state_on_train_end").parent / "lora-state"
    # The run counts its own tensors, and what it keeps is what was told.
    assert line in capsys.readouterr().out.splitlines()
    tensors = load_file(state / "optimizer.safetensors")
    small = sum(tensor.numel() for name, tensor in tensors.items() if name.endswith("state1")
                and tensor.dtype == torch.uint8)
    total = sum(tensor.numel() for name, tensor in tensors.items() if name.endswith("state1"))
    assert f"8-bit state for {small:,} of {total:,} " in line
    assert 0 < small < total


CASES = {
    "AdamWScheduleFree": "--learning_rate 1e-3 --lr_scheduler cosine",
    "DAdaptation": "--unet_lr 1 --text_encoder_lr 0.5",
}


@pytest.mark.parametrize("name", CASES)
def test_a_part_and_the_rest_are_the_whole(small_model: Path, photos: Path, tmp_path: Path, name: str) -> None:
    more = f"--optimizer_type {name} {CASES[name]} --max_train_steps 4 --save_every_n_steps 2"
    logs = tmp_path / "logs"
    whole = train(small_model, photos, tmp_path / "whole", f"{more} --save_state --logging_dir {logs}")
    state = tmp_path / "whole" / "lora-step00000002-state"
    rest = train(small_model, photos, tmp_path / "rest", f"{more} --resume {state}")
    assert differences(whole, rest) == []
    # A schedule-free optimizer trains other weights than it gives.
    trained, given = load_file(tmp_path / "whole" / "lora-state" / "trainable.safetensors"), load_file(whole)
    ups = [key for key in given if key.endswith("lora_up.weight")]
    assert (name == "AdamWScheduleFree") == any(not torch.equal(trained[key], given[key]) for key in ups)
    if name == "DAdaptation":
        curves = scalars(logs)
        assert curves["lr/unet"] == curves["lr/textencoder"]
        assert curves["lr/d*lr/group0"][-1][1] > 0


def test_relative_steps_are_logged(
    small_model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = "--optimizer_type AdaFactor --optimizer_args relative_step=True scale_parameter=False --max_train_steps 2"
    train(small_model, photos, tmp_path, f"{more} --network_train_unet_only --logging_dir {tmp_path / 'logs'}")
    curves = scalars(tmp_path / "logs")
    # The rate of the options, which nothing goes by, is not shown as if it did.
    assert [name for name in curves if name.startswith("lr/")] == ["lr/relative/group0"]
    assert [value for _, value in curves["lr/relative/group0"]] == pytest.approx([0.01, 0.01])
    assert "learning rates: unet: AdaFactor chooses them while it trains" in capsys.readouterr().out
    # With a rate that was given it is the one that is shown.
    given = f"--optimizer_type AdaFactor --max_train_steps 1 --logging_dir {tmp_path / 'given'}"
    train(small_model, photos, tmp_path / "rate", given)
    assert "learning rates: unet 0.001, text_encoder 0.001" in capsys.readouterr().out
    assert scalars(tmp_path / "given")["lr/unet"][0][1] == pytest.approx(1e-3)


def test_pictures_change_nothing(small_model: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat --w 64 --h 64 --s 2\n")
    more = "--optimizer_type AdamWScheduleFree --max_train_steps 2"
    quiet = train(small_model, photos, tmp_path / "quiet", more)
    # Nor do saves.
    pictures = f"--save_every_n_steps 1 --sample_every_n_steps 1 --sample_prompts {tmp_path / 'prompts.txt'}"
    shown = train(small_model, photos, tmp_path / "shown", f"{more} {pictures}")
    assert differences(quiet, shown) == []
    assert len(list((tmp_path / "shown").rglob("*.png"))) == 2


def test_a_state_of_another_package_is_refused(
    small_model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = "--max_train_steps 1 --save_state --optimizer_type torch.optim.Adafactor"
    train(small_model, photos, tmp_path / "a", first)
    more = f"--max_train_steps 2 --optimizer_type Adafactor --resume {tmp_path / 'a' / 'lora-state'}"
    assert main(words(small_model, photos, tmp_path / "b", more)) == 2
    assert "is one of torch.Adafactor" in capsys.readouterr().err
