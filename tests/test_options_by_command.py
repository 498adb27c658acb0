"""Each command has its own options: others are refused or told of; help, plan and the written file keep to them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sd_train.__main__ import COMMANDS, main
from sd_train.commands.plan import TRAINING_COMMANDS
from sd_train.config.catalogue import Option, options
from sd_train.config.dump import dump_toml, repeatable
from sd_train.config.group import Group
from sd_train.config.help import help_text
from sd_train.config.options import GROUPS
from sd_train.config.parser import load_run_config
from sd_train.errors import ConfigError
from tests.models import TinyKind, write_file
from tests.runs import PHOTOS, environment, write_dataset

OWN = {
    "train_network": "network_dim",
    "fine_tune": "train_text_encoder",
    "train_db": "stop_text_encoder_training",
    "train_textual_inversion": "token_string",
}
"""Commands that have options of their own, each with one of them that it may share."""
NEEDED = {"train_textual_inversion": ["--token_string", "cup-thing", "--use_object_template"]}
FOREIGN = sorted((command, name) for command in OWN for name, o in options().items() if not o.belongs_to(command))


@pytest.mark.parametrize(
    ("command", "flag", "instead"),
    [
        ("train_network", "--learning_rate_te 1e-4", "use text_encoder_lr"),
        ("train_db", "--train_text_encoder", "use train_db as it is"),
        ("train_textual_inversion", "--unet_lr 1e-4", "use learning_rate"),
        ("train_network", "--clas_tokens cat", "did you mean class_tokens? It is a key of the dataset file"),
    ],
)
def test_what_to_use_instead_is_said(command: str, flag: str, instead: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_config(command, [*given(command, tmp_path), *flag.split()])
    assert instead in str(caught.value)


def test_a_runs_own_file_warns_of_nothing(tmp_path: Path) -> None:
    for command in OWN:
        written = tmp_path / f"{command}.toml"
        written.write_text(dump_toml(load_run_config(command, given(command, tmp_path)).config))
        assert load_run_config(command, ["--config_file", str(written)]).warnings == ()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """A tiny model's file, of SDXL or not."""
    kinds: dict[bool, TinyKind] = {False: "sd1", True: "sdxl"}
    return {sdxl: write_file(tmp_path_factory.mktemp("models"), kind) for sdxl, kind in kinds.items()}


def dataset_for(command: str, folder: Path) -> Path:
    """A dataset file that the command takes; fine_tune's captions come from a metadata file, as in sd-scripts."""
    if command != "fine_tune":
        return write_dataset(folder / "d.toml")
    captions = {path.stem: {"caption": "a cup"} for path in PHOTOS.glob("*.jpg")}
    (folder / "captions.json").write_text(json.dumps(captions))
    return write_dataset(folder / "d.toml", subset=f"metadata_file = {str(folder / 'captions.json')!r}")


def given(command: str, folder: Path) -> list[str]:
    """What the command needs, with a model that is looked at later."""
    return ["--pretrained_model_name_or_path", "someone/model", "--dataset_config", str(dataset_for(command, folder)),
            "--output_dir", str(folder / "out"), *NEEDED.get(command, [])]  # fmt: skip


def example(option: Option) -> Any:
    """A value that is valid and not the default."""
    if option.choices:
        return option.choices[-1]
    special: dict[str, Any] = {
        "block_lr": ",".join(["1e-5"] * 23), "network_args": ["conv_dim=4"], "base_weights_multiplier": [0.5],
        "loss_spike_factor": 2.5,
    }  # fmt: skip
    plain: dict[str, Any] = {"flag": True, "int": 3, "float": 0.25, "text": "x", "list": ["x"]}
    return special.get(option.name, plain[option.kind])


