"""Talk to a trained model: it describes pictures, or answers a question about yours.

    python eval_vlm.py --weight sft_vlm                                   every picture of dataset/eval_images
    python eval_vlm.py --image cat.jpg --prompt "图中有什么？"              your own question
    python eval_vlm.py --image a.jpg b.jpg --prompt "描述这两张图片"        about several pictures
    python eval_vlm.py --weight llm                                       the language model before any picture
    python eval_vlm.py --chat                                             a talk: type, add pictures by their path
    python eval_vlm.py --eval_data val.jsonl --images_path pictures       loss, perplexity, grounding gap, exact match
    torchrun --nproc_per_node 2 eval_vlm.py --eval_data val.jsonl --images_path pictures --json result.json

With weights of the built-in set it also prints how many of 200 scenes, whose combinations of colour, shape and place
were never trained on, it describes correctly.
"""

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch  # noqa: E402
from transformers import TextStreamer  # noqa: E402

from common.cli import ArgumentParser, HelpFormatter, file_path  # noqa: E402
from common.errors import UsageError, run_script  # noqa: E402
from common.paths import EVAL_IMAGES_DIR, display_path, printable  # noqa: E402
from dataset.conversation import IMAGE_TAG  # noqa: E402
from dataset.foreign import PICTURE_SUFFIXES, is_picture  # noqa: E402
from dataset.lm_dataset import VLMDataset  # noqa: E402
from dataset.pictures import HEIC_CURE, PictureError  # noqa: E402
from dataset.scenes.draw import draw, heldout_scenes  # noqa: E402
from dataset.scenes.language import DESCRIBE, LANGUAGES  # noqa: E402
from dataset.tokenizer import quiet_libraries  # noqa: E402
from trainer.support.processes import Processes  # noqa: E402
from trainer.support.trained import SAMPLING, SAMPLING_3V, add_model_flags, find_trained  # noqa: E402
from trainer.watch.assistant import Assistant, add_speed_flags  # noqa: E402
from trainer.watch.heldout import Evaluator, exact_match, perplexity  # noqa: E402
from trainer.watch.scene_table import scene_table  # noqa: E402
from trainer.watch.typed_paths import file_of, find_pictures  # noqa: E402

DRAWN_EVAL_IMAGES = 8
LEAST_TEMPERATURE = 1e-3  # logits divided by less overflow


def parse_arguments(argv=None) -> argparse.Namespace:
    """Reads the flags; raises UsageError with everything that is wrong with them."""
    parser = ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_speed_flags(add_model_flags(parser))
    add = parser.add_argument_group("chat or measure").add_argument
    add("--chat", action="store_true", help="chat; pictures are named by their paths")
    add("--eval_data", type=file_path, help="rows to measure on, jsonl or parquet as for training")
    add("--images_path", type=file_path, help="folder of the jsonl's pictures")
    add("--batch_size", type=int, default=16, help="rows, or pictures of a folder, at once")
    add("--max_seq_len", type=int, default=1536, help="tokens a row is cut at")
    what = "also ask for the answers of at most this many tokens, and compare them word for word; 0 asks nothing"
    add("--short_answer", type=int, default=16, help=what)
    add("--json", type=file_path, help="write what was measured there")
    add = parser.add_argument_group("pictures and question").add_argument
    what = "folder whose pictures are described, each by itself"
    add("--image_dir", type=file_path, help=f"{what} (default: {display_path(EVAL_IMAGES_DIR)})")
    add("--image", type=file_path, nargs="+", help="pictures to ask about together")
    what = "the question; <image> marks where pictures stand, \\n a line break"
    add("--prompt", help=f"{what} (default: {DESCRIBE}; the built-in model is also asked in English)")
    add = parser.add_argument_group("generation").add_argument
    add("--max_new_tokens", type=int, default=512, help="longest answer in tokens")
    what = "0 always takes the likeliest token"
    default = f"{SAMPLING['temperature']}; minimind-3v: {SAMPLING_3V['temperature']}"
    add("--temperature", type=float, help=f"{what} (default: {default})")
    what = "draw from the likeliest tokens with this share"
    add("--top_p", type=float, help=f"{what} (default: {SAMPLING['top_p']})")
    what = "draw from this many of the likeliest tokens; 0: from all"
    add("--top_k", type=int, help=f"{what} (default: {SAMPLING['top_k']}; minimind-3v: {SAMPLING_3V['top_k']})")
    add("--seed", type=int, default=42, help="of the drawing")
    args = parser.parse_args(argv)
    args.prompt = args.prompt and args.prompt.replace("\\n", "\n")  # as it is typed in a shell
    check_flags(args)
    return args


