"""Compact edges, thresholds, pruning and incremental influence against dense float64 forms of their definitions."""

import json
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from circuitsae.graph import (
    AttributionGraph,
    EdgeBlocks,
    LazyInfluence,
    Node,
    NodeKind,
    compact,
    keep_strongest,
    load_graph,
    merge_features,
)
from circuitsae.graph.influence import absolute_inputs, node_influence
from circuitsae.graph.pruning import threshold
from transcoders.errors import InputError

N_LAYERS, N_POS = 5, 3


def nodes_of(features: int) -> list[Node]:
    """`features` in each cell of layer and position, with errors, tokens, biases and two logits."""
    cells = [(layer, pos) for layer in range(N_LAYERS) for pos in range(N_POS)]
    nodes = [Node(NodeKind.FEATURE, layer, pos, i, pre_activation=0.0) for layer, pos in cells for i in range(features)]
    nodes += [Node(NodeKind.ERROR, layer, pos) for layer, pos in cells]
    nodes += [Node(NodeKind.TOKEN, -1, pos, 10 + pos) for pos in range(N_POS)]
    nodes += [Node(NodeKind.BIAS, layer, -1, text="b_dec") for layer in range(N_LAYERS)]
    return nodes + [
        Node(NodeKind.LOGIT, N_LAYERS, N_POS - 1, i, pre_activation=0.0, probability=p)
        for i, p in enumerate((0.5, 0.25))
    ]


def allowed(nodes: list[Node]) -> np.ndarray:
    """[target, source], the edges that causality and layers allow."""
    layer, pos = np.array([n.layer for n in nodes]), np.array([n.pos for n in nodes])
    target = np.array([n.is_target for n in nodes])
    return target[:, None] & (layer[None] < layer[:, None]) & (pos[None] <= pos[:, None])


def random_weights(nodes: list[Node], seed: int, density: float = 0.4) -> np.ndarray:
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(len(nodes), len(nodes))) * rng.lognormal(size=len(nodes))
    return weights * allowed(nodes) * (rng.random(weights.shape) < density)


def tied_weights(nodes: list[Node], seed: int) -> np.ndarray:
    """Each row has 1, 2 or 4 sources of equal |weight|: shares and influence are sums of powers of two, exact in every
    order, so that equal scores are equal to the last bit and ties are real ones.
    """
    rng = np.random.default_rng(seed)
    weights = np.zeros((len(nodes), len(nodes)))
    for row, sources in enumerate(allowed(nodes)):
        bias = np.array([n.kind is NodeKind.BIAS for n in nodes])
        free = np.flatnonzero(sources & ~bias)
        if len(free):
            size = 2 ** rng.integers(0, 3)
            chosen = rng.choice(free, min(size, 2 ** int(np.log2(len(free)))), replace=False)
            weights[row, chosen] = rng.choice([-1.0, 1.0], len(chosen)) * 2.0 ** rng.integers(-3, 4)
            weights[row, sources & bias] = 2.0 ** rng.integers(-5, 1)
    return weights


def graph_of(nodes: list[Node], weights: np.ndarray, **known: Any) -> AttributionGraph:
    tokens = [f"w{p}" for p in range(N_POS)]
    return AttributionGraph.build(nodes, sparse.csr_array(weights), tokens, range(N_POS), N_LAYERS, {}, **known)


# thresholds


def threshold_by_sorting(values: np.ndarray, share: float) -> float:
    """The rule with exact rational numbers."""
    ordered = sorted((Fraction(float(v)) for v in values if v > 0), reverse=True)
    total, held = sum(ordered), Fraction(0)
    for value in ordered:
        held += value
        if float(held / total) >= share:
            return float(value)
    return 0.0


@pytest.mark.parametrize("share", [1e-12, 0.1, 0.8, 0.98, 1.0])
@pytest.mark.parametrize(
    "values",
    [
        np.array([]),
        np.zeros(3),
        np.array([4.0, 3, 2, 1]),
        np.full(1000, 0.1),
        np.repeat([1.0, 1 / 3, 1e-17], [3, 500, 7]),
        np.array([5e-324, 1e-310, 2.3e-308, 1e-300]),
        np.array([1e300, 1e300, 1.0]),
        np.random.default_rng(0).lognormal(sigma=8, size=2000),
        np.random.default_rng(1).random(2000).astype(np.float32),
        1 + np.random.default_rng(2).random(2000) * 1e-13,
    ],
)
def test_threshold_is_the_sort_rule(values, share):
    blocks = np.array_split(values, 4)
    assert threshold(blocks, share) == threshold_by_sorting(values, share)


