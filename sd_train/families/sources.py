"""Tensors by name that are read when they are asked for: of safetensors files, of pickles, of tables, and renamed."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from sd_train.errors import ModelError
from sd_train.families.pickles import read_pickled
from sd_train.families.tensor_header import read_header

_LOG = logging.getLogger(__name__)

FILE_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")

DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The names of dtypes in safetensors files (https://github.com/huggingface/safetensors#format).

In the order in which the library puts tensors into a file.
"""

_SIZES = {name: dtype.itemsize for name, dtype in DTYPES.items()}


class TensorSource(Protocol):
    """A table of tensors; only `read` touches their bytes."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class _Place:
    """Where the bytes of one tensor stand."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass
class SafetensorsSource:
    """One safetensors file, or the shards of one table.

    Each tensor is read into memory of its own, not mapped: what was read and dropped occupies nothing.
    """

    metadata: dict[str, str] = field(default_factory=dict)
    """`__metadata__` of all files together."""
    _places: dict[str, _Place] = field(default_factory=dict)

    @classmethod
    def open(cls, paths: Sequence[Path]) -> SafetensorsSource:
        """Read the headers of `paths`.

        Raises:
            ModelError: if one is no safetensors file or ends early.
        """
        source = cls()
        for path in paths:
            source._add(path)
        return source

    def _add(self, path: Path) -> None:
        try:
            entries, metadata = read_header(path, _SIZES)
        except (ValueError, OSError) as problem:
            raise ModelError(f"{path}: cannot be read as safetensors ({problem}); download it again") from None
        self.metadata |= metadata
        for name, entry in entries.items():
            self._places[name] = _Place(path, entry.start, DTYPES[entry.dtype], entry.shape)

    def names(self) -> list[str]:
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._places[name].dtype

    def read(self, name: str) -> Tensor:
        """The tensor `name`, in memory of its own.

        Raises:
            ModelError: if the file cannot be read any more.
        """
        place = self._places[name]
        data = torch.empty(math.prod(place.shape) * place.dtype.itemsize, dtype=torch.uint8)
        view: memoryview = data.numpy().data
        try:
            with place.path.open("rb", buffering=0) as file:
                file.seek(place.offset)
                while len(view):
                    if not (count := file.readinto(view)):
                        raise OSError("it ends early")
                    view = view[count:]
        except OSError as problem:
            raise ModelError(f"{place.path}: {name} cannot be read ({problem}); download it again") from None
        return data.view(place.dtype).view(place.shape)


@dataclass(frozen=True)
class DictSource:
    """Tensors that are in memory already, or that torch has mapped."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


Change = Literal["same", "matrix", "convolution", "transposed", "first", "second", "third", "joined"]
"""What becomes of a tensor between two layouts.

