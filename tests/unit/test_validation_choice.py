"""Which edges are tested: the vectorised choice against a loop over strata with exact sums."""

from collections import defaultdict
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from circuitsae.graph import AttributionGraph, Node, NodeKind
from circuitsae.validation import choice
from circuitsae.validation.choice import parse_edges
from tests.sample_graphs import small_graph, whole_graph
from transcoders.errors import InputError

choose_edges: Any = choice.choose_edges  # pandas' declared types are wider than what the rows hold

REMOVABLE = (NodeKind.FEATURE, NodeKind.TOKEN, NodeKind.ERROR)


def random_graph(seed: int, *, n: int = 40, density: float = 0.3, dtype: type = np.float64) -> AttributionGraph:
    """Nodes of every kind in random order, some of which lead nowhere, with weights of very different sizes."""
    rng, n_layers = np.random.default_rng(seed), 5
    nodes = [
        Node(NodeKind.FEATURE, int(layer), 1, i, "", 1.0) for i, layer in enumerate(rng.integers(n_layers, size=n))
    ]
    nodes += [Node(NodeKind.ERROR, layer, 1) for layer in range(n_layers)]
    nodes += [Node(NodeKind.TOKEN, -1, pos, pos, f"w{pos}") for pos in range(2)]
    nodes += [Node(NodeKind.BIAS, layer, -1, text="b_dec") for layer in range(n_layers)]
    nodes += [Node(NodeKind.LOGIT, n_layers, 1, i, f"t{i}", probability=p) for i, p in enumerate((0.6, 0.3))]
    nodes = [nodes[i] for i in rng.permutation(len(nodes))]
    weights = rng.normal(size=(len(nodes),) * 2) * 10 ** rng.uniform(-3, 0, (len(nodes),) * 2)
    weights *= rng.random(weights.shape) < density
    weights *= [[t.is_target and s.layer < t.layer for s in nodes] for t in nodes]
    return AttributionGraph.build(
        nodes, sparse.csr_array(weights.astype(dtype)), ("w0", "w1"), (0, 1), n_layers, {"prompt": "w0 w1"}
    )


def edge_influence(graph: AttributionGraph) -> np.ndarray:
    """The oracle: (I+w) handed down node by node from the top, on a dense matrix; [target, source]."""
    share = abs(graph.weights.toarray().astype(float))
    counted = share * ~graph.mask(NodeKind.BIAS)
    share = np.divide(share, counted.sum(1, keepdims=True), out=share, where=counted.sum(1, keepdims=True) > 0)
    reach = graph.start.copy()
    for t in np.argsort(-graph.layers, kind="stable"):
        reach += reach[t] * share[t] * ~graph.mask(NodeKind.BIAS)
    return share * reach[:, None]


def _equal(value: float) -> float:
    """Without the last digits, in which equal numbers may differ."""
    return float(f"{value:.11e}")


def in_order(graph: AttributionGraph, influence: np.ndarray) -> list[tuple[int, int]]:
    """The oracle: at each step the stratum that holds the least gives its next edge; (s, t), sums not rounded."""
    strata: dict[Any, list[Any]] = defaultdict(list)
    for t, s in zip(*graph.weights.toarray().nonzero(), strict=True):
        source, target = graph.nodes[s], graph.nodes[t]
        if source.kind in REMOVABLE:
            strata[source.kind, target.kind, target.layer - source.layer].append(
                (-_equal(influence[t, s].item()), t, s)
            )
    waiting = {name: sorted(edges) for name, edges in strata.items()}
    total = {name: sum(-Fraction(edge[0]) for edge in edges) for name, edges in waiting.items()}
    held, order = dict.fromkeys(waiting, Fraction(0)), []

    def urgency(name) -> tuple:
        first = waiting[name][0]
        return (_equal(float(held[name] / total[name])) if first[0] else 2, *first)

    while waiting:
        name = min(waiting, key=urgency)
        value, t, s = waiting[name].pop(0)
        held[name] -= Fraction(value)
        order.append((s, t))
        if not waiting[name]:
            del waiting[name]
    return order


