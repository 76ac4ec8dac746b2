"""Write the model card of a published model: its README.md on the hub, with sample images.

model_card.md.jinja is the card's template. Text from the run's files is escaped, so that it cannot become markup.
"""

import json
import re
import shlex
from base64 import b64decode
from dataclasses import dataclass, replace
from pathlib import Path

import jinja2
from huggingface_hub import EvalResult, ModelCardData

from common.paths import TOWER_DIR, display_path
from dataset.chat import IMAGE_TAG
from dataset.prompts import DEFAULT_FORM
from dataset.scenes.language import DESCRIBE
from trainer.report import page

CARD, PICTURES = "README.md", "samples"  # names on the hub
TOWER_NAME, TOWER_WIDTH = "openai/clip-vit-base-patch16", 768
TAGS = {"transformers": ["llava"], "gguf": ["llama.cpp", "llava"], "weights": []}
LOSSES = {
    "loss": "loss, right images",
    "loss_shuffled": "loss, images of other rows",
    "loss_blind": "loss, no images",
    "gap_shuffled": "grounding gap",
}


@dataclass(frozen=True)
class Model:
    """A model to publish.

    Attributes:
        kind: "transformers", "gguf" or "weights" (the original's format).
        name: Its run's name.
        files: Path or content of each file by its name on the hub.
        sees_images: Whether it has a projection.
        sidecar: How it was made; "arguments", "config" and "versions" may be empty.
        parameters: Of decoder and projection; None where the files do not tell.
    """

    kind: str
    name: str
    files: dict[str, Path | bytes]
    sees_images: bool
    sidecar: dict
    parameters: int | None

    @property
    def tower(self) -> str | None:
        """The name of its vision tower on the hub if that is the published one."""
        path = self.sidecar["arguments"].get("vision_model_path")
        width = self.sidecar["config"].get("vision_hidden_size")
        is_published = path == display_path(TOWER_DIR) if path else width == TOWER_WIDTH
        is_builtin = self.sidecar.get("assets") == "built-in"
        return TOWER_NAME if self.sees_images and is_published and not is_builtin else None


def card_files(
    model: Model, record: page.Record, repo: str, licence: str, languages: list[str], with_samples: bool
) -> dict[str, bytes]:
    """Returns the card and its images by name on the hub; without metrics in the record the card says less."""
    task = "image-text-to-text" if model.sees_images else "text-generation"
    results = eval_results(record, task)
    metadata = ModelCardData(
        license=licence,
        language=languages,
        pipeline_tag=task,
        library_name=None if model.kind == "weights" else model.kind,
        base_model=model.tower,
        tags=["minimind-v", *(TAGS[model.kind] if model.sees_images else ())],
        model_name=record.name,
        eval_results=results or None,
    )
    images = [image for image in page.descriptions(record) if image["data"] is not None] if with_samples else []
    samples = [(f"{PICTURES}/{Path(image['name']).name}", image) for image in images]
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"number": page.number, "text": lambda value: as_text(str(value)), "quote": shlex.quote}
    environment.filters |= {"literal": lambda text: json.dumps(text, ensure_ascii=False)}
    shown = replace(record, sidecar=model.sidecar)
    llm = model.sidecar.get("config", {}).get("llm")
    text = environment.get_template("model_card.md.jinja").render(
        model=model,
        decoder=f"another language model, a {llm['model_type']} (its own licence holds),"
        if llm
        else "a MiniMind decoder",
        name=record.name,
        repo=repo,
        results=results,
        trained_loss=page.last_of(record.training, "loss"),
        samples=samples,
        question=images[0]["question"] if images else DESCRIBE,
        image_first=model.sidecar.get("prompt_form", DEFAULT_FORM).startswith(IMAGE_TAG),
        knows_scenes=shown.learns_scenes,
        **page.settings(shown),
    )
    card = f"---\n{metadata.to_yaml()}\n---\n\n{text}".encode()
    return {CARD: card} | {path: b64decode(image["data"]) for path, image in samples}


def eval_results(record: page.Record, task: str) -> list[EvalResult]:
    """Returns the last held-out losses (nats per token)."""
    last = record.evaluations[-1] if record.evaluations else {}
    samples = f"{page.number(last.get('samples'))} held-out samples"
    return [
        EvalResult(task, "held-out", samples, "loss", last[key], metric_name=name)
        for key, name in LOSSES.items()
        if page.is_finite(last.get(key))
    ]


def as_text(text: str) -> str:
    """Escapes text for a cell of a Markdown table: one line, no markup."""
    return " ".join(re.sub(r"[\\`*_{}\[\]<>#|~]", r"\\\g<0>", text).split())
