"""Watches a run: a header, then held-out loss, grounding gap and descriptions of a few images, and a page of it all."""

import json
import time
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from common.errors import UsageError
from common.files import read_record, write_atomically
from common.paths import BUILTIN_TOWER_DIR, display_path
from dataset.chat import encoder_for
from dataset.features import FeatureFolder
from dataset.lm_dataset import PictureError, VLMDataset
from dataset.prompts import first_answer, row_prompts
from model.answers import generate_answers
from model.model_vlm import MiniMindVLM
from model.weights import read_sidecar_or_empty
from trainer.bundles import BUILTIN
from trainer.evaluate import SHORT_ANSWER, Evaluator, exact_match
from trainer.report.page import verdict, write_report
from trainer.report.progress import Progress, reports_until
from trainer.setup import Run

MUCH = 0.7  # of the cores that a run gets
IMAGES = 8
LONGEST = 64  # tokens of a description
MOST_ASKED = 256  # rows, for short answers


@dataclass
class Watch:
    """Measures and describes at intervals; all ranks take part."""

    run: Run
    model: MiniMindVLM
    evaluator: Evaluator | None  # of held-out rows; with None, there are descriptions at the end only
    shown: VLMDataset  # its first rows with different images are described, by the main rank
    interval: int  # optimizer steps between measurements
    figures: dict = field(default_factory=dict)  # of the newest measurement
    rows: list[dict] = field(default_factory=list)  # that are described
    samples: list[dict] = field(default_factory=list)  # their pictures, prompts and references, in the same order
    described: list[str] | None = None  # every description so far, as lines; None before the first

    def __post_init__(self):
        if not self.run.processes.is_main:
            return
        shown, tokenizer = self.shown, self.run.tokenizer
        pictures, rows = np.unique(shown.first_pictures, return_index=True)
        rows = shown.__getitems__(np.sort(rows[pictures >= 0])[: 4 * IMAGES].tolist())  # some may be broken
        self.rows = [row for row in rows if not isinstance(row, PictureError)][:IMAGES]
        begin, end_mark = map(str.rstrip, encoder_for(tokenizer, shown.image_tokens).user_marks)
        for number, row in enumerate(self.rows):
            row = shown.without_images(row)
            start, end = first_answer(row["labels"])
            prompt = tokenizer.decode(row["input_ids"][:start])
            reference = tokenizer.decode(row["input_ids"][start:end], skip_special_tokens=True)
            question = prompt.rpartition(begin)[2] if begin else prompt
            question = question.partition(end_mark)[0] if end_mark else question
            sample = {"picture": f"{number}.jpg", "prompt": question.strip(), "reference": reference.strip()}
            self.samples.append(sample)

    def measure_if_due(self, progress: Progress, step: int, epoch: int):
        """Measures and describes every `interval` steps and at the end, and reports both."""
        if self.evaluator is None or (step % self.interval and step != progress.total_steps):
            return
        if self.run.device.type == "cuda":
            torch.cuda.synchronize(self.run.device)  # the time of steps still running is training's
        started = time.perf_counter()
        held_out = self.evaluator.measure()
        self.figures = held_out.as_dict()
        if step == progress.total_steps and isinstance(self.evaluator, Evaluator):
            self.figures |= exact_match(self.evaluator, self.run.tokenizer, SHORT_ANSWER, most=MOST_ASKED)
        progress.write(f"step {step}  {held_out}", {"step": step, "epoch": epoch, "eval": self.figures})
        for error in dict.fromkeys(map(str, self.evaluator.skipped)):
            progress.log(f"left out of the held-out rows, its picture cannot be read: {error}")
        self.evaluator.skipped.clear()
        self._describe(progress, step)
        self.run.processes.barrier()
        progress.interval_started += time.perf_counter() - started  # not in samples/s

    def _describe(self, progress: Progress, step: int):
        if not self.rows:
            return
        prompts = row_prompts(self.rows, self.model.config.pad_token_id)
        answers = [text.strip() for text in generate_answers(self.model, self.run.tokenizer, prompts, LONGEST)]
        path = self.run.files.samples / "samples.jsonl"
        try:
            if self.described is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                for row, sample in zip(self.rows, self.samples, strict=True):
                    pixels = row["pixel_values"][0].permute(1, 2, 0).numpy()
                    Image.fromarray(pixels).resize((160, 160)).save(path.with_name(sample["picture"]), quality=88)
                self.described = reports_until(path, progress.done_steps)  # after a resume, those before it
            for sample, answer in zip(self.samples, answers, strict=True):
                row = {"step": step, **sample, "description": answer}
                self.described.append(json.dumps(row, ensure_ascii=False))
            text = "\n".join(self.described) + "\n"
            write_atomically(path, lambda file: file.write(text.encode("utf-8")))
        except (OSError, UsageError) as error:
            progress.log(f"warning: the descriptions of step {step} cannot be written, training continues: {error}")
            return
        references = [sample["reference"] for sample in self.samples]
        if len(set(answers)) == 1 < len(set(references)):
            progress.log(f"step {step}  the same answer to all {len(answers)} pictures: {answers[0]}")
        if self.evaluator is None:
            right = sum(answer == reference for answer, reference in zip(answers, references, strict=True))
            progress.log(f"{right} of {len(answers)} pictures that were trained on are described word for word")

    def finish(self, progress: Progress, step: int):
        """Logs whether the model looks at its images, and writes the run's page."""
        run = self.run
        if not run.processes.is_main:
            return
        if self.evaluator is None:
            self._describe(progress, step)
        try:
            for sentence in verdict(self.figures, read_sidecar_or_empty(run.files.weights)):
                progress.log(sentence)
            progress.log(f"its page: {display_path(write_report(run.files.save_dir, run.files.name))}")
        except (OSError, UsageError) as error:
            progress.log(f"warning: the run's page cannot be written: {error}")


