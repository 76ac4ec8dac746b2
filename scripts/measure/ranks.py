"""Measures how much of the sums over ranks is hidden behind the backward pass, over a link of known speed."""

import tempfile
import time
from argparse import Namespace
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dataset.lm_dataset import VLMCollator
from dataset.sampler import BatchSampler
from scripts.measure.made_up import load_data, load_model, timed
from trainer.loop import answer_loss, count, make_learner, train_step
from trainer.support import gradients
from trainer.support.gradients import BUCKET_BYTES
from trainer.support.processes import Processes

LINK = {"cpu": 50e6, "cuda": 1e9}  # bytes a second: slow enough to stand out of the noise of a step
RANKS_LINES = {"one sum after the backward pass": 10**12, f"buckets of {BUCKET_BYTES // 10**6} MB": BUCKET_BYTES}


class SlowLink:
    """`torch.distributed` whose sums take as long as a link would that carries one after the other."""

    def __init__(self, speed: float):
        self.speed, self.free, self.bytes, self.waited = speed, 0.0, 0, 0.0

    def all_reduce(self, flat: torch.Tensor, async_op: bool) -> Namespace:
        work = dist.all_reduce(flat, async_op=async_op)
        size = flat.numel() * flat.element_size()
        self.free = max(self.free, time.perf_counter()) + size / self.speed
        self.bytes += size
        arrives = self.free

        def wait():
            started = time.perf_counter()
            work.wait()
            time.sleep(max(0.0, arrives - time.perf_counter()))
            self.waited += time.perf_counter() - started

        return Namespace(wait=wait)


def run_rank(rank: int, args: Namespace, bucket_bytes: int, folder: Path):
    """Takes steps of fine-tuning as one of two ranks; the first writes its figures to the folder."""
    torch.set_num_threads(max(1, torch.get_num_threads() // 2))
    device = torch.device(args.device)
    # Two ranks on one GPU need gloo: NCCL wants a GPU for each.
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    processes = Processes(rank, 2, device, dist.group.WORLD, dist.group.WORLD)
    model = load_model(args).to(device)
    gradients.BUCKET_BYTES = bucket_bytes
    learner = make_learner(model, answer_loss, processes, torch.float32, 1.0)
    data = load_data(args, 40 * args.batch_size)
    # Both ranks take the same rows: a rank with shorter ones would wait for the other, and not for the link.
    rows = next(iter(BatchSampler(data.lengths, args.batch_size)))
    batch = VLMCollator()([data[int(row)] for row in rows])
    batch = {name: part.to(device) if isinstance(part, torch.Tensor) else part for name, part in batch.items()}
    link, seconds = SlowLink(LINK[device.type]), []
    gradients.dist = link
    for _ in range(1 + args.steps):
        link.bytes, link.waited = 0, 0.0
        elapsed, _ = timed(device, train_step, learner, [batch], count([batch], processes), 1e-5)
        seconds.append((elapsed, link.waited))
    if rank == 0:
        figures = {"bytes": link.bytes, "link": link.bytes / link.speed, "seconds": seconds[1:]}
        torch.save(figures, folder / "figures.pth")
    dist.destroy_process_group()


def measure_ranks(args, name: str) -> dict:
    """Returns a step's seconds, what it sends over the link, and how much of that the backward pass hides."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(run_rank, (args, RANKS_LINES[name], Path(folder)), nprocs=2, start_method="spawn")
        figures = torch.load(Path(folder) / "figures.pth", weights_only=True)
    link, waited = figures["link"], median(waited for _, waited in figures["seconds"])
    return {
        "s": median(elapsed for elapsed, _ in figures["seconds"]),
        "MB": figures["bytes"] / 1e6,
        "link s": link,
        "waited s": waited,
        "hidden": max(0.0, 1 - waited / link),
    }
