"""The hub's interface for uploads, as huggingface_hub uses it, on top of the stand-in for downloads.

It makes repositories, says which files are large, takes those by Git LFS or by Xet, and commits. What came by LFS is
checked by its SHA-256 and served by hub_stand_in.py; what came by Xet is counted, and a commit's files are then empty.
"""

import base64
import hashlib
import json
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote, urlsplit

import yaml
from hub_stand_in import COMMIT, HubStandIn, send

LFS = (".gguf", ".jpg", ".png", ".pth", ".safetensors")


@dataclass
class UploadHub(HubStandIn):
    """A hub to upload to.

    Attributes:
        tokens: access token -> "write" or "read".
        stored: SHA-256 (hex) -> content of the large files that have arrived, committed or not.
        refused: SHA-256 of files whose upload is refused, once each.
        puts: SHA-256 of every large file that was sent by LFS.
        xorbs: sizes of the blocks of large files' chunks that were sent by Xet.
        commits_fail: whether commits are refused.
        requests: method and path of every request.
        owners: who may have repositories.
    """

    tokens: dict[str, str] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    puts: list[str] = field(default_factory=list)
    xorbs: list[int] = field(default_factory=list)
    commits_fail: bool = False
    requests: list[str] = field(default_factory=list)
    owners: tuple[str, ...] = ("someone",)

    def serve(self, request: BaseHTTPRequestHandler) -> None:
        """Answers a GET or HEAD."""
        self.requests.append(f"{request.command} {request.path}")
        if "/xet-write-token/" in request.path:
            access = {"accessToken": "of xet", "exp": int(time.time()) + 3600, "casUrl": f"{self.endpoint}/cas"}
            reply(request, access)
        elif "/tree/" in request.path:
            _, _, kind, owner, name, _, _, *folder = unquote(urlsplit(request.path).path).split("/")
            list_files(request, self.repos[f"{kind}/{owner}/{name}"], "/".join(folder))
        else:
            super().serve(request)

    def receive(self, request: BaseHTTPRequestHandler) -> None:
        """Finds what an address means."""
        path = unquote(urlsplit(request.path).path).lstrip("/")
        self.requests.append(f"{request.command} {request.path}")
        if path.startswith("cas/"):
            receive_chunks(self, request, path)
            return
        if path.startswith("lfs/"):  # signed addresses: no token is sent to them
            receive_file(self, request, path.removeprefix("lfs/"))
            return
        body = request.rfile.read(int(request.headers["Content-Length"]))
        if path == "api/validate-yaml":
            validate(request, json.loads(body)["content"])
            return
        right = self.tokens.get(str(request.headers["Authorization"]).removeprefix("Bearer "))
        if right is None:
            refuse(request, 401, "Invalid credentials in Authorization header")
        elif right != "write":
            refuse(request, 403, f"no write access with {request.headers['Authorization']}")
        elif path == "api/repos/create":
            create(self, request, json.loads(body))
        elif path.endswith(".git/info/lfs/objects/batch"):
            batch = [lfs_object(self, it) for it in json.loads(body)["objects"]]
            reply(request, {"objects": batch, "transfer": "basic"})
        else:
            _, kind, owner, name, what, _ = path.split("/")
            repo = self.repos[f"{kind}/{owner}/{name}"]
            if what == "preupload":
                reply(request, {"files": [upload_mode(repo, file) for file in json.loads(body)["files"]]})
            elif self.commits_fail:
                refuse(request, 403, "not now")
            else:
                commit(self, repo, body)
                reply(request, {"commitUrl": f"{self.endpoint}/{owner}/{name}/commit/{COMMIT}", "commitOid": COMMIT})


def reply(request: BaseHTTPRequestHandler, answer: dict, status: int = 200) -> None:
    send(request, status, json.dumps(answer).encode(), {"Content-Type": "application/json"})


