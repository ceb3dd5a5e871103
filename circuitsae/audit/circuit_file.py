"""A circuit as a file: edges between heads and MLPs, or features and error nodes, with the task they belong to.

    {"kind": "heads", "task": "ioi", "model": "pocket", "edges": [["a0.h1", "m1"], …], "found": {…}}
    {"kind": "features", "task": "ioi", "model": "pocket", "nodes": ["2.713@IO", …], "dictionaries": "pocket"}

`found` says how: `prompts`, `seed`, `method`, `candidates`. Circuits are read from the `circuit.json` of
`circuitsae circuit`, attribution graphs and names of published circuits of GPT-2 small, too.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from circuitsae.components import Edge, edges_of_nodes, known_circuit, known_circuits
from circuitsae.components.network import Network
from circuitsae.graph import AttributionGraph, load_graph
from circuitsae.graph.exchange import read_graph
from circuitsae.interventions import target_id
from circuitsae.reproduce.circuit import is_gpt2_small
from circuitsae.tasks import load_task
from circuitsae.validation.circuits import Circuit, CircuitNode
from transcoders.errors import FileFormatError, InputError
from transcoders.files import write_json
from transcoders.language_model import LanguageModel

Kind = Literal["heads", "features"]
DRAWN = 2000
"""Prompts of the task that a graph's prompt is looked for among."""
_EXPECTED = (
    "expected a circuit file, the circuit.json of `circuitsae circuit`, the folder or file of a graph, or the name of "
    "a published circuit"
)


@dataclass(frozen=True)
class CircuitFile:
    """A circuit, and what is known of where it comes from."""

    kind: Kind
    task: str
    model: str
    units: tuple[Edge | CircuitNode, ...]
    dictionaries: str = ""
    """Of features: where they are from, as `--dictionaries` names them."""
    found: Mapping[str, Any] = field(default_factory=dict)

    @property
    def edges(self) -> tuple[Edge, ...]:
        return tuple(unit for unit in self.units if isinstance(unit, Edge))

    @property
    def circuit(self) -> Circuit:
        """Its features and error nodes."""
        return Circuit(tuple(unit for unit in self.units if not isinstance(unit, Edge)))

    def to_json(self) -> dict[str, Any]:
        named = (
            {"edges": [list(edge) for edge in self.edges]}
            if self.kind == "heads"
            else {"nodes": [target_id(node) for node in self.circuit.nodes], "dictionaries": self.dictionaries}
        )
        return {"kind": self.kind, "task": self.task, "model": self.model, **named, "found": dict(self.found)}

    def save(self, path: str | Path) -> Path:
        """Write it as a JSON file."""
        write_json(Path(path), self.to_json())
        return Path(path)

    @classmethod
    def from_json(cls, record: Any) -> "CircuitFile":
        """From what `to_json` gave, or what `circuitsae circuit` wrote. Raises `InputError` for anything else."""
        if not isinstance(record, Mapping):
            raise InputError("it holds no circuit")
        kind = record.get("kind", "features" if "curves" in record else None)
        rows = record.get({"heads": "edges", "features": "nodes"}.get(str(kind), ""))
        if kind not in get_args(Kind) or not isinstance(rows, list):
            raise InputError('it has neither "kind": "heads" with edges nor "kind": "features" with nodes')
        if not rows:
            raise InputError("its circuit is empty")
        units = _edges(rows) if kind == "heads" else Circuit.of(_ids(rows)).nodes
        texts = [record.get(name) or "" for name in ("task", "model", "dictionaries")]
        if not all(isinstance(text, str) for text in texts):
            raise InputError("its task, model or dictionaries are no text")
        task, model, dictionaries = texts
        found = record.get("found")
        return cls(kind, task, model, units, dictionaries, found if isinstance(found, Mapping) else {})


def _edges(rows: Sequence[Any]) -> tuple[Edge, ...]:
    for row in rows:
        if not (isinstance(row, list) and len(row) == 2 and all(isinstance(end, str) for end in row)):
            raise InputError(f"{row!a:.60} is no edge; write it like ['a0.h1', 'm1']")
    return tuple(dict.fromkeys(Edge(*row) for row in rows))


def _ids(rows: Iterable[Any]) -> list[str]:
    ids = [row.get("id") if isinstance(row, Mapping) else row for row in rows]
    for one in ids:
        if not isinstance(one, str):
            raise InputError(f"{one!a:.60} is no node; write it like '2.713@IO'")
    return ids  # pyright: ignore[reportReturnType]


