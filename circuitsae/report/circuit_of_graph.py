"""An attribution graph as the content of a circuit's picture: its groups, its strongest nodes, and what they add up to.

Every number is a sum over edges of the graph (`group_nodes`): weights as they are, shares of all that flows into the
target. An edge's influence is what it is pruned by, Â[t, s]·(I + w)[t].
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np

from circuitsae.graph.attribution_graph import AttributionGraph
from circuitsae.graph.grouping import Supernode
from circuitsae.graph.nodes import NodeKind
from circuitsae.graph.supernodes import CardsLike, LedgerLike, label_json, name_features, suggest_supernodes
from circuitsae.report.circuit_diagram import Arrow, Box, Columns, Diagram, check_columns
from circuitsae.report.circuit_drawing import CircuitPicture
from circuitsae.report.circuit_words import MARKS, called, of_answer, of_path, of_tests, percent, quoted
from circuitsae.report.claims import verdicts_shown
from circuitsae.report.data import GraphLike, opened_with
from circuitsae.report.text import printable, shorten, visible
from transcoders.errors import InputError
from transcoders.token_text import join_tokens

_BOXES: Mapping[int, int] = {1: 7, 2: 12}
_ARROWS: Mapping[int, int] = {1: 15, 2: 26}
_TOKENS: Mapping[int, int] = {1: 6, 2: 10}
_ANSWERS: Mapping[int, int] = {1: 1, 2: 3}
_APART = 0.85
"""Groups are larger than those that the page suggests, for few boxes are to hold much."""
_SECOND = 0.2
"""Other answers are drawn where they are this probable, the first one being 1."""
_FAINT = 0.004
"""Arrows that hold less of the influence are drawn only where a box has no other."""


def circuit_picture(
    graph: GraphLike,
    *,
    supernodes: Sequence[Supernode] | None = None,
    cards: CardsLike | None = None,
    ledger: LedgerLike | None = None,
    columns: Columns = 2,
    boxes: int | None = None,
) -> CircuitPicture:
    """The circuit of a graph: groups and the strongest single nodes, what leads from tokens through them to the answer.

    supernodes: groups to draw; default those that the graph's file came with, or else `suggest_supernodes`. All groups
    that are given are drawn, and the most influential other nodes beside them.
    cards, ledger: name features and suggested groups. columns: 1 (3.4 inches wide) or 2 (7 inches). boxes: how many
    groups and nodes between tokens and answers, at most; default 7 or 12.
    Raises `InputError` for groups that `AttributionGraph.group` refuses, and a graph that explains nothing.
    """
    if not isinstance(graph, AttributionGraph):
        raise InputError(f"A circuit is drawn of an AttributionGraph, not of a {type(graph).__name__}; trace one.")
    if boxes is not None and boxes < 1:
        raise InputError(f"boxes={boxes} leaves nothing between tokens and answers; give at least 1.")
    check_columns(columns)
    if not graph.top_logits():
        raise InputError("The graph explains nothing, so it has no circuit; trace the prompt again.")
    own = _saved(graph) if supernodes is None else list(supernodes)
    groups = own or suggest_supernodes(graph, cards=cards, apart=_APART)
    found = Circuit.of(graph, groups)
    chosen = found.choose(boxes or _BOXES[columns], columns, always=[one.name for one in own])
    return CircuitPicture(_diagram(found, chosen, cards, ledger, columns), columns)


def _saved(graph: AttributionGraph) -> list[Supernode]:
    """The groups that a graph's file came with."""
    opened = opened_with(graph.provenance, graph.nodes_frame(), graph.n_layers)
    seen: Counter[str] = Counter()
    made, taken = [], set()
    for name, *members in (opened or {}).get("groups", []):
        free = [member for member in members if member not in taken]
        taken.update(free)
        seen[name] += 1
        own = name if seen[name] == 1 and name not in graph.position else f"{name} ({seen[name]})"
        made += [Supernode(own, tuple(free))] if free else []
    return made


