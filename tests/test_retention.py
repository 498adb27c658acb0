"""Which saves a run keeps: intervals of updates, epochs and minutes, and what is deleted when."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sd_train.config.output_options import SavingOptions
from sd_train.names import FileNames, Moment
from sd_train.plan_outputs import epoch_interval, save_rules
from sd_train.retention import Retention
from tests.runs import train, write_dataset


def test_the_rules_of_sd_scripts() -> None:
    # Saves every 10 updates of which the last 30 updates are kept: after 50, sd-scripts deletes 10.
    steps = Retention(steps=30, steps_state=10)
    assert [n for n in range(10, 51, 10) if steps.is_old(("step", n), ("step", 50), False)] == [10]
    assert [n for n in range(10, 51, 10) if steps.is_old(("step", n), ("step", 50), True)] == [10, 20, 30]
    # Saves every 2 epochs of which 3 are kept: after epoch 10 those of 6, 8 and 10.
    _, epochs = save_rules(SavingOptions(output_dir=Path("out"), save_every_n_epochs=2, save_last_n_epochs=3), 20)
    assert [n for n in range(2, 11, 2) if epochs.is_old(("epoch", n), ("epoch", 10), False)] == [2, 4]
    # States follow the models where nothing else is said.
    assert [n for n in range(2, 11, 2) if epochs.is_old(("epoch", n), ("epoch", 10), True)] == [2, 4]
    for moment in (("step", 1), ("epoch", 1)):
        other: Moment = ("epoch", 99) if moment[0] == "step" else ("step", 99)
        assert not Retention(1, 1, 1, 1).is_old(moment, other, False)  # type: ignore[arg-type]
        assert not Retention().is_old(moment, (moment[0], 99), False)  # type: ignore[arg-type]


@pytest.mark.parametrize(("epochs", "ratio", "every"), [(10, 3, 3), (10, 20, 1), (10, 10, 1), (7, 2, 3), (1, 1, 1)])
def test_a_ratio_of_epochs_sets_their_interval(epochs: int, ratio: int, every: int) -> None:
    chosen = SavingOptions(output_dir=Path("out"), save_every_n_epochs=2, save_n_epoch_ratio=ratio)
    assert epoch_interval(chosen, epochs) == every


def test_only_files_of_the_run_are_found(tmp_path: Path) -> None:
    names = FileNames(tmp_path, "frog")
    kept = ["frog.safetensors", "frog-best.safetensors", "toad-step00000001.safetensors", "frog-step1.safetensors",
            "frog-step00000001.txt", "frog-000001.safetensors", "notes.txt"]  # fmt: skip
    old = ["frog-step00000001-ema.safetensors", "frog-step00000001.safetensors"]
    for name in (*kept, *old):
        (tmp_path / name).write_bytes(b"x")
    state = tmp_path / "frog-step00000001-state"
    state.mkdir()
    (state / "manifest.json").write_text("{}")
    warnings: list[str] = []
    gone = Retention(1, 1, 1, 1).delete(names, ("step", 9), warnings.append)
    assert [path.name for path in gone] == [*sorted(old), state.name]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
    assert warnings == []


def test_what_cannot_be_deleted_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "frog-000001.safetensors"
    path.write_bytes(b"x")

    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    warnings: list[str] = []
    assert Retention(epochs=1).delete(FileNames(tmp_path, "frog"), ("epoch", 2), warnings.append) == []
    assert warnings == [f"{path}: is old and cannot be deleted (Permission denied); check its permissions"]


def test_a_run_keeps_what_it_is_told_to(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset, output = write_dataset(tmp_path / "photos.toml"), tmp_path / "out"
    more = "--max_train_epochs 4 --train_batch_size 2 --save_state --save_every_n_steps 2 --save_last_n_steps 4 "
    more += "--save_last_n_steps_state 2 --save_every_n_epochs 1 --save_last_n_epochs 1 --save_last_n_epochs_state 2"
    train(tiny_model, dataset, output, f"{more} --use_ema")
    # Six photographs are three updates an epoch; the last epoch is the final file.
    models = {f"lora{stem}{end}.safetensors" for stem in ("", "-step00000008", "-step00000010", "-step00000012",
              "-000003") for end in ("", "-ema")}  # fmt: skip
    states = {f"lora{stem}-state" for stem in ("", "-step00000010", "-step00000012", "-000002", "-000003")}
    assert {path.name for path in output.iterdir()} == models | states | {"lora-config.toml"}
    told = capsys.readouterr().err
    # The training goes on meanwhile, and may say so between the two.
    saved, deleted = r"saved [^\n]*lora-step00000008\.safetensors", r"deleted lora-step00000002-ema\.safetensors, "
    assert re.search(f"(?s){saved}.*{deleted}", told)
    assert re.search(r"lora-step00000004-state", told)


def test_minutes_and_options_without_effect(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset, output = write_dataset(tmp_path / "photos.toml"), tmp_path / "out"
    more = "--max_train_steps 4 --train_batch_size 2 --save_every_n_minutes 1e-9 --save_last_n_epochs 2 "
    more += "--async_save never "
    train(tiny_model, dataset, output, f"{more} --save_last_n_steps_state 3")
    # Every update is more than that after the last save; the first one starts the clock.
    saved = {f"lora-step{step:08d}.safetensors" for step in (2, 3, 4)}
    assert {path.name for path in output.glob("lora-step*")} >= saved
    told = capsys.readouterr().err
    assert "--save_last_n_epochs has no effect: neither save_every_n_epochs nor save_n_epoch_ratio is given" in told
    assert "--save_last_n_steps_state has no effect: save_state is not given" in told
