"""Captions, kohya's folders and regularisation images beside those of sd-scripts, for `tools/conformance.py`."""

from __future__ import annotations

import ast
import random
from functools import partial
from pathlib import Path
from typing import Any

from conformance_cases import REFUSED, Case, Intended, Part, answer, read_dataset, refusals
from PIL import Image

from sd_train.data.batches import BatchSettings, Updates
from sd_train.data.captions import process_caption, sample_caption
from sd_train.data.config import DatasetRequest, load_datasets
from sd_train.data.index import ImageIndex, ImageRecord, IndexOptions, build_indexes
from sd_train.data.settings import SubsetConfig
from sd_train.diffusion.draws import DrawSettings
from sd_train.families.registry import PUBLISHED_LATENT
from sd_train.plan_data import draw_function

ALLOWED = "with --allow_missing_captions"
OURS = {
    "a, b ||| c, d ||| e, f ||| g": ["a, b, c, d, e, f, g"],
    "l1 a\nl2 b": ["PRE l1 a SUF"],
    "a;b;c;d": ["c; a; b; d"],
}
"""What captions come to here, where that is not what sd-scripts makes of them."""


def mended(reason: str, caption: str) -> Intended:
    """Our answer for `caption`, where it differs from sd-scripts'."""
    return Intended(reason, lambda case: repr(caption) in case.name and case.ours == OURS[caption])


PROMPTS = [
    mended("keep_tokens_separator never stays in the prompt", "a, b ||| c, d ||| e, f ||| g"),
    mended("prefix and suffix go onto the line that is chosen", "l1 a\nl2 b"),
    mended("shuffled tags are joined with the caption_separator that they were split at", "a;b;c;d"),
    Intended("replacements belong to textual inversion, which is not there yet",
             lambda case: "replacing" in case.name and repr(case.ours[0]) in case.name),
]  # fmt: skip
FILES = [
    Intended("an image without caption and class_tokens is an error unless --allow_missing_captions is given",
             lambda case: case.ours == REFUSED and "--allow_missing_captions" in case.said
             and ALLOWED not in case.name),
    Intended("extensions count in any case",
             lambda case: "a.Png" in case.name and case.theirs == REFUSED and case.ours["captions"] == ["mixed"]),
    Intended("a byte order mark is no part of the caption",
             lambda case: case.theirs["captions"] == ["\ufeffbom text"] and case.ours["captions"] == ["bom text"]),
]  # fmt: skip
LINK = "a plain file 5_file.png, 2_a/3_b nested, 4_link -> 2_a, .git"
EXTRA = [
    Intended("folders are sorted; sd-scripts takes them as the file system lists them",
             lambda case: case.name.startswith("order: ") and case.ours == sorted(case.theirs)),
]  # fmt: skip
REG = [
    refusals("num_repeats = 0 is an error; sd-scripts leaves the folder out", {
        "train 3 x 1, reg 2 x 0": "num_repeats = 0"}),
    refusals("a folder without images is an error; sd-scripts leaves it out", {
        "train 6 x 1, reg 0 x 1": "no image"}),
]  # fmt: skip


def caption_parts(golden: dict[str, Any], place: Path) -> list[Part]:
    """`captions.json`: what prompts are made of, and which files they are read from."""
    prompts = [_prompt(case) for case in golden["cases"]]
    fixed = [_fixed(case) for case in golden["cases"] if "seed" not in case and "repl" not in case]
    files = [_caption_file(case, place / str(number)) for number, case in enumerate(golden["caption_files"])]
    allowed = [_caption_file(case, place / str(number), allow=True)
               for number, case in enumerate(golden["caption_files"])]  # fmt: skip
    return [Part("prompts", prompts, PROMPTS), Part("prompts of samples", fixed, PROMPTS),
            Part("caption files", files, FILES), Part("caption files, allowed", allowed, FILES)]  # fmt: skip


def _asked(case: dict[str, Any]) -> str:
    others = {name: value for name, value in case.items() if name not in ("caption", "options", "result", "repl")}
    replaced = f", replacing {case['repl']}" if "repl" in case else ""
    return f"{case['caption']!r}, {case['options'] or 'no options'}{f', {others}' if others else ''}{replaced}"


def _expected(case: dict[str, Any]) -> list[str]:
    return list(case["result"]) if "n" in case else [case["result"]]


def _prompt(case: dict[str, Any]) -> Case:
    """With sd-scripts' own draws."""
    rng, subset = random.Random(case.get("seed", 0)), SubsetConfig(Path("photos"), **case["options"])
    epoch, step, end = case.get("epoch", 1) - 1, case.get("step", 0), case.get("max_steps", 0)
    ours = [process_caption(case["caption"], subset, rng, epoch, step, end) for _ in range(case.get("n", 1))]
    return Case(_asked(case), _expected(case), ours)


def _fixed(case: dict[str, Any]) -> Case:
    """Where nothing is drawn, as a batch asks for it."""
    subset = SubsetConfig(Path("photos"), **case["options"])
    record = ImageRecord(Path("photos/a.png"), "a.png", subset, (8, 8), (8, 8), (8, 8), case["caption"], 1.0, False)
    epoch, step, end = case.get("epoch", 1) - 1, case.get("step", 0), case.get("max_steps", 0)
    return Case(_asked(case), _expected(case), [sample_caption(record, 0, epoch, 0, step, end)])


