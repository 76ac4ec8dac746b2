"""Conversations of the web page: which model answers, its questions, the answers as they come, and their word maps."""

import base64
import io
import json
import re
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import jinja2
import numpy as np
import torch
from PIL import Image
from transformers import TextIteratorStreamer

from common.errors import UsageError
from common.paths import EXAMPLE_PHOTO, SAVE_DIR
from dataset.conversation import IMAGE_TAG
from dataset.pictures import PictureError
from dataset.scenes.draw import draw, heldout_scenes
from trainer.answering.assistant import Assistant
from trainer.answering.loaded_model import find_model
from trainer.report.page import mask_of

LARGEST_FILE = 20 * 2**20  # bytes
MOST_PICTURES, LONGEST_QUESTION = 8, 4000  # in a conversation; characters
LOOKING_SECONDS = 180  # after which an answer stays without its maps
EXAMPLES = 6
CLOSING = threading.Event()  # the page closes: nothing is generated any more
WORKERS = ThreadPoolExecutor(2)  # Python waits for its threads: ending it while they compute would abort it
HERE = Path(__file__).parent
TEXTS = json.loads((HERE / "texts.json").read_text(encoding="utf-8"))
TEMPLATE = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(
    (HERE / "chat.html").read_text(encoding="utf-8")
)


class Refused(Exception):
    """A request that the page answers with one of its texts, by name."""

    def __init__(self, text: str, **values):
        self.text, self.values = text, values

    def message(self, texts: dict) -> str:
        return texts[self.text].format(**self.values)


@dataclass
class Session:
    """A conversation in one browser tab: its turns for the model and for the page, and its pictures."""

    conversation: list[dict] = field(default_factory=list)
    pictures: list[torch.Tensor] = field(default_factory=list)
    turns: list[dict] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)  # of the newest answer and its maps
    is_over: bool = False
    add_maps: Callable[[], bool] | None = None  # computes the newest answer's maps

    def render(self, texts: dict) -> str:
        """Returns the conversation as HTML."""
        return TEMPLATE.render(turns=self.turns, texts=texts)


class Models:
    """The models that the page offers, and its example pictures."""

    def __init__(self, args: Namespace, device: torch.device, folder: Path):
        self.args, self.device, self.lock = args, device, threading.Lock()
        first = find_model(args)
        self.first = first.weights.path.stem if args.load_from == "model" else str(args.load_from)
        typed = {name: getattr(args, name) for name in ("temperature", "top_p") if getattr(args, name) is not None}
        self.sampling = first.sampling | typed
        self.load = lru_cache(maxsize=2)(self.load)
        self.load(self.first)
        self.examples = sorted(EXAMPLE_PHOTO.parent.iterdir())[:EXAMPLES]
        if first.knows_only_scenes:
            self.examples = [folder / f"scene_{number}.jpg" for number in range(EXAMPLES)]
            for path, scene in zip(self.examples, heldout_scenes(), strict=False):
                draw(scene).save(path, quality=92)

    def load(self, name: str) -> Assistant:
        """Loads the weights of that name; the two used last stay in memory. Raises UsageError."""
        args = self.args
        if name != self.first:
            path = (args.save_dir or SAVE_DIR) / f"{name}.pth"
            args = Namespace(**vars(args) | {"load_from": "model", "weight": str(path), "hidden_size": None})
        return Assistant(find_model(args), self.device, args.dtype, args.compile)

    def get(self, name: str) -> Assistant:
        """Returns the model of that name; raises Refused."""
        try:
            with self.lock:
                return self.load(name)
        except UsageError as error:
            raise Refused("no_weights", reason=str(error)) from error

    def names(self) -> list[str]:
        """Returns the weights to choose from: those of the command line, and the others beside them."""
        files = (self.args.save_dir or SAVE_DIR).glob("*.pth")
        found = {file.stem for file in files if re.fullmatch(r"(?!llm_).+_\d+(_moe)?", file.stem)}
        return sorted(found | {self.first}, key=lambda name: (name != self.first, name))


def describe_model(loaded, name: str, texts: dict) -> str:
    """Says which model it is, and what it was trained on as far as its sidecar tells."""
    sidecar = loaded.weights.sidecar
    values = {"stage": sidecar.get("stage"), "rows": sidecar.get("rows"), "pictures": sidecar.get("pictures")}
    path = sidecar.get("arguments", {}).get("data_path")
    values["data"] = Path(path).name if isinstance(path, str) else texts["builtin"]
    has_counts = type(values["rows"]) is type(values["pictures"]) is int
    text = "learned_counts" if has_counts else "learned" if sidecar else "learned_unknown"
    parts = [texts["model"].format(name=Path(name).name), texts[text].format(**values)]
    parts += [texts["only_scenes"]] * loaded.knows_only_scenes + [texts["blind"]] * (not loaded.weights.has_projection)
    return " ".join(parts)


