"""An audit: one criterion after the other, each measured once."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from signal import SIGINT

from circuitsae.audit.criteria import CRITERIA
from circuitsae.audit.criterion import Criterion, Tell
from circuitsae.audit.finding import Finding
from circuitsae.audit.result import Audit, described
from circuitsae.audit.settings import Settings
from circuitsae.audit.subject import Subject, unit_name
from transcoders.errors import InputError, Stopped
from transcoders.files import short_hash, write_json


def silent(step: str) -> None:
    """Tells nobody."""


def audit(
    subject: Subject,
    *,
    settings: Settings = Settings(),
    only: Sequence[str] = (),
    criteria: Sequence[Criterion] = CRITERIA,
    progress: Tell = silent,
    keep: str | Path | None = None,
) -> Audit:
    """Put a circuit to every criterion's test, or to those that `only` names.

    `progress` is told each criterion, and each step of it, as it begins. `keep`: a folder for the findings; called
    again after it was ended, with the same circuit and settings, it takes what is there and comes to the same audit.
    Raises `InputError` for a criterion that there is not, and on Ctrl-C, with `keep`, `Stopped`.
    """
    chosen = chosen_criteria(criteria, only)
    place = None if keep is None else _folder(Path(keep), subject, settings)
    findings = []
    for number, criterion in enumerate(chosen, 1):
        said = f"{criterion.key} ({number} of {len(chosen)})"
        file = None if place is None else place / f"{criterion.key.replace(' ', '-')}.json"
        found = _kept(file)
        if found is None:
            start = time.perf_counter()
            try:
                progress(said)
                found = criterion.measure(subject, settings, lambda step, said=said: progress(f"{said}: {step}"))
            except KeyboardInterrupt as stopped:
                if keep is None:
                    raise
                raise Stopped(
                    f"Stopped in {criterion.key}; what was measured before is kept, and the same command goes on.",
                    SIGINT,
                ) from stopped
            found = replace(found, seconds=round(time.perf_counter() - start, 2))
            if file is not None:
                write_json(file, found.to_json())
        findings.append(found)
    return Audit(
        subject=subject.name, kind=subject.kind, task=subject.task, model=subject.model.name,
        units=tuple(sorted(map(unit_name, subject.units))), settings=settings, criteria=described(chosen),
        findings=tuple(findings),
    )  # fmt: skip


def chosen_criteria(criteria: Sequence[Criterion], only: Sequence[str]) -> list[Criterion]:
    """The criteria that `only` names, or all; raises `InputError` for a name that there is not."""
    known = [criterion.key for criterion in criteria]
    for key in only:
        if key not in known:
            raise InputError(f"There is no criterion {key!r}; there are: {', '.join(known)}.")
    return [criterion for criterion in criteria if not only or criterion.key in only]


def _folder(keep: Path, subject: Subject, settings: Settings) -> Path:
    identity = {"subject": subject.identity, "settings": asdict(settings),
                "units": sorted(map(unit_name, subject.units)),
                "claim": None if subject.claim is None else asdict(subject.claim)}  # fmt: skip
    folder = keep / f"{subject.task}-{short_hash([json.dumps(identity, sort_keys=True)])}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _kept(file: Path | None) -> Finding | None:
    if file is None:
        return None
    try:
        return Finding.from_json(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):  # not measured, or cut off
        return None
