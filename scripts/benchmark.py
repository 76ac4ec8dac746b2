"""How fast training, the data loader and generation are, technique by technique, against a plain baseline.

    python scripts/benchmark.py                                  all three, on the best device there is
    python scripts/benchmark.py train --stage sft --batch_size 4
    python scripts/benchmark.py train --device cpu --hidden_size 512 --batch_size 16 --json benchmark.json
    python scripts/benchmark.py data --num_workers 16
    python scripts/benchmark.py generate

The data are made up in the shape of the published: 128 x 128 JPEG images, captions of 20 to 80 tokens (pretrain) or
dialogues of 200 to 1500 (sft). Tower and decoder are of full size with random weights; speed does not depend on them.
Each line of the table has one more technique than the line above, and is measured in a process of its own, so that its
peak memory is its own; all lines take turns, and the whole round is repeated.
"""

import argparse
import json
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM  # noqa: E402

from common.cli import ArgumentParser, HelpFormatter, file_path  # noqa: E402
from common.errors import UsageError, run_script  # noqa: E402
from common.paths import BUILTIN_TOKENIZER_DIR  # noqa: E402
from dataset.chat import ChatEncoder, parse_conversation  # noqa: E402
from dataset.features import FeatureFile, compute_features  # noqa: E402
from dataset.lm_dataset import VLMCollator, VLMDataset  # noqa: E402
from dataset.sampler import BatchSampler  # noqa: E402
from dataset.tokenizer import load_tokenizer  # noqa: E402
from model.model_vlm import MiniMindVLM, VLMConfig  # noqa: E402
from trainer.loop import answer_loss, count, load_batches, make_learner, train_step  # noqa: E402
from trainer.setup import freeze, round_frozen_weights  # noqa: E402
from trainer.support.compilation import LENGTH_MULTIPLE, compile_or_not  # noqa: E402
from trainer.support.processes import Processes, cores, pick_device, pick_dtype  # noqa: E402
from trainer.train_pretrain_vlm import STAGE as PRETRAIN  # noqa: E402
from trainer.train_sft_vlm import STAGE as SFT  # noqa: E402

STAGES = {stage.name: stage for stage in (PRETRAIN, SFT)}
LAYERS = {512: 8, 768: 16}
TOWER = {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072, "num_attention_heads": 12}
IMAGES, ROWS_A_BATCH, LOADER_IMAGES = 64, 40, 4000
WARM_UP = {"cpu": 1, "mps": 1, "cuda": 5}  # steps
PROMPT_TOKENS, NEW_TOKENS, GENERATE_TURNS = 230, 64, 9
PLAIN_LINES = (
    "plain",
    "+ padded to the batch's longest",
    "+ batches of similar length",
    "+ logits at learned positions",
    "+ tower once, token cache, uint8",
)
OURS = ("this project, not compiled", "this project, first epoch", "this project, kept features")


