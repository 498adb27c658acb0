"""`python tools/learn.py`: what each method of training teaches a model, and what it costs what the model knew.

The base model draws coloured shapes on coloured backgrounds. Each method teaches it a shape, a pair of colours and a
style that it cannot draw, from twelve pictures each. The pictures it then draws are judged by rule: of the concept with
shapes, colours and backgrounds that stood in no training picture, of the model's own captions, and of the class alone.
Everything goes through the commands that a user would type; a bare loop over diffusers and peft stands beside them.

Prints a table in Markdown; leaves `results.json`, `grid.png` and each run's words in --output_dir.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# One thread for each process, before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from learn_concepts import REPORTED, TUNED, Concept
from learn_jobs import Job, Result, convert, prepare, run_job, start_worker
from learn_methods import BASE, METHODS, Method
from learn_report import Runs, grid, notes, table

from sd_train.entry import guarded

MODEL = Path(__file__).resolve().parents[1] / "sd_train" / "demo" / "base_model.safetensors"


@dataclass(frozen=True)
class Plan:
    """What is compared."""

    model: Path
    methods: tuple[Method, ...]
    concepts: tuple[Concept, ...]
    seeds: int
    folder: Path
    workers: int

    def jobs(self) -> list[Job]:
        """Every run; the base model's own once for each concept."""
        jobs = [Job(BASE, concept, 0, self.folder) for concept in self.concepts]
        every = ((method, concept, seed) for seed in range(self.seeds) for concept in self.concepts
                 for method in self.methods)  # fmt: skip
        return jobs + [Job(*one, self.folder) for one in every]


def learn(plan: Plan) -> Runs:
    """Do every run.

    Raises:
        RunError: if one ends with an error.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    with_reg = any(method.data == "reg" for method in plan.methods)
    with _workers(plan.workers) as each:
        tasks = [partial(prepare, plan.model, concept, plan.folder, with_reg) for concept in plan.concepts]
        if any(method.command == "diffusers" for method in plan.methods):
            tasks.append(partial(convert, plan.model, plan.folder))
        for _ in each(tasks):
            pass
        jobs, results = plan.jobs(), []
        began = time.monotonic()
        for result in each([partial(run_job, job, plan.model) for job in jobs]):
            results.append(result)
            _tell(result, len(results), len(jobs), time.monotonic() - began)
    return Runs(results)


@contextmanager
def _workers(count: int) -> Iterator[Callable[[Sequence[Callable[[], Any]]], Iterator[Any]]]:
    """What does tasks in `count` processes and gives their results as they come; in this process where it is one."""
    if count == 1:
        start_worker()
        yield lambda tasks: (task() for task in tasks)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, context, initializer=start_worker) as pool:
        try:
            yield lambda tasks: (done.result() for done in as_completed([pool.submit(task) for task in tasks]))
        except BaseException:
            # Otherwise an error, or Ctrl-C, would be heard of after all the other runs.
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _tell(result: Result, done: int, count: int, seconds: float) -> None:
    scores = result.scores
    print(
        f"{done}/{count} {seconds:5.0f} s  {result.method}, {result.concept}, seed {result.seed}: concept "
        f"{scores.concept:.0%}, caption {scores.caption:.0%}, old {scores.old:.0%}, class {scores.class_drawn:.0%}, "
        f"{result.seconds:.1f} s",
        file=sys.stderr,
        flush=True,
    )


def _chosen(parser: argparse.ArgumentParser, option: str, given: str | None, known: Sequence[str]) -> list[str]:
    """The names in an option, all where it is not given."""
    if given is None:
        return list(known)
    names = [name.strip() for name in given.split(";")]
    if unknown := [name for name in names if name not in known]:
        parser.error(f"{option} = {given}: {unknown[0]!r} is none of {'; '.join(known)}")
    return names


def read_plan(argv: Sequence[str] | None) -> Plan:
    """The plan that the command line asks for."""
    parser = argparse.ArgumentParser(description="What does each method of training teach, and at what cost?")
    add = parser.add_argument
    add("--model", type=Path, default=MODEL, help="the base model (default: the package's own)")
    add("--methods", metavar="NAME;NAME", help=f"default: all of {'; '.join(method.name for method in METHODS)}")
    add("--concepts", metavar="NAME;NAME", help="default: all")
    add("--seeds", type=int, default=3, help="runs of each method and concept (default 3)")
    add("--tuning", action="store_true", help="the concepts by which rates, ranks and updates are chosen")
    add("--workers", type=int, default=2, help="processes, of one thread each (default 2)")
    add("--output_dir", type=Path, default=Path("demo_output/learn"), help="default: demo_output/learn")
    given = parser.parse_args(argv)
    concepts = {concept.name: concept for concept in (TUNED if given.tuning else REPORTED)}
    methods = {method.name: method for method in METHODS}
    if given.seeds < 1 or given.workers < 1:
        parser.error("--seeds and --workers must be 1 or more")
    if not given.model.is_file():
        parser.error(f"--model = {given.model}: there is no such file; name a base model of the shapes' world")
    return Plan(
        model=given.model.resolve(),
        methods=tuple(methods[name] for name in _chosen(parser, "--methods", given.methods, list(methods))),
        concepts=tuple(concepts[name] for name in _chosen(parser, "--concepts", given.concepts, list(concepts))),
        seeds=given.seeds,
        folder=given.output_dir.resolve(),
        workers=given.workers,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, and say what came out."""
    plan = read_plan(argv)
    began = time.monotonic()
    runs = learn(plan)
    seconds = time.monotonic() - began
    (plan.folder / "results.json").write_text(json.dumps(runs.as_json() | {"seconds": seconds}, indent=1) + "\n")
    grid(plan.methods, plan.concepts, plan.folder, 0).save(plan.folder / "grid.png")
    print(table(runs, plan.methods, plan.concepts))
    print("\n" + "\n\n".join(notes(runs, plan.methods)))
    print(f"\n{len(runs.results)} runs in {seconds / 60:.1f} minutes; all of them in {plan.folder / 'results.json'}, "
          f"pictures in {plan.folder / 'grid.png'}")  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(guarded(main))
