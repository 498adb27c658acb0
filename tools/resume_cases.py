"""Trainings of many kinds, each in one go and in parts: what the parts leave must be the same, to the bit.

A row chooses a value on every axis. `covering` gives few rows that hold every pair of values; `tools/resume_product.py`
goes through all of them.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sd_train.demo

PHOTOS = Path(sd_train.demo.__file__).parent / "photos"
END = 20
STOPS = (7, 13, END)
"""Updates after which a training in parts is stopped; the last one is its end."""
WORD = "train_textual_inversion --token_string sks-1 --init_word cat --num_vectors_per_token 2 --use_object_template"
AXES: Mapping[str, Mapping[str, str]] = {
    "trainable": {
        "lora": "train_network --network_dim 4 --network_alpha 4 --network_dropout 0.1",
        "lycoris": "train_network --network_dim 2 --network_module lycoris.kohya --network_args algo=dylora "
        "block_size=1 module_dropout=0.3 preset=attn-mlp",
        "fine_tune": "fine_tune --train_text_encoder",
        "train_db": "train_db --stop_text_encoder_training 10",
        "embedding": WORD,
        "xti": f"{WORD} --xti",
    },
    "optimizer": {
        "AdamW": "--optimizer_type AdamW --learning_rate 1e-3 --lr_scheduler cosine --lr_warmup_steps 3",
        "AdamWScheduleFree": "--optimizer_type AdamWScheduleFree --learning_rate 1e-3",
        "Prodigy": "--optimizer_type Prodigy --learning_rate 1 --lr_scheduler linear --optimizer_args "
        "weight_decay=0.01 use_bias_correction=True",
        "AdamW8bit": "--optimizer_type AdamW8bit --learning_rate 1e-3 --lr_scheduler polynomial",
        "Adafactor": "--optimizer_type AdaFactor --optimizer_args relative_step=True scale_parameter=True",
    },
    "objective": {
        "plain": "",
        "importance": "--timestep_sampling importance --min_snr_gamma 5",
        "noise": "--noise_offset 0.1 --noise_offset_random_strength --multires_noise_iterations 4 --ip_noise_gamma 0.1 "
        "--timestep_sampling logit_normal --loss_type huber",
    },
    "ema": {"no": "", "yes": "--use_ema --ema_decay 0.9"},
    "accumulation": {"1": "", "2": "--gradient_accumulation_steps 2"},
    "precision": {"no": "", "bf16": "--mixed_precision bf16", "fp16": "--mixed_precision fp16"},
    "workers": {"0": "--max_data_loader_n_workers 0", "4": "--max_data_loader_n_workers 4"},
    "cache": {"no": "", "latents": "--cache_latents"},
    "processes": {"1": "", "2": ""},
}
Row = tuple[str, ...]
"""A value on each of `AXES`, in their order."""
SCRIPT = "import sys; from tools.resume_cases import train_all; train_all(sys.argv[1])"
"""What each of two processes runs."""


def product() -> Iterator[Row]:
    """All rows."""
    yield from itertools.product(*AXES.values())


def pairs_of(row: Row) -> list[tuple[tuple[int, str], tuple[int, str]]]:
    """Every two values of `row`, with the numbers of their axes."""
    return list(itertools.combinations(enumerate(row), 2))


def covering() -> list[Row]:
    """Few rows that hold every pair of values: each is the one that holds the most pairs that are still missing."""
    candidates = list(product())
    numbers: dict[object, int] = {}
    # Sets of pairs as bits, which makes the search a hundred times faster.
    masks = [sum(1 << numbers.setdefault(pair, len(numbers)) for pair in pairs_of(row)) for row in candidates]
    rows, missing = list[Row](), (1 << len(numbers)) - 1
    while missing:
        best = max(range(len(candidates)), key=lambda number: (masks[number] & missing).bit_count())
        rows.append(candidates[best])
        missing &= ~masks[best]
    return rows


def name_of(row: Row) -> str:
    """The row in words, which is also its folder."""
    return "-".join(f"{axis}_{value}" if value in ("no", "yes") or value.isdecimal() else value
                    for axis, value in zip(AXES, row, strict=True))  # fmt: skip


def processes_of(row: Row) -> int:
    """How many processes train it."""
    return int(row[list(AXES).index("processes")])


def write_model(folder: Path) -> Path:
    """A Stable Diffusion 1.x model of every kind of module, as small as it can be."""
    import torch

    from sd_train.demo.tiny_model import make_tiny_parts, tiny_configs
    from sd_train.families.saving import save_model

    configs, width = tiny_configs("sd1"), 16
    configs["unet"] |= {
        "block_out_channels": [32], "layers_per_block": 1, "attention_head_dim": 4, "norm_num_groups": 8,
        "down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"],
        "cross_attention_dim": width,
    }  # fmt: skip
    configs["vae"] |= {"layers_per_block": 1, "block_out_channels": [8, 8, 8, 16], "norm_num_groups": 8}
    configs["text_encoder"] |= {
        "hidden_size": width, "projection_dim": width, "intermediate_size": 2 * width, "num_hidden_layers": 1,
    }  # fmt: skip
    path = folder / "model.safetensors"
    save_model(path, make_tiny_parts("sd1", 7, configs), "safetensors", torch.float16, {})
    return path


def write_datasets(folder: Path) -> None:
    """The dataset files of all commands, with everything that is drawn at random."""
    captions = {path.stem: {"caption": f"a photo of {path.stem}, indoors"} for path in PHOTOS.glob("*.jpg")}
    (folder / "captions.json").write_text(json.dumps(captions))
    drawn = "num_repeats = 3\nflip_aug = true\n"
    shuffled = "shuffle_caption = true\nkeep_tokens = 1\ncaption_dropout_rate = 0.1\n"
    metadata = f'metadata_file = "{folder.as_posix()}/captions.json"\n'
    # A word that is dropped cannot be learned.
    subsets = {"fine_tune": shuffled + metadata, "train_textual_inversion": "", "others": shuffled}
    for command, more in subsets.items():
        (folder / f"{command}.toml").write_text(
            '[general]\ncaption_extension = ".txt"\n[[datasets]]\nresolution = 64\nbatch_size = 1\n'
            f'[[datasets.subsets]]\nimage_dir = "{PHOTOS.as_posix()}"\n{drawn}{more}'
        )


def words_of(row: Row, model: Path, folder: Path, output: Path) -> tuple[str, list[str]]:
    """The command of `row` and its options; `folder` holds the datasets."""
    chosen = " ".join(words[value] for words, value in zip(AXES.values(), row, strict=True)).split()
    own = folder / f"{chosen[0]}.toml"
    dataset = own if own.is_file() else folder / "others.toml"
    paths = {"pretrained_model_name_or_path": model, "dataset_config": dataset, "output_dir": output,
             "logging_dir": output / "logs"}  # fmt: skip
    given = [word for name, path in paths.items() for word in (f"--{name}", str(path))]
    given += f"--output_name m --seed 3 --max_train_steps {END} --save_every_n_steps 10".split()
    given += ["--save_state_on_train_end", "--save_model_as", "safetensors"]
    return chosen[0], [*given, *chosen[1:]]


def train_row(row: Row, model: Path, folder: Path, meetings: Iterator[str] | None = None) -> None:
    """Train `row` in one go and in parts, into its folder inside `folder`."""
    from sd_train.build import run
    from sd_train.device import join_ranks
    from sd_train.entry import load_config

    place = folder / name_of(row)
    state: Path | None = None
    for part, until in (("whole", END), *((f"part{number}", stop) for number, stop in enumerate(STOPS))):
        command, words = words_of(row, model, folder, place / part)
        if state is not None:
            words += ["--resume", str(state)]
        if meetings is not None:
            join_ranks(next(meetings))
        run(load_config(command, words), until)
        state = None if part == "whole" else place / part / (f"m-step{until:08d}-state" if until < END else "m-state")


def train_all(path: str) -> None:
    """Train the rows that the file at `path` lists, as one of the processes that a launcher has started."""
    plan = json.loads(Path(path).read_text())
    folder = Path(path).parent
    meetings = (f"file://{folder}/meeting-{number}" for number in itertools.count())
    for row in plan["rows"]:
        train_row(tuple(row), Path(plan["model"]), folder, meetings)
        if os.environ["RANK"] == "0":
            print("trained", name_of(tuple(row)), flush=True)


def launch_words(rows: Iterable[Row], model: Path, folder: Path, port: int) -> list[str]:
    """The command that trains `rows` with two processes, all in one start."""
    (folder / "rows.json").write_text(json.dumps({"rows": list(rows), "model": str(model)}))
    (folder / "two_processes.py").write_text(SCRIPT)
    # Not --cpu: with it accelerate starts a single process, whatever --num_processes says.
    launch = f"-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port {port}"
    launch += " --mixed_precision no --dynamo_backend no"
    return [sys.executable, *launch.split(), str(folder / "two_processes.py"), str(folder / "rows.json")]


def check_row(row: Row, folder: Path) -> list[str]:
    """What the parts of a trained row leave differently from the whole; its folder is then deleted."""
    place = folder / name_of(row)
    whole, parts = place / "whole", [place / f"part{number}" for number in range(len(STOPS))]
    found = [*_file_differences(whole, parts), *_curve_differences(whole, parts)]
    shutil.rmtree(place)
    return found


def _file_differences(whole: Path, parts: Sequence[Path]) -> list[str]:
    from safetensors.torch import load_file

    from sd_train.commands.verify_resume import first_difference, tensor_difference

    ours = {path.name: path for path in whole.glob("*.safetensors")}
    theirs = {path.name: path for part in parts for path in part.glob("*.safetensors")}
    stopped = {name for name in theirs if any(f"step{stop:08d}" in name for stop in STOPS[:-1])}
    if ours.keys() != theirs.keys() - stopped or not stopped:
        return [f"files: {sorted(ours)} and {sorted(theirs)}"]
    found = []
    for name, path in ours.items():
        first, second = load_file(path), load_file(theirs[name])
        if first.keys() != second.keys():
            found.append(f"{name}: other tensors")
        found += [f"{name}: {key} {text}" for key in first.keys() & second.keys()
                  if (text := tensor_difference(first[key], second[key]))][:1]  # fmt: skip
        if _metadata(path, "ss_training_started_at") != _metadata(theirs[name], "ss_training_started_at"):
            found.append(f"{name}: other metadata")
    # Session and beginning are those of the first part.
    begun = [_metadata(parts[0] / name).get("ss_training_started_at") for name in stopped if (parts[0] / name).exists()]
    if {_metadata(path).get("ss_training_started_at") for path in theirs.values()} != set(begun):
        found.append("ss_training_started_at changes")
    difference = first_difference(whole / "m-state", parts[-1] / "m-state")
    return found if difference is None else [*found, difference]


def _metadata(path: Path, *aside: str) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        found: dict[str, str] = file.metadata() or {}
    clocks = ("ss_training_finished_at", "modelspec.date", *aside)
    return {name: value for name, value in found.items() if name not in clocks}


def _curve_differences(whole: Path, parts: Sequence[Path]) -> list[str]:
    """The parts' curves, one after the other, against the whole's."""
    ours, theirs = curves(whole / "logs"), dict[str, list[tuple[int, float]]]()
    for part in parts:
        for tag, points in curves(part / "logs").items():
            theirs.setdefault(tag, []).extend(points)
    return [
        f"curve {tag}: {ours.get(tag)} and {theirs.get(tag)}"
        for tag in sorted(ours.keys() | theirs.keys())
        if repr(ours.get(tag)) != repr(theirs.get(tag)) and tag != "samples_per_second"
    ]


def curves(log_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Every curve of the only TensorBoard log below `log_dir`: (step, value) in order."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = {path.parent for path in log_dir.rglob("events.out.tfevents.*")}
    log = EventAccumulator(str(events), size_guidance={"scalars": 0, "images": 0})
    log.Reload()
    return {tag: [(point.step, point.value) for point in log.Scalars(tag)] for tag in log.Tags()["scalars"]}
