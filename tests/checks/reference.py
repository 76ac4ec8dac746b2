"""Run both stages on the built-in set, and check that they learn as well as when reference.json was recorded.

    python tests/checks/reference.py            runs both stages with one seed, compares with the recorded figures
    python tests/checks/reference.py --record   runs three seeds, writes tests/checks/reference.json; resumes
    python tests/checks/reference.py quick      both stages on their first rows only; --record records that too
    python tests/checks/reference.py short      the same on fewer rows in one process, as the tests do
    python tests/checks/reference.py wide       stage 2's first rows, 512 wide and 8 layers deep, from random weights
    python tests/checks/reference.py quick --dtype bfloat16    does it learn as well in another precision?

The held-out loss (on scenes whose combinations of colour, shape and place are never trained on) must not exceed the
recorded mean by more than the recorded spread, the difference between the highest and the lowest of three seeds.
"""

import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from common.cli import ArgumentParser
from common.errors import UsageError, run_script
from common.files import write_atomically
from common.paths import BUILTIN_MODEL_DIR, BUILTIN_TOKENIZER_DIR, BUILTIN_TOWER_DIR, ROOT, SAVE_DIR
from dataset.scenes.draw import draw_builtin_dataset
from trainer.bundles import BUILTIN
from trainer.stage import Stage
from trainer.train_pretrain_vlm import STAGE as PRETRAIN
from trainer.train_sft_vlm import STAGE as SFT

RECORD = Path(__file__).with_name("reference.json")
SEEDS = (42, 1, 2)
STAGES = (PRETRAIN, SFT)
PROCESSES = {PRETRAIN: 1, SFT: 2}
QUICK = {PRETRAIN: 1600, SFT: 640}  # the first rows of a stage, seen once
# Of runs on few rows: each stage's first rows, held-out rows, and changed flags.
SIZES = {
    "quick": (QUICK, 200, {}),
    "short": ({PRETRAIN: 800, SFT: 160}, 48, {}),
    "wide": ({SFT: 640}, 200, {"from_weight": "none", "hidden_size": 512, "num_hidden_layers": 8}),
}


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run_stage(stage: Stage, seed: int, folder: Path, *flags: str, processes: int | None = None) -> list[list[float]]:
    """Runs a training script as the README does.

    Returns:
        [step, held-out loss, grounding gap] of each evaluation.

    Raises:
        UsageError: If it fails; its output is above.
    """
    name, processes = stage.defaults["save_weight"], processes or PROCESSES[stage]
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(ROOT / "trainer" / f"train_{name}.py"), "--seed", str(seed), "--save_dir", str(folder), *flags]
    if subprocess.run(command).returncode != 0:
        raise UsageError(f"{' '.join(command)} failed")
    [metrics] = folder.glob(f"{name}_???.metrics.jsonl")  # not those of earlier runs
    rows = [row for row in read_jsonl(metrics) if "eval" in row]
    return [[row["step"], row["eval"]["loss"], row["eval"]["gap_shuffled"]] for row in rows]


def run(size: str | None, seed: int, folder: Path, *flags: str) -> dict:
    """Returns the curve of each stage: of a size, or on all rows."""
    if size is None:
        cache = ["--cache_vision", str(SAVE_DIR / "vision_features")]
        return {f"stage {n}": run_stage(stage, seed, folder, *cache, *flags) for n, stage in enumerate(STAGES, start=1)}
    (rows, heldout_rows, changed), curves = SIZES[size], {}
    changed = changed | {"eval_data": write_lines(folder / "heldout.jsonl", first_lines("heldout", heldout_rows))}
    for stage, count in rows.items():
        chosen = few_flags(stage, first_lines(stage.data, count), folder, **changed)
        name, processes = f"stage {STAGES.index(stage) + 1}, {size}", 1 if size == "short" else None
        curves[name] = run_stage(stage, seed, folder, *chosen, *flags, processes=processes)
        changed |= {"from_weight": folder / f"{stage.defaults['save_weight']}_128.pth"}
    return curves


def first_lines(name: str, count: int) -> list[str]:
    """Returns the first lines of one of the built-in set's files."""
    return (draw_builtin_dataset() / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:count]


def write_lines(path: Path, lines: list[str]) -> Path:
    write_atomically(path, lambda file: file.write("".join(lines).encode("utf-8")))
    return path


def few_flags(stage: Stage, lines: list[str], folder: Path, **changed) -> list[str]:
    """Returns the flags of a run of one epoch on these lines that writes nothing to out/."""
    data = draw_builtin_dataset()
    settings = BUILTIN.recipes[stage.name] | {
        "epochs": 1,
        "from_weight": BUILTIN_MODEL_DIR / "llm_128.pth",
        "data_path": write_lines(folder / f"{stage.data}.jsonl", lines),
        "images_path": data / "images",
        "eval_data": data / "heldout.jsonl",
        "eval_images_path": data / "heldout_images",
        "eval_interval": 10**6,  # at the end
        "tokenizer_path": BUILTIN_TOKENIZER_DIR,
        "vision_model_path": BUILTIN_TOWER_DIR,
    }
    return [str(word) for name, value in (settings | changed).items() for word in (f"--{name}", value)]


def summary(curves: dict[str, list]) -> dict:
    """Returns mean and spread of the last held-out losses, and the mean grounding gap."""
    losses, gaps = ([curve[-1][column] for curve in curves.values()] for column in (1, 2))
    return {
        "held_out_loss": round(sum(losses) / len(losses), 5),
        "spread": round(max(losses) - min(losses), 5),
        "grounding_gap": round(sum(gaps) / len(gaps), 4),
        "curves": curves,
    }


def record(size: str | None, folder: Path):
    """Runs every seed, and adds the figures to those already recorded."""
    flags = "--dtype", "float32", "--from_resume", "1"
    by_seed = {seed: run(size, seed, folder / f"seed_{seed}", *flags) for seed in SEEDS}
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    for name in by_seed[SEEDS[0]]:
        recorded[name] = summary({f"seed {seed}": by_seed[seed][name] for seed in SEEDS})
        print(f"{name}: held-out loss {recorded[name]['held_out_loss']} (spread {recorded[name]['spread']})")
    RECORD.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")


def compare(curves: dict[str, list]) -> list[str]:
    """Prints each curve beside the recorded one; returns what is worse."""
    recorded, worse = json.loads(RECORD.read_text(encoding="utf-8")), []
    for name, curve in curves.items():
        expected, spread, loss = recorded[name]["held_out_loss"], recorded[name]["spread"], curve[-1][1]
        line = f"{name}: held-out loss {loss:.4f}, recorded {expected:.4f} (spread {spread:.4f})"
        print(line)
        if not loss <= expected + spread:  # NaN is worse too
            worse.append(f"{line}: worse than {expected + spread:.4f}")
    return worse


def main():
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--record", action="store_true", help="run three seeds and record the figures")
    add("size", nargs="?", choices=tuple(SIZES), help="default: both stages on all rows")
    add("--seed", type=int, default=SEEDS[0], help="seed of the run that is compared")
    add("--dtype", choices=("float32", "bfloat16"), help="of the run that is compared (default: training's choice)")
    args = parser.parse_args()
    folder = SAVE_DIR / "_".join(filter(None, ("reference", args.size)))
    if args.record:
        record(args.size, folder)
        return
    flags = ("--dtype", args.dtype) if args.dtype else ()
    worse = compare(run(args.size, args.seed, folder / (args.dtype or "") / f"seed_{args.seed}", *flags))
    if worse:
        raise UsageError("\n".join(worse))


if __name__ == "__main__":
    run_script(main)