"matrix" drops and "convolution" adds the last two dimensions of a 1x1 convolution, "first" to "third" are the thirds of
the rows, "joined" puts the rows of several tensors under one another.
"""

_THIRDS: dict[Change, int] = {"first": 0, "second": 1, "third": 2}


@dataclass(frozen=True)
class Derived:
    """A tensor that is computed from those of another source."""

    sources: tuple[str, ...]
    change: Change = "same"


@dataclass(frozen=True)
class RenamedSource:
    """Another source's tensors under other names and in other forms; each is computed when it is read."""

    base: TensorSource
    table: Mapping[str, Derived]

    def names(self) -> list[str]:
        return list(self.table)

    def shape(self, name: str) -> tuple[int, ...]:
        derived = self.table[name]
        shape = self.base.shape(derived.sources[0])
        match derived.change:
            case "same":
                return shape
            case "matrix":
                return shape[:2] if shape[2:] == (1, 1) else shape
            case "convolution":
                return (*shape, 1, 1) if len(shape) == 2 else shape
            case "transposed":
                return shape[::-1]
            case "joined":
                return (sum(self.base.shape(source)[0] for source in derived.sources), *shape[1:])
            case _:
                return (shape[0] // 3, *shape[1:])

    def dtype(self, name: str) -> torch.dtype:
        return self.base.dtype(self.table[name].sources[0])

    def read(self, name: str) -> Tensor:
        derived = self.table[name]
        tensor = self.base.read(derived.sources[0])
        match derived.change:
            case "same":
                return tensor
            case "matrix" | "convolution":
                return tensor.reshape(self.shape(name))
            case "transposed":
                return tensor.t().contiguous()
            case "joined":
                # Of different dtypes, should tools have left them so, the rows take the first one's.
                rows = [tensor, *(self.base.read(source).to(tensor.dtype) for source in derived.sources[1:])]
                return torch.cat(rows)
            case _:
                rows_each = tensor.shape[0] // 3
                # A copy, so that the other two thirds do not stay in memory with it.
                return tensor.narrow(0, rows_each * _THIRDS[derived.change], rows_each).clone()


@dataclass(frozen=True)
class CastSource:
    """Another source's tensors, with every number that has a fraction as `to`; None: as they are."""

    base: TensorSource
    to: torch.dtype | None

    def names(self) -> list[str]:
        return self.base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        stored = self.base.dtype(name)
        return self.to if self.to is not None and stored.is_floating_point else stored

    def read(self, name: str) -> Tensor:
        """The tensor `name`; numbers that fp16 cannot hold become the largest that it can, with a warning."""
        tensor, dtype = self.base.read(name), self.dtype(name)
        cast = tensor.to(dtype)
        if dtype == torch.float16 and tensor.dtype != dtype and cast.isinf().any() and not tensor.isinf().any():
            largest, most = tensor.abs().max().item(), torch.finfo(dtype).max
            _LOG.warning(
                "%s: holds %.3g, which fp16 cannot hold and becomes %g; save it as bf16 or float", name, largest, most
            )
            return tensor.clamp(-most, most).to(dtype)
        return cast


def select(source: TensorSource, wanted: Callable[[str], bool]) -> RenamedSource:
    """The tensors of `source` whose names are `wanted`, as they are."""
    return RenamedSource(source, {name: Derived((name,)) for name in source.names() if wanted(name)})


def under(source: TensorSource, prefix: str) -> RenamedSource:
    """The tensors of `source` whose names begin with `prefix`, without it."""
    return RenamedSource(
        source, {name.removeprefix(prefix): Derived((name,)) for name in source.names() if name.startswith(prefix)}
    )


def read_all(source: TensorSource) -> dict[str, Tensor]:
    """Every tensor of `source`, in memory."""
    return {name: source.read(name) for name in source.names()}


@dataclass(frozen=True)
class JoinedSource:
    """Several sources as one; names must differ."""

    sources: tuple[TensorSource, ...]
    _owners: dict[str, TensorSource] = field(default_factory=dict)

    @classmethod
    def of(cls, sources: Iterable[TensorSource]) -> JoinedSource:
        """`sources` as one table; of tensors with the same name the first counts."""
        every = tuple(sources)
        owners: dict[str, TensorSource] = {}
        for source in every:
            for name in source.names():
                owners.setdefault(name, source)
        return cls(every, owners)

    def names(self) -> list[str]:
        return list(self._owners)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._owners[name].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return self._owners[name].dtype(name)

    def read(self, name: str) -> Tensor:
        return self._owners[name].read(name)


def open_file(path: Path) -> tuple[TensorSource, dict[str, str]]:
    """The tensors of one file of any kind, and its metadata.

    Raises:
        ModelError: if the file is broken or no model file.
    """
    suffix = path.suffix.lower()
    if suffix not in FILE_SUFFIXES:
        raise ModelError(f"{path}: is not a model file; expected a folder or one of {', '.join(FILE_SUFFIXES)}")
    if suffix == ".safetensors":
        source = SafetensorsSource.open([path])
        return source, source.metadata
    tensors, metadata = read_pickled(path)
    return DictSource(tensors), metadata


@dataclass(frozen=True)
class Part:
    """One network: how it is built and what is in it."""

    config: dict[str, Any]
    """For diffusers (U-Net, VAE) or transformers (text encoders)."""
    tensors: TensorSource
    """Under the names that diffusers' folders are published with (text encoders: `text_model.*`)."""
