"""One process, or several under torchrun: ranks and sums over them, devices and batches there, stop signals."""

import contextlib
import datetime
import itertools
import os
import re
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

from common.errors import RankError, UsageError, first_line
from common.paths import printable
from dataset.sampler import SIGNALS

# The main rank tokenises while the others wait, which may take hours. After setup, ranks stay in step.
SETUP_TIMEOUT = datetime.timedelta(hours=6)
# In the errors of collectives, which gloo raises as plain RuntimeErrors.
COLLECTIVES = ("gloo", "NCCL", "ProcessGroup", "Connection", "peer", "Timed out")
SMALLEST_HEAD = 32  # from which attention on a CPU is faster in bfloat16
# On Ctrl-C torchrun sends its processes a signal of its own, though they got the first one too: it counts as the same.
SAME_SECONDS = 2.0


@dataclass
class Processes(contextlib.AbstractContextManager):
    """This process among all of the run (rank 0 of 1 without torchrun); a context manager that leaves the group."""

    rank: int
    world_size: int
    device: torch.device  # where this rank computes
    host_group: dist.ProcessGroup | None = None  # for numbers on the host: agreeing on one never syncs a GPU
    setup_group: dist.ProcessGroup | None = None  # the same with a longer timeout

    @classmethod
    def start(cls, device: str | None, timeout_minutes: float = 10) -> "Processes":
        """Joins torchrun's other ranks, if any; UsageError if the device is missing, RankError if they do not meet."""
        rank, world_size, *local_share = ranks()
        device = pick_device(device, *local_share)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # also for a single process: streams are the current device's
        if world_size == 1:
            return cls(rank, world_size, device)
        if device.type == "mps":
            raise UsageError("torchrun with several processes needs CUDA or the CPU: MPS has one device")
        timeout = datetime.timedelta(minutes=timeout_minutes)
        try:
            # After a restart by torchrun, its store still holds the dead ranks' addresses.
            store, *_ = next(rendezvous("env://", rank, world_size, timeout=timeout))
            store = dist.PrefixStore(f"start_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
            groups = [dist.new_group(backend="gloo", timeout=wait) for wait in (timeout, SETUP_TIMEOUT)]
        except (RuntimeError, ValueError, OSError) as error:
            address, port = (os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT"))
            raise RankError(
                f"the {world_size} processes of this run did not find each other at {printable(address)}:{port} "
                f"({first_line(error)}): one of them may have ended (see its error above), or the port is taken or out "
                "of reach: give torchrun another --master_port"
            ) from error
        return cls(rank, world_size, device, *groups)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def __exit__(self, kind, *exception):
        # After a RankError another rank may be gone, and leaving the group might wait for it.
        if self.world_size > 1 and (kind is None or not issubclass(kind, RankError)):
            dist.destroy_process_group()

    def log(self, message: str = "", wraps: bool = True):
        """Prints a message, on the main rank, above a progress bar if there is one; in a terminal it `wraps` lines."""
        if self.is_main:
            lines = map(wrap_line, message.split("\n")) if wraps and sys.stdout.isatty() else [message]
            tqdm.write("\n".join(lines))
            sys.stdout.flush()

    def barrier(self, patient: bool = False):
        """Waits for all ranks; `patient` where one may have hours of work to do before."""
        if self.world_size > 1:
            with others_may_be_gone():
                dist.barrier(group=self.setup_group if patient else self.host_group)

    @contextlib.contextmanager
    def main_first(self):
        """Runs the body on the main rank before the others, who then find its results in a cache."""
        if not self.is_main:
            self.barrier(patient=True)
        try:
            yield
        finally:
            if self.is_main:
                self.barrier(patient=True)

    def sum(self, *numbers: float) -> list[float]:
        """Returns each number's sum over all ranks."""
        if self.world_size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        with others_may_be_gone():
            dist.all_reduce(total, group=self.host_group)
        return total.tolist()

    def gather(self, value) -> list:
        """Returns every rank's value, in rank order."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        with others_may_be_gone():
            dist.all_gather_object(values, value, group=self.host_group)
        return values


def wrap_line(line: str) -> str:
    """Wraps a line between words for the terminal; what follows a name and spaces stays in its column."""
    how = {"width": shutil.get_terminal_size().columns, "break_long_words": False, "break_on_hyphens": False}
    column = len(re.match(r"(  \S+( \S+)* +(?= ))?\s*", line)[0])
    return textwrap.fill(line, subsequent_indent=" " * column, **how)


@contextlib.contextmanager
def others_may_be_gone():
    """Explains the error of a collective that cannot be completed; lets others pass."""
    try:
        yield
    except RuntimeError as error:
        is_of_collective = dist.is_initialized() and any(word in str(error) for word in COLLECTIVES)
        if not isinstance(error, dist.DistError) and not is_of_collective:
            raise
        raise RankError(
            f"another process of this run has ended or does not answer ({first_line(error)}), so this one ends too; "
            "what was saved is kept: the same command with --from_resume 1 resumes from there"
        ) from error


def ranks() -> tuple[int, int, int, int]:
    """Returns torchrun's RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE (0, 1, 0, 1 without); RankError if invalid."""
    world_size = rank_number("WORLD_SIZE", 1, range(1, 1 << 20))
    rank = rank_number("RANK", 0 if world_size == 1 else None, range(world_size))
    local_world_size = rank_number("LOCAL_WORLD_SIZE", world_size, range(1, world_size + 1))
    local_rank = rank_number("LOCAL_RANK", rank % local_world_size, range(local_world_size))
    if world_size > 1:
        rank_number("MASTER_PORT", None, range(1, 1 << 16))
        if not os.environ.get("MASTER_ADDR", "").strip():
            raise RankError("MASTER_ADDR is not set: it is the machine of process 0. torchrun sets it")
    return rank, world_size, local_rank, local_world_size


def rank_number(name: str, default: int | None, allowed: range) -> int:
    value = os.environ.get(name, default)
    number = int(value) if str(value).isdecimal() else None
    if number not in allowed:
        raise RankError(
            f"the environment variable {name} is {'not set' if value is None else repr(value)}, but must be a number "
            f"from {allowed[0]} to {allowed[-1]}: torchrun sets it for several processes; for one, unset {name}"
        )
    return number


def pick_device(name: str | None, local_rank: int, local_world_size: int) -> torch.device:
    """Returns this rank's device (ranks share a machine's GPUs): as typed, or the best; UsageError if missing."""
    if name is None:
        has_mps = torch.backends.mps.is_available() and local_world_size == 1
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d{1,2})?", name):
        raise UsageError(f"--device {name}: use cpu, cuda, cuda:N or mps")
    device = torch.device(name)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: this torch sees no Apple GPU")
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise UsageError(f"--device {name}: no CUDA GPU is visible to torch {torch.__version__}")
    index = local_rank if local_world_size > 1 else device.index or 0
    needed = max(index + 1, local_world_size)  # by all ranks: one that ended alone would leave the others waiting
    if needed > torch.cuda.device_count():
        raise UsageError(f"--device {name}: {needed} GPU(s) are asked for, but there are {torch.cuda.device_count()}")
    if sys.platform == "linux":  # segments that grow: otherwise batches of each new length would take more memory
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # cuDNN's attention takes a tenth of a second or more for each new length, and sums in no fixed order.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda", index)


def pick_dtype(name: str | None, device: torch.device, head_size: int = 0) -> torch.dtype:
    """Returns the dtype of matrix products: as typed (UsageError if the device lacks it), else the fastest there."""
    is_cuda = device.type == "cuda"
    has_bfloat16 = device.type == "cpu" and head_size >= SMALLEST_HEAD and cpu_has_bfloat16()
    if is_cuda:
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if name is None:
        name = "bfloat16" if has_bfloat16 else "float16" if is_cuda else "float32"
    if name == "bfloat16" and is_cuda and not has_bfloat16:
        raise UsageError("--dtype bfloat16: this GPU does not compute in it; leave --dtype out, or use float16")
    if name == "float16" and not is_cuda:
        raise UsageError(f"--dtype float16 needs a CUDA GPU; on {device.type} leave --dtype out")
    return getattr(torch, name)


def cpu_has_bfloat16() -> bool:
    # Whether this CPU's matrix library multiplies it; elsewhere it is emulated, and slow.
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def cores() -> int:
    """Returns the CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tensors_of(batch: dict) -> dict[str, torch.Tensor]:
    return {name: part for name, part in batch.items() if isinstance(part, torch.Tensor)}


def on_device(loader: Iterable[dict], device: torch.device) -> Iterator[dict]:
    """Yields the batches with their tensors on the device; on CUDA one is copied while the one before is computed."""
    if device.type != "cuda":
        for batch in loader:
            yield batch | {name: part.to(device) for name, part in tensors_of(batch).items()}
        return
    stream, following, copied = torch.cuda.Stream(device), None, None
    for batch in itertools.chain(loader, [None]):  # at None only the last batch is left to yield
        ready, ready_copied = following, copied
        if batch is not None:
            with torch.cuda.stream(stream):
                moved = {name: part.to(device, non_blocking=True) for name, part in tensors_of(batch).items()}
                following, copied = batch | moved, stream.record_event()
        if ready is not None:
            current = torch.cuda.current_stream(device)
            current.wait_event(ready_copied)  # the host does not wait
            for tensor in tensors_of(ready).values():
                tensor.record_stream(current)  # its memory is free again only when this stream has used it
            yield ready


@contextlib.contextmanager
def stop_signals(speaks: bool) -> Iterator[SimpleNamespace]:
    """Keeps Ctrl-C, SIGTERM or a closed terminal in `asked`: the step is finished and saved; a second one exits."""
    signals = SimpleNamespace(asked=None, time=0.0)

    def note(number: int, frame):
        now, is_first = time.monotonic(), signals.asked is None
        if is_first:
            signals.asked, signals.time = number, now
            message = f"\n{signal.Signals(number).name}: finishing this step and saving (again: exit immediately)\n"
        elif now - signals.time > SAME_SECONDS:
            message = "exited immediately; what was saved before is kept\n"
        else:
            return
        if speaks:
            # Not through Python's buffers: the code that the signal interrupted may be writing to them.
            with contextlib.suppress(OSError, AttributeError):  # the terminal may be gone
                os.write(sys.stderr.fileno(), message.encode())
        if not is_first:
            os._exit(128 + number)

    # One that is ignored stays so, as SIGHUP under nohup.
    heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heeded}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
