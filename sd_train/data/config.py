"""Dataset files: TOML or JSON, `[general]` > `[[datasets]]` > `[[datasets.subsets]]`, resolved to frozen values."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from sd_train.config.textfile import TomlFile, read_json, read_toml
from sd_train.data.folders import holds_image, no_images
from sd_train.data.keys import (
    NO_EFFECT,
    NOT_SUPPORTED,
    RENAMED,
    DatasetFile,
    DatasetTable,
    SubsetTable,
    dataset_json_schema,
)
from sd_train.data.settings import DatasetConfig, SubsetConfig
from sd_train.data.validation import Key, validate
from sd_train.errors import ConfigError, Problems

RENAMED_OPTIONS = {"dataset_repeats": "num_repeats", "train_batch_size": "batch_size"}
FALLBACKS = {field.name for kind in (DatasetConfig, SubsetConfig) for field in fields(kind)} - {
    "image_dir", "is_reg", "class_tokens", "subsets", "warnings", "origin",
}  # fmt: skip
"""Keys that a run option of the same meaning stands behind."""

__all__ = ["DatasetConfig", "SubsetConfig", "dataset_json_schema", "load_dataset_config"]

_BUCKET_STEP = 64
"""Buckets of Stable Diffusion 1.x and 2.x: eight latents, so that the U-Net can halve them three times."""


def load_dataset_config(path: Path, fallbacks: Mapping[str, object]) -> tuple[DatasetConfig, ...]:
    """Read and check the dataset file `path` (`.toml` or `.json`).

    A key's value comes from the innermost table that sets it, else from `fallbacks` (typed values of the command
    line by the names of the dataset file, None for unset), else it is the default. A relative `image_dir` starts at
    the current folder, as in sd-scripts, or at the file's folder if it exists only there.

    Raises:
        ConfigError: with every problem, each with file, line, key, rule and way out.
    """
    source = _read(path)
    problems = Problems()
    file, wrong = validate(source, problems)
    if not file.datasets and ("datasets",) not in wrong:
        problems.add(source.where(), None, "has no [[datasets]]",
                     "add [[datasets]] with resolution, and below it [[datasets.subsets]] with image_dir")
    datasets = tuple(
        _Reader(source, file, number, fallbacks, wrong, problems).dataset() for number in range(len(file.datasets))
    )
    problems.raise_if_any(ConfigError)
    return datasets


def _read(path: Path) -> TomlFile:
    extension = path.suffix.lower()
    if extension == ".toml":
        return read_toml(path)
    if extension != ".json":
        raise ConfigError(f"{path}: a dataset file ends in .toml or .json, not {extension!r}; rename or convert it")
    data = read_json(path, "correct it there")
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: the file must hold one object {{...}} with 'datasets'; wrap it")
    return TomlFile(path, data, {})


def dataset_fallbacks(options: Mapping[str, object]) -> dict[str, object]:
    """What a dataset file falls back to: run options under the names that they have in the file."""
    fallbacks = {RENAMED_OPTIONS.get(name, name): value for name, value in options.items()}
    return {name: value for name, value in fallbacks.items() if name in FALLBACKS}


class _Reader:
    """Resolves one dataset of a file."""

    def __init__(
        self,
        source: TomlFile,
        file: DatasetFile,
        number: int,
        fallbacks: Mapping[str, object],
        wrong: frozenset[Key],
        problems: Problems,
    ) -> None:
        self.source = source
        self.table = file.datasets[number]
        self.place: Key = ("datasets", number)
        self.outer: list[tuple[Key, Any]] = [(self.place, self.table), (("general",), file.general)]
        self.fallbacks = {name: value for name, value in fallbacks.items() if value is not None}
        self.wrong = wrong
        self.wrong_names = {key[-1] for key in wrong}
        self.problems = problems
        self.reported: set[str] = set()
        self.warnings: list[str] = []

    def dataset(self) -> DatasetConfig:
        """The dataset with its subsets; problems are noted, the result is of use only if there are none."""
        names = DatasetTable.model_fields.keys() - SubsetTable.model_fields.keys() - {"subsets"}
        values = {name: self.value(name, self.outer) for name in names}
        self.refuse_unsupported(values, self.outer)
        subsets = self.subsets()
        step = int(values["bucket_reso_steps"])
        smallest, largest = int(values["min_bucket_reso"]), int(values["max_bucket_reso"])
        if values["enable_bucket"]:
            smallest, largest = smallest // step * step, -(-largest // step) * step
        if values["resolution"] is None:
            if "resolution" not in self.wrong_names:
                self.problems.add(self.source.where(*self.place), None, "has no resolution",
                                  "write for example resolution = 512 into [[datasets]] or [general]")
        elif values["enable_bucket"]:
            self.check_buckets(values, smallest, largest)
        return DatasetConfig(
            batch_size=int(values["batch_size"]),
            resolution=values["resolution"] or (0, 0),
            enable_bucket=bool(values["enable_bucket"]),
            min_bucket_reso=smallest,
            max_bucket_reso=largest,
            bucket_reso_steps=step,
            bucket_no_upscale=bool(values["bucket_no_upscale"]),
            subsets=subsets,
            warnings=tuple(self.warnings),
            origin=self.source.where(*self.place),
        )

    def value(self, name: str, tables: Sequence[tuple[Key, Any]]) -> Any:
        """The innermost value that is set, else the command line's, else the default."""
        for _, table in tables:
            if name in table.model_fields_set and (found := getattr(table, name)) is not None:
                return found
        return self.fallbacks.get(name, type(tables[0][1]).model_fields[name].get_default(call_default_factory=True))

    def where(self, name: str, tables: Sequence[tuple[Key, Any]]) -> str:
        """Where that value stands, for messages."""
        for place, table in tables:
            if name in table.model_fields_set:
                return self.source.where(*place, name)
        return f"--{RENAMED.get(name, name)}"

    def refuse_unsupported(self, values: Mapping[str, Any], tables: Sequence[tuple[Key, Any]]) -> None:
        fields_of_table = type(tables[0][1]).model_fields
        for name, way_out in NOT_SUPPORTED.items():
            if name not in values or values[name] == fields_of_table[name].get_default(call_default_factory=True):
                continue
            where = self.where(name, tables)
            if where not in self.reported:
                self.reported.add(where)
                self.problems.add(where, values[name], "is not yet supported", way_out)
        for name, reason in NO_EFFECT.items():
            if name in values and values[name] != fields_of_table[name].get_default(call_default_factory=True):
                warning = f"{self.where(name, tables)} = {values[name]!r}: has no effect: {reason}"
                if warning not in self.warnings:
                    self.warnings.append(warning)

    def check_buckets(self, values: Mapping[str, Any], smallest: int, largest: int) -> None:
        """sd-scripts' rules between the sizes, after rounding (`adjust_min_max_bucket_reso_by_steps`)."""
        (width, height), step = values["resolution"], values["bucket_reso_steps"]
        if step % _BUCKET_STEP and "bucket_reso_steps" not in self.wrong_names:
            self.problems.add(self.where("bucket_reso_steps", self.outer), step,
                              f"must be a multiple of {_BUCKET_STEP}", f"write bucket_reso_steps = {_BUCKET_STEP}")
        elif smallest < step and not values["bucket_no_upscale"]:
            self.problems.add(self.where("min_bucket_reso", self.outer), values["min_bucket_reso"],
                              f"must be at least bucket_reso_steps ({step})", f"write min_bucket_reso = {step}")
        where, shown = self.where("resolution", self.outer), list(values["resolution"])
        if smallest > min(width, height):
            lower = max(min(width, height) // step, 1) * step
            self.problems.add(where, shown, f"a side is shorter than min_bucket_reso ({values['min_bucket_reso']})",
                              f"write min_bucket_reso = {lower} or a larger resolution")
        if largest < max(width, height):
            self.problems.add(where, shown, f"a side is longer than max_bucket_reso ({values['max_bucket_reso']})",
                              f"write for example max_bucket_reso = {-(-2 * max(width, height) // step) * step}")

    def subsets(self) -> tuple[SubsetConfig, ...]:
        where = self.source.where(*self.place)
        if not self.table.subsets:
            if "subsets" not in self.wrong_names:
                self.problems.add(where, None, "has no [[datasets.subsets]]", "add one with image_dir")
            return ()
        with_metadata = {bool(subset.metadata_file) for subset in self.table.subsets}
        with_masks = {bool(subset.conditioning_data_dir) for subset in self.table.subsets}
        if len(with_metadata) == 2 or len(with_masks) == 2:
            self.problems.add(where, None, "mixes styles: some subsets have metadata_file or conditioning_data_dir, "
                              "others have not", "put each style into a [[datasets]] of its own")
        subsets = tuple(self.subset(number) for number in range(len(self.table.subsets)))
        if all(subset.is_reg for subset in subsets) and not any(with_metadata):
            self.problems.add(where, None, "has regularisation images (is_reg = true) only",
                              "add a subset with the images to learn, is_reg = false")
        seen: dict[str, SubsetConfig] = {}
        for subset in subsets:
            if subset.image_dir == Path():
                continue
            first = seen.setdefault(os.path.realpath(subset.image_dir), subset)
            if first is not subset:
                self.problems.add(subset.origin, str(subset.image_dir), f"is the folder of {first.origin} once more",
                                  "raise that one's num_repeats, or use another [[datasets]] for other settings")
        return subsets

    def subset(self, number: int) -> SubsetConfig:
        place: Key = (*self.place, "subsets", number)
        tables = [(place, self.table.subsets[number]), *self.outer]
        values = {name: self.value(name, tables) for name in SubsetTable.model_fields}
        self.refuse_unsupported(values, tables)
        directory = self.image_dir(place, self.table.subsets[number])
        extension = str(values["caption_extension"])
        values["caption_extension"] = extension if extension.startswith(".") else "." + extension
        known = {field.name for field in fields(SubsetConfig)} - {"image_dir", "origin"}
        return SubsetConfig(
            image_dir=directory,
            origin=self.source.where(*place),
            **{name: value for name, value in values.items() if name in known},
        )

    def image_dir(self, place: Key, table: SubsetTable) -> Path:
        """The folder, from here or from beside the file; noted as a problem if it holds no images."""
        if table.metadata_file or (*place, "image_dir") in self.wrong or place in self.wrong:
            return Path()
        where = self.source.where(*place, "image_dir")
        directory = Path(table.image_dir)
        beside = self.source.path.parent / directory
        if not os.path.exists(directory) and os.path.exists(beside):
            directory = beside
        try:
            if not directory.exists():
                starts = " or at ".join(dict.fromkeys(map(str, (Path.cwd(), self.source.path.parent.resolve()))))
                nearest = next(parent for parent in directory.absolute().parents if parent.exists())
                self.problems.add(where, table.image_dir, "there is no such folder",
                                  f"correct the path; it exists up to {nearest} (relative paths start at {starts})")
            elif not directory.is_dir():
                self.problems.add(where, table.image_dir, "is a file, not a folder", "give the folder with the images")
            elif not holds_image(directory):
                self.problems.extend([no_images(where, directory)])
        except OSError as problem:
            self.problems.add(where, table.image_dir, f"cannot be read ({problem.strerror})", "check its permissions")
        return directory
