"""The benchmark on the pocket model: edits and interchange by brute force, baselines, files, and the command."""

import csv
import json
from typing import Any, get_args

import numpy as np
import pytest
import torch

import circuitsae
from circuitsae.benchmark import BenchmarkConfig, BenchmarkLayer, Fact, Facts, Labelled, benchmark
from circuitsae.benchmark.baselines import principal_components, random_directions, untrained
from circuitsae.benchmark.data import halves
from circuitsae.benchmark.interchange import answering, known_facts, variance_ratio
from circuitsae.benchmark.layers import exempt, rows_of, seen_on
from circuitsae.benchmark.result import BenchmarkResult, Measured, interval
from circuitsae.benchmark.run import ALL_TASKS
from circuitsae.benchmark.tasks import TASKS
from circuitsae.benchmark.templates import FORGET, cities, first_letters, kinds_of_text, names, topics, word_classes
from circuitsae.benchmark.unlearning import Clamp, Halves, known_share, known_tokens, unlearning
from circuitsae.cli import main
from circuitsae.commands import benchmark as command
from circuitsae.pocket.corpus import held_out_text
from transcoders import random_dictionaries
from transcoders.data import take_rows
from transcoders.dictionaries import SAE, DictionaryProvenance, SAESet
from transcoders.dictionaries.activations import ReLU
from transcoders.dictionaries.token_norm import TokenNorm
from transcoders.errors import FileFormatError, InputError
from transcoders.sites import Site

TEXTS = ["The capital of Texas is Austin.", "When Mary was seven years old, she loved bread."]


@pytest.fixture(scope="module")
def rows(pocket):
    return take_rows(pocket, held_out_text(1500), rows=12, context=96)


def planted(model, layer, directions, thresholds=None, norm=None):
    """An SAE of a layer's `resid_post` that reads and writes some directions, and of no other."""
    directions = directions.float()
    bias = torch.zeros(len(directions)) if thresholds is None else -thresholds.float()
    here = SAE(
        W_enc=directions.T.contiguous(), b_enc=bias, W_dec=directions, b_dec=torch.zeros(model.d_model),
        activation=ReLU(), site=Site(layer, "resid_post"), norm=norm,
    )  # fmt: skip
    saes = [here if i == layer else SAE.absent(i, model.d_model, "resid_post") for i in range(model.n_layers)]
    provenance = DictionaryProvenance(model=model.name, bos=True)
    return BenchmarkLayer(SAESet(saes, provenance).requires_grad_(False), layer)


# what features write


def sets(model):
    sizes = {"n_layers": model.n_layers, "d_model": model.d_model, "features": 24}
    made = [random_dictionaries(kind, **sizes) for kind in ("sae", "plt", "clt")]
    made.append(random_dictionaries("plt", **sizes, skip=True))
    return [each.requires_grad_(False) for each in made]


@pytest.mark.parametrize("number", range(4), ids=["sae", "plt", "clt", "skip"])
def test_edits_are_what_the_decoders_add_at_every_layer_they_write_to(pocket, number):
    dictionaries = sets(pocket)[number]
    layer = BenchmarkLayer(dictionaries, 1)
    (group,) = rows_of(pocket, TEXTS)
    off = exempt(pocket, dictionaries, group)

    def doubled(a):
        return torch.cat([2 * a[..., :5], a[..., 5:]], dim=-1)

    with torch.no_grad():
        edited, _ = pocket.run(group.tokens, edits=layer.edits(doubled, off))
        a = dictionaries.activations(1, pocket.activations(group.tokens, [layer.read])[layer.read])
        a = a.masked_fill(off[..., None], 0)
        five = torch.arange(5)
        by_hand = {
            dictionaries.writes[to]: lambda value, to=to: value + a[..., :5] @ dictionaries.decoder_rows(1, five, to)
            for to in dictionaries.write_layers(1)
        }
        expected, _ = pocket.run(group.tokens, edits=by_hand)
        plain, _ = pocket.run(group.tokens)
    torch.testing.assert_close(edited, expected, atol=1e-4, rtol=1e-4)
    assert (edited - plain)[:, 1:].abs().max() > 1e-2
    assert (edited - plain)[:, 0].abs().max() < 1e-4  # no features there


def test_units_are_the_models_where_a_norm_is_taken_back(pocket):
    directions = torch.randn(12, pocket.d_model, generator=torch.Generator().manual_seed(0))
    layer = planted(pocket, 1, directions / 10, norm=TokenNorm("layer_norm"))
    sae = layer.dictionaries.layers[1]  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad():
        x = pocket.activations(rows_of(pocket, TEXTS)[0].tokens, [layer.read])[layer.read]
        written = layer.activations(x) @ torch.tensor(layer.W_dec).float()
        torch.testing.assert_close(written + layer.offset(x), sae(x), atol=1e-4, rtol=1e-4)


