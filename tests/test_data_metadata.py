"""Metadata files, .parquet files and masks: what they come to, and what stops the run."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sd_train.data.index import ImageIndex, IndexOptions, build_indexes
from sd_train.data.settings import DatasetConfig, SubsetConfig
from sd_train.errors import DataError


def put(path: Path, size: tuple[int, int] = (64, 64), color: int = 0) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.new("RGB", size, (color, 0, 0)).save(path)
    return path


def write(path: Path, data: object) -> Path:
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
    return path


def index(metadata: Path, folder: Path = Path(), options: IndexOptions | None = None, **more: Any) -> ImageIndex:
    subset = SubsetConfig(image_dir=folder, metadata_file=metadata, origin="data.toml:3", **more)
    dataset = DatasetConfig(1, (64, 64), style="fine_tuning", subsets=(subset,), origin="data.toml:1")
    return build_indexes([dataset], options or IndexOptions()).training[0]


def refusal(*args: Any, **more: Any) -> str:
    with pytest.raises(DataError) as caught:
        index(*args, **more)
    return str(caught.value)


def captions(tmp_path: Path, entry: dict[str, Any], **more: Any) -> str:
    put(tmp_path / "images" / "a.png")
    return index(write(tmp_path / "meta.json", {"a.png": entry}), tmp_path / "images", **more).captions[0]


@pytest.mark.parametrize(
    ("entry", "wildcard", "expected"),
    [
        ({"caption": "a cat", "tags": "red, blue"}, False, "a cat,red, blue"),
        ({"caption": "a cat", "tags": ""}, False, "a cat"),
        ({"caption": "a cat", "tags": None}, False, "a cat"),
        ({"caption": "", "tags": "red, blue"}, False, "red, blue"),
        ({"tags": "red, blue"}, False, "red, blue"),
        ({"tags": "red, blue"}, True, "red, blue"),
        ({"caption": "", "tags": "red, blue"}, True, "red, blue"),
        ({"caption": "one\n\ntwo", "tags": "red,blue"}, True, "one,red,blue\ntwo,red,blue"),
        ({"caption": "one\n\ntwo", "tags": "red\nblue"}, True, "one,red,blue\ntwo,red,blue"),
        ({"caption": "one\ntwo", "tags": "red"}, False, "one,red"),
        ({"caption": ""}, False, ""),
        ({"text": "a dog"}, False, "a dog"),
        ({"caption": "a cat", "image_size": [64, 64], "train_resolution": [64, 64], "score": 1.5}, False, "a cat"),
    ],
)
def test_caption_and_tags(tmp_path: Path, entry: dict[str, Any], wildcard: bool, expected: str) -> None:
    assert captions(tmp_path, entry, enable_wildcard=wildcard) == expected


def test_caption_separator_and_column(tmp_path: Path) -> None:
    assert captions(tmp_path, {"caption": "a", "tags": "b"}, caption_separator=";") == "a;b"
    assert captions(tmp_path, {"caption": "a", "tags": "b", "long": "c"}, caption_column="long") == "c"


def test_keys_with_and_without_extension_relative_and_absolute(tmp_path: Path) -> None:
    images = tmp_path / "images"
    for name in ("a.png", "b.v1.JPG", "sub/c.webp", "d.bmp", "sub/deep/e.png"):
        put(images / name)
    outside = put(tmp_path / "elsewhere" / "f.png")
    keys = ["b.v1", "a.png", "./sub/c", str(images / "d"), "sub\\deep\\e.png", str(outside.with_suffix(""))]
    found = index(write(tmp_path / "meta.json", {key: {"caption": key} for key in keys}), images)
    assert list(found.keys) == sorted([str(outside), "a.png", "b.v1.JPG", "d.bmp", "sub/c.webp", "sub/deep/e.png"])
    by_key = dict(zip(found.keys, found.captions, strict=True))
    assert (by_key["b.v1.JPG"], by_key[str(outside)]) == ("b.v1", str(outside.with_suffix("")))
    assert {found.record(row).path for row in range(6)} == {outside, *(path for path in images.rglob("*.*"))}
    assert found.tag_frequency()["meta.json"]["a.png"] == 1


def test_keys_without_image_dir_start_at_the_file(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    other = put(tmp_path / "other" / "b.png")
    found = index(write(tmp_path / "meta.json", {"a": {"caption": "x"}, str(other): {"caption": "y"}}))
    assert list(found.keys) == ["a.png", "other/b.png"]
    assert found.path(0) == tmp_path / "a.png"


def test_a_key_that_fits_two_files_and_an_image_with_two_entries(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "b.png"):
        put(tmp_path / "images" / name)
    data = {"a": {"caption": "x"}, "b": {"caption": "x"}, "b.png": {"caption": "x"}}
    message = refusal(write(tmp_path / "meta.json", data), tmp_path / "images")
    assert "'a' (a.jpg or a.png)" in message
    assert "1 images have several entries: b.png" in message


def test_images_that_are_not_on_disk(tmp_path: Path) -> None:
    put(tmp_path / "images" / "there.png")
    data = {f"{number}.png": {"caption": "x"} for number in range(7)} | {"there.png": {"caption": "y"}}
    meta = write(tmp_path / "meta.json", data)
    message = refusal(meta, tmp_path / "images")
    assert "7 of its 8 images are not on disk" in message
    assert "0.png, 1.png, 2.png, 3.png, 4.png, and 2 more" in message
    (tmp_path / "images" / "3.png").write_bytes(b"broken")
    message = refusal(meta, tmp_path / "images")
    assert "6 of its 8 images are not on disk" in message
    assert "3.png: no image that Pillow can read" in message
    (tmp_path / "images" / "3.png").unlink()
    found = index(meta, tmp_path / "images", IndexOptions(skip_broken_images=True))
    assert list(found.captions) == ["y"]
    assert len(found.left_out) == 7
    assert "there is no such image" in found.left_out[0]


def test_entries_without_caption(tmp_path: Path) -> None:
    put(tmp_path / "images" / "a.png")
    meta = write(tmp_path / "meta.json", {"a": {"image_size": [64, 64]}})
    message = refusal(meta, tmp_path / "images")
    assert "1 of 1 images" in message
    assert "--allow_missing_captions" in message
    found = index(meta, tmp_path / "images", IndexOptions(allow_missing_captions=True))
    assert list(found.captions) == [""]
    assert "empty caption" in found.warnings[0]


def test_image_size_is_the_files(tmp_path: Path) -> None:
    put(tmp_path / "images" / "a.png", (80, 64))
    put(tmp_path / "images" / "b.png", (80, 64))
    data = {"a": {"caption": "x", "image_size": [100, 64]}, "b": {"caption": "x", "image_size": [64, 80]}}
    found = index(write(tmp_path / "meta.json", data), tmp_path / "images")
    assert found.sizes.tolist() == [[80, 64], [80, 64]]
    (warning,) = found.warnings
    assert "image_size of 1 of 2 images" in warning
    assert "a.png (100x64, the file has 80x64)" in warning


def test_json_lines_of_sd_scripts_and_of_datasets(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        put(tmp_path / name)
    lines = [
        {"image_path": str(tmp_path / "a.png"), "caption": "ä cat", "tags": "red"},
        {"file_name": "b.png", "text": "a dog"},
        {"file_name": "c.png", "caption": "a cow", "text": "not this", "width": 3},
    ]
    text = "\ufeff" + "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\r\n\r\n"
    meta = tmp_path / "metadata.jsonl"
    meta.write_bytes(text.encode())
    assert list(index(meta).captions) == ["ä cat,red", "a dog", "a cow"]
    assert list(index(meta, caption_column="text", options=IndexOptions(allow_missing_captions=True)).captions) == [
        "", "a dog", "not this",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("m.json", '{"a": {"caption": "x"},\n "b": {"caption" "y"}}', ["m.json:2:18", "not valid JSON"]),
        ("m.json", '{"a": {"caption": "x"}\n "b": 1}', ["m.json:1:23", "','"]),
        ("m.json", '[{"file_name": "a.png"}]', ["m.json:1:1", "one object"]),
        ("m.json", '{"a": {}} x', ["more text follows"]),
        ("m.json", "{", ["m.json:1:2"]),
        ("m.json", "", ["m.json:1:1"]),
        ("m.json", "{}", ["holds no image"]),
        ("m.json", '{1: {}}', ["a key must be text"]),
        ("m.json", '{"a": {"caption": 1' + "0" * 5000 + "}}", ["number that is too long"]),
        ("m.json", '{"a": ' + "[" * 100_000, ["nested too deep"]),
        ("m.json", '{"a": {"caption": ["x"]}}', ["m.json:1: 'a'.caption: must be text", '["a", "b"]']),
        ("m.json", '{"b": {"text": "x"},\n\n"a": {"caption": "x", "tags": 3}}', ["m.json:3: 'a'.tags: must be text"]),
        ("m.json", '{"a": "x"}', ["m.json:1: 'a': must be an object"]),
        ("m.json", '{"a": {"caption": "x", "image_size": [64, true]}}', ["'a'.image_size: must be [width, height]"]),
        ("m.json", '{"": {"caption": "x"}}', ["m.json:1: names no image"]),
        ("m.jsonl", '{"file_name": "a"}\n{"file_name"}', ["m.jsonl:2:13", "one object {...} on each line"]),
        ("m.jsonl", '{"caption": "a"}', ["m.jsonl:1: names no image", "file_name"]),
        ("m.jsonl", '{"file_name": 1}\n[]', ["m.jsonl:1: names no image", "m.jsonl:2: must be an object"]),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, name: str, text: str, words: list[str]) -> None:
    put(tmp_path / "a.png")
    message = refusal(write(tmp_path / name, text))
    for word in words:
        assert word in message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "there is no such file" in refusal(tmp_path / "gone.json")
    assert "there is no such file" in refusal(tmp_path / "gone.jsonl")
    (tmp_path / "m.jsonl").write_bytes(b'{"file_name": "a"}\n"\xff"')
    assert "m.jsonl:2: byte 1 is not UTF-8" in refusal(tmp_path / "m.jsonl")


def masked(folder: Path, masks: Path, **more: Any) -> ImageIndex:
    subset = SubsetConfig(image_dir=folder, conditioning_data_dir=masks, class_tokens="x", origin="data.toml:3", **more)
    dataset = DatasetConfig(1, (64, 64), subsets=(subset,))
    return build_indexes([dataset], IndexOptions()).training[0]


def test_masks_have_their_images_names(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.png", "b.webp"):
        put(tmp_path / "images" / name)
    for name in ("a.PNG", "b.png", "b.webp", "unused.png"):
        put(tmp_path / "masks" / name)
    found = masked(tmp_path / "images", tmp_path / "masks")
    assert found.masks is not None
    assert list(found.masks) == ["a.PNG", "b.png", "b.webp"]
    assert found.record(0).mask == tmp_path / "masks" / "a.PNG"
    assert "1 of 4 masks" in found.warnings[0]
    assert "unused.png" in found.warnings[0]


def test_masks_that_are_missing_or_doubled(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        put(tmp_path / "images" / name)
    for name in ("b.png", "b.webp"):
        put(tmp_path / "masks" / name)
    with pytest.raises(DataError) as caught:
        masked(tmp_path / "images", tmp_path / "masks")
    assert "1 of 2 images have no mask there" in str(caught.value)
    assert "b.jpg (b.png or b.webp)" in str(caught.value)
    with pytest.raises(DataError, match="folder of masks cannot be read"):
        masked(tmp_path / "images", tmp_path / "gone")


def encoded(size: tuple[int, int], color: int = 0) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, (color, 0, 0)).save(data, "PNG")
    return data.getvalue()


def parquet(path: Path, images: list[Any], texts: list[str | None], column: str = "text", group: int = 2) -> Path:
    arrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    writer.write_table(arrow.table({"image": images, column: arrow.array(texts, arrow.string())}), path,
                       row_group_size=group)  # fmt: skip
    return path


def test_parquet_files_of_a_folder_are_one_subset(tmp_path: Path) -> None:
    rows = [{"bytes": encoded((64 + 8 * number, 64), number), "path": f"{number}.png"} for number in range(5)]
    parquet(tmp_path / "train-0.parquet", rows[:3], ["a", "b", "c"])
    parquet(tmp_path / "train-1.parquet", [row["bytes"] for row in rows[3:]], ["d", "e"])
    found = index(tmp_path)
    names = [f"train-0.parquet/{row}" for row in range(3)]
    assert list(found.keys) == [*names, "train-1.parquet/0", "train-1.parquet/1"]
    assert list(found.captions) == list("abcde")
    assert found.sizes[:, 0].tolist() == [64, 72, 80, 88, 96]
    assert found.stats[:, 0].tolist() == [len(row["bytes"]) for row in rows]
    assert found.path(4) == tmp_path / "train-1.parquet" / "1"
    for path in tmp_path.glob("*.parquet"):
        os.utime(path, (1e9, 1e9))
    again = [index(tmp_path, options=IndexOptions(cache_dir=tmp_path / "cache")) for _ in range(2)]
    assert len(list((tmp_path / "cache" / "index").iterdir())) == 2
    assert all(np.array_equal(one.sizes, found.sizes) for one in again)
    assert np.array_equal(again[0].stats, again[1].stats)
    alone = index(tmp_path / "train-0.parquet")
    assert alone.path(2) == tmp_path / "train-0.parquet" / "2"


def test_images_in_parquet_files_from_several_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sd_train.data import parquet as module

    contents = [encoded((64, 64), number) for number in range(20)]
    path = parquet(tmp_path / "a.parquet", [{"bytes": data, "path": None} for data in contents], ["x"] * 20)
    monkeypatch.setattr(module, "KEPT_BYTES", 3 * len(contents[0]))
    wrong = list[int]()

    def read(seed: int) -> None:
        for row in np.random.default_rng(seed).permutation(20).tolist():
            if module.image_bytes(path / str(row)) != contents[row]:
                wrong.append(row)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    parquet(path, [{"bytes": contents[5], "path": None}], ["x"])
    assert module.image_bytes(path / "0") == contents[5]
    with pytest.raises(DataError, match="the file has 1 rows"):
        module.image_bytes(path / "1")


def test_parquet_rows_that_only_name_their_image(tmp_path: Path) -> None:
    put(tmp_path / "images" / "a.png", (72, 64))
    rows = [{"bytes": None, "path": "a.png"}, {"bytes": encoded((64, 64)), "path": None}]
    found = index(parquet(tmp_path / "m.parquet", rows, ["x", "y"]), tmp_path / "images")
    assert found.sizes.tolist() == [[72, 64], [64, 64]]
    assert found.path(0) == tmp_path / "images" / "a.png"


def test_what_is_wrong_with_parquet_files(tmp_path: Path) -> None:
    good = {"bytes": encoded((64, 64)), "path": None}
    path = parquet(tmp_path / "m.parquet", [good, {"bytes": b"no image", "path": None}, good], ["x", "y", None])
    message = refusal(path)
    assert "m.parquet/1: no image" in message
    assert "m.parquet/2" in message
    assert "has no column 'long', only image, text" in refusal(path, caption_column="long")
    options = IndexOptions(skip_broken_images=True, allow_missing_captions=True)
    assert list(index(path, options=options).captions) == ["x", ""]
    assert "has no column 'image' with images" in refusal(parquet(tmp_path / "n.parquet", ["a.png"], ["x"]))
    assert "column 'image' is struct" in refusal(path, caption_column="image")
    (tmp_path / "p.parquet").write_bytes(b"nothing of the kind")
    assert "cannot be read as .parquet" in refusal(tmp_path / "p.parquet")
    (tmp_path / "empty").mkdir()
    assert "holds no .parquet file" in refusal(tmp_path / "empty")


def test_parquet_without_pyarrow_names_the_package(tmp_path: Path) -> None:
    (tmp_path / "pyarrow.py").write_text("raise ImportError")
    (tmp_path / "m.parquet").write_bytes(b"")
    code = "from sd_train.data.parquet import image_bytes; from pathlib import Path; image_bytes(Path('m.parquet/0'))"
    run = subprocess.run([sys.executable, "-c", f"import sys; sys.path.append({str(Path.cwd())!r}); {code}"],
                         cwd=tmp_path, capture_output=True, text=True, check=False)  # fmt: skip
    assert "pip install pyarrow" in run.stderr


def test_jxl_is_an_image_where_its_plugin_is_installed(tmp_path: Path) -> None:
    code = "from sd_train.data.folders import IMAGE_EXTENSIONS as known; print('.jxl' in known, '.png' in known)"
    (tmp_path / "pillow_jxl.py").write_text("")
    run = subprocess.run([sys.executable, "-c", f"import sys; sys.path.append({str(Path.cwd())!r}); {code}"],
                         cwd=tmp_path, capture_output=True, text=True, check=True)  # fmt: skip
    assert run.stdout.split() == ["True", "True"]
    (tmp_path / "pillow_jxl.py").write_text("raise ImportError('built for another Pillow')")
    run = subprocess.run([sys.executable, "-c", f"import sys; sys.path.append({str(Path.cwd())!r}); {code}"],
                         cwd=tmp_path, capture_output=True, text=True, check=True)  # fmt: skip
    assert run.stdout.split() == ["False", "True"]


def test_a_folder_that_cannot_be_listed_is_told(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    put(tmp_path / "a.png")
    meta = write(tmp_path / "meta.json", {"a": {"caption": "x"}, "loop/b": {"caption": "x"}})
    message = refusal(meta, tmp_path)
    assert "loop': the folder of images" in message
    assert "cannot be read (Too many levels of symbolic links)" in message


def test_an_absent_image_is_one_problem_whatever_else_it_lacks(tmp_path: Path) -> None:
    put(tmp_path / "a.png")
    meta = write(tmp_path / "meta.json", {"a": {"caption": "x"}, "gone": {}})
    for options in (IndexOptions(), IndexOptions(verify_images=True)):
        message = refusal(meta, tmp_path, options)
        assert "1 of its 2 images are not on disk" in message
        assert "no caption" not in message
        assert "cannot be read" not in message


def test_a_parquet_file_without_rows_is_named(tmp_path: Path) -> None:
    kept = parquet(tmp_path / "m.parquet", [{"bytes": encoded((64, 64)), "path": None}], ["x"])
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.parquet.read_table(kept).slice(0, 0), kept)
    assert "m.parquet': holds no image; add rows or leave the subset out" in refusal(kept)


def test_masks_are_verified_with_their_images(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.bmp", "d.png"):
        put(tmp_path / "images" / name)
        put(tmp_path / "masks" / name)
    put(tmp_path / "masks" / "b.png", (64, 128))
    (tmp_path / "masks" / "c.bmp").write_bytes((tmp_path / "masks" / "c.bmp").read_bytes()[:-100])
    (tmp_path / "masks" / "d.png").write_bytes(b"none")
    subset = SubsetConfig(tmp_path / "images", conditioning_data_dir=tmp_path / "masks", class_tokens="x", origin="s")
    dataset = DatasetConfig(1, (64, 64), subsets=(subset,), origin="d")
    with pytest.raises(DataError) as caught:
        build_indexes([dataset], IndexOptions(verify_images=True))
    message = str(caught.value)
    assert "3 images cannot be read" in message
    assert "b.png: the mask is 64x128 pixels" in message
    assert "masks/c.bmp: the image cannot be read" in message
    assert "masks/d.png: no image that Pillow can read" in message
    [found] = build_indexes([dataset], IndexOptions(skip_broken_images=True)).training
    assert list(found.keys) == ["a.png"]
    assert "images/b.png: its mask cannot be used" in found.left_out[0]
