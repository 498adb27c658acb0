"""Copies of saved files on the Hugging Face hub, and states from there.

A failing upload never stops a training: it is told, with the command that makes up for it.
"""

from __future__ import annotations

import logging
import queue
import shlex
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sd_train.config.hub import HubFolder, parse_hub_folder
from sd_train.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

_TOKEN = "give a token that may write there: set HF_TOKEN, run hf auth login, or give --huggingface_token"


@dataclass(frozen=True)
class HubTarget:
    """Where files are uploaded to."""

    repo_id: str
    repo_type: str = "model"
    folder: str = ""
    """In the repository; empty: its top."""
    private: bool = True
    """Of a repository that is made."""
    token: str | None = field(default=None, repr=False)
    """None: the one that the hub's library finds."""
    states: bool = False
    """Whether state folders are uploaded too."""

    def path_of(self, path: Path) -> str:
        """The place of a saved file or folder in the repository."""
        return f"{self.folder}/{path.name}" if self.folder else path.name


def open_repository(target: HubTarget, warn: Callable[[str], None]) -> None:
    """Make the repository if there is none, before the first update.

    A hub that cannot be reached is only a warning: it may be there when the first file is saved.

    Raises:
        ConfigError: if no upload can succeed: no token, one that may not write, uploads switched off.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    where = f"--huggingface_repo_id = {target.repo_id!r}"
    later = "each file that is saved is tried all the same"
    if target.token is None and get_token() is None:
        raise ConfigError(f"{where}: no token of the Hugging Face hub is known; {_TOKEN}")
    try:
        api = _api(target.token)
        # Tokens of other kinds have no role.
        token = (api.whoami().get("auth") or {}).get("accessToken") or {}
        if token.get("role") == "read":
            raise ConfigError(f"{where}: the token may only read; {_TOKEN}")
        _make_repository(api, target)
    except OfflineModeIsEnabled:
        way_out = "unset it, or remove huggingface_repo_id and run hf upload after the training"
        raise ConfigError(f"{where}: the hub is switched off by HF_HUB_OFFLINE; {way_out}") from None
    except HFValidationError as problem:
        raise ConfigError(f"{where}: is no name of a repository ({_first_line(problem)}); write owner/name") from None
    except HfHubHTTPError as problem:
        if _status(problem) not in (400, 401, 403, 404):
            warn(f"{where}: the hub does not answer as it should ({_first_line(problem)}); {later}")
            return
        raise ConfigError(f"{where}: the hub refuses ({_first_line(problem)}); {_TOKEN}, and check the name") from None
    except Exception as problem:
        if not _is_network(problem):
            raise
        warn(f"{where}: the hub at {constants.ENDPOINT} cannot be reached ({_first_line(problem)}); {later}")


def download_state(text: str, token: str | None) -> Path:
    """The state folder `OWNER/NAME/PATH[:REVISION[:TYPE]]` in the hub's cache, downloaded if it is not there.

    Raises:
        ConfigError: if `text` is not written so.
        DataError: if there is no such folder or it cannot be downloaded.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    place = parse_hub_folder(text)
    where = f"--resume = {text!r}"
    if place is None:
        raise ConfigError(f"{where}: names no folder on the hub; write OWNER/NAME/PATH, OWNER/NAME/PATH:REVISION or "
                          "OWNER/NAME/PATH:REVISION:TYPE, or remove --resume_from_huggingface")
    _quiet()
    try:
        cached = Path(
            snapshot_download(
                place.repo_id, repo_type=place.repo_type, revision=place.revision, token=token,
                allow_patterns=f"{place.path}/*",
            )
        )  # fmt: skip
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise DataError(f"{where}: {_absent(place)}; check the spelling, and give a token that may read it "
                        "(HF_TOKEN, hf auth login or --huggingface_token)") from None
    except Exception as problem:
        if not (_is_network(problem) or isinstance(problem, LocalEntryNotFoundError)):
            raise
        raise DataError(f"{where}: cannot be downloaded ({_first_line(problem)}); download it where there is a network "
                        f"(hf download {place.repo_id} --include '{place.path}/*') and give its folder") from None
    folder = cached / place.path
    if not folder.is_dir():
        raise DataError(f"{where}: the repository has no folder {place.path!r}; see what it holds on its page")
    return folder


