"""One optimizer step, the same for every stage and for any number of processes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from trainer.support.processes import Processes, others_may_be_gone, tensors_of


@dataclass(frozen=True)
class Counts:
    """Sizes of an optimizer step, summed over its micro-batches and all ranks."""

    units: int | torch.Tensor  # the divisor of the stage's loss; a tensor in a captured step
    samples: int
    tokens: int
    skipped: int


class StageLoss(nn.Module):
    """A stage's loss as a module, for DistributedDataParallel: every batch reaches every trainable parameter."""

    def __init__(self, model: nn.Module, loss: Callable, forward_model: Callable):
        super().__init__()
        self.model, self.stage_loss = model, loss
        object.__setattr__(self, "forward_model", forward_model)  # not a submodule: its parameters are the model's

    def forward(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor | None]:
        if batch["units"] == 0:  # nothing to learn on this rank: zero gradients for its part of the sum
            return 0 * sum(weight.sum() for weight in self.model.parameters() if weight.requires_grad), None
        # Tensors alone: the counts are for `train_step`, which divides by those of the whole step.
        return self.stage_loss(self.forward_model, tensors_of(batch))


class TrainContext:
    """Everything a step needs: the loss, AdamW over the trainable parameters, a gradient scaler for float16."""

    def __init__(
        self, model, loss: Callable, processes: Processes, dtype: torch.dtype, grad_clip: float, forward_model=None
    ):
        device = processes.device.type
        self.processes, self.dtype, self.grad_clip = processes, dtype, grad_clip
        parameters = self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, fused=device in ("cpu", "cuda"), capturable=device == "cuda")
        self.scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
        self.loss = StageLoss(model, loss, forward_model or model)  # the former is the model compiled
        if processes.world_size > 1:
            with others_may_be_gone():
                self.loss = DistributedDataParallel(self.loss, broadcast_buffers=False, gradient_as_bucket_view=True)

    def state_dict(self) -> dict:
        return {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict):
        # Keep this run's groups: the state may come from another kind of device.
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state["optimizer"]["state"]})
        if state["scaler"].keys() == self.scaler.state_dict().keys():  # not from a run in another precision
            self.scaler.load_state_dict(state["scaler"])


@others_may_be_gone()
def train_step(
    context: TrainContext, micro_batches: list[dict], counts: Counts, learning_rate: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Takes one optimizer step over all ranks.

    Its gradient is that of the mean loss over all units of the step, however they are divided into micro-batches and
    ranks. A step whose loss or gradient is not finite leaves the weights unchanged. Returns (2,) summed loss and units,
    zeros for a skipped step; and whether it was skipped. Neither is synced.
    """
    optimizer, scaler, device = context.optimizer, context.scaler, context.processes.device
    loss_sum = torch.zeros(1, device=device)
    # Every rank needs a backward pass, in which gradients are summed.
    micro_batches = [batch for batch in micro_batches if batch["units"]] or micro_batches[-1:]
    # No step: even a zero gradient would move AdamW's weights. (A captured step's counts are a tensor, which is not
    # compared here: its batch has units.)
    if not micro_batches[-1]["units"] and counts.units == 0:
        return torch.zeros(2, device=device), torch.zeros((), dtype=torch.bool, device=device)
    for batch in micro_batches:
        # DistributedDataParallel sums gradients over ranks: once, in the last backward pass of a step.
        context.loss.require_backward_grad_sync = batch is micro_batches[-1]
        with torch.autocast(device.type, context.dtype, enabled=context.dtype != torch.float32):
            loss, aux_loss = context.loss(batch)
        loss_sum += loss.detach()
        # Each backward() adds to the gradient, so divide by the units of the whole step, of all ranks.
        loss = loss / counts.units
        if aux_loss is not None:
            loss = loss + aux_loss * (batch["samples"] / counts.samples)
        # DistributedDataParallel averages over ranks; this is a sum.
        scaler.scale(loss * context.processes.world_size).backward()
    if context.processes.world_size > 1:
        dist.all_reduce(loss_sum)
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.get_total_norm([weight.grad for weight in context.parameters if weight.grad is not None])
    if context.grad_clip > 0:
        torch.nn.utils.clip_grads_with_norm_(context.parameters, context.grad_clip, norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    is_bad = ~loss_sum.isfinite().all()
    if scaler.is_enabled():
        scaler.step(optimizer)  # skips steps by itself: overflowing gradients are how it finds its scale
        scaler.update()
    else:
        is_bad |= ~norm.isfinite()
        if optimizer.defaults["fused"]:
            optimizer.found_inf = is_bad.float()  # the kernel reads it on the device and skips the step: no sync
        if optimizer.defaults["fused"] or not is_bad:
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    losses = torch.cat((loss_sum, torch.ones_like(loss_sum) * counts.units))
    return torch.where(is_bad, 0.0, losses), is_bad


def count(micro_batches: list[dict], processes: Processes) -> Counts:
    """Sums a step's sizes over all ranks."""
    counts = [sum(batch[name] for batch in micro_batches) for name in ("units", "samples", "tokens")]
    skipped = sum(len(batch["skipped"]) for batch in micro_batches)
    return Counts(*map(int, processes.sum(*counts, skipped)))
