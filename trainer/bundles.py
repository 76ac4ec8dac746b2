"""Model generations: one record for each, and which of them a command uses.

A new generation is one more record in BUNDLES.
"""

import argparse
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from common.cli import file_path
from common.errors import UsageError
from common.paths import (
    BUILTIN_DATASET_DIR,
    BUILTIN_HIDDEN_SIZE,
    BUILTIN_MODEL_DIR,
    BUILTIN_TOKENIZER_DIR,
    BUILTIN_TOWER_DIR,
    DATA_NAMES,
    DATASET_DIR,
    ROOT,
    SAVE_3V_DIR,
    SAVE_DIR,
    TOKENIZER_3V_DIR,
    TOKENIZER_DIR,
    TOWER_3V_DIR,
    TOWER_DIR,
    WEIGHT_NAMES,
    display_path,
    place_of,
)
from model.model_vlm import PROMPT_FORMS
from model.vision_tower import TowerError, TowerSettings, read_tower_settings
from model.weights import (
    Weights,
    is_path,
    list_weights,
    matching_weights,
    read_sidecar_or_empty,
    read_weights,
    weight_name,
)

WEIGHT_SUFFIXES = {".pth", ".pt", ".bin", ".ckpt", ".safetensors"}
DATA_SUFFIXES = {".parquet", ".jsonl", ".json", ".zip", ".csv", ".tsv", ".tar", ".arrow"}
TOWER_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
DATA_FLAGS = ("data_path", "images_path")
MODEL_FLAGS = ("vision_model_path", "tokenizer_path")


@dataclass(frozen=True)
class Bundle:
    """A generation of models, and what was published with it."""

    name: str  # in sidecars ("assets")
    tower: Path  # the folder
    tokenizer: Path
    layers: dict[int, int]  # of the published sizes, by hidden_size; the first is the default
    fits: Callable = lambda config: False  # (VLMConfig) -> whether weights without a sidecar belong to it
    weights_dir: Path = SAVE_DIR  # where its weights are downloaded to
    downloads: dict[str, str] = field(default_factory=dict)  # names for scripts/download.py: tower, tokenizer, weights
    recipes: dict[str, dict] = field(default_factory=dict)  # what differs from a stage's defaults, by stage and flag
    # Defaults of sampling, by flag; top_k 0 samples from all tokens.
    sampling: dict = field(default_factory=lambda: {"temperature": 0.65, "top_p": 0.85, "top_k": 0})
    prompt_form: str = PROMPT_FORMS[0]  # unless the weights' sidecar says another

    @property
    def folders(self) -> dict[str, Path]:
        """Tower and tokenizer, by flag."""
        return {"vision_model_path": place_of(self.tower), "tokenizer_path": place_of(self.tokenizer)}

    def recipe(self, stage) -> dict:
        """Returns a stage's settings, by flag."""
        return stage.defaults | self.recipes.get(stage.name, {})

    def command(self, part: str) -> str:
        """Returns the command that downloads a part, or a hint if unpublished."""
        name = self.downloads.get(part)
        return f"python scripts/download.py {name}" if name else "not published: name it by its flag"


