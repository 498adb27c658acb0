"""The same LoRA file means the same to us, to diffusers, to A1111 and to ComfyUI."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sd_train.demo.tiny_model import TinyKind
from sd_train.families.saving import original_tensors
from sd_train.families.sources import DictSource, Part
from sd_train.lora_files.adapter import DOWN, UP, Adapter
from sd_train.lora_files.alphas import PEFT_METADATA
from sd_train.lora_files.checking import check
from sd_train.lora_files.merging import MergedSource, Weighted, merge_into
from sd_train.lora_files.names import Place
from sd_train.lora_files.readers import READERS, TABLE, render_table
from sd_train.lora_files.reading import lora_from_tensors, open_lora
from sd_train.lora_files.writing import (
    LoraTensors,
    diffusers_tensors,
    kohya_tensors,
    to_diffusers,
    to_kohya,
    with_one_alpha,
    write_lora,
)
from tests.lora_cases import (
    ALPHAS,
    RANKS,
    all_targets,
    assert_same,
    expected,
    in_diffusers,
    make,
    networks,
    save,
    some_targets,
)
from tests.models import golden, reference_pipeline, tiny_parts

KINDS: tuple[TinyKind, ...] = ("sd1", "sd2", "sdxl", "refiner")
FAMILIES = {"sd1": "sd1", "sd2": "sd2", "sdxl": "sdxl", "refiner": "sdxl_refiner"}


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Any]:
    """diffusers' pipelines around the tiny models, made when first asked for."""

    class Made(dict[str, Any]):
        def __missing__(self, kind: Any) -> Any:
            self[kind] = reference_pipeline(kind)
            if self[kind].text_encoder is not None:
                # A level of names that the reference has for clip_skip, and that is not in the module tree.
                self[kind].text_encoder.__dict__.pop("text_model", None)
            return self[kind]

    return Made()


def written(adapters: list[Adapter], form: str, kind: str) -> LoraTensors:
    if form == "diffusers":
        return diffusers_tensors(adapters)
    return kohya_tensors(with_one_alpha(adapters), FAMILIES[kind])


def ours(path: Path, kind: TinyKind) -> dict[Place, Tensor]:
    """The change of each weight that our merge makes of the file."""
    lora = open_lora(path, FAMILIES[kind])
    base = networks(kind)
    merged = merge_into(base, [Weighted(lora, 1.0)])
    changes = {}
    for place in lora.places():
        name = f"{place.path}.weight"
        changes[place] = merged[place.role].read(name) - base[place.role].read(name)
    return changes


@pytest.mark.parametrize("alphas", ALPHAS)
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("form", ["kohya", "diffusers"])
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_our_merge_and_diffusers_agree(
    kind: TinyKind, form: str, ranks: str, alphas: str, pipelines: dict[str, Any], tmp_path: Path
) -> None:
    adapters = make(kind, some_targets(kind), ranks, alphas)
    path = tmp_path / "lora.safetensors"
    write_lora(path, written(adapters, form, kind), {}, torch.float32, overwrite=False)
    assert_same(ours(path, kind), adapters)
    assert_same(in_diffusers(pipelines[kind], path), adapters)


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_modules_have_names_that_diffusers_knows(
    kind: TinyKind, form: str, pipelines: dict[str, Any], tmp_path: Path
) -> None:
    adapters = make(kind, all_targets(kind), "one", "three")
    path = tmp_path / "lora.safetensors"
    write_lora(path, written(adapters, form, kind), {}, torch.float32, overwrite=False)
    assert_same(in_diffusers(pipelines[kind], path), adapters)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_lost_alpha_is_noticed(kind: TinyKind, pipelines: dict[str, Any], tmp_path: Path) -> None:
    adapters = make(kind, some_targets(kind), "mixed", "three")
    tensors = kohya_tensors(adapters, FAMILIES[kind]).tensors
    path = save(tmp_path / "lora.safetensors", {n: t for n, t in tensors.items() if not n.endswith(".alpha")})
    for changes in (ours(path, kind), in_diffusers(pipelines[kind], path)):
        with pytest.raises(AssertionError):
            assert_same(changes, adapters)
    # The same for diffusers' keys, whose alpha is multiplied in.
    unfolded = {name: tensor for name, tensor in diffusers_tensors(adapters).tensors.items() if "lora_A" in name}
    unfolded |= {f"{a.place.role}.{a.place.path}.lora_B.weight": a.factors[UP] for a in adapters}
    path = save(tmp_path / "peft.safetensors", unfolded)
    with pytest.raises(AssertionError):
        assert_same(in_diffusers(pipelines[kind], path), adapters)


