"""Model generations, and which of them a command uses; a new one is one more record in BUNDLES."""

import argparse
import difflib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from common import paths
from common.cli import file_path
from common.errors import UsageError
from common.paths import display_path, place_of
from model import weights as weight_io
from model.vision_tower import TowerError, TowerSettings, read_tower_settings

PARTIAL = r"((\.[0-9a-f]{12})?\.part)?$"  # the end of a file that is still being downloaded
WEIGHT_FILE = re.compile(r"\.(pth|pt|bin|ckpt|safetensors)" + PARTIAL, re.IGNORECASE)
DATA_FILE = re.compile(r"\.(parquet|jsonl|json|zip|csv|tsv|tar|arrow)" + PARTIAL, re.IGNORECASE)
TOWER_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# The flags of tower and tokenizer; one of these files must be in the folder, or its download was interrupted.
MODEL_FLAGS = {"vision_model_path": TOWER_WEIGHTS, "tokenizer_path": ("tokenizer.json",)}


@dataclass(frozen=True)
class Bundle:
    """A generation of models, and what was published with it."""

    name: str  # in sidecars ("assets")
    tower: Path  # the folder
    tokenizer: Path
    layers: dict[int, int]  # of the published sizes, by hidden_size; the first is the default
    fits: Callable = lambda config: False  # (VLMConfig) -> whether weights without a sidecar belong to it
    weights_dir: Path = paths.SAVE_DIR  # where its weights are downloaded to
    downloads: dict[str, str] = field(default_factory=dict)  # names for scripts/download.py: tower, tokenizer, weights
    recipes: dict[str, dict] = field(default_factory=dict)  # what differs from a stage's defaults, by stage and flag
    # Defaults of sampling, by flag; top_k 0 samples from all tokens.
    sampling: dict = field(default_factory=lambda: {"temperature": 0.65, "top_p": 0.85, "top_k": 0})

    @property
    def folders(self) -> dict[str, Path]:
        return {"vision_model_path": place_of(self.tower), "tokenizer_path": place_of(self.tokenizer)}

    def command(self, part: str) -> str:
        """Returns the command that downloads a part, or a hint if unpublished."""
        name = self.downloads.get(part)
        return f"python scripts/download.py {name}" if name else "not published: name it by its flag"


SHARES = {"empty_think_ratio": 0.2, "add_system_ratio": 0.2}  # the original's
BUILTIN = Bundle(
    name="built-in",
    tower=paths.BUILTIN_TOWER_DIR,
    tokenizer=paths.BUILTIN_TOKENIZER_DIR,
    layers={paths.BUILTIN_HIDDEN_SIZE: 4},
    weights_dir=paths.BUILTIN_MODEL_DIR,
    recipes={  # for the built-in set; `epochs_for` has the epochs for data of one's own
        "pretrain": {"epochs": 1, "batch_size": 16, "learning_rate": 4e-3, "log_interval": 20, "compile": 0},
        "sft": {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3, "log_interval": 50, "compile": 0},
    },
)
MINIMIND2 = Bundle(
    name="minimind2-v",
    tower=paths.TOWER_DIR,
    tokenizer=paths.TOKENIZER_DIR,
    layers={512: 8, 768: 16},
    fits=lambda config: not config.qk_norm,
    downloads={name: name for name in ("tower", "tokenizer", "llm", "pretrain_vlm", "sft_vlm")},
)
MINIMIND_3V = Bundle(
    name="minimind-3v",
    tower=paths.TOWER_3V_DIR,
    tokenizer=paths.TOKENIZER_3V_DIR,
    layers={768: 8},
    fits=lambda config: config.qk_norm,
    weights_dir=paths.SAVE_3V_DIR,
    downloads={"tower": "tower_3v", "tokenizer": "tokenizer_3v", "llm": "llm_3v", "sft_vlm": "minimind-3v"},
    recipes={
        "pretrain": {"epochs": 2, "max_seq_len": 450} | SHARES,
        "sft": {"learning_rate": 5e-6, "max_seq_len": 768} | SHARES,
    },
    sampling={"temperature": 0.7, "top_p": 0.85, "top_k": 50},
)
LANGUAGE_MODEL = Bundle(  # of transformers, named by --llm_path, which has its tokenizer
    name="transformers",
    tower=paths.TOWER_DIR,
    tokenizer=paths.TOKENIZER_DIR,
    layers={},
    downloads={"tower": "tower"},
    recipes={"pretrain": {"learning_rate": 1e-3}, "sft": {"learning_rate": 2e-5}},
)
BUNDLES = {bundle.name: bundle for bundle in (BUILTIN, MINIMIND2, MINIMIND_3V, LANGUAGE_MODEL)}


