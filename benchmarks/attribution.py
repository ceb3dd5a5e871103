r"""Claim: the closed form costs little more than its counted operations, and its edges are those of autograd.

Every measurement runs in a process of its own, on one thread: processor seconds and peak of memory above what is held
once model and dictionaries are loaded, beside the operations that the textbook algorithm needs and the matrix rate
measured in the same process, before and after. Work under 30 s is done three times and the least seconds count.
Cost = processor seconds / (operations / rate).

    python benchmarks/attribution.py --circuit-tracer /venvs/circuit-tracer/bin/python
    python benchmarks/attribution.py --full

An engine that is not there is left out, and so is circuit-tracer without its flag. Plots: runs/attribution.html (or
what `--name` says); docs/images/attribution-cost.png is that of `--full --engines closed_form`, 1300 × 560 pixels.
"""

import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from answers import answer_in
from attribution_cases import Case, Kind, Prepared, counted_operations, prepare, small
from machine import write_table
from scipy import sparse

import circuitsae as cs

WORKERS = Path(__file__).parent / "workers"
PEER = "circuit-tracer"
Study = Literal["reference", "float64", "lazy", "tokens", "features", "width", "layers"]
REFERENCE: tuple[Kind, ...] = ("plt", "skip", "clt")
AUTOGRAD_AT_MOST = 4e12
"""Operations of the largest case that autograd and circuit-tracer are asked to do."""


@dataclass
class Options:
    """What to measure."""

    studies: list[Study] = field(default_factory=lambda: ["reference", "float64", "lazy", "tokens", "features"])
    """reference: GPT-2 small's sizes, 20 tokens; lazy: a quarter of its features; float64: agreement; the others vary
    one size of the pocket model's (with `--full` the prompt of GPT-2 small's too)."""
    kinds: list[Kind] = field(default_factory=lambda: list(REFERENCE))
    """Kinds of dictionaries in the reference, float64 and lazy studies."""
    engines: list[str] = field(default_factory=lambda: ["closed_form", "autograd"])
    """Of ours: closed_form, autograd, and uncut, which is the closed form carrying targets only."""
    circuit_tracer: str | None = None
    """The interpreter of an environment where circuit-tracer is installed."""
    peer_batches: list[int] = field(default_factory=lambda: [512, 16])
    """Targets at once in circuit-tracer: its default, and what is fastest on one thread of the machine we have."""
    full: bool = False
    """The long sweeps, up to 512 tokens, and all studies."""
    repeats: int = 1
    """Measurements of each; the one of the median cost counts."""
    name: str = "attribution"
    """Of the table in results/ and the plots in runs/."""


@dataclass(frozen=True)
class Measured:
    """One engine on one case."""

    study: str
    case: Case
    engine: str
    operations: float
    """Counted, of the textbook algorithm on all active features."""
    cost: dict[str, Any]
    """The worker's answer."""
    difference: float | None
    """‖A − A_autograd‖ / ‖A_autograd‖ over the edges both engines have nodes for."""
    held: float | None = None
    """Influence held by its features, against as many chosen from the full graph."""

    @property
    def ratio(self) -> float:
        return self.cost["cpu"] / (self.operations / self.cost["rate"])


def studies(options: Options) -> Iterator[tuple[str, Case]]:
    """The cases to measure."""
    wanted = list(Study.__args__) if options.full else options.studies  # pyright: ignore[reportAttributeAccessIssue]
    for kind in options.kinds:
        if "reference" in wanted:
            yield "reference", Case(kind=kind)
        if "float64" in wanted:
            yield "float64", small(kind=kind, tokens=12, features=512, active=8, float64=True)
    bases = [small(), small(kind="clt")]
    lengths = (8, 16, 32, 64, 128, 256, 512) if options.full else (8, 16, 32, 64, 128)
    varied: dict[str, list[dict[str, Any]]] = {
        "tokens": [{"tokens": n} for n in lengths],
        "features": [{"features": n} for n in (1024, 4096, 16384)],
        "width": [{"d_model": d} for d in (128, 256, 512)],
        "layers": [{"n_layers": n} for n in (2, 4, 8, 16)],
    }
    for study in (s for s in varied if s in wanted):
        for base in bases:
            yield from ((study, replace(base, **change)) for change in varied[study])
    if options.full:
        yield from (("tokens", Case(tokens=n)) for n in (8, 32, 64, 128))


def engines(options: Options) -> list[str | None]:
    """Those of ours that this version has; None: its only one, which is autograd."""
    if "engine" not in inspect.signature(cs.attribute).parameters:
        return [None] if "autograd" in options.engines else []
    return list(options.engines)