def check_flags(args):
    """Raises UsageError with everything that is wrong with the flags."""
    problems = []
    if args.max_new_tokens < 1:
        problems.append(f"--max_new_tokens {args.max_new_tokens}: must be at least 1")
    if not (args.temperature in (None, 0) or args.temperature >= LEAST_TEMPERATURE):
        problems.append(f"--temperature {args.temperature}: must be 0 or at least {LEAST_TEMPERATURE:g}")
    if args.top_p is not None and not 0 < args.top_p <= 1:
        problems.append(f"--top_p {args.top_p}: must be above 0 and at most 1")
    if args.top_k is not None and args.top_k < 0:
        problems.append(f"--top_k {args.top_k}: must be at least 0")
    chosen = [name for name in ("image", "image_dir", "chat", "eval_data") if getattr(args, name)]
    if len(chosen) > 1:
        problems.append(f"{' and '.join(f'--{name}' for name in chosen)}: give one of them")
    for name, least in (("batch_size", 1), ("max_seq_len", 8), ("short_answer", 0)):
        if getattr(args, name) < least:
            problems.append(f"--{name} {getattr(args, name)}: must be at least {least}")
    if args.prompt and not is_unicode(args.prompt):
        problems.append("--prompt is not UTF-8: type it in a terminal that is")
    if args.json and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        problems.append(f"--json {args.json}: there is no such folder, or it is a folder itself")
    if not -(2**63) <= args.seed < 2**63 or args.seed < 0:
        problems.append(f"--seed {args.seed}: must be at least 0 and below 2**63")
    if args.json and not args.eval_data:
        problems.append("--json: there is something to write with --eval_data only")
    if problems:
        raise UsageError("\n".join(problems))


def is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


class Talker:
    """Asks an assistant, and prints what it answers."""

    def __init__(self, args, processes: Processes):
        self.args = args
        trained = find_trained(args)
        given = {name: getattr(args, name) for name in trained.sampling if getattr(args, name) is not None}
        self.sampling = trained.sampling | given
        torch.manual_seed(args.seed)  # of the drawing, and of a projection that the weights lack
        self.assistant = Assistant(trained, processes.device, args.dtype, args.compile)
        parameters = sum(parameter.numel() for parameter in self.assistant.model.parameters())
        paths = trained.weights.path, trained.tower_path, trained.tokenizer_path
        weights, tower, tokenizer = map(display_path, paths)
        processes.log(
            f"{weights}: {parameters / 1e6:.3f} M parameters, {trained.config.num_hidden_layers} layers; "
            f"tower {tower}, tokenizer {tokenizer}, {processes.device}"
        )
        if trained.knows_only_scenes and (args.image or args.image_dir or args.chat):
            processes.log("These weights know only the drawn shapes of the built-in set.")
        if not trained.weights.has_projection:
            processes.log(
                "These weights are a language model's: the projection is untrained, so it cannot see the pictures yet."
            )

    def ask(self, prompt: str, paths: list[Path]):
        """Prints the answer to a question about pictures."""
        turn = self.check_question(prompt, len(paths))
        self.answer([turn], [self.assistant.load_picture(path) for path in paths])

    def check_question(self, question: str, images: int) -> dict:
        """Returns a question's turn; raises ValueError if the model has no room for it."""
        turn = self.assistant.turn(question, images)
        self.assistant.check_length([turn], self.args.max_new_tokens)
        return turn

    def describe(self, prompts: list[str], paths: list[Path]) -> int:
        """Prints the answers to questions about each of some pictures, all asked at once, then the speed.

        Returns:
            How many pictures could not be read.
        """
        args, assistant, pictures = self.args, self.assistant, {}
        try:
            turns = [self.check_question(prompt, 1) for prompt in prompts]
        except ValueError as error:
            raise UsageError(str(error)) from error
        for path in paths:
            try:
                pictures[path] = assistant.load_picture(path)
            except PictureError as error:
                print(f"{printable(path.name)}: skipped: {error}\n")
        if pictures:
            started = time.perf_counter()
            asked = [(path, prompt, turn) for path in pictures for prompt, turn in zip(prompts, turns, strict=True)]
            answers = assistant.answers(
                [[turn] for _, _, turn in asked],
                [[pictures[path]] for path, _, _ in asked],
                args.max_new_tokens,
                **self.sampling,
            )
            seconds, tokens = time.perf_counter() - started, sum(map(len, answers))
            for (path, prompt, _), ids in zip(asked, answers, strict=True):
                print(f"{printable(path.name)}: {prompt}")
                print(f"{assistant.tokenizer.decode(ids, skip_special_tokens=True)}\n")
            count = "1 answer" if len(asked) == 1 else f"{len(asked)} answers at once"
            print(f"    {count}: {tokens} tokens, {tokens / seconds:.0f} tokens/s\n", flush=True)
        return len(paths) - len(pictures)

    def let_go_of_oldest(self, turns: list[dict], pictures: list) -> tuple[list[dict], list]:
        """Drops the oldest question and answer, with their pictures, as long as all is too long; says so."""
        dropped = 0
        while len(turns) > 1:
            try:
                self.assistant.check_length(turns, self.args.max_new_tokens)
                break
            except ValueError:
                pictures = pictures[turns[0]["content"].count(IMAGE_TAG) :]
                turns, dropped = turns[2:], dropped + 1
        if dropped:
            print(f"    (the conversation is too long: the oldest {dropped} question(s) and answer(s) are let go)")
        return turns, pictures

    def answer(self, conversation: list[dict], pictures: list[torch.Tensor]) -> str:
        """Prints the next turn of a conversation as it is generated, then its speed; returns it."""
        args, tokenizer = self.args, self.assistant.tokenizer
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        started = time.perf_counter()
        ids = self.assistant.answer(conversation, pictures, args.max_new_tokens, **self.sampling, streamer=streamer)
        seconds = time.perf_counter() - started
        print(f"    {len(ids)} tokens, {len(ids) / seconds:.0f} tokens/s\n", flush=True)
        return tokenizer.decode(ids, skip_special_tokens=True)


