"""Attributes one long prompt of a random model and says what it cost, by part. Run by `benchmarks/long_prompts.py`."""

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from measuring import answer, begin_peak, cpu_seconds, peak_mb

import circuitsae as cs
from circuitsae import frozen
from circuitsae.attribution import attribute_pruned, linear
from circuitsae.attribution.carried import CarriedTargets
from circuitsae.attribution.nodes import LocalSources
from circuitsae.graph.sweep import InfluenceSweep
from transcoders.dictionaries import TranscoderSet, random_dictionaries
from transcoders.language_model import LanguageModel
from transcoders.loading import random_model
from transcoders.sites import Site

SAMPLE = 256
"""Tokens on which the thresholds of features are set."""


class Parts:
    """CPU seconds by part; a part's are without those of parts inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside = ["the rest"]
        self._since = time.process_time()

    def wrap(self, owner: Any, function: str, part: str) -> None:
        inner = getattr(owner, function)
        setattr(owner, function, self.counted(inner, part))

    def counted(self, inner: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **named: Any) -> Any:
            self._switch()
            self._inside.append(part)
            try:
                return inner(*args, **named)
            finally:
                self._switch()
                self._inside.pop()

        return timed

    def _switch(self) -> None:
        now = time.process_time()
        self.seconds[self._inside[-1]] += now - self._since
        self._since = now


def dictionaries_of(model: LanguageModel, task: dict[str, Any]) -> TranscoderSet:
    """Random transcoders, of which about `active` features a layer and position fire."""
    found = random_dictionaries("plt", n_layers=task["n_layers"], d_model=task["d_model"], features=task["features"])
    sites = [Site(layer, "mlp_in") for layer in range(task["n_layers"])]
    reads = model.activations(torch.arange(1, SAMPLE + 1)[None], sites)
    with torch.no_grad():
        for layer, site in enumerate(sites):
            h = found.pre_activations(layer, reads[site][0])
            found[layer].b_enc -= h.flatten().topk(task["active"] * SAMPLE).values[-1]
    return found


def main() -> None:
    task = json.loads(open(sys.argv[1]).read())  # noqa: SIM115
    torch.set_num_threads(1)
    sizes = {name: task[name] for name in ("n_layers", "d_model", "n_heads", "d_vocab")}
    model = random_model("gpt2", **sizes, context=max(task["tokens"], SAMPLE))
    replacement = cs.ReplacementModel(model, dictionaries_of(model, task))
    tokens = torch.randint(1, task["d_vocab"], (task["tokens"],), generator=torch.Generator().manual_seed(0))
    frozen.PATTERN_BYTES = 2**50 if task["patterns"] == "held" else 0
    held, cpu = begin_peak(), cpu_seconds()
    trace = replacement.trace(tokens)
    traced = {"trace_cpu": cpu_seconds() - cpu, "trace_mb": peak_mb() - held}
    begin_peak()
    replacement.trace = lambda *_, **__: trace
    parts = Parts()
    parts.wrap(linear, "_recomputed", "patterns")
    parts.wrap(CarriedTargets, "attend", "attention")
    parts.wrap(LocalSources, "score", "edges")
    for function in ("add", "sums"):
        parts.wrap(InfluenceSweep, function, "influence")
    cpu, wall = cpu_seconds(), time.perf_counter()
    attribute = parts.counted(attribute_pruned, "the rest")
    graph, full = attribute(replacement, tokens, max_features=task["max_features"])
    taken = {"cpu": cpu_seconds() - cpu, "wall": time.perf_counter() - wall, "mb": peak_mb() - held}
    answer(
        **traced, **taken, parts=parts.seconds, features=len(trace.features.value), nodes=full.nodes,
        edges=full.edges, kept=len(graph.nodes),
    )  # fmt: skip


if __name__ == "__main__":
    main()
