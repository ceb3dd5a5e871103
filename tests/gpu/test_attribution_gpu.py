"""The closed form on a CUDA device: the same edges, and nothing in its loops waits for the device."""

from typing import Any

import pytest
import torch

from circuitsae.attribution import LogitTargets, attribute, attribute_pruned
from circuitsae.attribution.attribute import EngineName
from circuitsae.attribution.closed_form import ClosedForm
from circuitsae.attribution.device_graph import DeviceInfluence
from circuitsae.attribution.device_sweep import DeviceSources, DeviceSweep, Memory
from circuitsae.attribution.linear import linear_model
from circuitsae.attribution.nodes import Endpoints, SourceVectors, feature_targets, source_nodes
from circuitsae.attribution.targets import explained_logits
from circuitsae.replacement import ReplacementModel
from transcoders.dictionaries import random_dictionaries
from transcoders.loading import random_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOKENS = torch.tensor([0, 11, 22, 33, 11, 7])
TARGETS = LogitTargets([3, 5, 60])
N_LAYERS, D_MODEL = 3, 32


def replacement(device: str, dtype: torch.dtype = torch.float64, kind: Any = "clt") -> ReplacementModel:
    model = random_model("gpt2", n_layers=N_LAYERS, d_model=D_MODEL, n_heads=4, d_vocab=64, dtype=dtype)
    model.bridge.to(device)
    dictionaries = random_dictionaries(kind, n_layers=N_LAYERS, d_model=D_MODEL, features=48, dtype=dtype, seed=1)
    return ReplacementModel(model, dictionaries.to(device))


@pytest.mark.parametrize("kind", ["plt", "clt"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_device_gives_the_edges_of_the_cpu(kind, dtype):
    here, there = (
        attribute(replacement(device, dtype, kind), TOKENS, targets=TARGETS, engine="closed_form").weights
        for device in ("cpu", "cuda")
    )
    assert abs(here - there).max() <= (1e-12 if dtype == torch.float64 else 1e-5) * abs(here).max()


def test_pruning_on_the_device_keeps_what_the_cpu_keeps():
    here, there = (
        attribute_pruned(replacement(device), TOKENS, targets=TARGETS, nodes=0.9, edges=0.95)
        for device in ("cpu", "cuda")
    )
    assert here[1] == there[1]
    assert [node.id for node in here[0].nodes] == [node.id for node in there[0].nodes]
    assert abs(here[0].weights - there[0].weights).max() <= 1e-12 * abs(here[0].weights).max()


def test_tf32_is_rounded_and_says_how_much():
    exact, rounded = (
        attribute(replacement("cuda", torch.float32), TOKENS, targets=TARGETS, precision=precision)
        for precision in ("float32", "tf32")
    )
    assert "precision_error" not in exact.provenance
    assert 0 <= rounded.provenance["precision_error"] < 1e-2
    assert abs(exact.weights - rounded.weights).max() <= 1e-2 * abs(exact.weights).max()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["plt", "clt"])
def test_a_sweep_never_waits_for_the_device(kind):
    model = replacement("cuda", torch.float32, kind)
    trace = model.trace(TOKENS)
    ends = Endpoints.of(model, explained_logits(model, trace, torch.tensor([3, 5], device="cuda")))
    extra = torch.from_numpy(ends.unembedding_bias).cuda()
    sources = SourceVectors(model, trace, ends.sources, linear_model(trace.frozen))
    sweep = DeviceSweep(
        sources=DeviceSources(sources, extra.shape[1]), targets=ends.targets, target_nodes=ends.target_nodes,
        extra=extra, pairs=True, memory=Memory.of(torch.device("cuda")), batch_size=20,
    )  # fmt: skip
    order, mask = sweep.all_targets, torch.zeros(len(ends.nodes), dtype=torch.bool, device="cuda")
    figures = DeviceInfluence(mask.double(), mask, mask)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for block in sweep.blocks(order):
            figures.add(block)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_autograd_runs_on_the_device():
    engines: tuple[EngineName, ...] = ("closed_form", "autograd")
    closed, exact = (attribute(replacement("cuda"), TOKENS, targets=TARGETS, engine=name) for name in engines)
    assert abs(closed.weights - exact.weights).max() <= 1e-12 * abs(exact.weights).max()


def test_bf16_weights_give_float32_sums():
    graph = attribute(replacement("cuda", torch.bfloat16), TOKENS, targets=TARGETS, engine="closed_form")
    size = max(abs(n.pre_activation) for n in graph.nodes if n.is_target)
    assert abs(graph.residual()).max() <= 0.05 * size


@torch.no_grad()
def test_layers_are_carried_without_waiting_for_the_device():
    model = replacement("cuda")
    trace = model.trace(TOKENS)
    sources = SourceVectors(model, trace, source_nodes(model, trace), linear_model(trace.frozen))
    targets = feature_targets(model, trace, torch.arange(len(trace.features.value), device="cuda"))
    engine = ClosedForm(sources, targets, meeting_layer=1)
    list(engine.carry_sources())
    engine.rows_of(targets)  # the sources keep what they looked up
    order = torch.argsort(targets.layer, descending=True)
    above = targets.take(order).take(slice(int((targets.layer >= 1).sum())))
    layers, count = above.layer.cpu().numpy(), int(above.pos.max()) + 1
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.carry_targets(above, layers, count, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
