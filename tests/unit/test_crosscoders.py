"""Crosscoders against float64 oracles, autoencoders of one site, planted latents and the model."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from circuitsae.cli import main
from transcoders import SAEConfig, SAESet, random_model, train
from transcoders.crosscoders import (
    Crosscoder,
    ModelPair,
    diff_models,
    evaluate_crosscoder,
    load_crosscoder,
    plan_crosscoder,
    save_crosscoder,
    train_crosscoder,
)
from transcoders.dictionaries import DictionaryProvenance, ReLU
from transcoders.errors import DictionaryError, FileFormatError, InputError, ModelError
from transcoders.sites import Site
from transcoders.training.initialise import initial_parameters
from transcoders.training.losses import losses
from transcoders.training.planning import plan_run

SITES, WIDTH, FEATURES, BATCH, K = 3, 4, 10, 16, 3


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights_of(**settings):
    """Settings, random weights of them, and a batch `[token, site, d]`."""
    config = SAEConfig(features=FEATURES, k=K, side_by_side=SITES, centred=False, **settings)
    x = draw(BATCH, SITES, WIDTH, seed=5)
    weights = initial_parameters(config, x.flatten(1)[:, None], x.flatten(1)[:, None])
    for number, parameter in enumerate(weights.parameters()):
        parameter.data = draw(*parameter.shape, seed=number + 1)
    if config.activation == "jumprelu":
        weights.activation.threshold.data = 0.3 * draw(1, FEATURES, seed=9).abs()
    weights.constrain()
    return config, weights, x


PENALTIES = {
    "l1": lambda share, _: share,
    "p_anneal": lambda share, p: (share + 1e-3) ** p - 1e-3**p,
    "tanh": lambda share, _: torch.tanh(8.0 * share),
}


@pytest.mark.parametrize(("activation", "penalty"), [("relu", "l1"), ("relu", "p_anneal"), ("jumprelu", "tanh")])
def test_penalised_loss_and_gradient(activation, penalty):
    """Site by site: `mean_s ‖x_s − x̂_s‖² / d + λ Σ_i penalty(a_i Σ_s ‖W_dec,i^s‖ / (S √d))`."""
    config, weights, x = weights_of(activation=activation, penalty=penalty)
    lam, p = 0.3, 0.5
    side_by_side = x.flatten(1)[None]
    losses(weights, side_by_side, side_by_side, config, sparsity_weight=lam, dead=None, p=p).total.backward()
    own = {name: value.detach().clone().requires_grad_() for name, value in weights.named_parameters()}
    W_enc, W_dec, b_dec = own["W_enc"][0], own["W_dec.0"][:, 0], own["b_dec"][0]
    sites = [slice(s * WIDTH, (s + 1) * WIDTH) for s in range(SITES)]
    h = own["b_enc"][0] + sum(x[:, s] @ W_enc[:, at].T for s, at in enumerate(sites))
    a = torch.where(h > own["activation.threshold"][0], h, 0) if activation == "jumprelu" else torch.relu(h)
    error = sum((x[:, s] - a @ W_dec[:, at] - b_dec[at]).square().sum() / WIDTH for s, at in enumerate(sites))
    norms = sum(W_dec[:, at].norm(dim=1) for at in sites)
    share = a * norms / (SITES * math.sqrt(WIDTH))
    (error / (BATCH * SITES) + lam * PENALTIES[penalty](share, p).sum() / BATCH).backward()
    for name, parameter in weights.named_parameters():
        if name != "activation.threshold":  # a straight-through estimate, tested with autoencoders
            torch.testing.assert_close(parameter.grad, own[name].grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_ranked_by_activation_times_sum_of_norms(activation):
    """With decoders of any size and encoders to match, the latents of largest `a_i Σ_s ‖W_dec,i^s‖` are kept."""
    config, weights, x = weights_of(activation=activation)
    size = draw(FEATURES, seed=20).exp()
    norms = weights.W_dec[0][:, 0].unflatten(1, (SITES, WIDTH)).norm(dim=2).sum(dim=1)
    torch.testing.assert_close(norms, torch.full_like(norms, math.sqrt(SITES)))
    W_dec = weights.W_dec[0][:, 0] * size[:, None]
    a = torch.relu(x.flatten(1) @ weights.W_enc[0].T + weights.b_enc[0]) / size
    score = a * W_dec.unflatten(1, (SITES, WIDTH)).norm(dim=2).sum(dim=1)
    cut = score.topk(K, dim=1).values[:, -1:] if activation == "topk" else score.flatten().topk(K * BATCH).values[-1]
    expected = (a * (score >= cut)) @ W_dec + weights.b_dec[0]
    found = losses(weights, x.flatten(1)[None], x.flatten(1)[None], config, sparsity_weight=0.0, dead=None)
    torch.testing.assert_close(x.flatten(1) - found.error[0], expected)


def test_gradients_keep_the_sum_of_norms():
    """What is left of them is at right angles to the slope of `Σ_s ‖W_dec,i^s‖`, and nothing else is lost."""
    config, weights, x = weights_of(activation="topk")
    joined = x.flatten(1)[None]
    losses(weights, joined, joined, config, sparsity_weight=0.0, dead=None).total.backward()
    W = weights.W_dec[0]
    before = W.grad.clone()
    weights.project_gradients()
    slope = torch.autograd.grad(W.unflatten(2, (SITES, WIDTH)).norm(dim=3).sum(), W)[0]
    inner = lambda u, v: (u * v).sum(dim=(1, 2))  # noqa: E731
    torch.testing.assert_close(inner(W.grad, slope), torch.zeros(FEATURES, dtype=torch.float64))
    lost = before - W.grad
    torch.testing.assert_close(lost, slope * (inner(lost, slope) / inner(slope, slope))[:, None, None])


QUICK: dict[str, Any] = {"features": 24, "batch": 128, "tokens": 2_560, "activation": "batchtopk", "k": 4}


def test_of_one_site_it_is_the_autoencoder(tmp_path):
    x = draw(1000, 8).float()
    config = SAEConfig(**QUICK, normalise="none")
    saes = train(None, x, config, progress=False, out=tmp_path)
    assert isinstance(saes, SAESet)
    sae = saes[0]
    crosscoder = train_crosscoder(None, x[:, None], config, progress=False)
    assert torch.equal(crosscoder.encode(x[:, None]), sae.encode(x))
    assert torch.equal(crosscoder(x[:, None])[:, 0], sae(x))
    assert torch.equal(crosscoder.W_dec[0], sae.W_dec)
    record = json.loads((tmp_path / "run.json").read_text())
    del record["run"]["config"][0]["side_by_side"]  # as a release wrote it that did not know crosscoders
    (tmp_path / "run.json").write_text(json.dumps(record))
    again = train(None, x, config, resume=True, out=tmp_path)
    assert isinstance(again, SAESet)
    assert torch.equal(again[0].W_dec, sae.W_dec)


def planted(n=20_000, width=16, shared=12, alone=4):
    """Directions of both sites, then of the first alone, then of the second alone; the second site is three times as
    large.
    """
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(shared + 2 * alone, width, generator=generator), dim=1)
    a = torch.rand(n, len(directions), generator=generator) + 0.5
    a *= torch.rand(a.shape, generator=generator) < 0.08
    first, second = a.clone(), a.clone()
    first[:, shared + alone :] = 0
    second[:, shared : shared + alone] = 0
    return torch.stack([first @ directions, 3 * second @ directions], dim=1), directions


def test_planted_directions_of_one_model_alone_are_found():
    x, directions = planted()
    config = SAEConfig(features=24, activation="batchtopk", k=2, tokens=60_000, batch=256, lr=1e-2)
    crosscoder = train_crosscoder(None, x, config, progress=False)
    found = diff_models(None, crosscoder, x)
    frame: Any = found.frame
    for side, own in enumerate([range(12, 16), range(16, 20)]):
        name = ("first", "second")[side]
        latents = frame[frame["class"] == name]["latent"].tolist()
        assert len(latents) == 4
        assert frame["confirmed"][latents].all()
        unit = torch.nn.functional.normalize(crosscoder.W_dec[side][latents], dim=1)
        best = (unit @ directions.T).max(dim=1)
        assert set(best.indices.tolist()) == set(own)
        assert best.values.min() > 0.95
    both = frame[frame["class"] == "shared"]
    assert len(both) >= 10
    assert both["cosine"].median() > 0.95
    evaluation = evaluate_crosscoder(None, crosscoder, x)
    error = (x - crosscoder(x)).square().sum(dim=(0, 2)) / (x - x.mean(dim=0)).square().sum(dim=(0, 2))
    assert [site.fvu for site in evaluation.sites] == pytest.approx(error.tolist(), rel=1e-4)
    assert max(site.fvu for site in evaluation.sites) < 0.1
    assert evaluation.spread[0] >= 6


def made(W_dec, directions, threshold=0.0):
    """A crosscoder that reads activations off orthogonal directions, at the mean of two sites."""
    n = len(directions)
    return Crosscoder(
        W_enc=torch.stack([directions.T / 2] * 2), b_enc=torch.full((n,), -threshold), W_dec=W_dec,
        b_dec=torch.zeros(2, directions.shape[1]), activation=ReLU(),
        sites=[Site(0, "resid_post"), Site(1, "resid_post")], scales=torch.tensor([1.0, 0.5]),
        provenance=DictionaryProvenance(model="made"),
    )  # fmt: skip


def test_latent_scaling_tells_artefacts_from_what_is_exclusive():
    """Latent 0 is of the second model alone; 1 was left out in the first, where it is; 2 is written there by 3."""
    directions = torch.linalg.qr(draw(8, 8).float()).Q[:4]
    directions[3] = directions[2]
    a = torch.rand(4000, 4, generator=torch.Generator().manual_seed(2)) * (torch.arange(4) < 3)
    a[:, 0] *= 2  # it is read at one of the two sites
    second = a @ directions
    first = second - a[:, :1] * directions[0]
    W_dec = torch.tensor([[0.0, 0, 0, 1], [1, 1, 1, 0]])[:, :, None] * directions
    x, crosscoder = torch.stack([first, second], dim=1), made(W_dec, directions)
    frame: Any = diff_models(None, crosscoder, x).frame.set_index("latent")
    assert list(frame["class"]) == ["second", "second", "second", "first"]
    assert list(frame["confirmed"]) == [True, False, False, False]
    acts, rebuilt = crosscoder.encode(x).double(), crosscoder(x).double()
    for latent, side in ((0, 1), (1, 1), (2, 1), (3, 0)):
        d = W_dec[side, latent].double() * crosscoder.scales[side]
        for m, name in enumerate(("first", "second")):
            scale = float(crosscoder.scales[m])
            own = acts[:, latent, None] * W_dec[m, latent] * scale
            targets = {"error": (x[:, m] - rebuilt[:, m]) * scale + own, "reconstruction": rebuilt[:, m] * scale}
            for target, y in targets.items():
                design = (acts[:, latent, None] * d).reshape(-1, 1)
                beta = float(torch.linalg.lstsq(design, y.reshape(-1, 1)).solution)
                assert frame[f"beta_{target}_{name}"][latent] == pytest.approx(beta, abs=1e-5)
    assert frame["ratio_error"][1] == pytest.approx(2, abs=0.05)  # in the first model's units it is twice as large
    assert frame["ratio_reconstruction"][2] == pytest.approx(2, abs=0.05)


@pytest.fixture(scope="module")
def model():
    return random_model("gpt2", seed=0)


@pytest.fixture(scope="module")
def rows(model):
    return torch.randint(0, model.d_vocab, (40, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def trained(model, rows, tmp_path_factory) -> tuple[Crosscoder, Path]:
    out = tmp_path_factory.mktemp("crosscoder")
    config = SAEConfig(**QUICK, checkpoint_every=8, log_every=4)
    return train_crosscoder(model, rows, config, progress=False, out=out), out


def test_it_reads_and_writes_activations_as_the_model_has_them(model, rows, trained):
    """Loss recovered and FVU by a pass of the model that replaces one site with the equations' own reconstruction."""
    crosscoder, _ = trained
    assert crosscoder.sites == tuple(Site(layer, "resid_post") for layer in range(model.n_layers))
    found = evaluate_crosscoder(model, crosscoder, rows[:6])
    x = [model.run(rows[:6], [site])[1][site] for site in crosscoder.sites]
    h = sum(each @ W for each, W in zip(x, crosscoder.W_enc, strict=True)) + crosscoder.b_enc
    a = h * (h > crosscoder.activation.threshold)
    for i, site in enumerate(crosscoder.sites):
        y = a @ crosscoder.W_dec[i] + crosscoder.b_dec[i]
        late, rebuilt = x[i][:, 1:], y[:, 1:]
        mean = late.flatten(0, 1).mean(dim=0)
        fvu = (late - rebuilt).square().sum() / (late - mean).square().sum()
        assert found.sites[i].fvu == pytest.approx(float(fvu), rel=1e-4)
        name = model.hook(site)
        for value, said in ((rebuilt, found.sites[i].loss_spliced), (mean, found.sites[i].loss_mean)):
            edited = torch.cat([x[i][:, :1], value.expand_as(late)], dim=1)
            logits, _ = model.run_hooked(rows[:6], write={name: lambda _, edited=edited: edited})
            log_p = logits[:, 1:-1].log_softmax(dim=-1).gather(2, rows[:6, 2:, None])
            assert said == pytest.approx(-float(log_p.mean()), rel=1e-5)
    assert found.l0 == pytest.approx(float((a[:, 1:] > 0).sum(dim=-1).float().mean()))


