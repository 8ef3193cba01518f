"""A Hub on this machine: what huggingface_hub asks of one, for repositories that are dicts of files."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

TOKEN = "hf_stand_in"


@dataclasses.dataclass
class Hub:
    """Repositories by kind and name, such as models/OWNER/NAME.

    Attributes:
      commits: repository -> its commits, the last one that of main, each with its files.
      gated: repositories that want a token of somebody who may.
      broken: whether every upload fails.
      asked: method and path of every request.
      made: what was asked of a new repository, by its name.
    """

    endpoint: str = ""
    commits: dict[str, dict[str, dict[str, bytes]]] = dataclasses.field(default_factory=dict)
    gated: set[str] = dataclasses.field(default_factory=set)
    broken: bool = False
    asked: list[str] = dataclasses.field(default_factory=list)
    made: dict[str, dict] = dataclasses.field(default_factory=dict)

    def add(self, repository: str, files: Mapping[str, bytes] | Path) -> str:
        """A new commit on main; returns its name."""
        if isinstance(files, Path):
            files = {file.name: file.read_bytes() for file in files.iterdir() if file.is_file()}
        there = self.commits.setdefault(repository, {})
        commit = hashlib.sha1(f"{repository} {len(there)}".encode()).hexdigest()
        there[commit] = dict(files)
        return commit

    def files(self, repository: str) -> dict[str, bytes]:
        """Those of main."""
        return list(self.commits[repository].values())[-1]

    def fetched(self, name: str) -> int:
        """How often a file was downloaded."""
        return sum(line.startswith("GET") and line.endswith(name) for line in self.asked)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *unused) -> None:
        pass

    def _say(self, status: int, body: bytes | dict | list = b"", **headers: str) -> None:
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self._say(status, X_Error_Code=code, X_Error_Message=code)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if "resolve" in parts:
            at = parts.index("resolve")
            repository = "/".join(parts[:at])
            self._of(repository if at == 3 else f"models/{repository}", parts[at + 1], "/".join(parts[at + 2 :]))
        elif parts[0] == "api" and parts[4:5] in (["revision"], ["tree"]):
            self._of("/".join(parts[1:4]), parts[5], parts[4])
        else:
            self._say(404)

    def _of(self, repository: str, revision: str, what: str) -> None:
        """A file of a commit, or what it is (`what` is revision), or the list of its files (tree)."""
        there = self.hub.commits.get(repository)
        if there is None:
            return self._refuse(401, "RepoNotFound")
        if repository in self.hub.gated and "resolve" in self.path:
            return self._refuse(403, "GatedRepo")
        commit = list(there)[-1] if revision == "main" else revision
        if commit not in there:
            return self._refuse(404, "RevisionNotFound")
        if what == "revision":
            return self._say(200, {"id": repository.partition("/")[2], "sha": commit, "siblings": []})
        if what == "tree":
            files = there[commit].items()
            entries = [{"type": "file", "path": name, "size": len(body), "oid": _digest(body)} for name, body in files]
            return self._say(200, entries)
        if what not in there[commit]:
            return self._refuse(404, "EntryNotFound")
        body = there[commit][what]
        return self._say(200, body, X_Repo_Commit=commit, ETag=f'"{_digest(body)}"')

    def do_POST(self) -> None:
        path = urllib.parse.urlsplit(self.path).path
        self.hub.asked.append(f"POST {path}")
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if path == "/api/validate-yaml":
            return self._say(200, {"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._refuse(401, "Unauthorized")
        if self.hub.broken:
            return self._say(500)
        if path == "/api/repos/create":
            asked = json.loads(body)
            repository = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            if f"models/{repository}" in self.hub.commits:
                return self._say(409, {"url": f"{self.hub.endpoint}/{repository}"})
            self.hub.made[repository] = asked
            self.hub.add(f"models/{repository}", {})
            return self._say(200, {"url": f"{self.hub.endpoint}/{repository}"})
        repository = "/".join(path.split("/")[2:5])
        if "/preupload/" in path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return self._say(200, {"files": [file | {"shouldIgnore": False} for file in files]})
        added = [json.loads(line) for line in body.splitlines()]
        added = [line["value"] for line in added if line["key"] == "file"]
        files = {file["path"]: base64.b64decode(file["content"]) for file in added}
        commit = self.hub.add(repository, self.hub.files(repository) | files)
        where = f"{self.hub.endpoint}/{repository}/commit/{commit}"
        return self._say(200, {"success": True, "commitOid": commit, "commitUrl": where, "hookOutput": ""})


def _digest(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


@contextlib.contextmanager
def serving(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub for huggingface_hub in this process and in its children, with a cache and a home of its own in `cache`."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    # Read when huggingface_hub is imported: for this process the constants, for its children the environment.
    here = {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_TOKEN_PATH": str(cache / "token"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
    }
    for name, value in here.items():
        monkeypatch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}.items():
        monkeypatch.setenv(name, value)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        close_session()  # its connections are to this server