def epochs_for(stage: str, rows: int) -> int | None:
    """Returns the epochs in which the built-in model sees enough of a user's rows; None for a stage without a rule."""
    enough = {"pretrain": 10_000, "sft": 25_000}.get(stage)
    return enough and max(1, min(60, math.ceil(enough / max(1, rows))))


def bundle_of(weights: weight_io.Weights) -> Bundle:
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


def choose_bundle(args, data: str) -> tuple[Bundle, dict[str, Path | str]]:
    """Returns the generation, and the paths that no flag names, by flag; `data` is `Stage.data`.

    Without --data_path, downloaded files are used, or the built-in model and set if there are none. With it,
    --from_weight names the model. The starting weights' sidecar names tower and tokenizer. Raises UsageError if some of
    what is needed is missing (it says how to get it), or the weights cannot be read.
    """
    own_data, is_path = args.data_path is not None, Path(args.from_weight).suffix == ".pth"
    candidates = weight_io.matching_weights(Path(args.save_dir), args.from_weight, args.hidden_size, args.use_moe)
    downloaded = [path for path in candidates if args.llm_path is None and not is_builtin(path)]
    bundle = MINIMIND2 if args.llm_path is None else LANGUAGE_MODEL
    if downloaded:  # their tensors are read only if their sidecar names no generation
        assets = weight_io.read_sidecar_or_empty(downloaded[0]).get("assets")
        bundle = BUNDLES.get(assets) or bundle_of(weight_io.read_weights(downloaded[0]))
    files = needed_files(bundle, args, data)
    expected = [path for _, path, _ in files.values()]
    present = [display_path(path) for path in expected if path.exists()]
    unknown = unknown_files(args)
    typed = [flag for flag in ("data_path", "images_path", *MODEL_FLAGS) if getattr(args, flag) is not None]

    # Beside data and a tower of one's own, but not beside another tokenizer.
    own_parts = own_data and args.tokenizer_path in (None, BUILTIN.tokenizer) and args.from_weight != "none"
    may_be_builtin = own_parts or not ({*typed} & {*MODEL_FLAGS} if own_data else typed)
    may_be_builtin &= args.hidden_size in (None, *BUILTIN.layers) and bundle is not LANGUAGE_MODEL
    decisive = candidates[0] if candidates and (own_data or is_path) else None
    takes_builtin = may_be_builtin and (is_builtin(decisive) if decisive else not (present or unknown or is_path))
    if not takes_builtin:
        decisive = downloaded[0] if downloaded else None

    recorded = recorded_folders(weight_io.read_sidecar_or_empty(decisive), decisive) if decisive else {}
    chosen = {flag: folder for flag, folder in recorded.items() if folder.is_dir()}
    if own_data and args.data_path.suffix != ".parquet":
        chosen["images_path"] = args.data_path.parent
    if args.llm_path is not None:
        chosen["tokenizer_path"] = args.llm_path
    if takes_builtin:
        folder = paths.BUILTIN_DATASET_DIR
        if not own_data and data not in BUILTIN.recipes:
            raise UsageError("the built-in set has no data for this stage: name yours with --data_path")
        if not own_data:
            chosen |= {"data_path": folder / f"{data}.jsonl", "images_path": folder / "images"}
        if not own_data and args.eval_data is None:  # evaluates on held-out scenes
            chosen |= {"eval_data": folder / "heldout.jsonl", "eval_images_path": folder / "heldout_images"}
        return BUILTIN, BUILTIN.folders | chosen
    missing = []
    for flag, (what, path, command) in files.items():
        marks = [path / mark for mark in MODEL_FLAGS.get(flag, ())] or [path]
        if flag not in (*typed, *chosen) and not any(mark.exists() for mark in marks):
            path = recorded.get(flag, path) if bundle is LANGUAGE_MODEL else path  # it has a tokenizer of its own
            missing.append(f"  {what}: {display_path(path)} ({command})")
    if missing:
        named = {flag: getattr(args, flag) for flag in typed}
        missing += [f"  --{flag}: {display_path(path)}" for flag, path in named.items() if not path.exists()]
        others = (f"{display_path(path)} (unexpected name)" for path in unknown if path not in expected)
        found = ", ".join([*present, *(f"--{flag}" for flag in typed), *others]) or "nothing"
        raise UsageError(
            "\n".join(["some files are missing:", *missing]) + "\nDownload them, or name your own with --data_path, "
            f"--images_path, --vision_model_path, --tokenizer_path. Found: {found}. (With none of these files and "
            "flags, training uses the small built-in set. With your own --data_path and nothing downloaded, it uses "
            "the built-in language model and tokenizer, also with a tower of your own.)"
        )
    return bundle, {flag: path for flag, (_, path, _) in files.items() if flag != "from_weight"} | chosen


