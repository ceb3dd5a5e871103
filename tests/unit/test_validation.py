"""`validate`: what it measures, holds it against and returns; that nothing but the edge moves a verdict."""

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import circuitsae
from circuitsae import validation
from circuitsae.attribution import LogitTargets, attribute
from circuitsae.graph import Node, NodeKind
from circuitsae.interventions import Recording, node_change
from circuitsae.replacement import ReplacementModel
from circuitsae.validation import Validation
from circuitsae.validation.claims import DOSES, Pairs, Settings, _doses, judge
from circuitsae.validation.controls import AT_FIRST, draw_controls
from circuitsae.validation.measuring import Targets, effects, require_active
from circuitsae.validation.result import OLD
from circuitsae.validation.statistics import corrected
from transcoders.dictionaries import random_dictionaries
from transcoders.errors import InputError
from transcoders.loading import random_model

# Tables come back as Any: pandas' declared types are wider than what these hold.
validate: Any = validation.validate

TOKENS = torch.tensor([0, 11, 22, 33])
SOURCES = (NodeKind.FEATURE, NodeKind.ERROR, NodeKind.TOKEN)
ALL = 10**4


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request):
    dictionaries = random_dictionaries("clt", n_layers=3, d_model=16, features=24, dtype=torch.float64)
    return ReplacementModel(random_model(request.param, n_layers=3, d_model=16, dtype=torch.float64), dictionaries)


@pytest.fixture(scope="module")
def graph(model):
    return attribute(model, TOKENS, targets=LogitTargets([1, 2]))


@pytest.fixture(scope="module")
def check(model, graph):
    return validate(model, graph, edges=60, controls=100)


def _node(graph, name):
    return graph.nodes[graph.position[name]]


# what comes back


def test_every_claim_of_every_edge(graph, check):
    frame = check.edges
    assert len(frame) == 60
    assert check.claims == ("graph", "direct", "model")
    assert frame[[c for c in frame if not c.endswith(("_p", "_q"))]].notna().all(axis=None)
    weights = [graph.weights[graph.position[t], graph.position[s]] for s, t in frame[["source", "target"]].to_numpy()]
    np.testing.assert_allclose(frame["weight"], weights)
    np.testing.assert_allclose(frame["direct_predicted"], -frame["weight"], atol=1e-9)
    np.testing.assert_allclose(frame["graph_predicted"], frame["model_predicted"], rtol=0, atol=0)
    for claim in ("graph", "direct"):
        assert sum(check.verdicts(claim).values()) == 60
        for chance in ("p", "q"):
            assert (frame[f"{claim}_{chance}"].notna() == (frame[f"{claim}_controls"] >= 19)).all()
        assert ((frame[f"{claim}_verdict"] == "undecided") == (frame[f"{claim}_reason"] != "")).all()
    assert check.frozen_error < 1e-9
    assert check.logit_error < 1e-9
    assert check.share == pytest.approx(frame["influence"].sum())


