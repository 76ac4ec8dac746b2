"""Synthetic rows and models of the published size (random weights do not affect speed), and steps over them."""

import json
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import CLIPVisionConfig, CLIPVisionModel

from common.paths import BUILTIN_TOKENIZER_DIR
from dataset.lm_dataset import VLMCollator, VLMDataset
from dataset.sampler import BatchSampler
from dataset.tokenizer import load_tokenizer
from model.model_vlm import MiniMindVLM, VLMConfig
from trainer.loop import extreme_batches, load_batches
from trainer.setup import freeze, round_frozen_weights
from trainer.stage import answer_loss, pad_answers
from trainer.step import TrainContext, count, train_step
from trainer.support.capture import CapturedStep
from trainer.support.compilation import LENGTH_MULTIPLE, compile_or_not
from trainer.support.processes import Processes, pick_dtype
from trainer.train_pretrain_vlm import STAGE as PRETRAIN
from trainer.train_sft_vlm import STAGE as SFT

STAGES = {stage.name: stage for stage in (PRETRAIN, SFT)}
BATCH_SIZES = {"pretrain": 16, "sft": 4}
LAYERS = {512: 8, 768: 16}
TOWER = CLIPVisionConfig(patch_size=16)  # ViT-B/16
FOLDER = Path(tempfile.gettempdir()) / "minimind-v-benchmark"  # written once, for all measurements
BATCHES, IMAGES = 40, 64
RATE = 1e-4


def settings_of(args: Namespace, stage: str, batch_size: int | None = None) -> Namespace:
    """Returns the flags as a measurement of this stage takes them, with its batch size and length where none is set."""
    batch_size = batch_size or args.batch_size or BATCH_SIZES[stage]
    longest = args.max_seq_len or STAGES[stage].defaults["max_seq_len"]
    return Namespace(**vars(args) | {"stage": stage, "batch_size": batch_size, "max_seq_len": longest})


def load_data(args: Namespace) -> VLMDataset:
    """Returns BATCHES batches of synthetic rows, as training reads them."""
    rows = BATCHES * args.batch_size
    images, path = FOLDER / "images", FOLDER / f"{args.stage}-{rows}.jsonl"
    tokenizer = load_tokenizer(BUILTIN_TOKENIZER_DIR)
    if not path.is_file():
        images.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        for number in range(IMAGES):
            noise = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
            noise.resize((128, 128)).save(images / f"{number}.jpg", quality=90)
        words = [tokenizer.decode([index]) for index in range(300, tokenizer.vocab_size)]
        words = [word for word in words if word.isalpha() and "\u4e00" <= word[0]]
        lines = (json.dumps(synthetic_row(args.stage, f"{n % IMAGES}.jpg", words, rng)) for n in range(rows))
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return VLMDataset(path, images, tokenizer, args.max_seq_len, VLMConfig().image_tokens)


def synthetic_row(stage: str, image: str, words: list[str], rng: np.random.Generator) -> dict:
    """Returns a caption of 20 to 80 tokens, or a dialogue of 200 to 1500."""
    if stage == "pretrain":
        lengths = [6, rng.integers(20, 81)]
    else:
        turns = 2 * rng.integers(1, 5)
        # An image and the prompt's frame take about 220 of a dialogue's tokens.
        lengths = [max(10, (rng.integers(200, 1501) - 220) // turns)] * turns
    texts = ["".join(rng.choice(words, length)) for length in lengths]
    texts[0] = f"<image>\n{texts[0]}"
    turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
    return {"conversations": turns, "image": image}


def model_config(args: Namespace) -> VLMConfig:
    return VLMConfig(hidden_size=args.hidden_size, num_hidden_layers=LAYERS[args.hidden_size])


def load_model(args: Namespace) -> MiniMindVLM:
    """Returns a model with random weights, on the CPU, frozen as the stage does."""
    tower = FOLDER / "tower"
    if not (tower / "model.safetensors").is_file():
        CLIPVisionModel(TOWER).save_pretrained(tower)
    torch.manual_seed(0)  # after the tower's random numbers, so that every model has the same weights
    model = MiniMindVLM(model_config(args), tower)
    freeze(model, STAGES[args.stage].defaults["freeze_llm"])
    return model.train()


class Steps:
    """A model, its data and what a step needs, on one device.

    Args:
        args: The measurement's settings.
        how: Names what is done with a step: compiled, captured, both or nothing.
        dtype: Default: what training chooses on this device.
        grad_clip: 0: none.

    Raises:
        RuntimeError: If torch.compile does not work here, and it is to be compiled.
    """

    def __init__(self, args, how: str = "", dtype: torch.dtype | None = None, grad_clip: float = 1.0):
        self.device, self.workers = torch.device(args.device), args.num_workers
        self.data, self.model = load_data(args), load_model(args)
        self.sampler = BatchSampler(self.data.lengths, args.batch_size, epochs=100)
        self.processes = Processes(0, 1, self.device)
        dtype = dtype or pick_dtype(None, self.device, self.model.config.head_dim)
        round_frozen_weights(self.model, dtype)
        forward = self.model.to(self.device)
        self.collate = VLMCollator(0, LENGTH_MULTIPLE if "compiled" in how else 1)
        if "compiled" in how:
            extremes = extreme_batches(self.data, args.batch_size, self.collate, self.device)
            forward = compile_or_not(self.model, answer_loss, extremes, dtype, print)
            if forward is self.model:
                raise RuntimeError("torch.compile does not work here")
        self.context = TrainContext(self.model, answer_loss, self.processes, dtype, grad_clip, forward)
        self.step = partial(train_step, self.context)
        if "captured" in how:
            self.step = CapturedStep(train_step, self.context, partial(pad_answers, batch_size=args.batch_size))

    def batches(self, sampler=None) -> Iterator[dict]:
        """Yields batches on the device, as the training loop gets them."""
        return load_batches(self.data, sampler or self.sampler, self.collate, self.device, self.workers)

    def take(self, batch: dict) -> torch.Tensor:
        """Takes a step; returns (2,) its summed loss and learned tokens, without a sync."""
        return self.step([batch], count([batch], self.processes), RATE)[0]


def timed(device: torch.device, function: Callable, *args, **kwargs):
    """Returns the seconds of a call, the device's work included, and what it returned."""
    sync = torch.get_device_module(device).synchronize
    sync()
    started = time.perf_counter()
    result = function(*args, **kwargs)
    sync()
    return time.perf_counter() - started, result
