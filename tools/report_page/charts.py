"""Charts as SVG, in the page's own colours: lines with bands, points, coloured cells, filled contours.

Each is as wide as its column and has letters that can be read on a phone; colours that are not data are classes of page.css.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from markupsafe import Markup

from tools.report_page.colours import sequential

WIDTH, HEIGHT = 440, 280
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 46  # around the plot: room for ticks and names of axes
TILTED = 74  # below the plot where ticks are names
BAR = 84  # right of a map: its colours and what they mean
MARKERS = ("M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0", "M-4,-4h8v8h-8z", "M0,-5l5,9h-10z", "M0,-5l5,5l-5,5l-5,-5z")
MOST_MARKERS = 30  # on a line
MOST_NUMBERS = 64  # cells of a map that have theirs written into them
BANDS = 14  # of a contour map


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: for the legend.
        values: at each x.
        colour: any CSS colour.
        spread: half the height of the band around the line, at each x.
    """

    name: str
    values: Sequence[float]
    colour: str
    spread: Sequence[float] = field(default=())


def line_chart(
    x: Sequence[float | str],
    series: Sequence[Series],
    x_name: str,
    y_name: str,
    low: float | None = None,
    log: bool = False,
) -> Markup:
    """Lines over numbers or over names.

    Args:
        x: positions, or names that are written below the lines.
        series: the lines.
        x_name: of the axis; not written below names.
        y_name: of the axis.
        low: where the vertical axis begins, if not at the lowest value.
        log: the positions' logarithms are evenly spaced.
    """
    named = isinstance(x[0], str)
    places = np.arange(len(x), dtype=float) if named else np.log10(x) if log else np.array(x, float)
    edges = [np.array(s.values) + sign * np.array(s.spread or 0) for s in series for sign in (-1, 1)]
    lowest, highest = float(np.nanmin(edges)), float(np.nanmax(edges))
    y_ticks = _ticks(lowest if low is None else min(low, lowest), highest)
    bottom = HEIGHT - (TILTED if named else BOTTOM)
    across = _scale(places.min(), places.max(), LEFT + 8, WIDTH - RIGHT - 8)
    down = _scale(y_ticks[0], y_ticks[-1], bottom, TOP)
    if named or log:
        x_ticks = [(across(place), _short(label)) for place, label in zip(places, x, strict=True)]
        x_ticks = x_ticks[:: -(-len(x_ticks) // 12)]
    else:
        x_ticks = _within(across, places.min(), places.max())
    parts = [_axes(x_ticks, [(down(tick), f"{tick:g}") for tick in y_ticks], x_name, y_name, bottom, tilted=named)]
    for number, line in enumerate(series):
        parts += _line(line, [across(place) for place in places], down, MARKERS[number % len(MARKERS)])
    return _svg(f"{y_name} over {x_name}: {', '.join(line.name for line in series)}", parts)


def _line(line: Series, places: Sequence[float], down: Callable[[float], float], marker: str) -> list[Markup]:
    known = [i for i, value in enumerate(line.values) if np.isfinite(value)]
    points = [(places[i], down(line.values[i])) for i in known]
    parts = []
    if len(line.spread):
        upper = [(places[i], down(line.values[i] + line.spread[i])) for i in known]
        lower = [(places[i], down(line.values[i] - line.spread[i])) for i in known]
        parts.append(_tag("polygon", points=_points(upper + lower[::-1]), fill=line.colour, opacity=0.18))
    parts.append(_tag("polyline", points=_points(points), fill="none", stroke=line.colour, stroke_width=2))
    if len(points) <= MOST_MARKERS:
        for i, (x, y) in zip(known, points, strict=True):
            title = _tag("title", f"{line.name}: {line.values[i]:.4g}")
            parts.append(_tag("path", title, d=marker, transform=f"translate({x:.1f} {y:.1f})", fill=line.colour))
    return parts


def scatter(x: Sequence[float], y: Sequence[float], best: int, x_name: str, y_name: str) -> Markup:
    """Points, one of which is marked as the best."""
    x_ticks, y_ticks = _ticks(min(x), max(x)), _ticks(min(y), max(y))
    across = _scale(x_ticks[0], x_ticks[-1], LEFT + 8, WIDTH - RIGHT - 8)
    down = _scale(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    ticks = [[(scale(t), f"{t:g}") for t in ts] for scale, ts in ((across, x_ticks), (down, y_ticks))]
    parts = [_axes(*ticks, x_name, y_name)]
    for i in [*(i for i in range(len(x)) if i != best), best]:
        title = _tag("title", f"{x[i]:.4g}: {y[i]:.4g}")
        kind, radius = ("point best", 6) if i == best else ("point", 4)
        parts.append(_tag("circle", title, cx=across(x[i]), cy=down(y[i]), r=radius, class_=kind))
    return _svg(f"{y_name} over {x_name}; best at {x[best]:.4g}", parts)


def grid_map(
    x: Sequence[float], y: Sequence[float], values: np.ndarray, best: tuple[int, int], names: tuple[str, str, str]
) -> Markup:
    """Cells coloured by value, the best one framed.

    Args:
        x: positions of the columns, ascending.
        y: of the rows, ascending.
        values: (rows, columns); NaN where nothing was measured.
        best: row and column.
        names: of x, y and the values.
    """
    size = WIDTH - LEFT - BAR
    width, height = size / len(x), size / len(y)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    columns = [LEFT + i * width for i in range(len(x))]
    rows = [TOP + size - (i + 1) * height for i in range(len(y))]
    x_ticks = [(place + width / 2, f"{value:.3g}") for place, value in zip(columns, x, strict=True)]
    y_ticks = [(place + height / 2, f"{value:.3g}") for place, value in zip(rows, y, strict=True)]
    thinned = [ticks[:: -(-len(ticks) // 6)] for ticks in (x_ticks, y_ticks)]
    parts = [_axes(*thinned, names[0], names[1], TOP + size, WIDTH - BAR, grid=False)]
    for (row, column), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        share = (value - low) / max(high - low, 1e-12)
        title = _tag("title", f"{names[0]} {x[column]:.3g}, {names[1]} {y[row]:.3g}: {value:.4f}")
        place = {"x": columns[column], "y": rows[row], "width": width + 0.3, "height": height + 0.3}
        parts.append(_tag("rect", title, **place, fill=sequential(share)))
        if values.size <= MOST_NUMBERS:
            middle = {"x": columns[column] + width / 2, "y": rows[row] + height / 2 + 4}
            ink = "#000" if share > 0.55 else "#fff"
            parts.append(_tag("text", f"{value:.3f}", **middle, class_="cell", style=f"fill:{ink}"))
    parts.append(_tag("rect", x=columns[best[1]], y=rows[best[0]], width=width, height=height, class_="frame"))
    parts.append(_colour_bar(f"{low:.3f}", f"{high:.3f}", size))
    where = f"best at {x[best[1]]:.3g}, {y[best[0]]:.3g}"
    title = f"{names[2]} over {names[0]} and {names[1]}: from {low:.4f} to {high:.4f}, {where}"
    return _svg(title, parts, TOP + size + BOTTOM)


def contour_map(
    x: Sequence[float], y: Sequence[float], values: np.ndarray, points: Mapping[str, Sequence[float]], name: str
) -> Markup:
    """Filled contours of a function on a plane, bright where it is low, with named points.

    Args:
        x: positions of the columns, ascending.
        y: of the rows, ascending, in the same unit.
        values: (rows, columns).
        points: (x, y) by name.
        name: of the values.
    """
    from contourpy import contour_generator

    width = WIDTH - LEFT - BAR
    height = min(max(width * (y[-1] - y[0]) / (x[-1] - x[0]), 0.5 * width), 1.5 * width)
    across, down = _scale(x[0], x[-1], LEFT, LEFT + width), _scale(y[0], y[-1], TOP + height, TOP)
    low, high = float(np.min(values)), float(np.max(values))
    # evenly by rank: a loss rises steeply at the rim, and the valleys are what is looked at
    levels = np.unique(np.quantile(values, np.linspace(0, 1, BANDS + 1)))
    contours = contour_generator(np.array(x), np.array(y), values, fill_type="OuterOffset")
    parts = []
    for number, (lower, upper) in enumerate(pairwise(levels)):
        fill = sequential(1 - number / max(len(levels) - 2, 1))
        for vertices, offsets in zip(*contours.filled(lower, upper), strict=True):
            rings = [[(across(px), down(py)) for px, py in vertices[a:b]] for a, b in pairwise(offsets)]
            outline = " ".join(f"M{_points(ring)}Z" for ring in rings)
            title = _tag("title", f"{name} {lower:.4g} to {upper:.4g}")
            parts.append(_tag("path", title, d=outline, fill=fill, stroke=fill, stroke_width=0.5, fill_rule="evenodd"))
    ticks = [_within(across, x[0], x[-1]), _within(down, y[0], y[-1])]
    parts.append(_axes(*ticks, "", "", TOP + height, WIDTH - BAR, grid=False))
    parts.append(_colour_bar(f"{low:.3g}", f"{high:.3g}", height, bright_is_low=True))
    for label, (px, py) in points.items():
        at_right = across(px) > LEFT + 0.6 * width
        text = {"x": across(px) + (-9 if at_right else 9), "y": down(py) + 4}
        parts.append(_tag("circle", cx=across(px), cy=down(py), r=5, class_="pin"))
        parts.append(_tag("text", label, **text, class_="pin", text_anchor="end" if at_right else "start"))
    title = f"{name} on a plane: from {low:.4g} (bright) to {high:.4g} (dark); points {', '.join(points)}"
    return _svg(title, parts, TOP + height + 26)


def _axes(
    x: Sequence[tuple[float, str]],
    y: Sequence[tuple[float, str]],
    x_name: str,
    y_name: str,
    bottom: float = HEIGHT - BOTTOM,
    right: float = WIDTH - RIGHT,
    grid: bool = True,
    tilted: bool = False,
) -> Markup:
    """Ticks, at pixels, with their texts; names of the axes; lines across the plot."""
    parts = []
    for place, text in x:
        if tilted:
            turned = f"translate({place:.1f} {bottom + 14:.1f}) rotate(-35)"
            parts.append(_tag("text", text, transform=turned, text_anchor="end"))
        else:
            parts.append(_tag("text", text, x=place, y=bottom + 18, text_anchor="middle"))
    for place, text in y:
        parts.append(_tag("text", text, x=LEFT - 7, y=place + 4, text_anchor="end"))
        if grid:
            parts.append(_tag("path", d=f"M{LEFT},{place:.1f}H{right}", class_="grid"))
    if not tilted:
        parts.append(_tag("text", x_name, x=(LEFT + right) / 2, y=bottom + 39, text_anchor="middle", class_="axis"))
    turned = f"translate(13 {(TOP + bottom) / 2:.1f}) rotate(-90)"
    parts.append(_tag("text", y_name, transform=turned, text_anchor="middle", class_="axis"))
    return Markup("").join(parts)


def _colour_bar(low: str, high: str, height: float, bright_is_low: bool = False) -> Markup:
    """What the colours of a map mean, right of it: from the lowest value, below, to the highest."""
    parts, steps = [], 24
    for i in range(steps):
        share = (i + 0.5) / steps
        place = {"x": WIDTH - BAR + 14, "y": TOP + height * (1 - (i + 1) / steps)}
        fill = sequential(1 - share if bright_is_low else share)
        parts.append(_tag("rect", **place, width=12, height=height / steps + 0.3, fill=fill))
    parts.append(_tag("text", high, x=WIDTH - BAR + 31, y=TOP + 10))
    parts.append(_tag("text", low, x=WIDTH - BAR + 31, y=TOP + height))
    return Markup("").join(parts)


def _svg(title: str, parts: Sequence[Markup], height: float = HEIGHT) -> Markup:
    return _tag("svg", *parts, viewBox=f"0 0 {WIDTH} {height:.0f}", role="img", aria_label=title)


def _tag(name: str, *content: str | Markup, **attributes: object) -> Markup:
    """An element; text and attributes are escaped, ``class_`` becomes class and ``_`` within a name ``-``."""
    opened = Markup("").join(
        Markup(' {}="{}"').format(
            key.rstrip("_").replace("_", "-"), f"{value:.5g}" if isinstance(value, float) else value
        )
        for key, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(name, opened, Markup("").join(content))


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from at or below the lowest value to at or above the highest."""
    from matplotlib.ticker import MaxNLocator

    if high - low < 1e-12:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    return [float(f"{tick:.10g}") for tick in MaxNLocator(5).tick_values(low, high)]


def _within(scale: Callable[[float], float], low: float, high: float) -> list[tuple[float, str]]:
    """Ticks at round numbers of an axis that ends at others."""
    return [(scale(tick), f"{tick:g}") for tick in _ticks(low, high) if low <= tick <= high]


def _scale(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    """The function that takes ``low`` to ``start`` and ``high`` to ``stop``."""
    factor = (stop - start) / ((high - low) or 1)
    return lambda value: float(start + (value - low) * factor)


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{px:.1f},{py:.1f}" for px, py in points)


def _short(label: float | str) -> str:
    text = label if isinstance(label, str) else f"{label:g}"
    return text if len(text) <= 14 else f"{text[:13]}…"