def test_what_the_last_norm_adds_to_a_direct_edge_is_reckoned_by_hand(model, graph):
    """Of the last layer's features, whose edges to the logits meet no attention: the norm's scale is what is let go."""
    trace, last, norm = model.trace(TOKENS), len(TOKENS) - 1, model.model.parts.final_norm
    sources = [n for n in graph.nodes if n.kind is NodeKind.FEATURE and (n.layer, n.pos) == (2, last)]
    index, values = trace.features
    active = {tuple(at): value for at, value in zip(index.tolist(), values.tolist(), strict=True)}
    scale = trace.frozen.constants["ln_final.hook_scale"].reshape(-1)[last]
    bias = 0.0 if norm.bias is None else norm.bias
    read = (trace.frozen.reads.final[last] - bias) * scale / norm.weight()

    def logits(removed, live):
        left = read - norm.linear(removed[None])[0] / norm.weight()
        after = (scale**2 - (read**2).mean() + (left**2).mean()).sqrt() if live else scale
        found = (left / after * norm.weight() + bias) @ model.model.W_U
        return (found - found.mean())[[1, 2]]

    found = validate(model, graph, edges=[f"{n.id} → logit.{at}@{last}" for n in sources for at in (1, 2)],
                     claims=("direct",), controls=0, heads=0).edges.set_index(["source", "target"])  # fmt: skip
    assert len(found) == 2 * len(sources) >= 6
    for node in sources:
        written = model.dictionaries.decoder_rows(2, torch.tensor([node.index]), 2)[0]
        removed = active[node.layer, node.pos, node.index] * written
        held, live = (logits(removed, live) - logits(torch.zeros_like(removed), False) for live in (False, True))
        rows = found.loc[[(node.id, f"logit.{at}@{last}") for at in (1, 2)]]
        for column, expected in (("predicted", held), ("measured", live), ("norms", live - held)):
            np.testing.assert_allclose(rows[f"direct_{column}"], expected.detach(), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(rows["direct_patterns"], 0, atol=1e-12)


def test_verdicts_are_those_of_the_columns(check):
    """The table of verdicts once more, line by line, from what stands in the frame."""
    frame = check.edges
    for claim in ("graph", "direct"):
        for row in frame.to_dict("records"):
            low, high, q = (row[f"{claim}_{name}"] for name in ("low", "high", "q"))
            verdict = row[f"{claim}_verdict"]
            if claim == "direct" and abs(row["direct_patterns"] + row["direct_norms"]) > abs(row["weight"]):
                by_patterns = abs(row["direct_patterns"]) >= abs(row["direct_norms"])
                assert verdict == ("attention" if by_patterns else "norms")
            elif low >= 0.5 and high <= 2 and q <= 0.05:
                assert verdict == "confirmed"
            else:
                assert verdict in ("null", "reversed", "undecided")
        assert {"confirmed", "undecided"} <= set(frame[f"{claim}_verdict"])


def test_q_values_are_corrected_within_a_class(check):
    for claim in ("graph", "direct"):
        for _, rows in check.edges.groupby("kind"):
            np.testing.assert_allclose(rows[f"{claim}_q"], corrected(rows[f"{claim}_p"].to_numpy()))


def test_claims_are_measured_alone_as_together(model, graph, check):
    for claim in ("graph", "direct", "model"):
        alone = validate(model, graph, edges=60, claims=(claim,), controls=100)
        assert alone.claims == (claim,)
        columns = [c for c in check.edges if c in alone.edges]
        assert f"{claim}_ratio" in columns
        pd.testing.assert_frame_equal(alone.edges, check.edges[columns])


def test_a_claim_is_a_table_of_its_own(check):
    table = check.claim("direct")
    assert {"source", "weight", "verdict", "ratio", "patterns", "norms", "head", "miss_norms"} <= set(table)
    pd.testing.assert_series_equal(table["low"], check.edges["direct_low"], check_names=False)
    assert not [c for c in table if c.startswith(("graph_", "model_", "direct_"))]
    with pytest.raises(InputError, match="'direct' was not tested; these were: graph"):
        Validation(pd.DataFrame({"graph_measured": []})).claim("direct")


def test_agreement_is_that_of_each_class(check):
    frame = check.edges
    ratio = frame["graph_measured"] / frame["graph_predicted"]
    found = check.agreement("graph")
    assert set(found) == {"all", *frame["kind"]}
    assert found["all"].within == pytest.approx(((ratio >= 0.5) & (ratio <= 2)).mean())
    for kind, rows in frame.groupby("kind"):
        assert found[kind].n == len(rows)
    table = check.frame("graph", bootstrap=20).set_index("edges")
    assert (table["within_low"] <= table["within"]).all()
    assert table.loc["all", "within"] == found["all"].within


def test_findings_stand_on_the_networkx_edges(graph, check):
    g = check.annotate(graph).to_networkx()
    for row in check.edges.head(5).to_dict("records"):
        edge = g.edges[row["source"], row["target"]]
        assert edge["graph_verdict"] == row["graph_verdict"]
        assert edge["direct_measured"] == row["direct_measured"]


def test_files_hold_all_of_it(check, tmp_path):
    check.edges.loc[0, "model_measured"] = np.nan
    document = json.loads(check.save(tmp_path / "validation.json").read_text())
    assert document["verdicts"] == {claim: check.verdicts(claim) for claim in ("graph", "direct")}
    assert document["agreement"]["direct"]["all"]["n"] == 60
    loaded = Validation.load(tmp_path / "validation.json")
    pd.testing.assert_frame_equal(loaded.edges, check.edges, check_dtype=False)
    assert (loaded.share, loaded.frozen_error, loaded.format) == (check.share, check.frozen_error, "claims")
    assert loaded.shares == check.shares
    assert loaded.verdicts("direct") == check.verdicts("direct")


def test_old_files_are_read_as_old(tmp_path):
    edge = {"source": "0.3@1", "target": "logit.2@3", "kind": "feature→logit", "weight": 1.0, "predicted": -1.0}
    edge |= {"frozen": -1.0, "measured": -0.2, "ratio": 0.2, "control": 0.5}
    document = {"edges": [edge | {"verdict": "null"}, edge | {"verdict": "reversed"}], "frozen_error": 1e-12}
    document |= {"logit_error": None, "controls": [], "agreement": {}, "verdicts": {"null": 1, "reversed": 1}}
    path = tmp_path / "validation.json"
    path.write_text(json.dumps(document))
    old = Validation.load(path)
    assert old.format == OLD == "old"
    assert (old.verdicts(), old.claims, len(old.edges)) == ({"reversed": 1, "null": 1}, (), 2)
    assert np.isnan(old.logit_error)
    old.save(path)
    assert Validation.load(path).format == "old"
    for text in ("{}", "[]", "no json", '{"edges": 3}'):
        path.write_text(text)
        with pytest.raises(InputError, match="is no validation of ours"):
            Validation.load(path)


# what is refused


def test_a_graph_of_another_model_is_refused(graph):
    other = ReplacementModel(
        random_model("gpt2", n_layers=3, d_model=16, dtype=torch.float64, seed=9),
        random_dictionaries("clt", n_layers=3, d_model=16, features=24, dtype=torch.float64),
    )
    with pytest.raises(InputError, match="validate it with the model it was made with"):
        validate(other, graph)


def test_other_dictionaries_are_refused(model, graph):
    other = ReplacementModel(
        model.model, random_dictionaries("clt", n_layers=3, d_model=16, features=24, dtype=torch.float64, seed=5)
    )
    with pytest.raises(InputError, match="not active in these dictionaries"):
        validate(other, graph, edges=None)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"claims": ()}, "give one or more"),
        ({"controls": -1}, "controls=-1 is no number of controls"),
        ({"delta": 1.0}, "delta=1.0 is no share"),
        ({"delta": -0.1}, "delta=-0.1 is no share"),
        ({"heads": -1}, "heads=-1 is no number"),
    ],
)
def test_settings_that_are_none_are_refused(model, graph, wrong, said):
    with pytest.raises(InputError, match=said):
        validate(model, graph, **wrong)


