"""What the report of a run is made of: its style sheet, line charts as inline SVG, tables, pictures within the page.

No dependency, no JavaScript, one drawing for light and dark. A chart is drawn 420 units wide, so that its letters stay readable on a phone, where it is as wide as the screen.
"""

import math
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

WIDTH, HEIGHT = 420, 236
LEFT, RIGHT, TOP, BOTTOM = 46, 54, 12, 30  # room for the labels around the curves
MOST_POINTS = 500
MOST_TITLES = 60  # of dots that tell their value when pointed at
LABEL_DISTANCE = 13
LOG_FROM = 20  # times the lowest value: the highest of a chart that may have a logarithmic axis

PICTURE_KINDS = {b"\xff\xd8\xff": "jpeg", b"\x89PNG": "png"}  # by their first bytes

Points = Sequence[tuple[float, float | None]]

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --text: #1d2126; --quiet: #626b76; --rule: #e4e7eb; --box: #f6f7f9;
  --blue: #2b6cb0; --orange: #c05621; --green: #2f7d4f; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --text: #e3e6ea; --quiet: #98a2ae; --rule: #2b3138;
  --box: #1c2026; --blue: #74aee6; --orange: #f0a060; --green: #7cc79a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2.2rem 1.2rem 3rem; background: var(--paper); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "PingFang SC", "Microsoft YaHei",
  "Noto Sans CJK SC", sans-serif; -webkit-text-size-adjust: 100%; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; font-weight: 650; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 2.8rem 0 .9rem; padding-top: 1.1rem; border-top: 1px solid var(--rule); font-weight: 650; }
h3 { font-size: .95rem; margin: 1.6rem 0 .5rem; font-weight: 600; }
p { margin: .5rem 0; } .quiet, footer, dt, th, summary { color: var(--quiet); } .quiet, footer { font-size: .88rem; }
.outcome { font-size: 1.12rem; margin: .9rem 0 0; } .warning { color: var(--orange); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 1.8rem 2rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35rem .8rem; border-bottom: 1px solid var(--rule); white-space: nowrap; }
th { font-weight: 500; } th:first-child, td:first-child { text-align: left; padding-left: 0; } th:last-child, td:last-child { padding-right: 0; }
td i { margin-left: auto; } td i, td b { display: block; width: 7.5rem; height: 4px; border-radius: 2px; background: var(--rule); }
td b { background: var(--blue); }
.picture { display: grid; grid-template-columns: 132px 1fr; column-gap: 1.4rem; padding: 1.1rem 0;
  border-bottom: 1px solid var(--rule); } .picture:last-of-type { border: 0; } .picture p { margin: 0 0 .3rem; }
.picture img, .missing { width: 132px; border-radius: 6px; display: block; grid-row: span 2; }
.missing { height: 132px; background: var(--box); padding: 1rem; font-size: .8rem; color: var(--quiet); }
.picture ol { list-style: none; margin: 0; padding: 0; }
.picture li { display: grid; grid-template-columns: 5.2rem 1fr; gap: .7rem; padding: .15rem 0; }
.picture li > :first-child { color: var(--quiet); font-size: .85rem; padding-top: .1em; }
.said { white-space: pre-wrap; } .right { color: var(--green); font-weight: 700; }
.reference { border-top: 1px dashed var(--rule); margin-top: .3rem; padding-top: .4rem !important; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: .1rem 2rem; margin: 0; }
dl div { display: flex; justify-content: space-between; gap: 1rem; padding: .25rem 0; border-bottom: 1px solid var(--rule);
  font-size: .9rem; } dt, dd { margin: 0; } dt { flex: none; max-width: 65%; } dd { text-align: right; }
details { margin-top: 1rem; } summary { cursor: pointer; font-size: .9rem; } details > :last-child { margin-top: .8rem; }
footer { margin-top: 2.8rem; padding-top: 1rem; border-top: 1px solid var(--rule); }
@media (max-width: 34rem) { body { padding: 1.4rem 1rem 2rem; } .picture { grid-template-columns: 104px 1fr; gap: .7rem 1rem; }
  .picture img, .missing { width: 104px; grid-row: auto; } .missing { height: 104px; } .picture p { align-self: end; }
  .picture ol { grid-column: 1 / -1; } .picture li { grid-template-columns: 4.6rem 1fr; gap: .4rem; }
  th, td { padding: .35rem .45rem; } th, td:first-child { white-space: normal; } th { overflow-wrap: normal; } td i, td b { width: 5rem; } }
