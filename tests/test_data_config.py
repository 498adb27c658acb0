"""The dataset file: levels, inheritance, every problem at once with its place, JSON Schema."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sd_train.data.config import DatasetRequest, dataset_json_schema, load_datasets
from sd_train.data.keys import DatasetTable, SubsetTable
from sd_train.data.settings import DatasetConfig
from sd_train.data.styles import accepted_styles
from sd_train.errors import ConfigError

ROOT = Path(__file__).parents[1]


def folder(path: Path, images: int = 1) -> Path:
    path.mkdir(parents=True)
    for number in range(images):
        Image.new("RGB", (8, 8)).save(path / f"{number}.png")
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name, images in {"a": 4, "b": 3, "c": 2, "reg": 3, "cond": 4}.items():
        folder(tmp_path / name, images)
    (tmp_path / "empty").mkdir()
    rows = {f"{number}.png": {"caption": "x"} for number in range(4)}
    files = {
        "meta_rel.json": rows,
        "meta_abs.json": {str(tmp_path / "a" / name): row for name, row in rows.items()},
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    return tmp_path


def load(text: str, tmp_path: Path, command: str = "train_network", **given: Any) -> tuple[DatasetConfig, ...]:
    """The datasets of a file with `text`; `given` are fields of the request, else fallbacks."""
    path = tmp_path / ("data.json" if text.startswith("{") else "data.toml")
    path.write_text(text.replace("<D>", tmp_path.as_posix()), encoding="utf-8")
    fields = DatasetRequest.__dataclass_fields__
    request = {name: value for name, value in given.items() if name in fields}
    fallbacks = {name: value for name, value in given.items() if name not in fields}
    return load_datasets(DatasetRequest(command, path, fallbacks=fallbacks, **request))


def refusal(text: str, tmp_path: Path, command: str = "train_network", **given: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, tmp_path, command, **given)
    return str(caught.value)


def one(keys: str, subset: str = "", folder: str = "a") -> str:
    """A dataset file with one subset."""
    return f'[[datasets]]\nresolution = 512\n{keys}\n[[datasets.subsets]]\nimage_dir = "<D>/{folder}"\n{subset}\n'


def test_all_problems_come_at_once_with_file_and_line(photos: Path) -> None:
    message = refusal(
        '[general]\nkeep_token = 1\ncaption_dropout_rate = 1.5\n[[datasets]]\nbatch_size = true\n'
        '[[datasets.subsets]]\nimage_dir = "<D>/a"\nbatch_size = 2\nflip_aug = "yes"\n'
        '[[datasets.subsets]]\nimage_dir = "<D>/a"\n[[datasets.subsets]]\nimage_dir = "<D>/nowhere"\n',
        photos,
    )
    for line, words in {
        2: "did you mean 'keep_tokens'?", 3: "must be at most 1", 4: "has no resolution", 5: "must be a whole number",
        8: "move it to [[datasets]] or [general]", 9: "must be true or false", 11: "once more", 13: "no such folder",
    }.items():  # fmt: skip
        assert any(f"data.toml:{line}:" in text and words in text for text in message.splitlines()), (line, message)
    assert message.startswith("8 problems:")


@pytest.mark.parametrize(
    ("keys", "subset", "words"),
    [
        ("min_bucket_reso = 600", "", "a side is shorter than min_bucket_reso (600)"),
        ("max_bucket_reso = 448", "", "a side is longer than max_bucket_reso (448)"),
        ("min_bucket_reso = 32", "", "must be at least bucket_reso_steps"),
        ("bucket_reso_steps = 96", "", "multiple of 64"),
        ("validation_split = 1", "", "must be below 1"),
        ("validation_split = true", "", "must be a number"),
        ("validation_seed = -1", "", "must be at least 0"),
        ("cache_latents = true", "", "--cache_latents"),
        ("batch_size = 65537", "", "must be at most 65536"),
        ("num_repeats = 1000001", "", "must be at most 1000000"),
        ("max_bucket_reso = 32769", "", "must be at most 32768"),
        ('bucket_policy = "drop"', "", "must be one of 'keep', 'merge', 'fill' or 'carry'"),
        ('resize_interpolation = "bogus"', "", "must be one of 'lanczos'"),
        ("skip_image_resolution = -1", "", "must be at least 0"),
        ("alpha_mask = true", "", "move it to [[datasets.subsets]]"),
        ("", "skip_image_resolution = 64", "move it to [[datasets]] or [general]"),
        ("", "num_repeats = 0", "must be at least 0.001"),
        ("", "loss_weight = -0.5", "must be at least 0"),
        ("", "loss_weight = inf", "must be a finite number"),
        ("", "unmasked_weight = 1.5", "must be at most 1"),
        ("", "face_crop_aug_range = [0.0, 1.0]", "must be two numbers above 0"),
        ("", "face_crop_aug_range = [true, 2]", "must be a list of two numbers"),
        ("", "custom_attributes = {when = 2024-01-01}", "may hold text"),
        ("", "is_reg = true\nnum_repeats = 0.5", "must be a whole number for regularisation images"),
        ("", "metadata_file = 5", "must be text"),
        ("", 'metadata_file = "<D>/nowhere.json"', "there is no such file"),
        ("", 'metadata_file = "<D>/a/0.png"', "does not end in .json or .jsonl or .parquet"),
        ("", 'metadata_file = "<D>/a"', "is a folder without .parquet files"),
        ("", 'metadata_file = "<D>"', "write metadata_file = '"),
    ],
)
def test_rules_of_a_dataset(keys: str, subset: str, words: str, photos: Path) -> None:
    message = refusal(one(f"enable_bucket = true\n{keys}", subset), photos)
    assert words in message
    assert (keys or subset.split("\n")[-1]).split(" = ")[0] in message


def test_steps_of_buckets_are_a_multiple_of_what_the_model_halves(photos: Path) -> None:
    text = one("enable_bucket = true\nbucket_reso_steps = 32")
    assert "multiple of 64" in refusal(text, photos)
    assert load(text, photos, step_multiple=32)[0].bucket_reso_steps == 32


def test_values_beyond_sd_scripts(photos: Path) -> None:
    keys = 'bucket_policy = "merge"\nskip_image_resolution = 100\nenable_bucket = true\nloss_weight = 0.5'
    (dataset,) = load(one(keys, "num_repeats = 0.5\nloss_weight = 2"), photos)
    assert (dataset.bucket_policy, dataset.skip_image_resolution) == ("merge", 100)
    assert (dataset.subsets[0].num_repeats, dataset.subsets[0].loss_weight) == (0.5, 2)
    whole = load(one("", "num_repeats = 3.0"), photos)[0].subsets[0].num_repeats
    assert json.dumps(whole) == "3"
    (attributed,) = load(one("", "custom_attributes = {a = [1]}"), photos)
    assert attributed.subsets[0].custom_attributes == {"a": [1]}
    assert "custom_attributes = {'a': [1]}: has no effect" in attributed.warnings[0]


def test_bucket_limits_are_rounded_and_only_checked_with_buckets(photos: Path) -> None:
    text = '[[datasets]]\nresolution = 512\n{}min_bucket_reso = 300\nmax_bucket_reso = {}\n[[datasets.subsets]]\n'
    text += 'image_dir = "<D>/a"\n'
    (with_buckets,) = load(text.format("enable_bucket = true\n", 1000), photos)
    assert (with_buckets.min_bucket_reso, with_buckets.max_bucket_reso) == (256, 1024)
    (without,) = load(text.format("", 100), photos)
    assert (without.min_bucket_reso, without.max_bucket_reso) == (300, 100)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"datasets": [null]}', "datasets[0]: must be a table; write [[datasets]]"),
        ('{"datasets": [{"subsets": ["a"]}]}', "datasets[0].subsets[0]"),
        ('{"datasets": [{"image_dir": "x", "subsets": []}]}', "move it to [[datasets.subsets]]"),
        ('{"general": 5, "datasets": {}}', "general: must be a table"),
        ('{"datasets": [{"batch_size": ' + "1" * 5000 + "}]}", "data.json: a number has more than"),
        ('{"a": ' * 100_000, "data.json: is nested deeper than"),
        ('{"a": ' * 400 + "0" + "}" * 400, "data.json: is nested deeper than"),
        ('{"datasets": [{"subsets": [{"image_dir": "a\\u0000b"}]}]}', "holds a null character"),
        ('{"datasets": [{"subsets": [{"image_dir": "a\\ud800b"}]}]}', "half a character"),
        (f"x = {'[' * 5000}", "data.toml: is nested deeper than"),
        ('[[datasets]]\n[[datasets.subsets]]\nimage_dir = "a\\u0000b"', "data.toml:3: "),
        (f'[[datasets]]\n[[datasets.subsets]]\nimage_dir = "{"x" * 300}"', "data.toml:3: "),
        ("[[datasets]]\nresolution = 63", "each side must be 64 to 16384 pixels"),
        ("[[datasets]]\nresolution = [64, 16385]", "each side must be 64 to 16384 pixels"),
        ('{"datasets": [{"token_warmup_step": Infinity}]}', "must be a finite number"),
    ],
)
def test_wrong_structure_is_a_problem_too(text: str, words: str, photos: Path) -> None:
    assert words in refusal(text, photos)


def test_styles_cannot_be_mixed(photos: Path) -> None:
    metadata = '[[datasets.subsets]]\nmetadata_file = "<D>/meta_abs.json"\n'
    assert "subsets[0]: mixes styles: it has no metadata_file" in refusal(one("") + metadata, photos)
    (first, second) = load(one("") + f"[[datasets]]\nresolution = 64\n{metadata}", photos)
    assert (first.style, second.style) == ("dreambooth", "fine_tuning")
    masked = one("", 'conditioning_data_dir = "<D>/cond"')
    another = '[[datasets.subsets]]\nimage_dir = "<D>/b"\n'
    assert "mixes styles" in refusal(masked + another, photos, masked_loss=True)
    (dataset,) = load(f"{masked}{another}is_reg = true\n", photos, masked_loss=True)
    assert [subset.masked for subset in dataset.subsets] == [True, False]


@pytest.mark.parametrize("key", ['class_tokens = "x"', 'caption_extension = ".txt"', "cache_info = false"])
def test_keys_of_dreambooth_are_refused_in_fine_tuning(key: str, photos: Path) -> None:
    metadata = '[[datasets.subsets]]\nmetadata_file = "<D>/meta_abs.json"\n'
    for text in (f"[[datasets]]\n{key}\n{metadata}", f"[[datasets]]\n{metadata}{key}\n"):
        assert "is not allowed in a fine-tuning dataset" in refusal(text, photos, resolution=(64, 64))
    (dataset,) = load(f"[general]\n{key}\n[[datasets]]\n{metadata}", photos, resolution=(64, 64))
    assert dataset.subsets[0].class_tokens is None


def test_masks_need_masked_loss_and_no_other_mask(photos: Path) -> None:
    text = one("", 'conditioning_data_dir = "<D>/cond"')
    assert "give --masked_loss" in refusal(text, photos)
    assert "does not go with conditioning_data_dir" in refusal(text + "alpha_mask = true\n", photos, masked_loss=True)
    both = text + 'metadata_file = "<D>/meta_abs.json"\n'
    assert "masks do not go with metadata_file" in refusal(both, photos, masked_loss=True)
    (dataset,) = load(text, photos, masked_loss=True, alpha_mask=True)
    assert not dataset.subsets[0].alpha_mask
    assert dataset.warnings == ("--alpha_mask = True: has no effect: the masks of conditioning_data_dir count instead",)


def test_commands_take_sd_scripts_styles(photos: Path) -> None:
    tuned = '[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nmetadata_file = "<D>/meta_abs.json"\n'
    message = refusal(one(""), photos, "fine_tune")
    assert "fine_tune does not train a dataset of DreamBooth style" in message
    assert "use train_db, train_network or train_textual_inversion" in message
    assert "use fine_tune, train_network or" in refusal(tuned, photos, "train_db")
    for command in ("train_network", "train_textual_inversion", "doctor"):
        assert [load(text, photos, command)[0].style for text in (one(""), tuned)] == ["dreambooth", "fine_tuning"]
    assert load(one(""), photos, "fine_tune", sdxl=True)
    assert accepted_styles("train_db", sdxl=True) == {"dreambooth"}
    assert "without its word" in refusal(one("caption_dropout_rate = 0.1"), photos, "train_textual_inversion")


def test_what_cached_latents_exclude(photos: Path) -> None:
    for key in ("random_crop = true", "color_aug = true", "face_crop_aug_range = [1, 2]"):
        assert "leave --cache_latents away" in refusal(one(key), photos, caches_latents=True)
    assert "--color_aug" in refusal(one(""), photos, caches_latents=True, color_aug=True)


def test_a_folder_or_file_twice_in_one_dataset(photos: Path) -> None:
    head = one("")
    message = refusal(f'{head}[[datasets.subsets]]\nimage_dir = "<D>/b/../a/"\n', photos)
    assert "subsets[0] once more" in message
    assert load(head + head.replace("512", "256"), photos)
    (photos / "link").symlink_to("a")
    (linked,) = load(head + '[[datasets.subsets]]\nimage_dir = "<D>/link"\n', photos)
    assert [subset.image_dir.name for subset in linked.subsets] == ["a", "link"]
    tuned = '[[datasets.subsets]]\nmetadata_file = "<D>/meta_abs.json"\n'
    assert "is the file of" in refusal(f"[[datasets]]\nresolution = 64\n{tuned}{tuned}", photos)
    assert "regularisation images (is_reg = true) only" in refusal(f"{head}is_reg = true\n", photos)


def test_folder_from_here_or_from_beside_the_file(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = '[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "a"\n'
    monkeypatch.chdir(folder(photos / "elsewhere"))
    assert load(text, photos)[0].subsets[0].image_dir == photos / "a"
    folder(photos / "elsewhere" / "a")
    assert load(text, photos)[0].subsets[0].image_dir == Path("a")


def test_folder_of_kohyas_folders_names_the_way_out(photos: Path) -> None:
    folder(photos / "img" / "10_sks frog")
    message = refusal('[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "<D>/img"\n', photos)
    assert "10_sks frog'" in message
    assert "num_repeats = 10" in message
    assert "class_tokens = 'sks frog'" in message


def test_bom_crlf_and_json(photos: Path) -> None:
    path = photos / "windows.toml"
    text = f'[[datasets]]\r\nresolution = 64\r\n[[datasets.subsets]]\r\nimage_dir = "{photos.as_posix()}/a"\r\n'
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_datasets(DatasetRequest("", path))[0].resolution == (64, 64)
    text = '{"datasets": [{"resolution": "64", "subsets": [{"image_dir": "<D>/a"}]}]}'
    assert "datasets[0].resolution = '64'" in refusal(text, photos)
    assert "stands twice" in refusal('{"datasets": [], "datasets": []}', photos)
    assert "data.json:1" in refusal('{"datasets": [}', photos)
    with pytest.raises(ConfigError, match=r"ends in \.toml or \.json"):
        load_datasets(DatasetRequest("", photos / "data.yaml"))


def test_schema_declares_every_key_with_description_default_and_range() -> None:
    schema = dataset_json_schema()
    subset = schema["$defs"]["SubsetTable"]
    assert set(subset["properties"]) == set(SubsetTable.model_fields)
    assert set(schema["$defs"]["DatasetTable"]["properties"]) == set(DatasetTable.model_fields)
    assert all(entry.get("description") for entry in subset["properties"].values())
    assert subset["properties"]["num_repeats"]["minimum"] == 0.001
    assert subset["properties"]["caption_dropout_rate"]["maximum"] == 1
    assert subset["properties"]["caption_extension"]["default"] == ".caption"
    assert subset["anyOf"] == [{"required": ["image_dir"]}, {"required": ["metadata_file"]}]
    assert subset["additionalProperties"] is False


def test_example_file_is_valid_and_explains_every_key(tmp_path: Path) -> None:
    for name in ("train/my_dog", "reg/dog", "train/portraits", "train/landscapes", "train/collection", "train/cut_out"):
        folder(tmp_path / name)
    (tmp_path / "train/meta_cap.json").write_text("{}")
    path = Path(shutil.copy(ROOT / "dataset_config.example.toml", tmp_path))
    identifier, captions, tuned, masked = load_datasets(DatasetRequest("train_network", path))
    assert [subset.class_tokens for subset in identifier.subsets] == ["sks dog", "dog"]
    assert captions.resolution == (512, 768)
    assert captions.subsets[0].shuffle_caption
    assert tuned.style == "fine_tuning"
    assert (masked.subsets[0].alpha_mask, masked.subsets[0].unmasked_weight) == (True, 0.1)
    assert not any(dataset.warnings for dataset in (identifier, captions, tuned, masked))
    text = path.read_text(encoding="utf-8")
    fields = {**DatasetTable.model_fields, **SubsetTable.model_fields}
    assert {name for name in fields.keys() - {"subsets"} if f"{name} = " not in text} == set()


USUAL = """
[general]
shuffle_caption = true
caption_extension = '.txt'
keep_tokens = 1
[[datasets]]
resolution = 512
batch_size = 4
keep_tokens = 2
  [[datasets.subsets]]
  image_dir = '<D>/a'
  class_tokens = 'hoge girl'
  [[datasets.subsets]]
  image_dir = '<D>/b'
  keep_tokens = 3
  [[datasets.subsets]]
  is_reg = true
  image_dir = '<D>/reg'
  class_tokens = 'human'
