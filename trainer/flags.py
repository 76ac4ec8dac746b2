"""The flags of the training scripts: read, checked all at once, and filled in."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from common.cli import ArgumentParser, file_path, number
from common.errors import UsageError
from common.paths import SAVE_DIR, TOKENIZER_DIR, TOWER_DIR, display_path
from model.language_model import check_language_model
from model.projectors import PROJECTORS
from model.vision_tower import TOWERS
from trainer.bundles import BUILTIN, BUNDLES, LANGUAGE_MODEL, choose_bundle
from trainer.stage import Stage
from trainer.support.processes import cores, pick_device, pick_dtype, ranks

LOG_INTERVAL = 100
LONGEST_NAME = 150  # bytes; a file's name may have 255, and others hang dates and endings on it
COUNT, POSITIVE, SWITCH = number(int, 1), number(float, 1e-12), {"type": int, "choices": (0, 1)}


def build_parser(stage: Stage, description: str) -> ArgumentParser:
    """Returns the parser of a training script. Flags a recipe may set have no default in it: see `parse_arguments`."""
    epilog = ""
    if stage.data in BUILTIN.recipes:
        epilog = "Nothing downloaded and no path given: the small built-in set is used, with settings of its own."
    for bundle in BUNDLES.values():
        if bundle is not BUILTIN and (recipe := bundle.recipes.get(stage.name)):
            settings = ", ".join(f"{flag} {value:g}" for flag, value in recipe.items())
            start = "With --llm_path" if bundle is LANGUAGE_MODEL else f"From {bundle.name}'s weights"
            epilog += f"\n{start} the defaults are: {settings}."
    parser = ArgumentParser(description=description, epilog=epilog, imports=True)
    add_model_flags(parser, stage)
    add_run_flags(parser, stage)
    stage.add_flags(parser.add_argument)
    return parser


def add_model_flags(parser: ArgumentParser, stage: Stage):
    """Adds what is trained on what: model and files."""
    group, default = parser.add_argument_group("model"), stage.defaults
    add, start = group.add_argument, group.add_mutually_exclusive_group()
    what = "weights to start from: NAME of NAME_{hidden_size}.pth in --save_dir, a path to a .pth, or none"
    start.add_argument("--from_weight", help=f"{what} (default: {default['from_weight']})")
    what = "a causal language model of transformers with a chat template, in place of --from_weight"
    start.add_argument("--llm_path", type=file_path, metavar="FOLDER", help=what)
    what = "adapters of this rank learn in the decoder, in place of its matrices (needs peft)"
    add("--lora", type=COUNT, metavar="RANK", help=what)
    what = "what of the decoder stays as it is: none; all; or all but its ends, the first and last layer"
    add("--freeze_llm", type=freeze_word, choices=("none", "ends", "all"), default=default["freeze_llm"], help=what)
    add("--hidden_size", type=number(int, 8), help="width of the decoder (default: what the weights say)")
    add("--num_hidden_layers", type=COUNT, help="layers of the decoder (default: what the weights say)")
    add("--use_moe", **SWITCH, help="1: a decoder with experts (default: what the weights say)")
    add("--projector", choices=PROJECTORS, help="kind of projection (default: what the weights say, else linear)")
    what = "an image takes 1/N² as many tokens, each of N x N patches (default: what the weights say, else 1)"
    add("--pixel_shuffle", type=COUNT, metavar="N", help=what)
    what = "tokens a sample is cut at, its images' included"
    add("--max_seq_len", type=number(int, 8), help=f"{what} (default: {default['max_seq_len']})")

    add, data = parser.add_argument_group("files").add_argument, stage.data
    add("--data_path", type=file_path, help=f"jsonl or parquet (default: dataset/{data}_data.parquet, else .jsonl)")
    folder = f"the jsonl's own; dataset/{data}_images for published data"
    add("--images_path", type=file_path, help=f"folder of the jsonl's images (default: {folder})")
    add("--tokenizer_path", type=file_path, help=f"the weights' tokenizer (default: {display_path(TOKENIZER_DIR)})")
    what = f"folder of the vision tower: {', '.join(TOWERS)}"
    add("--vision_model_path", type=file_path, help=f"{what} (default: {display_path(TOWER_DIR)})")
    what = "where weights, checkpoints and metrics are written"
    add("--save_dir", type=file_path, help=f"{what} (default: {display_path(SAVE_DIR)})", default=SAVE_DIR)
    add("--save_weight", type=run_name, default=default["save_weight"], help="the weights' name")
    what = "keep the tower's features in this folder, so that an image is encoded once; or: off"
    tenth = "on where the tower runs on CPU or MPS and a tenth of the free disk holds them"
    add("--cache_vision", type=path_or("off"), metavar="DIR", help=f"{what} (default: {tenth})")
    what = "evaluation rows, jsonl or parquet, or: none"
    held_out = "1 %% of the training rows, at most 512, which then are not trained on"
    add("--eval_data", type=path_or("none"), metavar="FILE", help=f"{what} (default: {held_out})")
    add("--eval_images_path", type=file_path, help="folder of their images (default: --images_path)")
    what = "minimind-3v: share of rows that keep their empty think blocks"
    add("--empty_think_ratio", type=number(float, 0, 1), help=f"{what} (default: as the recipe says, else 1)")
    what = "minimind-3v: share of rows without a system turn that get one"
    add("--add_system_ratio", type=number(float, 0, 1), help=f"{what} (default: as the recipe says, else 0)")
    add("--max_bad_rows", type=number(int, 0), help="leave out up to this many bad rows (default: 1 %% of the rows)")


def add_run_flags(parser: ArgumentParser, stage: Stage):
    """Adds how it is trained: optimisation, device, saving and logging."""
    add, default = parser.add_argument_group("optimisation").add_argument, stage.defaults
    add("--epochs", type=COUNT, help=f"passes over the data (default: {default['epochs']})")
    add("--batch_size", type=COUNT, help=f"samples per process and forward pass (default: {default['batch_size']})")
    add("--accumulation_steps", type=COUNT, default=1, help="forward passes (micro-batches) per optimizer step")
    add("--learning_rate", type=POSITIVE, help=f"peak; cosine decay to 10 %% (default: {default['learning_rate']:g})")
    add("--grad_clip", type=number(float, 0), default=1.0, help="largest norm of the gradient; 0 does not clip")
    add("--seed", type=number(int, 0, 2**63 - 1), default=42, help="of initial weights and the order of samples")

    add = parser.add_argument_group("device").add_argument
    add("--device", help="cpu, cuda, cuda:N or mps (default: the best there is)")
    what = "compute dtype (default: bfloat16 where it is fast, else float16 on a GPU and float32 on a CPU)"
    add("--dtype", choices=("bfloat16", "float16", "float32"), help=what)
    add("--timeout_minutes", type=POSITIVE, default=10, help="a rank that does not answer for this long ends the run")
    what = "1: compile tower and decoder, which takes a minute (default: 1 on CUDA, but 0 with the built-in set)"
    add("--compile", "--use_compile", **SWITCH, help=what)
    add("--capture", **SWITCH, help="1: take whole steps as CUDA graphs, in a single process (default: 1 on CUDA)")
    what = "1: only algorithms that give the same bits in every run; slower on CUDA, and not compiled there"
    add("--deterministic", **SWITCH, help=f"{what} (default: 1 on a CPU)")
    what = "processes that decode images (default: one per core, two fewer on CUDA, at most 16)"
    add("--num_workers", type=number(int, 0), help=what)

    add = parser.add_argument_group("saving, resuming, logging").add_argument
    add("--save_interval", type=COUNT, default=100, help="optimizer steps between checkpoints")
    add("--from_resume", **SWITCH, help="1: resume from the last checkpoint; 0: start over, the old files get a date")
    add("--log_interval", type=COUNT, help=f"optimizer steps between log lines (default: {LOG_INTERVAL})")
    add("--eval_interval", type=COUNT, help="optimizer steps between evaluations (default: a tenth of the run)")
    add("--use_wandb", action="store_true", help="log to Weights & Biases too (WANDB_MODE=offline works)")
    add("--use_swanlab", action="store_true", help="log to SwanLab too (pip install swanlab; SWANLAB_MODE=offline)")
    add("--wandb_project", default="MiniMind-V", help="the project at either")
    what = "train even if the first loss suggests that weights and tokenizer do not belong together"
    add("--ignore_high_loss", action="store_true", help=what)


def freeze_word(text: str) -> str:
    """Converts `--freeze_llm`: one of its words, or the numbers 0 and 1 of this project's first generation."""
    if text == "2":
        raise argparse.ArgumentTypeError(
            "2 is not the same in the original's two generations: write ends (projection and the decoder's first and "
            "last layer learn) or all (the projection alone learns)"
        )
    return {"0": "none", "1": "all"}.get(text, text)


