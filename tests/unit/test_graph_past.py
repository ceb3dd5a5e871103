"""What passed by skip terms, wherever a graph goes: it adds up as the edges do, and travels with them."""

import json

import numpy as np
import pytest

from circuitsae.graph import AttributionGraph, NodeKind, Supernode, compare, load_graph, merge_features
from circuitsae.graph.aggregate import aggregate
from circuitsae.graph.exchange import read_graph, write_graph
from circuitsae.report import summary_html
from circuitsae.report.compare import unite
from circuitsae.report.data import page_data
from circuitsae.sentences import of_logit
from tests.sample_graphs import whole_graph
from transcoders.errors import FileFormatError

TOKENS = ["<bos>", " a", " b", " c", " d", " e"]


@pytest.fixture(scope="module")
def graph() -> AttributionGraph:
    """A third of the edges passed by skip terms in part, some of them against the rest of their weight."""
    plain = whole_graph(TOKENS)
    rng = np.random.default_rng(5)
    part = np.where(rng.random(plain.weights.nnz) < 1 / 3, rng.normal(0.4, 1.0, plain.weights.nnz), 0.0)
    past = plain.weights.copy()
    past.data *= part
    past.eliminate_zeros()
    return AttributionGraph.build(
        plain.nodes, plain.weights, plain.tokens, plain.token_ids, plain.n_layers,
        plain.provenance, past=past,
    )  # fmt: skip


def dense(graph: AttributionGraph) -> np.ndarray:
    assert graph.past is not None
    return graph.past.toarray()


def test_the_score_is_the_influence_weighted_share_of_all_weight(graph):
    past, weights = dense(graph), graph.weights.toarray()
    bias, over, under = graph.mask(NodeKind.BIAS), 0.0, 0.0
    for target in range(len(graph.nodes)):
        output = np.nan_to_num(graph.influence[target]) + graph.start[target]
        here = [s for s in range(len(graph.nodes)) if weights[target, s] != 0 and not bias[s]]
        beside = sum(abs(past[target, s]) for s in here)
        direct = sum(abs(weights[target, s] - past[target, s]) for s in here)
        over += output * (beside / (beside + direct) if here else 0.0)
        under += output
    assert graph.scores.past == pytest.approx(over / under, rel=1e-12)
    assert 0 < graph.scores.past < 1


def test_a_graph_without_skip_terms_says_nothing_of_them():
    plain = whole_graph(TOKENS)
    assert plain.past is None
    assert "past" not in plain.scores.as_dict()
    assert not {"past", "past_share"} & set(plain.edges_frame())


def test_the_table_has_the_part_and_its_share(graph):
    table = graph.edges_frame()
    assert table["past"].to_numpy() == pytest.approx(dense(graph)[graph.weights.nonzero()], rel=1e-12)
    one_sign = (table["past"] * (table["weight"] - table["past"]) > 0).to_numpy()
    ratio = (table["past"] / table["weight"]).to_numpy()
    assert table["past_share"].to_numpy()[one_sign] == pytest.approx(ratio[one_sign], rel=1e-12)
    share = table["past_share"].to_numpy()
    assert 0 <= share.min() <= share.max() <= 1


def test_pruning_keeps_the_part_of_each_edge_that_stays(graph):
    small = graph.prune(nodes=0.5, edges=0.6)
    kept = [graph.position[name] for name in small.ids]
    expected = np.where(small.weights.toarray() != 0, dense(graph)[np.ix_(kept, kept)], 0)
    assert np.array_equal(dense(small), expected)
    assert small.scores == graph.scores
    assert small.past.nnz < graph.past.nnz


def test_merged_features_add_theirs_to_the_error(graph):
    features = [node for node in graph.nodes if node.kind is NodeKind.FEATURE]
    small = merge_features(graph, np.array([node.pos < len(TOKENS) - 1 for node in features]))
    names = {node.id: f"{node.layer}.err@{node.pos}" for node in graph.nodes if node.kind is NodeKind.FEATURE}
    row = small.position
    expected = np.zeros((len(small.nodes), len(small.nodes)))
    for target, source in zip(*np.nonzero(dense(graph)), strict=True):
        ids = graph.ids[target], graph.ids[source]
        if ids[0] in row:
            expected[row[ids[0]], row[ids[1] if ids[1] in row else names[ids[1]]]] += dense(graph)[target, source]
    np.testing.assert_allclose(dense(small), expected, atol=1e-12)


