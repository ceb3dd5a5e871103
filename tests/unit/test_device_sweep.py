"""The closed form of a device, forced on the processor: the same graphs, few operations, nothing that waits for it.

Operations are counted while a block is carried on the meta device: it has shapes and no numbers, so that whatever would
need one there (`.item()`, `nonzero`, a mask as an index, a copy to the host) fails.
"""

import copy
import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from circuitsae.attribution import LogitTargets, attribute, attribute_pruned, device_graph
from circuitsae.attribution.autograd import autograd_rows
from circuitsae.attribution.device_graph import DeviceInfluence, strongest_of_rows, threshold
from circuitsae.attribution.device_sweep import DeviceSources, DeviceSweep, Memory
from circuitsae.attribution.linear import linear_model
from circuitsae.attribution.nodes import Endpoints, SourceVectors
from circuitsae.graph import AttributionGraph, keep_strongest, pruning
from circuitsae.replacement import ReplacementModel
from transcoders.dictionaries import random_dictionaries
from transcoders.loading import random_model
from transcoders.random_models import Family

TOKENS = torch.tensor([0, 11, 22, 33, 11, 7])
TARGETS = LogitTargets([3, 5, 60])
FAMILIES: tuple[Family, ...] = ("gpt2", "llama", "gpt_neox", "gemma2", "phi")
"""LayerNorms with biases; grouped heads; parallel blocks; norms after; parallel blocks and a bias of the logits."""
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
ROOMY = Memory(2**26, 2**26)


def replacement(
    family: Family = "gpt2", kind: Any = "plt", skip: bool = False, dtype: torch.dtype = torch.float64, n_layers: int = 3
) -> ReplacementModel:
    model = random_model(family, n_layers=n_layers, d_model=16, n_heads=4, d_vocab=64, dtype=dtype)
    dictionaries = random_dictionaries(kind, n_layers=n_layers, d_model=16, features=24, skip=skip, dtype=dtype, seed=1)
    return ReplacementModel(model, dictionaries)


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch):
    """Makes the processor count as a device, with so much memory."""

    def force(memory: Memory = ROOMY) -> None:
        monkeypatch.setattr("circuitsae.attribution.attribute.ON_DEVICE", frozenset({"cpu"}))
        monkeypatch.setattr(Memory, "of", lambda device: memory)

    return force


def sweep_of(model: ReplacementModel, tokens: torch.Tensor, *, pairs: bool, batch_size: int | None = None):
    """The ends of all edges of a prompt, and its sweep."""
    trace = model.trace(tokens)
    ends = Endpoints.of(model, trace, torch.tensor([3, 5, 60]))
    extra = torch.from_numpy(ends.unembedding_bias)
    sources = DeviceSources(SourceVectors(model, trace, ends.sources, linear_model(trace.frozen)), extra.shape[1])
    return ends, DeviceSweep(
        sources=sources, targets=ends.targets, target_nodes=ends.target_nodes, extra=extra, pairs=pairs,
        batch_size=batch_size, memory=ROOMY,
    )  # fmt: skip


# the same graphs


