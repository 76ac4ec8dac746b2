"""A run's reports: lines, a bar below them in a terminal, metrics.jsonl, and wandb or SwanLab if asked."""

import importlib
import json
import os
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from common.errors import UsageError
from common.files import write_atomically
from common.paths import display_path
from trainer.setup import Run

TRACKERS = {"wandb": "dir", "swanlab": "log_dir"}  # packages with the same functions: their argument for the folder
clock = tqdm.format_interval  # seconds to 02:03, 1:02:03


class Progress:
    """Sums loss and counts since the last report, and reports them (on the main rank; the others are silent).

    metrics.jsonl of a resumed run keeps the reports up to the step it resumes from.

    Args:
        run: The run; wandb and SwanLab are started if it asks for them.
        total_steps, done_steps: Optimizer steps of the whole run, and those done before a resume.
        settings: The run's, for them.
    """

    def __init__(self, run: Run, total_steps: int, done_steps: int, settings: dict):
        self.total_steps, self.done_steps = total_steps, done_steps
        self.metrics_path = run.files.metrics if run.processes.is_main else None  # None: silent
        used = [name for name in TRACKERS if getattr(run.args, f"use_{name}") and run.processes.is_main]
        self.trackers = {name: start_tracker(name, run, settings) for name in used}
        self.started = time.perf_counter()
        self.has_begun = self.has_failed = False  # writing metrics.jsonl
        disable = None if run.processes.is_main else True  # None: shown in a terminal only
        form = "{percentage:3.0f}% step {n_fmt}/{total_fmt}, ETA {remaining} {bar}"
        self.bar = tqdm(total=total_steps, initial=done_steps, disable=disable, dynamic_ncols=True, bar_format=form)
        self._reset()
        if run.state is not None:
            self.counted = {name: run.state["progress"][name] for name in self.counted}
            self.losses = torch.tensor(run.state["progress"]["learned_from"])

    def _reset(self):
        self.interval_started = time.perf_counter()
        self.losses = torch.zeros(2)
        self.counted = {"samples": 0, "tokens": 0, "data_seconds": 0, "seconds_before": 0}

    def _seconds(self) -> float:
        return self.counted["seconds_before"] + time.perf_counter() - self.interval_started

    def state_dict(self) -> dict:
        """Returns the sums since the last report, for a resumed run to report."""
        counted = self.counted | {"learned_from": self.losses.tolist(), "seconds_before": self._seconds()}
        ids = dict.fromkeys(f"{name}_id" for name in TRACKERS)
        return {"progress": counted} | ids | {f"{name}_id": it.id for name, it in self.trackers.items()}

    def add(self, losses: torch.Tensor, samples: int, tokens: int, data_seconds: float):
        """Counts an optimizer step; `losses` (2,), its summed loss and learned tokens over all ranks, is not synced."""
        self.losses = self.losses.to(losses.device) + losses
        for name, value in (("samples", samples), ("tokens", tokens), ("data_seconds", data_seconds)):
            self.counted[name] += value
        self.bar.update(1)

    def report(self, step: int, epoch: int, learning_rate: float, counts: dict[str, int]) -> dict:
        """Reports the interval that ends here and begins the next; returns the record."""
        loss_sum, learned = self.losses.tolist()  # syncs
        seconds = max(1e-9, self._seconds())
        record = {
            "step": step,
            "epoch": epoch,
            "loss": round(loss_sum / learned, 6) if learned else None,
            "learning_rate": learning_rate,
            "samples_per_second": round(self.counted["samples"] / seconds, 2),
            "tokens_per_second": round(self.counted["tokens"] / seconds, 1),
            "data_wait": round(self.counted["data_seconds"] / seconds, 4),
            "learned_tokens": int(learned),
            **counts,
            "seconds": round(time.perf_counter() - self.started, 3),
        }
        self.log(self._line(record))
        self._append(record)
        self._send("train", step, record)
        self._reset()
        return record

    def _line(self, record: dict) -> str:
        step, loss = record["step"], "none" if record["loss"] is None else f"{record['loss']:.4f}"
        # No estimate after the first step, which is slow: workers start, memory is allocated.
        remaining = record["seconds"] / max(1, step - self.done_steps) * (self.total_steps - step)
        eta = f"  ETA {clock(remaining)}" if step > 1 else ""
        return (
            f"epoch {record['epoch']}  step {step}/{self.total_steps}  loss {loss}  lr {record['learning_rate']:.2e}  "
            f"samples/s {record['samples_per_second']:.1f}  tokens/s {record['tokens_per_second']:,.0f}  "
            f"data wait {record['data_wait']:.1%}{eta}"
        )

    def report_heldout(self, step: int, epoch: int, held_out: dict, message: str):
        """Reports an evaluation on held-out rows: `message` as a line, its figures in the metrics."""
        self.log(message)
        self._append({"step": step, "epoch": epoch, "eval": held_out})
        self._send("eval", step, held_out)

    def exclude(self, seconds: float):
        """Leaves time not spent training out of samples/s."""
        self.interval_started += seconds

    def _send(self, part: str, step: int, values: dict):
        for tracker in self.trackers.values():
            tracker.log({f"{part}/{name}": value for name, value in values.items() if name != "step"}, step=step)

    def _append(self, record: dict):
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

    def log(self, message: str):
        """Prints a line, above the bar if there is one."""
        if self.metrics_path is not None:
            tqdm.write(message)
            sys.stdout.flush()

    def close(self):
        """Closes the bar, and the runs at wandb and SwanLab."""
        self.bar.close()
        for tracker in self.trackers.values():
            tracker.finish()


def reports_until(path: Path, step: float) -> list[str]:
    """Returns a metrics file's lines up to a step: a killed run may have reported more than it saved."""
    if step == 0 or not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                lines.append(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # truncated by a kill
    return lines


def start_tracker(name: str, run: Run, settings: dict):
    """Starts a run at a service of TRACKERS, or continues that of a resumed one.

    Raises:
        UsageError: If its package is missing, or does not start.
    """
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
