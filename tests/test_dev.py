"""The parts of tools/dev.py that need no network: what it decides, what it runs and what it says."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tools import dev

ROOT = Path(__file__).resolve().parent.parent


def test_old_python_is_refused() -> None:
    dev.check_python((3, 11), "python")
    dev.check_python((3, 14), "python")
    with pytest.raises(dev.SetupError, match=r"/usr/bin/python is Python 3\.10; sd_train needs Python 3\.11 or later"):
        dev.check_python((3, 10), "/usr/bin/python")


def test_python_without_ensurepip_is_refused_with_the_package_to_install() -> None:
    dev.check_modules((3, 11), lambda name: name)
    with pytest.raises(dev.SetupError, match=r"no ensurepip.*sudo apt install python3\.12-venv"):
        dev.check_modules((3, 12), lambda name: None if name == "ensurepip" else name)


def test_full_disk_is_refused() -> None:
    dev.check_space(dev.SPACE_NEEDED, Path("/here"))
    with pytest.raises(dev.SetupError, match=r"the disk of /here has 1\.0 GiB free"):
        dev.check_space(2**30, Path("/here"))


def test_fingerprint_names_all_that_an_installation_depends_on(tmp_path: Path) -> None:
    first, second = tmp_path / "pyproject.toml", tmp_path / "constraints.txt"
    first.write_bytes(b"[project]\n")
    second.write_bytes(b"torch==1\n")
    before = dev.fingerprint([first, second], "3.11", tmp_path)
    assert dev.fingerprint([first, second], "3.11", tmp_path) == before
    assert dev.fingerprint([first, second], "3.12", tmp_path) != before
    assert dev.fingerprint([first, second], "3.11", tmp_path / "moved") != before
    second.write_bytes(b"torch==1\r\n")
    assert dev.fingerprint([first, second], "3.11", tmp_path) == before
    second.write_bytes(b"torch==2\n")
    assert dev.fingerprint([first, second], "3.11", tmp_path) != before


def test_only_environments_may_be_removed(tmp_path: Path) -> None:
    whole, half, other = tmp_path / "whole", tmp_path / "half", tmp_path / "other"
    for folder in (whole, half / "bin", half / "lib", other):
        folder.mkdir(parents=True)
    (whole / "pyvenv.cfg").write_text("home = /nowhere\n", encoding="utf-8")
    (whole / "notes.txt").write_text("", encoding="utf-8")
    (other / "thesis.tex").write_text("", encoding="utf-8")
    (tmp_path / "link").symlink_to(whole)
    assert dev.may_remove(whole)
    assert dev.may_remove(half)
    assert not dev.may_remove(other)
    assert not dev.may_remove(tmp_path / "link")
    assert not dev.may_remove(other / "thesis.tex")


def test_variables_of_another_environment_are_left_out() -> None:
    given = {"PYTHONPATH": "/other", "VIRTUAL_ENV": "/other", "PIP_USER": "1", "PATH": "/bin", "PIP_INDEX_URL": "url"}
    kept = dev.clean_environment(given)
    assert not {"PYTHONPATH", "VIRTUAL_ENV", "PIP_USER"} & set(kept)
    assert (kept["PATH"], kept["PIP_INDEX_URL"]) == ("/bin", "url")


def test_command_lines() -> None:
    python = dev.python_of(Path(".venv"), windows=False)
    assert python == Path(".venv/bin/python")
    assert dev.python_of(Path(".venv"), windows=True) == Path(".venv/Scripts/python.exe")
    pip = dev.pip_command(python)
    assert pip[1:4] == ["-m", "pip", "install"]
    assert pip[pip.index("--constraint") + 1] == "constraints.txt"
    commands = dev.check_commands(python, 2, ["-k", "dev"], colour=False)
    assert list(commands) == ["ruff", "mypy", "pytest"]
    assert commands["pytest"][-2:] == ["-k", "dev"]
    assert commands["pytest"][commands["pytest"].index("-n") + 1] == "2"


@pytest.mark.parametrize(
    ("output", "advice"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "the disk is full"),
        (
            "WARNING: Retrying after connection broken by 'NewConnectionError'\n"
            "ERROR: No matching distribution found for torch>=2.6",
            "the package index was not reached",
        ),
        ("ERROR: No matching distribution found for torch>=2.6", "the package index offers no torch>=2.6 for"),
        ("ERROR: ResolutionImpossible: for help visit", "pyproject.toml and constraints"),
        ("error: subprocess-exited-with-error", "read pip's last lines"),
    ],
)
def test_advice_for_a_failed_installation(output: str, advice: str) -> None:
    assert dev.pip_advice(output, "3.15").startswith(advice)


def test_summary_ends_with_pytests_own_line() -> None:
    outcomes = [
        dev.Outcome("ruff", 1, 0.25, ["Found 2 errors."]),
        dev.Outcome("pytest", 0, 3.0, ["....", "4 passed, 1 skipped in 2.91s"]),
    ]
    assert dev.summary(outcomes) == [
        "ruff: failed with exit code 1 (0.2 s)",
        "pytest: passed (3.0 s)",
        "4 passed, 1 skipped in 2.91s",
    ]


def test_output_and_exit_code_of_a_command_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys; print('première'); print('second', file=sys.stderr); sys.exit(3)"
    outcome = dev.run_command("sample", [sys.executable, "-X", "utf8", "-u", "-c", code], show=True)
    assert (outcome.code, outcome.last_lines) == (3, ["première", "second"])
    assert capsys.readouterr().out == "première\nsecond\n"
    assert dev.probe(Path(sys.executable)) == f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert dev.probe(ROOT / "no" / "python") is None


@pytest.mark.parametrize(("arguments", "code"), [([], 0), (["--help"], 0), (["deploy"], 2), (["setup", "now"], 2)])
def test_usage_is_shown(arguments: list[str], code: int) -> None:
    command = [sys.executable, str(ROOT / "tools" / "dev.py"), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONUTF8": "1"})
    assert run.returncode == code
    assert "usage: python tools/dev.py COMMAND" in (run.stderr if code else run.stdout)


def test_every_requirement_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(pin.count("==") == 1 and not set("@+ ;") & set(pin) for pin in pins)
    pinned = {pin.split("==")[0].lower().replace("_", "-") for pin in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    assert {item.split(">=")[0].lower() for item in needed} <= pinned
