"""A run's reports: its progress, on the screen, in metrics.jsonl, and in wandb or SwanLab if asked; and its faults."""

import contextlib
import importlib
import json
import math
import os
import time
from pathlib import Path

import torch
from tqdm import tqdm

from common.errors import UsageError
from common.files import write_atomically
from common.paths import display_path
from trainer.setup import Run
from trainer.stage import answer_loss

TRACKERS = {"wandb": "dir", "swanlab": "log_dir"}  # packages with the same functions: their argument for the folder
BAD_STEPS_IN_A_ROW = 10
NAMED_ON_SCREEN = 20
clock = tqdm.format_interval  # seconds to 02:03, 1:02:03


class Progress:
    """Sums loss and counts since the last report, and reports them; other ranks than the main one are silent."""

    def __init__(self, run: Run, total_steps: int, done_steps: int, settings: dict):
        self.run, self.total_steps, self.done_steps = run, total_steps, done_steps
        self.log = run.processes.log
        self.metrics_path = run.files.metrics if run.processes.is_main else None  # None: silent
        used = [name for name in TRACKERS if getattr(run.args, f"use_{name}") and run.processes.is_main]
        self.trackers = {name: start_tracker(name, run, settings) for name in used}
        self.started = time.perf_counter()
        self.has_begun = self.has_failed = False  # writing metrics.jsonl
        disable = None if run.processes.is_main else True  # None: shown in a terminal only
        form = "{percentage:3.0f}% step {n_fmt}/{total_fmt}, ETA {remaining} {bar}"
        self.bar = tqdm(total=total_steps, initial=done_steps, disable=disable, dynamic_ncols=True, bar_format=form)
        # Steps whose loss or gradient was not finite: all, in a row, the most in a row. Counting syncs no GPU.
        bad_steps = [0, 0, 0] if run.state is None else run.state["bad_steps"]
        self.bad_steps = torch.tensor(bad_steps, device=run.device)
        self.bad_steps_logged, self.unreadable = bad_steps[0], set()
        self._reset()
        if run.state is not None:
            earlier = run.state["progress"]
            self.counted = {name: earlier[name] for name in self.counted}
            self.losses = torch.tensor(earlier["learned_from"])
            self.interval_started -= earlier["seconds_before"]

    def _reset(self):
        self.interval_started, self.losses = time.perf_counter(), torch.zeros(2)
        self.counted = {"samples": 0, "tokens": 0, "data_seconds": 0}

    def state_dict(self) -> dict:
        """Returns what a resumed run needs: the bad steps, and the sums since the last report."""
        seconds = time.perf_counter() - self.interval_started
        counted = self.counted | {"learned_from": self.losses.tolist(), "seconds_before": seconds}
        ids = {f"{name}_id": self.trackers[name].id if name in self.trackers else None for name in TRACKERS}
        return {"bad_steps": self.bad_steps.tolist(), "progress": counted} | ids

    def name_unreadable(self, micro_batches: list[dict]):
        """Names this rank's images that cannot be read: the first few on the screen, all in {name}.bad_rows.txt."""
        path = self.run.files.bad_rows
        for error in (str(error) for batch in micro_batches for error in batch["skipped"]):
            if error in self.unreadable:
                continue
            self.unreadable.add(error)
            if len(self.unreadable) <= NAMED_ON_SCREEN:
                tqdm.write(f"skipped a sample, its picture cannot be read: {error}")
            elif len(self.unreadable) == NAMED_ON_SCREEN + 1:
                tqdm.write(f"more pictures cannot be read: all of them are in {display_path(path)}")
            with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:
                file.write(f"  a picture cannot be read: {error}\n")

    def add(self, losses: torch.Tensor, is_bad: torch.Tensor, samples: int, tokens: int, data_seconds: float):
        """Counts an optimizer step, without a sync; `losses` (2,) are summed loss and learned tokens over all ranks."""
        total, in_a_row, most = self.bad_steps
        in_a_row = (in_a_row + 1) * is_bad
        self.bad_steps = torch.stack((total + is_bad, in_a_row, torch.maximum(most, in_a_row)))
        self.losses = self.losses.to(losses.device) + losses
        for name, value in (("samples", samples), ("tokens", tokens), ("data_seconds", data_seconds)):
            self.counted[name] += value
        self.bar.update(1)

    def report_if_due(self, state, epoch: int, learning_rate: float):
        """Reports if that is due, skipped steps at once on a CPU; UsageError if too many in a row were skipped."""
        args, step = self.run.args, state.step
        is_due = step == 1 or step % args.log_interval == 0 or state.sample == 0
        if not is_due and self.run.device.type == "cuda":
            return
        total, _, most = self.bad_steps.tolist()  # syncs
        if total > self.bad_steps_logged:
            self.log(
                f"by step {step} the loss or the gradient was not finite in {total - self.bad_steps_logged} step(s) "
                f"more: skipped, the weights are unchanged ({total} so far)"
            )
            self.bad_steps_logged = total
        if most >= BAD_STEPS_IN_A_ROW:
            raise UsageError(
                f"{most} steps in a row, up to step {step}, had a loss or a gradient that is not finite, so the run "
                "ends; the weights saved last are finite. Try a lower --learning_rate than "
                f"{args.learning_rate:g}, a lower --grad_clip than {args.grad_clip:g} or --dtype float32, and check "
                f"the data (python -m dataset.check {display_path(args.data_path)})"
            )
        if not is_due:
            return
        loss_sum, learned = self.losses.tolist()  # syncs
        seconds = max(1e-9, time.perf_counter() - self.interval_started)
        record = {
            "step": step,
            "epoch": epoch,
            "loss": round(loss_sum / learned, 6) if learned else None,
            "learning_rate": learning_rate,
            "samples_per_second": round(self.counted["samples"] / seconds, 2),
            "tokens_per_second": round(self.counted["tokens"] / seconds, 1),
            "data_wait": round(self.counted["data_seconds"] / seconds, 4),
            "learned_tokens": int(learned),
            "skipped_pictures": state.skipped_pictures,
            "skipped_steps": total,
            "seconds": round(time.perf_counter() - self.started, 3),
        }
        loss = f"{record['loss']:.4f}" if learned else "none"
        # No estimate after the first step, which is slow: workers start, memory is allocated.
        remaining = record["seconds"] / max(1, step - self.done_steps) * (self.total_steps - step)
        self.write(
            f"epoch {epoch}  step {step}/{self.total_steps}  loss {loss}  lr {learning_rate:.2e}  "
            f"samples/s {record['samples_per_second']:.1f}  tokens/s {record['tokens_per_second']:,.0f}  "
            f"data wait {record['data_wait']:.1%}{f'  ETA {clock(remaining)}' if step > 1 else ''}",
            record,
        )
        self._reset()

    def write(self, message: str, record: dict):
        """Reports a record, of training or with the figures of an evaluation as "eval"; `message` is its line."""
        self.log(message)
        if self.metrics_path is None:
            return
        try:
            if not self.has_begun:  # only now: a run that fails before its first report leaves the earlier curve alone
                earlier = "".join(f"{line}\n" for line in reports_until(self.metrics_path, self.done_steps))
                write_atomically(self.metrics_path, lambda file: file.write(earlier.encode("utf-8")))
                self.has_begun = True
            with open(self.metrics_path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except (OSError, UsageError) as error:
            if not self.has_failed:  # warn once
                self.log(f"warning: {display_path(self.metrics_path)} cannot be written, training continues: {error}")
            self.has_failed = True
        part, figures = ("eval", record["eval"]) if "eval" in record else ("train", record)
        for tracker in self.trackers.values():
            numbers = {name: value for name, value in figures.items() if not isinstance(value, str)}
            named = {f"{part}/{name}": value for name, value in numbers.items() if name != "step"}
            tracker.log(named, step=record["step"])

    def close(self):
        """Closes the bar, and the runs at wandb and SwanLab."""
        self.bar.close()
        for tracker in self.trackers.values():
            tracker.finish()


def reports_until(path: Path, step: float) -> list[str]:
    """Returns a jsonl file's lines up to a step: a killed run may have reported more than it saved."""
    if step == 0 or not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):  # a text may hold other line ends
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):  # truncated by a kill
            if json.loads(line)["step"] <= step:
                lines.append(line)
    return lines


