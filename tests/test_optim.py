"""Every optimizer and schedule of the registries, and the update that is made of gradients."""

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
from diffusers.optimization import get_scheduler
from torch import Tensor, nn

from sd_train.device import Device, GradScaler, Updater
from sd_train.errors import ConfigError
from sd_train.optim.optimizers import (
    OPTIMIZERS,
    accepted_arguments,
    check_arguments,
    check_rates,
    find_optimizer,
    make_optimizer,
    optimizer_class,
)
from sd_train.optim.schedules import SCHEDULES, find_schedule, make_schedule
from sd_train.state import StateParts, load_optimizer_state, optimizer_state
from sd_train.trainables.base import ParamGroup
from sd_train.trainables.lora import Lora, LoraSettings

RATES = {"adamw": 0.05, "lion": 0.02, "prodigy": 1.0}
TARGET = torch.linspace(-1.0, 2.0, 12).view(3, 4)


class Problem:
    """Two matrices that are drawn to a target, in two groups of unlike rates."""

    def __init__(self, name: str, arguments: dict[str, Any] | None = None) -> None:
        self.first = nn.Parameter(torch.zeros(3, 4))
        self.second = nn.Parameter(torch.full((3, 4), 0.5))
        rate = RATES.get(name, 0.05)
        self.groups = [
            ParamGroup("one", {"first": self.first}, rate),
            ParamGroup("two", {"second": self.second}, rate if OPTIMIZERS[name].adapts_rate else rate / 2),
        ]
        self.optimizer = make_optimizer(
            name, [{"params": list(g.params.values()), "lr": g.lr} for g in self.groups], arguments or {}
        )
        trainable = Lora(LoraSettings(4, 4.0, 0.0, {}, 0))
        self.parts = StateParts(trainable, self.groups, self.optimizer, {}, "", "")

    def loss(self) -> Tensor:
        return (self.first - TARGET).square().sum() + (self.second * 3 + TARGET).square().sum()

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.optimizer.zero_grad(set_to_none=True)
            self.loss().backward()
            self.optimizer.step()


def through_json(plain: dict[str, Any]) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(json.dumps(plain))
    return loaded


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_lowers_a_quadratic(name: str) -> None:
    problem = Problem(name)
    before = problem.loss().item()
    problem.train(150)
    assert problem.loss().item() < 0.2 * before


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("arguments", [{}, {"weight_decay": 0.1, "betas": (0.8, 0.95)}], ids=["plain", "betas"])
def test_continues_bit_for_bit(name: str, arguments: dict[str, Any]) -> None:
    whole, interrupted, resumed = (Problem(name, arguments) for _ in range(3))
    whole.train(20)
    interrupted.train(8)
    tensors, plain = optimizer_state(interrupted.parts)
    assert tensors.keys() >= {key for key in tensors if key.startswith("state/first/")} != set()
    with torch.no_grad():
        resumed.first.copy_(interrupted.first)
        resumed.second.copy_(interrupted.second)
    copies = {key: tensor.clone() for key, tensor in tensors.items()}
    load_optimizer_state(resumed.parts, copies, through_json(plain))
    for before, after in zip(interrupted.optimizer.param_groups, resumed.optimizer.param_groups, strict=True):
        kept = [{key: value for key, value in group.items() if key != "params"} for group in (before, after)]
        assert kept[0] == kept[1]
    interrupted.train(12)
    resumed.train(12)
    for problem in (interrupted, resumed):
        assert torch.equal(problem.first, whole.first)
        assert torch.equal(problem.second, whole.second)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_is_no_copy(name: str) -> None:
    """Beside a whole model there may be no room for its optimizer's state twice."""
    problem = Problem(name)
    problem.train(3)
    live = {tensor.data_ptr() for state in problem.optimizer.state.values() for tensor in state.values()
            if isinstance(tensor, Tensor)}  # fmt: skip
    saved = {tensor.data_ptr() for key, tensor in optimizer_state(problem.parts)[0].items() if key.startswith("state/")}
    assert saved == live != set()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_arguments_are_checked(name: str) -> None:
    spec = OPTIMIZERS[name]
    accepted = accepted_arguments(spec)
    assert "weight_decay" in accepted
    assert not {"lr", "params", "self"} & set(accepted)
    with pytest.raises(ConfigError, match=rf"wieght_decay: {spec.name} takes no such argument.*\bweight_decay\b"):
        Problem(name, {"wieght_decay": 0.1})
    for reserved in spec.reserved:
        with pytest.raises(ConfigError, match=f"= {reserved}: "):
            Problem(name, {reserved: 1.0})
    decayed = Problem(name, {"weight_decay": 0.125}).optimizer
    assert all(group["weight_decay"] == 0.125 for group in decayed.param_groups)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_names_are_found_in_any_case(name: str) -> None:
    spec = OPTIMIZERS[name]
    assert find_optimizer(spec.name.upper()) is find_optimizer(name) is spec
    assert issubclass(optimizer_class(spec), torch.optim.Optimizer)
    with pytest.raises(ConfigError, match=rf"did you mean {spec.name}\?"):
        find_optimizer(spec.name + "x")