figure { margin: 0; min-width: 0; }
figcaption { display: flex; flex-wrap: wrap; gap: 0 .9em; align-items: baseline; margin-bottom: .3em; font-size: .85rem;
  color: var(--quiet); }
figcaption strong { color: var(--text); font-size: .95rem; font-weight: 600; }
figcaption .note { flex-basis: 100%; font-size: .78rem; }
.key::before { content: ""; display: inline-block; width: 1.3em; height: 0; border-top: 3px solid var(--line);
  margin-right: .4em; vertical-align: .25em; border-radius: 2px; }
.c1 { --line: var(--blue); } .c2 { --line: var(--orange); } .c3 { --line: var(--green); }
figure svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--quiet); font-size: 11.5px; font-variant-numeric: tabular-nums; }
svg text.last { fill: var(--line); font-weight: 600; }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .axis { stroke: var(--quiet); stroke-width: 1; }
svg .epoch { stroke: var(--quiet); stroke-width: 1; stroke-dasharray: 1 4; }
svg .curve { fill: none; stroke: var(--line); stroke-width: 1.4; stroke-linejoin: round; stroke-linecap: round; }
svg .marked { stroke-width: 2.2; }
svg .dot { fill: var(--line); stroke: var(--paper); stroke-width: 1; }
"""


@dataclass(frozen=True)
class Series:
    """One curve: its name in the legend, its (step, value) points by rising step, and whether each point has a dot.

    A value of None makes a gap.
    """

    name: str
    points: Points
    marked: bool = False


@dataclass(frozen=True)
class Axis:
    """From values (low to high) to drawing units (start to end)."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def at(self, value: float) -> float:
        if self.is_log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(self.start + (self.end - self.start) * share, 1)


