"""What cannot be done is said before the first update: with an exit code, the place, the rule and the way out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from sd_train.__main__ import COMMANDS
from sd_train.__main__ import main as sd_train
from sd_train.train_network import main
from tests.runs import PHOTOS, differences, train, tree, words, write_dataset

Refused = Callable[..., str]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A dataset file over the photographs."""
    return write_dataset(tmp_path / "photos.toml")


@pytest.fixture
def refused(
    small_model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs a command that must fail before it writes anything; what it says."""

    def run(code: int, more: str = "", dataset: Path = photos, model: Path = small_model) -> str:
        output = tmp_path / "refused"
        before = tree(output) if output.exists() else None
        capsys.readouterr()
        assert main(words(model, dataset, output, f"--max_train_steps 2 {more}")) == code
        assert (tree(output) if output.exists() else None) == before
        said = capsys.readouterr()
        assert "step 1/" not in said.err
        assert "Traceback" not in said.err
        assert said.err.count("error: ") == 1
        return said.err

    return run


def copied(folder: Path, images: bool = True, captions: str | None = ".txt") -> Path:
    """A dataset file over a folder with a part of the photographs' files."""
    folder.mkdir()
    for file in PHOTOS.iterdir():
        if file.suffix == ".jpg" and images:
            shutil.copy(file, folder / file.name)
        elif file.suffix == ".txt" and captions:
            shutil.copy(file, folder / file.with_suffix(captions).name)
    dataset = write_dataset(folder.with_suffix(".toml"))
    dataset.write_text(dataset.read_text().replace(str(PHOTOS), str(folder)))
    return dataset


def test_another_runs_files(small_model: Path, photos: Path, tmp_path: Path, refused: Refused) -> None:
    output = tmp_path / "refused"
    old = train(small_model, photos, output, "--max_train_steps 1 --save_state")
    said = refused(2)
    for part in ("lora.safetensors", "lora-state", "--overwrite", "--resume latest", "--output_name"):
        assert part in said
    # Another name has nothing to do with them; --overwrite replaces them.
    name = "--max_train_steps 1 --output_name"
    assert main(words(small_model, photos, output, f"{name} other")) == 0
    fresh = train(small_model, photos, tmp_path / "fresh", "--max_train_steps 2")
    assert differences(old, fresh) != []
    assert differences(train(small_model, photos, output, "--max_train_steps 2 --overwrite"), fresh) == []


def test_no_images(tmp_path: Path, refused: Refused) -> None:
    dataset = copied(tmp_path / "empty", images=False)
    said = refused(2, dataset=dataset)
    assert str(tmp_path / "empty") in said
    assert f"{dataset}:10: datasets[0].subsets[0].image_dir" in said
    assert "it holds 6 other files" in said


def test_no_captions(small_model: Path, tmp_path: Path, refused: Refused) -> None:
    dataset = copied(tmp_path / "bare", captions=None)
    said = refused(3, dataset=dataset)
    assert "6 of 6 images" in said
    assert "class_tokens" in said
    assert "--allow_missing_captions" in said
    lora = train(small_model, dataset, tmp_path / "allowed", "--max_train_steps 1 --allow_missing_captions")
    dataset.write_text(dataset.read_text() + 'class_tokens = "photo"\n')
    named = train(small_model, dataset, tmp_path / "named", "--max_train_steps 1")
    assert differences(lora, named) != []


def test_captions_of_another_extension(tmp_path: Path, refused: Refused) -> None:
    dataset = copied(tmp_path / "other", captions=".txt")
    text = dataset.read_text().replace('caption_extension = ".txt"', 'caption_extension = ".caption"')
    dataset.write_text(text + 'class_tokens = "photo"\n')
    said = refused(3, dataset=dataset)
    assert "have no .caption file, but 6 of them have a .txt file" in said
    assert 'caption_extension = ".txt"' in said


def test_missing_model(tmp_path: Path, refused: Refused) -> None:
    said = refused(3, model=tmp_path / "nowhere.safetensors")
    assert f"--pretrained_model_name_or_path = {tmp_path / 'nowhere.safetensors'}" in said


def test_broken_model(tmp_path: Path, refused: Refused) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x10\0\0\0\0\0\0\0 no model at all ")
    assert str(broken) in refused(3, model=broken)


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        ("--optimizer_type AdmW", ("AdmW", "did you mean AdamW?")),
        ("--optimizer_args wait_decay=0.1", ("wait_decay", "weight_decay")),
        ("--lr_scheduler cosin", ("cosin", "did you mean cosine?")),
        ("--learning_rat 1", ("--learning_rat", "learning_rate")),
        ("--network_train_unet_only --network_train_text_encoder_only", ("exclude each other",)),
        ("--lr_warmup_steps 3 --lr_scheduler linear", ("longer than the training",)),
        ("--sample_prompts none.txt", ("--sample_prompts", "no such file")),
        ("--resume latest", ("holds no sealed state", "--save_state")),
        ("--resume nowhere", ("--resume", "nowhere")),
        ("--full_bf16", ("--full_bf16", "not yet supported")),
    ],
)
def test_options(refused: Refused, more: str, parts: tuple[str, ...]) -> None:
    said = refused(2, more)
    for part in parts:
        assert part in said


def test_cached_latents_cannot_be_cropped_at_random(tmp_path: Path, refused: Refused) -> None:
    dataset = write_dataset(tmp_path / "d.toml", subset="random_crop = true")
    assert "random_crop" in refused(2, "--cache_latents", dataset=dataset)


