"""Write the model card of a published model: its README.md on the hub, and the loss curve beside it.

model_card.md.jinja is the card's template. Text from the run's files is escaped, so that it cannot become markup.
"""

import io
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import jinja2
from huggingface_hub import ModelCardData
from PIL import Image, ImageDraw, ImageFont

from common.paths import TOWER_DIR, display_path
from dataset.conversation import IMAGE_TAG
from dataset.prompts import DEFAULT_FORM
from dataset.scenes.language import DESCRIBE
from trainer.watch import charts, page
from trainer.watch.charts import Series, line_chart, tick_label, value_label
from trainer.watch.heldout import perplexity
from trainer.watch.samples import as_text

CURVE, PICTURES = "loss.png", "samples"  # their names on the hub
TOWER_NAME, TOWER_WIDTH = "openai/clip-vit-base-patch16", 768
TAGS = {"transformers": ("llava",), "gguf": ("llama.cpp", "llava"), "weights": ()}
LIBRARIES = {"transformers": "transformers", "gguf": "gguf", "weights": None}
SCALE, HEAD = 4, 30  # pixels per drawing unit before the picture is halved; units above the chart, for its legend
PAPER, INK, QUIET, GRID = "#ffffff", "#1d2126", "#626b76", "#e4e7eb"
COLOURS = ("#2b6cb0", "#c05621")


@dataclass(frozen=True)
class Model:
    """What is published, as far as its files say it.

    Attributes:
        kind: "transformers", "gguf" or "weights" (the original's format).
        name: The name of its run.
        files: The name on the hub of each of its files, and where it lies.
        sees_images: Whether it has a projection.
        sidecar: How it was made; "arguments", "config" and "versions" are there, maybe empty.
        parameters: Of decoder and projection; None where the files do not tell.
    """

    kind: str
    name: str
    files: dict[str, Path]
    sees_images: bool
    sidecar: dict
    parameters: int | None

    @property
    def tower(self) -> str | None:
        """The hub's name of its vision tower, where that is the published one."""
        path = self.sidecar["arguments"].get("vision_model_path")
        width = self.sidecar["config"].get("vision_hidden_size")
        is_published = path == display_path(TOWER_DIR) if path else width == TOWER_WIDTH
        is_builtin = self.sidecar.get("assets") == "built-in"
        return TOWER_NAME if self.sees_images and is_published and not is_builtin else None


def without_folders(sidecar: dict) -> dict:
    """Returns a sidecar whose absolute paths are cut to their last part: they name a person's folders."""

    def cut(value):
        is_path = isinstance(value, str) and (PurePosixPath(value).is_absolute() or PureWindowsPath(value).drive)
        return PureWindowsPath(value).name if is_path else value

    arguments = sidecar.get("arguments")
    if not isinstance(arguments, dict):
        return sidecar
    return sidecar | {"arguments": {name: cut(value) for name, value in arguments.items()}}


def sample_rows(record: page.Record) -> list[dict]:
    """Returns the described images that are there: {"name", "question", "reference", "description"} each."""
    images = [image for image in page.descriptions(record) if image["data"] is not None]
    names = [{"name": Path(image["name"]).name} for image in images]
    said = [{"description": image["stretches"][-1][-1]["description"]} for image in images]
    return [image | name | last for image, name, last in zip(images, names, said, strict=True)]


def write_card(model: Model, record: page.Record, samples: list[dict], repo: str, licence: str, languages: Sequence):
    """Returns the card as Markdown, in the hub's format.

    Args:
        model: What is published.
        record: Of its run; without metrics the card says less.
        samples: Of `sample_rows`, those whose images go with the card.
        repo: NAME/REPO.
        licence: The hub's id of a licence.
        languages: ISO codes.
    """
    metadata = ModelCardData(
        license=licence,
        language=list(languages),
        pipeline_tag="image-text-to-text" if model.sees_images else "text-generation",
        library_name=LIBRARIES[model.kind],
        base_model=model.tower,
        tags=["minimind-v", *(TAGS[model.kind] if model.sees_images else ())],
    )
    form = model.sidecar.get("prompt_form", DEFAULT_FORM)
    facts = {
        "weights": [name for name in model.files if not name.endswith((".json", ".jinja"))],
        "question": samples[0]["question"] if samples else DESCRIBE,
        "image_first": form.startswith(IMAGE_TAG),
        "last": record.evaluations[-1] if record.evaluations else None,
        "trained_loss": page.last_of(record.training, "loss"),
        "has_curve": bool(page.values(record.training, "loss")),
    }
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"number": page.number, "as_text": lambda value: as_text(str(value))}
    environment.filters |= {"quote": shlex.quote, "literal": lambda text: json.dumps(text, ensure_ascii=False)}
    environment.globals |= {"perplexity": perplexity, "CURVE": CURVE, "PICTURES": PICTURES}
    shown = page.Record(record.folder, record.name, record.training, record.evaluations, model.sidecar)
    template = environment.get_template("model_card.md.jinja")
    facts |= {"model": model, "record": record, "samples": samples, "repo": repo, "knows_scenes": shown.learns_scenes}
    return template.render(metadata=metadata.to_yaml(), **facts, **page.settings(shown))


