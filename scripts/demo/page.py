"""The web page: what stands before it, its conversations with a map for each word of an answer, and its layout.

Requests of other sites and too large ones are refused, uploads counted and bounded.
"""

import base64
import contextlib
import html
import io
import ipaddress
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import gradio as gr
import jinja2
import numpy as np
import torch
from PIL import Image
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from transformers import TextIteratorStreamer

from common.errors import UsageError
from dataset.chat import IMAGE_TAG
from dataset.pictures import PictureError
from dataset.scenes.language import CHINESE, ENGLISH
from trainer.answering.assistant import Assistant, mask_of

MOST_PICTURES, LONGEST_QUESTION = 8, 4000  # in a conversation; characters
MOST_FILES, MOST_BYTES = 100, 256 * 2**20  # of uploads that no question has used yet
MAP_SECONDS = 180  # after which an answer stays without its maps
MOST_WAITING = 32  # requests
FORGOTTEN_AFTER = 3600  # seconds without a question
CLOSING = threading.Event()  # ends all generation
WORKERS = ThreadPoolExecutor(2)  # Python waits for its threads: ending it while they compute would abort it
HERE = Path(__file__).parent
TEXTS = json.loads((HERE / "texts.json").read_text(encoding="utf-8"))
LABELS = gr.I18n(**TEXTS, **dict.fromkeys(("zh-CN", "zh-TW"), TEXTS["zh"]))  # in the browser's language
TEMPLATE = jinja2.Template((HERE / "chat.html").read_text(encoding="utf-8"), autoescape=True, trim_blocks=True)


def is_loopback(host: str) -> bool:
    """Tells whether an address or name means this machine alone; raises OSError for an unknown name."""
    return ipaddress.ip_address(socket.getaddrinfo(host, None)[0][4][0]).is_loopback


class Uploads:
    """Counts the files in gradio's upload folder: their names are hashes, so two visitors may share one.

    A file is deleted once all its uploads were used; beyond MOST_FILES or MOST_BYTES the oldest are.
    """

    def __init__(self, folder: Path):
        self.folder, self.waiting, self.lock = folder, Counter(), threading.Lock()

    def add(self, answer: bytes):
        """Counts the uploads that gradio's answer to a request lists."""
        with contextlib.suppress(ValueError), self.lock:  # not JSON: a refusal
            self.waiting.update(list(json.loads(answer)))

    def use(self, path: Path):
        """Deletes a file that a question used, unless another upload of it waits."""
        with self.lock:
            self.waiting -= Counter([str(path)])  # forgets a count of zero
            if str(path) not in self.waiting and self.folder in path.resolve().parents:  # it comes from a browser
                path.unlink(missing_ok=True)

    def enforce_bounds(self):
        """Deletes the oldest files beyond the bounds, leftovers of interrupted uploads included."""
        # gradio itself deletes files an hour old: where it was faster, the next request tries again.
        with self.lock, contextlib.suppress(FileNotFoundError):
            files = sorted(filter(Path.is_file, self.folder.rglob("*")), key=lambda path: -path.stat().st_mtime_ns)
            total = 0
            for number, path in enumerate(files, start=1):
                total += path.stat().st_size
                if number > MOST_FILES or total > MOST_BYTES:
                    self.waiting.pop(str(path), None)
                    path.unlink(missing_ok=True)


class Guard:
    """ASGI middleware that refuses too large requests and those of other sites, and counts and bounds the uploads."""

    def __init__(self, app, uploads: Uploads, most_bytes: int, is_local: bool):
        self.app, self.uploads, self.most_bytes, self.is_local = app, uploads, most_bytes, is_local

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers, path = Headers(scope=scope), scope["path"].rstrip("/")
        has_started = False
        if "transfer-encoding" in headers or int(headers.get("content-length", 0)) > self.most_bytes:
            return await PlainTextResponse("", 413)(scope, receive, send)
        if self.is_local and headers.get("origin", "").lower() not in ("", f"http://{headers['host'].lower()}"):
            return await PlainTextResponse("This page answers to no other site.", 403)(scope, receive, send)

        async def send_counted(message: dict):
            nonlocal has_started
            has_started = True
            if path.endswith("/upload") and message["type"] == "http.response.body":
                self.uploads.add(message["body"])  # before anybody can ask about them
            await send(message)

        try:
            await self.app(scope, receive, send_counted)
        except (RuntimeError, FileNotFoundError) as error:  # an upload was deleted while the page asked for it
            if "/file=" not in path or FileNotFoundError not in map(type, (error, error.__context__)):
                raise
            if not has_started:
                await PlainTextResponse("", 404)(scope, receive, send)
        finally:
            if path.endswith(("/upload", "/deep_link")):  # both write files
                self.uploads.enforce_bounds()


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


