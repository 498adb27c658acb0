"""Captions and tags: into metadata, cleaned by rules, edited with undo, counted."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sd_train.__main__ import main
from sd_train.data.index import IndexOptions, build_indexes
from sd_train.data.settings import DatasetConfig, SubsetConfig
from sd_train.errors import DiskError
from sd_train.prepare import patterns
from sd_train.prepare.cleaning import as_toml, clean_text, load_rules
from sd_train.prepare.cleaning_rules import ANIME
from sd_train.prepare.metadata import read_bytes

ROOT = Path(__file__).resolve().parent.parent
LONGEST = "猫" * 83 + "ab"
"""With .txt or .png 255 bytes."""
NAMES = ["a b.PNG", "100%s {x}.jpg", "naïve 猫.webp", f"{LONGEST}.png", "sub/a b.PNG", "sub/deep/a b.PNG", "-x.png"]


def put(path: Path, text: str | None = None, extension: str = ".txt") -> Path:
    """An image at `path`, with a text file beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64)).save(path)
    if text is not None:
        path.with_suffix(extension).write_bytes(text.encode())
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images with unusual names; all have tags, all but the one whose name has no room for it a caption."""
    images = tmp_path / "images"
    for number, name in enumerate(NAMES):
        path = put(images / name, f"1girl, tag_{number}\n")
        if len(os.fsencode(path.stem)) < 200:
            path.with_suffix(".caption").write_text(f"a woman with {number}\n\nsecond line\n", encoding="utf-8")
    return images


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own as the current one, where regular expressions have little time."""
    monkeypatch.setattr(patterns, "SECONDS", 0.1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: object) -> int:
    return main([str(word) for word in words])


def files(folder: Path) -> dict[str, bytes]:
    """Everything in `folder` but the journal, by path."""
    found = (path for path in folder.rglob("*") if path.is_file() and ".caption_edits" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.mark.parametrize("full", [False, True])
def test_merged_metadata_is_what_training_reads(folder: Path, tmp_path: Path, full: bool) -> None:
    words = [folder, "--recursive", *(["--full_path"] if full else [])]
    before, meta, both = files(folder), tmp_path / "m.json", tmp_path / "all.json"
    assert run("merge_captions_to_metadata", meta, *words[1:]) == 2
    assert run("merge_captions_to_metadata", words[0], meta, *words[1:]) == 0
    assert run("merge_dd_tags_to_metadata", words[0], meta, *words[1:]) == 0
    assert run("merge_all_to_metadata", words[0], both, *words[1:]) == 0
    merged = json.loads(meta.read_text(encoding="utf-8"))
    assert merged == json.loads(both.read_text(encoding="utf-8"))
    assert set(merged) == {str(folder / name) if full else name for name in NAMES}
    entry = merged[str(folder / "sub/a b.PNG") if full else "sub/a b.PNG"]
    assert entry == {"caption": "a woman with 4\n\nsecond line", "tags": "1girl, tag_4"}

    subset = SubsetConfig(image_dir=Path() if full else folder, metadata_file=meta, caption_separator=", ")
    dataset = DatasetConfig(1, (64, 64), style="fine_tuning", subsets=(subset,))
    index = build_indexes([dataset], IndexOptions()).training[0]
    read = {index.path(row): index.captions[row] for row in range(len(index))}
    assert read == {
        folder / name: f"1girl, tag_{number}" if LONGEST in name else f"a woman with {number}, 1girl, tag_{number}"
        for number, name in enumerate(NAMES)
    }

    state = both.read_bytes(), both.stat().st_mtime_ns
    assert run("merge_all_to_metadata", words[0], both, *words[1:]) == 0
    assert (both.read_bytes(), both.stat().st_mtime_ns) == state
    fresh = tmp_path / "fresh" / "all.json"
    assert run("merge_all_to_metadata", words[0], fresh, *words[1:]) == 0
    assert fresh.read_bytes() == state[0]
    assert files(folder) == before
    assert sorted(path.name for path in fresh.parent.iterdir()) == ["all.json"]


def test_what_cannot_be_backed_up_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=r"is there and cannot be read .* no backup"):
        read_bytes(tmp_path)


