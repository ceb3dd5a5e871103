"""Which cells `quality.py` measures next: all follow from those that are there."""

import math
from collections.abc import Iterator, Sequence
from statistics import mean
from typing import Any

from quality_cases import OURS, PEERS, RANKED, SHAPES, STEPS, Case, Cell
from quality_cells import Cells

LADDER = {500: (125, 250), 3000: (1000,), 12000: (6000,)}
"""Shorter runs of ours, with which the time to a peer's FVU is found."""
_TRIALS = 6
_NEAR = 0.15
"""In log L0."""


class Plan:
    """Of some rows, with so many seeds."""

    def __init__(self, cells: Cells, seeds: int) -> None:
        self.cells, self.seeds = cells, seeds

    def missing(self, case: Case, library: str, steps: int) -> list[Cell]:
        """Cells of a library at a length that can be measured now and are not."""
        found = self._ours(case, steps) if library == OURS else self._peers(case, library, steps)
        return [cell for cell in dict.fromkeys(found) if not self.cells.done(cell)]

    # the peers

    def _peers(self, case: Case, name: str, steps: int) -> Iterator[Cell]:
        settings = self.settings(case, name)
        if settings is None:
            yield from self._trials(case, name)[-1:]
            return
        yield from (self._cell(case, name, steps, 0, rate, settings) for rate in self._tried(case, name, steps))
        if (best := self.best(case, name, steps)) is not None:
            yield from best

    def _tried(self, case: Case, name: str, steps: int) -> tuple[float | None, ...]:
        """The default and three rates in the shortest runs; in longer ones the best of these, and the default."""
        rates = (None, *PEERS[name].rates(name, SHAPES[case.shape]))
        if steps == STEPS[0]:
            return rates
        shorter = self.best(case, name, STEPS[0])
        best = None if shorter is None else shorter[0].rate
        return () if shorter is None else (best,) if best is None or steps == STEPS[-1] else (best, None)

    def best(self, case: Case, name: str, steps: int) -> list[Cell] | None:
        """The seeds at the best rate; None before all rates are there."""
        settings = self.settings(case, name)
        if settings is None:
            return None
        tried = [self._cell(case, name, steps, 0, rate, settings) for rate in self._tried(case, name, steps)]
        if not tried or not all(self.cells.done(cell) for cell in tried):
            return None
        results = [(result, cell) for cell in tried if (result := self.cells.get(cell)) is not None]
        if not results:
            return None
        k = SHAPES[case.shape].k
        sparse = [pair for pair in results if pair[0]["l0"] <= 1.25 * k]
        first = (
            min(sparse, key=lambda pair: pair[0]["fvu"])
            if sparse
            else min(results, key=lambda pair: abs(math.log(max(pair[0]["l0"], 1e-3) / k)))
        )[1]
        return [self._cell(case, name, steps, seed, first.rate, settings) for seed in range(self.seeds)]

    def default(self, case: Case, name: str, steps: int) -> Cell | None:
        """With the library's own rate."""
        settings = self.settings(case, name)
        return None if settings is None else self._cell(case, name, steps, 0, None, settings)

    # the weight of a penalty

    def settings(self, case: Case, name: str) -> dict[str, Any] | None:
        """What a library is given beside its defaults; None while the weight of its penalty is looked for."""
        if case.kind not in PEERS[name].weighted:
            return {}
        trials = self._trials(case, name)
        if not all(self.cells.done(cell) for cell in trials):
            return None
        found = [(self.cells.get(cell), cell) for cell in trials]
        k = SHAPES[case.shape].k
        good = [(abs(math.log(max(r["l0"], 1e-3) / k)), cell) for r, cell in found if r is not None]
        return dict(min(good, key=lambda pair: pair[0])[1].settings) if good else dict(trials[0].settings)

    def _trials(self, case: Case, name: str) -> list[Cell]:
        """Runs of the shortest length, each with the weight that those before call for; the last may be missing."""
        peer, k = PEERS[name], SHAPES[case.shape].k
        rate, key = peer.rates(name, SHAPES[case.shape])[1], "sparsity" if name == "oracle" else "coefficient"
        extra = {"remedy": "none"} if name == "oracle" else {}
        weight, trials = peer.weighted[case.kind], []
        seen: list[tuple[float, float]] = []
        for _ in range(_TRIALS):
            trials.append(self._cell(case, name, STEPS[0], 0, rate, {key: float(f"{weight:.3g}"), **extra}))
            result = self.cells.get(trials[-1])
            if result is None:
                break
            error = math.log(max(result["l0"], 1e-2) / k)
            if abs(error) < _NEAR:
                break
            seen.append((math.log(weight), error))
            weight = math.exp(_next_weight(seen))
        return trials

    # ours

    def _ours(self, case: Case, steps: int) -> Iterator[Cell]:
        for peer in (None,) if case.kind in RANKED else case.peers:
            for length in (steps, *LADDER[steps]):
                yield from self.ours(case, length, peer, against=steps)

    def ours(self, case: Case, steps: int, peer: str | None, *, against: int | None = None) -> list[Cell]:
        """All seeds at our defaults; of kinds with a penalty at the L0 that a peer had after `against` steps."""
        settings: dict[str, Any] = {}
        if peer is not None and case.kind not in RANKED:
            found = self.ours_settings(case, peer, against or steps)
            if found is None:
                return []
            settings = found
        return [self._cell(case, OURS, steps, seed, None, settings) for seed in range(self.seeds)]

    def ours_settings(self, case: Case, peer: str, steps: int) -> dict[str, Any] | None:
        """None while the peer has no L0 yet, or none that anybody would want."""
        best = self.best(case, peer, steps)
        if best is None or any(self.cells.get(cell) is None for cell in best):
            return None
        if peer == "oracle":
            return dict(best[0].settings)
        l0 = mean(result["l0"] for cell in best if (result := self.cells.get(cell)) is not None)
        return {"target_l0": round(l0, 1)} if 0.5 < l0 < SHAPES[case.shape].width / 4 else None

    def _cell(
        self, case: Case, library: str, steps: int, seed: int, rate: float | None, settings: dict[str, Any]
    ) -> Cell:
        return Cell(case, library, steps, seed, rate, tuple(sorted(settings.items())))


def _next_weight(seen: Sequence[tuple[float, float]]) -> float:
    """In logarithms: the secant through the two trials nearest to no error, or a step where there is one alone."""
    weight, error = min(seen, key=lambda pair: abs(pair[1]))
    above, below = ([pair for pair in seen if pair[1] * sign > 0] for sign in (1, -1))
    if above and below:
        first, second = (min(side, key=lambda pair: abs(pair[1])) for side in (above, below))
        slope = (second[1] - first[1]) / (second[0] - first[0]) if second[0] != first[0] else -1.0
        middle = (first[0] + second[0]) / 2
        target = first[0] - first[1] / slope if slope < 0 else middle
        return 0.5 * target + 0.5 * middle
    return weight + max(-2.5, min(2.5, 1.2 * error))
