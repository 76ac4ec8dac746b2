"""The run's page: curves, images with their descriptions, and settings, in one HTML file that needs nothing else.

Its template, page.html, is autoescaped: text from the files must not become markup. (torch requires Jinja2.)
"""

import contextlib
import math
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path

import jinja2

from common.errors import UsageError
from common.files import write_atomically
from common.paths import BUILTIN_TOWER_DIR, display_path, is_builtin_data
from common.schema import SchemaError, parse_json, read_json
from dataset.pictures import PictureError, load_picture
from model.weights import PLAIN, SIDECAR
from trainer.evaluate import HeldOut
from trainer.report.progress import clock, reports_until
from trainer.resume import COUNT, RunFiles

LOSS = HeldOut.metric, HeldOut.unit
MOST_IMAGES, MOST_STRETCHES = 8, 6
OVERFITTED = 1.05  # ratio of the last held-out loss to the lowest
FAR_ABOVE = 1.0  # nats per token between the held-out loss and the training loss
FEW = 30  # short answers, which tell nothing
SMALL = 0.02  # of the held-out loss: a gap that is sure, but changes little of what is said
NOT, HARDLY = "It does not look at the images", "It hardly looks at the images"
UNWRITTEN = (
    "That is to be expected of stage 1: the language model stays as it is, and words that it has never written keep a "
    "high loss until stage 2 teaches them."
)
MAIN_SETTINGS = (
    *("hidden_size", "num_hidden_layers", "use_moe", "projector", "image_tokens", "--from_weight", "--freeze_llm"),
    *("--data_path", "--images_path", "--epochs", "--batch_size", "--accumulation_steps", "--learning_rate"),
    *("--grad_clip", "--max_seq_len", "--dtype", "--device", "--seed"),
)
METRIC = {"step": COUNT, "epoch": COUNT, "eval?": dict}
SAMPLE = {"step": COUNT} | dict.fromkeys(("picture", "prompt", "reference", "description"), str)
RECORDED = SIDECAR | {"config": {"*": PLAIN}}  # it is shown, not used
WIDTH, HEIGHT = 420, 236  # of a chart: its labels stay readable on a phone, where it fills the screen
LEFT, RIGHT, TOP, BOTTOM = 46, 410, 12, 206  # of the plotting area; the labels stand around it
MOST_DOTS = 25  # of a curve: more would touch
LOG_FROM = 20  # ratio of the highest value to the lowest from which an axis may be logarithmic


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
        return self.sidecar.get("assets") == "built-in" and is_builtin_data(self.sidecar["arguments"].get("data_path"))


def read_record(folder: Path, name: str) -> Record:
    """Reads a run's files; raises UsageError if its metrics are missing, unreadable or empty."""
    files = RunFiles(folder, name)
    try:
        rows = [parse_json(line, METRIC) for line in reports_until(files.metrics, math.inf)]
    except (OSError, SchemaError) as error:
        raise UsageError(f"{display_path(files.metrics)} cannot be read: {error}") from error
    if not rows:
        raise UsageError(f"{display_path(files.metrics)} is missing or holds no training step: nothing was trained yet")
    evaluations = [{**row["eval"], "step": row["step"]} for row in rows if "eval" in row]
    record = Record(folder, name, [row for row in rows if "eval" not in row], evaluations)
    parts = {"sidecar": folder / f"{name}.json", "samples": files.samples / "samples.jsonl"}
    for part, path in parts.items():
        try:
            if part == "sidecar":
                record.sidecar |= read_json(path, RECORDED)
            else:
                record.samples = [parse_json(line, SAMPLE) for line in path.read_bytes().splitlines()]
        except FileNotFoundError:
            record.missing[part] = f"{display_path(path)} is not there"
        except (OSError, ValueError) as error:
            record.missing[part] = f"{display_path(path)} cannot be read ({error})"
    return record