def test_what_is_there_is_added_to_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, meta = tmp_path / "images", tmp_path / "m.json"
    put(images / "a.png", "red", ".caption")
    put(images / "b.png")
    put(images / "c.png", "", ".caption")
    (images / "d.caption").write_bytes(b"caf\xe9")
    put(images / "d.png")
    old = {"b.png": {"caption": "kept", "score": 1}, "a": {"tags": "x"}, "elsewhere.png": {"image_size": [1, 2]}}
    meta.write_text(json.dumps(old))
    before = meta.read_bytes()
    assert run("merge_captions_to_metadata", images, meta, "--debug") == 3
    assert json.loads(meta.read_text()) == {
        "b.png": old["b.png"], "elsewhere.png": old["elsewhere.png"], "a.png": {"tags": "x", "caption": "red"},
        "c.png": {"caption": ""},
    }  # fmt: skip
    assert (tmp_path / "m.json.bak").read_bytes() == before
    said = capsys.readouterr()
    assert "a.png: caption: red" in said.out
    assert "completed: a" in said.out
    assert "1 image without a .caption file, whose metadata stays as it was: b.png" in said.err
    assert "d.caption: byte 3 is not UTF-8" in said.err


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        ("nowhere m.json", 2, "nowhere: does not exist"),
        ("images images", 2, "is a folder"),
        ("images m.jsonl", 2, "end its name in .json"),
        ("images m.json --in_json none.json", 3, "--in_json = none.json: there is no such file"),
        ("images list.json", 3, "is no metadata"),
        ("images a.txt", 3, "is no JSON"),
        ("images named.json --full_path", 2, "names 1 image otherwise (a.png)"),
        ("images m.json --caption_extension .tags", 3, "no image has a .tags file"),
        ("images m.json --recursiv", 2, "--recursiv"),
        ("empty m.json", 3, "holds no images"),
    ],
)
def test_merging_refuses(
    at: Path, capsys: pytest.CaptureFixture[str], words: str, code: int, expected: str
) -> None:
    put(Path("images/a.png"), "red", ".caption")
    Path("empty").mkdir()
    Path("list.json").write_text("[]")
    Path("a.txt").write_text("red")
    Path("named.json").write_text('{"a.png": {}}')
    before = files(at)
    assert run("merge_captions_to_metadata", *words.split()) == code
    assert expected in capsys.readouterr().err
    assert files(at) == before


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("caption", "a young woman and a Cartoon Lady", "a girl and a girl"),
        ("caption", "an anime cartoon image of two women", "an image of two girls"),
        ("caption", "anime anime anime person", "girl"),
        ("caption", "a superwoman, womanly", "a superwoman, womanly"),
        ("caption", "people\na person", "girls\na girl"),
        ("tags", "long_hair, ^_^, >_<, rating:safe, sky", "long hair, ^_^, >_<, sky"),
        ("tags", "shirt, white shirt, t-shirt", "white shirt, t-shirt"),
        ("tags", "hair ornament, red hair ornament", "red hair ornament"),
        ("tags", "girl, red hair, grey hair, red eyes, blue eyes", "girl, red hair, grey hair, red eyes, blue eyes"),
        ("tags", "2girls, blonde hair, red hair, blue eyes, green eyes", "2girls"),
        ("tags", "2girls, long hair, blonde hair, blue eyes", "2girls, long hair, blonde hair, blue eyes"),
        ("tags", "multiple_boys, long_hair, short_hair, red_hair", "multiple boys, red hair"),
        ("tags", "2girls, ponytail, twintails, sleeveless, long sleeves", "2girls"),
        ("tags", "sky,,sky , tree", "sky, tree"),
        ("tags", "", ""),
    ],
)  # fmt: skip
def test_built_in_rules(name: str, text: str, expected: str) -> None:
    rules = load_rules(None)
    assert clean_text(name, text, rules) == expected
    assert clean_text(name, expected, rules) == expected


