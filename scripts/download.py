"""Fetch the published weights, tokenizer and data into the places where training looks for them.

    python scripts/download.py                               all for the small model, pretraining and SFT
    python scripts/download.py tower llm tokenizer pretrain  only what pretraining needs
    python scripts/download.py llm --hidden_size 768         the base language model
    HF_ENDPOINT=https://MIRROR python scripts/download.py    through a mirror of the hub

Run it again after an interruption: it resumes, and fetches nothing that is already here.
"""

import argparse
import errno
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ArgumentParser, HelpFormatter, file_path  # noqa: E402
from common.errors import UsageError  # noqa: E402
from common.paths import DATASET_DIR, ROOT, SAVE_DIR, TOKENIZER_DIR, TOWER_DIR
from scripts.transfer import (  # noqa: E402
    RemoteFile,
    fetch,
    human,
    list_repo,
    open_zip,
    unpack,
    unpacked_bytes,
)


@dataclass(frozen=True)
class Part:
    """What one word asks for: a repository of the hub, and the folder its files go to."""

    repo_id: str
    repo_type: str
    folder: Path
    about: str


PARTS = {
    "tower": Part("openai/clip-vit-base-patch16", "model", TOWER_DIR, "the vision tower"),
    "llm": Part("jingyaogong/MiniMind2-V-PyTorch", "model", SAVE_DIR, "the language model to start from"),
    "tokenizer": Part("jingyaogong/MiniMind2-V", "model", TOKENIZER_DIR, "that model's tokenizer"),
    "pretrain": Part("jingyaogong/minimind-v_dataset", "dataset", DATASET_DIR, "pictures with captions"),
    "sft": Part("jingyaogong/minimind-v_dataset", "dataset", DATASET_DIR, "pictures with conversations"),
}

UNPACKED_PER_ZIP = 1.6  # until the zip can be read: JPEGs of 4 kB do not shrink in it, and fill whole blocks on disk


def choose_files(part: str, names: set[str], hidden_size: int) -> dict[str, str]:
    """Picks a part's files out of a repository's.

    Args:
        part: a key of `PARTS`.
        names: all file names of the part's repository.
        hidden_size: which language model, 512 or 768.

    Returns:
        For each name in the repository the name it gets in the part's folder.

    Raises:
        UsageError: A file is not there.
    """
    if part == "tower":
        weights = "model.safetensors" if "model.safetensors" in names else "pytorch_model.bin"
        wanted = ["config.json", "preprocessor_config.json", weights]
    elif part == "llm":
        wanted = [f"llm_{hidden_size}.pth"]
    elif part == "tokenizer":
        wanted = ["tokenizer.json", "tokenizer_config.json"]
    else:
        wanted = [f"{part}_data.jsonl", f"{part}_images.zip"]
        if not names.issuperset(wanted):
            usual = [name for name in (f"{part}_data.parquet", f"{part}_i2t.parquet") if name in names]
            similar = [name for name in names if name.startswith(part) and name.endswith(".parquet")]
            if usual or len(similar) == 1:
                return {(usual or similar)[0]: f"{part}_data.parquet"}
    absent = [name for name in wanted if name not in names]
    if absent:
        parquet = f" (nor {part}_i2t.parquet)" if part in ("pretrain", "sft") else ""
        there = ", ".join(sorted(name for name in names if not name.startswith("."))) or "nothing"
        raise UsageError(
            f"{PARTS[part].repo_id} on {ENDPOINT} has no {' and no '.join(absent)}{parquet}. It has: {there}."
        )
    return {name: name for name in wanted}


