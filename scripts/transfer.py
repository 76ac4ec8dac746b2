"""Fetch one file from the model hub, or unpack one zip, checked.

A file or folder gets its final name only when it is complete; until then it is called `*.part`. Transfers are
plain HTTP with ranges, because `hf_hub_download` drops an interrupted file when its process ends.
"""

import hashlib
import os
import shutil
import stat
import sys
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.constants import ENDPOINT, HF_HUB_DOWNLOAD_TIMEOUT
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status
from tqdm import tqdm

from common.errors import UsageError

RETRIES = 4  # in a row without a new byte, after 1, 2, 4 and 8 seconds
RETRY_STATUS = {408, 429, 500, 502, 503, 504}
DISK_BLOCK = 4096  # bytes a small file takes at least


class ConnectionLost(UsageError):
    """An answer ended before the file did, without an error of the connection."""


@dataclass(frozen=True)
class RemoteFile:
    """One file of the hub at one commit, and where it belongs here."""

    part: str
    repo_id: str
    repo_type: str
    commit: str
    name: str
    size: int
    sha256: str | None
    blob_id: str | None
    path: Path

    @property
    def partial(self) -> Path:
        """Where it grows; named after its content, so that a newer version is never joined to an older half."""
        content = self.sha256 or self.blob_id or self.commit
        return self.path.with_name(f"{self.path.name}.{content[:12]}.part")

    @property
    def folder(self) -> Path | None:
        """Where a zip is unpacked."""
        return self.path.with_suffix("") if self.path.suffix == ".zip" else None


def human(size: float) -> str:
    """Formats a size in bytes: 12.3 GB."""
    for unit, bytes_each in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= bytes_each:
            return f"{size / bytes_each:.1f} {unit}"
    return f"{size:.0f} bytes"


def progress(name: str, total: int, unit: str, items=None) -> tqdm:
    """Returns a bar that appears after a second and vanishes when done; without a terminal it seldom prints."""
    every = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm(
        items, desc=f"  {name}", total=total, unit=unit, unit_scale=unit == "B", delay=1, mininterval=every, leave=False
    )


def list_repo(repo_id: str, repo_type: str) -> tuple[str, dict[str, RepoSibling]]:
    """Asks the hub for a repository's commit and its files (by name; with size and checksums).

    Raises:
        UsageError: There is no such repository, it is not open to everyone, or this is not a hub.
    """
    try:
        info = HfApi().repo_info(repo_id, repo_type=repo_type, files_metadata=True, timeout=HF_HUB_DOWNLOAD_TIMEOUT)
    except GatedRepoError as error:
        raise UsageError(f"{repo_id} needs a login: accept its terms on {ENDPOINT}, then set HF_TOKEN.") from error
    except RepositoryNotFoundError as error:
        raise UsageError(
            f"{ENDPOINT} has no {repo_type} repository {repo_id} (or it is private). If this is a mirror, "
            "set HF_ENDPOINT to another one, or unset it."
        ) from error
    except HfHubHTTPError:
        raise
    except (ValueError, KeyError, TypeError) as error:  # a login page, or some other server's JSON
        raise UsageError(f"{ENDPOINT} does not answer like a model hub: check HF_ENDPOINT.") from error
    return info.sha, {sibling.rfilename: sibling for sibling in info.siblings or []}


def fetch(file: RemoteFile) -> None:
    """Fetches one file to its place, resuming where an earlier run stopped.

    Raises:
        UsageError: What arrived is not what was published.
        HTTPError: The connection failed more than `RETRIES` times in a row, or the hub refused.
    """
    file.path.parent.mkdir(parents=True, exist_ok=True)
    for stale in file.path.parent.glob(f"{file.path.name}.*.part"):
        if stale != file.partial:
            stale.unlink()
    file.partial.touch()
    failures = 0
    with progress(file.path.name, file.size, "B") as bar:
        while (start := file.partial.stat().st_size) < file.size:
            try:
                transfer(file, start, bar)
            except (HTTPError, ConnectionLost) as error:
                if isinstance(error, HfHubHTTPError) and error.response.status_code not in RETRY_STATUS:
                    raise
                if file.partial.stat().st_size > start:
                    failures = 0
                if failures == RETRIES:
                    raise
                bar.write(f"  connection lost, trying again in {2**failures} s", file=sys.stderr)
                time.sleep(2**failures)
                failures += 1
    verify(file)
    os.replace(file.partial, file.path)