def test_built_in_rules_settle_whatever_they_meet(tmp_path: Path) -> None:
    printed = tmp_path / "rules.toml"
    printed.write_text(as_toml("anime"), encoding="utf-8")
    rules, same = load_rules(None), load_rules(printed)
    words = [word for pair in ANIME["captions"]["replace"] for side in pair for word in side.split()]
    tags = "2girls 1girl long_hair short_hair red_hair hair shirt white_shirt blue_eyes red_eyes ^_^ rating:x".split()
    rng = random.Random(9)
    for _ in range(300):
        caption = " ".join(rng.choices(words, k=8))
        tagged = ", ".join(rng.choices(tags, k=7))
        for name, text in (("caption", caption), ("tags", tagged)):
            clean = clean_text(name, text, rules)
            assert clean_text(name, clean, rules) == clean == clean_text(name, text, same)


def test_cleaning_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meta, out, rules = tmp_path / "m.json", tmp_path / "out.json", tmp_path / "rules.toml"
    content = {"a": {"caption": "a woman", "tags": "x_y, bad", "image_size": [1, 2]}, "b": {}, "c": {"tags": 3}}
    meta.write_text(json.dumps(content))
    own = '[tags]\nremove = ["b.d"]\nunderscores = false\n[captions]\nreplace = [["woman", "lady in \\\\1"]]\n'
    rules.write_text(own)
    assert run("clean_captions_and_tags", meta, out, "--rules", rules, "--debug") == 3
    # The file's own rules come first, those built in after.
    clean = {"caption": "a girl in \\1", "tags": "x_y", "image_size": [1, 2]}
    assert json.loads(out.read_text()) == {**content, "a": clean}
    assert json.loads(meta.read_text()) == content
    said = capsys.readouterr()
    assert "- a woman" in said.out
    assert "1 image without caption and tags: b" in said.err
    assert "c: tags: no text" in said.err
    state = out.read_bytes(), out.stat().st_mtime_ns
    # As sd-scripts was called once: with the folder in front. Over its own result nothing changes.
    assert run("clean_captions_and_tags", tmp_path, out, out, "--rules", rules) == 3
    assert (out.read_bytes(), out.stat().st_mtime_ns) == state
    rules.write_text('base = "none"\n' + own)
    assert run("clean_captions_and_tags", meta, out, "--rules", rules) == 3
    assert json.loads(out.read_text())["a"]["caption"] == "a lady in \\1"
    capsys.readouterr()
    assert run("clean_captions_and_tags", "--print_rules") == 0
    assert capsys.readouterr().out == as_toml("anime") + "\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('base = "manga"\nextra = 1\n[tags]\nkeep = 3\nhair = []\nunderscores = "yes"\n[captions]\nreplace = [["a"]]',
         ["base = 'manga'", "rules.toml:2: extra", "tags.keep", "tags.hair", "tags.underscores", "captions.replace"]),
        ('[tags]\nremove = ["("]\n[captions]\nreplace = [["cat", "black cat"]]',
         ["rules.toml:2: tags.remove", "would find its own result again"]),
        ('[captions]\nreplace = [["dog", "cat x"], ["cat", "dog"]]', ["never come to an end"]),
        ('[captions]\nreplace = [["dog", "cat cat"], ["cat", "dog dog dog"]]', ["never come to an end"]),
        ('[tags]\nremove = ["(a+)+b"]', ["a regular expression takes more than"]),
        ("tags = 3", ["is no table"]),
        ("[tags", ["not valid TOML"]),
    ],
)  # fmt: skip
def test_wrong_rules(at: Path, capsys: pytest.CaptureFixture[str], text: str, expected: list[str]) -> None:
    meta, rules = at / "m.json", at / "rules.toml"
    meta.write_text(json.dumps({"x": {"caption": "a dog", "tags": "a" * 40}}))
    rules.write_text(text)
    assert run("clean_captions_and_tags", meta, at / "out.json", "--rules", rules) == 2
    said = capsys.readouterr().err
    assert all(part in said for part in expected), said
    assert not (at / "out.json").exists()


