"""`sd-train filter_images`: images that do more harm than good, in a report, and out of the way where asked for."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sd_train.errors import ConfigError, DataError, Problems
from sd_train.files import probe_folder, tidy, write_text
from sd_train.prepare.arguments import Parser, check_images_folder
from sd_train.prepare.entries import match_entries
from sd_train.prepare.filter_checks import CHECKS, Filtered, FilterLimits, run_checks
from sd_train.prepare.filter_measure import measure
from sd_train.prepare.filter_moving import JOURNAL, Journal, move_images, read_journal
from sd_train.prepare.listing import find_images, metadata_key
from sd_train.prepare.metadata import check_target, json_text, read_metadata, write_metadata

if TYPE_CHECKING:
    from sd_train.doctor.looks import Look

_TEXTS = (".txt", ".caption")

_ABOUT = f"""Look through a folder of images for what the guides tell people to take out. The checks:
{", ".join(CHECKS)}.

The findings go, with pictures, into a page (--report). --list writes them as JSON, --out_json writes metadata without
these images, and --move_to moves them, with their captions, into another folder. Nothing is ever deleted. Of pictures
that are there several times the largest is kept, and one with a caption before one without."""


def main(argv: Sequence[str]) -> int:
    """Look, report and do what is asked for.

    Raises:
        UserError: if the arguments are wrong, files cannot be read or moved, or the disk refuses.
    """
    given = _parser().parse_args(list(argv))
    checks, report_only = _checked(given)
    folder: Path = given.train_data_dir
    journal = read_journal(given.move_to) if given.move_to is not None else {}
    try:
        images = find_images(folder, given.recursive)
    except DataError:
        # All may have been moved by an earlier call.
        if not journal:
            raise
        images = []
    metadata = read_metadata(given.in_json) if given.in_json is not None else {}
    keys = {image: metadata_key(image, folder, False) for image in images}
    captions = _captions(images, match_entries(images, folder, metadata).keys)
    limits = FilterLimits(
        given.min_size, given.min_bytes, given.max_aspect, given.min_contrast, given.min_sharpness, given.min_letters
    )
    from sd_train.doctor.looks import look_at

    report: Path = given.report or Path(f"{folder.absolute().name}_filter.html")
    _probe(given, report)
    with_text = "text" in checks
    looks = look_at(images, _progress(len(images)), lambda decoded: measure(decoded, with_text))
    result = run_checks(looks, limits, checks, report_only, captions, folder)
    removed = {keys[image]: reasons for image, reasons in result.reasons.items()}
    # An image that the user has put back into the folder is judged as it stands there.
    journal = {key: reasons for key, reasons in journal.items() if not os.path.lexists(folder / key)}
    journal = dict(sorted((journal | removed).items()))
    if removed or result.reported or not report.is_file() or given.move_to is None:
        write_text(report, _page(given, looks, result, sum(map(bool, captions.values()))), "--report")
    if given.list is not None:
        _write_list(given.list, journal, {keys[image]: seen for image, seen in result.reported.items()})
    if given.out_json is not None:
        gone = match_entries([folder / key for key in journal], folder, metadata).keys.values()
        absent = set(gone)
        left = {key: entry for key, entry in metadata.items() if key not in absent}
        write_metadata(given.out_json, left)
        print(f"{given.out_json}: {len(left)} of {len(metadata)} entries")
    if given.move_to is not None:
        # What was about to be moved when an earlier call was interrupted is among `removed` again.
        moved = move_images(folder, [keys[image] for image in result.reasons], given.move_to, journal)
        print(f"{given.move_to}: {moved} images moved there")
    for finding in result.findings:
        count = len({sight.path for sight in finding.sights} & (set(result.reasons) | set(result.reported)))
        print(f"{finding.kind.severity}: {finding.kind.title} ({count})")
    print(f"{len(images)} images, {len(removed)} to leave out; with pictures: {report.resolve()}")
    return 0


def _probe(given: argparse.Namespace, report: Path) -> None:
    """Find out whether files can be written where they will be, before all images are looked at.

    Raises:
        RunError: if not.
    """
    for option, file in (("--report", report), ("--list", given.list), ("--out_json", given.out_json)):
        if file is not None:
            probe_folder(file.absolute().parent, option)
            # A call that was killed has left what it was writing.
            tidy(file.absolute().parent, {file.name}.__contains__)
    if given.move_to is not None:
        probe_folder(given.move_to.absolute(), "--move_to")


def _captions(images: Iterable[Path], entries: Collection[Path]) -> dict[Path, int]:
    """How many caption files and entries of metadata each image has."""
    return {
        image: sum(os.path.exists(image.with_suffix(end)) for end in _TEXTS) + (image in entries) for image in images
    }


def _write_list(path: Path, journal: Journal, reported: Journal) -> None:
    content = {"leave_out": journal, "reported": dict(sorted(reported.items()))}
    write_text(path, json_text(content), "--list")


def _page(
    given: argparse.Namespace, looks: dict[Path, Look], result: Filtered, captioned: int
) -> str:
    """The doctor's page, about this folder alone; `captioned` of its images have a caption."""
    from sd_train.data.settings import DatasetConfig, SubsetConfig
    from sd_train.doctor.diagnose import Diagnosis, Statistics
    from sd_train.doctor.finding import Place
    from sd_train.doctor.page import About, make_page
    from sd_train.doctor.survey import Item, SubsetSurvey, Survey

    folder: Path = given.train_data_dir
    config = SubsetConfig(folder, origin="filter_images")
    items = tuple(Item(metadata_key(image, folder, False), image, None, None) for image in looks)
    survey = Survey(
        (DatasetConfig(1, (512, 512), subsets=(config,)),), (SubsetSurvey(config, Place("", 0, 0), items),)
    )
    statistics = (Statistics(len(looks), captioned, (), (), {}),)
    diagnosis = Diagnosis(survey, looks, tuple(result.findings), statistics, None, (), 75)
    what = "Nothing was changed." if given.move_to is None else f"They go to {given.move_to}."
    told = f"Looked at by sd-train filter_images. Of {len(looks):,} images {len(result.reasons):,} are to be left out. "
    return make_page(About(f"Filter: {folder.absolute().name}", told + what, "--list", folder), diagnosis)


