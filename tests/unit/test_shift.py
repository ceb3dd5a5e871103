"""SHIFT where the answer is known: a concept planted in embeddings, and plain runs of the bridge in float64."""

import csv
import json
from typing import Any

import numpy as np
import pytest
import torch

import circuitsae as cs
from circuitsae.attribution import edge_effects, node_effects
from circuitsae.attribution.effects import Readout
from circuitsae.benchmark.data import Labelled
from circuitsae.cli import main
from circuitsae.interventions import Error, Feature
from circuitsae.replacement import ReplacementModel
from circuitsae.shift import ShiftConfig, ShiftTexts, ablated, margin_effects, read_judged, shift, train_classifier
from circuitsae.shift.classifier import pooled
from circuitsae.shift.effects import coordinates, mean_activations
from circuitsae.shift.judging import fires_on, judge_by_words, tells
from transcoders.dictionaries import SAE, DictionaryProvenance, ReLU, SAESet, random_dictionaries
from transcoders.errors import FileFormatError, InputError
from transcoders.evaluation.probes import logistic_probe
from transcoders.random_models import random_model
from transcoders.sites import Site

D, HOOK = 16, "blocks.{}.hook_out"
WORDS = {(True, True): "bread he", (True, False): "bread she", (False, True): "dog he", (False, False): "dog she"}
FILLERS = ("old", "new", "red", "blue", "green", "small", "big", "tall")
CONCEPTS = np.linalg.qr(np.random.default_rng(0).normal(size=(D, D)))[0][:2]
"""Directions of the intended and of the unintended label."""
PLANTED = (Feature(0, 2), Feature(0, 3))
"""The two sides of the unintended one."""


@pytest.fixture(scope="module")
def tokenizer():
    return cs.load_model("pocket").tokenizer


def built(tokenizer, dictionaries, **sizes):
    model = random_model("gpt2", d_vocab=len(tokenizer), d_model=D, context=16, dtype=torch.float64, **sizes)
    model.tokenizer = tokenizer
    return ReplacementModel(model, dictionaries, bos=True)


@pytest.fixture(scope="module")
def labelled():
    """Two words that say both labels, weakly and strongly, among others."""
    rng, rows = np.random.default_rng(1), []
    for cell, words in WORDS.items():
        for _ in range(12):
            text = "the " + " ".join([*rng.choice(FILLERS, rng.integers(1, 4)), words, *rng.choice(FILLERS, 2)])
            rows.append((text, "food" if cell[0] else "animal", "he" if cell[1] else "she"))
    texts, labels, others = zip(*rows, strict=True)
    return Labelled("planted", texts, labels, others)


@pytest.fixture(scope="module")
def planted(tokenizer):
    """Blocks that write nothing, embeddings that hold the concepts, and features along either side of each."""
    both = torch.tensor(np.stack([CONCEPTS[0], -CONCEPTS[0], CONCEPTS[1], -CONCEPTS[1]]))
    saes = [
        SAE(
            W_enc=both.T.contiguous(), b_enc=both.new_zeros(4), W_dec=both, b_dec=both.new_zeros(D),
            activation=ReLU(), site=Site(0, "resid_post"),
        ),
        SAE.absent(1, D, "resid_post", torch.float64),
    ]  # fmt: skip
    whole = built(tokenizer, SAESet(saes, DictionaryProvenance(model="planted", bos=True)), n_layers=2)
    strength = {" bread": (1.0, 0), " dog": (-1.0, 0), " he": (2.0, 1), " she": (-2.0, 1)}
    with torch.no_grad():
        for block in whole.model.bridge.blocks:
            for part in (block.attn.o, block.mlp.out):
                for weight in part.parameters():
                    weight.zero_()
        rows = whole.model.bridge.embed.W_E
        rows.mul_(0.3)
        for word, (much, which) in strength.items():
            rows[whole.model.token_id(word)] += much * torch.tensor(CONCEPTS[which])
    return whole


@torch.no_grad()
def plain(model, text, layer, change=None):
    """The mean of the stream after a block over all tokens but the first, in a run with hooks of the bridge's own."""
    seen = []
    hooks = [(model.model.hook(site), hook) for site, hook in (change or {}).items()]
    hooks.append((HOOK.format(layer), lambda value, hook: seen.append(value)))
    model.model.bridge.run_with_hooks(model.tokens(text)[None], fwd_hooks=hooks, prepend_bos=False)
    return seen[0][0, 1:].mean(0).numpy()


