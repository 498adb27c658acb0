"""sd-scripts' names for what a run writes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sd_train.errors import RunError
from sd_train.files import Tidied, remove, tidy

EXTENSIONS = (".safetensors", ".ckpt", ".pt", "")
"""Of models in all forms; the last is that of folders."""

Moment = tuple[Literal["step", "epoch"], int]
"""Of a save: an update or an epoch, from 1."""

_OF_FOLDERS = ("manifest.json", "progress.json", "model_index.json")
"""The first two are in states, the last one in model folders."""


@dataclass(frozen=True)
class FileNames:
    """sd-scripts' names for what a run writes into its output folder."""

    folder: Path
    name: str | None
    extension: str = ".safetensors"
    """Of model files; empty where a model is a folder."""

    def at_step(self, step: int) -> str:
        """`N-step00000100`, or `at-step00000100` without a name."""
        return f"{self.name or 'at'}-step{step:08d}"

    def at_epoch(self, epoch: int) -> str:
        """`N-000002`, or `epoch-000002` without a name."""
        return f"{self.name or 'epoch'}-{epoch:06d}"

    @property
    def last(self) -> str:
        """`N`, or `last` without a name."""
        return self.name or "last"

    @property
    def best(self) -> str:
        """`N-best`, or `best` without a name: the save with the lowest validation loss."""
        return f"{self.name}-best" if self.name else "best"

    def model(self, stem: str) -> Path:
        """The model file or folder of a save."""
        return self.folder / f"{stem}{self.extension}"

    def average(self, stem: str) -> Path:
        """The model file or folder with the moving average, of the same save."""
        return self.folder / f"{stem}-ema{self.extension}"

    def state(self, stem: str) -> Path:
        """The state folder of a save."""
        return self.folder / f"{stem}-state"

    def existing(self) -> list[Path]:
        """What an earlier run of the same names left in the folder, also in other forms than this one's."""
        if not self.folder.is_dir():
            return []
        own, every = self._pattern(self.extension), [self._pattern(extension) for extension in EXTENSIONS]
        return sorted(
            entry
            for entry in self.folder.iterdir()
            if own.fullmatch(entry.name)
            or (any(pattern.fullmatch(entry.name) for pattern in every) and _is_written(entry, empty=False))
        )

    def _pattern(self, extension: str) -> re.Pattern[str]:
        """Of the names of states, and of models with that extension."""
        stems = [re.escape(self.last), re.escape(self.best), re.escape(self.name or "at") + r"-step\d{8}"]
        stems.append(re.escape(self.name or "epoch") + r"-\d{6}")
        return re.compile(f"(?:{'|'.join(stems)})(?:(?:-ema)?{re.escape(extension)}|-state)")

    def stem(self, moment: Moment) -> str:
        """The name, without extension, of a save."""
        return self.at_step(moment[1]) if moment[0] == "step" else self.at_epoch(moment[1])

    def moment(self, path: Path) -> Moment | None:
        """The update or epoch whose save is at `path`, as its name tells; None for other files and for the last one."""
        if found := re.match(re.escape(self.name or "at") + r"-step(\d{8})(?!\d)", path.name):
            return "step", int(found[1])
        if found := re.match(re.escape(self.name or "epoch") + r"-(\d{6})(?!\d)", path.name):
            return "epoch", int(found[1])
        return None

    def replaced(self) -> list[Path]:
        """Those of `existing` that a run of this form writes in the place of."""
        return [path for path in self.existing() if self._pattern(self.extension).fullmatch(path.name)]

    def foreign(self) -> list[Path]:
        """Those of `replaced` that no run has written: they are neither models nor states."""
        return [path for path in self.replaced() if not _is_written(path)]

    def holding(self, path: Path) -> Path | None:
        """The model or state folder of this run, there or to come, that `path` is or lies in."""
        folder, place = self.folder.resolve(), path.resolve()
        if folder not in place.parents:
            return None
        first = folder / place.relative_to(folder).parts[0]
        return first if self._pattern(self.extension).fullmatch(first.name) else None

    def states(self) -> list[Path]:
        """The state folders among them."""
        return [path for path in self.existing() if path.name.endswith("-state") and path.is_dir()]

    @property
    def config(self) -> Path:
        """The resolved options."""
        return self.folder / f"{self.last}-config.toml"

    def pictures(self) -> list[Path]:
        """Sample pictures of an earlier run of this name."""
        folder, pattern = self.folder / "sample", self._of_pictures()
        return sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name)) if folder.is_dir() else []

    def _of_pictures(self) -> re.Pattern[str]:
        prefix = "" if self.name is None else re.escape(f"{self.name}_")
        return re.compile(prefix + r"e?\d{6}_\d{2}_\d{14}(?:_\d+)?\.png")

    def tidy(self) -> Tidied:
        """Put right what a run of the same names that was killed left unfinished; other programs' files stay."""
        every, pictures = [self._pattern(extension) for extension in EXTENSIONS], self._of_pictures()

        def is_ours(name: str) -> bool:
            return name == self.config.name or any(pattern.fullmatch(name) for pattern in every)

        models = tidy(self.folder, is_ours)
        drawn = tidy(self.folder / "sample", lambda name: pictures.fullmatch(name) is not None)
        return Tidied(models.put_back, models.removed + drawn.removed)

    def remove_existing(self) -> None:
        """Delete what an earlier run left, so that nothing of it can be taken for this run's.

        Raises:
            RunError: if one cannot be deleted.
        """
        for path in (*self.existing(), *self.pictures()):
            try:
                remove(path)
            except OSError as problem:
                raise RunError(
                    f"{path}: cannot be deleted for --overwrite ({problem.strerror}); check its permissions, or choose "
                    "another --output_name"
                ) from None


def _is_written(path: Path, *, empty: bool = True) -> bool:
    """Whether a model or state of ours may be at `path`, going by its kind; `empty`: as what an empty folder counts."""
    if not path.is_dir():
        return path.name.endswith(tuple(extension for extension in EXTENSIONS if extension))
    return any((path / file).is_file() for file in _OF_FOLDERS) or (empty and not any(path.iterdir()))


def step_of(path: Path) -> int:
    """The update at which a file or state folder was saved, as its name tells; 0 where it does not."""
    found = re.search(r"-step(\d{8})(?:-state|-ema)?(?:\.|$)", path.name)
    return int(found[1]) if found else 0
