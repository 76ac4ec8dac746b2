"""Compare an exported GGUF folder, run by the real llama.cpp, with the weights that it was made of.

    python scripts/check_llama_cpp.py --weight sft_vlm                      with llama-server from the PATH
    python scripts/check_llama_cpp.py --weight sft_vlm --server build/bin/llama-server
    python scripts/check_llama_cpp.py --weight sft_vlm --build DIR          builds it there first (6 minutes on 2 cores)

Exports f16 and q8_0 into a temporary folder, starts llama-server on loopback, stops it, and prints a table: the token
ids of 200 texts, the greedy answers to 20 prompts and, for weights of the built-in set, the 200 held-out scenes.
"""

import argparse
import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from common.cli import ArgumentParser, HelpFormatter, file_path  # noqa: E402
from common.errors import UsageError, run_script  # noqa: E402
from dataset.chat import ChatEncoder  # noqa: E402
from dataset.prompts import prompt_batch  # noqa: E402
from dataset.scenes.draw import draw_builtin_dataset, heldout_scenes  # noqa: E402
from dataset.scenes.grading import score  # noqa: E402
from dataset.scenes.language import DESCRIBE, caption, questions  # noqa: E402
from scripts.export import write_gguf  # noqa: E402
from trainer.support.trained import Trained, add_model_flags, find_trained  # noqa: E402
from trainer.watch.answers import generate  # noqa: E402
from trainer.watch.scene_table import scene_table  # noqa: E402

SOURCE = "llama-cpp-python"  # whose sdist holds llama.cpp
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
TEXTS, PROMPTS, TOKENS = 200, 20, 32


def build(folder: Path) -> Path:
    """Builds llama-server from the sources in the sdist; returns its path, at once where it is there already."""
    server = next(folder.glob("*/vendor/llama.cpp/build/bin/llama-server"), None)
    if server is None:
        folder.mkdir(parents=True, exist_ok=True)
        fetch = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", SOURCE, "-d", folder, SOURCE]
        subprocess.run(fetch, check=True)
        with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
        source, cores = next(folder.glob("*/vendor/llama.cpp")), str(os.cpu_count())
        target = source / "build"
        subprocess.run(["cmake", "-S", source, "-B", target, *(f"-D{flag}" for flag in CMAKE_FLAGS)], check=True)
        subprocess.run(["cmake", "--build", target, "--target", "llama-server", "-j", cores], check=True)
        server = target / "bin" / "llama-server"
    return server


def find_server(args: argparse.Namespace) -> Path:
    """Returns llama-server's path; raises UsageError if there is none."""
    if args.build:
        return build(args.build)
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
        self.log = folder / "server.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=subprocess.STDOUT)

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
        picture = {"url": f"data:image/jpeg;base64,{base64.b64encode(image.read_bytes()).decode()}"}
        parts = [{"type": "text", "text": f"{prompt}\n"}, {"type": "image_url", "image_url": picture}]
        asked = {"messages": [{"role": "user", "content": parts}], "temperature": 0, "max_tokens": 64}
        return self.ask("/v1/chat/completions", asked)["choices"][0]["message"]["content"]


def same_tokens(server: Server, trained: Trained, texts: list[str]) -> int:
    """Returns how many texts get our token ids."""
    backend, right = trained.tokenizer.backend_tokenizer, 0
    for text in texts:
        asked = {"content": text, "add_special": False, "parse_special": False}
        ours = backend.encode(text, add_special_tokens=False).ids
        right += server.ask("/tokenize", asked)["tokens"] == ours
    return right


@torch.inference_mode()
def same_answers(server: Server, trained: Trained, model, prompts: list[str]) -> int:
    """Returns how many prompts without an image get our greedy token ids."""
    encoder, right = ChatEncoder(trained.tokenizer, trained.config.image_tokens), 0
    for prompt in prompts:
        inputs = prompt_batch(encoder, [[{"role": "user", "content": prompt}]], [[]])
        [ours] = generate(model, inputs, TOKENS).tolist()
        asked = {
            "prompt": inputs["input_ids"][0].tolist(),
            "temperature": 0,
            "n_predict": TOKENS,
            "return_tokens": True,
        }
        theirs = server.ask("/completion", asked)["tokens"]
        ends = trained.config.eos_token_id, trained.config.pad_token_id
        right += [i for i in ours if i not in ends] == [i for i in theirs if i not in ends]
    return right


def texts_to_compare() -> tuple[list[str], list[str]]:
    """Returns texts to tokenise and prompts to answer, Chinese and English, the same every time."""
    asked = [question for scene in heldout_scenes()[:40] for question, _ in questions(scene.facts, Random(0))]
    captions = [caption(scene.facts) for scene in heldout_scenes()]
    texts = [*SENTENCES, *captions, *asked]
    return texts[:TEXTS], [*SENTENCES[:5], *dict.fromkeys(asked)][:PROMPTS]


def main():
    parser = ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_model_flags(parser)
    add = parser.add_argument_group("llama.cpp").add_argument
    add("--server", type=file_path, help="llama-server's path (default: from the PATH)")
    add("--build", type=file_path, help="fetch and build it in this folder, unless it is there")
    add("--class_token", choices=("last", "first"), default="last", help="as for scripts/export.py")
    args = parser.parse_args()
    program, trained = find_server(args), find_trained(args)
    model = trained.load_model()
    texts, prompts = texts_to_compare()
    rows = []
    if trained.knows_only_scenes and trained.weights.has_projection:
        [of_ours, *_] = scene_table(model, trained.tokenizer)
        rows.append(("this repository, float32", "-", "-", of_ours["attributes"], of_ours["captions"]))
    with tempfile.TemporaryDirectory() as temporary:
        for quant in ("f16", "q8_0"):
            folder = Path(temporary) / quant
            write_gguf(trained, folder, "model", quant, args.class_token)
            with Server(program, folder) as server:
                tokens, answers = same_tokens(server, trained, texts), same_answers(server, trained, model, prompts)
                row = (f"llama.cpp, {quant}", f"{tokens} of {len(texts)}", f"{answers} of {len(prompts)}")
                if trained.knows_only_scenes and trained.weights.has_projection:
                    images = sorted((draw_builtin_dataset() / "heldout_images").iterdir())
                    graded = score([server.describe(image, DESCRIBE) for image in images], heldout_facts())
                    row += (graded.attributes, graded.captions)
                rows.append(row)
    print(f"{'':<26}{'same token ids':>15}{'same answers':>14}{'attributes':>11}{'captions':>11}")
    for name, tokens, answers, *shares in rows:
        shares = "".join(f"{share:>11.1%}" for share in shares)
        print(f"{name:<26}{tokens:>15}{answers:>14}{shares}")


def heldout_facts() -> list:
    return [scene.facts for scene in heldout_scenes()]


if __name__ == "__main__":
    run_script(main)
