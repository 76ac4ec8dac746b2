"""What every measurement needs: a process of its own, seconds, medians over rounds, a table."""

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from statistics import median_low

import torch
from tqdm import tqdm

from common.errors import UsageError
from dataset.tokenizer import quiet_libraries

SHARES = ("useful", "product", "of peak")  # columns in percent


def alone(function: Callable, *arguments):
    """Returns what a function returns in a fresh process, so that its peak memory is its own."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, initializer=quiet_libraries, initargs=(False,)) as pool:
        return pool.submit(function, *arguments).result()


def timed(device: torch.device, function: Callable, *args, **kwargs):
    """Returns the seconds of a call, the device's work included, and what it returned."""
    sync = torch.get_device_module(device).synchronize
    sync()
    started = time.perf_counter()
    result = function(*args, **kwargs)
    sync()
    return time.perf_counter() - started, result


def measure_rounds(function: Callable, lines: list[str], settings, rounds: int) -> dict[str, dict]:
    """Measures each line `rounds` times, all lines in turn, so that another program slows all of them alike.

    Args:
        function: Takes the settings and a line; returns its figures, each a number or a text.

    Returns:
        The median of each figure, by line; {"failed": why} for a line that failed.
    """
    rows, failed = {line: [] for line in lines}, {}
    for line in tqdm(lines * rounds, leave=False):
        try:
            rows[line].append(alone(function, settings, line))
        except (RuntimeError, OSError, ValueError, UsageError) as error:  # a crash, too little memory: RuntimeError
            failed[line] = {"failed": (str(error).strip() or type(error).__name__).splitlines()[0]}
    return {line: failed.get(line) or medians(rows[line]) for line in lines}


def medians(rows: list[dict]) -> dict:
    return {name: median_low(row[name] for row in rows) for name in rows[0]}


def print_table(title: str, table: dict[str, dict]):
    """Prints a line for each row of figures."""
    columns = next((row for row in table.values() if "failed" not in row), {})
    print(f"{title:<38}" + "".join(f"{name:>12}" for name in columns))
    for line, row in table.items():
        failure = f"  failed: {row['failed']}" if "failed" in row else ""
        print(f"  {line:<36}" + (failure or "".join(cell(*figure) for figure in row.items())), flush=True)


def cell(name: str, value: float | str) -> str:
    if isinstance(value, str):
        return f"{value:>12}"
    return f"{value:>12.1%}" if name in SHARES else f"{value:>12,.{2 if value < 100 else 0}f}"
