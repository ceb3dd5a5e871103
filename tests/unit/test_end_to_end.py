"""Fine-tuning end to end: its loss against autograd through the model itself, and what a run leaves behind."""

import json
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from circuitsae.commands.app import run
from circuitsae.frozen import FrozenModel, Writes
from tests.unit.test_training_gradients import draw
from transcoders import Transcoder, TranscoderSet, finetune, load_dictionaries, random_dictionaries, random_model
from transcoders.dictionaries import DictionaryProvenance, ReLU
from transcoders.errors import DictionaryError, InputError, NotFiniteError
from transcoders.held import HeldModel, held_hooks
from transcoders.sites import Site
from transcoders.training import EndToEndConfig
from transcoders.training.config_reading import config_of
from transcoders.training.end_to_end import draw_changes, end_to_end_losses, logit_metric
from transcoders.training.end_to_end_run import EndToEndRun
from transcoders.training.export import Scales
from transcoders.training.replacement import Replacement
from transcoders.training.warm_start import Start

N_LAYERS, D_MODEL, D_VOCAB, FIRST = 3, 8, 20, 2
TOPK = {"activation": "topk", "k": 3, "skip": True}
JUMP, JUMP_SKIP, RELU = {"activation": "jumprelu"}, {"activation": "jumprelu", "skip": True}, {"activation": "relu"}
CASES = [
    pytest.param("gpt2", "plt", TOPK, False, id="gpt2-plt-topk"),
    pytest.param("llama", "plt", TOPK, True, id="llama-plt-topk-sparse"),
    pytest.param("llama", "plt", JUMP, False, id="llama-plt-jumprelu"),
    pytest.param("gpt2", "clt", JUMP_SKIP, False, id="gpt2-clt-jumprelu"),
    pytest.param("llama", "clt", RELU, True, id="llama-clt-relu-sparse"),
]


@cache
def model_of(family, dtype="float64", n_layers=N_LAYERS):
    sizes: Any = {"n_layers": n_layers, "d_model": D_MODEL, "n_heads": 2, "d_vocab": D_VOCAB, "context": 16}
    return random_model(family, **sizes, seed=1).to(dtype)


def rows(n=3, width=7, seed=0):
    return torch.randint(0, D_VOCAB, (n, width), generator=torch.Generator().manual_seed(seed))


def dictionaries(kind, **options):
    sizes = {"n_layers": N_LAYERS, "d_model": D_MODEL, "features": 12, "dtype": torch.float64}
    return random_dictionaries(kind, **sizes, **options)


class Case:
    """Dictionaries in training in a model, on some rows with an exact token in their midst."""

    def __init__(self, model, kind, options, *, sparse=False, scales=None):
        self.model, self.d = model, dictionaries(kind, **options)
        start = Start.of(self.d)
        self.config = start.config(config_of(kind))
        ones = torch.ones(N_LAYERS, dtype=torch.float64)
        self.scales = scales or Scales(ones, ones)
        weights = start.weights(self.config, self.scales, dtype=torch.float64)
        self.replacement = Replacement(weights, self.scales, sparse=sparse)
        self.held = HeldModel(model, rows(), self.d.reads, self.d.writes)
        self.usable = torch.ones(3, 7, dtype=torch.bool)
        self.usable[:, :FIRST] = False
        self.usable[1, 4] = False  # a massive token
        self.metric = logit_metric(model)

    def losses(self, seed=0, size=1e-6):
        return end_to_end_losses(
            self.replacement, self.held, self.usable, self.config, first=FIRST, metric=self.metric,
            generator=torch.Generator().manual_seed(seed), size=size,
        )  # fmt: skip

    def changed(self, seed=0):
        return draw_changes(self.replacement, self.held, self.usable, torch.Generator().manual_seed(seed))

    def parameters(self):
        """Those of the stack of one of each layer, as the oracle's names have them."""
        return {f"{i}.{n}": p for i, view in enumerate(self.replacement.layers) for n, p in view.named_parameters()}


