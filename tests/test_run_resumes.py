"""A training that was stopped goes on, or says why not; `test_resume_array.py` has what must be equal to the bit."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from pathlib import Path

import pytest

from sd_train.train_network import main
from tests.runs import command, differences, environment, metadata, train, words, write_dataset


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset file with everything that is drawn at random."""
    subset = "num_repeats = 3\nflip_aug = true\nshuffle_caption = true\nkeep_tokens = 1\ncaption_dropout_rate = 0.1"
    return write_dataset(tmp_path_factory.mktemp("dataset") / "photos.toml", subset=subset)


def test_a_shorter_first_run_and_latest_twice(
    small_model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # With a constant rate the end does not matter: 2 updates, then to 4 and to 6, each time from the newest state.
    more = "--optimizer_type Prodigy --learning_rate 1 --network_train_unet_only"
    whole = train(small_model, photos, tmp_path / "whole", f"{more} --max_train_steps 6")
    parts = tmp_path / "parts"
    train(small_model, photos, parts, f"{more} --max_train_steps 2 --save_state_on_train_end")
    capsys.readouterr()
    train(small_model, photos, parts, f"{more} --max_train_steps 4 --resume latest --save_every_n_steps 3 --save_state")
    assert f"resumed {parts / 'lora-state'} at step 2 of 4" in capsys.readouterr().out
    assert {path.name for path in parts.glob("*-state")} == {"lora-state", "lora-step00000003-state"}
    # A state without its seal does not count.
    (parts / "lora-state" / "manifest.json").unlink()
    last = train(small_model, photos, parts, f"{more} --max_train_steps 6 --resume latest")
    assert f"resumed {parts / 'lora-step00000003-state'} at step 3 of 6" in capsys.readouterr().out
    assert differences(whole, last) == []
    assert metadata(whole) == metadata(last)


def test_a_state_that_was_tampered_with_is_refused(
    small_model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(small_model, photos, tmp_path, "--max_train_steps 1 --save_state")
    file = tmp_path / "lora-state" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    more = f"--max_train_steps 2 --resume {tmp_path / 'lora-state'}"
    assert main(words(small_model, photos, tmp_path, more)) == 3
    assert f"{file}: differs from what was saved" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "rule"),
    [
        ("--seed 4", "seed: 3 -> 4"),
        ("--network_dim 8", "--network_dim makes it"),
        ("--network_alpha 2", "--network_alpha is 2"),
        ("--network_train_unet_only", "does not train"),
        ("--optimizer_type Prodigy", "is one of AdamW"),
        ("--optimizer_type Lion", "is one of AdamW"),
    ],
)
def test_what_a_state_does_not_fit_is_refused(
    small_model: Path, photos: Path, state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str,
    rule: str,
) -> None:  # fmt: skip
    assert main(words(small_model, photos, tmp_path, f"--max_train_steps 2 --resume {state} {more}")) in (2, 3)
    assert rule in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def state(small_model: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state after one update."""
    folder = tmp_path_factory.mktemp("run")
    train(small_model, photos, folder, "--max_train_steps 1 --save_state")
    return folder / "lora-state"


def test_another_precision_is_told_of(
    small_model: Path, photos: Path, state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(small_model, photos, tmp_path, f"--max_train_steps 2 --resume {state} --mixed_precision fp16")
    assert "mixed_precision: no -> fp16" in capsys.readouterr().err


def test_control_c_saves_and_says_how_to_go_on(tiny_model: Path, photos: Path, tmp_path: Path) -> None:
    more = "--max_train_steps 14 --lr_scheduler cosine --save_every_n_steps 3"
    arguments = words(tiny_model, photos, tmp_path / "stopped", more)
    with subprocess.Popen(
        command("sd_train.train_network", *arguments), env=environment(), text=True, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("saved ") and not any(other.startswith("saved ") for other in lines[:-1]):
                process.send_signal(signal.SIGINT)
    said = "".join(lines)
    assert process.returncode == 0, said
    assert "Traceback" not in said
    assert "stopping after this update" in said
    stopped = re.search(r"stopped at step (\d+); go on with (--resume (\S+))", said)
    assert stopped is not None
    step = int(stopped[1])
    assert 3 <= step < 14
    assert Path(stopped[3]).is_dir()
    model = tmp_path / "stopped" / f"lora-step{step:08d}.safetensors"
    assert metadata(model)["ss_steps"] == str(step)

    manifest = json.loads((Path(stopped[3]) / "manifest.json").read_text())
    assert manifest["step"] == step

    resumed = train(tiny_model, photos, tmp_path / "stopped", f"{more} {stopped[2]}")
    whole = train(tiny_model, photos, tmp_path / "whole", more)
    assert differences(resumed, whole) == []
    assert metadata(resumed) == metadata(whole)
