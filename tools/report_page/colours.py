"""Colours that colour-blind people can tell apart, in light and in dark."""

from __future__ import annotations

# Okabe and Ito's (jfly.uni-koeln.de/color) without black, then what Paul Tol's "muted" (sronpersonalpages.nl/~pault) adds
ORGANS = (
    "#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#0072B2",
    "#AA4499", "#DDCC77", "#44AA99", "#882255", "#999933", "#88CCEE", "#117733", "#CC6677", "#332288",
)  # fmt: skip


def organ_colours(count: int) -> list[str]:
    """So many colours; beyond the sixteenth they come again."""
    return [ORGANS[i % len(ORGANS)] for i in range(count)]


def mixed(value: float, centre: float, reach: float) -> tuple[str, int]:
    """How a value of a diverging scale is coloured: its side, which is a class in page.css, and how strongly, in percent.

    Args:
        value: what is shown.
        centre: the value without colour.
        reach: distance from the centre at which the colour is full; beyond it nothing changes.
    """
    share = max(-1.0, min(1.0, (value - centre) / reach))
    return ("above" if share >= 0 else "below"), round(55 * abs(share))  # more, and the text on it is hard to read


def sequential(share: float) -> str:
    """A colour of viridis.

    Args:
        share: 0 for the darkest, 1 for the brightest.
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return to_hex(colormaps["viridis"](share))