@pytest.mark.parametrize(
    ("steps", "text", "expected"),
    [
        (["--replace", "red", "blue"], "red,  redder", "blue,  blueder"),
        (["--replace", ".", r"\1"], "a.b", r"a\1b"),
        (["--regex", r"(\w+) cat", r"cat of \1"], "red cat,x", "cat of red,x"),
        (["--regex", "^", "photo of "], "a cat\r\n\r\ntwo\n", "photo of a cat\r\n\r\nphoto of two\n"),
        (["--replace_tag", "*_hair", "hair, long"], "x, red_hair, hair_x", "x, hair, long, hair_x"),
        (["--remove", "a, c*"], "a,b,cat,bc", "b, bc"),
        (["--remove", "A", "--ignore_case"], "a, b", "b"),
        (["--remove", "(x)"], "(x), x", "x"),
        (["--remove_regex", r"\d.*"], "1girl, x1", "x1"),
        (["--prepend", "new"], "a, b", "new, a, b"),
        (["--prepend", "b, a"], "a, b", "b, a"),
        (["--append", "new"], "new, a", "a, new"),
        (["--append", "new"], "", "new"),
        (["--dedupe"], "a, b,a,, b", "a, b"),
        (["--dedupe"], "a,b", "a,b"),
        (["--sort"], "b, A, a", "A, a, b"),
        (["--sort", "--keep_tokens", "1"], "z, b, a", "z, a, b"),
        (["--prepend", "b", "--replace", "b", "c"], "a", "c, a"),
        (["--replace", "b", "c", "--prepend", "b"], "a, b", "b, a, c"),
        (["--remove", "a"], "\ufeffa, b\n", "\ufeffb\n"),
    ],
)
def test_steps_of_an_edit(tmp_path: Path, steps: list[str], text: str, expected: str) -> None:
    image = put(tmp_path / "a.png", text)
    assert run("caption", "edit", tmp_path, *steps) == 0
    assert image.with_suffix(".txt").read_bytes() == text.encode()
    assert run("caption", "edit", tmp_path, *steps, "--apply") == 0
    assert image.with_suffix(".txt").read_bytes() == expected.encode()
    assert run("caption", "edit", tmp_path, "--undo") == 0
    assert image.with_suffix(".txt").read_bytes() == text.encode()


