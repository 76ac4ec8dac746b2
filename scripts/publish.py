"""Publish a trained model on the Hugging Face hub, with a model card made from its run's record.

    python scripts/publish.py out/sft_vlm_512-hf NAME/REPO --license apache-2.0 --dry_run
        writes the card to look at, and lists what would be uploaded; contacts nobody
    python scripts/publish.py out/sft_vlm_512-hf NAME/REPO --license apache-2.0
        a transformers folder of scripts/export.py
    python scripts/publish.py out/sft_vlm_512-gguf NAME/REPO --license apache-2.0 --private
        GGUF files for llama.cpp
    python scripts/publish.py out/sft_vlm_512.pth NAME/REPO --license apache-2.0
        a weight file, with the JSON beside it

The access token is the one of `hf auth login`, or HF_TOKEN. Run it again after an interruption: it uploads what is
missing. Up to eight sample images of the run go with the card: look at them first, or leave them out by --no_samples.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ArgumentParser, HelpFormatter, file_path  # noqa: E402
from common.errors import UsageError, run_script  # noqa: E402
from common.files import RECORD  # noqa: E402
from common.paths import display_path, printable  # noqa: E402
from common.schema import parse_json  # noqa: E402
from model.tower_files import PREPROCESSOR  # noqa: E402
from model.vlm_config import config_fields  # noqa: E402
from scripts.share.model_card import CURVE, PICTURES, Model, loss_curve, sample_rows, without_folders, write_card  # noqa: E402
from scripts.report import find_run  # noqa: E402
from scripts.transfer import human  # noqa: E402
from trainer.flags import build_parser  # noqa: E402
from trainer.setup import ENDINGS  # noqa: E402
from trainer.train_sft_vlm import STAGE  # noqa: E402
from trainer.watch.page import SAMPLES, Record, read_record  # noqa: E402
from trainer.weights import (  # noqa: E402
    PACKAGES,
    SIDECAR,
    TRAINING,
    Weights,
    read_folder,
    read_sidecar_or_empty,
    read_training,
    read_weights,
)

CARD = "README.md"
# What scripts/export.py writes; nothing else of a folder is published. A file begins as the pattern says, or is JSON
# that fits the schema; None: it is read whole.
NUMBERS = (int, [int], None)
EXPORTED = {
    "transformers": {
        "config.json": None,
        "model.safetensors": None,
        TRAINING: None,
        "generation_config.json": {f"{name}_token_id?": NUMBERS for name in ("bos", "eos", "pad")},
        "chat_template.jinja": rb"\{%.*messages.*<\|im_start\|>",
        "tokenizer.json": {"model": {"vocab": dict}, "added_tokens": list},
        "tokenizer_config.json": {"tokenizer_class": str},
        "preprocessor_config.json": PREPROCESSOR | {"image_processor_type": str},
        "processor_config.json": {"processor_class": str},
    },
    "gguf": {
        "*.gguf": rb"GGUF[\2\3]\0\0\0.{3}\0{5}.{3}\0{5}",  # version, and the numbers of tensors and of settings
        "Modelfile": rb"(FROM \./[^/\n]+\.gguf\n)+[A-Z]+ ",
        TRAINING: None,
    },
}
# Why another file is left out: the first pattern that its name matches says it.
LEFT_OUT = {
    "README.md": "the card is written anew",
    "*_resume.pth": "a training state, to resume from",
    "checkpoint*": "a training state, to resume from",
    "*.features": "cached features of the tower",
    "*cache*": "a cache",
    "*.log": "a log",
    "*.metrics.jsonl": "a log: the card shows what is in it",
    "*.jsonl": "data",
    "*.parquet": "data",
    "*.csv": "data",
    "*.bin": "pickled weights: model.safetensors holds them",
    "*.pth": "another weight file",
    "*.pt": "another weight file",
    "*.report.html": "the run's page: the card shows what is in it",
    "*_samples*": "the run's samples: the card shows the last",
}
MOST_CHECKED = 1 << 26  # bytes; of a GGUF only the head is looked at
NO_LINK = "is a link, or no file: only files that lie there themselves are published. Export it again"
LICENCE = (
    "--license is missing, or no id of a licence: it tells others what they may do with the model. Give one of the "
    "hub's ids, such as apache-2.0, mit or cc-by-nc-4.0; the licences of your data and of the weights you started from "
    "must allow it"
)


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("source", metavar="SOURCE", nargs="?", type=file_path, help="a folder of scripts/export.py, or a .pth")
    add("repo", metavar="NAME/REPO", nargs="?", help="your name (or an organisation's) on the hub, and the model's")
    add("--license", help="required: the hub's id of a licence, such as apache-2.0")
    add("--language", default="zh", help="language codes for the card, as zh or zh,en")
    add("--private", action="store_true", help="only you can see it, where the repository is new")
    add(
        "--run",
        type=file_path,
        help="the run's record, as out/sft_vlm_512 (default: the one that SOURCE is named after)",
    )
    add("--no_samples", action="store_true", help="publish no sample images")
    add("--dry_run", action="store_true", help="upload nothing: write the card, list the files")
    return check_flags(parser.parse_args(argv))


def check_flags(args: argparse.Namespace) -> argparse.Namespace:
    """Returns the arguments with languages as a list; raises UsageError where one is wrong."""
    if args.repo is None:
        raise UsageError("say what to publish and where: python scripts/publish.py SOURCE NAME/REPO --license ID")
    args.license, args.language = (args.license or "").lower(), args.language.split(",")
    if not re.fullmatch(r"[a-z0-9]+([.-][a-z0-9]+)*", args.license):
        raise UsageError(LICENCE)
    wrong = [code for code in args.language if not re.fullmatch(r"[a-z]{2,3}|multilingual", code)]
    if wrong:
        raise UsageError(
            f"--language {printable(wrong[0])}: a code of two or three letters is needed, such as zh or en"
        )
    try:
        validate_repo_id(args.repo)
    except HFValidationError as error:
        raise UsageError(printable(f"{args.repo} is no name of a repository: {error}")) from error
    if "/" not in args.repo:
        raise UsageError(f"{args.repo} has no owner: give NAME/REPO, with your name (or an organisation's) on the hub")
    return args


def read_model(source: Path) -> tuple[Model, dict[str, str]]:
    """Reads what is to be published; returns it, and why other files beside it are left out.

    Raises:
        UsageError: If it is none of the kinds that can be published, or cannot be read.
    """
    path = source.absolute()
    if path.is_dir() and any(path.glob("*.gguf")):
        return read_gguf(path), left_out(path.iterdir(), EXPORTED["gguf"])
    if path.is_dir() and (path / "config.json").is_file():
        if not (path / "model.safetensors").is_file():
            raise UsageError(f"{display_path(path)} has no model.safetensors: export it again (scripts/export.py)")
        files = exported_files(path, EXPORTED["transformers"])
        model = describe("transformers", run_name(path), files, read_folder(path))
        return model, left_out(path.iterdir(), EXPORTED["transformers"])
    if path.name.endswith("_resume.pth"):
        name = path.name.replace("_resume.pth", ".pth")
        raise UsageError(f"{display_path(path)} is a training state, which is never published: name {name} beside it")
    if path.is_file() and path.suffix == ".pth":
        sidecar = path.with_suffix(".json")
        if sidecar.is_symlink():
            raise UsageError(f"{display_path(sidecar)} {NO_LINK}")
        files = {file.name: file for file in (path, sidecar) if file.is_file()}
        model = describe("weights", path.stem, files, read_weights(path))
        of_the_run = {f"{path.stem}{ending}" for ending in ENDINGS}
        beside = [file for file in path.parent.iterdir() if file.name in of_the_run]
        return model, left_out(beside, tuple(files))
    raise UsageError(
        f"{display_path(path)} is nothing to publish: name a folder that scripts/export.py wrote, or a .pth weight file"
    )


def check_content(file: Path, rule: bytes | dict):
    """Raises ValueError unless a file begins as a pattern says, or is JSON that fits a schema."""
    with open(file, "rb") as opened:
        content = opened.read(MOST_CHECKED)
    if isinstance(rule, dict):
        parse_json(content, rule)
    elif not re.match(rule, content, re.DOTALL):
        raise ValueError("it begins otherwise")


def exported_files(folder: Path, kinds: dict) -> dict[str, Path]:
    """Returns a folder's files of these kinds by name; raises UsageError where one is not what its name says."""
    files = {}
    for name, rule in kinds.items():
        for file in sorted(folder.glob(name)):
            if file.is_symlink() or not file.is_file():
                raise UsageError(f"{display_path(file)} {NO_LINK}")
            try:
                if rule is not None:
                    check_content(file, rule)
            except (OSError, ValueError) as error:
                raise UsageError(
                    f"{display_path(file)} is not what scripts/export.py writes ({error}): export it again"
                ) from error
            files[file.name] = file
    return files


