"""A loader's workers: whatever ends one ends the run in words, at once, with the cure."""

import os
import resource
import signal

import pytest
import torch
from torch.utils.data import Dataset

from common.errors import RankError, UsageError
from dataset import file_kinds
from dataset.sampler import load_in_workers, worker_errors


class Failing(Dataset):
    """Tensors; `fail` is called in the worker before the third."""

    def __init__(self, fail):
        self.fail = fail

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 2:
            self.fail()
        return torch.zeros(3, 224, 224)


def limit(kind: int, number: int):
    resource.setrlimit(kind, (number, number))


def memory_ran_out():
    raise MemoryError


@pytest.fixture
def ends():
    """Ends the tests where one of them waits for ever."""
    signal.alarm(120)
    yield
    signal.alarm(0)


FAILURES = {
    "killed": (lambda: os.kill(os.getpid(), signal.SIGKILL), "was lost", "memory ran out"),
    "exited": (lambda: os._exit(3), "was lost", "memory ran out"),
    "without memory": (memory_ran_out, "MemoryError", "memory ran out"),
    "small /dev/shm": (lambda: limit(resource.RLIMIT_FSIZE, 1000), "/torch_", "--shm-size"),
    "open files": (lambda: limit(resource.RLIMIT_NOFILE, 3), "was lost", "ulimit -n"),
}


@pytest.mark.parametrize(("fail", "reason", "cure"), FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("workers", [1, 2])
def test_whatever_ends_a_worker_is_said_with_its_cure(ends, capfd, workers, fail, reason, cure):
    seen = 0
    with pytest.raises(RankError) as error, worker_errors(workers):
        for batch in load_in_workers(Failing(fail), workers, prefetch_factor=2, batch_size=None):
            seen += len(batch) == 3
    for part in (reason, cure, f"--num_workers {workers}", "--num_workers 0", "--from_resume 1"):
        assert part in str(error.value)
    assert seen <= 2
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "error", [ConnectionResetError(104, "reset by peer"), EOFError("cut off"), OSError(28, "No space left")]
)
def test_an_error_of_the_main_process_while_it_receives_is_one_of_the_workers(monkeypatch, error):
    def fail(self):
        yield 1
        raise error

    monkeypatch.setattr("torch.utils.data.DataLoader.__iter__", fail)
    with pytest.raises(RankError, match="was lost"):
        list(load_in_workers(Failing(None), 2, 2))
    with pytest.raises(type(error)):  # without workers it is what it is
        list(load_in_workers(Failing(None), 0, 2))


def test_errors_of_the_training_itself_are_not_taken_for_a_workers():
    with pytest.raises(RuntimeError, match="out of memory"), worker_errors(2):
        raise RuntimeError("CUDA out of memory")


def test_a_killed_process_that_tokenises_is_said(tmp_path):
    died = "One of the subprocesses has abruptly died during map operation."
    with pytest.raises(UsageError, match=r"tokenises .*rows.jsonl was killed, most likely because memory"):
        with file_kinds.reading(tmp_path / "rows.jsonl"):
            raise RuntimeError(died)
