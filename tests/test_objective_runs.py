"""Whole runs with the options of noise, timesteps, losses and weights: in every command, and resumed to the bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sd_train.__main__ import main
from sd_train.config.catalogue import options
from sd_train.config.options import GROUPS
from sd_train.families.published import scheduler_config
from sd_train.families.saving import save_model
from tests.models import load, small_parts, write_small_file
from tests.runs import PHOTOS, differences, metadata, train, tree, words, write_dataset

SHORT = "--max_train_steps 1 --cache_latents --network_train_unet_only"
OPTIONS = {
    "noise_offset": "--noise_offset 0.1",
    "noise_offset_random_strength": "--noise_offset 0.1 --noise_offset_random_strength",
    "adaptive_noise_scale": "--noise_offset 0.1 --adaptive_noise_scale 0.5",
    "multires_noise_iterations": "--multires_noise_iterations 6",
    "multires_noise_discount": "--multires_noise_iterations 6 --multires_noise_discount 0.8",
    "ip_noise_gamma": "--ip_noise_gamma 0.1",
    "ip_noise_gamma_random_strength": "--ip_noise_gamma 0.1 --ip_noise_gamma_random_strength",
    "zero_terminal_snr": "--zero_terminal_snr",
    "min_timestep": "--min_timestep 300",
    "max_timestep": "--max_timestep 700",
    "timestep_sampling": "--timestep_sampling importance",
    "logit_mean": "--timestep_sampling logit_normal --logit_mean -1",
    "logit_std": "--timestep_sampling logit_normal --logit_std 0.5",
    "loss_type": "--loss_type l1",
    "huber_schedule": "--loss_type huber --huber_schedule constant",
    "huber_c": "--loss_type smooth_l1 --huber_schedule constant --huber_c 0.3",
    "huber_scale": "--loss_type huber --huber_schedule exponential --huber_scale 2",
    "min_snr_gamma": "--min_snr_gamma 5",
    "soft_min_snr_gamma": "--soft_min_snr_gamma 4",
    "p2_gamma": "--p2_gamma 1",
    "p2_k": "--p2_gamma 1 --p2_k 2",
    "v_pred_like_loss": "--v_pred_like_loss 0.5",
    "debiased_estimation_loss": "--debiased_estimation_loss",
    "dream_training": "--dream_training",
    "dream_detail_preservation": "--dream_training --dream_detail_preservation 10",
}
"""Each option of both groups, and what it is given with; the last one is for models that predict v."""
TOGETHER = {
    "noise": "--noise_offset 0.1 --noise_offset_random_strength --adaptive_noise_scale 0.5 --ip_noise_gamma 0.1 "
    "--ip_noise_gamma_random_strength --multires_noise_iterations 4 --timestep_sampling logit_normal",
    "importance": "--timestep_sampling importance --min_snr_gamma 5 --min_timestep 100 --max_timestep 900",
    "dream": "--dream_training --loss_type huber --debiased_estimation_loss",
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset") / "d.toml", "batch_size = 2")


@pytest.fixture(scope="module")
def v_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_file(tmp_path_factory.mktemp("v"), "sd2-v")


@pytest.fixture(scope="module")
def trained(small_model: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What an update leaves, with each option and its switch alone; the pictures are encoded once for all."""
    folder = tmp_path_factory.mktemp("trained")
    short = f"{SHORT} --cache_latents_to_disk --cache_dir {folder / 'cache'}"
    return {
        name: train(small_model, dataset, folder / (name or "plain"), f"{short} {more}")
        for name, more in {"": "", **OPTIONS}.items()
    }


def test_every_option_belongs_to_every_command_and_changes_what_is_learned(trained: dict[str, Path]) -> None:
    names = {*GROUPS["noise"].model_fields, *GROUPS["loss"].model_fields}
    assert names == {*OPTIONS, "scale_v_pred_loss_like_noise_pred"}
    assert all(options()[name].commands == () for name in names)
    for name, file in trained.items():
        # Beside its switch an option changes what the switch alone gives.
        switches = (other for other, more in OPTIONS.items() if OPTIONS.get(name, "").startswith(f"{more} "))
        for other in ("", *switches) if name else ():
            assert differences(file, trained[other]), (name, other)