def test_diffusers_needs_one_alpha_in_kohyas_files(pipelines: dict[str, Any], tmp_path: Path) -> None:
    adapters = make("sd1", all_targets("sd1"), "mixed", "mixed")
    path = tmp_path / "lora.safetensors"
    write_lora(path, kohya_tensors(adapters, "sd1"), {}, torch.float32, overwrite=False)
    assert_same(ours(path, "sd1"), adapters)
    assert not check(open_lora(path, "sd1")).readers["diffusers"].reads
    # Should this fail one day, diffusers has learned it, and with_one_alpha can go.
    with pytest.raises(AssertionError):
        assert_same(in_diffusers(pipelines["sd1"], path), adapters)


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_other_programs_change_the_same_weights(kind: TinyKind) -> None:
    """The keys of A1111 and ComfyUI, literally, and sd-scripts' product of what stands under them."""
    adapters = make(kind, all_targets(kind))
    tensors = kohya_tensors(adapters, FAMILIES[kind]).tensors
    lora = lora_from_tensors(tensors, family=FAMILIES[kind])
    parts = tiny_parts(kind)
    base = networks(kind)
    merged = merge_into(base, [Weighted(lora, 1.0)])
    changed = {role: Part(parts.parts[role].config, source) for role, source in merged.items()}
    before = original_tensors(parts)
    after = original_tensors(replace(parts, parts={**parts.parts, **changed}))
    rows = golden("lora_reader_keys.json")[kind]
    assert len(rows) >= 20
    for key, comfy, a1111 in rows:
        down, up = tensors[f"{key}.{DOWN}"], tensors[f"{key}.{UP}"]
        change = torch.einsum("or,r...->o...", up.flatten(1), down) * tensors[f"{key}.alpha"] / down.shape[0]
        name, _, third = a1111.removesuffix("]").partition("[")
        found = after.read(name) - before.read(name)
        if third:
            found = found.chunk(3)[int(third)]
        torch.testing.assert_close(found, change, atol=1e-5, rtol=1e-4, msg=key)
        if comfy.startswith("diffusion_model."):
            assert f"model.{comfy}" == a1111, key
        else:
            role = "text_encoder_2" if comfy.startswith("clip_g.") else "text_encoder"
            path = comfy.split(".transformer.")[1]
            found = merged[role].read(path) - base[role].read(path)
            torch.testing.assert_close(found, change, atol=1e-5, rtol=1e-4, msg=key)


def test_every_key_of_sd_scripts_is_written(tmp_path: Path) -> None:
    rows = golden("lora_keys_sd15.json.gz")["shapes"]
    shapes = {name: torch.zeros(shape) for name, shape in rows.items()}
    lora = lora_from_tensors({name: tensor + (name.endswith("alpha")) for name, tensor in shapes.items()})
    assert not lora.unmapped
    assert lora.family == "sd1"
    assert len(lora.places()) * 3 == len(rows)
    assert sorted(kohya_tensors(lora.adapters(), "sd1").tensors) == sorted(rows)