@dataclass(frozen=True)
class Circuit:
    """A graph with its groups in place, and the influence that every arrow holds."""

    graph: AttributionGraph
    drawn: nx.DiGraph
    """As `AttributionGraph.group`, errors of one position as one node too, without biases."""
    members: Mapping[str, tuple[str, ...]]
    """Of every node of it."""
    influence: Mapping[str, float]
    """Of every node of it, its own start included."""
    total: float
    """Σ over the graph's targets of I + w: what all edges into them hold, those that are pruned included."""

    @classmethod
    def of(cls, graph: AttributionGraph, groups: Sequence[Supernode]) -> "Circuit":
        """With `groups` and, of errors that are in none of them, a group for each position."""
        inside = {member for one in groups for member in one.members}
        errors: dict[int, list[str]] = {}
        for node in graph.nodes:
            if node.kind is NodeKind.ERROR and node.id not in inside:
                errors.setdefault(node.pos, []).append(node.id)
        made = [Supernode(f"error@{pos}", tuple(ids)) for pos, ids in errors.items()]
        drawn = graph.group([*groups, *made])
        for one in made:
            drawn.nodes[one.name]["kind"] = "error"
        drawn.remove_nodes_from([name for name, kind in drawn.nodes(data="kind") if kind == "bias"])
        members = {name: tuple(row.get("members", (name,))) for name, row in drawn.nodes(data=True)}
        weight = np.nan_to_num(graph.influence) + graph.start
        influence = {n: float(sum(weight[graph.position[i]] for i in ids)) for n, ids in members.items()}
        targets = graph.mask(NodeKind.FEATURE, NodeKind.LOGIT) & (graph.inputs > 0)
        found = cls(graph, drawn, members, influence, float(weight[targets].sum()))
        for _, target, edge in drawn.edges(data=True):
            edge["held"] = edge["share"] * influence[target]
        return found

    def choose(self, most: int, columns: Columns, always: Sequence[str] = ()) -> nx.DiGraph:
        """The part to draw: answers, `most` of what is between, and the tokens that these read."""
        tops = self.graph.top_logits()
        answers = [n.id for n in tops[: _ANSWERS[columns]] if n.start >= _SECOND * tops[0].start]
        between = [n for n, kind in self.drawn.nodes(data="kind") if kind in ("supernode", "feature", "error")]
        # What flows in is what a box explains; errors are sources, and hold what flows out of them.
        between.sort(key=lambda n: (n not in always, -self.influence[n], n))
        kept = [*answers, *between[: max(most, len(always))]]
        tokens = [n for n, kind in self.drawn.nodes(data="kind") if kind == "token"]
        arrows = self._arrows(kept, tokens, columns)
        part = nx.DiGraph()
        part.add_nodes_from(answers)
        part.add_edges_from((s, t, self.drawn.edges[s, t]) for s, t in arrows)
        # Whatever does not lead to an answer explains nothing of it.
        leading = set(answers).union(*(nx.ancestors(part, answer) for answer in answers))
        return nx.DiGraph(part.subgraph([n for n in part if n in leading or n in always]))

    def _arrows(self, kept: Sequence[str], tokens: Sequence[str], columns: Columns) -> list[tuple[str, str]]:
        """Of every box its strongest arrow in and out, then the strongest of all."""
        held = {(s, t): h for s, t, h in self.drawn.subgraph([*kept, *tokens]).edges(data="held") if h > 0}
        order = sorted(held, key=lambda edge: (-held[edge], edge))
        inside = set(kept)
        reading = {t: held[s, t] for s, t in reversed(order) if s not in inside}
        strongest = {s: held[s, t] for s, t in reversed(order) if s not in inside and t in reading}
        readable = set(sorted(strongest, key=lambda n: (-strongest[n], n))[: _TOKENS[columns]])
        order = [edge for edge in order if edge[0] in inside or edge[0] in readable]
        first: dict[tuple[str, str], None] = {}
        for name in kept:
            first |= dict.fromkeys([edge for edge in order if edge[0] == name][:1])
            first |= dict.fromkeys([edge for edge in order if edge[1] == name][:1])
        faint = _FAINT * self.total
        rest = [edge for edge in order if edge not in first and held[edge] >= faint]
        return [*first, *rest[: max(0, _ARROWS[columns] - len(first))]]

    def tested(self, source: str, target: str, verdicts: Mapping[tuple[str, str], str]) -> Counter[str]:
        """The verdicts of the edges that an arrow sums."""
        pairs = ((s, t) for s in self.members[source] for t in self.members[target])
        return Counter(verdicts[pair] for pair in pairs if pair in verdicts)


