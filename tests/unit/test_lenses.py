"""Lenses and patches against the model itself: another run, with plain hooks of its own bridge, in float64."""

import numpy as np
import pytest
import torch

from circuitsae.components.problem import PatchingProblem
from circuitsae.lenses import TunedLens, causal_trace, direction_lens, fit_lens, logit_lens, patch_sweep
from circuitsae.lenses.tracing import noisy_embeddings
from circuitsae.replacement import ReplacementModel
from transcoders.dictionaries.random import random_dictionaries
from transcoders.errors import FileFormatError, InputError
from transcoders.random_models import random_model

FAMILIES = ("gpt2", "llama", "gptj", "gemma2")
"""Learned positions, RMSNorm, attention beside the MLP, norms after both with soft caps."""
D_VOCAB, POS = 23, 5
HOOKS = {"resid_post": "hook_out", "mlp_out": "mlp.hook_out", "attn_out": "attn.hook_out"}
EMBED = "embed.hook_out"


def difference(logits):
    return logits[:, -1, 3] - logits[:, -1, 4]


def small(family, **sizes):
    sizes = {"n_layers": 3, "d_model": 16, "n_heads": 4, "d_vocab": D_VOCAB, **sizes}
    return random_model(family, context=12, dtype=torch.float64, **sizes)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return small(request.param)


@pytest.fixture(scope="module")
def gpt2():
    return small("gpt2")


def rows(n=2, pos=POS, seed=1):
    return torch.randint(0, D_VOCAB, (n, pos), generator=torch.Generator().manual_seed(seed))


def hooked(model, tokens, edits):
    """Logits of a plain run of the bridge with plain hooks, and what was at every state."""
    at = {}

    def seen(name):
        def hook(value, hook):
            if name in edits:
                value = edits[name](value)
            at[name] = value
            return value

        return hook

    names = [f"blocks.{layer}.{place}" for layer in range(model.n_layers) for place in HOOKS.values()]
    hooks = [(name, seen(name)) for name in [EMBED, *names]]
    logits = model.bridge.run_with_hooks(tokens, fwd_hooks=hooks, return_type="logits", prepend_bos=False)
    return logits, at


def at_cell(source, name, where):
    return {name: lambda value: torch.where(where[..., None], source[name], value)}


@pytest.mark.parametrize(("kind", "window"), [("resid_post", 1), ("mlp_out", 1), ("attn_out", 2)])
def test_each_cell_of_a_sweep_is_a_run_with_a_hook(model, kind, window):
    clean, corrupt = rows(seed=1), rows(seed=2)
    found = patch_sweep(model, PatchingProblem(model, clean, corrupt, difference), kind=kind, window=window)
    source, (before, _) = hooked(model, clean, {})[1], hooked(model, corrupt, {})
    for layer in range(model.n_layers):
        together = range(layer, min(layer + window, model.n_layers))
        for pos in range(POS):
            where = (torch.arange(POS) == pos).expand(2, -1)
            edits = {}
            for each in together:
                edits |= at_cell(source, f"blocks.{each}.{HOOKS[kind]}", where)
            expected = difference(hooked(model, corrupt, edits)[0]) - difference(before)
            np.testing.assert_allclose(found.effects[layer, pos], expected.numpy(), atol=1e-10)


@pytest.mark.parametrize("kind", ["resid_post", "mlp_out"])
def test_each_cell_of_a_causal_trace_is_a_run_with_hooks(model, kind):
    tokens, samples = rows(1)[0], 3
    found = causal_trace(model, tokens, [1, 2], answer=7, kind=kind, samples=samples, seed=4)
    many = tokens.repeat(samples, 1)
    clean_logits, source = hooked(model, many, {})
    where = torch.zeros(POS, dtype=torch.bool)
    where[[1, 2]] = True
    embed = noisy_embeddings(model, tokens, where, 3.0, samples, 4)
    moved = (embed - source[EMBED]).abs().sum(-1) > 0
    assert torch.equal(moved, where.expand(samples, -1))
    drown = {EMBED: lambda value: embed}

    def p(logits):
        return logits[:, -1].softmax(-1)[:, 7].numpy()

    noisy = p(hooked(model, many, drown)[0])
    np.testing.assert_allclose(found.base, noisy, atol=1e-12)
    np.testing.assert_allclose(found.source, p(clean_logits), atol=1e-12)
    for layer in range(model.n_layers):
        for pos in range(POS):
            name = f"blocks.{layer}.{HOOKS[kind]}"
            edits = drown | at_cell(source, name, (torch.arange(POS) == pos).expand(samples, -1))
            expected = p(hooked(model, many, edits)[0]) - noisy
            np.testing.assert_allclose(found.effects[layer, pos], expected, atol=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "granite"])
