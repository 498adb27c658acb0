"""What would spoil the weights is found, told with its files, undone or left out; what does not fit is split."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sd_train.build
import sd_train.data.batches
from sd_train.data.batches import Updates
from sd_train.device import Device
from sd_train.families.latent import LatentDiffusion
from sd_train.guard import Guard
from sd_train.optim.optimizers import SPECS
from sd_train.snapshot import all_finite, take_snapshot
from sd_train.train_network import main
from sd_train.types import QUARANTINE, Progress
from sd_train.watch import LAG, LEAST_REMEMBERED, Suspect, Watch
from tests.optimizer_cases import Problem
from tests.runs import (
    command,
    differences,
    identical,
    largest_difference,
    run_process,
    scalars,
    train,
    words,
    write_dataset,
)

MORE = "--max_train_steps 12 --use_ema --ema_decay 0.5 --timestep_sampling importance --network_dropout 0.1 "
MORE += "--network_train_unet_only --cache_latents --cache_text_encoder_outputs --save_state_on_train_end "
BAD = 5
"""Number, from zero, of the update with a sample whose noise is not a number."""

Poison = Callable[..., None]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset") / "photos.toml", "batch_size = 2")


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Poison:
    """Makes the noise of the second sample of some updates not a number."""
    real = Updates._prepare

    def add(*steps: int) -> None:
        def prepare(self: Updates, task: Any) -> Any:
            batch = real(self, task)
            if task.step in steps:
                batch.noise[1, 0, 0, 0] = torch.nan
            return batch

        monkeypatch.setattr(Updates, "_prepare", prepare)

    return add


def leave_out(patch: pytest.MonkeyPatch, step: int) -> None:
    """Let runs begin with update number `step` in quarantine."""
    real = sd_train.build.prepare

    def prepare(config: Any) -> Any:
        prepared = real(config)
        prepared.progress.extra[QUARANTINE] = [{"step": step, "reason": "", "files": []}]
        return prepared

    patch.setattr(sd_train.build, "prepare", prepare)


@pytest.fixture(scope="module")
def without(small_model: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has never seen the images of the bad update."""
    folder = tmp_path_factory.mktemp("without")
    with pytest.MonkeyPatch.context() as patch:
        leave_out(patch, BAD)
        train(small_model, photos, folder, f"{MORE} --logging_dir {folder / 'logs'}")
    return folder


def assert_same_training(first: Path, second: Path) -> None:
    """Weights, average and everything in the states agree to the bit."""
    for name in ("lora.safetensors", "lora-ema.safetensors"):
        assert differences(first / name, second / name) == [], name
    for name in ("trainable", "optimizer", "ema"):
        assert differences(*(folder / "lora-state" / f"{name}.safetensors" for folder in (first, second))) == [], name


@pytest.mark.parametrize(
    "more", ["--nan_policy rollback --snapshot_every_n_steps 4 --max_data_loader_n_workers 2", "--nan_policy skip"]
)
def test_a_run_without_its_bad_update_never_saw_it(
    small_model: Path, photos: Path, without: Path, tmp_path: Path, poison: Poison,
    capsys: pytest.CaptureFixture[str], more: str,
) -> None:  # fmt: skip
    poison(BAD)
    train(small_model, photos, tmp_path, f"{MORE} {more} --logging_dir {tmp_path / 'logs'}")
    assert_same_training(tmp_path, without)
    own, others = scalars(tmp_path / "logs"), scalars(without / "logs")
    for tag in ("loss/current", "loss/average", "loss/epoch_average", "lr/unet"):
        assert own[tag] == others[tag], tag
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "its loss is nan" in line)
    assert f"update {BAD + 1} (its loss is nan; " in line
    assert line.count(".jpg") == 1
    assert "went back to update 4" in line or line.startswith("skipped ")


