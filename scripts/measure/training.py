"""Measures training steps, technique by technique, and the loader alone."""

import contextlib
import itertools
import json
import resource
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from common.paths import BUILTIN_TOKENIZER_DIR
from dataset.chat import ChatEncoder
from dataset.conversation import parse_conversation
from dataset.features import FeatureFolder, compute_features
from dataset.lm_dataset import VLMCollator, VLMDataset
from dataset.sampler import BatchSampler
from dataset.tokenizer import load_tokenizer
from model.model_vlm import MiniMindVLM
from scripts.measure import made_up
from scripts.measure.made_up import STAGES, load_data, load_model, model_config, timed
from trainer.loop import load_batches
from trainer.setup import round_frozen_weights
from trainer.stage import answer_loss
from trainer.step import count, make_context, train_step
from trainer.support.compilation import LENGTH_MULTIPLE, compile_or_not
from trainer.support.processes import Processes, pick_dtype

BATCHES, LOADER_IMAGES, MOST_DOUBLINGS = 40, 4000, 13
WARM_UP = {"cpu": 1, "mps": 1, "cuda": 30}  # steps; on CUDA the loader fills its queues meanwhile
PLAIN_LINES = (
    "plain",
    "+ padded to the batch's longest",
    "+ batches of similar length",
    "+ logits at learned positions",
    "+ tower once, token cache, uint8",
)
NOT_COMPILED, FIRST_EPOCH, KEPT_FEATURES = (
    f"this project, {how}" for how in ("not compiled", "first epoch", "kept features")
)
TRAINING_LINES = (*PLAIN_LINES, NOT_COMPILED, FIRST_EPOCH, KEPT_FEATURES)
LOADER_LINES = ("loader, plain", "loader")


class PlainData(Dataset):
    """The rows of `data`, tokenised, padded and run through transformers' image processor each time they are read."""

    def __init__(self, data: VLMDataset, pads_to_max: bool):
        self.lines, self.images_path = data.data_path.read_text(encoding="utf-8").splitlines(), data.images_path
        self.max_length, self.pads_to_max = data.max_length, pads_to_max
        self.encoder = ChatEncoder(load_tokenizer(BUILTIN_TOKENIZER_DIR), data.image_tokens)
        self.processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)()

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = json.loads(self.lines[index])
        [chat] = self.encoder.encode([parse_conversation(row["conversations"])])
        input_ids = torch.tensor(chat.input_ids[: self.max_length])
        labels = torch.full_like(input_ids, -100)
        for start, end in chat.learned:
            labels[start:end] = input_ids[start:end]
        padding = (0, self.max_length - len(input_ids) if self.pads_to_max else 0)
        with Image.open(self.images_path / row["image"]) as image:
            pixels = self.processor(images=image, return_tensors="pt")["pixel_values"]
        return {
            "input_ids": F.pad(input_ids, padding),
            "labels": F.pad(labels, padding, value=-100),
            "image_starts": torch.tensor(chat.image_starts),
            "pixel_values": pixels,
        }