def is_finite(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def number(value: float | None, form: str = ",.0f") -> str:
    return format(value, form) if is_finite(value) else "–"


def points(rows: list[dict], key: str) -> list[tuple[int, float | None]]:
    """Returns (step, value) of each row, None for a value that is missing or not finite."""
    return [(row["step"], row[key] if is_finite(row.get(key)) else None) for row in rows]


def last_of(rows: list[dict], key: str) -> float | None:
    return next((row[key] for row in reversed(rows) if is_finite(row.get(key))), None)


def line_chart(unit: str, curves: dict[str, list[tuple[int, float | None]]], may_be_log=False) -> dict | None:
    """Lays out a chart over steps; None if no curve has a value.

    `curves` are (step, value) points by name, at rising steps; None is a gap. With `may_be_log` the axis need not show
    zero, and is logarithmic if the values span a wide range.

    Returns "unit"; "ends", each curve's name and last value; "lines" (style, [(x, y), ...]), "dots" (style, x, y,
    tooltip) and "texts" (x, y, text-anchor, text). Styles are CSS classes; c1, c2 ... are the curves'.
    """
    shown = [(step, value) for curve in curves.values() for step, value in curve if value is not None]
    if not shown:
        return None
    steps, values = zip(*shown, strict=True)
    low, high = min(values), max(values)
    if may_be_log and low > 0 and high / low >= LOG_FROM:
        unit, low, high = f"{unit}, log scale", low / 1.2, high * 1.2
        factors = (1, 2, 5) if high / low < 1000 else (1,)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        marks = [factor * 10.0**power for power in powers for factor in factors]
        marks = [mark for mark in marks if low <= mark <= high]
        y = axis(low, high, BOTTOM, TOP, math.log)
    else:
        if not may_be_log:
            low, high = min(0.0, low), max(0.0, high)
        if low == high:
            low, high = low - abs(low) / 10, high + (abs(high) / 10 or 1.0)
        marks = ticks(low, high)
        y = axis(marks[0], marks[-1], BOTTOM, TOP)
    last_step = max(1, *steps)
    x = axis(0, last_step, LEFT, RIGHT)
    ends, lines, dots, texts = [], [], [], []
    for mark in marks:
        lines.append(("grid" if mark else "axis", [(LEFT, y(mark)), (RIGHT, y(mark))]))
        texts.append((LEFT - 7, y(mark), "end", f"{mark:,g}"))
    lines.append(("axis", [(LEFT, BOTTOM), (RIGHT, BOTTOM)]))
    for step in (step for step in ticks(0, last_step) if step <= last_step and step == int(step)):
        lines.append(("axis", [(x(step), BOTTOM), (x(step), BOTTOM + 4)]))
        texts.append((x(step), BOTTOM + 13, "middle", f"{step:,.0f}"))
    for name, curve in curves.items():
        runs = [list(run) for is_gap, run in groupby(curve, lambda point: point[1] is None) if not is_gap]
        if not runs:
            continue
        ends.append((name, f"{float(f'{runs[-1][-1][1]:.3g}'):,g}"))
        style = f"c{len(ends)}"
        for run in runs:
            lines.append((f"curve {style}", [(x(step), y(value)) for step, value in run]))
            if len(curve) <= MOST_DOTS or len(run) == 1:
                dots += [(style, x(step), y(value), f"step {step:,}: {value:,.4g}") for step, value in run]
    return {"unit": unit, "ends": ends, "lines": lines, "dots": dots, "texts": texts}


def axis(low: float, high: float, start: float, end: float, change: Callable = float) -> Callable[[float], float]:
    """Returns the function from values to drawing units; `change` is math.log for a logarithmic axis."""
    return lambda value: round(start + (end - start) * (change(value) - change(low)) / (change(high) - change(low)), 1)


def ticks(low: float, high: float) -> list[float]:
    """Returns about five round values, 1, 2 or 5 times a power of ten apart, that enclose low to high."""
    rough = (high - low) / 5
    power = math.floor(math.log10(rough))
    step = next(factor * 10.0**power for factor in (1, 2, 5, 10) if factor * 10.0**power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, max(0, 1 - power)) for i in range(first, last + 1)]


