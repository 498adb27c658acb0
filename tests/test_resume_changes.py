"""Going on as another training than the state's: what is refused, what is accepted by name, what only has to be said;
beginning elsewhere; and the command that proves a resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sd_train.__main__ import main as sd_train
from sd_train.commands.verify_resume import first_difference, stops, take_updates
from sd_train.config.catalogue import options
from sd_train.config.changes import ACCEPTED, changed_options, meaning_of
from sd_train.config.parser import load_run_config
from sd_train.config.values import FACTS
from sd_train.errors import ConfigError
from sd_train.files import sha256
from sd_train.optim.ema import Ema
from sd_train.state import put_table, read_progress, read_table
from sd_train.train_network import main
from tests.models import write_small_file
from tests.runs import differences, metadata, scalars, train, words, write_dataset

UNET = "--network_train_unet_only --cache_latents"
SAID = ("debug_dataset", "verify_images", "trust_index", "allow_missing_captions", "skip_broken_images",
        "v_parameterization", "gradient_accumulation_steps", "seed", "zero_terminal_snr",
        "train_batch_size")  # fmt: skip
"""What is compared as a fact, or looks at images alone."""


@pytest.fixture(scope="module")
def folder(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 6 updates an epoch that was saved after 4, with a dataset file beside."""
    folder = tmp_path_factory.mktemp("changes")
    dataset = write_dataset(folder / "d.toml")
    train(small_model, dataset, folder / "run", f"--max_train_steps 4 --save_state {UNET}")
    return folder


def again(small_model: Path, folder: Path, output: Path, more: str, dataset: Path | None = None) -> int:
    """Go on from the state of `folder`."""
    given = f"{UNET} --resume {folder / 'run' / 'lora-state'} {more}"
    return main(words(small_model, dataset or folder / "d.toml", output, given))


def test_every_option_that_counts_says_what_its_change_means() -> None:
    compared = ("model", "dataset", "network", "full", "embedding", "optimizer", "training", "noise", "loss", "ema")
    silent = {name for name in options() if meaning_of(name) is None}
    assert {name for name, option in options().items() if option.group in compared} & silent == set(SAID)
    assert {options()[name].group for name in options().keys() - silent} == set(compared)
    assert ACCEPTED.keys() == set(FACTS)
    told = changed_options("max_train_steps = 5\nloss_type = 'l2'", "max_train_epochs = 2\nmax_train_steps = 1600")
    assert [line.split(":")[0] for line in told] == ["max_train_epochs", "loss_type"]


