"""Curves, texts and hyper-parameters as TensorBoard's own reader, JSON and wandb give them back; keys nowhere."""

from __future__ import annotations

import json
import logging
import math
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups

from sd_train.config.parser import load_run_config
from sd_train.device import Device, Updater
from sd_train.errors import ConfigError
from sd_train.plan_outputs import wandb_run
from sd_train.report import Report
from sd_train.report_norms import Norms
from sd_train.report_trackers import EventFile, JsonLines, Tracker
from sd_train.report_wandb import is_installed, read_arguments
from sd_train.train_network import main
from sd_train.trainables.base import ParamGroup
from tests.runs import scalars, train, tree, words, write_dataset

WANDB_KEY, HUB_TOKEN = "w" * 40, "hf_tokentokentoken"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "photos.toml", dataset="batch_size = 2")


def lines(path: Path) -> list[dict[str, Any]]:
    def refused(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refused) for line in path.read_text(encoding="utf-8").splitlines()]


def curves(log: Path) -> dict[str, list[tuple[int, float | None]]]:
    """What `scalars` gives for an event file, from JSON lines."""
    found: dict[str, list[tuple[int, float | None]]] = {}
    for line in lines(log):
        for tag, value in line.items():
            if "step" in line and tag not in ("step", "epoch", "wall_time", "picture"):
                found.setdefault(tag, []).append((line.get("epoch", line["step"]), value))
    return found


def sessions(folder: Path) -> list[tuple[Any, Any]]:
    """Groups of runs below `folder` as TensorBoard's page of hyper-parameters lists them."""
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    context = TBContext(data_provider=MultiplexerDataProvider(multiplexer, str(folder)), logdir=str(folder))
    backend = backend_context.Context(context)
    request = RequestContext()
    whole = api_pb2.GetExperimentRequest(include_metrics=True)
    experiment = get_experiment.Handler(request, backend, "", whole).run()
    statuses = [api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_SUCCESS, api_pb2.STATUS_FAILURE, api_pb2.STATUS_RUNNING]
    asked = api_pb2.ListSessionGroupsRequest(start_index=0, slice_size=10, allowed_statuses=statuses)
    for info in experiment.hparam_infos:
        asked.col_params.add(hparam=info.name)
    for info in experiment.metric_infos:
        asked.col_params.add(metric=info.name)
    handler = list_session_groups.Handler(request, backend, "", asked)
    return [(group, group.sessions[0]) for group in handler.run().session_groups]


