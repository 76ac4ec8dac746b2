"""The training loop, the same for every stage: `train` is the run around the optimizer steps of trainer/step.py."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from common.errors import UsageError
from common.paths import display_path
from dataset.features import FeatureFolder, compute_features
from dataset.lm_dataset import VLMDataset
from dataset.sampler import BatchSampler
from dataset.workers import load_in_workers, worker_errors
from model.model_vlm import MiniMindVLM
from trainer.report.header import print_header
from trainer.report.health import BadSteps, UnreadableImages, check_first_loss, report_if_due
from trainer.report.progress import Progress, clock
from trainer.report.watcher import Watch
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
from trainer.step import count, make_context, train_step
from trainer.support.capture import CapturedStep
from trainer.support.compilation import LENGTH_MULTIPLE, compile_or_not
from trainer.support.prefetch import on_device
from trainer.support.signals import StopSignals


def train(run: Run, model: MiniMindVLM, data: VLMDataset, heldout: VLMDataset | None = None):
    """Trains what is not frozen; writes weights, checkpoints and metrics on the way, and measures on `heldout`.

    Raises:
        Stopped: If a signal asked for it; the run is saved then.
        UsageError: If it cannot continue, as where the last save fails.
    """
    args, processes, device = run.args, run.processes, run.device
    if data.picture_count == 0 and not any(weight.requires_grad for weight in model.model.parameters()):
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
    context = make_context(model, run.stage.loss, processes, run.dtype, args.grad_clip, forward)
    print_header(run, model, data, heldout, features, total_steps, eval_interval, forward is not model)
    if run.state is not None:
        context.load_state_dict(run.state)
        changed = changed_settings(run.state, args, processes.world_size)
        run.log(f"  resumes      after step {state.step:,}, {total_steps - state.step:,} to go{changed}")
        if processes.is_main and (warning := changed_pictures(run.state, data)):
            run.log(warning)
    if features is not None:
        encode_once(run, model, data, features)
    take_step = CapturedStep(train_step, context, args.batch_size) if run.captures else partial(train_step, context)
    watch = Watch(run, model, data, heldout, eval_interval, state.step)
    seed_dropout(run)
    multiple = LENGTH_MULTIPLE if forward is not model else 1
    collate = run.stage.collator(run.config.pad_token_id, multiple)
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
                learning_rate = run.stage.schedule(args, sampler.done(epoch, first_sample))
                losses, is_bad = take_step(micro_batches, counts, learning_rate)
                unreadable.note(micro_batches)
                state.advance(counts.skipped, counts.units, *sampler.after(epoch, first_sample))
                if state.step == 1:
                    check_first_loss(run, losses)
                    keep_earlier_run(run)
                bad_steps.add(is_bad)
                progress.add(losses, counts.samples, counts.tokens, data_seconds)
                report_if_due(run, progress, state, epoch + 1, learning_rate, bad_steps)
                watch.measure_if_due(progress, state.step, epoch + 1)
                save_if_due(checkpoints, state, (context, bad_steps, progress), signals.asked, total_steps)
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
    data: VLMDataset, sampler: BatchSampler, collate: Callable, device: torch.device, num_workers: int
) -> Iterator[dict]:
    """Yields this rank's micro-batches, on the device."""
    batches = load_in_workers(
        data.leaving_small_pictures() if device.type == "cuda" else data,
        num_workers,
        batch_sampler=sampler,
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        prefetch_factor=4,
    )
    return on_device(batches, device)


def finish(run: Run, state: TrainState, progress: Progress, watch: Watch):
    """Writes the run's page, and says what comes next."""
    if state.skipped_pictures:
        progress.log(f"{state.skipped_pictures} sample(s) were skipped, see {display_path(run.files.bad_rows)}")
    watch.finish(progress, state.step)
    progress.log(f"done in {clock(time.perf_counter() - run.started)}: {display_path(run.files.weights)}")
    name = run.args.save_weight
    sft = name.replace("pretrain", "sft") if "pretrain" in name else f"{name}_sft"
    progress.log(f"next: {run.stage.following.format(save_weight=name, sft_weight=sft)}")
