"""The tables of `quality.py`: what its cells say, and which of them are not there yet."""

import math
from collections.abc import Sequence
from statistics import mean, median, stdev
from typing import Any

from machine import write_table
from quality_cases import OURS, PEERS, RANKED, SHAPES, STEPS, Case, Cell, cases
from quality_cells import POINTS, Cells
from quality_plan import LADDER, Plan

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Two-sided 95 % of Student's t, by the number of seeds."""
_SAME_L0 = 1.05
_MISSING = "—"
COLUMNS = (
    "data", "d, width, k", "kind", "steps", "peer", "its rate", "FVU at its default rate", "its FVU", "its L0",
    "our FVU", "our L0", "ours − its (95 %)", "verdict", "our steps to its FVU", "our time / its",
)  # fmt: skip


def write_tables(cells: Cells, plan: Plan) -> str:
    """Writes `results/quality.md` and `results/quality_curves.md`; returns the first."""
    all_rows = {case: {steps: _rows(plan, case, steps) for steps in STEPS} for case in cases()}
    rows = [
        row for of_case in all_rows.values() for of_length in of_case.values() for row in of_length if _measured(row)
    ]
    lines = [line for case in cases() for library in (OURS, *case.peers) if (line := _curve(plan, case, library))]
    columns = ["data", "d, width, k", "kind", "library", "steps", "rate", "L0", "ms a step", *map(_share, POINTS)]
    write_table("quality_curves", _CURVES, columns, lines)
    ours = f"Ours is `transcoders` with git's hash {cells.versions[OURS]} (`--version`)."
    claim = "\n\n".join((_CLAIM, _CLAIM_TIME, ours, _summary(rows), _todo(all_rows)))
    return write_table("quality", claim, COLUMNS, rows)


_CLAIM = """Held-out FVU at equal steps, here and in other libraries, and the time that ours takes to a peer's FVU.

    python benchmarks/quality.py --budget-minutes 60 --clt-forge CHECKOUT/src
    python benchmarks/quality.py --timing --clt-forge CHECKOUT/src

Batch 1,024, the same batches in the same order for everybody; 262,144 synthetic or 240,411 real vectors of mean square
one, of which 8,192 are held out; one thread, float32. "Its rate" is the best by held-out FVU, with the first seed, of
the peer's default and three more after 500 steps; longer runs have the best of those, runs of 3,000 also the default.
↑ marks the largest that was tried. Ours has its default. No other setting is changed, in no library, but warm-ups,
which are cut to a tenth of a run. Kinds with a penalty: the peer's weight is the one that gives L0 near k after 500
steps (dictionary_learning's JumpReLU steers for k), and ours is asked for the L0 that the peer ended with
(`target_l0`). sparsify's own optimiser is sign descent; `sparsify-adam` is the one that it also has. `oracle` is our
CLT's loss in plain dense float32, from the same first weights, with the same weight of the penalty; CLT-Forge's first
biases need more features than the small shape has, and stay zero."""

_CLAIM_TIME = """"Our steps" are the fewest, of all lengths of a run that were tried, after which our mean FVU is no
more than the peer's final one, with an L0 no more than 5 % above its. Times are those steps times a step's seconds,
measured with all libraries taking turns; with ~ they are seconds of the processor from separate runs, which a
busy machine makes more of. Verdicts: "ours" where the whole interval over seeds is below zero, "peer" where it is
above, else "level"; "one seed" where there is no interval yet. A dash is a cell that has not been measured."""

_CURVES = """Held-out FVU along the longest run that has been measured of each library (mean of seeds; the peer's at its
best rate), after shares of its steps; samples are steps times 1,024, seconds are steps times "ms a step". Ours is
trained with a rate that falls at the end, so that shorter runs end lower than this curve passes (`quality.md`)."""


def _share(point: float) -> str:
    return f"{point:.3g}"


def _shape(case: Case) -> str:
    shape = SHAPES[case.shape]
    return f"{shape.d}, {shape.width:,}, {shape.k}"


def row_of(plan: Plan, case: Case, steps: int, peer: str) -> list[object]:
    """A peer's row, with dashes for what is not measured."""
    head: list[object] = [case.data, _shape(case), case.kind, f"{steps:,}", peer]
    best = plan.best(case, peer, steps)
    theirs = [] if best is None else _results(plan, best)
    if not theirs or best is None:
        return [*head, *[_MISSING] * (len(COLUMNS) - len(head))]
    default = plan.default(case, peer, steps)
    at_default = plan.cells.get(default) if default is not None else None
    largest = best[0].rate == max(PEERS[peer].rates(peer, SHAPES[case.shape]))
    row = [
        *head,
        f"{theirs[0]['rate']:.3g}{' ↑' if largest else ''}",
        f"{at_default['fvu']:.4f}" if at_default else _MISSING,
    ]
    row += [_spread(theirs, "fvu", 4), _spread(theirs, "l0", 1)]
    ours = _results(plan, plan.ours(case, steps, peer))
    if not ours:
        return [*row, *[_MISSING] * (len(COLUMNS) - len(row))]
    row += [_spread(ours, "fvu", 4), _spread(ours, "l0", 1), *_difference(ours, theirs)]
    needed = steps_to(plan, case, steps, peer, mean(r["fvu"] for r in theirs), mean(r["l0"] for r in theirs))
    if needed is None:
        return [*row, "not reached", ""]
    ratio, measured = _step_ratio(plan.cells, case, peer, theirs, ours)
    return [*row, f"{needed:,}", f"{'' if measured else '~'}{needed / steps * ratio:.2f}"]


