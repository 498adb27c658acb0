"""The moving average: diffusers' sequence, saved beside the plain weights, resumed to the bit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from sd_train.__main__ import main as sd_train
from sd_train.config.parser import load_run_config
from sd_train.errors import ModelError
from sd_train.names import step_of
from sd_train.optim import ema as ema_module
from sd_train.optim.ema import Ema
from tests.models import reference_pipeline
from tests.runs import PHOTOS, differences, fixed_noise_loss, identical, metadata, scalars, train, words, write_dataset

EMA = "--use_ema --ema_decay 0.9"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset") / "photos.toml", subset="num_repeats = 3")


def weights(seed: int) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(5, 3, generator=generator)) for name in ("a", "b", "c")}


@pytest.mark.parametrize("block", [1, 2**26])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9999])
def test_it_is_that_of_diffusers(decay: float, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ema_module, "_BLOCK", block)
    live = weights(0)
    theirs = EMAModel(list(live.values()), decay=decay)
    ours = Ema(lambda: {name: parameter.detach() for name, parameter in live.items()}, decay, None)
    for step in range(1, 41):
        with torch.no_grad():
            for name, parameter in live.items():
                parameter.copy_(weights(step)[name])
        theirs.step(live.values())
        ours.update()
        assert ours.factor(step) == theirs.get_decay(step) == theirs.cur_decay_value
        for average, expected in zip(ours.tensors.values(), theirs.shadow_params, strict=True):
            assert torch.allclose(average, expected, rtol=1e-5, atol=1e-6)


def test_what_does_not_change_stays_to_the_bit() -> None:
    kept = {
        "alpha": torch.tensor(0.1),
        "half": torch.tensor([1e-7, 3.0], dtype=torch.bfloat16),
        "odd": torch.tensor([0.1, -1e30, 1e-38]),
        "count": torch.tensor([2**60 + 1, -1]),
        "flag": torch.tensor([True, False]),
    }
    average = Ema(lambda: kept, 0.9999, None)
    for _ in range(300):
        average.update()
    for name, tensor in kept.items():
        assert identical(average.tensors[name].to(tensor.dtype), tensor), name
    assert average.tensors["half"].dtype == torch.float32
    kept["count"] = torch.tensor([5, 6])
    average.update()
    assert average.tensors["count"].tolist() == [5, 6]
    with pytest.raises(ModelError, match="other weights"):
        average.load({"alpha": torch.tensor(1.0)})


AVERAGED = f"{EMA} --learning_rate 1e-2 --network_dropout 0.1 --max_train_steps 4 --save_every_n_steps 1 --save_state"


@pytest.fixture(scope="module")
def averaged(small_model: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run."""
    return train(small_model, photos, tmp_path_factory.mktemp("averaged"), AVERAGED).parent


def test_a_run_saves_what_its_saves_average_to(
    small_model: Path, photos: Path, averaged: Path, tmp_path: Path
) -> None:
    last = averaged / "lora.safetensors"
    plain = train(small_model, photos, tmp_path, AVERAGED.removeprefix(EMA))
    # It is in the way of nothing.
    assert differences(last, plain) == []
    assert metadata(last) == metadata(plain)
    expected: dict[str, torch.Tensor] = {}
    for n in range(4):
        weights_now = load_file(averaged / f"lora-step0000000{n + 1}.safetensors")
        left = min(0.9, (1 + n) / (10 + n)) if n else 0.0
        for name, tensor in weights_now.items():
            expected[name] = left * expected.get(name, tensor).double() + (1 - left) * tensor.double()
        average = load_file(averaged / f"lora-step0000000{n + 1}-ema.safetensors")
        assert average.keys() == expected.keys()
        assert max(float((average[name] - expected[name]).abs().max()) for name in average) < 1e-7
        for name in (name for name in average if name.endswith(".alpha")):
            assert identical(average[name], weights_now[name])
    final = averaged / "lora-ema.safetensors"
    assert differences(final, last) != []
    assert metadata(final)["ss_ema_decay"] == "0.9"
    hashes = ("sshs_model_hash", "sshs_legacy_hash")
    assert metadata(final, "ss_ema_decay", *hashes) == metadata(last, *hashes)
    # Whatever reads the one reads the other.
    assert fixed_noise_loss(small_model, photos, final) != fixed_noise_loss(small_model, photos, last)


