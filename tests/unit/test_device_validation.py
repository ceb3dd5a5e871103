"""Validation as a device runs it, on the CPU: rows of all regimes in one pass, and what would make a device wait.

Operations and what waits are counted by the dispatcher, host reads that it does not see (`tolist`, `numpy`, numbers) by
the methods of tensors. On a CPU nothing waits; what is counted is what would on a device.
"""

from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

from circuitsae.attribution import attribute
from circuitsae.interventions import Contribution, Recording, Regime, RegimeName, node_change, run_reads
from circuitsae.interventions.changes import node_changes
from circuitsae.interventions.forward import MOST, REGIMES, pass_memory
from circuitsae.interventions.mixed import run_mixed
from circuitsae.interventions.writers import Shares, Writers
from circuitsae.replacement import ReplacementModel
from circuitsae.validation import claims, error_budget, measuring, validate
from circuitsae.validation.claims import Pairs, Settings, judge
from circuitsae.validation.measuring import Asked, Targets, effects, effects_in
from transcoders import devices
from transcoders.dictionaries import random_dictionaries
from transcoders.errors import InputError
from transcoders.random_models import random_model

TOKENS = torch.tensor([0, 5, 11, 5, 8, 3])
LAYERS = 3
WAITS = {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select", "repeat_interleave", "equal"}
READS = {"tolist", "numpy", "item", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__"}


class Dispatched(TorchDispatchMode):
    """Counts operations that launch something, and those that wait for what they computed."""

    def __init__(self) -> None:
        super().__init__()
        self.ran, self.waited = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not func.is_view:
            self.ran[name] += 1
        masks = [x for x in (args[1] if name in ("index", "index_put", "index_put_") else ()) if x is not None]
        if name in WAITS or any(mask.dtype in (torch.bool, torch.uint8) for mask in masks):
            self.waited[name] += 1
        return func(*args, **(kwargs or {}))


class Called(TorchFunctionMode):
    """Counts reads of tensors by the host, and what the host makes tensors of, which a device is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.sent = Counter(), Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = (resolve_name(func) or getattr(func, "__name__", "")).rpartition(".")[2]
        if name in READS:
            self.read[name] += 1
        if name in ("tensor", "from_numpy", "as_tensor"):
            self.sent[name] += 1
        return func(*args, **(kwargs or {}))


def counted(work):
    """What one call runs, waits for, and moves between host and device."""
    with Called() as called, Dispatched() as dispatched:
        work()
    return dispatched.ran, dispatched.waited + called.read, called.sent


def replacement(kind, skip=False):
    lm = random_model("gpt2", n_layers=LAYERS, d_model=16, n_heads=4, d_vocab=40, dtype=torch.float64)
    dictionaries = random_dictionaries(kind, n_layers=LAYERS, d_model=16, features=24, skip=skip, dtype=torch.float64)
    return ReplacementModel(lm, dictionaries)


@pytest.fixture(scope="module", params=["clt", "skip"])
def model(request):
    return replacement("clt" if request.param == "clt" else "plt", skip=request.param == "skip")


@pytest.fixture(scope="module")
def graph(model):
    return attribute(model, TOKENS)


@pytest.fixture(scope="module")
def prompt(model):
    return Recording(model, model.trace(TOKENS))


def pairs_of(graph, every):
    rows, columns = graph.weights.tocoo().coords
    ends = zip(columns[::every], rows[::every], strict=True)
    nodes = [(graph.nodes[s], graph.nodes[t]) for s, t in ends]
    return Pairs.of([(s, t) for s, t in nodes if s.kind in ("feature", "token", "error")])


# the same numbers


@pytest.mark.parametrize("memory", [None, 200_000])
def test_claims_judged_together_are_those_judged_apart(model, graph, prompt, memory):
    pairs, elsewhere = pairs_of(graph, 9), measuring.values_of([prompt])
    apart, together = (
        judge(model, prompt, pairs, Settings(controls=30, memory=memory, together=one), elsewhere=elsewhere)
        for one in (False, True)
    )
    numbers = list(apart.select_dtypes("number").columns)
    values = apart[numbers].to_numpy(float)
    size = np.nanmax(np.abs(values), axis=0)
    np.testing.assert_allclose(together[numbers].to_numpy(float) / size, values / size, rtol=1e-8, atol=1e-9)
    pd.testing.assert_frame_equal(apart.drop(columns=numbers), together.drop(columns=numbers))
    assert len(set(apart["graph_verdict"])) > 1


def test_every_regime_may_have_rows_in_one_pass(model, graph, prompt):
    nodes = [node for node in graph.nodes if node.kind in ("feature", "token", "error")][::4]
    writers = Writers(model, prompt, node_changes(model, prompt.trace, nodes))
    regimes = [regime for regime in REGIMES.values() if regime.mlps != "features"]
    regimes += [
        Regime(patterns=frozenset({(1, 2), (2, 0)}), norms="frozen"),
        Regime(norms=frozenset({"ln_final.hook_scale"})),
    ]
    targets = Targets(model, prompt.trace, [node for node in graph.nodes if node.is_target])
    asked = [(Shares(writers, np.arange(len(writers)), np.full(len(writers), -0.3)), regime) for regime in regimes]
    together = effects_in(model, prompt, asked, targets, together=True)
    for (shares, regime), found in zip(asked, together, strict=True):
        alone = [[-0.3 * node_change(model, prompt.trace, node)] for node in nodes]
        expected = effects(model, prompt, alone, targets, regime)
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10 * np.abs(expected).max())
        assert len(shares) == len(nodes)


def test_heads_that_carry_an_edge_are_found_together(model, graph, prompt, monkeypatch):
    pairs = pairs_of(graph, 25)
    apart = error_budget.split(model, prompt, pairs, "model")[1]
    monkeypatch.setattr(error_budget, "effects_in", lambda *given: effects_in(*given, together=True))
    together = error_budget.split(model, prompt, pairs, "model")[1]
    np.testing.assert_allclose(apart, together, rtol=1e-7, atol=1e-10)


def test_what_cannot_be_mixed_or_is_not_there_is_refused(model, prompt, graph):
    writers = Writers(model, prompt, [])
    with pytest.raises(InputError, match="cannot be mixed"):
        list(run_mixed(model, prompt, Shares.removing(writers), [REGIMES["replacement"]]))
    with pytest.raises(InputError, match="Position 9"):
        Writers(model, prompt, [Contribution(9, (-1,), prompt.trace.frozen.writes.embed[:1])])


def test_writers_begin_at_the_block_that_they_write_into(model, graph, prompt):
    nodes = [node for node in graph.nodes if node.kind in ("feature", "token", "error")]
    writers = Writers(model, prompt, node_changes(model, prompt.trace, nodes))
    assert writers.starts.tolist() == [max(node.layer, 0) for node in nodes]


# what a device would wait for


def test_nothing_waits_for_an_edge(model, graph, monkeypatch):
    """`validate` of ten times as many edges reads and waits as often: once for all its runs, and a few times before."""
    monkeypatch.setattr(claims, "effects_in", lambda *given, **named: effects_in(*given, **named | {"together": True}))
    few, many = (counted(lambda n=n: validate(model, graph, edges=n, controls=20, heads=0)) for n in (20, 200))
    assert many[1] == few[1]
    assert sum(many[2].values()) <= sum(few[2].values()) + 2 * LAYERS  # numbers of features, a list for each layer
    assert sum(many[0].values()) <= sum(few[0].values()) + 20 * LAYERS


@pytest.mark.parametrize("together", [False, True])
def test_a_batch_of_runs_is_read_once(model, graph, prompt, together):
    """Passes wait for nothing, whatever their number of rows, and launch the same operations."""
    nodes = [node for node in graph.nodes if node.kind in ("feature", "token", "error")]
    writers = Writers(model, prompt, node_changes(model, prompt.trace, nodes))
    targets = Targets(model, prompt.trace, [node for node in graph.nodes if node.is_target])
    names: list[RegimeName] = ["frozen", "linear", "graph", "direct", "model"]

    def work(rows):
        shares = Shares.removing(writers).take(np.arange(rows))
        asked: list[Asked] = [(shares, name) for name in names]
        return lambda: effects_in(model, prompt, asked, targets, together=together)

    work(len(nodes))()  # what is found out once
    few, many = counted(work(3)), counted(work(len(nodes)))
    passes, copies = (2, 1) if together else (len(names), len(names))
    assert few[1] == many[1]
    of_transformers = Counter(_local_scalar_dense=passes, __bool__=passes)  # whether texts are packed, once a pass
    assert many[1] - of_transformers == Counter(cpu=copies, numpy=copies)
    assert sum(many[0].values()) <= sum(few[0].values()) + 5 * LAYERS * passes  # places that the first three lack


def test_operations_of_a_pass_are_few_for_each_layer(model, graph, prompt):
    """All claims of all edges in two passes: what holds, replaces and reads costs at most twice the model's own."""
    nodes = [node for node in graph.nodes if node.kind in ("feature", "token", "error")]
    writers = Writers(model, prompt, node_changes(model, prompt.trace, nodes))
    shares = Shares.removing(writers)
    names: list[RegimeName] = ["frozen", "linear", "graph", "direct", "model"]
    regimes = [REGIMES[name] for name in names for _ in range(len(shares))]
    joined = Shares.join([shares] * len(names))
    list(run_mixed(model, prompt, joined, regimes))
    own = sum(counted(lambda: model.model.run_to_unembedding(TOKENS[None]))[0].values())
    ran = sum(counted(lambda: list(run_mixed(model, prompt, joined, regimes)))[0].values())
    apart = counted(lambda: [list(run_reads(model, prompt, shares, name)) for name in names])
    assert ran <= 2 * (own + 40 * LAYERS)
    assert ran < sum(apart[0].values())


def test_memory_of_a_pass_is_what_the_device_has(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 2**30, 8 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**30)
    assert pass_memory(cuda) == 2 * 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 * 2**30, 140 * 2**30))
    assert pass_memory(cuda) == MOST
    assert pass_memory(cpu) == 256 * 2**20
    assert pass_memory(cuda, 5) == 5
    assert devices.free_memory(cpu, 7) == 7
