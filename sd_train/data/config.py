"""Datasets as a run asks for them: dataset files (TOML, JSON) or folders, resolved to frozen values.

`[general]` > `[[datasets]]` > `[[datasets.subsets]]`: a key's value comes from the innermost table that sets it, else
from the command line, else it is the default, as in sd-scripts (`BlueprintGenerator`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from sd_train.data.folders import holds_image, no_images
from sd_train.data.keys import dataset_json_schema
from sd_train.data.legacy import FolderSource, folder_source, metadata_source
from sd_train.data.settings import DatasetConfig, SubsetConfig
from sd_train.data.styles import accepted_styles, check_command, find_style
from sd_train.data.validation import (
    Effects,
    Key,
    Source,
    Tables,
    check_buckets,
    dataset_effects,
    read_source,
    subset_effects,
    validate,
)
from sd_train.errors import ConfigError, Problems

RENAMED_OPTIONS = {"dataset_repeats": "num_repeats", "train_batch_size": "batch_size"}
FALLBACKS = {field.name for kind in (DatasetConfig, SubsetConfig) for field in fields(kind)} - {
    "image_dir", "metadata_file", "conditioning_data_dir", "is_reg", "class_tokens", "loss_weight",
    "custom_attributes", "templates", "style", "subsets", "warnings", "origin",
}  # fmt: skip
"""Keys that a run option of the same meaning stands behind."""
METADATA_EXTENSIONS = (".json", ".jsonl", ".parquet")

__all__ = [
    "FALLBACKS", "RENAMED_OPTIONS", "DatasetConfig", "DatasetRequest", "SubsetConfig", "dataset_fallbacks",
    "dataset_json_schema", "load_datasets",
]  # fmt: skip

_DROPOUT = ("caption_dropout_rate", "caption_dropout_every_n_epochs", "caption_tag_dropout_rate")


@dataclass(frozen=True)
class DatasetRequest:
    """Which datasets a command is asked to use."""

    command: str
    """A training command, which takes some styles; any other name takes all."""
    dataset_config: Path | None = None
    """.toml or .json file; the three folders and files below are then not used, as in sd-scripts."""
    train_data_dir: Path | None = None
    """Holds folders named REPEATS_CLASS; with `in_json` where its paths start."""
    reg_data_dir: Path | None = None
    in_json: Path | None = None
    fallbacks: Mapping[str, object] = field(default_factory=dict)
    """Typed values of the command line by the names of the dataset file, None for unset."""
    templates: tuple[str, ...] = ()
    """Sentences in place of the captions of what is learned."""
    masked_loss: bool = False
    caches_latents: bool = False
    sdxl: bool = False
    step_multiple: int = 64
    """Of which `bucket_reso_steps` must be a multiple: pixels that the U-Net can halve (64, SDXL 32)."""


def load_datasets(request: DatasetRequest) -> tuple[DatasetConfig, ...]:
    """Read and check the datasets that `request` asks for.

    A relative path in a dataset file starts at the current folder, as in sd-scripts, or at the file's folder if it
    exists only there. What holds no image, and what the command does not take, is refused; warnings about all
    datasets stand with the first.

    Raises:
        ConfigError: with every problem, each with file and line (or flag), key, rule and way out.
    """
    problems = Problems()
    warnings: list[str] = []
    source = _source(request, problems, warnings)
    datasets = _Reader(source, request, problems).datasets()
    problems.raise_if_any(ConfigError)
    first = replace(datasets[0], warnings=(*warnings, *datasets[0].warnings))
    return (first, *datasets[1:])


def dataset_fallbacks(options: Mapping[str, object]) -> dict[str, object]:
    """What a dataset file falls back to: run options under the names that they have in the file."""
    fallbacks = {RENAMED_OPTIONS.get(name, name): value for name, value in options.items()}
    return {name: value for name, value in fallbacks.items() if name in FALLBACKS}


def _source(request: DatasetRequest, problems: Problems, warnings: list[str]) -> Source:
    """The tables of the dataset file, or those that the folders and the metadata file come to."""
    train, reg, in_json = request.train_data_dir, request.reg_data_dir, request.in_json
    if request.dataset_config is not None:
        return read_source(request.dataset_config)
    if in_json is not None:
        source = metadata_source(train, reg, in_json)
    elif train is None and reg is None:
        raise ConfigError("no dataset is given; give --dataset_config FILE.toml, or --train_data_dir FOLDER with image "
                          "folders named REPEATS_CLASS such as '10_sks dog'")
    elif "dreambooth" not in accepted_styles(request.command, request.sdxl):
        raise ConfigError(f"--in_json: {request.command} takes its captions from a metadata file; give it as --in_json "
                          "FILE.json, or use train_db or train_network for folders named REPEATS_CLASS")
    else:
        source = folder_source(train, reg, problems)
    warnings.extend(source.warnings)
    return source


class _Reader:
    """Resolves the datasets of one source; what is wrong is noted, the results are of use only if nothing is."""

    def __init__(self, source: Source, request: DatasetRequest, problems: Problems) -> None:
        self.source = source
        self.request = request
        self.problems = problems
        self.complete = not problems.found
        """Whether the source has all its subsets."""
        self.in_file = not isinstance(source, FolderSource)
        self.file, self.wrong = validate(source, problems)
        self.wrong_names = {key[-1] for key in self.wrong}
        self.fallbacks = {name: value for name, value in request.fallbacks.items() if value is not None}
        self.effects = Effects()
        self.told: set[str] = set()
        self.warnings: list[str] = []

    def datasets(self) -> tuple[DatasetConfig, ...]:
        if not self.file.datasets and ("datasets",) not in self.wrong:
            self.problems.add(self.source.where(), None, "has no [[datasets]]",
                              "add [[datasets]] with resolution, and below it [[datasets.subsets]] with image_dir")
        numbers = [number for number in range(len(self.file.datasets)) if ("datasets", number) not in self.wrong]
        found = []
        for number in numbers:
            self.warnings = []
            dataset = self.dataset(number)
            found.append(replace(dataset, warnings=tuple(self.warnings)))
        return tuple(
            replace(dataset, warnings=(*dataset.warnings, *self.effects.warnings(number)))
            for number, dataset in zip(numbers, found, strict=True)
        )

    def dataset(self, number: int) -> DatasetConfig:
        table, place = self.file.datasets[number], ("datasets", number)
        where = self.source.where(*place)
        tables = Tables(self.source, ((place, table), (("general",), self.file.general)), self.fallbacks)
        values = tables.values()
        style = find_style(self.source, place, table, self.wrong, self.request.masked_loss, self.problems)
        if table.subsets:
            check_command(self.request.command, self.request.sdxl, style, where, self.problems)
        step = int(values["bucket_reso_steps"])
        smallest, largest = int(values["min_bucket_reso"]), int(values["max_bucket_reso"])
        if values["enable_bucket"]:
            smallest, largest = smallest // step * step, -(-largest // step) * step
        resolution = values["resolution"]
        changed: dict[str, Any] = {
            "resolution": resolution or (0, 0), "min_bucket_reso": smallest, "max_bucket_reso": largest
        }  # fmt: skip
        known = {field.name for field in fields(DatasetConfig)} & values.keys() - changed.keys()
        dataset = DatasetConfig(**{name: values[name] for name in known}, **changed, style=style, origin=where)
        if resolution is None:
            self.no_resolution(place)
        elif dataset.enable_bucket:
            check_buckets(tables, dataset, self.request.step_multiple, self.wrong_names, self.problems)
            longer = -(-2 * largest // step) * step
            if smallest < largest == max(resolution) and not dataset.bucket_no_upscale:
                self.warn(tables, "max_bucket_reso", "leaves no room for longer sides, so a bucket that is not square "
                          f"has less area than resolution; max_bucket_reso = {longer} gives it room")
        self.effects.note(tables, dataset_effects(dataset), number)
        return replace(dataset, subsets=self.subsets(number, tables, dataset))

    def no_resolution(self, place: Key) -> None:
        if "resolution" not in self.wrong_names:
            way_out = "write for example resolution = 512 into [[datasets]] or [general], or give --resolution"
            self.problems.add(self.source.where(*place), None, "has no resolution",
                              way_out if self.in_file else "give for example --resolution=512")

    def warn(self, tables: Tables, name: str, text: str) -> None:
        """Once for each place."""
        where = tables.where(name)
        if where not in self.told:
            self.told.add(where)
            self.warnings.append(f"{where} = {tables.value(name)!r}: {text}")

    def subsets(self, number: int, outer: Tables, dataset: DatasetConfig) -> tuple[SubsetConfig, ...]:
        table, where = self.file.datasets[number], self.source.where("datasets", number)
        if not table.subsets:
            if "subsets" not in self.wrong_names and self.complete:
                self.problems.add(where, None, "has no [[datasets.subsets]]", "add one with image_dir")
            return ()
        places: list[Key] = [("datasets", number, "subsets", subset) for subset in range(len(table.subsets))]
        subsets = {
            place: self.subset(Tables(self.source, ((place, subset), *outer.levels), self.fallbacks), dataset, number)
            for place, subset in zip(places, table.subsets, strict=True)
            if place not in self.wrong
        }
        found = tuple(subsets.values())
        if all(subset.is_reg for subset in found) and len(found) == len(places) and self.complete:
            self.problems.add(where, None, "has regularisation images (is_reg = true) only",
                              "add a subset with the images to learn, is_reg = false" if self.in_file
                              else "give the images to learn as --train_data_dir")
        self.check_twice(subsets)
        return found

    def check_twice(self, subsets: Mapping[Key, SubsetConfig]) -> None:
        """sd-scripts leaves the second one out; here it is a problem. A link is another folder, as there."""
        seen: dict[str, SubsetConfig] = {}
        for place, subset in subsets.items():
            name, noun = ("metadata_file", "file") if subset.metadata_file else ("image_dir", "folder")
            path: Path = getattr(subset, name)
            if self.is_wrong(place, name) or (path == Path() and name not in self.given(place)):
                continue
            first = seen.setdefault(os.path.abspath(path), subset)
            if first is not subset:
                rule = f"is the {noun} of {first.origin} once more"
                self.problems.add(self.source.where(*place, name), str(path), rule,
                                  "raise that one's num_repeats, or use another [[datasets]] for other settings")

    def given(self, place: Key) -> set[str]:
        """The keys that the subset at `place` sets."""
        return self.file.datasets[int(place[1])].subsets[int(place[3])].model_fields_set

    def subset(self, tables: Tables, dataset: DatasetConfig, number: int) -> SubsetConfig:
        values = tables.values()
        place = tables.levels[0][0]
        tuned = dataset.style == "fine_tuning"
        if not tuned and values["image_dir"] is None and not self.is_wrong(place, "image_dir", "metadata_file"):
            self.problems.add(self.source.where(*place, "image_dir"), None, "is required",
                              'write for example image_dir = "photos/my_dog"')
        extension = str(values["caption_extension"])
        changed: dict[str, Any] = {
            "image_dir": self.folder(place, "image_dir", values["image_dir"], not tuned) or Path(),
            "metadata_file": self.metadata(place, values["metadata_file"]),
            "conditioning_data_dir": self.folder(place, "conditioning_data_dir", values["conditioning_data_dir"], True),
            "caption_extension": extension if extension.startswith(".") else "." + extension,
            "class_tokens": None if tuned else values["class_tokens"],
            "alpha_mask": values["alpha_mask"] and values["conditioning_data_dir"] is None,
            "templates": () if values.get("is_reg") else self.request.templates,
        }
        known = {field.name for field in fields(SubsetConfig)} & values.keys() - changed.keys()
        subset = SubsetConfig(**{name: values[name] for name in known}, **changed, origin=self.source.where(*place))
        self.check_subset(tables, subset, dataset)
        self.effects.note(tables, subset_effects(subset, dataset.enable_bucket), number)
        return subset

    def is_wrong(self, place: Key, *names: str) -> bool:
        return any((*place, name) in self.wrong for name in names)

    def check_subset(self, tables: Tables, subset: SubsetConfig, dataset: DatasetConfig) -> None:
        """Rules between a subset's keys and the run's options."""
        if subset.is_reg and subset.num_repeats != int(subset.num_repeats):
            self.refuse(tables, "num_repeats", "must be a whole number for regularisation images",
                        "write num_repeats = 1 into that subset")
        if self.request.caches_latents:
            moving = ["random_crop", "color_aug"] + ([] if dataset.enable_bucket else ["face_crop_aug_range"])
            for name in moving:
                if getattr(subset, name):
                    self.refuse(tables, name, "a cached latent cannot be cropped or coloured anew for every sample",
                                f"leave --cache_latents away, or {name}")
        if self.request.command == "train_textual_inversion":
            for name in _DROPOUT:
                if getattr(subset, name):
                    self.refuse(tables, name, "textual inversion learns nothing from a caption without its word",
                                f"remove {name}")
        if subset.caption_dropout_rate == 1 or subset.caption_dropout_every_n_epochs == 1:
            name = _DROPOUT[0] if subset.caption_dropout_rate == 1 else _DROPOUT[1]
            self.warn(tables, name, "drops every caption")
        if subset.loss_weight == 0:
            self.warn(tables, "loss_weight", "nothing is learnt from these images")

    def refuse(self, tables: Tables, name: str, rule: str, way_out: str) -> None:
        """Note a problem with a value, once for each place."""
        where = tables.where(name)
        if where not in self.told:
            self.told.add(where)
            self.problems.add(where, tables.value(name), rule, way_out)

    def folder(self, place: Key, name: str, text: str | None, needs_images: bool) -> Path | None:
        """The folder `text`, noted as a problem if it is none or, with `needs_images`, holds no image."""
        if text is None:
            return None
        where, path = self.source.where(*place, name), self.find(text)
        try:
            if not path.exists():
                self.problems.add(where, text, "there is no such folder", self.nearest(path))
            elif not path.is_dir():
                self.problems.add(where, text, "is a file, not a folder", "give the folder with the images")
            elif needs_images and not holds_image(path):
                self.problems.extend([no_images(where, path)])
        except OSError as problem:
            self.problems.add(where, text, f"cannot be read ({problem.strerror})", "check its permissions")
        # An empty path means that none is given.
        return path if path != Path() or needs_images else Path.cwd()

    def metadata(self, place: Key, text: str | None) -> Path | None:
        """The metadata file `text`, or folder of .parquet files, noted as a problem if it is neither."""
        if text is None:
            return None
        where, path = self.source.where(*place, "metadata_file"), self.find(text)
        known = " or ".join(METADATA_EXTENSIONS)
        try:
            if not path.exists():
                self.problems.add(where, text, "there is no such file", self.nearest(path))
            elif path.is_dir():
                if not any(path.glob("*.parquet")):
                    inner = sorted([*path.glob("*.jsonl"), *path.glob("*.json")])
                    inner += sorted(file.parent for file in path.glob("*/*.parquet"))
                    way_out = f"write metadata_file = '{inner[0]}'" if inner else f"give a file ({known})"
                    self.problems.add(where, text, "is a folder without .parquet files", way_out)
            elif path.suffix.lower() not in METADATA_EXTENSIONS:
                self.problems.add(where, text, f"does not end in {known}", "give such a file, or rename it")
        except OSError as problem:
            self.problems.add(where, text, f"cannot be read ({problem.strerror})", "check its permissions")
        return path

    def find(self, text: str) -> Path:
        """`text` from here, or from beside the dataset file if it exists only there."""
        path = Path(text)
        beside = self.source.path.parent / path
        return beside if self.in_file and not os.path.exists(path) and os.path.exists(beside) else path

    def nearest(self, path: Path) -> str:
        """What to say about `path`, which does not exist."""
        outer = next((parent for parent in path.absolute().parents if parent.exists()), Path(path.anchor))
        starts = [Path.cwd(), self.source.path.parent.resolve()] if self.in_file else [Path.cwd()]
        shown = " or at ".join(dict.fromkeys(map(str, starts)))
        return f"correct the path; it exists up to {outer} (relative paths start at {shown})"