def needed_files(bundle: Bundle, args, data: str) -> dict[str, tuple[str, Path, str]]:
    """Returns name, path and download command of each needed file, by the flag that replaces it."""
    tower, tokenizer = bundle.folders.values()
    files = {
        "vision_model_path": ("vision tower", tower, bundle.command("tower")),
        "tokenizer_path": ("tokenizer", tokenizer, bundle.command("tokenizer")),
    }
    if args.data_path is None:
        is_published = data in BUILTIN.recipes  # published data sets have the same names
        command = f"python scripts/download.py {data}" if is_published else bundle.command(data)
        names = [paths.DATASET_DIR / name.format(data) for name in paths.DATA_NAMES]  # parquet, the newer form, first
        path = next(filter(Path.is_file, names), paths.DATASET_DIR / f"{data}_data.jsonl")
        files["data_path"] = ("data", path, command)
        if path.suffix != ".parquet":
            files["images_path"] = ("pictures", paths.DATASET_DIR / f"{data}_images", command)
    if args.from_weight == "llm" and args.llm_path is None:
        # Another language model's bundle has no sizes: it is chosen by weights that exist, or by --llm_path.
        size, save_dir = args.hidden_size or next(iter(bundle.layers), None), Path(args.save_dir)
        # Any size is accepted here: find_weights reports a missing size.
        path = next(iter(weight_io.matching_weights(save_dir, "llm")), save_dir / f"llm_{size}.pth")
        files["from_weight"] = ("language model", path, f"{bundle.command('llm')} --hidden_size {size}")
    return files


