"""Criteria of measurement, each on subjects whose answer is known to be yes, and to be no."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch

from circuitsae import ReplacementModel, load_dictionaries, load_model
from circuitsae.audit import (
    Choice,
    Cut,
    FeatureSubject,
    Finding,
    GivenSource,
    HeadSubject,
    Judging,
    Settings,
    TaskSource,
)
from circuitsae.audit.features import few
from circuitsae.audit.measurement import (
    baselines,
    calibration,
    choices,
    consensus,
    invariance,
    reliability,
    selection,
)
from circuitsae.audit.naive import LAST, LOGITS, WRITES, naive_nodes
from circuitsae.audit.planted import PROGRAMS
from circuitsae.audit.subject import FOUND, HELD, NOTHING, WHOLE, Shown, Subject, Unit
from circuitsae.audit.untrained import untrained
from circuitsae.components import Edge, PatchingProblem, exact_nodes, run_keeping
from circuitsae.components.known import projection
from circuitsae.components.network import Network
from circuitsae.interventions import Error, Feature
from circuitsae.tasks.cases import prompt_task
from circuitsae.validation import Circuit
from circuitsae.validation.statistics import agreement
from circuitsae.validation.tasks import Cases
from transcoders.errors import InputError
from transcoders.random_models import random_model

SIZES = Settings(held_out=40, few=20, random=20, resamples=8)
SMALL = Settings(held_out=6, few=4, random=4, resamples=2)
UNITS = [Edge(f"u{i}", "logits") for i in range(100)]
TRUE, WRONG = frozenset(UNITS[:10]), frozenset(UNITS[50:60])
WORK = np.where(np.arange(100) < 10, 2.0 ** -np.arange(100), 1e-4 / (1 + np.arange(100)))
"""What each unit adds to the metric: the first ten nearly all of it, each half of the one before."""


class Sum(Subject):
    """Units that add to the metric what `work` says, in any way of judging, template or draw that it does not name."""

    kind = "heads"
    name = task = "sum"
    candidates = len(UNITS)
    usual = Choice()
    choices = (Choice(), Choice("zero"), Choice("mean"))

    def __init__(self, units=TRUE, *, work=None, score=WORK, noise=0.0):
        self.units = units
        self.work = {} if work is None else work
        self.score, self.noise = score, noise

    @property
    def parts(self):
        return {str(unit): frozenset([unit]) for unit in self.units}

    @property
    def pool(self):
        return tuple(UNITS)

    def judging(self, n, *, draw=HELD, choice=None):
        rng = np.random.default_rng(draw)
        shown = [Shown("", 1, "ab"[i % 2]) for i in range(n)]
        rows = np.stack(
            [next((self.work[k] for k in ((choice or self.usual).ablation, one.template, draw) if k in self.work), WORK)
             for one in shown]
        )  # fmt: skip
        rows = rows * (1 + 0.1 * rng.normal(size=rows.shape))

        def run(cuts):
            kept = np.array([[(unit in cut.units) != cut.all_but for unit in UNITS] for cut in cuts])
            return kept @ rows.T

        return Judging(run, shown)

    def judging_task(self, task, n, *, draw=HELD):
        raise InputError("no other task")

    def scores(self, n, draw=FOUND) -> Mapping[Unit, np.ndarray]:
        rng = np.random.default_rng(draw)
        return {unit: -self.score[i] + self.noise * rng.normal(size=n) for i, unit in enumerate(UNITS)}

    def connected(self, units):
        return frozenset(units)

    def random(self, count, seed=0):
        rng = np.random.default_rng(seed)
        return [frozenset(UNITS[i] for i in rng.choice(100, len(self.units), replace=False)) for _ in range(count)]


class Blank(Sum):
    """Its untrained model does as much."""

    def untrained(self, seed=0):
        return self


def found(module, subject, settings=SIZES) -> Finding:
    return module.CRITERION.measure(subject, settings, lambda step: None)


EVEN = np.where(np.arange(100) < 10, 0.1, 0.0)
FALLING = 1 / (1 + np.arange(100))
ELSEWHERE = WORK[::-1].copy()
AGAINST = np.where(np.arange(100) < 10, -0.5, np.where(np.arange(100) < 20, 1.5, 0.0))


@pytest.mark.parametrize(
    ("module", "subject", "status"),
    [
        (reliability, Sum(), "confirmed"),
        (reliability, Sum(WRONG), "disconfirmed"),
        (reliability, Sum(score=np.zeros(100), noise=1.0), "disconfirmed"),
        (baselines, Sum(work=dict.fromkeys("ab", EVEN)), "confirmed"),
        (baselines, Sum(WRONG), "disconfirmed"),
        (baselines, Sum(work=dict.fromkeys("ab", np.full(100, 0.01))), "disconfirmed"),
        (baselines, Blank(work=dict.fromkeys("ab", EVEN)), "disconfirmed"),
        (choices, Sum(), "confirmed"),
        (choices, Sum(work={"zero": AGAINST}), "disconfirmed"),
        (consensus, Sum(), "confirmed"),
        (consensus, Sum(WRONG), "disconfirmed"),
        (consensus, Sum(score=np.zeros(100), noise=1.0), "disconfirmed"),
        (calibration, Sum(score=FALLING, work=dict.fromkeys("ab", FALLING)), "confirmed"),
        (calibration, Sum(score=ELSEWHERE), "disconfirmed"),
        (invariance, Sum(), "confirmed"),
        (invariance, Sum(work={"b": ELSEWHERE}), "disconfirmed"),
        (selection, Sum(), "confirmed"),
        (selection, Sum(work={HELD: ELSEWHERE}), "disconfirmed"),
    ],
)  # fmt: skip
def test_a_criterion_tells_yes_from_no(module, subject, status):
    finding = found(module, subject)
    assert finding.status == status, (finding.said, finding.estimate)
    assert Finding.from_json(finding.to_json()).to_json() == finding.to_json()
    assert len(finding.table) <= 200
    assert finding.chart is not None
    assert len(finding.chart.x) == len(finding.chart.y)


def test_what_is_said_has_the_known_figures():
    by_chance = found(reliability, Sum(score=np.zeros(100), noise=1.0)).estimate
    assert by_chance is not None
    assert by_chance.value == pytest.approx(10 / 190, abs=0.05)
    rows = {row["choice"]: row["f"] for row in found(choices, Sum(work={"zero": AGAINST})).table}
    assert rows["resample"] == pytest.approx(1, abs=0.01)
    assert rows["zero"] == pytest.approx(-0.5, abs=0.05)
    idle = np.where(np.arange(100) < 5, 1.0, 0.0)
    members = found(selection, Sum(work=dict.fromkeys("ab", idle))).table
    assert {row["member"] for row in members if row["q"] <= 0.05} == {str(unit) for unit in UNITS[:5]}
    assert found(selection, Sum()).said.startswith("Chosen among 100 candidates")
    frequency = {row["of"]: row["frequency"] for row in found(consensus, Sum(WRONG)).table}
    assert frequency[str(UNITS[0])] == 1
    assert frequency[str(UNITS[55])] == 0


def test_one_wording_or_one_way_to_judge_is_no_comparison():
    class Plain(Sum):
        choices = (Choice(),)

        def judging(self, n, *, draw=HELD, choice=None):
            made = super().judging(n, draw=draw, choice=choice)
            return Judging(made.run, [replace_template(shown) for shown in made.prompts])

    def replace_template(shown):
        return shown._replace(template="one")

    for module in (choices, invariance):
        finding = found(module, Plain())
        assert finding.status == "untested"
        assert "two" in f"{finding.said} {finding.change}"


@pytest.fixture(scope="module")
def heads() -> HeadSubject:
    source = TaskSource("ioi", load_model("pocket"))
    scored = HeadSubject(source, [("embed", "logits")]).scored(8)
    return HeadSubject(source, [edge for edge in scored.ranked()[:60] if isinstance(edge, Edge)])


@pytest.mark.parametrize(
    "module", [reliability, baselines, choices, consensus, calibration, invariance, selection],
    ids=lambda module: module.CRITERION.key,
)  # fmt: skip
def test_costs_are_foreseen(heads, module, monkeypatch):
    monkeypatch.setattr(invariance, "LEAST", 2)
    settings = {invariance: replace(SMALL, held_out=20), choices: replace(SMALL, few=2)}.get(module, SMALL)
    finding = found(module, heads, settings)
    assert finding.status != "untested"
    assert 0.5 <= finding.runs / module.CRITERION.runs(heads, settings) <= 2


def of_program(name: str, kind: str) -> HeadSubject:
    """A hand-made program whose circuit is, by reasoning, right under resample or under zero ablation."""
    handmade = next(program for program in PROGRAMS if program.name == name)
    program = handmade.program()
    source = GivenSource(name, program.model, program.problems("resample", projection))
    return HeadSubject(source, handmade.resample if kind == "resample" else handmade.zero)


def test_choices_find_the_ablation_under_which_positions_are_missing():
    """Without the edges that carry positions a program's circuit is right where these are the same, and not at zero."""
    rows = {row["choice"]: row["f"] for row in found(choices, of_program("previous", "resample"), SMALL).table}
    assert rows["resample"] == pytest.approx(1)
    assert rows["resample, denoising"] == pytest.approx(1)
    assert abs(rows["zero"] - 1) > 0.1
    whole = found(choices, of_program("previous", "zero"), SMALL)
    assert whole.status == "confirmed"
    assert all(row["f"] == pytest.approx(1) for row in whole.table if not row["why"])
    assert [row["choice"] for row in whole.table if row["why"]] in ([], ["noise"])


