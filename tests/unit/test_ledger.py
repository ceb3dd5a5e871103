"""Labels show what evidence they have, files keep it, and the rows are measured."""

import json

import pandas as pd
import pytest
import torch

from circuitsae.features import Claim, Evidence, Label, Ledger, Verdict, check_label, examples, steering_row
from circuitsae.features.top_examples import token_activations
from circuitsae.graph.supernodes import label_json
from circuitsae.interventions import Feature, logit
from circuitsae.interventions.steering import Limits, SteeringReport
from circuitsae.replacement import ReplacementModel
from transcoders.dictionaries import random_dictionaries
from transcoders.errors import FileFormatError, InputError
from transcoders.loading import random_model
from transcoders.sites import Site

ROWS = [torch.randint(1, 50, (6,), generator=torch.Generator().manual_seed(i)) for i in range(8)]


@pytest.fixture(scope="module")
def model():
    dictionaries = random_dictionaries("clt", n_layers=2, d_model=16, features=24, dtype=torch.float64)
    return ReplacementModel(random_model("gpt2", n_layers=2, d_model=16, dtype=torch.float64), dictionaries)


@pytest.fixture(scope="module")
def feature(model):
    """A feature that is active on many of the rows."""
    index = torch.cat([model.trace(row).features.index for row in ROWS])
    layer, _, number = index[index[:, 0] == 0].mode(0).values.tolist()
    return Feature(layer, number)


def row(kind, verdict):
    return Evidence(kind, Verdict(verdict), {"n": 3}, "circuitsae steer")


@pytest.mark.parametrize(
    ("rows", "display"),
    [
        ([], "hypothesis: months"),
        ([("top examples", "supported"), ("held-out examples", "supported")], "hypothesis: months"),
        ([("negative control", "supported"), ("paraphrase stability", "supported")], "hypothesis: months"),
        ([("target ablation", "open")], "hypothesis: months"),
        ([("target ablation", "supported")], "months"),
        ([("steering", "supported"), ("target ablation", "open")], "months"),
        ([("steering", "supported"), ("target ablation", "contradicted")], "contradicted: months"),
        ([("top examples", "contradicted")], "contradicted: months"),
    ],
)
def test_only_causal_rows_make_a_label_more_than_a_hypothesis(rows, display):
    label = Label("months", ("2.713",)).with_rows(*(row(*r) for r in rows))
    assert label.display == display
    assert display in str(label)
    ledger = Ledger([label])
    assert ledger.display("2.713@5") == display
    assert ledger.frame().label.item() == display
    assert len(label.frame()) == 8


def test_a_ledger_comes_back_from_its_file(tmp_path):
    ledger = Ledger(provenance={"model": "pocket"})
    ledger.add(Label("months", ("2.713",)).with_rows(row("steering", "supported")))
    ledger.add(Label("numbers", ("2.7",), source="rules"))
    ledger.add(Label("dates", ("2.713", "1.4")))
    ledger.add(Label("dates", ("2.713", "1.4")).with_rows(row("top examples", "open")))
    path = ledger.save(tmp_path)
    assert path.name == "ledger.json"
    assert Ledger.load(tmp_path) == ledger
    assert [label.text for label in ledger.of("2.713")] == ["months", "dates"]
    assert ledger.display("2.713") == "months; hypothesis: dates"
    assert ledger.display("0.0") == ""


def test_a_status_written_by_hand_is_not_believed(tmp_path):
    path = Ledger([Label("months", ("2.713",))]).save(tmp_path)
    document = json.loads(path.read_text())
    document["labels"][0]["status"] = "supported"
    path.write_text(json.dumps(document))
    assert Ledger.load(path).labels[0].display == "hypothesis: months"


def test_ids_have_one_form():
    label = Label("months", ("2.713@5", " 02.713", "2.713", "1.4", "1.err@3"))
    assert label.features == ("2.713", "1.4", "1.err")
    ledger = Ledger([label])
    assert ledger.of("2.713@9") == ledger.of("02.713") == ledger.of("2.713") == [label]


