"""Criteria of internal validity, each on circuits of which the answer is known, both ways, and on real models."""

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from circuitsae import ReplacementModel, load_dictionaries, load_model
from circuitsae.audit import (
    Choice,
    Cut,
    Estimate,
    FeatureSubject,
    GivenSource,
    HeadSubject,
    Judging,
    Settings,
    Subject,
    TaskSource,
)
from circuitsae.audit.criteria import INTERNAL
from circuitsae.audit.finding import Finding
from circuitsae.audit.internal import (
    confounds,
    dissociation,
    interactions,
    minimality,
    necessity,
    rescue,
    rivals,
    specificity,
)
from circuitsae.audit.planted import PROGRAMS
from circuitsae.audit.run import silent
from circuitsae.audit.subject import HELD, TEXT, Shown, Unit
from circuitsae.audit.texts import TOKENS, plain_text
from circuitsae.components import Edge
from circuitsae.components.known import squared_distance
from circuitsae.tasks import behaviour
from circuitsae.validation import Circuit
from transcoders.errors import InputError

SMALL = Settings(held_out=24, few=12, random=4, resamples=2, many=24)
Value = Callable[[set[str]], float]
"""Of the names of what is kept."""


def units(names: str) -> frozenset[Unit]:
    return frozenset(Edge(name, "out") for name in names)


class Made(Subject):
    """A made-up model: m of what is kept, times how much there is of it on each prompt."""

    kind = "heads"
    usual = Choice()

    def __init__(
        self,
        circuit: str,
        value: Value,
        *,
        pool: str = "abcdefghijklmnop",
        tasks: Mapping[str, Value] | None = None,
        prompts: Sequence[Shown] | None = None,
        effect: Callable[[set[str], Shown], float] = lambda kept, shown: 0.0,
        task: str = "ioi",
    ) -> None:
        self.units, self.value, self._pool, self.tasks = units(circuit), value, pool, dict(tasks or {})
        self.name = self.task = task
        self.prompts, self.effect = prompts, effect
        self.model: Any = SimpleNamespace(name="made", has_tokenizer=False)
        self.choices, self.candidates = (self.usual,), len(pool)

    @property
    def parts(self) -> Mapping[str, frozenset[Unit]]:
        return {name: units(name) for name in sorted(edge.writer for edge in self.units if isinstance(edge, Edge))}

    @property
    def pool(self) -> tuple[Unit, ...]:
        return tuple(units(self._pool))

    def judging(self, n: int, *, draw: int = HELD, choice: Choice | None = None) -> Judging:
        rng = np.random.default_rng(draw)
        prompts = self.prompts or [Shown(str(i), 10) for i in range(n)]
        size = rng.uniform(0.5, 1.5, len(prompts))

        def run(cuts: Sequence[Cut]) -> np.ndarray:
            found = []
            for cut in cuts:
                named = {edge.writer for edge in cut.units if isinstance(edge, Edge)}
                kept = set(self._pool) - named if cut.all_but else named
                found.append(size * self.value(kept) + [self.effect(kept, shown) for shown in prompts])
            return np.array(found)

        return Judging(run, prompts)

    def on_task(self, task: str) -> "Made":
        if task not in self.tasks:
            raise InputError(f"made has no task {task!r}.")
        names = "".join(edge.writer for edge in self.units if isinstance(edge, Edge))
        return Made(names, self.tasks[task], pool=self._pool, task=task)

    def judging_task(self, task: str, n: int, *, draw: int = HELD) -> Judging:
        return self.on_task(task).judging(n, draw=draw)

    def scores(self, n: int, draw: int = 0) -> Mapping[Unit, np.ndarray]:
        """What taking it out changes, or keeping it alone."""
        every = set(self._pool)
        return {
            Edge(name, "out"): np.full(n, self.value(every) - self.value(every - {name}) + self.value({name}) + 1e-3)
            for name in self._pool
        }

    def connected(self, units: Sequence[Unit]) -> frozenset[Unit]:
        return frozenset(units)

    def random(self, count: int, seed: int = 0) -> list[frozenset[Unit]]:
        return [frozenset(self.units)] * count


def found(criterion: Any, subject: Subject, settings: Settings = SMALL) -> Finding:
    return criterion.CRITERION.measure(subject, settings, silent)


def share(names: str) -> Value:
    """How much of these is kept."""
    return lambda kept: len(kept & set(names)) / len(names)


def both(first: str, second: str) -> Value:
    return lambda kept: float({first, second} <= kept)


def either(first: str, second: str) -> Value:
    return lambda kept: float(first in kept or second in kept)


def test_a_circuit_is_needed_if_nothing_is_left_without_it():
    true = found(necessity, Made("ab", both("a", "b")))
    assert true.status == "confirmed"
    assert [row["beyond noise"] for row in true.table] == [True, True]
    assert found(necessity, Made("cd", both("a", "b"))).status == "disconfirmed"
    backed_up = found(necessity, Made("ab", either("a", "b")))
    assert backed_up.status == "confirmed"
    assert "0 of 2 parts" in backed_up.said


