"""LyCORIS networks: the library's names and shapes, equal changes, merging, dropout from counters, strictness."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sd_train.config.lycoris_args import ALGORITHMS, NETWORK_OPTIONS, LycorisArgs, check_lycoris, read_lycoris
from sd_train.config.values import parse_arguments
from sd_train.demo.tiny_model import TinyKind
from sd_train.errors import ConfigError, ModelError, Problems
from sd_train.families.latent import LatentDiffusion
from sd_train.families.parts import Part
from sd_train.lora_files.merging import Weighted, merge_into
from sd_train.lora_files.reading import open_lora
from sd_train.trainables.lycoris import Lycoris, LycorisSettings
from sd_train.trainables.lycoris_files import from_file
from sd_train.trainables.lycoris_module import LycorisModule, Switches, library_class
from sd_train.trainables.lycoris_targets import Target
from sd_train.types import Batch, Geometry, Update
from tests.lycoris_cases import made, small_parts
from tests.models import all_tensors, assert_equal_tensors, fresh_tiny, golden

GOLDEN: dict[str, Any] = golden("lycoris_keys.json.gz")
"""What `create_network` of lycoris-lora 4.1.3 makes of diffusers' own modules: names, shapes and alphas.

Its text encoder's names have got their `text_model`, which transformers dropped.
"""

NOT_OURS = ("lora_unet_conv_in", "lora_unet_conv_out", "lora_unet_time_embedding_linear_1",
            "lora_unet_time_embedding_linear_2")  # fmt: skip
"""The library also changes the U-Net's two ends and its time embedding."""

CASES = [
    "lora use_tucker=True", "lora use_scalar=True train_norm=True", "dora wd_on_output=False", "lora rs_lora=True",
    "loha use_tucker=True dora_wd=True use_scalar=True", "loha", "lokr factor=4 decompose_both=True",
    "lokr use_tucker=True factor=2", "lokr full_matrix=True use_scalar=True", "ia3", "ia3 preset=ia3",
    "ia3 train_on_input=True", "dylora block_size=2", "glora use_scalar=True", "full", "diag-oft rescaled=True",
    "oft constraint=0.001", "boft rescaled=True constraint=0.001",
]  # fmt: skip


MERGED = [case for case in CASES if case not in ("loha", "ia3", "ia3 train_on_input=True", "lora rs_lora=True")]


@cache
def _loaded(whole: bool, kind: TinyKind) -> LatentDiffusion:
    return fresh_tiny(kind) if whole else made(small_parts(kind))


def tiny(whole: bool = False, kind: TinyKind = "sd1") -> LatentDiffusion:
    """The same model every time, without what was installed in it before; `whole`: with every block."""
    family = _loaded(whole, kind)
    for network in family.networks.values():
        for module in network.modules():
            module.__dict__.pop("forward", None)
    return family


def options(words: str, **more: Any) -> dict[str, Any]:
    """The options of a network whose `network_args` are `words`, the first of them the algorithm."""
    values = {
        "network_module": "lycoris.kohya", "network_dim": 4, "network_alpha": 2.0, "network_dropout": None,
        "network_args": parse_arguments([f"algo={words.split()[0]}", *words.split()[1:]]),
        "dim_from_weights": False, "output_lora_format": "kohya",
    }  # fmt: skip
    assert values.keys() == set(NETWORK_OPTIONS)
    return values | more


def args(words: str, **more: Any) -> LycorisArgs:
    problems, warnings = Problems(), list[str]()
    check_lycoris(options(words, **more), lambda name: f"--{name}", problems, warnings)
    assert problems.found == []
    return read_lycoris(options(words, **more))


def installed(family: LatentDiffusion, chosen: LycorisArgs, seed: int = 1, **more: Any) -> Lycoris:
    network = Lycoris(LycorisSettings(chosen, dict.fromkeys(family.networks, 1e-3), seed, **more))
    network.install(family)
    return network


