"""Stage 0: teach a small vision tower your own pictures, by the words of their answers.

    python trainer/train_tower.py --data_path my_data/train.jsonl --save_tower out/my_tower
    python trainer/train_tower.py --data_path my_data/train.jsonl --save_tower out/my_tower --minutes 3

Stages 1 and 2 leave the tower frozen, and the built-in one has seen drawn shapes only. Here it learns from pictures and
the words of their answers: labels, captions and answers to questions alike. A transformer needs many pictures for that,
a convolutional network few. So for 30 % of the time a small one, the guide, learns to predict the words; then the
tower learns to predict them too, and at each patch to give what the guide sees there (distillation, as in
https://arxiv.org/abs/2012.12877): each patch's feature carries it in a form that a linear layer, the projection, can
take up. Guide and heads are dropped at the end.

Writes a folder as transformers does, which --vision_model_path of the next stages names.
"""

import contextlib
import json
import math
import re
import sys
import time
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.cli import ArgumentParser, HelpFormatter, command, file_path, number
from common.errors import Stopped, UsageError, run_script
from common.files import load_file, refuse_to_lose, sha256_of, whole_folder, write_atomically
from common.paths import BUILTIN_TOKENIZER_DIR, BUILTIN_TOWER_DIR, display_path
from dataset.holdout import hold_out
from dataset.lm_dataset import PictureError, VLMDataset, bad_rows_limit, text_of
from dataset.pictures import PictureFormat
from dataset.sampler import BatchSampler
from dataset.tokenizer import load_tokenizer, quiet_libraries
from dataset.views import random_views
from dataset.workers import load_in_workers, worker_errors
from model.vision_tower import TowerError, encode_images, load_vision_tower
from trainer.report.progress import clock
from trainer.stage import epochs_for
from trainer.support.processes import Processes, cores, pick_dtype
from trainer.support.signals import StopSignals

NO_TOWER = Path("none")
SMALL = 112  # pixels: with 49 patches the tower learns four times as fast as with 196, and so do the next stages
MOST_TOKENS = 2048  # of a row that are read
MOST_WORDS, LEAST_PICTURES, ALMOST_ALL = 4096, 2, 0.9  # words that so many pictures have, and not almost all
SIDES = re.compile(
    r"\b(left|right)\b|[左右]", re.IGNORECASE
)  # where an answer names them, a mirrored picture would contradict it
GUIDED = 0.3  # of the time: the guide's share
GUIDE_WIDTH, GUIDE_PIXELS, GUIDE_RATE = 64, 64, 3e-3
OWN, DENSE = 0.35, 2.0  # weight of the words beside the guide's prediction of them, and of what it sees at each patch
SHARPNESS = 4.0  # means over patches make small logits
BETAS, WEIGHT_DECAY, WARM_UP = (0.9, 0.98), 0.05, 0.05
REPORTS, MEASURED = 5, 512  # lines with the held-out figure over the run, and pictures that it is measured on
MADE_BY = {"tower_by": "trainer/train_tower.py"}
RESUMES = "the same command with --from_resume 1 resumes from there"


def parse_arguments(argv=None) -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--data_path", type=file_path, required=True, help="jsonl or parquet, as for the next stages")
    add("--images_path", type=file_path, help="folder of the jsonl's pictures (default: the jsonl's own)")
    add("--eval_data", type=file_path, help="evaluation rows (default: 1 %% of the training rows, held out)")
    add("--save_tower", metavar="FOLDER", type=file_path, required=True, help="the folder to write")
    what = "the tower to start from: a CLIP or SigLIP folder, or none (random weights, the built-in tower's shape)"
    what += f" (default: {display_path(BUILTIN_TOWER_DIR)})"
    add("--from_tower", type=file_path, default=BUILTIN_TOWER_DIR, help=what)
    what = f"width and height in pixels that the tower sees (default: {SMALL} from the built-in tower, else as it is)"
    add("--size", type=number(int, 32, 1024), help=what)
    what = f"divides answers into words (default: {display_path(BUILTIN_TOKENIZER_DIR)})"
    add("--tokenizer_path", type=file_path, default=BUILTIN_TOKENIZER_DIR, help=what)
    add("--minutes", type=number(float, 0.01), default=6, help="how long to train")
    add("--steps", type=number(int, 1), help="optimizer steps, instead of minutes")
    add("--batch_size", type=number(int, 2), default=64, help="pictures a step")
    add("--learning_rate", type=number(float, 0), default=1e-3, help="the tower's peak; cosine decay to 1 %%")
    what = "1: also learn from mirrored pictures (default: 0 for pictures whose answers say left or right, else 1)"
    add("--flip", type=int, choices=(0, 1), help=what)
    add("--seed", type=number(int, 0, 2**63 - 1), default=42, help="of initial weights, order and views")
    add("--device", help="cpu, cuda, cuda:N or mps (default: the best there is)")
    add("--num_workers", type=number(int, 0), default=min(8, cores()), help="processes that decode pictures")
    add("--from_resume", type=int, choices=(0, 1), help="1: resume a run that was stopped; 0: start over")
    args = parser.parse_args(argv)
    args.save_tower = args.save_tower.resolve()
    if args.size is None and args.from_tower in (NO_TOWER, BUILTIN_TOWER_DIR):
        args.size = SMALL
    return args


