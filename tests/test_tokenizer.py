"""The shipped vocabulary gives the published CLIP tokenizer; the shipped configurations give the published networks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from sd_train.families import tokenizer as module
from sd_train.families.tokenizer import END_ID, START_ID, VOCABULARY_SIZE, clip_vocabulary, load_clip_tokenizer

GOLDEN = json.loads((Path(__file__).parent / "data" / "clip_tokens.json").read_text(encoding="utf-8"))["tokens"]
ASSETS = Path(module.__file__).parent / "assets"


def config(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((ASSETS / "sd1" / f"{name}.json").read_text(encoding="utf-8"))
    return loaded


def test_token_ids_equal_the_reference() -> None:
    tokenizer = load_clip_tokenizer()
    assert len(GOLDEN) >= 200
    wrong = {text: ids for text, ids in GOLDEN if tokenizer(text).input_ids != [START_ID, *ids, END_ID]}
    assert not wrong


def test_vocabulary_is_complete() -> None:
    ids = clip_vocabulary().ids
    assert len(ids) == VOCABULARY_SIZE == len(load_clip_tokenizer())
    assert sorted(ids.values()) == list(range(VOCABULARY_SIZE))
    assert (ids["!"], ids["!</w>"], ids["cat</w>"]) == (0, 256, 2368)


def test_special_tokens() -> None:
    tokenizer = load_clip_tokenizer()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (START_ID, END_ID, END_ID)
    assert tokenizer.convert_tokens_to_ids("no such symbol") == tokenizer.unk_token_id == END_ID
    assert tokenizer("a <|endoftext|> cat").input_ids == [START_ID, 320, END_ID, 2368, END_ID]
    assert tokenizer.decode(tokenizer("A   photo OF a cat").input_ids, skip_special_tokens=True) == "a photo of a cat"


@pytest.mark.parametrize(("pad_token", "pad_id"), [("<|endoftext|>", END_ID), ("!", 0)])
def test_texts_are_padded_and_cut_to_77(pad_token: str, pad_id: int) -> None:
    tokenizer = load_clip_tokenizer(pad_token)
    short, long = tokenizer(["wow!", "cat " * 200], padding="max_length", truncation=True).input_ids
    assert short == [START_ID, 2781, 256, END_ID, *[pad_id] * 73]
    assert long == [START_ID, *[2368] * 75, END_ID]


def test_added_tokens_stay_with_their_tokenizer() -> None:
    tokenizer = load_clip_tokenizer()
    plain = tokenizer("<frog>").input_ids
    assert tokenizer.add_tokens(["<frog>"]) == 1
    assert tokenizer("<frog>").input_ids == [START_ID, VOCABULARY_SIZE, END_ID]
    assert load_clip_tokenizer()("<frog>").input_ids == plain


def test_tokenizer_needs_no_network_and_no_cache(tmp_path: Path) -> None:
    code = (
        "import socket\n"
        "def refuse(*arguments, **named): raise SystemExit('the network was asked')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from sd_train.families.tokenizer import load_clip_tokenizer\n"
        "print(load_clip_tokenizer('!')('a photo of a cat').input_ids)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path), "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.stdout.strip() == "[49406, 320, 1125, 539, 320, 2368, 49407]", run.stderr


def test_configurations_give_the_published_networks() -> None:
    with torch.device("meta"):
        networks = {
            "unet": UNet2DConditionModel.from_config(config("unet")),
            "vae": AutoencoderKL.from_config(config("vae")),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**config("text_encoder"))),
        }
    counts = {name: sum(tensor.numel() for tensor in network.parameters()) for name, network in networks.items()}
    assert counts == {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}
    assert networks["vae"].config.scaling_factor == 0.18215
    assert networks["text_encoder"].config.hidden_act == "quick_gelu"


def test_scheduler_has_the_published_noise_schedule() -> None:
    scheduler = PNDMScheduler.from_config(config("scheduler"))
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    expected = torch.cumprod(1 - betas, dim=0)
    assert torch.allclose(scheduler.alphas_cumprod.double(), expected, rtol=1e-4)
    assert scheduler.config.prediction_type == "epsilon"
    assert scheduler.config.steps_offset == 1
    assert not scheduler.config.set_alpha_to_one
