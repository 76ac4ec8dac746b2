"""Download the published weights, tokenizer and data into the folders where training looks for them.

    python scripts/download.py sft_vlm          a trained model to talk to
    python scripts/download.py                  everything to train the small model
    python scripts/download.py tower pretrain   only these parts
    python scripts/download.py sft_vlm --hidden_size 768
    python scripts/download.py sft_vlm --source modelscope
    HF_ENDPOINT=https://MIRROR python scripts/download.py

Weights bring the tower and tokenizer that they were trained with.
The same command resumes after an interruption and downloads nothing twice.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HTTPError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import paths
from common.cli import ArgumentParser, file_path
from common.errors import UsageError, run_script
from common.paths import display_path
from scripts.data.transfer import RemoteFile, fetch, human, list_hub, list_modelscope


@dataclass(frozen=True)
class Part:
    """What one word on the command line asks for.

    Attributes:
        choices: The files of each form it is published in, with {} for the size; the first complete one is downloaded.
        needs: For weights: the parts with the tower and the tokenizer that they were trained with.
        hidden_size: For weights: the default of --hidden_size.
    """

    repo_id: str
    folder: Path
    about: str
    choices: tuple[tuple[str, ...], ...]
    needs: tuple[str, ...] = ()
    hidden_size: int = 512


CONFIG = ("config.json", "preprocessor_config.json")
TOWER_FILES = ((*CONFIG, "model.safetensors"), (*CONFIG, "pytorch_model.bin"))
TOKENIZER_FILES = (("tokenizer.json", "tokenizer_config.json"),)
PRETRAIN_FILES = (("pretrain_i2t.parquet",), ("pretrain_data.parquet",))

V2 = {"repo_id": "jingyaogong/MiniMind2-V-PyTorch", "folder": paths.SAVE_DIR, "needs": ("tower", "tokenizer")}
V3 = {
    "repo_id": "jingyaogong/minimind-3v-pytorch",
    "folder": paths.SAVE_3V_DIR,
    "needs": ("tower_3v", "tokenizer_3v"),
    "hidden_size": 768,
}
DATA = {"repo_id": "jingyaogong/minimind-v_dataset", "folder": paths.DATASET_DIR}
PARTS = {
    "tower": Part("openai/clip-vit-base-patch16", paths.TOWER_DIR, "the vision tower", TOWER_FILES),
    "tokenizer": Part("jingyaogong/MiniMind2-V", paths.TOKENIZER_DIR, "the tokenizer", TOKENIZER_FILES),
    "sft_vlm": Part(about="the trained model", choices=(("sft_vlm_{}.pth",),), **V2),
    "pretrain_vlm": Part(about="after pretraining", choices=(("pretrain_vlm_{}.pth",),), **V2),
    "llm": Part(about="the language model before any picture", choices=(("llm_{}.pth",),), **V2),
    "pretrain": Part(about="pictures with captions", choices=PRETRAIN_FILES, **DATA),
    "sft": Part(about="pictures with conversations", choices=(("sft_i2t.parquet",), ("sft_data.parquet",)), **DATA),
    "minimind-3v": Part(about="the trained model of the newest generation", choices=(("sft_vlm_{}.pth",),), **V3),
    "llm_3v": Part(about="its language model before any picture", choices=(("llm_{}.pth",),), **V3),
    "tower_3v": Part("jingyaogong/siglip2-base-p32-256-ve", paths.TOWER_3V_DIR, "its vision tower", TOWER_FILES),
    "tokenizer_3v": Part("jingyaogong/minimind-3v", paths.TOKENIZER_3V_DIR, "its tokenizer", TOKENIZER_FILES),
}
STAGES = ("pretrain", "sft")
TO_TRAIN = ("tower", "llm", "tokenizer", *STAGES)


@dataclass(frozen=True)
class Source:
    """A site that publishes the files.

    Attributes:
        list_files: Lists a repository, by address, id and type ("model" or "dataset").
        owners: What the hub's owners are called there.
        advice: What to try when it fails.
    """

    endpoint: str
    list_files: Callable[[str, str, str], list[RemoteFile]]
    owners: dict[str, str]
    advice: str

    def files_of(self, part: Part, hidden_size: int | None) -> list[RemoteFile]:
        """Returns a part's published files; raises UsageError where the repository lacks them."""
        owner, name = part.repo_id.split("/")
        repo_id = f"{self.owners.get(owner, owner)}/{name}"
        try:
            _ = urlsplit(self.endpoint).port  # ValueError for one that is no number
            listed = self.list_files(self.endpoint, repo_id, "dataset" if part.folder == paths.DATASET_DIR else "model")
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # a login page, some other server's JSON
            raise UsageError(f"{self.endpoint} does not answer like a model hub: {self.advice}.") from error
        published = {file.name: file for file in listed}
        size = hidden_size or part.hidden_size
        choices = [[name.format(size) for name in names] for names in part.choices]
        names = next((names for names in choices if published.keys() >= set(names)), None)
        if names is None:
            wanted, found = " or ".join(map(" + ".join, choices)), ", ".join(sorted(published)) or "nothing"
            raise UsageError(f"{repo_id} on {self.endpoint} has no {wanted}. It has: {found}.")
        for name in names:
            if published[name].size is None or not published[name].checksum:
                raise UsageError(f"{self.endpoint} has no size or checksum for {name}: {self.advice}.")
        return [published[name] for name in names]


