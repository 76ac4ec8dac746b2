"""List, download and unpack published files. Which files, and where they go, is for the caller to say.

A file or folder gets its final name only when it is complete; until then it is called `*.part`. The range requests
are our own: since https://github.com/huggingface/huggingface_hub/pull/4228 `hf_hub_download` deletes the partial
file when it stops, and an interrupted download starts over.
"""

import errno
import hashlib
import lzma
import os
import posixpath
import shutil
import stat
import struct
import sys
import time
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import BinaryIO
from urllib.parse import quote_plus, urlsplit

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.constants import ENDPOINT, HF_HUB_DOWNLOAD_TIMEOUT
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status
from tqdm import tqdm

from common.errors import UsageError
from common.files import scratch_folder

LONGEST_WAIT = 8  # seconds: without a new byte, it tries again after 1, 2, 4 and 8
RETRY_STATUS = {408, 429, 500, 502, 503, 504}
MODELSCOPE_PAGE = 200  # files: one page of a data set, and its client's own size; a model's files come all at once
# Of zipfile and what it unpacks with: RuntimeError is of an encrypted file, NotImplementedError of an unknown method.
UNPACKING_ERRORS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, RuntimeError, ValueError)
UNPACKING_ERRORS += (OSError, OverflowError, LookupError)
DISK_BLOCK = 4096  # bytes a small file takes at least
BAR = {"delay": 1, "leave": False, "mininterval": 0.2 if sys.stderr.isatty() else 30}  # few lines in a log file
human = partial(tqdm.format_sizeof, suffix="B")  # 12.3GB


@dataclass(frozen=True)
class RemoteFile:
    """A published file. Its checksum is a SHA-256, or for a small file of the hub its git blob id (a SHA-1)."""

    name: str
    url: str
    headers: dict[str, str]
    size: int
    checksum: str

    def part(self, path: Path) -> Path:
        """Returns where it grows; named after its content, so two versions are never joined."""
        return path.with_name(f"{path.name}.{self.checksum[:12]}.part")


def list_hub(repo_id: str, repo_type: str) -> dict[str, RemoteFile]:
    """Lists the files of a repository of the hub by their names."""
    try:
        info = HfApi().repo_info(repo_id, repo_type=repo_type, files_metadata=True, timeout=HF_HUB_DOWNLOAD_TIMEOUT)
    except (ValueError, KeyError, TypeError) as error:  # a login page, or some other server's JSON
        raise UsageError(f"{ENDPOINT} does not answer like a model hub: check HF_ENDPOINT.") from error
    files = {}
    for entry in info.siblings or []:
        name, checksum = entry.rfilename, entry.lfs.sha256 if entry.lfs else entry.blob_id
        if entry.size is None or checksum is None:
            raise UsageError(f"{ENDPOINT} has no size or checksum for {name}: set HF_ENDPOINT to another mirror.")
        url = hf_hub_url(repo_id, name, repo_type=repo_type, revision=info.sha)
        files[name] = RemoteFile(name, url, build_hf_headers(), entry.size, checksum)
    return files


def modelscope_endpoint() -> str:
    """Returns ModelScope's address: $MODELSCOPE_ENDPOINT or the older $MODELSCOPE_DOMAIN, as its own client does."""
    named = os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN") or "www.modelscope.cn"
    endpoint = (named if "://" in named else f"https://{named}").rstrip("/")
    try:
        _ = urlsplit(endpoint).port  # raises for a port that is no number, and for half of an IPv6 address
    except ValueError as error:
        raise UsageError(f"MODELSCOPE_ENDPOINT {named} is no address: {error}.") from error
    return endpoint


def list_modelscope(repo_id: str, repo_type: str) -> dict[str, RemoteFile]:
    """Lists the files of a repository of ModelScope by their names.

    The addresses are those of its own client, modelscope 1.40.2 (modelscope_hub 0.5.1, `_legacy_api.py`).
    """
    endpoint = modelscope_endpoint()
    repo = f"{endpoint}/api/v1/{repo_type}s/{repo_id}/repo"
    page = {"Revision": "master", "Recursive": "True", "PageNumber": 1, "PageSize": MODELSCOPE_PAGE}
    response = get_session().get(
        f"{repo}/{'tree' if repo_type == 'dataset' else 'files'}",
        params=page,
        timeout=HF_HUB_DOWNLOAD_TIMEOUT,
        follow_redirects=True,
    )
    hf_raise_for_status(response)
    try:
        answer = response.json()
        listed = answer["Data"]["Files"]
        entries = [entry for entry in listed if entry["Type"] != "tree"]
        about = {entry["Path"]: (int(entry["Size"]), entry["Sha256"].lower()) for entry in entries}
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # a login page, or some other server's JSON
        raise UsageError(f"{endpoint} does not answer like ModelScope: check MODELSCOPE_ENDPOINT.") from error
    if repo_type == "dataset" and len(listed) >= MODELSCOPE_PAGE:
        raise UsageError(f"{repo_id} has {MODELSCOPE_PAGE} files or more on {endpoint}: leave --source out.")
    if lacking := [name for name, (_, checksum) in about.items() if len(checksum) != 64]:
        raise UsageError(f"{endpoint} has no checksum for {lacking[0]}: leave --source out.")
    return {
        name: RemoteFile(name, f"{repo}?Revision=master&FilePath={quote_plus(name)}", {}, size, checksum)
        for name, (size, checksum) in about.items()
    }


