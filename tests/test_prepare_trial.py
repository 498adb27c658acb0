"""Captions and tags as users come with them: odd calls, files of other programs, and what was killed on its way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sd_train.prepare.caption_models import DEFAULT_CAPTIONER
from sd_train.prepare.entries import match_entries
from sd_train.prepare.metadata import read_metadata
from sd_train.prepare.tag_words import CHOSEN, Category
from tests.test_prepare_captions import caption, noise, write_blip
from tests.test_prepare_metadata import put, run
from tests.test_prepare_tags import ROOT, tag, texts, times, write_images, write_tagger, write_wd

HELD: tuple[tuple[str, int, float], ...] = (
    ("general", 9, 0.2), ("sensitive", 9, 0.7), ("1girl", 0, 0.9), ("long_hair", 0, 0.35), ("o_o", 0, 0.3499),
    ("hero_(a)_(b_c)", 4, 0.8), ("foo_(b_c)", 4, 0.5), ("copy_z", 3, 0.4), ("artist_y", 1, 0.5), ("meta_x", 5, 0.6),
    ("later", 7, 0.9),
)  # fmt: skip
"""(tag, number of its category in selected_tags.csv, probability) of a tagger that says the same of each image."""


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held")
    write_tagger(folder / "model.onnx", np.zeros((3, len(HELD)), np.float32), [each[2] for each in HELD])
    rows = [f"{number},{name},{category}\n" for number, (name, category, _) in enumerate(HELD)]
    (folder / "selected_tags.csv").write_text("tag_id,name,category\n" + "".join(rows))
    return folder


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], "1girl, long_hair, later, hero_(a)_(b_c), foo_(b_c), copy_z, artist_y, meta_x"),
        (["--thresh", "0.5"], "1girl, later, hero_(a)_(b_c), foo_(b_c), artist_y, meta_x"),
        (["--thresh", "0.7", "--general_threshold", "0.2"], "1girl, long_hair, o_o, later, hero_(a)_(b_c)"),
        (["--thresh=.85", "--character_threshold=.6", "--meta_threshold=.6"], "1girl, later, hero_(a)_(b_c), meta_x"),
        (["--thresh=1", "--copyright_threshold=.4", "--meta_threshold=0"], "copy_z, meta_x"),
        (["--thresh=.8", "--use_rating_tags", "--character_tags_first"], "sensitive, hero_(a)_(b_c), 1girl, later"),
        (["--thresh=.9", "--use_rating_tags_as_last_tag", "--undesired_tags=later"], "1girl, sensitive"),
        (["--thresh=.8", "--character_tag_expand", "--remove_underscore"], "1girl, later, hero (a), b_c"),
        (["--thresh=.9", "--tag_replacement", r"1girl,1\,boy;later,"], "1,boy"),
    ],
)
def test_thresholds_and_categories(tmp_path: Path, held: Path, options: list[str], expected: str) -> None:
    folder = write_images(tmp_path, "red.png")
    assert tag(folder, held, *options) == 0
    assert texts(folder) == {"red.txt": expected + "\n"}


def test_every_category_has_its_threshold(tmp_path: Path, held: Path) -> None:
    folder = write_images(tmp_path, "red.png")
    numbers: dict[Category, set[int]] = {"general": {0, 7}, "character": {4}, "copyright": {3}, "artist": {1},
                                         "meta": {5}, "model": set()}  # fmt: skip
    for category in CHOSEN:
        assert tag(folder, held, "--thresh", "1", f"--{category}_threshold", "0", "--overwrite") == 0
        expected = [name for name, number, _ in HELD if number in numbers[category]]
        assert texts(folder)["red.txt"] == ", ".join(expected) + "\n"


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
def test_killed_captioning_goes_on(tmp_path: Path) -> None:
    blip, folder, whole = write_blip(tmp_path / "blip"), noise(tmp_path / "images", 40), noise(tmp_path / "whole", 40)
    command = [sys.executable, "-m", "sd_train", "make_captions", str(folder), "--caption_weights", str(blip),
               "--max_length", "10", "--device", "cpu"]  # fmt: skip
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as running:
        while running.poll() is None and len(list(folder.glob("*.caption"))) < 5:
            time.sleep(0.001)
        running.kill()
    assert running.returncode == -signal.SIGKILL
    made, before = texts(folder, ".caption"), times(folder)
    assert 5 <= len(made) < 40
    assert caption(folder, blip) == 0
    assert caption(whole, blip, "--batch_size", "8") == 0
    assert texts(folder, ".caption") == texts(whole, ".caption")
    assert {name: when for name, when in times(folder).items() if name in before and "tmp" not in name} == {
        name: when for name, when in before.items() if "tmp" not in name
    }
    assert not list(folder.glob(".*"))


def test_captions_are_no_longer_than_the_model_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blip, folder = write_blip(tmp_path / "blip"), noise(tmp_path / "images", 1)
    # 64 places, five of which "a picture of" takes.
    assert caption(folder, blip, "--max_length", "60") == 3
    assert "write --max_length 59 or less" in capsys.readouterr().err
    assert caption(folder, blip, "--max_length", "59", "--min_length", "59") == 0
    assert len(texts(folder, ".caption")["0.caption"].split()) > 30


def test_captioning_options_without_effect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = put(tmp_path / "a.png", "there", ".caption").parent
    assert run("make_captions", folder, "--num_beams", 4, "--max_length", 3) == 0
    said = capsys.readouterr().err
    assert "--num_beams has no effect without --beam_search" in said
    assert "1 image has a .caption file already" in said
    assert run("make_captions", folder, "--min_length", 4, "--max_length", 3) == 2
    assert "--min_length = 4: must be 0 to --max_length, which is 3" in capsys.readouterr().err
    assert run("make_captions", folder, "--prompt", "caf\udce9", "--caption_weights", DEFAULT_CAPTIONER) == 2
    assert "--prompt = 'caf\\udce9': is not UTF-8" in capsys.readouterr().err


def test_where_tags_cannot_be_written(tmp_path: Path, held: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_images(tmp_path / "images", "red.png")
    (tmp_path / "file").touch()
    (tmp_path / "folder.json").mkdir()
    assert tag(folder, held, "--output_path", str(tmp_path / "folder.json"), "--tag_replacement", "a,\udce9") == 2
    said = capsys.readouterr().err
    assert "is a folder" in said
    assert "is not UTF-8" in said
    # Told before any image is looked at.
    assert tag(folder, held, "--output_path", str(tmp_path / "file" / "tags.json")) == 4
    said = capsys.readouterr().err
    assert "choose another --output_path" in said
    assert "tagging" not in said
    (folder / "red.txt").mkdir()
    assert tag(folder, held, "--overwrite") == 4
    assert "choose another --caption_extension" in capsys.readouterr().err


def test_folders_are_named_alike_however_they_are_written(
    tmp_path: Path, held: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_images(tmp_path / "images", "red.png", "sub/red.png")
    (images / "red.caption").write_text("a red dog")
    (tmp_path / "programs" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "programs" / "inner")
    monkeypatch.chdir(tmp_path / "programs")
    lines, meta = tmp_path / "tags.jsonl", tmp_path / "meta.json"
    assert tag(Path("../images"), held, "--output_path", str(lines), "--recursive", "--thresh", "0.85") == 0
    tags = {"tags": "1girl, later", "image_size": [40, 40]}
    expected = {str(images / "red.png"): {**tags, "caption": "a red dog"}, str(images / "sub/red.png"): tags}
    assert [json.loads(line)["image_path"] for line in lines.read_text().splitlines()] == list(expected)
    # What the tagger wrote line by line is added to ...
    assert run("merge_captions_to_metadata", images, meta, "--in_json", lines, "--full_path") == 0
    assert json.loads(meta.read_text()) == expected
    assert run("merge_captions_to_metadata", "../images", meta, "--full_path") == 0
    assert "nothing has changed" in capsys.readouterr().out
    # ... behind a link, where .. leads elsewhere, ...
    assert run("merge_captions_to_metadata", tmp_path / "link" / ".." / ".." / "images", meta, "--full_path") == 0
    assert "nothing has changed" in capsys.readouterr().out
    # ... and cleaned, but not written into a file of lines.
    assert run("clean_captions_and_tags", lines, tmp_path / "clean.json") == 0
    assert set(json.loads((tmp_path / "clean.json").read_text())) == set(expected)
    assert run("clean_captions_and_tags", meta, tmp_path / "clean.jsonl") == 2
    assert "end its name in .json" in capsys.readouterr().err
    for words in (["prepare_buckets_latents", images, lines, lines, "model"],
                  ["filter_images", images, "--in_json", lines, "--out_json", lines]):  # fmt: skip
        assert run(*words) == 2
        assert "end its name in .json" in capsys.readouterr().err
    lines.write_text('{"image_path": "a.png"}\n{"tags": "x"}\n')
    assert run("merge_captions_to_metadata", images, meta, "--in_json", lines) == 3
    assert "tags.jsonl:2: is no object with an image_path" in capsys.readouterr().err


@pytest.mark.parametrize("full", [False, True])
def test_names_of_both_kinds_become_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: bool) -> None:
    images, meta = tmp_path / "images", tmp_path / "meta.json"
    for name in "abc":
        put(images / f"{name}.png", f"tag {name}")
    put(images / "images" / "c.png")
    entries = {"a.png": {"caption": "within", "x": 1}, str(images / "a.png"): {"caption": "absolute", "y": 2},
               str(images / "b.png"): {"caption": "b"}, "other.png": {"caption": "other"}}  # fmt: skip
    meta.write_text(json.dumps(entries))
    option = ["--full_path"] if full else []
    assert run("merge_dd_tags_to_metadata", images, meta, *option) == 0

    def name(image: str) -> str:
        return str(images / image) if full else image

    expected = {
        name("a.png"): {"caption": "absolute" if full else "within", "x": 1, "y": 2, "tags": "tag a"},
        name("b.png"): {"caption": "b", "tags": "tag b"}, name("c.png"): {"tags": "tag c"},
        "other.png": {"caption": "other"},
    }  # fmt: skip
    assert json.loads(meta.read_text()) == expected
    # sd-scripts' --full_path of a relative folder; of images/c.png there is an image within, too.
    monkeypatch.chdir(tmp_path)
    meta.write_text('{"images/b.png": {"x": 1}, "images/c.png": {"x": 2}}')
    assert match_entries([Path("images/b.png"), Path("images/c.png")], Path("images"), {"images/b.png", "images/c.png"}
                         ).keys == {Path("images/b.png"): "images/b.png"}  # fmt: skip
    assert run("merge_dd_tags_to_metadata", "images", meta, *option) == 0
    found = json.loads(meta.read_text())
    assert found[name("b.png")] == {"x": 1, "tags": "tag b"}
    assert found[name("c.png")] == {"tags": "tag c"}
    assert found["images/c.png"] == {"x": 2}


@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_tags_go_where_an_image_stands_already(tmp_path: Path, held: Path, ending: str) -> None:
    """Metadata name images within the folder: they are not to be in it twice."""
    images, meta = write_images(tmp_path / "images", "red.png", "sub/red.png", "green.png"), tmp_path / f"meta{ending}"
    old = {"red.png": {"caption": "a"}, "sub/red.png": {"caption": "b", "tags": "mine"}}
    lines = "".join(json.dumps({"image_path": key, **entry}) + "\n" for key, entry in old.items())
    meta.write_text(json.dumps(old) if ending == ".json" else lines)
    assert tag(images, held, "--recursive", "--thresh", "0.85", "--output_path", str(meta)) == 0
    tags = {"tags": "1girl, later", "image_size": [40, 40]}
    expected = {str(images / "green.png"): tags, "red.png": {"caption": "a", **tags}, "sub/red.png": old["sub/red.png"]}
    assert read_metadata(meta) == expected


def test_names_without_extension(tmp_path: Path) -> None:
    """As sd-scripts writes them; of photo.png and photo.png.jpg the first is the name of an image."""
    images, meta = tmp_path / "images", tmp_path / "meta.json"
    for name in ("a.jpg", "a.png", "b.png", "photo.png", "photo.png.jpg"):
        put(images / name)
    (images / "a.txt").write_text("new")
    old = {"a": {"caption": "a"}, "b": {"x": 1, "y": 1}, "b.png": {"y": 2}, "photo.png": {"z": 3}}
    meta.write_text(json.dumps(old))
    assert run("merge_dd_tags_to_metadata", images, meta) == 0
    both = {"caption": "a", "tags": "new"}
    expected = {"a.jpg": both, "a.png": both, "b.png": {"x": 1, "y": 2}, "photo.png": {"z": 3}}
    assert json.loads(meta.read_text()) == expected
    photos = [images / "photo.png", images / "photo.png.jpg"]
    assert match_entries(photos, images, {"photo.png"}).keys == {photos[0]: "photo.png"}


def test_captions_of_other_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = {"crlf": b"a dog\r\non a bed\r\n", "mark": b"\xef\xbb\xbfa cat", "latin": b"caf\xe9", "empty": b"",
             "utf16": "a".encode("utf-16")}  # fmt: skip
    for name, content in kinds.items():
        put(tmp_path / f"{name}.png").with_suffix(".txt").write_bytes(content)
    meta = tmp_path / "meta.json"
    assert run("merge_captions_to_metadata", tmp_path, meta, "--caption_extension", "txt") == 3
    expected = {"crlf.png": {"caption": "a dog\non a bed"}, "empty.png": {"caption": ""}}
    assert json.loads(meta.read_text()) == expected | {"mark.png": {"caption": "a cat"}}
    said = capsys.readouterr().err
    assert "latin.txt: byte 3 is not UTF-8" in said
    assert "utf16.txt: byte 0 is not UTF-8" in said
    assert run("caption", "edit", tmp_path, "--append", "sls", "--apply") == 3
    assert {name: (tmp_path / f"{name}.txt").read_bytes() for name in kinds} == {
        "crlf": b"a dog, sls\r\non a bed, sls\r\n", "mark": b"\xef\xbb\xbfa cat, sls", "latin": kinds["latin"],
        "empty": b"sls", "utf16": kinds["utf16"],
    }  # fmt: skip
    capsys.readouterr()
    assert run("caption", "stats", tmp_path, "--format", "json") == 3
    # In each of two lines once is not twice.
    assert json.loads(capsys.readouterr().out)["repeated"] == 0
    assert run("caption", "edit", tmp_path, "--undo") == 0
    assert {name: (tmp_path / f"{name}.txt").read_bytes() for name in kinds} == kinds
    assert run("caption", "edit", tmp_path, "--replace", "a", "\udce9", "--apply") == 2
    assert "--replace = '\\udce9': is not UTF-8" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path / ".caption_edits")) == ["0001.undone.json"]


def test_texts_that_metadata_lacks_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meta = tmp_path / "meta.json"
    meta.write_text('{"a.png": {"tags": "x"}, "b.png": {"caption": "y"}, "c.png": {"tags": null}}')
    assert run("caption", "stats", meta) == 0
    assert "1 caption, 0 empty, 2 images without;" in capsys.readouterr().out
    assert run("caption", "edit", meta, "--append", "z") == 0
    assert "2 images without tags, left alone (--field chooses): b.png, c.png" in capsys.readouterr().err
    assert run("caption", "stats", meta, "--output", meta / "stats.txt") == 4
    assert "choose another --output" in capsys.readouterr().err


def test_options_that_mean_nothing_for_a_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    put(Path("images/a.png"), "b|a, c")
    Path("m.json").write_text("{}")
    Path("d.toml").write_text("[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'images'\ncaption_extension = '.txt'\n")
    for target, option in (
        ("images", "--field=tags"), ("m.json", "--recursive"), ("m.json", "--caption_extension=.txt"),
        ("d.toml", "--caption_extension=.caption"), ("d.toml", "--recursive"),
    ):  # fmt: skip
        assert run("caption", "edit", target, "--sort", option) == 2
        assert f"{option.partition('=')[0]}: means nothing for" in capsys.readouterr().err
        assert run("caption", "stats", target, option) == 2
    # A separator that is given counts more than the dataset file's.
    assert run("caption", "edit", "d.toml", "--sort", "--caption_separator", "|", "--apply") == 0
    assert Path("images/a.txt").read_text() == "a, c| b"
    assert run("caption", "edit", "images", "--remove", "-_-") == 2
    assert "--option=VALUE" in capsys.readouterr().err


def test_an_edit_stands_until_it_can_be_taken_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An entry that was merged into the metadata meanwhile does not cost the way back."""
    put(tmp_path / "a.png", "x, y")
    meta = tmp_path / "meta.json"
    assert run("merge_dd_tags_to_metadata", tmp_path, meta) == 0
    before = meta.read_bytes()
    assert run("caption", "edit", meta, "--remove", "x", "--apply") == 0
    edited = meta.read_bytes()
    meta.write_text('{"b.png": {}}')
    capsys.readouterr()
    assert run("caption", "edit", meta, "--undo") == 3
    said = capsys.readouterr().err
    assert "meta.json: was changed meanwhile" in said
    assert "0001.json, and it stands" in said
    meta.unlink()
    assert run("caption", "edit", tmp_path, "--undo") == 0
    meta.write_bytes(edited)
    assert run("caption", "edit", meta, "--undo") == 0
    assert meta.read_bytes() == before
    # Of several files those that can be taken back are; the others are named, and what they were is said to be where.
    put(tmp_path / "b.png", "x")
    assert run("caption", "edit", tmp_path, "--append", "new", "--apply") == 0
    (tmp_path / "b.txt").unlink()
    capsys.readouterr()
    assert run("caption", "edit", tmp_path, "--undo") == 3
    said = capsys.readouterr().err
    assert "b.txt: is gone" in said
    assert "0002.undone.json" in said
    assert (tmp_path / "a.txt").read_text() == "x, y"


