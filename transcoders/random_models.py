"""Seeded random models of every supported family, built in memory from the Hugging Face classes; no download.

They are small, but have each family's architecture in full: grouped-query attention, biases, partial rotary
positions, norms after attention and MLP, soft caps, sliding windows, tied embeddings.
"""

from itertools import cycle, islice
from typing import Any, Literal, NamedTuple

import torch
from transformer_lens.model_bridge.sources import build_bridge_from_module

from transcoders.errors import ModelError
from transcoders.language_model import LanguageModel
from transcoders.precision import Precision, as_dtype

Family = Literal["gpt2", "opt", "gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi"]


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

_HALF_ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
_WINDOW = {"sliding_window": 3}
_GEMMA = _WINDOW | {"layer_types": ("sliding_attention", "full_attention"), "query_pre_attn_scalar": 11}
_SOFT_CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
_TIED = {"tie_word_embeddings": True}

_RECIPES: dict[str, _Recipe] = {
    "gpt2": _Recipe("GPT2Config", "GPT2LMHeadModel", _GPT2, {}),
    "opt": _Recipe("OPTConfig", "OPTForCausalLM", _OPT, {}),
    "gpt_neox": _Recipe("GPTNeoXConfig", "GPTNeoXForCausalLM", _UNGROUPED, _HALF_ROTARY),
    "llama": _Recipe("LlamaConfig", "LlamaForCausalLM", _GROUPED, {}),
    "mistral": _Recipe("MistralConfig", "MistralForCausalLM", _WIDE_HEADS, _WINDOW),
    "qwen2": _Recipe("Qwen2Config", "Qwen2ForCausalLM", _GROUPED, _TIED),
    "qwen3": _Recipe("Qwen3Config", "Qwen3ForCausalLM", _WIDE_HEADS, _TIED),
    "gemma2": _Recipe("Gemma2Config", "Gemma2ForCausalLM", _WIDE_HEADS, _GEMMA | _SOFT_CAPS),
    "gemma3": _Recipe("Gemma3TextConfig", "Gemma3ForCausalLM", _WIDE_HEADS, _GEMMA),
    "phi": _Recipe("PhiConfig", "PhiForCausalLM", _UNGROUPED, _HALF_ROTARY),
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
    | `gpt_neox` | LayerNorm | biases, partial rotary | beside attention, own norm | |
    | `phi` | LayerNorm | biases, partial rotary | beside attention, shared norm | bias of the logits |
    | `llama`, `mistral` | RMSNorm | GQA, rotary; `mistral`: sliding window | gated | |
    | `qwen2`, `qwen3` | RMSNorm | GQA, rotary; biases of q, k, v, or norms of q, k | gated | tied |
    | `gemma2` | RMSNorm (1 + w), also after | GQA, rotary, soft cap, windows | gated | scaled, tied, soft cap |
    | `gemma3` | RMSNorm (1 + w), also after | GQA, rotary, norms of q, k, windows | gated | scaled, tied |

    GQA: half as many key-value heads. Biases and norm weights are random too, so that none can hide.
    Raises `ModelError` for a family that is not in the table.
    """
    sizes = {
        "n_layers": n_layers, "d_model": d_model, "n_heads": n_heads, "n_kv_heads": max(1, n_heads // 2),
        "d_head": 2 * (d_model // n_heads), "d_mlp": d_mlp, "d_vocab": d_vocab, "context": context,
    }  # fmt: skip
    model = random_module(family, sizes, seed).to(as_dtype(dtype))
    name, architecture = f"random-{family}-{seed}", _RECIPES[family].model
    return LanguageModel(build_bridge_from_module(model, architecture, hf_config=model.config, model_name=name), name)


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
    if "layer_types" in arguments:
        arguments["layer_types"] = list(islice(cycle(arguments["layer_types"]), sizes["n_layers"] or 0))
    config = getattr(transformers, recipe.config)(
        **arguments, bos_token_id=0, eos_token_id=0, pad_token_id=None, architectures=[recipe.model]
    )
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
