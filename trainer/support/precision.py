"""Chooses the precision of matrix products on a CPU by measuring: bfloat16 pays on some and costs on others."""

import time

import torch

from model.model_minimind import MiniMindBlock, MiniMindConfig
from trainer.support.processes import Processes

SAMPLES, LENGTH, TURNS = 4, 256, 3  # a few tenths of a second
FASTER = 1.2  # a smaller gain may be noise, and the same command should choose the same


def has_bfloat16() -> bool:
    """Tells whether this CPU's matrix library takes bfloat16 at all; elsewhere it is emulated, and slow."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def block_seconds(config: MiniMindConfig, dtype: torch.dtype) -> float:
    """Returns the seconds of a decoder block's forward and backward pass in this precision."""
    with torch.random.fork_rng([]):
        block = MiniMindBlock(config, 0)
        states = torch.randn(SAMPLES, LENGTH, config.hidden_size, requires_grad=True)
    rotary = torch.ones(1, 1, LENGTH, config.head_dim)  # any angle takes as long
    started = time.perf_counter()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out, _ = block(states, (rotary, rotary), None, None, None, None)
    out.float().sum().backward()
    return time.perf_counter() - started


def faster_dtype(config: MiniMindConfig, processes: Processes) -> torch.dtype:
    """Returns float32 or bfloat16, whichever trains a block of this shape faster here; the same on every rank."""
    if not has_bfloat16():
        return torch.float32
    seconds = {dtype: [] for dtype in (torch.float32, torch.bfloat16)}
    for _ in range(1 + TURNS):
        for dtype, measured in seconds.items():
            measured.append(block_seconds(config, dtype))
    full, half = (min(measured[1:]) for measured in seconds.values())
    [is_faster] = processes.sum(float(processes.is_main and full > FASTER * half))
    processes.log(f"bfloat16 is {full / half:.1f} times as fast as float32 here (--dtype chooses)")
    return torch.bfloat16 if is_faster else torch.float32
