"""Low-rank adapters (https://arxiv.org/abs/2106.09685) in a decoder too large to train whole; needs `peft`."""

import torch
from torch import nn

from common.errors import UsageError

SCALE = 2  # of an adapter's product: peft's lora_alpha by the rank


def add_lora(model: nn.Module, rank: int):
    """Freezes the decoder and puts trainable adapters beside the matrices of its blocks.

    Raises:
        UsageError: If peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise UsageError("--lora needs a package: pip install -r scripts/requirements-lora.txt") from error
    model.requires_grad_(False)
    blocks = model.base_model
    names = {name.split(".")[-1] for name, part in blocks.named_modules() if isinstance(part, nn.Linear)}
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=sorted(names)), blocks)


def merged(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns a state dict with the adapters added to the matrices beside them, under the names without adapters."""
    plain = {}
    for name, tensor in tensors.items():
        if ".base_layer." not in name:
            if ".lora_" not in name:
                plain[name] = tensor
            continue
        layer, _, kind = name.partition(".base_layer.")
        if kind == "weight":
            up, down = (tensors[f"{layer}.lora_{part}.default.weight"] for part in "BA")
            # Frozen tensors are kept on the CPU, adapters are where they learn.
            tensor = tensor.float() + SCALE * (up.float() @ down.float()).to(tensor.device)
        plain[f"{layer}.{kind}"] = tensor
    return plain
