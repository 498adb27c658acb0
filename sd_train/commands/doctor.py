"""`sd-train doctor DATASET.toml`: what is wrong with a dataset, as one page with pictures."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from sd_train.errors import ConfigError
from sd_train.files import write_text

_LEAST_STEP = 32
"""Of `bucket_reso_steps`: that of SDXL."""

USAGE = """usage: sd-train doctor [DATASET.toml] [--output FILE.html] [--json] [OPTIONS OF THE RUN]

Open every file of a dataset and write down what is wrong with it: broken and disguised files, copies, missing, cut and
garbled captions, masks, crops, pictures that are never shown. Nothing is changed.

  DATASET.toml        dataset file (.toml or .json), as for --dataset_config
  --output FILE.html  the page (default: DATASET_doctor.html in the current folder); it holds its pictures, needs no
                      network and no server
  --json              print everything as JSON in place of the summary
  any option of sd-train train_network, above all --resolution, --train_data_dir, --reg_data_dir, --in_json,
                      --max_token_length, --allow_missing_captions, --masked_loss, --config_file

The exit code is 0 if there is no error, whatever else there is to improve; 3 if there is an error (a run would stop, or
would learn what is not meant); 2 if the options themselves are wrong."""


def main(argv: Sequence[str]) -> int:
    """Examine the dataset that `argv` names, write the page, print the summary or JSON; 3 if there is an error.

    Raises:
        ConfigError: if the options are wrong.
        RunError: if the page cannot be written.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(USAGE)
        return 0
    parser = argparse.ArgumentParser("sd-train doctor", allow_abbrev=False, add_help=False)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--json", action="store_true")
    words = list(argv)
    dataset = words.pop(0) if words and not words[0].startswith("-") else None
    given, rest = parser.parse_known_args(words)
    if dataset is not None:
        rest = ["--dataset_config", dataset, *rest]
    # Neither is looked at.
    stand_ins = ["--pretrained_model_name_or_path", ".", "--output_dir", "."]
    from sd_train.config.parser import load_run_config

    loaded = load_run_config("train_network", [*stand_ins, *rest])
    from sd_train.data.config import load_datasets
    from sd_train.data.index import IndexOptions
    from sd_train.data.request import dataset_request
    from sd_train.doctor.diagnose import diagnose, unreadable
    from sd_train.doctor.finding import SEVERITIES
    from sd_train.doctor.page import About, make_page
    from sd_train.doctor.report import as_json, summary
    from sd_train.plan_data import run_options

    config = loaded.config
    limit = config.model.max_token_length or 75
    name = config.dataset.dataset_config or config.dataset.in_json or config.dataset.train_data_dir or Path("dataset")
    # Which command will train it is not known, so what any of them takes is right.
    request = replace(dataset_request("doctor", run_options(config)), masked_loss=True, step_multiple=_LEAST_STEP)
    try:
        datasets = load_datasets(request)
    except ConfigError as error:
        diagnosis = unreadable(error, limit)
    else:
        if not config.dataset.masked_loss:
            datasets = tuple(replace(dataset, warnings=_without_masked_loss(dataset.warnings)) for dataset in datasets)
        options = IndexOptions(
            allow_missing_captions=config.dataset.allow_missing_captions,
            prior_loss_weight=config.training.prior_loss_weight,
            seed=config.training.seed or 0,
            skip_broken_images=config.dataset.skip_broken_images,
            cache_dir=config.dataset.cache_dir,
        )
        diagnosis = diagnose(datasets, options, limit, _progress())
    output: Path = given.output or Path(f"{name.stem}_doctor.html")
    write_text(output, make_page(About(f"Doctor: {name.name}"), diagnosis))
    if given.json:
        print(json.dumps(as_json(diagnosis), indent=2, ensure_ascii=False))
    else:
        for line in summary(diagnosis):
            print(line)
        numbers = {each: diagnosis.count(each) for each in SEVERITIES}
        counts = ", ".join(f"{number} {each}{'' if number == 1 else 's'}" for each, number in numbers.items())
        print(f"{counts}; with pictures: {output.resolve()}")
    return 3 if diagnosis.count("error") else 0


def _without_masked_loss(warnings: Sequence[str]) -> tuple[str, ...]:
    # It was switched on here.
    return tuple(text for text in warnings if not text.startswith("--masked_loss"))


def _progress() -> Callable[[int, int], object]:
    """Shows how many files have been opened, where someone looks on."""
    if not sys.stderr.isatty():
        return lambda seen, of: None
    from tqdm import tqdm

    bar = tqdm[NoReturn](desc="opening images", unit="image")

    def show(seen: int, of: int) -> None:
        bar.total = of
        bar.update()
        if seen == of:
            bar.close()

    return show
