"""Watches a run: a header, then held-out loss, grounding gap and descriptions of a few images, and a page of it all."""

import json
import time

import numpy as np
import torch
from PIL import Image

from common.errors import UsageError
from common.files import read_record, write_atomically
from common.paths import BUILTIN_TOWER_DIR, display_path
from dataset.features import FeatureFolder
from dataset.lm_dataset import PictureError, VLMDataset
from dataset.prompts import first_answer, row_prompts
from model.answers import generate_answers
from model.model_vlm import MiniMindVLM
from model.weights import read_sidecar_or_empty
from trainer.bundles import BUILTIN
from trainer.evaluate import SHORT_ANSWER, Evaluator, exact_match
from trainer.report.page import read_samples, verdict, write_report
from trainer.report.progress import Progress
from trainer.setup import Run

MUCH = 0.7  # of the cores that a run gets
IMAGES = 8
LONGEST = 64  # tokens of a description
MOST_ASKED = 256  # rows, for short answers


def print_header(run: Run, model: MiniMindVLM, is_compiled: bool, **lines: str):
    """Prints files, sizes and settings of the run; `lines` holds the texts of data, held_out, features, steps."""
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
    load = ""
    if run.device.type == "cpu":  # measured for a tenth of a second
        matrix, started, used = torch.ones(512, 512), time.perf_counter(), time.process_time()
        while (passed := time.perf_counter() - started) < 0.1:
            matrix @ matrix
        share = (time.process_time() - used) / (passed * torch.get_num_threads())
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
    for name, value in rows.items():
        run.log(f"  {name:<12} {value}")


def describe_features(features: FeatureFolder | None, data: VLMDataset) -> str:
    """Says where the features of the data's pictures are cached, and their size."""
    if features is None:
        return "computed in every epoch"
    gigabytes = (data.picture_keys != 0).sum() * features.file_bytes / 1e9
    return f"kept in {display_path(features.path)} ({gigabytes:.2f} GB; --cache_vision off does without)"


class Watch:
    """Measures and describes at intervals; all ranks take part.

    Args:
        evaluator: Measures held-out rows; None for none, and the descriptions then come at the end.
        shown: Its first rows with different images are described, by the main rank.
        interval: Optimizer steps between measurements.
        done: Steps done before a resume; descriptions of later ones are dropped.
    """

    def __init__(
        self, run: Run, model: MiniMindVLM, evaluator: Evaluator | None, shown: VLMDataset, interval: int, done: int
    ):
        self.run, self.model, self.evaluator, self.interval, self.done = run, model, evaluator, interval, done
        self.figures: dict = {}  # of the newest measurement
        self.rows: list[dict] = []  # that are described, in the order of `samples`
        self.samples: list[dict] = []
        self.described: list[dict] | None = None  # every description so far; None before the first
        if not run.processes.is_main:
            return
        pictures, rows = np.unique(shown.first_pictures, return_index=True)
        rows = shown.__getitems__(np.sort(rows[pictures >= 0])[: 4 * IMAGES].tolist())  # some may be broken
        self.rows = [row for row in rows if not isinstance(row, PictureError)][:IMAGES]
        for number, row in enumerate(self.rows):
            start, end = first_answer(row["labels"])
            prompt = run.tokenizer.decode(row["input_ids"][:start], skip_special_tokens=True)
            reference = run.tokenizer.decode(row["input_ids"][start:end], skip_special_tokens=True)
            question = prompt.split("user\n")[-1].removesuffix("assistant\n").replace("@" * shown.image_tokens, "")
            sample = {"picture": f"{number}.jpg", "prompt": question.strip(), "reference": reference.strip()}
            self.samples.append(sample)

    @property
    def plan(self) -> str:
        """The evaluation rows, as the header names them."""
        if self.evaluator is None:
            few = "" if self.run.args.eval_data == "none" else " (fewer than three pictures)"
            return f"nothing{few}: no loss is measured, and the pictures described at the end were trained on"
        rows = self.evaluator.data
        return f"{len(rows):,} rows of {display_path(rows.data_path)}, measured every {self.interval} steps"

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
        progress.exclude(time.perf_counter() - started)

    def _describe(self, progress: Progress, step: int):
        if not self.rows:
            return
        folder = self.run.files.samples
        path = folder / "samples.jsonl"
        try:
            if self.described is None:
                folder.mkdir(parents=True, exist_ok=True)
                for row, sample in zip(self.rows, self.samples, strict=True):
                    pixels = row["pixel_values"][0].permute(1, 2, 0).numpy()
                    Image.fromarray(pixels).resize((160, 160)).save(folder / sample["picture"], quality=88)
                try:
                    earlier = read_samples(path) if self.done and path.is_file() else []
                except (OSError, ValueError) as error:
                    raise UsageError(f"{display_path(path)} cannot be read ({error}): move it away") from error
                self.described = [sample for sample in earlier if sample["step"] <= self.done]
            prompts = row_prompts(self.rows, self.model.config.pad_token_id)
            answers = generate_answers(self.model, self.run.tokenizer, prompts, LONGEST)
            pairs = zip(self.samples, answers, strict=True)
            described = [{"step": step, **sample, "description": answer.strip()} for sample, answer in pairs]
            self.described += described
            text = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in self.described)
            write_atomically(path, lambda file: file.write(text.encode("utf-8")))
        except (OSError, UsageError) as error:
            progress.log(f"warning: the descriptions of step {step} cannot be written, training continues: {error}")
            return
        answers, expected = ({sample[of] for sample in described} for of in ("description", "reference"))
        if len(answers) == 1 < len(expected):
            progress.log(f"step {step}  the same answer to all {len(described)} pictures: {answers.pop()}")
        if self.evaluator is None:
            right = sum(sample["description"] == sample["reference"] for sample in described)
            progress.log(f"{right} of {len(described)} pictures that were trained on are described word for word")

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
