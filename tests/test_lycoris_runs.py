"""Whole runs of LyCORIS networks: the loss falls, everything learns, the base stays, files go on and are read."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sd_train.__main__ import main as sd_train
from sd_train.config.lycoris_args import read_lycoris
from sd_train.config.values import parse_arguments
from sd_train.trainables.lycoris import Lycoris, LycorisSettings
from sd_train.trainables.lycoris_files import from_file
from tests.lycoris_cases import write_small
from tests.models import all_tensors, assert_equal_tensors, load, write_file
from tests.runs import differences, largest_difference, loss_of, metadata, train, words, write_dataset

LYCORIS = "--network_module lycoris.kohya"
UNET = f"{LYCORIS} --network_train_unet_only"

RATES = {
    "dora": 1e-2, "loha": 5e-2, "lokr": 3e-2, "ia3": 5e-2, "dylora": 3e-2, "glora": 1e-2, "full": 2e-3,
    "diag-oft": 1e-2, "boft": 1e-2,
}  # fmt: skip
"""Learning rate by algorithm."""

STILL = ("attn1_to_q", "attn1_to_k", "attn2_to_q", "attn2_to_k")
"""Over one pixel, or one token, attention has nothing to weigh: the middle block's have no gradients."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs, as small as they can be."""
    return write_dataset(tmp_path_factory.mktemp("dataset") / "photos.toml")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with few modules."""
    return write_small(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("algorithm", RATES)
def test_it_learns_and_the_base_stays(
    small: Path, photos: Path, tmp_path: Path, algorithm: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = f"algo={algorithm} preset=attn-mlp" + (" block_size=2" if algorithm == "dylora" else "")
    more = f"{UNET} --max_train_steps 6 --learning_rate {RATES[algorithm]} --network_args {arguments}"
    path = train(small, photos, tmp_path / "out", more)
    assert metadata(path)["ss_network_module"] == "lycoris.kohya"
    family = load(small)
    base = all_tensors(family)
    chosen = read_lycoris(
        {"network_module": "lycoris.kohya", "network_dim": 4, "network_alpha": 4.0, "network_dropout": None,
         "network_args": parse_arguments(arguments.split())}
    )  # fmt: skip
    network = Lycoris(LycorisSettings(chosen, {"unet": 1.0}, seed=3))
    network.install(family)
    begun = {name: tensor.clone() for name, tensor in network.file_tensors(network.tensors()).items()}
    with network.for_inference():
        before = loss_of(family, network, photos)
        network.load(from_file(load_file(path), network.tensors()))
        assert loss_of(family, network, photos) < 0.99 * before
    assert_equal_tensors(all_tensors(family), base)
    trained = load_file(path)
    assert trained.keys() == begun.keys()
    same = {name for name, tensor in trained.items() if torch.equal(tensor, begun[name].to(tensor.dtype))}
    learning = {name for name in same if not name.endswith((".alpha", ".on_input"))}
    assert all("mid_block" in name and any(part in name for part in STILL) for name in learning), sorted(learning)[:3]
    capsys.readouterr()
    assert sd_train(["lora", "check", str(path)]) == 0
    assert "Stable Diffusion" in capsys.readouterr().out


def test_a_resume_goes_on_to_the_bit_whatever_the_global_generators_say(
    small: Path, photos: Path, tmp_path: Path
) -> None:
    arguments = "algo=dylora block_size=1 module_dropout=0.3 train_norm=True preset=attn-mlp"
    more = f"{UNET} --max_train_steps 4 --save_every_n_steps 2 --save_state --use_ema --scale_weight_norms 1"
    more += f" --network_args {arguments}"
    random.seed(1)
    torch.manual_seed(1)
    states = random.getstate(), torch.get_rng_state()
    whole = train(small, photos, tmp_path / "whole", more)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    random.seed(2)
    torch.manual_seed(2)
    state = tmp_path / "whole" / "lora-step00000002-state"
    resumed = train(small, photos, tmp_path / "rest", f"{more} --resume {state}")
    assert differences(whole, resumed) == []
    assert differences(*(path.with_name("lora-ema.safetensors") for path in (whole, resumed))) == []


@pytest.mark.parametrize("arguments", ["algo=loha use_scalar=True", "algo=dylora"])
def test_it_starts_from_network_weights(small: Path, photos: Path, tmp_path: Path, arguments: str) -> None:
    more = f"{LYCORIS} --network_args {arguments} preset=attn-mlp"
    first = train(small, photos, tmp_path / "first", f"{more} --learning_rate 1e-2 --max_train_steps 2")
    still = f"{more} --learning_rate 1e-12 --max_train_steps 1 --optimizer_args weight_decay=0"
    again = train(small, photos, tmp_path / "again", f"{still} --network_weights {first}")
    assert largest_difference(first, again) < 1e-9


def test_sdxl_and_a_picture_of_it(photos: Path, tmp_path: Path) -> None:
    model = write_file(tmp_path, "sdxl")
    more = f"{LYCORIS} --network_args algo=lokr factor=4 preset=attn-mlp --max_train_steps 1 --learning_rate 1e-2"
    path = train(model, photos, tmp_path / "out", more)
    assert {name[:10] for name in load_file(path)} == {"lora_unet_", "lora_te1_t", "lora_te2_t"}
    picture = tmp_path / "pictures"
    drawing = f"sample {model} --lora {path} --output_dir {picture} --prompt cat --width 64 --height 64 --steps 1"
    assert sd_train(drawing.split()) == 0
    assert list(picture.glob("*.png"))


def test_a_preset_that_leaves_text_encoders_out_is_told(
    small: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = f"{LYCORIS} --network_args algo=loha preset=unet-only --max_train_steps 1"
    assert sd_train(["plan", "train_network", *words(small, photos, tmp_path / "out", more)]) == 0
    assert "preset=unet-only leaves the text encoder as it is" in "".join(capsys.readouterr())


def test_sd_scripts_dylora_is_a_plain_lora(small: Path, photos: Path, tmp_path: Path) -> None:
    more = "--network_module networks.dylora --network_args unit=2 --max_train_steps 1 --output_lora_format kohya"
    tensors = load_file(train(small, photos, tmp_path / "out", more))
    plain = load_file(train(small, photos, tmp_path / "plain", "--max_train_steps 1"))
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        name: tensor.shape for name, tensor in plain.items()
    }
