"""A run on one page: curves, images and their descriptions, settings; a single HTML file that needs nothing else.

It is made of the files that a run leaves beside its weights; what is missing is left out, and the page says so. It
loads nothing, runs no script, and follows the reader's light or dark setting.
"""

import json
import math
import statistics
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from urllib.parse import quote

from common.errors import UsageError
from common.files import write_atomically
from common.paths import BUILTIN_DATASET_DIR, display_path
from trainer.watch.charts import Series, line_chart
from trainer.watch.progress import clock

METRICS, REPORT, SAMPLES = ".metrics.jsonl", ".report.html", "_samples"
MOST_IMAGES, MOST_STEPS, MOST_EPOCHS = 8, 6, 12
NO_GAP = 0.01  # nats per token; below this a few hundred samples cannot tell a gap from none
BY_HEART, FAR_ABOVE = 1.05, 1.0  # the last held-out loss by the lowest; above the training loss, in nats per token
IMAGE_KINDS = {b"\xff\xd8\xff": "jpeg", b"\x89PNG": "png"}  # by their first bytes
MAIN_CONFIG = ("hidden_size", "num_hidden_layers", "use_moe", "projector", "image_tokens")
MAIN_ARGUMENTS = (
    *("from_weight", "freeze_llm", "data_path", "images_path", "epochs", "batch_size", "accumulation_steps"),
    *("learning_rate", "grad_clip", "max_seq_len", "dtype", "device", "seed"),
)
FIGURES = (
    ("learned_tokens", "learned tokens", ",.0f", sum),
    ("samples_per_second", "samples/s, median", ",.1f", statistics.median),
    ("data_wait", "waiting for data, median", ".1%", statistics.median),
    ("skipped_pictures", "samples skipped, picture unreadable", ",.0f", max),
    ("skipped_steps", "steps skipped, loss not finite", ",.0f", max),
)


@dataclass
class Record:
    """What a run's files say; `missing` tells what is not on the page, and why."""

    name: str
    folder: Path
    training: list[dict]
    evaluations: list[dict]
    sidecar: dict = field(default_factory=dict)
    samples: list[dict] = field(default_factory=list)
    scenes: dict = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def read_rows(path: Path) -> list[dict]:
    """Returns the rows of a jsonl that have a step, by rising step; a line cut off while it was written is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] < 1e15:
            rows.append(row)
    return sorted(rows, key=lambda row: row["step"])


def read_object(path: Path) -> dict:
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    return content


def read_record(out_dir: Path, name: str) -> Record:
    """Reads everything a run left.

    Raises:
        UsageError: If its metrics are missing, unreadable or empty.
    """
    metrics, samples = out_dir / f"{name}{METRICS}", out_dir / f"{name}{SAMPLES}"
    try:
        rows = read_rows(metrics)
    except OSError as error:
        reason = f"{display_path(metrics)} cannot be read: {error.strerror}. Training writes it as it goes"
        raise UsageError(reason) from error
    evaluations = [row for row in rows if isinstance(row.get("eval"), dict)]
    record = Record(name, samples, [row for row in rows if "eval" not in row], evaluations)
    if not record.training and not evaluations:
        raise UsageError(f"{display_path(metrics)} holds no report of a training step: nothing was trained yet")
    parts = {"sidecar": (out_dir / f"{name}.json", read_object), "samples": (samples / "samples.jsonl", read_rows)}
    for part, (path, read) in (parts | {"scenes": (samples / "scenes.json", read_object)}).items():
        try:
            setattr(record, part, read(path))
        except FileNotFoundError:
            record.missing[part] = f"{display_path(path)} is not there"
        except (OSError, ValueError) as error:
            record.missing[part] = f"{display_path(path)} cannot be read ({error})"
    for part in ("arguments", "config", "versions"):
        if not isinstance(record.sidecar.get(part), dict):
            record.sidecar[part] = {}
    return record


def number(value) -> float | None:
    """Returns the value if it can be drawn, None for NaN, infinity and the like."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e100:
        return None
    return float(value)


def points(rows: list[dict], *keys: str) -> list[tuple[float, float | None]]:
    """Returns (step, value) of each row; the value is found under the keys, one in the other."""
    found = []
    for row in rows:
        value = row
        for key in keys:
            value = value.get(key)
        found.append((row["step"], number(value)))
    return found


def last_of(rows: list[dict], *keys: str) -> float | None:
    return next((value for _, value in reversed(points(rows, *keys)) if value is not None), None)


def seconds_of(record: Record) -> float:
    """Returns the time of the whole run; each part of a resumed one counts from zero."""
    total = before = 0.0
    for _, seconds in points(record.training, "seconds"):
        if seconds is not None:
            total, before = total + (seconds if seconds < before else seconds - before), seconds
    return total


