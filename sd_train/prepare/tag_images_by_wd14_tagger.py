"""`sd-train tag_images_by_wd14_tagger`: tags of images, by WD14 and its like, in text files beside them or metadata."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from sd_train.config.textfile import printable
from sd_train.errors import ConfigError, DataError, Problems
from sd_train.files import probe_folder
from sd_train.prepare.arguments import Parser, check_images_folder, check_words, extension_of
from sd_train.prepare.describing import Troubles, check_numbers, default_workers, opened_ahead
from sd_train.prepare.listing import find_images
from sd_train.prepare.tag_output import TagFile, TagOutput, TextFiles
from sd_train.prepare.tag_words import CHOSEN, Category, Chosen, Speller, TagOptions, read_replacement, split_list
from sd_train.prepare.taggers import DEFAULT_TAGGER, PUBLISHED, Tagger, find_tagger

_PUBLISHED = "\n".join(f"  {name}" for name in PUBLISHED)
_EPILOG = f"""Images that have tags already are left out, so that an interrupted command is simply given again;
--overwrite tags them anew, --append_tags adds to what they have. A broken image is named and left out, and the exit
code is then 3.

Tags stand in the order general, character, copyright, artist, meta, model, each in the tagger's own order. Tags that
are given to an option may be written with blanks or underscores.

--repo_id is a hub id, a folder or an .onnx file. Beside the model lies its list of tags: selected_tags.csv (WD14),
tags.txt (DeepDanbooru) or tag_mapping.json (cl_tagger). On the hub:
{_PUBLISHED}

