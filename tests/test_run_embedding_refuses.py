"""What cannot teach a word is refused before the model is loaded, with the way out; what is doubtful is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sd_train.__main__ import main
from sd_train.data.words import object_sentences
from tests.runs import PHOTOS, write_dataset
from tests.test_run_embedding import arguments

Said = pytest.CaptureFixture[str]


@pytest.fixture
def captioned(tmp_path: Path) -> Path:
    """A folder of three photographs, one caption of which has the word only as a part of another one."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for place, name in enumerate(sorted(PHOTOS.glob("*.jpg"))[:3]):
        shutil.copy(name, folder / f"{place}.jpg")
    for place, text in enumerate(("a photo of MyTok", "mytoken, mat", "mat, mytok")):
        (folder / f"{place}.txt").write_text(text)
    return folder


def dataset_of(folder: Path, path: Path, subset: str = "") -> Path:
    path.write_text(write_dataset(path, subset=subset).read_text().replace(repr(str(PHOTOS)), repr(str(folder))))
    return path


def refused(model: Path, dataset: Path, output: Path, more: str, said: Said) -> str:
    """What a run says that ends before the model is loaded."""
    line = arguments(model, dataset, output, f"--max_train_steps 2 {more}")
    assert main(["train_textual_inversion", *line]) in (2, 3)
    told = said.readouterr()
    assert "model: " not in told.out
    return told.err


def test_captions_without_the_word(small_model: Path, captioned: Path, tmp_path: Path, capsys: Said) -> None:
    dataset = dataset_of(captioned, tmp_path / "d.toml")
    told = refused(small_model, dataset, tmp_path / "out", "", capsys)
    assert "1 of 3 captions lack the word 'mytok', which learns nothing from them: 1.jpg;" in told
    assert "caption_prefix = 'mytok'" in told
    assert "--use_object_template" in told
    (captioned / "1.txt").write_text("mat\nmytok")
    assert "1 of 3 captions" in refused(small_model, dataset, tmp_path / "out", "", capsys)
    # With wildcards every line may be chosen.
    wild = dataset_of(captioned, tmp_path / "wild.toml", "enable_wildcard = true")
    assert "1 of 3 captions" in refused(small_model, wild, tmp_path / "out", "", capsys)
    (captioned / "1.txt").write_text("mytok\na {mytok|mat}")
    more = arguments(small_model, wild, tmp_path / "out", "--max_train_steps 2")
    assert main(["plan", "train_textual_inversion", *more]) == 0
    assert "enable_wildcard may leave the word 'mytok' out of 1 of 3 captions: 1.jpg;" in capsys.readouterr().err
    (captioned / "1.txt").write_text("mytok\na {mytok|new mytok}")
    assert main(["plan", "train_textual_inversion", *more]) == 0
    assert "may leave the word" not in capsys.readouterr().err


def test_a_word_that_is_cut_off_is_told(small_model: Path, captioned: Path, tmp_path: Path, capsys: Said) -> None:
    (captioned / "1.txt").write_text("mat, " * 36 + "mytok")
    dataset = dataset_of(captioned, tmp_path / "d.toml")
    for more, lost in (
        ("", False),
        ("--num_vectors_per_token 4", "1 of 3 captions are longer than 75 tokens"),
        ("--num_vectors_per_token 4 --max_token_length 150", False),
        ("--num_vectors_per_token 72 --use_object_template", "sentences are longer than 75 tokens"),
    ):
        line = arguments(small_model, dataset, tmp_path / "out", f"--max_train_steps 1 {more}")
        assert main(["plan", "train_textual_inversion", *line]) == 0
        told = capsys.readouterr().err
        assert (lost in told) if lost else ("are longer than" not in told)


def test_what_is_doubtful_is_told(small_model: Path, captioned: Path, tmp_path: Path, capsys: Said) -> None:
    (captioned / "1.txt").write_text("mat, mytok")
    dataset = dataset_of(captioned, tmp_path / "d.toml", "token_warmup_step = 5")
    other = "\n[[datasets.subsets]]\nis_reg = true\nimage_dir = "
    dataset.write_text(dataset.read_text() + other + repr(str(PHOTOS)))
    (tmp_path / "p.txt").write_text("a mat\n")
    more = f"--max_train_steps 2 --sample_every_n_steps 1 --sample_prompts {tmp_path / 'p.txt'}"
    line = arguments(small_model, dataset, tmp_path / "out", more)
    assert main(["plan", "train_textual_inversion", *line, "--init_word", "cat mat"]) == 0
    told = capsys.readouterr().err
    for part in (
        "--init_word = 'cat mat': is 2 tokens, and --num_vectors_per_token is 1: only the first 1 of them start one",
        "regularisation images teach nothing here",
        "token_warmup_step may leave the word 'mytok' out of 2 of 3 captions: 1.jpg, 2.jpg; put it in front",
        "none of the prompts holds the word 'mytok'",
    ):
        assert part in told, part


