"""Talk to a trained model: it describes pictures, or answers a question about yours.

    python eval_vlm.py --weight sft_vlm                                   every picture of dataset/eval_images
    python eval_vlm.py --image cat.jpg --prompt "图中有什么？"              your own question
    python eval_vlm.py --image a.jpg b.jpg --prompt "描述这两张图片"        about several pictures
    python eval_vlm.py --weight llm                                       the language model before any picture

With weights of the built-in set it also prints how many of 200 scenes, whose combinations of colour, shape and place
were never trained on, it describes correctly.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch  # noqa: E402
from transformers import TextStreamer, set_seed  # noqa: E402

from dataset.chat import ChatEncoder  # noqa: E402
from dataset.lm_dataset import tokenizer_hash  # noqa: E402
from dataset.pictures import PictureError, load_picture  # noqa: E402
from dataset.prompts import prompt_batch, with_images  # noqa: E402
from dataset.scene_grading import chance, score  # noqa: E402
from dataset.scene_language import DESCRIBE  # noqa: E402
from dataset.scenes import draw, draw_builtin_dataset, heldout_scenes  # noqa: E402
from model.model_vlm import MiniMindVLM  # noqa: E402
from trainer import checkpoint  # noqa: E402
from trainer.arguments import run_script  # noqa: E402
from trainer.assets import (  # noqa: E402
    BUILTIN_DIR,
    BUILTIN_TOKENIZER_DIR,
    BUILTIN_TOWER_DIR,
    EVAL_IMAGES_DIR,
    ROOT,
    SAVE_DIR,
    TOKENIZER_DIR,
    TOWER_DIR,
    UsageError,
    shown,
)
from trainer.processes import pick_device  # noqa: E402
from trainer.setup import HINTS, load_tokenizer, quiet_libraries  # noqa: E402

PICTURE_ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
DRAWN_EVAL_IMAGES = 8
GRADED_BATCH = 50
GRADED_TOKENS = 64


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("the model").add_argument
    what = "model: the weight files in --save_dir; anything else: a transformers folder"
    add("--load_from", default="model", help=f"{what} (default: %(default)s)")
    add("--save_dir", type=Path, default=SAVE_DIR, help=f"where the weight files lie (default: {shown(SAVE_DIR)})")
    add(
        "--weight", default="sft_vlm", help="NAME of NAME_{hidden_size}.pth, or a path to a .pth (default: %(default)s)"
    )
    add("--hidden_size", type=int, help="which of several files of that name (default: the newest)")
    add("--num_hidden_layers", type=int, help="layers (default: what the file says)")
    add("--use_moe", type=int, choices=(0, 1), help="1: the file with experts (default: what the file says)")
    add("--tokenizer_path", type=Path, help="the tokenizer's folder (default: what the weights were trained with)")
    add("--vision_model_path", type=Path, help="the CLIP tower's folder (default: what the weights were trained with)")
    add("--device", help="cpu, cuda, cuda:N or mps (default: the best there is)")
    add = parser.add_argument_group("pictures and question").add_argument
    what = "folder whose pictures are described, one by one"
    add("--image_dir", type=Path, help=f"{what} (default: {shown(EVAL_IMAGES_DIR)})")
    add("--image", type=Path, nargs="+", help="pictures to ask about together")
    add("--prompt", default=DESCRIBE, help="the question; <image> marks where pictures stand (default: %(default)s)")
    add = parser.add_argument_group("generation").add_argument
    add("--max_new_tokens", type=int, default=512, help="longest answer in tokens (default: %(default)s)")
    add("--temperature", type=float, default=0.65, help="0 takes the likeliest token always (default: %(default)s)")
    add("--top_p", type=float, default=0.85, help="draw from the likeliest with this share (default: %(default)s)")
    add("--seed", type=int, default=42, help="of the drawing (default: %(default)s)")
    args = parser.parse_args(argv)
    check_flags(args)
    return args


def check_flags(args):
    """Raises UsageError with everything that is wrong with the flags."""
    problems = []
    if args.max_new_tokens < 1:
        problems.append(f"--max_new_tokens {args.max_new_tokens}: must be at least 1")
    if not args.temperature >= 0:
        problems.append(f"--temperature {args.temperature}: must not be negative")
    if not 0 < args.top_p <= 1:
        problems.append(f"--top_p {args.top_p}: must be above 0 and at most 1")
    if args.image and args.image_dir:
        problems.append("--image and --image_dir: give one of them")
    if problems:
        raise UsageError("\n".join(problems))


def find_weights(args) -> checkpoint.Weights:
    """The weights that the flags name."""
    use_moe = None if args.use_moe is None else bool(args.use_moe)
    if args.load_from != "model":
        weights = checkpoint.read_folder(Path(args.load_from).expanduser())
    else:
        save_dir = args.save_dir
        if args.weight == "llm" and not any(save_dir.glob("llm_*.pth")) and not TOWER_DIR.exists():
            save_dir = BUILTIN_DIR
        path = checkpoint.find_weights(save_dir, args.weight, args.hidden_size, use_moe, HINTS.get(args.weight, ""))
        weights = checkpoint.read_weights(path)
    checkpoint.check_shape_flags(weights, args.hidden_size, args.num_hidden_layers, use_moe)
    return weights


def choose_path(flag: Path | None, weights: checkpoint.Weights, name: str, builtin: Path, published: Path) -> Path:
    """The tower's or tokenizer's folder: as typed, else the one of the weights' training, else the published one."""
    if flag is not None:
        return flag.expanduser().resolve()
    if weights.sidecar.get("assets") == "built-in":
        return builtin
    trained_with = weights.sidecar.get("arguments", {}).get(name)
    return ROOT / trained_with if trained_with else published


