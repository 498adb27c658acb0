"""Every optimizer of the registry as its package documents it, on one small problem; also a process of its own."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import dadaptation
import dadaptation.experimental
import lion_pytorch
import prodigyopt
import prodigyplus
import pytorch_optimizer
import schedulefree
import torch
import transformers.optimization
from safetensors.torch import load_file, save_file
from torch import Tensor, nn, optim

from sd_train.families.sources import DictSource
from sd_train.families.streaming import put_safetensors
from sd_train.optim.optimizers import make_optimizer
from sd_train.state import StateParts, load_optimizer_state, optimizer_state
from sd_train.trainables.base import ParamGroup
from sd_train.trainables.lora import Lora, LoraSettings

SHAPES = {"matrix": (128, 96), "wide": (24, 400), "convolution": (8, 4, 3, 3), "vector": (40,)}
"""The matrices are large enough for state of 8 bits, the others are not; 9,600 is no multiple of its blocks."""
DECAY = {"weight_decay": 0.05}
Groups = Sequence[Mapping[str, Any]]


class MuonBesideAdamW:
    """The two optimizers that ours is made of, as they are used alone; convolutions as matrices that share memory."""

    def __init__(self, groups: Groups) -> None:
        same = {"lr": 0.01, **DECAY}
        self.weights = [p for g in groups for p in g["params"] if p.ndim > 1]
        self.matrices = [nn.Parameter(p.detach().flatten(1)) for p in self.weights]
        places = {id(p): matrix for p, matrix in zip(self.weights, self.matrices, strict=True)}
        wide = [{**g, "params": [places[id(p)] for p in g["params"] if p.ndim > 1]} for g in groups]
        others = [{**g, "params": [p for p in g["params"] if p.ndim <= 1]} for g in groups]
        muon = optim.Muon([g for g in wide if g["params"]], adjust_lr_fn="match_rms_adamw", **same)
        self.both = muon, optim.AdamW([g for g in others if g["params"]], **same)

    def step(self) -> None:
        for weight, matrix in zip(self.weights, self.matrices, strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        for optimizer in self.both:
            optimizer.step()


NESTEROV = {"momentum": 0.9, "nesterov": True, **DECAY}
D_ADAPT = {"lr": 1.0, **DECAY}

# Name -> rate, the class with what `--optimizer_type NAME` stands for.
REFERENCES: dict[str, tuple[float, Callable[[Groups], Any]]] = {
    "AdamW": (0.01, lambda groups: optim.AdamW(groups, fused=True, **DECAY)),
    "AdamW8bit": (0.01, lambda groups: bnb.optim.AdamW8bit(groups, **DECAY)),
    "PagedAdamW": (0.01, lambda groups: bnb.optim.PagedAdamW(groups, **DECAY)),
    "PagedAdamW8bit": (0.01, lambda groups: bnb.optim.PagedAdamW8bit(groups, **DECAY)),
    "PagedAdamW32bit": (0.01, lambda groups: bnb.optim.PagedAdamW32bit(groups, **DECAY)),
    "Lion8bit": (0.003, lambda groups: bnb.optim.Lion8bit(groups, **DECAY)),
    "PagedLion8bit": (0.003, lambda groups: bnb.optim.PagedLion8bit(groups, **DECAY)),
    "SGDNesterov8bit": (0.05, lambda groups: bnb.optim.SGD8bit(groups, lr=0.05, **NESTEROV)),
    "Lion": (0.003, lambda groups: lion_pytorch.Lion(groups, **DECAY)),
    "SGDNesterov": (0.05, lambda groups: optim.SGD(groups, **NESTEROV)),
    "DAdaptAdamPreprint": (1.0, lambda groups: dadaptation.experimental.DAdaptAdamPreprint(groups, **D_ADAPT)),
    "DAdaptAdaGrad": (1.0, lambda groups: dadaptation.DAdaptAdaGrad(groups, **D_ADAPT)),
    "DAdaptAdam": (1.0, lambda groups: dadaptation.DAdaptAdam(groups, **D_ADAPT)),
    "DAdaptAdan": (1.0, lambda groups: dadaptation.DAdaptAdan(groups, **D_ADAPT)),
    "DAdaptAdanIP": (1.0, lambda groups: dadaptation.experimental.DAdaptAdanIP(groups, **D_ADAPT)),
    "DAdaptLion": (1.0, lambda groups: dadaptation.DAdaptLion(groups, **D_ADAPT)),
    "DAdaptSGD": (1.0, lambda groups: dadaptation.DAdaptSGD(groups, **D_ADAPT)),
    "Prodigy": (1.0, lambda groups: prodigyopt.Prodigy(groups, **DECAY)),
    "ProdigyPlusScheduleFree": (1.0, lambda groups: prodigyplus.ProdigyPlusScheduleFree(groups, **DECAY)),
    "AdaFactor": (0.01, lambda groups: transformers.optimization.Adafactor(groups, relative_step=True, **DECAY)),
    "CAME": (0.003, lambda groups: pytorch_optimizer.CAME(groups, **DECAY)),
    "AdamWScheduleFree": (0.01, lambda groups: schedulefree.AdamWScheduleFree(groups, **DECAY)),
    "SGDScheduleFree": (0.3, lambda groups: schedulefree.SGDScheduleFree(groups, **DECAY)),
    "RAdamScheduleFree": (0.01, lambda groups: schedulefree.RAdamScheduleFree(groups, **DECAY)),
    "Muon": (0.01, MuonBesideAdamW),
    "Adadelta": (1.0, lambda groups: optim.Adadelta(groups, **DECAY)),
    "Adagrad": (0.05, lambda groups: optim.Adagrad(groups, **DECAY)),
    "Adam": (0.01, lambda groups: optim.Adam(groups, **DECAY)),
    "Adamax": (0.01, lambda groups: optim.Adamax(groups, **DECAY)),
    "ASGD": (0.05, lambda groups: optim.ASGD(groups, **DECAY)),
    "NAdam": (0.01, lambda groups: optim.NAdam(groups, **DECAY)),
    "RAdam": (0.01, lambda groups: optim.RAdam(groups, **DECAY)),
    "RMSprop": (0.003, lambda groups: optim.RMSprop(groups, **DECAY)),
    "Rprop": (0.01, optim.Rprop),
    "SGD": (0.05, lambda groups: optim.SGD(groups, **DECAY)),
}


class Problem:
    """Parameters in two groups that are drawn to targets by noisy gradients, the same whenever a step is taken."""

    def __init__(self, name: str, ours: bool = True) -> None:
        generator = torch.Generator().manual_seed(7)
        self.params = {key: nn.Parameter(torch.randn(shape, generator=generator)) for key, shape in SHAPES.items()}
        self.targets = {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}
        rate, reference = REFERENCES[name]
        names = list(SHAPES)
        rates = (rate, rate) if rate == 1.0 else (rate, rate / 2)
        self.groups = [
            ParamGroup("one", {key: self.params[key] for key in names[::2]}, rates[0]),
            ParamGroup("two", {key: self.params[key] for key in names[1::2]}, rates[1]),
        ]
        given = [{"params": list(group.params.values()), "lr": group.lr} for group in self.groups]
        decay = {} if name == "Rprop" else DECAY
        self.optimizer = make_optimizer(name, given, decay) if ours else reference(given)
        if not ours and hasattr(self.optimizer, "train"):
            self.optimizer.train()
        self.steps = 0

    def train(self, steps: int) -> None:
        for _ in range(steps):
            generator = torch.Generator().manual_seed(self.steps)
            for key, parameter in self.params.items():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.grad = parameter.detach() - self.targets[key] + 0.1 * noise
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Paged state is for GPUs alone.
                self.optimizer.step()
            self.steps += 1

    @property
    def parts(self) -> StateParts:
        trainable = Lora(LoraSettings(4, 4.0, 0.0, {}, 0))
        return StateParts(trainable, self.groups, self.optimizer, {}, "", "")

    def weights(self) -> dict[str, Tensor]:
        return {key: parameter.detach().clone() for key, parameter in self.params.items()}


def save(problem: Problem, folder: Path) -> None:
    """The weights and the optimizer's state as a run's state has them."""
    tensors, plain = optimizer_state(problem.parts)
    folder.mkdir()
    save_file(problem.weights(), folder / "weights.safetensors")
    put_safetensors(folder / "optimizer.safetensors", DictSource(tensors), {})
    (folder / "optimizer.json").write_text(json.dumps({"plain": plain, "steps": problem.steps}))


def load(name: str, folder: Path) -> Problem:
    """The problem `name` as `save` left it."""
    problem = Problem(name)
    stored = json.loads((folder / "optimizer.json").read_text())
    with torch.no_grad():
        for key, value in load_file(folder / "weights.safetensors").items():
            problem.params[key].copy_(value)
    load_optimizer_state(problem.parts, load_file(folder / "optimizer.safetensors"), stored["plain"])
    problem.steps = stored["steps"]
    return problem


def go_on(folder: Path, steps: int) -> None:
    """Take `steps` more with every optimizer that has a folder in `folder`, and leave the weights there."""
    for path in sorted(folder.iterdir()):
        problem = load(path.name, path)
        problem.train(steps)
        save_file(problem.weights(), path / "later.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    go_on(Path(sys.argv[1]), int(sys.argv[2]))
