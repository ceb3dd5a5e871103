"""Tokens of massive activations: found, named, left out of training, and exact in attribution."""

import json
import logging
from dataclasses import replace
from itertools import islice

import pytest
import torch

from circuitsae.attribution import LogitTargets, attribute
from circuitsae.features.reading import encode_rows
from circuitsae.interventions import Feature, Intervention, Zero, intervene
from circuitsae.replacement import ReplacementModel
from transcoders import random_model
from transcoders.data import ActivationStream, find_outliers, massive_tokens, sites_of
from transcoders.data.activations import close_gaps
from transcoders.data.outliers import TokenOutliers, activations_and_massive
from transcoders.data.tokens import TokenRows
from transcoders.dictionaries import DictionaryProvenance, random_dictionaries
from transcoders.errors import InputError
from transcoders.sites import Site
from transcoders.training import SAEConfig, Trainer
from transcoders.training.batches import ModelSource

SINK = 7
"""A token whose embedding is huge."""
CONTEXT = 9
SITES = [Site(layer, "resid_post") for layer in range(2)]


@pytest.fixture(scope="module")
def model():
    model = random_model(n_layers=2, d_model=16, n_heads=2, d_vocab=50, context=16)
    with torch.no_grad():
        model.bridge.embed.W_E[SINK] *= 500
    return model


@pytest.fixture(scope="module")
def rows():
    drawn = torch.randint(0, 50, (40, CONTEXT), generator=torch.Generator().manual_seed(0))
    drawn[:, 0] = SINK
    return drawn


def norms(model, rows, sites=SITES):
    """[row, pos, site], in float64."""
    _, cache = model.run(rows, sites)
    return torch.stack([cache[site].double().norm(dim=-1) for site in sites], dim=-1)


# finding them


def test_outliers_are_those_far_above_the_median_of_the_positions_with_features(model, rows):
    found = find_outliers(model, rows, SITES, times=20.0)
    norm = norms(model, rows)
    median = norm[:, 1:].flatten(0, 1).median(dim=0).values
    assert list(found.limits) == SITES
    torch.testing.assert_close(torch.tensor(list(found.limits.values())).double(), 20 * median, rtol=1e-5, atol=0)
    over = (norm > 20 * median).any(dim=-1)
    assert 0 < int(over[:, 1:].sum()) == int((rows[:, 1:] == SINK).sum())
    assert found.share == pytest.approx(float(over[:, 1:].float().mean()))
    assert found.share_before == 1
    assert found.tokens == {f"#{SINK}": int(over[:, 1:].sum())}
    ratio = (norm / median).amax(dim=(0, 1))
    assert found.largest == pytest.approx({site: float(ratio[i]) for i, site in enumerate(SITES)}, rel=1e-4)
    assert torch.equal(massive_tokens(model, rows, found.limits), over)


def test_what_was_found_is_one_sentence_with_tokens_and_sites(model, rows):
    text = find_outliers(model, rows, SITES, times=20.0).describe()
    assert text.startswith("Activations exceed 20 times the median norm of their site at 100% of the tokens before")
    assert f"'#{SINK}' (" in text
    assert "0.resid_post up to" in text
    nothing = TokenOutliers(20.0, 1, {}, 0.0, 0.0, {}, {}).describe()
    assert nothing == "No token's activations exceed 20 times the median norm of their site."


def test_a_norm_that_is_not_finite_is_a_fault_and_no_outlier(model, rows):
    broken = random_model(n_layers=2, d_model=16, n_heads=2, d_vocab=50, context=16)
    with torch.no_grad():
        broken.bridge.embed.W_E[SINK] = torch.inf
    assert not massive_tokens(broken, rows, dict.fromkeys(SITES, 1e9)).any()
    with pytest.raises(InputError, match="none after the first 9"):
        find_outliers(model, rows, SITES, first=CONTEXT)


# leaving them out


