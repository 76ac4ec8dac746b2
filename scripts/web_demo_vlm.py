"""A web page to talk to a trained model about pictures, and to see which parts of them each word depended on.

    python scripts/web_demo_vlm.py                          out/sft_vlm_*.pth, on http://127.0.0.1:7860
    python scripts/web_demo_vlm.py --weight pretrain_vlm --port 8000

It needs one more package: pip install -r scripts/requirements-demo.txt. Only this machine can open the page unless
--host or --share say otherwise. An upload lies in a temporary folder until it has been asked about, an hour or so at
most and within bounds (scripts/web_guard.py); then it stays in memory, and is forgotten with the page.
"""

import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from argparse import Namespace
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jinja2  # noqa: E402
import torch  # noqa: E402

from common.cli import ArgumentParser, HelpFormatter  # noqa: E402
from common.errors import Stopped, UsageError, run_script  # noqa: E402
from common.paths import ROOT, SAVE_DIR  # noqa: E402
from dataset.scenes.draw import draw, heldout_scenes  # noqa: E402
from dataset.scenes.language import DESCRIBE, ENGLISH  # noqa: E402
from dataset.tokenizer import quiet_libraries  # noqa: E402
from scripts.web_guard import Guard, Uploads, own_names  # noqa: E402
from scripts.web_session import (  # noqa: E402
    CLOSING,
    LARGEST_FILE,
    MOST_PICTURES,
    Refused,
    Session,
    add_question,
    seen_by,
    stream,
)
from trainer.support.processes import Processes  # noqa: E402
from trainer.support.signals import SIGNALS  # noqa: E402
from trainer.support.trained import SAMPLING, SAMPLING_3V, add_model_flags, find_trained  # noqa: E402
from trainer.watch.assistant import Assistant, add_speed_flags  # noqa: E402

MOST_WAITING = 32  # requests
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
        "gone": "{name} is no longer here: add it once more.",
        "model": "You talk to {name}.",
        "learned_counts": "Stage {stage} showed it {rows:,} rows and {pictures:,} pictures of {data}.",
        "learned": "Stage {stage} showed it {data}.",
        "learned_unknown": "No file beside its weights says what it was trained on.",
        "builtin": "the built-in set",
        "only_scenes": "It knows only the drawn shapes of the built-in set.",
        "blind": "It is a language model that has not seen any picture yet.",
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
        "gone": "{name} 已经不在了：请重新添加。",
        "model": "正在与 {name} 对话。",
        "learned_counts": "{stage} 阶段用了 {data} 的 {rows:,} 行数据、{pictures:,} 张图片。",
        "learned": "{stage} 阶段用了 {data}。",
        "learned_unknown": "权重旁没有文件说明它用什么训练。",
        "builtin": "内置数据集",
        "only_scenes": "它只认识内置数据集里画出的图形。",
        "blind": "它还只是语言模型，没有看过任何图片。",
    },
}
TEMPLATE = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(
    Path(__file__).with_name("web_demo.html").read_text(encoding="utf-8")
)
ABOUT = jinja2.Environment(autoescape=True).from_string('<p class="note">{{ text }}</p>')


