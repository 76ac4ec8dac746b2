"""The benchmark's measurements, one a process: a plain training step, each technique on top of it, loader and generation."""

import json
import resource
import shutil
import statistics
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from dataset.chat import ChatEncoder, parse_conversation
from dataset.lm_dataset import VLMCollator, VLMDataset
from dataset.sampler import BatchSampler
from model.model_vlm import MiniMindVLM, VLMConfig
from scripts.benchmark_world import LAYERS, World
from trainer.flags import parse_arguments
from trainer.loop import Trainer
from trainer.setup import Run, freeze
from trainer.train_pretrain_vlm import STAGE as PRETRAIN
from trainer.train_sft_vlm import STAGE as SFT

WARM_UP = {False: 1, True: 5}  # steps, off CUDA and on it
LOADER_PICTURES = 4000
GENERATE_TURNS = 9
PROMPT_TOKENS = 230
ROWS_A_BATCH = 40  # so many batches' rows there are: enough for neighbours to be of similar length


@dataclass(frozen=True)
class Technique:
    """What is switched on: each line of the table has what the one before it has, and one thing more."""

    pad_to_longest: bool = False
    similar_lengths: bool = False
    learned_logits: bool = False
    tower_at_once: bool = False
    trainer: bool = False
    compiled: bool = False
    cached_features: bool = False
    cuda_only: bool = False


TECHNIQUES = {
    "plain": Technique(),
    "+ padded to the batch's longest": Technique(True),
    "+ batches of similar length": Technique(True, True),
    "+ logits at learned positions": Technique(True, True, True),
    "+ tower once, token cache, uint8": Technique(True, True, True, True),
    "this project, not compiled": Technique(True, True, True, True, True, cuda_only=True),
    "this project, first epoch": Technique(True, True, True, True, True, True),
    "this project, cached features": Technique(True, True, True, True, True, True, True),
}


class PlainData(Dataset):
    """Rows in memory, tokenised, padded and run through transformers' image processor each time they are asked for."""

    def __init__(self, world: World, pad_to: int | None):
        self.rows = world.data_path.read_text(encoding="utf-8").splitlines()
        self.world, self.pad_to = world, pad_to
        self.encoder = ChatEncoder(world.tokenizer)
        name = "CLIPImageProcessorPil" if hasattr(transformers, "CLIPImageProcessorPil") else "CLIPImageProcessor"
        self.processor = getattr(transformers, name)()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = json.loads(self.rows[index])
        [chat] = self.encoder.encode([parse_conversation(row["conversations"])])
        length = self.pad_to or len(chat.input_ids)
        input_ids, labels = torch.zeros(length, dtype=torch.int64), torch.full((length,), -100)
        kept = min(length, len(chat.input_ids))
        input_ids[:kept] = torch.tensor(chat.input_ids[:kept])
        for start, end in chat.learned:
            labels[start : min(end, kept)] = input_ids[start : min(end, kept)]
        with Image.open(self.world.images_path / row["image"]) as image:
            pixels = self.processor(images=image, return_tensors="pt")["pixel_values"]
        return {"input_ids": input_ids, "labels": labels, "pixel_values": pixels, "starts": chat.image_starts}


def collate_plain(samples: list[dict]) -> dict:
    """Pads to the longest sample (all are max_seq_len long in the plain case); pixel_values (B, images, 3, 224, 224)."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    return {
        "input_ids": torch.stack([F.pad(s["input_ids"], (0, longest - len(s["input_ids"]))) for s in samples]),
        "labels": torch.stack([F.pad(s["labels"], (0, longest - len(s["labels"])), value=-100) for s in samples]),
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "starts": [sample["starts"] for sample in samples],
    }


class PlainTraining:
    """A training step as it is first written, and with single techniques on."""

    def __init__(self, args, world: World, technique: Technique):
        self.technique, self.device = technique, torch.device(args.device)
        config = VLMConfig(hidden_size=args.hidden_size, num_hidden_layers=LAYERS[args.hidden_size])
        self.model = MiniMindVLM(config, vision_model_path=world.tower_path)
        weights = torch.load(world.weights_path, weights_only=True)
        self.model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
        freeze(self.model, 1 if args.stage == "pretrain" else 0)
        self.model.to(self.device).train()
        learned = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(learned, lr=1e-4)
        rows = VLMDataset(world.data_path, world.images_path, world.tokenizer, args.max_seq_len)
        if technique.tower_at_once:
            data, collate = rows, VLMCollator()
        else:
            data, collate = PlainData(world, None if technique.pad_to_longest else args.max_seq_len), collate_plain
        lengths = rows.lengths if technique.similar_lengths else np.ones(len(rows))
        sampler = BatchSampler(lengths, args.batch_size)
        self.batches = iter(DataLoader(data, batch_sampler=sampler, collate_fn=collate, num_workers=args.num_workers))

    def step(self) -> dict:
        """One optimizer step; returns its counts and the seconds it waited for data."""
        started = time.perf_counter()
        batch = next(self.batches)
        data_seconds = time.perf_counter() - started
        # On a GPU in autocast, which is what "plain" means there.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss = self._loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return counts(batch) | {"data_seconds": data_seconds}

    def _loss(self, batch: dict) -> torch.Tensor:
        model, technique = self.model, self.technique
        input_ids, labels = batch["input_ids"].to(self.device), batch["labels"].to(self.device)
        embeds = model.embed(input_ids)
        pixels = batch["pixel_values"].to(self.device)
        if technique.tower_at_once:
            embeds = model.splice_images(embeds, model.encode_images(pixels), batch["image_starts"].to(self.device))
        else:
            for position in range(pixels.shape[1]):
                projected = model.vision_proj(model.encode_images(pixels[:, position]))
                embeds = splice_one_by_one(embeds, projected, [starts[position] for starts in batch["starts"]])
        if technique.learned_logits:
            learned = (labels.flatten() != -100).nonzero()[:, 0]
            return model(inputs_embeds=embeds, labels=labels, learned_positions=learned).loss
        return model(inputs_embeds=embeds, labels=labels).loss


def splice_one_by_one(embeds: torch.Tensor, projected: torch.Tensor, starts: list[int]) -> torch.Tensor:
    """Puts sample i's (196, D) over the placeholders from starts[i] on, a sample at a time."""
    return torch.stack(
        [
            torch.cat((row[:start], image.to(row.dtype), row[start + len(image) :]))
            for row, image, start in zip(embeds, projected, starts, strict=True)
        ]
    )


