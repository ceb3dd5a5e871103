"""`benchmarks/gpu.py`: its rows, that it goes on where it was, and what it says of peers that are not there."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """All names of the benchmark's modules."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    names: dict[str, Any] = {}
    for module in ("gpu_rows", "gpu_table", "gpu"):
        names |= vars(importlib.import_module(module))
    return SimpleNamespace(**names)


@pytest.fixture
def answering(bench: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Workers that answer at once; what they were asked."""
    asked: list[dict[str, Any]] = []

    class Quick:
        def __init__(self, *_: Any) -> None: ...

        def ask(self, line: str, **_: Any) -> dict[str, Any]:
            asked.append(task := json.loads(line))
            if task["kind"] == "rates":
                return {"bandwidth": 1e12, "bf16": 1e15, "float32": 1e14, "name": "a chip", "torch": "2"}
            return {"seconds": 2e-3, "peak_mb": 5.0} | ({"edges": 7} if task["kind"] == "graph" else {})

        def stop(self) -> None: ...

    monkeypatch.setattr(importlib.import_module("gpu"), "AnsweringProcess", Quick)
    return asked


def test_every_work_of_the_issue_has_a_row(bench):
    rows = bench.rows(False, True)
    works = " ".join(row.work for row in rows if row.tool == bench.OURS)
    for part in (
        "per-layer transcoders, 20 tokens", "CLT, 20 tokens", "128 tokens", "pocket model, one prompt, on the CPU",
        "validate 100 edges, 20 tokens", "validate 100 edges, 128 tokens", "12,288 features, k 32, batch 4,096",
        "CLT TopK step, 4,096 features a layer, batch 2,048, bf16", "BatchTopK step, 8,192", "JumpReLU step, 4,096",
    ):  # fmt: skip
        assert part in works
    assert {row.tool for row in rows} == {bench.OURS, bench.TRACER, bench.SPARSIFY, bench.FORGE}
    assert bench.FORGE not in {row.tool for row in bench.rows(False, False)}
    assert len({(row.work, row.tool) for row in rows}) == len(rows)
    graph = next(row for row in rows if "128 tokens" in row.work)
    assert graph.case.active * (graph.case.tokens - 1) * graph.case.n_layers == 24_384


def test_a_run_goes_on_where_it_was(bench, answering, tmp_path):
    out = tmp_path / "page.md"
    given = ["--tiny", "--device", "cpu", "--out", str(out), "--peers", "none", "--only", "step"]
    bench.main([*given, "--minutes", "0"])
    assert [task["kind"] for task in answering] == ["rates"]
    assert "not reached; run again" in out.read_text()
    bench.main(given)
    done = len(answering)
    assert done > 5
    bench.main(given)
    assert len(answering) == done
    lines = [json.loads(line) for line in out.with_suffix(".jsonl").read_text().splitlines()]
    assert len(lines) == done
    assert "| 2 ms |" in out.read_text()
    assert "a chip (cpu), 1,000 GB/s, bf16 1e+03 TFLOP/s" in out.read_text()


def test_peers_that_cannot_be_installed_are_named(bench, answering, tmp_path, monkeypatch):
    def refused(self: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(bench.Environment, "make", refused)
    out = tmp_path / "page.md"
    bench.main(["--tiny", "--device", "cpu", "--out", str(out), "--only", "SAE TopK"])
    assert "| sparsify | cannot be installed here (OSError) |" in out.read_text()


def test_a_peer_that_dies_or_hangs_is_an_error_of_its_row(bench):
    worker = bench.AnsweringProcess(
        [sys.executable, "-c", "input(); import time; print('x', flush=True); time.sleep(60)"], {}
    )
    assert worker.ask("{}", seconds=0.5) == {"error": "no answer within 0.5 s"}
    assert worker.ask("{}", seconds=0.5) == {"error": "no answer within 0.5 s"}  # begun anew
    worker.stop()
    dying = bench.AnsweringProcess([sys.executable, "-c", "raise SystemExit('no such chip')"], {})
    assert dying.ask("{}") == {"error": "the process ended: no such chip"}
    dying.stop()


def test_results_are_never_those_of_tiny_sizes_or_of_a_cpu(bench, answering):
    with pytest.raises(SystemExit, match="--out"):
        bench.main(["--tiny"])
    with pytest.raises(SystemExit, match="no GPU"):
        bench.main(["--device", "cpu"])
    assert not (BENCHMARKS / "results" / "gpu.md").exists()


def test_floors_and_shares(bench):
    row = bench.Row("w", bench.OURS, "step", {})
    machine = {"bandwidth": 1e12, "bf16": 1e15, "float32": 1e14}
    cells = bench._cells(row, {"seconds": 0.01, "operations": 1e12, "bytes": 2e9}, machine, None)
    assert cells[2:8] == ["10 ms", "", "2 ms", "20 %", "10 %", "20 %"]
    peer = bench.Row("w", bench.TRACER, "graph", {})
    assert bench._cells(peer, {"seconds": 0.03}, machine, 0.01)[3] == "3 ×"
    assert bench._cells(peer, {"error": "a|b\nc"}, machine, 0.01)[2] == "a/b c"


def test_two_rows_from_end_to_end(bench, tmp_path):
    """A graph and a step, by the worker itself."""
    out = tmp_path / "page.md"
    bench.main(["--tiny", "--device", "cpu", "--out", str(out), "--peers", "none", "--only", "CLT, 6", "SAE TopK"])
    text = out.read_text()
    assert text.count("| circuitsae |") == 3
    assert "ended" not in text
    assert "Error" not in text


def test_the_bench_of_every_claim_leaves_it_out():
    makefile = (ROOT / "Makefile").read_text()
    assert "$(wildcard benchmarks/gpu*.py),$(wildcard benchmarks/*.py)" in makefile