def run_name(folder: Path) -> str:
    """Returns the name of the run that scripts/export.py made a folder of."""
    return re.sub(r"-(hf|gguf|f16|q8_0)$", "", folder.name)


def describe(kind: str, name: str, files: dict[str, Path], weights: Weights) -> Model:
    sidecar = weights.sidecar or {"config": config_fields(weights.config)}
    parameters = sum(tensor.numel() for part, tensor in weights.tensors.items() if part != "lm_head.weight")
    return Model(kind, name, files, weights.has_projection, with_all_parts(sidecar), parameters)


def read_gguf(folder: Path) -> Model:
    """Reads a folder of GGUF files; raises UsageError if one is none, or the text model is missing."""
    files = exported_files(folder, EXPORTED["gguf"])
    sees_images = [name.startswith("mmproj-") for name in files if name.endswith(".gguf")]
    if all(sees_images):
        raise UsageError(f"{display_path(folder)} has no text model beside the mmproj: export it again")
    sidecar = with_all_parts(read_training(folder))
    return Model("gguf", run_name(folder), files, any(sees_images), sidecar, None)


def with_all_parts(sidecar: dict) -> dict:
    """Returns what of a sidecar others may see, with all its parts."""
    return {"arguments": {}, "config": {}, "versions": {}} | public(sidecar)


