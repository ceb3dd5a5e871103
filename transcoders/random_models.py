"""Seeded random models of every supported family, built in memory from the Hugging Face classes; no download.

They are small, but have each family's architecture in full: grouped-query attention, biases, partial rotary
positions, norms after attention and MLP, soft caps, sliding windows, tied embeddings.
"""

from itertools import cycle, islice
from typing import Any, Literal, NamedTuple

import torch

from transcoders.bridge import around
from transcoders.errors import ModelError
from transcoders.language_model import LanguageModel
from transcoders.precision import Precision, as_dtype

Family = Literal[
    "gpt2", "opt", "gpt_neo", "gptj", "gpt_neox", "bloom", "llama", "mistral", "mixtral", "qwen2", "qwen3", "gemma2",
    "gemma3", "phi", "olmo2", "apertus", "arcee", "codegen", "cohere", "cohere2", "ernie4_5", "exaone4", "falcon",
    "gemma", "glm", "glm4", "gpt_bigcode", "gpt_oss", "granite", "granite_moe", "hunyuan", "mpt", "nemotron", "olmo",
    "olmo3", "olmoe", "phi3", "qwen2_moe", "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2",
]  # fmt: skip


class _Recipe(NamedTuple):
    """How a family is configured: its classes, the size each of its arguments takes, and what sets it apart."""

    config: str
    model: str
    sizes: dict[str, str]
    settings: dict[str, Any]


_HIDDEN = {
    "num_hidden_layers": "n_layers", "hidden_size": "d_model", "num_attention_heads": "n_heads",
    "vocab_size": "d_vocab", "max_position_embeddings": "context",
}  # fmt: skip
_GPT2 = {
    "n_layer": "n_layers", "n_embd": "d_model", "n_head": "n_heads", "n_inner": "d_mlp", "vocab_size": "d_vocab",
    "n_positions": "context",
}  # fmt: skip
_OPT = _HIDDEN | {"ffn_dim": "d_mlp", "word_embed_proj_dim": "d_model"}
_UNGROUPED = _HIDDEN | {"intermediate_size": "d_mlp"}
_GROUPED = _UNGROUPED | {"num_key_value_heads": "n_kv_heads"}
_WIDE_HEADS = _GROUPED | {"head_dim": "d_head"}

_GPT_NEO = {
    "num_layers": "n_layers", "hidden_size": "d_model", "num_heads": "n_heads", "vocab_size": "d_vocab",
    "intermediate_size": "d_mlp", "max_position_embeddings": "context",
}  # fmt: skip
_BLOOM = {"n_layer": "n_layers", "hidden_size": "d_model", "n_head": "n_heads", "vocab_size": "d_vocab"}
_MPT = {
    "n_layers": "n_layers", "d_model": "d_model", "n_heads": "n_heads", "vocab_size": "d_vocab",
    "max_seq_len": "context",
}  # fmt: skip

_HALF_ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
_WINDOW = {"sliding_window": 3}
_GEMMA = _WINDOW | {"layer_types": ("sliding_attention", "full_attention"), "query_pre_attn_scalar": 11}
_SOFT_CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
_TIED = {"tie_word_embeddings": True}
_LOCAL = {"window_size": 3, "attention_types": ("global", "local")}
_MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
_SCALED = {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3, "logits_scaling": 3.0}

