"""Download the published weights, tokenizer and data into the folders where training looks for them.

    python scripts/download.py sft_vlm          a trained model to talk to
    python scripts/download.py                  everything to train the small model
    python scripts/download.py tower pretrain   only these parts
    HF_ENDPOINT=https://MIRROR python scripts/download.py

Weights bring the tower and tokenizer that they were trained with.
The same command resumes after an interruption and downloads nothing twice.
"""

import argparse
import hashlib
import os
import shlex
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import quote_plus, urlsplit

from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import paths
from common.cli import ArgumentParser, file_path
from common.errors import UsageError, run_script
from common.files import hash_of
from common.paths import display_path

LONGEST_WAIT = 8  # seconds; the waits between attempts that bring no new byte are 1, 2, 4 and 8
RETRY_STATUS = {408, 429, 500, 502, 503, 504}
REQUEST = {"timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT, "follow_redirects": True}
human = partial(tqdm.format_sizeof, suffix="B")  # 12.3GB


@dataclass(frozen=True)
class Part:
    repo_id: str
    folder: Path
    about: str
    choices: tuple[str, ...]  # the files of each form it is published in, with {} for the size; the first complete one
    needs: tuple[str, ...] = ()  # of weights: the parts with the tower and tokenizer that they were trained with
    hidden_size: int = 512  # of weights: the default of --hidden_size


V2, V3, DATA = "jingyaogong/MiniMind2-V-PyTorch", "jingyaogong/minimind-3v-pytorch", "jingyaogong/minimind-v_dataset"
OF_V2, OF_V3 = ("tower", "tokenizer"), ("tower_3v", "tokenizer_3v")
TOWER = tuple(f"config.json preprocessor_config.json {file}" for file in ("model.safetensors", "pytorch_model.bin"))
TOKENIZER = ("tokenizer.json tokenizer_config.json",)
PRETRAIN, SFT = ("pretrain_i2t.parquet", "pretrain_data.parquet"), ("sft_i2t.parquet", "sft_data.parquet")
PARTS = {
    "tower": Part("openai/clip-vit-base-patch16", paths.TOWER_DIR, "the vision tower", TOWER),
    "tokenizer": Part("jingyaogong/MiniMind2-V", paths.TOKENIZER_DIR, "the tokenizer", TOKENIZER),
    "sft_vlm": Part(V2, paths.SAVE_DIR, "the trained model", ("sft_vlm_{}.pth",), OF_V2),
    "pretrain_vlm": Part(V2, paths.SAVE_DIR, "after pretraining", ("pretrain_vlm_{}.pth",), OF_V2),
    "llm": Part(V2, paths.SAVE_DIR, "the language model before any picture", ("llm_{}.pth",), OF_V2),
    "pretrain": Part(DATA, paths.DATASET_DIR, "pictures with captions", PRETRAIN),
    "sft": Part(DATA, paths.DATASET_DIR, "pictures with conversations", SFT),
    "minimind-3v": Part(V3, paths.SAVE_3V_DIR, "the newest generation, trained", ("sft_vlm_{}.pth",), OF_V3, 768),
    "llm_3v": Part(V3, paths.SAVE_3V_DIR, "its language model before any picture", ("llm_{}.pth",), OF_V3, 768),
    "tower_3v": Part("jingyaogong/siglip2-base-p32-256-ve", paths.TOWER_3V_DIR, "its vision tower", TOWER),
    "tokenizer_3v": Part("jingyaogong/minimind-3v", paths.TOKENIZER_3V_DIR, "its tokenizer", TOKENIZER),
}
STAGES = ("pretrain", "sft")
TO_TRAIN = ("tower", "llm", "tokenizer", *STAGES)
MODELSCOPE_OWNERS = {"openai": "openai-mirror", "jingyaogong": "gongjy"}  # what the hub's owners are called there
ADVICE = {  # what to try when a site fails
    "hub": "set HF_ENDPOINT=https://MIRROR or HF_TOKEN (your access token), or try --source modelscope",
    "modelscope": "check MODELSCOPE_ENDPOINT, or leave --source out (the hub has the same files)",
}


@dataclass(frozen=True)
class RemoteFile:
    """A published file. Its checksum is a SHA-256, or for a small file of the hub its git blob id (a SHA-1)."""

    url: str
    headers: dict[str, str]
    size: int | None
    checksum: str | None

    def is_at(self, path: Path) -> bool:
        if path.stat().st_size != self.size:
            return False
        if len(self.checksum) == 64:
            return hash_of(path) == self.checksum
        return hashlib.sha1(b"blob %d\0" % self.size + path.read_bytes()).hexdigest() == self.checksum


def find_files(args: argparse.Namespace, part: Part) -> dict[str, RemoteFile]:
    """Returns a part's published files by name; raises UsageError where the repository lacks them.

    For a data set, ModelScope lists the first 200 files. Its addresses are those of its own client, modelscope 1.40.2
    (modelscope_hub 0.5.1, `_legacy_api.py`).
    """
    repo_id, repo_type = part.repo_id, "dataset" if part.folder == paths.DATASET_DIR else "model"
    published = {}
    try:
        _ = urlsplit(args.endpoint).port  # ValueError for one that is no number
        if args.source == "hub":
            hub, timeout = HfApi(args.endpoint), constants.HF_HUB_DOWNLOAD_TIMEOUT
            info = hub.repo_info(repo_id, repo_type=repo_type, files_metadata=True, timeout=timeout)
            for entry in info.siblings or []:
                url = hf_hub_url(repo_id, entry.rfilename, repo_type=repo_type, revision=info.sha)
                checksum = entry.lfs.sha256 if entry.lfs else entry.blob_id
                published[entry.rfilename] = RemoteFile(url, build_hf_headers(), entry.size, checksum)
        else:
            owner, name = repo_id.split("/")
            repo_id = f"{MODELSCOPE_OWNERS[owner]}/{name}"
            repo = f"{args.endpoint}/api/v1/{repo_type}s/{repo_id}/repo"
            page = {"Revision": "master", "Recursive": "True", "PageNumber": 1, "PageSize": 200}
            listing = "tree" if repo_type == "dataset" else "files"
            response = get_session().get(f"{repo}/{listing}", params=page, **REQUEST)
            hf_raise_for_status(response)
            for entry in response.json()["Data"]["Files"]:
                if entry["Type"] != "tree":
                    url = f"{repo}?Revision=master&FilePath={quote_plus(entry['Path'])}"
                    published[entry["Path"]] = RemoteFile(url, {}, entry["Size"], entry["Sha256"].lower())
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # a login page, some other server's JSON
        raise UsageError(f"{args.endpoint} does not answer like a model hub: {ADVICE[args.source]}.") from error
    choices = [names.format(args.hidden_size or part.hidden_size).split() for names in part.choices]
    names = next((names for names in choices if published.keys() >= set(names)), None)
    if names is None:
        wanted, found = " or ".join(map(" + ".join, choices)), ", ".join(sorted(published)) or "nothing"
        raise UsageError(f"{repo_id} on {args.endpoint} has no {wanted}. It has: {found}.")
    for name in names:
        if published[name].size is None or not published[name].checksum:
            raise UsageError(f"{args.endpoint} has no size or checksum for {name}: {ADVICE[args.source]}.")
    return {name: published[name] for name in names}


def fetch(file: RemoteFile, path: Path):
    """Downloads a file, which gets its name once its checksum is verified; resumes where an earlier run stopped.

    The range requests are our own: huggingface_hub's `hf_hub_download` starts over after an interruption (its pull
    request 4228), and its `http_get` takes ModelScope's partial answers, which have the status 200, for whole files.
    Raises HTTPError if the server refuses the file, or sends nothing new four times; UsageError if it arrived damaged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Named after the checksum, so that two versions are never joined.
    part, wait = path.with_name(f"{path.name}.{file.checksum[:12]}.part"), 0.5
    often = {"delay": 1, "mininterval": 0.2 if sys.stderr.isatty() else 30}  # few lines in a log file
    bar = tqdm(desc=f"  {path.name}", total=file.size, leave=False, unit="B", unit_scale=True, **often)
    with bar, open(part, "ab") as out:
        while (start := out.tell()) < file.size:
            headers = {**file.headers, "Accept-Encoding": "identity", **({"Range": f"bytes={start}-"} if start else {})}
            try:
                with get_session().stream("GET", file.url, headers=headers, **REQUEST) as response:
                    hf_raise_for_status(response)
                    # Not the status: ModelScope sends the rest with 200, a server without ranges the whole file.
                    if not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                        out.seek(0)
                        out.truncate()
                    bar.n = out.tell()
                    for chunk in response.iter_bytes():
                        out.write(chunk)
                        bar.update(len(chunk))
                if out.tell() < file.size:
                    raise HTTPError(f"{file.url} ends after {out.tell():,} of {file.size:,} bytes")
            except HTTPError as error:
                wait = wait * 2 if out.tell() == start else 1
                is_refused = isinstance(error, HfHubHTTPError) and error.response.status_code not in RETRY_STATUS
                if is_refused or wait > LONGEST_WAIT:
                    raise
                bar.write(f"  connection lost, trying again in {wait:g} s", file=sys.stderr)
                time.sleep(wait)
    if not file.is_at(part):
        part.unlink()
        raise UsageError(f"{path.name} arrived damaged (wrong checksum) and was deleted: run this again.")
    os.replace(part, path)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parts = "\n".join(f"  {name:<12} {part.about} ({part.repo_id})" for name, part in PARTS.items())
    about = f"{__doc__}\nparts (default: all, which is {', '.join(TO_TRAIN)}):\n{parts}"
    parser = ArgumentParser(description=about)
    parser.add_argument("parts", nargs="*", choices=("all", *PARTS), default="all", metavar="PART", help="see above")
    parser.add_argument("--hidden_size", type=int, help="size of the weights (default: 512; minimind-3v: 768)")
    parser.add_argument("--source", choices=tuple(ADVICE), default="hub", help="site to fetch from")
    parser.add_argument("--dest", type=file_path, default=paths.ROOT, help="put everything under this folder")
    args = parser.parse_args(argv)
    wanted = {part for part in PARTS if part in args.parts} | set(TO_TRAIN if "all" in args.parts else ())
    if "minimind-3v" in wanted and "llm" not in wanted and wanted.intersection(STAGES):
        wanted.add("llm_3v")  # what training starts from
    wanted.update(*[PARTS[part].needs for part in wanted])
    args.parts = [part for part in PARTS if part in wanted]
    args.dest, args.endpoint = args.dest.absolute(), constants.ENDPOINT
    if args.source == "modelscope":  # the address as its own client reads it
        endpoint = os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN") or "www.modelscope.cn"
        args.endpoint = (endpoint if "://" in endpoint else f"https://{endpoint}").rstrip("/")
    return args


def main(argv: list[str] | None = None):
    """Asks the site for all parts, fetches what is missing, and prints what to type next."""
    args, files, missing = parse_args(argv), {}, {}
    try:
        print(f"Asking {args.endpoint} ...", flush=True)
        for name in args.parts:
            part = PARTS[name]
            folder, chosen = args.dest / part.folder.relative_to(paths.ROOT), find_files(args, part)
            # Training looks for pretrain_data.parquet, whichever name it was published under.
            files[name] = published = {folder / file.replace("_i2t.", "_data."): chosen[file] for file in chosen}
            for path, file in published.items():
                is_trained_here = path.suffix == ".pth" and path.with_suffix(".json").exists()
                if is_trained_here or (path.exists() and not file.is_at(path)):
                    cure = "move or delete it, or put the published files into another folder with --dest"
                    raise UsageError(f"{path} is your own, or another version of the published file: {cure}.")
            wanted = {path: file for path, file in published.items() if not path.exists()}
            size = human(sum(file.size for file in wanted.values()))
            places = " + ".join(map(display_path, published))
            print(f"  {name:<12} {places} ({f'{size} to fetch' if wanted else 'already here'})", flush=True)
            missing |= wanted
        for path, file in missing.items():
            fetch(file, path)
            print(f"  fetched   {display_path(path)} ({human(file.size)})", flush=True)
    except (HTTPError, OSError) as error:
        why, advice = str(error).rstrip("."), ADVICE[args.source]  # a full disk, or HF_HUB_OFFLINE
        if isinstance(error, HfHubHTTPError):
            url, status = str(error.response.url).split("?")[0], error.response.status_code
            reason = "not there, or private" if status in (401, 403, 404) else "try again later"
            why = f"{url} answers {status}: {reason}, or {advice}"
        elif isinstance(error, HTTPError):
            reason = str(error) or type(error).__name__
            why = f"the connection to {args.endpoint} failed ({reason}): check the network, or {advice}"
        raise UsageError(f"{why}. Partial files stay: the same command resumes.") from error
    print()
    stages = [stage for stage in STAGES if stage in args.parts]
    if args.dest != paths.ROOT and stages:
        print(f"Training looks under {paths.ROOT}: move these folders there.")
    for stage in stages:
        command = ["python", f"trainer/train_{stage}_vlm.py"]
        if "llm_3v" in args.parts and "llm" not in args.parts:
            folder, start = (paths.SAVE_3V_DIR, "llm") if stage == "pretrain" else (paths.SAVE_DIR, "pretrain_3v")
            weights = folder / f"{start}_{args.hidden_size or PARTS['llm_3v'].hidden_size}.pth"
            command += ["--from_weight", display_path(weights), "--save_weight", f"{stage}_3v"]
        elif args.hidden_size:
            command += ["--hidden_size", str(args.hidden_size)]
        print(f"Train:  {shlex.join(command)}")
    for part, published in files.items():
        if PARTS[part].needs and not (part in ("llm", "llm_3v") and stages):
            [weights] = published
            command = ["python", "eval_vlm.py", "--weight", weights, "--image", paths.EXAMPLE_PHOTO]
            if args.dest != paths.ROOT:
                tower, tokenizer = (next(iter(files[need])).parent for need in PARTS[part].needs)
                command += ["--vision_model_path", tower, "--tokenizer_path", tokenizer]
            print(f"Talk to it:  {shlex.join(map(display_path, command))}")


if __name__ == "__main__":
    run_script(main)
