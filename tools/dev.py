"""Sets the project up in `.venv` and runs its demonstration or its tests: `python tools/dev.py setup | demo | test`.

Standard library only; needs no activated environment and reuses what is there. The syntax is that of Python 3.8, so
that a Python that is too old for the project still gets as far as the message that says so.
"""

from __future__ import annotations

import codecs
import hashlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv"
STAMP = ENVIRONMENT / "sd_train_setup.txt"
OLDEST_PYTHON = (3, 11)
SPACE_NEEDED = 3 * 2**30
MOST_WORKERS = 4
USAGE = """\
usage: python tools/dev.py COMMAND

  setup            make .venv beside pyproject.toml and install the pinned dependencies and the package into it
  demo [OPTIONS]   setup, then teach the model that ships with the package a new thing (OPTIONS go to the demo)
  test [-- ARGS]   setup, then ruff, mypy and pytest (ARGS go to pytest)
"""

_NETWORK = re.compile(
    r"NewConnectionError|NameResolutionError|ConnectionError|ProxyError|SSLError|CERTIFICATE_VERIFY_FAILED|ReadTimeout"
    r"|Temporary failure in name resolution|Name or service not known|getaddrinfo failed|Connection refused"
)
_DISK = re.compile(r"No space left on device|Errno 28|not enough space on the disk", re.IGNORECASE)
_MISSING = re.compile(r"No matching distribution found for (\S+)")
_OWN_NAMES = {"bin", "include", "Include", "lib", "lib64", "Lib", "Scripts", "share", "pyvenv.cfg", ".gitignore"}


class SetupError(Exception):
    """The environment cannot be made; the message says why and what to do."""


@dataclass(frozen=True)
class Outcome:
    """How one command ended."""

    name: str
    code: int
    seconds: float
    last_lines: list[str]


def say(text: str) -> None:
    print(text, flush=True)


def check_python(version: tuple[int, int], executable: str) -> None:
    """Refuse a Python that is too old."""
    if version < OLDEST_PYTHON:
        raise SetupError(
            f"{executable} is Python {version[0]}.{version[1]}; sd_train needs Python {OLDEST_PYTHON[0]}."
            f"{OLDEST_PYTHON[1]} or later: install one (https://www.python.org/downloads/) and start this file with "
            f"it, for instance python3.11 tools/dev.py"
        )


def check_modules(version: tuple[int, int], finder: Callable[[str], object | None]) -> None:
    """Refuse a Python that cannot make environments; Debian and Ubuntu split that part off."""
    missing = [name for name in ("venv", "ensurepip") if finder(name) is None]
    if missing:
        raise SetupError(
            f"this Python has no {' and no '.join(missing)}, which make environments: on Debian and Ubuntu run "
            f"sudo apt install python{version[0]}.{version[1]}-venv, elsewhere install a complete Python "
            f"(https://www.python.org/downloads/)"
        )


def check_space(free: int, place: Path) -> None:
    """Refuse to begin on a disk that is too full for the dependencies."""
    if free < SPACE_NEEDED:
        raise SetupError(
            f"the disk of {place} has {free / 2**30:.1f} GiB free; the dependencies take about "
            f"{SPACE_NEEDED / 2**30:.0f} GiB (more with CUDA): free some space, or move the project to a larger disk"
        )


def fingerprint(files: Sequence[Path], python: str, place: Path) -> str:
    """What an installation depends on, as one line: the files' text, the Python version and where the project is."""
    digest = hashlib.sha256()
    for part in [python.encode(), str(place).encode(), *(file.read_bytes() for file in files)]:
        digest.update(hashlib.sha256(part.replace(b"\r\n", b"\n")).digest())
    return digest.hexdigest()


def python_of(environment: Path, windows: bool) -> Path:
    """The interpreter of a virtual environment."""
    return environment / "Scripts" / "python.exe" if windows else environment / "bin" / "python"


def may_remove(environment: Path) -> bool:
    """Whether `environment` is a virtual environment, whole or half made, and nothing else."""
    if environment.is_symlink() or not environment.is_dir():
        return False
    return (environment / "pyvenv.cfg").is_file() or all(entry.name in _OWN_NAMES for entry in environment.iterdir())


