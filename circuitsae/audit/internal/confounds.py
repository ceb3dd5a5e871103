"""Does what the circuit does follow from a prompt's length, where things stand in it, or how common its words are?"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from circuitsae.audit.criterion import Criterion, Tell
from circuitsae.audit.finding import RESAMPLES, Chart, Estimate, Finding, Rule, untested
from circuitsae.audit.settings import Settings
from circuitsae.audit.subject import Cut, Judging, Shown, Subject
from circuitsae.validation.statistics import chance

PROMPTS_EACH = 5
"""Prompts for each thing regressed on, at least."""
SPREAD = 0.1
"""Of what the model does in the mean: a circuit's effect that varies less over prompts varies too little to matter."""
RULE = Rule(confirms=0.1, refutes=0.3)
"""A tenth of the variation may be chance; where such things explain 30 %, they are part of the effect."""


def measure(subject: Subject, settings: Settings, tell: Tell) -> Finding:
    """R²(y | b, x) − R²(y | b), both of predictions for prompts left out: what x explains beyond the behaviour.

    y is the circuit's effect on a prompt, m(M) − m(M∖C); b = m(M) − m(∅) what the model does there, so that what makes
    the behaviour itself harder is no confound of the circuit; x the prompt's length, the position of each role and the
    logarithm of the number of the token there, which byte-pair tokenizers give in order of frequency. Linear
    regressions; R² of y's variance, or of that of a tenth of the behaviour where y varies less. p by permuting prompts.
    """
    judge = subject.judging(settings.held_out)
    names, x = predictors(subject, judge.prompts)
    if not names:
        return untested(
            "confounds",
            f"The {len(judge.prompts)} prompts have one length and no roles whose place or words vary.",
            "Prompts of a task with roles and several templates or lengths would let it be tested.",
        )
    tell(f"the effect on each of {len(judge.prompts)} prompts against {', '.join(names)}")
    y, base = _effects(judge, subject)
    least = len(y) * (SPREAD * float(base.mean())) ** 2
    gained, total = _gain(y, base, x), _left(y, np.zeros((len(y), 0)))
    rng = np.random.default_rng(settings.seed)
    rows = rng.integers(0, len(y), (RESAMPLES, len(y)))
    found = Estimate.of(float(_share(gained, total, least)), _share(gained[rows], total[rows], least))
    shuffled = np.array([_share(_gain(y, base, x[rng.permutation(len(y))]), total, least) for _ in range(199)])
    p = chance(found.value, shuffled)
    alone = [float(_share(_gain(y, base, x[:, [i]]), total, least)) for i in range(len(names))]
    table = [
        {"confound": name, "explains alone": one, "correlation": float(np.corrcoef(x[:, i], y)[0, 1]) if y.std() else 0}
        for i, (name, one) in enumerate(zip(names, alone, strict=True))
    ]
    first = int(np.argmax(alone))
    return CRITERION.finding(
        found,
        f"Beyond what the model does, {', '.join(names)} explain {found} of how the circuit's effect varies over "
        f"{len(y)} prompts (permutation p = {p:.3f}); {names[first]} alone {alone[first]:.2f}.",
        f"Prompts in which {names[first]} is balanced would tell whether the circuit's effect needs it.",
        judged=judge,
        table=table,
        chart=Chart(x[:, first].tolist(), y.tolist(), x_title=names[first], y_title="m(M) − m(M∖C)"),
    )


def predictors(subject: Subject, prompts: Sequence[Shown]) -> tuple[list[str], Float[np.ndarray, "prompt x"]]:
    """What varies over the prompts: length, positions of roles, logarithms of token numbers there.

    Roles that some prompt lacks are left out, and what is a linear function of what came before; at most one for every
    five prompts, in this order.
    """
    roles = [role for role in dict.fromkeys(r for shown in prompts for r in shown.roles)
             if all(shown.roles.get(role, -1) >= 0 for shown in prompts)]  # fmt: skip
    columns = {"length": np.array([float(shown.length) for shown in prompts])}
    columns |= {f"position of {role}": np.array([float(shown.roles[role]) for shown in prompts]) for role in roles}
    if roles and subject.model.has_tokenizer:
        ids = [subject.model.to_tokens(shown.text).tolist() for shown in prompts]
        for role in roles:
            numbers = [row[shown.roles[role]] for row, shown in zip(ids, prompts, strict=True)]
            columns[f"frequency of {role}"] = np.log1p(np.array(numbers, dtype=float))
    names: list[str] = []
    x = np.zeros((len(prompts), 0))
    for name, column in columns.items():
        wider = np.column_stack([x, column - column.mean()])
        if len(names) < len(prompts) // PROMPTS_EACH - 1 and np.linalg.matrix_rank(wider, tol=1e-6) > len(names):
            names, x = [*names, name], wider
    return names, x


def _effects(judge: Judging, subject: Subject) -> tuple[np.ndarray, np.ndarray]:
    (without,) = judge.metric([Cut(subject.units, all_but=True)])
    empty, full = judge.ends
    return full - without, full - empty


def _left(y: Float[np.ndarray, "prompt"], x: Float[np.ndarray, "prompt x"]) -> Float[np.ndarray, "prompt"]:
    """Squared errors of predicting each prompt from the others, by least squares with a constant."""
    design = np.column_stack([np.ones(len(y)), x])
    q, r = np.linalg.qr(design)
    q = q[:, np.abs(np.diag(r)) > 1e-9 * np.abs(r).max()]
    held = np.clip(1 - (q * q).sum(1), 1e-9, None)
    return ((y - q @ (q.T @ y)) / held) ** 2


def _gain(y: np.ndarray, base: np.ndarray, x: np.ndarray) -> np.ndarray:
    return _left(y, base[:, None]) - _left(y, np.column_stack([base, x]))


def _share(gained: np.ndarray, total: np.ndarray, least: float) -> np.ndarray:
    return np.asarray(gained.sum(-1) / np.maximum(total.sum(-1), least))


CRITERION = Criterion(
    key="confounds",
    family="internal",
    question="Is the circuit's effect about the behaviour, not about length, position or common words?",
    figure="variance of its effect that they explain beyond the behaviour",
    rule=RULE,
    measure=measure,
    runs=lambda subject, settings: 3 * settings.held_out,
)
