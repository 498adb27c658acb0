"""`sd-train env`: what it tells, and what it must not."""

from __future__ import annotations

import getpass
import os
import platform
import re
from pathlib import Path

import pytest

from sd_train.__main__ import main
from sd_train.commands.env import installed, troubles


def test_it_tells_what_matters_and_no_secrets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    secret = tmp_path / "holly-golightly"
    secret.mkdir()
    monkeypatch.chdir(secret)
    monkeypatch.setenv("HF_HOME", str(secret))
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijkl")
    assert main(["env"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"^sd_train \S+, Python 3\.\d+\.\d+, \w+ \S+$", told, re.MULTILINE)
    for word in ("torch 2.", "diffusers 0.", "safetensors 0.", "GB free here", "threads", "HF_HOME"):
        assert word in told
    hidden = ["holly", "hf_abc", "HF_TOKEN", str(Path.home()), os.path.sep + "tmp", platform.node()]
    for word in hidden + ([getpass.getuser()] if getpass.getuser() != "root" else []):
        assert not word or word not in told


def test_known_troubles_name_the_way_out() -> None:
    versions = installed()
    assert versions["torch"]
    assert versions["pydantic"]
    assert not any("older than" in trouble or "Muon" in trouble for trouble in troubles(versions))
    found = troubles({**versions, "torch": "2.5.1+cpu", "diffusers": "0.9"})
    assert "torch 2.5.1+cpu is older than 2.6, the first version that is supported; update it" in found
    assert any(trouble.startswith("diffusers 0.9 is older than") for trouble in found)
    assert any("has no Muon" in trouble for trouble in found)


def test_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--all"]) == 2
    assert "env: --all: takes no arguments; write sd-train env" in capsys.readouterr().err
    assert main(["env", "--help"]) == 0
    assert "for a bug report" in capsys.readouterr().out