def test_what_would_corrupt_is_refused_all_at_once(
    small_model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_dataset(tmp_path / "d.toml", "batch_size = 2", "num_repeats = 2\nshuffle_caption = true")
    more = "--max_train_steps 6 --seed 4 --gradient_accumulation_steps 2 --v_parameterization --resume_anyway seed"
    assert again(small_model, folder, tmp_path / "out", more, other) == 2
    said = capsys.readouterr().err
    assert "dataset: batch_size 1 -> 2; num_repeats 1 -> 2; shuffle_caption false -> true; " in said
    assert "gradient_accumulation_steps: 1 -> 2; " in said
    assert "prediction: epsilon -> v_prediction; " in said
    assert "go on anyway with --resume_anyway dataset, which means: the running epoch begins anew" in said
    assert "seed: 3 -> 4" not in said
    assert not (tmp_path / "out").exists()
    assert again(small_model, folder, tmp_path / "out", "--resume_anyway datset") == 2
    assert "did you mean dataset?" in capsys.readouterr().err


def test_accepted_differences_keep_epochs_and_ends_straight(
    small_model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_progress(folder / "run" / "lora-state")
    assert (before.step, before.epoch, before.index) == (4, 0, 4)
    # The running epoch begins anew with twelve updates, so that two epochs end 4 + 24 updates after the beginning.
    other = write_dataset(tmp_path / "d.toml", subset="num_repeats = 2")
    more = "--resume_anyway dataset seed processes --seed 4 --max_train_epochs 2 --save_every_n_epochs 1 --save_state"
    assert again(small_model, folder, tmp_path / "data", more, other) == 0
    said = "".join(capsys.readouterr())
    assert "accepted by --resume_anyway: dataset: num_repeats 1 -> 2: the running epoch begins anew" in said
    assert "--resume_anyway processes has no effect: it is as it was" in said
    assert "resumed" in said
    assert "at step 4 of 28" in said
    middle, after = (read_progress(tmp_path / "data" / f"{name}-state") for name in ("lora-000001", "lora"))
    assert [(p.step, p.epoch, p.index) for p in (middle, after)] == [(16, 1, 0), (28, 2, 0)]
    assert (after.session_id, after.started_at, after.seed) == (before.session_id, before.started_at, 4)
    # Two batches an update: of the six of an epoch four are done, so one update of it is left.
    more = "--gradient_accumulation_steps 2 --resume_anyway gradient_accumulation_steps --max_train_steps 5 "
    more += "--save_state"
    assert again(small_model, folder, tmp_path / "sum", more) == 0
    after = read_progress(tmp_path / "sum" / "lora-state")
    assert (after.step, after.epoch, after.index) == (5, 1, 0)


def test_a_last_epoch_that_is_none_any_more_begins_anew(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With `carry` the last epoch has a short batch for what is left, which the next one has elsewhere."""
    dataset = write_dataset(tmp_path / "d.toml", "batch_size = 5\nbucket_policy = 'carry'")
    run = f"{UNET} --save_state --save_every_n_steps 1"
    train(small_model, dataset, tmp_path / "two", f"{run} --max_train_epochs 2")
    state = tmp_path / "two" / "lora-step00000002-state"
    before = read_progress(state)
    assert (before.epoch, before.index) == (1, 1)
    train(small_model, dataset, tmp_path / "four", f"{run} --max_train_epochs 4 --resume {state}")
    assert "the running epoch begins anew" in capsys.readouterr().err
    after = read_progress(tmp_path / "four" / "lora-step00000003-state")
    assert (after.epoch, after.index) == (2, 0)
    # Where it stays the last one it goes on.
    train(small_model, dataset, tmp_path / "same", f"{run} --max_train_epochs 2 --resume {state}")
    assert "begins anew" not in capsys.readouterr().err
    assert differences(tmp_path / "same" / "lora.safetensors", tmp_path / "two" / "lora.safetensors") == []


def test_another_base_model_and_optimizer_are_told_together(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_small_file(tmp_path, "sd2")
    more = "--max_train_steps 5 --optimizer_type Lion"
    assert again(other, folder, tmp_path / "out", more) == 3
    said = capsys.readouterr().err
    assert "was trained on another base model" in said
    assert "is one of AdamW; give what the state was saved with, or go on anyway with --resume_anyway optimizer" in said


def test_an_accepted_optimizer_begins_anew(small_model: Path, folder: Path, tmp_path: Path) -> None:
    more = "--max_train_steps 5 --optimizer_type Lion --learning_rate 1e-4 --resume_anyway optimizer_type --save_state"
    assert again(small_model, folder, tmp_path, more) == 0
    assert json.loads((tmp_path / "lora-state" / "optimizer.json").read_text())["optimizer"] == "Lion"


def test_a_training_begins_elsewhere(
    small_model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset, logs = folder / "d.toml", tmp_path / "logs"
    rates = "--lr_scheduler linear --learning_rate 1"
    # Without skipping, the epoch of that update is begun; the rates begin at their beginning, as in sd-scripts.
    more = f"{UNET} {rates} --max_train_steps 14 --save_every_n_steps 9 --initial_step 8 --initial_epoch 7"
    train(small_model, dataset, tmp_path / "a", f"{more} --save_state --logging_dir {logs}")
    said = "".join(capsys.readouterr())
    assert "begins after step 6 of 14, in epoch 2" in said
    assert "--initial_epoch has no effect: initial_step is given, as in sd-scripts" in said
    curve = scalars(logs)["lr/unet"]
    assert [step for step, _ in curve] == list(range(7, 15))
    assert [value for _, value in curve] == pytest.approx([1 - n / 14 for n in range(8)])
    assert (tmp_path / "a" / "lora-step00000009.safetensors").exists()
    # Its states go on, with the same options: the place is not taken again.
    state = tmp_path / "a" / "lora-step00000009-state"
    rest = train(small_model, dataset, tmp_path / "rest", f"{more} --resume {state}")
    assert differences(rest, tmp_path / "a" / "lora.safetensors") == []
    assert metadata(rest) == metadata(tmp_path / "a" / "lora.safetensors")

    # Skipping: exactly there. Beside a state its own place is ignored, and its rates go on.
    more = f"{UNET} {rates} --max_train_steps 14 --initial_epoch 2 --skip_until_initial_step --save_state"
    train(small_model, dataset, tmp_path / "b", f"{more} --resume {state} --logging_dir {tmp_path / 'back'}")
    said = "".join(capsys.readouterr())
    assert "the state's place (update 9) is ignored: --initial_epoch = 2 is given, as in sd-scripts" in said
    assert scalars(tmp_path / "back")["lr/unet"][0] == (7, pytest.approx(1 - 3 / 14))
    skipped = f"{UNET} --max_train_steps 9 --initial_step 8 --skip_until_initial_step --save_state"
    train(small_model, dataset, tmp_path / "c", skipped)
    after = read_progress(tmp_path / "c" / "lora-state")
    assert (after.step, after.epoch, after.index, after.samples) == (9, 1, 3, 1)


def test_where_to_begin_has_rules(small_model: Path, folder: Path, tmp_path: Path,
                                  capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    given = words(small_model, folder / "d.toml", tmp_path, "--max_train_steps 6 --initial_step 6")
    assert main(given) == 2
    assert "--initial_step: stands at step 6 and the training ends at 6" in capsys.readouterr().err
    command = words(Path("a/b"), folder / "d.toml", tmp_path, "--skip_until_initial_step --resume_anyway seed")
    warnings = " ".join(load_run_config("train_network", command).warnings)
    assert "skip_until_initial_step has no effect" in warnings
    assert "resume_anyway has no effect: resume is not given" in warnings


def test_a_resume_is_proved(
    small_model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    more = f"{UNET} --use_ema --network_dropout 0.1 --save_every_n_steps 1 --save_state --updates 4"
    given = ["verify_resume", *words(small_model, folder / "d.toml", output, more)]
    assert sd_train(given) == 0
    said = capsys.readouterr().out
    assert "exact: 4 updates in one go and in parts of 1 + 2 + 1 leave the same, to the bit: " in said
    assert "weights (144 tensors)" in said
    assert "the moving average (144 tensors) and all counters" in said
    assert not output.exists()
    # Where the resume loses something, it is named.
    monkeypatch.setattr(Ema, "load", lambda self, tensors: None)
    assert sd_train(given) == 4
    said = capsys.readouterr().err
    assert "differ, first in the moving average: lora_unet_" in said
    assert "this is a defect of the trainer" in said
    assert not output.exists()


def test_words_of_the_proof() -> None:
    assert stops(20) == [7, 13, 20]
    assert [stops(count) for count in (2, 3, 6)] == [[1, 2], [1, 2, 3], [2, 4, 6]]
    assert take_updates(["--a", "--updates", "20", "b"]) == (20, ["--a", "b"])
    for wrong in (["--updates", "1"], ["--updates=x"], ["--updates"]):
        with pytest.raises(ConfigError, match="whole number from 2 on"):
            take_updates(wrong)


def test_the_first_difference_is_named(tmp_path: Path) -> None:
    def write(name: str, **changes: object) -> Path:
        (tmp_path / name).mkdir()
        weights = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([float("nan"), 0.0]), **changes.pop("weights", {})}  # type: ignore[dict-item]
        put_table(tmp_path / name / "trainable.safetensors", weights)
        put_table(tmp_path / name / "optimizer.safetensors", {"x": torch.ones(2)})
        progress = {"progress": {"step": 3, "started_at": len(name), "extra": {"loss": 1.5}}, **changes}
        (tmp_path / name / "progress.json").write_text(json.dumps(progress))
        (tmp_path / name / "optimizer.json").write_text("{}")
        return tmp_path / name

    one = write("one")
    assert first_difference(one, write("other")) is None
    found = first_difference(one, write("weights", weights={"a": torch.tensor([1.0, 2.5])}))
    assert found == "weights: a differs in 1 of 2 numbers, by up to 0.5"
    found = first_difference(one, write("dtype", weights={"b": torch.zeros(2).half()}))
    assert found == "weights: b is torch.float32 (2,) and torch.float16 (2,)"
    assert first_difference(one, write("sign", weights={"b": torch.tensor([float("nan"), -0.0])})) is not None
    assert first_difference(one, write("counter", extras=[1])) == "the counters: extras is in one of the two only"


def test_shared_tensors_are_written_once(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    table = {"first": shared, "second": shared.detach(), "view": shared.view(2, 3), "own": shared.clone(),
             "none": torch.zeros(0), "nothing": torch.zeros(0)}  # fmt: skip
    put_table(tmp_path / "t.safetensors", table)
    with safe_open(tmp_path / "t.safetensors", "pt") as file:
        assert set(file.keys()) == table.keys() - {"second"}
    found = read_table(tmp_path / "t.safetensors")
    assert found["second"] is found["first"]
    assert found["own"] is not found["first"]
    assert all(torch.equal(found[name], tensor) for name, tensor in table.items())

@pytest.mark.parametrize(
    ("key", "shape"), [("exp_avg", (1,)), ("exp_avg_sq", (4000, 4)), ("step", (3,))]
)
def test_a_state_of_other_sizes_is_refused(
    small_model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str,
    shape: tuple[int, ...],
) -> None:
    """Whoever can write a state can seal it; fused optimizers write where their tensors should be."""
    state = tmp_path / "run" / "lora-state"
    shutil.copytree(folder / "run" / "lora-state", state)
    table = read_table(state / "optimizer.safetensors")
    name = next(name for name in table if name.endswith(f"/{key}"))
    put_table(state / "optimizer.safetensors", table | {name: torch.zeros(shape)})
    manifest = json.loads((state / "manifest.json").read_text())
    file = state / "optimizer.safetensors"
    manifest["files"][file.name] = {"size": file.stat().st_size, "sha256": sha256(file)}
    (state / "manifest.json").write_text(json.dumps(manifest))
    more = f"{UNET} --max_train_steps 5 --resume {state}"
    assert main(words(small_model, folder / "d.toml", tmp_path / "out", more)) == 3
    assert f"{key} of " in capsys.readouterr().err
