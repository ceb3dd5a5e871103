"""The loss of every kind and its gradients against a float64 oracle, written layer by layer from the equations."""

import itertools

import pytest
import torch

from transcoders import CLTConfig, SAEConfig, TranscoderConfig
from transcoders.training.config import PENALTIES
from transcoders.training.initialise import initial_parameters
from transcoders.training.losses import losses

N_LAYERS, D_MODEL, FEATURES, BATCH = 3, 6, 12, 16
K_AUX_OF_THE_PAPER = 2  # the power of two next to D_MODEL / 2, from below
CONFIGS = {"clt": CLTConfig, "plt": TranscoderConfig, "sae": SAEConfig}
CHOICES = [
    {"activation": "relu", "penalty": "l1"},
    {"activation": "relu", "penalty": "unit_l1"},
    {"activation": "relu", "penalty": "p_anneal"},
    {"activation": "gated", "penalty": "unit_l1"},
    {"activation": "gated", "penalty": "l1"},
    {"activation": "jumprelu", "penalty": "tanh"},
    {"activation": "jumprelu", "penalty": "l0", "penalty_bandwidth": 0.9},
    {"activation": "topk"},
    {"activation": "batchtopk"},
]
VARIANTS = [
    {},
    {"aligned": True},
    {"matryoshka": (0.25, 0.5, 1.0)},
    {"centred": True},
    {"skip": True, "skip_penalty": 0.2, "skip_rank": 2},
    {"remedy": "ghost"},
]
RANKED = [{"aux_pooling": "token"}, {"aux_pooling": "none"}, {"k_aux": 0}]
"""Options of AuxK."""


def test_every_activation_and_penalty_is_among_the_choices():
    for name, penalties in PENALTIES.items():
        chosen = {choice.get("penalty") for choice in CHOICES if choice["activation"] == name}
        assert chosen == (set(penalties) or {None}), name


def cases():
    for kind, choice, variant in itertools.product(CONFIGS, CHOICES, VARIANTS):
        if kind not in {"centred": ("sae",), "skip": ("plt", "clt")}.get("".join(list(variant)[:1]), CONFIGS):
            continue
        if "aligned" in variant and choice["activation"] == "gated":
            continue
        yield pytest.param(kind, {**choice, **variant}, id="-".join(map(str, (kind, *choice.values(), *variant))))
    for kind, variant in itertools.product(CONFIGS, RANKED):
        yield pytest.param(kind, {"activation": "topk", **variant}, id=f"{kind}-topk-{variant}")
    for kind, choice in itertools.product(CONFIGS, (CHOICES[0], CHOICES[-1])):
        options = {**choice, "matryoshka": (0.25, 1.0), "matryoshka_loss": "sum"}
        yield pytest.param(kind, options, id=f"{kind}-{choice['activation']}-sum")


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(kind, options):
    """Settings, and random weights of them."""
    config = CONFIGS[kind](**{"features": FEATURES, "k": 4, "k_aux": 2, "bandwidth": 0.8, "revival": 0.5, **options})
    built = initial_parameters(config, draw(BATCH, N_LAYERS, D_MODEL), draw(BATCH, N_LAYERS, D_MODEL, seed=1))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in built.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = {"activation.threshold": 0.5 * noise.abs(), "activation.r": 0.3 * noise}.get(name, noise)
    built.constrain()
    return config, built


