"""The samples of each batch: a pure function of seed and epoch, the same for any number of ranks."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

MIN_CHUNK, MAX_CHUNK = 16, 1024
CHUNKS_PER_WINDOW = 64
JITTER = 0.01


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
    """Yields one rank's share of the batches, from a given sample on, over all epochs that are left.

    An optimizer step takes the next `batch_size * accumulation_steps * world_size` samples of the epoch's order (fewer
    in its last step), divided evenly: every rank gets the same number of batches, some of which may be empty. `lengths`
    are the samples' tokens, `accumulation_steps` the forward passes of a step.
    """

    def __init__(self, lengths, batch_size, accumulation_steps=1, epochs=1, seed=42, rank=0, world_size=1):
        self.lengths = lengths
        self.accumulation_steps, self.epochs, self.seed = accumulation_steps, epochs, seed
        self.rank, self.world_size = rank, world_size
        self.group = batch_size * accumulation_steps * world_size
        self.start_epoch = self.start_sample = 0

    def start_at(self, epoch: int, sample: int):
        """Begins with this sample of this epoch's order."""
        self.start_epoch, self.start_sample = epoch, sample

    def steps(self) -> Iterator[tuple[int, int]]:
        """Yields (epoch, first sample) of each optimizer step that is left."""
        for epoch in range(self.start_epoch, self.epochs):
            start = self.start_sample if epoch == self.start_epoch else 0
            for first in range(start, len(self.lengths), self.group):
                yield epoch, first

    def after(self, epoch: int, first: int) -> tuple[int, int]:
        """Returns epoch and first sample of the step that follows the one at `first`."""
        following = first + self.group
        return (epoch, following) if following < len(self.lengths) else (epoch + 1, 0)

    def done(self, epoch: int, first: int) -> float:
        """Returns the share of the run done before this step: 0 at its first, 1 at its last."""
        samples = len(self.lengths)
        last = (samples - 1) // self.group * self.group
        return (epoch * samples + first) / max(1, (self.epochs - 1) * samples + last)

    def __len__(self) -> int:
        """Remaining batches of this process."""
        return self.accumulation_steps * sum(1 for _ in self.steps())

    def __iter__(self) -> Iterator[list[int]]:
        ordered = None
        for epoch, start in self.steps():
            if epoch != ordered:
                ordered, order = epoch, epoch_order(self.lengths, self.seed, epoch)
            shares = np.array_split(order[start : start + self.group], self.accumulation_steps * self.world_size)
            for micro_step in range(self.accumulation_steps):
                yield shares[micro_step * self.world_size + self.rank].tolist()
