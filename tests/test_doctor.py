"""The doctor: planted defects of every kind are found by name, clean sets have none, the page is whole."""

from __future__ import annotations

import base64
import io
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from sd_train.commands.doctor import main
from sd_train.data.config import DatasetRequest, load_datasets
from sd_train.data.subset import IndexOptions
from sd_train.doctor import kinds
from sd_train.doctor.copies import near_copies
from sd_train.doctor.diagnose import Diagnosis, diagnose
from sd_train.doctor.looks import look_at
from sd_train.doctor.page import About, make_page
from sd_train.doctor.pictures import frame
from sd_train.errors import ConfigError
from sd_train.html import bars, element, escape, figure, page, picture, table
from tests.browser import chromium, find_chromium
from tests.defects import DEFECTS, World, make_clean, say, text_of

SEEDS = range(20)
PHOTOS = Path(__file__).resolve().parent.parent / "sd_train" / "demo" / "photos"
# Found by tests of their own, as they need other options or stop everything else.
ELSEWHERE = {"config", "stops", "caption_cut_at_225", "never_shown", "left_out"}


def examine(config: Path, token_limit: int = 75, **options: object) -> Diagnosis:
    datasets = load_datasets(DatasetRequest("doctor", dataset_config=config, masked_loss=True))
    return diagnose(datasets, IndexOptions(**options), token_limit, lambda seen, of: None)


def found_in(diagnosis: Diagnosis) -> set[tuple[str, str]]:
    """(kind, file name) of all findings; for those about no file what they say."""
    return {
        (finding.kind.name, name)
        for finding in diagnosis.findings
        for name in ([sight.path.name for sight in finding.sights] or [finding.explanation])
    }


def write_config(folder: Path, keys: str = "", subset: str = "", resolution: int = 128) -> Path:
    path = folder / "dataset.toml"
    path.write_text(
        f"[[datasets]]\nresolution = {resolution}\n{keys}\n[[datasets.subsets]]\nimage_dir = '{folder / 'images'}'\n"
        f"caption_extension = '.txt'\n{subset}\n",
        encoding="utf-8",
    )
    return path


