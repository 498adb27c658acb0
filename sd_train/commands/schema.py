"""`sd-train schema run|dataset`: print the JSON Schema of a configuration file."""

from __future__ import annotations

import json
from collections.abc import Sequence

from sd_train.config.schema import run_json_schema
from sd_train.errors import ConfigError

USAGE = """usage: sd-train schema run|dataset

Print the JSON Schema of the run options (--config_file) or of a dataset file (--dataset_config), for completion and
checks in editors."""


def main(argv: Sequence[str]) -> int:
    """Print the schema that `argv` names and return 0.

    Raises:
        ConfigError: if `argv` names none.
    """
    match list(argv):
        case ["-h"] | ["--help"]:
            print(USAGE)
            return 0
        case ["run"]:
            schema = run_json_schema()
        case ["dataset"]:
            from sd_train.data.config import dataset_json_schema

            schema = dataset_json_schema()
        case words:
            said = " ".join(words) or "nothing"
            raise ConfigError(f"schema: {said} names no schema; write sd-train schema run, or sd-train schema dataset")
    print(json.dumps(schema, indent=2, ensure_ascii=False))
    return 0
