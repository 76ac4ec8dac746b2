"""The web page: its layout in gradio, and what happens when somebody asks."""

import html
import threading
from collections.abc import Iterator
from pathlib import Path

import gradio as gr

from dataset.scenes.language import CHINESE, ENGLISH
from scripts.demo.chat import EXAMPLES, TEXTS, Models, Refused, Session, add_question, answer, describe_model
from scripts.demo.guard import Uploads

MOST_WAITING = 32  # requests
FORGOTTEN_AFTER = 3600  # seconds without a question
LABELS = gr.I18n(**TEXTS, **dict.fromkeys(("zh-CN", "zh-TW"), TEXTS["zh"]))  # in the browser's language


def language(request: gr.Request | None) -> str:
    accepted = request.headers.get("accept-language", "") if request else ""
    return "zh" if accepted.lower().startswith("zh") else "en"


def about(models: Models, name: str, texts: dict) -> str:
    """Returns the line that says which model answers, as HTML."""
    try:
        text = describe_model(models.get(name).trained, name, texts)
    except Refused as refused:
        text = refused.message(texts)
    return f'<p class="note">{html.escape(text)}</p>'


def build_page(models: Models, uploads: Uploads) -> gr.Blocks:
    """Lays out the page."""
    gr.set_static_paths(models.examples[0].parent)  # or they would be copied among the uploads
    with gr.Blocks(title="MiniMind-V", analytics_enabled=False, delete_cache=(600, FORGOTTEN_AFTER)) as page:
        session = gr.State(time_to_live=FORGOTTEN_AFTER)  # a Session, from the page's load event on
        gr.Markdown("# MiniMind-V")
        model = gr.HTML(about(models, models.first, TEXTS["en"]), elem_id="about")
        talk = gr.HTML(Session().render(TEXTS["en"]), elem_id="talk")
        kinds = {"file_types": ["image"], "file_count": "multiple", "sources": ["upload"]}
        box = gr.MultimodalTextbox(label=LABELS("question"), elem_id="question", **kinds)
        with gr.Row():
            stop = gr.Button(LABELS("stop"), elem_id="stop")
            new = gr.Button(LABELS("new"), elem_id="new")
        gr.Markdown(LABELS("examples"))
        gallery = {"columns": EXAMPLES, "height": "auto", "allow_preview": False, "interactive": False, "buttons": []}
        examples = gr.Gallery(models.examples, show_label=False, elem_id="examples", **gallery)
        with gr.Accordion(LABELS("camera"), open=False):
            camera = gr.Image(sources=["webcam"], type="filepath", image_mode=None, show_label=False)
        with gr.Accordion(LABELS("settings"), open=False):
            weights = gr.Dropdown(models.names(), value=models.first, label=LABELS("weights"), elem_id="weights")
            most, warmest, least = models.args.max_new_tokens, models.sampling["temperature"], models.sampling["top_p"]
            temperature = gr.Slider(0, max(1.5, warmest), warmest, step=0.05, label=LABELS("temperature"))
            top_p = gr.Slider(min(0.05, least), 1, least, step=0.05, label=LABELS("top_p"))
            length = gr.Slider(min(8, most), max(1024, most), most, step=8, label=LABELS("length"))
        settings = {session, weights, temperature, top_p, length}

        def stream(values: dict, question: str, files: list[Path], texts: dict) -> Iterator[dict]:
            going_on = values[session]
            if going_on is None or going_on.is_over:  # forgotten, or begun again
                going_on = Session()
            going_on.stop.set()  # the maps of the answer before
            going_on.stop, going_on.add_maps = threading.Event(), None
            try:
                assistant = models.get(values[weights])
                add_question(assistant, going_on, question, files, values[length])
            except Refused as refused:
                going_on.turns.append({"error": refused.message(texts)})
                yield {session: going_on, talk: going_on.render(texts)}
                return
            for file in files:
                uploads.asked(file)
            sampling = {"temperature": values[temperature], "top_p": values[top_p]}
            for _ in answer(assistant, going_on, texts, values[length], **sampling):
                if going_on.is_over:
                    return
                yield {session: going_on, talk: going_on.render(texts), box: None, camera: None}

        def ask(values: dict, request: gr.Request):
            files = [Path(file) for file in (*values[box]["files"], values[camera]) if file]
            yield from stream(values, values[box]["text"] or "", files, TEXTS[language(request)])

        def describe(values: dict, chosen: gr.SelectData, request: gr.Request):
            question = (CHINESE if language(request) == "zh" else ENGLISH).requests[0]
            for update in stream(values, question, [models.examples[chosen.index]], TEXTS[language(request)]):
                yield {part: update[part] for part in (session, talk)}

        def show_maps(going_on: Session | None, request: gr.Request):
            if not going_on or not going_on.add_maps:
                return gr.skip()
            add_maps, going_on.add_maps = going_on.add_maps, None
            return going_on.render(TEXTS[language(request)]) if add_maps() and not going_on.is_over else gr.skip()

        def begin(before: Session | None, name: str, request: gr.Request):
            if before:
                before.is_over = True
                before.stop.set()
            texts = TEXTS[language(request)]
            return Session(), Session().render(texts), about(models, name, texts)

        # One answer at a time, over all visitors: a second question of a tab waits for the first. Maps take minutes on
        # a CPU, so they have a queue of their own: nobody's question waits for them.
        answering = {"show_progress": "hidden", "concurrency_id": "answers", "concurrency_limit": 1}
        looking = {"show_progress": "hidden", "concurrency_id": "maps", "concurrency_limit": 1}
        for asking in (
            box.submit(ask, settings | {box, camera}, [session, talk, box, camera], **answering),
            examples.select(describe, settings, [session, talk], **answering),
        ):
            asking.then(show_maps, [session], [talk], **looking)
        stop.click(lambda going_on: going_on and going_on.stop.set(), [session], queue=False)
        for event in (new.click, weights.change, page.load):
            event(begin, [session, weights], [session, talk, model], queue=False)
    return page.queue(max_size=MOST_WAITING, api_open=False)
