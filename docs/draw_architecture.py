"""Draw docs/architecture.svg: the packages as floors, from the table in tests/test_architecture.py.

    uv run --extra test python docs/draw_architecture.py

An arrow says "imports". One that follows from others is left out: where a imports b and b imports
c, there is none from a to c.
"""

from __future__ import annotations

import runpy
from collections import defaultdict
from graphlib import TopologicalSorter
from itertools import pairwise
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path as Curve

DOCS = Path(__file__).parent
PICTURE = DOCS / "architecture.svg"
HOUSES = {
    "nodes": ("#2f6da8", "#e4eef8", "nodes/: in ComfyUI, without diffusers"),
    "trainers": ("#43802f", "#e6f3e0", "trainers/: training, without ComfyUI"),
    "pcpo": ("#b06a1f", "#fcecd9", "pcpo/: the method, without either"),
}
"""From the top down, each with two colours and what it is."""
NAMES = {"": "ComfyUI's entry", "trainers": "command pcpo"}
BOX, TALL, BEND, GAP = 1.0, 0.4, 0.1, 0.14
"""Width and height of a package, width of an arrow that passes, and the distance of two."""

Arrows = dict[str, set[str]]
Spot = tuple[str, str, int]
"""Whence, whither and floor: where an arrow passes, or a package (the same name twice)."""


def house(package: str) -> str:
    """Which of the three a package is of."""
    return package.split(".")[0] or "nodes"


def known(arrows: Arrows) -> Arrows:
    """All that each package imports, also through others: itself where there is a circle."""
    found = {package: set(row) for package, row in arrows.items()}
    for through in found:
        for row in found.values():
            if through in row:
                row |= found[through]
    return found


def drawn(arrows: Arrows) -> set[tuple[str, str]]:
    """The arrows that do not follow from others."""
    found = known(arrows)
    pairs = {(a, b) for a, row in arrows.items() for b in row}
    return {(a, b) for a, b in pairs if not any(b in found[c] for c in arrows[a])}


def floors(arrows: Arrows) -> dict[str, int]:
    """The floor of each package, 0 at the bottom: just below the lowest that imports it."""
    order = list(TopologicalSorter(arrows).static_order())
    floor: dict[str, int] = {}
    for package in order:  # just above what it imports, which is where those stay that none imports
        floor[package] = 1 + max((floor[other] for other in arrows[package]), default=-1)
    for package in reversed(order):
        users = [floor[other] for other, row in arrows.items() if package in row]
        floor[package] = min(users, default=floor[package] + 1) - 1
    return floor