def joined(turns: list[Turn], name: str) -> list:
    return [item for turn in turns for item in getattr(turn, name)]


def stop_all(turns: list[Turn]):
    for turn in turns:
        turn.stop.set()


def data_url(image: Image.Image, kind: str) -> str:
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def language_of(request: gr.Request) -> str:
    return "zh" if request.headers.get("accept-language", "").lower().startswith("zh") else "en"


class Handlers:
    """What the page does for a visitor; the arguments are its components' values, in their order."""

    def __init__(self, assistant: Assistant, sampling: dict, examples: list[Path], uploads: Uploads):
        self.assistant, self.sampling, self.examples, self.uploads = assistant, sampling, examples, uploads

    def start(self, turns: list[Turn], request: gr.Request) -> tuple[list[Turn], str, str]:
        """Empties the conversation; says which model it is with, and what its sidecar tells of its training."""
        stop_all(turns)
        turns.clear()
        texts, loaded = TEXTS[language_of(request)], self.assistant.loaded
        sidecar = loaded.weights.sidecar
        data = Path(sidecar.get("arguments", {}).get("data_path") or texts["builtin"]).name
        training = "learned" if sidecar else "learned_unknown"
        training = texts["learned_counts" if "rows" in sidecar else training]
        about = [texts["model"].format(name="/".join(loaded.weights.path.parts[-2:]))]
        about.append(training.format(**{"stage": None} | sidecar | {"data": data}))
        about += [texts["only_scenes"]] * loaded.knows_only_scenes
        about += [texts["blind"]] * (not loaded.weights.has_projection)
        note = f'<p class="note">{html.escape(" ".join(about))}</p>'
        return turns, TEMPLATE.render(turns=turns, texts=texts), note

    def ask(self, box: dict, camera: str | None, turns, temperature, top_p, length, request: gr.Request):
        files = [Path(file) for file in (*box["files"], camera) if file]
        for after, talk in self.stream(turns, box["text"], files, temperature, top_p, length, request):
            emptied = gr.skip() if after and after[-1].error else None  # a refused question stays
            yield after, talk, emptied, emptied

    def describe(self, turns, temperature, top_p, length, chosen: gr.SelectData, request: gr.Request):
        question = {"zh": CHINESE, "en": ENGLISH}[language_of(request)].requests[0]
        yield from self.stream(turns, question, [self.examples[chosen.index]], temperature, top_p, length, request)

    def new_turn(self, turns: list[Turn], question: str, files: list[Path], length: int, texts: dict) -> Turn:
        """Returns a question about pictures that fits after these turns, or the error why it does not."""
        question = question.replace(IMAGE_TAG, "").strip()
        if not question:
            return Turn(error=texts["no_question"])
        if len(question) > LONGEST_QUESTION:
            return Turn(error=texts["long_question"].format(most=LONGEST_QUESTION))
        if len(joined(turns, "pictures")) + len(files) > MOST_PICTURES:
            return Turn(error=texts["many_pictures"].format(most=MOST_PICTURES))
        pictures = []
        for file in files:
            try:
                pictures.append(self.assistant.load_picture(file))
            except PictureError as error:
                text = texts["no_picture" if file.exists() else "gone"]
                return Turn(error=text.format(name=file.name, reason=error.reason))
        try:
            message = self.assistant.turn(question, len(pictures), joined(turns, "messages"), length)
        except UsageError as error:  # the chat template refuses a turn, or there are too many tokens
            return Turn(error=str(error) if error.__cause__ else texts["too_long"])
        images = [data_url(Image.fromarray(picture.permute(1, 2, 0).numpy()), "jpeg") for picture in pictures]
        return Turn(question, messages=[message], pictures=pictures, images=images)

    def stream(self, turns, question, files, temperature, top_p, length, request) -> Iterator[tuple[list[Turn], str]]:
        """Answers a question in at most `length` tokens; yields the turns and the page whenever it is drawn again."""
        texts = TEXTS[language_of(request)]
        draw = partial(TEMPLATE.render, turns=turns, texts=texts)
        stop_all(turns)  # the maps of the answer before
        turn = self.new_turn(turns, question, files, length, texts)
        turns.append(turn)
        if turn.error:
            yield turns, draw()
            return
        for file in files:
            self.uploads.use(file)
        stop, started = turn.stop, time.perf_counter()
        asked = joined(turns, "messages"), joined(turns, "pictures")
        streamer = TextIteratorStreamer(self.assistant.tokenizer, skip_prompt=True, skip_special_tokens=True)

        def is_stopped(ids: torch.Tensor, scores, **settings) -> torch.Tensor:
            return torch.full((len(ids),), stop.is_set() or CLOSING.is_set(), device=ids.device)

        settings = self.sampling | {"temperature": temperature, "top_p": top_p}
        settings |= {"streamer": streamer, "stopping_criteria": [is_stopped]}
        future = WORKERS.submit(self.assistant.answers, [asked[0]], [asked[1]], length, **settings)
        future.add_done_callback(lambda _: streamer.end())  # after an error too
        text, redraw = "", 0.0
        try:
            for piece in streamer:
                text += piece
                if time.perf_counter() > redraw:  # not for every token: drawing would take its time
                    redraw = time.perf_counter() + 0.1
                    turn.words = [(text, None)]
                    yield turns, draw()
        finally:
            stop.set()  # the browser may have gone: nobody waits for the rest
            [ids] = future.result()
        turn.words = [(text, None)]
        turn.speed = texts["speed"].format(tokens=len(ids), rate=len(ids) / (time.perf_counter() - started))
        turn.messages.append({"role": "assistant", "content": text})
        if asked[1] and text.strip():
            turn.stop, turn.look = threading.Event(), partial(self.assistant.look, *asked, ids)
        yield turns, draw()

    def show_maps(self, turns: list[Turn], request: gr.Request):
        """Adds its words' maps to the newest answer, unless it has none, or they were stopped or too slow."""
        turn, end = turns[-1] if turns else Turn(), time.monotonic() + MAP_SECONDS
        look, turn.look = turn.look, None

        def is_stopped() -> bool:
            return turn.stop.is_set() or CLOSING.is_set() or time.monotonic() > end

        words = WORKERS.submit(look, is_stopped).result() if look else None
        if words is None:
            return gr.skip()
        masks = [mask_of(np.hstack(list(maps))) if any(map(str.isalnum, word)) else None for word, maps in words]
        turn.words = [(word, mask and data_url(mask, "png")) for (word, _), mask in zip(words, masks, strict=True)]
        turn.seen = joined(turns, "images")
        return TEMPLATE.render(turns=turns, texts=TEXTS[language_of(request)])


