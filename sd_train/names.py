"""sd-scripts' names for what a run writes."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from sd_train.errors import RunError


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
        """What an earlier run of the same names left in the folder."""
        if not self.folder.is_dir():
            return []
        stems = [re.escape(self.last), re.escape(self.best), re.escape(self.name or "at") + r"-step\d{8}"]
        stems.append(re.escape(self.name or "epoch") + r"-\d{6}")
        pattern = re.compile(f"(?:{'|'.join(stems)})(?:(?:-ema)?{re.escape(self.extension)}|-state)")
        return sorted(entry for entry in self.folder.iterdir() if pattern.fullmatch(entry.name))

    def states(self) -> list[Path]:
        """The state folders among them."""
        return [path for path in self.existing() if path.name.endswith("-state") and path.is_dir()]

    def pictures(self) -> list[Path]:
        """Sample pictures of an earlier run of this name."""
        folder = self.folder / "sample"
        prefix = "" if self.name is None else re.escape(f"{self.name}_")
        pattern = re.compile(prefix + r"e?\d{6}_\d{2}_\d{14}(?:_\d+)?\.png")
        return sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name)) if folder.is_dir() else []

    def remove_existing(self) -> None:
        """Delete what an earlier run left, so that nothing of it can be taken for this run's.

        Raises:
            RunError: if one cannot be deleted.
        """
        for path in (*self.existing(), *self.pictures()):
            try:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            except OSError as problem:
                raise RunError(
                    f"{path}: cannot be deleted for --overwrite ({problem.strerror}); check its permissions, or choose "
                    "another --output_name"
                ) from None


def step_of(path: Path) -> int:
    """The update at which a file or state folder was saved, as its name tells; 0 where it does not."""
    found = re.search(r"-step(\d{8})(?:-state|-ema)?(?:\.|$)", path.name)
    return int(found[1]) if found else 0