def run_worker(python: str, worker: str, task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What a worker answers; raises where it stopped."""
    path = folder / "task.json"
    path.write_text(json.dumps(task))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        [python, "-W", "ignore", str(WORKERS / worker), str(path)], capture_output=True, text=True, env=environment
    )
    if (found := answer_in(done.stdout.splitlines())) is not None:
        return found
    raise RuntimeError(f"{worker} stopped with {done.returncode}:\n{done.stderr[-2000:]}")


def measure_case(options: Options, study: str, case: Case, folder: Path) -> list[Measured]:
    """Every engine on one case, in turns."""
    prepared = prepare(case, folder)
    operations = sum(counted_operations(prepared, 10).values())
    ours = [e for e in engines(options) if e != "autograd" or operations <= AUTOGRAD_AT_MOST]
    names = [(e or "autograd", e) for e in ours]
    if options.circuit_tracer and not case.float64 and operations <= AUTOGRAD_AT_MOST:
        names += [(f"{PEER}, batch {batch}", None) for batch in options.peer_batches]
    answers: dict[str, list[dict[str, Any]]] = {}
    for _ in range(options.repeats):
        for name, engine in names:
            answers.setdefault(name, []).append(_measure(options, prepared, name, engine, folder))
    found = []
    for name, runs in answers.items():
        cost = sorted(runs, key=lambda run: run["cpu"] * run["rate"])[len(runs) // 2]
        operations = sum(counted_operations(prepared, cost["n_logits"]).values())
        difference = None
        if name != "autograd" and "autograd" in answers:
            difference = relative_difference(folder / f"{name}.npz", folder / "autograd.npz")
        found.append(Measured(study, case, name, operations, cost, difference))
    if (options.full or "lazy" in options.studies) and study == "reference" and "closed_form" in answers:
        found.append(_lazy(options, prepared, found[0], folder))
    return found


def _measure(
    options: Options, prepared: Prepared, name: str, engine: str | None, folder: Path, max_features: int | None = None
) -> dict[str, Any]:
    case = prepared.case
    task = {
        "model": str(prepared.model), "dictionaries": str(prepared.dictionaries), "tokens": prepared.tokens,
        "n_active": len(prepared.index), "d_model": case.d_model, "n_layers": case.n_layers, "kind": case.kind,
        "float64": case.float64, "engine": engine, "max_features": max_features,
        "out": str(folder / f"{name}{'' if max_features is None else '-lazy'}.npz"),
    }  # fmt: skip
    if not name.startswith(PEER):
        return run_worker(sys.executable, "attribution_worker.py", task, folder)
    assert options.circuit_tracer is not None
    task["batch_size"] = int(name.rpartition(" ")[2])
    return run_worker(options.circuit_tracer, "circuit_tracer_worker.py", task, folder)


def _lazy(options: Options, prepared: Prepared, full: Measured, folder: Path) -> Measured:
    """A quarter of the active features, chosen while they are found."""
    count = len(prepared.index) // 4
    runs = [_measure(options, prepared, "closed_form", "closed_form", folder, count) for _ in range(options.repeats)]
    cost = sorted(runs, key=lambda run: run["cpu"] * run["rate"])[len(runs) // 2]
    held = influence_held(folder / "closed_form-lazy.npz", folder / "closed_form.npz", count)
    return Measured("lazy", full.case, "closed_form, ¼ of the features", full.operations, cost, None, held)


def influence_held(lazy: Path, full: Path, count: int) -> float:
    """Influence (by the full graph) of the features that were chosen, over that of the `count` most influential."""
    chosen, everything = (np.load(path, allow_pickle=False) for path in (lazy, full))
    names, values = (everything[key][everything["feature"]] for key in ("ids", "influence"))
    influence = dict(zip(names, values, strict=True))
    if int(chosen["feature"].sum()) > count:
        raise RuntimeError(f"{int(chosen['feature'].sum())} features were kept; {count} were asked for.")
    best = np.sort(values)[::-1][:count].sum()
    return float(sum(influence[i] for i in chosen["ids"][chosen["feature"]]) / best)


def relative_difference(path: Path, reference: Path) -> float:
    """Frobenius, over the nodes that both have (circuit-tracer has no biases)."""
    ours, theirs = (np.load(p, allow_pickle=False) for p in (path, reference))
    if set(ours["ids"][~ours["bias"]]) - set(theirs["ids"]) and "/closed_form" in str(path):
        raise RuntimeError("The engines disagree on the nodes of the graph.")
    common = sorted(set(ours["ids"]) & set(theirs["ids"]))
    a, b = (_dense_order(graph, common) for graph in (ours, theirs))
    return float(sparse.linalg.norm(a - b) / sparse.linalg.norm(b))


def _dense_order(graph: Any, ids: list[str]) -> sparse.csr_array:
    """Edges between nodes of the given ids, in their order."""
    order = {name: i for i, name in enumerate(ids)}
    new = np.array([order.get(name, -1) for name in graph["ids"]])
    row, col = new[graph["row"]], new[graph["col"]]
    keep = (row >= 0) & (col >= 0)
    return sparse.csr_array((graph["weight"][keep], (row[keep], col[keep])), shape=(len(ids), len(ids)))


def table(measured: list[Measured]) -> list[list[object]]:
    """A row for each measurement; the last columns compare with the closed form on the same case."""
    closed = {m.case: m for m in measured if m.engine == "closed_form"}
    rows: list[list[object]] = []
    for m in measured:
        base = closed.get(m.case)
        against = "" if base is None else f"{m.cost['cpu'] / base.cost['cpu']:.2f}×"
        note = f"holds {m.held:.1%} of the influence" if m.held is not None else ""
        note = note or ("" if m.difference is None else f"{m.difference:.1e}")
        rows.append(
            [
                m.study, m.case.kind, m.case.label, m.engine, f"{m.cost['cpu']:.2f}", f"{m.cost['wall']:.2f}",
                f"{m.cost['peak_mb']:,.0f}", f"{m.cost['edges']:,}", f"{m.operations / 1e9:,.1f}",
                f"{m.cost['rate'] / 1e9:.0f}", f"{m.ratio:.2f}", against, note,
            ]
        )  # fmt: skip
    return rows


COLUMNS = [
    "study", "kind", "layers × width, features a layer, prompt", "engine", "CPU s", "wall s", "MB above the model",
    "edges", "GFLOP counted", "GFLOP/s", "cost", "CPU against closed_form", "difference to autograd",
]  # fmt: skip


def plot(measured: list[Measured], path: Path) -> None:
    """Seconds and memory against each size that was varied."""
    import plotly.graph_objects as go
    from plotly.colors import qualitative
    from plotly.subplots import make_subplots

    varied = {"tokens": "tokens", "features": "features", "width": "d_model", "layers": "n_layers"}
    shown = [study for study in varied if any(m.study == study for m in measured)]
    if not shown:
        return
    titles = [f"{what} against {study}" for what in ("CPU seconds", "MB above the model") for study in shown]
    figure = make_subplots(rows=2, cols=len(shown), subplot_titles=titles, shared_yaxes=True)
    colours: dict[str, str] = {}
    for column, study in enumerate(shown, start=1):
        lines: dict[str, list[Measured]] = {}
        for m in (m for m in measured if m.study == study):
            size = "GPT-2 small" if m.case.d_vocab == Case().d_vocab else "pocket"
            lines.setdefault(f"{m.engine}, {m.case.kind}, {size}", []).append(m)
        for name, points in lines.items():
            new = name not in colours
            colour = colours.setdefault(name, qualitative.Plotly[len(colours) % len(qualitative.Plotly)])
            x = [getattr(m.case, varied[study]) for m in points]
            for row, key in enumerate(("cpu", "peak_mb"), start=1):
                y = [m.cost[key] for m in points]
                line = go.Scatter(
                    x=x, y=y, name=name, legendgroup=name, showlegend=new and row == 1, line={"color": colour}
                )
                figure.add_trace(line, row, column)
        sizes = sorted({getattr(m.case, varied[study]) for m in measured if m.study == study})
        figure.update_xaxes(type="log", tickvals=sizes, ticktext=[f"{n:,}" for n in sizes], col=column)
    figure.update_yaxes(type="log", dtick=1)
    figure.update_layout(margin={"t": 40, "b": 40, "l": 50, "r": 10}, legend={"orientation": "h"})
    path.parent.mkdir(exist_ok=True)
    figure.write_html(path)


def main() -> None:
    options = tyro.cli(Options)
    measured: list[Measured] = []
    for study, case in studies(options):
        with tempfile.TemporaryDirectory() as folder:
            found = measure_case(options, study, case, Path(folder))
        for row in table(found):
            print(*row, sep="\t", flush=True)
        measured += found
    claim = str(__doc__).split("\n    python")[0].strip() + "\n\nOne thread. "
    rates = statistics.median(m.cost["rate"] for m in measured) / 1e9
    claim += f"Median matrix rate of the run: {rates:.0f} GFLOP/s."
    print(write_table(options.name, claim, COLUMNS, table(measured)))
    plot(measured, Path("runs") / f"{options.name}.html")


if __name__ == "__main__":
    main()
