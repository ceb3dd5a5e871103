"""What differs between two graphs: by hand, against each graph's own figures, and across other dictionaries."""

import copy
import itertools
from dataclasses import replace

import networkx as nx
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

from circuitsae.attribution import attribute, attribute_pruned
from circuitsae.cli import main
from circuitsae.features import match_features
from circuitsae.graph import AttributionGraph, Comparison, Node, NodeKind, compare
from circuitsae.graph.alignment import align, corresponding, longest_common
from circuitsae.loading import load_dictionaries
from circuitsae.replacement import ReplacementModel
from circuitsae.report.compare import unite
from tests.unit.test_compare import data_of
from transcoders.dictionaries import random_dictionaries
from transcoders.errors import DictionaryError, InputError
from transcoders.loading import random_model

CAPITAL, OTHER = "The capital of the state containing Dallas is", "The capital city of the state containing Dallas is"


def graph_of(tokens: str, features: dict[tuple[int, int, int], float], edges: dict[tuple[str, str], float]):
    """A whole graph of one layer and a logit: features (layer, pos, number) with their activations, and edges."""
    words = tokens.split()
    last = len(words) - 1
    nodes = [Node(NodeKind.TOKEN, -1, pos, pos, word) for pos, word in enumerate(words)]
    nodes += [
        Node(NodeKind.FEATURE, layer, pos, number, activation=value, pre_activation=value)
        for (layer, pos, number), value in features.items()
    ]
    nodes.append(Node(NodeKind.LOGIT, 2, last, 5, "x", pre_activation=1.0, probability=0.8))
    row = {node.id: i for i, node in enumerate(nodes)}
    weights = np.zeros((len(nodes), len(nodes)))
    for (source, target), weight in edges.items():
        weights[row[target], row[source]] = weight
    where = {"model": "m", "dictionary_fingerprint": "d"}
    return AttributionGraph.build(nodes, sparse.csr_array(weights), words, range(len(words)), 2, where)


@pytest.fixture(scope="module")
def pair() -> tuple[AttributionGraph, AttributionGraph]:
    a = graph_of(
        "<s> the cat sat", {(0, 2, 7): 2.0, (0, 2, 8): 1.0},
        {("tok@2", "0.7@2"): 2.0, ("0.7@2", "logit.5@3"): 3.0, ("0.8@2", "logit.5@3"): -1.0},
    )  # fmt: skip
    b = graph_of(
        "<s> the old cat sat", {(0, 3, 7): 3.0, (0, 2, 8): 1.5},
        {("tok@3", "0.7@3"): 2.5, ("0.7@3", "logit.5@4"): 1.0, ("0.8@2", "logit.5@4"): 1.0},
    )  # fmt: skip
    return a, b


def test_by_hand_with_a_word_more(pair):
    both = compare(*pair, names=("short", "long"))
    assert both.alignment == ((0, 1, 3, 4), (0, 1, 2, 3, 4), 5)
    node = both.nodes.set_index("id")
    assert set(node.index) == {*(f"tok@{place}" for place in range(5)), "0.7@3", "0.8@3", "0.8@2", "logit.5@4"}
    cat = node.loc["0.7@3"]
    assert (cat["id_a"], cat["id_b"], cat["matched"], cat["similarity"]) == ("0.7@2", "0.7@3", "same", 1.0)
    assert (cat["activation_a"], cat["activation_b"], cat["activation_difference"]) == (2.0, 3.0, 1.0)
    assert cat["influence_difference"] == pytest.approx(0.8 * (1 / 2 - 3 / 4))
    old = node.loc["0.8@2"]
    assert (old["id_a"], old["id_b"], old["matched"], old["in_a"]) == (None, "0.8@2", "", False)
    assert (old["activation_difference"], old["influence_difference"]) == pytest.approx((1.5, 0.4))
    assert np.isnan(old["similarity"])
    assert np.isnan(node.loc["tok@2", "activation_difference"])
    assert node.loc["logit.5@4", "text_a"] == "x"
    edge = both.edges.set_index(["source", "target"])
    assert len(edge) == 4
    found = edge.loc[("0.7@3", "logit.5@4")]
    assert (found["weight_a"], found["weight_b"], found["difference"]) == (3.0, 1.0, -2.0)
    assert (found["share_a"], found["share_b"], found["share"]) == (0.75, 0.5, 0.5)
    lost = edge.loc[("0.8@3", "logit.5@4")]
    assert (lost["in_a"], lost["in_b"], lost["difference"]) == (True, False, 1.0)
    assert both.strongest(1)["id"].tolist() == ["0.8@2"]
    assert both.strongest(1, by="activation")["id"].tolist() == ["0.8@2"]
    drawn = unite(both)
    assert drawn.tokens == ["<s>", "the", "— ⇄ old", "cat", "sat"]
    assert drawn.differing == [2]


