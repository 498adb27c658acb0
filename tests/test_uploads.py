"""Uploads to a hub on this machine, through the library and the real entry point; and what is said where it fails."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from sd_train.config.hub import HubFolder, parse_hub_folder
from sd_train.config.parser import load_run_config
from sd_train.errors import ConfigError, DataError
from sd_train.train_db import main as train_db
from sd_train.train_network import main
from sd_train.uploads import HubTarget, Uploader, download_state, open_repository
from tests.hub_server import COMMIT, TOKEN, Hub, hub_server, use_hub
from tests.runs import differences, tree, words, write_dataset


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no login"))
    with hub_server(monkeypatch) as server:
        yield server


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "photos.toml", dataset="batch_size = 2")


def files(folder: Path, *names: str) -> list[Path]:
    """Small files of these names, which are their contents."""
    paths = [folder / name for name in names]
    for path in paths:
        path.write_text(path.name)
    return paths


def nobody(monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a hub that is away."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    use_hub(monkeypatch, url)
    return url


def ignore(text: str) -> None:
    """Hears nothing."""


def test_what_a_run_saves_arrives_and_continues_elsewhere(
    small_model: Path, photos: Path, tmp_path: Path, hub: Hub, capfd: pytest.CaptureFixture[str]
) -> None:
    more = "--max_train_steps 4 --save_every_n_steps 2 --save_state"
    up = f"--huggingface_repo_id me/frog --huggingface_path_in_repo runs/a --huggingface_token {TOKEN} "
    up += "--save_state_to_huggingface --async_upload"
    first = tmp_path / "first"
    assert main(words(small_model, photos, first, f"{more} {up}")) == 0
    assert "uploaded lora-step00000002.safetensors to me/frog" in capfd.readouterr().err
    assert {tuple(asked.items()) for asked in hub.created} == {
        (("name", "frog"), ("organization", "me"), ("visibility", "private"), ("type", "model"))
    }
    kept = {name: content for name, content in tree(first).items() if name != "lora-config.toml"}
    assert hub.repos["me/frog"] == {f"runs/a/{name}": content for name, content in kept.items()}
    stems = list(dict.fromkeys(name.split("/")[2] for name in hub.order))
    step = "lora-step00000002"
    assert stems[:2] == [f"{step}.safetensors", f"{step}-state"]
    assert stems[-2:] == ["lora.safetensors", "lora-state"]
    # The token is in none of the files, those of the hub included.
    assert not any(TOKEN.encode() in content for content in (*tree(first).values(), *hub.repos["me/frog"].values()))

    second = tmp_path / "second"
    down = f"--resume me/frog/runs/a/{step}-state:main:model --resume_from_huggingface --huggingface_token {TOKEN}"
    assert main(words(small_model, photos, second, f"{more} {down}")) == 0
    assert f"{COMMIT}/runs/a/{step}-state at step 2 of 4" in capfd.readouterr().out
    assert differences(first / "lora.safetensors", second / "lora.safetensors") == []
    again = load_run_config("train_network", ["--config_file", str(second / "lora-config.toml")]).config
    assert again.saving.resume is None
    assert not again.hub.resume_from_huggingface


def test_a_model_that_is_a_folder_arrives_and_its_state_stays(
    tiny_folder: Path, photos: Path, tmp_path: Path, hub: Hub
) -> None:
    more = "--output_name whole --max_train_steps 1 --learning_rate 1e-5 --max_data_loader_n_workers 0 --save_state"
    more += f" --huggingface_repo_id me/frog --huggingface_token {TOKEN}"
    paths = ("--pretrained_model_name_or_path", tiny_folder, "--dataset_config", photos, "--output_dir", tmp_path)
    assert train_db([*map(str, paths), *more.split()]) == 0
    assert (tmp_path / "whole-state").is_dir()
    written = tree(tmp_path / "whole")
    assert "unet/config.json" in written
    assert hub.repos["me/frog"] == {f"whole/{name}": content for name, content in written.items()}


def test_a_refusing_hub_does_not_stop_a_training(
    small_model: Path, photos: Path, tmp_path: Path, hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    hub.refuses = True
    output = tmp_path / "out"
    more = f"--max_train_steps 2 --save_every_n_steps 1 --huggingface_repo_id me/frog --huggingface_token {TOKEN}"
    with caplog.at_level(logging.WARNING):
        assert main(words(small_model, photos, output, more)) == 0
    warnings = [record.getMessage() for record in caplog.records if record.name == "sd_train.uploads"]
    assert [text.split(":")[0] for text in warnings] == [
        str(output / f"lora{part}.safetensors") for part in ("-step00000001", "-step00000002", "")
    ]
    assert all("the training goes on; upload it later: hf upload me/frog /" in text for text in warnings)
    assert hub.repos == {"me/frog": {}}


@pytest.mark.parametrize(
    ("token", "role", "said"),
    [("hf_other", "write", "the hub refuses"), (TOKEN, "read", "may only read"), ("", "write", "no token")],
)
def test_a_token_that_cannot_upload_ends_before_the_first_update(
    small_model: Path, photos: Path, tmp_path: Path, hub: Hub, token: str, role: str, said: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("HF_TOKEN", raising=False)
    hub.role = role
    more = "--max_train_steps 1 --huggingface_repo_id me/frog " + (f"--huggingface_token {token}" if token else "")
    assert main(words(small_model, photos, tmp_path / "out", more)) == 2
    error = capsys.readouterr().err
    assert "--huggingface_repo_id = 'me/frog'" in error
    assert said in error
    assert "HF_TOKEN" in error
    assert TOKEN not in error
    assert not (tmp_path / "out").exists()


def test_a_hub_that_is_away_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    url = nobody(monkeypatch)
    target = HubTarget("me/frog", "dataset", token=TOKEN)
    told: list[str] = []
    open_repository(target, told.append)
    assert f"the hub at {url} cannot be reached" in told[0]
    (path,) = files(tmp_path, "a b.safetensors")
    with caplog.at_level(logging.WARNING), Uploader(target, told.append, in_background=False) as uploader:
        uploader.saved([path])
    assert f"hf upload --repo-type dataset me/frog '{path}' 'a b.safetensors'" in caplog.text
    with pytest.raises(DataError, match=r"cannot be downloaded .*hf download me/frog --include 'state/\*'"):
        download_state("me/frog/state", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="switched off by HF_HUB_OFFLINE"):
        open_repository(target, told.append)
    assert len(told) == 1


def test_uploads_in_the_background_keep_their_order_and_are_waited_for(tmp_path: Path, hub: Hub) -> None:
    told: list[str] = []

    def say(text: str) -> None:
        told.append(text)
        if text.startswith("waiting"):
            hub.pause.set()

    target = HubTarget("me/frog", folder="x", private=False, token=TOKEN)
    open_repository(target, say)
    assert hub.created[-1]["visibility"] == "public"
    hub.pause.clear()
    names = [f"{number}.safetensors" for number in (3, 1, 2)]
    (tmp_path / "state").mkdir()
    uploader = Uploader(target, say, in_background=True)
    for path in files(tmp_path, *names):
        uploader.saved([path], tmp_path / "state")
    # The hub answers nothing before this line: `saved` did not wait.
    assert hub.order == []
    uploader.close()
    uploader.close()
    assert hub.order == [f"x/{name}" for name in names]
    assert "waiting for uploads" in told[0]
    assert told[1:] == [f"uploaded {name} to me/frog" for name in names]


def test_a_file_that_is_gone_does_not_end_the_thread(
    tmp_path: Path, hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    target = HubTarget("me/frog", token=TOKEN)
    with caplog.at_level(logging.WARNING), Uploader(target, ignore, in_background=True) as uploader:
        uploader.saved([tmp_path / "gone.safetensors", *files(tmp_path, "there.safetensors")])
    assert hub.repos == {"me/frog": {"there.safetensors": b"there.safetensors"}}
    assert "gone.safetensors: not uploaded" in caplog.text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("me/nothing/state", "the hub has no model repository me/nothing"),
        ("me/frog/other", "has no folder 'other'"),
        ("me/frog", "names no folder on the hub"),
    ],
)
def test_states_that_are_not_there(hub: Hub, text: str, said: str) -> None:
    hub.repos["me/frog"] = {"state/manifest.json": json.dumps({}).encode()}
    with pytest.raises((DataError, ConfigError), match=said):
        download_state(text, TOKEN)


def test_places_on_the_hub() -> None:
    assert parse_hub_folder("me/frog/a/b") == HubFolder("me/frog", "a/b", None, "model")
    assert parse_hub_folder("me/frog/a/:v1:dataset") == HubFolder("me/frog", "a", "v1", "dataset")
    for wrong in ("me/frog", "me/frog/", "frog", "me/frog/../x", "me/frog/a:v1:disk", "me/frog/a:1:model:2", "/me/f/a"):
        assert parse_hub_folder(wrong) is None


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--huggingface_repo_id frog", "--huggingface_repo_id = 'frog': is no repository; write owner/name"),
        ("--huggingface_repo_id me/frog --huggingface_path_in_repo a/../b", "is no path in a repository"),
        ("--huggingface_repo_id me/frog --huggingface_repo_type disk", "must be one of: model, dataset, space"),
        ("--resume some/state --resume_from_huggingface", "names no folder on the hub; give it as resume = OWNER/NAME"),
        ("--huggingface_token hf_one hf_two", "--huggingface_token = '***': takes one value"),
    ],
)
def test_wrong_options(small_model: Path, photos: Path, tmp_path: Path, more: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_config("train_network", words(small_model, photos, tmp_path / "out", more))
    assert said in str(caught.value)
    assert "hf_one" not in str(caught.value)


def test_options_without_effect(small_model: Path, photos: Path, tmp_path: Path) -> None:
    more = "--async_upload --save_state_to_huggingface --resume_from_huggingface --huggingface_repo_visibility public"
    loaded = load_run_config("train_network", words(small_model, photos, tmp_path / "out", more))
    assert sorted(warning.split()[0] for warning in loaded.warnings) == sorted(more.replace(" public", "").split())
