"""A graph that is pruned while it is found against the full graph, pruned afterwards."""

import os
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

import circuitsae as cs
from circuitsae.attribution import attribute, attribute_pruned
from circuitsae.graph import NodeKind, sweep
from circuitsae.graph.influence import absolute_inputs, node_influence
from circuitsae.graph.nodes import Node, node_columns
from circuitsae.pocket.families import story
from transcoders.errors import InputError

PROMPT = "When John and Mary went to the store, John gave a drink to"


@pytest.fixture(scope="module")
def pocket() -> cs.ReplacementModel:
    return cs.ReplacementModel(cs.load_model("pocket"), cs.load_dictionaries("pocket"))


@pytest.mark.parametrize(
    ("settings", "held"),
    [
        ({}, sweep.HELD_BYTES),
        ({}, 2**12),
        ({}, 0),
        ({"max_features": 60}, 2**12),
        ({"edges_per_node": 20}, 2**12),
        ({"unexplained": 0.3}, 2**12),
        ({"engine": "autograd"}, 2**12),
        ({"batch_size": 7}, 2**12),
    ],
    ids=str,
)
def test_pruned_while_found_is_the_full_graph_pruned(
    pocket: cs.ReplacementModel, monkeypatch: pytest.MonkeyPatch, settings: dict, held: int
) -> None:
    """Whatever is held of the rows: the others are computed again."""
    monkeypatch.setattr("circuitsae.attribution.expansion.HELD_BYTES", held)
    prompt = PROMPT if settings.get("engine") != "autograd" else "John gave a drink to"
    full = attribute(pocket, prompt, **settings)
    expected = full.prune(nodes=0.9, edges=0.95)
    graph, size = attribute_pruned(pocket, prompt, nodes=0.9, edges=0.95, **settings)
    assert size == (len(full.nodes), full.weights.nnz)
    assert [n.id for n in graph.nodes] == [n.id for n in expected.nodes]
    assert np.array_equal(graph.weights.indptr, expected.weights.indptr)
    assert np.array_equal(graph.weights.indices, expected.weights.indices)
    for ours, theirs in (
        (graph.weights.data, expected.weights.data),
        *((getattr(graph, n), getattr(expected, n)) for n in ("inputs", "rest", "influence", "cumulative")),
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5 if ours is graph.weights.data else 1e-11, atol=1e-12)
    ours, theirs = graph.scores.as_dict(), expected.scores.as_dict()
    assert ours.pop("past") == pytest.approx(theirs.pop("past"), rel=1e-8)  # of differences of edges in float32
    assert ours == pytest.approx(theirs, rel=1e-11)
    assert graph.provenance == expected.provenance


def layered(n_layers: int, n_pos: int, each: int) -> tuple[list[Node], np.ndarray, np.ndarray]:
    """Nodes, which of them have rows, and random weights that layers and causality allow."""
    cells = [(layer, pos) for layer in range(n_layers) for pos in range(n_pos)]
    nodes = [Node(NodeKind.FEATURE, layer, pos, i) for layer, pos in cells for i in range(each)]
    nodes += [Node(NodeKind.ERROR, layer, pos) for layer, pos in cells]
    nodes += [Node(NodeKind.TOKEN, -1, pos, pos) for pos in range(n_pos)]
    nodes += [Node(NodeKind.BIAS, 0, -1, text="b_dec")]
    nodes += [Node(NodeKind.LOGIT, n_layers, n_pos - 1, i, probability=0.4 - i / 10) for i in range(2)]
    layer, pos = np.array([n.layer for n in nodes]), np.array([n.pos for n in nodes])
    targets = np.array([n.is_target for n in nodes])
    there = targets[:, None] & (layer[None] < layer[:, None]) & (pos[None] <= pos[:, None])
    weights = np.random.default_rng(0).normal(size=there.shape).astype(np.float32) * there
    return nodes, targets, weights


