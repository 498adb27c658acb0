"""Files and words from anywhere run no code, steer no terminal, leave no folder, and end in words; nothing leaks."""

from __future__ import annotations

import io
import json
import os
import random
import re
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from sd_train.__main__ import main as sd_train
from sd_train.config.parser import load_run_config
from sd_train.entry import guarded
from sd_train.errors import ConfigError, DataError, UserError
from sd_train.files import sha256
from sd_train.prompts import load_prompts
from sd_train.state import read_manifest, read_progress
from sd_train.state_files import read_table
from sd_train.terminal import escaped
from tests.runs import PHOTOS, train, tree, words, write_dataset
from tools.fuzz import HOSTILE_TEXTS, LIES, READERS, hostile_json, lies, outcomes, sample_files

FILES, JSONS, PROMPTS, ENTRIES = 120, 60, 60, 60
"""Hostile ones of each kind that are tried here; `tools/fuzz.py` tries as many as one likes."""


class Malicious:
    """Unpickled, it makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail with a code and write nothing; what it says."""

    def run(code: int, *arguments: object) -> str:
        before = set(tmp_path.rglob("*"))
        capsys.readouterr()
        assert sd_train([*map(str, arguments)]) == code
        said = capsys.readouterr()
        assert set(tmp_path.rglob("*")) == before
        assert "Traceback" not in said.err
        assert said.err.count("error: ") == 1
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", said.out + said.err)
        return said.err

    return run


@pytest.fixture(scope="module")
def finished(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its state, given a token of the hub and a key of wandb, and everything that tells a machine's own."""
    folder = tmp_path_factory.mktemp("mallorys_place")
    dataset = write_dataset(folder / "photos.toml")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("USER", "LOGNAME", "USERNAME"):
            patch.setenv(name, "mallory_the_user")
        patch.setenv("HF_TOKEN", "hf_tokenoftheenvironment")
        patch.setenv("WANDB_API_KEY", "keyoftheenvironment")
        more = f"--max_train_steps 1 --save_state --logging_dir {folder / 'logs'} --log_with tensorboard"
        more += " --huggingface_token hf_secrettoken --wandb_api_key secretwandbkey"
        train(small_model, dataset, folder / "out", more)
    return folder


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-1.6"])
def test_no_pickle_runs_code_wherever_it_is_named(
    small_model: Path, tmp_path: Path, refused: Callable[..., str], zipped: bool
) -> None:
    made, evil, posing = tmp_path / "executed", tmp_path / "evil.ckpt", tmp_path / "posing.safetensors"
    content = {"state_dict": {"x": torch.ones(1)}, "callbacks": Malicious(made)}
    torch.save(content, evil, _use_new_zipfile_serialization=zipped)
    posing.write_bytes(evil.read_bytes())
    dataset, output = write_dataset(tmp_path / "d.toml", subset="caption_prefix = 'mytok'"), tmp_path / "out"
    teach = ["train_textual_inversion", *words(small_model, dataset, output, "--token_string mytok --init_word cat")]
    teach = [word for word in teach if word not in ("--network_dim", "--network_alpha", "4")]
    commands: list[list[object]] = [
        ["train_network", *words(evil, dataset, output, "")],
        ["train_network", *words(small_model, dataset, output, f"--vae {evil}")],
        ["train_network", *words(small_model, dataset, output, f"--network_weights {evil}")],
        ["train_network", *words(small_model, dataset, output, f"--base_weights {evil}")],
        [*teach, "--weights", evil],
        ["sample", small_model, "--prompt", "a cat", "--lora", evil, "--output_dir", output],
        ["sample", small_model, "--prompt", "a cat", "--embedding", evil, "--output_dir", output],
        ["lora", "check", evil],
        ["lora", "merge", "--models", evil, "--save_to", tmp_path / "merged.safetensors"],
        ["convert", evil, tmp_path / "converted.safetensors"],
        ["convert", small_model, tmp_path / "converted.safetensors", "--vae", evil],
    ]
    for command in commands if zipped else commands[:1]:
        said = refused(3, *command)
        assert str(evil) in said
        assert "could run code" in said
        assert not made.exists()
        if command[0] in ("lora", "convert"):
            refused(3, *(posing if word == evil else word for word in command))
            assert not made.exists()


@pytest.mark.parametrize("reader", READERS)
def test_safetensors_that_lie(reader: str, tmp_path: Path) -> None:
    whole = sample_files(tmp_path)[reader]
    place = tmp_path / "files"
    place.mkdir()
    path = place / "x.safetensors"
    path.write_bytes(whole)
    if reader != "model":
        READERS[reader](path)
    found = outcomes(READERS[reader], path, lies(whole, FILES, seed=3))
    print(f"{reader}: {found}")
    assert found.total() == FILES
    assert found["refused"] >= FILES // 2
    assert list(place.iterdir()) == [path]
    assert len(LIES) == 12


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b'{"a": {"dtype": "F32", "shape": [-1, -4], "data_offsets": [0, 16]}}', "no place or shape"),
        (b'{"a": {"dtype": "F32", "shape": [0, 1180591620717411303424], "data_offsets": [0, 0]}}', "no place or shape"),
        (b'{"a": {"dtype": "F32", "shape": [4294967296, 4294967296], "data_offsets": [0, 0]}}', "wrong size"),
        (b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}}', "ends early"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, '
         b'"b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}', "share their place"),
        (b'{"a": {}, "a": {}}', "twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": ' + b"[" * 100_000, "nested too deep"),
        (b'{"\xff": 1}', "not UTF-8"),
        (b'{"a": {"dtype": "F4\\u001b[2J", "shape": [4], "data_offsets": [0, 16]}}', "unknown dtype"),
    ],
)  # fmt: skip
def test_what_a_header_may_not_say(
    header: bytes, reason: str, tmp_path: Path, refused: Callable[..., str]
) -> None:
    path = tmp_path / "lie.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    said = refused(3, "lora", "check", path)
    assert f"{path}: cannot be read as safetensors" in said
    assert reason in said


