"""`sd-train convert`, other autoencoders, running means, pickles and the hub's cache."""

from __future__ import annotations

import collections
import os
import pathlib
import resource
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd_train.__main__ import main
from sd_train.demo.tiny_model import TinyKind
from sd_train.errors import ModelError
from sd_train.families.hub import find_model, wanted_files
from sd_train.families.keys_original import ema_name
from sd_train.families.parts import ModelRequest, read_model
from sd_train.families.pickles import read_pickled, write_pickled
from sd_train.families.saving import original_tensors, save_model
from sd_train.families.sources import DictSource, read_all
from sd_train.families.streaming import put_safetensors
from tests.models import assert_equal_tensors, tiny_parts
from tests.test_checkpoints_files import all_tensors, in_half, read, saved

UNET = "model.diffusion_model."
VAE = "first_stage_model."


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def convert(*words: object) -> None:
    assert main(["convert", *map(str, words)]) == 0


def refused(capsys: pytest.CaptureFixture[str], code: int, *words: object) -> str:
    assert main(["convert", *map(str, words)]) == code
    return capsys.readouterr().err


@pytest.mark.parametrize("kind", ["sd2-v", "sdxl", "refiner"])
def test_folder_to_file_to_folder(kind: TinyKind, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = in_half(tiny_parts(kind))
    folder = saved(parts, tmp_path, "diffusers", "source")
    convert(folder, tmp_path / "one.safetensors")
    convert(tmp_path / "one.safetensors", tmp_path / "two.ckpt")
    convert(tmp_path / "two.ckpt", tmp_path / "back")
    for part in parts.parts:
        name = "model" if part.startswith("text") else "diffusion_pytorch_model"
        old, new = (path / part / f"{name}.safetensors" for path in (folder, tmp_path / "back"))
        assert_equal_tensors(load_file(new), load_file(old))
    words = capsys.readouterr().out
    assert words.count("read  ") == words.count("wrote ") == 3
    assert ("predicts v" if kind == "sd2-v" else "predicts noise") in words
    architecture = metadata(tmp_path / "one.safetensors")["modelspec.architecture"]
    assert architecture == {
        "sd2-v": "stable-diffusion-v2-768-v", "sdxl": "stable-diffusion-xl-v1-base",
        "refiner": "stable-diffusion-xl-v1-refiner",
    }[kind]  # fmt: skip


def test_precision_and_metadata(tmp_path: Path) -> None:
    source = tmp_path / "source.safetensors"
    kept = {"modelspec.title": "mine", "modelspec.author": "é", "ss_steps": "12", "ss_epoch": "3"}
    save_model(source, tiny_parts("sd1"), "safetensors", None, {**kept, "modelspec.hash_sha256": "0x1"})
    for precision, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16), ("float", torch.float32)):
        target = tmp_path / f"{precision}.safetensors"
        convert(source, target, "--save_precision", precision)
        assert {tensor.dtype for tensor in load_file(target).values()} == {dtype}
        entries = metadata(target)
        assert {key: entries.get(key) for key in kept} == kept
        assert "modelspec.hash_sha256" not in entries
        assert entries["modelspec.prediction_type"] == "epsilon"
    convert(source, tmp_path / "folder", "--save_precision", "fp16")
    convert(tmp_path / "folder", tmp_path / "again.safetensors")
    assert {key: metadata(tmp_path / "again.safetensors").get(key) for key in kept} == kept
    convert(source, tmp_path / "one.ckpt")
    content = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert (content["epoch"], content["global_step"]) == (3, 12)
    convert(tmp_path / "one.ckpt", tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == (tmp_path / "float.safetensors").read_bytes()


def full_checkpoint(folder: Path, kind: TinyKind = "sd1") -> tuple[Path, dict[str, Tensor]]:
    """A training checkpoint: running means, schedules, losses and the encoders' unused parts are in it."""
    weights = read_all(original_tensors(tiny_parts(kind)))
    means = {ema_name(name): tensor + 1 for name, tensor in weights.items() if name.startswith(UNET)}
    junk = {"betas": torch.zeros(5), "model_ema.num_updates": torch.tensor(3), f"{VAE}loss.logvar": torch.zeros(())}
    extras = {}
    if kind == "sd2":
        prefix = "cond_stage_model.model."
        last = {n.replace("resblocks.2.", "resblocks.3."): t + 1 for n, t in weights.items() if "resblocks.2." in n}
        extras = {f"{prefix}text_projection": torch.eye(64), f"{prefix}logit_scale": torch.tensor(4.6), **last}
    path = folder / "training.safetensors"
    save_file({**weights, **means, **junk, **extras}, path)
    return path, weights


def test_running_means_and_leftovers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, weights = full_checkpoint(tmp_path)
    convert(source, tmp_path / "whole.safetensors")
    assert_equal_tensors(load_file(tmp_path / "whole.safetensors"), load_file(source))
    assert "running means (model_ema.*); leave them out with --prune" in capsys.readouterr().out
    convert(source, tmp_path / "pruned.safetensors", "--prune", "--no_ema")
    assert_equal_tensors(load_file(tmp_path / "pruned.safetensors"), weights)
    convert(source, tmp_path / "ema.safetensors", "--prune", "--ema")
    means = {name: tensor + 1 if name.startswith(UNET) else tensor for name, tensor in weights.items()}
    assert_equal_tensors(load_file(tmp_path / "ema.safetensors"), means)
    convert(source, tmp_path / "folder", "--ema")
    assert_equal_tensors(all_tensors(read(tmp_path / "folder")), all_tensors(read(tmp_path / "ema.safetensors")))
    assert "left out: 2 tensors that no network uses, e.g. betas, " in capsys.readouterr().out
    words = refused(capsys, 3, tmp_path / "pruned.safetensors", tmp_path / "x.safetensors", "--ema")
    assert f"error: SRC = {tmp_path / 'pruned.safetensors'}: holds no running" in words
    assert "holds no running means (model_ema.*), and --ema asks for them; leave --ema out" in words
    assert "holds no running means (unet_ema)" in refused(capsys, 3, tmp_path / "folder", tmp_path / "x", "--ema")
    (tmp_path / "folder" / "unet").rename(tmp_path / "folder" / "unet_ema")
    convert(tmp_path / "whole.safetensors", tmp_path / "plain")
    (tmp_path / "plain" / "unet").rename(tmp_path / "folder" / "unet")
    convert(tmp_path / "folder", tmp_path / "chosen.safetensors", "--ema")
    assert_equal_tensors(load_file(tmp_path / "chosen.safetensors"), means)


def test_unused_parts_of_encoders_stay_in_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, weights = full_checkpoint(tmp_path, "sd2")
    # Nobody needs to know what it predicts.
    convert(source, tmp_path / "pruned.safetensors", "--prune")
    pruned = load_file(tmp_path / "pruned.safetensors")
    assert set(weights) < set(pruned)
    unused = {name.split(".")[2] for name in set(pruned) - set(weights)}
    assert unused == {"text_projection", "logit_scale", "transformer"}
    assert "v_pred" not in pruned
    words = capsys.readouterr().out
    assert "whether it predicts noise or v is not told" in words
    assert "say --v_parameterization" in refused(capsys, 3, source, tmp_path / "folder")
    convert(source, tmp_path / "folder", "--v_parameterization")
    assert "tensors that folders have no place for" in capsys.readouterr().out
    assert read(tmp_path / "folder").prediction == "v_prediction"
    assert read(tmp_path / "folder").parts["text_encoder"].config["num_hidden_layers"] == 3


def test_targets_are_checked_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = saved(tiny_parts("sd1"), tmp_path, "safetensors")
    before = source.read_bytes()
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("x")
    for words, reason in (
        ((source, source), "is SRC itself; choose another DST"),
        ((source, other), "exists already; choose another DST, or replace it with --overwrite"),
        ((source, other, "--overwrite"), "is a folder with other things than a model"),
        ((source, tmp_path / "a", "--save_model_as", "ckpt"), "writes a file that ends in .ckpt"),
        ((source, tmp_path / "a.ckpt", "--save_model_as", "safetensors"), "writes a file that ends in .safetensors"),
        ((source, tmp_path / "a.ckpt", "--save_model_as", "diffusers"), "writes a folder"),
    ):
        assert reason in refused(capsys, 2, *words)
    assert "there is no such file or folder" in refused(capsys, 3, tmp_path / "none.ckpt", tmp_path / "a.ckpt")
    assert source.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "other"]
    for _ in range(2):
        convert(source, tmp_path / "folder", "--overwrite", "--save_model_as", "diffusers_safetensors")
    assert_equal_tensors(all_tensors(read(tmp_path / "folder")), all_tensors(read(source)))
    # An old folder is replaced whole, and with it all that lies in it.
    inner = source.rename(tmp_path / "folder" / "model.safetensors")
    for words in ((inner, tmp_path / "folder"), (other, tmp_path / "folder", "--vae", inner)):
        assert "lies in DST, which is replaced" in refused(capsys, 2, *words, "--overwrite")
    assert inner.read_bytes() == before


