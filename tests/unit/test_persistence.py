"""Persistence against brute force, and where it is known: identical, permuted, split and random dictionaries."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from circuitsae.attribution import Contrast, FeatureTarget, LogitTargets, attribute
from circuitsae.features import persist
from circuitsae.graph import (
    AttributionGraph,
    NodeKind,
    Other,
    Supernode,
    by_parent,
    load_graph,
    persistence_frame,
    persistence_in,
    persistence_of_units,
)
from circuitsae.replacement import ReplacementModel
from circuitsae.serving.edits import add_groups, opened_in, save_opened
from transcoders.dictionaries import JumpReLU, Transcoder, TranscoderSet, random_dictionaries
from transcoders.errors import CircuitsaeError, DictionaryError, FileFormatError, InputError
from transcoders.evaluation import coactivations, counterparts, narrow_parents, superset
from transcoders.random_models import random_model

TOKENS = torch.tensor([3, 9, 14, 27, 5, 40])


@pytest.fixture(scope="module")
def model():
    return random_model("gpt2")


@pytest.fixture(scope="module")
def rows():
    return torch.randint(0, 64, (8, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def own():
    return random_dictionaries("plt", features=48, activation="jumprelu")


def graph_by(model, dictionaries) -> AttributionGraph:
    return attribute(ReplacementModel(model, dictionaries), TOKENS, targets=LogitTargets([7, 11]))


@pytest.fixture(scope="module")
def graph(model, own):
    return graph_by(model, own)


def changed(dictionaries: TranscoderSet, order=None, halve=()) -> TranscoderSet:
    """The same features in another order, some of them as two that write half each, at the end."""

    def layer(d) -> Transcoder:
        index = torch.arange(d.n_features) if order is None else order
        index = torch.cat([index, torch.tensor(list(halve), dtype=torch.long)])
        half = torch.where(torch.isin(index, torch.tensor(list(halve))), 0.5, 1.0)
        return made(d, d.W_enc[:, index], d.b_enc[index], d.W_dec[index] * half[:, None], d.activation.threshold[index])

    return TranscoderSet([layer(d) for d in dictionaries.layers], dictionaries.provenance).requires_grad_(False)


def made(like, W_enc, b_enc, W_dec, threshold) -> Transcoder:
    weights = {"W_enc": W_enc.detach(), "b_enc": b_enc.detach(), "W_dec": W_dec.detach(), "b_dec": like.b_dec.detach()}
    return Transcoder(**weights, activation=JumpReLU(threshold.detach()), read=like.read, write=like.writes[0])


def other_by(model, own, others, rows, name="other") -> Other:
    groups = counterparts(own, others, coactivations(model, own, others, rows))
    return Other(name, graph_by(model, others), groups)


@pytest.mark.parametrize("how", ["same", "permuted", "split"])
def test_what_is_the_same_but_for_its_order_or_two_halves_is_found_everywhere(model, own, graph, rows, how):
    order = torch.randperm(48, generator=torch.Generator().manual_seed(2)) if how == "permuted" else None
    halves = []
    if how == "split":
        fires = {node.index for node in graph.nodes if node.kind is NodeKind.FEATURE and node.layer == 0}
        halves = sorted(fires)[:2]
    other = other_by(model, own, changed(own, order, halves), rows)
    found = persistence_in(graph, [other])
    assert found.nodes.min() == found.edges.min() == 1.0
    assert found.nodes_chance.mean() < 1
    assert found.edges_chance.mean() < 1
    if how == "split":
        members = other.groups[(other.groups["layer"] == 0) & other.groups["index"].isin(halves)]
        assert members["by"].tolist() == ["sum"] * 4
        assert members["explained"].tolist() == pytest.approx([1.0] * 4, abs=1e-6)
    text_free = counterparts(own, changed(own, order))
    mine = np.arange(48) if order is None else order.numpy()
    assert mine[text_free["other"]].tolist() == text_free["index"].tolist()


def test_the_scores_are_those_of_two_loops(model, own, graph, rows):
    """Two others, one of them permuted and scaled, so that some but not all is found."""
    pruned = graph.prune(nodes=0.7, edges=0.9)
    others = [
        other_by(model, own, random_dictionaries("plt", features=48, activation="jumprelu", seed=seed), rows, str(seed))
        for seed in (5, 6)
    ]
    rng = np.random.default_rng(0)  # groups of several, of which some are active
    for at, one in enumerate(others):
        pairs = [(layer, i, int(j)) for layer in (0, 1) for i in range(48) for j in rng.choice(48, 4, replace=False)]
        others[at] = one._replace(groups=pd.DataFrame(pairs, columns=["layer", "index", "other"]))
    found = persistence_in(pruned, others, shuffles=0)
    nodes, edges = np.zeros(len(pruned.nodes)), np.zeros(pruned.weights.nnz)
    for other in others:
        for i in range(len(nodes)):
            nodes[i] += again(pruned, [i], other)
        coo = pruned.weights.tocoo()
        for e, (t, s) in enumerate(zip(coo.row, coo.col, strict=True)):
            edges[e] += edge_again(pruned, t, s, other)
    assert found.nodes.tolist() == (nodes / 2).tolist()
    assert found.edges.tolist() == (edges / 2).tolist()
    assert 0 < found.edges.mean() < 1


def stands_for(graph, row, other):
    """Rows of the other graph that stand for a node."""
    node = graph.nodes[row]
    if node.kind is not NodeKind.FEATURE:
        return [j for j, there in enumerate(other.graph.nodes) if there.id == node.id]
    table = other.groups
    group = set(table.loc[(table["layer"] == node.layer) & (table["index"] == node.index), "other"])
    return [
        j for j, n in enumerate(other.graph.nodes)
        if n.kind is NodeKind.FEATURE and (n.layer, n.pos) == (node.layer, node.pos) and n.index in group
    ]  # fmt: skip


def within_factor_two(x: float, y: float) -> bool:
    return x * y > 0 and 0.5 - 1e-9 <= abs(x) / abs(y) <= 2 + 1e-9


def again(graph, rows, other) -> bool:
    there = [j for row in rows for j in stands_for(graph, row, other)]
    if graph.nodes[rows[0]].kind is not NodeKind.FEATURE:
        return bool(there)
    here, elsewhere = graph.influence[rows].sum(), other.graph.influence[there].sum()
    return bool(there) and (within_factor_two(here, elsewhere) or here == elsewhere == 0)


def edge_again(graph, t, s, other) -> bool:
    own = graph.weights[t, s] / graph.inputs[t]
    targets, sources = stands_for(graph, t, other), stands_for(graph, s, other)
    g = other.graph
    importance = np.nan_to_num(g.influence) + g.start
    top = sum(importance[j] * sum(g.weights[j, i] for i in sources) / g.inputs[j] for j in targets if g.inputs[j])
    bottom = sum(importance[j] for j in targets)
    return bool(targets) and bottom > 0 and within_factor_two(own, top / bottom)


def test_a_random_dictionary_is_found_as_often_as_chance_has_it(model, own, graph, rows):
    """Partners that are drawn at random, since of random decoders none is alike."""
    rng = np.random.default_rng(1)
    drawn = []
    for seed in range(20, 24):
        other = random_dictionaries("plt", features=48, activation="jumprelu", seed=seed)
        pairs = [(layer, i, int(j)) for layer in (0, 1) for i, j in enumerate(rng.permutation(48))]
        drawn.append(Other(str(seed), graph_by(model, other), pd.DataFrame(pairs, columns=["layer", "index", "other"])))
        assert counterparts(own, other, coactivations(model, own, other, rows)).empty
    found = persistence_in(graph, drawn)
    feature = graph.mask(NodeKind.FEATURE)
    assert 0 < found.nodes[feature].mean() == pytest.approx(found.nodes_chance[feature].mean(), abs=0.05)


def test_units_are_the_features_where_each_is_alone_and_their_sums_where_not(model, own, graph, rows):
    other = other_by(model, own, changed(own), rows)
    alone, found = persistence_of_units(graph, (), [other]), persistence_in(graph, [other])
    assert alone.nodes["persistence"].tolist() == found.nodes.tolist()
    assert alone.edges["persistence"].tolist() == found.edges.tolist()
    assert alone.edges["chance"].tolist() == found.edges_chance.tolist()
    features = [node.id for node in graph.nodes if node.kind is NodeKind.FEATURE and node.pos == 5 and node.layer == 0]
    units = persistence_of_units(graph, [Supernode("both", tuple(features[:2]))], [other])
    grouped = graph.group([Supernode("both", tuple(features[:2]))])
    assert units.nodes["influence"].tolist()[0] == pytest.approx(grouped.nodes["both"]["influence"])
    into = units.edges[units.edges["target"] == "both"].set_index("source")["share"]
    summed = sum(  # shares of inputs with their signs
        graph.influence[t] * graph.weights[t, graph.position["tok@5"]] / graph.inputs[t]
        for t in (graph.position[name] for name in features[:2])
    )
    assert into.to_dict()["tok@5"] == pytest.approx(summed / units.nodes["influence"].tolist()[0])
    assert min([*units.nodes["persistence"], *units.edges["persistence"]]) == 1.0


def test_what_was_found_goes_along_with_prunings_and_files_and_networkx(model, own, graph, rows, tmp_path):
    other = other_by(model, own, random_dictionaries("plt", features=48, activation="jumprelu", seed=5), rows)
    found = persistence_in(graph, [other, other_by(model, own, own, rows, "itself")])
    marked = replace(graph, persistence=found)
    pruned = marked.prune(nodes=0.7, edges=0.9)
    again = persistence_in(graph.prune(nodes=0.7, edges=0.9), [other, other_by(model, own, own, rows)])
    assert pruned.persistence is not None
    assert pruned.persistence.edges.tolist() == again.edges.tolist()
    assert pruned.persistence.nodes.tolist() == again.nodes.tolist()
    loaded = load_graph(pruned.save(tmp_path / "graph")).persistence
    assert loaded is not None
    assert loaded.dictionaries == ("other", "itself")
    for name in ("nodes", "edges", "nodes_chance", "edges_chance"):
        assert getattr(loaded, name).tolist() == getattr(pruned.persistence, name).tolist()
    document = json.loads((tmp_path / "graph/graph.json").read_text("utf-8"))
    document["persistence"]["nodes"][0] = 2
    (tmp_path / "graph/graph.json").write_text(json.dumps(document), "utf-8")
    with pytest.raises(FileFormatError, match="persistence of a node"):
        load_graph(tmp_path / "graph")
    made = pruned.to_networkx()
    assert [d["persistence"] for _, d in made.nodes(data=True)] == again.nodes.tolist()
    frame = pruned.edges_frame()
    for s, t, value in zip(frame["source"], frame["target"], again.edges, strict=True):
        assert made.edges[s, t]["persistence"] == value
    assert "persistence" not in next(iter(graph.to_networkx().nodes.values()))
    table = persistence_frame(pruned, pruned.persistence)
    feature = pruned.mask(NodeKind.FEATURE)
    assert table["count"][0] == feature.sum()
    assert table["persistence"][0] == again.nodes[feature].mean()


def test_a_superset_has_the_narrow_features_and_the_novel_ones(model, own):
    """The wide one holds half of the narrow features, scaled, and others that are new."""
    new = random_dictionaries("plt", features=48, activation="jumprelu", seed=9)

    def layer(a, b) -> Transcoder:
        W_enc, b_enc = torch.cat([a.W_enc[:, :24], b.W_enc], dim=1), torch.cat([a.b_enc[:24], b.b_enc])
        threshold = torch.cat([a.activation.threshold[:24], b.activation.threshold])
        return made(b, W_enc, b_enc, torch.cat([2 * a.W_dec[:24], b.W_dec]), threshold)

    wide = TranscoderSet([layer(*pair) for pair in zip(own.layers, new.layers, strict=True)], own.provenance)
    both = superset(own, wide)
    assert [both.n_features(layer) for layer in (0, 1)] == [96, 96]
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    for narrow, novel, stitched in zip(own.layers, new.layers, both.layers, strict=True):
        expected = narrow(x) + novel.encode(x) @ novel.W_dec
        assert stitched(x) == pytest.approx(expected.detach(), abs=1e-5)
    parents = narrow_parents(wide, own)
    assert parents["index"].tolist() == parents["parent"].tolist() == [*range(24), *range(24)]
    graph = graph_by(model, both)
    table = pd.DataFrame({"layer": 0, "index": range(96), "parent": [0] * 96})
    groups = by_parent(graph.nodes_frame(), table)
    assert sum(len(group.members) for group in groups) > 2
    assert len({name.rpartition("@")[2] for group in groups for name in group.members}) == len(groups)
    with pytest.raises(DictionaryError, match="compete"):
        superset(random_dictionaries("plt", activation="topk"), random_dictionaries("plt", activation="topk"))


def test_what_cannot_be_compared_is_refused(model, own, graph, rows):
    other = Other("short", graph_by(model, own), pd.DataFrame({"layer": [0]}))
    for wrong, words in (
        ([], "at least one"),
        ([other], "lack index, other"),
        ([other._replace(graph=replace(graph, token_ids=(1, 2)))], "other tokens"),
    ):
        with pytest.raises(InputError, match=words):
            persistence_in(graph, wrong)
    with pytest.raises(CircuitsaeError, match="of one kind"):
        counterparts(own, random_dictionaries("sae"))
    with pytest.raises(InputError, match="says nothing"):
        counterparts(own, own, by=["activation"])


def test_other_dictionaries_are_asked_the_same_of_the_same_prompt(model, own, rows):
    """A contrast, traced again by a permuted copy and by itself, with and without a text."""
    traced = ReplacementModel(model, own)
    graph = attribute(traced, TOKENS, targets=Contrast(7, [11, 13])).prune(nodes=0.7, edges=0.9)
    others = {"permuted": changed(own, torch.arange(47, -1, -1)), "itself": own}
    for text in (rows[:4], None):
        found = persist(graph, traced, others, text).persistence
        assert found is not None
        assert found.dictionaries == ("permuted", "itself")
        assert found.nodes.min() == found.edges.min() == 1.0
    of_feature = attribute(traced, TOKENS, targets=FeatureTarget(1, own_feature(graph), 5))
    with pytest.raises(InputError, match="which other dictionaries cannot"):
        persist(of_feature, traced, others)


def own_feature(graph) -> int:
    return next(n.index for n in graph.nodes if n.kind is NodeKind.FEATURE and (n.layer, n.pos) == (1, 5))


def test_groups_are_kept_after_those_that_a_reader_made(tmp_path):
    ids = [f"0.{feature}@1" for feature in range(140)]
    save_opened(tmp_path, {"groups": [["mine", ids[0], ids[1]]], "note": "read"}, ids)
    assert add_groups(tmp_path, [("a", ids[1:3]), ("b", ids[1:5]), ("c", ids[3:6])], ids) == 1
    found = opened_in(tmp_path, ids)
    assert found is not None
    assert found["note"] == "read"
    assert found["groups"] == {"mine": ids[:2], "b": ids[2:5]}
    pairs = [(str(number), ids[number : number + 2]) for number in range(6, 140, 2)]
    assert add_groups(tmp_path, pairs, ids) == 58, "a page has room for 60"
    with pytest.raises(InputError, match="no node of the graph"):
        add_groups(tmp_path / "other", [("d", ["0.9@9", "0.8@9"])], ids)
