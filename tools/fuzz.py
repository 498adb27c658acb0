"""Files that want in: safetensors with lying headers, states, metadata and prompts with anything in them, by the seed.

`python tools/fuzz.py --count 20000 --seed 1` reads so many of each kind as model, LoRA, embedding, cache and state, and
as a model's configuration, and prints how many were refused in words and how many were harmless. Anything else, a
traceback or a hang, ends it with the seed and the number that bring it back. `tests/test_no_way_in.py` runs the same
for a moment.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from sd_train.errors import UserError  # noqa: E402

Header = dict[str, Any]
Read = Callable[[Path], None]

HOSTILE_TEXTS = (
    "", ".", "..", "../../../etc/passwd", "/etc/passwd", "..\\..\\windows", "C:\\x", "\\\\host\\share", "a\0b", "\0",
    "\x1b[2J\x1b]0;owned\x07", "\x9b31m", "a\rb", "\u202egnp.exe", "\ud800", "x" * 5000, "\ufeff", "con", "nul.txt",
    "%s%n{0}{x}", "$(touch owned)", "`id`", "<script>", "\x7f", "\n\nerror: forged", "~/x", "-rf", "--help",
)  # fmt: skip
HOSTILE_NUMBERS: tuple[Any, ...] = (
    -1, -(2**63), 2**31, 2**62, 2**63, 2**64 - 1, 2**64, 10**30, 0.0, 1.5, 1e308, True, None, "4", [], {}, [4], "\x1b",
)  # fmt: skip


def split(content: bytes) -> tuple[Header, bytes]:
    """The header of a whole safetensors file and what stands behind it."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: object, body: bytes) -> bytes:
    """A file with any JSON as its header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def _one(rng: random.Random, header: Header) -> Any:
    return header[rng.choice([name for name in header if name != "__metadata__"])]


def _length(rng: random.Random, header: Header, body: bytes) -> bytes:
    content = joined(header, body)
    wrong = (0, 1, 7, len(content), len(content) - 8, len(content) + 1, 10**8, 10**8 + 1, 2**31, 2**63, 2**64 - 1)
    return rng.choice(wrong).to_bytes(8, "little") + content[8:]


def _cut(rng: random.Random, header: Header, body: bytes) -> bytes:
    content = joined(header, body)
    return content[: rng.choice((0, 1, 8, 9, rng.randrange(len(content)), len(content) - 1))]


def _offsets(rng: random.Random, header: Header, body: bytes) -> bytes:
    entry = _one(rng, header)
    first, last = entry["data_offsets"]
    entry["data_offsets"] = rng.choice([
        [last, first], [-8, last - first - 8], [first - 1, last - 1], [first, last + 1], [first], [first, last, last],
        [first + 2**63, last + 2**63], [float(first), float(last)], [len(body), len(body) + last - first],
        [rng.choice(HOSTILE_NUMBERS), last], [first, rng.choice(HOSTILE_NUMBERS)], rng.choice(HOSTILE_NUMBERS),
    ])  # fmt: skip
    return joined(header, body)


def _overlap(rng: random.Random, header: Header, body: bytes) -> bytes:
    entry = _one(rng, header)
    copies = {f"copy.{number}": dict(entry) for number in range(rng.choice((1, 2, 500)))}
    return joined(copies | header if rng.random() < 0.5 else header | copies, body)


def _shape(rng: random.Random, header: Header, body: bytes) -> bytes:
    entry = _one(rng, header)
    entry["shape"] = rng.choice([
        [-number for number in entry["shape"]], [-1, *entry["shape"], -1], [0, 2**70], [2**32, 2**32], [2**62, 4], [-4],
        [*entry["shape"], rng.choice(HOSTILE_NUMBERS)], rng.choice(HOSTILE_NUMBERS), [[1]], [1] * 5000,
    ])  # fmt: skip
    if rng.random() < 0.3:
        entry["data_offsets"] = rng.choice(([0, 0], [8, 0], [0, 2**63], entry["data_offsets"]))
    return joined(header, body)


def _reshaped(rng: random.Random, header: Header, body: bytes) -> bytes:
    """A file that is whole, with tensors of other shapes than their names promise."""
    for entry in rng.sample(list(header.values()), min(3, len(header))):
        if "shape" in entry:
            count = 1
            for number in entry["shape"]:
                count *= number
            entry["shape"] = rng.choice(([count], [1, count], [count, 1], [count, 1, 1, 1], entry["shape"][::-1]))
            if rng.random() < 0.3:
                entry["shape"], entry["data_offsets"] = rng.choice(([0], [4, 0])), [0, 0]
    return joined(header, body)


def _dtype(rng: random.Random, header: Header, body: bytes) -> bytes:
    _one(rng, header)["dtype"] = rng.choice((*HOSTILE_TEXTS, *HOSTILE_NUMBERS, "F4", "U64", "C64", "f32", "BOOL"))
    return joined(header, body)


def _renamed(rng: random.Random, header: Header, body: bytes) -> bytes:
    name = rng.choice([name for name in header if name != "__metadata__"])
    other = rng.choice((*HOSTILE_TEXTS, name + rng.choice(HOSTILE_TEXTS), rng.choice(HOSTILE_TEXTS) + name))
    return joined({other if key == name else key: value for key, value in header.items()}, body)


def _metadata(rng: random.Random, header: Header, body: bytes) -> bytes:
    known = ["ss_output_name", "ss_network_args", "ss_network_dim", "ss_base_model_version", "modelspec.architecture",
             "ss_token_string", "shared", "layout", "format", "lora_adapter_metadata", "sd_train_alphas", "digest",
             "modelspec.title", "modelspec.prediction_type", "ss_xti", "ss_num_vectors_per_token",
             "sd_train.config"]  # fmt: skip
    values = (
        *HOSTILE_TEXTS, *HOSTILE_NUMBERS, "{", "[" * 100_000, '{"a": ' * 30_000, "NaN", '{"lora_alpha": "x"}', "[[1]]",
        '{"x": "y"}', '{"unet": {"in_channels": 4}}',
        '{"lora_alpha": NaN, "alpha_pattern": {"(": 1}}', '{"lora_alpha": 1, "alpha_pattern": 3}',
    )  # fmt: skip
    table: Any = {rng.choice((*known, *HOSTILE_TEXTS)): rng.choice(values) for _ in range(rng.randrange(1, 8))}
    header["__metadata__"] = rng.choice((table, table, table, table, rng.choice(HOSTILE_NUMBERS)))
    return joined(header, body)


def _text(rng: random.Random, header: Header, body: bytes) -> bytes:
    """A header that is not the JSON of a table."""
    text = json.dumps(header).encode()
    place = rng.randrange(len(text))
    return joined(rng.choice([
        b"[" * 200_000, b'{"a":' * 100_000, b"", b"null", b"[]", b"3", b'"x"', b"NaN", b'{"a": NaN}', b'{"a": 1e999}',
        b"\xff\xfe" + text, text[:place] + b"\xff" + text[place:], text[:-1] + b"," + text[1:], text + text,
        text[:place], b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}', b'{"a": ' + b"9" * 5000,
        json.dumps(header).encode("utf-16"), text[: place // 2] + text[place:],
    ]), body)  # fmt: skip


def _bits(rng: random.Random, header: Header, body: bytes) -> bytes:
    content = bytearray(joined(header, body))
    length = int.from_bytes(content[:8], "little")
    for _ in range(rng.choice((1, 2, 20))):
        content[rng.randrange(8 + length)] ^= 1 << rng.randrange(8)
    return bytes(content)


def _foreign(rng: random.Random, header: Header, body: bytes) -> bytes:
    return rng.choice((
        b"", b"\x80\x04\x95", b"PK\x03\x04" + bytes(60), b"<!DOCTYPE html>", bytes(100), b"\xff" * 100,
        rng.randbytes(rng.randrange(300)), b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
    ))  # fmt: skip


LIES: Mapping[str, Callable[[random.Random, Header, bytes], bytes]] = {
    "length": _length, "cut": _cut, "offsets": _offsets, "overlap": _overlap, "shape": _shape, "reshaped": _reshaped,
    "dtype": _dtype, "name": _renamed, "metadata": _metadata, "text": _text, "bits": _bits, "foreign": _foreign,
}  # fmt: skip


def lies(whole: bytes, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """`count` files made of `whole`, a safetensors file; each kind in turn, the rest by `seed`."""
    kinds = list(LIES)
    text = json.dumps(split(whole)[0])
    body = split(whole)[1]
    for number in range(count):
        kind = kinds[number % len(kinds)]
        yield kind, LIES[kind](random.Random(f"{seed} {number}"), json.loads(text), body)


def hostile_json(whole: object, rng: random.Random) -> object:
    """`whole` with one of its values, or one of its names, replaced."""
    copy = json.loads(json.dumps(whole))
    place, inner = None, copy
    while isinstance(inner, dict | list) and inner and (place is None or rng.random() < 0.7):
        key = rng.choice(list(inner)) if isinstance(inner, dict) else rng.randrange(len(inner))
        place, inner = (inner, key), inner[key]
    if place is None:
        return rng.choice(HOSTILE_NUMBERS)
    table, key = place
    if isinstance(table, dict) and rng.random() < 0.3:
        table[rng.choice(HOSTILE_TEXTS)] = table.pop(key)
    else:
        table[key] = rng.choice((*HOSTILE_NUMBERS, *HOSTILE_TEXTS))
    return copy


def outcomes(read: Read, path: Path, files: Iterator[tuple[str, bytes]]) -> Counter[str]:
    """How `read` took each of `files`, written to `path` one after another: "refused" or "harmless".

    Raises:
        AssertionError: at the first that is neither; `path` then holds it.
    """
    found: Counter[str] = Counter()
    for number, (kind, content) in enumerate(files):
        path.write_bytes(content)
        try:
            read(path)
        except UserError as problem:
            if problem.exit_code not in (2, 3) or str(path) not in str(problem):
                raise AssertionError(f"{kind} {number}: exit code {problem.exit_code}: {problem}") from problem
            found["refused"] += 1
        except Exception as problem:
            raise AssertionError(f"{kind} {number}: {type(problem).__name__}: {problem}") from problem
        else:
            found["harmless"] += 1
    return found


def read_tensors(path: Path) -> None:
    """The file as any table; its tensors take no more memory than it has bytes."""
    from sd_train.families.sources import SafetensorsSource, read_all

    tensors = read_all(SafetensorsSource.open([path]))
    assert sum(tensor.nbytes for tensor in tensors.values()) <= path.stat().st_size


def read_lora(path: Path) -> None:
    """The file as a LoRA: what `lora check` says of it, and every module's change."""
    from sd_train.lora_files.adapter import delta
    from sd_train.lora_files.checking import check
    from sd_train.lora_files.reading import open_lora

    lora = open_lora(path)
    check(lora)
    for adapter in lora.adapters():
        try:
            delta(adapter)
        except UserError as problem:
            raise UserError(f"{path}: {problem}") from None