def test_means_leave_out_bos_and_what_fills_rows_up(pocket):
    layer = BenchmarkLayer(sets(pocket)[0], 2)
    together = seen_on(pocket, [layer], TEXTS)[0]
    for number, text in enumerate(TEXTS):
        with torch.no_grad():
            x = pocket.activations(pocket.to_tokens(text)[None], [layer.read])[layer.read][0, 1:]
            np.testing.assert_allclose(together.features[number], layer.activations(x).mean(0), atol=1e-4)
            write = (x - layer.dictionaries.decoder_bias(2)).mean(0)
            np.testing.assert_allclose(together.write[number], write, atol=1e-4)


# baselines


def test_principal_components_reconstruct_and_random_ones_have_the_l0(pocket):
    layer = BenchmarkLayer(circuitsae.load_dictionaries("pocket-sae"), 2)
    writes = torch.randn(400, pocket.d_model, generator=torch.Generator().manual_seed(0))
    exact = principal_components(layer, writes)
    again = exact.activations(writes) @ torch.tensor(exact.W_dec).float() + exact.offset(writes)
    torch.testing.assert_close(again, writes, atol=1e-4, rtol=1e-4)
    drawn = random_directions(layer, writes, 7.2, seed=1)
    assert drawn.n_features == layer.n_features
    assert (drawn.activations(writes) > 0).sum(1).tolist() == [7] * 400


@pytest.mark.parametrize("number", range(3), ids=["sae", "plt", "clt"])
def test_the_untrained_dictionary_is_of_the_same_shape_and_sparsity(pocket, number):
    layer = BenchmarkLayer(sets(pocket)[number], 1)
    generator = torch.Generator().manual_seed(0)
    reads, writes = (torch.randn(200, 4, pocket.d_model, generator=generator) for _ in range(2))
    if number == 0:
        reads = writes
    made = untrained(layer, reads, writes, 6.0, seed=0)
    assert made is not None
    assert (made.dictionaries.kind, made.n_features, made.read, made.write) == (
        layer.dictionaries.kind, 24, layer.read, layer.write,
    )  # fmt: skip
    assert (made.activations(reads[:, 1]) > 0).sum(1).double().mean() == pytest.approx(6, abs=0.5)


# interchange


@pytest.fixture(scope="module")
def asked(pocket):
    return known_facts(pocket, names(12, 0))


def test_the_model_knows_names_and_cities(pocket, asked):
    assert set(asked.attributes) == {"pronoun", "name"}
    for fact, ids, at, answer in zip(asked.facts, asked.ids, asked.positions, asked.answers, strict=True):
        assert pocket.token_string(ids[at]) == f" {fact.entity}"
        assert pocket.run(torch.tensor([ids]))[0][0, -1].argmax() == answer
        assert pocket.token_string(answer) == fact.answer
    assert len(known_facts(pocket, cities(6, 0)).facts) > 12


def pairs_of(asked, attribute):
    from circuitsae.benchmark.interchange import _pairs

    return _pairs(asked, attribute, np.random.default_rng(0), 12)


def test_interchange_of_all_features_of_an_exact_dictionary_is_that_of_all_that_is_written(pocket, asked):
    writes = torch.randn(300, pocket.d_model, generator=torch.Generator().manual_seed(0))
    layer = principal_components(planted(pocket, 2, torch.eye(pocket.d_model)), writes)
    own, others = pairs_of(asked, "pronoun")
    every, none = np.arange(layer.n_features), np.arange(0)
    for pairs in (own, others):
        by_features = answering(pocket, layer, asked, pairs, "onward", every, source=True)
        assert by_features == answering(pocket, layer, asked, pairs, "onward", None, source=True) == 1
    assert answering(pocket, layer, asked, own, "onward", none, source=True) == 0
    assert answering(pocket, layer, asked, others, "onward", none, source=False) == 1


def test_at_the_entity_alone_it_is_the_run_with_that_token_patched(pocket, asked):
    layer = planted(pocket, 0, torch.eye(pocket.d_model))
    own, _ = pairs_of(asked, "name")
    found = 0
    for pair in own:
        base, source = (torch.tensor([asked.ids[place]]) for place in pair)
        at = [asked.positions[place] for place in pair]
        value = pocket.activations(source, [layer.write])[layer.write][0, at[1]]

        def patch(x, value=value, at=at):
            x = x.clone()
            x[0, at[0]] = value
            return x

        logits, _ = pocket.run(base, edits={layer.write: patch})
        found += int(logits[0, -1].argmax()) == asked.answers[pair.base]
    assert answering(pocket, layer, asked, own, "entity", None, source=False) == found / len(own)