def test_saved_and_loaded_it_is_the_same(trained, tmp_path):
    crosscoder, out = trained
    loaded = load_crosscoder(out)
    for name, tensor in crosscoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert (loaded.sites, loaded.labels) == (crosscoder.sites, crosscoder.labels)
    assert loaded.provenance.fingerprint == crosscoder.provenance.fingerprint is not None
    save_crosscoder(loaded, tmp_path)
    record = json.loads((tmp_path / "crosscoder.json").read_text())
    (tmp_path / "crosscoder.json").write_text(json.dumps(record | {"id": "another"}))
    with pytest.raises(FileFormatError, match="not saved together"):
        load_crosscoder(tmp_path)
    (tmp_path / "crosscoder.json").write_text(json.dumps(record | {"sites": record["sites"][:1]}))
    with pytest.raises(FileFormatError, match="W_enc"):
        load_crosscoder(tmp_path)
    with pytest.raises(FileFormatError, match="holds no crosscoder"):
        load_crosscoder(tmp_path / "elsewhere")


def test_what_a_run_takes_is_said_before_it(model, rows, trained, tmp_path):
    crosscoder, out = trained
    config = SAEConfig(**QUICK, checkpoint_every=8, log_every=4)
    planned = plan_crosscoder(model, rows, config, out=tmp_path / "new", trial_seconds=0.1)
    assert list(planned.sites) == [str(site) for site in crosscoder.sites]
    assert planned.flops["model"] > 0
    held = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert planned.disk["crosscoder"] == pytest.approx(held, rel=0.15)  # with names and checksums
    assert planned.memory["weights"] >= planned.disk["crosscoder"]
    assert not (tmp_path / "new").exists()