SHARES = {"empty_think_ratio": 0.2, "add_system_ratio": 0.2}  # the original's
BUILTIN = Bundle(
    name="built-in",
    tower=BUILTIN_TOWER_DIR,
    tokenizer=BUILTIN_TOKENIZER_DIR,
    layers={BUILTIN_HIDDEN_SIZE: 4},
    weights_dir=BUILTIN_MODEL_DIR,
    recipes={
        "pretrain": {"epochs": 1, "batch_size": 16, "learning_rate": 4e-3, "log_interval": 20, "compile": 0},
        "sft": {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "log_interval": 50, "compile": 0},
    },
)
MINIMIND2 = Bundle(
    name="minimind2-v",
    tower=TOWER_DIR,
    tokenizer=TOKENIZER_DIR,
    layers={512: 8, 768: 16},
    fits=lambda config: not config.qk_norm,
    downloads={name: name for name in ("tower", "tokenizer", "llm", "pretrain_vlm", "sft_vlm")},
)
MINIMIND_3V = Bundle(
    name="minimind-3v",
    tower=TOWER_3V_DIR,
    tokenizer=TOKENIZER_3V_DIR,
    layers={768: 8},
    fits=lambda config: config.qk_norm,
    weights_dir=SAVE_3V_DIR,
    downloads={"tower": "tower_3v", "tokenizer": "tokenizer_3v", "llm": "llm_3v", "sft_vlm": "minimind-3v"},
    recipes={
        "pretrain": {"epochs": 2, "max_seq_len": 450} | SHARES,
        "sft": {"learning_rate": 5e-6, "max_seq_len": 768} | SHARES,
    },
    sampling={"temperature": 0.7, "top_p": 0.85, "top_k": 50},
)
LANGUAGE_MODEL = Bundle(  # of transformers, named by --llm_path, which has its tokenizer
    name="transformers",
    tower=TOWER_DIR,
    tokenizer=TOKENIZER_DIR,
    layers={},
    downloads={"tower": "tower"},
    recipes={"pretrain": {"learning_rate": 1e-3}, "sft": {"learning_rate": 2e-5}},
)
BUNDLES = {bundle.name: bundle for bundle in (BUILTIN, MINIMIND2, MINIMIND_3V, LANGUAGE_MODEL)}


@dataclass(frozen=True)
class PublishedFile:
    """A file or folder that training needs, its path, and the command that downloads it."""

    what: str
    path: Path
    command: str
    contains: tuple[str, ...] = ()  # one of these must be in the folder, or its download was interrupted

    @property
    def is_complete(self) -> bool:
        return any((self.path / name).is_file() for name in self.contains) if self.contains else self.path.exists()


def bundle_of(weights: Weights) -> Bundle:
    """Returns the generation of weights: the one their sidecar names, else the first that fits their shape."""
    named = BUNDLES.get(weights.sidecar.get("assets"))
    return named or next(bundle for bundle in BUNDLES.values() if bundle.fits(weights.config))


def read_tower(folder: Path) -> TowerSettings:
    """Reads a tower's settings; its TowerError also says how to download the published one."""
    try:
        return read_tower_settings(folder)
    except TowerError as error:
        bundle = MINIMIND_3V if folder == place_of(MINIMIND_3V.tower) else MINIMIND2
        raise TowerError(f"{error}. `{bundle.command('tower')}` downloads the published one") from error


def choose(args, data: str) -> tuple[Bundle, dict[str, Path | str]]:
    """Returns the generation, and the paths that no flag names, by flag; `data` is `Stage.data`.

    Without --data_path, downloaded files are used, or the built-in model and set if there are none. With it,
    --from_weight names the model, and its sidecar the tower and tokenizer. Raises UsageError if some of what is needed
    is missing (it says how to get it), or the weights cannot be read.
    """
    candidates = matching_weights(Path(args.save_dir), args.from_weight, args.hidden_size, args.use_moe)
    published = [path for path in candidates if not is_builtin(path)]
    bundle = MINIMIND2 if args.llm_path is None else LANGUAGE_MODEL
    if published and bundle is MINIMIND2:  # their tensors are read only if their sidecar names no generation
        assets = read_sidecar_or_empty(published[0]).get("assets")
        bundle = BUNDLES.get(assets) or bundle_of(read_weights(published[0]))
    own_data, weights_decide = args.data_path is not None, args.data_path is not None or is_path(args.from_weight)
    files = needed_files(bundle, args, data)
    paths = {"images_path": args.data_path.parent} if own_data and args.data_path.suffix != ".parquet" else {}
    typed = [flag for flag in DATA_FLAGS + MODEL_FLAGS if getattr(args, flag) is not None]
    named = candidates[0] if candidates and weights_decide else None
    present = [flag for flag, file in files.items() if file.path.exists()]
    unknown = unknown_files(args)
    # Beside data and a tower of one's own, but not beside another tokenizer.
    own_parts = own_data and args.tokenizer_path in (None, BUILTIN.tokenizer) and args.from_weight != "none"
    may_be_builtin = own_parts or not {*typed} & {*(MODEL_FLAGS if own_data else DATA_FLAGS + MODEL_FLAGS)}
    may_be_builtin &= args.hidden_size in (None, *BUILTIN.layers) and bundle is not LANGUAGE_MODEL
    takes_builtin = may_be_builtin and (
        is_builtin(named) if named else not (present or unknown or is_path(args.from_weight))
    )
    weights_decide |= bundle is LANGUAGE_MODEL
    decisive = named if takes_builtin else next(iter(published), None) if weights_decide else None
    if args.llm_path is not None:
        decisive, paths = None, paths | {"tokenizer_path": args.llm_path}
    recorded = recorded_folders(read_sidecar_or_empty(decisive), decisive) if decisive else {}
    recorded = {flag: folder for flag, folder in recorded.items() if folder.is_dir()}
    if takes_builtin:
        return BUILTIN, paths | BUILTIN.folders | recorded | ({} if own_data else builtin_data(args, data))
    paths |= recorded
    missing = [file for flag, file in files.items() if flag not in (*typed, *paths) and not file.is_complete]
    if missing:
        found = [display_path(files[flag].path) for flag in present] + [f"--{flag}" for flag in typed]
        expected = [file.path for file in files.values()]
        found += [f"{display_path(path)} (unexpected name)" for path in unknown if path not in expected]
        raise UsageError(missing_message(missing, found))
    return bundle, {flag: file.path for flag, file in files.items() if flag != "from_weight"} | paths