class Assistant:
    """A model, its tokenizer, and how it is to answer."""

    def __init__(self, args):
        self.args = args
        weights = find_weights(args)
        self.is_builtin = weights.sidecar.get("assets") == "built-in"
        own_tokenizer = Path(args.load_from) if (Path(args.load_from) / "tokenizer.json").is_file() else TOKENIZER_DIR
        tokenizer_path = choose_path(
            args.tokenizer_path, weights, "tokenizer_path", BUILTIN_TOKENIZER_DIR, own_tokenizer
        )
        tower_path = choose_path(args.vision_model_path, weights, "vision_model_path", BUILTIN_TOWER_DIR, TOWER_DIR)
        self.tokenizer = load_tokenizer(tokenizer_path)
        checkpoint.check_tokenizer(weights, tokenizer_hash(self.tokenizer), tokenizer_path, len(self.tokenizer))
        self.encoder = ChatEncoder(self.tokenizer)
        self.device = pick_device(args.device, 0, 1)
        torch.manual_seed(args.seed)
        model = MiniMindVLM(weights.config, vision_model_path=tower_path)
        checkpoint.load_into(model, weights)
        self.model = model.to(self.device).eval()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"{shown(weights.path)}: {parameters / 1e6:.3f} M parameters, {weights.config.num_hidden_layers} layers; "
              f"tower {shown(tower_path)}, tokenizer {shown(tokenizer_path)}, {self.device}")  # fmt: skip
        if not weights.has_projection:
            print(
                "These weights are a language model's: the projection is untrained, so it cannot see the pictures yet."
            )

    @torch.inference_mode()
    def generate(self, conversations, pictures, **settings) -> torch.Tensor:
        """The answers' token ids (B, new tokens)."""
        batch = prompt_batch(self.encoder, conversations, pictures)
        batch = {name: value.to(self.device) for name, value in batch.items() if value is not None}
        if self.device.type == "cuda":
            # With a cache of fixed size transformers compiles the step of one token, once for a length of prompt.
            settings["cache_implementation"] = "static"
        return self.model.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :]

    def answer(self, prompt: str, paths: list[Path]):
        """Prints the answer as it is generated, then its speed."""
        args = self.args
        pictures = [load_picture(path) for path in paths]
        conversation = [{"role": "user", "content": with_images(prompt, len(pictures))}]
        sampling = {"do_sample": False}
        if args.temperature > 0:
            sampling = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        started = time.perf_counter()
        ids = self.generate(
            [conversation], [pictures], max_new_tokens=args.max_new_tokens, streamer=streamer, **sampling
        )
        seconds = time.perf_counter() - started
        print(f"    {ids.shape[1]} tokens, {ids.shape[1] / seconds:.0f} tokens/s\n")

    def describe_batch(self, pictures: list[torch.Tensor]) -> list[str]:
        """Greedy descriptions of pictures, many at a time."""
        texts = []
        conversation = [{"role": "user", "content": with_images(DESCRIBE, 1)}]
        for start in range(0, len(pictures), GRADED_BATCH):
            part = pictures[start : start + GRADED_BATCH]
            ids = self.generate(
                [conversation] * len(part), [[one] for one in part], max_new_tokens=GRADED_TOKENS, do_sample=False
            )
            texts += self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return texts


