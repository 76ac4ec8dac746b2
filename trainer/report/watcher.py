"""Watches a run learn: held-out loss, grounding gap, descriptions of a few images, and at the end a page of it all."""

import time

import torch

from common.errors import UsageError
from common.paths import display_path
from dataset.lm_dataset import VLMDataset
from model.model_vlm import MiniMindVLM
from model.weights import read_sidecar_or_empty
from trainer.evaluate import SHORT_ANSWER, Evaluator, exact_match
from trainer.report.page import write_report
from trainer.report.progress import Progress
from trainer.report.samples import Samples
from trainer.report.verdict import verdict
from trainer.setup import Run

MOST_ASKED = 256  # rows, for short answers


class Watch:
    """Measures and describes at intervals; all ranks take part.

    Args:
        evaluator: Measures held-out rows; None for none, and the descriptions then come at the end.
        shown: The rows whose images are described, with pixels.
        interval: Optimizer steps between measurements.
        done: Steps done before a resume.
    """

    def __init__(
        self, run: Run, model: MiniMindVLM, evaluator: Evaluator | None, shown: VLMDataset, interval: int, done: int
    ):
        self.run, self.model, self.evaluator, self.interval = run, model, evaluator, interval
        self.figures: dict = {}  # of the newest measurement
        self.samples = Samples(shown, run.tokenizer, run.files.samples, done) if run.processes.is_main else None

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
        figures = held_out.as_dict()
        if step == progress.total_steps and isinstance(self.evaluator, Evaluator):
            figures |= exact_match(self.evaluator, self.run.tokenizer, SHORT_ANSWER, most=MOST_ASKED)
        progress.report_heldout(step, epoch, figures, f"step {step}  {held_out}")
        self.figures = figures
        for error in dict.fromkeys(map(str, self.evaluator.skipped)):
            progress.log(f"left out of the held-out rows, its picture cannot be read: {error}")
        self.evaluator.skipped.clear()
        self._describe(progress, step)
        self.run.processes.barrier()
        progress.exclude(time.perf_counter() - started)

    def _describe(self, progress: Progress, step: int):
        if self.samples is None:
            return
        try:
            generated = self.samples.describe(self.model, step)
        except (OSError, UsageError) as error:
            progress.log(f"warning: the descriptions of step {step} cannot be written, training continues: {error}")
            return
        answers, expected = ({row[of] for row in generated} for of in ("description", "reference"))
        if len(answers) == 1 < len(expected):
            progress.log(f"step {step}  the same answer to all {len(generated)} pictures: {answers.pop()}")
        if self.evaluator is None and generated:
            right = sum(row["description"] == row["reference"] for row in generated)
            progress.log(f"{right} of {len(generated)} pictures that were trained on are described word for word")

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
