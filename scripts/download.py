"""Fetch the published weights, tokenizer and data to where they are looked for.

    python scripts/download.py sft_vlm          a trained model, to talk to
    python scripts/download.py                  all to train the small model
    python scripts/download.py tower pretrain   only these parts
    python scripts/download.py sft_vlm --hidden_size 768
    python scripts/download.py sft_vlm --source modelscope
    HF_ENDPOINT=https://MIRROR python scripts/download.py

Weights bring the tower and tokenizer that they were trained with.
The same command resumes after an interruption, and fetches nothing twice.
"""

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.constants import ENDPOINT
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HTTPError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ArgumentParser, HelpFormatter, file_path
from common.errors import UsageError, run_script
from common.paths import (
    DATASET_DIR,
    EXAMPLE_PHOTO,
    ROOT,
    SAVE_3V_DIR,
    SAVE_DIR,
    TOKENIZER_3V_DIR,
    TOKENIZER_DIR,
    TOWER_3V_DIR,
    TOWER_DIR,
)
from scripts.data.transfer import (
    RemoteFile,
    fetch,
    has_checksum,
    human,
    list_hub,
    list_modelscope,
    modelscope_endpoint,
    unpack,
)


@dataclass(frozen=True)
class Part:
    """What one word on the command line asks for: the first of the choices that its repository has in full.

    Attributes:
        needs: Of weights: the parts with the tower and the tokenizer that they were trained with.
        hidden_size: Of weights: which size, unless --hidden_size says another.
    """

    repo_type: str
    repo_id: str
    folder: Path
    about: str
    choices: tuple[str, ...]
    needs: tuple[str, ...] = ()
    hidden_size: int = 512


@dataclass(frozen=True)
class Source:
    """Where the files are published.

    Attributes:
        list_files: Lists the repository of an id and a type, "model" or "dataset".
        owners: What the hub's owners are called there.
        cure: What to do where it fails.
        access: What else to check where something is not there.
    """

    endpoint: str
    list_files: Callable[[str, str], dict[str, RemoteFile]]
    owners: dict[str, str]
    cure: str
    access: str = ""

    def list_part(self, part: Part, hidden_size: int | None) -> list[RemoteFile]:
        """Asks for the files of a part; raises UsageError where its repository lacks them."""
        owner, name = part.repo_id.split("/")
        repo_id = f"{self.owners.get(owner, owner)}/{name}"
        published = self.list_files(repo_id, part.repo_type)
        choices = [choice.format(hidden_size=hidden_size or part.hidden_size) for choice in part.choices]
        for choice in choices:
            names = choice.split(" + ")
            if published.keys() >= set(names):
                return [published[name] for name in names]
        there = ", ".join(sorted(name for name in published if not name.startswith("."))) or "nothing"
        raise UsageError(f"{repo_id} on {self.endpoint} has no {' and no '.join(choices)}. It has: {there}.")


def weights_part(name: str, about: str) -> Part:
    """Returns weights of the published model."""
    files = (f"{name}_{{hidden_size}}.pth",)
    return Part("model", "jingyaogong/MiniMind2-V-PyTorch", SAVE_DIR, about, files, ("tower", "tokenizer"))


def weights_part_3v(name: str, about: str) -> Part:
    """Returns weights of minimind-3v."""
    files, needs = (f"{name}_{{hidden_size}}.pth",), ("tower_3v", "tokenizer_3v")
    return Part("model", "jingyaogong/minimind-3v-pytorch", SAVE_3V_DIR, about, files, needs, 768)


def data_part(name: str, about: str) -> Part:
    """Returns one stage's data, in its newest form first: a parquet file with the pictures, or rows and a zip."""
    choices = (f"{name}_i2t.parquet", f"{name}_data.jsonl + {name}_images.zip", f"{name}_data.parquet")
    return Part("dataset", "jingyaogong/minimind-v_dataset", DATASET_DIR, about, choices)


TOWER_CONFIG = "config.json + preprocessor_config.json"
TOWER_FILES = (f"{TOWER_CONFIG} + model.safetensors", f"{TOWER_CONFIG} + pytorch_model.bin")
TOKENIZER_FILES = ("tokenizer.json + tokenizer_config.json",)
PARTS = {
    "tower": Part("model", "openai/clip-vit-base-patch16", TOWER_DIR, "the vision tower", TOWER_FILES),
    "tokenizer": Part("model", "jingyaogong/MiniMind2-V", TOKENIZER_DIR, "the tokenizer", TOKENIZER_FILES),
    "sft_vlm": weights_part("sft_vlm", "the trained model"),
    "pretrain_vlm": weights_part("pretrain_vlm", "after pretraining"),
    "llm": weights_part("llm", "before any picture"),
    "pretrain": data_part("pretrain", "pictures with captions"),
    "sft": data_part("sft", "pictures with conversations"),
    "minimind-3v": weights_part_3v("sft_vlm", "the trained model of the newest generation"),
    "llm_3v": weights_part_3v("llm", "the same before any picture"),
    "tower_3v": Part("model", "jingyaogong/siglip2-base-p32-256-ve", TOWER_3V_DIR, "its vision tower", TOWER_FILES),
    "tokenizer_3v": Part("model", "jingyaogong/minimind-3v", TOKENIZER_3V_DIR, "its tokenizer", TOKENIZER_FILES),
}
STAGES = ("pretrain", "sft")
TO_TRAIN = ("tower", "llm", "tokenizer", *STAGES)
MODELSCOPE_OWNERS = {"openai": "openai-mirror", "jingyaogong": "gongjy"}