def right(probe, x, cells):
    """Intended, unintended, and the worst cell, one text after the other."""
    said = probe.scores(x)[:, 0] > 0
    rates = {cell: [] for cell in WORDS}
    for answer, cell in zip(said.tolist(), cells.tolist(), strict=True):
        rates[tuple(cell)].append(answer)
    yes = {cell: np.mean(answers) for cell, answers in rates.items()}
    sides = [[rate if cell[side] else 1 - rate for cell, rate in yes.items()] for side in (0, 1)]
    return np.mean(sides[0]), np.mean(sides[1]), min(sides[0])


def test_shift_takes_out_the_planted_concept(planted, labelled):
    found = shift(
        planted, labelled, config=ShiftConfig(labels=("food", "animal"), judge_texts=6, effect_texts=8, steps=1)
    )
    texts = ShiftTexts.of(labelled, labels=("food", "animal"), judged=6)
    assert set(found.judged) == set(PLANTED)
    assert found.line("original").groups.worst < 0.5
    assert found.line("SHIFT, retrained").groups.intended == 1
    assert found.line("features, skyline").ablated == found.line("coordinates, skyline").ablated == 2
    # The two sides together are the direction; without blocks that write, all that follows is linear.
    x = np.stack([plain(planted, text, 1) for text in texts.texts])
    projected = x - np.outer(x @ CONCEPTS[1], CONCEPTS[1])
    probe, again = (logistic_probe(each[texts.biased], texts.cells[texts.biased][:, :1]) for each in (x, projected))
    cells = texts.cells[texts.tested]
    for name, classifier, seen in (
        ("original", probe, x), ("SHIFT", probe, projected), ("SHIFT, retrained", again, projected),
    ):  # fmt: skip
        assert found.line(name).groups == pytest.approx(right(classifier, seen[texts.tested], cells))
    oracle = logistic_probe(x[texts.balanced], texts.cells[texts.balanced][:, :1])
    assert found.line("oracle").groups == pytest.approx(right(oracle, x[texts.tested], cells))


@pytest.mark.parametrize("method", ["gradient", "integrated"])
def test_effects_are_what_removing_a_feature_does_where_all_is_linear(planted, labelled, method):
    some = list(labelled.texts[::8])
    y = np.array([label == "food" for label in labelled.labels[::8]])
    x = pooled(planted, Site(1, "resid_post"), "mean", some)
    classifier = train_classifier(Site(1, "resid_post"), "mean", x, y)
    circuit = margin_effects(planted, classifier, some, y, method=method, steps=2)
    sign = np.where(y, 1, -1)
    assert set(circuit.nodes) == {Feature(0, i) for i in range(4)} | {Error(0)}
    for node, effect in zip(circuit.nodes, circuit.scores, strict=True):
        if isinstance(node, Error):
            continue
        without = pooled(planted, Site(1, "resid_post"), "mean", some, ablated(planted.dictionaries, [node]))
        score, less = (classifier.probe.scores(each)[:, 0] for each in (x, without))
        assert (sign * (score - less)).mean() == pytest.approx(effect, abs=1e-9)
    # What is neither feature nor error is the bias, and the token before the first with features is not read.
    weighted = classifier.probe.scores(x)[:, 0] - classifier.probe.bias
    assert sum(circuit.scores) == pytest.approx((sign * weighted).mean())


@pytest.fixture(scope="module", params=["sae", "clt"])
def curved(request, tokenizer):
    dictionaries = random_dictionaries(request.param, n_layers=3, d_model=D, features=12, dtype=torch.float64, seed=2)
    return built(tokenizer, dictionaries, n_layers=3)


TEXT = "the old bread he saw"


