"""How places on the Hugging Face hub are written."""

from __future__ import annotations

import re
from dataclasses import dataclass

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
"""owner/name."""
REPO_TYPES = ("model", "dataset", "space")


@dataclass(frozen=True)
class HubFolder:
    """A folder in a repository."""

    repo_id: str
    path: str
    revision: str | None
    repo_type: str


def parse_hub_folder(text: str) -> HubFolder | None:
    """sd-scripts' `OWNER/NAME/PATH[:REVISION[:TYPE]]`; None if `text` is not written so."""
    place, *more = text.split(":")
    owner, _, rest = place.partition("/")
    name, _, path = rest.partition("/")
    revision, repo_type = [*more, "", ""][:2]
    repo_id, path = f"{owner}/{name}", path.strip("/")
    if len(more) > 2 or not HUB_ID.fullmatch(repo_id) or not is_path_in_repo(path):
        return None
    if repo_type not in ("", *REPO_TYPES):
        return None
    return HubFolder(repo_id, path, revision or None, repo_type or "model")


def is_path_in_repo(path: str) -> bool:
    """Whether `path` names something inside a repository."""
    return bool(path) and all(part not in ("", ".", "..") for part in path.split("/")) and "\\" not in path
