"""Is the circuit needed? f of the model with the circuit out, and with each of its parts out alone."""

from circuitsae.audit.criterion import Criterion, Tell
from circuitsae.audit.finding import Chart, Estimate, Finding, Rule
from circuitsae.audit.internal.members import MOST, beyond_noise, drawn, listed, p_values
from circuitsae.audit.settings import Settings
from circuitsae.audit.subject import WHOLE, Cut, Subject


def measure(subject: Subject, settings: Settings, tell: Tell) -> Finding:
    """f(M∖C) with its interval over prompts; of each part v the change 1 − f(M∖v), and which are beyond noise.

    A circuit that holds more than is needed passes as well (`minimality`, `specificity`). Parts that others back up
    change nothing alone (`interactions`).
    """
    judge, few = subject.judging(settings.held_out), subject.judging(settings.few)
    tell(f"the model without the circuit on {len(judge.prompts)} prompts")
    (left,) = judge.estimates([Cut(subject.units, all_but=True)], seed=settings.seed)
    parts = drawn(subject.parts, settings.seed)
    tell(f"the model without each of {len(parts)} parts on {len(few.prompts)} prompts")
    metric = few.metric([WHOLE, *(Cut(units, all_but=True) for units in parts.values())])
    matters = beyond_noise(p_values(few, metric[0] - metric[1:]))
    resampled = few.drawn(metric[1:], seed=settings.seed)
    lost = [Estimate.of(1 - float(f), 1 - row) for f, row in zip(few.of(metric[1:]), resampled, strict=True)]
    idle = [name for name, needed in zip(parts, matters, strict=True) if not needed]
    rows = [
        {"part": name, "units": len(parts[name]), "lost": loss.value, "low": loss.low, "high": loss.high,
         "beyond noise": bool(needed)}
        for name, loss, needed in zip(parts, lost, matters, strict=True)
    ]  # fmt: skip
    alone = f" Without {listed(idle)} alone nothing changes beyond noise." if idle else ""
    return CRITERION.finding(
        left,
        f"With the circuit out and all else kept, {left} of what the model does is left; {int(matters.sum())} of "
        f"{len(parts)} parts change it when only they are out ({matters.mean():.0%}).{alone}",
        f"Units outside the circuit still do {max(0.0, left.value):.2f} of it; the circuit with those of them that "
        "matter once it is out would leave less.",
        judged=judge,
        runs=few.runs,
        table=sorted(rows, key=lambda row: -abs(row["lost"])),
        chart=Chart(
            ["circuit", *parts], [left.value, *(1 - loss.value for loss in lost)],
            [left.low, *(1 - loss.high for loss in lost)], [left.high, *(1 - loss.low for loss in lost)],
            y_title="f without it", lines={"the model": 1.0, "nothing": 0.0},
        ),
    )  # fmt: skip


CRITERION = Criterion(
    key="necessity",
    family="internal",
    question="Is the behaviour gone without the circuit?",
    figure="f of the model without the circuit",
    # as far from gone as sufficiency may be from whole: what is missing alone is to be what is left without
    rule=Rule(confirms=0.13, refutes=0.5),
    measure=measure,
    runs=lambda subject, settings: 3 * settings.held_out + (3 + min(MOST, len(subject.parts))) * settings.few,
)