def randomise(network: Lycoris, size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for group in network.groups():
            for parameter in group.params.values():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def prediction(family: LatentDiffusion) -> Tensor:
    place = Geometry((64, 64), (0, 0), (64, 64), False, (64, 64))
    conditioning = family.condition(family.encode_texts(["a cat on a mat"]), {}, [place])
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    return family.predict(noisy, torch.tensor([300]), conditioning)


def counters(network: Lycoris, step: int, micro: int) -> None:
    update = Update(step, 0, step, False, 1, iter(()))
    network.before_batch(update, Batch([], [], [], None, None, *[torch.zeros(0)] * 4, None, None, [], micro))


# Names


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_names_shapes_and_alphas_are_the_librarys(case: str, tmp_path: Path) -> None:
    table = GOLDEN["cases"][case]
    expected = {
        f"{key}.{factor}": found
        for key, kind in zip(GOLDEN["keys"], table["modules"], strict=True)
        for factor, found in (table["kinds"][kind].items() if kind >= 0 else ())
        if key not in NOT_OURS
    }
    network = installed(tiny(whole=True), args(case))
    written = network.file_tensors(network.tensors())
    assert written.keys() == expected.keys()
    for name, tensor in written.items():
        if case.startswith("dylora") and name.endswith("lora_up.weight"):
            # The library leaves out the kernel of a convolution's second factor, which a LoCon has.
            tensor = tensor.flatten(1)
        found = pytest.approx(float(tensor)) if name.endswith(".alpha") else list(tensor.shape)
        assert found == expected[name], name


def test_presets_choose_among_our_targets() -> None:
    def paths(words: str) -> set[str]:
        return {name.partition(".")[0] for name in installed(tiny(whole=True), args(words)).tensors()}

    chosen = paths("ia3 preset=ia3")
    assert {key.rpartition("_to_")[2] for key in chosen if "_to_" in key} == {"k", "v"}
    assert len(chosen) == 16 * (2 * 2 + 1) + 2 * 3
    attention = paths("lora preset=attn-only")
    assert len(attention) == 16 * 8 + 2 * 4
    assert all("attn" in key for key in attention)


def test_sdxl_has_the_original_names_of_matrices_and_norms(tmp_path: Path) -> None:
    family = tiny(kind="sdxl")
    network = installed(family, args("lora train_norm=True preset=unet-only"))
    keys = {name.partition(".")[0] for name in network.tensors()}
    assert {"lora_unet_input_blocks_1_0_in_layers_0", "lora_unet_input_blocks_1_0_in_layers_2"} <= keys
    assert not any("down_blocks" in key or key.startswith("lora_te") for key in keys)
    network.save(tmp_path / "x.safetensors", {})
    lora = open_lora(tmp_path / "x.safetensors", "sdxl")
    assert not lora.unmapped
    assert len(lora.places()) == len(keys)


# What is computed


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])
def test_a_module_computes_what_the_librarys_does(case: str, conv: bool) -> None:
    """Its forward pass in float32, where its rounding does no harm; alpha / block of DyLoRA aside."""
    chosen, generator = args(case), torch.Generator().manual_seed(1)
    layer: nn.Module = nn.Conv2d(8, 16, 3, stride=2, padding=1) if conv else nn.Linear(8, 16)
    x = torch.randn((2, 8, 6, 6) if conv else (2, 3, 8), generator=generator)
    module = LycorisModule(Target("x", layer, False), chosen, 0)
    with torch.no_grad():
        for parameter in module.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        theirs = copy.deepcopy(module.library)
        if chosen.algorithm == "full":
            theirs._org_weight, theirs.org_bias = [layer.weight], [layer.bias]
        if chosen.algorithm == "dylora":
            theirs.get_random_rank_weight = lambda: (*theirs.get_weight(2)[:2], theirs.scale)
        theirs.org_module, theirs.org_forward = [layer], layer.forward
        expected = theirs.forward(x)
        module.install(Switches(training=False))
        assert not torch.allclose(expected, module._forward(x), atol=1e-3)
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", MERGED)
def test_merging_the_file_gives_the_live_prediction(case: str, tmp_path: Path) -> None:
    merge_equals_forward("sd1", case, tmp_path)


@pytest.mark.parametrize("case", ["full train_norm=True"])
def test_merging_it_into_sdxl_too(case: str, tmp_path: Path) -> None:
    merge_equals_forward("sdxl", case, tmp_path)


def merge_equals_forward(kind: TinyKind, case: str, folder: Path) -> None:
    family = tiny(kind=kind)
    before = all_tensors(family)
    with torch.no_grad():
        base = prediction(family)
        network = installed(family, args(case))
        with network.for_inference():
            torch.testing.assert_close(prediction(family), base, atol=1e-5, rtol=0)
            randomise(network)
            live = prediction(family)
        assert (live - base).abs().max() > 0.01
        with network.disabled():
            assert torch.equal(prediction(family), base)
    assert_equal_tensors(all_tensors(family), before)
    network.save(folder / "x.safetensors", {})
    lora, parts = open_lora(folder / "x.safetensors", kind), small_parts(kind)
    assert (lora.unmapped, lora.incomplete()) == ([], [])
    networks = {role: part.tensors for role, part in parts.parts.items() if role != "vae"}
    merged = merge_into(networks, [Weighted(lora, 1.0)])
    changed = {role: Part(part.config, merged.get(role, part.tensors)) for role, part in parts.parts.items()}
    other = made(replace(parts, parts=changed))
    with torch.no_grad():
        torch.testing.assert_close(prediction(other), live, atol=2e-5, rtol=0)


def test_half_precision_keeps_changes_that_rounding_would_lose() -> None:
    layer = nn.Linear(16, 16, bias=False).to(torch.bfloat16)
    module = LycorisModule(Target("x", layer, False), args("full"), 0)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        module.parameters["diff"].fill_(1e-4)
        module.install(Switches())
        x = torch.ones(1, 16, dtype=torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            changed = module.forward(x) - module._forward(x)
        # A bfloat16 weight of 1 + 1e-4 is 1: what the layer gives is all that is rounded.
        assert module._applied(x.float()).mean().item() == pytest.approx(16e-4, rel=1e-2)
        assert changed.dtype == layer(x).dtype == torch.bfloat16


# What is drawn


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


def randomise_module(module: LycorisModule) -> None:
    with torch.no_grad():
        for parameter in module.parameters.values():
            parameter.add_(0.1)


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
        torch.testing.assert_close(
            module.forward(x) - module._forward(x) - bias(), before / 4, atol=1e-5, rtol=1e-4
        )


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
