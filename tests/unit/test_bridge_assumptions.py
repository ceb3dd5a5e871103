"""What `transcoders.bridge` and `model_parts` assume of the insides of TransformerLens, transformers and torch.

A test that fails here after an upgrade says what changed and which lines of ours rely on it.
"""

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformer_lens.model_bridge.generalized_components import AttentionBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformers import masking_utils

import circuitsae
import transcoders
from tests.device import Tape
from transcoders import bridge
from transcoders.language_model import LanguageModel
from transcoders.loading import random_model
from transcoders.sites import Site

TOKENS = torch.tensor([[0, 11, 22, 33, 11, 7]])
INSIDE = ("bridge.py", "model_parts.py", "language_model.py")
PRIVATE = (
    r"\boriginal_(component|model)\b", r"\.submodules\b", r"\.cfg\b", r"\bhook_dict\b", r"\.bridge\b", r"\._version\b",
    r"\b_attn_implementation\b", r"\buses_(rms_norm|weight_offset)\b", r"\bgeneralized_components\b",
)  # fmt: skip
_MODELS: dict[tuple[str, torch.dtype], LanguageModel] = {}


def model_of(family: Any, dtype: torch.dtype = torch.float64) -> LanguageModel:
    if (family, dtype) not in _MODELS:
        sizes = {"n_layers": 2, "d_model": 16, "n_heads": 4, "d_vocab": 64}
        _MODELS[family, dtype] = random_model(family, **sizes, dtype=dtype)
    return _MODELS[family, dtype]


def block_of(family: Any) -> Any:
    return model_of(family).bridge.blocks[0]


def test_no_other_module_looks_inside_a_bridge():
    folders = [Path(package.__path__[0]) for package in (circuitsae, transcoders)]
    files = [file for folder in folders for file in sorted(folder.rglob("*.py")) if file.name not in INSIDE]
    found = [
        f"{file}:{number}: {line.strip()}"
        for file in files
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if not line.lstrip().startswith(("from ", "import ")) and re.search("|".join(PRIVATE), line)
    ]
    assert len(files) > 100
    assert not found, "give transcoders.model_parts what these need of a model, and use that:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("family", "norms"),
    [
        ("gpt2", ["ln1", "ln2"]),
        ("gptj", ["ln1"]),
        ("gemma2", ["ln1", "ln1_post", "ln2", "ln2_post"]),
        ("olmo2", ["ln1_post", "ln2_post"]),
    ],
)
def test_a_block_lists_its_parts(family, norms):
    listed = sorted(block_of(family).submodules)
    assert listed == sorted([*norms, "attn", "mlp"]), f"`submodules` is {listed}; BlockPart.norm, mlp_norm and parallel"


@pytest.mark.parametrize(
    ("family", "parallel"), [("gpt2", False), ("gptj", True), ("gpt_neox", True), ("phi", True), ("llama", False)]
)
def test_the_configuration_says_which_blocks_are_parallel(family, parallel):
    found = model_of(family).parts.blocks[0].parallel
    assert found is parallel, "`cfg.parallel_attn_mlp` or the norms' names changed; BlockPart.parallel"