def plan(parts: list[str], hidden_size: int, dest: Path) -> list[RemoteFile]:
    """Asks the hub what makes up the wanted parts, in the order in which they are to be fetched."""
    listings, files = {}, []
    for part in parts:
        source = PARTS[part]
        if source.repo_id not in listings:
            listings[source.repo_id] = list_repo(source.repo_id, source.repo_type)
        commit, there = listings[source.repo_id]
        for name, local_name in choose_files(part, set(there), hidden_size).items():
            entry = there[name]
            if entry.size is None:
                raise UsageError(f"{ENDPOINT} does not tell how large {name} is: set HF_ENDPOINT to another mirror.")
            files.append(
                RemoteFile(
                    part=part,
                    repo_id=source.repo_id,
                    repo_type=source.repo_type,
                    commit=commit,
                    name=name,
                    size=entry.size,
                    sha256=entry.lfs.sha256 if entry.lfs else None,
                    blob_id=entry.blob_id,
                    path=dest / source.folder.relative_to(ROOT) / local_name,
                )
            )
    return files


def is_in_place(file: RemoteFile) -> bool:
    """Tells whether nothing is left to do for a file.

    Raises:
        UsageError: Something else has its name. It may be the user's own, so it is not overwritten.
    """
    if file.folder and file.folder.is_dir() and any(file.folder.iterdir()):
        return True
    if not file.path.exists():
        return False
    size = file.path.stat().st_size
    if size != file.size:
        raise UsageError(
            f"{file.path} has {size:,} bytes, the published file {file.size:,}. "
            f"Move or delete it, then run this again (or name the parts to fetch, without {file.part})."
        )
    return file.folder is None


def existing_folder(path: Path) -> Path:
    """Returns the nearest folder above a path that exists already."""
    return next(folder for folder in path.absolute().parents if folder.is_dir())


def to_fetch(file: RemoteFile) -> int:
    """Returns the bytes still to be transferred."""
    if file.path.exists():
        return 0
    return max(0, file.size - (file.partial.stat().st_size if file.partial.exists() else 0))


def to_unpack(file: RemoteFile) -> int:
    """Returns the bytes that unpacking takes on disk: exact where the zip is here, else a cautious guess."""
    if file.folder is None:
        return 0
    if not file.path.exists():
        return round(file.size * UNPACKED_PER_ZIP)
    with open_zip(file.path) as archive:
        return unpacked_bytes(archive)


def check_disk(files: list[RemoteFile]) -> None:
    """Compares what is still missing with the free disk, before anything is fetched.

    Raises:
        UsageError: There is not enough room; with the figures.
    """
    by_disk: dict[int, list[RemoteFile]] = {}
    for file in files:  # dataset/ is often a link to a larger disk
        by_disk.setdefault(existing_folder(file.path).stat().st_dev, []).append(file)
    for here in by_disk.values():
        folder = existing_folder(here[0].path)
        fetched, unpacked = sum(map(to_fetch, here)), sum(map(to_unpack, here))
        free = shutil.disk_usage(folder).free
        figures = f"{human(fetched)} to fetch" + (f" + about {human(unpacked)} of unpacked pictures" * (unpacked > 0))
        if fetched + unpacked > free:
            raise UsageError(
                f"not enough disk under {folder}: {human(fetched + unpacked)} needed ({figures}), {human(free)} free. "
                f"Make room, or fetch fewer parts ({', '.join(PARTS)})."
            )
        print(f"\n{figures}; {human(free)} free", flush=True)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line; without a part, all parts are meant."""
    parts = "\n".join(f"  {name:<10} {part.about} ({part.repo_id})" for name, part in PARTS.items())
    parser = ArgumentParser(
        description=f"Fetch the published files.\n\nparts (default: all):\n{parts}",
        epilog="Run it again after an interruption: it resumes. Set HF_ENDPOINT to use a mirror of the hub.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"what to fetch: {', '.join(PARTS)}")
    parser.add_argument("--hidden_size", type=int, choices=(512, 768), default=512, help="which language model")
    parser.add_argument(
        "--dest", type=file_path, default=ROOT, help="put everything under this folder, not the project's"
    )
    parser.add_argument("--keep_zip", action="store_true", help="keep a zip of pictures after it is unpacked")
    args = parser.parse_args(argv)
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        parser.error(f"unknown part {', '.join(unknown)}: choose from {', '.join(PARTS)}")
    args.parts = [part for part in PARTS if part in args.parts or not args.parts]
    return args


def check_endpoint() -> None:
    """Catches the usual slip, HF_ENDPOINT without https://, which would fail later in words of httpx."""
    if urlsplit(ENDPOINT).scheme not in ("http", "https") or not urlsplit(ENDPOINT).hostname:
        raise UsageError(f"HF_ENDPOINT={ENDPOINT} is not an address: it must look like https://MIRROR")