def path_or(word: str) -> Callable[[str], Path | str]:
    """Returns an argparse type: a path, or the word in its place."""
    return lambda text: text if text == word else file_path(text)


def run_name(text: str) -> str:
    """An argparse type: what files of a run are called."""
    is_printable = bool(text.strip()) and text.isprintable()
    if not is_printable or len(os.fsencode(text)) > LONGEST_NAME or {*text} & {*"/\\"}:
        raise argparse.ArgumentTypeError(
            f"{text[:60]!r} must be a plain name of at most {LONGEST_NAME} bytes; --save_dir is the folder"
        )
    return text


def parse_arguments(stage: Stage, description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the flags and fills in missing ones: files, the stage's or the built-in settings, the device.

    None of them changes later; `assets` among them is the name of the model's bundle. Raises UsageError if files are
    missing, or a flag does not fit this machine.
    """
    args = build_parser(stage, description).parse_args(argv)
    for name, value in vars(args).items():
        if isinstance(value, Path):
            setattr(args, name, value.resolve())
    if args.llm_path is not None:
        check_language_model(args.llm_path)
    args.from_weight = os.path.expanduser(args.from_weight or stage.defaults["from_weight"])
    bundle, paths = choose_bundle(args, stage.data)
    args.assets = bundle.name
    _, world_size, *local_share = ranks()
    device = pick_device(args.device, *local_share)
    args.device, dtype, is_cuda = str(device), pick_dtype(args.dtype, device), device.type == "cuda"
    if args.dtype or device.type != "cpu":  # on a CPU it depends on the model: see `setup.Run`
        args.dtype = str(dtype).removeprefix("torch.")
    if args.deterministic is None:
        args.deterministic = device.type == "cpu"
    defaults = {
        "log_interval": LOG_INTERVAL,
        "capture": is_cuda,
        "num_workers": min(16, max(1, cores() // world_size - 2 * is_cuda)),  # two cores for the loop and for pinning
        # Compiled kernels are chosen by timing them, so they may differ from run to run.
        "compile": is_cuda and not args.deterministic,
    }
    for name, value in (defaults | stage.defaults | bundle.recipes.get(stage.name, {}) | paths).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.compile and args.deterministic and is_cuda:
        raise UsageError("--compile 1 picks kernels by timing them: --deterministic 1 needs --compile 0")
    return args
