"""Publish a trained model on the Hugging Face hub, with a model card made from its run's record.

    python scripts/publish.py out/sft_vlm_512-hf NAME/REPO --license apache-2.0 --dry_run
        writes the card to look at, and lists what would be uploaded; contacts nobody
    python scripts/publish.py out/sft_vlm_512-hf NAME/REPO --license apache-2.0
        a transformers folder of scripts/export.py; GGUF files (out/sft_vlm_512-gguf) and a weight file
        (out/sft_vlm_512.pth, with the JSON beside it) work the same way

The access token is the one of `hf auth login`, or HF_TOKEN. After an interruption, the same command uploads what is
missing. Up to eight sample images of the run go with the card: look at them first, or leave them out by --no_samples.
"""

import argparse
import glob
import json
import re
import sys
import tempfile
from pathlib import Path, PurePosixPath, PureWindowsPath

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ArgumentParser, HelpFormatter, file_path
from common.errors import UsageError, run_script
from common.files import RECORD, hash_of
from common.files import read_record as read_export_record
from common.paths import display_path, printable
from model.vlm_config import config_fields
from model.weights import PACKAGES, SIDECAR, TRAINING, read_folder, read_training, read_weights
from scripts.data.transfer import human
from scripts.report import find_run
from scripts.share.model_card import CARD, PICTURES, Model, card_files
from trainer.flags import build_parser
from trainer.report.page import Record, read_record
from trainer.train_sft_vlm import STAGE

# All that is published of an exported folder, and only as scripts/export.py wrote it.
EXPORTED = (
    *("config.json", "generation_config.json", "model.safetensors", "chat_template.jinja", "tokenizer.json"),
    *("tokenizer_config.json", "preprocessor_config.json", "processor_config.json", "*.gguf", "Modelfile", TRAINING),
)
KNOWN = {name.removesuffix("?"): None for name in SIDECAR} | {
    "arguments": dict.fromkeys(action.dest for action in build_parser(STAGE, "")._actions),
    "versions": dict.fromkeys(("python", *PACKAGES)),
}
TOKENS = f"{constants.ENDPOINT}/settings/tokens"
NEW_TOKEN = f"create one with write access at {TOKENS}, then run `hf auth login` or set HF_TOKEN"


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("source", metavar="SOURCE", nargs="?", type=file_path, help="a folder of scripts/export.py, or a .pth")
    add("repo", metavar="NAME/REPO", nargs="?", help="your name (or an organisation's) on the hub, and the model's")
    add("--license", default="", help="required: the hub's id of a licence, such as apache-2.0")
    add("--language", default="zh", help="language codes for the card, as zh or zh,en")
    add("--private", action="store_true", help="only you can see it, where the repository is new")
    what = "the run's record, as out/sft_vlm_512 (default: the one that SOURCE is named after)"
    add("--run", type=file_path, help=what)
    add("--no_samples", action="store_true", help="publish no sample images")
    add("--dry_run", action="store_true", help="upload nothing: write the card, list the files")
    args = parser.parse_args(argv)
    if args.repo is None:
        raise UsageError("say what to publish and where: python scripts/publish.py SOURCE NAME/REPO --license ID")
    args.license = args.license.lower()
    if not re.fullmatch(r"[a-z0-9]+([.-][a-z0-9]+)*", args.license):
        raise UsageError(
            "--license is missing, or no id of a licence: it tells others what they may do with the model. Use one of "
            "the hub's ids, such as apache-2.0, mit or cc-by-nc-4.0, that your data and starting weights allow"
        )
    if not re.fullmatch(r"([a-z]{2,3}|multilingual)(,[a-z]{2,3})*", args.language):
        raise UsageError(f"--language {printable(args.language)}: use codes of two or three letters, as zh or zh,en")
    try:
        validate_repo_id(args.repo)
    except HFValidationError as error:
        raise UsageError(printable(f"{args.repo} is no name of a repository: {error}")) from error
    if "/" not in args.repo:
        raise UsageError(f"{args.repo} has no owner: use NAME/REPO, with your name (or an organisation's) on the hub")
    return args


