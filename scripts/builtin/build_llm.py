"""Builds the small language model that stands in for MiniMind2 where nothing was downloaded, see README.md here.

    python scripts/builtin/build_llm.py                     # about 25 minutes on one core, into model/builtin
    python scripts/builtin/build_llm.py --steps 20 --out_dir /tmp/llm

It is trained on text only: the conversations of the built-in data set, with the scene described where the picture would
be. Some describe it in a sentence, the others in a grid of words, a cell for each of the tower's patches: the
words for colour, shape, size and place of the object that covers the patch, laid over each other (their embeddings
are mixed), or the word for empty. That is what a linear projection can make of patch features, so that a projection is
all that has to be learned for this model to read pictures. Held-out combinations are in none of the texts.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AutoTokenizer, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import ArgumentParser, HelpFormatter, file_path  # noqa: E402
from common.files import write_together  # noqa: E402
from common.paths import BUILTIN_MODEL_DIR, BUILTIN_TOKENIZER_DIR  # noqa: E402
from dataset.chat import IMAGE_CHARACTER, ChatEncoder  # noqa: E402
from dataset.lm_dataset import tokenizer_hash  # noqa: E402
from dataset.scenes import language  # noqa: E402
from dataset.scenes.draw import PATCHES_PER_SIDE, Scene, heldout_scenes, patch_coverage, training_scene  # noqa: E402
from dataset.scenes.language import Facts  # noqa: E402
from model.model_minimind import MiniMindForCausalLM  # noqa: E402
from model.model_vlm import VLMConfig  # noqa: E402
from scripts.builtin import build_tower  # noqa: E402
from trainer.weights import describe, weight_files, weight_name  # noqa: E402

CONFIG = VLMConfig(hidden_size=128, num_hidden_layers=4, vision_hidden_size=build_tower.CONFIG.hidden_size)
EMPTY_WORD = "空"
# As captions spell them, each a single token: copying from the grid is then all that a caption takes.
GRID_WORDS = (EMPTY_WORD, *language.COLOURS, *language.SHAPES, *(f"{s}的" for s in language.SIZES), *language.PLACES)
IN_A_SENTENCE = 0.35  # share of the steps
COARSE_UNTIL = 0.7  # of the training: most grids have every second row and column only, which is learned faster


def grid_weights(scene: Scene, rng: np.random.Generator, stride: int) -> np.ndarray:
    """Draws how much of each word is in each cell of a scene's grid.

    Proportions, strength and share of missing cells vary, so that the model reads whatever projection is learned.

    Args:
        scene: gives the layout.
        rng: draws the variation.
        stride: 1 for the full 14 x 14 cells, 2 for a quarter of them (with an offset that misses no object).

    Returns:
        Weights of shape (cells, len(GRID_WORDS)).
    """
    coverage = patch_coverage(scene)
    if stride > 1:
        offsets = [(row, column) for row in range(stride) for column in range(stride)]
        rng.shuffle(offsets)
        coverage = max(
            (coverage[:, row::stride, column::stride] for row, column in offsets),
            key=lambda part: part.max(axis=(1, 2)).min() > 0.3,
        )
    coverage = coverage.reshape(len(scene.objects), -1)
    weights = np.zeros((coverage.shape[1], len(GRID_WORDS)), dtype=np.float32)
    weights[:, 0] = rng.uniform(0, 1)
    strength, unevenness, missing = rng.uniform(0.4, 2.0), rng.uniform(0, 0.8), rng.choice([0, 0.2])
    for thing, covered in zip(scene.objects, coverage, strict=True):
        facts = thing.facts
        words = [GRID_WORDS.index(word) for word in (facts.colour, facts.shape, facts.size + "的", facts.place)]
        present = (covered >= 0.15) & (rng.random(len(covered)) >= missing)
        present[covered.argmax()] = True
        cells = np.flatnonzero(present)
        parts = 1 - unevenness * rng.random((len(cells), len(words)), dtype=np.float32)
        weights[cells] = 0
        weights[cells[:, None], words] = strength * parts * np.minimum(1, 2 * covered[cells, None])
    return weights


def grid_word_ids(encoder: ChatEncoder) -> Tensor:
    """Returns the token id of each grid word, (len(GRID_WORDS),).

    Raises:
        ValueError: If one is not a single token of this tokenizer.
    """
    ids = [encoder.backend.encode(word, add_special_tokens=False).ids for word in GRID_WORDS]
    split = [word for word, word_ids in zip(GRID_WORDS, ids, strict=True) if len(word_ids) != 1]
    if split:
        raise ValueError(f"these words must be single tokens, and are not in this tokenizer: {' '.join(split)}")
    return torch.tensor(ids)[:, 0]


def described_in_words(objects: Sequence[Facts], rng: Random) -> str:
    """Describes the scene in a sentence, or as a list in any order of objects and attributes."""
    if rng.random() < 0.3:
        return language.caption(objects)
    lines = []
    for thing in rng.sample(list(objects), len(objects)):
        words = [f"{thing.size}的", thing.colour, thing.shape, thing.place]
        rng.shuffle(words)
        lines.append("，".join(words))
    return "；".join(lines) + "。"


class Batch(NamedTuple):
    """Texts of a step.

    Attributes:
        input_ids, labels: of shape (texts, longest), padded at the right; labels are -100 where nothing is learned.
        is_cell: of the same shape, where the cells of grids stand.
        weights: of all cells in reading order, (cells, len(GRID_WORDS)).
    """

    input_ids: Tensor
    labels: Tensor
    is_cell: Tensor
    weights: Tensor


class Batches:
    """Draws batches of texts from training scenes, none twice."""

    def __init__(self, encoder: ChatEncoder, seed: int, batch_size: int):
        self.encoder = encoder
        self.batch_size = batch_size
        self.rng = Random(seed)
        self.noise = np.random.default_rng(seed)
        self.next_scene = 0

    def scene(self) -> Scene:
        self.next_scene += 1
        return training_scene(self.next_scene - 1)

    def draw(self, progress: float) -> Batch:
        """Returns a batch for a training run that is `progress` (0 to 1) done."""
        if self.rng.random() < IN_A_SENTENCE:
            return self.collate([self.in_a_sentence() for _ in range(self.batch_size)])
        coarse = self.rng.random() > 0.1 + (progress > COARSE_UNTIL)
        count = self.batch_size if coarse else self.batch_size // 2
        return self.collate([self.in_a_grid(stride=2 if coarse else 1) for _ in range(count)])

    def in_a_sentence(self) -> tuple[list[dict], list[np.ndarray]]:
        objects = self.scene().facts
        talk = language.dialogue if self.rng.random() < 0.7 else language.description
        return talk(objects, self.rng, shown=described_in_words(objects, self.rng)), []

    def in_a_grid(self, stride: int) -> tuple[list[dict], list[np.ndarray]]:
        scenes = [self.scene() for _ in range(2 if self.rng.random() < 0.06 else 1)]
        grids = [grid_weights(scene, self.noise, stride) for scene in scenes]
        shown = [IMAGE_CHARACTER * len(grid) for grid in grids]
        if len(scenes) == 2:
            return language.description_of_two([scene.facts for scene in scenes], self.rng, shown), grids
        talk = language.dialogue if self.rng.random() < 0.4 else language.description
        return talk(scenes[0].facts, self.rng, shown[0]), grids

    def collate(self, texts: list[tuple[list[dict], list[np.ndarray]]]) -> Batch:
        """Joins conversations, each with the weights of its grids."""
        chats = self.encoder.encode([conversation for conversation, _ in texts])
        grids = [grid for _, text_grids in texts for grid in text_grids]
        input_ids = torch.zeros(len(chats), max(len(chat.input_ids) for chat in chats), dtype=torch.long)
        labels = torch.full_like(input_ids, -100)
        for row, chat in enumerate(chats):
            input_ids[row, : len(chat.input_ids)] = torch.tensor(chat.input_ids)
            for start, end in chat.learned:
                labels[row, start:end] = input_ids[row, start:end]
        weights = np.concatenate(grids) if grids else np.zeros((0, len(GRID_WORDS)), dtype=np.float32)
        is_cell = input_ids == self.encoder.image_token_id
        return Batch(input_ids, labels, is_cell, torch.from_numpy(weights))


def embed(model: MiniMindForCausalLM, batch: Batch, words: Tensor) -> Tensor:
    """Embeds the texts: tokens by their ids, each cell by the weighted sum of the grid words' embeddings, and noise."""
    embedded = model.embed(batch.input_ids)
    if not len(batch.weights):
        return embedded
    word_vectors = model.embed(words)
    vectors = batch.weights @ word_vectors
    scale = word_vectors.detach().square().mean().sqrt()
    # A different haze over each text, and noise over each cell: no projection is clean.
    vectors = vectors + torch.randn_like(vectors) * scale * torch.rand(()) * 0.5
    vectors = vectors + torch.randn(vectors.shape[1]) * scale * torch.rand(()) * 0.5
    return embedded.masked_scatter(batch.is_cell[..., None], vectors.to(embedded.dtype))


