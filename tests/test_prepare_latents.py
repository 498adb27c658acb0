"""Latents beside the images, image filter, and the model and image tools."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sd_train.__main__ import main
from sd_train.families.parts import ModelRequest, read_model
from sd_train.families.sources import read_all
from sd_train.prepare.resize_images_to_resolution import scaled
from tests.models import load, write_file, write_small_file
from tests.runs import PHOTOS, SOURCES, environment

LONG = "x" * 251 + ".png"
"""No room for its latents' name."""
FULL = "y" * 238 + ".png"
"""Room for its latents' name, and for nothing more."""
BUCKETS = "--max_resolution 96,96 --min_bucket_reso 64 --max_bucket_reso 128 --flip_aug --recursive"
TRAINED = "--resolution 96 --enable_bucket --min_bucket_reso 64 --max_bucket_reso 128 --flip_aug --max_train_steps 1"


def unusual_images(folder: Path) -> Path:
    """Images with unusual names, turned, transparent and broken, and metadata that name all but one."""
    images = folder / "images"
    (images / "sub %").mkdir(parents=True)
    square = Image.open(PHOTOS / "astronaut_face.jpg").resize((64, 64))
    for name in ("plain.png", LONG, FULL, "sub %/plain.png", "sub %/\u00fcn\u00ef \u732b.JPG", "left out.webp"):
        square.save(images / name, lossless=True, quality=95)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.open(PHOTOS / "rocket.jpg").save(images / "turned.jpeg", exif=turned)
    clear = square.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize((64, 64)))
    clear.save(images / "clear.png")
    (images / "broken.jpg").write_bytes((PHOTOS / "coffee.jpg").read_bytes()[:9000])
    keys = [str(path.relative_to(images)) for path in sorted(images.rglob("*.*")) if path.suffix != ".webp"]
    (folder / "in.json").write_text(json.dumps({key: {"caption": "a face", "own": 1} for key in keys}))
    return images


def prepare(folder: Path, model: Path, more: str = "") -> int:
    words = [folder / "images", folder / "in.json", folder / "out.json", model, *BUCKETS.split(), *more.split()]
    return main(["prepare_buckets_latents", *map(str, words)])


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*")) if path.is_file()
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {name: content for name, (content, _) in files(folder).items()}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    unusual_images(folder)
    assert prepare(folder, tiny_model, "--alpha_mask --batch_size 3") == 3
    return folder


def test_latents_are_draws_from_the_posterior_of_what_is_trained(prepared: Path, tiny_model: Path) -> None:
    found = {path.name for path in (prepared / "images").rglob("*.npz")}
    assert found == {
        "plain_0064x0064_sd.npz", "\u00fcn\u00ef \u732b_0064x0064_sd.npz", "clear_0064x0064_sd.npz",
        "turned_0264x0512_sd.npz", "y" * 238 + "_0064x0064_sd.npz",
    }  # fmt: skip
    family = load(tiny_model)
    pixels = np.asarray(Image.open(prepared / "images" / "plain.png"), np.float32).transpose(2, 0, 1) / 127.5 - 1
    draws = []
    with np.load(prepared / "images" / "plain_0064x0064_sd.npz") as file:
        for name, seen in (("latents", pixels), ("latents_flipped", pixels[:, :, ::-1].copy())):
            posterior = family.encode_images(torch.from_numpy(seen)[None])
            draws.append((torch.from_numpy(file[name])[None] - posterior["mean"]) / (0.5 * posterior["logvar"]).exp())
        assert file["original_size"].tolist() == [64, 64]
        assert file["crop_ltrb"].tolist() == [0, 0, 64, 64]
        assert file["alpha_mask"].min() == 1
    both = torch.cat(draws)
    assert both.abs().max() < 5
    assert abs(both.std() - 1) < 0.15
    assert not torch.allclose(draws[0], draws[1], atol=0.5)
    name = "plain_0064x0064_sd.npz"
    with np.load(prepared / "images" / "sub %" / name) as other, np.load(prepared / "images" / name) as file:
        assert not np.array_equal(other["latents"], file["latents"])
    with np.load(prepared / "images" / "clear_0064x0064_sd.npz") as file:
        assert file["alpha_mask"][0, 0] < 0.02
        assert file["alpha_mask"][-1, 0] > 0.98
    with np.load(prepared / "images" / "turned_0264x0512_sd.npz") as file:
        assert file["latents"].shape == (4, 16, 8)
        assert file["original_size"].tolist() == [264, 512]
        left, top, right, bottom = file["crop_ltrb"].tolist()
        assert (left, top, right, bottom) == (1, 0, 63, 128)