@pytest.fixture
def world(tmp_path: Path) -> World:
    """An empty folder of images, to be filled."""
    (tmp_path / "images").mkdir()
    return World(tmp_path, random.Random(7))


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a dataset with all defects."""
    world = make_clean(tmp_path_factory.mktemp("planted") / "set", 99)
    for plant in DEFECTS.values():
        plant(world)
    return world.config


@pytest.mark.parametrize("seed", SEEDS)
def test_every_defect_is_found_and_nothing_else(seed: int, tmp_path: Path) -> None:
    world = make_clean(tmp_path / "set", seed)
    assert found_in(examine(world.config)) == set()
    names = sorted(DEFECTS)
    world.rng.shuffle(names)
    expected = set().union(*(DEFECTS[name](world) for name in names))
    assert found_in(examine(world.config)) == expected
    assert {kind for kind, _ in expected} >= set(DEFECTS)


def test_every_kind_is_planted() -> None:
    assert len(DEFECTS) >= 30
    assert set(kinds.KINDS) == set(DEFECTS) | ELSEWHERE


def test_a_single_defect_is_found_alone(tmp_path: Path) -> None:
    for number, name in enumerate(("truncated", "caption_lines", "mask_missing", "metadata_image_missing")):
        world = make_clean(tmp_path / name, number)
        expected = DEFECTS[name](world)
        diagnosis = examine(world.config)
        assert found_in(diagnosis) == expected
        assert diagnosis.indexes is not None
        # The other datasets, and what is left of this one, are shown nevertheless.
        assert len(diagnosis.indexes.training) == 7


def test_what_only_a_run_notices_is_reported_too(world: World, tmp_path: Path) -> None:
    world.add("images", "a.png")
    (tmp_path / "list.json").write_text('{"a.png": {"caption": "x", "tags": 3}}', encoding="utf-8")
    config = tmp_path / "dataset.toml"
    config.write_text(f"[[datasets]]\nresolution = 128\n[[datasets.subsets]]\nimage_dir = '{tmp_path / 'images'}'\n"
                      f"metadata_file = '{tmp_path / 'list.json'}'\n", encoding="utf-8")
    findings = examine(config).findings
    assert any(finding.kind is kinds.STOPS and "must be text" in finding.explanation for finding in findings)


@pytest.mark.parametrize(("limit", "kind"), [(75, "caption_cut"), (150, "caption_cut"), (225, "caption_cut_at_225")])
def test_captions_are_cut_where_the_tokenizer_says(world: World, tmp_path: Path, limit: int, kind: str) -> None:
    for words in (limit, limit + 1):
        world.add("images", f"{words}.png", "a " * words)
    world.add("images", "prefixed.png", "a " * (limit - 1))
    config = write_config(tmp_path)
    assert found_in(examine(config, limit)) == {(kind, f"{limit + 1}.png")}
    config = write_config(tmp_path, subset="caption_prefix = 'frog frog'\nshuffle_caption = true")
    assert len(found_in(examine(config, limit))) == 3


def test_allowed_is_no_error(world: World, tmp_path: Path) -> None:
    for number in range(3):
        world.add("images", f"{number}.png")
    text_of(tmp_path / "images" / "0.png").unlink()
    config = write_config(tmp_path)
    assert found_in(examine(config)) == {("caption_missing", "0.png")}
    assert found_in(examine(config, allow_missing_captions=True)) == {("caption_missing_here", "0.png")}
    with_class = write_config(tmp_path, subset="class_tokens = 'sks frog'")
    assert found_in(examine(with_class)) == {("caption_missing_here", "0.png")}
    wildcards = write_config(tmp_path, subset="enable_wildcard = true\nclass_tokens = ''")
    say(tmp_path / "images" / "1.png", "one {red|blue} line\nand another")
    assert found_in(examine(wildcards)) == {("caption_missing_here", "0.png")}


def test_broken_images_may_be_left_out(world: World, tmp_path: Path) -> None:
    for number in range(3):
        world.add("images", f"{number}.png")
    path = tmp_path / "images" / "1.png"
    path.write_bytes(path.read_bytes()[:60])
    assert found_in(examine(write_config(tmp_path))) == {("truncated", "1.png")}
    diagnosis = examine(write_config(tmp_path), skip_broken_images=True)
    assert found_in(diagnosis) == {("left_out", "1.png")}
    assert diagnosis.count("error") == 0


def test_crops_that_move_cut_nothing_off(world: World, tmp_path: Path) -> None:
    world.add("images", "wide.png", size=(300, 140))
    assert found_in(examine(write_config(tmp_path))) == {("cropped_without_buckets", "wide.png")}
    assert found_in(examine(write_config(tmp_path, subset="random_crop = true"))) == set()


def test_the_same_folder_in_two_datasets_is_no_copy(world: World, tmp_path: Path) -> None:
    for number in range(3):
        world.add("images", f"{number}.png")
    text = write_config(tmp_path).read_text(encoding="utf-8")
    (tmp_path / "dataset.toml").write_text(text + text.replace("128", "192"), encoding="utf-8")
    assert found_in(examine(tmp_path / "dataset.toml")) == set()


def test_near_copies_of_photographs(tmp_path: Path) -> None:
    photos = sorted(PHOTOS.glob("*.jpg"))
    for path in photos:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        height, width = pixels.shape[:2]
        changed = {
            "jpeg": pixels,
            "small": cv2.resize(pixels, (width // 2, height // 2), interpolation=cv2.INTER_AREA),
            "mirrored": pixels[:, ::-1],
            "dark": (pixels * 0.7).astype(np.uint8),
            "cut": pixels[height // 50 : -height // 50, width // 50 : -width // 50],
        }
        for name, new in changed.items():
            Image.fromarray(np.ascontiguousarray(new)).save(tmp_path / f"{path.stem}-{name}.jpg", quality=50)
    looks = look_at([*photos, *sorted(tmp_path.iterdir())], lambda: None)
    pairs = near_copies(looks)
    subjects = {frozenset((pair.first.stem.split("-")[0], pair.second.stem.split("-")[0])) for pair in pairs}
    assert subjects == {frozenset((path.stem,)) for path in photos}
    for path in photos:
        of_original = {pair.second.stem.split("-")[1]: pair.mirrored for pair in pairs if pair.first == path}
        assert of_original == {"jpeg": False, "small": False, "mirrored": True, "dark": False, "cut": False}


def test_the_frame_lies_where_the_crop_does(world: World, tmp_path: Path) -> None:
    path = world.add("images", "wide.png", size=(400, 200))
    diagnosis = examine(write_config(tmp_path))
    assert diagnosis.indexes is not None
    record = diagnosis.indexes.training[0].record(0)
    assert (record.path, record.resized, record.bucket) == (path, (256, 128), (128, 128))
    plain = np.full((100, 200, 3), 255, np.uint8)
    framed = frame(plain, record)
    kept = (framed == 255).all(axis=2)
    assert kept[50].nonzero()[0].tolist() == list(range(51, 149))
    assert kept[:, 100].nonzero()[0].tolist() == list(range(1, 99))


class Reader(HTMLParser):
    """Collects what a page would load or run, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            {"src": self.sources, "href": self.links, "id": self.ids}.get(name, []).append(value or "")
            assert not name.startswith("on")

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_is_one_whole_file(planted: Path) -> None:
    text = make_page(About("Doctor: planted.toml"), examine(planted))
    reader = Reader(text)
    assert len(reader.sources) > 60
    for source in reader.sources:
        start, _, data = source.partition(",")
        assert start == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            image.load()
            assert max(image.size) <= 208
    assert {link for link in reader.links if not link.startswith("#")} == {"data:,"}
    assert {link[1:] for link in reader.links if link.startswith("#")} <= set(reader.ids)
    assert "script" not in reader.tags
    assert re.findall(r"url\(|@import|https?:", text) == []
    said = "\n".join(reader.words)
    for kind in kinds.KINDS.values():
        assert kind.name in ELSEWHERE or kind.title in said
    for name in ("plain25", "left_behind.txt", "absent.png"):
        assert name in said


