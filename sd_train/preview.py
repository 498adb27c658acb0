"""Sample pictures while training, under sd-scripts' file names, without any trace in the training itself."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sd_train.drawing import Picture, draw_pixels, parameters_text, save_picture, to_picture
from sd_train.families.base import Family
from sd_train.prompts import Prompt
from sd_train.randomness import derive
from sd_train.report import Report
from sd_train.samplers import canonical_sampler
from sd_train.types import Progress

logger = logging.getLogger(__name__)


class Weights(Protocol):
    """Whoever owns the weights that are shown: EMA, schedule-free, dropout off."""

    def for_inference(self) -> AbstractContextManager[object]:
        """Inside, the modules compute what a saved file would."""
        ...


@dataclass(kw_only=True)
class Preview:
    """Called after every update, and once before the first; draws the pictures when they are due.

    When (sd-scripts' rule): with `every_n_epochs`, at the ends of the epochs that it divides, whatever `every_n_steps`
    says; otherwise after every `every_n_steps` updates; with `at_first`, also before the first update of all.

    A picture that fails is told of, and the training goes on.
    """

    family: Family
    prompts: tuple[Prompt, ...]
    sampler: str
    """For prompts that name none."""
    output_dir: Path
    output_name: str | None
    every_n_steps: int | None
    every_n_epochs: int | None
    at_first: bool
    weights: Weights
    report: Report
    seed: int
    """The run's: draws the seed of a prompt without one, so that a run can be repeated."""
    is_main: bool = True
    start_step: int = 0
    """Updates that earlier runs of the training have done: their pictures are not drawn again."""
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext
    """The precision that the training computes in."""

    def __post_init__(self) -> None:
        self.sampler = canonical_sampler(self.sampler)

    def __call__(self, progress: Progress) -> None:
        """Draw every prompt if that is due at `progress`."""
        if (mark := self.due(progress)) is not None:
            self._show_all(mark, progress)

    def now(self, progress: Progress) -> None:
        """Draw every prompt, named as those of an update are."""
        self._show_all(f"{progress.step:06d}", progress)

    def _show_all(self, mark: str, progress: Progress) -> None:
        if not self.is_main or not self.prompts:
            return
        failed: dict[str, str] = {}
        with self.report.untimed(), ExitStack() as stack:
            try:
                stack.enter_context(self.weights.for_inference())
            except (RuntimeError, MemoryError) as problem:
                # Averaged weights are put aside for the time, which takes memory.
                failed = {"any prompt": f"{type(problem).__name__}: {problem}"}
            for index, prompt in enumerate(() if failed else self.prompts):
                try:
                    self._show(index, prompt, mark, progress)
                except Exception as problem:
                    # A sample picture is worth less than the training: memory, disk, a sampler or a prompt that the
                    # pipeline refuses must not end it, and their exceptions have no common class.
                    failed[f"prompt {index}"] = f"{type(problem).__name__}: {problem}"
        if failed:
            first = next(iter(failed.values()))
            names = ", ".join(failed)
            logger.warning("step %d: no sample picture of %s (%s); the training goes on", progress.step, names, first)

    def due(self, progress: Progress) -> str | None:
        """How the pictures' names mark the moment (`e000002`: epochs, `000100`: updates); None: nothing is due."""
        if progress.step == 0:
            return f"e{progress.epoch:06d}" if self.at_first else None
        if progress.step <= self.start_step:
            return None
        if self.every_n_epochs is not None and self.every_n_epochs > 0:
            ended = progress.index == 0 and progress.epoch % self.every_n_epochs == 0
            return f"e{progress.epoch:06d}" if ended else None
        if self.every_n_steps is not None and self.every_n_steps > 0 and progress.step % self.every_n_steps == 0:
            return f"{progress.step:06d}"
        return None

    def _show(self, index: int, prompt: Prompt, mark: str, progress: Progress) -> None:
        """Draw one picture, save it and show it in TensorBoard."""
        # 32 bits, so that the number can be given to any program that draws pictures.
        drawn = derive(self.seed, "preview", progress.step, index) % 2**32
        seed = drawn if prompt.seed is None else prompt.seed
        picture = self.draw(prompt, seed)
        name = "" if self.output_name is None else f"{self.output_name}_"
        suffix = "" if prompt.seed is None else f"_{prompt.seed}"
        moment = time.strftime("%Y%m%d%H%M%S")
        path = Path(self.output_dir) / "sample" / f"{name}{mark}_{index:02d}_{moment}{suffix}.png"
        save_picture(path, picture, self._parameters(prompt, seed, progress))
        self.report.image(f"sample_{index}", picture, progress.step)

    def draw(self, prompt: Prompt, seed: int) -> Picture:
        """The picture of `prompt`, [height, width, 3]; call it inside `weights.for_inference()`.

        Raises:
            RunError: if the model gives values that are not finite.
        """
        return to_picture(draw_pixels(self.family, prompt, self.sampler, seed, self.autocast))

    def _parameters(self, prompt: Prompt, seed: int, progress: Progress) -> str:
        """How the picture came about, as A1111's web UI writes it into its own."""
        moment = {"Training step": progress.step, "Training epoch": progress.epoch}
        text = parameters_text(prompt, self.sampler, seed, moment)
        if self.output_name is None:
            return text
        return f"{text}, Output name: {json.dumps(self.output_name, ensure_ascii=False)}"
