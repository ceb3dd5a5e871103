"""Evaluation against the plain definitions, on models and dictionaries whose right answers are known."""

import json
import math
from dataclasses import replace

import pytest
import torch

from transcoders import SAE, SAESet, evaluate, random_dictionaries, random_model
from transcoders.dictionaries import DictionaryProvenance, JumpReLU, ReLU
from transcoders.errors import DictionaryError, FileFormatError, InputError
from transcoders.evaluation import Evaluation, FiringHistogram, Splice, load_evaluation
from transcoders.evaluation.statistics import Statistics
from transcoders.sites import Site

N_LAYERS, D_MODEL = 3, 16


@pytest.fixture(scope="module")
def model():
    return random_model(
        n_layers=N_LAYERS, d_model=D_MODEL, n_heads=2, d_vocab=40, context=16, dtype=torch.float64, seed=2
    )


@pytest.fixture(scope="module")
def rows():
    return torch.randint(0, 40, (6, 10), generator=torch.Generator().manual_seed(4))


def loss_of(logits, rows):
    return float(torch.nn.functional.cross_entropy(logits[:, 1:-1].flatten(0, 1), rows[:, 2:].flatten()))


def test_replaced_model_by_hand(model, rows):
    """The cross-layer splice, layer by layer with explicit loops, against the model run with the same writes."""
    clt = random_dictionaries(
        "clt", n_layers=N_LAYERS, d_model=D_MODEL, features=24, activation="jumprelu", dtype=torch.float64
    ).requires_grad_(False)
    replaced = evaluate(model, clt, rows).replaced
    # Fix the writes of layers 0 … l−1, read what layer l then reads, and so on upwards.
    original, own = model.run(rows, clt.writes)
    fixed = {}
    activations = []
    for layer in range(N_LAYERS):
        _, cache = model.run(rows, [clt.reads[layer]], edits=dict(fixed))
        activations.append(clt.activations(layer, cache[clt.reads[layer]]))
        write = clt.b_dec[layer] + sum(
            torch.einsum("bpf,fd->bpd", activations[source], clt.W_dec[source][:, layer - source])
            for source in range(layer + 1)
        )
        write[:, 0] = own[clt.writes[layer]][:, 0]
        fixed[clt.writes[layer]] = lambda _value, write=write: write
    logits, _ = model.run(rows, edits=fixed)
    assert replaced.loss == pytest.approx(loss_of(logits, rows), rel=1e-10)
    log_p, log_q = original[:, 1:].log_softmax(-1), logits[:, 1:].log_softmax(-1)
    assert replaced.kl == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-9)
    agreement = (original[:, 1:].argmax(-1) == logits[:, 1:].argmax(-1)).double().mean()
    assert replaced.top1_agreement == pytest.approx(float(agreement))


def test_one_layer_spliced_by_hand(model, rows):
    plt = random_dictionaries("plt", n_layers=N_LAYERS, d_model=D_MODEL, skip=True, dtype=torch.float64)
    plt.requires_grad_(False)
    result = evaluate(model, plt, rows).layers[1]
    _, cache = model.run(rows, [plt.reads[1], plt.writes[1]])
    spliced = torch.stack([plt[1](row) for row in cache[plt.reads[1]]])
    spliced[:, 0] = cache[plt.writes[1]][:, 0]
    logits, _ = model.run(rows, edits={plt.writes[1]: lambda _: spliced})
    assert result.loss_spliced == pytest.approx(loss_of(logits, rows), rel=1e-10)
    original, _ = model.run(rows)
    log_p, log_q = original[:, 1:].log_softmax(-1), logits[:, 1:].log_softmax(-1)
    assert result.kl == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-9)
    assert result.top1_agreement == pytest.approx(float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean()))


