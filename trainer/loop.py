"""The training loop, the same for every stage: `train` is the run around the optimizer steps of trainer/step.py."""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch

from common.errors import Stopped
from common.paths import display_path
from dataset.features import FeatureFolder, compute_features
from dataset.lm_dataset import PictureError, VLMDataset
from dataset.sampler import BatchSampler
from dataset.workers import load_in_workers, worker_errors
from model.model_vlm import MiniMindVLM
from trainer.report.progress import Progress, check_first_loss, clock
from trainer.report.watcher import Watch, describe_features, print_header
from trainer.resume import RESUMES, Checkpoints, TrainState, keep_earlier_run, report_resume, restore_random_state
from trainer.setup import Run, open_features, round_frozen_weights
from trainer.stage import next_command
from trainer.step import TrainContext, count, make_context, train_step
from trainer.support.capture import CapturedStep
from trainer.support.compilation import LENGTH_MULTIPLE, compile_or_not
from trainer.support.prefetch import on_device
from trainer.support.signals import StopSignals


def train(run: Run, model: MiniMindVLM, data: VLMDataset, heldout: VLMDataset | None = None):
    """Trains the unfrozen parameters; saves, logs, and evaluates on `heldout`.

    Raises Stopped on SIGINT or SIGTERM, after saving, and UsageError if it cannot continue: the last save failed.
    """
    args, stage, processes, device = run.args, run.stage, run.processes, run.device
    share = processes.rank, processes.world_size
    sampler = BatchSampler(data.lengths, args.batch_size, args.accumulation_steps, args.epochs, args.seed, *share)
    state = TrainState()
    if run.state is not None:
        state.load_state_dict(run.state)
        sampler.start_at(state.epoch, state.sample)
    total_steps = state.step + len(sampler) // args.accumulation_steps
    eval_interval = args.eval_interval or math.ceil(total_steps / 10)
    settings = run.settings | {"eval_interval": eval_interval}

    companions = stage.companions(args, model)  # before a checkpoint replaces the starting weights
    checkpoints = Checkpoints(run, model, companions, data, settings)
    round_frozen_weights(model, run.dtype)
    model.to(device).train()
    companions = {name: it.to(device) if isinstance(it, torch.nn.Module) else it for name, it in companions.items()}
    loss = partial(stage.loss, **companions)
    collate = stage.collator(run.config.pad_token_id, LENGTH_MULTIPLE if run.compiles else 1)
    context, take_step, is_compiled = make_step(run, model, loss, collate, data)
    measured = heldout, model, loss, collate, processes, run.dtype, args.batch_size
    evaluator = None if heldout is None else stage.evaluator(*measured)
    watch = Watch(run, model, evaluator, heldout or data, eval_interval, state.step)
    features = open_features(run, data, checkpoints.tower_sha256)
    an_epoch = math.ceil(len(data) / sampler.group)
    lines = {"data": data.summary, "held_out": watch.plan, "features": describe_features(features, data)}
    lines["steps"] = f"{total_steps:,} of {sampler.group} samples ({an_epoch:,} an epoch)"
    print_header(run, model, is_compiled, **lines)
    if run.state is not None:
        context.load_state_dict(run.state)
        report_resume(run, state.step, total_steps, data)
    if features is not None:
        data = encode_once(run, model, data, features)
    torch.manual_seed(args.seed + processes.rank)  # for dropout
    if run.state is not None:
        restore_random_state(run.state["random"], processes.rank, device)
    batches = load_batches(data, sampler, collate, device, args.num_workers)
    with (
        contextlib.closing(Progress(run, total_steps, state.step, settings)) as progress,
        contextlib.closing(batches),
    ):
        with StopSignals(speaks=processes.is_main) as signals, worker_errors(args.num_workers):
            for epoch, first_sample in sampler.steps():
                started = time.perf_counter()
                micro_batches = [next(batches) for _ in range(args.accumulation_steps)]
                data_seconds = time.perf_counter() - started
                counts = count(micro_batches, processes)
                learning_rate = stage.schedule(args, sampler.done(epoch, first_sample), state.step)
                losses, is_bad = take_step(micro_batches, counts, learning_rate)
                progress.name_unreadable(micro_batches)
                state.advance(counts.skipped, counts.units, *sampler.after(epoch, first_sample))
                if state.step == 1:
                    check_first_loss(run, losses)
                    keep_earlier_run(run)
                progress.add(losses, is_bad, counts.samples, counts.tokens, data_seconds)
                progress.report_if_due(state, epoch + 1, learning_rate)
                watch.measure_if_due(progress, state.step, epoch + 1)
                [stops] = processes.sum(signals.asked is not None)  # ranks stay in step: a signal on any stops all
                is_due = state.step % args.save_interval == 0 or state.sample == 0  # also at the end of an epoch
                if is_due or stops:
                    checkpoints.save((state, context, progress), stops or state.step == total_steps)
                if stops and state.step < total_steps:
                    progress.log(f"stopped after step {state.step:,} of {total_steps:,}, which is saved: {RESUMES}")
                    raise Stopped(signals.asked or signal.SIGTERM)
        finish(run, state, progress, watch, data)