def test_a_feature_that_is_gender_changes_the_pronoun_and_not_the_name(pocket, asked):
    spans = asked.spans("onward")
    prompts = [fact.prompt for fact in asked.facts]
    stream = seen_on(pocket, [planted(pocket, 2, torch.eye(pocket.d_model))], prompts, spans)[0].write
    he = np.array([pocket.token_string(asked.value("pronoun")[fact.entity]) == " he" for fact in asked.facts])
    pronoun = np.array([fact.attribute == "pronoun" for fact in asked.facts])
    gender = stream[pronoun & he].mean(0) - stream[pronoun & ~he].mean(0)
    gender = torch.tensor(gender / np.linalg.norm(gender))
    layer = planted(pocket, 2, torch.stack([gender, -gender]))
    own, others = pairs_of(asked, "pronoun")
    both = np.arange(2)
    cause = answering(pocket, layer, asked, own, "onward", both, source=True)
    isolation = answering(pocket, layer, asked, others, "onward", both, source=False)
    assert (cause + isolation) / 2 > 0.9
    random = planted(pocket, 2, torch.stack([torch.randn(128, generator=torch.Generator().manual_seed(0))] * 2) / 11)
    assert answering(pocket, random, asked, own, "onward", both, source=True) < 0.3


def test_the_ratio_of_variances_is_scipys():
    from scipy.stats import f_oneway

    x, groups = np.random.default_rng(0).normal(size=(30, 4)), np.arange(30) % 3
    expected = f_oneway(*(x[groups == g] for g in range(3))).statistic
    np.testing.assert_allclose(variance_ratio(x, groups), expected)


# unlearning


def test_clamping_a_feature_of_the_forgotten_texts_forgets_these_alone(pocket):
    texts = kinds_of_text(10, 0)
    forget, retain = (
        [text for text, label in zip(texts.texts, texts.labels, strict=True) if label == wanted]
        for wanted in (FORGET, "story")
    )
    known = [known_tokens(pocket, some) for some in (forget, retain)]
    # A direction that tokens of the forgotten texts have more of than any token of the others.
    site = Site(2, "resid_post")
    there, others = (
        torch.cat([pocket.activations(rows.tokens, [site])[site][:, 1:][~rows.filled[:, 1:]] for rows, _ in side])
        for side in known
    )
    direction = there.mean(0) - others.mean(0)
    direction = direction / direction.norm()
    layer = planted(pocket, 2, direction[None], thresholds=(others @ direction).max()[None] + 1e-3)
    clamp = Clamp(np.array([0]), np.array([30.0]))
    assert known_share(pocket, layer, known[1], clamp) == 1
    assert known_share(pocket, layer, known[0], clamp) < 1
    assert known_share(pocket, layer, known[0], Clamp(np.arange(0), np.array([30.0]))) == 1
    halved = [Halves(side, side) for side in known]
    found = unlearning(pocket, layer, *halved, ns=(1,), multiples=(1.0, 50.0))
    assert found["forgotten"] == found["score"] > 0 == found["lost"]
    nothing = planted(pocket, 2, torch.ones(1, pocket.d_model))  # fires on everything
    assert unlearning(pocket, nothing, *halved, ns=(1,), multiples=(50.0,))["score"] == 0


# data


def test_halves_have_half_of_every_stratum_and_share_nothing():
    strata = ["a"] * 10 + ["b"] * 6
    train, test = halves(strata, 3)
    assert sorted([*train, *test]) == list(range(16))
    assert sum(i < 10 for i in train) == 5
    with pytest.raises(InputError, match="fewer than 4 examples of 'b'"):
        halves(["a"] * 4 + ["b"] * 3, 0)


def test_texts_that_ship_are_balanced_and_follow_the_seed(pocket):
    some = topics(5, 1)
    assert len(some.texts) == 40 == len(set(zip(some.texts, some.labels, some.others, strict=True)))
    assert some == topics(5, 1) != topics(5, 2)
    assert len(set(word_classes(pocket).labels)) == 15
    letters = first_letters(pocket)
    assert all(word[0].lower() == label for word, label in zip(letters.words, letters.labels, strict=True))


def test_files_are_read_and_refused_in_a_sentence(tmp_path):
    table = tmp_path / "texts.csv"
    table.write_text('text,label,second\n"One, two.",1,x\nThree.,2,y\n')
    read = Labelled.read(table)
    assert (read.texts, read.labels, read.others) == (("One, two.", "Three."), ("1", "2"), ("x", "y"))
    lines = tmp_path / "facts.jsonl"
    row = {"entity": "Rome", "attribute": "land", "prompt": "Rome is in", "answer": " Italy"}
    lines.write_text(json.dumps(row))
    assert Facts.read(lines).facts == (Fact(**row),)
    lines.write_text(json.dumps(row | {"prompt": "It is in"}))
    with pytest.raises(FileFormatError, match="does not name 'Rome'"):
        Facts.read(lines)
    for content, message in (
        ("text\na\n", "nothing under 'label'"),
        ("", "holds no rows"),
        ("text,label\na\n", "no row"),
    ):
        table.write_text(content)
        with pytest.raises(FileFormatError, match=message):
            Labelled.read(table)
    with pytest.raises(FileFormatError, match="There is no file"):
        Labelled.read(tmp_path / "none.csv")


