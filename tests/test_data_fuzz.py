"""Dataset files with anything in them: each is accepted, or refused with a `ConfigError` that names the wrong key."""

from __future__ import annotations

import copy
import datetime
import json
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from sd_train.data.config import DatasetRequest, load_datasets
from sd_train.data.keys import DatasetTable, SubsetTable
from sd_train.errors import ConfigError

Place = tuple[str | int, ...]
FULL: dict[str, Any] = {
    "general": {"caption_extension": ".txt", "shuffle_caption": True, "keep_tokens": 1, "flip_aug": False},
    "datasets": [
        {
            "resolution": 512,
            "batch_size": 2,
            "enable_bucket": True,
            "min_bucket_reso": 256,
            "max_bucket_reso": 1024,
            "validation_split": 0.1,
            "subsets": [
                {"image_dir": "a", "num_repeats": 10, "class_tokens": "sks dog", "caption_dropout_rate": 0.1},
                {"image_dir": "b", "is_reg": True, "face_crop_aug_range": [1.0, 3.0]},
            ],
        },
        {
            "resolution": [512, 768],
            "bucket_policy": "merge",
            "subsets": [{"image_dir": "a", "metadata_file": "meta.json", "token_warmup_step": 0.5}],
        },
    ],
}
MASKED: dict[str, Any] = {
    "datasets": [
        {"resolution": 64, "subsets": [{"image_dir": "a", "conditioning_data_dir": "b", "unmasked_weight": 0.5}]}
    ]
}
TABLES: list[Place] = [
    (), ("general",), ("datasets", 0), ("datasets", 1), ("datasets", 0, "subsets", 0), ("datasets", 0, "subsets", 1),
    ("datasets", 1, "subsets", 0),
]  # fmt: skip
KEYS = sorted({*SubsetTable.model_fields, *DatasetTable.model_fields, "general", "datasets", "seed", "cache_latents"})
REQUESTS = [
    DatasetRequest("train_network", fallbacks={"batch_size": 1, "num_repeats": 1}),
    DatasetRequest("doctor", masked_loss=True),
    DatasetRequest("train_textual_inversion", caches_latents=True, step_multiple=32),
]

words = st.sampled_from(
    ["", ".", "a", "b", "a/", "empty", "meta.json", "meta.jsonl", "nowhere", "true", "512", "lanczos", "\0", ","]
)
texts = st.one_of(words, st.text(max_size=12), st.just("x" * 5000), st.text(st.characters(), max_size=3))
numbers = st.one_of(
    st.sampled_from([0, 1, -1, 2, 63, 64, 96, 448, 512, 1024, 65_536, 2**31, 2**64, 10**50, 0.5, 1.5, -0.0, 1e308]),
    st.integers(),
    st.floats(),
)
leaves = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(st.sampled_from(KEYS), texts), inner, max_size=3)
    ),
    max_leaves=6,
)
dates = st.sampled_from([datetime.date(2024, 2, 29), datetime.datetime(2024, 2, 29, 12), datetime.time(12, 30)])
names = st.one_of(st.sampled_from(KEYS), st.sampled_from(KEYS), texts)


@pytest.fixture(scope="module", autouse=True)
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A current folder with images, a folder without and metadata files."""
    root = tmp_path_factory.mktemp("fuzz")
    for name in ("a", "b", "empty"):
        (root / name).mkdir()
    for name in ("a/0.png", "b/0.png"):
        Image.new("RGB", (8, 8)).save(root / name)
    for name in ("meta.json", "meta.jsonl"):
        (root / name).write_text("{}")
    before = Path.cwd()
    os.chdir(root)
    yield root
    os.chdir(before)


def at(data: Any, place: Place) -> Any:
    for step in place:
        data = data[step]
    return data


def key(name: str) -> str:
    return name if name.isascii() and name.replace("_", "").replace("-", "").isalnum() else quoted(name)


def quoted(text: str) -> str:
    """`text` as a basic string of TOML."""
    escaped = (f"\\u{ord(c):04x}" if ord(c) < 32 or ord(c) == 127 or c in '"\\' else c for c in text)
    return f'"{"".join(escaped)}"'


def toml(value: Any) -> str:
    """`value` as inline TOML; None, which it has not, as an empty text."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key(name)} = {toml(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return quoted(value or "") if isinstance(value, str | None) else repr(value)


