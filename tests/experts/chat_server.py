"""A chat server in a process of its own that answers like an expert and misbehaves on demand.

    python tests/experts/chat_server.py --log LOG [--faults 429,500,cut,html,slow] [--key KEY]
                                        [--delay SECONDS] [--answers FILE] [--port PORT]
                                        [--retry_after SECONDS]

Prints its port. The n-th prompt that it meets fails in the n-th way of ``--faults`` (over and over) on its
first request and is answered on its second; "ok" is no fault. LOG gets one JSON line a request: what was
asked (digest, and the fields beside model and messages), how it was answered, when. FILE holds a JSON list of
[part of a prompt, answer].
"""

import argparse
import ast
import hashlib
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

RETRY_AFTER = 0.8


def written(user: str) -> str:
    """An answer that fits the prompt: personas for the speakers it lists, or the three blocks."""
    if names := re.findall(r'^ {4}("(?:[^"\\]|\\.)*"): "\.\.\."', user.rpartition("```python")[2], re.M):
        scene = {
            name: f"{name} seems calm, is probably grown up, and speaks in plain words."
            for name in map(ast.literal_eval, names)
        }
        scene["Theme"] = "people who talk about an everyday matter"
        return f"They talk.\n```python\n{scene!r}\n```"
    labels = re.findall(r"^Emotion labels: (.*)$", user, re.M)[-1].split(", ")
    draw = hashlib.sha256(user.encode()).digest()
    said, own = labels[draw[0] % len(labels)], labels[draw[1] % len(labels)]
    return (
        f"1. The words of the last turn point one way.\n2. It touches me a little.\n3. I answer plainly.\n"
        f"<emotion>{said}:0.90</emotion>\n<self_emotion>{own}:0.50</self_emotion>\n"
        f"<response>We will look at number {draw.hex()[:6]} tomorrow morning.</response>"
    )


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_POST(self) -> None:
        options = self.server.options
        body = self.rfile.read(int(self.headers["content-length"]))
        request = json.loads(body)
        prompt = json.dumps(request["messages"])
        digest = hashlib.sha256(f"{prompt}{request.get('seed')}".encode()).hexdigest()[:12]
        fault = self.server.fault_of(digest)
        asked = {name: value for name, value in request.items() if name not in ("model", "messages")}
        self.server.note(digest=digest, fault=fault, model=request["model"], asked=asked, start=True)
        if options.key and self.headers.get("authorization") != f"Bearer {options.key}":
            words = f"wrong key: {self.headers.get('authorization')}"
            return self.reply(401, {"error": {"message": words}}, {})
        if self.path != "/v1/chat/completions":
            return self.reply(404, {"error": {"message": f"no {self.path}"}}, {})
        if fault == "429":
            wait = {"Retry-After": str(options.retry_after)}
            return self.reply(429, {"error": {"message": "slow down"}}, wait)
        if fault == "busy":
            reset = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "800ms"}
            return self.reply(429, {"error": {"message": "slow down"}}, reset)
        if fault == "500":
            return self.reply(500, {"error": "it broke"}, {})
        if fault == "400":
            return self.reply(400, {"error": {"message": "this prompt breaks a rule"}}, {})
        if fault == "403":
            return self.reply(403, {"error": {"message": "no more money"}}, {})
        if fault == "nested":
            return self.raw(200, b"[" * 200_000)
        if fault == "html":
            return self.raw(200, b"<html>not JSON</html>")
        if fault == "empty":
            return self.raw(200, b'{"choices": []}')
        if fault == "slow":
            time.sleep(3600)
        time.sleep(options.delay)
        text = next((answer for part, answer in self.server.answers if part in prompt), None)
        text = text if text is not None else written(request["messages"][-1]["content"])
        usage = {"prompt_tokens": len(prompt) // 4, "completion_tokens": len(text) // 4}
        if fault in ("infinite", "negative"):
            usage["prompt_tokens"] = float("inf") if fault == "infinite" else -1
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        body = json.dumps(
            {"id": "x", "model": request["model"], "choices": [choice], "usage": usage}
        ).encode()
        if fault == "cut":
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            return None
        spent = {
            "x-ratelimit-remaining-requests": "0",
            "x-ratelimit-reset-requests": f"{options.retry_after}s",
        }
        self.raw(200, body, spent if fault == "spent" else None)
        return self.server.note(digest=digest, fault=fault, model=request["model"], answered=True)

    def reply(self, status: int, record: dict, headers: dict) -> None:
        self.raw(status, json.dumps(record).encode(), headers)

    def raw(self, status: int, body: bytes, headers: dict | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, options: argparse.Namespace):
        super().__init__(("127.0.0.1", options.port), Handler)
        self.options = options
        self.answers = json.loads(Path(options.answers).read_text()) if options.answers else []
        self._faults = [fault for fault in options.faults.split(",") if fault]
        self._seen: dict[str, int] = {}
        self._lock = threading.Lock()

    def fault_of(self, digest: str) -> str:
        with self._lock:
            tries = self._seen[digest] = self._seen.get(digest, 0) + 1
            if not self._faults:
                return "ok"
            fault = self._faults[list(self._seen).index(digest) % len(self._faults)]
            return fault if tries == 1 or fault.isdigit() and self.options.stubborn else "ok"

    def note(self, **record) -> None:
        with self._lock, Path(self.options.log).open("a") as file:
            file.write(json.dumps(record | {"time": time.time()}) + "\n")


@contextmanager
def serving(log: Path, *words: str) -> Iterator[str]:
    """A server of its own process; its base URL."""
    process = subprocess.Popen(
        [sys.executable, "-S", __file__, "--log", str(log), *words], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
    finally:
        process.kill()
        process.wait()


def requests(log: Path) -> list[dict]:
    """The requests that began, in order."""
    return [r for r in map(json.loads, log.read_text().splitlines()) if "start" in r] if log.exists() else []


def answered(log: Path) -> list[str]:
    """Digests of the prompts that were answered, in order."""
    return [r["digest"] for r in map(json.loads, log.read_text().splitlines()) if "answered" in r]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--log", required=True)
    parser.add_argument("--faults", default="")
    parser.add_argument("--stubborn", action="store_true")
    parser.add_argument("--key", default="")
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--answers")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--retry_after", type=float, default=RETRY_AFTER)
    server = Server(parser.parse_args())
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
