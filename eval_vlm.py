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
import math
import os
import re
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from transformers import TextStreamer

from common.cli import ArgumentParser, file_path, number
from common.errors import UsageError, run_script
from common.files import write_atomically
from common.paths import BUILTIN_TOWER_DIR, EVAL_IMAGES_DIR, display_path, printable
from dataset.file_kinds import PICTURE_SUFFIXES, is_picture, quiet_libraries
from dataset.lm_dataset import VLMCollator, VLMDataset
from dataset.pictures import HEIC_CURE, PictureError
from dataset.prompts import prompt_batch, with_images
from dataset.scenes.draw import draw_builtin_dataset, draw_heldout, heldout_scenes
from dataset.scenes.grading import Score, chance, score
from dataset.scenes.language import DESCRIBE, LANGUAGES
from model.answers import generate_answers
from trainer.answering.assistant import Assistant, add_generation_flags, add_model_flags, find_model, find_pictures
from trainer.evaluate import SHORT_ANSWER, Evaluator, exact_match
from trainer.report.page import verdict
from trainer.stage import answer_loss
from trainer.support.processes import Processes

DRAWN_EVAL_IMAGES = 8
SCENES_AT_ONCE = 50
CHAT_HELP = """Type a question, with the paths of its pictures in it or in a line before.
/new starts a new conversation, /help shows this, /quit or an empty line ends.
"""


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, imports=True)
    add_model_flags(parser, runs=True)
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
    add("--short_answer", type=number(int, 0), default=SHORT_ANSWER, help=what)
    add("--json", type=file_path, help="also write the results to this file")
    group = parser.add_argument_group("generation")
    add_generation_flags(group, max_new_tokens=512)
    group.add_argument("--show_speed", type=int, choices=(0, 1), default=1, help="0: no tokens/s after an answer")
    group.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=42, help="of the sampling")
    args = parser.parse_args(argv)
    for flag in ("json", "images_path"):
        if getattr(args, flag) and not args.eval_data:
            parser.error(f"argument --{flag}: needs --eval_data")
    if args.json and not args.json.absolute().parent.is_dir():
        parser.error(f"argument --json: there is no folder {args.json.parent}")
    return args


def utf8_text(text: str) -> str:
    """Parses a text as it is typed in a shell, for argparse; raises ValueError if it is not UTF-8."""
    return text.encode().decode().replace("\\n", "\n")


def answer(assistant: Assistant, args: argparse.Namespace, conversation: list[dict], pictures: list) -> str:
    """Prints the next turn of a conversation as it is generated, then its speed; returns it."""
    tokenizer, started = assistant.tokenizer, time.perf_counter()
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    sampling = assistant.loaded.sampling(args)
    [ids] = assistant.answers([conversation], [pictures], args.max_new_tokens, **sampling, streamer=streamer)
    rate = len(ids) / (time.perf_counter() - started)
    print(f"    {len(ids)} tokens, {rate:.0f} tokens/s\n" if args.show_speed else "", flush=True)
    return tokenizer.decode(ids, skip_special_tokens=True)


def ask(assistant: Assistant, args: argparse.Namespace):
    """Prints the answer to a question about the pictures of --image."""
    question = args.prompt or DESCRIBE
    turn = assistant.turn(question, len(args.image), max_new_tokens=args.max_new_tokens)
    try:
        pictures = list(map(assistant.load_picture, args.image))
    except PictureError as error:
        raise UsageError(str(error)) from error
    print(f"{', '.join(map(printable, args.image))}: {question}")
    answer(assistant, args, [turn], pictures)