def test_other_names_are_refused() -> None:
    assert find_optimizer("") is OPTIMIZERS["adamw"]
    with pytest.raises(ConfigError, match=r"--optimizer_type = 'zzz'.*use one of AdamW, ") as caught:
        find_optimizer("zzz")
    assert "did you mean" not in str(caught.value)


def test_values_that_the_class_refuses() -> None:
    with pytest.raises(ConfigError, match=r"--optimizer_args = betas=.*AdamW refuses them.*"):
        Problem("adamw", {"betas": (1.5, 0.9)})
    with pytest.raises(ConfigError, match="AdamW refuses them"):
        Problem("adamw", {"weight_decay": -1.0})


@pytest.mark.parametrize(
    ("name", "arguments", "part"),
    [
        ("lion", {"betas": (2, 3)}, "Lion refuses them"),
        ("lion", {"betas": (0.9,)}, "Lion refuses them"),
        ("lion", {"weight_decay": (1, 2)}, "Lion refuses them"),
        ("lion", {"use_triton": True}, "use_triton: replaces the update by a kernel"),
        ("prodigy", {"beta3": "abc"}, "Prodigy refuses them"),
        ("prodigy", {"slice_p": 0}, "Prodigy refuses them"),
        ("prodigy", {"growth_rate": "fast"}, "Prodigy refuses them"),
        ("prodigy", {"weight_decay": 1e400}, "not finite"),
        ("prodigy", {"fsdp_in_use": True}, "fsdp_in_use: is for sharded parameters"),
        ("prodigy", {"decouple": "no"}, "takes True or False here; write decouple=True"),
        ("adamw", {"betas": (0.9,)}, "AdamW refuses them"),
        ("adamw", {"eps": 10**4000}, "AdamW refuses them"),
        ("adamw", {"fused": "abc"}, "fused='abc': AdamW takes True or False here"),
        ("adamw", {"fused": None}, "takes True or False here"),
        ("adamw", {"foreach": 1}, "takes True or False here"),
        ("adamw", {"amsgrad": 1}, "takes True or False here"),
        ("adamw", {"maximize": True}, "maximize: would raise the loss"),
        ("adamw", {"capturable": False}, "capturable: is for CUDA graphs"),
        ("adamw", {"differentiable": True}, "differentiable: "),
        ("adamw", {"use_triton": True}, "use_triton: AdamW takes no such argument"),
    ],
)
def test_what_only_a_step_refuses(name: str, arguments: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_arguments(name, arguments)
    assert part in str(caught.value)
    assert str(caught.value).startswith("--optimizer_args = ")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_good_arguments_pass_without_a_word(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    check_arguments(name, {})
    check_arguments(name, {"weight_decay": 0.01, "betas": (0.9, 0.99)})
    Problem(name, {"weight_decay": 0.01})
    if name == "adamw":
        for arguments in ({"foreach": True}, {"foreach": None}, {"fused": False, "amsgrad": True}):
            check_arguments(name, arguments)
    assert capfd.readouterr() == ("", "")


def test_unlike_rates_of_an_optimizer_that_finds_its_own() -> None:
    expected = r"--unet_lr = 1, --text_encoder_lr = 0\.5: Prodigy takes one learning rate for all; give equal rates"
    with pytest.raises(ConfigError, match=expected):
        check_rates("prodigy", {"unet": 1.0, "text_encoder": 0.5})
    check_rates("prodigy", {"unet": 1.0, "text_encoder": 1.0})
    check_rates("prodigy", {"unet": 1.0, "text_encoder": 0.0})
    check_rates("prodigy", {})
    check_rates("AdamW", {"unet": 1.0, "text_encoder": 0.5})


def test_adamw_is_fused_and_equals_torchs_own() -> None:
    ours = Problem("adamw", {"weight_decay": 0.1})
    assert all(group["fused"] for group in ours.optimizer.param_groups)
    theirs = Problem("adamw")
    theirs.optimizer = torch.optim.AdamW(
        [{"params": list(g.params.values()), "lr": g.lr} for g in theirs.groups], weight_decay=0.1, fused=False
    )
    ours.train(50)
    theirs.train(50)
    torch.testing.assert_close(ours.first, theirs.first, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours.second, theirs.second, atol=1e-6, rtol=0)
    assert not Problem("adamw", {"foreach": True}).optimizer.defaults["fused"]


# Schedules

LENGTHS = [(0, 10), (0, 1), (3, 10), (10, 10), (1, 2), (17, 1000)]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("warmup", "total"), LENGTHS)
def test_curves_equal_diffusers(name: str, warmup: int, total: int) -> None:
    if not SCHEDULES[name].warms_up:
        warmup = 0
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.25)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    ours = make_schedule(name, warmup, total)
    # Beyond the end too: diffusers asks for the rate after the last update.
    for step in range(total + 1):
        assert 0.25 * ours.factor(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-6), step
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_functions_of_the_update(name: str) -> None:
    schedule = make_schedule(name, 0, 40)
    forward = [schedule.factor(step) for step in range(40)]
    assert [schedule.factor(step) for step in reversed(range(40))] == forward[::-1]
    assert all(0.0 <= factor <= 1.0 for factor in forward)
    assert forward[0] == 1.0