CHAT_HELP = """Type a question; name a picture in it by its path, or add one before:
  /image PATH   adds a picture to the next question (a line of paths only does so too)
  /new          forgets the conversation
  /help         shows this
  /quit         ends, as an empty line does
"""


def chat(talker: Talker):
    """Chats at the terminal until /quit, an empty line or the end of input."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # what is not UTF-8 ends no conversation
    print(CHAT_HELP)
    turns, pictures, added = [], [], []
    while (line := read_line("you> ")) and line != "/quit":
        command, _, rest = line.partition(" ")
        if line == "/new":
            turns, pictures, added = [], [], []
            print("    a new conversation")
            continue
        question, paths, missing = find_in_line(rest.strip() if command == "/image" else line, command)
        if command.startswith("/") and command != "/image" and not paths and not missing:
            print(CHAT_HELP if line == "/help" else f"    no command {command}; /help names them all")
            continue
        try:  # a line that is refused changes nothing
            if missing:
                raise ValueError("; ".join(map(printable, missing)))
            talker.check_question(question or "?", len(added) + len(paths))
            asked = [*added, *map(talker.assistant.load_picture, paths)]
        except ValueError as error:
            print(f"    not added, and nothing asked: {error}")
            continue
        if paths:
            print(f"    with {', '.join(map(printable, paths))}")
        if not question:
            added = asked
            print(f"    {len(added)} picture(s) added: ask about them")
            continue
        turn = talker.assistant.turn(question, len(asked))
        turns, pictures = talker.let_go_of_oldest([*turns, turn], [*pictures, *asked])
        reply = talker.answer(turns, pictures)
        turns, added = [*turns, {"role": "assistant", "content": reply}], []


def find_in_line(line: str, command: str) -> tuple[str, list[Path], list[str]]:
    """Returns the question, the pictures and what is missing in a line, or in what stands after /image."""
    path = file_of(line) if command == "/image" else None
    found = find_pictures(line) if path is None else ("", [path], [])
    if command == "/image" and not found[1] and not found[2]:
        return "", [], [f"{line}: no such file" if line else "/image PATH: name a picture"]
    return found


def read_line(prompt: str) -> str:
    try:
        return input(prompt).strip()
    except EOFError:
        return ""


def measure(assistant: Assistant, args, processes: Processes):
    """Prints, and writes with --json, how well the model knows the rows of --eval_data."""
    with processes.main_first():
        tokens = assistant.model.config.image_tokens
        data = VLMDataset(
            args.eval_data, args.images_path, assistant.tokenizer, args.max_seq_len, tokens, assistant.picture_format
        )
    if len(data) == 0:
        raise UsageError(f"{args.eval_data} has no row to measure on")
    shows = processes.is_main and sys.stderr.isatty()
    evaluator = Evaluator(data, assistant.model, processes, torch.float32, args.batch_size)
    held_out = evaluator.measure(shows)
    if held_out.loss is None:
        raise UsageError(f"nothing in {args.eval_data} could be measured on: none of its pictures can be read")
    right, asked = (
        exact_match(evaluator, assistant.tokenizer, args.short_answer, shows) if args.short_answer else (0, 0)
    )
    for error in dict.fromkeys(map(str, evaluator.skipped)):
        print(f"left out, its picture cannot be read: {error}")
    if not processes.is_main:
        return
    result = held_out.as_dict() | {"perplexity": perplexity(held_out.loss)}
    result |= {"short_answers": asked, "exact_match": right / asked if asked else None}
    result |= {"data": str(args.eval_data), "bad_rows": len(data.bad_rows), "left_out": len(data) - held_out.samples}
    lines = {
        "rows": f"{held_out.samples:,} with {held_out.tokens:,} learned tokens, in {held_out.seconds:.0f} s",
        "loss": f"{held_out.loss:.4f} nats per token (perplexity {result['perplexity']:.3f})",
        "shuffled images": as_gap(held_out.loss_shuffled, held_out.gap_shuffled),
        "no images": as_gap(held_out.loss_blind, held_out.gap_blind),
        "short answers": f"{right / asked:.1%} of {asked:,} to the letter" if asked else "none asked",
    }
    if data.bad_rows:
        lines["left out"] = f"{len(data.bad_rows)} rows that cannot be used (python -m dataset.check says which)"
    for name, value in lines.items():
        print(f"  {name:<26} {value}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def as_gap(loss: float | None, gap: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}: a grounding gap of {gap:.4f}"


def pictures_to_describe(args, knows_only_scenes: bool) -> list[Path]:
    """Returns the pictures of --image_dir; for the built-in set eight held-out scenes are drawn where there are none.

    Raises:
        UsageError: If there are none.
    """
    folder = args.image_dir or EVAL_IMAGES_DIR
    if not folder.is_dir() and knows_only_scenes and args.image_dir is None:
        folder.mkdir(parents=True)
        for number, scene in enumerate(heldout_scenes()[:DRAWN_EVAL_IMAGES]):
            draw(scene).save(folder / f"scene_{number}.jpg", quality=92)
    if not folder.is_dir():
        raise UsageError(
            f"no folder {display_path(folder)}: put pictures there, or name some with --image or --image_dir"
        )
    files = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and not path.is_dir())
    paths = [path for path in files if is_picture(path.name) and path.is_file()]
    endings = Counter((path.suffix.lower() or "no ending") for path in files if path not in paths)
    others = f"{endings.total()} not read ({', '.join(f'{count} {name}' for name, count in endings.most_common())})"
    others += f". {HEIC_CURE}" if endings.keys() & {".heic", ".heif"} else ""
    if not paths:
        others = f"; {others}" if endings else ""
        raise UsageError(
            f"no pictures in {display_path(folder)} (endings: {' '.join(sorted(PICTURE_SUFFIXES))}){others}"
        )
    if endings:
        print(f"{display_path(folder)}: {printable(others)}\n")
    return paths


def print_scene_table(assistant: Assistant):
    """Prints the share of right attributes and captions of the held-out scenes, beside shuffled images and chance."""
    started = time.perf_counter()
    rows = scene_table(assistant.model, assistant.tokenizer)
    seconds = time.perf_counter() - started
    print(
        f"{len(heldout_scenes())} held-out scenes, combinations of colour, shape and place never trained on "
        f"({seconds:.0f} s):"
    )
    print(f"  {'':<34}{'attributes':>12}{'whole captions':>16}")
    for row in rows:
        print(f"  {row['name']:<34}{row['attributes']:>12.1%}{row['captions']:>16.1%}")


def main():
    args = parse_arguments()
    with Processes.start(args.device) as processes:
        quiet_libraries(processes.is_main)
        if processes.world_size > 1 and not args.eval_data:
            raise UsageError("several processes share the work of --eval_data only: leave torchrun out")
        talker = Talker(args, processes)
        if args.eval_data:
            measure(talker.assistant, args, processes)
        elif args.chat:
            chat(talker)
        elif args.image:
            prompt = args.prompt or DESCRIBE
            print(f"{', '.join(map(printable, args.image))}: {prompt}")
            try:
                talker.ask(prompt, args.image)
            except (PictureError, ValueError) as error:
                raise UsageError(str(error)) from error
        else:
            describe_folder(args, talker)


def describe_folder(args, talker: Talker):
    """Describes every picture of --image_dir; for the built-in set, grades the held-out scenes too."""
    trained, unreadable = talker.assistant.trained, 0
    usual = [language.requests[0] for language in (LANGUAGES if trained.knows_only_scenes else LANGUAGES[:1])]
    paths = pictures_to_describe(args, trained.knows_only_scenes)
    for start in range(0, len(paths), args.batch_size):
        unreadable += talker.describe([args.prompt] if args.prompt else usual, paths[start : start + args.batch_size])
    if trained.knows_only_scenes and args.image_dir is None:
        print_scene_table(talker.assistant)
    if unreadable:
        raise UsageError(f"{unreadable} picture(s) could not be read")


if __name__ == "__main__":
    run_script(main)
