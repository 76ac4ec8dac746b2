"""A conversation on the web page: its questions, checked, the answers as they come, and their maps."""

import base64
import io
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import StoppingCriteria, TextIteratorStreamer

from dataset.conversation import IMAGE_TAG
from dataset.pictures import PictureError
from trainer.support.trained import Trained
from trainer.watch.assistant import Assistant
from trainer.watch.page import mask_of

LARGEST_FILE = 20 * 2**20  # bytes
MOST_PICTURES, LONGEST_QUESTION = 8, 4000  # in a conversation; characters
LOOKING_SECONDS = 180  # after which an answer goes without its maps
CLOSING = threading.Event()  # the page closes: nothing is generated any more


class Refused(Exception):
    """Something the page answers with one of its texts instead of a description."""

    def __init__(self, text: str, **values):
        self.text, self.values = text, values


@dataclass
class Session:
    """A conversation in one browser tab: its turns for the model and for the page, and its pictures."""

    conversation: list[dict] = field(default_factory=list)
    pictures: list[torch.Tensor] = field(default_factory=list)
    turns: list[dict] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)  # of the newest answer and its maps
    is_over: bool = False
    to_look: Callable[[], bool] | None = None  # computes the newest answer's maps


class StopWhen(StoppingCriteria):
    """Ends generation when an event is set, or the page closes."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids, scores, **settings) -> torch.Tensor:
        stops = self.event.is_set() or CLOSING.is_set()
        return torch.full((len(input_ids),), stops, device=input_ids.device)


def data_url(image: Image.Image, kind: str) -> str:
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def as_seen(picture: torch.Tensor) -> str:
    """Returns the address of a picture as the tower takes it, uint8 (3, size, size)."""
    return data_url(Image.fromarray(picture.permute(1, 2, 0).numpy()), "jpeg")


def read_pictures(assistant: Assistant, files: list[Path]) -> list[torch.Tensor]:
    """Reads pictures; raises Refused."""
    pictures = []
    for file in files:
        try:
            if file.stat().st_size > LARGEST_FILE:
                raise Refused("large_picture", name=file.name, most=LARGEST_FILE >> 20)
            pictures.append(assistant.load_picture(file))
        except OSError as error:
            raise Refused("gone", name=file.name) from error
        except PictureError as error:
            raise Refused("no_picture", name=file.name, reason=error.reason) from error
    return pictures


def add_question(assistant: Assistant, session: Session, question: str, files: list[Path], length: int):
    """Appends a question to the conversation. Raises Refused, and leaves the conversation as it was."""
    question = question.strip()
    if not question:
        raise Refused("no_question")
    if len(question) > LONGEST_QUESTION:
        raise Refused("long_question", most=LONGEST_QUESTION)
    if len(session.pictures) + len(files) > MOST_PICTURES:
        raise Refused("many_pictures", most=MOST_PICTURES)
    pictures = read_pictures(assistant, files)
    turn = assistant.turn(question.replace(IMAGE_TAG, ""), len(pictures))
    try:
        assistant.check_length([*session.conversation, turn], length)
    except ValueError as error:
        raise Refused("too_long") from error
    session.conversation.append(turn)
    session.pictures += pictures
    session.turns.append({"question": question, "pictures": list(map(as_seen, pictures))})


def stream(assistant: Assistant, session: Session, texts: dict, length: int, temperature: float, top_p: float):
    """Answers the last question; yields whenever the page is to be drawn anew."""
    turn, began, stop = session.turns[-1], time.perf_counter(), session.stop
    streamer = TextIteratorStreamer(assistant.tokenizer, skip_prompt=True, skip_special_tokens=True)
    conversation, pictures, result = list(session.conversation), list(session.pictures), {}

    def work():
        how = {"streamer": streamer, "stopping_criteria": [StopWhen(stop)]}
        try:
            result["ids"] = assistant.answer(conversation, pictures, length, temperature, top_p, **how)
        finally:
            streamer.end()

    worker = threading.Thread(target=work, daemon=True)  # a page that ends does not wait for it
    worker.start()
    said = ""
    try:
        for piece in streamer:
            said += piece
            turn["words"] = [(said, None)]
            yield
    finally:
        stop.set()  # the browser has gone: nobody waits for the rest
        worker.join()
    ids = result["ids"]
    rate = len(ids) / (time.perf_counter() - began)
    turn |= {"words": [(said, None)], "speed": texts["speed"].format(tokens=len(ids), rate=rate)}
    session.conversation.append({"role": "assistant", "content": said})
    if pictures and said.strip():
        session.stop = threading.Event()
        session.to_look = partial(look, assistant, turn, conversation, pictures, ids, session.stop)
    yield


def look(assistant: Assistant, turn: dict, conversation: list, pictures: list, ids: torch.Tensor, stop) -> bool:
    """Adds its words' maps to an answer; returns False where they were stopped or took too long."""
    end = time.monotonic() + LOOKING_SECONDS
    words = assistant.look(
        conversation, pictures, ids, lambda: stop.is_set() or CLOSING.is_set() or time.monotonic() > end
    )
    if words is None:
        return False
    masks = [mask_of([np.hstack(list(of_word))]) if any(map(str.isalnum, word)) else None for word, of_word in words]
    pairs = zip([word for word, _ in words], masks, strict=True)
    turn["words"] = [(word, mask and data_url(mask, "png")) for word, mask in pairs]
    turn |= {"looked": True, "seen": list(map(as_seen, pictures))}
    return True


def seen_by(trained: Trained, name: str, texts: dict) -> str:
    """Says which model it is, and from what it learned, as far as its sidecar tells."""
    sidecar = trained.weights.sidecar
    rows, pictures = sidecar.get("rows"), sidecar.get("pictures")
    path = sidecar.get("arguments", {}).get("data_path")
    data = Path(path).name if isinstance(path, str) else texts["builtin"]
    counts = {"rows": rows, "pictures": pictures} if type(rows) is type(pictures) is int else {}
    text = "learned_counts" if counts else "learned" if sidecar else "learned_unknown"
    values = {"stage": sidecar.get("stage"), "data": data} | counts
    parts = [texts["model"].format(name=Path(name).name), texts[text].format(**values)]
    parts += [texts["only_scenes"]] * trained.knows_only_scenes
    parts += [texts["blind"]] * (not trained.weights.has_projection)
    return " ".join(parts)