def oracle(config, weights, reads, writes, dead, *, sparsity_weight, p):
    """The loss from the papers' equations, one layer after another."""
    layers = range(N_LAYERS)
    W_dec = [weights[f"W_dec.{layer}"] for layer in layers]
    b_dec, root = weights["b_dec"], D_MODEL**0.5
    h, a, gate = [], [], []
    for layer in layers:
        w, total = weights["W_enc"][layer], W_dec[layer].sum(1)
        if config.aligned:
            w = torch.stack([w[f] + (1 - w[f] @ total[f]) / (total[f] @ total[f]) * total[f] for f in range(FEATURES)])
        x = reads[layer] - b_dec[layer] if getattr(config, "centred", False) else reads[layer]
        h.append(torch.einsum("bd,fd->bf", x, w) + weights["b_enc"][layer])
    thresholds = weights.get("activation.threshold", torch.zeros(N_LAYERS, FEATURES, dtype=torch.float64))
    for layer in layers:
        z, theta = h[layer], thresholds[layer]
        if config.activation == "jumprelu":
            kernel = (((z - theta) / config.bandwidth).abs() < 0.5).double()
            straight_through = (-theta / config.bandwidth * kernel).detach() * (theta - theta.detach())
            a.append(z * (z > theta).double() + straight_through)
        elif config.activation == "gated":
            u = z - weights["b_enc"][layer]
            m = weights["activation.r"][layer].exp() * u + weights["activation.b_mag"][layer]
            a.append((z > 0).double() * torch.relu(m))
            gate.append(torch.relu(z))
        elif config.activation == "relu":
            a.append(torch.relu(z))
        else:
            a.append(torch.relu(z) * chosen(config, h, layer).double())
    norms = [W_dec[layer].flatten(1).square().sum(1).sqrt() for layer in layers]

    def written(values, upto, decoders=W_dec):
        y = [torch.zeros(BATCH, D_MODEL, dtype=torch.float64) for _ in layers]
        for layer in layers:
            for offset in range(decoders[layer].shape[1]):
                y[layer + offset] = y[layer + offset] + values[layer][:, :upto] @ decoders[layer][:upto, offset]
        return torch.stack(y)

    past = weights["W_skip"] @ weights["W_skip_out"] if "W_skip" in weights else torch.zeros(D_MODEL, D_MODEL).double()
    base = b_dec[:, None] + reads @ past
    prefixes = [round(share * FEATURES) for share in config.matryoshka] or [FEATURES]
    errors = [writes - base - written(a, upto) for upto in prefixes]
    loss = sum(error.square().mean() for error in errors)
    loss = loss if config.matryoshka_loss == "sum" else loss / len(errors)

    penalty = 0.0
    for layer in layers:
        norm = 1.0 if config.penalty == "unit_l1" else norms[layer]
        values = gate[layer] if gate else a[layer]
        share = values * norm / root
        if config.penalty == "tanh":
            terms = torch.tanh(config.tanh_scale * share)
        elif config.penalty == "l0":
            theta, width = thresholds[layer], config.penalty_bandwidth
            kernel = (((h[layer] - theta) / width).abs() < 0.5).double()
            terms = (h[layer] > theta).double() + (-kernel / width).detach() * (theta - theta.detach())
        elif config.penalty == "p_anneal":
            terms = (share + 1e-3) ** p - 1e-3**p
        else:
            terms = share
        penalty = penalty + terms.sum(1).mean() / N_LAYERS
    if not config.ranks:
        loss = loss + sparsity_weight * penalty
    if gate:
        frozen_base = b_dec.detach()[:, None] + reads @ past.detach()
        auxiliary = writes - frozen_base - written(gate, FEATURES, [w.detach() for w in W_dec])
        loss = loss + auxiliary.square().mean()

    if "W_skip" in weights:
        loss = loss + config.skip_penalty * past.square().sum() / N_LAYERS / D_MODEL
    error = errors[-1].detach()
    if config.remedy == "ghost":
        return loss + ghosts(config, h, W_dec, error, dead)
    if config.ranks:
        picked = []
        for layer in layers:
            masked = h[layer].masked_fill(~dead[layer], float("-inf"))
            rank = masked.argsort(1, descending=True).argsort(1)
            keep = (rank < (config.k_aux or K_AUX_OF_THE_PAPER)) & dead[layer]
            picked.append(h[layer] * keep.double())
        revival = pooled(config, error - written(picked, FEATURES), error)
    else:
        revival = 0.0
        for layer in layers:
            gap = torch.relu(thresholds[layer].detach() - h[layer]) * dead[layer] * norms[layer].detach()
            revival = revival + gap.sum(1).mean() / N_LAYERS / root
    return loss + config.revival * revival


