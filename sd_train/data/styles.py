"""DreamBooth or fine-tuning: which style a dataset has, which keys go with it, which command trains it.

sd-scripts' rules (`ConfigSanitizer`, `validate_flex_dataset`): a dataset whose subsets all have `metadata_file` is
fine-tuning, one where none has it DreamBooth, whether or not there are caption files; a mixture is refused. Masks
(`conditioning_data_dir`) go with DreamBooth, in every subset that is learnt or in none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from types import MappingProxyType

from pydantic import BaseModel

from sd_train.data.keys import DatasetTable, SubsetTable
from sd_train.data.settings import Style
from sd_train.data.validation import Key, Source
from sd_train.errors import Problems

_BOTH: frozenset[Style] = frozenset({"dreambooth", "fine_tuning"})
_ACCEPTED: Mapping[str, frozenset[Style]] = MappingProxyType(
    {
        "fine_tune": frozenset({"fine_tuning"}),
        "train_db": frozenset({"dreambooth"}),
        "train_network": _BOTH,
        "train_textual_inversion": _BOTH,
    }
)
_NAMES: Mapping[Style, str] = MappingProxyType(
    {"dreambooth": "DreamBooth style (image_dir without metadata_file)", "fine_tuning": "fine-tuning (metadata_file)"}
)
_NOT_IN_FINE_TUNING: Mapping[str, str] = MappingProxyType(
    {
        "class_tokens": "the captions stand in metadata_file; remove it",
        "caption_extension": "the captions stand in metadata_file; remove it",
        "is_reg": "put the regularisation images into a DreamBooth dataset (image_dir without metadata_file)",
        "cache_info": "remove it",
    }
)


def accepted_styles(command: str, sdxl: bool) -> frozenset[Style]:
    """The styles that a training command takes; those of any other command, such as a tool that only looks, are all."""
    if command == "fine_tune" and sdxl:
        return _BOTH
    return _ACCEPTED.get(command, _BOTH)


def find_style(
    source: Source, place: Key, table: DatasetTable, wrong: Set[Key], masked_loss: bool, problems: Problems
) -> Style:
    """The style of the dataset at `place`; a mixture and keys of another style are noted as problems.

    Args:
        wrong: the keys that were left out of `table`.
    """
    inner: list[Key] = [(*place, "subsets", number) for number in range(len(table.subsets))]
    names = [source.where(*key) for key in inner]
    tuned = [subset.metadata_file is not None for subset in table.subsets]
    masked = [subset.conditioning_data_dir is not None for subset in table.subsets]
    bare = [number for number, subset in enumerate(table.subsets) if not masked[number] and not subset.is_reg]
    readable = not any(key in wrong or (*key, "metadata_file") in wrong for key in inner)
    if any(tuned) and not all(tuned) and readable:
        _mixture(names[tuned.index(True)], names[tuned.index(False)], "metadata_file", problems)
    elif any(masked) and bare and not any((*key, "conditioning_data_dir") in wrong for key in inner):
        _mixture(names[masked.index(True)], names[bare[0]], "conditioning_data_dir", problems)
    for number, subset in enumerate(table.subsets):
        if masked[number]:
            _check_masked(source, inner[number], subset, masked_loss, problems)
        if tuned[number]:
            _check_tuned(source, inner[number], subset, problems)
    if tuned and all(tuned):
        _check_tuned(source, place, table, problems)
    return "fine_tuning" if any(tuned) else "dreambooth"


def _mixture(having: str, without: str, key: str, problems: Problems) -> None:
    problems.add(without, None, f"mixes styles: it has no {key}, {having} has",
                 "put each style into a [[datasets]] of its own")


def _check_tuned(source: Source, place: Key, table: BaseModel, problems: Problems) -> None:
    for name, way_out in _NOT_IN_FINE_TUNING.items():
        if name in table.model_fields_set:
            problems.add(source.where(*place, name), getattr(table, name),
                         "is not allowed in a fine-tuning dataset (one with metadata_file)", way_out)


def _check_masked(source: Source, place: Key, table: SubsetTable, masked_loss: bool, problems: Problems) -> None:
    where = source.where(*place, "conditioning_data_dir")
    if not masked_loss:
        problems.add(where, table.conditioning_data_dir, "masks need the run option masked_loss",
                     "give --masked_loss, or remove the key")
    if table.metadata_file is not None:
        problems.add(where, table.conditioning_data_dir, "masks do not go with metadata_file",
                     "write the captions into files beside the images (caption_extension) and remove metadata_file")
    if "alpha_mask" in table.model_fields_set:
        problems.add(source.where(*place, "alpha_mask"), table.alpha_mask,
                     "does not go with conditioning_data_dir, whose masks count instead", "remove one of the two")


def check_command(command: str, sdxl: bool, style: Style, where: str, problems: Problems) -> None:
    """Note a dataset whose style `command` does not take, with the commands that do."""
    accepted = accepted_styles(command, sdxl)
    if style not in accepted:
        others = _listed(name for name in _ACCEPTED if style in accepted_styles(name, sdxl))
        wanted = _listed(_NAMES[name] for name in sorted(accepted))
        problems.add(where, None, f"{command} does not train a dataset of {_NAMES[style]}",
                     f"use {others} for it, or give {command} a dataset of {wanted}")


def _listed(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last
