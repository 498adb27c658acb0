"""The same command gives the same LoRA: with any number of workers, batch splits and processes, and without network."""

from __future__ import annotations

import os
import socket
import tomllib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from sd_train.data.batches import BatchSettings, Updates
from sd_train.device import Device
from sd_train.diffusion.draws import Draws, DrawSettings, draw
from sd_train.objectives.denoise import Denoise
from sd_train.train_network import main
from sd_train.trainables.lora import Lora, LoraSettings
from sd_train.types import Batch, Progress, Update
from tests.models import load
from tests.runs import (
    PHOTOS,
    command,
    differences,
    largest_difference,
    metadata,
    read_index,
    run_process,
    scalars,
    train,
    tree,
    words,
    write_dataset,
)

RANDOM = """num_repeats = 3
flip_aug = true
shuffle_caption = true
keep_tokens = 1
caption_dropout_rate = 0.1
caption_tag_dropout_rate = 0.2
"""


def updates_of(dataset: Path, batch_size: int = 1, **settings: int) -> Updates:
    """The updates of a dataset file, without any model."""

    def drawn(step: int, places: Sequence[int], width: int, height: int) -> Draws:
        return draw(DrawSettings(chosen.seed), step, places, (4, height // 8, width // 8))

    chosen = BatchSettings(**{"seed": 5, "accumulation": 1, "workers": 0, **settings})
    return Updates([read_index(dataset, batch_size)], chosen, drawn)


def read_all(updates: Updates, end: int) -> list[tuple[Update, list[Batch]]]:
    """The updates from the first to `end`, with their batches."""
    start = Progress(seed=5, session_id=0, started_at=0.0)
    return [(update, list(update.batches)) for update in updates.starting_at(start, end)]


def test_the_number_of_workers_does_not_matter(small_model: Path, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d.toml", subset=RANDOM + "random_crop = true", size=96)
    more = "--max_train_steps 4 --train_batch_size 2 --max_data_loader_n_workers"
    counts = (0, 1, 4)
    first, *others = [train(small_model, dataset, tmp_path / str(count), f"{more} {count}") for count in counts]
    for other in others:
        assert differences(first, other) == []
        assert metadata(first) == metadata(other)
        assert set(tree(first.parent)) == set(tree(other.parent))


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_prepare_the_very_same_batches(tmp_path: Path, workers: int) -> None:
    dataset = write_dataset(tmp_path / "d.toml", subset=RANDOM + "random_crop = true", size=96)
    alone = read_all(updates_of(dataset, accumulation=2), 10)
    helped = read_all(updates_of(dataset, accumulation=2, workers=workers), 10)
    for (update, batches), (other_update, other_batches) in zip(alone, helped, strict=True):
        assert update.samples == other_update.samples == 2
        for batch, other in zip(batches, other_batches, strict=True):
            assert (batch.keys, batch.captions, batch.geometry) == (other.keys, other.captions, other.geometry)
            assert batch.pixels is not None
            assert other.pixels is not None
            assert torch.equal(batch.pixels, other.pixels)
            assert torch.equal(batch.noise, other.noise)
            assert torch.equal(batch.timesteps, other.timesteps)


def test_repeats_of_an_image_differ_within_an_epoch(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d.toml", subset=RANDOM.replace("= 3", "= 12") + "random_crop = true", size=96)
    updates = updates_of(dataset)
    assert updates.updates_in(0) == 72
    seen: dict[str, list[Batch]] = {}
    for update, batches in read_all(updates, 72):
        assert update.epoch == 0
        for batch in batches:
            seen.setdefault(batch.keys[0], []).append(batch)
    assert {path.name for path in PHOTOS.glob("*.jpg")} == set(seen)
    for batches in seen.values():
        assert len(batches) == 12
        assert {batch.geometry[0].flipped for batch in batches} == {True, False}
        assert len({batch.captions[0] for batch in batches}) > 3
        assert len({batch.noise.numpy().tobytes() for batch in batches}) == 12
        first = {batch.captions[0].split(",")[0] for batch in batches} - {""}
        assert len(first) == 1  # keep_tokens
    # Where an image has the aspect ratio of its bucket there is nothing to crop.
    assert max(len({batch.geometry[0].crop for batch in batches}) for batches in seen.values()) > 3


def test_epochs_have_every_sample_once_in_an_order_of_their_own(tmp_path: Path) -> None:
    updates = updates_of(write_dataset(tmp_path / "d.toml", subset="num_repeats = 2", size=96), batch_size=3)
    orders = []
    for epoch in range(3):
        slots = updates.slots(epoch)
        pairs = [pair for slot in slots for pair in zip(slot.records.tolist(), slot.repeats.tolist(), strict=True)]
        assert sorted(pairs) == [(record, repeat) for record in range(6) for repeat in range(2)]
        orders.append(pairs)
    assert len({tuple(order) for order in orders}) == 3


def test_the_last_update_of_an_epoch_is_the_mean_over_its_own_samples(small_model: Path, tmp_path: Path) -> None:
    """Six batches in updates of four: the second update has two, and counts each of them half."""
    dataset = write_dataset(tmp_path / "d.toml")
    updates = updates_of(dataset, accumulation=4)
    found = read_all(updates, 4)
    assert [(update.samples, len(batches)) for update, batches in found] == [(4, 4), (2, 2), (4, 4), (2, 2)]
    assert [(update.epoch, update.index, update.last_in_epoch) for update, _ in found] == [
        (0, 0, False), (0, 1, True), (1, 0, False), (1, 1, True)
    ]  # fmt: skip
    still = "--learning_rate 1e-12 --optimizer_args weight_decay=0 --gradient_accumulation_steps 4 --max_train_steps 2"
    train(small_model, dataset, tmp_path / "out", f"{still} --logging_dir {tmp_path / 'logs'}")
    curves = scalars(tmp_path / "logs")

    family = load(small_model)
    rates = {"unet": 1.0, "text_encoder": 1.0}
    lora = Lora(LoraSettings(rank=4, alpha=4.0, dropout=0.0, rates=rates, seed=3))
    lora.install(family)
    objective = Denoise(family, lora, Device(torch.device("cpu"), "no"))
    params = [parameter for group in lora.groups() for parameter in group.params.values()]
    for number, (_, batches) in enumerate(read_all(updates_of(dataset, accumulation=4, seed=3), 2)):
        mean = torch.cat([objective.loss(batch) for batch in batches]).mean()
        norm = torch.stack([gradient.norm() for gradient in torch.autograd.grad(mean, params)]).norm()
        assert curves["loss/current"][number][1] == pytest.approx(float(mean.detach()), rel=1e-5)
        assert curves["grad_norm"][number][1] == pytest.approx(float(norm), rel=1e-4)


def test_two_ranks_see_what_one_sees(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d.toml", subset="num_repeats = 3\nflip_aug = true", size=96)
    # 18 samples: 3 batches of 2 in each bucket; updates of 4 batches leave one for the last.
    alone = read_all(updates_of(dataset, batch_size=2, accumulation=4), 6)
    ranks = [read_all(updates_of(dataset, batch_size=2, accumulation=2, world=2, rank=rank), 6) for rank in (0, 1)]
    assert [update.samples for update, _ in alone] == [8, 8, 2, 8, 8, 2]
    for number, (update, whole) in enumerate(alone):
        parts = [ranks[rank][number] for rank in (0, 1)]
        assert len({len(batches) for _, batches in parts}) == 1
        assert [other.samples for other, _ in parts] == [update.samples] * 2
        together = sorted((batch for _, batches in parts for batch in batches), key=lambda batch: batch.micro)
        for batch, expected in zip(together, whole, strict=False):
            assert (batch.micro, batch.keys, batch.captions) == (expected.micro, expected.keys, expected.captions)
            assert torch.equal(batch.noise, expected.noise)
            assert torch.equal(batch.timesteps, expected.timesteps)
            assert torch.equal(batch.weight, expected.weight)
        padding = together[len(whole) :]
        assert len(padding) == (1 if update.last_in_epoch else 0)
        for batch in padding:
            assert float(batch.weight.abs().sum()) == 0.0


def test_two_processes_train_what_one_accumulates(small_model: Path, tmp_path: Path) -> None:
    subset = "flip_aug = true\nshuffle_caption = true"
    dataset = write_dataset(tmp_path / "d.toml", subset=subset)
    # Three batches in updates of two: one rank pads every second one.
    more = "--max_train_steps 4 --train_batch_size 2 --network_dropout 0.1 --save_every_n_epochs 1 --save_state"
    more += " --use_ema --prior_preservation frozen --class_prompt cup"
    arguments = words(small_model, dataset, tmp_path / "two", more)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    launch = f"torch.distributed.run --nproc_per_node 2 --master_addr 127.0.0.1 --master_port {port} -m".split()
    arguments += ["--log_prefix", "none"]
    done = run_process(command(*launch, "sd_train.train_network", *arguments))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("seed: 3\n") == 1
    assert done.stderr.count("saved ") == 2
    assert done.stderr.count("--log_prefix has no effect") == 1
    one = train(small_model, dataset, tmp_path / "one", more + " --gradient_accumulation_steps 2")
    assert set(tree(tmp_path / "two")) == set(tree(tmp_path / "one"))
    assert largest_difference(one, tmp_path / "two" / "lora.safetensors") < 2e-6
    averages = (tmp_path / folder / "lora-ema.safetensors" for folder in ("one", "two"))
    assert largest_difference(*averages) < 2e-6


OFFLINE = """
import socket, sys
def refuse(*arguments, **named):
    raise OSError("this process has no network")
class Refused(socket.socket):
    __init__ = refuse
socket.socket = Refused
socket.create_connection = socket.getaddrinfo = socket.gethostbyname = refuse
from sd_train.train_network import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_run_needs_no_network_and_writes_only_into_its_folder(small_model: Path, tmp_path: Path) -> None:
    photos, model, output = tmp_path / "photos", tmp_path / "model.safetensors", tmp_path / "output"
    photos.mkdir()
    for file in PHOTOS.iterdir():
        (photos / file.name).write_bytes(file.read_bytes())
    model.write_bytes(small_model.read_bytes())
    dataset = write_dataset(tmp_path / "d.toml")
    dataset.write_text(dataset.read_text().replace(str(PHOTOS), str(photos)))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cup --w 64 --h 64 --s 1 --d 1\n")
    empty = {name: tmp_path / "empty" / name for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME", "TRANSFORMERS_CACHE")}
    for folder in empty.values():
        folder.mkdir(parents=True)
    before = tree(tmp_path)
    more = f"--max_train_steps 2 --sample_prompts {prompts} --sample_every_n_steps 2 --save_state --cache_latents"
    arguments = words(model, dataset, output, f"{more} --logging_dir {output / 'logs'}")
    variables = {name: str(folder) for name, folder in empty.items()}
    done = run_process([command("x")[0], "-c", OFFLINE, *arguments], HF_HUB_OFFLINE="0", **variables)
    assert done.returncode == 0, done.stderr
    after = tree(tmp_path)
    assert {name: after[name] for name in before} == before
    assert all(name.startswith("output" + os.sep) for name in after.keys() - before.keys())
    assert "output/lora.safetensors" in after
    assert [path.suffix for path in (output / "sample").iterdir()] == [".png"]


def test_the_written_configuration_repeats_the_run(small_model: Path, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d.toml")
    more = "--max_train_steps 4 --lr_scheduler cosine --lr_warmup_steps 0.5 --network_dropout 0.1"
    first = train(small_model, dataset, tmp_path / "first", f"{more} --optimizer_args betas=.8,.99 weight_decay=0.1")
    written = first.with_name("lora-config.toml")
    assert main(["--config_file", str(written), "--output_dir", str(tmp_path / "second")]) == 0
    second = tmp_path / "second" / "lora.safetensors"
    assert differences(first, second) == []
    assert metadata(first) == metadata(second)
    ours, theirs = (tomllib.loads(path.with_name("lora-config.toml").read_text()) for path in (first, second))
    assert ours | {"output_dir": ""} == theirs | {"output_dir": ""}


def test_a_drawn_seed_is_printed_and_kept(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_dataset(tmp_path / "d.toml")
    arguments = words(small_model, dataset, tmp_path / "first", "--max_train_steps 2")
    place = arguments.index("--seed")
    del arguments[place : place + 2]
    assert main(arguments) == 0
    first = tmp_path / "first" / "lora.safetensors"
    seed = int(metadata(first)["ss_seed"])
    assert f"seed: {seed} (drawn; give --seed to choose it)" in capsys.readouterr().out
    assert main([*arguments, "--output_dir", str(tmp_path / "other")]) == 0
    assert differences(first, tmp_path / "other" / "lora.safetensors") != []
    written = first.with_name("lora-config.toml")
    assert main(["--config_file", str(written), "--output_dir", str(tmp_path / "again")]) == 0
    assert differences(first, tmp_path / "again" / "lora.safetensors") == []
