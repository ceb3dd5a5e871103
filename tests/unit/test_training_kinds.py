"""The property that makes each kind of dictionary what it is; each test fails where that property is lost."""

import json
from typing import Any

import pytest
import torch

import transcoders
from transcoders import CLTConfig, SAEConfig, SAESet, TranscoderConfig
from transcoders.dictionaries import DictionaryProvenance, JumpReLU, ReLU, TopK
from transcoders.sites import Site
from transcoders.training.activations import BatchTopK, Gated, kth_largest
from transcoders.training.codes import DenseCode
from transcoders.training.config import PENALTIES
from transcoders.training.export import Scales, export
from transcoders.training.initialise import initial_parameters
from transcoders.training.losses import losses
from transcoders.training.parameters import TrainingParameters, aligned_to
from transcoders.training.sparsity import SparsityController, exponent, p_norm, sparsity_penalty
from transcoders.training.step import Run

D_MODEL, FEATURES = 16, 24
CONFIGS: dict[str, Any] = {"clt": CLTConfig, "plt": TranscoderConfig, "sae": SAEConfig}


def fitted(data, config) -> Any:
    return transcoders.train(None, data, config, progress=False)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sparse_vectors(n=4096, seed=0):
    """Sums of few of 24 known directions."""
    generator = torch.Generator().manual_seed(9)
    directions = torch.nn.functional.normalize(torch.randn(FEATURES, D_MODEL, generator=generator), dim=1)
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(n, FEATURES, generator=generator) < 3 / FEATURES
    return (active * (0.5 + torch.rand(n, FEATURES, generator=generator))) @ directions + 0.3


def small(kind="sae", **options) -> Any:
    return CONFIGS[kind](**{"features": FEATURES, "tokens": 60_000, "batch": 256, "lr": 5e-3, "k": 3, **options})


def random_parameters(config, n_layers=2, seed=0):
    built = initial_parameters(config, draw(64, n_layers, D_MODEL), draw(64, n_layers, D_MODEL, seed=1))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in built.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = noise.abs() if "threshold" in name else noise
    built.constrain()
    return built


def exported(config, weights, n_layers=2) -> Any:
    ones = torch.ones(n_layers, dtype=torch.float64)
    if config.kind == "sae":
        reads = writes = [Site(i, "resid_post") for i in range(n_layers)]
    else:
        reads, writes = ([Site(i, kind) for i in range(n_layers)] for kind in ("mlp_in", "mlp_out"))
    return export(weights, config.kind, Scales(ones, ones), reads, writes, DictionaryProvenance(model="test"))


# L1


def test_with_unit_l1_the_gradient_is_orthogonal_to_the_decoders_and_their_norm_stays_one():
    config = small("clt", activation="relu", penalty="unit_l1")
    built = random_parameters(config)
    x, y = draw(2, 32, D_MODEL, seed=3), draw(2, 32, D_MODEL, seed=4)
    losses(built, x, y, config, sparsity_weight=0.1, dead=None).total.backward()
    grads = [w.grad for w in built.W_dec if w.grad is not None]
    along = [(g.flatten(1) * w.flatten(1)).sum(1).abs().max() for g, w in zip(grads, built.W_dec, strict=True)]
    assert min(float(a.detach()) for a in along) > 1e-4
    built.project_gradients()
    for g, w in zip(grads, built.W_dec, strict=True):
        assert float((g.flatten(1) * w.detach().flatten(1)).sum(1).abs().max()) < 1e-12
        assert float(g.abs().max()) > 1e-4
    dictionaries = fitted(sparse_vectors(), small(activation="relu", penalty="unit_l1", tokens=5_000))
    scale = dictionaries.provenance.normalisation["write"][0]
    torch.testing.assert_close(dictionaries[0].W_dec.norm(dim=1) * scale, torch.ones(FEATURES))


def test_the_l1_of_activations_times_norms_leaves_decoders_free_and_gives_them_a_gradient():
    config = small(activation="relu", penalty="l1")
    built = random_parameters(config)
    built.constrain()
    assert float(built.decoder_norms().detach().std()) > 0.1
    sparsity_penalty(built, DenseCode.of(built, draw(2, 32, D_MODEL)), config).backward()
    assert all(w.grad is not None and float(w.grad.abs().sum()) > 0 for w in built.W_dec)


