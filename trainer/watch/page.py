"""A run on one page: curves, pictures and what was said of them, settings; a single HTML file that needs nothing else.

It is made of the files that a run leaves beside its weights; what is not there is left out, and the page says so. It loads
nothing, runs no script, and follows the reader's light or dark setting.
"""

import json
import math
import statistics
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from common.errors import UsageError
from common.files import write_atomically
from common.paths import display_path
from trainer.watch import charts as parts
from trainer.watch.progress import clock

METRICS, REPORT, SAMPLES = ".metrics.jsonl", ".report.html", "_samples"
MOST_PICTURES, MOST_STEPS, MOST_EPOCHS = 8, 6, 12
NOT_THERE = "is not there"
NO_GAP = 0.01  # nats per token; what a few hundred samples cannot tell from zero
STAGES = {"pretrain": "Pretraining", "sft": "Fine-tuning"}
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
MAIN_CONFIG = ("hidden_size", "num_hidden_layers", "use_moe")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass
class Run:
    """What the files of a run say; `missing` tells what is not on the page, and why."""

    name: str
    training: list[dict] = field(default_factory=list)
    evaluations: list[dict] = field(default_factory=list)
    sidecar: dict = field(default_factory=dict)
    samples: list[dict] = field(default_factory=list)
    scenes: dict = field(default_factory=dict)
    samples_dir: Path = Path()
    missing: dict[str, str] = field(default_factory=dict)


