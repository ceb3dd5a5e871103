"""Every family of random models is the Hugging Face model it says it is, and survives a folder; others are refused."""

import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers
from transformer_lens.model_bridge.generalized_components import NormalizationBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module

import circuitsae.pocket
from circuitsae.attribution import LogitTargets, attribute, attribute_pruned
from circuitsae.attribution.attribute import EngineName
from circuitsae.replacement import ReplacementModel
from circuitsae.validation import validate
from transcoders.bridge import check_logits, own_logits
from transcoders.dictionaries import random_dictionaries
from transcoders.errors import DictionaryError, ModelError
from transcoders.held import HeldModel
from transcoders.language_model import LanguageModel
from transcoders.loading import load_model, random_model
from transcoders.random_models import Family, random_module
from transcoders.sites import Site, SiteKind
from transcoders.starting import streams_before

FAMILIES = get_args(Family)
DISTINCT: tuple[Family, ...] = (
    "gpt2", "opt", "gpt_neo", "gptj", "gpt_neox", "bloom", "llama", "mixtral", "qwen3", "gemma3", "olmo2", "cohere2",
    "granite", "gpt_oss",
)  # fmt: skip
"""One of each architecture that differs in where norms and attention stand."""
TOKENS = torch.tensor([[0, 11, 22, 33, 11, 7]])
SIZES = {"n_layers": 2, "d_model": 16, "n_heads": 4, "n_kv_heads": 2, "d_head": 8, "d_vocab": 64, "context": 64}
SMALL = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64, "intermediate_size": 32,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
GPT1 = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return random_model(family, n_layers=2, d_model=16, n_heads=4, d_vocab=64, dtype=torch.float64)


def _module(family):
    return random_module(family, {**SIZES, "d_mlp": None}, seed=0)


@torch.no_grad()
def test_logits_are_hugging_faces(family, model):
    torch.testing.assert_close(model.run(TOKENS)[0].float(), _module(family)(TOKENS).logits, rtol=1e-5, atol=2e-5)


