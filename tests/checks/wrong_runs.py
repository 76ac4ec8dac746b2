"""Train with deliberate mistakes, to show what held-out loss, grounding gap and descriptions look like then.

    python tests/checks/wrong_runs.py    nine short runs into out/wrong_runs (ten minutes on two cores), then a table

Two of them are correct, for comparison. trainer/README.md explains the figures.
"""

import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[folder]) for folder in (2, 1)]  # the project, tests/

from checks.reference import PRETRAIN, QUICK, SEEDS, SFT, few_flags, first_lines, read_jsonl, run_stage
from common.cli import ArgumentParser
from common.errors import run_script
from common.paths import SAVE_DIR
from trainer.bundles import BUILTIN
from trainer.stage import Stage

FEW_ROWS, MANY_EPOCHS = 64, 40
RATE = BUILTIN.recipes["sft"]["learning_rate"]
BUILTIN_SHAPE = {"hidden_size": 128, "num_hidden_layers": 4}


def with_other_pictures(lines: list[str]) -> list[str]:
    """Returns the rows, each with the image of the row half the file away."""
    rows = [json.loads(line) for line in lines]
    half = len(rows) // 2
    changed = [row | {"image": rows[n - half]["image"]} for n, row in enumerate(rows)]
    return [json.dumps(row, ensure_ascii=False) + "\n" for row in changed]


def wrong_runs(folder: Path) -> list[tuple[str, Stage, list[str], dict]]:
    """Returns each run's title, stage, training lines and changed flags."""
    captions, dialogues = (first_lines(stage.data, QUICK[stage]) for stage in (PRETRAIN, SFT))
    after_stage_1 = {"from_weight": folder / "1" / "pretrain_vlm_128.pth"}
    return [
        ("stage 1 as it should be", PRETRAIN, captions, {}),
        ("captions of other pictures", PRETRAIN, with_other_pictures(captions), {}),
        (f"{FEW_ROWS} rows, {MANY_EPOCHS} times", PRETRAIN, captions[:FEW_ROWS], {"epochs": MANY_EPOCHS}),
        ("--from_weight none", PRETRAIN, captions, {"from_weight": "none"} | BUILTIN_SHAPE),
        ("stage 2 as it should be", SFT, dialogues, after_stage_1),
        ("stage 2 without stage 1", SFT, dialogues, {}),
        ("the same, --learning_rate 1e-6", SFT, dialogues, {"learning_rate": 1e-6}),
        (f"--learning_rate {20 * RATE:g}", SFT, dialogues, after_stage_1 | {"learning_rate": 20 * RATE}),
        (f"--learning_rate {200 * RATE:g}", SFT, dialogues, after_stage_1 | {"learning_rate": 200 * RATE}),
    ]


def outcome(folder: Path) -> tuple[str, list[str], list[str]]:
    """Returns the last figures of the run in this folder, what it says of two pictures, and what is right."""
    [metrics] = folder.glob("*_???.metrics.jsonl")  # not those of earlier runs
    [samples] = folder.glob("*_???_samples/samples.jsonl")
    rows = read_jsonl(metrics)
    training, held_out = ([row[kind] for row in rows if kind in row][-1] for kind in ("loss", "eval"))
    described = [row for row in read_jsonl(samples) if row["picture"] in ("0.jpg", "1.jpg")]
    figures = "".join(f"{figure:>10.3f}" for figure in (training, held_out["loss"], held_out["gap_shuffled"]))
    says = [" ".join(row["description"].split())[:40] or "(nothing)" for row in described]
    return figures, says, [row["reference"] for row in described]


def main():
    parser = ArgumentParser(description=__doc__)
    parser.parse_args()
    folder, results = SAVE_DIR / "wrong_runs", {}
    for number, (name, stage, lines, changed) in enumerate(wrong_runs(folder), start=1):
        print(f"\n== {number}. {name}", flush=True)
        flags = few_flags(stage, lines, folder / str(number), cache_vision=folder / "features", **changed)
        run_stage(stage, SEEDS[0], folder / str(number), *flags)
        results[name] = outcome(folder / str(number))
    print(f"\n{'':<34}{'training':>10}{'held out':>10}{'gap':>10}   of two pictures it says")
    for name, (figures, says, _) in results.items():
        print(f"{name:<34}{figures}   {' | '.join(says)}")
    print(f"{'expected':<34}{'':>30}   {' | '.join(next(iter(results.values()))[2])}")


if __name__ == "__main__":
    run_script(main)