def _progress(total: int) -> Callable[[], object]:
    if not sys.stderr.isatty():
        return lambda: None
    from tqdm import tqdm

    bar = tqdm(desc="looking", unit="image", total=total)
    return lambda: bar.update()


def _checked(given: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The checks, and those that only report.

    Raises:
        ConfigError: with every problem.
    """
    problems = Problems()
    check_images_folder(given.train_data_dir, problems)
    chosen = {}
    for option in ("checks", "report_only"):
        chosen[option] = [name.strip() for name in getattr(given, option).split(",") if name.strip()]
        if unknown := [name for name in chosen[option] if name not in CHECKS]:
            problems.add(f"--{option}", ",".join(unknown), "is no check", f"use some of {','.join(CHECKS)}")
    for option, least in (("min_size", 0), ("min_bytes", 0), ("min_contrast", 0), ("min_sharpness", 0),
                          ("max_aspect", 1), ("min_letters", 2)):  # fmt: skip
        if not getattr(given, option) >= least:
            problems.add(f"--{option}", getattr(given, option), f"must be {least} or more", "leave it out")
    if (given.in_json is None) != (given.out_json is None):
        problems.add("--in_json, --out_json", None, "belong together: the second is the first without the images",
                     "give both")  # fmt: skip
    if given.out_json is not None:
        check_target(given.out_json, problems)
    if given.in_json is not None and not given.in_json.is_file():
        problems.add("--in_json", str(given.in_json), "there is no such file", "give the metadata of this folder")
    if given.move_to is not None:
        inside = given.move_to.resolve().is_relative_to(given.train_data_dir.resolve())
        if inside and (given.recursive or given.move_to.resolve() == given.train_data_dir.resolve()):
            problems.add("--move_to", str(given.move_to), "lies in the folder of the images, where they would be found "
                         "again", "give a folder elsewhere")  # fmt: skip
        elif given.move_to.exists() and not given.move_to.is_dir():
            problems.add("--move_to", str(given.move_to), "is a file", "give a folder")
    # What is not of an earlier call is somebody's own.
    for option, ours in (("list", _LIST_START), ("report", "<!doctype html")):
        path: Path | None = getattr(given, option)
        if path is not None and path.exists() and not _starts_with(path, ours):
            problems.add(f"--{option}", str(path), "is another file, which would be lost", "give another name")
    problems.raise_if_any(ConfigError)
    return chosen["checks"], chosen["report_only"]


_LIST_START = '{\n  "leave_out"'
"""How `--list` begins."""


def _starts_with(path: Path, text: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(text)).decode("utf-8", "replace").lower() == text


def _parser() -> argparse.ArgumentParser:
    parser = Parser("filter_images", _ABOUT)
    add = parser.add_argument
    add("train_data_dir", type=Path, help="folder of the images")
    add("--recursive", action="store_true", help="also the images in sub-folders")
    add("--report", type=Path, metavar="FILE.html", help="the page (default: FOLDER_filter.html in the current folder)")
    add("--list", type=Path, metavar="FILE.json", help="what is to be left out, with the reasons")
    add("--in_json", type=Path, metavar="FILE.json", help="metadata of these images")
    add("--out_json", type=Path, metavar="FILE.json", help="where to write them without what is to be left out")
    add("--move_to", type=Path, metavar="FOLDER", help=f"move what is to be left out there, in sub-folders as here; "
        f"{JOURNAL} in it tells what and why")  # fmt: skip
    add("--checks", default=",".join(CHECKS), metavar="NAME,...", help="default: all of them")
    add("--report_only", default="text", metavar="NAME,...", help="checks whose findings stay in (default text)")
    add("--min_size", type=int, default=256, metavar="PIXELS", help="of the shorter side (default 256)")
    add("--min_bytes", type=int, default=100_000, metavar="BYTES", help="of files of 768x768 pixels and above (default "
        "100000)")  # fmt: skip
    add("--max_aspect", type=float, default=3.0, metavar="NUMBER", help="longer by shorter side (default 3)")
    add("--min_contrast", type=float, default=4.0, metavar="NUMBER", help="standard deviation of the brightness, of "
        "255 levels, below which a picture may be uniform (default 4)")  # fmt: skip
    add("--min_sharpness", type=float, default=40.0, metavar="NUMBER", help="variance of the Laplacian (default 40)")
    add("--min_letters", type=int, default=6, metavar="N", help="spots like letters in a row (default 6)")
    return parser
