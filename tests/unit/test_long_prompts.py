"""Long prompts: patterns that are recomputed, products without their zeros, encoder vectors as they are asked for."""

import weakref
from functools import partial
from typing import Any

import pytest
import torch

from circuitsae import frozen, patterns
from circuitsae.attribution import LogitTargets, attribute, attribute_pruned, linear, nodes
from circuitsae.attribution.closed_form import CARRIED_BYTES, batches
from circuitsae.attribution.nodes import Endpoints, GatheredTargets, TargetVectors
from circuitsae.attribution.targets import explained_logits
from circuitsae.interventions import Recording
from circuitsae.patterns import RecomputedPatterns, pattern_hook
from circuitsae.replacement import ReplacementModel
from circuitsae.validation import claims, validate
from circuitsae.validation.error_budget import parts_of
from transcoders.dictionaries import random_dictionaries
from transcoders.errors import ModelError
from transcoders.loading import random_model
from transcoders.random_models import Family
from transcoders.starting import value_from

TOKENS = torch.tensor([0, 11, 22, 33, 11, 7, 40, 3])
TARGETS = LogitTargets([3, 5])
N_LAYERS = 3


def replacement(family: Family = "gpt2", dtype: torch.dtype = torch.float64, kind: Any = "plt", skip: bool = False):
    model = random_model(family, n_layers=N_LAYERS, d_model=16, n_heads=4, d_vocab=64, dtype=dtype)
    dictionaries = random_dictionaries(kind, n_layers=N_LAYERS, d_model=16, features=24, skip=skip, dtype=dtype, seed=1)
    return ReplacementModel(model, dictionaries)


@pytest.fixture
def long(monkeypatch):
    """From the call on, every prompt is a long one."""
    return lambda: monkeypatch.setattr(frozen, "PATTERN_BYTES", 0)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gemma3", "bloom"])
def test_recomputed_patterns_are_those_of_the_clean_run(family, dtype, atol, long):
    model = replacement(family, dtype)
    held = model.trace(TOKENS).frozen
    long()
    again = model.trace(TOKENS).frozen
    assert (held.recomputed, again.recomputed) == (0, 4 * len(TOKENS) ** 2 * dtype.itemsize)
    assert set(again.constants) == set(held.constants)
    assert len(again.constants) == len(held.constants)
    assert isinstance(again.constants, RecomputedPatterns)
    assert again.constants._streams, "patterns come from a run of all blocks below"
    for name, value in held.constants.items():
        torch.testing.assert_close(again.constants[name], value, rtol=0, atol=atol)


def test_a_run_that_cannot_begin_at_a_block_begins_at_the_embeddings():
    model = replacement()
    clean = model.trace(TOKENS).frozen
    last = clean.constants[pattern_hook(N_LAYERS - 1)][:, :, -1]
    other = {layer: torch.randn(1, len(TOKENS), 16, dtype=torch.float64) for layer in range(1, N_LAYERS)}
    found = RecomputedPatterns(model.model, TOKENS, {}, other, last)
    for layer in range(N_LAYERS):
        torch.testing.assert_close(found[pattern_hook(layer)], clean.constants[pattern_hook(layer)])


def test_a_hook_that_a_run_never_comes_to_is_named():
    stream = torch.zeros(1, len(TOKENS), 16, dtype=torch.float64)
    with pytest.raises(ModelError, match=r"never calls blocks\.0\.attn\.hook_pattern in a run from block 1 on"):
        value_from(replacement().model, TOKENS[None], pattern_hook(0), 1, stream)


@pytest.mark.parametrize(
    ("family", "kind", "skip"), [("gpt2", "clt", True), ("llama", "plt", False), ("gemma2", "plt", False)]
)
def test_the_graph_of_a_long_prompt_is_the_same(family, kind, skip, long, monkeypatch):
    model = replacement(family, kind=kind, skip=skip)
    held = [attribute(model, TOKENS, targets=TARGETS), attribute_pruned(model, TOKENS, max_features=9)[0]]
    long()
    monkeypatch.setattr(nodes, "TARGET_BYTES", 0)
    monkeypatch.setattr(nodes, "FEATURES_AT_ONCE", 7)
    monkeypatch.setattr(linear, "WHOLE", 4)
    again = [attribute(model, TOKENS, targets=TARGETS), attribute_pruned(model, TOKENS, max_features=9)[0]]
    for ours, theirs in zip(again, held, strict=True):
        assert ours.nodes == theirs.nodes
        assert abs(ours.weights - theirs.weights).max() < 1e-12