def run(args: argparse.Namespace) -> None:
    """Asks, checks the disk, fetches, unpacks and says where things lie."""
    check_endpoint()
    dest = args.dest.absolute()
    print(f"Asking {ENDPOINT} ...", flush=True)
    files = plan(args.parts, args.hidden_size, dest)
    missing = [file for file in files if not is_in_place(file)]
    for part in args.parts:
        here = [file for file in missing if file.part == part]
        names = ", ".join(file.name for file in here) or "already here"
        print(f"  {part:<10} {names}" + (f" ({human(sum(map(to_fetch, here)))})" if here else ""))
    if missing:
        check_disk(missing)
    for file in missing:
        if not file.path.exists():
            fetch(file)
            print(f"  fetched   {file.path.relative_to(dest).as_posix()} ({human(file.size)})", flush=True)
        if file.folder:
            unpack(file.path, file.folder)
            print(f"  unpacked  {file.folder.relative_to(dest).as_posix()}/", flush=True)
            if not args.keep_zip:
                file.path.unlink()
    report(args, files, dest)


def report(args: argparse.Namespace, files: list[RemoteFile], dest: Path) -> None:
    """Prints what lies where, and the command to type next."""
    print(f"\nIn place, under {dest}:")
    for part in args.parts:
        places = [file.folder or file.path for file in files if file.part == part]
        if part in ("tower", "tokenizer"):
            places = [places[0].parent]
        names = [place.relative_to(dest).as_posix() + "/" * place.is_dir() for place in places]
        print(f"  {part:<10} {' + '.join(names)}")
    if dest != ROOT:
        print(f"Training looks under {ROOT}: move these folders there.")
    here = Path.cwd()
    size = f" --hidden_size {args.hidden_size}" if args.hidden_size != 512 else ""
    for word, name in (("Next:", "pretrain"), ("then:", "sft")):
        script = ROOT / "trainer" / f"train_{name}_vlm.py"
        if word == "Next:" or name in args.parts:
            print(f"{word}  python {os.path.relpath(script) if here.is_relative_to(ROOT) else script}{size}")


def explain(error: Exception) -> str:
    """Returns a line for the person who typed the command: what is wrong, and what to do."""
    if isinstance(error, UsageError):
        return str(error)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) forbids asking the hub: unset it and run this again."
    if isinstance(error, HfHubHTTPError):
        status, url = error.response.status_code, str(error.response.url).split("?")[0]
        advice = {401: "check the access token (HF_TOKEN)", 403: "check the access token (HF_TOKEN)", 404: "not there"}
        return (
            f"the hub answers {status} for {url}: {advice.get(status, 'try again later')}, "
            "or set HF_ENDPOINT to another mirror."
        )
    if isinstance(error, HTTPError):
        reason = str(error) or type(error).__name__
        return (
            f"{ENDPOINT} cannot be reached ({reason}). Check the network, or set HF_ENDPOINT to a mirror "
            "(HF_ENDPOINT=https://MIRROR python scripts/download.py). What has arrived is kept."
        )
    if getattr(error, "errno", None) in (errno.ENOSPC, getattr(errno, "EDQUOT", None)):
        return "the disk is full. What has arrived is kept: make room and run the same command again."
    return str(error)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    args = parse_args(argv)
    try:
        run(args)
    except KeyboardInterrupt:
        print("\nStopped. The same command resumes.", file=sys.stderr)
        return 130
    except (UsageError, HTTPError, OSError) as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
