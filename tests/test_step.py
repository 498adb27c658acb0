"""One update: nothing in it asks a tensor for its value, and it costs no more than it did."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from sd_train import build, loop, report
from sd_train.types import Progress, Update
from tests.runs import write_dataset
from tools.bench_counts import CASES, KEPT, count_step, grown, make_small_model

LORA = "--network_dim 4 --cache_latents"
WITHOUT_WAITS = {
    "lora": ("train_network", LORA),
    "options": (
        "train_network",
        f"{LORA} --min_snr_gamma 5 --noise_offset 0.1 --loss_type huber --huber_schedule snr --network_dropout 0.1 "
        "--gradient_checkpointing --ip_noise_gamma 0.1 --network_train_unet_only",
    ),
    "bf16": ("train_network", f"{LORA} --mixed_precision bf16 --scale_weight_norms 1 --weighted_captions"),
    "importance": ("train_network", f"{LORA} --timestep_sampling importance --optimizer_type Lion"),
    "lycoris": ("train_network", f"{LORA} --network_module lycoris.kohya --network_args algo=lokr"),
    "full": ("train_db", "--cache_latents --use_ema --optimizer_type SGDNesterov"),
    "uncached": ("train_db", "--stop_text_encoder_training 1 --debiased_estimation_loss"),
    "text": ("train_textual_inversion", "--token_string thing-1 --init_word animal --use_object_template"),
}
"""Name -> command and options, of which nothing may wait for the device between two updates."""


class Enough(Exception):
    """The updates that were to be seen are over."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_model(tmp_path_factory.mktemp("model"))


def take_two_updates(run: loop.Training) -> None:
    """On tensors without values, of which each question for one is an error."""
    whole, seen = run.updates.starting_at, list[int]()

    def two(progress: Progress, end: int) -> Iterator[Update]:
        for number, update in enumerate(whole(progress, end)):
            if number == 2:
                raise Enough
            seen.append(number)
            yield update

    run.updates.starting_at = two  # type: ignore[method-assign]
    # As on a GPU, where verdicts are read some updates later.
    run.safety.watch.at_once = False
    with FakeTensorMode(allow_non_fake_inputs=True):
        loop._train_on(run)


def ends_with(problem: type[Exception], case: tuple[str, str], model: Path, folder: Path) -> None:
    command, options = case
    words = f"""--pretrained_model_name_or_path {model} --dataset_config {write_dataset(folder / "data.toml")}
        --output_dir {folder / "out"} --learning_rate 1e-4 --seed 1 --max_train_steps 6 --max_data_loader_n_workers 1
        {options}"""
    with pytest.raises(problem):
        importlib.import_module(f"sd_train.{command}").main(words.split())


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def kept(value: Any) -> Any:
        return value.detach() if isinstance(value, Tensor) else value

    monkeypatch.setattr(build, "train", take_two_updates)
    monkeypatch.setattr(report, "_kept", kept)
    monkeypatch.setattr(report, "SECONDS_READ_TOGETHER", 1e9)


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("case", WITHOUT_WAITS)
def test_no_update_waits_for_the_device(case: str, model: Path, tmp_path: Path) -> None:
    ends_with(Enough, WITHOUT_WAITS[case], model, tmp_path)


@pytest.mark.usefixtures("as_on_a_device")
def test_an_optimizer_that_waits_is_found_out(model: Path, tmp_path: Path) -> None:
    case = ("train_network", f"{LORA} --optimizer_type Prodigy")
    ends_with(DataDependentOutputException, case, model, tmp_path)


@pytest.mark.parametrize("case", CASES)
def test_an_update_costs_no_more_than_before(case: str, model: Path) -> None:
    """`python tools/bench.py counts --write` keeps new counts, where there is a reason for them."""
    kept = json.loads(KEPT.read_text(encoding="utf-8"))
    if kept["torch"].split("+")[0] != torch.__version__.split("+")[0]:
        pytest.skip(f"the counts are those of torch {kept['torch']}")
    assert not grown(kept["cases"][case], count_step(case, model))


def test_growth_is_told() -> None:
    before = {"operations": 100, "waits": 0}
    assert not grown(before, {"operations": 105, "waits": 0})
    told = ["operations: 106, and 100 before", "waits: 1, and 0 before"]
    assert grown(before, {"operations": 106, "waits": 1}) == told