def thin(points: Points, most: int = MOST_POINTS) -> tuple[Points, int]:
    """At most so many of the points: of each bucket of neighbours the lowest and the highest, and a gap if it has one.

    Returns:
        The points, in their order and with the first and the last; and how many make a bucket (1: all are there).
    """
    if len(points) <= most:
        return points, 1
    gaps = any(value is None for _, value in points)
    size = math.ceil(len(points) / ((most - 2) // (3 if gaps else 2)))
    kept = {0, len(points) - 1}
    for begin in range(0, len(points), size):
        bucket = range(begin, min(begin + size, len(points)))
        present = [i for i in bucket if points[i][1] is not None]
        if present:
            kept |= {min(present, key=lambda i: points[i][1]), max(present, key=lambda i: points[i][1])}
        if len(present) < len(bucket):
            kept.add(next(i for i in bucket if points[i][1] is None))
    return [points[i] for i in sorted(kept)], size


def ticks(low: float, high: float, about: int = 5, least: float = 0.0) -> list[float]:
    """Round values, 1, 2 or 5 times a power of ten apart, that enclose low to high; `least` is the closest they may lie."""
    rough = max((high - low) / about, least)
    power = math.floor(math.log10(rough))
    step = next(factor * 10.0**power for factor in (1, 2, 5, 10) if factor * 10.0**power >= rough * 0.999)
    digits = max(0, 1 - power)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, digits) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from low to high; 2 and 5 times them too where there would be few."""
    factors = (1, 2, 5) if high / low < 1000 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = max(1, len(powers) // 6)
    values = (factor * 10.0**power for power in powers if power % every == 0 for factor in factors)
    return [value for value in values if low <= value <= high]


def tick_label(value: float) -> str:
    """0.25, 1,500, 20k, 3M, 4e-4."""
    size = abs(value)
    if size >= 1e9 or 0 < size < 0.01:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for unit, letter in ((1e6, "M"), (1e3, "k")):
        if size >= 10 * unit or (size >= unit and letter == "M"):
            return f"{value / unit:.4g}{letter}"
    return f"{value:,.4g}" if size < 1000 else f"{value:,.0f}"


def value_label(value: float) -> str:
    return tick_label(float(f"{value:.3g}"))


def value_axis(values: list[float], from_zero: bool, may_be_log: bool) -> tuple[Axis, list[float]]:
    """The upright axis that shows all values, and its ticks."""
    low, high = min(values), max(values)
    bottom = HEIGHT - BOTTOM
    if may_be_log and low > 0 and high / low >= LOG_FROM:
        axis = Axis(low / 1.2, high * 1.2, bottom, TOP, is_log=True)
        return axis, log_ticks(axis.low, axis.high)
    if from_zero:
        low, high = min(0.0, low), max(0.0, high)
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):  # one value: in the middle, or above zero
        room = abs(high) / 10 or 1.0
        low, high = (0.0, 1.0) if high == 0 else (low - room, high + room)
    marks = ticks(low, high)
    return Axis(marks[0], marks[-1], bottom, TOP), marks


def runs_of(points: Points) -> list[list[tuple[float, float]]]:
    """The points between the gaps."""
    runs = [[]]
    for step, value in points:
        if value is not None:
            runs[-1].append((step, value))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def curve(series: Series, points: Points, colour: str, across: Axis, upright: Axis) -> str:
    parts = []
    kind = "curve marked" if series.marked else "curve"
    for run in runs_of(points):
        places = [(across.at(step), upright.at(value)) for step, value in run]
        if len(run) > 1:
            path = "L".join(f"{x:g} {y:g}" for x, y in places)
            parts.append(f'<path class="{kind}" d="M{path}"/>')
        if len(run) == 1 or (series.marked and len(points) <= MOST_TITLES):
            parts += [
                f'<circle class="dot" cx="{x:g}" cy="{y:g}" r="3"><title>step {step:,g}: {value:.4g}</title></circle>'
                for (x, y), (step, value) in zip(places, run, strict=True)
            ]
    return f'<g class="{colour}">{"".join(parts)}</g>'


def last_labels(last: list[tuple[str, float, float]]) -> str:
    """The curves' last values (colour, value, height) to the right of them, moved apart where they would meet."""
    last = sorted(last, key=lambda label: label[2])
    heights = [height for _, _, height in last]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + LABEL_DISTANCE)
    too_low = max(0.0, heights[-1] - (HEIGHT - BOTTOM)) if heights else 0.0
    return "".join(
        f'<text class="last {colour}" x="{WIDTH - RIGHT + 6}" y="{height - too_low + 4:g}">{value_label(value)}</text>'
        for (colour, value, _), height in zip(last, heights, strict=True)
    )