For instance:
  sd-train tag_images_by_wd14_tagger photos --recursive --remove_underscore --thresh 0.4 --batch_size 8"""


def main(argv: Sequence[str]) -> int:
    """Tag what is not tagged; 0, or 3 if images were left out.

    Raises:
        UserError: if the options are wrong, the tagger cannot be used or the disk refuses.
    """
    given = _parser().parse_args(list(argv))
    options = _read_options(given)
    images = find_images(given.train_data_dir, given.recursive)
    troubles = Troubles()
    output: TagOutput = (
        TextFiles(images, extension_of(given.caption_extension), troubles) if given.output_path is None
        else TagFile(given.output_path, images, given.train_data_dir)
    )  # fmt: skip
    missing = output.missing(again=given.overwrite or given.append_tags)
    counts = Counter[str]()
    if missing:
        if given.output_path is not None:
            # Rather now than when all images are tagged.
            probe_folder(given.output_path.absolute().parent, "--output_path")
        tagger = Tagger(find_tagger(given.repo_id, given.model_dir, given.force_download))
        try:
            counts = _tag(given, Speller(tagger.labels, options), tagger, missing, output, troubles)
        finally:
            # What was tagged before an error or Ctrl-C is kept.
            output.close()
    if given.frequency_tags:
        print("Tag frequencies:")
        for tag, count in sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])):
            print(f"{tag}: {count}")
    troubles.summary(len(missing), len(images), "tagged")
    return troubles.exit_code


def _tag(
    given: argparse.Namespace, speller: Speller, tagger: Tagger, missing: list[Path], output: TagOutput,
    troubles: Troubles,
) -> Counter[str]:  # fmt: skip
    """Tag the `missing` images into `output`; how many have each tag."""
    from sd_train.data.images import decode

    counts, batch_size = Counter[str](), given.batch_size
    if tagger.batch_size is not None and tagger.batch_size != batch_size:
        print(f"note: the tagger takes {tagger.batch_size} images at once, whatever --batch_size says", file=sys.stderr)
        batch_size = tagger.batch_size
    workers = given.max_data_loader_n_workers or default_workers()

    def see(image: Path) -> tuple[NDArray[np.float32], tuple[int, int]]:
        decoded = decode(image)
        return tagger.see(decoded.pixels), decoded.size

    with tqdm(total=len(missing), desc="tagging", unit="image", file=sys.stderr, dynamic_ncols=True) as bar:
        for batch in opened_ahead(missing, see, batch_size, workers, troubles):
            found = tagger([square for _, (square, _) in batch])
            for (place, (_, size)), row in zip(batch, found, strict=True):
                image, chosen = missing[place], speller.choose(row)
                if given.debug:
                    _tell(image, chosen)
                try:
                    before = output.existing(image) if given.append_tags else ""
                except DataError as problem:
                    troubles.tell(image, str(problem))
                    continue
                if output.put(image, speller.append(before, chosen.tags), size):
                    counts.update(chosen.tags)
            bar.update(len(batch))
    return counts


def _tell(image: Path, chosen: Chosen) -> None:
    print(f"{printable(str(image))}:")
    for category, tags in chosen.by_category.items():
        if tags:
            print(f"  {category}: " + ", ".join(f"{tag} {probability:.3f}" for tag, probability in tags))


def _read_options(given: argparse.Namespace) -> TagOptions:
    """What the options say about tags.

    Raises:
        ConfigError: with every problem, also those of other options.
    """
    problems = Problems()
    check_images_folder(given.train_data_dir, problems)
    thresholds: dict[Category, float] = {}
    for name in ("thresh", *(f"{category}_threshold" for category in CHOSEN)):
        value = getattr(given, name)
        if value is not None and not 0 <= value <= 1:
            problems.add(f"--{name}", value, "is no probability", f"write 0 to 1, e.g. --{name} 0.35")
    for category in CHOSEN:
        own = getattr(given, f"{category}_threshold")
        thresholds[category] = given.thresh if own is None else own
    check_numbers(given, problems)
    for name in ("rating", "quality"):
        if getattr(given, f"use_{name}_tags") and getattr(given, f"use_{name}_tags_as_last_tag"):
            problems.add(f"--use_{name}_tags", None, "contradicts that the tag stands last", "give one of them")
    if given.overwrite and given.append_tags:
        problems.add("--overwrite", None, "contradicts --append_tags", "give one of them")
    if not given.caption_separator:
        problems.add("--caption_separator", "", "separates nothing", "write for example --caption_separator ', '")
    if given.output_path is not None and given.output_path.suffix.lower() not in (".json", ".jsonl"):
        way_out = "write for example --output_path tags.json"
        problems.add("--output_path", str(given.output_path), "must end in .json or .jsonl", way_out)
    elif given.output_path is not None and given.output_path.is_dir():
        problems.add("--output_path", str(given.output_path), "is a folder", "give a file's name, such as tags.json")
    for option in ("caption_separator", "tag_replacement"):
        check_words(f"--{option}", getattr(given, option), problems)
    replacement = read_replacement(given.tag_replacement, problems)
    problems.raise_if_any(ConfigError)
    return TagOptions(
        thresholds=thresholds,
        separator=given.caption_separator,
        remove_underscore=given.remove_underscore,
        undesired=frozenset(split_list(given.undesired_tags, given.caption_separator)),
        first=split_list(given.always_first_tags, given.caption_separator),
        replacement=replacement,
        expand_characters=given.character_tag_expand,
        characters_first=given.character_tags_first,
        rating="first" if given.use_rating_tags else "last" if given.use_rating_tags_as_last_tag else None,
        quality="first" if given.use_quality_tags else "last" if given.use_quality_tags_as_last_tag else None,
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser("tag_images_by_wd14_tagger", "Write the tags that a tagger finds in images beside them.")
    parser.epilog = _EPILOG
    add = parser.add_argument
    add("train_data_dir", type=Path, metavar="FOLDER", help="the folder of images")
    add("--recursive", action="store_true", help="its sub-folders too")
    add("--caption_extension", "--caption_extention", metavar="EXTENSION", default=".txt",
        help="of the text files (default .txt)")  # fmt: skip
    add("--output_path", metavar="FILE", type=Path, help="write tags and sizes into this .json or .jsonl file instead, "
        "by the images' absolute paths, or as it names them already; what it holds is kept")  # fmt: skip
    add("--overwrite", action="store_true", help="tag images anew that have tags")
    add("--append_tags", action="store_true", help="keep the tags that are there, and add those that are new")
    add("--batch_size", metavar="N", type=int, default=1, help="images at once (default 1)")
    add("--max_data_loader_n_workers", metavar="N", type=int, help="threads that open images (default: up to 4)")
    add("--debug", action="store_true", help="print the tags of each image with their probabilities")
    model = parser.add_argument_group("the tagger")
    add = model.add_argument
    add("--repo_id", metavar="TAGGER", default=DEFAULT_TAGGER, help=f"hub id, folder or .onnx file (default "
        f"{DEFAULT_TAGGER})")  # fmt: skip
    add("--model_dir", metavar="FOLDER", type=Path, default=Path("wd14_tagger_model"), help="where taggers are looked "
        "for before the hub's own cache, as sd-scripts keeps them: FOLDER/owner_name (default wd14_tagger_model)"
        )  # fmt: skip
    add("--force_download", action="store_true", help="download the tagger anew")
    add("--onnx", action="store_true", help="as it is without: taggers always run in onnxruntime")
    chosen = parser.add_argument_group("which tags")
    add = chosen.add_argument
    add("--thresh", metavar="P", type=float, default=0.35, help="least probability of a tag (default 0.35)")
    for category in CHOSEN:
        add(f"--{category}_threshold", metavar="P", type=float, help=f"of {category} tags (default: --thresh)")
    add("--undesired_tags", metavar="TAGS", help="tags to leave out, separated as in the text")
    add("--use_rating_tags", action="store_true", help="the likeliest rating before the other tags")
    add("--use_rating_tags_as_last_tag", action="store_true", help="the likeliest rating behind them")
    add("--use_quality_tags", action="store_true", help="the likeliest quality before the other tags (cl_tagger)")
    add("--use_quality_tags_as_last_tag", action="store_true", help="the likeliest quality behind them")
    written = parser.add_argument_group("how they are written")
    add = written.add_argument
    add("--caption_separator", metavar="TEXT", default=", ", help="between tags (default ', ')")
    add("--remove_underscore", action="store_true", help="blanks for underscores, but in emoticons such as ^_^")
    add("--tag_replacement", metavar="OLD,NEW;OLD,NEW", help=r"tags to write otherwise; \, and \; in tags with these")
    add("--character_tag_expand", action="store_true", help="name_(series) as two tags: name, series")
    add("--character_tags_first", action="store_true", help="characters before general tags")
    add("--always_first_tags", metavar="TAGS", help="tags that stand first, in this order, where they were found")
    add("--frequency_tags", action="store_true", help="print how many of the images that were tagged have each tag "
        "(caption stats counts all)")  # fmt: skip
    return parser
