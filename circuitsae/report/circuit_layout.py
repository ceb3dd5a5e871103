"""Where the boxes and arrows of a circuit's picture stand: rows from tokens to answers, few crossings, no overlap.

The layout of Sugiyama, Tagawa and Toda 1981 ("Methods for Visual Understanding of Hierarchical System Structures"):
rows, a place in each row for every arrow that passes it, an order of each row that crosses few arrows (barycentres),
and then the places,

    min Σ_a w_a |x_source(a) − x_target(a)|     with neighbours of a row apart, and all of it as wide as the page,

which is a linear program. The same diagram always gets the same picture. Units are points, y goes up.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy import sparse
from scipy.optimize import linprog

from circuitsae.report.circuit_diagram import Arrow, Box, Columns, Diagram
from circuitsae.report.lettering import clean, fitting, width, wrapped

Point = tuple[float, float]
WIDTHS: dict[int, float] = {1: 3.4 * 72, 2: 7.0 * 72}
TITLE, DETAIL = 7.0, 6.0
"""Sizes of the text in boxes."""
LEADING = 1.22
"""Height of a line, as a multiple of its size."""
PAD_X, PAD_Y = 4.0, 3.0
_MOST_TEXT = {1: 62.0, 2: 92.0}
_TITLE_LINES, _DETAIL_LINES = 3, 2
_GAP_X, _PASSING = 8.0, 6.0
"""Between boxes, and the width of the place where an arrow passes a row."""
_ROW, _PER_ARROW, _HIGHEST = 24.0, 1.5, 48.0
"""The height between two rows: at least, for each arrow more, and at most."""
_FULL = 0.75
"""How much of a row boxes may fill; the rest is for arrows that pass."""
_SPREAD = 0.6
"""Columns are at least this share of an even spread apart."""
_PORT = 6.0
"""Between arrows at the edge of a box, where there is room."""
_SWEEPS = 12


_KINDS = {"token": 0, "answer": 2}
"""Below and above all others."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A box with its place: its centre and size, and its text in lines."""

    box: Box
    x: float
    y: float
    width: float
    height: float
    title: tuple[str, ...]
    detail: tuple[str, ...]

    @property
    def rectangle(self) -> tuple[float, float, float, float]:
        """Left, bottom, right, top."""
        half, tall = self.width / 2, self.height / 2
        return self.x - half, self.y - tall, self.x + half, self.y + tall


@dataclass(frozen=True, slots=True)
class Route:
    """An arrow with its way: points that it goes through, upright in each of them.

    Between points of an odd and an even place it may bend, between those of an even and an odd place it is straight.
    """

    arrow: Arrow
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Layout:
    """Boxes and arrows with their places; the lowest box stands on y = 0."""

    placed: tuple[Placed, ...]
    routes: tuple[Route, ...]
    width: float
    height: float


@dataclass(slots=True)
class _Cell:
    """What takes room in a row: a box, or an arrow that passes."""

    width: float
    rank: int
    key: float
    """Where it would like to stand at first."""
    column: int | None = None
    placed: Placed | None = None


def arrange_circuit(diagram: Diagram, columns: Columns = 2, *, stretch: float = 1.0) -> Layout:
    """The layout of a diagram; `stretch` multiplies the heights between rows."""
    page = WIDTHS[columns]
    ends = Counter(end for arrow in diagram.arrows for end in {arrow.source, arrow.target})
    sizes = {box.id: _sized(box, _MOST_TEXT[columns], ends[box.id]) for box in diagram.boxes}
    ranks = _ranks(diagram, {name: one.width for name, one in sizes.items()}, page)
    _fit_rows(diagram, sizes, ranks, page)
    cells, chains = _cells(diagram, sizes, ranks)
    rows = _ordered(cells, chains)
    page = max(page, *(_squeezed([cells[n] for n in row], page) for row in rows))
    x = _places(cells, chains, rows, page)
    return _put(diagram, cells, chains, rows, x, page, stretch)


def _sized(box: Box, most: float, arrows: int) -> Placed:
    bold = box.kind in ("answer", "group")
    lines = 1 if box.kind == "token" else _TITLE_LINES
    title = wrapped(clean(box.title), TITLE, most, lines=lines, bold=bold)
    detail = wrapped(clean(box.detail), DETAIL, most, lines=_DETAIL_LINES) if box.detail else []
    widest = [width(line, TITLE, bold=bold) for line in title] + [width(line, DETAIL) for line in detail]
    tall = LEADING * (TITLE * len(title) + DETAIL * len(detail)) + 2 * PAD_Y
    room = min(_PORT * arrows / (1 if box.kind in _KINDS else 2), most)
    return Placed(box, 0.0, 0.0, max(*widest, room, 12.0) + 2 * PAD_X, tall, tuple(title), tuple(detail))


