"""`sd-train env`: what a bug report needs to say about the machine, without names, paths or keys."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from sd_train import __version__
from sd_train.errors import ConfigError

USAGE = """usage: sd-train env

Print versions, processor, memory, GPUs and free disk, and what is known not to work together, for a bug report. No
paths, user or host names, and of environment variables only whether they are set."""

_VARIABLES = (
    "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ENABLE_MPS_FALLBACK", "TORCH_LOGS", "WORLD_SIZE",
)  # fmt: skip
"""What changes how a training runs."""
_LITTLE_DISK = 10 * 10**9
"""Bytes below which saves of whole models may not fit."""


def main(argv: Sequence[str]) -> int:
    """Print the report and return 0.

    Raises:
        ConfigError: if there are arguments.
    """
    words = list(argv)
    if words in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    if words:
        raise ConfigError(f"env: {' '.join(words)}: takes no arguments; write sd-train env")
    print("\n".join(report()))
    return 0


def report() -> list[str]:
    """The lines of the report."""
    versions = installed()
    lines = [
        f"sd_train {__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        f"processor: {os.cpu_count()} threads{_model()}; memory {_memory()}",
        f"disk: {shutil.disk_usage('.').free / 1e9:.0f} GB free here",
        *_torch(),
        "packages: " + ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "not installed: " + (", ".join(name for name, version in versions.items() if not version) or "none"),
        "environment variables that are set: "
        + (", ".join(name for name in _VARIABLES if name in os.environ) or "none"),
    ]
    found = troubles(versions)
    return [*lines, *(f"known trouble: {trouble}" for trouble in found or ["none found"])]


def installed() -> dict[str, str | None]:
    """Every package that ours names, with its version; None: not installed."""
    names = [re.split(r"[\s<>=!~\[;]", line, maxsplit=1)[0] for line in _requirements()]
    return {name: _version(name) for name in sorted({*names} - {"sd-train"}, key=str.lower)}


def _requirements() -> list[str]:
    try:
        return metadata.requires("sd-train") or []
    except metadata.PackageNotFoundError:
        # Run from its folder, without being installed.
        return []


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def troubles(versions: dict[str, str | None]) -> list[str]:
    """What of this machine is known to cause trouble, each with the way out."""
    found = []
    for line in _requirements():
        least = re.match(r"([\w.-]+)>=([\d.]+)", line)
        version = versions.get(least[1]) if least else None
        if least and version and _numbers(version) < _numbers(least[2]):
            found.append(
                f"{least[1]} {version} is older than {least[2]}, the first version that is supported; update it"
            )
    if all(_version(name) for name in ("opencv-python", "opencv-python-headless")):
        found.append(
            "opencv-python and opencv-python-headless overwrite each other's files; uninstall both, then install one"
        )
    if (torch := versions.get("torch")) and _numbers(torch) < (2, 9):
        found.append(f"torch {torch} has no Muon; update it for --optimizer_type Muon")
    if _nvidia() and not _has_cuda():
        found.append("there is an NVIDIA GPU and this torch cannot use it; install the CUDA build of the same version")
    if shutil.disk_usage(".").free < _LITTLE_DISK:
        found.append("little disk is left; whole models and states may not fit, see sd-train plan")
    return found


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _nvidia() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _torch() -> list[str]:
    """What torch was built for, and the devices that it sees."""
    import torch

    built = torch.version.cuda or getattr(torch.version, "hip", None) or "the processor alone"
    lines = [f"torch {torch.__version__}, built for {built}, {torch.get_num_threads()} threads"]
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        lines.append(
            f"GPU {number}: {facts.name}, {facts.total_memory / 1e9:.0f} GB, capability {facts.major}.{facts.minor}"
        )
    if torch.backends.mps.is_available():
        lines.append("GPU: Apple, MPS")
    return lines


def _model() -> str:
    """The processor's name, where the system tells."""
    path = Path("/proc/cpuinfo")
    if sys.platform == "linux" and path.exists():
        names = re.findall(r"^model name\s*:\s*(.+)$", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        return f", {names[0]}" if names else ""
    return f", {platform.processor()}" if platform.processor() else ""


def _memory() -> str:
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.0f} GB"
    return "unknown"