def test_granites_blocks_hold_what_their_outputs_are_multiplied_by():
    model = model_of("granite")
    found = model.parts.blocks[0].residual_factor
    assert found == model.parts.config.residual_multiplier != 1, "`residual_multiplier`; BlockPart.residual_factor"


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "olmo", "nemotron"])
def test_a_norm_is_what_its_attributes_say(family):
    norm = model_of(family).parts.final_norm
    assert norm is not None
    x = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    centred = x - x.mean(-1, keepdim=True) if norm.centres else x
    linear = centred * norm.weight(torch.float64)
    ours = linear / (centred.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
    ours = ours if norm.bias is None else ours + norm.bias
    torch.testing.assert_close(
        norm(x), ours, rtol=1e-12, atol=1e-12,
        msg=lambda m: f"`weight`, `uses_weight_offset`, `uses_rms_norm`, `cfg.eps` or float64 in norms; NormPart: {m}",
    )  # fmt: skip
    torch.testing.assert_close(
        norm.linear(x[0]), linear[0], rtol=1e-12, atol=1e-12, msg=lambda m: f"`hook_scale`; NormPart.linear: {m}"
    )


@torch.no_grad()
@pytest.mark.parametrize(
    "family", ["gpt2", "opt", "gptj", "gpt_neo", "gpt_neox", "bloom", "mpt", "llama", "gemma2", "qwen3"]
)
def test_attention_is_its_heads(family):
    """`W_O` after what is mixed of the queries, keys and values put into their hooks gives what the module writes."""
    model = model_of(family)
    block = model.parts.blocks[0]
    with model.parts.recorded_calls() as calls:
        _, cache = model.run_hooked(TOKENS, read=["blocks.0.attn.hook_out", "blocks.0.hook_in"])
    assert len(calls) == model.n_layers, "attention is not called once in each block; ModelParts.recorded_calls"
    attention, norm = block.attention, block.norm("ln1")
    read = cache["blocks.0.hook_in"] if norm is None else norm(cache["blocks.0.hook_in"])
    inputs = {}
    for kind in "QKV":
        value, bias = torch.einsum("bpd,hde->bphe", read, attention.weight(kind)), attention.bias(kind)
        inputs[kind.lower()] = value if bias is None else value + bias
    z = attention.mixed(calls[0], torch.zeros_like(read), **inputs).reshape(*TOKENS.shape, model.n_heads, -1)
    out = torch.einsum("bphe,hed->bpd", z, attention.weight("O"))
    out, bias = out.expand(*TOKENS.shape, -1), attention.bias("O")
    out = out if bias is None else out + bias
    said = "`W_Q`…`b_O`, or the hooks of `q`, `k`, `v`, `o`; AttentionPart"
    written = cache["blocks.0.attn.hook_out"]
    torch.testing.assert_close(out, written, rtol=1e-6, atol=1e-6, msg=lambda m: f"{said}: {m}")
    again = attention.run(read, calls[0])
    torch.testing.assert_close(again, written, rtol=1e-12, atol=1e-12, msg=lambda m: f"{said}.run: {m}")


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "opt", "gptj", "gpt_neo", "gpt_neox", "bloom", "llama", "gemma2", "qwen3"])
def test_scores_are_what_the_softmax_takes(family):
    """At `hook_attn_scores` or, where Hugging Face's own attention runs, in the softmax; without the soft cap."""
    model = model_of(family)
    block, pattern = model.parts.blocks[0], "blocks.0.attn.hook_pattern"
    with model.parts.recorded_calls() as calls:
        _, cache = model.run_hooked(TOKENS, read=["blocks.0.hook_in", pattern])
    norm, stream = block.norm("ln1"), cache["blocks.0.hook_in"]
    scores = block.attention.scores(calls[0], stream if norm is None else norm(stream), {})
    if family == "gemma2":
        scores = torch.where(scores < -1e9, scores, 2 * torch.tanh(scores / 2))
    said = "`hook_attn_scores`, the softmax, `attn_logit_softcapping`; AttentionPart.scores"
    torch.testing.assert_close(
        scores.softmax(-1).to(cache[pattern]), cache[pattern], rtol=1e-5, atol=1e-6, msg=lambda m: f"{said}: {m}"
    )


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "bloom"])
def test_a_split_projection_leaves_the_fused_one_unused(family):
    model = random_model(family, n_layers=2, d_model=16, n_heads=4, d_vocab=64)
    parts: Any = model.bridge.blocks[0].attn.submodules
    assert {"qkv", "q", "k", "v"} <= parts.keys(), "the fused projection has another name; model_parts._biases"
    biases = [dict(parts[name].named_parameters())["_original_component.bias"] for name in ("qkv", "v")]
    for bias in biases:
        bias.requires_grad_(True)
    fused, split = torch.autograd.grad(model.run(TOKENS)[0].sum(), biases, allow_unused=True)
    assert fused is None, "the fused bias is used again; model_parts._biases"
    assert split is not None, "the split bias is not used; model_parts._biases"


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "opt", "gptj", "llama", "mixtral", "gemma2"])
def test_an_mlp_can_be_run_alone(family):
    model = model_of(family)
    block = model.parts.blocks[1]
    _, cache = model.run_hooked(TOKENS, read=["blocks.1.mlp.hook_in", "blocks.1.mlp.hook_out"])
    written = block.mlp(cache["blocks.1.mlp.hook_in"])
    torch.testing.assert_close(
        written, cache["blocks.1.mlp.hook_out"].reshape(written.shape), rtol=1e-12, atol=1e-12,
        msg=lambda m: f"what an MLP returns, or OPT's `in`, `out` and `activation_fn`; BlockPart.mlp: {m}",
    )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "gemma2", "phi", "bloom"])
