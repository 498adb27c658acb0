"""Learning-rate schedules: every curve is that of diffusers or transformers, and ignored options are errors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers.optimization import get_scheduler as diffusers_scheduler
from torch import nn
from transformers.optimization import Adafactor, AdafactorSchedule
from transformers.optimization import get_scheduler as transformers_scheduler

from sd_train.config.schedule_rules import SCHEDULE_OPTIONS, SCHEDULE_USES
from sd_train.config.training_options import OptimizerOptions
from sd_train.errors import ConfigError
from sd_train.optim.schedules import (
    SCHEDULES,
    Schedule,
    ScheduleOptions,
    check_schedule,
    check_schedule_values,
    find_schedule,
    make_schedule,
)

RATE = 0.25
LENGTHS = [(0, 10), (0, 1), (3, 10), (1, 2), (17, 1000)]

# What a library is asked for, and how that is written here.
SAME: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("constant", {}, {}),
    ("constant_with_warmup", {}, {}),
    ("linear", {}, {}),
    ("cosine", {}, {}),
    ("cosine", {"lr_scheduler_args": {"num_cycles": 1.25}}, {"num_cycles": 1.25}),
    ("cosine_with_restarts", {}, {}),
    ("cosine_with_restarts", {"lr_scheduler_num_cycles": 3}, {"num_cycles": 3}),
    ("polynomial", {}, {}),
    ("polynomial", {"lr_scheduler_power": 2.5}, {"power": 2.5}),
    ("polynomial", {"lr_scheduler_power": 0.5, "lr_scheduler_args": {"lr_end": 0.05}}, {"power": 0.5, "lr_end": 0.05}),
    ("inverse_sqrt", {}, {}),
    ("inverse_sqrt", {"lr_scheduler_timescale": 7}, {"timescale": 7}),
    ("cosine_with_min_lr", {"lr_scheduler_min_lr_ratio": 0.1}, {"min_lr_rate": 0.1}),
    ("cosine_with_min_lr", {"lr_scheduler_args": {"min_lr": 0.05}}, {"min_lr": 0.05}),
    (
        "cosine_with_min_lr",
        {"lr_scheduler_min_lr_ratio": 0.2, "lr_scheduler_num_cycles": 3},
        {"min_lr_rate": 0.2, "num_cycles": 1.5},
    ),
    ("warmup_stable_decay", {"lr_decay_steps": 1}, {"num_decay_steps": 1}),
    (
        "warmup_stable_decay",
        {"lr_decay_steps": 5, "lr_scheduler_min_lr_ratio": 0.1, "lr_scheduler_num_cycles": 3},
        {"num_decay_steps": 5, "min_lr_ratio": 0.1, "num_cycles": 1.5},
    ),
    *[
        (
            "warmup_stable_decay",
            {
                "lr_decay_steps": 6,
                "lr_scheduler_min_lr_ratio": 0.3,
                "lr_scheduler_args": {"warmup_type": kind, "decay_type": kind},
            },
            {"num_decay_steps": 6, "min_lr_ratio": 0.3, "warmup_type": kind, "decay_type": kind},
        )
        for kind in ("linear", "cosine", "1-sqrt")
    ],
]
RULES = "1:2,0.1:5,2:20,0.01"
LEAST: dict[str, dict[str, Any]] = {
    "cosine_with_min_lr": {"lr_scheduler_min_lr_ratio": 0.1},
    "warmup_stable_decay": {"lr_decay_steps": 4},
    "piecewise_constant": {"lr_scheduler_args": {"step_rules": RULES}},
    "adafactor": {"optimizer_type": "Adafactor"},
}
"""What a schedule cannot do without."""


def options(name: str, **more: Any) -> ScheduleOptions:
    return ScheduleOptions(**{"lr_scheduler": name, "rates": {"unet": RATE}, **more})


def schedule(name: str, total: int = 40, **more: Any) -> Schedule:
    return make_schedule(options(name, **(LEAST.get(name, {}) | more)), total)


def rates_of(scheduler: Any, optimizer: torch.optim.Optimizer, count: int) -> list[float]:
    """What a library's scheduler sets, update after update."""
    found = []
    for _ in range(count):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return found


