"""Decoders of low rank: training against the dense oracle with `W_dec = C B`, in float64."""

import pytest
import torch

from transcoders import CLTConfig, train
from transcoders.dictionaries import DictionaryProvenance
from transcoders.errors import InputError
from transcoders.sites import Site
from transcoders.training import low_rank
from transcoders.training.export import Scales, export
from transcoders.training.initialise import initial_parameters
from transcoders.training.losses import losses
from transcoders.training.parameters import TrainingParameters
from transcoders.training.warm_start import Start

LAYERS, D, FEATURES, BATCH, RANK = 4, 6, 20, 16, 3
CHOICES = [
    {"activation": "relu", "penalty": "l1"},
    {"activation": "relu", "penalty": "p_anneal", "matryoshka": (0.25, 0.5, 1.0)},
    {"activation": "gated"},
    {"activation": "jumprelu"},
    {"activation": "jumprelu", "aligned": True, "skip": True, "skip_rank": 2},
    {"activation": "topk"},
    {"activation": "batchtopk"},
    {"activation": "relu", "remedy": "ghost"},
    {"activation": "topk", "remedy": "ghost"},
]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def settings(**options):
    return CLTConfig(**{"features": FEATURES, "k": 6, "k_aux": 2, "decoder_rank": RANK, **options})


def random_parameters(config):
    built = initial_parameters(config, draw(BATCH, LAYERS, D), draw(BATCH, LAYERS, D, seed=1))
    for number, parameter in enumerate(built.parameters()):
        noise = draw(*parameter.shape, seed=number + 2)
        parameter.data = noise.abs() if parameter is getattr(built.activation, "threshold", None) else noise
    built.constrain()
    return built


def dense_oracle(built, full):
    """The same weights with a decoder for each pair of layers."""
    return TrainingParameters(
        W_enc=built.W_enc.detach().clone(), b_enc=built.b_enc.detach().clone(), W_dec=full,
        b_dec=built.b_dec.detach().clone(), activation=built.activation, W_skip=built.W_skip,
        W_skip_out=built.W_skip_out, aligned=built.aligned, unit_decoders=built.unit_decoders,
    )  # fmt: skip


def by_loops(built):
    """`W_dec[l→l'] = C_l B_{l→l'}`, one product for each pair of layers."""
    full = []
    for layer in range(LAYERS):
        table = built.W_dec[layer].detach()[:, 0]
        later = [table[:, D:] @ built.W_later[layer][:, i] for i in range(LAYERS - 1 - layer)]
        full.append(torch.stack([table[:, :D], *later], dim=1).detach())
    return full


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: "-".join(map(str, choice.values())))
def test_loss_and_gradients_are_those_of_full_decoders(choice, sparse):
    config = settings(**choice)
    built = random_parameters(config)
    oracle = dense_oracle(built, [W.clone() for W in by_loops(built)])
    reads, writes = draw(LAYERS, BATCH, D, seed=90), draw(LAYERS, BATCH, D, seed=91)
    dead = torch.zeros(LAYERS, FEATURES, dtype=torch.bool)
    dead[:, ::3] = True
    options = {"sparsity_weight": 0.3, "dead": dead, "p": 0.7 if config.penalty == "p_anneal" else 1.0}
    found = losses(built, reads, writes, config, sparse=sparse, **options)
    expected = losses(oracle, reads, writes, config, **options)
    torch.testing.assert_close(found.total, expected.total)
    torch.testing.assert_close(built.decoder_norms(), oracle.decoder_norms())
    torch.testing.assert_close(built.written(), oracle.written())
    found.total.backward()
    expected.total.backward()
    torch.testing.assert_close(built.W_enc.grad, oracle.W_enc.grad)
    for layer in range(LAYERS):
        W, of_full = built.W_dec[layer], oracle.W_dec[layer].grad
        assert W.grad is not None
        assert of_full is not None
        torch.testing.assert_close(W.grad[:, 0, :D], of_full[:, 0])
        for_codes = sum((of_full[:, 1 + i] @ B[:, i].T for B in built.W_later[layer : layer + 1] for i in
                         range(B.shape[1])), start=torch.zeros(1))  # fmt: skip
        torch.testing.assert_close(W.grad[:, 0, D:], for_codes if layer < LAYERS - 1 else W.grad[:, 0, D:])
        if layer < LAYERS - 1:
            for_maps = torch.einsum("fr,fld->rld", W.detach()[:, 0, D:], of_full[:, 1:])
            torch.testing.assert_close(built.W_later[layer].grad, for_maps)
