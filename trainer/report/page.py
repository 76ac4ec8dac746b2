"""The run's page: curves, images with their descriptions, and settings, in one HTML file that needs nothing else.

It shows what the run's files hold and names those that are missing. page.html is its Jinja2 template (torch requires
Jinja2), autoescaped: text from the files must not become markup.
"""

import io
import math
import statistics
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

from common.errors import UsageError
from common.files import write_atomically
from common.paths import BUILTIN_DATASET_DIR, display_path
from common.schema import Range, SchemaError, parse_json, read_json
from dataset.pictures import PictureError, load_picture
from model.weights import PLAIN, SIDECAR
from trainer.evaluate import perplexity
from trainer.report import charts
from trainer.report.charts import line_chart
from trainer.report.progress import clock, reports_until
from trainer.report.samples import LOOKS, SAMPLE, read_lines, read_looks
from trainer.report.verdict import verdict
from trainer.setup import RunFiles

MOST_IMAGES, MOST_STRETCHES, MOST_EPOCHS = 8, 6, 12
OVERFITTED = 1.05  # ratio of the last held-out loss to the lowest
FAR_ABOVE = 1.0  # nats per token between the held-out loss and the training loss
DARKEST = 0.75  # opacity over a patch that does nothing for a word
BRIGHT = 1.0  # nats: a word whose peak is lower stays darker
MAIN_SETTINGS = (
    *("hidden_size", "num_hidden_layers", "use_moe", "projector", "image_tokens", "--from_weight", "--freeze_llm"),
    *("--data_path", "--images_path", "--epochs", "--batch_size", "--accumulation_steps", "--learning_rate"),
    *("--grad_clip", "--max_seq_len", "--dtype", "--device", "--seed"),
)
FIGURES = (
    ("learned_tokens", "learned tokens", ",.0f", sum),
    ("samples_per_second", "samples/s, median", ",.1f", statistics.median),
    ("data_wait", "waiting for data, median", ".1%", statistics.median),
    ("skipped_pictures", "samples skipped, image unreadable", ",.0f", max),
    ("skipped_steps", "steps skipped, loss not finite", ",.0f", max),
)
COUNT, SHARE = Range(int, 0, 1 << 53), (float, int, None)
METRIC = {"step": COUNT, "epoch": COUNT, "eval?": dict}
SCENES = {"step": COUNT, "scenes": COUNT, "rows": [{"name": str, "attributes?": SHARE, "captions?": SHARE}]}
RECORDED = SIDECAR | {"config": {"*": PLAIN}}  # it is shown, not used


@dataclass
class Record:
    """The contents of a run's files; `missing` gives the reason for each that cannot be shown."""

    folder: Path
    name: str
    training: list[dict]
    evaluations: list[dict]
    sidecar: dict = field(default_factory=lambda: {"arguments": {}, "config": {}, "versions": {}})
    samples: list[dict] = field(default_factory=list)
    scenes: dict = field(default_factory=dict)
    looks: dict = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def learns_scenes(self) -> bool:
        """Whether the data is the built-in set."""
        data = self.sidecar["arguments"].get("data_path") or display_path(BUILTIN_DATASET_DIR)
        return self.sidecar.get("assets") == "built-in" and str(data).startswith(display_path(BUILTIN_DATASET_DIR))