@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj"])
def test_components_at_positions_are_those_that_hooks_replace(family):
    """All edges kept, heads and MLPs ablated away from a span: the model with the corrupt run's z and MLP there."""
    model = random_model(family, d_model=16, d_vocab=23, context=8, dtype=torch.float64)
    clean, corrupt = torch.randint(0, 23, (2, 3, 5), generator=torch.Generator().manual_seed(1))
    away = torch.tensor([[1, 0, 0, 1, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1]]).bool()

    def metric(logits):
        return logits[:, -1, 3] - logits[:, -1, 4]

    problem = PatchingProblem(
        model, clean, corrupt, metric, spans=torch.stack([~away, away]), span_names=("here", "away")
    )
    names = [f"blocks.{layer}.{part}" for layer in range(2) for part in ("attn.hook_z", "mlp.hook_out")]
    _, other = model.run_hooked(corrupt, read=names)

    def edit(name):
        def replaced(x):
            return torch.where(away.reshape(*away.shape, *[1] * (x.ndim - 2)), other[name].reshape(x.shape), x)

        return replaced

    expected = metric(model.run_hooked(clean, write={name: edit(name) for name in names})[0])
    edges = Network.of(model).graph.edges
    torch.testing.assert_close(run_keeping(problem, [edges], outside="away")[0], expected, rtol=1e-9, atol=1e-10)
    with pytest.raises(InputError, match="no span 'there'"):
        run_keeping(problem, [edges], outside="there")