def test_inpainting_models_are_converted(tmp_path: Path) -> None:
    """Their U-Net takes a mask and the masked picture too."""
    weights = read_all(original_tensors(tiny_parts("sd1")))
    weights[f"{UNET}input_blocks.0.0.weight"] = torch.randn(32, 9, 3, 3, generator=torch.Generator().manual_seed(0))
    save_file(weights, tmp_path / "inpainting.safetensors")
    convert(tmp_path / "inpainting.safetensors", tmp_path / "folder")
    assert '"StableDiffusionInpaintPipeline"' in (tmp_path / "folder" / "model_index.json").read_text()
    convert(tmp_path / "folder", tmp_path / "back.safetensors")
    assert_equal_tensors(load_file(tmp_path / "back.safetensors"), weights)


def vae_files(folder: Path) -> Iterator[tuple[Path, dict[str, Tensor]]]:
    """One autoencoder in every form in which people share them, and its tensors under published names."""
    parts = tiny_parts("sd1")
    vae = {name: tensor + 0.5 for name, tensor in read_all(parts.parts["vae"].tensors).items()}
    other = {**parts.parts, "vae": type(parts.parts["vae"])(parts.parts["vae"].config, DictSource(vae))}
    whole = saved(type(parts)(**{**vars(parts), "parts": other}), folder, "diffusers", "whole")
    save_model(folder / "whole.safetensors", read(whole), "safetensors")
    prefixed = {name: tensor for name, tensor in load_file(folder / "whole.safetensors").items() if VAE in name}
    bare = {name.removeprefix(VAE): tensor for name, tensor in prefixed.items()}
    matrices = {name for name, tensor in bare.items() if ".attn_1." in name and tensor.dim() == 4}
    flat = {name: tensor[:, :, 0, 0] if name in matrices else tensor for name, tensor in bare.items()}
    torch.save({"state_dict": {**bare, "loss.logvar": torch.zeros(1)}, "epoch": 1}, folder / "kl-f8.vae.pt")
    for name, tensors in (("bare", bare), ("prefixed", prefixed), ("flat", flat), ("published", vae)):
        save_file(tensors, folder / f"{name}.safetensors")
        yield folder / f"{name}.safetensors", vae
    for name in ("kl-f8.vae.pt", "whole.safetensors", "whole", "whole/vae"):
        yield folder / name, vae


