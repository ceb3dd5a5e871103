"""Decoders of low rank: training against a dense oracle with `W_dec = C B`, in float64; files; truncation."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import pad

from tests.contracts.formats.mutations import assert_refused_or_same
from tests.device import Tape, device_form
from transcoders import CLTConfig, load_dictionaries, random_dictionaries, random_model, save_dictionaries, train
from transcoders.dictionaries import CrossLayerTranscoder
from transcoders.dictionaries.low_rank import factors, truncated
from transcoders.errors import DictionaryError, InputError
from transcoders.refining.truncation import truncate_decoders
from transcoders.training import Trainer, VectorSource, training_cost
from transcoders.training.initialise import initial_parameters
from transcoders.training.losses import losses
from transcoders.training.parameters import TrainingParameters
from transcoders.training.step import Run

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
        for B in built.W_later[layer : layer + 1]:  # by the chain rule; the last layer has none
            torch.testing.assert_close(W.grad[:, 0, D:], torch.einsum("fld,rld->fr", of_full[:, 1:], B.detach()))
            for_maps = torch.einsum("fr,fld->rld", W.detach()[:, 0, D:], of_full[:, 1:])
            torch.testing.assert_close(B.grad, for_maps)


def test_projected_gradients_are_those_of_a_loss_of_normalised_decoders():
    built = random_parameters(settings(activation="topk"))
    torch.testing.assert_close(built.decoder_norms(), torch.ones(LAYERS, FEATURES, dtype=torch.float64))
    a, target = draw(LAYERS, BATCH, FEATURES, seed=80), draw(LAYERS, BATCH, D, seed=81)
    (built.decode(a) - target).square().sum().backward()
    built.project_gradients()
    found = [p.grad for p in (*built.W_dec, *built.W_later)]
    leaves = [p.detach().clone().requires_grad_() for p in (*built.W_dec, *built.W_later)]
    tables, maps = leaves[:LAYERS], leaves[LAYERS:]
    writes = [torch.zeros(BATCH, D, dtype=torch.float64) for _ in range(LAYERS)]
    for layer, table in enumerate(tables):
        own, codes = table[:, 0, :D], table[:, 0, D:]
        later = [codes @ B[:, i] for B in maps[layer : layer + 1] for i in range(B.shape[1])]
        full = torch.stack([own, *later], dim=1)
        full = full / full.flatten(1).norm(dim=1)[:, None, None]
        for i in range(full.shape[1]):
            writes[layer + i] = writes[layer + i] + a[layer] @ full[:, i]
    (torch.stack(writes) - target).square().sum().backward()
    for mine, leaf in zip(found, leaves, strict=True):
        torch.testing.assert_close(mine, leaf.grad)


def test_with_enough_directions_any_decoders_can_be_held():
    clt = random_dictionaries("clt", n_layers=LAYERS, d_model=D, features=FEATURES).double()
    found = factors(list(clt.W_dec), (LAYERS - 1) * D)
    assert found is not None
    assert factors(list(clt.W_dec), D) is None  # of later layers together the rank is higher
    built = initial_parameters(settings(decoder_rank=3 * D), draw(4, LAYERS, D), draw(4, LAYERS, D))
    assert [B.shape[0] for B in built.W_later] == [3 * D] * 3
    tables = [torch.cat([clt.W_dec[i][:, 0], f.codes], dim=1).unsqueeze(1) for i, f in enumerate(found)]
    held = TrainingParameters(
        W_enc=clt.W_enc.mT.clone(), b_enc=clt.b_enc, b_dec=clt.b_dec, activation=clt.activation,
        W_dec=[pad(t, (0, tables[0].shape[2] - t.shape[2])) for t in tables] + [clt.W_dec[-1]],
        W_later=[pad(f.maps, (0, 0, 0, 0, 0, found[0].maps.shape[0] - f.maps.shape[0])) for f in found],
    )  # fmt: skip
    reads = draw(LAYERS, BATCH, D)
    a = held.activate(held.pre_activations(reads))
    torch.testing.assert_close(held.reconstruct(a, reads), clt(reads))


def vectors(n=400):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, LAYERS, D, generator=generator)
    return x, (x @ torch.randn(D, D, generator=generator)).relu().cumsum(dim=1)


SHORT = {"batch": 32, "tokens": 32 * 12, "checkpoint_every": 5, "keep_last": 4, "lr": 1e-2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    return out, train(None, vectors(), settings(activation="topk", **SHORT), out=out, progress=False)


def test_what_is_handed_out_writes_what_training_wrote():
    config = settings(**SHORT, ema=0.5)
    reads, writes = vectors()
    run = Run.start(config, reads, writes)
    for step in range(3):
        run.step(step, reads[:32], writes[:32])
    x = reads.transpose(0, 1) * run.scales.read[:, None, None]
    weights = run.weights.holding(dict(run.weights.state_dict()) | run.averaged)
    inside = weights.reconstruct(weights.activate(weights.pre_activations(x)), x) / run.scales.write[:, None, None]
    made = train(None, (reads[:32], writes[:32]), settings(**SHORT), progress=False)
    exported = run.export(made.reads, made.writes, replace(made.provenance, normalisation={}))
    assert isinstance(exported, CrossLayerTranscoder)
    torch.testing.assert_close(exported(reads.transpose(0, 1)), inside, rtol=1e-4, atol=1e-4)
    assert [tuple(W.shape) for W in exported.W_dec] == [(FEATURES, LAYERS - i, D) for i in range(LAYERS)]


def test_a_resumed_run_comes_to_the_same_bits(trained, tmp_path):
    _, unbroken = trained
    config = settings(activation="topk", **SHORT)
    Trainer(VectorSource(*vectors(), seed=0), [config], out=tmp_path).run(
        until=7, progress=False
    )  # 2 after a checkpoint
    resumed = train(None, vectors(), config, out=tmp_path, resume=True, progress=False)
    assert isinstance(resumed, CrossLayerTranscoder)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), unbroken.parameters(), strict=True))


def test_a_checkpoint_and_the_saved_set_take_the_room_of_the_factors(trained, tmp_path):
    out, clt = trained
    cost = training_cost(settings(activation="topk", **SHORT), n_layers=LAYERS, d_model=D)
    (state,) = out.glob("checkpoint-00000010/state.safetensors")
    assert cost.checkpoint < state.stat().st_size < cost.checkpoint + 20_000  # names, and since when features are dead
    full = sum(W.numel() for W in clt.W_dec)
    assert json.loads((out / "config.json").read_text())["decoder_rank"] == RANK
    loaded = CrossLayerTranscoder.from_pretrained(out)
    for name, tensor in clt.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=1e-4, atol=1e-5 * float(tensor.abs().max()))
    stored = load_file(out / "weights.safetensors")
    assert sum(t.numel() for name, t in stored.items() if name.startswith("W_")) < clt.W_enc.numel() + 0.8 * full
    with pytest.raises(InputError, match="decoders='memory'"):
        load_dictionaries(out, decoders="mapped")
    with torch.no_grad():
        loaded.W_dec[0][0, 1] += torch.arange(D)  # no longer of that rank
        loaded.W_dec[0][1, 2] -= 1
    save_dictionaries(loaded, tmp_path / "changed")
    again = CrossLayerTranscoder.from_pretrained(tmp_path / "changed")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), loaded.parameters(), strict=True))


def test_damaged_factors_are_refused_in_a_sentence(tmp_path):
    clt = random_dictionaries("clt", n_layers=3, d_model=8, features=12)
    cut = truncated(clt, draw(3, 60, 8).float(), 2).requires_grad_(False)
    save_dictionaries(cut, tmp_path)
    assert_refused_or_same(load_dictionaries, tmp_path, CrossLayerTranscoder.from_pretrained(tmp_path), n=60, seed=0)


def test_truncation_is_the_weighted_singular_value_decomposition():
    clt = random_dictionaries("clt", n_layers=LAYERS, d_model=D, features=FEATURES).double()
    reads = draw(LAYERS, 300, D, seed=7)
    cut = truncated(clt, reads, RANK)
    a = clt.encode_dense(reads)
    for layer in range(LAYERS - 1):
        later = clt.W_dec[layer][:, 1:].flatten(1).detach()
        centred = (a[layer] - a[layer].mean(dim=0)).detach()
        U, S, Vh = torch.linalg.svd(centred @ later, full_matrices=False)
        best = torch.linalg.pinv(centred) @ (U[:, :RANK] * S[:RANK]) @ Vh[:RANK]  # R⁻¹ [R W]_r
        found = cut.W_dec[layer][:, 1:].flatten(1).detach()
        torch.testing.assert_close(centred @ found, centred @ best)
        least = float((centred @ (later - found)).square().sum())
        assert least == pytest.approx(float(S[RANK:].square().sum()))
        assert torch.equal(cut.W_dec[layer][:, 0], clt.W_dec[layer][:, 0])
    torch.testing.assert_close(cut(reads).mean(dim=1), clt(reads).mean(dim=1))  # b_dec has the mean of what is lost
    torch.testing.assert_close(truncated(clt, reads, 3 * D)(reads), clt(reads))


def test_truncated_on_a_models_text_it_is_saved_as_factors(tmp_path):
    model = random_model(n_layers=3, d_model=8, n_heads=2, d_vocab=30, context=16)
    clt = random_dictionaries("clt", n_layers=3, d_model=8, features=24)
    rows = torch.randint(0, 30, (40, 12), generator=torch.Generator().manual_seed(0))
    cut = truncate_decoders(model, clt, rows, rank=2, tokens=300)
    assert all(int(torch.linalg.matrix_rank(W[:, 1:].flatten(1), rtol=1e-4)) == 2 for W in cut.W_dec[:-1])
    save_dictionaries(cut, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["decoder_rank"] == 2
    loaded = CrossLayerTranscoder.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.W_dec[0], cut.W_dec[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="at least 1; got 0"):
        truncate_decoders(model, clt, rows, rank=0, tokens=300)
    with pytest.raises(DictionaryError, match="TranscoderSet has no decoders to later layers"):
        truncate_decoders(model, random_dictionaries("plt", n_layers=3, d_model=8, features=24), rows, rank=2)


@pytest.mark.parametrize("kernels", ["dense", "sparse"])
def test_on_a_device_no_step_waits_and_results_are_the_processors(kernels):
    config = settings(activation="topk", kernels=kernels, clip=0.1, **SHORT)
    reads, writes = vectors()

    def steps(run, numbers):
        for step in numbers:
            run.step(step, reads[:32], writes[:32], measure=False)
        return run

    here = steps(Run.start(config, reads, writes), range(5))
    with device_form():
        there = steps(Run.start(config, reads, writes), range(2))
        with Tape() as tape:
            steps(there, range(2, 5))
    assert tape.waits == []
    for a, b in zip(here.weights.parameters(), there.weights.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_is_refused(trained):
    with pytest.raises(InputError, match="decoder_rank must be at least 1, .* got 0"):
        CLTConfig(decoder_rank=0)
    with pytest.raises(InputError, match="remedy='resample'"):
        CLTConfig(decoder_rank=4, remedy="resample")
    with pytest.raises(InputError, match="got decoder_rank=3"):
        train(None, vectors(), settings(activation="topk", **SHORT), start=trained[1], progress=False)
