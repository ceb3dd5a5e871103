"""Sparse kernels against dense float64 products: values, choices, gradients."""

import pytest
import torch

from transcoders import kernels
from transcoders.errors import InputError
from transcoders.kernels import selection

LAYERS, BATCH, D, FEATURES, K = 3, 7, 5, 24, 4


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def stack(seed=0, dtype=torch.float64, layers=LAYERS, batch=BATCH, d=D, features=FEATURES):
    """Inputs, encoder and bias of a stack of layers."""
    x = draw(layers, batch, d, seed=seed, dtype=dtype)
    W_enc = kernels.feature_major(draw(layers, d, features, seed=seed + 1, dtype=dtype) / d**0.5)
    return x, W_enc, 0.3 * draw(layers, features, seed=seed + 2, dtype=dtype)


def oracle(x, W_enc, b_enc):
    """Pre-activations in float64."""
    return torch.einsum("lbd,ldf->lbf", x.double(), W_enc.double()) + b_enc.double().unsqueeze(1)


def largest(h, k, over):
    """A mask of the k largest over the given axes."""
    flat = {"token": h, "batch": h.flatten(1), "token of all": h.transpose(0, 1).flatten(1), "all": h.flatten()}[over]
    mask = torch.zeros_like(flat, dtype=torch.bool).scatter(-1, flat.topk(k, dim=-1).indices, True)
    if over == "token of all":
        return mask.unflatten(1, (h.shape[0], -1)).transpose(0, 1)
    return mask.reshape(h.shape)


def same_choice(found, mask, h, atol=1e-9):
    """The chosen features are those of the mask, with the oracle's pre-activations."""
    chosen = found.active.dense(torch.ones_like(found.value)).bool()
    assert torch.equal(chosen, mask)
    torch.testing.assert_close(found.dense().double(), h * mask, atol=atol, rtol=1e-5)


def random_active(density=0.3, seed=9, layers=LAYERS, batch=BATCH, features=FEATURES):
    generator = torch.Generator().manual_seed(seed)
    return kernels.active_from_mask(torch.rand(layers, batch, features, generator=generator) < density)


# choices


@pytest.mark.parametrize("features", [24, 25, 64, 1024])
def test_topk_is_the_dense_topk(features):
    x, W_enc, b_enc = stack(features=features)
    h = oracle(x, W_enc, b_enc)
    same_choice(kernels.topk_encode(x, W_enc, b_enc, K), largest(h, K, "token"), h)
    same_choice(kernels.batch_topk_encode(x, W_enc, b_enc, K), largest(h, K * BATCH, "batch"), h)


def test_topk_over_the_layers_of_a_token():
    x, W_enc, b_enc = stack()
    b_enc = b_enc + torch.tensor([0.0, 2.0, -2.0], dtype=torch.float64)[:, None]  # layers take unequal shares
    h = oracle(x, W_enc, b_enc)
    same_choice(kernels.topk_encode(x, W_enc, b_enc, K, over_layers=True), largest(h, K, "token of all"), h)
    batched = kernels.batch_topk_encode(x, W_enc, b_enc, K, over_layers=True)
    same_choice(batched, largest(h, K * BATCH, "all"), h)
    assert len(set(batched.active.counts().sum(dim=1).tolist())) == LAYERS


@pytest.mark.parametrize("low", [-5.0, 0.0, 1.5, 50.0])
def test_threshold_is_the_dense_comparison(low):
    x, W_enc, b_enc = stack()
    threshold = low + draw(LAYERS, FEATURES, seed=5).abs()
    h = oracle(x, W_enc, b_enc)
    same_choice(kernels.threshold_encode(x, W_enc, b_enc, threshold), h > threshold.unsqueeze(1), h)


@pytest.mark.parametrize("encode", [kernels.topk_encode, kernels.batch_topk_encode])
@pytest.mark.parametrize("approximate_first", [True, False])
def test_a_bfloat16_product_changes_no_choice(encode, approximate_first):
    """Inputs with a dominant coordinate and rows of unequal norm, where bfloat16 alone chooses wrongly."""
    x, W_enc, b_enc = stack(dtype=torch.float32, layers=2, batch=64, d=96, features=2048)
    x[..., 0] += 30
    W_enc = W_enc * torch.linspace(0.2, 2, 2048)
    h = oracle(x, W_enc, b_enc)
    mask = largest(h, 16, "token") if encode is kernels.topk_encode else largest(h, 16 * 64, "batch")
    same_choice(encode(x, W_enc, b_enc, 16, approximate=approximate_first), mask, h, atol=1e-4)
    low = selection.approximate_product(x, W_enc.mT, b_enc).h
    naive = (
        largest(low.double(), 16, "token") if encode is kernels.topk_encode else largest(low.double(), 1024, "batch")
    )
    assert not torch.equal(naive, mask)


