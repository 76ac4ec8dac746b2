"""List and download published files; a file gets its final name only when it is complete.

The range requests are our own: huggingface_hub's `hf_hub_download` starts over after an interruption (its pull request
4228), and its `http_get` takes ModelScope's partial answers, which have the status 200, for whole files.
"""

import hashlib
import os
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote_plus

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status
from tqdm import tqdm

from common.errors import UsageError

LONGEST_WAIT = 8  # seconds; the waits between attempts that bring no new byte are 1, 2, 4 and 8
RETRY_STATUS = {408, 429, 500, 502, 503, 504}
REQUEST = {"timeout": HF_HUB_DOWNLOAD_TIMEOUT, "follow_redirects": True}
BAR = {"delay": 1, "leave": False, "mininterval": 0.2 if sys.stderr.isatty() else 30}  # few lines in a log file
human = partial(tqdm.format_sizeof, suffix="B")  # 12.3GB


@dataclass(frozen=True)
class RemoteFile:
    """A published file. Its checksum is a SHA-256, or for a small file of the hub its git blob id (a SHA-1)."""

    name: str
    url: str
    headers: dict[str, str]
    size: int | None
    checksum: str | None

    def is_at(self, path: Path) -> bool:
        """Tells whether a file here has the published content."""
        if path.stat().st_size != self.size:
            return False
        digest = hashlib.sha256() if len(self.checksum) == 64 else hashlib.sha1(b"blob %d\0" % self.size)
        with open(path, "rb") as content:
            while chunk := content.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest() == self.checksum


def list_hub(endpoint: str, repo_id: str, repo_type: str) -> list[RemoteFile]:
    """Lists the files of a repository of the hub."""
    info = HfApi(endpoint).repo_info(repo_id, repo_type=repo_type, files_metadata=True, timeout=HF_HUB_DOWNLOAD_TIMEOUT)
    return [
        RemoteFile(
            entry.rfilename,
            hf_hub_url(repo_id, entry.rfilename, repo_type=repo_type, revision=info.sha),
            build_hf_headers(),
            entry.size,
            entry.lfs.sha256 if entry.lfs else entry.blob_id,
        )
        for entry in info.siblings or []
    ]


def list_modelscope(endpoint: str, repo_id: str, repo_type: str) -> list[RemoteFile]:
    """Lists the files of a repository of ModelScope, a data set's first 200.

    The addresses are those of its own client, modelscope 1.40.2 (modelscope_hub 0.5.1, `_legacy_api.py`).
    """
    repo = f"{endpoint}/api/v1/{repo_type}s/{repo_id}/repo"
    listing = f"{repo}/{'tree' if repo_type == 'dataset' else 'files'}"
    page = {"Revision": "master", "Recursive": "True", "PageNumber": 1, "PageSize": 200}
    response = get_session().get(listing, params=page, **REQUEST)
    hf_raise_for_status(response)
    return [
        RemoteFile(
            entry["Path"],
            f"{repo}?Revision=master&FilePath={quote_plus(entry['Path'])}",
            {},
            entry["Size"],
            entry["Sha256"].lower(),
        )
        for entry in response.json()["Data"]["Files"]
        if entry["Type"] != "tree"
    ]


def fetch(file: RemoteFile, path: Path):
    """Downloads a file and verifies its checksum; resumes where an earlier run stopped.

    Raises:
        UsageError: If it arrived damaged; it is deleted then.
        HTTPError: If the server refuses it, or sends nothing new four times.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Named after the checksum, so that two versions are never joined.
    part, wait = path.with_name(f"{path.name}.{file.checksum[:12]}.part"), 0.5
    bar = tqdm(desc=f"  {path.name}", total=file.size, unit="B", unit_scale=True, **BAR)
    with bar, open(part, "ab") as out:
        while (start := out.tell()) < file.size:
            try:
                append_rest(file, out, bar)
            except HTTPError as error:
                wait = wait * 2 if out.tell() == start else 1
                is_refused = isinstance(error, HfHubHTTPError) and error.response.status_code not in RETRY_STATUS
                if is_refused or wait > LONGEST_WAIT:
                    raise
                bar.write(f"  connection lost, trying again in {wait:g} s", file=sys.stderr)
                time.sleep(wait)
    if not file.is_at(part):
        part.unlink()
        raise UsageError(f"{file.name} arrived damaged (wrong checksum) and was deleted: run this again.")
    os.replace(part, path)


def append_rest(file: RemoteFile, out: BinaryIO, bar: tqdm):
    """Makes one request for the bytes that `out` does not have yet, and appends what comes."""
    headers = {**file.headers, "Accept-Encoding": "identity"}
    if out.tell():
        headers["Range"] = f"bytes={out.tell()}-"
    with get_session().stream("GET", file.url, headers=headers, **REQUEST) as response:
        hf_raise_for_status(response)
        # Not the status: ModelScope sends the rest with 200, a server without range support the whole file.
        if not response.headers.get("Content-Range", "").startswith(f"bytes {out.tell()}-"):
            out.seek(0)
            out.truncate()
        bar.n = out.tell()
        for chunk in response.iter_bytes():
            out.write(chunk)
            bar.update(len(chunk))
    if out.tell() < file.size:
        raise HTTPError(f"{file.url} ends after {out.tell():,} of {file.size:,} bytes")
