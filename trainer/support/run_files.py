"""The files of a run: their names, the lock on them, and what an earlier run of the same name left."""

import glob
import os
import time
from collections.abc import Callable
from functools import cached_property
from itertools import chain, count
from pathlib import Path

import torch
from filelock import Timeout

from common.errors import RankError, UsageError
from common.files import load_file, lock_of, scratch_folder
from common.paths import display_path
from common.schema import Range, SchemaError, check
from trainer.support.processes import Processes

COUNT, SECONDS = Range(int, 0, 1 << 53), Range(float, 0, 1e12)
# Checkpoints are files from outside too. This is in those of every stage:
PROGRESS = {
    **dict.fromkeys(("step", "epoch", "sample", "skipped_pictures"), COUNT),
    "units?": COUNT,  # old checkpoints lack it
    **dict.fromkeys(("fingerprint", "arguments"), {"*": str}),
    "learned": {"*": torch.Tensor},
    "optimizer": {"state": {"*": {"*": torch.Tensor}}},
    "scaler": {"*": Range(float, 0, 1e300)},
    "random": [{"cpu": torch.Tensor, "cuda": (torch.Tensor, None)}],
}
STATE = PROGRESS | {
    "pictures?": torch.Tensor,  # old checkpoints lack it
    "bad_steps": [COUNT] * 3,
    "processes": Range(int, 1, 1 << 20),
    "wandb_id": (str, None),
    "swanlab_id?": (str, None),
    "progress": {
        **{"learned_from": [Range(float, -1e300, 1e300)] * 2, "samples": COUNT, "tokens": COUNT},
        **{"data_seconds": SECONDS, "seconds_before": SECONDS},
    },
}
# Of the files a run writes, after its name.
SAVED, BAD_ROWS = ("_resume.pth", ".pth", ".json"), ".bad_rows.txt"
REPORTED = (".metrics.jsonl", ".report.html", "_samples", "_samples.md")  # the last of earlier versions
ENDINGS = (*SAVED, *REPORTED, BAD_ROWS)


class RunFiles:
    """The files a run writes: {save_dir}/{name}, with these endings."""

    def __init__(self, save_dir: Path, name: str):
        self.save_dir, self.name = save_dir, name
        endings = (".pth", "_resume.pth", ".metrics.jsonl", "_samples", BAD_ROWS)
        paths = (save_dir / f"{name}{ending}" for ending in endings)
        self.weights, self.state, self.metrics, self.samples, self.bad_rows = paths

    @cached_property
    def aside(self) -> Path:
        """The new name of an earlier run's files: not in use, and never taken for weights."""
        now = f"{self.name}.{time.strftime('%Y-%m-%d-%H%M%S')}"
        names = chain([now], (f"{now}-{number}" for number in count(2)))  # a second may see several runs
        return self.save_dir / next(name for name in names if not any(self.save_dir.glob(f"{glob.escape(name)}*")))

    def keep_aside(self, *endings: str) -> bool:
        """Renames an earlier run's files; returns whether there were any. Raises UsageError if that fails."""
        paths = {ending: self.save_dir / f"{self.name}{ending}" for ending in endings}
        earlier = {ending: path for ending, path in paths.items() if os.path.lexists(path)}
        for ending, path in earlier.items():
            try:
                path.rename(f"{self.aside}{ending}")
            except OSError as error:
                raise UsageError(f"{display_path(path)} cannot be renamed: {error.strerror}") from error
        return bool(earlier)


def read_state(path: Path, schema: dict, from_resume: int | None, log: Callable[[str], None]) -> dict | None:
    """Reads the checkpoint to resume from; None to start over.

    Raises UsageError if it cannot be read, or if --from_resume is needed to leave an unfinished run behind.
    """
    if from_resume is None and is_unfinished(path):
        raise UsageError(
            f"{display_path(path)} belongs to a run that did not finish: --from_resume 1 resumes it, --from_resume 0 "
            "starts over"
        )
    if not from_resume:
        return None
    if not path.is_file():
        log(f"--from_resume 1: no {display_path(path)} yet, so this run starts from the beginning")
        return None
    state = load_file(path)
    try:
        check(state, schema)
    except SchemaError as error:
        raise UsageError(
            f"{display_path(path)} is no checkpoint of this version of the project ({error}); --from_resume 0 starts "
            "over"
        ) from error
    return state


def is_unfinished(path: Path) -> bool:
    """Tells whether a checkpoint has epochs left; one that is missing or unreadable counts as finished."""
    try:
        state = load_file(path)
        return state["epoch"] < int(state["arguments"]["epochs"])
    except (UsageError, KeyError, TypeError, ValueError, RuntimeError):
        return False


def prepare_save_dir(files: RunFiles, processes: Processes):
    """Makes the folder, tries to write to it, and removes what a killed run of this name left half written.

    Returns the lock on the run's name, held by the main rank. Raises UsageError if the folder cannot be written to, or
    another process writes the same files now.
    """
    try:
        with scratch_folder(files.save_dir):  # it can be written to
            # A killed run's workers may hold the lock for 5 seconds more.
            return lock_of(files.save_dir / files.name).acquire(timeout=6) if processes.is_main else None
    except Timeout as error:
        raise RankError(
            f"another process is training {files.name} in {display_path(files.save_dir)}: wait for it, or give this "
            "run another --save_weight or --save_dir"
        ) from error
    except OSError as error:
        raise UsageError(f"--save_dir {files.save_dir} cannot be written to: {error.strerror}") from error
