"""Two processes under `accelerate launch` train what one process trains with the doubled batch, whatever learns.

They are launched once: they train one case after the other, and end with one that one of the two cannot begin.
"""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from sd_train.fine_tune import main as fine_tune
from sd_train.state import read_manifest
from sd_train.train_db import main as train_db
from sd_train.train_network import main as train_network
from sd_train.train_textual_inversion import main as train_textual_inversion
from tests.runs import PHOTOS, command, run_process, train, words, write_dataset
from tests.test_run_repeats import read_all, updates_of

MAINS = {
    "fine_tune": fine_tune,
    "train_db": train_db,
    "train_network": train_network,
    "train_textual_inversion": train_textual_inversion,
}
WORD = "train_textual_inversion --learning_rate 1e5 --token_string sks-1 --init_word cat --use_object_template"
RUNS = {
    "full": "train_db --use_ema --ema_decay 0.5 --save_model_as safetensors",
    "lora": "train_network --network_dim 2 --network_alpha 2 --use_ema --ema_decay 0.5 "
    "--save_state --async_save always",
    "embedding": f"{WORD} --num_vectors_per_token 2 --use_ema",
    "xti": f"{WORD} --xti",
    "objective": "train_network --network_dim 2 --network_alpha 2 --network_train_unet_only --save_state_on_train_end "
    "--noise_offset 0.1 --noise_offset_random_strength --multires_noise_iterations 4 --ip_noise_gamma 0.1 "
    "--timestep_sampling importance --min_snr_gamma 5 --dream_training",
    "dropout": "train_network --network_dim 2 --network_dropout 0.1 --network_args rank_dropout=0.2 module_dropout=0.4",
    "lycoris": "train_network --network_dim 2 --network_module lycoris.kohya --network_args algo=dylora block_size=1 "
    "module_dropout=0.4 preset=attn-mlp",
}
SEED, UPDATES = 2, 2
BROKEN = sorted(PHOTOS.glob("*.jpg"))[-1]
"""The photograph that cannot be read in the last run."""
SCRIPT = """
import importlib, json, os, sys
from torch import distributed
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
for number, (name, words) in enumerate(json.loads(open(sys.argv[1]).read()), start=1):
    with open(os.path.dirname(sys.argv[1]) + f"/begun-{rank}", "w") as file:
        file.write(str(number))
    # A group of its own for each run: one that has been left cannot be joined again through the launcher's store.
    place = f"{sys.argv[1]}-{number}"
    distributed.init_process_group("gloo", init_method="file://" + place, rank=rank, world_size=world)
    code = importlib.import_module("sd_train." + name).main(words)
    if code:
        sys.exit(code)
"""


def arguments(name: str, model: Path, dataset: Path, output: Path, batch: int) -> tuple[str, list[str]]:
    which, *more = RUNS[name].split()
    given = f"--output_name {name} --seed {SEED} --max_train_steps {UPDATES} --save_every_n_steps 1 --max_grad_norm 0.1"
    # So that an update is proportional to the gradient: with AdamW's own eps a gradient that is nothing but rounding
    # moves a weight as far as any other.
    given += " --learning_rate 1e3 --optimizer_args eps=1e3 weight_decay=0 --max_data_loader_n_workers 0"
    paths = ("--pretrained_model_name_or_path", model, "--dataset_config", dataset, "--output_dir", output)
    if "dropout" in RUNS[name] and batch == 4:
        # Masks belong to a batch of two, so that here one process takes these one after the other.
        batch, given = 2, f"{given} --gradient_accumulation_steps 2"
    return which, [*map(str, paths), *given.split(), "--train_batch_size", str(batch), *more]


def four_photos(folder: Path) -> Path:
    """A dataset whose epochs are one update of four samples."""
    photos = folder / "photos"
    photos.mkdir()
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        for ending in (".jpg", ".txt"):
            shutil.copy(PHOTOS / f"{name}{ending}", photos)
    dataset = write_dataset(folder / "d.toml", subset="flip_aug = true")
    text = dataset.read_text().replace(str(PHOTOS), str(photos))
    dataset.write_text(text.replace("enable_bucket = true", "enable_bucket = false"))
    return dataset


def test_the_seed_lets_batches_of_two_come_in_the_order_of_batches_of_four(tmp_path: Path) -> None:
    """Batches are cut first and put into another order then, so that this needs a fitting seed."""
    dataset = four_photos(tmp_path)
    orders = [
        [[key for batch in batches for key in batch.keys] for _, batches in read_all(updates, UPDATES)]
        for updates in (
            updates_of(dataset, batch_size=4, seed=SEED), updates_of(dataset, batch_size=2, accumulation=2, seed=SEED)
        )
    ]  # fmt: skip
    assert orders[0] == orders[1]
    assert [len(keys) for keys in orders[0]] == [4] * UPDATES