_RECIPES: dict[str, _Recipe] = {
    "gpt2": _Recipe("GPT2Config", "GPT2LMHeadModel", _GPT2, {}),
    "opt": _Recipe("OPTConfig", "OPTForCausalLM", _OPT, {}),
    "gpt_neo": _Recipe("GPTNeoConfig", "GPTNeoForCausalLM", _GPT_NEO, _LOCAL),
    "gptj": _Recipe("GPTJConfig", "GPTJForCausalLM", _GPT2, {"rotary_dim": 2}),
    "gpt_neox": _Recipe("GPTNeoXConfig", "GPTNeoXForCausalLM", _UNGROUPED, _HALF_ROTARY),
    "bloom": _Recipe("BloomConfig", "BloomForCausalLM", _BLOOM, {}),
    "llama": _Recipe("LlamaConfig", "LlamaForCausalLM", _GROUPED, {}),
    "mistral": _Recipe("MistralConfig", "MistralForCausalLM", _WIDE_HEADS, _WINDOW),
    "mixtral": _Recipe("MixtralConfig", "MixtralForCausalLM", _GROUPED, _MIXTURE),
    "qwen2": _Recipe("Qwen2Config", "Qwen2ForCausalLM", _GROUPED, _TIED),
    "qwen3": _Recipe("Qwen3Config", "Qwen3ForCausalLM", _WIDE_HEADS, _TIED),
    "gemma2": _Recipe("Gemma2Config", "Gemma2ForCausalLM", _WIDE_HEADS, _GEMMA | _SOFT_CAPS),
    "gemma3": _Recipe("Gemma3TextConfig", "Gemma3ForCausalLM", _WIDE_HEADS, _GEMMA),
    "phi": _Recipe("PhiConfig", "PhiForCausalLM", _UNGROUPED, _HALF_ROTARY),
    "olmo2": _Recipe("Olmo2Config", "Olmo2ForCausalLM", _GROUPED, {}),
    "apertus": _Recipe("ApertusConfig", "ApertusForCausalLM", _GROUPED, {}),
    "arcee": _Recipe("ArceeConfig", "ArceeForCausalLM", _GROUPED, {}),
    "codegen": _Recipe("CodeGenConfig", "CodeGenForCausalLM", _GPT2, {"rotary_dim": 2}),
    "cohere": _Recipe("CohereConfig", "CohereForCausalLM", _GROUPED, {}),
    "cohere2": _Recipe("Cohere2Config", "Cohere2ForCausalLM", _GROUPED, _WINDOW),
    "ernie4_5": _Recipe("Ernie4_5Config", "Ernie4_5ForCausalLM", _WIDE_HEADS, {}),
    "exaone4": _Recipe("Exaone4Config", "Exaone4ForCausalLM", _GROUPED, {}),
    "falcon": _Recipe("FalconConfig", "FalconForCausalLM", _HIDDEN, {}),
    "gemma": _Recipe("GemmaConfig", "GemmaForCausalLM", _WIDE_HEADS, {}),
    "glm": _Recipe("GlmConfig", "GlmForCausalLM", _WIDE_HEADS, {}),
    "glm4": _Recipe("Glm4Config", "Glm4ForCausalLM", _WIDE_HEADS, {}),
    "gpt_bigcode": _Recipe("GPTBigCodeConfig", "GPTBigCodeForCausalLM", _GPT2, {}),
    "gpt_oss": _Recipe("GptOssConfig", "GptOssForCausalLM", _WIDE_HEADS, _MIXTURE | _WINDOW),
    "granite": _Recipe("GraniteConfig", "GraniteForCausalLM", _GROUPED, _SCALED),
    "granite_moe": _Recipe("GraniteMoeConfig", "GraniteMoeForCausalLM", _GROUPED, _SCALED | _MIXTURE),
    "hunyuan": _Recipe("HunYuanDenseV1Config", "HunYuanDenseV1ForCausalLM", _WIDE_HEADS, {}),
    "mpt": _Recipe("MptConfig", "MptForCausalLM", _MPT, {}),
    "nemotron": _Recipe("NemotronConfig", "NemotronForCausalLM", _GROUPED, {}),
    "olmo": _Recipe("OlmoConfig", "OlmoForCausalLM", _GROUPED, {}),
    "olmo3": _Recipe("Olmo3Config", "Olmo3ForCausalLM", _GROUPED, _WINDOW),
    "olmoe": _Recipe("OlmoeConfig", "OlmoeForCausalLM", _GROUPED, {"num_experts": 4, "num_experts_per_tok": 2}),
    "phi3": _Recipe("Phi3Config", "Phi3ForCausalLM", _GROUPED, {}),
    "qwen2_moe": _Recipe("Qwen2MoeConfig", "Qwen2MoeForCausalLM", _GROUPED, _EXPERTS),
    "qwen3_moe": _Recipe("Qwen3MoeConfig", "Qwen3MoeForCausalLM", _WIDE_HEADS, _EXPERTS),
    "seed_oss": _Recipe("SeedOssConfig", "SeedOssForCausalLM", _WIDE_HEADS, {}),
    "smollm3": _Recipe("SmolLM3Config", "SmolLM3ForCausalLM", _GROUPED, {}),
    "stablelm": _Recipe("StableLmConfig", "StableLmForCausalLM", _GROUPED, _HALF_ROTARY),
    "starcoder2": _Recipe("Starcoder2Config", "Starcoder2ForCausalLM", _GROUPED, {}),
}