def read_embedding_file(path: Path) -> None:
    """The file as a textual inversion."""
    from sd_train.families.embeddings import read_embedding

    read_embedding(path)


def read_state_table(path: Path) -> None:
    """The file as a table of a state."""
    from sd_train.state_files import read_table

    read_table(path)


def read_shard(path: Path) -> None:
    """The file as one of a cache: damaged ones are told of and never read."""
    from sd_train.data.store import RowStore

    store = RowStore(path.parent)
    if path in store.damaged:
        raise UserError(f"{path}: {store.damaged[path]}")
    store.check(store.locate([bytes(16)]))


def read_base_model(path: Path) -> None:
    """The file as the model to train, up to where its networks are built."""
    from sd_train.families.parts import ModelRequest, read_model

    read_model(ModelRequest(str(path), allow_network=False))


READERS: Mapping[str, Read] = {
    "tensors": read_tensors, "lora": read_lora, "embedding": read_embedding_file, "state": read_state_table,
    "cache": read_shard, "model": read_base_model,
}  # fmt: skip


def configs(count: int, seed: int, folder: Path) -> Counter[str]:
    """How a model, made in `folder`, is read with `count` configurations that say anything.

    One after another in diffusers' folder, and what a single file notes of them in its metadata.

    Raises:
        AssertionError: at the first that is neither refused nor harmless.
    """
    from sd_train.demo.tiny_model import make_tiny_parts
    from sd_train.families.parts import CONFIG_ENTRY, TOLD_BY_NOTHING
    from sd_train.families.saving import save_model

    model = folder / "model"
    save_model(model, make_tiny_parts("sd1", 0), "diffusers_safetensors")
    files = [model / "scheduler" / "scheduler_config.json"]
    files += [model / part / "config.json" for part in ("unet", "vae", "text_encoder")]
    single = folder / "model.safetensors"
    parts = make_tiny_parts("sd1", 0)
    save_model(single, parts, "safetensors")
    header, body = split(single.read_bytes())
    noted: Header = {"scheduler": parts.scheduler}
    for role, part in parts.parts.items():
        fields = TOLD_BY_NOTHING["text" if role == "text_encoder" else role]
        noted[role] = {name: part.config[name] for name in fields if name in part.config}
    found: Counter[str] = Counter()
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        if number % (len(files) + 1) == len(files):
            changed = json.dumps(hostile_json(noted, rng))
            header["__metadata__"][CONFIG_ENTRY] = changed
            single.write_bytes(joined(header, body))
            _read_config(single, changed, number, found)
            continue
        file = files[number % (len(files) + 1)]
        whole = file.read_text(encoding="utf-8")
        changed = json.dumps(hostile_json(json.loads(whole), rng))
        file.write_text(changed, encoding="utf-8")
        _read_config(model, changed, number, found)
        file.write_text(whole, encoding="utf-8")
    return found


