"""What stands before the web page: who may ask, how large a request may be, how long an upload lies on the disk."""

import contextlib
import ipaddress
import json
import threading
from collections import Counter
from itertools import accumulate
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse

MOST_FILES, MOST_BYTES = 100, 256 * 2**20  # of uploads that nobody has asked about yet


class Uploads:
    """The files in gradio's upload folder. Their names are hashes of the content, so two visitors may share a file.

    A file is deleted when all its uploads have been asked about; beyond MOST_FILES or MOST_BYTES the oldest are.
    """

    def __init__(self, folder: Path):
        self.folder, self.waiting, self.lock = folder, Counter(), threading.Lock()

    def add(self, answer: bytes):
        """Counts the uploads that gradio's answer to a request lists."""
        with contextlib.suppress(ValueError), self.lock:  # not JSON: the request was refused
            paths = json.loads(answer)
            self.waiting.update(map(str, paths) if isinstance(paths, list) else ())

    def asked(self, path: Path):
        """Deletes an upload that was read, unless it was uploaded once more. Only uploads: browsers name the paths."""
        with self.lock:
            self.waiting[str(path)] -= 1
            if self.waiting[str(path)] <= 0:
                self._delete(path)

    def keep_bounds(self):
        """Deletes the oldest files beyond the bounds, those of broken-off uploads among them."""
        # gradio deletes files of an hour ago meanwhile; the next request tries again.
        with self.lock, contextlib.suppress(FileNotFoundError):
            files = sorted(filter(Path.is_file, self.folder.rglob("*")), key=lambda path: -path.stat().st_mtime_ns)
            sizes = list(accumulate(path.stat().st_size for path in files))
            for number, (path, size) in enumerate(zip(files, sizes, strict=True), start=1):
                if number > MOST_FILES or size > MOST_BYTES:
                    self._delete(path)

    def _delete(self, path: Path):
        self.waiting.pop(str(path), None)
        if self.folder in path.parents and ".." not in path.parts:
            path.unlink(missing_ok=True)
            if path.parent != self.folder:
                with contextlib.suppress(OSError):  # another file of this content came under another name
                    path.parent.rmdir()


def is_loopback(name: str) -> bool:
    """Tells whether a host name means this machine alone."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(name).is_loopback
    return name.lower() == "localhost"


class Guard:
    """ASGI middleware that refuses requests from other sites and too large ones, and keeps the uploads in bounds.

    Args:
        most_bytes: Of a request, which has to say its length.
        is_local: Whether the page may be asked for under this machine's own names only. A name that leads here but is
            another (DNS rebinding), and a request that another site's page makes, are then refused.
    """

    def __init__(self, app, uploads: Uploads, most_bytes: int, is_local: bool):
        self.app, self.uploads, self.most_bytes, self.is_local = app, uploads, most_bytes, is_local

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers, answer = Headers(scope=scope), []
        length = headers.get("content-length", "0")
        is_sized = length.isdecimal() and len(length) < 12 and "transfer-encoding" not in headers
        if not is_sized or int(length) > self.most_bytes:
            return await PlainTextResponse("", 413)(scope, receive, send)
        if self.is_local and not is_own(headers):
            text = "Open this page under the address that its start printed."
            return await PlainTextResponse(text, 403)(scope, receive, send)
        if "/file=" in scope["path"]:
            # An upload may be deleted while the page asks for it: starlette then answers 500 and raises this.
            with contextlib.suppress(FileNotFoundError, RuntimeError):
                await self.app(scope, receive, send)
            return
        if not scope["path"].rstrip("/").endswith(("/upload", "/deep_link")):  # both write files
            return await self.app(scope, receive, send)

        async def send_counted(message: dict):
            answer.append(message.get("body", b""))
            if message["type"] == "http.response.body" and not message.get("more_body"):
                self.uploads.add(b"".join(answer))  # before anybody can ask about them
            await send(message)

        try:
            await self.app(scope, receive, send_counted)
        finally:
            self.uploads.keep_bounds()


def is_own(headers: Headers) -> bool:
    """Tells whether a request goes to one of this machine's own names, and comes from the page itself."""
    host, origin = (headers.get(name, "").lower() for name in ("host", "origin"))
    try:
        return is_loopback(urlsplit(f"//{host}").hostname or "") and (not origin or urlsplit(origin).netloc == host)
    except ValueError:
        return False
