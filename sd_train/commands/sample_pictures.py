"""What `sd-train sample` does once its options are read: load, draw, save."""

from __future__ import annotations

import logging
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sd_train import __version__
from sd_train.build import quiet_libraries
from sd_train.commands.sample import ChosenLora, SampleOptions
from sd_train.data.words import Words
from sd_train.device import Device, open_device
from sd_train.drawing import Picture, draw_pixels, make_grid, parameters_text, save_picture, to_picture
from sd_train.errors import ModelError, RunError, UserError
from sd_train.families.base import Family
from sd_train.families.embeddings import Embedding, install_embeddings, read_embeddings
from sd_train.families.parts import ModelParts, ModelRequest, read_model
from sd_train.families.registry import make_family
from sd_train.families.sources import Part
from sd_train.families.text import TextOptions
from sd_train.files import sha256
from sd_train.lora_files.merging import Weighted, merge_into
from sd_train.lora_files.reading import LoraFile, open_lora
from sd_train.prompts import Prompt
from sd_train.samplers import canonical_sampler

logger = logging.getLogger(__name__)

SEEDS = 2**64

_NUMBERED = re.compile(r"(\d{5,})-\d+\.png")
_GRIDS = re.compile(r"grid-(\d{4,})\.png")
_IN_PROMPT = re.compile(r"<(?:lora|lyco|hypernet):[^>]*>")
_TIMESTEP_SAMPLERS = ("ddim", "pndm")


@dataclass(frozen=True)
class Task:
    """One picture."""

    prompt: Prompt
    seed: int


@dataclass(frozen=True)
class Described:
    """What the pictures' texts say of the files that they were drawn with, as A1111's web UI does."""

    options: SampleOptions
    embeddings: Sequence[Embedding]
    words: Words

    @cached_property
    def model(self) -> dict[str, object]:
        """Name and hash of the model; a folder has no hash."""
        path = Path(self.options.model)
        hashed = sha256(path)[:10] if path.is_file() else None
        vae = None if self.options.vae is None else Path(self.options.vae)
        return {
            "Model hash": hashed,
            "Model": path.stem if path.is_file() else path.name,
            "VAE hash": sha256(vae)[:10] if vae is not None and vae.is_file() else None,
            "VAE": None if vae is None else vae.name,
        }

    @cached_property
    def loras(self) -> str | None:
        """`name: hash` of every LoRA."""
        return ", ".join(f"{lora.path.stem}: {_lora_hash(lora.path)[:12]}" for lora in self.options.loras) or None

    @cached_property
    def embedding_hashes(self) -> dict[str, str]:
        """By what stands for it in prompts, in lower case: `name: hash`."""
        return {
            name.lower(): f"{each.path.stem}: {sha256(each.path)[:12]}"
            for each in self.embeddings
            for name in each.names
        }

    def text(self, task: Task) -> str:
        """The PNG's `parameters`."""
        prompt = task.prompt
        tags = "".join(f" <lora:{lora.path.stem}:{lora.multiplier:g}>" for lora in self.options.loras)
        names = dict.fromkeys([*self.words.used(prompt.text), *self.words.used(prompt.negative)])
        sampler = canonical_sampler(prompt.sampler or self.options.sampler)
        more = {
            # Without it A1111's DPM samplers take Karras' noise levels.
            "Schedule type": None if sampler in _TIMESTEP_SAMPLERS else "Uniform",
            **self.model,
            "Clip skip": self.options.clip_skip if (self.options.clip_skip or 1) > 1 else None,
            "RNG": "CPU",
            "Lora hashes": self.loras,
            "TI hashes": ", ".join(dict.fromkeys(self.embedding_hashes[name] for name in names)) or None,
            "Version": f"sd_train {__version__}",
        }
        return parameters_text(replace(prompt, text=(prompt.text + tags).strip()), sampler, task.seed, more)


def draw_all(options: SampleOptions) -> None:
    """Draw and save every picture and the grid; their paths go to standard output.

    Raises:
        UserError: if the model cannot be loaded, or no picture could be drawn.
    """
    quiet_libraries()
    device = open_device(options.mixed_precision)
    embeddings = [_called(each, options.words.get(each.path)) for each in read_embeddings(options.embeddings)]
    started = time.monotonic()
    say(f"loading {options.model}")
    try:
        with _in_our_words():
            family = load_model(options, device)
        family.to(device.device, device.weight_dtype)
        words = install_embeddings(embeddings, family)
    except (torch.OutOfMemoryError, MemoryError) as problem:
        raise RunError(reason_of(problem)) from None
    say(f"loaded in {time.monotonic() - started:.1f} s; on {device.device}")
    _tell_idle(options, embeddings, words)
    tasks = _tasks(options, family)
    described = Described(options, embeddings, words)
    number = _next_number(options.output_dir, _NUMBERED)
    drawn: list[Picture | None] = []
    failed: list[str] = []
    with progress(sum(task.prompt.steps for task in tasks)) as (show, on_step):
        for place, task in enumerate(tasks):
            began = time.monotonic()
            path = options.output_dir / f"{number:05d}-{task.seed}.png"
            try:
                picture = to_picture(
                    draw_pixels(family, task.prompt, options.sampler, task.seed, device.autocast, on_step)
                )
                save_picture(path, picture, described.text(task))
            except (UserError, RuntimeError, ValueError, MemoryError) as problem:
                # Memory, a sampler that cannot so few steps, a disk: the other pictures may still come out.
                failed.append(reason_of(problem))
                drawn.append(None)
                show(f"{place + 1} of {len(tasks)}: not drawn ({failed[-1]})")
                continue
            drawn.append(picture)
            number += 1
            took = time.monotonic() - began
            show(f"{place + 1} of {len(tasks)}: {path.name} in {took:.1f} s: {_short(task.prompt.text)}")
            print(path, flush=True)
    if len(failed) == len(tasks):
        raise RunError(f"no picture could be drawn: {failed[0]}")
    if options.grid:
        _save_grid(options, drawn, described.text(tasks[0]))
    if failed:
        say(f"warning: {len(failed)} of {len(tasks)} pictures could not be drawn ({failed[0]})")