def test_statistics_by_hand(model, rows):
    plt = random_dictionaries(
        "plt", n_layers=N_LAYERS, d_model=D_MODEL, activation="topk", k=3, dtype=torch.float64
    ).requires_grad_(False)
    evaluation = evaluate(model, plt, rows, memory=500_000)
    _, cache = model.run(rows, [*plt.reads, *plt.writes])
    for layer, found in enumerate(evaluation.layers):
        x, y = (cache[sites[layer]][:, 1:].flatten(0, 1) for sites in (plt.reads, plt.writes))
        a = plt[layer].encode(x)
        fvu = (y - plt[layer](x)).square().sum() / (y - y.mean(0)).square().sum()
        assert found.fvu == pytest.approx(float(fvu), rel=1e-9)
        assert found.l0 == pytest.approx(float((a > 0).sum(1).double().mean()))
        assert found.dead == pytest.approx(float((a == 0).all(0).double().mean()))
        rate = (a > 0).double().mean(0)
        assert found.dense == pytest.approx(float((rate > 0.1).double().mean()))
        assert found.firing.never + sum(found.firing.counts) == len(rate)
        assert found.firing.counts[-1] == int((rate >= 10**-0.5).sum())
        y_hat = plt[layer](x)
        cosine = (y * y_hat).sum(1) / (y.norm(dim=1) * y_hat.norm(dim=1))
        assert found.cosine == pytest.approx(float(cosine.mean()), rel=1e-9)
        gamma = torch.linalg.lstsq((y_hat - y.mean(0)).flatten()[:, None], (y - y.mean(0)).flatten()[:, None]).solution
        assert found.shrinkage == pytest.approx(1 / float(gamma), rel=1e-9)
    assert evaluation.tokens == 6 * 9
    assert evaluation.fvu == pytest.approx(sum(layer.fvu for layer in evaluation.layers) / N_LAYERS)


def test_ablation_losses_by_hand(model, rows):
    plt = random_dictionaries("plt", n_layers=N_LAYERS, d_model=D_MODEL, dtype=torch.float64).requires_grad_(False)
    result = evaluate(model, plt, rows)
    site = plt.writes[2]
    logits, cache = model.run(rows, [site])
    own, mean = cache[site], cache[site][:, 1:].flatten(0, 1).mean(0)
    for found, vector in ((result.layers[2].loss_zero, torch.zeros_like(mean)), (result.layers[2].loss_mean, mean)):
        edited = vector.expand_as(own).clone()
        edited[:, 0] = own[:, 0]
        ablated, _ = model.run(rows, edits={site: lambda _, edited=edited: edited})
        assert found == pytest.approx(loss_of(ablated, rows), rel=1e-10)
    assert result.loss == pytest.approx(loss_of(logits, rows), rel=1e-10)


def test_perfect_dictionaries_recover_everything(model, rows):
    """An SAE with a feature for each direction and its opposite reconstructs exactly."""
    eye = torch.eye(D_MODEL, dtype=torch.float64)
    both = torch.cat([eye, -eye])
    saes = [
        SAE(
            W_enc=both.T.clone(), b_enc=torch.zeros(2 * D_MODEL, dtype=torch.float64), W_dec=both.clone(),
            b_dec=torch.zeros(D_MODEL, dtype=torch.float64), activation=ReLU(), site=Site(layer, "mlp_out"),
        )
        for layer in range(N_LAYERS)
    ]  # fmt: skip
    result = evaluate(model, SAESet(saes, DictionaryProvenance(model="test")).requires_grad_(False), rows)
    assert result.fvu == pytest.approx(0, abs=1e-12)
    assert result.l0 == pytest.approx(D_MODEL)
    assert all(layer.recovered_zero == pytest.approx(1, abs=1e-9) for layer in result.layers)
    assert result.replaced.top1_agreement == 1
    assert result.replaced.kl == pytest.approx(0, abs=1e-12)
    assert result.replaced.recovered_mean == pytest.approx(1, abs=1e-9)


def test_dictionaries_that_only_know_the_mean_recover_nothing(model, rows):
    plt = random_dictionaries(
        "plt", n_layers=N_LAYERS, d_model=D_MODEL, activation="jumprelu", dtype=torch.float64
    ).requires_grad_(False)
    _, cache = model.run(rows, plt.writes)
    for transcoder, site in zip(plt.layers, plt.writes, strict=True):
        assert isinstance(transcoder.activation, JumpReLU)
        transcoder.activation.threshold.fill_(math.inf)
        transcoder.b_dec.copy_(cache[site][:, 1:].flatten(0, 1).mean(0))
    result = evaluate(model, plt, rows)
    assert all(layer.recovered_mean == pytest.approx(0, abs=1e-9) for layer in result.layers)
    assert (result.l0, result.dead) == (0, 1)
    assert result.fvu == pytest.approx(1)