def make_step(
    run: Run, model: MiniMindVLM, loss: Callable, collate: Callable, data: VLMDataset
) -> tuple[TrainContext, Callable, bool]:
    """Returns the TrainContext, the step function (plain or captured), and whether the model is compiled."""
    args, forward = run.args, model
    if run.compiles:
        batches = extreme_batches(data, args.batch_size, collate, run.device)
        forward = compile_or_not(model, loss, batches, run.dtype, run.log)
    context = make_context(model, loss, run.processes, run.dtype, args.grad_clip, forward)
    take_step = partial(train_step, context)
    if run.captures and run.stage.pad is not None:
        take_step = CapturedStep(train_step, context, partial(run.stage.pad, batch_size=args.batch_size))
    return context, take_step, forward is not model


def extreme_batches(data: VLMDataset, batch_size: int, collate: Callable, device: torch.device) -> list[dict]:
    """Returns the full batches of the shortest and of the longest rows, on the device; of rows with pictures first."""
    data, batches = as_loaded(data, device), []
    lengths, is_text = data.lengths, data.image_counts == 0
    for order in (np.lexsort((lengths, is_text)), np.lexsort((-lengths, is_text))):
        samples = data.__getitems__(order[: 2 * batch_size].tolist())  # some pictures may be broken
        readable = [sample for sample in samples if not isinstance(sample, PictureError)]
        batches.append(collate(readable[:batch_size]))
    return [batch for batch in on_device(batches, device) if batch["units"]]


def as_loaded(data: VLMDataset, device: torch.device) -> VLMDataset:
    """Returns the rows as batches are loaded from them: a GPU enlarges small pictures itself."""
    return data.changed(leaves_small=True) if device.type == "cuda" else data


def encode_once(run: Run, model: MiniMindVLM, data: VLMDataset, features: FeatureFolder) -> VLMDataset:
    """Computes missing features, split over ranks; returns the data set that yields them."""
    compute_features(data, features, model.encode_images, run.device, *run.processes.local_share)
    run.processes.barrier(patient=True)
    return data.changed(features=features)


def load_batches(
    data: VLMDataset, sampler: BatchSampler, collate: Callable, device: torch.device, num_workers: int
) -> Iterator[dict]:
    """Yields this rank's micro-batches, on the device."""
    batches = load_in_workers(
        as_loaded(data, device),
        num_workers,
        batch_sampler=sampler,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        prefetch_factor=4,
    )
    return on_device(batches, device)


def finish(run: Run, state: TrainState, progress: Progress, watch: Watch, data: VLMDataset):
    """Writes the run's page, and says what comes next."""
    if state.skipped_pictures:
        progress.log(f"{state.skipped_pictures} sample(s) were skipped, see {display_path(run.files.bad_rows)}")
    watch.finish(progress, state.step)
    progress.log(f"done in {clock(time.perf_counter() - run.started)}: {display_path(run.files.weights)}")
    progress.log(f"next: {next_command(run.stage.following, run.args, data)}")
