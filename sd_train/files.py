"""Files appear complete or not at all: temporary name, fsync, rename."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sd_train.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor


def _sync_folder(folder: Path) -> None:
    # Windows cannot open folders; its rename is durable enough without.
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _sync_file(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _share(path: Path) -> None:
    # safetensors makes files that only their owner can read; web UIs often run as another user.
    if os.name == "posix":
        path.chmod(0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _make_folder(path: Path, option: str = "--output_dir") -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise RunError(f"{path}: cannot be made ({problem}); choose another {option}") from None


def probe_folder(folder: Path, option: str) -> None:
    """Find out whether files can be written into `folder`; nothing is left behind.

    Raises:
        RunError: if not; `option` is what the message advises to change.
    """
    missing = [place for place in (folder, *folder.parents) if not os.path.exists(place)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
            file.flush()
    except OSError as problem:
        reason = problem.strerror or str(problem)
        raise RunError(f"{folder}: nothing can be written there ({reason}); choose another {option}") from None
    finally:
        for place in missing:
            with contextlib.suppress(OSError):
                place.rmdir()


def nearest_folder(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if os.path.isdir(place))


def write_whole(path: Path, write: Callable[[Path], None], option: str = "--output_dir") -> None:
    """Let `write` fill a temporary file beside `path`, then move it there in one step.

    Raises:
        RunError: if the disk refuses; nothing half-written stays behind. It advises another `option`.
    """
    _make_folder(path.parent, option)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        _share(temporary)
        _sync_file(temporary)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as problem:
        raise RunError(f"{path}: cannot be written ({problem}); free space or choose another {option}") from None
    finally:
        # A name that is too long cannot even be looked for; that must not hide why the file was not written.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text with plain newlines, whole or not at all."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(text.encode())

    write_whole(path, write)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, whole or not at all; tensors may be views and on any device."""
    write_whole(path, lambda temporary: put_tensors(temporary, tensors, metadata))


def put_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file directly, for use inside `write_whole` and `write_folder`.

    Raises:
        OSError: if the disk refuses.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    try:
        save_file(plain, path, dict(metadata) if metadata else None)
        _sort_metadata(path)
    except SafetensorError as problem:
        # The library has its own error for a full disk.
        raise OSError(str(problem)) from None


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file into order in place: the library leaves it to chance.

    So the same content gives the same bytes (https://reproducible-builds.org).
    """
    with path.open("rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        if "__metadata__" not in header:
            return
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        # Both write JSON as short as it can be; should they ever differ, the file stays as it is.
        if len(text) <= length:
            file.seek(8)
            file.write(text.ljust(length))


def write_network(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a LoRA-like network with the two hashes that web UIs look it up by.

    `sshs_model_hash` is SHA-256 of the tensors' bytes as they stand in the file, `sshs_legacy_hash` the first 8 digits
    of SHA-256 of 64 KiB at 1 MiB of a file that carries the `ss_*` entries alone (sd-scripts' definitions).
    """
    from safetensors.torch import save

    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    hashed = save(plain, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    start = 8 + int.from_bytes(hashed[:8], "little")
    hashes = {
        "sshs_model_hash": hashlib.sha256(memoryview(hashed)[start:]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(hashed[0x100000:0x110000]).hexdigest()[:8],
    }
    write_tensors(path, plain, {**metadata, **hashes})


def write_folder(path: Path, fill: Callable[[Path], None], option: str = "--output_dir") -> None:
    """Let `fill` write files and folders into a temporary folder beside `path`, then move it there.

    An old `path` goes last.

    Raises:
        RunError: if the disk refuses; an old `path` is then still whole. It advises another `option`.
    """
    _make_folder(path.parent, option)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        fill(temporary)
        for entry in sorted(temporary.rglob("*"), reverse=True):
            if entry.is_dir():
                _sync_folder(entry)
            else:
                _share(entry)
                _sync_file(entry)
        _sync_folder(temporary)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as problem:
        if os.path.exists(old) and not os.path.exists(path):
            with contextlib.suppress(OSError):
                os.replace(old, path)
        raise RunError(f"{path}: cannot be written ({problem}); free space or choose another {option}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        # Where the old folder could not be moved back it is the only one.
        if os.path.exists(path):
            shutil.rmtree(old, ignore_errors=True)


def remove(path: Path) -> None:
    """Delete a file, or a folder with all that it holds.

    Raises:
        OSError: if the disk refuses.
    """
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def sha256(path: Path, offset: int = 0) -> str:
    """SHA-256 of the bytes of `path` from `offset` on, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(offset)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