def _read_config(model: Path, changed: str, number: int, found: Counter[str]) -> None:
    """Load `model`, of which one configuration is `changed`, and count how that ends."""
    from sd_train.families.parts import ModelRequest
    from sd_train.families.registry import load_family

    try:
        load_family(ModelRequest(str(model), allow_network=False))
    except UserError:
        found["refused"] += 1
    except Exception as problem:
        said = f"{model.name} {number}: {type(problem).__name__}: {problem}"
        raise AssertionError(f"{said}\n{changed[:2000]}") from problem
    else:
        found["harmless"] += 1


def sample_files(folder: Path) -> dict[str, bytes]:
    """A small whole file of each kind, by the name of its reader."""
    import torch
    from safetensors.torch import save

    from sd_train.demo.tiny_model import make_tiny_parts
    from sd_train.families.saving import save_model

    def tensor(*shape: int) -> torch.Tensor:
        return torch.zeros(shape)

    module = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_"
    lora: dict[str, torch.Tensor] = {}
    for name in "qkv":
        lora |= {f"{module}{name}.lora_down.weight": tensor(2, 8), f"{module}{name}.lora_up.weight": tensor(8, 2),
                 f"{module}{name}.alpha": torch.tensor(2.0)}  # fmt: skip
    kinds = {"tensors": {"a": tensor(2, 3), "b": tensor(4), "c": tensor()}, "lora": lora,
             "embedding": {"clip_l": tensor(2, 8), "clip_g": tensor(2, 12)},
             "state": {"state/w/exp_avg": tensor(2, 2), "state/w/step": tensor()}}
    files = {name: save(table, {"format": "pt", "ss_output_name": "x"}) for name, table in kinds.items()}
    save_model(folder / "whole.safetensors", make_tiny_parts("sd1", 0), "safetensors", torch.float16)
    return files | {"cache": _shard(folder / "cache"), "model": (folder / "whole.safetensors").read_bytes()}


