"""The training loop, the same for every stage: `train` is the run around the optimizer steps of trainer/step.py."""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from common.cli import command
from common.errors import Stopped
from common.paths import DATA_NAMES, DATASET_DIR, SAVE_DIR, display_path
from dataset.features import compute_features
from dataset.lm_dataset import PictureError, VLMDataset
from dataset.sampler import BatchSampler, load_in_workers, worker_errors
from model.model_vlm import MiniMindVLM
from trainer.bundles import BUILTIN, epochs_for
from trainer.report.progress import Progress, check_first_loss, clock
from trainer.report.watcher import Watch, print_header
from trainer.resume import RESUMES, Checkpoints, TrainState, restore_random_state
from trainer.setup import Run, open_features, round_frozen_weights
from trainer.step import TrainContext, count, train_step
from trainer.support.fast_steps import LENGTH_MULTIPLE, CapturedStep, compile_or_not
from trainer.support.processes import on_device, ranks, stop_signals


def train(run: Run, model: MiniMindVLM, data: VLMDataset, heldout: VLMDataset | None = None):
    """Trains and evaluates; raises Stopped on SIGINT or SIGTERM, after saving; UsageError if the last save failed."""
    args, stage, processes, device = run.args, run.stage, run.processes, run.device
    state = TrainState()
    if run.state is not None:
        state.load_state_dict(run.state)
    place = processes.rank, processes.world_size, (state.epoch, state.sample)
    sampler = BatchSampler(data.lengths, args.batch_size, args.accumulation_steps, args.epochs, args.seed, *place)
    total_steps = state.step + len(sampler) // args.accumulation_steps
    eval_interval = args.eval_interval or math.ceil(total_steps / 10)
    settings = run.settings | {"eval_interval": eval_interval}

    companions = stage.companions(args, model)  # before a checkpoint replaces the starting weights
    checkpoints = Checkpoints(run, model, companions, data, settings)
    round_frozen_weights(model, run.dtype)
    model.to(device).train()
    companions = {name: it.to(device) if isinstance(it, torch.nn.Module) else it for name, it in companions.items()}
    loss, metric = (partial(it, **companions) for it in (stage.loss, stage.metric or stage.loss))
    collate = stage.collator(run.config.pad_token_id, LENGTH_MULTIPLE if run.compiles else 1)
    context, take_step, is_compiled = make_step(run, model, loss, collate, data)
    how = metric, collate, processes, run.dtype, args.batch_size
    evaluator = None if heldout is None else stage.evaluator(heldout, model, *how)
    watch = Watch(run, model, evaluator, heldout or data, eval_interval)
    features = open_features(run, data, checkpoints.tower_key)
    steps = f"{total_steps:,} of {sampler.group} samples ({math.ceil(len(data) / sampler.group):,} an epoch)"
    print_header(watch, data, features, steps, is_compiled)
    torch.manual_seed(args.seed + processes.rank)  # for dropout
    if run.state is not None:
        context.load_state_dict(run.state)
        checkpoints.report_resume(state.step, total_steps)
        restore_random_state(run.state["random"], processes.rank, device)
    if features is not None:  # those that are missing, split over this machine's ranks
        _, _, *local_share = ranks()
        compute_features(data, features, model.encode_images, device, *local_share)
        processes.barrier(patient=True)
        data = data.changed(features=features)
    batches = load_batches(data, sampler, collate, device, args.num_workers)
    progress = Progress(run, total_steps, state.step, settings)
    with contextlib.closing(progress), contextlib.closing(batches):
        with stop_signals(speaks=processes.is_main) as signals, worker_errors(args.num_workers):
            for (epoch, _), following, done in sampler.steps():
                started = time.perf_counter()
                micro_batches = [next(batches) for _ in range(args.accumulation_steps)]
                data_seconds = time.perf_counter() - started
                counts = count(micro_batches, processes)
                learning_rate = stage.schedule(args, done, state.step)
                losses, is_bad = take_step(micro_batches, counts, learning_rate)
                progress.name_unreadable(micro_batches)
                state.advance(counts.skipped, counts.units, *following)
                if state.step == 1:
                    check_first_loss(run, losses)
                    if processes.is_main:
                        run.files.keep_reports_aside(args.from_resume == 0, run.log)
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