def build_page(handlers: Handlers, max_new_tokens: int) -> gr.Blocks:
    """Lays out the page and connects it with its handlers; the sliders start at their sampling settings."""
    gr.set_static_paths(handlers.examples[0].parent)  # or they would be copied among the uploads
    with gr.Blocks(title="MiniMind-V", analytics_enabled=False, delete_cache=(600, FORGOTTEN_AFTER)) as page:
        turns = gr.State([], time_to_live=FORGOTTEN_AFTER)
        gr.Markdown("# MiniMind-V")
        about, talk = gr.HTML(elem_id="about"), gr.HTML(elem_id="talk")
        kinds = {"file_types": ["image"], "file_count": "multiple", "sources": ["upload"]}
        box = gr.MultimodalTextbox(label=LABELS("question"), elem_id="question", **kinds)
        with gr.Row():
            stop, new = gr.Button(LABELS("stop"), elem_id="stop"), gr.Button(LABELS("new"), elem_id="new")
        gr.Markdown(LABELS("examples"))
        looks = {"columns": len(handlers.examples), "height": "auto", "show_label": False, "buttons": []}
        gallery = {"elem_id": "examples", "allow_preview": False, "interactive": False}
        examples = gr.Gallery(handlers.examples, **looks, **gallery)
        with gr.Accordion(LABELS("camera"), open=False):
            camera = gr.Image(sources=["webcam"], type="filepath", image_mode=None, show_label=False)
        with gr.Accordion(LABELS("settings"), open=False):
            warmest, least = handlers.sampling["temperature"], handlers.sampling["top_p"]
            temperature = gr.Slider(0, max(1.5, warmest), warmest, step=0.05, label=LABELS("temperature"))
            top_p = gr.Slider(min(0.05, least), 1, least, step=0.05, label=LABELS("top_p"))
            bounds = min(8, max_new_tokens), max(1024, max_new_tokens)
            length = gr.Slider(*bounds, max_new_tokens, step=8, label=LABELS("length"))

        # One answer at a time, over all visitors. Maps take minutes on a CPU, so they have a queue of their own: no
        # question waits for them.
        queue = {"concurrency_id": "answers", "concurrency_limit": 1, "show_progress": "hidden"}
        settings = [turns, temperature, top_p, length]
        asked = box.submit(handlers.ask, [box, camera, *settings], [turns, talk, box, camera], **queue)
        chosen = examples.select(handlers.describe, settings, [turns, talk], **queue)
        for asking in (asked, chosen):
            asking.then(handlers.show_maps, [turns], [talk], **queue | {"concurrency_id": "maps"})
        stop.click(stop_all, [turns], queue=False)
        for event in (new.click, page.load):
            event(handlers.start, [turns], [turns, talk, about], queue=False)
    return page.queue(max_size=MOST_WAITING, api_open=False)
