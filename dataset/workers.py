"""The processes that load batches: started in one place, and what ends them told in words."""

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

SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))
SMALL_SHM = (
    "/dev/shm, through which workers send pictures, is too small (Docker's has 64 MB: start it with --shm-size 8g)"
)
CURES = {  # the first that fits
    ("Too many open files", "ancdata"): "too many files are open: raise the limit with ulimit -n 65536",
    ("/torch_", "shared memory", "No space left"): SMALL_SHM,
    (
        "temporarily unavailable",
        "start new thread",
    ): "too many processes run: raise ulimit -u, or Docker's --pids-limit",
}


def load_in_workers(data: Dataset, num_workers: int, prefetch_factor: int, **how) -> Iterator:
    """Yields what a DataLoader of these arguments yields, loaded by `num_workers` processes, or by this one for 0.

    Raises:
        RankError: If the workers cannot be started or cannot send what they load, or one dies; see `worker_errors`.
    """
    how |= {"prefetch_factor": prefetch_factor, "worker_init_fn": prepare_worker} if num_workers else {}
    # A generator of its own: a resumed run would lack the loader's draws from the global one.
    loader = DataLoader(data, num_workers=num_workers, generator=torch.Generator(), **how)
    if num_workers == 0:
        yield from loader
        return
    try:
        yield from loader
    except (RuntimeError, OSError, EOFError, MemoryError) as error:
        raise give_up(error, num_workers) from error


@contextlib.contextmanager
def worker_errors(num_workers: int):
    """Explains the error that torch raises, anywhere in the main thread, when a worker dies."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise give_up(error, num_workers) from error


def give_up(error: Exception, num_workers: int) -> RankError:
    """Ends all workers, one of which may never hear of the others' end; returns the error in words, with its cure."""
    if hasattr(signal, "SIGCHLD"):  # not on Windows
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise again
    for process in multiprocessing.active_children():
        process.kill()  # they ignore SIGTERM
    text = str(error).strip()
    # Of an error that a worker sent, the last line says what it is; of torch's own about workers, the first.
    reason = text.splitlines()[-1 if text.startswith("Caught") else 0] if text else type(error).__name__
    fitting = (cure for words, cure in CURES.items() if any(word in reason for word in words))
    cure = next(fitting, "most likely memory ran out, or too few files may be open (ulimit -n 65536 allows more)")
    return RankError(
        f"a worker process that reads pictures was lost ({reason.strip():.160}): {cure}, or use fewer than "
        f"--num_workers {num_workers}; --num_workers 0 does without workers. What was saved is kept: the same command "
        "with --from_resume 1 resumes from there"
    )


def prepare_worker(worker: int):
    """Lets a worker ignore the signals, and send its errors in place of what they keep it from sending.

    The signals reach it too, and the step to be finished needs it.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    multiprocessing.queues.Queue._on_queue_feeder_error = send_error
    # The thread that hands over files of shared memory reports its errors here, while the main process waits for one.
    sys.excepthook = lambda *error: os._exit(1)
    # Tracebacks of its threads and of its end; what it cannot send or do, the main process tells.
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (it stays open)


def send_error(queue: multiprocessing.queues.Queue, error: Exception, item: tuple):
    """Sends an error in place of a batch, which `multiprocessing` would drop while the main process waits for it."""
    queue.put((item[0], ExceptionWrapper((type(error), error, error.__traceback__), "in a worker")))
