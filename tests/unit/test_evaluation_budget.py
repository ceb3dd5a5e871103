"""Evaluation in bounded memory: the same figures as whole runs of the model, and a cost that is known beforehand."""

import math
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from transcoders import evaluate, random_dictionaries, random_model
from transcoders.dictionaries import SAESet
from transcoders.errors import InputError
from transcoders.evaluation import DictionarySizes, Evaluation, evaluation_cost
from transcoders.evaluation.comparing import NO_TOKEN, Original, next_tokens
from transcoders.evaluation.cost import positions_at_once, rows_at_once
from transcoders.sites import Site
from transcoders.starting import streams_before

SIZES = {"n_layers": 3, "d_model": 16, "n_heads": 4, "d_vocab": 64}
ROWS = torch.randint(1, 64, (6, 10), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def model():
    return random_model("llama", **SIZES, dtype=torch.float64)


def dictionaries_of(kind, **options):
    return random_dictionaries(kind, n_layers=3, d_model=16, dtype=torch.float64, **options).requires_grad_(False)


def saes(kind):
    """Autoencoders of one site, with the weights of random ones."""
    made = dictionaries_of("sae")
    return SAESet([type(s)(**_parts(s), site=Site(i, kind)) for i, s in enumerate(made.layers)], made.provenance)


def _parts(sae):
    return {name: getattr(sae, name).data for name in ("W_enc", "b_enc", "W_dec", "b_dec")} | {
        "activation": sae.activation
    }


@torch.no_grad()
def by_whole_runs(model, dictionaries, rows, layer):
    """One layer replaced, by whole runs and dense tables of log-probabilities: loss (three), KL and agreement."""
    read, write = dictionaries.reads, dictionaries.writes[layer]
    original, at = model.run(rows, {*read, *dictionaries.writes})
    activations = [dictionaries.activations(i, at[site]) for i, site in enumerate(read[: layer + 1])]
    put = dictionaries.decoder_bias(layer).expand_as(at[write])
    for source, a in enumerate(activations):
        if layer in dictionaries.write_layers(source):
            features = torch.arange(dictionaries.n_features(source))
            put = put + a @ dictionaries.decoder_rows(source, features, layer)
    put = dictionaries.finished(layer, put, at[read[layer]])
    log_p, found = original[:, 1:].log_softmax(-1), {}
    mean = at[write][:, 1:].flatten(0, 1).mean(0)
    for by, value in (("spliced", put), ("zero", 0 * put), ("mean", mean.expand_as(put))):
        whole = torch.cat([at[write][:, :1], value[:, 1:]], dim=1)
        log_q = model.run(rows, edits={write: lambda _, whole=whole: whole})[0][:, 1:].log_softmax(-1)
        found[f"loss_{by}"] = float(-log_q[:, :-1].gather(2, rows[:, 2:, None]).mean())
        if by == "spliced":
            found["kl"] = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
            found["top1_agreement"] = float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean())
    return found


FAMILIES = {"gptj": 1e-7, "bloom": 1e-9, "gemma2": 1e-9, "granite": 1e-9}
"""GPT-J computes its attention in float32, whatever the model is in."""


@pytest.mark.parametrize("family", FAMILIES)
def test_runs_from_a_block_on_are_whole_runs_in_every_family(family):
    """Blocks that return tuples, run attention and MLP side by side, cap or scale logits; two rows at a time."""
    model, plt = random_model(family, **SIZES, dtype=torch.float64), dictionaries_of("plt", features=24)
    found = evaluate(model, plt, ROWS, memory=2 * rows_bytes(model, plt, 2))
    for layer in (1, 2):
        for name, expected in by_whole_runs(model, plt, ROWS, layer).items():
            assert getattr(found.layers[layer], name) == pytest.approx(expected, rel=FAMILIES[family], abs=1e-12), name


@pytest.mark.parametrize(
    "dictionaries",
    [dictionaries_of("clt", activation="jumprelu"), saes("resid_pre"), saes("resid_mid"), saes("resid_post")],
    ids=["clt", "resid_pre", "resid_mid", "resid_post"],
)
def test_runs_from_a_block_on_are_whole_runs_at_every_site(model, dictionaries):
    found = evaluate(model, dictionaries, ROWS)
    for layer in (1, 2):
        for name, expected in by_whole_runs(model, dictionaries, ROWS, layer).items():
            assert getattr(found.layers[layer], name) == pytest.approx(expected, rel=1e-9, abs=1e-12), name


