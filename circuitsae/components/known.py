"""Circuits that others published for GPT-2 small, as data (`known_circuits.json`), each variant with its source.

Transformers with known edges: programs compiled elsewhere, read from a folder.

A folder holds `config.json` (sizes, `attention_dir`), `model.safetensors` (`W_E`, `W_pos`, `W_U`, and of each block
`W_Q W_K W_V W_O W_in W_out` with biases, all as x @ W), `pairs.json` (clean and corrupt prompts of equal, varying
length) and `truth.json` (for each edge, by ablation, the largest change of any logit after position 0).
"""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from circuitsae.components.network import ComponentGraph, Edge
from circuitsae.components.problem import Ablation, Metric, PatchingProblem
from circuitsae.components.scores import Scores, auroc, average_precision, overlap
from transcoders.bridge import native_bridge
from transcoders.errors import FileFormatError, InputError
from transcoders.language_model import LanguageModel
from transcoders.precision import Precision, as_dtype


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
    sections: dict[str, str] = field(default_factory=dict)
    """Where in the source a class is described."""
    strengths: dict[str, dict[str, float]] = field(default_factory=dict)
    """By class what the source prints of it: mean `attention` where the class looks, `copies` (its copy score)."""
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
        sections=entry.get("sections", {}),
        strengths=entry.get("strengths", {}),
        wiring=None if wiring is None else tuple((a, b, inputs) for a, b, inputs in wiring),
        groups={label: tuple(names) for label, names in groups.items()},
    )


MetricOf = Callable[[Float[Tensor, "example pos out"], Float[Tensor, "example pos out"]], Metric]
"""Makes a metric of the clean and the corrupt logits."""

CLEAR = 1e-3
"""Effects above zero but below this are borderline: either answer is right."""


def distance(clean: Tensor, corrupt: Tensor) -> Metric:
    """How far the logits after position 0 are from the clean ones: the largest difference."""
    return lambda logits: (logits - clean)[:, 1:].abs().amax((1, 2))


def squared_distance(clean: Tensor, corrupt: Tensor) -> Metric:
    """Half the squared distance from the clean logits; its gradient there is zero."""
    return lambda logits: (logits - clean)[:, 1:].pow(2).sum((1, 2)) / 2


def projection(clean: Tensor, corrupt: Tensor) -> Metric:
    """The logits along the change from the corrupt to the clean ones: linear, the easiest case for a gradient."""
    return lambda logits: (logits * (clean - corrupt))[:, 1:].sum((1, 2))


def problems_of_pairs(
    model: LanguageModel, pairs: list[tuple[list[int], list[int]]], ablation: Ablation, metric: MetricOf
) -> list[PatchingProblem]:
    """One problem for each length among the pairs. With zero ablation the corrupt logits given to `metric` are zero."""
    by_length: dict[int, list[tuple[list[int], list[int]]]] = defaultdict(list)
    for pair in pairs:
        by_length[len(pair[0])].append(pair)
    found = []
    for _, rows in sorted(by_length.items()):
        clean, corrupt = (torch.tensor([row[side] for row in rows]) for side in (0, 1))
        with torch.no_grad():
            base, other = model.run(clean)[0], model.run(corrupt)[0]
        other = torch.zeros_like(base) if ablation == "zero" else other
        found.append(PatchingProblem(model, clean, corrupt, metric(base, other), ablation))
    return found


@dataclass(frozen=True)
class CompiledProgram:
    """A program's transformer, its pairs of prompts and the effect of every edge."""

    name: str
    what: str
    model: LanguageModel
    pairs: list[tuple[list[int], list[int]]]
    effects: dict[Edge, dict[str, float]]
    """For each edge the largest change of a logit, by ablation (`resample`, `zero`)."""

    def truth(self, ablation: Ablation) -> frozenset[Edge]:
        """The edges whose ablation changes something."""
        return frozenset(edge for edge, effect in self.effects.items() if effect[ablation] > 1e-6)

    def borderline(self, ablation: Ablation) -> frozenset[Edge]:
        """Edges so weak that either answer is right."""
        return frozenset(edge for edge, effect in self.effects.items() if 0 < effect[ablation] < CLEAR)

    def problems(self, ablation: Ablation, metric: MetricOf, *, pairs: int | None = None) -> list[PatchingProblem]:
        """The first `pairs` pairs (default: all), one problem for each length."""
        return problems_of_pairs(self.model, self.pairs[:pairs], ablation, metric)


def load_compiled(folder: str | Path, dtype: Precision = torch.float64) -> CompiledProgram:
    """Read one program's folder. Raises `FileFormatError` for a folder that is not one."""
    path = Path(folder)
    try:
        config, truth, pairs = (
            json.loads((path / f"{name}.json").read_text()) for name in ("config", "truth", "pairs")
        )
        tensors = load_file(path / "model.safetensors")
        model = LanguageModel(_bridge_of(tensors, config, as_dtype(dtype)), path.name)
        effects = {
            Edge(edge["from"], edge["to"]): {kind: float(edge[kind]["max"]) for kind in ("resample", "zero")}
            for edge in truth["edges"]
        }
        return CompiledProgram(path.name, config["description"], model, [tuple(p) for p in pairs["pairs"]], effects)
    except (OSError, json.JSONDecodeError, KeyError, SafetensorError, RuntimeError) as error:
        raise FileFormatError(
            f"{path} is not a compiled program ({type(error).__name__}: {error}); it should hold config.json, "
            "model.safetensors, pairs.json and truth.json."
        ) from error


def _bridge_of(tensors: Mapping[str, Tensor], config: dict[str, Any], dtype: torch.dtype) -> Any:
    sizes = {name: config[name] for name in ("n_layers", "n_heads", "d_model", "d_head", "d_mlp", "n_ctx", "d_vocab")}
    return native_bridge(
        tensors, **sizes, d_out=config["d_vocab_out"], causal=config["attention_dir"] == "causal", dtype=dtype
    )