def clean_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables for commands in `.venv`, without those that would lead them to another Python or folder."""
    unwanted = {"PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__"}
    unwanted |= {"PIP_TARGET", "PIP_PREFIX", "PIP_USER", "PIP_REQUIRE_VIRTUALENV"}
    kept = {name: value for name, value in variables.items() if name not in unwanted}
    return {**kept, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PYTHONUTF8": "1"}


def pip_command(python: Path) -> list[str]:
    """One call installs everything, so that no package can replace the pinned torch by another."""
    return [str(python), "-m", "pip", "install", "--constraint", "constraints.txt", "--editable", ".[dev]"]


def pip_advice(output: str, version: str) -> str:
    """The way out of a failed installation, read from pip's output."""
    if _DISK.search(output):
        return "the disk is full: free some space (or set TMPDIR to a folder on a larger disk) and run this again"
    if _NETWORK.search(output):
        return "the package index was not reached: check the network, HTTPS_PROXY and PIP_INDEX_URL, and run this again"
    if missing := _MISSING.search(output):
        return (
            f"the package index offers no {missing[1]} for Python {version} on this machine: check the network and "
            f"PIP_INDEX_URL; if they are right, delete .venv and run this again with another Python (3.11 is tested)"
        )
    if "ResolutionImpossible" in output:
        return "pyproject.toml and constraints.txt do not agree: correct the version that pip names above"
    return "read pip's last lines above; after a repair run this again"


def check_commands(python: Path, workers: int, arguments: Sequence[str], colour: bool) -> dict[str, list[str]]:
    """Lint, types and tests, in the order in which they run."""
    pytest = [str(python), "-m", "pytest", "-q", "-n", str(workers), "--dist", "loadfile"]
    return {
        "ruff": [str(python), "-m", "ruff", "check"],
        "mypy": [str(python), "-m", "mypy"],
        "pytest": [*pytest, f"--color={'yes' if colour else 'no'}", *arguments],
    }


def summary(outcomes: Sequence[Outcome]) -> list[str]:
    """How long each command took and how it ended, then pytest's own summary as the last line."""
    lines = [
        f"{outcome.name}: {'passed' if outcome.code == 0 else f'failed with exit code {outcome.code}'} "
        f"({outcome.seconds:.1f} s)"
        for outcome in outcomes
    ]
    last = [line for line in outcomes[-1].last_lines if re.search(r"\d+ (passed|failed|errors?)|no tests ran", line)]
    return [*lines, *last[-1:]]


def probe(python: Path) -> str | None:
    """Version ("3.11") of an environment's Python, None if it does not run or has no pip."""
    command = [str(python), "-c", "import sys, pip; print('%d.%d' % sys.version_info[:2])"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, env=clean_environment(os.environ))
    except OSError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def run_command(name: str, command: Sequence[str], show: bool, extra: Mapping[str, str] | None = None) -> Outcome:
    """Run `command` in the project's folder and keep its last lines.

    With `show` its output appears as it comes; otherwise a terminal shows the line that is being worked on. Ctrl-C is
    left to the command, which gets it too, so that it can end in its own way.

    Raises:
        KeyboardInterrupt: after the command has ended, if there was a Ctrl-C.
    """
    begin = time.monotonic()
    lines: deque[str] = deque([""], maxlen=40)
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    environment = {**clean_environment(os.environ), **(extra or {})}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    interrupted = False
    while True:
        try:
            chunk = os.read(process.stdout.fileno(), 65536) if process.stdout else b""
            text = decoder.decode(chunk).replace("\r", "")
            first, *others = text.split("\n")
            lines[-1] += first
            lines.extend(others)
            if show:
                sys.stdout.write(text)
                sys.stdout.flush()
            else:
                show_current(next((line for line in reversed(lines) if line.strip()), ""))
            if not chunk:
                code = process.wait()
                break
        except KeyboardInterrupt:
            interrupted = True
    show_current("")
    if interrupted:
        raise KeyboardInterrupt
    return Outcome(name, code, time.monotonic() - begin, [line for line in lines if line.strip()])


