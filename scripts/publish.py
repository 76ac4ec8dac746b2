"""Publish a trained model on the Hugging Face hub, with a model card made from its run's record.

    python scripts/publish.py out/sft_vlm_512-hf NAME/REPO --license apache-2.0 --dry_run
        writes the card to look at, and lists what would be uploaded; contacts nobody
    python scripts/publish.py out/sft_vlm_512-hf NAME/REPO --license apache-2.0
        uploads a folder of scripts/export.py; a weight file (out/sft_vlm_512.pth) works the same way

The access token is the one of `hf auth login`, or HF_TOKEN. After an interruption, the same command uploads what is
missing. Up to eight sample images of the run go with the card: look at them first, or leave them out by --no_samples.
"""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path, PurePosixPath, PureWindowsPath

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ArgumentParser, file_path
from common.errors import UsageError, run_script
from common.files import RECORD, hash_of
from common.files import read_record as read_export_record
from common.paths import display_path, printable
from model.model_vlm import config_fields
from model.weights import SIDECAR, TRAINING, read_folder, read_training, read_weights
from scripts.data.transfer import human
from scripts.share.model_card import CARD, PICTURES, Model, card_files
from trainer.report.page import Record, read_record

NEW_TOKEN = f"create one with write access at {constants.ENDPOINT}/settings/tokens, then run `hf auth login`"


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("source", metavar="SOURCE", type=file_path, help="a folder of scripts/export.py, or a .pth")
    add("repo", metavar="NAME/REPO", help="your name (or an organisation's) on the hub, and the model's")
    what = "the hub's id of a licence that your data and starting weights allow, such as apache-2.0"
    add("--license", type=str.lower, required=True, help=what)
    add("--language", default="zh", help="language codes for the card, as zh or zh,en")
    add("--private", action="store_true", help="only you can see it, where the repository is new")
    add("--no_samples", action="store_true", help="publish no sample images")
    add("--dry_run", action="store_true", help="upload nothing: write the card, list the files")
    args = parser.parse_args(argv)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", args.repo):
        raise UsageError(f"{args.repo} is no repository: use NAME/REPO, with your name on the hub")
    return args


