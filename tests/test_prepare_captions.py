"""`sd-train make_captions`: real files and tiny models of the real classes."""

from __future__ import annotations

import shutil
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sd_train.__main__ import main
from sd_train.errors import ModelError
from sd_train.prepare.caption_models import without_writing
from sd_train.prepare.captioner import Captioner, DrawnPerImage, Wording
from tests.test_prepare_tags import texts, times

WORDS = ("[PAD] [UNK] [CLS] [SEP] [MASK] a picture of dog cat red blue ##s the on in house tree sky").split()


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_blip(tmp_path_factory.mktemp("blip"))


def write_blip(folder: Path) -> Path:
    """A BLIP of 19 words with random weights, large enough that its captions differ from image to image."""
    from transformers import (
        BertTokenizer,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessorPil,
        BlipProcessor,
    )

    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(WORDS) + 1, "encoder_hidden_size": 16, "max_position_embeddings": 64}
    # As in the published ones, the first token is one that the tokenizer does not know.
    text |= {"bos_token_id": len(WORDS), "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    torch.manual_seed(0)
    vision = {**small, "image_size": 32, "patch_size": 16}
    config = BlipConfig(vision_config=vision, text_config=text, projection_dim=16)
    model = BlipForConditionalGeneration(config)
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() > 1:
                weights.mul_(12)
    model.save_pretrained(folder)
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


def caption(folder: Path, model: Path, *more: str) -> int:
    chosen = ("--caption_weights", str(model), "--max_length", "10", "--device", "cpu")
    return main(["make_captions", str(folder), *chosen, *more])


def noise(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        levels = np.random.default_rng(number).integers(0, 255, (40 + number, 50, 3), dtype=np.uint8)
        Image.fromarray(levels // 8 * (number + 1)).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize("beams", [1, 3])
def test_captions_are_those_of_transformers(tmp_path: Path, blip: Path, beams: int) -> None:
    from transformers import BlipForConditionalGeneration, BlipImageProcessorPil, BlipProcessor

    folder = noise(tmp_path, 3)
    assert caption(folder, blip, "--beam_search", "--num_beams", str(beams), "--batch_size", "2") == 0
    model = BlipForConditionalGeneration.from_pretrained(blip).eval()
    processor = BlipProcessor.from_pretrained(blip, backend="pil")
    assert isinstance(processor.image_processor, BlipImageProcessorPil)
    for number in range(3):
        inputs = processor(Image.open(folder / f"{number}.png"), "a picture of", return_tensors="pt")
        found = model.generate(**inputs, num_beams=beams, do_sample=False, max_new_tokens=10, min_new_tokens=5)
        expected = processor.decode(found[0], skip_special_tokens=True)
        assert expected.startswith("a picture of ")
        assert (folder / f"{number}.caption").read_text() == expected.removeprefix("a picture of ") + "\n"


def test_weights_may_be_pickled(tmp_path: Path, blip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = noise(tmp_path / "one", 2), noise(tmp_path / "other", 2)
    assert caption(one, blip, "--beam_search") == 0
    folder = tmp_path / "model"
    shutil.copytree(blip, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert caption(other, folder, "--beam_search") == 0
    assert texts(one, ".caption") == texts(other, ".caption")
    torch.save({"weights": subprocess.Popen}, folder / "pytorch_model.bin")
    assert caption(other, folder, "--overwrite") == 3
    assert "could run code" in capsys.readouterr().err
    torch.save({"other.weight": torch.zeros(3)}, folder / "pytorch_model.bin")
    assert caption(other, folder, "--overwrite") == 3
    assert "weights are missing" in capsys.readouterr().err


def test_nucleus_draws_by_image_alone(tmp_path: Path, blip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, more = noise(tmp_path / "one", 5), noise(tmp_path / "more", 5)
    assert caption(one, blip) == 0
    assert caption(more, blip, "--batch_size", "4", "--debug") == 0
    drawn = texts(one, ".caption")
    assert drawn == texts(more, ".caption")
    assert len(set(drawn.values())) > 2
    assert f"{more / '0.png'}: {drawn['0.caption'].strip()}" in capsys.readouterr().out
    # An interrupted command goes on with the same captions, and a finished one changes nothing.
    before = times(one)
    (one / "3.caption").unlink()
    assert caption(one, blip) == 0
    assert texts(one, ".caption") == drawn
    assert {**times(one), "3.caption": 0} == {**before, "3.caption": 0}
    assert caption(one, blip, "--overwrite", "--seed", "7", "--prompt", "") == 0
    assert texts(one, ".caption") != drawn


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ('a red sign with the word "stop" on it', "a red sign"),
        ("a shirt that says hello on the front, on a bed", "a shirt, on a bed"),
        ("a cake with the number 12 on it and a dog", "a cake and a dog"),
        ("a poster with the words 'no way", "a poster"),
        ("a dog with the letter a written on its collar", "a dog"),
        ("a man with a book that shows words", "a man with a book that shows words"),
        ("a boy and a word", "a boy and a word"),
    ],
)
def test_writing_is_left_out(caption: str, expected: str) -> None:
    assert without_writing(caption) == expected


def test_draws_have_the_distribution_of_the_logits() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, float("-inf")]]).repeat(4000, 1)
    drawn = Counter(DrawnPerImage(range(4000))(logits, logits).argmax(dim=1).tolist())
    expected = torch.softmax(logits[0], dim=0) * 4000
    assert drawn[3] == 0
    assert all(abs(drawn[token] - float(expected[token])) < 120 for token in range(3))


def test_models_that_cannot_caption(tmp_path: Path, blip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = noise(tmp_path / "images", 1)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8")
    assert caption(folder, blip, "--caption_extension", ".txt") == 3
    assert "broken.jpg" in capsys.readouterr().err
    assert set(texts(folder)) == {"0.txt"}
    empty = tmp_path / "empty"
    empty.mkdir()
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "bert"}')
    (other / "model.safetensors").write_bytes((blip / "model.safetensors").read_bytes())
    url = "https://storage.example/model_large_caption.pth"
    for source, said in (
        (empty, "holds no config.json"), (other, "cannot caption with it"), (Path(url), "first files (.pth)"),
        (Path("Salesforce/none"), "switched off"),
    ):  # fmt: skip
        assert caption(folder, source, "--overwrite") == 3
        assert said in capsys.readouterr().err
    assert caption(folder, blip, "--overwrite", "--device", "cuda:99") == 4
    assert "--device cuda:99" in capsys.readouterr().err


def test_encoders_with_a_decoder_and_git(tmp_path: Path) -> None:
    """Models whose files are laid out otherwise than BLIP's."""
    from transformers import (
        BertTokenizer,
        CLIPImageProcessorPil,
        GitConfig,
        GitForCausalLM,
        GitProcessor,
        GPT2Config,
        VisionEncoderDecoderConfig,
        VisionEncoderDecoderModel,
        ViTConfig,
        ViTImageProcessorPil,
    )  # fmt: skip

    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**small, "image_size": 32, "patch_size": 16}
    ends = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0, "vocab_size": len(WORDS)}
    torch.manual_seed(0)
    git, both = tmp_path / "git", tmp_path / "both"
    GitForCausalLM(GitConfig(vision_config=vision, max_position_embeddings=64, **small, **ends)).save_pretrained(git)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    GitProcessor(CLIPImageProcessorPil(**size), tokenizer).save_pretrained(git)
    decoder = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64, **ends)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**vision), decoder)
    config.decoder_start_token_id, config.pad_token_id = 2, 0
    VisionEncoderDecoderModel(config=config).save_pretrained(both)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(both)
    tokenizer.save_pretrained(both)
    pictures = [np.full((20, 30, 3), level, np.uint8) for level in (10, 200)]
    for folder in (git, both):
        model = Captioner(folder, torch.device("cpu"), "no")
        seen, wording = [model.see(picture) for picture in pictures], Wording(None, 1.0, 6, 3)
        made = model(seen, wording, [1, 2])
        assert [model([seen[n]], wording, [n + 1])[0] for n in (0, 1)] == made
        assert all(2 <= len(text.split()) <= 6 for text in made)
    prompted = Captioner(git, torch.device("cpu"), "no", "a red dog")
    texts_of_git = prompted([prompted.see(picture) for picture in pictures], Wording(1, 1.0, 6, 3), [1, 2])
    assert not any(text.startswith("a red dog") for text in texts_of_git)
    with pytest.raises(ModelError, match="takes no words"):
        Captioner(both, torch.device("cpu"), "no", "a red dog")