def test_another_vae_in_every_form(tmp_path: Path) -> None:
    source = saved(tiny_parts("sdxl"), tmp_path, "safetensors", "source")
    own = read(source)
    for place, (path, vae) in enumerate(vae_files(tmp_path)):
        found = read(source, vae=str(path))
        assert_equal_tensors(read_all(found.parts["vae"].tensors), vae)
        # The U-Net was trained with the scale of its own.
        assert found.parts["vae"].config["scaling_factor"] == own.parts["vae"].config["scaling_factor"] == 0.13025
        if place == 0:
            convert(source, tmp_path / "swapped.safetensors", "--vae", path)
            swapped = read(tmp_path / "swapped.safetensors")
            assert_equal_tensors(read_all(swapped.parts["vae"].tensors), vae)
            assert_equal_tensors(read_all(swapped.parts["unet"].tensors), read_all(own.parts["unet"].tensors))


def test_half_and_other_vaes_are_refused(tmp_path: Path) -> None:
    source = saved(tiny_parts("sd1"), tmp_path, "safetensors", "source")
    whole = {name.removeprefix(VAE): tensor for name, tensor in load_file(source).items() if name.startswith(VAE)}
    cases: dict[str, tuple[dict[str, Tensor], str]] = {
        "encoder": ({n: t for n, t in whole.items() if not n.startswith("decoder.")}, "half a VAE, its encoder alone"),
        "decoder": ({n: t for n, t in whole.items() if not n.startswith("encoder.")}, "half a VAE, its decoder alone"),
        "taesd": ({"1.weight": torch.zeros(1)}, "no VAE: nothing is named encoder"),
        "cut": ({n: t for n, t in whole.items() if "mid.block_1.norm1" not in n}, "4 tensors are missing"),
        "more": ({**whole, "encoder.extra.weight": torch.zeros(1)}, "1 of its tensors are unknown"),
        "wide": ({**whole, "post_quant_conv.weight": torch.zeros(16, 16, 1, 1)}, "makes 16 channels at 1/8"),
    }
    for name, (tensors, reason) in cases.items():
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path)
        with pytest.raises(ModelError, match=reason) as caught:
            read(source, vae=str(path))
        assert str(caught.value).startswith(f"--vae = {path}: ")
    (tmp_path / "empty").mkdir()
    for place, reason in (("empty", "holds no VAE, neither"), ("none.pt", "there is no such file or folder")):
        with pytest.raises(ModelError, match=f"--vae = {tmp_path / place}: {reason}"):
            read(source, vae=str(tmp_path / place))


