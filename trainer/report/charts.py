"""The layout of line charts: axes, ticks and labels. page.html draws them as inline SVG; page.css colours them.

A chart is 420 units wide, so that its labels stay readable on a phone, where it fills the screen.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

WIDTH, HEIGHT = 420, 236
LEFT, RIGHT, TOP, BOTTOM = 46, 366, 12, 206  # of the plotting area; the labels stand around it
MOST_POINTS = 500
MOST_DOTS = 60  # each with its value as a tooltip
LABEL_DISTANCE = 13
LOG_FROM = 20  # ratio of the highest value to the lowest from which an axis may be logarithmic


@dataclass(frozen=True)
class Series:
    """A curve: its name, its (step, value) points by rising step, None for a gap, and whether each point has a dot."""

    name: str
    points: Sequence[tuple[int, float | None]]
    marked: bool = False

    def values(self) -> list[float]:
        """Returns the values without the gaps."""
        return [value for _, value in self.points if value is not None]


def thin(points: Sequence, most: int = MOST_POINTS) -> tuple[Sequence, int]:
    """Returns at most `most` points and the bucket size: of each bucket its lowest, its highest and a gap are kept."""
    if len(points) <= most:
        return points, 1
    size = math.ceil(3 * len(points) / (most - 2))
    kept = {0, len(points) - 1}
    for begin in range(0, len(points), size):
        bucket = range(begin, min(begin + size, len(points)))
        gaps = [i for i in bucket if points[i][1] is None]
        rising = sorted(set(bucket) - set(gaps), key=lambda i: points[i][1])
        kept |= {*rising[:1], *rising[-1:], *gaps[:1]}
    return [points[i] for i in sorted(kept)], size


def ticks(low: float, high: float) -> list[float]:
    """Returns about five round values, 1, 2 or 5 times a power of ten apart, that enclose low to high."""
    rough = (high - low) / 5
    power = math.floor(math.log10(rough))
    step = next(factor * 10.0**power for factor in (1, 2, 5, 10) if factor * 10.0**power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, max(0, 1 - power)) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Returns powers of ten from low to high, with 2 and 5 times each where there would be few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    powers = range(first, last + 1)[:: max(1, (last - first) // 6)]
    factors = (1, 2, 5) if high / low < 1000 else (1,)
    return [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]


def tick_label(value: float) -> str:
    """Formats 0.25, 1,500, 20k, 3M, 4e-4."""
    size = abs(value)
    if size >= 1e9 or 0 < size < 0.01:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if size >= 1e6:
        return f"{value / 1e6:.4g}M"
    return f"{value / 1e3:.4g}k" if size >= 1e4 else f"{value:,.4g}"


def value_label(value: float) -> str:
    return tick_label(float(f"{value:.3g}"))


def axis(low: float, high: float, start: float, end: float, change: Callable = float) -> Callable[[float], float]:
    """Returns the function from values to drawing units; `change` is math.log for a logarithmic axis."""
    return lambda value: round(start + (end - start) * (change(value) - change(low)) / (change(high) - change(low)), 1)


def value_axis(values: list[float], may_be_log: bool) -> tuple[Callable[[float], float], list[float], bool]:
    """Returns the vertical axis that shows all values, its ticks, and whether it is logarithmic."""
    low, high = min(values), max(values)
    if may_be_log and low > 0 and high / low >= LOG_FROM:
        low, high = low / 1.2, high * 1.2
        return axis(low, high, BOTTOM, TOP, math.log), log_ticks(low, high), True
    if not may_be_log:
        low, high = min(0.0, low), max(0.0, high)
    if low == high:
        low, high = low - abs(low) / 10, high + (abs(high) / 10 or 1.0)
    marks = ticks(low, high)
    return axis(marks[0], marks[-1], BOTTOM, TOP), marks, False


def spread(heights: list[float]) -> list[float]:
    """Moves the labels at these heights apart where they would overlap, and up where one would leave the chart."""
    moved = {}
    for i in sorted(range(len(heights)), key=heights.__getitem__):
        moved[i] = max([heights[i], *(height + LABEL_DISTANCE for height in moved.values())])
    too_low = max(*moved.values(), BOTTOM) - BOTTOM
    return [round(moved[i] - too_low, 1) for i in range(len(heights))]


def curve(series: Series, label_y: float) -> dict:
    points, bucket = thin(series.points)
    stretches = [list(stretch) for is_gap, stretch in groupby(points, lambda point: point[1] is None) if not is_gap]
    return {
        "series": series,
        "last": series.values()[-1],
        "label_y": label_y,
        "bucket": bucket,
        "stretches": stretches,
        "has_dots": series.marked and len(points) <= MOST_DOTS,
    }


def line_chart(unit: str, all_series: list[Series], epochs: Sequence[int] = (), may_be_log=False) -> dict | None:
    """Lays out a chart over steps, for page.html to draw.

    Args:
        epochs: Steps at which an epoch ends; drawn as dotted lines.
        may_be_log: The axis is logarithmic where the values span a wide range (the caption then says so), and need not
            show zero.

    Returns:
        What is drawn where; None where no series has a value.
    """
    all_series = [series for series in all_series if series.values()]
    if not all_series:
        return None
    y, marks, is_log = value_axis([value for series in all_series for value in series.values()], may_be_log)
    last_step = max(1, *(series.points[-1][0] for series in all_series))
    heights = spread([y(series.values()[-1]) for series in all_series])
    return {
        "unit": f"{unit}, log scale" if is_log else unit,
        "curves": [curve(series, height) for series, height in zip(all_series, heights, strict=True)],
        "x": axis(0, last_step, LEFT, RIGHT),
        "y": y,
        "marks": marks,
        "steps": [step for step in ticks(0, last_step) if step <= last_step and step == int(step)],
        "epochs": epochs,
    }
