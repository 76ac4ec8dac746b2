"""What stands before the web page: other sites and too large requests are refused, uploads counted and bounded."""

import contextlib
import ipaddress
import json
import socket
import threading
from collections import Counter
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse

MOST_FILES, MOST_BYTES = 100, 256 * 2**20  # of uploads that no question has used yet


def is_loopback(host: str) -> bool:
    """Tells whether an address or name means this machine alone; raises OSError for an unknown name."""
    return ipaddress.ip_address(socket.getaddrinfo(host, None)[0][4][0]).is_loopback


class Uploads:
    """Counts the files in gradio's upload folder: their names are hashes, so two visitors may share one.

    A file is deleted once all its uploads were used; beyond MOST_FILES or MOST_BYTES the oldest are.
    """

    def __init__(self, folder: Path):
        self.folder, self.waiting, self.lock = folder, Counter(), threading.Lock()

    def add(self, answer: bytes):
        """Counts the uploads that gradio's answer to a request lists."""
        with contextlib.suppress(ValueError), self.lock:  # not JSON: a refusal
            self.waiting.update(list(json.loads(answer)))

    def use(self, path: Path):
        """Deletes a file that a question used, unless another upload of it waits."""
        with self.lock:
            self.waiting[str(path)] -= 1
            if self.waiting[str(path)] <= 0:
                self._delete(path)

    def enforce_bounds(self):
        """Deletes the oldest files beyond the bounds, leftovers of interrupted uploads included."""
        # gradio itself deletes files an hour old: where it was faster, the next request tries again.
        with self.lock, contextlib.suppress(FileNotFoundError):
            files = sorted(filter(Path.is_file, self.folder.rglob("*")), key=lambda path: -path.stat().st_mtime_ns)
            total = 0
            for number, path in enumerate(files, start=1):
                total += path.stat().st_size
                if number > MOST_FILES or total > MOST_BYTES:
                    self._delete(path)

    def _delete(self, path: Path):
        self.waiting.pop(str(path), None)
        if self.folder in path.resolve().parents:  # the path comes from a browser
            path.unlink(missing_ok=True)


class Guard:
    """ASGI middleware that refuses too large requests and those of other sites, and counts and bounds the uploads."""

    def __init__(self, app, uploads: Uploads, most_bytes: int, is_local: bool):
        self.app, self.uploads, self.most_bytes, self.is_local = app, uploads, most_bytes, is_local

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers, path = Headers(scope=scope), scope["path"].rstrip("/")
        answer, has_started = [], False
        if "transfer-encoding" in headers or int(headers.get("content-length", 0)) > self.most_bytes:
            return await PlainTextResponse("", 413)(scope, receive, send)
        if self.is_local and headers.get("origin", "").lower() not in ("", f"http://{headers['host'].lower()}"):
            return await PlainTextResponse("This page answers to no other site.", 403)(scope, receive, send)

        async def send_counted(message: dict):
            nonlocal has_started
            has_started = True
            if path.endswith("/upload"):
                answer.append(message.get("body", b""))
                if message["type"] == "http.response.body" and not message.get("more_body"):
                    self.uploads.add(b"".join(answer))  # before anybody can ask about them
            await send(message)

        try:
            await self.app(scope, receive, send_counted)
        except (RuntimeError, FileNotFoundError) as error:  # an upload was deleted while the page asked for it
            if "/file=" not in path or FileNotFoundError not in map(type, (error, error.__context__)):
                raise
            if not has_started:
                await PlainTextResponse("", 404)(scope, receive, send)
        finally:
            if path.endswith(("/upload", "/deep_link")):  # both write files
                self.uploads.enforce_bounds()