def test_all_trackers_of_a_run(
    small_model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One run with everything: the same curves everywhere, wandb's too, and no key in any file or on the screen."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    output, logs = tmp_path / "out", tmp_path / "logs"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2\n")
    more = "--max_train_steps 4 --save_state --network_train_unet_only --log_norms_every_n_steps 2"
    more += f" --max_grad_norm 0.001 --logging_dir {logs} --log_with all --log_tracker_name frogs --log_config"
    more += f" --sample_prompts {prompts} --sample_every_n_steps 4"
    more += f" --wandb_api_key {WANDB_KEY} --huggingface_token {HUB_TOKEN}"
    arguments = words(small_model, photos, output, more)
    monkeypatch.setattr(sys, "argv", ["train_network", *arguments])
    assert main(arguments) == 0
    (log_dir,) = logs.iterdir()
    points = scalars(log_dir / "frogs")
    written = curves(log_dir / "metrics.jsonl")
    assert {tag: [step for step, _ in found] for tag, found in points.items()} == {
        tag: [step for step, _ in found] for tag, found in written.items()
    }
    for tag, found in points.items():
        assert [value for _, value in found] == pytest.approx([value for _, value in written[tag]], rel=1e-6)

    # Gradients before clipping; weights that were saved.
    assert [step for step, _ in points["norm/gradient/unet"]] == [2, 4]
    before_clipping = dict(points["grad_norm"])
    assert dict(points["norm/gradient/unet"]) == pytest.approx({step: before_clipping[step] for step in (2, 4)})
    saved = [tensor.double() for name, tensor in load_file(output / "lora.safetensors").items() if "alpha" not in name]
    norm = math.sqrt(sum(float((tensor**2).sum()) for tensor in saved))
    assert points["norm/weight/unet"][-1] == (4, pytest.approx(norm))

    content = lines(log_dir / "metrics.jsonl")
    config_text = (output / "lora-config.toml").read_text(encoding="utf-8")
    assert content[0]["text"] == {"config": config_text}
    assert content[1]["hyperparameters"]["network_dim"] == 4
    # Nor what belongs to other commands.
    assert "xti" not in content[1]["hyperparameters"]
    assert "pretrained_model_name_or_path" not in content[1]["hyperparameters"]
    assert {"step": 4, "picture": "sample_0"}.items() <= next(line for line in content if "picture" in line).items()
    assert content[-1]["final"]["loss/average"] == written["loss/average"][-1][1]
    assert content[-1]["failed"] is False
    events = EventAccumulator(str(log_dir / "frogs"))
    events.Reload()
    (shown,) = events.Tensors("config")
    assert shown.tensor_proto.string_val[0].decode() == f"```\n{config_text}\n```"

    if is_installed():
        sent = history(next(log_dir.glob("wandb/offline-run-*/run-*.wandb")))
        assert [(entry["step"], entry["loss/current"]) for entry in sent if "loss/current" in entry] == points_of(
            written, "loss/current"
        )
        assert [entry["epoch"] for entry in sent if "loss/epoch_average" in entry] == [1]
        assert any(name.startswith("sample_0") for entry in sent for name in entry)
        assert len(list(log_dir.glob("wandb/offline-run-*/files/media/images/sample_0_*.png"))) == 1
    said = capfd.readouterr()
    for key in (WANDB_KEY, HUB_TOKEN):
        assert key not in said.out + said.err
        for folder in (output, logs):
            assert [name for name, data in tree(folder).items() if key.encode() in data] == []


def points_of(found: dict[str, list[tuple[int, float | None]]], tag: str) -> list[tuple[int, float | None]]:
    return [(step, pytest.approx(value)) for step, value in found[tag]]


def history(path: Path) -> list[dict[str, Any]]:
    """The points in wandb's own file: seven bytes, then LevelDB's log format around protobuf messages."""
    from wandb.proto import wandb_internal_pb2

    found: list[dict[str, Any]] = []
    stored, place, message = path.read_bytes(), 7, b""
    while place + 7 <= len(stored):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", stored, place)
        message += stored[place + 7 : place + 7 + size]
        place += 7 + size
        if kind not in (1, 4):  # the first or a middle part
            continue
        record = wandb_internal_pb2.Record()
        record.ParseFromString(message)
        message = b""
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            found.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return found


def test_hyperparameters_with_their_metrics(tmp_path: Path) -> None:
    """Two runs side by side, one of which fails."""
    for number, rate in enumerate((1e-3, 5e-4)):
        report = Report(logging_dir=tmp_path / f"run{number}", total_steps=2, console=False, tracker_name="t")
        report.describe("", {"learning_rate": rate, "network_dim": 4, "optimizer_type": "AdamW", "flip": True})
        if number:
            with suppress(KeyError), report:
                report.update(1, 0, 1, 0.25, {})
                raise KeyError
        else:
            with report:
                report.update(1, 0, 1, 0.5, {})
                report.update(2, 1, 1, 0.7, {})
    found = {group.hparams["learning_rate"].number_value: (group, session) for group, session in sessions(tmp_path)}
    assert set(found) == {1e-3, 5e-4}
    group, session = found[1e-3]
    assert group.hparams["optimizer_type"].string_value == "AdamW"
    assert group.hparams["flip"].bool_value is True
    assert group.hparams["network_dim"].number_value == 4
    assert session.status == api_pb2.STATUS_SUCCESS
    assert found[5e-4][1].status == api_pb2.STATUS_FAILURE
    finals = {value.name.tag: value.value for value in session.metric_values}
    assert finals["loss/average"] == pytest.approx(0.6)
    assert finals["loss/current"] == pytest.approx(0.7)


def test_json_lines_are_json_and_are_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    for step in (1, 2):
        log = JsonLines(path)
        log.scalars(step, 0.5, {"a": math.nan, "b": -math.inf, "c": 0.25})
        log.flush()
        assert lines(path)[-1] == {"step": step, "wall_time": 0.5, "a": None, "b": None, "c": 0.25}
        log.scalars(step, 0.5, {"d": 1.0}, epoch=7)
        log.close({"c": math.inf}, failed=True)
        log.close({})
    found = lines(path)
    assert [line["step"] for line in found if "a" in line] == [1, 2]
    assert {"step": 1, "epoch": 7, "wall_time": 0.5, "d": 1.0} in found
    assert {"final": {"c": None}, "failed": True}.items() <= found[-1].items()
    assert len(found) == 6


@pytest.mark.parametrize("kind", [EventFile, JsonLines])
def test_a_tracker_that_cannot_write_warns_once(
    kind: type[Tracker], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        tracker = kind(tmp_path / "file" / "log")  # type: ignore[call-arg,arg-type]
        tracker.text("config", "")
        tracker.hyperparameters({"a": 1})
        tracker.scalars(1, 0.0, {"a": 1.0})
        tracker.flush()
        tracker.close({})
    assert len(caplog.records) == 1
    assert "the training goes on without it" in caplog.text


def test_norms_of_groups_without_and_with_gradients() -> None:
    first, second, idle = (torch.nn.Parameter(torch.full((2, 2), value)) for value in (1.0, 3.0, 2.0))
    groups = [ParamGroup("a", {"x": first, "y": second}, 1.0), ParamGroup("b", {"z": idle}, 1.0)]
    norms = Norms(groups, 3)
    assert [step for step in range(1, 10) if norms.due(step)] == [3, 6, 9]
    first.grad, second.grad = torch.full((2, 2), 2.0), torch.zeros(2, 2)
    norms.take_gradients()
    figures = norms.figures()
    assert {tag: float(value) for tag, value in figures.items()} == pytest.approx(
        {"norm/gradient/a": 4.0, "norm/weight/a": math.sqrt(40), "norm/weight/b": 4.0}
    )
    assert not any(value.requires_grad for value in figures.values())


def test_norms_wait_for_no_device() -> None:
    """On a device without numbers: whoever wanted to read one would fail."""
    weights = {name: torch.nn.Parameter(torch.empty(3, 3, device="meta")) for name in ("x", "y")}
    for weight in weights.values():
        weight.grad = torch.empty(3, 3, device="meta")
    norms = Norms([ParamGroup("a", weights, 1.0)], 1)
    norms.take_gradients()
    assert {tag: (value.device.type, value.ndim) for tag, value in norms.figures().items()} == {
        "norm/gradient/a": ("meta", 0), "norm/weight/a": ("meta", 0)
    }  # fmt: skip


def test_norms_are_without_the_scale_of_the_loss_and_before_clipping() -> None:
    weight = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    updater = Updater(Device(torch.device("cpu"), "fp16"), optimizer, [[weight]], max_norm=0.5)
    norms = Norms([ParamGroup("a", {"w": weight}, 1.0)], 1)
    updater.backward((weight * torch.tensor([3.0, 0.0, 4.0, 0.0])).sum())
    updater.step(norms.take_gradients)
    found = norms.figures()
    assert (float(found["norm/gradient/a"]), float(found["norm/weight/a"])) == pytest.approx((5.0, 0.5), rel=1e-4)


def test_norms_change_nothing(small_model: Path, photos: Path, tmp_path: Path) -> None:
    more = f"--max_train_steps 2 --logging_dir {tmp_path / 'logs'} --log_with jsonl --log_norms_every_n_steps"
    with_norms = train(small_model, photos, tmp_path / "with", f"{more} 1")
    without = train(small_model, photos, tmp_path / "without", f"{more} 0")
    ours, theirs = load_file(with_norms), load_file(without)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())
    logs = [curves(path) for path in sorted((tmp_path / "logs").rglob("metrics.jsonl"))]
    tags = {tag for log in logs for tag in log if tag.startswith("norm/")}
    assert tags == {f"norm/{what}/{group}" for what in ("weight", "gradient") for group in ("unet", "textencoder")}
    assert not list((tmp_path / "logs").rglob("events.*"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[tensorboard]\na = 1", "tensorboard is no tracker with arguments"),
        ("wandb = 3", "wandb is no table"),
        ("[wandb]\nproject = 'x'", "give it as log_tracker_name"),
    ],
)
def test_arguments_of_trackers(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "trackers.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_arguments(path)
    path.write_text("[wandb]\nentity = 'me'\ntags = ['a']")
    assert read_arguments(path) == {"entity": "me", "tags": ["a"]}


@pytest.mark.skipif(not is_installed(), reason="needs wandb")
def test_wandb_is_asked_before_the_first_update(
    small_model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    (tmp_path / "trackers.toml").write_text("[wandb]\nentitty = 'me'")

    def chosen(more: str) -> Any:
        loaded = load_run_config("train_network", words(small_model, photos, tmp_path / "out", more))
        return wandb_run(loaded.config, told.append)

    told: list[str] = []
    assert chosen("") is None
    with pytest.raises(ConfigError, match="entitty is no argument of wandb"):
        chosen(f"--log_with wandb --log_tracker_config {tmp_path / 'trackers.toml'}")
    with pytest.raises(ConfigError, match="no key; run wandb login, set WANDB_API_KEY"):
        chosen("--log_with wandb")
    assert chosen(f"--log_with all --logging_dir {tmp_path}") is None
    assert "no key" in told[0]
    run = chosen(f"--log_with wandb --wandb_api_key {WANDB_KEY} --wandb_run_name first")
    assert (run.project, run.name, run.key) == ("network_train", "first", WANDB_KEY)
    assert WANDB_KEY not in repr(run)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert chosen("--log_with wandb").key is None


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--log_with jsonl", "--log_with = 'jsonl': needs a folder for the curves"),
        ("--log_tracker_name a/b", "--log_tracker_name = 'a/b': is a path; give one name"),
        ("--log_tracker_config none.toml", "--log_tracker_config = 'none.toml': there is no such file"),
        ("--log_norms_every_n_steps -1", "must be a whole number >= 0"),
    ],
)
def test_wrong_options(small_model: Path, photos: Path, tmp_path: Path, more: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_config("train_network", words(small_model, photos, tmp_path / "out", more))
    assert said in str(caught.value)


def test_keys_stay_out_of_written_options_and_messages(small_model: Path, photos: Path, tmp_path: Path) -> None:
    keys = f"--wandb_api_key {WANDB_KEY} --huggingface_token {HUB_TOKEN}"
    arguments = words(small_model, photos, tmp_path / "out", keys)
    loaded = load_run_config("train_network", arguments)
    assert [warning.split()[0] for warning in loaded.warnings] == ["--wandb_api_key", "--huggingface_token"]
    path = tmp_path / "written.toml"
    with pytest.raises(SystemExit):
        load_run_config("train_network", [*arguments, "--config_file", str(path), "--output_config"])
    for text in (repr(loaded.config), path.read_text(encoding="utf-8")):
        assert WANDB_KEY not in text
        assert HUB_TOKEN not in text
    assert loaded.config.hub.huggingface_token is not None
    assert loaded.config.hub.huggingface_token.get_secret_value() == HUB_TOKEN
    twice = tmp_path / "twice.toml"
    twice.write_text(f"wandb_api_key = '{WANDB_KEY}'\nhuggingface_token = 12345678\n[a]\nwandb_api_key = '{WANDB_KEY}'")
    with pytest.raises(ConfigError, match=r"huggingface_token = '\*\*\*'") as caught:
        load_run_config("train_network", ["--config_file", str(twice)])
    assert WANDB_KEY not in str(caught.value)
    assert "12345678" not in str(caught.value)