def test_topk_over_layers_takes_the_features_of_the_original(model, rows):
    """TopK over all layers of a token: the writes are what the original's reads reconstruct to."""
    clt = random_dictionaries("clt", n_layers=N_LAYERS, d_model=D_MODEL, activation="topk", dtype=torch.float64)
    result = evaluate(model, clt.requires_grad_(False), rows)
    assert result.replaced.features == "original"
    assert result.l0 * N_LAYERS == pytest.approx(8, abs=0.5)
    original, cache = model.run(rows, [*clt.reads, *clt.writes])
    writes = clt(torch.stack([cache[site] for site in clt.reads]))
    for layer, site in enumerate(clt.writes):
        writes[layer][:, 0] = cache[site][:, 0]
    all_of_them = {site: lambda _, w=write: w for site, write in zip(clt.writes, writes, strict=True)}
    only_one = {clt.writes[1]: lambda _: writes[1]}
    one = result.layers[1]
    for edits, found, loss in ((all_of_them, result.replaced, result.replaced.loss), (only_one, one, one.loss_spliced)):
        logits, _ = model.run(rows, edits=edits)
        assert loss == pytest.approx(loss_of(logits, rows))
        agreement = (original[:, 1:].argmax(-1) == logits[:, 1:].argmax(-1)).double().mean()
        assert found.top1_agreement == pytest.approx(float(agreement))


def test_the_first_position_keeps_its_own_write(model, rows):
    plt = random_dictionaries("plt", n_layers=N_LAYERS, d_model=D_MODEL, dtype=torch.float64).requires_grad_(False)
    original, _ = model.run(rows)
    replaced, _ = model.run(rows, edits=Splice(plt).edits())
    torch.testing.assert_close(replaced[:, 0], original[:, 0])
    assert not torch.allclose(replaced[:, 1], original[:, 1])


def test_tables_and_json(model, rows):
    plt = random_dictionaries("plt", n_layers=N_LAYERS, d_model=D_MODEL, dtype=torch.float64).requires_grad_(False)
    result = evaluate(model, plt, rows)
    frame = result.to_frame()
    assert list(frame.index) == [0, 1, 2]
    assert frame.loc[1, "fvu"] == result.layers[1].fvu
    record = json.loads(json.dumps(result.to_json()))
    assert record["fvu"] == result.fvu
    assert record["replaced"]["kl"] == result.replaced.kl
    assert Evaluation.from_json(record) == result


def test_an_evaluation_survives_its_file(model, rows, tmp_path):
    """A figure that is not a number is null in the file, which is strict JSON, and NaN again afterwards."""
    plt = random_dictionaries("plt", n_layers=N_LAYERS, d_model=D_MODEL, dtype=torch.float64).requires_grad_(False)
    result = evaluate(model, plt, rows)
    broken = replace(result, layers=(replace(result.layers[0], recovered_zero=math.nan), *result.layers[1:]))
    broken.save(tmp_path / "evaluation.json")
    text = (tmp_path / "evaluation.json").read_text()
    assert "NaN" not in text
    loaded = load_evaluation(tmp_path / "evaluation.json")
    assert math.isnan(loaded.layers[0].recovered_zero)
    assert loaded.layers[1:] == result.layers[1:]
    (tmp_path / "other.json").write_text('{"layers": [], "replaced": null}')
    with pytest.raises(FileFormatError, match="no evaluation of this version"):
        load_evaluation(tmp_path / "other.json")


def test_firing_rates_fall_into_half_decades():
    rates = [0.0, 1e-9, 1e-6, 1e-3, 0.00999999, 0.01, 0.3, 0.4, 1.0]
    found = FiringHistogram.of(rates)
    assert found.never == 1
    expected = dict.fromkeys(range(12), 0) | {0: 2, 6: 1, 7: 1, 8: 1, 10: 1, 11: 2}
    assert found.counts == tuple(expected.values())
    assert found.edges[6] == pytest.approx(1e-3)


def test_reconstructions_of_half_the_size_have_half_the_shrinkage(model, rows):
    """An SAE that returns μ + (y − μ) / 2."""
    eye = torch.eye(D_MODEL, dtype=torch.float64)
    both = torch.cat([eye, -eye])
    site = Site(0, "mlp_out")
    mean = model.run(rows, [site])[1][site][:, 1:].flatten(0, 1).mean(0)
    sae = SAE(
        W_enc=both.T.clone(), b_enc=-(both @ mean), W_dec=both / 2, b_dec=mean.clone(), activation=ReLU(), site=site
    )  # fmt: skip
    statistics = Statistics(SAESet([sae], DictionaryProvenance(model="test")).requires_grad_(False))
    y = model.run(rows, [site])[1][site][:, 1:].flatten(0, 1).unsqueeze(1)
    for part in y.split(13):
        statistics.update(part, part)
    assert statistics.shrinkage[0] == pytest.approx(0.5)
    assert statistics.fvu[0] == pytest.approx(0.25)