def test_backups_inside_are_named_and_those_outside_refute():
    inside = found(interactions, Made("ab", either("a", "b")))
    assert inside.status == "confirmed"
    assert [row["kind"] for row in inside.table if row["and"] == "b"] == ["backup"]
    assert "backups are a with b (1.00)" in inside.said
    outside = found(interactions, Made("ac", lambda kept: either("a", "b")(kept) * 0.9 + share("c")(kept) * 0.1))
    assert outside.status == "disconfirmed"
    assert outside.estimate is not None
    assert outside.estimate.value == pytest.approx(0.9)
    path = found(interactions, Made("ab", both("a", "b")))
    assert [row["kind"] for row in path.table if row["and"] == "b"] == ["in one path"]
    sums = found(interactions, Made("ab", share("ab")))
    assert [row["kind"] for row in sums.table if row["and"] == "b"] == ["none"]


def test_one_idle_unit_of_a_dozen_is_seen():
    true = Made("abcdefghijkl", share("abcdefghijkl"))
    assert found(minimality, true).status == "confirmed"
    idle = found(minimality, Made("abcdefghijklm", share("abcdefghijkl")))
    assert idle.status == "disconfirmed"
    assert "Idle: m→out." in idle.said
    assert [row["unit"] for row in idle.table if not row["beyond noise"]] == ["m→out"]


def test_units_that_back_each_other_up_are_not_idle():
    backed = Made("abcdef", lambda kept: 0.5 * either("a", "b")(kept) + 0.5 * share("cdef")(kept))
    assert found(minimality, backed).status == "confirmed"


def test_a_unit_below_the_noise_of_prompts_is_not_shown_to_matter():
    prompts = [Shown(str(i), i) for i in range(12)]
    noisy = Made("abm", share("ab"), prompts=prompts, effect=lambda kept, s: 0.3 * (-1) ** s.length * ("m" in kept))
    assert found(minimality, noisy).status in ("inconclusive", "disconfirmed")


def test_a_circuit_is_specific_if_others_do_not_need_it():
    tasks = {TEXT: share("mnop"), "greater-than": share("efgh"), "induction": share("ijkl"), "agreement": share("mn")}
    true = found(specificity, Made("abcd", share("abcd"), tasks=tasks))
    assert true.status == "confirmed"
    assert {row["task"] for row in true.table if row["out"] == "circuit"} == {"ioi", *tasks}
    shared = found(specificity, Made("abcd", share("abcd"), tasks={name: share("ab") for name in tasks}))
    assert shared.status == "disconfirmed"
    assert "text needs a (0.50), b (0.50), c (0.00) by themselves" in shared.change
    assert found(specificity, Made("op", share("abcd"), tasks=tasks)).status == "inconclusive"
    assert found(specificity, Made("abcd", share("abcd"))).status == "untested"


def test_tasks_that_the_model_cannot_do_are_left_out():
    wrong = found(specificity, Made("ab", share("ab"), tasks={"greater-than": lambda kept: -share("abcd")(kept)}))
    assert wrong.status == "untested"
    assert "not above chance" in wrong.said


def test_a_rival_as_faithful_refutes():
    assert found(rivals, Made("abcd", share("abcd"))).status == "confirmed"
    twin = found(rivals, Made("abcd", lambda kept: max(share("abcd")(kept), share("efgh")(kept))))
    assert twin.status == "disconfirmed"
    assert twin.estimate == Estimate.exact(0.0)
    assert found(rivals, Made("abcdefghijklmnop", share("abcd"))).status == "untested"


def test_exchanges_find_a_rival_that_scores_miss():
    """Alone neither e nor f does anything, and with the circuit kept neither is missed: their scores are all alike."""
    hidden = Made("ab", lambda kept: max(both("a", "b")(kept), both("e", "f")(kept)), pool="abcdef")
    assert found(rivals, hidden).status == "disconfirmed"


def test_two_circuits_come_apart_or_do_not():
    true = found(dissociation, Made("abcd", share("abcd"), tasks={"greater-than": share("efgh")}))
    assert true.status == "confirmed"
    assert [round(row["lost"], 6) for row in true.table] == [1, 0, 0, 1]
    same = found(dissociation, Made("abcd", share("abcd"), tasks={"greater-than": share("abcd")}))
    assert same.status == "disconfirmed"
    assert "They share 100%" in same.said
    swapped = found(dissociation, Made("efgh", share("abcd"), tasks={"greater-than": share("efgh")}))
    assert swapped.status == "disconfirmed"
    assert found(dissociation, Made("abcd", share("abcd"))).status == "untested"


def test_an_effect_on_long_prompts_alone_is_confounded():
    rng = np.random.default_rng(0)
    prompts = [Shown(str(i), int(length)) for i, length in enumerate(rng.integers(8, 16, 60))]

    def long_alone(kept: set[str], shown: Shown) -> float:
        return (shown.length - 8) / 4 * ("a" in kept) + (16 - shown.length) / 4 * ("b" in kept)

    value = share("ab")
    confounded = found(confounds, Made("a", value, prompts=prompts, effect=long_alone))
    assert confounded.status == "disconfirmed"
    assert confounded.table[0]["confound"] == "length"
    assert found(confounds, Made("ab", value, prompts=prompts, effect=long_alone)).status == "confirmed"
    assert found(confounds, Made("a", value, prompts=prompts)).status == "confirmed"
    assert found(confounds, Made("ab", value)).status == "untested"