def number(value) -> float | None:
    """The value if it is a number that can be drawn; NaN, infinity and the like are None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e100:
        return None
    return float(value)


def read_rows(path: Path) -> list[dict]:
    """The rows of a jsonl that have a step, by rising step; a line cut off while it was written is left out."""
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


def read_run(out_dir: Path, name: str) -> Run:
    """Reads all that a run left.

    Raises:
        UsageError: If its metrics are missing, unreadable or empty.
    """
    metrics = out_dir / f"{name}{METRICS}"
    try:
        rows = read_rows(metrics)
    except OSError as error:
        raise UsageError(f"{display_path(metrics)} cannot be read: {error.strerror}. Training writes it as it goes") from error
    run = Run(name, samples_dir=out_dir / f"{name}{SAMPLES}")
    run.training = [row for row in rows if "eval" not in row]
    run.evaluations = [row for row in rows if isinstance(row.get("eval"), dict)]
    if not run.training and not run.evaluations:
        raise UsageError(f"{display_path(metrics)} holds no report of a training step: nothing was trained yet")
    for part, path, read in (
        ("sidecar", out_dir / f"{name}.json", read_object),
        ("samples", run.samples_dir / "samples.jsonl", read_rows),
        ("scenes", run.samples_dir / "scenes.json", read_object),
    ):
        try:
            setattr(run, part, read(path))
        except FileNotFoundError:
            run.missing[part] = f"{display_path(path)} {NOT_THERE}"
        except (OSError, ValueError) as error:
            run.missing[part] = f"{display_path(path)} cannot be read ({error})"
    for part in ("arguments", "config", "versions"):
        if not isinstance(run.sidecar.get(part), dict):
            run.sidecar[part] = {}
    return run


def points(rows: list[dict], *keys: str) -> list[tuple[float, float | None]]:
    """(step, value) of each row; the value lies under the keys, one in the other."""
    found = []
    for row in rows:
        value = row
        for key in keys:
            value = value.get(key)
        found.append((row["step"], number(value)))
    return found


def last_of(rows: list[dict], *keys: str) -> float | None:
    return next((value for _, value in reversed(points(rows, *keys)) if value is not None), None)


def seconds_of(run: Run) -> float:
    """Time of the whole run, the parts before it was resumed included: each part counts from zero."""
    total = before = 0.0
    for _, seconds in points(run.training, "seconds"):
        if seconds is not None:
            total, before = total + (seconds if seconds < before else seconds - before), seconds
    return total


def header(run: Run) -> str:
    stage, assets, written = (run.sidecar.get(key) for key in ("stage", "assets", "written"))
    facts = [STAGES.get(str(stage), stage), assets and f"{assets} files"]
    facts.append(written and f"{str(written)[:16].replace('T', ' ')} UTC")
    loss, gap = last_of(run.evaluations, "eval", "loss"), last_of(run.evaluations, "eval", "gap_shuffled")
    what, loss = ("Held-out", loss) if loss is not None else ("Training", last_of(run.training, "loss"))
    outcome = [f"{what} loss <strong>{parts.nats(loss)}</strong>"]
    if gap is not None:
        verdict = ' <span class="warning">(the picture is ignored)</span>' if abs(gap) < NO_GAP else ""
        outcome.append(f"grounding gap <strong>{parts.nats(gap)}</strong> nats per token{verdict}")
    step = max(row["step"] for row in run.training + run.evaluations)
    outcome.append(f"{step:,} steps in <strong>{clock(seconds_of(run))}</strong>")
    facts = " · ".join(escape(str(fact)) for fact in facts if fact)
    outcome = f'<p class="outcome">{", ".join(outcome)}.</p>'
    return f'<header><h1>{escape(run.name)}</h1><p class="quiet">{facts}</p>{outcome}</header>'


def curves(run: Run) -> str:
    rows, held_out = run.training, run.evaluations
    epochs = [row["step"] for row, later in zip(rows, rows[1:], strict=False) if row.get("epoch") != later.get("epoch")]
    epochs = epochs if len(epochs) < MOST_EPOCHS else []
    training = parts.Series("training", points(rows, "loss"))
    right = parts.Series("held out", points(held_out, "eval", "loss"), marked=True)
    gaps = [
        parts.Series("shuffled pictures", points(held_out, "eval", "gap_shuffled"), marked=True),
        parts.Series("no pictures", points(held_out, "eval", "gap_blind"), marked=True),
    ]
    rate, speed = parts.Series("", points(rows, "learning_rate")), parts.Series("", points(rows, "samples_per_second"))
    unevaluated = "this run was not evaluated while it trained (--eval_interval)"
    charts = (
        parts.line_chart("Loss", "nats per token", [training, right], epochs, may_be_log=True),
        parts.line_chart("Grounding gap", "nats per token", gaps, epochs, from_zero=True, if_empty=unevaluated),
        parts.line_chart("Learning rate", "", [rate], epochs, from_zero=True),
        parts.line_chart("Speed", "samples/s", [speed], epochs, from_zero=True),
    )
    dotted = '<p class="quiet">Dotted lines: an epoch ends.</p>' if epochs else ""
    return f'<h2>Curves</h2><div class="charts">{"".join(charts)}</div>{dotted}{in_numbers(run)}'


def grounding(run: Run) -> str:
    """The last evaluation as a table."""
    if not run.evaluations:
        return ""
    last = {key: number(value) for key, value in run.evaluations[-1]["eval"].items()}
    kinds = (("the right pictures", ""), ("shuffled among the samples", "shuffled"), ("none", "blind"))
    rows = []
    for what, kind in kinds:
        loss, gap = last.get(f"loss_{kind}" if kind else "loss"), last.get(f"gap_{kind}")
        perplexity = "–" if loss is None or loss > 50 else f"{math.exp(loss):,.2f}"
        rows.append((what, parts.nats(loss), perplexity, parts.nats(gap) if kind else ""))
    size = ", ".join(f"{last[key]:,.0f} {key}" for key in ("samples", "tokens") if last.get(key) is not None)
    return (
        "<h2>Does it look at the picture?</h2>"
        f'<p class="quiet">Loss on {size or "samples"} held out from training, after step {run.evaluations[-1]["step"]:,}, in nats '
        "per token. The grounding gap is what the loss rises by when the pictures are the wrong ones or missing; at zero the "
        f"pictures are ignored.</p>{parts.table(('pictures', 'loss', 'perplexity', 'gap'), rows)}"
    )


def samples(run: Run) -> str:
    """Each picture, what was said of it over time, and what should be said."""
    by_picture = {}
    for row in run.samples:  # a run that was resumed may have described a picture twice at a step: the later counts
        key = (str(row.get("picture", "")), str(row.get("prompt", "")))
        by_picture.setdefault(key, {})[row["step"]] = row
    if not by_picture:
        return f"<h2>Pictures and words</h2>{parts.left_out(run.missing.get('samples', 'no picture was described'))}"
    articles = []
    for (file_name, prompt), said in list(by_picture.items())[:MOST_PICTURES]:
        reference = next((str(row["reference"]) for row in said.values() if row.get("reference") is not None), None)
        lines = []
        for step in parts.evenly(sorted(said), MOST_STEPS):
            text = str(said[step].get("description", "")).strip()
            lines.append(parts.said_line(f"step {step:,}", text, reference is not None and text == reference.strip()))
        if reference is not None:
            lines.append(parts.said_line("reference", reference.strip()))
        shown_prompt = " ".join(prompt.replace("<image>", " ").split())
        articles.append(
            f'<article class="picture">{parts.picture(run.samples_dir / file_name, file_name)}'
            f'<p class="quiet">{escape(shown_prompt)}</p><ol>{"".join(lines)}</ol></article>'
        )
    return (
        '<h2>Pictures and words</h2><p class="quiet">Greedy descriptions of the same pictures as the run went on. '
        f"✓: word for word the reference.</p>{''.join(articles)}"
    )


def scene_table(run: Run) -> str:
    """The built-in set's attribute table; "" for a run on other data, which has none."""
    rows = run.scenes.get("rows")
    if not isinstance(rows, list):
        reason = run.missing.get("scenes", "scenes.json holds no rows")
        is_expected = run.sidecar.get("assets") == "built-in" or not reason.endswith(NOT_THERE)
        return f"<h2>Built-in scenes</h2>{parts.left_out(reason)}" if is_expected else ""
    cells = [
        (escape(str(row.get("name", ""))), *(parts.share(number(row.get(key))) for key in ("attributes", "captions")))
        for row in rows
        if isinstance(row, dict)
    ]
    told = (run.scenes.get(key, "?") for key in ("scenes", "step"))
    count, step = (f"{value:,}" if isinstance(value, int) else escape(str(value)) for value in told)
    return (
        f'<h2>Built-in scenes</h2><p class="quiet">Greedy captions of {count} held-out scenes after step {step}. Attributes: the colour, shape, '
        "size and place of each object, and how many there are.</p>"
        f"{parts.table(('', 'attributes right', 'whole captions right'), cells)}"
    )


