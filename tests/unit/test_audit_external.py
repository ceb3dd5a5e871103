"""External validity and claims: doses against plain hooks, each criterion where it holds and where it does not."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from circuitsae import ReplacementModel, load_dictionaries, load_model
from circuitsae.audit import Choice, Cut, FeatureSubject, HeadSubject, Judging, Settings, Subject, TaskSource
from circuitsae.audit import audit as run_audit
from circuitsae.audit.claim import SCHEMA, Claim
from circuitsae.audit.criteria import CRITERIA
from circuitsae.audit.criterion import Criterion
from circuitsae.audit.external import doses, models, prediction, prompts, tasks
from circuitsae.audit.finding import Finding
from circuitsae.audit.subject import HELD, WHOLE, Shown, Unit
from circuitsae.audit.untrained import untrained
from circuitsae.components import Edge
from circuitsae.interventions import Intervention, Library, Scale, run_alternatives
from circuitsae.tasks.cases import prompt_task
from circuitsae.validation import Circuit
from circuitsae.validation.ablation import Ablated, Kept
from circuitsae.validation.tasks import Cases, as_prompt
from transcoders.errors import FileFormatError, InputError

SMALL = Settings(held_out=12, few=6, random=4, resamples=2, many=40)
PART, REST = Edge("a0.h0", "logits"), Edge("a0.h1", "logits")


class MadeUp(Subject):
    """A circuit of one edge whose metric is a given function of what is left of it, of the rest, and of the prompt."""

    kind = "heads"
    usual = Choice()
    choices = (usual,)
    candidates = 2
    name, task = "made up", "own"
    units = frozenset({PART})
    parts: Mapping[str, frozenset[Unit]] = {"a0.h0": units}  # pyright: ignore[reportIncompatibleMethodOverride]
    pool: tuple[Unit, ...] = (PART, REST)  # pyright: ignore[reportIncompatibleMethodOverride]

    def __init__(self, metric: Callable[..., np.ndarray], claim: Claim | None = None, **others: Callable) -> None:
        self.metric, self.claim = metric, claim
        self.tasks = dict.fromkeys(tasks.OTHERS, none_of_it) | others

    def judging(self, n: int, *, draw: int = HELD, choice: Choice | None = None) -> Judging:
        return self._judging(self.metric, n)

    def judging_task(self, task: str, n: int, *, draw: int = HELD) -> Judging:
        if task not in self.tasks:
            raise InputError(f"There is no task {task!r}.")
        return self._judging(self.tasks[task], n)

    def _judging(self, metric: Callable[..., np.ndarray], n: int) -> Judging:
        def run(cuts: Sequence[Cut]) -> np.ndarray:
            left = [[1.0 if (unit in cut.units) != cut.all_but else cut.left for unit in self.pool] for cut in cuts]
            return np.array([metric(*each, np.arange(n)) for each in left])

        return Judging(run, [Shown(f"prompt {i}", 5) for i in range(n)])

    def scores(self, n: int, draw: int = 0) -> Mapping[Unit, np.ndarray]:
        raise NotImplementedError

    def connected(self, units: Sequence[Unit]) -> frozenset[Unit]:
        return frozenset(units)

    def random(self, count: int, seed: int = 0) -> list[frozenset[Unit]]:
        raise NotImplementedError


def put(criterion: Criterion, subject: Subject, settings: Settings = SMALL) -> Finding:
    """What a criterion finds; its estimate of the cost is checked on the way."""
    found = criterion.measure(subject, settings, lambda step: None)
    if found.runs:
        assert found.runs / 2 <= criterion.runs(subject, settings) <= 2 * found.runs
    json.dumps(found.to_json(), allow_nan=False)
    return found


def status_of(found: Finding) -> tuple[str, float]:
    assert found.estimate is not None
    return found.status, found.estimate.value


def all_of_it(part, rest, i):
    return 2 * part + 0.1 * rest + 0.01 * i


def none_of_it(part, rest, i):
    return 0.1 * part + 2 * rest + 0.01 * i


@pytest.fixture(scope="module")
def heads() -> HeadSubject:
    source = TaskSource("greater-than", load_model("pocket"))
    found = HeadSubject(source, [("embed", "logits")]).scored(8)
    return HeadSubject(source, [edge for edge in found.ranked()[:150] if isinstance(edge, Edge)])


def test_a_dose_of_heads_is_that_of_plain_hooks(heads):
    chosen, dose = ["a1.h4", "a2.h0", "a3.h2"], 0.25
    units = frozenset().union(*(heads.named(name) for name in chosen))
    judge = heads.judging(6)
    metric = judge.metric(
        [Cut(units, True, dose), Cut(units, True, 1.0), WHOLE, Cut(units, True, 0.0), Cut(units, True)]
    )
    problems, _ = heads.source.problems(6, HELD, heads.usual)
    by_hand = []
    for problem in problems:
        names = [f"blocks.{layer}.attn.hook_z" for layer in (1, 2, 3)]
        _, corrupt = heads.model.run_hooked(problem.corrupt, read=names)

        def scaled(z, hook=None, *, layer, head, corrupt=corrupt):
            out = z.clone()
            out[:, :, head] = dose * z[:, :, head] + (1 - dose) * corrupt[f"blocks.{layer}.attn.hook_z"][:, :, head]
            return out

        write = {f"blocks.{layer}.attn.hook_z": lambda z, layer=layer, head=head: scaled(z, layer=layer, head=head)
                 for layer, head in ((1, 4), (2, 0), (3, 2))}  # fmt: skip
        logits, _ = heads.model.run_hooked(problem.clean, write=write)
        rows = torch.arange(len(problem))
        by_hand += problem.metric(logits[rows, problem.read][:, None]).tolist()
    assert np.allclose(metric[0], by_hand, atol=1e-5)
    assert np.abs(metric[0] - metric[2]).max() > 0.01
    assert np.allclose(metric[1], metric[2], atol=1e-5)
    assert np.array_equal(metric[3], metric[4])


def of_features(dictionaries: str, *nodes: str) -> FeatureSubject:
    model = ReplacementModel(load_model("pocket"), load_dictionaries(dictionaries))
    return FeatureSubject(model, TaskSource("ioi", model.model), Circuit.of(nodes))


@pytest.fixture(scope="module")
def features() -> FeatureSubject:
    return of_features("pocket", *CIRCUIT)


CIRCUIT = ("0.1@IO", "1.889@END", "1.err@END", "2.err@END", "3.err@END")
SPLICED = ("0.err@S2", "0.321@S2", "3.980@END")
"""Of autoencoders, no error after another change: one is live in ablations and the clean run's in interventions."""