def unknown_files(args) -> list[Path]:
    """Returns files of any name that look like weights, a tower, a tokenizer or data, in the folders for them.

    If there are any, the built-in set is not used: somebody meant to use them. Weights with a sidecar were written by
    this project and do not count, nor do this run's inputs and outputs.
    """
    save_dir, model = Path(args.save_dir), paths.TOWER_DIR.parents[1]
    names = (*paths.WEIGHT_NAMES.get(args.from_weight, (args.from_weight,)), args.save_weight)
    expected = [path for path, (name, *_) in weight_io.list_weights(save_dir).items() if name in names]
    found, marks = [], ("config.json", "tokenizer.json", *TOWER_WEIGHTS)
    for path in sorted((*save_dir.glob("*"), *save_dir.glob("*/*.pth"))):
        is_ours = path in expected or path.stem.endswith("_resume") or path.with_suffix(".json").exists()
        found += [path] if not is_ours and WEIGHT_FILE.search(path.name) else []
    for folder in (model, *sorted(model.glob("*")), *sorted(model.glob("vision_model/*"))):
        is_ours = folder.name in (BUILTIN.tokenizer.name, BUILTIN.tower.parent.name)
        found += [folder] if not is_ours and any((folder / mark).is_file() for mark in marks) else []
    if args.data_path is None:
        found += [path for path in sorted(paths.DATASET_DIR.glob("*")) if DATA_FILE.search(path.name)]
    return found


def recorded_folders(sidecar: dict, path: Path) -> dict[str, Path]:
    """Returns tower and tokenizer that the weights at `path` were trained with, by flag; raises UsageError."""
    arguments = sidecar.get("arguments", {})
    try:
        return {flag: paths.ROOT / file_path(arguments[flag]) for flag in MODEL_FLAGS if arguments.get(flag)}
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"the sidecar of {display_path(path)} names an invalid path: {error}") from error


def is_builtin(path: Path) -> bool:
    """Tells whether weights are the built-in language model, or were trained from it."""
    return path.parent == BUILTIN.weights_dir or weight_io.read_sidecar_or_empty(path).get("assets") == BUILTIN.name


def find_weights(save_dir: Path, name: str, hidden_size=None, use_moe=None, builtin=None, log=print) -> Path:
    """Returns the best of `matching_weights`, and logs if there are several; raises UsageError if there is none.

    `builtin` True takes only weights trained on the built-in set, False only others, None any.
    """
    of_size, is_path = weight_io.matching_weights(save_dir, name, hidden_size, use_moe), Path(name).suffix == ".pth"
    if is_path and not of_size:
        raise UsageError(f"no weight file {name}")
    matching = [path for path in of_size if is_path or builtin in (None, is_builtin(path))]
    if not matching:
        if of_size:
            origin = "another model than the built-in one" if builtin else "the built-in model"
            problem = f"{display_path(of_size[0])} was trained from {origin}, which this run is not about: name its "
            problem += "data with --data_path, or its path with --from_weight."
        else:
            wanted = weight_io.weight_name(name, hidden_size, use_moe) if hidden_size else f"{name}_*"
            others, stem = weight_io.list_weights(save_dir), Path(name).name.partition(".")[0]
            like = difflib.get_close_matches(stem, {known for known, *_ in others.values()}, n=1)
            found = [path.name for path in weight_io.matching_weights(save_dir, name) or others]
            there = ", ".join(found[:8]) + (f" and {len(found) - 8} more" if found[8:] else "") or "no weights"
            problem = f"no weight file {wanted}.pth in {display_path(save_dir)} (there: {there})."
            problem += f" Did you mean {like[0]}?" if like and like[0] != name else ""
        script = paths.ROOT / "trainer" / f"train_{name}.py"  # a stage's script is called after the weights it writes
        ways = [f"train it first: python {display_path(script)}"] if script.is_file() else []
        bundle = next((it for it in BUNDLES.values() if it.weights_dir == save_dir.absolute()), MINIMIND2)
        ways += [f"download the published one: {bundle.command(name)}"] if name in bundle.downloads else []
        hint = ", or ".join(ways)
        raise UsageError(f"{problem} {hint[:1].upper()}{hint[1:]}".rstrip())
    others = ", ".join(path.name for path in matching[1:] if path.name.startswith(f"{name}_"))
    if others:
        log(f"taking the newest weights, {matching[0].name} (also there: {others}; --hidden_size chooses)")
    return matching[0]