def test_denoising_restores_a_component_in_the_corrupt_run(heads):
    problems, _ = heads.source.problems(4, HELD, Choice())
    swapped = [problem.swapped() for problem in problems]
    judge = heads.judging(4, choice=Choice(direction="denoising"))
    out = frozenset(edge for edge in heads.graph.edges if edge.writer == "a1.h1")
    corrupt, clean, restored = judge.metric([NOTHING, WHOLE, Cut(out)])
    effect = exact_nodes(swapped, ["a1.h1"]).values[:, 0, 0].double().numpy()
    assert np.allclose(restored - corrupt, effect, atol=1e-3)
    assert np.allclose([clean, corrupt], heads.judging(4).metric([WHOLE, NOTHING]), atol=1e-3)


def test_a_whole_component_keeps_every_edge_between_those_of_the_circuit(heads):
    few_edges = HeadSubject(heads.source, [Edge("embed", "a0.h0.v"), Edge("a0.h0", "m1"), Edge("m1", "logits")])
    whole = few_edges.judging(4, choice=Choice(granularity="node")).metric([few_edges.kept])
    edges = few_edges.of_parts(["a0.h0", "m1"])
    assert np.allclose(whole, few_edges.judging(4).metric([Cut(edges)]), atol=1e-6)


def test_paraphrases_are_templates_that_the_task_lacks(heads):
    other = heads.paraphrased()
    assert other is not None
    texts = [shown.text for shown in other.judging(20).prompts]
    assert any("commuting" in text or "lunch" in text for text in texts)
    assert not any("commuting" in shown.text for shown in heads.judging(40).prompts)
    assert HeadSubject(TaskSource("induction", heads.model), heads.edges).paraphrased() is None