def read_circuit(source: str | Path, model: LanguageModel, task: str = "", *, seed: int = 0) -> CircuitFile:
    """The circuit in a file or folder, or a published one by its name, checked against the model it is of.

    A graph's positions become the roles that prompts of the task which read like its own have there (`roles_of`).
    Raises `InputError` for what is no circuit, for one of another model, and for a graph of another task's prompt.
    """
    path = Path(source)
    if path.is_dir():
        found = _of_graph(load_graph(path), path, model, task, seed)
    elif path.is_file():
        found = _of_file(path, model, task, seed)
    else:
        found = _published(str(source), model)
    if found.model and Path(found.model).name != Path(model.name).name:
        raise InputError(f"{source} is a circuit of {found.model}, but the model is {model.name}; give --model "
                         f"{found.model}.")  # fmt: skip
    Network.of(model).graph.check_edges(found.edges)
    return found


def _of_file(path: Path, model: LanguageModel, task: str, seed: int) -> CircuitFile:
    try:
        record = json.loads(path.read_bytes())
        is_ours = isinstance(record, Mapping) and ("kind" in record or "curves" in record)
    except (ValueError, RecursionError):  # read_graph knows what is no JSON
        is_ours, record = False, None
    if not is_ours:
        try:
            graph = read_graph(path)
        except FileFormatError as error:
            said = str(error).removeprefix(f"{path} ").rstrip(".")
            raise FileFormatError(f"{path} is no circuit: it {said}; {_EXPECTED}.") from error
        return _of_graph(graph, path, model, task, seed)
    try:
        return CircuitFile.from_json(record)
    except InputError as error:
        raise FileFormatError(f"{path} is no circuit: {str(error).rstrip('.')}; {_EXPECTED}.") from error


def _published(name: str, model: LanguageModel) -> CircuitFile:
    names = [known.name for known in known_circuits()]
    if name not in names:
        raise InputError(f"There is no circuit {name!r}; {_EXPECTED} ({', '.join(names)}).")
    if not is_gpt2_small(model):
        raise InputError(f"{name} was published of GPT-2 small, and the model is {model.name}; give --model gpt2.")
    known, graph = known_circuit(name), Network.of(model).graph
    if known.wiring is None:  # components alone: with every edge between them, and all MLPs, as papers keep them
        mlps = [writer for writer in graph.writers if writer.startswith("m")]
        edges = edges_of_nodes(graph, [*known.nodes, *mlps])
    else:
        edges = known.edges(graph)
    task, how = known.task.replace("_", "-"), "" if known.wiring else "; every edge between its heads and all MLPs"
    return CircuitFile("heads", task, model.name, tuple(sorted(edges)), found={"method": f"{known.source}{how}"})


def _of_graph(graph: AttributionGraph, path: Path, model: LanguageModel, task: str, seed: int) -> CircuitFile:
    if not task:
        raise InputError(f"{path} is a graph of one prompt; give --task, the task that the prompt is of.")
    bos = graph.provenance.get("bos")
    roles = roles_of(graph.tokens, model.with_bos(bos) if isinstance(bos, bool) else model, task, seed)
    if roles is None:
        raise InputError(
            f"The prompt of {path} reads like none of {DRAWN:,} prompts of {task}, so its positions have no roles; "
            "trace a prompt of the task."
        )
    circuit = Circuit.from_graph(graph, roles)
    if not len(circuit):
        raise InputError(f"{path} has no features and no error nodes; there is no circuit in it.")
    source = graph.provenance.get("source")
    named = [source.get("dictionaries") if isinstance(source, Mapping) else None, graph.provenance.get("model")]
    dictionaries, own = (value if isinstance(value, str) else "" for value in named)
    method = "nodes of an attribution graph"
    return CircuitFile("features", task, own, circuit.nodes, dictionaries, {"prompts": 1, "method": method})


def roles_of(tokens: Sequence[str], model: LanguageModel, task: str, seed: int = 0) -> dict[str, int] | None:
    """The role of each position of a prompt, from examples of the task that read like it.

    Those are the examples of one template, with their roles at the same places: the prompt has the words that all of
    them share, and equal words at two roles where they have. None where no examples are like that.
    """
    for pair in load_task(task, model, DRAWN, seed).tokens(model):
        if pair.clean.shape[1] != len(tokens):
            continue
        groups: dict[tuple[str | int, tuple[tuple[str, int], ...]], list[int]] = {}
        for row, template in enumerate(pair.templates):
            places = tuple((role, int(at[row])) for role, at in pair.roles.items())
            groups.setdefault((template or row, places), []).append(row)
        for (_, places), rows in groups.items():
            ids = pair.clean[rows]
            shared = (ids == ids[:1]).all(0).tolist()
            words, roles = model.token_strings(ids[0]), dict(places)
            same = all(own == word for own, word, fixed in zip(tokens, words, shared, strict=True) if fixed)
            if same and _alike([tokens[at] for at in roles.values()], [words[at] for at in roles.values()]):
                return roles
    return None


def _alike(first: Sequence[str], second: Sequence[str]) -> bool:
    """Whether equal words stand at the same places in both."""
    return [first.index(word) for word in first] == [second.index(word) for word in second]
