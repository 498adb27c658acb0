"""Where and how the arithmetic runs: ranks, dtypes, gradient reduction, and the optimizer step."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn

from sd_train.errors import ConfigError, RunError
from sd_train.optim.optimizers import rate_figures

Precision = Literal["no", "fp16", "bf16"]
DTYPES: dict[str, torch.dtype] = {
    "no": torch.float32,
    "float": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}

COMPARE_RANKS_EVERY = 100
"""Updates."""


@dataclass(frozen=True)
class Device:
    """One rank's device."""

    device: torch.device
    precision: Precision
    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and speaks."""
        return self.rank == 0

    @property
    def weight_dtype(self) -> torch.dtype:
        """Dtype of the frozen weights."""
        return DTYPES[self.precision]

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision around forward passes; float32 weights stay what they are."""
        if self.precision == "no":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.weight_dtype)

    def move(self, tensor: Tensor) -> Tensor:
        """`tensor` on this device; the copy does not wait."""
        return tensor.to(self.device, non_blocking=True)

    def sum(self, value: Tensor) -> Tensor:
        """The sum of `value` over all ranks; without others, `value` itself."""
        if self.world > 1:
            distributed.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank; waits for all of them."""
        if self.world == 1:
            return flag
        said = torch.tensor(int(flag), device=self.device)
        distributed.all_reduce(said, distributed.ReduceOp.MAX)
        return bool(said)

    def shared(self, value: int) -> int:
        """The main rank's `value`, on every rank."""
        if self.world == 1:
            return value
        said = [value]
        distributed.broadcast_object_list(said, src=0)
        return said[0]

    def gather(self, own: Sequence[str]) -> list[str]:
        """What every rank has, in their order; waits for all of them."""
        if self.world == 1:
            return [*own]
        said: list[Any] = [None] * self.world
        distributed.all_gather_object(said, [*own])
        return [text for texts in said for text in texts]

    def close(self) -> None:
        """Leave the group of ranks."""
        if self.world > 1 and distributed.is_initialized():
            distributed.destroy_process_group()

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            distributed.barrier()


def out_of_memory(problem: BaseException) -> bool:
    """Only CUDA has an error of its own for it; the CPU's and Apple's are plain ones."""
    if isinstance(problem, torch.OutOfMemoryError | MemoryError):
        return True
    said = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")
    return any(words in str(problem) for words in said)


def free_memory() -> None:
    """Give back what nothing uses any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def open_device(precision: Precision) -> Device:
    """The device of this process; joins the other ranks when `accelerate launch` or `torchrun` started several.

    Raises:
        ConfigError: if the device cannot compute in `precision`.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ConfigError("--mixed_precision = 'bf16': this GPU has no bf16; use fp16")
    elif torch.backends.mps.is_available():
        device = torch.device("mps")
    else:
        device = torch.device("cpu")
    if world > 1:
        join_ranks()
    return Device(device, precision, rank, world)


def join_ranks(meeting: str | None = None) -> None:
    """Make the group of the ranks that the launcher started, if there is none; waits for all of them.

    `meeting`: where they meet, as torch's `init_method`; None: the launcher's own store, which only the first group of
    a process can be made through.
    """
    if distributed.is_initialized():
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if meeting is None:
        distributed.init_process_group(backend)
    else:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        distributed.init_process_group(backend, init_method=meeting, rank=rank, world_size=world)


