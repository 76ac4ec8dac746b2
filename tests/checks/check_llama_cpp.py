"""Compare a trained model with its exports, run by transformers and by the real llama.cpp.

    python tests/checks/check_llama_cpp.py --weight sft_vlm   with llama-server from the PATH
    python tests/checks/check_llama_cpp.py --weight sft_vlm --server build/bin/llama-server

Exports to a temporary folder, starts llama-server on loopback, and prints a table: size; speed; token ids of 200 texts;
greedy answers to 20 prompts; the projected features of an image (largest difference, as a share of the largest value);
and, for weights of the built-in set, the 200 held-out scenes.
"""

import argparse
import base64
import contextlib
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import requests
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from common.cli import ArgumentParser, file_path
from common.errors import UsageError, run_script
from dataset.chat import ChatEncoder
from dataset.pictures import PictureFormat, load_picture
from dataset.prompts import prompt_batch
from dataset.scenes.draw import draw, draw_builtin_dataset, heldout_scenes
from dataset.scenes.grading import score
from dataset.scenes.language import DESCRIBE, caption, questions
from eval_vlm import scene_table
from model.answers import generate
from scripts.export import check_exportable, write_gguf, write_pictures, write_transformers
from trainer.answering.assistant import Assistant, LoadedModel, add_model_flags, find_model

SENTENCES = (
    "What is in the picture?",
    "图中有什么？",
    "Hello, world!  Two  blanks",
    "你好，世界",
    "a@b.c @@ 3.14",
    "\n\n x\t",
)
TEXTS, PROMPTS, TOKENS, ROUNDS = 200, 20, 32, 5
Ask = Callable[[str, dict], dict]  # POSTs JSON to a path of llama-server and returns the JSON of the answer


