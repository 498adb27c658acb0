"""Where curves go: TensorBoard's event file and JSON lines.

A tracker never stops a training: what it cannot write is told once, and the training goes on without it.
"""

from __future__ import annotations

import io
import json
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

Picture = np.ndarray[Any, np.dtype[np.uint8]]
Hyperparameter = bool | int | float | str


class Tracker(ABC):
    """Takes curves, pictures and texts; warns once and falls silent when one of them cannot be written."""

    def __init__(self, name: str, place: str, install: str) -> None:
        """`place` is what the warning says cannot be written; `install` what helps where the package is missing."""
        self._name, self._place, self._install = name, place, install
        self._works = True
        self._harmlessly(self._open)

    def scalars(self, step: int, wall_time: float, values: Mapping[str, float], epoch: int | None = None) -> None:
        """One point for each of `values` after `step` updates; with `epoch`, of that many whole epochs."""
        self._harmlessly(lambda: self._scalars(step, wall_time, values, epoch))

    def image(self, tag: str, picture: Picture, step: int) -> None:
        """One picture, [height, width, 3]."""
        self._harmlessly(lambda: self._image(tag, picture, step))

    def text(self, tag: str, text: str) -> None:
        """A text that stays on this machine, as the configuration with its paths."""
        self._harmlessly(lambda: self._text(tag, text))

    def hyperparameters(self, values: Mapping[str, Hyperparameter]) -> None:
        """What this run is compared by; once, before the first point."""
        self._harmlessly(lambda: self._hyperparameters(values))

    def flush(self) -> None:
        """Let others see what was given so far."""
        self._harmlessly(self._flush)

    def close(self, finals: Mapping[str, float], failed: bool = False) -> None:
        """End the run, whose last values are `finals`; more calls do nothing."""
        self._harmlessly(lambda: self._close(finals, failed))
        self._works = False

    @abstractmethod
    def _open(self) -> None: ...

    @abstractmethod
    def _scalars(self, step: int, wall_time: float, values: Mapping[str, float], epoch: int | None) -> None: ...

    @abstractmethod
    def _image(self, tag: str, picture: Picture, step: int) -> None: ...

    @abstractmethod
    def _text(self, tag: str, text: str) -> None: ...

    @abstractmethod
    def _hyperparameters(self, values: Mapping[str, Hyperparameter]) -> None: ...

    @abstractmethod
    def _flush(self) -> None: ...

    @abstractmethod
    def _close(self, finals: Mapping[str, float], failed: bool) -> None: ...

    def _harmlessly(self, action: Callable[[], None]) -> None:
        if not self._works:
            return
        # A full disk, a missing package, a protobuf that does not fit, a service that is away: whatever breaks the log
        # must not end a training of many hours, so every exception is taken here.
        try:
            action()
        except Exception as problem:
            self._works = False
            logger.warning(
                "%s: %s cannot be written (%s: %s); the training goes on without it%s",
                self._name,
                self._place,
                type(problem).__name__,
                problem,
                f"; {self._install}" if isinstance(problem, ImportError) else "",
            )


