"""Where the project's files lie, whatever the current folder is."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SAVE_DIR = ROOT / "out"
SAVE_3V_DIR = SAVE_DIR / "minimind-3v"  # where its published weights are put

TOWER_DIR = ROOT / "model" / "vision_model" / "clip-vit-base-patch16"
TOKENIZER_DIR = ROOT / "model" / "tokenizer_minimind2"
TOWER_3V_DIR = TOWER_DIR.with_name("siglip2-base-p32-256-ve")
TOKENIZER_3V_DIR = ROOT / "model" / "tokenizer_minimind3v"
DATASET_DIR = ROOT / "dataset"
EVAL_IMAGES_DIR = DATASET_DIR / "eval_images"
EXAMPLE_PHOTO = DATASET_DIR / "example" / "photos" / "house.jpg"

BUILTIN_MODEL_DIR = ROOT / "model" / "builtin"
BUILTIN_TOWER_DIR = BUILTIN_MODEL_DIR / "tower"
BUILTIN_TOKENIZER_DIR = ROOT / "model" / "tokenizer"
BUILTIN_DATASET_DIR = DATASET_DIR / "builtin"
BUILTIN_HIDDEN_SIZE = 128

# The original's own names for the same, of all its generations; the first that exists is taken.
WEIGHT_NAMES = {"llm": ("llm", "lm", "full_sft")}
DATA_NAMES = ("{}_data.parquet", "{}_i2t.parquet", "{}_data.jsonl", "{}_vlm_data.jsonl")


def place_of(folder: Path) -> Path:
    """Returns where a published tower or tokenizer lies: its folder here, or where the original puts it, in model/."""
    others, needed = (folder.parents[1] / folder.name,), "config.json"
    if folder.name.startswith("tokenizer"):
        others, needed = (folder.with_name("minimind_tokenizer"), folder.parent), "tokenizer.json"
    return folder if folder.exists() else next((other for other in others if (other / needed).is_file()), folder)


def is_builtin_data(path: str | Path | None) -> bool:
    """Tells whether a data file is of the built-in set, by its path as a sidecar has it; True if that has none."""
    return path is None or (ROOT / str(path)).parent == BUILTIN_DATASET_DIR


def display_path(path: str | Path) -> str:
    """Returns the path as a person reads it: relative to the project's folder where it lies inside."""
    path = Path(path)
    return printable(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def typed_path(path: Path) -> str:
    """Returns the path as one would type it in the current folder: relative where it lies inside."""
    try:
        return str(path.relative_to(Path.cwd()))
    except (OSError, ValueError):  # the current folder was deleted; it does not lie inside
        return str(path)


def printable(text: str | Path) -> str:
    """Returns a text with what a terminal would obey (escape codes) or cannot show written as backslash codes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(text))