@pytest.mark.parametrize(("dictionaries", "names"), [("pocket", CIRCUIT), ("pocket-sae", SPLICED)])
def test_a_dose_of_features_is_that_of_interventions(dictionaries, names):
    subject = of_features(dictionaries, *names)
    task, _ = prompt_task(subject.model, subject.source.task(2, HELD))
    cases, nodes = Cases(subject.replacement, task), subject.circuit.nodes
    metric = Ablated(cases, "zero", regime="model").metric(
        [Kept(nodes, True, 0.25), Kept(nodes, True, 1.0), Kept((), True)]
    )
    library = Library(subject.replacement)
    for number, example in enumerate(task.examples):
        row = (library[as_prompt(example)], [Intervention(node, Scale(0.25)) for node in nodes])
        (chunk,) = run_alternatives(subject.replacement, [row], "model", library=library)
        expected = float(example.measure(chunk.logits[:, -1])[0])
        assert metric[0, number] == pytest.approx(expected, abs=1e-4)
        assert abs(metric[0, number] - metric[2, number]) > 0.01
    assert np.allclose(metric[1], metric[2], atol=1e-4)


def test_doses_of_features_are_measured_alone_and_at_every_position(features):
    found = put(doses.CRITERION, features, Settings(few=3))
    assert {row["scaled"] for row in found.table} == {"units", "whole components"}
    assert [row["f"] for row in found.table if row["dose"] == 1] == pytest.approx([1, 1], abs=1e-4)


