"""The decoder in eight bits answers nearly as in float32, in a quarter of the memory."""

import pytest
import torch
from torch import nn

from model.answers import KERNEL_ROWS, Int8Linear, quantize
from model.model_vlm import MiniMindVLM, VLMConfig


@pytest.mark.parametrize("rows", [1, KERNEL_ROWS, KERNEL_ROWS + 1, 100])
def test_a_product_is_off_by_the_rounding_only(rows):
    """Weights are rounded to 1/254 of a row's largest, states to bfloat16's 1/256: relative to the norms, 1 %."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, bias=False)
    states = torch.randn(rows, 2, 64)
    found, expected = Int8Linear(linear)(states), linear(states)
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert (found - expected).norm() < 0.01 * expected.norm()


def test_a_row_of_zeros_stays_zero():
    linear = nn.Linear(32, 4, bias=False)
    linear.weight.data[1] = 0
    assert Int8Linear(linear)(torch.randn(1, 32))[0, 1] == 0


@pytest.mark.parametrize("use_moe", [False, True])
def test_a_model_is_quantized_but_for_embedding_norms_projection_and_router(use_moe):
    torch.manual_seed(0)
    model = MiniMindVLM(VLMConfig(hidden_size=64, num_hidden_layers=2, use_moe=use_moe)).eval()
    ids = torch.randint(0, 6400, (2, 30))
    with torch.no_grad():
        expected = model(ids).logits
        before = sum(weight.numel() * 4 for weight in {*model.model.layers.parameters()})
        quantize(model)
        found = model(ids).logits
    assert (found - expected).norm() < 0.03 * expected.norm()
    kept = [*model.model.layers.parameters(), *model.model.layers.buffers()]
    assert sum(tensor.numel() * tensor.element_size() for tensor in kept) < before / 3.5
    assert isinstance(model.model.embed_tokens, nn.Embedding)
    assert isinstance(model.vision_proj.vision_proj[0], nn.Linear)
    gates = [module for name, module in model.named_modules() if name.endswith(".gate")]
    assert all(isinstance(gate, nn.Linear) for gate in gates) and len(gates) == 2 * use_moe
