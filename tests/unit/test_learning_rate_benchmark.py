"""`benchmarks/learning_rate.py`: what it measures of a rate, and what its table says of seeds."""

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from transcoders import TranscoderConfig, TranscoderSet, train

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    return importlib.import_module("learning_rate")


def test_a_rate_is_measured_on_vectors_that_nothing_was_trained_on(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(bench, "HELD_OUT", 64)
    monkeypatch.setattr(bench, "BATCH", 32)
    generator, d = np.random.default_rng(0), 6
    sides = {side: generator.standard_normal((320, d)).astype(np.float32) for side in ("reads", "writes")}
    (tmp_path / "data").mkdir()
    for side, values in sides.items():
        np.save(tmp_path / "data" / f"synthetic-mlp-{d}-{side}.npy", values)
    run = bench.Run("synthetic", d, 12, 2, "transcoder", 20, 8e-3, 1)
    found = bench.measured(run, tmp_path)

    reads, writes = (torch.from_numpy(values) for values in sides.values())
    config = TranscoderConfig(features=12, activation="topk", k=2, batch=32, tokens=640, lr=8e-3, seed=1)
    trained = train(None, (reads[:-64], writes[:-64]), config, progress=False)
    with torch.no_grad():
        assert isinstance(trained, TranscoderSet)
        layer = trained.layers[0]
        left = writes[-64:] - layer.encode(reads[-64:]) @ layer.W_dec - layer.b_dec
    centred = writes[-64:] - writes[-64:].mean(0)
    assert found["fvu"] == pytest.approx(float(left.square().sum() / centred.square().sum()), rel=1e-4)
    assert found["fvu"] != pytest.approx(bench.measured(run._replace(rate=1e-4), tmp_path)["fvu"], rel=1e-2)


def test_rates_are_compared_seed_by_seed(bench: Any, tmp_path: Path):
    sweep = next(sweep for sweep in bench.SWEEPS if sweep.seeds == 3)
    done = bench.Done(tmp_path / "done.jsonl")
    first = next(sweep.runs(1))
    earlier, better = [0.20, 0.30, 0.25], [0.18, 0.29, 0.22]
    for seed in range(3):
        for rate, values in ((first.rate, earlier), (sweep.rates[1], better)):
            run = first._replace(rate=rate, seed=seed)
            done.put(run, {"fvu": values[seed], "l0": 8.0, "dead": 0.25})
    rows = list(bench.rows(bench.Done(done.path)))
    assert len(rows) == 2
    named = [dict(zip(bench.COLUMNS, row, strict=True)) for row in rows]
    assert [row["rate"] for row in named] == [f"{rate:g}" for rate in sweep.rates[:2]]
    differences = np.subtract(better, earlier)
    low, high = stats.t.interval(0.95, 2, differences.mean(), stats.sem(differences))
    middle, half = map(float, named[1]["less the first rate's"].split(" ± "))
    assert (middle - half, middle + half) == pytest.approx((low, high), abs=2e-4)
    assert (named[0]["less the first rate's"], named[0]["dead"], named[0]["seeds"]) == ("", "25.0%", "3")
