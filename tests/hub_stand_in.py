"""A model hub in a thread: the few addresses of the real one's HTTP interface that a download uses.

It answers `/api/models/ID` and `/api/datasets/ID` (file names, sizes, checksums), `/ID/resolve/COMMIT/FILE`, and sends
large files on to another address by a redirect, as the real one does. It can be told to misbehave.
"""

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
LARGE = (".bin", ".jsonl", ".parquet", ".pth", ".safetensors", ".zip")


@dataclass
class HubStandIn:
    """Serves `repos` ("models/ID" or "datasets/ID" -> file name -> content) between `with` and its end.

    Attributes:
        cut: file name -> after how many bytes its connection is closed, once.
        hold: file name -> after how many bytes it stalls, once; `holding` is set by then.
        damage: file names that arrive with a wrong byte, once each.
        ranges: whether requests for a part of a file are understood.
        partial_status: the status of an answer with a part of a file.
        private: repositories that are private; only `describe` says it.
        gets: (file name, Range header or None) of every request for a file's content.
    """

    repos: dict[str, dict[str, bytes]]
    cut: dict[str, int] = field(default_factory=dict)
    hold: dict[str, int] = field(default_factory=dict)
    damage: set[str] = field(default_factory=set)
    ranges: bool = True
    partial_status: int = 206
    private: set[str] = field(default_factory=set)
    gets: list[tuple[str, str | None]] = field(default_factory=list)
    holding: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "HubStandIn":
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.serve(self)

            do_HEAD = do_GET

            def do_POST(self) -> None:
                hub.receive(self)

            do_PUT = do_POST

            def log_message(self, *args: object) -> None:
                """Quiet: pytest shows what the script prints."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def serve(self, request: BaseHTTPRequestHandler) -> None:
        """Answers a GET or HEAD."""
        answer(self, request)

    def receive(self, request: BaseHTTPRequestHandler) -> None:
        """Answers a POST or PUT; hub_uploads.py can do it."""
        send(request, 405, b"")

    def __exit__(self, *exception: object) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()


def answer(hub: HubStandIn, request: BaseHTTPRequestHandler) -> None:
    """Finds what an address means."""
    address = urlsplit(request.path)
    path = unquote(address.path).lstrip("/")
    if path.startswith("api/"):
        repo = hub.repos.get(path.removeprefix("api/").removesuffix("/revision/main"))
        if repo is None:
            send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        else:
            about = describe(path, repo, "blobs" in address.query, hub.private)
            send(request, 200, json.dumps(about).encode())
    elif path.startswith("cdn/"):
        _, kind, owner, name, file = path.split("/", 4)
        send_file(hub, request, file, hub.repos[f"{kind}/{owner}/{name}"][file])
    else:
        before, _, file = path.replace("/resolve/main/", f"/resolve/{COMMIT}/").partition(f"/resolve/{COMMIT}/")
        repo_key = before if before.startswith("datasets/") else f"models/{before}"
        content = hub.repos.get(repo_key, {}).get(file)
        if content is None:
            send(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
        elif file.endswith(LARGE):
            linked = {"X-Linked-Etag": hashlib.sha256(content).hexdigest(), "X-Linked-Size": str(len(content))}
            send(request, 302, b"", {"Location": f"{hub.endpoint}/cdn/{repo_key}/{file}", **linked})
        else:
            send_file(hub, request, file, content)


def describe(path: str, repo: dict[str, bytes], with_blobs: bool, private: set[str]) -> dict:
    """A repository as the hub's interface tells it."""
    siblings = []
    for name, content in repo.items():
        entry: dict = {"rfilename": name}
        if with_blobs:
            sha256 = hashlib.sha256(content).hexdigest()
            lfs = {"sha256": sha256, "size": len(content), "pointerSize": 130}
            blob = f"version 1\nsha256:{sha256}".encode() if name.endswith(LARGE) else content
            entry |= {"size": len(content), "blobId": hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()}
            entry |= {"lfs": lfs} if name.endswith(LARGE) else {}
        siblings.append(entry)
    repo_id = path.removesuffix("/revision/main").split("/", 2)[2]
    return {
        "id": repo_id,
        "sha": COMMIT,
        "private": repo_id in private,
        "tags": [],
        "downloads": 0,
        "likes": 0,
        "siblings": siblings,
    }


def send(request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
    """A whole small answer."""
    request.send_response(status)
    for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **(headers or {})}.items():
        request.send_header(name, value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)


def send_file(hub: HubStandIn, request: BaseHTTPRequestHandler, name: str, content: bytes) -> None:
    """A file's content, or the rest of it, with the trouble that was asked for."""
    if request.command == "HEAD":
        about = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Content-Length": str(len(content))}
        send(request, 200, b"", about)
        return
    wanted = request.headers.get("Range")
    hub.gets.append((name, wanted))
    if name in hub.damage:
        hub.damage.remove(name)
        content = content[:-1] + bytes([content[-1] ^ 1])
    start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and hub.ranges else 0
    request.send_response(hub.partial_status if start else 200)
    if start:
        request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
    request.send_header("Content-Length", str(len(content) - start))
    request.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
    request.end_headers()
    stop = hub.cut.pop(name, None) or hub.hold.get(name) or len(content)
    request.wfile.write(content[start:stop])
    if stop < len(content):
        request.close_connection = True
        if hub.hold.pop(name, None):
            request.wfile.flush()
            hub.holding.set()
            hub.released.wait(60)
