"""Talk to a trained model: it describes pictures, or answers questions.

    python eval_vlm.py                          describes dataset/eval_images
    python eval_vlm.py --image cat.jpg --prompt "图中有什么？"
    python eval_vlm.py --image a.jpg b.jpg --prompt "描述这两张图片"
    python eval_vlm.py --weight llm             before any picture was learned
    python eval_vlm.py --chat                   name pictures by their paths
    python eval_vlm.py --eval_data val.jsonl --images_path pictures
                                  loss, perplexity, grounding gap, exact match
    torchrun --nproc_per_node 2 eval_vlm.py --eval_data val.jsonl

With weights of the built-in set it also prints how many of 200 held-out scenes
(combinations of colour, shape and place never trained on) it gets right.
"""

import argparse
import contextlib
import json
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from transformers import TextStreamer

from common.cli import ArgumentParser, HelpFormatter, file_path, number, temperature
from common.errors import UsageError, run_script
from common.paths import EVAL_IMAGES_DIR, display_path, printable
from dataset.conversation import IMAGE_TAG
from dataset.foreign import PICTURE_SUFFIXES, is_picture
from dataset.lm_dataset import VLMDataset
from dataset.pictures import HEIC_CURE, PictureError
from dataset.scenes.draw import draw, heldout_scenes
from dataset.scenes.language import DESCRIBE, LANGUAGES
from dataset.tokenizer import quiet_libraries
from trainer.answering.assistant import Assistant, add_speed_flags
from trainer.answering.loaded_model import add_model_flags, find_model
from trainer.answering.typed_paths import file_of, find_pictures
from trainer.bundles import MINIMIND2, MINIMIND_3V
from trainer.evaluate import Evaluator, exact_match, perplexity
from trainer.report.scene_table import scene_table
from trainer.support.processes import Processes

DRAWN_EVAL_IMAGES = 8
CHAT_HELP = """Type a question; name a picture in it by its path, or add one before:
  /image PATH   adds a picture to the next question (a line of paths only does so too)
  /new          forgets the conversation
  /help         shows this
  /quit         ends, as an empty line does
"""


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_speed_flags(add_model_flags(parser))
    group = parser.add_argument_group("what to do")
    add = group.add_mutually_exclusive_group().add_argument
    what = f"describe each picture of a folder (default: {display_path(EVAL_IMAGES_DIR)})"
    add("--image_dir", type=file_path, help=what)
    add("--image", type=file_path, nargs="+", help="ask about these pictures together")
    add("--chat", action="store_true", help="chat; name pictures by their paths")
    add("--eval_data", type=file_path, help="evaluate on these rows, jsonl or parquet as for training")
    what = "the question; <image> marks where pictures stand, \\n a line break"
    what += f" (default: {DESCRIBE}; the built-in model is also asked in English)"
    group.add_argument("--prompt", type=utf8_text, help=what)
    add = parser.add_argument_group("with --eval_data").add_argument
    add("--images_path", type=file_path, help="folder of the jsonl's pictures")
    add("--batch_size", type=number(int, 1), default=16, help="rows, or pictures of a folder, at once")
    add("--max_seq_len", type=number(int, 8), default=1536, help="tokens a row is cut at")
    what = "also generate answers of at most this many tokens, and compare them word for word; 0: none"
    add("--short_answer", type=number(int, 0), default=16, help=what)
    add("--json", type=file_path, help="also write the results to this file")
    add = parser.add_argument_group("generation").add_argument
    add("--max_new_tokens", type=number(int, 1), default=512, help="longest answer in tokens")
    add("--temperature", type=temperature, help=f"0: always the likeliest token {recipe('temperature')}")
    add(
        "--top_p", type=number(float, 1e-3, 1), help=f"sample from the likeliest tokens of this share {recipe('top_p')}"
    )
    what = f"sample from this many of the likeliest tokens; 0: from all {recipe('top_k')}"
    add("--top_k", type=number(int, 0), help=what)
    add("--seed", type=number(int, 0, 2**63 - 1), default=42, help="of the sampling")
    args = parser.parse_args(argv)
    if args.json and not args.eval_data:
        parser.error("argument --json: there is something to write with --eval_data only")
    if args.json and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        parser.error(f"argument --json: {args.json}: there is no such folder, or it is a folder itself")
    return args


def recipe(name: str) -> str:
    """Says the default of a sampling flag."""
    default, default_3v = MINIMIND2.sampling[name], MINIMIND_3V.sampling[name]
    return f"(default: {default}{'' if default == default_3v else f'; minimind-3v: {default_3v}'})"


def utf8_text(text: str) -> str:
    """An argparse type: a text as it is typed in a shell; raises ValueError if it is not UTF-8."""
    return text.encode().decode().replace("\\n", "\n")


