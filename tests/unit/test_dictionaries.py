"""Activation functions, their gradients, and what dictionaries refuse."""

from dataclasses import replace

import pytest
import torch

from transcoders import random_dictionaries, random_model
from transcoders.dictionaries import (
    SAE,
    CrossLayerTranscoder,
    DictionaryProvenance,
    GroupMax,
    JumpReLU,
    JumpTopK,
    ReLU,
    TopK,
    Transcoder,
    TranscoderSet,
)
from transcoders.errors import DictionaryError
from transcoders.sites import Frame, Site


def pre_activations(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_relu_keeps_exactly_the_positive_part():
    h = pre_activations(5, 7)
    assert torch.equal(ReLU()(h), torch.where(h > 0, h, 0.0))


def test_jumprelu_jumps():
    sigma = JumpReLU(torch.tensor([0.5, 0.5, 0.0]))
    # Above the threshold the value itself, not the excess over it; at the threshold, nothing.
    assert torch.equal(sigma(torch.tensor([0.6, 0.5, 0.1])), torch.tensor([0.6, 0.0, 0.1]))


def test_jumprelu_gradients_agree_with_the_straight_through_estimate_by_loops():
    bandwidth = 0.4
    threshold = torch.tensor([0.1, 0.3, 0.7, 1.0], dtype=torch.float64)
    h = (threshold + 0.5 * pre_activations(50, 4)).requires_grad_(True)
    sigma = JumpReLU(threshold.clone(), bandwidth)
    upstream = pre_activations(50, 4, seed=1)
    sigma(h).backward(upstream)
    expected_h = torch.zeros(50, 4, dtype=torch.float64)
    expected_threshold = torch.zeros(4, dtype=torch.float64)
    for i in range(50):
        for j in range(4):
            value, theta = float(h.detach()[i, j]), float(threshold[j])
            if value > theta:
                expected_h[i, j] = upstream[i, j]
            if abs(value - theta) / bandwidth < 0.5:
                expected_threshold[j] -= theta / bandwidth * upstream[i, j]
    assert h.grad is not None
    assert sigma.threshold.grad is not None
    torch.testing.assert_close(h.grad, expected_h)
    torch.testing.assert_close(sigma.threshold.grad, expected_threshold)
    assert float(expected_threshold.abs().min()) > 0


def test_jumprelu_threshold_gradient_estimates_the_slope_of_the_expectation():
    # Over a smooth density of pre-activations the straight-through estimate must be the derivative of E[a] by θ.
    h = torch.randn(400_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma = JumpReLU(torch.tensor([0.8], dtype=torch.float64), bandwidth=0.1)
    sigma(h).mean().backward()
    density = float(torch.exp(torch.tensor(-(0.8**2) / 2)) / (2 * torch.pi) ** 0.5)
    assert sigma.threshold.grad is not None
    assert float(sigma.threshold.grad) == pytest.approx(-0.8 * density, rel=0.02)


def test_jumprelu_thresholds_of_a_cross_layer_stack_belong_to_their_layer():
    h = torch.full((3, 2, 4), 0.5)
    sigma = JumpReLU(torch.tensor([[0.4] * 4, [0.6] * 4]))
    assert torch.equal(sigma(h)[:, 0] > 0, torch.ones(3, 4, dtype=torch.bool))
    assert torch.equal(sigma(h)[:, 1], torch.zeros(3, 4))
    assert torch.equal(sigma.at_layer(1)(h[:, 1]), torch.zeros(3, 4))


def test_topk_keeps_the_k_largest_of_each_token():
    h = pre_activations(20, 10).abs()
    a = TopK(3)(h)
    assert torch.equal((a > 0).sum(dim=-1), torch.full((20,), 3))
    for row, kept in zip(h, a, strict=True):
        assert sorted(kept[kept > 0].tolist()) == sorted(row.tolist())[-3:]


def test_topk_never_keeps_a_negative_value():
    a = TopK(5)(torch.tensor([[3.0, -1.0, -2.0, -3.0, -4.0, -5.0]]))
    assert torch.equal(a, torch.tensor([[3.0, 0, 0, 0, 0, 0]]))


def test_topk_over_layers_ranks_all_layers_of_a_token_together():
    h = torch.tensor([[[9.0, 8.0, 7.0], [1.0, 2.0, 3.0]]])
    assert torch.equal(TopK(2, over_layers=True)(h), torch.tensor([[[9.0, 8.0, 0.0], [0.0, 0.0, 0.0]]]))
    assert torch.equal(TopK(2)(h), torch.tensor([[[9.0, 8.0, 0.0], [0.0, 2.0, 3.0]]]))


@pytest.mark.parametrize("sigma", [TopK(3), GroupMax(3)], ids=["topk", "groupmax"])
def test_gradients_reach_only_what_was_kept(sigma):
    h = pre_activations(6, 9).abs().requires_grad_(True)
    a = sigma(h)
    a.sum().backward()
    assert h.grad is not None
    assert torch.equal(h.grad, (a > 0).double())


def test_topk_of_each_layer_needs_no_other():
    clt = random_dictionaries("clt", n_layers=3, d_model=6, features=12, activation="topk", k=4, dtype=torch.float64)
    reads = pre_activations(3, 5, 6)
    for sigma in (TopK(4), GroupMax(4), JumpTopK(4, pre_activations(3, 12, seed=4).abs() / 4)):
        clt.activation = sigma
        together = clt.encode_dense(reads)
        assert (together > 0).any(dim=-1).all()
        for layer in range(3):
            torch.testing.assert_close(clt.activations(layer, reads[layer]), together[layer])
    with pytest.raises(DictionaryError, match="ranks the features of all layers together"):
        TopK(4, over_layers=True).at_layer(1)


def test_groupmax_keeps_the_largest_of_each_group():
    h = torch.tensor([[1.0, 3.0, 2.0, -1.0, -3.0, -2.0], [5.0, 5.0, 0.0, 0.0, 0.0, 0.5]])
    a = GroupMax(2)(h)
    assert torch.equal(a[0], torch.tensor([0, 3.0, 0, 0, 0, 0]))
    assert sorted(a[1].tolist()) == [0, 0, 0, 0, 0.5, 5.0]
    assert torch.equal(GroupMax(6)(h), torch.relu(h))


def test_jumptopk_ranks_what_is_above_the_thresholds():
    sigma = JumpTopK(2, torch.tensor([0.0, 2.5, 0.1, 0.0]))
    a = sigma(torch.tensor([[1.0, 3.0, 0.7, 0.5], [-1.0, 2.0, 0.1, 0.2]]))
    assert torch.equal(a, torch.tensor([[1.0, 0, 0.7, 0], [0, 0, 0, 0.2]]))
    h = pre_activations(30, 8)
    assert torch.equal(JumpTopK(3, torch.zeros(8))(h), TopK(3)(h))
    threshold = pre_activations(8, seed=3).abs()
    assert torch.equal(JumpTopK(8, threshold)(h), JumpReLU(threshold)(h))
    with pytest.raises(DictionaryError, match="k = 0"):
        JumpTopK(0, threshold)


@pytest.mark.parametrize("k", [0, 5])
def test_groups_are_of_one_size(k):
    with pytest.raises(DictionaryError, match=rf"k = {k}"):
        random_dictionaries("plt", features=12, activation="groupmax", k=k)
    with pytest.raises(DictionaryError, match=rf"k = {k}"):
        random_dictionaries("clt", features=12, activation="groupmax", k=k)


def test_an_sae_that_centres_reads_the_difference_from_its_bias():
    weights = {
        "W_enc": pre_activations(4, 6),
        "b_enc": pre_activations(6),
        "W_dec": pre_activations(6, 4),
        "b_dec": pre_activations(4),
    }
    sae = SAE(**weights, activation=ReLU(), site=Site(0, "resid_post"), centred=True, norm=None)
    x = pre_activations(3, 4, seed=5)
    expected = torch.relu((x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"])
    torch.testing.assert_close(sae.encode(x), expected)


def test_a_transcoder_does_not_centre_its_input():
    transcoder = random_dictionaries("plt", dtype=torch.float64)[0]
    x = pre_activations(3, 32)
    before = transcoder.encode(x)
    transcoder.b_dec.data += 1.0
    assert torch.equal(transcoder.encode(x), before)


def test_decoding_a_skip_transcoder_needs_its_input():
    transcoder = random_dictionaries("plt", skip=True)[0]
    with pytest.raises(DictionaryError, match="needs its input"):
        transcoder.decode(torch.zeros(1, 64))


def test_weights_that_disagree_are_refused_with_their_shapes():
    with pytest.raises(DictionaryError, match=r"W_dec \[5, 4\]"):
        Transcoder(
            W_enc=torch.zeros(4, 6), b_enc=torch.zeros(6), W_dec=torch.zeros(5, 4), b_dec=torch.zeros(4),
            activation=ReLU(), read=Site(0, "mlp_in"), write=Site(0, "mlp_out"),
        )  # fmt: skip


def test_a_cross_layer_transcoder_needs_a_decoder_for_every_later_layer():
    clt = random_dictionaries("clt", n_layers=2, d_model=4, features=5)
    assert isinstance(clt, CrossLayerTranscoder)
    with pytest.raises(DictionaryError, match="feature, L − l, d_model"):
        CrossLayerTranscoder(
            W_enc=clt.W_enc, b_enc=clt.b_enc, W_dec=list(clt.W_dec)[::-1], b_dec=clt.b_dec,
            activation=ReLU(), provenance=clt.provenance,
        )  # fmt: skip


def test_dictionaries_of_another_frame_are_refused_and_of_other_weights_named(caplog):
    model = random_model()
    plt = random_dictionaries("plt")
    assert isinstance(plt, TranscoderSet)
    plt.provenance = replace(plt.provenance, frame=Frame("folded"))
    with pytest.raises(DictionaryError, match="'folded' frame"):
        plt.check_fits(model)
    plt.provenance = replace(plt.provenance, frame=model.frame, fingerprint="0123456789abcdef")
    plt.check_fits(model)
    assert (
        f"weights 0123456789abcdef; {model.name} has the same sizes, but weights {model.fingerprint()}" in caplog.text
    )
    caplog.clear()
    plt.provenance = replace(plt.provenance, fingerprint=model.fingerprint())
    plt.check_fits(model)
    assert not caplog.text


def test_the_first_position_with_features_counts_from_zero():
    with pytest.raises(DictionaryError, match="first=-1"):
        DictionaryProvenance(model="x", first=-1)


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_layer_that_is_not_there_is_refused(layer):
    for kind in ("plt", "clt"):
        with pytest.raises(DictionaryError, match=f"no layer {layer}"):
            random_dictionaries(kind).decoder_bias(layer)