def transfer(file: RemoteFile, start: int, bar: tqdm) -> None:
    """Makes one request, and appends what comes from byte `start` on to the partial file."""
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    url = hf_hub_url(file.repo_id, file.name, repo_type=file.repo_type, revision=file.commit)
    with get_session().stream(
        "GET", url, headers=headers, timeout=HF_HUB_DOWNLOAD_TIMEOUT, follow_redirects=True
    ) as response:
        hf_raise_for_status(response)
        if response.status_code != 206:  # without ranges a server sends the file from its beginning
            start = 0
        bar.n = start
        with open(file.partial, "ab" if start else "wb") as out:
            for chunk in response.iter_bytes():
                start += len(chunk)
                if start > file.size:
                    raise UsageError(f"{url} sends more than the {file.size:,} bytes it should have.")
                out.write(chunk)
                bar.update(len(chunk))
    if start < file.size:
        raise ConnectionLost(f"{url} ends after {start:,} of {file.size:,} bytes. Run this again, or set HF_ENDPOINT.")


def verify(file: RemoteFile) -> None:
    """Compares the checksum with the published one: SHA-256 for large files, git's blob id for small ones."""
    if file.sha256:
        digest, expected = hashlib.sha256(), file.sha256
    elif file.blob_id:
        digest, expected = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False), file.blob_id
    else:
        return
    with open(file.partial, "rb") as content:
        while chunk := content.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != expected:
        file.partial.unlink()
        raise UsageError(f"{file.name} arrived damaged (wrong checksum) and was deleted: run this again.")


def open_zip(path: Path) -> zipfile.ZipFile:
    """Opens a zip; UsageError if it is none."""
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not a complete zip ({error}): delete it and run this again.") from error


def zip_members(archive: zipfile.ZipFile, folder: Path) -> list[tuple[zipfile.ZipInfo, PurePosixPath]]:
    """Returns the files of a zip and their places inside `folder`; a top folder of the same name is left out.

    Raises:
        UsageError: A member wants to leave the folder, or is neither a file nor a folder.
    """
    members = []
    for info in archive.infolist():
        name = info.filename.replace("\\", "/")
        place = PurePosixPath(name)
        kind = stat.S_IFMT(info.external_attr >> 16)
        if not place.parts or place.is_absolute() or PureWindowsPath(name).drive or ".." in place.parts:
            raise UsageError(f"{archive.filename} is refused: {info.filename!r} points outside of {folder}.")
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR) or info.flag_bits & 1:
            raise UsageError(f"{archive.filename} is refused: {info.filename!r} is a link, a device or encrypted.")
        if not name.endswith("/") and place.parts[0] != "__MACOSX" and place.name != ".DS_Store":
            members.append((info, place))
    if members and all(len(place.parts) > 1 and place.parts[0] == folder.name for _, place in members):
        members = [(info, place.relative_to(folder.name)) for info, place in members]
    places = {place for _, place in members}
    if len(places) < len(members) or any(parent in places for place in places for parent in place.parents):
        raise UsageError(f"{archive.filename} is refused: two of its members have the same name.")
    return members


def unpacked_bytes(archive: zipfile.ZipFile) -> int:
    """Returns the bytes on disk by the zip's own word, in whole blocks: a million empty files need room too."""
    return sum(max(1, -(-info.file_size // DISK_BLOCK)) * DISK_BLOCK for info in archive.infolist())


def unpack(path: Path, folder: Path) -> None:
    """Unpacks a zip into `folder`.part, and renames that when it is complete; an interrupted one starts over.

    Raises:
        UsageError: The zip is unsafe or damaged, or the disk too small for what it declares.
    """
    part = folder.with_name(f"{folder.name}.part")
    with open_zip(path) as archive:
        members = zip_members(archive, folder)
        needed, free = unpacked_bytes(archive), shutil.disk_usage(folder.parent).free
        if needed > free:
            raise UsageError(
                f"not enough disk to unpack {path}: {human(needed)} needed, {human(free)} free. "
                "Make room and run this again."
            )
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            for info, place in progress(f"unpacking {path.name}", len(members), " files", members):
                (part / place).parent.mkdir(parents=True, exist_ok=True)
                with archive.open(info) as source, open(part / place, "wb") as out:
                    shutil.copyfileobj(source, out, 1 << 20)  # zipfile gives at most the declared bytes
                    if out.tell() < info.file_size:
                        raise zipfile.BadZipFile(f"{info.filename!r} is shorter than declared")
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            shutil.rmtree(part)
            raise UsageError(f"{path} is damaged ({error}): delete it and run this again.") from error
    if folder.is_dir():
        folder.rmdir()  # an empty one: a filled one is never unpacked over
    part.rename(folder)
