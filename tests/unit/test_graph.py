"""Graphs without a model: influence and pruning against dense, slow forms of their definitions."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from circuitsae.graph import AttributionGraph, Node, NodeKind, load_graph, merge_features, prune
from transcoders.errors import FileFormatError, InputError

N_LAYERS, N_POS = 4, 3


def layered_graph(seed: int = 0, density: float = 0.5) -> AttributionGraph:
    """A random graph with the layering of a real one."""
    rng = np.random.default_rng(seed)
    nodes = [
        Node(NodeKind.FEATURE, layer, pos, index, activation=1.0)
        for layer in range(N_LAYERS)
        for pos in range(1, N_POS)
        for index in range(3)
    ]
    nodes += [Node(NodeKind.ERROR, layer, pos) for layer in range(N_LAYERS) for pos in range(1, N_POS)]
    nodes += [Node(NodeKind.TOKEN, -1, pos, 10 + pos, f"w{pos}") for pos in range(N_POS)]
    nodes += [Node(NodeKind.BIAS, -1, pos, text="pos") for pos in range(N_POS)]
    nodes += [Node(NodeKind.BIAS, layer, -1, text="b_dec") for layer in range(N_LAYERS)]
    probabilities = (0.6, 0.3)
    nodes += [
        Node(NodeKind.LOGIT, N_LAYERS, N_POS - 1, i, f"t{i}", pre_activation=1.0, probability=p)
        for i, p in enumerate(probabilities)
    ]
    weights = rng.normal(size=(len(nodes), len(nodes))) * (rng.random((len(nodes), len(nodes))) < density)
    for t, target in enumerate(nodes):
        for s, source in enumerate(nodes):
            below = source.layer < target.layer and source.pos <= target.pos and source.kind is not NodeKind.LOGIT
            if not (target.is_target and below):
                weights[t, s] = 0
    totals = weights.sum(axis=1)
    nodes = [
        Node(n.kind, n.layer, n.pos, n.index, n.text, n.activation, totals[i] + 0.25, 0.25, n.probability)
        if n.is_target
        else n
        for i, n in enumerate(nodes)
    ]
    return AttributionGraph.build(
        nodes,
        sparse.csr_array(weights),
        [f"w{p}" for p in range(N_POS)],
        range(N_POS),
        N_LAYERS,
        {"prompt": "w0 w1 w2"},
    )


def dense_shares(graph: AttributionGraph) -> np.ndarray:
    weights = abs(graph.weights.toarray())
    weights[:, graph.mask(NodeKind.BIAS)] = 0
    return weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-300)


@pytest.mark.parametrize("seed", range(5))
def test_influence_is_the_series(seed):
    graph = layered_graph(seed)
    share, w = dense_shares(graph), graph.start
    series = w @ (np.linalg.inv(np.eye(len(w)) - share) - np.eye(len(w)))
    bias = graph.mask(NodeKind.BIAS)
    np.testing.assert_allclose(graph.influence[~bias], series[~bias], atol=1e-12)
    assert np.isnan(graph.influence[bias]).all()


def test_nodes_at_one_place_are_equal_whatever_was_measured_there():
    """Also where nothing was: since Python 3.13 a dataclass compares field by field, and no nan equals another."""
    node = Node(NodeKind.TOKEN, -1, 2, 7, " cat", activation=float("nan"))
    again = Node(NodeKind.TOKEN, -1, 2, 7, " cat", activation=float("nan"))
    assert node == again
    assert hash(node) == hash(again)
    assert node != replace(node, pos=3)
    assert replace(node, activation=1.0) in {node}


def test_scores_are_their_formulas():
    graph = layered_graph()
    influence, share, w = np.nan_to_num(graph.influence), dense_shares(graph), graph.start
    tokens, errors = (influence[graph.mask(kind)].sum() for kind in (NodeKind.TOKEN, NodeKind.ERROR))
    assert graph.scores.replacement == pytest.approx(tokens / (tokens + errors))
    output = influence + w
    explained = 1 - share[:, graph.mask(NodeKind.ERROR)].sum(axis=1)
    assert graph.scores.completeness == pytest.approx((output * explained).sum() / output.sum())


def test_residual_is_zero_and_sees_a_wrong_edge():
    graph = layered_graph()
    assert abs(graph.residual()).max() < 1e-12
    wrong = graph.weights.copy()
    wrong.data[0] += 0.5
    assert abs(graph.keep(np.ones(len(graph.nodes), bool), wrong).residual()).max() == pytest.approx(0.5)


def _prune_dense(graph: AttributionGraph, nodes: float, edges: float) -> tuple[set, set]:
    """The rule of mathematics.md, word by word, on dense arrays and with Python loops."""
    bias, fixed = graph.mask(NodeKind.BIAS), graph.mask(NodeKind.TOKEN, NodeKind.LOGIT)
    influence = np.nan_to_num(graph.influence)

    def keep_until(values: np.ndarray, share: float) -> float:
        held = 0.0
        for value in sorted(values.ravel(), reverse=True):
            held += value
            if held >= share * values.sum() * (1 - 1e-12):
                return value
        return 0.0

    kept = (influence >= keep_until(influence[~bias], nodes)) | fixed | bias
    weights = np.where(kept[:, None] & kept[None, :], abs(graph.weights.toarray()), 0)
    total = weights[:, ~bias].sum(axis=1, keepdims=True)
    share = weights / np.where(total > 0, total, 1)
    main = share * ~bias
    reach = graph.start @ np.linalg.inv(np.eye(len(kept)) - main)
    score = share * reach[:, None]
    stays = (score >= keep_until(score[:, ~bias], edges)) & (score > 0)
    while True:
        before = kept.copy()
        for i, node in enumerate(graph.nodes):
            has_output, has_input = stays[:, i].any(), stays[i, ~bias].any()
            dangling = (not has_output and not fixed[i]) or (node.kind is NodeKind.FEATURE and not has_input)
            if kept[i] and dangling:
                kept[i], stays[i], stays[:, i] = False, False, False
        if (before == kept).all():
            break
    ids = [node.id for node in graph.nodes]
    return {ids[i] for i in np.flatnonzero(kept)}, {(ids[s], ids[t]) for t, s in zip(*np.nonzero(stays), strict=True)}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("nodes", "edges"), [(0.8, 0.98), (0.5, 0.7), (1.0, 1.0)])
def test_pruning_is_the_dense_rule(seed, nodes, edges):
    graph = layered_graph(seed)
    pruned = prune(graph, nodes=nodes, edges=edges)
    expected_nodes, expected_edges = _prune_dense(graph, nodes, edges)
    frame = pruned.edges_frame()
    assert set(pruned.position) == expected_nodes
    assert set(zip(frame["source"], frame["target"], strict=True)) == expected_edges


def test_shares_are_of_the_full_graph():
    graph = layered_graph()
    np.testing.assert_allclose(graph.shares.toarray()[:, ~graph.mask(NodeKind.BIAS)].sum(axis=1).max(), 1)
    full = graph.edges_frame().set_index(["source", "target"])["share"]
    pruned = graph.prune(nodes=0.5, edges=0.7).edges_frame().set_index(["source", "target"])["share"]
    np.testing.assert_allclose(pruned, full[pruned.index])


def test_pruning_keeps_tokens_logits_and_what_is_stored():
    graph = layered_graph()
    pruned = graph.prune(nodes=0.3, edges=0.5)
    assert pruned.mask(NodeKind.TOKEN).sum() == N_POS
    assert pruned.mask(NodeKind.LOGIT).sum() == 2
    row = pruned.position["tok@1"]
    assert pruned.influence[row] == graph.influence[graph.position["tok@1"]]


@pytest.mark.parametrize("bad", [0.0, -0.1, 1.5])
def test_pruning_refuses_what_is_no_share(bad):
    with pytest.raises(InputError, match="is not a share"):
        prune(layered_graph(), nodes=bad)


def test_cumulative_follows_influence():
    graph = layered_graph()
    free = graph.mask(NodeKind.FEATURE, NodeKind.ERROR)
    order = np.argsort(-graph.influence[free])
    assert (np.diff(graph.cumulative[free][order]) >= -1e-12).all()
    assert graph.cumulative[graph.mask(NodeKind.TOKEN)].max() == 0


def test_merging_keeps_rows_whole():
    graph = layered_graph()
    merged = merge_features(graph, 5)
    assert merged.mask(NodeKind.FEATURE).sum() == 5
    assert abs(merged.residual()).max() < 1e-12
    strongest = sorted(graph.influence[graph.mask(NodeKind.FEATURE)])[-5:]
    kept = [graph.influence[graph.position[n.id]] for n in merged.nodes if n.kind is NodeKind.FEATURE]
    assert sorted(kept) == pytest.approx(strongest)


def test_networkx_carries_everything_known():
    graph = layered_graph()
    frame = graph.edges_frame()
    edge = frame.iloc[0]
    found = {"graph_predicted": 0.4, "graph_measured": 0.5, "graph_verdict": "confirmed", "direct_verdict": "norms"}
    found |= {"graph_q": np.nan, "direct_head": None}
    notes = pd.DataFrame([{"source": edge.source, "target": edge.target, **found}])
    g = graph.annotate(notes).to_networkx()
    assert g.number_of_nodes() == len(graph.nodes)
    assert g.number_of_edges() == graph.weights.nnz
    assert g.edges[edge.source, edge.target] == {
        "weight": edge.weight, "share": edge.share, "graph_predicted": 0.4, "graph_measured": 0.5,
        "graph_verdict": "confirmed", "direct_verdict": "norms", "inclusion": graph.inclusion.edges[0],
    }  # fmt: skip
    assert g.nodes["tok@1"]["text"] == "w1"
    assert "graph_verdict" not in g.edges[frame.iloc[1].source, frame.iloc[1].target]


def test_saving_loses_nothing(tmp_path):
    graph = layered_graph()
    edge = graph.edges_frame().iloc[0]
    found = {"graph_measured": 1 / 3, "graph_verdict": "null", "graph_reason": "", "hops": 2, "of_mine": "kept"}
    notes = pd.DataFrame([{"source": edge.source, "target": edge.target, **found}])
    graph = graph.annotate(notes)
    again = load_graph(graph.save(tmp_path / "graph"))
    pd.testing.assert_frame_equal(again.nodes_frame(), graph.nodes_frame())
    pd.testing.assert_frame_equal(again.edges_frame(), graph.edges_frame())
    assert again.scores == graph.scores
    assert again.provenance == graph.provenance
    assert again.tokens == graph.tokens


def test_files_that_are_no_graphs_get_one_sentence(tmp_path):
    with pytest.raises(FileFormatError, match="There is no graph at"):
        load_graph(tmp_path / "nowhere")
    folder = layered_graph().save(tmp_path / "graph")
    whole = (folder / "graph.json").read_text()
    for content, message in [
        ("{", "is not JSON"),
        ("[]", "the document is a list"),
        ("{}", "has format missing"),
        (whole.replace('"n_edges": ', '"n_edges": 9'), "does not hold a whole graph"),
        (whole.replace('"kind": "token"', '"kind": "spoon"'), "does not hold a whole graph"),
    ]:
        (folder / "graph.json").write_text(content)
        with pytest.raises(FileFormatError, match=message):
            load_graph(folder)
    (folder / "graph.json").write_text(whole)
    (folder / "edges.npz").write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(FileFormatError, match="does not hold a whole graph"):
        load_graph(folder)


def test_ids_are_stable():
    assert [
        Node(NodeKind.FEATURE, 2, 5, 713).id,
        Node(NodeKind.ERROR, 2, 5).id,
        Node(NodeKind.TOKEN, -1, 5, 17).id,
        Node(NodeKind.BIAS, -1, 5, text="pos").id,
        Node(NodeKind.BIAS, 2, -1, text="b_dec").id,
        Node(NodeKind.BIAS, 2, 0, text="mlp").id,
        Node(NodeKind.LOGIT, 4, 12, 17).id,
    ] == ["2.713@5", "2.err@5", "tok@5", "pos@5", "2.b_dec", "2.mlp@0", "logit.17@12"]
