"""Reading many folders fast: headers as Pillow reads them, captions, and what is kept between runs."""

from __future__ import annotations

import os
import random
import struct
import time
import warnings
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from sd_train.data import headers, scan
from sd_train.data.captions import TEXT_EXTENSIONS, caption_name
from sd_train.data.columns import TextColumn
from sd_train.data.folders import list_folder
from sd_train.data.headers import OPEN_FLAGS, read_size, size_by_pillow, size_in_header
from sd_train.data.index_file import KeptIndexes
from sd_train.data.scan import (
    CAPTION_BAD,
    CAPTION_EMPTY,
    CAPTION_NONE,
    CAPTION_READ,
    scan_files,
    scan_folder,
)
from sd_train.errors import DataError

XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>'
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif(turn: int | None, comment: str = "") -> Image.Exif:
    tags = Image.Exif()
    tags[0x010E] = comment or "a picture"
    if turn is not None:
        tags[0x0112] = turn
    tags[0x8769] = {0x9003: "2024:01:01 00:00:00"}
    return tags


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def jpegs() -> Iterator[tuple[str, bytes]]:
    picture = Image.effect_noise((30, 20), 60).convert("RGB")
    plain = encoded(picture, "JPEG")
    yield "plain", plain
    yield "progressive", encoded(picture, "JPEG", progressive=True, quality=95, subsampling=0)
    for mode in ("L", "CMYK"):
        yield mode, encoded(picture.convert(mode), "JPEG")
    for turn in (*range(10), None):
        yield f"EXIF {turn}", encoded(picture, "JPEG", exif=exif(turn))
    thumbnail = encoded(picture, "JPEG", exif=exif(6))
    yield "thumbnail in EXIF", encoded(picture, "JPEG", exif=exif(8).tobytes() + thumbnail)
    yield "large EXIF", encoded(picture, "JPEG", exif=exif(5, "x" * 40_000))
    yield "ICC", encoded(picture, "JPEG", icc_profile=PROFILE * 300, exif=exif(7))
    yield "dpi and comment", encoded(picture, "JPEG", dpi=(300, 300), comment="a" * 9000, exif=exif(6))
    big_endian = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    extras = {
        "big endian": segment(0xE1, big_endian),
        "EXIF twice": segment(0xE1, big_endian) * 2,
        "orientation as LONG": segment(0xE1, big_endian.replace(b"\0\x03\0\0\0\x01\0\x06", b"\0\x04\0\0\0\x01\0\0")),
        "EXIF of nothing": segment(0xE1, b"Exif\0\0"),
        "EXIF cut": segment(0xE1, big_endian[:-8]),
        "no TIFF": segment(0xE1, b"Exif\0\0" + b"x" * 30),
        "XMP": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP % 6),
        "EXIF before XMP": segment(0xE1, big_endian) + segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP % 1),
        "Photoshop": segment(0xED, b"Photoshop 3.0\0" + b"8BIM\x04\x04\0\0\0\0\0\0"),
        "broken Photoshop": segment(0xED, b"Photoshop 3.0\0" + b"8BIM\x04\x04"),
        "MPF": segment(0xE2, b"MPF\0MM\0*\0\0\0\x08\0\0\0\0\0\0"),
        "short ICC": segment(0xE2, b"ICC_PROFILE\0"),
        "short Adobe": segment(0xEE, b"Adobe"),
        "short JFIF": segment(0xE0, b"JFIF"),
        "FlashPix": segment(0xE2, b"FPXR\0" + bytes(50)),
        "fill bytes": b"\xff\xff\xff",
        "junk": b"junk",
        "many segments": segment(0xEB, b"JP" + bytes(30_000)) * 5,
    }
    for name, extra in extras.items():
        yield name, plain[:2] + extra + plain[2:]
    yield "EXIF behind the frame", plain.replace(b"\xff\xda", segment(0xE1, big_endian) + b"\xff\xda", 1)
    yield "twelve bits", plain.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c")