COMMANDS: dict[str, str] = {
    "fine_tune": "--learning_rate 1e-4",
    "train_db": "--learning_rate 1e-4",
    "train_textual_inversion": "--learning_rate 1e-2 --token_string sks-1 --use_object_template",
}


def other_command(command: str, model: Path, folder: Path, output: Path, more: str) -> int:
    captions = {path.stem: {"caption": "a cup"} for path in PHOTOS.glob("*.jpg")}
    (folder / "captions.json").write_text(json.dumps(captions))
    subset = f"metadata_file = {str(folder / 'captions.json')!r}" if command == "fine_tune" else ""
    given = ["--pretrained_model_name_or_path", str(model), "--output_dir", str(output), "--output_name", "out"]
    given += ["--dataset_config", str(write_dataset(folder / "d.toml", "batch_size = 2", subset))]
    return main([command, *given, *f"--seed 3 --max_data_loader_n_workers 0 {COMMANDS[command]} {more}".split()])


@pytest.mark.parametrize("command", COMMANDS)
def test_options_count_in_every_command(command: str, small_model: Path, tmp_path: Path) -> None:
    files = []
    # Which of them counts where is the objective's matter, the same in all commands.
    for name, more in {"plain": "", **TOGETHER}.items():
        assert other_command(command, small_model, tmp_path, tmp_path / name, f"--max_train_steps 1 {more}") == 0
        files.append(tmp_path / name / "out.safetensors")
    assert all(differences(one, other) for number, one in enumerate(files) for other in files[:number])