# the whole


def test_an_interval_is_students():
    assert interval([1.0, 2.0, 3.0]).half == pytest.approx(4.302653 / 3**0.5)
    assert str(interval([0.5])) == "0.500"


def test_estimates_are_means_of_layers_with_intervals_of_seeds():
    rows = [Measured("d", "", layer, seed, "t", "", "m", 10 * seed + layer) for seed in (0, 1) for layer in (1, 3)]
    rows.append(Measured("d", "PCA", 1, 0, "t", "", "m", float("nan")))
    result = BenchmarkResult(tuple(rows), {}, "model", {})
    assert result.estimate(("d", ""), "t", "m").mean == 7
    assert result.estimate(("d", ""), "t", "m").half == pytest.approx(12.7062 * 50**0.5 / 2**0.5, rel=1e-4)
    assert str(result.estimate(("d", "PCA"), "t", "m")) == "–"


def test_a_trained_dictionary_beats_its_baselines_at_their_sparsity(pocket, rows, tmp_path):
    some = topics(8, 0)
    lines = zip(some.texts, some.labels, some.others, strict=True)
    mine = tmp_path / "mine.jsonl"
    kept = [dict(zip(("text", "label", "second"), line, strict=True)) for line in lines if line[1] in ("food", "coins")]
    mine.write_text("\n".join(map(json.dumps, kept)))
    config = BenchmarkConfig(only=("probing", "scr"), labelled=mine, seeds=2)
    result = benchmark(pocket, {"pocket-sae": circuitsae.load_dictionaries("pocket-sae")}, rows, config=config)
    lines = result.lines
    assert lines == [("pocket-sae", name) for name in ("", "random", "PCA", "untrained")]
    assert result.estimate(lines[0], "core", "l0").mean == pytest.approx(24, abs=0.1)
    assert result.estimate(lines[0], "probing", "k=1").mean > result.estimate(lines[1], "probing", "k=1").mean
    page = result.save(tmp_path / "out")
    assert "Pareto front" in page.read_text("utf-8")
    record = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    written = list(csv.DictReader((tmp_path / "out" / "benchmark.csv").open()))
    assert len(record["rows"]) == len(written) == len(result.rows)
    panels = [each["text"] for each in result.figure().to_dict()["layout"]["annotations"]]
    assert panels == ["probing k=1 ↑", "SCR n=20 ↑"]


def test_all_layers_are_those_with_features_and_the_default_is_in_the_middle(pocket, rows):
    whole = circuitsae.load_dictionaries("pocket-sae")
    assert isinstance(whole, SAESet)
    dictionaries = {"some": whole.only([0, 1, 3])}
    cases: list[tuple[Any, set[int]]] = [("all", {0, 1, 3}), (None, {1}), ((3,), {3})]
    for layers, expected in cases:
        config = BenchmarkConfig(only=("scr",), texts=4, baselines=False, layers=layers)
        found = benchmark(pocket, dictionaries, rows, config=config)
        assert {row.layer for row in found.rows} == expected
    with pytest.raises(InputError, match="Layer 2 has no dictionary"):
        benchmark(pocket, dictionaries, rows, config=BenchmarkConfig(only=("scr",), texts=4, layers=(2,)))


def test_the_command_prints_a_table_and_writes_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    texts = [*(f"The {word} is red." for word in ("cat", "dog", "fox", "owl")), *["I am sad."] * 4]
    (tmp_path / "mine.csv").write_text(
        "text,label\n" + "".join(f"{text},{number // 4}\n" for number, text in enumerate(texts))
    )
    command = [
        "benchmark",
        "pocket-plt",
        "--only",
        "tpp",
        "--tokens",
        "300",
        "--no-baselines",
        "--labelled",
        "mine.csv",
    ]
    main([*command, "--at-layers", "1-1", "--out", "made", "--wide"])
    said = capsys.readouterr().out
    assert "TPP n=20 ↑" in said
    assert "layer 1; one seed" in said
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == [
        "benchmark.csv", "benchmark.html", "benchmark.json",
    ]  # fmt: skip


def test_the_command_knows_every_task():
    assert get_args(command._Task) == ALL_TASKS == tuple(TASKS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "0"], "too few to measure"),
        (["--labelled", "none.csv"], "give --forget LABEL"),
        (["--labelled", "none.csv", "--only", "tpp"], "There is no file"),
        (["pocket"], "named twice"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", "pocket", *arguments])
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