def assert_equal(found: AttributionGraph, expected: AttributionGraph, tolerance: float) -> None:
    assert [node.id for node in found.nodes] == [node.id for node in expected.nodes]
    assert found.weights.has_canonical_format
    assert np.array_equal(found.weights.indptr, expected.weights.indptr)
    assert np.array_equal(found.weights.indices, expected.weights.indices)
    assert found.weights.dtype == expected.weights.dtype
    largest = abs(expected.weights.data).max()
    assert abs(found.weights.data - expected.weights.data).max() <= tolerance * largest
    assert (found.past is None) == (expected.past is None)
    if found.past is not None:
        assert abs(found.past - expected.past).max() <= tolerance * largest
    for name in ("influence", "inputs", "rest", "cumulative"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=tolerance, atol=tolerance * largest)
    assert found.scores.as_dict() == pytest.approx(expected.scores.as_dict(), rel=10 * tolerance)
    assert found.provenance == expected.provenance


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("kind", "skip"), [("plt", False), ("plt", True), ("clt", False), ("clt", True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_are_those_of_the_processor(on_device, family, kind, skip, dtype):
    model = replacement(family, kind, skip, dtype)
    full = attribute(model, TOKENS, targets=TARGETS)
    pruned, size = attribute_pruned(model, TOKENS, targets=TARGETS, nodes=0.9, edges=0.95)
    on_device()
    assert_equal(attribute(model, TOKENS, targets=TARGETS), full, TOLERANCE[dtype])
    found, same = attribute_pruned(model, TOKENS, targets=TARGETS, nodes=0.9, edges=0.95)
    assert_equal(found, pruned, TOLERANCE[dtype])
    assert same == size


@pytest.mark.parametrize("memory", [ROOMY, Memory(2**14, 2**26), Memory(2**14, 2**14), Memory(2**14, 0)], ids=str)
@pytest.mark.parametrize(
    "settings",
    [{}, {"max_features": 20}, {"edges_per_node": 9}, {"unexplained": 0.2}, {"batch_size": 7}],
    ids=str,
)
@pytest.mark.parametrize(("kind", "skip"), [("plt", True), ("clt", False)])
def test_whatever_fits_and_whatever_is_asked_for(on_device, kind, skip, settings, memory):
    model = replacement("gpt2", kind, skip)
    full = attribute(model, TOKENS, targets=TARGETS, **settings)
    pruned = attribute_pruned(model, TOKENS, targets=TARGETS, nodes=0.9, edges=0.95, **settings)[0]
    on_device(memory)
    assert_equal(attribute(model, TOKENS, targets=TARGETS, **settings), full, 1e-10)
    found, _ = attribute_pruned(model, TOKENS, targets=TARGETS, nodes=0.9, edges=0.95, **settings)
    assert_equal(found, pruned, 1e-10)


@pytest.mark.parametrize(("kind", "skip"), [("plt", True), ("clt", True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_those_of_autograd(family, kind, skip):
    """The oracle: backward passes through the model's own modules, with skip terms and without."""
    model = replacement(family, kind, skip)
    with torch.no_grad():
        ends, sweep = sweep_of(model, TOKENS, pairs=True, batch_size=7)
        for skips in (True, False):
            with autograd_rows(model, ends.trace, skips=skips) as rows_of:
                expected = rows_of(ends.targets).numpy()
            engine = sweep if skips else sweep.without_skips()
            for part, block in zip(sweep.all_targets.parts, sweep.blocks(sweep.all_targets), strict=True):
                numbers = sweep.all_targets.numbers[part.start : part.stop]
                whole, n_extra = np.zeros((len(numbers), len(ends.nodes))), sweep.extra.shape[1]
                rows = block.weights if skips else block.direct
                whole[:, block.columns.numpy()] = rows.numpy()
                np.testing.assert_allclose(whole[:, : expected.shape[1]], expected[numbers], rtol=0, atol=1e-12)
                extra = whole[:, expected.shape[1] : expected.shape[1] + n_extra]
                assert np.array_equal(extra, ends.unembedding_bias[numbers])
            for numbers, rows in engine.rows(np.array([5, 2, len(expected) - 1])):
                np.testing.assert_allclose(rows, expected[numbers][:, engine.columns], rtol=0, atol=1e-12)


# what it costs


class Operations(TorchDispatchMode):
    """Counts operations that are more than another view of the same numbers, and where their tensors are."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[str(func)] += not func.is_view
        found = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, found)) if isinstance(x, torch.Tensor)]
        self.devices.update(x.device.type for x in tensors)
        return found

    @property
    def count(self) -> int:
        return sum(self.names.values())


def on_meta(value: Any) -> Any:
    """With every tensor inside on the meta device."""
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(on_meta, value))
    if isinstance(value, list | tuple):
        return type(value)(map(on_meta, value))
    if isinstance(value, dict):
        return {key: on_meta(part) for key, part in value.items()}
    if isinstance(value, DeviceSources | SourceVectors) or (dataclasses.is_dataclass(value) and hasattr(value, "__dict__")):
        kept = {"trace", "dictionaries", "_kept", "memory"}  # nothing of these is asked during a sweep
        other = copy.copy(value)
        for name, part in vars(value).items():
            object.__setattr__(other, name, part if name in kept else on_meta(part))
        return other
    return value


def operations_of_blocks(model: ReplacementModel, n_tokens: int, *, pairs: bool) -> tuple[set[int], set[int]]:
    """How many operations carry a block, and how many sum it, of all blocks that span all layers."""
    n_layers, carrying, summing = model.model.n_layers, set(), set()
    with torch.no_grad():
        ends, sweep = sweep_of(model, torch.arange(n_tokens) % 60, pairs=pairs, batch_size=200)
        sweep, order = on_meta(sweep), on_meta(sweep.all_targets)
        n = len(ends.nodes)
        mask = torch.zeros(n, dtype=torch.bool, device="meta")
        figures = DeviceInfluence(torch.zeros(n, dtype=torch.float64, device="meta"), mask, mask)
        blocks = sweep.blocks(order)
        for _ in order.parts:
            with Operations() as carried:
                block = next(blocks)
            with Operations() as summed:
                figures.add(block)
            assert carried.devices == summed.devices == {"meta"}
            if len(np.unique(block.layers[block.layers < n_layers])) == n_layers:
                carrying.add(carried.count - 2 * (block.layers[0] == n_layers))
                summing.add(summed.count)
    return carrying, summing


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kind", ["plt", "clt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_takes_a_fixed_number_of_operations_and_never_waits(family, kind, skip):
    per_layers = {}
    for n_layers in (3, 6):
        model = replacement(family, kind, skip, torch.float32, n_layers)
        carrying, summing = (operations_of_blocks(model, n, pairs=skip) for n in (12, 40)), None
        print(list(carrying), summing)
        per_layers[n_layers] = carrying