def test_a_centred_encoder_reads_the_difference_from_the_bias_and_is_exported_as_such():
    config = small(centred=True, activation="relu")
    built = random_parameters(config)
    x = draw(2, 10, D_MODEL, seed=5)
    by_hand = torch.einsum("lbd,lfd->lbf", x - built.b_dec[:, None], built.W_enc) + built.b_enc[:, None]
    torch.testing.assert_close(built.pre_activations(x), by_hand)
    saes = exported(config, built)
    assert isinstance(saes, SAESet)
    assert all(sae.centred for sae in saes.layers)
    torch.testing.assert_close(saes.activations(1, x[1]), torch.relu(by_hand[1]).detach())


# gated


@pytest.mark.parametrize("kind", ["sae", "plt", "clt"])
def test_a_gated_dictionary_is_exported_as_jumprelu_with_the_same_outputs(kind):
    config = small(kind, activation="gated")
    built = random_parameters(config)
    assert isinstance(built.activation, Gated)
    x = draw(2, 200, D_MODEL, seed=5)
    a = built.activate(built.pre_activations(x))
    dictionaries = exported(config, built)
    features = dictionaries.encode(x)
    torch.testing.assert_close(features.value, a[tuple(features.index.T)].detach())
    assert len(features.value) == int((a > 0).sum())
    closed = (built.pre_activations(x) > 0) & (a == 0)
    assert bool(closed.any())  # gate open, magnitude zero: the threshold must not fall below zero there
    torch.testing.assert_close(dictionaries.reconstruct(features, x), built.reconstruct(a, x).detach())


def test_the_gates_penalty_does_not_shrink_magnitudes():
    config = small(activation="gated")
    built = random_parameters(config)
    sparsity_penalty(built, DenseCode.of(built, draw(2, 32, D_MODEL)), config).backward()
    assert isinstance(built.activation, Gated)
    assert built.activation.r.grad is None
    assert built.activation.b_mag.grad is None
    assert built.b_enc.grad is not None
    assert float(built.b_enc.grad.abs().sum()) > 0


# JumpReLU


def test_the_l0_penalty_counts_features_and_moves_thresholds_alone():
    config = small(activation="jumprelu", penalty="l0", bandwidth=2.0, centred=False)
    built = random_parameters(config)
    code = DenseCode.of(built, draw(2, 50, D_MODEL))
    penalty = sparsity_penalty(built, code, config)
    assert float(penalty) == pytest.approx(float((code.a > 0).sum(-1).double().mean()))
    penalty.backward()
    assert isinstance(built.activation, JumpReLU)
    gradient = built.activation.threshold.grad
    assert gradient is not None
    assert float(gradient.max()) <= 0 > float(gradient.min())  # a higher threshold: fewer features
    assert built.W_enc.grad is None or not built.W_enc.grad.any()


def test_the_two_kernels_have_bandwidths_of_their_own():
    gradients = []
    for width in (0.5, 2.0):
        config = small(activation="jumprelu", penalty="l0", bandwidth=0.7, penalty_bandwidth=width)
        built = random_parameters(config)
        sparsity_penalty(built, DenseCode.of(built, draw(2, 50, D_MODEL)), config).backward()
        assert isinstance(built.activation, JumpReLU)
        assert built.activation.bandwidth == 0.7
        gradients.append(built.activation.threshold.grad)
    assert not torch.equal(*gradients)
    assert config.margin == 1.0


def test_the_tanh_penalty_saturates_and_reaches_the_encoder():
    config = small(activation="jumprelu", tanh_scale=1e4)
    built = random_parameters(config)
    code = DenseCode.of(built, draw(2, 50, D_MODEL))
    penalty = sparsity_penalty(built, code, config)
    assert float(penalty) == pytest.approx(float((code.a > 0).sum(-1).double().mean()))
    config = small(activation="jumprelu", tanh_scale=0.5)
    sparsity_penalty(built, DenseCode.of(built, draw(2, 50, D_MODEL)), config).backward()
    assert built.W_enc.grad is not None
    assert float(built.W_enc.grad.abs().sum()) > 0


# TopK and BatchTopK


@pytest.mark.parametrize("over_layers", [False, True])
def test_batchtopk_shares_its_budget_among_tokens_and_where_asked_among_layers(over_layers):
    h = draw(30, 3, 20).abs() * torch.linspace(0.2, 2, 30)[:, None, None] * torch.tensor([0.5, 1.0, 2.0])[:, None]
    a = BatchTopK(4, 3, over_layers=over_layers)(h)
    per_token = (a > 0).sum(dim=-1)
    assert int(per_token.sum()) == 4 * 30 * (1 if over_layers else 3)
    assert len(set(per_token.sum(1).tolist())) > 3
    per_layer = per_token.sum(0)
    assert (len(set(per_layer.tolist())) > 1) == over_layers
    kept, left = a[a > 0].min(), h[a == 0].max()
    assert not over_layers or float(kept) > float(left)