@pytest.mark.parametrize("pool", ["mean", "last"])
def test_effects_on_a_site_are_central_differences(curved, pool):
    site, trace = Site(1, "resid_post"), curved.trace(TEXT)
    weight = np.random.default_rng(3).normal(size=(D, 1))
    classifier = train_classifier(site, pool, np.eye(D), np.arange(D) % 2 == 0)
    classifier = type(classifier)(site, pool, classifier.probe._replace(weight=weight))
    found = node_effects(curved, trace, classifier.readout(trace))
    share = np.eye(trace.n_positions)[-1] if pool == "last" else np.r_[0, np.ones(trace.n_positions - 1)]

    def score(layer, pos, vectors):
        seen = []
        hooks = [
            (curved.model.hook(curved.dictionaries.writes[at]), adding(pos, vector)) for at, vector in vectors.items()
        ]
        hooks.append((HOOK.format(1), lambda value, hook: seen.append(value[0].numpy())))
        with torch.no_grad():
            curved.model.bridge.run_with_hooks(trace.tokens[None], fwd_hooks=hooks, prepend_bos=False)
        return float(share @ seen[0] @ weight[:, 0] / share.sum() + classifier.probe.bias[0])

    assert found.clean == pytest.approx(score(0, 0, {}))
    assert not found.features[found.nodes.index[:, 0] == 2].any()
    rows, h = records(found.frame()), 1e-4
    largest = abs(rows[0]["effect"])
    features = [row for row in rows if row["kind"] == "feature"]
    for row in [*features[:3], *rows[-2:]]:
        layer, pos, index = row["layer"], row["pos"], torch.tensor([max(0, row["feature"])])
        unit = {layer: found.nodes.errors[layer, pos]} if row["feature"] < 0 else {
            at: row["value"] * curved.dictionaries.decoder_rows(layer, index, at)[0]
            for at in curved.dictionaries.write_layers(layer)
        }  # fmt: skip
        up, down = (score(layer, pos, {at: sign * h * v for at, v in unit.items()}) for sign in (1, -1))
        assert row["effect"] == pytest.approx((up - down) / (2 * h), rel=1e-5, abs=1e-6 * largest)
    edges = edge_effects(found, 1000).edges
    for row in rows[:5]:
        leaving = sum(edge["effect"] for edge in records(edges) if edge["source"] == row["id"])
        assert leaving == pytest.approx(row["effect"], rel=1e-5)


def records(frame) -> list[dict[str, Any]]:
    return frame.to_dict("records")


def adding(pos, vector):
    def hook(value, hook):
        out = value.clone()
        out[0, pos] += vector
        return out

    return hook


@pytest.mark.parametrize("means", [False, True])
def test_ablated_runs_are_those_of_plain_hooks(curved, means):
    dictionaries, chosen = curved.dictionaries, [Feature(1, 5), Feature(0, 3), Feature(0, 7)]
    put = mean_activations(curved, [0, 1], [TEXT, "the dog"]) if means else None
    if put is not None:
        reads = [curved.trace(text).frozen.reads.by_layer for text in (TEXT, "the dog")]
        a = torch.cat([dictionaries.activations(0, read[0, 1:]) for read in reads])
        assert torch.allclose(put[0], a.mean(0))
    extra = {}

    def see(layer):
        def hook(value, hook):
            own = [feature.index for feature in chosen if feature.layer == layer]
            a = dictionaries.activations(layer, value[0])[:, own]
            change = (0 if put is None else put[layer][own]) - a
            change[0] = 0
            for at in dictionaries.write_layers(layer):
                rows = dictionaries.decoder_rows(layer, torch.tensor(own), at)
                extra[at] = extra.get(at, 0) + change @ rows

        return hook

    def write(layer):
        return lambda value, hook: value + extra[layer]

    seen, hooks = [], []
    for layer in (0, 1):
        hooks += [(curved.model.hook(dictionaries.reads[layer]), see(layer)),
                  (curved.model.hook(dictionaries.writes[layer]), write(layer))]  # fmt: skip
    hooks.append((HOOK.format(1), lambda value, hook: seen.append(value)))
    with torch.no_grad():
        curved.model.bridge.run_with_hooks(curved.tokens(TEXT)[None], fwd_hooks=hooks, prepend_bos=False)
    edits = ablated(dictionaries, chosen, put)
    found = pooled(curved, Site(1, "resid_post"), "mean", [TEXT, "the dog"], edits)[0]
    np.testing.assert_allclose(found, seen[0][0, 1:].mean(0).numpy(), rtol=1e-9)
    assert np.abs(found - plain(curved, TEXT, 1)).max() > 1e-3


def test_coordinates_leave_no_error_and_go_to_their_mean(curved, labelled):
    some = list(labelled.texts[:6])
    neurons = coordinates(curved, [0, 1], some)
    assert neurons.trace(some[0]).errors[:2, 1:].abs().max() < 1e-9
    site = neurons.dictionaries.writes[1]
    x = pooled(neurons, site, "mean", some)
    less = pooled(neurons, site, "mean", some, ablated(neurons.dictionaries, [Feature(1, 4), Feature(1, 4 + D)]))
    every = torch.cat([neurons.model.activations(neurons.tokens(text)[None], [site])[site][0, 1:] for text in some])
    assert less[:, 4] == pytest.approx(np.full(6, float(every[:, 4].mean())))
    np.testing.assert_allclose(np.delete(less, 4, 1), np.delete(x, 4, 1))


