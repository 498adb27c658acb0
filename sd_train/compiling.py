"""The U-Net's computation as compiled graphs: of its repeated blocks, or of the whole.

Which graph computes a batch, and which code that graph has, depends on the batch and on the dataset alone, never on
what came before: a resumed run computes the same bits. So the sizes that vary within a run are symbols from the first
graph on, and every graph is made with one size, the largest bucket's (see `CompiledUnet._rehearse`). Programs
that are kept are found by the names of those symbols, not by that size: it is part of what they are kept under.
"""

from __future__ import annotations

import importlib.util
import os
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sd_train.device import free_memory, out_of_memory
from sd_train.errors import ConfigError, RunError

BLOCKS = ("BasicTransformerBlock",)
"""diffusers' classes of which a U-Net's levels are made, and whose graphs keep their sizes as symbols.

Not `ResnetBlock2D`: inductor fixes the strides of what a convolution keeps for the backward pass (PyTorch 2.13), so
that there would be graphs for each bucket.
"""

_SPATIAL = {"BasicTransformerBlock": (0, 1), "UNet2DConditionModel": (0, 2, 3)}
"""Dimensions of the first argument that vary between batches: samples, and places or height and width."""

_MOST_GRAPHS = 64
"""Of one block class and width, above which the training ends: adapters with many different ranks have some."""

_CACHE = "TORCHINDUCTOR_CACHE_DIR"


@dataclass(frozen=True)
class CompileSettings:
    """What is compiled, and how."""

    scope: Literal["regional", "whole"]
    backend: str
    """A name of torch.compile's."""
    samples: int
    """Of a whole micro-batch."""
    sizes: tuple[tuple[int, int], ...]
    """Height and width in latents of every bucket."""


def check_compiler(backend: str, device: torch.device) -> None:
    """Whether what `backend` generates can be built here.

    Raises:
        ConfigError: if not.
    """
    if backend != "inductor":
        return
    without = "or remove --torch_compile"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ConfigError(
            "--torch_compile: on GPUs it needs the package triton, which is not installed; pip install triton (on "
            f"Windows triton-windows), {without}"
        )
    if device.type == "cpu":
        from torch._inductor import cpp_builder, exc

        try:
            cpp_builder.get_cpp_compiler()
        except (exc.InvalidCxxCompiler, RuntimeError) as problem:
            reason = str(problem).splitlines()[0]
            raise ConfigError(
                f"--torch_compile: on the CPU it needs a C++ compiler, and there is none ({reason}); install g++ or "
                f"clang, or name one in the environment variable CXX, {without}"
            ) from None