def test_the_ends_of_a_model_can_be_run_alone(family):
    model = model_of(family)
    names = ["embed.hook_out", "unembed.hook_in"]
    logits, cache = model.run_hooked(TOKENS, read=names)
    first, last = model.parts.embed(TOKENS), model.parts.unembed(cache[names[1]])
    assert torch.equal(first, cache[names[0]]), "`embed`; ModelParts.embed"
    torch.testing.assert_close(
        last, logits, rtol=1e-12, atol=1e-12,
        msg=lambda m: f"`unembed`, or who applies `final_logit_softcapping`; ModelParts.unembed: {m}",
    )  # fmt: skip
    assert (model.parts.embedding_norm is not None) == (family == "bloom"), "`embed_ln`; ModelParts.embedding_norm"


@torch.no_grad()
def test_a_cache_holds_the_positions_before():
    model = model_of("llama")
    past = model.new_cache()
    model.run_hooked(TOKENS[:, :4], past=past)
    rest, _ = model.run_hooked(TOKENS[:, 4:], past=past)
    torch.testing.assert_close(
        rest, model.run(TOKENS)[0][:, 4:], rtol=1e-6, atol=1e-6,
        msg=lambda m: f"`past_key_values` or DynamicCache(config=…); ModelParts.new_cache: {m}",
    )  # fmt: skip


def test_weights_are_the_parameters_themselves():
    model = model_of("gpt2")
    weights, parameters = model.parts.weights(), list(model.parts.parameters())
    ours, theirs = ({w.data_ptr() for _, w in named} for named in (weights, parameters))
    assert theirs & ours, "`original_model.state_dict(keep_vars=True)`; ModelParts.weights"
    assert not [name for name, _ in parameters if "original" in name], "`_original_component`; ModelParts.parameters"


# how bridges are made


def test_the_model_inside_can_be_run_without_the_bridge():
    model = model_of("llama")
    with bridge._own_modules(model.bridge.original_model) as own:
        left = [type(module).__name__ for module in own.modules() if isinstance(module, GeneralizedComponent)]
    assert not left, f"{left} are still in the model's place; bridge._own_modules"
    back = [module for module in own.modules() if isinstance(module, GeneralizedComponent)]
    assert back, "the bridge does not put its parts into the model any more; bridge._own_modules, check_logits"


@pytest.mark.parametrize(("family", "is_own"), [("opt", True), ("gptj", True), ("gpt_neo", True), ("llama", False)])
def test_the_plain_attention_bridge_runs_hugging_faces_forward(family, is_own):
    attention = block_of(family).attn
    assert (type(attention).forward is AttentionBridge.forward) is is_own, (
        f"{type(attention).__name__} runs attention otherwise; bridge._is_hugging_faces"
    )
    assert bridge._is_hugging_faces(attention) is is_own, "`forward` takes no **kwargs any more; _is_hugging_faces"