def test_text_never_becomes_markup(world: World, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script> & \"quotes\" 'too' \x07"
    world.add("images", "<img src=x onerror=alert(1)>&.png", evil)
    world.add("images", "b.png", evil + ", \u7f8e\u4e3d \U0001f438")
    text = make_page(About("<b>title</b>"), examine(write_config(tmp_path)))
    reader = Reader(text)
    assert {"script", "b"} & set(reader.tags) == {"b"}
    assert all(source.startswith("data:image/jpeg") for source in reader.sources)
    said = "".join(reader.words)
    assert "<script>alert(1)</script> & \"quotes\" 'too' \ufffd" in said
    assert "<img src=x onerror=alert(1)>&.png" in said
    assert "\u7f8e\u4e3d \U0001f438" in said
    assert "<b>title</b>" in said


def test_building_blocks() -> None:
    assert escape("a<b\udc80") == "a&lt;b\\udc80"
    assert element("p", "<", element("b", ">"), class_="x\"y", data_name=3, title=None) == (
        '<p class="x&quot;y" data-name="3">&lt;<b>&gt;</b></p>')
    assert table(["a"], [["<"]]).count("&lt;") == 1
    assert "width:50.0%" in bars([("a", 1, "1"), ("b", 2, "2")])
    assert "nothing here" in figure(None, ["line", ""], "nothing here")
    tall = picture(np.zeros((400, 2, 3), np.uint8), 'a "tall" one', 100)
    assert 'width="1" height="100"' in tall
    assert 'alt="a &quot;tall&quot; one"' in tall
    whole = page("a & b", ["<p>"])
    assert whole.startswith("<!DOCTYPE html>")
    assert "<title>a &amp; b</title>" in whole
    assert "&lt;p&gt;</body>" in whole


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    code = main([str(word) for word in words])
    return code, capsys.readouterr().out


def test_the_command(planted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.lstat().st_mtime_ns for path in planted.parent.rglob("*")}
    output = tmp_path / "new" / "report.html"
    code, text = run(capsys, planted, "--output", output, "--json")
    assert code == 3
    report = json.loads(text)
    assert output.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert {finding["kind"] for finding in report["findings"]} == set(DEFECTS)
    assert sum(report["counts"].values()) == len(report["findings"])
    missing = next(finding for finding in report["findings"] if finding["kind"] == "metadata_image_missing")
    assert (missing["dataset"], missing["subset"], missing["severity"]) == (3, 0, "error")
    assert Path(missing["files"][0]["path"]).name == "absent.png"
    plain = next(subset for subset in report["subsets"] if subset["image_dir"].endswith("plain"))
    assert plain["tokens"]["above_75"] == 1
    assert {tag["tag"] for tag in plain["tags"][:2]} == {"sks frog", "photograph"}
    assert {path: path.lstat().st_mtime_ns for path in planted.parent.rglob("*")} == before


def test_exit_codes_and_summary(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        world.add("images", f"{number}.png")
    code, text = run(capsys, write_config(tmp_path))
    assert (code, text) == (0, f"0 errors, 0 warnings, 0 notes; with pictures: {tmp_path / 'dataset_doctor.html'}\n")
    code, text = run(capsys, write_config(tmp_path, "resolutoin = 3"), "--output", "other.html")
    assert code == 3
    assert "resolutoin" in text
    assert "resolutoin" in (tmp_path / "other.html").read_text(encoding="utf-8")
    say(tmp_path / "images" / "0.png", " \n")
    code, text = run(capsys, write_config(tmp_path))
    assert code == 0
    assert "warning: Empty caption (0.png)\n0 errors, 1 warning, 0 notes" in text
    with pytest.raises(ConfigError, match="resolutionn"):
        main([str(tmp_path / "dataset.toml"), "--resolutionn", "3"])
    with pytest.raises(ConfigError, match="dataset_config"):
        main([])
    assert run(capsys, "--help")[0] == 0


def test_folders_of_the_command_line(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train" / "3_sks frog").mkdir(parents=True)
    for number in range(2):
        world.add("train/3_sks frog", f"{number}.png", "")
    code, text = run(capsys, "--train_data_dir", tmp_path / "train", "--resolution", "128", "--json")
    report = json.loads(text)
    assert (code, report["findings"]) == (0, [])
    images = report["training"][0]["images"]
    assert [(Path(image["path"]).name, image["repeats"], image["bucket"]) for image in images] == [
        ("0.png", 3, [128, 128]), ("1.png", 3, [128, 128])]
    assert (tmp_path / "train_doctor.html").exists()


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium: put one on the PATH or name it in CHROME")
def test_the_page_in_a_browser(planted: Path, tmp_path: Path) -> None:
    path = tmp_path / "a page #1.html"
    path.write_text(make_page(About("Doctor: planted.toml"), examine(planted)), encoding="utf-8")
    program = find_chromium()
    assert program is not None
    with chromium(program, tmp_path / "profile") as browser:
        colours = set()
        for width, dark in ((1200, False), (390, True)):
            browser.open(path, width, dark=dark)
            broken = browser.evaluate("[...document.images].filter(i => !i.complete || i.naturalWidth == 0).length")
            assert (browser.evaluate("document.images.length > 60"), broken) == (True, 0)
            # Nothing is wider than the screen, so a phone needs no sideways scrolling.
            assert browser.evaluate("document.documentElement.scrollWidth") == width
            assert browser.evaluate("location.protocol") == "file:"
            assert browser.complaints == []
            assert browser.requests == [path.resolve().as_uri()]
            colours.add(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert len(colours) == 2
        browser.evaluate("console.error('noticed')")
        assert "noticed" in browser.complaints[0]
