"""Every number of a feature card is that of a dense pass that keeps all activations, however the pass was cut up."""

import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tracemalloc
import zipfile
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import circuitsae
from circuitsae.attribution import attribute
from circuitsae.cli import main
from circuitsae.commands.shared import beside_dictionaries, source_of, write_page
from circuitsae.features import CollectConfig, FeatureCards, Label, Ledger, collect, reading
from circuitsae.features.card_files import ARRAYS, MANIFEST, read_arrays, write_arrays
from circuitsae.features.collection import dictionary_fingerprint, run
from circuitsae.features.collection.assemble import direct_logits
from circuitsae.features.collection.cofiring import cofiring
from circuitsae.features.collection.examples import mixed
from circuitsae.features.collection.state import STATE, Collected
from circuitsae.features.reading import Firing
from circuitsae.graph import AttributionGraph, suggest_supernodes
from circuitsae.graph.supernodes import label_json
from circuitsae.pocket import MODEL_DIR, dictionary_folder, load_cards
from circuitsae.report.browser import write_browser
from examples.pocket import cards as pocket_cards
from tests.sample_graphs import small_graph
from transcoders.data import Corpus
from transcoders.dictionaries import SparseFeatures, fingerprint, random_dictionaries
from transcoders.errors import DictionaryError, FileFormatError, InputError, Stopped
from transcoders.formats import load_dictionaries, save_dictionaries
from transcoders.loading import random_model

LAYERS, WIDTH, FEATURES, CONTEXT = 2, 16, 20, 12
SETTINGS = CollectConfig(
    tokens=600, context=CONTEXT, top=4, per_stratum=2, before=2, after=1, logits=3, neighbours=5, save_every=150
)
# Few different tokens, so that texts repeat.
ROWS = torch.randint(1, 5, (55, CONTEXT), generator=torch.Generator().manual_seed(3))
KINDS = {
    "plt": {"skip": True},
    "clt": {"activation": "jumprelu"},
    "sae": {"centred": True},
    "topk": {"activation": "topk", "k": 3},
}


def make(name, features=FEATURES) -> Any:
    kind = "clt" if name == "topk" else name
    options: Any = {"n_layers": LAYERS, "d_model": WIDTH, "features": features, "dtype": torch.float64, **KINDS[name]}
    dictionaries: Any = random_dictionaries(kind, **options)
    # One feature of layer 1 never fires; the ranges of the others grow by several powers of two on the way.
    bias = dictionaries.b_enc[1] if kind == "clt" else dictionaries[1].b_enc
    with torch.no_grad():
        bias[7] = -1e3
    return dictionaries


