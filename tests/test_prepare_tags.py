"""`sd-train tag_images_by_wd14_tagger`: real files, and taggers in ONNX with known answers."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from numpy.typing import NDArray
from PIL import Image

from sd_train.__main__ import main
from sd_train.errors import ModelError, Problems
from sd_train.files import temporary_name
from sd_train.prepare.captioner import find_captioner
from sd_train.prepare.describing import Troubles, opened_ahead
from sd_train.prepare.tag_words import CHOSEN, Category, Label, Speller, TagOptions, read_replacement
from sd_train.prepare.taggers import Tagger, find_tagger, fit_square
from tests.hub_server import hub_server

ROOT = Path(__file__).resolve().parent.parent
SIDE = 32
LABELS = (
    ("general", "9"), ("explicit", "9"), ("red_thing", "0"), ("green_thing", "0"), ("blue_thing", "0"), ("^_^", "0"),
    ("hero_(great_series)", "4"),
)  # fmt: skip
"""Names and categories of the tiny tagger's outputs, in order."""
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


def write_tagger(
    path: Path, weights: NDArray[np.float32], bias: Sequence[float], colours_first: bool = False, batch: int | str = "N"
) -> None:
    """An ONNX model whose outputs are (mean of each colour in its input) @ weights + bias; colours in input order."""
    from onnx import TensorProto, helper, numpy_helper, save

    shape = [batch, 3, SIDE, SIDE] if colours_first else [batch, SIDE, SIDE, 3]
    outputs = weights.shape[1]
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["image", "axes"], ["mean"], keepdims=0),
            helper.make_node("MatMul", ["mean", "weights"], ["product"]),
            helper.make_node("Add", ["product", "bias"], ["output"]),
        ],
        "tagger",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [batch, outputs])],
        [
            numpy_helper.from_array(np.array([2, 3] if colours_first else [1, 2], np.int64), "axes"),
            numpy_helper.from_array(weights.astype(np.float32), "weights"),
            numpy_helper.from_array(np.array(bias, np.float32), "bias"),
        ],
    )
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), str(path))


