"""Taggers in ONNX: which files they consist of, what they are shown of an image, and what their outputs stand for.

The kinds are told apart by the list of tags beside the model:

list               colours  values         padding to a square     outputs
selected_tags.csv  BGR      0 to 255       white                   probabilities (WD14, SmilingWolf's v1.4 to v3)
tags.txt           RGB      0 to 1         the edge's own colours  probabilities (DeepDanbooru)
tag_mapping.json   BGR      -1 to 1        white                   logits (cl_tagger)

Side and order of the dimensions (height, width, colour or colour, height, width) are those of the model's input.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from sd_train.config.textfile import read_text
from sd_train.data.resize import Pixels
from sd_train.errors import ConfigError, ModelError
from sd_train.families.hub import Wanted, find_model
from sd_train.prepare.tag_words import Category, Label

DEFAULT_TAGGER = "SmilingWolf/wd-v1-4-convnext-tagger-v2"
PUBLISHED = (
    "SmilingWolf/wd-v1-4-vit-tagger", "SmilingWolf/wd-v1-4-convnext-tagger", "SmilingWolf/wd-v1-4-vit-tagger-v2",
    "SmilingWolf/wd-v1-4-convnext-tagger-v2", "SmilingWolf/wd-v1-4-convnextv2-tagger-v2",
    "SmilingWolf/wd-v1-4-swinv2-tagger-v2", "SmilingWolf/wd-v1-4-moat-tagger-v2", "SmilingWolf/wd-vit-tagger-v3",
    "SmilingWolf/wd-convnext-tagger-v3", "SmilingWolf/wd-swinv2-tagger-v3", "SmilingWolf/wd-vit-large-tagger-v3",
    "SmilingWolf/wd-eva02-large-tagger-v3", "cella110n/cl_tagger/cl_tagger_1_02",
)  # fmt: skip
"""What `--repo_id` may name on the hub; a third part is a folder of the repository."""

_CATEGORIES: dict[str, Category] = {
    "9": "rating", "0": "general", "4": "character", "1": "artist", "3": "copyright", "5": "meta",
}  # fmt: skip
"""Of `selected_tags.csv`: Danbooru's numbers, and 9."""
_RATING_PREFIX = "rating:"
_MODEL = "model.onnx"
_USUAL_SIDE = 448
_MOST_SIDE = 4096


@dataclass(frozen=True)
class Kind:
    """How taggers with one list of tags are to be used."""

    tags: str
    """File name of the list."""
    read: Callable[[Path], list[Label]]
    bgr: bool
    scale: float
    """Values are (level * scale + shift), of 255 levels."""
    shift: float
    edge: Literal["white", "repeated"]
    logits: bool = False


@dataclass(frozen=True)
class TaggerFiles:
    """Where a tagger is."""

    model: Path
    tags: Path
    kind: Kind


def find_tagger(repo_id: str, model_dir: Path, anew: bool) -> TaggerFiles:
    """The tagger `repo_id`: a folder, else in `model_dir` as sd-scripts keeps it, else from the hub or its cache.

    Raises:
        ModelError: if it is nowhere, or not whole.
    """
    if os.path.isfile(repo_id) and repo_id.endswith(".onnx"):
        return _files_in(Path(repo_id).parent, Path(repo_id))
    if os.path.isdir(repo_id):
        return _files_in(Path(repo_id))
    kept = model_dir / repo_id.replace("/", "_")
    if not anew and _is_whole(kept):
        return _files_in(kept)
    name, folder = repo_id, ""
    if repo_id.count("/") == 2:
        name, _, folder = repo_id.rpartition("/")

    def choose(names: Sequence[str]) -> list[str]:
        wanted = {f"{folder}/{file}".lstrip("/") for file in (_MODEL, *(kind.tags for kind in KINDS))}
        chosen = [file for file in names if file in wanted]
        return chosen if any(file.endswith(_MODEL) for file in chosen) and len(chosen) > 1 else []

    give = "a folder with model.onnx and its list of tags, or a hub id (owner/name)"
    wanted = Wanted("tagger in ONNX", give, choose, lambda place: _is_whole(place / folder))
    return _files_in(find_model(name, wanted=wanted, anew=anew) / folder)