UNPACKED_PER_ZIP = 1.6  # a guess: JPEGs of 4 kB do not shrink in a zip, and fill whole blocks on disk


def find_source(name: str) -> Source:
    """Returns what --source names."""
    if name == "modelscope":
        cure = "leave --source out (the hub has the same files)"
        return Source(modelscope_endpoint(), list_modelscope, MODELSCOPE_OWNERS, cure)
    cure = "set HF_ENDPOINT=https://MIRROR, or try --source modelscope"
    return Source(ENDPOINT, list_hub, {}, cure, "check HF_TOKEN (your access token), or ")


def folder_of(part: Part, save_dir: Path | None, dest: Path) -> Path:
    """Returns where a part's files go."""
    if part.needs and save_dir:
        return save_dir / part.folder.relative_to(SAVE_DIR)
    return dest / part.folder.relative_to(ROOT)


def plan(args: argparse.Namespace, source: Source) -> dict[str, dict[Path, RemoteFile]]:
    """Asks the source what makes up the wanted parts: for each of them, path here -> published file."""
    files = {}
    for name in args.parts:
        folder = folder_of(PARTS[name], args.save_dir, args.dest)
        chosen = source.list_part(PARTS[name], args.hidden_size)
        # Training looks for pretrain_data.parquet, whichever name it was published under.
        files[name] = {folder / file.name.replace("_i2t.", "_data."): file for file in chosen}
    return files


def final_path(path: Path) -> Path:
    """Returns where a file ends up: for a zip, the folder it is unpacked to."""
    return path.with_suffix("") if path.suffix == ".zip" else path


def is_in_place(path: Path, file: RemoteFile) -> bool:
    """Tells whether nothing is left to do for a file; raises where the user's own file has its name."""
    final, is_weights = final_path(path), path.suffix == ".pth"
    if final.is_dir() and any(final.iterdir()):
        return True
    elsewhere = "rename it, or put the published weights into another folder with --save_dir"
    if is_weights and path.with_suffix(".json").exists():
        raise UsageError(f"{path} is of your own training ({path.stem}.json beside it says so): {elsewhere}.")
    if path.exists() and path.stat().st_size != file.size:
        cure = elsewhere if is_weights else "move or delete it, or name the other parts to fetch only those"
        raise UsageError(f"{path} has {path.stat().st_size:,} bytes, the published file {file.size:,}: {cure}.")
    # Weights of one's own have the size of the published ones. Nobody makes the other files.
    if is_weights and path.exists() and not has_checksum(path, file.checksum):
        raise UsageError(f"{path} is not the published file (another checksum): {elsewhere}.")
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
    """Reads the command line; `parts` comes in the order of PARTS, with what weights need."""
    parts = "\n".join(f"  {name:<12} {part.about} ({part.repo_id})" for name, part in PARTS.items())
    about = f"{__doc__}\nparts (default: all, which is {', '.join(TO_TRAIN)}):\n{parts}"
    parser = ArgumentParser(description=about, formatter_class=HelpFormatter)
    parser.add_argument("parts", nargs="*", choices=("all", *PARTS), default="all", metavar="PART", help="see above")
    parser.add_argument("--hidden_size", type=int, help="which size of weights (default: 512; of minimind-3v 768)")
    parser.add_argument("--source", choices=("hub", "modelscope"), default="hub", help="where to fetch from")
    parser.add_argument("--dest", type=file_path, default=ROOT, help="put everything under this folder")
    parser.add_argument("--save_dir", type=file_path, help="put weights there (default: out)")
    parser.add_argument("--keep_zip", action="store_true", help="keep a zip of pictures after it is unpacked")
    args = parser.parse_args(argv)
    named = set(TO_TRAIN if "all" in args.parts else ()) | {part for part in PARTS if part in args.parts}
    if "minimind-3v" in named and "llm" not in named and named.intersection(STAGES):
        named.add("llm_3v")  # what training starts from
    named.update(need for part in tuple(named) for need in PARTS[part].needs)
    args.parts = [part for part in PARTS if part in named]
    args.dest, args.save_dir = args.dest.absolute(), args.save_dir and args.save_dir.absolute()
    return args


