"""A circuit of heads as the content of a picture: boxes by role at their positions, arrows of measured worth."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import networkx as nx

from circuitsae.report.circuit_diagram import Arrow, Box, Diagram
from circuitsae.report.circuit_words import called, joined, percent
from circuitsae.report.text import visible

ANSWER = "answer"
_HEADS = 8
"""So many are named in a box; of more their number."""
_PLACE = "place: "
_FEEDERS = 3


class Look(NamedTuple):
    """Where the heads of a role look: from its position to `place`, with this share of their attention in the mean."""

    role: str
    place: str
    attention: float


def heads_picture(
    classes: Mapping[str, Sequence[str]],
    effects: Iterable[tuple[str, str, float, str]],
    *,
    positions: Mapping[str, str],
    places: Mapping[str, str],
    looks: Sequence[Look],
    metric: tuple[str, float],
    last: str,
) -> Diagram:
    """The content of a picture of heads.

    classes: heads (and MLPs) by role. effects: source, target (a role or `answer`), worth as a share of the metric, and
    the input it enters by. positions: where a role acts. places: names of positions, from left to right, and what
    stands there. metric: its name and its mean. last: the third sentence.
    """
    order = list(dict.fromkeys([*places, *(positions[role] for role in classes if role in positions)]))
    column = {name: number for number, name in enumerate(order)}
    drawn = list(effects)
    boxes = [_role(role, heads, column.get(positions.get(role, "")), positions.get(role, ""))
             for role, heads in classes.items()]  # fmt: skip
    seen = [look for look in looks if look.place in column and look.role in classes]
    boxes += [
        Box(f"{_PLACE}{name}", visible(places.get(name, "").strip()) if places.get(name) else name, "token", -1.0,
            name if places.get(name) else "", number)
        for name, number in column.items()
    ]  # fmt: skip
    top = 1.0 + max((box.order for box in boxes), default=0.0)
    boxes.append(Box(ANSWER, metric[0], "answer", top, f"{metric[1]:.2f}", max(column.values(), default=None)))
    strongest = max((abs(worth) for *_, worth, _ in drawn), default=1.0) or 1.0
    arrows = [Arrow(s, t, worth, abs(worth) / strongest, by, "{:+.0%}") for s, t, worth, by in drawn]
    arrows += [
        Arrow(f"{_PLACE}{look.place}", look.role, look.attention, 0.12, "", "looks {:.2f}", looks=True) for look in seen
    ]
    legend = "Numbers: what the metric loses, as a share of it, and the input that most enters by (q, k, v). " + (
        "Blue raises, dashed orange lowers. Grey: mean attention from the box's position to the token." if seen else
        "Blue raises, dashed orange lowers."
    )  # fmt: skip
    sentences = (_of_answer(metric, drawn), _of_path(drawn), last)
    return Diagram(tuple(boxes), tuple(arrows), sentences, legend)


def _role(role: str, heads: Sequence[str], column: int | None, position: str) -> Box:
    layers = [int(name[1:].split(".")[0]) for name in heads if name[:1] in ("a", "m")]
    named = ", ".join(heads) if len(heads) <= _HEADS else f"{len(heads)} components"
    detail = f"{named} · at {position}" if position else named
    return Box(role, role, "group", sum(layers) / len(layers) if layers else 0.0, detail, column)


def _of_answer(metric: tuple[str, float], effects: Sequence[tuple[str, str, float, str]]) -> str:
    """What the metric loses and gains without the roles that write to the answer."""
    into = sorted(((worth, role) for role, target, worth, _ in effects if target == ANSWER), key=lambda p: -abs(p[0]))
    if not into:
        return f"No role writes to the answer directly ({metric[0]} {metric[1]:.2f})."
    lost = [f"{percent(worth)} without {called(role)}" for worth, role in into[:_FEEDERS] if worth > 0]
    gained = [f"{percent(-worth)} without {called(role)}" for worth, role in into[:_FEEDERS] if worth < 0]
    said = [f"loses {joined(lost)}"] if lost else []
    said += [f"gains {joined(gained)}"] if gained else []
    return f"The answer's {metric[0]} ({metric[1]:.2f}) {' and '.join(said)}, by their direct edges to it."


def _of_path(effects: Sequence[tuple[str, str, float, str]]) -> str:
    """From where the arrows begin to the answer, the path whose weakest arrow is worth most."""
    path, worth = widest_path(effects)
    if not path:
        return "No path of arrows leads through two roles to the answer."
    way = " → ".join(called(name) if name != ANSWER else "the answer" for name in path)
    return f"The strongest path through several roles is {way}; its weakest arrow is worth {percent(worth)}."


def widest_path(effects: Sequence[tuple[str, str, float, str]]) -> tuple[list[str], float]:
    """The path from where the arrows begin to the answer whose weakest arrow is worth most, and how much that is.

    Of those that are equally wide the one with the largest product; nothing where none leads through two boxes.
    """
    reached = {target for _, target, _, _ in effects}
    most = max((abs(worth) for *_, worth, _ in effects), default=1.0) or 1.0
    for least in sorted({abs(worth) for *_, worth, _ in effects if worth}, reverse=True):
        back = nx.DiGraph()
        for s, t, worth, _ in effects:
            if abs(worth) >= least:
                back.add_edge(t, s, cost=-math.log(abs(worth) / most))
        if ANSWER not in back:
            continue
        found: Any = nx.single_source_dijkstra(back, ANSWER, weight="cost")
        ways = {end: way for end, way in found[1].items() if len(way) > 2 and end not in reached}
        if ways:
            return ways[min(ways, key=lambda end: (found[0][end], end))][::-1], least
    return [], 0.0