def measured(figures: dict) -> tuple[str, str]:
    """Returns the name and unit of what an evaluation measured; files of earlier versions have neither."""
    return str(figures.get("metric", LOSS[0])), str(figures.get("unit", LOSS[1]))


def verdict(figures: dict, sidecar: dict) -> list[str]:
    """Says whether a model looks at its images, by `HeldOut.as_dict` and `exact_match`, and what would help.

    A gap, or a difference in short answers, counts from twice its standard error on. Where no short answers were asked
    for, as for captions, the gap must be more than SMALL of the loss. Without images of other rows, or of a stage with
    another metric, nothing is said.
    """
    gap, error, asked = figures.get("gap_shuffled"), figures.get("gap_error", 0), figures.get("short_answers")
    if gap is None or measured(figures) != LOSS:
        return []
    if error is None:
        found = "Too few pictures are held out to tell whether it looks at them"
    elif gap <= 2 * error:
        found = NOT
    elif not asked or asked < FEW:
        found = "Its answers depend on the images" if gap > SMALL * figures["loss"] else HARDLY
    else:
        right, shuffled = figures["exact_match"], figures["exact_shuffled"]
        deviation = math.sqrt((right * (1 - right) + shuffled * (1 - shuffled)) / asked)
        found = "It looks at the images" if right - shuffled > 2 * deviation else HARDLY
    change = f"{'raise' if gap >= 0 else 'lower'} the loss by {abs(gap):.3f} nats per token"
    sentence = f"{found}: those of other rows {change}"
    sentence += f" (standard error {error:.3f})" if figures.get("gap_error") is not None else ""
    if asked:
        sentence += (
            f", and {figures['exact_match']:.1%} of {asked:,} short answers are right to the letter, with the images "
            f"of other rows {figures['exact_shuffled']:.1%}; always giving a question's most frequent answer gets "
            f"{figures['exact_frequent']:.1%}"
        )
    if found not in (NOT, HARDLY):
        return [f"{sentence}."]
    arguments, stage, cures = sidecar.get("arguments", {}), sidecar.get("stage"), []  # the likeliest cure first
    if found == HARDLY and stage == "pretrain":
        return [f"{sentence}.", UNWRITTEN]
    has_own_data = not is_builtin_data(arguments.get("data_path"))
    if has_own_data and str(arguments.get("vision_model_path")) == display_path(BUILTIN_TOWER_DIR):
        cures.append("a tower of your own pictures, as this one has seen drawn shapes only (trainer/train_tower.py)")
    if stage == "sft" and str(arguments.get("from_weight")).startswith("llm"):
        cures.append("stage 1 first (trainer/train_pretrain_vlm.py), which opens the way for the images")
    cures += ["shorter answers that name what is seen", "more pictures, and a check that they match their texts"]
    return [f"{sentence}.", f"What may help: {'; '.join(cures)}."]


def judgement(record: Record) -> list[str]:
    """Interprets the losses and the gap by the rules of trainer/README.md."""
    losses = [(loss, step) for step, loss in points(record.evaluations, "loss") if loss is not None]
    if not losses:
        return ["Nothing was held out, so the loss on new images was not measured."]
    (first, _), (last, _), (best, step) = losses[0], losses[-1], min(losses)
    sentences, (metric, unit) = verdict(record.evaluations[-1], record.sidecar), measured(record.evaluations[-1])
    if last > OVERFITTED * best:
        lowest = f"The held-out {metric} was lowest at step {step:,} ({best:.3f}) and has risen since"
        sentences.append(f"{lowest}: the model overfits. Use fewer epochs or more data.")
    elif last < first:
        sentences.append(f"The held-out {metric} {'fell to the end' if last == best else 'has levelled off'}.")
    trained = last_of(record.training, "loss")
    if trained is not None and (metric, unit) == LOSS and last > trained + FAR_ABOVE:
        sentences.append("The held-out loss is far above the training loss: use more data, or data of the same kind.")
    return sentences