@dataclass
class GradScaler:
    """Keeps fp16 gradients in range (Micikevicius et al. 2018): doubles now and then, halves when they overflow."""

    scale: float = 65536.0
    growth_interval: int = 2000
    good_steps: int = 0

    def update(self, finite: bool) -> None:
        """Count one step."""
        if not finite:
            self.scale, self.good_steps = max(1.0, self.scale / 2.0), 0
            return
        self.good_steps += 1
        if self.good_steps >= self.growth_interval:
            self.scale, self.good_steps = self.scale * 2.0, 0

    def state(self) -> dict[str, float]:
        """What a resume needs."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load(self, state: dict[str, float]) -> None:
        """Go on from `state`."""
        self.scale, self.good_steps = float(state["scale"]), int(state["good_steps"])


class Updater:
    """Gradients of the micro-batches -> one optimizer step: sum over ranks, unscale, clip, step, zero."""

    def __init__(
        self,
        device: Device,
        optimizer: torch.optim.Optimizer,
        groups: Sequence[Sequence[nn.Parameter]],
        max_norm: float,
    ) -> None:
        self.device, self.optimizer = device, optimizer
        self.groups = [list(group) for group in groups]
        # A list: an iterator would be consumed by the first user, and clipping would silently do nothing.
        self.params = [parameter for group in self.groups for parameter in group]
        self.max_norm = max_norm
        self.scaler = GradScaler() if device.precision == "fp16" else None
        self.skipped = 0
        self._steps = 0

    def renew(self) -> None:
        """Let every group learn again, as before the first `set_rates`."""
        for parameter in (parameter for group in self.groups for parameter in group):
            parameter.requires_grad_(True)
        self.params = [parameter for group in self.groups for parameter in group]

    def set_rates(self, rates: Sequence[float], active: Sequence[bool]) -> None:
        """Set the learning rate of each group, in order; one that is not `active` any more is left alone for good."""
        for group, rate in zip(self.optimizer.param_groups, rates, strict=bool(self.groups)):
            group["lr"] = rate
        stopped = [group for group, on in zip(self.groups, active, strict=True) if not on]
        # Without gradients optimizers pass over them, weight decay and momentum included, and no graph is built.
        for parameter in (parameter for group in stopped for parameter in group if parameter.requires_grad):
            parameter.requires_grad_(False)
            parameter.grad = None
        if stopped:
            learning = zip(self.groups, active, strict=True)
            self.params = [parameter for group, on in learning if on for parameter in group]

    def taken_rates(self, rates: Mapping[str, float]) -> Mapping[str, float]:
        """`rates`; nothing where the optimizer goes by rates of its own, which are among the figures."""
        chosen = any(group.get("relative_step") is True for group in self.optimizer.param_groups)
        return {} if chosen else rates

    def figures(self) -> dict[str, float | Tensor]:
        """What is worth logging: the step size that the optimizer estimated; how many updates were skipped, with fp16
        because they overflowed; and with fp16 the scale of the gradients."""
        figures = rate_figures(self.optimizer)
        if self.scaler is not None:
            figures["grad_scale"] = self.scaler.scale
        if self.scaler is not None or self.skipped:
            figures["skipped_updates"] = self.skipped
        return figures

    def state(self) -> dict[str, int]:
        """What its figures need to go on after a resume."""
        return {"skipped": self.skipped}

    def load(self, state: Mapping[str, int]) -> None:
        """Go on from `state`."""
        self.skipped = int(state["skipped"])

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`, a scalar; there are none where dropout left every module out of the batch."""
        if not self.params or not loss.requires_grad:
            return
        scaled = loss if self.scaler is None else loss * self.scaler.scale
        torch.autograd.backward(scaled)

    def step(self, look: Callable[[], None] | None = None) -> Tensor:
        """Take one optimizer step; returns the gradients' norm before clipping, on the device. See `reduce`."""
        norm = self.reduce(look)
        self.apply(norm)
        return norm

    def reduce(self, look: Callable[[], None] | None = None) -> Tensor:
        """Make the gradients those of the whole update; returns their norm, on the device.

        `look` is called when they are, and not yet clipped.
        """
        gradients = [gradient_of(parameter) for parameter in self.params]
        if self.device.world > 1:
            reduce_gradients(gradients)
        if not self.params:
            return torch.zeros((), device=self.device.device)
        if self.scaler is not None:
            torch._foreach_mul_(gradients, 1.0 / self.scaler.scale)
        if look is not None:
            look()
        return nn.utils.get_total_norm(gradients, foreach=True if self.device.device.type != "mps" else None)

    def suspicious(self, norm: Tensor) -> Tensor:
        """`norm`, or 0 where the scale of fp16's gradients takes care of those that overflow."""
        return norm if self.scaler is None or self.scaler.scale <= 1.0 else torch.zeros_like(norm)

    def apply(self, norm: Tensor) -> None:
        """Take the optimizer's step by the gradients, whose `norm` `reduce` gave."""
        if not self.params:
            return
        # In fp16 an overflow must be known before the step, which is the only wait of the host inside an update.
        finite = self.scaler is None or bool(torch.isfinite(norm))
        if finite:
            if self.max_norm > 0:
                nn.utils.clip_grads_with_norm_(self.params, self.max_norm, norm, foreach=True)
            self.optimizer.step()
        else:
            self.skipped += 1
        if self.scaler is not None:
            self.scaler.update(finite)
        self.optimizer.zero_grad(set_to_none=True)
        self._steps += 1
        if self.device.world > 1 and self._steps % COMPARE_RANKS_EVERY == 0:
            compare_ranks(self.params)

    def drop(self) -> None:
        """Leave the gradients without a step."""
        self.optimizer.zero_grad(set_to_none=True)


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """Its gradient; where nothing depended on it, zero: the same whether another rank's batch did or not."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def compare_ranks(params: Sequence[nn.Parameter]) -> None:
    """Find out whether all ranks still hold the same weights; they compute the same updates, so they must.

    Raises:
        RunError: if not.
    """
    total = torch.stack([parameter.detach().double().sum() for parameter in params]).sum()
    # Where all hold what is no number, they have not drifted apart: whoever watches the losses says more of it.
    total = torch.stack([total.nan_to_num(0.0, 0.0, 0.0), total.isfinite().double()])
    lowest, highest = total.clone(), total.clone()
    distributed.all_reduce(lowest, distributed.ReduceOp.MIN)
    distributed.all_reduce(highest, distributed.ReduceOp.MAX)
    if not torch.equal(lowest, highest):
        raise RunError(
            f"the processes' weights have drifted apart (sums {float(lowest[0])!r} to {float(highest[0])!r}); "
            "use the same software and the same kind of device in all of them, and go back to the last save"
        )


def reduce_gradients(gradients: Sequence[Tensor], bucket_elements: int = 16 * 2**20) -> None:
    """Sum the gradients over all ranks, in place, in flat buckets."""
    bucket: list[Tensor] = []
    size = 0
    for place, given in enumerate(gradients):
        bucket.append(given)
        size += given.numel()
        if size >= bucket_elements or place == len(gradients) - 1:
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            distributed.all_reduce(flat)
            for gradient, summed in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(summed.view_as(gradient))
            bucket, size = [], 0
