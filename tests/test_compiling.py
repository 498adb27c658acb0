"""`--torch_compile`: how many graphs there are, that nothing breaks them, and that what they compute is the same."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
import torch._dynamo
from torch._dynamo.backends import registry
from torch._dynamo.utils import counters

from sd_train.compiling import CompileSettings, _traits, check_compiler, compile_unet, program_kinds
from sd_train.config.parser import load_run_config
from sd_train.errors import ConfigError
from sd_train.families.latent import LatentDiffusion
from sd_train.train_network import main
from sd_train.trainables.lora import Lora, LoraSettings
from sd_train.types import Conditioning
from tests.models import load
from tests.runs import differences, metadata, scalars, train, words, write_dataset

SIZES = tuple((height, width) for height in range(4, 20, 4) for width in range(4, 24, 4))
"""Twenty buckets, in latents."""
UNET = "--network_train_unet_only"


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Every test begins without graphs and leaves torch's settings as they were."""
    import torch._functorch.config
    import torch._inductor.config
    import torch.compiler.config
    import torch.fx.experimental._config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "programs"))
    torch._dynamo.reset()
    counters.clear()
    with (
        torch.fx.experimental._config.patch(use_duck_shape=True),
        torch._dynamo.config.patch(automatic_dynamic_shapes=True),
        torch._functorch.config.patch(force_non_lazy_backward_lowering=False),
        torch._inductor.config.patch(deterministic=False),
        torch.compiler.config.patch(cache_key_tag=""),
    ):
        yield
    torch._dynamo.reset()


def with_lora(path: Path) -> tuple[LatentDiffusion, list[torch.nn.Parameter]]:
    family = load(path)
    lora = Lora(LoraSettings(rank=4, alpha=4.0, dropout=0.0, rates={"unet": 1.0}, seed=0))
    lora.install(family)
    parameters = [parameter for group in lora.groups() for parameter in group.params.values()]
    with torch.no_grad():
        for place, parameter in enumerate(parameters):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(place)) / 10)
    return family, parameters


def squares(
    family: LatentDiffusion, parameters: list[torch.nn.Parameter], sizes: tuple[tuple[int, int], ...]
) -> list[float]:
    """The loss of a batch of each size, and the norm of its gradients."""
    found = []
    for size in sizes:
        generator = torch.Generator().manual_seed(size[0] * 100 + size[1])
        width = family.unet.config["cross_attention_dim"]
        states = torch.randn(2, 77, width, generator=generator)
        noisy = torch.randn(2, 4, *size, generator=generator)
        loss = family.predict(noisy, torch.tensor([10, 800]), Conditioning(states)).square().mean()
        gradients = torch.autograd.grad(loss, parameters)
        found += [float(loss.detach()), float(torch.stack([each.norm() for each in gradients]).norm())]
    return found


def graphs() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def recorded(made: list[set[int]]) -> Callable[..., object]:
    """A backend that notes which numbers each graph's symbols stand for while it is made, and computes as without."""

    def backend(graph: torch.fx.GraphModule, _: Sequence[object]) -> Callable[..., object]:
        values = [node.meta.get("example_value") for node in graph.graph.nodes if node.op == "placeholder"]
        sizes = [size for value in values if isinstance(value, torch.Tensor) for size in value.shape]
        made.append({size.node.hint for size in sizes if isinstance(size, torch.SymInt)})
        return graph.forward

    return backend


@pytest.mark.parametrize(("scope", "most", "largest"), [("regional", None, (320, 80)), ("whole", 3, (16, 20))])
def test_twenty_buckets_need_few_graphs_each_made_with_the_largest_batch(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, scope: str, most: int | None, largest: tuple[int, ...]
) -> None:
    made = list[set[int]]()
    monkeypatch.setitem(registry._BACKENDS, "recorded", None)
    monkeypatch.setitem(registry._COMPILER_FNS, "recorded", recorded(made))
    plain = squares(*with_lora(small_model), SIZES)
    family, parameters = with_lora(small_model)
    names = set(family.unet.state_dict())
    # More samples than the first batch has, which is of the smallest size.
    settings = CompileSettings("whole" if scope == "whole" else "regional", "recorded", 3, SIZES)
    compiled = compile_unet(family.unet, settings, pytest.fail)
    assert squares(family, parameters, SIZES) == plain
    assert 0 < graphs() <= (most or 2 * compiled.kinds)
    assert all(3 in each and each <= {3, *largest} for each in made), made
    after = graphs()
    # Another order needs nothing new, nor do predictions without gradients, of whatever size.
    assert squares(family, parameters, SIZES[::-5]) == [
        value for place in range(len(SIZES) - 1, -1, -5) for value in plain[2 * place : 2 * place + 2]
    ]
    width = family.unet.config["cross_attention_dim"]
    with torch.no_grad():
        family.predict(torch.zeros(1, 4, 12, 36), torch.tensor([5]), Conditioning(torch.zeros(1, 77, width)))
    assert graphs() == after
    assert set(family.unet.state_dict()) == names