def _is_whole(folder: Path) -> bool:
    return (folder / _MODEL).is_file() and any((folder / kind.tags).is_file() for kind in KINDS)


def _files_in(folder: Path, model: Path | None = None) -> TaggerFiles:
    """The tagger in `folder`: `model`, `model.onnx` or else its only ONNX file.

    Raises:
        ModelError: if there is none, or no list of tags.
    """
    if model is None:
        found = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".onnx")
        usual = [path for path in found if path.name == _MODEL]
        if len(usual or found) != 1:
            held = "several ONNX models" if found else "no ONNX model"
            raise ModelError(f"{folder}: holds {held}; give the folder of one tagger, or its .onnx file")
        model = (usual or found)[0]
    for kind in KINDS:
        if (folder / kind.tags).is_file():
            return TaggerFiles(model, folder / kind.tags, kind)
    lists = ", ".join(kind.tags for kind in KINDS)
    raise ModelError(f"{folder}: holds no list of the tagger's tags ({lists}); put that of {model.name} there")


def _read_selected_tags(path: Path) -> list[Label]:
    rows = list(csv.reader(read_text(path, ModelError).splitlines()))
    header = rows[0] if rows else []
    if "name" not in header or "category" not in header:
        raise ModelError(f"{path}: its first line names no columns name and category; put the tagger's own file there")
    name, category = header.index("name"), header.index("category")
    labels = list[Label]()
    for number, row in enumerate(rows[1:], start=2):
        if not row:
            continue
        if len(row) <= max(name, category):
            raise ModelError(f"{path}:{number}: has {len(row)} columns; put the tagger's own file there")
        # What a later release calls otherwise is a tag like others.
        labels.append(Label(row[name], _CATEGORIES.get(row[category], "general")))
    return labels


def _read_tags_txt(path: Path) -> list[Label]:
    """A tag a line; `tags-character.txt` beside it, if it is there, says which of them are characters."""
    names = [line.strip() for line in read_text(path, ModelError).splitlines() if line.strip()]
    beside = path.with_name("tags-character.txt")
    characters = {line.strip() for line in read_text(beside, ModelError).splitlines()} if beside.is_file() else set()
    return [
        Label(name.removeprefix(_RATING_PREFIX), "rating") if name.startswith(_RATING_PREFIX)
        else Label(name, "character" if name in characters else "general")
        for name in names
    ]  # fmt: skip


def _read_tag_mapping(path: Path) -> list[Label]:
    """`{"0": {"tag": NAME, "category": CATEGORY}, ...}` by the number of the output."""
    known: set[str] = {"rating", "quality", "general", "character", "copyright", "artist", "meta", "model"}
    try:
        content = json.loads(read_text(path, ModelError))
        entries = [content[str(number)] for number in range(len(content))]
        pairs = [(str(entry["tag"]), str(entry["category"]).lower()) for entry in entries]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ModelError(f"{path}: is no list of tags by number; put the tagger's own file there") from None
    return [Label(tag, cast(Category, category) if category in known else "general") for tag, category in pairs]


KINDS = (
    Kind("selected_tags.csv", _read_selected_tags, bgr=True, scale=1.0, shift=0.0, edge="white"),
    Kind("tag_mapping.json", _read_tag_mapping, bgr=True, scale=2 / 255, shift=-1.0, edge="white", logits=True),
    Kind("tags.txt", _read_tags_txt, bgr=False, scale=1 / 255, shift=0.0, edge="repeated"),
)