def test_threshold_does_not_see_the_order():
    values = np.random.default_rng(3).lognormal(sigma=3, size=20_000)
    shares = np.linspace(0.001, 1, 50)
    up, down = np.sort(values), np.sort(values)[::-1]
    assert [threshold([up], s) for s in shares] == [threshold([down[:7], down[7:]], s) for s in shares]


# pruning


def prune_dense(graph: AttributionGraph, nodes: float, edges: float) -> tuple[set, set]:
    """Influence by matrix powers, thresholds by sorting everything, nodes dropped one by one."""
    bias, fixed = graph.mask(NodeKind.BIAS), graph.mask(NodeKind.TOKEN, NodeKind.LOGIT)
    feature = graph.mask(NodeKind.FEATURE)

    def output(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        total = (weights * ~bias).sum(axis=1)
        share = weights * ~bias / np.where(total > 0, total, 1)[:, None]
        reach, step = graph.start.copy(), graph.start
        for _ in range(N_LAYERS + 2):
            step = step @ share
            reach = reach + step
        return reach, np.divide(reach, total, out=np.zeros_like(total), where=total > 0)

    weights = abs(graph.weights.toarray().astype(float))
    influence = output(weights)[0] - graph.start
    kept = (influence >= threshold_by_sorting(influence[~bias], nodes)) | fixed | bias
    weights = weights * kept * kept[:, None]
    score = weights * output(weights)[1][:, None]
    stays = (score >= threshold_by_sorting(score[:, ~bias].ravel(), edges)) & (score > 0)
    changed = True
    while changed:
        changed = False
        for i in np.flatnonzero(kept):
            if (not fixed[i] and not stays[:, i].any()) or (feature[i] and not stays[i, ~bias].any()):
                kept[i], stays[i], stays[:, i], changed = False, False, False, True
    names = graph.ids
    return set(names[kept]), {(names[s], names[t]) for t, s in zip(*np.nonzero(stays), strict=True)}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("nodes", "edges"), [(0.8, 0.98), (0.5, 0.7), (0.97, 0.5), (1.0, 1.0)])
@pytest.mark.parametrize("weights", [random_weights, tied_weights])
def test_pruning_is_the_dense_rule(seed, nodes, edges, weights, monkeypatch):
    monkeypatch.setattr(compact, "BLOCK", 37)
    of = nodes_of(4)
    graph = graph_of(of, weights(of, seed).astype(np.float32 if seed % 2 else np.float64))
    pruned = graph.prune(nodes=nodes, edges=edges)
    expected_nodes, expected_edges = prune_dense(graph, nodes, edges)
    assert set(pruned.ids) == expected_nodes
    found = pruned.edges_frame()
    assert set(zip(found["source"], found["target"], strict=True)) == expected_edges
    assert pruned.weights.dtype == graph.weights.dtype


def test_tied_graphs_have_ties():
    of = nodes_of(4)
    influence = graph_of(of, tied_weights(of, 0)).influence
    influence = influence[influence > 0]
    assert len(np.unique(influence)) < len(influence)


def test_pruning_a_graph_without_edges_keeps_what_always_stays():
    of = nodes_of(2)
    pruned = graph_of(of, np.zeros((len(of), len(of)))).prune()
    assert {node.kind for node in pruned.nodes} == {NodeKind.TOKEN, NodeKind.LOGIT}


def test_single_precision_edges_stay_and_sums_are_double(monkeypatch):
    monkeypatch.setattr(compact, "BLOCK", 50)
    of = nodes_of(6)
    weights = random_weights(of, 0, density=0.9).astype(np.float32)
    single, double = graph_of(of, weights), graph_of(of, weights.astype(np.float64))
    assert single.weights.dtype == np.float32
    assert single.weights.indices.dtype == np.int32
    assert single.inputs.dtype == single.influence.dtype == np.float64
    np.testing.assert_array_equal(single.influence, double.influence)
    np.testing.assert_array_equal(single.residual(), double.residual())
    np.testing.assert_array_equal(single.shares.toarray(), double.shares.toarray())


# edges that are not stored


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("m", [1, 3, 7, 20])
def test_strongest_edges_and_their_remainder(m, dtype):
    rng = np.random.default_rng(m)
    weights = rng.normal(size=(9, 20)).astype(dtype)
    weights[2, 4:], weights[3], weights[4] = 0, 1.5, 0
    weights[5] = rng.choice([-2.0, -1.0, 1.0, 2.0], 20)
    bias = rng.random(20) < 0.2
    kept, rest, absolute = keep_strongest(weights, m, bias)
    for row, full in enumerate(weights.astype(float)):
        strongest = sorted(range(20), key=lambda s, full=full: (-abs(full[s]), s))[:m]
        expected = np.zeros(20)
        expected[strongest] = full[strongest]
        np.testing.assert_array_equal(kept[row], expected)
        assert rest[row] == pytest.approx(full.sum() - expected.sum(), abs=1e-12)
        assert absolute[row] == pytest.approx(abs(full[~bias]).sum(), rel=1e-12)
    assert kept.dtype == dtype
    assert rest.dtype == absolute.dtype == np.float64