@pytest.mark.parametrize("order", ["last first", "first first", "shuffled"])
def test_influence_does_not_depend_on_the_order_of_rows(order: str) -> None:
    nodes, targets, weights = layered(3, 5, 4)
    columns, rows = node_columns(nodes), np.flatnonzero(targets)
    bias = columns["kind"] == NodeKind.BIAS
    full = sparse.csr_array(weights)
    inputs = absolute_inputs(full, bias)
    expected = node_influence(full, inputs, columns["layer"], targets, columns["start"], bias)
    by_position = rows[np.argsort(-columns["pos"][rows], kind="stable")]
    orders = {"last first": by_position, "first first": by_position[::-1]}
    order_of_rows = orders.get(order, np.random.default_rng(1).permutation(rows))
    found = sweep.InfluenceSweep(columns, targets, held=2000)
    for part in np.array_split(order_of_rows, 9):
        found.add(part, sparse.csr_array(weights[part]))
    sums = found.sums()
    np.testing.assert_allclose(sums.influence, expected, rtol=1e-12)
    np.testing.assert_array_equal(sums.inputs, inputs)
    assert sums.n_edges == full.nnz
    held = found.held_rows()
    kept, rank = np.concatenate([block.rows for block in held]), np.nan_to_num(expected) + columns["start"]
    assert sum(block.edges.nnz * 8 for block in held) <= 2000
    assert rank[kept].min() >= np.delete(rank[rows], np.searchsorted(rows, kept)).max()
    for block in held:
        np.testing.assert_array_equal(block.edges.toarray(), weights[block.rows])


def test_rows_from_the_last_position_are_dropped_at_once() -> None:
    """Of a graph whose edges take 20 MB, a fraction is alive at any time."""
    nodes, targets, weights = layered(4, 40, 12)
    columns, rows = node_columns(nodes), np.flatnonzero(targets)
    edges = int(np.count_nonzero(weights)) * 8
    found = sweep.InfluenceSweep(columns, targets, held=2**16)
    by_position = rows[np.argsort(-columns["pos"][rows], kind="stable")]
    tracemalloc.start()
    for part in np.array_split(by_position, 120):
        found.add(part, sparse.csr_array(weights[part]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.isfinite(found.sums().influence[targets]).all()
    assert peak < edges / 3


def test_a_row_that_is_missing_or_comes_twice_is_refused() -> None:
    nodes, targets, weights = layered(2, 2, 1)
    found = sweep.InfluenceSweep(node_columns(nodes), targets)
    first = np.flatnonzero(targets)[:1]
    found.add(first, sparse.csr_array(weights[first]))
    with pytest.raises(InputError, match="not awaited"):
        found.add(first, sparse.csr_array(weights[first]))
    with pytest.raises(InputError, match="has not come"):
        found.sums()
    with pytest.raises(InputError, match="does not fit"):
        found.add(np.flatnonzero(targets)[1:2], sparse.csr_array(weights[:1, 1:]))


TRACE = """
import resource, sys
from circuitsae.cli import main
main(["trace", sys.argv[1], "--out", sys.argv[2]])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
ALLOWED = 1600
"""MB; 1351 were measured; 600 once the model is loaded."""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts KiB on Linux only")
def test_a_long_prompt_is_traced_in_bounded_memory(pocket: cs.ReplacementModel, tmp_path: Path) -> None:
    """The whole command, with validation and page, in a process of its own."""
    rng, prompt = random.Random(0), ""
    while len(pocket.tokens(longer := f"{prompt} {story(rng)}".strip())) <= 118:
        prompt = longer
    assert len(pocket.tokens(prompt)) > 90
    done = subprocess.run(
        [sys.executable, "-c", TRACE, prompt, str(tmp_path / "graph")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (tmp_path / "graph" / "validation.json").exists()
    assert int(done.stdout.rsplit("peak", 1)[1]) < ALLOWED