def test_the_command_prints_the_plan_and_trains_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "transcoders.crosscoders.training.plan_run", lambda *a, **o: plan_run(*a, **{**o, "trial_seconds": 0.1})
    )
    arguments = ["crosscoder", "pocket", "--out", str(tmp_path / "run"), "--plan", "--features", "64", "--k", "8"]
    main([*arguments, "--tokens", "640", "--batch", "64", *("--sites", "0.resid_post", "--sites", "1.resid_post")])
    said = capsys.readouterr().out
    assert "Steps:      10, 640 tokens in all" in said
    assert "blocks.1" in said
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_from_its_checkpoint(model, rows, trained):
    crosscoder, out = trained
    config = SAEConfig(**QUICK, checkpoint_every=8, log_every=4)
    assert torch.equal(train_crosscoder(model, rows, config, out=out, resume=True).W_dec, crosscoder.W_dec)
    with pytest.raises(InputError, match="holds a crosscoder of 0.resid_post, 1.resid_post"):
        train_crosscoder(model, rows, config, sites=crosscoder.sites[::-1], out=out, resume=True)
    (out / "crosscoder.json").rename(out / "kept.json")
    (out / "run" / "run.json").write_text((out / "run" / "run.json").read_text().replace('"finished"', '"was"'))
    with pytest.raises(InputError, match="of a crosscoder of 0.resid_post, 1.resid_post, not of"):
        train_crosscoder(model, rows, config, sites=crosscoder.sites[::-1], out=out, resume=True)
    again = train_crosscoder(model, rows, config, out=out, resume=True, progress=False)
    assert torch.equal(again.W_enc, crosscoder.W_enc)
    assert torch.equal(again.scales, crosscoder.scales)