def pngs() -> Iterator[tuple[str, bytes]]:
    picture = Image.effect_noise((30, 20), 60).convert("RGB")
    plain = encoded(picture, "PNG")
    for mode in ("1", "L", "P", "RGB", "LA", "RGBA", "I;16"):
        yield mode, encoded(picture.convert("L").convert(mode), "PNG")
    yield "tRNS", encoded(picture, "PNG", transparency=(1, 2, 3))
    yield "palette tRNS", encoded(picture.convert("P"), "PNG", transparency=bytes(range(9)))
    for turn in (1, 6, 9, None):
        yield f"eXIf {turn}", encoded(picture, "PNG", exif=exif(turn))
    yield "ICC, dpi", encoded(picture, "PNG", icc_profile=PROFILE, dpi=(72, 72))
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", "a frog, " * 700)
    text.add_itxt("parameters", "grün", zip=False)
    yield "text", encoded(picture, "PNG", pnginfo=text, exif=exif(8))
    yield "animated", encoded(picture, "PNG", save_all=True, append_images=[picture.rotate(90)])
    legacy = b"\nexif\n      36\n" + exif(6).tobytes()[6:].hex().encode()
    extras = {
        "exif as text": chunk(b"tEXt", b"Raw profile type exif\0" + legacy),
        "compressed text": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"hello")),
        "XMP": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP % 5),
        "XMP without": chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x:xmpmeta/>"),
        "text named exif": chunk(b"tEXt", b"exif\0hello"),
        "text named bbox": chunk(b"tEXt", b"bbox\0hello"),
        "text without name": chunk(b"tEXt", b"\0hello"),
        "eXIf broken": chunk(b"eXIf", b"MM\0*\0\0"),
        "gamma too short": chunk(b"gAMA", b"\0"),
        "profile no zlib": chunk(b"iCCP", b"name\0\0junk"),
        "profile method": chunk(b"iCCP", b"name\0\x01junk"),
        "profile bomb": chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(1 << 21))),
        "checksum": chunk(b"tIME", b"1234567")[:-1] + b"x",
        "unknown": chunk(b"abCd", b"1234567"),
        "second header": chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 9, 8, 2, 0, 0, 0)),
        "frame control": chunk(b"fcTL", bytes(26)),
        "long": chunk(b"tEXt", b"workflow\0" + b"x" * 90_000) * 2,
        "endless": chunk(b"tEXt", b"workflow\0" + b"x" * 600_000) * 2,
    }
    for name, extra in extras.items():
        yield name, plain[:33] + extra + plain[33:]


def others() -> Iterator[tuple[str, bytes]]:
    picture = Image.effect_noise((30, 20), 60).convert("RGB")
    clear = picture.copy()
    clear.putalpha(120)
    for name, image, lossless in (("VP8", picture, False), ("VP8L", clear, True), ("VP8X", clear, False)):
        yield name, encoded(image, "WEBP", lossless=lossless)
        yield f"{name} XMP", encoded(image, "WEBP", lossless=lossless, xmp=XMP % 6)
        for turn in (6, 3, None):
            yield f"{name} {turn}", encoded(image, "WEBP", lossless=lossless, exif=exif(turn), icc_profile=PROFILE)
    yield "WebP animated", encoded(picture, "WEBP", save_all=True, append_images=[picture.rotate(180)])
    for mode in ("1", "L", "P", "RGB", "RGBA"):
        yield f"BMP {mode}", encoded(picture.convert(mode), "BMP")
    bitmap = encoded(picture, "BMP")
    yield "BMP upside down", bitmap[:22] + struct.pack("<i", -20) + bitmap[26:]
    yield "GIF", encoded(picture, "GIF")
    yield "TIFF", encoded(picture, "TIFF")
    yield "nothing", b""
    yield "text", b"no picture at all"


FILES = [*jpegs(), *pngs(), *others()]


def slow(path: Path) -> tuple[int, int] | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return size_by_pillow(path)
    except DataError:
        return None


