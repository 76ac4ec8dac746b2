"""A web page to talk to a trained model about pictures, and to see which parts of them each word depended on.

    python scripts/web_demo_vlm.py                          out/sft_vlm_*.pth, on http://127.0.0.1:7860
    python scripts/web_demo_vlm.py --weight pretrain_vlm --port 8000

It needs one more package: pip install -r scripts/requirements-demo.txt. Only this machine can open the page unless
--host or --share say otherwise. Pictures stay in memory and are forgotten with the page.
"""

import base64
import io
import os
import re
import sys
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jinja2  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import StoppingCriteria, TextIteratorStreamer  # noqa: E402

from common.cli import ArgumentParser, HelpFormatter  # noqa: E402
from common.errors import UsageError, run_script  # noqa: E402
from common.paths import ROOT, SAVE_DIR  # noqa: E402
from dataset.conversation import IMAGE_TAG  # noqa: E402
from dataset.pictures import PictureError  # noqa: E402
from dataset.scenes.draw import draw, heldout_scenes  # noqa: E402
from dataset.scenes.language import DESCRIBE, ENGLISH  # noqa: E402
from dataset.tokenizer import quiet_libraries  # noqa: E402
from trainer.support.processes import Processes  # noqa: E402
from trainer.support.trained import SAMPLING, SAMPLING_3V, add_model_flags, find_trained  # noqa: E402
from trainer.watch.assistant import Assistant, add_speed_flags  # noqa: E402
from trainer.watch.page import mask_of  # noqa: E402

LARGEST_FILE = 20 * 2**20  # bytes
MOST_PICTURES, LONGEST_QUESTION, MOST_WAITING = 8, 4000, 32
FORGOTTEN_AFTER = 3600  # seconds without a question
EXAMPLES = 6
TEXTS = {
    "en": {
        "describe": ENGLISH.requests[0],
        "empty": "Drop, paste or choose a picture, or click an example, and ask about it.",
        "question": "Question",
        "weights": "Weights",
        "examples": "Examples: click one to have it described",
        "camera": "Take a picture",
        "settings": "Settings",
        "temperature": "Temperature (0: always the likeliest word)",
        "top_p": "Top-p",
        "length": "Longest answer, tokens",
        "stop": "Stop",
        "new": "New conversation",
        "point": "Point at a word: bright patches are those it depended on.",
        "speed": "{tokens} tokens, {rate:.0f} tokens/s.",
        "no_question": "There is no question: type one below the picture.",
        "long_question": "The question is longer than {most:,} characters.",
        "no_picture": "{name} is no picture that can be read ({reason}).",
        "large_picture": "{name} is larger than {most} MB.",
        "many_pictures": "At most {most} pictures in a conversation: begin a new one.",
        "too_long": "The conversation is too long for the model: begin a new one, or ask for a shorter answer.",
        "no_weights": "These weights cannot be used: {reason}",
    },
    "zh": {
        "describe": DESCRIBE,
        "empty": "拖入、粘贴或选择一张图片，或点击一个例子，然后提问。",
        "question": "问题",
        "weights": "权重",
        "examples": "例子：点击即可得到描述",
        "camera": "拍照",
        "settings": "设置",
        "temperature": "温度（0：总是取最可能的词）",
        "top_p": "Top-p",
        "length": "回答的最大长度（token）",
        "stop": "停止",
        "new": "新对话",
        "point": "指向一个词：亮的图块就是这个词所依据的。",
        "speed": "{tokens} 个 token，每秒 {rate:.0f} 个。",
        "no_question": "还没有问题：请在图片下方输入。",
        "long_question": "问题超过了 {most:,} 个字符。",
        "no_picture": "{name} 不是能读取的图片（{reason}）。",
        "large_picture": "{name} 超过了 {most} MB。",
        "many_pictures": "一次对话最多 {most} 张图片：请开始新对话。",
        "too_long": "对话对模型来说太长了：请开始新对话，或缩短回答。",
        "no_weights": "无法使用这些权重：{reason}",
    },
}
TEMPLATE = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(
    Path(__file__).with_name("web_demo.html").read_text(encoding="utf-8")
)


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
    stop: threading.Event = field(default_factory=threading.Event)
    is_over: bool = False


class StopWhen(StoppingCriteria):
    """Ends generation when an event is set."""

    def __init__(self, event: threading.Event):
        self.event = event

    def __call__(self, input_ids, scores, **settings) -> torch.Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), device=input_ids.device)