class Uploader:
    """Uploads what is saved, at once or in a thread of its own; a context manager.

    One thread: the files arrive in the order in which they were saved.
    """

    def __init__(self, target: HubTarget, say: Callable[[str], None], *, in_background: bool) -> None:
        self._target, self._say = target, say
        self._queue: queue.SimpleQueue[Path | None] = queue.SimpleQueue()
        self._waiting = 0
        self._thread: threading.Thread | None = None
        self._in_background = in_background

    def __enter__(self) -> Uploader:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Whoever presses Ctrl-C a second time waits for nothing more.
        if kind is not KeyboardInterrupt:
            self.close()

    def saved(self, models: Sequence[Path], state: Path | None = None) -> None:
        """Upload models, each a file or a folder, and the state folder if states are wanted."""
        wanted = [*models, *([state] if state is not None and self._target.states else [])]
        if not self._in_background:
            for path in wanted:
                self._upload(path)
            return
        if self._thread is None:
            # A daemon: a second Ctrl-C must be able to end the process while an upload hangs.
            self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)
            self._thread.start()
        for path in wanted:
            self._queue.put(path)

    def close(self) -> None:
        """Wait for what is still to be uploaded; more calls do nothing."""
        if self._thread is None:
            return
        if left := self._queue.qsize():
            self._say(f"waiting for uploads ({left} more); Ctrl-C leaves them out")
        self._queue.put(None)
        self._thread.join()
        self._thread = None

    def _work(self) -> None:
        while (path := self._queue.get()) is not None:
            self._upload(path)

    def _upload(self, path: Path) -> None:
        target = self._target
        place = target.path_of(path)
        facts = {"repo_id": target.repo_id, "repo_type": target.repo_type, "path_in_repo": place}
        # The network, the hub, its quota, a file that was deleted meanwhile: none of it may end a training, and the
        # library's errors have no common class.
        try:
            api = _api(target.token)
            # It may not have been there before; and where the hub is away this fails at once, an upload only after
            # many tries.
            _make_repository(api, target)
            if path.is_dir():
                api.upload_folder(folder_path=path, commit_message=f"Upload {path.name}", **facts)
            else:
                api.upload_file(path_or_fileobj=path, commit_message=f"Upload {path.name}", **facts)
        except Exception as problem:
            kind = [] if target.repo_type == "model" else ["--repo-type", target.repo_type]
            logger.warning(
                "%s: not uploaded to %s (%s); the training goes on; upload it later: %s",
                path, target.repo_id, _first_line(problem),
                shlex.join(["hf", "upload", *kind, target.repo_id, str(path), place]),
            )  # fmt: skip
        else:
            self._say(f"uploaded {path.name} to {target.repo_id}")


def _make_repository(api: Any, target: HubTarget) -> None:
    space = "static" if target.repo_type == "space" else None
    api.create_repo(target.repo_id, private=target.private, repo_type=target.repo_type, exist_ok=True, space_sdk=space)


def _api(token: str | None) -> Any:
    from huggingface_hub import HfApi

    _quiet()
    return HfApi(token=token)


def _quiet() -> None:
    """The library's bars and lines would break ours; what matters we say ourselves."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    disable_progress_bars()


def _status(problem: Any) -> int | None:
    return getattr(getattr(problem, "response", None), "status_code", None)


def _is_network(problem: Exception) -> bool:
    """Whether `problem` is the network's or the hub's; releases of the library use different HTTP libraries."""
    from huggingface_hub.errors import HfHubHTTPError

    kinds = tuple(kind for kind in HfHubHTTPError.__mro__ if issubclass(kind, Exception) and kind is not Exception)
    return isinstance(problem, (*kinds, OSError))


def _absent(place: HubFolder) -> str:
    revision = f" with the revision {place.revision}" if place.revision else ""
    return f"the hub has no {place.repo_type} repository {place.repo_id}{revision}"


def _first_line(problem: Exception) -> str:
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]