class Chat:
    """Asks a model, and prints what it answers."""

    def __init__(self, args: argparse.Namespace, processes: Processes):
        loaded, self.max_new_tokens = find_model(args), args.max_new_tokens
        typed = {name: getattr(args, name) for name in loaded.sampling if getattr(args, name) is not None}
        self.sampling = loaded.sampling | typed
        torch.manual_seed(args.seed)  # of the sampling, and of a projection that the weights lack
        self.assistant = Assistant(loaded, processes.device, args.dtype, args.compile)
        parameters = sum(parameter.numel() for parameter in self.assistant.model.parameters())
        weights, tower, tokenizer = map(display_path, (loaded.weights.path, loaded.tower_path, loaded.tokenizer_path))
        processes.log(
            f"{weights}: {parameters / 1e6:.3f} M parameters, {loaded.config.num_hidden_layers} layers; "
            f"tower {tower}, tokenizer {tokenizer}, {processes.device}"
        )
        if loaded.knows_only_scenes and (args.image or args.image_dir or args.chat):
            processes.log("These weights know only the drawn shapes of the built-in set.")
        if not loaded.weights.has_projection:
            untrained = "the projection is untrained, so it cannot see the pictures yet."
            processes.log(f"These weights are a language model's: {untrained}")

    def turn(self, question: str, images: int) -> dict:
        """Returns a question's turn; raises ValueError if the model has no room for it."""
        turn = self.assistant.turn(question, images)
        self.assistant.check_length([turn], self.max_new_tokens)
        return turn

    def answer(self, conversation: list[dict], pictures: list[torch.Tensor]) -> str:
        """Prints the next turn of a conversation as it is generated, then its speed; returns it."""
        tokenizer, started = self.assistant.tokenizer, time.perf_counter()
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        ids = self.assistant.answer(conversation, pictures, self.max_new_tokens, **self.sampling, streamer=streamer)
        print(f"    {speed(len(ids), started)}\n", flush=True)
        return tokenizer.decode(ids, skip_special_tokens=True)

    def ask(self, question: str, paths: list[Path]):
        """Prints the answer to a question about pictures."""
        try:
            turn, pictures = self.turn(question, len(paths)), list(map(self.assistant.load_picture, paths))
        except ValueError as error:
            raise UsageError(str(error)) from error
        self.answer([turn], pictures)

    def describe(self, prompts: list[str], paths: list[Path]) -> int:
        """Asks every question about every picture in one batch; prints the answers, then the speed.

        Returns:
            How many pictures could not be read.
        """
        try:
            turns = [self.turn(prompt, 1) for prompt in prompts]
        except ValueError as error:
            raise UsageError(str(error)) from error
        pictures = {}
        for path in paths:
            try:
                pictures[path] = self.assistant.load_picture(path)
            except PictureError as error:
                print(f"{printable(path.name)}: skipped: {error}\n")
        names = [f"{printable(path.name)}: {prompt}" for path in pictures for prompt in prompts]
        if names:
            started, conversations = time.perf_counter(), [[turn] for turn in turns] * len(pictures)
            each = [[picture] for picture in pictures.values() for _ in turns]
            answers = self.assistant.answers(conversations, each, self.max_new_tokens, **self.sampling)
            speed_of_all = speed(sum(map(len, answers)), started)
            texts = self.assistant.tokenizer.batch_decode(answers, skip_special_tokens=True)
            for name, text in zip(names, texts, strict=True):
                print(f"{name}\n{text}\n")
            count = "1 answer" if len(names) == 1 else f"{len(names)} answers at once"
            print(f"    {count}: {speed_of_all}\n", flush=True)
        return len(paths) - len(pictures)

    def drop_oldest(self, turns: list[dict], pictures: list) -> tuple[list[dict], list]:
        """Drops the oldest questions and answers, with their pictures, until the rest fits; says how many."""
        dropped = 0
        while len(turns) > 1:
            try:
                self.assistant.check_length(turns, self.max_new_tokens)
                break
            except ValueError:
                pictures = pictures[turns[0]["content"].count(IMAGE_TAG) :]
                turns, dropped = turns[2:], dropped + 1
        if dropped:
            print(f"    (the conversation is too long: the oldest {dropped} question(s) and answer(s) are dropped)")
        return turns, pictures

    def talk(self):
        """Chats at the terminal until /quit or an empty line; raises EOFError at the end of the input."""
        if hasattr(sys.stdin, "reconfigure"):
            sys.stdin.reconfigure(errors="replace")  # bytes that are not UTF-8 do not end a conversation
        print(CHAT_HELP)
        turns, pictures, added = [], [], []
        while (line := input("you> ").strip()) and line != "/quit":
            command, _, rest = line.partition(" ")
            question, paths, missing = find_pictures(rest if command == "/image" else line)
            if line == "/new":
                turns, pictures, added = [], [], []
                print("    a new conversation")
                continue
            if command == "/image" and (path := file_of(rest.strip())):
                question, paths, missing = "", [path], []
            elif command == "/image" and not paths and not missing:
                missing = [f"{rest}: no such file" if rest else "/image PATH: name a picture"]
            elif command.startswith("/") and not paths and not missing:
                print(CHAT_HELP if line == "/help" else f"    no command {printable(command)}; /help names them all")
                continue
            try:  # a line that is refused changes nothing
                if missing:
                    raise ValueError("; ".join(map(printable, missing)))
                self.turn(question or "?", len(added) + len(paths))
                asked = [*added, *map(self.assistant.load_picture, paths)]
            except ValueError as error:
                print(f"    not added, and nothing asked: {error}")
                continue
            if paths:
                print(f"    with {', '.join(map(printable, paths))}")
            if not question:
                added = asked
                print(f"    {len(added)} picture(s) added: ask about them")
                continue
            turn = self.assistant.turn(question, len(asked))
            turns, pictures = self.drop_oldest([*turns, turn], [*pictures, *asked])
            turns, added = [*turns, {"role": "assistant", "content": self.answer(turns, pictures)}], []