def test_supernodes_add_up_their_members(graph):
    features = [node.id for node in graph.nodes if node.kind is NodeKind.FEATURE]
    lowest, highest = ([graph.position[name] for name in features if name.startswith(at)] for at in ("0.", "1."))
    groups = [Supernode(name, tuple(graph.ids[rows])) for name, rows in (("low", lowest), ("high", highest))]
    edge = graph.group(groups).edges["low", "high"]
    assert edge["past"] == pytest.approx(dense(graph)[np.ix_(highest, lowest)].sum(), rel=1e-12)
    direct = edge["weight"] - edge["past"]
    assert edge["past_share"] == pytest.approx(abs(edge["past"]) / (abs(edge["past"]) + abs(direct)), rel=1e-12)


def test_tasks_have_the_mean(graph):
    task = aggregate([graph, graph.prune(nodes=0.5, edges=0.6)], [{}, {}], min_frequency=0.0)
    both = dense(graph).sum() + dense(graph.prune(nodes=0.5, edges=0.6)).sum()
    assert task.edges["past"].to_numpy().sum() == pytest.approx(both / 2)
    assert 0 < task.edges_frame()["past_share"].to_numpy().max() <= 1
    assert "past" not in aggregate([graph, whole_graph(graph.tokens)], [{}, {}], min_frequency=0.0).edges


def test_the_sentence_says_it_of_the_logit(graph):
    past, weights = (part[graph.position[graph.top_logits()[0].id]] for part in (dense(graph), graph.weights.toarray()))
    beside, direct = (np.abs(part[~graph.mask(NodeKind.BIAS)]).sum() for part in (past, weights - past))
    assert of_logit(graph).endswith(
        f" {100 * beside / (beside + direct):.0f} % of these edges passed by skip terms, past the features between."
    )
    assert "past" not in of_logit(whole_graph(TOKENS))


def test_networkx_has_it(graph):
    nx = graph.to_networkx()
    for source, target, edge in nx.edges(data=True):
        assert edge["past"] == dense(graph)[graph.position[target], graph.position[source]]
    assert nx.graph["scores"]["past"] == graph.scores.past


def test_files_keep_it_and_older_files_load(graph, tmp_path):
    loaded = load_graph(graph.save(tmp_path / "new"))
    assert np.array_equal(dense(loaded), dense(graph))
    assert loaded.scores == graph.scores
    plain = whole_graph(graph.tokens)
    folder = plain.save(tmp_path / "old")
    assert set(np.load(folder / "edges.npz")) == {"row", "col", "weight"}
    assert "past" not in json.loads((folder / "graph.json").read_text(encoding="utf-8"))["scores"]
    assert load_graph(folder).past is None


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda past: past[:-1], "past in edges.npz has shape"),
        (lambda past: past.astype("int64"), "past in edges.npz has shape"),
        (lambda past: np.full_like(past, np.inf), "an edge has a part that is not a finite number"),
    ],
)
def test_parts_that_do_not_fit_are_refused(graph, tmp_path, make, said):
    folder = graph.save(tmp_path / "g")
    arrays = dict(np.load(folder / "edges.npz"))
    np.savez_compressed(folder / "edges.npz", **arrays | {"past": make(arrays["past"])})
    document = json.loads((folder / "graph.json").read_text(encoding="utf-8"))
    document["edges"] = None
    (folder / "graph.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(FileFormatError, match=said):
        load_graph(folder)


@pytest.mark.parametrize("form", ["neuronpedia", "graphml", "gexf"])
def test_other_formats_carry_it(graph, tmp_path, form):
    there = write_graph(graph, tmp_path / "graph", format=form)
    back = read_graph(there)
    kept = [graph.position[name] for name in back.ids]
    np.testing.assert_allclose(dense(back), dense(graph)[np.ix_(kept, kept)], rtol=1e-6, atol=1e-9)
    assert back.scores.past == pytest.approx(graph.scores.past, rel=1e-6)
    assert back.edge_notes is None


def test_a_page_has_it_and_a_comparison_the_scores_of_both(graph):
    edges = page_data(graph)["edges"]
    assert edges["past"] == pytest.approx(graph.edges_frame()["past"].tolist(), rel=1e-5)
    assert len(edges["past_share"]) == graph.weights.nnz
    plain = whole_graph(graph.tokens)
    assert "past" not in page_data(plain)["edges"]
    assert unite(compare(plain, graph)).scores["past, B"] == graph.scores.past
    assert "share past the features" in summary_html(graph)