def pooled(config, left, error):
    """What AuxK leaves, by loops."""
    left, of = left.square().sum(2), error.square().sum(2)  # layer, batch
    if config.aux_pooling == "none":
        return left.sum() / (N_LAYERS * BATCH * D_MODEL)
    if config.kind == "clt":
        left, of = left.sum(0)[None], of.sum(0)[None]
    if config.aux_pooling == "token":
        terms = [left[i, b] / of[i, b] for i in range(len(left)) for b in range(BATCH)]
    else:
        terms = [left[i].sum() / of[i].sum() for i in range(len(left))]
    return torch.stack(terms).mean()


def ghosts(config, h, W_dec, error, dead):
    """Ghost gradients from their definition, a token after the other, with exp as it is."""
    losses = torch.zeros(N_LAYERS, dtype=torch.float64)
    sizes = torch.zeros(N_LAYERS, dtype=torch.float64)
    for to, token in itertools.product(range(N_LAYERS), range(BATCH)):
        terms = [
            torch.exp(h[layer][token, f]) * W_dec[layer][f, to - layer]
            for layer in (range(to + 1) if config.kind == "clt" else [to])
            for f in range(FEATURES)
            if dead[layer, f]
        ]
        if terms:
            output, residual = torch.stack(terms).sum(0), error[to, token]
            output = output * (residual.norm() / (2 * output.norm())).detach()
            losses = losses + torch.eye(N_LAYERS).double()[to] * (residual - output).square().sum()
            sizes[to] += residual.square().sum()
    if config.kind == "clt":
        losses, sizes = losses.sum()[None], sizes.sum()[None]
    scaled = [loss * (size / loss).detach() for loss, size in zip(losses, sizes, strict=True) if size > 0]
    return torch.stack(scaled).sum() / (N_LAYERS * BATCH * D_MODEL)


def chosen(config, h, layer):
    """By sorting: whether each feature of a layer is among the largest it competes with."""
    z = torch.stack(h).detach()  # layer, batch, feature
    over_layers = config.kind == "clt"
    keep = torch.zeros(BATCH, FEATURES, dtype=torch.bool)
    for token in range(BATCH):
        for feature in range(FEATURES):
            rivals = z if over_layers else z[layer]
            rivals = rivals if config.activation == "batchtopk" else rivals[..., token, :]
            most = config.k * (BATCH if config.activation == "batchtopk" else 1)
            keep[token, feature] = bool((rivals > z[layer, token, feature]).sum() < most)
    return keep


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize(("kind", "options"), list(cases()))
def test_loss_and_gradients_agree_with_the_oracle(kind, options, sparse):
    config, built = build(kind, options)
    reads, writes = draw(N_LAYERS, BATCH, D_MODEL, seed=5), draw(N_LAYERS, BATCH, D_MODEL, seed=6)
    writes = reads if kind == "sae" else writes
    dead = torch.zeros(N_LAYERS, FEATURES, dtype=torch.bool)
    dead[0, [1, 5, 7]] = True
    dead[2, 11] = True
    result = losses(built, reads, writes, config, sparsity_weight=0.7, dead=dead, p=0.6, sparse=sparse)
    result.total.backward()
    weights = {name: p.detach().clone().requires_grad_(True) for name, p in built.named_parameters()}
    expected = oracle(config, weights, reads, writes, dead, sparsity_weight=0.7, p=0.6)
    expected.backward()
    torch.testing.assert_close(result.total.detach(), expected.detach())
    for name, parameter in built.named_parameters():
        want = weights[name].grad
        assert parameter.grad is not None, name
        assert want is not None, name
        torch.testing.assert_close(parameter.grad, want, msg=lambda text, name=name: f"{name}: {text}")
