"""Measure training, the data loader and generation, technique by technique, against a plain baseline.

    python scripts/benchmark.py                                  all three, on the best device there is
    python scripts/benchmark.py train --stage sft --batch_size 4
    python scripts/benchmark.py train --device cpu --hidden_size 512 --batch_size 16 --json benchmark.json
    python scripts/benchmark.py data --num_workers 16
    python scripts/benchmark.py generate

The data are made up, in the shape of the published set: 128 x 128 JPEG images, captions of 20 to 80 tokens (pretrain)
or dialogues of 200 to 1500 (sft). Tower and decoder have their full size and random weights, which do not affect speed.
Each line of the table adds one technique to the line above it. Every measurement runs in a process of its own, so that
its peak memory is its own; the lines take turns, and the whole round is repeated.
"""

import argparse
import itertools
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402
from torch.utils.data import DataLoader, Dataset  # noqa: E402
from tqdm import tqdm  # noqa: E402
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
TOWER = CLIPVisionConfig(patch_size=16)  # ViT-B/16
FOLDER = Path(tempfile.gettempdir()) / "minimind-v-benchmark"  # the made-up files, kept for later measurements
IMAGES, BATCHES, LOADER_IMAGES = 64, 40, 4000
WARM_UP = {"cpu": 1, "mps": 1, "cuda": 5}  # steps
PROMPT_TOKENS, NEW_TOKENS, GENERATE_TURNS = 230, 64, 9
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
# The columns of the tables, those that a measurement has.
FORMATS = {"samples/s": ".2f", "images/s": ",.0f", "tokens/s": ",.0f", "x plain": ".2f", "x Llama": ".2f"}
FORMATS |= {"useful": ".1%", "product": ".0%", "GB": ".2f"}


def load_data(args, rows: int) -> VLMDataset:
    """Returns so many made-up rows as training reads them."""
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
        made_up = (made_up_row(args.stage, f"{number % IMAGES}.jpg", words, rng) for number in range(rows))
        path.write_text("".join(json.dumps(row) + "\n" for row in made_up), encoding="utf-8")
    return VLMDataset(path, images, tokenizer, args.max_seq_len, VLMConfig().image_tokens)


def made_up_row(stage: str, image: str, words: list[str], rng: np.random.Generator) -> dict:
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


def load_model(args) -> MiniMindVLM:
    """Returns a model with random weights, on the CPU, frozen as the stage does."""
    torch.manual_seed(0)
    tower = FOLDER / "tower"
    if not (tower / "model.safetensors").is_file():
        CLIPVisionModel(TOWER).save_pretrained(tower)
    model = MiniMindVLM(model_config(args), tower)
    freeze(model, STAGES[args.stage].defaults["freeze_llm"])
    return model.train()


