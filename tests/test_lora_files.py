"""LoRA files: sd-scripts' sums, LyCORIS's algorithms, ranks by singular values, and the commands."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd_train.commands.lora import main
from sd_train.errors import ConfigError, ModelError, RunError
from sd_train.families.parts import ModelRequest, read_model
from sd_train.lora_files.adapter import DOWN, MAGNITUDE, UP, Adapter, change, delta
from sd_train.lora_files.decompose import RankRule, decompose, resize
from sd_train.lora_files.merging import Weighted, merge_loras
from sd_train.lora_files.names import Place
from sd_train.lora_files.reading import LoraFile, lora_from_tensors, open_lora
from sd_train.lora_files.writing import kohya_tensors, write_lora
from tests.lora_cases import all_targets, expected, make, some_targets
from tests.models import DATA, golden, write_file, write_folder

PLACE = Place("unet", "down_blocks.0.resnets.0.conv1")
KEY = "lora_unet_down_blocks_0_resnets_0_conv1"
CPU = torch.device("cpu")


def one(tensors: dict[str, Tensor]) -> Adapter:
    """The only module of a file that holds `tensors`."""
    lora = lora_from_tensors({f"{KEY}.{name}": tensor for name, tensor in tensors.items()})
    assert lora.places() == [PLACE]
    assert not lora.unmapped
    return lora.adapter(PLACE)


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


# The change of the weights


@pytest.mark.parametrize("multiplier", ["1.0", "0.7"])
@pytest.mark.parametrize("key", golden("lora_golden_merge.json")["modules"])
def test_the_change_equals_sd_scripts(key: str, multiplier: str) -> None:
    module = golden("lora_golden_merge.json")["modules"][key]
    figures = module["delta"][multiplier]
    tensors = load_file(DATA / "lora_golden_merge.safetensors")
    lora = lora_from_tensors({name: tensor for name, tensor in tensors.items() if name.startswith(f"{key}.")})
    adapter = lora.adapter(lora.places()[0])
    assert (adapter.rank, adapter.alpha) == (module["rank"], module["alpha"])
    found = change(adapter, torch.zeros(figures["shape"]), float(multiplier))
    assert found.double().norm().item() == pytest.approx(figures["norm"], rel=1e-6)
    assert found.double().sum().item() == pytest.approx(figures["sum"], abs=1e-4)
    for place, value in figures["samples"]:
        assert found[tuple(place)].item() == pytest.approx(value, abs=1e-8)


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (0.0, 1.0), (4.0, 2.0), (0.5, 0.25)])
def test_alpha_zero_or_missing_is_the_rank(alpha: float | None, scale: float) -> None:
    tensors = {UP: rand(6, 2), DOWN: rand(2, 5)} | ({} if alpha is None else {"alpha": torch.tensor(alpha)})
    torch.testing.assert_close(delta(one(tensors)), tensors[UP] @ tensors[DOWN] * scale)


def test_a_convolutions_factors_make_a_convolution() -> None:
    x, up, down = rand(2, 5, 9, 7), rand(6, 3, 1, 1), rand(3, 5, 3, 3)
    adapter = one({UP: up, DOWN: down, "alpha": torch.tensor(1.5)})
    through = torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, down, padding=1), up) * 0.5
    torch.testing.assert_close(torch.nn.functional.conv2d(x, delta(adapter), padding=1), through, atol=1e-4, rtol=1e-4)


def tucker(first: Tensor, second: Tensor, inner: Tensor) -> Tensor:
    """[rank, out], [rank, in], [rank, rank, h, w] -> [out, in, h, w], element by element."""
    out = torch.zeros(first.shape[1], second.shape[1], *inner.shape[2:])
    for i in range(inner.shape[0]):
        for j in range(inner.shape[1]):
            out += torch.einsum("p,r,kl->prkl", first[i], second[j], inner[i, j])
    return out


def test_loha_and_lokr_follow_their_formulas() -> None:
    a, b, c, d = rand(6, 2), rand(2, 8), rand(6, 2) + 1, rand(2, 8) + 1
    alpha = torch.tensor(3.0)
    loha = one({"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d, "alpha": alpha})
    torch.testing.assert_close(delta(loha), (a @ b) * (c @ d) * 1.5)
    core, other = rand(2, 2, 3, 3), rand(2, 2, 3, 3) + 1
    shapes = {"hada_w1_a": rand(2, 6), "hada_w1_b": rand(2, 5), "hada_w2_a": rand(2, 6), "hada_w2_b": rand(2, 5)}
    conv = one(shapes | {"hada_t1": core, "hada_t2": other, "alpha": alpha})
    halves = [tucker(rand(2, 6), rand(2, 5), inner) for inner in (core, other)]
    torch.testing.assert_close(delta(conv), halves[0] * halves[1] * 1.5)

    whole = rand(3, 2)
    # Two whole halves have no rank, and alpha no meaning (LyCORIS).
    torch.testing.assert_close(delta(one({"lokr_w1": whole, "lokr_w2": a, "alpha": alpha})), torch.kron(whole, a))
    lokr = one({"lokr_w1": whole, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": alpha})
    torch.testing.assert_close(delta(lokr), torch.kron(whole, a @ b) * 1.5)
    both = one({"lokr_w1_a": a, "lokr_w1_b": b, "lokr_w2_a": c, "lokr_w2_b": d, "alpha": alpha})
    torch.testing.assert_close(delta(both), torch.kron(a @ b, c @ d) * 1.5)
    deep = one({"lokr_w1": whole, "lokr_w2_a": rand(2, 6), "lokr_w2_b": rand(2, 5), "lokr_t2": core, "alpha": alpha})
    expected_deep = torch.einsum("ab,cdkl->acbdkl", whole, tucker(rand(2, 6), rand(2, 5), core)).reshape(18, 10, 3, 3)
    torch.testing.assert_close(delta(deep), expected_deep * 1.5)


def test_locon_with_an_inner_factor_full_and_ia3() -> None:
    up, down, mid = rand(6, 2, 1, 1), rand(2, 5, 1, 1), rand(2, 2, 3, 3)
    locon = one({UP: up, DOWN: down, "lora_mid.weight": mid, "alpha": torch.tensor(1.0)})
    torch.testing.assert_close(delta(locon), tucker(up.flatten(1).T, down.flatten(1), mid) * 0.5)
    weight, diff = rand(6, 5, 3, 3), rand(6, 5, 3, 3) + 1
    torch.testing.assert_close(change(one({"diff": diff}), weight, 0.5), 0.5 * diff)
    rows = one({"weight": rand(6), "on_input": torch.tensor(False)})
    torch.testing.assert_close(change(rows, weight, 0.5), 0.5 * weight * rand(6).view(6, 1, 1, 1))
    columns = one({"weight": rand(5), "on_input": torch.tensor(True)})
    torch.testing.assert_close(change(columns, weight), weight * rand(5).view(1, 5, 1, 1))


@pytest.mark.parametrize("axis", [0, 1])
def test_dora_gives_each_column_or_row_its_magnitude(axis: int) -> None:
    weight, up, down = rand(6, 4), rand(6, 2), rand(2, 4)
    magnitude = rand(6, 1).abs() + 1 if axis == 0 else rand(1, 4).abs() + 1
    adapter = one({UP: up, DOWN: down, "alpha": torch.tensor(1.0), MAGNITUDE: magnitude})
    changed = weight + change(adapter, weight)
    torch.testing.assert_close(changed.norm(dim=1 - axis), magnitude.flatten())
    direction = torch.nn.functional.cosine_similarity(changed, weight + up @ down / 2, dim=1 - axis)
    torch.testing.assert_close(direction, torch.ones_like(direction))
    torch.testing.assert_close(change(adapter, weight, 0.5), (changed - weight) / 2)


def test_algorithms_that_are_not_computed_say_so() -> None:
    with pytest.raises(ModelError, match="oft_diag"):
        change(one({"oft_diag": rand(2, 2, 2)}), rand(4, 4))
    with pytest.raises(ModelError, match=r"blocks of shape \(3, 2, 2\) do not make up 4 outputs"):
        change(one({"oft_blocks": rand(3, 2, 2)}), rand(4, 4))
    glora = one({name: rand(4, 4) for name in ("a1.weight", "a2.weight", "b1.weight", "b2.weight")})
    with pytest.raises(ModelError, match="4 scales, the model's weight has 6 inputs"):
        change(glora, rand(4, 6))
    with pytest.raises(ModelError, match=r"\(6, 5\).*\(7, 5\)"):
        change(one({UP: rand(6, 2), DOWN: rand(2, 5)}), rand(7, 5))


# Reading


def test_family_is_told_by_metadata_names_or_widths() -> None:
    def family(key: str, width: int, metadata: dict[str, str] | None = None) -> str | None:
        tensors = {f"{key}.lora_up.weight": torch.ones(4, 2), f"{key}.lora_down.weight": torch.ones(2, width)}
        return lora_from_tensors(tensors, metadata).family

    attention = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    assert [family(attention, width) for width in (768, 1024, 2048, 1280, 64)] == [
        "sd1", "sd2", "sdxl", "sdxl_refiner", None,
    ]  # fmt: skip
    assert family("lora_unet_input_blocks_8_1_transformer_blocks_9_attn1_to_q", 64) == "sdxl"
    assert family("lora_te2_text_model_encoder_layers_31_mlp_fc1", 64) == "sdxl"
    assert family("lora_te1_text_model_encoder_layers_3_mlp_fc1", 768) == "sdxl"
    assert family("lora_te_text_model_encoder_layers_3_self_attn_q_proj", 1024) == "sd2"
    assert family(attention, 64, {"ss_base_model_version": "sd_v2_768_v"}) == "sd2"
    assert family(attention, 64, {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}) == "sdxl"


def test_what_cannot_be_placed_is_told(tmp_path: Path) -> None:
    tensors = {f"{KEY}.{UP}": rand(6, 2), f"{KEY}.{DOWN}": rand(2, 5), "bundle_emb.x.string_to_param.*": rand(2, 2)}
    tensors |= {f"unet.{PLACE.path}.lora_A.weight": rand(2, 5), "lora_unet_conv_out.lora_up.weight": rand(2, 2)}
    lora = lora_from_tensors(tensors)
    assert lora.unmapped == ["bundle_emb.x.string_to_param.*"]
    assert lora.twice == [f"unet.{PLACE.path}.lora_A.weight"]
    assert lora.incomplete() == [Place("unet", "conv_out")]
    for name, content in (("none", {"a": rand(1)}), ("flux", {"transformer.x_embedder.lora_A.weight": rand(2, 2)})):
        save_file(content, tmp_path / f"{name}.safetensors")
        with pytest.raises(ModelError, match="holds no LoRA of a Stable Diffusion model"):
            open_lora(tmp_path / f"{name}.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    for path in (tmp_path, tmp_path / "missing.safetensors", tmp_path / "text.safetensors"):
        with pytest.raises(ModelError, match=path.name):
            open_lora(path)


# Ranks


def least_rank(values: list[float], method: str, target: float) -> int:
    """sd-scripts' rules, by trying every rank."""
    for rank in range(1, len(values) + 1):
        kept, total = values[:rank], values
        if method == "sv_fro" and sum(v * v for v in kept) >= target**2 * sum(v * v for v in total) - 1e-9:
            return rank
        if method == "sv_cumulative" and sum(kept) >= target * sum(total) - 1e-9:
            return rank
        if method == "sv_ratio" and (rank == len(values) or values[rank] <= values[0] / target):
            return rank
    return len(values)


