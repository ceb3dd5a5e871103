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
from scipy.sparse.linalg import norm as sparse_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from circuitsae.attribution import LogitTargets, attribute, attribute_pruned, device_graph
from circuitsae.attribution.autograd import autograd_rows
from circuitsae.attribution.device_graph import DeviceInfluence, strongest_of_rows, threshold
from circuitsae.attribution.device_sweep import BLOCK_BYTES, DeviceSources, DeviceSweep, Memory
from circuitsae.attribution.expansion import Expansion
from circuitsae.attribution.linear import Attention, linear_model
from circuitsae.attribution.nodes import Endpoints, SourceVectors
from circuitsae.attribution.targets import explained_logits
from circuitsae.graph import AttributionGraph, keep_strongest, pruning
from circuitsae.replacement import ReplacementModel
from transcoders.dictionaries import random_dictionaries
from transcoders.errors import InputError
from transcoders.loading import random_model
from transcoders.random_models import Family

TOKENS = torch.tensor([0, 11, 22, 33, 11, 7])
TARGETS = LogitTargets([3, 5, 60])
FAMILIES: tuple[Family, ...] = ("gpt2", "llama", "gpt_neox", "gemma2", "phi")
"""LayerNorms with biases; grouped heads; parallel blocks; norms after; parallel blocks and a bias of the logits."""
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
ROOMY = Memory(2**26, 2**26)


def replacement(
    family: Family = "gpt2",
    kind: Any = "plt",
    skip: bool = False,
    dtype: torch.dtype = torch.float64,
    n_layers: int = 3,
) -> ReplacementModel:
    model = random_model(family, n_layers=n_layers, d_model=16, n_heads=4, d_vocab=64, dtype=dtype)
    dictionaries = random_dictionaries(kind, n_layers=n_layers, d_model=16, features=24, skip=skip, dtype=dtype, seed=1)
    return ReplacementModel(model, dictionaries)


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch):
    """Makes the processor count as a device, with so much memory."""

    def force(memory: Memory = ROOMY) -> None:
        monkeypatch.setattr("circuitsae.attribution.device_sweep.ON_DEVICE", frozenset({"cpu"}))
        monkeypatch.setattr(Memory, "of", lambda device: memory)

    return force


def sweep_of(model: ReplacementModel, tokens: torch.Tensor, *, pairs: bool, batch_size: int | None = None):
    """The ends of all edges of a prompt, and its sweep."""
    trace = model.trace(tokens)
    ends = Endpoints.of(model, explained_logits(model, trace, torch.tensor([3, 5, 60])))
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
        np.testing.assert_allclose(
            getattr(found, name), getattr(expected, name), rtol=tolerance, atol=tolerance * largest
        )
    assert found.scores.as_dict() == pytest.approx(expected.scores.as_dict(), rel=10 * tolerance)
    assert found.provenance == expected.provenance


@pytest.mark.parametrize(("kind", "skip"), [("plt", False), ("clt", True)])
@pytest.mark.parametrize(
    ("family", "dtype"), [*((family, torch.float64) for family in FAMILIES), ("gpt2", torch.float32)], ids=str
)
def test_graphs_are_those_of_the_processor(on_device, family, kind, skip, dtype):
    model = replacement(family, kind, skip, dtype)
    full = attribute(model, TOKENS, targets=TARGETS)
    pruned, size = attribute_pruned(model, TOKENS, targets=TARGETS, nodes=0.9, edges=0.95)
    on_device()
    assert_equal(attribute(model, TOKENS, targets=TARGETS), full, TOLERANCE[dtype])
    found, same = attribute_pruned(model, TOKENS, targets=TARGETS, nodes=0.9, edges=0.95)
    assert_equal(found, pruned, TOLERANCE[dtype])
    assert same == size