def spread(wishes: list[float], widths: list[float]) -> list[float]:
    """The places nearest to those wished for, in the same order, at which nothing overlaps."""
    away = [0.0]
    for a, b in pairwise(widths):
        away.append(away[-1] + (a + b) / 2 + GAP)
    blocks: list[tuple[float, int]] = []  # of equal values: isotonic regression
    for wish, distance in zip(wishes, away, strict=True):
        blocks.append((wish - distance, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (a, m), (b, n) = blocks[-2:]
            blocks[-2:] = [((a * m + b * n) / (m + n), m + n)]
    starts = [value for value, count in blocks for _ in range(count)]
    return [start + distance for start, distance in zip(starts, away, strict=True)]


def places(arrows: Arrows) -> tuple[dict[Spot, float], list[list[Spot]]]:
    """Where each spot lies from left to right, and the spots of each arrow.

    Every spot goes to the mean of its neighbours, floor by floor, down and up in turn; the order on
    a floor is free at first and then stays.
    """
    floor = floors(arrows)
    ways = [
        [
            (a, a, floor[a]),
            *((a, b, k) for k in range(floor[a] - 1, floor[b], -1)),
            (b, b, floor[b]),
        ]
        for a, b in sorted(drawn(arrows))
    ]
    beside: dict[Spot, list[Spot]] = defaultdict(list)
    for above, below in (pair for way in ways for pair in pairwise(way)):
        beside[above].append(below)
        beside[below].append(above)
    rows: dict[int, list[Spot]] = defaultdict(list)
    for spot in sorted(beside, key=lambda spot: (list(HOUSES).index(house(spot[0])), spot)):
        rows[spot[2]].append(spot)
    x = {spot: float(i) for row in rows.values() for i, spot in enumerate(row)}
    for sweep in range(400):
        for level in sorted(rows, reverse=sweep % 2 == 0):
            row = rows[level]
            wish = {
                spot: sum(x[other] for other in beside[spot]) / len(beside[spot]) for spot in row
            }
            if sweep < 200:
                row.sort(key=lambda spot: (wish[spot], spot))
            widths = [BOX if spot[0] == spot[1] else BEND for spot in row]
            x |= zip(row, spread([wish[spot] for spot in row], widths), strict=True)
    return x, ways


def ports(x: dict[Spot, float], ways: list[list[Spot]], end: int) -> list[float]:
    """How far from the middle of its package each arrow ends: at 0 those above it, at -1 below."""
    shift = [0.0] * len(ways)
    for spot in {way[end] for way in ways}:
        own = [i for i, way in enumerate(ways) if way[end] == spot]
        own.sort(key=lambda i: x[ways[i][1 if end == 0 else -2]])
        for place, i in enumerate(own):
            shift[i] = 0.8 * BOX * ((place + 0.5) / len(own) - 0.5)
    return shift


def curve(points: list[tuple[float, float]]) -> Curve:
    """A line through points, upright in each."""
    corners, codes = [points[0]], [Curve.MOVETO]
    for (x, y), (x_next, y_next) in pairwise(points):
        middle = (y + y_next) / 2
        corners += [(x, middle), (x_next, middle), (x_next, y_next)]
        codes += [Curve.CURVE4] * 3
    return Curve(corners, codes)


def table() -> Arrows:
    """The packages that import or are imported, and what each imports."""
    rows = runpy.run_path(str(DOCS.parent / "tests" / "test_architecture.py"))["ARROWS"]
    arrows = {package: set(row.split()) for package, row in rows.items()}
    used = set().union(*arrows.values())
    return {package: row for package, row in arrows.items() if row or package in used}


def numbers(arrows: Arrows) -> str:
    """Arrows that lead to a house above their own and packages that import themselves, in words."""
    order = list(HOUSES)
    pairs = [
        (order.index(house(a)), order.index(house(b))) for a, row in arrows.items() for b in row
    ]
    up = sum(a > b for a, b in pairs)  # to a house above one's own
    circles = sum(package in row for package, row in known(arrows).items())
    return f"{len(arrows)} packages, {len(pairs)} arrows: {up} up, {circles} in circles"


def draw(arrows: Arrows) -> Figure:
    """The picture."""
    x, ways = places(arrows)
    figure = Figure(figsize=(10.4, 7.4))
    axes = figure.add_axes((0, 0, 1, 1))
    for way, first, last in zip(ways, ports(x, ways, 0), ports(x, ways, -1), strict=True):
        points = [(x[spot], float(spot[2])) for spot in way]
        points[0] = (points[0][0] + first, points[0][1] - TALL / 2)
        points[-1] = (points[-1][0] + last, points[-1][1] + TALL / 2)
        line = curve(points)
        colour = HOUSES[house(way[0][0])][0]
        arrow = FancyArrowPatch(path=line, arrowstyle="-|>", mutation_scale=7, color=colour, lw=0.8)
        arrow.set(fc="none", gid=f"{way[0][0]}->{way[-1][0]}")
        axes.add_patch(arrow)
    for package, same, level in x:
        if package == same:
            edge, fill, _ = HOUSES[house(package)]
            at = (x[package, same, level] - BOX / 2, level - TALL / 2)
            style = "round,pad=0,rounding_size=0.06"
            axes.add_patch(FancyBboxPatch(at, BOX, TALL, style, fc=fill, ec=edge, lw=1))
            name = NAMES.get(package, package.split(".")[-1])
            axes.text(at[0] + BOX / 2, level - 0.02, name, ha="center", va="center", fontsize=9)
    left, right = min(x.values()) - BOX / 2, max(x.values()) + BOX / 2
    for i, (edge, _, what) in enumerate(HOUSES.values()):
        axes.text(right, 1.3 - 0.4 * i, what, color=edge, fontsize=10, ha="right", weight="bold")
    axes.text(right, 0, numbers(arrows), fontsize=9, ha="right")
    axes.set(xlim=(left - 0.05, right + 0.05), ylim=(-0.3, max(k for _, _, k in x) + 0.3))
    axes.set_axis_off()
    return figure


if __name__ == "__main__":
    with rc_context({"svg.hashsalt": "architecture", "svg.fonttype": "none"}):
        draw(table()).savefig(PICTURE, metadata={"Date": None})