def test_wrong_dataset_key(tmp_path: Path, refused: Refused) -> None:
    dataset = write_dataset(tmp_path / "d.toml", dataset="batch_sise = 2", subset="num_repeats = 'many'")
    said = refused(2, dataset=dataset)
    assert "2 problems" in said
    assert f"{dataset}:8: datasets[0].batch_sise" in said
    assert "did you mean 'batch_size'?" in said
    assert "num_repeats" in said


def test_all_problems_come_at_once(tmp_path: Path, refused: Refused) -> None:
    said = refused(2, "--max_train_step 5 --network_dim -1 --mixed_precision fp8 --seed none")
    assert "4 problems" in said
    for flag in ("--max_train_step = ", "--network_dim", "--mixed_precision", "--seed"):
        assert f"  - {flag}" in said
    bare = copied(tmp_path / "bare", captions=None)
    said = refused(2, "--optimizer_type Adum --resume latest", dataset=bare, model=tmp_path / "no.safetensors")
    for part in ("Adum", "--resume = 'latest'", "no caption", "no.safetensors"):
        assert part in said


def test_a_finished_run_and_another_base_model(
    small_model: Path, photos: Path, tmp_path: Path, refused: Refused
) -> None:
    train(small_model, photos, tmp_path / "run", "--max_train_steps 2 --save_state")
    state = tmp_path / "run" / "lora-state"
    said = refused(2, f"--resume {state}")
    assert f"--resume = {state}: stands at step 2 and the training ends at 2" in said
    assert "--max_train_steps" in said
    other = tmp_path / "other.safetensors"
    weights = load_file(small_model)
    name = next(name for name in weights if name.endswith("out.2.weight"))
    save_file(weights | {name: weights[name] * 1.01}, other)
    said = refused(3, f"--resume {state} --max_train_epochs 3", model=other)
    assert "was trained on another base model" in said
    # A copy of the same model under another name is the same model.
    shutil.copy(small_model, other)
    train(other, photos, tmp_path / "again", f"--resume {state} --max_train_steps 3")


def test_debug_dataset_lists_and_reads_no_model(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model.safetensors"
    model.write_bytes(b"no model: it must not be read")
    before = tree(tmp_path)
    assert main(words(model, photos, tmp_path / "out", "--debug_dataset --train_batch_size 2")) == 0
    listed = capsys.readouterr().out
    for photo in PHOTOS.glob("*.jpg"):
        assert photo.name in listed
        assert photo.with_suffix(".txt").read_text().strip() in listed
    assert "update 3: 64x64" in listed
    after = tree(tmp_path)
    assert {name: after[name] for name in before} == before
    assert all(name.startswith("out/lora-dataset") for name in after.keys() - before.keys())


def test_the_command_sd_train(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert sd_train([]) == 2
    usage = capsys.readouterr().out
    assert sd_train(["--help"]) == 0
    assert capsys.readouterr().out == usage
    assert all(f"  {name} " in usage for name in COMMANDS)
    assert sd_train(["--version"]) == 0
    assert capsys.readouterr().out.startswith("sd_train 0.")
    assert sd_train(["train_netwrk"]) == 2
    assert "'train_netwrk' is no command; did you mean train_network? use one of " in capsys.readouterr().err
    assert sd_train(["schema", "dataset"]) == 0
    assert '"image_dir"' in capsys.readouterr().out
    there = tmp_path / "model.safetensors"
    there.write_text("precious")
    assert sd_train(["make_tiny_model", str(there)]) == 2
    assert f"{there}: exists already" in capsys.readouterr().err
    assert there.read_text() == "precious"
    assert sd_train(["make_tiny_model", str(tmp_path / "model.bin")]) == 2
    assert "neither a .safetensors file nor a folder" in capsys.readouterr().err


def test_the_demonstration_says_where_everything_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "demo"
    assert sd_train(["demo", "--output_dir", str(output), "--max_train_steps", "2"]) == 0
    places = {
        name: Path(line.partition(":")[2].partition("  (")[0].strip())
        for line in capsys.readouterr().out.splitlines()
        for name in ("LoRA", "samples", "TensorBoard", "picture")
        if line.startswith(name + ":")
    }
    assert places["LoRA"] == output / "demo.safetensors"
    assert places["LoRA"].is_file()
    # Eight prompts before and after.
    assert len(list(places["samples"].glob("*.png"))) == 16
    with Image.open(places["picture"]) as shown:
        assert shown.width > 8 * 128
        assert shown.height > 3 * 128
    assert list(places["TensorBoard"].rglob("events.out.tfevents.*"))


def test_an_image_that_breaks_off_names_the_ways_to_find_all(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(PHOTOS, folder)
    broken = sorted(folder.glob("*.jpg"))[0]
    broken.write_bytes(broken.read_bytes()[:-4000])
    dataset = write_dataset(tmp_path / "d.toml")
    dataset.write_text(dataset.read_text().replace(str(PHOTOS), str(folder)))
    arguments = words(small_model, dataset, tmp_path / "out", "--max_train_epochs 1 --cache_latents")
    assert main(arguments) == 3
    said = capsys.readouterr().err
    assert str(broken) in said
    assert "--skip_broken_images" in said
    assert main([*arguments, "--verify_images"]) == 3
    assert str(broken) in capsys.readouterr().err
    assert main([*arguments, "--skip_broken_images"]) == 0
    assert broken.name in capsys.readouterr().err