@pytest.mark.parametrize("method", ["sv_ratio", "sv_fro", "sv_cumulative"])
@pytest.mark.parametrize("target", [0.3, 0.8, 0.95, 1.0])
def test_ranks_are_chosen_as_sd_scripts_does(method: Any, target: float) -> None:
    target = target if method != "sv_ratio" else 20 * target + 1.5
    for values in ([8.0, 4.0, 2.0, 1.0, 0.5], [1.0, 1.0, 1.0, 1.0], [3.0]):
        rule = RankRule(99, 2, method, target)
        assert rule.choose(torch.tensor(values), conv=False) == least_rank(values, method, target)
        assert rule.choose(torch.tensor(values), conv=True) == min(2, least_rank(values, method, target))
    assert RankRule(99, 99, method, target).choose(torch.zeros(4), conv=False) == 1


@pytest.mark.parametrize(
    "place", [PLACE, Place("unet", "conv_in"), Place("text_encoder", "text_model.encoder.layers.0.mlp.fc1")]
)
def test_resizing_is_the_best_approximation_and_keeps_the_scale(place: Place) -> None:
    (adapter,) = make("sd1", [place], "full", "three")
    same = resize(adapter, RankRule(999, 999), CPU)
    torch.testing.assert_close(delta(same.adapter), expected(adapter), atol=1e-5, rtol=1e-4)
    assert same.kept == pytest.approx(1, abs=1e-6)
    assert same.adapter.scale == pytest.approx(adapter.scale)
    small = resize(adapter, RankRule(3, 3), CPU)
    whole = expected(adapter).flatten(1)
    left, values, right = torch.linalg.svd(whole, full_matrices=False)
    best = (left[:, :3] * values[:3]) @ right[:3]
    torch.testing.assert_close(delta(small.adapter).flatten(1), best, atol=1e-4, rtol=1e-3)
    assert small.adapter.rank == 3
    assert small.adapter.scale == pytest.approx(adapter.scale)
    assert small.kept == pytest.approx((values[:3].norm() / values.norm()).item(), rel=1e-4)


