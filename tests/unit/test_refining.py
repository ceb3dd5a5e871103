"""Refined dictionaries: the regression against dense least squares, what is never worse, and what is refused."""

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from circuitsae.cli import main
from transcoders import (
    Corpus,
    JumpReLU,
    TranscoderConfig,
    TranscoderSet,
    load_dictionaries,
    random_dictionaries,
    random_model,
    refine,
    save_dictionaries,
    train,
)
from transcoders.data import ActivationBatch, sites_of
from transcoders.dictionaries.token_norm import TokenNorm
from transcoders.errors import DictionaryError, InputError
from transcoders.refining import (
    AffineMap,
    ErrorMoments,
    Moments,
    RefineConfig,
    RidgeRegression,
    corrected,
    corrections,
)
from transcoders.refining.mirroring import firing, mirrored
from transcoders.refining.reading import Reading
from transcoders.refining.refinement import refinement

LAYERS, D, FEATURES = 3, 12, 24


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sample(n=200, d_in=6, d_out=5):
    """Vectors with large means, and a linear relation with noise."""
    x = draw(n, d_in) * torch.linspace(0.1, 3, d_in) + 50
    return x, x @ draw(d_in, d_out, seed=1) + draw(n, d_out, seed=2) + 7


def moments_of(x, e, at_once=37):
    found = Moments(x.shape[1], e.shape[1])
    for some in torch.arange(len(x)).split(at_once):
        found.add(x[some], e[some])
    return found


# the regression


