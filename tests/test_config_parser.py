"""Command line and configuration file: precedence, origins, and every problem in one message."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sd_train.config.catalogue import options
from sd_train.config.parser import LoadedConfig, load_run_config
from sd_train.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a dataset file, which is all that a minimal command line needs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dataset.toml").write_text("", encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("a cat\n", encoding="utf-8")
    return tmp_path


def load(*words: str) -> LoadedConfig:
    required = ["--pretrained_model_name_or_path", "model", "--dataset_config", "dataset.toml", "--output_dir", "out"]
    return load_run_config("train_network", [*required, *words])


def words(text: str) -> list[str]:
    return text.split()


def refused(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*words)
    return str(caught.value)


@pytest.mark.usefixtures("folder")
class TestCommandLine:
    def test_values_get_the_types_of_their_options(self) -> None:
        config = load(
            *words("--max_train_steps 12 --learning_rate 1e-4 --cache_latents --resolution 512,768"),
            *words("--optimizer_args weight_decay=0.01 betas=.9,.999 decouple=True mode=fast --lr_scheduler cosine"),
            *words("--lr_warmup_steps 10% --text_encoder_lr 5e-5 --max_token_length 150 --mixed_precision=bf16"),
        ).config
        assert config.training.max_train_steps == 12
        assert config.optimizer.learning_rate == 1e-4
        assert config.dataset.cache_latents is True
        assert config.dataset.resolution == (512, 768)
        assert config.training.mixed_precision == "bf16"
        expected = {"weight_decay": 0.01, "betas": (0.9, 0.999), "decouple": True, "mode": "fast"}
        assert config.optimizer.optimizer_args == expected
        assert config.optimizer.lr_warmup_steps == 0.1
        assert config.network.text_encoder_lr == 5e-5
        assert config.model.max_token_length == 150
        assert config.saving.output_dir == Path("out")

    def test_all_problems_come_out_at_once(self) -> None:
        message = refused(
            *words("--max_train_stpes 3 --max_train 3 --seed abc --train_batch_size 0 --mixed_precision fp61"),
            *words("--full_bf16 --deepspeed --sample_every_n_steps 5 --output_name --cache_latents yes"),
            *words("--network_args conv_dim=x"),
        )
        for expected in (
            "--max_train_stpes = '3': is no option; did you mean max_train_steps?",
            "names are not shortened: write max_train_steps or max_train_epochs",
            "--seed = 'abc': must be a whole number",
            "--train_batch_size = '0': must be a whole number >= 1",
            "did you mean fp16?",
            "--full_bf16 = True: is not yet supported",
            "--deepspeed = True: is refused; use mixed_precision",
            "--sample_every_n_steps: there are no prompts",
            "--output_name: needs a value",
            "--cache_latents = 'yes': is a switch",
            "conv_dim = 'x': must be a whole number from 1 to 16384; write for example conv_dim=8",
        ):
            assert expected in message
        assert message.startswith("13 problems:")

    def test_missing_required_options_name_the_way_out(self) -> None:
        with pytest.raises(ConfigError) as caught:
            load_run_config("train_network", [])
        message = str(caught.value)
        assert "--output_dir: is required" in message
        assert "--pretrained_model_name_or_path: is required" in message
        assert "10_sks dog (--train_data_dir FOLDER)" in message

    def test_last_of_two_equal_flags_counts_and_words_without_flag_are_refused(self) -> None:
        assert load("--seed", "1", "--seed", "2").config.training.seed == 2
        with pytest.raises(ConfigError, match="stands before the first option"):
            load_run_config("train_network", ["stray"])
        assert "takes one value and got 2" in refused("--output_name", "a", "b")

    @pytest.mark.parametrize("text", ["1.0", "1.5", "-1", "100%", "150%", "many", "nan"])
    def test_warmup_that_is_neither_steps_nor_share(self, text: str) -> None:
        assert "--lr_warmup_steps" in refused("--lr_scheduler", "linear", "--lr_warmup_steps", text)

    @pytest.mark.parametrize(("text", "value"), [("100", 100), ("0", 0), ("0.5", 0.5), ("5%", 0.05), ("1", 1)])
    def test_warmup(self, text: str, value: float) -> None:
        warmup = load("--lr_scheduler", "linear", "--lr_warmup_steps", text).config.optimizer.lr_warmup_steps
        assert warmup == value
        assert isinstance(warmup, int) == (value == int(value))

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            ("--optimizer_args weight_decay", "'weight_decay' is not name=value"),
            ("--optimizer_args a=1 a=2", "a is given twice"),
            ("--network_args foo=1", "foo: unknown to networks.lora"),
            ("--text_encoder_lr 1e-4 1e-5", "takes one rate"),
            ("--resolution 512x512", 'write "512" for a square'),
            ("--resolution 512,0", "--resolution"),
            ("--learning_rate nan", "--learning_rate"),
            ("--learning_rate -1", "must be a number >= 0"),
            ("--save_model_as diffusers", "are never that; write safetensors or ckpt or pt"),
            ("--log_with comet_ml --logging_dir logs", "must be one of: tensorboard, jsonl, wandb, all"),
            ("--network_module networks.oft", "is not trained here; write lycoris.kohya with network_args"),
            ("--max_train_steps 0", "must be a whole number >= 1"),
            ("--max_train_steps 1000000001", "must be a whole number >= 1 and <= 1000000000"),
            ("--max_train_epochs 1000000001", "--max_train_epochs"),
            ("--train_batch_size 65537", "--train_batch_size"),
            ("--vae_batch_size 65537", "--vae_batch_size"),
            ("--gradient_accumulation_steps 1000001", "--gradient_accumulation_steps"),
            ("--max_data_loader_n_workers 1025", "--max_data_loader_n_workers"),
            ("--network_dim 16385", "--network_dim"),
            ("--network_alpha 1e7", "must be a number >= 0 and <= 1000000"),
            ("--learning_rate 1e7", "--learning_rate"),
            ("--unet_lr 1e7", "--unet_lr"),
            ("--text_encoder_lr 1e7", "--text_encoder_lr"),
            ("--dataset_repeats 1000001", "--dataset_repeats"),
            ("--max_bucket_reso 32769", "--max_bucket_reso"),
            ("--resolution 63", "each side must be 64 to 16384 pixels"),
            ("--resolution 512,16385", "each side must be 64 to 16384 pixels"),
            (f"--seed {'9' * 5000}", "--seed"),
            (f"--max_train_steps {'9' * 400}", "--max_train_steps"),
        ],
    )
    def test_bad_values(self, words: str, expected: str) -> None:
        assert expected in refused(*words.split())


    @pytest.mark.parametrize(
        "name", ["output_dir", "dataset_config", "resume", "network_weights", "logging_dir", "metadata_author"]
    )
    def test_text_that_no_file_can_hold(self, name: str) -> None:
        assert f"--{name} = 'a\\x00b': holds a null character; remove it" in refused(f"--{name}", "a\0b")
        assert "holds bytes that are not UTF-8" in refused(f"--{name}", os.fsdecode(b"caf\xe9"))

    @pytest.mark.parametrize(
        "name",
        ["output_dir", "dataset_config", "resume", "logging_dir", "config_file", "pretrained_model_name_or_path"],
    )
    def test_names_that_are_too_long(self, name: str) -> None:
        assert f"{'x' * 40}" in refused(f"--{name}", "x" * 300)

    def test_null_characters_in_the_name_of_the_file(self) -> None:
        assert "no file name holds a null character" in refused("--config_file", "a\0b")
        assert "no file name holds a null character" in refused("--config_file", "a\0b", "--output_config")


class TestConfigFile:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            (f"seed = {'1' * 5000}", "a number has more than"),
            (f"seed = 0x{'f' * 5000}", "a number has more than"),
            (f"optimizer_args = [{'1' * 5000}]", "a number has more than"),
            (f"optimizer_args = {'[' * 5000}", "is nested deeper than"),
            (f"optimizer_args = {'[' * 100}{']' * 100}", "is nested deeper than"),
            ('output_dir = "a\\u0000b"', "run.toml:1: output_dir = 'a\\x00b': holds a null character"),
            ('optimizer_args = ["a=\\u0000"]', "holds a null character"),
        ],
    )
    def test_what_python_itself_gives_up_on(self, folder: Path, text: str, expected: str) -> None:
        (folder / "run.toml").write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError) as caught:
            load_run_config("train_network", ["--config_file", "run.toml"])
        assert "run.toml" in str(caught.value)
        assert expected in str(caught.value)

    def test_command_line_then_file_then_default_with_origins(self, folder: Path) -> None:
        text = '\ufeff[a]\r\nmax_train_steps = 800\r\nseed = "7"\r\n[b]\r\ncache_latents = true\r\nflip_aug = true\r\n'
        (folder / "run.toml").write_bytes(text.encode())
        config = load("--config_file", "run", "--max_train_steps", "5", "--no_flip_aug").config
        assert (config.training.max_train_steps, config.training.seed) == (5, 7)
        assert (config.dataset.cache_latents, config.dataset.flip_aug) == (True, False)
        assert config.origins["max_train_steps"] == "--max_train_steps"
        assert config.origins["seed"] == "run.toml:3"
        assert config.origins["flip_aug"] == "--no_flip_aug"
        assert config.origins["learning_rate"] == "default"

    def test_problems_name_file_and_line(self, folder: Path) -> None:
        (folder / "run.toml").write_text(
            "seed = true\nlerning_rate = 1\n[x]\nseed = 3\nmax_train_steps = 1.5\n[y]\nresolution = 512\n"
            'output_name = 3\ncache_latents = "true"\nxformers = "true"\noptimizer_args = {a=1}\n'
            "[[datasets]]\nresolution = 512\n",
            encoding="utf-8",
        )
        message = refused("--config_file", "run.toml")
        assert "run.toml:1: seed = True: must be a whole number" in message
        assert "run.toml:2: lerning_rate = 1: is no option; did you mean learning_rate?" in message
        assert "run.toml:4: x.seed = 3: stands in line 1 too" in message
        assert "run.toml:5: max_train_steps = 1.5: must be a whole number" in message
        assert "run.toml:8: output_name = 3: must be text in quotes" in message
        assert "run.toml:9: cache_latents = 'true': must be true or false" in message
        assert "run.toml:10: xformers = 'true': must be true or false" in message
        assert 'write a list of texts: optimizer_args = ["name=value"]' in message
        assert "dataset_config = 'dataset.toml'" in message
        assert message.startswith("11 problems:")

    @pytest.mark.parametrize("text", ["optimizer_args = {eps=1}", "[optimizer_args]\neps = 1"])
    def test_a_table_of_arguments_is_answered_with_the_list(self, folder: Path, text: str) -> None:
        (folder / "run.toml").write_text(text, encoding="utf-8")
        assert 'write a list of texts: optimizer_args = ["eps=1"]' in refused("--config_file", "run.toml")

    def test_unset_on_the_command_line_takes_back_what_the_file_says(self, folder: Path) -> None:
        (folder / "run.toml").write_text('max_train_epochs = 3\noutput_name = "a"\nunet_lr = 1e-4\n', encoding="utf-8")
        words = ["--config_file", "run.toml", "--max_train_epochs", "0", "--output_name", "", "--unet_lr", "0"]
        config = load(*words).config
        assert config.training.max_train_epochs is None
        assert config.saving.output_name is None
        assert config.network.unet_lr == 0, "0 is a rate, not 'unset'"

    def test_missing_file(self, folder: Path) -> None:
        assert "nothing.toml: there is no such file" in refused("--config_file", "nothing")

    def test_output_config_writes_what_is_no_default_and_never_overwrites(self, folder: Path) -> None:
        words = ["--config_file", "new", "--output_config", "--seed", "3", "--max_train_steps", "1600"]
        with pytest.raises(SystemExit) as caught:
            load(*words)
        assert caught.value.code == 0
        written = (folder / "new.toml").read_text(encoding="utf-8")
        assert "seed = 3" in written
        assert "max_train_steps" not in written
        assert load_run_config("train_network", ["--config_file", "new"]).config == load("--seed", "3").config
        assert "exists already" in refused(*words)
        assert "needs a path" in refused("--output_config")


@pytest.mark.usefixtures("folder")
class TestRules:
    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            ("--network_train_unet_only --network_train_text_encoder_only", "exclude each other"),
            ("--unet_lr 0 --text_encoder_lr 0", "--unet_lr and --text_encoder_lr: nothing would be trained"),
            ("--network_train_unet_only --unet_lr 0", "nothing would be trained"),
            ("--network_train_text_encoder_only --text_encoder_lr 0", "nothing would be trained"),
            ("--lr_warmup_steps 10", "constant_with_warmup"),
            ("--log_with tensorboard", "give one as logging_dir"),
            ("--sample_at_first", "there are no prompts"),
            ("--sample_prompts none.txt --sample_at_first", "there is no such file"),
            ("--network_weights none.safetensors", "there is no such file"),
            ("--resume none", "there is no such folder"),
            ("--output_name a/b", "give the folder as output_dir"),
            ("--output_name a\\b", "give the folder as output_dir"),
            ("--output_name a\x1bb", "control character"),
            ("--output_name a\x7fb", "control character"),
            (f"--output_name {'x' * 151}", "longer than 150 characters"),
            (f"--output_name {'猫' * 70}", "200 bytes in UTF-8"),
            (f"--output_dir a/{'猫' * 90}/b", "longer than 255 bytes"),
            ("--logging_dir prompts.txt", "is a file"),
            ("--use_8bit_adam --optimizer_type Lion", "stands for optimizer_type = AdamW8bit"),
            ("--use_8bit_adam --use_lion_optimizer", "remove one of the two"),
        ],
    )
    def test_refused(self, words: str, expected: str) -> None:
        assert expected in refused(*words.split())

    @pytest.mark.parametrize(
        ("words", "expected"),
        [
            ("--max_train_epochs 2 --max_train_steps 10", "--max_train_steps has no effect"),
            ("--max_train_epochs 2 --max_train_steps 0", None),
            ("--sample_prompts prompts.txt", "--sample_prompts has no effect"),
            ("--sample_prompts prompts.txt --sample_every_n_steps 5", None),
            ("--network_train_unet_only --text_encoder_lr 1e-4", "--text_encoder_lr has no effect"),
            ("--log_prefix a", "--log_prefix has no effect"),
            ("--learning_rate 0", "nothing is learned"),
            ("--learning_rate 0 --unet_lr 1e-4", None),
            ("--unet_lr 0", None),
            (f"--output_name {'x' * 150}", None),
            (f"--output_name {'猫' * 60}", None),
            ("--sample_prompts prompts.txt --sample_every_n_steps 5 --sample_every_n_epochs 1",
             "--sample_every_n_steps has no effect: sample_every_n_epochs is given"),
            ("--sample_prompts prompts.txt --sample_every_n_steps 5 --sample_every_n_epochs 0", None),
            ("--vae_batch_size 4", "--vae_batch_size has no effect: cache_latents is not given"),
            ("--vae_batch_size 1", None),
            ("--vae_batch_size 4 --cache_latents", None),
            ("--network_weights prompts.txt --resume .", "--network_weights has no effect: resume"),
            ("--network_weights prompts.txt", None),
            ("--lowvram", "--lowvram has no effect"),
            ("--console_log_level DEBUG", "redirect them"),
            ("--train_data_dir photos", "dataset_config is given, as in sd-scripts"),
            ("--multires_noise_discount 0.8", "multires_noise_iterations is not given"),
            ("--multires_noise_discount 0.3 --multires_noise_iterations 0", None),
            ("--ip_noise_gamma 0 --ip_noise_gamma_random_strength", "ip_noise_gamma is not given"),
            ("--logit_mean 1", "timestep_sampling is not logit_normal"),
            ("--logit_mean 0 --logit_std 1 --min_timestep 0 --max_timestep 1000", None),
            ("--huber_c 0.2", "--huber_c has no effect: loss_type is l2"),
            ("--loss_type huber --huber_scale 2", "--huber_scale has no effect: huber_schedule is snr"),
            ("--huber_schedule snr --huber_c 0.1 --huber_scale 1 --p2_k 1", None),
            ("--p2_k 2", "--p2_k has no effect: p2_gamma is not given"),
            ("--max_rollbacks 5", "--max_rollbacks has no effect: nan_policy is not rollback"),
            ("--nan_policy skip --snapshot_every_n_steps 9", "has no effect: nan_policy is skip"),
            ("--dream_detail_preservation 10", "dream_training is not given"),
        ],
    )
    def test_warned_or_accepted(self, words: str, expected: str | None) -> None:
        warnings = load(*words.split()).warnings
        assert [expected in warning for warning in warnings] == [True] if expected else warnings == ()

    @pytest.mark.skipif(os.name == "nt", reason="an error there")
    def test_names_that_windows_does_not_take(self) -> None:
        (warning,) = load("--output_name", "a:b?").warnings
        assert "Windows takes no : ? in file names" in warning

    def test_shorthand_and_other_spelling(self) -> None:
        config = load("--use_lion_optimizer", "--caption_extention", ".txt").config
        assert config.optimizer.optimizer_type == "Lion"
        assert config.dataset.caption_extension == ".txt"


def test_help_lists_every_option_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom sd_train.config.parser import load_run_config\n"
        "try:\n    load_run_config('train_network', ['--help'])\n"
        "finally:\n    heavy = {'torch', 'numpy', 'diffusers', 'transformers'} & set(sys.modules)\n"
        "    print('heavy:', sorted(heavy))\n"
    )
    root = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "heavy: []" in done.stdout
    for expected in ("training: ", "--max_train_steps N", "[default: 1600]", "not yet supported", "{no,fp16,bf16}"):
        assert expected in done.stdout
    for name, option in options().items():
        assert (f"\n  --{name}" in done.stdout) == option.belongs_to("train_network"), name
    assert "--full_bf16" not in done.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_run_config("train_network", ["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("sd_train ")
