"""First values, normalisation in the file, and new directions for dead latents."""

from typing import Any

import pytest
import torch

from transcoders import (
    CLTConfig,
    SAEConfig,
    TranscoderConfig,
    fold_normalisation,
    load_dictionaries,
    random_dictionaries,
    save_dictionaries,
    train,
    unfold_normalisation,
)
from transcoders.errors import DictionaryError, InputError
from transcoders.training.initialise import geometric_median, initial_parameters, measure_scales
from transcoders.training.revival import resample
from transcoders.training.step import Run

N_LAYERS, D_MODEL, FEATURES, BATCH = 2, 16, 40, 1000


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def start(config, shift=0.0):
    reads, writes = draw(BATCH, N_LAYERS, D_MODEL) + shift, draw(BATCH, N_LAYERS, D_MODEL, seed=1) + shift
    return initial_parameters(config, reads, writes), reads.transpose(0, 1)


def test_the_geometric_median_ignores_outliers_and_has_the_least_sum_of_distances():
    x = draw(400, 2, 5)
    x[:20] += 1000.0
    median = geometric_median(x)
    assert float(median.norm(dim=-1).max()) < 0.5 < float(x.mean(0).norm(dim=-1).min())

    def total(point):
        return (x - point).norm(dim=-1).sum(0)

    for seed in range(5):
        assert bool((total(median) <= total(median + 0.05 * draw(2, 5, seed=seed))).all())


@pytest.mark.parametrize("choice", ["mean", "median", "zero"])
def test_the_first_output_bias_is_the_one_that_is_asked(choice):
    config = TranscoderConfig(features=FEATURES, bias_init=choice)
    built, _ = start(config, shift=2.0)
    writes = draw(BATCH, N_LAYERS, D_MODEL, seed=1) + 2.0
    expected = {"mean": writes.mean(0), "median": geometric_median(writes), "zero": torch.zeros(N_LAYERS, D_MODEL)}
    torch.testing.assert_close(built.b_dec.detach(), expected[choice])


def test_first_decoders_are_transposed_or_not_and_have_the_norm_that_is_asked():
    choices: Any = (("default", None), ("transpose", 1.0), ("random", 0.0))
    for kind, default in ((SAEConfig, 1.0), (TranscoderConfig, 0.0)):
        for init, expected in choices:
            built, _ = start(kind(features=FEATURES, activation="relu", decoder_init=init, decoder_norm=0.7))
            torch.testing.assert_close(built.decoder_norms().detach(), torch.full((N_LAYERS, FEATURES), 0.7))
            cosine = torch.nn.functional.cosine_similarity(built.W_enc, built.W_dec[0].transpose(0, 1), dim=-1)[0]
            assert float(cosine.mean()) == pytest.approx(default if expected is None else expected, abs=0.1)
    built, _ = start(CLTConfig(features=FEATURES, activation="relu", encoder_scale=0.3, decoder_norm=0.7))
    torch.testing.assert_close(built.decoder_norms().detach(), torch.full((N_LAYERS, FEATURES), 0.7))
    torch.testing.assert_close(built.W_enc.norm(dim=-1).detach(), torch.full((N_LAYERS, FEATURES), 0.3))


@pytest.mark.parametrize(
    ("activation", "options"),
    [
        (activation, options)
        for activation in ("relu", "jumprelu", "gated")
        for options in ({}, {"centred": True}, {"aligned": True})
        if activation != "gated" or "aligned" not in options  # aligned training has one encoder
    ],
)
def test_calibrated_biases_start_with_the_l0_that_is_asked(activation, options):
    config = SAEConfig(features=FEATURES, activation=activation, start_l0=5.0, **options)
    built, reads = start(config, shift=1.0)
    fires = (built.activate(built.pre_activations(reads)) > 0).float().mean(dim=1)
    assert float(fires.sum(dim=-1).mean()) == pytest.approx(5.0, rel=0.02)
    assert float(fires.max()) <= 5 / FEATURES + 2 / BATCH  # and all of them alike


# normalisation


