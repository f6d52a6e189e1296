"""A hub on this machine: as much of the Hugging Face hub's HTTP interface as fetching models and datasets takes, and
sending a folder to a model's repository. What is sent can be fetched."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

Files = dict[str, bytes]
Answer = tuple[int, dict[str, str], bytes]
# What the hub takes apart from a commit, with Git LFS.
LARGE = ".safetensors"


class Hub:
    """Repositories by kind ("models", "datasets") and name: files by commit, commits by branch or tag.

    Attributes:
        asked: method and path of every request.
        created: the repositories that were made over HTTP, with what was asked of them.
        large: contents sent with Git LFS, by their sha256.
        refuses: by a word in a path, the status that requests there get.
    """

    def __init__(self) -> None:
        self.commits: dict[tuple[str, str], dict[str, Files]] = {}
        self.branches: dict[tuple[str, str], dict[str, str]] = {}
        self.asked: list[str] = []
        self.gated: set[str] = set()
        self.created: dict[str, dict] = {}
        self.large: Files = {}
        self.refuses: dict[str, int] = {}

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
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def do_PUT(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = unquote(urlparse(self.path).path).strip("/")
            hub.asked.append(f"{self.command} {path}")
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            refused = next((status for word, status in hub.refuses.items() if word in path), None)
            if refused is not None:
                status, headers, body = refused, {"X-Error-Message": "refused"}, b'{"error": "refused"}'
            elif self.command in ("POST", "PUT"):
                status, headers, body = take(hub, f"http://{self.headers['Host']}", path, sent)
            else:
                status, headers, body = answer(hub, path)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
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


def take(hub: Hub, address: str, path: str, sent: bytes) -> Answer:
    """The answer to a request that sends something: a repository to be made, or files for one."""
    if path.startswith("large/"):
        hub.large[path.removeprefix("large/")] = sent
        return 200, {}, b""
    if path == "api/repos/create":
        asked = json.loads(sent)
        repo = "/".join(filter(None, (asked.get("organization"), asked["name"])))
        hub.created.setdefault(repo, asked)
        hub.branches.setdefault(("models", repo), {})
        hub.commits.setdefault(("models", repo), {})
        return _json({"url": f"{address}/{repo}", "id": repo})
    if path == "api/validate-yaml":
        return _json({"errors": [], "warnings": []})
    if path.endswith("/info/lfs/objects/batch"):
        asked = json.loads(sent)["objects"]
        places = [{"upload": {"href": f"{address}/large/{entry['oid']}", "header": {}}} for entry in asked]
        objects = [{**entry, "actions": place} for entry, place in zip(asked, places, strict=True)]
        return _json({"transfer": "basic", "objects": objects})
    repo = "/".join(path.split("/")[2:4])
    if "/preupload/" in path:
        modes = [
            {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
             "shouldIgnore": False} for file in json.loads(sent)["files"]
        ]  # fmt: skip
        return _json({"files": modes})
    commit = hub.push("models", repo, _files_of_commit(hub, repo, sent))
    return _json({"commitUrl": f"{address}/{repo}/commit/{commit}", "commitOid": commit})


def _files_of_commit(hub: Hub, repo: str, sent: bytes) -> Files:
    """The files of a repository after a commit, which comes as lines of JSON."""
    found = hub.find("models", repo, "main")
    files: Files = {} if found is None else dict(found[1])
    entries = defaultdict(list)
    for line in sent.splitlines():
        record = json.loads(line)
        entries[record["key"]].append(record["value"])
    files |= {entry["path"]: base64.b64decode(entry["content"]) for entry in entries["file"]}
    return files | {entry["path"]: hub.large[entry["oid"]] for entry in entries["lfsFile"]}


def _json(content: dict) -> Answer:
    return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()


def answer(hub: Hub, path: str) -> Answer:
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