@pytest.mark.parametrize("name", [name for name, spec in SCHEDULES.items() if spec.warms_up])
def test_warm_up(name: str) -> None:
    schedule = make_schedule(name, 0.25, 40)
    assert schedule.warmup_steps == 10
    assert [schedule.factor(step) for step in range(10)] == pytest.approx([step / 10 for step in range(10)])
    assert schedule.factor(10) == 1.0
    assert make_schedule(name, 10, 40) == schedule
    assert make_schedule(name, 0.0, 40).factor(0) == 1.0
    with pytest.raises(ConfigError, match=r"--lr_warmup_steps = 41: is longer than the training \(40 updates\)"):
        make_schedule(name, 41, 40)


@pytest.mark.parametrize("warmup", [5, 0.5])
def test_constant_refuses_a_warm_up(warmup: int | float) -> None:
    with pytest.raises(ConfigError, match=rf"--lr_warmup_steps = {warmup}: constant has no warm-up.*with_warmup"):
        make_schedule("constant", warmup, 40)


def test_schedule_names() -> None:
    assert find_schedule("COSINE") is SCHEDULES["cosine"]
    with pytest.raises(ConfigError, match=r"did you mean cosine\?"):
        find_schedule("cosin")
    with pytest.raises(ConfigError, match=r"--lr_scheduler = 'zzz': .*use one of constant, "):
        find_schedule("zzz")


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
    again.load(through_json(scaler.state()))
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
