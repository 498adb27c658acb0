"""Model and LoRA files of a few kilobytes promise anything, and take neither memory nor time nor anybody's files."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd_train.config.parser import load_run_config
from sd_train.errors import ConfigError, DataError, DiskError, ModelError
from sd_train.families.folders import read_folder
from sd_train.families.parts import CONFIG_ENTRY, ModelRequest, read_model
from sd_train.families.pickles import read_pickled_tensors
from sd_train.families.recognise import NotRecognisedError, recognise
from sd_train.families.saving import save_model
from sd_train.families.sources import DictSource, SafetensorsSource
from sd_train.lora_files.adapter import DOWN, MID, UP, Adapter, change, delta, without_mid
from sd_train.lora_files.alphas import PEFT_METADATA
from sd_train.lora_files.decompose import RankRule, resize
from sd_train.lora_files.merging import Weighted, merge_into
from sd_train.lora_files.names import Place
from sd_train.lora_files.reading import LoraFile, lora_from_tensors
from sd_train.state import order_of, read_manifest
from tests.models import small_parts

ROOM = 3 * 2**30
"""Bytes that the process may take beside what it has, so that a mistake ends in an error, not in a full memory."""
PLACE = Place("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q")
MODULE = f"unet.{PLACE.path}"


@pytest.fixture(autouse=True)
def little_memory() -> Iterator[None]:
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def read(path: Path) -> Any:
    return read_model(ModelRequest(str(path), allow_network=False))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model as a diffusers folder, of the test's own."""
    save_model(tmp_path / "base", small_parts(), "diffusers_safetensors")
    return tmp_path / "base"


