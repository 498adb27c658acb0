"""A hub of the Hugging Face kind on this machine: whoami, repositories, commits and downloads of regular files."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

TOKEN = "hf_secretsecretsecretsecret"
COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """Its repositories are dictionaries of files."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.created: list[dict[str, Any]] = []
        self.order: list[str] = []
        """Paths in the order of their commits."""
        self.role = "write"
        self.refuses = False
        """Whether commits fail."""
        self.pause = threading.Event()
        self.pause.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *arguments: Any) -> None:
        """Silent."""

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid credentials"}, 401)
        elif parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            self.server.created.append(asked)
            name = f"{asked.get('organization', 'me')}/{asked['name']}"
            self.server.repos.setdefault(name, {})
            self.answer({"url": f"{self.server.url}/{name}", "id": name})
        elif parts[4:5] == ["preupload"]:
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                     for f in json.loads(body)["files"]]
            self.answer({"files": files})
        elif parts[4:5] == ["commit"]:
            self.server.pause.wait(20)
            if self.server.refuses:
                self.answer({"error": "storage is full"}, 403)
                return
            for line in map(json.loads, body.decode().splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.repos["/".join(parts[2:4])][line["value"]["path"]] = content
                    self.server.order.append(line["value"]["path"])
            self.answer({"commitUrl": f"{self.server.url}/me/x/commit/{COMMIT}", "commitOid": COMMIT,
                         "pullRequestUrl": None, "success": True})
        else:
            self.answer({"error": f"unknown {self.path}"}, 404)

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        files = self.server.repos.get("/".join(parts[2:4] if parts[0] == "api" else parts[:2]))
        if parts == ["api", "whoami-v2"]:
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.answer({"error": "Invalid credentials"}, 401)
            else:
                self.answer({"name": "me", "auth": {"accessToken": {"role": self.server.role}}})
        elif files is None:
            self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif parts[:2] == ["api", "models"] and parts[4:5] == ["tree"]:
            self.answer([{"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                         for name, content in files.items()])
        elif parts[:2] == ["api", "models"]:
            siblings = [{"rfilename": name} for name in files]
            self.answer({"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": siblings})
        elif parts[2:3] == ["resolve"] and "/".join(parts[4:]) in files:
            content = files["/".join(parts[4:])]
            tag = hashlib.sha1(content).hexdigest()
            self.answer(content, X_Repo_Commit=COMMIT, ETag=f'"{tag}"', Content_Length=str(len(content)))
        else:
            self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET


@contextmanager
def hub_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the library takes for the real one, with a cache and a login of its own."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    use_hub(monkeypatch, hub.url)
    try:
        yield hub
    finally:
        hub.pause.set()
        hub.shutdown()
        hub.server_close()


def use_hub(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """What HF_ENDPOINT and HF_HUB_OFFLINE=0 say when the library is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