def test_nodes_that_are_not_active_are_refused(model):
    with pytest.raises(InputError, match="not active in these dictionaries"):
        require_active(model.trace(TOKENS), [Node(NodeKind.FEATURE, 0, 1, 10**6)])


# controls


def test_controls_are_other_features_at_the_sources_places_and_tokens_that_are_not_there(model, graph):
    trace = model.trace(TOKENS)
    features = [n for n in graph.nodes if n.kind is NodeKind.FEATURE]
    sources = [next(n for n in features if n.pos == 1), Node(NodeKind.ERROR, 1, 3), Node(NodeKind.TOKEN, -1, 2)]
    drawn = draw_controls(model, trace, sources, [], ALL, 0)
    mine = ~drawn.is_token
    there = sorted((n.layer, n.pos) for n in features if n.pos in (1, 3))
    assert sorted(zip(drawn.layer[mine].tolist(), drawn.pos[mine].tolist(), strict=True)) == there
    assert set(drawn.pos[drawn.is_token]) == {2}
    others = set(range(model.model.d_vocab)) - set(TOKENS.tolist())
    assert drawn.is_token.sum() == len(others)
    _, cache = model.model.run_hooked(torch.tensor(sorted(others))[:, None], read=["embed.hook_out"])
    vectors = torch.cat([c.vectors for c, token in zip(drawn.contributions, drawn.is_token, strict=True) if token])
    torch.testing.assert_close(vectors.sum(0), cache["embed.hook_out"][:, 0].sum(0))
    assert not draw_controls(model, trace, sources, [], 0, 0).contributions