def fetch(file: RemoteFile, path: Path) -> None:
    """Downloads a file and verifies its checksum; resumes where an earlier run stopped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part, wait = file.part(path), 0.5
    for old_version in set(path.parent.glob(f"{path.name}.{'[0-9a-f]' * 12}.part")) - {part}:
        old_version.unlink()
    bar = tqdm(desc=f"  {path.name}", total=file.size, unit="B", unit_scale=True, **BAR)
    with bar, open(part, "ab") as out:
        while (start := out.tell()) < file.size:
            try:
                append_rest(file, out, bar)
            except HTTPError as error:
                wait = wait * 2 if out.tell() == start else 1
                refused = isinstance(error, HfHubHTTPError) and error.response.status_code not in RETRY_STATUS
                if refused or wait > LONGEST_WAIT:
                    raise
                bar.write(f"  connection lost, trying again in {wait:g} s", file=sys.stderr)
                time.sleep(wait)
    if not has_checksum(part, file.checksum):
        part.unlink()
        raise UsageError(f"{file.name} arrived damaged (wrong checksum) and was deleted: run this again.")
    os.replace(part, path)


def append_rest(file: RemoteFile, out: BinaryIO, bar: tqdm) -> None:
    """Makes one request for the bytes that `out` does not have yet, and appends what comes."""
    headers = {**file.headers, "Accept-Encoding": "identity"}
    if out.tell():
        headers["Range"] = f"bytes={out.tell()}-"
    options = {"headers": headers, "timeout": HF_HUB_DOWNLOAD_TIMEOUT, "follow_redirects": True}
    with get_session().stream("GET", file.url, **options) as response:
        hf_raise_for_status(response)
        # The status does not tell: ModelScope sends the rest with 200, a server without range support the whole file.
        if not response.headers.get("Content-Range", "").startswith(f"bytes {out.tell()}-"):
            out.seek(0)
            out.truncate()
        bar.n = out.tell()
        for chunk in response.iter_bytes():
            out.write(chunk)
            bar.update(len(chunk))
    if out.tell() < file.size:
        raise HTTPError(f"{file.url} ends after {out.tell():,} of {file.size:,} bytes")


def has_checksum(path: Path, checksum: str) -> bool:
    """Compares a file with its SHA-256 or git blob id."""
    is_sha256 = len(checksum) == 64
    digest = hashlib.sha256() if is_sha256 else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with open(path, "rb") as content:
        while chunk := content.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest() == checksum


def unpack(path: Path, folder: Path) -> None:
    """Unpacks a zip into `folder`, without a top folder of the same name; starts over if it was interrupted."""
    with scratch_folder(folder.parent) as scratch:
        part = scratch / "part"
        try:
            with zipfile.ZipFile(path) as archive:
                members = safe_members(archive)
                needed = sum((info.file_size // DISK_BLOCK + 1) * DISK_BLOCK for info in members)
                free = shutil.disk_usage(folder.parent).free
                if needed > free:
                    raise UsageError(f"not enough disk to unpack {path}: {human(needed)} needed, {human(free)} free.")
                part.mkdir()
                for info in tqdm(members, desc=f"  unpacking {path.name}", unit=" files", **BAR):
                    archive.extract(info, part)  # writes no more than the declared bytes
        except UNPACKING_ERRORS as error:
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # the disk's
                raise
            raise UsageError(f"{path} is damaged ({error}): delete it and run this again.") from error
        top = part / folder.name
        (top if list(part.iterdir()) == [top] else part).rename(folder)


def safe_members(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """Returns the files of a zip, without those that macOS adds; refuses links, and names that lead elsewhere."""
    members = []
    for info in archive.infolist():
        place = PureWindowsPath(info.filename)  # the stricter kind of path: it knows \ and drives too
        if place.anchor or ".." in place.parts or stat.S_ISLNK(info.external_attr >> 16):
            raise UsageError(f"{archive.filename} is refused: {info.filename!r} points outside of it or is a link.")
        if not info.is_dir() and place.parts[:1] != ("__MACOSX",) and place.name != ".DS_Store":
            members.append(info)
    names = [posixpath.normpath(info.filename) for info in members]
    folders = set()
    for folder in map(posixpath.dirname, names):
        while folder and folder not in folders:
            folders.add(folder)
            folder = posixpath.dirname(folder)
    twice = Counter([*folders, *names]).most_common(1)
    if twice and twice[0][1] > 1:
        raise zipfile.BadZipFile(f"{twice[0][0]!r} is in it twice, or is a file and a folder")
    return members
