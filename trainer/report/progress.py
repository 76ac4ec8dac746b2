"""What a run reports: a bar in a terminal, plain lines elsewhere, metrics.jsonl always, wandb if asked."""

import functools
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

INIT_SECONDS = 10


class Progress:
    """Counts what was learned since the last report and reports it (on the main rank; the others are silent).

    Args:
        total_steps, done_steps: Optimizer steps of the whole run, and those done before a resume.
        log_interval: Steps between reports; the first is after step 1.
        metrics_path: The jsonl that each report is appended to, or None for silence. Of an earlier file only the
            reports up to `done_steps` are kept.
        wandb_run: A wandb run, or None.
    """

    def __init__(self, total_steps, done_steps, log_interval, metrics_path: Path | None, wandb_run=None):
        self.total_steps, self.done_steps, self.log_interval = total_steps, done_steps, log_interval
        self.metrics_path, self.wandb_run = metrics_path, wandb_run
        self.started = time.perf_counter()
        self.has_begun, self.can_write, self.figures, self.heldout_figures = False, True, {}, {}
        self.bar = None
        if metrics_path is not None and sys.stderr.isatty():
            self.bar = tqdm(
                total=total_steps,
                initial=done_steps,
                dynamic_ncols=True,
                smoothing=0.1,
                bar_format="{percentage:3.0f}% step {n_fmt}/{total_fmt}{postfix}, ETA {remaining} {bar}",
            )
        self._reset()

    def _reset(self):
        self.interval_started = time.perf_counter()
        self.samples = self.tokens = self.data_seconds = self.seconds_before = 0
        self.losses = torch.zeros(2)

    def state_dict(self) -> dict:
        """Returns what was counted since the last report, for a resumed run to report."""
        counted = {
            "learned_from": self.losses.tolist(),
            "samples": self.samples,
            "tokens": self.tokens,
            "data_seconds": self.data_seconds,
            "seconds_before": self.seconds_before + time.perf_counter() - self.interval_started,
        }
        return {"progress": counted, "wandb_id": None if self.wandb_run is None else self.wandb_run.id}

    def load_state_dict(self, state: dict):
        counted = state["progress"]
        self.losses = torch.tensor(counted["learned_from"])
        self.samples, self.tokens = counted["samples"], counted["tokens"]
        self.data_seconds, self.seconds_before = counted["data_seconds"], counted["seconds_before"]

    def add(self, losses: torch.Tensor, samples: int, tokens: int, data_seconds: float):
        """Counts an optimizer step; `losses` (2,), its summed loss and learned tokens over all ranks, is not synced."""
        self.losses = self.losses.to(losses.device) + losses
        self.samples += samples
        self.tokens += tokens
        self.data_seconds += data_seconds
        if self.bar is not None:
            self.bar.update(1)

    def due(self, step: int, epoch_ends: bool) -> bool:
        """Tells whether this step is reported."""
        return step == 1 or step % self.log_interval == 0 or epoch_ends

    def report(self, step: int, epoch: int, learning_rate: float, counts: dict[str, int]) -> dict:
        """Reports the interval that ends here and begins the next; returns what was reported."""
        loss_sum, learned = self.losses.tolist()  # syncs
        seconds = max(1e-9, self.seconds_before + time.perf_counter() - self.interval_started)
        record = {
            "step": step,
            "epoch": epoch,
            "loss": round(loss_sum / learned, 6) if learned else None,
            "learning_rate": learning_rate,
            "samples_per_second": round(self.samples / seconds, 2),
            "tokens_per_second": round(self.tokens / seconds, 1),
            "data_wait": round(self.data_seconds / seconds, 4),
            "learned_tokens": int(learned),
            **counts,
            "seconds": round(time.perf_counter() - self.started, 3),
        }
        if self.metrics_path is not None:
            self._show(record)
            self._append(record)
        if self.wandb_run is not None:
            self.wandb_run.log({f"train/{key}": value for key, value in record.items() if key != "step"}, step=step)
        self._reset()
        return record

    def report_heldout(self, step: int, epoch: int, held_out: dict, figures: dict[str, str], message: str):
        """Reports a held-out evaluation: `message` as a line of its own, `figures` in the bar from now on."""
        self.heldout_figures = figures
        self._set_postfix()
        self.log(message)
        if self.metrics_path is not None:
            self._append({"step": step, "epoch": epoch, "eval": held_out})
        if self.wandb_run is not None:
            self.wandb_run.log({f"eval/{key}": value for key, value in held_out.items()}, step=step)

    def exclude(self, seconds: float):
        """Leaves time that was not training out of samples/s."""
        self.interval_started += seconds

    def log_samples(self, step: int, generated: list[dict], folder: Path):
        """Sends images and their descriptions to wandb, if it is used."""
        if self.wandb_run is None or not generated:
            return
        import wandb

        columns = ["step", "picture", "prompt", "reference", "description"]
        table = wandb.Table(columns=columns, data=[[row[column] for column in columns] for row in generated])
        pictures = [wandb.Image(str(folder / row["picture"]), caption=row["description"]) for row in generated]
        self.wandb_run.log({"eval/descriptions": table, "eval/pictures": pictures}, step=step)

    def _append(self, record: dict):
        try:
            self.begin_file()
            with open(self.metrics_path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except (OSError, UsageError) as error:
            if self.can_write:  # warn once
                self.log(f"warning: {display_path(self.metrics_path)} cannot be written, training continues: {error}")
            self.can_write = False

    def begin_file(self):
        """Cuts an earlier metrics file to the steps done before.

        Called with the first report, so that a run that fails before it leaves an earlier run's curve alone.
        """
        if self.metrics_path is None or self.has_begun:
            return
        kept = "".join(line + "\n" for line in reports_until(self.metrics_path, self.done_steps))
        write_atomically(self.metrics_path, lambda file: file.write(kept.encode("utf-8")))
        self.has_begun = True

    def _show(self, record: dict):
        figures = {
            "loss": "none" if record["loss"] is None else f"{record['loss']:.4f}",
            "lr": f"{record['learning_rate']:.2e}",
            "samples/s": f"{record['samples_per_second']:.1f}",
            "tokens/s": f"{record['tokens_per_second']:,.0f}",
            "data wait": f"{record['data_wait']:.1%}",
        }
        if self.bar is not None:
            self.figures = figures
            self._set_postfix()
            return
        if record["step"] > 1:  # the first step is slow: workers start, memory is allocated
            done = max(1, record["step"] - self.done_steps)
            figures["ETA"] = clock(record["seconds"] / done * (self.total_steps - record["step"]))
        line = "  ".join(f"{name} {value}" for name, value in figures.items())
        self.log(f"epoch {record['epoch']}  step {record['step']}/{self.total_steps}  {line}")

    def _set_postfix(self):
        if self.bar is not None and self.figures:
            gap = "".join(f", {name} {value}" for name, value in self.heldout_figures.items())
            self.bar.set_postfix_str(f"loss {self.figures['loss']}{gap}, {self.figures['samples/s']} samples/s")

    def log(self, message: str):
        """Prints a line, above the bar if there is one."""
        if self.bar is not None:
            self.bar.write(message)
        elif self.metrics_path is not None:
            print(message, flush=True)

    def close(self):
        """Closes the bar and the wandb run."""
        if self.bar is not None:
            self.bar.close()
        if self.wandb_run is not None:
            self.wandb_run.finish()


def reports_until(path: Path, step: int) -> list[str]:
    """Returns a metrics file's lines up to a step: a killed run may have reported more than it saved."""
    if step == 0 or not path.is_file():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue  # truncated by a kill
    return kept


def clock(seconds: float) -> str:
    """Formats seconds: 1:02:03, or 2:03 below an hour."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def start_wandb(project: str, name: str, config: dict, folder: Path, run_id: str | None):
    """Starts a wandb run, or continues the one whose id is given; offline if wandb cannot be reached.

    Raises:
        UsageError: If wandb cannot start for another reason, such as a wrong key.
    """
    import wandb  # slow to import, and most runs do not use it

    start = functools.partial(wandb.init, project=project, name=name, config=config, dir=folder, id=run_id)
    # By default wandb waits 90 seconds; WANDB_INIT_TIMEOUT is its own setting for that.
    wait = {} if "WANDB_INIT_TIMEOUT" in os.environ else {"init_timeout": INIT_SECONDS}
    try:
        return start(resume="allow", settings=wandb.Settings(**wait))
    except (wandb.errors.Error, OSError) as error:
        if not isinstance(error, wandb.errors.CommError) or isinstance(error, wandb.errors.AuthenticationError):
            raise UsageError(
                f"--use_wandb: wandb does not start: {error}. WANDB_MODE=offline works without a network"
            ) from error
        reason = " ".join(str(error).split())
    tqdm.write(
        f"warning: --use_wandb: wandb cannot be reached, so this run is logged offline (`wandb sync` sends it later; "
        f"metrics.jsonl beside the weights has the same): {reason}"
    )
    wandb.teardown()  # forgets the failed attempt, which has the run's id
    return start(mode="offline")


def open_progress(run: Run, done_steps: int, total_steps: int, settings: dict) -> Progress:
    """Returns the run's Progress; on the main rank with metrics.jsonl, and wandb if asked for."""
    wandb_run = None
    if run.args.use_wandb and run.processes.is_main:
        config = {key: str(value) if isinstance(value, os.PathLike) else value for key, value in settings.items()}
        run_id = None if run.state is None else run.state["wandb_id"]
        wandb_run = start_wandb(run.args.wandb_project, run.files.name, config, run.files.save_dir, run_id)
    metrics_path = run.files.metrics if run.processes.is_main else None
    progress = Progress(total_steps, done_steps, run.args.log_interval, metrics_path, wandb_run)
    if run.state is not None:
        progress.load_state_dict(run.state)
    return progress
