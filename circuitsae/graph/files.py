"""The native form of a graph on disk: a folder with `graph.json` and `edges.npz`."""

import json
import math
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from circuitsae.graph.checking import (
    LARGEST_NUMBER,
    Limits,
    MalformedError,
    array_header,
    array_names,
    check_edges,
    check_place,
    mapping,
    number,
    opened_archive,
    parse_json,
    plain,
    present,
    read_bytes,
    refuse_twice,
    sequence,
    share,
    shown,
    text,
    unpacked,
    whole,
)
from circuitsae.graph.influence import Scores
from circuitsae.graph.nodes import Node, NodeKind
from circuitsae.graph.notes import checked, written
from circuitsae.graph.past import on_edges
from circuitsae.graph.persistence import Persistence
from circuitsae.graph.reading import READING, read_reading, reading_of
from transcoders.errors import FileFormatError
from transcoders.files import file_hash, new_files, undisturbed, write_file

FORMAT = "circuitsae-graph/1"
NATIVE_LIMITS = Limits(edges=2**28)
"""The largest graph that `load_graph` reads: of its own files the edges are cheap, some 4 GB at most."""
_DOCUMENT, _EDGES = "graph.json", "edges.npz"
_OWN = tuple(field.name for field in fields(Node) if field.name not in READING)
FIGURES = ("rest", "inputs", "influence", "cumulative")
_FOUND = ("edges", "edges_chance")
"""Of a `Persistence`, what stands with the edges, under a name that begins with "persistence_"."""


@dataclass(frozen=True, eq=False)
class Header:
    """What `graph.json` says: all of a graph but its edges."""

    nodes: tuple[Node, ...]
    tokens: tuple[str, ...]
    token_ids: tuple[int, ...]
    n_layers: int
    n_edges: int
    digest: str | None
    """The SHA-256 of `edges.npz`; None in a graph of before there was one."""
    scores: Scores
    provenance: Mapping[str, Any]
    edge_notes: pd.DataFrame | None
    figures: Mapping[str, np.ndarray]
    """`rest`, `inputs`, `influence` and `cumulative`, [node] each."""
    persistence: Persistence | None = None
    """Without edges where the header alone was read."""


def write_files(folder: Path, head: Header, weights: sparse.csr_array, past: sparse.csr_array | None = None) -> None:
    """Write a graph to `folder`, replacing an earlier one there: `graph.json` and `edges.npz`, both or none."""
    coo = weights.tocoo()
    edges = {"row": coo.row, "col": coo.col, "weight": coo.data}
    if past is not None:
        edges["past"] = on_edges(past, weights)
    if (found := head.persistence) is not None:
        edges |= {f"persistence_{name}": getattr(found, name) for name in _FOUND}
    document = {
        "format": FORMAT,
        "tokens": list(head.tokens),
        "token_ids": list(head.token_ids),
        "n_layers": head.n_layers,
        "n_edges": int(coo.nnz),
        "edges": "",
        "scores": head.scores.as_dict(),
        "provenance": dict(head.provenance),
        "nodes": [_without_nan(_fields(node)) for node in head.nodes],
        "influence": [_without_nan(float(v)) for v in head.figures["influence"]],
        **{name: [float(v) for v in head.figures[name]] for name in ("inputs", "rest", "cumulative")},
        "edge_notes": None if head.edge_notes is None else _table(head.edge_notes),
    }
    if found is not None:
        lists = {name: getattr(found, name).tolist() for name in ("nodes", "nodes_chance")}
        document["persistence"] = {"dictionaries": list(found.dictionaries), **lists}
    with new_files(folder) as temporary:
        write_file(temporary / _EDGES, lambda file: np.savez_compressed(file, allow_pickle=False, **edges))
        document["edges"] = file_hash(temporary / _EDGES)
        write_file(temporary / _DOCUMENT, json.dumps(document, ensure_ascii=False, allow_nan=False))


def read_files(folder: Path, limits: Limits | None = None) -> tuple[Header, sparse.csr_array, sparse.csr_array | None]:
    """What `write_files` wrote, taken for a stranger's: sizes and counts are checked before memory is taken, every
    value before it is used.

    Raises `FileFormatError`, with one sentence, where there is no graph in the folder or a file in it is cut off,
    malformed, or larger than `limits` (default `NATIVE_LIMITS`).
    """
    with _one_sentence(folder):
        require_graph(folder)
        with undisturbed(folder):
            head = _read_header(folder, limits or NATIVE_LIMITS)
            weights, past, found = _read_edges(folder / _EDGES, head)
        head = replace(head, persistence=head.persistence and replace(head.persistence, **found))
        check_edges(head.nodes, [node.id for node in head.nodes], weights)
    return head, weights, past


def load_header(folder: str | Path, *, limits: Limits | None = None) -> Header:
    """All of the graph in `folder` but its edges, which may be many; errors as in `load_graph`."""
    folder = Path(folder)
    with _one_sentence(folder):
        require_graph(folder)
        return _read_header(folder, limits or NATIVE_LIMITS)


