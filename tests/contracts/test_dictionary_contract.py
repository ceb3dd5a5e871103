"""Every kind of `DictionarySet`, with every activation, against explicit loops in float64."""

import pytest
import torch

from transcoders import DictionarySet, random_dictionaries, random_model
from transcoders.dictionaries import CrossLayerTranscoder, GroupMax, JumpReLU, JumpTopK, TopK
from transcoders.errors import DictionaryError

N_LAYERS, D_MODEL, FEATURES, POS, K = 3, 8, 12, 4, 4

CASES = [
    pytest.param({"kind": kind, "activation": activation, **extra}, id="-".join([kind, activation, *extra]))
    for kind in ("plt", "clt", "sae")
    for activation in ("relu", "jumprelu", "topk", "groupmax", "jumptopk")
    for extra in ([{}, {"centred": True}, {"centred": True, "skip": True}] if kind == "sae" else [{}, {"skip": True}])
]


@pytest.fixture(params=CASES)
def dictionaries(request):
    return random_dictionaries(
        **request.param, n_layers=N_LAYERS, d_model=D_MODEL, features=FEATURES, k=K, seed=3, dtype=torch.float64
    ).requires_grad_(False)


@pytest.fixture
def reads():
    return torch.randn(N_LAYERS, POS, D_MODEL, generator=torch.Generator().manual_seed(11), dtype=torch.float64)


def weights(dictionaries, layer):
    """The encoder, its biases, decoders by write layer and activation of one layer, straight from the parameters."""
    if isinstance(dictionaries, CrossLayerTranscoder):
        decoders = {layer + i: dictionaries.W_dec[layer][:, i] for i in range(N_LAYERS - layer)}
        return dictionaries.W_enc[layer], dictionaries.b_enc[layer], decoders, dictionaries.b_dec[layer]
    d = dictionaries[layer]
    return d.W_enc, d.b_enc, {layer: d.W_dec}, d.b_dec


def oracle_pre_activations(dictionaries, reads):
    h = torch.zeros(N_LAYERS, POS, FEATURES, dtype=torch.float64)
    for layer in range(N_LAYERS):
        W_enc, b_enc, _, b_dec = (w if isinstance(w, dict) else w.tolist() for w in weights(dictionaries, layer))
        centred = dictionaries.kind == "sae" and dictionaries[layer].centred
        for pos, x in enumerate(reads[layer].tolist()):
            if centred:
                x = [x[i] - b_dec[i] for i in range(D_MODEL)]
            for feature in range(FEATURES):
                h[layer, pos, feature] = sum(x[i] * W_enc[i][feature] for i in range(D_MODEL)) + b_enc[feature]
    return h