# rows


def _ranks(diagram: Diagram, widths: dict[str, float], page: float) -> dict[str, int]:
    """The row of each box: tokens below, answers above, arrows upward, the lower layer lower, none wider than a page.

    Arrows against the order of layers, which boxes over several layers can have, go down.
    """
    order = {box.id: (_KINDS.get(box.kind, 1), box.order, box.id) for box in diagram.boxes}
    upward = {tuple(sorted((a.source, a.target), key=order.__getitem__)) for a in diagram.arrows}
    below, above = defaultdict(list), defaultdict(list)
    for low, high in upward:
        below[high].append(low)
        above[low].append(high)
    names = sorted(order, key=order.__getitem__)
    middle = [name for name in names if order[name][0] == 1]
    lowest: dict[str, int] = {name: 0 for name in names if order[name][0] == 0}
    for name in middle:
        lowest[name] = 1 + max((lowest[other] for other in below[name]), default=0)
    top = 1 + max((lowest[name] for name in middle), default=0)
    layers = [order[name][1] for name in middle]
    first, span = min(layers, default=0.0), max(max(layers, default=0.0) - min(layers, default=0.0), 1e-9)
    ranks = lowest | {name: top for name in names if order[name][0] == 2}
    for name in reversed(middle):
        wish = 1 + round((top - 2) * (order[name][1] - first) / span)
        ranks[name] = min(max(wish, lowest[name]), min((ranks[other] for other in above[name]), default=top) - 1)
    return _split(ranks, middle, widths, page)


def _split(ranks: dict[str, int], middle: Sequence[str], widths: dict[str, float], page: float) -> dict[str, int]:
    """Rows that are too wide for the page as two or more, the lower layers below."""
    made, shift = dict(ranks), 0
    for rank in range(1, max(ranks.values(), default=0) + 1):
        row = [name for name in middle if ranks[name] == rank]
        used, first = 0.0, True
        for name in row:
            if not first and used + widths[name] + _GAP_X > _FULL * page:
                shift, used = shift + 1, 0.0
            used, first = used + widths[name] + _GAP_X, False
            made[name] = rank + shift
        for name in ranks:
            if ranks[name] == rank and name not in row:
                made[name] = rank + shift
    dense = {rank: number for number, rank in enumerate(sorted(set(made.values())))}
    return {name: dense[rank] for name, rank in made.items()}


def _fit_rows(diagram: Diagram, sizes: dict[str, Placed], ranks: dict[str, int], page: float) -> None:
    """Boxes of rows that cannot be split, of tokens and answers, narrow enough to stand beside one another."""
    for rank in set(ranks.values()):
        row = [box for box in diagram.boxes if ranks[box.id] == rank]
        room = page - _GAP_X * (len(row) - 1)
        if sum(sizes[box.id].width for box in row) <= room:
            continue
        most = max(room / len(row) - 2 * PAD_X, 4.0)
        for box in row:
            one = sizes[box.id]
            bold = box.kind in ("answer", "group")
            title = tuple(fitting(line, TITLE, most, bold=bold) for line in one.title)
            detail = tuple(fitting(line, DETAIL, most) for line in one.detail)
            sizes[box.id] = Placed(box, 0.0, 0.0, min(one.width, most + 2 * PAD_X), one.height, title, detail)


# places in rows

_Chain = tuple[int, ...]
"""The cells that an arrow goes through, from the lower of its ends to the upper."""


def _cells(diagram: Diagram, sizes: dict[str, Placed], ranks: dict[str, int]) -> tuple[list[_Cell], list[_Chain]]:
    """Every box, and a place for every arrow in each row that it passes; in the order of boxes, then of arrows."""
    number = {box.id: row for row, box in enumerate(diagram.boxes)}
    cells = [
        _Cell(sizes[b.id].width, ranks[b.id], float(b.column if b.column is not None else 0), b.column, sizes[b.id])
        for b in diagram.boxes
    ]
    _first_keys(diagram, number, cells)
    chains: list[_Chain] = []
    for arrow in diagram.arrows:
        low, high = sorted((number[arrow.source], number[arrow.target]), key=lambda n: (cells[n].rank, n))
        between = range(cells[low].rank + 1, cells[high].rank)
        start, rise = cells[low].key, cells[high].key - cells[low].key
        steps = [start + rise * (i + 1) / (len(between) + 1) for i in range(len(between))]
        chains.append((low, *range(len(cells), len(cells) + len(between)), high))
        cells += [_Cell(_PASSING, rank, key) for rank, key in zip(between, steps, strict=True)]
    return cells, chains


