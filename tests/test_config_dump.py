"""The resolved configuration as TOML and as JSON Schema."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from sd_train.commands.schema import main
from sd_train.config.catalogue import Option, options
from sd_train.config.dump import dump_toml
from sd_train.config.options import GROUPS, RunConfig
from sd_train.config.parser import load_run_config
from sd_train.config.schema import run_json_schema
from sd_train.config.values import FACTS
from sd_train.errors import ConfigError

RULED = {  # options that rules between options or the file system restrict
    "network_args", "network_train_unet_only", "network_train_text_encoder_only", "unet_lr", "text_encoder_lr",
    "lr_scheduler", "lr_scheduler_type", "lr_scheduler_args", "lr_warmup_steps", "lr_decay_steps",
    "lr_scheduler_num_cycles", "lr_scheduler_power", "lr_scheduler_timescale", "lr_scheduler_min_lr_ratio",
    "sample_every_n_steps", "sample_every_n_epochs", "sample_at_first",
    "sample_prompts", "log_with", "dataset_config", "network_weights", "resume", "output_name",
    "output_dir", "logging_dir", "cache_dir", "train_data_dir", "reg_data_dir", "in_json",
    "cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk", "log_tracker_config", "log_tracker_name",
    "huggingface_repo_id", "huggingface_path_in_repo", "wandb_api_key", "huggingface_token",
    "base_weights", "weights", "save_model_as",
    "dim_from_weights", "network_module", "prior_preservation", "scale_v_pred_loss_like_noise_pred",
    "stop_text_encoder_training", "token_string",
    "adaptive_noise_scale", "min_timestep", "max_timestep", "min_snr_gamma", "torch_compile",
}  # fmt: skip
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)
ARGUMENTS = st.dictionaries(
    st.sampled_from(["betas", "eps", "weight_decay", "mode"]),
    st.one_of(st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), TEXT, st.none())
    | st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
SPECIAL: dict[str, st.SearchStrategy[Any]] = {
    "optimizer_args": ARGUMENTS,
    "num_vectors_per_token": st.integers(1, 75),
    "base_weights_multiplier": st.lists(st.floats(-2, 2), max_size=3).map(tuple),
    "block_lr": st.lists(st.floats(1e-9, 1), min_size=23, max_size=23).map(tuple),
    "resolution": st.tuples(st.integers(64, 4096), st.integers(64, 16384)),
    "lr_warmup_steps": st.integers(0, 10**6) | st.floats(1e-6, 0.999),
    "lr_scheduler": st.just("linear"),
    "text_encoder_lr": st.floats(0, 1),
    "multires_noise_iterations": st.integers(1, 16),
    "validation_timesteps": st.integers(1, 100),
    "min_timestep": st.integers(1, 500),
    "max_timestep": st.integers(501, 999),
    "loss_spike_factor": st.floats(1.01, 1e6),
    "unet_lr": st.floats(1e-9, 1),
    "face_crop_aug_range": st.tuples(st.floats(1e-9, 1), st.floats(1, 1e9)),
    "resume_anyway": st.lists(st.sampled_from(FACTS), unique=True).map(tuple),
    # Slashes lead out of its folder.
    "log_prefix": st.text(st.characters(categories=["L", "N", "Zs"]), min_size=1, max_size=12),
    "pretrained_model_name_or_path": st.just("a b\\'c\".ckpt"),
}


def strategy(option: Option) -> st.SearchStrategy[Any]:
    if option.name in SPECIAL:
        return SPECIAL[option.name]
    if option.choices:
        return st.sampled_from(option.choices)
    number: dict[str, st.SearchStrategy[Any]] = {
        "int": st.integers(1, 1024),
        "float": st.floats(1e-9, 0.99),
        "flag": st.booleans(),
        "text": TEXT,
    }
    return number[option.kind]


COMMANDS = ("train_network", "fine_tune", "train_db", "train_textual_inversion")
MAY_BE_EMPTY = ("logging", "metadata", "full")
"""Groups all of whose options may be left out."""
CHANGES = st.fixed_dictionaries(
    {}, optional={name: strategy(option) for name, option in options().items() if name not in RULED or name in SPECIAL}
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=CHANGES, command=st.sampled_from(COMMANDS))
def test_dumped_text_resolves_to_an_equal_config(
    changes: dict[str, Any], command: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "dataset.toml").write_text("", encoding="utf-8")
    required = {
        "pretrained_model_name_or_path": "models/ä \t\x7f.safetensors",
        "dataset_config": folder / "dataset.toml",
        "output_dir": folder / "out",
    }
    if changes.get("lr_warmup_steps"):
        changes["lr_scheduler"] = "linear"
    if command == "train_textual_inversion":
        required["token_string"] = "sks"
    values = required | {name: value for name, value in changes.items() if options()[name].belongs_to(command)}
    groups: dict[str, Any] = {
        group: model.model_validate({name: values[name] for name in model.model_fields if name in values})
        for group, model in GROUPS.items()
    }
    config = RunConfig(command=command, origins={}, **groups)
    text = dump_toml(config)
    own = {group for group, model in GROUPS.items() if not model.commands or command in model.commands}
    assert all((f"\n# {group}\n" in text) == (group in own) for group in GROUPS if group not in MAY_BE_EMPTY)
    (folder / "again.toml").write_text(text, encoding="utf-8", newline="\n")
    assert load_run_config(command, ["--config_file", str(folder / "again.toml")]).config == config


def test_models_are_frozen_and_forbid_unknown_names() -> None:
    training = GROUPS["training"].model_validate({"seed": 3})
    with pytest.raises(ValidationError, match="frozen"):
        training.seed = 4
    with pytest.raises(ValidationError, match="Extra inputs"):
        GROUPS["training"].model_validate({"sede": 3})


def test_schema_describes_every_option() -> None:
    schema = run_json_schema()
    for name, option in options().items():
        entry = schema["properties"][name]
        assert entry["description"]
        if option.default not in (None, {}, ()):
            assert entry["default"] == option.default
        if len(option.choices) > 1:
            assert set(entry["enum"]) == set(option.choices)
    assert schema["properties"]["max_train_steps"]["minimum"] == 1
    assert schema["properties"]["mem_eff_attn"]["deprecated"] is True
    assert schema["properties"]["min_snr_gamma"]["exclusiveMinimum"] == 0
    assert "full_bf16" not in schema["properties"]
    section = schema["additionalProperties"]
    assert section["additionalProperties"] is False
    assert set(section["properties"]) == set(schema["properties"])
    assert "null" not in json.dumps(schema)


def test_schema_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run"]) == 0
    assert json.loads(capsys.readouterr().out) == run_json_schema()
    with pytest.raises(ConfigError, match="sd-train schema run"):
        main(["runs"])