def all_photos(folder: Path) -> Path:
    """A dataset of all photographs, the last of which is cut off."""
    photos = folder / "all"
    shutil.copytree(PHOTOS, photos)
    (photos / BROKEN.name).write_bytes(BROKEN.read_bytes()[:3000])
    dataset = write_dataset(folder / "all.toml", size=96)
    dataset.write_text(dataset.read_text().replace(str(PHOTOS), str(photos)))
    return dataset


def caching(folder: Path) -> str:
    """The options of the run that a part of the pictures is cached by."""
    return f"--max_train_steps 1 --cache_latents_to_disk --cache_dir {folder / 'cache'}"


@pytest.fixture(scope="module")
def launched(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which two processes have trained everything, and what they said of problems."""
    folder = tmp_path_factory.mktemp("processes")
    dataset = four_photos(folder)
    plan = [arguments(name, small_model, dataset, folder / "two", 2) for name in RUNS]
    # The last one is ended by a picture that one of the processes cannot read.
    plan.append(("train_network", words(small_model, all_photos(folder), folder / "broken", caching(folder))))
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "script.py").write_text(SCRIPT)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    # Not --cpu: with it accelerate starts a single process, whatever --num_processes says.
    launch = f"accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port {port}"
    launch += " --mixed_precision no --dynamo_backend no"
    done = run_process(command(*launch.split(), str(folder / "script.py"), str(folder / "plan.json")))
    # Nothing but the last one has failed, in neither process.
    assert (folder / "begun-0").read_text() == (folder / "begun-1").read_text() == str(len(plan)), done.stderr[-3000:]
    assert done.returncode != 0
    # Two processes for one update of two batches, of which only the first one speaks.
    assert done.stdout.count(f"seed: {SEED}\n") == len(RUNS)
    assert done.stdout.count("an epoch: 4 samples in 2 batches, 1 updates (accumulation 1)") == len(RUNS)
    return folder, done.stderr


@pytest.fixture(scope="module")
def both(launched: tuple[Path, str], small_model: Path) -> tuple[Path, Path]:
    """The folders of all runs: with two processes, and with one."""
    folder = launched[0]
    for name in RUNS:
        which, given = arguments(name, small_model, folder / "d.toml", folder / "one", 4)
        assert MAINS[which](given) == 0
    return folder / "two", folder / "one"


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one_with_the_doubled_batch(both: tuple[Path, Path], name: str) -> None:
    endings = ("", "-ema") if "--use_ema" in RUNS[name] else ("",)
    for ending in endings:
        two, one = (load_file(folder / f"{name}{ending}.safetensors") for folder in both)
        before = load_file(both[1] / f"{name}-step00000001{ending}.safetensors")
        assert two.keys() == one.keys()
        apart, moved = distance(two, one), distance(one, before)
        print(name, ending, apart, moved)
        assert apart < 1e-3 * moved


def test_saves_beside_the_training_are_of_their_update_with_two_processes(both: tuple[Path, Path]) -> None:
    names = [sorted(path.name for path in folder.glob("lora*")) for folder in both]
    assert names[0] == names[1]
    for ending, step in (("-step00000001", 1), ("", UPDATES)):
        assert read_manifest(both[0] / f"lora{ending}-state")["step"] == step
    for ending in ("", "-ema"):
        two, one = (load_file(folder / f"lora-step00000001{ending}.safetensors") for folder in both)
        after = load_file(both[1] / f"lora{ending}.safetensors")
        assert distance(two, one) < 1e-3 * distance(after, one)


def test_losses_of_all_processes_make_the_statistics_of_importance(both: tuple[Path, Path]) -> None:
    two, one = (
        json.loads((folder / "objective-state" / "progress.json").read_text())["extras"]["importance"]["moments"]
        for folder in both
    )
    assert two == pytest.approx(one, rel=1e-3)
    assert sum(moment > 0 for moment in one) > 4


def test_where_one_of_two_processes_fails_to_fill_its_share_both_say_so(
    launched: tuple[Path, str], small_model: Path, counted: dict[str, int]
) -> None:
    folder, said = launched
    # Both end in a message, none in a lost connection.
    assert f"error: {folder / 'all' / BROKEN.name}: the image cannot be read" in said
    assert "error: another process could not fill its share" in said
    assert "[rank" not in said
    # The other process has its share done by then, which is kept.
    shutil.copy(BROKEN, folder / "all")
    train(small_model, folder / "all.toml", folder / "whole", caching(folder))
    assert 0 < counted["images"] <= len(list(PHOTOS.glob("*.jpg"))) // 2


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """The Euclidean one over all tensors."""
    return sum(float((one[name].double() - other[name].double()).square().sum()) for name in one) ** 0.5
