"""`sd-train merge_models`: a weighted sum of whole models."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sd_train.commands.convert import check_target, named_form
from sd_train.errors import ConfigError, ModelError, Problems
from sd_train.families.sources import Part, TensorSource
from sd_train.prepare.arguments import Parser

if TYPE_CHECKING:
    from sd_train.families.parts import ModelParts
    from sd_train.families.saving import SaveForm

PRECISIONS = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_PREDICTS = {"epsilon": "the noise", "v_prediction": "v", "sample": "the picture"}

_ABOUT = """Mix models of one family, tensor by tensor: --ratios 0.7 0.3 is 0.7 times the first plus 0.3 times the
second; 1 1 -1 adds to the first what the second has and the third has not. The ratios add up to 1, as the weights
would be scaled otherwise (sd-scripts fills up with the first model). What not all models have, or have in another
shape, is the first one's; --show_skipped lists it. Files and folders of any kind are read, and tensors are read,
mixed and written one after another."""


@dataclass(frozen=True)
class MixedSource:
    """The tensors of one network of several models, mixed when they are read."""

    sources: Sequence[TensorSource]
    ratios: Sequence[float]
    computed: torch.dtype
    """In which the sum is taken, and given."""
    device: torch.device
    plain: frozenset[str]
    """Names that are the first model's alone."""

    def names(self) -> list[str]:
        return self.sources[0].names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.sources[0].shape(name)

    def dtype(self, name: str) -> torch.dtype:
        stored = self.sources[0].dtype(name)
        return self.computed if stored.is_floating_point and name not in self.plain else stored

    def read(self, name: str) -> Tensor:
        """The weighted sum of the tensors `name`; the first model's where it is not mixed, or has no fractions."""
        first = self.sources[0].read(name)
        if name in self.plain or not first.is_floating_point():
            return first
        total = first.to(self.device, self.computed) * self.ratios[0]
        for source, ratio in zip(self.sources[1:], self.ratios[1:], strict=True):
            total = total + source.read(name).to(self.device, self.computed) * ratio
        return total.cpu()


def unshared(sources: Sequence[TensorSource]) -> list[str]:
    """Names of the first source that another one lacks, or has in another shape."""
    others = [(source, set(source.names())) for source in sources[1:]]
    return [
        name for name in sources[0].names()
        if any(name not in names or source.shape(name) != sources[0].shape(name) for source, names in others)
    ]


def main(argv: Sequence[str]) -> int:
    """Write the mixture.

    Raises:
        UserError: if the arguments are wrong, a model cannot be read, or the disk refuses.
    """
    given = _parser().parse_args(list(argv))
    ratios, form = _checked(given)
    # Of several seconds, which wrong arguments need not wait for.
    from sd_train.families.saving import save_model

    models = _read(given, ratios, form)
    device = _device(given.device)
    mixed, skipped = dict[str, Part](), list[str]()
    for role, part in models[0].parts.items():
        if given.unet_only and role != "unet":
            mixed[role] = part
            continue
        if any(role not in model.parts for model in models):
            raise ModelError(f"--models: not all have a {role}; give whole models, or --unet_only")
        sources = [model.parts[role].tensors for model in models]
        missing = unshared(sources)
        skipped += [f"{role}.{name}" for name in missing]
        source = MixedSource(sources, ratios, PRECISIONS[given.precision], device, frozenset(missing))
        mixed[role] = Part(part.config, source)
    names = ", ".join(f"{Path(name).stem} x {ratio:g}" for name, ratio in zip(given.models, ratios, strict=True))
    merged = replace(models[0], parts=mixed)
    metadata = {**_kept(models), "modelspec.merged_from": names, "modelspec.title": given.output.stem}
    save_model(given.output, merged, form, PRECISIONS[given.saving_precision], metadata, option="--output")
    print(f"{given.output}: {names}")
    if skipped:
        print(f"{len(skipped)} tensors are not in all models in one shape and are the first one's"
              + ("" if given.show_skipped else "; --show_skipped lists them"))  # fmt: skip
        for name in skipped if given.show_skipped else ():
            print(f"  {name}")
    return 0


