"""Prompt files against what sd-scripts makes of them, and against what it gets wrong."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from sd_train.errors import ConfigError, Problems
from sd_train.prompts import SAMPLER_NAMES, Prompt, load_prompts, parse_line

GOLDEN = json.loads((Path(__file__).parent / "data" / "prompts.json").read_text(encoding="utf-8"))

REFUSED = {
    "a cat --n low --quality --w 640": ["--quality"],
    "a cat --s -5": ["--s"],
    "a cat --w 51.5": ["--w", "51.5"],
    "a cat --w": ["--w"],
    "a cat --l 7.5.1": ["--l", "7.5.1"],
    "a cat --l abc --w 256": ["--l", "abc"],
    "a cat --l -2": ["--l", "-2"],
    "a cat --cn /path/to/x.png": ["--cn", "not supported"],
    "a cat -- w 512": ["`-- w 512`"],
    "a cat --am 1.0": ["--am"],
    "a cat --ss k_euler --cn a.png --ctr 0.1 --rcfg 2 --fs 2": ["--cn"],
    "cat --l 1e3": ["--l", "1e3"],
    "a cat --n x --y --z 5": ["`--y`", "`--z 5`"],
}
"""Lines of which sd-scripts drops a part without a word, or that ask for a ControlNet."""


def test_lines_mean_what_they_mean_to_sd_scripts() -> None:
    compared = 0
    for line, golden in GOLDEN["lines"]:
        if line in REFUSED:
            continue
        problems = Problems()
        prompt = parse_line(line, "p.txt:1", problems, 1)
        assert problems.found == [], line
        # The prompt itself is no list of options, whatever it begins with.
        expected = golden if " --" in line else {"prompt": golden["prompt"]}
        assert prompt == Prompt(
            text=expected["prompt"],
            negative=expected.get("negative_prompt", ""),
            width=max(64, expected.get("width", 512) // 8 * 8),
            height=max(64, expected.get("height", 512) // 8 * 8),
            seed=expected.get("seed"),
            steps=expected.get("sample_steps", 30),
            scale=expected.get("scale", 7.5),
            sampler=expected.get("sample_sampler"),
            line=1,
        ), line
        compared += 1
    assert compared == len(GOLDEN["lines"]) - len(REFUSED)


@pytest.mark.parametrize("line", REFUSED)
def test_what_sd_scripts_drops_is_told(line: str) -> None:
    problems = Problems()
    assert parse_line(line, "p.txt:7", problems) is None
    text = "\n".join(map(str, problems.found))
    assert all(problem.where.startswith("p.txt:7") for problem in problems.found)
    for part in REFUSED[line]:
        assert part in text


def test_all_problems_of_a_text_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(b"\xef\xbb\xbf# only a comment --x\r\n\r\na cat --w 513 --d -1\r\n # no comment --ss K_Euler\r\n")
    first, second = load_prompts(path)
    assert (first.text, first.width, first.seed, first.line) == ("a cat", 512, None, 3)
    assert (second.text, second.sampler, second.line) == ("# no comment", "k_euler", 4)

    path.write_text("a\nb --ss euler_b --s x\nc --q 1\nd --d 18446744073709551616\n")
    with pytest.raises(ConfigError, match="4 problems") as caught:
        load_prompts(path)
    for part in (":2: --ss = 'euler_b'", ":2: --s = 'x'", ":3: `--q 1`", ":4: --d"):
        assert f"{path}{part}" in str(caught.value)
    assert "dpmsolver++" in str(caught.value)


def test_toml_subset_goes_before_shared(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(
        '[prompt]\nwidth = 640\nscale = 5\nnegative_prompt = "bad"\n'
        '[[prompt.subset]]\nprompt = "w 64 --s 3"\nwidth = 256\nsample_steps = 2000\n'
        '[[prompt.subset]]\nprompt = "b"\nseed = 3\n'
    )
    assert load_prompts(path) == (
        Prompt("w 64 --s 3", "bad", width=256, steps=1000, scale=5.0, line=5),
        Prompt("b", "bad", width=640, seed=3, scale=5.0, line=9),
    )


def test_toml_problems_have_lines(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    path.write_text(
        'other = 1\n[prompt]\nwidth = "512"\n'
        '[[prompt.subset]]\nprompt = "a"\n[[prompt.subset]]\nheight = 1.5\nstep = 3\n'
    )
    with pytest.raises(ConfigError, match="5 problems") as caught:
        load_prompts(path)
    for place in (":1: other", ":3: prompt.width", ":7: prompt.subset[1].height", "subset[1].step", "no `prompt`"):
        assert place in str(caught.value)


def test_golden_files(tmp_path: Path) -> None:
    for golden in GOLDEN["files"]:
        (tmp_path / golden["name"]).write_text(golden["text"])
    assert load_prompts(tmp_path / "c2.toml") == (Prompt("a cat", width=256, line=3),)
    with pytest.raises(ConfigError, match=r"no \[\[prompt.subset\]\]"):
        load_prompts(tmp_path / "c3.toml")
    assert load_prompts(tmp_path / "d.json") == (Prompt("a cat"), Prompt("a dog", width=64, steps=3))
    assert load_prompts(tmp_path / "g.TXT") == (Prompt("a cat", line=1),)


@pytest.mark.parametrize(
    ("name", "text", "part"),
    [
        ("p.json", "[{]", "p.json:1:3"),
        ("p.json", '{"prompt": "a"}', "must hold a list"),
        ("p.json", '[3, {"prompt": 5, "seed": true, "scale": NaN}, "a --x 1"]', "5 problems"),
        ("p.json", '[{"text": "a"}]', "2 problems"),
        ("p.txt", "# nothing\n\n", "holds no prompt"),
        ("p.csv", "a cat", ".txt, .toml or .json"),
        ("p.json", f'[{{"prompt": "a", "seed": {"1" * 5000}}}]', "p.json: a number has more than"),
        ("p.json", "null", "must hold a list"),
        ("p.json", "[" * 100_000, "p.json: is nested deeper than"),
        ("p.json", "[" * 500 + "]" * 500, "p.json: is nested deeper than"),
        ("p.json", '[{"prompt": "a", "prompt": "b"}]', "the key 'prompt' stands twice"),
        ("p.toml", f"[prompt]\nseed = {'1' * 5000}", "p.toml: a number has more than"),
        ("p.toml", f"a = {'[' * 5000}", "p.toml: is nested deeper than"),
        ("p.txt", f"a cat --d {'1' * 5000}", "p.txt:1: --d"),
        ("p.txt", "a cat --w 16385", "must be at most 16384 pixels"),
    ],
)
def test_unusable_files(tmp_path: Path, name: str, text: str, part: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_prompts(tmp_path / name)
    assert part in str(caught.value)


def test_options_of_other_models_warn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "p.txt"
    path.write_text("a cat --g 3.5 --fs 3 --w 256\n")
    with caplog.at_level(logging.WARNING):
        assert load_prompts(path) == (Prompt("a cat", width=256, line=1),)
    assert [record.getMessage().split(":")[-2:-1] for record in caplog.records] == [[" --g"], [" --fs"]]


def test_without_torch() -> None:
    code = "import sys, sd_train.prompts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0
    assert len(SAMPLER_NAMES) == 16