def test_edits_are_taken_back_one_by_one(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    linked = tmp_path / "shared.txt"
    linked.write_text("linked, tag")
    put(folder / "l.png").with_suffix(".txt").symlink_to(linked)
    put(folder / "none.png")
    (folder / "a b.txt").chmod(0o640)
    states = [files(folder)]
    edit = ["caption", "edit", folder, "--recursive", "--caption_extension", "txt"]
    for step in (["--prepend", "first"], ["--regex", "t(a)g", r"T\1G"]):
        assert run(*edit, *step, "--apply") == 0
        states.append(files(folder))
    assert states[2]["sub/a b.txt"] == b"first, 1girl, TaG_4\n"
    assert states[2][f"{LONGEST}.txt"] == b"first, 1girl, TaG_3\n"
    assert stat.S_IMODE((folder / "a b.txt").stat().st_mode) == 0o640
    assert linked.read_text() == "first, linked, TaG"
    assert (folder / "l.txt").is_symlink()
    assert "1 image without a caption file, left alone: " in capsys.readouterr().err
    # A second call of the same changes nothing, and is nothing to take back.
    assert run(*edit, "--prepend", "first", "--apply") == 0
    assert "nothing would change" in capsys.readouterr().out
    (folder / "sub" / "a b.txt").write_text("mine")
    assert run("caption", "edit", folder, "--undo") == 3
    assert "sub/a b.txt: was changed meanwhile" in capsys.readouterr().err
    assert files(folder) == {**states[1], "sub/a b.txt": b"mine"}
    (folder / "sub" / "a b.txt").write_bytes(states[1]["sub/a b.txt"])
    assert run("caption", "edit", folder, "--undo") == 0
    assert files(folder) == states[0]
    assert run("caption", "edit", folder, "--undo") == 0
    assert "no edit to take back" in capsys.readouterr().out
    assert files(folder) == states[0]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
def test_a_killed_edit_is_finished_or_undone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(400):
        (tmp_path / f"{number}.png").touch()
        (tmp_path / f"{number}.txt").write_text(f"tag {number}")
    before, edit = files(tmp_path), ["caption", "edit", tmp_path, "--replace", "tag", "tag tag"]
    journal = tmp_path / ".caption_edits" / "0001.pending.json"
    for ending in ("--undo", "--finish"):
        command = [sys.executable, "-m", "sd_train", *map(str, edit), "--apply", "--show", "0"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while (tmp_path / "1.txt").read_text() == "tag 1" and time.monotonic() < deadline:
            time.sleep(0.0005)
        process.kill()
        process.wait()
        assert all(path.read_text() for path in tmp_path.glob("*.txt"))
        if journal.exists():
            assert run(*edit, "--apply") == 2
            assert "an edit was cut off" in capsys.readouterr().err
        assert run("caption", "edit", tmp_path, ending) == 0
        if ending == "--undo":
            assert files(tmp_path) == before
            journal = tmp_path / ".caption_edits" / "0002.pending.json"
    assert {path.read_text() for path in tmp_path.glob("*.txt")} == {f"tag tag {number}" for number in range(400)}
    assert run("caption", "edit", tmp_path, "--undo") == 0
    assert files(tmp_path) == before


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names are UTF-8")
def test_names_that_are_no_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(b"caf\xe9")
    put(tmp_path / f"{name}.png", "x")
    put(tmp_path / "a.png", "x")
    assert run("merge_dd_tags_to_metadata", tmp_path, tmp_path / "m.json") == 3
    assert json.loads((tmp_path / "m.json").read_text()) == {"a.png": {"tags": "x"}}
    assert "its name is not UTF-8, which metadata needs" in capsys.readouterr().err
    assert run("caption", "edit", tmp_path, "--append", "y", "--apply") == 0
    assert (tmp_path / f"{name}.txt").read_text() == "x, y"
    assert run("caption", "edit", tmp_path, "--undo") == 0
    assert (tmp_path / f"{name}.txt").read_text() == "x"
    # Halves of characters, which JSON can hold, come through.
    (tmp_path / "m.json").write_text('{"a.png": {"caption": "a woman \\ud800"}}')
    assert run("clean_captions_and_tags", tmp_path / "m.json", tmp_path / "out.json") == 0
    assert json.loads((tmp_path / "out.json").read_text()) == {"a.png": {"caption": "a girl \ud800"}}


def dataset(path: Path, *subsets: str) -> Path:
    text = "".join(f"[[datasets.subsets]]\n{subset}\n" for subset in subsets)
    path.write_text(f"[[datasets]]\nbatch_size = 1\n{text}", encoding="utf-8")
    return path


def test_a_dataset_file_says_where_captions_are(tmp_path: Path) -> None:
    put(tmp_path / "one" / "a.png", "z;  b ||| d; c; d", ".caption")
    put(tmp_path / "two" / "b.png", "z, y, x")
    put(tmp_path / "three" / "c.png")
    meta = tmp_path / "m.json"
    meta.write_text('{"c.png": {"caption": "b, a", "tags": "q, p", "x": 1}}')
    config = dataset(
        tmp_path / "d.toml",
        "image_dir = 'one'\ncaption_separator = ';'\nkeep_tokens_separator = '|||'",
        "keep_tokens = 1\nimage_dir = 'two'\ncaption_extension = '.txt'",
    )  # fmt: skip
    tuned = dataset(tmp_path / "t.toml", "image_dir = 'three'\nmetadata_file = 'm.json'")
    before = files(tmp_path)
    assert run("caption", "edit", config, "--sort", "--dedupe", "--prepend", "new", "--apply") == 0
    assert run("caption", "edit", tuned, "--sort", "--apply") == 0
    assert (tmp_path / "one" / "a.caption").read_text() == "new; b; z ||| c; d"
    assert (tmp_path / "two" / "b.txt").read_text() == "new, z, x, y"
    assert json.loads(meta.read_text()) == {"c.png": {"caption": "b, a", "tags": "p, q", "x": 1}}
    assert run("caption", "edit", meta, "--sort", "--field", "caption", "--apply") == 0
    assert json.loads(meta.read_text()) == {"c.png": {"caption": "a, b", "tags": "p, q", "x": 1}}
    # Each target has its own edits, in a journal that they share.
    for target in (config, meta, tuned):
        assert run("caption", "edit", target, "--undo") == 0
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("images", ["nothing to do is given"]),
        ("images --remove", ["expected one argument"]),
        ("images --sort --show x", ["--show"]),
        ("nowhere --sort", ["nowhere: is neither folder nor file"]),
        ("images/a.png --sort", ["is no dataset and no metadata"]),
        ("mixed --sort", ["several kinds (.txt, .caption)"]),
        ("bare --sort", ["no text files beside"]),
        ("images --regex ( x --regex a \\2", ["--regex = '('", "invalid group reference"]),
        ("images --regex (a+)+b x", ["takes more than"]),
        ("images --regex a \\n", ["a line break would be put"]),
        ("images --replace= x", ["expected 2 arguments"]),
        ("images --undo --sort", ["go alone"]),
        ("images --sort --keep_tokens -1", ["is below 0"]),
        ("d.toml --append x|||y", ["holds the dataset's keep_tokens_separator"]),
    ],
)
def test_edits_refuse(at: Path, capsys: pytest.CaptureFixture[str], words: str, expected: list[str]) -> None:
    put(Path("images/a.png"), "a" * 40)
    put(put(Path("mixed/a.png"), "x"), "x", ".caption")
    put(Path("bare/a.png"))
    dataset(Path("d.toml"), "image_dir = 'images'\ncaption_extension = '.txt'\nkeep_tokens_separator = '|||'")
    before = files(at)
    assert run("caption", "edit", *words.split(), *([] if "--undo" in words else ["--apply"])) == 2
    said = capsys.readouterr().err
    assert all(part in said for part in expected), said
    assert files(at) == before