def show_current(line: str) -> None:
    """On a terminal, show `line` in place of the one before; the next output overwrites it."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 1
        sys.stdout.write("\r" + line.strip()[:width].ljust(width) + "\r")
        sys.stdout.flush()


def prepare_environment() -> str:
    """Make, reuse or remake `.venv`; gives the version of its Python."""
    python = python_of(ENVIRONMENT, os.name == "nt")
    version = probe(python)
    if version is not None and tuple(map(int, version.split("."))) >= OLDEST_PYTHON:
        say(f"environment: {ENVIRONMENT} is there (Python {version})")
        return version
    here = (sys.version_info[0], sys.version_info[1])
    check_python(here, sys.executable)
    check_modules(here, importlib.util.find_spec)
    check_space(shutil.disk_usage(ROOT).free, ROOT)
    if ENVIRONMENT.exists() or ENVIRONMENT.is_symlink():
        if not may_remove(ENVIRONMENT):
            raise SetupError(f"{ENVIRONMENT} is there and is no virtual environment: move it away and run this again")
        say(f"environment: {ENVIRONMENT} does not work or has an old Python; it is removed and made again")
        shutil.rmtree(ENVIRONMENT)
    made = run_command("venv", [sys.executable, "-m", "venv", str(ENVIRONMENT)], show=False)
    version = probe(python)
    if made.code != 0 or version is None:
        raise SetupError("\n".join([*made.last_lines[-10:], f"the environment {ENVIRONMENT} could not be made"]))
    say(f"environment: made {ENVIRONMENT} with Python {version} ({made.seconds:.1f} s)")
    return version


def setup() -> Path:
    """Bring `.venv` up to date and give its Python."""
    version = prepare_environment()
    python = python_of(ENVIRONMENT, os.name == "nt")
    wanted = fingerprint([ROOT / "pyproject.toml", ROOT / "constraints.txt"], version, ROOT)
    if STAMP.is_file() and STAMP.read_text(encoding="utf-8").strip() == wanted:
        say("packages: as pyproject.toml and constraints.txt ask, nothing to install")
        return python
    STAMP.unlink(missing_ok=True)
    say("packages: installing from constraints.txt (the first time this downloads torch and takes some minutes)")
    installed = run_command("pip", pip_command(python), show=False)
    if installed.code != 0:
        advice = pip_advice("\n".join(installed.last_lines), version)
        raise SetupError("\n".join([*installed.last_lines[-15:], f"pip failed: {advice}"]))
    say(f"packages: installed ({installed.seconds:.1f} s)")
    code = "import cv2, sd_train, torch; print(torch.__version__, 'with' if torch.cuda.is_available() else 'without')"
    check = run_command("check", [str(python), "-c", code], show=False)
    if check.code != 0:
        raise SetupError("\n".join([*check.last_lines[-15:], "the packages are installed but cannot be imported"]))
    say(f"packages: torch {' '.join(check.last_lines[-1:])} a CUDA or ROCm device ({check.seconds:.1f} s)")
    STAMP.write_text(wanted + "\n", encoding="utf-8")
    return python


def run_tests(arguments: Sequence[str]) -> int:
    """Lint, types and tests; all of them run, the exit code is that of the first that fails."""
    python = setup()
    workers = min(MOST_WORKERS, os.cpu_count() or 1)
    outcomes = []
    for name, command in check_commands(python, workers, arguments, sys.stdout.isatty()).items():
        say(f"{name}: running")
        outcomes.append(run_command(name, command, show=True, extra={"OMP_NUM_THREADS": "1"}))
    say("\n".join(["", *summary(outcomes)]))
    return next((outcome.code for outcome in outcomes if outcome.code != 0), 0)


def run_demo(arguments: Sequence[str]) -> int:
    """The demonstration, with its own terminal; Ctrl-C is left to it, so that it can save."""
    process = subprocess.Popen([str(setup()), "-m", "sd_train", "demo", *arguments], env=clean_environment(os.environ))
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def main(arguments: Sequence[str]) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help", "help"):
        say(USAGE)
        return 0
    if command not in ("setup", "demo", "test") or (command == "setup" and rest):
        print(f"unknown: {' '.join(arguments)}\n\n{USAGE}", file=sys.stderr)
        return 2
    try:
        if command == "test":
            return run_tests(rest[1:] if rest[:1] == ["--"] else rest)
        if command == "demo":
            return run_demo(rest)
        setup()
    except SetupError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
