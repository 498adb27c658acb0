"""The dataset file: levels, inheritance, every problem at once with its place, JSON Schema."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sd_train.data.config import dataset_json_schema, load_dataset_config
from sd_train.data.keys import DatasetTable, SubsetTable
from sd_train.errors import ConfigError

ROOT = Path(__file__).parents[1]
GOLDEN = json.loads((Path(__file__).parent / "data/dataset_config.json").read_text(encoding="utf-8"))
MATRIX: list[dict[str, Any]] = [case for case in GOLDEN["cases"] if "scale_v_pred" not in case["name"]]
COMMAND_LINE = {"batch_size": 1, "num_repeats": 1, "caption_extension": ".caption"}
REFUSED_ALTHOUGH_SD_SCRIPTS_ACCEPTS = {
    # values without sense
    "resolution bool", "resolution negative", "batch_size bool", "caption_extension empty", "caption_separator empty",
    "keep_tokens negative", "dropout 2.0", "validation_split 1.5", "empty folder plus good one",
    # not yet supported
    "fine-tuning rel + image_dir", "fine-tuning abs", "fine-tuning jsonl", "metadata_file with class_tokens in general",
    "fine-tuning alpha_mask", "color flip random", "face_crop", "face_crop reversed", "alpha_mask subset",
    "resize_interpolation lanczos", "cli masked_loss + conditioning_data_dir",
    "cli --face_crop_aug_range",
}  # fmt: skip


def folder(path: Path, images: int = 1) -> Path:
    path.mkdir(parents=True)
    for number in range(images):
        Image.new("RGB", (8, 8)).save(path / f"{number}.png")
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in "abc":
        folder(tmp_path / name)
    folder(tmp_path / "reg")
    (tmp_path / "empty").mkdir()
    (tmp_path / "meta_rel.json").write_text("{}")
    return tmp_path


def load(text: str, tmp_path: Path, **fallbacks: object) -> Any:
    path = tmp_path / ("data.json" if text.startswith("{") else "data.toml")
    path.write_text(text.replace("<D>", tmp_path.as_posix()), encoding="utf-8")
    return load_dataset_config(path, fallbacks)


def refusal(text: str, tmp_path: Path, **fallbacks: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load(text, tmp_path, **fallbacks)
    return str(caught.value)


def typed(argv: list[str]) -> dict[str, object]:
    names = {"--train_batch_size": "batch_size"}
    words: dict[str, object] = {"192,256": (192, 256), "1.0,2.0": (1.0, 2.0)}
    values: dict[str, object] = {}
    for word in argv:
        if word.startswith("--"):
            name = names.get(word, word[2:])
            values[name] = True
        else:
            values[name] = words.get(word) or (int(word) if word.isdigit() else word)
    return values


@pytest.mark.parametrize("case", MATRIX, ids=[case["name"] for case in MATRIX])
def test_accepts_and_resolves_as_sd_scripts(case: dict[str, Any], photos: Path) -> None:
    accepted = case["accepted"] and case["name"] not in REFUSED_ALTHOUGH_SD_SCRIPTS_ACCEPTS
    fallbacks = {**COMMAND_LINE, **typed(case["argv"])}
    if not accepted:
        message = refusal(case["text"], photos, **fallbacks)
        assert "data.toml" in message or "--face_crop_aug_range" in message
        return
    datasets = load(case["text"], photos, **fallbacks)
    for found, expected in zip(datasets, case["datasets"], strict=True):
        assert found.resolution == (expected.pop("width"), expected.pop("height"))
        for ours, theirs in zip(found.subsets, expected.pop("subsets"), strict=True):
            assert {key: getattr(ours, key) for key in theirs} == theirs
        known = {key: value for key, value in expected.items() if value is not None}
        assert {key: getattr(found, key) for key in known} == known


def test_all_problems_come_at_once_with_file_and_line(photos: Path) -> None:
    message = refusal(
        '[general]\nkeep_token = 1\ncaption_dropout_rate = 1.5\n[[datasets]]\nbatch_size = true\n'
        '[[datasets.subsets]]\nimage_dir = "<D>/a"\nbatch_size = 2\nflip_aug = "yes"\n'
        '[[datasets.subsets]]\nimage_dir = "<D>/a"\n[[datasets.subsets]]\nimage_dir = "<D>/nowhere"\n',
        photos,
    )
    for line, words in {
        2: "did you mean 'keep_tokens'?", 3: "must be at most 1", 4: "has no resolution", 5: "must be a whole number",
        8: "move it to [[datasets]] or [general]", 9: "must be true or false", 10: "once more", 13: "no such folder",
    }.items():  # fmt: skip
        assert any(f"data.toml:{line}:" in text and words in text for text in message.splitlines()), (line, message)
    assert message.startswith("8 problems:")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ("min_bucket_reso = 600", "a side is shorter than min_bucket_reso (600)"),
        ("max_bucket_reso = 448", "a side is longer than max_bucket_reso (448)"),
        ("min_bucket_reso = 32", "must be at least bucket_reso_steps"),
        ("bucket_reso_steps = 96", "multiple of 64"),
        ("validation_split = 0.5", "not yet supported"),
        ("cache_latents = true", "--cache_latents"),
        ("batch_size = 65537", "must be at most 65536"),
        ("num_repeats = 1000001", "must be at most 1000000"),
        ("max_bucket_reso = 32769", "must be at most 32768"),
    ],
)
def test_rules_of_a_dataset(keys: str, words: str, photos: Path) -> None:
    text = f'[[datasets]]\nresolution = 512\nenable_bucket = true\n{keys}\n[[datasets.subsets]]\nimage_dir = "<D>/a"\n'
    assert words in refusal(text, photos)


def test_bucket_limits_are_rounded_and_only_checked_with_buckets(photos: Path) -> None:
    text = '[[datasets]]\nresolution = 512\n{}min_bucket_reso = 300\nmax_bucket_reso = {}\n[[datasets.subsets]]\n'
    text += 'image_dir = "<D>/a"\n'
    (with_buckets,) = load(text.format("enable_bucket = true\n", 1000), photos)
    assert (with_buckets.min_bucket_reso, with_buckets.max_bucket_reso) == (256, 1024)
    (without,) = load(text.format("", 100), photos)
    assert (without.min_bucket_reso, without.max_bucket_reso) == (300, 100)


def test_unsupported_keys_at_their_defaults_are_accepted(photos: Path) -> None:
    (dataset,) = load(
        "[general]\ncolor_aug = true\nvalidation_split = 0\n[[datasets]]\nresolution = 64\n[[datasets.subsets]]\n"
        'image_dir = "<D>/a"\ncolor_aug = false\nalpha_mask = false\ncustom_attributes = {}\n',
        photos,
    )
    assert len(dataset.subsets) == 1


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


def test_mixed_styles_and_regularisation_alone(photos: Path) -> None:
    head = '[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "<D>/a"\n'
    assert "mixes styles" in refusal(f'{head}[[datasets.subsets]]\nmetadata_file = "m.json"\n', photos)
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
    assert load_dataset_config(path, {})[0].resolution == (64, 64)
    text = '{"datasets": [{"resolution": "64", "subsets": [{"image_dir": "<D>/a"}]}]}'
    assert "datasets[0].resolution = '64'" in refusal(text, photos)
    assert "stands twice" in refusal('{"datasets": [], "datasets": []}', photos)
    assert "data.json:1" in refusal('{"datasets": [}', photos)
    with pytest.raises(ConfigError, match=r"ends in \.toml or \.json"):
        load_dataset_config(photos / "data.yaml", {})


def test_schema_declares_every_key_with_description_default_and_range() -> None:
    schema = dataset_json_schema()
    subset = schema["$defs"]["SubsetTable"]
    assert set(subset["properties"]) == set(SubsetTable.model_fields)
    assert set(schema["$defs"]["DatasetTable"]["properties"]) == set(DatasetTable.model_fields)
    assert all(entry.get("description") for entry in subset["properties"].values())
    assert subset["properties"]["num_repeats"]["minimum"] == 1
    assert subset["properties"]["caption_dropout_rate"]["maximum"] == 1
    assert subset["properties"]["caption_extension"]["default"] == ".caption"
    assert subset["required"] == ["image_dir"]
    assert subset["additionalProperties"] is False


def test_example_file_is_valid_and_explains_every_supported_key(tmp_path: Path) -> None:
    for name in ("train/my_dog", "reg/dog", "train/portraits", "train/landscapes"):
        folder(tmp_path / name)
    path = Path(shutil.copy(ROOT / "dataset_config.example.toml", tmp_path))
    first, second = load_dataset_config(path, {})
    assert [subset.class_tokens for subset in first.subsets] == ["sks dog", "dog"]
    assert second.resolution == (512, 768)
    assert second.subsets[0].shuffle_caption
    text = path.read_text(encoding="utf-8")
    fields = {**DatasetTable.model_fields, **SubsetTable.model_fields}
    supported = {name for name, field in fields.items() if "upported" not in (field.description or "")}
    assert {name for name in supported - {"subsets"} if f"{name} = " not in text} == set()


def test_keys_without_effect_are_accepted_with_a_warning(photos: Path) -> None:
    text = "network_multiplier = 0.5\n[[datasets.subsets]]\nimage_dir = '<D>/a'\ncache_info = true\n"
    (dataset,) = load(f"[[datasets]]\nresolution = 512\n{text}", photos)
    assert [warning.split(": ")[1].split(" = ")[0] for warning in dataset.warnings] == [
        "datasets[0].network_multiplier",
        "datasets[0].subsets[0].cache_info",
    ]
