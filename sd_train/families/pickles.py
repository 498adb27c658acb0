"""The one place that reads and writes pickled weights (`.ckpt`, `.pt`); nothing in a file is ever executed."""

from __future__ import annotations

import io
import math
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor

from sd_train.errors import ModelError

_FOREIGN = re.compile(r"(?:unsupported (?:global|class)|can only)[^\n]*?(?= was not| whose|\. |$)", re.I | re.M)
"""What torch says of anything in a pickle that is no tensor and no plain value."""

_GLOBAL = re.compile(r"Unsupported global: GLOBAL (\S+) was not an allowed global")

_NAMED = re.compile(r"GLOBAL (\S+)")

_HARMLESS = re.compile(
    r"(?:pytorch_lightning|lightning|lightning_fabric|lightning_utilities|omegaconf)\.[\w.]+"
    r"|numpy\.(?:_?core\.multiarray\.(?:scalar|_reconstruct)|dtype|ndarray|float(?:16|32|64)|u?int(?:8|16|32|64)|bool_?)"
    r"|numpy\.dtypes\.\w+|_codecs\.encode|argparse\.Namespace|typing\.Any"
    r"|(?:dict|list|set|tuple|int|float|str|bool|bytes|bytearray|complex|object|slice|range)"
)
"""What old trainers (PyTorch Lightning) left beside the weights; torch leaves out `builtins.` in its message."""


class Inert:
    """Stands for an object of another program: takes whatever its pickle says, keeps and does nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> Inert:
        return object.__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _table(*args: object) -> OrderedDict[object, object]:
    """An empty table in place of a `defaultdict`."""
    return OrderedDict()


def _stand_in(name: str) -> object | None:
    """What takes the place of `name` in a pickle; None: the file is refused."""
    if name == "collections.defaultdict":
        return _table
    if not _HARMLESS.fullmatch(name):
        return None
    # torch only fills tables of three kinds, and Lightning's AttributeDict is filled like a table.
    return OrderedDict if name.endswith("Dict") else Inert


def _first_bytes(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        return file.read(count)


def read_pickled_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.ckpt`, `.pt` or `.bin` file, those under "state_dict" or "string_to_param" if it has one.

    Raises:
        ModelError: as `read_pickled`.
    """
    return read_pickled(path)[0]


def read_pickled(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a pickled file, and what `write_pickled` wrote as its metadata.

    Leftovers of PyTorch Lightning, omegaconf and numpy become inert objects; they are neither imported nor called.

    Raises:
        ModelError: if the file is broken or holds anything else beside tensors and plain values.
    """
    content = _content(path)
    metadata = content.get("metadata") if isinstance(content, dict) else None
    # Of checkpoints, and of A1111's textual inversion embeddings.
    for key in ("state_dict", "string_to_param"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise ModelError(f"{path}: holds no table of tensors; expected a model checkpoint")
    texts = metadata.items() if isinstance(metadata, dict) else ()
    tensors = {str(name): tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
    for name, tensor in tensors.items():
        if not _is_stored(tensor):
            raise ModelError(
                f"{path}: {name!r} of shape {tuple(tensor.shape)} has more numbers than the file holds for it; "
                "download it again, or save it anew with .contiguous()"
            )
    return (
        tensors,
        {key: text for key, text in texts if isinstance(key, str) and isinstance(text, str)},
    )


def _is_stored(tensor: Tensor) -> bool:
    """Whether each of its numbers can have a place of its own; a stride of 0 makes many of one."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes()


def _content(path: Path) -> Any:
    if not path.is_file():
        # A pipe would be waited for.
        raise ModelError(f"{path}: is no regular file; give a model checkpoint")
    # Files from before torch 1.6 are no zip archives and cannot be mapped into memory.
    zipped = zipfile.is_zipfile(path)
    broken = f"{path}: cannot be read as a PyTorch file (%s); download it again"
    allowed: dict[str, object] = {}
    try:
        if not zipped and _first_bytes(path, 2) == b"PK":
            raise ModelError(broken % "the archive has no end")
        while True:
            try:
                return _load(path, zipped, allowed)
            except pickle.UnpicklingError as problem:
                # The weights come behind the pickle, so trying again costs little.
                name = _unknown(problem)
                stand_in = None if name is None or name in allowed else _stand_in(name)
                if name is None or stand_in is None:
                    raise
                allowed[name] = stand_in
    except pickle.UnpicklingError as problem:
        found = _FOREIGN.search(str(problem))
        if found is None:
            raise ModelError(broken % "no weights in it can be read") from None
        named = _NAMED.search(str(problem))
        what = f"it asks for {named[1]}" if named else found[0]
        raise ModelError(
            f"{path}: holds Python objects beside the weights, and loading them could run code ({what}); "
            "convert the file to .safetensors on a machine that may run it"
        ) from None
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, TypeError, AttributeError, IndexError) as problem:
        raise ModelError(broken % (str(problem) or "it ends early").splitlines()[0]) from None


