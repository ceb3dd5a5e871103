"""Fine-tuning end to end: its loss against autograd through the model itself, and what a run leaves behind."""

from dataclasses import replace

import pytest
import torch

from circuitsae.frozen import FrozenModel, Writes
from tests.unit.test_training_gradients import draw
from transcoders import Transcoder, TranscoderSet, finetune, load_dictionaries, random_dictionaries, random_model
from transcoders.dictionaries import DictionaryProvenance, ReLU
from transcoders.errors import DictionaryError, InputError, NotFiniteError
from transcoders.held import HeldModel, held_hooks
from transcoders.sites import Site
from transcoders.training import EndToEndConfig
from transcoders.training.config import config_of
from transcoders.training.end_to_end import draw_changes, end_to_end_losses, logit_metric
from transcoders.training.end_to_end_run import EndToEndRun
from transcoders.training.export import Scales
from transcoders.training.replacement import Replacement
from transcoders.training.warm_start import Start

N_LAYERS, D_MODEL, D_VOCAB, FIRST = 3, 8, 20, 2
KINDS = [
    ("plt", {"activation": "topk", "k": 3, "skip": True}),
    ("plt", {"activation": "jumprelu"}),
    ("clt", {"activation": "jumprelu", "skip": True}),
    ("clt", {"activation": "relu"}),
]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request):
    sizes = {"n_layers": N_LAYERS, "d_model": D_MODEL, "n_heads": 2, "d_vocab": D_VOCAB, "context": 16}
    return random_model(request.param, **sizes, seed=1).to("float64")


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


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize(("kind", "options"), KINDS, ids=lambda x: x if isinstance(x, str) else x["activation"])
def test_the_replaced_run_is_the_frozen_model_with_the_dictionaries_writes(model, kind, options, sparse):
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
    assert float((final - case.held.final).abs().max()) > 0.1


def model_writes(model, reads):
    """What the MLPs make of what they read."""
    return torch.cat([model.parts.blocks[layer].mlp(read[None]) for layer, read in enumerate(reads)])


def oracle(case, changed):
    """KL, derivative and FVU by autograd through the model with hooks, from the equations; the weights given by name."""
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
        seen, edits, out = [], dict(patches), []
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
        return moved - moved.mean(-1, keepdim=True)

    true = jvp(lambda i, value, seen: torch.where(keep, value, writes[i]))
    # a graph's local replacement: errors added, so that it is the model where nothing changes
    ours = jvp(lambda i, value, seen: torch.where(keep, write(i, seen) + writes[i] - own[i].detach(), writes[i]), True)
    size = true.norm(dim=-1)
    reached = size > 1e-2 * size.amax(-1, keepdim=True)
    missed = ((ours - true)[reached].square().sum(-1) / size[reached].square()).mean()
    fvu = torch.stack([(y - t)[case.usable].square().mean() for y, t in zip(own, writes, strict=True)])
    return kl, missed, fvu


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize(("kind", "options"), KINDS, ids=lambda x: x if isinstance(x, str) else x["activation"])
def test_the_loss_and_its_gradients_are_autograds(model, kind, options, sparse):
    if sparse and options["activation"] == "jumprelu":
        pytest.skip("sparse codes list no features below the threshold, which is for ranked features alone")
    case = Case(model, kind, options, sparse=sparse)
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
    assert all(weight.grad is None and not weight.requires_grad for _, weight in model.parts.weights())