def foreign(module: str, name: str, base: type = object) -> Any:
    """A class of a library that is not installed."""
    for end in range(1, module.count(".") + 2):
        path = ".".join(module.split(".")[:end])
        sys.modules.setdefault(path, types.ModuleType(path))
    made = type(name, (base,), {"__module__": module})
    setattr(sys.modules[module], name, made)
    return made


@pytest.fixture
def lightning_leftovers() -> Iterator[dict[str, Any]]:
    """What PyTorch Lightning, omegaconf and numpy left in the checkpoints of 2022."""
    before = set(sys.modules)
    checkpoint = foreign("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    attributes = foreign("pytorch_lightning.utilities.parsing", "AttributeDict", dict)
    config = foreign("omegaconf.listconfig", "ListConfig")()
    config.__dict__ = {"_content": [1, 2], "_metadata": foreign("omegaconf.base", "ContainerMetadata")(), "type": int}
    callback = checkpoint()
    callback.best = torch.tensor(3.0)
    yield {
        "callbacks": {checkpoint: {"best": np.float64(1.5), "kept": np.arange(3)}, "callback": callback},
        "hyper_parameters": attributes(learning_rate=1e-4), "config": config, "lengths": collections.defaultdict(list),
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}], "global_step": 470000, "epoch": 3,
    }  # fmt: skip
    for name in set(sys.modules) - before:
        if name.startswith(("pytorch_lightning", "omegaconf")):
            del sys.modules[name]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-1.6"])
def test_lightning_checkpoints_are_read(lightning_leftovers: dict[str, Any], zipped: bool, tmp_path: Path) -> None:
    weights = read_all(original_tensors(tiny_parts("sd1")))
    path = tmp_path / "lightning.ckpt"
    torch.save({"state_dict": weights, **lightning_leftovers}, path, _use_new_zipfile_serialization=zipped)
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith(("pytorch_l", "omegaconf"))}
    try:
        assert_equal_tensors(read_pickled(path)[0], weights)
        convert(path, tmp_path / "clean.safetensors", "--prune")
        assert not any(name.startswith(("pytorch_lightning", "omegaconf")) for name in sys.modules)
    finally:
        sys.modules.update(hidden)
    assert_equal_tensors(load_file(tmp_path / "clean.safetensors"), weights)


class Malicious:
    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-1.6"])
@pytest.mark.parametrize(
    "function", [os.system, os.unlink, eval, exec, open, getattr, __import__, subprocess.check_output, pathlib.Path,
                 np.save, torch.hub.load, print],
)  # fmt: skip
def test_all_else_in_a_pickle_is_refused_by_name(function: Callable[..., Any], zipped: bool, tmp_path: Path) -> None:
    path, target = tmp_path / "model.ckpt", tmp_path / "executed"
    content = {"state_dict": {"x": torch.ones(1)}, "callbacks": Malicious(function, (f"touch {target}",))}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError, match=r"could run code \(it asks for ") as caught:
        read(path)
    names = {"unlink": "posix.unlink|os.unlink", "check_output": "subprocess.check_output|commands.check_output"}
    assert any(name in str(caught.value) for name in names.get(function.__name__, function.__name__).split("|"))
    assert not target.exists()