def test_the_count_th_largest_is_found_whatever_the_guess():
    h = draw(40, 50)
    expected = h.flatten().sort(descending=True).values
    for count in (1, 7, 300, 2000):
        for guess in (0.0, 1e-3, float(expected[count - 1].abs()), 100.0):
            assert float(kth_largest(h, count, guess)) == float(expected[count - 1])


@pytest.mark.parametrize("kind", ["sae", "clt"])
def test_batchtopk_is_exported_with_the_threshold_that_keeps_k_features(kind):
    vectors = sparse_vectors(8192)[:, None].expand(-1, 2, -1)
    data = vectors if kind == "sae" else (vectors, vectors.flip(1))
    dictionaries = fitted(data, small(kind, activation="batchtopk", lr=2e-3))
    sigma = dictionaries.activation if kind == "clt" else dictionaries[0].activation
    assert isinstance(sigma, JumpReLU)
    assert float(sigma.threshold.min()) > 0
    held_out = sparse_vectors(2048, seed=5)[:, None].expand(-1, 2, -1).transpose(0, 1)
    per_token = len(dictionaries.encode(held_out).value) / 2048
    assert per_token == pytest.approx(3 if kind == "clt" else 6, rel=0.1)


def test_topk_is_exported_as_it_is():
    assert isinstance(
        exported(small(activation="topk"), random_parameters(small(activation="topk")))[0].activation, TopK
    )
    assert isinstance(
        exported(small(activation="relu"), random_parameters(small(activation="relu")))[0].activation, ReLU
    )


# Matryoshka


