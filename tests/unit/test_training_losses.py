"""Losses, dead latents, the folding of scales and of TopK."""

import itertools
from contextlib import nullcontext

import pytest
import torch

from tests.device import device_form
from transcoders import CLTConfig, SAEConfig, TopK, TranscoderConfig, fold_topk, random_dictionaries
from transcoders.dictionaries import DictionaryProvenance, JumpReLU
from transcoders.errors import DictionaryError
from transcoders.sites import Site
from transcoders.training.codes import DenseCode
from transcoders.training.export import Scales, export
from transcoders.training.initialise import initial_parameters, measure_scales
from transcoders.training.losses import losses
from transcoders.training.revival import auxk_size, never_fired, revival_loss
from transcoders.training.sparsity import sparsity_penalty

N_LAYERS, D_MODEL, FEATURES, BATCH = 3, 6, 10, 64
CONFIGS = {"clt": CLTConfig, "plt": TranscoderConfig, "sae": SAEConfig}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_parameters(config, seed=0):
    """All parameters random, so that no term is zero by its first value."""
    built = initial_parameters(config, draw(BATCH, N_LAYERS, D_MODEL), draw(BATCH, N_LAYERS, D_MODEL, seed=1))
    generator = torch.Generator().manual_seed(seed)
    for parameter in built.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = noise.abs() if parameter is getattr(built.activation, "threshold", None) else noise
    built.constrain()
    return built


def config(kind, activation="jumprelu", **options):
    return CONFIGS[kind](features=FEATURES, activation=activation, **{"k": 4, "k_aux": 3, **options})


def no_dead():
    return torch.zeros(N_LAYERS, FEATURES, dtype=torch.bool)


def stacked_norms(built):
    """By loops: of every feature, the norm of all its decoders together."""
    norms = torch.zeros(N_LAYERS, FEATURES, dtype=torch.float64)
    for layer, W_dec in enumerate(built.W_dec):
        for feature in range(FEATURES):
            norms[layer, feature] = sum(float(v) ** 2 for v in W_dec[feature].detach().flatten()) ** 0.5
    return norms


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clt", "plt", "sae"])
def test_the_sparsity_penalties_by_loops(kind):
    for activation in ("relu", "jumprelu"):
        settings = config(kind, activation, tanh_scale=3.0)
        built = random_parameters(settings)
        a = draw(N_LAYERS, 5, FEATURES, seed=2).abs()
        norms = stacked_norms(built)
        total = 0.0
        for layer in range(N_LAYERS):
            for token in range(5):
                for feature in range(FEATURES):
                    share = a[layer, token, feature] * norms[layer, feature] / D_MODEL**0.5
                    total += float(torch.tanh(3.0 * share)) if activation == "jumprelu" else float(share)
        assert float(sparsity_penalty(built, DenseCode(a, a), settings)) == pytest.approx(total / (N_LAYERS * 5))
    assert float(sparsity_penalty(random_parameters(config(kind, "topk")), DenseCode(a, a), config(kind, "topk"))) == 0


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clt", "plt"])
def test_what_a_part_of_the_features_writes(kind):
    """Ranks that share features may have none of those before a prefix."""
    built, a = random_parameters(config(kind, "relu")), draw(N_LAYERS, 5, FEATURES)
    for first, last in ((0, 0), (0, 4), (4, 10), (0, None), (7, None)):
        kept = torch.zeros(FEATURES, dtype=torch.float64)
        kept[first:last] = 1
        torch.testing.assert_close(built.decode(a, first, last), built.decode(a * kept))


@torch.no_grad()
def test_the_penalty_is_blind_to_rescaling_features():
    settings = config("clt", "relu")
    built = random_parameters(settings)
    a = draw(N_LAYERS, 5, FEATURES).abs()
    before = float(sparsity_penalty(built, DenseCode(a, a), settings))
    for W_dec in built.W_dec:
        W_dec.data *= 4
    assert float(sparsity_penalty(built, DenseCode(a, a / 4), settings)) == pytest.approx(before)


@torch.no_grad()
def test_the_reconstruction_loss_is_the_unexplained_variance_of_each_layer():
    settings = config("clt", "relu")
    built = random_parameters(settings)
    reads = draw(N_LAYERS, 200, D_MODEL)
    scale = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)[:, None, None]
    writes = scale * draw(N_LAYERS, 200, D_MODEL, seed=3)
    scales = measure_scales(reads.transpose(0, 1), writes.transpose(0, 1))
    normalised = writes * scales.write[:, None, None]
    result = losses(built, reads, normalised, settings, sparsity_weight=0.0, dead=no_dead())
    reconstruction = built.reconstruct(built.activate(built.pre_activations(reads)), reads)
    original = reconstruction / scales.write[:, None, None]
    mean = writes.mean(dim=1, keepdim=True)
    expected = (writes - original).square().sum(dim=(1, 2)) / (writes - mean).square().sum(dim=(1, 2))
    torch.testing.assert_close(result.fvu, expected)
    assert float(result.total) == pytest.approx(float(expected.mean()))


