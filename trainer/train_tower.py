"""Stage 0: teach a small vision tower your own pictures, by the words of their answers.

    python trainer/train_tower.py --data_path my_data/train.jsonl --save_tower out/my_tower --minutes 3

Stages 1 and 2 leave the tower frozen, and the built-in one has seen drawn shapes only. Here it learns the words of the
pictures' labels, captions or answers to questions. A transformer needs many pictures for that, a convolutional network
few. So for 30 % of the time a small one, the guide, learns to predict the words; then the tower learns to predict them
too, and at each patch to give what the guide sees there (distillation, as in https://arxiv.org/abs/2012.12877). Guide
and heads are dropped at the end.

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
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from common.cli import ArgumentParser, command, file_path, number
from common.errors import Stopped, UsageError, run_script
from common.files import refuse_to_lose, sha256_of, whole_folder, write_atomically
from common.paths import BUILTIN_TOKENIZER_DIR, BUILTIN_TOWER_DIR, display_path
from dataset.chat import load_tokenizer
from dataset.file_kinds import quiet_libraries
from dataset.holdout import hold_out
from dataset.lm_dataset import PictureError, VLMDataset, text_of
from dataset.pictures import PictureFormat, random_views
from dataset.sampler import BatchSampler, load_in_workers, worker_errors
from model.vision_tower import TowerError, encode_images, load_vision_tower, normalise
from model.weights import load_learned
from trainer import resume
from trainer.bundles import epochs_for
from trainer.report.progress import clock
from trainer.step import Counts, TrainContext, train_step
from trainer.support.processes import Processes, cores, pick_dtype, stop_signals

NO_TOWER = Path("none")
SMALL = 112  # pixels: with 49 patches the tower learns four times as fast as with 196, and so do the next stages
MOST_TOKENS = 2048  # of a row that are read
MOST_WORDS, LEAST_PICTURES, ALMOST_ALL = 4096, 2, 0.9  # words that so many pictures have, and not almost all
# Where an answer names a side, a mirrored picture would contradict it.
SIDES = re.compile(r"\b(left|right)\b|[左右]", re.IGNORECASE)
GUIDED = 0.3  # of the time: the guide's share
GUIDE_WIDTH, GUIDE_PIXELS, GUIDE_RATE = 64, 64, 3e-3
OWN, DENSE = 0.35, 2.0  # weight of the words beside the guide's prediction of them, and of what it sees at each patch
SHARPNESS = 4.0  # means over patches make small logits
BETAS, WEIGHT_DECAY, WARM_UP = (0.9, 0.98), 0.05, 0.05
REPORTS, MEASURED = 5, 512  # lines with the held-out figure over the run, and pictures that it is measured on
MOST_EPOCHS = 1 << 20  # more than anybody trains
MADE_BY = {"tower_by": "trainer/train_tower.py"}
STATE = resume.PROGRESS | {"seconds": resume.SECONDS, "guide": {"*": torch.Tensor}}


def parse_arguments(argv=None) -> Namespace:
    parser = ArgumentParser(description=__doc__, imports=True)
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
    add("--minutes", type=number(float, 0.01), default=6, help="how long to train")
    add("--steps", type=number(int, 1), help="optimizer steps, instead of minutes")
    add("--batch_size", type=number(int, 2), default=64, help="pictures a step")
    add("--learning_rate", type=number(float, 0), default=1e-3, help="the tower's peak; cosine decay to 1 %%")
    add("--seed", type=number(int, 0, 2**63 - 1), default=42, help="of initial weights, order and views")
    add("--device", help="cpu, cuda, cuda:N or mps (default: the best there is)")
    add("--num_workers", type=number(int, 0), default=min(8, cores()), help="processes that decode pictures")
    add("--from_resume", type=int, choices=(0, 1), help="1: resume a run that was stopped; 0: start over")
    args = parser.parse_args(argv)
    args.save_tower = args.save_tower.resolve()
    return args


class Pictures(Dataset):
    """The pictures of a data file's rows of one picture, and what the answers of each one's rows say.

    Of each picture `said` has the tokens of its answers, and the answers as tuples of them; `may_flip` is True where
    none of them says left or right.
    """

    def __init__(self, data: VLMDataset, tokenizer):
        data = data.changed(row_indices=data.row_indices[data.image_counts == 1])
        _, first, numbers = np.unique(data.first_pictures, return_index=True, return_inverse=True)
        self.rows = data.changed(row_indices=data.row_indices[first], leaves_small=True)  # one of each picture
        self.said, self.may_flip = [set() for _ in first], torch.ones(len(first), dtype=torch.bool)
        special = {*tokenizer.all_special_ids}
        for start in range(0, len(data), 1000):
            rows = data.read_rows(data.row_indices[start : start + 1000].tolist())
            for picture, row in zip(numbers[start : start + 1000].tolist(), rows, strict=True):
                labels = text_of(row)["labels"]
                answer = tuple(token for token in labels[labels >= 0].tolist() if token not in special)
                self.said[picture] |= {*answer, answer}
                self.may_flip[picture] &= SIDES.search(tokenizer.decode(answer)) is None

    def __getitems__(self, pictures: list[int]) -> tuple[list[int], torch.Tensor | None, list[str]]:
        """Returns those of the pictures that can be read, uint8 (pictures, 3, n, n), and why the others cannot."""
        samples = dict(zip(pictures, self.rows.__getitems__(pictures), strict=True))
        broken = [str(sample) for sample in samples.values() if isinstance(sample, PictureError)]
        pixels = {it: sample["pixel_values"] for it, sample in samples.items() if not isinstance(sample, PictureError)}
        return [*pixels], torch.cat([*pixels.values()]) if pixels else None, broken


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

    def targets(self, said: list[set]) -> torch.Tensor:
        """Returns (pictures, words): the weight of each picture's words, half of it on answers; rows sum to 1 or 0."""
        targets = torch.zeros(len(said), len(self.numbers))
        for row, words in zip(targets, said, strict=True):
            for kind in (tuple, int):
                known = [word for word in words if isinstance(word, kind) and word in self.numbers]
                total = sum(self.weights[word] for word in known)
                for word in known:
                    row[self.numbers[word]] = self.weights[word] / total
        return F.normalize(targets, p=1, dim=1)