def test_a_label_is_shown_with_all_of_its_evidence():
    measured = Label("months", ("2.713@5",)).with_rows(row("steering", "supported"))
    ledger = Ledger([Label("dates", ("2.713", "1.4")).with_rows(row("top examples", "open")), measured])
    assert label_json("2.713", ledger) == {
        "text": "months",
        "status": "supported",
        "display": "months; hypothesis: dates",
        "evidence": ["steering: supported · n 3 · circuitsae steer", "top examples: open · n 3 · circuitsae steer"],
    }
    assert label_json("0.3", ledger) is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda label: label.update(features="2.713"), "features of a label is '2.713'; expected a list"),
        (lambda label: label.update(features=[2.713]), "a feature is 2.713; expected text"),
        (lambda label: label.update(text=5), "text of a label is 5; expected text"),
        (lambda label: label["rows"][0].update(measurement=[1]), "measurement of a row is a list"),
        (lambda label: label["rows"][0].update(verdict=[]), "verdict of a row is a list"),
    ],
)
def test_what_is_no_label_is_refused(tmp_path, change, said):
    path = Ledger([Label("months", ("2.713",)).with_rows(row("steering", "supported"))]).save(tmp_path)
    document = json.loads(path.read_text())
    change(document["labels"][0])
    path.write_text(json.dumps(document))
    with pytest.raises(FileFormatError, match=said):
        Ledger.load(path)


@pytest.mark.parametrize(
    "text", ["", "[" * 100_000, "[]", "{}", '{"format": "circuitsae-ledger/1", "labels": [{}], "provenance": {}}']
)
def test_what_is_no_ledger_is_refused(tmp_path, text):
    (tmp_path / "ledger.json").write_text(text)
    with pytest.raises(FileFormatError, match="is no ledger"):
        Ledger.load(tmp_path)
    with pytest.raises(FileFormatError, match="There is no ledger"):
        Ledger.load(tmp_path / "elsewhere")


def test_an_unknown_row_in_a_file_is_refused(tmp_path):
    path = Ledger([Label("months", ("2.713",)).with_rows(row("steering", "supported"))]).save(tmp_path)
    path.write_text(path.read_text().replace('"kind": "steering"', '"kind": "intuition"'))
    with pytest.raises(FileFormatError, match="intuition"):
        Ledger.load(path)


def test_evidence_says_how_it_was_made():
    with pytest.raises(InputError, match="says not how"):
        Evidence("steering", Verdict.SUPPORTED, {}, "")
    with pytest.raises(InputError, match="A label needs"):
        Label(" ", ("1.2",))


# measured


@torch.no_grad()
def test_examples_are_the_largest_activations(model, feature):
    dense = []
    for tokens in ROWS:
        reads = model.model.activations(tokens[None], [Site(0, "mlp_in")])[Site(0, "mlp_in")][0]
        active = model.dictionaries.activations(0, reads)[:, feature.index]
        active[0] = 0
        dense.append(active)
    for found, expected in zip(token_activations(model, [feature], ROWS), dense, strict=True):
        torch.testing.assert_close(found, expected)
    best = examples(model, [feature], ROWS, n=4)
    assert [e.activation for e in best] == pytest.approx(torch.stack(dense).flatten().topk(4).values.tolist())
    first = best[0]
    assert first.token == f"#{int(ROWS[first.text][first.pos])}"
    assert float(dense[first.text][first.pos]) == pytest.approx(first.activation)


@torch.no_grad()
def _removed(model, feature, tokens):
    """The logits of the last position with the feature's writes taken away by plain hooks."""
    index, value = model.trace(tokens).features
    here = (index[:, 0] == feature.layer) & (index[:, 2] == feature.index)
    amount = torch.zeros(len(tokens), 1, dtype=torch.float64)
    amount[index[here, 1], 0] = value[here]

    def minus(at):
        decoder = model.dictionaries.decoder_rows(feature.layer, torch.tensor([feature.index]), at)[0]
        return lambda out: out - amount * decoder

    edits = {Site(at, "mlp_out"): minus(at) for at in model.dictionaries.write_layers(feature.layer)}
    return model.model.run(tokens[None], edits=edits)[0][0, -1]