def test_a_behaviour_that_follows_the_dose_is_confirmed_and_one_that_does_not_is_refuted():
    rising = put(doses.CRITERION, MadeUp(all_of_it))
    assert status_of(rising) == ("confirmed", 1)
    assert "near-linearly" in rising.said
    falling = put(doses.CRITERION, MadeUp(lambda part, rest, i: -all_of_it(part, rest, i)))
    assert falling.status == "confirmed"
    swinging = put(doses.CRITERION, MadeUp(lambda part, rest, i: rest * (3 + np.sin(9 * part + i))))
    assert swinging.status == "disconfirmed"
    flat = put(doses.CRITERION, MadeUp(lambda part, rest, i: 2 * rest + 0.001 * part + 0.01 * i))
    assert status_of(flat) == ("disconfirmed", 0)
    late = put(doses.CRITERION, MadeUp(lambda part, rest, i: part**8 + 0.001 * part + 0.1 * rest + 0.01 * i))
    assert "not in proportion" in late.said


def test_the_worst_prompts_are_shown_and_counted():
    good = put(prompts.CRITERION, MadeUp(all_of_it), Settings(many=200))
    assert good.status == "confirmed"
    assert good.estimate is not None
    assert good.estimate.low < 1 == good.estimate.value

    def two_ways(part, rest, i):  # every third prompt goes by the rest
        return np.where(i % 3 == 0, none_of_it(part, rest, i), all_of_it(part, rest, i))

    mixed = put(prompts.CRITERION, MadeUp(two_ways), Settings(many=200))
    assert status_of(mixed) == ("disconfirmed", pytest.approx(133 / 200))
    assert all(int(row["prompt"].split()[1]) % 3 == 0 for row in mixed.table)
    assert len(mixed.table) == 5


def test_prompts_have_the_f_of_the_circuit_in_the_mean(heads):
    found = put(prompts.CRITERION, heads, Settings(many=5))
    judge = heads.judging(5)
    assert np.mean([row["f"] for row in found.table]) == pytest.approx(judge.f([heads.kept])[0], abs=1e-5)
    assert {row["prompt"] for row in found.table} == {shown.text for shown in judge.prompts}


def test_tasks_that_are_claimed_are_done_or_not():
    claim = Claim(claim="It adds.", extends_to=("sums", "products"))
    both = put(tasks.CRITERION, MadeUp(all_of_it, claim, sums=all_of_it, products=all_of_it))
    assert both.status == "confirmed"
    assert [row["task"] for row in both.table if row["claimed"]] == ["sums", "products"]
    one = put(tasks.CRITERION, MadeUp(all_of_it, claim, sums=all_of_it, products=none_of_it))
    assert (one.status, "products" in one.said) == ("disconfirmed", True)
    lost = put(tasks.CRITERION, MadeUp(all_of_it, claim, sums=all_of_it))
    assert (lost.status, "no task 'products'" in lost.said) == ("untested", True)
    undone = MadeUp(all_of_it, claim, sums=all_of_it, products=lambda part, rest, i: -all_of_it(part, rest, i))
    assert "in the model and" in put(tasks.CRITERION, undone).said
    assert put(tasks.CRITERION, MadeUp(all_of_it)).status == "untested"