def test_positions_before_the_first_with_features_keep_the_models_own_writes(model, rows):
    plt = random_dictionaries("plt", n_layers=N_LAYERS, d_model=D_MODEL, features=24, dtype=torch.float64)
    plt.provenance = replace(plt.provenance, first=4)
    found = evaluate(model, plt, rows).layers[1]
    at = model.activations(rows, [plt.reads[1], plt.writes[1]])
    read, written = at[plt.reads[1]], at[plt.writes[1]]
    put = plt[1](read).detach()
    y, error = written[:, 4:].flatten(0, 1), (written - put)[:, 4:].flatten(0, 1)
    assert found.fvu == pytest.approx(float(error.square().sum() / (y - y.mean(0)).square().sum()))
    assert found.l0 == pytest.approx(float((plt[1].encode(read[:, 4:]) > 0).double().sum(-1).mean()))
    spliced = torch.cat([written[:, :4], put[:, 4:]], dim=1)
    for value, loss in ((spliced, found.loss_spliced), (y.mean(0), found.loss_mean), (0 * y[0], found.loss_zero)):
        whole = torch.cat([written[:, :4], value.expand_as(written)[:, 4:]], dim=1)
        logits, _ = model.run(rows, edits={plt.writes[1]: lambda _, whole=whole: whole})
        assert loss == pytest.approx(loss_of(logits, rows), rel=1e-10)


@pytest.mark.parametrize("kind", ["plt", "clt"])
def test_massive_tokens_keep_the_models_own_writes_and_fvu_is_given_with_and_without(model, rows, kind):
    sets = random_dictionaries(kind, n_layers=N_LAYERS, d_model=D_MODEL, features=24, dtype=torch.float64)
    at = model.activations(rows, [*sets.reads, *sets.writes])
    written = at[sets.writes[1]]
    limit = float(written[:, 1:].norm(dim=-1).quantile(0.8))
    sets.provenance = replace(sets.provenance, limits={str(sets.writes[1]): limit})
    exact = written.norm(dim=-1) > limit
    kept = ~exact
    kept[:, 0] = False
    evaluation = evaluate(model, sets, rows)
    assert (evaluation.tokens, evaluation.massive) == (int(kept.sum()), int(exact[:, 1:].sum()))
    found = evaluation.layers[1]
    put = sum(
        sets.activations(i, at[sets.reads[i]]) @ sets.decoder_rows(i, torch.arange(24), 1)
        for i in range(N_LAYERS)
        if 1 in sets.write_layers(i)
    ) + sets.decoder_bias(1)
    for where, fvu in ((kept, found.fvu), (torch.arange(rows.shape[1]).expand_as(rows) > 0, found.fvu_all)):
        y, error = written[where], (written - put)[where]
        assert fvu == pytest.approx(float(error.square().sum() / (y - y.mean(0)).square().sum()))
    assert found.fvu != pytest.approx(found.fvu_all)
    assert found.l0 == pytest.approx(float((sets.activations(1, at[sets.reads[1]])[kept] > 0).double().sum(-1).mean()))
    whole = torch.where(kept[..., None], put, written)
    logits, _ = model.run(rows, edits={sets.writes[1]: lambda _: whole})
    assert found.loss_spliced == pytest.approx(loss_of(logits, rows), rel=1e-10)
    # All layers replaced: each keeps its own write at these tokens, whatever the stream has become.
    pending = [0.0] * N_LAYERS

    def read(layer):
        def encode(value):
            out = sets.decode_layer(layer, sets.activations(layer, value)).unbind(-2)
            for target, part in zip(sets.write_layers(layer), out, strict=True):
                pending[target] = pending[target] + part

        return encode

    def write(layer):
        return lambda value: torch.where(kept[..., None], pending[layer] + sets.decoder_bias(layer), value)

    edits = {sets.reads[i]: read(i) for i in range(N_LAYERS)} | {sets.writes[i]: write(i) for i in range(N_LAYERS)}
    logits, _ = model.run(rows, edits=edits)
    assert evaluation.replaced.loss == pytest.approx(loss_of(logits, rows), rel=1e-10)
    assert Evaluation.from_json(evaluation.to_json()) == evaluation


def test_what_does_not_fit_is_refused(model, rows):
    with pytest.raises(DictionaryError, match="width 8"):
        evaluate(model, random_dictionaries("plt", n_layers=N_LAYERS, d_model=8), rows)
    plt = random_dictionaries("plt", n_layers=N_LAYERS, d_model=D_MODEL, dtype=torch.float64)
    with pytest.raises(InputError, match="at least 3 tokens"):
        evaluate(model, plt, rows[:, :2])
