"""Which datasets a run asks for: run options -> `DatasetRequest`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sd_train.data.config import DatasetRequest, dataset_fallbacks


def dataset_request(command: str, options: Mapping[str, Any]) -> DatasetRequest:
    """The request of `command` whose valid run options are `options`, by name."""
    return DatasetRequest(
        command=command,
        dataset_config=options.get("dataset_config"),
        train_data_dir=options.get("train_data_dir"),
        reg_data_dir=options.get("reg_data_dir"),
        in_json=options.get("in_json"),
        fallbacks=dataset_fallbacks(options),
        masked_loss=bool(options.get("masked_loss")),
        caches_latents=bool(options.get("cache_latents") or options.get("cache_latents_to_disk")),
    )