class Demo:
    """The page's models and handlers."""

    def __init__(self, args: Namespace, device: torch.device, folder: Path):
        self.args, self.device, self.folder = args, device, folder.resolve() / "examples"
        self.uploads = Uploads(folder.resolve() / "uploads")
        for made in (self.folder, self.uploads.folder):
            made.mkdir(exist_ok=True)
        self.loading = threading.Lock()
        first = find_trained(args)
        self.first = first.weights.path.stem if args.load_from == "model" else str(args.load_from)
        self.load = lru_cache(maxsize=2)(self.load)
        trained = self.load(self.first).trained
        self.examples = self.draw_examples() if trained.knows_only_scenes else self.copy_photos()
        given = {name: getattr(args, name) for name in ("temperature", "top_p") if getattr(args, name) is not None}
        self.sampling = trained.sampling | given

    def load(self, name: str) -> Assistant:
        """Loads the weights of that name; the two used last stay in memory."""
        chosen = self.args
        if name != self.first:
            path = (self.args.save_dir or SAVE_DIR) / f"{name}.pth"
            chosen = Namespace(**vars(self.args) | {"load_from": "model", "weight": str(path), "hidden_size": None})
        return Assistant(find_trained(chosen), self.device, chosen.dtype, chosen.compile)

    def assistant(self, name: str) -> Assistant:
        """Returns the assistant of that name; raises Refused."""
        try:
            with self.loading:
                return self.load(name)
        except UsageError as error:
            raise Refused("no_weights", reason=str(error)) from error

    def about(self, name: str, texts: dict) -> str:
        """Says which model is asked, as HTML."""
        try:
            text = seen_by(self.assistant(name).trained, name, texts)
        except Refused as refused:
            text = texts[refused.text].format(**refused.values)
        return ABOUT.render(text=text)

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

    def copy_photos(self) -> list[Path]:
        photos = sorted((ROOT / "dataset" / "example" / "photos").iterdir())[:EXAMPLES]
        return [Path(shutil.copy(photo, self.folder)) for photo in photos]

    def answer(self, session: Session, texts: dict, name: str, asked: dict, settings: tuple) -> Iterator[tuple]:
        """Yields the conversation as HTML while a question is answered, and whether the question was accepted.

        Args:
            asked: "question", and "files", the pictures' paths.
            settings: Longest answer, temperature, top-p.
        """
        length, temperature, top_p = settings
        session.stop.set()  # the maps of the answer before
        session.stop, session.to_look = threading.Event(), None
        try:
            assistant = self.assistant(name)
            add_question(assistant, session, asked["question"], asked["files"], length)
        except Refused as refused:
            session.turns.append({"error": texts[refused.text].format(**refused.values)})
            yield self.render(session, texts), False
            return
        for file in asked["files"]:
            self.uploads.asked(file)
        for _ in stream(assistant, session, texts, length, temperature, top_p):
            if session.is_over:
                return
            yield self.render(session, texts), True

    def render(self, session: Session, texts: dict) -> str:
        return TEMPLATE.render(turns=session.turns, texts=texts)


def texts_for(request) -> dict:
    """Returns the page's texts in the browser's language."""
    accepted = request.headers.get("accept-language", "") if request else ""
    return TEXTS["zh" if accepted.lower().startswith("zh") else "en"]


