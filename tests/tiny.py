"""A tiny world for the tests of the scripts (tower, language model, images, rows) and ways to run a script in it.

`World.start` runs a script as its user types it: 5 seconds of imports. `World.run` runs it in a process forked from one
that has done the imports: the same arguments, folder, output and exit status in a second.

PYTEST_DONT_REWRITE (the tests import this file before pytest takes its fixture from it)
"""

import atexit
import contextlib
import dataclasses
import fcntl
import functools
import gc
import io
import json
import os
import pty
import random
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "model" / "tokenizer"
PRETRAIN, SFT, EVAL = ROOT / "trainer/train_pretrain_vlm.py", ROOT / "trainer/train_sft_vlm.py", ROOT / "eval_vlm.py"
SECONDS = 240  # the timeout of a script
PICTURES = 12
PRETRAIN_ROWS, SFT_ROWS = 26, 25  # not multiples of the batch sizes in use: an epoch's last step is smaller


@dataclasses.dataclass(frozen=True)
class Result:
    """How a script ended and what it printed (in a terminal, `out` has it all)."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err

    def passed(self) -> "Result":
        assert self.code == 0, f"exit status {self.code}\n{self.text}"
        return self

    def refused(self, *parts: str) -> str:
        """Returns the one error message, which must contain `parts`; checks for status 1 and no traceback."""
        assert self.code == 1, f"exit status {self.code}\n{self.text}"
        assert "Traceback" not in self.text, self.text
        assert self.err.count("error: ") == 1, self.text
        message = self.err[self.err.index("error: ") :]
        for part in parts:
            assert part in message, f"{part!r} is not in: {message}"
        return message


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class World:
    """A folder with tower/, images/, pretrain.jsonl, sft.jsonl, out/llm_32.pth (without a sidecar, as published)."""

    def __init__(self, root: Path):
        self.root = root
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")} | {
            "HF_DATASETS_CACHE": str(root / "cache"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONUTF8": "1",
        }
        self.tower, self.tokenizer, self.images, self.out = root / "tower", TOKENIZER, root / "images", root / "out"
        command = [sys.executable, "-W", "ignore", __file__]
        self.launcher = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self.environment, cwd=root, text=True
        )
        self.runs = 0
        self._build()  # while the launcher imports

    def close(self):
        self.launcher.communicate(timeout=SECONDS)

    def files(self, stage: str, out: Path, cwd: Path | None = None) -> list[str]:
        """Returns the flags that name this world's files, relative to `cwd` if it is given."""
        paths = {
            "--data_path": self.root / f"{stage}.jsonl",
            "--images_path": self.images,
            "--tokenizer_path": TOKENIZER,
            "--vision_model_path": self.tower,
            "--save_dir": out,
        }
        flags = [[flag, os.path.relpath(path, cwd) if cwd else str(path)] for flag, path in paths.items()]
        # Nothing is held out unless a later --eval_data asks for it.
        return [*(word for pair in flags for word in pair), *"--num_workers 0 --device cpu --eval_data none".split()]

    def eval_files(self, out: Path) -> list[str]:
        paths = {"--save_dir": out, "--tokenizer_path": TOKENIZER, "--vision_model_path": self.tower}
        return [*(str(word) for pair in paths.items() for word in pair), "--device", "cpu", "--max_new_tokens", "4"]

    def copy_of_out(self, folder: Path) -> Path:
        """Makes a --save_dir with only the language model."""
        folder.mkdir(parents=True)
        shutil.copy(self.out / "llm_32.pth", folder)
        return folder

    def run(
        self, script: Path, *arguments, cwd=None, env=None, ranks: int = 1, hook="", terminal=False, typed=b""
    ) -> Result:
        """Runs a script in forked processes, `ranks` of them as torchrun would; returns rank 0's errors, all output.

        Args:
            hook: Python to execute before the script.
            terminal: Whether it writes to a terminal.
            typed: Its standard input.
        """
        self.runs += 1
        (self.root / f"run_{self.runs}.in").write_bytes(typed)
        port, jobs = str(free_port()), []
        with contextlib.ExitStack() as stack:
            reader = stack.enter_context(Terminal()) if terminal else None
            for rank in range(ranks):
                of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                of_rank |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                jobs.append(
                    {
                        "argv": [str(script), *map(str, arguments)],
                        "cwd": str(cwd or self.root),
                        "env": (env or {}) | (of_rank if ranks > 1 else {}),
                        "hook": hook,
                        "input": str(self.root / f"run_{self.runs}.in"),
                        "files": [str(self.root / f"run_{self.runs}_{rank}.{name}") for name in ("out", "err")],
                        "terminal": reader.name if reader else None,
                    }
                )
            self.launcher.stdin.write(json.dumps(jobs) + "\n")
            self.launcher.stdin.flush()
            shown = reader.read() if reader else None
            codes = json.loads(self.launcher.stdout.readline())
        if terminal:
            return Result(codes[0], shown, "")
        out = "".join(Path(job["files"][0]).read_text(encoding="utf-8") for job in jobs)
        err = Path(jobs[0]["files"][1]).read_text(encoding="utf-8")
        assert len(set(codes)) == 1, f"the ranks ended differently: {codes}\n{out}{err}"
        return Result(codes[0], out, err)

    def start(self, *command, cwd: Path, env: dict | None = None) -> Result:
        """Runs `python *command` as it is typed."""
        done = subprocess.run(
            [sys.executable, "-W", "ignore", *map(str, command)],
            cwd=cwd,
            env=self.environment | (env or {}),
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=SECONDS,
        )
        return Result(done.returncode, done.stdout, done.stderr)

    def _build(self):
        from transformers import CLIPVisionConfig, CLIPVisionModel

        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        torch.manual_seed(0)
        tower = CLIPVisionModel(CLIPVisionConfig(**shape, patch_size=16, image_size=224))
        tower.save_pretrained(self.tower)
        draw_pictures(self.images)
        write_jsonl(self.root / "pretrain.jsonl", [pretrain_row(number) for number in range(PRETRAIN_ROWS)])
        write_jsonl(self.root / "sft.jsonl", [sft_row(number) for number in range(SFT_ROWS)])
        self.out.mkdir()
        torch.save(language_model(), self.out / "llm_32.pth")


