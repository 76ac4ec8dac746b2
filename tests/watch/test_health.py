"""What can go wrong in a run, and what the user is told."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.errors import UsageError
from trainer.report import health
from trainer.report.health import check_first_loss


@pytest.mark.parametrize(
    ("sidecar", "loss_of_sentences", "is_refused"),
    [({"tokenizer_sha256": "abc"}, 20.0, False), ({}, 4.0, False), ({}, 9.5, True)],
)
def test_a_high_first_loss_alone_does_not_make_a_tokenizer_wrong(monkeypatch, sidecar, loss_of_sentences, is_refused):
    """Captions in words the model never saw begin as high as a wrong tokenizer does."""
    monkeypatch.setattr(health, "loss_of_sentences", lambda run, model: loss_of_sentences)
    lines = []
    run = SimpleNamespace(
        config=SimpleNamespace(vocab_size=6400),
        weights=SimpleNamespace(sidecar=sidecar, path=Path("llm_32.pth")),
        args=SimpleNamespace(tokenizer_path="tokenizer", ignore_high_loss=False),
        log=lines.append,
    )
    if is_refused:
        with pytest.raises(UsageError, match="do not belong together"):
            check_first_loss(run, None, torch.tensor([139.0, 10.0]))
        return
    check_first_loss(run, None, torch.tensor([139.0, 10.0]))
    assert len(lines) == 1 and "The tokenizer is the right one" in lines[0]
    check_first_loss(run, None, torch.tensor([13.0, 10.0]))
    assert len(lines) == 1