def fast(path: Path) -> tuple[int, int] | None:
    """What is found without Pillow."""
    descriptor = os.open(path, OPEN_FLAGS)
    try:
        return size_in_header(os.read(descriptor, headers.HEAD), descriptor)
    finally:
        os.close(descriptor)


def put_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("name", "content"), FILES, ids=[name for name, _ in FILES])
def test_header_gives_what_pillow_gives(tmp_path: Path, name: str, content: bytes) -> None:
    path = put_bytes(tmp_path / "picture.jpg", content)
    wanted = slow(path)
    assert fast(path) in (None, wanted)
    if wanted is None:
        with pytest.raises(DataError, match=r"picture\.jpg"):
            read_size(path)
    else:
        assert read_size(path) == wanted


def test_damaged_headers_never_differ_from_pillow(tmp_path: Path) -> None:
    rng, path, read = random.Random(0), tmp_path / "picture", 0
    small = [content for _, content in FILES if 0 < len(content) < 9000]
    for turn in range(1500):
        content = bytearray(rng.choice(small))
        place = rng.randrange(min(len(content), 700))
        if turn % 3 == 0:
            del content[place:]
        elif turn % 3 == 1:
            content[place] ^= 1 << rng.randrange(8)
        else:
            content[place : place + rng.randrange(2)] = bytes([rng.choice((0, 1, 127, 255))])
        path.write_bytes(content)
        found = fast(path)
        if found is not None:
            read += 1
            assert found == slow(path), content[:200]
    assert read > 200


def test_every_cut_of_a_header_is_an_error_or_the_size(tmp_path: Path) -> None:
    for name in ("EXIF 6", "eXIf 6", "VP8X 6", "BMP RGB"):
        content, path = dict(FILES)[name], tmp_path / "cut"
        for length in range(0, min(len(content), 800)):
            path.write_bytes(content[:length])
            found = fast(path)
            assert found is None or found == slow(path), (name, length)
        path.write_bytes(content)
        assert fast(path) is not None


def test_pixels_beyond_pillows_limit_are_left_to_it(tmp_path: Path) -> None:
    huge = bytearray(dict(FILES)["RGB"])
    huge[16:24] = struct.pack(">II", 30_000, 30_000)
    huge[29:33] = struct.pack(">I", zlib.crc32(huge[12:29]))
    with pytest.raises(DataError, match="more pixels than Pillow reads"):
        read_size(put_bytes(tmp_path / "huge.png", bytes(huge)))


OLD = (1_000_000_000, 1_000_000_000)
SMALL = encoded(Image.new("RGB", (40, 30)), "PNG")
TALL = encoded(Image.new("RGB", (30, 40)), "PNG")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scans of three images or more are kept."""
    monkeypatch.setattr(scan, "FEWEST", 3)


def fill(folder: Path, *names: str, when: tuple[int, int] = OLD) -> Path:
    """`folder` with images under these names, each with a caption that is its name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        put_bytes(folder / name, SMALL)
        (folder / name).with_suffix(".txt").write_text(name, encoding="utf-8")
        os.utime(folder / name, when)
        os.utime((folder / name).with_suffix(".txt"), when)
    return folder