def reseal(state: Path) -> None:
    """Give the state a manifest that fits what is in it now, as someone would who wants it to be read."""
    manifest = json.loads((state / "manifest.json").read_text())
    for name in manifest["files"]:
        manifest["files"][name] = {"size": (state / name).stat().st_size, "sha256": sha256(state / name)}
    (state / "manifest.json").write_text(json.dumps(manifest))


def test_states_that_are_no_states(
    finished: Path, small_model: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    state, made = tmp_path / "evil-state", tmp_path / "executed"
    state.mkdir()
    for name, content in tree(finished / "out" / "lora-state").items():
        (state / name).write_bytes(content)
    pickled = io.BytesIO()
    torch.save({"state": Malicious(made)}, pickled)
    optimizer = (state / "optimizer.safetensors").read_bytes()
    (state / "optimizer.safetensors").write_bytes(pickled.getvalue())
    command = words(small_model, write_dataset(tmp_path / "d.toml"), tmp_path / "out", f"--resume {state}")
    command = ["train_network", *command, "--max_train_steps", "2"]
    assert "differs from what was saved" in refused(3, *command)
    reseal(state)
    assert "optimizer.safetensors: holds what no training has written" in refused(3, *command)
    assert not made.exists()
    (state / "optimizer.safetensors").write_bytes(optimizer)
    reseal(state)
    rng, found = random.Random(5), {"refused": 0, "harmless": 0}
    for name in ("manifest.json", "progress.json"):
        whole = (state / name).read_text()
        for _ in range(JSONS):
            (state / name).write_text(json.dumps(hostile_json(json.loads(whole), rng)))
            if name != "manifest.json":
                reseal(state)
            try:
                read_manifest(state)
                read_progress(state)
            except DataError:
                found["refused"] += 1
            else:
                found["harmless"] += 1
        (state / name).write_text(whole)
        reseal(state)
    print(f"state: {found}")
    assert found["refused"] >= JSONS // 2
    (state / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="no sealed state"):
        read_manifest(state)
    assert not made.exists()
    assert read_table(finished / "out" / "lora-state" / "optimizer.safetensors")


@pytest.mark.parametrize("name", [".", "..", "...", "a/b", "../a", "a\\b", "/a", "a\0b", "a\nb", "\x1b[2J", "x" * 300])
def test_output_names_are_names(name: str, small_model: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    command = words(small_model, write_dataset(tmp_path / "d.toml"), tmp_path / "o", "")
    assert "--output_name" in refused(2, "train_network", *command, "--output_name", name)
    if "/" in name or name == "..":
        outside = ["--logging_dir", tmp_path / "logs", "--log_prefix", name if name != "a/b" else "../a"]
        assert "--log_prefix" in refused(2, "train_network", *command, *outside)


@pytest.mark.parametrize("name", ["nul", "CON.v1", "com1", "Lpt9"])
def test_names_of_devices_are_told(name: str, small_model: Path, tmp_path: Path) -> None:
    command = words(small_model, write_dataset(tmp_path / "d.toml"), tmp_path / "o", "")
    said = load_run_config("train_network", [*command, "--output_name", name]).warnings
    assert any("device on Windows" in warning for warning in said)


def test_metadata_files_and_captions_from_anywhere(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (64, 64)).save(images / "a.png")
    (images / "a.txt").write_text("a \x1b]0;owned\x07 cat \x9b2J\x7f, tag", encoding="utf-8")
    listed, config, rng = tmp_path / "meta.json", tmp_path / "d.toml", random.Random(2)
    config.write_text(f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{images}'\n"
                      f"metadata_file = '{listed}'\n")  # fmt: skip
    plan = ["plan", "train_network", *words(small_model, config, tmp_path / "out", "--max_train_steps 1")]
    codes = []
    before = set(tmp_path.rglob("*")) | {listed}
    whole = {"a.png": {"caption": "a cat", "tags": "x", "image_size": [64, 64]}}
    for number in range(ENTRIES // 6):
        table = hostile_json(whole, rng) if number % 2 else {rng.choice(HOSTILE_TEXTS): {"caption": "x"}, **whole}
        listed.write_text(json.dumps(table))
        codes.append(sd_train(plan))
        assert codes[-1] in (0, 2, 3)
    said = capsys.readouterr()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", said.out + said.err)
    assert "Traceback" not in said.err
    assert set(tmp_path.rglob("*")) == before
    print(f"metadata files: {len(codes)}, {codes.count(0)} harmless")
    assert 3 in codes or 2 in codes


def test_circles_of_links_end(small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a.jpg", "b.jpg"):
        (images / name).symlink_to(images / ("b.jpg" if name == "a.jpg" else "a.jpg"))
    (images / "inner").symlink_to(images)
    os.mkfifo(images / "pipe.png")
    os.mkfifo(tmp_path / "pipe.safetensors")
    config = tmp_path / "d.toml"
    config.write_text(f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{images}'\n"
                      "class_tokens = 'cat'\n")  # fmt: skip
    command = words(small_model, config, tmp_path / "out", "--max_train_steps 1")
    assert sd_train(["train_network", *command]) == 3
    said = capsys.readouterr().err
    assert "symbolic links" in said
    assert str(images / "a.jpg") in said
    page = ["--output", str(tmp_path / "page.html")]
    assert sd_train(["doctor", "--dataset_config", str(config), *page]) in (0, 1, 2, 3)
    assert sd_train(["lora", "check", str(tmp_path / "pipe.safetensors")]) == 3
    assert "no regular file" in capsys.readouterr().err


def test_prompts_with_anything_in_them(tmp_path: Path) -> None:
    rng, refused, read = random.Random(9), 0, 0
    pieces = (*HOSTILE_TEXTS, " --w 64", " --h 64", " --s 1", " --d 9", " --n ", " --ss euler", " --l 1e9", "\u2028")
    for number in range(PROMPTS):
        path = tmp_path / f"prompts.{('txt', 'toml', 'json')[number % 3]}"
        text = "".join(rng.choice(pieces) for _ in range(rng.randrange(1, 6)))
        listed = [text, {"prompt": text, rng.choice(pieces): text}][: number % 2 + 1]
        content = {"txt": text, "json": json.dumps(listed),
                   "toml": f"[prompt]\n[[prompt.subset]]\nprompt = {json.dumps(text)}\n"}[path.suffix[1:]]  # fmt: skip
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
        try:
            load_prompts(path)
            read += 1
        except ConfigError:
            refused += 1
    print(f"prompts: {refused} refused, {read} harmless")
    assert refused
    assert read


def test_pictures_are_never_called_by_their_prompt(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.json"
    prompt = {"prompt": "../../\x1b[31mred\x07 $(id)", "width": 64, "height": 64, "sample_steps": 1, "seed": 5}
    prompts.write_text(json.dumps([prompt]))
    drawn = ["sample", str(small_model), "--prompts", str(prompts), "--output_dir", str(tmp_path / "pictures")]
    assert sd_train(drawn) == 0
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    assert [re.sub(r"\d", "0", path.name) for path in (tmp_path / "pictures").iterdir()] == ["00000-0.png"]


def test_the_terminal_is_not_steered(capsys: pytest.CaptureFixture[str]) -> None:
    steering = "".join(map(chr, (*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A))))

    def action() -> int:
        print(f"a{steering}b\u05d0\U0001f438")
        sys.stderr.writelines(["\rsteps", "x\r"])
        raise UserError(f"{steering}: end")

    before = sys.stdout, sys.stderr
    assert guarded(lambda: guarded(action)) == 2
    assert (sys.stdout, sys.stderr) == before
    said = capsys.readouterr()
    assert set(said.out + said.err) & set(steering) == {"\n", "\t", "\r"}
    assert said.out.count("\\u001b") == said.err.count("\\u001b") == 1
    assert "\r" not in said.out
    assert said.err.startswith("\rstepsx\r")
    assert "b\u05d0\U0001f438" in said.out
    # As JSON has it: what a command prints for machines stays what it was.
    assert json.loads(escaped(json.dumps("\x9b\u202e", ensure_ascii=False))) == "\x9b\u202e"


def test_nothing_that_is_saved_tells_where_or_by_whom(finished: Path) -> None:
    files = tree(finished)
    assert any("tfevents" in name for name in files)
    for name, content in files.items():
        for secret in (b"hf_secrettoken", b"secretwandbkey", b"hf_tokenof", b"keyoftheenv", b"mallory_the_user"):
            assert secret not in content, name
    saved = finished / "out" / "lora.safetensors"
    assert_tells_nothing(saved, finished)


def assert_tells_nothing(saved: Path, place: Path) -> None:
    with safe_open(saved, "pt") as file:
        metadata = file.metadata()
    for name, value in metadata.items():
        assert str(place) not in value, name
        assert str(PHOTOS.parent) not in value, name
        assert str(Path.home()) + os.sep not in value, name
        assert not re.search(r"(?:^|[\s\"'=,(\[])/[A-Za-z]", value), f"{name}: {value}"


@pytest.mark.parametrize("command", ["train_db", "train_textual_inversion"])
def test_whole_models_and_embeddings_tell_nothing_either(command: str, small_model: Path, tmp_path: Path) -> None:
    more = "--token_string mytok --init_word cat" if command == "train_textual_inversion" else "--save_precision fp16"
    dataset = write_dataset(tmp_path / "d.toml", subset="caption_prefix = 'mytok'")
    arguments = words(small_model, dataset, tmp_path / "out", f"--max_train_steps 1 {more}")
    kept = [word for word in arguments if word not in ("--network_dim", "--network_alpha", "4")]
    assert sd_train([command, *kept]) == 0
    (saved,) = (tmp_path / "out").glob("*.safetensors")
    assert_tells_nothing(saved, tmp_path)


def test_the_same_files_come_from_the_same_seed(tmp_path: Path) -> None:
    whole = sample_files(tmp_path)["lora"]
    first, again, other = (list(islice(lies(whole, 24, seed), 24)) for seed in (1, 1, 2))
    assert first == again != other
