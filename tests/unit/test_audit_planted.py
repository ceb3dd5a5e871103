"""Planted circuits: the truth that is reasoned is the model's, methods are told apart, audits tell damage apart."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from circuitsae.audit import Choice, Estimate, Finding, Rule, Settings
from circuitsae.audit import audit as run_audit
from circuitsae.audit.criteria import CRITERIA
from circuitsae.audit.finding import untested
from circuitsae.audit.heads import GivenSource
from circuitsae.audit.measurement import sensitivity
from circuitsae.audit.measurement.recovery import NOISE, by_faithfulness, mean_f1, recovered, recovered_features
from circuitsae.audit.planted import DAMAGE, PROGRAMS, damaged, own_circuit, planted_subject, without_learning
from circuitsae.audit.planted_features import LENGTH, NEURONS, planted_features
from circuitsae.audit.subject import FOUND, HELD, WHOLE, Cut
from circuitsae.audit.verdict import BEARING, short, verdict
from circuitsae.components import eap_ig, exact_edges
from circuitsae.components.known import distance
from circuitsae.interventions import Feature
from circuitsae.validation.ablation import Ablated, Kept
from circuitsae.validation.circuits import rank_nodes
from circuitsae.validation.tasks import Cases

HANDMADE = {program.name: program for program in PROGRAMS}
KEYS = [criterion.key for criterion in CRITERIA if criterion.key in BEARING]
SMALL = Settings(held_out=24, few=24, random=4, resamples=2, many=24)


@pytest.fixture(scope="module", params=["induction", "opposed"])
def program(request):
    return HANDMADE[request.param].program(per_length=16)


@pytest.mark.parametrize("ablation", ["resample", "mean", "zero"])
def test_the_truth_is_what_ablation_in_the_model_shows(program, ablation):
    found = exact_edges(program.problems(ablation, distance))
    changes = {edge for edge, size in zip(found.items, found.largest.tolist(), strict=True) if size > 1e-6}
    assert changes == program.truth(ablation)


def test_idle_heads_and_layers_change_nothing_and_noise_a_little():
    plain, wide, noisy = (
        HANDMADE["conjunction"].program(per_length=6, **options)
        for options in ({}, {"layers": 3, "heads": 4}, {"layers": 3, "heads": 4, "noise": NOISE})
    )
    assert plain.truth("zero") == wide.truth("zero")
    assert len(wide.effects) > 10 * len(plain.effects)
    tokens = torch.tensor(plain.pairs[0][:1])
    logits = [program.model.run(tokens)[0] for program in (plain, wide, noisy)]
    assert torch.equal(logits[0], logits[1])
    assert 0 < float((logits[2] - logits[0]).abs().max()) < 0.5
    kept = [planted_subject(program, "zero").judging(9) for program in (wide, noisy)]
    f = [float(judge.f([Cut(own_circuit(wide, "zero"))])[0]) for judge in kept]
    assert f[0] == pytest.approx(1)
    assert 0.7 < f[1] < 1


def test_prompts_given_are_taken_from_every_problem(program):
    problems = program.problems("resample", distance)
    source = GivenSource("given", program.model, problems)
    made, shown = source.problems(8, HELD, Choice())
    assert [len(problem) for problem in made] == [3, 3, 2]
    assert [known.length for known in shown] == [3, 3, 3, 4, 4, 4, 6, 6]
    found, _ = source.problems(1000, FOUND, Choice("zero"))
    assert sum(map(len, found)) == sum(map(len, problems)) / 2
    assert found[0].ablation == "zero"
    assert torch.equal(made[0].clean, problems[0].clean[[1, 3, 5]])
    assert torch.equal(found[0].clean, problems[0].clean[::2])


@pytest.mark.parametrize("ablation", ["resample", "zero"])
def test_damage_is_what_it_says(program, ablation):
    own = own_circuit(program, ablation)
    f = planted_subject(program, ablation).judging(24).f
    assert f([Cut(own)])[0] == pytest.approx(1)
    missing, idle, other = (damaged(program, ablation, how, seed=1) for how in DAMAGE)
    assert missing < own < idle
    assert len(own) - 1 == len(missing) == len(idle) - 2
    assert f([Cut(missing)])[0] < 0.8
    assert f([Cut(idle)])[0] == pytest.approx(1)
    assert f([WHOLE, Cut(idle - own, all_but=True)]) == pytest.approx([1, 1])
    assert len(other) == len(own)
    assert other != own
    drawn = without_learning(program)
    weights = [dict(each.model.parts.parameters()) for each in (program, drawn)]
    for name, own_weight in weights[0].items():
        assert bool((own_weight == 0).all()) == bool((weights[1][name] == 0).all())
    assert abs(1 - planted_subject(drawn, ablation, own).judging(24).f([Cut(own)])[0]) > 0.2


def edges_found(find, prompts):
    return recovered("resample", find, prompts=prompts, draws=1, programs=PROGRAMS[:2])


def status(rows):
    return sensitivity.RULE.status(mean_f1(rows))


def test_the_method_finds_what_was_planted_and_one_that_ranks_backwards_does_not():
    rows = edges_found(by_faithfulness, 12)
    assert status(rows) in ("confirmed", "partly")
    assert all(row.recall == 1 for row in rows)
    assert all(row.f1 == pytest.approx(2 * row.precision / (row.precision + 1)) for row in rows)
    assert status(edges_found(lambda problems, planted: eap_ig(problems).ranked()[-planted:], 3)) == "disconfirmed"


def test_what_is_found_beside_the_planted_counts_against_a_method():
    rows = edges_found(lambda problems, planted: eap_ig(problems).edges, 3)
    assert all(row.recall == 1 for row in rows)
    assert [row.precision for row in rows] == [row.planted / 302 for row in rows]
    assert status(rows) == "disconfirmed"


def test_planted_features_are_what_the_value_depends_on():
    planted = planted_features(prompts=3, seed=1)
    ablated = Ablated(Cases(planted.model, planted.task), "zero", regime="model")
    nodes = sorted(planted.nodes, key=str)
    others = (Feature(0, i, at) for i in range(NEURONS) for at in range(1, LENGTH))
    unplanted = tuple(node for node in others if node not in planted.nodes)
    full, alone, *without = ablated.metric(
        [Kept((), all_but=True), Kept(tuple(nodes)), Kept(unplanted, all_but=True),
         *(Kept((node,), all_but=True) for node in nodes)]
    )  # fmt: skip
    assert np.allclose([alone, without[0]], full)
    assert (np.abs(without[1:] - full) > 0.02 * np.abs(full)).all()


def test_planted_features_are_found_and_ranked_backwards_are_not(caplog):
    fewest, sized = recovered_features(prompts=3, draws=1)
    assert status(fewest) in ("confirmed", "partly")
    assert fewest[0].precision == sized[0].f1 == 1
    assert not caplog.records

    def backwards(model, task):
        found = rank_nodes(model, task)
        return replace(found, scores=1 / (1e-9 + np.abs(found.scores)))

    assert {status(rows) for rows in recovered_features(prompts=2, draws=1, rank=backwards)} == {"disconfirmed"}


def test_noise_has_no_known_edges(program):
    subject = planted_subject(program, "resample")
    subject.usual = Choice("noise")
    found = run_audit(subject, settings=SMALL, only=["sensitivity"]).of("sensitivity")
    assert found.status == "untested"
    assert "depends on its draw" in found.said


def judged(program, circuit=None, only=KEYS):
    return run_audit(planted_subject(program, "resample", circuit), settings=SMALL, only=only)


def test_an_audit_confirms_the_own_circuit_and_refutes_others(program):
    own = judged(program)
    assert verdict(own) == "confirmed"
    assert short(own) == []
    for how in ("one edge missing", "random"):
        found = judged(program, damaged(program, "resample", how, seed=2), ["sufficiency"])
        assert (verdict(found), short(found)) == ("refuted", ["sufficiency"])
    assert verdict(judged(without_learning(program), own_circuit(program, "resample"), ["sufficiency"])) == "refuted"


def test_an_audit_refutes_an_idle_edge(program):
    found = judged(program, damaged(program, "resample", "one idle edge", seed=3), ["sufficiency", "minimality"])
    assert (verdict(found), short(found)) == ("refuted", ["minimality"])


def test_a_verdict_asks_for_every_bearing_criterion():
    (one,) = (criterion for criterion in CRITERIA if criterion.key == "sufficiency")
    criteria = [replace(one, key=key, rule=Rule(0.9, 0.5)) for key in ("sufficiency", "necessity", "else")]

    def of(*estimates):
        findings = [
            untested(criterion.key, "", "")
            if low is None
            else Finding(
                criterion=criterion.key, status=Rule(0.9, 0.5).status(Estimate(low, low, high)), said="", change="",
                estimate=Estimate(low, low, high),
            )
            for criterion, (low, high) in zip(criteria, estimates, strict=False)
        ]  # fmt: skip
        made = run_audit(planted_subject(HANDMADE["previous"].program(per_length=4), "zero"), settings=SMALL,
                         only=["sufficiency"])  # fmt: skip
        audit = replace(made, findings=tuple(findings))
        return verdict(audit, criteria=criteria), short(audit, criteria=criteria)

    good, below, unsure, bad, none = (0.95, 1.0), (0.6, 0.8), (0.6, 0.95), (0.1, 0.2), (None, None)
    assert of(good, good) == ("confirmed", [])
    assert of(good, none) == ("confirmed", [])
    assert of(good, unsure) == ("open", [])
    assert of(good, below) == ("refuted", ["necessity"])
    assert of(bad, unsure) == ("refuted", ["sufficiency"])
    assert of(none, none) == ("open", [])
    assert of(good, good, bad) == ("confirmed", [])
    assert Rule(0.1, 0.5).short(Estimate(0.3, 0.2, 0.4))
    assert not Rule(0.1, 0.5).short(Estimate(0.1, 0.05, 0.2))
    assert not Rule(0.1, 0.5).short(Estimate(0.3, np.nan, np.nan))
