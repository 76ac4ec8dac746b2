"""The project's own optimizer steps, over synthetic rows."""

from collections.abc import Iterable, Iterator
from functools import partial

import torch

from dataset.lm_dataset import VLMCollator
from dataset.sampler import BatchSampler
from scripts.bench.synthetic import load_data, load_model
from trainer.loop import extreme_batches, load_batches
from trainer.setup import round_frozen_weights
from trainer.stage import answer_loss, pad_answers
from trainer.step import count, make_context, train_step
from trainer.support.capture import CapturedStep
from trainer.support.compilation import LENGTH_MULTIPLE, compile_or_not
from trainer.support.processes import Processes, pick_dtype

RATE = 1e-4


class Steps:
    """A model, its data and what a step needs, on one device.

    Args:
        args: The measurement's settings.
        how: Names what is done with a step: compiled, captured, both or nothing.
        device: Default: that of the settings.
        dtype: Default: what training chooses on this device.
        grad_clip: 0: none.

    Raises:
        RuntimeError: If torch.compile does not work here, and it is to be compiled.
    """

    def __init__(self, args, how: str = "", device=None, dtype: torch.dtype | None = None, grad_clip: float = 1.0):
        self.device, self.workers = torch.device(device or args.device), args.num_workers
        self.data, self.model, self.batch_size = load_data(args), load_model(args), args.batch_size
        self.processes = Processes(0, 1, self.device)
        dtype = dtype or pick_dtype(None, self.device, self.model.config.head_dim)
        round_frozen_weights(self.model, dtype)
        forward = self.model.to(self.device)
        self.collate = VLMCollator(0, LENGTH_MULTIPLE if "compiled" in how else 1)
        if "compiled" in how:
            extremes = extreme_batches(self.data, self.batch_size, self.collate, self.device)
            forward = compile_or_not(self.model, answer_loss, extremes, dtype, print)
            if forward is self.model:
                raise RuntimeError("torch.compile does not work here")
        self.context = make_context(self.model, answer_loss, self.processes, dtype, grad_clip, forward)
        self.step = partial(train_step, self.context)
        if "captured" in how:
            self.step = CapturedStep(train_step, self.context, partial(pad_answers, batch_size=self.batch_size))

    def sampler(self) -> BatchSampler:
        return BatchSampler(self.data.lengths, self.batch_size, epochs=100)

    def batches(self, sampler: Iterable | None = None) -> Iterator[dict]:
        """Yields batches on the device, as the training loop gets them."""
        sampler = sampler or self.sampler()
        return load_batches(self.data, sampler, self.collate, self.device, self.workers)

    def take(self, batch: dict) -> torch.Tensor:
        """Takes a step; returns (2,) its summed loss and learned tokens, without a sync."""
        return self.step([batch], count([batch], self.processes), RATE)[0]
