"""Two graphs as one: the union against loops over both, what the page holds, and pairs that cannot be compared."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from circuitsae.cli import main
from circuitsae.features.ledger import Label, Ledger
from circuitsae.graph import compare
from circuitsae.report import compare_html
from circuitsae.report.compare import bounded, unite
from tests.sample_graphs import SampleCards, sample_graph, sample_pair, small_graph
from transcoders.errors import InputError

NAMES = ("clean", "corrupt")


def data_of(path: Path) -> dict:
    found = re.search(
        r'<script type="application/json" id="graph-data">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL
    )
    assert found
    return json.loads(found[1])


def test_union_holds_what_both_graphs_say():
    a, b = sample_pair()
    both = compare(a, b, names=NAMES)
    weights = []
    for graph in (a, b):
        ends = zip(graph.edges["source"], graph.edges["target"], strict=True)
        weights.append(dict(zip(ends, graph.edges["weight"], strict=True)))
    assert set(zip(both.edges["source"], both.edges["target"], strict=True)) == set(weights[0]) | set(weights[1])
    for row in both.edges.to_dict("records"):
        key = row["source"], row["target"]
        assert row["difference"] == pytest.approx(weights[1].get(key, 0.0) - weights[0].get(key, 0.0), abs=1e-12)
        assert row["in_a"] == (key in weights[0])
        assert np.isnan(row["weight_b"]) == (key not in weights[1])
    assert set(both.nodes["id"]) == set(a.nodes["id"]) | set(b.nodes["id"])
    assert both.nodes["id"].is_unique
    node = both.nodes.set_index("id")
    for graph, side in ((a, "a"), (b, "b")):
        own = graph.nodes.set_index("id")
        for column in ("activation", "influence", "probability"):
            found = node[f"{column}_{side}"].reindex(own.index).to_numpy(float)
            np.testing.assert_array_equal(found, own[column].to_numpy(float))
        assert np.count_nonzero(node[f"in_{side}"]) == len(own)
    drawn = unite(both)
    assert drawn.differing == [2]
    assert drawn.tokens[2] == "·cat ⇄ ·dog"
    assert drawn.nodes.set_index("id")["text"].to_dict()["tok@2"] == "·cat ⇄ ·dog"


def test_share_of_a_difference_is_of_the_larger_input():
    a, b = sample_pair()
    edges = compare(a, b, names=NAMES).edges
    inputs: dict[str, float] = {}
    for row in (*a.edges.to_dict("records"), *b.edges.to_dict("records")):
        inputs[row["target"]] = max(inputs.get(row["target"], 0.0), abs(row["weight"]) / row["share"])
    for row in edges.to_dict("records"):
        assert row["share"] == pytest.approx(abs(row["difference"]) / inputs[row["target"]])


def test_page_data(tmp_path: Path):
    a, b = sample_pair()
    data = data_of(compare_html(a, b, tmp_path / "page.html", NAMES))
    comparison, ids = data["comparison"], data["nodes"]["id"]
    assert comparison["names"] == list(NAMES)
    assert [side["nodes"]["there"].count(1) for side in comparison["sides"]] == [len(a.nodes), len(b.nodes)]
    for graph, side in zip((a, b), comparison["sides"], strict=True):
        there = {i for i, one in zip(ids, side["nodes"]["there"], strict=True) if one}
        assert there == set(graph.nodes["id"])
        assert sum(w is not None for w in side["edges"]["weight"]) == len(graph.edges)
        verdicts = side["tests"]["claims"]["graph"]["verdict"]
        assert len([v for v in verdicts if v]) == len(graph.edges["graph_verdict"].dropna()) > 100
        rows = dict(zip(side["tests"]["edges"], side["tests"]["claims"]["graph"]["predicted"], strict=True))
        expected = dict(
            zip(
                zip(graph.edges["source"], graph.edges["target"], strict=True),
                graph.edges["graph_predicted"],
                strict=True,
            )
        )
        for row, value in rows.items():
            ends = ids[data["edges"]["source"][row]], ids[data["edges"]["target"][row]]
            assert value == pytest.approx(expected[ends], rel=1e-3)
    assert comparison["presence"].count("a") == 5
    assert comparison["presence"].count("b") == 3
    summary = comparison["summary"]
    assert summary["features"] == {"a": 5, "both": 32, "b": 3}
    active = [dict(zip(g.nodes["id"], g.nodes["activation"].tolist(), strict=True)) for g in (a, b)]
    for i, presence, change in zip(ids, comparison["presence"], comparison["change"], strict=True):
        one, other = (side.get(i, np.nan) for side in active)
        if presence == "both" and one == one:
            assert change == (1 if other > 1.05 * one else 0)
        elif presence != "both":
            assert change == (-1 if presence == "a" else 1)
    assert summary["flipped"] > 10
    assert 0 < summary["shared"] < 1
    shares = np.array(data["edges"]["share"])[summary["top_edges"]]
    assert (shares > 0).all()
    assert data["tests"] is None
    assert data["scores"]["replacement, clean"] == 0.71


def test_a_graph_against_itself_has_no_difference(tmp_path: Path):
    a, _ = sample_pair()
    data = data_of(compare_html(a, a, tmp_path / "page.html", NAMES))
    assert set(data["edges"]["weight"]) == {0.0}
    assert set(data["comparison"]["change"]) == {0}
    assert data["comparison"]["summary"]["shared"] == 1
    assert data["comparison"]["summary"]["top_nodes"] == []


def test_validations_given_apart(tmp_path: Path):
    a, b = sample_pair()
    first = a.edges.iloc[3]
    measured = pd.DataFrame([{"source": first["source"], "target": first["target"], "graph_verdict": "reversed"}])
    data = data_of(compare_html(a, b, tmp_path / "page.html", NAMES, validation=(measured, None)))
    tests = [side["tests"] for side in data["comparison"]["sides"]]
    assert tests[0]["claims"] == {"graph": {"verdict": ["reversed"]}}
    assert len(tests[1]["edges"]) == len(b.edges["graph_verdict"].dropna())
    bare = replace(b, edges=b.edges[["source", "target", "weight", "share"]])
    data = data_of(compare_html(a, bare, tmp_path / "page.html", NAMES))
    assert [side["tests"] is None for side in data["comparison"]["sides"]] == [False, True]


def test_features_of_other_dictionaries_are_not_the_same():
    a, b = sample_pair()
    b.tokens, b.nodes = a.tokens, b.nodes.assign(text=b.nodes["text"].replace(" dog", " cat"))
    b.provenance = {**b.provenance, "dictionaries": {"kind": "another"}}
    both = compare(a, b, names=NAMES)
    assert not both.same_features
    for kind, in_a, in_b in both.nodes[["kind", "in_a", "in_b"]].itertuples(index=False):
        assert (in_a and in_b) == (kind != "feature")
    features = [graph.nodes["kind"].tolist().count("feature") for graph in (a, b, both)]
    assert features[0] + features[1] == features[2]
    assert set(both.edges["source"]) <= set(both.nodes["id"])
    assert compare(a, b, names=NAMES, same_features=True).same_features


def test_fingerprints_tell_whether_dictionaries_are_the_same():
    a, b = sample_pair()
    a.provenance = {**a.provenance, "dictionary_fingerprint": "1"}
    b.provenance = {**b.provenance, "dictionaries": {"kind": "another"}, "dictionary_fingerprint": "1"}
    assert compare(a, b, names=NAMES).same_features
    b.provenance = {**a.provenance, "dictionary_fingerprint": "2"}
    assert not compare(a, b, names=NAMES).same_features


def test_pairs_that_cannot_be_compared(tmp_path: Path):
    a, b = sample_pair()
    shallow = sample_graph(tokens=a.tokens, n_layers=3, n_features=9, n_edges=9)
    with pytest.raises(InputError, match="4 layers and corrupt 3"):
        compare_html(a, shallow, tmp_path / "page.html", NAMES)
    with pytest.raises(InputError, match="do not tell two graphs apart"):
        compare_html(a, b, tmp_path / "page.html", ("A", "A"))
    assert not list(tmp_path.iterdir())


def test_hostile_names_and_tokens_stay_data(tmp_path: Path):
    a = sample_graph(tokens=["</script>", "<img src=x>", "\u202e", ""], n_features=4, n_edges=9)
    b = sample_graph(tokens=["</script>", "{data}", "\u202e", "x"], n_features=4, n_edges=9)
    path = compare_html(a, b, tmp_path / "page.html", ("<b>A</b>", "/*{style}*/"))
    data = data_of(path)
    assert data["comparison"]["names"] == ["<b>A</b>", "/*{style}*/"]
    assert data["tokens"] == ["</script>", "<img src=x> ⇄ {data}", "\\u202e", "∅ ⇄ x"]
    text = path.read_text(encoding="utf-8")
    assert "<b>A" not in text
    assert "<img src=x>" not in text


def test_cards_and_labels_of_the_same_features_are_of_the_first_that_has_them(tmp_path: Path):
    a, b = sample_pair()
    cards = SampleCards(a, share=0.5), SampleCards(b, share=1.0, seed=1)
    key = next(iter(cards[0].cards))
    ledger = Ledger([Label("of A", (key,))]), Ledger([Label("of B", (key,))])
    data = data_of(compare_html(a, b, tmp_path / "page.html", NAMES, cards=cards, ledger=ledger))
    assert set(data["cards"]) == set(cards[0].cards) | set(cards[1].cards)
    for name, card in data["cards"].items():
        expected = cards[0 if name in cards[0].cards else 1].cards[name]["max_activation"]
        assert card["max_activation"] == pytest.approx(expected, rel=1e-3)
    assert {name: label["text"] for name, label in data["labels"].items()} == {key: "of A"}


def test_cards_and_labels_of_other_features_are_apart(tmp_path: Path):
    a, b = sample_pair()
    cards = SampleCards(a, share=1.0), SampleCards(b, share=1.0, seed=1)
    key = next(iter(cards[1].cards))
    data = data_of(
        compare_html(
            *(a, b, tmp_path / "page.html", NAMES),
            cards=cards,
            ledger=(None, Ledger([Label("of B", (key,))])),
            same_features=False,
        )
    )
    assert set(data["cards"]) == {f"A:{key}" for key in cards[0].cards} | {f"B:{key}" for key in cards[1].cards}
    assert list(data["labels"]) == [f"B:{key}"]


def test_the_command_takes_the_cards_beside_the_dictionaries(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name in NAMES:
        graph = small_graph()
        replace(graph, provenance={**graph.provenance, "source": {"model": "pocket"}}).save(tmp_path / name)
    page = tmp_path / "page.html"
    main(["compare", *(str(tmp_path / name) for name in NAMES), "--out", str(page)])
    assert "edges that change most" in capsys.readouterr().out
    data = data_of(page)
    assert list(data["cards"]) == ["0.7"]
    assert data["cards"]["0.7"]["tokens_seen"] > 0


def test_a_page_of_large_graphs_holds_the_strongest_edges_and_the_tested_ones():
    both = unite(compare(*sample_pair(), names=NAMES))
    part = bounded(both, 40)
    assert bounded(both) is both
    of_both = part.edges.merge(both.edges, how="inner")
    assert len(of_both) == len(part.edges) < len(both.edges)
    tested, kept = (
        table.edges["graph_verdict_a"].notna().to_numpy() | table.edges["graph_verdict_b"].notna().to_numpy()
        for table in (both, part)
    )
    assert kept.sum() == tested.sum() <= len(part.edges) <= tested.sum() + 40