def _read(given: argparse.Namespace, ratios: Sequence[float], form: SaveForm) -> list[ModelParts]:
    """The models; the first is told what they predict where it does not tell itself.

    Raises:
        ModelError: if one cannot be read, or they are not of one kind.
    """
    from sd_train.families.parts import ModelRequest, read_model

    models = [read_model(ModelRequest(source, guess=True, option="--models")) for source in given.models]
    if len(families := {model.family for model in models}) > 1:
        raise ModelError(f"--models: are of different families ({', '.join(sorted(families))}); mix those of one")
    first, *others = _predictions(models, ratios) or [""]
    if others:
        raise ModelError(
            f"--models: the first predicts {_PREDICTS[first]}, others {_PREDICTS[others[0]]}, and a mixture of them "
            "neither; mix models of one kind"
        )
    if first and not models[0].told:
        models[0] = read_model(
            ModelRequest(given.models[0], v_parameterization=first == "v_prediction", option="--models")
        )
    if not models[0].told and form.startswith("diffusers"):
        raise ModelError(
            f"--models = {given.models[0]}: nothing tells whether it predicts the noise or v, as folders have to; "
            "write a .safetensors file, or convert it before with sd-train convert --v_parameterization (768 pixels) "
            "or --no_v_parameterization (512)"
        )
    return models


def _predictions(models: Sequence[ModelParts], ratios: Sequence[float]) -> list[str]:
    """What those models predict that tell it, each kind once; what is added and taken away again is left out."""
    shares: dict[str, float] = {}
    for model, ratio in zip(models, ratios, strict=True):
        if model.told:
            shares[model.prediction] = shares.get(model.prediction, 0.0) + ratio
    first = models[0].prediction if models[0].told else None
    return [kind for kind, share in shares.items() if abs(share) > 1e-3 or kind == first]


def _kept(models: Sequence[ModelParts]) -> dict[str, str]:
    """What all say alike of what they are."""
    wanted = ("modelspec.architecture", "modelspec.prediction_type", "modelspec.sai_model_spec")
    first = models[0].metadata
    return {
        name: first[name] for name in wanted
        if name in first and all(model.metadata.get(name) == first[name] for model in models)
    }


def _checked(given: argparse.Namespace) -> tuple[list[float], SaveForm]:
    """The ratios, and as what the mixture is written.

    Raises:
        ConfigError: with every problem.
    """
    problems = Problems()
    if len(given.models) < 2:
        problems.add("--models", given.models[0], "is one model", "give two or more")
    ratios: list[float] = given.ratios or [1 / len(given.models)] * len(given.models)
    if len(ratios) != len(given.models):
        problems.add("--ratios", given.ratios, f"are {len(ratios)} numbers for {len(given.models)} models",
                     "give one for each of --models")  # fmt: skip
    elif not abs(sum(ratios) - 1) < 1e-3:
        problems.add("--ratios", given.ratios, f"add up to {sum(ratios):g}, and all weights would be scaled by it",
                     "give ratios that add up to 1")  # fmt: skip
    problems.raise_if_any(ConfigError)
    form = named_form(given.output, "--output", "give a name without an extension for a folder")
    form = form or "diffusers_safetensors"
    check_target([("--models", source) for source in given.models], given.output, form, given.overwrite, "--output")
    return ratios, form


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as problem:
        reason = str(problem).splitlines()[0]
        raise ConfigError(f"--device = {name}: cannot be used ({reason}); try cpu") from None
    return device


def _parser() -> argparse.ArgumentParser:
    parser = Parser("merge_models", _ABOUT)
    add = parser.add_argument
    add("--models", nargs="+", required=True, metavar="MODEL", help="files, folders or hub ids, of one family")
    add("--output", type=Path, required=True, metavar="PATH", help="a .safetensors or .ckpt file, or a folder to make")
    add("--ratios", nargs="+", type=float, metavar="NUMBER", help="one for each model (default: equal)")
    add("--unet_only", action="store_true", help="mix the U-Nets; text encoders and autoencoder are the first model's")
    add("--device", default="cpu", help="where the sums are taken (default cpu)")
    add("--precision", choices=tuple(PRECISIONS), default="float", help="in which they are taken (default float)")
    add("--saving_precision", choices=tuple(PRECISIONS), default="float", help="in which they are written (default "
        "float)")  # fmt: skip
    add("--show_skipped", action="store_true", help="list the tensors that are not mixed")
    add("--overwrite", action="store_true", help="replace what --output names")
    return parser