def test_roles_are_found_in_a_model_that_has_them_and_not_in_one_that_has_learned_nothing(heads, monkeypatch):
    monkeypatch.setattr(models, "DRAWS", 1)
    few = Settings(few=3)
    monkeypatch.setattr(heads, "claim", Claim(claim="It reads years.", models=("pocket",)))
    same = put(models.CRITERION, heads, few)
    assert status_of(same) == ("confirmed", 1)
    assert all(row[models.CONTROL] == 0 for row in same.table)
    monkeypatch.setattr(models, "load_model", lambda name: untrained(heads.model, 5))
    other = put(models.CRITERION, heads, few)
    assert status_of(other) == ("disconfirmed", 0)
    monkeypatch.setattr(models, "load_model", load_model)
    monkeypatch.setattr(heads, "claim", Claim(claim="It reads years.", models=("/nowhere",)))
    assert "cannot be loaded" in put(models.CRITERION, heads, few).said


def test_roles_of_what_has_none_are_untested(features):
    assert put(models.CRITERION, features).status == "untested"
    assert put(models.CRITERION, MadeUp(all_of_it)).status == "untested"
    assert models.shares([{"a", "b"}, set()], [{"b", "c"}, {"a"}]).tolist() == [0.5, 0]


def predicted(*each: dict) -> Claim:
    return Claim.from_json(
        {"claim": "It adds.", "units": {"adder": ["a0.h0"], "nobody": "found"}, "predictions": list(each)}
    )


def test_predictions_come_true_or_fail():
    falls, stays = {"metric": "falls", "at_least": 0.9}, {"metric": "stays", "at_most": 0.1}
    ablate, alone = {"change": "ablate", "role": "adder"}, {"change": "keep", "expect": stays}
    half = {"change": "scale", "dose": 0.5, "units": ["a0.h0→logits"],
            "expect": {"metric": "falls", "at_least": 0.4, "at_most": 0.6}}  # fmt: skip
    elsewhere = {**ablate, "on": "products", "expect": stays}
    right = predicted({**ablate, "expect": falls}, alone, half, elsewhere)
    found = put(prediction.CRITERION, MadeUp(all_of_it, right, products=none_of_it))
    assert status_of(found) == ("confirmed", 1)
    assert [row["verdict"] for row in found.table] == ["held"] * 4
    assert found.table[0]["change"] == pytest.approx(-2 / 2.1)
    wrong = put(prediction.CRITERION, MadeUp(none_of_it, right, products=all_of_it))
    assert status_of(wrong) == ("disconfirmed", 0)
    assert {row["verdict"] for row in wrong.table} == {"failed"}


def test_predictions_about_nobody_fail_and_those_that_cannot_be_tested_say_so():
    falls = {"metric": "falls", "at_least": 0.9}
    nobody = put(
        prediction.CRITERION, MadeUp(all_of_it, predicted({"change": "ablate", "role": "nobody", "expect": falls}))
    )
    assert (nobody.status, nobody.table[0]["verdict"]) == ("disconfirmed", "failed: nobody has the role")
    for bad in ({"on": "sums"}, {"units": ["m9"]}):
        claim = predicted({"change": "ablate", "expect": falls, **bad})
        assert put(prediction.CRITERION, MadeUp(all_of_it, claim)).status == "untested"
    assert put(prediction.CRITERION, MadeUp(all_of_it)).status == "untested"


def test_what_a_role_predicts_is_what_ablating_its_heads_does(heads, monkeypatch):
    claim = {"claim": "It reads years.", "units": {"year reader": "found", "late": ["m3"]}, "predictions": [
        {"change": "ablate", "role": role, "expect": {"metric": "falls", "at_least": 0.1}}
        for role in ("year reader", "late")
    ]}  # fmt: skip
    monkeypatch.setattr(heads, "claim", Claim.from_json(claim))
    found = put(prediction.CRITERION, heads, Settings(few=4))
    judge = heads.judging(4)
    for row in found.table:
        names = str(row["units"]).split(", ")
        gone = Cut(frozenset(edge for edge in heads.graph.edges if edge.writer in names), all_but=True)
        assert row["change"] == pytest.approx(judge.f([gone])[0] - 1)
    assert set(str(found.table[0]["units"]).split(", ")) <= set(heads.parts)


