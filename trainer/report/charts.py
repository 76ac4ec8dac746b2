"""Lays out line charts as lines, dots and texts: page.html draws them as SVG, model_card.py as PNG.

A chart is 420 units wide, so that its labels stay readable on a phone, where it fills the screen.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby

WIDTH, HEIGHT = 420, 236
LEFT, RIGHT, TOP, BOTTOM = 46, 410, 12, 206  # of the plotting area; the labels stand around it
MOST_DOTS = 25  # of a curve: more would touch
LOG_FROM = 20  # ratio of the highest value to the lowest from which an axis may be logarithmic


@dataclass
class Chart:
    """The lines, dots and texts of a chart. Styles are CSS classes; c1, c2 ... are the curves'.

    Attributes:
        unit: Of the values.
        ends: Each curve's name and last value.
        lines: (style, [(x, y), ...])
        dots: (style, x, y, tooltip)
        texts: (x, y, text-anchor, text)
    """

    unit: str
    ends: list[tuple[str, str]] = field(default_factory=list)
    lines: list[tuple[str, list[tuple[float, float]]]] = field(default_factory=list)
    dots: list[tuple[str, float, float, str]] = field(default_factory=list)
    texts: list[tuple[float, float, str, str]] = field(default_factory=list)


def line_chart(unit: str, curves: dict[str, list[tuple[int, float | None]]], may_be_log=False) -> Chart | None:
    """Lays out a chart over steps.

    Args:
        curves: (step, value) points by name, at rising steps; None is a gap.
        may_be_log: The axis is logarithmic if the values span a wide range (`unit` then says so), and need not show
            zero.

    Returns:
        The chart; None if no curve has a value.
    """
    points = [point for curve in curves.values() for point in curve if point[1] is not None]
    if not points:
        return None
    y, marks, is_log = value_axis([value for _, value in points], may_be_log)
    last_step = max(1, *(step for step, _ in points))
    x = axis(0, last_step, LEFT, RIGHT)
    chart = Chart(f"{unit}, log scale" if is_log else unit)
    for mark in marks:
        chart.lines.append(("grid" if mark else "axis", [(LEFT, y(mark)), (RIGHT, y(mark))]))
        chart.texts.append((LEFT - 7, y(mark), "end", f"{mark:,g}"))
    chart.lines.append(("axis", [(LEFT, BOTTOM), (RIGHT, BOTTOM)]))
    for step in (step for step in ticks(0, last_step) if step <= last_step and step == int(step)):
        chart.lines.append(("axis", [(x(step), BOTTOM), (x(step), BOTTOM + 4)]))
        chart.texts.append((x(step), BOTTOM + 13, "middle", f"{step:,.0f}"))
    for name, curve in curves.items():
        runs = [list(run) for is_gap, run in groupby(curve, lambda point: point[1] is None) if not is_gap]
        if not runs:
            continue
        chart.ends.append((name, f"{float(f'{runs[-1][-1][1]:.3g}'):,g}"))
        style = f"c{len(chart.ends)}"
        for run in runs:
            chart.lines.append((f"curve {style}", [(x(step), y(value)) for step, value in run]))
            if len(curve) <= MOST_DOTS or len(run) == 1:
                chart.dots += [(style, x(step), y(value), f"step {step:,}: {value:,.4g}") for step, value in run]
    return chart


def value_axis(values: list[float], may_be_log: bool) -> tuple[Callable[[float], float], list[float], bool]:
    """Returns the vertical axis that shows all values, its ticks, and whether it is logarithmic."""
    low, high = min(values), max(values)
    if may_be_log and low > 0 and high / low >= LOG_FROM:
        low, high = low / 1.2, high * 1.2
        factors = (1, 2, 5) if high / low < 1000 else (1,)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        marks = [factor * 10.0**power for power in powers for factor in factors]
        return axis(low, high, BOTTOM, TOP, math.log), [mark for mark in marks if low <= mark <= high], True
    if not may_be_log:
        low, high = min(0.0, low), max(0.0, high)
    if low == high:
        low, high = low - abs(low) / 10, high + (abs(high) / 10 or 1.0)
    marks = ticks(low, high)
    return axis(marks[0], marks[-1], BOTTOM, TOP), marks, False


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