@pytest.mark.parametrize(("family", "kind", "options", "sparse"), CASES)
def test_the_replaced_run_is_the_frozen_model_with_the_dictionaries_writes(family, kind, options, sparse):
    model = model_of(family)
    scales = Scales(draw(N_LAYERS, seed=8).abs() + 0.5, draw(N_LAYERS, seed=9).abs() + 0.5)
    case = Case(model, kind, options, sparse=sparse, scales=scales)
    edits = case.replacement.splice(case.usable, case.d.reads, case.d.writes)
    final, _ = case.held.run(edits)
    for row in range(3):
        frozen = FrozenModel(model, rows()[row])
        keep, writes = case.usable[row][None, :, None], frozen.writes.mlp_out
        for layer in range(N_LAYERS):  # reads of a layer are known once the layers before have written
            reads = frozen(Writes(frozen.writes.embed, frozen.writes.position, writes)).by_layer
            made = case.d.reconstruct(case.d.encode(reads), reads)
            live = model_writes(model, reads)
            writes = torch.where((torch.arange(N_LAYERS) <= layer)[:, None, None], made.where(keep, live), writes)
        expected = frozen(Writes(frozen.writes.embed, frozen.writes.position, writes)).final
        torch.testing.assert_close(final[row], expected)
        same = ~case.usable[row].cumsum(0).bool()  # before anything is replaced
        torch.testing.assert_close(final[row][same], case.held.final[row][same], rtol=0, atol=0)
    assert float((final - case.held.final).detach().abs().max()) > 0.1


def model_writes(model, reads):
    """What the MLPs make of what they read."""
    return torch.cat([model.parts.blocks[layer].mlp(read[None]) for layer, read in enumerate(reads)])


def oracle(case, changed):
    """KL, derivative and FVU by autograd through the model with hooks, from the equations."""
    model, d, tokens, keep = case.model, case.d, rows(), case.usable[..., None]
    w = case.parameters()
    names = [*(model.hook(site) for site in (*d.reads, *d.writes)), "embed.hook_out", *held_hooks(model)]
    logits, clean = model.run_hooked(tokens, read=names)
    patches = {name: (lambda _, value=clean[name]: value) for name in held_hooks(model)}
    reads, writes = ([clean[model.hook(site)] for site in side] for side in (d.reads, d.writes))

    def features(layer, x):
        h = x @ w[f"{layer}.W_enc"][0].T + w[f"{layer}.b_enc"][0]
        if case.config.activation == "topk":
            return torch.relu(h) * (h >= h.topk(case.config.k, dim=-1).values[..., -1:])
        return case.replacement.layers[layer].activation(h[..., None, :])[..., 0, :]

    def write(layer, seen):
        y = w[f"{layer}.b_dec"][0]
        for i, x in enumerate(seen[: layer + 1]):
            W_dec = w[f"{i}.W_dec.0"]
            if layer - i < W_dec.shape[1]:
                y = y + features(i, x) @ W_dec[:, layer - i]
        return y + seen[layer] @ w[f"{layer}.W_skip"][0] if d.skip(layer) is not None else y

    def run(put, embed, written):
        seen, out = [], []
        edits: dict[str, Any] = dict(patches)
        edits["embed.hook_out"] = lambda _: clean["embed.hook_out"] + embed
        for i in range(N_LAYERS):
            edits[model.hook(d.reads[i])] = lambda value: seen.append(value)
            edits[model.hook(d.writes[i])] = lambda value, i=i: put(i, value, seen) + written[i]
        edits["unembed.hook_out"] = out.append
        model.run_hooked(tokens, write=edits)
        return out[0]

    zero = torch.zeros_like(changed.embed), torch.zeros_like(changed.written)
    own = [write(i, reads) for i in range(N_LAYERS)]
    q = run(lambda i, value, seen: torch.where(keep, write(i, seen), value), *zero)
    log_p, log_q = (x[:, FIRST:].log_softmax(-1) for x in (logits, q))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()

    def jvp(put, create_graph=False):
        moved = torch.autograd.functional.jvp(
            lambda *v: run(put, *v), zero, tuple(changed), create_graph=create_graph, strict=create_graph
        )[1]
        assert isinstance(moved, torch.Tensor)
        return moved - moved.mean(-1, keepdim=True)

    true = jvp(lambda i, value, seen: torch.where(keep, value, writes[i]))
    # a graph's local replacement: errors added, so that it is the model where nothing changes
    ours = jvp(lambda i, value, seen: torch.where(keep, write(i, seen) + writes[i] - own[i].detach(), writes[i]), True)
    size = true.norm(dim=-1)
    reached = size > 1e-2 * size.amax(-1, keepdim=True)
    missed = ((ours - true)[reached].square().sum(-1) / size[reached].square()).mean()
    fvu = torch.stack([(y - t)[case.usable].square().mean() for y, t in zip(own, writes, strict=True)])
    return kl, missed, fvu


