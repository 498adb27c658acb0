"""Measurements that anyone can repeat; each prints JSON.

`python tools/bench.py overhead`: what the trainer costs beside its arithmetic, and beside diffusers' training step.
`python tools/bench.py lora`: a LoRA's passes beside PEFT's and the bare formula.
`python tools/bench.py startup`: `--help`, mistakes, and the way to the first update.
`python tools/bench.py counts`: operations, allocations and waits of one update, beside those that are kept.
`python tools/bench.py data`: how fast folders are indexed, ordered and cached, beside plain loops.
`python tools/bench.py save`: how long a save stops the training, and its time beside a plain write.
`python tools/bench.py compile`: graphs, seconds and losses of --torch_compile beside the plain path.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

# One thread, before torch is imported: CPU time of several would count waiting for each other.
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_overhead import BARE, CASES, make_model, overhead_figures


def _overhead(given: argparse.Namespace) -> Any:
    return overhead_figures(given.models.split(","), given.cases.split(","), given.rounds, given.steps)


def _lora(given: argparse.Namespace) -> Any:
    from bench_lora import lora_figures

    with tempfile.TemporaryDirectory() as folder:
        models = {name: make_model(Path(folder), name) for name in given.models.split(",")}
        return {name: lora_figures(path, given.rank, given.rounds, given.times) for name, path in models.items()}


def _startup(given: argparse.Namespace) -> Any:
    from bench_startup import startup_figures

    return startup_figures(given.rounds)


def _data(given: argparse.Namespace) -> Any:
    from bench_data import data_figures

    return data_figures(given.images, given.rounds, not given.no_cache)


def _save(given: argparse.Namespace) -> Any:
    from bench_stall import stall_figures

    return stall_figures(given.megabytes, given.rounds)


def _compile(given: argparse.Namespace) -> Any:
    from bench_compile import compile_figures

    return compile_figures(given.scope, given.backend)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measurements that anyone can repeat.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("overhead", help="CPU time of a training, its arithmetic and diffusers' step")
    command.add_argument("--steps", type=int, default=100, help="updates that are measured; a third with small")
    command.add_argument("--rounds", type=int, default=3, help="each figure is the median of so many")
    command.add_argument("--models", default="tiny,small", metavar="NAME,...")
    command.add_argument("--cases", default=",".join([*CASES, *BARE]), metavar="NAME,...")
    command.set_defaults(measure=_overhead)
    command = commands.add_parser("lora", help="CPU time of a LoRA's passes, ours, PEFT's and the bare formula's")
    command.add_argument("--models", default="tiny,small", metavar="NAME,...")
    command.add_argument("--rank", type=int, default=4)
    command.add_argument("--rounds", type=int, default=5, help="each figure is the median of so many")
    command.add_argument("--times", type=int, default=10, help="passes in a round")
    command.set_defaults(measure=_lora)
    command = commands.add_parser("startup", help="CPU time and memory until help, a mistake or an update is there")
    command.add_argument("--rounds", type=int, default=3, help="each figure is the median of so many")
    command.set_defaults(measure=_startup)
    command = commands.add_parser("counts", help="operations, allocations and waits of one update of each kind")
    command.add_argument("--write", action="store_true", help="keep them, as what the tests allow")
    command.set_defaults(measure=None)
    command = commands.add_parser("data", help="images indexed, ordered and cached a second, beside plain loops")
    command.add_argument("--images", type=int, default=100_000, help="files of the folder that is indexed")
    command.add_argument("--rounds", type=int, default=3, help="each figure is the best of so many")
    command.add_argument("--no_cache", action="store_true", help="leave the figures of the latents cache out")
    command.set_defaults(measure=_data)
    command = commands.add_parser("save", help="the stall of a save and its time beside a plain write, in this folder")
    command.add_argument("--megabytes", type=int, default=1024, help="of a state: weights and what AdamW keeps")
    command.add_argument("--rounds", type=int, default=5, help="the figures are medians of so many")
    command.set_defaults(measure=_save)
    command = commands.add_parser("compile", help="graphs, seconds and losses of --torch_compile beside the plain path")
    command.add_argument("--scope", choices=("regional", "whole"), default="regional")
    command.add_argument("--backend", choices=("inductor", "aot_eager", "eager"), default="inductor")
    command.set_defaults(measure=_compile)
    return parser


def main() -> int:
    """Run the measurement that the command line names and print it as JSON."""
    given = _parser().parse_args()
    if given.measure is None:
        from bench_counts import counts_command

        return counts_command(given.write)
    print(json.dumps(given.measure(given), indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
