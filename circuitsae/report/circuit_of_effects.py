"""A circuit of features by effects as the content of a picture: nodes at their roles, edges with their mean effects."""

from collections.abc import Mapping, Sequence

from circuitsae.report.circuit_diagram import Arrow, Box, Columns, Diagram
from circuitsae.report.circuit_drawing import CircuitPicture
from circuitsae.report.circuit_of_heads import ANSWER, widest_path
from circuitsae.report.circuit_words import called, joined, quoted

_BOXES: Mapping[int, int] = {1: 7, 2: 12}
_ARROWS: Mapping[int, int] = {1: 14, 2: 24}
_NAMED = 3


def effects_picture(
    edges: Sequence[tuple[str, str, float]],
    layers: Mapping[str, int],
    metric: tuple[str, str],
    *,
    last: str,
    labels: Mapping[str, str] | None = None,
    columns: Columns = 2,
) -> CircuitPicture:
    """The strongest edges between the nodes that carry most, as a picture.

    edges: source, target and effect; layers: of every node but the metric. metric: its id in the edges, and what it is
    called. last: the third sentence. labels: what nodes are called, instead of their ids.
    """
    carried: dict[str, float] = {}
    for source, _, effect in edges:
        carried[source] = carried.get(source, 0.0) + abs(effect)
    kept = {*sorted(carried, key=lambda n: (-carried[n], n))[: _BOXES[columns]], metric[0]}
    inside = sorted((e for e in edges if kept.issuperset(e[:2])), key=lambda e: (-abs(e[2]), e[:2]))
    drawn = [(s, t if t != metric[0] else ANSWER, effect) for s, t, effect in inside[: _ARROWS[columns]]]
    names = {name for s, t, _ in drawn for name in (s, t)} - {ANSWER}
    places = {name: name.partition("@")[2] for name in names}
    titled = labels or {}
    boxes = [
        Box(
            name,
            quoted(titled.get(name, name.partition("@")[0])),
            "error" if ".err" in name else "feature",
            float(layers[name]),
            " · ".join(filter(None, (name.partition("@")[0] if name in titled else "", f"L{layers[name]}", _at(name)))),
        )
        for name in sorted(names, key=lambda n: (places[n], n))
    ]
    boxes.append(Box(ANSWER, metric[1], "answer", 1.0 + max(layers.values(), default=0)))
    strongest = max((abs(effect) for *_, effect in drawn), default=1.0)
    arrows = [Arrow(s, t, effect, abs(effect) / strongest, "", "{:+.2g}") for s, t, effect in drawn]
    shown = {box.id: called(box.title) for box in boxes}
    way, least = widest_path([(s, t, effect, "") for s, t, effect in drawn])
    path = " → ".join(shown[name] for name in way)
    sentences = (
        _direct(drawn, shown),
        f"The strongest path through several nodes is {path}; its weakest edge is worth {least:.2g}."
        if way
        else "No path of edges leads through two nodes to the metric.",
        f"Drawn are {len(drawn)} of {len(edges)} edges. {last}",
    )
    legend = "Numbers: mean effects on the metric, by gradients. Blue raises, dashed orange lowers."
    return CircuitPicture(Diagram(tuple(boxes), tuple(arrows), sentences, legend), columns)


def _at(name: str) -> str:
    place = name.partition("@")[2]
    return f"at {place}" if place else ""


def _direct(drawn: Sequence[tuple[str, str, float]], shown: Mapping[str, str]) -> str:
    """What reaches the metric without another node between."""
    into = sorted(((effect, shown[s]) for s, t, effect in drawn if t == ANSWER), key=lambda e: -abs(e[0]))
    if not into:
        return "No node of these writes to the metric directly."
    said = [f"{effect:+.2g} from {name}".replace("-", "−", 1) for effect, name in into[:_NAMED]]
    return f"Of the metric, {joined(said)} {'comes' if len(said) == 1 else 'come'} directly."
