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
import shlex
import sys
import tempfile
from base64 import b64decode
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath

import jinja2
from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCard, ModelCardData, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common.cli import ArgumentParser, file_path
from common.errors import UsageError, run_script
from common.files import RECORD, hash_of, read_record
from common.paths import TOWER_DIR, display_path, printable
from dataset.chat import IMAGE_TAG
from dataset.check import counted
from dataset.prompts import DEFAULT_FORM
from dataset.row_forms import CHINESE
from dataset.scenes.language import DESCRIBE
from model.model_vlm import config_fields
from model.weights import SIDECAR, TRAINING, read_folder, read_training, read_weights
from scripts.download import human
from trainer.report import page

CARD, PICTURES = "README.md", "samples"  # names on the hub
TOWER_NAME, TOWER_WIDTH = "openai/clip-vit-base-patch16", 768
TAGS = {"transformers": ["llava"], "gguf": ["llama.cpp", "llava"], "weights": []}
LOSSES = {"loss": "loss, right images", "loss_shuffled": "loss, images of other rows", "loss_blind": "loss, no images"}
LOSSES["gap_shuffled"] = "grounding gap"
NEW_TOKEN = f"create one with write access at {constants.ENDPOINT}/settings/tokens, then run `hf auth login`"


@dataclass(frozen=True)
class Model:
    kind: str  # "transformers", "gguf" or "weights" (the original's format)
    name: str  # of its run
    files: dict[str, Path | bytes]  # paths or contents by name on the hub
    sees_images: bool  # whether it has a projection
    sidecar: dict  # how it was made; "arguments", "config" and "versions" may be empty
    parameters: int | None  # of decoder and projection; None where the files do not tell


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, imports=True)
    add = parser.add_argument
    add("source", metavar="SOURCE", type=file_path, help="a folder of scripts/export.py, or a .pth")
    add("repo", metavar="NAME/REPO", help="your name (or an organisation's) on the hub, and the model's")
    add("--license", type=str.lower, required=True, help="one that your data and starting weights allow (the hub's id)")
    add(
        "--language",
        help="codes for the card, as zh,en (default: zh if most of the samples are Chinese, else none)",
    )
    add("--private", action="store_true", help="only you can see it, where the repository is new")
    add("--no_samples", action="store_true", help="publish no sample images")
    add("--dry_run", action="store_true", help="upload nothing: write the card, list the files")
    args = parser.parse_args(argv)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", args.repo):
        raise UsageError(f"{args.repo} is not a repository's name: use NAME/REPO, with your name on the hub")
    args.source = args.source.absolute()
    return args


def read_model(path: Path) -> Model:
    """Reads a folder of scripts/export.py, or a weight file with its sidecar; raises UsageError if it was changed."""
    if path.is_file() and path.suffix == ".pth" and not path.stem.endswith("_resume"):
        kind, name, sidecar_path = "weights", path.stem, path.with_suffix(".json")
        files = {file.name: file for file in (path, sidecar_path) if file.is_file()}
    else:
        record = read_record(path)
        hashes = record.get("files")
        if "exported_by" not in record or not isinstance(hashes, dict):
            cure = "name a folder that scripts/export.py wrote (export an old one again), or a .pth weight file"
            state = "NAME_resume.pth is a training state, which is never published"
            raise UsageError(f"{display_path(path)} cannot be published: {cure} ({state})")
        files, sidecar_path = {name: path / name for name in hashes}, path / TRAINING
        for name, file in files.items():
            # A name may lead out of the folder.
            if file.parent != path or file.is_symlink() or hash_of(file) != hashes[name]:
                what = f"{display_path(file)} is not what scripts/export.py wrote"
                raise UsageError(f"{what}: it is missing, a link, or was changed. Export the model again")
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


def without_folders(value):
    """Returns a sidecar without this machine's folders: absolute paths become names."""
    if isinstance(value, dict):
        return {name: without_folders(content) for name, content in value.items()}
    is_path = isinstance(value, str) and (PurePosixPath(value).is_absolute() or PureWindowsPath(value).drive)
    return PureWindowsPath(value).name if is_path else value


def as_text(value) -> str:
    """Escapes a value for a cell of a Markdown table: one line, no markup."""
    return " ".join(re.sub(r"[\\`*_{}\[\]<>#|~]", r"\\\g<0>", str(value)).split())


