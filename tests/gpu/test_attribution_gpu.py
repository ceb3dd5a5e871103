"""The closed form on a CUDA device: the same edges, and nothing in its loops waits for the device."""

from typing import Any

import pytest
import torch

from circuitsae.attribution import LogitTargets, attribute
from circuitsae.attribution.attribute import EngineName
from circuitsae.attribution.closed_form import ClosedForm
from circuitsae.attribution.linear import linear_model
from circuitsae.attribution.nodes import SourceVectors, feature_targets, source_nodes
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
