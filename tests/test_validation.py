"""Validation: its noise, its timesteps, its curves; it changes no training, keeps the best weights and ends in time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sd_train.__main__ import main as sd_train
from sd_train.data.batches import BatchSettings, Updates
from sd_train.data.cache import FillOptions, MemoryCache
from sd_train.data.captions import needs_variants
from sd_train.data.index import ImageIndex
from sd_train.data.slices import fixed_slice
from sd_train.device import Device
from sd_train.diffusion.draws import Draws, DrawSettings, draw
from sd_train.fine_tune import main as fine_tune
from sd_train.names import FileNames
from sd_train.objectives.denoise import Denoise
from sd_train.train_db import main as train_db
from sd_train.train_network import main
from sd_train.train_textual_inversion import main as train_textual_inversion
from sd_train.trainables.lora import Lora, LoraSettings
from sd_train.types import Progress
from sd_train.validate import ScoredSet, ScoreSettings, mean
from tests.indexes import make_index
from tests.models import fresh_tiny
from tests.runs import PHOTOS, differences, read_index, scalars, train, words, write_dataset

CPU = Device(torch.device("cpu"), "no")
SPLIT = "validation_split = 0.4"


def latent_shape(width: int, height: int) -> tuple[int, int, int]:
    return 4, height // 8, width // 8


# The estimate


@pytest.mark.parametrize(("low", "high"), [(0, 1000), (200, 500)])
def test_every_sample_has_a_part_of_the_timesteps_for_itself(low: int, high: int) -> None:
    index = make_index([0] * 7 + [1] * 3, batch_size=4)
    scored = ScoredSet([index], ScoreSettings(3, 4, low, high), latent_shape)
    assert scored.samples == len(scored.timesteps) == 40
    part = (high - low) / 40
    assert sorted(scored.timesteps) == [int(low + (place + 0.5) * part) for place in range(40)]
    # Those of one image lie in different quarters, and which of a quarter's goes with which image is drawn.
    rows = np.concatenate([slot.records for slot in scored.updates.slots(0)])
    by_image = np.array([np.sort(scored.timesteps[rows == row]) for row in range(10)])
    assert ((by_image - low) * 4 // (high - low)).tolist() == [[0, 1, 2, 3]] * 10
    order = by_image.argsort(axis=0)
    assert not any(np.array_equal(order[:, 0], order[:, place]) for place in (1, 2, 3))
    other = ScoredSet([index], ScoreSettings(4, 4, low, high), latent_shape)
    assert other.timesteps.tolist() != scored.timesteps.tolist()
    assert other.digest != scored.digest == ScoredSet([index], scored.settings, latent_shape).digest


def seen(index: ImageIndex, **settings: int) -> dict[tuple[str, int], tuple[bytes, bytes, str]]:
    """What one rank scores: by image and timestep its noises and its caption."""
    chosen = replace(ScoreSettings(3, 2, 0, 1000), **settings)
    found = {}
    for batch in ScoredSet([index], chosen, latent_shape).batches():
        for row, (key, timestep) in enumerate(zip(batch.keys, batch.timesteps.tolist(), strict=True)):
            noises = batch.noise[row].numpy().tobytes(), batch.latent_noise[row].numpy().tobytes()
            assert (key, timestep) not in found
            found[key, timestep] = (*noises, batch.captions[row])
    return found


def test_noise_and_timesteps_do_not_depend_on_batches_and_ranks(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d.toml", size=96)
    alone = seen(read_index(dataset, 1))
    assert len(alone) == len({noise for noise, _, _ in alone.values()}) == 12
    # An image keeps its point in the autoencoder's posterior.
    assert len({latent for _, latent, _ in alone.values()}) == 6
    index = read_index(dataset, 4)
    assert seen(index) == alone
    ranks = [seen(index, rank=rank, world=2) for rank in range(2)]
    assert all(ranks)
    assert not ranks[0].keys() & ranks[1].keys()
    assert ranks[0] | ranks[1] == alone
    # Three batches of one, whoever scores them; their timesteps are as evenly spread.
    few = seen(read_index(dataset, 1), most_batches=3)
    assert sorted(timestep for _, timestep in few) == [166, 500, 833]
    parts = [seen(read_index(dataset, 1), most_batches=3, rank=rank, world=2) for rank in range(2)]
    assert [len(part) for part in parts] == [2, 1]
    assert parts[0] | parts[1] == few


def test_its_variance_is_far_below_that_of_drawn_timesteps(tmp_path: Path) -> None:
    family = fresh_tiny("sd2-v")
    lora = Lora(LoraSettings(rank=1, alpha=1.0, dropout=0.0, rates={"unet": 1.0}, seed=0))
    lora.install(family)
    objective = Denoise(family, lora, CPU)
    index = read_index(write_dataset(tmp_path / "d.toml"), 12)
    cache = MemoryCache()
    cache.fill([index], family.encode_images, FillOptions(6, 0, lambda count: None))

    def naive(scored: ScoredSet, seed: int) -> float:
        """The same samples with timesteps and noise as a training draws them."""

        def drawn(step: int, places: Sequence[int], width: int, height: int) -> Draws:
            return draw(DrawSettings(seed), step, places, latent_shape(width, height))

        updates = Updates(scored.updates.indexes, BatchSettings(seed, accumulation=1, workers=0), drawn)
        updates.cache = cache
        (update,) = updates.starting_at(Progress(seed, 0, 0.0), 1)
        return float(torch.cat([objective.score(batch) for batch in update.batches]).mean())

    stratified, random = [], []
    for seed in range(8):
        scored = ScoredSet([index], ScoreSettings(seed, 2, 0, 1000), latent_shape)
        scored.updates.cache = cache
        sums = scored.score(objective, CPU)
        stratified.append(mean(sums))
        random.append(naive(scored, seed))
    assert sums[1].sum() == 12
    # The same weights give the same number, which with drawn noise they do not.
    assert torch.equal(scored.score(objective, CPU), sums)
    assert np.mean(stratified) == pytest.approx(np.mean(random), rel=0.2)
    assert np.var(random) > 4 * np.var(stratified)


def test_the_slice_of_the_training_is_unchanged_and_fixed() -> None:
    subset = {"flip_aug": True, "shuffle_caption": True, "enable_wildcard": True, "caption_dropout_rate": 0.5}
    captions = [f"{{a|b}}, {number}\nother" for number in range(20)]
    index = make_index([0, 1] * 10, 3, captions=captions, subset=subset, bucket_policy="carry", batch_size=3)
    regularising = make_index([0] * 5, subset={"is_reg": True})
    (found,) = fixed_slice([index, regularising], 8, seed=1)
    assert len(found) == 8
    assert found.repeats.tolist() == [1.0] * 8
    numbers = [int(key.removesuffix(".png")) for key in found.keys]
    assert numbers == sorted(numbers)
    assert list(found.captions) == [f"a, {number}" for number in numbers]
    assert [found.record(row).bucket for row in range(8)] == [index.record(row).bucket for row in numbers]
    kept = found.record(0).subset
    assert needs_variants(kept) is None
    assert not kept.flip_aug
    assert kept.caption_dropout_rate == 0
    assert fixed_slice([index], 8, seed=1)[0].keys == found.keys
    assert fixed_slice([index], 8, seed=2)[0].keys != found.keys
    assert sum(map(len, fixed_slice([index, regularising, index], 100, seed=1))) == 40


# Runs


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset file of which two of the six images are kept for validation."""
    return write_dataset(tmp_path_factory.mktemp("dataset") / "photos.toml", dataset=SPLIT)