def test_it_is_resumed_to_the_bit_and_may_lie_elsewhere(
    small_model: Path, photos: Path, averaged: Path, tmp_path: Path
) -> None:
    state = averaged / "lora-step00000002-state"
    assert json.loads((state / "progress.json").read_text())["extras"]["ema"] == {"updates": 2}
    train(small_model, photos, tmp_path, f"{AVERAGED} --ema_device cpu --resume {state}")
    for name in ("lora.safetensors", "lora-ema.safetensors", "lora-step00000003-ema.safetensors"):
        assert differences(averaged / name, tmp_path / name) == []


def test_a_run_goes_on_without_it_and_with_it_again(
    small_model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(small_model, photos, tmp_path, "--max_train_steps 1 --save_state")
    capsys.readouterr()
    train(small_model, photos, tmp_path, f"--max_train_steps 2 --save_state --resume latest {EMA}")
    said = capsys.readouterr().err
    assert "the state holds no moving average: it begins with the weights as they stand" in said
    assert "use_ema: False -> True" in said
    # Its own first update leaves nothing of where it began.
    assert differences(tmp_path / "lora.safetensors", tmp_path / "lora-ema.safetensors") == []
    kept = json.loads((tmp_path / "lora-state" / "progress.json").read_text())["extras"]["ema"]
    assert kept == {"updates": 1}
    train(small_model, photos, tmp_path, "--max_train_steps 3 --save_state --resume latest")
    assert "use_ema: True -> False" in capsys.readouterr().err
    assert not (tmp_path / "lora-state" / "ema.safetensors").exists()


def test_previews_with_the_average_change_no_weight(
    small_model: Path, photos: Path, averaged: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cup --w 64 --h 64 --s 2 --d 1\n")
    shown = f"{AVERAGED} --sample_ema --sample_prompts {prompts} --sample_every_n_steps"
    train(small_model, photos, tmp_path / "shown", f"{shown} 2")
    for file in ("lora.safetensors", "lora-ema.safetensors"):
        assert differences(averaged / file, tmp_path / "shown" / file) == []
    drawn = sorted((tmp_path / "shown" / "sample").glob("*.png"))
    # Runs that start from the saved files see the same picture before their first update, or another.
    same = {}
    for file in ("lora.safetensors", "lora-ema.safetensors"):
        start = f"--network_weights {averaged / file} --max_train_steps 1 --sample_at_first --sample_prompts {prompts}"
        train(small_model, photos, tmp_path / file, start)
        (first,) = (tmp_path / file / "sample").glob("*.png")
        same[file] = Image.open(first).tobytes() == Image.open(drawn[-1]).tobytes()
    assert same == {"lora.safetensors": False, "lora-ema.safetensors": True}


def test_diffusers_reads_its_own_format(tiny_model: Path, photos: Path, tmp_path: Path) -> None:
    more = f"{EMA} --max_train_steps 2 --save_precision fp16 --output_lora_format"
    for form in ("diffusers", "kohya"):
        train(tiny_model, photos, tmp_path / form, f"{more} {form}")
    pipeline: StableDiffusionPipeline = reference_pipeline()
    pipeline.text_encoder.__dict__.pop("text_model", None)
    counts = {}
    for form in ("diffusers", "kohya"):
        pipeline.load_lora_weights(str(tmp_path / form / "lora-ema.safetensors"), adapter_name=form)
        counts[form] = sum(f"lora_A.{form}" in name for name, _ in pipeline.unet.named_parameters())
    assert counts["diffusers"] == counts["kohya"] > 100
    averages = load_file(tmp_path / "diffusers" / "lora-ema.safetensors")
    assert all(tensor.dtype == torch.float16 for tensor in averages.values())


def test_plan_lists_it_and_overwrite_removes_it(
    small_model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = f"{EMA} --max_train_steps 2 --save_every_n_steps 1 --save_state"
    arguments = words(small_model, photos, tmp_path, more)
    assert sd_train(["plan", "train_network", "--json", *arguments]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert sd_train(["plan", "train_network", *arguments]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"lora-step00000001.safetensors after .* state, and lora-step00000001-ema.safetensors\n", shown)
    train(small_model, photos, tmp_path, more)
    written = {str(path) for path in tmp_path.glob("*.safetensors")}
    listed = {save[key] for save in planned["checkpoints"] for key in ("path", "average")}
    assert written == listed
    used = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert planned["disk_bytes"] == pytest.approx(used, rel=0.35)
    train(small_model, photos, tmp_path, "--max_train_steps 1 --overwrite")
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["lora.safetensors"]


def test_later_averages_are_recognised() -> None:
    assert step_of(Path("lora-step00000003-ema.safetensors")) == step_of(Path("lora-step00000003-ema")) == 3
    assert step_of(Path("lora-ema.safetensors")) == 0


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("--ema_decay 0.99", "--ema_decay has no effect: use_ema is not given"),
        ("--ema_device cpu", "--ema_device has no effect: use_ema is not given"),
        ("--sample_ema", "--sample_ema has no effect: use_ema is not given"),
        ("--use_ema --ema_decay 0", "--use_ema has no effect: with ema_decay 0 the average is the weights themselves"),
    ],
)
def test_options_without_effect_are_told_of(
    small_model: Path, photos: Path, tmp_path: Path, more: str, told: str
) -> None:
    loaded = load_run_config("train_network", words(small_model, photos, tmp_path, more), {})
    assert told in loaded.warnings


def test_previews_that_are_never_made_are_told_of(
    small_model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sd_train(["plan", "train_network", *words(small_model, photos, tmp_path, f"{EMA} --sample_ema")]) == 0
    assert "--sample_ema has no effect: no sample pictures are made" in capsys.readouterr().err


RUNS = {
    "train_network": "--network_dim 4 --network_alpha 4",
    "lycoris": "--network_module lycoris.kohya --network_args algo=loha --network_dim 4 --network_alpha 4",
    "fine_tune": "--train_text_encoder",
    "train_db": "",
    "train_textual_inversion": "--token_string cup-thing --use_object_template",
}


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs of which a part is transparent, with their captions in a metadata file."""
    folder = tmp_path_factory.mktemp("masked")
    for path in PHOTOS.glob("*.jpg"):
        picture = Image.open(path).convert("RGBA").resize((96, 96))
        picture.putalpha(Image.linear_gradient("L").resize(picture.size))
        picture.save(folder / f"{path.stem}.png")
        (folder / f"{path.stem}.txt").write_text("a cup")
    captions = {path.stem: {"caption": "a cup"} for path in folder.glob("*.png")}
    (folder / "captions.json").write_text(json.dumps(captions))
    return folder


def first_loss(run: str, model: Path, photos: Path, folder: Path, mask: str = "alpha_mask = true") -> float:
    """The loss before anything is learned, of a run of two updates that leaves its files in `folder`."""
    command = run if run != "lycoris" else "train_network"
    captions = f"metadata_file = {str(photos / 'captions.json')!r}" if command == "fine_tune" else ""
    dataset = write_dataset(folder / "d.toml", subset=f"{mask}\n{captions}")
    dataset.write_text(dataset.read_text().replace(str(PHOTOS), str(photos)))
    words = f"--pretrained_model_name_or_path {model} --dataset_config {dataset} --output_dir {folder} --seed 3"
    words += f" --output_name mine --learning_rate 1e-3 --max_train_steps 2 --logging_dir {folder / 'logs'}"
    words += " --save_every_n_steps 1 --use_ema --max_data_loader_n_workers 0"
    assert sd_train([command, *words.split(), *RUNS[run].split(), *(["--masked_loss"] if mask else [])]) == 0
    return scalars(folder / "logs")["loss/current"][0][1]


@pytest.fixture(scope="module")
def unmasked(small_model: Path, masked: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    """The first loss without masks."""
    return first_loss("train_network", small_model, masked, tmp_path_factory.mktemp("unmasked"), "")


@pytest.fixture(scope="module")
def losses() -> list[float]:
    """The first losses with masks, of all commands so far."""
    return []


@pytest.mark.parametrize("run", RUNS)
def test_every_command_saves_an_average_and_takes_masks(
    small_model: Path, masked: Path, unmasked: float, losses: list[float], tmp_path: Path, run: str
) -> None:
    loss = first_loss(run, small_model, masked, tmp_path)
    assert abs(loss - unmasked) > 1e-3
    # Nothing has changed the model before the first update, whatever will; only a new word reads otherwise.
    if run != "train_textual_inversion":
        losses.append(loss)
        assert losses == [pytest.approx(losses[0], rel=1e-4)] * len(losses)
    first, second, average = (
        load_file(tmp_path / f"mine{name}.safetensors") for name in ("-step00000001", "-step00000002", "-ema")
    )
    assert average.keys() == second.keys()
    learned = [name for name in second if not torch.equal(first[name], second[name])]
    assert learned
    for name, tensor in average.items():
        if name in learned:
            expected = 2 / 11 * first[name].double() + 9 / 11 * second[name].double()
            assert torch.allclose(tensor.double(), expected, rtol=1e-3 if tensor.dtype == torch.float16 else 1e-6), name
        else:
            assert identical(tensor, second[name]), name