def refuse(request: BaseHTTPRequestHandler, status: int, message: str) -> None:
    headers = {"Content-Type": "application/json", "X-Error-Message": message}
    send(request, status, json.dumps({"error": message}).encode(), headers)


def validate(request: BaseHTTPRequestHandler, card: str) -> None:
    metadata = yaml.safe_load(card.split("---\n")[1])
    if metadata["license"] == "no-such-licence":
        reply(request, {"errors": [{"message": '"license" must be one of the list'}], "warnings": []}, 400)
    else:
        reply(request, {"errors": [], "warnings": []})


def create(hub: UploadHub, request: BaseHTTPRequestHandler, wanted: dict) -> None:
    repo = f"{wanted['organization']}/{wanted['name']}"
    if wanted["organization"] not in hub.owners:
        refuse(request, 403, f"you may not create a model under {wanted['organization']}")
        return
    is_there = f"models/{repo}" in hub.repos
    if not is_there:
        hub.repos[f"models/{repo}"] = {}
        hub.private |= {repo} if wanted.get("visibility") == "private" else set()
    reply(request, {"url": f"{hub.endpoint}/{repo}"}, 409 if is_there else 200)


def list_files(request: BaseHTTPRequestHandler, repo: dict[str, bytes], folder: str) -> None:
    names = [name for name in repo if name.startswith(folder and f"{folder}/")]
    files = [{"type": "file", "size": len(repo[name])} | upload_mode(repo, {"path": name}) for name in names]
    if files or not folder:
        send(request, 200, json.dumps(files).encode(), {"Content-Type": "application/json"})
    else:
        send(request, 404, b"{}", {"X-Error-Code": "EntryNotFound"})


def upload_mode(repo: dict[str, bytes], file: dict) -> dict:
    name = file["path"]
    mode = "lfs" if name.endswith(LFS) else "regular"
    entry = {"path": name, "uploadMode": mode, "shouldIgnore": False}
    if name in repo:
        git = hashlib.sha1(b"blob %d\0" % len(repo[name]) + repo[name]).hexdigest()
        entry["oid"] = hashlib.sha256(repo[name]).hexdigest() if mode == "lfs" else git
    return entry


def lfs_object(hub: UploadHub, wanted: dict) -> dict:
    if wanted["oid"] in hub.stored:
        return wanted
    return wanted | {"actions": {"upload": {"href": f"{hub.endpoint}/lfs/{wanted['oid']}"}}}


def receive_file(hub: UploadHub, request: BaseHTTPRequestHandler, oid: str) -> None:
    content = request.rfile.read(int(request.headers["Content-Length"]))
    hub.puts.append(oid)
    if oid in hub.refused:
        hub.refused.remove(oid)
        send(request, 403, b"expired")
    else:
        assert hashlib.sha256(content).hexdigest() == oid
        hub.stored[oid] = content
        send(request, 200, b"")


def receive_chunks(hub: UploadHub, request: BaseHTTPRequestHandler, path: str) -> None:
    size = 0
    if request.headers["Transfer-Encoding"] == "chunked":
        while (length := int(request.rfile.readline(), 16)) > 0:
            size += len(request.rfile.read(length))
            request.rfile.readline()
        request.rfile.readline()
    else:
        size = len(request.rfile.read(int(request.headers["Content-Length"])))
    if path.startswith("cas/v1/xorbs/"):
        hub.xorbs.append(size)
        reply(request, {"was_inserted": True})
    elif path == "cas/v1/shards":
        reply(request, {"result": 1})
    else:  # newer addresses, without which hf_xet uses the older
        send(request, 404, b"")


def commit(hub: UploadHub, repo: dict[str, bytes], body: bytes) -> None:
    for line in body.splitlines():
        entry = json.loads(line)
        if entry["key"] == "file":
            repo[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        elif entry["key"] == "lfsFile":
            repo[entry["value"]["path"]] = hub.stored.get(entry["value"]["oid"], b"")