def plain_steps(args, device: torch.device, data: VLMDataset, model: MiniMindVLM, techniques: int):
    """Takes the steps of a plain training loop with this many techniques on; yields (batch, seconds waited, 0)."""
    pads_to_longest, sorts, picks_logits, uses_cache = (techniques > number for number in range(4))
    model.to(device)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4)
    sampler = BatchSampler(data.lengths if sorts else np.ones(len(data)), args.batch_size, epochs=100)
    data = data if uses_cache else PlainData(data, pads_to_max=not pads_to_longest)
    names = ["input_ids", "labels", "pixel_values", "image_starts"] + ["learned_positions"] * picks_logits
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=VLMCollator(), num_workers=args.num_workers)
    for batch, waited in with_waits(loader):
        # On a GPU "plain" includes autocast.
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(**{name: batch[name].to(device) for name in names}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield batch, waited, 0.0


def with_waits(batches):
    """Yields (batch, seconds waited for it)."""
    batches = iter(batches)
    while True:
        started = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - started


def our_steps(args, device: torch.device, data: VLMDataset, model: MiniMindVLM, name: str):
    """Takes the project's own `train_step`s on the same rows.

    Yields:
        (batch, seconds waited for it, seconds that its features took to encode before).
    """
    processes = Processes.start(args.device)
    dtype = pick_dtype(None, device, model.config.head_dim)
    round_frozen_weights(model, dtype)
    forward = model.to(device)
    is_cuda = device.type == "cuda"
    if is_cuda and name != NOT_COMPILED:
        forward = compile_or_not(model, data, args.batch_size, device, dtype, print)
    context = make_context(model, answer_loss, processes, dtype, 1.0, forward)
    sampler, encoding = BatchSampler(data.lengths, args.batch_size, epochs=100), 0.0
    with tempfile.TemporaryDirectory() as folder:
        # Off CUDA the first epoch's features are computed before its first step, image by image.
        if name == KEPT_FEATURES or (name == FIRST_EPOCH and not is_cuda):
            sampler = list(itertools.islice(sampler, WARM_UP[device.type] + args.steps)) * 100
            few = data.with_pixels()
            few.positions = np.unique(data.positions[np.concatenate(sampler)])
            shape = model.config.vision_patches, model.config.vision_hidden_size
            features = FeatureFolder(Path(folder), "tower", shape)
            seconds, _ = timed(device, compute_features, few, features, model.encode_images, device, args.num_workers)
            # The made-up rows share few pictures: count as if each row had its own.
            encoded = len(np.unique(few.shown_pictures))
            encoding = seconds / encoded * args.batch_size if name == FIRST_EPOCH else 0.0
            data.use_features(features)
        multiple = LENGTH_MULTIPLE if forward is not model else 1
        for batch, waited in with_waits(
            load_batches(data, sampler, VLMCollator(0, multiple), device, args.num_workers)
        ):
            train_step(context, [batch], count([batch], processes), 1e-4)
            yield batch, waited, encoding


def measure_training(args, name: str) -> dict:
    """Returns one line's speed, share of useful tokens, of a matrix product's FLOP/s and of waits, and peak memory."""
    device, data, model = torch.device(args.device), load_data(args, BATCHES * args.batch_size), load_model(args)
    if name in PLAIN_LINES:
        steps = plain_steps(args, device, data, model, PLAIN_LINES.index(name))
    else:
        steps = our_steps(args, device, data, model, name)
    product, total, seconds_besides = matrix_product_flops(device), Counter(), Counter()
    for _ in range(WARM_UP[device.type]):
        next(steps)

    def take() -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Takes the steps without a sync between them; returns each one's (input_ids, labels)."""
        taken = []
        for batch, waited, encoding in itertools.islice(steps, args.steps):
            seconds_besides.update(waited=waited, encoding=encoding)
            taken.append((batch["input_ids"], batch["labels"]))
        return taken

    seconds, taken = timed(device, take)
    seconds += seconds_besides["encoding"]
    for input_ids, labels in taken:
        lengths = (input_ids != 0).sum(dim=1)
        total.update(samples=len(lengths), useful=int(lengths.sum()), computed=input_ids.numel())
        total.update(learned=int((labels != -100).sum()), squares=int((lengths**2).sum()))
    product = max(product, matrix_product_flops(device))  # before and after: one may be disturbed on a shared machine
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    steps.close()
    return {
        "samples/s": total["samples"] / seconds,
        "useful": total["useful"] / total["computed"],
        "product": model_flops(args, total, name == KEPT_FEATURES) / seconds / product,
        "waits": seconds_besides["waited"] / seconds,
        "GB": peak / 1e9,
        "GFLOP/s": product / 1e9,
    }


def model_flops(args, total: dict, is_cached: bool) -> float:
    """Returns the floating-point operations these counts need, without padding and logits that are not learned.

    A matrix of N weights takes 2 N a token, causal attention 2 L^2 D forward. The backward pass takes as much again for
    the activations, and in SFT once more for the weights; a frozen tower has none.

    Args:
        total: samples, useful and learned tokens, and squares, the sum of the squared lengths.
        is_cached: The tower does not run.
    """
    config = model_config(args)
    width, layers = config.hidden_size, config.num_hidden_layers
    key_value = config.num_key_value_heads * config.head_dim
    before, after = width**2 + 2 * width * key_value, width**2 + 3 * width * config.intermediate_size  # attention
    forward = 2 * (layers * before + (layers - 1) * after) * total["useful"] + 2 * layers * width * total["squares"]
    # The last block's output is needed where something is learned.
    forward += 2 * (after + width * config.vocab_size) * total["learned"]
    backward = 2 if STAGES[args.stage].defaults["freeze_llm"] == "none" else 1
    width, positions = made_up.TOWER.hidden_size, (made_up.TOWER.image_size // made_up.TOWER.patch_size) ** 2 + 1
    layer = 4 * width**2 + 2 * width * made_up.TOWER.intermediate_size + 2 * positions * width
    tower = 2 * positions * (made_up.TOWER.num_hidden_layers * layer + width * 3 * made_up.TOWER.patch_size**2)
    return forward * (1 + backward) + (0 if is_cached else tower * total["samples"])


def matrix_product_flops(device: torch.device) -> float:
    """Returns FLOP/s of a large square matrix product: float32 on the CPU, bfloat16 on CUDA; median of five."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = [timed(device, torch.matmul, a, b)[0] for _ in range(6)]
    return 2 * size**3 / median(seconds[1:])


def measure_largest_batch(args, name: str) -> dict:
    """Returns how many samples a step takes at most, doubling until the device's memory is full, and its memory."""
    device, fits, peak = torch.device(args.device), 0, 0
    with contextlib.suppress(torch.OutOfMemoryError):
        for batch_size in (2**power for power in range(MOST_DOUBLINGS)):
            settings = Namespace(**vars(args) | {"batch_size": batch_size})
            steps = our_steps(settings, device, load_data(args, 2**MOST_DOUBLINGS), load_model(args), NOT_COMPILED)
            next(steps)
            steps.close()
            fits, peak = batch_size, torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    return {"samples": fits, "GB": peak / 1e9}


def measure_loader(args, name: str) -> dict:
    """Returns images per second out of the loader alone."""
    data = load_data(args, max(LOADER_IMAGES, BATCHES * args.batch_size))
    data = PlainData(data, pads_to_max=True) if name == "loader, plain" else data
    sampler = BatchSampler(np.ones(len(data)), args.batch_size)
    batches = iter(DataLoader(data, batch_sampler=sampler, collate_fn=VLMCollator(), num_workers=args.num_workers))
    for _ in range(2 * args.num_workers):  # what the workers had ready
        next(batches)
    started = time.perf_counter()
    images = sum(len(batch["input_ids"]) for batch in batches)
    return {"images/s": images / (time.perf_counter() - started)}