class World:
    """Files in a temporary folder, made once and used by every measurement."""

    def __init__(self, args, rows: int):
        self.folder = Path(tempfile.gettempdir()) / "minimind-v-benchmark"
        self.images_path, self.tower_path = self.folder / "images", self.folder / f"tower_{TOWER['hidden_size']}"
        self.data_path = self.folder / f"{args.stage}-{rows}.jsonl"
        self.images_path.mkdir(parents=True, exist_ok=True)
        self.tokenizer = load_tokenizer(BUILTIN_TOKENIZER_DIR)
        self.max_length, self.args = args.max_seq_len, args
        if not (self.images_path / f"{IMAGES - 1}.jpg").is_file():
            rng = np.random.default_rng(0)
            for number in range(IMAGES):
                coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
                coarse = coarse.resize((128, 128), Image.Resampling.BICUBIC)
                coarse.save(self.images_path / f"{number}.jpg", quality=90)
        if not self.data_path.is_file():
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in self._rows(args.stage, rows)]
            self.data_path.write_text("".join(lines), encoding="utf-8")
        if not (self.tower_path / "model.safetensors").is_file():
            torch.manual_seed(0)
            CLIPVisionModel(CLIPVisionConfig(**TOWER, patch_size=16, image_size=224)).save_pretrained(self.tower_path)

    def _rows(self, stage: str, rows: int):
        rng = random.Random(0)
        words = [self.tokenizer.decode([index]) for index in range(300, 6400)]
        words = [word for word in words if word.isalpha() and "\u4e00" <= word[0]]

        def text(tokens: int) -> str:
            return "".join(rng.choice(words) for _ in range(tokens))

        for number in range(rows):
            if stage == "pretrain":
                turns = [("描述这张图片\n<image>", text(rng.randint(20, 80)))]
            else:
                turn_count = rng.randint(1, 4)
                # An image and the prompt's frame take about 220 of a dialogue's tokens.
                each = max(10, (rng.randint(200, 1500) - 220) // (2 * turn_count))
                turns = [(text(each), text(each)) for _ in range(turn_count)]
                turns[0] = (f"<image>\n{turns[0][0]}", turns[0][1])
            pairs = [(("user", asked), ("assistant", answer)) for asked, answer in turns]
            conversation = [{"role": role, "content": content} for pair in pairs for role, content in pair]
            yield {"conversations": conversation, "image": f"{number % IMAGES}.jpg"}

    def data(self) -> VLMDataset:
        """Returns the rows as training reads them."""
        tokens = VLMConfig().image_tokens
        return VLMDataset(self.data_path, self.images_path, self.tokenizer, self.max_length, tokens)

    def model(self) -> MiniMindVLM:
        """Returns a model of full size with random weights, on the CPU, frozen as the stage does."""
        torch.manual_seed(0)
        size = self.args.hidden_size
        model = MiniMindVLM(VLMConfig(hidden_size=size, num_hidden_layers=LAYERS[size]), self.tower_path)
        freeze(model, STAGES[self.args.stage].defaults["freeze_llm"])
        return model.train()


class PlainData(Dataset):
    """Rows in memory, tokenised, padded and run through transformers' image processor each time they are asked for."""

    def __init__(self, world: World, pad_to: int | None):
        self.rows = world.data_path.read_text(encoding="utf-8").splitlines()
        self.images_path, self.pad_to = world.images_path, pad_to
        self.encoder = ChatEncoder(world.tokenizer, VLMConfig().image_tokens)
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
        with Image.open(self.images_path / row["image"]) as image:
            pixels = self.processor(images=image, return_tensors="pt")["pixel_values"]
        return {"input_ids": input_ids, "labels": labels, "pixel_values": pixels, "image_starts": chat.image_starts}


def collate_plain(samples: list[dict]) -> dict:
    """Pads to the longest sample (all are max_seq_len long in the plain case); one image a sample."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    starts = [[row, start] for row, sample in enumerate(samples) for start in sample["image_starts"]]
    return {
        "input_ids": torch.stack([F.pad(s["input_ids"], (0, longest - len(s["input_ids"]))) for s in samples]),
        "labels": torch.stack([F.pad(s["labels"], (0, longest - len(s["labels"])), value=-100) for s in samples]),
        "pixel_values": torch.cat([sample["pixel_values"] for sample in samples]),
        "image_starts": torch.tensor(starts),
    }


def plain_steps(args, world: World, techniques: int):
    """Takes the steps of a training loop as it is first written, with so many techniques on; yields (batch, 0)."""
    pads, sorts, picks_logits, reads_cache = (techniques > number for number in range(4))
    device, model = torch.device(args.device), world.model().to(args.device)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4)
    rows = world.data()
    data = rows if reads_cache else PlainData(world, None if pads else args.max_seq_len)
    sampler = BatchSampler(rows.lengths if sorts else np.ones(len(rows)), args.batch_size)
    collate = VLMCollator() if reads_cache else collate_plain
    for batch in DataLoader(data, batch_sampler=sampler, collate_fn=collate, num_workers=args.num_workers):
        inputs = {name: batch[name].to(device) for name in ("input_ids", "labels", "pixel_values", "image_starts")}
        learned = (inputs["labels"].flatten() != -100).nonzero()[:, 0] if picks_logits else None
        # In autocast on a GPU, which is what "plain" means there.
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(**inputs, learned_positions=learned).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield batch, 0.0


def our_steps(args, world: World, name: str):
    """Takes the project's own `train_step`s on the same rows; yields (batch, seconds its features took to encode)."""
    processes, data, model = Processes.start(args.device), world.data(), world.model()
    device, dtype = processes.device, pick_dtype(None, processes.device)
    round_frozen_weights(model, dtype)
    model.to(device)
    forward = model
    if name != OURS[0] and device.type == "cuda":
        forward = compile_or_not(model, data, args.batch_size, device, dtype, lambda message: None)
    learner = make_learner(model, answer_loss, processes, dtype, 1.0, forward)
    sampler = BatchSampler(data.lengths, args.batch_size, epochs=100)
    if name == OURS[2] or (name == OURS[1] and device.type != "cuda"):
        # Off CUDA the features are computed before the first step: the first epoch pays for them, image by image.
        few = VLMDataset.__new__(VLMDataset)
        vars(few).update(vars(data))
        steps = WARM_UP[device.type] + args.steps
        few.positions = np.sort(
            np.concatenate([data.positions[i] for i, _ in zip(sampler, range(steps), strict=False)])
        )
        shape = len(data.rows), model.config.vision_patches, model.config.vision_hidden_size
        with tempfile.TemporaryDirectory(dir=world.folder) as folder:
            file = FeatureFile(Path(folder), "data", "tower", shape)
            started = time.perf_counter()
            compute_features(few, file, model.encode_images, device, args.num_workers)
            encoding = (time.perf_counter() - started) / steps if name == OURS[1] else 0.0
            data.use_features(file)
            yield from steps_of(args, learner, data, sampler, forward is not model, encoding)
    else:
        yield from steps_of(args, learner, data, sampler, forward is not model, 0.0)


def steps_of(args, learner, data, sampler, is_compiled: bool, encoding: float):
    multiple = LENGTH_MULTIPLE if is_compiled else 1
    for batch in load_batches(data, sampler, learner.processes.device, args.num_workers, 0, multiple):
        train_step(learner, [batch], count([batch], learner.processes), 1e-4)
        yield batch, encoding


def measure_training(args, name: str) -> dict:
    """Returns speed, share of useful tokens, share of the machine's matrix product, and peak memory of one line."""
    device, world = torch.device(args.device), World(args, ROWS_A_BATCH * args.batch_size)
    steps = plain_steps(args, world, PLAIN_LINES.index(name)) if name in PLAIN_LINES else our_steps(args, world, name)
    product, total, seconds = matrix_product_flops(device), {}, 0.0
    for _ in range(WARM_UP[device.type]):
        next(steps)
    sync(device)
    for _ in range(args.steps):
        started = time.perf_counter()
        batch, encoding = next(steps)
        sync(device)
        seconds += time.perf_counter() - started + encoding
        for key, value in token_counts(batch).items():
            total[key] = total.get(key, 0) + float(value)
    product = max(product, matrix_product_flops(device))  # before and after: one may be disturbed on a shared machine
    is_cuda = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if is_cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    steps.close()
    return {
        "samples_per_second": total["samples"] / seconds,
        "useful_tokens_per_second": total["useful"] / seconds,
        "useful_share": total["useful"] / total["computed"],
        "share_of_matrix_product": model_flops(args, total, name == OURS[2]) / seconds / product,
        "matrix_product_flops": product,
        "peak_bytes": float(peak / (1024 if sys.platform == "darwin" and not is_cuda else 1)),
    }


def token_counts(batch: dict) -> dict:
    """Returns samples, useful and computed tokens, learned tokens, and the sum of squared lengths (for attention)."""
    lengths = (batch["input_ids"] != 0).sum(dim=1)
    learned = (batch["labels"] != -100).sum()
    tokens = {"useful": lengths.sum(), "computed": batch["input_ids"].numel(), "learned": learned}
    return tokens | {"samples": len(lengths), "squares": (lengths**2).sum()}


def model_flops(args, total: dict, is_cached: bool) -> float:
    """Returns the floating-point operations these counts need, pads and unlearned logits left out.

    A matrix product of N weights takes 2 N a token, a causal attention 2 L^2 D forward. The backward pass takes as much
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
    backward = 1 if STAGES[args.stage].defaults["freeze_llm"] else 2
    return forward * (1 + backward) + (0 if is_cached else tower)


def matrix_product_flops(device: torch.device) -> float:
    """Returns FLOP/s of a large square matrix product: float32 on the CPU, bfloat16 on CUDA; median of five."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        sync(device)
        started = time.perf_counter()
        a @ b
        sync(device)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds[1:])


