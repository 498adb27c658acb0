"""Files that appear whole or not at all, their hashes and names, and sealed states."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd_train.checkpoint import Intervals
from sd_train.errors import ConfigError, DataError, ModelError, RunError, UserError
from sd_train.families.streaming import write_network, write_tensors
from sd_train.files import sha256, write_folder, write_text, write_whole
from sd_train.names import FileNames, step_of
from sd_train.optim.optimizers import make_optimizer
from sd_train.state import (
    MANIFEST,
    StateParts,
    load_state,
    optimizer_state,
    read_manifest,
    read_progress,
    save_state,
)
from sd_train.state_choice import find_state
from sd_train.trainables.lora import Lora, LoraSettings
from sd_train.types import Progress
from tests.models import assert_equal_tensors, fresh_tiny

posix = pytest.mark.skipif(os.name != "posix", reason="permission bits")


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


# Files


def test_other_forms_of_the_same_name_are_an_earlier_runs(tmp_path: Path) -> None:
    names = FileNames(tmp_path, "cat")
    for file in ("cat.ckpt", "cat-ema.pt", "cat-step00000010.safetensors", "cat.txt", "dog.ckpt"):
        (tmp_path / file).write_bytes(b"")
    for folder in ("cat", "cat-000001", "cat-000002"):
        (tmp_path / folder).mkdir()
    (tmp_path / "cat" / "model_index.json").write_text("{}")
    (tmp_path / "cat-000001" / "photo.jpg").write_bytes(b"")
    kept = ["cat-000001", "cat-000002", "cat.txt", "dog.ckpt"]
    left = ["cat", "cat-ema.pt", "cat-step00000010.safetensors", "cat.ckpt"]
    assert [path.name for path in names.existing()] == left
    assert [path.name for path in names.replaced()] == ["cat-step00000010.safetensors"]
    assert [path.name for path in FileNames(tmp_path, "cat", "").foreign()] == ["cat-000001"]
    names.remove_existing()
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


@pytest.mark.parametrize("error", [OSError("disk full"), ValueError("broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("exists", [True, False])
def test_a_failing_writer_leaves_what_was_there(error: BaseException, exists: bool, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "model.safetensors"
    if exists:
        write_text(path, "old")

    def write(temporary: Path) -> None:
        assert temporary.parent == path.parent
        temporary.write_text("half")
        raise error

    with pytest.raises(RunError if isinstance(error, OSError) else type(error)) as caught:
        write_whole(path, write)
    if isinstance(error, OSError):
        assert f"{path}: cannot be written (disk full)" in str(caught.value)
    assert [file.read_text() for file in path.parent.iterdir()] == (["old"] if exists else [])


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old\r\n")
    assert path.read_bytes() == b"old\r\n"

    def write(temporary: Path) -> None:
        temporary.write_text("new")
        assert path.read_text() == "old\n"

    write_whole(path, write)
    assert path.read_text() == "new"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@posix
def test_files_have_the_umasks_permissions(umask: int, tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
    write_text(tmp_path / "b.txt", "x")
    write_network(tmp_path / "c.safetensors", {"x": torch.zeros(2)}, {})
    write_folder(tmp_path / "d", lambda folder: save_file({"x": torch.zeros(2)}, folder / "x.safetensors"))
    files = [*tmp_path.glob("*.*"), tmp_path / "d" / "x.safetensors"]
    assert len(files) == 4
    assert {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~umask}
    assert (tmp_path / "d").stat().st_mode & 0o777 == 0o777 & ~umask


@posix
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_an_error(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    with pytest.raises(RunError, match="--output_dir"):
        write_text(closed / "file", "x")


def test_a_path_below_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    below = tmp_path / "file" / "y"
    for write in (lambda: write_text(below, "x"), lambda: write_folder(below, lambda folder: None)):
        with pytest.raises(RunError, match=r"cannot be made .* choose another --output_dir"):
            write()


def test_tensors_may_be_views(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4).requires_grad_()
    tensors = {"whole": base, "turned": base.t(), "part": base[1:, :2], "bf16": base.to(torch.bfloat16)}
    write_tensors(tmp_path / "x.safetensors", tensors, {"format": "pt"})
    assert_equal_tensors(load_file(tmp_path / "x.safetensors"), {n: t.detach() for n, t in tensors.items()})


# Hashes


def hashes(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        found: dict[str, str] = file.metadata()
        return found


def test_the_model_hash_is_what_the_files_bytes_give(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    tensors = {"b.alpha": torch.tensor(2.0), "a.lora_up.weight": torch.randn(3, 4), "c": torch.ones(3).half()}
    write_network(path, tensors, {"ss_seed": "1", "modelspec.title": "T"})
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    found = hashes(path)
    assert found["sshs_model_hash"] == hashlib.sha256(content[start:]).hexdigest() == sha256(path, start)
    # SHA-256 of nothing: the file ends before the part that is hashed.
    assert found["sshs_legacy_hash"] == "e3b0c442"
    assert found["modelspec.title"] == "T"
    assert sha256(path) == hashlib.sha256(content).hexdigest()
    other = tmp_path / "other.safetensors"
    write_network(other, tensors, {"ss_seed": "2"})
    assert hashes(other)["sshs_model_hash"] == found["sshs_model_hash"]


def test_the_legacy_hash_follows_sd_scripts(tmp_path: Path) -> None:
    tensors = {"x": torch.arange(300_000, dtype=torch.float32), "y": torch.ones(7)}
    path, plain = tmp_path / "lora.safetensors", tmp_path / "plain.safetensors"
    write_network(path, tensors, {"ss_seed": "1", "modelspec.title": "not hashed", "sshs_old": "x"})
    # Its rule: the file as it would be with the ss_ entries alone, 64 KiB from 1 MiB on.
    save_file(tensors, plain, {"ss_seed": "1"})
    with plain.open("rb") as file:
        file.seek(0x100000)
        expected = hashlib.sha256(file.read(0x10000)).hexdigest()[:8]
    assert plain.stat().st_size > 0x110000
    assert hashes(path)["sshs_legacy_hash"] == expected != "e3b0c442"


# Folders


def test_folders_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "state"
    write_folder(path, lambda folder: (folder / "first").write_text("1") and None)
    write_folder(path, lambda folder: (folder / "second").write_text("2") and None)
    assert [file.name for file in path.iterdir()] == ["second"]

    def fail(folder: Path) -> None:
        (folder / "third").write_text("3")
        raise OSError("disk full")

    with pytest.raises(RunError, match=r"disk full.*free space"):
        write_folder(path, fail)
    assert [file.name for file in path.iterdir()] == ["second"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["state"]


# Names


@pytest.mark.parametrize(
    ("name", "step", "epoch", "last"),
    [
        ("cat", "cat-step00000120", "cat-000003", "cat"),
        (None, "at-step00000120", "epoch-000003", "last"),
        ("a+b (1)", "a+b (1)-step00000120", "a+b (1)-000003", "a+b (1)"),
    ],
)
def test_names_are_sd_scripts(name: str | None, step: str, epoch: str, last: str, tmp_path: Path) -> None:
    names = FileNames(tmp_path / "out", name)
    assert (names.at_step(120), names.at_epoch(3), names.last) == (step, epoch, last)
    assert names.model(step) == tmp_path / "out" / f"{step}.safetensors"
    assert names.state(step) == tmp_path / "out" / f"{step}-state"
    assert names.existing() == []
    names.folder.mkdir()
    ours = [names.model(stem) for stem in (step, epoch, last)] + [names.state(stem) for stem in (step, epoch, last)]
    others = ["dog.safetensors", f"{last}x.safetensors", f"{last}.txt", f"{last}-step12.safetensors", "sample", ".tmp"]
    for path in (*ours, *(names.folder / other for other in others)):
        path.mkdir()
    assert names.existing() == sorted(ours)


def test_intervals() -> None:
    names = FileNames(Path("out"), "n")
    intervals = Intervals(4, 2, state=False, state_at_end=False)

    def stems(step: int, epoch: int, index: int) -> list[str]:
        due = intervals.due(Progress(1, 2, 0.0, step=step, epoch=epoch, index=index), end_epoch=6)
        assert [names.moment(names.model(names.stem(moment))) for moment in due] == due
        return [names.stem(moment) for moment in due]

    assert stems(4, 0, 4) == ["n-step00000004"]
    assert stems(5, 0, 5) == []
    assert stems(12, 2, 0) == ["n-step00000012", "n-000002"]
    assert stems(13, 3, 0) == []
    # The last epoch is the final file.
    assert stems(30, 6, 0) == []
    nothing = Intervals(None, None, state=False, state_at_end=False)
    assert nothing.due(Progress(1, 2, 0.0, step=4, epoch=2, index=0), 6) == []


# States


Make = Callable[..., StateParts]


@pytest.fixture(scope="module")
def make_parts() -> Make:
    family = fresh_tiny()

    def make(*, rank: int = 1, rates: dict[str, float] | None = None, optimizer: str = "adamw") -> StateParts:
        lora = Lora(LoraSettings(rank, 1.0, 0.0, rates or {"text_encoder": 1e-3}, seed=1))
        lora.install(family)
        groups = lora.groups()
        made = make_optimizer(optimizer, [{"params": list(g.params.values()), "lr": g.lr} for g in groups], {})
        return StateParts(lora, groups, made, {"counter": (lambda: {"n": 5}, seen.append)}, 'seed = 1\n', "b" * 64)

    return make


seen: list[dict[str, int]] = []


def train(parts: StateParts, steps: int) -> None:
    for step in range(steps):
        for group in parts.groups:
            for place, parameter in enumerate(group.params.values()):
                parameter.grad = torch.full_like(parameter, (-1) ** place / (step + 2))
        parts.optimizer.step()


PROGRESS = Progress(
    seed=2**40 + 1, session_id=7, started_at=1e9 + 0.123456, step=6, epoch=1, index=2, samples=23, extra={"a": [1.5]}
)


def test_a_state_continues_bit_for_bit(make_parts: Make, tmp_path: Path) -> None:
    first, second = make_parts(), make_parts()
    train(first, 3)
    save_state(tmp_path / "s", PROGRESS, first)
    seen.clear()
    resumed = load_state(tmp_path / "s", second)
    assert resumed.progress == PROGRESS == read_progress(tmp_path / "s")
    assert resumed.config_text == "seed = 1\n"
    assert seen == [{"n": 5}]
    for parts in (first, second):
        train(parts, 4)
    assert_equal_tensors(first.trainable.tensors(), second.trainable.tensors())
    assert_equal_tensors(optimizer_state(first)[0], optimizer_state(second)[0])
    untrained: dict[str, Tensor] = make_parts().trainable.tensors()
    assert any(not torch.equal(tensor, untrained[name]) for name, tensor in first.trainable.tensors().items())


def test_a_state_is_sealed(make_parts: Make, tmp_path: Path) -> None:
    parts = make_parts()
    train(parts, 1)
    save_state(tmp_path / "s", PROGRESS, parts)
    manifest = read_manifest(tmp_path / "s")
    assert manifest["step"] == 6
    files = {file.name for file in (tmp_path / "s").iterdir()} - {MANIFEST}
    assert files == set(manifest["files"])
    assert files >= {"trainable.safetensors", "optimizer.safetensors", "progress.json", "config.toml"}


@pytest.mark.parametrize(
    ("change", "reason", "error"),
    [
        ({"rank": 2}, "--network_dim makes it", ModelError),
        ({"rates": {"unet": 1e-3}}, "does not train", DataError),
        ({"optimizer": "lion"}, "--optimizer_type = Lion", ConfigError),
    ],
    ids=["rank", "networks", "optimizer"],
)
def test_another_configuration_is_refused(
    change: dict[str, object], reason: str, error: type[UserError], make_parts: Make, tmp_path: Path
) -> None:
    parts = make_parts()
    train(parts, 1)
    save_state(tmp_path / "s", PROGRESS, parts)
    with pytest.raises(error, match=reason) as caught:
        load_state(tmp_path / "s", make_parts(**change))
    assert str(tmp_path / "s") in str(caught.value)


def test_another_base_model_is_refused(make_parts: Make, tmp_path: Path) -> None:
    parts = make_parts()
    save_state(tmp_path / "s", PROGRESS, parts)
    with pytest.raises(DataError, match=r"another base model.*b{12}.*c{12}"):
        load_state(tmp_path / "s", dataclasses.replace(parts, base_model="c" * 64))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def other_format(file: Path) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))


DAMAGE: dict[str, tuple[str, Callable[[Path], None]]] = {
    "flipped bit": ("optimizer.safetensors", flip),
    "flipped bit in the progress": ("progress.json", flip),
    "cut": ("trainable.safetensors", cut),
    "file gone": ("optimizer.json", Path.unlink),
    "manifest gone": (MANIFEST, Path.unlink),
    "manifest cut": (MANIFEST, cut),
    "manifest of something else": (MANIFEST, lambda file: file.write_text("[]") and None),
    "manifest without entries": (MANIFEST, lambda file: file.write_text('{"format": 1, "files": {"a": 3}}') and None),
    "manifest in another encoding": (MANIFEST, lambda file: file.write_bytes(b"\xff\xfe{}") and None),
    "other format": (MANIFEST, other_format),
}


@pytest.fixture(scope="module")
def two_states(make_parts: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("states")
    parts = make_parts()
    train(parts, 1)
    for step in (5, 10):
        save_state(folder / f"cat-step{step:08d}-state", dataclasses.replace(PROGRESS, step=step), parts)
    return folder


@pytest.mark.parametrize("kind", DAMAGE)
def test_latest_passes_over_a_damaged_state(kind: str, two_states: Path, make_parts: Make, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(two_states, folder)
    names = FileNames(folder, "cat")
    said: list[str] = []
    last, earlier = names.state("cat-step00000010"), names.state("cat-step00000005")
    assert find_state("latest", names, said.append) == last
    name, damage = DAMAGE[kind]
    damage(last / name)
    with pytest.raises(DataError, match="choose another state") as caught:
        load_state(last, make_parts())
    assert str(last) in str(caught.value)
    assert not said
    assert find_state("latest", names, said.append) == earlier
    assert len(said) == 1
    assert str(last) in said[0]
    with pytest.raises(DataError, match="the whole one before it") as named:
        find_state(str(last), names, said.append)
    assert str(named.value).endswith(f"--resume {earlier}")
    assert find_state(str(earlier), names, said.append) == earlier
    assert find_state("latest", FileNames(two_states, "cat"), said.append).name == last.name


def test_no_damage_to_the_manifest_passes_for_a_state(two_states: Path, tmp_path: Path) -> None:
    folder = tmp_path / "state"
    shutil.copytree(two_states / "cat-step00000010-state", folder)
    content = (folder / MANIFEST).read_bytes()
    whole = read_manifest(folder)
    damaged = 0
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 7
        (folder / MANIFEST).write_bytes(changed)
        try:
            found = read_manifest(folder)
        except DataError:
            damaged += 1
        else:
            # White space, the step or the base model, which is compared with the one that is loaded.
            assert found["files"] == whole["files"]
    assert damaged > 0.5 * len(content)


def test_the_last_state_is_found_whatever_the_clock_says(
    make_parts: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And whatever its update is: a run may go back and take another way."""
    names, parts = FileNames(tmp_path, "cat"), make_parts()
    for step, clock in ((20, 2e9), (5, 1e9), (10, 1.0)):
        monkeypatch.setattr("time.time", lambda clock=clock: clock)
        save_state(names.state(names.at_step(step)), dataclasses.replace(PROGRESS, step=step), parts)
        assert step_of(find_state("latest", names, lambda text: None)) == step
    # States of earlier versions have the clock alone, and came before those that have more.
    for step in (5, 10, 20):
        path = names.state(names.at_step(step)) / MANIFEST
        facts = json.loads(path.read_text())
        del facts["save"]
        path.write_text(json.dumps(facts))
    assert step_of(find_state("latest", names, lambda text: None)) == 20
    save_state(names.state(names.at_step(1)), PROGRESS, parts)
    assert step_of(find_state("latest", names, lambda text: None)) == 1


def test_a_state_on_a_failing_disk_is_passed_over(
    two_states: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, said = FileNames(two_states, "cat"), list[str]()
    last, real = names.state("cat-step00000010"), sha256

    def failing(path: Path, offset: int = 0) -> str:
        if path.parent == last:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, offset)

    monkeypatch.setattr("sd_train.state.sha256", failing)
    assert find_state("latest", names, said.append) == names.state("cat-step00000005")
    assert "cannot be read (Input/output error)" in said[0]


def test_states_that_are_not_there(two_states: Path, tmp_path: Path) -> None:
    said: list[str] = []
    for names in (FileNames(two_states, "dog"), FileNames(tmp_path / "none", "cat")):
        with pytest.raises(ConfigError, match=r"--resume = 'latest': .*holds no sealed state") as caught:
            find_state("latest", names, said.append)
        assert str(names.folder) in str(caught.value)
    with pytest.raises(ConfigError, match="there is no such state folder"):
        find_state(str(tmp_path / "gone"), FileNames(two_states, "cat"), said.append)
