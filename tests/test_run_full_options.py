"""What the options of `fine_tune`, `train_db` and `sdxl_train` do to a run."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file
from torch import Tensor

from sd_train.__main__ import main
from sd_train.entry import load_config
from sd_train.families.saving import save_model
from sd_train.plan import prepare
from sd_train.types import Batch, Progress
from tests.models import load, reference_pipeline, tiny_parts, write_file, write_folder
from tests.runs import PHOTOS, differences, metadata, scalars, write_dataset
from tests.test_run_full import parts_of, stored, train, words, write_tuning_dataset

SCALE = 0.18215


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and datasets of this file."""
    made = tmp_path_factory.mktemp("full")
    write_file(made, "sd1")
    write_folder(made, "sd1")
    write_folder(made, "sdxl")
    write_dataset(made / "db.toml", "batch_size = 2")
    write_tuning_dataset(made / "tuning.toml")
    return made


def write_regularised(path: Path) -> Path:
    """Two photographs to learn and two for regularisation, of equal names."""
    for part, number in (("learn", 0), ("reg", 2)):
        (path.parent / part).mkdir()
        for photo in sorted(PHOTOS.glob("*.jpg"))[number : number + 2]:
            shutil.copy(photo, path.parent / part)
    head = "[general]\n[[datasets]]\nresolution = 128\nbatch_size = 4\n"
    subset = "[[datasets.subsets]]\nimage_dir = {!r}\nclass_tokens = {!r}\n"
    learn = subset.format(str(path.parent / "learn"), "sks thing")
    path.write_text(f"{head}{learn}{subset.format(str(path.parent / 'reg'), 'thing')}is_reg = true\n")
    return path


def by_hand(pipeline: Any, batches: Sequence[Batch], reg_weight: float) -> list[dict[str, Tensor]]:
    """DreamBooth as it is written down: the regularisation images' mean squared error counts `reg_weight`.

    The weights before the first update and after each.
    """
    learning = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    params = [parameter.requires_grad_(True) for network in learning.values() for parameter in network.parameters()]
    optimizer = torch.optim.AdamW(params, lr=1e-3, eps=1e-4)
    noising = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")

    def weights() -> dict[str, Tensor]:
        named = {role: network.state_dict() for role, network in learning.items()}
        return {short(f"{role}.{name}"): t.clone() for role, tensors in named.items() for name, t in tensors.items()}

    found = [weights()]
    for batch in batches:
        posterior = pipeline.vae.encode(batch.pixels).latent_dist
        latents = (posterior.mean + posterior.std * batch.latent_noise) * SCALE
        noisy = noising.add_noise(latents, batch.noise, batch.timesteps)  # type: ignore[arg-type]
        tokens = pipeline.tokenizer(batch.captions, padding="max_length", max_length=77, return_tensors="pt")
        states = pipeline.text_encoder(tokens.input_ids).last_hidden_state
        errors = (pipeline.unet(noisy, batch.timesteps, states).sample - batch.noise).square().mean(dim=(1, 2, 3))
        counted = torch.tensor([reg_weight if "/reg/" in path else 1.0 for path in batch.paths])
        assert sorted(counted.tolist()) == [reg_weight] * 2 + [1.0] * 2
        (errors * counted).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(weights())
    return found


def short(name: str) -> str:
    """Without the level that transformers dropped."""
    return name.replace(".text_model.", ".")


def test_dreambooth_is_the_weighted_loss_of_a_loop_by_hand(folder: Path, tmp_path: Path) -> None:
    dataset, source = write_regularised(tmp_path / "reg.toml"), folder / "tiny_sd1_folder"
    more = "--max_train_steps 3 --prior_loss_weight 0.25 --max_grad_norm 0 --optimizer_args eps=1e-4"
    last = train("train_db", source, dataset, tmp_path / "out", f"{more} --save_every_n_steps 1")
    command, *rest = words("train_db", source, dataset, tmp_path / "again", more)
    updates = prepare(load_config(command, rest)).updates
    batches = [batch for update in updates.starting_at(Progress(3, 0, 0.0), 3) for batch in update.batches]
    before, first, _, third = by_hand(reference_pipeline("sd1"), batches, 0.25)
    # Rounding grows from update to update; another weight is a difference of 0.3 from the first one on.
    for path, theirs, least in ((last.with_name("m-step00000001"), first, 1e-5), (last, third, 1e-2)):
        ours = {short(name): tensor for name, tensor in stored(path).items() if name.startswith(("unet", "text"))}
        assert ours.keys() == theirs.keys()
        moved, apart = (
            torch.cat([(theirs[name] - other[name]).flatten() for name in ours]).norm() for other in (before, ours)
        )
        assert apart < least * moved


