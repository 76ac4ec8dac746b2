"""The samples of each batch, the same for any number of ranks, and worker processes that load them."""

import contextlib
import multiprocessing
import multiprocessing.queues
import os
import signal
import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset, Sampler

from common.errors import RankError

MIN_CHUNK, MAX_CHUNK = 16, 1024
CHUNKS_PER_WINDOW = 64
JITTER = 0.01
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def epoch_order(lengths: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Returns a shuffled order of all samples, in which neighbours are of similar length, from (samples,) lengths.

    All samples are shuffled and cut into large windows; each window is sorted by length and cut into chunks. The chunks
    are shuffled, then the quarters of each chunk, then their quarters, and so on: a batch of any size up to a chunk's
    holds samples of similar length, and batches come in random order. Nothing here depends on batch size or ranks; a
    chunk is a power of two, so batches of the usual sizes do not straddle two of them.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    chunk = 2 ** int(np.log2(np.clip(len(lengths) // CHUNKS_PER_WINDOW, MIN_CHUNK, MAX_CHUNK)))
    result = [order[:0]]
    for start in range(0, len(order), chunk * CHUNKS_PER_WINDOW):
        window = order[start : start + chunk * CHUNKS_PER_WINDOW]
        # With a little noise: sorted exactly, a small file's neighbours would be the same in every epoch.
        window = window[np.argsort(lengths[window] * rng.uniform(1 - JITTER, 1 + JITTER, len(window)))]
        # The samples that do not fill a chunk are neighbours in length too, at a random place, and come last.
        rest = len(window) % chunk
        cut = int(rng.integers(len(window) // chunk + 1)) * chunk
        size, blocks = chunk, np.delete(window, slice(cut, cut + rest))[None]
        while blocks.shape[1] > 1:
            parts = blocks.reshape(len(blocks), -1, size)
            places = rng.random(parts.shape[:2]).argsort(axis=1)
            blocks = np.take_along_axis(parts, places[:, :, None], axis=1).reshape(-1, size)
            size = max(1, size // 4)
        result += [blocks.flatten(), rng.permutation(window[cut : cut + rest])]
    return np.concatenate(result)


class BatchSampler(Sampler):
    """Yields one rank's share of the batches, from sample `start` (epoch, its place in that epoch's order) on.

    An optimizer step takes the next `batch_size * accumulation_steps * world_size` samples of the epoch's order (fewer
    in its last step), divided evenly: every rank gets the same number of batches, some of which may be empty. `lengths`
    are the samples' tokens, `accumulation_steps` the forward passes of a step.
    """

    def __init__(
        self, lengths, batch_size, accumulation_steps=1, epochs=1, seed=42, rank=0, world_size=1, start=(0, 0)
    ):
        self.lengths, self.accumulation_steps, self.epochs, self.seed = lengths, accumulation_steps, epochs, seed
        self.rank, self.world_size, self.start = rank, world_size, start
        self.group = batch_size * accumulation_steps * world_size

    def steps(self) -> Iterator[tuple[tuple[int, int], tuple[int, int], float]]:
        """Yields each remaining step's start, the next one's, and the share of the run before it (at the last: 1)."""
        samples, (epoch, first) = len(self.lengths), self.start
        last = (self.epochs - 1) * samples + (samples - 1) // self.group * self.group
        while epoch < self.epochs and first < samples:
            following = (epoch, first + self.group) if first + self.group < samples else (epoch + 1, 0)
            yield (epoch, first), following, (epoch * samples + first) / max(1, last)
            epoch, first = following

    def __len__(self) -> int:  # remaining batches of this process
        return self.accumulation_steps * sum(1 for _ in self.steps())

    def __iter__(self) -> Iterator[list[int]]:
        ordered = None
        for (epoch, first), *_ in self.steps():
            if epoch != ordered:
                ordered, order = epoch, epoch_order(self.lengths, self.seed, epoch)
            shares = np.array_split(order[first : first + self.group], self.accumulation_steps * self.world_size)
            for micro_step in range(self.accumulation_steps):
                yield shares[micro_step * self.world_size + self.rank].tolist()


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
            f"a worker process that reads pictures was lost ({reason.strip():.160}): most likely memory ran out, "
            "/dev/shm, where workers put pictures, is too small (Docker's has 64 MB: start it with --shm-size 8g), or "
            "too few files or processes are allowed (raise ulimit -n and -u, and Docker's --pids-limit); use fewer "
            f"than --num_workers {num_workers}; --num_workers 0 does without workers. What was saved is kept: the "
            "same command with --from_resume 1 resumes from there"
        ) from error


def prepare_worker(worker: int):
    """Makes a worker ignore signals, and report every error to the main process."""

    def send_error(queue: multiprocessing.queues.Queue, error: Exception, item: tuple):
        # In place of a batch, which `multiprocessing` would drop while the main process waits for it.
        queue.put((item[0], ExceptionWrapper((type(error), error, error.__traceback__), "in a worker")))

    # Ctrl-C reaches it too, but the main process still needs it to finish the step.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    multiprocessing.queues.Queue._on_queue_feeder_error = send_error
    # Exit if the thread that hands over shared memory fails: the main process would wait for ever.
    sys.excepthook = lambda *error: os._exit(1)
    # No tracebacks: the main process reports what a worker could not do.
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (it stays open)