def random_model(
    family: Family = "gpt2",
    *,
    n_layers: int = 2,
    d_model: int = 32,
    n_heads: int = 4,
    d_mlp: int | None = None,
    d_vocab: int = 64,
    context: int = 64,
    seed: int = 0,
    dtype: Precision = torch.float32,
) -> LanguageModel:
    """A seeded random model of a family's exact architecture, built in memory; no download, no tokenizer.

    | family | norms | attention | MLP | embeddings |
    |---|---|---|---|---|
    | `gpt2`, `opt` | LayerNorm | biases | after attention | learned positions, tied |
    | `gpt_neo` | LayerNorm | bias after, every other layer local | after attention | learned positions, tied |
    | `bloom` | LayerNorm, also of embeddings | biases, ALiBi | after attention | tied |
    | `gptj` | LayerNorm | partial rotary | beside attention, shared norm | bias of the logits |
    | `gpt_neox` | LayerNorm | biases, partial rotary | beside attention, own norm | |
    | `phi` | LayerNorm | biases, partial rotary | beside attention, shared norm | bias of the logits |
    | `llama`, `mistral` | RMSNorm | GQA, rotary; `mistral`: sliding window | gated | |
    | `mixtral` | RMSNorm | GQA, rotary | gated, two of four experts | |
    | `olmo2` | RMSNorm, only after | GQA, rotary, norms of q, k | gated | |
    | `qwen2`, `qwen3` | RMSNorm | GQA, rotary; biases of q, k, v, or norms of q, k | gated | tied |
    | `gemma2` | RMSNorm (1 + w), also after | GQA, rotary, soft cap, windows | gated | scaled, tied, soft cap |
    | `gemma3` | RMSNorm (1 + w), also after | GQA, rotary, norms of q, k, windows | gated | scaled, tied |

    GQA: half as many key-value heads. Biases and norm weights are random too, so that none can hide. The other
    members of `Family` are siblings of these; docs/families.md lists all. Raises `ModelError` for another family.
    """
    sizes = {
        "n_layers": n_layers, "d_model": d_model, "n_heads": n_heads, "n_kv_heads": max(1, n_heads // 2),
        "d_head": 2 * (d_model // n_heads), "d_mlp": d_mlp, "d_vocab": d_vocab, "context": context,
    }  # fmt: skip
    model = random_module(family, sizes, seed).to(as_dtype(dtype))
    name, architecture = f"random-{family}-{seed}", _RECIPES[family].model
    return LanguageModel(around(model, architecture, name), name)


def random_module(family: str, sizes: dict[str, int | None], seed: int) -> Any:
    """The Hugging Face model inside `random_model`, in evaluation mode."""
    import transformers

    if family not in _RECIPES:
        raise ModelError(f"Unknown family {family!r}; random models come as {', '.join(map(repr, _RECIPES))}.")
    recipe = _RECIPES[family]
    if family != "gpt2":
        sizes = sizes | {"d_mlp": sizes["d_mlp"] or 2 * (sizes["d_model"] or 0)}
    arguments: dict[str, Any] = {argument: sizes[size] for argument, size in recipe.sizes.items()}
    arguments |= recipe.settings
    for name in {"layer_types", "attention_types"} & arguments.keys():
        arguments[name] = list(islice(cycle(arguments[name]), sizes["n_layers"] or 0))
    if "attention_types" in arguments:
        arguments["attention_types"] = [[arguments["attention_types"], 1]]
    config = getattr(transformers, recipe.config)(
        **arguments, bos_token_id=0, eos_token_id=0, pad_token_id=None, architectures=[recipe.model],
        attn_implementation="eager",  # as models are loaded; others drop Gemma 2's soft cap
    )  # fmt: skip
    model = getattr(transformers, recipe.model)(config).eval()
    _randomise(model, torch.Generator().manual_seed(seed))
    return model


def _randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Weights of scale 1/√fan-in, norms around one, biases of scale 0.1."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if name.endswith("bias"):
            value = 0.1 * noise
        elif parameter.ndim == 1:
            value = 1 + 0.1 * noise
        else:
            value = noise / parameter.shape[-1] ** 0.5
        parameter.data.copy_(value)