def speed(tokens: int, started: float) -> str:
    return f"{tokens} tokens, {tokens / (time.perf_counter() - started):.0f} tokens/s"


def evaluate(assistant: Assistant, args: argparse.Namespace, processes: Processes):
    """Prints, and writes with --json, how well the model predicts the rows of --eval_data."""
    form = assistant.model.config.image_tokens, assistant.picture_format
    with processes.main_first():
        data = VLMDataset(args.eval_data, args.images_path, assistant.tokenizer, args.max_seq_len, *form)
    if len(data) == 0:
        raise UsageError(f"{args.eval_data} has no row to measure on")
    shows, asked, right = processes.is_main and sys.stderr.isatty(), 0, 0
    evaluator = Evaluator(data, assistant.model, processes, torch.float32, args.batch_size)
    held_out = evaluator.measure(shows)
    if held_out.loss is None:
        raise UsageError(f"nothing in {args.eval_data} could be measured on: none of its pictures can be read")
    if args.short_answer:
        right, asked = exact_match(evaluator, assistant.tokenizer, args.short_answer, shows)
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


def print_scene_table(assistant: Assistant):
    """Prints the share of right attributes and captions of the held-out scenes, beside shuffled images and chance."""
    started = time.perf_counter()
    rows = scene_table(assistant.model, assistant.tokenizer)
    scenes = f"{len(heldout_scenes())} held-out scenes, combinations of colour, shape and place never trained on"
    print(f"{scenes} ({time.perf_counter() - started:.0f} s):")
    print(f"  {'':<34}{'attributes':>12}{'whole captions':>16}")
    for row in rows:
        print(f"  {row['name']:<34}{row['attributes']:>12.1%}{row['captions']:>16.1%}")


def pictures_in(folder: Path) -> list[Path]:
    """Returns the pictures of a folder; prints what else is there.

    Raises:
        UsageError: If there are none.
    """
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


def describe_folder(chat: Chat, args: argparse.Namespace):
    """Describes every picture of --image_dir; the built-in set's own folder is drawn, and its scenes are graded."""
    folder, is_builtin = args.image_dir or EVAL_IMAGES_DIR, chat.assistant.trained.knows_only_scenes
    prompts = [language.requests[0] for language in (LANGUAGES if is_builtin else LANGUAGES[:1])]
    is_builtin = is_builtin and args.image_dir is None
    if is_builtin and not folder.is_dir():
        folder.mkdir(parents=True)
        for index, scene in enumerate(heldout_scenes()[:DRAWN_EVAL_IMAGES]):
            draw(scene).save(folder / f"scene_{index}.jpg", quality=92)
    paths = pictures_in(folder)
    batches = [paths[start : start + args.batch_size] for start in range(0, len(paths), args.batch_size)]
    unreadable = sum(chat.describe([args.prompt] if args.prompt else prompts, batch) for batch in batches)
    if is_builtin:
        print_scene_table(chat.assistant)
    if unreadable:
        raise UsageError(f"{unreadable} picture(s) could not be read")


def main():
    args = parse_arguments()
    with Processes.start(args.device) as processes:
        quiet_libraries(processes.is_main)
        if processes.world_size > 1 and not args.eval_data:
            raise UsageError("several processes share the work of --eval_data only: leave torchrun out")
        chat = Chat(args, processes)
        if args.eval_data:
            evaluate(chat.assistant, args, processes)
        elif args.chat:
            with contextlib.suppress(EOFError):
                chat.talk()
        elif args.image:
            question = args.prompt or DESCRIBE
            print(f"{', '.join(map(printable, args.image))}: {question}")
            chat.ask(question, args.image)
        else:
            describe_folder(chat, args)


if __name__ == "__main__":
    run_script(main)
