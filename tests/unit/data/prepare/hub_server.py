"""A server on this machine that answers as the hub does where huggingface_hub downloads a file of a data set.

`HEAD` and `GET /datasets/<owner>/<name>/resolve/<revision>/<file>` redirect to where the content is, with the commit,
the checksum and the size in the hub's headers; the content comes in ranges. It can break, refuse and lie.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

COMMIT = "1234567890abcdef1234567890abcdef12345678"


@dataclass
class Hub:
    """What the server has and how it is to behave; and what it was asked."""

    files: dict[str, bytes] = field(default_factory=dict)  # "owner/name/path in it" -> content
    breaks: int = 0  # so many contents break off in the middle
    refuses: int = 0  # so many contents are answered with 503
    alters: int = 0  # so many contents have one byte changed
    checksum: str | None = None  # named for every file; its own if absent
    address: str = ""
    content_address: str = ""
    requests: list[str] = field(default_factory=list)  # "METHOD path [range]"

    def contents(self) -> list[str]:
        """The requests for content."""
        return [request for request in self.requests if request.startswith("GET /content/")]


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """The hub at `hub.address`, and the content at an address of its own, as the hub's is."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    with _served(handler) as hub.address, _served(handler) as hub.content_address:
        yield hub


@contextmanager
def _served(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None: ...

    def _answer(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".rstrip())
        if found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path):
            repository, revision, path = found.groups()
            self._metadata(f"{repository}/{path}", revision)
        elif found := re.fullmatch(r"/content/(.+)", self.path):
            self._content(self.hub.files[found[1]])
        else:
            self._end(404)

    def _metadata(self, name: str, revision: str) -> None:
        if name not in self.hub.files or revision not in ("main", COMMIT):
            code = "EntryNotFound" if revision in ("main", COMMIT) else "RevisionNotFound"
            self._end(404, {"X-Error-Code": code, "X-Repo-Commit": COMMIT})
            return
        content = self.hub.files[name]
        checksum = self.hub.checksum or hashlib.sha256(content).hexdigest()
        self._end(
            302,
            {
                "Location": f"{self.hub.content_address}/content/{name}",
                "X-Repo-Commit": COMMIT,
                "X-Linked-Etag": f'"{checksum}"',
                "X-Linked-Size": str(len(content)),
                "ETag": '"of the pointer"',
            },
        )

    def _content(self, content: bytes) -> None:
        if self.hub.refuses:
            self.hub.refuses -= 1
            self._end(503)
            return
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        body = content[start:]
        if self.hub.alters:
            self.hub.alters -= 1
            body = bytes([body[0] ^ 1]) + body[1:]
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(body)))
        if "Range" in self.headers:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.hub.breaks:
            self.hub.breaks -= 1
            body = body[: len(body) // 2]
            self.close_connection = True
        self.wfile.write(body)

    def _end(self, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": "0", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
