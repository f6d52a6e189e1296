"""What a run of the judge found out, kept as it comes, so that a rerun does only what is missing."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

from verl.models.content import content_of_model, words_of_model


class Kept:
    """Replies in a JSONL file, one per line, by a digest of the whole request; safe among threads.

    A line that a killed run left unfinished is passed over.
    """

    def __init__(self, path: Path):
        self.path, self.lock = path, threading.Lock()
        self.replies: dict[str, Any] = {}
        # A killed run may have left half a character.
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
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


def model_content(path: str | Path) -> str:
    """What a model is known by, wherever it lies; adapters with their base."""
    return digest([content_of_model(str(path)).digest, words_of_model(str(path))])
