"""From a folder of pictures to a training: every command of the preparation, one after the other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sd_train.__main__ import main as sd_train
from tests.runs import PHOTOS, tree
from tests.test_prepare_captions import write_blip
from tests.test_prepare_tags import write_wd

NAMES = ("a b.jpg", "100% ä 好.JPG", "c" * 247 + ".jpg", "x/same.jpg", "y/same.jpg", "z.Jpeg")
"""Blanks, percent signs, Unicode, 255 bytes (with .caption), upper-case extensions, one name in two folders."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A captioner and a tagger."""
    folder = tmp_path_factory.mktemp("models")
    write_blip(folder / "blip")
    write_wd(folder / "wd")
    return folder


def chain(folder: Path, models: Path, model: Path) -> dict[str, bytes]:
    """Prepare `folder/photos`; what lies in `folder` then."""
    photos = str(folder / "photos")
    commands = [
        ["make_captions", photos, "--recursive", "--caption_weights", str(models / "blip"), "--max_length", "8"],
        ["tag_images_by_wd14_tagger", photos, "--recursive", "--repo_id", str(models / "wd"), "--thresh", "0.01"],
        ["merge_captions_to_metadata", photos, str(folder / "captions.json"), "--recursive"],
        ["merge_dd_tags_to_metadata", photos, str(folder / "meta.json"), "--recursive", "--in_json",
         str(folder / "captions.json")],
        ["clean_captions_and_tags", str(folder / "meta.json"), str(folder / "clean.json")],
        ["prepare_buckets_latents", photos, str(folder / "clean.json"), str(folder / "latents.json"), str(model),
         "--recursive", "--max_resolution", "64,64", "--min_bucket_reso", "64", "--max_bucket_reso", "128"],
    ]  # fmt: skip
    for command in commands:
        assert sd_train(command) == 0, command
    return {name: content for name, content in tree(folder).items() if not name.startswith("out")}


def write_photos(folder: Path) -> None:
    """The demonstration's photographs under names that make trouble."""
    for photo, name in zip(sorted(PHOTOS.glob("*.jpg")), NAMES, strict=True):
        target = folder / "photos" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(photo, target)


def test_pictures_become_a_training(
    models: Path, small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("first", "second"):
        write_photos(tmp_path / name)
    first, second = (chain(tmp_path / name, models, small_model) for name in ("first", "second"))
    # The same bytes in another folder; and nothing changes when all is done once more.
    assert first == second
    assert chain(tmp_path / "first", models, small_model) == first
    metadata = json.loads(first["latents.json"])
    assert sorted(metadata) == sorted(NAMES)
    assert all(entry["caption"] and entry["tags"] and entry["train_resolution"] for entry in metadata.values())
    # A name of 255 bytes leaves no room for that of its latents.
    assert sum(name.endswith(".npz") for name in first) == len(NAMES) - 1
    capsys.readouterr()
    folder = tmp_path / "first"
    words = f"""--pretrained_model_name_or_path {small_model} --train_data_dir {folder / 'photos'} --in_json
        {folder / 'latents.json'} --resolution 64 --enable_bucket --min_bucket_reso 64 --max_bucket_reso 128
        --cache_latents --max_train_steps 2 --output_dir {folder / 'out'} --output_name tuned --seed 1""".split()
    assert sd_train(["fine_tune", *words]) == 0
    assert (folder / "out" / "tuned.safetensors").is_file()


def test_files_of_others_are_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_photos(tmp_path)
    photos, own = str(tmp_path / "photos"), tmp_path / "meta.json"
    own.write_text("{}")
    for option in ("--list", "--report"):
        assert sd_train(["filter_images", photos, option, str(own)]) == 2
        assert "is another file, which would be lost" in capsys.readouterr().err
    more = ["--list", str(tmp_path / "list.json"), "--report", str(tmp_path / "page.html"), "--min_size", "10"]
    for _ in range(2):
        assert sd_train(["filter_images", photos, "--recursive", *more]) == 0
    for extension in (".png", ".JPG", "npz", "a/b", ""):
        assert sd_train(["make_captions", photos, "--caption_extension", extension]) == 2
        assert "--caption_extension" in capsys.readouterr().err
    assert own.read_text() == "{}"