def _diagram(
    found: Circuit, chosen: nx.DiGraph, cards: CardsLike | None, ledger: LedgerLike | None, columns: Columns
) -> Diagram:
    graph = found.graph
    boxes = {box.id: box for box in _boxes(found, list(chosen), cards, ledger)}
    verdicts = _verdicts(graph)
    tested = {(s, t): found.tested(s, t, verdicts) for s, t in chosen.edges}
    strongest = max((edge["share"] for *_, edge in chosen.edges(data=True)), default=1.0)
    arrows = [
        Arrow(s, t, edge["weight"], edge["share"] / strongest, _mark(tested[s, t]))
        for s, t, edge in sorted(chosen.edges(data=True), key=lambda e: (e[0], e[1]))
    ]
    shown = sum(h for *_, h in chosen.edges(data="held")) / found.total if found.total else math.nan
    answer = graph.top_logits()[0].id
    into = {s: (edge["share"], edge["weight"]) for s, _, edge in found.drawn.in_edges(answer, data=True)}
    kinds = dict(found.drawn.nodes(data="kind"))
    titles = _told_apart(boxes.values())
    sentences = (
        of_answer(titles[answer], into, kinds, titles),
        of_path(*_paths(chosen, answer), titles),
        of_tests({edge: count for edge, count in tested.items() if count}, titles)
        + f" The arrows hold {percent(shown)} of the influence that flows through the graph.",
    )
    legend = "Numbers: summed weights. Blue raises, dashed orange lowers; width: share of what flows into the target."
    if any(tested.values()):
        legend += " Of an arrow's edges that were tested, so many held: ✓ most, ⇄ reversed, ○ null, ? undecided."
    words = graph.tokens[1:] if graph.provenance.get("bos") is True else graph.tokens
    prompt = shorten(printable(join_tokens(words).strip()), 70 * columns)
    return Diagram(tuple(boxes.values()), tuple(arrows), sentences, legend, prompt, shown)


def _verdicts(graph: AttributionGraph) -> dict[tuple[str, str], str]:
    """Of every tested edge what was found, of the first claim that was tested."""
    notes = graph.edge_notes
    if notes is None:
        return {}
    _, given = verdicts_shown(notes)
    ends = zip(notes["source"].tolist(), notes["target"].tolist(), strict=True)
    return {pair: verdict for pair, verdict in zip(ends, given, strict=False) if verdict}


def _mark(counts: Counter[str]) -> str:
    """The sign of what most of the edges got, and how many of how many held."""
    if not counts:
        return ""
    most = max(MARKS, key=lambda verdict: counts[verdict])
    return f"{MARKS[most]}{counts['confirmed']}/{counts.total()}"


def _paths(chosen: nx.DiGraph, answer: str) -> tuple[list[str], float, tuple[str, str, float] | None]:
    """The way through a box from where nothing flows in to the answer with the largest product of shares, and that.

    Beside it the strongest single arrow from such a place to the answer.
    """
    straight = {s: edge["share"] for s, _, edge in chosen.in_edges(answer, data=True) if not chosen.in_degree(s)}
    first = max(straight, key=lambda n: (straight[n], n), default=None)
    direct = None if first is None else (first, answer, float(straight[first]))
    part = nx.DiGraph(chosen)
    part.remove_edges_from([(s, answer) for s in straight])
    cost = {(s, t): max(-math.log(max(edge["share"], 1e-12)), 0.0) for s, t, edge in part.edges(data=True)}
    back: Any = part.reverse(copy=False)
    found: Any = nx.single_source_dijkstra(back, answer, weight=lambda t, s, _: cost[s, t])
    length, ways = found
    ends = [n for n in part if not part.in_degree(n) and n in length and n != answer]
    if not ends:
        return [], 0.0, direct
    best = min(ends, key=lambda n: (length[n], n))
    return ways[best][::-1], math.exp(-length[best]), direct