def test_as_a_networkx_graph(pair):
    both = compare(*pair)
    graph = both.to_networkx()
    assert isinstance(graph, nx.DiGraph)
    assert set(graph.nodes) == set(both.nodes["id"])
    assert graph.number_of_edges() == len(both.edges)
    assert graph.nodes["0.7@3"]["influence_difference"] == pytest.approx(-0.2)
    assert "id_a" not in graph.nodes["0.8@2"]
    assert graph.edges["0.7@3", "logit.5@4"]["difference"] == -2.0
    assert "weight_b" not in graph.edges["0.8@3", "logit.5@4"]


def test_the_page_of_unequal_prompts(pair, tmp_path):
    data = data_of(compare(*pair, names=("short", "long")).to_html(tmp_path / "page.html", title="both"))
    assert data["title"] == "both"
    assert data["tokens"] == ["<s>", "the", "— ⇄ old", "cat", "sat"]
    assert data["comparison"]["tokens"][0] == ["<s>", "the", "—", "cat", "sat"]
    assert data["comparison"]["presence"].count("b") == 2


def test_positions_and_roles_say_what_corresponds(pair):
    by_hand = compare(*pair, positions={2: 2, 3: 4}).nodes.set_index("id_a")
    by_role = compare(*pair, roles=({"it": 2, "end": 3, "no": 0}, {"end": 4, "it": 2})).nodes.set_index("id_a")
    for found in (by_hand, by_role):
        assert found.loc["0.8@2", "id_b"] == "0.8@2"
        assert found.loc["0.7@2", "id_b"] is None
        assert found.loc["tok@0", "id_b"] is None
    with pytest.raises(InputError, match=r"\[4\] do not name positions of the first prompt once each; it has 4 tokens"):
        compare(*pair, positions={4: 0})
    with pytest.raises(InputError, match=r"\[1, 1\] do not name positions of the second"):
        compare(*pair, positions={0: 1, 1: 1})
    with pytest.raises(InputError, match="share no role"):
        compare(*pair, roles=({"a": 0}, {"b": 0}))
    with pytest.raises(InputError, match="not both"):
        compare(*pair, roles=({"a": 0}, {"a": 0}), positions={0: 0})


def test_words_in_another_order_keep_the_order_of_the_first():
    found = align(["the", "black", "cat"], ["le", "chat", "tout", "noir"], positions={0: 0, 1: 3, 2: 1})
    assert found == ((0, 1, 2), (0, 2, 3, 1), 4)
    assert found.tokens(1, ["le", "chat", "tout", "noir"]) == ["le", "noir", "chat", "tout"]


def test_prompts_of_equal_length_correspond_one_by_one_and_gaps_of_equal_length_do():
    assert align(["a", "b", "c"], ["b", "c", "a"]) == ((0, 1, 2), (0, 1, 2), 3)
    assert corresponding(["<s>", "I", "saw", "Ann", "run"], ["<s>", "once", "I", "met", "Ann", "fall"]) == [
        (0, 0), (1, 2), (2, 3), (3, 4), (4, 5),
    ]  # fmt: skip
    assert corresponding(["a", "x", "y", "b"], ["a", "z", "b"]) == [(0, 0), (3, 2)]
    assert corresponding([], ["a"]) == []


@pytest.mark.parametrize("seed", range(30))
def test_the_longest_common_subsequence(seed):
    rng = np.random.default_rng(seed)
    a, b = ("".join(rng.choice(list("abc"), rng.integers(0, 8))) for _ in range(2))
    parts = [{"".join(part) for n in range(len(s) + 1) for part in itertools.combinations(s, n)} for s in (a, b)]
    longest = max(map(len, parts[0] & parts[1]))
    found = longest_common(a, b)
    assert len(found) == longest
    assert all(a[i] == b[j] for i, j in found)
    assert all(x[0] < y[0] and x[1] < y[1] for x, y in itertools.pairwise(found))


def test_texts_too_long_to_compare_word_by_word():
    with pytest.raises(InputError, match="20,000 and 10,000 tokens are too long"):
        longest_common(["a"] * 20_000, ["a"] * 10_000)


@pytest.fixture(scope="module")
def replacements(pocket) -> tuple[ReplacementModel, ReplacementModel]:
    found = [ReplacementModel(pocket, load_dictionaries(name)) for name in ("pocket", "pocket-plt")]
    return found[0], found[1]