def make_step(run: Run, model: MiniMindVLM, loss: Callable, collate: Callable, data: VLMDataset) -> tuple:
    """Returns the TrainContext, the step function (plain or captured), and whether the model is compiled."""
    args, config, forward = run.args, run.config, model
    if run.compiles:
        batches = extreme_batches(data, args.batch_size, collate, run.device)
        forward = compile_or_not(model, loss, batches, run.dtype, run.log)
    context = TrainContext(model, loss, run.processes, run.dtype, args.grad_clip, forward)
    # Experts, scaler, dropout and other ranks need the host in each step, and so may another language model.
    needs_host = config.use_moe or run.dtype == torch.float16 or config.dropout or config.llm is not None
    needs_host = needs_host or run.processes.world_size > 1
    take_step = partial(train_step, context)
    if args.capture and run.device.type == "cuda" and run.stage.pad is not None and not needs_host:
        take_step = CapturedStep(train_step, context, partial(run.stage.pad, batch_size=args.batch_size))
    return context, take_step, forward is not model


def extreme_batches(data: VLMDataset, batch_size: int, collate: Callable, device: torch.device) -> list[dict]:
    """Returns the full batches of the shortest and of the longest rows, on the device; of rows with pictures first."""
    data, batches = data.changed(leaves_small=device.type == "cuda"), []
    lengths, is_text = data.lengths, data.image_counts == 0
    for order in (np.lexsort((lengths, is_text)), np.lexsort((-lengths, is_text))):
        samples = data.__getitems__(order[: 2 * batch_size].tolist())  # some pictures may be broken
        readable = [sample for sample in samples if not isinstance(sample, PictureError)]
        batches.append(collate(readable[:batch_size]))
    return [batch for batch in on_device(batches, device) if batch["units"]]


def load_batches(
    data: VLMDataset, sampler: BatchSampler, collate: Callable, device: torch.device, num_workers: int
) -> Iterator[dict]:
    """Yields this rank's micro-batches, on the device."""
    is_cuda = device.type == "cuda"
    data = data.changed(leaves_small=is_cuda)  # a GPU enlarges small pictures itself
    how = {"batch_sampler": sampler, "collate_fn": collate, "pin_memory": is_cuda, "prefetch_factor": 4}
    return on_device(load_in_workers(data, num_workers, **how), device)


def finish(run: Run, state: TrainState, progress: Progress, watch: Watch, data: VLMDataset):
    """Writes the run's page, and says what comes next: the next stage on the same rows, or questions to the model."""
    if state.skipped_pictures:
        progress.log(f"{state.skipped_pictures} sample(s) were skipped, see {display_path(run.files.bad_rows)}")
    watch.finish(progress, state.step)
    progress.log(f"done in {clock(time.perf_counter() - run.started)}: {display_path(run.files.weights)}")
    args, name = run.args, run.args.save_weight
    published = [DATASET_DIR / form.format(stage) for form in DATA_NAMES for stage in ("pretrain", "sft")]
    is_own = not run.learns_scenes and args.data_path not in published
    images = None if args.images_path in (None, args.data_path.parent) else args.images_path
    heldout = None if args.eval_data == "none" else args.eval_data
    save_dir = None if args.save_dir == SAVE_DIR else args.save_dir
    if run.stage.following == "eval_vlm.py":
        flags = {"weight": name, "save_dir": save_dir}
        if is_own and heldout:
            flags |= {"eval_data": heldout, "images_path": args.eval_images_path or images}
        elif is_own and not data.is_parquet and data.image_count:
            question = watch.samples[0]["prompt"].replace("\n", "\\n") if watch.samples else ""
            flags["image_dir"] = data.picture_source(data.first_pictures.max())[0].parent
            flags["prompt"] = question or None
        elif is_own:
            flags["chat"] = True
    else:
        stage, following = run.stage.name, Path(run.stage.following).stem.removeprefix("train_").removesuffix("_vlm")
        following_name = name.replace(stage, following) if stage in name else f"{name}_{following}"
        flags = {"from_weight": name, "save_weight": following_name, "save_dir": save_dir}
        if is_own:
            flags |= {"data_path": args.data_path, "images_path": images, "eval_data": heldout}
            flags["eval_images_path"] = args.eval_images_path
            flags["epochs"] = epochs_for(following, len(data)) if run.bundle is BUILTIN else None
    flags["import"] = args.imported
    progress.log(f"next: {command(run.stage.following, flags)}", wraps=False)  # it is to be pasted