def test_mlps_answer_small_changes_by_themselves_as_they_do_in_a_nudged_model(model):
    sides = ([Site(layer, kind) for layer in range(model.n_layers)] for kind in ("mlp_in", "mlp_out"))
    held = HeldModel(model, TOKENS, *sides)
    change = torch.randn(held.embed.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    nudged = held.nudge(change, size=1e-4)
    answers, through = (
        held.respond(nudged.reads, size=1e-4),
        held.through(lambda layer, _: nudged.writes[layer], change),
    )
    torch.testing.assert_close(through, nudged.reads, rtol=1e-6, atol=1e-6)
    largest = nudged.writes.abs().max()
    assert (answers - nudged.writes).abs().max() <= 1e-3 * largest  # experts are chosen anew in every run
    assert largest > 0


def test_a_folder_gives_the_same_logits(family, tmp_path):
    _module(family).save_pretrained(tmp_path)
    _copy_tokenizer(tmp_path)
    loaded = load_model(tmp_path)
    expected = random_model(family, n_layers=2, d_model=16, n_heads=4, d_vocab=64).run(TOKENS)[0]
    torch.testing.assert_close(loaded.run(TOKENS)[0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_experts_run_in_every_precision(tmp_path, dtype):
    _module("mixtral").save_pretrained(tmp_path)
    _copy_tokenizer(tmp_path)
    logits = load_model(tmp_path, dtype=dtype).run(TOKENS)[0]
    exact = _module("mixtral")(TOKENS).logits
    tolerance = 1e-5 if dtype == torch.float64 else 0.1
    assert (logits - exact).abs().max() <= tolerance * exact.abs().max()


def test_every_family_is_in_the_table_of_results():
    rows = (Path(__file__).parents[2] / "benchmarks/results/families.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if row.startswith("|")]
    closed = {name: float(error) for name, loads, closed, error, *_ in cells if (loads, closed) == ("yes", "yes")}
    assert set(FAMILIES) <= closed.keys()
    assert max(closed.values()) <= 1e-9


def _copy_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(circuitsae.pocket.__file__).parent / "model" / name, folder)


def test_every_norm_has_the_bridges_eps(model):
    norms = [module for module in model.bridge.modules() if isinstance(module, NormalizationBridge)]
    inside: list[Any] = [norm.original_component for norm in norms]
    own = [getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", 1e-5) for norm in inside]  # OLMo's is fixed
    assert norms
    assert own == [model.bridge.cfg.eps] * len(norms)


@torch.no_grad()
def test_edits_of_a_pattern_take_effect(model):
    """With every head attending to itself alone, attention gives Σ_h (x W_V + b_V) W_O + b_O."""
    attention, name = model.bridge.blocks[0].attn, "blocks.0.attn.hook_pattern"
    n_heads, pos = attention.W_O.shape[0], TOKENS.shape[1]
    itself = torch.eye(pos, dtype=torch.float64).expand(1, n_heads, pos, pos)
    before = "ln1.hook_out" if model.has_hook("blocks.0.ln1.hook_out") else "hook_in"
    read = [f"blocks.0.{before}", "blocks.0.attn.hook_out"]
    _, cache = model.run_hooked(TOKENS, read=read, write={name: lambda _: itself})
    value = torch.einsum("bpd,hde->bphe", cache[read[0]], attention.W_V)
    value = value if attention.v.original_component.bias is None else value + attention.b_V
    value = value.repeat_interleave(n_heads // value.shape[2], dim=2)
    out = torch.einsum("bphe,hed->bpd", value, attention.W_O)
    out = out if attention.b_O is None else out + attention.b_O
    torch.testing.assert_close(cache[read[1]], out, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_the_stream_grows_by_what_attention_and_mlp_write(family, model):
    """Also where Hugging Face's classes add the stream themselves (Bloom, MPT), or weigh what is added (Granite)."""
    for layer in range(model.n_layers):
        ends, parts = [f"blocks.{layer}.hook_in", f"blocks.{layer}.hook_out"], []
        for norm, part in (("ln1_post", "attn"), ("ln2_post", "mlp")):
            name = f"blocks.{layer}.{norm}.hook_out"
            parts.append(name if model.has_hook(name) else f"blocks.{layer}.{part}.hook_out")
        _, cache = model.run_hooked(TOKENS, read=[*ends, *parts])
        added = (0.5 if family.startswith("granite") else 1) * sum(cache[name] for name in parts)
        torch.testing.assert_close(cache[ends[1]], cache[ends[0]] + added, rtol=1e-9, atol=1e-9)


def test_the_closed_form_attributes_what_autograd_does(model):
    engines: tuple[EngineName, ...] = ("closed_form", "autograd")
    closed, exact = (_attribute(model, engine) for engine in engines)
    assert abs(closed.residual()).max() <= 1e-9 * abs(closed.weights).max()
    assert abs(closed.weights - exact.weights).max() <= 1e-12 * abs(exact.weights).max()


@pytest.mark.parametrize("family", DISTINCT, scope="module")
def test_what_is_measured_of_every_edge_is_the_edge_and_its_parts(family, model):
    """Direct edges: −A + Δ_patterns + Δ_norms; the model's effect: T̂ and the parts of its miss."""
    graph = _attribute(model)
    replacement = ReplacementModel(model, _dictionaries(model))
    found: Any = validate(replacement, graph, edges=None, controls=0, heads=0)
    frame = found.edges
    size = 1e-9 * max(1.0, frame[["weight", "direct_measured", "model_measured"]].abs().to_numpy().max())
    assert found.frozen_error <= 1e-9
    parts = frame["direct_patterns"] + frame["direct_norms"] - frame["weight"]
    assert (parts - frame["direct_measured"]).abs().max() <= size
    miss = frame[["miss_dictionary", "miss_curvature", "miss_first", "miss_patterns", "miss_norms"]].sum(axis=1)
    assert (frame["model_predicted"] + miss - frame["model_measured"]).abs().max() <= size
    assert frame["direct_patterns"].abs().max() > size
    assert frame["direct_norms"].abs().max() > size


@torch.no_grad()
def test_the_oracle_of_a_loaded_model_is_hugging_faces_own_code(family, model):
    bridge = model.bridge
    before = model.run(TOKENS)[0]
    torch.testing.assert_close(own_logits(bridge, TOKENS).float(), _module(family)(TOKENS).logits, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(model.run(TOKENS)[0], before, rtol=0, atol=0)


def test_every_bias_outside_the_mlps_is_named_once(family, model):
    named = [p for group in model.bias_groups().values() for p in group]
    own = {name: p for name, p in _module(family).named_parameters() if name.endswith("bias")}
    outside = [p for name, p in own.items() if not any(part in name for part in ("mlp", "fc1", "fc2"))]
    assert len({p.data_ptr() for p in named}) == len(named)
    values, expected = (torch.cat([torch.empty(0), *(p.float() for p in ps)]).sort()[0] for ps in (named, outside))
    torch.testing.assert_close(values, expected)


def _other(config, architecture, **arguments):
    """A model of a class that is no family, as it comes from Hugging Face."""
    config = getattr(transformers, config)(**arguments, architectures=[architecture])
    module = getattr(transformers, architecture)(config).eval()
    return LanguageModel(build_bridge_from_module(module, architecture, hf_config=config), architecture)


def _dictionaries(model):
    return random_dictionaries("clt", n_layers=2, d_model=16, features=8, skip=True, dtype=model.dtype, seed=1)


def _attribute(model, engine: EngineName = "autograd"):
    return attribute(ReplacementModel(model, _dictionaries(model)), TOKENS[0], targets=LogitTargets([3]), engine=engine)


@pytest.mark.parametrize(
    ("config", "architecture", "arguments"),
    [
        ("OpenAIGPTConfig", "OpenAIGPTLMHeadModel", GPT1),
        ("GPTNeoXConfig", "GPTNeoXForCausalLM", SMALL | {"use_parallel_residual": False}),
    ],
    ids=["no-final-norm", "serial-neox"],
)
def test_autograd_takes_other_architectures(config, architecture, arguments):
    graph = _attribute(_other(config, architecture, **arguments).to(torch.float64))
    assert abs(graph.residual()).max() <= 1e-9 * abs(graph.weights).max()


def test_a_model_whose_blocks_return_lists_can_be_read_everywhere_and_run_from_a_block_on():
    """GPT-1's; the bridge's hooks see tuples and tensors only."""
    lm = _other("OpenAIGPTConfig", "OpenAIGPTLMHeadModel", **GPT1).to(torch.float64)
    sites = [Site(1, kind) for kind in get_args(SiteKind) if lm.has_site(Site(1, kind))]
    assert {"resid_pre", "resid_post", "mlp_out"} <= {site.kind for site in sites}
    assert set(lm.run(TOKENS, sites)[1]) == set(sites)
    assert list(streams_before(lm, [1], TOKENS)) == [1]


def test_autograd_takes_over_with_one_notice(caplog):
    lm = _other("OpenAIGPTConfig", "OpenAIGPTLMHeadModel", **GPT1).to(torch.float64)
    dictionaries = random_dictionaries("clt", n_layers=2, d_model=16, features=8, dtype=torch.float64)
    model = ReplacementModel(lm, dictionaries)
    caplog.clear()
    graph, _ = attribute_pruned(model, TOKENS[0], targets=LogitTargets((5,)))
    validate(model, graph, edges=2, controls=2)
    (notice,) = notices(caplog)
    assert notice.endswith("; using autograd, which is slower.")
    assert "engine=" not in notice
    caplog.clear()
    with pytest.raises(ModelError, match=r"; use engine='autograd'\.$"):
        attribute_pruned(model, TOKENS[0], targets=LogitTargets((5,)), engine="closed_form")
    attribute_pruned(model, TOKENS[0], targets=LogitTargets((5,)), engine="autograd")
    assert not notices(caplog)


def notices(caplog):
    """Those of the engine; that random dictionaries fit badly is another matter."""
    return [message for message in caplog.messages if "autograd" in message]


@pytest.mark.parametrize(
    ("config", "architecture", "arguments", "lacks"),
    [
        ("MambaConfig", "MambaForCausalLM", SMALL | {"state_size": 4}, r"has no blocks\.0\.mlp\.hook_in"),
        (
            "Lfm2Config",
            "Lfm2ForCausalLM",
            SMALL | {"num_key_value_heads": 2, "layer_types": ["full_attention", "conv"]},
            r"never calls blocks\.1\.attn\.hook_pattern",
        ),
        (
            "OPTConfig",
            "OPTForCausalLM",
            SMALL | {"ffn_dim": 32, "word_embed_proj_dim": 8, "do_layer_norm_before": False},
            "8 dimensions at embed.hook_out and 16",
        ),
    ],
    ids=["no-mlp", "convolution", "projected-embedding"],
)
def test_an_architecture_that_lacks_something_is_refused_with_what_it_lacks(config, architecture, arguments, lacks):
    with pytest.raises((ModelError, DictionaryError), match=lacks):
        _attribute(_other(config, architecture, **arguments))


@pytest.mark.parametrize(
    ("config", "architecture", "arguments", "reason"),
    [
        ("StableLmConfig", "StableLmForCausalLM", SMALL, "does not run through TransformerLens' bridge"),
        ("BioGptConfig", "BioGptForCausalLM", SMALL, "no bridge for BioGptForCausalLM"),
    ],
    ids=["one-rotary-dimension", "unknown-to-the-bridge"],
)
def test_a_model_that_the_bridge_does_not_run_rightly_is_refused_when_loaded(
    config, architecture, arguments, reason, tmp_path
):
    module = getattr(transformers, architecture)(getattr(transformers, config)(**arguments))
    module.save_pretrained(tmp_path)
    _copy_tokenizer(tmp_path)
    with pytest.raises(ModelError, match=reason) as refused:
        load_model(tmp_path, dtype=torch.float64)
    assert len(str(refused.value)) < 400


def test_a_bridge_with_other_logits_than_hugging_faces_is_refused():
    bridge = random_model("llama", n_layers=2, d_model=16, n_heads=4).bridge
    check_logits(bridge, "llama")
    bridge.blocks[1].attn.o.register_forward_hook(lambda module, inputs, output: 1.1 * output)
    with pytest.raises(ModelError, match="The logits of llama .* differ from transformers' own"):
        check_logits(bridge, "llama")


def test_a_step_that_is_not_frozen_is_found():
    model = random_model("llama", n_layers=2, d_model=16, n_heads=4, dtype=torch.float64)
    model.bridge.blocks[1].ln1.hook_in.register_forward_hook(lambda module, inputs, output: output.tanh())
    with pytest.raises(ModelError, match="What MLP 1 of random-llama-0 reads is not the sum"):
        _attribute(model)


def test_mlps_that_return_the_whole_stream_are_found():
    model = random_model("bloom", n_layers=2, d_model=16, n_heads=4, dtype=torch.float64)
    for block in model.bridge.blocks:
        del block.mlp.__dict__["forward"]  # Bloom's own then, which adds the stream
    with pytest.raises(ModelError, match="The MLPs of random-bloom-0 return the residual stream"):
        _attribute(model)


def test_an_unknown_family_is_refused():
    with pytest.raises(ModelError, match="Unknown family 'bert'"):
        random_module("bert", {}, seed=0)
