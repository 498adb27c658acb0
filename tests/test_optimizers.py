"""Every optimizer of the registry against its own package: steps, states, arguments and what its spec says of it."""

from __future__ import annotations

import inspect
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sd_train.__main__ import main
from sd_train.errors import ConfigError
from sd_train.optim.inference import InferenceWeights, averaged
from sd_train.optim.optimizers import (
    OPTIMIZERS,
    accepted_arguments,
    check_arguments,
    check_optimizer,
    eight_bit_numbers,
    find_optimizer,
    make_optimizer,
    optimizer_class,
    rate_figures,
    shared_rates,
)
from sd_train.optim.registry import RESERVED, SPECS
from sd_train.state import load_optimizer_state, optimizer_state
from sd_train.trainables.lora import Lora, LoraSettings
from tests.optimizer_cases import REFERENCES, SHAPES, Problem, load, save

NAMES = [spec.name for spec in SPECS]
STEPS, LATER = 20, 5
ROOT = Path(__file__).parents[1]


def equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each optimizer after 20 steps; another process has gone on from there."""
    folder = tmp_path_factory.mktemp("states")
    for name in NAMES:
        problem = Problem(name)
        problem.train(STEPS)
        save(problem, folder / name)
    done = subprocess.run(
        [sys.executable, "-m", "tests.optimizer_cases", str(folder), str(LATER)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_steps_equal_the_class_used_bare(name: str) -> None:
    ours, theirs = Problem(name), Problem(name, ours=False)
    before = ours.weights()
    for _ in range(STEPS):
        ours.train(1)
        theirs.train(1)
        assert equal(ours.weights(), theirs.weights())
    assert not any(torch.equal(before[key], tensor) for key, tensor in ours.weights().items())


@pytest.mark.parametrize("name", NAMES)
def test_another_process_goes_on_to_the_bit(name: str, saved: Path) -> None:
    whole = Problem(name, ours=False)
    whole.train(STEPS + LATER)
    assert equal(load_file(saved / name / "later.safetensors"), whole.weights())


@pytest.mark.parametrize("name", NAMES)
def test_a_state_comes_back_as_it_was(name: str, saved: Path) -> None:
    before, after = Problem(name), load(name, saved / name)
    before.train(STEPS)
    states = [optimizer_state(problem.parts) for problem in (before, after)]
    assert states[0][1] == states[1][1]
    assert states[0][0].keys() == states[1][0].keys()
    for key, tensor in states[0][0].items():
        assert tensor.dtype == states[1][0][key].dtype, key
        assert torch.equal(tensor, states[1][0][key]), key
    # No copy: beside a whole model there may be no room for its optimizer's state twice.
    live = {tensor.data_ptr() for values in before.optimizer.state.values() for tensor in tensors_in(values)}
    assert {tensor.data_ptr() for key, tensor in states[0][0].items() if key.startswith("state/")} == live


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in a state, however deep."""
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in inner for tensor in tensors_in(item)]


def test_a_state_that_lists_no_tensors_is_read() -> None:
    before, after = Problem("AdamW"), Problem("AdamW")
    before.train(3)
    tensors, plain = optimizer_state(before.parts)
    for values in plain["state"].values():
        for key in [key for key, value in values.items() if isinstance(value, dict)]:
            del values[key]
    assert plain["state"]["vector"] == {}
    del plain["package"]
    load_optimizer_state(after.parts, tensors, plain)
    assert equal(optimizer_state(after.parts)[0], tensors)


@pytest.mark.parametrize("name", [spec.name for spec in SPECS if spec.eight_bit])
def test_eight_bits_where_tensors_are_large(name: str, saved: Path) -> None:
    problem = load(name, saved / name)
    problem.train(1)
    large = 0
    for key, parameter in problem.params.items():
        dtype = problem.optimizer.state[parameter]["state1"].dtype
        assert dtype == (torch.uint8 if parameter.numel() >= 8192 else torch.float32), key
        large += parameter.numel() * (dtype == torch.uint8)
    sizes = [parameter.numel() for parameter in problem.params.values()]
    assert eight_bit_numbers(name, {}, sizes) == (large, sum(sizes))
    assert large == 128 * 96 + 24 * 400
    assert eight_bit_numbers(name, {"min_8bit_size": 0}, sizes) == (sum(sizes), sum(sizes))
    assert eight_bit_numbers("AdamW", {}, sizes) is None