def test_few_controls_are_spread_over_layers_and_positions(model, graph):
    trace = model.trace(TOKENS)
    sources = [n for n in graph.nodes if n.kind is NodeKind.FEATURE]
    cells = {(n.layer, n.pos) for n in sources}
    drawn = draw_controls(model, trace, sources, [], len(cells), 3)
    assert sorted(zip(drawn.layer.tolist(), drawn.pos.tolist(), strict=True)) == sorted(cells)
    tokens = draw_controls(model, trace, [n for n in graph.nodes if n.kind is NodeKind.TOKEN], [], 50, 3)
    assert [(tokens.pos == pos).sum() for pos in range(4)] == [AT_FIRST + 3, 3, 2, 2]


def test_a_claim_is_held_against_all_active_features_without_an_edge_to_speak_of(model, graph):
    """p and the number of controls of some edges, by hand, from runs of every feature of the prompt."""
    frame = validate(model, graph, edges=150, claims=("graph",), controls=ALL).edges
    trace, judged = model.trace(TOKENS), 0
    features = [n for n in graph.nodes if n.kind is NodeKind.FEATURE]
    removed = [[-1.0 * node_change(model, trace, node)] for node in features]
    for row in frame[frame["source"].str.contains(r"^\d")].iloc[::9].to_dict("records"):
        source, target = _node(graph, row["source"]), _node(graph, row["target"])
        read = Targets(model, trace, [target])
        foreseen, done = (effects(model, Recording(model, trace), removed, read, r)[:, 0] for r in ("linear", "graph"))
        kept = [
            i
            for i, node in enumerate(features)
            if node.layer < target.layer
            and node.pos <= target.pos
            and abs(foreseen[i]) <= 0.25 * abs(row["graph_predicted"])
        ]
        assert source not in [features[i] for i in kept]
        assert row["graph_controls"] == len(kept)
        if len(kept) < 19:
            assert np.isnan(row["graph_p"])
            continue
        judged += 1

        def size(pos, kept=kept, done=done):
            here = [done[i] for i in kept if features[i].pos == pos]
            return np.sqrt(np.mean(np.square(here if len(here) >= 5 else done[kept])))

        sign = np.sign(row["graph_predicted"])
        own = sign * row["graph_measured"] / size(source.pos)
        p = (1 + sum(sign * done[i] / size(features[i].pos) >= own for i in kept)) / (1 + len(kept))
        assert row["graph_p"] == pytest.approx(p)
    assert judged > 5


def test_with_few_controls_nothing_is_confirmed(model, graph):
    check = validate(model, graph, edges=60, claims=("graph",), controls=10)
    frame = check.edges[~check.edges["kind"].str.startswith("token")]
    assert frame["graph_p"].isna().all()
    assert "confirmed" not in set(frame["graph_verdict"])
    agree = frame[(frame["graph_low"] >= 0.5) & (frame["graph_high"] <= 2)]
    assert set(agree["graph_reason"]) <= {"too few controls", ""}
    assert (agree["graph_reason"] == "too few controls").sum() > 5


def test_the_seed_fixes_the_controls(model, graph):
    one, same, other = (
        validate(model, graph, edges=30, claims=("graph",), controls=30, seed=seed) for seed in (1, 1, 2)
    )
    pd.testing.assert_frame_equal(one.edges, same.edges)
    assert not one.edges["graph_p"].equals(other.edges["graph_p"])


# doses


def test_values_that_a_feature_takes_elsewhere_are_doses_beside_the_shares(model, graph):
    prompt = Recording(model, model.trace(TOKENS))
    feature = next(n for n in graph.nodes if n.kind is NodeKind.FEATURE)
    a = feature.activation
    values = {(feature.layer, feature.index): [a, 0.0, 0.5 * a, 1.5 * a, 2.5 * a, 0.5 * a]}
    found = _doses(prompt, [feature, Node(NodeKind.TOKEN, -1, 1)], values)
    np.testing.assert_allclose(found[0], [*DOSES, 0.5, -0.5, np.nan, np.nan])
    np.testing.assert_allclose(found[1], [*DOSES, *[np.nan] * 4])
    many = _doses(prompt, [feature], {(feature.layer, feature.index): (a * np.linspace(0.1, 3, 30)).tolist()})
    np.testing.assert_allclose(many[0, 4:], [0.9, 0.3, -0.4, -1.0], atol=1e-9)