def header(record: Record) -> str:
    sidecar = record.sidecar
    title, written = sidecar.get("title") or sidecar.get("stage"), sidecar.get("written")
    facts = [title, files_used(sidecar), written and f"{str(written)[:16].replace('T', ' ')} UTC"]
    loss, gap = last_of(record.evaluations, "eval", "loss"), last_of(record.evaluations, "eval", "gap_shuffled")
    kind = "Training" if loss is None else "Held-out"
    outcome = [f"{kind} loss <strong>{nats(last_of(record.training, 'loss') if loss is None else loss)}</strong>"]
    if gap is not None:
        warning = ' <span class="warning">(the picture is ignored)</span>' if abs(gap) < NO_GAP else ""
        outcome.append(f"grounding gap <strong>{nats(gap)}</strong> nats per token{warning}")
    step = max(row["step"] for row in record.training + record.evaluations)
    outcome.append(f"{step:,} steps in <strong>{clock(seconds_of(record))}</strong>")
    told = " · ".join(escape(str(fact)) for fact in facts if fact)
    outcome = f'<p class="outcome">{", ".join(outcome)}.</p>'
    judged = "".join(f"<li>{escape(sentence)}</li>" for sentence in verdict(record))
    return (
        f'<header><h1>{escape(record.name)}</h1><p class="quiet">{told}{link_to_start(record)}</p>{outcome}'
        f"<ul>{judged}</ul></header>"
    )


def files_used(sidecar: dict) -> str | None:
    """Returns in words whose model learned from whose data."""
    data = sidecar["arguments"].get("data_path")
    if not sidecar.get("assets"):
        return None
    if sidecar["assets"] == "built-in":
        is_scenes = data is None or str(data).startswith(display_path(BUILTIN_DATASET_DIR))
        return "built-in model and scenes" if is_scenes else f"built-in model, data {data}"
    return f"data {data}" if data else None


def link_to_start(record: Record) -> str:
    """Returns a link to the page of the run that made the starting weights, where that lies beside."""
    start, config = record.sidecar["arguments"].get("from_weight"), record.sidecar["config"]
    name = f"{Path(str(start)).stem if str(start).endswith('.pth') else start}"
    name += "" if str(start).endswith(".pth") else f"_{config.get('hidden_size')}{'_moe' * bool(config.get('use_moe'))}"
    page = f"{name}{REPORT}"
    if name == record.name or not (record.folder.parent / page).is_file():
        return ""
    return f' · starts from <a href="{quote(page)}">{escape(name)}</a>'


def verdict(record: Record) -> list[str]:
    """Says in words what the losses and the gap mean, by the rules of trainer/README.md."""
    losses = [(step, loss) for step, loss in points(record.evaluations, "eval", "loss") if loss is not None]
    if not losses:
        return ["Nothing was held out, so how it does on new pictures was not measured."]
    gap, trained = last_of(record.evaluations, "eval", "gap_shuffled"), last_of(record.training, "loss")
    said = []
    if gap is not None:
        looks = f"It looks at the pictures: wrong ones cost it {nats(gap)} nats a token."
        ignores = (
            "It ignores the pictures: wrong ones cost it nothing. Were they matched to their texts, and stage 1 done?"
        )
        said.append(looks if gap >= NO_GAP else ignores)
    best_step, best = min(losses, key=lambda at: at[1])
    if losses[-1][1] > BY_HEART * best:
        said.append(
            f"The held-out loss was lowest at step {best_step:,} ({nats(best)}) and has risen since: it learns "
            "its rows by heart. Fewer epochs, or more data."
        )
    elif len(losses) > 1 and losses[-1][1] < losses[0][1]:
        said.append(
            "The held-out loss fell to the end." if losses[-1][1] == best else "The held-out loss has levelled."
        )
    if trained is not None and losses[-1][1] > trained + FAR_ABOVE:
        said.append("New rows cost it far more than those it learned: there are too few, or other ones.")
    return said


