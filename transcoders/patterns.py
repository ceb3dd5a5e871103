"""Editable attention patterns for models whose attention TransformerLens leaves to Hugging Face (OPT and others).

There the bridge's `hook_pattern` fires after the fact, or never, and edits of it are lost. Both libraries have a
seam: the bridge hands its hook as `pattern_fn` to an attention module that `accepts_pattern_fn`, and Hugging Face
passes what it does not know on to the attention function that the configuration names. Classes without such a
function (GPT-Neo, GPT-J) send the pattern through a dropout of their own, where the hook can stand.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import AttentionBridge

from transcoders.errors import ModelError

_NAME = "editable-pattern"


def make_patterns_editable(bridge: TransformerBridge) -> None:
    """Let edits of `hook_pattern` take effect in every block that runs Hugging Face's own attention."""
    attentions = [block.attn for block in bridge.blocks if _is_hugging_faces(getattr(block, "attn", None))]
    for attention in attentions:
        if isinstance(dropout := getattr(attention.original_component, "attn_dropout", None), torch.nn.Module):
            _fire_after(dropout, attention)
    modules = [attention.original_component for attention in attentions if _chooses_function(attention)]
    if not modules:
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, eager_mask)
    config: Any = bridge.original_model.config
    config._attn_implementation = _NAME
    for module in modules:
        module.accepts_pattern_fn = True


def _is_hugging_faces(attention: Any) -> bool:
    """Whether the bridge calls Hugging Face's attention, which can be handed what it does not know."""
    if not isinstance(attention, AttentionBridge) or type(attention).forward is not AttentionBridge.forward:
        return False
    module: Any = attention.original_component
    parameters = inspect.signature(module.forward).parameters.values()
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def _chooses_function(attention: Any) -> bool:
    """Whether Hugging Face's attention calls a function chosen by the configuration."""
    return hasattr(sys.modules[type(attention.original_component).__module__], "ALL_ATTENTION_FUNCTIONS")


def _fire_after(dropout: torch.nn.Module, attention: Any) -> None:
    dropout.register_forward_hook(lambda module, inputs, pattern: attention.hook_pattern(pattern))
    attention.original_component.accepts_pattern_fn = True  # the bridge shall not fire the hook once more


def _attention(
    module: torch.nn.Module,
    query: Float[Tensor, "batch head query d_head"],
    key: Float[Tensor, "batch kv_head key d_head"],
    value: Float[Tensor, "batch kv_head key d_v"],
    attention_mask: Float[Tensor, "batch _ query _"] | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    pattern_fn: Callable[[Tensor], Tensor] | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "batch query head d_v"], None]:
    """softmax(q kᵀ · scaling + mask) v, the softmax going through `pattern_fn`."""
    if softcap is not None or s_aux is not None or attention_mask is None:
        raise ModelError(
            f"{type(module).__name__} has a soft cap, sinks or no causal mask in its attention, "
            "which is not supported where TransformerLens leaves attention to Hugging Face."
        )
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(-1, -2) * scale + attention_mask[..., : key.shape[-2]]
    at_least_float32 = torch.promote_types(query.dtype, torch.float32)
    pattern = scores.softmax(-1, dtype=at_least_float32).to(query.dtype)
    pattern = torch.nn.functional.dropout(pattern, p=dropout, training=module.training)
    pattern = pattern if pattern_fn is None else pattern_fn(pattern)
    return (pattern @ value).transpose(1, 2).contiguous(), None
