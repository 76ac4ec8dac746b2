"""Build the small language model that stands in for MiniMind2 until that is downloaded, see README.md here.

    python scripts/builtin/build_llm.py     about 110 minutes on one core, into model/builtin

It is trained on text only: the conversations of the built-in data set, with the scene described in place of the image,
in a sentence or in a grid with a cell for each of the tower's patches: the mixed embeddings of the words for colour,
shape, size and place of the object that covers the patch, or of the word for empty. A linear projection can map patch
features to that, so this model learns to read images by a projection alone. No text has a held-out combination.
"""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import astuple
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import ArgumentParser
from common.files import write_together
from common.paths import BUILTIN_MODEL_DIR, BUILTIN_TOKENIZER_DIR
from dataset.chat import IMAGE_CHARACTER, ChatEncoder, load_tokenizer, tokenizer_hash
from dataset.scenes import language
from dataset.scenes.draw import PATCHES_PER_SIDE, Scene, heldout_scenes, patch_coverage, training_scene
from model.model_minimind import MiniMindForCausalLM
from model.model_vlm import VLMConfig
from model.weights import describe, weight_files, weight_name
from scripts.builtin import build_tower

CONFIG = VLMConfig(hidden_size=128, num_hidden_layers=4, vision_hidden_size=build_tower.CONFIG.hidden_size)
# As captions spell them in either language, so that a caption only takes copying. In the order of the tower's TARGETS.
_CHINESE = ("空", *language.COLOURS, *language.SHAPES, *(f"{s}的" for s in language.SIZES), *language.PLACES)
_ENGLISH = (" empty", *(f" {word.split('the ')[-1]}" for word in language.ENGLISH.words.values()))  # " top", no article
GRID_WORDS = tuple(zip(_CHINESE, _ENGLISH, strict=True))
STEPS, OUT = 5000, BUILTIN_MODEL_DIR
IN_A_SENTENCE = 0.35  # share of the steps
COARSE_UNTIL = 0.7  # of the training: until then most grids have every second row and column only, for speed
Example = tuple[list[dict], list[np.ndarray]]  # a conversation, and the weights of its grids


def grid_weights(scene: Scene, rng: np.random.Generator, stride: int) -> np.ndarray:
    """Draws how much of each word is in each cell of a scene's grid, (cells, len(GRID_WORDS)).

    Proportions, strength and share of missing cells vary, so that the model reads whatever projection is learned.
    `stride` is 1 for all 14 x 14 cells, 2 for a quarter of them, at an offset that misses no object.
    """
    coverage = patch_coverage(scene)
    if stride > 1:
        offsets = list(itertools.product(range(stride), repeat=2))
        rng.shuffle(offsets)
        parts = [coverage[:, row::stride, column::stride] for row, column in offsets]
        coverage = next((part for part in parts if part.max(axis=(1, 2)).min() > 0.3), parts[0])
    coverage = coverage.reshape(len(scene.objects), -1)
    weights = np.zeros((coverage.shape[1], len(GRID_WORDS)), dtype=np.float32)
    weights[:, 0] = rng.uniform(0, 1)
    strength, unevenness, missing = rng.uniform(0.4, 2.0), rng.uniform(0, 0.8), rng.choice([0, 0.2])
    for facts, covered in zip(scene.facts, coverage, strict=True):
        words = [build_tower.TARGETS.index(word) for word in astuple(facts)]
        present = (covered >= 0.15) & (rng.random(len(covered)) >= missing)
        present[covered.argmax()] = True
        cells = np.flatnonzero(present)
        parts = 1 - unevenness * rng.random((len(cells), len(words)), dtype=np.float32)
        weights[cells] = 0
        weights[cells[:, None], words] = strength * parts * np.minimum(1, 2 * covered[cells, None])
    return weights


def in_a_sentence(scene: Scene, rng: Random) -> Example:
    """Returns a conversation about a scene described as a sentence, or as a list of objects in random order."""
    is_dialogue, spoken = rng.random() < 0.7, rng.choice(language.LANGUAGES)
    if rng.random() < 0.3:
        shown = language.caption(scene.facts, spoken)
    else:
        lines = []
        for thing in rng.sample(list(scene.facts), len(scene.facts)):
            words = [spoken.say(f"{{{name}}}", thing) for name in vars(thing)]
            rng.shuffle(words)
            lines.append(", ".join(words))
        shown = "; ".join(lines) + "."
    return language.conversation([scene.facts], [shown], rng, spoken, is_dialogue), []


def embed(model: MiniMindForCausalLM, encoder: ChatEncoder, examples: list[Example]) -> tuple[Tensor, Tensor]:
    """Embeds tokens by their ids, and each cell as the weighted sum of the grid words' embeddings, with noise.

    A grid word's is the scaled sum of its tokens'. Returns embeddings (texts, longest, width), right-padded, and labels
    (texts, longest), -100 where nothing is learned.
    """
    chats = encoder.encode([conversation for conversation, _ in examples])
    input_ids = nn.utils.rnn.pad_sequence([torch.tensor(chat.input_ids) for chat in chats], batch_first=True)
    labels = torch.full_like(input_ids, -100)
    for row, chat in enumerate(chats):
        for start, end in chat.learned:
            labels[row, start:end] = input_ids[row, start:end]
    embedded = model.model.embed_tokens(input_ids)
    grids = [grid for _, grids in examples for grid in grids]
    if not grids:
        return embedded, labels
    words = [encoder.tokenizer(list(pair), add_special_tokens=False)["input_ids"] for pair in GRID_WORDS]
    ids = [torch.tensor(chinese + english) for chinese, english in words]
    word_vectors = torch.stack([model.model.embed_tokens(tokens).sum(0) * len(tokens) ** -0.5 for tokens in ids])
    vectors = torch.from_numpy(np.concatenate(grids)) @ word_vectors
    scale = word_vectors.detach().square().mean().sqrt()
    # Noise on each cell, and an offset common to all: no projection is clean.
    vectors = vectors + torch.randn_like(vectors) * scale * torch.rand(()) * 0.5
    vectors = vectors + torch.randn(vectors.shape[1]) * scale * torch.rand(()) * 0.5
    is_cell = input_ids == encoder.image_token_id
    return embedded.masked_scatter(is_cell[..., None], vectors.to(embedded.dtype)), labels


