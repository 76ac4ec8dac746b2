"""Measures training, the loader and generation beside plain ones, over synthetic rows and models of the real size."""

import itertools
import json
import resource
import sys
import tempfile
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
import transformers
from PIL import Image
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from common.paths import BUILTIN_TOKENIZER_DIR
from dataset.chat import load_tokenizer
from dataset.features import FeatureFolder, compute_features
from dataset.lm_dataset import VLMCollator, VLMDataset
from dataset.sampler import BatchSampler
from model.answers import generate
from model.model_vlm import MiniMindVLM, VLMConfig
from trainer.answering.assistant import in_precision
from trainer.loop import extreme_batches, load_batches
from trainer.setup import freeze, round_frozen_weights
from trainer.stage import answer_loss, pad_answers
from trainer.step import TrainContext, count, train_step
from trainer.support.fast_steps import LENGTH_MULTIPLE, CapturedStep, compile_or_not
from trainer.support.processes import Processes, pick_dtype
from trainer.train_pretrain_vlm import STAGE as PRETRAIN
from trainer.train_sft_vlm import STAGE as SFT

TRAINING_LINES = ("plain", "this project, first epoch", "this project, kept features")
LOADER_LINES = ("plain", "this project")
GENERATE_LINES = tuple(line + how for line in ("batch 1", "batch 1, int8", "batch 16") for how in ("", ", compiled"))
STAGES = {stage.name: stage for stage in (PRETRAIN, SFT)}
BATCH_SIZES = {"pretrain": 16, "sft": 4}
LAYERS = {512: 8, 768: 16}
TOWER = CLIPVisionConfig(patch_size=16)  # ViT-B/16
FOLDER = Path(tempfile.gettempdir()) / "minimind-v-benchmark"  # written once, for all measurements
BATCHES, IMAGES, LOADED_BATCHES = 40, 64, 250
PROMPT_TOKENS, NEW_TOKENS, TURNS = 230, 64, 5
WARM_UP = {"cpu": 1, "mps": 1, "cuda": 30}  # steps
RATE = 1e-4
WAYS = ("ordinary", "compiled, captured")
# Batches that fill the GPU; and those of a run without --batch_size, which the host's launches bound.
GPU_LINES = {
    f"{stage} of {size}, {way}": (stage, size, way)
    for stage, size, ways in (("sft", 64, WAYS), ("pretrain", 256, ("plain", *WAYS)), ("pretrain", 16, WAYS))
    for way in ways
}
LARGE = 64  # from this batch size on, kernels are counted, and the fastest way is fed by the loader too
ON_DEVICE, TIMED, FED = 12, 48, 100  # batches that lie on the GPU, and steps
PEAK = 790e12  # FLOP/s of an H100's bfloat16 matrix products, as measured
# Kinds of kernels by parts of their names, the first that fits.
KERNELS = {
    "attention": ("flash", "fmha"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "sm90_"),
    "fused": ("triton",),
    "copies": ("memcpy", "memset"),
    "pointwise": ("",),
}


def settings_of(args: Namespace, stage: str, batch_size: int | None = None) -> Namespace:
    """Returns the flags as a measurement of this stage takes them, with its batch size and length where none is set."""
    batch_size = batch_size or args.batch_size or BATCH_SIZES[stage]
    longest = args.max_seq_len or STAGES[stage].defaults["max_seq_len"]
    return Namespace(**vars(args) | {"stage": stage, "batch_size": batch_size, "max_seq_len": longest})


