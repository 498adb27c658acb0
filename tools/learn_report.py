"""What `learn.py` says of its runs: a table in Markdown, JSON, and one picture with all of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import numpy as np
from learn_concepts import Concept
from learn_jobs import Job, Result
from learn_methods import BASE, Method
from learn_scores import ASKED_COUNT
from PIL import Image
from shapes_world import Picture

from sd_train.demo.rows import Row, draw_rows

SHOWN = 4
"""Pictures of each concept in a row of the grid."""
SIDE = 96
"""Of each of them, in pixels."""


class Runs:
    """All runs, beside those of the base model."""

    def __init__(self, results: Sequence[Result]) -> None:
        self.results = [result for result in results if result.method != BASE.name]
        self._before = {result.concept: result for result in results if result.method == BASE.name}

    def of(self, method: str, concept: str | None = None) -> list[Result]:
        """The runs of a method, all or those of one concept."""
        return [one for one in self.results if one.method == method and concept in (None, one.concept)]

    def before(self, result: Result) -> Result:
        """What the base model draws of the same concept."""
        return self._before[result.concept]

    def drift(self, result: Result) -> float:
        """Share of the base model's own captions that are no longer drawn right."""
        return self.before(result).scores.old - result.scores.old

    def class_drift(self, result: Result) -> float:
        """Share of pictures of the class alone that now show the concept."""
        return result.scores.class_drawn - self.before(result).scores.class_drawn

    def same_old_pictures(self, result: Result) -> bool:
        """Whether the base model's own captions are drawn as before, to the bit."""
        return self.before(result).scores.old_pixels == result.scores.old_pixels

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        runs = [
            one.as_json() | {"drift": self.drift(one), "class_drift": self.class_drift(one)} for one in self.results
        ]
        return {"before": [one.as_json() for one in self._before.values()], "runs": runs}


def _percent(values: Sequence[float]) -> str:
    return f"{100 * fmean(values):.0f} ± {100 * pstdev(values):.0f}"


def table(runs: Runs, methods: Sequence[Method], concepts: Sequence[Concept]) -> str:
    """A row for each method: means over concepts and seeds, with their spread (standard deviation)."""
    names = [concept.name for concept in concepts]
    head = ["method", "concept", *names, "caption right", "drift", "class drift", "updates", "seconds", "file kB"]
    rows = [head, ["---"] + ["---:"] * (len(head) - 1)]
    base = [runs.before(one) for one in {one.concept: one for one in runs.results}.values()]
    first = [f"{100 * fmean(one.scores.concept for one in base):.0f}"]
    first += [f"{100 * one.scores.concept:.0f}" for name in names for one in base if one.concept == name]
    first += [f"{100 * fmean(one.scores.caption for one in base):.0f}", "0", "0", "0", "", ""]
    rows.append(["base model", *first])
    for method in methods:
        ours = runs.of(method.name)
        means: list[Callable[[Result], float]] = [lambda one: one.scores.caption, runs.drift, runs.class_drift]
        rows.append([
            method.name,
            _percent([one.scores.concept for one in ours]),
            *(f"{100 * fmean(one.scores.concept for one in runs.of(method.name, name)):.0f}" for name in names),
            *(_percent([mean(one) for one in ours]) for mean in means),
            str(method.updates),
            f"{fmean(one.seconds for one in ours):.1f}",
            f"{fmean(one.bytes for one in ours) / 1000:,.0f}",
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def notes(runs: Runs, methods: Sequence[Method]) -> list[str]:
    """What stands below the table."""
    old = fmean(one.scores.old for one in map(runs.before, runs.results))
    lines = [
        "Shares of pictures in percent, mean and standard deviation over concepts and seeds. Concept: the new thing is "
        "seen. Caption right: all else too.",
        f"Drift: of the base model's own captions ({100 * old:.0f} % right before), how many are no longer drawn "
        "right. Class drift: pictures of the class alone that show the new thing.",
    ]
    for method in methods:
        ours = runs.of(method.name)
        if method.file_kind == "embedding" and ours:
            held = sorted({", ".join(f"{name} {shape}" for name, shape in one.tensors.items()) for one in ours})
            same = sum(map(runs.same_old_pictures, ours))
            lines.append(
                f"{method.name}: {same} of {len(ours)} runs draw all old captions as before to the bit; "
                f"the file holds {held[0] if len(ours[0].tensors) < 4 else f'{len(ours[0].tensors)} tables'}."
            )
    return lines


def grid(methods: Sequence[Method], concepts: Sequence[Concept], folder: Path, seed: int) -> Image.Image:
    """Training pictures with their captions; then the same other captions before and after each method."""

    def asked(method: Method) -> list[Picture]:
        places = (Job(method, concept, seed if method.command else 0, folder).place for concept in concepts)
        return [picture for place in places for picture in np.load(place / "asked.npy")[:SHOWN]]

    trained = [picture for concept in concepts for picture in concept.training_pictures()[:SHOWN]]
    captions = [concept.caption(scene) for concept in concepts for scene in concept.trained()[:SHOWN]]
    wanted = [concept.caption(scene) for concept in concepts for scene in concept.asked(ASKED_COUNT)[:SHOWN]]
    rows = [Row("trained on", trained, captions), Row("before", asked(BASE), wanted)]
    return draw_rows([*rows, *(Row(f"after: {method.name}", asked(method)) for method in methods)], SIDE)