def in_numbers(run: Run) -> str:
    """What was learned from, how fast, and what was left out."""
    figures = {}
    for key, what, form, of in FIGURES:
        values = [value for _, value in points(run.training, key) if value is not None]
        if values:
            figures[what] = format(of(values), form)
    return f"<h3>In numbers</h3>{parts.definitions(figures)}" if figures else ""


def settings(run: Run) -> str:
    """What the run was started with: what matters most first, the rest folded."""
    if "sidecar" in run.missing:
        return f"<h2>Settings</h2>{parts.left_out(run.missing['sidecar'])}"
    arguments, config = run.sidecar["arguments"], run.sidecar["config"]
    main = {key: config[key] for key in MAIN_CONFIG if key in config}
    main |= {f"--{key}": arguments[key] for key in MAIN_ARGUMENTS if key in arguments}
    commit = str(run.sidecar.get("git_commit") or "unknown")
    changed = " and changes" if commit.endswith("+") else ""
    versions = run.sidecar["versions"] | {"this project": f"{commit.rstrip('+')[:12]}{changed}"}
    others = {f"--{key}": value for key, value in arguments.items() if key not in MAIN_ARGUMENTS}
    others |= {key: value for key, value in config.items() if key not in MAIN_CONFIG}
    return (
        f"<h2>Settings</h2>{parts.definitions(main)}<details><summary>All other settings ({len(others)})</summary>"
        f"{parts.definitions(others)}</details><h3>Versions</h3>{parts.definitions(versions)}"
    )


def page_of(run: Run) -> str:
    """The whole page."""
    sections = "".join(part(run) for part in (header, curves, grounding, samples, scene_table, settings))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{escape(run.name)}</title><style>{parts.STYLE}</style></head><body>{sections}"
        f"<footer>MiniMind-V, from {escape(run.name)}{METRICS} and what lies beside it. python scripts/report.py writes this page "
        "anew.</footer></body></html>\n"
    )


def write_report(out_dir: Path, name: str) -> Path:
    """Writes the page of the run of that name, whole or not at all.

    Args:
        out_dir: The folder that holds {name}.metrics.jsonl, and beside it {name}.json and {name}_samples/ where there are.

    Returns:
        {out_dir}/{name}.report.html

    Raises:
        UsageError: If there are no metrics to show, or the page cannot be written.
    """
    content = page_of(read_run(Path(out_dir), name)).encode("utf-8", errors="replace")
    path = Path(out_dir) / f"{name}{REPORT}"
    write_atomically(path, lambda file: file.write(content))
    return path
