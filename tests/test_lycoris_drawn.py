"""LyCORIS networks: dropout from counters, limits of the change, and what is loaded."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from sd_train.config.lycoris_args import ALGORITHMS, LycorisArgs
from sd_train.errors import ConfigError, ModelError
from sd_train.families.latent import LatentDiffusion
from sd_train.trainables.lycoris import Lycoris, LycorisSettings
from sd_train.trainables.lycoris_files import from_file
from sd_train.trainables.lycoris_module import LycorisModule, Switches, library_class
from sd_train.trainables.lycoris_targets import Target
from tests.lycoris_cases import (
    args,
    counters,
    installed,
    made,
    prediction,
    randomise,
    randomise_module,
    small_parts,
    tiny,
)  # fmt: skip
from tests.models import assert_equal_tensors


def drawn(chosen: LycorisArgs, keys: list[tuple[int, int]], family: LatentDiffusion) -> list[Tensor]:
    network = installed(family, chosen)
    randomise(network)
    found = []
    with torch.no_grad():
        for key in keys:
            counters(network, *key)
            found.append(prediction(family))
    return found


DROPPING = ["loha dropout=0.2", "lora rank_dropout=0.2 rank_dropout_scale=True", "full rank_dropout=0.3",
            "lokr module_dropout=0.5", "dora rank_dropout=0.3", "dylora block_size=1"]  # fmt: skip


@pytest.mark.parametrize("case", DROPPING)
def test_all_that_is_random_comes_from_the_counters(case: str) -> None:
    states = random.getstate(), torch.get_rng_state()
    keys = [(0, 0), (0, 1), (1, 0), (0, 0)]
    first, micro, later, again = drawn(args(case), keys, tiny())
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert torch.equal(first, again)
    assert not torch.allclose(first, micro)
    assert not torch.allclose(first, later)
    random.seed(99)
    torch.manual_seed(99)
    assert torch.equal(first, drawn(args(case), keys[:1], tiny())[0])


def test_rank_dropout_leaves_out_rows_and_module_dropout_the_whole() -> None:
    layer = nn.Linear(4, 2000, bias=False)
    for case, switches in (("lora rank_dropout=0.25", Switches()), ("loha rank_dropout=0.25", Switches(key=(3, 1)))):
        module = LycorisModule(Target("x", layer, False), args(case), 0)
        with torch.no_grad():
            for parameter in module.parameters.values():
                parameter.fill_(0.1)
        module.install(switches)
        change = layer(torch.ones(1, 4)) - module._forward(torch.ones(1, 4))
        assert change.eq(0).float().mean().item() == pytest.approx(0.25, abs=0.04)
        layer.__dict__.pop("forward")
    network = installed(tiny(whole=True), args("lora module_dropout=0.25"))
    kept = [float(module._thinned(torch.ones(1))) for module in network._all().values()]
    assert set(kept) == {0.0, 1.0}
    assert kept.count(0.0) / len(kept) == pytest.approx(0.25, abs=0.08)


def test_dylora_trains_one_block_at_a_time() -> None:
    layer = nn.Linear(6, 5)
    module = LycorisModule(Target("x", layer, False), args("dylora block_size=2", network_dim=8), 0)
    randomise_module(module)
    seen = set()
    for step in range(20):
        module.install(Switches(key=(step, 0)))
        layer(torch.ones(1, 6)).sum().backward()
        (block,) = {int(name[-1]) for name, value in module.parameters.items() if value.grad is not None}
        seen.add(block)
        for parameter in module.parameters.values():
            parameter.grad = None
        layer.__dict__.pop("forward")
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize("case", ["lokr dropout=0.2 rank_dropout=0.2 module_dropout=0.3", "dylora"])
def test_gradient_checkpointing_sees_the_same(case: str) -> None:
    found: list[dict[str, Tensor]] = []
    for checkpointed in (False, True):
        family = made(small_parts()) if checkpointed else tiny()
        network = installed(family, args(case))
        randomise(network)
        counters(network, 5, 1)
        if checkpointed:
            family.checkpoint_gradients("unet")
            family.checkpoint_gradients("text_encoder")
        prediction(family).square().mean().backward()
        found.append(
            {
                name: torch.zeros(0) if parameter.grad is None else parameter.grad
                for group in network.groups()
                for name, parameter in group.params.items()
            }
        )
    assert_equal_tensors(*found)


def test_the_seed_and_the_name_decide_how_it_begins() -> None:
    first, again, other = (installed(tiny(), args("loha"), seed).tensors() for seed in (1, 1, 2))
    assert_equal_tensors(first, again)
    name = "lora_unet_mid_block_resnets_0_conv1.hada_w1_a"
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first["lora_unet_mid_block_resnets_1_conv1.hada_w1_a"])


# Limits and loading


@pytest.mark.parametrize("case", ["lora", "lora use_tucker=True", "loha", "lokr", "ia3", "dylora", "glora", "full"])
def test_changes_are_kept_within_a_norm(case: str) -> None:
    layer = nn.Conv2d(8, 16, 3)
    module = LycorisModule(Target("x", layer, False), args(case), 0)
    module.install(Switches(training=False))
    randomise_module(module)
    x, bias = torch.ones(1, 8, 5, 5), (lambda: module.parameters["diff_b"].view(-1, 1, 1) if case == "full" else 0)
    with torch.no_grad():
        before = module.forward(x) - module._forward(x) - bias()
        size = module_norm(module)
        module.limit(size * 2)
        torch.testing.assert_close(module.forward(x) - module._forward(x) - bias(), before)
        module.limit(size / 4)
        torch.testing.assert_close(module.forward(x) - module._forward(x) - bias(), before / 4, atol=1e-5, rtol=1e-4)


def module_norm(module: LycorisModule) -> float:
    """Of the change of the weight, read from what the module does to single pixels."""
    weights = []
    for channel in range(8):
        for row in range(3):
            for column in range(3):
                x = torch.zeros(1, 8, 3, 3)
                x[0, channel, row, column] = 1
                weights.append(module.forward(x) - module._forward(x))
    offset = module.parameters["diff_b"].view(-1, 1, 1) if "diff_b" in module.parameters else 0
    return float((torch.cat(weights) - offset).norm())


@pytest.mark.parametrize("case", ["lora use_scalar=True", "dylora block_size=2", "ia3", "full train_norm=True"])
def test_what_was_written_is_read_back(case: str) -> None:
    network = installed(tiny(), args(case))
    randomise(network)
    written = {name: tensor.clone() for name, tensor in network.file_tensors(network.tensors()).items()}
    again = installed(tiny(), args(case), 2, start=written)
    assert_equal_tensors(again.file_tensors(again.tensors()), written)
    assert from_file(written, again.tensors()).keys() == again.tensors().keys()


def test_weights_that_do_not_fit_are_refused() -> None:
    network = installed(tiny(), args("lokr"))
    before = {name: tensor.clone() for name, tensor in network.tensors().items()}
    name = "lora_unet_mid_block_resnets_0_conv1"
    wrong = {key: tensor + 1 for key, tensor in before.items() if key != f"{name}.lokr_w1"}
    with pytest.raises(ModelError, match=rf"(?s)^86 differences.*{name}\.lokr_w1 is missing.*alpha is"):
        network.load(wrong)
    with pytest.raises(ModelError, match=r"has shape \(1,\), this network"):
        network.load({f"{name}.lokr_w1": torch.zeros(1)}, strict=False)
    assert_equal_tensors(network.tensors(), before)
    more = before | {"lora_unet_conv_in.lokr_w1": torch.zeros(1)}
    with pytest.raises(ModelError, match=r"(?s)lora_unet_conv_in: LyCORIS's full preset .*merge the file into"):
        installed(tiny(), args("lokr"), start=more)
    start = {key: tensor for key, tensor in before.items() if key.startswith("lora_unet")}
    with pytest.raises(ModelError, match=r"(?s)--network_weights: .* is missing.*give algo, ranks and alphas"):
        installed(tiny(), args("lokr"), start=start)


def test_a_width_that_boft_cannot_divide_and_a_preset_without_targets() -> None:
    with pytest.raises(ConfigError, match=r"--network_dim = 1: boft cannot divide lora_te_.*choose a larger one"):
        installed(tiny(), args("boft", network_dim=1))
    settings = LycorisSettings(args("lora preset=unet-only"), {"text_encoder": 1e-3}, 0)
    with pytest.raises(ConfigError, match=r"preset=unet-only changes nothing in what is trained \(text_encoder\)"):
        Lycoris(settings).install(tiny())


def test_the_library_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ALGORITHMS:
        library_class(module)
    monkeypatch.setitem(__import__("sys").modules, "lycoris.modules.loha", None)
    with pytest.raises(ConfigError, match="pip install lycoris-lora"):
        library_class("loha")


@pytest.fixture(autouse=True)
def _global_generators_untouched() -> Iterator[None]:
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(state)