def require_graph(folder: Path) -> None:
    """Raises `FileFormatError` where there is no graph in the folder."""
    if not (folder / _DOCUMENT).is_file():
        raise FileFormatError(f"There is no graph at {folder} (no {_DOCUMENT}); give a folder that `trace` wrote.")


@contextmanager
def _one_sentence(folder: Path) -> Iterator[None]:
    try:
        yield
    except MalformedError as error:
        raise FileFormatError(f"{folder} does not hold a whole graph: {error}; trace the prompt again.") from error


def _read_header(folder: Path, limits: Limits) -> Header:
    document = parse_json(read_bytes(folder / _DOCUMENT, limits), limits)
    if (form := document.get("format")) != FORMAT:
        raise MalformedError(f"{_DOCUMENT} has format {shown(form)}, but {FORMAT!r} is what is read")
    raw, n_edges = sequence(document.get("nodes"), "nodes"), whole(document.get("n_edges"), "n_edges")
    words, n_layers = sequence(document.get("tokens"), "tokens"), whole(document.get("n_layers"), "n_layers")
    for name, count in (("nodes", len(raw)), ("edges", n_edges), ("tokens", len(words)), ("layers", n_layers)):
        limits.check(name, count)
    if not raw:
        raise MalformedError("it has no nodes")
    if n_edges > len(raw) ** 2:
        raise MalformedError(f"it claims {n_edges:,} edges between {len(raw):,} nodes")
    nodes = tuple(_node(row, f"node {i}") for i, row in enumerate(raw))
    for node in nodes:
        check_place(node, node.id, len(words), n_layers)
    ids = [node.id for node in nodes]
    refuse_twice(ids, "the node")
    scores = mapping(document.get("scores"), "scores")
    return Header(
        nodes=nodes,
        tokens=tuple(text(word, "a token") for word in words),
        token_ids=_token_ids(document, len(words)),
        n_layers=n_layers,
        n_edges=n_edges,
        digest=None if document.get("edges") is None else text(document["edges"], "the hash of the edges"),
        scores=read_scores(scores),
        provenance=plain(mapping(document.get("provenance"), "provenance")),
        edge_notes=_notes(document.get("edge_notes"), set(ids)),
        figures={name: _figures(document, name, len(nodes)) for name in FIGURES},
        persistence=_persistence(document.get("persistence"), len(nodes)),
    )


def read_scores(stated: Mapping[str, Any]) -> Scores:
    """The scores that a file states."""
    replacement, completeness = (share(stated.get(n), f"the {n} score") for n in ("replacement", "completeness"))
    past = share(stated.get("past"), "the past score", optional=True)
    return Scores(replacement, completeness, None if math.isnan(past) else past)


def _node(row: Any, what: str) -> Node:
    stated = mapping(row, what)
    if (kind := stated.get("kind")) not in tuple(NodeKind):
        raise MalformedError(f"the kind of {what} is {shown(kind)}; expected one of {', '.join(NodeKind)}")
    return Node(
        NodeKind(kind),
        whole(stated.get("layer"), f"layer of {what}", -1),
        whole(stated.get("pos"), f"pos of {what}", -1),
        whole(stated.get("index", -1), f"index of {what}", -1),
        text(stated.get("text", ""), f"text of {what}"),
        **{name: number(stated.get(name), f"{name} of {what}") for name in ("activation", "pre_activation")},
        bias=present(stated.get("bias", 0.0), f"bias of {what}"),
        probability=share(
            stated.get("probability"),
            f"probability of {what}",
            optional=kind != NodeKind.LOGIT or stated.get("explained") is True,
        ),
        **read_reading(stated, what),
    )


def _fields(node: Node) -> dict[str, Any]:
    """A node's fields; those of `reading_of` where there are such."""
    return {name: getattr(node, name) for name in _OWN} | reading_of(node)


def _token_ids(document: dict[str, Any], count: int) -> tuple[int, ...]:
    ids = sequence(document.get("token_ids"), "token_ids")
    if len(ids) != count:
        raise MalformedError(f"there are {len(ids):,} token_ids for {count:,} tokens")
    return tuple(whole(i, "a token id", -1) for i in ids)


def _figures(document: dict[str, Any], name: str, n: int) -> np.ndarray:
    if name == "rest" and name not in document:  # of graphs from before edges could be left out
        return np.zeros(n)
    values = sequence(document.get(name), name)
    if len(values) != n:
        raise MalformedError(f"{name} has {len(values):,} numbers for {n:,} nodes")
    figures = np.array([number(value, f"{name} of node {i}") for i, value in enumerate(values)], dtype=float)
    most = 1 + 1e-6 if name == "cumulative" else math.inf
    if name != "rest" and (wrong := np.flatnonzero((figures < 0) | (figures > most))).size:
        raise MalformedError(f"{name} of node {wrong[0]} is {figures[wrong[0]]:g}, which no network gives")
    return figures


