"""Claim: a graph of 60,000 nodes and 20 million edges gets its influence and is pruned in under 60 seconds and 4 GB.

A random graph with the layering of a real one (rows cut to their strongest edges, in float32), in a process of its own:
seconds, and the peak of memory above what is held before each step; `whole` is the process with graph and libraries.
Versions must keep the same nodes and edges; `--before` names a checkout of an earlier one to run beside.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import tyro
from machine import write_table

from circuitsae.graph import NodeKind

HERE = Path(__file__).resolve().parent
KINDS = list(NodeKind)


@dataclass
class Options:
    """What to measure."""

    nodes: tuple[int, ...] = (6_000, 20_000, 60_000)
    """About how many nodes each graph has."""
    edges: tuple[int, ...] = (600_000, 4_000_000, 20_000_000)
    """About how many edges each graph has."""
    layers: int = 24
    """Of the model."""
    positions: int = 64
    """Of the prompt."""
    shares: tuple[float, ...] = (0.8, 1.0)
    """Of the influence, that the nodes kept hold; at 1 nearly every edge is scored."""
    before: Path | None = None
    """The root of an earlier checkout."""


def write_graph(folder: Path, n: int, n_edges: int, layers: int, positions: int) -> None:
    """Features ordered by layer and position, then errors, tokens and logits; each row's sources lie in lower layers at
    earlier or equal positions, with weights as uneven as those of real rows.
    """
    rng = np.random.default_rng(0)
    cell = max(1, (n - layers * positions - positions - 10) // (layers * positions))
    n_features, n_errors = layers * positions * cell, layers * positions
    place = np.repeat(np.arange(layers * positions), cell)
    parts = [(NodeKind.FEATURE, place // positions, place % positions)]
    parts.append((NodeKind.ERROR, np.arange(n_errors) // positions, np.arange(n_errors) % positions))
    parts.append((NodeKind.TOKEN, np.full(positions, -1), np.arange(positions)))
    parts.append((NodeKind.LOGIT, np.full(10, layers), np.full(10, positions - 1)))
    kind = np.concatenate([np.full(len(layer), KINDS.index(name), dtype=np.int8) for name, layer, _ in parts])
    layer, pos = (np.concatenate([part[i] for part in parts]) for i in (1, 2))
    targets = np.flatnonzero(np.isin(kind, [KINDS.index(NodeKind.FEATURE), KINDS.index(NodeKind.LOGIT)]))
    width = round(1.25 * n_edges / len(targets))  # some are drawn twice
    data, indices, counts = [], [], np.zeros(len(kind), dtype=np.int64)
    for rows in np.array_split(targets, max(1, n_edges // 2**20)):
        at = (rng.random((len(rows), width)) * (pos[rows, None] + 1)).astype(np.int64)
        below = (rng.random((len(rows), width)) * layer[rows, None]).astype(np.int64)
        source = (below * positions + at) * cell + rng.integers(0, cell, at.shape)
        source = np.where(rng.random(at.shape) < 0.1, n_features + below * positions + at, source)
        to_token = (layer[rows, None] == 0) | (rng.random(at.shape) < 0.05)
        source = np.sort(np.where(to_token, n_features + n_errors + at, source), axis=1)
        first = np.ones(at.shape, dtype=bool)
        first[:, 1:] = source[:, 1:] != source[:, :-1]
        weight = rng.standard_normal(at.shape, dtype=np.float32) * np.exp(
            2 * rng.standard_normal(at.shape, dtype=np.float32)
        )
        data.append(weight[first])
        indices.append(source[first].astype(np.int32))
        counts[rows] = first.sum(axis=1)
    arrays = {
        "data": np.concatenate(data),
        "indices": np.concatenate(indices),
        "kind": kind,
        "layer": layer,
        "pos": pos,
    }
    arrays["indptr"] = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


def measure(folder: Path, share: float, package: Path) -> dict[str, dict[str, float]]:
    """What the worker finds with the package in a checkout."""
    done = subprocess.run(
        [sys.executable, HERE / "workers" / "prune_graph.py", folder, str(share)],
        env={**os.environ, "PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"The worker ended with {done.returncode}: {done.stderr[-500:]}")
    return json.loads(done.stdout)


def main() -> None:
    options = tyro.cli(Options)
    versions = {"this": HERE.parent} | ({} if options.before is None else {"before": options.before.resolve()})
    rows = []
    for n, n_edges in zip(options.nodes, options.edges, strict=True):
        with tempfile.TemporaryDirectory() as folder:
            write_graph(Path(folder), n, n_edges, options.layers, options.positions)
            stored = [len(np.load(Path(folder) / f"{name}.npy", mmap_mode="r")) for name in ("kind", "data")]
            for share, version in product(options.shares, versions):
                found = measure(Path(folder), share, versions[version])
                steps, kept = [found["build"], found["prune"]], found["kept"]
                rows.append([version, *(f"{x:,}" for x in stored), share])
                rows[-1] += [f"{step['seconds']:.1f}" for step in steps] + [f"{step['above']:.0f}" for step in steps]
                rows[-1] += [f"{max(step['total'] for step in steps):.0f}"]
                rows[-1] += [f"{kept['nodes']:,}", f"{kept['edges']:,}", f"{kept['sum']:.6e}"]
    columns = ["version", "nodes", "edges", "share", "build, s", "prune, s", "build, MB", "prune, MB", "whole, MB"]
    columns += ["nodes kept", "edges kept", "sum of their magnitudes"]
    print(write_table("pruning", str(__doc__).strip(), columns, rows))


if __name__ == "__main__":
    main()