def test_what_the_largest_batch_does_not_fit_into_is_told(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, parameters = with_lora(small_model)
    warnings = list[str]()
    compile_unet(family.unet, CompileSettings("regional", "eager", 8, SIZES[:4]), warnings.append)
    narrow = family.unet.conv_in.forward

    def small_memory(sample: torch.Tensor) -> torch.Tensor:
        if len(sample) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return narrow(sample)

    monkeypatch.setattr(family.unet.conv_in, "forward", small_memory)
    squares(family, parameters, SIZES[:1])
    (said,) = warnings
    assert "out of memory with 8 samples of 4x16 latents at once; the graphs are made for 4 of them" in said
    assert torch.compiler.config.cache_key_tag.startswith("4x4x16")


def test_states_within_a_mapping_have_graphs_of_their_own_when_they_learn() -> None:
    frozen, learning = torch.zeros(2, 8), torch.zeros(2, 8, requires_grad=True)
    cases = [tuple(_traits({"added_cond_kwargs": {"text_embeds": each}, "more": None})) for each in (frozen, learning)]
    assert cases[0] != cases[1]
    assert cases[0] == tuple(_traits({"added_cond_kwargs": {"text_embeds": torch.ones(5, 8)}}))


def test_a_run_is_the_same_with_graphs_and_resumes_to_the_bit(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = write_dataset(tmp_path / "d.toml", "batch_size = 2", size=96)
    more = f"{UNET} --logging_dir {tmp_path / 'logs'} --gradient_checkpointing"
    train(small_model, dataset, tmp_path / "plain", f"{more} --max_train_steps 3")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    graph = f"{UNET} --gradient_checkpointing --torch_compile --dynamo_backend eager --cache_dir {tmp_path / 'caches'}"
    curves = f"--max_train_steps 3 --logging_dir {tmp_path / 'graph'}"
    whole = train(small_model, dataset, tmp_path / "whole", f"{graph} {curves}")
    assert graphs() > 0
    # Only runs that make their graphs with such a batch find its programs.
    kind = program_kinds(torch.device("cpu"))
    kept = tmp_path / "caches" / "compiled" / f"2x128x64{kind}"
    assert (os.environ["TORCHINDUCTOR_CACHE_DIR"], torch.compiler.config.cache_key_tag) == (str(kept), f"2x16x8{kind}")
    torch._dynamo.reset()
    train(small_model, dataset, tmp_path / "parts", f"{graph} --max_train_steps 1 --save_state")
    torch._dynamo.reset()
    capsys.readouterr()
    last = train(small_model, dataset, tmp_path / "parts", f"{graph} --max_train_steps 3 --resume latest")
    assert differences(whole, last) == []
    assert metadata(whole) == metadata(last)
    plain, same = (scalars(tmp_path / name)["loss/current"] for name in ("logs", "graph"))
    assert [value for _, value in same] == pytest.approx([value for _, value in plain], rel=1e-5)


def test_what_is_drawn_anew_cannot_be_compiled(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_dataset(tmp_path / "d.toml")
    drawn = "--torch_compile --network_dropout 0.1 --network_args rank_dropout=0.2 module_dropout=0"
    assert main(words(small_model, dataset, tmp_path, drawn)) == 2
    said = capsys.readouterr().err
    assert "--torch_compile = True: does not go with network_dropout = 0.1 and network_args rank_dropout=0.2" in said
    given = words(small_model, dataset, tmp_path, "--torch_compile_scope whole --dynamo_backend eager")
    warnings = load_run_config("train_network", given).warnings
    assert [line.split(" has")[0] for line in warnings] == ["--torch_compile_scope", "--dynamo_backend"]
    assert all("it acts only with torch_compile" in line for line in warnings)
    with pytest.raises(ConfigError, match="'tvm': is not yet supported; write inductor or aot_eager or eager"):
        load_run_config("train_network", words(small_model, dataset, tmp_path, "--dynamo_backend tvm"))


def test_a_missing_compiler_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("/no/such/g++",))
    check_compiler("aot_eager", torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler, and there is none .*; install g\+\+ or clang"):
        check_compiler("inductor", torch.device("cpu"))
