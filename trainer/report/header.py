"""What a run is about to do, printed before its first step."""

import math
import shutil
import sys
import textwrap
from pathlib import Path

import torch

from common.paths import display_path
from dataset.features import FeatureFolder
from dataset.lm_dataset import VLMDataset
from model.model_vlm import MiniMindVLM
from trainer.setup import Run

FEW_ROWS = 30


def print_header(
    run: Run,
    model: MiniMindVLM,
    data: VLMDataset,
    heldout: VLMDataset | None,
    features: FeatureFolder | None,
    steps: int,
    eval_interval: int,
    is_compiled: bool,
):
    """Prints files, sizes and settings of the run.

    Args:
        steps: Optimizer steps of the whole run.
        eval_interval: Steps between measurements on the held-out rows.
    """
    args, config, world_size = run.args, run.config, run.processes.world_size
    whose = None
    if run.learns_scenes:
        whose = "nothing was downloaded and no path given, so this run uses the small built-in set of drawn scenes"
    elif run.is_builtin:
        whose = "your data, learned by the small built-in model (its own tower and tokenizer; it speaks Chinese)"
    total, learned = count_parameters(model)
    tower = model.vision_encoder.num_parameters()
    cut = f"; {data.cut_rows:,} rows are cut at max_seq_len" if data.cut_rows else ""
    start = "random weights" if run.weights is None else display_path(run.weights.path)
    if run.weights is not None and not run.weights.has_projection:
        start += " (a language model: the projection starts untrained)"
    kept = "computed anew every epoch"
    if features is not None:
        gigabytes = (data.picture_keys != 0).sum() * features.file_bytes / 1e9
        kept = f"kept in {display_path(features.path)} ({gigabytes:.2f} GB; --cache_vision off does without)"
    shape = f"hidden_size {config.hidden_size}, {config.num_hidden_layers} layers"
    shape += ", experts" if config.use_moe else ""
    shape += f", {config.projector} projection" if config.projector != "linear" else ""
    shape += f", {config.image_tokens} tokens an image" if config.image_tokens != config.vision_patches else ""
    starts_from_3v = run.weights is not None and run.weights.config.qk_norm
    recipe = " (the built-in recipe)" if run.is_builtin else " (minimind-3v's recipe)" * starts_from_3v
    per_step = args.batch_size * args.accumulation_steps * world_size
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else run.device.type.upper()
    rows = {
        "starts from": start,
        "writes": display_path(run.files.weights),
        "data": f"{data_file(args.data_path)}: {len(data):,} rows, {data.picture_count:,} pictures, "
        f"{data.learned_tokens.sum():,} learned tokens, longest row {data.lengths.max()} tokens{cut}",
        "held out": held_out(args, heldout, eval_interval),
        "tower": f"{display_path(args.vision_model_path)}: {tower / 1e6:.3f} M parameters, frozen",
        "features": kept,
        "model": f"{shape}: {total / 1e6:.3f} M parameters, {learned / 1e6:.3f} M learn",
        "settings": f"epochs {args.epochs}, batch_size {args.batch_size}, learning_rate {args.learning_rate:g}"
        f"{recipe}; accumulation_steps {args.accumulation_steps}, "
        f"grad_clip {args.grad_clip:g}, max_seq_len {args.max_seq_len}, freeze_llm {args.freeze_llm}, seed {args.seed}",
        "steps": f"{steps:,} of {per_step} samples ({math.ceil(len(data) / per_step):,} an epoch)",
        "device": f"{device}, {world_size} process(es), {args.dtype}{', compiled' if is_compiled else ''}, "
        f"{args.num_workers} worker(s) each",
    }
    for line in filter(None, (run.stage.story, whose)):
        run.log(in_terminal(line, indent=2))
    for name, value in rows.items():
        run.log(in_terminal(f"  {name:<12} {value}", indent=15))


def in_terminal(line: str, indent: int) -> str:
    """Wraps a line at words to a terminal's width; a file gets it whole."""
    if not sys.stdout.isatty():
        return line
    width = shutil.get_terminal_size().columns - 1
    return textwrap.fill(line, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def data_file(path: Path) -> str:
    """Names the file that is learned from, and says so where it was preferred to another."""
    is_preferred = path.suffix == ".parquet" and path.with_suffix(".jsonl").exists()
    return display_path(path) + " (the jsonl beside it is not read)" * is_preferred


def held_out(args, heldout: VLMDataset | None, eval_interval: int) -> str:
    """Says which rows the run is measured on."""
    if heldout is None:
        few = "" if args.eval_data == "none" else " (fewer than three pictures)"
        return f"nothing{few}: no loss is measured, and the pictures described at the end were trained on"
    few = "; so few give a rough figure" if len(heldout) < FEW_ROWS else ""
    return f"{len(heldout):,} rows of {display_path(heldout.data_path)}, measured every {eval_interval} steps{few}"


def count_parameters(model: MiniMindVLM) -> tuple[int, int]:
    """Returns (all, learned) parameters of projection and decoder; the tied head counts once."""
    return model.num_parameters(), model.num_parameters(only_trainable=True)
