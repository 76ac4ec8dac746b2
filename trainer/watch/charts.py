"""Line charts as inline SVG: no dependency, no JavaScript, one drawing for light and dark (colours are in page.css).

A chart is drawn 420 units wide, so that its letters stay readable on a phone, where it is as wide as the screen.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 236
LEFT, RIGHT, TOP, BOTTOM = 46, 366, 12, 206  # of the curves; around them is room for labels
MOST_POINTS = 500
MOST_DOTS = 60  # each with its value as a tooltip
LABEL_DISTANCE = 13
LOG_FROM = 20  # an axis may be logarithmic where the highest value is this many times the lowest


@dataclass(frozen=True)
class Series:
    """A curve: its name, its (step, value) points by rising step, None for a gap, and whether each point has a dot."""

    name: str
    points: Sequence[tuple[float, float | None]]
    marked: bool = False


def thin(points: Sequence, most: int = MOST_POINTS) -> tuple[Sequence, int]:
    """Returns at most so many points and the size of a bucket: of each bucket its lowest, its highest and a gap."""
    if len(points) <= most:
        return points, 1
    size = math.ceil(3 * len(points) / (most - 2))
    kept = {0, len(points) - 1}
    for begin in range(0, len(points), size):
        bucket = range(begin, min(begin + size, len(points)))
        present = [i for i in bucket if points[i][1] is not None]
        kept |= {choose(present, key=lambda i: points[i][1]) for choose in (min, max) if present}
        kept |= set([i for i in bucket if points[i][1] is None][:1])
    return [points[i] for i in sorted(kept)], size


def ticks(low: float, high: float, about: int = 5, least: float = 0.0) -> list[float]:
    """Returns round values, 1, 2 or 5 times a power of ten apart (at least `least`), that enclose low to high."""
    rough = max((high - low) / about, least)
    power = math.floor(math.log10(rough))
    step = next(factor * 10.0**power for factor in (1, 2, 5, 10) if factor * 10.0**power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, max(0, 1 - power)) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Returns powers of ten from low to high; 2 and 5 times them too where there would be few."""
    factors = (1, 2, 5) if high / low < 1000 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = max(1, len(powers) // 6)
    values = (factor * 10.0**power for power in powers if power % every == 0 for factor in factors)
    return [value for value in values if low <= value <= high]


def tick_label(value: float) -> str:
    """Formats 0.25, 1,500, 20k, 3M, 4e-4."""
    size = abs(value)
    if size >= 1e9 or 0 < size < 0.01:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    for unit, letter, least in ((1e6, "M", 1e6), (1e3, "k", 1e4)):
        if size >= least:
            return f"{value / unit:.4g}{letter}"
    return f"{value:,.4g}" if size < 1000 else f"{value:,.0f}"


def value_label(value: float) -> str:
    return tick_label(float(f"{value:.3g}"))


def axis(low: float, high: float, start: float, end: float, is_log: bool = False):
    """Returns the function from values to drawing units."""
    change = math.log if is_log else float
    return lambda value: round(start + (end - start) * (change(value) - change(low)) / (change(high) - change(low)), 1)


def value_axis(values: list[float], from_zero: bool, may_be_log: bool):
    """Returns the upright axis that shows all values, its ticks, and whether it is logarithmic."""
    low, high = min(values), max(values)
    if may_be_log and low > 0 and high / low >= LOG_FROM:
        low, high = low / 1.2, high * 1.2
        return axis(low, high, BOTTOM, TOP, is_log=True), log_ticks(low, high), True
    if from_zero:
        low, high = min(0.0, low), max(0.0, high)
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):  # one value: in the middle, or above zero
        room = abs(high) / 10 or 1.0
        low, high = (0.0, 1.0) if high == 0 else (low - room, high + room)
    marks = ticks(low, high)
    return axis(marks[0], marks[-1], BOTTOM, TOP), marks, False


def curve(series: Series, colour: str, across, upright) -> str:
    """Draws the points, thinned; a path for each stretch without a gap."""
    stretches = [[]]
    points, _ = thin(series.points)
    for step, value in points:
        if value is not None:
            stretches[-1].append((step, value))
        elif stretches[-1]:
            stretches.append([])
    parts = []
    for stretch in filter(None, stretches):
        if len(stretch) > 1:
            path = "L".join(f"{across(step):g} {upright(value):g}" for step, value in stretch)
            parts.append(f'<path class="curve{" marked" * series.marked}" d="M{path}"/>')
        if len(stretch) == 1 or (series.marked and len(points) <= MOST_DOTS):
            parts += [
                f'<circle class="dot" cx="{across(step):g}" cy="{upright(value):g}" r="3">'
                f"<title>step {step:,g}: {value:.4g}</title></circle>"
                for step, value in stretch
            ]
    return f'<g class="{colour}">{"".join(parts)}</g>'