def read_record(folder: Path, name: str) -> Record:
    """Reads a run's files.

    Raises:
        UsageError: If its metrics are missing, unreadable or empty.
    """
    files = RunFiles(folder, name)
    try:
        rows = [parse_json(line, METRIC) for line in reports_until(files.metrics, math.inf)]
    except (OSError, SchemaError) as error:
        reason = getattr(error, "strerror", error)
        raise UsageError(f"{display_path(files.metrics)} cannot be read: {reason}") from error
    if not rows:
        raise UsageError(f"{display_path(files.metrics)} is missing or holds no training step: nothing was trained yet")
    evaluations = [{**row["eval"], "step": row["step"]} for row in rows if "eval" in row]
    record = Record(folder, name, [row for row in rows if "eval" not in row], evaluations)
    parts = {
        "sidecar": (folder / f"{name}.json", lambda path: record.sidecar | read_json(path, RECORDED)),
        "samples": (files.samples / "samples.jsonl", lambda path: read_lines(path, SAMPLE)),
        "scenes": (files.samples / "scenes.json", lambda path: read_json(path, SCENES)),
        "looks": (files.samples / LOOKS, read_looks),
    }
    for part, (path, read) in parts.items():
        try:
            setattr(record, part, read(path))
        except FileNotFoundError:
            if part in ("sidecar", "samples"):  # not every run has scenes or maps
                record.missing[part] = f"{display_path(path)} is not there"
        except (OSError, ValueError) as error:
            record.missing[part] = f"{display_path(path)} cannot be read ({error})"
    return record


