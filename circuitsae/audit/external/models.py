"""Are the circuit's roles found in other models? Heads matched by what they do, never by their number."""

from collections.abc import Mapping, Sequence

import numpy as np

from circuitsae.audit.criterion import Criterion, Tell
from circuitsae.audit.external.by_role import roles_in, source_of_roles
from circuitsae.audit.finding import Chart, Estimate, Finding, Rule, untested
from circuitsae.audit.heads import TaskSource
from circuitsae.audit.settings import Settings
from circuitsae.audit.subject import HELD, Subject
from circuitsae.audit.untrained import untrained
from circuitsae.loading import load_model
from transcoders.errors import InputError
from transcoders.language_model import LanguageModel

DRAWS = 4
"""Sets of prompts on which roles are looked for."""
PER_PROMPT = 40
"""About so many runs of a prompt does it take to find the roles of a model's heads."""
CONTROL = "random weights"
Found = list[set[str]]
"""The roles that are found on each draw."""


def measure(subject: Subject, settings: Settings, tell: Tell) -> Finding:
    """The share of the circuit's roles that another model's heads have, less that of the model with random weights.

    The other model that has least of them is judged; the interval is over draws of prompts.
    """
    source = source_of_roles(subject)
    if source is None:
        return untested(
            "models", f"Roles are known of heads, on some tasks; not of {subject.kind} on {subject.task or 'these'}.",
            "Audit a circuit of heads on a task of circuitsae.reproduce.roles.PATTERNS.",
        )  # fmt: skip
    names = () if subject.claim is None else subject.claim.models
    try:
        named = {name: load_model(name) for name in names}
    except InputError as error:
        return untested("models", f"A model of the claim cannot be loaded: {error}", "Name models that are there.")
    tell(f"roles in {source.model.name}")
    own = _roles(source, source.model, settings, set(subject.parts))
    if not any(own):
        return untested("models", "No head of the circuit has a role.", "Audit a circuit whose heads have roles.")
    tell("roles with random weights")
    others = {CONTROL: _roles(source, untrained(source.model, settings.seed), settings)}
    for name, model in named.items():
        tell(f"roles in {name}")
        others[name] = _roles(source, model, settings)
    share = {name: shares(own, found) for name, found in others.items()}
    rows = [{"role": role, **{name: _often(role, found) for name, found in {"circuit": own, **others}.items()}}
            for role in sorted(set().union(*own))]  # fmt: skip
    runs = PER_PROMPT * DRAWS * settings.few * (1 + len(others))
    control = float(share[CONTROL].mean())
    if not names:
        return Finding(
            criterion="models", status="untested", runs=runs, table=rows,
            said=f"No other model is named; with random weights {control:.2f} of the circuit's roles are found.",
            change="Name other models, folders or names, under models in the claim file.",
        )  # fmt: skip
    worst = min(names, key=lambda name: share[name].mean())
    found = Estimate.mean(share[worst] - share[CONTROL], settings.seed)
    level = {name: Estimate.mean(each, settings.seed) for name, each in share.items()}
    return CRITERION.finding(
        found,
        f"Of the roles that heads of the circuit have, {level[worst]} are found in {worst}, and {control:.2f} with "
        f"random weights.",
        f"Roles that {worst} lacks, in the table, belong to this model's way of doing the task; or its heads share "
        "them out, below what a role asks for.",
        runs=runs,
        table=rows,
        chart=Chart(
            list(level), [e.value for e in level.values()], [e.low for e in level.values()],
            [e.high for e in level.values()], y_title="share of the circuit's roles",
        ),
    )  # fmt: skip


def shares(own: Sequence[set[str]], other: Sequence[set[str]]) -> np.ndarray:
    """Of each draw the share of one set of roles that is in the other; 0 where there are none."""
    return np.array([len(a & b) / len(a) if a else 0.0 for a, b in zip(own, other, strict=True)])


def _roles(source: TaskSource, model: LanguageModel, settings: Settings, among: set[str] | None = None) -> Found:
    found = []
    for draw in range(DRAWS):
        prompts = TaskSource(source.name, model, source.seed).task(settings.few, HELD + 1 + draw)
        members: Mapping[str, Sequence[str]] = roles_in(model, prompts)
        found.append({role for role, heads in members.items() if among is None or among & set(heads)})
    return found


def _often(role: str, found: Found) -> float:
    return sum(role in each for each in found) / len(found)


def _runs(subject: Subject, settings: Settings) -> int:
    names = () if subject.claim is None else subject.claim.models
    return 0 if source_of_roles(subject) is None else PER_PROMPT * DRAWS * settings.few * (2 + len(names))


CRITERION = Criterion(
    key="models",
    family="external",
    question="Are its roles found in other models?",
    figure="share of its roles found, beyond random weights",
    rule=Rule(confirms=0.75, refutes=0.25),  # three roles of four are the algorithm; one of four is a coincidence
    measure=measure,
    runs=_runs,
)