def curves(record: Record) -> str:
    rows, held_out = record.training, record.evaluations
    epochs = [row["step"] for row, later in zip(rows, rows[1:], strict=False) if row.get("epoch") != later.get("epoch")]
    epochs = epochs if len(epochs) < MOST_EPOCHS else []
    losses = [Series("training", points(rows, "loss")), Series("held out", points(held_out, "eval", "loss"), True)]
    gaps = {"shuffled images": "gap_shuffled", "no images": "gap_blind"}
    gaps = [Series(name, points(held_out, "eval", key), True) for name, key in gaps.items()]
    rate, speed = Series("", points(rows, "learning_rate")), Series("", points(rows, "samples_per_second"))
    none = "the metrics hold none"
    charts = (
        ("Loss", "nats per token", losses, {"may_be_log": True}, none),
        ("Grounding gap", "nats per token", gaps, {"from_zero": True}, "this run was not evaluated while it trained"),
        ("Learning rate", "", [rate], {"from_zero": True}, none),
        ("Speed", "samples/s", [speed], {"from_zero": True}, none),
    )
    drawn = [
        line_chart(title, unit, series, epochs, **options)
        or f"<figure><figcaption><strong>{title}</strong></figcaption>{left_out(why)}</figure>"
        for title, unit, series, options, why in charts
    ]
    dotted = '<p class="quiet">Dotted lines: an epoch ends.</p>' if epochs else ""
    return f'<h2>Curves</h2><div class="charts">{"".join(drawn)}</div>{dotted}{in_numbers(record)}'


def in_numbers(record: Record) -> str:
    figures = {}
    for key, what, form, of in FIGURES:
        values = [value for _, value in points(record.training, key) if value is not None]
        if values:
            figures[what] = format(of(values), form)
    return f"<h3>In numbers</h3>{definitions(figures)}" if figures else ""


def grounding(record: Record) -> str:
    """Returns the last evaluation as a table."""
    if not record.evaluations:
        return ""
    last = {key: number(value) for key, value in record.evaluations[-1]["eval"].items()}
    rows = []
    for what, end in (("right images", ""), ("shuffled images", "_shuffled"), ("no images", "_blind")):
        loss, gap = last.get(f"loss{end}"), last.get(f"gap{end}")
        perplexity = "–" if loss is None or loss > 50 else f"{math.exp(loss):,.2f}"
        rows.append((what, nats(loss), perplexity, nats(gap) if end else ""))
    size = ", ".join(f"{last[key]:,.0f} {key}" for key in ("samples", "tokens") if last.get(key) is not None)
    step = record.evaluations[-1]["step"]
    return (
        "<h2>Does it look at the picture?</h2>"
        f'<p class="quiet">Loss on {size or "samples"} held out from training, after step '
        f"{step:,}, in nats per token. The grounding gap is how much the loss rises when the pictures are the wrong "
        "ones or missing; at zero the pictures are "
        f"ignored.</p>{table(('pictures', 'loss', 'perplexity', 'gap'), rows)}"
    )


def samples(record: Record) -> str:
    """Returns each image, its descriptions over time, and the reference."""
    by_image = {}
    for row in record.samples:  # a resumed run may have described an image twice at a step: the later counts
        by_image.setdefault((str(row.get("picture", "")), str(row.get("prompt", ""))), {})[row["step"]] = row
    if not by_image:
        return f"<h2>Pictures and words</h2>{left_out(record.missing.get('samples', 'no picture was described'))}"
    whose = "held-out pictures" if record.evaluations else "pictures that were trained on (none were held out)"
    articles = []
    for (file_name, prompt), rows in list(by_image.items())[:MOST_IMAGES]:
        reference = next((str(row["reference"]) for row in rows.values() if row.get("reference") is not None), None)
        lines = []
        for first, last in evenly(alike(rows), MOST_STEPS):
            text = str(rows[last].get("description", "")).strip()
            is_right = reference is not None and text == reference.strip()
            mark = ' <span class="right" title="as the reference">✓</span>' if is_right else ""
            lines.append(f'<li><span>{steps(first, last)}</span><span class="said">{escape(text)}{mark}</span></li>')
        if reference is not None:
            text = f'<span class="said">{escape(reference.strip())}</span>'
            lines.append(f'<li class="reference"><span>reference</span>{text}</li>')
        question = escape(" ".join(prompt.replace("<image>", " ").split()))
        image = embedded_image(record.folder / file_name, file_name)
        articles.append(
            f'<article class="picture">{image}<p class="quiet">{question}</p><ol>{"".join(lines)}</ol></article>'
        )
    return (
        f'<h2>Pictures and words</h2><p class="quiet">Greedy descriptions of {whose} as the run went on. '
        f"✓: word for word the reference.</p>{''.join(articles)}"
    )


def alike(rows: dict[int, dict]) -> list[tuple[int, int]]:
    """Returns the (first, last) steps of each stretch that had the same description."""
    stretches = []
    for step in sorted(rows):
        if stretches and rows[step].get("description") == rows[stretches[-1][1]].get("description"):
            stretches[-1] = stretches[-1][0], step
        else:
            stretches.append((step, step))
    return stretches


def steps(first: int, last: int) -> str:
    return f"step {first:,}" if first == last else f"steps {first:,} to {last:,}"