def test_noise_has_the_size_that_is_asked_for(family):
    """In units of what the stream begins with: Gemma scales embeddings in their module, Granite after it."""
    model = small(family, d_vocab=12)
    tokens = torch.arange(12)
    every = hooked(model, tokens[None], {})[1][EMBED][0]
    noise = noisy_embeddings(model, tokens, tokens > 0, 3.0, 200, 0) - every
    assert float(noise[:, 1:].std() / every.std()) == pytest.approx(3.0, rel=0.02)
    assert not noise[:, 0].any()


def test_everything_restored_is_the_clean_run(model):
    clean, corrupt = rows(seed=1), rows(seed=2)
    every = torch.ones(1, 2, POS, dtype=torch.bool)
    problem = PatchingProblem(model, clean, corrupt, difference, spans=every, span_names=("all",))
    for direction in ("denoise", "noise"):
        found = patch_sweep(model, problem, direction=direction)
        np.testing.assert_allclose(found.effects, np.broadcast_to(found.source - found.base, (3, 1, 2)), atol=1e-10)
        assert found.frame()["share"].tolist() == pytest.approx([1.0] * 3)


def test_a_sweep_is_the_same_in_small_batches(gpt2):
    problem = PatchingProblem(gpt2, rows(seed=1), rows(seed=2), difference, read=torch.full((2,), POS - 1))
    whole, small_ones = (patch_sweep(gpt2, problem, kind="attn_out", batch_tokens=n) for n in (4096, POS))
    np.testing.assert_allclose(whole.effects, small_ones.effects, atol=1e-12)
    low, high = whole.interval()
    assert ((low <= whole.mean + 1e-12) & (whole.mean <= high + 1e-12)).all()


def test_the_lens_reads_what_the_model_would_say(model):
    tokens = rows(1)[0]
    found = logit_lens(model, tokens, top=D_VOCAB)
    logits, at = hooked(model, tokens[None], {})
    final = model.bridge.ln_final
    for layer in range(model.n_layers):
        said = model.bridge.unembed(final(at[f"blocks.{layer}.hook_out"]))[0]
        cap = model.bridge.cfg.output_logits_soft_cap if model.parts.logit_cap else -1
        said = cap * torch.tanh(said / cap) if cap > 0 else said
        p = np.take_along_axis(said.softmax(-1).numpy(), found.top[layer + 1], axis=1)
        np.testing.assert_allclose(found.probabilities[layer + 1], p, atol=1e-12)
    p = np.take_along_axis(logits[0].softmax(-1).numpy(), found.top[-1], axis=1)
    np.testing.assert_allclose(found.probabilities[-1], p, atol=1e-12)
    assert np.abs(found.kl[-1]).max() < 1e-12
    assert (found.rank[-1] == 0).all()
    assert (found.kl[0] > 0.01).all()
    assert len(found.frame()) == (model.n_layers + 1) * POS


def test_a_tuned_lens_is_nearer_to_the_model_on_text_held_out(gpt2, tmp_path):
    lens = fit_lens(gpt2, rows(60, 12), steps=60, batch_tokens=120)
    judged = lens.frame()
    plain_kl, tuned_kl = (judged[side].to_numpy(float) for side in ("plain", "tuned"))
    assert (tuned_kl[:-1] < plain_kl[:-1]).all()
    assert [plain_kl[-1], tuned_kl[-1]] == pytest.approx([0, 0], abs=1e-12)
    again = TunedLens.load(lens.save(tmp_path / "lens.safetensors"))
    plain, tuned = logit_lens(gpt2, rows(1)[0]), logit_lens(gpt2, rows(1)[0], lens=again)
    by_hand = gpt2.activations(rows(1), [site := _after(0)])[site][0] @ lens.A[1] + lens.b[1]
    said = gpt2.bridge.unembed(gpt2.bridge.ln_final(by_hand[None]))[0].softmax(-1).max(-1).values
    np.testing.assert_allclose(tuned.probabilities[1, :, 0], said.numpy(), atol=1e-12)
    assert tuned.kl[:-1].mean() < plain.kl[:-1].mean()
    nothing = fit_lens(gpt2, rows(60, 12), steps=0)
    assert nothing.fitted["plain"] == pytest.approx(nothing.fitted["tuned"])


