"""Supernodes: planted groups are found, the sums of a grouped graph against loops over its edges."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import sparse

from circuitsae.graph import AttributionGraph, Node, NodeKind, Supernode, suggest_supernodes
from circuitsae.graph.supernodes import clusters, cosines
from transcoders.errors import InputError

GROUPS = 4
SIZE = 3


def planted(seed: int = 0, noise: float = 0.06) -> tuple[AttributionGraph, list[set[str]]]:
    """Features in two positions and two layers; each planted group has inputs and outputs of its own, up to noise."""
    rng = np.random.default_rng(seed)
    tokens = [Node(NodeKind.TOKEN, -1, pos, 50 + pos, f" w{pos}") for pos in range(4)]
    late = [Node(NodeKind.FEATURE, 3, 3, i, activation=1.0, pre_activation=0.0) for i in range(6)]
    logits = [Node(NodeKind.LOGIT, 4, 3, i, f" out{i}", probability=0.4 / (i + 1)) for i in range(2)]
    biases = [Node(NodeKind.BIAS, layer, -1, text="b_dec") for layer in range(2)]
    features, group_of = [], []
    for number in range(GROUPS * SIZE):
        group = number % GROUPS
        node = Node(NodeKind.FEATURE, 1 + (number // GROUPS) % 2, 2 + group % 2, 100 + number, activation=1.0)
        features.append(node)
        group_of.append(group)
    nodes = [*features, *tokens, *late, *logits, *biases]
    at = {node.id: i for i, node in enumerate(nodes)}
    weights = np.zeros((len(nodes), len(nodes)))
    # The two groups of one position have orthogonal inputs and outputs.
    into, out = (np.linalg.qr(rng.normal(size=(n, n)))[0].repeat(2, axis=0) for n in (3, len(late)))
    for node, group in zip(features, group_of, strict=True):
        i = at[node.id]
        for s in range(3):
            weights[i, at[f"tok@{s}"]] = (into[group, s] + noise * rng.normal()) * rng.uniform(0.5, 2)
        weights[i, at["0.b_dec"]] = 5.0  # the same for all
        for t, target in enumerate(late):
            weights[at[target.id], i] = out[group, t] + noise * rng.normal()
    weights[[at[n.id] for n in late], at["tok@3"]] = 2.0
    for target in logits:
        weights[at[target.id], [at[n.id] for n in late]] = rng.normal(size=len(late))
    total = weights.sum(axis=1)
    nodes = [replace(n, pre_activation=total[i] + 0.5, bias=0.5) if n.is_target else n for i, n in enumerate(nodes)]
    graph = AttributionGraph.build(nodes, sparse.csr_array(weights), [f" w{p}" for p in range(4)], range(4), 4, {})
    groups = [{f.id for f, g in zip(features, group_of, strict=True) if g == group} for group in range(GROUPS)]
    return graph, groups


def card(layer: int, feature: int, *tokens: str, label: str | None = None) -> dict:
    words = [token for word in tokens for token in ("the", word)]
    example = {"tokens": words, "activations": [0.0, 2.0] * len(tokens), "peak": 1, "stratum": "top"}
    named = None if label is None else {"text": label, "status": "tested"}
    return {"layer": layer, "feature": feature, "examples": [example], "neighbours": [], "label": named}


@pytest.mark.parametrize("seed", range(5))
def test_planted_groups_are_found(seed: int):
    graph, groups = planted(seed)
    found = suggest_supernodes(graph)
    planted_ones = [set(one.members) for one in found if not one.members[0].startswith("3.")]
    assert sorted(map(sorted, planted_ones)) == sorted(map(sorted, groups))
    assert len({one.name for one in found}) == len(found)
    for one in found:
        assert 0.5 <= one.score <= 1
        assert f"{len(one.members)} features at " in one.reason
        assert "inputs" in one.reason
        assert len({member.split("@")[1] for member in one.members}) == 1


def test_the_same_each_time_and_whatever_the_order_of_nodes():
    graph, _ = planted()
    assert suggest_supernodes(graph) == suggest_supernodes(graph)
    order = np.random.default_rng(1).permutation(len(graph.nodes))
    shuffled = AttributionGraph.build(
        [graph.nodes[i] for i in order], sparse.csr_array(graph.weights[order][:, order]), graph.tokens, (), 4, {}
    )
    assert {frozenset(o.members) for o in suggest_supernodes(graph)} == {
        frozenset(o.members) for o in suggest_supernodes(shuffled)
    }


def test_similarity_is_the_geometric_mean_of_what_can_be_told():
    """The score of a pair by hand."""
    graph, groups = planted()
    pair = sorted(groups[0])[:2]
    rows = [graph.position[name] for name in pair]
    dense = graph.weights.toarray()
    dense[:, graph.mask(NodeKind.BIAS)] = 0
    share = dense / np.maximum(np.abs(dense).sum(1, keepdims=True), 1e-300)

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    inputs, outputs = cosine(*share[rows]), cosine(*share[:, rows].T)
    keep = np.ones(len(graph.nodes), dtype=bool)
    keep[[graph.position[n] for n in groups[0] - set(pair)]] = False
    small = AttributionGraph.build(
        [n for n, k in zip(graph.nodes, keep, strict=True) if k],
        sparse.csr_array(graph.weights[np.flatnonzero(keep)][:, np.flatnonzero(keep)]),
        graph.tokens, (), 4, {},
    )  # fmt: skip
    found = next(one for one in suggest_supernodes(small) if set(one.members) == set(pair))
    late = [small.position[f"3.{i}@3"] for i in range(6)]
    assert small.inputs[late].min() > 0
    assert f"inputs {inputs:.2f}" in found.reason
    assert abs(found.score - (inputs * outputs) ** 0.5) < 0.05  # the late features' sums lack one term
    cards = {}
    for row, word in zip(rows, ("Texas", "Ohio"), strict=True):
        layer, index = graph.nodes[row].layer, graph.nodes[row].index
        cards[f"{layer}.{index}"] = card(layer, index, "Texas", word)
    with_cards = next(one for one in suggest_supernodes(small, cards=cards) if set(one.members) == set(pair))
    assert "examples 0.50" in with_cards.reason
    assert with_cards.score == pytest.approx((found.score**2 * 0.5) ** (1 / 3))


def test_cards_split_and_name():
    graph, groups = planted()
    halves = {}
    for member in groups[0] | groups[1]:
        layer, index = map(int, member.split("@")[0].split("."))
        word = "Texas" if member in groups[0] else "river"
        halves[f"{layer}.{index}"] = card(layer, index, word, label="rivers" if word == "river" else None)
    found = suggest_supernodes(graph, cards=halves)
    name = {frozenset(one.members): one.name for one in found}
    assert name[frozenset(groups[0])] == "texas"
    assert name[frozenset(groups[1])] == "rivers"
    collection = SimpleNamespace(for_nodes=lambda nodes: {k: v for k, v in halves.items() if len(nodes)})
    assert suggest_supernodes(graph, cards=collection) == found  # pyright: ignore[reportArgumentType]


def test_examples_alone_can_keep_features_apart():
    graph, groups = planted()
    cards = {}
    for number, member in enumerate(sorted(groups[0])):
        layer, index = map(int, member.split("@")[0].split("."))
        cards[f"{layer}.{index}"] = card(layer, index, f"word{number}")
    together = next(one for one in suggest_supernodes(graph) if set(one.members) == groups[0])
    assert together.score > 0.9
    tight = suggest_supernodes(graph, cards=cards, apart=0.3)
    assert not any(set(one.members) & groups[0] for one in tight)


def test_what_fires_together_counts_as_examples():
    graph, groups = planted()
    cards = {}
    for number, member in enumerate(sorted(groups[0])):
        layer, index = map(int, member.split("@")[0].split("."))
        cards[f"{layer}.{index}"] = card(layer, index, f"word{number}")
    keys = list(cards.values())
    for one in keys:
        others = [other for other in keys if other is not one]
        one["neighbours"] = [{"layer": o["layer"], "feature": o["feature"], "score": 0.8} for o in others]
    found = next(one for one in suggest_supernodes(graph, cards=cards) if set(one.members) == groups[0])
    assert "examples 0.80" in found.reason
    # A card without anything in it says nothing, and breaks nothing.
    empty = {key: {"layer": 1, "feature": 2, "examples": None, "label": None} for key in cards}
    assert suggest_supernodes(graph, cards=empty)


def test_roles_put_positions_together():
    graph, groups = planted()
    plain = suggest_supernodes(graph, apart=1.0)
    assert all(len({m.split("@")[1] for m in one.members}) == 1 for one in plain)
    both = suggest_supernodes(graph, apart=1.0, roles={2: "name", 3: "name"})
    assert any(len({m.split("@")[1] for m in one.members}) == 2 for one in both)
    assert groups


def test_settings_that_make_no_sense():
    graph, _ = planted()
    with pytest.raises(InputError, match="apart=0.0 is no distance"):
        suggest_supernodes(graph, apart=0.0)
    with pytest.raises(InputError, match="least=1"):
        suggest_supernodes(graph, least=1)
    assert suggest_supernodes(graph, most_features=1) == []


def test_clusters_and_cosines_by_hand():
    profiles = np.array([[1.0, 0], [2, 0.1], [0, -1], [0, 0], [-1, 0]])
    dense = cosines(profiles)
    np.testing.assert_allclose(cosines(sparse.csr_array(profiles)), dense)
    assert dense[3].tolist() == [0] * 5
    assert dense[0, 4] == -1
    assert clusters(1 - dense, 0.2) == [[0, 1], [2], [3], [4]]


def test_grouped_edges_are_sums_and_nothing_is_lost():
    graph, groups = planted()
    mixed = {f"3.{i}@3" for i in range(3)} | {min(groups[2])}  # an edge runs inside of it
    chosen = [Supernode("one", tuple(sorted(groups[0]))), Supernode("two", tuple(sorted(mixed)), "because", 0.5)]
    grouped = graph.group(chosen)
    owner = {member: one.name for one in chosen for member in one.members}
    wanted: dict[tuple[str, str], float] = {}
    for edge in graph.edges_frame().to_dict("records"):
        source, target = str(edge["source"]), str(edge["target"])
        key = owner.get(source, source), owner.get(target, target)
        wanted[key] = wanted.get(key, 0.0) + edge["weight"]
    internal = {s: w for (s, t), w in wanted.items() if s == t}
    assert set(internal) == {"two"}
    assert grouped.nodes["two"]["internal"] == pytest.approx(internal["two"], abs=1e-12)
    assert set(grouped.edges) == {key for key in wanted if key[0] != key[1]}
    for s, t, values in grouped.edges(data=True):
        assert values["weight"] == pytest.approx(wanted[s, t], abs=1e-12)
    for name, values in grouped.nodes(data=True):
        if values["kind"] in ("supernode", "feature", "logit"):
            into = sum(d["weight"] for *_, d in grouped.in_edges(name, data=True))
            total = into + values["internal"] + values.get("rest", 0.0)
            assert total == pytest.approx(values["pre_activation"] - values["bias"], abs=1e-9)
    assert grouped.nodes["two"]["members"] == sorted(mixed)
    assert grouped.nodes["two"]["reason"] == "because"


def test_shares_of_a_group_are_means_over_its_members():
    graph, groups = planted()
    grouped = graph.group([Supernode("late", tuple(f"3.{i}@3" for i in range(6))), Supernode("one", tuple(groups[0]))])
    share, rows = graph.shares.toarray(), [graph.position[f"3.{i}@3"] for i in range(6)]
    importance = graph.influence[rows]
    sources = [graph.position[m] for m in groups[0]]
    wanted = (importance * share[rows][:, sources].sum(1)).sum() / importance.sum()
    assert grouped.edges["one", "late"]["share"] == pytest.approx(wanted)
    assert sum(d["share"] for *_, d in grouped.in_edges("late", data=True)) == pytest.approx(1.0)


def test_supernodes_that_cannot_be():
    graph, groups = planted()
    a, b = sorted(groups[0])[:2]
    for supernodes, said in [
        ([Supernode("x", (a,)), Supernode("x", (b,))], "is taken"),
        ([Supernode(a, (a,))], "is taken"),
        ([Supernode("x", (a,)), Supernode("y", (a,))], "a node has one supernode"),
        ([Supernode("x", ("9.9@9",))], "which is not in"),
        ([Supernode("x", ())], "no members"),
    ]:
        with pytest.raises(InputError, match=said):
            graph.group(supernodes)


def test_no_torch_is_imported():
    code = "import sys, circuitsae.graph.grouping; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
