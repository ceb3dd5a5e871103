# pyright: reportMissingImports=false
"""The peers' work for `gpu.py`, in their own environments: circuit-tracer's graphs, steps of sparsify and CLT-Forge.

How their models and trainers are made is that of `circuit_tracer_worker` and `quality_libraries`.
"""

from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import torch
from gpu_measuring import serve, timed


def graph(task: dict[str, Any]) -> dict[str, Any]:
    """circuit-tracer, all active features expanded."""
    from circuit_tracer import attribute
    from circuit_tracer_worker import load

    model = load(task | {"kind": task["kind_of"]})
    tokens = torch.tensor(task["tokens"], device=task["device"])
    edges: list[int] = []

    def work() -> None:
        found = attribute(tokens, model, max_feature_nodes=None, batch_size=task["batch_size"])
        edges[:] = [int((found.adjacency_matrix != 0).sum())]

    cost = timed(work, task["device"], rounds=task["rounds"])
    return cost | {"edges": edges[0], "version": version("circuit-tracer")}


def step(task: dict[str, Any]) -> dict[str, Any]:
    """One library's own step on activations that lie on the device."""
    from quality_batches import Batch
    from quality_libraries import LIBRARIES

    shape = (task["batch"], task["d"]) if task["kind_of"] == "topk" else (task["batch"], task["layers"], task["d"])
    reads = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(task["device"])
    batch = Batch(reads, reads if task["kind_of"] == "topk" else reads.roll(1, dims=0))
    data: Any = SimpleNamespace(sample=lambda: batch)
    library = LIBRARIES[task["library"]](task | {"kind": task["kind_of"]}, data)
    return timed(lambda: library.step(batch), task["device"], rounds=task["rounds"] * 10)


if __name__ == "__main__":
    serve({"graph": graph, "step": step})