TOKENS = ["a", "b", "c", "d", "e", "f"]
GRAPHS = {
    "small": small_graph(),
    "whole": whole_graph(TOKENS),
    "without biases": whole_graph(TOKENS, bias=False),
    "pruned": whole_graph(TOKENS).prune(nodes=0.7, edges=0.9),
    **{f"random {seed}": random_graph(seed) for seed in range(5)},
    "sparse": random_graph(5, n=60, density=0.05),
    "dense": random_graph(6, density=1.0),
    "float32": random_graph(7, dtype=np.float32),
    "random pruned": random_graph(8).prune(),
}


@pytest.fixture(params=GRAPHS)
def graph(request) -> AttributionGraph:
    return GRAPHS[request.param]


def pairs(rows: pd.DataFrame) -> list[tuple[int, int]]:
    return list(zip(rows["s"], rows["t"], strict=True))


def test_the_order_is_that_of_the_loop(graph):
    influence = edge_influence(graph)
    every = choose_edges(graph, None)
    rows = every.rows
    assert pairs(rows) == in_order(graph, influence)
    s, t = rows["s"], rows["t"]
    np.testing.assert_array_equal(rows["weight"], graph.weights.toarray()[t, s])
    testable = influence[:, graph.mask(*REMOVABLE)].sum()
    np.testing.assert_allclose(rows["influence"], influence[t, s] / testable, rtol=1e-9)
    nodes = [(graph.nodes[i], graph.nodes[j]) for i, j in pairs(rows)]
    assert rows["kind"].tolist() == [f"{source.kind}→{target.kind}" for source, target in nodes]
    assert rows["hops"].tolist() == [target.layer - source.layer for source, target in nodes]
    assert every.share == 1
    assert set(every.shares) == set(rows["kind"])


def test_a_count_takes_the_first_and_a_share_as_many_as_hold_it(graph):
    every = choose_edges(graph, None).rows
    for count in (1, 3, 7, len(every), len(every) + 1):
        some = choose_edges(graph, count)
        pd.testing.assert_frame_equal(some.rows, every[:count])
        assert some.share == pytest.approx(every["influence"][:count].sum())
    for share in (1e-9, 0.2, 0.8, np.float64(0.5), 0.999):
        chosen = choose_edges(graph, share)
        pd.testing.assert_frame_equal(chosen.rows, every[: len(chosen.rows)])
        assert chosen.share >= share > every["influence"][: len(chosen.rows) - 1].sum()
    assert len(choose_edges(graph, 1).rows) == 1
    assert choose_edges(graph, 1.0).share == 1


def test_strata_are_covered_alike_at_any_time(graph):
    rows = choose_edges(graph, None).rows
    stratum = rows.groupby(["kind", "hops"]).ngroup().to_numpy()
    total = np.bincount(stratum, rows["influence"])
    carrying = np.flatnonzero(total)
    assert set(stratum[: len(carrying)]) == set(carrying)  # one of each, before any gives a second
    before, held = np.zeros_like(total), np.zeros_like(total)
    for of, value in zip(stratum, rows["influence"], strict=True):
        if value > 0:
            before[of] = held[of]
            held[of] += value / total[of]
        assert before.max() <= held[carrying].min() + 1e-9


