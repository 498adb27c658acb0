"""The registries of optimizers and schedules, and the update that is made of gradients."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sd_train.device import Device, GradScaler, Updater
from sd_train.optim.optimizers import OPTIMIZERS, make_optimizer
from sd_train.optim.schedules import SCHEDULES
from sd_train.trainables.base import ParamGroup

TARGET = torch.linspace(-1.0, 2.0, 12).view(3, 4)


class Problem:
    """Two matrices that are drawn to a target, in two groups of unlike rates."""

    def __init__(self, name: str) -> None:
        self.first = nn.Parameter(torch.zeros(3, 4))
        self.second = nn.Parameter(torch.full((3, 4), 0.5))
        self.groups = [
            ParamGroup("one", {"first": self.first}, 0.05),
            ParamGroup("two", {"second": self.second}, 0.025),
        ]
        self.optimizer = make_optimizer(
            name, [{"params": list(g.params.values()), "lr": g.lr} for g in self.groups], {}
        )

    def loss(self) -> Tensor:
        return (self.first - TARGET).square().sum() + (self.second * 3 + TARGET).square().sum()


# Registries


def names(specs: Sequence[Any]) -> list[str]:
    return [spec.name for spec in specs]


def test_registries_are_keyed_by_name() -> None:
    assert [name.lower() for name in names(list(OPTIMIZERS.values()))] == list(OPTIMIZERS)
    assert names(list(SCHEDULES.values())) == list(SCHEDULES)
    assert all(spec.description for spec in (*OPTIMIZERS.values(), *SCHEDULES.values()))


# The update


CPU = torch.device("cpu")


class Regression:
    """A least-squares fit whose gradient over a batch is known."""

    def __init__(self, precision: Any = "no", max_norm: float = 0.0) -> None:
        self.weight, self.unused = nn.Parameter(torch.full((3,), 0.5)), nn.Parameter(torch.ones(2))
        optimizer = make_optimizer("adamw", [{"params": [self.weight, self.unused], "lr": 0.1}], {"weight_decay": 0.0})
        self.updater = Updater(Device(CPU, precision), optimizer, [[self.weight, self.unused]], max_norm)

    def backward(self, rows: Tensor, samples: int) -> None:
        losses = (rows @ self.weight - 1).square()
        self.updater.backward(losses.sum() / samples)


ROWS = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


def test_two_half_batches_equal_one_whole() -> None:
    whole, halves = Regression(max_norm=1.0), Regression(max_norm=1.0)
    for _ in range(3):
        whole.backward(ROWS, 4)
        halves.backward(ROWS[:2], 4)
        halves.backward(ROWS[2:], 4)
        torch.testing.assert_close(whole.updater.step(), halves.updater.step(), atol=1e-6, rtol=0)
        assert whole.weight.grad is None
    torch.testing.assert_close(whole.weight, halves.weight, atol=1e-6, rtol=0)
    assert not torch.equal(whole.weight, torch.full((3,), 0.5))
    assert torch.equal(whole.unused, torch.ones(2))


@pytest.mark.parametrize(("max_norm", "expected"), [(0.0, 10.0), (2.5, 2.5), (100.0, 10.0)])
def test_gradients_are_clipped_to_the_norm_that_is_given(max_norm: float, expected: float) -> None:
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    updater = Updater(Device(CPU, "no"), optimizer, [parameters], max_norm)
    for step in range(1, 4):
        updater.backward(6 * parameters[0][0] + 8 * parameters[1][0])
        assert updater.step().item() == pytest.approx(10.0)
        moved = -torch.cat([parameter.detach() for parameter in parameters])
        torch.testing.assert_close(moved, step * expected * torch.tensor([0.6, 0.0, 0.8]), atol=1e-4, rtol=1e-5)


def test_rates_are_set_by_group() -> None:
    problem = Problem("adamw")
    parameters = [list(group.params.values()) for group in problem.groups]
    updater = Updater(Device(CPU, "no"), problem.optimizer, parameters, 0.0)
    updater.set_rates([0.25, 0.0], [True, True])
    assert [group["lr"] for group in problem.optimizer.param_groups] == [0.25, 0.0]
    before = problem.second.clone()
    updater.backward(problem.loss())
    updater.step()
    assert torch.equal(problem.second, before)
    with pytest.raises(ValueError, match="zip"):
        updater.set_rates([0.25], [True])


def test_a_group_that_has_stopped_stays_as_it_is() -> None:
    problem = Problem("adamw")
    updater = Updater(
        Device(CPU, "no"), problem.optimizer, [list(group.params.values()) for group in problem.groups], 0.0
    )
    for active in (True, True, False, False):
        before, other = problem.second.clone(), problem.first.clone()
        updater.set_rates([0.25, 0.25], [True, active])
        updater.backward(problem.loss())
        updater.step()
        # Neither momentum nor weight decay moves it on.
        assert torch.equal(problem.second, before) != active
        assert problem.second.requires_grad == active
        assert not torch.equal(problem.first, other)


def test_fp16_gradients_are_scaled_and_overflows_skipped() -> None:
    scaled, plain = Regression("fp16", max_norm=1.0), Regression(max_norm=1.0)
    assert scaled.updater.scaler is not None
    for fit in (scaled, plain):
        fit.backward(ROWS, 4)
    gradient = plain.weight.grad
    assert gradient is not None
    torch.testing.assert_close(scaled.weight.grad, gradient * 65536.0)
    torch.testing.assert_close(scaled.updater.step(), plain.updater.step())
    torch.testing.assert_close(scaled.weight, plain.weight)
    before = scaled.weight.detach().clone()
    state = {key: value.clone() for key, value in scaled.updater.optimizer.state[scaled.weight].items()}
    for bad in (float("inf"), float("nan")):
        scaled.backward(ROWS * bad, 4)
        scaled.updater.step()
    assert scaled.updater.skipped == 2
    assert scaled.updater.scaler.scale == 16384.0
    assert scaled.updater.figures()["grad_scale"] == 16384.0
    assert torch.equal(scaled.weight, before)
    assert all(torch.equal(value, state[key]) for key, value in scaled.updater.optimizer.state[scaled.weight].items())
    scaled.backward(ROWS, 4)
    scaled.updater.step()
    assert not torch.equal(scaled.weight, before)


def test_the_scale_doubles_and_halves() -> None:
    scaler = GradScaler(scale=8.0, growth_interval=3)
    scales = []
    for finite in (True, True, True, True, False, True, True, True, False, False, False, False, False, False):
        scaler.update(finite)
        scales.append(scaler.scale)
    assert scales == [8, 8, 16, 16, 8, 8, 8, 16, 8, 4, 2, 1, 1, 1]
    scaler.update(True)
    again = GradScaler()
    again.load(json.loads(json.dumps(scaler.state())))
    assert (again.scale, again.good_steps) == (1.0, 1)


RANK = """
import sys, torch
from torch import distributed, nn
from sd_train.device import Device, Updater, compare_ranks, gradient_of, reduce_gradients
from sd_train.errors import RunError
rank, store, target = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
params = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(5))]
results = []
for bucket in (1, 7, 1000):
    params[0].grad = torch.arange(6.0).view(3, 2).t() * (rank + 1)
    # Only one rank has this gradient, none has the last.
    params[1].grad = torch.ones(4) if rank else None
    params[2].grad = None
    reduce_gradients([gradient_of(p) for p in params], bucket)
    results.append([p.grad.tolist() for p in params])
