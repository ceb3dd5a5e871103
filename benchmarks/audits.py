"""Claim: published circuits, found anew by the same method, stand up to an audit; and here is what fails.

Audits that `circuitsae audit` wrote (`audit.json`), side by side: of IOI, greater-than and induction in the embedded
pocket model and of IOI in SmolLM2-135M, each with the claim files that ship.

    circuitsae audit --task TASK --quick --claim circuitsae/audit/claims/TASK.toml --out NAME
    python benchmarks/audits.py NAME=FOLDER …

writes results/audits.md and copies each page to docs/pages/audit_NAME.html.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from machine import RESULTS, write_table

from circuitsae.audit import Audit, Finding
from transcoders.files import write_file

PAGES = RESULTS.parents[1] / "docs/pages"
CLAIM = """\
Claim: published circuits, found anew by the same method, stand up to {criteria} criteria; what fails is marked.

One 95 % interval each, bars stated beforehand (docs/audit.md says which): ✓ confirmed, ◐ partly, ? inconclusive,
✗ disconfirmed, – untested. Each audit with `--quick` and the claim file that ships; a quick audit of a model as large
as SmolLM2 takes {few} prompts where pocket's takes {many}, so that its intervals are wide. Prompts of all tasks are the
package's own. Written by `benchmarks/audits.py` from what `circuitsae audit` wrote."""
MARKS = {"confirmed": "✓", "partly": "◐", "inconclusive": "?", "disconfirmed": "✗", "untested": "–"}


def cell(found: Finding) -> str:
    """The status as a mark, and the estimate."""
    return f"{MARKS[found.status]} {found.estimate or ''}".strip()


def rows(audits: Sequence[Audit]) -> list[list[str]]:
    """A row per criterion, then the counts, the tier and what it took."""
    made = [[f.criterion, *(cell(audit.of(f.criterion)) for audit in audits)] for f in audits[0].findings]
    counts = [[sum(f.status == status for f in audit.findings) for status in MARKS] for audit in audits]
    made.append([" / ".join(MARKS), *(" / ".join(map(str, each)) for each in counts)])
    made.append(["tier", *(audit.tier for audit in audits)])
    made.append(["units of the circuit", *(f"{len(audit.units):,}" for audit in audits)])
    made.append(["prompts run", *(f"{sum(f.runs for f in audit.findings):,}" for audit in audits)])
    return [*made, ["seconds", *(f"{sum(f.seconds for f in audit.findings):,.0f}" for audit in audits)]]


def main() -> None:
    """Read the audits named on the command line, write the table and the pages."""
    named = [argument.split("=", 1) for argument in sys.argv[1:]]
    audits = [Audit.load(Path(folder) / "audit.json") for _, folder in named]
    sizes = sorted({audit.settings.held_out for audit in audits})
    claim = CLAIM.format(criteria=len(audits[0].findings), few=sizes[0], many=sizes[-1])
    write_table("audits", claim, ["criterion", *(name.replace("_", " ") for name, _ in named)], rows(audits))
    for name, folder in named:
        write_file(PAGES / f"audit_{name}.html", (Path(folder) / "audit.html").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