def grid(across: Axis, upright: Axis, steps: list[float], marks: list[float], epochs: Sequence[float]) -> str:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for mark in marks:
        y = upright.at(mark)
        kind = "axis" if mark == 0 and not upright.is_log else "grid"
        parts.append(f'<line class="{kind}" x1="{LEFT}" x2="{right}" y1="{y:g}" y2="{y:g}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4:g}" text-anchor="end">{tick_label(mark)}</text>')
    for epoch in epochs:
        x = across.at(epoch)
        parts.append(f'<line class="epoch" x1="{x:g}" x2="{x:g}" y1="{TOP}" y2="{bottom}"/>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    for step in steps:
        x = across.at(step)
        parts.append(f'<line class="axis" x1="{x:g}" x2="{x:g}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text x="{x:g}" y="{bottom + 17}" text-anchor="middle">{tick_label(step)}</text>')
    parts.append(f'<text x="{WIDTH}" y="{bottom + 17}" text-anchor="end">step</text>')
    return "".join(parts)


def line_chart(
    title: str,
    unit: str,
    all_series: Sequence[Series],
    epochs: Sequence[float] = (),
    from_zero: bool = False,
    may_be_log: bool = False,
    if_empty: str = "the metrics hold none",
) -> str:
    """A chart over steps, as an HTML figure: caption with legend, axes, ticks, curves and their last values.

    Args:
        unit: What is counted upwards.
        epochs: Steps at which an epoch ends; drawn as dotted lines.
        from_zero: The axis holds zero, whatever the values.
        may_be_log: The axis is logarithmic where the highest value is 20 times the lowest; the caption then says so.
        if_empty: Why there is no chart, where no series has a value.
    """
    all_series = [series for series in all_series if any(value is not None for _, value in series.points)]
    if not all_series:
        return f"<figure><figcaption><strong>{escape(title)}</strong></figcaption>{left_out(if_empty)}</figure>"
    values = [value for series in all_series for _, value in series.points if value is not None]
    last_step = max(max(step for step, _ in series.points) for series in all_series)
    upright, marks = value_axis(values, from_zero, may_be_log)
    across = Axis(0.0, max(1.0, last_step), LEFT, WIDTH - RIGHT)
    steps = [step for step in ticks(0.0, across.high, least=1.0) if step <= across.high]
    curves, last, notes, keys = [], [], [], []
    for number, series in enumerate(all_series, start=1):
        points, bucket = thin(series.points)
        curves.append(curve(series, points, f"c{number}", across, upright))
        value = next(value for _, value in reversed(series.points) if value is not None)
        last.append((f"c{number}", value, upright.at(value)))
        if len(all_series) > 1:
            keys.append(f'<span class="key c{number}">{escape(series.name)}</span>')
        if bucket > 1:
            drawn = f"lowest and highest of each {bucket} of {len(series.points):,} reports"
            notes.append(drawn if len(all_series) == 1 else f"{series.name}: {drawn}")
    label = f"{title} over steps: " + ", ".join(
        f"{series.name or title} ends at {value_label(value)}"
        for series, (_, value, _) in zip(all_series, last, strict=True)
    )
    note = f'<span class="note">{escape("; ".join(notes))}</span>' if notes else ""
    unit = f"{unit}, log scale" if upright.is_log else unit
    return (
        f"<figure><figcaption><strong>{escape(title)}</strong><span>{escape(unit)}</span>{''.join(keys)}{note}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{grid(across, upright, steps, marks, epochs)}{''.join(curves)}{last_labels(last)}</svg></figure>"
    )


def evenly(items: Sequence, most: int) -> list:
    """The first, the last, and evenly between: at most so many."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def nats(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in a box of its own that scrolls; the cells are HTML."""
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def share(value: float | None) -> str:
    width = 0.0 if value is None else 100 * min(1.0, max(0.0, value))
    told = "–" if value is None else f"{value:.1%}"
    return f'{told}<i><b style="width:{width:.1f}%"></b></i>'


def picture(path: Path, file_name: str) -> str:
    """The picture as an image within the page; words where it is none."""
    try:
        # Only what lies beside samples.jsonl: a row must not bring another file of the disk onto the page.
        content = path.read_bytes() if path.name == file_name else b""
    except (OSError, ValueError):
        content = b""
    kind = next((kind for start, kind in PICTURE_KINDS.items() if content.startswith(start)), None)
    if kind is None:
        return f'<div class="missing">{escape(file_name)} cannot be shown</div>'
    return f'<img src="data:image/{kind};base64,{b64encode(content).decode()}" alt="{escape(file_name)}">'


def said_line(when: str, text: str, is_right: bool = False) -> str:
    kind = ' class="reference"' if when == "reference" else ""
    mark = ' <span class="right" title="as the reference">✓</span>' if is_right else ""
    return f'<li{kind}><span>{when}</span><span class="said">{escape(text)}{mark}</span></li>'


def definitions(values: dict) -> str:
    def told(value) -> str:
        if value is None:
            return '<span class="quiet">not given</span>'
        return escape(f"{value:g}" if isinstance(value, float) else str(value))

    return (
        "<dl>" + "".join(f"<div><dt>{escape(str(k))}</dt><dd>{told(v)}</dd></div>" for k, v in values.items()) + "</dl>"
    )


def left_out(what: str) -> str:
    return f'<p class="quiet">Left out: {escape(what)}.</p>'