@pytest.mark.parametrize("first", [0, 2])
def test_the_stream_deals_every_other_token_once_and_knows_where_it_is_from(model, rows, first):
    limits = find_outliers(model, rows, SITES, times=20.0).limits
    stream = ActivationStream(
        model, TokenRows(rows), reads=SITES, writes=(), batch=10, chunk_tokens=8 * (CONTEXT - first), seed=3,
        first=first, limits=limits,
    )  # fmt: skip
    expected = sites_of(model, rows[:8], SITES, (), first=first).reads
    kept = ~(rows[:8, first:] == SINK).flatten()
    n_batches = int(kept.sum()) // 10
    dealt = []
    for batch in islice(stream, n_batches):
        assert stream.state()["chunk"] == 0
        for row in range(10):
            words = stream.place(row).split()
            token = int(words[4]) * (CONTEXT - first) + int(words[1]) - first
            torch.testing.assert_close(batch.reads[row], expected[token])
            dealt.append(token)
    assert len(set(dealt)) == 10 * n_batches
    assert set(dealt) <= set(kept.nonzero().squeeze(1).tolist())
    without = sites_of(model, rows[:8], SITES, (), first=first, limits=limits).reads
    torch.testing.assert_close(without, expected[kept])


def test_batches_are_views_of_one_buffer(model, rows):
    stream = ActivationStream(
        model, TokenRows(rows), reads=SITES[:1], writes=SITES[1:], batch=32, chunk_tokens=64, seed=0
    )
    batches = islice(stream, 6)
    places = [{side.untyped_storage().data_ptr() for side in batch} for batch in batches]
    assert stream.state()["chunk"] == 2
    assert all(len(place) == 1 for place in places)
    assert len(set.union(*places)) == 1


@pytest.mark.parametrize("seed", range(5))
def test_gaps_are_closed_in_place(seed):
    generator = torch.Generator().manual_seed(seed)
    gone = torch.rand(30, generator=generator) < seed / 4
    table, names = torch.randn(33, 2, generator=generator), torch.arange(30)
    before, address = table.clone(), table.data_ptr()
    stay = close_gaps(gone, table, names)
    assert stay == int((~gone).sum())
    assert table.data_ptr() == address
    assert sorted(names[:stay].tolist()) == (~gone).nonzero().squeeze(1).tolist()
    assert torch.equal(table[:stay], before[names[:stay]])
    assert torch.equal(table[30:], before[30:])


def test_a_chunk_of_nothing_but_outliers_is_refused(model):
    rows = [[SINK] * CONTEXT] * 4
    stream = ActivationStream(
        model,
        TokenRows(torch.tensor(rows)),
        reads=SITES,
        writes=(),
        batch=8,
        chunk_tokens=32,
        seed=0,
        limits={SITES[0]: 1.0},
    )
    with pytest.raises(InputError, match="4 rows of 9 tokens without 32 that are outliers do not fill one batch of 8"):
        next(iter(stream))


def test_one_pass_serves_all_sites_and_ends_at_the_last_of_them(rows):
    model = random_model(n_layers=4, d_model=16, n_heads=2, d_vocab=50, context=16)
    calls = [0] * 4
    for layer, block in enumerate(model.bridge.blocks):
        block.register_forward_pre_hook(lambda *_, layer=layer: calls.__setitem__(layer, calls[layer] + 1))
    sites = [Site(layer, kind) for layer in range(3) for kind in ("mlp_in", "mlp_out")]
    stream = ActivationStream(model, TokenRows(rows), reads=sites, writes=(), batch=16, chunk_tokens=80, seed=0)
    batches = iter(stream)
    for _ in range(5):
        next(batches)
    assert calls == [1, 1, 1, 0]


def test_activations_and_outliers_come_from_one_pass(model, rows):
    limits = dict.fromkeys(SITES, 5.0)
    expected = torch.stack([model.activations(rows, [site])[site].norm(dim=-1) > 5.0 for site in SITES]).any(dim=0)
    assert 0 < int(expected.sum()) < expected.numel()
    calls = []
    hook = model.bridge.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    at, massive = activations_and_massive(model, rows, SITES[:1], limits)
    assert torch.equal(massive, massive_tokens(model, rows, limits, at))  # those that are known need no pass
    known = model.activations(rows, SITES)
    before = len(calls)
    assert torch.equal(massive_tokens(model, rows, limits, known), expected)
    hook.remove()
    assert torch.equal(massive, expected)
    assert list(at) == SITES[:1]
    assert torch.equal(at[SITES[0]], known[SITES[0]])
    assert (len(calls), before) == (3, 3)