def test_differences_are_those_of_the_graphs_own_figures(replacements):
    model = replacements[0]
    a, b = (attribute_pruned(model, prompt, max_features=60)[0] for prompt in (CAPITAL, OTHER))
    both = compare(a, b)
    assert len(a.tokens) != len(b.tokens)
    for side, graph in (("a", a), ("b", b)):
        there = both.nodes[f"id_{side}"].notna()
        assert sorted(both.nodes.loc[there, f"id_{side}"]) == sorted(graph.ids)
    influence = [dict(zip(graph.ids, np.nan_to_num(graph.influence), strict=True)) for graph in (a, b)]
    places = [dict(enumerate(side)) for side in both.alignment[:2]]
    shared = 0
    for row in both.nodes.to_dict("records"):
        if row["kind"] == "bias":
            continue
        expected = influence[1].get(row["id_b"], 0.0) - influence[0].get(row["id_a"], 0.0)
        assert row["influence_difference"] == pytest.approx(expected, abs=1e-12)
        if row["matched"]:
            shared += 1
            one, other = a.nodes[a.position[row["id_a"]]], b.nodes[b.position[row["id_b"]]]
            assert places[0][one.pos] == places[1][other.pos] == row["pos"]
            assert (one.kind, one.layer) == (other.kind, other.layer)
            assert one.index == other.index or one.kind is NodeKind.TOKEN
    assert shared > 20
    ids = [dict(zip(both.nodes[f"id_{side}"], both.nodes["id"], strict=True)) for side in "ab"]
    weights = [
        {(ids[side][s], ids[side][t]): w for s, t, w in graph.edges_frame()[["source", "target", "weight"]].to_numpy()}
        for side, graph in enumerate((a, b))
    ]
    assert len(both.edges) == len(weights[0].keys() | weights[1].keys())
    for s, t, difference in both.edges[["source", "target", "difference"]].to_numpy():
        assert difference == pytest.approx(weights[1].get((s, t), 0.0) - weights[0].get((s, t), 0.0), abs=1e-6)


def permuted(dictionaries, seed: int):
    """The same dictionaries with their features in another order."""
    other, generator = copy.deepcopy(dictionaries), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in range(other.n_layers):
            order = torch.randperm(other.n_features(layer), generator=generator)
            own = other[layer] if other.kind == "plt" else other
            at = () if other.kind == "plt" else (layer,)
            own.W_enc[at].copy_(own.W_enc[at][:, order].clone())
            own.b_enc[at].copy_(own.b_enc[at][order].clone())
            decoder = own.W_dec if other.kind == "plt" else own.W_dec[layer]
            decoder.copy_(decoder[order].clone())
    return other


@pytest.mark.parametrize("kind", ["plt", "clt"])
def test_features_in_another_order_are_found_again(kind):
    model = random_model(n_layers=2, d_model=16, n_heads=4, d_vocab=64, dtype="float64")
    first = random_dictionaries(kind, n_layers=2, d_model=16, features=24, seed=1, dtype="float64")
    second, prompt = permuted(first, 3), torch.tensor([3, 7, 1, 9])
    a, b = (attribute(ReplacementModel(model, one), prompt) for one in (first, second))
    apart = compare(a, b)
    assert not apart.same_features
    assert not len(apart.nodes.query("kind == 'feature' and in_a and in_b"))
    both = compare(a, b, dictionaries=(first, second), above=0.9)
    features = both.nodes.query("kind == 'feature'")
    assert len(features) == a.mask(NodeKind.FEATURE).sum() > 50
    assert set(features["matched"]) == {"decoder"}
    np.testing.assert_allclose(features["similarity"], 1.0, atol=1e-9)
    np.testing.assert_allclose(both.nodes["activation_difference"].dropna(), 0.0, atol=1e-9)
    np.testing.assert_allclose(both.nodes["influence_difference"].dropna(), 0.0, atol=1e-9)
    assert len(both.edges.query("in_a and in_b")) == len(both.edges)
    np.testing.assert_allclose(both.edges["difference"], 0.0, atol=1e-9)


def frame_of(places: list[tuple[int, int, int]], mark: str) -> pd.DataFrame:
    rows = [(f"{mark}{layer}.{index}@{pos}", "feature", layer, pos, index) for layer, pos, index in places]
    return pd.DataFrame(rows, columns=["id", "kind", "layer", "pos", "index"])