def is_finite(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def points(rows: list[dict], key: str) -> list[tuple[int, float | None]]:
    """Returns (step, value) of each row, None for a value that is missing or not finite."""
    return [(row["step"], row[key] if is_finite(row.get(key)) else None) for row in rows]


def values(rows: list[dict], key: str) -> list[float]:
    return [value for _, value in points(rows, key) if value is not None]


def last_of(rows: list[dict], key: str) -> float | None:
    return (values(rows, key) or [None])[-1]


def summary(record: Record) -> dict:
    sidecar, loss = record.sidecar, last_of(record.evaluations, "loss")
    data = "built-in scenes" if record.learns_scenes else sidecar["arguments"].get("data_path")
    facts = [sidecar.get("title"), sidecar.get("assets") == "built-in" and "built-in model"]
    facts += [data and f"data {data}", sidecar.get("written", "")[:16].replace("T", " ")]
    seconds = [0.0, *values(record.training, "seconds")]  # a resumed run counts from zero again
    return {
        "facts": filter(None, facts),
        "outcome": "Training" if loss is None else "Held-out",
        "loss": last_of(record.training, "loss") if loss is None else loss,
        "gap": last_of(record.evaluations, "gap_shuffled"),
        "last_step": max(row["step"] for row in record.training + record.evaluations),
        "duration": clock(sum(b - a if b >= a else b for a, b in pairwise(seconds))),
        "verdict": judgement(record),
    }


def judgement(record: Record) -> list[str]:
    """Interprets the losses and the gap by the rules of trainer/README.md."""
    losses = [(loss, step) for step, loss in points(record.evaluations, "loss") if loss is not None]
    if not losses:
        return ["Nothing was held out, so the loss on new images was not measured."]
    trained = last_of(record.training, "loss")
    (first, _), (last, _), (best, step) = losses[0], losses[-1], min(losses)
    sentences = verdict(record.evaluations[-1], record.sidecar)
    if last > OVERFITTED * best:
        lowest = f"The held-out loss was lowest at step {step:,} ({best:.3f}) and has risen since"
        sentences.append(f"{lowest}: the model overfits. Use fewer epochs or more data.")
    elif last < first:
        sentences.append(f"The held-out loss {'fell to the end' if last == best else 'has levelled off'}.")
    if trained is not None and last > trained + FAR_ABOVE:
        sentences.append("The held-out loss is far above the training loss: use more data, or data of the same kind.")
    return sentences


def curves(record: Record) -> dict:
    rows, held_out = record.training, record.evaluations
    epochs = [row["step"] for row, later in pairwise(rows) if row["epoch"] != later["epoch"]]
    epochs = epochs if len(epochs) < MOST_EPOCHS else []
    losses = {"training": points(rows, "loss"), "held out": points(held_out, "loss")}
    gaps = {"shuffled images": points(held_out, "gap_shuffled"), "no images": points(held_out, "gap_blind")}
    drawn = {
        "Loss": line_chart("nats per token", losses, epochs, may_be_log=True),
        "Grounding gap": line_chart("nats per token", gaps, epochs),
        "Learning rate": line_chart("", {"learning rate": points(rows, "learning_rate")}, epochs),
        "Speed": line_chart("samples/s", {"speed": points(rows, "samples_per_second")}, epochs),
    }
    figures = {what: format(of(found), form) for key, what, form, of in FIGURES if (found := values(rows, key))}
    return {"charts": drawn, "epochs": epochs, "figures": figures}


def descriptions(record: Record) -> list[dict]:
    """Returns each image with its reference and its descriptions over time, equal ones in a row together."""
    by_image = {}
    for row in record.samples:  # a run that was resumed at its end describes twice at a step: the later counts
        by_image.setdefault((row["picture"], row["prompt"]), {})[row["step"]] = row
    images = []
    for (name, prompt), rows in list(by_image.items())[:MOST_IMAGES]:
        stretches = [list(alike) for _, alike in groupby(rows.values(), lambda row: row["description"])]
        shown = np.linspace(0, len(stretches) - 1, min(len(stretches), MOST_STRETCHES)).round().astype(int)
        last = stretches[-1][-1]
        words = record.looks.get((last["step"], name, prompt), [])
        if "".join(word for word, _ in words).strip() != last["description"]:  # they belong to another description
            words = []
        words = [(word.strip(), of_word) for word, of_word in words if any(map(str.isalnum, word))]
        images.append(
            {
                "name": name,
                "data": base64_image(RunFiles(record.folder, record.name).samples / Path(name).name),
                "question": " ".join(prompt.replace("<image>", " ").split()),
                "reference": last["reference"],
                "stretches": [stretches[number] for number in shown],
                "words": [word for word, _ in words],
                "maps": base64_mask([of_word for _, of_word in words]) if words else None,
            }
        )
    return images


def base64_mask(maps: list[np.ndarray]) -> str:
    file = io.BytesIO()
    mask_of(maps).save(file, "PNG", optimize=True)
    return b64encode(file.getvalue()).decode()


def mask_of(maps: Sequence[np.ndarray]) -> Image.Image:
    """Returns maps (H, W) side by side as a mask that darkens where their words do not look.

    Each is scaled by its own peak, so that it shows where; but a word that no patch makes more probable stays dark.
    """
    maps = [np.nan_to_num(of_word).clip(0) for of_word in maps]
    bright = np.hstack([of_word / max(of_word.max(), BRIGHT) for of_word in maps])
    shade = np.rint(255 * DARKEST * (1 - bright)).astype(np.uint8)
    return Image.fromarray(np.dstack((np.zeros_like(shade), shade)), "LA")


def base64_image(path: Path) -> str | None:
    """Returns an image file; None if it is missing, a link, or no image: a page is shown to others."""
    try:
        if path.is_symlink() or path.parent.is_symlink():
            return None
        load_picture(content := path.read_bytes(), path.name)
        return b64encode(content).decode()
    except (OSError, PictureError):
        return None


def settings(record: Record) -> dict:
    """Returns the run's main settings, the other ones, and the versions of its packages."""
    every = {f"--{name}": value for name, value in record.sidecar["arguments"].items()} | record.sidecar["config"]
    return {
        "main_settings": {name: every[name] for name in MAIN_SETTINGS if name in every},
        "other_settings": {name: value for name, value in every.items() if name not in MAIN_SETTINGS},
        "versions": record.sidecar["versions"] | {"this project": record.sidecar.get("git_commit") or "unknown"},
    }


def number(value: float | None, form: str = ",.0f") -> str:
    return format(value, form) if is_finite(value) else "–"


def write_report(out_dir: Path, name: str) -> Path:
    """Writes {out_dir}/{name}.report.html, whole or not at all, and returns its path.

    Raises:
        UsageError: If there are no metrics to show, or the page cannot be written.
    """
    record = read_record(Path(out_dir), name)
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = number
    environment.globals |= {"frame": charts, "perplexity": perplexity}
    sections = summary(record) | curves(record) | settings(record)
    page = environment.get_template("page.html").render(record=record, images=descriptions(record), **sections)
    path = Path(out_dir) / f"{name}.report.html"
    write_atomically(path, lambda file: file.write(page.encode("utf-8", errors="replace")))
    return path