class ProjectTraining:
    """The project's own Trainer, on the same rows."""

    def __init__(self, args, world: World, technique: Technique):
        folder = world.folder / ("kept" if technique.cached_features else f"fresh-{time.time_ns()}")
        self.fresh = None if technique.cached_features else folder
        out = world.folder / "out"
        stage = PRETRAIN if args.stage == "pretrain" else SFT
        flags = {
            **{"data_path": world.data_path, "images_path": world.images_path, "vision_model_path": world.tower_path},
            **{"tokenizer_path": world.tokenizer.name_or_path, "from_weight": world.weights_path, "save_dir": out},
            **{"batch_size": args.batch_size, "epochs": 100, "device": args.device, "num_workers": args.num_workers},
            **{"max_seq_len": args.max_seq_len, "save_interval": 10**9, "log_interval": 10**9},
            "cache_vision": "off" if args.device.startswith("cuda") and self.fresh else folder,
            "compile": int(technique.compiled and args.device.startswith("cuda")),
        }
        argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        run = Run(stage, parse_arguments(stage, "", [*argv, "--ignore_high_loss"]))
        run.say = lambda message="": None
        data, model = run.load_data(), run.load_model()
        run.cache_features(model, data)
        self.trainer = Trainer(run, model, data)
        self.batches, self.steps = self.trainer._batches(), self.trainer.sampler.steps()
        if technique.cached_features:
            collate = VLMCollator()
            order = self.trainer.sampler
            for _, indices in zip(range(WARM_UP[args.device.startswith("cuda")] + args.steps), order, strict=False):
                self.trainer.image_features(collate(data.__getitems__(indices)))
            self.batches = self.trainer._batches()  # one that finds them

    def step(self) -> dict:
        """One optimizer step; returns its counts and the seconds it waited for data."""
        started = time.perf_counter()
        batch = next(self.batches)
        data_seconds = time.perf_counter() - started
        learned, samples, _ = self.trainer._count([batch])
        self.trainer._learn([batch], learned, samples, 1e-4)
        return counts(batch) | {"data_seconds": data_seconds}

    def close(self):
        if self.fresh is not None:
            shutil.rmtree(self.fresh, ignore_errors=True)


def counts(batch: dict) -> dict:
    """Samples, useful and computed tokens, learned tokens, and the sum of squared lengths (for attention's FLOPs).

    Some are tensors, not yet waited for.
    """
    lengths = (batch["input_ids"] != 0).sum(dim=1)
    return {
        "samples": len(lengths),
        "useful": lengths.sum(),
        "computed": batch["input_ids"].numel(),
        "learned": (batch["labels"] != -100).sum(),
        "squares": (lengths**2).sum(),
    }


def model_flops(args, total: dict, is_cached: bool) -> float:
    """Floating-point operations the model must do for these counts, pads and unlearned logits left out.

    A matrix product of N weights takes 2 N a token; a causal attention 2 L^2 D forward. The backward pass takes as much
    again for the activations, and in SFT once more for the weights; a frozen tower has none.
    """
    config = VLMConfig(hidden_size=args.hidden_size, num_hidden_layers=LAYERS[args.hidden_size])
    width, layers = config.hidden_size, config.num_hidden_layers
    key_value = config.num_key_value_heads * config.head_dim
    weights = layers * (2 * width**2 + 2 * width * key_value + 3 * width * config.intermediate_size)
    forward = 2 * weights * total["useful"] + 2 * layers * width * total["squares"]
    forward += 2 * width * config.vocab_size * total["learned"]
    tower_weights, positions = 12 * (4 * 768**2 + 2 * 768 * 3072), 197
    tower = total["samples"] * (2 * (tower_weights + 768**2) * positions + 12 * 4 * positions**2 * 768)
    return forward * (2 if args.stage == "pretrain" else 3) + (0 if is_cached else tower)


