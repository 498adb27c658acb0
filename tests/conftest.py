"""Every test runs on one thread of the CPU and without network."""

from __future__ import annotations

import gc
import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

torch.set_num_threads(1)
# Models are graphs of many objects, which Python's own thresholds search for cycles while they are made.
gc.set_threshold(10_000, 20, 10)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion 1.x model, one `.safetensors` in half precision."""
    from tests.models import write_file

    return write_file(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with two levels instead of four, for what depends on no level: a run takes half the time with it."""
    from tests.models import write_small_file

    return write_small_file(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as a diffusers folder in float32."""
    from tests.models import write_folder

    return write_folder(tmp_path_factory.mktemp("folder"))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many images and captions the model's encoders have seen."""
    from sd_train.families.latent import LatentDiffusion

    counts = {"images": 0, "texts": 0}
    for name in counts:
        real = getattr(LatentDiffusion, f"encode_{name}")

        def counting(self, rows, name=name, real=real):  # type: ignore[no-untyped-def]
            counts[name] += len(rows)
            return real(self, rows)

        monkeypatch.setattr(LatentDiffusion, f"encode_{name}", counting)
    return counts
