"""`train_network` with LyCORIS: the options of a network -> what learns."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from sd_train.config.lycoris_args import NETWORK_OPTIONS, read_lycoris
from sd_train.device import DTYPES
from sd_train.errors import ModelError
from sd_train.families.sources import open_file, read_all
from sd_train.lora_files.reading import lora_from_tensors
from sd_train.plan import Prepared
from sd_train.trainables.base import Trainable
from sd_train.trainables.lycoris import Lycoris, LycorisSettings
from sd_train.trainables.lycoris_module import library_class


def make(prepared: Prepared) -> Trainable:
    """The network that the options describe, not yet in a model.

    Raises:
        UserError: if the library is missing, or a file that it starts from is another's.
    """
    config = prepared.config
    network = config.network
    args = read_lycoris({name: getattr(network, name) for name in NETWORK_OPTIONS})
    library_class(args.algorithm)
    precision = config.saving.save_precision
    return Lycoris(
        LycorisSettings(
            args=args,
            rates=prepared.plan.rates,
            seed=prepared.progress.seed,
            precision=None if precision is None else DTYPES[precision],
            most_norm=network.scale_weight_norms,
            start=_start(prepared),
        )
    )


def _start(prepared: Prepared) -> dict[str, Tensor] | None:
    """What `--network_weights` holds; a resumed training starts from its state."""
    path = prepared.config.network.network_weights
    if path is None or prepared.resume is not None or prepared.kind is None:
        return None
    return _network_weights(path, prepared.kind.family)


def _network_weights(path: Path, family: str) -> dict[str, Tensor]:
    source, metadata = open_file(path)
    weights = read_all(source)
    try:
        lora_from_tensors(weights, metadata, family, str(path))
    except ModelError as problem:
        raise ModelError(
            f"--network_weights = {path}: holds no LyCORIS network ({problem}); a base model is given with "
            "--pretrained_model_name_or_path"
        ) from None
    return weights
