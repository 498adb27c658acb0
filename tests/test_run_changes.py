"""Runs that follow an earlier one: in its place, after it, or with something changed."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sd_train.train_network import main
from tests.runs import PHOTOS, differences, metadata, train, words, write_dataset

STATES = "--max_train_steps 2 --save_every_n_steps 1 --save_state --network_train_unet_only"


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "d.toml")


@pytest.fixture
def run(small_model: Path, dataset: Path, tmp_path: Path) -> Path:
    """The folder of a run of two updates with a state after each."""
    train(small_model, dataset, tmp_path / "run", STATES)
    return tmp_path / "run"


def test_overwriting_leaves_nothing_of_the_earlier_run(
    run: Path, small_model: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shorter = "--max_train_steps 1 --save_every_n_steps 1 --save_state --network_train_unet_only --overwrite --seed 4"
    train(small_model, dataset, run, shorter)
    assert not (run / "lora-step00000002-state").exists()
    assert not (run / "lora-step00000002.safetensors").exists()
    capsys.readouterr()
    # Without --seed, which `words` gives: the state's own holds.
    arguments = words(small_model, dataset, run, "--max_train_steps 2 --network_train_unet_only --resume latest")
    place = arguments.index("--seed")
    assert main(arguments[:place] + arguments[place + 2 :]) == 0
    assert "seed: 4" in capsys.readouterr().out


def test_overwriting_removes_the_pictures_of_the_earlier_run_alone(
    small_model: Path, dataset: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1")
    drawing = f"--max_train_steps 1 --network_train_unet_only --sample_prompts {prompts} --sample_at_first"
    train(small_model, dataset, tmp_path / "run", drawing)
    (old,) = (tmp_path / "run" / "sample").iterdir()
    kept = old.with_name("other_e000000_00_20200101000000.png")
    old.rename(old.with_name("lora_e000000_00_20200101000000.png"))
    kept.write_bytes(b"not ours")
    train(small_model, dataset, tmp_path / "run", f"{drawing} --overwrite")
    (new,) = set((tmp_path / "run" / "sample").iterdir()) - {kept}
    assert new.name != "lora_e000000_00_20200101000000.png"


def test_latest_is_what_was_saved_last(
    run: Path, small_model: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Back to the first step, and on from there with another rate, up to a step before the old end.
    state = run / "lora-step00000001-state"
    other = "--learning_rate 5e-4 --network_train_unet_only --save_state"
    train(small_model, dataset, run, f"{other} --max_train_steps 3 --resume {state}")
    assert "lora-step00000002.safetensors: saved at later steps" in capsys.readouterr().err
    train(small_model, dataset, run, f"{other} --max_train_steps 4 --resume latest")
    said = capsys.readouterr().out
    assert "lora-state at step 3 of 4" in said


def test_a_training_that_diverges_ends(
    small_model: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hot = "--max_train_steps 200 --network_train_unet_only --learning_rate 1e5 --cache_latents"
    assert main(words(small_model, dataset, tmp_path, hot)) == 4
    said = capsys.readouterr().err
    assert re.search(r"error: stopped before update \d+ \((its loss|the norm of its gradients|the weights)", said)
    assert not (tmp_path / "lora.safetensors").exists()


def test_another_folders_files_are_not_replaced_by_a_resumed_run(
    run: Path, small_model: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    finished = train(small_model, dataset, other, "--max_train_steps 1 --network_train_unet_only")
    before = finished.read_bytes()
    state = run / "lora-step00000001-state"
    assert main(words(small_model, dataset, other, f"{STATES} --resume {state}")) == 2
    assert "holds another run's files" in capsys.readouterr().err
    assert finished.read_bytes() == before
    elsewhere = train(small_model, dataset, tmp_path / "empty", f"{STATES} --resume {state}")
    assert differences(elsewhere, run / "lora.safetensors") == []


def test_changed_optimizer_arguments_act_after_a_resume(
    run: Path, small_model: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = run / "lora-step00000001-state"
    more = f"{STATES} --resume {state} --optimizer_args weight_decay=0.9"
    decayed = train(small_model, dataset, tmp_path / "decayed", more)
    assert "changed since the state was saved: optimizer_args" in capsys.readouterr().err
    assert differences(decayed, run / "lora.safetensors")


def test_broken_states_that_latest_passes_over_are_named(
    run: Path, small_model: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for broken in ("lora-step00000002-state", "lora-state"):
        (run / broken / "manifest.json").unlink()
    train(small_model, dataset, run, f"{STATES} --resume latest")
    said = "".join(capsys.readouterr())
    assert "lora-step00000002-state: is no sealed state" in said
    assert "resumed" in said
    assert "lora-step00000001-state at step 1 of 2" in said


def test_weights_of_both_networks_start_one_of_them(
    small_model: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = train(small_model, dataset, tmp_path / "both", "--max_train_steps 1")
    one = f"--max_train_steps 1 --network_train_unet_only --network_weights {both}"
    started = load_file(train(small_model, dataset, tmp_path / "one", one))
    assert all(name.startswith("lora_unet_") for name in started)
    assert main(words(small_model, dataset, tmp_path / "rank", f"{one} --network_dim 8")) == 3
    assert "the file fits --network_dim 4 --network_alpha 4" in capsys.readouterr().err
    half = {name: tensor for name, tensor in load_file(both).items() if name.startswith("lora_te")}
    save_file(half, tmp_path / "te.safetensors")
    wrong = f"--max_train_steps 1 --network_weights {tmp_path / 'te.safetensors'}"
    assert main(words(small_model, dataset, tmp_path / "te", wrong)) == 3
    assert "--network_train_text_encoder_only" in capsys.readouterr().err
    assert main(words(small_model, dataset, tmp_path / "base", f"--network_weights {small_model}")) == 3
    assert "holds no LoRA" in capsys.readouterr().err


def test_a_picture_that_breaks_during_the_training_costs_no_update(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(PHOTOS, photos)
    dataset = write_dataset(tmp_path / "d.toml")
    dataset.write_text(dataset.read_text().replace(str(PHOTOS), str(photos)))
    # The header still tells the size; the pixels are gone.
    chelsea = photos / "chelsea.jpg"
    chelsea.write_bytes(chelsea.read_bytes()[:3000])
    output = tmp_path / "out"
    code = main(words(small_model, dataset, output, "--max_train_steps 12 --network_train_unet_only"))
    assert code == 3
    said = capsys.readouterr().err
    assert "chelsea.jpg" in said
    (saved,) = output.glob("lora-step*.safetensors")
    assert metadata(saved)["ss_steps"] == str(int(saved.stem.removeprefix("lora-step")))
    assert f"go on with --resume {output / saved.stem}-state" in said


def test_what_cannot_be_overwritten_is_named(
    run: Path, small_model: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Root may delete everything, so the refusal of the file system is put in here.
    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    assert main(words(small_model, dataset, run, "--max_train_steps 1 --network_train_unet_only --overwrite")) == 4
    said = capsys.readouterr().err
    assert "cannot be deleted for --overwrite (Permission denied)" in said
