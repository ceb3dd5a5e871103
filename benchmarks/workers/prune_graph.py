"""Build and prune the graph whose arrays lie in a folder; print seconds and peak memory as JSON.

Arguments: the folder, and the share of influence that the nodes kept hold. Run by `benchmarks/pruning.py`
in a process of its own, which may have another version of circuitsae on its path.
"""

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import sparse

from circuitsae.graph import AttributionGraph, Node, NodeKind


def memory(field: str) -> float:
    """MB of this process: `VmRSS` held now, `VmHWM` the peak. (ru_maxrss would count the parent's.)"""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def measure(work: Callable[[], AttributionGraph]) -> tuple[AttributionGraph, dict[str, float]]:
    """What `work()` returns, its seconds, and its peak memory above what is held before and in all."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    held, start = memory("VmRSS"), time.perf_counter()
    graph = work()
    return graph, {"seconds": time.perf_counter() - start, "above": memory("VmHWM") - held, "total": memory("VmHWM")}


def main(folder: Path, share: float) -> None:
    arrays = {name: np.load(folder / f"{name}.npy") for name in ("data", "indices", "indptr", "kind", "layer", "pos")}
    kinds = list(NodeKind)
    nodes = [
        Node(kinds[kind], layer, pos, index, probability=0.1 if kinds[kind] is NodeKind.LOGIT else float("nan"))
        for index, (kind, layer, pos) in enumerate(
            zip(arrays["kind"].tolist(), arrays["layer"].tolist(), arrays["pos"].tolist(), strict=True)
        )
    ]
    n = len(nodes)
    weights = sparse.csr_array((arrays["data"], arrays["indices"], arrays["indptr"]), shape=(n, n))
    graph, build = measure(lambda: AttributionGraph.build(nodes, weights, ["w"], [0], nodes[-1].layer, {}))
    pruned, prune = measure(lambda: graph.prune(nodes=share))
    kept = {
        "nodes": len(pruned.nodes),
        "edges": int(pruned.weights.nnz),
        "sum": float(np.abs(pruned.weights.data).sum(dtype=np.float64)),
    }
    print(json.dumps({"build": build, "prune": prune, "kept": kept}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