def embedded_image(path: Path, file_name: str) -> str:
    try:
        # Only what lies beside samples.jsonl: a row must not bring another file of the disk onto the page.
        content = path.read_bytes() if path.name == file_name else b""
    except (OSError, ValueError):
        content = b""
    kind = next((kind for start, kind in IMAGE_KINDS.items() if content.startswith(start)), None)
    if kind is None:
        return f'<div class="missing">{escape(file_name)} cannot be shown</div>'
    return f'<img src="data:image/{kind};base64,{b64encode(content).decode()}" alt="{escape(file_name)}">'


def scene_table(record: Record) -> str:
    """Returns the built-in set's table; "" for a run on other data, which has none."""
    rows = record.scenes.get("rows")
    if not isinstance(rows, list):
        reason = record.missing.get("scenes", "scenes.json holds no rows")
        is_expected = record.sidecar.get("assets") == "built-in" or not reason.endswith("is not there")
        return f"<h2>Built-in scenes</h2>{left_out(reason)}" if is_expected else ""
    cells = [
        (escape(str(row.get("name", ""))), *(share(number(row.get(key))) for key in ("attributes", "captions")))
        for row in rows
        if isinstance(row, dict)
    ]
    count, step = (
        f"{value:,}" if isinstance(value, int) else escape(str(value))
        for value in (record.scenes.get(key, "?") for key in ("scenes", "step"))
    )
    return (
        f'<h2>Built-in scenes</h2><p class="quiet">Greedy captions of {count} held-out scenes after step {step}. '
        "Attributes: the colour, shape, size and place of each object, and how many there are.</p>"
        f"{table(('', 'attributes right', 'whole captions right'), cells)}"
    )


def settings(record: Record) -> str:
    """Returns what the run was started with: the most important first, the rest folded."""
    if "sidecar" in record.missing:
        return f"<h2>Settings</h2>{left_out(record.missing['sidecar'])}"
    arguments, config = record.sidecar["arguments"], record.sidecar["config"]
    main = {key: config[key] for key in MAIN_CONFIG if key in config}
    main |= {f"--{key}": arguments[key] for key in MAIN_ARGUMENTS if key in arguments}
    others = {f"--{key}": value for key, value in arguments.items() if key not in MAIN_ARGUMENTS}
    others |= {key: value for key, value in config.items() if key not in MAIN_CONFIG}
    commit = str(record.sidecar.get("git_commit") or "unknown")
    changed = " and changes" if commit.endswith("+") else ""
    versions = record.sidecar["versions"] | {"this project": f"{commit.rstrip('+')[:12]}{changed}"}
    folded = f"<details><summary>All other settings ({len(others)})</summary>{definitions(others)}</details>"
    return f"<h2>Settings</h2>{definitions(main)}{folded}<h3>Versions</h3>{definitions(versions)}"


def evenly(items: Sequence, most: int) -> list:
    """Returns the first, the last, and others evenly between them: at most so many."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def nats(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def share(value: float | None) -> str:
    width = 0.0 if value is None else 100 * min(1.0, max(0.0, value))
    return f'{"–" if value is None else f"{value:.1%}"}<i><b style="width:{width:.1f}%"></b></i>'


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table in a box of its own that scrolls; the cells are HTML."""
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def definitions(values: dict) -> str:
    pairs = []
    for name, value in values.items():
        text = escape(f"{value:g}" if isinstance(value, float) else str(value))
        text = '<span class="quiet">not given</span>' if value is None else text
        pairs.append(f"<div><dt>{escape(str(name))}</dt><dd>{text}</dd></div>")
    return f"<dl>{''.join(pairs)}</dl>"


def left_out(what: str) -> str:
    return f'<p class="quiet">Left out: {escape(what)}.</p>'


def write_report(out_dir: Path, name: str) -> Path:
    """Writes the page of the run of that name, whole or not at all.

    Args:
        out_dir: The folder that holds {name}.metrics.jsonl, and beside it {name}.json and {name}_samples/ if there are.

    Returns:
        {out_dir}/{name}.report.html

    Raises:
        UsageError: If there are no metrics to show, or the page cannot be written.
    """
    record = read_record(Path(out_dir), name)
    sections = "".join(part(record) for part in (header, curves, grounding, samples, scene_table, settings))
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    page = (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(name)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<style>\n{style}</style></head><body>{sections}<footer>MiniMind-V, from {escape(name)}{METRICS} and the "
        "files beside it. python scripts/report.py writes this page anew.</footer></body></html>\n"
    )
    path = Path(out_dir) / f"{name}{REPORT}"
    write_atomically(path, lambda file: file.write(page.encode("utf-8", errors="replace")))
    return path
