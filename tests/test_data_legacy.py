"""Datasets without a dataset file: folders named REPEATS_CLASS, metadata by --in_json, what is said when none fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sd_train.data.config import DatasetRequest, load_datasets
from sd_train.data.settings import DatasetConfig
from sd_train.errors import ConfigError

SIZE = {"resolution": (64, 64), "batch_size": 3, "num_repeats": 7, "caption_extension": ".txt"}


def folder(path: Path) -> None:
    path.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(path / "0.png")


def folders(root: Path, **given: Any) -> DatasetConfig:
    request = {name: root / value for name, value in given.items() if name != "command"}
    (dataset,) = load_datasets(DatasetRequest(given.get("command", "train_network"), fallbacks=SIZE, **request))
    return dataset


def test_folders_with_repeats_are_one_dataset(tmp_path: Path) -> None:
    for name in ("img/2_b", "img/10_a", "img/1_c", "img/10__d_e", "img/notes", "img/0_x", "reg/1_dog"):
        folder(tmp_path / name)
    dataset = folders(tmp_path, train_data_dir="img", reg_data_dir="reg")
    assert [(subset.image_dir.name, subset.num_repeats, subset.class_tokens) for subset in dataset.subsets] == [
        ("10__d_e", 10, "_d_e"), ("10_a", 10, "a"), ("1_c", 1, "c"), ("2_b", 2, "b"), ("1_dog", 1, "dog"),
    ]  # fmt: skip
    assert [subset.is_reg for subset in dataset.subsets] == [False] * 4 + [True]
    assert (dataset.batch_size, dataset.resolution, dataset.subsets[0].caption_extension) == (3, (64, 64), ".txt")
    assert dataset.subsets[4].origin == "--reg_data_dir: sub-folder '1_dog'"
    assert [warning.split(":")[1].strip() for warning in dataset.warnings] == ["sub-folder '0_x'", "sub-folder 'notes'"]


def test_a_name_without_class_is_an_empty_caption(tmp_path: Path) -> None:
    folder(tmp_path / "img/5")
    dataset = folders(tmp_path, train_data_dir="img")
    assert dataset.subsets[0].class_tokens == ""
    assert "names no class" in dataset.warnings[0]


@pytest.mark.parametrize(
    ("made", "given", "words"),
    [
        (["img/dog", "img/cat"], "img", "found: 2 sub-folders ('cat', 'dog') without a number from 1 on)"),
        (["img/dog", "img/cat"], "img", "for example '10_cat'"),
        (["img"], "img", "found: 1 image ('0.png')"),
        (["img"], "img", "move the images into a sub-folder"),
        (["img/10_dog"], "img/10_dog", "give the folder above it: --train_data_dir="),
        (["img/0_dog"], "img", "without a number from 1 on); give them a number from 1 on, for example '10_dog'"),
        (["other"], "img", "there is no such folder"),
        (["img/10_dog/deeper"], "img", "--train_data_dir: sub-folder '10_dog'"),
    ],
)
def test_a_parent_without_such_folders_shows_what_it_holds(
    made: list[str], given: str, words: str, tmp_path: Path
) -> None:
    for name in made:
        folder(tmp_path / name)
    with pytest.raises(ConfigError) as caught:
        folders(tmp_path, train_data_dir=given)
    assert words in str(caught.value)
    assert len(caught.value.problems) == 1


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("a", "reg"):
        folder(tmp_path / name)
    (tmp_path / "meta.json").write_text("{}")
    return tmp_path


def test_metadata_by_in_json(photos: Path) -> None:
    dataset = folders(photos, train_data_dir="a", in_json="meta.json", reg_data_dir="reg")
    assert dataset.style == "fine_tuning"
    assert dataset.subsets[0].image_dir == photos / "a"
    assert dataset.subsets[0].metadata_file == photos / "meta.json"
    assert dataset.subsets[0].num_repeats == 7
    assert "--reg_data_dir" in dataset.warnings[0]
    assert folders(photos, in_json="meta.json", command="fine_tune").subsets[0].image_dir == Path()
    with pytest.raises(ConfigError, match="--in_json: train_db does not train a dataset of fine-tuning"):
        folders(photos, train_data_dir="a", in_json="meta.json", command="train_db")
    with pytest.raises(ConfigError, match="give it as --in_json"):
        folders(photos, train_data_dir="a", command="fine_tune")


def test_what_is_missing_is_said_with_its_flag(photos: Path) -> None:
    with pytest.raises(ConfigError, match=r"give --dataset_config FILE\.toml, or --train_data_dir FOLDER"):
        load_datasets(DatasetRequest("train_network"))
    folder(photos / "img/1_x")
    with pytest.raises(ConfigError, match="--train_data_dir: has no resolution; give for example --resolution=512"):
        load_datasets(DatasetRequest("train_network", train_data_dir=photos / "img"))
    with pytest.raises(ConfigError, match="only; give the images to learn as --train_data_dir"):
        folders(photos, reg_data_dir="img")
    path = photos / "data.toml"
    path.write_text(f'[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "{photos.as_posix()}/a"\n')
    (dataset,) = load_datasets(DatasetRequest("train_network", path, train_data_dir=photos, in_json=photos / "x"))
    assert [subset.image_dir.name for subset in dataset.subsets] == ["a"]