def rows_bytes(model, dictionaries, rows):
    """A budget that holds so many rows."""
    sizes = DictionarySizes.of(dictionaries)
    return next(m for m in range(1000, 10**7, 1000) if rows_at_once(model, sizes, ROWS.shape[1], 2 * m) >= rows)


def test_a_small_budget_changes_no_figure(model):
    clt = dictionaries_of("clt", activation="topk")
    whole, small = evaluate(model, clt, ROWS[:3]), evaluate(model, clt, ROWS[:3], memory=150_000)
    assert rows_at_once(model, DictionarySizes.of(clt), 10, 150_000) == 1
    assert positions_at_once(model, 150_000) == 12
    assert small.replaced.kl == pytest.approx(whole.replaced.kl, rel=1e-11)
    for one, other in zip(small.layers, whole.layers, strict=True):
        for name in ("l0", "fvu", "loss_spliced", "loss_zero", "loss_mean", "recovered_mean", "top1_agreement", "kl"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-10), name


def test_losses_on_some_rows_are_those_of_these_rows(model):
    """Every second row for losses, all rows for the statistics and for the mean that stands in for a write."""
    plt = dictionaries_of("plt")
    found, some = evaluate(model, plt, ROWS, loss_tokens=25), evaluate(model, plt, ROWS[::2])
    everything = evaluate(model, plt, ROWS)
    assert (found.tokens, found.loss_tokens) == (54, 27)
    assert (everything.tokens, everything.loss_tokens) == (54, 54)
    assert found.loss == some.loss
    for layer in range(3):
        one, other = found.layers[layer], some.layers[layer]
        assert one.fvu == everything.layers[layer].fvu != other.fvu
        assert (one.loss_spliced, one.kl, one.recovered_zero) == (other.loss_spliced, other.kl, other.recovered_zero)
        assert one.loss_mean == pytest.approx(other.loss_mean, rel=0.1)
        assert one.loss_mean != other.loss_mean
    assert evaluate(model, plt, ROWS, loss_tokens=1).loss_tokens == 9
    with pytest.raises(InputError, match="loss_tokens=0 leaves nothing"):
        evaluate(model, plt, ROWS, loss_tokens=0)


def test_a_record_of_before_had_losses_on_all_tokens(model):
    record = evaluate(model, dictionaries_of("plt"), ROWS, loss_tokens=10).to_json()
    assert Evaluation.from_json(record).loss_tokens == 9
    del record["loss_tokens"]
    assert Evaluation.from_json(record).loss_tokens == record["tokens"] == 54


def test_a_record_of_before_had_the_cosine_alone_spread_over_features(model):
    record = evaluate(model, dictionaries_of("plt"), ROWS, loss_tokens=10).to_json()
    now = Evaluation.from_json(record).layers[0].alignment
    for layer in record["layers"]:
        new = layer["alignment"]
        layer["alignment"] = {
            "mean": new["cosine"], "below_half": new["cosine_below_half"], "product": new["product"],
            "bimodality": new["cosine_bimodality"],
        }  # fmt: skip
    before = Evaluation.from_json(record).layers[0].alignment
    assert (before.product, before.cosine, before.cosine_bimodality) == (now.product, now.cosine, now.cosine_bimodality)
    assert math.isnan(before.product_sd)
    assert now.product_sd > 0


def test_blocks_that_hand_on_more_than_the_stream_are_run_as_a_whole():
    """What the first MLP wrote reaches the last block past the stream, as cached keys and values may."""
    model, plt = random_model("llama", **SIZES, dtype=torch.float64), dictionaries_of("plt")
    assert list(streams_before(model, {0, 1, 2}, ROWS[:1])) == [1, 2]
    handed: list[torch.Tensor] = []
    model.bridge.blocks[0].mlp.register_forward_hook(lambda module, inputs, out: handed.append(out[0] * 3))
    model.bridge.blocks[2].mlp.register_forward_hook(lambda module, inputs, out: out + handed.pop() if handed else None)
    assert streams_before(model, {0, 1, 2}, ROWS[:1]) == {}
    found = evaluate(model, plt, ROWS).layers[1]
    for name, expected in by_whole_runs(model, plt, ROWS, 1).items():
        assert getattr(found, name) == pytest.approx(expected, rel=1e-9), name


