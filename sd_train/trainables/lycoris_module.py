"""One module of a LyCORIS network: the library's parameters, put beside a layer that stays as it is.

The library draws dropout from torch's and Python's global generators, rounds the changed weight to the base model's
precision before it takes the difference, and picks GPU kernels by timing them. None of that repeats, so the forward
pass is put together here from the library's own formulas, computed in float32.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sd_train.config.lycoris_args import Algorithm, LycorisArgs
from sd_train.errors import ConfigError
from sd_train.randomness import derive, stream
from sd_train.trainables.lycoris_changes import CHANGES, base_of, decomposed
from sd_train.trainables.lycoris_targets import Target, has_kernel

_CLASSES: dict[str, str] = {
    "lora": "locon:LoConModule",
    "loha": "loha:LohaModule",
    "lokr": "lokr:LokrModule",
    "ia3": "ia3:IA3Module",
    "dylora": "dylora:DyLoraModule",
    "glora": "glora:GLoRAModule",
    "full": "full:FullModule",
    "diag-oft": "diag_oft:DiagOFTModule",
    "boft": "boft:ButterflyOFTModule",
    "norm": "norms:NormModule",
}
"""`module:Class` in `lycoris.modules` by algorithm."""


@dataclass
class Switches:
    """What all modules of one network share at run time."""

    enabled: bool = True
    training: bool = True
    """Whether anything is drawn at random."""
    key: tuple[int, int] = (0, 0)
    """(update, micro-batch): everything random is drawn from these."""


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Without what the library `name` would tell below errors."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def library_class(algorithm: str) -> Any:
    """The library's class of an algorithm.

    Raises:
        ConfigError: with the install line, if the library is missing.
    """
    module, _, name = _CLASSES[algorithm].partition(":")
    try:
        # bitsandbytes, which it looks for, speaks of kernels that nothing here needs.
        with _quiet("bitsandbytes"):
            return getattr(importlib.import_module(f"lycoris.modules.{module}"), name)
    except ImportError as problem:
        raise ConfigError(
            f"--network_module: algo={algorithm} needs the package lycoris-lora ({problem}); pip install lycoris-lora"
        ) from None


@contextmanager
def _derived(seed: int, name: str) -> Iterator[None]:
    """Initial values are drawn from (`seed`, `name`), in silence; the global generator stays as it was."""
    with _quiet("LyCORIS"), torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also seed the GPUs' generators.
        torch.default_generator.manual_seed(derive(seed, "lycoris", name) % 2**63)
        yield


def _library_module(target: Target, algorithm: Algorithm | str, args: LycorisArgs, seed: int) -> Any:
    conv = has_kernel(target.original)
    rank, alpha = (args.conv_rank, args.conv_alpha) if conv else (args.rank, args.alpha)
    options = dict(args.options)
    if target.on_input:
        options["train_on_input"] = True
    given = {} if algorithm == "norm" else {"lora_dim": rank, "alpha": alpha, **options}
    with _derived(seed, target.key):
        try:
            module = library_class(algorithm)(target.key, target.original, **given)
        except ValueError as problem:
            option = "--network_args conv_dim" if conv else "--network_dim"
            raise ConfigError(
                f"{option} = {rank}: {algorithm} cannot divide {target.key} ({problem}); choose a larger one"
            ) from None
    if algorithm == "full":
        # Copies of the base model's weights, which are only needed where the library takes the layer's place.
        module._org_weight, module.org_bias = [], None
    return module


class LycorisModule:
    """Adds a change of one layer to what the layer gives, by taking the place of its `forward`."""

    def __init__(self, target: Target, args: LycorisArgs, seed: int, algorithm: Algorithm | str | None = None) -> None:
        self.name, self.args, self.seed = target.key, args, seed
        self.algorithm = algorithm or args.algorithm
        self.original = target.original
        self.library: Any = _library_module(target, self.algorithm, args, seed)
        device = next(target.original.parameters()).device
        self.library.to(device=device, dtype=torch.float32)
        for parameter in self.library.parameters():
            parameter.requires_grad_(True)
        self._forward = target.original.forward
        self.parameters: dict[str, nn.Parameter] = {
            _RENAMED.get((self.algorithm, name), name): parameter for name, parameter in self.library.named_parameters()
        }
        self.constants = {
            name: buffer.detach().cpu().to(torch.float32 if name == "alpha" else buffer.dtype)
            for name, buffer in self.library.named_buffers()
            if name in ("alpha", "on_input")
        }

    def install(self, switches: Switches) -> None:
        """Take over the layer's `forward`."""
        self._switches = switches
        # Not by assignment: a module registers what is assigned to it, and its state dict would change.
        self.original.__dict__["forward"] = self.forward

    def forward(self, x: Tensor) -> Tensor:
        """What the layer gives plus what its change gives."""
        base: Tensor = self._forward(x)
        if not self._switches.enabled:
            return base
        # Under autocast the operators cast the float32 change themselves; a half-precision base without it needs this.
        low = x if torch.is_autocast_enabled(x.device.type) else x.float()
        change = self._chained(low) if self._is_chain else self._applied(low)
        if self._switches.training:
            change = self._thinned(change)
        return base + change.to(base.dtype)

    # What is drawn at random

    def _generator(self, purpose: str, device: torch.device) -> torch.Generator:
        # Drawn anew from the counters at every call: a forward that is recomputed (checkpointing) sees the same.
        return torch.Generator(device).manual_seed(derive(self.seed, purpose, self.name, *self._switches.key) % 2**63)

    def _thinned(self, change: Tensor) -> Tensor:
        """`change` after dropout of its values and of the whole module."""
        args = self.args
        if args.dropout and self.algorithm != "norm":
            generator = self._generator("dropout", change.device)
            drawn = torch.rand(change.shape, generator=generator, device=change.device)
            change = change * ((drawn >= args.dropout).to(change.dtype) / (1.0 - args.dropout))
        if args.module_dropout:
            # Multiplied, not left out: the graph is the same in every update, and never empty.
            drawn_once = stream(self.seed, "module_dropout", self.name, *self._switches.key).random()
            change = change * float(drawn_once >= args.module_dropout)
        return change

    def _rows(self, device: torch.device) -> Tensor | None:
        """[out]: which outputs' changes count (`rank_dropout` of LyCORIS); None: all."""
        args = self.args
        if not args.rank_dropout or not self._switches.training:
            return None
        count = int(self.library.shape[0])
        drawn = torch.rand(count, generator=self._generator("rank_dropout", device), device=device)
        kept = (drawn >= args.rank_dropout).float()
        return kept / kept.mean().clamp_min(1.0 / count) if args.rank_dropout_scale else kept

    def _block(self) -> int:
        """DyLoRA (Valipour et al. 2023): the block of ranks that is trained; all below it only take part."""
        last = int(self.library.block_count) - 1
        if not self._switches.training:
            return last
        return stream(self.seed, "dylora", self.name, *self._switches.key).randint(0, last)

    # Two factors after one another

    @property
    def _is_chain(self) -> bool:
        """Whether two small factors are applied one after the other, which is less work than their product."""
        return self.algorithm == "dylora" or (self.algorithm == "lora" and not self.args.decomposed)

    def _chained(self, x: Tensor) -> Tensor:
        down, mid, up, scale = self._factors()
        if isinstance(self.original, nn.Conv2d):
            places = {name: self.library.kw_dict[name] for name in ("stride", "padding", "dilation")}
            hidden = functional.conv2d(x, down, **({} if mid is not None else places))
            if mid is not None:
                hidden = functional.conv2d(hidden, mid, **places)
            change = functional.conv2d(hidden, up) * scale
        else:
            change = functional.linear(functional.linear(x, down), up) * scale
        rows = self._rows(x.device) if self.algorithm == "lora" else None
        if rows is None:
            return change
        return change * (rows.view(-1, 1, 1) if isinstance(self.original, nn.Conv2d) else rows).to(change.dtype)

    def _factors(self) -> tuple[Tensor, Tensor | None, Tensor, float | Tensor]:
        """down, mid (Tucker's form), up and the scale."""
        library = self.library
        if self.algorithm == "lora":
            mid = library.lora_mid.weight if library.tucker else None
            return library.lora_down.weight, mid, library.lora_up.weight, library.scalar * library.scale
        block = self._block()
        # The library's own scale, alpha / (block + 1), is not that of the file it writes unless blocks have one rank.
        down, up, _ = library.get_weight(block * library.block_size)
        rank = (block + 1) * library.block_size
        if isinstance(self.original, nn.Conv2d):
            down, up = down.view(rank, -1, *library.shape[2:]), up.view(-1, rank, 1, 1)
        return down, None, up, float(self.constants["alpha"]) / rank

    # The change of the weight

    def _applied(self, x: Tensor) -> Tensor:
        """What the change of the weight, and of the bias, makes of `x`."""
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.change()
        change: Tensor = self.library.op(x, weight=weight, bias=bias, **self.library.kw_dict)
        return change

    def change(self) -> tuple[Tensor, Tensor | None]:
        """The change of weight and bias, float32, of their shapes."""
        library = self.library
        if self.algorithm == "norm":
            return library.w_norm, library.b_norm
        rows = self._rows(library.device)
        if self.algorithm == "full":
            weight, bias = library.weight, library.bias
            if rows is None:
                return weight, bias
            return _by_row(rows, weight) * weight, None if bias is None else rows * bias
        change = CHANGES[self.algorithm](self.library, self.original)
        if rows is not None:
            change = _by_row(rows, change) * change
        if self.args.decomposed:
            base = base_of(self.original)
            change = decomposed(library, base + change) - base
        return change, None

    def limit(self, most: float) -> None:
        """Scale the factors down where the norm of the change is above `most` (sd-scripts' rule); of rotations it is
        the norm of their blocks, as in LyCORIS."""
        if self.algorithm == "norm":
            return
        factors = [parameter for name, parameter in self.parameters.items() if name not in _UNSCALED]
        with torch.no_grad():
            rotates = self.algorithm in _ROTATIONS
            size = (self.library.oft_blocks if rotates else CHANGES[self.algorithm](self.library, self.original)).norm()
            ratio = (most / size.clamp_min(most / 2)).clamp_max(1.0)
            # The change is a product of so many of them, or a sum of such products.
            power = {"glora": 2, "dylora": 2}.get(self.algorithm, len(factors))
            for factor in factors:
                factor.mul_(ratio ** (1.0 / power))


_ROTATIONS = ("diag-oft", "boft")
_UNSCALED = ("scalar", "dora_scale", "rescale", "diff_b")
"""Parameters that the norm of the change is not limited by."""

_RENAMED = {("full", "weight"): "diff", ("full", "bias"): "diff_b"}
"""Parameters of the library that have other names in files."""


def _by_row(rows: Tensor, weight: Tensor) -> Tensor:
    return rows.view(-1, *[1] * (weight.ndim - 1))