def find_source(name: str) -> Source:
    """Returns the site that --source names."""
    if name == "hub":
        advice = "set HF_ENDPOINT=https://MIRROR or HF_TOKEN (your access token), or try --source modelscope"
        return Source(constants.ENDPOINT, list_hub, {}, advice)
    # As ModelScope's own client reads it.
    endpoint = os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN") or "www.modelscope.cn"
    endpoint = (endpoint if "://" in endpoint else f"https://{endpoint}").rstrip("/")
    owners = {"openai": "openai-mirror", "jingyaogong": "gongjy"}
    advice = "check MODELSCOPE_ENDPOINT, or leave --source out (the hub has the same files)"
    return Source(endpoint, list_modelscope, owners, advice)


def is_in_place(path: Path, file: RemoteFile) -> bool:
    """Tells whether a file is here; raises UsageError where the user's own file has its name."""
    is_trained_here = path.suffix == ".pth" and path.with_suffix(".json").exists()
    if is_trained_here or (path.exists() and not file.is_at(path)):
        reason = f"{path} is your own, or another version of the published file"
        raise UsageError(f"{reason}: move or delete it, or put the published files into another folder with --dest.")
    return path.exists()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Reads the command line; `parts` comes in the order of PARTS, with what weights need."""
    parts = "\n".join(f"  {name:<12} {part.about} ({part.repo_id})" for name, part in PARTS.items())
    about = f"{__doc__}\nparts (default: all, which is {', '.join(TO_TRAIN)}):\n{parts}"
    parser = ArgumentParser(description=about)
    parser.add_argument("parts", nargs="*", choices=("all", *PARTS), default="all", metavar="PART", help="see above")
    parser.add_argument("--hidden_size", type=int, help="size of the weights (default: 512; minimind-3v: 768)")
    parser.add_argument("--source", choices=("hub", "modelscope"), default="hub", help="site to fetch from")
    parser.add_argument("--dest", type=file_path, default=paths.ROOT, help="put everything under this folder")
    args = parser.parse_args(argv)
    wanted = {part for part in PARTS if part in args.parts} | set(TO_TRAIN if "all" in args.parts else ())
    if "minimind-3v" in wanted and "llm" not in wanted and wanted.intersection(STAGES):
        wanted.add("llm_3v")  # what training starts from
    wanted.update(*[PARTS[part].needs for part in wanted])
    args.parts = [part for part in PARTS if part in wanted]
    args.dest = args.dest.absolute()
    return args


def run(args: argparse.Namespace, source: Source):
    """Asks the source for all parts, fetches what is missing, and prints what to type next."""
    print(f"Asking {source.endpoint} ...", flush=True)
    files, missing = {}, {}
    for name in args.parts:
        part = PARTS[name]
        folder, chosen = args.dest / part.folder.relative_to(paths.ROOT), source.files_of(part, args.hidden_size)
        # Training looks for pretrain_data.parquet, whichever name it was published under.
        files[name] = {folder / file.name.replace("_i2t.", "_data."): file for file in chosen}
    for name, published in files.items():
        wanted = {path: file for path, file in published.items() if not is_in_place(path, file)}
        size = human(sum(file.size for file in wanted.values()))
        places = " + ".join(map(display_path, published))
        print(f"  {name:<12} {places} ({f'{size} to fetch' if wanted else 'already here'})")
        missing |= wanted
    for path, file in missing.items():
        fetch(file, path)
        print(f"  fetched   {display_path(path)} ({human(file.size)})", flush=True)
    print("\n" + "\n".join(next_commands(args, files)))


def next_commands(args: argparse.Namespace, files: dict[str, dict[Path, RemoteFile]]) -> list[str]:
    """Returns the lines that say how to train with the data and talk to the weights."""
    lines, stages = [], [stage for stage in STAGES if stage in args.parts]
    if args.dest != paths.ROOT and stages:
        lines.append(f"Training looks under {paths.ROOT}: move these folders there.")
    for stage in stages:
        command = ["python", f"trainer/train_{stage}_vlm.py"]
        if "llm_3v" in args.parts and "llm" not in args.parts:
            size = args.hidden_size or PARTS["llm_3v"].hidden_size
            starts = {
                "pretrain": paths.SAVE_3V_DIR / f"llm_{size}.pth",
                "sft": paths.SAVE_DIR / f"pretrain_3v_{size}.pth",
            }
            command += ["--from_weight", display_path(starts[stage]), "--save_weight", f"{stage}_3v"]
        elif args.hidden_size:
            command += ["--hidden_size", str(args.hidden_size)]
        lines.append(f"Train:  {shlex.join(command)}")
    for part, published in files.items():
        if PARTS[part].needs and not (part in ("llm", "llm_3v") and stages):
            [weights] = published
            command = ["python", "eval_vlm.py", "--weight", weights, "--image", paths.EXAMPLE_PHOTO]
            if args.dest != paths.ROOT:
                tower, tokenizer = (next(iter(files[need])).parent for need in PARTS[part].needs)
                command += ["--vision_model_path", tower, "--tokenizer_path", tokenizer]
            lines.append(f"Talk to it:  {shlex.join(map(display_path, command))}")
    return lines


def explain(error: HTTPError | OSError, source: Source) -> str:
    """Returns what is wrong, and what to do."""
    if isinstance(error, HfHubHTTPError):
        url, status = str(error.response.url).split("?")[0], error.response.status_code
        reason = "not there, or private" if status in (401, 403, 404) else "try again later"
        return f"{url} answers {status}: {reason}, or {source.advice}"
    if isinstance(error, HTTPError):
        reason = str(error) or type(error).__name__
        return f"the connection to {source.endpoint} failed ({reason}): check the network, or {source.advice}"
    return str(error).rstrip(".")  # a full disk, or HF_HUB_OFFLINE


def main(argv: list[str] | None = None):
    args = parse_args(argv)
    source = find_source(args.source)
    try:
        run(args, source)
    except (HTTPError, OSError) as error:
        raise UsageError(f"{explain(error, source)}. Partial files stay: the same command resumes.") from error


if __name__ == "__main__":
    run_script(main)
