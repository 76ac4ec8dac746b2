"""The header printed before a run's first step."""

import time

import torch

from common.files import read_record
from common.paths import BUILTIN_TOWER_DIR, display_path
from dataset.features import FeatureFolder
from dataset.lm_dataset import VLMDataset
from model.model_vlm import MiniMindVLM
from trainer.bundles import BUILTIN
from trainer.setup import Run

MUCH = 0.7  # of the cores that a run gets


def print_header(run: Run, model: MiniMindVLM, is_compiled: bool, **lines: str):
    """Prints files, sizes and settings of the run; `lines` holds the texts of data, held_out, features, steps."""
    args, config = run.args, run.config
    if run.learns_scenes:
        assets = "nothing was downloaded and no path given, so this run uses the small built-in set of drawn scenes"
    else:
        assets = "your data, learned by the small built-in language model, which has read about drawn shapes only"
        if args.vision_model_path == BUILTIN_TOWER_DIR:
            assets += "; its tower has seen only these too: trainer/train_tower.py makes one of your own pictures first"
    start = "random weights" if run.weights is None else display_path(run.weights.path)
    if run.weights is not None and not run.weights.has_projection:
        start += " (a language model: the projection starts untrained)"
    data = display_path(args.data_path)
    if args.data_path.suffix == ".parquet" and args.data_path.with_suffix(".jsonl").exists():
        data += " (the jsonl beside it is not read)"
    tower, trained_on = model.vision_encoder.num_parameters(), read_record(args.vision_model_path).get("data")
    seen = f", trained on {trained_on}" if trained_on else ""
    shape = f"{config.llm['model_type']}, " if config.llm else ""
    shape += f"hidden_size {config.hidden_size}, {config.num_hidden_layers} layers"
    shape += ", experts" if config.use_moe else ""
    shape += f", {config.projector} projection" if config.projector != "linear" else ""
    shape += f", {config.image_tokens} tokens an image" if config.image_tokens != config.vision_patches else ""
    total, learned = model.num_parameters(), model.num_parameters(only_trainable=True)  # the tied head counts once
    recipe = f" (the {run.bundle.name} recipe)" if run.bundle.recipes.get(run.stage.name) else ""
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else run.device.type.upper()
    share = share_of_cores() if run.device.type == "cpu" else 1
    load = f"; it gets {share:.0%} of its cores' time: do other programs run?" if share < MUCH else ""
    rows = {
        "starts from": start,
        "writes": display_path(run.files.weights),
        "data": f"{data}: {lines['data']}",
        "held out": lines["held_out"],
        "tower": f"{display_path(args.vision_model_path)}: {tower / 1e6:.3f} M parameters, frozen{seen}",
        "features": lines["features"],
        "model": f"{shape}: {total / 1e6:.3f} M parameters, {learned / 1e6:.3f} M learn",
        "settings": f"epochs {args.epochs}, batch_size {args.batch_size}, learning_rate {args.learning_rate:g}"
        f"{recipe}; accumulation_steps {args.accumulation_steps}, "
        f"grad_clip {args.grad_clip:g}, max_seq_len {args.max_seq_len}, freeze_llm {args.freeze_llm}, seed {args.seed}",
        "steps": lines["steps"],
        "device": f"{device}, {run.processes.world_size} process(es), {run.settings['dtype']}"
        f"{', compiled' if is_compiled else ''}, {args.num_workers} worker(s) each{load}",
    }
    for line in (run.stage.story, *([assets] if run.bundle is BUILTIN else [])):
        run.log(line)
    for name, value in rows.items():
        run.log(f"  {name:<12} {value}")


def describe_features(features: FeatureFolder | None, data: VLMDataset) -> str:
    """Describes where the features of the data's pictures are cached, and their size."""
    if features is None:
        return "computed in every epoch"
    gigabytes = (data.picture_keys != 0).sum() * features.file_bytes / 1e9
    return f"kept in {display_path(features.path)} ({gigabytes:.2f} GB; --cache_vision off does without)"


def share_of_cores(seconds: float = 0.1) -> float:
    """Returns the share of its threads' time that this process gets, from 0 to 1, measured over a moment."""
    matrix, started, used = torch.ones(512, 512), time.perf_counter(), time.process_time()
    while (passed := time.perf_counter() - started) < seconds:
        matrix @ matrix
    return (time.process_time() - used) / (passed * torch.get_num_threads())
