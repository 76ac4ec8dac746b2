"""Conversations of the web page: questions, the answers as they are generated, and the maps of their words."""

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import jinja2
import numpy as np
import torch
from PIL import Image
from transformers import TextIteratorStreamer

from common.errors import UsageError
from dataset.chat import IMAGE_TAG
from dataset.pictures import PictureError
from trainer.answering.assistant import Assistant, mask_of
from trainer.answering.loaded_model import LoadedModel

MOST_PICTURES, LONGEST_QUESTION = 8, 4000  # in a conversation; characters
MAP_SECONDS = 180  # after which an answer stays without its maps
CLOSING = threading.Event()  # ends all generation
WORKERS = ThreadPoolExecutor(2)  # Python waits for its threads: ending it while they compute would abort it
TEXTS = json.loads(Path(__file__).with_name("texts.json").read_text(encoding="utf-8"))
TEMPLATE = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(
    Path(__file__).with_name("chat.html").read_text(encoding="utf-8")
)


class Refused(Exception):
    """A question that the page answers with one of its texts, by name, and the values to fill in."""


@dataclass
class Turn:
    """A question and its answer, or an error."""

    question: str = ""
    error: str = ""
    messages: list[dict] = field(default_factory=list)  # for the model: the question, then the answer
    pictures: list[torch.Tensor] = field(default_factory=list)
    images: list[str] = field(default_factory=list)  # the pictures as data URLs
    words: list[tuple[str, str | None]] = field(default_factory=list)  # each with the data URL of its map
    seen: list[str] = field(default_factory=list)  # data URLs of the pictures below the maps, once they are computed
    speed: str = ""
    stop: threading.Event = field(default_factory=threading.Event)  # of the generation, then of the maps
    look: Callable | None = None  # computes the maps


class Session:
    """A conversation in one browser tab."""

    def __init__(self):
        self.turns: list[Turn] = []

    def all(self, name: str) -> list:
        """Returns what the turns list under a name, joined."""
        return [item for turn in self.turns for item in getattr(turn, name)]

    def stop(self):
        for turn in self.turns:
            turn.stop.set()

    def render(self, texts: dict) -> str:
        return TEMPLATE.render(turns=self.turns, texts=texts)


def describe_model(loaded: LoadedModel, texts: dict) -> str:
    """Says which model it is, and what it was trained on as far as its sidecar tells."""
    weights, name = loaded.weights, "/".join(loaded.weights.path.parts[-2:])
    data = Path(weights.sidecar.get("arguments", {}).get("data_path") or texts["builtin"]).name
    text = "learned_counts" if "rows" in weights.sidecar else "learned" if weights.sidecar else "learned_unknown"
    parts = [texts["model"].format(name=name), texts[text].format(**{"stage": None} | weights.sidecar | {"data": data})]
    parts += [texts["only_scenes"]] * loaded.knows_only_scenes + [texts["blind"]] * (not weights.has_projection)
    return " ".join(parts)


def data_url(image: Image.Image, kind: str) -> str:
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def add_question(assistant: Assistant, session: Session, question: str, files: list[Path], length: int):
    """Adds a question about pictures to a conversation; raises Refused, and leaves it as it was."""
    question = question.replace(IMAGE_TAG, "").strip()
    if not question:
        raise Refused("no_question", {})
    if len(question) > LONGEST_QUESTION:
        raise Refused("long_question", {"most": LONGEST_QUESTION})
    if len(session.all("pictures")) + len(files) > MOST_PICTURES:
        raise Refused("many_pictures", {"most": MOST_PICTURES})
    pictures = []
    for file in files:
        try:
            pictures.append(assistant.load_picture(file))
        except PictureError as error:
            what = "no_picture" if file.exists() else "gone"
            raise Refused(what, {"name": file.name, "reason": error.reason}) from error
    try:
        message = assistant.turn(question, len(pictures), session.all("messages"), length)
    except UsageError as error:
        raise Refused("too_long", {}) from error
    images = [data_url(Image.fromarray(picture.permute(1, 2, 0).numpy()), "jpeg") for picture in pictures]
    session.turns.append(Turn(question, messages=[message], pictures=pictures, images=images))


def answer(assistant: Assistant, session: Session, texts: dict, length: int, **sampling) -> Iterator[None]:
    """Answers the last question in at most `length` tokens; yields whenever the page is to be drawn again."""
    turn, stop, started = session.turns[-1], session.turns[-1].stop, time.perf_counter()
    asked = session.all("messages"), session.all("pictures")
    streamer = TextIteratorStreamer(assistant.tokenizer, skip_prompt=True, skip_special_tokens=True)

    def is_stopped(ids: torch.Tensor, scores, **settings) -> torch.Tensor:
        return torch.full((len(ids),), stop.is_set() or CLOSING.is_set(), device=ids.device)

    def generate() -> torch.Tensor:
        try:
            return assistant.answer(*asked, length, streamer=streamer, stopping_criteria=[is_stopped], **sampling)
        finally:
            streamer.end()

    future, text, redraw = WORKERS.submit(generate), "", 0.0
    try:
        for piece in streamer:
            text += piece
            if time.perf_counter() > redraw:  # not for every token: drawing would take its time
                redraw = time.perf_counter() + 0.1
                turn.words = [(text, None)]
                yield
    finally:
        stop.set()  # the browser may have gone: nobody waits for the rest
        ids = future.result()
    turn.words = [(text, None)]
    turn.speed = texts["speed"].format(tokens=len(ids), rate=len(ids) / (time.perf_counter() - started))
    turn.messages.append({"role": "assistant", "content": text})
    if asked[1] and text.strip():
        turn.stop, turn.look = threading.Event(), partial(assistant.look, *asked, ids)
    yield


def add_maps(session: Session) -> bool:
    """Adds its words' maps to the newest answer; returns False if there are none, or they were stopped or too slow."""
    turn = session.turns[-1] if session.turns else Turn()
    look, turn.look, end = turn.look, None, time.monotonic() + MAP_SECONDS
    is_stopped = lambda: turn.stop.is_set() or CLOSING.is_set() or time.monotonic() > end  # noqa: E731
    words = WORKERS.submit(look, is_stopped).result() if look else None
    if words is None:
        return False
    masks = [mask_of(np.hstack(list(maps))) if any(map(str.isalnum, word)) else None for word, maps in words]
    turn.words = [(word, mask and data_url(mask, "png")) for (word, _), mask in zip(words, masks, strict=True)]
    turn.seen = session.all("images")
    return True