def test_shares_by_class_are_of_the_class(graph):
    every = choose_edges(graph, None).rows
    some = choose_edges(graph, len(every) // 2)
    for kind, of_class in every.groupby("kind"):
        held = some.rows.loc[some.rows["kind"] == kind, "influence"].sum()
        assert some.shares[kind] == pytest.approx(held / (of_class["influence"].sum() or 1))


@pytest.mark.parametrize("seed", range(3))
def test_the_order_in_which_edges_are_stored_does_not_matter(seed):
    graph = random_graph(seed, density=0.8)
    weights, rng = graph.weights.copy(), np.random.default_rng(seed)
    for start, end in zip(weights.indptr[:-1], weights.indptr[1:], strict=True):
        order = start + rng.permutation(end - start)
        weights.data[start:end], weights.indices[start:end] = weights.data[order], weights.indices[order]
    weights.has_sorted_indices = False
    stored = weights.indices.copy()
    one, other = (choose_edges(g, None) for g in (graph, replace(graph, weights=weights)))
    pd.testing.assert_frame_equal(one.rows, other.rows, check_exact=True)
    np.testing.assert_array_equal(weights.indices, stored)  # and the graph is left as it was
    assert (stored != graph.weights.indices).any()


def test_equal_edges_come_by_row_numbers_and_absent_ones_not_at_all():
    nodes = [Node(NodeKind.TOKEN, -1, pos, pos) for pos in range(4)]
    nodes += [Node(NodeKind.LOGIT, 1, 3, i, probability=0.5) for i in range(2)]
    weights = np.zeros((6, 6))
    weights[4:, :3] = 1.0
    edges = sparse.csr_array(weights)
    edges.data[1] = 0  # stored, and still no edge
    graph = AttributionGraph.build(nodes, edges, "abcd", range(4), 1, {})
    assert pairs(choose_edges(graph, None).rows) == [(0, 4), (2, 4), (0, 5), (1, 5), (2, 5)]


def test_by_hand():
    chosen = choose_edges(small_graph(), 2)
    assert pairs(chosen.rows) == [(2, 0), (0, 4)]
    assert chosen.rows["influence"].tolist() == pytest.approx([0.4, 0.4])  # ½ each of 1¼; the error's edge has ¼
    assert chosen.share == pytest.approx(0.8)
    assert chosen.shares == {"feature→logit": 1, "error→logit": 0, "token→feature": 1}


def test_classes_ids_and_shares_as_text():
    graph = small_graph()
    every = choose_edges(graph, None).rows
    for text in ("feature→logit", "feature->logit", " feature → logit ", "0.7@1→logit.5@1", "0.7@1 -> logit.5@1"):
        assert pairs(choose_edges(graph, text).rows) == [(0, 4)]
    chosen = choose_edges(graph, ["0.err@1 → logit.5@1", "token→feature", "0.err@1 -> logit.5@1"])
    assert pairs(chosen.rows) == [pair for pair in pairs(every) if pair in [(1, 4), (2, 0)]]
    assert chosen.share == pytest.approx(0.6)
    for text, value in {"80%": 0.8, "30 %": 0.3, "0.8": 0.8, "1": 1, "2": 2, "1.0": 1.0, "100%": 1.0}.items():
        pd.testing.assert_frame_equal(choose_edges(graph, text).rows, choose_edges(graph, value).rows)
    both = choose_edges(graph, ("1", "error→logit"))
    assert pairs(both.rows) == [(2, 0), (1, 4)]
    assert (choose_edges(whole_graph(TOKENS), "feature→feature").rows["kind"] == "feature→feature").all()
    assert choose_edges(whole_graph(TOKENS), "feature→feature").shares["feature→feature"] == 1


def test_error_nodes_that_hold_features_are_not_removed():
    graph = replace(small_graph(), provenance={"settings": {"max_features": 5}})
    assert pairs(choose_edges(graph, None).rows) == [(2, 0), (0, 4)]
    assert choose_edges(graph, None).share == 1
    with pytest.raises(InputError, match=r"0\.err@1 → logit\.5@1 cannot be tested, for its source cannot be removed"):
        choose_edges(graph, "0.err@1 → logit.5@1")


def test_without_influence_weights_stand_for_it():
    graph = random_graph(0)
    nodes = [replace(n, probability=0.0) if n.kind is NodeKind.LOGIT else n for n in graph.nodes]
    unseen = AttributionGraph.build(nodes, graph.weights, graph.tokens, graph.token_ids, graph.n_layers, {})
    size = abs(graph.weights.toarray())
    rows = choose_edges(unseen, None).rows
    assert pairs(rows) == in_order(unseen, size)
    np.testing.assert_allclose(rows["influence"], size[rows["t"], rows["s"]] / size[:, graph.mask(*REMOVABLE)].sum())


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        (0, "edges=0 leaves nothing to validate; give at least 1."),
        ("-3", "edges=-3 leaves nothing"),
        (0.0, "edges=0.0 is no share"),
        (1.5, "edges=1.5 is no share of the influence; give a number above 0 and at most 1"),
        ("150%", "edges=1.5 is no share"),
        (float("nan"), "edges=nan is no share"),
        ("inf", "edges=inf is no share"),
        (True, "edges=True does not say which edges to test; give a count"),
        ([], r"edges=\[\] does not say"),
        ("strongest", "edges='strongest' does not say which edges to test; give a count"),
        ("a → b → c", "edges='a → b → c' does not say"),
        ("feature→feature", "no edge of class 'feature→feature' .* it has: feature→logit, error→logit, token→feature"),
        ("features→logit", "no node 'features' .* close to it are: feature"),
        ("0.8@1 → logit.5@1", "no node '0.8@1' .* close to it are: 0.7@1"),
        ("0.7@1 → logit", "no node 'logit' .* close to it are: logit.5@1"),
        ("xyz → logit.5@1", "no node 'xyz' for an end of 'xyz → logit.5@1'; .* such as 0.7@1"),
        (
            "tok@0 → logit.5@1",
            "no edge tok@0 → logit.5@1; the most influential into logit.5@1: 0.7@1 → logit.5@1, 0.err",
        ),
        ("0.7@1 → tok@0", "no edge 0.7@1 → tok@0, nor any other into tok@0"),
        (
            "1.unembed.b → logit.5@1",
            "cannot be tested, for its source cannot be removed; give one from a feature or tok",
        ),
        (["2", "feature → x"], "no node 'feature'"),
    ],
)
def test_what_cannot_be_chosen_gets_a_sentence(edges, message):
    with pytest.raises(InputError, match=message) as error:
        choose_edges(small_graph(), edges)
    assert str(error.value).endswith(".")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("edges", [[5], ["5", None], b"5", {"5"}, object()])