def test_a_part_and_the_rest_are_the_whole_across_the_text_encoders_end(
    small_model: Path, folder: Path, tmp_path: Path
) -> None:
    dataset, logs = folder / "db.toml", tmp_path / "logs"
    more = "--stop_text_encoder_training 2 --lr_scheduler cosine --use_ema --ema_decay 0.9 --max_train_steps 4"
    saves = f"--save_every_n_steps 1 --save_state --logging_dir {logs}"
    whole = train("train_db", small_model, dataset, tmp_path / "whole", f"{more} {saves}")
    # Resumed before the text encoder has ended, and where it has.
    for step in (1, 2):
        state = whole.with_name(f"m-step{step:08d}-state")
        rest = train("train_db", small_model, dataset, tmp_path / f"rest{step}", f"{more} --resume {state}")
        assert differences(whole, rest) == []
        assert metadata(whole) == metadata(rest)
        assert differences(whole.with_name("m-ema.safetensors"), rest.with_name("m-ema.safetensors")) == []
    # The second update is the text encoder's last, to the bit; the U-Net goes on.
    moved = {name.split(".")[0] for name in differences(whole.with_name("m-step00000002.safetensors"), whole)}
    assert moved == {"model"}
    averaged = {name.split(".")[0] for name in differences(whole.with_name("m-ema.safetensors"), whole)}
    assert averaged == {"model", "cond_stage_model"}
    rates = scalars(logs)
    assert [step for step, value in rates["lr/text_encoder1"] if value > 0] == [1, 2]
    assert min(value for _, value in rates["lr/unet"]) > 0