class BoundedRequests:
    """ASGI middleware that refuses requests larger than MOST_PICTURES files."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        left = MOST_PICTURES * LARGEST_FILE

        async def receive_bounded() -> dict:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            return message if left >= 0 else {"type": "http.disconnect"}

        said = dict(scope.get("headers", ())).get(b"content-length", b"0")
        if not said.isdigit() or int(said) > left:
            await send({"type": "http.response.start", "status": 413, "headers": []})
            await send({"type": "http.response.body"})
        else:
            await self.app(scope, receive_bounded, send)


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
        if file.stat().st_size > LARGEST_FILE:
            raise Refused("large_picture", name=file.name, most=LARGEST_FILE >> 20)
        try:
            pictures.append(assistant.load_picture(file))
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
    turn, began = session.turns[-1], time.perf_counter()
    streamer = TextIteratorStreamer(assistant.tokenizer, skip_prompt=True, skip_special_tokens=True)
    session.stop.clear()
    result = {}

    def work():
        try:
            result["ids"] = assistant.answer(
                session.conversation,
                session.pictures,
                length,
                temperature,
                top_p,
                streamer=streamer,
                stopping_criteria=[StopWhen(session.stop)],
            )
        finally:
            streamer.end()

    worker = threading.Thread(target=work)
    worker.start()
    said = ""
    try:
        for piece in streamer:
            said += piece
            turn["words"] = [(said, None)]
            yield
    finally:
        session.stop.set()  # the browser has gone: nobody waits for the rest
        worker.join()
    ids = result["ids"]
    rate = len(ids) / (time.perf_counter() - began)
    turn |= {"words": [(said, None)], "speed": texts["speed"].format(tokens=len(ids), rate=rate)}
    yield
    if session.pictures and said.strip():
        words = assistant.look(session.conversation, session.pictures, ids)
        masks = [
            mask_of([np.hstack(list(of_word))]) if any(map(str.isalnum, word)) else None for word, of_word in words
        ]
        pairs = zip([word for word, _ in words], masks, strict=True)
        turn["words"] = [(word, mask and data_url(mask, "png")) for word, mask in pairs]
        turn |= {"looked": True, "seen": list(map(as_seen, session.pictures))}
    session.conversation.append({"role": "assistant", "content": said})
    yield


class Demo:
    """The page's models and handlers."""

    def __init__(self, args: Namespace, device: torch.device, folder: Path):
        self.args, self.device, self.folder = args, device, folder
        first = find_trained(args)
        self.first = first.weights.path.stem if args.load_from == "model" else str(args.load_from)
        self.load = lru_cache(maxsize=2)(self.load)
        trained = self.load(self.first).trained
        self.examples = self.draw_examples() if trained.knows_only_scenes else example_photos()
        given = {name: getattr(args, name) for name in ("temperature", "top_p") if getattr(args, name) is not None}
        self.sampling = trained.sampling | given

    def load(self, name: str) -> Assistant:
        """Loads the weights of that name; the two used last stay in memory."""
        chosen = self.args
        if name != self.first:
            path = (self.args.save_dir or SAVE_DIR) / f"{name}.pth"
            chosen = Namespace(**vars(self.args) | {"load_from": "model", "weight": str(path), "hidden_size": None})
        return Assistant(find_trained(chosen), self.device, chosen.dtype, chosen.compile)

    def names(self) -> list[str]:
        """Returns the weights to choose from: those of the command line, and the others beside them."""
        files = (self.args.save_dir or SAVE_DIR).glob("*.pth")
        found = {file.stem for file in files if re.fullmatch(r"(?!llm_).+_\d+(_moe)?", file.stem)}
        return sorted(found | {self.first}, key=lambda name: (name != self.first, name))

    def draw_examples(self) -> list[Path]:
        files = [self.folder / f"scene_{number}.jpg" for number in range(EXAMPLES)]
        for scene, file in zip(heldout_scenes()[:EXAMPLES], files, strict=True):
            draw(scene).save(file, quality=92)
        return files

    def answer(self, session: Session, texts: dict, name: str, asked: dict, settings: tuple) -> Iterator[tuple]:
        """Yields the conversation as HTML while a question is answered, and whether the question was accepted.

        Args:
            asked: "question", and "files", the pictures' paths.
            settings: Longest answer, temperature, top-p.
        """
        length, temperature, top_p = settings
        try:
            try:
                assistant = self.load(name)
            except UsageError as error:
                raise Refused("no_weights", reason=str(error)) from error
            add_question(assistant, session, asked["question"], asked["files"], length)
        except Refused as refused:
            session.turns.append({"error": texts[refused.text].format(**refused.values)})
            yield self.render(session, texts), False
            return
        for file in asked["files"]:
            if file not in self.examples:  # an upload
                file.unlink(missing_ok=True)
        for _ in stream(assistant, session, texts, length, temperature, top_p):
            if session.is_over:
                return
            yield self.render(session, texts), True

    def render(self, session: Session, texts: dict) -> str:
        return TEMPLATE.render(turns=session.turns, texts=texts)


def example_photos() -> list[Path]:
    return sorted((ROOT / "dataset" / "example" / "photos").iterdir())[:EXAMPLES]


def texts_for(request) -> dict:
    """Returns the page's texts in the browser's language."""
    accepted = request.headers.get("accept-language", "") if request else ""
    return TEXTS["zh" if accepted.lower().startswith("zh") else "en"]