@pytest.mark.parametrize("kind", ["clt", "plt", "sae"])
def test_normalisation_is_recorded_and_folds_in_and_out_with_unchanged_outputs(kind, tmp_path):
    options: Any = {"centred": True} if kind == "sae" else {"skip": True}
    dictionaries = random_dictionaries(kind, n_layers=2, d_model=D_MODEL, activation="jumprelu", **options)
    dictionaries.requires_grad_(False)
    x = draw(2, 30, D_MODEL)
    s = torch.tensor([0.3, 4.0])
    t = s if kind == "sae" else torch.tensor([2.0, 0.05])
    features = dictionaries.encode(x)
    written = dictionaries.reconstruct(features, x)
    fold_normalisation(dictionaries, s, t)
    save_dictionaries(dictionaries, tmp_path / "folded")
    for folded in (dictionaries, load_dictionaries(tmp_path / "folded")):
        raw = x / s[:, None, None]
        found = folded.encode(raw)
        assert torch.equal(found.index, features.index)
        torch.testing.assert_close(found.value, features.value)
        torch.testing.assert_close(folded.reconstruct(found, raw), written / t[:, None, None])
        recorded = folded.provenance.normalisation
        assert recorded["read"] == pytest.approx(s.tolist())
        assert recorded["write"] == pytest.approx(t.tolist())
    with pytest.raises(DictionaryError, match="folded in already"):
        fold_normalisation(dictionaries, s, t)
    unfold_normalisation(dictionaries)
    torch.testing.assert_close(dictionaries.reconstruct(dictionaries.encode(x), x), written)
    with pytest.raises(DictionaryError, match="record no factors"):
        unfold_normalisation(dictionaries)


def test_folding_refuses_factors_that_do_not_fit():
    with pytest.raises(DictionaryError, match="as many factors; got 1 and 2"):
        fold_normalisation(random_dictionaries("plt"), [1.0], [1.0, 1.0])
    with pytest.raises(DictionaryError, match="one factor for both"):
        fold_normalisation(random_dictionaries("sae", centred=True).requires_grad_(False), [1.0, 2.0], [1.0, 3.0])


def test_trained_dictionaries_do_not_depend_on_the_units_of_their_data():
    x = draw(2000, D_MODEL)
    config = SAEConfig(features=24, activation="topk", k=4, batch=64, tokens=6_000)
    trained: list[Any] = [train(None, factor * x, config, progress=False) for factor in (1.0, 256.0)]
    torch.testing.assert_close(256 * trained[0][0](x), trained[1][0](256 * x), rtol=1e-3, atol=0.5)
    none = SAEConfig(features=24, normalise="none")
    scales = measure_scales(x[:, None], x[:, None], none)
    assert float(scales.read) == float(scales.write) == 1.0


# resampling


@pytest.mark.parametrize("kind", [SAEConfig, TranscoderConfig, CLTConfig])
@pytest.mark.parametrize("activation", ["relu", "jumprelu", "gated", "topk"])
def test_resampling_gives_dead_latents_and_no_others_directions_of_badly_reconstructed_tokens(kind, activation):
    config = kind(features=FEATURES, activation=activation, k=4, threshold=0.01)
    reads, writes = draw(200, N_LAYERS, D_MODEL), draw(200, N_LAYERS, D_MODEL, seed=1)
    run = Run.start(config, reads, writes)
    for step in range(2):
        run.step(step, reads, writes)
    (part,) = run.parts
    scaled = [a.transpose(0, 1) * s[:, None, None] for a, s in ((reads, run.scales.read), (writes, run.scales.write))]
    result = part.step(2, *scaled, sparsity_weight=run.controller.weight(2), p=1.0)
    dead = torch.zeros(N_LAYERS, FEATURES, dtype=torch.bool)
    dead[1, [3, 7]] = True
    error = result.error.clone()
    x = reads.transpose(0, 1).contiguous()
    error[:, :] *= 1e-3
    error[:, [5, 9]] = 10 * (x - x.mean(dim=1, keepdim=True))[:, [5, 9]]
    before = {name: p.detach().clone() for name, p in run.weights.named_parameters()}
    l0, smallest = result.code.l0(), result.code.smallest()
    renewed = resample(run.weights, part.optimizer, x, error, dead, config, l0=l0, smallest=smallest, seed=0)
    assert torch.equal(renewed, dead)
    after = dict(run.weights.named_parameters())
    for name in ("W_enc", "b_enc"):
        changed = (after[name] != before[name]).reshape(N_LAYERS, FEATURES, -1).any(-1)
        assert torch.equal(changed, dead)
    changed = (after["W_dec.1"] != before["W_dec.1"]).flatten(1).any(1)
    assert torch.equal(changed, dead[1])
    written = torch.nn.functional.normalize(after["W_dec.1"][3].flatten(), dim=0)
    along = torch.nn.functional.normalize(error[1, [5, 9]], dim=1) @ written
    assert sorted(float(abs(cosine)) > 0.999 for cosine in along) == [False, True]
    moments = part.optimizer.state[run.weights.W_enc]["exp_avg"]
    assert not moments[1, [3, 7]].any()
    assert bool(moments[1, [4, 8]].any())
    h = run.weights.pre_activations(x)[1][:, [3, 7]]
    if kind is not SAEConfig:  # their encoders have the token's read, an SAE's has its error
        assert float(h[[5, 9]].detach().max()) > float(h.detach().mean())
    cut = {"jumprelu": 0.01, "topk": float(result.code.smallest()[1])}.get(activation, 0.0)
    share = float((h > cut + 1e-6).float().mean())
    assert share == pytest.approx(0.5 * float(result.code.l0()[1]) / FEATURES, abs=2 / 200)