def convolution(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.GELU()]


class Residual(nn.Sequential):
    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states + super().forward(states)


class Learner(nn.Module):
    """The tower with its heads, and the guide that it learns from: a small convolutional network."""

    is_guide = True  # whether the guide learns now, or the tower

    def __init__(self, tower: nn.Module, words: Words):
        super().__init__()
        width, count = GUIDE_WIDTH, len(words.numbers)
        self.guide = nn.Sequential(
            *convolution(3, width // 2, stride=2),
            *convolution(width // 2, width),
            nn.MaxPool2d(2),
            Residual(*convolution(width, width), *convolution(width, width)),
            *convolution(width, 2 * width),
            nn.MaxPool2d(2),
            Residual(*convolution(2 * width, 2 * width), *convolution(2 * width, 2 * width)),
            *convolution(2 * width, 4 * width),
        ).to(memory_format=torch.channels_last)
        self.guide_head = nn.Linear(4 * width, count)
        self.tower, self.words = tower, words
        self.head = nn.Linear(tower.settings.hidden_size, count)
        self.imitates = nn.Linear(tower.settings.hidden_size, 4 * width)

    def ask_guide(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the guide's logits of the words, and its map (images, width, 8, 8)."""
        small = F.interpolate(pixels, size=(GUIDE_PIXELS, GUIDE_PIXELS), mode="bilinear", antialias=True)
        seen = self.guide(small.contiguous(memory_format=torch.channels_last)).float()
        return self.guide_head(seen.amax((2, 3))) / 2, seen

    def forward(self, pixels: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Returns the cross-entropy of the guide; or the tower's, plus its distance from what the guide sees."""
        self.guide.train(self.is_guide)
        with torch.set_grad_enabled(self.is_guide):
            logits, seen = self.ask_guide(pixels)
        if self.is_guide:
            return F.cross_entropy(logits.float(), targets)
        count = self.tower.settings.patches
        seen = F.interpolate(seen, size=(math.isqrt(count),) * 2, mode="bilinear", antialias=True).flatten(2).mT
        seen = F.layer_norm(seen, seen.shape[-1:])
        patches = self.tower(pixel_values=pixels).last_hidden_state.float()[:, -count:]
        targets = OWN * targets + (1 - OWN) * logits.softmax(1)
        loss = F.cross_entropy(SHARPNESS * self.head(patches.mean(1)).float(), targets)
        return loss + DENSE * F.smooth_l1_loss(self.imitates(patches).float(), seen)


@dataclass
class TowerState(resume.TrainState):
    seconds: float = 0.0

    def done(self, args: Namespace) -> float:
        """Returns the share of the run done, by its steps or its minutes."""
        return min(1.0, self.step / args.steps if args.steps else self.seconds / 60 / args.minutes)


def load_tower(args: Namespace) -> nn.Module:
    """Loads the tower to start from, for pictures of --size, or draws random weights of the built-in tower's shape."""
    try:
        loaded = load_vision_tower(BUILTIN_TOWER_DIR if args.from_tower == NO_TOWER else args.from_tower)
    except TowerError as error:
        raise UsageError(str(error).replace("--vision_model_path", "--from_tower")) from error
    settings, config = loaded.settings, loaded.config
    if settings.kind not in ("CLIP", "SigLIP"):
        raise UsageError(f"--from_tower {display_path(args.from_tower)} is a {settings.kind}, neither CLIP nor SigLIP")
    size = args.size or (SMALL if args.from_tower in (NO_TOWER, BUILTIN_TOWER_DIR) else settings.size)
    if args.size and size % config.patch_size:
        raise UsageError(f"--size {size} is no multiple of the tower's patches of {config.patch_size} pixels")
    config.image_size = size
    tower = type(loaded)(config)
    tower.settings = replace(settings, config=config, picture_settings=settings.picture_settings | {"size": size})
    for name in ("pixel_mean", "pixel_std"):
        tower.register_buffer(name, getattr(loaded, name), persistent=False)
    if args.from_tower == NO_TOWER:
        return tower
    tensors = loaded.state_dict()
    [name] = [name for name in tensors if name.endswith("position_embedding.weight")]
    first, side = len(tensors[name]) - settings.patches, math.isqrt(settings.patches)
    class_token, grid = tensors[name][:first], tensors[name][first:].T.unflatten(1, (side, side))[None]
    grid = F.interpolate(grid, size=(size // config.patch_size,) * 2, mode="bilinear", antialias=True)
    tensors[name] = torch.cat((class_token, grid[0].flatten(1).T))
    tower.load_state_dict(tensors)
    return tower


def load_pictures(args: Namespace, tower: nn.Module, tokenizer) -> tuple[Pictures, Pictures, int]:
    """Loads the pictures to learn from, those held out, and the number of rows; UsageError for bad or too few ones."""
    form = PictureFormat(**tower.settings.picture_settings)
    how = args.images_path, tokenizer, MOST_TOKENS, tower.settings.patches, form
    found = [VLMDataset(path, *how) for path in (args.data_path, args.eval_data) if path]
    for data in found:
        if len(data.bad_rows) > data.bad_rows_limit(None):
            path, (line, reason) = display_path(data.data_path), data.bad_rows[0]
            hint = f"python -m dataset.check {path} lists all; --images_path names the pictures' folder"
            raise UsageError(f"{path}: {len(data.bad_rows)} rows are bad, line {line}: {reason}. {hint}")
    data, heldout = found if args.eval_data else hold_out(found[0])
    pictures, heldout = Pictures(data, tokenizer), heldout and Pictures(heldout, tokenizer)
    if len(pictures.rows) < args.batch_size:
        raise UsageError(
            f"{display_path(args.data_path)}: a tower needs at least {args.batch_size} pictures (--batch_size), and "
            f"there are {len(pictures.rows)} in rows of one picture"
        )
    if not heldout or not len(heldout.rows):
        raise UsageError("no picture is held out: name rows with pictures by --eval_data")
    return pictures, heldout, len(data)


@torch.no_grad()
def measure(learner: Learner, pictures: Pictures) -> str:
    """Returns how often the likeliest word is one of the picture's own, and how often the most frequent one is."""
    count, tower, logits = len(pictures.rows), learner.tower, []
    places = np.linspace(0, count - 1, min(count, MEASURED), dtype=int)
    shown, pixels, _ = pictures.__getitems__(places.tolist())
    if not shown:
        return "none of the pictures can be read"
    learner.guide.eval()
    for part in pixels.to(tower.device).split(64):
        if learner.is_guide:
            logits += [learner.ask_guide(normalise(part, None, tower.pixel_mean, tower.pixel_std))[0]]
        else:
            logits += [learner.head(encode_images(tower, part).mean(1))]
    own = learner.words.targets([pictures.said[picture] for picture in shown]) > 0
    right = own.gather(1, torch.cat(logits).argmax(1, keepdim=True).cpu()).float().mean()
    frequent = own[:, 0].float().mean()
    return f"likeliest word right {right:.1%} (always the most frequent word: {frequent:.1%})"


def rate(args: Namespace, done: float) -> float:
    """Returns guide's or tower's learning rate: a linear warm-up, then a cosine decay to 1 % of the peak."""
    if done < GUIDED:
        peak, done = GUIDE_RATE, done / GUIDED
    else:
        peak, done = args.learning_rate, (done - GUIDED) / (1 - GUIDED)
    if done < WARM_UP:
        return peak * (0.01 + 0.99 * done / WARM_UP)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, (done - WARM_UP) / (1 - WARM_UP)))))


def take_steps(args, context: TrainContext, pictures: Pictures, heldout: Pictures, state: TowerState, save):
    """Trains the guide, then the tower; raises Stopped on SIGINT or SIGTERM, after calling `save`."""
    learner, device, losses, named = context.loss.model, context.processes.device, [], set()
    words, tower = learner.words, learner.tower
    lengths, place = np.ones(len(pictures.rows)), (state.epoch, state.sample)  # all of one length: the order is random
    sampler = BatchSampler(lengths, args.batch_size, epochs=MOST_EPOCHS, seed=args.seed, start=place)
    batches = load_in_workers(pictures, args.num_workers, 4, batch_sampler=sampler, collate_fn=tuple)
    with stop_signals(speaks=True) as signals, worker_errors(args.num_workers), contextlib.closing(batches):
        for _, following, _ in sampler.steps():
            started, before = time.perf_counter(), state.done(args)
            if before == 1:
                break
            learner.is_guide, (shown, pixels, broken) = before < GUIDED, next(batches)
            for error in {*broken} - named:
                print(f"skipped, it cannot be read: {error}", flush=True)
            named |= {*broken}
            if shown:
                targets = words.targets([pictures.said[picture] for picture in shown]).to(device)
                views = random_views(pixels.to(device), tower.settings.size, pictures.may_flip[shown])
                views = normalise(views, None, tower.pixel_mean, tower.pixel_std)
                batch = {"pixels": views, "targets": targets, "units": 1}
                # What gets no gradient stays as it is: the tower while the guide learns, and then the guide.
                loss, is_bad = train_step(context, [batch], Counts(1, len(shown), 0, len(broken)), rate(args, before))
                if is_bad:
                    raise UsageError("nothing was learned: the loss is infinite or NaN; try a lower --learning_rate")
                losses.append(loss[0].item())
            state.advance(len(broken), len(shown), *following)
            state.seconds += time.perf_counter() - started
            done = state.done(args)
            is_due, stops = int(done * REPORTS) > int(before * REPORTS), signals.asked is not None and done < 1
            if is_due:
                if not losses:
                    raise UsageError(f"nothing was learned up to step {state.step:,}: none of the pictures can be read")
                who, loss = "guide" if learner.is_guide else "tower", f"loss {np.mean(losses):.3f}"
                figures, losses = measure(learner, heldout), []
                context.processes.log(f"  {done:4.0%}  {who}  step {state.step:,}  {loss}  held out: {figures}")
            if is_due or stops:
                save()
            if stops:
                print(f"stopped after step {state.step:,}, which is saved: {resume.RESUMES}", flush=True)
                raise Stopped(signals.asked)


def train(args: Namespace, processes: Processes) -> int:
    """Trains a tower and writes it; returns the number of rows. Raises Stopped on SIGINT or SIGTERM, after saving."""
    files = resume.RunFiles(args.save_tower.parent, args.save_tower.name)
    files.lock(is_main=True, flags=("--save_tower",))
    refuse_to_lose(args.save_tower, MADE_BY, overwrite=True, flag="--save_tower")
    torch.manual_seed(args.seed)
    tokenizer, tower, device = load_tokenizer(BUILTIN_TOKENIZER_DIR), load_tower(args), processes.device
    pictures, heldout, rows = load_pictures(args, tower, tokenizer)
    fingerprint = {name: str(vars(args)[name]) for name in ("batch_size", "learning_rate", "seed", "minutes", "steps")}
    fingerprint["data"] = pictures.rows.content_sha256
    fingerprint["pictures"] = sha256_of({"rows": torch.from_numpy(pictures.rows.row_indices)})
    fingerprint["starting tower"] = sha256_of(tower.state_dict())
    learner, state = Learner(tower, Words(pictures.said)).to(device), TowerState()
    dtype = pick_dtype(None, device, tower.config.hidden_size // tower.config.num_attention_heads)
    context = TrainContext(learner, lambda learner, batch: (learner(**batch), None), processes, dtype, grad_clip=1.0)
    context.optimizer.param_groups[0] |= {"betas": BETAS, "weight_decay": WEIGHT_DECAY}

    start = "random weights" if args.from_tower == NO_TOWER else display_path(args.from_tower)
    count, size, patches = len(pictures.rows), tower.settings.size, tower.settings.patches
    mirrored = pictures.may_flip.float().mean() / 2
    length = f"{args.steps:,} steps" if args.steps else f"{args.minutes:g} minutes"
    header = {
        "starts from": f"{start}: {tower.num_parameters() / 1e6:.2f} M parameters",
        "writes": display_path(args.save_tower),
        "data": f"{display_path(args.data_path)}: {count:,} pictures, {len(learner.words.numbers):,} words",
        "held out": f"{len(heldout.rows):,} pictures",
        "sees": f"{size} x {size} pixels, {patches} patches; random crops, {mirrored:.0%} of them mirrored",
        "time": f"{length} in batches of {args.batch_size}, {device.type.upper()}, {str(dtype).removeprefix('torch.')}",
    }
    processes.log("stage 0: the tower learns your pictures by the words of their answers")
    for name, value in header.items():
        processes.log(f"  {name:<13} {value}")

    if (saved := resume.read_state(path := files.state, STATE, args.from_resume, print)) is not None:
        resume.check_same_run(saved, fingerprint, count, path)
        load_learned(learner, saved, path)
        try:
            learner.guide.load_state_dict(saved["guide"])
        except RuntimeError as error:
            raise UsageError(f"{display_path(path)} is damaged: --from_resume 0 starts over ({error})") from error
        context.load_state_dict(saved)
        resume.restore_random_state(saved["random"], 0, device)
        state.load_state_dict(saved)
        processes.log(f"  resumes       after step {state.step:,}")

    def save():
        saved = state.state_dict() | context.state_dict() | {"random": [resume.random_state(device)]}
        saved["learned"] = {name: weight.detach() for name, weight in learner.named_parameters()}
        saved["guide"] = learner.guide.state_dict()  # with what its batch norms have seen
        saved |= {"fingerprint": fingerprint, "arguments": {"epochs": str(MOST_EPOCHS)}}
        write_atomically(path, lambda file: torch.save(saved, file))

    take_steps(args, context, pictures, heldout, state, save)
    write_tower(args, tower, files)
    path.unlink(missing_ok=True)
    return rows


def write_tower(args: Namespace, tower: nn.Module, files: resume.RunFiles):
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
        if files.keep_aside(""):  # models that were trained with it still need it
            print(f"kept the earlier tower as {display_path(files.aside)}")


def main():
    args, started = parse_arguments(), time.perf_counter()
    quiet_libraries(True)
    with Processes.start(args.device) as processes:
        if processes.world_size > 1:
            raise UsageError("a tower is trained by one process: leave torchrun out")
        epochs = epochs_for("pretrain", train(args, processes))
    print(f"done in {clock(time.perf_counter() - started)}: {display_path(args.save_tower)}")
    name = re.sub(r"\W+", "_", args.save_tower.name).removesuffix("_tower")
    following = {"from_weight": "llm", "data_path": args.data_path, "images_path": args.images_path}
    following |= {"eval_data": args.eval_data, "vision_model_path": args.save_tower}
    following |= {"save_weight": f"{name}_pretrain", "epochs": epochs, "import": args.imported}
    print(f"next: {command('trainer/train_pretrain_vlm.py', following)}")


if __name__ == "__main__":
    run_script(main)