@pytest.mark.parametrize("memory", [ROOMY, Memory(2**16, 2**15), Memory(2**16, 0)], ids=str)
@pytest.mark.parametrize(
    ("kind", "skip", "settings"),
    [
        ("plt", True, {}),
        ("clt", False, {}),
        ("plt", False, {"max_features": 20}),
        ("plt", True, {"edges_per_node": 9}),
        ("clt", True, {"unexplained": 0.2}),
        ("plt", False, {"batch_size": 7}),
    ],
    ids=str,
)
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
                expected = rows_of(ends.targets.take(torch.arange(len(ends.targets.layer)))).numpy()
            engine = sweep if skips else sweep.without_skips()
            for part, block in zip(sweep.all_targets.parts, sweep.blocks(sweep.all_targets), strict=True):
                numbers = sweep.all_targets.numbers[part.start : part.stop]
                whole, n_extra = np.zeros((len(numbers), len(ends.nodes))), sweep.extra.shape[1]
                rows = block.weights if skips else block.direct
                assert rows is not None
                whole[:, block.columns.numpy()] = rows.numpy()
                np.testing.assert_allclose(whole[:, : expected.shape[1]], expected[numbers], rtol=0, atol=1e-12)
                extra = whole[:, expected.shape[1] : expected.shape[1] + n_extra]
                assert np.array_equal(extra, ends.unembedding_bias[numbers])
            for numbers, rows in engine.rows(np.array([5, 2, len(expected) - 1])):
                np.testing.assert_allclose(rows, expected[numbers][:, engine.columns], rtol=0, atol=1e-12)


# what it costs


VIEWS = {"_unsafe_view", "squeeze_"}
"""More operations that launch nothing."""


