"""A circuit's layout as lines, areas and words, which any library can draw: the picture itself, once.

Sign is shown by colour (blue, orange: Okabe and Ito's, told apart by everyone) and by dash, so that it stays in grey.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np

from circuitsae.report.circuit_diagram import Arrow, Columns, Diagram
from circuitsae.report.circuit_layout import DETAIL, LEADING, TITLE, Layout, Placed, Point, Route, arrange_circuit
from circuitsae.report.lettering import clean, width, wrapped

INK, GREY, PAPER = "#1a1a1a", "#5b6470", "#ffffff"
RAISES, LOWERS = "#0072B2", "#D55E00"
_FILL = {"answer": "#fff3cf", "group": "#dbe9f4", "feature": "#f1f5f9", "error": "#ffffff", "token": "#ffffff"}
_EDGE = {"answer": "#8a6d1a", "group": "#35618a", "feature": "#7d8fa3", "error": "#8a8a8a", "token": "#b4b4b4"}
_DASHED = (3.0, 2.0)
_THINNEST, _WIDEST = 0.5, 3.4
_HEAD = 5.0
_LABEL, _SENTENCE, _LEGEND = 6.0, 7.2, 6.0
_MARGIN = 3.0
_TRIES = (1.0, 1.25, 1.6, 2.0, 2.6, 3.4)
"""How much higher the gaps between rows are made until every weight has a place."""

Command = tuple[str, tuple[Point, ...]]
"""A step: M, L, C or Z of a path, as in SVG; C is a Bézier curve of three points, Z goes back to the start."""


@dataclass(frozen=True, slots=True)
class Outline:
    """A line or an area."""

    path: tuple[Command, ...]
    stroke: str | None
    width: float = 0.0
    dash: tuple[float, ...] = ()
    fill: str | None = None


@dataclass(frozen=True, slots=True)
class Words:
    """A line of text around, or from, a point at half its height."""

    text: str
    x: float
    y: float
    size: float
    color: str = INK
    bold: bool = False
    anchor: Literal["middle", "start"] = "middle"
    paper: bool = False
    """Whether it hides what is behind it."""

    @property
    def rectangle(self) -> tuple[float, float, float, float]:
        """Left, bottom, right, top."""
        wide, tall = width(self.text, self.size, bold=self.bold), self.size * LEADING
        left = self.x - wide / 2 if self.anchor == "middle" else self.x
        return left, self.y - tall / 2, left + wide, self.y + tall / 2


@dataclass(frozen=True)
class Shapes:
    """Everything to draw, from back to front, on a page of this size with its origin at the lower left."""

    outlines: tuple[Outline, ...]
    words: tuple[Words, ...]
    width: float
    height: float
    layout: Layout
    labels: dict[tuple[str, str], Words] = field(default_factory=dict)
    """Of each arrow what is written on it."""


def shapes_of(diagram: Diagram, columns: Columns = 2) -> Shapes:
    """The picture of a diagram; the rows are moved apart until every weight has a place of its own."""
    layout, labels = _labelled(diagram, columns)
    below = list(_below(diagram, layout.width))
    foot = -below[-1].rectangle[1] if below else 0.0
    lift = foot + _MARGIN
    outlines = [shape for route in sorted(layout.routes, key=lambda r: r.arrow.strength) for shape in _arrow(route)]
    outlines += [_frame(one) for one in layout.placed]
    words = [line for one in layout.placed for line in _texts(one)]
    moved = {key: _moved(label, lift) for key, label in labels.items()}
    return Shapes(
        outlines=tuple(_lifted(shape, lift) for shape in outlines),
        words=(*moved.values(), *(_moved(line, lift) for line in (*words, *below))),
        width=layout.width + 2 * _MARGIN,
        height=layout.height + lift + _MARGIN,
        layout=layout,
        labels=moved,
    )


def _labelled(diagram: Diagram, columns: Columns) -> tuple[Layout, dict[tuple[str, str], Words]]:
    """The lowest layout in which every weight has a place, or the highest that is tried."""
    for stretch in _TRIES[:-1]:
        layout = arrange_circuit(diagram, columns, stretch=stretch)
        if len(labels := _labels(layout)) == len(layout.routes):
            return layout, labels
    layout = arrange_circuit(diagram, columns, stretch=_TRIES[-1])
    return layout, _labels(layout)


def _moved(words: Words, up: float) -> Words:
    return Words(words.text, words.x + _MARGIN, words.y + up, words.size, words.color, words.bold, words.anchor,
                 words.paper)  # fmt: skip


def _lifted(shape: Outline, up: float) -> Outline:
    path = tuple((letter, tuple((x + _MARGIN, y + up) for x, y in points)) for letter, points in shape.path)
    return Outline(path, shape.stroke, shape.width, shape.dash, shape.fill)


# boxes


def _frame(one: Placed) -> Outline:
    left, bottom, right, top = one.rectangle
    r = 0.0 if one.box.kind == "token" else 3.0
    k = r * 0.4477  # a quarter of a circle as a Bézier curve
    path: list[Command] = [("M", ((left + r, bottom),)), ("L", ((right - r, bottom),))]
    if r:
        path.append(("C", ((right - k, bottom), (right, bottom + k), (right, bottom + r))))
    path.append(("L", ((right, top - r),)))
    if r:
        path.append(("C", ((right, top - k), (right - k, top), (right - r, top))))
    path.append(("L", ((left + r, top),)))
    if r:
        path.append(("C", ((left + k, top), (left, top - k), (left, top - r))))
    path.append(("L", ((left, bottom + r),)))
    if r:
        path.append(("C", ((left, bottom + k), (left + k, bottom), (left + r, bottom))))
    path.append(("Z", ()))
    kind = one.box.kind
    dash = _DASHED if kind == "error" else ()
    return Outline(tuple(path), _EDGE[kind], 1.1 if kind in ("answer", "group") else 0.7, dash, _FILL[kind])


def _texts(one: Placed) -> Iterator[Words]:
    bold = one.box.kind in ("answer", "group")
    lines = [(text, TITLE, INK, bold) for text in one.title] + [(text, DETAIL, GREY, False) for text in one.detail]
    y = one.y + sum(size for _, size, _, _ in lines) * LEADING / 2
    for text, size, color, heavy in lines:
        y -= size * LEADING / 2
        yield Words(text, one.x, y, size, color, heavy)
        y -= size * LEADING / 2


# arrows


def _arrow(route: Route) -> Iterator[Outline]:
    """The line and its head."""
    color, dash = _colour(route.arrow), _DASHED if route.arrow.weight < 0 else ()
    wide = _THINNEST + (_WIDEST - _THINNEST) * min(max(route.arrow.strength, 0.0), 1.0)
    *before, (x, y) = route.points
    up = 1.0 if y > before[0][1] else -1.0
    head, half = _HEAD + wide, 2.0 + 0.75 * wide
    yield Outline(tuple(_line((*before, (x, y - up * head * 0.8)))), color, wide, dash)
    base = y - up * head
    tip: tuple[Command, ...] = (("M", ((x, y),)), ("L", ((x - half, base),)), ("L", ((x + half, base),)), ("Z", ()))
    yield Outline(tip, None, 0.0, (), color)


def _colour(arrow: Arrow) -> str:
    return GREY if arrow.looks else LOWERS if arrow.weight < 0 else RAISES


def _line(points: Sequence[Point]) -> Iterator[Command]:
    yield "M", (points[0],)
    for place, ((x0, y0), (x1, y1)) in enumerate(pairwise(points)):
        if place % 2 == 0:
            yield "L", ((x1, y1),)
        else:
            yield "C", ((x0, (y0 + y1) / 2), (x1, (y0 + y1) / 2), (x1, y1))


_T = np.linspace(0, 1, 25)


def way(points: Sequence[Point]) -> np.ndarray:
    """[sample, 2] points along a route's curves, evenly many of each, from its source to its target."""
    parts = []
    for place, (a, b) in enumerate(pairwise(points)):
        if place % 2 == 0:
            continue
        middle = (a[1] + b[1]) / 2
        control = np.array([a, (a[0], middle), (b[0], middle), b])
        t = _T[:, None]
        basis = np.concatenate([(1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3], axis=1)
        parts.append(basis @ control)
    return np.concatenate(parts)


# weights beside arrows


def _labels(layout: Layout) -> dict[tuple[str, str], Words]:
    """Each arrow's label on its line, where it covers no box, no other label and as few other lines as can be.

    Those that find no place are left out; strong arrows choose first.
    """
    ways = [way(route.points) for route in layout.routes]
    taken = [one.rectangle for one in layout.placed]
    found: dict[tuple[str, str], Words] = {}
    for number in sorted(range(len(ways)), key=lambda n: (-layout.routes[n].arrow.strength, n)):
        arrow = layout.routes[number].arrow
        text = clean(arrow.label)
        half = np.array([width(text, _LABEL), _LABEL * LEADING]) / 2
        low, high = ways[number] - half, ways[number] + half
        free = (low[:, 0] >= 0) & (high[:, 0] <= layout.width)
        for left, bottom, right, top in taken:
            free &= (high[:, 0] <= left) | (low[:, 0] >= right) | (high[:, 1] <= bottom) | (low[:, 1] >= top)
        if not free.any():
            continue
        others = np.concatenate([np.zeros((0, 2)), *(w for other, w in enumerate(ways) if other != number)])
        covered = ((others > low[:, None]) & (others < high[:, None])).all(2).sum(1)
        cost = covered + 4 * np.abs(np.linspace(0, 1, len(free)) - 0.5)
        best = int(np.where(free, cost, np.inf).argmin())
        x, y = ways[number][best].tolist()
        found[arrow.source, arrow.target] = Words(text, x, y, _LABEL, _colour(arrow), paper=True)
        taken.append((*low[best].tolist(), *high[best].tolist()))
    return found


# below


def _below(diagram: Diagram, page: float) -> Iterator[Words]:
    """Title, sentences and legend in lines, downward from y = 0."""
    y = -6.0
    texts = [(diagram.title, _SENTENCE, INK, True, 2)]
    texts += [(sentence, _SENTENCE, INK, False, 8) for sentence in diagram.sentences]
    texts += [(diagram.legend, _LEGEND, GREY, False, 4)]
    for text, size, color, bold, lines in texts:
        if not text:
            continue
        for line in wrapped(clean(text), size, page, lines=lines, bold=bold):
            y -= size * LEADING
            yield Words(line, 0.0, y + size * LEADING / 2, size, color, bold, "start")
        y -= 1.5
