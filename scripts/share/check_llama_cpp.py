"""Compare a trained model with its exports, run by transformers and by the real llama.cpp.

    python scripts/share/check_llama_cpp.py --weight sft_vlm   with llama-server from the PATH
    python scripts/share/check_llama_cpp.py --weight sft_vlm --server build/bin/llama-server
    python scripts/share/check_llama_cpp.py --weight sft_vlm --build DIR   builds it there first (6 minutes on 2 cores)

Exports into a temporary folder, starts llama-server on loopback, stops it, and prints a table: size; speed; token ids
of 200 texts; greedy answers to 20 prompts; the projected features of an image (largest difference, as a share of the
largest value); and, for weights of the built-in set, the 200 held-out scenes.
"""

import argparse
import base64
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from common.cli import ArgumentParser, HelpFormatter, file_path
from common.errors import UsageError, run_script
from dataset.chat import ChatEncoder
from dataset.pictures import PictureFormat, load_picture
from dataset.prompts import prompt_batch
from dataset.scenes.draw import draw_builtin_dataset, heldout_scenes
from dataset.scenes.grading import score
from dataset.scenes.language import DESCRIBE, caption, questions
from model.answers import generate
from scripts.export import write_gguf, write_pictures, write_transformers
from trainer.answering.loaded_model import LoadedModel, add_model_flags, find_model
from trainer.report.scene_table import scene_table

SOURCE = "llama-cpp-python"  # its sdist contains llama.cpp
CMAKE_FLAGS = ("CMAKE_BUILD_TYPE=Release", "BUILD_SHARED_LIBS=OFF", "LLAMA_OPENSSL=OFF", "LLAMA_USE_PREBUILT_UI=OFF")
CMAKE_FLAGS += tuple(f"LLAMA_BUILD_{part}=OFF" for part in ("TESTS", "EXAMPLES", "APP", "UI"))
SENTENCES = (
    "What is in the picture?",
    "图中有什么？",
    "Hello, world!  Two  blanks",
    "你好，世界",
    "a@b.c @@ 3.14",
    "\n\n x\t",
)
TEXTS, PROMPTS, TOKENS, ROUNDS = 200, 20, 32, 5
CORRECTED = "inp = ggml_concat(ctx0, model.class_embedding, inp, 1);"  # the class token in front
AS_PUBLISHED = "inp = ggml_concat(ctx0, inp, model.class_embedding, 1);"


def build(folder: Path, class_token: str) -> Path:
    """Builds llama-server from the sources in the sdist if it is missing; returns its path.

    Args:
        class_token: "last": as published; "first": with the line corrected that puts the class token last.
    """
    target = folder / f"build-{class_token}"
    server = target / "bin" / "llama-server"
    if not server.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        if not list(folder.glob("*.tar.gz")):
            fetch = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", SOURCE, "-d", folder, SOURCE]
            subprocess.run(fetch, check=True)
        with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
        source, cores = next(folder.glob("*/vendor/llama.cpp")), str(os.cpu_count())
        if class_token == "first":
            file = source / "tools" / "mtmd" / "models" / "llava.cpp"
            content = file.read_text(encoding="utf-8")
            if AS_PUBLISHED not in content:
                raise UsageError(f"{file} no longer has the line to correct, {AS_PUBLISHED!r}")
            file.write_text(content.replace(AS_PUBLISHED, CORRECTED), encoding="utf-8")
        subprocess.run(["cmake", "-S", source, "-B", target, *(f"-D{flag}" for flag in CMAKE_FLAGS)], check=True)
        subprocess.run(["cmake", "--build", target, "--target", "llama-server", "-j", cores], check=True)
    return server


def find_server(args: argparse.Namespace) -> Path:
    """Returns llama-server's path; raises UsageError if there is none."""
    if args.build:
        return build(args.build.absolute(), args.class_token)
    found = args.server or shutil.which("llama-server")
    if found is None or not Path(found).is_file():
        raise UsageError("no llama-server: name it with --server, or build one with --build DIR")
    return Path(found).resolve()


