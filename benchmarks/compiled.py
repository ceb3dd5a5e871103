"""Claim: exact patching and the default method find every edge of programs whose edges are known, and no other.

Programs compiled with Tracr (`--folder`, truth by exhaustive patching) and hand-made ones (truth by reasoning), all
pairs of prompts, in float64. AUROC / average precision of the largest effect in any example; scores of at most 1e-6
count as zero, edges with a true effect between 0 and 1e-3 are left out. `exact` and `default` score the largest and
the squared distance from the clean logits. The first-order methods score the logits' projection on clean − corrupt
(zero ablation: on clean), which is linear and as easy for them as can be (under the squared distance EAP is zero
everywhere: AUROC .5). `false` is the largest score of an edge without effect. `patches`: runs made, of all edges; the
rest change nothing in their reader (exact), or were trusted to a gradient that had not vanished (default).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from machine import write_table

from circuitsae.audit.planted import PROGRAMS
from circuitsae.components import (
    CompiledProgram,
    Edge,
    Scores,
    atp_star,
    auroc,
    average_precision,
    eap,
    eap_ig,
    eap_ig_activations,
    exact_edges,
    load_compiled,
    score_edges,
)
from circuitsae.components.known import distance, projection, squared_distance
from circuitsae.components.problem import Ablation

FIRST_ORDER: dict[str, Callable[..., Scores]] = {
    "EAP": eap,
    "EAP-IG": lambda problems: eap_ig(problems, steps=20),
    "EAP-IG activations": lambda problems: eap_ig_activations(problems, steps=5),
    "AtP*": atp_star,
}
NOISE = 1e-6
ABLATIONS: tuple[Ablation, ...] = ("resample", "zero")


@dataclass
class Options:
    """What to measure."""

    folder: Path = Path(__file__).resolve().parents[2] / "shared/references/compiled"
    """Compiled programs, a folder each; skipped where absent."""
    pairs: int = 256
    """Pairs of prompts for each program."""


def judge(program: CompiledProgram, scores: Scores, ablation: Ablation) -> tuple[str, float]:
    """AUROC / average precision, and the largest false score."""
    kept = [edge for edge in scores.items if edge not in program.borderline(ablation)]
    size = scores.only(kept).largest
    truth = torch.tensor([edge in program.truth(ablation) for edge in kept if isinstance(edge, Edge)])
    size = torch.where(size > NOISE, size, 0.0)
    return f"{auroc(size, truth):.2f} / {average_precision(size, truth):.2f}", float(size[~truth].max())


def row(program: CompiledProgram, ablation: Ablation, pairs: int) -> list[object]:
    """One line of the table."""
    exact = exact_edges(program.problems(ablation, distance, pairs=pairs))
    found = score_edges(program.problems(ablation, squared_distance, pairs=pairs))
    cells, false, first_order_false = [], 0.0, 0.0
    for scores in (exact, found.scores):
        cell, wrong = judge(program, scores, ablation)
        cells.append(cell)
        false = max(false, wrong)
    linear = program.problems(ablation, projection, pairs=pairs)
    for method in FIRST_ORDER.values():
        cell, wrong = judge(program, method(linear), ablation)
        cells.append(cell)
        first_order_false = max(first_order_false, wrong)
    patches = [f"{exact.patches} of {len(exact.items)}", found.scores.patches, found.vanished]
    return [
        program.name,
        ablation,
        len(program.truth(ablation)),
        *cells,
        f"{false:.0e}",
        f"{first_order_false:.0e}",
        *patches,
    ]


def main() -> None:
    options = tyro.cli(Options)
    torch.set_num_threads(1)
    folders = sorted(path.parent for path in options.folder.glob("*/truth.json"))
    programs: Sequence[CompiledProgram] = [
        *(load_compiled(folder) for folder in folders),
        *(program.program() for program in PROGRAMS),
    ]
    rows = [row(program, ablation, options.pairs) for program in programs for ablation in ABLATIONS]
    columns = [
        "program",
        "ablation",
        "true edges",
        "exact",
        "default",
        *FIRST_ORDER,
        "false: exact, default",
        "false: first order",
        "exact: patches",
    ]
    columns += ["default: patches", "of these for vanished gradients"]
    print(write_table("compiled", str(__doc__).strip(), columns, rows))


if __name__ == "__main__":
    main()