def test_the_bound_holds():
    x, W_enc, b_enc = stack(dtype=torch.float32, batch=64, d=96, features=512)
    h, bound, relative = selection.approximate_product(x, W_enc.mT, b_enc)
    error = (h.double() - oracle(x, W_enc, b_enc)).abs()
    allowed = bound.unsqueeze(-1) + relative * h.abs()
    assert (error <= allowed).all()
    assert (error > allowed / 50).any()  # and is not idle


def test_candidates_hold_the_choice_and_not_much_more():
    x, W_enc, b_enc = stack(dtype=torch.float32, layers=1, batch=64, d=96, features=2048)
    approximation = selection.approximate_product(x, W_enc.mT, b_enc)
    found, _ = selection.candidates(approximation, selection.cut_of_token(16), 16)
    mask = found.dense(torch.ones(len(found.feature))).bool()
    assert mask[largest(oracle(x, W_enc, b_enc), 16, "token")].all()
    assert len(found.feature) < 4 * 16 * 64


def test_equal_inputs_and_too_large_k():
    """All features tie, none is left out; k beyond the width takes all."""
    x, W_enc, b_enc = stack()
    tied = kernels.topk_encode(x, torch.zeros_like(W_enc), torch.zeros_like(b_enc), K)
    assert tied.active.counts().eq(K).all()
    assert tied.value.eq(0).all()
    every = kernels.topk_encode(x, W_enc, b_enc, FEATURES + 1)
    assert every.active.counts().eq(FEATURES).all()
    assert kernels.batch_topk_encode(x, W_enc, b_enc, FEATURES + 1).active.density == 1


def test_auxk_ranks_dead_features_only():
    x, W_enc, b_enc = stack(features=64)
    dead = torch.rand(LAYERS, 64, generator=torch.Generator().manual_seed(3)) < 0.4
    dead[1] = False
    dead[2] = False
    dead[2, :2] = True  # fewer than k
    h = oracle(x, W_enc, b_enc)
    found = kernels.auxk_encode(x, W_enc, b_enc, dead, K)
    assert found.active.counts()[:, 0].tolist() == [K, 0, 2]
    mask = largest(h.masked_fill(~dead.unsqueeze(1), -100.0), K, "token") & dead.unsqueeze(1)
    same_choice(found, mask, h)
    assert len(kernels.auxk_encode(x, W_enc, b_enc, torch.zeros_like(dead), K).value) == 0


# decoders


def test_decoders_agree_with_each_other():
    active, values = random_active(), None
    values = draw(len(active.feature))
    W_dec = draw(LAYERS, FEATURES, D, seed=4)
    dense = torch.einsum("lbf,lfd->lbd", active.dense(values), W_dec)
    for way in (kernels.sparse_decode, kernels.dense_decode, kernels.decode):
        torch.testing.assert_close(way(values, active, W_dec), dense)


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_cross_layer_decoding_by_loops(density):
    active = random_active(density)
    values = draw(len(active.feature))
    W_dec = [draw(FEATURES, LAYERS - layer, D, seed=layer) for layer in range(LAYERS)]
    a = active.dense(values)
    expected = torch.zeros(LAYERS, BATCH, D, dtype=torch.float64)
    for layer in range(LAYERS):
        for write in range(layer, LAYERS):
            expected[write] += a[layer] @ W_dec[layer][:, write - layer]
    torch.testing.assert_close(kernels.cross_layer_decode(values, active, W_dec), expected)


def test_tokens_without_active_features():
    mask = torch.zeros(LAYERS, BATCH, FEATURES, dtype=torch.bool)
    mask[1, 2, 3] = True
    active = kernels.active_from_mask(mask)
    W_dec = draw(LAYERS, FEATURES, D)
    y = kernels.sparse_decode(torch.ones(1, dtype=torch.float64), active, W_dec)
    assert torch.equal(y[1, 2], W_dec[1, 3])
    assert y.count_nonzero() == D
    empty = kernels.active_from_mask(torch.zeros_like(mask))
    assert kernels.sparse_decode(torch.zeros(0, dtype=torch.float64), empty, W_dec).eq(0).all()


# gradients


def leaf(tensor):
    return tensor.clone(memory_format=torch.preserve_format).requires_grad_()


def test_gradients_of_the_products():
    active = random_active()
    values, table, x = leaf(draw(len(active.feature))), leaf(draw(LAYERS * FEATURES, D, seed=1)), None
    x = leaf(draw(LAYERS * BATCH, D, seed=2))
    sums, products = (
        (lambda v, w: kernels.weighted_sum(v, active, w)),
        (lambda x, w: kernels.inner_products(x, active, w)),
    )
    assert torch.autograd.gradcheck(sums, (values, table))
    assert torch.autograd.gradcheck(products, (x, table))
    assert torch.autograd.gradgradcheck(sums, (values, table))
    assert torch.autograd.gradgradcheck(products, (x, table))


def test_gradients_of_the_cross_layer_decoder():
    active = random_active(0.15)
    values = leaf(draw(len(active.feature)))
    W_dec = [leaf(draw(FEATURES, LAYERS - layer, D, seed=layer)) for layer in range(LAYERS)]
    assert torch.autograd.gradcheck(lambda v, *w: kernels.cross_layer_decode(v, active, w), (values, *W_dec))


