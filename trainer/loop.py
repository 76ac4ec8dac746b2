"""The training loop, the same for every stage: `train_step` is one optimizer step, `train` the run around it."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from common.errors import UsageError
from common.paths import display_path
from dataset.features import FeatureFolder, compute_features
from dataset.lm_dataset import VLMCollator, VLMDataset
from dataset.sampler import BatchSampler
from dataset.workers import load_in_workers, worker_errors
from model.model_vlm import MiniMindVLM
from trainer.resume import (
    Checkpoints,
    TrainState,
    changed_pictures,
    changed_settings,
    keep_earlier_run,
    restore_random_state,
    save_if_due,
)
from trainer.setup import Run, open_features, round_frozen_weights
from trainer.support.capture import IMAGE_INPUTS, MODEL_INPUTS, CapturedStep
from trainer.support.compilation import LENGTH_MULTIPLE, compile_or_not
from trainer.support.gradients import GradientSums
from trainer.support.prefetch import on_device
from trainer.support.processes import Processes
from trainer.support.signals import StopSignals
from trainer.watch.header import print_header
from trainer.watch.health import BadSteps, UnreadableImages, check_first_loss, report_if_due
from trainer.watch.progress import Progress, clock, open_progress
from trainer.watch.watcher import Watch
from trainer.weights import learned_parameters


def answer_loss(model, inputs: dict) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the cross-entropy summed over the learned tokens, and the experts' balancing loss (None without)."""
    output = model(**inputs, num_items_in_batch=1)
    return output.loss, output.aux_loss


def cosine_learning_rate(peak: float, done: float) -> float:
    """Falls from `peak` at 0 of the run done to a tenth of it at 1, along half a cosine."""
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done))))


@dataclass(frozen=True)
class Learner:
    """What a step works on: the model as it is called (compiled or not), its loss, and what moves its weights."""

    model: Callable
    loss: Callable
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    gradients: GradientSums
    processes: Processes
    dtype: torch.dtype
    grad_clip: float

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """What learns."""
        return self.optimizer.param_groups[0]["params"]

    def state_dict(self) -> dict:
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict):
        # Its groups are this run's: the state may come from another kind of device.
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state["optimizer"]["state"]})
        if state["scaler"].keys() == self.scaler.state_dict().keys():  # not of a run in another precision
            self.scaler.load_state_dict(state["scaler"])


@dataclass(frozen=True)
class Counts:
    """What an optimizer step consists of, summed over its micro-batches and all ranks."""

    learned: int | torch.Tensor  # a tensor where the step is captured
    samples: int
    tokens: int
    skipped: int


def make_learner(
    model: MiniMindVLM, loss: Callable, processes: Processes, dtype: torch.dtype, grad_clip: float, forward=None
) -> Learner:
    """Returns AdamW over what learns, and a gradient scaler for float16; `forward` is the model, compiled or not."""
    device = processes.device.type
    learned = learned_parameters(model)
    optimizer = torch.optim.AdamW(learned.values(), fused=device in ("cpu", "cuda"), capturable=device == "cuda")
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    as_used = sorted(learned, key=lambda name: not name.startswith("vision_proj."))
    gradients = GradientSums([learned[name] for name in as_used], processes)
    return Learner(forward or model, loss, optimizer, scaler, gradients, processes, dtype, grad_clip)