def start_tracker(name: str, run: Run, settings: dict):
    """Starts a run at a service of TRACKERS, or continues that of a resumed one; raises UsageError if that fails."""
    os.environ.setdefault("WANDB_INIT_TIMEOUT", "10")  # seconds; wandb's default is 90
    names = {"project": run.args.wandb_project, "name": run.files.name, "id": run.state and run.state.get(f"{name}_id")}
    config = {key: str(value) if isinstance(value, os.PathLike) else value for key, value in settings.items()}
    try:
        package = importlib.import_module(name)  # slow, and most runs use none
        return package.init(**names, config=config, resume="allow", **{TRACKERS[name]: run.files.save_dir})
    except ModuleNotFoundError as error:
        raise UsageError(f"--use_{name} needs a package: pip install {name}") from error
    except Exception as error:  # each package has its own, under no common name
        raise UsageError(
            f"--use_{name}: {name} does not start: {error}. {name.upper()}_MODE=offline works without a network; "
            "metrics.jsonl beside the weights has the same figures"
        ) from error


def check_first_loss(run: Run, losses: torch.Tensor):
    """Raises UsageError if weights with an unknown tokenizer start no better than guessing: it is most likely wrong."""
    loss_sum, learned = losses.tolist()
    uniform = math.log(run.config.vocab_size)
    is_known = run.weights is None or "tokenizer_sha256" in run.weights.sidecar  # which was compared
    if is_known or run.stage.loss is not answer_loss or not learned or loss_sum / learned < uniform:
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