def read_model(path: Path) -> Model:
    """Reads and checks what is to be published: an exported folder, or a weight file with its sidecar.

    Raises:
        UsageError: If it is something else, or a file of it is a link or not what its name says.
    """
    kind = "gguf" if any(path.glob("*.gguf")) else "transformers" if (path / "config.json").is_file() else "weights"
    if kind != "weights":
        name, sidecar_path = re.sub(r"-(hf|gguf|f16|q8_0)$", "", path.name), path / TRAINING
        files, beside = exported_files(path), path.glob("*")
    elif path.is_file() and path.suffix == ".pth" and not path.stem.endswith("_resume"):
        name, sidecar_path = path.stem, path.with_suffix(".json")
        files = {file.name: file for file in (path, sidecar_path) if file.is_file()}
        beside = path.parent.glob(f"{glob.escape(name)}[._]*")
    else:
        raise UsageError(
            f"{display_path(path)} is nothing to publish: name a folder that scripts/export.py wrote, or a .pth weight "
            "file (NAME_resume.pth is a training state, which is never published)"
        )
    if sidecar_path.is_symlink():
        raise UsageError(f"{display_path(sidecar_path)} is a link: only files in the folder itself are published")
    if not any(re.fullmatch(r"(?!mmproj-).+\.gguf|model\.safetensors|.+\.pth", name) for name in files):
        lacking = "no text model beside the mmproj" if kind == "gguf" else "no model.safetensors"
        raise UsageError(f"{display_path(path)} has {lacking} of scripts/export.py: export it again")
    if kind == "gguf":
        sees_images, parameters = any(name.startswith("mmproj-") for name in files), None
        sidecar, config = read_training(path), {}
    else:
        weights = read_weights(path) if kind == "weights" else read_folder(path)
        sees_images, sidecar, config = weights.has_projection, weights.sidecar, config_fields(weights.config)
        parameters = sum(tensor.numel() for name, tensor in weights.tensors.items() if name != "lm_head.weight")
    sidecar = public(sidecar)
    left_out = sorted(file.name for file in beside if file.name not in (*files, RECORD))
    if sidecar_path.name in files:
        files[sidecar_path.name] = (json.dumps(sidecar, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
    sidecar = {"arguments": {}, "config": config, "versions": {}} | sidecar
    return Model(kind, name, files, left_out, sees_images, sidecar, parameters)


def exported_files(folder: Path) -> dict[str, Path | bytes]:
    """Returns the files that scripts/export.py wrote, by name; raises UsageError where one is not as it wrote it."""
    hashes, files = read_export_record(folder).get("files"), {}
    for file in sorted(folder.iterdir()):
        if isinstance(hashes, dict) and file.name in hashes and any(map(file.match, EXPORTED)):
            is_same = file.name == TRAINING or hash_of(file) == hashes[file.name]  # of the sidecar, `public` is taken
            if file.is_symlink() or not file.is_file() or not is_same:
                what = f"{display_path(file)} is not what scripts/export.py writes"
                raise UsageError(f"{what}: it was changed or replaced, or is a link. Export it again")
            files[file.name] = file
    return files


def public(value, known: dict | None = KNOWN):
    """Returns what this project writes of a sidecar; absolute paths, which tell this machine's folders, lose these."""
    if isinstance(value, dict):
        names = value if known is None else value.keys() & known.keys()
        return {name: public(value[name], known and known[name]) for name in value if name in names}
    is_path = isinstance(value, str) and (PurePosixPath(value).is_absolute() or PureWindowsPath(value).drive)
    return PureWindowsPath(value).name if is_path else value


def find_record(source: Path, run: Path | None, model: Model) -> tuple[Record, list[str]]:
    """Reads the record of the model's run; returns it, empty where there is none, and what of it is missing.

    Raises:
        UsageError: If `run` names no run.
    """
    folder, name = (source.absolute().parent, model.name) if run is None else find_run(run)
    empty = Record(folder, name, [], [])
    try:
        record = read_record(folder, name)
    except UsageError as error:
        return empty, [f"{error} (--run names the record of a run elsewhere)"]
    exported, now = (sidecar.get("written") for sidecar in (model.sidecar, record.sidecar))
    if exported and now and exported != now:
        again = f"{display_path(folder / name)} was trained after this was exported ({exported} and {now})"
        return empty, [f"{again}, so its record is of another model: export it again"]
    return record, list(record.missing.values())


def show(args: argparse.Namespace, files: dict[str, Path | bytes], left_out: list[str], missing: list[str]):
    """Prints what goes, with sizes, and what does not."""
    sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files.items()}
    print(f"{display_path(args.source.absolute())} -> {args.repo}")
    for name, size in sizes.items():
        print(f"  {printable(name):<40} {human(size):>8}")
    print(f"  {f'{len(sizes)} files':<40} {human(sum(sizes.values())):>8}")
    for name in left_out:
        print(f"left out: {printable(name)}")
    for line in missing:
        print(f"the card says less: {line}")
    if pictures := sum(name.startswith(f"{PICTURES}/") for name in files):
        what = f"{pictures} images of the run's data go with the card"
        print(f"{what}: may you publish them? --no_samples leaves them out")


def find_token() -> str:
    """Returns the user's access token; raises UsageError, which never shows it, if there is none."""
    token = get_token() or ""
    if not re.fullmatch(r"[!-~]+", token):  # the error of a header that cannot be sent would show it
        what = "the access token holds characters that no token has" if token else "there is no access token of the hub"
        raise UsageError(f"{what}: {NEW_TOKEN}")
    return token


def upload(files: dict[str, Path | bytes], args: argparse.Namespace, token: str):
    """Makes the repository if need be, and commits the files; what the hub has already is not sent again.

    Raises:
        UsageError: If the hub refuses it or cannot be reached, or the repository is to be private and is not.
    """
    api = HfApi(endpoint=constants.ENDPOINT, token=token)
    try:
        ModelCard(files[CARD].decode("utf-8")).validate()  # before anything is made
        url = api.create_repo(args.repo, private=args.private or None, exist_ok=True)
        is_private = api.repo_info(args.repo).private
        if args.private and not is_private:
            raise UsageError(
                f"{args.repo} is there already, and public: --private does not change that, so nothing was uploaded. "
                f"Make it private at {url}/settings, or leave --private out"
            )
        additions = [CommitOperationAdd(name, file) for name, file in files.items()]
        api.create_commit(args.repo, additions, commit_message=f"Upload {args.source.absolute().name}")
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, RuntimeError) and error.__cause__ is not None:  # one file's upload
            error = error.__cause__
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            what = f"the hub refuses the access token, or the access token may not write to {args.repo}"
            reason = f"{what} ({reason}). Is that your name? If it is, {NEW_TOKEN}"
        elif isinstance(error, HTTPError) and not isinstance(error, HfHubHTTPError):
            reason = f"the connection to {constants.ENDPOINT} failed ({reason}): check the network"
        elif type(error) is ValueError:
            reason = f"the hub refuses the card ({reason}): is --license {args.license} one of its ids?"
        reason = printable(reason).replace(token, "[the token]")
        raise UsageError(f"{reason}. The same command uploads what is missing.") from error
    print(f"{url} ({'private' if is_private else 'public'})")


def main(argv: list[str] | None = None):
    args = parse_arguments(argv)
    token = "" if args.dry_run else find_token()
    model = read_model(args.source.absolute())
    record, missing = find_record(args.source, args.run, model)
    made = card_files(model, record, args.repo, args.license, args.language.split(","), not args.no_samples)
    show(args, model.files | made, model.left_out, missing)
    if not args.dry_run:
        upload(model.files | made, args, token)
        return
    folder = Path(tempfile.mkdtemp(prefix="publish-"))
    for name, content in made.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    print(f"nothing was uploaded; the card is {folder / CARD}")


if __name__ == "__main__":
    run_script(main)
