"""An audit: bars, intervals, cuts against the methods beneath, and what is kept of one that was ended."""

import json
from collections import Counter

import numpy as np
import pytest
from scipy import stats

from circuitsae import ReplacementModel, load_dictionaries, load_model
from circuitsae.audit import Audit, Choice, Cut, Estimate, FeatureSubject, HeadSubject, Rule, Settings, TaskSource
from circuitsae.audit import audit as run_audit
from circuitsae.audit.criteria import CRITERIA
from circuitsae.audit.features import few
from circuitsae.audit.heads import rewired
from circuitsae.audit.subject import WHOLE
from circuitsae.components import Edge, Judge, problems_of
from circuitsae.tasks.cases import prompt_task
from circuitsae.validation import Circuit, faithfulness
from transcoders.errors import FileFormatError, InputError, Stopped

SMALL = Settings(held_out=12, few=6, random=4, resamples=2, many=24)


@pytest.fixture(scope="module")
def heads() -> HeadSubject:
    source = TaskSource("ioi", load_model("pocket"))
    found = HeadSubject(source, [("embed", "logits")]).scored(8)
    return HeadSubject(source, [edge for edge in found.ranked()[:60] if isinstance(edge, Edge)])


@pytest.mark.parametrize(
    ("low", "high", "status"),
    [(0.92, 1.0, "confirmed"), (0.7, 0.95, "partly"), (0.6, 0.8, "partly"), (0.3, 0.95, "inconclusive"),
     (0.1, 0.4, "disconfirmed"), (np.nan, np.nan, "inconclusive")],
)  # fmt: skip
def test_a_status_follows_from_the_interval_and_two_bars(low, high, status):
    assert Rule(0.9, 0.5).status(Estimate(low, low, high)) == status
    assert Rule(-0.9, -0.5).status(Estimate(-low, -high, -low)) == status


def test_cuts_of_edges_are_those_of_the_judge(heads):
    judge = heads.judging(12)
    own = Judge(problems_of(heads.model, heads.source.task(12, 11)))
    every = frozenset(heads.graph.edges)
    f = judge.f([heads.kept, Cut(heads.units, all_but=True), WHOLE])
    assert np.allclose(f, own.faithfulness([heads.edges, every - heads.edges, every]).numpy(), atol=1e-6)
    assert judge.runs == 12 * 5
    assert len(judge.prompts) == 12


def test_intervals_of_prompts_agree_with_scipy(heads):
    judge = heads.judging(12)
    (found,) = judge.estimates([heads.kept])
    metric = judge.metric([heads.kept])[0]
    empty, full = judge.ends

    def f(circuit, none, whole, axis=-1):
        return (circuit.mean(axis) - none.mean(axis)) / (whole.mean(axis) - none.mean(axis))

    other = stats.bootstrap((metric, empty, full), f, paired=True, vectorized=True, method="percentile", rng=0)
    assert found.value == pytest.approx(f(metric, empty, full))
    width = found.high - found.low
    assert np.allclose([found.low, found.high], list(other.confidence_interval), atol=0.15 * width)


def test_random_circuits_keep_every_degree(heads):
    made = rewired(heads.graph, heads.edges, np.random.default_rng(0))
    assert made != heads.edges
    assert len(made & heads.edges) < 0.6 * len(made)
    for end in (0, 1):
        own, others = (sorted(Counter(edge[end] for edge in edges).values()) for edges in (heads.edges, made))
        assert own == others
    assert len(heads.graph.check_edges(made)) == len(heads.edges)


def test_noise_leaves_the_mean_and_spreads_as_the_contributions_do(heads):
    problems, _ = heads.source.problems(12, 11, Choice("noise"))
    from circuitsae.components.problem import Prepared

    part = Prepared(problems[0])
    added = part.delta.flatten(1, 2)
    own = part.clean.writes.flatten(1, 2)
    wide = own.std(1) > 0.1 * own.std(1).amax(1, keepdim=True)
    ratio = (added.std(1) / own.std(1))[wide]
    assert float(ratio.mean()) == pytest.approx(1, abs=0.1)
    assert float((part.delta - Prepared(problems[0]).delta).abs().max()) == 0


def test_cuts_of_features_are_those_of_faithfulness():
    model = ReplacementModel(load_model("pocket"), load_dictionaries("pocket"))
    source = TaskSource("ioi", model.model)
    circuit = Circuit.of(["0.1@IO", "1.2@END", "1.err@END", "2.err@END", "3.err@END"])
    subject = FeatureSubject(model, source, circuit)
    judge = subject.judging(4)
    task, _ = prompt_task(model.model, few(source, 4, 11))
    curve = faithfulness(model, circuit, task, sizes=[5], ablation="zero", regime="model")
    assert judge.f([subject.kept])[0] == pytest.approx(curve.f[0], abs=1e-5)
    assert judge.f([WHOLE])[0] == pytest.approx(1)


def test_an_audit_that_was_ended_goes_on(heads, tmp_path):
    def stop(step):
        raise KeyboardInterrupt

    with pytest.raises(Stopped, match="sufficiency"):
        run_audit(heads, settings=SMALL, only=["sufficiency"], keep=tmp_path, progress=lambda step: stop(step))
    found = run_audit(heads, settings=SMALL, only=["sufficiency"], keep=tmp_path)
    told: list[str] = []
    again = run_audit(heads, settings=SMALL, only=["sufficiency"], keep=tmp_path, progress=told.append)
    assert not told
    assert again.to_json() == found.to_json()
    found.save(tmp_path / "audit.json")
    assert Audit.load(tmp_path / "audit.json").to_json() == json.loads((tmp_path / "audit.json").read_text())


def test_what_is_kept_is_of_the_same_prompts_and_dictionaries(heads, tmp_path):
    told: list[str] = []
    run_audit(heads, settings=SMALL, only=["sufficiency"], keep=tmp_path)
    other = HeadSubject(TaskSource("ioi", heads.model, seed=1), heads.edges)
    run_audit(other, settings=SMALL, only=["sufficiency"], keep=tmp_path, progress=told.append)
    assert told
    source, circuit = TaskSource("ioi", heads.model), Circuit.of(["0.1@IO"])
    sets = [load_dictionaries(name) for name in ("pocket", "pocket-plt")]
    clt, plt = (FeatureSubject(ReplacementModel(heads.model, each), source, circuit) for each in sets)
    assert clt.identity != plt.identity


def test_what_cannot_be_audited_is_refused(heads, tmp_path):
    with pytest.raises(InputError, match="no criterion 'sufficient'"):
        run_audit(heads, only=["sufficient"])
    with pytest.raises(InputError, match="no edges"):
        HeadSubject(heads.source, [])
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(FileFormatError, match="is no audit"):
        Audit.load(tmp_path / "other.json")


def test_criteria_have_names_of_their_own():
    keys = [criterion.key for criterion in CRITERIA]
    assert len(set(keys)) == len(keys)