@pytest.fixture(scope="module")
def model():
    return random_model("gpt2", n_layers=LAYERS, d_model=WIDTH, d_vocab=32, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _many_chunks(monkeypatch):
    monkeypatch.setattr(reading, "_TOKENS_AT_ONCE", 5 * CONTEXT)


@pytest.fixture(scope="module", params=list(KINDS))
@torch.no_grad()
def case(request, model):
    """Cards, and the dense activations [token, feature] of the rows that they are of."""
    dictionaries = make(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "_TOKENS_AT_ONCE", 5 * CONTEXT)
        cards = collect(model, dictionaries, ROWS, SETTINGS)
    found = model.activations(ROWS, set(dictionaries.reads))
    reads = torch.stack([found[site].flatten(0, 1) for site in dictionaries.reads])
    features = dictionaries.encode(reads)
    dense = torch.zeros(ROWS.numel(), LAYERS * FEATURES, dtype=torch.float64)
    layer, token, feature = features.index.unbind(1)
    dense[token, layer * FEATURES + feature] = features.value.float().double()
    dense[::CONTEXT] = 0
    return cards, dictionaries, dense.numpy()


def places(cards):
    return [(layer * FEATURES + feature, cards.card(layer, feature)) for layer, feature in cards]


def test_rates_means_maxima_and_dead_features(case):
    cards, _, dense = case
    tokens = len(ROWS) * (CONTEXT - 1)
    assert cards.tokens_seen == tokens
    for i, card in places(cards):
        active = dense[:, i][dense[:, i] > 0]
        assert card.firing_rate == len(active) / tokens
        assert card.dead == (len(active) == 0)
        if len(active):
            assert card.max_activation == active.max()
            assert card.mean_activation == pytest.approx(active.mean(), rel=1e-6)
    assert cards.card(1, 7).dead
    assert cards.manifest["dead"] == cards.frame().groupby("layer").dead.sum().tolist()


def test_histograms_count_every_activation_once(case):
    cards, _, dense = case
    for i, card in places(cards):
        active = dense[:, i][dense[:, i] > 0]
        if not len(active):
            assert card.histogram is None
            continue
        edges = np.array(card.histogram["edges"])
        expected = [int(((low <= active) & (active < high)).sum()) for low, high in pairwise(edges)]
        assert card.histogram["counts"] == expected
        assert sum(expected) == len(active)
        assert edges[-1] > active.max() >= edges[-2]


def window(token):
    row, pos = divmod(token, CONTEXT)
    shown = range(pos - SETTINGS.before, pos + SETTINGS.after + 1)
    return tuple(int(ROWS[row, p]) if 1 <= p < CONTEXT else -1 for p in shown)


def shown(token, i, dense, stratum):
    """The example of a token as a card has it."""
    row, pos = divmod(token, CONTEXT)
    here = [p for p in range(pos - SETTINGS.before, pos + SETTINGS.after + 1) if 1 <= p < CONTEXT]
    return (
        [f"#{int(ROWS[row, p])}" for p in here],
        [dense[row * CONTEXT + p, i] for p in here],
        here.index(pos),
        stratum,
    )


def strongest(i, dense):
    """Tokens of the top examples: at most one of a row, no text twice, the earliest of equals."""
    peaks = [
        r * CONTEXT + int(np.argmax(row)) for r, row in enumerate(dense[:, i].reshape(-1, CONTEXT)) if row.max() > 0
    ]
    best = {}
    for token in sorted(peaks, key=lambda t: (-dense[t, i], t)):
        best.setdefault(window(token), token)
    return list(best.values())[: SETTINGS.top]


def key(text):
    value = np.zeros(1, np.uint64)
    for token in text:
        value = mixed(value ^ np.array([token + 2], np.uint64))
    return value


def sampled(i, dense):
    """Tokens of the sample of each stratum: the texts with the smallest numbers."""
    salt = mixed(np.array([i], np.uint64))
    top = math.frexp(dense[:, i].max())[1]
    strata = defaultdict(dict)
    for token in np.flatnonzero(dense[:, i]).tolist():
        strata[math.floor(dense[token, i] / 2.0**top * SETTINGS.strata)].setdefault(window(token), token)
    return {
        s: [token for _, token in sorted(texts.items(), key=lambda x: int(mixed(key(x[0]) ^ salt)[0]))][
            : SETTINGS.per_stratum
        ]
        for s, texts in strata.items()
    }


def test_top_and_stratified_examples(case):
    cards, _, dense = case
    strata_seen = set()
    for i, card in places(cards):
        if card.dead:
            assert card.examples == ()
            continue
        top = strongest(i, dense)
        expected = [shown(token, i, dense, "top") for token in top]
        known = {window(token) for token in top}
        unit = 2.0 ** math.frexp(card.max_activation)[1] / SETTINGS.strata / card.max_activation
        for stratum, tokens in sorted(sampled(i, dense).items(), reverse=True):
            name = f"{100 * stratum * unit:.0f}-{100 * min(1, (stratum + 1) * unit):.0f} %"
            strata_seen.add(stratum)
            chosen = sorted((t for t in tokens if window(t) not in known), key=lambda t: -dense[t, i])
            expected += [shown(token, i, dense, name) for token in chosen]
        found = [(e["tokens"], e["activations"], e["peak"], e["stratum"]) for e in card.examples]
        assert [(f[0], f[2], f[3]) for f in found] == [(e[0], e[2], e[3]) for e in expected]
        for own, other in zip(found, expected, strict=True):
            assert own[1] == pytest.approx(other[1], abs=1e-3 * card.max_activation)
    assert len(strata_seen) == SETTINGS.strata


def test_neighbours_are_the_largest_jaccard_indices(case):
    cards, _, dense = case
    on = (dense > 0).astype(float)
    both = on.T @ on
    union = on.sum(0)[:, None] + on.sum(0) - both
    jaccard = np.where(union > 0, both / np.maximum(union, 1), 0)
    np.fill_diagonal(jaccard, 0)
    for i, card in places(cards):
        order = np.argsort(-jaccard[i], kind="stable")[: SETTINGS.neighbours]
        expected = [(int(j) // FEATURES, int(j) % FEATURES) for j in order if jaccard[i, j] > 0]
        assert [(n["layer"], n["feature"]) for n in card.neighbours] == expected
        assert [n["score"] for n in card.neighbours] == pytest.approx(
            [jaccard[i, j] for j in order][: len(expected)], abs=1e-3
        )


def test_logit_effects_and_nearest_features_come_from_the_decoders(case, model):
    cards, dictionaries, _ = case
    feature = torch.arange(FEATURES)
    written = torch.cat(
        [
            torch.stack([dictionaries.decoder_rows(layer, feature, at) for at in dictionaries.write_layers(layer)]).sum(
                0
            )
            for layer in range(LAYERS)
        ]
    ).double()
    norm = model.bridge.original_model.transformer.ln_f
    centred = (written - written.mean(1, keepdim=True)) * norm.weight
    logits = centred @ model.bridge.original_model.lm_head.weight.T
    logits = (logits - logits.mean(1, keepdim=True)).detach().numpy()
    unit = torch.nn.functional.normalize(written).detach()
    cosine = (unit @ unit.T).fill_diagonal_(-1).numpy()
    for i, card in places(cards):
        order = np.argsort(-logits[i])
        assert [t["token"] for t in card.top_logits] == [f"#{t}" for t in order[:3]]
        assert [t["token"] for t in card.bottom_logits] == [f"#{t}" for t in order[::-1][:3]]
        assert [t["value"] for t in card.top_logits] == pytest.approx(logits[i][order[:3]], rel=2e-3, abs=1e-3)
        near = np.argsort(-cosine[i])[: SETTINGS.neighbours]
        assert [n["layer"] * FEATURES + n["feature"] for n in card.nearest] == near.tolist()
        assert [n["score"] for n in card.nearest] == pytest.approx(cosine[i][near], abs=1e-3)


def test_logit_effects_pass_the_norm_behind_the_mlp():
    gemma: Any = random_model("gemma2", n_layers=LAYERS, d_model=WIDTH, d_vocab=32, dtype=torch.float64)
    dictionaries = make("plt")
    layer = gemma.bridge.original_model.model.layers[1]
    weight = (1 + layer.post_feedforward_layernorm.weight) * (1 + gemma.bridge.original_model.model.norm.weight)
    logits = dictionaries[1].W_dec * weight @ gemma.W_U
    logits = logits - logits.mean(1, keepdim=True)
    found = direct_logits(gemma, dictionaries, 1, 3)
    assert found is not None
    top, bottom = found
    assert (top.index == logits.topk(3).indices.numpy()).all()
    assert np.allclose(bottom.value, logits.topk(3, largest=False).values.detach().numpy())


def same(one, other):
    assert dict(one.manifest) == dict(other.manifest)
    assert one.arrays.keys() == other.arrays.keys()
    for name, array in one.arrays.items():
        assert array.dtype == other.arrays[name].dtype, name
        assert array.tobytes() == other.arrays[name].tobytes(), name


@pytest.mark.parametrize("exact_up_to", [8192, 0])
def test_a_killed_run_goes_on_to_the_same_bits(model, tmp_path, monkeypatch, exact_up_to):
    from circuitsae.features.collection import state

    monkeypatch.setattr(state, "cofiring", lambda n, seed: cofiring(n, exact_up_to=exact_up_to, seed=seed))
    dictionaries, update = make("clt"), Collected.update
    unbroken = collect(model, dictionaries, ROWS, SETTINGS)

    def killed_after(chunks):
        left = iter(range(chunks))

        def once(self, *arguments):
            if next(left, None) is None:
                raise KeyboardInterrupt
            update(self, *arguments)

        return once

    for chunks in (4, 5):
        monkeypatch.setattr(Collected, "update", killed_after(chunks))
        with pytest.raises(KeyboardInterrupt):
            collect(model, dictionaries, ROWS, SETTINGS, out=tmp_path)
        assert (tmp_path / STATE).is_file()
    monkeypatch.setattr(Collected, "update", update)
    with pytest.raises(InputError, match="another top"):
        collect(model, dictionaries, ROWS, CollectConfig(**{**vars_of(SETTINGS), "top": 5}), out=tmp_path)
    resumed = collect(model, dictionaries, ROWS, SETTINGS, out=tmp_path)
    same(resumed, unbroken)
    assert not (tmp_path / STATE).exists()
    loaded = FeatureCards.load(tmp_path)
    assert loaded.card(0, 3) == resumed.card(0, 3)


def test_ctrl_c_loses_nothing_that_was_read(model, tmp_path, monkeypatch):
    dictionaries, update = make("clt"), Collected.update
    unbroken = collect(model, dictionaries, ROWS, SETTINGS)
    chunks = []

    def interrupted(self, *arguments):
        chunks.append(1)
        if len(chunks) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        update(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Collected, "update", interrupted)
        with pytest.raises(Stopped, match=r"Stopped after \d+ tokens; the same command goes on"):
            collect(model, dictionaries, ROWS, replace(SETTINGS, save_every=10**6), out=tmp_path)
        before = len(chunks)
        same(collect(model, dictionaries, ROWS, replace(SETTINGS, save_every=10**6), out=tmp_path), unbroken)
    assert before == 2


def test_a_state_of_another_corpus_is_refused(model, tmp_path, monkeypatch):
    dictionaries, text = make("plt"), tmp_path / "text.txt"
    small = CollectConfig(**{**vars_of(SETTINGS), "tokens": 100, "save_every": 1})
    words = {"b": ROWS, "c": torch.cat([ROWS[:1], ROWS[1:] + 1])}
    monkeypatch.setattr(reading, "_TOKENS_AT_ONCE", CONTEXT)
    monkeypatch.setattr(reading, "pack_rows", lambda model, documents, **_: iter(words[next(documents)].tolist()))

    def killed(corpus, out):
        with monkeypatch.context() as patch:
            patch.setattr(run, "assemble", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                collect(model, dictionaries, corpus, small, out=out)
        assert (out / STATE).is_file()

    later = ROWS.clone()
    later[5, 3] += 1
    text.write_text("x\n\nb")
    cases = [(ROWS, later), (ROWS, ROWS[:40]), (["a", "b"], ["a", "c"]), (["a", "b"], text)]
    for number, (one, other) in enumerate(cases):
        out = tmp_path / str(number)
        killed(one, out)
        with pytest.raises(InputError, match="of a run with another corpus"):
            collect(model, dictionaries, other, small, out=out)
        assert collect(model, dictionaries, one, small, out=out).tokens_seen >= 100
    killed(text, tmp_path / "file")
    text.write_text("x\n\nb\n")
    with pytest.raises(InputError, match="of a run with another corpus"):
        collect(model, dictionaries, text, small, out=tmp_path / "file")


@pytest.mark.parametrize("rows", [ROWS + 30, ROWS - 2])
def test_rows_with_tokens_that_the_model_lacks_are_refused(model, rows):
    with pytest.raises(InputError, match="Token ids run from"):
        collect(model, make("plt"), torch.cat([ROWS, rows]), SETTINGS)


@pytest.mark.parametrize("value", [-0.5, 0.0, math.inf, math.nan, 1e300])
def test_activations_that_are_not_above_0_are_refused(model, monkeypatch, value):
    dictionaries = make("plt")
    features = SparseFeatures(torch.tensor([[0, 1, 2], [1, 4, 6]]), torch.tensor([1.0, value], dtype=torch.float64))
    monkeypatch.setattr(dictionaries, "encode", lambda reads: features)
    with pytest.raises(DictionaryError, match=r"Feature 1\.6 has the activation"):
        collect(model, dictionaries, ROWS, SETTINGS)


def test_a_threshold_below_0_is_refused(model):
    dictionaries = make("clt")
    with torch.no_grad():
        dictionaries.activation.threshold.fill_(-0.5)
    with pytest.raises(DictionaryError, match=r"has the activation -0\.\d+, but cards are of finite"):
        collect(model, dictionaries, ROWS, SETTINGS)


def test_what_single_precision_cannot_hold_is_active_all_the_same(model, monkeypatch):
    dictionaries = make("plt")
    features = SparseFeatures(torch.tensor([[0, 1, 2]]), torch.tensor([1e-60], dtype=torch.float64))
    monkeypatch.setattr(dictionaries, "encode", lambda reads: features)
    card = collect(model, dictionaries, ROWS[:5], SETTINGS).card(0, 2)
    assert card is not None
    assert 0 < card.max_activation < 1e-37
    assert card.histogram is not None
    assert sum(card.histogram["counts"]) == 1


def vars_of(config):
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def test_chunks_change_no_number(model, monkeypatch):
    dictionaries = make("plt")
    cut = collect(model, dictionaries, ROWS, SETTINGS)
    monkeypatch.setattr(reading, "_TOKENS_AT_ONCE", 10**6)
    whole = collect(model, dictionaries, ROWS, SETTINGS)
    for name, array in whole.arrays.items():
        assert np.allclose(array.astype(float), cut.arrays[name].astype(float), rtol=1e-6), name


def test_mapped_decoders_give_the_same_cards(model, tmp_path):
    save_dictionaries(make("clt"), tmp_path)
    cards = [
        collect(model, load_dictionaries(tmp_path, dtype=torch.float64, decoders=place), ROWS, SETTINGS)
        for place in ("memory", "mapped")
    ]
    same(*cards)


def test_sketches_are_exact_for_rare_features_and_near_for_others():
    rng = np.random.default_rng(0)
    base = rng.random((4000, 6)) < 0.2
    copies = base ^ (rng.random(base.shape) < 0.05)  # neighbours with a large Jaccard index
    on = np.concatenate([base, copies, rng.random((4000, 4)) < 0.004], axis=1)
    on[:, 12] |= on[:, 13] & (rng.random(4000) < 0.7)
    n = on.shape[1]
    exact, sketch = cofiring(n), cofiring(n, exact_up_to=0)
    for start in range(0, 4000, 500):
        token, feature = np.nonzero(on[start : start + 500])
        for counter in (exact, sketch):
            counter.update(Firing(feature, token, np.ones(len(token), np.float32)), start, 500)
    count = on.sum(0)
    assert (count[:12] > 64).all()
    assert (count[12:] <= 64).all()
    (index, true), (near, estimate) = (counter.neighbours(count, n - 1) for counter in (exact, sketch))
    table = [{(i, j): v for i in range(n) for j, v in zip(a[i].tolist(), b[i].tolist(), strict=True) if j >= 0}
             for a, b in ((index, true), (near, estimate))]  # fmt: skip
    assert table[1][12, 13] == pytest.approx(table[0][12, 13])
    assert index[:6, 0].tolist() == near[:6, 0].tolist() == list(range(6, 12))
    assert max(abs(table[0][pair] - table[1].get(pair, 0)) for pair in table[0]) < 0.2


def test_memory_does_not_grow_with_the_corpus(model, monkeypatch):
    monkeypatch.setattr("circuitsae.features.collection.cofiring._ENTRIES_AT_ONCE", 1000)
    monkeypatch.setattr(reading, "_TOKENS_AT_ONCE", 20 * CONTEXT)
    dictionaries = make("clt")

    def peak(rows):
        corpus = torch.randint(1, 32, (rows, CONTEXT), generator=torch.Generator().manual_seed(0))
        tracemalloc.start()
        collect(model, dictionaries, corpus, CollectConfig(**{**vars_of(SETTINGS), "tokens": 10**6}))
        largest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return largest

    peak(160)  # what is imported and cached on the way
    all_activations = 480 * (CONTEXT - 1) * LAYERS * FEATURES * 8
    assert peak(640) - peak(160) < all_activations / 5


def test_held_out_documents_are_not_read(monkeypatch):
    seen = []

    def rows(model, documents, **_):
        seen.extend(documents)
        yield from ROWS.tolist()

    monkeypatch.setattr(reading, "pack_rows", rows)
    small = random_model("gpt2", n_layers=LAYERS, d_model=WIDTH, d_vocab=32, dtype=torch.float64)
    collect(small, make("plt"), Corpus("numbers", lambda: map(str, range(41))), replace(SETTINGS, connections=0))
    assert seen == [str(i) for i in range(41) if i % 20]


def test_a_corpus_that_ends_early_is_said_and_one_without_rows_refused(model, caplog):
    cards = collect(model, make("plt"), ROWS[:3], SETTINGS)
    assert cards.tokens_seen == 3 * (CONTEXT - 1)
    assert "ended after 33 of 600 tokens" in caplog.text
    with pytest.raises(InputError, match="single row"):
        collect(model, make("plt"), ROWS[:0], SETTINGS)


@pytest.mark.parametrize(("name", "value"), [("strata", 3), ("top", 0), ("context", 1), ("seed", -1)])
def test_settings_that_mean_nothing_are_refused(name, value):
    with pytest.raises(InputError, match=name):
        CollectConfig(**{name: value})


# files


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plt")
    dictionaries = make("plt")
    save_dictionaries(dictionaries, folder)
    collect(model, dictionaries, ROWS, SETTINGS, out=folder / "cards")
    return folder


def test_cards_are_found_beside_their_dictionary_without_torch(saved):
    code = (
        "import sys; from circuitsae.features import FeatureCards, Ledger; "
        f"cards = FeatureCards.load({str(saved)!r}, ledger=Ledger()); "
        "print(len(cards), (1, 19) in cards, (2, 0) in cards, cards.card(0, 99), 'torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["40", "True", "False", "None", "False"]


def test_cards_of_other_weights_are_refused(saved, tmp_path):
    cards = FeatureCards.load(saved)
    cards.check_fits(load_dictionaries(saved, dtype=torch.float64))
    with pytest.raises(DictionaryError, match="collect them again"):
        cards.check_fits(make("clt"))
    save_dictionaries(make("clt"), tmp_path)
    for name in (MANIFEST, ARRAYS):
        (tmp_path / "cards").mkdir(exist_ok=True)
        (tmp_path / "cards" / name).write_bytes((saved / "cards" / name).read_bytes())
    with pytest.raises(DictionaryError, match="collect them again"):
        FeatureCards.load(tmp_path)


def test_a_fingerprint_is_remembered_until_a_weight_changes(monkeypatch, tmp_path):
    calls = []
    compute = fingerprint._fingerprint
    monkeypatch.setattr(fingerprint, "_fingerprint", lambda dictionaries: calls.append(1) or compute(dictionaries))
    dictionaries = make("plt")
    first = dictionary_fingerprint(dictionaries)
    assert dictionary_fingerprint(dictionaries) == first
    assert len(calls) == 1
    with torch.no_grad():
        dictionaries[0].W_enc[0, 0] += 1
    assert dictionary_fingerprint(dictionaries) != first
    assert len(calls) == 2
    save_dictionaries(dictionaries, tmp_path)
    mapped = load_dictionaries(tmp_path, decoders="mapped")
    assert dictionary_fingerprint(mapped) == dictionary_fingerprint(mapped) == dictionary_fingerprint(dictionaries)
    assert len(calls) == 3


def test_a_skip_term_is_part_of_the_fingerprint():
    dictionaries = random_dictionaries("plt", skip=True)
    first, skip = dictionary_fingerprint(dictionaries), dictionaries[0].W_skip
    assert skip is not None
    with torch.no_grad():
        skip[0, 0] += 1
    assert dictionary_fingerprint(dictionaries) != first


def damaged(name):
    def cut(manifest, arrays):
        return manifest[: len(manifest) // 2], arrays

    def other(manifest, arrays):
        return json.dumps({"format": "circuitsae-cards/9"}).encode(), arrays

    def mixed_up(manifest, arrays):
        return manifest, arrays[:-100]

    def listed(manifest, arrays):
        return b"[" * 100_000, arrays

    return {"cut": cut, "other": other, "mixed_up": mixed_up, "listed": listed}[name]


@pytest.mark.parametrize("how", ["cut", "other", "mixed_up", "listed"])
def test_damaged_files_are_refused_in_one_sentence(saved, tmp_path, how):
    files = damaged(how)(*((saved / "cards" / name).read_bytes() for name in (MANIFEST, ARRAYS)))
    for name, content in zip((MANIFEST, ARRAYS), files, strict=True):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(FileFormatError, match="collect"):
        FeatureCards.load(tmp_path)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("example_tokens", lambda a: a.astype(np.int64) + 1000),
        ("neighbour_index", lambda a: a.astype(np.int64) + 40),
        ("count", lambda a: a[:-1]),
        ("example_share", lambda a: a * np.nan),
        ("example_start", lambda a: a[::-1]),
        ("example_start", lambda a: a[:0]),
        ("example_start", lambda a: a.astype(float)),
        ("histogram", lambda a: a * 0),
        ("histogram", lambda a: a[:, 0]),
        ("histogram", lambda a: a[:, :0]),
        ("histogram", lambda a: np.pad(a, [(0, 0), (0, 32)])),
        ("histogram", lambda a: a.astype(float)),
        ("count", lambda a: a * 0),
        ("max", lambda a: a * 0),
        ("max", lambda a: -a),
        ("max", lambda a: a.astype(float) * 1e300),
        ("max", lambda a: a[:, None]),
        ("top_value", lambda a: a[:, :-1]),
        ("top_value", lambda a: a[:, 0]),
        ("top_token", lambda a: a.astype(float)),
        ("nearest_score", lambda a: a[:, 1:]),
        ("example_share", lambda a: a[:, 1:]),
        ("example_tokens", lambda a: a * 0),
        ("example_stratum", lambda a: a + 4),
        ("mean", lambda a: None),
    ],
)
def test_arrays_that_disagree_are_refused(saved, tmp_path, name, change):
    cards = FeatureCards.load(saved)
    arrays = dict(cards.arrays) | {name: change(cards.arrays[name])}
    rewrite(tmp_path, cards.manifest, {name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(FileFormatError, match="damaged"):
        FeatureCards.load(tmp_path)


def test_a_dead_feature_has_no_examples(saved, tmp_path):
    """Counts, maxima and histograms agree, but examples are left of a feature that never fired."""
    cards = FeatureCards.load(saved)
    arrays = {name: array.copy() for name, array in cards.arrays.items()}
    alive = int(np.flatnonzero(np.diff(arrays["example_start"].astype(int)))[0])
    for name in ("count", "max", "histogram"):
        arrays[name][alive] = 0
    rewrite(tmp_path, cards.manifest, arrays)
    with pytest.raises(FileFormatError, match="never fires has examples"):
        FeatureCards.load(tmp_path)


def rewrite(folder, manifest, arrays):
    digest = write_arrays(folder / ARRAYS, arrays, compressed=True)
    (folder / MANIFEST).write_text(json.dumps({**manifest, "arrays": digest}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"settings": {"before": 2, "strata": 0}}, "settings.strata is 0; expected one of 1, 2, 4"),
        ({"settings": {"before": 4, "strata": 4}}, "lacks the token that it is an example of"),
        ({"settings": [2, 4]}, "settings is a list"),
        ({"widths": [40.0]}, "one of widths is 40.0"),
        ({"widths": []}, "no layers"),
        ({"widths": [20, 21]}, r"expected \(42,\)"),
        ({"tokens_seen": True}, "tokens_seen is True"),
        ({"tokens_seen": 1}, "count is not from 0 to the 1 tokens"),
        ({"vocabulary": [1]}, "a word of the vocabulary is 1"),
        ({"dead": 5}, "dead is 5; expected a list"),
    ],
)
def test_manifests_that_disagree_are_refused(saved, tmp_path, change, said):
    cards = FeatureCards.load(saved)
    rewrite(tmp_path, {**cards.manifest, **change}, cards.arrays)
    with pytest.raises(FileFormatError, match=said):
        FeatureCards.load(tmp_path)


def test_halves_of_characters_become_printable(saved, tmp_path):
    cards = FeatureCards.load(saved)
    vocabulary = ["\ud800"] * len(cards.manifest["vocabulary"])
    rewrite(tmp_path, {**cards.manifest, "vocabulary": vocabulary, "corpus": "\udfff"}, cards.arrays)
    loaded = FeatureCards.load(tmp_path)
    assert set("".join(loaded.manifest["vocabulary"])) == {"\ufffd"}
    assert write_browser(loaded, tmp_path / "pages").is_file()


def test_tokens_of_any_length_make_pages_of_ordinary_size(saved, tmp_path):
    def size_with(length: int) -> int:
        folder = tmp_path / str(length)
        folder.mkdir()
        vocabulary = [f"{number:05}" + "x" * (length - 5) for number, _ in enumerate(cards.manifest["vocabulary"])]
        rewrite(folder, {**cards.manifest, "vocabulary": vocabulary}, cards.arrays)
        write_browser(FeatureCards.load(folder), folder / "pages")
        return sum(page.stat().st_size for page in (folder / "pages").rglob("*.html"))

    cards = FeatureCards.load(saved)
    assert size_with(10_000) < 1.2 * size_with(200)


def npz_that_claims(shape, dtype="<f4", compression=zipfile.ZIP_STORED):
    """An archive of 250 bytes with one array, whose header says what it likes."""
    header, buffer = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": dtype, "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("count.npy", header.getvalue())
    return buffer.getvalue()


def npz_with(header):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("count.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (npz_that_claims((10**13,)), "do not fit"),
        (npz_that_claims((-1, -1)), "do not fit"),
        (npz_that_claims((1,), "|O"), "holds 'object'; expected numbers"),
        (npz_that_claims((0,), compression=zipfile.ZIP_LZMA), "packed in a way"),
        (npz_with(b"((((\n"), "cannot be read"),
        (npz_with(b"{'a': 1}\n"), "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_arrays_are_judged_by_their_headers(tmp_path, content, said):
    path = tmp_path / ARRAYS
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(FileFormatError, match=said) as caught:
        read_arrays(path)
    assert tracemalloc.get_traced_memory()[1] < 4_000_000
    tracemalloc.stop()
    assert "\n" not in str(caught.value)


def test_spoilt_bytes_are_said_in_one_sentence(saved, tmp_path):
    whole, generator, path = (saved / "cards" / ARRAYS).read_bytes(), random.Random(0), tmp_path / ARRAYS
    outcomes = set()
    for _ in range(60):
        spoilt = bytearray(whole)
        spoilt[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        path.write_bytes(spoilt)
        try:
            outcomes.add(len(read_arrays(path)))
        except FileFormatError as error:
            outcomes.add(f"refused in {len(str(error).splitlines())} line")
    assert "refused in 1 line" in outcomes
    assert outcomes <= {"refused in 1 line", 22}


def test_a_manifest_beyond_all_measure_is_not_read(tmp_path):
    with (tmp_path / MANIFEST).open("wb") as file:
        file.truncate(2**26 + 1)
    with pytest.raises(FileFormatError, match="67,108,865 file bytes, more than"):
        FeatureCards.load(tmp_path)


def test_a_folder_that_cannot_be_has_no_cards():
    assert not FeatureCards.beside("x" * 5000)
    with pytest.raises(FileFormatError, match="There are no feature cards"):
        FeatureCards.load("x" * 5000)


# beside the dictionaries of a graph


def graph_from(source, **provenance):
    graph = small_graph()
    return replace(graph, provenance={**graph.provenance, "source": source, **provenance})


@pytest.mark.parametrize(
    "source",
    [None, "x", 5, [], {}, {"dictionaries": 5}, {"dictionaries": ["pocket"]}, {"dictionaries": {}, "model": 7},
     {"dictionaries": "x" * 5000}, {"dictionaries": "nul\0"}, {"dictionaries": ""}, {"dictionaries": "/dev/null"}],
)  # fmt: skip
def test_whatever_a_graph_names_its_page_is_written(source, tmp_path):
    graph = graph_from(source)
    assert all(value is None or isinstance(value, str) for value in source_of(graph))
    assert beside_dictionaries(graph) == (None, None)
    assert write_page(graph, tmp_path / "graph.html").is_file()


def test_a_graph_that_names_nonsense_is_not_validated_with_it(tmp_path, capsys):
    folder = graph_from("x", dtype="load", model=["gpt2"]).save(tmp_path / "graph")
    with pytest.raises(SystemExit) as stopped:
        main(["validate", str(folder)])
    assert stopped.value.code == 2
    assert "names the precision 'load'" in " ".join(capsys.readouterr().err.split())


def test_a_page_goes_without_what_cannot_be_read(saved, tmp_path, caplog):
    folder = tmp_path / "plt"
    shutil.copytree(saved, folder)
    (folder / "ledger.json").write_text("[" * 100_000)
    cards, ledger = beside_dictionaries(graph_from({"dictionaries": str(folder)}))
    assert cards is not None
    assert ledger is None
    assert "is no ledger" in caplog.text
    (folder / "cards" / ARRAYS).write_bytes(b"")
    assert beside_dictionaries(graph_from({"dictionaries": str(folder)})) == (None, None)
    assert "were not written together" in caplog.text


def test_cards_of_weights_that_the_graph_was_not_traced_with_are_left_out(saved, caplog):
    source, made_with = {"dictionaries": str(saved)}, FeatureCards.load(saved).manifest["dictionary"]
    for known in ({}, {"dictionary_fingerprint": None}, {"dictionary_fingerprint": made_with}):
        assert beside_dictionaries(graph_from(source, **known))[0] is not None
    assert not caplog.records
    assert beside_dictionaries(graph_from(source, dictionary_fingerprint="of before")) == (None, None)
    assert f"traced with dictionaries of before, but {saved} now holds those of {made_with}" in caplog.text


def test_a_traced_graph_names_the_weights_of_the_shipped_cards():
    replacement = circuitsae.ReplacementModel(circuitsae.load_model(), circuitsae.load_dictionaries())
    graph = attribute(replacement, "John gave", max_features=3)
    graph = replace(graph, provenance={**graph.provenance, "source": {"model": "pocket", "dictionaries": None}})
    cards, _ = beside_dictionaries(graph)
    assert cards is not None
    assert graph.provenance["dictionary_fingerprint"] == cards.manifest["dictionary"]


def test_the_label_of_a_position_is_on_the_card_and_names_a_group(saved, tmp_path):
    folder = tmp_path / "plt"
    shutil.copytree(saved, folder)
    node = next(node for node in small_graph().nodes if node.kind == "feature")
    name = f"{node.layer}.{node.index}"
    Ledger([Label("months", (f"{name}@5",))]).save(folder)
    cards, ledger = beside_dictionaries(graph_from({"dictionaries": str(folder)}))
    assert cards is not None
    assert ledger is not None
    card = cards.card(node.layer, node.index)
    assert card is not None
    assert card.label == label_json(name, ledger)
    assert card.label is not None
    assert card.label["display"] == "hypothesis: months"
    again = replace(node, pos=node.pos + 1)
    nodes = [*small_graph().nodes[:4], replace(small_graph().nodes[4], pos=2), again]
    weights = np.zeros((6, 6))
    weights[[0, 5], 2] = weights[4, [0, 5]] = 1.0
    graph = AttributionGraph.build(nodes, sparse.csr_array(weights), ("<s>", " a", " b"), (1, 3, 4), 1, {})
    groups = suggest_supernodes(graph, cards=cards, roles={node.pos: "same", again.pos: "same"})
    assert [group.name for group in groups] == ["hypothesis: months"]


def test_a_folder_without_cards_says_how_to_make_them(tmp_path):
    with pytest.raises(FileFormatError, match="circuitsae features collect"):
        FeatureCards.load(tmp_path)
    assert not FeatureCards.beside(tmp_path)


def test_cards_of_a_graphs_features_with_labels_and_hostile_tokens(saved, tmp_path):
    hostile = ["</script><b>", "<img src=x onerror=alert(1)>", "", "\u202eevil", "👩‍🔬", "'\"&"]
    cards = FeatureCards.load(saved)
    vocabulary = [hostile[i % len(hostile)] for i in range(len(cards.manifest["vocabulary"]))]
    FeatureCards({**cards.manifest, "vocabulary": vocabulary}, cards.arrays, {}).save(tmp_path)
    frame = cards.frame()
    alive = int(frame[(frame.layer == 0) & ~frame.dead].feature.iloc[0])
    name, other = f"0.{alive}", (0, alive + 1)
    ledger = Ledger([Label("months", (name, f"0.{alive + 1}")), Label("<b>May</b>", (name,))])
    loaded = FeatureCards.load(tmp_path, ledger=ledger)
    nodes = pd.DataFrame({"kind": ["token", "feature", "feature", "feature"], "layer": [0, 0, 0, 1],
                          "pos": [0, 1, 2, 1], "index": [3, alive, alive, 500]})  # fmt: skip
    found = loaded.for_nodes(nodes)
    assert list(found) == [name]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert set(found[name]["examples"][0]["tokens"]) <= set(hostile)
    assert found[name]["label"]["display"] == "hypothesis: <b>May</b>; hypothesis: months"
    assert found[name]["label"]["status"] == "hypothesis"
    assert loaded.frame().set_index(["layer", "feature"]).label[other] == "hypothesis: months"


# the pocket's own


@pytest.mark.parametrize("name", ["pocket", "pocket-plt", "pocket-sae"])
def test_the_pocket_dictionaries_come_with_their_cards(name):
    cards = load_cards(name)
    cards.check_fits(circuitsae.load_dictionaries(name))
    assert cards.tokens_seen >= 1_000_000
    assert cards.manifest["dead"] == cards.frame().groupby("layer").dead.sum().tolist()
    assert sum(file.stat().st_size for file in (dictionary_folder(name) / "cards").iterdir()) < 2e6
    for layer in range(4):
        card = cards.card(layer, 17)
        assert card is not None
        first = card.examples[0]
        assert first["activations"][first["peak"]] == pytest.approx(card.max_activation, rel=1e-3)


def test_the_shipped_activations_are_those_of_the_model():
    """The strongest example of a feature of layer 0, run again on its own: its context is its past."""
    cards, replacement = (
        load_cards(),
        circuitsae.ReplacementModel(circuitsae.load_model(), circuitsae.load_dictionaries()),
    )
    feature = int(np.argsort(cards.arrays["count"][: cards.widths[0]], kind="stable")[500])
    card = cards.card(0, feature)
    assert card is not None
    before = "".join(card.examples[0]["tokens"][: card.examples[0]["peak"] + 1])
    trace = replacement.trace("\n" + before)
    active = trace.features.of_layer(0)
    here = (active.index[:, 1] == len(trace.tokens) - 1) & (active.index[:, 2] == feature)
    assert here.any(), card


def test_the_recipe_collects_cards(tmp_path):
    quick = random_dictionaries("clt", n_layers=4, d_model=128, features=24)
    target = tmp_path / "dictionaries" / "clt"
    save_dictionaries(quick, target)
    results = pocket_cards.collect_all(MODEL_DIR, target.parent, tmp_path / "work", quick=True, progress=False)
    assert FeatureCards.load(target).tokens_seen == results[0].cards.tokens_seen == 300
    page = tmp_path / "pocket.md"
    page.write_text("# Pocket\n")
    for _ in range(2):
        pocket_cards.write_section(page, results)
    assert page.read_text().count(pocket_cards.HEADING) == 1
    assert page.read_text().startswith("# Pocket\n")
    assert not (tmp_path / "work" / "cards" / "clt" / STATE).exists()


def test_collect_and_browse_from_the_command_line(tmp_path):
    dictionaries, texts = tmp_path / "clt", tmp_path / "texts.txt"
    save_dictionaries(random_dictionaries("clt", n_layers=4, d_model=128, features=24), dictionaries)
    texts.write_text("\n\n".join(f"Mary gave a drink to {name}. They went home." for name in ["John", "Tom"] * 60))
    arguments = ["pocket", "--dictionaries", str(dictionaries), "--corpus", str(texts), "--tokens", "0.3k"]
    main(["features", "collect", *arguments, "--top", "3"])
    assert FeatureCards.load(dictionaries).manifest["corpus"] == "texts.txt"
    Ledger([Label("names", ("1.2",))]).save(dictionaries)
    main(["features", "browse", str(dictionaries), "--out", str(tmp_path / "pages")])
    assert "hypothesis: names" in (tmp_path / "pages" / "index.html").read_text()
    assert len(list((tmp_path / "pages" / "cards").iterdir())) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["collect", "{model}", "--dictionaries", "pocket"], "No corpus was named"),
        (["collect", "pocket", "--dictionaries", "someone/some-clt"], "give --out FOLDER"),
        (["collect", "pocket", "--tokens", "0", "--out", "{out}"], "tokens = 0 is too small"),
        (["browse", "{out}", "--out", "{out}"], "There are no feature cards"),
    ],
)
def test_wrong_use_is_said_in_one_sentence(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["features", *(a.replace("{out}", str(tmp_path)).replace("{model}", "elsewhere") for a in arguments)])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