# comparing predictions


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_float32_logits_are_compared_as_in_float64(scale):
    generator = torch.Generator().manual_seed(0)
    x = 5 * torch.randn(40, 3000, generator=generator) + 100
    y, targets = x + scale * torch.randn(x.shape, generator=generator), torch.randint(0, 3000, (40,))
    targets[7] = NO_TOKEN
    log_p, log_q = x.double().log_softmax(-1), y.double().log_softmax(-1)
    followed = targets != NO_TOKEN
    expected = -log_q[followed].gather(1, targets[followed, None]).sum()
    original, kl = Original(x, targets), float((log_p.exp() * (log_p - log_q)).sum())
    sums = original.against(y)
    assert sums.loss == original.loss_of(y) == pytest.approx(float(expected), rel=1e-9)
    assert original.loss == pytest.approx(float(-log_p[followed].gather(1, targets[followed, None]).sum()), rel=1e-9)
    assert sums.kl == pytest.approx(kl, abs=40 * 1e-8)
    assert sums.agreeing == int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
    same = original.against(x)
    assert (same.kl, same.agreeing) == (0, 40)


def test_the_last_position_of_a_row_predicts_nothing():
    assert next_tokens(torch.tensor([[3, 1, 2], [0, 5, 4]])).tolist() == [[1, 2, NO_TOKEN], [5, 4, NO_TOKEN]]


# cost


@pytest.mark.parametrize("kind", ["plt", "clt"])
@pytest.mark.parametrize("loss_tokens", [None, 64])
def test_the_cost_is_what_an_evaluation_computes(model, kind, loss_tokens):
    dictionaries = dictionaries_of(kind, features=64, skip=True)
    rows = torch.randint(1, 64, (16, 16), generator=torch.Generator().manual_seed(1))
    said = evaluation_cost(model, dictionaries, rows.numel(), context=16, loss_tokens=loss_tokens)
    with FlopCounterMode(display=False) as counter:
        evaluate(model, dictionaries, rows, loss_tokens=loss_tokens)
    assert said.flops == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_memory_follows_the_budget_and_not_the_tokens(model):
    plt = dictionaries_of("plt")
    counts, agreement = (100, 10**5, 10**7), {"jacobian_tokens": 100}
    costs = [evaluation_cost(model, plt, tokens, context=10, memory=10**6, **agreement) for tokens in counts]
    assert costs[1].bytes == costs[2].bytes <= 10**6
    assert costs[0].bytes <= costs[1].bytes
    without = [evaluation_cost(model, plt, tokens, context=10, jacobian_tokens=0).flops for tokens in counts]
    assert without[2] == pytest.approx(100 * without[1])
    nudges = [cost.flops - flops for cost, flops in zip(costs, without, strict=True)]
    assert nudges == pytest.approx([nudges[0]] * 3), "bounded whatever the tokens"
    assert evaluation_cost(model, plt, 10**5, context=10, memory=1).bytes < 2 * 10**5, "one row, one position at least"
    with pytest.raises(InputError, match="tokens=0"):
        evaluation_cost(model, plt, 0)
    with pytest.raises(InputError, match="memory=0"):
        evaluate(model, plt, ROWS, memory=0)


def test_sizes_are_those_of_the_weights():
    plt = dictionaries_of("plt", features=24, skip=True)
    assert DictionarySizes.of(plt) == (3, 3 * (2 * 24 * 16 + 16 * 16), 24)
    clt = dictionaries_of("clt", features=24, activation="jumprelu")
    assert DictionarySizes.of(clt) == (3, 24 * 16 * (3 + 6), 24)
    assert DictionarySizes.of(dictionaries_of("clt", features=24, activation="topk")).widest == 3 * 24


def test_positions_without_features_are_compared_all_the_same(model):
    plt = dictionaries_of("plt")
    plt.provenance = replace(plt.provenance, first=4)
    found = evaluate(model, plt, ROWS)
    assert (found.tokens, found.loss_tokens) == (6 * 6, 6 * 9)