def test_sentences_need_no_captions(small_model: Path, captioned: Path, tmp_path: Path, capsys: Said) -> None:
    for path in captioned.glob("*.txt"):
        path.unlink()
    dataset = dataset_of(captioned, tmp_path / "d.toml")
    more = arguments(small_model, dataset, tmp_path / "out", "--max_train_steps 40 --use_object_template")
    assert main(["plan", "train_textual_inversion", *more, "--json"]) == 0
    images = json.loads(capsys.readouterr().out)["datasets"][0]["images"]
    assert all(set(image["captions"]) <= set(object_sentences("mytok")) for image in images)
    assert main(["explain", str(captioned / "0.jpg"), "train_textual_inversion", *more, "--json"]) == 0
    (shown,) = json.loads(capsys.readouterr().out)
    captions = [time["caption"] for time in shown["shown"]]
    assert set(captions) <= set(object_sentences("mytok"))
    assert len(set(captions)) > 5
    assert captions[0] == images[0]["captions"][0]
    dataset_of(captioned, dataset, "shuffle_caption = true\nkeep_tokens = 1")
    assert main(["plan", "train_textual_inversion", *more]) == 0
    assert "shuffle_caption, keep_tokens have no effect: sentences take the captions' place" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ("--token_string cat", "--token_string = 'cat': stands in CLIP's vocabulary"),
        ("--token_string *", "--token_string = '*': stands in CLIP's vocabulary"),
        ("--use_object_template --token_string sks", None),
        ("--token_string <cat-toy>/x", "--output_name"),
        ("--init_word ,", None),
        ("--learning_rate 0", "nothing would be trained"),
        ("--save_model_as diffusers", "--save_model_as = 'diffusers': train_textual_inversion saves embeddings"),
        ("--cache_text_encoder_outputs", "the text encoder is trained"),
        ("--weights {}/three.safetensors", "has 3 vectors, and --num_vectors_per_token is 1"),
        ("--weights {}/wide.safetensors", "holds extended textual inversion (XTI)"),
        ("--weights {}/wrong.safetensors", "--weights = "),
    ],
)
def test_options_that_do_not_fit(more: str, part: str | None, small_model: Path, tmp_path: Path, capsys: Said) -> None:
    save_file({"emb_params": torch.zeros(3, 64)}, tmp_path / "three.safetensors")
    save_file({"IN01": torch.zeros(1, 64), "MID": torch.zeros(1, 64)}, tmp_path / "wide.safetensors")
    save_file({"a": torch.zeros(1, 64), "b": torch.zeros(1, 64)}, tmp_path / "wrong.safetensors")
    dataset = write_dataset(tmp_path / "d.toml", subset='caption_prefix = "mytok"')
    line = arguments(small_model, dataset, tmp_path / "out", f"--max_train_steps 2 {more.format(tmp_path)}")
    if "--token_string" in more:
        # The later one counts; without another name the file is called by the word.
        place = line.index("--output_name")
        line = [*line[:place], *line[place + 2 : -2]]
    code = main(["plan", "train_textual_inversion", *line])
    told = capsys.readouterr().err
    if part is None:
        assert code == 0
        assert ("'sks': CLIP knows this word" in told) == ("sks" in more)
    else:
        assert code in (2, 3)
        assert part in told or (part == "--output_name" and "give them another name as output_name" in told)


@pytest.mark.parametrize("word", [" ", "a  b", " a"])
def test_blanks_in_the_word(word: str, small_model: Path, tmp_path: Path, capsys: Said) -> None:
    dataset = write_dataset(tmp_path / "d.toml")
    line = arguments(small_model, dataset, tmp_path / "out", "")
    assert main(["train_textual_inversion", *line[:-1], word]) == 2
    assert "--token_string" in capsys.readouterr().err


def test_a_word_with_blanks_and_marks(small_model: Path, tmp_path: Path, capsys: Said) -> None:
    dataset = write_dataset(tmp_path / "d.toml", subset="caption_prefix = 'my (new) {dog}!'")
    line = arguments(small_model, dataset, tmp_path / "out", "--max_train_steps 1 --weighted_captions")
    place = line.index("--output_name")
    assert main(["train_textual_inversion", *line[:place], *line[place + 2 : -1], "my (new) {dog}!"]) == 0
    assert (tmp_path / "out" / "my (new) {dog}!.safetensors").is_file()
    prompt = "a my (new) {dog}! on a mat --w 64 --h 64 --s 1 --d 1"
    config = tmp_path / "out" / "my (new) {dog}!-config.toml"
    assert main(["sample", "--config_file", str(config), "--prompt", prompt]) == 0
    assert "no prompt calls it" not in capsys.readouterr().err


def test_dropped_captions_teach_nothing(small_model: Path, tmp_path: Path, capsys: Said) -> None:
    dataset = write_dataset(tmp_path / "d.toml", subset='caption_prefix = "mytok"\ncaption_dropout_rate = 0.1')
    assert "caption_dropout_rate" in refused(small_model, dataset, tmp_path / "out", "", capsys)
