"""Attributes one prompt with one engine of ours and says what it cost. Run by `benchmarks/attribution.py`."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import answer, measure, touch

import circuitsae as cs
from circuitsae.attribution import closed_form
from circuitsae.graph import AttributionGraph, NodeKind
from transcoders.dictionaries import random_dictionaries
from transcoders.loading import random_model


def warm_up(settings: dict[str, Any]) -> None:
    """Pays for imports that are made at first use."""
    tiny = cs.ReplacementModel(random_model(), random_dictionaries("plt"))
    cs.attribute(tiny, torch.tensor([0, 1, 2]), **settings)


def save(graph: AttributionGraph, path: str) -> None:
    edges = graph.weights.tocoo()
    np.savez(
        path,
        ids=np.array([node.id for node in graph.nodes]),
        bias=graph.mask(NodeKind.BIAS),
        feature=graph.mask(NodeKind.FEATURE),
        influence=graph.influence,
        row=edges.row,
        col=edges.col,
        weight=edges.data,
    )


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    dtype = torch.float64 if task["float64"] else torch.float32
    engine: dict[str, Any] = {} if task["engine"] is None else {"engine": task["engine"]}
    if task["engine"] == "uncut":
        closed_form.choose_meeting_layer = lambda *_, **__: 0
        engine = {"engine": "closed_form"}
    warm_up(engine)
    model = cs.ReplacementModel(
        cs.load_model(task["model"], dtype=dtype), cs.load_dictionaries(task["dictionaries"], dtype=dtype)
    )
    touch(model.model.bridge)
    if isinstance(model.dictionaries, torch.nn.Module):
        touch(model.dictionaries)
    tokens = torch.tensor(task["tokens"])
    graph, cost = measure(
        task["n_active"],
        task["d_model"],
        dtype,
        lambda: cs.attribute(model, tokens, max_features=task["max_features"], **engine),
    )
    residual = float(np.abs(graph.residual()).max())
    save(graph, task["out"])
    n_logits = int(graph.mask(NodeKind.LOGIT).sum())
    answer(**cost, edges=int(graph.weights.nnz), n_logits=n_logits, residual=residual)


if __name__ == "__main__":
    main()