def build_page(gr, demo: Demo):
    """Lays out the page; returns the gradio Blocks and the texts that its labels are translated with."""
    text = gr.I18n(**TEXTS, **dict.fromkeys(("zh-CN", "zh-TW"), TEXTS["zh"]))
    gr.set_static_paths(demo.folder)  # the examples lie there, not among the uploads
    with gr.Blocks(title="MiniMind-V", analytics_enabled=False, delete_cache=(600, FORGOTTEN_AFTER)) as page:
        session = gr.State(time_to_live=FORGOTTEN_AFTER)  # a Session, from the page's load event on
        gr.Markdown("# MiniMind-V")
        about = gr.HTML(demo.about(demo.first, TEXTS["en"]), elem_id="about")
        talk = gr.HTML(TEMPLATE.render(turns=[], texts=TEXTS["en"]), elem_id="talk")
        kinds = {"file_types": ["image"], "file_count": "multiple", "sources": ["upload"]}
        box = gr.MultimodalTextbox(label=text("question"), elem_id="question", **kinds)
        with gr.Row():
            stop = gr.Button(text("stop"), elem_id="stop")
            new = gr.Button(text("new"), elem_id="new")
        gr.Markdown(text("examples"))
        gallery = {"columns": EXAMPLES, "height": "auto", "allow_preview": False, "interactive": False, "buttons": []}
        examples = gr.Gallery(demo.examples, show_label=False, elem_id="examples", **gallery)
        with gr.Accordion(text("camera"), open=False):
            camera = gr.Image(sources=["webcam"], type="filepath", image_mode=None, show_label=False)
        with gr.Accordion(text("settings"), open=False):
            weights = gr.Dropdown(demo.names(), value=demo.first, label=text("weights"), elem_id="weights")
            temperature = gr.Slider(0, 1.5, demo.sampling["temperature"], step=0.05, label=text("temperature"))
            top_p = gr.Slider(0.05, 1, demo.sampling["top_p"], step=0.05, label=text("top_p"))
            length = gr.Slider(8, 1024, demo.args.max_new_tokens, step=8, label=text("length"))
        settings = [weights, length, temperature, top_p]

        def ask(session, asked, photo, name, length, temperature, top_p, request: gr.Request):
            session = going_on(session)
            files = [Path(file) for file in (*asked["files"], photo) if file]
            asked = {"question": asked["text"] or "", "files": files}
            for html, accepted in demo.answer(session, texts_for(request), name, asked, (length, temperature, top_p)):
                yield session, html, *((None, None) if accepted else (gr.skip(), gr.skip()))

        def describe(session, name, length, temperature, top_p, chosen: gr.SelectData, request: gr.Request):
            session, texts = going_on(session), texts_for(request)
            asked = {"question": texts["describe"], "files": [demo.examples[chosen.index]]}
            for html, _ in demo.answer(session, texts, name, asked, (length, temperature, top_p)):
                yield session, html

        def show_maps(session, request: gr.Request):
            if not session or not session.to_look:
                return gr.skip()
            to_look, session.to_look = session.to_look, None
            has_maps = to_look()
            return demo.render(session, texts_for(request)) if has_maps and not session.is_over else gr.skip()

        def begin_anew(session, name, request: gr.Request):
            if session:
                session.is_over = True
                session.stop.set()
            texts = texts_for(request)
            return Session(), demo.render(Session(), texts), demo.about(name, texts)

        # One answer at a time, over all visitors: a second question of a tab waits for the first. Maps take minutes on
        # a CPU, so they have a queue of their own: nobody's question waits for them.
        answering = {"show_progress": "hidden", "concurrency_id": "answers", "concurrency_limit": 1}
        looking = {"show_progress": "hidden", "concurrency_id": "maps", "concurrency_limit": 1}
        for asking in (
            box.submit(ask, [session, box, camera, *settings], [session, talk, box, camera], **answering),
            examples.select(describe, [session, *settings], [session, talk], **answering),
        ):
            asking.then(show_maps, [session], [talk], **looking)
        stop.click(lambda session: session and session.stop.set(), [session], queue=False)
        for event in (new.click, weights.change, page.load):
            event(begin_anew, [session, weights], [session, talk, about], queue=False)
    return page.queue(max_size=MOST_WAITING, api_open=False), text


def going_on(session: Session | None) -> Session:
    """Returns the session, or a new one where it is over or was forgotten."""
    return Session() if session is None or session.is_over else session


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
    for number in SIGNALS:
        if number != signal.SIGINT and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, leave)
    with Processes.start(args.device) as processes, tempfile.TemporaryDirectory() as folder:
        quiet_libraries(True)
        demo = Demo(args, processes.device, Path(folder))
        os.environ["GRADIO_TEMP_DIR"] = str(demo.uploads.folder)
        page, text = build_page(gr, demo)
        options = {"server_name": args.host, "server_port": args.port, "share": args.share, "i18n": text}
        options |= {"max_file_size": LARGEST_FILE, "css": Path(__file__).with_name("web_demo.css").read_text()}
        names = None if args.share else own_names(args.host)
        options |= {"app_kwargs": {"middleware": [(Guard, (demo.uploads, MOST_PICTURES * LARGEST_FILE, names), {})]}}
        try:
            page.launch(**options, footer_links=[], show_error=False)
        except OSError as error:
            raise UsageError(f"--port {args.port} cannot be used ({error}): choose another") from error
        finally:
            CLOSING.set()
            if page.server:
                page.server.force_exit = True  # browsers hold connections open
            page.close(verbose=False)  # before the uploads' folder goes


def leave(number: int, frame):
    raise Stopped(number)


if __name__ == "__main__":
    run_script(main)
