"""Watches a run learn: held-out loss, grounding gap, descriptions of a few pictures, and in the end a page of all of it."""

import json
import time

import torch

from common.errors import UsageError
from common.files import write_atomically
from common.paths import display_path
from dataset.lm_dataset import VLMDataset
from dataset.scenes.draw import heldout_scenes
from model.model_vlm import MiniMindVLM
from trainer.setup import Run
from trainer.watch.heldout import Evaluator
from trainer.watch.page import write_report
from trainer.watch.progress import Progress
from trainer.watch.samples import Samples
from trainer.watch.scene_table import scene_table


class Watch:
    """Args:
    run, model: What is watched; all processes take part.
    heldout: Rows that are not trained on.
    done_steps: Steps that a resumed run did before.
    """

    def __init__(self, run: Run, model: MiniMindVLM, heldout: VLMDataset, done_steps: int):
        self.run, self.model = run, model
        self.evaluator = Evaluator(heldout, model, run.processes, run.dtype, run.args.batch_size)
        self.folder = run.args.save_dir / f"{run.name}_samples"
        is_main = run.processes.is_main
        self.samples = Samples(heldout, run.tokenizer, self.folder, done_steps) if is_main else None

    def look(self, progress: Progress, step: int, epoch: int):
        """Measures and describes, and reports both."""
        if self.run.device.type == "cuda":
            torch.cuda.synchronize(self.run.device)  # the time of steps still under way is training's
        started = time.perf_counter()
        held_out = self.evaluator.measure()
        losses = {"held out": held_out.loss, "other pictures": held_out.loss_shuffled, "none": held_out.loss_blind}
        words = {name: f"{loss:.4f}" for name, loss in losses.items() if loss is not None}
        progress.report_heldout(step, epoch, held_out.as_dict(), words, f"step {step}  {held_out}")
        for error in dict.fromkeys(map(str, self.evaluator.skipped)):
            progress.say(f"left out of the held-out rows, its picture cannot be read: {error}")
        self.evaluator.skipped.clear()
        if self.samples is not None:
            self._describe(progress, step)
        self.run.processes.barrier()
        progress.leave_out(time.perf_counter() - started)

    def _describe(self, progress: Progress, step: int):
        try:
            said = self.samples.describe(self.model, step)
        except (OSError, UsageError) as error:
            progress.say(f"warning: the descriptions of step {step} cannot be written, training goes on: {error}")
            return
        progress.log_samples(step, said, self.folder)

    def finish(self, progress: Progress, step: int):
        """Writes the page of the run; for the built-in set with how many scenes are told right."""
        if not self.run.processes.is_main:
            return
        try:
            if self.run.args.assets == "built-in":
                table = {"step": step, "scenes": len(heldout_scenes())}
                text = json.dumps(table | {"rows": scene_table(self.model, self.run.tokenizer)}, indent=2)
                write_atomically(self.folder / "scenes.json", lambda file: file.write(text.encode("utf-8")))
            progress.say(f"its page: {display_path(write_report(self.run.args.save_dir, self.run.name))}")
        except (OSError, UsageError) as error:
            progress.say(f"warning: the run's page cannot be written: {error}")
