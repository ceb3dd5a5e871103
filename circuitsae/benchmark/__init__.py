"""SAEBench's tasks on local data: what dictionaries are good for, beside how well they reconstruct.

`tasks` names them and what each needs, `run` takes dictionaries and their `baselines` through all, `result` holds the
figures. `data` reads labelled texts, words and facts, `templates` are those that ship, `layers` is one layer of some
dictionaries as the tasks see it. One module for each task: `absorption`, `probing`, `removal` (spurious correlations
and targeted probe perturbation), `interchange` (RAVEL), `unlearning`; `core` is `transcoders.evaluation`. Whole sets by
the graphs and circuits that they give: `circuits`; whether one figure ranks as another does: `ranking`.
"""

from typing import TYPE_CHECKING

from transcoders._lazy import lazy_exports

if TYPE_CHECKING:
    from circuitsae.benchmark.circuits import CircuitConfig, circuit_benchmark, graph_likeness
    from circuitsae.benchmark.data import Fact, Facts, Labelled, Words
    from circuitsae.benchmark.layers import BenchmarkLayer
    from circuitsae.benchmark.ranking import Alike, ranks_alike
    from circuitsae.benchmark.result import BenchmarkResult, Estimate
    from circuitsae.benchmark.run import BenchmarkConfig, benchmark

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "circuitsae.benchmark.circuits": ("CircuitConfig", "circuit_benchmark", "graph_likeness"),
        "circuitsae.benchmark.data": ("Fact", "Facts", "Labelled", "Words"),
        "circuitsae.benchmark.layers": ("BenchmarkLayer",),
        "circuitsae.benchmark.ranking": ("Alike", "ranks_alike"),
        "circuitsae.benchmark.result": ("BenchmarkResult", "Estimate"),
        "circuitsae.benchmark.run": ("BenchmarkConfig", "benchmark"),
    },
)