@pytest.mark.parametrize(("by", "apart", "above"), [("sum", 1, 0.1), ("own", 0, 0.05), ("sum", 2, 0.3)])
def test_pairs_are_the_best_of_all_one_to_one_maps(by, apart, above):
    sets = [random_dictionaries(kind, n_layers=3, d_model=4, features=5, seed=7) for kind in ("clt", "plt")]
    a, b = (
        frame_of([(0, 1, 2), (1, 1, 0), (2, 1, 4), (0, 3, 1)], "A:"),
        frame_of([(0, 1, 3), (2, 1, 1), (1, 1, 2), (1, 1, 4)], "B:"),
    )
    found = match_features(a, b, (sets[0], sets[1]), above=above, layers_apart=apart, by=by)

    def written(dictionaries, layer, index):
        layers = dictionaries.write_layers(layer) if by == "sum" else [layer]
        rows = [dictionaries.decoder_rows(layer, torch.tensor([index]), at)[0].detach().double() for at in layers]
        return torch.nn.functional.normalize(torch.stack(rows).sum(0), dim=0)

    def cosine(one, other):
        value = float(written(sets[0], one[2], one[4]) @ written(sets[1], other[2], other[4]))
        return value if value >= above and abs(one[2] - other[2]) <= apart else 0.0

    rows, columns = list(a.itertuples(index=False))[:3], list(b.itertuples(index=False))
    table = np.array([[cosine(one, other) for other in columns] for one in rows])
    best = max(itertools.permutations(range(4), 3), key=lambda p: sum(table[i, j] for i, j in enumerate(p)))
    expected = {(rows[i][0], columns[j][0]): table[i, j] for i, j in enumerate(best) if table[i, j] > 0}
    pairs = {(one, other): value for one, other, value in found.itertuples(index=False)}
    assert pairs == pytest.approx(expected)
    assert len(expected) > 0


def test_cross_layer_and_per_layer_features_of_one_prompt(replacements, tmp_path, capsys, monkeypatch):
    sets = replacements[0].dictionaries, replacements[1].dictionaries
    a, b = (attribute_pruned(one, CAPITAL, max_features=80)[0] for one in replacements)
    both = compare(a, b, dictionaries=sets, above=0.6)
    pairs = both.nodes.query("matched == 'decoder'")
    assert len(pairs) > 15
    assert pairs["id_a"].is_unique
    assert pairs["id_b"].is_unique
    assert pairs["similarity"].between(0.6, 1.0).all()
    for name, other, value in pairs[["id_a", "id_b", "similarity"]].head(5).to_numpy():
        one, two = a.nodes[a.position[name]], b.nodes[b.position[other]]
        assert one.pos == two.pos
        assert abs(one.layer - two.layer) <= 1
        written = [
            torch.cat([own.decoder_rows(node.layer, torch.tensor([node.index]), at) for at in layers]).sum(0)
            for own, node in zip(sets, (one, two), strict=True)
            for layers in [own.write_layers(node.layer)]
        ]
        cosine = torch.cosine_similarity(written[0], written[1], dim=0)
        assert value == pytest.approx(float(cosine), abs=1e-5)
    shared = both.edges.query("in_a and in_b")
    assert set(pairs["id"]) & set(shared["source"])
    monkeypatch.chdir(tmp_path)
    for name, graph, source in (("clt", a, None), ("plt", b, "pocket-plt")):
        named = {"model": "pocket", "dictionaries": source}
        replace(graph, provenance={**graph.provenance, "source": named}).save(tmp_path / name)
    main(["compare", "clt", "plt", "--similar", "0.6", "--csv", "nodes.csv", "--edges-csv", "edges.csv"])
    assert "nodes whose influence changes most" in capsys.readouterr().out
    nodes, edges = pd.read_csv("nodes.csv"), pd.read_csv("edges.csv")
    assert nodes["similarity"].to_numpy() == pytest.approx(both.nodes["similarity"].to_numpy(), nan_ok=True)
    difference = both.nodes["influence_difference"].to_numpy()
    assert nodes["influence_difference"].to_numpy() == pytest.approx(difference, nan_ok=True)
    assert edges["difference"].to_numpy() == pytest.approx(both.edges["difference"].to_numpy())
    assert (tmp_path / "comparison.html").is_file()


def test_what_cannot_be_paired(replacements):
    sets = replacements[0].dictionaries, replacements[1].dictionaries
    small = random_dictionaries("plt", n_layers=2, d_model=8, features=4)
    one = frame_of([(0, 1, 9)], "")
    with pytest.raises(DictionaryError, match=r"of widths \[\d+, 8\]"):
        match_features(one, one, (sets[0], small))
    with pytest.raises(DictionaryError, match=r"have no feature 0.9, which the graph has"):
        match_features(one, one, (small, small))
    with pytest.raises(DictionaryError, match=r"have no feature 5.0"):
        match_features(frame_of([(5, 1, 0)], ""), one, (small, small))
    with pytest.raises(InputError, match=r"above=0\.0, .* pair no features"):
        match_features(one, one, sets, above=0.0)
    with pytest.raises(InputError, match="layers_apart=-1, .* pair no features"):
        match_features(one, one, sets, layers_apart=-1)


def test_settings_of_pairs_go_with_dictionaries(pair):
    with pytest.raises(InputError, match="above say how features are paired; give dictionaries"):
        compare(*pair, above=0.4)
    assert isinstance(compare(*pair), Comparison)
    assert repr(compare(*pair)) == "Comparison(A and B: 6 of 9 nodes, 4 edges)"
