"""Trainings with the arguments of networks.lora, through the entry point."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd_train.__main__ import main as sd_train
from sd_train.demo.tiny_model import TinyKind
from sd_train.train_network import main
from tests.lycoris_cases import write_small
from tests.models import write_file
from tests.runs import differences, fixed_noise_loss, metadata, scalars, train, words, write_dataset

STILL = "--learning_rate 1e-12 --max_train_steps 1 --optimizer_args weight_decay=0"
"""Leaves the weights where they started, but for rounding."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs, as small as they can be."""
    return write_dataset(tmp_path_factory.mktemp("dataset") / "small.toml")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of Stable Diffusion 1.x, with few modules."""
    return write_small(tmp_path_factory.mktemp("model"))


def block_dims(kind: TinyKind) -> str:
    """Ranks 2, 3, 4, ... for every block."""
    return ",".join(str(2 + place % 3) for place in range(23 if kind == "sdxl" else 25))


def ranks(path: Path) -> dict[str, int]:
    """The rank of each module of a file."""
    return {name.removesuffix(".lora_down.weight"): len(tensor) for name, tensor in load_file(path).items()
            if "lora_down" in name}  # fmt: skip


def close(first: Path, second: Path) -> bool:
    """Whether two files hold the same up to rounding."""
    ours, theirs = load_file(first), load_file(second)
    return ours.keys() == theirs.keys() and all(torch.allclose(ours[n], theirs[n], atol=1e-6) for n in ours)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_the_loss_falls_with_convolutions_and_ranks_by_block(
    kind: TinyKind, model: Path, small: Path, tmp_path: Path
) -> None:
    model, dataset = write_file(tmp_path, kind) if kind == "sdxl" else model, small
    more = f"--learning_rate 1e-2 --max_train_steps 8 --cache_latents --logging_dir {tmp_path / 'logs'}"
    arguments = f"conv_dim=3 conv_alpha=3 block_dims={block_dims(kind)} loraplus_lr_ratio=2 down_lr_weight=cosine+0.5"
    lora = train(model, dataset, tmp_path / "out", f"{more} --network_args {arguments}")
    assert set(ranks(lora).values()) == {2, 3, 4}
    tensors = load_file(lora)
    assert any(tensor.shape[2:] == (3, 3) and len(tensor) == 3 for tensor in tensors.values())
    wide = [name for name, tensor in tensors.items() if tensor.shape[2:] == (3, 3)]
    assert all(tensors[name.replace("_down.", "_up.")].any() for name in wide)
    curves = scalars(tmp_path / "logs")
    first = 2 if kind == "sdxl" else 1
    assert curves[f"lr/unet_block{first} plus"][-1][1] == pytest.approx(2 * curves[f"lr/unet_block{first}"][-1][1])
    assert curves["lr/textencoder plus"][-1][1] == pytest.approx(2e-2)
    merged = tmp_path / "merged.safetensors"
    files = ["--models", str(lora), "--sd_model", str(model), "--save_to", str(merged)]
    assert sd_train(["lora", "merge", *files]) == 0
    before, after = (fixed_noise_loss(path, dataset, None) for path in (model, merged))
    assert after < 0.95 * before


def test_a_part_and_the_rest_are_the_whole(model: Path, small: Path, tmp_path: Path) -> None:
    arguments = "conv_dim=2 rank_dropout=0.2 module_dropout=0.2 loraplus_unet_lr_ratio=4 mid_lr_weight=0"
    more = "--max_train_steps 4 --save_every_n_steps 2 --network_dropout 0.1 --scale_weight_norms 0.02"
    more += f" --network_args {arguments}"
    whole = train(model, small, tmp_path / "whole", f"{more} --save_state --logging_dir {tmp_path / 'logs'}")
    state = tmp_path / "whole" / "lora-step00000002-state"
    rest = train(model, small, tmp_path / "rest", f"{more} --resume {state}")
    assert differences(whole, rest) == []
    assert metadata(whole) == metadata(rest)
    assert metadata(whole)["ss_scale_weight_norms"] == "0.02"
    curves = scalars(tmp_path / "logs")
    assert curves["max_norm/max_key_norm"][-1][1] == pytest.approx(0.02, rel=1e-4)
    assert curves["max_norm/keys_scaled"][-1][1] > 0
    assert not any("mid_block" in name for name in load_file(whole))


def test_ranks_and_alphas_come_from_the_file(
    model: Path, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = f"conv_dim=2 conv_alpha=1 block_dims={block_dims('sd1')}"
    for form in ("kohya", "diffusers"):
        more = f"--learning_rate 1e-2 --max_train_steps 2 --output_lora_format {form} --network_args {arguments}"
        lora = train(model, small, tmp_path / form, more)
        start = f"--dim_from_weights --network_weights {lora}"
        again = train(model, small, tmp_path / f"{form}_again", f"{start} {STILL} --save_state")
        if form == "kohya":
            kohya = lora
            assert close(lora, again)
        # Alphas are multiplied into diffusers' files, and told beside them.
        assert ranks(again) == ranks(kohya)
        assert metadata(again)["ss_network_dim"] == "Dynamic"
    assert "diffusers loses" not in capsys.readouterr().err
    further = f"--dim_from_weights --network_weights {kohya} --max_train_steps 2"
    state = next((tmp_path / "kohya_again").glob("*-state"))
    assert main(words(model, small, tmp_path / "resumed", f"{further} --resume {state}")) == 0
    assert ranks(tmp_path / "resumed" / "lora.safetensors") == ranks(kohya)
    # Without the switch the options count, and the message says what would fit.
    assert main(words(model, small, tmp_path / "no", f"{STILL} --network_weights {kohya}")) == 3
    assert "the file has convolutions; give --dim_from_weights" in capsys.readouterr().err


def test_batches_that_every_module_is_left_out_of_teach_nothing(model: Path, small: Path, tmp_path: Path) -> None:
    more = "--max_train_steps 2 --network_train_text_encoder_only --network_args module_dropout=0.999"
    assert not any(
        tensor.any() for name, tensor in load_file(train(model, small, tmp_path, more)).items() if "lora_up" in name
    )


def test_old_files_without_alphas_start_a_training(model: Path, small: Path, tmp_path: Path) -> None:
    lora = train(model, small, tmp_path / "first", "--learning_rate 1e-2 --max_train_steps 2")
    bare = {name: tensor for name, tensor in load_file(lora).items() if not name.endswith(".alpha")}
    save_file(bare, tmp_path / "bare.safetensors")
    again = train(model, small, tmp_path / "again", f"{STILL} --network_weights {tmp_path / 'bare.safetensors'}")
    assert close(lora, again)


def test_base_weights_are_part_of_the_model(
    model: Path, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = "--learning_rate 3e-2 --max_train_steps 2 --network_args conv_dim=2"
    base = train(model, small, tmp_path / "base", wide)
    with_base = f"--base_weights {base} --base_weights_multiplier 0.5"
    more = "--max_train_steps 1 --save_state"
    upon = train(model, small, tmp_path / "upon", f"{more} {with_base}")
    # The same as training on a model that it was merged into.
    merged = tmp_path / "merged.safetensors"
    files = ["--models", str(base), "--ratios", "0.5", "--sd_model", str(model), "--save_to", str(merged)]
    assert sd_train(["lora", "merge", *files]) == 0
    assert differences(upon, train(merged, small, tmp_path / "on_merged", more)) == []
    state = tmp_path / "upon" / "lora-state"
    further = f"--max_train_steps 2 --resume {state}"
    assert main(words(model, small, tmp_path / "other", further)) in (2, 3)
    assert "base" in capsys.readouterr().err
    assert main(words(model, small, tmp_path / "same", f"{further} {with_base}")) == 0
    assert main(words(model, small, tmp_path / "wrong", f"{more} --base_weights {merged}")) == 3
    assert "--base_weights: " in capsys.readouterr().err


def hada(seed: int = 0) -> dict[str, Tensor]:
    """A LoHa module."""
    generator = torch.Generator().manual_seed(seed)
    key = "lora_unet_mid_block_attentions_0_proj_in"
    return {f"{key}.hada_w{n}_{side}": torch.randn(64, 4, generator=generator) if side == "a" else
            torch.randn(4, 64, generator=generator) for n in (1, 2) for side in "ab"}  # fmt: skip


@pytest.mark.parametrize(
    ("more", "status", "expected"),
    [
        ("--network_args block_dims=1,2", 2, "block_dims = 1,2: has 2 values, Stable Diffusion 1.x and 2.x needs 25"),
        ("--network_args down_lr_weight=1,1 up_lr_weight=0.5", 2, "write up_lr_weight=0.5,1,1,1,1,1,1,1,1,1,1,1"),
        ("--network_args mid_lr_weight=0 down_lr_weight=zeros up_lr_weight=zeros", 2, "so that it would learn nothing"),
        (f"--network_args block_dims=4,{','.join(['0'] * 24)}", 2, "no block of the U-Net has both a rank and"),
        ("--network_weights hada.safetensors", 3, "holds modules of other algorithms (loha)"),
        ("--network_weights hada.safetensors --dim_from_weights", 3, "sd-train lora convert --to lora"),
    ],
)  # fmt: skip
def test_what_does_not_fit_ends_before_the_first_update(
    more: str, status: int, expected: str, model: Path, small: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    save_file(hada(), "hada.safetensors")
    assert main(words(model, small, tmp_path / "out", f"--max_train_steps 1 {more}")) == status
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out" / "lora.safetensors").exists()


def test_alphas_that_diffusers_loses_are_warned_of(
    model: Path, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = f"--max_train_steps 1 --network_args block_alphas={','.join(str(1 + place % 2) for place in range(25))}"
    assert sd_train(["plan", "train_network", *words(model, small, tmp_path / "out", more)]) == 0
    assert "for diffusers give --output_lora_format diffusers" in "".join(capsys.readouterr())