def as_toml(data: dict[str, Any]) -> str:
    """`data` with a line for each key, and tables as people write them where that is possible."""
    lines = [f"{key(name)} = {toml(value)}" for name, value in data.items() if name != "datasets"]
    datasets = data.get("datasets")
    if not isinstance(datasets, list) or not all(isinstance(table, dict) for table in datasets):
        return "\n".join([*lines, *([f"datasets = {toml(datasets)}"] if "datasets" in data else [])])
    for table in datasets:
        lines.append("[[datasets]]")
        subsets = table.get("subsets")
        inline = not isinstance(subsets, list) or not all(isinstance(subset, dict) for subset in subsets)
        lines += [f"{key(name)} = {toml(value)}" for name, value in table.items() if inline or name != "subsets"]
        for subset in [] if inline else subsets:
            lines += ["[[datasets.subsets]]", *(f"{key(name)} = {toml(value)}" for name, value in subset.items())]
    return "\n".join(lines)


def refusal(content: str | bytes, name: str, request: DatasetRequest) -> str | None:
    """What is said about a file with `content`; None if it is accepted. Anything but a `ConfigError` is a failure."""
    path = Path(name)
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        datasets = load_datasets(replace(request, dataset_config=path))
    except ConfigError as error:
        return str(error)
    assert all(dataset.subsets and min(dataset.resolution) >= 64 for dataset in datasets)
    return None


def test_what_is_mutated_is_valid() -> None:
    assert refusal(json.dumps(FULL), "data.json", REQUESTS[0]) is None
    assert refusal(as_toml(FULL), "data.toml", REQUESTS[0]) is None
    assert refusal(as_toml(MASKED), "data.toml", REQUESTS[1]) is None


@settings(max_examples=1000, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(TABLES), names, values, st.sampled_from(REQUESTS[:2]))
@example(("datasets", 0, "subsets", 1), "image_dir", "a", REQUESTS[0])
@example(("datasets", 0), "bucket_reso_steps", 10**50, REQUESTS[0])
@example(("general",), "custom_attributes", {"a": float("nan")}, REQUESTS[0])
@example(("general",), "\ud800", 1, REQUESTS[0])
def test_one_key_of_a_json_file(place: Place, name: str, value: object, request: DatasetRequest) -> None:
    data = copy.deepcopy(FULL)
    at(data, place)[name] = value
    message = refusal(json.dumps(data), "data.json", request)
    assert message is None or name in message


@settings(max_examples=600, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(TABLES), names, values | dates)
@example(("datasets", 0, "subsets", 0), "custom_attributes", {"a": datetime.date(2024, 1, 1)})
def test_one_key_of_a_toml_file(place: Place, name: str, value: object) -> None:
    data = copy.deepcopy(FULL)
    at(data, place)[name] = value
    message = refusal(as_toml(data), "data.toml", REQUESTS[0])
    # No file with half a character is UTF-8, so nothing of it can be told.
    assert message is None or name in message or "is not UTF-8" in message


@pytest.mark.parametrize("place", TABLES, ids=repr)
def test_a_key_that_is_left_out(place: Place) -> None:
    for name in at(FULL, place):
        data = copy.deepcopy(FULL)
        del at(data, place)[name]
        message = refusal(json.dumps(data), "data.json", REQUESTS[0])
        assert (message is None) == (name not in ("datasets", "subsets", "resolution", "image_dir")) or name in (
            "image_dir", "metadata_file",
        )  # fmt: skip
        assert message is None or name in message


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.sampled_from(TABLES), names, values), min_size=2, max_size=6), st.sampled_from(REQUESTS))
def test_several_keys(changes: list[tuple[Place, str, object]], request: DatasetRequest) -> None:
    data = copy.deepcopy(FULL)
    for place, name, value in changes:
        try:
            at(data, place)[name] = value
        except (KeyError, IndexError, TypeError):
            continue
    refusal(json.dumps(data), "data.json", request)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(TABLES[1:]), values)
def test_a_table_that_is_something_else(place: Place, value: object) -> None:
    data = copy.deepcopy(FULL)
    at(data, place[:-1])[place[-1]] = value
    message = refusal(json.dumps(data), "data.json", REQUESTS[0])
    outer = next(step for step in reversed(place) if isinstance(step, str))
    assert message is None or outer in message


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(st.booleans(), st.integers(0, 400), st.integers(0, 8), st.binary(max_size=6))
def test_bytes_in_the_middle(is_json: bool, start: int, length: int, garbage: bytes) -> None:
    content = (json.dumps(FULL) if is_json else as_toml(FULL)).encode()
    changed = content[:start] + garbage + content[start + length :]
    refusal(changed, "data.json" if is_json else "data.toml", REQUESTS[0])


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(values | st.binary(max_size=30))
def test_another_file_altogether(value: object) -> None:
    refusal(value if isinstance(value, bytes) else json.dumps(value), "data.json", REQUESTS[0])
