"""A hub on this machine: as much of the Hugging Face hub's HTTP interface as fetching models and datasets takes."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

Files = dict[str, bytes]


class Hub:
    """Repositories by kind ("models", "datasets") and name: files by commit, commits by branch or tag."""

    def __init__(self) -> None:
        self.commits: dict[tuple[str, str], dict[str, Files]] = {}
        self.branches: dict[tuple[str, str], dict[str, str]] = {}
        self.asked: list[str] = []
        self.gated: set[str] = set()

    def push(self, kind: str, repo: str, files: Files, branch: str = "main") -> str:
        """A new commit, to which the branch moves; returns it."""
        parts = [kind, repo, *(f"{name} {hashlib.sha1(data).hexdigest()}" for name, data in sorted(files.items()))]
        commit = hashlib.sha1("\n".join(parts).encode()).hexdigest()
        self.commits.setdefault((kind, repo), {})[commit] = files
        self.branches.setdefault((kind, repo), {})[branch] = commit
        return commit

    def find(self, kind: str, repo: str, revision: str) -> tuple[str, Files] | None:
        commit = self.branches[kind, repo].get(revision, revision)
        files = self.commits[kind, repo].get(commit)
        return None if files is None else (commit, files)


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """Serve it over HTTP; gives the address for HF_ENDPOINT."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlparse(self.path).path).strip("/")
            hub.asked.append(f"{self.command} {path}")
            status, headers, body = answer(hub, path)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def answer(hub: Hub, path: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of one request."""
    parts = path.split("/")
    api = parts[0] == "api"
    parts = parts[1:] if api else parts
    kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
    repo, rest = "/".join(parts[:2]), parts[2:]
    if repo in hub.gated:
        return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
    if (kind, repo) not in hub.commits:
        return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
    words = {"revision", "tree", "resolve"}
    what, revision, inner = (rest[0], *_revision(rest[1:])) if rest and rest[0] in words else ("revision", "main", "")
    found = hub.find(kind, repo, revision)
    if found is None:
        return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
    commit, files = found
    if what == "resolve":
        if inner not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        digest = hashlib.sha1(files[inner]).hexdigest()
        return 200, {"ETag": f'"{digest}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}, files[inner]
    if what == "tree":
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in files.items()
        ]
        return 200, {"Content-Type": "application/json"}, json.dumps(entries).encode()
    info = {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files], "private": False,
            "tags": [], "downloads": 0, "likes": 0}  # fmt: skip
    return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()


def _revision(parts: list[str]) -> tuple[str, str]:
    count = 3 if parts[0] == "refs" else 1
    return "/".join(parts[:count]), "/".join(parts[count:])