ENCODERS = {
    "topk": lambda x, W, b: kernels.topk_encode(x, W, b, K),
    "topk over layers": lambda x, W, b: kernels.topk_encode(x, W, b, K, over_layers=True),
    "batch topk": lambda x, W, b: kernels.batch_topk_encode(x, W, b, K),
    "threshold": lambda x, W, b: kernels.threshold_encode(x, W, b, torch.full_like(b, 0.7)),
    "auxk": lambda x, W, b: kernels.auxk_encode(x, W, b, b > 0, K),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_gradients_of_a_whole_step_are_the_dense_ones(name):
    """Encode, ReLU, decode, error: all parameters and the input, against autograd through dense float64 products."""
    x, W_enc, b_enc = (leaf(t) for t in stack())
    W_dec = leaf(draw(LAYERS, FEATURES, D, seed=4))
    target = draw(LAYERS, BATCH, D, seed=6)
    found = ENCODERS[name](x, W_enc, b_enc)
    y = kernels.sparse_decode(found.value.relu(), found.active, W_dec)
    sparse = torch.autograd.grad((target - y).square().mean(), (x, W_enc, b_enc, W_dec))
    mask = found.active.dense(torch.ones_like(found.value)).bool()
    a = oracle(x, W_enc, b_enc).relu() * mask
    loss = (target - torch.einsum("lbf,lfd->lbd", a, W_dec)).square().mean()
    for ours, dense in zip(sparse, torch.autograd.grad(loss, (x, W_enc, b_enc, W_dec)), strict=True):
        torch.testing.assert_close(ours, dense)
    assert sparse[1].abs().sum() > 0


def test_gradients_keep_the_layout_of_a_feature_major_encoder():
    x, W_enc, b_enc = (leaf(t) for t in stack())
    kernels.topk_encode(x, W_enc, b_enc, K).value.sum().backward()
    assert W_enc.grad is not None
    assert W_enc.grad.stride() == W_enc.stride()
    assert W_enc.mT.is_contiguous()
    before = W_enc.detach().clone()
    torch.optim.Adam([W_enc], fused=True, lr=0.1).step()
    moved = (W_enc.detach() - before) / 0.1
    torch.testing.assert_close(moved, -W_enc.grad.sign(), atol=1e-5, rtol=0)


def test_features_that_are_not_active_get_no_gradient():
    x, W_enc, b_enc = (leaf(t) for t in stack())
    found = kernels.topk_encode(x, W_enc, b_enc, 1)
    found.value.square().sum().backward()
    touched = found.active.fired()
    assert W_enc.grad is not None
    assert torch.equal(W_enc.grad.abs().sum(dim=1) > 0, touched)
    assert 0 < touched.sum() < touched.numel()


# what goes with them


def test_counts_and_fired():
    active = random_active()
    mask = active.dense(torch.ones(len(active.feature))).bool()
    assert torch.equal(active.counts(), mask.sum(dim=-1))
    assert torch.equal(active.fired(), mask.any(dim=1))
    assert active.density == pytest.approx(mask.float().mean().item())
    where = torch.arange(len(active.feature)) == 0
    assert active.fired(where).sum() == 1


def test_wrong_shapes_are_refused():
    active = random_active()
    values, W_dec = torch.ones(len(active.feature)), torch.ones(LAYERS, FEATURES, D)
    with pytest.raises(InputError, match="got values of shape"):
        kernels.sparse_decode(values[1:], active, W_dec)
    with pytest.raises(InputError, match="one row per feature"):
        kernels.sparse_decode(values, active, W_dec[1:])
    with pytest.raises(InputError, match="inputs must be"):
        kernels.inner_products(torch.ones(2, D), active, W_dec.flatten(0, 1))
    with pytest.raises(InputError, match="k = 0"):
        kernels.topk_encode(*stack(), 0)
    with pytest.raises(InputError, match="a decoder for each"):
        kernels.cross_layer_decode(values, active, [W_dec[0, :, None]] * 2)
    with pytest.raises(InputError, match="thread counts"):
        kernels.quickest_threads(lambda: None, candidates=[0])


def test_the_quickest_number_of_threads_is_chosen_and_set(monkeypatch):
    now, present = [0.0], [4]
    monkeypatch.setattr(torch, "get_num_threads", lambda: present[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: present.__setitem__(0, n))
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def work():  # two threads are quickest, four wait for one another
        now[0] += {1: 3.0, 2: 2.0, 4: 8.0}[present[0]]

    assert kernels.quickest_threads(work) == 2
    assert present[0] == 2
    assert kernels.quickest_threads(work, candidates=[1, 2], keep=False) == 2
    assert present[0] == 2


def test_keeping_memory_is_asked_once():
    assert kernels.keep_freed_memory() == kernels.keep_freed_memory()
    assert torch.ones(10).sum() == 10
