"""A first loss no better than guessing: the run stops where nobody can know whether the tokenizer is the right one."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.errors import UsageError
from trainer import train_sft_vlm as sft
from trainer.report.progress import check_first_loss

HIGH, LOW = torch.tensor([139.0, 10.0]), torch.tensor([13.0, 10.0])


def starts_from(sidecar: dict) -> SimpleNamespace:
    return SimpleNamespace(
        stage=sft.STAGE,
        config=SimpleNamespace(vocab_size=6400),
        weights=SimpleNamespace(sidecar=sidecar, path=Path("llm_32.pth")),
        args=SimpleNamespace(tokenizer_path="tokenizer", ignore_high_loss=False),
    )


def test_a_high_first_loss_is_refused_unless_the_sidecar_names_the_tokenizer():
    """Captions in words the model never saw begin as high as a wrong tokenizer does."""
    with pytest.raises(UsageError, match=r"do not belong together: .* unfamiliar"):
        check_first_loss(starts_from({}), HIGH)
    check_first_loss(starts_from({}), LOW)
    check_first_loss(starts_from({"tokenizer_sha256": "abc"}), HIGH)