class Operations(TorchDispatchMode):
    """Counts operations that are more than another view of the same numbers, and where their tensors are."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.devices: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[str(func)] += not (func.is_view or func._opname in VIEWS)
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
    if isinstance(value, DeviceSources | SourceVectors) or (
        dataclasses.is_dataclass(value) and hasattr(value, "__dict__")
    ):
        kept = {"trace", "dictionaries", "_kept", "memory"}  # nothing of these is asked during a sweep
        other = copy.copy(value)
        for name, part in vars(value).items():
            object.__setattr__(other, name, part if name in kept else on_meta(part))
        return other
    return value


def operations_of_blocks(model: ReplacementModel, n_tokens: int, *, pairs: bool) -> int:
    """How many operations the block of most takes, until its influence has been passed on."""
    most = 0
    with torch.no_grad():
        ends, sweep = sweep_of(model, torch.arange(n_tokens) % 60, pairs=pairs, batch_size=200)
        sweep, order = on_meta(sweep), on_meta(sweep.all_targets)
        mask = torch.zeros(len(ends.nodes), dtype=torch.bool, device="meta")
        figures = DeviceInfluence(mask.double(), mask, mask)
        blocks = sweep.blocks(order)
        for _ in order.parts:
            with Operations() as counted:
                figures.add(next(blocks))
            assert counted.devices == {"meta"}
            most = max(most, counted.count)
    return most


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama", "phi"])
def test_a_block_takes_a_fixed_number_of_operations_and_never_waits(family, skip):
    few, many = (replacement(family, "plt", skip, torch.float32, n_layers) for n_layers in (3, 6))
    counts = [operations_of_blocks(many, n_tokens, pairs=skip) for n_tokens in (12, 40)]
    assert counts[0] == counts[1]
    by_layer = (counts[0] - operations_of_blocks(few, 12, pairs=skip)) / 3
    assert by_layer <= 40
    assert counts[0] - 6 * by_layer <= 60


def test_cross_layer_features_take_no_more_operations():
    counts = {operations_of_blocks(replacement("gpt2", kind, n_layers=4), 12, pairs=False) for kind in ("plt", "clt")}
    assert len(counts) == 1


@pytest.mark.parametrize("skip", [False, True])
def test_what_comes_to_the_host_is_what_is_returned(monkeypatch, skip):
    """Figures of all nodes, once; the edges that were kept (with those that dangle), once; and how many these are."""
    copied, edges = [], []
    to_numpy, dangling = torch.Tensor.numpy, pruning.drop_dangling
    monkeypatch.setattr(device_graph, "drop_dangling", lambda *given: edges.append(given[1].nnz) or dangling(*given))
    with torch.no_grad():
        ends, sweep = sweep_of(replacement("gpt2", "plt", skip), TOKENS, pairs=skip, batch_size=20)
        expansion = Expansion(
            engine=sweep, without_skips=sweep.without_skips() if skip else None, ends=ends, provenance={},
            edges_per_node=None, done=lambda n: None,
        )  # fmt: skip
        assert len(sweep.all_targets.parts) > 2
        monkeypatch.setattr(torch.Tensor, "numpy", lambda x: copied.append(x.numel() * x.element_size()) or to_numpy(x))
        with Operations() as operations:
            graph, size = device_graph.pruned(expansion, sweep, nodes=0.8, edges=0.9)
    assert 0 < graph.weights.nnz <= edges[0] < size.edges / 2
    edge, ends_of_rows = 8 + 4, 4 * (len(expansion.nodes) + 1)  # float64 with its column
    figures = 8 * (5 * len(expansion.nodes) + 2)  # of all, how many edges there are, and the error of products
    assert sum(copied) <= figures + (1 + skip) * (edges[0] * edge + ends_of_rows)
    assert len(copied) == 4 + 3 * (1 + skip)
    assert operations.names["aten._local_scalar_dense.default"] == 1 + skip


def test_products_in_tf32_come_with_their_measured_error(on_device, monkeypatch):
    """A processor has no TF32: that of a device is imitated, where torch is told that it may be used."""
    model = replacement("gpt2", dtype=torch.float32)
    exact, transpose = attribute(model, TOKENS, targets=TARGETS), Attention.transpose

    def rounded(attention: Attention, g: torch.Tensor) -> torch.Tensor:
        allowed = torch.get_float32_matmul_precision() == "high"
        return transpose(attention, (g.view(torch.int32) & -(2**13)).view(torch.float32) if allowed else g)

    with pytest.raises(InputError, match="needs the closed form on a CUDA device; the model is on cpu"):
        attribute(model, TOKENS, targets=TARGETS, precision="tf32")
    monkeypatch.setattr(Attention, "transpose", rounded)
    on_device()
    graph = attribute(model, TOKENS, targets=TARGETS, precision="tf32")
    assert torch.get_float32_matmul_precision() == "highest"
    error = sparse_norm(graph.weights - exact.weights) / sparse_norm(exact.weights)
    assert 1e-6 < error < 1e-3
    assert graph.provenance["precision_error"] == pytest.approx(error, rel=0.5)
    assert "precision" not in attribute(model, TOKENS, targets=TARGETS).provenance
    with pytest.raises(InputError, match="does not go with unexplained"):
        attribute(model, TOKENS, targets=TARGETS, precision="tf32", unexplained=0.1)


# its parts


@pytest.mark.parametrize("m", [1, 3, 50])
def test_strongest_of_rows_are_those_of_the_host(m):
    weights = torch.randn(7, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    bias = torch.arange(20) < 4
    for ours, theirs in zip(
        strongest_of_rows(weights, m, ~bias), keep_strongest(weights.numpy(), m, bias.numpy()), strict=True
    ):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=1e-14)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.98, 1.0])
def test_threshold_is_that_of_the_host(share):
    scores = torch.rand(6, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 9
    counted = torch.arange(50) > 3
    found = threshold([scores[:2], scores[2:]], [counted, counted], share)
    expected = pruning.threshold([scores[:, counted].numpy().ravel()], share)
    if share < 1:
        assert float(found) == expected
    else:  # what is lost in the sum's last digit has no part in it
        assert scores[:, counted][scores[:, counted] < max(float(found), expected)].sum() < 1e-13


def test_nothing_has_no_threshold():
    assert float(threshold([], [], 0.5)) == 0
    scores = torch.zeros(2, 3, dtype=torch.float64)
    assert not ((scores >= threshold([scores], [torch.ones(3, dtype=torch.bool)], 0.5)) & (scores > 0)).any()


def test_memory_of_a_processor_is_one_block():
    assert Memory.of(torch.device("cpu")) == (BLOCK_BYTES, BLOCK_BYTES)


def test_blocks_fit_the_memory_and_go_from_the_last_position_to_the_first():
    with torch.no_grad():
        _, sweep = sweep_of(replacement("gpt2"), torch.arange(40) % 60, pairs=False)
        small = dataclasses.replace(sweep, memory=Memory(2**18, 0)).all_targets.parts
        large = sweep.all_targets.parts
    assert 1 < len(large) < len(small)
    for part in small:
        assert (part.stop - part.start) * sweep._row_bytes(part.count) <= 2**18
    assert [part.start for part in small[1:]] == [part.stop for part in small[:-1]]
    assert [part.count for part in small] == sorted((part.count for part in small), reverse=True)