def _persistence(stated: Any, n: int) -> Persistence | None:
    if stated is None:
        return None
    found, values = mapping(stated, "persistence"), {}
    for name in ("nodes", "nodes_chance"):
        values[name] = np.array([share(v, f"persistence of a node ({name})") for v in sequence(found.get(name), name)])
        if len(values[name]) != n:
            raise MalformedError(f"persistence has {len(values[name]):,} {name} for {n:,} nodes")
    names = tuple(text(name, "a dictionary's name") for name in sequence(found.get("dictionaries"), "dictionaries"))
    if not names:
        raise MalformedError("persistence names no dictionaries")
    return Persistence(names, edges=np.zeros(0), edges_chance=np.zeros(0), **values)


def _notes(stated: Any, ids: set[str]) -> pd.DataFrame | None:
    if stated is None:
        return None
    table = mapping(stated, "edge_notes")
    columns = [text(name, "a column of edge_notes") for name in sequence(table.get("columns"), "columns of edge_notes")]
    if len(set(columns)) < len(columns) or not {"source", "target"} <= set(columns):
        raise MalformedError("the columns of edge_notes are not source, target and others, each once")
    rows = sequence(table.get("data"), "data of edge_notes")
    for row in rows:
        if len(sequence(row, "a row of edge_notes")) != len(columns):
            raise MalformedError(f"a row of edge_notes has {len(row)} values for {len(columns)} columns")
    found = [[_note(name, value, ids) for name, value in zip(columns, row, strict=True)] for row in rows]
    return pd.DataFrame(found, columns=columns)


def _note(name: str, value: Any, ids: set[str]) -> Any:
    """A value of a column of the notes as it can be used and written again."""
    if name in ("source", "target"):
        if (found := text(value, f"{name} of edge_notes")) not in ids:
            raise MalformedError(f"edge_notes name the node {shown(value)}, which is not among the nodes")
        return found
    return checked(name, value, "edge_notes")


def _read_edges(path: Path, head: Header) -> tuple[sparse.csr_array, sparse.csr_array | None, dict[str, np.ndarray]]:
    """The weights [node, node] in `path`, of them what is past the features, where it says so, and their persistence.

    What the archive says of its arrays is checked before they are unpacked.
    """
    n_nodes, n_edges = len(head.nodes), head.n_edges
    wanted = [f"persistence_{name}" for name in _FOUND] if head.persistence is not None else []
    with opened_archive(path, largest=48 * n_edges + 2**16, digest=head.digest) as archive:
        names = ["row", "col", "weight", *wanted, *(name for name in array_names(archive) if name == "past")]
        for name in names:
            _check_array(archive, name, n_edges)
        arrays = {name: unpacked(archive, name) for name in names}
    row, col, weight = (arrays[name] for name in ("row", "col", "weight"))
    if n_edges and (min(row.min(), col.min()) < 0 or max(row.max(), col.max()) >= n_nodes):
        raise MalformedError(f"edges.npz has edges beyond its {n_nodes:,} nodes")
    weights = sparse.csr_array(sparse.coo_array((weight, (row, col)), shape=(n_nodes, n_nodes)))
    if weights.nnz != n_edges:
        raise MalformedError("edges.npz has an edge twice")
    past = _past(arrays["past"], row, col, weights) if "past" in arrays else None
    return weights, past, {name: _found(arrays[f"persistence_{name}"], row, col, weights) for name in _FOUND if wanted}


def _found(values: np.ndarray, row: np.ndarray, col: np.ndarray, weights: sparse.csr_array) -> np.ndarray:
    """Shares of edges in the order of `weights.data`."""
    if not ((values >= 0) & (values <= 1 + 1e-6)).all():
        raise MalformedError("the persistence of an edge is no share")
    return on_edges(sparse.csr_array(sparse.coo_array((values, (row, col)), shape=weights.shape)), weights)


def _past(past: np.ndarray, row: np.ndarray, col: np.ndarray, weights: sparse.csr_array) -> sparse.csr_array:
    if len(past) and not np.abs(past).max() <= LARGEST_NUMBER:
        raise MalformedError(f"an edge has a part that is not a finite number below {LARGEST_NUMBER:g}")
    there = past != 0
    return sparse.csr_array(sparse.coo_array((past[there], (row[there], col[there])), shape=weights.shape))


def _check_array(archive: zipfile.ZipFile, name: str, n: int) -> None:
    """Raises `MalformedError` unless a member of the archive is an array of `n` numbers, judged by its header."""
    allowed = ("int32", "int64") if name in ("row", "col") else ("float32", "float64")
    header = array_header(archive, name)
    if header.shape != (n,) or header.dtype.name not in allowed:
        raise MalformedError(
            f"{name} in edges.npz has shape {shown(header.shape)} and type {shown(header.dtype.name)}; "
            f"expected ({n},) and {allowed[0]}"
        )
    header.check_size(f"{name} in edges.npz")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _table(frame: pd.DataFrame) -> dict[str, list]:
    rows = [[written(value) for value in row] for row in frame.itertuples(index=False)]
    return {"columns": [str(name) for name in frame.columns], "data": rows}
