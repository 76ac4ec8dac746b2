"""Fetch the published weights, tokenizer and data into the places where training looks for them.

    python scripts/download.py                               all for the small model, pretraining and SFT
    python scripts/download.py tower llm tokenizer pretrain  only what pretraining needs
    python scripts/download.py llm --hidden_size 768         the base language model
    HF_ENDPOINT=https://MIRROR python scripts/download.py    through a mirror of the hub

Run it again after an interruption: it resumes, and fetches nothing that is already here.
"""

import argparse
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HTTPError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ArgumentParser, HelpFormatter, file_path  # noqa: E402
from common.errors import UsageError, run_script  # noqa: E402
from common.paths import DATASET_DIR, ROOT, SAVE_DIR, TOKENIZER_DIR, TOWER_DIR
from scripts.transfer import RemoteFile, fetch, human, list_hub, unpack  # noqa: E402


@dataclass(frozen=True)
class Part:
    """What one word on the command line asks for: the first of the choices that its repository has in full."""

    repo_type: str
    repo_id: str
    folder: Path
    about: str
    choices: tuple[str, ...]


def data_part(name: str, about: str) -> Part:
    """Returns one stage's data: rows and a zip of pictures, or both in one parquet file."""
    choices = (f"{name}_data.jsonl + {name}_images.zip", f"{name}_data.parquet", f"{name}_i2t.parquet")
    return Part("dataset", "jingyaogong/minimind-v_dataset", DATASET_DIR, about, choices)


TOWER_CONFIG = "config.json + preprocessor_config.json"
TOWER_FILES = (f"{TOWER_CONFIG} + model.safetensors", f"{TOWER_CONFIG} + pytorch_model.bin")
LLM_FILES = ("llm_{hidden_size}.pth",)
TOKENIZER_FILES = ("tokenizer.json + tokenizer_config.json",)
PARTS = {
    "tower": Part("model", "openai/clip-vit-base-patch16", TOWER_DIR, "the vision tower", TOWER_FILES),
    "llm": Part("model", "jingyaogong/MiniMind2-V-PyTorch", SAVE_DIR, "the language model to start from", LLM_FILES),
    "tokenizer": Part("model", "jingyaogong/MiniMind2-V", TOKENIZER_DIR, "that model's tokenizer", TOKENIZER_FILES),
    "pretrain": data_part("pretrain", "pictures with captions"),
    "sft": data_part("sft", "pictures with conversations"),
}

UNPACKED_PER_ZIP = 1.6  # a guess: JPEGs of 4 kB do not shrink in a zip, and fill whole blocks on disk


def choose_files(part: Part, published: dict[str, RemoteFile], hidden_size: int) -> list[RemoteFile]:
    """Picks a part's files out of those of its repository."""
    choices = [choice.format(hidden_size=hidden_size) for choice in part.choices]
    for choice in choices:
        names = choice.split(" + ")
        if published.keys() >= set(names):
            return [published[name] for name in names]
    there = ", ".join(sorted(name for name in published if not name.startswith("."))) or "nothing"
    raise UsageError(f"{part.repo_id} on {ENDPOINT} has no {' and no '.join(choices)}. It has: {there}.")


def plan(parts: list[str], hidden_size: int, dest: Path) -> dict[str, dict[Path, RemoteFile]]:
    """Asks the hub what makes up the wanted parts: for each of them, path here -> published file."""
    files = {}
    for name in parts:
        part = PARTS[name]
        folder = dest / part.folder.relative_to(ROOT)
        chosen = choose_files(part, list_hub(part.repo_id, part.repo_type), hidden_size)
        # Training looks for pretrain_data.parquet, whichever name it was published under.
        files[name] = {folder / file.name.replace("_i2t.", "_data."): file for file in chosen}
    return files


def final_path(path: Path) -> Path:
    """Returns where a file ends up: for a zip, the folder it is unpacked to."""
    return path.with_suffix("") if path.suffix == ".zip" else path


def is_in_place(path: Path, file: RemoteFile) -> bool:
    """Tells whether nothing is left to do for a file; raises where the user's own file has its name."""
    final = final_path(path)
    if final.is_dir() and any(final.iterdir()):
        return True
    if path.exists() and path.stat().st_size != file.size:
        raise UsageError(
            f"{path} has {path.stat().st_size:,} bytes, the published file {file.size:,}. "
            "Move or delete it, then run this again (or name the other parts to fetch only those)."
        )
    return final.is_file()


def bytes_to_fetch(path: Path, file: RemoteFile) -> int:
    """Returns how much of a file is still to be downloaded."""
    here = path if path.exists() else file.part(path)
    return file.size - here.stat().st_size if here.exists() else file.size


