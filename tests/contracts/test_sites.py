"""Every site of a model is what Hugging Face's own modules take and give, and an edit of it is what follows reads.

The oracle hooks the modules of a model that has no bridge around it.
"""

from typing import Any

import pytest
import torch

from transcoders.errors import DictionaryError, ModelError
from transcoders.evaluation import evaluate
from transcoders.loading import random_model
from transcoders.random_models import Family, random_module
from transcoders.sites import Site, SiteKind
from transcoders.training import SAEConfig, train

SIZES = {
    "n_layers": 2, "d_model": 16, "n_heads": 4, "n_kv_heads": 2, "d_head": 8, "d_mlp": None, "d_vocab": 64,
    "context": 64,
}  # fmt: skip
TOKENS = torch.tensor([[0, 11, 22, 33, 11], [7, 1, 2, 3, 4]])
IN, OUT = "in", "out"
LLAMA: dict[SiteKind, tuple[str, str]] = {
    "resid_pre": ("", IN),
    "resid_mid": ("post_attention_layernorm", IN),
    "resid_post": ("", OUT),
    "mlp_in": ("mlp", IN),
    "mlp_neurons": ("mlp.down_proj", IN),
    "mlp_out": ("mlp", OUT),
    "mlp_added": ("mlp", OUT),
    "attn_z": ("self_attn.o_proj", IN),
    "attn_out": ("self_attn", OUT),
    "attn_added": ("self_attn", OUT),
}
GEMMA = LLAMA | {
    "resid_mid": ("pre_feedforward_layernorm", IN),
    "mlp_added": ("post_feedforward_layernorm", OUT),
    "attn_added": ("post_attention_layernorm", OUT),
}
GPT2: dict[SiteKind, tuple[str, str]] = {
    "resid_pre": ("", IN),
    "resid_mid": ("ln_2", IN),
    "resid_post": ("", OUT),
    "mlp_in": ("mlp", IN),
    "mlp_neurons": ("mlp.c_proj", IN),
    "mlp_out": ("mlp", OUT),
    "mlp_added": ("mlp", OUT),
    "attn_z": ("attn.c_proj", IN),
    "attn_out": ("attn", OUT),
    "attn_added": ("attn", OUT),
}
PARALLEL = {kind: place for kind, place in GPT2.items() if kind != "resid_mid"} | {
    "mlp_neurons": ("mlp.fc_out", IN),
    "attn_z": ("attn.out_proj", IN),
}
MODULES: dict[Family, Any] = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "gptj": PARALLEL,
}
NORMS = {
    "gpt2": "ln_2", "llama": "post_attention_layernorm", "gemma2": "pre_feedforward_layernorm",
    "gemma3": "pre_feedforward_layernorm", "gptj": "ln_1",
}  # fmt: skip
CASES = [(family, kind) for family, modules in MODULES.items() for kind in (*modules, "mlp_normed")]


@pytest.fixture(scope="module")
def models():
    sizes = {"n_layers": 2, "d_model": 16, "n_heads": 4, "d_vocab": 64, "dtype": torch.float64}
    return {family: random_model(family, **sizes) for family in MODULES}


@torch.no_grad()
def _hugging_face(family, name, side, change=None):
    """What a module of the second block of Hugging Face's own model takes or gives, and the logits.

    `change`: of that value, before it goes on.
    """
    found = []
    module = random_module(family, SIZES, seed=0).double()
    blocks = module.transformer.h if hasattr(module, "transformer") else module.model.layers
    part = blocks[1].get_submodule(name)

    def seen(value):
        found.append(value)
        return value if change is None else change(value)

    def before(_, arguments, named):
        if arguments:
            return (seen(arguments[0]), *arguments[1:]), named
        return arguments, named | {"hidden_states": seen(named["hidden_states"])}

    def after(_, arguments, out):
        return (seen(out[0]), *out[1:]) if isinstance(out, tuple) else seen(out)

    if side == IN:
        part.register_forward_pre_hook(before, with_kwargs=True)
    else:
        part.register_forward_hook(after)
    logits = module(TOKENS).logits
    return found[0].reshape(*TOKENS.shape, -1), logits