def _told_apart(boxes: Iterable[Box]) -> dict[str, str]:
    """What boxes are called in sentences: where several have one title, with the beginning of their detail."""
    named = list(boxes)
    often = Counter(box.title for box in named)
    shown = {box.id: called(box.title, box.kind) for box in named}
    return shown | {b.id: f"{shown[b.id]} ({b.detail})" for b in named if often[b.title] > 1 and b.kind == "feature"}


# boxes


def _boxes(found: Circuit, names: Sequence[str], cards: CardsLike | None, ledger: LedgerLike | None) -> list[Box]:
    features = [n for n in names if found.drawn.nodes[n]["kind"] == "feature"]
    common = dict(zip(features, name_features(found.graph, [(n,) for n in features], cards=cards), strict=True))
    ranks = {"token": 0, "error": 1, "feature": 1, "supernode": 1, "logit": 2}
    kinds = {n: str(found.drawn.nodes[n]["kind"]) for n in names}
    order = sorted(names, key=lambda n: (ranks[kinds[n]], found.drawn.nodes[n]["pos"], n))
    return [_box(found, name, common.get(name, ""), ledger) for name in order]


def _box(found: Circuit, name: str, common: str, ledger: LedgerLike | None) -> Box:
    graph, row = found.graph, found.drawn.nodes[name]
    nodes = [graph.nodes[graph.position[member]] for member in found.members[name]]
    weight = [max(float(np.nan_to_num(graph.influence[graph.position[n.id]])), 1e-12) for n in nodes]
    order = float(np.average([n.layer for n in nodes], weights=weight))
    layers = sorted({n.layer for n in nodes})
    where = f"L{layers[0]}" if len(layers) == 1 else f"L{layers[0]}–{layers[-1]}"
    places = dict.fromkeys(shorten(_token(graph.tokens[n.pos]), 12) for n in nodes)
    at = f"{where} at {', '.join(list(places)[:2])}"
    node = nodes[0]
    match row["kind"]:
        case "token":
            return Box(name, _token(node.text), "token", -1.0, column=node.pos)
        case "logit":
            chance = "" if node.explained or math.isnan(node.probability) else f"p = {node.probability:.2f}"
            return Box(
                name, visible(node.text.strip() or node.text or node.id), "answer", float(graph.n_layers), chance
            )
        case "error":
            return Box(name, "error", "error", order, at)
        case "feature" if node.explained:
            return Box(name, visible(node.text) or node.id, "answer", float(graph.n_layers), "explained")
        case "feature":
            title, status = _labelled(common, node, ledger)
            own = "" if title == (short := node.id.partition("@")[0]) else short
            return Box(name, title, "feature", order, " · ".join(filter(None, (status, own, at))))
    title, status = _stated(name)
    size = "1 node" if len(nodes) == 1 else f"{len(nodes)} nodes"
    return Box(
        name,
        title,
        "group",
        order,
        " · ".join(filter(None, (status, size, at))),
    )


def _token(text: str) -> str:
    return visible(text.strip() or text)


def _labelled(common: str, node: Any, ledger: LedgerLike | None) -> tuple[str, str]:
    """A feature's label and its status where that is a hypothesis; what it stands next to where it has none."""
    label = None if ledger is None else label_json(f"{node.layer}.{node.index}", ledger)
    if label and label["status"] != "contradicted":
        return quoted(str(label["text"])), "hypothesis" if label["status"] == "hypothesis" else ""
    return _stated(common) if common else (node.id.partition("@")[0], "")


def _stated(name: str) -> tuple[str, str]:
    """A name without "hypothesis: ", and that as its status."""
    text = name.removeprefix("hypothesis: ")
    return quoted(text), "hypothesis" if text != name else ""