def test_every_command_is_known_everywhere() -> None:
    trained = {name for name, (module, _) in COMMANDS.items() if "train_" in module or module.endswith("_train")
               or "fine_tune" in module}  # fmt: skip
    assert trained == set(TRAINING_COMMANDS)
    assert {words[0] for words in TRAINING_COMMANDS.values()} == set(OWN)
    assert all(set(option.commands) <= set(OWN) for option in options().values())
    assert all(options()[name].belongs_to(command) for command, name in OWN.items())


@pytest.mark.parametrize("command", OWN)
def test_options_of_other_commands_are_refused_as_flags(tmp_path: Path, command: str) -> None:
    foreign = [name for owner, name in FOREIGN if owner == command]
    assert len(foreign) > 5
    words = given(command, tmp_path)
    for name in foreign:
        value = example(options()[name])
        words += [f"--{name}", *([] if value is True else map(str, value) if isinstance(value, list) else [str(value)])]
    with pytest.raises(ConfigError) as caught:
        load_run_config(command, words)
    assert len(caught.value.problems) == len(foreign)
    for name in foreign:
        (told,) = (problem for problem in caught.value.problems if re.match(rf"--{name}\b", problem))
        assert f"{command} has no such option; it belongs to {' and '.join(options()[name].commands)}" in told


@pytest.mark.parametrize("command", OWN)
def test_in_a_file_they_are_told_of_and_change_nothing(tmp_path: Path, command: str) -> None:
    foreign = [name for owner, name in FOREIGN if owner == command]
    lines = [f"{name} = {json.dumps(example(options()[name]))}" for name in foreign]
    path = tmp_path / "run.toml"
    path.write_text("\n".join(lines))
    words = given(command, tmp_path)
    with_file = load_run_config(command, ["--config_file", str(path), *words])
    assert with_file.config == load_run_config(command, words).config
    for number, name in enumerate(foreign, 1):
        owners = " and ".join(options()[name].commands)
        assert f"{path}:{number}: {name} has no effect: it belongs to {owners}" in with_file.warnings
    assert len(with_file.warnings) == len(foreign)


@pytest.mark.parametrize("command", OWN)
def test_defaults_of_other_commands_in_a_file_need_no_word(tmp_path: Path, command: str) -> None:
    # As kohya_ss writes files: every switch and number stands there.
    plain = {name: options()[name].default for owner, name in FOREIGN if owner == command}
    lines = [f"{name} = {json.dumps(value)}" for name, value in plain.items() if isinstance(value, bool | int | float)]
    assert lines
    path = tmp_path / "run.toml"
    path.write_text("\n".join(lines))
    words = ["--config_file", str(path), *given(command, tmp_path)]
    assert load_run_config(command, words).warnings == ()


@pytest.mark.parametrize("command", OWN)
def test_help_shows_a_commands_own_options_alone(command: str) -> None:
    shown = set(re.findall(r"^  --(\w+)", help_text(command), re.MULTILINE))
    own = {name for name, option in options().items() if option.belongs_to(command)}
    assert shown - {"config_file", "output_config", "no_NAME", "help"} == own
    titles = {group for group, model in GROUPS.items() if f"\n{group}: {model.__doc__}\n" in help_text(command)}
    assert titles == {options()[name].group for name in own}


