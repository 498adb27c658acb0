"""The table of sd-scripts' options: complete, true to the models, and followed."""

from __future__ import annotations

from pathlib import Path

import pytest

from sd_train.config.catalogue import options
from sd_train.config.compat import HANDLED_BY_PARSER, SHORTHANDS, SYNONYMS, KnownOption, known_options
from sd_train.config.parser import load_run_config
from sd_train.errors import ConfigError

NAMES = (Path(__file__).parent / "data" / "config_sd_scripts_names.txt").read_text(encoding="utf-8").split()
OURS = {
    "allow_missing_captions", "async_save", "bucket_policy", "cache_caption_variants", "cache_dir",
    "cache_latents_sample",
    "caption_column", "output_lora_format", "overwrite", "resume_anyway", "on_disk_full",
    "save_every_n_minutes", "sdxl", "skip_broken_images", "trust_index",
    "unmasked_weight", "verify_images", "use_ema", "ema_decay", "ema_device", "sample_ema", "xti", "prior_preservation",
    "class_prompt", "log_norms_every_n_steps", "timestep_sampling", "soft_min_snr_gamma",
    "p2_gamma", "p2_k", "dream_training", "dream_detail_preservation", "save_best", "validation_patience",
    "validation_timesteps", "nan_policy", "loss_spike_factor", "max_rollbacks", "snapshot_every_n_steps", "preflight",
    "torch_compile_scope",
}  # fmt: skip
# An empty optimizer_type means AdamW in sd-scripts; network_module must be given there.
# What save_model_as is when it is not given depends on the command there too.
OTHER_DEFAULTS = {
    "v_parameterization", "optimizer_type", "network_module", "network_args", "optimizer_args", "base_weights",
    "base_weights_multiplier", "save_model_as", "lr_scheduler_args",
}  # fmt: skip
UNSET = {"flag": False, "int": 0, "float": 0.0, "text": "", "list": []}
REAL = {"flag": True, "int": 3, "float": 0.7, "text": "something", "list": ["something"]}
CONTEXT = {
    "log_with": "wandb",
    "loss_type": "huber",
    "torch_compile": True,
    "multires_noise_iterations": 6,
}
"""The switches beside which some options act at all."""


@pytest.fixture
def required(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    monkeypatch.chdir(tmp_path)
    Path("dataset.toml").write_text("", encoding="utf-8")
    return {"pretrained_model_name_or_path": "m", "dataset_config": "dataset.toml", "output_dir": "o"}


def write(values: dict[str, object]) -> list[str]:
    def literal(value: object) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        return f'"{value}"' if isinstance(value, str) else str(value).replace("'", '"')

    Path("run.toml").write_text("".join(f"{n} = {literal(v)}\n" for n, v in values.items()), encoding="utf-8")
    return ["--config_file", "run.toml"]


def test_every_name_is_in_the_table_and_every_supported_one_in_a_model() -> None:
    assert len(NAMES) > 200
    assert [name for name in NAMES if name not in known_options()] == []
    parsed_apart = {*HANDLED_BY_PARSER, *SHORTHANDS, *SYNONYMS}
    supported = {known.name for known in known_options().values() if known.status == "supported"}
    assert supported - parsed_apart == set(options()) - OURS


def test_rows_are_whole() -> None:
    for known in known_options().values():
        assert known.kind in UNSET
        assert known.status in ("supported", "no_effect", "not_yet", "refused")
        assert bool(known.note) == (known.status != "supported"), known.name
        assert all(name in known_options() for name in known.only_with), known.name


def test_kinds_and_defaults_are_those_of_sd_scripts() -> None:
    for name, option in options().items():
        known = known_options().get(name)
        if known is None or name in OTHER_DEFAULTS:
            continue
        assert option.default == known.default, name
        assert option.kind == known.kind, name


@pytest.mark.parametrize("how", ["default", "unset"])
def test_a_file_with_every_key_unset_changes_nothing(required: dict[str, object], how: str) -> None:
    """`unset` writes 0, "", false and [] wherever sd-scripts has no default, as kohya_ss does."""
    plain = load_run_config("train_network", write(required))
    real_zero = {"unet_lr", "seed", "network_dropout"}
    values: dict[str, object] = {}
    for known in known_options().values():
        no_default = "" if how == "default" or known.name in real_zero else UNSET[known.kind]
        values[known.name] = no_default if known.default is None else known.default
    # Here false is an answer: the model predicts the noise.
    values["v_parameterization"] = ""
    loaded = load_run_config("train_network", write(values | required | {"config_file": ""}))
    assert loaded.config == plain.config
    assert loaded.warnings == ()


def test_kohya_ss_values_for_unset_and_numbers_as_text(required: dict[str, object]) -> None:
    kohya: dict[str, object] = {
        "max_timestep": 1000, "dynamo_backend": "no", "noise_offset_type": "Original", "clip_skip": 0,
        "vae_batch_size": 0,
        "max_token_length": "0", "save_every_n_steps": "0", "learning_rate": "1e-4", "max_train_steps": "800",
        "optimizer_args": [], "mixed_precision": "", "lr_scheduler": "", "huber_c": 0.1, "resolution": "512,512",
        "adaptive_noise_scale": 0, "caption_extension": "", "lr_scheduler_type": "", "lr_scheduler_args": [],
        "lr_scheduler_num_cycles": "1", "lr_scheduler_power": "1", "lr_warmup_steps": 0, "lr_decay_steps": 0,
        "lr_scheduler_timescale": 0, "lr_scheduler_min_lr_ratio": 0,
    }  # fmt: skip
    loaded = load_run_config("train_network", write(required | kohya))
    assert loaded.warnings == ()
    assert (loaded.config.optimizer.learning_rate, loaded.config.training.max_train_steps) == (1e-4, 800)
    assert loaded.config.model.clip_skip is None
    assert loaded.config.dataset.caption_extension == ".caption"


def refusals(status: str) -> list[KnownOption]:
    return [known for known in known_options().values() if known.status == status and known.name not in CONTEXT]


@pytest.mark.parametrize("status", ["not_yet", "refused"])
def test_real_values_of_unsupported_options_are_named(required: dict[str, object], status: str) -> None:
    values = {known.name: REAL[known.kind] for known in refusals(status)} | CONTEXT
    del required["dataset_config"]  # folders are ignored, with a warning, beside a dataset file
    with pytest.raises(ConfigError) as caught:
        load_run_config("train_network", write(values | required))
    message = str(caught.value)
    rule = "is not yet supported" if status == "not_yet" else "is refused"
    for known in refusals(status):
        assert f": {known.name} = {REAL[known.kind]!r}: {rule}; {known.note}" in message


def test_options_without_effect_give_one_warning_each(required: dict[str, object]) -> None:
    values = {known.name: REAL[known.kind] for known in refusals("no_effect")}
    loaded = load_run_config("train_network", write(values | required))
    assert len(loaded.warnings) == len(values)
    for name, warning in zip(values, loaded.warnings, strict=True):
        assert f"{name} has no effect: " in warning


def test_an_option_whose_switch_is_off_only_warns(required: dict[str, object]) -> None:
    values: dict[str, object] = {"dynamo_backend": "eager"}
    loaded = load_run_config("train_network", write(values | required))
    assert "it acts only with torch_compile" in loaded.warnings[0]
