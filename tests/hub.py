"""A stand-in of the Hugging Face Hub: as much of its HTTP interface as ``huggingface_hub`` asks for models."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from unittest import mock
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_owner"


class Hub(ThreadingHTTPServer):
    """Repositories as files by commit; whoever writes or reads what is private needs :data:`TOKEN`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Requests)
        self.repos: dict[str, dict[str, str]] = {}
        """By repository and branch, the commit."""
        self.commits: dict[str, dict[str, bytes]] = {}
        """By commit, its files."""
        self.private: set[str] = set()
        self.asked: list[str] = []
        self.down = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, name: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Puts files in place of those that a branch has."""
        listed = [(key, hashlib.sha1(data).hexdigest()) for key, data in sorted(files.items())]
        sha = hashlib.sha1(repr((name, len(self.commits), listed)).encode()).hexdigest()
        self.commits[sha] = files
        self.repos.setdefault(name, {})[branch] = sha
        return sha

    def files(self, name: str, revision: str = "main") -> dict[str, bytes] | None:
        """Those of a branch or commit; None: there is none."""
        found = self.repos.get(name, {})
        return self.commits.get(found.get(revision, revision))


class _Requests(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_GET

    def _answer(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        if self.server.down:
            self._send(503, b"down")
            return
        for pattern, verb in (
            (r"/api/models/([^/]+/[^/]+)/revision/(.+)", self._info),
            (r"/api/models/([^/]+/[^/]+)", self._info),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", self._tree),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._file),
            (r"/api/repos/create", self._create),
            (r"/api/validate-yaml", self._yaml),
            (r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self._preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/(.+)", self._commit),
        ):
            if match := re.fullmatch(pattern, path):
                verb(*match.groups())
                return
        self._send(404, b"no such address")

    def _send(self, status: int, data: bytes | Any, **headers: str) -> None:
        data = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _may(self, name: str, writing: bool = False) -> bool:
        """Whether a repository is there for whoever asks; if not, that is the answer."""
        owner = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if writing and not owner:
            self._send(403, {"error": "no right to write"})
        elif name not in self.server.repos or (name in self.server.private and not owner):
            self._send(401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        else:
            return True
        return False

    def _there(self, name: str, revision: str) -> dict[str, bytes] | None:
        """The files of a revision; None: that there are none is the answer."""
        if not self._may(name):
            return None
        found = self.server.files(name, revision)
        if found is None:
            self._send(404, {"error": "Revision not found"}, X_Error_Code="RevisionNotFound")
        return found

    def _sha(self, name: str, revision: str) -> str:
        return self.server.repos[name].get(revision, revision)

    def _info(self, name: str, revision: str = "main") -> None:
        files = self._there(name, revision)
        if files is not None:
            siblings = [{"rfilename": key} for key in sorted(files)]
            self._send(200, {"id": name, "modelId": name, "sha": self._sha(name, revision), "siblings": siblings,
                             "private": name in self.server.private, "tags": []})  # fmt: skip

    def _tree(self, name: str, revision: str) -> None:
        files = self._there(name, revision)
        if files is not None:
            self._send(200, [{"type": "file", "path": key, "size": len(data), "oid": _oid(data)}
                             for key, data in sorted(files.items())])  # fmt: skip

    def _file(self, name: str, revision: str, path: str) -> None:
        files = self._there(name, revision)
        if files is None:
            return
        commit = self._sha(name, revision)
        if path not in files:
            self._send(404, b"no such file", X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        else:
            self._send(200, files[path], X_Repo_Commit=commit, ETag=f'"{_oid(files[path])}"')

    def _create(self) -> None:
        told = json.loads(self.body)
        name = f"{told['organization']}/{told['name']}" if told.get("organization") else told["name"]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, {"error": "Invalid username or password."})
            return
        there = name in self.server.repos
        if not there:
            self.server.commit(name, {".gitattributes": b""})
            if told.get("private"):
                self.server.private.add(name)
        self._send(409 if there else 200, {"url": f"{self.server.address}/{name}", "id": name})

    def _yaml(self) -> None:
        import yaml

        head = json.loads(self.body)["content"].split("---")[1]
        good = isinstance(yaml.safe_load(head), dict)
        self._send(200 if good else 400, {"errors": [], "warnings": []})

    def _preupload(self, name: str, revision: str) -> None:
        if self._may(name, writing=True):
            files = json.loads(self.body)["files"]
            self._send(200, {"files": [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                                       for one in files]})  # fmt: skip

    def _commit(self, name: str, branch: str) -> None:
        if not self._may(name, writing=True):
            return
        files = dict(self.server.files(name, branch) or {})
        for line in self.body.splitlines():
            told = json.loads(line)
            if told["key"] == "file":
                files[told["value"]["path"]] = base64.b64decode(told["value"]["content"])
            if told["key"] == "deletedFile":
                del files[told["value"]["path"]]
        sha = self.server.commit(name, files, branch)
        self._send(200, {"commitUrl": f"{self.server.address}/{name}/commit/{sha}", "commitOid": sha, "hookOutput": ""})


def _oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def serving(cache: Any) -> Iterator[Hub]:
    """A hub that ``huggingface_hub`` in this process talks to, as with ``HF_ENDPOINT``; it keeps files in ``cache``."""
    from huggingface_hub import constants

    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
        settings = {
            "ENDPOINT": hub.address,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.address + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(cache),
        }
        with mock.patch.multiple(constants, **settings):
            try:
                yield hub
            finally:
                hub.shutdown()
