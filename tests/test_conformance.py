"""The dataset layer beside sd-scripts, by its golden files: what agrees, and that every difference is meant."""

from __future__ import annotations

import gzip
import json
import re
from functools import cache
from pathlib import Path

import pytest

from tools.conformance import CHECKS, check, main
from tools.conformance import differences as told

FOLDER = Path(__file__).parent / "data" / "conformance"
LEAST: dict[tuple[str, str], float] = {
    ("buckets", "bucket lists"): 1,
    ("buckets", "sizes"): 0.98,
    ("crop", "crop boxes"): 0.98,
    ("crop", "crop_top_left for SDXL"): 0.1,  # sd-scripts tells a crop that it does not make
    ("pixels", "pixels"): 1,
    ("captions", "prompts"): 0.89,
    ("captions", "prompts of samples"): 0.95,
    ("captions", "caption files"): 0.7,
    ("captions", "caption files, allowed"): 0.88,
    ("config_matrix", "files"): 0.87,
    ("config_matrix", "images"): 0.94,
    ("config_matrix", "first batch"): 0.12,  # sd-scripts stops at images of another size than the resolution
    ("legacy_folders", "names"): 1,
    ("legacy_folders", "folders"): 0.75,
    ("reg", "balance"): 0.89,
    ("latents_npz", "latents"): 1,
    ("latents_npz", "latents: names"): 1,
    ("latents_npz", "latents: taken"): 0.66,
}
"""Share of the cases that agree."""

checked = cache(lambda name: check(FOLDER, [name])[name])


@pytest.mark.parametrize(("name", "part"), LEAST)
def test_what_differs_from_sd_scripts_is_meant(name: str, part: str) -> None:
    (found,) = (one for one in checked(name) if one.name == part)
    assert not found.unexplained, "\n".join(told(found, every=True))
    assert 1 - len(found.differing) / len(found.cases) >= LEAST[name, part]


@pytest.mark.parametrize("name", CHECKS)
def test_every_part_is_expected_and_every_reason_needed(name: str) -> None:
    assert {(name, part.name) for part in checked(name)} == {key for key in LEAST if key[0] == name}
    reasons = {known.reason for part in checked(name) for known in part.intended}
    assert reasons == {part.reason(case) for part in checked(name) for case in part.differing}


def test_refusals_name_the_file_or_the_flag() -> None:
    (files, _, _) = checked("config_matrix")
    said = {case.name: case.said for case in files.cases if case.ours == "refused"}
    assert len(said) > 60
    assert {name for name, text in said.items() if not re.search(r"data\.(toml|json)|meta_\w+\.json|--", text)} == set()


def changed(folder: Path, name: str, old: str, new: str) -> Path:
    """A folder with the golden file `name`, in which one answer of sd-scripts is another."""
    text = gzip.decompress((FOLDER / f"{name}.json.gz").read_bytes()).decode()
    assert old in text
    (folder / f"{name}.json").write_text(text.replace(old, new, 1), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("reg", '"reg_final_repeats":[[4,3,3]]', '"reg_final_repeats":[[3,4,3]]'),
        ("buckets", "[512,512],[512,520]", "[512,512],[512,521]"),
        ("crop", "[0,4,512,516]", "[0,3,512,515]"),
        ("captions", "1girl, outdoors, blue eyes", "1girl, blue eyes, outdoors"),
        ("captions", '"captions":["brackets"]', '"captions":["x"]'),
        ("legacy_folders", '"num_repeats":5,', '"num_repeats":6,'),
        ("config_matrix", '"num_train_images":20', '"num_train_images":21'),
    ],
)
def test_a_difference_without_reason_ends_with_1(
    name: str, old: str, new: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(changed(tmp_path, name, old, new)), "--only", name]) == 1
    assert "NOT MEANT" in capsys.readouterr().out


def test_tables_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(FOLDER), "--only", "reg,latents_npz"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^reg +balance +19 +17 +89\.47% +2 +0$", text, re.MULTILINE)
    assert "1 meant: num_repeats = 0 is an error; sd-scripts leaves the folder out\n    train 3 x 1, reg 2 x 0" in text
    assert main([str(FOLDER), "--only", "reg", "--json"]) == 0
    (part,) = json.loads(capsys.readouterr().out)
    assert (part["cases"], part["agreeing"], part["unexplained"], len(part["differences"])) == (19, 17, 0, 2)
    assert "num_repeats = 0" in part["differences"][0]["message"]
    with pytest.raises(SystemExit):
        main([str(FOLDER), "--only", "nothing"])