def loss_curve(record: page.Record) -> bytes | None:
    """Draws training and held-out loss over the steps; returns a PNG, or None where there is no loss."""
    losses = [
        Series("training", page.points(record.training, "loss")),
        Series("held out", page.points(record.evaluations, "loss"), True),
    ]
    chart = line_chart("nats per token", losses, may_be_log=True)
    if chart is None:
        return None
    image = Image.new("RGB", (charts.WIDTH * SCALE, (charts.HEIGHT + HEAD) * SCALE), PAPER)
    pen = Pen(image)
    draw_axes(pen, chart)
    for curve, colour in zip(chart["curves"], COLOURS, strict=False):
        draw_curve(pen, chart, curve, colour)
    file = io.BytesIO()
    image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS).save(file, "PNG", optimize=True)
    return file.getvalue()


class Pen:
    """Draws on an image in the units of charts.py."""

    def __init__(self, image: Image.Image):
        self.draw, self.font = ImageDraw.Draw(image), ImageFont.load_default(12 * SCALE)

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float = 1.0):
        """Joins (x, y) points."""
        scaled = [(x * SCALE, (y + HEAD) * SCALE) for x, y in points]
        self.draw.line(scaled, colour, round(width * SCALE), joint="curve")

    def dot(self, x: float, y: float, colour: str):
        """Draws a point of a measurement."""
        x, y, radius = x * SCALE, (y + HEAD) * SCALE, 3 * SCALE
        self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), colour)

    def text(self, x: float, y: float, words: str, colour: str, anchor: str) -> float:
        """Writes; returns where the text ends. `anchor` is Pillow's: "rm" is right, middle."""
        place = (x * SCALE, (y + HEAD) * SCALE)
        self.draw.text(place, words, colour, self.font, anchor)
        return self.draw.textbbox(place, words, self.font, anchor)[2] / SCALE


def draw_axes(pen: Pen, chart: dict):
    """Draws grid, ticks, the axes' names and the legend."""
    left, right, bottom = charts.LEFT, charts.RIGHT, charts.BOTTOM
    for mark in chart["marks"]:
        height = chart["y"](mark)
        pen.line([(left, height), (right, height)], GRID)
        pen.text(left - 7, height, tick_label(mark), QUIET, "rm")
    pen.line([(left, bottom), (right, bottom)], QUIET)
    for step in chart["steps"]:
        place = chart["x"](step)
        pen.line([(place, bottom), (place, bottom + 4)], QUIET)
        pen.text(place, bottom + 16, tick_label(step), QUIET, "mm")
    pen.text(charts.WIDTH - 4, bottom + 16, "step", QUIET, "rm")
    end = pen.text(8, -HEAD / 2, f"loss, {chart['unit']}", INK, "lm")
    for curve, colour in zip(chart["curves"], COLOURS, strict=False):
        pen.line([(end + 16, -HEAD / 2), (end + 34, -HEAD / 2)], colour, 2)
        end = pen.text(end + 39, -HEAD / 2, curve["series"].name, colour, "lm")


def draw_curve(pen: Pen, chart: dict, curve: dict, colour: str):
    """Draws one curve with its dots and its last value."""
    for stretch in curve["stretches"]:
        points = [(chart["x"](step), chart["y"](value)) for step, value in stretch]
        if len(points) > 1:
            pen.line(points, colour, 1.6)
        if curve["has_dots"] or len(points) == 1:
            for x, y in points:
                pen.dot(x, y, colour)
    pen.text(charts.RIGHT + 6, curve["label_y"], value_label(curve["last"]), colour, "lm")
