"""The methods that `learn.py` compares, each as the command line that a user would type.

Rates, ranks and updates were chosen on the concepts of `learn_concepts.TUNED`, never on those that are reported.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from learn_concepts import Concept

Data = Literal["captions", "metadata", "reg"]

BATCH = 4
"""Pictures of the concept in each update; regularisation images come beside them."""


@dataclass(frozen=True)
class Method:
    """A way to teach a concept."""

    name: str
    command: str
    """Of `sd-train`; "diffusers": the bare re-statement; "": nothing is trained."""
    updates: int
    rate: float
    options: str = ""
    """The rest of the command line; {word}, {start} and {class_prompt} are the concept's."""
    data: Data = "captions"

    @property
    def file_kind(self) -> Literal["model", "network", "embedding"]:
        """What the trained file is to `sd-train sample`."""
        if self.command.startswith("train_textual_inversion"):
            return "embedding"
        return "network" if self.command in ("train_network", "diffusers") else "model"


@dataclass(frozen=True)
class Place:
    """Where a run finds what it needs, and leaves what it makes."""

    model: Path
    dataset: Path
    """Folder of the concept's dataset files."""
    output: Path


def arguments(method: Method, concept: Concept, seed: int, place: Place) -> list[str]:
    """The command line of a run, behind `sd-train`."""
    named = {"word": concept.word, "start": concept.start, "class_prompt": concept.class_prompt}
    line = f"""{method.command}
        --pretrained_model_name_or_path {shlex.quote(str(place.model))}
        --dataset_config {shlex.quote(str(place.dataset / f"{method.data}.toml"))}
        --output_dir {shlex.quote(str(place.output))} --output_name {concept.word} --overwrite
        --seed {seed} --max_train_steps {method.updates} --learning_rate {method.rate} --lr_scheduler constant
        --cache_latents --max_data_loader_n_workers 0 """
    return shlex.split(line + method.options.format(**named))


LORA_RANK = 8
_LOSS = "--min_snr_gamma 5 --min_timestep 300"
"""Shape, colours and style are settled while a picture is mostly noise; finer things the base model draws already."""
_LORA = f"--network_dim {LORA_RANK} --network_alpha {LORA_RANK} {_LOSS}"
_LYCORIS = f"--network_module lycoris.kohya {_LORA} --network_args"
_FROZEN = "--prior_preservation frozen --class_prompt '{class_prompt}'"
_WORD = f"--token_string {{word}} --init_word {{start}} --num_vectors_per_token 4 {_LOSS}"

BASE = Method("base model", "", 0, 0.0)
"""Nothing learned: what all others are compared with."""

METHODS = (
    Method("full", "fine_tune", 120, 1.5e-4, f"--train_text_encoder {_LOSS}", data="metadata"),
    Method("dreambooth", "train_db", 100, 2e-4, _LOSS),
    Method("dreambooth, reg images", "train_db", 150, 2e-4, _LOSS, data="reg"),
    Method("dreambooth, frozen prior", "train_db", 150, 2e-4, f"{_LOSS} {_FROZEN}"),
    Method("lora", "train_network", 150, 2e-3, _LORA),
    Method("lora, reg images", "train_network", 250, 2e-3, _LORA, data="reg"),
    Method("locon", "train_network", 120, 1.2e-3, f"{_LORA} --network_args conv_dim=4 conv_alpha=4"),
    Method("loha", "train_network", 80, 1.2e-3, f"{_LYCORIS} algo=loha"),
    Method("lokr", "train_network", 120, 1.5e-3, f"{_LYCORIS} algo=lokr factor=4"),
    Method("ti", "train_textual_inversion", 100, 5e-2, _WORD),
    Method("xti", "train_textual_inversion_XTI", 100, 5e-2, _WORD),
    Method("diffusers lora", "diffusers", 150, 2e-3),
)