def test_what_is_of_no_kind_gets_the_same_sentence(edges):
    every = choice._in_order(choice._testable(small_graph()))
    with pytest.raises(InputError, match="does not say which edges to test; give a count"):
        choice._chosen(small_graph(), every, edges)  # behind the types, which only tests check
    for number in (np.int64(2), np.float32(0.5)):
        assert choice._chosen(small_graph(), every, number).sum() == 2


def test_of_a_graph_without_an_edge_to_test_none_is_chosen():
    graph = small_graph()
    only_bias = graph.weights.toarray() * graph.mask(NodeKind.BIAS)
    for weights in (only_bias, only_bias * 0):
        bare = replace(graph, weights=sparse.csr_array(weights))
        for edges in (5, 0.8, None):
            found = choose_edges(bare, edges)
            assert found.rows.empty
            assert np.isnan(found.share)
        with pytest.raises(InputError, match="no edge of class 'token→logit' that can be tested"):
            choose_edges(bare, "token→logit")


def test_the_command_line_gives_numbers_and_names():
    for text, value in {"100": 100, "80%": 0.8, " 12.5 %": 0.125, "0.8": 0.8, "1": 1, "1.0": 1.0}.items():
        found = parse_edges([text])
        assert (found, type(found)) == (value, type(value))
    for texts in (["feature->logit"], ["0.153@8 → 1.2@9", "80%"], ["5", "6"]):
        assert parse_edges(texts) == texts
    for texts, message in {
        (): "--edges was given nothing",
        ("many",): "'many' does not say",
        ("5", "0"): "edges=0",
    }.items():
        with pytest.raises(InputError, match=message):
            parse_edges(texts)
