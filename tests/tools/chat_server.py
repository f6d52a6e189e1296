"""A chat completions server in this process, with moods."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """Answers chat completions: `verdict` from the question's text, and `moods`, statuses to answer with before."""

    def __init__(self):
        self.moods, self.asked, self.keys, self.lock = [], [], set(), threading.Lock()
        self.verdict = lambda text: "VERDICT: TIE"
        self.raw, self.hold, self.inside, self.most = None, None, 0, 0
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def reply(self, status: int, body: str, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body.encode())), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())

    def do_GET(self):
        self.reply(404, "no models here")

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.asked.append(body)
            server.keys.add(self.headers.get("Authorization"))
            mood = server.moods.pop(0) if server.moods else None
            server.inside += 1
            server.most = max(server.most, server.inside)
        if server.hold:
            server.hold.wait(5)
        with server.lock:
            server.inside -= 1
        if mood == "hang up":
            self.connection.close()
        elif mood == "sleep":
            threading.Event().wait(0.6)
        elif isinstance(mood, int):
            self.reply(mood, f"mood {mood} for {self.headers.get('Authorization')}", Location="/elsewhere")
        elif server.raw is not None:
            self.reply(200, server.raw)
        else:
            content = server.verdict(body["messages"][-1]["content"])
            self.reply(200, json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}))


def part(text: str, title: str) -> str:
    """What stands under a title of a question."""
    return text.split(f"=== {title} ===\n")[1].split(f"\n=== end of {title} ===")[0]