def test_help_needs_no_torch() -> None:
    code = (
        "import importlib, sys\nfrom sd_train.commands.plan import TRAINING_COMMANDS\n"
        "for name in TRAINING_COMMANDS:\n    try: importlib.import_module(f'sd_train.{name}').main(['--help'])\n"
        "    except SystemExit: pass\nassert 'torch' not in sys.modules, 'torch'"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for command in OWN:
        assert f"usage: python -m sd_train.{command} " in done.stdout


def own_values(command: str) -> dict[str, Any]:
    """A valid value for every option that has no rule with files or with others."""
    ruled = (
        "pretrained_model_name_or_path", "dataset_config", "train_data_dir", "reg_data_dir", "in_json", "output_dir",
        "resume", "network_weights", "base_weights", "weights", "sample_prompts", "sample_every_n_steps",
        "sample_every_n_epochs", "sample_at_first", "log_with", "logging_dir", "network_train_unet_only",
        "network_train_text_encoder_only", "network_module", "dim_from_weights", "save_model_as", "class_prompt",
        "cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk", "prior_preservation", "vae", "cache_dir",
        "overwrite", "lr_scheduler_type", "lr_scheduler_args", "lr_decay_steps", "lr_scheduler_power",
        "lr_scheduler_timescale", "lr_scheduler_min_lr_ratio", "log_tracker_config", "log_tracker_name",
        "wandb_api_key", "huggingface_token", "huggingface_path_in_repo", "soft_min_snr_gamma",
        "torch_compile",
    )  # fmt: skip
    own = {name: option for name, option in options().items() if option.belongs_to(command) and name not in ruled}
    values = {name: example(option) for name, option in own.items()}
    lists: dict[str, Any] = {"resolution": "512,768", "lr_scheduler": "cosine", "lr_warmup_steps": 3}
    lists |= {"optimizer_args": ["betas=.9,.99"], "network_args": ["conv_dim=4"], "face_crop_aug_range": "1.0,2.0"}
    lists |= {"max_bucket_reso": 1024, "min_bucket_reso": 256, "unet_lr": 0.5, "text_encoder_lr": 0.25}
    lists |= {"max_timestep": 900, "huggingface_repo_id": "someone/repo", "lr_scheduler_num_cycles": 1}
    lists["resume_anyway"] = ["dataset", "seed"]
    if command != "train_textual_inversion":
        lists |= {"prior_preservation": "frozen", "class_prompt": "a dog"}
    return values | {name: value for name, value in lists.items() if options()[name].belongs_to(command)}


@pytest.mark.parametrize("command", OWN)
def test_what_is_written_reads_back_equal(tmp_path: Path, command: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text("\n".join(f"{name} = {json.dumps(v)}" for name, v in own_values(command).items()))
    config = load_run_config(command, ["--config_file", str(path), *given(command, tmp_path)]).config
    group: Group = getattr(config, options()[OWN[command]].group)
    assert getattr(group, OWN[command]) != options()[OWN[command]].default
    text = dump_toml(repeatable(config, 5))
    assert not [name for owner, name in FOREIGN if owner == command and f"\n{name} = " in text]
    again = tmp_path / "again.toml"
    again.write_text(text)
    loaded = load_run_config(command, ["--config_file", str(again)])
    assert loaded.config == repeatable(config, 5)
    assert dump_toml(loaded.config) == text


@pytest.mark.parametrize("name", TRAINING_COMMANDS)
def test_each_command_can_be_planned(
    models: dict[bool, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    command, *added = TRAINING_COMMANDS[name]
    dataset = dataset_for(command, tmp_path)
    words = ["--pretrained_model_name_or_path", str(models["--sdxl" in added]), "--dataset_config", str(dataset)]
    words += ["--output_dir", str(tmp_path / "out"), "--output_name", "mine", "--max_train_steps", "4", "--use_ema"]
    words += ["--learning_rate", "1e-3", *NEEDED.get(command, [])]
    assert main(["plan", name, "--json", *words]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert (found["command"], found["total_updates"]) == (command, 4)
    roles = {"unet"} if command == "fine_tune" else {"unet", "text_encoder"}
    roles = {"text_encoder"} if command == "train_textual_inversion" else roles
    if "--sdxl" in added and "text_encoder" in roles:
        roles |= {"text_encoder_2"}
    assert set(found["learning_rates"]) == roles
    (save,) = found["checkpoints"]
    assert save["path"] == str(tmp_path / "out" / "mine.safetensors")
    assert save["average"] == str(tmp_path / "out" / "mine-ema.safetensors")
    assert not (tmp_path / "out").exists()
    assert main(["plan", name, *words]) == 0
    assert "mine-ema.safetensors" in capsys.readouterr().out