class Server:
    """A llama-server on loopback; ends with its `with` block."""

    def __init__(self, program: Path, folder: Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        [text] = (path for path in folder.glob("*.gguf") if not path.name.startswith("mmproj-"))
        mmproj = [word for path in folder.glob("mmproj-*.gguf") for word in ("--mmproj", path)]
        command = [program, "-m", text, *mmproj, "--host", "127.0.0.1", "--port", self.port, "-c", 2048, "-np", 1]
        self.log, self.features = folder / "server.log", folder / "features"
        environment = os.environ | {"MTMD_DEBUG_EMBEDDINGS": str(self.features)}  # where it writes an image's features
        with open(self.log, "wb") as log:
            run = {"stdout": log, "stderr": subprocess.STDOUT, "env": environment}
            self.process = subprocess.Popen(list(map(str, command)), **run)

    def __enter__(self) -> "Server":
        for _ in range(300):
            with contextlib.suppress(OSError):
                if self.ask("/health")["status"] == "ok":
                    return self
            if self.process.poll() is not None:
                break
            time.sleep(0.2)
        self.__exit__()
        raise UsageError(f"llama-server does not start:\n{self.log.read_text(errors='replace')[-1500:]}")

    def __exit__(self, *exception):
        self.process.terminate()
        self.process.wait(30)

    def ask(self, path: str, content: dict | None = None) -> dict:
        """Sends a request (a POST where there is content); returns the JSON that comes back."""
        data = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def describe(self, image: Path, prompt: str) -> str:
        """Returns the greedy answer to a prompt with an image after it."""
        picture = {"url": f"data:image/{image.suffix[1:]};base64,{base64.b64encode(image.read_bytes()).decode()}"}
        parts = [{"type": "text", "text": f"{prompt}\n"}, {"type": "image_url", "image_url": picture}]
        asked = {"messages": [{"role": "user", "content": parts}], "temperature": 0, "max_tokens": 64}
        return self.ask("/v1/chat/completions", asked)["choices"][0]["message"]["content"]


def same_tokens(server: Server, trained: LoadedModel, texts: list[str]) -> int:
    """Returns how many texts get the same token ids as here."""
    backend, right = trained.tokenizer.backend_tokenizer, 0
    for text in texts:
        asked = {"content": text, "add_special": False, "parse_special": False}
        ours = backend.encode(text, add_special_tokens=False).ids
        right += server.ask("/tokenize", asked)["tokens"] == ours
    return right


@torch.inference_mode()
def same_answers(server: Server, trained: LoadedModel, model, prompts: list[str]) -> int:
    """Returns how many prompts without an image get the same greedy token ids as here."""
    ends, right = (trained.config.eos_token_id, trained.config.pad_token_id), 0
    for prompt in prompts:
        inputs = encode(trained, prompt)
        [ours] = generate(model, inputs, TOKENS).tolist()
        theirs = complete(server, inputs)
        right += [i for i in ours if i not in ends] == [i for i in theirs if i not in ends]
    return right


def encode(trained: LoadedModel, prompt: str) -> dict:
    encoder = ChatEncoder(trained.tokenizer, trained.config.image_tokens)
    return prompt_batch(encoder, [[{"role": "user", "content": prompt}]], [[]])


def complete(server: Server, inputs: dict, **settings) -> list[int]:
    """Returns the greedy token ids after a prompt."""
    asked = {"prompt": inputs["input_ids"][0].tolist(), "temperature": 0, "n_predict": TOKENS, "return_tokens": True}
    return server.ask("/completion", asked | settings)["tokens"]


def tokens_per_second(answers: list) -> list[float]:
    """Returns the median speed of functions that generate TOKENS tokens after a short prompt, timed in turn."""
    seconds = [[] for _ in answers]
    for _ in range(1 + ROUNDS):
        for answer, times in zip(answers, seconds, strict=True):
            start = time.perf_counter()
            answer()
            times.append(time.perf_counter() - start)
    return [TOKENS / statistics.median(times[1:]) for times in seconds]


@torch.inference_mode()
def feature_difference(server: Server, trained: LoadedModel, model, folder: Path, class_token: str) -> float:
    """Returns how far the projected patches of an image are from ours: largest difference by largest value."""
    [source, *_] = sorted((draw_builtin_dataset() / "heldout_images").iterdir())
    [picture] = write_pictures(trained, [source], folder)
    server.describe(picture, DESCRIBE)
    theirs = np.fromfile(server.features, dtype=np.float32, offset=8)  # after the number of tokens and the width
    pixels = load_picture(source, picture_format=PictureFormat(**trained.tower.picture_settings))
    ours = model.vision_proj(model.encode_images(pixels[None]))[0].numpy()
    theirs = theirs.reshape(ours.shape)
    if class_token == "last":  # then the first patch is lost, and the class token comes last
        theirs, ours = theirs[:-1], ours[1:]
    return float(np.abs(theirs - ours).max() / np.abs(ours).max())


def megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.iterdir()) / 1e6