def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are opened from now on."""
    opened: list[str] = []
    plain = os.open

    def noting(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        name = os.fsdecode(path).rpartition("/")[2]
        if name.endswith((".png", ".txt")):
            opened.append(name)
        return plain(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr("sd_train.data.folder_reader.os.open", noting)
    return opened


def test_folder_gives_names_sizes_captions_and_what_is_wrong(tmp_path: Path) -> None:
    fill(tmp_path, "b.PNG", "a.png", ".hidden.png", "c.png", "d.png", "e.png", "face_1_2_3_4.png", "ä.png")
    (tmp_path / "below.png").mkdir()
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree  ")
    (tmp_path / "d.txt").write_bytes("grün".encode("latin-1"))
    (tmp_path / "e.txt").write_bytes(b"")
    (tmp_path / "face_1_2_3_4.txt").rename(tmp_path / "face.txt")
    (tmp_path / "ä.txt").rename(tmp_path / "ä.caption")
    put_bytes(tmp_path / "broken.png", SMALL[:20])
    put_bytes(tmp_path / "turned.jpg", dict(FILES)["EXIF 6"])
    (tmp_path / "nowhere.png").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe.png")
    found = scan_folder(tmp_path, ".txt", None)
    listed = list_folder(tmp_path)
    assert list(found.images) == listed.images
    names = list(found.images)
    row = {name: number for number, name in enumerate(names)}
    wanted = [caption_name(name, ".txt", set(listed.others)) is not None for name in names]
    assert [state != CAPTION_NONE for state in found.states] == wanted
    assert found.texts[row["c.png"]] == "one\ntwo\nthree  "
    assert found.texts[row["face_1_2_3_4.png"]] == "face_1_2_3_4.png"
    assert [found.states[row[name]] for name in ("a.png", "d.png", "e.png", "ä.png")] == [
        CAPTION_READ, CAPTION_BAD, CAPTION_EMPTY, CAPTION_NONE]
    assert "d.txt: byte 2 is not UTF-8" in found.caption_problems[row["d.png"]]
    assert "e.txt: the caption file is empty" in found.caption_problems[row["e.png"]]
    assert found.other_captions == {".caption": [row["ä.png"]]}
    assert sorted(names[number] for number in found.image_problems) == ["broken.png", "nowhere.png"]
    assert str(tmp_path / "nowhere.png") in found.image_problems[row["nowhere.png"]]
    assert found.sizes[row["turned.jpg"]].tolist() == [20, 30]
    assert found.sizes[row["broken.png"]].tolist() == [0, 0]
    status = (tmp_path / "a.png").stat()
    assert found.stats[row["a.png"]].tolist() == [status.st_size, status.st_mtime_ns]


def test_names_that_are_no_utf8_are_read_and_sorted_as_text(tmp_path: Path) -> None:
    names = [os.fsencode(tmp_path) + name for name in (b"/\xff.png", b"/\xff.txt", "/\ue000.png".encode(), b"/z.png")]
    for name in names:
        with open(name, "wb") as file:
            file.write(SMALL if name.endswith(b"png") else b"a caption")
    found = scan_folder(tmp_path, ".txt", None)
    assert list(found.images) == list_folder(tmp_path).images == sorted(found.images)
    assert list(found.texts) == ["", "a caption", ""]
    assert found.sizes.tolist() == [[40, 30]] * 3


def test_folder_that_is_none_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        scan_folder(tmp_path / "nowhere", ".txt", None)
    with pytest.raises(NotADirectoryError):
        scan_folder(put_bytes(tmp_path / "file", b""), ".txt", None)


def test_long_captions_are_read_whole(tmp_path: Path) -> None:
    fill(tmp_path, "a.png", "b.png")
    (tmp_path / "a.txt").write_text("a tag, " * 5000, encoding="utf-8")
    (tmp_path / "b.txt").write_text("x" * headers.HEAD, encoding="utf-8")
    assert list(scan_folder(tmp_path, ".txt", None).texts) == ["a tag, " * 5000, "x" * headers.HEAD]


@pytest.mark.usefixtures("few")
def test_kept_scan_reads_only_what_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fill(tmp_path / "images", *(f"{letter}.png" for letter in "abcdef"))
    keep = KeptIndexes(tmp_path / "cache", False)
    first = scan_folder(folder, ".txt", keep)
    opened = reads(monkeypatch)
    again = scan_folder(folder, ".txt", keep)
    assert not opened
    assert (again.images, again.texts) == (first.images, first.texts)
    assert again.sizes.tolist() == first.sizes.tolist()
    assert again.stats.tolist() == first.stats.tolist()
    put_bytes(folder / "b.png", TALL)
    (folder / "d.txt").write_text("a new caption", encoding="utf-8")
    (folder / "e.txt").unlink()
    (folder / "f.png").unlink()
    fill(folder, "aa.png")
    changed = scan_folder(folder, ".txt", keep)
    assert sorted(opened) == ["aa.png", "aa.txt", "b.png", "b.txt", "d.png", "d.txt", "e.png"]
    assert list(changed.images) == ["a.png", "aa.png", "b.png", "c.png", "d.png", "e.png"]
    assert list(changed.texts) == ["a.png", "aa.png", "b.png", "c.png", "a new caption", ""]
    assert changed.sizes.tolist() == [[40, 30], [40, 30], [30, 40], [40, 30], [40, 30], [40, 30]]
    assert scan_folder(folder, ".txt", None).stats.tolist() == changed.stats.tolist()


@pytest.mark.usefixtures("few")
def test_file_that_changed_just_before_the_scan_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fill(tmp_path / "images", "a.png", "b.png", "c.png")
    now = time.time()
    os.utime(folder / "b.png", (now, now))
    keep = KeptIndexes(tmp_path / "cache", False)
    scan_folder(folder, ".txt", keep)
    put_bytes(folder / "b.png", SMALL.replace(SMALL[16:33], TALL[16:33]))  # as long, and of the same time
    os.utime(folder / "b.png", (now, now))
    opened = reads(monkeypatch)
    assert scan_folder(folder, ".txt", keep).sizes.tolist() == [[40, 30], [30, 40], [40, 30]]
    assert opened == ["b.png", "b.txt"]


@pytest.mark.usefixtures("few")
def test_trusted_scan_looks_at_nothing_but_what_was_broken(tmp_path: Path) -> None:
    folder = fill(tmp_path / "images", "a.png", "b.png", "c.png", "d.png")
    put_bytes(folder / "b.png", b"broken")
    (folder / "c.txt").write_bytes(b"")
    first = scan_folder(folder, ".txt", KeptIndexes(tmp_path / "cache", False))
    for name in ("a.png", "a.txt", "d.png"):
        (folder / name).unlink()
    trusted = scan_folder(folder, ".txt", KeptIndexes(tmp_path / "cache", True))
    assert (trusted.images, trusted.texts) == (first.images, first.texts)
    assert trusted.sizes.tolist() == first.sizes.tolist()
    assert trusted.states.tolist() == first.states.tolist()
    assert (trusted.image_problems, trusted.caption_problems) == (first.image_problems, first.caption_problems)
    assert trusted.image_problems.keys() == {1}
    assert trusted.caption_problems.keys() == {2}
    assert list(scan_folder(folder, ".txt", KeptIndexes(tmp_path / "cache", False)).images) == ["b.png", "c.png"]


@pytest.mark.usefixtures("few")
def test_damaged_index_counts_as_none(tmp_path: Path) -> None:
    folder = fill(tmp_path / "images", *(f"{number}.png" for number in range(5)))
    keep = KeptIndexes(tmp_path / "cache", True)
    first = scan_folder(folder, ".txt", keep)
    [file] = (tmp_path / "cache" / "index").iterdir()
    whole, rng = file.read_bytes(), random.Random(1)
    key = ("folder", str(folder), ".txt", *TEXT_EXTENSIONS)
    assert keep.read(*key) is not None
    for _ in range(200):
        damaged = bytearray(whole)
        place = rng.randrange(len(whole))
        if rng.random() < 0.3:
            del damaged[place:]
        else:
            damaged[place] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        assert keep.read(*key) is None
    assert scan_folder(folder, ".txt", keep).texts == first.texts
    assert file.read_bytes()[:17] == whole[:17]
    assert keep.read(*key) is not None
    assert keep.read("folder", "elsewhere") is None


@pytest.mark.usefixtures("few")
def test_cache_folder_that_cannot_be_written_only_costs_time(tmp_path: Path) -> None:
    folder = fill(tmp_path / "images", "a.png", "b.png", "c.png")
    keep = KeptIndexes(put_bytes(tmp_path / "file", b"") / "cache", False)
    assert len(scan_folder(folder, ".txt", keep).images) == 3


@pytest.mark.usefixtures("few")
def test_extensions_and_small_folders_are_kept_apart(tmp_path: Path) -> None:
    folder, keep = fill(tmp_path / "images", "a.png", "b.png", "c.png"), KeptIndexes(tmp_path / "cache", True)
    assert list(scan_folder(folder, ".txt", keep).texts) == ["a.png", "b.png", "c.png"]
    assert list(scan_folder(folder, ".cap", keep).texts) == ["", "", ""]
    scan_folder(fill(tmp_path / "two", "a.png", "b.png"), ".txt", keep)
    assert len(list((tmp_path / "cache" / "index").iterdir())) == 2


@pytest.mark.usefixtures("few")
def test_lists_of_files_are_kept_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = fill(tmp_path / "one", "a.png", "b.png"), fill(tmp_path / "two", "a.png", "c.png")
    monkeypatch.chdir(tmp_path)
    put_bytes(two / "a.png", TALL)
    os.utime(two / "a.png", OLD)
    os.mkfifo(tmp_path / "pipe.png")
    paths = [str(one / "b.png"), "two/a.png", "one/a.png", "missing.png", "one", "pipe.png"]
    keep = KeptIndexes(tmp_path / "cache", False)
    wanted = [[40, 30], [30, 40], [40, 30], [0, 0], [0, 0], [0, 0]]
    assert scan_files(TextColumn.of(paths), keep).sizes.tolist() == wanted
    opened = reads(monkeypatch)
    found = scan_files(TextColumn.of(paths), keep)
    assert found.sizes.tolist() == wanted
    assert not {"a.png", "b.png"} & set(opened)
    assert {row: problem.partition(":")[0] for row, problem in found.problems.items()} == {
        3: "missing.png", 4: "one", 5: "pipe.png"}
    opened.clear()
    found = scan_files(TextColumn.of([paths[0], "two/c.png", *paths[1:3]]), keep)
    assert (found.sizes.tolist(), opened) == ([[40, 30], [40, 30], [30, 40], [40, 30]], ["c.png"])
    assert found.stats[1].tolist() == [len(SMALL), OLD[0] * 10**9]
    assert len(scan_files(TextColumn.of([]), keep).sizes) == 0


def test_columns_hold_any_text_and_take_any_rows() -> None:
    texts = ["", "plain", "grün", "\udcff", "", "🐸" * 3000, "x\ny"] * 3000
    column = TextColumn.of(iter(texts))
    assert list(column) == texts
    assert column == TextColumn.of(texts) == TextColumn.of_encoded(column.encoded(100))
    assert [column[place] for place in (0, 3, -1)] == ["", "\udcff", "x\ny"]
    assert list(column[5:9]) == texts[5:9]
    rows = np.array(random.Random(0).choices(range(len(texts)), k=9000))
    assert list(column.take(rows)) == [texts[row] for row in rows]
    assert list(TextColumn.join([column.take(rows[:3]), TextColumn.of([]), column[:2]])) == [
        *(texts[row] for row in rows[:3]), "", "plain"]
    assert column != TextColumn.of(texts[:-1])
    assert list(TextColumn.of([])) == list(column.take(np.zeros(0, np.int64))) == []


def test_views_of_a_column_are_columns() -> None:
    texts = ["  a cat \n", "", "größer\nzweite", "\ud800 half", "plain", "   "]
    column = TextColumn.of(texts)
    views = column.parts_of(lambda text: text.partition("\n")[0].strip())
    assert views is not None
    wanted = ["a cat", "", "größer", "\ud800 half", "plain", ""]
    assert list(views) == [views[row] for row in range(6)] == wanted
    assert views.data is column.data
    assert views == TextColumn.of(wanted) == views
    assert views != column
    assert list(views.take(np.array([4, 0, 0, 5]))) == ["plain", "a cat", "a cat", ""]
    assert list(views[1:3]) == ["", "größer"]
    assert list(TextColumn.join([column, views, TextColumn.of(["x"])])) == [*texts, *wanted, "x"]
    assert [text.decode("utf-8", "surrogatepass") for part in views.encoded(2) for text in part] == wanted
    assert column.parts_of(str.upper) is None