@pytest.mark.parametrize(("family", "kind", "options", "sparse"), CASES)
def test_the_loss_and_its_gradients_are_autograds(family, kind, options, sparse):
    case = Case(model_of(family), kind, options, sparse=sparse)
    found = case.losses()
    expected = oracle(case, case.changed())
    torch.testing.assert_close(
        torch.stack([found.kl, found.derivative]), torch.stack(expected[:2]), rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(found.fvu, expected[2])
    parameters = case.parameters()
    parts = zip((found.kl, found.derivative, found.fvu.mean()), (*expected[:2], expected[2].mean()), strict=True)
    for part, wanted in parts:
        ours, theirs = (
            torch.autograd.grad(side, list(parameters.values()), retain_graph=True, allow_unused=True)
            for side in (part, wanted)
        )
        for name, mine, other in zip(parameters, ours, theirs, strict=True):
            zeros = torch.zeros_like(parameters[name])
            torch.testing.assert_close(
                zeros if mine is None else mine, zeros if other is None else other, rtol=1e-3, atol=1e-6, msg=name
            )
    assert all(weight.grad is None and not weight.requires_grad for _, weight in case.model.parts.weights())


def exact_dictionaries(model):
    """Transcoders whose features are the neurons of an MLP of ReLUs."""
    layers = []
    for layer, block in enumerate(model.bridge.blocks):
        inner, outer = (getattr(block.mlp, name) for name in ("in", "out"))
        layers.append(
            Transcoder(
                W_enc=inner.weight.T.clone(),
                b_enc=inner.bias.clone(),
                W_dec=outer.weight.T.clone(),
                b_dec=outer.bias.clone(),
                activation=ReLU(),
                read=Site(layer, "mlp_in"),
                write=Site(layer, "mlp_out"),
            )
        )
    return TranscoderSet(layers, DictionaryProvenance(model="neurons"))


def test_dictionaries_that_are_the_mlps_have_no_loss():
    model = model_of("opt", n_layers=2)
    d = exact_dictionaries(model)
    case_config = Start.of(d).config(config_of("plt"))
    scales = Scales(draw(2, seed=8).abs() + 0.5, draw(2, seed=9).abs() + 0.5)
    replacement = Replacement(Start.of(d).weights(case_config, scales, dtype=torch.float64), scales)
    held, usable = HeldModel(model, rows(), d.reads, d.writes), torch.ones(3, 7, dtype=torch.bool)
    metric, generator = logit_metric(model), torch.Generator().manual_seed(0)
    found = end_to_end_losses(
        replacement, held, usable, case_config, first=0, metric=metric, generator=generator, size=1e-6
    )
    for part, most in ((found.kl, 1e-12), (found.fvu.max(), 1e-20), (found.derivative, 1e-6), (1 - found.agreement, 0)):
        assert float(part.detach()) <= most
    with torch.no_grad():
        replacement.layers[1].W_dec[0] *= 1.5
    worse = end_to_end_losses(
        replacement, held, usable, case_config, first=0, metric=metric, generator=generator, size=1e-6
    )
    assert min(float(part.detach().max()) for part in (worse.kl, worse.derivative, worse.fvu)) > 1e-3


def test_the_metric_measures_centred_logits():
    model = model_of("gpt2")
    change = draw(5, D_MODEL)
    logits = change @ model.W_U
    expected = (logits - logits.mean(-1, keepdim=True)).norm(dim=-1)
    torch.testing.assert_close((change @ logit_metric(model)).norm(dim=-1), expected)


def test_changes_are_of_one_token_each_as_large_as_what_is_written_there():
    case = Case(model_of("gpt2"), "clt", RELU)
    kinds = set()
    for seed in range(8):
        embed, written = case.changed(seed)
        for row in range(3):
            moved = embed[row].norm(dim=-1) + written[:, row].norm(dim=(0, -1))
            (pos,) = moved.nonzero().squeeze(1).tolist()
            assert case.usable[row, pos]
            if (layers := written[:, row, pos].norm(dim=-1).nonzero().squeeze(1).tolist()) != []:
                expected = case.held.clean.writes[layers[0], row, pos].norm()
                torch.testing.assert_close(written[:, row, pos].norm(), expected)
            kinds.add(tuple(layers))
    assert kinds == {(), (0, 1, 2), (1, 2), (2,)}
    with torch.no_grad():
        for view in case.replacement.layers:
            view.W_dec[0].zero_()
    assert not any(written.any() for _, written in map(case.changed, range(4)))


# runs

CONFIG = EndToEndConfig(tokens=9 * 4 * 8, rows=4, context=9, lr=2e-2, log_every=3, checkpoint_every=3)


def start(kind: Any = "plt", **options: Any) -> Any:
    options = {"activation": "topk", "k": 3, "dtype": torch.float32} | options
    return random_dictionaries(kind, n_layers=2, d_model=D_MODEL, features=12, **options)


def small():
    return model_of("gpt2", "float32", 2)


def text():
    return rows(40, 9, seed=3)


def kl(d, tokens):
    tuning = EndToEndRun(small(), d, tokens, replace(CONFIG, derivative=0.0))
    tuning.begin()
    with torch.no_grad():
        return float(tuning.losses(tokens).kl)


@pytest.mark.parametrize("options", [{}, {"kind": "clt", "activation": "jumprelu"}], ids=["topk", "clt-jumprelu"])
def test_a_few_steps_bring_the_replaced_model_nearer_to_the_model(options):
    d = start(**options)
    before = {name: weight.clone() for name, weight in d.state_dict().items()}
    tuned = finetune(small(), d, text(), CONFIG, progress=False)
    held_out = rows(20, 9, seed=4)
    assert kl(tuned, held_out) < 0.8 * kl(d, held_out)
    for name, weight in d.state_dict().items():
        assert torch.equal(weight, before[name]), name
    (record,) = tuned.provenance.config["end_to_end"]
    assert {key: record[key] for key in ("tokens", "start", "derivative")} == {
        "tokens": 9 * 4 * 8, "start": Start.of(d).hash, "derivative": 0.1,
    }  # fmt: skip
    again = EndToEndRun(small(), tuned, text(), CONFIG)
    again.begin()
    assert [each["tokens"] for each in again.export().provenance.config["end_to_end"]] == [288, 0]
    assert (tuned.provenance.first, tuned.reads) == (d.provenance.first, d.reads)


def test_nothing_is_replaced_before_the_first_position_nor_at_massive_tokens():
    d, model = start(), small()
    norms = model.activations(text(), [Site(1, "mlp_out")])[Site(1, "mlp_out")].norm(dim=-1)
    limit = float(norms[:, 3:].flatten().kthvalue(norms[:, 3:].numel() - 3).values)
    d.provenance = replace(d.provenance, first=3, limits={"1.mlp_out": limit})
    tuning = EndToEndRun(model, d, text(), CONFIG)
    tuning.begin()
    held, usable = tuning.text(text())
    assert torch.equal(usable, (norms <= limit) & (torch.arange(9) >= 3))
    assert int((~usable[:, 3:]).sum()) == 3
    seen = {}
    edits = tuning.replacement.splice(usable, d.reads, d.writes)
    for site, hook in edits.items():
        if site.kind == "mlp_out":

            def put(value, hook=hook, layer=site.layer):
                seen[layer] = (value, hook(value))
                return seen[layer][1]

            edits[site] = put
    held.run(edits)
    for layer in range(2):
        value, replaced = seen[layer]
        assert torch.equal(value[~usable], replaced[~usable])
        assert not torch.isclose(value[usable], replaced[usable]).all(-1).any()


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_a_run_that_was_cut_goes_on_to_the_very_weights(activation, tmp_path):
    d = start(activation=activation)
    whole: Any = finetune(small(), d, text(), CONFIG, out=tmp_path / "whole", progress=False)
    cut = EndToEndRun(small(), d, text(), CONFIG, out=tmp_path / "cut")
    cut.begin()
    cut.run(until=7, progress=False)
    with (tmp_path / "cut" / "checkpoint-00000006" / "state.safetensors").open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"abc")  # so that the one before it is gone on from
    other = EndToEndRun(small(), d, text(), CONFIG, out=tmp_path / "cut")
    other.begin(resume=True)
    assert other.step == 3
    resumed: Any = finetune(small(), d, text(), CONFIG, out=tmp_path / "cut", resume=True, progress=False)
    again: Any = finetune(small(), d, text(), CONFIG, out=tmp_path / "cut", resume=True, progress=False)  # complete
    stored: Any = load_dictionaries(tmp_path / "whole")
    for name, weight in whole.state_dict().items():
        for made in (resumed, again, stored):
            assert torch.equal(weight, made.state_dict()[name]), name
    metrics = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("whole", "cut")]
    assert metrics[0] == metrics[1]
    assert [json.loads(line)["step"] for line in metrics[0].splitlines()] == [3, 6, 8]
    with pytest.raises(InputError, match=r"belongs to another run: its seed is 0, this run's 1"):
        finetune(small(), d, text(), replace(CONFIG, seed=1), out=tmp_path / "cut", resume=True, progress=False)
    with pytest.raises(InputError, match=r"belongs to another run: its start is"):
        finetune(small(), whole, text(), CONFIG, out=tmp_path / "cut", resume=True, progress=False)