def public(sidecar: dict) -> dict:
    """Returns the fields of a sidecar that this project writes, without folders of this machine."""
    flags = {action.dest for action in build_parser(STAGE, "")._actions}
    known = {"arguments": flags | {"command", "assets", "eval_interval"}, "versions": {"python", *PACKAGES}}
    fields = {name: value for name, value in sidecar.items() if name in SIDECAR or f"{name}?" in SIDECAR}
    for part in known.keys() & fields.keys():
        fields[part] = {name: value for name, value in fields[part].items() if name in known[part]}
    return without_folders(fields)


def left_out(files, taken: Iterable[str]) -> dict[str, str]:
    """Returns why each of the files that no pattern takes is left out."""
    others = sorted(file for file in files if not any(map(file.match, (*taken, RECORD))))
    reasons = {}
    for file in others:
        why = next((why for pattern, why in LEFT_OUT.items() if file.match(pattern)), "not a file of the model")
        reasons[file.name + "/" * file.is_dir()] = why
    return reasons


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
        return empty, [f"{error} (--run names the record of a run that lies elsewhere)"]
    exported, now = (sidecar.get("written") for sidecar in (model.sidecar, record.sidecar))
    if exported and now and exported != now:
        again = f"{display_path(folder / name)} was trained after this was exported ({exported} and {now})"
        return empty, [f"{again}, so its record is of another model: export it again"]
    return record, list(record.missing.values())


def stage(model: Model, record: Record, args: argparse.Namespace) -> tuple[Path, str]:
    """Puts everything that is to be published into a new temporary folder, large files as links.

    Returns:
        The folder, and the card's text.

    Raises:
        UsageError: If it cannot be written, or a file cannot be read.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix="publish-"))
        for name, file in model.files.items():
            is_sidecar = name == TRAINING or (model.kind == "weights" and file.suffix == ".json")
            place(file, folder / name, is_sidecar)
        samples = [] if args.no_samples else sample_rows(record)
        for sample in samples:
            (folder / PICTURES).mkdir(exist_ok=True)
            picture = record.folder / f"{record.name}{SAMPLES}" / sample["name"]
            shutil.copyfile(picture, folder / PICTURES / sample["name"])
        curve = loss_curve(record)
        if curve is not None:
            (folder / CURVE).write_bytes(curve)
        card = write_card(model, record, samples, args.repo, args.license, args.language)
        (folder / CARD).write_text(card, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"the card and its files cannot be put together in a temporary folder: {error}") from error
    return folder, card


def place(file: Path, target: Path, is_sidecar: bool):
    """Links a file, or copies it where links are not allowed; of a sidecar, a copy of what others may see."""
    if is_sidecar:
        text = json.dumps(public(read_sidecar_or_empty(file)), indent=2, ensure_ascii=False)
        target.write_text(text + "\n", encoding="utf-8")
        return
    try:
        target.symlink_to(file)
    except OSError:  # Windows allows links to developers only
        shutil.copyfile(file, target)


def show(folder: Path, reasons: dict[str, str], missing: list[str], args: argparse.Namespace):
    """Prints what goes, with sizes, what does not, and why."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    print(f"{display_path(args.source.absolute())} -> {args.repo}")
    for name, size in sizes.items():
        print(f"  {printable(name):<40} {human(size):>8}")
    print(f"  {f'{len(sizes)} files':<40} {human(sum(sizes.values())):>8}")
    for name, why in reasons.items():
        print(f"left out: {printable(name)} ({why})")
    for line in missing:
        print(f"the card says less: {line}")
    pictures = sum(name.startswith(f"{PICTURES}/") for name in sizes)
    if pictures:
        print(
            f"{pictures} images of the run's data go with the card: may you publish them? --no_samples leaves them out"
        )


