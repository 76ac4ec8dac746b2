"""What a run tells: a bar in a terminal, plain lines elsewhere, metrics.jsonl always, wandb where asked."""

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

INIT_SECONDS = 10


class Progress:
    """Counts what was learned since the last log line and reports it (on the main process; silent elsewhere).

    Args:
        total_steps, done_steps: Optimizer steps of the whole run, and those done before.
        log_interval: Steps between reports; the first is after step 1.
        metrics_path: The jsonl that each report is appended to, or None for silence. It keeps the reports of the steps
            that were done before, and no others.
        wandb_run: A wandb run, or None.
        pending: What a saved run had learned since its last report (`Progress.pending`).
    """

    def __init__(self, total_steps, done_steps, log_interval, metrics_path: Path | None, wandb_run=None, pending=None):
        self.total_steps, self.done_steps, self.log_interval = total_steps, done_steps, log_interval
        self.metrics_path, self.wandb_run = metrics_path, wandb_run
        self.started = time.perf_counter()
        self.has_begun = False
        self.bar = None
        if metrics_path is not None and sys.stderr.isatty():
            self.bar = tqdm(total=total_steps, initial=done_steps, unit="step", dynamic_ncols=True, smoothing=0.1)
        self.can_write, self.words, self.words_kept = True, {}, {}
        self._reset()
        if pending is not None:
            self.learned_from = torch.tensor(pending["learned_from"])
            self.samples, self.tokens, self.seconds_before = (
                pending[name] for name in ("samples", "tokens", "seconds_before")
            )
            self.data_seconds = pending["data_seconds"]

    def _reset(self):
        self.interval_started = time.perf_counter()
        self.samples = self.tokens = self.data_seconds = self.seconds_before = 0
        self.learned_from = torch.zeros(2)

    def pending(self) -> dict:
        """What was learned since the last report, for a run that goes on from here to report it."""
        return {
            "learned_from": self.learned_from.tolist(),
            "samples": self.samples,
            "tokens": self.tokens,
            "data_seconds": self.data_seconds,
            "seconds_before": self.seconds_before + time.perf_counter() - self.interval_started,
        }

    def add(self, learned_from: torch.Tensor, samples: int, tokens: int, data_seconds: float):
        """One optimizer step: (2,) sum of its losses over all ranks and learned tokens, not yet waited for; its counts."""
        self.learned_from = self.learned_from.to(learned_from.device) + learned_from
        self.samples += samples
        self.tokens += tokens
        self.data_seconds += data_seconds
        if self.bar is not None:
            self.bar.update(1)

    def due(self, step: int, epoch_ends: bool) -> bool:
        return step == 1 or step % self.log_interval == 0 or epoch_ends

    def report(self, step: int, epoch: int, learning_rate: float, counts: dict[str, int]) -> dict:
        """Reports the interval that ends here and begins the next. Returns what was reported."""
        loss_sum, learned = self.learned_from.tolist()  # waits for the device
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

    def report_heldout(self, step: int, epoch: int, held_out: dict, words: dict[str, str], message: str):
        """Reports a measurement on held-out rows: `message` as a line of its own, `words` in the bar from now on."""
        self.words_kept = words
        self._set_postfix()
        self.say(message)
        if self.metrics_path is not None:
            self._append({"step": step, "epoch": epoch, "eval": held_out})
        if self.wandb_run is not None:
            self.wandb_run.log({f"eval/{key}": value for key, value in held_out.items()}, step=step)

    def leave_out(self, seconds: float):
        """So much of the interval was not training: it counts in no samples/s."""
        self.interval_started += seconds

    def log_samples(self, step: int, said: list[dict], folder: Path):
        """Sends pictures and what was said about them to wandb, where it is used."""
        if self.wandb_run is None or not said:
            return
        import wandb

        columns = ["step", "picture", "prompt", "reference", "description"]
        table = wandb.Table(columns=columns, data=[[row[column] for column in columns] for row in said])
        pictures = [wandb.Image(str(folder / row["picture"]), caption=row["description"]) for row in said]
        self.wandb_run.log({"eval/descriptions": table, "eval/pictures": pictures}, step=step)

    def _append(self, record: dict):
        try:
            self.begin_file()
            with open(self.metrics_path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except (OSError, UsageError) as error:
            if self.can_write:  # said once, not at every report
                self.say(f"warning: {display_path(self.metrics_path)} cannot be written, training goes on: {error}")
            self.can_write = False

    def begin_file(self):
        """Leaves in metrics_path the steps done before; called no sooner than there is something to report or save.

        So a run that fails at its first loss leaves the curve of the one before as it was.
        """
        if self.metrics_path is None or self.has_begun:
            return
        kept = "".join(line + "\n" for line in reports_until(self.metrics_path, self.done_steps))
        write_atomically(self.metrics_path, lambda file: file.write(kept.encode("utf-8")))
        self.has_begun = True

    def _show(self, record: dict):
        words = {
            "loss": "none" if record["loss"] is None else f"{record['loss']:.4f}",
            "lr": f"{record['learning_rate']:.2e}",
            "samples/s": f"{record['samples_per_second']:.1f}",
            "tokens/s": f"{record['tokens_per_second']:,.0f}",
            "data wait": f"{record['data_wait']:.1%}",
        }
        if self.bar is not None:
            self.words = words
            self._set_postfix()
            return
        if record["step"] > 1:  # the first step is slow: workers start, memory is taken
            done = max(1, record["step"] - self.done_steps)
            words["ETA"] = clock(record["seconds"] / done * (self.total_steps - record["step"]))
        line = "  ".join(f"{name} {value}" for name, value in words.items())
        self.say(f"epoch {record['epoch']}  step {record['step']}/{self.total_steps}  {line}")

    def _set_postfix(self):
        """The losses first: a narrow terminal cuts the rest off."""
        if self.bar is not None:
            loss = {name: self.words[name] for name in ("loss",) if name in self.words}
            self.bar.set_postfix(loss | self.words_kept | self.words)

    def say(self, message: str):
        """A line of its own, above the bar where there is one."""
        if self.metrics_path is None:
            return
        if self.bar is not None:
            self.bar.write(message)
        else:
            print(message, flush=True)

    def close(self):
        if self.bar is not None:
            self.bar.close()
        if self.wandb_run is not None:
            self.wandb_run.finish()


def reports_until(path: Path, step: int) -> list[str]:
    """The lines of a metrics file up to a step: a run that was stopped may have reported more than it saved."""
    if step == 0 or not path.is_file():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # cut off while it was written
    return kept


def clock(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def start_wandb(project: str, name: str, config: dict, folder: Path, run_id: str | None):
    """A wandb run, the one that was begun before where its id is given; one kept on disk where wandb cannot be reached.

    Raises:
        UsageError: If wandb cannot start for another reason, as a wrong key.
    """
    import wandb  # only here: it is slow to load and most runs do without

    start = functools.partial(wandb.init, project=project, name=name, config=config, dir=folder, id=run_id)
    # wandb itself waits for 90 seconds; WANDB_INIT_TIMEOUT is its own way to say another time.
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
    wandb.teardown()  # forgets the attempt, which has the run's id
    return start(mode="offline")
