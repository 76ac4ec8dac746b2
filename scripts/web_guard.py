"""What stands before the web page: who may ask, how large a request may be, how long an upload lies on the disk."""

import contextlib
import ipaddress
import json
import threading
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

MOST_FILES, MOST_BYTES = 100, 256 * 2**20  # of uploads that nobody has asked about yet


class Uploads:
    """The files in gradio's upload folder. Its names are hashes of contents, so that two visitors may share a file.

    A file goes when all its uploads have been asked about; beyond MOST_FILES or MOST_BYTES the oldest go.
    """

    def __init__(self, folder: Path):
        self.folder, self.unasked, self.lock = folder, Counter(), threading.Lock()

    def came(self, answer: bytes):
        """Counts the uploads that gradio's answer to a request names."""
        with contextlib.suppress(ValueError), self.lock:  # not JSON: the request was refused
            paths = json.loads(answer)
            self.unasked.update(filter(self.is_upload, paths if isinstance(paths, list) else []))

    def is_upload(self, path) -> bool:
        return isinstance(path, str) and self.folder in Path(path).parents and ".." not in Path(path).parts

    def asked(self, path: Path):
        """Deletes an upload that has been read, unless it was uploaded once more; other files are nobody's to name."""
        with self.lock:
            self.unasked[str(path)] -= 1
            if self.unasked[str(path)] <= 0 and self.is_upload(str(path)):
                self._delete(path)
            self.unasked += Counter()  # without those at 0

    def keep_bounds(self):
        """Deletes the oldest files beyond the bounds, those of broken-off uploads among them."""
        with self.lock:
            files, size = [], 0
            for path in self.folder.rglob("*"):
                with contextlib.suppress(FileNotFoundError):  # gradio deletes those of an hour ago
                    files += [(path.stat(), path)] * path.is_file()
            for number, (stat, path) in enumerate(sorted(files, key=lambda file: -file[0].st_mtime_ns), start=1):
                size += stat.st_size
                if number > MOST_FILES or size > MOST_BYTES:
                    self._delete(path)

    def _delete(self, path: Path):
        self.unasked.pop(str(path), None)
        path.unlink(missing_ok=True)
        if path.parent != self.folder:
            with contextlib.suppress(OSError):  # another file of this content came under another name
                path.parent.rmdir()


def own_names(host: str) -> set[str] | None:
    """Returns what a browser on this machine calls a loopback address to listen on; None for any other."""
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return {"localhost", "127.0.0.1", "::1", host}
    return {"localhost", "127.0.0.1", "::1"} if host.lower() == "localhost" else None


class Guard:
    """ASGI middleware that refuses what is too large or comes from another site, and keeps the uploads in bounds.

    Args:
        most_bytes: Of a request.
        names: The names under which the page may be asked for, see `own_names`; None: any. A name that leads here but
            is another (DNS rebinding), and a request that another site's page makes, are then refused.
    """

    def __init__(self, app, uploads: Uploads, most_bytes: int, names: set[str] | None):
        self.app, self.uploads, self.most_bytes, self.names = app, uploads, most_bytes, names

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, left, answer = dict(scope["headers"]), self.most_bytes, []
        length = headers.get(b"content-length", b"0")
        is_small = length.isdigit() and int(length) <= left
        if not is_small or not self.is_ours(headers):
            status, text = (403, "Open this page under the address that its start printed.") if is_small else (413, "")
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": text.encode()})
            return
        if not scope["path"].rstrip("/").endswith(("/upload", "/deep_link")):  # whatever writes files
            await self.app(scope, receive, send)
            return

        async def receive_bounded() -> dict:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            return message if left >= 0 else {"type": "http.disconnect"}

        async def send_counted(message: dict):
            answer.append(message.get("body", b""))
            if message["type"] == "http.response.body" and not message.get("more_body"):
                self.uploads.came(b"".join(answer))  # before anybody can ask about them
            await send(message)

        try:
            await self.app(scope, receive_bounded, send_counted)
        finally:
            self.uploads.keep_bounds()

    def is_ours(self, headers: dict[bytes, bytes]) -> bool:
        """Tells whether a request goes to one of the page's own names, and comes from its own pages."""
        if self.names is None:
            return True
        host, origin = (headers.get(name, b"").decode("latin-1").lower() for name in (b"host", b"origin"))
        try:
            return urlsplit(f"//{host}").hostname in self.names and (not origin or urlsplit(origin).netloc == host)
        except ValueError:
            return False