class Terminal:
    """A pseudo-terminal for a process to write to; `name` is its device."""

    def __enter__(self):
        self.ours, self.theirs = pty.openpty()
        self.name = os.ttyname(self.theirs)
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))  # lines, columns, pixels
        return self

    def __exit__(self, *exception):
        os.close(self.ours)

    def read(self) -> str:
        """Returns all that is written until no process has it open."""
        read, parts = True, []
        # The process opens it by name; our own end keeps it open until then.
        while read:
            try:
                read = os.read(self.ours, 65536)
            except OSError:  # on Linux: the other end was closed
                break
            parts.append(read)
            if self.theirs is not None:
                os.close(self.theirs)
                self.theirs = None
        return b"".join(parts).decode("utf-8", errors="replace")


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def draw_pictures(folder: Path) -> Path:
    from PIL import Image

    folder.mkdir(parents=True)
    rng = random.Random(0)
    for number in range(PICTURES):
        noise = Image.frombytes("RGB", (4, 3), rng.randbytes(36))
        noise.resize((64, 48), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
    return folder


def as_file(image, kind: str, **options) -> bytes:
    """Encodes a Pillow image."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    """Writes a PNG of any bit depth (Pillow writes few); colour 0 is grey, 2 is RGB; each row begins with a zero."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def pretrain_row(number: int) -> dict:
    answer = "红色的圆形，" * (1 + number % 4) + f"第{number}张。"
    asked = turn("user", "描述这张图片\n<image>")
    return {"conversations": [asked, turn("assistant", answer)], "image": f"{number % PICTURES}.jpg"}


def sft_row(number: int) -> dict:
    """Returns a row of one or two turns with zero (every fifth), one or two images; lengths vary a lot."""
    pictures = (0, 2, 1, 1, 1)[number % 5]
    names = ", ".join(f"{(number + offset) % PICTURES}.jpg" for offset in range(pictures))
    tags = "<image>" * pictures if number % 2 else "\n<image>" * pictures
    turns = [turn("user", f"图中有什么？{tags}"), turn("assistant", "蓝色的方形" * (1 + number * 7 % 11) + "。")]
    if number % 3 == 0:
        turns += [turn("user", "在哪里？" * (1 + number % 7)), turn("assistant", "在左边。" * (1 + number % 13))]
    return {"conversations": turns} | ({"image": names} if pictures else {})


def language_model(steps: int = 20, **shape) -> dict:
    """Trains a decoder on the rows' answers: 20 steps bring its loss well below that of guessing."""
    from transformers import AutoTokenizer

    from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    rows = [sft_row(number) for number in range(10)] + [pretrain_row(number) for number in range(10)]
    texts = [spoken["content"] + "<|im_end|>\n" for row in rows for spoken in row["conversations"][1::2]]
    ids = tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")["input_ids"]
    labels = ids.masked_fill(ids == tokenizer.pad_token_id, -100)
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(**{"hidden_size": 32, "num_hidden_layers": 2} | shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    return {name: tensor.half() for name, tensor in model.state_dict().items()}


def serve():
    """Forks a process per job for each line of jobs (JSON) on standard input; prints their exit statuses."""
    for module in ("trainer.loop", "dataset.scenes.draw", "transformers", "pyarrow.parquet"):
        __import__(module)
    sys.modules["trainer.report.watcher"].LONGEST = 8  # tokens: short descriptions halve the time of most runs
    load_once()
    gc.freeze()  # a garbage collection in a forked process would copy every imported page
    for line in sys.stdin:
        processes = []
        for job in json.loads(line):
            process = os.fork()
            if process == 0:
                signal.alarm(SECONDS)
                code = run_job(job)
                atexit._run_exitfuncs()
                if sys.stdout:  # a run that lost it sets None
                    sys.stdout.flush()
                os._exit(code)  # skips the half second of tearing modules down
            processes.append(process)
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        print(json.dumps(codes), flush=True)


def load_once():
    """Keeps for all runs what each would compute again: compiled page templates and the versions of packages."""
    jinja2, weights = sys.modules["jinja2"], sys.modules["model.weights"]
    Path("templates").mkdir()
    templates = jinja2.FileSystemBytecodeCache(str(Path("templates").resolve()))
    jinja2.Environment.__init__ = functools.partialmethod(jinja2.Environment.__init__, bytecode_cache=templates)
    weights.version = functools.cache(weights.version)
    for name in weights.PACKAGES:
        weights.version(name)


def run_job(job: dict) -> int:
    """Runs the job's script in this process as its command would; returns the exit status."""
    os.chdir(job["cwd"])
    os.environ.update(job["env"])
    if job["terminal"]:
        os.setsid()
        targets = [os.open(job["terminal"], os.O_RDWR)] * 2
    else:
        targets = [os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for name in job["files"]]
    for source, target in zip([os.open(job["input"], os.O_RDONLY), *targets], range(3), strict=True):
        os.dup2(source, target)
    for source in set(targets):
        os.close(source)
    sys.stdin, sys.stdout, sys.stderr = open(0, errors="surrogateescape"), open(1, "w"), open(2, "w", buffering=1)
    sys.argv, script = job["argv"], job["argv"][0]
    sys.path.insert(0, str(Path(script).parent))
    exec(job["hook"], {})
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ending:
        if isinstance(ending.code, str):
            print(ending.code, file=sys.stderr)
            return 1
        return ending.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

import pytest
import torch

from trainer.support import processes

torch.set_num_threads(1)
processes.cpu_has_bfloat16 = lambda: False  # what the tests compare bit by bit must not depend on the processor


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    """Built once per session; a test writes only to a folder of its own (`copy_of_out`)."""
    world = World(tmp_path_factory.mktemp("tiny"))
    yield world
    world.close()


if __name__ == "__main__":
    serve()