def test_blocks_learn_at_their_own_rates(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder / "tiny_sdxl_folder"
    rates = ",".join(["1e-3"] + ["0"] * 11 + ["1e-5"] * 2 + ["0"] * 9)
    more = f"--max_train_steps 2 --block_lr {rates} --logging_dir {tmp_path / 'logs'} --gradient_checkpointing"
    saved = train("sdxl_train", source, folder / "db.toml", tmp_path / "out", more)
    assert "--learning_rate has no effect: block_lr is given" in capsys.readouterr().err
    before, after = stored(source), stored(saved)
    moved = {name: float((after[name] - before[name]).abs().max()) for name in before}
    steps: dict[str, list[float]] = {}
    for name, distance in moved.items():
        if distance:
            steps.setdefault(".".join(name.split(".")[1:3]), []).append(distance)
    assert steps.keys() == {
        "time_embedding.linear_1", "time_embedding.linear_2", "add_embedding.linear_1", "add_embedding.linear_2",
        "mid_block.resnets", "up_blocks.0",
    }  # fmt: skip
    # Two updates of AdamW move a weight by at most twice the rate, but for weight decay.
    for block, distances in steps.items():
        rate = 1e-3 if "embedding" in block else 1e-5
        assert rate < max(distances) < 2.1 * rate
    logged = {tag for tag in scalars(tmp_path / "logs") if tag.startswith("lr/")}
    assert logged == {"lr/block0", "lr/block12", "lr/block13"}


@pytest.mark.parametrize("form", ["safetensors", "ckpt", "diffusers", "diffusers_safetensors"])
def test_every_form_in_the_precision_that_is_asked_for(form: str, folder: Path, tmp_path: Path) -> None:
    vae = tmp_path / "vae.safetensors"
    other = tiny_parts("sd1")
    for tensor in other.parts["vae"].tensors.tensors.values():  # type: ignore[attr-defined]
        tensor.mul_(1.25)
    save_model(vae, other, "safetensors")
    more = f"--max_train_steps 1 --save_model_as {form} --save_precision fp16 --mixed_precision fp16 --vae {vae}"
    saved = train("train_db", folder / "tiny_sd1.safetensors", folder / "db.toml", tmp_path / "out", more)
    assert saved.suffix == {"safetensors": ".safetensors", "ckpt": ".ckpt"}.get(form, "")
    assert not [path for path in saved.rglob("*") if path.suffix in (".bin", ".pt", ".ckpt")]
    found = stored(saved)
    assert all(tensor.dtype == torch.float16 and tensor.isfinite().all() for tensor in found.values())
    mine = {name: tensor for name, tensor in stored(vae).items() if name.startswith("vae.")}
    assert all(torch.equal(found[name], tensor.half()) for name, tensor in mine.items())
    assert parts_of(saved).metadata["ss_steps"] == "1"


def test_a_model_is_kept_beside_what_it_made_of_its_class(small_model: Path, folder: Path, tmp_path: Path) -> None:
    """Frozen prior preservation: the prediction for the class stays nearer to the base model's."""
    source, base = small_model, load(small_model)
    class_rows = base.encode_texts(["thing"])
    noisy = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    when = torch.tensor([100, 300, 500, 800])

    def predict(path: Path) -> Tensor:
        model = load(path)
        states = model.encode_texts(["thing"])["states"].expand(4, -1, -1)
        with torch.no_grad():
            return model.predict(noisy, when, model.condition({**class_rows, "states": states}, {}, []))

    far = []
    for weight in ("", " --prior_preservation frozen --class_prompt thing --prior_loss_weight 20"):
        out = tmp_path / f"out{len(far)}"
        saved = train("train_db", source, folder / "db.toml", out, f"--max_train_steps 4{weight}")
        far.append(float((predict(saved) - predict(source)).square().mean()))
    assert far[1] < 0.5 * far[0]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "more", "reason"),
    [
        ("train_db", "--save_model_as pt", "train_db saves whole models, which are never that"),
        ("fine_tune", "--learning_rate 0", "nothing would be trained; give a learning rate above 0"),
        ("train_db", f"--stop_text_encoder_training -1 --block_lr {','.join('0' * 23)}", "nothing would be trained"),
        ("train_db", f"--block_lr {','.join('1' * 23)}", "--block_lr: has the 23 blocks of SDXL's U-Net"),
        ("train_db", "--block_lr 1,2", "23"),
        ("train_db", "--network_dim 4", "network_dim"),
        ("train_db", "--cache_text_encoder_outputs", "give --stop_text_encoder_training -1, or remove it"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    command: str, more: str, reason: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = folder / ("tuning.toml" if command == "fine_tune" else "db.toml")
    arguments = words(command, folder / "tiny_sd1.safetensors", dataset, tmp_path, f"--max_train_steps 1 {more}")
    assert reason in refused(arguments, capsys)
    assert list(tmp_path.iterdir()) == []


def test_rates_that_nothing_has_are_told_of(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = folder / "tiny_sd1.safetensors"
    more = "--max_train_steps 2 --learning_rate_te2 1e-4 --stop_text_encoder_training 2"
    assert main(["plan", *words("train_db", model, folder / "db.toml", tmp_path, more)]) == 0
    printed = capsys.readouterr()
    assert "--learning_rate_te2 has no effect: Stable Diffusion 1.x has no second text encoder" in printed.err
    assert "--stop_text_encoder_training = 2 has no effect: the training has 2 updates" in printed.err
    # The numbers of the U-Net and the text encoder in float32, the VAE's in half precision.
    assert "m.safetensors after update 2, 28.3 MB" in printed.out
    tuning = words("fine_tune", model, folder / "tuning.toml", tmp_path, "--learning_rate_te 1")
    assert main(["plan", *tuning]) == 0
    assert "--learning_rate_te has no effect: train_text_encoder is not given" in capsys.readouterr().err
    three = "--train_text_encoder --learning_rate_te 1 --learning_rate_te1 1 --learning_rate_te2 1"
    assert main(["plan", *words("fine_tune", model, folder / "tuning.toml", tmp_path, three)]) == 0
    assert "--learning_rate_te has no effect: learning_rate_te1 and" in capsys.readouterr().err


def test_the_source_is_never_written_over(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for source, name in ((folder / "tiny_sd1.safetensors", "m.safetensors"), (folder / "tiny_sd1_folder", "m")):
        copy = shutil.copytree(source, tmp_path / name) if source.is_dir() else shutil.copy(source, tmp_path / name)
        arguments = words("train_db", tmp_path / name, folder / "db.toml", tmp_path, "--max_train_steps 1 --overwrite")
        assert "is also what this run writes; choose another --output_name" in refused(arguments, capsys)
        assert Path(copy).exists()
    # Nor is a part of it.
    inside = words("train_db", tmp_path / "m", folder / "db.toml", tmp_path / "m", "--output_name unet --overwrite")
    assert "m/unet is also what this run writes" in refused(inside, capsys)
    assert load_file(tmp_path / "m" / "unet" / "diffusion_pytorch_model.safetensors")


def test_nothing_of_others_is_replaced(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where models are folders, a name may be that of any folder."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m-000002").write_text("a file")
    (tmp_path / "m" / "photo.jpg").write_bytes(b"not ours")
    source, dataset = folder / "tiny_sd1_folder", folder / "db.toml"
    for more in ("--overwrite", "--overwrite --resume latest"):
        said = refused(words("train_db", source, dataset, tmp_path, f"--max_train_steps 1 {more}"), capsys)
        assert f"--output_dir = {tmp_path}: m is neither a saved model nor a state" in said
        assert "m-000002 is neither a saved model nor a state" in said
    assert (tmp_path / "m" / "photo.jpg").read_bytes() == b"not ours"
    # An empty one holds nothing; what is to come counts too.
    (tmp_path / "prompts.txt").write_text("a cat")
    for more, option in (
        (f"--output_name n --logging_dir {tmp_path / 'n' / 'logs'}", "--logging_dir"),
        (f"--output_name n --cache_dir {tmp_path / 'n-step00000002' / 'cache'}", "--cache_dir"),
        (f"--output_name sample --sample_prompts {tmp_path / 'prompts.txt'} --sample_at_first", "--output_name"),
    ):
        said = refused(words("train_db", source, dataset, tmp_path, f"--max_train_steps 1 {more}"), capsys)
        assert f"error: {option} = " in said
    (tmp_path / "empty" / "m").mkdir(parents=True)
    saved = train("train_db", source, dataset, tmp_path / "empty", "--max_train_steps 1 --overwrite")
    assert (saved / "model_index.json").is_file()
    # An own model and state are replaced.
    again = train("train_db", source, dataset, tmp_path / "empty", "--max_train_steps 1 --overwrite --seed 4")
    assert parts_of(again).metadata["ss_seed"] == "4"
