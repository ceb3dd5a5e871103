"""Our own work for `gpu.py`, a line of its input a task: graphs, validation, steps of the trainer, the machine."""

from functools import lru_cache
from typing import Any

import torch
from gpu_measuring import machine_rates, serve, timed

import circuitsae as cs
from transcoders.training.config import CLTConfig, SAEConfig
from transcoders.training.step import Run

POCKET_PROMPT = "The capital of the state containing Dallas is"


@lru_cache(maxsize=1)
def _model(model: str, dictionaries: str, device: str) -> cs.ReplacementModel:
    return cs.ReplacementModel(cs.load_model(model, device=device), cs.load_dictionaries(dictionaries, device=device))


def graph(task: dict[str, Any]) -> dict[str, Any]:
    """A full graph of one prompt, every active feature expanded."""
    model, tokens = _model(task["model"], task["dictionaries"], task["device"]), torch.tensor(task["tokens"])
    made: list[int] = []

    def work() -> None:
        found = cs.attribute(model, tokens)
        made[:] = [int(found.weights.nnz), sum(node.kind == "feature" for node in found.nodes)]

    cost = timed(work, task["device"], rounds=task["rounds"])
    return cost | {"edges": made[0], "active": made[1]}


def pocket(task: dict[str, Any]) -> dict[str, Any]:
    """A pruned graph of the embedded model."""
    model = _model("pocket", "pocket", task["device"])
    return timed(lambda: cs.attribute(model, POCKET_PROMPT).prune(), task["device"], rounds=task["rounds"])


def validate(task: dict[str, Any]) -> dict[str, Any]:
    """All three claims of some edges of a graph, which is made before."""
    model, tokens = _model(task["model"], task["dictionaries"], task["device"]), torch.tensor(task["tokens"])
    graph = cs.attribute(model, tokens, max_features=task["max_features"]).prune()
    found: list[Any] = []

    def work() -> None:
        found[:] = [cs.validate(model, graph, edges=task["edges"])]

    cost = timed(work, task["device"], rounds=task["rounds"])
    return cost | {"edges": len(found[0].edges), "frozen_error": found[0].frozen_error}


def step(task: dict[str, Any]) -> dict[str, Any]:
    """A step of the public trainer on activations that lie on the device; metrics are not read."""
    config = {"SAEConfig": SAEConfig, "CLTConfig": CLTConfig}[task["class"]](**task["config"])
    drawn = torch.randn(config.batch, task["layers"], task["d"], generator=torch.Generator().manual_seed(0))
    reads = drawn.to(task["device"])
    writes = reads if config.kind == "sae" else reads.roll(1, dims=0)
    run, done = Run.start(config, reads, writes), iter(range(config.steps))
    return timed(lambda: run.step(next(done), reads, writes, measure=False), task["device"], rounds=task["rounds"] * 10)


def rates(task: dict[str, Any]) -> dict[str, Any]:
    """What the machine can do, and what it is called."""
    from transcoders.devices import device_name

    name = device_name(torch.device(task["device"]))
    return machine_rates(task["device"], tiny=task["tiny"]) | {"name": name, "torch": torch.__version__}


if __name__ == "__main__":
    serve({"graph": graph, "pocket": pocket, "validate": validate, "step": step, "rates": rates})
