"""Whole runs of `train_textual_inversion`: a word is learned, the model stays, the file works here and elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sd_train.__main__ import main
from sd_train.data.images import prepare, sample_view, view_geometry
from sd_train.demo.tiny_model import TinyKind
from sd_train.device import Device
from sd_train.families.embeddings import install_embeddings, read_embeddings
from sd_train.families.parts import Part
from sd_train.families.saving import save_model
from sd_train.families.sources import DictSource, read_all
from sd_train.objectives.denoise import Denoise
from sd_train.optim.optimizers import make_optimizer
from sd_train.state import read_manifest
from sd_train.trainables.embedding import EmbeddingSettings, TextualInversion
from sd_train.types import Batch
from tests.models import (
    all_tensors,
    assert_equal_tensors,
    fresh_tiny,
    load,
    reference_pipeline,
    tiny_parts,
    write_folder,
)
from tests.runs import differences, identical, metadata, read_index, words, write_dataset

KINDS: tuple[TinyKind, ...] = ("sd1", "sd2-v", "sdxl")
BLOCKS = {"sd1": 16, "sd2-v": 16, "sdxl": 11}
ARCHITECTURES = {"sd1": "v1", "sd2-v": "v2-768-v", "sdxl": "xl-v1-base"}
"""As sd-scripts calls them."""
LOUDER = 60
"""How much more a U-Net is told by texts than one of random weights is."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[TinyKind, Path]:
    """A diffusers folder of each kind, float32 as the reference pipelines."""
    folder = tmp_path_factory.mktemp("models")
    return {kind: write_folder(folder, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photographs, all of a new thing."""
    subset = 'caption_prefix = "mytok"\nflip_aug = true'
    return write_dataset(tmp_path_factory.mktemp("dataset") / "photos.toml", "batch_size = 2", subset)


def arguments(model: Path, dataset: Path, output: Path, more: str) -> list[str]:
    """The command line of a run that teaches `mytok`; what it says of networks is left out."""
    line = words(model, dataset, output, more)
    for option in ("--network_dim", "--network_alpha"):
        place = line.index(option)
        del line[place : place + 2]
    line[line.index("--output_name") + 1] = "thing"
    return [*line, "--token_string", "mytok"]


def teach(model: Path, dataset: Path, output: Path, more: str = "", command: str = "train_textual_inversion") -> Path:
    """Run the command in this process; the file that it leaves."""
    assert main([command, *arguments(model, dataset, output, more)]) == 0
    return output / "thing.safetensors"


def fixed_noise_loss(model: Path, dataset: Path, file: Path) -> float:
    """Mean denoising loss over the photographs with a saved word, always with the same noise."""
    family = load(model)
    install_embeddings(read_embeddings([file]), family)
    objective = Denoise(family, TextualInversion(EmbeddingSettings("x", 1, {}, 0)), Device(torch.device("cpu"), "no"))
    index = read_index(dataset)
    records = [index.record(row) for row in range(len(index))]
    views = [sample_view(record, 0, 0, 0) for record in records]
    noise = torch.randn(len(records), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = Batch(
        keys=[record.key for record in records],
        paths=[str(record.path) for record in records],
        captions=["a photo of mytok" for _ in records],
        pixels=torch.stack([torch.from_numpy(prepare(*pair).pixels) for pair in zip(records, views, strict=True)]),
        images=None,
        noise=noise,
        latent_noise=torch.zeros_like(noise),
        timesteps=torch.linspace(100, 900, len(records)).long(),
        weight=torch.ones(len(records)),
        mask=None,
        texts=None,
        geometry=[view_geometry(*pair) for pair in zip(records, views, strict=True)],
        micro=0,
    )
    with torch.no_grad():
        return float(objective.loss(batch).mean())


def begun(model: Path, path: Path, extended: bool) -> Path:
    """The file of a word that has learned nothing yet."""
    family = load(model)
    rates = dict.fromkeys(family.text_encoders, 1.0)
    trainable = TextualInversion(EmbeddingSettings("mytok", 2, rates, 3, extended, init_word="cat mat"))
    trainable.install(family)
    trainable.save(path, {"ss_token_string": "mytok"})
    return path


def listening(path: Path, kind: TinyKind) -> Path:
    """A tiny model whose pictures depend on the text."""
    parts = tiny_parts(kind)
    unet = parts.parts["unet"]
    weights = read_all(unet.tensors)
    louder = {name: weight * LOUDER if ".attn2.to_v." in name else weight for name, weight in weights.items()}
    parts = replace(parts, parts={**parts.parts, "unet": Part(unet.config, DictSource(louder))})
    save_model(path, parts, "diffusers_safetensors", None, {})
    return path


@pytest.mark.parametrize(
    ("kind", "extended"), [("sd1", False), ("sd1", True), ("sd2-v", False), ("sdxl", False), ("sdxl", True)]
)
def test_a_word_is_learned(kind: TinyKind, extended: bool, tmp_path: Path) -> None:
    model = listening(tmp_path / "model", kind)
    # No caption holds the word; the sentences take their place.
    dataset = write_dataset(tmp_path / "photos.toml", "batch_size = 6")
    command = "train_textual_inversion_XTI" if extended else "train_textual_inversion"
    more = "--num_vectors_per_token 2 --learning_rate 0.3 --max_train_steps 8 --cache_latents --save_state_on_train_end"
    file = teach(model, dataset, tmp_path / "out", f"{more} --init_word cat --use_object_template", command)
    start = begun(model, tmp_path / "mytok.safetensors", extended)
    tables, before = load_file(file), load_file(start)
    widths = {"clip_l": 64, "clip_g": 32} if kind == "sdxl" else {"emb_params": 64}
    if extended:
        ends = [f".{name}" for name in widths] if kind == "sdxl" else [""]
        assert {name.partition(".")[2] for name in tables} == {end[1:] for end in ends}
        assert len(tables) == BLOCKS[kind] * len(widths)
    else:
        assert {name: tuple(table.shape) for name, table in tables.items()} == {k: (2, w) for k, w in widths.items()}
    assert tables.keys() == before.keys()
    assert all(table.dtype == torch.float32 for table in tables.values())
    assert all((table != before[name]).any(dim=1).all() for name, table in tables.items())
    first, last = (fixed_noise_loss(model, dataset, path) for path in (start, file))
    assert last < first - 0.003, (first, last)
    said = metadata(file)
    assert (said["ss_token_string"], said["ss_num_vectors_per_token"], said["ss_xti"]) == ("mytok", "2", str(extended))
    assert said["modelspec.architecture"] == f"stable-diffusion-{ARCHITECTURES[kind]}/textual-inversion"
    assert said["modelspec.title"] == "thing"
    # The optimizer knows the new rows alone.
    state = tmp_path / "out" / "thing-state"
    moments = load_file(state / "optimizer.safetensors")
    sizes = {name.split("/")[1]: t.numel() for name, t in moments.items() if name.endswith("exp_avg")}
    assert sizes == {name: 2 * width * (BLOCKS[kind] if extended else 1) for name, width in widths.items()}
    assert read_manifest(state)["step"] == 8


def test_the_model_stays_to_the_bit() -> None:
    for kind in ("sd1", "sdxl"):
        family = fresh_tiny(kind)
        before = {name: tensor.clone() for name, tensor in all_tensors(family).items()}
        digest = family.digest()
        plain = family.encode_texts(["a photo of a cat"])
        rates = dict.fromkeys(family.text_encoders, 0.1)
        trainable = TextualInversion(EmbeddingSettings("mytok", 2, rates, 3))
        trainable.install(family)
        groups = [{"params": list(group.params.values()), "lr": group.lr} for group in trainable.groups()]
        optimizer = make_optimizer("AdamW", groups, {})
        for _ in range(2):
            rows = family.encode_texts(["a photo of mytok", "a cat"])
            sum(row.square().mean() for row in rows.values()).backward()  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()
        assert_equal_tensors(all_tensors(family), before)
        assert family.digest() == digest
        after = family.encode_texts(["a photo of a cat"])
        assert all(torch.equal(after[name], tensor) for name, tensor in plain.items())


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_diffusers_reads_the_file(
    kind: TinyKind, models: dict[TinyKind, Path], photos: Path, tmp_path: Path
) -> None:
    more = "--num_vectors_per_token 3 --learning_rate 0.2 --max_train_steps 2"
    file = teach(models[kind], photos, tmp_path / "out", more)
    family, pipeline = load(models[kind]), reference_pipeline(kind)
    install_embeddings(read_embeddings([file]), family)
    text = "a photo, mytok on a mat"
    if kind == "sd1":
        pipeline.load_textual_inversion(str(file), token="mytok")
        theirs = pipeline.encode_prompt(text, torch.device("cpu"), 1, False)[0]
    else:
        tables = load_file(file)
        for name, number in (("clip_l", ""), ("clip_g", "_2")):
            parts = {
                "text_encoder": getattr(pipeline, f"text_encoder{number}"),
                "tokenizer": getattr(pipeline, f"tokenizer{number}"),
            }
            pipeline.load_textual_inversion(tables[name], token="mytok", **parts)
        theirs = pipeline.encode_prompt(text, do_classifier_free_guidance=False)[0]
    with torch.no_grad():
        ours = family.encode_texts([text])["states"]
    assert float((ours - theirs).abs().max()) < 1e-5
    assert float((ours - load(models[kind]).encode_texts([text])["states"]).abs().max()) > 0.1


@pytest.mark.parametrize("more", ["--xti --optimizer_type Lion", "--use_style_template --use_ema"])
def test_a_part_and_the_rest_are_the_whole(
    more: str, models: dict[TinyKind, Path], photos: Path, tmp_path: Path
) -> None:
    more = f"{more} --learning_rate 0.01 --num_vectors_per_token 2"
    whole = teach(models["sdxl"], photos, tmp_path / "whole", f"{more} --max_train_steps 4")
    teach(models["sdxl"], photos, tmp_path / "parts", f"{more} --max_train_steps 2 --save_state")
    rest = teach(models["sdxl"], photos, tmp_path / "parts", f"{more} --max_train_steps 4 --resume latest")
    assert differences(whole, rest) == []
    assert metadata(whole) == metadata(rest)


def test_checkpointed_activations_and_half_precision(
    models: dict[TinyKind, Path], photos: Path, tmp_path: Path
) -> None:
    more = "--max_train_steps 2 --learning_rate 0.01 --init_word cat"
    plain = load_file(teach(models["sd1"], photos, tmp_path / "plain", more))["emb_params"]
    again = teach(models["sd1"], photos, tmp_path / "again", f"{more} --gradient_checkpointing")
    assert float((plain - load_file(again)["emb_params"]).abs().max()) < 1e-5
    half = f"{more} --mixed_precision bf16 --save_precision fp16 --xti"
    found = load_file(teach(models["sd1"], photos, tmp_path / "half", half))
    assert {tensor.dtype for tensor in found.values()} == {torch.float16}
    assert not torch.equal(found["IN01"].float(), found["MID"].float())


@pytest.mark.parametrize("form", ["safetensors", "pt"])
def test_a_file_goes_on(form: str, models: dict[TinyKind, Path], photos: Path, tmp_path: Path) -> None:
    more = f"--max_train_steps 1 --num_vectors_per_token 2 --save_model_as {form}"
    teach(models["sdxl"], photos, tmp_path / "first", f"{more} --learning_rate 0.1")
    file = tmp_path / "first" / f"thing.{form}"
    # A step of the least size shows where it began; TI begins every block of XTI.
    onward = f"{more} --learning_rate 1e-7 --weights {file} --xti"
    teach(models["sdxl"], photos, tmp_path / "second", onward)
    (first,), (second,) = (read_embeddings([path]) for path in (file, tmp_path / "second" / f"thing.{form}"))
    assert (len(first.blocks), len(second.blocks)) == (0, 11)
    for role, table in first.vectors.items():
        each = second.vectors[role].unflatten(0, (11, 2))
        assert float((each - table).abs().max()) < 1e-5
    if form == "pt":
        found = torch.load(file, weights_only=True)
        assert type(found) is dict
        assert sorted(found) == ["clip_g", "clip_l"]


@pytest.mark.parametrize("extended", [False, True])
def test_previews_are_the_pictures_of_sample(
    extended: bool, models: dict[TinyKind, Path], photos: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a MYTOK on a mat --n blurry --w 64 --h 64 --s 2 --d 5 --l 3\n")
    more = f"--max_train_steps 2 --learning_rate 0.5 --sample_prompts {prompts} --sample_every_n_steps 1"
    # A pickle does not hold the word that it is called by.
    form = "safetensors" if extended else "pt"
    more += f" --num_vectors_per_token 2 --save_every_n_steps 1 --save_model_as {form}" + (" --xti" if extended else "")
    out = tmp_path / "out"
    teach(models["sdxl"], photos, out, more)

    def pixels(path: Path) -> Any:
        with Image.open(path) as picture:
            return np.asarray(picture)

    shown = [pixels(path) for path in sorted((out / "sample").glob("*.png"))]
    assert len(shown) == 2
    assert (shown[0] != shown[1]).any()
    drawn = ["sample", "--config_file", str(out / "thing-config.toml")]
    assert main([*drawn, "--output_dir", str(tmp_path / "last")]) == 0
    saved = ["--embedding", str(out / f"thing-step00000001.{form}"), "--output_dir", str(tmp_path / "first")]
    assert main([*drawn, *saved]) == 0
    assert (pixels(tmp_path / "last" / "00000-5.png") == shown[1]).all()
    assert (pixels(tmp_path / "first" / "00000-5.png") == shown[0]).all()
    assert not identical(*(torch.from_numpy(each.copy()) for each in shown))
