"""A teacher in a process of its own: an OpenAI-compatible server that answers, fails and dawdles as it is told.

    python -m tests.data_tools.teacher_server RECORD [SCRIPT]

It prints its URL, and writes a line of JSON to RECORD for every request as soon as it is answered. SCRIPT is a JSON
object:
    moods: what the first requests meet, one after the other
    by_text: what a request meets in whose last message a text occurs
    at_random: [share, seed, moods...]: that share of the other requests meets one of these
    delay: seconds before each answer
    world: whether it is the quick start's teacher
    once: whether a text of by_text is met once only
A mood is a status, a name of MOODS, or [429, "Retry-After"].
"""

import json
import random
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def answer_to(prompt: str) -> str:
    """Names the prompt, in two languages."""
    return f"The answer to “{prompt}” is here. 答案。"


def quick_start_answer(prompt: str) -> str:
    """What the quick start's teacher says most often."""
    from examples.quickstart.world import World

    answers = World(0).teacher_answers(prompt)
    return max(answers, key=answers.__getitem__)


# What a message and its end look like.
MOODS = {
    "length": lambda text: ({"content": text[:5]}, "length"),
    "filter": lambda text: ({"content": text[:5]}, "content_filter"),
    "refuse": lambda text: ({"content": "I'm sorry, but I can't help with that."}, "stop"),
    "拒绝": lambda text: ({"content": "很抱歉，我无法提供这方面的帮助。"}, "stop"),
    "refusal": lambda text: ({"content": None, "refusal": "No."}, "stop"),
    "empty": lambda text: ({"content": " \n"}, "stop"),
    "null": lambda text: ({"content": None}, "stop"),
    "reason": lambda text: ({"content": text, "reasoning_content": "Let me think. 让我想想。"}, "stop"),
    "think": lambda text: ({"content": f"<think>\nHm.\n</think>\n\n{text}"}, "stop"),
    "surrogate": lambda text: ({"content": f"{text} \ud83d"}, "stop"),
    "parts": lambda text: ({"content": [{"type": "thinking"}, {"type": "text", "text": text}]}, "stop"),
    "lines": lambda text: ({"content": "one\u2028two\x85three\r\n四\x00"}, "stop"),
}


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, record: str, script: dict):
        self.record, self.script, self.lock = Path(record), script, threading.Lock()
        self.answer = quick_start_answer if script.get("world") else answer_to
        self.moods, self.met = list(script.get("moods", [])), set()
        share, seed, *self.random_moods = script.get("at_random", [0, 0])
        self.share, self.random = share, random.Random(seed)
        super().__init__(("127.0.0.1", 0), Handler)

    def handle_error(self, request, client_address):
        """Clients that are killed are no news."""

    def mood(self, text: str):
        with self.lock:
            if self.moods:
                return self.moods.pop(0)
            for part, mood in self.script.get("by_text", {}).items():
                if part in text and not (self.script.get("once") and part in self.met):
                    self.met.add(part)
                    return mood
            return self.random.choice(self.random_moods) if self.random.random() < self.share else "ok"

    def write(self, **line) -> None:
        with self.lock, self.record.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time(), **line}) + "\n")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status: int, body: str, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body.encode())), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body.encode())

    def do_GET(self):
        wrong = self.server.script.get("key") not in (None, self.headers.get("Authorization"))
        self.reply(401 if wrong else 404, f"no models here for {self.headers.get('Authorization')}")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        mood = self.server.mood(text)
        about = {"text": text, "mood": mood, "body": body, "auth": self.headers.get("Authorization")}
        self.server.write(began=True, **about)
        time.sleep(self.server.script.get("delay", 0))
        with suppress(BrokenPipeError, ConnectionResetError):
            if self.meet(mood, text):
                self.server.write(answered=True, **about)

    def meet(self, mood, text: str) -> bool:
        """Whether it was answered with a chat completion."""
        status, *asked = mood if isinstance(mood, list) else [mood]
        if isinstance(status, int):
            said = {"message": f"mood {status} for {self.headers.get('Authorization')}"}
            said |= {"code": asked.pop()} if asked and status != 429 else {}
            headers = {"Retry_After": str(asked[0])} if asked else {}
            self.reply(status, json.dumps({"error": said}), Location="/elsewhere", **headers)
        elif mood == "no credit":
            self.reply(429, '{"error": {"code": "insufficient_quota", "message": "pay"}}')
        elif mood == "hang up":
            self.close_connection = True
            self.connection.close()
        elif mood == "half":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            self.close_connection = True
        elif mood == "html":
            self.reply(200, "<html>busy</html>")
        elif mood == "error200":
            self.reply(200, '{"error": {"code": 502, "message": "upstream"}}')
        elif mood == "drip":
            self.drip()
        elif mood == "sleep":
            time.sleep(3)
        else:
            self.complete(mood, text)
            return True
        return False

    def drip(self) -> None:
        """Blanks that keep the connection open."""
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for _ in range(40):
            self.wfile.write(b"1\r\n\n\r\n")
            time.sleep(0.1)
        self.close_connection = True

    def complete(self, mood: str, text: str) -> None:
        message, finish = MOODS.get(mood, lambda text: ({"content": text}, "stop"))(self.server.answer(text))
        reply = {
            "model": "teacher-2026",
            "choices": [{"index": 0, "message": {"role": "assistant", **message}, "finish_reason": finish}],
        }
        if mood != "no usage":
            reply["usage"] = {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30}
        self.reply(200, json.dumps(reply))


if __name__ == "__main__":
    server = Server(sys.argv[1], json.loads(sys.argv[2]) if len(sys.argv) > 2 else {})
    print(f"http://127.0.0.1:{server.server_address[1]}/v1", flush=True)
    server.serve_forever(0.05)
