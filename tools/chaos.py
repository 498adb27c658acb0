"""`python tools/chaos.py --kills 200 --seed 0`: does a training survive what happens to it?

Trains a tiny LoRA or a tiny whole model again and again, each time in a process of its own that is killed, stopped,
refused room by its disk or given damaged states at a moment that the seed chooses. Every file that is visible then is
compared with that of a run which nobody disturbed, byte by byte; the training is resumed with `--resume latest` (or
begun anew where nothing was saved), and must end in the same bytes. The wall clock is years wrong, each time another
way. Prints what is not as it should be, and counts. Needs Linux; full disks are real ones (tmpfs) where they may be
mounted.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Times are part of the files; so that two runs can give the same bytes they are those of one moment.
os.environ.setdefault("SOURCE_DATE_EPOCH", "1700000000")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from chaos_disk import fill, mount_small
from chaos_faults import Action, Faults, Moment
from chaos_runs import (
    EVERY,
    FAILED,
    KINDS,
    UPDATES,
    Kind,
    copy_saves,
    differences,
    in_child,
    prepare,
    trained,
    unfinished,
)

from sd_train.files import size_of
from sd_train.state import MANIFEST


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
        actions: dict[str, tuple[Action, ...]] = {
            "kill": ("kill",), "stop": ("term", "int", "int twice"), "refusal": ("no room", "bad disk"),
        }  # fmt: skip
        action = rng.choice(actions[what])
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
        last, lost = self._journal(present, output)
        self.counts["bytes lost"] += sum(size_of(kind.reference / name) for name in lost)
        for difference in [*differences(kind, output), *(f"{name} is lost" for name in lost)]:
            self._problem(log, difference)
        names = kind.names(output)
        if last == "it-state":
            # All that was left to do is to put away what the end has left.
            self.counts[f"{what}s: had ended"] += 1
            names.tidy()
        else:
            more = " --resume latest" if last is not None else " --overwrite" if names.existing() else ""
            self.counts[f"{what}s: begun anew" if last is None else f"{what}s: resumed"] += 1
            code = in_child(lambda: trained(kind, output, EVERY + more, self._faults(rng, output)), log)
            text = log.read_text(errors="replace")
            if code or (last is not None and f"resumed {output / last} at step" not in text):
                self._problem(log, f"{more}: ended with {code}, the last whole state was {last}")
        wrong = [*differences(kind, output), *unfinished(kind, output)]
        for difference in wrong:
            self._problem(log, f"in the end {difference}")
        self.counts[f"{what}s: equal to the bit in the end"] += not wrong

    def _journal(self, present: set[str], output: Path) -> tuple[str | None, list[str]]:
        """The name of the state that was sealed last, and what was there, was not deleted and is gone.

        A line tells what comes after it came, what goes before it goes, and what was put back: it is as old as it was.
        """
        journal = self.place / "journal"
        order = sorted(present)
        for line in journal.read_text(encoding="utf-8").splitlines() if journal.exists() else ():
            sign, _, name = line.partition(" ")
            present = present - {name} if sign == "-" else present | {name}
            if sign == "+":
                order = [*(other for other in order if other != name), name]
        visible = [path.name for path in output.iterdir() if not path.name.startswith(".")]
        # What was killed between two renames is put back at the next start.
        between = [path.name[1:].rpartition(".old")[0].rpartition(".")[0] for path in output.glob(".*.old")]
        order += [name for name in visible if name not in order]
        states = [name for name in order if name.endswith("-state") and name in (*visible, *between)]
        return states[-1] if states else None, sorted(present - {*visible})

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

            faults.after = after
            room.Room.wait = empty  # type: ignore[assignment, method-assign]
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Disturb trainings; 1 if one of them did not survive as it should."""
    parser = argparse.ArgumentParser(description="Does a training survive kills, signals, full disks and damage?")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--others", type=int, help="signals, refusals, full disks, damages, of each; else a tenth")
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
            others = -(-given.kills // 10) if given.others is None else given.others
            count = given.kills if what == "kill" else others
            for number in range(count if given.only in (None, what) else 0):
                chaos.one(number, what)
                if number % 50 == 49:
                    print(f"{number + 1} of {count}: {what}", flush=True)
    chaos.counts["bytes lost"] += 0
    for name, count in chaos.counts.items():
        print(f"{name}: {count}")
    print(f"{len(chaos.problems)} problems")
    return int(bool(chaos.problems))


if __name__ == "__main__":
    raise SystemExit(main())