def _first_keys(diagram: Diagram, number: dict[str, int], cells: list[_Cell]) -> None:
    """Boxes without a column of their own begin over what they read, weighed by strength."""
    for box in sorted(diagram.boxes, key=lambda box: (cells[number[box.id]].rank, box.id)):
        if box.column is None:
            read = [(cells[number[a.source]].key, a.strength + 1e-6) for a in diagram.arrows if a.target == box.id]
            total = sum(weight for _, weight in read)
            cells[number[box.id]].key = sum(key * weight for key, weight in read) / total if read else 0.0


def _ordered(cells: list[_Cell], chains: list[_Chain]) -> list[list[int]]:
    """The cells of each row from left to right: of the orders that sweeps of barycentres give, the least crossed."""
    rows: list[list[int]] = [[] for _ in range(max(cell.rank for cell in cells) + 1)]
    for number, cell in enumerate(cells):
        rows[cell.rank].append(number)
    rows = [sorted(row, key=lambda n: (cells[n].key, n)) for row in rows]
    links = [pair for chain in chains for pair in pairwise(chain)]
    up, down = defaultdict(list), defaultdict(list)
    for low, high in links:
        up[low].append(high)
        down[high].append(low)
    best, least = rows, _crossings(rows, links, cells)
    for sweep in range(_SWEEPS):
        order = range(1, len(rows)) if sweep % 2 == 0 else range(len(rows) - 2, -1, -1)
        neighbours = down if sweep % 2 == 0 else up
        rows = [list(row) for row in rows]
        for rank in order:
            _sort_row(rows, rank, neighbours, cells)
        if (crossed := _crossings(rows, links, cells)) < least:
            best, least = rows, crossed
    return best


def _sort_row(rows: list[list[int]], rank: int, neighbours: dict[int, list[int]], cells: list[_Cell]) -> None:
    place = {n: (i + 0.5) / len(row) for row in rows for i, n in enumerate(row)}

    def centre(n: int) -> float:
        near = neighbours[n]
        return sum(place[other] for other in near) / len(near) if near else place[n]

    # Whoever has a column stays in order of columns; the others find their place among these.
    fixed = [n for n in rows[rank] if cells[n].column is not None]
    fixed.sort(key=lambda n: (cells[n].column, centre(n), n))
    free = sorted((n for n in rows[rank] if cells[n].column is None), key=lambda n: (centre(n), n))
    if not fixed:
        rows[rank] = free
        return
    merged: list[int] = []
    waiting = list(free)
    for n in fixed:
        while waiting and centre(waiting[0]) < centre(n):
            merged.append(waiting.pop(0))
        merged.append(n)
    rows[rank] = merged + waiting


def _crossings(rows: list[list[int]], links: list[tuple[int, int]], cells: list[_Cell]) -> int:
    place = {n: i for row in rows for i, n in enumerate(row)}
    gaps: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for low, high in links:
        gaps[cells[low].rank].append((place[low], place[high]))
    return sum(
        (a[0] - b[0]) * (a[1] - b[1]) < 0
        for ends in gaps.values()
        for i, a in enumerate(ends)
        for b in ends[:i]
    )  # fmt: skip


def _places(cells: list[_Cell], chains: list[_Chain], rows: list[list[int]], page: float) -> np.ndarray:
    """x of every cell, by the linear program of the module's docstring; columns are variables that boxes keep to."""
    columns = sorted({cell.column for cell in cells if cell.column is not None})
    n, wishes = len(cells), []
    for chain in chains:
        for low, high in pairwise(chain):
            passing = (cells[low].placed is None) + (cells[high].placed is None)
            wishes.append((low, high, (1.0, 3.0, 8.0)[passing]))
    wishes += [(i, n + columns.index(c.column), 12.0) for i, c in enumerate(cells) if c.column is not None]
    middle = n + len(columns)
    wishes += [(i, middle, 0.05) for i, cell in enumerate(cells) if cell.placed is not None]
    apart = [(a, b, _apart(cells[a], cells[b])) for row in rows for a, b in pairwise(row)]
    apart += [(n + i, n + i + 1, _SPREAD * page / len(columns)) for i in range(len(columns) - 1)]
    size, k = middle + 1, len(wishes)
    left = sparse.lil_array((2 * k + len(apart), size + k))
    right = np.zeros(2 * k + len(apart))
    for row, (a, b, _) in enumerate(wishes):
        for half, sign in ((0, 1.0), (k, -1.0)):
            left[row + half, a], left[row + half, b], left[row + half, size + row] = sign, -sign, -1.0
    for row, (a, b, least) in enumerate(apart, 2 * k):
        left[row, a], left[row, b], right[row] = 1.0, -1.0, -least
    cost = np.concatenate([np.zeros(size), [weight for *_, weight in wishes]])
    bounds = [(cell.width / 2, page - cell.width / 2) for cell in cells]
    bounds += [(0.0, page)] * len(columns) + [(page / 2, page / 2)] + [(0.0, page)] * k
    found = linprog(cost, A_ub=left.tocsr(), b_ub=right, bounds=bounds, method="highs")
    assert found.success, found.message  # rows are as wide as the page at most
    x = found.x[:n]
    left_most, right_most = (min(x[i] - c.width / 2 for i, c in enumerate(cells)),
                             max(x[i] + c.width / 2 for i, c in enumerate(cells)))  # fmt: skip
    return x + (page - left_most - right_most) / 2


