"""Judging circuits, finding them, comparing scores with truths, published circuits as data."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from circuitsae.audit.planted import PROGRAMS
from circuitsae.components import (
    ComponentGraph,
    Edge,
    Judge,
    PatchingProblem,
    Prepared,
    Scores,
    areas,
    auroc,
    average_precision,
    by_node,
    completeness,
    edges_of_nodes,
    exact_edges,
    faithfulness,
    faithfulness_curve,
    find_circuit,
    join,
    known_circuit,
    known_circuits,
    minimality,
    overlap,
    problems_of,
    score_edges,
)
from circuitsae.components.known import load_compiled, squared_distance
from circuitsae.tasks.task import Example, Task
from transcoders.errors import FileFormatError, InputError
from transcoders.random_models import random_model

GPT2_SMALL = ComponentGraph(12, 12, 12, positional=True)


def program(name):
    (found,) = (program for program in PROGRAMS if program.name == name)
    return found.program()


@pytest.fixture(scope="module")
def induction():
    return program("induction")


@pytest.fixture(scope="module")
def judge(induction):
    return Judge(induction.problems("resample", squared_distance))


@pytest.fixture(scope="module")
def random_problem():
    model = random_model("gpt2", d_model=16, n_heads=4, d_vocab=23, context=8, dtype=torch.float64)
    clean, corrupt = torch.randint(0, 23, (2, 6, 5), generator=torch.Generator().manual_seed(3))
    return PatchingProblem(model, clean, corrupt, lambda logits: logits[:, -1, 3] - logits[:, -1, 4])


# nodes and edges


def test_gpt2_small_has_as_many_edges_as_the_literature_counts():
    """32,491 with one embedding node (Hanna et al. 2024); positions apart add one edge for each reader."""
    joined = ComponentGraph(12, 12, 12, positional=False)
    assert len(joined.edges) == 32_491
    assert len(GPT2_SMALL.edges) == 32_491 + len(joined.readers)


def test_shared_keys_belong_to_their_key_value_head():
    graph = ComponentGraph(2, 4, 2, positional=False)
    assert graph.head_readers(1, "k") == ["a1.kv0.k", "a1.kv1.k"]
    assert graph.heads_of("a1.kv1.k") == (2, 3)
    assert graph.writer_of("a1.kv1.v") == ("a1.h2", "a1.h3")


def test_parallel_mlps_do_not_read_their_own_layers_heads():
    serial, parallel = (ComponentGraph(2, 2, 2, False, parallel) for parallel in (False, True))
    assert Edge("a1.h0", "m1") in serial.edges
    assert Edge("a1.h0", "m1") not in parallel.edges
    assert Edge("a0.h0", "m1") in parallel.edges


def test_edges_off_every_path_are_dropped():
    graph = ComponentGraph(2, 2, 2, positional=False)
    path = {Edge("embed", "a0.h0.v"), Edge("a0.h0", "m1"), Edge("m1", "logits")}
    loose = {Edge("a0.h1", "logits"), Edge("embed", "a1.h0.q"), Edge("m0", "m1")}
    assert graph.connected(path | loose) == path
    assert graph.connected(loose) == frozenset()


# faithfulness


def test_the_known_circuit_is_faithful_and_an_incomplete_one_is_not(induction, judge):
    truth = induction.truth("resample")
    assert faithfulness(induction.problems("resample", squared_distance), truth) == pytest.approx(1)
    broken = truth - {Edge("a0.h1", "a1.h0.k")}
    all_edges, none, lacking = judge.faithfulness([judge.graph.edges, [], broken]).tolist()
    assert (all_edges, none) == (1, 0)
    assert lacking < 0.9


def test_faithfulness_without_a_scale_is_refused(random_problem):
    constant = replace(random_problem, metric=lambda logits: logits[:, 0, 0] * 0)
    with pytest.raises(InputError, match="faithfulness has no scale"):
        Judge(constant)


def test_a_missing_backup_shows_in_completeness(induction, judge):
    """Without the earlier head, circuit and model fail alike; with an edge left out of the circuit they do not."""
    truth = induction.truth("resample")
    assert completeness(judge, truth, subsets=[["a0.h1"]], n_random=6)[0].gap == pytest.approx(0, abs=1e-6)
    broken = truth - {Edge("a0.h1", "a1.h0.k")}
    assert completeness(judge, broken, n_random=4)[0].gap > 0.1


def test_idle_parts_show_in_minimality(judge, induction):
    truth = induction.truth("resample")
    idle = Edge("a0.h0", "a1.h1.v")
    parts = {str(edge): [edge] for edge in (*truth, idle)}
    found = minimality(judge, truth | {idle}, parts=parts, n_random=3)
    assert found.pop(str(idle)) == 0
    assert min(found.values()) > 0.1
    assert set(by_node(judge.graph, truth)) == {"a0.h1", "a1.h0"}


def test_the_curve_ends_at_the_whole_model(random_problem):
    scores = exact_edges(random_problem)
    for signed in (False, True):
        curve = faithfulness_curve(random_problem, scores, [1, 20, 60, len(scores.items)], signed=signed)
        assert curve.f[-1] == pytest.approx(1)
        assert curve.parts["connected"][-1] == len(scores.items)
        assert curve.parts["connected"][0] <= curve.sizes[0]
    assert curve.cmd() >= 0
    judge = Judge(random_problem)
    found = areas(judge, scores, [1, 20, 60])
    signed, absolute = (faithfulness_curve(judge, scores, [1, 20, 60], signed=signed) for signed in (True, False))
    assert (found.cpr, found.cmd) == pytest.approx((signed.cpr(), absolute.cmd()))
    assert found.signed.realised == signed.realised
    half = type(curve)((1, 10), np.full((2, 1), 0.5), np.zeros(1), np.ones(1), parts={"edges": [1, 10]})
    assert (half.cpr(), half.cmd()) == pytest.approx((0.5, 0.5))


def test_nodes_as_edges():
    graph = ComponentGraph(1, 2, 2, positional=False)
    edges = edges_of_nodes(graph, ["a0.h1"])
    names = {"embed→a0.h1.q", "embed→a0.h1.k", "embed→a0.h1.v", "embed→logits", "a0.h1→logits"}
    assert {str(edge) for edge in edges} == names


# finding circuits


def test_a_found_circuit_meets_its_target_with_every_edge_needed(random_problem):
    found = find_circuit(random_problem, target=0.9, rescore=40)
    assert abs(1 - found.faithfulness) <= 0.1
    judge = Judge(random_problem)
    assert found.faithfulness == pytest.approx(float(judge.faithfulness([found.circuit])[0]))
    assert len(found.circuit) < 0.7 * found.n_edges
    smaller = [judge.graph.connected(found.circuit - {edge}) for edge in found.circuit]
    assert bool(((1 - judge.faithfulness(smaller)).abs() > 0.1).all())


def test_rescored_edges_are_exact_and_others_estimates(random_problem):
    found = score_edges(random_problem, cheap="atp*", rescore=10)
    exact = exact_edges(random_problem)
    best = found.cheap.ranked()[:10]
    assert set(best) <= found.patched
    torch.testing.assert_close(found.scores.only(best).values, exact.only(best).values)
    rest = [edge for edge in found.scores.items if edge not in found.patched]
    torch.testing.assert_close(found.scores.only(rest).values, found.cheap.only(rest).values)
    assert not found.fell_back


def test_bad_requests_are_refused(random_problem):
    with pytest.raises(InputError, match="Unknown method 'magic'"):
        score_edges(random_problem, cheap="magic")
    with pytest.raises(InputError, match="between 0 and 1"):
        find_circuit(random_problem, target=95.0)


# scores against truths


def test_areas_by_hand():
    assert auroc([3.0, 2.0, 1.0, 0.0], [True, False, True, False]) == pytest.approx(0.75)
    assert auroc([1.0, 1.0, 0.0], [True, False, False]) == pytest.approx(0.75)
    assert average_precision([3.0, 2.0, 1.0, 0.0], [True, False, True, False]) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision([0.0, 0.0, 0.0, 0.0], [True, False, False, False]) == pytest.approx(0.25)
    assert overlap(["a", "b"], ["b", "c", "d"]) == pytest.approx({"precision": 0.5, "recall": 1 / 3, "jaccard": 0.25})
    with pytest.raises(InputError, match="0 true items of 2"):
        auroc([1.0, 2.0], [False, False])


def test_scores_summarise_without_cancelling():
    values = torch.tensor([[[1.0, 0.5]], [[-2.0, 0.0]]])
    scores = Scores(("m0",), values, "by hand", ("here", "there"))
    assert (scores.of("m0"), float(scores.mean_abs), float(scores.largest)) == (-0.25, 1.75, 2.0)
    assert list(scores.frame()["mean"]) == [-0.5, 0.25]
    assert join([scores, scores]).values.shape == (4, 1, 2)
    with pytest.raises(InputError, match="same edges"):
        join([scores, Scores(("m1",), values, "by hand", ("here", "there"))])
    with pytest.raises(InputError, match="Unknown ranking"):
        scores.ranked("size")


# published circuits


def test_published_circuits_are_what_the_papers_print():
    names = {circuit.name: circuit for circuit in known_circuits()}
    assert len(names["ioi-wang2022"].nodes) == 26
    assert names["ioi-wang2022"].classes["s-inhibition"] == ("a7.h3", "a7.h9", "a8.h6", "a8.h10")
    end = {name: set(circuit.nodes) for name, circuit in names.items() if circuit.task == "greater_than"}
    assert end["greater-than-hanna2023"] - end["greater-than-acdc"] == {"a5.h1", "a8.h8"}
    assert end["greater-than-acdc"] - end["greater-than-hanna2023"] == {"a6.h1"}
    for circuit in known_circuits():
        assert circuit.source
        GPT2_SMALL.check_writers(circuit.nodes)


def test_published_wiring_becomes_edges():
    edges = known_circuit("ioi-acdc").edges(GPT2_SMALL)
    assert Edge("a5.h5", "a7.h3.k") in edges
    assert Edge("a5.h5", "a7.h3.q") not in edges
    assert Edge("a8.h6", "a7.h3.q") not in edges
    assert Edge("a9.h9", "logits") in edges
    greater = known_circuit("greater-than-acdc").edges(GPT2_SMALL)
    assert Edge("m4", "a9.h1.q") in greater
    assert Edge("m4", "a9.h1.v") not in greater
    with pytest.raises(InputError, match="no edges were published"):
        known_circuit("ioi-wang2022").edges(GPT2_SMALL)
    with pytest.raises(InputError, match="no component"):
        known_circuit("ioi-acdc").edges(ComponentGraph(2, 4, 4, True))
    with pytest.raises(InputError, match="No published circuit"):
        known_circuit("docstring")


def test_comparison_with_a_published_circuit():
    circuit = known_circuit("ioi-wang2022")
    values = torch.tensor([[float(name in circuit.nodes) for name in GPT2_SMALL.writers]])[..., None]
    found = circuit.compare_nodes(Scores(GPT2_SMALL.writers, values, "oracle"))
    assert found == {"precision": 1, "recall": 1, "jaccard": 1, "auroc": 1, "average_precision": 1}
    assert circuit.compare_nodes(["a9.h9", "a0.h0", "m0"]) == pytest.approx(
        {"precision": 0.5, "recall": 1 / 26, "jaccard": 1 / 27}
    )
    wired = known_circuit("greater-than-acdc")
    known = wired.edges(GPT2_SMALL)
    values = torch.tensor([[float(edge in known) for edge in GPT2_SMALL.edges]])[..., None]
    assert wired.compare_edges(Scores(GPT2_SMALL.edges, values, "oracle"), GPT2_SMALL)["auroc"] == 1


# tasks and folders


def test_a_task_becomes_problems_by_length_with_roles():
    from circuitsae.loading import load_model

    model = load_model("pocket")
    names = ["Tom", "Sam"]
    examples = tuple(
        Example(
            clean=f"{name} had a dog.{tail}",
            corrupt=f"{other} had a dog.{tail}",
            answers=(" The",),
            wrong=(" A",),
            roles={"name": (0, len(name))},
            template=tail,
        )
        for name, other in zip(names, reversed(names), strict=True)
        for tail in ("", " It ran.")
    )
    problems = problems_of(model, Task("dogs", examples).fitting(model), roles=["name"])
    assert [len(problem) for problem in problems] == [2, 2]
    spans = Prepared(problems[0]).spans
    assert problems[0].span_names == ("name", "other")
    assert bool((spans.sum(0) == 1).all())
    scores = exact_edges(problems[0], [("embed", "m0")])
    assert scores.values.shape == (2, 1, 2)
    assert not scores.values[..., 1].any()
    with pytest.raises(InputError, match="no role 'S2'"):
        problems_of(model, Task("dogs", examples).fitting(model), roles=["S2"])


def test_a_folder_that_is_no_program_is_refused(tmp_path):
    with pytest.raises(FileFormatError, match=r"config\.json"):
        load_compiled(tmp_path)