def test_our_pickles_are_torchs(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "matrix": torch.randn(5, 3, generator=generator), "half": torch.randn(7, generator=generator).half(),
        "bf": torch.randn(2, 2, generator=generator).bfloat16(), "scalar": torch.tensor(2.5), "none": torch.empty(0),
        "long": torch.arange(4), "flags": torch.tensor([True, False]), "bytes": torch.arange(3, dtype=torch.uint8),
    }  # fmt: skip
    path = tmp_path / "ours.ckpt"
    write_pickled(path, DictSource(tensors), {"ss_steps": "7", "ss_epoch": "x"})
    for mapped in (True, False):
        content = torch.load(path, weights_only=True, mmap=mapped)
        assert_equal_tensors(content["state_dict"], tensors)
        assert (content["global_step"], content["epoch"]) == (7, 0)
        assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in content["state_dict"].values())
    assert read_pickled(path)[1] == {"ss_steps": "7", "ss_epoch": "x"}
    with pytest.raises(ModelError, match=r"pickles hold no float8_e4m3fn \(w\); give --save_precision"):
        write_pickled(path, DictSource({"w": torch.zeros(2).to(torch.float8_e4m3fn)}))


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache folder, empty."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put_in_cache(cache: Path, name: str, folder: Path) -> Path:
    """As the hub's library keeps a downloaded repository."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.parent.mkdir()
    folder.rename(snapshot)
    return snapshot


def test_hub_ids_are_read_from_the_cache(hub_cache: Path, tmp_path: Path) -> None:
    parts = tiny_parts("sd2-v")
    snapshot = put_in_cache(hub_cache, "someone/tiny-model", saved(parts, tmp_path, "diffusers"))
    assert find_model("someone/tiny-model", allow_network=False) == snapshot
    found = read_model(ModelRequest("someone/tiny-model", v2=True))
    assert_equal_tensors(all_tensors(found), all_tensors(parts))
    assert (found.prediction, found.origin) == ("v_prediction", "someone/tiny-model")
    vae = snapshot / "vae"
    vae.rename(alone := tmp_path / "alone")
    # Part of a model, as other programs leave it, is no model.
    with pytest.raises(ModelError, match="not in the hub's cache"):
        find_model("someone/tiny-model", allow_network=False)
    put_in_cache(hub_cache, "someone/tiny-vae", alone)
    source = saved(parts, tmp_path, "safetensors")
    swapped = read(source, vae="someone/tiny-vae").parts["vae"]
    assert_equal_tensors(read_all(swapped.tensors), read_all(parts.parts["vae"].tensors))


def test_hub_ids_that_are_not_cached(hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    way_out = r"\(hf download someone/model\) and copy the folder here, or give a local file or folder"
    with pytest.raises(ModelError, match=rf"the network is switched off \(HF_HUB_OFFLINE\); .*{way_out}"):
        find_model("someone/model")
    with pytest.raises(ModelError, match=f"this command does not use the network; .*{way_out}"):
        find_model("someone/model", allow_network=False)
    # Nothing answers at this address.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match=f"the hub cannot be reached .*{way_out}"):
        find_model("someone/model")
    for path in ("some/model.safetensors", "no_such_model", "a/b/c", "/x/y", "./a"):
        with pytest.raises(ModelError, match=r"no such file or folder \(current folder"):
            find_model(path)


def test_of_a_repository_one_set_of_weights_is_wanted() -> None:
    small = ["model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json",
             "scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"]  # fmt: skip
    wanted = ["unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors",
              "text_encoder/pytorch_model-00001-of-00002.bin", "text_encoder/pytorch_model.bin.index.json"]  # fmt: skip
    others = ["README.md", "v1-5.ckpt", "v1-5.safetensors", "unet/diffusion_pytorch_model.bin",
              "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors",
              "vae/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.fp16.bin", "image.png",
              "text_encoder/flax_model.msgpack", "safety_checker/model.safetensors", "unet/model.onnx",
              "unet/openvino_model.bin"]  # fmt: skip
    assert sorted(wanted_files([*others, *small, *wanted])) == sorted([*small, *wanted])
    assert wanted_files(["config.json", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"]) == [
        "config.json", "diffusion_pytorch_model.safetensors",
    ]  # fmt: skip


class Zeros:
    """Stable Diffusion 1.x's names with many large tensors, none of them in memory."""

    def __init__(self, count: int) -> None:
        self.weights = original_tensors(tiny_parts("sd1"))
        self.large = [f"model_ema.large{place}" for place in range(count)]

    def names(self) -> list[str]:
        return [*self.weights.names(), *self.large]

    def shape(self, name: str) -> tuple[int, ...]:
        return (8 << 20,) if name in self.large else self.weights.shape(name)

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str) -> Tensor:
        return torch.zeros(8 << 20) if name in self.large else self.weights.read(name)


MEASURED = """
import resource, sys
from sd_train.__main__ import main
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert main(["convert", sys.argv[1], sys.argv[2], "--prune"]) == 0
before = peak()
assert main(["convert", sys.argv[3], sys.argv[4], "--save_precision", "fp16"]) == 0
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts kilobytes as Linux does")
def test_conversion_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    small, large = tmp_path / "small.safetensors", tmp_path / "large.safetensors"
    put_safetensors(small, Zeros(0))
    put_safetensors(large, Zeros(12))
    assert large.stat().st_size > 400_000_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0
    words = [sys.executable, "-c", MEASURED, small, tmp_path / "a.safetensors", large, tmp_path / "b.safetensors"]
    result = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=True)
    # One tensor of 32 MiB as it is stored and as it is written, and the libraries' own buffers.
    assert int(result.stdout.split()[-1]) < 120_000