def planned(capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> dict[str, object]:
    capsys.readouterr()
    assert sd_train(["plan", "train_network", "--json", *arguments]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize(
    "more", ["--network_dropout 0.2 --use_ema --cache_latents", "--optimizer_type AdamWScheduleFree"]
)
def test_it_changes_no_training(
    small_model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str
) -> None:
    options = f"--max_train_steps 5 --learning_rate 1e-2 {more}"
    validated = train(small_model, photos, tmp_path / "with", f"{options} --logging_dir {tmp_path / 'logs'}")
    plan = planned(capsys, words(small_model, photos, tmp_path / "other", options))
    (kept,) = plan["validation"]  # type: ignore[misc]
    # The others alone, without validation.
    shutil.copytree(PHOTOS, tmp_path / "photos")
    for image in kept["images"]:
        for file in (tmp_path / "photos").glob(f"{Path(image).stem}.*"):
            file.unlink()
    rest = tmp_path / "rest.toml"
    rest.write_text(photos.read_text().replace(str(PHOTOS), str(tmp_path / "photos")).replace(SPLIT, ""))
    plain = train(small_model, rest, tmp_path / "without", options)
    assert differences(validated, plain) == []

    curves = scalars(tmp_path / "logs")
    # Four images are trained: an epoch ends after update 4, the training after 5.
    assert [step for step, _ in curves["loss/validation"]] == [0, 4, 5] == plan["validations"]["after_updates"]  # type: ignore[index]
    bins = {tag: points for tag, points in curves.items() if tag.startswith("loss/validation/")}
    # Eight samples lie in eight equal parts of the timesteps.
    assert {"loss/validation/t000-099", "loss/validation/t900-999"} < bins.keys()
    assert len(bins) == 8
    for place, (_, value) in enumerate(curves["loss/validation"]):
        assert value == pytest.approx(np.mean([points[place][1] for points in bins.values()]), rel=1e-5)
    trained = [value for _, value in curves["loss/validation_train"]]
    assert len(set(trained)) == 3
    assert ("loss/validation_ema" in curves) == ("--use_ema" in more)
    if "--use_ema" in more:
        # The average begins as the weights, and is not them any more.
        average, live = ([value for _, value in curves[f"loss/validation{tag}"]] for tag in ("_ema", ""))
        assert average[0] == live[0]
        assert average[-1] != live[-1]


def lowest(curve: Sequence[tuple[int, float]]) -> int:
    """The update after which the loss was the lowest; it counts from the first update on."""
    return min((point for point in curve if point[0]), key=lambda point: (point[1], point[0]))[0]


def test_the_best_is_kept_and_resumed(
    small_model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # So high a rate that the loss soon rises again.
    more = "--max_train_steps 4 --learning_rate 0.05 --save_every_n_steps 1 --save_state --use_ema --save_best"
    more += " --validate_every_n_steps 1 --validation_timesteps 2 --min_timestep 300 --network_train_unet_only"
    plan = planned(capsys, words(small_model, photos, tmp_path / "run", more))
    assert sd_train(["plan", "train_network", *words(small_model, photos, tmp_path / "run", more)]) == 0
    shown = capsys.readouterr().out
    assert "validations: 5, each image at 2 timesteps" in shown
    assert "lora-best.safetensors and lora-best-ema.safetensors whenever the validation loss" in shown
    run = train(small_model, photos, tmp_path / "run", f"{more} --logging_dir {tmp_path / 'logs'}").parent
    said = capsys.readouterr()
    curve = scalars(tmp_path / "logs")["loss/validation"]
    assert not {"loss/validation/t000-099", "loss/validation/t200-299"} & scalars(tmp_path / "logs").keys()
    best = lowest(curve)
    assert f"validation after update {best}: loss {dict(curve)[best]:.5f}, on training images" in said.err
    for end in ("", "-ema"):
        assert differences(run / f"lora-best{end}.safetensors", run / f"lora-step0000000{best}{end}.safetensors") == []
    assert plan["validations"] == {
        "after_updates": [0, 1, 2, 3, 4],
        "best": str(tmp_path / "run" / "lora-best.safetensors"),
        "best_average": str(tmp_path / "run" / "lora-best-ema.safetensors"),
    }
    names = FileNames(run, "lora")
    assert {run / "lora-best.safetensors", run / "lora-best-ema.safetensors"} < set(names.existing())

    noted = [
        json.loads((run / name / "progress.json").read_text())["progress"]["extra"]["validation"]
        for name in ("lora-step00000002-state", "lora-state")
    ]
    assert noted[1]["best_step"] == best
    assert noted[1]["best"] == pytest.approx(dict(curve)[best], rel=1e-6)
    rest = train(small_model, photos, tmp_path / "rest", f"{more} --resume {run / 'lora-step00000002-state'} "
                 f"--logging_dir {tmp_path / 'logs2'}").parent  # fmt: skip
    # It goes on where it stood: nothing is validated twice, and only what is lower than before is kept.
    assert scalars(tmp_path / "logs2")["loss/validation"] == curve[3:]
    assert (rest / "lora-best.safetensors").exists() == (best > 2)
    again = json.loads((rest / "lora-state" / "progress.json").read_text())["progress"]["extra"]["validation"]
    assert again == noted[1]
    assert noted[0]["at"] == 2


def test_patience_ends_the_training(
    small_model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # With rate 0 no loss is a new lowest after the first.
    more = "--max_train_steps 9 --learning_rate 0 --validate_every_n_steps 1 --max_validation_steps 1 --save_state"
    run = train(small_model, photos, tmp_path / "run", f"{more} --validation_patience 2 --save_every_n_steps 2").parent
    said = capsys.readouterr().err
    assert "the training ends after update 3 of 9: 2 validations in a row were no new lowest" in said
    assert json.loads((run / "lora-state" / "progress.json").read_text())["progress"]["step"] == 3
    # A state remembers what it has waited for.
    state = run / "lora-step00000002-state"
    assert json.loads((state / "progress.json").read_text())["progress"]["extra"]["validation"]["misses"] == 1
    train(small_model, photos, tmp_path / "rest", f"{more} --validation_patience 3 --resume {state}")
    said = capsys.readouterr().err
    assert "the training ends after update 4 of 9: 3 validations" in said
    assert "looked for anew" not in said
    # Losses of another set do not compare.
    train(small_model, photos, tmp_path / "other", f"{more.replace('steps 9', 'steps 4')} --validation_patience 2 "
          f"--min_timestep 400 --resume {state}")  # fmt: skip
    said = capsys.readouterr().err
    assert "the lowest loss is looked for anew" in said
    assert "ends after update" not in said


def test_a_loss_that_is_not_finite_is_no_lowest(
    small_model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Finite weights, of which two are too large to be multiplied.
    more = "--max_train_steps 4 --learning_rate 1e6 --network_alpha 1e6 --validate_every_n_steps 1 --save_best "
    more += "--validation_patience 1"
    output = tmp_path / "out"
    assert main(words(small_model, photos, output, f"{more} --network_train_unet_only --max_validation_steps 1")) == 0
    said = capsys.readouterr().err
    assert "validation after update 1: loss nan, on training images nan\n" in said
    assert "the training ends after update 1 of 4: 1 validations in a row were no new lowest" in said
    assert not list(output.glob("*-best*"))


RUNS = {
    "fine_tune": (fine_tune, ""),
    "train_db": (train_db, ""),
    "train_textual_inversion": (train_textual_inversion, "--token_string cup-thing --use_object_template"),
    "cached": (main, "--cache_text_encoder_outputs --network_train_unet_only --validate_every_n_epochs 1"),
}


@pytest.mark.parametrize("name", RUNS)
def test_every_command_validates(
    small_model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    run, more = RUNS[name]
    if name == "fine_tune":
        captions = {path.stem: {"caption": "a cup"} for path in PHOTOS.glob("*.jpg")}
        (tmp_path / "captions.json").write_text(json.dumps(captions))
        metadata_file = f"metadata_file = {str(tmp_path / 'captions.json')!r}"
        photos = write_dataset(tmp_path / "photos.toml", dataset=SPLIT, subset=metadata_file)
    paths = ("--pretrained_model_name_or_path", small_model, "--dataset_config", photos, "--output_dir", tmp_path)
    more += " --max_train_steps 1 --seed 1 --max_data_loader_n_workers 0 --validation_timesteps 1 --learning_rate 0.01"
    assert run([*map(str, paths), *more.split()]) == 0
    said = capsys.readouterr().err
    before, after = (line for line in said.splitlines() if line.startswith("validation "))
    assert before.partition(": ")[0] == "validation before the first update"
    assert after.partition(": ")[0] == "validation after update 1"
    assert before.partition(": ")[2] != after.partition(": ")[2]


def test_options_that_nothing_is_there_for(
    small_model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = write_dataset(tmp_path / "whole.toml")
    assert main(words(small_model, whole, tmp_path / "a", "--save_best --validation_patience 3")) == 2
    said = capsys.readouterr().err
    assert "--save_best: no images are kept for validation" in said
    assert "--validation_patience = 3: no images are kept for validation" in said
    assert "give --validation_split 0.1" in said
    more = "--validate_every_n_steps 3 --max_validation_steps 2"
    warnings = planned(capsys, words(small_model, whole, tmp_path / "b", more))["warnings"]
    for name in ("validate_every_n_steps", "max_validation_steps"):
        assert f"--{name} has no effect: no images are kept for validation (validation_split)" in warnings  # type: ignore[operator]
    more = "--validate_every_n_steps 7 --validate_every_n_epochs 9 --max_train_steps 5"
    plan = planned(capsys, words(small_model, photos, tmp_path / "c", more))
    found = plan["warnings"]
    assert any("--validate_every_n_epochs = 9 has no effect" in text for text in found)  # type: ignore[attr-defined]
    assert any("--validate_every_n_steps = 7: the training has 5 updates" in text for text in found)  # type: ignore[attr-defined]
    assert plan["validations"]["after_updates"] == [0, 5]  # type: ignore[index]


def test_files_of_the_best_are_known() -> None:
    assert (FileNames(Path(), "lora").best, FileNames(Path(), None).best) == ("lora-best", "best")


def test_figures_are_means_over_samples() -> None:
    sums: Tensor = torch.tensor([[3.0] + [0.0] * 8 + [5.0], [2.0] + [0.0] * 8 + [2.0]], dtype=torch.float64)
    assert mean(sums) == 2.0
