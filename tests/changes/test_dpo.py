"""Another stage, added from outside: direct preference optimisation (Rafailov et al. 2023).

A row has a second, "rejected" answer to its last question. The loss is over pairs, beside a frozen reference model; the
metric is the share of misordered pairs. Without its test, this file is all it takes, as a script in the project's
folder:

    python my_dpo.py --data_path pairs.jsonl --images_path pictures --beta 0.1
"""

import dataclasses
import json
import math
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import EVAL, ROOT, language_model, read_jsonl, sft_row, write_jsonl

from common.errors import run_script
from dataset.lm_dataset import VLMCollator, VLMDataset, text_of
from trainer import train_sft_vlm as sft
from trainer.evaluate import Evaluator
from trainer.stage import frozen_copy, model_inputs

pytest_plugins = ["tiny"]


class Pairs(VLMDataset):
    def __init__(self, data_path, *how):
        super().__init__(data_path, *how)
        path = Path(tempfile.mkdtemp()) / "rejected.jsonl"
        with data_path.open(encoding="utf-8") as lines, path.open("w", encoding="utf-8") as rejected:
            for row in map(json.loads, lines):
                row["conversations"][-1]["content"] = row["rejected"]
                rejected.write(json.dumps(row) + "\n")
        self.rejected = VLMDataset(path, *how)
        self.row_indices = np.intersect1d(self.row_indices, self.rejected.row_indices)
        self.bad_rows += {*self.rejected.bad_rows} - {*self.bad_rows}
        self.content_sha256 += self.rejected.content_sha256

    def __getitems__(self, indices):
        others = map(text_of, self.rejected.read_rows(self.row_indices[indices].tolist()))
        rows = zip(super().__getitems__(indices), others, strict=True)  # a row is a PictureError where that is broken
        return [row | {"rejected": other} if isinstance(row, dict) else row for row, other in rows]

    def without_images(self, sample):
        return super().without_images(sample) | {"rejected": super().without_images(sample["rejected"])}


class PairCollator(VLMCollator):
    def __call__(self, samples):  # the chosen answers, then the rejected ones
        batch = super().__call__([*samples, *(row | row["rejected"] for row in samples if isinstance(row, dict))])
        return batch | dict.fromkeys(("units", "samples"), batch["samples"] // 2)


def log_likelihoods(model, batch):
    logits, places = model(**model_inputs(model, batch)).logits, batch["learned_positions"]
    losses = F.cross_entropy(logits.float(), batch["labels"].flatten()[places], reduction="none")
    rows, length = batch["labels"].shape
    return -losses.new_zeros(rows).index_add(0, places // length, losses)


def margins(model, batch, reference, beta):
    chosen, rejected = (log_likelihoods(model, batch) - log_likelihoods(reference, batch)).view(2, -1)
    return beta * (chosen - rejected)


def dpo_loss(model, batch, reference, beta):
    return -F.logsigmoid(margins(model, batch, reference, beta)).sum(), None


def misordered(model, batch, reference, beta):
    return (margins(model, batch, reference, beta) <= 0).sum(), None


STAGE = dataclasses.replace(
    sft.STAGE,
    name="dpo",
    title="Preferences",
    story="stage 3, preferences: of two answers to a question, the chosen one becomes likelier",
    defaults=sft.STAGE.defaults | {"from_weight": "sft_vlm", "save_weight": "dpo_vlm"},
    data="dpo",
    add_flags=lambda add: add("--beta", type=float, default=0.1, help="how far it may move from the reference"),
    dataset=Pairs,
    collator=PairCollator,
    loss=dpo_loss,
    companions=lambda args, model: {"reference": frozen_copy(model), "beta": args.beta},
    metric=misordered,
    evaluator=partial(Evaluator, metric="share of misordered pairs", unit=""),
    pad=None,
)


def test_pairs_are_learned_resumed_measured_talked_to_and_exported(world, tmp_path):
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [sft_row(number) | {"rejected": "不知道。"} for number in range(12)])
    out, metrics = world.copy_of_out(tmp_path / "out"), tmp_path / "out/dpo_vlm_32.metrics.jsonl"
    command = [__file__, *world.files("sft", out), "--data_path", pairs, "--eval_data", pairs, "--batch_size", 4]
    command += ["--learning_rate", 1e-3, "--log_interval", 1, "--from_weight"]
    done = world.run(*command, "llm", "--epochs", 1).passed().out
    assert "held out: share of misordered pairs 0." in done and "at the images" not in done
    torch.save(language_model(steps=21), tmp_path / "other.pth")
    world.run(*command, tmp_path / "other.pth", "--from_resume", 1).refused("differs from this run in its reference (")
    world.run(__file__, "--from_weight", "llm").refused("the built-in set has no data for this stage")
    assert "3 to go" in world.run(*command, "llm", "--epochs", 2, "--from_resume", 1).passed().out
    losses, wrong = ([row[key] for row in read_jsonl(metrics) if key in row] for key in ("loss", "eval"))
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4) and losses[-1] < 0.6
    assert wrong[-1]["tokens"] == 12 and wrong[-1]["loss"] < 0.2
    files = ["--weight", "dpo_vlm", "--save_dir", out]
    world.run(EVAL, *world.eval_files(out), *files, "--image", world.images / "0.jpg").passed()
    world.run(ROOT / "scripts/export.py", *files, "--folder", tmp_path / "exported").passed()


if __name__ == "__main__":
    run_script(partial(sft.main, STAGE, __doc__), outlives_output=True)
