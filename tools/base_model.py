"""`python tools/base_model.py make | judge [MODEL]`: the model that the demonstration trains on, and its examination.

`make` trains it from nothing on drawn pictures: first a VAE (`shapes_vae.py`), then U-Net and text encoder together
with `sd-train fine_tune`; about two hours on two cores. What is there already is kept, so that a stopped run goes on.
`judge` draws the 500 captions of the examination (`shapes_world.py`), none of which was trained on, with
`sd-train sample`, and has the pictures judged by rule (`shapes_judge.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
import torch
from shapes_judge import verdict
from shapes_vae import BATCH, DECODER_STEPS, RATE, STEPS, load_vae, train_vae
from shapes_vae import CONFIG as VAE_CONFIG
from shapes_world import HELD_OUT_PAIRS, Picture, Scene, caption, draw, examination, random_scene, training_scenes

from sd_train.demo.tiny_model import make_tiny_parts, tiny_configs
from sd_train.entry import guarded
from sd_train.families.parts import ModelRequest, read_model
from sd_train.families.saving import save_model
from sd_train.families.sources import DictSource
from sd_train.files import write_text

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "sd_train" / "demo" / "base_model.safetensors"
MOST_BYTES = 16_000_000

SEED = 1
PICTURES = 30_000
"""Of each part of the training."""
LEAST_KEPT = 0.98
"""Share of drawn pictures that the judge must find right after the VAE, before anything else is trained."""
UNET: dict[str, Any] = {
    "block_out_channels": [64, 64, 80, 64],
    "layers_per_block": 1,
    "norm_num_groups": 8,  # Of 32 groups each would have two numbers in the innermost block, where a latent is 1 by 1.
    "attention_head_dim": 4,  # Heads, in 1.x.
    "cross_attention_dim": 64,
    "sample_size": 8,
}
TEXT_LAYERS = 3


@dataclass(frozen=True)
class Part:
    """A run of `fine_tune`, on pictures of its own."""

    number: int
    updates: int
    rate: float
    textured: float
    """Share of pictures with a textured background."""


PARTS = (Part(1, 8_000, 1e-3, 0.25), Part(2, 8_000, 8e-4, 0.4))
"""Textures are what a model that the first part alone has trained gets wrong most often."""
TRAINING = (
    "--train_text_encoder --train_batch_size 32 --optimizer_args betas=0.9,0.99 weight_decay=0 "
    "--lr_scheduler cosine --lr_warmup_steps 0.02 --min_snr_gamma 5 --use_ema --ema_decay 0.999 "
    "--cache_latents --vae_batch_size 64 --resolution 64"
)
DRAWING = {"w": 64, "h": 64, "s": 20, "l": 4}
"""Width and height, steps of DDIM and guidance of the pictures that are judged."""


def make(folder: Path, threads: int) -> None:
    """Make the base model in `folder` and put it in its place in the package, with its score."""
    folder.mkdir(parents=True, exist_ok=True)
    started = time.time()
    vae = folder / "vae.safetensors"
    if not vae.exists():
        train_vae(vae, SEED, threads)
    kept = vae_score(vae)
    print(f"the VAE keeps {kept:.1%} of drawn pictures right", flush=True)
    if kept < LEAST_KEPT:
        raise SystemExit(f"{vae}: keeps only {kept:.1%} right and must keep {LEAST_KEPT:.0%}; train it for more steps")
    trained = folder / "start.safetensors"
    if not trained.exists():
        write_start(trained, vae)
    for part in PARTS:
        trained = train(folder, part, trained, threads)
    score = judge(trained, folder / "judged")
    finish(trained, SHIPPED, score)
    print(f"{SHIPPED}: {SHIPPED.stat().st_size:,} bytes, after {(time.time() - started) / 60:.0f} minutes")


def vae_score(path: Path, count: int = 500) -> float:
    """The share of drawn pictures that are judged right after the VAE has encoded and decoded them."""
    vae = load_vae(path).eval()
    rng = np.random.default_rng(SEED + 99)
    scenes = [random_scene(rng) for _ in range(count)]
    drawn = np.stack([draw(scene, SEED + 99 + number) for number, scene in enumerate(scenes)])
    with torch.no_grad():
        batch = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1
        decoded = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in batch.split(50)])
    seen = ((decoded.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return sum(all(verdict(scene, one).values()) for scene, one in zip(scenes, seen, strict=True)) / count


def draw_pictures(folder: Path, part: Part) -> Path:
    """The training pictures of a part as PNG files, and their captions as `meta.json`; gives the dataset file."""
    images, without = folder / "pictures", frozenset(caption(scene) for scene in examination())
    images.mkdir(parents=True, exist_ok=True)
    captions = {}
    for place, scene in enumerate(training_scenes(PICTURES, SEED + part.number - 1, without, part.textured)):
        path = images / f"{place:05d}.png"
        cv2.imwrite(str(path), draw(scene, (part.number - 1) * PICTURES + place)[:, :, ::-1])
        captions[str(path.resolve())] = {"caption": caption(scene)}
    write_text(folder / "meta.json", json.dumps(captions))
    dataset = folder / "dataset.toml"
    dataset.write_text(
        f"[[datasets]]\nresolution = 64\nbatch_size = 32\n[[datasets.subsets]]\nimage_dir = '{images}'\n"
        f"metadata_file = '{folder / 'meta.json'}'\ncaption_dropout_rate = 0.1\n",
        encoding="utf-8",
    )
    return dataset


def write_start(path: Path, vae: Path) -> None:
    """The untrained model: the VAE is trained, U-Net and text encoder are random."""
    configs = tiny_configs("sd1")
    configs["unet"] |= UNET
    configs["vae"] |= VAE_CONFIG
    configs["text_encoder"] |= {"num_hidden_layers": TEXT_LAYERS}
    parts = make_tiny_parts("sd1", SEED, configs)
    tensors = {name: tensor.detach() for name, tensor in load_vae(vae).state_dict().items()}
    parts.parts["vae"] = replace(parts.parts["vae"], tensors=DictSource(tensors))
    save_model(path, parts, "safetensors", None, {})


def train(folder: Path, part: Part, start: Path, threads: int) -> Path:
    """U-Net and text encoder, with the trainer; the averaged weights that it leaves, also of an earlier run."""
    output, name = folder / "trained", f"part{part.number}"
    trained = output / f"{name}-ema.safetensors"
    if trained.exists():
        return trained
    dataset = draw_pictures(folder / name, part)
    command = [
        *(sys.executable, "-m", "sd_train", "fine_tune", "--pretrained_model_name_or_path", str(start)),
        *("--dataset_config", str(dataset), "--output_dir", str(output), "--output_name", name, "--overwrite"),
        *("--max_train_steps", str(part.updates), "--learning_rate", str(part.rate), "--seed", str(SEED)),
        *(*TRAINING.split(), "--save_every_n_steps", "1000", "--logging_dir", str(folder / "logs")),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, check=True, cwd=ROOT, env=environment)
    return trained


def judge(model: Path, folder: Path) -> dict[str, Any]:
    """The examination: each caption drawn once, its number as the seed.

    Returns:
        The shares judged right: of all, of those with a pair kept out of training, of one and of two things, and of
        each thing that a caption says.
    """
    from sd_train.commands.sample import main as sample

    scenes = examination()
    folder.mkdir(parents=True, exist_ok=True)
    options = " ".join(f"--{name} {value}" for name, value in DRAWING.items())
    lines = [f"{caption(scene)} {options} --d {number}" for number, scene in enumerate(scenes)]
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    before = set(folder.glob("*.png"))
    sample([str(model), "--prompts", str(prompts), "--output_dir", str(folder)])
    drawn = sorted(set(folder.glob("*.png")) - before)
    if len(drawn) != len(scenes):
        raise SystemExit(f"{folder}: {len(drawn)} pictures were drawn of {len(scenes)}")
    return scored(scenes, [read_picture(path) for path in drawn])


def scored(scenes: Sequence[Scene], drawn: Sequence[Picture]) -> dict[str, Any]:
    """The shares of pictures that show what their captions say, see `judge`."""
    verdicts = [verdict(scene, picture) for scene, picture in zip(scenes, drawn, strict=True)]
    judged = list(zip(scenes, verdicts, strict=True))
    groups: dict[str, list[dict[str, bool]]] = {
        "all": verdicts,
        "trained pairs": [one for scene, one in judged if not kept_out(scene)],
        "held-out pairs": [one for scene, one in judged if kept_out(scene)],
        "one thing": [one for scene, one in judged if len(scene.things) == 1],
        "two things": [one for scene, one in judged if len(scene.things) == 2],
    }
    score: dict[str, Any] = {name: _share([all(one.values()) for one in group]) for name, group in groups.items()}
    said: Counter[str] = Counter(name for one in verdicts for name, good in one.items() if good)
    return score | {name: round(said[name] / len(verdicts), 4) for name in verdicts[0]}


def _share(verdicts: Sequence[bool]) -> float:
    return round(sum(verdicts) / max(1, len(verdicts)), 4)


def kept_out(scene: Scene) -> bool:
    """Whether a scene has a shape in a colour that it is never trained in."""
    return any((thing.shape, thing.colour) in HELD_OUT_PAIRS for thing in scene.things)


def read_picture(path: Path) -> Picture:
    """A PNG file as RGB."""
    picture = cv2.imread(str(path))
    if picture is None:
        raise SystemExit(f"{path}: is no picture")
    return np.asarray(picture[:, :, ::-1], np.uint8)


def finish(trained: Path, path: Path, score: dict[str, Any], parts: Sequence[Part] = PARTS) -> None:
    """Write the averaged weights in half precision, with the recipe, the seed and the score in the metadata."""
    recipe = {
        "command": "python tools/base_model.py make",
        "pictures": PICTURES,
        "vae": {"steps": STEPS, "decoder_steps": DECODER_STEPS, "batch": BATCH, "learning_rate": RATE},
        "parts": [asdict(part) for part in parts],
        "fine_tune": TRAINING,
        "judged_with": DRAWING,
        "torch": torch.__version__,
    }
    metadata = {
        "modelspec.title": "sd_train base model of drawn shapes",
        "modelspec.description": "A tiny Stable Diffusion 1.x model of coloured shapes, 64 x 64 pixels, trained from "
        "nothing on drawn pictures; prompts are such as: a large red circle on the left on a striped blue background",
        "modelspec.license": "Apache-2.0",
        "modelspec.resolution": "64x64",
        "sd_train.recipe": json.dumps(recipe),
        "sd_train.seed": str(SEED),
        "sd_train.score": json.dumps(score),
    }
    save_model(path, read_model(ModelRequest(str(trained))), "safetensors", torch.float16, metadata)
    if path.stat().st_size > MOST_BYTES:
        raise SystemExit(f"{path}: has {path.stat().st_size:,} bytes, more than {MOST_BYTES:,}")


def main(argv: Sequence[str]) -> int:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser("base_model.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("command", choices=("make", "judge"))
    parser.add_argument("model", nargs="?", type=Path, default=SHIPPED, help="to be judged (default: the shipped one)")
    parser.add_argument("--output_dir", type=Path, default=Path("base_model_output"), help="for whatever is made")
    parser.add_argument("--threads", type=int, default=2, help="processor threads of the trainings (default 2)")
    given = parser.parse_args(argv)
    if given.command == "make":
        make(given.output_dir, given.threads)
    else:
        for name, share in judge(given.model, given.output_dir).items():
            print(f"{name:16} {share:.1%}")
    return 0


if __name__ == "__main__":
    raise SystemExit(guarded(lambda: main(sys.argv[1:])))