def initialise(model: MiniMindForCausalLM) -> None:
    """Draws the weights anew, in proportion to the width.

    The usual deviation of 0.02 is for wide models. At width 128 attention starts too flat with it, and the words of a
    group (the colours, say), first of all learned to be likely together, become so alike that none can be told apart.
    """
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            depth = 2 * CONFIG.num_hidden_layers if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
            nn.init.normal_(weight, std=(weight.shape[1] * depth) ** -0.5)


def make_optimizer(model: MiniMindForCausalLM, learning_rate: float) -> torch.optim.Optimizer:
    # Embeddings move slowly, to stay apart from each other while the decoder learns to use them.
    embeddings = [model.model.embed_tokens.weight]
    others = [weight for name, weight in model.model.named_parameters() if name != "embed_tokens.weight"]
    return torch.optim.AdamW(
        [
            {"params": others, "factor": 1.0, "weight_decay": 0.05},
            {"params": embeddings, "factor": 0.1, "weight_decay": 0.0},
        ],
        lr=learning_rate,
        betas=(0.9, 0.98),
    )


class Float32Attention(TorchFunctionMode):
    """Computes attention in float32 under autocast.

    On a CPU its backward pass takes three times as long in bfloat16 (with heads of 16 dimensions; 307 against 95 ms a
    layer for 32 texts of 170 tokens), which is more than the matrix products gain: with this a step takes half as long.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return func(*(states.float() for states in args), **kwargs).to(args[0].dtype)


def training_loss(model: MiniMindForCausalLM, batch: Batch, words: Tensor) -> Tensor:
    learned = (batch.labels.flatten() != -100).nonzero()[:, 0]
    with torch.autocast("cpu", dtype=torch.bfloat16), Float32Attention():
        return model(inputs_embeds=embed(model, batch, words), labels=batch.labels, learned_positions=learned).loss


@torch.no_grad()
def measure(model: MiniMindForCausalLM, encoder: ChatEncoder, words: Tensor) -> dict:
    """Measures the shares of learned tokens and of whole answers right, on held-out scenes described from their grids.

    An answer is right where each of its tokens is the most likely one after those before it, that is, where greedy
    generation gives exactly the caption.
    """
    texts, noise = Batches(encoder, 0, 1), np.random.default_rng(0)
    tokens, whole = [], []
    scenes = heldout_scenes()
    for at in range(0, len(scenes), 50):
        rows = [
            (
                language.description(scene.facts, Random(at), IMAGE_CHARACTER * PATCHES_PER_SIDE**2),
                [grid_weights(scene, noise, stride=1)],
            )
            for scene in scenes[at : at + 50]
        ]
        batch = texts.collate(rows)
        right = model(inputs_embeds=embed(model, batch, words)).logits[:, :-1].argmax(dim=-1) == batch.labels[:, 1:]
        learned = batch.labels[:, 1:] != -100
        tokens.append(right[learned].float())
        whole.append((right | ~learned).all(dim=1).float())
    return {"tokens": round(float(torch.cat(tokens).mean()), 4), "captions": round(float(torch.cat(whole).mean()), 4)}


def save(model: MiniMindForCausalLM, tokenizer: PreTrainedTokenizerBase, args, result: dict) -> None:
    """Writes the weights and their sidecar, which also says what this command gave."""
    command = "python " + " ".join(["scripts/builtin/build_llm.py", *sys.argv[1:]])
    sidecar = describe(CONFIG, "llm", "built-in", tokenizer_hash(tokenizer), {"command": command})
    path = args.out_dir / f"{weight_name('llm', CONFIG.hidden_size, CONFIG.use_moe)}.pth"
    write_together(weight_files(path, model, {}, sidecar | {"result": result}))


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--out_dir", type=file_path, default=BUILTIN_MODEL_DIR, help="where it is written")
    parser.add_argument("--tokenizer_path", type=file_path, default=BUILTIN_TOKENIZER_DIR, help="the tokenizer")
    parser.add_argument("--steps", type=int, default=2500, help="optimizer steps")
    parser.add_argument("--batch_size", type=int, default=32, help="texts a step (half as many with full grids)")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="the peak")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and the texts")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--log_interval", type=int, default=50, help="steps between printed lines")
    parser.add_argument("--save_interval", type=int, default=250, help="steps between measured and saved states")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_path)
    encoder = ChatEncoder(tokenizer, CONFIG.image_tokens)
    words = grid_word_ids(encoder)
    model = MiniMindForCausalLM(CONFIG)
    initialise(model)
    optimizer = make_optimizer(model, args.learning_rate)
    batches, started, recent = Batches(encoder, args.seed, args.batch_size), time.time(), {}
    print(f"decoder of {sum(p.numel() for p in model.parameters()):,} parameters, {args.steps} steps")
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = group["factor"] * build_tower.learning_rate(step, args.steps, args.learning_rate)
        batch = batches.draw(step / args.steps)
        loss = training_loss(model, batch, words)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent.setdefault("in a grid" if len(batch.weights) else "in words", []).append(loss.item())
        if (step + 1) % args.log_interval == 0:
            losses = ", ".join(f"{kind} {np.mean(values):.4f}" for kind, values in sorted(recent.items()))
            print(f"step {step + 1} loss {losses} {time.time() - started:.0f} s", flush=True)
            recent.clear()
        if (step + 1) % args.save_interval == 0 or step + 1 == args.steps:
            result = measure(model, encoder, words)
            save(model, tokenizer, args, result)
            print(f"held-out scenes: {json.dumps(result)}", flush=True)


if __name__ == "__main__":
    main()
