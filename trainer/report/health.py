"""Reports a run's faults: a first loss no better than guessing, steps that are not finite, unreadable images."""

import contextlib
import math
from pathlib import Path

import torch
from tqdm import tqdm

from common.errors import UsageError
from common.paths import display_path
from trainer.report.progress import Progress
from trainer.setup import Run

BAD_STEPS_IN_A_ROW = 10
NAMED_ON_SCREEN = 20


class BadSteps:
    """Counts the steps skipped because loss or gradient was not finite, without syncing the GPU."""

    def __init__(self, device: torch.device):
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)  # all, in a row, the most in a row
        self.logged = 0

    def add(self, is_bad: torch.Tensor):
        """Counts a step."""
        total, in_a_row, most = self.counts
        in_a_row = (in_a_row + 1) * is_bad
        self.counts = torch.stack((total + is_bad, in_a_row, torch.maximum(most, in_a_row)))

    def check(self, run: Run, progress: Progress, step: int):
        """Logs the steps skipped since the last call; syncs. Raises UsageError if too many in a row were skipped."""
        total, _, most = self.counts.tolist()
        if total > self.logged:
            progress.log(
                f"by step {step} the loss or the gradient was not finite in {total - self.logged} step(s) more: "
                f"skipped, the weights are unchanged ({total} so far)"
            )
            self.logged = total
        if most >= BAD_STEPS_IN_A_ROW:
            raise UsageError(
                f"{most} steps in a row, up to step {step}, had a loss or a gradient that is not finite, so the run "
                "ends; the weights saved last are finite. Try a lower --learning_rate than "
                f"{run.args.learning_rate:g}, a lower --grad_clip than {run.args.grad_clip:g} or --dtype float32, and "
                f"check the data (python -m dataset.check {display_path(run.args.data_path)})"
            )

    def state_dict(self) -> dict:
        return {"bad_steps": self.counts.tolist()}

    def load_state_dict(self, state: dict):
        self.counts = torch.tensor(state["bad_steps"], device=self.counts.device)
        self.logged = state["bad_steps"][0]


def report_if_due(run: Run, progress: Progress, state, epoch: int, learning_rate: float, bad_steps: BadSteps):
    """Reports after step 1, every --log_interval steps and at an epoch's end; skipped steps at once without a GPU."""
    is_due = state.step == 1 or state.step % run.args.log_interval == 0 or state.sample == 0
    if is_due or run.device.type != "cuda":
        bad_steps.check(run, progress, state.step)
    if is_due:
        skipped = {"skipped_pictures": state.skipped_pictures, "skipped_steps": bad_steps.logged}
        progress.report(state.step, epoch, learning_rate, skipped)


class UnreadableImages:
    """Names this rank's images that cannot be read: the first few on the screen, all in {name}.bad_rows.txt."""

    def __init__(self, path: Path):
        self.path, self.named = path, set()

    def note(self, micro_batches: list[dict]):
        """Names what these batches skipped, each image once."""
        for error in (str(error) for batch in micro_batches for error in batch["skipped"]):
            if error in self.named:
                continue
            self.named.add(error)
            if len(self.named) <= NAMED_ON_SCREEN:
                tqdm.write(f"skipped a sample, its picture cannot be read: {error}")
            elif len(self.named) == NAMED_ON_SCREEN + 1:
                tqdm.write(f"more pictures cannot be read: all of them are in {display_path(self.path)}")
            with contextlib.suppress(OSError), open(self.path, "a", encoding="utf-8") as file:
                file.write(f"  a picture cannot be read: {error}\n")


def check_first_loss(run: Run, losses: torch.Tensor):
    """Stops if weights with an unknown tokenizer start no better than guessing: most likely the tokenizer is wrong.

    Raises:
        UsageError: Unless --ignore_high_loss is set; unfamiliar text may be the reason, too.
    """
    loss_sum, learned = losses.tolist()
    uniform = math.log(run.config.vocab_size)
    is_known = run.weights is None or "tokenizer_sha256" in run.weights.sidecar  # which was compared
    if is_known or not learned or loss_sum / learned < uniform:
        return
    message = (
        f"the first loss is {loss_sum / learned:.2f}, no better than guessing (ln {run.config.vocab_size} = "
        f"{uniform:.2f}), though training starts from {display_path(run.weights.path)}. Most likely these weights and "
        f"the tokenizer {display_path(run.args.tokenizer_path)} do not belong together: name the right one with "
        "--tokenizer_path"
    )
    if not run.args.ignore_high_loss:
        raise UsageError(f"{message}. If it is right and the texts are unfamiliar, train with --ignore_high_loss")
    run.log(f"warning: {message}")
