"""The reference run: both stages on the built-in set, and whether they learn as well as they did.

    python scripts/reference.py              runs both stages with one seed and compares with the recorded figures
    python scripts/reference.py --record     runs three seeds and writes scripts/reference.json (goes on where it was stopped)
    python scripts/reference.py --quick      both stages on their first rows only (two minutes); with --record writes that part

Compared is the held-out loss (200 scenes whose combinations of colour, shape and place are never trained on): it must not be
higher than the recorded mean by more than the recorded spread (highest less lowest of three seeds).
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.errors import (
    UsageError,  # noqa: E402
    run_script,  # noqa: E402
)
from common.files import write_atomically  # noqa: E402
from common.paths import BUILTIN_MODEL_DIR, BUILTIN_TOKENIZER_DIR, BUILTIN_TOWER_DIR, SAVE_DIR, display_path  # noqa: E402
from dataset.scenes.draw import draw_builtin_dataset  # noqa: E402
from trainer.support.assets import BUILTIN_RECIPE  # noqa: E402

RECORD = ROOT / "scripts" / "reference.json"
SEEDS = (42, 1, 2)
QUICK_ROWS = {"pretrain": 2560, "sft": 1280}  # seen once
STAGES = {"stage 1": "pretrain", "stage 2": "sft"}


def held_out_losses(metrics: Path) -> list[list[float]]:
    """[step, held-out loss, grounding gap] of each measurement of a run."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [[row["step"], row["eval"]["loss"], row["eval"]["gap_shuffled"]] for row in rows if "eval" in row]


def run_stage(stage: str, seed: int, folder: Path, *flags: str) -> list[list[float]]:
    """Runs a training script as the README does, and returns its curve.

    Raises:
        UsageError: If it fails; what it printed has been shown.
    """
    script = str(ROOT / "trainer" / f"train_{stage}_vlm.py")
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch = [sys.executable] if stage == "pretrain" else start
    command = [*launch, script, "--seed", str(seed), "--save_dir", str(folder), *flags]
    if subprocess.run(command, cwd=ROOT).returncode != 0:
        raise UsageError(f"{' '.join(command)} failed")
    [metrics] = folder.glob(f"{stage}_vlm_*.metrics.jsonl")
    return held_out_losses(metrics)


def run_both(seed: int, folder: Path, *flags: str) -> dict:
    """The curves of both stages."""
    cache = ["--cache_vision", str(SAVE_DIR / "vision_features")]
    return {name: run_stage(stage, seed, folder, *cache, *flags) for name, stage in STAGES.items()}


def first_rows(stage: str) -> list[str]:
    """The lines that a quick run learns from."""
    lines = (draw_builtin_dataset() / f"{stage}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    return lines[: QUICK_ROWS[stage]]


def quick_flags(stage: str, lines: list[str], folder: Path, **changed) -> list[str]:
    """The flags of a run of one epoch on these lines, which leaves nothing in out/."""
    few = folder / f"{stage}.jsonl"
    write_atomically(few, lambda file: file.write("".join(lines).encode("utf-8")))
    data = draw_builtin_dataset()
    settings = BUILTIN_RECIPE[stage] | {
        "epochs": 1,
        "from_weight": BUILTIN_MODEL_DIR / "llm_128.pth",
        "data_path": few,
        "images_path": data / "images",
        "eval_data": data / "heldout.jsonl",
        "eval_images_path": data / "heldout_images",
        "eval_interval": 10**6,  # at the end
        "tokenizer_path": BUILTIN_TOKENIZER_DIR,
        "vision_model_path": BUILTIN_TOWER_DIR,
    }
    return [str(word) for name, value in (settings | changed).items() for word in (f"--{name}", value)]


def run_quick(seed: int, folder: Path, *flags: str) -> dict:
    """The curves of both stages on their first rows."""
    curves, start = {}, {}
    for name, stage in STAGES.items():
        chosen = quick_flags(stage, first_rows(stage), folder, **start)
        curves[f"{name}, quick"] = run_stage(stage, seed, folder, *chosen, *flags)
        start = {"from_weight": folder / f"{stage}_vlm_128.pth"}
    return curves


def summary(curves: dict[str, list]) -> dict:
    """Mean and spread of the last held-out losses, and the mean grounding gap."""
    losses, gaps = ([curve[-1][column] for curve in curves.values()] for column in (1, 2))
    return {
        "held_out_loss": round(sum(losses) / len(losses), 5),
        "spread": round(max(losses) - min(losses), 5),
        "grounding_gap": round(sum(gaps) / len(gaps), 4),
        "curves": curves,
    }


def record(run, folder: Path):
    """Runs every seed, and writes what came of it beside what else is recorded."""
    by_seed = {seed: run(seed, folder / f"seed_{seed}", "--from_resume", "1") for seed in SEEDS}
    recorded = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}
    for name in by_seed[SEEDS[0]]:
        recorded[name] = summary({f"seed {seed}": by_seed[seed][name] for seed in SEEDS})
        print(f"{name}: held-out loss {recorded[name]['held_out_loss']} (spread {recorded[name]['spread']})")
    RECORD.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")


def compare(curves: dict[str, list]) -> list[str]:
    """What is worse than recorded; prints all of it."""
    recorded, worse = json.loads(RECORD.read_text(encoding="utf-8")), []
    for name, curve in curves.items():
        if name not in recorded:
            print(f"{name}: held-out loss {curve[-1][1]:.4f}; nothing is recorded to compare it with (--record does)")
            continue
        expected, loss = recorded[name], curve[-1][1]
        limit = expected["held_out_loss"] + expected["spread"]
        line = f"{name}: held-out loss {loss:.4f}, recorded {expected['held_out_loss']:.4f} (spread {expected['spread']:.4f})"
        print(line)
        if not loss <= limit:
            worse.append(f"{line}: worse than {limit:.4f}")
    return worse


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="run three seeds and write what came of it")
    parser.add_argument("--quick", action="store_true", help="both stages on their first rows only")
    parser.add_argument("--seed", type=int, default=SEEDS[0], help="of the run that is compared (default: %(default)s)")
    folder = SAVE_DIR / "reference"
    parser.add_argument("--folder", type=Path, default=folder, help=f"where runs are kept (default: {display_path(folder)})")
    args = parser.parse_args(argv)
    args.folder = args.folder.expanduser().resolve()  # the runs are started from the project's folder
    return args


def main():
    args = parse_arguments()
    run = run_quick if args.quick else run_both
    if args.record:
        record(run, args.folder)
        return
    worse = compare(run(args.seed, args.folder / f"seed_{args.seed}"))
    if worse:
        raise UsageError("\n".join(worse))


if __name__ == "__main__":
    run_script(main)