def _apart(a: _Cell, b: _Cell) -> float:
    gap = _GAP_X if a.placed and b.placed else min(_GAP_X / 2, a.width if b.placed else b.width)
    return (a.width + b.width) / 2 + gap


def _squeezed(row: list[_Cell], page: float) -> float:
    """How wide a row is, after the places where arrows pass gave what they can."""
    passing = [cell for cell in row if cell.placed is None]
    wide = _width_of(row)
    if wide > page and passing:
        room = page - (wide - sum(3 * cell.width for cell in passing))
        for cell in passing:
            cell.width = min(cell.width, max(room / (3 * len(passing)), 0.5))
        wide = _width_of(row)
    return wide


def _width_of(row: list[_Cell]) -> float:
    return sum(cell.width for cell in row) + sum(_apart(a, b) - (a.width + b.width) / 2 for a, b in pairwise(row))


# heights and ways


def _put(
    diagram: Diagram,
    cells: list[_Cell],
    chains: list[_Chain],
    rows: list[list[int]],
    x: np.ndarray,
    page: float,
    stretch: float,
) -> Layout:
    tall = [max((c.placed.height for n in row if (c := cells[n]).placed), default=0.0) for row in rows]
    crossing = [0] * len(rows)
    for chain in chains:
        for low, _ in pairwise(chain):
            crossing[cells[low].rank] += 1
    middle = [tall[0] / 2]
    for rank in range(1, len(rows)):
        gap = stretch * min(_ROW + _PER_ARROW * crossing[rank - 1], _HIGHEST)
        middle.append(middle[-1] + tall[rank - 1] / 2 + gap + tall[rank] / 2)
    placed = []
    for number in range(len(diagram.boxes)):
        one, rank = cells[number].placed, cells[number].rank
        assert one is not None
        at = (float(x[number]), middle[rank])
        placed.append(Placed(one.box, *at, one.width, one.height, one.title, one.detail))
    ports = _ports(chains, placed, x)
    routes = []
    for number, (arrow, chain) in enumerate(zip(diagram.arrows, chains, strict=True)):
        points = _way(number, chain, cells, placed, ports, x, middle, tall)
        down = diagram.boxes[chain[0]].id != arrow.source
        routes.append(Route(arrow, tuple(reversed(points)) if down else tuple(points)))
    return Layout(tuple(placed), tuple(routes), page, middle[-1] + tall[-1] / 2)


def _ports(chains: list[_Chain], placed: list[Placed], x: np.ndarray) -> dict[tuple[int, int], float]:
    """Where along a box's edge each arrow begins or ends, (arrow, box): side by side, in the order they come from."""
    sides: dict[tuple[int, bool], list[tuple[float, int]]] = defaultdict(list)
    for number, chain in enumerate(chains):
        sides[chain[0], True].append((float(x[chain[1]]), number))
        sides[chain[-1], False].append((float(x[chain[-2]]), number))
    found = {}
    for (box, _), ends in sides.items():
        one = placed[box]
        room = one.width - 2 * PAD_X
        step = min(room / len(ends), 12.0)
        for i, (_, number) in enumerate(sorted(ends)):
            found[number, box] = one.x + step * (i - (len(ends) - 1) / 2)
    return found


def _way(
    number: int,
    chain: _Chain,
    cells: list[_Cell],
    placed: list[Placed],
    ports: dict[tuple[int, int], float],
    x: np.ndarray,
    middle: list[float],
    tall: list[float],
) -> list[Point]:
    """From the top of the lower box, upright past every row, to the bottom of the upper box."""
    low, high = chain[0], chain[-1]
    start, end = ports[number, low], ports[number, high]
    first, last = cells[low].rank, cells[high].rank
    points = [(start, placed[low].rectangle[3]), (start, middle[first] + tall[first] / 2)]
    for cell in chain[1:-1]:
        rank, at = cells[cell].rank, float(x[cell])
        points += [(at, middle[rank] - tall[rank] / 2), (at, middle[rank] + tall[rank] / 2)]
    return [*points, (end, middle[last] - tall[last] / 2), (end, placed[high].rectangle[1])]
