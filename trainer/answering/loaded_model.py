"""A trained model, found by the flags that eval_vlm.py and the scripts share."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from common.cli import file_path
from common.errors import UsageError
from common.paths import BUILTIN_DATASET_DIR, ROOT, SAVE_DIR, display_path
from common.schema import read_json
from dataset.chat import check_tokenizer, load_tokenizer, tokenizer_hash
from model import weights as weight_io
from model.language_model import build
from model.model_vlm import MiniMindVLM, VLMConfig, fit_config_to_tower
from model.vision_tower import TowerSettings
from trainer.bundles import BUILTIN, BUNDLES, bundle_of, find_weights, read_tower, recorded_folders


@dataclass(frozen=True)
class LoadedModel:
    """Weights, and the tokenizer and tower they were trained with."""

    weights: weight_io.Weights
    config: VLMConfig  # fitted to the tower
    tokenizer: PreTrainedTokenizerBase
    tokenizer_path: Path
    tower: TowerSettings
    tower_path: Path

    @property
    def prompt_form(self) -> str:
        """Image position in most training rows."""
        return self.weights.sidecar.get("prompt_form", bundle_of(self.weights).prompt_form)

    @property
    def knows_only_scenes(self) -> bool:
        """Whether it was trained on the built-in set and nothing else."""
        data = self.weights.sidecar.get("arguments", {}).get("data_path")
        is_theirs = data is None or (ROOT / str(data)).parent == BUILTIN_DATASET_DIR
        return bundle_of(self.weights) is BUILTIN and is_theirs

    def load_model(self) -> MiniMindVLM:
        """Builds the model on the CPU in float32; a projection that the weights lack is drawn at random."""
        model = build(self.config, self.tower_path)
        weight_io.load_into(model, self.weights)
        return model.eval()


def add_model_flags(parser: argparse.ArgumentParser):
    """Adds the flags that name a trained model; returns their group."""
    group = parser.add_argument_group("the model")
    add = group.add_argument
    what = "model: the weight files in --save_dir; anything else: a transformers folder"
    add("--load_from", default="model", help=what)
    add("--save_dir", type=file_path, help=f"where the weight files lie (default: {display_path(SAVE_DIR)})")
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

    Raises UsageError if something is missing, unreadable, or does not belong to the rest.
    """
    if args.load_from != "model":
        weights = weight_io.read_folder(Path(args.load_from).expanduser())
    else:
        save_dir = args.save_dir or SAVE_DIR
        downloads = (bundle for bundle in BUNDLES.values() if bundle is not BUILTIN)
        is_downloaded = any(bundle.folders["vision_model_path"].exists() for bundle in downloads)
        if args.weight == "llm" and not weight_io.matching_weights(save_dir, "llm") and not is_downloaded:
            save_dir = BUILTIN.weights_dir  # the built-in language model if no other was downloaded
        name = os.path.expanduser(args.weight)
        weights = weight_io.read_weights(find_weights(save_dir, name, args.hidden_size, args.use_moe))
    weight_io.check_shape_flags(weights, args.hidden_size, args.num_hidden_layers, args.use_moe)
    folder, bundle = weights.path.parent, bundle_of(weights)
    folders = bundle.folders
    for flag, recorded in recorded_folders(weights.sidecar, weights.path).items():
        if recorded.is_dir() or bundle is not BUILTIN:
            folders[flag] = recorded
    if args.load_from != "model" and (folder / "tokenizer.json").is_file():
        folders["tokenizer_path"] = folder
    if args.load_from != "model" and read_json(folder / "config.json", weight_io.EXPORTED_CONFIG).get("vision_config"):
        folders["vision_model_path"] = folder
    tokenizer_path = args.tokenizer_path.resolve() if args.tokenizer_path else folders["tokenizer_path"]
    tower_path = args.vision_model_path.resolve() if args.vision_model_path else folders["vision_model_path"]
    tokenizer = load_tokenizer(tokenizer_path)
    check_tokenizer(weights, tokenizer_hash(tokenizer), tokenizer_path, tokenizer)
    tower = read_tower(tower_path)
    try:
        config = fit_config_to_tower(weights.config, tower, weights.has_projection and not weights.sidecar)
    except ValueError as error:
        raise UsageError(f"{display_path(weights.path)} does not fit {display_path(tower_path)}: {error}") from error
    return LoadedModel(weights, config, tokenizer, tokenizer_path, tower, tower_path)
