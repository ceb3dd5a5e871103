"""Circuits that others published for GPT-2 small, as data (`known_circuits.json`), each variant with its source."""

import json
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files

from circuitsae.components.nodes import ComponentGraph, Edge
from circuitsae.components.scores import Scores, auroc, average_precision, overlap
from transcoders.errors import InputError


@dataclass(frozen=True)
class KnownCircuit:
    """One published version of a circuit."""

    name: str
    task: str
    model: str
    source: str
    note: str
    classes: dict[str, tuple[str, ...]]
    """Components by the role they were given."""
    positions: dict[str, str] = field(default_factory=dict)
    """The role of the position at which a class acts, where that was published."""
    wiring: tuple[tuple[str, str, str], ...] | None = None
    """(from class, to class, inputs of the receiver) where edges were published; else None."""
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """What INPUT, OUTPUT and helper classes of the wiring stand for."""

    @property
    def nodes(self) -> tuple[str, ...]:
        """Every component of the circuit."""
        return tuple(dict.fromkeys(name for names in self.classes.values() for name in names))

    def edges(self, graph: ComponentGraph) -> frozenset[Edge]:
        """The published edges as edges of a model of this shape.

        Raises `InputError` where only components were published, or the model lacks one of them.
        """
        if self.wiring is None:
            raise InputError(f"For {self.name!r} no edges were published, only components; compare nodes instead.")
        members = self.classes | self.groups
        graph.check_writers(self.nodes)
        known = frozenset(graph.edges)
        found = set()
        for start, end, inputs in self.wiring:
            readers = [reader for name in members[end] for reader in _readers(name, inputs)]
            found.update(Edge(w, r) for w in members[start] for r in readers if Edge(w, r) in known)
        return frozenset(found)

    def compare_nodes(self, found: Scores | list[str] | tuple[str, ...]) -> dict[str, float]:
        """Overlap of found heads and MLPs with these (precision, recall, Jaccard); of scores also AUROC and AP.

        Where no MLP was published, only heads are compared.
        """
        with_mlps = any(name.startswith("m") for name in self.nodes)

        def counts(name: object) -> bool:
            return isinstance(name, str) and name.startswith(("a", "m") if with_mlps else "a")

        if isinstance(found, Scores):
            items = [item for item in found.items if counts(item)]
            size, truth = found.only(items).mean.abs(), [item in self.nodes for item in items]
            best = [items[i] for i in size.argsort(descending=True).tolist()[: sum(truth)]]
            return _with_areas(overlap(best, self.nodes), size.tolist(), truth)
        return overlap([name for name in found if counts(name)], self.nodes)

    def compare_edges(self, found: Scores, graph: ComponentGraph) -> dict[str, float]:
        """AUROC, AP and overlap (of as many best edges as were published) of edge scores."""
        known = self.edges(graph)
        size, truth = found.mean.abs(), [item in known for item in found.items]
        best = [found.items[i] for i in size.argsort(descending=True).tolist()[: sum(truth)]]
        return _with_areas(overlap(best, known), size.tolist(), truth)


def _with_areas(found: dict[str, float], size: list[float], truth: list[bool]) -> dict[str, float]:
    return found | {"auroc": auroc(size, truth), "average_precision": average_precision(size, truth)}


def _readers(name: str, inputs: str) -> list[str]:
    """The readers that stand for a component in the wiring."""
    return [f"{name}.{kind}" for kind in inputs] if name.startswith("a") else [name]


@cache
def known_circuits(task: str | None = None) -> tuple[KnownCircuit, ...]:
    """Every published circuit, or those of one task (`ioi`, `greater_than`)."""
    text = files("circuitsae.components").joinpath("known_circuits.json").read_text(encoding="utf-8")
    found = tuple(_read(entry) for entry in json.loads(text))
    return found if task is None else tuple(circuit for circuit in found if circuit.task == task)


def known_circuit(name: str) -> KnownCircuit:
    """One published circuit by name."""
    for circuit in known_circuits():
        if circuit.name == name:
            return circuit
    names = ", ".join(circuit.name for circuit in known_circuits())
    raise InputError(f"No published circuit is called {name!r}; there are {names}.")


def _read(entry: dict) -> KnownCircuit:
    groups = {"INPUT": entry.get("input", []), "OUTPUT": entry.get("output", []), **entry.get("helpers", {})}
    wiring = entry["wiring"]
    return KnownCircuit(
        name=entry["name"],
        task=entry["task"],
        model=entry["model"],
        source=entry["source"],
        note=entry["note"],
        classes={label: tuple(names) for label, names in entry["classes"].items()},
        positions=entry["positions"],
        wiring=None if wiring is None else tuple((a, b, inputs) for a, b, inputs in wiring),
        groups={label: tuple(names) for label, names in groups.items()},
    )
