"""The run's page: curves, images with their descriptions, and settings, in one HTML file that needs nothing else.

It shows what the run's files hold and names those that are missing. page.html is its Jinja2 template (torch requires
Jinja2), autoescaped: text from the files must not become markup.
"""

import math
from base64 import b64encode
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path

import jinja2

from common.errors import UsageError
from common.files import write_atomically
from common.paths import BUILTIN_DATASET_DIR, display_path
from common.schema import Range, SchemaError, parse_json, read_json
from dataset.pictures import PictureError, load_picture
from model.weights import PLAIN, SIDECAR
from trainer.report import charts
from trainer.report.charts import Chart, line_chart
from trainer.report.progress import clock, reports_until
from trainer.report.samples import read_samples
from trainer.report.verdict import verdict
from trainer.setup import RunFiles

MOST_IMAGES, MOST_STRETCHES = 8, 6
OVERFITTED = 1.05  # ratio of the last held-out loss to the lowest
FAR_ABOVE = 1.0  # nats per token between the held-out loss and the training loss
MAIN_SETTINGS = (
    *("hidden_size", "num_hidden_layers", "use_moe", "projector", "image_tokens", "--from_weight", "--freeze_llm"),
    *("--data_path", "--images_path", "--epochs", "--batch_size", "--accumulation_steps", "--learning_rate"),
    *("--grad_clip", "--max_seq_len", "--dtype", "--device", "--seed"),
)
COUNT = Range(int, 0, 1 << 53)
METRIC = {"step": COUNT, "epoch": COUNT, "eval?": dict}
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
    parts = {"sidecar": folder / f"{name}.json", "samples": files.samples / "samples.jsonl"}
    for part, path in parts.items():
        try:
            found = read_samples(path) if part == "samples" else record.sidecar | read_json(path, RECORDED)
            setattr(record, part, found)
        except FileNotFoundError:
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


def curves(record: Record) -> dict[str, Chart | None]:
    rows, held_out = record.training, record.evaluations
    losses = {"training": points(rows, "loss"), "held out": points(held_out, "loss")}
    gaps = {"shuffled images": points(held_out, "gap_shuffled"), "no images": points(held_out, "gap_blind")}
    return {
        "Loss": line_chart("nats per token", losses, may_be_log=True),
        "Grounding gap": line_chart("nats per token", gaps),
        "Learning rate": line_chart("", {"learning rate": points(rows, "learning_rate")}),
        "Speed": line_chart("samples/s", {"speed": points(rows, "samples_per_second")}),
    }


def descriptions(record: Record) -> list[dict]:
    """Returns each image with its reference and its descriptions over time, equal ones in a row together."""
    by_image = {}
    for row in record.samples:  # a run that was resumed at its end describes twice at a step: the later counts
        by_image.setdefault((row["picture"], row["prompt"]), {})[row["step"]] = row
    images = []
    for (name, prompt), rows in list(by_image.items())[:MOST_IMAGES]:
        stretches = [list(alike) for _, alike in groupby(rows.values(), lambda row: row["description"])]
        images.append(
            {
                "name": name,
                "data": base64_image(RunFiles(record.folder, record.name).samples / Path(name).name),
                "question": " ".join(prompt.replace("<image>", " ").split()),
                "reference": stretches[-1][-1]["reference"],
                "stretches": stretches[:1] + stretches[1:][1 - MOST_STRETCHES :],
            }
        )
    return images


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
    """Returns the run's main settings, and the versions of its packages; the sidecar has the others."""
    every = {f"--{name}": value for name, value in record.sidecar["arguments"].items()} | record.sidecar["config"]
    return {
        "settings": {name: every[name] for name in MAIN_SETTINGS if name in every},
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
    environment.globals["frame"] = charts
    sections = {"charts": curves(record), "images": descriptions(record)} | summary(record) | settings(record)
    page = environment.get_template("page.html").render(record=record, **sections)
    path = Path(out_dir) / f"{name}.report.html"
    write_atomically(path, lambda file: file.write(page.encode("utf-8", errors="replace")))
    return path