def test_broken_captions_are_named_and_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "a.png", "x")
    put(tmp_path / "b.png")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    assert run("caption", "edit", tmp_path, "--append", "y", "--apply") == 3
    assert (tmp_path / "a.txt").read_text() == "x, y"
    assert (tmp_path / "b.txt").read_bytes() == b"caf\xe9"
    assert "b.txt: byte 3 is not UTF-8" in capsys.readouterr().err
    assert run("caption", "stats", tmp_path) == 3


def test_statistics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in {"a": "red, cat", "b": "red,red , 100% \"x\"", "c": "", "d": None}.items():
        put(tmp_path / f"{name}.png", text)

    def stats(*words: object) -> str:
        assert run("caption", "stats", tmp_path, *words) == 0
        return capsys.readouterr().out

    report: dict[str, Any] = json.loads(stats("--format", "json"))
    assert [(row["tag"], row["captions"], row["share"]) for row in report.pop("list")] == [
        ("red", 2, 0.666667), ('100% "x"', 1, 0.333333), ("cat", 1, 0.333333),
    ]  # fmt: skip
    assert report == {
        "captions": 3, "empty": 1, "without": 1, "tags": 5, "different": 3, "least": 0, "mean": 1.67, "most": 3,
        "repeated": 1,
    }  # fmt: skip
    rows = list(csv.reader(io.StringIO(stats("--format", "csv"))))
    assert rows == [["tag", "captions", "share"], ["red", "2", "0.666667"], ['100% "x"', "1", "0.333333"],
                    ["cat", "1", "0.333333"]]  # fmt: skip
    table = stats("--top", 1).splitlines()
    assert table[1:] == ["2   66.7%  red", "... and 2 more (--top)"]
    stats("--format", "csv", "--output", tmp_path / "tags.csv")
    assert (tmp_path / "tags.csv").read_text().startswith("tag,captions,share\nred,2")


@pytest.mark.parametrize(
    "name",
    ["merge_captions_to_metadata", "merge_dd_tags_to_metadata", "merge_all_to_metadata", "clean_captions_and_tags"],
)
def test_scripts_with_the_names_of_sd_scripts(name: str, tmp_path: Path) -> None:
    put(tmp_path / "a.png", "tags")
    put(tmp_path / "a.png", "a woman", ".caption")
    (tmp_path / "m.json").write_text('{"a.png": {"caption": "a woman"}}')
    source = "m.json" if name.startswith("clean") else "."
    command = [sys.executable, str(ROOT / "finetune" / f"{name}.py"), source, "out.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    expected = {"merge_captions": {"caption": "a woman"}, "merge_dd": {"tags": "tags"}, "clean": {"caption": "a girl"},
                "merge_all": {"caption": "a woman", "tags": "tags"}}  # fmt: skip
    wanted = next(entry for start, entry in expected.items() if name.startswith(start))
    assert json.loads((tmp_path / "out.json").read_text()) == {"a.png": wanted}
