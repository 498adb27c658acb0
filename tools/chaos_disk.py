"""A small disk for one process, as `chaos.py` fills it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from pathlib import Path

CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
MS_PRIVATE_EVERYWHERE = 0x44000


def mount_small(folder: Path, size: int) -> bool:
    """Give this process a disk of `size` bytes at `folder`, which nobody else sees; whether the system lets us."""
    library = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if library.unshare(CLONE_NEWNS):
        if library.unshare(CLONE_NEWNS | CLONE_NEWUSER):
            return False
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path(f"/proc/self/{name}").write_text(text)
    library.mount(None, b"/", None, MS_PRIVATE_EVERYWHERE, None)
    return not library.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode())


def fill(path: Path, left: int) -> None:
    """Write a file that leaves `left` bytes of its disk, or nothing where others write there meanwhile."""
    with contextlib.suppress(OSError):
        path.write_bytes(bytes(max(0, shutil.disk_usage(path.parent).free - left)))