def check_disk(missing: dict[Path, RemoteFile]) -> None:
    """Prints how much is to be fetched, and raises where the disk is too small for it."""
    by_disk: dict[int, tuple[Path, list[Path]]] = {}
    for path in missing:  # dataset/ is often a link to a larger disk
        folder = next(folder for folder in path.parents if folder.is_dir())
        by_disk.setdefault(folder.stat().st_dev, (folder, []))[1].append(path)
    for folder, paths in by_disk.values():
        fetched = sum(bytes_to_fetch(path, missing[path]) for path in paths)
        unpacked = sum(round(missing[path].size * UNPACKED_PER_ZIP) for path in paths if path != final_path(path))
        free = shutil.disk_usage(folder).free
        figures = f"{human(fetched)} to fetch" + (f" + about {human(unpacked)} of unpacked pictures" * (unpacked > 0))
        if fetched + unpacked > free:
            raise UsageError(
                f"not enough disk under {folder}: {human(fetched + unpacked)} needed ({figures}), {human(free)} free. "
                f"Make room, or fetch fewer parts ({', '.join(PARTS)})."
            )
        print(f"\n{figures}; {human(free)} free", flush=True)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parts = "\n".join(f"  {name:<10} {part.about} ({part.repo_id})" for name, part in PARTS.items())
    parser = ArgumentParser(description=f"{__doc__}\nparts (default: all):\n{parts}", formatter_class=HelpFormatter)
    parser.add_argument("parts", nargs="*", choices=("all", *PARTS), default="all", metavar="PART", help="see above")
    parser.add_argument("--hidden_size", type=int, choices=(512, 768), default=512, help="which language model")
    parser.add_argument("--dest", type=file_path, default=ROOT, help="put everything under this folder")
    parser.add_argument("--keep_zip", action="store_true", help="keep a zip of pictures after it is unpacked")
    args = parser.parse_args(argv)
    args.parts = [part for part in PARTS if part in args.parts or "all" in args.parts]
    return args


def run(args: argparse.Namespace) -> None:
    """Asks the hub, checks the disk, fetches, unpacks and prints where everything is."""
    dest = args.dest.absolute()
    print(f"Asking {ENDPOINT} ...", flush=True)
    files, missing = plan(args.parts, args.hidden_size, dest), {}
    for part, published in files.items():
        here = {path: file for path, file in published.items() if not is_in_place(path, file)}
        size = human(sum(bytes_to_fetch(path, file) for path, file in here.items()))
        names = ", ".join(file.name for file in here.values())
        print(f"  {part:<10} {f'{names} ({size})' if here else 'already here'}")
        missing |= here
    check_disk(missing)
    for path, file in missing.items():
        if not path.exists():
            fetch(file, path)
            print(f"  fetched   {path.relative_to(dest).as_posix()} ({human(file.size)})", flush=True)
        if (folder := final_path(path)) != path:
            unpack(path, folder)
            print(f"  unpacked  {folder.relative_to(dest).as_posix()}/", flush=True)
            if not args.keep_zip:
                path.unlink()
    report(args, files, dest)


def report(args: argparse.Namespace, files: dict[str, dict[Path, RemoteFile]], dest: Path) -> None:
    """Prints what is where, and the command to type next."""
    print(f"\nIn place, under {dest}:")
    for part, published in files.items():
        paths = [final_path(path) for path in published]
        if PARTS[part].folder in (TOWER_DIR, TOKENIZER_DIR):
            paths = [paths[0].parent]
        names = [path.relative_to(dest).as_posix() + "/" * path.is_dir() for path in paths]
        print(f"  {part:<10} {' + '.join(names)}")
    if dest != ROOT:
        print(f"Training looks under {ROOT}: move these folders there.")
    size = f" --hidden_size {args.hidden_size}" if args.hidden_size != 512 else ""
    for word, stage in (("Next:", "pretrain"), ("then:", "sft")):
        script = ROOT / "trainer" / f"train_{stage}_vlm.py"
        if stage == "pretrain" or stage in args.parts:
            print(f"{word}  python {os.path.relpath(script) if Path.cwd().is_relative_to(ROOT) else script}{size}")


def explain(error: HTTPError | OSError) -> str:
    """Returns a line for the person who typed the command: what is wrong, and what to do."""
    if not isinstance(error, HTTPError):
        return str(error).rstrip(".")  # a full disk, or HF_HUB_OFFLINE
    if not isinstance(error, HfHubHTTPError):
        reason = str(error) or type(error).__name__
        return f"the connection to {ENDPOINT} failed ({reason}): check the network, or set HF_ENDPOINT=https://MIRROR"
    status, url = error.response.status_code, str(error.response.url).split("?")[0]
    advice = "try again later, or set HF_ENDPOINT to another mirror"
    if isinstance(error, GatedRepoError):
        advice = "it needs a login: accept the terms on its page, then set HF_TOKEN"
    elif status in (401, 403, 404):
        advice = "not there, or private: check HF_TOKEN (your access token), or set HF_ENDPOINT to another mirror"
    return f"{url} answers {status}: {advice}"


def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    args = parse_args(argv)
    try:
        run(args)
    except KeyboardInterrupt:
        print("\nStopped. The same command resumes.", file=sys.stderr)
        sys.exit(130)
    except (HTTPError, OSError) as error:
        raise UsageError(f"{explain(error)}. What has arrived is kept: the same command resumes.") from error


if __name__ == "__main__":
    run_script(main)
