"""Dictionaries by their circuits: each figure by hand, areas and likeness by brute force, rankings beside scipy's."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

import circuitsae
from circuitsae.attribution import attribute
from circuitsae.benchmark import CircuitConfig, circuit_benchmark, graph_likeness, ranks_alike
from circuitsae.benchmark.circuits import Given, by_seeds, first_size, stabilities
from circuitsae.benchmark.ranking import L0, partial_spearman, spearman
from circuitsae.benchmark.result import WHOLE, BenchmarkResult, Headline, Measured
from circuitsae.cli import main
from circuitsae.commands.benchmark import show
from circuitsae.features import match_features
from circuitsae.interventions import Feature
from circuitsae.pocket.corpus import held_out_text
from circuitsae.replacement import ReplacementModel
from circuitsae.tables import open_console
from circuitsae.tasks import load_task
from circuitsae.tasks.cases import prompt_task
from circuitsae.validation import Curve, rank_nodes, validate
from circuitsae.validation.ablation import Ablated, Kept
from circuitsae.validation.curve import log_sizes
from circuitsae.validation.tasks import Cases
from transcoders import random_dictionaries, save_dictionaries
from transcoders.data import take_rows
from transcoders.dictionaries import DictionaryProvenance
from transcoders.errors import DictionaryError, InputError
from transcoders.evaluation import evaluate

CONFIG = CircuitConfig(graphs=1, edges=8, controls=24, loss_tokens=60, jacobian_tokens=60)
CPR = Headline("CPR", "circuits", "cpr", True)


def drawn(model, kind, seed, **how):
    sizes = {"n_layers": model.n_layers, "d_model": model.d_model, "features": 16, "seed": seed}
    return random_dictionaries(kind, **sizes, **how).requires_grad_(False)


def with_provenance(dictionaries, **known):
    dictionaries.provenance = DictionaryProvenance(model="pocket", bos=True, **known)
    return dictionaries


@pytest.fixture(scope="module")
def task(pocket):
    return load_task("agreement", pocket, 4, known=True)


@pytest.fixture(scope="module")
def rows(pocket):
    return take_rows(pocket, held_out_text(300), rows=2, context=60)


@pytest.fixture(scope="module")
def sets(pocket):
    near = circuitsae.load_dictionaries("pocket-plt")
    return {"near": [near], "random": [drawn(pocket, "plt", 0)], "sae": [drawn(pocket, "sae", 0)]}


@pytest.fixture(scope="module")
def result(pocket, task, rows, sets):
    return circuit_benchmark(pocket, sets, task, rows, config=CONFIG)


# figures


@pytest.mark.parametrize("name", ["random", "sae"])
def test_figures_are_those_of_the_public_functions(pocket, task, rows, sets, result, name):
    found = {row.metric: row.value for row in result.rows if (row.dictionary, row.seed) == (name, 0)}
    model = ReplacementModel(pocket, sets[name][0])
    evaluation = evaluate(model.model, model.dictionaries, rows, loss_tokens=60, jacobian_tokens=60)
    expected = {"l0": evaluation.l0, "fvu": evaluation.fvu, "recovered": evaluation.replaced.recovered_zero}
    agreement = evaluation.agreement
    expected |= {"cosine": math.nan if agreement is None else agreement.cosine}
    ranked, corrupt = prompt_task(model.model, task.take(slice(0, 2)))
    full = attribute(model, ranked.examples[0].prompt)
    check = validate(model, full.prune(), edges=8, controls=24, heads=0)
    expected |= {"replacement": full.scores.replacement, "completeness": full.scores.completeness}
    verdicts = check.edges["graph_verdict"].tolist()
    assert len(verdicts) == found["edges"] > 0
    expected |= {"confirmed": verdicts.count("confirmed") / len(verdicts)}
    expected |= {"spearman model": stats.spearmanr(check.edges["model_predicted"], check.edges["model_measured"])[0]}
    ranking = rank_nodes(model, ranked, corrupted=corrupt if name == "sae" else None).features_only()
    assert all(isinstance(node, Feature) for node in ranking.nodes)
    expected |= {"resampled": ranking.stability(max(1, len(ranking.nodes) // 10)).mean, "active": len(ranking.nodes)}
    for metric, value in expected.items():
        assert found[metric] == pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True), metric


def test_cpr_is_the_area_by_trapezoids_of_features_alone(pocket, task, sets, result):
    model = ReplacementModel(pocket, sets["random"][0])
    ranked, _ = prompt_task(model.model, task.take(slice(0, 2)))
    judged, others = prompt_task(model.model, task.take(slice(2, 4)))
    ranking = rank_nodes(model, ranked).features_only()
    ablated = Ablated(Cases(model, judged), by="position", errors="ablate", others=others)
    empty, full = ablated.metric([Kept(())])[0].mean(), ablated.clean().mean()
    mean = ranking.scores.mean(axis=0) * np.sign(full - empty)
    order = sorted(range(len(mean)), key=lambda column: -mean[column])
    sizes = log_sizes(len(order))
    f = []
    for size in sizes:
        kept = Kept(tuple(ranking.nodes[column] for column in order[:size]))
        f.append((ablated.metric([kept])[0].mean() - empty) / (full - empty))
    widths = np.diff(np.log(sizes))
    area = sum(width * (a + b) / 2 for width, a, b in zip(widths, f, f[1:], strict=False)) / math.log(sizes[-1])
    line = ("random", "")
    assert result.by_seed(line, "circuits", "cpr")[0] == pytest.approx(area, rel=1e-3, abs=1e-4)
    assert result.by_seed(line, "circuits", "all")[0] == pytest.approx(f[-1], rel=1e-3, abs=1e-4)
    reached = [size for size, value in zip(sizes, f, strict=True) if value >= 0.9]
    assert result.by_seed(line, "circuits", "reached")[0] == bool(reached)


def test_the_first_size_with_enough_faithfulness():
    curve = Curve((1, 2, 4, 8), np.array([[0.1], [0.95], [0.5], [1.0]]), np.zeros(1), np.ones(1), {})
    assert (first_size(curve, 0.9), first_size(curve, 0.96)) == (2, 8)
    assert math.isnan(first_size(curve, 1.2))


def test_dictionaries_near_the_mlps_beat_random_ones(result):
    better = ("fvu", -1), ("recovered", 1)
    circuits = ("replacement", "completeness", "confirmed", "spearman", "spearman model", "cpr", "all", "cosine")
    for task, metric, sign in [("core", *one) for one in better] + [("circuits", each, 1) for each in circuits]:
        near, random = (result.estimate((name, ""), task, metric).mean for name in ("near", "random"))
        assert sign * near > sign * random, metric
    assert abs(result.estimate(("near", ""), "circuits", "norm ratio").mean - 1) < 0.25
    assert math.isnan(result.estimate(("sae", ""), "circuits", "cosine").mean)
    assert {row.layer for row in result.rows} == {WHOLE}


# stability


def test_likeness_is_the_weighted_jaccard_index_of_matched_features(pocket, task, sets):
    pair = sets["random"][0], drawn(pocket, "plt", 1)
    models = [ReplacementModel(pocket, one) for one in pair]
    graphs = [attribute(model, task.examples[0].clean) for model in models]
    frames = [graph.nodes_frame() for graph in graphs]
    pairs = dict(match_features(frames[0], frames[1], pair, above=0.05)[["id_a", "id_b"]].to_numpy().tolist())
    assert len(pairs) > 2
    shares = []
    for frame in frames:
        nodes = frame.query("kind == 'feature'")
        shares.append(dict(zip(nodes["id"], nodes["influence"] / nodes["influence"].sum(), strict=True)))
    renamed = {one: other for other, one in pairs.items()}
    second = {renamed.get(name, f"B {name}"): share for name, share in shares[1].items()}
    every = shares[0].keys() | second.keys()
    low, high = (sum(f(one.get(name, 0) for one in (shares[0], second)) for name in every) for f in (min, max))
    assert graph_likeness(graphs[0], graphs[1], pair, above=0.05) == pytest.approx(low / high)
    assert graph_likeness(graphs[0], graphs[0], (pair[0], pair[0])) == pytest.approx(1)
    given = [Given({}, [graph], one) for graph, one in zip(graphs, pair, strict=True)]
    alike = graph_likeness(graphs[0], graphs[1], pair)
    assert stabilities(given) == [pytest.approx(alike)]
    assert stabilities([*given, given[0]]) == [pytest.approx(alike), pytest.approx(alike), pytest.approx(1)]
    assert stabilities(given[:1]) == []


def test_sets_that_differ_in_seed_alone_are_one_line(pocket):
    def trained(seed, **config):
        return with_provenance(drawn(pocket, "plt", 0), seed=seed, config={"seed": seed, **config})

    given = {"a0": trained(0, k=8), "a1": trained(1, k=8), "b": trained(0, k=9), "again": trained(0, k=8)}
    given["unknown"] = drawn(pocket, "plt", 0)
    groups = by_seeds(given)
    assert {name: len(sets) for name, sets in groups.items()} == {"a0": 2, "b": 1, "again": 1, "unknown": 1}
    assert groups["a0"] == [given["a0"], given["a1"]]


# rankings


def made(fvu, cpr, l0=None, families=None, seeds=3):
    rows = []
    rng = np.random.default_rng(0)
    for number, (a, b) in enumerate(zip(fvu, cpr, strict=True)):
        for seed in range(seeds):
            noise = rng.normal(0, 1e-3, 2)
            for metric, value in (("fvu", a + noise[0]), ("l0", (l0 or fvu[::-1])[number])):
                rows.append(Measured(f"k{number}", "", WHOLE, seed, "core", "", metric, value))
            rows.append(Measured(f"k{number}", "", WHOLE, seed, "circuits", "", "cpr", b + noise[1]))
    return BenchmarkResult(tuple(rows), {"circuits": 1.0}, "m", {"families": families or {}, "task": "t"})


def test_rank_correlations_are_those_of_scipy():
    rng = np.random.default_rng(1)
    x, y, z = rng.integers(0, 6, (3, 12)).astype(float)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y)[0])
    ranks = [stats.rankdata(each) for each in (x, y, z)]
    rest = [each - np.polyval(np.polyfit(ranks[2], each, 1), ranks[2]) for each in ranks[:2]]
    assert partial_spearman(x, y, z) == pytest.approx(np.corrcoef(*rest)[0, 1])
    assert np.isnan(spearman(x, np.ones(12)))
    assert np.isnan(partial_spearman(x, y, x))


def test_rankings_agree_disagree_or_neither():
    fvu = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    l0 = [3, 1, 2, 6, 5, 4]
    (same,) = ranks_alike(made(fvu, [0.9, 0.8, 0.7, 0.6, 0.5, 0.4], l0))
    assert (same.figure, same.kinds, same.answer) == ("CPR", 6, "agrees")
    assert same.spearman == pytest.approx(1)
    assert 0 < same.low <= same.high <= 1 + 1e-9
    (other,) = ranks_alike(made(fvu, [0.4, 0.5, 0.6, 0.7, 0.8, 0.9], l0))
    assert (other.answer, other.spearman) == ("disagrees", pytest.approx(-1))
    (mixed,) = ranks_alike(made(fvu, [0.5, 0.9, 0.4, 0.8, 0.45, 0.7], l0))
    assert mixed.answer == "undecided"
    assert mixed.low < 0 < mixed.high
    assert mixed.spearman == pytest.approx(stats.spearmanr([-v for v in fvu], [0.5, 0.9, 0.4, 0.8, 0.45, 0.7])[0])


def test_families_are_ranked_and_shown_apart(capsys):
    of = {f"k{number}": "autoencoders" if number < 3 else "transcoders" for number in range(7)}
    cpr = [0.1, 0.2, 0.3, 0.9, 0.8, 0.7, 0.6]
    result = made([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], cpr, families=of)
    (few,) = ranks_alike(result, "autoencoders")
    assert (few.answer, few.kinds, few.spearman) == ("too few", 3, pytest.approx(-1))
    assert math.isnan(few.low)
    (four,) = ranks_alike(result, "transcoders", figures=[CPR])
    assert (four.answer, four.kinds) == ("agrees", 4)
    show(open_console(True), result)
    said = capsys.readouterr().out
    places = [said.index(each) for each in ("whole autoencoders, t", "k2", "whole transcoders, t", "k3")]
    assert places == sorted(places)
    fronts = [trace for trace in result.figure().to_dict()["data"] if trace["mode"] == "lines"]
    assert len(fronts) == 2 * sum(each.more_is_better is not None for each in result.headlines)


# wrong use


def test_what_cannot_be_measured_is_said(pocket, task, rows, sets):
    with pytest.raises(InputError, match="graphs=0"):
        CircuitConfig(graphs=0)
    with pytest.raises(InputError, match="no dictionaries under 'none'"):
        circuit_benchmark(pocket, {"none": []}, task, rows)
    with pytest.raises(InputError, match="has 3 prompts"):
        circuit_benchmark(pocket, sets, task.take(slice(0, 3)), rows)
    with pytest.raises(DictionaryError, match="'mixed' are of different kinds"):
        circuit_benchmark(pocket, {"mixed": [sets["random"][0], sets["sae"][0]]}, task, rows)
    with pytest.raises(InputError, match="1 lines of transcoders"):
        ranks_alike(made([0.1, 0.2], [1, 2], families={"k0": "transcoders", "k1": "autoencoders"}), "transcoders")
    with pytest.raises(InputError, match="cannot be ranked by L0"):
        ranks_alike(replace(made([0.1, 0.2], [1, 2]), rows=made([0.1], [1]).rows[:1] * 2), by=L0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--circuits", "--only", "scr"], "leave out what is said of SAEBench's own tasks"),
        (["--task", "ioi"], "give --circuits too"),
        (["--circuits", "--model", "gpt2"], "give --task NAME or FILE"),
        (["--circuits", "--edges", "0"], "edges=0"),
        (["--circuits", "--task", "iio", "--tokens", "96"], "did you mean 'ioi'"),
    ],
)
def test_the_command_refuses_in_a_sentence(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", "pocket-plt", *arguments])
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_command_measures_and_writes(pocket, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_dictionaries(with_provenance(drawn(pocket, "plt", 0), seed=0), tmp_path / "mine")
    main(["benchmark", "mine", "--circuits", "--prompts", "4", "--edges", "2", "--tokens", "96", "--wide"])
    said = " ".join(capsys.readouterr().out.split())
    assert "whole transcoders, agreement; one seed" in said
    assert "Jacobian ↑" in said
    assert "docs/circuit-ranking.md" in said
    assert (tmp_path / "benchmark" / "benchmark.html").is_file()
