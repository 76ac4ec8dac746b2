"""Measures training steps of this project beside those of a plain loop, and the loader alone."""

import itertools
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import torch
import transformers
from PIL import Image
from torch.utils.data import DataLoader

from dataset.features import FeatureFolder, compute_features
from dataset.lm_dataset import VLMCollator, VLMDataset
from dataset.sampler import BatchSampler
from scripts.bench.synthetic import RATE, STAGES, TOWER, Steps, load_data, load_model, model_config, settings_of, timed

TRAINING_LINES = ("plain", "this project, first epoch", "this project, kept features")
LOADER_LINES = ("plain", "this project")
LOADED_BATCHES = 250
WARM_UP = {"cpu": 1, "mps": 1, "cuda": 30}  # steps


class PlainCollator(VLMCollator):
    """Runs each image through transformers' image processor at every read."""

    def __call__(self, samples: list[dict]) -> dict:
        processor = (getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor)()
        for sample in samples:
            [pixels] = sample["pixel_values"]
            image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            sample["pixel_values"] = processor(images=image, return_tensors="pt")["pixel_values"]
        return super().__call__(samples)


def plain_loop(args) -> tuple[Iterator[dict], Callable[[dict], None]]:
    """Returns the batches and the step of a loop as it is first written.

    Rows are padded to the longest allowed, logits computed at all positions; on a GPU in autocast.
    """
    device, model = torch.device(args.device), load_model(args)
    optimizer = torch.optim.AdamW([weight for weight in model.to(device).parameters() if weight.requires_grad], RATE)

    def take(batch: dict):
        inputs = {name: batch[name].to(device) for name in ("input_ids", "labels", "pixel_values", "image_starts")}
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return load(load_data(args).changed(leaves_small=True), args, PlainCollator(multiple=args.max_seq_len)), take


def load(data: VLMDataset, args, collate: VLMCollator) -> Iterator[dict]:
    """Yields batches in random order."""
    sampler = BatchSampler(np.ones(len(data)), args.batch_size, epochs=100)
    return iter(DataLoader(data, batch_sampler=sampler, collate_fn=collate, num_workers=args.num_workers))


def measure_training(stage: str, args, line: str) -> dict:
    """Measures one way to train.

    Returns:
        Samples/s; the shares of useful tokens and of a matrix product's FLOP/s; peak memory.
    """
    args = settings_of(args, stage)
    device, encoding, has_features = torch.device(args.device), 0.0, "kept features" in line
    product, warm_up = matrix_product_flops(device), WARM_UP[device.type]
    with tempfile.TemporaryDirectory() as folder:
        if line == "plain":
            batches, take = plain_loop(args)
        else:
            steps = Steps(args, "compiled, captured" if device.type == "cuda" else "")
            few = list(itertools.islice(steps.sampler, warm_up + args.steps))
            if has_features or device.type != "cuda":  # on CUDA a first epoch encodes in its steps
                encoding = encode_pictures(steps, few, Path(folder)) * (not has_features)
            batches, take = steps.batches(few), steps.take

        take_all(take, itertools.islice(batches, warm_up))
        seconds, total = timed(device, take_all, take, itertools.islice(batches, args.steps))
    seconds += encoding * total["samples"]
    product = max(product, matrix_product_flops(device))  # before and after: one may be disturbed on a shared machine
    return {
        "samples/s": total["samples"] / seconds,
        "useful": total["useful"] / total["computed"],
        "product": model_flops(args, total, has_features) / seconds / product,
        "GB": peak_bytes(device) / 1e9,
        "GFLOP/s": product / 1e9,
    }


def take_all(take: Callable, batches: Iterable[dict]) -> Counter:
    """Takes the steps without a sync between them; returns what was computed, as if a batch's rows were alike."""
    total = Counter()
    for batch in batches:
        samples, tokens = batch["input_ids"].shape[0], batch["tokens"]
        total.update(samples=samples, useful=tokens, learned=batch["units"], squares=tokens**2 // samples)
        total["computed"] += batch["input_ids"].numel()
        take(batch)
    return total


def encode_pictures(steps: Steps, few: list[np.ndarray], folder: Path) -> float:
    """Computes and keeps the features of these batches, as a run does before its first step off CUDA.

    Returns:
        Seconds a picture: the synthetic rows share few pictures, and are measured as if each had its own.
    """
    indices, model = steps.data.row_indices, steps.model
    rows = steps.data.changed(row_indices=np.unique(indices[np.concatenate(few)]))
    features = FeatureFolder(folder, "tower", (model.config.vision_patches, model.config.vision_hidden_size))
    seconds, _ = timed(steps.device, compute_features, rows, features, model.encode_images, steps.device)
    steps.data = steps.data.changed(features=features)
    return seconds / len(np.unique(rows.shown_pictures))


def peak_bytes(device: torch.device) -> int:
    """Returns the most memory that this process has used, on the device or off."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


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
    width, positions = TOWER.hidden_size, (TOWER.image_size // TOWER.patch_size) ** 2 + 1
    layer = 4 * width**2 + 2 * width * TOWER.intermediate_size + 2 * positions * width
    tower = 2 * positions * (TOWER.num_hidden_layers * layer + width * 3 * TOWER.patch_size**2)
    return forward * (1 + backward) + (0 if is_cached else tower * total["samples"])


def matrix_product_flops(device: torch.device) -> float:
    """Returns FLOP/s of a large square matrix product: float32 on the CPU, bfloat16 on CUDA; median of five."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = [timed(device, torch.matmul, a, b)[0] for _ in range(6)]
    return 2 * size**3 / median(seconds[1:])


def measure_loader(args, line: str) -> dict:
    """Returns images per second out of the loader alone, once all workers are at work."""
    args = settings_of(args, "pretrain")
    data, collate = load_data(args), VLMCollator()
    if line == "plain":
        collate = PlainCollator()
    if line == "plain" or args.device.startswith("cuda"):  # a GPU enlarges them
        data = data.changed(leaves_small=True)
    batches = load(data, args, collate)
    for _ in range(5 * args.num_workers):
        next(batches)
    started = time.perf_counter()
    images = sum(len(batch["input_ids"]) for batch in itertools.islice(batches, LOADED_BATCHES))
    return {"samples/s": images / (time.perf_counter() - started)}
