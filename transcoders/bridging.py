"""What a bridge lacks before its hooks mean the same in every family, and whether it computes the model it stands for.

TransformerLens leaves some parts of a block to Hugging Face, whose classes differ in what an MLP returns, in which
precision experts can run, and in whether a norm has weights.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import NormalizationBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from transcoders.errors import ModelError
from transcoders.patterns import make_patterns_editable

_PROBE = 8
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-2}
"""Share of the largest logit by which two runs may differ; rounding is far below, another architecture above."""
_COARSE = 0.25
"""The same in less precision, where a token may also go to another expert."""


def prepare(bridge: TransformerBridge) -> None:
    """Let every hook be read and edited alike, whatever the family."""
    for module in bridge.modules():
        if isinstance(module, NormalizationBridge):
            _compute_in_the_open(module)
    for block in bridge.blocks:
        for part in (getattr(block, "attn", None), getattr(block, "mlp", None)):
            _add_the_stream_outside(part)
    make_patterns_editable(bridge)
    fit_precision(bridge)


def fit_precision(bridge: TransformerBridge) -> None:
    """Run experts one by one in float64, which Hugging Face's grouped products do not take."""
    model: Any = bridge.original_model
    has_experts = hasattr(model, "_can_set_experts_implementation") and model._can_set_experts_implementation()
    if has_experts and next(model.parameters()).dtype == torch.float64:
        model.set_experts_implementation("eager")


def _compute_in_the_open(norm: NormalizationBridge) -> None:
    """Hugging Face's own RMSNorm rounds to float32 whatever the dtype; the bridge's keeps float64 and takes edits.

    The bridge's multiplies by a weight, which OLMo's norm does not have.
    """
    norm.use_native_layernorm_autograd = False
    inside: Any = norm.original_component
    if not hasattr(inside, "weight") and hasattr(inside, "normalized_shape"):
        inside.register_buffer("weight", torch.ones(inside.normalized_shape), persistent=False)


def _add_the_stream_outside(part: Any) -> None:
    """Some classes (Bloom, MPT) add the residual stream inside attention or MLP; hooks should see their part alone."""
    inside = getattr(part, "original_component", None)
    if inside is not None and "residual" in inspect.signature(inside.forward).parameters:
        part.__dict__["forward"] = _without_stream(part.forward)  # set as an attribute, it would go to what is inside


def _without_stream(forward: Callable[..., Any]) -> Callable[..., Any]:
    def outside(read: Tensor, residual: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = forward(read, torch.zeros_like(residual), *args, **kwargs)
        return (out[0] + residual, *out[1:]) if isinstance(out, tuple) else out + residual

    return outside


@torch.no_grad()
def check_logits(bridge: TransformerBridge, name: str) -> None:
    """Raises `ModelError` where the bridge's logits of a few tokens are not those of Hugging Face's own modules."""
    count = min(_PROBE, int(bridge.cfg.d_vocab), int(bridge.cfg.n_ctx))
    # From the middle of the vocabulary: the ends hold padding and other special tokens, which models may mask.
    tokens = int(bridge.cfg.d_vocab) // 2 + torch.arange(count) - count // 2
    tokens = tokens[None].to(next(bridge.original_model.parameters()).device)
    try:
        ours = bridge(tokens, return_type="logits", prepend_bos=False)
        theirs = own_logits(bridge, tokens)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AttributeError, TypeError, ValueError, NotImplementedError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"{name} does not run through TransformerLens' bridge ({reason}); its architecture is not supported."
        ) from error
    far = float((ours - theirs).abs().max() / theirs.abs().max())
    if not far <= _TOLERANCE.get(ours.dtype, _COARSE):
        raise ModelError(
            f"The logits of {name} through TransformerLens' bridge differ from transformers' own by {far:.1e} of the "
            "largest; this architecture is not supported."
        )


def own_logits(bridge: TransformerBridge, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits by Hugging Face's modules alone."""
    with _own_modules(bridge.original_model) as model:
        return model(tokens).logits


@contextmanager
def _own_modules(model: Any) -> Iterator[Any]:
    """The model with what the bridge has put in its place taken out."""
    replaced = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent._modules.items()
        if isinstance(child, GeneralizedComponent) and not name.startswith("_") and child.original_component is not None
    ]
    try:
        for parent, name, child in replaced:
            parent._modules[name] = child.original_component
        yield model
    finally:
        for parent, name, child in replaced:
            parent._modules[name] = child