class Tagger:
    """A tagger, loaded."""

    def __init__(self, files: TaggerFiles) -> None:
        """
        Raises:
            ConfigError: if onnxruntime is not installed.
            ModelError: if the model cannot be loaded, or is no tagger with these tags.
        """
        self.labels = files.kind.read(files.tags)
        self._files, self._kind = files, files.kind
        self._session = _load(files.model)
        inputs = self._session.get_inputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 4:
            raise ModelError(f"{files.model}: does not take one image; give a tagger")
        self._input, shape = inputs[0], inputs[0].shape
        self._colours_first = shape[1] == 3 and shape[3] != 3
        sides = [side for side in (shape[2:4] if self._colours_first else shape[1:3]) if isinstance(side, int)]
        self.side = sides[0] if sides and 0 < sides[0] <= _MOST_SIDE else _USUAL_SIDE
        """Of the square that the model is shown, in pixels."""
        self.batch_size = shape[0] if isinstance(shape[0], int) and shape[0] > 0 else None
        """Of a model that takes no other number of images."""

    def see(self, pixels: Pixels) -> NDArray[np.float32]:
        """What the model is shown of an image [height, width, 3] in RGB: a square, its values those of the kind."""
        square = fit_square(pixels, self.side, self._kind.edge)
        coloured = square[:, :, ::-1] if self._kind.bgr else square
        values = coloured.astype(np.float32) * np.float32(self._kind.scale) + np.float32(self._kind.shift)
        return np.ascontiguousarray(values.transpose(2, 0, 1) if self._colours_first else values)

    def __call__(self, squares: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """The probabilities [image, label] of what `see` made of some images.

        Raises:
            ModelError: if the model fails, or has another number of outputs than its list has tags.
        """
        batch = np.stack(squares)
        if self.batch_size is not None and len(batch) < self.batch_size:
            batch = np.concatenate([batch, np.zeros((self.batch_size - len(batch), *batch.shape[1:]), np.float32)])
        if "float16" in self._input.type:
            batch = batch.astype(np.float16)
        try:
            found = np.asarray(self._session.run(None, {self._input.name: batch})[0])
        except Exception as problem:  # onnxruntime's own classes have no base but this
            raise ModelError(f"{self._files.model}: fails ({_first_line(problem)}); give "
                             "another tagger, or a smaller --batch_size if the memory is full") from None  # fmt: skip
        outputs = found.astype(np.float32).reshape(len(batch), -1)[: len(squares)]
        if outputs.shape[1] != len(self.labels):
            raise ModelError(
                f"{self._files.model}: has {outputs.shape[1]} outputs, but {self._files.tags.name} lists "
                f"{len(self.labels)} tags; put the model's own list there"
            )
        return outputs if not self._kind.logits else 1 / (1 + np.exp(-outputs.clip(-30, 30)))


def fit_square(pixels: Pixels, side: int, edge: Literal["white", "repeated"]) -> Pixels:
    """`pixels` [height, width, 3] in the middle of a square with `side`, padded and then scaled."""
    height, width = pixels.shape[:2]
    longest = max(height, width)
    # Scaled before it is padded, the same square takes less memory where one side is very long.
    fitted = (max(1, round(height * side / longest)), max(1, round(width * side / longest)))
    method = cv2.INTER_AREA if longest > side else cv2.INTER_LANCZOS4
    if fitted != (height, width):
        pixels = cast(Pixels, cv2.resize(pixels, fitted[::-1], interpolation=method))
    top, left = (side - fitted[0]) // 2, (side - fitted[1]) // 2
    around = ((top, side - fitted[0] - top), (left, side - fitted[1] - left), (0, 0))
    if edge == "white":
        return np.pad(pixels, around, constant_values=255)
    return np.pad(pixels, around, mode="edge")


def _load(model: Path) -> Any:
    try:
        import onnxruntime
    except ImportError:
        raise ConfigError("onnxruntime is not installed; pip install 'sd-train[tag]', or onnxruntime-gpu for a GPU"
                          ) from None  # fmt: skip
    onnxruntime.set_default_logger_severity(3)
    there = onnxruntime.get_available_providers()
    wanted = ("CUDAExecutionProvider", "ROCMExecutionProvider", "DmlExecutionProvider", "CPUExecutionProvider")
    options = onnxruntime.SessionOptions()
    if threads := os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]:
        options.intra_op_num_threads = int(threads) if re.fullmatch(r"[1-9]\d{0,3}", threads) else 0
    try:
        return onnxruntime.InferenceSession(str(model), options, providers=[name for name in wanted if name in there])
    except Exception as problem:  # onnxruntime's own classes have no base but this
        raise ModelError(f"{model}: cannot be loaded ({_first_line(problem)}); download it again") from None


def _first_line(problem: Exception) -> str:
    return (str(problem) or type(problem).__name__).splitlines()[0]