def test_ablation_is_the_model_without_the_feature_and_the_verdict_follows(model, feature):
    active = [t for t in ROWS if float(token_activations(model, [feature], [t])[0].max()) > 0]
    clean = torch.stack([model.trace(t).logits[-1] for t in active])
    changes = torch.stack([_removed(model, feature, t) for t in active]) - clean
    falls = (changes < 0).double().mean(0)
    token = int((changes.mean(0) - 100 * (falls < 1)).argmin())  # a logit that removing it lowers most, always if any
    label = Label("raises it", (f"{feature.layer}.{feature.index}",))
    tested = check_label(model, label, Claim(metric=logit(token), prompts=ROWS), controls=10)
    measured = tested.rows["target ablation"].measurement
    assert measured["prompts"] == len(active)
    assert measured["mean_change"] == pytest.approx(float(changes[:, token].mean()), abs=1e-9)
    assert measured["falls_on"] == pytest.approx(float(falls[token]))
    beyond = abs(measured["mean_change"]) > measured["largest_control"]
    assert (tested.rows["target ablation"].verdict is Verdict.OPEN) == (not beyond or 0.2 < measured["falls_on"] < 0.8)
    opposite = check_label(model, label, Claim(metric=lambda x: -x[..., token], prompts=ROWS), controls=10)
    if tested.rows["target ablation"].verdict is Verdict.SUPPORTED:
        assert opposite.status == "contradicted"
    assert set(tested.rows) == {"target ablation", "negative control"}


def test_examples_rows_and_paraphrases(model, feature):
    token = examples(model, [feature], ROWS, n=1)[0].token
    name = f"{feature.layer}.{feature.index}"
    said = Claim(
        fires_on="#", texts=ROWS[:4], held_out_texts=ROWS[4:], prompts=ROWS[:2], paraphrases=[[ROWS[0]], [ROWS[1]]]
    )
    tested = check_label(model, Label("anything", (name,)), said)
    assert tested.rows["top examples"].verdict is Verdict.OPEN  # it matches everywhere, so it says nothing
    assert tested.rows["top examples"].measurement["share_of_all_tokens"] == 1.0
    assert tested.rows["paraphrase stability"].measurement == {"paraphrases": 2, "share_alike": 1.0, "metric": "metric"}
    assert tested.display == "hypothesis: anything"
    never = check_label(model, Label("nothing", (name,)), Claim(fires_on="no such token", texts=ROWS))
    assert never.rows["top examples"].verdict is Verdict.CONTRADICTED
    assert token in json.dumps(never.rows["top examples"].measurement, ensure_ascii=False)
    with pytest.raises(InputError, match="is no feature"):
        check_label(model, Label("an error", ("1.err",)), said)


@pytest.mark.parametrize(
    ("strength", "effect", "verdict"),
    [(2.0, 1.0, "supported"), (2.0, 0.1, "open"), (2.0, -1.0, "contradicted"), (-2.0, 1.0, "open")],
)
def test_a_steering_row_follows_the_report(strength, effect, verdict):
    columns = {"strength": [strength], "effect": [effect], "control": [0.5], "held_out_effect": [effect],
               "held_out_control": [0.5], "kl": [0.1], "loss_rise": [0.1], "broken": [""]}  # fmt: skip
    none = pd.DataFrame()
    report = SteeringReport(
        "m", "h", "add", (), "metric", "up", 1.0, Limits(), pd.DataFrame(columns), none, none, {}, "circuitsae steer"
    )
    made = steering_row(report)
    assert made.verdict == verdict
    assert made.command == "circuitsae steer"