class Guide(nn.Module):
    """A small convolutional network: (images, 3, 64, 64) to the words' logits and its map (images, width, 8, 8)."""

    def __init__(self, words: int, width: int = GUIDE_WIDTH):
        super().__init__()
        self.width = 4 * width
        self.layers = nn.Sequential(
            *convolution(3, width // 2, stride=2),
            *convolution(width // 2, width),
            nn.MaxPool2d(2),
            Residual(width),
            *convolution(width, 2 * width),
            nn.MaxPool2d(2),
            Residual(2 * width),
            *convolution(2 * width, self.width),
        )
        self.head = nn.Linear(self.width, words)
        self.to(memory_format=torch.channels_last)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        small = F.interpolate(pixels, size=(GUIDE_PIXELS, GUIDE_PIXELS), mode="bilinear", antialias=True)
        seen = self.layers(small.contiguous(memory_format=torch.channels_last)).float()
        return self.head(seen.amax((2, 3))) / 2, seen


def convolution(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.GELU()]


class Residual(nn.Sequential):
    def __init__(self, width: int):
        super().__init__(*convolution(width, width), *convolution(width, width))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states + super().forward(states)


class Learner(nn.Module):
    """The tower with its heads, and the guide that it learns from."""

    def __init__(self, tower: nn.Module, words: int):
        super().__init__()
        self.guide, self.tower = Guide(words), tower
        self.head = nn.Linear(tower.settings.hidden_size, words)
        self.imitates = nn.Linear(tower.settings.hidden_size, self.guide.width)

    def parts(self) -> tuple[list, list]:
        """Returns the parameters of the guide, and those of the tower with its heads."""
        return list(self.guide.parameters()), [
            weight for part in (self.tower, self.head, self.imitates) for weight in part.parameters()
        ]

    def patches(self, pixels: torch.Tensor) -> torch.Tensor:
        states = self.tower(pixel_values=pixels).last_hidden_state.float()
        return states[:, states.shape[1] - self.tower.settings.patches :]

    def guide_loss(self, pixels: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.guide.train()(pixels)[0].float(), targets)

    def tower_loss(self, pixels: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Returns the cross-entropy with words and guide, and the distance from what the guide sees at each patch."""
        with torch.no_grad():
            logits, seen = self.guide.eval()(pixels)
            side = math.isqrt(self.tower.settings.patches)
            seen = F.interpolate(seen, size=(side, side), mode="bilinear", antialias=True).flatten(2).mT
            seen = F.layer_norm(seen, seen.shape[-1:])
        patches = self.patches(pixels)
        targets = OWN * targets + (1 - OWN) * logits.softmax(1)
        loss = F.cross_entropy(SHARPNESS * self.head(patches.mean(1)).float(), targets)
        return loss + DENSE * F.smooth_l1_loss(self.imitates(patches).float(), seen)


class Pictures:
    """The pictures of a data file's rows of one picture, and what the answers of each one's rows say.

    Attributes:
        rows: One row of each picture.
        row_count: All rows of the file, also those of no or several pictures.
        said: For each picture the set of its words: the tokens of its answers, and the answers (tuples of tokens).
        may_flip: bool (pictures,): those of which no answer says left or right.
    """

    def __init__(self, data: VLMDataset, tokenizer):
        self.row_count = len(data)
        data = data.changed(row_indices=data.row_indices[data.image_counts == 1])
        _, first, numbers = np.unique(data.first_pictures, return_index=True, return_inverse=True)
        self.rows = data.changed(row_indices=data.row_indices[first], leaves_small=True)
        self.said, special = [set() for _ in first], {*tokenizer.all_special_ids}
        for start in range(0, len(data), 1000):
            rows = [text_of(row)["labels"] for row in data.read_rows(data.row_indices[start : start + 1000].tolist())]
            for picture, labels in zip(numbers[start : start + 1000].tolist(), rows, strict=True):
                answer = tuple(token for token in labels[labels >= 0].tolist() if token not in special)
                self.said[picture] |= {*answer, answer}
        texts = [tokenizer.batch_decode([list(word) for word in said if isinstance(word, tuple)]) for said in self.said]
        self.may_flip = torch.tensor([SIDES.search("\n".join(of_picture)) is None for of_picture in texts])

    def __len__(self) -> int:
        return len(self.said)


class Words:
    """The words that a tower learns: tokens, and whole answers that several pictures have (labels)."""

    def __init__(self, said: list[set]):
        count = Counter(word for words in said for word in words)
        most = max(LEAST_PICTURES, ALMOST_ALL * len(said))
        usable = [word for word, pictures in count.most_common() if LEAST_PICTURES <= pictures <= most][:MOST_WORDS]
        if len(usable) < 2:
            raise UsageError("the answers of different pictures have no words in common, so a tower learns nothing")
        self.numbers = {word: number for number, word in enumerate(usable)}  # the most frequent first
        self.weights = {word: math.log(1 + len(said) / count[word]) for word in usable}  # rare ones say more

    def __len__(self) -> int:
        return len(self.numbers)

    def targets(self, said: list[set]) -> torch.Tensor:
        """Returns (pictures, words): the weight of each picture's words, half of it on answers; rows sum to 1 or 0."""
        targets = torch.zeros(len(said), len(self))
        for row, words in zip(targets, said, strict=True):
            for kind in (tuple, int):
                known = [word for word in words if isinstance(word, kind) and word in self.numbers]
                total = sum(self.weights[word] for word in known)
                for word in known:
                    row[self.numbers[word]] = self.weights[word] / total
        return F.normalize(targets, p=1, dim=1)


def load_tower(args: Namespace) -> nn.Module:
    """Loads the tower to start from, for pictures of --size, or draws random weights of the built-in tower's shape."""
    try:
        loaded = load_vision_tower(BUILTIN_TOWER_DIR if args.from_tower == NO_TOWER else args.from_tower)
    except TowerError as error:
        raise UsageError(str(error).replace("--vision_model_path", "--from_tower")) from error
    settings, config = loaded.settings, loaded.config
    if settings.kind not in ("CLIP", "SigLIP"):
        raise UsageError(f"--from_tower {display_path(args.from_tower)} is a {settings.kind}, neither CLIP nor SigLIP")
    size = args.size or settings.size
    if args.size and size % config.patch_size:
        raise UsageError(f"--size {size} is no multiple of the tower's patches of {config.patch_size} pixels")
    config.image_size = size
    tower = type(loaded)(config)
    tower.settings = replace(settings, config=config, size=size)
    for name in ("pixel_mean", "pixel_std"):
        tower.register_buffer(name, getattr(loaded, name), persistent=False)
    if args.from_tower == NO_TOWER:
        return tower
    tensors = loaded.state_dict()
    [name] = [name for name in tensors if name.endswith("position_embedding.weight")]
    place = tensors[name]
    first, side = len(place) - settings.patches, math.isqrt(settings.patches)  # a class token stays
    grid = place[first:].T.unflatten(1, (side, side))[None]
    grid = F.interpolate(grid, size=(size // config.patch_size,) * 2, mode="bilinear", antialias=True)
    tensors[name] = torch.cat((place[:first], grid[0].flatten(1).T))
    tensors = {name: tensor for name, tensor in tensors.items() if "position_ids" not in name}  # they only count
    tower.load_state_dict(tower.state_dict() | tensors)
    return tower


def load_pictures(args: Namespace, tower: nn.Module, tokenizer) -> tuple[Pictures, Pictures]:
    """Loads the pictures to learn from, and those held out.

    Raises:
        UsageError: If more than 1 % of the rows are bad, or there are too few pictures.
    """
    form, found = PictureFormat(**tower.settings.picture_settings), []
    for path in filter(None, (args.data_path, args.eval_data)):
        data = VLMDataset(path, args.images_path, tokenizer, MOST_TOKENS, tower.settings.patches, form)
        if len(data.bad_rows) > bad_rows_limit(data, None):
            line, reason = data.bad_rows[0]
            hint = f"python -m dataset.check {display_path(path)} lists all; --images_path names the pictures' folder"
            raise UsageError(f"{display_path(path)}: {len(data.bad_rows)} rows are bad, line {line}: {reason}. {hint}")
        found.append(data)
    training, heldout = found if args.eval_data else hold_out(found[0])
    pictures = [Pictures(data, tokenizer) for data in (training, heldout) if data is not None]
    if len(pictures[0]) < args.batch_size:
        raise UsageError(
            f"{display_path(args.data_path)}: a tower needs at least {args.batch_size} pictures (--batch_size), and "
            f"there are {len(pictures[0])} in rows of one picture"
        )
    if len(pictures) < 2 or not len(pictures[1]):
        raise UsageError("no picture is held out: name rows with pictures by --eval_data")
    return tuple(pictures)


def stacked(samples: list) -> tuple[list[int], torch.Tensor | None, list[str]]:
    """Returns which of the samples can be read, their pictures, and why the others cannot."""
    good = [place for place, sample in enumerate(samples) if not isinstance(sample, PictureError)]
    broken = [str(sample) for sample in samples if isinstance(sample, PictureError)]
    return good, torch.cat([samples[place]["pixel_values"] for place in good]) if good else None, broken


@torch.no_grad()
def measure(learner: Learner, words: Words, pictures: Pictures, guide: bool, device) -> tuple[float, float]:
    """Returns how often the likeliest word is one of the picture's own, and how often the most frequent one is."""
    right = frequent = asked = 0
    for places in np.array_split(np.linspace(0, len(pictures) - 1, min(len(pictures), MEASURED), dtype=int), 8):
        places = places.tolist()
        good, pixels, _ = stacked(pictures.rows.__getitems__(places))
        if not good:
            continue
        own = words.targets([pictures.said[places[place]] for place in good]) > 0
        tower = learner.tower
        if guide:
            logits = learner.guide.eval()((pixels.to(device) / 255 - tower.pixel_mean) / tower.pixel_std)[0]
        else:
            logits = learner.head(encode_images(tower, pixels.to(device)).mean(1))
        right += own.gather(1, logits.argmax(1, keepdim=True).cpu()).sum().item()
        frequent += own[:, 0].sum().item()
        asked += len(own)
    return right / max(1, asked), frequent / max(1, asked)


def train(args: Namespace, device: torch.device) -> int:
    """Trains a tower as the flags say, and writes it; returns the number of rows in its data.

    Raises:
        Stopped: On SIGINT or SIGTERM, after saving.
        UsageError: If something is missing, or cannot be written.
    """
    refuse_to_lose(args.save_tower, MADE_BY, overwrite=True, flag="--save_tower")
    torch.manual_seed(args.seed)
    tokenizer, tower = load_tokenizer(args.tokenizer_path), load_tower(args)
    pictures, heldout = load_pictures(args, tower, tokenizer)
    words = Words(pictures.said)
    may_flip = pictures.may_flip if args.flip is None else torch.full((len(pictures),), bool(args.flip))
    fingerprint = {"data": pictures.rows.content_sha256, "starting tower": sha256_of(tower.state_dict())}
    fingerprint["pictures"] = sha256_of({"rows": torch.from_numpy(pictures.rows.row_indices), "flips": may_flip})
    fingerprint |= {
        name: str(getattr(args, name)) for name in ("batch_size", "learning_rate", "seed", "minutes", "steps")
    }
    learner = Learner(tower, len(words)).to(device)
    optimizers = [
        torch.optim.AdamW(part, lr=0.0, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=device.type in ("cpu", "cuda"))
        for part in learner.parts()
    ]
    dtype = pick_dtype(None, device, tower.config.hidden_size // tower.config.num_attention_heads)
    dtype = torch.float32 if dtype == torch.float16 else dtype  # it would need a gradient scaler
    # Without lengths to sort by the order is random; there are more epochs than anybody trains.
    sampler = BatchSampler(np.ones(len(pictures)), args.batch_size, epochs=1 << 20, seed=args.seed)
    run = {"step": 0, "epoch": 0, "sample": 0, "seconds": 0.0, "fingerprint": fingerprint}
    state_path = args.save_tower.with_name(f"{args.save_tower.name}_resume.pth")
    print_header(args, learner, len(words), len(pictures), len(heldout), may_flip, f"{device.type.upper()}, {dtype}")
    if (state := read_state(args, state_path, fingerprint)) is not None:
        run = restore(state, state_path, run, learner, optimizers)
        sampler.start_at(run["epoch"], run["sample"])
        print(f"  resumes       after step {run['step']:,}", flush=True)

    def done() -> float:
        return run["step"] / args.steps if args.steps else run["seconds"] / 60 / args.minutes

    def save():
        state = {"learner": learner.state_dict(), "optimizers": [it.state_dict() for it in optimizers]}
        state |= {"random": torch.get_rng_state(), "run": run}
        write_atomically(state_path, lambda file: torch.save(state, file))

    loader = load_in_workers(pictures.rows, args.num_workers, 4, batch_sampler=sampler, collate_fn=stacked)
    order, losses, skipped = iter(sampler), [], set()
    with StopSignals(speaks=True) as signals, worker_errors(args.num_workers), contextlib.closing(loader) as batches:
        for epoch, first in sampler.steps():
            started, at = time.perf_counter(), done()
            is_guide = at < GUIDED
            (good, pixels, broken), shown = next(batches), next(order)
            for error in {*broken} - skipped:
                print(f"skipped, it cannot be read: {error}", flush=True)
            skipped |= {*broken}
            if good:
                shown = [shown[place] for place in good]
                targets = words.targets([pictures.said[picture] for picture in shown]).to(device)
                views = random_views(pixels.to(device), tower.settings.size, may_flip[shown])
                views = (views / 255 - tower.pixel_mean) / tower.pixel_std
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    loss = (learner.guide_loss if is_guide else learner.tower_loss)(views, targets)
                take_step(loss, optimizers[not is_guide], rate(args, at))
                losses.append(loss.item())
            epoch, sample = sampler.after(epoch, first)
            run |= {"step": run["step"] + 1, "epoch": epoch, "sample": sample}
            run["seconds"] += time.perf_counter() - started
            if int(min(1, done()) * REPORTS) > int(at * REPORTS):
                report(
                    run["step"], min(1, done()), losses, measure(learner, words, heldout, is_guide, device), is_guide
                )
                losses = []
                save()
            if done() >= 1:
                break
            if signals.asked is not None:
                save()
                print(f"stopped after step {run['step']:,}, which is saved: {RESUMES}", flush=True)
                raise Stopped(signals.asked)
    write_tower(args, learner.tower)
    state_path.unlink(missing_ok=True)
    return pictures.row_count


def restore(state: dict, path: Path, run: dict, learner: Learner, optimizers: list) -> dict:
    """Restores a checkpoint; returns its place in the run, with the fields of `run`. Raises UsageError if damaged."""
    try:
        learner.load_state_dict(state["learner"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        torch.set_rng_state(state["random"])
        return {name: type(value)(state["run"][name]) for name, value in run.items()}
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"{display_path(path)} is damaged: --from_resume 0 starts over ({error})") from error


def report(step: int, done: float, losses: list[float], held_out: tuple[float, float], is_guide: bool):
    """Prints the held-out figures; raises UsageError if nothing was learned."""
    if not losses or not np.isfinite(losses).all():
        hint = "a lower --learning_rate may help" if losses else "none of the pictures can be read"
        raise UsageError(f"nothing was learned up to step {step:,}: {hint}")
    who, (right, frequent) = "guide" if is_guide else "tower", held_out
    figures = f"likeliest word right {right:.1%} (always the most frequent word: {frequent:.1%})"
    print(f"  {done:4.0%}  {who}  step {step:,}  loss {np.mean(losses):.3f}  held out: {figures}", flush=True)


def take_step(loss: torch.Tensor, optimizer: torch.optim.Optimizer, learning_rate: float):
    [group] = optimizer.param_groups
    group["lr"] = learning_rate
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()


def rate(args: Namespace, done: float) -> float:
    """Returns guide's or tower's learning rate: a linear warm-up, then a cosine decay to 1 % of the peak."""
    is_guide = done < GUIDED
    peak = GUIDE_RATE if is_guide else args.learning_rate
    done = done / GUIDED if is_guide else (done - GUIDED) / (1 - GUIDED)
    if done < WARM_UP:
        return peak * (0.01 + 0.99 * done / WARM_UP)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, (done - WARM_UP) / (1 - WARM_UP)))))


def read_state(args: Namespace, path: Path, fingerprint: dict) -> dict | None:
    """Reads the checkpoint of a run that was stopped; None to start over.

    Raises:
        UsageError: If there is one and --from_resume is missing, or it is of another run.
    """
    if args.from_resume == 0 or not path.is_file():
        if args.from_resume:
            print(f"--from_resume 1: no {display_path(path)} yet, so this run starts from the beginning")
        return None
    if args.from_resume is None:
        raise UsageError(
            f"{display_path(path)} belongs to a run that did not finish: --from_resume 1 resumes it, --from_resume 0 "
            "starts over"
        )
    state = load_file(path)
    saved = state["run"]["fingerprint"] if isinstance(state.get("run"), dict) else {}
    if other := [name for name, value in fingerprint.items() if saved.get(name) != value]:
        raise UsageError(
            f"{display_path(path)} was saved with another {', '.join(other)}: repeat that run's flags, or start over "
            "with --from_resume 0"
        )
    return state


def print_header(args, learner: Learner, words: int, pictures: int, heldout: int, may_flip, computes: str):
    start = "random weights" if args.from_tower == NO_TOWER else display_path(args.from_tower)
    settings, parameters = learner.tower.settings, sum(weight.numel() for weight in learner.tower.parameters()) / 1e6
    length = f"{args.steps:,} steps" if args.steps else f"{args.minutes:g} minutes"
    rows = {
        "starts from": f"{start}: {parameters:.2f} M parameters",
        "writes": display_path(args.save_tower),
        "data": f"{display_path(args.data_path)}: {pictures:,} pictures, {words:,} words",
        "held out": f"{heldout:,} pictures",
        "sees": f"{settings.size} x {settings.size} pixels, {settings.patches} patches; random crops, "
        f"{may_flip.float().mean() / 2:.0%} of them mirrored",
        "time": f"{length} in batches of {args.batch_size}, {computes.replace('torch.', '')}",
    }
    print("stage 0: the tower learns your pictures by the words of their answers")
    for name, value in rows.items():
        print(f"  {name:<13} {value}", flush=True)


def write_tower(args: Namespace, tower: nn.Module):
    """Writes the tower as transformers does, in half precision, with the preprocessor file of the one it began with."""
    source, size = BUILTIN_TOWER_DIR if args.from_tower == NO_TOWER else args.from_tower, tower.settings.size
    name = "preprocessor_config.json"
    with whole_folder(args.save_tower, MADE_BY | {"data": display_path(args.data_path)}, flag="--save_tower") as folder:
        tower.half().save_pretrained(folder)
        if (source / name).is_file():
            preprocessor = json.loads((source / name).read_text(encoding="utf-8"))
            for key in {"size", "crop_size"} & preprocessor.keys():
                edges = preprocessor[key]
                preprocessor[key] = dict.fromkeys(edges, size) if isinstance(edges, dict) else size
            (folder / name).write_text(json.dumps(preprocessor, indent=2) + "\n", encoding="utf-8")


def main():
    args, started = parse_arguments(), time.perf_counter()
    quiet_libraries(True)
    with Processes.start(args.device) as processes:
        if processes.world_size > 1:
            raise UsageError("a tower is trained by one process: leave torchrun out")
        epochs = epochs_for("pretrain", train(args, processes.device))
    print(f"done in {clock(time.perf_counter() - started)}: {display_path(args.save_tower)}")
    name = re.sub(r"\W+", "_", args.save_tower.name).removesuffix("_tower")
    following = {"from_weight": "llm", "data_path": args.data_path, "images_path": args.images_path}
    following |= {"eval_data": args.eval_data, "vision_model_path": args.save_tower, "save_weight": f"{name}_pretrain"}
    following |= {"epochs": epochs}
    print(f"next: {command('trainer/train_pretrain_vlm.py', following)}")


if __name__ == "__main__":
    run_script(main)
