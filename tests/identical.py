"""Record what short runs of every kind compute, and compare later: a change of the layout changes no number.

    python tests/identical.py --record before.json
    python tests/identical.py --compare before.json

Both on the same machine: other processors sum in another order. Takes about a minute.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch
from tiny import EVAL, PRETRAIN, SFT, World, read_jsonl
from tiny_models import save_siglip, save_tokenizer_3v

from model.model_vlm import CONFIG_3V, MiniMindVLM, VLMConfig

LEARNS = ["--learning_rate", "1e-3", "--log_interval", "1", "--epochs", "2", "--batch_size", "4"]
EXPERTS = ["--from_weight", "none", "--hidden_size", "32", "--num_hidden_layers", "2", "--use_moe", "1"]
INTERRUPT = "import os, signal, threading\nthreading.Timer(2, os.kill, (os.getpid(), signal.SIGINT)).start()"
RUNS = {  # stage, ranks, flags
    "pretraining": ("pretrain", 1, []),
    "pretraining, two processes": ("pretrain", 2, []),
    "fine-tuning": ("sft", 1, []),
    "fine-tuning, two processes": ("sft", 2, []),
    "fine-tuning, accumulated": ("sft", 1, ["--accumulation_steps", "3"]),
    "fine-tuning, resumed": ("sft", 1, []),
    "fine-tuning, encoding in the step": ("sft", 1, ["--cache_vision", "off"]),
    "experts": ("sft", 1, EXPERTS),
    "mlp with pixel shuffle": ("pretrain", 1, ["--projector", "mlp", "--pixel_shuffle", "2"]),
    "minimind-3v": ("sft", 1, ["--empty_think_ratio", "1", "--add_system_ratio", "0"]),
}


def write_3v(folder: Path) -> list[str]:
    """Writes a small minimind-3v with its tower and tokenizer; returns the flags that name them."""
    torch.manual_seed(0)
    shape = CONFIG_3V | {"num_attention_heads": 4, "num_key_value_heads": 2, "qk_norm": True}
    model = MiniMindVLM(VLMConfig(**shape, num_hidden_layers=2, hidden_size=32, vision_hidden_size=32))
    folder.mkdir()
    torch.save({name: tensor.half() for name, tensor in model.state_dict().items()}, folder / "llm_3v.pth")
    tower, tokenizer = save_siglip(folder / "tower"), save_tokenizer_3v(folder / "tokenizer")
    flags = ["--from_weight", folder / "llm_3v.pth", "--vision_model_path", tower, "--tokenizer_path", tokenizer]
    return [*map(str, flags), "--ignore_high_loss"]


def run_all(folder: Path) -> dict:
    """Returns what each run computed: its losses, a hash of its weights, and its greedy answers."""
    world, found = World(folder), {}
    generation_3v = write_3v(folder / "3v")
    for name, (stage, ranks, flags) in RUNS.items():
        out = world.copy_of_out(folder / name)
        script, flags = {"pretrain": PRETRAIN, "sft": SFT}[stage], [*LEARNS, *flags]
        flags += [] if "--from_weight" in flags or name == "minimind-3v" else ["--from_weight", "llm"]
        flags += generation_3v if name == "minimind-3v" else []
        command = [script, *world.files(stage, out), *flags]
        if name.endswith("resumed"):
            world.run(*command, hook=INTERRUPT)
            command += ["--from_resume", "1"]
        world.run(*command, ranks=ranks).passed()
        [weights] = [path for path in out.glob(f"{stage}_vlm_*.pth") if "_resume" not in path.name]
        digest, tensors = hashlib.sha256(), torch.load(weights, weights_only=True)
        for key in sorted(tensors):
            digest.update(key.encode() + tensors[key].numpy().tobytes())
        rows = read_jsonl(weights.with_suffix(".metrics.jsonl"))
        found[name] = {"weights": digest.hexdigest()[:16], "losses": [row["loss"] for row in rows if "loss" in row]}
        if not name.startswith(("minimind", "mlp")):
            asked = ["--weight", f"{stage}_vlm", "--image", world.images / "0.jpg", "--temperature", "0"]
            done = world.run(EVAL, *world.eval_files(out), *asked).passed()
            found[name]["answer"] = done.out.strip().splitlines()[-2]
    world.close()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--record", "--compare"):
        parser.add_argument(flag, type=Path, metavar="FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run_all(Path(folder))
    if args.record:
        args.record.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if args.compare:
        before = json.loads(args.compare.read_text(encoding="utf-8"))
        other = [name for name in found if found[name] != before[name]]
        for name in other:
            print(f"{name}: before {before[name]}\n{' ' * len(name)}     now {found[name]}")
        sys.exit(f"{len(other)} of {len(found)} runs compute something else" if other else 0)


if __name__ == "__main__":
    main()