def pictures_to_describe(args, is_builtin: bool) -> list[Path]:
    """The pictures of --image_dir; for the built-in set eight held-out scenes are drawn where there are none.

    Raises:
        UsageError: If there are none.
    """
    folder = args.image_dir or EVAL_IMAGES_DIR
    if not folder.is_dir() and is_builtin and args.image_dir is None:
        folder.mkdir(parents=True)
        for number, scene in enumerate(heldout_scenes()[:DRAWN_EVAL_IMAGES]):
            draw(scene).save(folder / f"scene_{number}.jpg", quality=92)
    if not folder.is_dir():
        raise UsageError(f"no folder {shown(folder)}: put pictures there, or name some with --image or --image_dir")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURE_ENDINGS)
    if not paths:
        raise UsageError(f"no pictures in {shown(folder)} (endings: {' '.join(sorted(PICTURE_ENDINGS))})")
    return paths


def print_scene_table(assistant: Assistant):
    """How many attributes and whole captions of the held-out scenes are right, beside shuffled pictures and chance."""
    root = draw_builtin_dataset()
    scenes = heldout_scenes()
    facts = [scene.facts for scene in scenes]
    names = sorted((root / "heldout_images").iterdir())
    pictures = [load_picture(path) for path in names]
    started = time.perf_counter()
    right = score(assistant.describe_batch(pictures), facts)
    seconds = time.perf_counter() - started
    # Each scene gets the picture of another: half the set away, so that none keeps its own.
    half = len(pictures) // 2
    shuffled = score(assistant.describe_batch(pictures[half:] + pictures[:half]), facts)
    random_caption, constant_caption = chance(facts)
    rows = [
        ("right pictures", right),
        ("shuffled pictures", shuffled),
        ("chance: another scene's caption", random_caption),
        ("chance: best single caption", constant_caption),
    ]
    print(f"{len(scenes)} held-out scenes, combinations of colour, shape and place never trained on ({seconds:.0f} s):")
    print(f"  {'':<34}{'attributes':>12}{'whole captions':>16}")
    for name, of in rows:
        print(f"  {name:<34}{of.attributes:>12.1%}{of.captions:>16.1%}")


def main():
    args = parse_arguments()
    quiet_libraries(is_main=True)
    set_seed(args.seed)
    assistant = Assistant(args)
    if args.image:
        print(f"{', '.join(map(str, args.image))}: {args.prompt}")
        try:
            assistant.answer(args.prompt, args.image)
        except (PictureError, ValueError) as error:
            raise UsageError(str(error)) from error
        return
    unreadable = 0
    for path in pictures_to_describe(args, assistant.is_builtin):
        print(f"{path.name}: {args.prompt}")
        try:
            assistant.answer(args.prompt, [path])
        except PictureError as error:
            unreadable += 1
            print(f"    skipped: {error}\n")
        except ValueError as error:
            raise UsageError(str(error)) from error
    if assistant.is_builtin and args.image_dir is None:
        print_scene_table(assistant)
    if unreadable:
        raise UsageError(f"{unreadable} picture(s) could not be read")


if __name__ == "__main__":
    run_script(main)
