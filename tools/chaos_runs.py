"""The trainings that `chaos.py` disturbs: processes of their own, what they leave undisturbed, and what differs."""

from __future__ import annotations

import ast
import contextlib
import importlib
import os
import shutil
import sys
import tomllib
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from chaos_faults import Faults, Moment

from sd_train.names import FileNames
from sd_train.state import MANIFEST, read_manifest

UPDATES = 5
EVERY = "--save_every_n_steps 2 --save_every_n_epochs 1 --save_last_n_steps 2"
LORA = "--network_dim 1 --network_train_unet_only --learning_rate 1e-3 --use_ema"
WHOLE = "--learning_rate 1e-4 --stop_text_encoder_training -1 --save_model_as diffusers"
KINDS = {"lora": ("train_network", LORA, ".safetensors"), "whole": ("train_db", WHOLE, "")}
"""Command, options and the ending of its files, of what is trained."""
FAILED = 99


@dataclass
class Kind:
    """One training, and what it gives when nobody disturbs it."""

    name: str
    command: str
    words: list[str]
    """Without the output folder."""
    extension: str
    reference: Path
    """The folder of a run that saves after every update."""
    moments: list[Moment] = field(default_factory=list)
    """Of a run from the beginning."""
    moments_back: list[Moment] = field(default_factory=list)
    """Of one that goes on after update 1 where later saves lie already, and replaces them."""

    def names(self, folder: Path) -> FileNames:
        return FileNames(folder, "it", self.extension)


def in_child(action: Callable[[], int], log: Path) -> int:
    """Run `action` in a process of its own; its exit code, or minus the signal that ended it."""
    sys.stdout.flush()
    sys.stderr.flush()
    if process := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    code = FAILED
    try:
        with into(log):
            code = action()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


@contextlib.contextmanager
def into(log: Path) -> Iterator[None]:
    """What this process says goes into a file meanwhile, whoever says it."""
    kept = [os.dup(1), os.dup(2)]
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        for target in (1, 2):
            os.dup2(file, target)
        yield
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, target in zip(kept, (1, 2), strict=True):
            os.dup2(descriptor, target)
            os.close(descriptor)
        os.close(file)


def run(kind: Kind, output: Path, more: str) -> int:
    """Train, in this process."""
    main = importlib.import_module(f"sd_train.{kind.command}").main
    return int(main([*kind.words, "--output_dir", str(output), *more.split()]))


def trained(kind: Kind, output: Path, more: str, faults: Faults) -> int:
    """Train, in this process, with faults from here on."""
    faults.install()
    return run(kind, output, more)


def save_small_model(path: Path) -> None:
    """Write a tiny model with two levels instead of four: a run takes half the time with it."""
    from sd_train.demo.tiny_model import make_tiny_parts, tiny_configs
    from sd_train.families.saving import save_model

    configs = tiny_configs("sd1")
    configs["unet"] |= {
        "block_out_channels": [32, 64], "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    }  # fmt: skip
    configs["text_encoder"] |= {"num_hidden_layers": 1}
    save_model(path, make_tiny_parts("sd1", 0, configs), "safetensors", torch.float16, {})


def prepare(place: Path, name: str) -> Kind:
    """Train `name` undisturbed, and write down its moments."""
    model = place / "model.safetensors"
    if not model.exists():
        save_small_model(model)
    photos = Path(__file__).resolve().parents[1] / "sd_train" / "demo" / "photos"
    dataset = place / "dataset.toml"
    dataset.write_text(
        f'[general]\ncaption_extension = ".txt"\n[[datasets]]\nresolution = 64\nbatch_size = 2\n'
        f'[[datasets.subsets]]\nimage_dir = "{photos}"\n', encoding="utf-8",
    )  # fmt: skip
    command, options, extension = KINDS[name]
    words = f"""--pretrained_model_name_or_path {model} --dataset_config {dataset} --output_name it --seed 3 {options}
        --max_train_steps {UPDATES} --max_data_loader_n_workers 0 --save_state --cache_latents_to_disk
        --cache_dir {place / "cache"}""".split()
    kind = Kind(name, command, words, extension, place / f"{name}-reference")
    # In this process, so that what a training imports is there in all that come of it.
    with into(place / "log"):
        if run(kind, kind.reference, "--save_every_n_steps 1 --save_every_n_epochs 1"):
            raise SystemExit(f"the undisturbed run of {name} failed")
    kind.moments = _undisturbed(kind, place / f"{name}-whole", EVERY, place)
    back = copy_saves(kind, place / f"{name}-back")
    more = f"{EVERY} --resume {kind.names(back).state('it-step00000001')}"
    kind.moments_back = _undisturbed(kind, back, more, place)
    return kind


def _undisturbed(kind: Kind, output: Path, more: str, place: Path) -> list[Moment]:
    written, log = place / "moments", place / "log"

    def action() -> int:
        passed = list[Moment]()
        code = trained(kind, output, more, Faults(output, passed=passed))
        written.write_text(repr([(m.place, m.number, m.step, m.saving) for m in passed]), encoding="utf-8")
        return code

    if code := in_child(action, log):
        raise SystemExit(f"the undisturbed run of {kind.name} ended with {code}:\n{log.read_text(errors='replace')}")
    return [Moment(*moment) for moment in ast.literal_eval(written.read_text(encoding="utf-8"))]


def copy_saves(kind: Kind, output: Path, steps: Sequence[int] = range(1, UPDATES)) -> Path:
    """A folder as a run leaves it that was killed after the last of `steps`, with the saves of these."""
    output.mkdir()
    for step in steps:
        for path in kind.reference.glob(f"it-step{step:08d}*"):
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, output / path.name)
    return output


def differences(kind: Kind, folder: Path) -> list[str]:
    """What is visible in `folder` and not whole: broken, or other bytes than the undisturbed run's."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        try:
            if path.name == "it-config.toml":
                tomllib.loads(path.read_text(encoding="utf-8"))
                continue
            if path.name.endswith("-state"):
                read_manifest(path)
            files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
            theirs = kind.reference / path.name
            count = sum(file.is_file() for file in theirs.rglob("*")) if path.is_dir() else 1
            if len(files) != count:
                found.append(f"{path.name}: {len(files)} files, not {count}")
            for file in files:
                # Clocks, options and paths are in these.
                if file.name in (MANIFEST, "config.toml", "progress.json"):
                    continue
                if file.read_bytes() != (kind.reference / file.relative_to(folder)).read_bytes():
                    found.append(f"{file.relative_to(folder)}: other bytes")
        except Exception as problem:
            found.append(f"{path.name}: {type(problem).__name__}: {problem}")
    return found


def unfinished(kind: Kind, folder: Path) -> list[str]:
    """What a training that has ended should have left and has not, or the other way round."""
    found = [f"{path.name} is left" for path in folder.iterdir() if path.name.startswith(".")]
    names = kind.names(folder)
    wanted = [names.model("it"), names.state("it"), *([names.average("it")] if kind.name == "lora" else [])]
    return found + [f"{path.name} is missing" for path in wanted if not path.exists()]
