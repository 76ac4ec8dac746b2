"""Check where a model looks, on held-out scenes: does a word depend on the object that it describes?

    python tests/checks/check_looking.py --weight sft_vlm

In each scene that is described word for word, each object's colour, shape, size and place get a map of the patches
that they depend on (model/answers.py). Prints how often the map's peak is on the object, compared with chance.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from PIL import Image
from tqdm import tqdm

from common.cli import ArgumentParser
from common.errors import UsageError, run_script
from dataset.chat import ChatEncoder
from dataset.pictures import PictureFormat, load_picture
from dataset.prompts import prompt_batch, with_images
from dataset.scenes.draw import Scene, draw_builtin_dataset, heldout_scenes, patch_coverage
from dataset.scenes.language import CHINESE, ENGLISH, Language, caption
from model.answers import generate, word_maps
from trainer.answering.assistant import LoadedModel, add_model_flags, find_model

SCENES, TOKENS = 50, 64  # the first of the 200 scenes
ATTRIBUTES = ("place", "size", "colour", "shape")  # in the caption's order


def attribute_maps(scene: Scene, words: list[tuple], language: Language) -> dict[tuple[str, int], np.ndarray]:
    """Returns the map (side, side) of each (attribute, object), given the maps of the words of the scene's caption."""
    text, found = "".join(word for word, _ in words), {}
    ends = np.cumsum([len(word) for word, _ in words])
    at = len(text.replace("：", ":").split(":")[0])
    for number, thing in enumerate(scene.facts):
        for attribute in ATTRIBUTES:
            word = language.say(f"{{{attribute}}}", thing)
            start = text.index(word, at)
            at = start + len(word)
            first, last = np.searchsorted(ends, (start, at - 1), side="right")
            found[attribute, number] = sum(maps[0].numpy() for _, maps in words[first : last + 1])
    return found


def covered_patches(scene: Scene, side: int) -> np.ndarray:
    """Returns which of the side x side patches each object touches, (objects, side, side)."""
    masks = [Image.fromarray(mask).resize((side, side), Image.Resampling.BOX) for mask in patch_coverage(scene)]
    return np.stack([np.asarray(mask) > 0 for mask in masks])


def widened(mask: np.ndarray) -> np.ndarray:
    """Returns the patches of (side, side) and their eight neighbours."""
    padded = np.pad(mask, 1)
    return np.lib.stride_tricks.sliding_window_view(padded, (3, 3)).any(axis=(2, 3))


def look_at_scenes(trained: LoadedModel, language: Language) -> list[tuple]:
    """Returns (covered patches, attribute maps) of each scene described word for word."""
    model, tokenizer = trained.load_model(), trained.tokenizer
    encoder = ChatEncoder(tokenizer, model.config.image_tokens)
    question = [{"role": "user", "content": with_images(language.requests[0], 1, trained.prompt_form)}]
    picture_format = PictureFormat(**model.vision_encoder.settings.picture_settings)
    paths, seen = sorted((draw_builtin_dataset() / "heldout_images").iterdir()), []
    for scene, path in zip(tqdm(heldout_scenes()[:SCENES], unit="scene"), paths, strict=False):
        inputs = prompt_batch(encoder, [question], [[load_picture(path, picture_format=picture_format)]])
        [ids] = generate(model, inputs, TOKENS)
        if tokenizer.decode(ids, skip_special_tokens=True) == caption(scene.facts, language):
            words = word_maps(model, tokenizer, inputs, ids)
            seen.append((covered_patches(scene, len(words[0][1][0])), attribute_maps(scene, words, language)))
    return seen


def measure(seen: list[tuple]) -> dict[str, dict[str, float]]:
    """Returns the printed rows: {row: {attribute: share}}."""
    rows = defaultdict(lambda: defaultdict(list))
    for index, (covered, maps) in enumerate(seen):
        others = seen[(index + len(seen) // 2) % len(seen)][1]
        for (attribute, number), of_word in maps.items():
            on = covered[number]
            peak = np.unravel_index(of_word.argmax(), on.shape)
            other_peak = np.unravel_index(others[attribute, 0].argmax(), on.shape)
            results = {
                "peak on the object": on[peak],
                "peak on it or beside it": widened(on)[peak],
                "another scene's map: peak on the object": on[other_peak],
                "chance: patches of the object": on.mean(),
            }
            if len(covered) == 2:
                results["two objects: peak on the other one"] = covered[1 - number][peak] and not on[peak]
            for row, result in results.items():
                rows[row][attribute].append(float(result))
    return {row: {name: np.mean(shares) for name, shares in of_row.items()} for row, of_row in rows.items()}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    add_model_flags(parser)
    return parser.parse_args(arguments)


def main():
    trained = find_model(parse_arguments())
    for name, language in (("Chinese", CHINESE), ("English", ENGLISH)):
        seen = look_at_scenes(trained, language)
        print(f"{len(seen)} of {SCENES} scenes are described word for word in {name}")
        if len(seen) < 2:
            raise UsageError("at least two are needed: the check is for weights trained on the built-in set")
        print(f"{'':<42}" + "".join(f"{attribute:>9}" for attribute in ATTRIBUTES))
        for row, shares in measure(seen).items():
            print(f"{row:<42}" + "".join(f"{shares[attribute]:>9.1%}" for attribute in ATTRIBUTES))


if __name__ == "__main__":
    run_script(main)