@pytest.mark.parametrize("remedy", ["auxiliary", "ghost"])
@pytest.mark.parametrize("activation", ["topk", "jumprelu", "relu"])
@pytest.mark.parametrize("kind", ["clt", "plt"])
def test_revival_gives_the_encoder_of_dead_latents_and_of_no_other_a_gradient(kind, activation, remedy):
    settings = config(kind, activation, remedy=remedy)
    built = random_parameters(settings)
    built.b_enc.data -= 100.0  # so low that nothing ever fires
    dead = no_dead()
    dead[1, [2, 5]] = True
    reads, error = draw(N_LAYERS, 8, D_MODEL), draw(N_LAYERS, 8, D_MODEL, seed=4)
    h = built.pre_activations(reads)
    assert not built.activate(h).any()
    loss = revival_loss(built, DenseCode(h, h), reads, error, dead, settings)
    loss.backward()
    gradient = built.W_enc.grad
    assert gradient is not None
    reached = gradient.abs().sum(dim=2) > 0
    assert torch.equal(reached, dead)


@pytest.mark.parametrize("kind", ["clt", "plt"])
def test_ghosts_are_the_same_however_large_their_pre_activations(kind):
    """Also where exp overflows, on the processor and in the device's form."""
    settings = config(kind, "relu", remedy="ghost")
    built = random_parameters(settings)
    dead = no_dead()
    dead[:2, [1, 4]] = True
    reads, error = draw(N_LAYERS, 8, D_MODEL), draw(N_LAYERS, 8, D_MODEL, seed=4)
    found = []
    for bias, form in itertools.product((0.0, 900.0), (nullcontext, device_form)):
        built.zero_grad()
        built.b_enc.data += bias
        h = built.pre_activations(reads)
        with form():
            loss = revival_loss(built, DenseCode(h, h), reads, error, dead, settings)
        loss.backward()
        grads = [p.grad for p in (built.W_enc, *built.W_dec) if p.grad is not None]
        found.append((loss.detach(), *grads))
        built.b_enc.data -= bias
    sizes = error[: 3 if kind == "clt" else 2].square().sum() / (N_LAYERS * 8 * D_MODEL)
    torch.testing.assert_close(found[0][0], sizes)  # as large as the reconstruction's, of the layers they write to
    for other in found[1:]:
        for first, value in zip(found[0], other, strict=True):
            torch.testing.assert_close(value, first)


def test_ghosts_rise_on_the_whole_only_where_they_point_along_the_residual():
    """In closed form: the sum of ∂L/∂h over dead latents is ∝ ‖s ĝ‖² − ⟨e, s ĝ⟩, negative where the cosine > 1/2."""
    settings = config("plt", "relu", remedy="ghost")
    built = random_parameters(settings)
    dead = no_dead()
    dead[:, [1, 4, 6]] = True
    reads = draw(N_LAYERS, BATCH, D_MODEL)
    h = built.pre_activations(reads).detach().requires_grad_(True)
    ghost = built.decode(h.detach().exp() * dead.unsqueeze(1)).detach()
    error = draw(N_LAYERS, BATCH, D_MODEL, seed=4) + ghost / ghost.norm(dim=2, keepdim=True)
    revival_loss(built, DenseCode(h, h), reads, error, dead, settings).backward()
    gradient = h.grad
    assert gradient is not None
    above = torch.cosine_similarity(ghost, error, dim=2) > 0.5
    assert 10 < int(above.sum()) < above.numel() - 10
    assert torch.equal(gradient.sum(dim=2) < 0, above)


def test_the_papers_size_of_auxk_is_a_power_of_two_next_to_half_the_width():
    sizes = {d_model: auxk_size(config("sae", "topk", k_aux=0), d_model) for d_model in (1, 6, 128, 768, 4096)}
    assert sizes == {1: 1, 6: 2, 128: 64, 768: 256, 4096: 2048}
    assert auxk_size(config("sae", "topk", k_aux=5), 768) == 5


