"""A trained model, found by the flags that eval_vlm.py and the scripts share."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from common.cli import file_path
from common.errors import UsageError
from common.paths import (
    BUILTIN_DATASET_DIR,
    BUILTIN_MODEL_DIR,
    BUILTIN_TOKENIZER_DIR,
    BUILTIN_TOWER_DIR,
    ROOT,
    SAVE_DIR,
    TOKENIZER_3V_DIR,
    TOKENIZER_DIR,
    TOWER_3V_DIR,
    TOWER_DIR,
    display_path,
    place_of,
)
from common.schema import read_json
from dataset.prompts import DEFAULT_FORM
from dataset.tokenizer import check_tokenizer, load_tokenizer, tokenizer_hash
from model import weights as weight_io
from model.model_vlm import MiniMindVLM, VLMConfig
from model.vision_tower import TowerSettings
from model.vlm_config import fit_config_to_tower
from trainer.bundles import read_tower

# How the published models' own scripts draw an answer; top_k 0 draws from all tokens.
SAMPLING = {"temperature": 0.65, "top_p": 0.85, "top_k": 0}
SAMPLING_3V = SAMPLING | {"temperature": 0.7, "top_k": 50}


@dataclass(frozen=True)
class LoadedModel:
    """Weights, and the tokenizer and tower they were trained with.

    Attributes:
        weights: Tensors and sidecar.
        config: The model's shape, fitted to the tower.
        tokenizer, tokenizer_path: What texts are read with, and its folder.
        tower, tower_path: What the vision tower's own files say, and its folder.
    """

    weights: weight_io.Weights
    config: VLMConfig
    tokenizer: PreTrainedTokenizerBase
    tokenizer_path: Path
    tower: TowerSettings
    tower_path: Path

    @property
    def prompt_form(self) -> str:
        """Where most rows that it learned had their image."""
        return self.weights.sidecar.get("prompt_form", DEFAULT_FORM)

    @property
    def sampling(self) -> dict:
        """The recipe's settings for drawing answers, by flag."""
        return SAMPLING_3V if self.config.qk_norm else SAMPLING

    @property
    def knows_only_scenes(self) -> bool:
        """Whether it was trained on the built-in set and nothing else."""
        sidecar = self.weights.sidecar
        data = sidecar.get("arguments", {}).get("data_path")
        builtin = [BUILTIN_DATASET_DIR / name for name in ("pretrain.jsonl", "sft.jsonl")]
        return sidecar.get("assets") == "built-in" and (data is None or ROOT / str(data) in builtin)

    def load_model(self) -> MiniMindVLM:
        """Builds the model on the CPU in float32; a projection that the weights lack is drawn at random."""
        model = MiniMindVLM(self.config, vision_model_path=self.tower_path)
        weight_io.load_into(model, self.weights)
        return model.eval()


def add_model_flags(parser: argparse.ArgumentParser):
    """Adds the flags that name a trained model; returns their group."""
    group = parser.add_argument_group("the model")
    add = group.add_argument
    add(
        "--load_from",
        default="model",
        help="model: the weight files in --save_dir; anything else: a transformers folder",
    )
    what = "where the weight files lie"
    add("--save_dir", type=file_path, help=f"{what} (default: {display_path(SAVE_DIR)})")
    add("--weight", default="sft_vlm", help="NAME of NAME_{hidden_size}.pth, or a path to a .pth")
    add("--hidden_size", type=int, help="which of several files of that name (default: the newest)")
    add("--num_hidden_layers", type=int, help="layers (default: what the file says)")
    add("--use_moe", type=int, choices=(0, 1), help="1: the file with experts (default: what the file says)")
    trained_with = "(default: what the weights were trained with)"
    add("--tokenizer_path", type=file_path, help=f"the tokenizer's folder {trained_with}")
    add("--vision_model_path", type=file_path, help=f"the vision tower's folder {trained_with}")
    return group


def find_model(args: argparse.Namespace) -> LoadedModel:
    """Reads the weights that the flags of `add_model_flags` name, with their tokenizer and tower.

    Raises:
        UsageError: If something is missing, unreadable, or does not belong to the rest.
    """
    weights = find_weights(args)
    folder = weights.path.parent if args.load_from != "model" else None
    tokenizer_path, tower_path = args.tokenizer_path, args.vision_model_path
    if folder and (folder / "tokenizer.json").is_file():
        tokenizer_path = tokenizer_path or folder
    if folder and read_json(folder / "config.json", weight_io.EXPORTED_CONFIG).get("vision_config"):
        tower_path = tower_path or folder
    published = (TOKENIZER_3V_DIR, TOWER_3V_DIR) if weights.config.qk_norm else (TOKENIZER_DIR, TOWER_DIR)
    published = tuple(map(place_of, published))
    tokenizer_path = choose_path(tokenizer_path, weights, "tokenizer_path", BUILTIN_TOKENIZER_DIR, published[0])
    tower_path = choose_path(tower_path, weights, "vision_model_path", BUILTIN_TOWER_DIR, published[1])
    tokenizer = load_tokenizer(tokenizer_path)
    check_tokenizer(weights, tokenizer_hash(tokenizer), tokenizer_path, tokenizer)
    tower = read_tower(tower_path)
    try:
        config = fit_config_to_tower(weights.config, tower, weights.has_projection and not weights.sidecar)
    except ValueError as error:
        raise UsageError(f"{display_path(weights.path)} does not fit {display_path(tower_path)}: {error}") from error
    return LoadedModel(weights, config, tokenizer, tokenizer_path, tower, tower_path)


def find_weights(args: argparse.Namespace) -> weight_io.Weights:
    """Reads the weights that the flags name."""
    use_moe = None if args.use_moe is None else bool(args.use_moe)
    if args.load_from != "model":
        weights = weight_io.read_folder(Path(args.load_from).expanduser())
    else:
        save_dir = args.save_dir or SAVE_DIR
        is_downloaded = place_of(TOWER_DIR).exists() or place_of(TOWER_3V_DIR).exists()
        if args.weight == "llm" and not weight_io.weight_paths(save_dir, "llm") and not is_downloaded:
            save_dir = BUILTIN_MODEL_DIR
        name = str(Path(args.weight).expanduser()) if args.weight.startswith("~") else args.weight
        weights = weight_io.read_weights(weight_io.find_weights(save_dir, name, args.hidden_size, use_moe))
    weight_io.check_shape_flags(weights, args.hidden_size, args.num_hidden_layers, use_moe)
    return weights


def choose_path(flag: Path | None, weights: weight_io.Weights, name: str, builtin: Path, published: Path) -> Path:
    """Returns a folder: as typed, else the one the weights were trained with, else the published one."""
    if flag is not None:
        return flag.expanduser().resolve()
    if weights.sidecar.get("assets") == "built-in":
        return builtin
    trained_with = weights.sidecar.get("arguments", {}).get(name)
    try:
        return ROOT / file_path(trained_with) if trained_with else published
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"what describes {display_path(weights.path)} has the {name} {error}") from error
