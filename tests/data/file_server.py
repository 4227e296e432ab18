"""A file server in a process of its own that breaks off, refuses and changes files on demand.

    python tests/data/file_server.py FOLDER [--faults FILE:FAULT,...]

Prints its port. FAULT is one of 404, 500 (on every request), once (500 on the first request), cut (half of
the body under the full length), changed (another byte), empty. Every request is one line of
FOLDER/requests.log.
"""

import argparse
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FOLDER, FAULTS, SEEN = Path("."), {}, Counter()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        SEEN[name] += 1
        with (FOLDER / "requests.log").open("a") as log:
            log.write(name + "\n")
        fault = FAULTS.get(name, "")
        path = FOLDER / name
        if fault == "404" or not path.is_file():
            return self.reply(404, b"no such file")
        if fault == "500" or (fault == "once" and SEEN[name] == 1):
            return self.reply(500, b"it broke")
        body = path.read_bytes()
        if fault == "changed":
            body = body[:-1] + b"?"
        if fault == "empty":
            body = b""
        return self.reply(200, body, cut=fault == "cut")

    def reply(self, status: int, body: bytes, *, cut: bool = False) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)

    def log_message(self, format: str, *args) -> None:
        pass


@contextmanager
def serving(folder: Path, **faults: str) -> Iterator[str]:
    """A server over ``folder``; its base URL. Faults by file name, `/` and `.` written `__` and `_dot_`."""
    named = {name.replace("__", "/").replace("_dot_", "."): fault for name, fault in faults.items()}
    words = ["--faults", ",".join(f"{name}:{fault}" for name, fault in named.items())] if named else []
    process = subprocess.Popen(
        [sys.executable, "-S", __file__, str(folder), *words], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()


def main() -> None:
    global FOLDER
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--faults", default="")
    args = parser.parse_args()
    FOLDER = Path(args.folder)
    FAULTS.update(part.rsplit(":", 1) for part in args.faults.split(",") if part)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
