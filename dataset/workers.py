"""Worker processes that load batches; whatever ends one is reported with likely causes."""

import contextlib
import multiprocessing
import multiprocessing.queues
import os
import signal
import sys
from collections.abc import Iterator

import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset

from common.errors import RankError

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
CAUSES = (
    "most likely memory ran out, /dev/shm, where workers put pictures, is too small (Docker's has 64 MB: start it with "
    "--shm-size 8g), or too few files or processes are allowed (raise ulimit -n and -u, and Docker's --pids-limit)"
)


def load_in_workers(data: Dataset, num_workers: int, prefetch_factor: int, **how) -> Iterator:
    """Yields what a DataLoader of these arguments yields (0 workers: loaded here); RankError if a worker fails."""
    how |= {"prefetch_factor": prefetch_factor, "worker_init_fn": prepare_worker} if num_workers else {}
    # A generator of its own: a resumed run would lack the loader's draws from the global one.
    loader = DataLoader(data, num_workers=num_workers, generator=torch.Generator(), **how)
    with worker_errors(num_workers, is_loading=num_workers > 0):
        yield from loader


@contextlib.contextmanager
def worker_errors(num_workers: int, is_loading: bool = False):
    """Raises RankError for what torch raises in the main thread when a worker dies; while loading, for any error."""
    try:
        yield
    except (RuntimeError, OSError, EOFError, MemoryError) as error:
        text = str(error).strip()
        if not is_loading and not text.startswith("DataLoader worker"):
            raise
        if hasattr(signal, "SIGCHLD"):  # not on Windows
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise again
        for process in multiprocessing.active_children():
            process.kill()  # it may wait for the dead one, and ignores SIGTERM
        # Of an error that a worker sent, the last line says what it is; of torch's own about workers, the first.
        reason = text.splitlines()[-1 if text.startswith("Caught") else 0] if text else type(error).__name__
        raise RankError(
            f"a worker process that reads pictures was lost ({reason.strip():.160}): {CAUSES}; use fewer than "
            f"--num_workers {num_workers}; --num_workers 0 does without workers. What was saved is kept: the same "
            "command with --from_resume 1 resumes from there"
        ) from error


def prepare_worker(worker: int):
    """Makes a worker ignore signals, and report every error to the main process."""
    # Ctrl-C reaches it too, but the main process still needs it to finish the step.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    multiprocessing.queues.Queue._on_queue_feeder_error = send_error
    # Exit if the thread that hands over shared memory fails: the main process would wait for ever.
    sys.excepthook = lambda *error: os._exit(1)
    # No tracebacks: the main process reports what a worker could not do.
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (it stays open)


def send_error(queue: multiprocessing.queues.Queue, error: Exception, item: tuple):
    """Sends an error in place of a batch, which `multiprocessing` would drop while the main process waits for it."""
    queue.put((item[0], ExceptionWrapper((type(error), error, error.__traceback__), "in a worker")))