def truncated(m: int) -> tuple[AttributionGraph, AttributionGraph]:
    """A full graph whose rows sum up, and the same graph with `m` edges a row."""
    of = nodes_of(4)
    weights = random_weights(of, 0)
    whole = [
        Node(n.kind, n.layer, n.pos, n.index, n.text, pre_activation=total + 0.5, bias=0.5, probability=n.probability)
        if n.is_target
        else n
        for n, total in zip(of, weights.sum(axis=1), strict=True)
    ]
    kept, rest, inputs = keep_strongest(weights, m, np.array([n.kind is NodeKind.BIAS for n in of]))
    return graph_of(whole, weights), graph_of(whole, kept, rest=rest, inputs=inputs)


def test_what_is_not_stored_counts(tmp_path):
    full, part = truncated(5)
    assert part.weights.nnz < full.weights.nnz
    assert abs(part.rest).max() > 0.1
    assert abs(part.residual()).max() < 1e-12
    stored = part.weights.toarray() != 0
    np.testing.assert_allclose(part.shares.toarray()[stored], full.shares.toarray()[stored], rtol=1e-12)
    again = load_graph(part.save(tmp_path / "graph"))
    np.testing.assert_array_equal(again.rest, part.rest)
    np.testing.assert_array_equal(again.inputs, part.inputs)
    pruned = part.prune()
    np.testing.assert_array_equal(pruned.rest, [part.rest[part.position[name]] for name in pruned.ids])


def test_merging_keeps_truncated_rows_whole(monkeypatch):
    monkeypatch.setattr(compact, "BLOCK", 30)
    full, part = truncated(8)
    merged = merge_features(part, 20)
    assert merged.mask(NodeKind.FEATURE).sum() == 20
    assert abs(merged.residual()).max() < 1e-12
    bias = part.mask(NodeKind.BIAS)
    missing = dict(zip(part.ids, part.inputs - absolute_inputs(part.weights, bias), strict=True))
    now = merged.inputs - absolute_inputs(merged.weights, merged.mask(NodeKind.BIAS))
    np.testing.assert_allclose(now, [missing[name] for name in merged.ids], atol=1e-12)
    assert max(missing.values()) > 0.1
    assert abs(merge_features(full, 20).residual()).max() < 1e-12


def test_files_from_before_load_with_nothing_missing(tmp_path):
    full, _ = truncated(5)
    folder = full.save(tmp_path / "graph")
    document = json.loads((folder / "graph.json").read_text())
    del document["rest"]
    (folder / "graph.json").write_text(json.dumps(document))
    again = load_graph(folder)
    assert again.rest.shape == (len(full.nodes),)
    assert not again.rest.any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_edge_blocks_assemble_what_was_added(dtype):
    rng = np.random.default_rng(0)
    n = 30
    weights = (rng.normal(size=(n, n)) * (rng.random((n, n)) < 0.4)).astype(dtype)
    blocks = EdgeBlocks()
    split = rng.permutation(n)
    for rows in np.array_split(rng.permutation(20), 4):
        for columns in (split[:11], split[11:]):
            blocks.add(rows, columns, weights[np.ix_(rows, columns)])
    blocks.add(np.arange(20, 25), None, weights[20:25])
    assert blocks.nnz == np.count_nonzero(weights[:25])
    found = blocks.to_csr(n)
    weights[25:] = 0
    np.testing.assert_array_equal(found.toarray(), weights)
    assert (found.dtype, found.indices.dtype) == (dtype, np.int32)
    assert found.has_canonical_format
    assert blocks.nnz == 0
    assert EdgeBlocks().to_csr(3).shape == (3, 3)


def test_edges_that_do_not_fit_get_one_sentence():
    block = np.ones((2, 3), dtype=np.float32)
    for rows, columns, message in [
        ([0, 0], None, "occurs twice"),
        ([0], None, "for each row"),
        ([0, 1], [1], "column"),
    ]:
        with pytest.raises(InputError, match=message):
            EdgeBlocks().add(np.array(rows), columns if columns is None else np.array(columns), block)
    blocks = EdgeBlocks()
    blocks.add(np.array([0, 5]), None, block)
    with pytest.raises(InputError, match="more than n=4"):
        blocks.to_csr(4)
    blocks.add(np.array([5, 1]), np.array([2, 3, 4]), block)
    with pytest.raises(InputError, match="added twice"):
        blocks.to_csr(6)
    with pytest.raises(InputError, match="m=0 keeps no edge"):
        keep_strongest(block, 0)