def descriptions(record: Record) -> list[dict]:
    """Returns each image with its reference and its descriptions over time, equal ones in a row together."""
    by_image, folder = {}, RunFiles(record.folder, record.name).samples
    for row in record.samples:  # a run that was resumed at its end describes twice at a step: the later counts
        by_image.setdefault((row["picture"], row["prompt"]), {})[row["step"]] = row
    images = []
    for (name, prompt), rows in list(by_image.items())[:MOST_IMAGES]:
        path, data = folder / Path(name).name, None  # None: missing, a link, or no image
        with contextlib.suppress(OSError, PictureError):  # a page is shown to others
            if not path.is_symlink() and not folder.is_symlink():
                load_picture(content := path.read_bytes(), path.name)
                data = b64encode(content).decode()
        stretches = [list(alike) for _, alike in groupby(rows.values(), lambda row: row["description"])]
        images.append(
            {
                "name": name,
                "data": data,
                "question": " ".join(prompt.replace("<image>", " ").split()),
                "reference": stretches[-1][-1]["reference"],
                "stretches": stretches[:1] + stretches[1:][1 - MOST_STRETCHES :],
            }
        )
    return images


def settings(record: Record) -> dict:
    """Returns the run's main settings, and the versions of its packages; the sidecar has the others."""
    every = {f"--{name}": value for name, value in record.sidecar["arguments"].items()} | record.sidecar["config"]
    return {
        "settings": {name: every[name] for name in MAIN_SETTINGS if name in every},
        "versions": record.sidecar["versions"] | {"this project": record.sidecar.get("git_commit") or "unknown"},
    }


def write_report(out_dir: Path, name: str) -> Path:
    """Writes {out_dir}/{name}.report.html and returns its path; raises UsageError without metrics, or if it fails."""
    record = read_record(out_dir, name)
    rows, held_out, sidecar = record.training, record.evaluations, record.sidecar
    metric, unit = measured(held_out[-1] if held_out else {})
    losses = {"Loss": {"training": points(rows, "loss")}}
    title = metric[:1].upper() + metric[1:]
    losses.setdefault(title, {})["held out"] = points(held_out, "loss")  # beside it if it is the loss too
    units = {"Loss": "", title: unit}
    charts = {name: line_chart(units[name], curves, may_be_log=True) for name, curves in losses.items()}
    gaps = {"shuffled images": points(held_out, "gap_shuffled"), "no images": points(held_out, "gap_blind")}
    charts |= {
        "Grounding gap": line_chart(unit, gaps),
        "Learning rate": line_chart("", {"learning rate": points(rows, "learning_rate")}),
        "Speed": line_chart("samples/s", {"speed": points(rows, "samples_per_second")}),
    }
    data = "built-in scenes" if record.learns_scenes else sidecar["arguments"].get("data_path")
    facts = [sidecar.get("title"), sidecar.get("assets") == "built-in" and "built-in model"]
    facts += [data and f"data {data}", sidecar.get("written", "")[:16].replace("T", " ")]
    loss = last_of(held_out, "loss")
    seconds = [0.0, *(value for _, value in points(rows, "seconds") if value is not None)]
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["number"] = number
    page = environment.get_template("page.html").render(
        record=record,
        facts=filter(None, facts),
        outcome="Training loss" if loss is None else f"Held-out {metric}",
        metric=metric,
        title=title,
        unit=unit,
        loss=last_of(rows, "loss") if loss is None else loss,
        gap=last_of(held_out, "gap_shuffled"),
        last_step=max(row["step"] for row in rows + held_out),
        # A resumed run counts its seconds from zero again.
        duration=clock(sum(now - before if now >= before else now for before, now in pairwise(seconds))),
        verdict=judgement(record),
        charts=charts,
        width=WIDTH,
        height=HEIGHT,
        images=descriptions(record),
        **settings(record),
    )
    path = out_dir / f"{name}.report.html"
    write_atomically(path, lambda file: file.write(page.encode("utf-8", errors="replace")))
    return path