def build_page(gr, demo: Demo):
    """Lays out the page; returns the gradio Blocks and the texts that its labels are translated with."""
    text = gr.I18n(**TEXTS, **dict.fromkeys(("zh-CN", "zh-TW"), TEXTS["zh"]))
    with gr.Blocks(title="MiniMind-V", analytics_enabled=False, delete_cache=(600, 600)) as page:
        session = gr.State(time_to_live=FORGOTTEN_AFTER)  # a Session, from the page's load event on
        gr.Markdown("# MiniMind-V")
        talk = gr.HTML(TEMPLATE.render(turns=[], texts=TEXTS["en"]), elem_id="talk")
        kinds = {"file_types": ["image"], "file_count": "multiple", "sources": ["upload"]}
        box = gr.MultimodalTextbox(label=text("question"), elem_id="question", **kinds)
        with gr.Row():
            stop = gr.Button(text("stop"), elem_id="stop")
            new = gr.Button(text("new"), elem_id="new")
        gr.Markdown(text("examples"))
        gallery = {"columns": EXAMPLES, "height": "auto", "allow_preview": False, "interactive": False, "buttons": []}
        images = [Image.open(path) for path in demo.examples]
        examples = gr.Gallery(images, show_label=False, elem_id="examples", **gallery)
        with gr.Accordion(text("camera"), open=False):
            camera = gr.Image(sources=["webcam"], type="filepath", show_label=False)
        with gr.Accordion(text("settings"), open=False):
            weights = gr.Dropdown(demo.names(), value=demo.first, label=text("weights"), elem_id="weights")
            temperature = gr.Slider(0, 1.5, demo.sampling["temperature"], step=0.05, label=text("temperature"))
            top_p = gr.Slider(0.05, 1, demo.sampling["top_p"], step=0.05, label=text("top_p"))
            length = gr.Slider(8, 1024, demo.args.max_new_tokens, step=8, label=text("length"))
        settings = [weights, length, temperature, top_p]

        def ask(session, asked, photo, name, length, temperature, top_p, request: gr.Request):
            files = [Path(file) for file in (*asked["files"], photo) if file]
            asked = {"question": asked["text"] or "", "files": files}
            for html, accepted in demo.answer(session, texts_for(request), name, asked, (length, temperature, top_p)):
                yield session, html, *((None, None) if accepted else (gr.skip(), gr.skip()))

        def describe(session, name, length, temperature, top_p, chosen: gr.SelectData, request: gr.Request):
            texts = texts_for(request)
            asked = {"question": texts["describe"], "files": [demo.examples[chosen.index]]}
            for html, _ in demo.answer(session, texts, name, asked, (length, temperature, top_p)):
                yield session, html

        def begin_anew(session, request: gr.Request):
            if session:
                session.is_over = True
                session.stop.set()
            return Session(), demo.render(Session(), texts_for(request))

        box.submit(ask, [session, box, camera, *settings], [session, talk, box, camera], show_progress="hidden")
        examples.select(describe, [session, *settings], [session, talk], show_progress="hidden")
        stop.click(lambda session: session.stop.set(), [session], queue=False)
        for event in (new.click, weights.change, page.load):
            event(begin_anew, [session], [session, talk], queue=False)
    return page.queue(max_size=MOST_WAITING, default_concurrency_limit=1, api_open=False), text


def parse_arguments(argv=None) -> Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_speed_flags(add_model_flags(parser))
    add = parser.add_argument_group("the page").add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets others on your network in")
    add("--port", type=int, default=7860, help="port to listen on")
    add("--share", action="store_true", help="a public address for a few days, through gradio's servers")
    what = "what its slider starts with; 0: always the likeliest word"
    default = f"{SAMPLING['temperature']}; minimind-3v: {SAMPLING_3V['temperature']}"
    add("--temperature", type=float, help=f"{what} (default: {default})")
    add("--top_p", type=float, help=f"what its slider starts with (default: {SAMPLING['top_p']})")
    add("--max_new_tokens", type=int, default=256, help="what its slider starts with")
    return parser.parse_args(argv)


def main():
    args = parse_arguments()
    try:
        import gradio as gr
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise UsageError("the web page needs a package: pip install -r scripts/requirements-demo.txt") from error
    with Processes.start(args.device) as processes, tempfile.TemporaryDirectory() as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder) / "uploads")
        quiet_libraries(True)
        page, text = build_page(gr, Demo(args, processes.device, Path(folder)))
        options = {"server_name": args.host, "server_port": args.port, "share": args.share, "i18n": text}
        options |= {"max_file_size": LARGEST_FILE, "css": Path(__file__).with_name("web_demo.css").read_text()}
        options |= {"app_kwargs": {"middleware": [(BoundedRequests, (), {})]}}
        try:
            page.launch(**options, footer_links=[], show_error=False)
        except OSError as error:
            raise UsageError(f"--port {args.port} cannot be used ({error}): choose another") from error


if __name__ == "__main__":
    run_script(main)