def _caption_file(case: dict[str, Any], place: Path, allow: bool = False) -> Case:
    folder = place / "photos"
    folder.mkdir(parents=True, exist_ok=True)
    ending = case["image"].rpartition(".")[2].lower()
    Image.new("RGB", (8, 8)).save(folder / case["image"], format=ending)
    for name, text in case["files"].items():
        data = ast.literal_eval(text) if text.startswith("b'") else text.encode()
        (folder / name).write_bytes(data)
    keys = {name: case[name] for name in ("caption_extension", "enable_wildcard", "class_tokens")}

    def captions() -> Any:
        dataset = read_dataset(place, {"resolution": 64}, {"image_dir": str(folder), **keys})
        (index,) = build_indexes([dataset], IndexOptions(allow_missing_captions=allow)).training
        return {"captions": list(index.captions), "tags": list(index.tag_frequency().values())}

    ours, said = answer(captions)
    theirs = {"captions": case["captions"], "tags": case["tag_frequency"]} if case["captions"] else REFUSED
    name = f"{case['image']} beside {case['files']}, {keys}"
    return Case(f"{name} {ALLOWED}" if allow else name, theirs, ours, said)


def legacy_parts(golden: dict[str, Any], place: Path) -> list[Part]:
    """`legacy_folders.json`: what folders named REPEATS_CLASS come to."""
    cases = []
    for number, case in enumerate(golden["cases"]):
        root = place / str(number)
        for path in (root / "train" / "1_other", root / ("reg" if case["reg"] else "train") / case["folder"]):
            _put(path)
        ours, said = answer(partial(_subsets, root / "train", root / "reg" if case["reg"] else None))
        if isinstance(ours, list):
            ours = [subset for subset in ours if subset["image_dir"] != "1_other"]
        elif case["reg"] and "REPEATS_CLASS" in said:
            ours = []
        name = f"{case['folder']!r}{' for regularisation' if case['reg'] else ''}"
        cases.append(Case(name, case["subsets"], ours, said))
    extra = [_extra(case, place / f"extra {number}") for number, case in enumerate(golden.get("extra", []))]
    return [Part("names", cases), Part("folders", extra, EXTRA)]


def _put(folder: Path, count: int = 1) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", (8, 8)).save(folder / f"{number:03d}.png")
    return folder


def _subsets(train: Path | None, reg: Path | None = None) -> Any:
    fallbacks = {"resolution": (64, 64), "batch_size": 1}
    request = DatasetRequest("train_db", train_data_dir=train, reg_data_dir=reg, fallbacks=fallbacks)
    (dataset,) = load_datasets(request)
    return [
        {"image_dir": subset.image_dir.name, "num_repeats": subset.num_repeats, "is_reg": subset.is_reg,
         "class_tokens": subset.class_tokens}
        for subset in dataset.subsets
    ]  # fmt: skip


def _extra(case: dict[str, Any], root: Path) -> Case:
    # Without any subset the training of sd-scripts ends with "No data found".
    name, theirs = case["case"], case["subsets"] or REFUSED
    root.mkdir()
    train: Path | None = root
    if name == LINK:
        _put(root / "2_a")
        _put(root / "2_a" / "3_b")
        _put(root / ".git")
        (root / "5_file.png").touch()
        (root / "4_link").symlink_to("2_a")
    elif name.startswith("order: "):
        for folder in ("2_b", "10_a", "1_c", "3_d"):
            _put(root / folder)
    elif "does not exist" in name:
        train = root / "nowhere"
    elif name.startswith("train None"):
        train = None
    else:
        return Case(name, theirs, None, "this tool does not know the case")
    ours, said = answer(partial(_subsets, train))
    if isinstance(ours, list) and isinstance(theirs[0], str):
        ours = [subset["image_dir"] for subset in ours]
    return Case(name, theirs, ours, said)


def reg_parts(golden: dict[str, Any], place: Path) -> list[Part]:
    """`reg.json`: how often each regularisation image is used."""
    cases = [_balanced(case, place / str(number)) for number, case in enumerate(golden["cases"])]
    return [Part("balance", cases, REG)]


def _balanced(case: dict[str, Any], place: Path) -> Case:
    kinds = ("train", "reg") if case.get("subset_order", "train_first") == "train_first" else ("reg", "train")
    subsets = []
    for kind in kinds:
        for number, group in enumerate(case[kind]):
            folder = _put(place / f"{kind} {number}", group["images"])
            subsets.append({"image_dir": str(folder), "num_repeats": group["repeats"], "is_reg": kind == "reg",
                            "class_tokens": kind})  # fmt: skip

    def balance() -> Any:
        dataset = read_dataset(place, {"resolution": 64}, *subsets)
        (index,) = build_indexes([dataset], IndexOptions()).training
        used = {str(index.path(row)): float(index.repeats[row]) for row in range(len(index))}
        final = [
            [used.get(str(path), 0) for path in sorted((place / f"reg {number}").iterdir())]
            for number in range(len(case["reg"]))
        ]
        return {
            "num_train_images": index.num_train_images, "num_reg_images": index.num_reg_images,
            "reg_final_repeats": final, "reg_total": sum(map(sum, final)), "batches": batches_of(index),
        }  # fmt: skip

    ours, said = answer(balance)
    theirs = {name: case[name] for name in
              ("num_train_images", "num_reg_images", "reg_final_repeats", "reg_total", "batches")}  # fmt: skip
    groups = [f"{kind} " + " and ".join(f"{group['images']} x {group['repeats']}" for group in case[kind])
              for kind in kinds]  # fmt: skip
    return Case(", ".join(groups), theirs, ours, said)


def batches_of(index: ImageIndex) -> int:
    """Batches of the first epoch."""
    settings = BatchSettings(seed=0, accumulation=1, workers=0)
    return Updates([index], settings, draw_function(DrawSettings(0), PUBLISHED_LATENT)).batches_in(0)