@pytest.fixture
def asked(monkeypatch):
    """The patterns that are computed again, in order; none while another is alive."""
    names: list[str] = []
    alive: list[weakref.ref[torch.Tensor]] = []

    def noting(model: Any, rows: Any, name: str, *how: Any) -> torch.Tensor:
        assert not [ref for ref in alive if ref() is not None]
        found = value_from(model, rows, name, *how).clone()
        alive.append(weakref.ref(found))
        names.append(name)
        return found

    monkeypatch.setattr(patterns, "value_from", noting)
    return names


def test_one_pattern_at_most_is_alive_in_attribution(long, asked):
    model = replacement()
    long()
    attribute_pruned(model, TOKENS, max_features=9)
    assert min(asked.count(pattern_hook(layer)) for layer in range(N_LAYERS)) >= 3


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_one_pattern_at_most_is_alive_in_backward_passes(family, long, asked):
    model = replacement(family)
    held = attribute(model, TOKENS, targets=TARGETS, engine="autograd")
    long()
    again = attribute(model, TOKENS, targets=TARGETS, engine="autograd")
    assert min(asked.count(pattern_hook(layer)) for layer in range(N_LAYERS)) >= 3
    assert again.nodes == held.nodes
    assert abs(again.weights - held.weights).max() < 1e-12


@pytest.mark.parametrize(("family", "together"), [("gpt2", False), ("gpt2", True), ("gemma2", False)])
def test_one_pattern_at_most_is_alive_in_validation(family, together, long, asked, monkeypatch):
    model = replacement(family)
    monkeypatch.setattr(claims, "effects_in", partial(claims.effects_in, together=together))
    graph = attribute(model, TOKENS, targets=TARGETS).prune()
    held = validate(model, graph, edges=1, controls=19).edges
    long()
    again = validate(model, graph, edges=1, controls=19).edges
    assert min(asked.count(pattern_hook(layer)) for layer in range(N_LAYERS)) >= 3
    for column in ("graph_measured", "direct_measured", "model_measured"):
        assert again[column].to_numpy() == pytest.approx(held[column].to_numpy(), abs=1e-9)


def test_a_model_keeps_no_pattern_of_a_run():
    model = replacement().model
    model.run(TOKENS[None])
    shape = (1, 4, len(TOKENS), len(TOKENS))
    kept = [value for module in model.bridge.modules() for value in vars(module).values() if torch.is_tensor(value)]
    assert not [value for value in kept if value.shape == shape]


def test_patterns_that_are_recomputed_are_parts_of_an_error(long):
    model = replacement()
    parts = parts_of(Recording(model, TOKENS))
    long()
    assert parts_of(Recording(model, TOKENS)) == parts


@pytest.mark.parametrize("n", [3, 4, 5, 11])
@pytest.mark.parametrize("later", [False, True])
def test_products_without_their_zeros_are_the_same(n, later, monkeypatch):
    monkeypatch.setattr(linear, "WHOLE", 4)
    mix, z = torch.randn(2, n, n, dtype=torch.float64).tril(), torch.randn(2, n, 3, dtype=torch.float64)
    mix = mix.mT if later else mix
    torch.testing.assert_close(linear._triangular(mix, z, later), mix @ z)


def test_batches_that_have_patterns_recomputed_are_few_and_large():
    generator = torch.Generator().manual_seed(0)
    pos = torch.randint(0, 2048, (3000,), generator=generator)
    targets = TargetVectors(torch.randint(0, 4, (3000,), generator=generator), pos, torch.zeros(3000, 64))
    recomputed = 4 * CARRIED_BYTES
    found = batches(targets, 64, recomputed=recomputed)
    assert torch.equal(torch.cat(found).sort().values, torch.arange(3000))
    sizes = [len(batch) * (int(pos[batch].max()) + 1) * 64 * 4 for batch in found]
    assert max(sizes) <= recomputed
    assert min(sizes[:-1]) >= recomputed / 3
    assert len(found) < len(batches(targets, 64)) / 2


def test_vectors_are_gathered_as_they_are_taken(monkeypatch):
    model = replacement()
    with torch.no_grad():
        trace = model.trace(TOKENS)
        whole = Endpoints.of(model, explained_logits(model, trace, torch.tensor([3, 5])))
        monkeypatch.setattr(nodes, "TARGET_BYTES", 0)
        ends = Endpoints.of(model, explained_logits(model, trace, torch.tensor([3, 5])))
    assert isinstance(whole.targets, TargetVectors)
    assert isinstance(ends.targets, GatheredTargets)
    assert ends.nodes == whole.nodes
    some = torch.tensor([len(trace.features.value) + 1, 0, 17, 4])
    for ours, theirs in zip(ends.targets.take(some), whole.targets.take(some), strict=True):
        assert torch.equal(ours, theirs)
