"""`--vae`: an autoencoder from a file of its own, a folder or a whole model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sd_train.errors import ModelError
from sd_train.families.folders import read_vae_folder
from sd_train.families.hub import find_model
from sd_train.families.keys import VAE_PREFIX
from sd_train.families.keys_original import current_vae_name, to_original, vae_pairs
from sd_train.families.published import FamilyName
from sd_train.families.recognise import NotRecognisedError, vae_part
from sd_train.families.sources import Derived, Part, RenamedSource, TensorSource, open_file, under


def read_vae(source: str, family: FamilyName, model: Mapping[str, Any], allow_network: bool) -> Part:
    """The autoencoder at `source`, in place of one of a model of `family`, whose configuration is `model`.

    The latents' scale stays that of the model: its U-Net was trained with it.

    Raises:
        ModelError: if there is none, it is not whole, or it makes latents of another size.
    """
    try:
        path = find_model(source, allow_network)
        part = _of_folder(path) if path.is_dir() else _of_file(path, family)
    except ModelError as problem:
        lines = (line.removeprefix(f"{source}: ") for line in problem.problems)
        raise ModelError(*(f"--vae = {source}: {line}" for line in lines)) from None
    channels, wanted = part.config.get("latent_channels", 4), model.get("latent_channels", 4)
    levels, wanted_levels = len(part.config["block_out_channels"]), len(model["block_out_channels"])
    if (channels, levels) != (wanted, wanted_levels):
        raise ModelError(
            f"--vae = {source}: makes {channels} channels at 1/{2 ** (levels - 1)} of the size, the model takes "
            f"{wanted} at 1/{2 ** (wanted_levels - 1)}; give a VAE of the same kind of model"
        )
    scale = {key: model[key] for key in ("scaling_factor",) if key in model}
    return Part({**part.config, **scale}, part.tensors)


def _of_folder(folder: Path) -> Part:
    for place in (folder / "vae", folder):
        if (place / "config.json").is_file():
            return read_vae_folder(place)
    found = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
    raise ModelError(
        f"{folder}: holds no VAE, neither config.json nor vae/config.json (found: {found}); give its folder"
    )


def _of_file(path: Path, family: FamilyName) -> Part:
    whole, _ = open_file(path)
    try:
        return _recognised(whole, family)
    except NotRecognisedError as problem:
        raise ModelError(f"{path}: is {problem}") from None
    except (KeyError, IndexError, ValueError) as problem:
        raise ModelError(f"{path}: is an incomplete VAE ({problem}); download it again") from None


def _recognised(whole: TensorSource, family: FamilyName) -> Part:
    source = whole
    for prefix in (VAE_PREFIX, "vae."):
        if any(name.startswith(prefix) for name in whole.names()):
            source = under(whole, prefix)
            break
    names = source.names()
    halves = [half for half in ("encoder", "decoder") if any(name.startswith(f"{half}.conv_in.") for name in names)]
    if not halves:
        raise NotRecognisedError(
            f"no VAE: nothing is named encoder.* or decoder.*, with or without {VAE_PREFIX}; give a VAE's file or "
            "folder, or a whole model"
        )
    if len(halves) == 1:
        raise NotRecognisedError(f"half a VAE, its {halves[0]} alone; give a whole one")
    if any(name.startswith("encoder.down_blocks.") for name in names):
        source = _original(source)
    part = vae_part(source, "", family)
    known = {name for derived in part.table.values() for name in derived.sources}
    if strange := sorted(n for n in source.names() if n.startswith(("encoder.", "decoder.")) and n not in known):
        raise NotRecognisedError(
            f"no VAE of a known kind: {len(strange)} of its tensors are unknown, e.g. {strange[0]}"
        )
    return Part(part.config, RenamedSource(source, part.table))


def _original(source: TensorSource) -> TensorSource:
    """A file under diffusers' names, seen under the original ones."""
    present = {current_vae_name(name): name for name in source.names()}
    down = [name.split(".") for name in present if name.startswith("encoder.down_blocks.")]
    levels = 1 + max(int(path[2]) for path in down)
    layers = 1 + max(int(path[4]) for path in down if path[3] == "resnets")
    return RenamedSource(
        source,
        {
            name: Derived((present[derived.sources[0]],), derived.change)
            for name, derived in to_original(vae_pairs(levels, layers)).items()
            if derived.sources[0] in present
        },
    )
