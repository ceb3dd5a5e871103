"""`benchmarks/quality.py`: what it plans and says of its cells, and that its oracle is our loss."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODULES = ("quality_cases", "quality_cells", "quality_plan", "quality_table", "quality_worker")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """All names of the benchmark's modules."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), str(BENCHMARKS / "workers"), *sys.path])
    names: dict[str, Any] = {}
    for module in MODULES:
        names |= vars(importlib.import_module(module))
    return SimpleNamespace(**names)


@pytest.fixture
def cells(bench: Any, tmp_path: Path) -> Any:
    return bench.Cells(tmp_path / "cells.jsonl", dict.fromkeys((bench.OURS, *bench.PEERS), "1"))


def result(fvu: float, l0: float = 8.0, rate: float = 1e-3, steps: int = 500) -> dict[str, Any]:
    curve = [
        {"steps": round(p * steps), "fvu": fvu + 0.1 * (1 - p), "l0": l0, "seconds": p, "cpu": p}
        for p in (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1)
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


def test_a_peer_gets_its_best_rate_with_all_seeds(bench: Any, cells: Any):
    plan, case = bench.Plan(cells, seeds=3), bench.Case("synthetic", "small", "topk")
    fvu = {None: 0.3, 1e-3: 0.2, 2e-3: 0.1, 4e-3: 0.4}
    assert fill(plan, case, "sae-lens", 500, lambda cell: result(fvu[cell.rate], rate=cell.rate or 3e-4)) == 6
    best = plan.best(case, "sae-lens", 500)
    assert best is not None
    assert [(cell.rate, cell.seed) for cell in best] == [(2e-3, seed) for seed in range(3)]
    assert {cell.rate for cell in plan.missing(case, "sae-lens", 3000)} == {2e-3, None}


def test_a_cell_that_failed_is_not_tried_again_and_leaves_the_others_to_choose_from(bench: Any, cells: Any):
    plan, case = bench.Plan(cells, seeds=1), bench.Case("synthetic", "small", "topk")
    fill(plan, case, "sae-lens", 500, lambda cell: {"error": "no"} if cell.rate == 2e-3 else result(cell.rate or 1.0))
    best = plan.best(case, "sae-lens", 500)
    assert best is not None
    assert best[0].rate == 1e-3


def test_the_weight_of_a_penalty_is_looked_for_until_l0_is_near_k(bench: Any, cells: Any):
    def answer(cell: Any) -> dict[str, Any]:
        return result(0.2, l0=40 * dict(cell.settings)["coefficient"] ** -0.7)

    plan, case = bench.Plan(cells, seeds=1), bench.Case("synthetic", "small", "l1")
    fill(plan, case, "sae-lens", 500, answer)
    weight = plan.settings(case, "sae-lens")
    assert weight is not None
    assert 40 * weight["coefficient"] ** -0.7 == pytest.approx(8, rel=0.16)


def test_ours_is_asked_for_the_l0_that_the_peer_ended_with(bench: Any, cells: Any):
    plan, case = bench.Plan(cells, seeds=2), bench.Case("synthetic", "small", "jumprelu")
    assert plan.missing(case, bench.OURS, 500) == []
    fill(plan, case, "dictionary-learning", 500, lambda cell: result(0.2, l0=7.0 + cell.seed))
    assert {dict(cell.settings)["target_l0"] for cell in plan.missing(case, bench.OURS, 500)} == {7.5}


def test_cells_outlive_the_process_and_a_new_version_is_measured_anew(bench: Any, cells: Any):
    cell = bench.Cell(bench.Case("synthetic", "small", "topk"), "circuitsae", 500, 0, None)
    cells.put(cell, result(0.1))
    again = bench.Cells(cells.path, cells.versions).get(cell)
    assert again == cells.get(cell)
    assert (again["fvu"], again["curve"][-1]["steps"]) == (0.1, 500)
    assert not bench.Cells(cells.path, {**cells.versions, "circuitsae": "2"}).done(cell)


def test_a_row_says_who_is_ahead_and_how_many_steps_it_takes(bench: Any, cells: Any):
    plan, case = bench.Plan(cells, seeds=3), bench.Case("synthetic", "small", "topk")
    fill(plan, case, "sae-lens", 500, lambda cell: result(0.2 + 0.001 * cell.seed))
    fill(plan, case, bench.OURS, 500, lambda cell: result(0.1 + 0.002 * cell.seed, steps=cell.steps))
    row = dict(zip(bench.COLUMNS, bench.row_of(plan, case, 500, "sae-lens"), strict=True))
    assert row["verdict"] == "ours"
    assert row["ours − its (95 %)"] == "-0.0990 ± 0.0025"  # t(2) = 4.303, stdev .001, √3
    assert row["our steps to its FVU"] == "8"  # a sixteenth of the run of 125 steps, where it is at .196
    cells.put_timing(case, {bench.OURS: [1.0, 3.0], "sae-lens": [4.0, 12.0]}, 10)
    again = dict(zip(bench.COLUMNS, bench.row_of(plan, case, 500, "sae-lens"), strict=True))
    assert again["our time / its"] == f"{8 / 500 / 4:.2f}"


def test_the_oracle_is_our_loss(bench: Any, tmp_path: Path):
    """From the same first weights on the same batches; the worker's own figures are compared."""
    generator = np.random.default_rng(0)
    for side in ("reads", "writes"):
        np.save(tmp_path / f"{side}.npy", generator.standard_normal((192, 2, 16)).astype(np.float32))
    task = {
        "kind": "clt", "d": 16, "width": 32, "k": 4, "batch": 32, "steps": 8, "rate": 1e-2, "seed": 0,
        "threads": torch.get_num_threads(), "held_out": 64, "settings": {"sparsity": 0.02, "remedy": "none"},
        "reads": str(tmp_path / "reads.npy"), "writes": str(tmp_path / "writes.npy"),
    }  # fmt: skip
    ours, oracle = (bench.Training({**task, "library": library}) for library in ("circuitsae", "oracle"))
    first = ours.fvu()
    for training in (ours, oracle):
        training.steps(8)
    assert ours.fvu() == pytest.approx(oracle.fvu(), rel=1e-4)
    assert abs(ours.fvu()["fvu"] - first["fvu"]) > 1e-3