# influence of part of a graph


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_lazy_influence_is_the_influence_of_the_known_rows(seed, dtype, monkeypatch):
    monkeypatch.setattr(compact, "BLOCK", 40)
    of = nodes_of(5)
    weights = random_weights(of, seed).astype(dtype)
    graph = graph_of(of, weights)
    bias, targets = graph.mask(NodeKind.BIAS), graph.mask(NodeKind.FEATURE, NodeKind.LOGIT)
    features = graph.mask(NodeKind.FEATURE)
    lazy = LazyInfluence(graph.layers, graph.start, bias)
    assert not np.nan_to_num(lazy.current()).any()
    order = np.random.default_rng(seed).permutation(np.flatnonzero(features))
    batches = [np.flatnonzero(graph.mask(NodeKind.LOGIT)), *np.array_split(order, 9)]
    known = np.zeros(len(of), dtype=bool)
    for rows in batches:
        lazy.add_rows(rows, weights[rows])
        known[rows] = True
        edges = sparse.csr_array(weights * known[:, None])
        expected = node_influence(edges, graph.inputs, graph.layers, targets, graph.start, bias)
        np.testing.assert_allclose(lazy.current(), expected, rtol=1e-11, atol=1e-14)
        open_share = expected[features & ~known].sum() / expected[features].sum()
        assert lazy.unexplained(features) == pytest.approx(open_share, abs=1e-12)
    np.testing.assert_array_equal(lazy.current() > 0, graph.influence > 0)
    assert lazy.unexplained(features) == 0
    np.testing.assert_array_equal(lazy.take_edges().toarray(), weights)
    with pytest.raises(InputError, match="taken already"):
        lazy.add_rows(batches[0], weights[batches[0]])


def test_lazy_influence_reads_only_what_changed(monkeypatch):
    of = nodes_of(5)
    weights = random_weights(of, 0, density=0.1)
    graph = graph_of(of, weights)
    lazy = LazyInfluence(graph.layers, graph.start, graph.mask(NodeKind.BIAS))
    first, last = np.flatnonzero(graph.mask(NodeKind.FEATURE) & (graph.influence > 0))[[0, -1]]
    rest = np.flatnonzero(graph.mask(NodeKind.FEATURE, NodeKind.LOGIT))
    rest = rest[(rest != first) & (rest != last)]
    lazy.add_rows(rest, sparse.csr_array(weights)[rest])
    read = []
    blocks = compact.row_blocks
    monkeypatch.setattr(
        "circuitsae.graph.sweep.row_blocks", lambda edges, rows: (read.append(len(rows)), *blocks(edges, rows))[1:]
    )
    lazy.add_rows(np.array([first]), weights[[first]])
    assert sum(read) <= 1
    read.clear()
    lazy.add_rows(np.array([last]), weights[[last]])
    reached = np.linalg.inv(np.eye(len(of)) - (abs(weights) > 0) / len(of))[last] > 1e-15
    assert 1 < sum(read) <= (reached & graph.mask(NodeKind.FEATURE)).sum() < len(rest) / 2
    np.testing.assert_allclose(lazy.current(), graph.influence, rtol=1e-12)


def test_lazy_influence_takes_rows_with_a_remainder():
    full, part = truncated(4)
    targets = np.flatnonzero(part.mask(NodeKind.FEATURE, NodeKind.LOGIT))
    lazy = LazyInfluence(part.layers, part.start, part.mask(NodeKind.BIAS))
    lazy.add_rows(targets, part.weights.toarray()[targets], part.inputs[targets])
    np.testing.assert_allclose(lazy.current(), part.influence, rtol=1e-12)
    assert np.nansum(lazy.current()) < np.nansum(full.influence)


def test_lazy_influence_refuses_rows_it_knows():
    lazy = LazyInfluence(np.array([0, 1]), np.array([0.0, 1.0]), np.zeros(2, dtype=bool))
    lazy.add_rows(np.array([1]), np.array([[2.0, 0.0]]))
    np.testing.assert_array_equal(lazy.current(), [1.0, 0.0])
    with pytest.raises(InputError, match="node 1 was added already"):
        lazy.add_rows(np.array([1]), np.array([[2.0, 0.0]]))
    with pytest.raises(InputError, match="does not fit 2 nodes"):
        lazy.add_rows(np.array([0]), np.zeros((1, 3)))