@contextlib.contextmanager
def serve(program: Path, folder: Path, names: list[str]) -> Iterator[Ask]:
    """Runs llama-server on loopback with the text model and mmproj of these names; yields what asks it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    text, *mmproj = (folder / name for name in names)
    command = [program, "-m", text, "--host", "127.0.0.1", "--port", port, "-c", "2048", "-np", "1"]
    command += ["--mmproj", *mmproj] if mmproj else []
    # It writes an image's features to the file that this variable names.
    environment, log = os.environ | {"MTMD_DEBUG_EMBEDDINGS": str(folder / "features")}, folder / "server.log"
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        url, started = f"http://127.0.0.1:{port}", time.monotonic()
        while not is_ready(f"{url}/health"):
            if process.poll() is not None or time.monotonic() > started + 60:
                raise UsageError(f"llama-server does not start:\n{log.read_text(errors='replace')[-1500:]}")
            time.sleep(0.2)
        yield lambda path, content: requests.post(f"{url}{path}", json=content, timeout=120).json()
    finally:
        process.terminate()
        process.wait(30)


def is_ready(url: str) -> bool:
    try:
        return requests.get(url, timeout=10).ok
    except requests.ConnectionError:
        return False


def describe(ask: Ask, image: Path) -> str:
    """Returns the greedy description of an image."""
    picture = {"url": f"data:image/{image.suffix[1:]};base64,{base64.b64encode(image.read_bytes()).decode()}"}
    parts = [{"type": "text", "text": f"{DESCRIBE}\n"}, {"type": "image_url", "image_url": picture}]
    content = {"messages": [{"role": "user", "content": parts}], "temperature": 0, "max_tokens": 64}
    return ask("/v1/chat/completions", content)["choices"][0]["message"]["content"]


def complete(ask: Ask, inputs: dict, **settings) -> list[int]:
    """Returns the greedy token ids after a prompt."""
    content = {"prompt": inputs["input_ids"][0].tolist(), "temperature": 0, "n_predict": TOKENS, "return_tokens": True}
    return ask("/completion", content | settings)["tokens"]


def same_tokens(ask: Ask, trained: LoadedModel, texts: list[str]) -> str:
    """Counts the texts that get the same token ids as here."""
    encode = partial(trained.tokenizer.backend_tokenizer.encode, add_special_tokens=False)
    asked = [{"content": text, "add_special": False, "parse_special": False} for text in texts]
    same = [ask("/tokenize", it)["tokens"] == encode(text).ids for it, text in zip(asked, texts, strict=True)]
    return f"{sum(same)} of {len(texts)}"


def same_answers(ask: Ask, trained: LoadedModel, model, prompts: list[dict]) -> str:
    """Counts the prompts without an image that get the same greedy token ids as here."""
    ends, same = (trained.config.eos_token_id, trained.config.pad_token_id), 0
    for inputs in prompts:
        ours, theirs = generate(model, inputs, TOKENS)[0].tolist(), complete(ask, inputs)
        same += [i for i in ours if i not in ends] == [i for i in theirs if i not in ends]
    return f"{same} of {len(prompts)}"


@torch.inference_mode()
def feature_difference(ask: Ask, trained: LoadedModel, model, folder: Path) -> str:
    """Returns how far the projected patches of an image are from ours: largest difference by largest value."""
    source = folder / "scene.png"
    draw(heldout_scenes()[0]).save(source)
    describe(ask, *write_pictures(trained, [source], folder))
    theirs = np.fromfile(folder / "features", dtype=np.float32, offset=8)  # after the number of tokens and the width
    pixels = load_picture(source, picture_format=PictureFormat(**trained.tower.picture_settings))
    ours = model.vision_proj(model.encode_images(pixels[None]))[0].numpy()
    theirs = theirs.reshape(ours.shape)
    if trained.tower.kind == "CLIP":  # the first patch is lost, the class token comes last
        theirs, ours = theirs[:-1], ours[1:]
    return f"{np.abs(theirs - ours).max() / np.abs(ours).max():.1e}"


def tokens_per_second(answer: Callable[[], object]) -> str:
    """Returns the median speed of a function that generates TOKENS tokens after a short prompt."""
    seconds = []
    for _ in range(1 + ROUNDS):
        start = time.perf_counter()
        answer()
        seconds.append(time.perf_counter() - start)
    return f"{TOKENS / statistics.median(seconds[1:]):.0f}"


def compare(program: Path, trained: LoadedModel, temporary: Path) -> dict[str, dict[str, str]]:
    """Returns, for each column of the table, its cells by the name of their row."""
    assistant, sees_images, scenes = Assistant(trained, "cpu"), trained.weights.has_projection, heldout_scenes()
    model = assistant.model
    grades = trained.knows_only_scenes and sees_images
    asked = [question for scene in scenes[:40] for question, _ in questions(scene.facts, Random(0))]
    texts = [*SENTENCES, *(caption(scene.facts) for scene in scenes)][:TEXTS]
    encoder = ChatEncoder(trained.tokenizer, trained.config.image_tokens)
    prompts = [*SENTENCES[:5], *dict.fromkeys(asked)][:PROMPTS]
    prompts = [prompt_batch(encoder, [[{"role": "user", "content": prompt}]], [[]]) for prompt in prompts]
    folders = {name: temporary / name for name in ("hf", "f16", "q8_0")}
    for folder in folders.values():
        folder.mkdir()

    write_transformers(trained, folders["hf"])
    theirs = (AutoModelForImageTextToText if sees_images else AutoModelForCausalLM).from_pretrained(folders["hf"])
    exact = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
    inputs = {name: prompts[0][name] for name in ("input_ids", "attention_mask")}
    ours = {"MB": f"{megabytes(trained.weights.path)} *"}
    ours["tokens/s"] = tokens_per_second(lambda: generate(model, prompts[0], **exact))
    if grades:
        [graded, *_] = scene_table(assistant).values()
        ours |= {part: f"{share:.1%}" for part, share in graded._asdict().items()}
    table = {"this repository": ours, "transformers": {"MB": megabytes(*folders["hf"].iterdir())}}
    table["transformers"]["tokens/s"] = tokens_per_second(lambda: theirs.generate(**inputs, **exact, do_sample=False))
    for quant in ("f16", "q8_0"):
        names = write_gguf(trained, folders[quant], "model", quant)
        cells = table[f"llama.cpp {quant}"] = {"MB": megabytes(*folders[quant].iterdir())}
        with serve(program, folders[quant], names) as ask:
            timed = partial(complete, ask, inputs, ignore_eos=True, cache_prompt=False)
            cells["tokens/s"] = tokens_per_second(timed)
            cells["same token ids"] = same_tokens(ask, trained, texts)
            cells["same answers"] = same_answers(ask, trained, model, prompts)
            if sees_images:
                cells["features"] = feature_difference(ask, trained, model, folders[quant])
            if grades:
                images = sorted((draw_builtin_dataset() / "heldout_images").iterdir())
                graded = score([describe(ask, image) for image in images], [scene.facts for scene in scenes])
                cells |= {part: f"{getattr(graded, part):.1%}" for part in ("attributes", "captions")}
    return table


def megabytes(*paths: Path) -> str:
    return f"{sum(path.stat().st_size for path in paths) / 1e6:.1f}"


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    add_model_flags(parser)
    add = parser.add_argument_group("llama.cpp").add_argument
    add("--server", type=file_path, help="llama-server's path (default: from the PATH)")
    return parser.parse_args(argv)


def main():
    args = parse_arguments()
    program = args.server or shutil.which("llama-server")
    if program is None or not Path(program).is_file():
        raise UsageError("no llama-server: name it with --server")
    trained = find_model(args)
    check_exportable(trained, "gguf")
    with tempfile.TemporaryDirectory() as temporary:
        table = compare(Path(program).resolve(), trained, Path(temporary))
    rows = dict.fromkeys(row for cells in table.values() for row in cells)
    print(f"{'':<15}" + "".join(f"{name:>16}" for name in table))
    for row in rows:
        print(f"{row:<15}" + "".join(f"{cells.get(row, '-'):>16}" for cells in table.values()))
    print("* without the tower")


if __name__ == "__main__":
    run_script(main)
