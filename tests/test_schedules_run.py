"""Schedules in a run and from a configuration, and the picture of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sd_train.__main__ import main
from sd_train.commands.schedule_plot import (
    COLOURS,
    HEIGHT,
    SHADE,
    WIDTH,
    Plot,
    draw_plot,
    nice_ticks,
    place,
    rate_text,
    thinned,
)
from sd_train.config.parser import load_run_config
from sd_train.errors import ConfigError
from sd_train.optim.schedules import ScheduleOptions, make_schedule
from tests.runs import differences, scalars, train, write_dataset

CURVE = {"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 2, "lr_warmup_steps": 40}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dataset.toml").write_text("")
    return tmp_path


def load(text: str) -> Any:
    Path("run.toml").write_text(
        f'pretrained_model_name_or_path = "m"\ndataset_config = "dataset.toml"\noutput_dir = "o"\n{text}'
    )
    return load_run_config("train_network", ["--config_file", "run.toml"])


# Configuration


@pytest.mark.usefixtures("folder")
class TestConfiguration:
    def test_options_arrive(self) -> None:
        optimizer = load(
            'lr_scheduler = "warmup_stable_decay"\nlr_warmup_steps = "10%"\nlr_decay_steps = 0.25\n'
            'lr_scheduler_num_cycles = "1"\nlr_scheduler_power = "1"\nlr_scheduler_timescale = 0\n'
            'lr_scheduler_min_lr_ratio = "0.1"\nlr_scheduler_type = ""\nlr_scheduler_args = ["decay_type=linear"]\n'
        ).config.optimizer
        ours = make_schedule(ScheduleOptions.of(optimizer, {"unet": 1e-4}), 100)
        assert (ours.warmup_steps, ours.decay_steps) == (10, 25)
        assert [round(ours.factor(step), 6) for step in (0, 10, 75, 85, 100)] == [0.1, 1.0, 1.0, 0.64, 0.1]

    def test_step_rules_arrive_with_and_without_quotes(self) -> None:
        for rules in ("'1:10,0.1'", "1:10,0.1"):
            optimizer = load(
                f'lr_scheduler = "piecewise_constant"\nlr_scheduler_args = ["step_rules={rules}"]'
            ).config.optimizer
            ours = make_schedule(ScheduleOptions.of(optimizer, {}), 20)
            assert [ours.factor(step) for step in (0, 9, 10)] == [1.0, 1.0, 0.1]

    def test_what_is_ignored_is_named_with_its_place(self) -> None:
        with pytest.raises(ConfigError) as caught:
            load("lr_warmup_steps = 10\nlr_scheduler_power = 2.0\nlr_scheduler_args = ['T_max=3']")
        lines = str(caught.value)
        assert lines.count("run.toml:") == 3
        assert "run.toml:4: lr_warmup_steps = 10: constant does not use it; remove it, or choose" in lines
        assert "run.toml:5: lr_scheduler_power = 2.0: constant does not use it" in lines
        assert "run.toml:6: lr_scheduler_args = 'T_max=3': constant takes no such argument; remove it" in lines

    def test_a_class_replaces_lr_scheduler_with_a_word(self) -> None:
        loaded = load('lr_scheduler = "cosine"\nlr_scheduler_type = "StepLR"\nlr_scheduler_args = ["step_size=3"]')
        assert [warning.partition(": ")[2] for warning in loaded.warnings] == [
            "lr_scheduler has no effect: lr_scheduler_type is given, as in sd-scripts"
        ]
        with pytest.raises(ConfigError, match=r"lr_warmup_steps = 3: torch\.optim\.lr_scheduler\.StepLR does not use"):
            load('lr_scheduler_type = "StepLR"\nlr_scheduler_args = ["step_size=3"]\nlr_warmup_steps = 3')


# The picture


def picture(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.asarray(Image.open(path).convert("RGB"))


def pixel(path: Path, at: tuple[float, float]) -> tuple[int, ...]:
    return tuple(int(value) for value in picture(path)[int(at[1]), int(at[0])])


def shape_of(total: int, curves: dict[str, tuple[float, ...]], updates: tuple[int, ...]) -> Plot:
    return Plot("", "", updates, curves, 0, 0, total)


def test_the_picture_shows_the_rates(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "schedule plot --output rates.png --max_train_steps 400 --unet_lr 1e-4 --text_encoder_lr 4e-5".split()
    assert main([*words, *(word for name, value in CURVE.items() for word in (f"--{name}", str(value)))]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "cosine_with_restarts, 400 updates: rates.png" in said.out
    assert "unet: highest 0.0001, at the last update" in said.out
    path = folder / "rates.png"
    assert picture(path).shape == (HEIGHT, WIDTH, 3)
    plot = shape_of(400, {"unet": (1e-4,), "text_encoder": (4e-5,)}, (1,))
    ours = make_schedule(ScheduleOptions(**CURVE, rates={"unet": 1e-4}), 400)  # type: ignore[arg-type]
    for update in (20, 80, 120, 300, 350):
        factor = ours.factor(update - 1)
        for rate, colour in ((1e-4, COLOURS[0]), (4e-5, COLOURS[1])):
            across, down = place(plot, update, rate * factor)
            assert pixel(path, (across, down)) == colour, (update, rate)
            assert pixel(path, (across, down - 15)) in ((255, 255, 255), SHADE, (222, 222, 226))
    # Behind the warm-up it is shaded, and nowhere else.
    assert pixel(path, place(plot, 39, 0.97e-4)) == SHADE
    assert pixel(path, place(plot, 42, 0.75e-4)) == (255, 255, 255)
    # Nothing is left beside it but the picture.
    assert sorted(path.name for path in folder.iterdir()) == ["dataset.toml", "rates.png"]


def test_a_model_and_a_dataset_give_the_length(
    small_model: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_dataset(folder / "photos.toml")
    words = ["schedule", "plot", "train_network", "--output=a.png", "--pretrained_model_name_or_path", str(small_model)]
    words += ["--dataset_config", str(dataset), "--output_dir", "out", "--lr_scheduler", "rex"]
    lengths = []
    for epochs in ("1", "3"):
        assert main([*words, "--max_train_epochs", epochs]) == 0
        lengths.append(int(capsys.readouterr().out.partition("rex, ")[2].split()[0]))
    assert lengths[1] == 3 * lengths[0] > 3
    # The file is a whole picture, and no run has begun.
    assert picture(folder / "a.png").shape == (HEIGHT, WIDTH, 3)
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("plot --lr_scheduler linear", "--output: is required"),
        ("plot --output rates.jpg", "--output = 'rates.jpg': must be a file that ends in .png"),
        ("plot --output", "--output = '': must be a file"),
        ("plot --output a.png --output b.png", "--output = 'b.png': is no option"),
        ("plot --output folder.png", "--output = 'folder.png': is a folder"),
        ("plot fine --output a.png", "'fine' is no training command"),
        ("plot --output a.png train_network", "train_network: stands before the first option"),
        ("draw", "'draw' is nothing it does"),
        ("plot --output a.png --max_train_epochs 3", "--max_train_epochs = 3: how many updates that is depends"),
        ("plot train_textual_inversion --output a.png --max_train_epochs 3 --pretrained_model_name_or_path m "
         "--dataset_config dataset.toml --init_word cat", "give them too (--token_string)"),
        ("plot --output a.png --learning_rate 0", "no learning rate above 0"),
        ("plot --output a.png --lr_scheduler_power 3", "--lr_scheduler_power = 3.0: constant does not use it"),
        ("plot --output a.png --lr_warmup 3", "--lr_warmup = '3': is no option; names are not shortened"),
        ("plot --output a.png --lr_scheduler_type Nix", "torch.optim.lr_scheduler has no class Nix"),
        ("plot --output a.png --lr_scheduler linear --lr_warmup_steps 1601", "is longer than the training"),
    ],
)
def test_refused(folder: Path, capsys: pytest.CaptureFixture[str], words: str, expected: str) -> None:
    (folder / "folder.png").mkdir()
    assert main(["schedule", *words.split()]) == 2
    message = capsys.readouterr().err
    assert expected in message
    # What is put in place of a model and a dataset is not spoken of.
    assert "problems" not in message
    assert not (folder / "a.png").exists()


def test_the_picture_has_the_one_rate_of_those_that_take_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = "--unet_lr 1 --text_encoder_lr 0.5 --max_train_steps 4 --optimizer_type"
    assert main(["schedule", "plot", "--output", "rates.png", *more.split(), "Prodigy"]) == 0
    assert "unet, text_encoder: highest 1, at the last update 1\n" in capsys.readouterr().out
    assert main(["schedule", "plot", "--output", "rates.png", *more.split(), "AdamW"]) == 0
    assert "text_encoder: highest 0.5, at the last update 0.5\n" in capsys.readouterr().out


@pytest.mark.parametrize(("total", "points"), [(1, 1), (2, 2), (50, 50), (1_000_000, 20_000)])
def test_pictures_of_any_length(total: int, points: int) -> None:
    updates = tuple(range(1, total + 1, total // points))
    drawn = np.asarray(draw_plot(shape_of(total, {"unet": (1e-4,) * len(updates)}, updates)))
    across, down = place(shape_of(total, {"unet": (1e-4,)}, (1,)), updates[-1], 1e-4)
    assert tuple(drawn[int(down), min(int(across), WIDTH - 1)]) == COLOURS[0]


def test_no_peak_is_lost_between_columns() -> None:
    points = [(0.1, 5.0), (0.2, 9.0), (0.3, 1.0), (0.9, 4.0), (1.5, 3.0), (1.6, 3.0)]
    assert thinned(points) == [*points[:4], points[4], points[5]]
    many = [(number / 1000, float(number % 7)) for number in range(5000)]
    assert len(thinned(many)) <= 20
    assert {down for _, down in thinned(many)} >= {0.0, 6.0}


def test_axes_are_round() -> None:
    assert nice_ticks(1.06e-4, 8) == pytest.approx([0, 2e-5, 4e-5, 6e-5, 8e-5, 1e-4])
    assert nice_ticks(1600, 8) == [0, 200, 400, 600, 800, 1000, 1200, 1400, 1600]
    assert nice_ticks(0, 8) == [0]
    for highest in (1, 3, 7, 12, 99, 12345):
        ticks = nice_ticks(highest, 8)
        assert 4 <= len(ticks) <= 9
        assert highest - (ticks[1] - ticks[0]) < ticks[-1] <= highest
    assert [rate_text(rate) for rate in (0, 2.5e-4, 1e-6, 0.05, 1.0, 12.5, 4e5)] == [
        "0", "2.5e-4", "1e-6", "0.05", "1", "12.5", "4e5",
    ]  # fmt: skip


# In a run


def test_a_plan_names_what_is_wrong_with_a_schedule_beside_the_rest(
    small_model: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--pretrained_model_name_or_path", str(small_model), "--dataset_config", "dataset.toml"]
    words += "--output_dir o --lr_scheduler_type StepLR --lr_scheduler_args stepsize=3 --optimizer_args nix=1".split()
    assert main(["plan", "train_network", *words]) == 2
    message = capsys.readouterr().err
    assert "--optimizer_args = nix: AdamW takes no such argument" in message
    assert "--lr_scheduler_args = stepsize=3: torch.optim.lr_scheduler.StepLR refuses them" in message
    assert "it takes step_size, gamma, last_epoch" in message
    assert "dataset.toml: has no [[datasets]]" in message


def test_a_run_logs_the_curve_and_goes_on_where_it_stopped(small_model: Path, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "dataset.toml")
    more = (
        "--max_train_steps 6 --network_train_unet_only --gradient_accumulation_steps 2 --lr_scheduler_type "
        "CosineAnnealingWarmRestarts --lr_scheduler_args T_0=4 eta_min=1e-5 --save_state --save_every_n_steps 3"
    )
    whole = train(small_model, dataset, tmp_path / "whole", f"{more} --logging_dir {tmp_path / 'logs'}")
    ours = make_schedule(
        ScheduleOptions(
            lr_scheduler_type="CosineAnnealingWarmRestarts",
            lr_scheduler_args={"T_0": 4, "eta_min": 1e-5},
            rates={"unet": 1e-3},
        ),
        6,
    )
    logged = next(curve for name, curve in scalars(tmp_path / "logs").items() if name.startswith("lr/"))
    assert [step for step, _ in logged] == [1, 2, 3, 4, 5, 6]
    assert [rate for _, rate in logged] == pytest.approx([1e-3 * ours.factor(step) for step in range(6)], rel=1e-5)
    state = tmp_path / "whole" / "lora-step00000003-state"
    again = train(small_model, dataset, tmp_path / "again", f"{more} --resume {state}")
    assert differences(whole, again) == []
