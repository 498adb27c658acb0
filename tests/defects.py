"""Clean random datasets, and defects of many kinds to plant into them: what the doctor must find, and nothing else."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

TRIGGER = "sks frog"
FREQUENT = "photograph"
TAGS = (
    "green leaves", "river bank", "morning light", "close up", "from behind", "dark water", "mossy stone", "open mouth",
    "long tongue", "night sky", "wooden table", "red brick wall", "snow", "umbrella", "bicycle", "crowded market",
    "portrait", "film grain", "yellow flowers", "glass jar", "rain", "concrete floor", "profile view", "birch forest",
)  # fmt: skip
TOML = """
[general]
caption_extension = ".txt"
[[datasets]]
resolution = 128
enable_bucket = true
min_bucket_reso = 64
max_bucket_reso = 256
[[datasets.subsets]]
image_dir = '{root}/plain'
[[datasets]]
resolution = 128
[[datasets.subsets]]
image_dir = '{root}/masked'
conditioning_data_dir = '{root}/masks'
[[datasets]]
resolution = 128
[[datasets.subsets]]
image_dir = '{root}/faces'
face_crop_aug_range = [0.2, 0.5]
keep_tokens_separator = "|||"
class_tokens = "frog"
[[datasets]]
resolution = 128
[[datasets.subsets]]
image_dir = '{root}/listed'
metadata_file = '{root}/listed.json'
[[datasets]]
resolution = 128
enable_bucket = true
min_bucket_reso = 64
max_bucket_reso = 256
bucket_no_upscale = true
skip_image_resolution = 70
[[datasets.subsets]]
image_dir = '{root}/clear'
alpha_mask = true
[[datasets]]
resolution = 128
enable_bucket = true
min_bucket_reso = 64
max_bucket_reso = 256
batch_size = 2
[[datasets.subsets]]
image_dir = '{root}/learned'
[[datasets.subsets]]
image_dir = '{root}/reg'
is_reg = true
class_tokens = "animal"
[[datasets]]
resolution = 128
validation_split = 0.5
[[datasets.subsets]]
image_dir = '{root}/split'
"""
COUNTS = {"plain": 50, "masked": 11, "faces": 9, "listed": 5, "clear": 8, "learned": 5, "reg": 5, "split": 5}

Expected = set[tuple[str, str]]
"""(kind of finding, name of the file)"""


@dataclass
class World:
    """A dataset in the making; an image that a defect takes is not given to another."""

    root: Path
    rng: random.Random
    untouched: dict[str, list[str]] = field(default_factory=dict)
    made: int = 0

    @property
    def config(self) -> Path:
        return self.root / "dataset.toml"

    def take(self, folder: str = "plain", extensions: tuple[str, ...] = (".png", ".jpg", ".webp", ".bmp")) -> Path:
        """An image that nothing has been done to yet."""
        names = [name for name in self.untouched[folder] if Path(name).suffix in extensions]
        # Some defects need a PNG or JPEG; the others leave them those.
        name = self.rng.choice([name for name in names if Path(name).suffix in (".webp", ".bmp")] or names)
        self.untouched[folder].remove(name)
        return self.root / folder / name

    def picture(self, size: tuple[int, int] | None = None) -> np.ndarray:
        """[height, width, 3]: soft colours and a few shapes, unlike any other."""
        width, height = size or self.size()
        numbers = np.random.default_rng(self.rng.getrandbits(64))
        field_of_colours = numbers.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        pixels = cv2.resize(field_of_colours, (width, height), interpolation=cv2.INTER_CUBIC)
        for _ in range(3):
            left, top = int(numbers.integers(0, width * 3 // 4)), int(numbers.integers(0, height * 3 // 4))
            right, bottom = left + int(numbers.integers(8, width // 3)), top + int(numbers.integers(8, height // 3))
            pixels[top:bottom, left:right] = numbers.integers(0, 256, 3)
        return np.asarray(pixels, dtype=np.uint8)

    def size(self) -> tuple[int, int]:
        long = self.rng.randint(120, 180)
        short = int(long * self.rng.uniform(0.87, 1))
        return (long, short) if self.rng.random() < 0.5 else (short, long)

    def caption(self) -> str:
        return ", ".join([TRIGGER, FREQUENT, *self.rng.sample(TAGS, self.rng.randint(2, 5))])

    def add(self, folder: str, name: str, caption: str | None = None, size: tuple[int, int] | None = None) -> Path:
        """A new image with its caption file; `caption` "" writes none."""
        path = self.root / folder / name
        save(path, self.picture(size))
        if caption != "":
            text_of(path).write_text(caption or self.caption(), encoding="utf-8")
        return path


def text_of(image: Path) -> Path:
    return image.with_suffix(".txt")


def say(image: Path, text: str) -> None:
    text_of(image).write_bytes(text.encode())


def said(image: Path) -> str:
    return text_of(image).read_text(encoding="utf-8")


def save(path: Path, pixels: np.ndarray, **options: object) -> None:
    quick = {".webp": {"quality": 90, "method": 0}, ".jpg": {"quality": 95}, ".png": {"compress_level": 1}}
    Image.fromarray(pixels).save(path, **{**quick.get(path.suffix, {}), **options})


def load(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def make_clean(root: Path, seed: int) -> World:
    """A dataset of several styles that nothing is wrong with."""
    world = World(root, random.Random(seed))
    for folder, count in COUNTS.items():
        (root / folder).mkdir(parents=True)
        for number in range(count):
            extension = (".png", ".png", ".jpg", ".webp", ".bmp")[number % 5] if folder == "plain" else ".png"
            name = f"{folder}{number:02d}"
            if folder == "faces":
                name += "_60_60_30_30"
            elif folder == "reg":
                extension = ".jpg"
            own = {"faces": f"{TRIGGER}, {FREQUENT}|||{world.rng.choice(TAGS)}", "listed": "", "reg": ""}
            # With bucket_no_upscale the sides are cut to whole steps.
            side = world.rng.randint(130, 170)
            size = (side, side) if folder == "clear" else None
            path = world.add(folder, name + extension, own.get(folder), size)
            world.untouched.setdefault(folder, []).append(path.name)
            if folder == "clear":
                alpha = np.full((*load(path).shape[:2], 1), 255, np.uint8)
                alpha[: 20 + number] = 0
                Image.fromarray(np.concatenate([load(path), alpha], axis=2), "RGBA").save(path)
    (root / "masks").mkdir()
    for name in world.untouched["masked"]:
        height, width = load(root / "masked" / name).shape[:2]
        mask = np.zeros((height, width), np.uint8)
        mask[10 : world.rng.randint(60, 100), 10 : world.rng.randint(60, 100)] = 255
        Image.fromarray(mask).save(root / "masks" / name)
    entries = {name: {"caption": world.caption()} for name in world.untouched["listed"]}
    (root / "listed.json").write_text(json.dumps(entries), encoding="utf-8")
    world.config.write_text(TOML.format(root=root.as_posix()), encoding="utf-8")
    return world


Plant = Callable[[World], Expected]
DEFECTS: dict[str, Plant] = {}


def defect(plant: Plant) -> Plant:
    DEFECTS[plant.__name__] = plant
    return plant


def about(kind: str, *paths: Path) -> Expected:
    return {(kind, path.name) for path in paths}


def overwrite(kind: str, write: Callable[[World, Path], object], extension: str = ".png", also: str = "") -> None:
    """Register a defect that changes one image file of the plain folder."""

    def plant(world: World) -> Expected:
        path = world.take(extensions=(extension,))
        write(world, path)
        return about(kind, path) | (about(also, path) if also else set())

    DEFECTS[kind] = plant


def recaption(kind: str, change: Callable[[World, str], str | bytes]) -> None:
    """Register a defect that changes one caption of the plain folder."""

    def plant(world: World) -> Expected:
        path = world.take()
        new = change(world, said(path))
        text_of(path).write_bytes(new if isinstance(new, bytes) else new.encode())
        return about(kind, path)

    DEFECTS[kind] = plant


def _as(mode: str, kind: str, **options: object) -> Callable[[World, Path], None]:
    def write(world: World, path: Path) -> None:
        Image.fromarray(world.picture()).convert(mode).save(path, kind, **options)

    return write


def _dangling(world: World, path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("gone.bin"))


def _rotated(world: World, path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = world.rng.choice((3, 6, 8))
    Image.fromarray(world.picture()).save(path, "JPEG", exif=exif)


def _animated(world: World, path: Path) -> None:
    size = world.size()
    frames = [Image.fromarray(world.picture(size)) for _ in range(2)]
    frames[0].save(path, "PNG", save_all=True, append_images=frames[1:])


def _deep(world: World, path: Path) -> None:
    Image.fromarray(world.picture()[:, :, 0].astype(np.uint16) * 257).save(path)


def _transparent(world: World, path: Path, rows: slice) -> None:
    colours = Image.fromarray(world.picture()).convert("RGBA")
    alpha = np.full((colours.height, colours.width), 255, np.uint8)
    alpha[rows] = 0
    colours.putalpha(Image.fromarray(alpha))
    colours.save(path)


def _palette(world: World, path: Path) -> None:
    Image.fromarray(world.picture()).quantize(64).save(path)


overwrite("missing_file", _dangling)
overwrite("empty_file", lambda world, path: path.write_bytes(b""))
overwrite("not_an_image", lambda world, path: path.write_bytes(b"<!DOCTYPE html><title>404 Not Found</title>"), ".jpg")
overwrite("broken_header", lambda world, path: path.write_bytes(b"\x13\x00\xfe" * 300))
overwrite("truncated", lambda world, path: path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10]))
overwrite("wrong_extension", lambda world, path: Image.fromarray(world.picture()).save(path, "JPEG"))
overwrite("exif_rotated", _rotated, ".jpg")
overwrite("animated", _animated)
overwrite("cmyk", _as("CMYK", "JPEG"), ".jpg")
overwrite("sixteen_bit", _deep, also="grey")
overwrite("palette", _palette)
overwrite("grey", _as("L", "PNG"))
overwrite("blank", lambda world, path: Image.new("RGB", world.size(), (200, 40, 90)).save(path))
overwrite("transparent", lambda world, path: _transparent(world, path, slice(30, 60)))
overwrite("invisible", lambda world, path: _transparent(world, path, slice(None)))
overwrite("tiny", lambda world, path: save(path, world.picture((30, 28))))
overwrite("enlarged", lambda world, path: save(path, world.picture((50, 48))))
overwrite("cropped", lambda world, path: save(path, world.picture((420, 60))))

recaption("caption_empty_file", lambda world, text: b"")
recaption("caption_blank", lambda world, text: " \n")
recaption("caption_not_utf8", lambda world, text: (text + ", Gr\u00fc\u00dfe").encode("latin-1"))
recaption("caption_garbled", lambda world, text: text + ", caf\u00e9".encode().decode("latin-1"))
recaption("caption_invisible", lambda world, text: text + ", tree\u200b house")
recaption("caption_lines", lambda world, text: text + "\nand a second line")
recaption("caption_first_line_blank", lambda world, text: "\n" + text)
recaption("caption_cut", lambda world, text: text + ", " + " ".join(f"leaf {number}" for number in range(40)))
recaption("tag_repeated", lambda world, text: f"{text}, {FREQUENT}")
recaption("tag_spelling", lambda world, text: text.replace(TRIGGER, f"{TRIGGER}, sks_frog"))
recaption("tag_typo", lambda world, text: text.replace(FREQUENT, "photogarph"))
recaption("wildcard_off", lambda world, text: text + ", {red|blue} pebbles")
recaption("keep_separator_unset", lambda world, text: text + "|||pebbles")
recaption("trigger_absent", lambda world, text: text.replace(TRIGGER + ", ", ""))


@defect
def duplicate(world: World) -> Expected:
    path = world.take()
    copy = path.with_name("copy_of_" + path.name)
    copy.write_bytes(path.read_bytes())
    say(copy, said(path))
    return about("duplicate", path, copy)


@defect
def captions_differ(world: World) -> Expected:
    path = world.take()
    copy = path.with_name("other_" + path.name)
    copy.write_bytes(path.read_bytes())
    say(copy, said(path) + ", seen twice")
    return about("captions_differ", path, copy) | about("duplicate", path, copy)


@defect
def near_duplicate(world: World) -> Expected:
    path = world.take()
    pixels = load(path)
    smaller = cv2.resize(pixels, None, fx=0.9, fy=0.9, interpolation=cv2.INTER_AREA)
    brighter = (smaller.astype(np.float32) * 0.9 + 20).clip(0, 255).astype(np.uint8)
    near = path.with_name("near_" + path.stem + ".jpg")
    save(near, brighter, quality=60)
    mirrored = path.with_name("mirror_" + path.stem + ".jpg")
    save(mirrored, np.ascontiguousarray(pixels[:, ::-1]), quality=80)
    for copy in (near, mirrored):
        say(copy, world.caption())
    return about("near_duplicate", path, near, mirrored)


@defect
def duplicate_reg(world: World) -> Expected:
    path, reg = world.take("learned"), world.take("reg")
    reg.unlink()
    copy = reg.with_suffix(".png")
    copy.write_bytes(path.read_bytes())
    return about("duplicate_reg", path, copy)


@defect
def near_duplicate_reg(world: World) -> Expected:
    path, reg = world.take("learned"), world.take("reg")
    save(reg, load(path), quality=70)
    return about("near_duplicate_reg", path, reg)


@defect
def near_duplicate_validation(world: World) -> Expected:
    path = world.take("split")
    copies = [path.with_name(f"again{quality}.jpg") for quality in range(70, 77)]
    for copy in copies:
        # Each half has six of twelve pictures, so the eight alike cannot lie in one.
        save(copy, load(path), quality=int(copy.stem[-2:]))
        say(copy, world.caption())
    return about("near_duplicate_validation", path, *copies)


@defect
def caption_missing(world: World) -> Expected:
    path = world.take()
    text_of(path).unlink()
    return about("caption_missing", path)


@defect
def caption_missing_here(world: World) -> Expected:
    path = world.take("faces")
    text_of(path).unlink()
    return about("caption_missing_here", path)


@defect
def caption_other_extension(world: World) -> Expected:
    path = world.take()
    text_of(path).rename(path.with_suffix(".caption"))
    return about("caption_other_extension", path)


@defect
def caption_twice(world: World) -> Expected:
    path = world.take()
    path.with_suffix(".caption").write_text("another text", encoding="utf-8")
    return about("caption_twice", path)


@defect
def caption_shared(world: World) -> Expected:
    path = world.take(extensions=(".png", ".bmp", ".webp"))
    other = world.add("plain", path.stem + ".jpg", said(path))
    return about("caption_shared", path, other)


@defect
def class_tokens_ignored(world: World) -> Expected:
    path = world.take("faces")
    say(path, f"sks newt, {FREQUENT}|||{world.rng.choice(TAGS)}")
    return about("class_tokens_ignored", path)


@defect
def keep_separator_absent(world: World) -> Expected:
    path = world.take("faces")
    say(path, said(path).replace("|||", ", "))
    return about("keep_separator_absent", path)


@defect
def caption_orphan(world: World) -> Expected:
    path = world.root / "plain" / "left_behind.txt"
    path.write_text(world.caption(), encoding="utf-8")
    return about("caption_orphan", path)


def rename(path: Path, name: str) -> Path:
    text_of(path).rename(text_of(path).with_stem(name))
    return path.rename(path.with_stem(name))


@defect
def face_name_invalid(world: World) -> Expected:
    return about("face_name_invalid", rename(world.take("faces"), "far_900_60_30_30"))


@defect
def face_name_missing(world: World) -> Expected:
    return about("face_name_missing", rename(world.take("faces"), "nobody"))


@defect
def cropped_without_buckets(world: World) -> Expected:
    path = world.take("masked")
    save(path, world.picture((260, 130)))
    save(world.root / "masks" / path.name, np.tile(np.arange(260, dtype=np.uint8) // 2, (130, 1)))
    return about("cropped_without_buckets", path)


def _mask(world: World) -> Path:
    return world.root / "masks" / world.take("masked").name


@defect
def mask_missing(world: World) -> Expected:
    path = _mask(world)
    path.unlink()
    return about("mask_missing", path)


@defect
def mask_orphan(world: World) -> Expected:
    path = world.root / "masks" / "unknown.png"
    Image.new("L", (100, 100), 128).save(path)
    return about("mask_orphan", path)


@defect
def mask_broken(world: World) -> Expected:
    path = _mask(world)
    path.write_bytes(path.read_bytes()[:60])
    return about("mask_broken", path)


def _fill_mask(kind: str, level: int) -> None:
    def plant(world: World) -> Expected:
        path = _mask(world)
        with Image.open(path) as image:
            size = image.size
        Image.new("L", size, level).save(path)
        return about(kind, path)

    DEFECTS[kind] = plant


_fill_mask("mask_black", 0)
_fill_mask("mask_white", 255)


@defect
def mask_shape(world: World) -> Expected:
    path = _mask(world)
    Image.linear_gradient("L").resize((90, 200)).save(path)
    return about("mask_shape", path)


@defect
def alpha_absent(world: World) -> Expected:
    path = world.take("clear")
    save(path, world.picture((150, 150)))
    return about("alpha_absent", path)


def _clear(world: World, path: Path, size: tuple[int, int]) -> None:
    colours = Image.fromarray(world.picture(size)).convert("RGBA")
    colours.putalpha(128)
    colours.save(path)


@defect
def no_bucket(world: World) -> Expected:
    path = world.take("clear")
    _clear(world, path, (300, 40))
    return about("no_bucket", path)


@defect
def skipped_resolution(world: World) -> Expected:
    path = world.take("clear")
    _clear(world, path, (66, 70))
    return about("skipped_resolution", path)


@defect
def reg_unused(world: World) -> Expected:
    path = world.add("reg", "zz_last.jpg", "")
    return about("reg_unused", path)


@defect
def short_batch(world: World) -> Expected:
    path = world.take("learned")
    save(path, world.picture((256, 64)))
    return about("short_batch", path)


@defect
def unsupported_format(world: World) -> Expected:
    path = world.root / "plain" / "scan.tiff"
    Image.fromarray(world.picture()).save(path)
    return about("unsupported_format", path)


@defect
def subfolder(world: World) -> Expected:
    path = world.root / "plain" / "more"
    path.mkdir()
    save(path / "inner.png", world.picture())
    return about("subfolder", path)


@defect
def stray_file(world: World) -> Expected:
    path = world.root / "plain" / "notes.docx"
    path.write_bytes(b"PK\x03\x04")
    return about("stray_file", path)


@defect
def metadata_image_missing(world: World) -> Expected:
    path = world.root / "listed.json"
    entries = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**entries, "absent.png": {"caption": "a"}}), encoding="utf-8")
    return about("metadata_image_missing", Path("absent.png"))


@defect
def metadata_entry_missing(world: World) -> Expected:
    return about("metadata_entry_missing", world.add("listed", "unnamed.png", ""))
