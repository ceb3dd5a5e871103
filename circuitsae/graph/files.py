"""The native form of a graph on disk: a folder with `graph.json` and `edges.npz`."""

import io
import json
import math
import os
import tempfile
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from circuitsae.graph.attribution_graph import AttributionGraph
from circuitsae.graph.influence import Scores
from circuitsae.graph.nodes import Node, NodeKind
from transcoders.errors import FileFormatError

FORMAT = "circuitsae-graph/1"


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole or not at all: under a temporary name beside it, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def save_graph(graph: AttributionGraph, folder: str | Path) -> Path:
    """Write `graph` to `folder`, replacing an earlier graph there; returns the folder."""
    folder = Path(folder)
    coo = graph.weights.tocoo()
    edges = folder / "edges.npz"
    document = {
        "format": FORMAT,
        "tokens": list(graph.tokens),
        "token_ids": list(graph.token_ids),
        "n_layers": graph.n_layers,
        "n_edges": int(coo.nnz),
        "scores": graph.scores.as_dict(),
        "provenance": dict(graph.provenance),
        "nodes": [_without_nan(asdict(node)) for node in graph.nodes],
        "influence": [_without_nan(float(v)) for v in graph.influence],
        "inputs": [float(v) for v in graph.inputs],
        "rest": [float(v) for v in graph.rest],
        "cumulative": [float(v) for v in graph.cumulative],
        "edge_notes": None if graph.edge_notes is None else _table(graph.edge_notes),
    }
    write_atomically(edges, _npz(row=coo.row, col=coo.col, weight=coo.data))
    write_atomically(folder / "graph.json", json.dumps(document, ensure_ascii=False, allow_nan=False).encode())
    return folder


def load_graph(folder: str | Path) -> AttributionGraph:
    """The graph that `save_graph` wrote to `folder`.

    Raises `FileFormatError` where there is no such folder or a file in it is not what it claims.
    """
    folder = Path(folder)
    document = _read_json(folder / "graph.json")
    if document.get("format") != FORMAT:
        raise FileFormatError(
            f"{folder / 'graph.json'} has format {document.get('format')!r}; expected {FORMAT!r}, as `trace` writes it."
        )
    try:
        nodes = tuple(_node(row) for row in document["nodes"])
        with np.load(folder / "edges.npz", allow_pickle=False) as edges:
            row, col, weight = edges["row"], edges["col"], edges["weight"]
        if len(weight) != document["n_edges"]:
            raise ValueError(f"edges.npz holds {len(weight)} edges, graph.json says {document['n_edges']}")
        notes = document["edge_notes"]
        return AttributionGraph(
            nodes=nodes,
            weights=sparse.csr_array(sparse.coo_array((weight, (row, col)), shape=(len(nodes), len(nodes)))),
            rest=np.array(document.get("rest", [0.0] * len(nodes)), dtype=float),
            influence=np.array([math.nan if v is None else v for v in document["influence"]], dtype=float),
            inputs=np.array(document["inputs"], dtype=float),
            cumulative=np.array(document["cumulative"], dtype=float),
            scores=Scores(**document["scores"]),
            tokens=tuple(document["tokens"]),
            token_ids=tuple(document["token_ids"]),
            n_layers=document["n_layers"],
            provenance=document["provenance"],
            edge_notes=None if notes is None else pd.DataFrame(notes["data"], columns=notes["columns"]),
        )
    except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise FileFormatError(f"{folder} does not hold a whole graph ({error}); trace the prompt again.") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileFormatError(
            f"There is no graph at {path.parent} (no {path.name}); give a folder that `trace` wrote."
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FileFormatError(f"{path} is not JSON ({error}); expected a graph that `trace` wrote.") from error
    if not isinstance(document, dict):
        raise FileFormatError(f"{path} holds a {type(document).__name__}, not an object; expected a graph.")
    return document


def _node(row: dict[str, Any]) -> Node:
    return Node(**{**{k: math.nan if v is None else v for k, v in row.items()}, "kind": NodeKind(row["kind"])})


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _table(frame: pd.DataFrame) -> dict[str, list]:
    rows = [[_without_nan(value) for value in row] for row in frame.itertuples(index=False)]
    return {"columns": [str(name) for name in frame.columns], "data": rows}


def _npz(**arrays: np.ndarray) -> memoryview:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getbuffer()