def test_the_ridge_regression_is_the_solution_of_the_dense_problem():
    x, e = sample()
    for ridge in (0.0, 0.01, 3.0):
        fit = RidgeRegression(moments_of(x, e)).fit(ridge)
        centred = x - x.mean(0)
        weight = ridge * centred.square().sum() / x.shape[1]
        stacked = torch.cat([centred, weight.sqrt() * torch.eye(x.shape[1], dtype=torch.float64)])
        target = torch.cat([e - e.mean(0), torch.zeros(x.shape[1], e.shape[1], dtype=torch.float64)])
        W = torch.linalg.lstsq(stacked, target).solution
        torch.testing.assert_close(fit.W, W, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(fit.b, e.mean(0) - x.mean(0) @ W, rtol=1e-7, atol=1e-7)


def test_the_squared_error_is_told_from_the_sums_for_any_map():
    x, e = sample()
    found = moments_of(x, e)
    for fit in (AffineMap(draw(6, 5, seed=3), draw(5, seed=4)), RidgeRegression(found).fit(0.1, rank=2)):
        expected = (e - x @ fit.W - fit.b).square().sum()
        assert found.squared_error(fit) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_of_all_maps_of_a_rank_it_is_the_best(ridge):
    """Against alternating least squares from many starts, which sees the objective alone."""
    x, e = sample(60)
    found, rank = moments_of(x, e), 2
    fit = RidgeRegression(found).fit(ridge, rank)
    assert int(torch.linalg.matrix_rank(fit.W)) == rank
    X, E = x - x.mean(0), e - e.mean(0)
    weight = ridge * X.square().sum() / X.shape[1]

    def objective(W):
        return float((E - X @ W).square().sum() + weight * W.square().sum())

    S, C = X.T @ X + weight * torch.eye(6, dtype=torch.float64), X.T @ E
    best = float("inf")
    for seed in range(6):
        U, V = draw(6, rank), draw(rank, 5, seed=seed)
        for _ in range(300):
            U = torch.linalg.solve(S, C @ V.T) @ torch.linalg.inv(V @ V.T)
            V = torch.linalg.solve(U.T @ S @ U, U.T @ C)
        best = min(best, objective(U @ V))
    assert objective(fit.W) == pytest.approx(best, rel=1e-6)
    assert objective(fit.W) <= best * (1 + 1e-12)
    nothing = RidgeRegression(found).fit(ridge, rank=0)
    assert not nothing.W.any()
    torch.testing.assert_close(nothing.b, e.mean(0))


def test_inputs_that_never_vary_get_no_weight_and_no_nan():
    x, e = sample()
    x[:, 3] = 2.0
    fit = RidgeRegression(moments_of(x, e)).fit(0.0)
    assert bool(fit.W.isfinite().all())
    assert float(fit.W[3].abs().max()) < 1e-6


# of dictionaries


@pytest.fixture(scope="module")
def model():
    return random_model("llama", n_layers=LAYERS, d_model=D, n_heads=2, d_vocab=40, context=16, seed=1).to("float64")


@pytest.fixture(scope="module")
def text():
    return torch.randint(0, 40, (300, 12), generator=torch.Generator().manual_seed(0))


def made(kind: Any = "plt", activation: Any = "topk", **options: Any) -> Any:
    settings: Any = {"n_layers": LAYERS, "d_model": D, "features": FEATURES, "k": 3, "dtype": "float64", **options}
    return random_dictionaries(kind, activation=activation, **settings).requires_grad_(False)


SETTINGS: Any = {"tokens": 2000, "held_out_tokens": 300, "agreement_tokens": 0, "finetune_tokens": 0}


@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
@pytest.mark.parametrize(("kind", "activation"), [("plt", "jumprelu"), ("clt", "topk")])
def test_what_is_added_is_the_regression_of_the_error_on_the_read(model, text, kind, activation, skip):
    given = made(kind, activation, skip=skip)
    before = copy.deepcopy(given.state_dict())
    found: Any = refine(model, given, text, ridge=0.0, **SETTINGS)
    for name, weight in before.items():
        assert torch.equal(given.state_dict()[name], weight), name
    held_out = torch.arange(300) % 10 == 1
    reads, writes = sites_of(model, text[~held_out], given.reads, given.writes)
    x, y = (side[:2000].transpose(0, 1) for side in (reads, writes))
    error = y - given.reconstruct(given.encode(x), x)
    for layer in range(LAYERS):
        ones = torch.nn.functional.pad(x[layer], (0, 1), value=1.0)
        expected = torch.linalg.lstsq(ones, error[layer]).solution
        old = given.skip(layer)
        added = found.skip(layer) - (0 if old is None else old)
        torch.testing.assert_close(added, expected[:-1], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found.decoder_bias(layer) - given.decoder_bias(layer), expected[-1])
    features = found.encode(x)
    assert torch.equal(features.index, given.encode(x).index)
    assert torch.equal(features.value, given.encode(x).value)
    assert found.provenance.config["refined"]["tokens"] == 2000


def test_of_the_ridges_the_one_of_least_held_out_error_is_taken(model, text):
    given = made()
    config = RefineConfig(**SETTINGS | {"tokens": 60})  # few, so that it matters
    reading = Reading.of(model, given, text, config)
    fit, held_out = ErrorMoments(given), ErrorMoments(given)
    for sums, batches in ((fit, reading.batches(60)), (held_out, reading.held_out_batches({}))):
        for batch in batches:
            sums.add(batch)
    best = corrections(fit, held_out)
    for ridge in (1e-6, 1e-3, 1e-1):
        for layer, one in corrections(fit, held_out, ridge=ridge).items():
            assert best[layer].error <= one.error
    assert {each.ridge for each in best.values()} != {1e-6}
    whole = refinement(model, given, text, config)
    assert [layer.ridge for layer in whole.layers] == [each.ridge for each in best.values()]
    assert [layer.after.fvu for layer in whole.layers] == pytest.approx(
        [layer.before.fvu * best[layer.layer].error for layer in whole.layers]
    )


# features turned round


def often_on(kind, activation="relu", **options):
    """Dictionaries some of whose features are nearly always on, others nearly never."""
    given = made(kind, activation, skip=True, **options)
    for layer in range(LAYERS):
        own = given if kind == "clt" else given[layer]
        bias = own.b_enc[layer] if kind == "clt" else own.b_enc
        bias[:4] += 3.0
        bias[4:8] -= 3.0
    return given


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_a_layer_with_features_turned_round_is_the_same_function(activation):
    given, x = often_on("plt", activation), draw(LAYERS, 400, D)
    for layer in range(LAYERS):
        if activation == "jumprelu":
            given[layer].activation.threshold[:] = 0.0
            given[layer].activation.threshold[1] = 0.2  # would not be the same, and stays
    found = firing(given, [ActivationBatch(x.transpose(0, 1), x.transpose(0, 1))])
    torch.testing.assert_close(found[0].rate.double(), (given[0].encode(x[0]) > 0).double().mean(0))
    turned: Any
    turned, counts = mirrored(given, found, 0.7)
    assert counts[0] >= (3 if activation == "jumprelu" else 4)
    torch.testing.assert_close(turned.reconstruct(turned.encode(x), x), given.reconstruct(given.encode(x), x))
    after = firing(turned, [ActivationBatch(x.transpose(0, 1), x.transpose(0, 1))])[0].rate
    changed = (turned[0].b_enc != given[0].b_enc).nonzero()[:, 0]
    assert len(changed) == counts[0]
    torch.testing.assert_close(after[changed], 1 - found[0].rate[changed])
    assert float(after[changed].max()) < 0.3
    if activation == "jumprelu":
        assert 1 not in changed


def test_of_a_cross_layer_transcoder_the_layer_itself_is_the_same_and_later_ones_in_the_mean():
    given, x = often_on("clt"), draw(LAYERS, 500, D)
    batch = ActivationBatch(x.transpose(0, 1), x.transpose(0, 1))
    turned, counts = mirrored(given, {0: firing(given, [batch])[0]}, 0.7)
    assert counts == {0: counts[0]}
    assert counts[0] >= 4
    before, after = (d.reconstruct(d.encode(x), x) for d in (given, turned))
    torch.testing.assert_close(after[0], before[0])
    torch.testing.assert_close(after.mean(1), before.mean(1))
    assert not torch.allclose(after[1], before[1])


@pytest.mark.parametrize("kind", ["plt", "clt"])
def test_refining_turns_round_what_is_nearly_always_on_and_never_worsens(model, text, kind):
    given = often_on(kind)
    found = refinement(model, given, text, RefineConfig(**SETTINGS, mirror=0.8))
    assert sum(layer.mirrored for layer in found.layers) >= 4
    assert all(layer.what == "skip" for layer in found.layers)
    for layer in found.layers:
        assert layer.after.fvu <= layer.before.fvu
    reads, _ = sites_of(model, text, given.reads, given.writes)
    own: Any = found.dictionaries
    assert float(firing(own, [ActivationBatch(reads, reads)])[0].rate.max()) < 0.9
    assert found.to_json()["layers"][0]["mirrored"] == found.layers[0].mirrored


def test_features_that_are_ranked_are_not_turned_round(model, text):
    with pytest.raises(DictionaryError, match="'topk' compete, so that none can be turned round"):
        refine(model, made(), text, mirror=0.5, **SETTINGS)
    with pytest.raises(InputError, match="mirror is a share of the tokens, above 0 and below 1; got 2"):
        RefineConfig(mirror=2.0)
    with pytest.raises(InputError, match="leave out rank"):
        RefineConfig(mirror=0.5, rank=4)


def perfect(model, rows, kind="plt"):
    """Dictionaries whose first layer writes what its MLP does, as a line, and nothing can be added there."""
    given = made(kind, "relu", skip=True)
    reading = Reading.of(model, given, rows, RefineConfig(**SETTINGS))
    sums = ErrorMoments(given)
    for batch in reading.held_out_batches({}):
        sums.add(batch)
    return corrected(given, {0: RidgeRegression(sums.of_layer[0]).fit(0.0)})


@pytest.mark.parametrize("kind", ["plt", "clt"])
def test_a_layer_that_would_be_worse_keeps_what_it_had(model, text, kind, caplog):
    given = perfect(model, text, kind)
    found = refinement(model, given, text, RefineConfig(**SETTINGS))
    assert [layer.what for layer in found.layers] == ["kept", "skip", "skip"]
    assert "keep what they had (skip): 0." in caplog.text
    skips = given.skip(0), found.dictionaries.skip(0)
    assert torch.equal(*skips)  # pyright: ignore[reportArgumentType]
    assert torch.equal(given.decoder_bias(0), found.dictionaries.decoder_bias(0))
    assert found.layers[0].before == found.layers[0].after
    assert all(layer.after.fvu < layer.before.fvu for layer in found.layers[1:])


def test_absent_layers_stay_absent_and_first_positions_and_massive_tokens_are_left_out(model, text):
    given = made().only([0, 2])
    reads = sites_of(model, text, given.reads, given.writes).reads
    limit = float(reads[:, 2].norm(dim=-1).quantile(0.9))
    provenance = replace(given.provenance, first=3, limits={"2.mlp_in": limit})
    given.provenance = provenance
    reading = Reading.of(model, given, text, RefineConfig(**SETTINGS))
    for batches in (reading.batches(2000), reading.held_out_batches(reading.limits)):
        seen = torch.cat([batch.reads for batch in batches])
        assert float(seen[:, 2].norm(dim=-1).max()) <= limit
    late = sites_of(model, reading.held_out, given.reads, given.writes, first=3, limits=reading.limits).reads
    assert torch.equal(seen, late)
    assert len(late) < 25 * 9
    found = refinement(model, given, text, RefineConfig(**SETTINGS))
    assert [layer.layer for layer in found.layers] == [0, 2]
    assert found.dictionaries.n_layers == LAYERS
    assert found.dictionaries.n_features(1) == 0
    assert found.dictionaries.skip(1) is None
    assert not found.dictionaries.decoder_bias(1).any()


def test_without_limits_massive_tokens_are_left_out_of_the_fit_and_count_in_what_is_measured(model, text):
    given = made()
    median = sites_of(model, text, given.reads, given.writes).reads[:, 1].norm(dim=-1).median()
    everything = Reading.of(model, given, text, RefineConfig(**SETTINGS, outliers=0.0))
    some = Reading.of(model, given, text, RefineConfig(**SETTINGS, outliers=1.3))
    assert everything.limits == {}
    assert some.limits[given.reads[1]] == pytest.approx(1.3 * float(median), rel=0.05)
    fitted = sum(len(batch.reads) for batch in some.held_out_batches(some.limits))
    assert 0 < fitted < sum(len(batch.reads) for batch in everything.held_out_batches({}))
    found = refinement(model, given, text, RefineConfig(**SETTINGS, outliers=1.3))
    assert found.held_out_tokens == 25 * 11  # of rows of 12, whole ones, the first position of each left out
    assert found.dictionaries.provenance.limits == {}


# fine-tuning


@pytest.fixture(scope="module")
def single():
    return random_model("llama", n_layers=LAYERS, d_model=D, n_heads=2, d_vocab=40, context=16, seed=1)


@pytest.fixture(scope="module")
def trained(single, text):
    config = TranscoderConfig(features=FEATURES, activation="topk", k=3, tokens=5000, batch=100, context=12, lr=1e-2)
    return train(single, text, config, progress=False)


TUNING: Any = {**SETTINGS, "finetune_tokens": 2500, "batch": 50, "lr": 4e-3, "derivative": 1.0}


def test_fine_tuning_brings_the_derivative_nearer_within_the_rank(single, text, trained):
    settings, rank = RefineConfig(**TUNING | {"agreement_tokens": 60, "finetune_tokens": 1500}, rank=2), 2
    closed = refinement(single, trained, text, replace(settings, finetune_tokens=0))
    tuned = refinement(single, trained, text, settings)
    assert closed.mean("before", "cosine") == tuned.mean("before", "cosine")
    assert closed.mean("after", "cosine") < tuned.mean("after", "cosine")
    assert tuned.mean("after", "fvu") < tuned.mean("before", "fvu")
    assert {layer.what for layer in tuned.layers} == {"fine-tuned"}
    assert tuned.mean("after", "l0") == pytest.approx(3, abs=0.05)
    for layer in range(LAYERS):
        skip = tuned.dictionaries.skip(layer)
        assert skip is not None
        assert int(torch.linalg.matrix_rank(skip, rtol=1e-5)) == rank


@pytest.mark.parametrize("kind", ["plt", "clt"])
def test_features_that_no_k_holds_stay_as_they_are(single, text, kind):
    given: Any = made(kind, "jumprelu", dtype="float32")
    if kind == "plt":  # layers of different sizes, and an absent one
        own = [given[0], made("plt", "relu", features=10, dtype="float32")[1], given[2]]
        given = TranscoderSet(own, given.provenance).only([0, 1])
    found: Any = refine(single, given, text, **TUNING | {"finetune_tokens": 150, "lr": 1e-4})
    layers: Any = zip(given.layers, found.layers, strict=True) if kind == "plt" else [(given, found)]
    for before, after in layers:
        assert torch.equal(before.W_enc, after.W_enc)
        assert torch.equal(before.b_enc, after.b_enc)
        if isinstance(before.activation, JumpReLU):
            assert torch.equal(before.activation.threshold, after.activation.threshold)
    assert found.provenance.config["refined"]["layers"]["0"] == "fine-tuned"
    decoders = (given[0].W_dec, found[0].W_dec) if kind == "plt" else (given.W_dec[0], found.W_dec[0])
    assert not torch.equal(*decoders)
    assert found.n_features(2) == given.n_features(2)


# what is refused, and the command


def test_what_cannot_be_refined_is_refused(single, text, tmp_path):
    normed = made(dtype="float32")
    normed[1].norm = TokenNorm("layer_norm")
    save_dictionaries(made(dtype="float32"), tmp_path)
    mapped = load_dictionaries(tmp_path, decoders="mapped")
    coarse = random_model(n_layers=LAYERS, d_model=D, n_heads=2, d_vocab=40, context=16).to("bfloat16")
    cases: Any = (
        (single, made("sae", dtype="float32"), {}, DictionaryError, "SAEs replace no MLP"),
        (single, normed, {}, DictionaryError, "norm each token"),
        (single, mapped, {}, DictionaryError, "load the dictionaries with decoders='memory'"),
        (single, made(d_model=16), {}, DictionaryError, "of width 16"),
        (single, made("plt", "groupmax", dtype="float32"), {"finetune_tokens": 100}, DictionaryError, "'groupmax'"),
        (coarse, made(dtype="float32"), {"finetune_tokens": 100}, InputError, "bfloat16 is too coarse"),
        (single, made(dtype="float32"), {"rank": -1}, InputError, "rank must be at least 0; got -1"),
        (single, made(dtype="float32"), {"lr": 0.0}, InputError, "lr must be positive"),
    )
    for model, given, settings, error, says in cases:
        with pytest.raises(error, match=says):
            refine(model, given, text, **SETTINGS | settings)
    with pytest.raises(InputError, match="nothing to hold out"):
        refine(single, made(dtype="float32"), text[:1], **SETTINGS)


def test_dictionaries_in_half_precision_are_computed_in_float32_on_any_model(text):
    coarse = random_model(n_layers=LAYERS, d_model=D, n_heads=2, d_vocab=40, context=16).to("bfloat16")
    found: Any = refine(coarse, made(dtype="bfloat16"), text, **SETTINGS)
    assert found.decoder_bias(0).dtype == found.skip(0).dtype == torch.float32


DOCUMENTS = Corpus("text", lambda: iter([f"The capital of state {i} is Austin and Mary left. " * 4 for i in range(80)]))


def test_the_command_writes_the_dictionaries_and_what_became_of_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    (tmp_path / "text.txt").write_text("\n\n".join(DOCUMENTS.documents()))
    words = ["refine", "pocket-plt", "--corpus", str(tmp_path / "text.txt"), "--tokens", "400", "--rank", "4",
             "--held-out-tokens", "200", "--agreement-tokens", "20", "--context", "20"]  # fmt: skip
    out = tmp_path / "refined"
    main([*words, "--out", str(out), "--storage-dtype", "bfloat16"])
    printed = capsys.readouterr().out
    assert "before → after" in printed
    record = json.loads((out / "refine.json").read_text())
    assert (record["dictionaries"], record["model"], record["config"]["rank"]) == ("pocket-plt", "pocket", 4)
    first = record["layers"][0]
    assert f"| 0 | {first['before']['fvu']:.3f} → {first['after']['fvu']:.3f} |" in (out / "README.md").read_text()
    loaded: Any = load_dictionaries(out)
    for layer in record["layers"]:
        assert layer["after"]["fvu"] <= layer["before"]["fvu"]
        assert 0 < layer["before"]["cosine"] < 1
        if layer["what"] == "skip":
            assert loaded.skip(layer["layer"]) is not None
    assert loaded.provenance.config["refined"]["rank"] == 4
    with pytest.raises(SystemExit) as left:
        main([*words, "--out", str(out)])
    assert left.value.code == 2
    assert "is not empty" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main(["refine", "pocket-sae", "--out", str(tmp_path / "other")])
    assert left.value.code == 2
    assert not (tmp_path / "other").exists()