def _norm_weight(family):
    module = random_module(family, SIZES, seed=0).double()
    blocks = module.transformer.h if hasattr(module, "transformer") else module.model.layers
    return blocks[1].get_submodule(NORMS[family]).weight.detach() + (family.startswith("gemma"))


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_site_is_what_hugging_faces_modules_read_and_write(models, family, kind):
    if kind == "mlp_normed":
        stream, _ = _hugging_face(family, NORMS[family], IN)
        centred = stream - stream.mean(-1, keepdim=True) if family in ("gpt2", "gptj") else stream
        expected = centred / (centred.square().mean(-1, keepdim=True) + models[family].bridge.cfg.eps).sqrt()
    else:
        expected, _ = _hugging_face(family, *MODULES[family][kind])
    site, model = Site(1, kind), models[family]
    found = model.run(TOKENS, [site])[1][site]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # Hugging Face's RMSNorms round to float32
    assert torch.equal(model.activations(TOKENS, [site])[site], found)
    assert model.width(site) == expected.shape[-1]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_an_edit_of_a_site_changes_what_follows(models, family, kind):
    model, site = models[family], Site(1, kind)
    shift = torch.randn(model.width(site), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    # The stream in the middle is what attention adds to it; the norm's input is only read.
    place = {"mlp_normed": (NORMS[family], OUT), "resid_mid": MODULES[family]["attn_added"]}
    factor = _norm_weight(family) if kind == "mlp_normed" else 1
    name, side = place[kind] if kind in place else MODULES[family][kind]
    _, expected = _hugging_face(family, name, side, lambda value: value + shift * factor)
    logits, at = model.run(TOKENS, [site], edits={site: lambda value: value + shift})
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(at[site], model.run(TOKENS, [site])[1][site] + shift, rtol=1e-9, atol=1e-9)


def test_two_sites_at_one_place_are_both_read_and_edited(models):
    out, added = Site(1, "mlp_out"), Site(1, "mlp_added")
    doubled = {out: lambda value: 2 * value, added: lambda value: value + 1}
    _, clean = models["gpt2"].run(TOKENS, [out, added])
    _, at = models["gpt2"].run(TOKENS, [out, added], edits=doubled)
    assert torch.equal(clean[out], clean[added])
    torch.testing.assert_close(at[out], 2 * clean[out] + 1)
    _, gemma = models["gemma2"].run(TOKENS, [out, added], edits={out: lambda value: 0 * value})
    assert float(gemma[out].abs().max()) == float(gemma[added].abs().max()) == 0


@pytest.mark.parametrize(
    ("family", "kind", "reason"),
    [
        ("gptj", "resid_mid", "side by side"), ("gpt_neox", "resid_mid", "side by side"),
        ("olmo2", "mlp_normed", "no norm stands before"), ("mixtral", "mlp_neurons", "mixture of experts"),
    ],
)  # fmt: skip
def test_a_site_that_a_model_has_not_is_refused_in_a_sentence(family, kind, reason):
    with pytest.raises(ModelError, match=rf"no site 1\.{kind} \(.*{reason}.*mlp_in.*mlp_out"):
        random_model(family).run(TOKENS, [Site(1, kind)])


def test_a_layer_that_a_model_has_not_is_refused(models):
    with pytest.raises(ModelError, match=r"no site 2\.mlp_in; random-gpt2-0 has layers 0 to 1"):
        models["gpt2"].activations(TOKENS, [Site(2, "mlp_in")])


@pytest.mark.parametrize("kind", ["attn_z", "mlp_neurons"])
def test_an_sae_trains_on_heads_and_neurons_and_is_put_in_their_place(kind):
    model = random_model("gemma2", n_layers=2, d_model=16, n_heads=4, d_vocab=64)
    rows = torch.randint(0, 64, (60, 12), generator=torch.Generator().manual_seed(0))
    config = SAEConfig(site=kind, features=16, tokens=256, batch=32, activation="topk", k=4)
    saes: Any = train(model, rows[:40], config, progress=False)
    assert saes.d_model == model.width(Site(0, kind)) == 32
    found = evaluate(model, saes, rows[40:])
    reads = model.activations(rows[40:], saes.reads)
    held = {site: saes[site.layer](value) for site, value in reads.items()}
    first = {site: lambda value, put=put: torch.cat([value[:, :1], put[:, 1:]], dim=1) for site, put in held.items()}
    logits, _ = model.run(rows[40:], edits={Site(0, kind): first[Site(0, kind)]})
    loss = torch.nn.functional.cross_entropy(logits[:, 1:-1].flatten(0, 1), rows[40:, 2:].flatten())
    assert found.layers[0].loss_spliced == pytest.approx(float(loss), rel=1e-4)
    with pytest.raises(DictionaryError, match=rf"{kind} of width 32, but random-gemma2-0 has {kind} of width"):
        saes.check_fits(random_model("gemma2", n_layers=2, d_model=32))


def test_a_norm_that_sees_all_tokens_on_one_axis_is_read_and_edited_by_token():
    """OPT's second norm."""
    model, site = (
        random_model("opt", n_layers=2, d_model=16, n_heads=4, d_vocab=64, dtype=torch.float64),
        Site(1, "mlp_normed"),
    )
    shift = torch.randn(16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    norm = model.parts.blocks[1].norm("ln2")
    assert norm is not None

    def at_one_token(value):
        value = value.clone()
        value[1, 3] += shift
        return value

    logits, at = model.run(TOKENS, [site], edits={site: at_one_token})
    into_mlp = {Site(1, "mlp_in"): lambda value: at_one_token(value) - 0 * value}
    clean = model.run(TOKENS, [site, Site(1, "resid_mid")])[1]
    stream = clean[Site(1, "resid_mid")]
    centred = stream - stream.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    torch.testing.assert_close(clean[site], expected)
    torch.testing.assert_close(at[site] - clean[site], at_one_token(0 * stream))
    shift = shift * norm.weight()
    torch.testing.assert_close(logits, model.run(TOKENS, edits=into_mlp)[0])