def test_links_of_a_base_model_lead_nowhere(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    secrets, tokenizer = tmp_path / "secrets", folder / "tokenizer"
    secrets.mkdir()
    (secrets / "id_rsa").write_text("PRIVATE")
    (tokenizer / "extra").symlink_to(secrets)
    (tokenizer / "loop").symlink_to(tokenizer / "loop")
    (tokenizer / "round").symlink_to(tokenizer)
    (tokenizer / "added_tokens.json").symlink_to(secrets / "id_rsa")
    os.mkfifo(tokenizer / "tokenizer.json")
    names = {"merges.txt", "vocab.json", "special_tokens_map.json", "tokenizer_config.json"}
    saved = tmp_path / "saved"
    save_model(saved, read(folder), "diffusers_safetensors")
    assert {path.name for path in (saved / "tokenizer").iterdir()} == names
    assert "leads out of the model's folder" in caplog.text
    # CLIP's own stands in for a vocabulary that does.
    vocabulary = (tokenizer / "vocab.json").read_bytes()
    (tokenizer / "vocab.json").unlink()
    (tokenizer / "vocab.json").symlink_to(secrets / "id_rsa")
    save_model(saved, read(folder), "diffusers_safetensors")
    assert (saved / "tokenizer" / "vocab.json").read_bytes() == vocabulary


def test_tokenizers_of_the_hubs_cache_are_copied(folder: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.parent.mkdir()
    folder.rename(snapshot)
    content = (snapshot / "tokenizer" / "merges.txt").read_bytes() + b"x y\n"
    (snapshot / "tokenizer" / "merges.txt").unlink()
    (blobs / "0123").write_bytes(content)
    (snapshot / "tokenizer" / "merges.txt").symlink_to("../../../blobs/0123")
    save_model(tmp_path / "saved", read(snapshot), "diffusers_safetensors")
    copied = tmp_path / "saved" / "tokenizer" / "merges.txt"
    assert copied.read_bytes() == content
    assert not copied.is_symlink()


def test_a_full_disk_is_known_while_a_tokenizer_is_copied(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    parts = read(folder)
    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(DiskError) as caught:
        save_model(tmp_path / "saved", parts, "diffusers_safetensors")
    assert caught.value.full


@pytest.mark.parametrize(
    "name",
    [
        "cond_stage_model.transformer.text_model.encoder.layers.999999999.x",
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.999999999.x",
        "model.diffusion_model.middle_block.1.transformer_blocks.999999999.x",
        "first_stage_model.encoder.down.0.block.999999999.x",
        "first_stage_model.encoder.down.999999999.x",
    ],
)
def test_numbers_in_names_promise_no_more_than_there_is(name: str, original: dict[str, Tensor]) -> None:
    assert recognise(DictSource(original))
    with pytest.raises(NotRecognisedError, match="cannot be made of"):
        recognise(DictSource({**original, name: torch.zeros(1)}))


def test_numbers_in_names_of_the_second_encoder(tmp_path: Path) -> None:
    save_model(tmp_path / "sd2.safetensors", small_parts("sd2"), "safetensors")
    tensors = load_file(tmp_path / "sd2.safetensors")
    tensors["cond_stage_model.model.transformer.resblocks.999999999.x"] = torch.zeros(1)
    with pytest.raises(NotRecognisedError, match="cannot be made of"):
        recognise(DictSource(tensors))


@pytest.fixture(scope="module")
def original(small_model: Path) -> dict[str, Tensor]:
    return load_file(small_model)


@pytest.mark.parametrize(
    ("part", "fields"),
    [
        ("unet", {"layers_per_block": 100, "transformer_layers_per_block": 100}),
        ("unet", {"layers_per_block": 101}),
        ("unet", {"transformer_layers_per_block": [[100] * 17] * 2}),
        ("unet", {"down_block_types": ["DownBlock2D"] * 1000, "up_block_types": ["UpBlock2D"] * 1000}),
        ("vae", {"block_out_channels": [32] * 1_000_000}),
        ("text_encoder", {"num_hidden_layers": 1000}),
    ],
)
def test_configurations_promise_no_more_either(part: str, fields: dict[str, Any], folder: Path) -> None:
    path = folder / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(ModelError, match=r"config\.json: is not understood"):
        read_folder(folder)


@pytest.mark.parametrize(
    "entry",
    [
        "[" * 200_000,
        '{"a": ' * 200_000,
        '{"unet": {"in_channels": 1000000}}',
        '{"vae": {"latent_channels": "x"}}',
        '{"vae": {"scaling_factor": NaN}}',
        '{"vae": {"block_out_channels": []}}',
        '{"text_encoder": {"num_hidden_layers": 1000000000}}',
        '{"safety_checker": {"x": 1}}',
    ],
)
def test_what_single_files_note_is_looked_at(entry: str, original: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "noted.safetensors"
    save_file(original, path, {CONFIG_ENTRY: entry})
    with pytest.raises(ModelError, match=r"noted\.safetensors: its metadata sd_train\.config"):
        read(path)


def test_headers_of_long_shapes_and_surrogates(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"

    def write(header: object) -> None:
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))

    write({"a": {"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 4]}})
    with pytest.raises(ModelError, match="no place or shape"):
        SafetensorsSource.open([path])
    write({"a": {"dtype": "F32", "shape": [1] * 8, "data_offsets": [0, 4]}, "__metadata__": {"\ud800k": "\ud800"}})
    found = SafetensorsSource.open([path])
    assert found.metadata == {"?k": "?"}
    save_file({"a": torch.zeros(1)}, tmp_path / "again.safetensors", found.metadata)


def test_pickles_hold_every_number_of_their_tensors(tmp_path: Path) -> None:
    path, one = tmp_path / "x.ckpt", torch.ones(1)
    torch.save({"state_dict": {"w": one.as_strided((100_000, 100_000), (0, 0))}}, path)
    assert path.stat().st_size < 2000
    with pytest.raises(ModelError, match="more numbers than the file holds"):
        read_pickled_tensors(path)
    for hollow in (torch.ones(4, device="meta"), torch.ones(4, 4).to_sparse()):
        torch.save({"w": hollow}, path)
        with pytest.raises(ModelError, match=r"x\.ckpt"):
            read_pickled_tensors(path)
    table = torch.arange(12.0).view(3, 4)
    torch.save({"w": table.t(), "row": table[1], "none": torch.empty(0), "one": torch.tensor(1.0)}, path)
    assert torch.equal(read_pickled_tensors(path)["w"], table.t())
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ModelError, match="no regular file"):
        read_pickled_tensors(path)


LONG = 300_000
LARGE: dict[str, tuple[Any, dict[str, tuple[int, ...]]]] = {
    "lora": ("lora", {UP: (LONG, 1), DOWN: (1, LONG)}),
    "lora, inner": ("lora", {UP: (4, LONG), MID: (LONG, 1, 1, 1), DOWN: (1, LONG)}),
    "loha": ("loha", {f"hada_w{n}_{side}": shape for n in "12" for side, shape in (
        ("a", (LONG, 1)), ("b", (1, LONG)))}),
    "loha, inner": ("loha", {f"hada_{name}{n}{end}": shape for n in "12" for name, end, shape in (
        ("t", "", (LONG, 1, 1, 1)), ("w", "_a", (LONG, 1)), ("w", "_b", (1, LONG)))}),
    "lokr": ("lokr", {"lokr_w1": (LONG, 1), "lokr_w2": (1, LONG)}),
    "lokr, halves": ("lokr", {"lokr_w1_a": (LONG, 1), "lokr_w1_b": (1, LONG), "lokr_w2": (1, 0)}),
    "glora": ("glora", {"a1.weight": (8, 1), "a2.weight": (1, 8), "b1.weight": (LONG, 1), "b2.weight": (1, LONG)}),
}  # fmt: skip


@pytest.mark.parametrize("case", LARGE)
def test_small_factors_make_no_huge_weight(case: str) -> None:
    kind, shapes = LARGE[case]
    adapter = Adapter(PLACE, kind, {name: torch.zeros(shape) for name, shape in shapes.items()}, 1.0)
    steps: list[Callable[[], object]] = [lambda: change(adapter, torch.zeros(8, 8))]
    steps += [lambda: delta(adapter)] if kind != "glora" else []
    steps += [lambda: without_mid(adapter)] if MID in shapes else []
    for step in steps:
        with pytest.raises(ModelError, match="larger than any weight"):
            step()


def test_weights_of_another_shape_are_told_before_they_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = {f"{MODULE}.lora_B.weight": torch.ones(8000, 1), f"{MODULE}.lora_A.weight": torch.ones(1, 8000)}
    base = DictSource({f"{PLACE.path}.weight": torch.zeros(8, 8)})
    computed: list[int] = []
    real = Tensor.__matmul__

    def counting(first: Tensor, second: Tensor) -> Tensor:
        product = real(first, second)
        computed.append(0 if product.is_meta else product.numel())
        return product

    monkeypatch.setattr(Tensor, "__matmul__", counting)
    merged = merge_into({"unet": base}, [Weighted(lora_from_tensors(factors), 1.0)])["unet"]
    with pytest.raises(ModelError, match=r"for a weight of shape \(8000, 8000\), the model's is \(8, 8\)"):
        merged.read(f"{PLACE.path}.weight")
    assert computed == [0]


def test_factors_that_do_not_fit_are_not_resized() -> None:
    adapter = Adapter(PLACE, "lora", {UP: torch.ones(8, 2), DOWN: torch.ones(3, 8)}, 1.0)
    with pytest.raises(ModelError, match="do not fit one another"):
        resize(adapter, RankRule(1, 1), torch.device("cpu"))


def lora(table: object, **more: Tensor) -> LoraFile:
    """A LoRA of one module, with PEFT's metadata."""
    factors = {f"{MODULE}.lora_A.weight": torch.ones(2, 8), f"{MODULE}.lora_B.weight": torch.ones(8, 2)}
    return lora_from_tensors({**factors, **more}, {PEFT_METADATA: json.dumps(table)}, "sd1")


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({"lora_alpha": 1, "alpha_pattern": {"(" * 5000 + "a" + ")" * 5000: 1}}, "too involved"),
        ({"lora_alpha": 1, "alpha_pattern": {"(a+)+b": 1}}, "too involved"),
        ({"lora_alpha": 1, "alpha_pattern": {f"to_{n}": 1 for n in range(20_000)}}, "20000 alpha_patterns"),
        ({"lora_alpha": 1, "alpha_pattern": {f"[a]{n}": 1 for n in range(900)}}, "are no names"),
        ({"lora_alpha": float("nan")}, "no number"),
        ({"lora_alpha": 1, "alpha_pattern": {"to_q": float("inf")}}, "no number"),
        ({"lora_alpha": 10**400}, "no number"),
    ],
)
def test_alphas_in_metadata_that_cannot_be(table: object, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        lora(table).adapter(PLACE)


@pytest.mark.parametrize(
    ("patterns", "alpha"),
    [
        ({"to_q": 3}, 3.0),
        ({r"attn1\.to_q": 3}, 3.0),
        ({"o_q": 3, "attn1": 4}, 8.0),
        ({"to_[qk]": 3, "to_q": 4}, 3.0),
        ({"to_q": 4, "to_[qk]": 3}, 4.0),
        ({"to_k|to_q": 5}, 5.0),
        ({"(": 1, r".*attn1\.to_q": 6}, 6.0),
        ({PLACE.path: 7}, 7.0),
    ],
)
def test_the_first_pattern_counts_as_peft_has_it(patterns: dict[str, int], alpha: float) -> None:
    assert lora({"lora_alpha": 8, "alpha_pattern": patterns}).adapter(PLACE).alpha == alpha


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_alphas_in_tensors_are_numbers(value: float) -> None:
    factors = {f"{MODULE}.lora_A.weight": torch.ones(2, 8), f"{MODULE}.lora_B.weight": torch.ones(8, 2)}
    with pytest.raises(ModelError, match="alpha is"):
        lora_from_tensors({**factors, f"{MODULE}.alpha": torch.tensor(value)}, {}, "sd1").adapter(PLACE)


def test_metadata_are_read_once_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    file, read_tables, real = lora({"lora_alpha": 4}), list[str](), json.loads

    def counting(text: str) -> Any:
        read_tables.append(text)
        return real(text)

    monkeypatch.setattr("sd_train.lora_files.alphas.json.loads", counting)
    for _ in range(20):
        assert file.adapter(PLACE).alpha == 4.0
    assert len(read_tables) == 2


@pytest.mark.parametrize(
    "words",
    [
        "huggingface_token=hf_x1y2",
        "-huggingface_token=x1y2",
        "wandb_api_key=x1y2",
        "hf_x1y2",
        "--save_state hf_x1y2",
        "--save_sate hf_x1y2",
        "--max_train_steps 1 hf_x1y2",
        "--mixed_precision=bf16 hf_x1y2",
    ],
)
def test_tokens_in_the_wrong_place_are_not_shown(words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_config("train_network", words.split())
    assert "x1y2" not in str(caught.value)
    assert "***" in str(caught.value)


def test_pipes_are_no_manifests(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "manifest.json")
    assert order_of(tmp_path) == (0, 0.0, 0)
    with pytest.raises(DataError, match="no sealed state"):
        read_manifest(tmp_path)
