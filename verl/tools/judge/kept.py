"""What a run of the judge found out, kept as it comes, so that a rerun does only what is missing."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any


class Kept:
    """Replies in a JSONL file, one per line, by a digest of the whole request; safe among threads.

    A line that a killed run left unfinished is passed over.
    """

    def __init__(self, path: Path):
        self.path, self.lock = path, threading.Lock()
        self.replies: dict[str, Any] = {}
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        for line in text.split("\n"):
            try:
                row = json.loads(line)
                self.replies[row["request"]] = row["reply"]
            except (ValueError, KeyError, TypeError):
                continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if text and not text.endswith("\n"):
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")

    def put(self, request: str, reply: Any, **about: Any) -> None:
        """Keep a reply, which JSON can hold; on disk when this returns."""
        line = json.dumps({"request": request, **about, "reply": reply}, ensure_ascii=False)
        with self.lock, self.path.open("a", encoding="utf-8") as file:
            self.replies[request] = reply
            file.write(line + "\n")


def digest(body: Any) -> str:
    """What a request is known by."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def model_files(folder: Path) -> str:
    """What a model is known by: a digest of its files' names, sizes and times."""
    files = [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".bin", ".json")]
    stats = {str(file.relative_to(folder)): (file.stat().st_size, file.stat().st_mtime_ns) for file in files}
    return digest(sorted(stats.items()))