def share_of_cores(seconds: float = 0.1) -> float:
    """Returns the share of its threads' time that this process gets, from 0 to 1, measured over a moment."""
    matrix, started, used = torch.ones(512, 512), time.perf_counter(), time.process_time()
    while (passed := time.perf_counter() - started) < seconds:
        matrix @ matrix
    return (time.process_time() - used) / (passed * torch.get_num_threads())


def print_header(watch: Watch, data: VLMDataset, features: FeatureFolder | None, steps: str, is_compiled: bool):
    """Prints files, sizes and settings of the run."""
    run, model, evaluator = watch.run, watch.model, watch.evaluator
    args, config = run.args, run.config
    run.log(run.stage.story)
    if run.bundle is BUILTIN and run.learns_scenes:
        run.log("nothing was downloaded and no path given, so this run uses the small built-in set of drawn scenes")
    elif run.bundle is BUILTIN:
        assets = "your data, learned by the small built-in language model, which has read about drawn shapes only"
        if args.vision_model_path == BUILTIN_TOWER_DIR:
            assets += "; its tower has seen only these too: trainer/train_tower.py makes one of your own pictures first"
        run.log(assets)
    start = "random weights" if run.weights is None else display_path(run.weights.path)
    if run.weights is not None and not run.weights.has_projection:
        start += " (a language model: the projection starts untrained)"
    rows = display_path(args.data_path)
    if args.data_path.suffix == ".parquet" and args.data_path.with_suffix(".jsonl").exists():
        rows += " (the jsonl beside it is not read)"
    if evaluator is None:
        few = f" (fewer than {'three pictures' if data.image_count else '100 rows'})"
        held_out = f"nothing{'' if args.eval_data == 'none' else few}: no loss is measured"
        held_out += ", and the pictures described at the end were trained on" if watch.rows else ""
    else:
        held_out = f"{len(evaluator.data):,} rows of {display_path(evaluator.data.data_path)}"
        held_out += f", measured every {watch.interval} steps"
    cached = "computed in every epoch"
    if features is not None:
        gigabytes = (data.picture_keys != 0).sum() * features.file_bytes / 1e9
        cached = f"kept in {display_path(features.path)} ({gigabytes:.2f} GB; --cache_vision off does without)"
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
    share = share_of_cores() if run.device.type == "cpu" else 1.0
    load = f"; it gets {share:.0%} of its cores' time: do other programs run?" if share < MUCH else ""
    lines = {
        "starts from": start,
        "writes": display_path(run.files.weights),
        "data": f"{rows}: {data.summary}",
        "held out": held_out,
        "tower": f"{display_path(args.vision_model_path)}: {tower / 1e6:.3f} M parameters, frozen{seen}",
        "features": cached,
        "model": f"{shape}: {total / 1e6:.3f} M parameters, {learned / 1e6:.3f} M learn",
        "settings": f"epochs {args.epochs}, batch_size {args.batch_size}, learning_rate {args.learning_rate:g}"
        f"{recipe}; accumulation_steps {args.accumulation_steps}, "
        f"grad_clip {args.grad_clip:g}, max_seq_len {args.max_seq_len}, freeze_llm {args.freeze_llm}, seed {args.seed}",
        "steps": steps,
        "device": f"{device}, {run.processes.world_size} process(es), {run.settings['dtype']}"
        f"{', compiled' if is_compiled else ''}, {args.num_workers} worker(s) each{load}",
    }
    for name, value in lines.items():
        run.log(f"  {name:<12} {value}")