def oracle_activations(dictionaries, reads):
    h = oracle_pre_activations(dictionaries, reads)
    a = torch.zeros_like(h)
    over_layers = isinstance(dictionaries, CrossLayerTranscoder)
    for layer in range(N_LAYERS):
        sigma = dictionaries.activation if over_layers else dictionaries[layer].activation
        for pos in range(POS):
            rivals = (h[:, pos].flatten() if over_layers else h[layer, pos]).tolist()
            for feature, value in enumerate(h[layer, pos].tolist()):
                if isinstance(sigma, JumpReLU):
                    threshold = sigma.threshold[layer, feature] if over_layers else sigma.threshold[feature]
                    keep = value > float(threshold)
                elif isinstance(sigma, TopK):
                    keep = value > 0 and sum(rival > value for rival in rivals) < sigma.k
                elif isinstance(sigma, JumpTopK):
                    above = (h[layer, pos] - (sigma.threshold[layer] if over_layers else sigma.threshold)).tolist()
                    keep = above[feature] > 0 and sum(rival > above[feature] for rival in above) < sigma.k
                elif isinstance(sigma, GroupMax):
                    group = feature // (FEATURES // K) * (FEATURES // K)
                    keep = value > 0 and value >= max(h[layer, pos, group : group + FEATURES // K].tolist())
                else:
                    keep = value > 0
                a[layer, pos, feature] = value if keep else 0.0
    return a


def oracle_reconstruction(dictionaries, activations, reads):
    y = [[[0.0] * D_MODEL for _ in range(POS)] for _ in range(N_LAYERS)]
    for layer in range(N_LAYERS):
        _, _, decoders, b_dec = weights(dictionaries, layer)
        skip = dictionaries.skip(layer)
        read, a, b_dec = reads[layer].tolist(), activations[layer].tolist(), b_dec.tolist()
        for pos in range(POS):
            for d in range(D_MODEL):
                y[layer][pos][d] += b_dec[d]
                if skip is not None:
                    y[layer][pos][d] += sum(read[pos][i] * float(skip[i, d]) for i in range(D_MODEL))
        for write_layer, W_dec in ((target, W.tolist()) for target, W in decoders.items()):
            for pos in range(POS):
                for d in range(D_MODEL):
                    y[write_layer][pos][d] += sum(a[pos][f] * W_dec[f][d] for f in range(FEATURES))
    return torch.tensor(y, dtype=torch.float64)


def dense(features):
    a = torch.zeros(N_LAYERS, POS, FEATURES, dtype=torch.float64)
    a[tuple(features.index.T)] = features.value
    return a


def test_it_is_a_dictionary_set(dictionaries):
    assert isinstance(dictionaries, DictionarySet)
    assert (dictionaries.n_layers, dictionaries.d_model) == (N_LAYERS, D_MODEL)
    assert [dictionaries.n_features(layer) for layer in range(N_LAYERS)] == [FEATURES] * N_LAYERS
    assert [site.layer for site in dictionaries.reads] == list(range(N_LAYERS))


def test_encode_agrees_with_loops(dictionaries, reads):
    with torch.no_grad():
        features = dictionaries.encode(reads)
        torch.testing.assert_close(dense(features), oracle_activations(dictionaries, reads))
    assert 0 < len(features.value) < N_LAYERS * POS * FEATURES
    assert bool((features.value > 0).all())


def test_features_are_sorted_by_layer_position_and_feature(dictionaries, reads):
    rows = dictionaries.encode(reads).index.tolist()
    assert rows == sorted(rows)


def test_reconstruct_agrees_with_loops(dictionaries, reads):
    with torch.no_grad():
        features = dictionaries.encode(reads)
        expected = oracle_reconstruction(dictionaries, oracle_activations(dictionaries, reads), reads)
        torch.testing.assert_close(dictionaries.reconstruct(features, reads), expected)


def test_rows_and_biases_rebuild_the_pre_activations(dictionaries, reads):
    every = torch.arange(FEATURES)
    expected = oracle_pre_activations(dictionaries, reads)
    for layer in range(N_LAYERS):
        h = reads[layer] @ dictionaries.encoder_rows(layer, every).T + dictionaries.encoder_biases(layer, every)
        torch.testing.assert_close(h, expected[layer])
        torch.testing.assert_close(dictionaries.pre_activations(layer, reads[layer]), expected[layer])


def test_decoder_rows_biases_and_skips_rebuild_the_reconstruction(dictionaries, reads):
    a = oracle_activations(dictionaries, reads)
    every = torch.arange(FEATURES)
    y = torch.stack([dictionaries.decoder_bias(layer).repeat(POS, 1) for layer in range(N_LAYERS)])
    for layer in range(N_LAYERS):
        for target in dictionaries.write_layers(layer):
            y[target] += a[layer] @ dictionaries.decoder_rows(layer, every, target)
        if (skip := dictionaries.skip(layer)) is not None:
            y[layer] += reads[layer] @ skip
    torch.testing.assert_close(y, oracle_reconstruction(dictionaries, a, reads))


def test_one_layer_decoded_agrees_with_its_decoder_rows(dictionaries, reads):
    a = oracle_activations(dictionaries, reads)
    every = torch.arange(FEATURES)
    for layer in range(N_LAYERS):
        parts = dictionaries.decode_layer(layer, a[layer])
        for i, target in enumerate(dictionaries.write_layers(layer)):
            torch.testing.assert_close(parts[:, i], a[layer] @ dictionaries.decoder_rows(layer, every, target))


def test_one_layer_encoded_agrees_with_all_or_is_refused(dictionaries, reads):
    if dictionaries.kind == "clt" and isinstance(dictionaries.activation, TopK):
        with pytest.raises(DictionaryError, match="ranks the features of all layers"):
            dictionaries.activations(0, reads[0])
        return
    expected = oracle_activations(dictionaries, reads)
    for layer in range(N_LAYERS):
        torch.testing.assert_close(dictionaries.activations(layer, reads[layer]), expected[layer])


def test_a_selection_of_features_is_a_selection_of_rows(dictionaries):
    chosen = torch.tensor([7, 2, 2])
    every = torch.arange(FEATURES)
    rows = dictionaries.encoder_rows(1, every)[chosen]
    torch.testing.assert_close(dictionaries.encoder_rows(1, chosen), rows)
    torch.testing.assert_close(dictionaries.decoder_rows(1, chosen, 1), dictionaries.decoder_rows(1, every, 1)[chosen])


def test_a_write_layer_it_does_not_write_to_is_refused(dictionaries):
    with pytest.raises(DictionaryError, match="asked for 0"):
        dictionaries.decoder_rows(1, torch.tensor([0]), 0)
    with pytest.raises(DictionaryError, match="asked for 3"):
        dictionaries.decoder_rows(2, torch.tensor([0]), 3)


def test_no_active_feature_leaves_the_biases(dictionaries, reads):
    features = dictionaries.encode(reads)
    none = type(features)(features.index[:0], features.value[:0])
    expected = oracle_reconstruction(dictionaries, torch.zeros(N_LAYERS, POS, FEATURES, dtype=torch.float64), reads)
    torch.testing.assert_close(dictionaries.reconstruct(none, reads), expected)


def test_reads_are_required_only_by_a_skip_term(dictionaries, reads):
    features = dictionaries.encode(reads)
    if dictionaries.skip(0) is not None:
        with pytest.raises(DictionaryError, match="reads"):
            dictionaries.reconstruct(features)
    else:
        n_pos = int(features.index[:, 1].max()) + 1
        torch.testing.assert_close(
            dictionaries.reconstruct(features), dictionaries.reconstruct(features, reads)[:, :n_pos]
        )


def test_precision_follows_to(dictionaries, reads):
    dictionaries.to(torch.float32)
    features = dictionaries.encode(reads.float())
    assert features.value.dtype == torch.float32
    assert dictionaries.reconstruct(features, reads.float()).dtype == torch.float32


def test_it_fits_its_model_and_no_other(dictionaries):
    dictionaries.check_fits(random_model(n_layers=N_LAYERS, d_model=D_MODEL))
    with pytest.raises(DictionaryError, match="width 8.*width 16"):
        dictionaries.check_fits(random_model(n_layers=N_LAYERS, d_model=16))
    with pytest.raises(DictionaryError, match="3 layers.*2 layers"):
        dictionaries.check_fits(random_model(n_layers=2, d_model=D_MODEL))