def spelled(adapters: list[Adapter], spelling: str) -> dict[str, Tensor]:
    """diffusers' older keys, whose alpha is the rank."""
    tensors = {}
    for adapter in adapters:
        path = adapter.place.path
        up = adapter.factors[UP] * adapter.scale
        is_attention = path.rpartition(".")[2] in ("to_q", "to_k", "to_v", "0")
        if spelling == "flat text":
            name, ends = f"{adapter.place.role}.{path.removeprefix('text_model.')}", ("lora_A.weight", "lora_B.weight")
        elif adapter.place.role != "unet":
            name, ends = (
                f"{adapter.place.role}.{path}",
                ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
            )
        elif spelling == "processor" and is_attention and ".attn" in path:
            path = path.replace(".to_", ".processor.to_").removesuffix(".0")
            name, ends = f"unet.{path}_lora", ("down.weight", "up.weight")
        else:
            name, ends = f"unet.{path}", ("lora.down.weight", "lora.up.weight")
        tensors |= {f"{name}.{ends[0]}": adapter.factors[DOWN], f"{name}.{ends[1]}": up}
    return tensors


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("spelling", ["processor", "lora.down", "flat text"])
def test_diffusers_older_keys_are_read_as_diffusers_reads_them(
    kind: TinyKind, spelling: str, pipelines: dict[str, Any], tmp_path: Path
) -> None:
    adapters = make(kind, some_targets(kind))
    tensors = spelled(adapters, spelling)
    path = save(tmp_path / "lora.safetensors", tensors)
    assert_same(ours(path, kind), adapters)
    flat_second = spelling == "flat text" and kind == "sdxl"
    if not flat_second:
        assert_same(in_diffusers(pipelines[kind], path), adapters)
    for content in (to_kohya(tensors, FAMILIES[kind]), to_diffusers(tensors, FAMILIES[kind])):
        again = lora_from_tensors(content.tensors, content.metadata, FAMILIES[kind])
        assert sorted(again.places()) == sorted(adapter.place for adapter in adapters)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_kohyas_keys_without_text_model_are_read(kind: TinyKind) -> None:
    adapters = make(kind, [place for place in all_targets(kind) if place.role != "unet"])
    tensors = kohya_tensors(adapters, FAMILIES[kind]).tensors
    flat = {name.replace("text_model_", ""): tensor for name, tensor in tensors.items()}
    assert flat.keys().isdisjoint(tensors)
    content = to_kohya(flat, FAMILIES[kind])
    assert sorted(content.tensors) == sorted(tensors)
    assert all(torch.equal(content.tensors[name], tensor) for name, tensor in tensors.items())


def test_alphas_survive_the_way_to_diffusers_and_back() -> None:
    adapters = make("sdxl", some_targets("sdxl"))
    first = kohya_tensors(adapters, "sdxl").tensors
    there = to_diffusers(first, "sdxl")
    assert "lora_alpha" in there.metadata[PEFT_METADATA]
    back = to_kohya(there.tensors, "sdxl", there.metadata).tensors
    assert sorted(back) == sorted(first)
    for name, tensor in first.items():
        torch.testing.assert_close(back[name], tensor, msg=name)


def test_pefts_own_metadata_tell_the_alpha(pipelines: dict[str, Any], tmp_path: Path) -> None:
    """A file as diffusers' training scripts write it: alpha only stands in the metadata."""
    adapters = make("sd1", some_targets("sd1"), "one", "three")
    tensors = {}
    for adapter in adapters:
        name = f"{adapter.place.role}.{adapter.place.path.removeprefix('text_model.')}"
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = adapter.factors[DOWN], adapter.factors[UP]
    table = '{"unet.r": 1, "unet.lora_alpha": 3, "text_encoder.r": 1, "text_encoder.lora_alpha": 3}'
    path = save(tmp_path / "lora.safetensors", tensors, {PEFT_METADATA: table})
    assert_same(ours(path, "sd1"), adapters)


REFUSED = {
    "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"),
    "LoKr": ("lokr_w1", "lokr_w2", "alpha"),
    "full difference": ("diff",),
    "(IA)^3 of linear layers (preset=ia3)": ("weight", "on_input"),
    "(IA)^3 of convolutions' outputs": ("weight", "on_input"),
    "GLoRA": ("a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha"),
    "diag-OFT": ("oft_blocks", "alpha"),
    "diag-OFT with rescaled": ("oft_blocks", "rescale", "alpha"),
    "BOFT": ("oft_blocks", "alpha"),
    "diag-OFT, BOFT with constraint": ("oft_blocks", "alpha"),
    "OFT (sd-scripts)": ("oft_blocks", "alpha"),
    "LoCon with lora_mid (Tucker)": (UP, "lora_mid.weight", DOWN, "alpha"),
}