def test_two_models_are_read_on_the_same_tokens(model, rows):
    pair = ModelPair(model, random_model("gpt2", seed=3))
    site = Site(1, "resid_post")
    sites = pair.both(site)
    read = pair.activations(rows[:2], sites)
    for each, where in zip((pair.first, pair.second), sites, strict=True):
        assert torch.equal(read[where], each.activations(rows[:2], [site])[site])
    crosscoder = train_crosscoder(pair, rows, SAEConfig(**QUICK), sites=sites, progress=False)
    assert crosscoder.labels == ("first.1.resid_post", "second.1.resid_post")
    evaluation = evaluate_crosscoder(pair, crosscoder, rows[:4])
    alone = {site: lambda value: crosscoder(torch.stack([read4[s] for s in sites], dim=2))[:, :, 1].where(later, value)}
    read4, later = pair.activations(rows[:4], sites), (torch.arange(12) > 0)[:, None]
    logits, _ = pair.second.run(rows[:4], edits=alone)
    log_p = logits[:, 1:-1].log_softmax(dim=-1).gather(2, rows[:4, 2:, None])
    assert evaluation.sites[1].loss_spliced == pytest.approx(-float(log_p.mean()), rel=1e-5)
    found = diff_models(pair, crosscoder, rows[:4])
    assert found.tokens == evaluation.tokens == 4 * 11
    assert found.counts()["latents"].sum() == QUICK["features"]
    with pytest.raises(InputError, match="one site in each"):
        diff_models(pair, with_other(crosscoder, sites=(Site(0, "resid_post"), site)), rows[:4])


