"""Sums gradients over ranks in buckets, each sent as soon as the backward pass has its gradients."""

import torch
import torch.distributed as dist

from trainer.support.processes import Processes, others_may_be_gone

BUCKET_BYTES = 25_000_000  # as many as torch's DistributedDataParallel sends at once


class GradientSums:
    """Sums the gradients of a step over all ranks, while the backward pass computes others.

    Every rank sends the same buckets in the same order, whatever gradients it has: one without a picture, or without
    anything to learn, adds zeros. The bucket that a backward pass completes last takes the loss along.

    Args:
        parameters: What learns, in the order in which the model uses it: a backward pass has their gradients in the
            opposite order.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], processes: Processes):
        self.parameters, self.processes = parameters, processes
        self.buckets, self.sent, self.ready = [[]], [], set()
        self.is_last_backward = False
        for parameter in reversed(parameters):
            if sum(map(size_of, self.buckets[-1])) + size_of(parameter) > BUCKET_BYTES and self.buckets[-1]:
                self.buckets.append([])
            self.buckets[-1].append(parameter)
            if processes.world_size > 1:
                parameter.register_post_accumulate_grad_hook(self._note)

    def _note(self, parameter: torch.nn.Parameter):
        """Sends the next buckets that are complete; all but the last, which `finish` sends with the loss."""
        if not self.is_last_backward:
            return
        self.ready.add(parameter)
        while len(self.sent) < len(self.buckets) - 1 and self.ready.issuperset(self.buckets[len(self.sent)]):
            self._send()

    def _send(self, *extra: torch.Tensor):
        parts = [parameter.grad for parameter in self.buckets[len(self.sent)]] + list(extra)
        flat = torch.cat([part.flatten() for part in parts])
        with others_may_be_gone():
            self.sent.append((parts, flat, dist.all_reduce(flat, async_op=True)))

    def finish(self, extra: torch.Tensor):
        """Makes each gradient its sum over all ranks, and `extra`, a vector of float32, too; in place.

        What has no gradient gets zeros, in a single process too: AdamW treats the two differently.

        Raises:
            PeerError: If another rank is gone.
        """
        self.is_last_backward = False
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.processes.world_size == 1:
            return
        while len(self.sent) < len(self.buckets):
            self._send(*[extra] * (len(self.sent) == len(self.buckets) - 1))
        for parts, flat, work in self.sent:
            with others_may_be_gone():
                work.wait()
            for part, summed in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
                part.copy_(summed.view_as(part))
        self.sent, self.ready = [], set()


def size_of(parameter: torch.Tensor) -> int:
    return parameter.numel() * parameter.element_size()