@pytest.mark.parametrize("family", ["opt", "gptj", "gpt_neo", "gpt2", "bloom", "gpt_neox", "llama", "gemma2"])
def test_a_pattern_passes_its_hook_once(family):
    model, seen = model_of(family), []
    model.run_hooked(TOKENS, write={"blocks.0.attn.hook_pattern": lambda pattern: seen.append(pattern.sum(-1))})
    assert len(seen) == 1, f"fired {len(seen)} times; `accepts_pattern_fn`, `attn_dropout`; bridge._fire_after"
    ones = torch.ones(1, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(seen[0].double(), ones, rtol=1e-6, atol=1e-6, msg=lambda m: f"no pattern: {m}")


def test_attention_is_chosen_by_the_configuration(monkeypatch):
    model, attention = random_model("opt", n_layers=2, d_model=16, n_heads=4), block_of("opt").attn
    assert hasattr(sys.modules[type(attention.original_component).__module__], "ALL_ATTENTION_FUNCTIONS"), (
        "attention functions are looked up otherwise; bridge._chooses_function"
    )
    called = []

    def spy(module, query, key, value, attention_mask, **named):
        called.append((attention_mask, "pattern_fn" in named))
        return bridge._attention_with_pattern_hook(module, query, key, value, attention_mask, **named)

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, bridge._EDITABLE, spy)
    model.run(TOKENS)
    assert len(called) == 2, "`config._attn_implementation` does not choose; bridge._make_patterns_editable"
    mask, has_hook = called[0]
    assert has_hook, "transformers does not pass on `pattern_fn`; bridge._make_patterns_editable"
    assert getattr(mask, "shape", ())[-2:] == (6, 6), "eager_mask gives another mask; _attention_with_pattern_hook"
    assert torch.equal(mask[0, 0] < -1e9, torch.ones(6, 6).triu(1).bool()), "the mask is not one that is added"


def test_bloom_and_mpt_add_the_stream_inside():
    for part in (block_of("bloom").attn, block_of("bloom").mlp, block_of("mpt").mlp):
        forward = part.original_component.forward
        assert "residual" in inspect.signature(forward).parameters, (
            f"{forward}: `residual`; bridge._add_the_stream_outside"
        )
        assert "forward" in part.__dict__, "set on the module inside; bridge._add_the_stream_outside"


def test_olmos_norm_has_no_weight_of_its_own():
    own = transformers.models.olmo.modeling_olmo.OlmoLayerNorm(8)
    assert not hasattr(own, "weight"), "bridge._compute_in_the_open"
    assert hasattr(own, "normalized_shape"), "bridge._compute_in_the_open"


def test_experts_run_one_by_one_in_float64():
    config = model_of("mixtral").parts.config
    assert config._experts_implementation == "eager", "`set_experts_implementation`; bridge.fit_precision"


def test_the_bridge_says_whether_it_puts_bos_first():
    assert isinstance(model_of("gpt2").bridge.cfg.default_prepend_bos, bool), "LanguageModel.bridge_adds_bos"


@torch.no_grad()
def test_the_native_model_is_embeddings_attention_and_relu():
    draw = torch.Generator().manual_seed(0)
    shapes = {
        "W_E": (7, 6), "W_pos": (5, 6), "W_U": (6, 3), "0.W_Q": (2, 6, 4), "0.W_K": (2, 6, 4), "0.W_V": (2, 6, 4),
        "0.W_O": (2, 4, 6), "0.W_in": (6, 8), "0.W_out": (8, 6), "0.b_in": (8,), "0.b_V": (2, 4),
    }  # fmt: skip
    w = {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
    w = {("blocks." + n if n[0] == "0" else n): value for n, value in w.items()}
    sizes = {"n_layers": 1, "n_heads": 2, "d_model": 6, "d_head": 4, "d_mlp": 8, "n_ctx": 5, "d_vocab": 7, "d_out": 3}
    made = bridge.native_bridge(w, **sizes, causal=True, dtype=torch.float64)
    tokens = torch.tensor([[2, 0, 6]])
    x = w["W_E"][tokens] + w["W_pos"][:3]
    q, k, v = (torch.einsum("bpd,hde->bhpe", x, w[f"blocks.0.W_{kind}"]) for kind in "QKV")
    v = v + w["blocks.0.b_V"][:, None]
    scores = (q @ k.mT / 2).masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf)
    x = x + torch.einsum("bhpe,hed->bpd", scores.softmax(-1) @ v, w["blocks.0.W_O"])
    x = x + (x @ w["blocks.0.W_in"] + w["blocks.0.b_in"]).relu() @ w["blocks.0.W_out"]
    torch.testing.assert_close(
        made(tokens, return_type="logits", prepend_bos=False), x @ w["W_U"], rtol=1e-9, atol=1e-9,
        msg=lambda m: f"`sources.native`, its configuration or its names of weights; bridge.native_bridge: {m}",
    )  # fmt: skip


