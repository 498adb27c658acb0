"""Models by hub id (`owner/name`): from the local cache, and from the network only if they are not there."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sd_train.errors import ModelError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

_WEIGHTS = re.compile(
    r"(?:(?P<folder>[\w.-]+)/)?(?:diffusion_pytorch_|pytorch_)?model(?P<half>\.fp16)?(?:-\d+-of-\d+)?(?P<behind>\.fp16)?"
    r"\.(?P<end>safetensors|bin)(?:\.index(?P<index>\.fp16)?\.json)?"
)
_NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2", None)
_SMALL = re.compile(
    r"(?:model_index\.json|config\.json|(?:unet|vae|text_encoder|text_encoder_2)/config\.json"
    r"|scheduler/scheduler_config\.json|tokenizer(?:_2)?/[\w.-]+\.(?:json|txt))"
)


@dataclass(frozen=True)
class Wanted:
    """What a program needs of a repository."""

    kind: str
    """What it is, for messages."""
    give: str
    """What may be given in its place."""
    choose: Callable[[Sequence[str]], list[str]]
    """Of the files of a repository, those that are needed; none where it is no such repository."""
    is_whole: Callable[[Path], bool]
    """Whether a cached folder has them all: other programs download parts only."""


def find_model(source: str, allow_network: bool = True, wanted: Wanted | None = None, anew: bool = False) -> Path:
    """Where the model `source` is: the path itself, or the cached folder of a hub id.

    The network is only used for a hub id that is not in the cache, and only if `allow_network`. `wanted` says what is
    looked for, by default a diffusers model; `anew`: a hub id is downloaded even if it is in the cache.

    Raises:
        ModelError: if there is nothing.
    """
    wanted = wanted or DIFFUSERS
    # Not Path.exists: that raises for names that are too long.
    if os.path.exists(source):
        return Path(source)
    if not _ID.fullmatch(source) or Path(source).suffix in (".safetensors", ".ckpt", ".pt", ".pth", ".bin"):
        raise ModelError(
            f"{source}: there is no such file or folder (current folder: {Path.cwd()}); give {wanted.give}"
        )
    found = None if anew else _cached(source, wanted)
    return found or _downloaded(source, allow_network, wanted, anew)


def _cached(name: str, wanted: Wanted) -> Path | None:
    """The newest whole snapshot of `name` in the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError):
        return None
    return folder if wanted.is_whole(folder) else None


def _is_whole(folder: Path) -> bool:
    """Whether a snapshot has weights for each network; other programs download parts only."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    networks = {name.split("/")[0] for name in names if name.endswith("/config.json")} & set(filter(None, _NETWORKS))
    if not networks:
        return "config.json" in names and any(_WEIGHTS.fullmatch(name) for name in names)
    with_weights = {found["folder"] for name in names if (found := _WEIGHTS.fullmatch(name))}
    return {"unet", "vae"} <= networks and networks <= with_weights


def wanted_files(names: Sequence[str]) -> list[str]:
    """Of the files of a repository, those that a model consists of.

    For each network one set of weights: safetensors before pickles, full precision before half.
    """
    chosen = [name for name in names if _SMALL.fullmatch(name)]
    for network in _NETWORKS:
        found = [(name, match) for name in names if (match := _WEIGHTS.fullmatch(name)) and match["folder"] == network]
        for end in ("safetensors", "bin"):
            for half in (False, True):
                group = [
                    name
                    for name, match in found
                    if match["end"] == end and half == bool(match["half"] or match["behind"] or match["index"])
                ]
                if group:
                    chosen += group
                    break
            else:
                continue
            break
    return chosen


DIFFUSERS = Wanted(
    kind="diffusers model",
    give="a .safetensors or .ckpt file, a diffusers folder or a hub id (owner/name)",
    choose=wanted_files,
    is_whole=_is_whole,
)


def _downloaded(name: str, allow_network: bool, wanted: Wanted, anew: bool) -> Path:
    way_out = (
        f"download it on a machine with a network (hf download {name}) and copy the folder here, or give a local file "
        "or folder"
    )
    absent = f"{name}: there is no such file or folder, it is not in the hub's cache either"
    if not allow_network:
        raise ModelError(f"{absent}, and this command does not use the network; {way_out}")
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    if constants.is_offline_mode():
        raise ModelError(f"{absent}, and the network is switched off (HF_HUB_OFFLINE); {way_out}")
    # Releases of the hub's library use different HTTP libraries, and their own error is one of that library's.
    unreachable = tuple(
        kind for kind in HfHubHTTPError.__mro__ if issubclass(kind, Exception) and kind is not Exception
    )
    try:
        files = [sibling.rfilename for sibling in HfApi().model_info(name).siblings or []]
        if not (chosen := wanted.choose(files)):
            raise ModelError(f"{name}: the hub's repository holds no {wanted.kind}; {way_out}")
        return Path(snapshot_download(name, allow_patterns=chosen, force_download=anew))
    except RepositoryNotFoundError:
        raise ModelError(
            f"{name}: there is no such file or folder, and no such model on the hub (or it needs a login: "
            "hf auth login); check the spelling"
        ) from None
    except unreachable as problem:
        reason = (str(problem) or type(problem).__name__).splitlines()[0]
        raise ModelError(f"{absent}, and the hub cannot be reached ({reason}); {way_out}") from None