def test_the_command_fine_tunes_and_says_where(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transcoders.data.tokens._DOCUMENTS_AT_ONCE", 8)  # hundreds would be read for two rows
    options = ["--tokens", "32", "--rows", "1", "--context", "16", "--evaluate-tokens", "0", "--derivative", "0"]
    run(["finetune", "pocket-plt", "--model", "pocket", "--out", str(tmp_path), *options])
    assert str(tmp_path) in capsys.readouterr().out.replace("\n", "")
    (record,) = load_dictionaries(tmp_path).provenance.config["end_to_end"]
    assert {key: record[key] for key in ("tokens", "corpus", "context")} == {
        "tokens": 32, "corpus": "pocket", "context": 16,
    }  # fmt: skip


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    tuning = EndToEndRun(small(), start(), text(), CONFIG, out=tmp_path)
    tuning.begin()
    tuning.run(until=3, progress=False)
    with torch.no_grad():
        tuning.replacement.layers[1].W_dec[0][0] = torch.nan
    with pytest.raises(NotFiniteError, match=r"stopped at step 4: its loss is nan.*checkpoint-00000003"):
        tuning.run(progress=False)
    with pytest.raises(NotFiniteError, match=r"What was fine-tuned has numbers in weights\.W_dec\.1"):
        tuning.finish()


def test_what_cannot_be_fine_tuned(tmp_path):
    with pytest.raises(DictionaryError, match="SAEs rebuild what they read"):
        finetune(
            small(), random_dictionaries("sae", n_layers=2, d_model=D_MODEL), text(), CONFIG, out=tmp_path / "none"
        )
    assert not (tmp_path / "none").exists()
    with pytest.raises(DictionaryError, match="TopK ranks the features of all layers together"):
        finetune(small(), start("clt"), text(), CONFIG)
    with pytest.raises(InputError, match=r"for which torch\.bfloat16 is too coarse"):
        finetune(random_model(d_model=D_MODEL, n_heads=2).to("bfloat16"), start(), text(), CONFIG)
    with pytest.raises(InputError, match="Rows of 2 tokens have none after the first 1"):
        finetune(small(), start(), text()[:, :2], CONFIG)
    with pytest.raises(InputError, match="`resume` goes on from a checkpoint in an output folder"):
        finetune(small(), start(), text(), CONFIG, resume=True)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"rows": 0}, "rows must be at least 1; got 0"),
        ({"derivative": -1.0}, "derivative must be at least 0; got -1.0"),
        ({"lr": 0.0}, "lr must be positive; got 0.0"),
        ({"decay": 2.0}, "decay is a fraction of the steps, from 0 to 1; got 2.0"),
        ({"context": 1}, "context must be at least 2"),
    ],
)
def test_settings_that_mean_nothing(settings, says):
    with pytest.raises(InputError, match=says):
        EndToEndConfig(**settings)
