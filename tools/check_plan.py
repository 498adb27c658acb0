"""`python tools/check_plan.py --configs 100`: does a run train on what its plan says?

Makes random datasets and options, asks `sd-train plan` and `sd-train explain` what a run will do, then runs it on a
tiny model and writes down what reaches the objective: path, bucket, crop, flip, caption, timestep, weight, mask. Both
must agree, sample by sample. Some runs are stopped half-way, as by Ctrl-C, and resumed; what comes from caches is
compared with what is encoded anew. Prints a line for each configuration and ends with the number of those that differ.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image

WORDS = ["red", "blue", "green", "cat", "dog", "hat", "tree", "river", "night", "day", "smile", "coat", "window"]
Shown = tuple[Any, ...]


def make_folder(folder: Path, rng: random.Random, count: int, *, captions: bool, alpha: bool = False) -> list[Path]:
    """Random pictures, with captions beside them."""
    folder.mkdir(parents=True)
    paths = []
    for number in range(count):
        size = rng.randint(100, 200), rng.randint(100, 200)
        small = Image.new("RGBA" if alpha else "RGB", (7, 5))
        small.putdata([tuple(rng.randrange(256) for _ in small.getbands()) for _ in range(35)])
        # Centre and size of a face.
        face = f"_{size[0] // 2}_{size[1] // 3}_40_30" if rng.random() < 0.3 else ""
        path = folder / f"{WORDS[number]} {number}{face}.{'png' if alpha else rng.choice(('png', 'jpg', 'webp'))}"
        small.resize(size, Image.Resampling.BICUBIC).save(path)
        if captions:
            text = "\n".join(", ".join(rng.sample(WORDS, rng.randint(1, 7))) for _ in range(rng.randint(1, 3)))
            path.with_suffix(".txt").write_text(text, encoding="utf-8")
        paths.append(path)
    return paths


def subset_options(rng: random.Random, cached: bool, bucketed: bool) -> dict[str, Any]:
    """Random keys of a subset that trains."""
    choices: dict[str, list[Any]] = {
        "num_repeats": [1, 2, 3, 1.5, 0.75],
        "shuffle_caption": [True, False],
        "keep_tokens": [0, 1],
        "caption_prefix": ["", "best,"],
        "caption_suffix": ["", ", end"],
        "enable_wildcard": [True, False],
        "caption_dropout_rate": [0.0, 0.3],
        "caption_dropout_every_n_epochs": [0, 2],
        "caption_tag_dropout_rate": [0.0, 0.4],
        "token_warmup_step": [0, 3, 0.5],
        "flip_aug": [True, False],
        "loss_weight": [1.0, 0.5],
        "resize_interpolation": ["lanczos", "area", "bicubic", "box"],
    }
    if not cached:
        choices |= {"random_crop": [True, False], "color_aug": [True, False]}
    if bucketed or not cached:
        choices["face_crop_aug_range"] = [[1.5, 3.0], [2.0, 2.0]]
    return {name: rng.choice(values) for name, values in choices.items() if rng.random() < 0.4}


def toml_lines(values: dict[str, Any]) -> list[str]:
    """`values` as TOML; JSON's spelling of numbers, texts, lists and booleans is TOML's too."""
    return [f"{name} = {json.dumps(value)}" for name, value in values.items()]


def cache_options(rng: random.Random, cached: bool) -> list[str]:
    """Random options of caches; latents are `cached`."""
    options = []
    if cached:
        options.append(rng.choice(("--cache_latents", "--cache_latents_to_disk")))
        options += [*("--vae_batch_size", str(rng.randint(1, 3))), *rng.choice((["--cache_latents_sample"], []))]
    if rng.random() < 0.4:
        texts = rng.choice(("--cache_text_encoder_outputs", "--cache_text_encoder_outputs_to_disk"))
        options += ["--network_train_unet_only", texts, "--cache_caption_variants", str(rng.randint(1, 3))]
    return options


def make_dataset(place: Path, rng: random.Random) -> tuple[Path, list[str]]:
    """A random dataset file in `place`, and the options that belong to it."""
    cached = rng.random() < 0.5
    options = cache_options(rng, cached)
    style = rng.choice(["captions", "captions", "class", "metadata", "masks", "alpha"])
    if style == "masks":
        options.append("--masked_loss")
    lines = []
    for number in range(rng.choice((1, 1, 2))):
        dataset: dict[str, Any] = {
            "resolution": rng.choice([64, 96, [64, 128]]),
            "batch_size": rng.randint(1, 4),
            "bucket_policy": rng.choice(["keep", "keep", "merge", "fill", "carry"]),
        }
        if rng.random() < 0.8:
            dataset |= {"enable_bucket": True, "min_bucket_reso": 64, "max_bucket_reso": 192}
            dataset["bucket_no_upscale"] = dataset["resolution"] == 96 and rng.random() < 0.4
        if rng.random() < 0.2 and style != "metadata":
            dataset["validation_split"] = 0.3
        lines += ["[[datasets]]", *toml_lines(dataset)]
        for part in range(rng.choice((1, 1, 2))):
            folder = place / f"images {number} {part}"
            images = make_folder(folder, rng, rng.randint(2, 7), captions=style != "class", alpha=style == "alpha")
            subset: dict[str, Any] = {"image_dir": str(folder), "caption_extension": ".txt"}
            subset |= subset_options(rng, cached, "enable_bucket" in dataset)
            if style == "class":
                subset["class_tokens"] = "sks cat"
            elif style == "alpha":
                subset |= {"alpha_mask": True, "unmasked_weight": 0.25}
            elif style == "masks":
                masks = place / f"masks {number} {part}"
                masks.mkdir()
                for image in images:
                    with Image.open(image) as picture:
                        Image.radial_gradient("L").resize(picture.size).save(masks / f"{image.stem}.png")
                subset["conditioning_data_dir"] = str(masks)
            elif style == "metadata":
                metadata = place / f"meta {number} {part}.json"
                entries = {image.name: {"caption": image.stem, "tags": "one, two, three"} for image in images}
                metadata.write_text(json.dumps(entries), encoding="utf-8")
                subset["metadata_file"] = str(metadata)
                del subset["caption_extension"]
            lines += ["[[datasets.subsets]]", *toml_lines(subset)]
        if style in ("captions", "class") and rng.random() < 0.4:
            folder = place / f"reg {number}"
            make_folder(folder, rng, rng.randint(1, 5), captions=False)
            reg = {"image_dir": str(folder), "class_tokens": "cat", "is_reg": True}
            lines += ["[[datasets.subsets]]", *toml_lines(reg)]
    path = place / "dataset.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path, options


def make_words(place: Path, rng: random.Random, model: Path) -> list[str]:
    """The command line of a random training."""
    dataset, options = make_dataset(place, rng)
    return [
        *("--pretrained_model_name_or_path", str(model), "--dataset_config", str(dataset)),
        *("--output_dir", str(place / "out"), "--network_dim", "2", "--learning_rate", "1e-4"),
        *("--seed", str(rng.randrange(1000)), "--prior_loss_weight", "0.5", "--cache_dir", str(place / "cache")),
        *("--max_train_epochs", str(rng.randint(1, 3)), "--max_data_loader_n_workers", str(rng.choice((0, 2)))),
        *("--gradient_accumulation_steps", str(rng.randint(1, 2)), *options),
    ]


@contextlib.contextmanager
def recorded() -> Iterator[list[Shown]]:
    """What reaches the objective meanwhile, a row for each sample."""
    from sd_train.data.batches import Updates
    from sd_train.objectives.denoise import Denoise
    from sd_train.trainables.lora import Lora

    found: list[Shown] = []
    real_loss, real_before, real_prepare, step = Denoise.loss, Lora.before_batch, Updates._prepare, [0]

    def prepare(self: Any, task: Any) -> Any:
        batch = real_prepare(self, task)
        if self.cache is not None or self.texts is not None:
            plain = copy.copy(self)
            plain.cache = plain.texts = None
            batch.plain = real_prepare(plain, task)  # type: ignore[attr-defined]
        return batch

    def before_batch(self: Any, update: Any, batch: Any) -> None:
        step[0] = update.step
        real_before(self, update, batch)

    def loss(self: Any, batch: Any) -> Any:
        for row, path in enumerate(batch.paths):
            geometry = batch.geometry[row]
            shape = batch.noise.shape[3] * 8, batch.noise.shape[2] * 8
            assert shape == (geometry.target[1], geometry.target[0])
            masked = batch.mask is not None
            same = not hasattr(batch, "plain") or is_same(self.family, batch, batch.plain)
            weight = round(float(batch.weight[row]), 5)
            found.append((
                path, step[0] + 1, batch.micro + 1, shape, geometry.crop, geometry.flipped, batch.captions[row],
                int(batch.timesteps[row]), weight, masked, same,
            ))  # fmt: skip
        return real_loss(self, batch)

    Denoise.loss, Lora.before_batch, Updates._prepare = loss, before_batch, prepare  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Denoise.loss, Lora.before_batch, Updates._prepare = (  # type: ignore[method-assign]
            real_loss, real_before, real_prepare,
        )  # fmt: skip


def is_same(family: Any, cached: Any, plain: Any) -> bool:
    """Whether a batch from caches holds what its pictures and captions give when they are encoded now."""
    import torch

    found, encoded = [(cached.mask, plain.mask)], []
    if cached.images is not None:
        encoded.append((cached.images, family.encode_images(plain.pixels)))
    if cached.texts is not None:
        with torch.no_grad():
            encoded.append((cached.texts, family.encode_texts(plain.captions)))
    found += [(rows[name], now[name]) for rows, now in encoded for name in now]
    return cached.captions == plain.captions and all(
        before is now is None or (before is not None and now is not None and torch.allclose(before, now, atol=1e-4))
        for before, now in found
    )


@contextlib.contextmanager
def stopping(after: int) -> Iterator[None]:
    """Trainings end after update number `after` meanwhile, as Ctrl-C ends them."""
    from sd_train.guard import Guard

    real = Guard.should_stop
    Guard.should_stop = lambda self, step: step >= after  # type: ignore[method-assign]
    try:
        yield
    finally:
        Guard.should_stop = real  # type: ignore[method-assign]


def said(main: Any, words: list[str]) -> Any:
    """The JSON that a command prints."""
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.redirect_stderr(io.StringIO()):
        code = main(words)
    if code:
        raise SystemExit(f"{words[0]} ended with {code}")
    return json.loads(text.getvalue())


def expected(words: list[str], plan: dict[str, Any]) -> list[Shown]:
    """Every sample of the training as `sd-train explain` tells it."""
    from sd_train.commands.explain import main as explain

    rows: list[Shown] = []
    for path in {image["path"] for dataset in plan["datasets"] for image in dataset["images"]}:
        for image in said(explain, [path, "train_network", "--json", *words]):
            for time in image["shown"]:
                top, left = time["crop_top_left"]
                if time["flipped"]:
                    left = time["resized"][0] - time["bucket"][0] - left
                rows.append((
                    image["path"], time["update"], time["batch"], tuple(time["bucket"]), (top, left), time["flipped"],
                    time["caption"], time["timestep"], round(time["weight"], 5),
                ))  # fmt: skip
    return rows


def differences(words: list[str], part: float = 1.0) -> list[str]:
    """Run the training that `words` ask for; where it differs from its plan, in words.

    With `part` below 1 the run is stopped after that share of its updates, and resumed.
    """
    from sd_train.commands.plan import main as plan_command
    from sd_train.train_network import main as train_network

    plan = said(plan_command, ["train_network", "--json", *words])
    wanted = expected(words, plan)
    with recorded() as found, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        stop = int(part * plan["total_updates"])
        code = 0
        if 0 < stop < plan["total_updates"]:
            with stopping(stop):
                code = train_network(words)
            words = [*words, "--resume", "latest"]
        code = code or train_network(words)
    wrong = [] if code == 0 else [f"the training ended with {code}"]
    rows = [row[:-2] for row in found]
    if not all(row[-1] for row in found):
        wrong.append(f"{sum(not row[-1] for row in found)} samples from caches are not what encoding gives")
    if Counter(rows) != Counter(wanted):
        missing, extra = Counter(wanted) - Counter(rows), Counter(rows) - Counter(wanted)
        wrong.append(f"{missing.total()} samples did not come, {extra.total()} came unplanned")
        wrong += [f"  planned {row}" for row in list(missing)[:2]] + [f"  came    {row}" for row in list(extra)[:2]]
    if max((row[1] for row in rows), default=0) != plan["total_updates"]:
        wrong.append(f"the plan has {plan['total_updates']} updates")
    return wrong + _against_plan(plan, found)


def _against_plan(plan: dict[str, Any], found: list[Shown]) -> list[str]:
    """What of the plan's own figures does not hold."""
    wrong = []
    batches = {(row[1], row[2]): row[3] for row in found}
    first_epoch = [key for key in batches if key[0] <= plan["updates_per_epoch"]]
    if len(first_epoch) != plan["batches_per_epoch"] and not plan["epochs_vary"]:
        wrong.append(f"{len(first_epoch)} batches in the first epoch, planned {plan['batches_per_epoch']}")
    planned: Counter[tuple[int, int]] = Counter()
    for dataset in plan["datasets"]:
        masked = any(subset["alpha_mask"] or subset["conditioning_data_dir"] for subset in dataset["subsets"])
        for bucket in dataset["buckets"]:
            planned[tuple(bucket["resolution"])] += bucket["batches"]
        for image in dataset["images"]:
            rows = [row for row in found if row[0] == image["path"]]
            if masked and not all(row[9] for row in rows):
                wrong.append(f"{image['path']}: a sample came without its mask")
            once = dataset["bucket_policy"] in ("keep", "merge") and isinstance(image["repeats"], int)
            shown = sum(1 for row in rows if row[1] <= plan["updates_per_epoch"])
            if once and shown != image["repeats"]:
                wrong.append(f"{image['path']}: {shown} times in the first epoch, planned {image['repeats']}")
    came = Counter(bucket for key, bucket in batches.items() if key[0] <= plan["updates_per_epoch"])
    if came != +planned:
        wrong.append(f"batches by bucket {dict(came)}, planned {dict(+planned)}")
    kept = {path for entry in plan["validation"] for path in entry["images"]}
    if kept & {row[0] for row in found}:
        wrong.append("an image that is kept for validation was trained on")
    return wrong


def check(count: int, seed: int, model: Path) -> int:
    """Try `count` random configurations; how many differ."""
    failed = 0
    for number in range(seed, seed + count):
        with tempfile.TemporaryDirectory() as folder:
            rng = random.Random(number)
            words = make_words(Path(folder), rng, model)
            wrong = differences(words, rng.choice((1.0, 1.0, 0.4)))
            failed += bool(wrong)
            print(f"configuration {number}: " + ("agrees" if not wrong else "\n  ".join(["DIFFERS", *wrong])))
    return failed


def main() -> int:
    """Check random configurations; 1 if one differs."""
    from sd_train.demo.tiny_model import save_tiny_model

    parser = argparse.ArgumentParser(description="Does a run train on what its plan says?")
    parser.add_argument("--configs", type=int, default=100, help="random configurations")
    parser.add_argument("--seed", type=int, default=0, help="of the first one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.safetensors"
        with contextlib.redirect_stdout(io.StringIO()):
            save_tiny_model(model, 0)
        failed = check(given.configs, given.seed, model)
    print(f"{given.configs - failed} of {given.configs} runs equal their plan")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