@pytest.mark.parametrize("name", NAMES)
def test_a_rate_of_zero_and_no_gradient(name: str) -> None:
    problem, spec = Problem(name), find_optimizer(name)
    rates = [group["lr"] for group in problem.optimizer.param_groups]
    for group in problem.optimizer.param_groups:
        group["lr"] = 0.0
    if spec.needs_rate:
        with pytest.raises(ZeroDivisionError):
            problem.train(1)
        return
    before = problem.weights()
    problem.train(1)
    assert equal(before, problem.weights()) != (name in ("AdaFactor", "Rprop"))
    for group, rate in zip(problem.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    problem.train(3)
    assert all(tensor.isfinite().all() for tensor in problem.weights().values())


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_those_of_the_class(name: str) -> None:
    spec = find_optimizer(name)
    signature = inspect.signature(optimizer_class(spec)).parameters
    # bitsandbytes' 32-bit classes read neither.
    idle = ("amsgrad", "min_8bit_size") if name in ("PagedAdamW", "PagedAdamW32bit") else ()
    allowed = [
        key for key, one in signature.items() if key not in (*RESERVED, *idle) and one.kind is not one.VAR_KEYWORD
    ]
    assert accepted_arguments(spec) == spec.accepts == tuple(allowed)
    check_arguments(name, {})
    with pytest.raises(ConfigError, match=rf"wieght: {name} takes no such argument; it accepts .*{allowed[0]}"):
        check_arguments(name, {"wieght": 0.1})
    for reserved in RESERVED.keys() & signature.keys():
        with pytest.raises(ConfigError, match=f"--optimizer_args = {reserved}: "):
            check_arguments(name, {reserved: 1.0})
    for key, parameter in signature.items():
        if key in allowed and isinstance(parameter.default, bool):
            with pytest.raises(ConfigError, match=f"{key}='abc': {name} takes True or False here"):
                check_arguments(name, {key: "abc"})
        elif key in allowed and isinstance(parameter.default, float):
            with pytest.raises(ConfigError, match=f"{key}='abc': {name} refuses them"):
                check_arguments(name, {key: "abc"})


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_said_while_it_is_checked(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    check_arguments(name, {})
    check_arguments(name, {} if name == "Rprop" else {"weight_decay": 0.01})
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", NAMES)
def test_what_the_spec_says(name: str) -> None:
    spec, problem = find_optimizer(name), Problem(name)
    problem.train(2)
    figures = rate_figures(problem.optimizer)
    assert bool(figures) == (spec.adapts_rate or name == "AdaFactor")
    assert spec.schedule_free == hasattr(problem.optimizer, "eval")
    if spec.adapts_rate:
        assert [*figures] == ["lr/d*lr/group0", "lr/d*lr/group1"]
        assert figures["lr/d*lr/group1"] == problem.optimizer.param_groups[1]["d"] * 1.0
    assert shared_rates(name, {"unet": 0.5, "text": 1.0}) == {"unet": 0.5, "text": 0.5 if spec.one_rate else 1.0}
    # Fusible: parameters by themselves, each with an optimizer of its own, take the steps that they take together.
    together, apart = Problem(name), Problem(name)
    rates = {key: group.lr for group in together.groups for key in group.params}
    decay = {} if name == "Rprop" else {"weight_decay": 0.05}
    own = [make_optimizer(name, [{"params": [p], "lr": rates[key]}], decay) for key, p in apart.params.items()]
    together.train(6)
    apart.optimizer = Several(own)  # type: ignore[assignment]
    apart.train(6)
    assert equal(together.weights(), apart.weights()) == spec.fusible


class Several:
    def __init__(self, optimizers: list[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


@pytest.mark.parametrize("name", [spec.name for spec in SPECS if spec.schedule_free])
def test_averages_are_shown_and_weights_stay_to_the_bit(name: str) -> None:
    problem, undisturbed = Problem(name), Problem(name)
    trainable = Lora(LoraSettings(4, 4.0, 0.0, {}, 0))
    weights = InferenceWeights(trainable, problem.optimizer)
    with weights.for_inference():
        pass
    for _ in range(3):
        problem.train(7)
        undisturbed.train(7)
        before = problem.weights()
        for _ in range(3):
            with weights.for_inference():
                shown = problem.weights()
                with weights.for_inference():
                    assert equal(problem.weights(), shown)
                assert equal(problem.weights(), shown)
            assert equal(problem.weights(), before)
        with pytest.raises(ZeroDivisionError), weights.for_inference():
            raise ZeroDivisionError
        assert equal(problem.weights(), before)
        # What the optimizer itself calls its result, with its interpolation.
        problem.optimizer.eval()  # type: ignore[attr-defined]
        assert equal(problem.weights(), shown)
        problem.optimizer.train()  # type: ignore[attr-defined]
        with torch.no_grad():
            for key, value in before.items():
                problem.params[key].copy_(value)
        assert equal(problem.weights(), undisturbed.weights())
        assert not equal(shown, before)


def test_others_are_as_they_are() -> None:
    problem = Problem("AdamW")
    problem.train(2)
    before = problem.weights()
    with averaged(problem.optimizer):
        assert equal(problem.weights(), before)


def test_adamw_is_fused_unless_foreach_is_asked_for() -> None:
    def make(arguments: dict[str, Any]) -> torch.optim.Optimizer:
        return make_optimizer("adamw", [{"params": [nn.Parameter(torch.zeros(2))], "lr": 0.1}], arguments)

    assert make({}).param_groups[0]["fused"]
    assert not make({"foreach": True}).param_groups[0]["fused"]
    assert not make({"fused": False, "amsgrad": True}).param_groups[0]["fused"]


def test_every_optimizer_of_torch_is_known() -> None:
    found = {name for name, kind in vars(torch.optim).items()
             if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer}
    assert {"AdamW", "LBFGS", "Muon"} <= found
    for name in found - {"LBFGS", "SparseAdam"}:
        assert find_optimizer(name).name.lower() == name.lower()
        assert find_optimizer(name.upper()) is find_optimizer(name)
    for name, reason in {"LBFGS": "several times for each step", "SparseAdam": "sparse gradients"}.items():
        for spelling in (name, name.lower(), f"torch.optim.{name}"):
            with pytest.raises(ConfigError, match=f"{spelling}.*{reason}.*use one of AdamW, "):
                find_optimizer(spelling)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("", "AdamW"), ("adamw8BIT", "AdamW8bit"), ("DAdaptation", "DAdaptAdamPreprint"), ("Adafactor", "AdaFactor"),
        ("prodigy-plus-schedule-free", "ProdigyPlusScheduleFree"), ("bitsandbytes.optim.AdamW8bit", "AdamW8bit"),
        ("prodigyplus.ProdigyPlusScheduleFree", "ProdigyPlusScheduleFree"), ("torch.optim.SGD", "SGD"),
        ("prodigyplus.prodigy_plus_schedulefree.ProdigyPlusScheduleFree", "ProdigyPlusScheduleFree"),
        ("schedulefree.AdamWScheduleFree", "AdamWScheduleFree"), ("transformers.optimization.Adafactor", "AdaFactor"),
        ("torch.optim.Muon", "Muon"),
    ],
)  # fmt: skip
def test_other_spellings(written: str, name: str) -> None:
    assert check_optimizer(written) is None
    assert find_optimizer(written) is OPTIMIZERS[name.lower()]


@pytest.mark.parametrize("name", NAMES)
def test_a_slip_is_answered_with_the_name(name: str) -> None:
    assert REFERENCES.keys() == set(NAMES)
    with pytest.raises(ConfigError, match=rf"'{name}_': is not among the optimizers; did you mean {name}\?"):
        find_optimizer(name + "_")


def test_any_class_by_its_module() -> None:
    spec = find_optimizer("pytorch_optimizer.AdaBelief")
    assert "fixed_decay" in accepted_arguments(spec)
    with pytest.raises(ConfigError, match=r"betta: pytorch_optimizer\.AdaBelief takes no such .* accepts betas, "):
        check_arguments("pytorch_optimizer.AdaBelief", {"betta": 1})
    problems = [Problem("AdamW"), Problem("AdamW")]
    for problem in problems:
        groups = [{"params": list(group.params.values()), "lr": 0.01} for group in problem.groups]
        problem.optimizer = make_optimizer("pytorch_optimizer.AdaBelief", groups, {"weight_decay": 0.01})
        problem.train(10)
    first, second = problems
    load_optimizer_state(second.parts, *optimizer_state(first.parts))
    assert type(second.optimizer).__name__ == "AdaBelief"
    first.train(5)
    second.train(5)
    assert equal(first.weights(), second.weights())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere.at_all.Adam", "needs the package nowhere"),
        ("pytorch_optimizer.NoSuch", "pytorch_optimizer has no NoSuch"),
        ("torch.nn.Linear", r"is no torch\.optim\.Optimizer"),
        ("torch.optim.lr_scheduler.LRScheduler", r"is no torch\.optim\.Optimizer"),
        ("no such.thing", "is not among the optimizers"),
        ("zzz", "is not among the optimizers; use one of AdamW, "),
    ],
)
def test_classes_that_are_none(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_arguments(name, {})


@pytest.mark.parametrize(
    ("name", "arguments", "part"),
    [
        ("lion", {"betas": (2, 3)}, "Lion refuses them"),
        ("lion", {"betas": (0.9,)}, "Lion refuses them"),
        ("lion", {"use_triton": True}, "use_triton: replaces the update by a kernel"),
        ("prodigy", {"slice_p": 0}, "Prodigy refuses them"),
        ("prodigy", {"weight_decay": 1e400}, "not finite"),
        ("prodigy", {"fsdp_in_use": True}, "fsdp_in_use: is for sharded parameters"),
        ("adamw", {"betas": (1.5, 0.9)}, "AdamW refuses them"),
        ("adamw", {"eps": 10**4000}, "AdamW refuses them"),
        ("adamw", {"fused": None}, "takes True or False here"),
        ("adamw", {"foreach": 1}, "takes True or False here"),
        ("adamw8bit", {"amsgrad": True}, "AdamW8bit refuses them: AdamW8bit does not support amsgrad"),
        ("PagedAdamW", {"min_8bit_size": 0}, "PagedAdamW takes no such argument; it accepts betas, eps, weight_decay"),
        ("adamw8bit", {"optim_bits": 32}, "optim_bits: is part of the optimizer's name"),
        ("sgdnesterov", {"momentum": 0.0}, "Nesterov momentum requires a momentum"),
        ("adafactor", {"relative_step": False, "warmup_init": True}, "`warmup_init=True` requires"),
        ("muon", {"adjust_lr_fn": "other"}, "other"),
        ("came", {"eps": 1e-8}, "eps: CAME takes no such argument; it accepts betas, "),
    ],
)
def test_values_that_are_refused(name: str, arguments: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_arguments(name, arguments)
    assert part in str(caught.value)
    assert str(caught.value).startswith("--optimizer_args = ")


def test_states_with_anything_in_them(tmp_path: Path) -> None:
    problems = [Problem("SGDNesterov"), Problem("SGDNesterov")]
    problems[0].train(1)
    strange = {
        "half": torch.ones(3, dtype=torch.bfloat16), "bytes": torch.arange(4, dtype=torch.uint8), "none": None,
        "pair": (1, 2.5), "list": [torch.zeros(2), "a"], "nested": {"deep": {"tensor": torch.ones(2)}, "flag": True},
        "infinite": float("inf"),
    }  # fmt: skip
    problems[0].optimizer.state[problems[0].params["vector"]].update(strange)
    problems[0].optimizer.param_groups[1]["running"] = torch.tensor(0.25, dtype=torch.float64)
    save(problems[0], tmp_path / "state")
    after = load("SGDNesterov", tmp_path / "state").optimizer
    found = after.state[next(p for p in after.param_groups[1]["params"] if p.shape == SHAPES["vector"])]
    assert [found[key] for key in ("none", "pair", "infinite")] == [None, (1, 2.5), float("inf")]
    assert found["half"].dtype == torch.bfloat16
    assert torch.equal(found["bytes"], strange["bytes"])
    assert isinstance(found["list"], list)
    assert found["list"][1] == "a"
    assert torch.equal(found["nested"]["deep"]["tensor"], torch.ones(2))
    assert found["nested"]["flag"] is True
    assert after.param_groups[1]["running"].dtype == torch.float64
    problems[0].optimizer.state[problems[0].params["vector"]]["strange"] = object()
    with pytest.raises(ConfigError, match="keeps a object as strange, which cannot be saved"):
        optimizer_state(problems[0].parts)


def test_muon_without_matrices_and_with_nothing_else() -> None:
    kinds = {(3, 4): "momentum_buffer", (5,): "exp_avg", (2, 2, 3, 3): "momentum_buffer", (10_000, 2): "exp_avg"}
    for shape, kind in kinds.items():
        parameter = nn.Parameter(torch.ones(shape))
        optimizer = make_optimizer("muon", [{"params": [parameter], "lr": 0.1}], {})
        parameter.grad = torch.ones(shape)
        assert optimizer.step(lambda: 3.0) == 3.0
        assert kind in optimizer.state[parameter]


def test_muon_steps_a_convolution_the_same_in_every_memory_layout() -> None:
    generator = torch.Generator().manual_seed(3)
    start, gradient = (torch.randn(8, 4, 3, 3, generator=generator) for _ in range(2))
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        parameter = nn.Parameter(start.clone(memory_format=layout))
        optimizer = make_optimizer("muon", [{"params": [parameter], "lr": 0.1}], {})
        for _ in range(3):
            parameter.grad = gradient.clone(memory_format=layout)
            optimizer.step()
        results.append(parameter.detach())
    assert (results[0] - start).abs().max() > 0.01
    torch.testing.assert_close(*results, rtol=1e-2, atol=1e-3)  # Muon's iterations are in bfloat16


def test_the_list_of_optimizers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["optimizers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = {line.split()[0]: line for line in itertools.takewhile(bool, lines)}
    assert [*shown] == NAMES
    assert "bitsandbytes: installed" in shown["AdamW8bit"]
    assert "also DAdaptation" in shown["DAdaptAdamPreprint"]
    assert main(["optimizers", "ADAFACTOR"]) == 0
    text = capsys.readouterr().out
    assert "relative_step" in text
    assert main(["optimizers", "sgdnesterov8bit"]) == 0
    assert "set here: momentum=0.9, nesterov=True" in capsys.readouterr().out
    assert main(["optimizers", "--help"]) == 0
    assert main(["optimizers", "adamv"]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert main(["optimizers", "a", "b"]) == 2


def test_a_missing_package_is_named_with_its_install_line(tmp_path: Path) -> None:
    (tmp_path / "dadaptation.py").write_text("raise ImportError('no module here')\n")
    code = ("from sd_train.optim.optimizers import check_arguments, check_optimizer\nimport sys\n"
            "assert check_optimizer('dadaptlion') is None and 'torch' not in sys.modules\n"
            "check_arguments('dadaptlion', {})")  # fmt: skip
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)
    expected = "ConfigError: --optimizer_type = 'DAdaptLion': needs the package dadaptation (no module here); pip "
    assert expected + "install dadaptation" in done.stderr