SHIPPED = sorted(SCHEMA.parent.glob("*.toml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_claims_that_are_shipped_are_whole(path, heads, monkeypatch):
    monkeypatch.setattr(heads, "claim", Claim.load(path))
    assert len(Claim.load(path).predictions) >= 5
    for criterion in CRITERIA:
        if criterion.family == "claim":
            assert put(criterion, heads).status == "confirmed", criterion.key


def test_what_a_claim_lacks_is_asked_for(tmp_path):
    (tmp_path / "claim.json").write_text(json.dumps(full := {
        "claim": "It adds.", "level": "implementation", "units": {"adder": ["a0.h0"]}, "refuted_by": ["It does not."],
        "interpretation": [{"role": "adder", "does": "adds", "by": "us"}],
        "predictions": [{"change": "ablate", "expect": {"metric": "falls"}}],
    }))  # fmt: skip
    whole = Claim.load(tmp_path / "claim.json")
    assert statuses(whole) == {"claim": "confirmed", "level": "confirmed", "refutation": "confirmed",
                               "interpretation": "confirmed"}  # fmt: skip
    assert set(statuses(None).values()) == {"untested"}
    for key, criterion in (("level", "level"), ("refuted_by", "refutation"), ("predictions", "refutation"),
                           ("interpretation", "interpretation")):  # fmt: skip
        lacking = Claim.from_json({name: value for name, value in full.items() if name != key})
        assert [name for name, status in statuses(lacking).items() if status == "untested"] == [criterion]
    strange = Claim.from_json({**full, "units": {"adder": ["a0.h1"]}})
    assert statuses(strange)["claim"] == "untested"
    bare = Claim.from_json({**full, "units": {"adder": "found"}})
    assert statuses(bare)["level"] == "untested"


def statuses(claim: Claim | None) -> dict[str, str]:
    subject = MadeUp(all_of_it, claim)
    return {each.key: put(each, subject).status for each in CRITERIA if each.family == "claim"}


@pytest.mark.parametrize(
    ("record", "said"),
    [({"claim": "It adds.", "extend_to": []}, "did you mean 'extends_to'"),
     ({"level": "algorithm"}, "'claim' is a required property"),
     ({"claim": "It adds.", "level": "mechanism"}, "level: 'mechanism' is not one of"),
     ({"claim": "It adds.", "units": {"adder": []}}, "units.adder"),
     ({"claim": "It adds.", "predictions": [{"change": "ablate", "role": "adder", "expect": {"metric": "falls"}}]},
      "list it under units"),
     ({"claim": "It adds.", "predictions": [{"change": "scale", "expect": {"metric": "falls"}}]}, "must have a dose"),
     ({"claim": "It adds.", "predictions": [{"change": "keep", "expect": {"metric": "stays"}}]}, "stays takes at_most"),
     ({"claim": "It adds.", "predictions": [{"change": "keep", "expect": {"metric": "falls", "at_last": 1}}]},
      "did you mean 'at_least'"),
     ([], "is not of type 'object'")],
)  # fmt: skip
def test_a_claim_that_cannot_be_read_is_refused_in_one_sentence(record, said):
    with pytest.raises(FileFormatError, match=said) as refused:
        Claim.from_json(record)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_no_claim_is_refused(tmp_path):
    (tmp_path / "claim.toml").write_text("claim = ")
    with pytest.raises(FileFormatError, match="is no claim file"):
        Claim.load(tmp_path / "claim.toml")
    with pytest.raises(FileFormatError, match="is no claim file"):
        Claim.load(tmp_path / "none.json")


def test_another_claim_is_another_audit(heads, tmp_path, monkeypatch):
    def kept() -> int:
        run_audit(heads, settings=SMALL, only=["claim"], keep=tmp_path)
        return len(list(Path(tmp_path).iterdir()))

    assert kept() == 1
    monkeypatch.setattr(heads, "claim", Claim(claim="It reads years."))
    assert kept() == 2
    assert kept() == 2