def test_matryoshka_prefixes_reconstruct_by_themselves():
    x, held_out = sparse_vectors(8192), sparse_vectors(2048, seed=5)

    def prefix_fvu(**options):
        sae = fitted(x, small(activation="batchtopk", tokens=30_000, **options))[0]
        a = sae.encode(held_out)
        a[:, FEATURES // 4 :] = 0
        return float((held_out - sae.decode(a)).square().sum() / (held_out - held_out.mean(0)).square().sum())

    assert prefix_fvu(matryoshka=(0.25, 1.0)) < prefix_fvu() - 0.05


def test_the_loss_is_the_mean_over_the_prefixes_whose_last_is_all():
    config = small(activation="relu", matryoshka=(0.25, 0.5, 1.0))
    assert config.prefixes == (6, 12, 24)
    built = random_parameters(config)
    x = draw(2, 8, D_MODEL, seed=2)
    a = built.activate(built.pre_activations(x))
    expected = []
    for upto in config.prefixes:
        kept = torch.where(torch.arange(FEATURES) < upto, a, 0.0)
        expected.append((x - built.reconstruct(kept, x)).square().mean())
    result = losses(built, x, x, config, sparsity_weight=0.0, dead=None)
    torch.testing.assert_close(result.total, torch.stack(expected).mean())
    torch.testing.assert_close(result.fvu.mean(), expected[-1].detach())


@pytest.mark.parametrize("activation", ["relu", "topk"])
def test_the_sum_over_prefixes_is_their_mean_with_a_penalty_of_an_nth(activation):
    options: Any = {"activation": activation, "matryoshka": (0.25, 0.5, 1.0)}
    summed, meant = small(matryoshka_loss="sum", **options), small(**options)
    x, gradients = draw(2, 8, D_MODEL, seed=2), []
    for config, sparsity, factor in ((summed, 0.3, 1), (meant, 0.1, 3)):
        built = random_parameters(config)
        losses(built, x, x, config, sparsity_weight=sparsity, dead=None).total.backward()
        gradients.append({name: factor * p.grad for name, p in built.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


# ghost gradients


@pytest.mark.parametrize("kind", CONFIGS)
def test_ghosts_revive_latents_that_stay_dead_without(kind):
    """TopK from small encoders, where most latents never come to be among the k first."""
    x = sparse_vectors(2048, seed=3).float()
    reads = torch.stack([x, x.roll(5, 0)], dim=1)
    writes = reads if kind == "sae" else reads @ draw(D_MODEL, D_MODEL, seed=8, dtype=torch.float32)
    options: Any = {"decoder_init": "random"} if kind == "sae" else {}
    options |= {"features": 96, "encoder_scale": 0.1, "dead_after": 512, "batch": 128, "tokens": 128 * 90}
    alive = {}
    for remedy in ("none", "ghost"):
        run = Run.start(small(kind, activation="topk", remedy=remedy, **options), reads, writes)
        for step in range(90):
            rows = slice(128 * (step % 16), 128 * (step % 16 + 1))
            run.step(step, reads[rows], writes[rows])
        alive[remedy] = int((run.counter.since_fired < 1024).sum())
    assert alive["none"] < 96
    assert alive["ghost"] > 1.2 * alive["none"]


# p-annealing


def test_p_falls_from_one_to_its_end_and_small_shares_are_punished_ever_more():
    config = small(activation="relu", penalty="p_anneal", p_start=0.3, p_end=0.2)
    values = [exponent(config, step) for step in range(config.steps + 1)]
    assert values[0] == 1.0
    assert values[round(0.3 * config.steps) - 1] == 1.0
    assert values[-1] == pytest.approx(0.2)
    assert values == sorted(values, reverse=True)
    share = torch.tensor([0.02, 0.5], dtype=torch.float64, requires_grad=True)
    ratios = []
    for p in (1.0, 0.6, 0.2):
        (slope,) = torch.autograd.grad(p_norm(share, p).sum(), share)
        ratios.append(float(slope[0] / slope[1]))
    assert ratios[0] == pytest.approx(1.0)
    assert ratios == sorted(ratios)
    assert ratios[-1] > 5


def test_when_p_falls_the_weight_is_changed_so_that_the_penalty_stays_as_strong():
    config = small(activation="relu", penalty="p_anneal", sparsity=1e-2, sparsity_warmup=0.0, p_start=0.0, tokens=5120)
    x = sparse_vectors(5120)[:, None]
    run = Run.start(config, x, x)
    strengths = []
    for step in range(config.steps):
        before = exponent(config, step), run.controller.weight(step)
        code = DenseCode.of(run.weights, x[:256].transpose(0, 1) * run.scales.read)
        run.step(step, x[:256], x[:256])
        share = code.a.detach() * run.weights.decoder_norms().detach()[:, None] / D_MODEL**0.5
        after = exponent(config, step + 1), run.controller.weight(step + 1)
        if after[0] < before[0]:
            strengths.append(
                float(after[1] * p_norm(share, after[0]).sum() / (before[1] * p_norm(share, before[0]).sum()))
            )
    assert len(strengths) == 10
    assert strengths == pytest.approx([1.0] * 10, rel=1e-4)


# aligned training


ALIGNED = [
    {"activation": "topk"},
    {"activation": "batchtopk"},
    {"activation": "relu", "penalty": "p_anneal"},
    {"activation": "jumprelu"},
]


@pytest.mark.parametrize("kind", ["sae", "plt", "clt"])
@pytest.mark.parametrize("choice", ALIGNED, ids=lambda c: c["activation"])
def test_with_aligned_training_encoder_times_decoder_is_one_for_every_feature(kind, choice):
    vectors = sparse_vectors(2048)[:, None].expand(-1, 2, -1)
    data = vectors if kind == "sae" else (vectors, 2 * vectors.flip(1))
    for aligned in (True, False):
        config = small(kind, aligned=aligned, tokens=6_000, normalise="none", **choice)
        dictionaries = fitted(data, config)
        if kind == "clt":
            pairs = [(dictionaries.W_enc[i].T, dictionaries.W_dec[i].sum(1)) for i in range(2)]
        else:
            pairs = [(d.W_enc.T, d.W_dec) for d in dictionaries.layers]
        scores = torch.cat([(encoder * decoder).sum(1) for encoder, decoder in pairs])
        far = float((scores - 1).abs().max())
        assert far < 1e-4 if aligned else far > 0.02


def test_the_aligned_encoder_is_the_nearest_that_meets_the_constraint():
    config = small(activation="relu", aligned=True)
    built = random_parameters(config)
    encoder, v = built.encoder(), built.written()
    torch.testing.assert_close((encoder * v).sum(-1), torch.ones(2, FEATURES, dtype=torch.float64))
    moved = encoder - built.W_enc  # along v, hence orthogonal to the constraint's plane
    cosine = torch.nn.functional.cosine_similarity(moved, v, dim=-1)
    torch.testing.assert_close(cosine.abs(), torch.ones_like(cosine))


def test_aligned_encoders_have_one_coordinate_less_than_numbers():
    """The Jacobian of ŵ is the projection off what the feature writes: of rank d − 1, symmetric, its own square."""
    w, v = draw(D_MODEL), draw(D_MODEL, seed=1)
    jacobian = torch.autograd.functional.jacobian(lambda given: aligned_to(v, given), w)
    assert isinstance(jacobian, torch.Tensor)
    values = torch.linalg.svdvals(jacobian)
    torch.testing.assert_close(values[:-1], torch.ones(D_MODEL - 1, dtype=torch.float64))
    assert float(values[-1]) < 1e-12
    torch.testing.assert_close(jacobian, torch.eye(D_MODEL, dtype=torch.float64) - torch.outer(v, v) / (v @ v))


@pytest.mark.parametrize("kind", ["sae", "clt"])
def test_a_loss_has_no_gradient_along_the_direction_that_the_constraint_takes(kind):
    config = small(kind, activation="relu", aligned=True)
    x, y = draw(2, 32, D_MODEL, seed=3), draw(2, 32, D_MODEL, seed=4)
    along = {}
    for aligned in (True, False):
        built = random_parameters(config)
        built.aligned = aligned
        losses(built, x, y, config, sparsity_weight=0.1, dead=None).total.backward()
        assert built.W_enc.grad is not None
        cosine = torch.nn.functional.cosine_similarity(built.W_enc.grad, built.written().detach(), dim=-1)
        along[aligned] = float(cosine.abs().max())
    assert along[True] < 1e-12
    assert along[False] > 0.1


# the controller


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("activation", "penalty"), [(a, penalty) for a, penalties in PENALTIES.items() for penalty in penalties]
)
def test_the_controller_finds_the_weight_for_the_l0_that_is_asked(activation, penalty, seed):
    x, held_out = sparse_vectors(30_000), sparse_vectors(4096, seed=5)
    config = small(target_l0=4.0, tokens=100_000, batch=128, activation=activation, penalty=penalty, seed=seed)
    sae = fitted(x, config)[0]
    l0 = float((sae.encode(held_out) > 0).sum(1).float().mean())
    assert l0 == pytest.approx(4.0, rel=0.05)


def test_the_weight_rises_while_too_many_features_are_active_and_not_beyond_all_use():
    config = small(activation="jumprelu", penalty="l0", target_l0=4.0, sparsity_warmup=0.0, tokens=256_000)
    controller = SparsityController(config)
    weights = []
    for step in range(700):
        controller.update(step, 12.0)
        weights.append(controller.weight(step))
    assert weights == sorted(weights)
    assert weights[-1] == pytest.approx(2 / 4.0)
    for step in range(700, 800):
        controller.update(step, 2.0)
    assert controller.weight(800) < weights[-1] / 2


def test_precision_of_products_is_not_that_of_the_weights():
    config = small(activation="topk", precision="bf16", tokens=30_000)
    x = sparse_vectors(8192)
    run = Run.start(config, x[:512, None], x[:512, None])
    batches = [x[256 * (step % 30) :][:256, None] for step in range(60)]
    for step, batch in enumerate(batches):
        run.step(step, batch, batch)
    assert run.measured is not None
    for p in run.weights.parameters():
        assert p.grad is not None
        assert p.dtype == p.grad.dtype == torch.float32
    assert run.measured.loss.dtype == torch.float32
    full = TrainingParameters(
        W_enc=run.weights.W_enc.detach(), b_enc=run.weights.b_enc.detach(),
        W_dec=[w.detach() for w in run.weights.W_dec], b_dec=run.weights.b_dec.detach(),
        activation=run.weights.activation, centred=run.weights.centred,
    )  # fmt: skip
    reads = x[:256, None].transpose(0, 1)
    low, high = run.weights.pre_activations(reads), full.pre_activations(reads)
    assert 0 < float((low - high).abs().max()) < 0.05 * float(high.abs().max())


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_k_falls_from_its_start(tmp_path, activation):
    vectors = torch.randn(2048, 16, generator=torch.Generator().manual_seed(0))
    config = SAEConfig(
        features=32, activation=activation, k=2, k_start=4.0, tokens=2048, batch=128, log_every=1, buffer_mb=1
    )
    transcoders.train(None, vectors, config, out=tmp_path, progress=False)
    l0 = [json.loads(line)["l0"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert 6 < l0[0] <= 8
    assert l0[-1] == pytest.approx(2, rel=0.05)