def find_token() -> str:
    """Returns the user's access token; raises UsageError, which never shows it, if there is none."""
    token = get_token()
    if not token:
        raise UsageError(f"there is no access token of the hub: {new_token()}")
    if not re.fullmatch(r"[!-~]+", token):  # the error of a header that cannot be sent would show it
        raise UsageError(f"the access token holds characters that no token has: {new_token()}")
    return token


def new_token() -> str:
    """Says how to get an access token."""
    page = f"{constants.ENDPOINT}/settings/tokens"
    return f"create one with write access at {page}, then run `hf auth login` or set HF_TOKEN"


def check_card(card: str, licence: str):
    """Raises UsageError where the hub refuses the card's metadata."""
    try:
        ModelCard(card).validate()
    except ValueError as error:
        reason = f"the hub refuses the card ({printable(error)})"
        raise UsageError(f"{reason}: is --license {licence} one of its ids?") from error


def upload(folder: Path, card: str, model: Model, args: argparse.Namespace, token: str):
    """Makes the repository if need be, and uploads the folder; what the hub has already is not sent again.

    Raises:
        UsageError: If the hub refuses it or cannot be reached, or the repository is to be private and is not.
    """
    api = HfApi(endpoint=constants.ENDPOINT, token=token)
    try:
        check_card(card, args.license)  # before anything is made
        url = api.create_repo(args.repo, private=args.private or None, exist_ok=True)
        is_private = api.repo_info(args.repo).private
        if args.private and not is_private:
            raise UsageError(
                f"{args.repo} is there already, and public: --private does not change that, so nothing was uploaded. "
                f"Make it private at {url}/settings, or leave --private out"
            )
        api.upload_folder(repo_id=args.repo, folder_path=folder, commit_message=f"Upload {model.name}")
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        reason = printable(explain(error, args.repo)).replace(token, "[the token]").rstrip(".")
        raise UsageError(f"{reason}. The same command uploads what is missing.") from error
    print(f"{url} ({'private' if is_private else 'public'})")


def explain(error: Exception, repo: str) -> str:
    """Returns a line for the person who typed the command: what is wrong, and what to do."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # one file's upload
        error = error.__cause__
    if not isinstance(error, HTTPError):
        return " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, HfHubHTTPError):
        reason = str(error) or type(error).__name__
        return f"the connection to {constants.ENDPOINT} failed ({reason}): check the network"
    status, said = error.response.status_code, " ".join((error.server_message or "").split())
    advice = {
        401: f"the hub refuses the access token: {new_token()}",
        403: f"the access token may not write to {repo}: is {repo.split('/')[0]} your name, and may the token write?",
        404: f"{repo} is not there, or the access token may not see it",
    }
    path = str(error.response.url).split("?")[0]
    return f"{advice.get(status, f'{path} answers {status}')}{f' ({said})' if said else ''}"


def main(argv: list[str] | None = None):
    args = parse_arguments(argv)
    token = "" if args.dry_run else find_token()
    model, reasons = read_model(args.source)
    record, missing = find_record(args.source, args.run, model)
    model = replace(model, name=record.name)
    if model.kind == "gguf" and not model.sidecar["config"]:  # exported before such folders had a training.json
        model = replace(model, sidecar=with_all_parts(record.sidecar))
    folder, card = stage(model, record, args)
    try:
        show(folder, reasons, missing, args)
        if args.dry_run:
            print(f"nothing was uploaded; the card is {folder / CARD}")
        else:
            upload(folder, card, model, args, token)
    except KeyboardInterrupt:
        print("\nStopped. The same command uploads what is missing.", file=sys.stderr)
        sys.exit(130)
    finally:
        if not args.dry_run:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    run_script(main)