@pytest.mark.parametrize("options", [{}, {"centred": False}, {"aligned": True}])
@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
def test_resampling_turns_away_latents_that_would_not_lessen_the_squared_error(activation, options):
    """Against the squared errors themselves, in float64, on data with a mean far from zero."""
    config = SAEConfig(features=FEATURES, activation=activation, k=4, threshold=0.01, **options)
    x = draw(300, 1, D_MODEL) * torch.linspace(0.1, 3, D_MODEL) + 4
    run = Run.start(config, x, x)
    (part,) = run.parts
    x = (x * run.scales.read).transpose(0, 1).contiguous()
    result = part.step(0, x, x, sparsity_weight=0.0, p=1.0)
    error = result.error + draw(1, 300, D_MODEL, seed=5) * torch.linspace(0, 2, 300)[:, None]
    dead = torch.zeros(1, FEATURES, dtype=torch.bool)
    dead[0, ::2] = True
    before = run.weights.W_dec[0].detach().clone()
    of_code: Any = {"l0": result.code.l0(), "smallest": result.code.smallest(), "seed": 0}
    renewed = resample(run.weights, part.optimizer, x, error, dead, config, **of_code)[0]
    assert bool(renewed.any())
    assert torch.equal((run.weights.W_dec[0] != before).flatten(1).any(1), renewed)
    h = run.weights.pre_activations(x)[0].double()
    cut = {"jumprelu": 0.01, "topk": float(result.code.smallest()[0])}.get(activation, 0.0)
    for latent in renewed.nonzero().flatten().tolist():
        a = torch.where(h[:, latent] > cut, h[:, latent].relu(), 0.0)
        left = error[0].double() - a[:, None] * run.weights.W_dec[0][latent].double()
        assert float(left.square().sum()) < float(error.double().square().sum())
    nothing_left = resample(run.weights, part.optimizer, x, 1e-6 * error, dead, config, **of_code)
    assert not bool(nothing_left.any())


def test_resampling_happens_when_it_is_asked_and_not_while_the_rate_falls(monkeypatch):
    x = draw(64, D_MODEL)
    common: Any = {"features": 24, "batch": 64, "tokens": 64 * 40, "dead_after": 64, "activation": "relu"}
    steps: list[int] = []

    def renewed(weights, optimizer, reads, error, dead, config, **others):
        steps.append(step)
        assert bool(dead.all())
        return dead

    monkeypatch.setattr("transcoders.training.part.resample", renewed)
    for remedy, expected in (("resample", [4, 9, 14]), ("none", [])):
        steps.clear()
        settings: Any = {**common, "remedy": remedy, "resample_every": 5, "decay": 0.5}
        run = Run.start(SAEConfig(**settings), x[:, None], x[:, None])
        with torch.no_grad():
            run.weights.b_enc.sub_(1000)  # nothing fires, so nothing else resets the count
        for step in range(40):
            run.step(step, x[:, None], x[:, None])
            assert bool((run.counter.since_fired == 0).all()) == (step in expected)
        assert steps == expected


# settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": "topk", "penalty": "l1"}, "'topk' has no penalty 'l1'"),
        ({"activation": "relu", "penalty": "tanh"}, "it goes with 'default', 'l1', 'unit_l1', 'p_anneal'"),
        ({"activation": "batchtopk", "target_l0": 8.0}, "set k = 8"),
        ({"activation": "gated", "aligned": True}, "two encoders"),
        ({"matryoshka": (0.5, 0.25, 1.0)}, "must rise to 1"),
        ({"matryoshka": (0.5,)}, "must rise to 1"),
        ({"matryoshka": (1e-9, 1.0)}, "holds none"),
        ({"target_l0": 5000.0}, "below the 4096 features"),
        ({"ema": 1.0}, "ema"),
        ({"k_start": 0.5}, "k only falls"),
        ({"p_end": 0.0}, "p_end"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        SAEConfig(**settings)