def test_other_prompts_give_values_to_put_in_a_features_place(model, graph):
    alone, more = (
        validate(model, graph, edges=100, claims=("graph",), controls=0, elsewhere=prompts)
        for prompts in ([], [torch.tensor([0, 44, 22, 33]), torch.tensor([0, 9, 11, 22, 33])])
    )
    np.testing.assert_allclose(alone.edges["graph_measured"], more.edges["graph_measured"], rtol=1e-9, atol=1e-11)
    moved = ~np.isclose(alone.edges["graph_ratio"], more.edges["graph_ratio"], rtol=1e-6)
    assert moved.any()
    assert alone.edges["kind"][moved].str.startswith("feature").all()


# nothing but the edge moves a verdict


def _same(one, other) -> None:
    """But for rounding, which a division by the small dose makes larger."""
    rough = ["miss_dictionary", "miss_curvature"]
    np.testing.assert_allclose(one[rough], other[rough], atol=1e-8)
    exact = one.columns.drop([*rough, "miss"])
    pd.testing.assert_frame_equal(one[exact], other[exact], rtol=1e-9, atol=1e-11)


def test_the_order_of_edges_does_not_matter(model, graph, check):
    pairs = [(_node(graph, s), _node(graph, t)) for s, t in _ends_of(check)]
    shuffled = np.random.default_rng(2).permutation(len(pairs))
    prompt, settings = Recording(model, model.trace(TOKENS)), Settings(controls=60)
    straight = judge(model, prompt, Pairs.of(pairs), settings)
    mixed = judge(model, prompt, Pairs.of([pairs[i] for i in shuffled]), settings)
    back = mixed.iloc[np.argsort(shuffled)].reset_index(drop=True)
    _same(back, straight)


def _ends_of(check):
    return check.edges[["source", "target"]].to_numpy()


def test_batched_and_one_by_one_are_the_same(model, graph):
    together, alone = (validate(model, graph, edges=8, controls=5, heads=0, memory=size) for size in (2**28, 1))
    _same(together.edges, alone.edges)


def test_a_part_of_the_edges_has_the_ratios_of_all(model, graph, check):
    some = check.edges.iloc[::7].reset_index(drop=True)
    names = [f"{s} → {t}" for s, t in some[["source", "target"]].to_numpy()]
    alone = validate(model, graph, edges=names, controls=100).edges.set_index(["source", "target"])
    alone = alone.loc[[tuple(ends) for ends in some[["source", "target"]].to_numpy()]].reset_index()
    columns = [f"{c}_{name}" for c in ("graph", "direct") for name in ("predicted", "measured", "ratio", "low", "high")]
    pd.testing.assert_frame_equal(alone[columns], some[columns], rtol=1e-9, atol=1e-11)


@pytest.fixture(scope="module")
def pocket_verdicts():
    """Verdicts of both judged claims on two prompts, by precision and seed."""
    prompts = (
        "When John and Mary went to the store, John gave a drink to",
        "The capital of the state containing Dallas is",
    )
    models = {
        dtype: ReplacementModel(
            circuitsae.load_model("pocket", dtype=dtype), circuitsae.load_dictionaries("pocket", dtype=dtype)
        )
        for dtype in (torch.float64, torch.float32)
    }
    settings: dict[str, Any] = {"claims": ("graph", "direct"), "heads": 0}
    found: dict[Any, list[str]] = {"float64": [], "float32": [], "seed": []}
    for prompt in prompts:
        graph = attribute(models[torch.float64], prompt).prune(nodes=0.8)
        tested = validate(models[torch.float64], graph, edges=60, **settings)
        names = [f"{s} → {t}" for s, t in _ends_of(tested)]
        coarse = attribute(models[torch.float32], prompt).prune(nodes=0.8)
        runs = {
            "float64": tested,
            "float32": validate(models[torch.float32], coarse, edges=names, **settings),
            "seed": validate(models[torch.float64], graph, edges=60, seed=1, **settings),
        }
        for name, check in runs.items():
            rows = check.edges.set_index(["source", "target"]).loc[[tuple(ends) for ends in _ends_of(tested)]]
            found[name] += [*rows["graph_verdict"], *rows["direct_verdict"]]
    return {name: np.array(verdicts) for name, verdicts in found.items()}


@pytest.mark.parametrize(("other", "share"), [("float32", 0.99), ("seed", 0.95)])
def test_precision_and_controls_hardly_move_a_verdict(pocket_verdicts, other, share):
    assert len(pocket_verdicts["float64"]) == 240
    assert len(set(pocket_verdicts["float64"])) > 2
    assert (pocket_verdicts["float64"] == pocket_verdicts[other]).mean() >= share
