"""The page of a graph as a widget, by anywidget: what is chosen there is known here, and can be chosen from here."""

from collections.abc import Iterable, Mapping
from typing import Any

import anywidget
import traitlets

from circuitsae.graph.grouping import Supernode
from circuitsae.report.data import GraphLike
from circuitsae.report.page import PlotlyJS, assemble, read_static
from transcoders.errors import InputError


class GraphWidget(anywidget.AnyWidget):
    """The viewer of a graph in a cell, in step with Python: each of three traits follows the page, and sets it.

    `chosen`: the id of the chosen node, or None. `pinned`: ids of pinned nodes outside of groups. `groups`: the ids of
    each group's nodes, by its name. `widget.observe(function, "chosen")` calls a function at each change. Setting one
    to a node that the graph does not have raises `InputError`.
    """

    _esm = read_static("widget.js")
    _page = traitlets.Unicode().tag(sync=True)
    _title = traitlets.Unicode().tag(sync=True)
    _height = traitlets.Int().tag(sync=True)
    chosen = traitlets.Unicode(None, allow_none=True).tag(sync=True)
    pinned = traitlets.List(traitlets.Unicode()).tag(sync=True)
    groups = traitlets.Dict(value_trait=traitlets.List(traitlets.Unicode()), key_trait=traitlets.Unicode()).tag(
        sync=True
    )

    def __init__(self, graph: GraphLike, document: dict[str, Any], *, height: int, plotlyjs: PlotlyJS) -> None:
        """`document`: `circuitsae.report.page.document` of the graph."""
        self.graph = graph
        self._ids = frozenset(document["nodes"]["id"])
        opened = document["opened"] or {"pinned": [], "groups": []}
        super().__init__(
            _page=assemble(document | {"embedded": True}, plotlyjs),
            _title=document["title"],
            _height=int(height),
            pinned=opened["pinned"],
            groups=_named(opened["groups"]),
        )

    @property
    def opened(self) -> dict[str, Any]:
        """Pins and groups as `write_html(opened=…)` and `show` take them."""
        return {"pinned": list(self.pinned), "groups": {name: list(ids) for name, ids in self.groups.items()}}

    @property
    def supernodes(self) -> list[Supernode]:
        """The groups as `graph.group` takes them."""
        return [Supernode(name, tuple(ids), "grouped by hand") for name, ids in self.groups.items()]

    @traitlets.validate("chosen", "pinned", "groups")
    def _of_this_graph(self, proposal: Mapping[str, Any]) -> Any:
        value = proposal["value"]
        for node in _nodes_of(value):
            if node not in self._ids:
                raise InputError(
                    f"Node {node!r} is not among the {len(self._ids)} of this graph; their ids are graph.ids, such as "
                    f"{min(self._ids)!r}."
                )
        return value

    def __repr__(self) -> str:
        counts = f"{len(self.pinned)} pinned, {len(self.groups)} groups"
        return f"GraphWidget({len(self._ids)} nodes; chosen {self.chosen}, {counts})"


def _nodes_of(value: str | list[str] | Mapping[str, list[str]] | None) -> Iterable[str]:
    match value:
        case None:
            return ()
        case str():
            return (value,)
        case Mapping():
            return (node for members in value.values() for node in members)
    return value


def _named(groups: Iterable[list[str]]) -> dict[str, list[str]]:
    """Groups of a document, a name and ids each, by their names, of which a second one gets a number."""
    named: dict[str, list[str]] = {}
    for name, *members in groups:
        own, n = name, 2
        while own in named:
            own, n = f"{name} ({n})", n + 1
        named[own] = members
    return named