def sync(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure_loader(args, name: str) -> dict:
    """Returns images per second out of the loader alone."""
    world = World(args, max(LOADER_IMAGES, ROWS_A_BATCH * args.batch_size))
    plain = name == "loader, plain"
    data, collate = (PlainData(world, args.max_seq_len), collate_plain) if plain else (world.data(), VLMCollator())
    sampler = BatchSampler(np.ones(len(data)), args.batch_size)
    batches = iter(DataLoader(data, batch_sampler=sampler, collate_fn=collate, num_workers=args.num_workers))
    for _ in range(2 * args.num_workers):  # what the workers had ready
        next(batches)
    started = time.perf_counter()
    images = sum(len(batch["input_ids"]) for batch in batches)
    return {"images_per_second": images / (time.perf_counter() - started)}


@torch.inference_mode()
def measure_generate(args, name: str) -> dict:
    """Returns new tokens per second, greedy, for one sample and for 16 at a time.

    The project's model and transformers' own Llama of the same shape take turns in one process, so that both meet the
    same machine; on CUDA ours decodes as eval_vlm.py does there, with a static cache and a compiled step.
    """
    device, size = torch.device(args.device), args.hidden_size
    shape = {"hidden_size": size, "num_hidden_layers": LAYERS[size], "vocab_size": 6400}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 2}
    torch.manual_seed(0)
    ours, static = MiniMindVLM(VLMConfig(**shape)), {"cache_implementation": "static"} if device.type == "cuda" else {}
    llama = LlamaConfig(**shape, intermediate_size=ours.config.intermediate_size, tie_word_embeddings=True)
    models = {"this_project": (ours, static), "llama": (LlamaForCausalLM(llama), {})}
    figures = {}
    for batch in (1, 16):
        prompt = torch.randint(300, 6400, (batch, PROMPT_TOKENS), device=device)
        fixed = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}
        fixed |= {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
        seconds = {name: [] for name in models}
        for _ in range(1 + GENERATE_TURNS):
            for name, (model, settings) in models.items():
                model.to(device).eval()
                sync(device)
                started = time.perf_counter()
                model.generate(prompt, **fixed, **settings)
                sync(device)
                seconds[name].append(time.perf_counter() - started)
        for name in models:
            figures[f"{name}_batch_{batch}"] = NEW_TOKENS * batch / statistics.median(seconds[name][1:])
        ratios = [b / a for a, b in zip(seconds["this_project"][1:], seconds["llama"][1:], strict=True)]
        figures[f"ratio_batch_{batch}"] = statistics.median(ratios)
    return figures


def measurements(args) -> dict:
    """Returns what is measured, by what was asked for: (function, lines)."""
    lines = PLAIN_LINES + (OURS if args.device.startswith("cuda") else OURS[1:])
    return {
        "train": (measure_training, lines),
        "data": (measure_loader, ("loader, plain", "loader")),
        "generate": (measure_generate, ("generation",)),
    }


def measure_rounds(args, names: tuple[str, ...]) -> dict[str, dict]:
    """Takes each measurement `repeats` times, in turn, in a fresh process; returns medians of every figure."""
    flags = ["stage", "device", "hidden_size", "batch_size", "max_seq_len", "steps", "num_workers"]
    command = [sys.executable, __file__, *(word for flag in flags for word in (f"--{flag}", str(getattr(args, flag))))]
    rounds = []
    for number in range(args.repeats):
        rounds.append({})
        for name in names:
            print(f"\rround {number + 1} of {args.repeats}: {name:<40}", end="", file=sys.stderr, flush=True)
            done = subprocess.run([*command, "--one", name], capture_output=True, text=True)
            if done.returncode != 0:
                raise UsageError(f"measuring {name} failed:\n{done.stderr[-3000:]}")
            rounds[-1][name] = json.loads(done.stdout.splitlines()[-1])
    print("\r" + " " * 60 + "\r", end="", file=sys.stderr)
    figures = {name: [of_round[name] for of_round in rounds] for name in names}
    return {name: {key: statistics.median(f[key] for f in of) for key in of[0]} for name, of in figures.items()}


def print_table(what: str, results: dict[str, dict]):
    """Prints a line for each measurement, as wide as a terminal; the first is the baseline."""
    plain = next(iter(results.values()))
    if what == "train":
        print(f"  {'':<33}samples/s  x plain   useful  product       GB")
    for name, row in results.items():
        if what == "train":
            faster = row["samples_per_second"] / plain["samples_per_second"]
            shares = f"{row['useful_share']:>9.1%}{row['share_of_matrix_product']:>9.0%}"
            figures = f"{row['samples_per_second']:>9.2f}{faster:>9.2f}{shares}{row['peak_bytes'] / 1e9:>9.2f}"
        elif what == "data":
            figures = f"{row['images_per_second']:>9,.0f} images/s"
            figures += f"{row['images_per_second'] / plain['images_per_second']:>9.2f} x plain"
        else:
            speeds = [(n, row[f"this_project_batch_{n}"], row[f"ratio_batch_{n}"]) for n in (1, 16)]
            lines = [f"\n    batch {n:<3}{s:>6,.0f} tokens/s, {x:.2f} x transformers' Llama" for n, s, x in speeds]
            figures = "".join(lines)
        print(f"  {name:<33}{figures}")
    if what == "train":
        print(f"  product: of the FLOP/s of a matrix product, here {plain['matrix_product_flops'] / 1e9:,.0f} GFLOP/s")


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("what", nargs="*", metavar="WHAT", help="train, data, generate (default: all three)")
    add("--stage", choices=tuple(STAGES), default=next(iter(STAGES)), help="which stage's step")
    add("--device", help="cpu, cuda or mps (default: the best there is)")
    add("--hidden_size", type=int, choices=tuple(LAYERS), default=512, help="512: 8 layers, 768: 16")
    add("--batch_size", type=int, default=16, help="samples a step")
    add("--max_seq_len", type=int, help="what the baseline pads to (default: the stage's)")
    add("--steps", type=int, default=3, help="timed steps of each measurement")
    add("--repeats", type=int, default=3, help="rounds through all lines; medians are shown")
    add("--num_workers", type=int, default=min(16, cores()), help="of the loader")
    add("--json", type=file_path, help="write the figures there")
    add("--one", help=argparse.SUPPRESS)  # a single measurement, printed as JSON: what this script starts itself
    args = parser.parse_args(argv)
    args.device = str(pick_device(args.device, 0, 1))
    args.max_seq_len = args.max_seq_len or STAGES[args.stage].defaults["max_seq_len"]
    unknown = set(args.what) - measurements(args).keys()
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(measurements(args))}")
    return args


def main():
    args = parse_arguments()
    if args.one:
        transformers.utils.logging.disable_progress_bar()
        measure = next(function for function, names in measurements(args).values() if args.one in names)
        print(json.dumps(measure(args, args.one)))
        return
    results = {"settings": {key: value for key, value in vars(args).items() if key not in ("json", "one")}}
    print(
        f"{args.device} ({platform.machine()}), Python {platform.python_version()}, torch {version('torch')}, "
        f"transformers {version('transformers')}; {args.stage}, hidden_size {args.hidden_size}, batch_size "
        f"{args.batch_size},\nmax_seq_len {args.max_seq_len}, {args.num_workers} workers, medians of {args.repeats} "
        f"rounds of {args.steps} steps"
    )
    for what, (_, names) in measurements(args).items():
        if what in (args.what or measurements(args)):
            print({"train": "training", "data": "the loader alone", "generate": "generation"}[what])
            results[what] = measure_rounds(args, names)
            print_table(what, results[what])
    if args.json:
        args.json.write_text(json.dumps(results, indent=2, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