def sgd(rate: float = RATE) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate)


def assert_same(ours: Schedule, theirs: list[float]) -> None:
    for step, rate in enumerate(theirs):
        assert RATE * ours.factor(step) == pytest.approx(rate, abs=1e-6), step


FITTING = [
    (*case, warmup, total)
    for case in SAME
    for warmup, total in LENGTHS
    if warmup + case[2].get("num_decay_steps", 0) <= total
]


@pytest.mark.parametrize(("name", "ours", "theirs", "warmup", "total"), FITTING)
def test_curves_equal_transformers(
    name: str, ours: Mapping[str, Any], theirs: Mapping[str, Any], warmup: int, total: int
) -> None:
    warmup = warmup if SCHEDULES[name].warms_up else 0
    optimizer = sgd()
    library = transformers_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=total, scheduler_specific_kwargs=dict(theirs)
    )
    # Beyond the end too: the libraries ask for the rate after the last update.
    wanted = rates_of(library, optimizer, total + 1)
    assert_same(make_schedule(options(name, **ours, lr_warmup_steps=warmup), total), wanted)


@pytest.mark.parametrize(
    "name", ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
)
def test_curves_equal_diffusers(name: str) -> None:
    warmup = 17 if SCHEDULES[name].warms_up else 0
    cycles = 4 if name == "cosine_with_restarts" else 1
    power = 3.0 if name == "polynomial" else 1.0
    optimizer = sgd()
    library = diffusers_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=200, num_cycles=cycles, power=power
    )
    more = {"lr_warmup_steps": warmup, "lr_scheduler_num_cycles": cycles, "lr_scheduler_power": power}
    assert_same(make_schedule(options(name, **more), 200), rates_of(library, optimizer, 201))


@pytest.mark.parametrize("rules", [RULES, "0.5:1,1", "2", "0.1:20,1:10,0.5:30,0"])
def test_steps_equal_diffusers(rules: str) -> None:
    optimizer = sgd()
    library = diffusers_scheduler("piecewise_constant", optimizer, step_rules=rules)
    ours = make_schedule(options("piecewise_constant", lr_scheduler_args={"step_rules": rules}), 40)
    assert_same(ours, rates_of(library, optimizer, 41))


def test_rex() -> None:
    ours = schedule("rex", 300, lr_warmup_steps=30)
    # The paper's values: at a third of the way 4/5 are left, at two thirds a half.
    assert ours.factor(30) == 1.0
    assert ours.factor(30 + 90) == pytest.approx(0.8)
    assert ours.factor(30 + 180) == pytest.approx(0.5)
    assert ours.factor(300) == 0.0
    assert [ours.factor(step) for step in range(30)] == pytest.approx([step / 30 for step in range(30)])
    for step in range(31, 300):
        z = (step - 30) / 270
        assert ours.factor(step) == pytest.approx((1 - z) / (1 / 2 + 1 / 2 * (1 - z)), abs=1e-9)


