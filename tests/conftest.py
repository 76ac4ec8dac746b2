"""What every test starts from: the project importable from any folder, no network, no progress bars, one core."""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# Read by transformers, datasets and huggingface_hub when they are imported, here and in the scripts that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
# Of torch, here and there: threads of several tests at once would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import transformers

from common.paths import BUILTIN_TOKENIZER_DIR
from dataset.chat import load_tokenizer

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()

# Shells ignore SIGINT in what runs in the background, nohup ignores SIGHUP, and child processes inherit that: the
# scripts that a test interrupts would never notice.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(BUILTIN_TOKENIZER_DIR)


def pytest_collection_modifyitems(items):
    """Puts the files with the longest tests first: at the end one process would be left alone with them."""
    longest = ("test_reference.py", "test_notebook.py", "test_readme.py", "test_against_plain.py", "test_running.py")
    items.sort(key=lambda item: item.path.name not in longest)
