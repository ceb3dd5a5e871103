"""Edges of compiled programs (truth by exhaustive patching elsewhere) and of hand-made ones (truth by reasoning)."""

from dataclasses import replace

import pytest
import torch

from circuitsae.audit.planted import PROGRAMS
from circuitsae.components import auroc, average_precision, eap, exact_edges, find_circuit, score_edges
from circuitsae.components.known import distance, load_compiled, projection, squared_distance

COMPILED = (
    "hist", "prev_token_causal", "induction_causal", "sort_unique", "dup_before", "count_cmp", "reverse", "palindrome",
)  # fmt: skip
LARGER = ("dup_before", "reverse", "palindrome")
HANDMADE = {program.name: program for program in PROGRAMS}
NOISE = 1e-6


@pytest.fixture(scope="module")
def compiled(shared):
    """Each program, loaded once."""
    loaded = {}

    def load(name):
        if name not in loaded:
            loaded[name] = load_compiled(shared / "references/compiled" / name)
        return loaded[name]

    return load


def _against(program, scores, ablation):
    """Sizes above noise, and truth, of the edges that are not borderline."""
    unsure, truth = program.borderline(ablation), program.truth(ablation)
    kept = [edge for edge in scores.items if edge not in unsure]
    size = scores.only(kept).largest
    return torch.where(size > NOISE, size, 0.0), torch.tensor([edge in truth for edge in kept])


@pytest.mark.parametrize("ablation", ["resample", "zero"])
@pytest.mark.parametrize("name", COMPILED)
def test_exact_patching_measures_every_compiled_edge(compiled, name, ablation):
    program = compiled(name)
    scores = exact_edges(program.problems(ablation, distance))
    assert set(scores.items) == set(program.effects)
    for edge, size in zip(scores.items, scores.largest.tolist(), strict=True):
        assert size == pytest.approx(program.effects[edge][ablation], rel=1e-7, abs=1e-8)
    size, truth = _against(program, scores, ablation)
    assert auroc(size, truth) == average_precision(size, truth) == 1.0


@pytest.mark.parametrize("ablation", ["resample", "zero"])
@pytest.mark.parametrize("name", [n if n not in LARGER else pytest.param(n, marks=pytest.mark.slow) for n in COMPILED])
def test_the_default_method_finds_every_compiled_edge_and_no_other(compiled, name, ablation):
    program = compiled(name)
    found = score_edges(program.problems(ablation, squared_distance, pairs=12))
    size, truth = _against(program, found.scores, ablation)
    assert auroc(size, truth) == average_precision(size, truth) == 1.0
    assert not size[~truth].any()
    assert found.scores.patches < len(program.effects)


def test_vanished_gradients_are_noticed(compiled):
    program = compiled("sort_unique")
    problems = program.problems("resample", squared_distance, pairs=12)
    assert not eap(problems).values.any()
    blind = score_edges(problems, cheap="eap")
    assert blind.fell_back
    assert blind.vanished == blind.scores.patches == exact_edges(problems).patches
    size, truth = _against(program, blind.scores, "resample")
    assert auroc(size, truth) == 1.0


def test_fewer_patches_where_gradients_help(compiled):
    problems = compiled("prev_token_causal").problems("zero", projection, pairs=12)
    assert score_edges(problems).scores.patches < exact_edges(problems).patches


@pytest.mark.parametrize("ablation", ["resample", "zero"])
@pytest.mark.parametrize("name", HANDMADE)
def test_handmade_edges_are_those_reasoned_out(name, ablation):
    program = HANDMADE[name].program(per_length=6)
    scores = exact_edges(program.problems(ablation, distance))
    size, truth = _against(program, scores, ablation)
    assert [bool(s) for s in size] == truth.tolist()
    found = find_circuit(program.problems(ablation, squared_distance))
    assert found.circuit == program.truth(ablation)
    assert found.faithfulness == pytest.approx(1, abs=1e-6)


def test_handmade_heads_that_cancel_are_told_apart():
    """Each opposed head moves the logits, though with one position both together move nothing."""
    program = HANDMADE["opposed"]
    single = replace(program, lengths=(1,)).program()
    (problem,) = single.problems("resample", lambda clean, corrupt: lambda logits: logits[:, 0, 0])
    scores = exact_edges(problem)
    assert scores.of(("a0.h0", "logits")) == pytest.approx(-scores.of(("a0.h1", "logits")))
    assert scores.of(("embed", "logits")) == 0
