"""`sd-train plan COMMAND ...`: what a training would do, without loading the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from sd_train.errors import ConfigError

USAGE = """usage: sd-train plan COMMAND [--json] [OPTIONS OF THE COMMAND]

Say what `sd-train COMMAND OPTIONS` would do, without loading the model and without training: datasets, images,
repeats, buckets and what they cut off, batches and updates, saves with their sizes, sample pictures, disk, warnings.

  COMMAND   train_network, fine_tune, train_db, train_textual_inversion, or one of sd-scripts' other names for them
  --json    print everything, image by image, as JSON

For instance: sd-train plan train_network --config_file run.toml

For several processes, ask as they are started: torchrun --nproc_per_node 2 -m sd_train plan train_network ..."""

TRAINING_COMMANDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "train_network": ("train_network",),
        "sdxl_train_network": ("train_network", "--sdxl"),
        "fine_tune": ("fine_tune",),
        "sdxl_train": ("fine_tune", "--sdxl"),
        "train_db": ("train_db",),
        "train_textual_inversion": ("train_textual_inversion",),
        "sdxl_train_textual_inversion": ("train_textual_inversion", "--sdxl"),
        "train_textual_inversion_XTI": ("train_textual_inversion", "--xti"),
    }
)
"""The command whose options each one takes, and what it adds to them."""


def main(argv: Sequence[str]) -> int:
    """Print the plan of the command that `argv` names and return 0.

    Raises:
        UserError: what the training itself would end with before its first update.
    """
    words = [word for word in argv if word != "--json"]
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    if words[0] not in TRAINING_COMMANDS:
        raise ConfigError(
            f"plan: {words[0]!r} is no training command; write sd-train plan train_network and its options"
        )
    from sd_train.entry import load_config

    command, *added = TRAINING_COMMANDS[words[0]]
    config = load_config(command, [*added, *words[1:]])
    from sd_train.plan import prepare
    from sd_train.plan_json import plan_json
    from sd_train.plan_report import describe, describe_outputs, disk_warnings
    from sd_train.plan_warnings import plan_warnings
    from sd_train.report import say_line, warn_line

    prepared = prepare(config, trains=False)
    if not prepared.device.is_main:
        return 0
    if len(words) < len(argv):
        print(json.dumps(plan_json(prepared), indent=1))
        return 0
    for warning in (*plan_warnings(prepared), *disk_warnings(prepared)):
        warn_line(warning)
    left = [] if prepared.resume is not None else prepared.names.existing()
    if left and config.saving.overwrite:
        shown = ", ".join(path.name for path in left[:8])
        warn_line(f"--overwrite: deletes {shown}{', ...' if len(left) > 8 else ''} and earlier sample pictures")
    elif left:
        warn_line(f"{config.saving.output_dir} holds another run's files ({left[0].name}): this run would be refused")
    say_line(f"seed: {prepared.progress.seed}")
    say_line(describe(prepared.plan, prepared.config))
    say_line(describe_outputs(prepared))
    return 0
