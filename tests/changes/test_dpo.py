"""Another loss, data and figure, added from outside: direct preference optimisation (Rafailov et al. 2023).

A row has a second, "rejected" answer to its last question. The loss is over pairs, against a frozen reference model;
measured is the share of pairs in the wrong order. This file is all it takes: `python my_dpo.py --data_path pairs.jsonl`
"""

import dataclasses
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tiny import EVAL, ROOT, read_jsonl, sft_row, turn, write_jsonl

from common.errors import run_script
from dataset.lm_dataset import VLMCollator, VLMDataset, text_of
from trainer import train_sft_vlm as sft
from trainer.evaluate import Evaluator
from trainer.stage import frozen_copy, model_inputs

pytest_plugins = ["tiny"]
STOP = "import os, trainer.loop as loop\nn = loop.count\nloop.count = lambda *a: (os.kill(os.getpid(), 2), n(*a))[1]"


class Pairs(VLMDataset):
    def __init__(self, data_path, *how):
        super().__init__(data_path, *how)
        rows = [row | {"conversations": [*row["conversations"][:-1], turn("assistant", row["rejected"])]}
                for row in read_jsonl(data_path)]  # fmt: skip
        self.rejected = VLMDataset(write_jsonl(data_path.with_suffix(".rejected.jsonl"), rows), *how)
        self.content_sha256 += self.rejected.content_sha256

    def __getitems__(self, indices):
        others = map(text_of, self.rejected.read_rows(self.positions[indices].tolist()))
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
    return -losses.new_zeros(rows).index_add(0, places // length, losses).view(2, -1)


def margins(model, batch, reference):
    chosen, rejected = log_likelihoods(model, batch) - log_likelihoods(reference, batch)
    return chosen - rejected


STAGE = dataclasses.replace(
    sft.STAGE,
    name="dpo",
    defaults=sft.STAGE.defaults | {"save_weight": "dpo_vlm"},
    dataset=Pairs,
    collator=PairCollator,
    loss=lambda *inputs, **reference: (-F.logsigmoid(0.1 * margins(*inputs, **reference)).sum(), None),
    companions=lambda args, model: {"reference": frozen_copy(model)},
    evaluator=lambda data, model, loss, *how: Evaluator(data, model, partial(wrong, **loss.keywords), *how),
    pad=None,
)


def wrong(*inputs, **reference):
    return (margins(*inputs, **reference) <= 0).sum(), None


def test_pairs_are_learned_resumed_measured_talked_to_and_exported(world, tmp_path):
    pairs, weights = [sft_row(number) | {"rejected": "不知道。"} for number in range(12)], []
    data = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    for name, hooks in (("whole", [""]), ("stopped", [STOP, ""])):
        out = world.copy_of_out(tmp_path / name / "out")
        flags = [*world.files("sft", out), "--data_path", data, "--eval_data", data, "--from_weight", "llm"]
        flags += ["--batch_size", 4, "--epochs", 1, "--learning_rate", 1e-3, "--log_interval", 1]
        done = [world.run(__file__, *flags, "--from_resume", n, hook=hook) for n, hook in enumerate(hooks)]
        assert [result.code for result in done] == [130, 0][-len(hooks) :], done[-1].text
        weights.append(torch.load(out / "dpo_vlm_32.pth", weights_only=True))
    assert all(torch.equal(weight, weights[0][name]) for name, weight in weights[1].items())
    rows = read_jsonl(out / "dpo_vlm_32.metrics.jsonl")
    losses, wrong = ([row[key] for row in rows if key in row] for key in ("loss", "eval"))
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4) and losses[-1] < 0.6
    assert wrong[-1]["tokens"] == 12 and wrong[-1]["loss"] < 0.2
    files = ["--weight", "dpo_vlm", "--save_dir", out]
    world.run(EVAL, *world.eval_files(out), *files, "--image", world.images / "0.jpg").passed()
    world.run(ROOT / "scripts/export.py", *files, "--folder", tmp_path / "exported").passed()


if __name__ == "__main__":
    sft.STAGE = STAGE
    run_script(sft.main, outlives_output=True)