def test_what_varies_over_prompts_is_regressed_on_once():
    rng = np.random.default_rng(0)
    lengths = rng.integers(8, 16, 40).tolist()
    prompts = [Shown("", n, roles={"END": n - 1, "S": n // 2, "IO": 3, "gone": -1}) for n in lengths]
    names, x = confounds.predictors(Made("a", share("a")), prompts)
    assert names == ["length", "position of S"]
    assert np.allclose(x.mean(0), 0)


def test_restoring_a_circuit_brings_its_behaviour_back():
    true = found(rescue, Made("abcd", share("abcd")))
    assert true.status == "confirmed"
    assert true.chart is not None
    assert np.allclose(true.chart.y, [0, 0.25, 0.5, 0.75, 1])
    assert found(rescue, Made("op", share("abcd"))).status == "disconfirmed"

    def opposed(kept: set[str]) -> float:
        return 2 * ("a" in kept) + 0.5 * ("b" in kept) - 1.5 * ("c" in kept)

    overshoots = found(rescue, Made("abc", opposed))
    assert overshoots.status == "disconfirmed"
    assert "falls by 1.50" in overshoots.said


@pytest.fixture(scope="module")
def program() -> Any:
    return PROGRAMS[1].program(per_length=24)


def made_of(program: Any, edges: frozenset[Edge]) -> HeadSubject:
    problems = program.problems("resample", squared_distance)
    return HeadSubject(GivenSource("", program.model, problems), edges)


def test_a_program_with_its_true_circuit_passes(program):
    true = made_of(program, program.truth("resample"))
    for criterion in (necessity, minimality, rescue, rivals):
        assert found(criterion, true).status == "confirmed", criterion
    assert found(interactions, true).status in ("confirmed", "partly")
    assert found(specificity, true).status == found(dissociation, true).status == "untested"


def test_a_program_with_a_damaged_circuit_does_not(program):
    truth = program.truth("resample")
    idle = Edge("embed", "a0.h0.q")
    assert idle not in program.truth("zero")
    one_more = found(minimality, made_of(program, truth | {idle}))
    assert one_more.status == "disconfirmed"
    assert f"Idle: {idle}." in one_more.said
    for edge in sorted(truth):
        assert found(minimality, made_of(program, truth - {edge})).status != "confirmed"
    others = frozenset(made_of(program, truth).graph.edges) - program.truth("zero")
    wrong = made_of(program, frozenset(sorted(others)[:5]))
    assert found(necessity, wrong).status == found(rescue, wrong).status == "disconfirmed"
    assert found(rivals, wrong).status != "confirmed"


@pytest.fixture(scope="module")
def heads() -> HeadSubject:
    source = TaskSource("ioi", load_model("pocket"))
    scored = HeadSubject(source, [("embed", "logits")]).scored(8)
    return HeadSubject(source, [edge for edge in scored.ranked()[:20] if isinstance(edge, Edge)])


@pytest.mark.parametrize("criterion", [module.CRITERION for module in INTERNAL], ids=lambda criterion: criterion.key)
def test_costs_are_stated_before(heads, criterion):
    settings = Settings(held_out=12, few=6, random=4, resamples=2, many=24)
    result = criterion.measure(heads, settings, silent)
    assert result.status != "untested"
    assert 0.5 <= result.runs / criterion.runs(heads, settings) <= 2
    assert len(result.table) <= 200
    again = Finding.from_json(result.to_json())
    assert again.to_json() == result.to_json()
    assert result.said.endswith(".")


def test_texts_begin_as_they_are_read_and_their_next_token_is_known(heads):
    task = plain_text(heads.model, 12, 0)
    (pair,) = task.tokens(heads.model)
    assert pair.clean.shape == (12, TOKENS)
    rows = behaviour(heads.model, task).set_index("measure")
    assert rows.loc["top1", "clean"] > 0.3
    assert rows.loc["log_prob", "clean"] > rows.loc["log_prob", "corrupt"] + 1
    with pytest.raises(InputError, match="no tokenizer"):
        plain_text(PROGRAMS[0].program().model, 2, 0)


def test_features_are_cut_out_of_texts_that_lack_their_roles():
    model = ReplacementModel(load_model("pocket"), load_dictionaries("pocket"))
    circuit = Circuit.of(["0.1@IO", "0.1@S1", "1.err@IO"])
    subject = FeatureSubject(model, TaskSource("ioi", model.model), circuit)
    everywhere = subject.anywhere(subject.units)
    assert len(everywhere) == 2
    assert {unit.at for unit in everywhere if not isinstance(unit, Edge)} == {None}
    judge = subject.judging_task(TEXT, 3)
    f = judge.f([Cut(units, all_but=True) for units in (subject.units, everywhere)])
    assert f[0] == pytest.approx(1, abs=1e-9)  # texts have no IO
    assert abs(1 - f[1]) > 1e-4