def _called(embedding: Embedding, word: str | None) -> Embedding:
    """`embedding`, which prompts also call `word`."""
    return embedding if word is None else replace(embedding, names=tuple(dict.fromkeys((*embedding.names, word))))


def reason_of(problem: Exception) -> str:
    """What went wrong, in a line."""
    if isinstance(problem, torch.OutOfMemoryError | MemoryError):
        way_out = "use --mixed_precision fp16 or bf16, or smaller pictures, and close other programs"
        return f"out of memory ({str(problem).split('. ')[0]}); {way_out}"
    return str(problem).strip().split("\n")[0] or type(problem).__name__


def say(text: str) -> None:
    """A line on standard error."""
    print(text, file=sys.stderr, flush=True)


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:59]}…"


def request_of(options: SampleOptions) -> ModelRequest:
    """Which model is asked for."""
    return ModelRequest(
        source=options.model,
        v2=options.v2,
        v_parameterization=options.v_parameterization,
        sdxl=options.sdxl,
        vae=options.vae,
    )


def load_model(options: SampleOptions, device: Device) -> Family:
    """The model with the LoRAs' changes added to its weights.

    Raises:
        ModelError: if there is none, or a LoRA does not fit it.
    """
    parts = read_model(request_of(options))
    family = make_family(_merged(parts, options.loras), device.weight_dtype)
    family.configure(TextOptions(clip_skip=options.clip_skip))
    return family


@contextmanager
def _in_our_words() -> Iterator[None]:
    """The trainer's options as ours, in what is wrong with the model."""
    try:
        yield
    except ModelError as problem:
        told = [text.replace("--pretrained_model_name_or_path", "MODEL") for text in problem.problems]
        raise ModelError(*told) from None


def _merged(parts: ModelParts, chosen: Sequence[ChosenLora]) -> ModelParts:
    if not chosen:
        return parts
    loras = [Weighted(_open(lora, parts.family), lora.multiplier) for lora in chosen]
    networks = {role: part.tensors for role, part in parts.parts.items() if role != "vae"}
    merged = merge_into(networks, loras)
    changed = {role: Part(parts.parts[role].config, source) for role, source in merged.items()}
    return replace(parts, parts={**parts.parts, **changed})


def _open(lora: ChosenLora, family: str) -> LoraFile:
    found = open_lora(lora.path, family)
    if left_out := [*found.unmapped, *(f"{place.role}.{place.path}" for place in found.incomplete())]:
        logger.warning("%s: %d keys are not understood and left out, e.g. %s", lora.path, len(left_out), left_out[0])
    return found


def _lora_hash(path: Path) -> str:
    """SHA-256 of the tensors alone where the format allows it, which tells a LoRA whatever its metadata."""
    offset = 0
    if path.suffix.lower() == ".safetensors":
        with path.open("rb") as file:
            offset = 8 + int.from_bytes(file.read(8), "little")
    return sha256(path, offset)


def _tell_idle(options: SampleOptions, embeddings: Sequence[Embedding], words: Words) -> None:
    """Warn of what has no effect."""
    texts = [text for prompt in options.prompts for text in (prompt.text, prompt.negative)]
    used = {name for text in texts for name in words.used(text)}
    for embedding in embeddings:
        # The second file of diffusers' pairs is called by the first one's name.
        if not {name.lower() for name in embedding.names} & used and not embedding.path.stem.endswith("_2"):
            logger.warning("%s: no prompt calls it; write %s where it is meant", embedding.path, embedding.names[-1])
    if tags := [tag for text in texts for tag in _IN_PROMPT.findall(text)]:
        logger.warning("%s is read as text in prompts; give the file with --lora FILE:MULTIPLIER", tags[0])


def _tasks(options: SampleOptions, family: Family) -> list[Task]:
    """Every picture, prompt by prompt; seeds count up from the prompt's, as in A1111."""
    tasks = []
    config: Any = family.networks["unet"].config
    assert family.latent is not None
    usual = int(config["sample_size"] or 64) * family.latent.factor
    for prompt in options.prompts:
        sized = replace(prompt, width=prompt.width or usual, height=prompt.height or usual)
        # 32 bits, as other programs draw them.
        first = secrets.randbelow(2**32) if prompt.seed is None else prompt.seed
        tasks += [Task(sized, (first + number) % SEEDS) for number in range(options.count)]
    return tasks


@contextmanager
def progress(steps: int) -> Iterator[tuple[Callable[[str], None], Callable[[], object]]]:
    """What shows a line, and what is called after each of `steps`: a bar where someone looks on."""
    if not sys.stderr.isatty():
        yield say, lambda: None
        return
    with tqdm(total=steps, unit="step", leave=False) as bar:
        yield bar.write, bar.update


def _next_number(folder: Path, pattern: re.Pattern[str]) -> int:
    """One more than the highest number of the files in `folder` whose names fit `pattern`."""
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    return 1 + max((int(found[1]) for name in names if (found := pattern.fullmatch(name))), default=-1)


def _save_grid(options: SampleOptions, drawn: Sequence[Picture | None], text: str) -> None:
    columns = options.count if options.count > 1 and len(options.prompts) > 1 else ceil(sqrt(len(drawn)))
    path = options.output_dir / f"grid-{_next_number(options.output_dir, _GRIDS):04d}.png"
    save_picture(path, make_grid(drawn, columns), text)
    print(path)