def test_what_has_no_bridge_is_named_in_the_error(tmp_path):
    transformers.BioGptConfig(architectures=["BioGptForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(Exception, match="Config architectures") as refused:
        bridge.boot(str(tmp_path), "cpu", torch.float32)
    assert bridge.unsupported_architecture(str(refused.value)) == "BioGptForCausalLM", "unsupported_architecture"


def test_torch_counts_the_changes_of_a_tensor():
    tensor, calls = torch.zeros(3), []

    def fingerprint():
        calls.append(1)
        return "x"

    for change in (lambda: None, lambda: tensor.sum(), lambda: tensor.add_(1), lambda: None):
        change()
        bridge.remembered(test_torch_counts_the_changes_of_a_tensor, [tensor], fingerprint)
    assert len(calls) == 2, "`Tensor._version` does not count changes in place, and only these; bridge.remembered"
    with torch.inference_mode():
        made = torch.zeros(3)
    with pytest.raises(RuntimeError, match="Inference tensors do not track version"):
        _ = made._version


@pytest.mark.parametrize("family", ["gpt2", "bloom", "falcon", "gemma2", "granite", "cohere"])
def test_blocks_can_be_passed_over(family):
    model = model_of(family)
    logits, cache = model.run_hooked(TOKENS, read=["blocks.0.hook_out", "unembed.hook_in"])
    final, _ = model.run_to_unembedding(TOKENS, start=1, stream=cache["blocks.0.hook_out"])
    seen = "what blocks return, or what they hand on; ModelParts.passed_over"
    assert torch.equal(final, cache["unembed.hook_in"]), seen
    torch.testing.assert_close(
        model.logits_of(final[0]), logits[0], rtol=1e-12, atol=1e-12, msg=lambda m: f"{seen}: {m}"
    )
    assert torch.equal(model.run(TOKENS)[0], logits), "passed over for good"


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_a_pass_without_a_cache_can_be_kept_from_asking_for_several_texts_in_a_row(family):
    model, seen = model_of(family), "how transformers asks; model_parts.one_text"
    with Tape() as tape:
        final, _ = model.run_to_unembedding(TOKENS)
    assert tape.waits == [], seen
    assert torch.equal(final, model.run_hooked(TOKENS, read=["unembed.hook_in"])[1]["unembed.hook_in"]), seen
    assert masking_utils.find_packed_sequence_indices(torch.tensor([[0, 1, 0]])) is not None, "kept from it for good"


@pytest.mark.parametrize("family", ["gpt2", "bloom", "falcon", "gemma2", "granite", "cohere", "opt", "mixtral"])
def test_mlps_can_be_told_to_do_nothing(family):
    model = model_of(family)
    hook, seen = model.hook(Site(1, "mlp_out")), "how MLPs are called inside; ModelParts.silent_mlps"
    held = model.run_hooked(TOKENS, read=[hook])[1][hook] + 1
    logits, _ = model.run_hooked(TOKENS, write={hook: lambda _: held})
    alone = family != "opt"  # whose layers lie open in the block
    assert sorted(model.parts._plain_mlps) == ([0, 1] if alone else []), seen
    with model.parts.silent_mlps([1]):
        again, cache = model.run_hooked(TOKENS, read=[hook], write={hook: lambda _: held})
        assert not alone or not model.run_hooked(TOKENS, read=[hook])[1][hook].any(), seen
    assert torch.equal(cache[hook], held)
    torch.testing.assert_close(again, logits, rtol=1e-12, atol=1e-12, msg=lambda m: f"{seen}: {m}")
    assert not torch.equal(model.run(TOKENS)[0], logits), "told for good"


def test_attention_is_called_with_what_the_parts_leave_out():
    """State of a run (caches) is not handed on when attention is run again."""
    with model_of("llama").parts.recorded_calls() as calls:
        model_of("llama").run(TOKENS)
    held = [name for name, value in calls[0].named.items() if value is not None]
    assert "position_embeddings" in held, f"attention is called with {held} only; ModelParts.recorded_calls"
    left = [name for name in held if "cache" in name or "past" in name]
    assert not left, f"{left} hold state; model_parts._STATEFUL"
