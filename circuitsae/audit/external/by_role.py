"""Which of a circuit's heads have which role, as its claim says or as they behave."""

from collections.abc import Mapping

from circuitsae.audit.heads import HeadSubject, TaskSource
from circuitsae.audit.subject import FOUND, Subject
from circuitsae.reproduce.roles import PATTERNS, head_roles
from circuitsae.tasks import Task
from transcoders.language_model import LanguageModel

Members = Mapping[str, tuple[str, ...]]
"""Of each role the names of who has it."""


def source_of_roles(subject: Subject) -> TaskSource | None:
    """Where a subject's prompts come from, if roles of heads are known on its task."""
    if not isinstance(subject, HeadSubject) or not isinstance(subject.source, TaskSource):
        return None
    return subject.source if subject.source.name in PATTERNS else None


def roles_in(model: LanguageModel, task: Task) -> Members:
    """The heads of a model by the roles that they are found in."""
    table = head_roles(model, task)
    if table.empty:
        return {}
    return {str(role): tuple(rows["head"]) for role, rows in table.groupby("role", sort=False)}


def members(subject: Subject, n: int) -> Members:
    """The members of each role of the subject's claim; of roles to be found, the circuit's heads that behave so.

    Roles are found on the `n` first prompts that circuits are found on, never on those that they are judged on.
    """
    named = dict(subject.claim.units) if subject.claim else {}
    source = source_of_roles(subject)
    if source is None or all(named.values()):
        return named
    found = roles_in(source.model, source.task(n, FOUND))
    return {
        role: names or tuple(head for head in found.get(role, ()) if head in subject.parts)
        for role, names in named.items()
    }