def data_url(image: Image.Image, kind: str) -> str:
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def as_seen(picture: torch.Tensor) -> str:
    """Returns the address of a picture as the tower takes it, uint8 (3, size, size)."""
    return data_url(Image.fromarray(picture.permute(1, 2, 0).numpy()), "jpeg")


def read_picture(assistant: Assistant, file: Path) -> torch.Tensor:
    try:
        if file.stat().st_size > LARGEST_FILE:
            raise Refused("large_picture", name=file.name, most=LARGEST_FILE >> 20)
        return assistant.load_picture(file)
    except OSError as error:
        raise Refused("gone", name=file.name) from error
    except PictureError as error:
        raise Refused("no_picture", name=file.name, reason=error.reason) from error


def add_question(assistant: Assistant, session: Session, question: str, files: list[Path], length: int):
    """Appends a question to the conversation. Raises Refused, and leaves the conversation as it was."""
    question = question.strip()
    if not question:
        raise Refused("no_question")
    if len(question) > LONGEST_QUESTION:
        raise Refused("long_question", most=LONGEST_QUESTION)
    if len(session.pictures) + len(files) > MOST_PICTURES:
        raise Refused("many_pictures", most=MOST_PICTURES)
    pictures = [read_picture(assistant, file) for file in files]
    turn = assistant.turn(question.replace(IMAGE_TAG, ""), len(pictures))
    try:
        assistant.check_length([*session.conversation, turn], length)
    except ValueError as error:
        raise Refused("too_long") from error
    session.conversation.append(turn)
    session.pictures += pictures
    session.turns.append({"question": question, "pictures": list(map(as_seen, pictures))})


def answer(assistant: Assistant, session: Session, texts: dict, length: int, **sampling) -> Iterator[None]:
    """Answers the last question; yields whenever the page is to be drawn again.

    Args:
        length: Longest answer in tokens.
        sampling: Temperature and top_p.
    """
    turn, started, stop = session.turns[-1], time.perf_counter(), session.stop
    streamer = TextIteratorStreamer(assistant.tokenizer, skip_prompt=True, skip_special_tokens=True)
    conversation, pictures, text = list(session.conversation), list(session.pictures), ""
    redraw = 0.0

    def is_stopped(ids: torch.Tensor, scores, **settings) -> torch.Tensor:
        return torch.full((len(ids),), stop.is_set() or CLOSING.is_set(), device=ids.device)

    def work():
        how = sampling | {"streamer": streamer, "stopping_criteria": [is_stopped]}
        try:
            return assistant.answer(conversation, pictures, length, **how)
        finally:
            streamer.end()

    future = WORKERS.submit(work)
    try:
        for piece in streamer:
            text += piece
            if time.perf_counter() > redraw:  # not for every token: drawing would take its time
                redraw = time.perf_counter() + 0.1
                turn["words"] = [(text, None)]
                yield
    finally:
        stop.set()  # the browser has gone: nobody waits for the rest
        ids = future.result()
    rate = len(ids) / (time.perf_counter() - started)
    turn |= {"words": [(text, None)], "speed": texts["speed"].format(tokens=len(ids), rate=rate)}
    session.conversation.append({"role": "assistant", "content": text})
    if pictures and text.strip():
        session.stop = threading.Event()
        maps_of = partial(assistant.look, conversation, pictures, ids)
        session.add_maps = partial(add_maps, maps_of, turn, pictures, session.stop)
    yield


def add_maps(maps_of: Callable, turn: dict, pictures: list[torch.Tensor], stop: threading.Event) -> bool:
    """Adds its words' maps to an answer; returns False if they were stopped or took too long."""
    end = time.monotonic() + LOOKING_SECONDS
    is_stopped = lambda: stop.is_set() or CLOSING.is_set() or time.monotonic() > end  # noqa: E731
    words = WORKERS.submit(maps_of, is_stopped).result()
    if words is None:
        return False
    masks = [mask_of([np.hstack(list(maps))]) if any(map(str.isalnum, word)) else None for word, maps in words]
    turn["words"] = [(word, mask and data_url(mask, "png")) for (word, _), mask in zip(words, masks, strict=True)]
    turn |= {"looked": True, "seen": list(map(as_seen, pictures))}
    return True