def card_files(model: Model, record: page.Record, args: argparse.Namespace) -> dict[str, bytes]:
    """Returns the card and its images by name on the hub; without metrics in the record the card says less."""
    path, width = model.sidecar["arguments"].get("vision_model_path"), model.sidecar["config"].get("vision_hidden_size")
    is_published = path == display_path(TOWER_DIR) if path else width == TOWER_WIDTH
    has_tower = model.sees_images and model.sidecar.get("assets") != "built-in"
    tower = TOWER_NAME if has_tower and is_published else None
    task = "image-text-to-text" if model.sees_images else "text-generation"
    last = record.evaluations[-1] if record.evaluations and page.measured(record.evaluations[-1]) == page.LOSS else {}
    held_out = f"{page.number(last.get('samples'))} held-out samples"
    known = {name: last[key] for key, name in LOSSES.items() if page.is_finite(last.get(key))}  # nats per token
    results = [EvalResult(task, "held-out", held_out, "loss", loss, metric_name=name) for name, loss in known.items()]
    metadata = ModelCardData(
        license=args.license,
        language=args.language.split(",") if args.language else None,
        pipeline_tag=task,
        library_name=None if model.kind == "weights" else model.kind,
        base_model=tower,
        tags=["minimind-v", *(TAGS[model.kind] if model.sees_images else ())],
        model_name=record.name,
        eval_results=results or None,
    )
    images = [] if args.no_samples else [image for image in page.descriptions(record) if image["data"] is not None]
    samples = [(f"{PICTURES}/{Path(image['name']).name}", image) for image in images]
    blocks = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent / "share"), **blocks)
    environment.filters |= {"number": page.number, "text": as_text, "quote": shlex.quote}
    environment.filters["literal"] = partial(json.dumps, ensure_ascii=False)
    shown, llm = replace(record, sidecar=model.sidecar), model.sidecar["config"].get("llm")
    other = llm and f"another language model, a {llm['model_type']} (its own licence holds),"
    text = environment.get_template("model_card.md.jinja").render(
        model=model,
        tower=tower,
        decoder=other or "a MiniMind decoder",
        name=record.name,
        repo=args.repo,
        results=results,
        trained_loss=page.last_of(record.training, "loss"),
        samples=samples,
        question=images[0]["question"] if images else DESCRIBE,
        image_first=model.sidecar.get("prompt_form", DEFAULT_FORM).startswith(IMAGE_TAG),
        knows_scenes=shown.learns_scenes,
        **page.settings(shown),
    )
    card = f"---\n{metadata.to_yaml()}\n---\n\n{text}".encode()
    return {CARD: card} | {path: b64decode(image["data"]) for path, image in samples}


def upload(files: dict[str, Path | bytes], args: argparse.Namespace):
    """Makes the repository if need be, and commits the files; what the hub has already is not sent again."""
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
            what = f"{args.repo} exists and is public: --private does not change that, so nothing was uploaded"
            raise UsageError(f"{what}. Make it private at {url}/settings, or leave --private out")
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
    model = read_model(args.source)
    folder = args.source.parent
    try:
        record = page.read_record(folder, model.name)
        missing = record.missing.values()
        exported, now = model.sidecar.get("written"), record.sidecar.get("written")
        if exported and now and exported != now:
            again = f"{display_path(folder / model.name)} was trained after this was exported ({exported} and {now})"
            raise UsageError(f"{again}, so its record is of another model: export it again")
    except UsageError as error:  # the card says less then
        record, missing = page.Record(folder, model.name, [], []), [str(error)]
    chinese = [sample for sample in record.samples if CHINESE.match(sample["reference"])]
    if args.language is None and 2 * len(chinese) > len(record.samples):
        args.language = "zh"
    made = card_files(model, record, args)
    files = model.files | made
    sizes = {name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in files.items()}
    print(f"{display_path(args.source)} -> {args.repo}")
    for name, size in [*sizes.items(), (f"{len(sizes)} files", sum(sizes.values()))]:
        print(f"  {printable(name):<40} {human(size):>8}")
    for path in sorted(args.source.iterdir()) if args.source.is_dir() else ():
        if path.name not in (*model.files, RECORD):
            print(f"left out: {printable(path.name)}")
    for line in missing:
        print(f"the card says less: {line}")
    print(f"the card's language: {args.language or 'none'} (--language names others)")
    if samples := len(made) - 1:
        print(f"{counted(samples, 'image')} of the run's data: may they go with the card? --no_samples omits them")
    if not args.dry_run:
        upload(files, args)
        return
    folder = Path(tempfile.mkdtemp(prefix="publish-"))
    for name, content in made.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    print(f"nothing was uploaded; the card is {folder / CARD}")


if __name__ == "__main__":
    run_script(main)