def read_model(path: Path) -> Model:
    """Reads what is to be published: a folder of scripts/export.py, or a weight file with its sidecar.

    Raises:
        UsageError: If it is something else, or its files are not as they were written.
    """
    if path.is_file() and path.suffix == ".pth" and not path.stem.endswith("_resume"):
        kind, name, sidecar_path = "weights", path.stem, path.with_suffix(".json")
        files = {file.name: file for file in (path, sidecar_path) if file.is_file()}
    else:
        files, sidecar_path = exported_files(path), path / TRAINING
        name = re.sub(r"-(hf|gguf|f16|q8_0)$", "", path.name)
        kind = "gguf" if any(file.endswith(".gguf") for file in files) else "transformers"
    if kind == "gguf":
        sees_images, parameters = any(file.startswith("mmproj-") for file in files), None
        sidecar, config = read_training(path), {}
    else:
        weights = read_weights(path) if kind == "weights" else read_folder(path)
        sees_images, sidecar, config = weights.has_projection, weights.sidecar, config_fields(weights.config)
        parameters = sum(tensor.numel() for name, tensor in weights.tensors.items() if name != "lm_head.weight")
    known = (name.removesuffix("?") for name in SIDECAR)
    sidecar = without_folders({name: sidecar[name] for name in known if name in sidecar})
    if sidecar_path.name in files:
        files[sidecar_path.name] = (json.dumps(sidecar, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
    sidecar = {"arguments": {}, "config": config, "versions": {}} | sidecar
    return Model(kind, name, files, sees_images, sidecar, parameters)


def exported_files(folder: Path) -> dict[str, Path | bytes]:
    """Returns the files that an export's record lists, by name.

    Raises:
        UsageError: If there is no record, or a file of it is missing, a link or changed.
    """
    record = read_export_record(folder)
    hashes = record.get("files")
    if "exported_by" not in record or not isinstance(hashes, dict):
        raise UsageError(
            f"{display_path(folder)} is nothing to publish: name a folder that scripts/export.py wrote (export an old "
            "one again), or a .pth weight file (NAME_resume.pth is a training state, which is never published)"
        )
    for name, sha256 in hashes.items():
        file = folder / name
        if file.is_symlink() or file.parent != folder or hash_of(file) != sha256:  # a name may lead out of the folder
            what = f"{display_path(file)} is not what scripts/export.py wrote"
            raise UsageError(f"{what}: it is missing, a link, or was changed. Export the model again")
    return {name: folder / name for name in hashes}


def without_folders(value):
    """Returns a sidecar without this machine's folders: absolute paths become names."""
    if isinstance(value, dict):
        return {name: without_folders(content) for name, content in value.items()}
    is_path = isinstance(value, str) and (PurePosixPath(value).is_absolute() or PureWindowsPath(value).drive)
    return PureWindowsPath(value).name if is_path else value


def find_record(folder: Path, model: Model) -> tuple[Record, list[str]]:
    """Reads the record of the model's run; returns it, empty where there is none, and why parts of it are missing."""
    empty = Record(folder, model.name, [], [])
    try:
        record = read_record(folder, model.name)
    except UsageError as error:
        return empty, [str(error)]
    exported, now = model.sidecar.get("written"), record.sidecar.get("written")
    if exported and now and exported != now:
        again = f"{display_path(folder / model.name)} was trained after this was exported ({exported} and {now})"
        return empty, [f"{again}, so its record is of another model: export it again"]
    return record, list(record.missing.values())


def show(args: argparse.Namespace, model: Model, made: dict[str, bytes], missing: list[str]):
    """Prints what is uploaded, with sizes, what of the folder is not, and what the card lacks."""
    files = model.files | made
    sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files.items()}
    print(f"{display_path(args.source)} -> {args.repo}")
    for name, size in sizes.items():
        print(f"  {printable(name):<40} {human(size):>8}")
    print(f"  {f'{len(sizes)} files':<40} {human(sum(sizes.values())):>8}")
    for path in sorted(args.source.iterdir()) if args.source.is_dir() else ():
        if path.name not in (*model.files, RECORD):
            print(f"left out: {printable(path.name)}")
    for line in missing:
        print(f"the card says less: {line}")
    if pictures := sum(name.startswith(f"{PICTURES}/") for name in made):
        print(f"{pictures} images of the run's data go with the card: may you publish them? --no_samples omits them")


def upload(files: dict[str, Path | bytes], args: argparse.Namespace):
    """Makes the repository if need be, and commits the files; what the hub has already is not sent again.

    Raises:
        UsageError: If there is no access token, the hub refuses it or cannot be reached, or the repository is to be
            private and is not.
    """
    token = get_token() or ""
    if not re.fullmatch(r"[!-~]+", token):  # the error of a header that cannot be sent would show it
        what = "the access token holds characters that no token has" if token else "there is no access token of the hub"
        raise UsageError(f"{what}: {NEW_TOKEN}")
    api = HfApi(endpoint=constants.ENDPOINT, token=token)
    try:
        ModelCard(files[CARD].decode("utf-8")).validate()  # before anything is made
        url = api.create_repo(args.repo, private=args.private or None, exist_ok=True)
        is_private = api.repo_info(args.repo).private
        if args.private and not is_private:
            raise UsageError(
                f"{args.repo} exists and is public: --private does not change that, so nothing was uploaded. Make it "
                f"private at {url}/settings, or leave --private out"
            )
        additions = [CommitOperationAdd(name, file) for name, file in files.items()]
        api.create_commit(args.repo, additions, commit_message=f"Upload {args.source.name}")
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            refused = f"the access token may not write to {args.repo}"
            reason = f"{refused} ({reason}). Is that your name? If it is, {NEW_TOKEN}"
        what = f"the upload to {constants.ENDPOINT} failed: {printable(reason).replace(token, '[the token]')}"
        raise UsageError(f"{what}. The same command uploads what is missing.") from error
    print(f"{url} ({'private' if is_private else 'public'})")


def main(argv: list[str] | None = None):
    args = parse_arguments(argv)
    args.source = args.source.absolute()
    model = read_model(args.source)
    record, missing = find_record(args.source.parent, model)
    made = card_files(model, record, args.repo, args.license, args.language.split(","), not args.no_samples)
    show(args, model, made, missing)
    if not args.dry_run:
        upload(model.files | made, args)
        return
    folder = Path(tempfile.mkdtemp(prefix="publish-"))
    for name, content in made.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    print(f"nothing was uploaded; the card is {folder / CARD}")


if __name__ == "__main__":
    run_script(main)