def _after(layer):
    from transcoders.sites import Site

    return Site(layer, "resid_post")


def test_a_lens_of_another_model_or_no_lens_is_refused(gpt2, tmp_path):
    lens = fit_lens(gpt2, rows(4, 6), steps=0)
    with pytest.raises(InputError, match="was fitted to random-gpt2-0"):
        logit_lens(small("gpt2", seed=3), rows(1)[0], lens=lens)
    (tmp_path / "no.safetensors").write_bytes(b"nothing")
    with pytest.raises(FileFormatError, match="no tuned lens"):
        TunedLens.load(tmp_path / "no.safetensors")
    with pytest.raises(InputError, match="fit-lens"):
        TunedLens.load(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("family", ["gpt2", "gptj", "gemma2"])
@pytest.mark.parametrize("kind", ["plt", "clt"])
def test_a_direction_is_what_a_held_norm_makes_of_it(family, kind):
    lm = small(family)
    model = ReplacementModel(lm, random_dictionaries(kind, n_layers=3, d_model=16, features=24, seed=2))
    trace = model.trace(rows(1)[0])
    layer, pos, index = trace.features.index[trace.features.index[:, 0] == 1][0].tolist()
    nodes = [f"{layer}.{index}@{pos}", f"0.err@{pos}"]
    found = direction_lens(model, trace, nodes, top=3)
    for node, logits in zip(nodes, found.logits, strict=True):
        expected = _straight_by_hooks(model, trace, node, layer, pos, index)
        np.testing.assert_allclose(logits, expected - expected.mean(), atol=1e-9)
    assert (np.diff(np.take_along_axis(found.logits, found.promoted, 1)) <= 0).all()


def _straight_by_hooks(model, trace, node, layer, pos, index):
    """What taking the node's own writes from the last stream changes in the raw logits, the final norm's scale held."""
    lm, d = model.model, model.dictionaries
    raw, scale, post = {}, {}, {}

    def note(name):
        return name, lambda value, hook: post.__setitem__(name, value)

    norms = [f"blocks.{m}.ln2_post.hook_scale" for m in range(lm.n_layers)]
    names = [name for name in norms if lm.has_hook(name)]
    hooks = [("ln_final.hook_scale", lambda value, hook: scale.__setitem__("held", value))]
    hooks += [("unembed.hook_out", lambda value, hook: raw.__setitem__("clean", value)), *map(note, names)]
    lm.bridge.run_with_hooks(trace.tokens[None], fwd_hooks=hooks, prepend_bos=False)
    total = torch.zeros(lm.d_model, dtype=torch.float64)
    for m in d.write_layers(layer) if "err" not in node else [0]:
        rows_ = d.decoder_rows(layer, torch.tensor([index]), m)[0] if "err" not in node else None
        at = (trace.features.index == torch.tensor([layer, pos, index])).all(-1)
        v = trace.errors[0, pos] if rows_ is None else trace.features.value[at][0] * rows_
        if norms[m] in post:
            v = v / post[norms[m]][0, pos] * lm.parts.blocks[m].norm("ln2_post").weight()
        total = total + v

    def take(value, hook):
        value = value.clone()
        value[0, pos] -= total
        return value

    hooks = [(f"blocks.{lm.n_layers - 1}.hook_out", take), ("ln_final.hook_scale", lambda value, hook: scale["held"])]
    hooks += [("unembed.hook_out", lambda value, hook: raw.__setitem__("changed", value))]
    lm.bridge.run_with_hooks(trace.tokens[None], fwd_hooks=hooks, prepend_bos=False)
    return (raw["clean"] - raw["changed"])[0, pos].detach().numpy()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: causal_trace(m, rows(1)[0], [9]), "not among the prompt's 5"),
        (lambda m: causal_trace(m, rows(1)[0], "x"), "give positions"),
        (lambda m: causal_trace(m, rows(1)[0], [1], window=3), "one state too many"),
        (lambda m: causal_trace(m, rows(1)[0], [1], noise=0.0), "nothing to average"),
        (lambda m: patch_sweep(m, [], kind="mlp_out"), "no problem"),
        (lambda m: logit_lens(m, rows(1)[0], target=99), "no token 99"),
        (lambda m: fit_lens(m, rows(1)), "nothing to hold out"),
    ],
)
def test_what_makes_no_sense_is_refused(gpt2, call, says):
    with pytest.raises(InputError, match=says):
        call(gpt2)