def matrix_product_flops(device: torch.device) -> float:
    """FLOP/s of a large square matrix product: float32 on the CPU, bfloat16 on CUDA. Median of five."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        synchronise(device)
        started = time.perf_counter()
        a @ b
        synchronise(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / sorted(seconds[1:])[2]


def synchronise(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_memory(device: torch.device) -> float:
    """Bytes: of the GPU's allocator, else of this process (its workers apart)."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_training(args, name: str) -> dict:
    technique, device = TECHNIQUES[name], torch.device(args.device)
    world = World(args.stage, args.hidden_size, ROWS_A_BATCH * args.batch_size)
    training = (ProjectTraining if technique.trainer else PlainTraining)(args, world, technique)
    product = matrix_product_flops(device)
    for _ in range(WARM_UP[device.type == "cuda"]):
        training.step()
    synchronise(device)
    started, total = time.perf_counter(), {}
    for _ in range(args.steps):
        for key, value in training.step().items():
            total[key] = total.get(key, 0) + value
    synchronise(device)
    seconds = time.perf_counter() - started
    total = {key: float(value) for key, value in total.items()}
    product = max(product, matrix_product_flops(device))  # before and after: on a shared machine one may be disturbed
    if technique.trainer:
        training.close()
    return {
        "samples_per_second": total["samples"] / seconds,
        "useful_tokens_per_second": total["useful"] / seconds,
        "useful_share": total["useful"] / total["computed"],
        "share_of_matrix_product": model_flops(args, total, technique.cached_features) / seconds / product,
        "matrix_product_flops": product,
        "data_wait": total["data_seconds"] / seconds,
        "peak_bytes": peak_memory(device),
    }


def measure_loader(args, name: str) -> dict:
    """Pictures a second out of the loader alone."""
    rows = max(LOADER_PICTURES, ROWS_A_BATCH * args.batch_size)
    world = World(args.stage, args.hidden_size, rows)
    if name == "loader":
        data, collate = VLMDataset(world.data_path, world.images_path, world.tokenizer, args.max_seq_len), VLMCollator()
    else:
        data, collate = PlainData(world, args.max_seq_len), collate_plain
    sampler = BatchSampler(np.ones(len(data)), args.batch_size)
    batches = iter(DataLoader(data, batch_sampler=sampler, collate_fn=collate, num_workers=args.num_workers))
    for _ in range(2 * args.num_workers):  # what the workers had ready
        next(batches)
    started = time.perf_counter()
    pictures = sum(len(batch["input_ids"]) for batch in batches)
    return {"pictures_per_second": pictures / (time.perf_counter() - started)}


@torch.inference_mode()
def measure_generate(args) -> dict:
    """New tokens a second, greedy, after a prompt as long as one about a picture, for one sample and for 16 at a time.

    The project's model and transformers' own Llama of the same shape take turns in one process, so that both meet the
    same machine; on CUDA ours decodes as eval_vlm.py does there, with a static cache and a compiled step.
    """
    device = torch.device(args.device)
    shape = {
        **{"hidden_size": args.hidden_size, "num_hidden_layers": LAYERS[args.hidden_size], "vocab_size": 6400},
        **{"num_attention_heads": 8, "num_key_value_heads": 2},
    }
    torch.manual_seed(0)
    intermediate = VLMConfig(**shape).intermediate_size
    models = {
        "llama": LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=intermediate, tie_word_embeddings=True)),
        "this_project": MiniMindVLM(VLMConfig(**shape)),
    }
    figures = {}
    for batch in (1, 16):
        prompt = torch.randint(300, 6400, (batch, PROMPT_TOKENS), device=device)
        settings = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}
        seconds = {name: [] for name in models}
        for _ in range(1 + GENERATE_TURNS):
            for name, model in models.items():
                model.to(device).eval()
                static = name == "this_project" and device.type == "cuda"
                how = settings | ({"cache_implementation": "static"} if static else {})
                synchronise(device)
                started = time.perf_counter()
                model.generate(prompt, min_new_tokens=64, max_new_tokens=64, **how)
                synchronise(device)
                seconds[name].append(time.perf_counter() - started)
        ours, llama = seconds["this_project"][1:], seconds["llama"][1:]
        for name in models:
            figures[f"{name}_batch_{batch}"] = 64 * batch / statistics.median(seconds[name][1:])
        figures[f"ratio_batch_{batch}"] = statistics.median(b / a for a, b in zip(ours, llama, strict=True))
    return figures


def measure(args, name: str) -> dict:
    """The figures of one measurement, by its name."""
    transformers.utils.logging.disable_progress_bar()
    if name in TECHNIQUES:
        return measure_training(args, name)
    return measure_loader(args, name) if name.startswith("loader") else measure_generate(args)
