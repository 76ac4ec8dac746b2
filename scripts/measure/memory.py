"""Measures the memory of a process and of those it starts."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

INTERVAL = 0.1  # seconds between two looks


@contextlib.contextmanager
def peak_memory(process: int) -> Iterator[dict[str, float]]:
    """Watches a process until the end of the `with` block.

    Yields:
        A dictionary that has the highest figures by then: "peak GB", mapped files included, and "own GB", without
        mapped files. Both are zero where the system is not Linux.
    """
    peak, done = {"peak GB": 0.0, "own GB": 0.0}, threading.Event()

    def look():
        while True:
            for name, size in zip(peak, memory_in_use(process), strict=True):
                peak[name] = max(peak[name], size / 1e9)
            if done.wait(INTERVAL):
                return

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def memory_in_use(process: int) -> tuple[int, int]:
    """Returns the bytes that a process and all below it use, all and anonymous; shared pages count once."""
    total, own, folder = 0, 0, Path(f"/proc/{process}")
    with contextlib.suppress(OSError):  # it has ended, or this is not Linux
        lines = (folder / "smaps_rollup").read_text().splitlines()
        figures = {line.split()[0]: int(line.split()[1]) * 1024 for line in lines[1:]}
        total, own = figures["Pss:"], figures["Pss_Anon:"]
        children = " ".join(file.read_text() for file in (folder / "task").glob("*/children")).split()
        below = [memory_in_use(int(child)) for child in children]
        total, own = total + sum(size for size, _ in below), own + sum(size for _, size in below)
    return total, own
