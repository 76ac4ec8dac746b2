"""The web page: its layout in gradio, and what happens when somebody asks."""

import html
from collections.abc import Iterator
from pathlib import Path

import gradio as gr

from dataset.scenes.language import CHINESE, ENGLISH
from scripts.demo.chat import TEXTS, Refused, Session, Turn, add_maps, add_question, answer, describe_model
from scripts.demo.guard import Uploads
from trainer.answering.assistant import Assistant

MOST_WAITING = 32  # requests
FORGOTTEN_AFTER = 3600  # seconds without a question
LABELS = gr.I18n(**TEXTS, **dict.fromkeys(("zh-CN", "zh-TW"), TEXTS["zh"]))  # in the browser's language


def language_of(request: gr.Request) -> str:
    return "zh" if request.headers.get("accept-language", "").lower().startswith("zh") else "en"


class Handlers:
    """What the page does for a visitor; the arguments are its components' values, in their order."""

    def __init__(self, assistant: Assistant, sampling: dict, examples: list[Path], uploads: Uploads):
        self.assistant, self.sampling, self.examples, self.uploads = assistant, sampling, examples, uploads

    def start(self, session: Session | None, request: gr.Request) -> tuple[Session, str, str]:
        session, texts = session or Session(), TEXTS[language_of(request)]
        session.stop()
        session.turns.clear()
        about = html.escape(describe_model(self.assistant.loaded, texts))
        return session, session.render(texts), f'<p class="note">{about}</p>'

    def ask(self, box: dict, camera: str | None, session, temperature, top_p, length, request: gr.Request):
        files = [Path(file) for file in (*box["files"], camera) if file]
        for going_on, talk in self.stream(session, box["text"], files, temperature, top_p, length, request):
            emptied = gr.skip() if going_on.turns and going_on.turns[-1].error else None  # a refused question stays
            yield going_on, talk, emptied, emptied

    def describe(self, session, temperature, top_p, length, chosen: gr.SelectData, request: gr.Request):
        question = {"zh": CHINESE, "en": ENGLISH}[language_of(request)].requests[0]
        yield from self.stream(session, question, [self.examples[chosen.index]], temperature, top_p, length, request)

    def stream(self, session, question, files, temperature, top_p, length, request) -> Iterator[tuple[Session, str]]:
        session, texts = session or Session(), TEXTS[language_of(request)]  # None: forgotten
        session.stop()  # the maps of the answer before
        try:
            add_question(self.assistant, session, question, files, length)
        except Refused as refused:
            text, values = refused.args
            session.turns.append(Turn(error=texts[text].format(**values)))
            yield session, session.render(texts)
            return
        for file in files:
            self.uploads.use(file)
        sampling = self.sampling | {"temperature": temperature, "top_p": top_p}
        for _ in answer(self.assistant, session, texts, length, **sampling):
            yield session, session.render(texts)

    def show_maps(self, session: Session | None, request: gr.Request):
        return session.render(TEXTS[language_of(request)]) if session and add_maps(session) else gr.skip()


def build_page(handlers: Handlers, max_new_tokens: int) -> gr.Blocks:
    """Lays out the page and connects it with its handlers; the sliders start at their sampling settings."""
    gr.set_static_paths(handlers.examples[0].parent)  # or they would be copied among the uploads
    with gr.Blocks(title="MiniMind-V", analytics_enabled=False, delete_cache=(600, FORGOTTEN_AFTER)) as page:
        session = gr.State(time_to_live=FORGOTTEN_AFTER)
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
        settings, quiet = [session, temperature, top_p, length], {"show_progress": "hidden", "concurrency_limit": 1}
        asked = box.submit(
            handlers.ask, [box, camera, *settings], [session, talk, box, camera], concurrency_id="answers", **quiet
        )
        chosen = examples.select(handlers.describe, settings, [session, talk], concurrency_id="answers", **quiet)
        for asking in (asked, chosen):
            asking.then(handlers.show_maps, [session], [talk], concurrency_id="maps", **quiet)
        stop.click(lambda session: session and session.stop(), [session], queue=False)
        for event in (new.click, page.load):
            event(handlers.start, [session], [session, talk, about], queue=False)
    return page.queue(max_size=MOST_WAITING, api_open=False)
