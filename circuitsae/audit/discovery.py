"""A circuit found as `reproduce` finds it, and the subject that a circuit file stands for."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from circuitsae.audit.circuit_file import CircuitFile, Kind, read_circuit
from circuitsae.audit.features import FeatureSubject
from circuitsae.audit.heads import HeadSubject, TaskSource
from circuitsae.audit.subject import Subject
from circuitsae.components import Edge
from circuitsae.components.network import Network
from circuitsae.replacement import ReplacementModel
from circuitsae.reproduce.circuit import select_circuit
from circuitsae.reproduce.features import select_features
from circuitsae.reproduce.result import Settings, Step, silent
from circuitsae.tasks.cases import prompt_task
from circuitsae.validation.circuits import Circuit, rank_nodes
from transcoders.errors import InputError
from transcoders.files import short_hash
from transcoders.language_model import LanguageModel


def find_sizes(model: LanguageModel, *, quick: bool, seed: int = 0, known: bool = False) -> Settings:
    """Prompts that a circuit is found on, as `reproduce` has them."""
    sizes = replace(Settings.quick(seed) if quick else Settings(seed=seed), known=known)
    return sizes.quick_for(model) if quick else sizes


def heads_file(task: str, model: str, circuit: Collection[Edge], sizes: Settings) -> CircuitFile:
    """Edges that `select_circuit` found."""
    method = "best edges by integrated gradients, the best and doubtful patched; their number chosen on other prompts"
    found = {"prompts": sizes.discovery, "chosen_on": sizes.held_out, "seed": sizes.seed, "known": sizes.known}
    return CircuitFile("heads", task, model, tuple(sorted(circuit)), found=found | {"method": method})


def features_file(task: str, model: str, circuit: Circuit, sizes: Settings, dictionaries: str) -> CircuitFile:
    """Nodes that `select_features` found."""
    found = {"prompts": sizes.features, "seed": sizes.seed, "known": sizes.known}
    found |= {"method": "best nodes by total effect in the linear graph, as many as are faithful enough"}
    return CircuitFile("features", task, model, circuit.nodes, dictionaries, found)


def find_circuit_file(
    model: LanguageModel | ReplacementModel,
    task: str,
    sizes: Settings,
    *,
    dictionaries: str = "",
    tell: Step = silent,
    keep: Path | None = None,
) -> CircuitFile:
    """Of a model the circuit of heads and MLPs, of a replacement model that of features and error nodes.

    `keep`: a folder where it is kept; called again with the same sizes, it is taken from there.
    """
    own = model.model if isinstance(model, ReplacementModel) else model
    kind: Kind = "features" if isinstance(model, ReplacementModel) else "heads"
    identity = [task, kind, own.fingerprint(), str(sizes), str(own.adds_bos), dictionaries]
    file = None if keep is None else keep / f"{Path(task).stem}-{kind}-{short_hash(identity)}.json"
    if file is not None and file.is_file():
        return read_circuit(file, own)
    if isinstance(model, ReplacementModel):
        tell("finding the feature circuit")
        found = select_features(model, task, sizes)
        made = features_file(task, own.name, found.circuit, sizes, dictionaries)
        made = replace(made, found={**made.found, "candidates": len(found.ranking.nodes)})
    else:
        tell("finding the circuit of heads and MLPs")
        chosen = select_circuit(model, task, sizes, tell)
        made = heads_file(task, own.name, chosen.circuit, sizes)
        made = replace(made, found={**made.found, "candidates": len(chosen.graph.edges)})
    if file is not None:
        made.save(file)
    return made


def stand_in(model: LanguageModel | ReplacementModel, task: str, *, seed: int = 0) -> CircuitFile:
    """A circuit to plan with where none is found yet: a tenth of the edges, or the best nodes of two prompts."""
    if isinstance(model, ReplacementModel):
        cases = prompt_task(model.model, TaskSource(task, model.model, seed).task(2, 0))[0]
        return CircuitFile("features", task, model.model.name, rank_nodes(model, cases).circuit(200).nodes)
    graph = Network.of(model).graph
    return CircuitFile("heads", task, model.name, tuple(sorted(graph.connected(graph.edges[::10]))))


def subject_of(
    file: CircuitFile, model: LanguageModel | ReplacementModel, task: str, *, seed: int = 0, known: bool = False
) -> Subject:
    """A circuit file's circuit in its model, on prompts of a task.

    Raises `InputError` for features without dictionaries.
    """
    own: Any = model.model if isinstance(model, ReplacementModel) else model
    source = TaskSource(task, own, seed, known)
    if file.kind == "heads":
        return HeadSubject(source, file.edges)
    if not isinstance(model, ReplacementModel):
        raise InputError("The circuit is of features, and no dictionaries are given; give --dictionaries.")
    return FeatureSubject(model, source, file.circuit)