def training_losses(model: MiniMindForCausalLM, encoder: ChatEncoder) -> Iterator[Tensor]:
    """Yields the loss of each step, from training scenes, none twice.

    Four in five scenes with one object are left out: they are learned long before those with two.
    """
    rng, noise, batch_size = Random(build_tower.SEED), np.random.default_rng(build_tower.SEED), build_tower.BATCH_SIZE
    every_scene = map(training_scene, itertools.count())
    scenes = (scene for scene in every_scene if len(scene.objects) == 2 or rng.random() < 0.2)
    for step in range(STEPS):
        if rng.random() < IN_A_SENTENCE:
            examples = [in_a_sentence(next(scenes), rng) for _ in range(batch_size)]
        else:
            coarse = rng.random() > 0.1 + (step / STEPS > COARSE_UNTIL)
            stride, examples = 2 if coarse else 1, []
            for _ in range(batch_size if coarse else batch_size // 2):
                spoken = rng.choice(language.LANGUAGES)
                seen = [next(scenes) for _ in range(2 if rng.random() < 0.06 else 1)]
                grids, facts = [grid_weights(scene, noise, stride) for scene in seen], [scene.facts for scene in seen]
                shown = [IMAGE_CHARACTER * len(grid) for grid in grids]
                is_dialogue = len(seen) == 1 and rng.random() < 0.4
                examples.append((language.conversation(facts, shown, rng, spoken, is_dialogue), grids))
        embedded, labels = embed(model, encoder, examples)
        learned = (labels.flatten() != -100).nonzero()[:, 0]
        yield model(inputs_embeds=embedded, labels=labels, learned_positions=learned).loss


@torch.no_grad()
def save(model: MiniMindForCausalLM, encoder: ChatEncoder) -> dict:
    """Writes the weights, and returns the shares of tokens and captions that are right on held-out scenes as grids.

    A caption is right if each token is the most likely one after those before it, as in greedy generation.
    """
    scenes, shown, result = heldout_scenes(), IMAGE_CHARACTER * PATCHES_PER_SIDE**2, {}
    for name, spoken in (("Chinese", language.CHINESE), ("English", language.ENGLISH)):
        tokens, captions, noise = [], [], np.random.default_rng(0)
        for start in range(0, len(scenes), 50):
            examples = []
            for scene in scenes[start : start + 50]:
                talk = language.conversation([scene.facts], [shown], Random(start), spoken)
                examples.append((talk, [grid_weights(scene, noise, stride=1)]))
            embedded, labels = embed(model, encoder, examples)
            labels = labels[:, 1:]
            right = model(inputs_embeds=embedded).logits[:, :-1].argmax(dim=-1) == labels
            tokens.append(right[labels != -100].float())
            captions.append((right | (labels == -100)).all(dim=1).float())
        result[f"tokens, {name}"] = round(float(torch.cat(tokens).mean()), 4)
        result[f"captions, {name}"] = round(float(torch.cat(captions).mean()), 4)
    made_by = {"command": "python scripts/builtin/build_llm.py"}
    sidecar = describe(CONFIG, "llm", "built-in", tokenizer_hash(encoder.tokenizer), made_by)
    path = OUT / f"{weight_name('llm', CONFIG.hidden_size, CONFIG.use_moe)}.pth"
    write_together(weight_files(path, model, {}, sidecar | {"result": result}))
    return result


def main():
    ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(build_tower.SEED)
    encoder = ChatEncoder(load_tokenizer(BUILTIN_TOKENIZER_DIR), CONFIG.image_tokens)
    model = MiniMindForCausalLM(CONFIG)
    # Weights scaled by the width: the usual deviation of 0.02 is for wide models. At width 128 it makes attention start
    # too flat, and the words of a group (the colours, say), which are first learned to be equally likely, become too
    # alike to be told apart.
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            depth = 2 * CONFIG.num_hidden_layers if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
            nn.init.normal_(weight, std=(weight.shape[1] * depth) ** -0.5)

    print(f"decoder of {model.num_parameters():,} parameters, {STEPS} steps")
    embeddings, *others = model.parameters()
    # Embeddings move slowly, to stay distinct while the decoder learns to use them.
    slow = {"params": [embeddings], "factor": 0.1, "weight_decay": 0.0}
    groups = [slow, {"params": others, "factor": 1.0, "weight_decay": 0.05}]
    build_tower.train(groups, training_losses(model, encoder), STEPS, 2e-3, partial(save, model, encoder))


if __name__ == "__main__":
    main()