def test_zero_terminal_snr_makes_a_model_that_is_read_as_such(
    v_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The flag is the same as a model that has the mark, down to previews; and what is saved has it."""
    marked = tmp_path / "marked.safetensors"
    save_model(marked, small_parts("sd2-v", zero_terminal_snr=True), "safetensors", torch.float16, {})
    (tmp_path / "prompts.txt").write_text("a cup --w 64 --h 64 --s 3 --d 1\n")
    more = f"{SHORT.replace('1', '2')} --sample_prompts {tmp_path / 'prompts.txt'} --sample_at_first"
    more += " --sample_every_n_steps 2"
    data = write_dataset(tmp_path / "d.toml", "batch_size = 2")
    flag = train(v_model, data, tmp_path / "flag", f"{more} --zero_terminal_snr --save_state --save_every_n_steps 1")
    told = train(marked, data, tmp_path / "told", more)
    plain = train(v_model, data, tmp_path / "plain", more)
    assert differences(flag, told) == []
    assert differences(flag, plain) != []
    pictures = [sorted(tree(file.parent / "sample").values()) for file in (flag, told, plain)]
    assert len(pictures[0]) == 2
    assert pictures[0] == pictures[1]
    assert not set(pictures[0]) & set(pictures[2])
    assert [metadata(file)["ss_zero_terminal_snr"] for file in (flag, told, plain)] == ["True", "True", "False"]

    capsys.readouterr()
    resume = f"{more} --resume {tmp_path / 'flag' / 'lora-step00000001-state'}"
    assert main(["train_network", *words(v_model, data, tmp_path / "again", resume)]) == 2
    assert "zero_terminal_snr: True -> False" in capsys.readouterr().err
    train(v_model, data, tmp_path / "again", f"{resume} --resume_anyway zero_terminal_snr")
    assert "accepted by --resume_anyway: zero_terminal_snr: True -> False" in capsys.readouterr().err
    train(marked, data, tmp_path / "doubled", f"{SHORT} --zero_terminal_snr --min_snr_gamma 5")
    said = capsys.readouterr().err
    assert "--zero_terminal_snr has no effect: the model's schedule has it already" in said
    assert "--min_snr_gamma: with zero terminal SNR the last timestep counts 0" in said

    whole = "--max_train_steps 1 --zero_terminal_snr"
    assert other_command("train_db", v_model, tmp_path, tmp_path / "db", whole) == 0
    assert load(tmp_path / "db" / "out.safetensors").zero_terminal_snr
    with safe_open(tmp_path / "db" / "out.safetensors", "pt") as file:
        assert "ztsnr" in file.keys()  # noqa: SIM118
    assert other_command("train_db", v_model, tmp_path, tmp_path / "folder", f"{whole} --save_model_as diffusers") == 0
    assert load(tmp_path / "folder" / "out").zero_terminal_snr
    scheduler = json.loads((tmp_path / "folder" / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["rescale_betas_zero_snr"] is True


@pytest.mark.parametrize(
    ("v", "more", "said"),
    [
        (True, "--v_pred_like_loss 0.5", "--v_pred_like_loss = 0.5: the model predicts v itself; remove it"),
        (False, "--scale_v_pred_loss_like_noise_pred", "v_parameterization is not given"),
        (False, "--zero_terminal_snr --debiased_estimation_loss", "--debiased_estimation_loss: its weight is infinite"),
        (False, "--zero_terminal_snr --debiased_estimation_loss --max_timestep 999", ""),
        (False, "--adaptive_noise_scale 0.5", "needs noise_offset; give a noise_offset"),
        (False, "--min_timestep 500 --max_timestep 500", "--min_timestep = 500: is not below max_timestep, 500"),
        (False, "--min_snr_gamma 5 --soft_min_snr_gamma 4", "exclude each other"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_the_training(
    v: bool, more: str, said: str, small_model: Path, v_model: Path, dataset: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = v_model if v else small_model
    given = words(model, dataset, tmp_path / "out", f"--max_train_steps 1 {more}")
    assert main(["plan", "train_network", *given]) == (2 if said else 0)
    assert said in capsys.readouterr().err


def test_scaling_counts_for_models_that_predict_v(v_model: Path, dataset: Path, tmp_path: Path) -> None:
    flag = "--scale_v_pred_loss_like_noise_pred --v_parameterization"
    files = [train(v_model, dataset, tmp_path / name, f"{SHORT} {more}") for name, more in {"a": "", "b": flag}.items()]
    assert differences(*files)
    assert metadata(files[1])["ss_scale_v_pred_loss_like_noise_pred"] == "True"


def test_a_model_that_predicts_the_picture_is_trained_drawn_with_and_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model = tmp_path / "model"
    scheduler = scheduler_config("sd1", "sample", False)
    save_model(model, replace(small_parts(), prediction="sample", scheduler=scheduler), "diffusers_safetensors")
    (tmp_path / "prompts.txt").write_text("a cup --w 64 --h 64 --s 2\na cup --w 64 --h 64 --s 2 --ss euler_a\n")
    prompts = f"--sample_prompts {tmp_path / 'prompts.txt'} --sample_at_first"
    for name, more in {"plain": prompts, "min-snr": "--min_snr_gamma 5"}.items():
        output = tmp_path / name
        assert other_command("train_db", model, tmp_path, output, f"--max_train_steps 1 {more}") == 0
        assert "predicts the picture" in capsys.readouterr().out
    assert "sampler = 'euler_a': cannot draw with a model that predicts the picture itself; use one" in caplog.text
    first, second = (load(tmp_path / name / "out").tensors("unet") for name in ("plain", "min-snr"))
    assert any(not torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert len(tree(tmp_path / "plain" / "sample")) == 1
    assert load(tmp_path / "plain" / "out").prediction == "sample"
    for form in ("safetensors", "ckpt"):
        file = tmp_path / f"file.{form}"
        assert main(["convert", str(tmp_path / "plain" / "out"), str(file)]) == 0
        assert load(file).prediction == "sample"


def test_explain_tells_the_timesteps_that_are_trained(
    small_model: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = sorted(PHOTOS.glob("*.jpg"))[0].name

    def told(more: str, *form: str) -> str:
        given = words(small_model, dataset, tmp_path / "out", f"--max_train_epochs 40 {more}")
        capsys.readouterr()
        assert main(["explain", photo, "train_network", *form, *given]) == 0
        return capsys.readouterr().out

    (found,) = json.loads(told("--timestep_sampling logit_normal --min_timestep 200 --max_timestep 300", "--json"))
    timesteps = [time["timestep"] for time in found["shown"]]
    assert len(timesteps) == 40
    assert 200 <= min(timesteps) < 230 < 270 < max(timesteps) < 300
    assert "batch 1): a timestep by the losses until then, resized" in told("--timestep_sampling importance")
    (found,) = json.loads(told("--timestep_sampling importance", "--json", "--most", "1"))
    assert found["shown"][0]["timestep"] is None