def load_data(args: Namespace) -> VLMDataset:
    """Returns synthetic rows as training reads them: captions of 20 to 80 tokens, or dialogues of 200 to 1500."""
    rows = BATCHES * args.batch_size
    images, path = FOLDER / "images", FOLDER / f"{args.stage}-{rows}.jsonl"
    tokenizer, lines = load_tokenizer(BUILTIN_TOKENIZER_DIR), []
    if not path.is_file():
        images.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        for number in range(IMAGES):
            noise = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
            noise.resize((128, 128)).save(images / f"{number}.jpg", quality=90)
        words = map(tokenizer.decode, range(300, tokenizer.vocab_size))
        words = [word for word in words if word.isalpha() and "\u4e00" <= word[0]]
        for number in range(rows):
            if args.stage == "pretrain":
                lengths = [6, rng.integers(20, 81)]
            else:
                turns = 2 * rng.integers(1, 5)
                # An image and the prompt's frame take about 220 of a dialogue's tokens.
                lengths = [max(10, (rng.integers(200, 1501) - 220) // turns)] * turns
            texts = ["".join(rng.choice(words, length)) for length in lengths]
            texts[0] = f"<image>\n{texts[0]}"
            turns = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
            lines.append(json.dumps({"conversations": turns, "image": f"{number % IMAGES}.jpg"}) + "\n")
        path.write_text("".join(lines), encoding="utf-8")
    return VLMDataset(path, images, tokenizer, args.max_seq_len, VLMConfig().image_tokens)


def load_model(args: Namespace) -> MiniMindVLM:
    """Returns a model with random weights, on the CPU, frozen as the stage does."""
    tower = FOLDER / "tower"
    if not (tower / "model.safetensors").is_file():
        CLIPVisionModel(TOWER).save_pretrained(tower)
    torch.manual_seed(0)  # after the tower's random numbers, so that every model has the same weights
    model = MiniMindVLM(VLMConfig(hidden_size=args.hidden_size, num_hidden_layers=LAYERS[args.hidden_size]), tower)
    freeze(model, STAGES[args.stage].defaults["freeze_llm"])
    return model.train()


class Steps:
    """A model, its data and what a step needs, on one device; `how` is what is done with it: compiled, captured."""

    def __init__(self, args: Namespace, how: str = "", dtype: torch.dtype | None = None, grad_clip: float = 1.0):
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

    def batches(self, sampler: Iterable | None = None) -> Iterator[dict]:
        return load_batches(self.data, sampler or self.sampler, self.collate, self.device, self.workers)

    def take(self, batch: dict) -> torch.Tensor:
        """Takes a step; returns (2,) its summed loss and learned tokens, without a sync."""
        return self.step([batch], count([batch], self.processes), RATE)[0]


class PlainCollator(VLMCollator):
    """Runs each image through transformers' image processor at every read."""

    def __call__(self, samples: list[dict]) -> dict:
        processor = (getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor)()
        for sample in samples:
            [pixels] = sample["pixel_values"]
            image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            sample["pixel_values"] = processor(images=image, return_tensors="pt")["pixel_values"]
        return super().__call__(samples)


def plain_loop(args: Namespace) -> tuple[Iterator[dict], Callable[[dict], None]]:
    """Returns batches and step of a loop as it is first written: padded to the longest allowed, logits everywhere."""
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

    data, collate = load_data(args).changed(leaves_small=True), PlainCollator(multiple=args.max_seq_len)
    sampler = BatchSampler(np.ones(len(data)), args.batch_size, epochs=100)  # random order
    return iter(DataLoader(data, batch_sampler=sampler, collate_fn=collate, num_workers=args.num_workers)), take


def take_all(take: Callable, batches: Iterable[dict]) -> Counter:
    """Takes the steps without a sync between them; returns what was computed, as if a batch's rows were alike."""
    total = Counter()
    for batch in batches:
        samples, tokens = batch["input_ids"].shape[0], batch["tokens"]
        total.update(samples=samples, useful=tokens, learned=batch["units"], squares=tokens**2 // samples)
        total["computed"] += batch["input_ids"].numel()
        take(batch)
    return total


def timed(device: torch.device, function: Callable, *args):
    """Returns the seconds of a call, the device's work included, and what it returned."""
    sync = torch.get_device_module(device).synchronize
    sync()
    started = time.perf_counter()
    result = function(*args)
    sync()
    return time.perf_counter() - started, result


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def matrix_product_flops(device: torch.device) -> float:
    """Returns FLOP/s of a large square matrix product: float32 on the CPU, bfloat16 on CUDA; median of five."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = [timed(device, torch.matmul, a, b)[0] for _ in range(6)]
    return 2 * size**3 / median(seconds[1:])


def model_flops(args: Namespace, total: dict, is_cached: bool) -> float:
    """Returns the floating-point operations these counts need, without padding and logits that are not learned.

    A matrix of N weights takes 2 N a token, causal attention 2 L^2 D forward. The backward pass takes as much again for
    the activations, and in SFT once more for the weights; a frozen tower has none.
    """
    config, layers = VLMConfig(hidden_size=args.hidden_size), LAYERS[args.hidden_size]
    width, key_value = config.hidden_size, config.num_key_value_heads * config.head_dim
    before, after = width**2 + 2 * width * key_value, width**2 + 3 * width * config.intermediate_size  # attention
    forward = 2 * (layers * before + (layers - 1) * after) * total["useful"] + 2 * layers * width * total["squares"]
    # The last block's output is needed where something is learned.
    forward += 2 * (after + width * config.vocab_size) * total["learned"]
    backward = 2 if STAGES[args.stage].defaults["freeze_llm"] == "none" else 1
    width, positions = TOWER.hidden_size, (TOWER.image_size // TOWER.patch_size) ** 2 + 1
    layer = 4 * width**2 + 2 * width * TOWER.intermediate_size + 2 * positions * width
    tower = 2 * positions * (TOWER.num_hidden_layers * layer + width * 3 * TOWER.patch_size**2)
    return forward * (1 + backward) + (0 if is_cached else tower * total["samples"])


def measure_training(stage: str, args: Namespace, line: str) -> dict:
    """Returns samples/s, the shares of useful tokens and of a matrix product's FLOP/s, and peak memory."""
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
                rows = steps.data.changed(row_indices=np.unique(steps.data.row_indices[np.concatenate(few)]))
                shape = steps.model.config.vision_patches, steps.model.config.vision_hidden_size
                features = FeatureFolder(Path(folder), "tower", shape)
                seconds, _ = timed(device, compute_features, rows, features, steps.model.encode_images, device)
                steps.data = steps.data.changed(features=features)
                if not has_features:  # the rows share few pictures, and are measured as if each had its own
                    encoding = seconds / len(np.unique(rows.shown_pictures))
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


def measure_gpu(args: Namespace, line: str) -> dict:
    """Measures steps over batches that lie on the device; prints at once, so that a run that is cut off leaves it."""
    stage, batch_size, way = GPU_LINES[line]
    args, device, seconds = settings_of(args, stage, batch_size), torch.device(args.device), 0.0
    if way == "plain":
        args.num_workers = 2  # more are no help here: each keeps two batches of 154 MB ready
        fed, take = plain_loop(args)
    else:
        seconds, steps = timed(device, Steps, args, way)
        fed, take = steps.batches(), steps.take

    def measure_steps(name: str, batches: Iterable[dict]) -> dict:
        seconds, total = timed(device, take_all, take, batches)
        flops = model_flops(args, total, False) / seconds
        figures = {"samples/s": total["samples"] / seconds, "TFLOP/s": flops / 1e12, "of peak": flops / PEAK}
        print(f"{name}: " + ", ".join(f"{figure} {value:,.2f}" for figure, value in figures.items()), flush=True)
        return figures

    on_device = list(itertools.islice(fed, ON_DEVICE))
    take_all(take, on_device * 2)  # a shape is captured at its second batch
    figures = measure_steps(line, itertools.islice(itertools.cycle(on_device), TIMED))
    figures |= {"GB": peak_bytes(device) / 1e9, "set up in s": seconds}
    if batch_size >= LARGE and device.type == "cuda" and way != "plain":
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            take_all(take, on_device)
            torch.cuda.synchronize()
        spent, numbers = Counter(), Counter()
        for event in profiled.key_averages():
            kind = next(kind for kind, parts in KERNELS.items() if any(part in event.key.lower() for part in parts))
            spent[kind] += event.self_device_time_total / 1e3 / len(on_device)
            numbers[kind] += event.count / len(on_device)
        kernels = ", ".join(f"{kind} {ms:.1f} ms ({numbers[kind]:.0f})" for kind, ms in spent.most_common())
        print(f"{line}, kernels a step: {kernels}", flush=True)
    if batch_size >= LARGE and way == WAYS[-1]:
        take_all(take, itertools.islice(fed, 5 * args.num_workers))  # what the loader had ready
        measure_steps(f"{line}, fed by the loader", itertools.islice(fed, FED))
    return figures | {"ceiling": matrix_product_flops(device) / 1e12}


def measure_loader(args: Namespace, line: str) -> dict:
    """Returns images per second out of the loader alone, once all workers are at work."""
    args = settings_of(args, "pretrain")
    is_plain = line == "plain"
    data = load_data(args).changed(leaves_small=is_plain or args.device.startswith("cuda"))  # a GPU enlarges them
    collate = PlainCollator() if is_plain else VLMCollator()
    sampler = BatchSampler(np.ones(len(data)), args.batch_size, epochs=100)
    batches = iter(DataLoader(data, batch_sampler=sampler, collate_fn=collate, num_workers=args.num_workers))
    for _ in range(5 * args.num_workers):
        next(batches)
    started = time.perf_counter()
    images = sum(len(batch["input_ids"]) for batch in itertools.islice(batches, LOADED_BATCHES))
    return {"samples/s": images / (time.perf_counter() - started)}


@torch.inference_mode()
def measure_generate(args: Namespace, line: str) -> dict:
    """Returns new tokens per second, greedy as in eval_vlm.py, and their ratio to those of transformers' Llama."""
    device, batch = torch.device(args.device), int(line.split(",")[0].split()[1])
    config = VLMConfig(hidden_size=args.hidden_size, num_hidden_layers=LAYERS[args.hidden_size])
    torch.manual_seed(0)
    ours, llama = MiniMindVLM(config).to(device), LlamaForCausalLM(LlamaConfig.from_dict(config.to_dict())).to(device)
    ours, llama = in_precision(ours, "int8" if "int8" in line else "float32").eval(), llama.eval()
    prompt = torch.randint(300, config.vocab_size, (batch, PROMPT_TOKENS), device=device)
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    fixed = {"do_sample": False, "pad_token_id": 0, "min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    decode = partial(generate, ours, inputs, compiles="compiled" in line, **fixed)
    calls = decode, partial(llama.generate, **inputs, **fixed)
    # In turns, so that both run under the same load.
    turns = [[timed(device, call)[0] for call in calls] for _ in range(1 + TURNS)]
    ours, llama = np.array(turns[1:]).T  # seconds
    return {"tokens/s": median(NEW_TOKENS * batch / ours), "x Llama": median(llama / ours)}