def with_other(crosscoder, **other: Any):
    """The same weights at other sites."""
    return Crosscoder(
        **dict(crosscoder.named_parameters(recurse=False)), activation=crosscoder.activation, scales=crosscoder.scales,
        provenance=crosscoder.provenance, **other,
    )  # fmt: skip


def test_wrong_use_is_one_sentence(model, rows, trained, tmp_path):
    crosscoder, _ = trained
    config = SAEConfig(**QUICK)
    with pytest.raises(InputError, match="each once; got none"):
        train_crosscoder(model, rows, config, sites=[])
    with pytest.raises(ModelError, match="There is no site 9.resid_post"):
        train_crosscoder(model, rows, config, sites=[Site(9, "resid_post")], out=tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(InputError, match="have one width"):
        train_crosscoder(model, rows, config, sites=[Site(0, "resid_post"), Site(0, "mlp_neurons")])
    with pytest.raises(InputError, match="on vectors without a model"):
        train_crosscoder(model, torch.zeros(10, 2, 4), config)
    with pytest.raises(InputError, match="own 2 sites"):
        train_crosscoder(None, torch.zeros(200, 2, 4), config, sites=[Site(0, "mlp_out")])
    with pytest.raises(DictionaryError, match=r"side by side as \[token, site, d_model\]; got \[3, 8\]"):
        crosscoder.encode(torch.zeros(3, 8))
    with pytest.raises(DictionaryError, match="share a width evenly; got vectors of width 8"):
        train(None, torch.zeros(200, 8), SAEConfig(**QUICK, side_by_side=3))
    with pytest.raises(ModelError, match="has d_model"):
        ModelPair(model, random_model("gpt2", d_model=48))
    with pytest.raises(DictionaryError, match="is not what it was trained on"):
        evaluate_crosscoder(ModelPair(model, model), crosscoder, rows)
    with pytest.raises(DictionaryError, match="weights of a crosscoder disagree"):
        with_other(crosscoder, sites=crosscoder.sites[:1])
    assert dataclasses.is_dataclass(evaluate_crosscoder(model, crosscoder, rows[:1], losses=False))