def describe_folder(assistant: Assistant, args: argparse.Namespace):
    """Describes the pictures of --image_dir or dataset/eval_images; grades a model that knows only drawn scenes."""
    only_scenes, folder = assistant.loaded.knows_only_scenes, args.image_dir or EVAL_IMAGES_DIR
    if only_scenes and not args.image_dir and not folder.is_dir():
        draw_heldout(folder, DRAWN_EVAL_IMAGES)
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise UsageError(f"{display_path(folder)} {what}: --image_dir names a folder of pictures, --image pictures")
    files = {path for path in folder.glob("[!.]*") if not path.is_dir()}
    paths = sorted(path for path in files if is_picture(path.name) and path.is_file())
    endings = Counter(path.suffix.lower() or path.name for path in sorted(files.difference(paths)))
    others = f"not read: {', '.join(f'{count} {ending}' for ending, count in endings.items()) or 'nothing'}"
    others += f". {HEIC_CURE}" if endings.keys() & {".heic", ".heif"} else ""
    if not os.access(folder, os.R_OK | os.X_OK):
        raise UsageError(f"{display_path(folder)} cannot be read: permission denied")
    if not paths:
        known = " ".join(sorted(PICTURE_SUFFIXES))
        raise UsageError(f"no pictures ({known}) in {display_path(folder)}: name some with --image; {others}")
    if endings:
        print(f"{display_path(folder)}: {printable(others)}\n")
    prompts, unreadable = [language.requests[0] for language in LANGUAGES] if only_scenes else [DESCRIBE], 0
    prompts = [args.prompt] if args.prompt else prompts
    turns = [assistant.turn(prompt, 1, max_new_tokens=args.max_new_tokens) for prompt in prompts]
    for start in range(0, len(paths), args.batch_size):
        asked, pictures = [], []
        for path in paths[start : start + args.batch_size]:
            try:
                pictures += [[assistant.load_picture(path)]] * len(prompts)
                asked += [f"{printable(path.name)}: {prompt}" for prompt in prompts]
            except PictureError as error:
                print(f"{printable(path.name)}: skipped: {error}\n")
                unreadable += 1
        if asked:
            started, conversations = time.perf_counter(), [[turn] for turn in turns] * (len(asked) // len(turns))
            sampling = assistant.loaded.sampling(args)
            answers = assistant.answers(conversations, pictures, args.max_new_tokens, **sampling)
            for question, ids in zip(asked, answers, strict=True):
                print(f"{question}\n{assistant.tokenizer.decode(ids, skip_special_tokens=True)}\n")
            tokens = sum(map(len, answers))
            total = f"{tokens} tokens, {tokens / (time.perf_counter() - started):.0f} tokens/s"
            print(f"    {len(answers)} answer(s) at once: {total}\n" if args.show_speed else "", flush=True)
    if only_scenes and not args.image_dir:
        started, rows = time.perf_counter(), scene_table(assistant)
        scenes = f"{len(heldout_scenes())} held-out scenes, combinations of colour, shape and place"
        print(f"{scenes} never trained on ({time.perf_counter() - started:.0f} s):")
        print(f"  {'':<34}{'attributes':>12}{'whole captions':>16}")
        for name, row in rows.items():
            print(f"  {name:<34}{row.attributes:>12.1%}{row.captions:>16.1%}")
    if unreadable:
        raise UsageError(f"{unreadable} picture(s) could not be read")


def chat(assistant: Assistant, args: argparse.Namespace):
    """Chats at the terminal until /quit or an empty line; raises EOFError at the end of the input."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # bytes that are not UTF-8 do not end a conversation
    print(CHAT_HELP)
    turns, pictures, added = [], [], []
    while (line := input("you> ").strip()) and line != "/quit":
        if line == "/new":
            turns, pictures, added = [], [], []
        if re.match(r"/\w*(\s|$)", line):  # a command, not a path
            print("    a new conversation" if line == "/new" else CHAT_HELP)
            continue
        try:  # a line that is refused changes nothing
            question, paths = find_pictures(line)
            asked = [*added, *map(assistant.load_picture, paths)]
            turn = assistant.turn(question or "?", len(asked), turns, args.max_new_tokens)
        except (ValueError, UsageError) as error:
            print(f"    not added, and nothing asked: {printable(error)}")
            continue
        if paths:
            print(f"    with {', '.join(map(printable, paths))}")
        if not question:
            added = asked
            print(f"    {len(added)} picture(s) added: ask about them")
            continue
        turns, pictures, added = [*turns, turn], [*pictures, *asked], []
        turns.append({"role": "assistant", "content": answer(assistant, args, turns, pictures)})


def evaluate(assistant: Assistant, args: argparse.Namespace, processes: Processes):
    """Prints, and writes with --json, how well the model predicts the rows of --eval_data."""
    form = assistant.model.config.image_tokens, assistant.picture_format
    with processes.main_first():
        data = VLMDataset(args.eval_data, args.images_path, assistant.tokenizer, args.max_seq_len, *form)
    collate = VLMCollator(assistant.model.config.pad_token_id)
    evaluator = Evaluator(data, assistant.model, answer_loss, collate, processes, torch.float32, args.batch_size)
    held_out = evaluator.measure()
    if held_out.loss is None:
        why = "it has none, or none of its pictures can be read"
        raise UsageError(f"no row of {args.eval_data} can be evaluated: {why}")
    exact = exact_match(evaluator, assistant.tokenizer, args.short_answer) if args.short_answer else {}
    for error in dict.fromkeys(map(str, evaluator.skipped)):
        print(f"left out, its picture cannot be read: {error}")
    if not processes.is_main:
        return
    result = held_out.as_dict() | {"perplexity": math.exp(min(held_out.loss, 700))}
    result |= {"short_answers": 0, "exact_match": None} | exact
    result |= {"data": str(args.eval_data), "bad_rows": len(data.bad_rows), "left_out": len(data) - held_out.samples}
    print(f"{held_out.samples:,} rows with {held_out.tokens:,} learned tokens, in {held_out.seconds:.0f} s")
    print(f"{held_out} (perplexity {result['perplexity']:.3f})")
    for sentence in verdict(result, assistant.loaded.weights.sidecar):
        processes.log(sentence)
    if data.bad_rows:
        print(f"left out: {len(data.bad_rows)} rows that cannot be used (python -m dataset.check says which)")
    if args.json:
        text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
        write_atomically(args.json.absolute(), lambda file: file.write(text.encode()))


def scene_table(assistant: Assistant) -> dict[str, Score]:
    """Grades a model's descriptions of the built-in set's held-out scenes: with the right images, in Chinese, first."""
    facts = [scene.facts for scene in heldout_scenes()]
    paths = sorted((draw_builtin_dataset() / "heldout_images").iterdir())
    pictures = [[assistant.load_picture(path)] for path in paths]
    rows, half = {}, len(pictures) // 2
    for name, language in zip(("Chinese", "English"), LANGUAGES, strict=True):
        question, texts = [{"role": "user", "content": with_images(language.requests[0], 1)}], []
        for start in range(0, len(pictures), SCENES_AT_ONCE):
            part = pictures[start : start + SCENES_AT_ONCE]
            inputs = prompt_batch(assistant.encoder, [question] * len(part), part)
            texts += generate_answers(assistant.model, assistant.tokenizer, inputs, 64)
        rows[f"{name}: right pictures"] = score(texts, facts)
        # Each scene gets the description of another's picture: half the set away, so that none keeps its own.
        rows[f"{name}: shuffled images"] = score(texts[half:] + texts[:half], facts)
    rows["chance: another scene's caption"], rows["chance: best single caption"] = chance(facts)
    return rows


def main():
    args = parse_arguments()
    with Processes.start(args.device) as processes:
        quiet_libraries(processes.is_main)
        if processes.world_size > 1 and not args.eval_data:
            raise UsageError("several processes share the work of --eval_data only: leave torchrun out")
        loaded = find_model(args)
        torch.manual_seed(args.seed)  # of the sampling, and of a projection that the weights lack
        assistant = Assistant(loaded, processes.device, args.dtype, args.compile, args.open_thinking)
        weights, tower, tokenizer = map(display_path, (loaded.weights.path, loaded.tower_path, loaded.tokenizer_path))
        processes.log(
            f"{weights}: {assistant.parameters / 1e6:.3f} M parameters, {loaded.config.num_hidden_layers} layers; "
            f"tower {tower}, tokenizer {tokenizer}, {processes.device}"
        )
        if loaded.knows_only_scenes and not args.eval_data:
            processes.log("These weights know only the drawn shapes of the built-in set: photos mean nothing to them.")
        elif loaded.tower_path == BUILTIN_TOWER_DIR and loaded.weights.has_projection:
            seen = "has seen drawn shapes only: trainer/train_tower.py makes one that has seen your pictures"
            processes.log(f"The tower of these weights {seen}.")
        if not loaded.weights.has_projection:
            untrained = "the projection is untrained, so it cannot see the pictures yet."
            processes.log(f"These weights are a language model's: {untrained}")
        if args.eval_data:
            evaluate(assistant, args, processes)
        elif args.chat:
            with contextlib.suppress(EOFError):
                chat(assistant, args)
        elif args.image:
            ask(assistant, args)
        else:
            describe_folder(assistant, args)


if __name__ == "__main__":
    run_script(main)
