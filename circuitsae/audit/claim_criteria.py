"""Is it said what is claimed, at which level, what would refute it, and who reads the parts so? Never: is it true."""

from circuitsae.audit.criterion import Criterion, Measure, Tell
from circuitsae.audit.finding import Finding, untested
from circuitsae.audit.settings import Settings
from circuitsae.audit.subject import Subject

NONE = "No claim file was given."
ASK = "Write one ({what}) and audit the circuit with it; circuitsae/audit/claims has examples."


def claim(subject: Subject, settings: Settings, tell: Tell) -> Finding:
    """A sentence, and roles whose members are all of the circuit."""
    own = subject.claim
    if own is None:
        return untested("claim", NONE, ASK.format(what="its key claim, a sentence"))
    strangers = [name for names in own.units.values() for name in names if not subject.has(name)]
    if strangers:
        return untested(
            "claim",
            f"The claim is about {', '.join(strangers[:5])}, which the circuit does not have.",
            "Audit the circuit that the claim is about, or claim something of this one.",
        )
    count = sum(map(len, own.units.values()))
    members = f" The {count} members that it names are in the circuit." if count else ""
    return _confirmed("claim", f"It is claimed: {own.claim}{members}", "Without the sentence it would be untested.")


def level(subject: Subject, settings: Settings, tell: Tell) -> Finding:
    """A level, with what has to be named for it: roles of an algorithm, their members of an implementation."""
    own = subject.claim
    if own is None or own.level is None:
        why = NONE if own is None else "The claim file does not say at which level it is meant."
        return untested("level", why, ASK.format(what="level: behaviour, algorithm or implementation"))
    bare = [role for role, names in own.units.items() if not names]
    if own.level != "behaviour" and not own.units:
        return untested("level", f"An {own.level} is claimed, and no role.", "List its roles under units.")
    if own.level == "implementation" and bare:
        return untested(
            "level", f"An implementation is claimed, and no member of {bare[0]!r} is named.",
            "Name the members of each role, or claim the algorithm.",
        )  # fmt: skip
    return _confirmed("level", f"It is claimed as {_with_article(own.level)}.", "Without a level it would be untested.")


def refutation(subject: Subject, settings: Settings, tell: Tell) -> Finding:
    """What would refute it, in words and as a prediction that can fail."""
    own = subject.claim
    if own is None or not own.refuted_by:
        why = NONE if own is None else "The claim file does not say what would refute it."
        return untested("refutation", why, ASK.format(what="refuted_by, a sentence each"))
    if not own.predictions:
        return untested(
            "refutation", "It is said what would refute the claim, and nothing is predicted that could fail.",
            "List predictions in the claim file.",
        )  # fmt: skip
    return _confirmed(
        "refutation",
        f"It would be refuted by this: {'; '.join(own.refuted_by)} ({len(own.predictions)} predictions can fail).",
        "Without refuted_by, or without predictions, it would be untested.",
    )


def interpretation(subject: Subject, settings: Settings, tell: Tell) -> Finding:
    """Every role with what it is said to do and who says so."""
    own = subject.claim
    if own is None or not own.units:
        why = NONE if own is None else "The claim file names no roles, so there is nothing to interpret."
        return untested("interpretation", why, ASK.format(what="units, and an interpretation of each role"))
    read = {each.role for each in own.interpretation}
    silent = [role for role in own.units if role not in read]
    if silent:
        return untested(
            "interpretation", f"Nobody says what {', '.join(map(repr, silent))} does.",
            "Give each role an interpretation: role, does, by.",
        )  # fmt: skip
    strangers = [role for role in read if role not in own.units]
    if strangers:
        return untested(
            "interpretation", f"{strangers[0]!r} is interpreted, and no role under units.", "List it under units.",
        )  # fmt: skip
    sources = dict.fromkeys(each.by for each in own.interpretation)
    return _confirmed(
        "interpretation",
        f"Each of {len(own.units)} roles is interpreted, after {'; '.join(sources)}.",
        "A role without an interpretation would leave it untested.",
        [{"role": each.role, "does": each.does, "by": each.by} for each in own.interpretation],
    )


def _confirmed(key: str, said: str, change: str, table: list[dict] | None = None) -> Finding:
    return Finding(criterion=key, status="confirmed", said=said, change=change, table=table or ())


def _with_article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _criterion(key: str, question: str, measure: Measure) -> Criterion:
    return Criterion(
        key=key, family="claim", question=question, figure="", rule=None, measure=measure,
        runs=lambda subject, settings: 0,
    )  # fmt: skip


CRITERIA = (
    _criterion("claim", "Is it said, in a sentence, what the circuit does?", claim),
    _criterion("level", "Is it said whether a behaviour, an algorithm or its implementation is claimed?", level),
    _criterion("refutation", "Is it said what would refute it?", refutation),
    _criterion("interpretation", "Is it said what each role does, and by whom?", interpretation),
)
