"""Which files a training command uses: your own, what the starting weights were trained with, published, built-in."""

import os
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from common.errors import UsageError
from common.paths import (
    BUILTIN_DATASET_DIR,
    BUILTIN_HIDDEN_SIZE,
    BUILTIN_TOKENIZER_DIR,
    BUILTIN_TOWER_DIR,
    DATA_NAMES,
    DATASET_DIR,
    ROOT,
    TOKENIZER_3V_DIR,
    TOKENIZER_DIR,
    TOWER_3V_DIR,
    TOWER_DIR,
    display_path,
    place_of,
)
from model.vision_tower import TowerError, TowerSettings, read_tower_settings
from model.weights import find_weights, is_named, read_sidecar_or_empty, read_weights, weight_paths

WEIGHT_SUFFIXES = {".pth", ".pt", ".bin", ".ckpt", ".safetensors"}
DATA_SUFFIXES = {".parquet", ".jsonl", ".json", ".zip", ".csv", ".tsv", ".tar", ".arrow"}
TOWER_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
DATA_FLAGS = ("data_path", "images_path")
MODEL_FLAGS = ("vision_model_path", "tokenizer_path")


@dataclass(frozen=True)
class PublishedFile:
    """A file or folder that training needs, where it lies by default, and the command that fetches it."""

    what: str
    path: Path
    command: str
    contains: tuple[str, ...] = ()  # one of these must be in the folder, or its download was interrupted

    @property
    def is_complete(self) -> bool:
        return any((self.path / name).is_file() for name in self.contains) if self.contains else self.path.exists()

    def __str__(self):
        return f"{self.what}: {display_path(self.path)} ({self.command})"


def read_tower(folder: Path) -> TowerSettings:
    """Reads a tower's settings; its TowerError also says how to fetch the published one."""
    part = "tower_3v" if folder == place_of(TOWER_3V_DIR) else "tower"
    try:
        return read_tower_settings(folder)
    except TowerError as error:
        raise TowerError(f"{error}. `python scripts/download.py {part}` fetches the published one") from error


def published_data(data: str) -> tuple[Path, Path]:
    """Returns the data file (a parquet, the newer published form, where one is there) and its images' folder."""
    files = [DATASET_DIR / name.format(data) for name in DATA_NAMES]
    found = next((path for path in files if path.is_file()), DATASET_DIR / f"{data}_data.jsonl")
    return found, DATASET_DIR / f"{data}_images"


def published_files(data: str, from_weight: str, hidden_size: int | None, save_dir: Path) -> dict[str, PublishedFile]:
    """Returns the published files that are needed, by the flag that would name another."""
    data_path, images_path = published_data(data)
    files = {
        "vision_model_path": PublishedFile(
            "vision tower", place_of(TOWER_DIR), "python scripts/download.py tower", TOWER_WEIGHTS
        ),
        "tokenizer_path": PublishedFile(
            "tokenizer", place_of(TOKENIZER_DIR), "python scripts/download.py tokenizer", ("tokenizer.json",)
        ),
        "data_path": PublishedFile("data", data_path, f"python scripts/download.py {data}"),
        "images_path": PublishedFile("pictures", images_path, f"python scripts/download.py {data}"),
    }
    if data_path.suffix == ".parquet":
        del files["images_path"]
    if from_weight == "llm":
        size = hidden_size or 512
        command = f"python scripts/download.py llm --hidden_size {size}"
        files["from_weight"] = PublishedFile("language model", save_dir / f"llm_{size}.pth", command)
    return files


def choose_assets(args, data: str) -> tuple[str, dict[str, Path | str]]:
    """Chooses the files for the paths that were not given.

    Data of one's own is learned by the starting weights, so tower and tokenizer are those they were trained with. Where
    nothing was downloaded, the built-in model is the start, and the built-in set the data.

    Args:
        data: The data's name, see `Stage.data`.

    Returns:
        Whose model it is, "built-in" or "published" (which may be the user's own by flags); and the paths by their
        flags' names.

    Raises:
        UsageError: If some of what is needed is there and some is not; it names what is missing and how to get it. Or
            if the starting weights cannot be read.
    """
    files = published_files(data, args.from_weight, args.hidden_size, Path(args.save_dir))
    if starts_from_3v(args):
        folders = {
            "vision_model_path": (TOWER_3V_DIR, "tower_3v"),
            "tokenizer_path": (TOKENIZER_3V_DIR, "tokenizer_3v"),
        }
        for flag, (folder, part) in folders.items():
            files[flag] = replace(files[flag], path=place_of(folder), command=f"python scripts/download.py {part}")
    given = [flag for flag in DATA_FLAGS + MODEL_FLAGS if getattr(args, flag) is not None]
    asks_weights = args.data_path is not None or is_path(args.from_weight)
    sidecar = starting_sidecar(args) if asks_weights else {}
    if args.data_path is not None:  # the data is there, so the model alone is in question
        files = {flag: file for flag, file in files.items() if flag not in DATA_FLAGS}
    there = [flag for flag, file in files.items() if file.path.exists()]
    if "from_weight" in files and has_any_weight(Path(args.save_dir), args.from_weight):
        there.append("from_weight")  # of another size than the first guess
    unknown = unknown_files(args)
    paths = {}
    if args.data_path is not None and args.data_path.suffix != ".parquet":
        paths["images_path"] = args.data_path.parent
    if is_builtin_model(args, sidecar, there + unknown, given):
        paths |= {"vision_model_path": BUILTIN_TOWER_DIR, "tokenizer_path": BUILTIN_TOKENIZER_DIR}
        return "built-in", paths | (builtin_data(args, data) if args.data_path is None else {})
    sidecar = starting_sidecar(args, builtin=False) if asks_weights else {}
    trained_with = {flag: sidecar.get("arguments", {}).get(flag) for flag in MODEL_FLAGS}
    paths |= {flag: ROOT / path for flag, path in trained_with.items() if path and (ROOT / path).is_dir()}
    if has_any_weight(Path(args.save_dir), args.from_weight):
        files.pop("from_weight", None)  # whether one of them fits is said when it is looked for
    missing = [file for flag, file in files.items() if flag not in (*given, *paths) and not file.is_complete]
    if missing:
        present = [display_path(files[flag].path) for flag in there if flag in files] + [f"--{flag}" for flag in given]
        looked_for = [file.path for file in files.values()]
        present += [f"{display_path(path)} (not what is looked for)" for path in unknown if path not in looked_for]
        raise UsageError(missing_message(missing, present))
    return "published", {flag: file.path for flag, file in files.items() if flag != "from_weight"} | paths