def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let verdicts be read late, as on a GPU, also where the policy is to stop."""
    real = sd_train.build.make_watch

    def make_watch(*given: Any) -> Watch:
        watch = real(*given)
        watch.at_once = False
        return watch

    monkeypatch.setattr(sd_train.build, "make_watch", make_watch)


def test_stop_saves_what_was_before_and_a_resume_may_leave_it_out(
    small_model: Path, photos: Path, without: Path, tmp_path: Path, poison: Poison,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    poison(BAD)
    for name in ("once", "late"):
        if name == "late":
            late(monkeypatch)
        assert main(words(small_model, photos, tmp_path / name, MORE)) == 4
        said = capsys.readouterr().err
        assert re.search(rf"error: stopped before update {BAD + 1} \(its loss is nan; \S+\.jpg\); the state", said)
        assert "--nan_policy rollback" in said
    name = f"lora-step{BAD:08d}"
    for file in (f"{name}.safetensors", f"{name}-state/optimizer.safetensors", f"{name}-state/ema.safetensors"):
        assert differences(tmp_path / "once" / file, tmp_path / "late" / file) == [], file
    more = f"{MORE} --nan_policy rollback --resume {tmp_path / 'late' / name}-state"
    train(small_model, photos, tmp_path / "late", more)
    assert_same_training(tmp_path / "late", without)
    stored = json.loads((tmp_path / "late" / "lora-state" / "progress.json").read_text())
    (left_out,) = stored["progress"]["extra"][QUARANTINE]
    assert left_out["step"] == BAD
    assert len(left_out["files"]) == 1


def test_rollbacks_are_numbered(
    small_model: Path, photos: Path, tmp_path: Path, poison: Poison, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(1, 3)
    more = "--max_train_steps 4 --network_train_unet_only --nan_policy rollback --max_rollbacks 1"
    assert main(words(small_model, photos, tmp_path, more)) == 4
    said = capsys.readouterr().err
    assert "stopped before update 4 (its loss is nan" in said
    assert "(--max_rollbacks 1 are done)" in said
    assert "left out before: update 2 (its loss is nan" in said
    assert (tmp_path / "lora-step00000003-state").is_dir()


def test_skipping_ends_where_nothing_else_is_left(
    small_model: Path, photos: Path, tmp_path: Path, poison: Poison, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(*range(1, 30))
    more = "--max_train_steps 30 --network_train_unet_only --cache_latents --cache_text_encoder_outputs"
    assert main(words(small_model, photos, tmp_path, f"{more} --nan_policy skip")) == 4
    said = capsys.readouterr().err
    assert said.count("skipped update") == 19
    assert "the 19 updates before it were skipped" in said
    assert all_finite(load(tmp_path / "lora-step00000020.safetensors"))


def load(path: Path) -> list[Tensor]:
    from safetensors.torch import load_file

    return list(load_file(path).values())


CPU = Device(torch.device("cpu"), "no")
FILES = [(["a.jpg", "b.jpg"], torch.tensor([1.0, 9.0]))]


def look(watch: Watch, step: int, loss: float, norm: float = 1.0) -> None:
    watch.look(step, torch.tensor(loss), torch.tensor(norm), FILES)


def test_what_is_found_when() -> None:
    once = Watch(CPU, spike_factor=None, at_once=True)
    look(once, 0, 1e30)
    with pytest.raises(Suspect) as found:
        look(once, 1, 1.0, float("inf"))
    # The losses do not tell whose gradients they were.
    assert (found.value.step, found.value.files) == (1, ["a.jpg", "b.jpg"])
    assert "norm of its gradients is inf" in found.value.reason
    later = Watch(CPU, spike_factor=None, at_once=False)
    for step in range(2 + LAG):
        look(later, step, float("nan") if step == 2 else 1.0)
    with pytest.raises(Suspect):
        look(later, 2 + LAG, 1.0)
    look(later, 0, float("nan"))
    with pytest.raises(Suspect):
        later.settle()
    look(later, 0, float("nan"))
    later.forget()
    later.settle()


def test_a_loss_that_jumps() -> None:
    watch = Watch(CPU, spike_factor=5.0, at_once=True)
    look(watch, 0, 100.0)
    for step in range(1, LEAST_REMEMBERED):
        look(watch, step, 1.0)
    again = Watch(CPU, spike_factor=5.0, at_once=True)
    again.load(json.loads(json.dumps(watch.state())))
    look(watch, 20, 4.9)
    with pytest.raises(Suspect) as found:
        look(again, 20, 5.1)
    assert found.value.files == ["b.jpg"]
    # What was refused is no measure for what comes.
    assert 5.1 not in again.state()["losses"]


@pytest.mark.parametrize("name", [spec.name for spec in SPECS])
def test_every_optimizer_goes_back_to_the_bit(name: str) -> None:
    """Also to before its first step, where it holds nothing yet."""
    whole, problem = Problem(name), Problem(name)
    for steps in (0, 3):
        problem.train(steps)
        weights, done = problem.weights(), problem.steps
        snapshot = take_snapshot(problem.parts, Progress(0, 0, 0.0))
        problem.train(2)
        snapshot.restore(problem.parts, Progress(0, 0, 0.0))
        with torch.no_grad():
            for key, value in weights.items():
                problem.params[key].copy_(value)
        problem.steps = done
    whole.train(5)
    problem.train(2)
    assert all(identical(value, problem.weights()[key]) for key, value in whole.weights().items())


def short_of_memory(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Memory ends in the backward pass of more samples than that, when the U-Net's gradients are there already."""
    real = LatentDiffusion.predict

    def fail(gradient: Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    def predict(self: LatentDiffusion, noisy: Tensor, timesteps: Tensor, conditioning: Any) -> Tensor:
        if len(noisy) > most and conditioning.states.requires_grad:
            conditioning.states.register_hook(fail)
        return real(self, noisy, timesteps, conditioning)

    monkeypatch.setattr(LatentDiffusion, "predict", predict)


def test_what_does_not_fit_is_computed_in_parts(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = write_dataset(tmp_path / "d.toml")
    # So that an update is proportional to the gradient; AdamW makes a step of every rounding error.
    more = "--max_train_steps 2 --train_batch_size 4 --gradient_accumulation_steps 2 --timestep_sampling importance "
    more += "--optimizer_type SGD --learning_rate 10 --prior_preservation frozen --class_prompt cat "
    more += "--network_dropout 0.3 --network_args rank_dropout=0.2 "
    whole = train(small_model, photos, tmp_path / "whole", more)
    start = train(small_model, photos, tmp_path / "start", f"{more} --learning_rate 1e-12")
    short_of_memory(monkeypatch, 1)
    capsys.readouterr()
    split = train(small_model, photos, tmp_path / "split", f"{more} --max_data_loader_n_workers 2")
    said = capsys.readouterr().err
    assert said.count("out of memory with 4 images of 64x64 at once; from here on those are computed 2 at a time") == 1
    assert said.count("out of memory with") == 2
    assert largest_difference(whole, split) < 1e-4 * largest_difference(whole, start)
    short_of_memory(monkeypatch, 0)
    assert main(words(small_model, photos, tmp_path / "none", more)) == 4
    assert "out of memory on cpu" in capsys.readouterr().err


SECOND_RANK = f"""
import os, sys, torch
from sd_train.data.batches import Updates
from sd_train.families.latent import LatentDiffusion
from sd_train.train_network import main

real_prepare, real_predict = Updates._prepare, LatentDiffusion.predict

def prepare(self, task):
    batch = real_prepare(self, task)
    if task.step == {BAD} - 3:
        batch.noise[1, 0, 0, 0] = torch.nan
    return batch

def predict(self, noisy, timesteps, conditioning):
    if len(noisy) > 1:
        raise torch.OutOfMemoryError("CUDA out of memory")
    return real_predict(self, noisy, timesteps, conditioning)

if os.environ["RANK"] == "1":
    Updates._prepare, LatentDiffusion.predict = prepare, predict
sys.exit(main(sys.argv[1:]))
"""


def test_what_one_of_two_processes_finds_all_undo(small_model: Path, photos: Path, tmp_path: Path) -> None:
    """The second one alone has a bad sample and too little memory; together they leave what one process leaves with
    accumulation that has never seen the bad update."""
    (tmp_path / "second.py").write_text(SECOND_RANK)
    more = "--max_train_steps 4 --network_train_unet_only --optimizer_type SGD --learning_rate 10 "
    more += "--network_dropout 0.2 "
    bad = "--nan_policy rollback --save_state_on_train_end"
    launch = command(*"torch.distributed.run --standalone --nproc_per_node 2".split(), str(tmp_path / "second.py"))
    done = run_process([*launch, *words(small_model, photos, tmp_path / "two", f"{more} {bad}")])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("went back to update 0, to train on without update 3 (its loss is nan; ") == 1
    assert done.stderr.count("out of memory with 2 images of 64x64") == 1
    quarantine = json.loads((tmp_path / "two" / "lora-state" / "progress.json").read_text())["progress"]["extra"]
    assert [one["step"] for one in quarantine[QUARANTINE]] == [BAD - 3]
    with pytest.MonkeyPatch.context() as patch:
        leave_out(patch, BAD - 3)
        more += "--gradient_accumulation_steps 2 "
        one = train(small_model, photos, tmp_path / "one", more)
    start = train(small_model, photos, tmp_path / "start", f"{more} --learning_rate 1e-12")
    two = tmp_path / "two" / "lora.safetensors"
    assert largest_difference(one, two) < 1e-4 * largest_difference(one, start)


def test_a_preflight_measures_and_leaves_no_trace(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = write_dataset(tmp_path / "d.toml", size=96)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1\n")
    more = "--max_train_steps 3 --train_batch_size 2 --use_ema --ema_decay 0.5 --timestep_sampling importance "
    more += "--optimizer_type ProdigyPlusScheduleFree --learning_rate 1 --network_dropout 0.1 --save_state "
    more += f"--mixed_precision fp16 --sample_prompts {prompts} --sample_every_n_steps 2"
    train(small_model, photos, tmp_path / "plain", more)
    capsys.readouterr()
    train(small_model, photos, tmp_path / "measured", f"{more} --preflight")
    said = capsys.readouterr().out
    assert re.search(r"preflight: an update of 1 batch of 2 x (64x128|128x64): [\d.]+ s, memory of the process", said)
    assert "a sample picture: " in said
    size = (tmp_path / "measured" / "lora.safetensors").stat().st_size
    told = re.search(r"a save: [\d.]+ s; the model ([\d.]+) KB, its state", said)
    # The moving average is a file of its own.
    assert told is not None
    assert float(told[1]) == pytest.approx(2 * size / 1000, rel=0.05)
    assert "for 3 updates, sample pictures: 1, saves: 1; about " in said
    assert_same_training(tmp_path / "plain", tmp_path / "measured")
    plain, measured = (tmp_path / name / "lora-state" / "progress.json" for name in ("plain", "measured"))
    assert json.loads(plain.read_text())["extras"] == json.loads(measured.read_text())["extras"]
    assert not list((tmp_path / "measured").glob(".*"))


def test_the_first_signal_is_noted_and_only_a_second_ctrl_c_is_urgent() -> None:
    with Guard() as guard:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
            assert guard.stop_requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_sigterm_finishes_the_update_and_what_breaks_in_a_thread_has_a_name(
    small_model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    real, terminated = sd_train.data.batches.sample_view, list[int]()

    def sample_view(record: Any, seed: int, epoch: int, repeat: int) -> Any:
        if epoch == 1 and not terminated:
            terminated.append(epoch)
            os.kill(os.getpid(), signal.SIGTERM)
        if epoch == 2:
            raise ZeroDivisionError(f"in the picture {record.key}")
        return real(record, seed, epoch, repeat)

    monkeypatch.setattr(sd_train.data.batches, "sample_view", sample_view)
    more = "--max_train_steps 9 --network_train_unet_only"
    assert main(words(small_model, photos, tmp_path, more)) == 0
    # Three updates are an epoch; the signal came with the first batch of the second one.
    state = tmp_path / "lora-step00000004-state"
    assert f"stopped at step 4; go on with --resume {state}" in capsys.readouterr().err
    assert main(words(small_model, photos, tmp_path, f"{more} --resume {state} --max_data_loader_n_workers 2")) == 3
    said = capsys.readouterr().err
    assert re.search(r"error: \S+\.jpg, \S+\.jpg: cannot be prepared \(ZeroDivisionError: in the picture", said)
    assert (tmp_path / "lora-step00000006-state" / "manifest.json").is_file()