device = Device(torch.device("cpu"), "no", rank, 2)
for parameter in params:
    parameter.grad = None
updater = Updater(device, torch.optim.SGD(params, lr=1.0), [params], 0.0)
updater.backward((params[0] * (rank + 1)).sum())
norm = updater.step()
said = [device.any(rank == 1), device.any(False), device.shared(10 + rank), device.sum(torch.tensor(rank + 1.0)).item()]
compare_ranks(params)
with torch.no_grad():
    params[1][2] += rank * 1e-7
try:
    compare_ranks(params)
    said.append("equal")
except RunError as problem:
    said.append(str(problem))
torch.save({"results": results, "weight": params[0].detach(), "norm": norm, "said": said}, target)
device.barrier()
device.close()
"""


def test_gradients_are_summed_over_processes(tmp_path: Path) -> None:
    targets = [tmp_path / f"rank{rank}.pt" for rank in range(2)]
    script, root = tmp_path / "rank.py", Path(__file__).parents[1]
    script.write_text(RANK)
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, str(script)]
    running = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store"), str(target)], env=environment)
        for rank, target in enumerate(targets)
    ]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    for target in targets:
        found = torch.load(target, weights_only=True)
        expected = [[[0.0, 6.0, 12.0], [3.0, 9.0, 15.0]], [1.0] * 4, [0.0] * 5]
        assert found["results"] == [expected] * 3
        assert torch.equal(found["weight"], torch.full((2, 3), -3.0))
        assert found["norm"].item() == pytest.approx(3 * 6**0.5)
        assert found["said"][:-1] == [True, False, 10, 3.0]
        assert "have drifted apart" in found["said"][-1]
