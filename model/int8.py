"""The decoder's matrices in eight bits: a quarter of the bytes to read for each new token.

Reading the weights bounds how fast a CPU answers a small batch. Each row of a matrix becomes integers from -127 to 127
and one scale; torch has a kernel that multiplies them.
"""

import torch
import torch.nn.functional as F
from torch import nn

from model.model_minimind import MiniMindForCausalLM

KERNEL_ROWS = 8  # up to here the kernel is faster than a product with the matrix written out in float32


class Int8Linear(nn.Module):
    """`nn.Linear` without a bias, its (N, K) weight in int8 with a scale per row; for inference on a CPU."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
        scale = scale.bfloat16()  # what the kernel takes; the integers are computed with this rounded scale
        self.register_buffer("weight", (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Multiplies (..., K) to (..., N), few rows in bfloat16, many in float32; states get their gradients."""
        rows = states.flatten(0, -2)
        if len(rows) <= KERNEL_ROWS and not states.requires_grad:  # the kernel has no backward pass
            product = torch._weight_int8pack_mm(rows.bfloat16(), self.weight, self.scale)
        else:
            product = F.linear(rows.float(), self.weight.float() * self.scale.float()[:, None])
        return product.to(states.dtype).unflatten(0, states.shape[:-1])


def quantize(model: MiniMindForCausalLM):
    """Replaces the matrices of the decoder's blocks and its head, in place.

    The experts' router stays as it is: it decides between near-equal scores.
    """
    for block in [*model.base_model.modules(), model]:
        for name, child in block.named_children():
            if isinstance(child, nn.Linear) and name != "gate":
                setattr(block, name, Int8Linear(child))
