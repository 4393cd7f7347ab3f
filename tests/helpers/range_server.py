"""A file server with range requests in a thread, which is slow, refuses, or cuts answers off when a test says so."""

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class RangeServer(ThreadingHTTPServer):
    """The files below `folder` at `address`.

    requests: the (method, path, range) of each request so far; the range is None for a complete file.
    latency: seconds before each answer.
    fault: called with each request; what it returns is done: "cut" sends half of the body, an HTTP status is sent
        instead of the file, None sends the file.
    ranges: whether parts of files are sent.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[tuple[str, str, str | None]] = []
        self.latency = 0.0
        self.fault: Callable[[str, str, str | None], str | int | None] = lambda *request: None
        self.ranges = True

    def parts(self) -> list[tuple[str, str]]:
        """The path and range of each request for a part of a file."""
        return [(path, part) for method, path, part in self.requests if method == "GET" and part]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self) -> None:
        server, file = self.server, self.server.folder / self.path.lstrip("/")
        part = self.headers.get("Range") if server.ranges else None
        request = self.command, self.path, part
        server.requests.append(request)
        time.sleep(server.latency)
        fault = server.fault(*request)
        if isinstance(fault, int) or not file.is_file():
            self.send_response(fault if isinstance(fault, int) else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        status = file.stat()
        start, end = 0, status.st_size
        if part:
            first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", part).groups())
            start, end = first, min(last + 1, end)
        self.send_response(206 if part else 200)
        self.send_header("ETag", f'"{status.st_mtime_ns:x}-{status.st_size:x}"')
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if self.command == "GET":
            with file.open("rb") as content:
                content.seek(start)
                body = content.read(end - start)
            with contextlib.suppress(OSError):  # who asked has given up
                self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
            self.close_connection = fault == "cut"


@contextmanager
def serve(folder: Path) -> Iterator[RangeServer]:
    """A server of the files below `folder` while the block runs."""
    server = RangeServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