def _shard(folder: Path) -> bytes:
    import numpy as np

    from sd_train.data.shards import layout_of, write_shard

    layout, row_bytes = layout_of([("mean", "float32", (4, 8, 8), 1024)])
    folder.mkdir()
    keys = np.frombuffer(bytes(16) + b"k" * 16, "S16")
    return write_shard(folder, layout, keys, [np.zeros((2, row_bytes), np.uint8)]).read_bytes()


def main(argv: list[str] | None = None) -> int:
    """Read hostile files and print the counts; 1 where one of them was neither refused nor harmless."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="files for each reader (default 2000)")
    parser.add_argument("--seed", type=int, default=0, help="what they are made by (default 0)")
    parser.add_argument("--reader", choices=(*READERS, "config"), help="this one alone")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        wholes = sample_files(folder)
        for name in [options.reader] if options.reader else [*READERS, "config"]:
            place = folder / name
            place.mkdir(exist_ok=True)
            for old in place.iterdir():
                old.unlink()
            try:
                if name == "config":
                    found = configs(options.count, options.seed, place)
                else:
                    files = lies(wholes[name], options.count, options.seed)
                    found = outcomes(READERS[name], place / "x.safetensors", files)
            except AssertionError as problem:
                print(f"{name}, seed {options.seed}: {problem}")
                return 1
            print(f"{name}: {found['refused']} refused, {found['harmless']} harmless")
    return 0


if __name__ == "__main__":
    sys.exit(main())
