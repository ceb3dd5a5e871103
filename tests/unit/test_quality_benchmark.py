"""`benchmarks/quality.py`: what it plans and says of its cells, and that its oracle is our loss."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), str(BENCHMARKS / "workers"), *sys.path])


@pytest.fixture
def cells(tmp_path: Path) -> Any:
    from quality_cases import OURS, PEERS
    from quality_cells import Cells

    return Cells(tmp_path / "cells.jsonl", dict.fromkeys((OURS, *PEERS), "1"))


def result(fvu: float, l0: float = 8.0, rate: float = 1e-3, steps: int = 500) -> dict[str, Any]:
    from quality_cells import POINTS

    curve = [
        {"steps": round(p * steps), "fvu": fvu + 0.1 * (1 - p), "l0": l0, "seconds": p, "cpu": p} for p in POINTS
    ]
    return {"fvu": fvu, "l0": l0, "rate": rate, "cpu": 1.0, "curve": curve}


def fill(plan: Any, case: Any, library: str, steps: int, answer: Any) -> int:
    """Measure all that is missing with `answer(cell)`; how many cells it took."""
    taken = 0
    while missing := plan.missing(case, library, steps):
        for cell in missing:
            plan.cells.put(cell, answer(cell))
        taken += len(missing)
    return taken


def test_a_peer_gets_its_best_rate_with_all_seeds(cells: Any):
    from quality_cases import Case
    from quality_plan import Plan

    plan, case = Plan(cells, seeds=3), Case("synthetic", "small", "topk")
    fvu = {None: 0.3, 1e-3: 0.2, 2e-3: 0.1, 4e-3: 0.4}
    assert fill(plan, case, "sae-lens", 500, lambda cell: result(fvu[cell.rate], rate=cell.rate or 3e-4)) == 6
    best = plan.best(case, "sae-lens", 500)
    assert best is not None
    assert [(cell.rate, cell.seed) for cell in best] == [(2e-3, seed) for seed in range(3)]
    assert {cell.rate for cell in plan.missing(case, "sae-lens", 3000)} == {2e-3, None}


def test_a_cell_that_failed_is_not_tried_again_and_leaves_the_others_to_choose_from(cells: Any):
    from quality_cases import Case
    from quality_plan import Plan

    plan, case = Plan(cells, seeds=1), Case("synthetic", "small", "topk")
    fill(plan, case, "sae-lens", 500, lambda cell: {"error": "no"} if cell.rate == 2e-3 else result(cell.rate or 1.0))
    best = plan.best(case, "sae-lens", 500)
    assert best is not None
    assert best[0].rate == 1e-3


def test_the_weight_of_a_penalty_is_looked_for_until_l0_is_near_k(cells: Any):
    from quality_cases import Case
    from quality_plan import Plan

    def answer(cell: Any) -> dict[str, Any]:
        return result(0.2, l0=40 * dict(cell.settings)["coefficient"] ** -0.7)

    plan, case = Plan(cells, seeds=1), Case("synthetic", "small", "l1")
    fill(plan, case, "sae-lens", 500, answer)
    weight = plan.settings(case, "sae-lens")
    assert weight is not None
    assert 40 * weight["coefficient"] ** -0.7 == pytest.approx(8, rel=0.16)


def test_ours_is_asked_for_the_l0_that_the_peer_ended_with(cells: Any):
    from quality_cases import OURS, Case
    from quality_plan import Plan

    plan, case = Plan(cells, seeds=2), Case("synthetic", "small", "jumprelu")
    assert plan.missing(case, OURS, 500) == []
    fill(plan, case, "dictionary-learning", 500, lambda cell: result(0.2, l0=7.0 + cell.seed))
    assert {dict(cell.settings)["target_l0"] for cell in plan.missing(case, OURS, 500)} == {7.5}


def test_cells_outlive_the_process_and_a_new_version_is_measured_anew(cells: Any):
    from quality_cases import Case, Cell
    from quality_cells import Cells

    cell = Cell(Case("synthetic", "small", "topk"), "circuitsae", 500, 0, None)
    cells.put(cell, result(0.1))
    assert Cells(cells.path, cells.versions).get(cell) == json.loads(json.dumps(result(0.1)))
    assert not Cells(cells.path, {**cells.versions, "circuitsae": "2"}).done(cell)


def test_a_row_says_who_is_ahead_and_how_many_steps_it_takes(cells: Any):
    from quality_cases import OURS, Case
    from quality_plan import Plan
    from quality_table import COLUMNS, _row

    plan, case = Plan(cells, seeds=3), Case("synthetic", "small", "topk")
    fill(plan, case, "sae-lens", 500, lambda cell: result(0.2 + 0.001 * cell.seed))
    fill(plan, case, OURS, 500, lambda cell: result(0.1 + 0.002 * cell.seed, steps=cell.steps))
    row = dict(zip(COLUMNS, _row(plan, case, 500, "sae-lens") or [], strict=True))
    assert row["verdict"] == "ours"
    assert row["ours − its (95 %)"] == "-0.0990 ± 0.0025"  # t(2) = 4.303, stdev .001, √3
    assert row["our steps to its FVU"] == "8"  # a sixteenth of the run of 125 steps, where it is at .196
    cells.put_timing(case, {OURS: [1.0, 3.0], "sae-lens": [4.0, 12.0]}, 10)
    again = dict(zip(COLUMNS, _row(plan, case, 500, "sae-lens") or [], strict=True))
    assert again["our time / its"] == f"{8 / 500 / 4:.2f}"


def test_the_oracle_is_our_loss(tmp_path: Path):
    """From the same first weights on the same batches; the worker's own figures are compared."""
    from quality_worker import Training

    generator = np.random.default_rng(0)
    for side in ("reads", "writes"):
        np.save(tmp_path / f"{side}.npy", generator.standard_normal((192, 2, 16)).astype(np.float32))
    task = {
        "kind": "clt", "d": 16, "width": 32, "k": 4, "batch": 32, "steps": 8, "rate": 1e-2, "seed": 0,
        "threads": torch.get_num_threads(), "held_out": 64, "settings": {"sparsity": 0.02, "remedy": "none"},
        "reads": str(tmp_path / "reads.npy"), "writes": str(tmp_path / "writes.npy"),
    }  # fmt: skip
    ours, oracle = (Training({**task, "library": library}) for library in ("circuitsae", "oracle"))
    first = ours.fvu()
    for training in (ours, oracle):
        training.steps(8)
    assert ours.fvu() == pytest.approx(oracle.fvu(), rel=1e-4)
    assert abs(ours.fvu()["fvu"] - first["fvu"]) > 1e-3