def is_path(from_weight: str) -> bool:
    return Path(from_weight).suffix == ".pth"


def starting_path(args, builtin: bool | None = None) -> Path | None:
    """Returns the weights that --from_weight names, see `find_weights`; None where there are none."""
    use_moe = None if args.use_moe is None else bool(args.use_moe)
    name, size = args.from_weight, args.hidden_size
    try:
        return find_weights(Path(args.save_dir), name, size, use_moe, builtin, log=lambda line: None)
    except UsageError:
        return None


def starting_sidecar(args, builtin: bool | None = None) -> dict:
    """Returns the sidecar of the weights that --from_weight names; {} where there are none, or none beside them."""
    path = starting_path(args, builtin)
    return {} if path is None else read_sidecar_or_empty(path)


def starts_from_3v(args) -> bool:
    """Tells whether a run on published files starts from minimind-3v's weights, by their tensors."""
    path = starting_path(args, builtin=False)
    return path is not None and is_3v(path)


@lru_cache
def is_3v(path: Path) -> bool:
    """Tells whether a weight file is minimind-3v's; reads it once."""
    return read_weights(path).config.qk_norm


def is_builtin_model(args, sidecar: dict, there: list[str], given: list[str]) -> bool:
    """Tells whether the built-in tower and tokenizer are meant: the weights say so, or nothing else is there."""
    is_given = any(flag in given for flag in MODEL_FLAGS) or (args.data_path is None and bool(given))
    if is_given or args.hidden_size not in (None, BUILTIN_HIDDEN_SIZE):
        return False
    if sidecar:
        return sidecar.get("assets") == "built-in"
    return not there and not is_path(args.from_weight)


def builtin_data(args, data: str) -> dict[str, Path | str]:
    """Returns the drawn scenes' files; measured is on scenes that are in no training set."""
    paths = {"data_path": BUILTIN_DATASET_DIR / f"{data}.jsonl", "images_path": BUILTIN_DATASET_DIR / "images"}
    if args.eval_data is None:
        paths["eval_data"] = str(BUILTIN_DATASET_DIR / "heldout.jsonl")
        paths["eval_images_path"] = BUILTIN_DATASET_DIR / "heldout_images"
    return paths


def missing_message(missing: list[PublishedFile], present: list[str]) -> str:
    flags = ", ".join(f"--{flag}" for flag in DATA_FLAGS + MODEL_FLAGS)
    return (
        "some of the files are there and some are not. Missing:\n"
        + "".join(f"  {file}\n" for file in missing)
        + f"Fetch them, or name your own with {flags}. (With none of these files and none of these flags, the small "
        f"built-in set is used; there now: {', '.join(present) or 'nothing'}.)"
    )


def has_any_weight(save_dir: Path, name: str) -> bool:
    return bool(weight_paths(save_dir, name))


def unknown_files(args) -> list[Path]:
    """Returns what looks like weights, a tower, a tokenizer or data in their places, whatever it is called.

    Where such a file lies, the built-in set is not taken: somebody meant it to be used. Weights with a sidecar are of
    runs here, as is what the run starts from or writes.
    """
    names, save_dir, model = (args.from_weight, args.save_weight), Path(args.save_dir), TOWER_DIR.parents[1]
    found = [
        path
        for path in sorted((*save_dir.glob("*"), *save_dir.glob("*/*.pth")))
        if kind_of(path) in WEIGHT_SUFFIXES
        and not path.stem.endswith("_resume")
        and not path.with_suffix(".json").exists()
        and not (path.parent == save_dir and any(is_named(path, name) for name in names))
    ]
    marks = ("config.json", "tokenizer.json", *TOWER_WEIGHTS)
    for folder in (model, *sorted(model.glob("*")), *sorted(model.glob("vision_model/*"))):
        is_ours = folder.name in (BUILTIN_TOKENIZER_DIR.name, BUILTIN_TOWER_DIR.parent.name)
        found += [folder] if not is_ours and any((folder / mark).is_file() for mark in marks) else []
    if args.data_path is None:
        found += [path for path in sorted(DATASET_DIR.glob("*")) if kind_of(path) in DATA_SUFFIXES]
    return found


def kind_of(path: Path) -> str:
    """Returns a file's ending in small letters; of a download that was interrupted, that of the whole file."""
    name = re.sub(r"(\.[0-9a-f]{12})?\.part$", "", path.name)
    return os.path.splitext(name)[1].lower()