def _unknown(problem: pickle.UnpicklingError) -> str | None:
    found = _GLOBAL.search(str(problem))
    return None if found is None else found[1]


def _load(path: Path, zipped: bool, allowed: Mapping[str, object]) -> Any:
    names: list[Any] = []
    for name, stand_in in allowed.items():
        # torch leaves out `builtins.` when it names what it refuses, not when it looks for what is allowed.
        names.append((stand_in, name if "." in name else f"builtins.{name}"))
    with torch.serialization.safe_globals(names):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


class Tensors(Protocol):
    """What is written: see `sources.TensorSource`."""

    def names(self) -> list[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str) -> Tensor: ...


_STORAGES: dict[torch.dtype, Any] = {
    torch.float64: torch.DoubleStorage, torch.float32: torch.FloatStorage, torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage, torch.int64: torch.LongStorage, torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage, torch.int8: torch.CharStorage, torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}  # fmt: skip


class _Storage:
    """The bytes of one tensor, which stand in the archive under `key`."""

    def __init__(self, key: str, dtype: torch.dtype, count: int) -> None:
        self.key, self.dtype, self.count = key, dtype, count


class _Placeholder:
    """A tensor that is pickled as torch pickles tensors, and whose bytes follow later."""

    def __init__(self, storage: _Storage, shape: tuple[int, ...]) -> None:
        self.storage, self.shape = storage, shape

    def __reduce__(self) -> tuple[Any, ...]:
        strides = tuple(math.prod(self.shape[place + 1 :]) for place in range(len(self.shape)))
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, self.shape, strides, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: object) -> Any:
        if isinstance(obj, _Storage):
            return ("storage", _STORAGES[obj.dtype], obj.key, "cpu", obj.count)
        return None


def write_pickled(
    path: Path, source: Tensors, metadata: Mapping[str, str] | None = None, *, bare: bool = False
) -> None:
    """Write `source` as torch writes `{"state_dict": ..., "epoch": ..., "global_step": ...}`, one tensor after another.

    For use inside `write_whole`. The file is a zip archive with torch's names: `data.pkl` refers to the tensors' bytes,
    which stand uncompressed in `data/0`, `data/1`, ... at multiples of 64 bytes.

    Args:
        path: the file.
        source: what is written.
        metadata: `ss_epoch` and `ss_steps` become the two counts; all of it is kept under "metadata".
        bare: the table of tensors alone, without metadata, as sd-scripts writes networks and embeddings.

    Raises:
        ModelError: if a tensor has a dtype that torch has no class for.
    """
    entries = dict(sorted((metadata or {}).items()))
    table: dict[str, _Placeholder] = {}
    for place, name in enumerate(source.names()):
        shape = source.shape(name)
        if source.dtype(name) not in _STORAGES:
            kind = str(source.dtype(name)).removeprefix("torch.")
            raise ModelError(
                f"{path.name}: pickles hold no {kind} ({name}); give --save_precision or write .safetensors"
            )
        table[name] = _Placeholder(_Storage(str(place), source.dtype(name), math.prod(shape)), shape)
    content: dict[str, Any] = dict(table) if bare else {
        "state_dict": table,
        "epoch": _count(entries, "ss_epoch"),
        "global_step": _count(entries, "ss_steps"),
        "metadata": entries,
    }  # fmt: skip
    pickled = io.BytesIO()
    _Pickler(pickled, protocol=2).dump(content)
    with path.open("wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        _put(archive, file, "archive/data.pkl", [pickled.getbuffer()])
        _put(archive, file, "archive/byteorder", [b"little"])
        for name, tensor in table.items():
            data = source.read(name).detach().cpu().contiguous()
            _put(archive, file, f"archive/data/{tensor.storage.key}", [data.reshape(-1).view(torch.uint8).numpy().data])
        _put(archive, file, "archive/version", [b"3\n"])


def _count(entries: Mapping[str, str], name: str) -> int:
    text = entries.get(name, "0")
    return int(text) if text.isdecimal() else 0


def _put(archive: zipfile.ZipFile, file: BinaryIO, name: str, blocks: Iterable[Any]) -> None:
    """Store an entry whose bytes begin at a multiple of 64 in the file, as mapping it into memory needs."""
    entry = zipfile.ZipInfo(name)
    # The local header: 30 bytes, the name, the 64-bit sizes (20 bytes), our padding with its own head of 4 bytes.
    start = file.tell() + 30 + len(name.encode()) + 20
    entry.extra = b"FB" + (-(start + 4) % 64).to_bytes(2, "little") + b"Z" * (-(start + 4) % 64)
    with archive.open(entry, "w", force_zip64=True) as target:
        for block in blocks:
            target.write(block)