def train_step(
    learner: Learner, micro_batches: list[dict], counts: Counts, learning_rate: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Takes one optimizer step over all ranks.

    Its gradient is that of the mean loss over all learned tokens of the step, however they are divided into
    micro-batches and ranks. A step whose loss or gradient is not finite leaves the weights as they are.

    Returns:
        (2,) summed loss and learned tokens, zeros for a skipped step; and whether it was skipped. Neither is synced.
    """
    optimizer, scaler, device = learner.optimizer, learner.scaler, learner.processes.device
    loss_sum = torch.zeros(1, device=device)
    micro_batches = [batch for batch in micro_batches if len(batch["learned_positions"])]
    if not micro_batches and counts.learned == 0:  # no step: even a zero gradient would move AdamW's weights
        return torch.zeros(2, device=device), torch.zeros((), dtype=torch.bool, device=device)
    for batch in micro_batches:
        inputs = {name: batch[name] for name in MODEL_INPUTS} | {"image_features": image_features(learner.model, batch)}
        with torch.autocast(device.type, learner.dtype, enabled=learner.dtype != torch.float32):
            loss, aux_loss = learner.loss(learner.model, inputs)
        loss_sum += loss.detach()
        # Each backward() adds to the gradient, so divide by the learned tokens of the whole step, of all ranks.
        loss = loss / counts.learned
        if aux_loss is not None:
            loss = loss + aux_loss * (len(batch["input_ids"]) / counts.samples)
        learner.gradients.is_last_backward = batch is micro_batches[-1]
        if loss.requires_grad:  # not where only the projection learns and the micro-batch has no image
            scaler.scale(loss).backward()
    learner.gradients.finish(loss_sum)
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.get_total_norm([weight.grad for weight in learner.parameters])
    if learner.grad_clip > 0:
        torch.nn.utils.clip_grads_with_norm_(learner.parameters, learner.grad_clip, norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    is_bad = ~loss_sum.isfinite().all()
    if scaler.is_enabled():
        scaler.step(optimizer)  # skips steps by itself: overflowing gradients are how it finds its scale
        scaler.update()
    else:
        is_bad = is_bad | ~norm.isfinite()
        step_unless(is_bad, optimizer)
    optimizer.zero_grad(set_to_none=True)
    losses = torch.cat((loss_sum, torch.ones_like(loss_sum) * counts.learned))
    return torch.where(is_bad, 0.0, losses), is_bad


def image_features(model, batch: dict) -> torch.Tensor:
    """Returns a batch's (images, patches, width): as they were kept, or encoded now."""
    if "image_features" not in batch:
        return model.encode_images(batch["pixel_values"])
    features = batch["image_features"]
    if "pixel_values" in batch:  # one by one, as compute_features does, for the same bits
        encoded = [model.encode_images(pixels) for pixels in batch["pixel_values"].split(1)]
        features[batch["unencoded"]] = torch.cat(encoded).to(features.dtype)
    return features


def step_unless(is_bad: torch.Tensor, optimizer: torch.optim.Optimizer):
    """Steps unless `is_bad`. The fused kernel reads it on the device, so no sync is needed."""
    if optimizer.defaults["fused"]:
        optimizer.found_inf = is_bad.float()
        optimizer.step()
    elif not is_bad:
        optimizer.step()


def count(micro_batches: list[dict], processes: Processes) -> Counts:
    """Sums what a step consists of over all ranks."""
    counts = processes.sum(
        sum(len(batch["learned_positions"]) for batch in micro_batches),
        sum(len(batch["input_ids"]) for batch in micro_batches),
        sum(batch["tokens"] for batch in micro_batches),
        sum(len(batch["skipped"]) for batch in micro_batches),
    )
    return Counts(*map(int, counts))


def train(run: Run, model: MiniMindVLM, data: VLMDataset, heldout: VLMDataset | None = None):
    """Trains what is not frozen; writes weights, checkpoints and metrics on the way, and measures on `heldout`.

    Raises:
        Stopped: If a signal asked for it; the run is saved then.
        UsageError: If it cannot continue, as where the last save fails.
    """
    args, processes, device = run.args, run.processes, run.device
    if data.picture_count == 0 and all(name.startswith("vision_proj.") for name in learned_parameters(model)):
        raise UsageError(
            f"no row of {display_path(args.data_path)} has a picture, and only the projection would learn, which such "
            "rows do not reach: name rows with pictures by --data_path, or let the decoder learn (--freeze_llm none)"
        )
    share = processes.rank, processes.world_size
    sampler = BatchSampler(data.lengths, args.batch_size, args.accumulation_steps, args.epochs, args.seed, *share)
    state, bad_steps, unreadable = TrainState(), BadSteps(device), UnreadableImages(run.files.bad_rows)
    if run.state is not None:
        state.load_state_dict(run.state)
        bad_steps.load_state_dict(run.state)
        sampler.start_at(state.epoch, state.sample)
    total_steps = state.step + len(sampler) // args.accumulation_steps
    eval_interval = args.eval_interval or math.ceil(total_steps / 10)
    settings = vars(args) | {"eval_interval": eval_interval, "compile": run.compiles}
    checkpoints = Checkpoints(run, model, data, settings)
    round_frozen_weights(model, run.dtype)
    model.to(device).train()
    features = open_features(run, data, checkpoints.tower_sha256)
    forward = compile_or_not(model, data, args.batch_size, device, run.dtype, run.log) if run.compiles else model
    learner = make_learner(model, run.stage.loss, processes, run.dtype, args.grad_clip, forward)
    print_header(run, model, data, heldout, features, total_steps, eval_interval, forward is not model)
    if run.state is not None:
        learner.load_state_dict(run.state)
        changed = changed_settings(run.state, args, processes.world_size)
        run.log(f"  resumes      after step {state.step:,}, {total_steps - state.step:,} to go{changed}")
        if processes.is_main and (warning := changed_pictures(run.state, data)):
            run.log(warning)
    if features is not None:
        encode_once(run, model, data, features)
    take_step = CapturedStep(train_step, learner, args.batch_size) if run.captures else partial(train_step, learner)
    watch = Watch(run, model, data, heldout, eval_interval, state.step)
    seed_dropout(run)
    multiple = LENGTH_MULTIPLE if forward is not model else 1
    batches = load_batches(data, sampler, device, args.num_workers, run.config.pad_token_id, multiple)
    with (
        contextlib.closing(open_progress(run, state.step, total_steps, settings)) as progress,
        contextlib.closing(batches),
    ):
        with StopSignals(speaks=processes.is_main) as signals, worker_errors(args.num_workers):
            for epoch, first_sample in sampler.steps():
                started = time.perf_counter()
                micro_batches = [next(batches) for _ in range(args.accumulation_steps)]
                data_seconds = time.perf_counter() - started
                counts = count(micro_batches, processes)
                learning_rate = cosine_learning_rate(args.learning_rate, sampler.done(epoch, first_sample))
                losses, is_bad = take_step(micro_batches, counts, learning_rate)
                unreadable.note(micro_batches)
                state.advance(counts.skipped, counts.learned, *sampler.after(epoch, first_sample))
                if state.step == 1:
                    check_first_loss(run, model, losses)
                    keep_earlier_run(run)
                bad_steps.add(is_bad)
                progress.add(losses, counts.samples, counts.tokens, data_seconds)
                report_if_due(run, progress, state, epoch + 1, learning_rate, bad_steps)
                watch.measure_if_due(progress, state.step, epoch + 1)
                save_if_due(checkpoints, state, (learner, bad_steps, progress), signals.asked, total_steps)
        finish(run, state, progress, watch)


def encode_once(run: Run, model: MiniMindVLM, data: VLMDataset, features: FeatureFolder):
    """Computes what is missing of the tower's features, ranks sharing the work; `data` yields them from then on."""
    workers = run.args.num_workers
    with worker_errors(workers):
        compute_features(data, features, model.encode_images, run.device, workers, *run.processes.local_share)
    run.processes.barrier(patient=True)
    data.use_features(features)


def seed_dropout(run: Run):
    """Seeds each rank by its own number, or as it was where the run resumes."""
    torch.manual_seed(run.args.seed + run.processes.rank)
    if run.state is not None:
        restore_random_state(run.state["random"], run.processes.rank, run.device)


def load_batches(
    data: VLMDataset,
    sampler: BatchSampler,
    device: torch.device,
    num_workers: int,
    pad_token_id: int,
    length_multiple: int,
) -> Iterator[dict]:
    """Yields this rank's micro-batches, on the device, their lengths rounded up to a multiple."""
    batches = load_in_workers(
        data.leaving_small_pictures() if device.type == "cuda" else data,
        num_workers,
        batch_sampler=sampler,
        collate_fn=VLMCollator(pad_token_id, length_multiple),
        pin_memory=device.type == "cuda",
        prefetch_factor=4,
    )
    return on_device(batches, device, MODEL_INPUTS + IMAGE_INPUTS)


def finish(run: Run, state: TrainState, progress: Progress, watch: Watch):
    """Writes the run's page, and says what comes next."""
    if state.skipped_pictures:
        progress.log(f"{state.skipped_pictures} sample(s) were skipped, see {display_path(run.files.bad_rows)}")
    watch.finish(progress, state.step)
    progress.log(f"done in {clock(time.perf_counter() - run.started)}: {display_path(run.files.weights)}")
    name = run.args.save_weight
    sft = name.replace("pretrain", "sft") if "pretrain" in name else f"{name}_sft"
    progress.log(f"next: {run.stage.following.format(save_weight=name, sft_weight=sft)}")