[[datasets]]
resolution = [768, 768]
batch_size = 2
enable_bucket = true
min_bucket_reso = 256
max_bucket_reso = 1024
bucket_reso_steps = 64
bucket_no_upscale = false
  [[datasets.subsets]]
  image_dir = '<D>/a'
  metadata_file = '<D>/meta_rel.json'
"""


def test_usual_configurations_give_no_warning(photos: Path) -> None:
    assert [dataset.warnings for dataset in load(USUAL, photos)] == [(), ()]


@pytest.mark.parametrize(
    ("keys", "subset", "words"),
    [
        ("network_multiplier = 0.5", "", "network_multiplier = 0.5: has no effect"),
        ("", "cache_info = true", "cache_info = True: has no effect"),
        ("keep_tokens = 1", "", "keep_tokens = 1: has no effect: tags stay as they are"),
        ("token_warmup_min = 2", "", "token_warmup_step is 0"),
        ("min_bucket_reso = 320\nbucket_reso_steps = 32", "", "= 320, bucket_reso_steps: have no effect: enable_"),
        ("enable_bucket = true\nbucket_no_upscale = true\nmax_bucket_reso = 2048", "", "buckets have the images' own"),
        ("enable_bucket = true\nface_crop_aug_range = [1, 2]", "", "faces are cropped only without enable_bucket"),
        ('bucket_policy = "merge"', "", "bucket_policy = 'merge': has no effect"),
        ("validation_seed = 3", "", "validation_split is 0"),
        ("unmasked_weight = 0.5", "", "neither alpha_mask nor conditioning_data_dir"),
        ('caption_column = "text"', "", "only .jsonl and .parquet metadata has columns"),
        ("enable_bucket = true\nmax_bucket_reso = 512", "", "leaves no room for longer sides"),
        ("caption_dropout_every_n_epochs = 1", "", "drops every caption"),
        ("loss_weight = 0", "", "nothing is learnt"),
    ],
)
def test_what_changes_nothing_is_told_once(keys: str, subset: str, words: str, photos: Path) -> None:
    (dataset,) = load(one(keys, subset), photos)
    (warning,) = dataset.warnings
    assert words in warning
    assert warning.count("data.toml:") == 1


def test_a_key_that_serves_one_subset_is_no_warning(photos: Path) -> None:
    text = one("keep_tokens = 1", "shuffle_caption = true") + '[[datasets.subsets]]\nimage_dir = "<D>/b"\n'
    assert load(text, photos)[0].warnings == ()
    assert load(one(""), photos, keep_tokens=2)[0].warnings[0].startswith("--keep_tokens = 2: has no effect")