def test_what_a_feature_tells_and_fires_on(planted, labelled):
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(4)
    a, y = rng.integers(0, 4, (30, 3)).astype(float), np.arange(30) % 3 == 0
    assert tells(a, y) == pytest.approx([abs(2 * roc_auc_score(y, column) - 1) for column in a.T])
    found = fires_on(planted, PLANTED, labelled.texts)
    assert [next(iter(spelled)) for spelled, _ in found] == [" he", " she"]
    assert sum(found[0][0].values()) == pytest.approx(1)
    assert found[0][1].endswith("» he«")
    assert judge_by_words([spelled for spelled, _ in found], ["HE", "him"]) == [True, False]
    by_words = shift(planted, labelled, config=ShiftConfig(words=("she",), baselines=False, effect_texts=8, steps=1))
    assert by_words.judged == (Feature(0, 3),)


def test_the_human_step_marked_features_are_what_is_taken_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with open("mine.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label", "second"))
        for (food, he), words in WORDS.items():
            for filler in FILLERS[:4]:
                writer.writerow((f"The {filler} {words} saw.", food, he))
    command = ["shift", "--texts", "mine.csv", "--method", "gradient", "--nodes", "12", "--effect-texts", "3",
               "--judge-texts", "2", "--pool", "last", "--no-baselines", "--wide"]  # fmt: skip
    main(command)
    assert "SHIFT, retrained" in capsys.readouterr().out
    with open("shift/features.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    feature = next(row for row in rows if "err" not in row["id"] and row["ablate"] == "no")
    for row in rows:
        row["ablate"] = "yes" if row is feature else "no"
    with open("edited.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    main([*command, "--judge", "edited.csv", "--out", "again"])
    first, again = (json.loads((tmp_path / name / "shift.json").read_text()) for name in ("shift", "again"))
    assert again["judged"] == [feature["id"]]
    assert again["lines"][0] == first["lines"][0]
    assert first["intended"] == ["False", "True"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,effect\n1.2,3\n", "no field `ablate`"),
        ("id,ablate\n1.2,perhaps\n", "says 'perhaps' under `ablate`"),
        ("id,ablate\n1.err,yes\n", "'1.err', which is no feature"),
        ("id,ablate\n1.2@3,yes\n", "'1.2@3', which is no feature"),
    ],
)
def test_files_that_judge_nothing_are_refused(tmp_path, content, message):
    path = tmp_path / "judged.csv"
    path.write_text(content)
    with pytest.raises(FileFormatError, match=message):
        read_judged(path)
    listed = tmp_path / "judged.txt"
    with pytest.raises(FileFormatError, match="There is no file"):
        read_judged(listed)
    listed.write_text("1.2\n\n0.7\n1.2\n")
    assert read_judged(listed) == [Feature(1, 2), Feature(0, 7)]


def test_wrong_use_is_one_sentence(planted, labelled):
    def texts(labels=("a", "b"), others=("c", "d"), count=4):
        pairs = [(label, other) for label in labels for other in others for _ in range(count)]
        return Labelled("mine", tuple("the dog" for _ in pairs), *map(tuple, zip(*pairs, strict=True)))

    cases: list[tuple[Labelled, dict[str, Any], str]] = [
        (Labelled("mine", ("a",), ("b",)), {}, "a field `second`"),
        (texts(("a", "b", "c")), {}, "There are 3 labels to tell apart"),
        (texts(), {"labels": ("a", "x")}, "No text has the label 'x'"),
        (texts(others=("c", "d", "e")), {}, "There are 3 values of `second`"),
        (texts(count=3), {}, "fewer than 4 examples"),
    ]
    for given, settings, message in cases:
        with pytest.raises(InputError, match=message):
            ShiftTexts.of(given, **settings)
    with pytest.raises(InputError, match="each must be at least 1"):
        ShiftConfig(nodes=0)
    with pytest.raises(InputError, match="no layer 2"):
        shift(planted, labelled, config=ShiftConfig(layer=2))
    with pytest.raises(InputError, match=r"There is no feature 0\.9"):
        shift(planted, labelled, judged=[Feature(0, 9)], config=ShiftConfig(baselines=False, effect_texts=1))
    constant = Readout(Site(1, "resid_post"), lambda x: torch.zeros(len(x)))
    with pytest.raises(InputError, match="does not depend on the activations"):
        node_effects(planted, TEXT, constant)