def test_metadata_gain_the_buckets_and_keep_the_rest(prepared: Path) -> None:
    metadata = json.loads((prepared / "out.json").read_text())
    assert metadata["turned.jpeg"] == {"caption": "a face", "own": 1, "train_resolution": [64, 128]}
    assert metadata[LONG]["train_resolution"] == [64, 64]
    assert metadata["broken.jpg"] == {"caption": "a face", "own": 1}
    assert "left out.webp" not in metadata


@pytest.mark.parametrize(
    ("cache", "encoded"),
    [("--cache_latents", 2), ("--cache_latents_to_disk", 2), ("--cache_latents --cache_latents_sample", 14)],
)
def test_fine_tune_takes_the_latents(
    cache: str, encoded: int, prepared: Path, tiny_model: Path, tmp_path: Path, counted: dict[str, int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = f"--alpha_mask --masked_loss --skip_broken_images {cache} --seed 1 {TRAINED}"
    assert main([
        "fine_tune", "--pretrained_model_name_or_path", str(tiny_model), "--train_data_dir", str(prepared / "images"),
        "--in_json", str(prepared / "out.json"), "--output_dir", str(tmp_path / "out"), "--cache_dir",
        str(tmp_path / "cache"), *words.split(),
    ]) == 0  # fmt: skip
    # All but the one whose latents have no room for a name, and its mirror image.
    assert counted["images"] == encoded
    told = "latents of 6 images are taken from .npz files" in "".join(capsys.readouterr())
    assert told == (encoded == 2)


def test_same_bytes_elsewhere_and_nothing_new_the_second_time(
    prepared: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unusual_images(tmp_path)
    assert prepare(tmp_path, tiny_model, "--alpha_mask --batch_size 3") == 3
    assert contents(tmp_path) == contents(prepared)
    before = files(tmp_path)
    (tmp_path / "images" / "clear_0064x0064_sd.npz").unlink()
    capsys.readouterr()
    assert prepare(tmp_path, tiny_model, "--alpha_mask --batch_size 1") == 3
    said = capsys.readouterr()
    assert "1 files written, 5 kept" in said.out
    assert "broken.jpg" in said.err
    assert "left out.webp" in said.err
    after = files(tmp_path)
    changed = [name for name in before if before[name] != after[name]]
    assert changed == ["images/clear_0064x0064_sd.npz"]
    with np.load(tmp_path / changed[0]) as one, np.load(prepared / changed[0]) as other:
        np.testing.assert_allclose(one["latents"], other["latents"], atol=1e-4)


def test_what_does_not_fit_is_made_anew(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a.png", "a.jpg", "b.png"):
        Image.open(PHOTOS / "chelsea.jpg").resize((128, 64)).save(images / name)
    (images / "sub").mkdir()
    shutil.copy(images / "a.jpg", images / "sub")
    (tmp_path / "in.json").write_text('{"a.png": {}, "a.jpg": {}, "b": {}, "gone.png": {}, "sub/a.jpg": {}}')
    words = [images, tmp_path / "in.json", tmp_path / "out.json", tiny_model, "--max_resolution", "64"]
    assert main(["prepare_buckets_latents", *map(str, words), "--min_bucket_reso", "64"]) == 0
    said = capsys.readouterr().err
    assert "1 entries are about images in sub-folders" in said
    assert "--recursive" in said
    assert "1 entries are about images that are not in the folder" in said
    for path in (*images.glob("*.npz"), *images.glob("sub/*")):
        path.unlink()
    (tmp_path / "in.json").write_text('{"a.png": {}, "a.jpg": {}, "b": {}, "gone.png": {}}')

    def told(more: str = "") -> tuple[str, str]:
        capsys.readouterr()
        assert prepare(tmp_path, tiny_model, more) == 0
        said = capsys.readouterr()
        return said.out, said.err

    out, err = told()
    assert "2 files written, 0 kept" in out
    assert "1 images share the name of their latents" in err
    assert "1 entries are about images that are not in the folder" in err
    assert json.loads((tmp_path / "out.json").read_text())["b"]["train_resolution"] == [128, 64]
    assert "2 files written, 0 kept" in told("--seed 1")[0]
    assert "0 files written, 2 kept" in told("--seed 2 --skip_existing")[0]
    assert "2 files written" in told("--max_resolution 64,64")[0]
    with np.load(images / "b_0128x0064_sd.npz") as file:
        np.savez(images / "b_0128x0064_sd.npz", **{name: file[name] for name in file.files if name != "sd_train"})
    out, err = told("--max_resolution 64,64 --mixed_precision bf16")
    assert "0 files written, 2 kept" in out
    assert "another program's" in err
    assert "has no effect" in err
    Image.open(PHOTOS / "coffee.jpg").resize((128, 64)).save(images / "b.png")
    later = time.time_ns() + 10**9
    os.utime(images / "b.png", ns=(later, later))
    assert "1 files written, 1 kept" in told("--max_resolution 64,64")[0]
    assert "2 files written" in told("--max_resolution 64,64 --overwrite --flip_aug --alpha_mask")[0]
    assert "2 files written" in told("--seed 3")[0]
    with np.load(images / "b_0128x0064_sd.npz") as file:
        assert {"latents_flipped", "alpha_mask"} <= {*file.files}


KILLS_ITSELF = """
import os, signal, sys
from sd_train.__main__ import main

name, left = sys.argv[1], int(sys.argv[2])
real = getattr(os, name)

def counting(*places):
    global left
    if str(places[1]).endswith((".npz", ".png", ".jpg", ".caption")):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return real(*places)

setattr(os, name, counting)
main(sys.argv[3:])
"""
"""Runs a command that is killed when it is about to call a function of `os` for a file, after some such calls."""


def killed(name: str, calls: int, *words: object) -> None:
    arguments = [sys.executable, "-c", KILLS_ITSELF, name, str(calls), *map(str, words)]
    done = subprocess.run(arguments, env=environment(), capture_output=True, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_latents_whose_command_was_killed(tiny_model: Path, tmp_path: Path) -> None:
    for name in ("killed", "whole"):
        (tmp_path / name / "images").mkdir(parents=True)
        for number in range(4):
            photo = Image.open(PHOTOS / "coffee.jpg").resize((96, 64)).rotate(number)
            photo.save(tmp_path / name / "images" / f"{number}.png")
        entries = {f"{number}.png": {"caption": str(number)} for number in range(4)}
        (tmp_path / name / "in.json").write_text(json.dumps(entries))
    place = tmp_path / "killed"
    words = [place / "images", place / "in.json", place / "out.json", tiny_model, *BUCKETS.split()]
    killed("replace", 2, "prepare_buckets_latents", *words)
    first = files(place)
    assert sum(name.endswith(".npz") for name in first) == 2
    assert sum(name.endswith(".tmp") for name in first) == 1
    assert not (place / "out.json").exists()
    assert prepare(place, tiny_model) == 0
    assert prepare(tmp_path / "whole", tiny_model) == 0
    assert contents(place) == contents(tmp_path / "whole")
    # What was there is not made again.
    after = files(place)
    assert all(after[name] == first[name] for name in first if name.endswith(".npz"))


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_moving_that_was_killed(tmp_path: Path) -> None:
    for name in ("killed", "whole"):
        flawed_images(tmp_path / name)
    place = tmp_path / "killed"
    options = ["--report", place / "report.html", "--move_to", place / "aside"]
    killed("rename", 4, "filter_images", place / "images", *options)
    moved = {path.name for path in (place / "aside").iterdir()} - {"filter_images.json"}
    assert len(moved) == 4
    assert set(json.loads((place / "aside" / "filter_images.json").read_text())) > {"flat.png", "blur.png"}
    for folder in (place, tmp_path / "whole"):
        assert main(["filter_images", str(folder / "images"), "--report", str(folder / "report.html"), "--move_to",
                     str(folder / "aside")]) == 0  # fmt: skip
    found, wanted = contents(place), contents(tmp_path / "whole")
    del found["report.html"], wanted["report.html"]
    assert found == wanted


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--max_resolution 1024,1024 --max_bucket_reso 512", "longer than --max_bucket_reso (512)"),
        ("--max_resolution 200,100", "shorter than --min_bucket_reso (256); give --min_bucket_reso 64"),
        ("--bucket_reso_steps 8", "--bucket_reso_steps"),
        ("--max_resolution 96,96 --min_bucket_reso 32 --bucket_reso_steps 32", "multiples of 64"),
    ],
)
def test_buckets_that_no_training_takes(
    options: str, told: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    Image.open(PHOTOS / "chelsea.jpg").resize((64, 64)).save(tmp_path / "images" / "a.png")
    (tmp_path / "in.json").write_text('{"a.png": {}}')
    words = [tmp_path / "images", tmp_path / "in.json", tmp_path / "out.json", tiny_model, *options.split()]
    assert main(["prepare_buckets_latents", *map(str, words)]) == 2
    assert told in capsys.readouterr().err
    assert not list((tmp_path / "images").glob("*.npz"))


def test_places_are_tried_before_images_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.png").write_bytes(b"no image")
    (tmp_path / "in.json").write_text('{"a.png": {}}')
    nowhere = str(tmp_path / "in.json" / "file.json")
    assert main(["prepare_buckets_latents", str(images), str(tmp_path / "in.json"), nowhere, "no model"]) == 4
    assert "choose another OUT_JSON" in capsys.readouterr().err
    for option in ("--report", "--list", "--move_to"):
        more = [] if option == "--report" else ["--report", str(tmp_path / "report.html")]
        assert main(["filter_images", str(images), option, nowhere, *more]) == 4
        assert f"choose another {option}" in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_wrong_arguments_are_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "prepare_buckets_latents nowhere none.json out.json model --max_resolution 5,x --bucket_reso_steps 7"
    assert main([*words.split(), "--batch_size", "0"]) == 2
    said = capsys.readouterr().err
    for part in ("nowhere", "none.json", "--max_resolution", "--bucket_reso_steps", "--batch_size"):
        assert part in said
    assert main(["filter_images", str(tmp_path), "--checks", "small,ugly", "--in_json", "x.json"]) == 2
    said = capsys.readouterr().err
    assert "ugly" in said
    assert "--out_json" in said


@pytest.mark.skipif(sys.platform != "linux", reason="only there names may be no text")
def test_names_that_are_no_text(tiny_model: Path, tmp_path: Path) -> None:
    images, name = tmp_path / "images", os.fsdecode(b"caf\xe9.png")
    images.mkdir()
    for each in (name, "plain.png"):
        Image.open(PHOTOS / "chelsea.jpg").resize((64, 64)).save(images / each)
    (tmp_path / "in.json").write_text(json.dumps({name: {"caption": "a cat"}, "plain.png": {}}))
    assert prepare(tmp_path, tiny_model) == 0
    assert json.loads((tmp_path / "out.json").read_text())[name]["train_resolution"] == [64, 64]
    assert (images / os.fsdecode(b"caf\xe9_0064x0064_sd.npz")).is_file()
    assert filtered(tmp_path, "--move_to", str(tmp_path / "aside")) == 0
    assert (tmp_path / "aside" / name).is_file()


@pytest.mark.parametrize("form", ["sdxl.safetensors", "folder"])
def test_every_family_and_form_of_model(form: str, tiny_folder: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    Image.open(PHOTOS / "chelsea.jpg").resize((64, 64)).save(images / "a.png")
    (tmp_path / "in.json").write_text('{"a.png": {"caption": "a cat"}}')
    model = write_file(tmp_path, "sdxl") if form.startswith("sdxl") else tiny_folder
    assert prepare(tmp_path, model, "--batch_size 2") == 0
    assert [path.name for path in images.glob("*.npz")] == [
        f"a_0064x0064_{'sdxl' if form.startswith('sdxl') else 'sd'}.npz"
    ]


def flawed_images(folder: Path) -> Path:
    """Photographs, and one image for each thing that the filter looks for."""
    images = folder / "images"
    images.mkdir(parents=True)
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        for end in (".jpg", ".txt"):
            shutil.copy(PHOTOS / (name + end), images)
    coffee, rocket = Image.open(PHOTOS / "coffee.jpg"), Image.open(PHOTOS / "rocket.jpg")
    coffee.resize((400, 300)).save(images / "coffee_small.png")
    (images / "coffee_small.caption").write_text("coffee")
    ImageOps.mirror(coffee).save(images / "coffee_mirror.jpg", quality=85)
    shutil.copy(PHOTOS / "rocket.jpg", images / "100%.JPG")
    Image.new("RGB", (300, 300), (200, 10, 10)).save(images / "flat.png")
    chelsea = Image.open(PHOTOS / "chelsea.jpg").crop((50, 0, 350, 300))
    chelsea.rotate(90).filter(ImageFilter.GaussianBlur(6)).save(images / "blur.png")
    chelsea.rotate(180).resize((900, 900)).save(images / "bloat.jpg", quality=40)
    rocket.crop((0, 0, 512, 140)).save(images / "wide.png")
    rocket.crop((200, 100, 300, 200)).save(images / "rocket.png")
    (images / "broken.jpg").write_bytes((PHOTOS / "rocket.jpg").read_bytes()[:9000])
    import cv2

    face = np.array(Image.open(PHOTOS / "astronaut_face.jpg").resize((512, 512)).rotate(180))
    cv2.putText(face, "WATERMARK.COM", (60, 480), cv2.FONT_HERSHEY_SIMPLEX, 1.2, (255, 255, 255), 3)
    Image.fromarray(face).save(images / "mark.png")
    entries = {path.name: {"caption": path.stem} for path in sorted(images.iterdir()) if path.suffix != ".txt"}
    (folder / "in.json").write_text(json.dumps(entries))
    return images


def filtered(folder: Path, *more: str) -> int:
    words = ["--report", str(folder / "report.html"), "--list", str(folder / "list.json"), "--in_json"]
    words += [str(folder / "in.json"), "--out_json", str(folder / "out.json"), *more]
    return main(["filter_images", str(folder / "images"), *words])


def test_the_filter_finds_what_does_harm(tmp_path: Path) -> None:
    images = flawed_images(tmp_path)
    before = files(images)
    assert filtered(tmp_path) == 0
    listed = json.loads((tmp_path / "list.json").read_text())
    reasons = {key: [reason.split(":")[0] for reason in found] for key, found in listed["leave_out"].items()}
    bloat = reasons.pop("bloat.jpg")
    assert bloat[0] == "bytes"
    assert reasons == {
        "100%.JPG": ["copy"], "blur.png": ["blurred"], "broken.jpg": ["broken"], "coffee_mirror.jpg": ["near_copy"],
        "coffee_small.png": ["near_copy"], "flat.png": ["uniform"], "rocket.png": ["small"],
        "wide.png": ["small", "aspect"],
    }  # fmt: skip
    assert list(listed["reported"]) == ["mark.png"]
    assert "Of 14 images 9 are to be left out" in (tmp_path / "report.html").read_text()
    left = json.loads((tmp_path / "out.json").read_text())
    assert sorted(left) == ["astronaut.jpg", "chelsea.jpg", "coffee.jpg", "coffee_small.caption", "mark.png",
                            "rocket.jpg"]  # fmt: skip
    page = (tmp_path / "report.html").read_text()
    for words in ("Suspiciously small file", "Nearly the same picture", "mirror image of coffee.jpg", "filter_images"):
        assert words in page
    assert files(images) == before
    first = files(tmp_path)
    assert filtered(tmp_path) == 0
    assert contents(tmp_path) == {name: content for name, (content, _) in first.items()}


def test_moving_to_another_disk_that_was_killed(tmp_path: Path) -> None:
    aside = tmp_path / "aside"
    flawed_images(tmp_path)
    # What a copy leaves whose process has gone, and the image that was copied and is still there.
    aside.mkdir()
    (aside / f".flat.png.{os.getpid()}.tmp").write_bytes(b"half")
    shutil.copy(tmp_path / "images" / "flat.png", aside)
    (tmp_path / f".report.html.{os.getpid()}.tmp").write_bytes(b"half")
    assert filtered(tmp_path, "--move_to", str(aside)) == 0
    assert not list(tmp_path.rglob("*.tmp"))
    assert (aside / "flat.png").is_file()
    assert not (tmp_path / "images" / "flat.png").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="links need privileges there")
def test_links_are_moved_with_what_they_name(tmp_path: Path) -> None:
    images, store = tmp_path / "images", tmp_path / "store"
    for folder in (images, store):
        folder.mkdir()
    for name in ("flat.png", "there.png"):
        Image.new("RGB", (300, 300), "red").save(store / name)
        (images / name).symlink_to(Path("..") / "store" / name)
    aside = tmp_path / "far" / "away"
    aside.mkdir(parents=True)
    # The link of a call that was killed.
    (aside / "there.png").symlink_to(store / "there.png")
    (tmp_path / "in.json").write_text("{}")
    assert filtered(tmp_path, "--checks", "uniform", "--move_to", str(aside)) == 0
    assert not list(images.iterdir())
    for name in ("flat.png", "there.png"):
        assert (aside / name).is_symlink()
        assert (aside / name).read_bytes() == (store / name).read_bytes()


def test_equal_names_in_two_folders_are_told_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.open(PHOTOS / "coffee.jpg").resize((64, 64)).save(tmp_path / "images" / name / "one.png")
        (tmp_path / "images" / name / "broken.png").write_bytes(b"no image")
    (tmp_path / "in.json").write_text("{}")
    assert filtered(tmp_path, "--recursive", "--checks", "broken,copy") == 0
    assert json.loads((tmp_path / "list.json").read_text())["leave_out"]["b/one.png"] == ["copy: copy of a/one.png"]
    page = (tmp_path / "report.html").read_text()
    for words in ("a/one.png", "b/one.png", "copy of a/one.png", "a/broken.png", "b/broken.png", "Filter: images"):
        assert words in page


def test_the_filter_moves_and_deletes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, aside = flawed_images(tmp_path), tmp_path / "aside"
    before = sorted(contents(images).values())
    words = ["--move_to", str(aside), "--report_only", "text,blurred,bytes"]
    assert filtered(tmp_path, *words) == 0
    moved = {path.name for path in aside.iterdir()}
    # The caption of rocket.png is that of rocket.jpg, which stays.
    assert moved == {
        "100%.JPG", "broken.jpg", "coffee_mirror.jpg", "coffee_small.png", "coffee_small.caption", "flat.png",
        "rocket.png", "wide.png", "filter_images.json",
    }  # fmt: skip
    assert (images / "rocket.txt").is_file()
    journal = json.loads((aside / "filter_images.json").read_text())
    assert journal["flat.png"] == ["uniform: contrast 0.0"]
    after = [path.read_bytes() for path in (*images.iterdir(), *aside.iterdir()) if path.name != "filter_images.json"]
    assert sorted(after) == before
    first = contents(tmp_path)
    assert filtered(tmp_path, *words) == 0
    again = contents(tmp_path)
    del first["report.html"], again["report.html"]
    assert again == first
    # Put back, and this time good enough.
    (aside / "wide.png").rename(images / "wide.png")
    assert filtered(tmp_path, *words, "--max_aspect", "20", "--min_size", "1") == 0
    assert "wide.png" not in json.loads((tmp_path / "list.json").read_text())["leave_out"]
    assert (images / "wide.png").is_file()
    # Another picture under a name that is taken there.
    Image.new("RGB", (300, 300), "blue").save(images / "flat.png")
    capsys.readouterr()
    assert filtered(tmp_path, *words) == 3
    assert "names are taken" in capsys.readouterr().err
    assert (images / "flat.png").is_file()


def test_models_are_mixed(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, other, target = tmp_path / "folder", tmp_path / "other.safetensors", tmp_path / "mixed.safetensors"
    assert main(["convert_diffusers20_original_sd", str(tiny_model), str(folder), "--v1", "--float"]) == 0
    tensors = load_file(tiny_model)
    with safe_open(tiny_model, "pt") as file:
        told = file.metadata()
    changed = {name: tensor * 3 if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    name = "model.diffusion_model.out.2.weight"
    save_file(changed, other, told)
    words = ["merge_models", "--models", str(folder), str(other), "--output", str(target)]
    assert main([*words, "--ratios", "0.5", "0.6"]) == 2
    assert "add up to 1.1" in capsys.readouterr().err
    assert main([*words, "--ratios", "0.75", "0.25"]) == 0
    mixed = load_file(target)
    assert mixed[name].dtype == torch.float32
    torch.testing.assert_close(mixed[name], tensors[name].float() * 1.5, rtol=1e-3, atol=1e-5)
    assert main(words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*words, "--unet_only", "--overwrite", "--saving_precision", "fp16"]) == 0
    assert main(["show_metadata", "--model", str(target)]) == 0
    shown = capsys.readouterr().out
    assert json.loads(shown[shown.index("{") :])["modelspec.merged_from"] == "folder x 0.5, other x 0.5"
    read = {
        path: read_model(ModelRequest(str(path))).parts["vae"].tensors for path in (target, folder)
    }
    one, two = read_all(read[target]), read_all(read[folder])
    assert all(torch.equal(one[key].float(), two[key].float()) for key in two)
    assert torch.equal(load_file(target)[name], (tensors[name].float() * 2).half())


def test_models_that_predict_different_things_are_not_mixed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise, velocity = write_small_file(tmp_path, "sd2"), write_small_file(tmp_path, "sd2-v")
    words = ["merge_models", "--output", str(tmp_path / "mixed.safetensors"), "--models", str(noise)]
    assert main([*words, str(velocity)]) == 3
    assert "predicts the noise, others v" in capsys.readouterr().err
    # What v models differ in may be added to one of the other kind.
    assert main([*words, str(velocity), str(velocity), "--ratios", "1", "0.5", "-0.5"]) == 0
    assert read_model(ModelRequest(str(tmp_path / "mixed.safetensors"))).prediction == "epsilon"
    # One that does not tell is what the other says, and a folder has to say something.
    bare, folder = tmp_path / "bare.safetensors", tmp_path / "folder"
    save_file({name: tensor for name, tensor in load_file(velocity).items() if name != "v_pred"}, bare)
    words = ["merge_models", "--output", str(folder), "--models", str(bare)]
    assert main([*words, str(bare)]) == 3
    assert "nothing tells" in capsys.readouterr().err
    assert main([*words, str(velocity)]) == 0
    assert read_model(ModelRequest(str(folder))).prediction == "v_prediction"
    convert = ["convert_diffusers20_original_sd", str(bare), str(tmp_path / "converted"), "--v2"]
    assert main(convert) == 3
    assert "--v_parameterization" in capsys.readouterr().err
    assert main([*convert, "--v_parameterization"]) == 0
    assert read_model(ModelRequest(str(tmp_path / "converted"))).prediction == "v_prediction"
    words[2] = str(tmp_path / "mixed.bin")
    assert main([*words, str(noise)]) == 2
    assert "ends like a file" in capsys.readouterr().err


def test_metadata_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "bare.safetensors")
    assert main(["show_metadata", "--model", str(tmp_path / "bare.safetensors")]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == {}
    assert "has no metadata" in said.err


def test_conversion_takes_the_other_programs_arguments(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "model.safetensors"
    words = ["convert_diffusers20_original_sd", str(tiny_folder), str(target), "--v1", "--epoch", "3", "--metadata"]
    words += ['{"author": "me"}', "--reference_model", "x", "--save_precision_as"]
    assert main([*words, "bf16"]) == 0
    assert "--reference_model has no effect" in capsys.readouterr().err
    with safe_open(target, "pt") as file:
        assert file.metadata()["author"] == "me"
        assert file.metadata()["ss_epoch"] == "3"
        assert file.get_tensor("model.diffusion_model.out.2.weight").dtype == torch.bfloat16
    assert main([*words, "fp16"]) == 2
    assert main([*words, "fp16", "--float", "--overwrite"]) == 2
    assert main([*words, "fp16", "--overwrite", "--global_step", "-1"]) == 2
    pickled = tmp_path / "model.ckpt"
    assert main([*words[:2], str(pickled), "--epoch", "3", "--global_step", "70"]) == 0
    content = torch.load(pickled, weights_only=True)
    assert (content["epoch"], content["global_step"]) == (3, 70)


def test_copies_have_the_whole_area() -> None:
    for side in range(512, 2000):
        assert scaled((side, side), (512, 512), 64) == ((512, 512), (512, 512))
    assert scaled((300, 200), (512, 512), 1) == ((300, 200), (300, 200))
    assert scaled((400, 200), (100, 100), 8) == ((141, 70), (136, 64))


def test_copies_are_scaled_the_right_way_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "from", tmp_path / "to"
    (source / "sub").mkdir(parents=True)
    for name in ("wide.png", "wide.webp", "sub/wide.png"):
        Image.open(PHOTOS / "rocket.jpg").resize((400, 200)).save(source / name)
    (source / "sub" / "wide.txt").write_text("a rocket")
    # Room for its copies' names, and not for those of its captions.
    caption = "z" * 240 + ".caption"
    (source / caption).write_text("nothing")
    Image.new("RGB", (30, 20)).save(source / ("z" * 240 + ".png"))
    Image.new("RGB", (30, 20)).save(source / "tiny.png")
    (source / "broken.png").write_bytes(b"\x89PNG")
    for name in (LONG, "low.png"):
        Image.new("RGB", (300, 5)).save(source / name)
    words = ["resize_images_to_resolution", str(source), str(target), "--max_resolution", "100x100,64X64"]
    words += ["--recursive", "--copy_associated_files", "--divisible_by", "8"]
    assert main(words) == 3
    said = capsys.readouterr().err
    assert "broken.png" in said
    assert f"{LONG}: its name leaves no room" in said
    assert "zz.png: its name leaves no room" in said
    assert "low.png: a side of" in said
    sizes = {str(path.relative_to(target)): Image.open(path).size for path in target.rglob("*.jpg")}
    assert sizes == {
        **{f"{name}+100x100.jpg": (136, 64) for name in ("wide.png", "wide.webp", "sub/wide")},
        **{f"{name}+64x64.jpg": (88, 40) for name in ("wide.png", "wide.webp", "sub/wide")},
        "tiny+100x100.jpg": (24, 16), "tiny+64x64.jpg": (24, 16),
    }  # fmt: skip
    assert (target / "sub" / "wide+64x64.txt").read_text() == "a rocket"
    before = files(target)
    assert main(words) == 3
    assert files(target) == before


def test_a_killed_command_is_given_again(tmp_path: Path) -> None:
    source = tmp_path / "from"
    source.mkdir()
    for number in range(8):
        Image.open(PHOTOS / "coffee.jpg").resize((256, 192)).rotate(number).save(source / f"{number}.png")

    def words(target: str) -> list[str]:
        return ["resize_images_to_resolution", str(source), str(tmp_path / target), "--max_resolution", "128x128"]

    command = [sys.executable, str(SOURCES / "tools" / "resize_images_to_resolution.py"), *words("killed")[1:]]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while len(list((tmp_path / "killed").glob("*"))) < 3 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert main(words("killed")) == 0
    assert main(words("whole")) == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_caches_are_filled_for_a_training(
    small_model: Path, tmp_path: Path, counted: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--pretrained_model_name_or_path", str(small_model), "--cache_dir", str(tmp_path / "cache")]
    dataset = tmp_path / "data"
    shutil.copytree(PHOTOS, dataset / "1_photo")
    words += ["--train_data_dir", str(dataset), "--resolution", "64", "--caption_extension", ".txt", "--seed", "1"]
    assert main(["cache_latents", *words, "--vae_batch_size", "4"]) == 0
    # Latents in memory would be lost with the process.
    assert main(["cache_text_encoder_outputs", *words, "--cache_latents"]) == 0
    assert counted["images"] == 6
    encoded = dict(counted)
    assert encoded["texts"] >= 6
    assert main(["cache_latents", *words, "--skip_existing"]) == 0
    assert main(["cache_text_encoder_outputs", *words]) == 0
    more = "--network_train_unet_only --cache_latents_to_disk --cache_text_encoder_outputs_to_disk --max_train_steps 1"
    assert main([
        "train_network", *words, *more.split(), "--output_dir", str(tmp_path / "out"), "--network_module",
        "networks.lora",
    ]) == 0  # fmt: skip
    assert counted == encoded
    assert main(["cache_latents", *words, "--flux"]) == 2
    assert "--flux" in capsys.readouterr().err
    assert main(["cache_latents", *words, "--sdxl"]) == 3
    assert "--sdxl says otherwise" in capsys.readouterr().err
    words[1] = str(write_file(tmp_path, "sdxl"))
    assert main(["cache_text_encoder_outputs", *words, "--sdxl"]) == 0