def needed_files(bundle: Bundle, args, data: str) -> dict[str, PublishedFile]:
    """Returns the needed published files, by the flag that replaces each."""
    folders, save_dir = bundle.folders, Path(args.save_dir)
    tower, tokenizer = folders["vision_model_path"], folders["tokenizer_path"]
    files = {
        "vision_model_path": PublishedFile("vision tower", tower, bundle.command("tower"), TOWER_WEIGHTS),
        "tokenizer_path": PublishedFile("tokenizer", tokenizer, bundle.command("tokenizer"), ("tokenizer.json",)),
    }
    if args.data_path is None:
        names = [DATASET_DIR / name.format(data) for name in DATA_NAMES]  # parquet, the newer form, first
        path = next(filter(Path.is_file, names), DATASET_DIR / f"{data}_data.jsonl")
        files["data_path"] = PublishedFile("data", path, f"python scripts/download.py {data}")
        if path.suffix != ".parquet":
            images = DATASET_DIR / f"{data}_images"
            files["images_path"] = PublishedFile("pictures", images, f"python scripts/download.py {data}")
    if args.from_weight == "llm" and args.llm_path is None:
        size = args.hidden_size or next(iter(bundle.layers))
        # Any size is accepted here: find_weights reports a missing size.
        path = next(iter(matching_weights(save_dir, "llm")), save_dir / f"llm_{size}.pth")
        files["from_weight"] = PublishedFile("language model", path, f"{bundle.command('llm')} --hidden_size {size}")
    return files


def builtin_data(args, data: str) -> dict[str, Path | str]:
    """Returns the drawn scenes' files; evaluates on held-out scenes."""
    paths = {"data_path": BUILTIN_DATASET_DIR / f"{data}.jsonl", "images_path": BUILTIN_DATASET_DIR / "images"}
    if args.eval_data is None:
        paths["eval_data"] = BUILTIN_DATASET_DIR / "heldout.jsonl"
        paths["eval_images_path"] = BUILTIN_DATASET_DIR / "heldout_images"
    return paths


def recorded_folders(sidecar: dict, path: Path) -> dict[str, Path]:
    """Returns tower and tokenizer that the weights at `path` were trained with, by flag; raises UsageError."""
    arguments = sidecar.get("arguments", {})
    try:
        return {flag: ROOT / file_path(arguments[flag]) for flag in MODEL_FLAGS if arguments.get(flag)}
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"the sidecar of {display_path(path)} names an invalid path: {error}") from error


def missing_message(missing: list[PublishedFile], found: list[str]) -> str:
    flags = ", ".join(f"--{flag}" for flag in DATA_FLAGS + MODEL_FLAGS)
    lines = [f"  {file.what}: {display_path(file.path)} ({file.command})" for file in missing]
    return "\n".join(["some files are missing:", *lines]) + (
        f"\nDownload them, or name your own with {flags}. (With none of these files and none of these flags, the small "
        "built-in set is used. With --data_path of your own and nothing downloaded, the built-in language model and "
        f"tokenizer are, also beside your own tower. Found: {', '.join(found) or 'nothing'}.)"
    )