def run(args: argparse.Namespace, source: Source) -> None:
    """Asks the source, checks the disk, fetches, unpacks and prints where everything is."""
    print(f"Asking {source.endpoint} ...", flush=True)
    files, missing = plan(args, source), {}
    for part, published in files.items():
        here = {path: file for path, file in published.items() if not is_in_place(path, file)}
        size = human(sum(bytes_to_fetch(path, file) for path, file in here.items()))
        names = ", ".join(file.name for file in here.values())
        print(f"  {part:<12} {f'{names} ({size})' if here else 'already here'}")
        missing |= here
    check_disk(missing)
    for path, file in missing.items():
        if not path.exists():
            fetch(file, path)
            print(f"  fetched   {shown(path, args)} ({human(file.size)})", flush=True)
        if (folder := final_path(path)) != path:
            unpack(path, folder)
            print(f"  unpacked  {shown(folder, args)}/", flush=True)
            if not args.keep_zip:
                path.unlink()
    report(args, files)


def shown(path: Path, args: argparse.Namespace) -> str:
    """Returns a path as it is printed, relative to --dest where it lies inside."""
    return (path.relative_to(args.dest) if path.is_relative_to(args.dest) else path).as_posix()


def report(args: argparse.Namespace, files: dict[str, dict[Path, RemoteFile]]) -> None:
    """Prints what is where, and the commands to type next."""
    print(f"\nIn place, under {args.dest}:")
    for part, published in files.items():
        paths = [final_path(path) for path in published]
        if PARTS[part].choices in (TOWER_FILES, TOKENIZER_FILES):
            paths = [paths[0].parent]
        print(f"  {part:<12} {' + '.join(shown(path, args) + '/' * path.is_dir() for path in paths)}")
    stages = [stage for stage in STAGES if stage in args.parts]
    if args.dest != ROOT and stages:
        print(f"Training looks under {ROOT}: move these folders there.")
    for stage in stages:
        print("Train: ", command(f"trainer/train_{stage}_vlm.py", *training_flags(stage, args)))
    for part, published in files.items():
        if PARTS[part].needs and not (part in ("llm", "llm_3v") and stages):
            print("Talk to it: ", talk_command(PARTS[part], next(iter(published)), args))


def training_flags(stage: str, args: argparse.Namespace) -> list[str]:
    """Returns the flags of a stage's command: minimind-3v's if `llm_3v` was asked for and `llm` was not."""
    if "llm_3v" not in args.parts or "llm" in args.parts:
        return ["--hidden_size", str(args.hidden_size)] if args.hidden_size else []
    part = PARTS["llm_3v"]
    size = args.hidden_size or part.hidden_size
    starts = {
        "pretrain": folder_of(part, args.save_dir, ROOT) / part.choices[0].format(hidden_size=size),
        "sft": SAVE_DIR / f"pretrain_3v_{size}.pth",
    }
    return ["--from_weight", typed(starts[stage]), "--save_weight", f"{stage}_3v"]


def talk_command(part: Part, weights: Path, args: argparse.Namespace) -> str:
    """Returns the command that shows the example photo to the weights."""
    flags = ["--weight", typed(weights), "--image", typed(EXAMPLE_PHOTO)]
    for flag, need in zip(("--vision_model_path", "--tokenizer_path"), part.needs, strict=True):
        if (folder := folder_of(PARTS[need], args.save_dir, args.dest)) not in (TOWER_DIR, TOKENIZER_DIR):
            flags += [flag, typed(folder)]
    return command("eval_vlm.py", *flags)


def command(script: str, *flags: str) -> str:
    """Returns the line that runs one of the project's scripts."""
    return shlex.join(["python", typed(ROOT / script), *flags])


def typed(path: Path) -> str:
    """Returns a path as it is typed in the current folder."""
    return os.path.relpath(path) if Path.cwd().is_relative_to(ROOT) and path.is_relative_to(ROOT) else str(path)


def explain(error: HTTPError | OSError, source: Source) -> str:
    """Returns a line for the person who typed the command: what is wrong, and what to do."""
    if not isinstance(error, HTTPError):
        return str(error).rstrip(".")  # a full disk, or HF_HUB_OFFLINE
    if not isinstance(error, HfHubHTTPError):
        reason = str(error) or type(error).__name__
        return f"the connection to {source.endpoint} failed ({reason}): check the network, or {source.cure}"
    status, url = error.response.status_code, str(error.response.url).split("?")[0]
    advice = f"try again later, or {source.cure}"
    if isinstance(error, GatedRepoError):
        advice = "it needs a login: accept the terms on its page, then set HF_TOKEN"
    elif status in (401, 403, 404):
        advice = f"not there, or private: {source.access}{source.cure}"
    return f"{url} answers {status}: {advice}"


def main(argv: list[str] | None = None) -> None:
    """Runs the command."""
    args = parse_args(argv)
    source = find_source(args.source)
    try:
        run(args, source)
    except KeyboardInterrupt:
        print("\nStopped. The same command resumes.", file=sys.stderr)
        sys.exit(130)
    except (HTTPError, OSError) as error:
        raise UsageError(f"{explain(error, source)}. What has arrived is kept: the same command resumes.") from error


if __name__ == "__main__":
    run_script(main)
