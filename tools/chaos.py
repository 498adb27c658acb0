"""`python tools/chaos.py --kills 200 --seed 0`: does a training survive what happens to it?

Trains a tiny LoRA or a tiny whole model again and again, each time in a process of its own that is killed, stopped,
refused room by its disk or given damaged states at a moment that the seed chooses. Every file that is visible then is
compared with that of a run which nobody disturbed, byte by byte; the training is resumed with `--resume latest` (or
begun anew where nothing was saved), and must end in the same bytes. The wall clock is years wrong, each time another
way.
Prints what is not as it should be, and counts. Needs Linux; full disks are real ones (tmpfs) where they may be mounted.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import ctypes
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import tomllib
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Times are part of the files; so that two runs can give the same bytes they are those of one moment.
os.environ.setdefault("SOURCE_DATE_EPOCH", "1700000000")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from sd_train.names import FileNames
from sd_train.state import MANIFEST, read_manifest
from tools.chaos_faults import Action, Faults, Moment

UPDATES = 5
EVERY = "--save_every_n_steps 2 --save_every_n_epochs 1 --save_last_n_steps 2"
LORA = "--network_dim 1 --network_train_unet_only --learning_rate 1e-3 --use_ema"
WHOLE = "--learning_rate 1e-4 --stop_text_encoder_training -1 --save_model_as diffusers"
KINDS = {"lora": ("train_network", LORA, ".safetensors"), "whole": ("train_db", WHOLE, "")}
"""Command, options and the ending of its files, of what is trained."""
FAILED = 99
CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
MS_PRIVATE_EVERYWHERE = 0x44000


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
        faults = Faults(output)
        code = trained(kind, output, more, faults)
        written.write_text(repr([(m.place, m.number, m.step, m.saving) for m in faults.passed]), encoding="utf-8")
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


@dataclass
class Chaos:
    """Disturbs trainings and counts what becomes of them."""

    place: Path
    kinds: list[Kind]
    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def one(self, number: int, what: str) -> None:
        """Disturbance number `number`, a kind of its own for each `what`."""
        rng = random.Random(f"{self.seed} {what} {number}")
        kind = self.kinds[1] if rng.random() < 0.2 and len(self.kinds) > 1 else self.kinds[0]
        output, log = self.place / "out", self.place / "log"
        shutil.rmtree(output, ignore_errors=True)
        journal = self.place / "journal"
        journal.unlink(missing_ok=True)
        self.told = f"{what} {number} ({kind.name})"
        match what:
            case "damage":
                self._damaged(rng, kind, output, log)
            case "full":
                self._filled(rng, kind, output, log)
            case _:
                self._disturbed(rng, kind, what, output, log)

    def _disturbed(self, rng: random.Random, kind: Kind, what: str, output: Path, log: Path) -> None:
        back = rng.random() < 1 / 3
        moment = choose(rng, kind.moments_back if back else kind.moments)
        self.told += f" at {moment.place} #{moment.number}, update {moment.step}{', going back' if back else ''}"
        more = EVERY
        if back:
            copy_saves(kind, output)
            more += f" --resume {kind.names(output).state('it-step00000001')}"
        action: Action = {"kill": "kill", "stop": rng.choice(("term", "int", "int twice"))}.get(what) or rng.choice(
            ("no room", "bad disk")
        )
        present = {path.name for path in output.iterdir()} if back else set()
        faults = self._faults(rng, output, moment=moment, action=action, refusals=rng.randint(1, 4))
        code = in_child(lambda: trained(kind, output, more, faults), log)
        self.counts[f"{what}s"] += 1
        self.counts[f"{what}s after update 1"] += moment.step > 0
        self.counts[f"{what}s inside a save"] += moment.saving
        fine = {"kill": (-signal.SIGKILL,), "term": (0, -signal.SIGTERM), "int": (0, 130), "int twice": (0, 130),
                "no room": (0, 4), "bad disk": (0, 4)}[action]  # fmt: skip
        if code not in fine:
            self._problem(log, f"{action}: ended with {code}")
        self._go_on(rng, kind, what, output, log, present)

    def _go_on(self, rng: random.Random, kind: Kind, what: str, output: Path, log: Path, present: set[str]) -> None:
        """Look at what is there, resume, and compare."""
        output.mkdir(exist_ok=True)
        last = self._journal(present, output)
        for difference in differences(kind, output):
            self._problem(log, difference)
        names = kind.names(output)
        if (names.state("it")).exists() and not unfinished(kind, output):
            self.counts[f"{what}s: had ended"] += 1
        else:
            more = EVERY
            if last is not None:
                more += " --resume latest"
            elif names.existing():
                more += " --overwrite"
            if last == "it-state":
                # All that was left to do is to put away what the end has left.
                self.counts[f"{what}s: had ended"] += 1
                names.tidy()
            else:
                self.counts[f"{what}s: begun anew" if last is None else f"{what}s: resumed"] += 1
                code = in_child(lambda: trained(kind, output, more, self._faults(rng, output)), log)
                text = log.read_text(errors="replace")
                if code or (last is not None and f"resumed {names.folder / last} at step" not in text):
                    self._problem(log, f"{more}: ended with {code}, the last whole state was {last}")
        wrong = [*differences(kind, output), *unfinished(kind, output)]
        for difference in wrong:
            self._problem(log, f"in the end {difference}")
        self.counts[f"{what}s: equal to the bit in the end"] += not wrong

    def _journal(self, present: set[str], output: Path) -> str | None:
        """Check that nothing is gone; the name of the state that was sealed last."""
        journal = self.place / "journal"
        lines = journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []
        order = sorted(name for name in present if name.endswith("-state"))
        for line in lines:
            sign, _, name = line.partition(" ")
            order = [other for other in order if other != name]
            if sign == "+":
                present.add(name)
                order += [name] * name.endswith("-state")
            else:
                present.discard(name)
        # What stood between two renames is put back at the next start; the line was written before the first of them.
        for old in output.glob(".*.old"):
            name = old.name[1:].rpartition(".old")[0].rpartition(".")[0]
            if not (output / name).exists() and name.endswith("-state"):
                states = [*order, name]
                order = [path.name for path in self._by_order(output, states)]
        for name in present:
            if not (output / name).exists():
                self.counts["bytes lost"] += 1
                self.problems.append(f"{self.told}: {name} is lost")
        # A state may have become visible right before its line was to be written.
        seen = [path.name for path in output.glob("*-state")]
        late = [name for name in seen if name not in order and not name.startswith(".")]
        return [*order, *late][-1] if order or late else None

    def _by_order(self, output: Path, states: Sequence[str]) -> list[Path]:
        from sd_train.state import order_of

        def place(name: str) -> tuple[int, float, int]:
            hidden = next(output.glob(f".{name}.*.old"), None)
            return order_of(output / name if hidden is None else hidden)

        return [output / name for name in sorted(states, key=place)]

    def _damaged(self, rng: random.Random, kind: Kind, output: Path, log: Path) -> None:
        """The newest state has a flipped byte, or cannot be read: the one before it is used."""
        copy_saves(kind, output, (2, 4))
        names = kind.names(output)
        newest, before = names.state("it-step00000004"), names.state("it-step00000002")
        flips = rng.random() < 0.5
        if flips:
            file = rng.choice(sorted(path for path in newest.iterdir() if path.name != MANIFEST))
            content = bytearray(file.read_bytes())
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            file.write_bytes(content)
            self.told += f", a byte of {file.name} flipped"
        faults = self._faults(rng, output, unreadable=None if flips else newest)
        code = in_child(lambda: trained(kind, output, f"{EVERY} --resume latest", faults), log)
        text = log.read_text(errors="replace")
        self.counts["flipped bytes" if flips else "states that cannot be read"] += 1
        passed = f"passed over: {newest}" in text and f"resumed {before} at step 2" in text
        wrong = [*differences(kind, output), *unfinished(kind, output)]
        if code or not passed or wrong:
            self._problem(log, f"ended with {code}; passed over: {passed}; {wrong[:3]}")
        else:
            self.counts["damaged states passed over, equal to the bit in the end"] += 1

    def _filled(self, rng: random.Random, kind: Kind, output: Path, log: Path) -> None:
        """A small disk of its own is full from one update to another, or until the end waits for room."""
        first, last = rng.randint(1, UPDATES), rng.randint(1, UPDATES + 1)
        needed = sum(path.stat().st_size for path in kind.reference.rglob("it-step00000004*/*"))
        left, checks = rng.randint(0, needed), rng.random() < 0.5

        def action() -> int:
            from sd_train import room

            output.mkdir(exist_ok=True)
            if not mount_small(output, 64 * needed + (8 << 20)):
                return 77
            if not checks:
                # So that the disk itself refuses, in the middle of a file.
                room.SPARE = -(1 << 40)
            ballast = output / "ballast"
            faults = self._faults(rng, output)

            def empty(*_: object) -> None:
                ballast.unlink(missing_ok=True)

            def after(step: int) -> None:
                if step == first:
                    fill(ballast, left)
                elif step == last:
                    empty()

            faults.after, room.Room.wait = after, empty  # type: ignore[method-assign]
            code = trained(kind, output, EVERY, faults)
            for difference in (wrong := [*differences(kind, output), *unfinished(kind, output)]):
                print(difference)
            refused = "not saved after update" in log.read_text(errors="replace")
            return code or (FAILED - 1 if wrong else 10 + refused)

        code = in_child(action, log)
        self.counts["full disks: not to be had here" if code == 77 else "full disks"] += 1
        if code not in (77, 10, 11):
            self._problem(log, f"ended with {code}; full from update {first} to {last}, {left} bytes left")
        else:
            self.counts["full disks: a save refused and made up for"] += code == 11
            self.counts["full disks: equal to the bit in the end"] += code != 77

    def _faults(self, rng: random.Random, output: Path, **more: Any) -> Faults:
        return Faults(output, clock=rng.uniform(-3e8, 3e8), journal=self.place / "journal", **more)

    def _problem(self, log: Path, text: str) -> None:
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        self.problems.append(f"{self.told}: {text}\n    " + "\n    ".join(lines[-4:]))
        print(self.problems[-1], flush=True)


def choose(rng: random.Random, moments: Sequence[Moment]) -> Moment:
    """A moment inside a save as often as outside; each place as often as another, then each of its passings."""
    saving = rng.random() < 0.5
    wanted = [moment for moment in moments if moment.saving == saving]
    places = sorted({moment.place for moment in wanted})
    place = rng.choice(places)
    return rng.choice([moment for moment in wanted if moment.place == place])


def mount_small(folder: Path, size: int) -> bool:
    """Give this process a disk of `size` bytes at `folder`, which nobody else sees; whether the system lets us."""
    library = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if library.unshare(CLONE_NEWNS):
        if library.unshare(CLONE_NEWNS | CLONE_NEWUSER):
            return False
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path(f"/proc/self/{name}").write_text(text)
    library.mount(None, b"/", None, MS_PRIVATE_EVERYWHERE, None)
    return not library.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode())


def fill(path: Path, left: int) -> None:
    """Write a file that leaves `left` bytes of its disk."""
    path.write_bytes(bytes(max(0, shutil.disk_usage(path.parent).free - left)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Disturb trainings; 1 if one of them did not survive as it should."""
    parser = argparse.ArgumentParser(description="Does a training survive kills, signals, full disks and damage?")
    parser.add_argument("--kills", type=int, default=200, help="a tenth as many of each other kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("kill", "stop", "refusal", "full", "damage"), help="one kind alone")
    parser.add_argument("--lora_alone", action="store_true", help="train no whole models")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        kinds = [prepare(place, name) for name in (["lora"] if given.lora_alone else KINDS)]
        chaos = Chaos(place, kinds, given.seed)
        for what in ("kill", "stop", "refusal", "full", "damage"):
            count = given.kills if what == "kill" else -(-given.kills // 10)
            for number in range(count if given.only in (None, what) else 0):
                chaos.one(number, what)
    chaos.counts["bytes lost"] += 0
    for name, count in chaos.counts.items():
        print(f"{name}: {count}")
    print(f"{len(chaos.problems)} problems")
    return int(bool(chaos.problems))


if __name__ == "__main__":
    raise SystemExit(main())