# training


def config(**settings):
    common = {"features": 24, "batch": 16, "tokens": 16 * 12, "activation": "topk", "k": 3, "context": CONTEXT}
    return SAEConfig(**{**common, "outliers": 20.0, "buffer_mb": 0, "checkpoint_every": 5, **settings})


def test_training_leaves_them_out_names_them_and_records_the_limits(model, rows, caplog):
    source = ModelSource(model, rows, config())
    with caplog.at_level(logging.INFO):
        trainer = Trainer(source, [config()])
    (said,) = [r.getMessage() for r in caplog.records if "median norm" in r.getMessage()]
    assert f"'#{SINK}'" in said
    limits = torch.tensor(list(source.limits.values()))
    for batch in islice(source.open(SITES, batch=16), 12):
        assert not (batch.reads.norm(dim=-1) > limits).any()
    trainer.run(progress=False)
    (saes,) = trainer.finish()
    assert saes.provenance.site_limits == find_outliers(model, rows, SITES, times=20.0).limits
    again = DictionaryProvenance.from_json(json.loads(json.dumps(saes.provenance.to_json())))
    assert again.limits == saes.provenance.limits


def test_without_the_setting_all_tokens_are_trained_on(model, rows):
    source = ModelSource(model, rows, config(outliers=0.0, first=0))
    batches = torch.cat([batch.reads.clone() for batch in islice(source.open(SITES, batch=16), 40 * CONTEXT // 16)])
    assert int((batches.norm(dim=-1).amax(dim=1) > 100).sum()) > 40
    (saes,) = Trainer(source, [config(outliers=0.0, first=0)]).finish()
    assert saes.provenance.first == 0
    assert "limits" not in saes.provenance.to_json()


def test_a_resumed_run_leaves_out_the_same_tokens(model, rows, tmp_path):
    unbroken = Trainer(ModelSource(model, rows, config()), [config()])
    unbroken.run(progress=False)
    first = Trainer(ModelSource(model, rows, config()), [config()], out=tmp_path)
    first.run(until=7, progress=False)
    resumed = Trainer(ModelSource(model, rows, config()), [config()], out=tmp_path, resume=True)
    assert resumed.step == 5
    resumed.run(progress=False)
    for name, tensor in unbroken.runs[0].tensors().items():
        assert torch.equal(resumed.runs[0].tensors()[name], tensor), name
    assert resumed.finish()[0].provenance.limits == unbroken.finish()[0].provenance.limits != {}


def test_the_sample_of_first_values_fits_the_buffer(model, rows):
    sites = [Site(layer, "resid_post") for layer in range(2)]
    source = ModelSource(model, rows.repeat(300, 1), config(buffer_mb=1))
    bytes_per_token = 2 * 16 * 4
    assert len(source.sample(sites, 10_000)) == 2**19 // bytes_per_token
    assert len(source.sample(sites, 100)) == 100
    assert len(ModelSource(model, rows, config()).sample(sites, 100)) == 16  # a batch at least


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"first": -1}, "first must be at least 0; got -1"),
        ({"outliers": 0.5}, "above 1, or 0 for none; got 0.5"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        config(**settings)


def test_rows_without_a_position_to_train_on_are_refused(model, rows):
    with pytest.raises(InputError, match="Rows of 9 tokens have none after the first 9"):
        ModelSource(model, rows, config(first=CONTEXT))


# attribution

TOKENS = torch.tensor([0, 11, 22, 33, 11])


def layer_1(model):
    """The norm of what layer 1 writes at each of the `TOKENS`."""
    return norms(model, TOKENS[None], [Site(1, "mlp_out")])[0, :, 0]


@pytest.fixture(scope="module", params=["plt", "clt"])
def replacement(request):
    """Dictionaries whose training would have left out one of the positions for what layer 1 writes there."""
    model = random_model(n_layers=3, d_model=16, n_heads=4, d_vocab=64, dtype=torch.float64, seed=2)
    dictionaries = random_dictionaries(kind=request.param, n_layers=3, d_model=16, features=24, dtype=torch.float64)
    largest, second = layer_1(model)[1:].topk(2).values.tolist()
    dictionaries.provenance = replace(dictionaries.provenance, limits={"1.mlp_out": (largest + second) / 2})
    return ReplacementModel(model, dictionaries)


@pytest.fixture(scope="module")
def trace(replacement):
    return replacement.trace(TOKENS)


def test_a_massive_token_has_no_features_and_its_errors_are_exact(replacement, trace):
    massive = 1 + int(layer_1(replacement.model)[1:].argmax())
    assert trace.massive == (massive,)
    assert trace.exact.tolist() == [pos in (0, massive) for pos in range(5)]
    assert set(trace.features.index[:, 1].tolist()) == set(range(1, 5)) - {massive}
    errors = (
        trace.frozen.writes.mlp_out - torch.stack([replacement.dictionaries.decoder_bias(i) for i in range(3)])[:, None]
    )
    torch.testing.assert_close(trace.errors[:, massive], errors[:, massive])
    assert replacement.logit_error(trace) < 1e-12


def test_the_dictionaries_alone_leave_its_mlps_as_they_are(replacement, trace):
    model, dictionaries = replacement.model, replacement.dictionaries
    written = [0.0] * 3

    def read(layer):
        def encode(value):
            a = dictionaries.activations(layer, value)
            for at, out in zip(
                dictionaries.write_layers(layer), dictionaries.decode_layer(layer, a).unbind(-2), strict=True
            ):
                written[at] = written[at] + out

        return encode

    def write(layer):
        def put(mlp_out):
            out = mlp_out.clone()
            for pos in range(5):
                if not trace.exact[pos]:
                    out[:, pos] = written[layer][:, pos] + dictionaries.decoder_bias(layer)
            return out

        return put

    edits = {dictionaries.reads[i]: read(i) for i in range(3)} | {dictionaries.writes[i]: write(i) for i in range(3)}
    expected, _ = model.run(TOKENS[None], edits=edits)
    torch.testing.assert_close(replacement.run(TOKENS), expected[0])


def test_edges_of_its_graph_hold_and_sum_up(replacement, trace):
    closed, oracle = (
        attribute(replacement, TOKENS, targets=LogitTargets([3, 5]), engine=engine)
        for engine in ("closed_form", "autograd")
    )
    assert closed.nodes == oracle.nodes
    assert not [n for n in closed.nodes if n.kind.name == "FEATURE" and n.pos in trace.massive]
    error = [i for i, n in enumerate(closed.nodes) if n.kind.name == "ERROR" and n.pos in trace.massive]
    assert len(error) == 3
    assert closed.weights.toarray() == pytest.approx(oracle.weights.toarray(), rel=1e-9, abs=1e-11)


def test_fit_is_that_of_the_positions_with_features(replacement, trace):
    kept = ~trace.exact
    y, e = trace.frozen.writes.mlp_out[:, kept], trace.errors[:, kept]
    fvu = e.square().sum((1, 2)) / (y - y.mean(1, keepdim=True)).square().sum((1, 2))
    fit = replacement.fit(trace)
    assert fit.fvu == pytest.approx(float(fvu.mean()))
    assert fit.l0 == pytest.approx(len(trace.features.value) / (3 * int(kept.sum())))


def test_interventions_on_its_features_are_refused_and_others_leave_it(replacement, trace):
    layer, pos, feature = trace.features.index[0].tolist()
    with pytest.raises(
        InputError, match=f"position {trace.massive[0]} has no features, as its activations are outliers"
    ):
        intervene(replacement, trace, [Intervention(Feature(layer, feature, trace.massive[0]), Zero())])
    outcome = intervene(replacement, trace, [Intervention(Feature(layer, feature), Zero())], reads=True)
    assert not outcome.features(layer)[..., trace.exact, :].any()
    assert outcome.features(layer)[..., pos, :].any()


def test_nothing_fires_on_it_in_a_corpus(replacement, trace):
    rows = torch.stack([TOKENS, TOKENS.flip(0)])
    with torch.no_grad():
        firing = encode_rows(replacement.model, replacement.dictionaries, rows)
    here = {int(token) for token in firing.token if token < 5}
    assert here
    assert not here & {pos for pos in range(5) if trace.exact[pos]}