def test_clamping_cuts_the_largest_elements() -> None:
    weight = rand(40, 30)
    plain, cut = (decompose(PLACE, weight, RankRule(8, 8), share).adapter for share in (None, 0.9))
    every = torch.cat([plain.factors[name].flatten() for name in (UP, DOWN)])
    most = torch.quantile(every, 0.9)
    for name in (UP, DOWN):
        torch.testing.assert_close(cut.factors[name], plain.factors[name].clamp(-most, most))


# Several LoRAs as one


def one_lora(seed: int) -> tuple[LoraFile, list[Adapter]]:
    places = [PLACE, Place("unet", "conv_in"), Place("text_encoder", "text_model.encoder.layers.1.mlp.fc2")]
    adapters = make("sd1", places[seed:], "mixed", "mixed")
    return lora_from_tensors(kohya_tensors(adapters, "sd1").tensors, family="sd1"), adapters


@pytest.mark.parametrize("rule", [None, RankRule(999, 999)])
def test_merged_loras_do_what_each_does(rule: RankRule | None) -> None:
    (first, ours), (second, theirs) = one_lora(0), one_lora(1)
    merged = {one.place: one for one in merge_loras([Weighted(first, 0.7), Weighted(second, -0.3)], rule, CPU)}
    assert set(merged) == {adapter.place for adapter in ours}
    others = {adapter.place: expected(adapter) * -0.3 for adapter in theirs}
    for adapter in ours:
        total = expected(adapter) * 0.7
        total = total + others[adapter.place] if adapter.place in others else total
        torch.testing.assert_close(delta(merged[adapter.place]), total, atol=1e-5, rtol=1e-4)