def model_config(args) -> VLMConfig:
    return VLMConfig(hidden_size=args.hidden_size, num_hidden_layers=LAYERS[args.hidden_size])


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
    """Takes the steps of a plain training loop with this many techniques on; yields (batch, 0)."""
    pads_to_longest, sorts, picks_logits, uses_cache = (techniques > number for number in range(4))
    model.to(device)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4)
    sampler = BatchSampler(data.lengths if sorts else np.ones(len(data)), args.batch_size, epochs=100)
    data = data if uses_cache else PlainData(data, pads_to_max=not pads_to_longest)
    names = ["input_ids", "labels", "pixel_values", "image_starts"] + ["learned_positions"] * picks_logits
    for batch in DataLoader(data, batch_sampler=sampler, collate_fn=VLMCollator(), num_workers=args.num_workers):
        # On a GPU "plain" includes autocast.
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(**{name: batch[name].to(device) for name in names}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield batch, 0.0


def our_steps(args, device: torch.device, data: VLMDataset, model: MiniMindVLM, name: str):
    """Takes the project's own `train_step`s on the same rows; yields (batch, seconds its features took to encode)."""
    processes, dtype = Processes.start(args.device), pick_dtype(None, device)
    round_frozen_weights(model, dtype)
    forward = model.to(device)
    is_cuda = device.type == "cuda"
    if is_cuda and name != NOT_COMPILED:
        forward = compile_or_not(model, data, args.batch_size, device, dtype, print)
    learner = make_learner(model, answer_loss, processes, dtype, 1.0, forward)
    sampler, encoding = BatchSampler(data.lengths, args.batch_size, epochs=100), 0.0
    with tempfile.TemporaryDirectory() as folder:
        # Off CUDA the first epoch's features are computed before its first step, image by image.
        if name == KEPT_FEATURES or (name == FIRST_EPOCH and not is_cuda):
            sampler = list(itertools.islice(sampler, WARM_UP[device.type] + args.steps)) * 100
            few = data.with_pixels()
            few.positions = np.unique(data.positions[np.concatenate(sampler)])
            shape = len(data), model.config.vision_patches, model.config.vision_hidden_size
            file = FeatureFile(Path(folder), "data", "tower", shape)
            seconds, _ = timed(device, compute_features, few, file, model.encode_images, device, args.num_workers)
            encoding = seconds / len(few) * args.batch_size if name == FIRST_EPOCH else 0.0
            data.use_features(file)
        multiple = LENGTH_MULTIPLE if forward is not model else 1
        for batch in load_batches(data, sampler, device, args.num_workers, 0, multiple):
            train_step(learner, [batch], count([batch], processes), 1e-4)
            yield batch, encoding


def measure_training(args, name: str) -> dict:
    """Returns one line's speed, share of useful tokens, share of a matrix product's FLOP/s, and peak memory."""
    device, data, model = torch.device(args.device), load_data(args, BATCHES * args.batch_size), load_model(args)
    if name in PLAIN_LINES:
        steps = plain_steps(args, device, data, model, PLAIN_LINES.index(name))
    else:
        steps = our_steps(args, device, data, model, name)
    product, total, seconds = matrix_product_flops(device), Counter(), 0.0
    for _ in range(WARM_UP[device.type]):
        next(steps)
    for _ in range(args.steps):
        elapsed, (batch, encoding) = timed(device, next, steps)
        seconds += elapsed + encoding
        lengths = (batch["input_ids"] != 0).sum(dim=1)
        total.update(samples=len(lengths), useful=int(lengths.sum()), computed=batch["input_ids"].numel())
        total.update(learned=int((batch["labels"] != -100).sum()), squares=int((lengths**2).sum()))
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
    weights = layers * (2 * width**2 + 2 * width * key_value + 3 * width * config.intermediate_size)
    forward = 2 * weights * total["useful"] + 2 * layers * width * total["squares"]
    forward += 2 * width * config.vocab_size * total["learned"]
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


def timed(device: torch.device, function, *args, **kwargs):
    """Returns the seconds of a call, the device's work included, and what it returned."""
    sync = torch.get_device_module(device).synchronize
    sync()
    started = time.perf_counter()
    result = function(*args, **kwargs)
    sync()
    return time.perf_counter() - started, result


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


@torch.inference_mode()
def measure_generate(args, name: str) -> dict:
    """Returns new tokens per second, greedy, and how many times those of transformers' own Llama of the same shape.

    The two take turns, so that both run under the same load; on CUDA ours decodes as in eval_vlm.py, with a static
    cache and a compiled step.
    """
    device, config, batch = torch.device(args.device), model_config(args), int(name.split()[-1])
    torch.manual_seed(0)
    ours, llama = MiniMindVLM(config), LlamaForCausalLM(LlamaConfig.from_dict(config.to_dict()))
    static = {"cache_implementation": "static"} if device.type == "cuda" else {}
    prompt = torch.randint(300, config.vocab_size, (batch, PROMPT_TOKENS), device=device)
    fixed = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}
    fixed |= {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    calls = [
        partial(model.to(device).eval().generate, prompt, **fixed, **settings)
        for model, settings in ((ours, static), (llama, {}))
    ]
    turns = [[timed(device, call)[0] for call in calls] for _ in range(1 + GENERATE_TURNS)][1:]
    return {
        "tokens/s": median(NEW_TOKENS * batch / ours for ours, _ in turns),
        "x Llama": median(llama / ours for ours, llama in turns),
    }


MEASUREMENTS = {
    "train": (measure_training, (*PLAIN_LINES, NOT_COMPILED, FIRST_EPOCH, KEPT_FEATURES)),
    "data": (measure_loader, ("loader, plain", "loader")),
    "generate": (measure_generate, ("generation, batch 1", "generation, batch 16")),
}


def measure_rounds(names: list[str], repeats: int) -> dict[str, dict]:
    """Takes each measurement `repeats` times, in turn, in a fresh process; returns the median of every figure."""
    rounds = {name: [] for name in names}
    for name in (bar := tqdm(names * repeats, leave=False)):
        bar.set_description(name)
        done = subprocess.run([sys.executable, *sys.argv, "--one", name], capture_output=True, text=True)
        if done.returncode != 0:
            raise UsageError(f"measuring {name} failed:\n{done.stderr[-3000:]}")
        rounds[name].append(json.loads(done.stdout.splitlines()[-1]))
    medians = {name: {key: median(row[key] for row in rows) for key in rows[0]} for name, rows in rounds.items()}
    if "plain" in names[0]:
        speed = next(iter(medians[names[0]]))
        for row in medians.values():
            row["x plain"] = row[speed] / medians[names[0]][speed]
    return medians


def print_table(what: str, results: dict[str, dict]):
    """Prints a line for each measurement, as wide as a terminal."""
    first = next(iter(results.values()))
    columns = {name: form for name, form in FORMATS.items() if name in first}
    print(f"{what:<35}" + "".join(f"{name:>9}" for name in columns))
    for name, row in results.items():
        print(f"  {name:<33}" + "".join(f"{row[column]:>9{form}}" for column, form in columns.items()))
    if "GFLOP/s" in first:
        print(f"  product: of the FLOP/s of a matrix product, here {first['GFLOP/s']:,.0f} GFLOP/s")


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("what", nargs="*", metavar="WHAT", help="train, data, generate (default: all three)")
    add("--stage", choices=tuple(STAGES), default=PRETRAIN.name, help="which stage's step")
    add("--device", help="cpu, cuda or mps (default: the best there is)")
    add("--hidden_size", type=int, choices=tuple(LAYERS), default=512, help="512: 8 layers, 768: 16")
    add("--batch_size", type=int, default=16, help="samples a step")
    add("--max_seq_len", type=int, help="what the baseline pads to (default: the stage's)")
    add("--steps", type=int, default=3, help="timed steps of each measurement")
    add("--repeats", type=int, default=3, help="rounds through all lines; medians are shown")
    add("--num_workers", type=int, default=min(16, cores()), help="of the loader")
    add("--json", type=file_path, help="write the figures there")
    add("--one", help=argparse.SUPPRESS)  # a single measurement, printed as JSON: how this script runs itself
    args = parser.parse_args(argv)
    args.device = str(pick_device(args.device, 0, 1))
    args.max_seq_len = args.max_seq_len or STAGES[args.stage].defaults["max_seq_len"]
    args.what = args.what or list(MEASUREMENTS)
    unknown = set(args.what) - MEASUREMENTS.keys()
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose from {', '.join(MEASUREMENTS)}")
    return args


def main():
    args = parse_arguments()
    if args.one:
        transformers.utils.logging.disable_progress_bar()
        measure = next(function for function, names in MEASUREMENTS.values() if args.one in names)
        print(json.dumps(measure(args, args.one)))
        return
    settings = {name: value for name, value in vars(args).items() if name not in ("what", "json", "one")}
    print(
        f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}\n" + ", ".join(f"{name} {value}" for name, value in settings.items())
    )
    results = {"settings": settings}
    for what in args.what:
        names = [name for name in MEASUREMENTS[what][1] if name != NOT_COMPILED or args.device.startswith("cuda")]
        results[what] = measure_rounds(names, args.repeats)
        print_table(what, results[what])
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
