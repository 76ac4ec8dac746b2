"""What every test starts from: the project importable from any folder, no network, no progress bars, one core."""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# Read by transformers, datasets and huggingface_hub when they are imported, here and in the scripts that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # So a shell starts what runs in the background, and so the scripts would be started by the tests that
    # interrupt them.
    signal.signal(signal.SIGINT, signal.default_int_handler)

import torch
import transformers

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()