def test_adafactor_leaves_the_rate_alone() -> None:
    plain = schedule("adafactor")
    assert {plain.factor(step) for step in range(40)} == {1.0}
    named = schedule("adafactor:0.05", optimizer_type="Adafactor")
    optimizer = Adafactor([nn.Parameter(torch.zeros(1))], relative_step=True, lr=None)
    # transformers' says this before the first update; then it reads what the optimizer has found.
    assert AdafactorSchedule(optimizer, 0.05).get_lr() == pytest.approx([RATE * named.factor(0)])
    assert named.factor(39) == named.factor(0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_functions_of_the_update(name: str) -> None:
    ours = schedule(name)
    forward = [ours.factor(step) for step in range(40)]
    assert [ours.factor(step) for step in reversed(range(40))] == forward[::-1]
    assert [schedule(name).factor(step) for step in range(20, 40)] == forward[20:]
    assert all(math.isfinite(factor) and factor >= 0 for factor in forward)
    assert forward[0] == 1.0


@pytest.mark.parametrize("name", [name for name, spec in SCHEDULES.items() if spec.warms_up])
def test_warm_up(name: str) -> None:
    ours, steps = schedule(name, lr_warmup_steps=0.25), schedule(name, lr_warmup_steps=10)
    assert ours.warmup_steps == steps.warmup_steps == 10
    assert [ours.factor(step) for step in range(10)] == pytest.approx([step / 10 for step in range(10)])
    assert [ours.factor(step) for step in range(41)] == [steps.factor(step) for step in range(41)]
    assert ours.factor(10) == 1.0
    assert schedule(name, lr_warmup_steps=0.0).factor(0) == 1.0
    with pytest.raises(ConfigError, match=r"--lr_warmup_steps = 41: is longer than the training \(40 updates\)"):
        schedule(name, lr_warmup_steps=41)


def test_decay_as_a_share() -> None:
    ours = schedule("warmup_stable_decay", lr_decay_steps=0.25, lr_warmup_steps=0.5)
    assert (ours.warmup_steps, ours.decay_steps) == (20, 10)
    assert [ours.factor(step) for step in (20, 29, 30)] == [1.0, 1.0, 1.0]
    assert ours.factor(31) < 1.0
    with pytest.raises(ConfigError, match=r"--lr_decay_steps = 0\.75: with the warm-up that is 50 updates, longer"):
        schedule("warmup_stable_decay", lr_decay_steps=0.75, lr_warmup_steps=0.5)


# Options


IGNORED = {
    "lr_warmup_steps": 5, "lr_decay_steps": 5, "lr_scheduler_num_cycles": 3, "lr_scheduler_power": 2.0,
    "lr_scheduler_timescale": 9, "lr_scheduler_min_lr_ratio": 0.5,
}  # fmt: skip


def test_every_schedule_has_its_uses() -> None:
    assert list(SCHEDULES) == list(SCHEDULE_USES)
    assert set(SCHEDULE_OPTIONS) == {name for name in ScheduleOptions.__dataclass_fields__ if name != "rates"}
    assert {option for uses in SCHEDULE_USES.values() for option in uses.options} == set(IGNORED)
    default = ScheduleOptions.of(OptimizerOptions.model_validate({}), {})
    assert all(getattr(default, name) == OptimizerOptions.model_fields[name].get_default(
        call_default_factory=True, validated_data={}) for name in SCHEDULE_OPTIONS)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("option", IGNORED)
def test_an_option_acts_or_is_refused(name: str, option: str) -> None:
    if option not in SCHEDULE_USES[name].options:
        users = [user for user, uses in SCHEDULE_USES.items() if option in uses.options]
        with pytest.raises(ConfigError, match=f"^--{option} = {IGNORED[option]}: {name} does not use it; .*{users[0]}"):
            schedule(name, **{option: IGNORED[option]})
        return
    plain, changed = schedule(name), schedule(name, **{option: IGNORED[option]})
    assert [plain.factor(step) for step in range(40)] != [changed.factor(step) for step in range(40)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_kohya_ss_writes_for_nothing_is_nothing(name: str) -> None:
    plain = schedule(name)
    written = {
        "lr_scheduler_type": "", "lr_warmup_steps": 0, "lr_decay_steps": 0, "lr_scheduler_num_cycles": 1,
        "lr_scheduler_power": 1,
    }  # fmt: skip
    same = schedule(name, **(written | LEAST.get(name, {})))
    assert [plain.factor(step) for step in range(40)] == [same.factor(step) for step in range(40)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"lr_scheduler": "cosine_with_min_lr"}, "needs lr_scheduler_min_lr_ratio; give the share"),
        (
            {
                "lr_scheduler": "cosine_with_min_lr", "lr_scheduler_min_lr_ratio": 0.1,
                "lr_scheduler_args": {"min_lr": 0.1},
            },
            "'min_lr=0.1': says the same as lr_scheduler_min_lr_ratio = 0.1",
        ),
        ({"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_args": {"min_lr": 1.0}}, "not below the learning rate"),
        ({"lr_scheduler": "warmup_stable_decay"}, "needs lr_decay_steps"),
        (
            {"lr_scheduler": "warmup_stable_decay", "lr_decay_steps": 3, "lr_scheduler_args": {"decay_type": "x"}},
            "decay_type=x: must be one of linear, cosine, 1-sqrt",
        ),
        (
            {
                "lr_scheduler": "warmup_stable_decay", "lr_decay_steps": 3, "lr_scheduler_num_cycles": 2,
                "lr_scheduler_args": {"decay_type": "linear"},
            },
            "a decay of the type linear has no cycles",
        ),
        ({"lr_scheduler": "piecewise_constant"}, "needs step_rules among lr_scheduler_args"),
        (
            {"lr_scheduler": "piecewise_constant", "lr_scheduler_args": {"step_rules": "1:10,x:3,0.1"}},
            "step_rules=1:10,x:3,0.1: 'x:3' is not factor:update",
        ),
        (
            {"lr_scheduler": "piecewise_constant", "lr_scheduler_args": {"step_rules": "1:10,0.5:10,0.1"}},
            "'0.5:10' is not factor:update, with an update of its own",
        ),
        (
            {"lr_scheduler": "piecewise_constant", "lr_scheduler_args": {"step_rules": "1:10,nan"}},
            "'nan' is not factor:update",
        ),
        ({"lr_scheduler": "adafactor"}, "belongs to optimizer_type Adafactor, and AdamW needs a schedule"),
        (
            {"lr_scheduler": "adafactor", "optimizer_type": "adafactor", "optimizer_args": {"relative_step": False}},
            "relative_step=False switches that off",
        ),
        ({"lr_scheduler": "adafactor:x", "optimizer_type": "adafactor"}, "no number stands behind the colon"),
        ({"lr_scheduler": "polynomial", "lr_scheduler_args": {"lr_end": 0.25}}, "lr_end=0.25: is not below the"),
        ({"lr_scheduler": "polynomial", "lr_scheduler_args": {"lr_end": "x"}}, "lr_end=x: must be a number from 0 on"),
        ({"lr_scheduler": "polynomial", "lr_scheduler_args": {"power": 2}}, "give it as lr_scheduler_power"),
        ({"lr_scheduler": "polynomial", "lr_scheduler_args": {"pow": 2}}, "takes no such argument; it takes lr_end"),
        ({"lr_scheduler": "linear", "lr_scheduler_args": {"lr_end": 2}}, "linear takes no such argument; remove it"),
    ],
)
def test_refused_options(given: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_schedule(ScheduleOptions(**{"rates": {"unet": RATE}, **given}), 40)
    assert expected in str(caught.value)
    with pytest.raises(ConfigError):
        check_schedule_values(ScheduleOptions(**{"rates": {"unet": RATE}, **given}))


def test_absolute_rates_are_those_of_the_largest_rate() -> None:
    ours = make_schedule(
        ScheduleOptions("polynomial", lr_scheduler_args={"lr_end": 0.1}, rates={"unet": 0.5, "text_encoder": 0.2}), 10
    )
    assert ours.factor(10) * 0.5 == pytest.approx(0.1)
    # Where nothing learns every rate is 0, whatever the factor.
    make_schedule(ScheduleOptions("polynomial"), 10)


def test_schedule_names() -> None:
    assert find_schedule("COSINE") is SCHEDULES["cosine"]
    assert find_schedule("Adafactor:1e-4") is SCHEDULES["adafactor"]
    with pytest.raises(ConfigError, match=r"did you mean cosine\?"):
        find_schedule("cosin")
    with pytest.raises(ConfigError, match=r"--lr_scheduler = 'zzz': .*use one of constant, "):
        find_schedule("zzz")
    assert check_schedule("package.module.Class") is None
    for name, rule in (("reduce_lr_on_plateau", "depends on the loss"), ("a..b", "is no module.Class")):
        assert (check_schedule(name) or ("",))[0].startswith(rule)


# Classes of other packages


CLASSES: list[tuple[str, dict[str, Any]]] = [
    ("CosineAnnealingLR", {"T_max": 20}),
    ("CosineAnnealingWarmRestarts", {"T_0": 7, "T_mult": 2, "eta_min": 0.01}),
    ("torch.optim.lr_scheduler.ExponentialLR", {"gamma": 0.9}),
    ("OneCycleLR", {"max_lr": 0.5, "total_steps": 40, "cycle_momentum": False}),
    ("MultiStepLR", {"milestones": [3, 9]}),
]


@pytest.mark.parametrize(("name", "arguments"), CLASSES)
def test_tables_equal_the_class_itself(name: str, arguments: dict[str, Any]) -> None:
    optimizer = sgd()
    library = getattr(torch.optim.lr_scheduler, name.rpartition(".")[2])(optimizer, **arguments)
    theirs = rates_of(library, optimizer, 39)
    ours = make_schedule(options("constant", lr_scheduler_type=name, lr_scheduler_args=arguments), 40)
    assert_same(ours, theirs)
    # A resumed run asks for a later update first, and a last time for one that it has asked for.
    again = make_schedule(options("constant", lr_scheduler_type=name, lr_scheduler_args=arguments), 40)
    assert [again.factor(step) for step in range(38, 20, -1)] == [ours.factor(step) for step in range(38, 20, -1)]


def test_a_class_can_be_named_as_lr_scheduler() -> None:
    ours = schedule("torch.optim.lr_scheduler.StepLR", lr_scheduler_args={"step_size": 3, "gamma": 0.5})
    assert [ours.factor(step) for step in range(7)] == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25]
    assert ours.name == "torch.optim.lr_scheduler.StepLR"


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("ReduceLROnPlateau", {}, "asks for metrics at every step"),
        ("transformers.optimization.GreedyLR", {}, "asks for metrics at every step"),
        ("OneCycleLR", {"max_lr": 1.0, "total_steps": 40}, "give --lr_scheduler_args cycle_momentum=False"),
        ("CosineAnnealingLR", {"T_maxx": 3}, "unexpected keyword argument 'T_maxx'; it takes T_max, eta_min"),
        ("CosineAnnealingLR", {}, "= nothing: torch.optim.lr_scheduler.CosineAnnealingLR refuses them"),
        ("LambdaLR", {"lr_lambda": "lambda step: 1"}, "refuses them"),
        ("StepLR", {"step_size": 2, "gamma": float("nan")}, "gives the learning rate nan at update 3"),
        ("CosineAnealingLR", {}, "has no class CosineAnealingLR"),
        ("no_such_package.Class", {}, "the module no_such_package cannot be imported"),
        ("torch.nn.Linear", {}, "refuses them"),
        ("torch.optim.SGD", {}, "refuses them"),
    ],
)
def test_refused_classes(name: str, arguments: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_schedule(options("constant", lr_scheduler_type=name, lr_scheduler_args=arguments), 40)
    assert expected in str(caught.value)


def test_a_class_that_ends_too_early_is_refused_before_the_training() -> None:
    more = {"lr_scheduler_args": {"max_lr": 1.0, "total_steps": 10, "cycle_momentum": False}}
    make_schedule(options("constant", lr_scheduler_type="OneCycleLR", **more), 10)
    with pytest.raises(ConfigError, match="Tried to step 11 times"):
        make_schedule(options("constant", lr_scheduler_type="OneCycleLR", **more), 12)


def test_rates_that_are_no_factor_of_every_rate_are_refused() -> None:
    rates = {"unet": 0.25, "text_encoder": 0.1}
    free = {"lr_scheduler_type": "CosineAnnealingLR", "lr_scheduler_args": {"T_max": 40}}
    assert make_schedule(options("constant", **free, rates=rates), 40).factor(20) == pytest.approx(0.5)
    floor = {"lr_scheduler_type": "CosineAnnealingLR", "lr_scheduler_args": {"T_max": 40, "eta_min": 0.05}}
    with pytest.raises(ConfigError, match=r"not the same factor of every learning rate .* give equal learning rates"):
        make_schedule(options("constant", **floor, rates=rates), 40)
    make_schedule(options("constant", **floor, rates={"unet": 0.25, "text_encoder": 0.25}), 40)
