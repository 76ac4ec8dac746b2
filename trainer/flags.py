"""The flags of the two training scripts, checked all at once, and how a script ends on a user's mistake."""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from common.errors import UsageError
from common.paths import SAVE_DIR, TOKENIZER_DIR, TOWER_DIR, display_path
from trainer.support.assets import BUILTIN_RECIPE, choose_assets

LOG_INTERVAL = 100


@dataclass(frozen=True)
class Stage:
    """What a stage is: its name, what it does in a line, and its flags' published defaults."""

    name: str
    story: str
    defaults: dict


def build_parser(stage: Stage, description: str) -> argparse.ArgumentParser:
    """All flags of a training script. Those a recipe may set have no default here: see `parse_arguments`."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Nothing downloaded and no path given: the small built-in set is used, with settings of its own.",
    )
    add_model_flags(parser.add_argument_group("what is learned, and from what").add_argument, stage.defaults)
    add_file_flags(parser.add_argument_group("files").add_argument, stage)
    add_optimisation_flags(parser.add_argument_group("optimisation").add_argument, stage.defaults)
    add_device_flags(parser.add_argument_group("device").add_argument)
    add_saving_flags(parser.add_argument_group("saving, going on, logging").add_argument)
    return parser


def add_model_flags(add, default: dict):
    what = "weights to start from: NAME of NAME_{hidden_size}.pth in --save_dir, a path to a .pth, or none"
    add("--from_weight", default=default["from_weight"], help=f"{what} (default: %(default)s)")
    what = (
        "0: projection and decoder learn; 1: the projection; 2: the projection and the decoder's first and last layer"
    )
    add(
        "--freeze_llm",
        type=int,
        choices=(0, 1, 2),
        default=default["freeze_llm"],
        help=f"{what} (default: %(default)s)",
    )
    add("--hidden_size", type=int, help="width of the decoder (default: what the weights say)")
    add("--num_hidden_layers", type=int, help="layers of the decoder (default: what the weights say)")
    add("--use_moe", type=int, choices=(0, 1), help="1: a decoder with experts (default: what the weights say)")
    what = "tokens a sample is cut at; each picture takes 196"
    add("--max_seq_len", type=int, default=default["max_seq_len"], help=f"{what} (default: %(default)s)")


def add_file_flags(add, stage: Stage):
    name = stage.name
    add("--data_path", type=Path, help=f"jsonl or parquet (default: dataset/{name}_data.jsonl or .parquet)")
    add("--images_path", type=Path, help=f"folder of the jsonl's pictures (default: dataset/{name}_images)")
    what = "the tokenizer that belongs to the weights"
    add("--tokenizer_path", type=Path, help=f"{what} (default: {display_path(TOKENIZER_DIR)})")
    add("--vision_model_path", type=Path, help=f"the CLIP tower's folder (default: {display_path(TOWER_DIR)})")
    what = "where weights, states and metrics are written"
    add("--save_dir", type=Path, default=SAVE_DIR, help=f"{what} (default: {display_path(SAVE_DIR)})")
    add("--save_weight", default=stage.defaults["save_weight"], help="their name (default: %(default)s)")
    what = "keep the tower's features in this folder, so that a picture is encoded once; or: off"
    tenth = "on where the tower runs on CPU or MPS and a tenth of the free disk holds them"
    add("--cache_vision", metavar="DIR", help=f"{what} (default: {tenth})")
    what = "rows to measure on, jsonl or parquet, or: none"
    held_out = "1 %% of the training rows, at most 512, which then are not trained on"
    add("--eval_data", metavar="FILE", help=f"{what} (default: {held_out})")
    add("--eval_images_path", type=Path, help="folder of their pictures (default: --images_path)")
    what = "leave out up to so many rows that cannot be learned from"
    add("--max_bad_rows", type=int, help=f"{what} (default: 1 %% of the rows)")


def add_optimisation_flags(add, default: dict):
    add("--epochs", type=int, help=f"passes over the data (default: {default['epochs']})")
    what = "samples per process and forward pass"
    add("--batch_size", type=int, help=f"{what} (default: {default['batch_size']})")
    what = "forward passes per optimizer step"
    add("--accumulation_steps", type=int, default=1, help=f"{what} (default: %(default)s)")
    what = "at the start; it falls along a cosine to a tenth"
    add("--learning_rate", type=float, help=f"{what} (default: {default['learning_rate']:g})")
    what = "largest norm of the gradient; 0 does not clip"
    add("--grad_clip", type=float, default=1.0, help=f"{what} (default: %(default)s)")
    what = "of the projection's first weights and the samples' order"
    add("--seed", type=int, default=42, help=f"{what} (default: %(default)s)")


def add_device_flags(add):
    add("--device", help="cpu, cuda, cuda:N or mps (default: the best there is)")
    what = "of matrix products (default: bfloat16 where a GPU computes in it, float16 on other CUDA GPUs, else float32)"
    add("--dtype", choices=("bfloat16", "float16", "float32"), help=what)
    what = "minutes after which a process of several that does not answer is given up"
    add("--timeout_minutes", type=float, default=10, help=f"{what} (default: %(default)s)")
    what = "1: compile tower and decoder (torch.compile), which takes a minute at the start and pays in a long run"
    add("--compile", type=int, choices=(0, 1), help=f"{what} (default: 1 on CUDA, else 0)")
    add("--num_workers", type=int, help="processes that decode pictures (default: one per core, at most 16)")


def add_saving_flags(add):
    add("--save_interval", type=int, default=100, help="optimizer steps between saves (default: %(default)s)")
    what = "minutes after which it is saved in any case"
    add("--save_minutes", type=float, default=10, help=f"{what} (default: %(default)s)")
    add("--from_resume", type=int, choices=(0, 1), default=0, help="1: go on from the last save, if there is one")
    what = "optimizer steps between log lines; the first comes after step 1"
    add("--log_interval", type=int, help=f"{what} (default: {LOG_INTERVAL})")
    what = "optimizer steps between measurements on held-out rows"
    add("--eval_interval", type=int, help=f"{what} (default: a tenth of the run)")
    add("--use_wandb", action="store_true", help="log to Weights & Biases too (WANDB_MODE=offline works)")
    add("--wandb_project", default="MiniMind-V", help="its project there (default: %(default)s)")
    what = "go on where the first loss says that weights and tokenizer do not belong together"
    add("--ignore_high_loss", action="store_true", help=what)


def parse_arguments(stage: Stage, description: str, argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the flags, chooses the files, and fills what was not given: by the built-in recipe, else as published.

    Returns:
        The flags, and `assets` ("built-in" or "published").

    Raises:
        UsageError: With everything that is wrong with the flags in one message.
    """
    args = build_parser(stage, description).parse_args(argv)
    for name in ("data_path", "images_path", "eval_images_path", "tokenizer_path", "vision_model_path", "save_dir"):
        if getattr(args, name) is not None:
            setattr(args, name, getattr(args, name).expanduser().resolve())
    problems = []
    try:
        args.assets = choose_assets(args, stage.name)
    except UsageError as error:  # said together with what is wrong with the flags
        args.assets, problems = "published", [str(error)]
    builtin = BUILTIN_RECIPE[stage.name] if args.assets == "built-in" else {}
    recipe = {"log_interval": LOG_INTERVAL} | stage.defaults | builtin
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    problems = flag_problems(args) + problems
    if problems:
        raise UsageError("\n".join(problems))
    return args


LEAST = {
    **dict.fromkeys(
        ("epochs", "batch_size", "accumulation_steps", "log_interval", "save_interval", "eval_interval"), 1
    ),
    **dict.fromkeys(("num_workers", "max_bad_rows", "grad_clip", "seed"), 0),
    **{"max_seq_len": 8, "hidden_size": 8, "num_hidden_layers": 1},
}


def flag_problems(args) -> list[str]:
    """What is wrong with the flags' values."""
    values = {name: getattr(args, name) for name in LEAST}
    problems = [
        f"--{name} {value}: must be at least {LEAST[name]}"
        for name, value in values.items()
        if value is not None and not value >= LEAST[name]  # so that NaN is refused too
    ]
    for name in ("learning_rate", "save_minutes", "timeout_minutes"):
        value = getattr(args, name)
        if not (math.isfinite(value) and value > 0):
            problems.append(f"--{name} {value}: must be above 0")
    if not args.save_weight or any(character in args.save_weight for character in "/\\"):
        problems.append(f"--save_weight {args.save_weight!r}: must be a plain name; --save_dir is the folder")
    return problems


