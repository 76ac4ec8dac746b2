"""Watches a run learn: held-out loss, grounding gap, descriptions of a few images, and at the end a page of it all."""

import json
import time

import numpy as np
import torch
from PIL import Image

from common.errors import UsageError
from common.files import write_atomically
from common.paths import display_path
from dataset.lm_dataset import PictureError, VLMDataset
from dataset.prompts import first_answer, row_prompts
from model.answers import generate_answers
from model.model_vlm import MiniMindVLM
from model.weights import read_sidecar_or_empty
from trainer.evaluate import SHORT_ANSWER, Evaluator, exact_match
from trainer.report.page import read_samples, verdict, write_report
from trainer.report.progress import Progress
from trainer.setup import Run

IMAGES = 8
LONGEST = 64  # tokens of a description
MOST_ASKED = 256  # rows, for short answers


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