class EventFile(Tracker):
    """A TensorBoard event file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file: Any = None
        super().__init__("TensorBoard", str(folder), "pip install tensorboard")

    def _open(self) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.folder.mkdir(parents=True, exist_ok=True)
        # Nanoseconds tell two runs of the same second apart.
        self._file = (self.folder / f"events.out.tfevents.{time.time_ns()}").open("xb")
        self._records = RecordWriter(self._file)
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._records.write(self._event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        self._flush()

    def _scalars(self, step: int, wall_time: float, values: Mapping[str, float], epoch: int | None) -> None:
        points = [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(self._summary(value=points), step if epoch is None else epoch, wall_time)

    def _image(self, tag: str, picture: Picture, step: int) -> None:
        from PIL import Image

        stored = io.BytesIO()
        Image.fromarray(picture).save(stored, format="PNG")
        height, width, channels = picture.shape
        value = self._summary.Image(
            height=height, width=width, colorspace=channels, encoded_image_string=stored.getvalue()
        )
        self._write(self._summary(value=[self._summary.Value(tag=tag, image=value)]), step)

    def _text(self, tag: str, text: str) -> None:
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
        from tensorboard.plugins.text.metadata import create_summary_metadata

        # The page reads it as Markdown, which would run the lines together.
        content = TensorProto(
            dtype="DT_STRING",
            string_val=[f"```\n{text}\n```".encode()],
            tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
        )
        value = self._summary.Value(tag=tag, metadata=create_summary_metadata(tag, ""), tensor=content)
        self._write(self._summary(value=[value]), 0)

    def _hyperparameters(self, values: Mapping[str, Hyperparameter]) -> None:
        from tensorboard.plugins.hparams import metadata, plugin_data_pb2

        # No description of an experiment beside it: from one, the page would show the hyper-parameters of the first
        # run alone; without, those of all runs, and the last value of every curve as a metric.
        started = plugin_data_pb2.SessionStartInfo(start_time_secs=time.time())
        for name, value in values.items():
            field = "bool_value" if isinstance(value, bool) else "string_value"
            setattr(started.hparams[name], "number_value" if type(value) in (int, float) else field, value)
        content = plugin_data_pb2.HParamsPluginData(session_start_info=started)
        self._write_session(metadata.SESSION_START_INFO_TAG, content)

    def _flush(self) -> None:
        self._file.flush()

    def _close(self, finals: Mapping[str, float], failed: bool) -> None:
        from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

        status = api_pb2.STATUS_FAILURE if failed else api_pb2.STATUS_SUCCESS
        ended = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
        content = plugin_data_pb2.HParamsPluginData(session_end_info=ended)
        self._write_session(metadata.SESSION_END_INFO_TAG, content)
        self._file.close()

    def _write_session(self, tag: str, content: Any) -> None:
        from tensorboard.plugins.hparams import metadata

        described = metadata.create_summary_metadata(content)
        value = self._summary.Value(tag=tag, metadata=described, tensor=metadata.NULL_TENSOR)
        self._write(self._summary(value=[value]), 0)

    def _write(self, summary: Any, step: int, wall_time: float | None = None) -> None:
        event = self._event(wall_time=time.time() if wall_time is None else wall_time, step=step, summary=summary)
        self._records.write(event.SerializeToString())


class JsonLines(Tracker):
    """A file with a JSON object a line: `{"step": 5, "wall_time": 1.7e9, "loss/current": 0.1, ...}`.

    What is of a whole epoch also has `epoch`; a number that is not finite is null. Other lines have `hyperparameters`,
    `text`, `picture` (its name alone) or, at the end, `final` in place of the numbers.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None
        super().__init__("JSON lines", str(path), "")

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8", newline="\n")

    def _scalars(self, step: int, wall_time: float, values: Mapping[str, float], epoch: int | None) -> None:
        moment = {"step": step} if epoch is None else {"step": step, "epoch": epoch}
        self._write(moment | {"wall_time": wall_time} | _finite(values))

    def _image(self, tag: str, picture: Picture, step: int) -> None:
        self._write({"step": step, "wall_time": time.time(), "picture": tag})

    def _text(self, tag: str, text: str) -> None:
        self._write({"wall_time": time.time(), "text": {tag: text}})

    def _hyperparameters(self, values: Mapping[str, Hyperparameter]) -> None:
        self._write({"wall_time": time.time(), "hyperparameters": dict(values)})

    def _flush(self) -> None:
        self._file.flush()

    def _close(self, finals: Mapping[str, float], failed: bool) -> None:
        self._write({"wall_time": time.time(), "final": _finite(finals), "failed": failed})
        self._file.close()

    def _write(self, content: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no NaN and no infinity."""
    return {tag: value if math.isfinite(value) else None for tag, value in values.items()}