def compare(program: Path, trained: LoadedModel, class_token: str, temporary: Path) -> dict[str, dict[str, str]]:
    """Returns, for each column of the table, its cells by the name of their row."""
    sees_images, model = trained.weights.has_projection, trained.load_model()
    grades = trained.knows_only_scenes and sees_images
    for name in ("hf", "f16", "q8_0"):
        (temporary / name).mkdir()
    write_transformers(trained, temporary / "hf")
    kind = AutoModelForImageTextToText if sees_images else AutoModelForCausalLM
    theirs = kind.from_pretrained(temporary / "hf")
    table = {"ours": {"MB": f"{trained.weights.path.stat().st_size / 1e6:.1f} *"}}
    table["transformers"] = {"MB": f"{megabytes(temporary / 'hf'):.1f}"}
    texts, prompts = texts_to_compare()
    inputs, exact = encode(trained, prompts[0]), {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    answers = [lambda: generate(model, inputs, **exact), lambda: theirs.generate(**prompt, **exact, do_sample=False)]
    with contextlib.ExitStack() as servers:
        for quant in ("f16", "q8_0"):
            write_gguf(trained, temporary / quant, "model", quant, class_token)
            server = servers.enter_context(Server(program, temporary / quant))
            answers.append(partial(complete, server, inputs, ignore_eos=True, cache_prompt=False))
            table[quant] = {
                "MB": f"{megabytes(temporary / quant):.1f}",
                "same token ids": f"{same_tokens(server, trained, texts)} of {len(texts)}",
                "same answers": f"{same_answers(server, trained, model, prompts)} of {len(prompts)}",
            }
            if sees_images:
                table[quant]["features"] = f"{feature_difference(server, trained, model, temporary, class_token):.1e}"
            if grades:
                images = sorted((draw_builtin_dataset() / "heldout_images").iterdir())
                graded = score(
                    [server.describe(image, DESCRIBE) for image in images], [scene.facts for scene in heldout_scenes()]
                )
                table[quant] |= shares(graded.attributes, graded.captions)
        for column, speed in zip(table.values(), tokens_per_second(answers), strict=True):
            column["tokens/s"] = f"{speed:.0f}"
    if grades:
        [graded, *_] = scene_table(model, trained.tokenizer)
        table["ours"] |= shares(graded["attributes"], graded["captions"])
    return table


def shares(attributes: float, captions: float) -> dict[str, str]:
    return {"attributes": f"{attributes:.1%}", "whole captions": f"{captions:.1%}"}


def texts_to_compare() -> tuple[list[str], list[str]]:
    """Returns texts to tokenise and prompts to answer, Chinese and English, the same every time."""
    asked = [question for scene in heldout_scenes()[:40] for question, _ in questions(scene.facts, Random(0))]
    captions = [caption(scene.facts) for scene in heldout_scenes()]
    texts = [*SENTENCES, *captions, *asked]
    return texts[:TEXTS], [*SENTENCES[:5], *dict.fromkeys(asked)][:PROMPTS]


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_model_flags(parser)
    add = parser.add_argument_group("llama.cpp").add_argument
    add("--server", type=file_path, help="llama-server's path (default: from the PATH)")
    add("--build", type=file_path, help="fetch and build it in this folder if it is missing")
    add("--class_token", choices=("last", "first"), default="last", help="as for scripts/export.py")
    return parser.parse_args(argv)


def main():
    args = parse_arguments()
    program, trained = find_server(args), find_model(args)
    with tempfile.TemporaryDirectory() as temporary:
        table = compare(program, trained, args.class_token, Path(temporary))
    print(f"{'':<15}{'this repository':>16}{'transformers':>14}{'llama.cpp f16':>16}{'llama.cpp q8_0':>16}")
    for row in ("MB", "tokens/s", "same token ids", "same answers", "features", "attributes", "whole captions"):
        cells = [column.get(row, "-") for column in table.values()]
        print("{:<15}{:>16}{:>14}{:>16}{:>16}".format(row, *cells))
    print("* without the tower")


if __name__ == "__main__":
    run_script(main)