def is_builtin(path: Path) -> bool:
    """Tells whether weights are the built-in language model, or were trained from it."""
    return path.parent == BUILTIN.weights_dir or read_sidecar_or_empty(path).get("assets") == BUILTIN.name


def find_weights(
    save_dir: Path, name: str, hidden_size=None, use_moe=None, builtin: bool | None = None, log=print
) -> Path:
    """Returns the best of `matching_weights`, and logs if there are several; raises UsageError if there is none.

    `builtin` True takes only weights trained on the built-in set, False only others, None any.
    """
    of_size = matching_weights(save_dir, name, hidden_size, use_moe)
    if is_path(name) and not of_size:
        raise UsageError(f"no weight file {name}")
    matching = [path for path in of_size if is_path(name) or builtin in (None, is_builtin(path))]
    if of_size and not matching:
        whose = "another model than the built-in one" if builtin else "the built-in model"
        raise UsageError(
            f"{display_path(of_size[0])} was trained from {whose}, which this run is not about: name its data with "
            f"--data_path, or its path with --from_weight. {hint(name, save_dir)}".rstrip()
        )
    if not matching:
        wanted = weight_name(name, hidden_size, use_moe) if hidden_size else f"{name}_*"
        found = ", ".join(path.name for path in matching_weights(save_dir, name) or list_weights(save_dir))
        raise UsageError(
            f"no weight file {wanted}.pth in {display_path(save_dir)} (there: {found or 'no weights'}). "
            f"{hint(name, save_dir)}".rstrip()
        )
    others = ", ".join(path.name for path in matching[1:] if path.name.startswith(f"{name}_"))
    if others:
        log(f"taking the newest weights, {matching[0].name} (also there: {others}; --hidden_size chooses)")
    return matching[0]


def hint(name: str, save_dir: Path) -> str:
    """Returns how to get weights of a name: a stage's script is called after the weights it writes."""
    script = ROOT / "trainer" / f"train_{name}.py"
    ways = [f"train it first: python {display_path(script)}"] if script.is_file() else []
    bundle = next((it for it in BUNDLES.values() if it.weights_dir == save_dir.absolute()), MINIMIND2)
    ways += [f"download the published one: {bundle.command(name)}"] if name in bundle.downloads else []
    text = ", or ".join(ways)
    return text[:1].upper() + text[1:]


def unknown_files(args) -> list[Path]:
    """Returns files of any name that look like weights, a tower, a tokenizer or data, in the folders for them.

    If there are any, the built-in set is not used: somebody meant to use them. Weights with a sidecar were written by
    this project and do not count, nor do this run's inputs and outputs.
    """
    save_dir, model = Path(args.save_dir), TOWER_DIR.parents[1]
    names = (*WEIGHT_NAMES.get(args.from_weight, (args.from_weight,)), args.save_weight)
    expected = [path for path, (name, *_) in list_weights(save_dir).items() if name in names]
    found = [
        path
        for path in sorted((*save_dir.glob("*"), *save_dir.glob("*/*.pth")))
        if ending(path) in WEIGHT_SUFFIXES
        and path not in expected
        and not path.stem.endswith("_resume")
        and not path.with_suffix(".json").exists()
    ]
    marks = ("config.json", "tokenizer.json", *TOWER_WEIGHTS)
    for folder in (model, *sorted(model.glob("*")), *sorted(model.glob("vision_model/*"))):
        is_ours = folder.name in (BUILTIN_TOKENIZER_DIR.name, BUILTIN_TOWER_DIR.parent.name)
        found += [folder] if not is_ours and any((folder / mark).is_file() for mark in marks) else []
    if args.data_path is None:
        found += [path for path in sorted(DATASET_DIR.glob("*")) if ending(path) in DATA_SUFFIXES]
    return found


def ending(path: Path) -> str:
    """Returns a file's ending in lower case, ignoring .part."""
    name = re.sub(r"(\.[0-9a-f]{12})?\.part$", "", path.name)
    return os.path.splitext(name)[1].lower()
