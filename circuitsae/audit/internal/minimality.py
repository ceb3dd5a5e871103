"""Is every member needed? The largest change of f that taking it out makes, in the circuit and in parts of it.

After Wang et al. 2022 (section 4.2): for each member v the largest |f(C∖K) − f(C∖(K∪{v}))| over sets K of others.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from circuitsae.audit.criterion import Criterion, Tell
from circuitsae.audit.finding import Chart, Estimate, Finding, Rule
from circuitsae.audit.internal.members import MOST, SURE, beyond_noise, drawn, listed, p_values, units_or_parts
from circuitsae.audit.settings import Settings
from circuitsae.audit.subject import Cut, Judging, Subject, Unit

CONTEXTS = 8
"""Sets K in which a member that shows nothing in the whole circuit is tried again."""
SHARES = (0.1, 0.25)
"""Of the members, in every second K; the others take half of those that showed nothing: backups of each other."""
SPENT = 2
"""Circuits run to try members again, at most, for each member."""
RULE = Rule(confirms=0.01, refutes=0.002)
"""Wang et al. 2022 keep members that change the metric by 1 % of the model's; a fifth of that, nobody would draw."""


class _Tests:
    """Members taken out of the circuit without K, for several K each; of each member the test that shows most."""

    def __init__(self, subject: Subject, judge: Judging, members: Mapping[str, frozenset[Unit]]) -> None:
        self.subject, self.judge, self.members = subject, judge, members
        self.p = dict.fromkeys(members, np.inf)
        """Of the clearest test, corrected for the number of tests: half of the error goes to the whole circuit's."""
        self.change: dict[str, np.ndarray] = {}
        self.others = dict.fromkeys(members, 0)
        self.spent = 0

    def run(self, names: Sequence[str], k: frozenset[str]) -> None:
        """Each of the members with the others of K out."""
        sets = list(dict.fromkeys(gone for name in names for gone in (k - {name}, k | {name})))
        place = {gone: row for row, gone in enumerate(sets)}
        left = [self.subject.units.difference(*(self.members[name] for name in gone)) for gone in sets]
        metric = self.judge.metric([Cut(units) for units in left])
        change = np.array([metric[place[k - {name}]] - metric[place[k | {name}]] for name in names])
        self.spent += len(sets)
        for name, row, p in zip(names, change, p_values(self.judge, change).tolist(), strict=True):
            corrected = min(1.0, p * 2 * (CONTEXTS if k else 1))
            if corrected < self.p[name]:
                self.p[name], self.change[name], self.others[name] = corrected, row, len(k - {name})

    def quiet(self) -> list[str]:
        """Members that nothing yet shows to be needed, one of so many."""
        return [name for name in self.members if self.p[name] > SURE / len(self.members)]


def measure(subject: Subject, settings: Settings, tell: Tell) -> Finding:
    """The least over members of the largest change, with its interval over prompts.

    Members are the units, or, where there are more than 60, the parts. p of a member is its least over sets K,
    corrected for their number and then over members; where one is not significant, the interval goes down to 0. A
    member that is significant in the whole circuit is not tried in others, where its change may be larger.
    """
    members = drawn(units_or_parts(subject), settings.seed)
    tests = _Tests(subject, subject.judging(_prompts(settings, len(members))), members)
    tell(f"each of {len(members)} members out of the circuit on {len(tests.judge.prompts)} prompts")
    tests.run(list(members), frozenset())
    before, rng = tests.spent, np.random.default_rng(settings.seed)
    for number in range(CONTEXTS):
        quiet = tests.quiet()
        if not quiet or tests.spent - before + 1.5 * len(quiet) > max(2 * CONTEXTS, SPENT * len(members)):
            break
        tell(f"{len(quiet)} that show nothing yet, in a part of the circuit")
        tests.run(quiet, _others(list(members), quiet, number, rng))
    return _found(tests, settings.seed)


def _prompts(settings: Settings, members: int) -> int:
    """More of them for few members: an effect that few prompts show takes many to tell."""
    return max(settings.few, min(settings.held_out, settings.few * MOST // (4 * members)))


def _runs(subject: Subject, settings: Settings) -> int:
    n = min(MOST, len(units_or_parts(subject)))
    return 2 * _prompts(settings, n) * (2 + n)


def _others(names: list[str], quiet: list[str], number: int, rng: np.random.Generator) -> frozenset[str]:
    among, share = (names, SHARES[number // 2 % len(SHARES)]) if number % 2 or len(quiet) == 1 else (quiet, 0.5)
    return frozenset(among[i] for i in rng.choice(len(among), max(1, round(share * len(among))), replace=False))


def _found(tests: _Tests, seed: int) -> Finding:
    judge, names = tests.judge, list(tests.members)
    changes = judge.ends[0] + np.array([tests.change[name] for name in names])  # of a change too, f takes m(∅) away
    f, resampled = np.abs(judge.of(changes)), np.abs(judge.drawn(changes, seed=seed))
    matters = beyond_noise(np.array([tests.p[name] for name in names]))
    each = [_down_to_zero(Estimate.of(float(value), row), needed)
            for value, row, needed in zip(f, resampled, matters.tolist(), strict=True)]  # fmt: skip
    least = _down_to_zero(Estimate.of(float(f.min()), resampled.min(0)), bool(matters.all()))
    what = "unit" if len(tests.subject.units) <= MOST else "part"
    rows = [
        {what: name, "change": one.value, "low": one.low, "high": one.high, "others out": tests.others[name],
         "beyond noise": bool(needed)}
        for name, one, needed in zip(names, each, matters, strict=True)
    ]  # fmt: skip
    rows.sort(key=lambda row: row["change"])
    idle, weakest = [row[what] for row in rows if not row["beyond noise"]], rows[0][what]
    said = (
        f"{int(matters.sum())} of {len(names)} {what}s change f beyond noise when they are out; the least needed, "
        f"{weakest}, by {least.value:.3f} [{least.low:.3f}, {least.high:.3f}]."
    )
    return CRITERION.finding(
        least,
        said + (f" Idle: {listed(idle)}." if idle else ""),
        f"Without {listed(idle)} the circuit would be as good and have no idle {what}; more prompts may show them."
        if idle
        else f"A set of others without which {weakest} matters more would raise the least change.",
        judged=judge,
        table=rows,
        chart=Chart(
            [row[what] for row in rows], [row["change"] for row in rows], [row["low"] for row in rows],
            [row["high"] for row in rows], y_title="largest change of f", lines={"confirms": RULE.confirms},
        ),
    )  # fmt: skip


def _down_to_zero(found: Estimate, needed: bool) -> Estimate:
    return found if needed else Estimate(found.value, 0.0, found.high)


CRITERION = Criterion(
    key="minimality",
    family="internal",
    question="Is every member of the circuit needed?",
    figure="least over members of the largest change of f",
    rule=RULE,
    measure=measure,
    runs=_runs,
)