def write_wd(folder: Path, batch: int | str = "N") -> Path:
    """A WD14 tagger: red_thing is the share of red, green_thing and blue_thing likewise; hero is green less red."""
    folder.mkdir(parents=True, exist_ok=True)
    # Rows are what the model sees: blue, green, red, of 255.
    weights = np.zeros((3, len(LABELS)), np.float32)
    weights[2, 2] = weights[1, 3] = weights[0, 4] = 1 / 255
    weights[:, 6] = np.array([0, 1, -1]) / 255
    weights[0, 1] = 1 / 255
    write_tagger(folder / "model.onnx", weights, [0.5, 0.0, 0.0, 0.0, 0.0, 0.9, 0.0], batch=batch)
    with (folder / "selected_tags.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["tag_id", "name", "category", "count"])
        rows.writerows([[number, name, category, 1] for number, (name, category) in enumerate(LABELS)])
    return folder


@pytest.fixture(scope="module")
def wd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wd(tmp_path_factory.mktemp("wd"))


def write_images(folder: Path, *names: str, size: tuple[int, int] = (40, 40)) -> Path:
    """Images of one colour, the first that is in their name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = next(value for key, value in COLOURS.items() if key in name.lower())
        Image.new("RGB", size, colour).save(path, "PNG")
    return folder


def tag(folder: Path, tagger: Path, *more: str) -> int:
    return main(["tag_images_by_wd14_tagger", str(folder), "--repo_id", str(tagger), *more])


def texts(folder: Path, ending: str = ".txt") -> dict[str, str]:
    found = sorted(folder.rglob(f"*{ending}"))
    return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in found}


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_wd14_sees_blue_green_red_in_a_white_square(tmp_path: Path, wd: Path) -> None:
    write_images(tmp_path, "red.png", "sub/green.PNG")
    write_images(tmp_path, "blue wide.png", size=(80, 40))
    Image.new("RGBA", (40, 40), (255, 0, 0, 0)).save(tmp_path / "transparent.png")
    assert tag(tmp_path, wd, "--recursive", "--thresh", "0.6") == 0
    assert texts(tmp_path) == {
        "red.txt": "red_thing, ^_^\n",
        "sub/green.txt": "green_thing, ^_^, hero_(great_series)\n",
        "blue wide.txt": "blue_thing, ^_^\n",
        "transparent.txt": "red_thing, green_thing, blue_thing, ^_^\n",
    }
    # Half of the wide one's square is white.
    tagger = Tagger(find_tagger(str(wd), tmp_path, anew=False))
    square = tagger.see(np.asarray(Image.open(tmp_path / "blue wide.png")))
    assert square.shape == (SIDE, SIDE, 3)
    np.testing.assert_allclose(square.mean(axis=(0, 1)), [255, 127.5, 127.5])
    np.testing.assert_allclose(tagger([square])[0, 2:5], [0.5, 0.5, 1.0], atol=1e-6)


def test_deepdanbooru_sees_red_green_blue_up_to_one(tmp_path: Path) -> None:
    names = ["red_thing", "girl", "rating:safe", "rating:explicit"]
    weights = np.array([[1, 0.2, 0, 0.1], [0, 0.2, 0, 0.1], [0, 0.2, 0.8, 0.1]], np.float32)
    write_tagger(tmp_path / "model-resnet_custom_v3.onnx", weights, [0, 0, 0, 0])
    (tmp_path / "tags.txt").write_text("\n".join(names) + "\n")
    (tmp_path / "tags-character.txt").write_text("girl\n")
    folder = write_images(tmp_path / "images", "red.png", "blue.png", size=(80, 40))
    assert tag(folder, tmp_path, "--character_threshold", "0.1", "--use_rating_tags_as_last_tag") == 0
    # Padded with its own edge, a picture of one colour stays one.
    assert texts(folder) == {"red.txt": "red_thing, girl, explicit\n", "blue.txt": "girl, safe\n"}


def test_logits_become_probabilities(tmp_path: Path) -> None:
    mapping = {"0": {"tag": "red_thing", "category": "General"}, "1": {"tag": "best", "category": "Quality"},
               "2": {"tag": "worst", "category": "Quality"}, "3": {"tag": "painter", "category": "Artist"}}  # fmt: skip
    (tmp_path / "tag_mapping.json").write_text(json.dumps(mapping))
    weights = np.zeros((3, 4), np.float32)
    weights[2] = [3, 1, -1, 3]
    write_tagger(tmp_path / "model.onnx", weights, [0, 0, 0, 0], colours_first=True)
    tagger = Tagger(find_tagger(str(tmp_path / "model.onnx"), tmp_path, anew=False))
    red = np.full((9, 9, 3), COLOURS["red"], np.uint8)
    expected = 1 / (1 + np.exp(-np.array([3, 1, -1, 3])))
    np.testing.assert_allclose(tagger([tagger.see(red)])[0], expected, rtol=1e-6)
    folder = write_images(tmp_path / "images", "red.png", "blue.png")
    assert tag(folder, tmp_path, "--use_quality_tags", "--artist_threshold", "0.97") == 0
    assert texts(folder) == {"red.txt": "best, red_thing\n", "blue.txt": "worst\n"}


@pytest.mark.parametrize("batch", ["N", 2])
def test_batches_change_nothing(tmp_path: Path, batch: int | str, capsys: pytest.CaptureFixture[str]) -> None:
    tagger = write_wd(tmp_path / "tagger", batch)
    names = [f"{colour}{n}.png" for n in range(2) for colour in COLOURS][:7]
    one, more = (write_images(tmp_path / name, *names) for name in ("one", "more"))
    assert tag(one, tagger, "--use_rating_tags") == 0
    assert tag(more, tagger, "--use_rating_tags", "--batch_size", "3", "--max_data_loader_n_workers", "2") == 0
    assert texts(one) == texts(more)
    assert texts(one)["blue0.txt"] == "explicit, blue_thing, ^_^\n"
    assert texts(one)["white0.txt"] == "explicit, red_thing, green_thing, blue_thing, ^_^\n"
    assert ("takes 2 images at once" in capsys.readouterr().err) == (batch == 2)


def test_what_is_there_stays_unless_told(tmp_path: Path, wd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_images(tmp_path, "red.png", "green.png")
    (folder / "red.txt").write_text("mine,  red thing\n")
    assert tag(folder, wd, "--frequency_tags") == 0
    assert texts(folder) == {"red.txt": "mine,  red thing\n", "green.txt": "green_thing, ^_^, hero_(great_series)\n"}
    assert "^_^: 1" in capsys.readouterr().out.splitlines()
    before = times(folder)
    assert tag(folder, wd) == 0
    assert tag(folder, wd, "--append_tags") == 0
    assert texts(folder)["red.txt"] == "mine, red thing, ^_^\n"
    assert times(folder)["green.txt"] == before["green.txt"]
    assert tag(folder, wd, "--overwrite", "--remove_underscore", "--caption_separator", "; ") == 0
    assert texts(folder) == {"red.txt": "red thing; ^_^\n", "green.txt": "green thing; ^_^; hero (great series)\n"}


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_one_file_holds_tags_and_sizes(tmp_path: Path, wd: Path, ending: str) -> None:
    folder = write_images(tmp_path / "images", "red.png", "sub/red.png", size=(50, 40))
    red, inner = str(folder / "red.png"), str(folder / "sub/red.png")
    output = tmp_path / f"out{ending}"

    def content() -> dict[str, dict[str, object]]:
        text = output.read_text(encoding="utf-8")
        if ending == ".json":
            return json.loads(text)  # type: ignore[no-any-return]
        return {entry.pop("image_path"): entry for entry in map(json.loads, text.splitlines())}

    if ending == ".json":
        output.write_text(json.dumps({red: {"caption": "kept"}, "other.png": {"tags": "x"}}))
    else:
        output.write_text("".join(json.dumps(entry) + "\n" for entry in [
            {"image_path": red, "caption": "kept"}, {"image_path": "other.png", "tags": "x"},
        ]))  # fmt: skip
    given = output.read_bytes()
    chosen = ("--recursive", "--output_path", str(output), "--thresh", "0.6")
    assert tag(folder, wd, *chosen) == 0
    made = {"tags": "red_thing, ^_^", "image_size": [50, 40]}
    assert content() == {red: {"caption": "kept", **made}, inner: made, "other.png": {"tags": "x"}}
    assert output.with_name(output.name + ".bak").read_bytes() == given
    assert not texts(folder)
    before = times(tmp_path)
    assert tag(folder, wd, *chosen) == 0
    assert tag(folder, wd, *chosen, "--append_tags") == 0
    assert times(tmp_path) == before
    output.write_text("[1]\n" if ending == ".json" else "{}\n")
    assert tag(folder, wd, *chosen) == 3


def test_unusual_names_and_broken_images(tmp_path: Path, wd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    longest = "red" + "é" * 124 + ".png"
    assert len(os.fsencode(longest)) == 255
    names = ["red 100% 'x'.PNG", "red\n.png", longest, "a/red.png", "b/red.png", "日本 red.png", "red.one.png"]
    folder = write_images(tmp_path, *names)
    (folder / "broken.png").write_bytes(b"no image")
    Image.new("RGB", (9, 9), "blue").save(folder / "red.one.jpg")
    left = temporary_name(folder / "red.one.txt")
    left.write_text("half")
    assert tag(folder, wd, "--recursive") == 3
    said = capsys.readouterr().err
    assert "broken.png: no image" in said
    assert "red.one.png: has the same text file as red.one.jpg" in said
    assert "7 of 9 images tagged; 1 left out" in said
    made = texts(folder)
    assert set(made) == {name[:-4] + ".txt" for name in names}
    assert made.pop("red.one.txt").startswith("blue_thing")
    assert set(made.values()) == {"red_thing, ^_^\n"}
    assert not left.exists()
    assert tag(folder, wd, "--recursive", "--caption_extension", "caption") == 3
    assert "would be too long" in capsys.readouterr().err
    assert len(texts(folder, ".caption")) == 6


def test_a_killed_command_leaves_nothing_broken(tmp_path: Path, wd: Path) -> None:
    folder = write_images(tmp_path / "images", *(f"red{number:03}.png" for number in range(200)))
    command = [sys.executable, "-m", "sd_train", "tag_images_by_wd14_tagger", str(folder), "--repo_id", str(wd)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as running:
        while running.poll() is None and not (folder / "red010.txt").exists():
            time.sleep(0.001)
        running.kill()
    assert running.returncode == -signal.SIGKILL
    assert len(texts(folder)) < 200
    assert set(texts(folder).values()) == {"red_thing, ^_^\n"}
    before = times(folder)
    assert main(command[3:]) == 0
    assert list(texts(folder).values()) == ["red_thing, ^_^\n"] * 200
    assert not list(folder.glob(".*"))
    assert times(folder)["red000.txt"] == before["red000.txt"]


LETTERS = [Label("a_tag", "general"), Label("b_tag", "general"), Label(">_o", "general"), Label("(o)_(o)", "general"),
           Label("hero_(x)_(great_series)", "character"), Label("safe", "rating")]  # fmt: skip
EVERY: dict[Category, float] = dict.fromkeys(CHOSEN, 0.5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "a_tag|b_tag|>_o|(o)_(o)|hero_(x)_(great_series)"),
        ({"remove_underscore": True}, "a tag|b tag|>_o|(o)_(o)|hero (x) (great series)"),
        ({"undesired": frozenset({"a tag", ">_o"})}, "b_tag|(o)_(o)|hero_(x)_(great_series)"),
        ({"first": ("hero (x) (great series)", "b_tag")}, "hero_(x)_(great_series)|b_tag|a_tag|>_o|(o)_(o)"),
        ({"replacement": {"a tag": "b_tag", ">_o": "wink, me"}}, "b_tag|wink, me|(o)_(o)|hero_(x)_(great_series)"),
        ({"expand_characters": True, "characters_first": True}, "hero_(x)|great_series|a_tag|b_tag|>_o|(o)_(o)"),
        ({"rating": "first", "characters_first": True}, "safe|hero_(x)_(great_series)|a_tag|b_tag|>_o|(o)_(o)"),
        ({"rating": "last"}, "a_tag|b_tag|>_o|(o)_(o)|hero_(x)_(great_series)|safe"),
        ({"thresholds": {**EVERY, "general": 0.8}}, "hero_(x)_(great_series)"),
    ],
)
def test_words_of_a_text(options: dict[str, object], expected: str) -> None:
    speller = Speller(LETTERS, TagOptions(**{"thresholds": EVERY, **options}))  # type: ignore[arg-type]
    assert "|".join(speller.choose(np.full(len(LETTERS), 0.5, np.float32)).tags) == expected


def test_replacements_are_read() -> None:
    problems = Problems()
    assert read_replacement(r"a,b; c\,d ,e\;f;", problems) == {"a": "b", "c,d": "e;f"}
    assert not problems.found
    assert read_replacement("a;b,c,d", problems) == {}
    assert len(problems.found) == 2


def test_squares() -> None:
    picture = np.zeros((10, 40, 3), np.uint8)
    white, own = fit_square(picture, 20, "white"), fit_square(picture, 20, "repeated")
    assert white.shape == own.shape == (20, 20, 3)
    assert [int(row.mean()) for row in white] == [255] * 7 + [0] * 5 + [255] * 8
    assert not own.any()
    assert fit_square(np.zeros((1, 4000, 3), np.uint8), 20, "white").shape == (20, 20, 3)


def test_problems_are_told_at_once(tmp_path: Path, wd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = "--thresh 2 --batch_size 0 --tag_replacement a --output_path x.csv --overwrite --append_tags".split()
    assert tag(tmp_path / "none", wd, *wrong) == 2
    assert capsys.readouterr().err.startswith("error: 6 problems:")
    wrong = "--top_p 0 --num_beams 0 --max_length 4 --min_length 5 --max_data_loader_n_workers -1".split()
    assert main(["make_captions", str(tmp_path), *wrong]) == 2
    assert capsys.readouterr().err.startswith("error: 4 problems:")


@pytest.mark.parametrize("defect", ["none", "no_list", "no_model", "other_list", "bad_model", "bad_list", "hub"])
def test_taggers_that_cannot_be_used(
    tmp_path: Path, defect: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tagger, folder = write_wd(tmp_path / "tagger"), write_images(tmp_path / "images", "red.png")
    source = str(tagger)
    match defect:
        case "no_list":
            (tagger / "selected_tags.csv").unlink()
        case "no_model":
            (tagger / "model.onnx").unlink()
        case "other_list":
            (tagger / "selected_tags.csv").write_text("tag_id,name,category\n1,one,0\n")
        case "bad_model":
            (tagger / "model.onnx").write_bytes(b"x" * 100)
        case "bad_list":
            (tagger / "selected_tags.csv").write_text("a,b\n")
        case "hub":
            source = "SmilingWolf/there-is-no-such-tagger"
    code = main(["tag_images_by_wd14_tagger", str(folder), "--repo_id", source, "--model_dir", str(tmp_path)])
    said = capsys.readouterr().err
    assert code == (0 if defect == "none" else 3), said
    expected = {"no_list": "holds no list", "no_model": "holds no ONNX model", "other_list": "has 7 outputs",
                "bad_model": "cannot be loaded", "bad_list": "no columns", "hub": "hub's cache"}  # fmt: skip
    assert expected.get(defect, "1 of 1 images tagged") in said


def test_a_tagger_is_found_where_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In --model_dir as sd-scripts keeps it, and in a folder of a repository in the hub's cache."""
    kept = write_wd(tmp_path / "wd14_tagger_model" / "Someone_tagger")
    assert find_tagger("Someone/tagger", kept.parent, anew=False).model == kept / "model.onnx"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    repository = tmp_path / "cache" / "models--Someone--other"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    inner = write_wd(repository / "snapshots" / ("0" * 40) / "version_1")
    assert find_tagger("Someone/other/version_1", kept.parent, anew=False).tags == inner / "selected_tags.csv"


def test_models_come_from_the_hub_once(tmp_path: Path, wd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what a tagger consists of, and anew only if told."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no login"))
    folder = write_images(tmp_path / "images", "red.png")
    with hub_server(monkeypatch) as hub:
        files = {path.name: path.read_bytes() for path in wd.iterdir()}
        hub.repos = {"Someone/tagger": {**files, "saved_model.pb": b"x", "old/model.onnx": b"x"}, "Someone/lora": {}}
        found = find_tagger("Someone/tagger", tmp_path, anew=False)
        assert {path.name: path.read_bytes() for path in found.model.parent.rglob("*") if path.is_file()} == files
        assert tag(folder, Path("Someone/tagger"), "--model_dir", str(tmp_path)) == 0
        found.tags.write_bytes(b"broken")
        assert find_tagger("Someone/tagger", tmp_path, anew=False).tags.read_bytes() == b"broken"
        assert find_tagger("Someone/tagger", tmp_path, anew=True).tags.read_bytes() == files["selected_tags.csv"]
        with pytest.raises(ModelError, match="holds no tagger in ONNX"):
            find_tagger("Someone/lora", tmp_path, anew=False)
        with pytest.raises(ModelError, match="holds no captioning model of transformers"):
            find_captioner("Someone/lora")


def test_images_are_opened_in_order_and_errors_are_not_swallowed(tmp_path: Path) -> None:
    from sd_train.data.images import decode

    folder = write_images(tmp_path, *(f"red{number:02}.png" for number in range(7)))
    images = sorted(folder.iterdir())
    images[2].write_bytes(b"")
    troubles = Troubles()
    batches = [[place for place, _ in batch] for batch in opened_ahead(images, decode, 3, 2, troubles)]
    assert batches == [[0, 1, 3], [4, 5, 6]]
    assert troubles.names == [images[2]]
    with pytest.raises(ZeroDivisionError):
        list(opened_ahead(images, lambda path: 1 / 0, 3, 2, troubles))


@pytest.mark.parametrize("name", ["make_captions", "tag_images_by_wd14_tagger"])
def test_scripts_are_the_commands(name: str) -> None:
    command = [sys.executable, str(ROOT / "finetune" / f"{name}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: sd-train {name}")
