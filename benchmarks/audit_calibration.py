"""Claim: an audit confirms the true circuit of a program and refutes a damaged one, in 95 of 100 cases or more.

Programs compiled with Tracr (`--folder`, truth by exhaustive patching) and hand-made ones (truth by reasoning), under
resample and zero ablation; the value is how far the logits lie from the model's (the largest difference, after
position 0), so that f = 1 for a true circuit, on prompts where ablating every edge changes them. Audited at
`Settings.quick()` with the criteria that are about the circuit and its model alone:
%s.
The verdict (`circuitsae.audit.verdict`): confirmed where each of them is, refuted where of one the whole interval falls
short of the bar that confirms, else open; open counts as wrong. Rule and bars were stated before the first run. That
run, without `rivals`, took prompts on which there is nothing to explain too, and left 2 true circuits of 120 cases
open. `baselines` does not bear on the verdict: of so few edges most random circuits of equal degree are the true one.

*own*: the program's edges, to be confirmed. All others are to be refuted: without one edge, drawn at random; with one
edge that changes nothing, drawn from those on a path with the circuit where there are any; as many edges drawn from
all; and the program's edges in the same model with every weight drawn anew, as large as it was. Draws of each: %d.
`by` counts the criteria that fell short in refuted cases (several may in one).
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from machine import RESULTS, machine, table_text
from scipy import stats

from circuitsae.audit import HeadSubject, Settings, audit
from circuitsae.audit.criteria import CRITERIA
from circuitsae.audit.planted import DAMAGE, PROGRAMS, damaged, own_circuit, planted_subject, without_learning
from circuitsae.audit.verdict import BEARING, Verdict, short, verdict
from circuitsae.components import CompiledProgram, load_compiled
from circuitsae.components.problem import Ablation
from transcoders.files import write_file

ABLATIONS: tuple[Ablation, ...] = ("resample", "zero")
OWN, UNTRAINED = "own", "untrained"
KINDS = (OWN, *DAMAGE, UNTRAINED)


@dataclass
class Options:
    """What to audit."""

    folder: Path = Path(__file__).resolve().parents[2] / "shared/references/compiled"
    """Compiled programs, a folder each; skipped where absent."""
    draws: int = 1
    """Draws of each damage."""
    pairs: int = 256
    """Pairs of prompts for each program; half of them are judged on, or as many as the settings say."""


class Case(NamedTuple):
    """One audit."""

    program: str
    ablation: Ablation
    kind: str
    draw: int
    verdict: Verdict
    short: tuple[str, ...]

    @property
    def right(self) -> bool:
        return self.verdict == ("confirmed" if self.kind == OWN else "refuted")


def subjects(program: CompiledProgram, ablation: Ablation, draws: int) -> Iterator[tuple[str, int, HeadSubject]]:
    """The program's own circuit and every damaged one."""
    yield OWN, 0, planted_subject(program, ablation)
    for draw in range(draws):
        for how in DAMAGE:
            yield how, draw, planted_subject(program, ablation, damaged(program, ablation, how, draw))
        other = without_learning(program, draw)
        yield UNTRAINED, draw, planted_subject(other, ablation, own_circuit(program, ablation))


def cases(program: CompiledProgram, options: Options) -> list[Case]:
    """Every audit of one program."""
    settings = Settings.quick()
    keys = [criterion.key for criterion in CRITERIA if criterion.key in BEARING]
    found = []
    for ablation in ABLATIONS:
        for kind, draw, subject in subjects(program, ablation, options.draws):
            made = audit(subject, settings=settings, only=keys)
            found.append(Case(program.name, ablation, kind, draw, verdict(made), tuple(short(made))))
    return found


def summary(found: list[Case]) -> list[list[object]]:
    """A row for each kind of case."""
    rows = []
    for name, chosen in (*((kind, [c for c in found if c.kind == kind]) for kind in KINDS), ("all", found)):
        counts = Counter(case.verdict for case in chosen)
        right = sum(case.right for case in chosen)
        low, high = stats.binomtest(right, len(chosen)).proportion_ci(method="wilson")
        by = Counter(key for case in chosen if case.verdict == "refuted" for key in case.short)
        rows.append(
            [name, len(chosen), counts["confirmed"], counts["refuted"], counts["open"],
             f"{right / len(chosen):.3f} [{low:.2f}, {high:.2f}]",
             ", ".join(f"{key} {count}" for key, count in by.most_common()) or "–"]
        )  # fmt: skip
    return rows


def wrong(found: list[Case]) -> str:
    """Every case that was judged wrongly, in a line each."""
    lines = [f"* {c.program}, {c.ablation}, {c.kind} (draw {c.draw}): {c.verdict}" for c in found if not c.right]
    return "\n".join(["Judged wrongly:", "", *lines]) if lines else "None was judged wrongly."


def main() -> None:
    options = tyro.cli(Options)
    torch.set_num_threads(1)
    folders = sorted(path.parent for path in options.folder.glob("*/truth.json"))
    found: list[Case] = []
    for program in (
        *(load_compiled(folder) for folder in folders),
        *(planted.program(per_length=options.pairs // len(planted.lengths)) for planted in PROGRAMS),
    ):
        found += cases(CompiledProgram(**{**vars(program), "pairs": program.pairs[: options.pairs]}), options)
        print(program.name, sum(case.right for case in found), "of", len(found), flush=True)
    keys = ", ".join(criterion.key for criterion in CRITERIA if criterion.key in BEARING)
    columns = ["circuit", "cases", "confirmed", "refuted", "open", "judged rightly", "by"]
    claim = f"{str(__doc__).strip() % (keys, options.draws)}\n\n{wrong(found)}"
    text = table_text("audit_calibration", claim, machine(), columns, summary(found))
    write_file(RESULTS / "audit_calibration.md", text)
    print(text)


if __name__ == "__main__":
    main()