def test_revival_pulls_dead_latents_over_their_threshold():
    settings = config("plt", "jumprelu", revival=1.0)
    built = random_parameters(settings)
    built.b_enc.data[0, 3] = -30.0
    dead = no_dead()
    dead[0, 3] = True
    reads, writes = draw(N_LAYERS, 32, D_MODEL), draw(N_LAYERS, 32, D_MODEL, seed=1)
    optimizer = torch.optim.Adam(built.parameters(), lr=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        losses(built, reads, writes, settings, sparsity_weight=0.0, dead=dead).total.backward()
        optimizer.step()
    assert bool((built.activate(built.pre_activations(reads))[0, :, 3] > 0).any())


@torch.no_grad()
def test_auxk_predicts_the_residual_by_loops():
    settings = config("plt", "topk", k_aux=2)
    built = random_parameters(settings)
    dead = no_dead()
    dead[:, [1, 4, 7]] = True
    reads, error = draw(N_LAYERS, 5, D_MODEL), draw(N_LAYERS, 5, D_MODEL, seed=4)
    h = built.pre_activations(reads)
    ratio = 0.0
    for layer in range(N_LAYERS):
        squared, total = 0.0, 0.0
        for token in range(5):
            chosen = sorted([1, 4, 7], key=lambda f: -float(h[layer, token, f]))[:2]
            predicted = sum(h[layer, token, f] * built.W_dec[layer][f, 0] for f in chosen)
            squared += float((error[layer, token] - predicted).square().sum())
            total += float(error[layer, token].square().sum())
        ratio += squared / total / N_LAYERS
    loss = revival_loss(built, DenseCode(h, h), reads, error, dead, settings)
    assert float(loss) == pytest.approx(ratio)


def test_auxk_with_fewer_dead_latents_than_it_may_choose_is_finite():
    settings = config("clt", "topk", k_aux=8)
    built = random_parameters(settings)
    dead = no_dead()
    dead[0, 0] = True
    reads = draw(N_LAYERS, 5, D_MODEL)
    h = built.pre_activations(reads)
    loss = revival_loss(built, DenseCode(h, h), reads, draw(N_LAYERS, 5, D_MODEL), dead, settings)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(bool(torch.isfinite(p.grad).all()) for p in built.parameters() if p.grad is not None)


def test_a_latent_is_dead_once_it_has_not_fired_for_long_enough():
    counter = never_fired(1, 3, dead_after=20, device=torch.device("cpu"))
    fired = torch.tensor([[True, False, False]])
    counter.update(fired, tokens=10)
    assert counter.dead.tolist() == [[False, False, False]]
    counter.update(fired, tokens=10)
    assert counter.dead.tolist() == [[False, True, True]]
    counter.update(~fired, tokens=10)
    assert counter.dead.tolist() == [[False, False, False]]


def test_topk_decoders_keep_unit_norm_and_thresholds_stay_non_negative():
    torch.testing.assert_close(
        random_parameters(config("clt", "topk")).decoder_norms(), torch.ones(3, 10, dtype=torch.float64)
    )
    built = random_parameters(config("plt", "jumprelu"))
    assert isinstance(built.activation, JumpReLU)
    built.activation.threshold.data -= 10
    built.constrain()
    assert float(built.activation.threshold.detach().min()) == 0


@torch.no_grad()
@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize("kind", ["clt", "plt", "sae"])
def test_folding_the_scales_changes_neither_features_nor_outputs(kind, activation):
    options = {} if kind == "sae" else {"skip": True}
    settings = config(kind, activation, **options)
    built = random_parameters(settings)
    scales = Scales(draw(N_LAYERS, seed=8).abs() + 0.1, draw(N_LAYERS, seed=9).abs() + 0.1)
    if kind == "sae":
        scales = Scales(scales.read, scales.read)
    reads = draw(N_LAYERS, 7, D_MODEL, seed=5)
    sites = [Site(i, "mlp_in") for i in range(N_LAYERS)], [Site(i, "mlp_out") for i in range(N_LAYERS)]
    folded = export(built, settings.kind, scales, *sites, DictionaryProvenance(model="test"))
    normalised = reads * scales.read[:, None, None]
    a = built.activate(built.pre_activations(normalised))
    features = folded.encode(reads)
    torch.testing.assert_close(features.value, a[tuple(features.index.T)])
    assert len(features.value) == int((a > 0).sum())
    expected = built.reconstruct(a, normalised) / scales.write[:, None, None]
    torch.testing.assert_close(folded.reconstruct(features, reads), expected)


@pytest.mark.parametrize("kind", ["clt", "plt"])
def test_folding_topk_keeps_k_features_on_average(kind):
    dictionaries = random_dictionaries(kind, n_layers=3, d_model=16, features=40, activation="topk", k=9)
    reads = torch.randn(3, 200, 16, generator=torch.Generator().manual_seed(0))
    folded = fold_topk(dictionaries, reads)
    per_token = len(folded.encode(reads).value) / 200
    assert per_token == pytest.approx(9 if kind == "clt" else 27, abs=0.05)
    folded.activations(0, reads[0])
    with pytest.raises(DictionaryError, match="'jumprelu'"):
        fold_topk(folded, reads)


def test_folding_topk_of_each_layer_keeps_k_in_each():
    clt = random_dictionaries("clt", n_layers=3, d_model=16, features=40, activation="topk")
    clt.activation = TopK(9)
    clt.b_enc.data += torch.tensor([0.0, 5.0, -1.0])[:, None]
    reads = torch.randn(3, 200, 16, generator=torch.Generator().manual_seed(0))
    features = fold_topk(clt, reads).encode(reads)
    for layer, most in enumerate((9, 9, None)):
        count = len(features.of_layer(layer).value) / 200
        assert count == pytest.approx(9, abs=0.05) if most else count <= 9