@pytest.mark.parametrize("row", REFUSED)
def test_what_diffusers_refuses_it_refuses(row: str, pipelines: dict[str, Any], tmp_path: Path) -> None:
    prefix = "oft" if row.startswith("OFT") else "lora"
    sizes = {"BOFT": {"oft_blocks": [2, 1, 4, 4]}, "diag-OFT": {"oft_blocks": [1, 4, 4]}}.get(row, {})
    key = f"{prefix}_unet_down_blocks_0_resnets_0_conv1"
    ends = [] if row != "LoCon with lora_mid (Tucker)" else [1, 1]
    tensors = {
        f"{key}.{name}": torch.ones([] if name == "alpha" else sizes.get(name, [4, 4, *ends])) for name in REFUSED[row]
    }
    path = save(tmp_path / "lora.safetensors", tensors)
    assert not TABLE[row]["diffusers"].reads
    assert open_lora(path).places() == [Place("unet", "down_blocks.0.resnets.0.conv1")]
    with pytest.raises(ValueError, match=r"not been correctly renamed|Invalid LoRA"):
        in_diffusers(pipelines["sd1"], path)


def test_diffusers_drops_doras_magnitudes(pipelines: dict[str, Any], tmp_path: Path) -> None:
    adapters = make("sd1", some_targets("sd1")[:3], "one", "three")
    tensors = kohya_tensors(adapters, "sd1").tensors
    magnitudes = {
        f"{name.removesuffix('.alpha')}.dora_scale": torch.ones(3, 1) for name in tensors if name.endswith(".alpha")
    }
    path = save(tmp_path / "lora.safetensors", tensors | magnitudes)
    assert not any(TABLE[row]["diffusers"].reads for row in TABLE if row.startswith("DoRA"))
    assert_same(in_diffusers(pipelines["sd1"], path), adapters)


def test_the_table_is_rendered() -> None:
    lines = render_table().splitlines()
    assert lines[0] == f"| file | {' | '.join(READERS)} |"
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]] == list(TABLE)
    assert all(line.count(" | ") == len(READERS) for line in lines[2:])
    assert "yes (keys)" in lines[2]
    assert "one alpha" in lines[2]
    assert {row for row, cells in TABLE.items() if cells["diffusers"].proof == "run"} == {
        "LoRA, LoCon, DyLoRA (kohya keys)",
        "LoRA, LoCon (diffusers keys)",
        *(row for row in TABLE if row.startswith("DoRA")),
        *REFUSED,
    }


def test_merged_tensors_keep_dtype_and_the_rest(tmp_path: Path) -> None:
    adapters = make("sd1", [Place("unet", "conv_in"), Place("unet", "down_blocks.0.resnets.0.conv1")])
    base = {name: tensor.half() for name, tensor in _tensors("sd1").items()}
    lora = lora_from_tensors(kohya_tensors(adapters, "sd1").tensors, family="sd1")
    merged = MergedSource(DictSource(base), [Weighted(lora, 0.7), Weighted(lora, 0.3)], "unet")
    assert merged.names() == list(base)
    for name, tensor in base.items():
        changed = [adapter for adapter in adapters if f"{adapter.place.path}.weight" == name]
        assert merged.dtype(name) == torch.float16
        assert merged.shape(name) == tuple(tensor.shape)
        if changed:
            torch.testing.assert_close(merged.read(name), (tensor.float() + expected(changed[0])).half())
        else:
            assert torch.equal(merged.read(name), tensor)


def _tensors(kind: TinyKind) -> dict[str, Tensor]:
    source = networks(kind)["unet"]
    return {name: source.read(name) for name in source.names()}


def test_the_readme_has_this_table() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert render_table().strip() in readme
