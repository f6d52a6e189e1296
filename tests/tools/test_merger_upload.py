"""The merger's upload, against a server on this machine that speaks the hub's protocol."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import HfApi

from verl.model_merger import upload as uploading
from verl.model_merger.cli import main

FILES = {"config.json": b'{"a": 1}', "model.safetensors": b"\x00\x01weights", "tokenizer/词.txt": "词".encode()}


class Hub(BaseHTTPRequestHandler):
    """Takes repositories, and commits whose files all travel in the request."""

    asked: list[tuple[str, dict]]
    refuses = False

    def do_GET(self) -> None:
        self._answer({"error": "Repository not found"} if self.refuses else {}, 404 if self.refuses else 200)

    def do_POST(self) -> None:
        lines = self.rfile.read(int(self.headers["Content-Length"])).decode().splitlines()
        records = [json.loads(line) for line in lines]
        self.asked.extend((self.path, record) for record in records)
        if self.refuses:
            self._answer({"error": "Invalid username or password."}, 401)
        elif self.path.endswith("/create"):
            self._answer({"url": f"http://{self.headers['Host']}/me/student", "id": "me/student"})
        elif "/preupload/" in self.path:
            modes = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in records[0]["files"]
            ]
            self._answer({"files": modes})
        else:
            self._answer({"commitUrl": f"http://{self.headers['Host']}/me/student/commit/1", "commitOid": "1" * 40})

    def _answer(self, content: dict, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def hub(monkeypatch):
    handler = type("RecordingHub", (Hub,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(uploading, "HfApi", lambda: HfApi(endpoint=endpoint, token="hf_test"))
    yield handler
    server.shutdown()


def test_every_file_of_the_folder_arrives(hub, tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    uploading.prepare_upload("me/student", private=True)
    assert hub.asked[-1][0] == "/api/repos/create" and hub.asked[-1][1]["visibility"] == "private"
    assert uploading.upload(tmp_path, "me/student").endswith("/me/student/commit/1")
    sent = [record["value"] for path, record in hub.asked if "/commit/" in path and record["key"] == "file"]
    assert {file["path"]: base64.b64decode(file["content"]) for file in sent} == FILES


def test_a_hub_that_refuses_is_found_before_the_work(hub, tmp_path):
    hub.refuses = True
    with pytest.raises(SystemExit, match=r"--hf_upload_path: expected to write to me/student .*hf auth login"):
        main(["merge", "--backend", "fsdp", "--local_dir", str(tmp_path / "none"), "--hf_upload_path", "me/student"])


def test_a_hub_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(uploading, "HfApi", lambda: HfApi(endpoint="http://127.0.0.1:1", token="hf_test"))
    with pytest.raises(ConnectionError, match=r"me/student on http://127\.0\.0\.1:1, got"):
        uploading.prepare_upload("me/student", private=False)
