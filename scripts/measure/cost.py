"""Estimates the hours of training on the published data sets from the operations that a row takes."""

from argparse import Namespace

from scripts.measure.training import model_flops

# Dense bfloat16 FLOP/s, of the makers' data sheets.
GPUS = {"RTX 3090": 71e12, "H100": 989e12, "8 x H100": 8 * 989e12}
SHARE = 0.4  # of a GPU's FLOP/s that a good training loop makes; nothing was measured on one
# Rows of the published files; tokens and learned tokens of a row are assumed, from the made-up rows of the benchmark.
COST_LINES = {
    "pretrain, 1.27 M rows": ("pretrain", 1_270_000, 275, 50),
    "sft, 2.90 M rows": ("sft", 2_900_000, 600, 250),
}
PICTURES_PER_CORE = 560  # a second, decoded and enlarged: measured here, see `benchmark.py data`


def estimate_cost(args: Namespace, name: str) -> dict:
    """Returns the GFLOP of a row, hours an epoch on each GPU, and the cores that decode as fast as an H100 learns."""
    stage, rows, tokens, learned = COST_LINES[name]
    total = {"samples": 1, "useful": tokens, "learned": learned, "squares": tokens**2}
    flops = model_flops(Namespace(**vars(args) | {"stage": stage}), total, is_cached=False)
    hours = {f"h, {gpu}": rows * flops / (peak * SHARE) / 3600 for gpu, peak in GPUS.items()}
    return {"GFLOP": flops / 1e9} | hours | {"cores": GPUS["H100"] * SHARE / flops / PICTURES_PER_CORE}
