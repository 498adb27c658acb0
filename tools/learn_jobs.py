"""The single runs of `learn.py`: a method, a concept and a seed, from the command line to the scores."""

from __future__ import annotations

import logging
import shutil
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from learn_concepts import Concept, reg_prompts, write_dataset
from learn_methods import BATCH, LORA_RANK, Method, Place, arguments
from learn_scores import GUIDANCE, SAMPLER, STEPS, Scores, load, score
from safetensors import safe_open

from sd_train.__main__ import main as sd_train
from sd_train.build import quiet_libraries
from sd_train.errors import RunError

REG_IMAGES = 3
"""Of each prompt."""


@dataclass(frozen=True)
class Job:
    """One run."""

    method: Method
    concept: Concept
    seed: int
    folder: Path
    """Of all runs."""

    @property
    def place(self) -> Path:
        """What the run leaves."""
        name = "-".join([self.method.name.replace(", ", "-").replace(" ", "_"), self.concept.word, str(self.seed)])
        return self.folder / "runs" / name


@dataclass(frozen=True)
class Result:
    """What became of a run."""

    method: str
    concept: str
    seed: int
    updates: int
    seconds: float
    """Of the training, from the command line to the saved file."""
    bytes: int
    """Of the trained file."""
    tensors: dict[str, list[int]]
    """What an embedding file holds, by name; {} for other files."""
    scores: Scores

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


def start_worker() -> None:
    """What a process does once, before its first run."""
    torch.set_num_threads(1)
    quiet_libraries()
    # The trainer installs a handler only where there is none, and the first run's log is closed before the second.
    if logging.lastResort is not None and not logging.getLogger().handlers:
        logging.getLogger().addHandler(logging.lastResort)


def dataset_folder(folder: Path, concept: Concept) -> Path:
    """Where the pictures and dataset files of a concept lie."""
    return folder / "concepts" / concept.word


def diffusers_folder(folder: Path) -> Path:
    """The base model in diffusers' layout."""
    return folder / "base_model"


def prepare(model: Path, concept: Concept, folder: Path, with_reg: bool) -> None:
    """Draw the training pictures of a concept and, if they are used, its regularisation images."""
    place = dataset_folder(folder, concept)
    place.mkdir(parents=True, exist_ok=True)
    folders = {}
    for number, prompt in enumerate(reg_prompts(concept) if with_reg else ()):
        drawn = f"--num_images {REG_IMAGES} --batch_size {REG_IMAGES} --sampler {SAMPLER} --width 64 --height 64"
        drawn += f" --steps {STEPS} --scale {GUIDANCE}"
        chosen = ("--pretrained_model_name_or_path", str(model), "--class_prompt", prompt)
        folders[prompt] = place / "reg" / str(number)
        _run(["make_reg_images", *chosen, "--output_dir", str(folders[prompt]), *drawn.split()], place / "reg.log")
    write_dataset(concept, place, folders, BATCH)


def convert(model: Path, folder: Path) -> None:
    """Write the base model in diffusers' layout, in full precision."""
    argv = ["convert", str(model), str(diffusers_folder(folder)), "--overwrite", "--save_precision", "float"]
    _run(argv, folder / "convert.log")


def run_job(job: Job, model: Path) -> Result:
    """Train, draw and judge."""
    job.place.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    file = _train(job, model)
    seconds = time.monotonic() - began
    size, tensors = (0, {}) if file is None else (file.stat().st_size, _tensors(job, file))
    scores, shown = score(load(model, job.method, job.concept, file), job.concept)
    np.save(job.place / "asked.npy", shown)
    # Whole models of a hundred runs would fill the disk.
    shutil.rmtree(job.place / "out", ignore_errors=True)
    named = (job.method.name, job.concept.name, job.seed)
    return Result(*named, job.method.updates, seconds, size, tensors, scores)


def _train(job: Job, model: Path) -> Path | None:
    """The trained file; None for the base model."""
    method, dataset, output = job.method, dataset_folder(job.folder, job.concept), job.place / "out"
    file = output / f"{job.concept.word}.safetensors"
    if method.command == "diffusers":
        output.mkdir(parents=True, exist_ok=True)
        numbers = {"rank": LORA_RANK, "rate": method.rate, "updates": method.updates, "batch": BATCH, "seed": job.seed}
        with (job.place / "log.txt").open("w") as log, redirect_stdout(log), redirect_stderr(log):
            # peft is needed for nothing else.
            from learn_bare import train_bare

            train_bare(diffusers_folder(job.folder), dataset / "pictures", file, numbers)
    elif method.command:
        _run(arguments(method, job.concept, job.seed, Place(model, dataset, output)), job.place / "log.txt")
    return file if method.command else None


def _run(argv: list[str], log: Path) -> None:
    """Run a command of `sd-train` in this process, with its words in a file.

    Raises:
        RunError: if it ends with an error.
    """
    with log.open("w", encoding="utf-8") as words, redirect_stdout(words), redirect_stderr(words):
        code = sd_train(argv)
    if code:
        last = "\n".join(log.read_text(encoding="utf-8").strip().splitlines()[-5:])
        raise RunError(f"sd-train {' '.join(argv)} ended with {code}; {log} ends so:\n{last}")


def _tensors(job: Job, file: Path) -> dict[str, list[int]]:
    if job.method.file_kind != "embedding":
        return {}
    with safe_open(file, "pt") as opened:
        return {name: list(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