@pytest.mark.parametrize("files", ['[["a.txt", "x"]]', '[["a.txt", "x", "\\udce9"]]', '{"a.txt": ["x", "y"]}', "[3]"])
def test_damaged_edits_are_named(tmp_path: Path, files: str, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "a.png", "y")
    (tmp_path / ".caption_edits").mkdir()
    (tmp_path / ".caption_edits" / "0001.json").write_text(f'{{"target": ".", "files": {files}}}')
    assert run("caption", "edit", tmp_path, "--undo") == 3
    assert "0001.json: is no edit of captions; move it away" in capsys.readouterr().err
    assert (tmp_path / "a.txt").read_text() == "y"


def test_tags_of_a_killed_command_in_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was saved on the way is not done again, and the file is whole."""
    folder = write_images(tmp_path / "images", *(f"red{number}.png" for number in range(6)))
    output, wd = tmp_path / "tags.jsonl", write_wd(tmp_path / "wd")
    assert tag(folder, wd, "--output_path", str(output)) == 0
    whole = output.read_text()
    output.write_text("".join(whole.splitlines(keepends=True)[:2]))
    left = tmp_path / f".tags.jsonl.{2**22}-000000.tmp"
    left.write_text("half")
    os.utime(left, (0, 0))
    (folder / "red0.png").write_bytes(b"broken, and not looked at again")
    assert tag(folder, wd, "--output_path", str(output)) == 0
    assert output.read_text() == whole
    assert not left.exists()