def _results(plan: Plan, cells: Sequence[Cell]) -> list[dict[str, Any]]:
    return [result for cell in cells if (result := plan.cells.get(cell)) is not None]


def _spread(results: Sequence[dict[str, Any]], name: str, digits: int) -> str:
    values = [result[name] for result in results]
    around = f" ± {stdev(values):.{digits}f}" if len(values) > 1 and name == "fvu" else ""
    return f"{mean(values):.{digits}f}{around}"


def _difference(ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """Of the same seeds, which see the same batches; with the interval where there are several."""
    differences = [mine["fvu"] - its["fvu"] for mine, its in zip(ours, theirs, strict=False)]
    middle = mean(differences)
    if len(differences) < 2:
        return f"{middle:+.4f}", "one seed"
    half = T_95[min(len(differences), max(T_95))] * stdev(differences) / math.sqrt(len(differences))
    verdict = "ours" if middle + half < 0 else "peer" if middle - half > 0 else "level"
    return f"{middle:+.4f} ± {half:.4f}", verdict


def steps_to(plan: Plan, case: Case, steps: int, peer: str, fvu: float, l0: float) -> int | None:
    """The fewest steps of ours to an FVU; None where no run came there."""
    lengths = sorted({*STEPS, *(length for shorter in LADDER.values() for length in shorter)})
    reached = []
    for length in lengths:
        results = _results(plan, plan.ours(case, length, peer, against=steps))
        for point in range(len(POINTS)) if results else ():
            at = [result["curve"][point] for result in results]
            if mean(p["fvu"] for p in at) <= fvu and mean(p["l0"] for p in at) <= _SAME_L0 * l0:
                reached.append(at[0]["steps"])
    return min(reached, default=None)


def _step_ratio(
    cells: Cells, case: Case, peer: str, theirs: Sequence[dict[str, Any]], ours: Sequence[dict[str, Any]]
) -> tuple[float, bool]:
    """Our seconds of a step over its: measured in turns, or else estimated from the processor's time."""
    turns = cells.timing(case)
    if peer in turns and OURS in turns:
        return median(mine / its for mine, its in zip(turns[OURS], turns[peer], strict=True)), True
    its, mine = (median(r["cpu"] / r["curve"][-1]["steps"] for r in results) for results in (theirs, ours))
    return mine / its, False


def _curve(plan: Plan, case: Case, library: str) -> list[object] | None:
    for steps in reversed(STEPS):
        if library == OURS:
            peers = (None,) if case.kind in RANKED else case.peers
            found = next((cells for peer in peers if _results(plan, cells := plan.ours(case, steps, peer))), None)
        else:
            found = plan.best(case, library, steps)
        results = _results(plan, found or [])
        if not results:
            continue
        turns = plan.cells.timing(case).get(library)
        cost = median(turns) if turns else median(r["cpu"] for r in results) / steps
        values = [f"{mean(r['curve'][i]['fvu'] for r in results):.4f}" for i in range(len(POINTS))]
        head = [case.data, _shape(case), case.kind, library, f"{steps:,}", f"{results[0]['rate']:.3g}"]
        return [*head, f"{mean(r['l0'] for r in results):.1f}", f"{'' if turns else '~'}{1000 * cost:.1f}", *values]
    return None


def _rows(plan: Plan, case: Case, steps: int) -> list[list[object]]:
    return [row_of(plan, case, steps, peer) for peer in case.peers]


def _measured(row: Sequence[object]) -> bool:
    return row[-1] != _MISSING


def _summary(rows: Sequence[Sequence[object]]) -> str:
    verdicts = [row[COLUMNS.index("verdict")] for row in rows]
    times = [str(row[-1]) for row in rows if row[-1] != ""]
    half = sum(float(time.lstrip("~")) <= 0.5 for time in times)
    parts = [f"{verdicts.count(name)} {name}" for name in ("ours", "level", "peer", "one seed")]
    return (
        f"{len(rows)} rows are measured: {', '.join(parts)}. Ours needs at most half of the peer's time to its FVU in "
        f"{half} of the {len(times)} rows where it comes there."
    )


def _todo(rows: dict[Case, dict[int, list[list[object]]]]) -> str:
    """What is not measured: lengths, with the peers where it is not all of them."""
    lines = []
    for case, lengths in rows.items():
        parts = []
        for steps, of_length in lengths.items():
            peers = [str(row[COLUMNS.index("peer")]) for row in of_length if not _measured(row)]
            some = f" ({', '.join(peers)})" if len(peers) < len(of_length) else ""
            parts += [f"{steps:,}{some}"] if peers else []
        lines += [f"* {case.data} {case.shape} {case.kind}: {'; '.join(parts)}"] if parts else []
    return "\n".join(["Steps not measured, or not to the end:", "", *lines]) if lines else "All rows are measured."