def last_labels(labels: list[tuple[str, float, float]]) -> str:
    """Writes the curves' last values (colour, value, height) to their right, moved apart where they would meet."""
    labels = sorted(labels, key=lambda label: label[2])
    heights = [height for _, _, height in labels]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + LABEL_DISTANCE)
    too_low = max(0.0, heights[-1] - BOTTOM)
    return "".join(
        f'<text class="last {colour}" x="{RIGHT + 6}" y="{height - too_low + 4:g}">{value_label(value)}</text>'
        for (colour, value, _), height in zip(labels, heights, strict=True)
    )


def grid(across, upright, steps: list[float], marks: list[float], zero: float | None, epochs: Sequence[float]) -> str:
    def line(kind: str, x1, x2, y1, y2) -> str:
        return f'<line class="{kind}" x1="{x1:g}" x2="{x2:g}" y1="{y1:g}" y2="{y2:g}"/>'

    def text(x, y, anchor: str, content: str) -> str:
        return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{content}</text>'

    parts = [line("axis", LEFT, RIGHT, BOTTOM, BOTTOM), text(WIDTH, BOTTOM + 17, "end", "step")]
    for mark in marks:
        y = upright(mark)
        parts += [
            line("axis" if mark == zero else "grid", LEFT, RIGHT, y, y),
            text(LEFT - 7, y + 4, "end", tick_label(mark)),
        ]
    parts += [line("epoch", across(epoch), across(epoch), TOP, BOTTOM) for epoch in epochs]
    for step in steps:
        x = across(step)
        parts += [line("axis", x, x, BOTTOM, BOTTOM + 4), text(x, BOTTOM + 17, "middle", tick_label(step))]
    return "".join(parts)


def line_chart(
    title: str,
    unit: str,
    all_series: Sequence[Series],
    epochs: Sequence[float] = (),
    from_zero: bool = False,
    may_be_log: bool = False,
) -> str | None:
    """Returns a chart over steps as an HTML figure; None where no series has a value.

    Args:
        epochs: Steps at which an epoch ends; drawn as dotted lines.
        from_zero: The axis shows zero, whatever the values.
        may_be_log: The axis is logarithmic where the values differ a lot; the caption then says so.
    """
    all_series = [series for series in all_series if any(value is not None for _, value in series.points)]
    if not all_series:
        return None
    values = [value for series in all_series for _, value in series.points if value is not None]
    last_step = max(1.0, max(step for series in all_series for step, _ in series.points))
    upright, marks, is_log = value_axis(values, from_zero, may_be_log)
    across = axis(0.0, last_step, LEFT, RIGHT)
    steps = [step for step in ticks(0.0, last_step, least=1.0) if step <= last_step]
    colours = [f"c{number}" for number in range(1, len(all_series) + 1)]
    last = [next(value for _, value in reversed(series.points) if value is not None) for series in all_series]
    named = list(zip(colours, all_series, last, strict=True))
    keys = "".join(f'<span class="key {colour}">{escape(series.name)}</span>' for colour, series, _ in named)
    buckets = [(series, thin(series.points)[1]) for series in all_series]
    notes = [f"lowest and highest of each {bucket} of {len(s.points):,} reports" for s, bucket in buckets if bucket > 1]
    label = ", ".join(f"{series.name or title} ends at {value_label(value)}" for _, series, value in named)
    return (
        f"<figure><figcaption><strong>{escape(title)}</strong>"
        f"<span>{escape(unit)}{', log scale' if is_log else ''}</span>"
        f"{keys if len(named) > 1 else ''}{''.join(f'<span class=note>{note}</span>' for note in notes)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{title} over steps: {label}")}">'
        f"{grid(across, upright, steps, marks, None if is_log else 0, epochs)}"
        f"{''.join(curve(series, colour, across, upright) for colour, series, _ in named)}"
        f"{last_labels([(colour, value, upright(value)) for colour, _, value in named])}</svg></figure>"
    )