# Commands


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as one file, half precision."""
    return write_file(tmp_path_factory.mktemp("model"))


def lora_file(path: Path, adapters: list[Adapter], dtype: torch.dtype = torch.float32, **metadata: str) -> Path:
    write_lora(path, kohya_tensors(adapters, "sd1"), metadata, dtype, overwrite=True)
    return path


def read_metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def changes(path: Path) -> dict[Place, Tensor]:
    lora = open_lora(path, "sd1")
    return {adapter.place: delta(adapter) for adapter in lora.adapters()}


def test_check_tells_what_is_there(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapters = make("sd1", some_targets("sd1"), "mixed", "mixed")
    path = lora_file(tmp_path / "a.safetensors", adapters, ss_base_model_version="sd_v1", ss_steps="300")
    assert main(["check", str(path), "--model", str(model)]) == 0
    text = capsys.readouterr().out
    assert "Stable Diffusion 1.x" in text
    assert "ss_steps" in text
    assert "300" in text
    assert "diffusers    no: loses the alphas" in text
    assert "ComfyUI      yes" in text
    assert main(["check", str(path), "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    assert len(table["modules"]) == len(adapters)
    assert table["alpha"] == {
        str(alpha): sum(adapter.alpha == alpha for adapter in adapters) for alpha in map(float, table["alpha"])
    }
    by_path = {(module["role"], module["path"]): module for module in table["modules"]}
    for adapter in adapters:
        module = by_path[adapter.place]
        assert (module["rank"], module["alpha"]) == (adapter.rank, adapter.alpha)
        assert module["scale"] == pytest.approx(adapter.scale)
        assert module["dtype"] == "F32"
        assert module["finite"]


def test_check_finds_what_is_wrong(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapters = make("sd1", all_targets("sd1")[:4])
    tensors = kohya_tensors(adapters, "sd1").tensors
    first, second = (
        name for name in tensors if (name.endswith(UP) and "attn" not in name) or ("to_q" in name and UP in name)
    )
    broken = tensors | {first: tensors[first] * float("nan"), second: torch.zeros_like(tensors[second])}
    broken["lora_unet_conv_out.lora_up.weight"] = rand(4, 2)
    wide = {f"lora_unet_down_blocks_0_attentions_1_proj_out.{name}": rand(9, 2) for name in (UP,)}
    wide |= {f"lora_unet_down_blocks_0_attentions_1_proj_out.{DOWN}": rand(2, 9)}
    save_file(broken | wide, tmp_path / "b.safetensors")
    assert main(["check", str(tmp_path / "b.safetensors"), "--model", str(model)]) == 3
    text = capsys.readouterr().out
    assert "NaN" in text
    assert "unet.conv_out lack factors" in text
    assert "are zero" in text
    assert "down_blocks.0.attentions.1.proj_out (LoRA 9x9, model 32x32)" in text
    missing = {
        f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_5_ff_net_2.{name}": rand(2, 2) for name in (UP, DOWN)
    }
    save_file(missing, tmp_path / "c.safetensors")
    assert main(["check", str(tmp_path / "c.safetensors"), "--model", str(model)]) == 3
    assert "1 of 1 modules are not in the model" in capsys.readouterr().out


@pytest.mark.parametrize("folder", [False, True])
def test_merging_into_a_model(folder: bool, tmp_path: Path, model: Path) -> None:
    source = write_folder(tmp_path) if folder else model
    adapters = make("sd1", some_targets("sd1"))
    path = lora_file(tmp_path / "a.safetensors", adapters)
    target = tmp_path / ("merged" if folder else "merged.safetensors")
    arguments = ["merge", "--sd_model", str(source), "--models", str(path), str(path)]
    arguments += ["--ratios", "0.7", "0.2", "--save_to", str(target)]
    assert main(arguments) == 0
    before, after = (read_model(ModelRequest(str(one))).parts for one in (source, target))
    changed = {(a.place.role, f"{a.place.path}.weight"): expected(a) * 0.9 for a in adapters}
    for role, part in before.items():
        assert sorted(part.tensors.names()) == sorted(after[role].tensors.names())
        for name in part.tensors.names():
            old, new = part.tensors.read(name), after[role].tensors.read(name)
            assert old.dtype == new.dtype
            if (role, name) in changed:
                whole = old.float() + changed[role, name]
                torch.testing.assert_close(new.float(), whole, atol=1e-5 if folder else 1e-3, rtol=1e-3)
            else:
                assert torch.equal(old, new)
    with pytest.raises(ConfigError, match="exists already"):
        main(arguments)


def test_resize_keeps_metadata_and_makes_new_hashes(tmp_path: Path) -> None:
    adapters = make("sd1", some_targets("sd1"), "full", "three")
    path = lora_file(
        tmp_path / "a.safetensors",
        adapters,
        ss_network_dim="8",
        ss_network_alpha="3",
        ss_tag="x",
        ss_training_comment="mine",
    )
    out = tmp_path / "small.safetensors"
    assert main(["resize", str(path), "--new_rank", "2", "--save_precision", "fp16", "--save_to", str(out)]) == 0
    tensors, metadata = load_file(out), read_metadata(out)
    assert {tensor.shape[0] for name, tensor in tensors.items() if name.endswith(DOWN)} == {2}
    assert {tensor.dtype for name, tensor in tensors.items() if not name.endswith("alpha")} == {torch.float16}
    # One alpha for all, so that diffusers reads it right.
    assert len({tensor.item() for name, tensor in tensors.items() if name.endswith("alpha")}) == 1
    assert metadata["ss_tag"] == "x"
    assert metadata["ss_network_dim"] == "2"
    assert metadata["ss_training_comment"].startswith("dimension is resized from ")
    assert "; mine" in metadata["ss_training_comment"]
    content = out.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert metadata["sshs_model_hash"] == hashlib.sha256(content[start:]).hexdigest()
    found = changes(out)
    for adapter in adapters:
        best = decompose(adapter.place, expected(adapter), RankRule(2, 2)).adapter
        torch.testing.assert_close(found[adapter.place], delta(best), atol=5e-3, rtol=2e-2)
    arguments = ["resize", str(path), "--new_rank", "999", "--dynamic_method", "sv_fro", "--dynamic_param", "0.8"]
    assert main([*arguments, "--save_to", str(out), "--overwrite"]) == 0
    assert read_metadata(out)["ss_network_dim"] == "Dynamic"
    found = changes(out)
    for adapter in adapters:
        assert (found[adapter.place].norm() / expected(adapter).norm()).item() >= 0.79


def test_merging_replaces_no_folder_of_other_things(tmp_path: Path) -> None:
    model = write_folder(tmp_path)
    path = lora_file(tmp_path / "a.safetensors", make("sd1", some_targets("sd1"), "one", "three"))
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "cat.jpg").write_bytes(b"x")
    arguments = ["merge", "--sd_model", str(model), "--models", str(path), "--overwrite", "--save_to"]
    for target, reason in ((photos, "a folder with other things than a model"), (model, "is --sd_model itself")):
        with pytest.raises(ConfigError, match=reason):
            main([*arguments, str(target)])
    assert (photos / "cat.jpg").read_bytes() == b"x"


@pytest.mark.parametrize("conv", [False, True])
def test_extracting_gives_back_what_was_merged(conv: bool, tmp_path: Path) -> None:
    model = write_folder(tmp_path)
    adapters = make("sd1", some_targets("sd1"), "one", "three")
    path, merged = lora_file(tmp_path / "a.safetensors", adapters), tmp_path / "merged"
    main(["merge", "--sd_model", str(model), "--models", str(path), "--save_to", str(merged)])
    out = tmp_path / "out.safetensors"
    arguments = [
        "extract",
        "--model_org",
        str(model),
        "--model_tuned",
        str(merged),
        "--dim",
        "1",
        "--clamp_quantile",
        "1",
    ]
    assert main([*arguments, "--save_to", str(out), *(["--conv_dim", "1"] if conv else [])]) == 0
    found = changes(out)
    assert read_metadata(out)["ss_base_model_version"] == "sd_v1"
    wanted = {adapter.place: expected(adapter) for adapter in adapters}
    assert set(found) == {place for place in all_targets("sd1") if conv or not {"resnets", "samplers"} & _parts(place)}
    for place, tensor in found.items():
        torch.testing.assert_close(tensor, wanted.get(place, torch.zeros_like(tensor)), atol=1e-5, rtol=1e-3)
    with pytest.raises(ModelError, match="must be of one family"):
        main(
            [
                "extract",
                "--model_org",
                str(model),
                "--model_tuned",
                str(write_folder(tmp_path / "x", "sdxl")),
                "--save_to",
                str(tmp_path / "n.safetensors"),
            ]
        )


def _parts(place: Place) -> set[str]:
    return {"samplers" if "samplers" in piece else piece for piece in place.path.split(".")}


def test_lycoris_becomes_a_plain_lora(tmp_path: Path) -> None:
    linear = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {
        f"{KEY}.hada_w{n}_{side}": rand(*shape) for n in (1, 2) for side, shape in (("a", (8, 2)), ("b", (2, 45)))
    }
    tensors |= {f"{KEY}.alpha": torch.tensor(1.0), f"{linear}.lokr_w1": rand(2, 2), f"{linear}.lokr_w2": rand(4, 3)}
    tensors |= {"lora_unet_down_blocks_0_resnets_0_norm1.w_norm": rand(8)}
    save_file(tensors, tmp_path / "lyco.safetensors")
    arguments = ["convert", str(tmp_path / "lyco.safetensors"), "--to", "lora"]
    with pytest.raises(ModelError, match="--new_rank"):
        main([*arguments, "--save_to", str(tmp_path / "a.safetensors")])
    assert main([*arguments, "--new_rank", "64", "--save_to", str(tmp_path / "a.safetensors")]) == 0
    found = changes(tmp_path / "a.safetensors")
    before = lora_from_tensors(tensors)
    assert found[PLACE].shape == (8, 5, 3, 3)
    assert len(found) == 2
    for place, tensor in found.items():
        torch.testing.assert_close(tensor.flatten(1), delta(before.adapter(place)).flatten(1), atol=1e-4, rtol=1e-3)
    with pytest.raises(ModelError, match="diffusers' format has no"):
        main(
            [
                "convert",
                str(tmp_path / "lyco.safetensors"),
                "--to",
                "diffusers",
                "--save_to",
                str(tmp_path / "b.safetensors"),
            ]
        )


def test_converting_there_and_back(tmp_path: Path) -> None:
    adapters = make("sd1", some_targets("sd1"))
    path = lora_file(tmp_path / "a.safetensors", adapters, torch.float32, ss_output_name="frog")
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    assert main(["convert", str(path), "--to", "diffusers", "--save_to", str(there)]) == 0
    assert all(".lora_A." in name or ".lora_B." in name for name in load_file(there))
    assert main(["convert", str(there), "--to", "kohya", "--save_to", str(back)]) == 0
    metadata = read_metadata(back)
    assert metadata["ss_output_name"] == "frog"
    assert "lora_adapter_metadata" not in metadata
    for found in (changes(there), changes(back)):
        for adapter in adapters:
            torch.testing.assert_close(found[adapter.place], expected(adapter), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (["convert", "{a}", "--to", "kohya", "--save_to", "{a}"], RunError, "exists already"),
        (["convert", "{a}", "--to", "kohya", "--save_to", "x.ckpt"], RunError, ".safetensors"),
        (["convert", "{a}", "--to", "kohya", "--new_rank", "3", "--save_to", "{n}"], ConfigError, "keeps the ranks"),
        (["resize", "{a}", "--new_rank", "0", "--save_to", "{n}"], ConfigError, "rank"),
        (
            ["resize", "{a}", "--new_rank", "4", "--dynamic_method", "sv_fro", "--save_to", "{n}"],
            ConfigError,
            "belong together",
        ),
        (["merge", "--models", "{a}", "{a}", "--ratios", "1", "--save_to", "{n}"], ConfigError, "one for each"),
        (["merge", "--models", "{a}", "{a}", "--method", "svd", "--save_to", "{n}"], ConfigError, "--new_rank"),
        (["check", "missing.safetensors"], ModelError, "does not exist"),
    ],
)
def test_wrong_options_are_told(arguments: list[str], error: type[Exception], words: str, tmp_path: Path) -> None:
    path = lora_file(tmp_path / "a.safetensors", make("sd1", [PLACE]))
    names = {"a": str(path), "n": str(tmp_path / "new.safetensors")}
    with pytest.raises(error, match=words):
        main([argument.format(**names) for argument in arguments])
    assert not (tmp_path / "new.safetensors").exists()


def test_values_too_large_for_half_precision_are_refused(tmp_path: Path) -> None:
    content = kohya_tensors([Adapter(PLACE, "lora", {UP: rand(4, 2) * 1e6, DOWN: rand(2, 4)}, 1.0)], "sd1")
    with pytest.raises(ModelError, match="bf16"):
        write_lora(tmp_path / "a.safetensors", content, {}, torch.float16, overwrite=False)
    write_lora(tmp_path / "a.safetensors", content, {}, torch.bfloat16, overwrite=False)


def test_models_of_another_family_are_refused(tmp_path: Path) -> None:
    path = lora_file(tmp_path / "a.safetensors", make("sd1", some_targets("sd1")))
    other = write_file(tmp_path, "sdxl")
    arguments = ["merge", "--models", str(path), "--save_to", str(tmp_path / "m.safetensors"), "--sd_model"]
    with pytest.raises(ModelError, match="not in the model"):
        main([*arguments, str(other)])
    with pytest.raises(ModelError, match=r"--sd_model = .*nowhere"):
        main([*arguments, str(tmp_path / "nowhere.safetensors")])
    wide = kohya_tensors(make("sd1", [PLACE]), "sd1").tensors
    lora_file(
        path, [one({name.split(".", 1)[1]: tensor for name, tensor in wide.items()})], ss_base_model_version="sd_v1"
    )
    with pytest.raises(ModelError, match="is for sd1"):
        main([*arguments, str(other)])


def test_files_with_nan_are_refused_by_every_tool_that_writes(tmp_path: Path, tiny_model: Path) -> None:
    good = {"lora_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(2.0)}
    good["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"] = torch.randn(2, 64, 1, 1)
    good["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"] = torch.full((64, 2, 1, 1), float("nan"))
    broken = tmp_path / "nan.safetensors"
    save_file(good, broken)
    out = str(tmp_path / "out.safetensors")
    for words in (
        ["resize", str(broken), "--new_rank", "1", "--save_to", out],
        ["convert", str(broken), "--to", "diffusers", "--save_to", out],
        ["merge", "--sd_model", str(tiny_model), "--models", str(broken), "--save_to", out],
    ):
        with pytest.raises(ModelError, match="not finite"):
            main(words)
    assert not Path(out).exists()


def test_two_equal_models_leave_nothing_to_extract(tmp_path: Path, tiny_model: Path) -> None:
    words = ["extract", "--model_org", str(tiny_model), "--model_tuned", str(tiny_model), "--dim", "2"]
    with pytest.raises(ModelError, match="nothing to extract"):
        main([*words, "--save_to", str(tmp_path / "out.safetensors")])
