"""JSON Schema of the run options, for completion in editors."""

from __future__ import annotations

from typing import Any

from sd_train.config.catalogue import options
from sd_train.config.compat import known_options
from sd_train.config.options import GROUPS


def run_json_schema() -> dict[str, Any]:
    """The schema of a `--config_file`: every option at the top level, and again in sections of any name.

    Options that are accepted without effect are listed as deprecated; those that are not yet supported or refused are
    left out, so that an editor marks them.
    """
    properties: dict[str, Any] = {}
    for model in GROUPS.values():
        for name, entry in model.model_json_schema()["properties"].items():
            properties[name] = _flat(name, entry)
    types = {"flag": "boolean", "int": "integer", "float": "number", "text": "string", "list": "array"}
    for known in known_options().values():
        if known.status == "no_effect":
            properties[known.name] = {
                "type": types[known.kind],
                "description": f"Has no effect: {known.note}.",
                "deprecated": True,
            }
    section = {
        "type": "object",
        "description": "A section; its name is only a label.",
        "properties": {name: {"$ref": f"#/properties/{name}"} for name in properties},
        "additionalProperties": False,
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "sd_train run options (--config_file)",
        "type": "object",
        "properties": properties,
        "additionalProperties": section,
    }


def _flat(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """One property without pydantic's titles and without null, which TOML does not have."""
    result = {key: value for key, value in entry.items() if key not in ("title", "anyOf")}
    branches = [branch for branch in entry.get("anyOf", []) if branch.get("type") != "null"]
    if len(branches) == 1:
        result.update(branches[0])
    elif branches:
        result["anyOf"] = branches
    if result.get("default", "") is None:
        del result["default"]
    if "default" in result and options()[name].kind == "list":
        result["default"] = []
    return result
