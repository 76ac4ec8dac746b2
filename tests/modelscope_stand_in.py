"""ModelScope in a thread, on top of the stand-in of the hub: the addresses of its interface that a download uses.

It answers `/api/v1/models/ID/repo/files`, `/api/v1/datasets/ID/repo/tree` (names, sizes, checksums) and
`/api/v1/KIND/ID/repo?FilePath=...`. As the real one does, it sends large files on to another address, where a request
for the rest of a file is answered with the rest, a `Content-Range` and the status 200; other files always come whole.
"""

import hashlib
import json
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, urlsplit

from hub_stand_in import LARGE, HubStandIn, send, send_file


@dataclass
class ModelScopeStandIn(HubStandIn):
    """Serves `repos`, as HubStandIn does, at ModelScope's addresses."""

    partial_status: int = 200

    def serve(self, request: BaseHTTPRequestHandler) -> None:
        """Answers a GET or HEAD."""
        address = urlsplit(request.path)
        if address.path.startswith("/cdn/"):
            super().serve(request)
            return
        kind, owner, name, *what = address.path.removeprefix("/api/v1/").split("/")
        key, query = f"{kind}/{owner}/{name}", parse_qs(address.query)
        listing = "repo/tree" if kind == "datasets" else "repo/files"
        repo = self.repos.get(key)
        if repo is None or query.get("Revision") != ["master"]:
            send(request, 404, json.dumps({"Code": 10010205001, "Message": "not found", "Success": False}).encode())
        elif "/".join(what) == listing and query.get("Recursive") == ["True"]:
            files = [{"Path": "assets", "Type": "tree", "Size": 0}, *map(describe, repo, repo.values())]
            send(request, 200, json.dumps({"Code": 200, "Data": {"Files": files}, "Success": True}).encode())
        elif what == ["repo"] and query["FilePath"][0] in repo:
            [file] = query["FilePath"]
            if file.endswith(LARGE):
                send(request, 302, b"", {"Location": f"{self.endpoint}/cdn/{key}/{file}"})
            else:
                del request.headers["Range"]
                send_file(self, request, file, repo[file])
        else:
            send(request, 404, b"")


def describe(name: str, content: bytes) -> dict:
    """A file as ModelScope's interface tells it."""
    about = {"Name": name.rsplit("/", 1)[-1], "Path": name, "Type": "blob", "IsLFS": name.endswith(LARGE)}
    return about | {"Size": len(content), "Sha256": hashlib.sha256(content).hexdigest().upper()}