def keep_programs(folder: Path) -> None:
    """Keep what is compiled below `folder` for later runs, unless the environment names another place."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # torch puts its own default there as soon as anything asks it for the folder.
    if os.environ.get(_CACHE) in (None, "", default_cache_dir()):
        os.environ[_CACHE] = str(folder)


def program_kinds(device: torch.device) -> str:
    """What programs depend on that PyTorch does not keep them apart by: on CPUs the width of their vectors."""
    return f"-{torch.backends.cpu.get_cpu_capability().lower()}" if device.type == "cpu" else ""


def compile_unet(unet: nn.Module, settings: CompileSettings, warn: Callable[[str], None]) -> CompiledUnet:
    """Compile `unet` in place, with the adapters that are in it; names of weights stay as they are.

    Nothing is compiled yet: each graph is when the first training step needs it.
    """
    import torch._dynamo.config
    import torch._functorch.config
    import torch._inductor.config
    import torch.fx.experimental._config

    dynamo: Any = torch._dynamo.config
    # What varies is said (`_mark`), not found out: that would give earlier batches other graphs than later ones.
    dynamo.automatic_dynamic_shapes = False
    dynamo.recompile_limit = _MOST_GRAPHS
    # A square bucket would be one whose height and width are the same number for good.
    sizes: Any = torch.fx.experimental._config
    sizes.use_duck_shape = False
    backward: Any = torch._functorch.config
    # With its forward pass, while the size is the one that all graphs are made with.
    backward.force_non_lazy_backward_lowering = True
    inductor: Any = torch._inductor.config
    # No choice between programs by how long they take.
    inductor.deterministic = True
    return CompiledUnet(unet, settings, warn)


class CompiledUnet:
    """Takes the place of the forward passes of a U-Net and of its blocks.

    Compiled is what is trained. Where no gradients are asked for (sample pictures with sizes of their own,
    validation, the base model's predictions) everything is computed as without it.
    """

    def __init__(self, unet: nn.Module, settings: CompileSettings, warn: Callable[[str], None]) -> None:
        self.settings = settings
        self._warn = warn
        self._largest = max(settings.sizes, key=lambda size: (size[0] * size[1], size))
        config: Any = unet.config
        # At such sizes the innermost blocks see a single place, for which there are graphs of their own.
        self._one_place = 2 ** (len(config["block_out_channels"]) - 1)
        self._programs: dict[object, Callable[..., Any]] = {}
        self._rehearsed: set[object] = set()
        self._unet: Callable[..., Any] = unet.forward
        if settings.scope == "whole":
            self._unet = self._compiled(unet)
        else:
            for module in unet.modules():
                if type(module).__name__ in BLOCKS:
                    module.__dict__["forward"] = self._compiled(module)
        # Not by assignment: a module registers what is assigned to it, and its state dict would change.
        unet.__dict__["forward"] = self._forward

    @property
    def kinds(self) -> int:
        """How many block classes and widths are compiled each by themselves."""
        return len(self._programs)

    def _compiled(self, module: nn.Module) -> Callable[..., Any]:
        """The forward pass of `module`; modules of the same class and widths share their graphs."""
        plain, kind = module.forward, type(module)
        key = (kind, *((name, parameter.shape) for name, parameter in module.named_parameters()))
        if key not in self._programs:
            # Graphs belong to a function's code, and are searched one after another: each kind has a code of its own.
            self._programs[key] = torch.compile(
                _own_code(kind.forward, f"{kind.__name__}_{len(self._programs)}"),
                fullgraph=True, backend=self.settings.backend,
            )  # fmt: skip
        program, varying = self._programs[key], _SPATIAL[kind.__name__]
        if len(self.settings.sizes) == 1:
            varying = varying[:1]

        def forward(first: Tensor, *others: Any, **named: Any) -> Any:
            if not torch.is_grad_enabled():
                return plain(first, *others, **named)
            _mark(first, varying)
            for value in (*others, *named.values()):
                _mark_samples(value)
            return program(module, first, *others, **named)

        return forward

    def _forward(self, sample: Tensor, *others: Any, **named: Any) -> Any:
        """The U-Net's forward pass.

        Raises:
            RunError: if something cannot be compiled.
        """
        if not torch.is_grad_enabled():
            return self._unet(sample, *others, **named)
        try:
            # Graphs of one sample are others, and so are those of states that learn or are longer.
            case = (len(sample) == 1, *_traits(others), *_traits(named))
            own = (sample.shape[2], sample.shape[3])
            for size in (self._largest, own) if max(own) <= self._one_place else (self._largest,):
                if (case, size) not in self._rehearsed:
                    self._rehearse(sample, others, named, size)
                    self._rehearsed.add((case, size))
            return self._unet(sample, *others, **named)
        except Exception as problem:
            # What fails while it is compiled has classes of many kinds, and comes wrapped in dynamo's.
            if out_of_memory(problem) or not _is_of_compiling(problem):
                raise
            raise RunError(
                f"--torch_compile with --dynamo_backend {self.settings.backend}: the U-Net could not be compiled "
                f"({_reason(problem)}); remove --torch_compile, or try another --torch_compile_scope"
            ) from None

    def _rehearse(
        self, sample: Tensor, others: tuple[Any, ...], named: Mapping[str, Any], size: tuple[int, int]
    ) -> None:
        """Make the graphs with a whole batch of `size`, of which nothing is kept.

        How a program is cut into loops depends on the sizes that it is compiled with, and so does its rounding.
        """
        asked = 1 if len(sample) == 1 else max(2, self.settings.samples)
        count, fits = asked, False
        while not fits:
            _keep_apart(count, size, sample.device)
            try:
                first = sample.new_zeros((count, sample.shape[1], *size))
                # Nothing goes back through it, so that it takes no more memory than a prediction.
                with torch.autograd.graph.saved_tensors_hooks(_nothing, _nothing):
                    self._unet(first, *_rows(others, count), **_rows(named, count))
                fits = True
            except (RuntimeError, MemoryError) as problem:
                if not out_of_memory(problem) or count <= 2:
                    raise
            if not fits:
                # Such batches are computed in parts anyway (`splitting`).
                count = max(2, count // 2)
                free_memory()
        if count < asked:
            height, width = size
            self._warn(
                f"--torch_compile: out of memory with {asked} samples of {height}x{width} latents at once; the graphs "
                f"are made for {count} of them. A run that is resumed with more or less free memory may round "
                "differently; to avoid it use a smaller --train_batch_size with --gradient_accumulation_steps"
            )


def _nothing(_: Any) -> Any:
    """Instead of what would be kept for a backward pass."""
    return None


def _keep_apart(samples: int, size: tuple[int, int], device: torch.device) -> None:
    """Find only programs that were made with such a batch, wherever they are kept."""
    import torch.compiler.config

    height, width = size
    kept: Any = torch.compiler.config
    own = os.environ.get("TORCH_COMPILE_CACHE_KEY_TAG", "")
    kept.cache_key_tag = f"{own}{samples}x{height}x{width}{program_kinds(device)}"


def _traits(value: object) -> Iterator[object]:
    """What graphs take as fixed of every tensor in an argument: whether it learns, and its shape without samples."""
    if isinstance(value, Tensor):
        yield value.requires_grad
        yield value.shape[1:]
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _traits(each)
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _traits(each)


def _own_code(function: Any, name: str) -> Any:
    """`function` with a code object of its own."""
    code = function.__code__.replace(co_name=name, co_qualname=name)
    made = types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def _mark(tensor: Tensor, dimensions: tuple[int, ...]) -> None:
    """Say that `dimensions` vary; where one cannot, it stays a number."""
    marked: set[int] = getattr(tensor, "_dynamo_weak_dynamic_indices", set())
    if not marked.issuperset(dimensions):
        torch._dynamo.maybe_mark_dynamic(tensor, dimensions)


def _mark_samples(value: object) -> None:
    """The first dimension of every tensor in an argument counts samples."""
    if isinstance(value, Tensor):
        if value.ndim:
            _mark(value, (0,))
    elif isinstance(value, Mapping):
        for each in value.values():
            _mark_samples(each)
    elif isinstance(value, tuple | list):
        for each in value:
            _mark_samples(each)


def _rows(value: Any, count: int) -> Any:
    """An argument with `count` times its first row."""
    if isinstance(value, Tensor) and value.ndim:
        return value[:1].expand(count, *value.shape[1:]).contiguous()
    if isinstance(value, Mapping):
        return {name: _rows(each, count) for name, each in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_rows(each, count) for each in value)
    return value


def _is_of_compiling(problem: BaseException) -> bool:
    from torch._dynamo import exc

    return isinstance(problem, exc.TorchDynamoException | exc.FailOnRecompileLimitHit) or "torch._inductor" in (
        type(problem).__module__
    )


def _reason(problem: BaseException) -> str:
    """The first line that says what is wrong, in at most 300 characters."""
    inner = getattr(problem, "inner_exception", None) or problem
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    return f"{type(inner).__name__}: {lines[0] if lines else 'no reason given'}"[:300]