def test_an_untrained_model_has_the_weights_and_not_the_behaviour(heads):
    other = untrained(heads.model)
    for (name, own), (_, made) in zip(heads.model.parts.parameters(), other.parts.parameters(), strict=True):
        assert not torch.equal(own, made), name
        size, other_size = (float(weight.detach().pow(2).mean().sqrt()) for weight in (own, made))
        assert other_size == pytest.approx(size, rel=0.3), name
    trained = heads.judging(8).ends.mean(1)
    blank = heads.untrained().judging(8).metric([NOTHING, WHOLE]).mean(1)
    assert abs(blank[1] - blank[0]) < 0.2 * (trained[1] - trained[0])


def test_naive_circuits_are_of_about_the_size(heads):
    made = heads.naive(4)
    assert set(made) == {WRITES, LOGITS, LAST}
    for circuit in made.values():
        assert 0.5 * len(heads.units) <= len(circuit) <= 1.5 * len(heads.units)
    layers = {edge.writer[1] for edge in made[LAST] if isinstance(edge, Edge) and edge.writer[0] in "am"}
    assert layers == {str(heads.model.n_layers - 1)}


def test_naive_nodes_are_those_that_write_most():
    model = ReplacementModel(load_model("pocket"), load_dictionaries("pocket"))
    source = TaskSource("ioi", model.model)
    cases = Cases(model, prompt_task(model.model, few(source, 2, FOUND))[0])
    trace, last = cases.recordings[0].trace, cases.recordings[0].roles["END"]
    rows = trace.features.index[trace.features.index[:, 1] == last][:40].tolist()
    pool = [*(Feature(layer, index, "END") for layer, _, index in rows), *(Error(layer, "END") for layer in range(2))]
    wrote = []
    for node in pool:
        size = 0.0
        for recording in cases.recordings:
            one = recording.trace
            if isinstance(node, Error):
                size += float(one.errors[node.layer, last].norm())
                continue
            active = torch.zeros(model.dictionaries.n_features(node.layer))
            here = (one.features.index[:, :2] == torch.tensor([node.layer, last])).all(1)
            active[one.features.index[here, 2]] = one.features.value[here]
            only = torch.zeros_like(active)
            only[node.index] = active[node.index]
            size += float(model.dictionaries.decode_layer(node.layer, only[None, None])[0, 0].norm())
        wrote.append(size)
    best = {pool[i] for i in np.argsort(wrote)[::-1][:5]}
    assert naive_nodes(cases, pool, 5)[WRITES] == best


def test_scores_of_features_foretell_the_effect_with_its_sign():
    model = ReplacementModel(load_model("pocket"), load_dictionaries("pocket"))
    subject = FeatureSubject(model, TaskSource("ioi", model.model), Circuit.of(["0.1@IO", "1.err@END"]))
    choice, sign = subject.foretold
    score = {unit: sign * float(values.mean()) for unit, values in subject.scores(2, HELD).items()}
    units = sorted(score, key=lambda unit: -abs(score[unit]))[:12]
    judge = subject.judging(2, choice=choice)
    whole, *without = judge.metric([WHOLE, *(Cut(frozenset([unit]), all_but=True) for unit in units)]).mean(1)
    assert agreement(np.array([score[unit] for unit in units]), np.array(without) - whole).spearman > 0.7
